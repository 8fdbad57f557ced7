//! What the driver reads before it sends a request (virtio 1.3, 5.2.4).

use ipc::limits::{MAX_RANGE_SECTORS, MAX_RANGES};

use crate::request::SECTOR;

/// `struct virtio_blk_config` up to and including `write_zeroes_may_unmap` and its padding.
const LEN: usize = 60;
const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;
const PHYSICAL_BLOCK_EXP: usize = 24;
const OPT_IO_SIZE: usize = 28;
const WRITEBACK: usize = 32;
const NUM_QUEUES: usize = 34;
const MAX_DISCARD_SECTORS: usize = 36;
const MAX_DISCARD_SEG: usize = 40;
const DISCARD_SECTOR_ALIGNMENT: usize = 44;
const MAX_WRITE_ZEROES_SECTORS: usize = 48;
const MAX_WRITE_ZEROES_SEG: usize = 52;
const WRITE_ZEROES_MAY_UNMAP: usize = 56;

/// What a driver is told of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes.
    pub(crate) bytes: u64,
    /// Data buffers of one request.
    pub(crate) seg_max: u32,
    /// Queues.
    pub(crate) num_queues: u16,
    /// Bytes that the host reads and writes at once: a power of two, at least a sector.
    pub(crate) physical_block: u32,
    /// A write of zeroes may free space.
    pub(crate) may_unmap: bool,
}

/// The encoded structure, little endian.
#[derive(Debug, Clone)]
pub(crate) struct ConfigSpace([u8; LEN]);

impl ConfigSpace {
    /// For a disk with a write cache.
    pub(crate) fn new(geometry: Geometry) -> Self {
        let Geometry {
            bytes,
            seg_max,
            num_queues,
            physical_block,
            may_unmap,
        } = geometry;
        let mut space = [0; LEN];
        let mut put = |at: usize, value: &[u8]| space[at..at + value.len()].copy_from_slice(value);
        put(CAPACITY, &(bytes / SECTOR).to_le_bytes());
        put(SEG_MAX, &seg_max.to_le_bytes());
        // What the guest addresses is always 512 bytes, whatever the image's file system prefers: a partition table
        // counts in these blocks, and must not change its meaning when the image moves.
        put(BLK_SIZE, &(SECTOR as u32).to_le_bytes());
        // A hint for the driver's own alignment. Its unit is the block size of 2^0 sectors.
        let exponent = (physical_block / SECTOR as u32).max(1).ilog2();
        put(PHYSICAL_BLOCK_EXP, &[exponent as u8]); // at most 31
        put(OPT_IO_SIZE, &0u32.to_le_bytes());
        put(WRITEBACK, &[1]);
        put(NUM_QUEUES, &num_queues.to_le_bytes());
        put(MAX_DISCARD_SECTORS, &MAX_RANGE_SECTORS.to_le_bytes());
        put(MAX_DISCARD_SEG, &(MAX_RANGES as u32).to_le_bytes());
        let alignment = physical_block / SECTOR as u32;
        put(DISCARD_SECTOR_ALIGNMENT, &alignment.max(1).to_le_bytes());
        put(MAX_WRITE_ZEROES_SECTORS, &MAX_RANGE_SECTORS.to_le_bytes());
        put(MAX_WRITE_ZEROES_SEG, &(MAX_RANGES as u32).to_le_bytes());
        put(WRITE_ZEROES_MAY_UNMAP, &[u8::from(may_unmap)]);
        Self(space)
    }

    /// The disk has another size, in bytes.
    pub(crate) fn set_capacity(&mut self, bytes: u64) {
        self.0[CAPACITY..CAPACITY + 8].copy_from_slice(&(bytes / SECTOR).to_le_bytes());
    }

    /// Whether the driver wants a write cache (virtio 1.3, 5.2.4: `writeback`).
    pub(crate) fn writeback(&self) -> bool {
        self.0[WRITEBACK] != 0
    }

    /// The driver writes; `writeback` is the only field that it may.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        if let Some(value) = WRITEBACK.checked_sub(offset).and_then(|at| data.get(at)) {
            self.0[WRITEBACK] = u8::from(*value != 0);
        }
    }

    /// As before the driver wrote anything.
    pub(crate) fn reset(&mut self) {
        self.0[WRITEBACK] = 1;
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
        let mut space = ConfigSpace::new(Geometry {
            bytes: 5 << 30,
            seg_max: 254,
            num_queues: 3,
            physical_block: 4096,
            may_unmap: true,
        });
        let mut all = [0xff; 64];
        space.read(0, &mut all);
        assert_eq!(all[0..8], (5u64 << 21).to_le_bytes());
        assert_eq!(all[8..12], [0; 4], "size_max");
        assert_eq!(all[12..16], 254u32.to_le_bytes());
        assert_eq!(all[20..24], 512u32.to_le_bytes());
        assert_eq!(all[34..36], 3u16.to_le_bytes());
        assert_eq!(all[24], 3, "4096 bytes are 8 sectors");
        assert_eq!(all[32], 1);
        assert_eq!(all[36..40], (1u32 << 21).to_le_bytes());
        assert_eq!(all[44..48], 8u32.to_le_bytes());
        assert_eq!(all[56..60], [1, 0, 0, 0]);
        assert_eq!(all[60..], [0xff; 4], "not ours");
        space.write(0, &[0; 32]);
        assert!(space.writeback(), "only one field can be written");
        space.write(30, &[7, 7, 0]);
        assert!(!space.writeback());
        space.write(usize::MAX, &[1]);
        space.write(32, &[5]);
        space.read(32, &mut all[..1]);
        assert_eq!(all[0], 1);
        let mut two = [9; 2];
        space.read(59, &mut two);
        assert_eq!(two, [0, 9]);
        space.read(usize::MAX, &mut two);
        assert_eq!(two, [0, 9]);
    }
}
