//! What the driver reads before it sends a request (virtio 1.3, 5.2.4).

use crate::request::SECTOR;

/// `struct virtio_blk_config` up to and including `num_queues`.
const LEN: usize = 36;
const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;
const NUM_QUEUES: usize = 34;

/// The encoded structure, little endian.
#[derive(Debug, Clone)]
pub(crate) struct ConfigSpace([u8; LEN]);

impl ConfigSpace {
    /// For a disk of `bytes` bytes. `seg_max` counts data buffers of one request.
    pub(crate) fn new(bytes: u64, seg_max: u32, num_queues: u16) -> Self {
        let mut space = [0; LEN];
        let mut put = |at: usize, value: &[u8]| space[at..at + value.len()].copy_from_slice(value);
        put(CAPACITY, &(bytes / SECTOR).to_le_bytes());
        put(SEG_MAX, &seg_max.to_le_bytes());
        // What the guest addresses is always 512 bytes, whatever the image's file system prefers: a partition table
        // counts in these blocks, and must not change its meaning when the image moves.
        put(BLK_SIZE, &(SECTOR as u32).to_le_bytes());
        put(NUM_QUEUES, &num_queues.to_le_bytes());
        Self(space)
    }

    /// Copies what there is from `offset` on; the rest of `out` stays as it is.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) {
        device_host::copy_config(&self.0, offset, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_puts_them() {
        let space = ConfigSpace::new(5 << 30, 254, 3);
        let mut all = [0xff; 64];
        space.read(0, &mut all);
        assert_eq!(all[0..8], (5u64 << 21).to_le_bytes());
        assert_eq!(all[8..12], [0; 4], "size_max");
        assert_eq!(all[12..16], 254u32.to_le_bytes());
        assert_eq!(all[20..24], 512u32.to_le_bytes());
        assert_eq!(all[34..36], 3u16.to_le_bytes());
        assert_eq!(all[36..], [0xff; 28], "not ours");
        let mut two = [9; 2];
        space.read(35, &mut two);
        assert_eq!(two, [0, 9]);
        space.read(usize::MAX, &mut two);
        assert_eq!(two, [0, 9]);
    }
}
