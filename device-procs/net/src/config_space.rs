//! What the driver reads before it sends a packet (virtio 1.3, 5.1.4).

use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

/// `mac`, `status`, `max_virtqueue_pairs`.
const LEN: usize = 10;
/// Where `status` is, le16.
const STATUS: usize = 6;

/// The encoded structure, little endian.
#[derive(Debug, Clone)]
pub(crate) struct ConfigSpace {
    bytes: [u8; LEN],
    /// There is a tap behind it, without which the link stays down.
    has_tap: bool,
}

impl ConfigSpace {
    pub(crate) fn new(mac: [u8; 6], pairs: u16, has_tap: bool) -> Self {
        let mut bytes = [0; LEN];
        bytes[..6].copy_from_slice(&mac);
        let status = if has_tap { VIRTIO_NET_S_LINK_UP } else { 0 };
        bytes[6..8].copy_from_slice(&(status as u16).to_le_bytes()); // a bit
        bytes[8..].copy_from_slice(&pairs.to_le_bytes());
        Self { bytes, has_tap }
    }

    /// Whether packets pass.
    pub(crate) fn link_is_up(&self) -> bool {
        u32::from(self.bytes[STATUS]) & VIRTIO_NET_S_LINK_UP != 0
    }

    /// The host changes `status`; all else stays. Whether `data` is that.
    pub(crate) fn set_status(&mut self, offset: usize, data: &[u8]) -> bool {
        let [low, 0] = *data else { return false };
        let known = VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE;
        if offset != STATUS || u32::from(low) & !known != 0 || low != 0 && !self.has_tap {
            return false;
        }
        self.bytes[STATUS] = low;
        true
    }

    /// Whether the driver is asked to tell the network where it is now (5.1.6.5.4).
    pub(crate) fn announces(&self) -> bool {
        u32::from(self.bytes[STATUS]) & VIRTIO_NET_S_ANNOUNCE != 0
    }

    /// It is not asked any more.
    pub(crate) fn announced(&mut self) {
        self.bytes[STATUS] &= !(VIRTIO_NET_S_ANNOUNCE as u8); // 2
    }

    /// Copies what there is from `offset` on; the rest of `out` stays as it is.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) {
        device_host::copy_config(&self.bytes, offset, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_puts_them() {
        let mut all = [0xff; 12];
        ConfigSpace::new([2, 3, 4, 5, 6, 7], 4, true).read(0, &mut all);
        assert_eq!(all, [2, 3, 4, 5, 6, 7, 1, 0, 4, 0, 0xff, 0xff]);
    }

    #[test]
    fn the_host_changes_the_link_and_nothing_else() {
        let mut space = ConfigSpace::new([2, 3, 4, 5, 6, 7], 4, true);
        for (offset, data) in [
            (0, &[0, 0][..]),
            (8, &[0, 0]),
            (6, &[0]),
            (6, &[4, 0]),
            (6, &[0, 1]),
        ] {
            assert!(!space.set_status(offset, data), "{offset} {data:?}");
            assert!(space.link_is_up());
        }
        assert!(space.set_status(6, &[0, 0]) && !space.link_is_up());
        assert!(space.set_status(6, &[1, 0]) && space.link_is_up());
        assert!(!space.announces());
        assert!(space.set_status(6, &[3, 0]) && space.announces());
        space.announced();
        assert!(space.link_is_up() && !space.announces());
    }

    #[test]
    fn without_a_tap_the_link_stays_down() {
        let mut space = ConfigSpace::new([2, 3, 4, 5, 6, 7], 4, false);
        assert!(!space.link_is_up());
        assert!(!space.set_status(6, &[1, 0]) && !space.set_status(6, &[2, 0]));
        assert!(space.set_status(6, &[0, 0]) && !space.link_is_up());
    }
}
