//! The control queue (virtio 1.3, 5.1.6.5): how many queue pairs the driver uses, and nothing else.

use device_host::{Chain, DeviceFault, FaultKind, GuestBuffers, Ring};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// What one command asks for.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    /// Use this many pairs.
    SetPairs(u16),
    /// Answered with an error.
    Other,
}

impl Command {
    /// `class` u8, `command` u8, then data.
    fn read(mut buffers: GuestBuffers<'_>) -> Self {
        let mut raw = [0; 4];
        let len = buffers.read(&mut raw);
        Self::parse(&raw[..len])
    }

    fn parse(raw: &[u8]) -> Self {
        match *raw {
            [class, command, low, high]
                if u32::from(class) == VIRTIO_NET_CTRL_MQ
                    && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET =>
            {
                Self::SetPairs(u16::from_le_bytes([low, high]))
            }
            _ => Self::Other,
        }
    }
}

/// Answers all commands; returns the last number of pairs that was set.
pub(crate) fn process(ring: &mut Ring, max_pairs: u16) -> Result<Option<u16>, DeviceFault> {
    let mut pairs = None;
    while let Some(Chain {
        token,
        readable,
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
        let answer = match Command::read(readable) {
            Command::SetPairs(count) if (1..=max_pairs).contains(&count) => {
                pairs = Some(count);
                VIRTIO_NET_OK
            }
            Command::SetPairs(_) | Command::Other => VIRTIO_NET_ERR,
        };
        ack.set(answer as u8); // 0 or 1
        ring.complete(token, 1)?;
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_number_of_pairs_is_understood() {
        assert_eq!(Command::parse(&[4, 0, 3, 0]), Command::SetPairs(3));
        assert_eq!(Command::parse(&[4, 0, 0, 0x80]), Command::SetPairs(0x8000));
        for raw in [
            &[][..],
            &[4],
            &[4, 0],
            &[4, 0, 1],
            &[4, 1, 1, 0],
            &[0, 0, 1, 0],
            &[1, 0, 1, 0],
        ] {
            assert_eq!(Command::parse(raw), Command::Other, "{raw:?}");
        }
    }
}
