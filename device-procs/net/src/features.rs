//! What is offered, and what the tap is told of what was accepted (virtio 1.3, 5.1.3).

use device_host::tap;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Feature bits of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Features(pub(crate) u64);

impl Features {
    /// All that a card with `pairs` queue pairs offers. Without a `control` queue that, and what the driver reads first, are the
    /// front end's.
    pub(crate) fn offered(pairs: u16, uso: bool, control: bool) -> Self {
        let mut bits = bit(VIRTIO_NET_F_CSUM)
            | bit(VIRTIO_NET_F_GUEST_CSUM)
            | bit(VIRTIO_NET_F_GUEST_TSO4)
            | bit(VIRTIO_NET_F_GUEST_TSO6)
            | bit(VIRTIO_NET_F_GUEST_ECN)
            | bit(VIRTIO_NET_F_GUEST_UFO)
            | bit(VIRTIO_NET_F_HOST_TSO4)
            | bit(VIRTIO_NET_F_HOST_TSO6)
            | bit(VIRTIO_NET_F_HOST_ECN)
            | bit(VIRTIO_NET_F_HOST_UFO)
            | bit(VIRTIO_NET_F_MRG_RXBUF);
        if control {
            bits |= bit(VIRTIO_NET_F_MAC)
                | bit(VIRTIO_NET_F_STATUS)
                | bit(VIRTIO_NET_F_CTRL_VQ)
                | bit(VIRTIO_NET_F_CTRL_RX)
                | bit(VIRTIO_NET_F_CTRL_VLAN)
                | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
                | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
                | bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
        }
        if uso {
            bits |= bit(VIRTIO_NET_F_GUEST_USO4)
                | bit(VIRTIO_NET_F_GUEST_USO6)
                | bit(VIRTIO_NET_F_HOST_USO);
        }
        if pairs > 1 {
            bits |= bit(VIRTIO_NET_F_MQ);
        }
        Self(bits)
    }

    /// Those of this set that can be kept where the kernel's vhost passes the packets, with `features`: it looks at no address and no
    /// tag, so that a driver is offered no filter.
    pub(crate) fn with_vhost(self, features: u64) -> Self {
        let unfiltered = bit(VIRTIO_NET_F_CTRL_RX) | bit(VIRTIO_NET_F_CTRL_VLAN);
        let own = bit(VIRTIO_NET_F_MRG_RXBUF);
        Self(self.0 & !unfiltered & (features | !own))
    }

    /// Those that were offered before: a driver has chosen among them.
    pub(crate) fn among(self, offered: u64) -> Self {
        Self(self.0 & offered)
    }

    /// Those of the device that the kernel's vhost is told.
    pub(crate) fn for_vhost(self) -> u64 {
        self.0 & bit(VIRTIO_NET_F_MRG_RXBUF)
    }

    pub(crate) fn has(self, feature: u32) -> bool {
        self.0 & bit(feature) != 0
    }

    /// Received packets may be spread over several buffers.
    pub(crate) fn mergeable(self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Those of the offloads of received packets (5.1.6.5.6.1) that are in this set.
    pub(crate) fn guest_offloads(self) -> u64 {
        self.0
            & (bit(VIRTIO_NET_F_GUEST_CSUM)
                | bit(VIRTIO_NET_F_GUEST_TSO4)
                | bit(VIRTIO_NET_F_GUEST_TSO6)
                | bit(VIRTIO_NET_F_GUEST_ECN)
                | bit(VIRTIO_NET_F_GUEST_UFO)
                | bit(VIRTIO_NET_F_GUEST_USO4)
                | bit(VIRTIO_NET_F_GUEST_USO6))
    }

    /// Flags for `TUNSETOFFLOAD`. A segmentation bit without the bits that it requires (virtio 1.3, 5.1.3.1) is left out, so
    /// that no set of bits makes the kernel refuse.
    pub(crate) fn tap_offloads(self) -> u32 {
        if !self.has(VIRTIO_NET_F_GUEST_CSUM) {
            return 0;
        }
        let mut flags = tap::CSUM;
        let (tso4, tso6) = (
            self.has(VIRTIO_NET_F_GUEST_TSO4),
            self.has(VIRTIO_NET_F_GUEST_TSO6),
        );
        if tso4 {
            flags |= tap::TSO4;
        }
        if tso6 {
            flags |= tap::TSO6;
        }
        if self.has(VIRTIO_NET_F_GUEST_ECN) && (tso4 || tso6) {
            flags |= tap::TSO_ECN;
        }
        if self.has(VIRTIO_NET_F_GUEST_UFO) {
            flags |= tap::UFO;
        }
        if self.has(VIRTIO_NET_F_GUEST_USO4) && self.has(VIRTIO_NET_F_GUEST_USO6) {
            flags |= tap::USO;
        }
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_pairs_and_uso_are_offered_where_they_are() {
        let one = Features::offered(1, false, true);
        assert!(one.has(VIRTIO_NET_F_CTRL_VQ) && !one.has(VIRTIO_NET_F_MQ));
        assert!(!one.has(VIRTIO_NET_F_HOST_USO));
        let four = Features::offered(4, true, true);
        assert!(four.has(VIRTIO_NET_F_CTRL_VQ) && four.has(VIRTIO_NET_F_MQ));
        assert!(four.has(VIRTIO_NET_F_HOST_USO));
        let alone = Features::offered(4, true, false);
        assert!(alone.has(VIRTIO_NET_F_MQ) && alone.has(VIRTIO_NET_F_HOST_USO));
        let front_ends = [VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS];
        assert!(!front_ends.into_iter().any(|bit| alone.has(bit)));
    }

    #[test]
    fn with_vhost_there_is_no_filter_and_what_the_kernel_knows() {
        let all = Features::offered(4, true, true);
        let with = all.with_vhost(u64::MAX);
        assert!(!with.has(VIRTIO_NET_F_CTRL_RX) && !with.has(VIRTIO_NET_F_CTRL_VLAN));
        let lost = bit(VIRTIO_NET_F_CTRL_RX) | bit(VIRTIO_NET_F_CTRL_VLAN);
        assert_eq!(with.0 | lost, all.0);
        assert_eq!(with.for_vhost(), bit(VIRTIO_NET_F_MRG_RXBUF));
        let without = all.with_vhost(0);
        assert!(!without.mergeable() && without.has(VIRTIO_NET_F_CSUM));
    }

    #[test]
    fn offloads_need_what_they_depend_on() {
        let of =
            |bits: &[u32]| Features(bits.iter().fold(0, |all, b| all | bit(*b))).tap_offloads();
        assert_eq!(of(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_UFO]), 0);
        assert_eq!(
            of(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN]),
            tap::CSUM
        );
        assert_eq!(
            of(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_USO4]),
            tap::CSUM
        );
        assert_eq!(
            Features::offered(1, true, true).tap_offloads(),
            tap::CSUM | tap::TSO4 | tap::TSO6 | tap::TSO_ECN | tap::UFO | tap::USO
        );
    }
}
