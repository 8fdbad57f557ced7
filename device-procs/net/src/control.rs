//! The control queue (virtio 1.3, 5.1.6.5): queue pairs, what the driver wants to receive, and which offloads.
//!
//! **Job.** Reads commands and tells what they ask for; the device does it. A command that is not one, or whose feature was not
//! negotiated, is answered with an error and changes nothing.
//! **Who is not trusted.** The driver: a command is copied once, and no more than [`MAX_COMMAND`] bytes of it.
//! **Why this way.** Commands are rare, so that one buffer and one copy do.

use device_host::{Chain, DeviceFault, FaultKind, Ring};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC,
    VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use crate::features::Features;

/// Bytes of a command at most: two tables of 2,700 addresses together. Linux sends a page's worth.
const MAX_COMMAND: usize = 16 << 10;

/// What one command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command<'a> {
    /// Use this many pairs.
    Pairs(u16),
    /// Receive everything, or not.
    Promiscuous(bool),
    /// Receive what goes to any group, or not.
    AllMulticast(bool),
    /// Both tables of addresses.
    Tables(&'a [u8]),
    /// The card's own address.
    Mac([u8; 6]),
    /// Receive what is of a VLAN, or do not.
    Vlan(u16, bool),
    /// Offloads of received packets, as feature bits.
    Offloads(u64),
    /// The driver has seen that it is to tell the network where it is.
    Announced,
}

impl<'a> Command<'a> {
    /// `class` u8, `command` u8, then data. `None` if it is none of a driver with these features.
    fn parse(raw: &'a [u8], features: Features) -> Option<Self> {
        let ([class, command], data) = raw.split_first_chunk::<2>()?;
        let has = |feature| features.has(feature).then_some(());
        match (u32::from(*class), u32::from(*command)) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                has(VIRTIO_NET_F_MQ)?;
                Some(Self::Pairs(u16::from_le_bytes(data.try_into().ok()?)))
            }
            (VIRTIO_NET_CTRL_RX, which) => {
                has(VIRTIO_NET_F_CTRL_RX)?;
                let on = match data {
                    [0] => false,
                    [1] => true,
                    _ => return None,
                };
                match which {
                    VIRTIO_NET_CTRL_RX_PROMISC => Some(Self::Promiscuous(on)),
                    VIRTIO_NET_CTRL_RX_ALLMULTI => Some(Self::AllMulticast(on)),
                    _ => None,
                }
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                has(VIRTIO_NET_F_CTRL_RX)?;
                Some(Self::Tables(data))
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                has(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                Some(Self::Mac(data.try_into().ok()?))
            }
            (VIRTIO_NET_CTRL_VLAN, which) => {
                has(VIRTIO_NET_F_CTRL_VLAN)?;
                let id = u16::from_le_bytes(data.try_into().ok()?);
                match which {
                    VIRTIO_NET_CTRL_VLAN_ADD => Some(Self::Vlan(id, true)),
                    VIRTIO_NET_CTRL_VLAN_DEL => Some(Self::Vlan(id, false)),
                    _ => None,
                }
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                Some(Self::Offloads(u64::from_le_bytes(data.try_into().ok()?)))
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                has(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                data.is_empty().then_some(Self::Announced)
            }
            _ => None,
        }
    }
}

/// Has all commands done by `obey`, which tells whether one was possible.
pub(crate) fn process(
    ring: &mut Ring,
    features: Features,
    mut obey: impl FnMut(Command<'_>) -> bool,
) -> Result<(), DeviceFault> {
    let mut raw = Vec::new();
    while let Some(Chain {
        token,
        mut readable,
        mut writable,
    }) = ring.pop()?
    {
        let Some(ack) = writable.take_last_byte() else {
            return Err(ring
                .fault(FaultKind::Request(
                    "control command without room for an answer",
                ))
                .into());
        };
        let len = readable.len();
        raw.resize(len.min(MAX_COMMAND), 0);
        readable.read(&mut raw);
        let done = len <= MAX_COMMAND && Command::parse(&raw, features).is_some_and(&mut obey);
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        ack.set(answer as u8); // 0 or 1
        // Not seen by the driver before this turn is over, when what it changed has been kept for a process after this one.
        ring.complete_later(std::iter::once((token, 1)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_apart() {
        let all = Features(u64::MAX);
        let mac = [1, 2, 3, 4, 5, 6];
        for (raw, want) in [
            (&[4, 0, 3, 0][..], Command::Pairs(3)),
            (&[4, 0, 0, 0x80], Command::Pairs(0x8000)),
            (&[0, 0, 1], Command::Promiscuous(true)),
            (&[0, 1, 0], Command::AllMulticast(false)),
            (&[1, 0, 9, 9], Command::Tables(&[9, 9])),
            (&[1, 1, 1, 2, 3, 4, 5, 6], Command::Mac(mac)),
            (&[2, 0, 1, 1], Command::Vlan(0x101, true)),
            (&[2, 1, 1, 0], Command::Vlan(1, false)),
            (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], Command::Offloads(2)),
        ] {
            assert_eq!(Command::parse(raw, all), Some(want), "{raw:?}");
            assert_eq!(
                Command::parse(raw, Features(0)),
                None,
                "{raw:?} not negotiated"
            );
            let longer = [raw, &[0]].concat();
            if raw[..2] != [1, 0] {
                assert_eq!(Command::parse(&longer, all), None, "{longer:?}");
                assert_eq!(Command::parse(&raw[..raw.len() - 1], all), None);
            }
        }
        for raw in [
            &[][..],
            &[4],
            &[4, 0],
            &[4, 1, 1, 0],
            &[0, 0, 2],
            &[0, 2, 1],
            &[0, 6, 1],
            &[1, 2, 0],
            &[2, 2, 0, 0],
            &[3, 1],
            &[3, 0, 0],
            &[5, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            &[6, 0, 0],
        ] {
            assert_eq!(Command::parse(raw, all), None, "{raw:?}");
        }
    }
}
