//! Which part of guest RAM is still the template's.
//!
//! **Job.** Divides RAM into units, says of each whether it is clean, that is the template's and mapped from its file, or the VM's
//! own, in its memory file; and reads clean ones for a snapshot of the clone.
//! **Who is not trusted**: whoever made the template: a block is read into a buffer and its checksum compared there.
//! **Why this way.** A unit that became the VM's own never goes back, so one bit each does, and who reads while the pager works
//! sees the same bytes from either side: they differ only once the bit is set.
//!
//! Units are 16 KiB, and larger where that would be more than [`MAX_UNITS`]: each can make two more mappings of a process, which may
//! have 65,530 (`vm.max_map_count`). Where the template has nothing for [`GAP`] bytes or more, nothing has to be watched.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use ipc::limits::SNAPSHOT_BLOCK;

use super::GuestRam;
use crate::snapshot::memory::Index;

pub(super) const BLOCK: u64 = SNAPSHOT_BLOCK as u64;
const LEAST_UNIT: u64 = 16 << 10;
const MOST_UNIT: u64 = 2 << 20;
/// Units at most.
const MAX_UNITS: u64 = 16384;
/// Zeroes that are worth a mapping of their own, at least: two windows are never in one unit.
const GAP: u64 = MOST_UNIT;
/// Mappings of the template at the start, at most.
const MAX_WINDOWS: usize = 256;

/// A part of RAM: a region, or what the template has something for in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// Where this process has it mapped.
    pub(super) host: u64,
    /// Where it is in the memory file and in the template.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) size: u64,
}

impl Window {
    /// Every region of `ram`.
    pub(super) fn all(ram: &GuestRam) -> Vec<Self> {
        let all = ram.regions().map(|region| Self {
            host: region.host_address,
            offset: region.file_offset,
            size: region.size,
        });
        all.collect()
    }

    /// To whole units, as far as they are in `region`.
    fn widen(&mut self, unit: u64, region: Self) {
        let start = (self.offset & !(unit - 1)).max(region.offset);
        let end = (self.offset + self.size)
            .next_multiple_of(unit)
            .min(region.offset + region.size);
        *self = Self {
            host: region.host + (start - region.offset),
            offset: start,
            size: end - start,
        };
    }
}

/// A bit each.
#[derive(Debug)]
struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(count: u64) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn get(&self, index: u64) -> bool {
        self.0
            .get((index / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (index % 64) & 1 == 1)
    }

    fn set(&self, index: u64, value: bool) {
        if let Some(word) = self.0.get((index / 64) as usize) {
            let bit = 1 << (index % 64);
            if value {
                word.fetch_or(bit, Ordering::Release);
            } else {
                word.fetch_and(!bit, Ordering::Release);
            }
        }
    }

    /// The first one that is set, from `index` on.
    fn next(&self, index: u64) -> Option<u64> {
        let mut at = (index / 64) as usize;
        let mut word = self.0.get(at)?.load(Ordering::Acquire) & (u64::MAX << (index % 64));
        while word == 0 {
            at += 1;
            word = self.0.get(at)?.load(Ordering::Acquire);
        }
        Some(at as u64 * 64 + u64::from(word.trailing_zeros()))
    }
}

/// What is the template's still.
#[derive(Debug)]
pub(super) struct Clean {
    file: File,
    index: Index,
    size: u64,
    /// Bytes of a unit: a power of two.
    unit: u64,
    windows: Vec<Window>,
    clean: Bits,
    /// Blocks whose checksum was found right.
    checked: Bits,
}

/// A block that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum BlockError {
    /// It cannot be read.
    #[error("{0}")]
    Read(#[from] std::io::Error),
    /// It is not what was written.
    #[error("its checksum is wrong")]
    Sum,
}

impl Clean {
    /// All that `file` has for `ram`; gives both back if there are too many units.
    pub(super) fn new(ram: &GuestRam, file: File, index: Index) -> Result<Self, (File, Index)> {
        let regions = Window::all(ram);
        let mut windows = windows(&regions, &index);
        let total: u64 = windows.iter().map(|window| window.size).sum();
        let unit = total
            .div_ceil(MAX_UNITS)
            .next_power_of_two()
            .max(LEAST_UNIT);
        if unit > MOST_UNIT {
            return Err((file, index));
        }
        let size = ram.size();
        let clean = Bits::new(size.div_ceil(unit));
        for window in &mut windows {
            if let Some(region) = regions.iter().find(|region| {
                (region.offset..region.offset + region.size).contains(&window.offset)
            }) {
                window.widen(unit, *region);
            }
            for unit in window.offset / unit..(window.offset + window.size).div_ceil(unit) {
                clean.set(unit, true);
            }
        }
        Ok(Self {
            checked: Bits::new(index.sums.len() as u64),
            windows,
            clean,
            file,
            index,
            size,
            unit,
        })
    }

    pub(super) fn into_parts(self) -> (File, Index) {
        (self.file, self.index)
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// The window with this offset.
    pub(super) fn window(&self, offset: u64) -> Option<Window> {
        let behind = self
            .windows
            .partition_point(|window| window.offset <= offset);
        let window = self.windows.get(behind.checked_sub(1)?)?;
        (offset - window.offset < window.size).then_some(*window)
    }

    /// The window of this process's address, and the offset.
    pub(super) fn of_address(&self, address: u64) -> Option<(Window, u64)> {
        self.windows.iter().find_map(|window| {
            let within = address.checked_sub(window.host)?;
            (within < window.size).then_some((*window, window.offset + within))
        })
    }

    /// Start and end of the unit with this offset, as far as it is in `window`.
    pub(super) fn unit(&self, window: Window, offset: u64) -> (u64, u64) {
        let start = offset & !(self.unit - 1);
        let end = start + self.unit;
        (
            start.max(window.offset),
            end.min(window.offset + window.size),
        )
    }

    /// Pieces of a block that are a unit, or part of one.
    pub(super) fn piece(&self) -> u64 {
        self.unit.min(BLOCK)
    }

    pub(super) fn is_clean(&self, offset: u64) -> bool {
        self.clean.get(offset / self.unit)
    }

    /// From now on this unit is the VM's own.
    pub(super) fn taken(&self, offset: u64) {
        self.clean.set(offset / self.unit, false);
    }

    /// The first byte from `offset` on that is in a clean unit.
    pub(super) fn next_clean(&self, offset: u64) -> Option<u64> {
        let unit = self.clean.next(offset / self.unit)?;
        Some(offset.max(unit * self.unit))
    }

    /// Whether the template has something for the block with this offset.
    pub(super) fn has(&self, offset: u64) -> bool {
        self.index
            .sums
            .get((offset / BLOCK) as usize)
            .is_some_and(Option::is_some)
    }

    /// As [`Self::block`], if nobody has looked at it yet.
    pub(super) fn check(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        if !self.has(offset) || self.checked.get(offset / BLOCK) {
            return Ok(());
        }
        self.block(offset, buffer).map(drop)
    }

    /// The block with this offset, checked.
    pub(super) fn block<'a>(
        &self,
        offset: u64,
        buffer: &'a mut [u8],
    ) -> Result<&'a [u8], BlockError> {
        let start = offset & !(BLOCK - 1);
        let length = (self.size - start).min(BLOCK) as usize;
        let bytes = &mut buffer[..length];
        match self.index.sums.get((start / BLOCK) as usize) {
            Some(Some(sum)) => {
                self.file.read_exact_at(bytes, start)?;
                if crc32fast::hash(bytes) != *sum {
                    return Err(BlockError::Sum);
                }
                self.checked.set(start / BLOCK, true);
            }
            _ => bytes.fill(0),
        }
        Ok(bytes)
    }

    /// Puts what is clean of `bytes`, which is RAM from `offset` on, in its place.
    pub(super) fn read_over(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let mut at = offset;
        let end = offset + bytes.len() as u64;
        let mut buffer = vec![0; BLOCK as usize];
        while at < end {
            let next = ((at & !(self.piece() - 1)) + self.piece()).min(end);
            if self.is_clean(at) {
                let start = at & !(BLOCK - 1);
                let block = self
                    .block(at, &mut buffer)
                    .map_err(|e| std::io::Error::other(e.to_string()))?;
                let from = &block[(at - start) as usize..(next - start) as usize];
                bytes[(at - offset) as usize..(next - offset) as usize].copy_from_slice(from);
            }
            at = next;
        }
        Ok(())
    }

    /// Start of the first block from `offset` on, a block's, of which something is clean and not zero.
    pub(super) fn next_data(&self, mut offset: u64) -> Option<u64> {
        loop {
            offset = self.next_clean(offset)? & !(BLOCK - 1);
            if offset >= self.size {
                return None;
            }
            if self.has(offset) {
                return Some(offset);
            }
            offset += BLOCK;
        }
    }
}

/// Runs of blocks in `regions` that are not zero, with the gaps in between that are not worth a mapping.
fn windows(regions: &[Window], index: &Index) -> Vec<Window> {
    let mut gap = GAP;
    loop {
        let found = runs(regions, index, gap);
        if found.len() <= MAX_WINDOWS.max(regions.len()) {
            return found;
        }
        gap *= 2;
    }
}

fn runs(regions: &[Window], index: &Index, gap: u64) -> Vec<Window> {
    let mut found: Vec<Window> = Vec::new();
    for region in regions {
        let first = found.len();
        let end = region.offset + region.size;
        for offset in (region.offset..end).step_by(BLOCK as usize) {
            if !matches!(index.sums.get((offset / BLOCK) as usize), Some(Some(_))) {
                continue;
            }
            let behind = (offset + BLOCK).min(end);
            match found.get_mut(first..).and_then(<[_]>::last_mut) {
                Some(last) if offset - (last.offset + last.size) < gap => {
                    last.size = behind - last.offset;
                }
                _ => found.push(Window {
                    host: region.host + (offset - region.offset),
                    offset,
                    size: behind - offset,
                }),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MIN_SIZE, RamConfig};

    /// RAM, and a template of it with a word in each of `blocks`.
    fn template(blocks: &[u64]) -> (GuestRam, Clean) {
        let ram = GuestRam::new(RamConfig::new(MIN_SIZE)).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIN_SIZE).unwrap();
        let mut sums = vec![None; (MIN_SIZE / BLOCK) as usize];
        for block in blocks {
            let mut bytes = vec![0; BLOCK as usize];
            bytes[..8].copy_from_slice(&block.to_le_bytes());
            file.write_all_at(&bytes, block * BLOCK).unwrap();
            sums[*block as usize] = Some(crc32fast::hash(&bytes));
        }
        let index = Index {
            block: SNAPSHOT_BLOCK,
            sums,
        };
        let clean = Clean::new(&ram, file, index).unwrap();
        (ram, clean)
    }

    #[test]
    fn zeroes_that_are_long_enough_are_not_watched() {
        let (_, clean) = template(&[1, 2, 10, 900, 2047]);
        let windows: Vec<_> = clean
            .windows()
            .iter()
            .map(|window| (window.offset / BLOCK, window.size / BLOCK))
            .collect();
        assert_eq!(windows, [(1, 10), (900, 1), (2047, 1)]);
        assert!(clean.window(BLOCK - 1).is_none());
        assert!(clean.window(11 * BLOCK).is_none());
        let window = clean.window(5 * BLOCK).unwrap();
        assert_eq!(
            clean.of_address(window.host + 4 * BLOCK + 7).unwrap().1,
            5 * BLOCK + 7
        );
        assert_eq!(
            clean.unit(window, 5 * BLOCK + LEAST_UNIT + 1),
            (5 * BLOCK + LEAST_UNIT, 5 * BLOCK + 2 * LEAST_UNIT)
        );
        // A template in many pieces has fewer and larger windows.
        let (_, clean) = template(&(0..2048).step_by(40).collect::<Vec<_>>());
        assert_eq!(clean.windows().len(), 52);
    }

    #[test]
    fn what_was_taken_is_read_where_it_is_and_the_rest_from_the_template() {
        let (ram, clean) = template(&[1, 2, 900]);
        assert_eq!(clean.next_data(0), Some(BLOCK));
        assert_eq!(clean.next_data(3 * BLOCK), Some(900 * BLOCK));
        // Its second unit, where the template has zeroes.
        ram.write_at(BLOCK + LEAST_UNIT, b"own").unwrap();
        clean.taken(BLOCK + LEAST_UNIT);
        ram.set_clean(std::sync::Arc::new(clean));
        let mut bytes = vec![0xff; 2 * BLOCK as usize];
        ram.read_file_at(BLOCK, &mut bytes).unwrap();
        assert_eq!(bytes[..8], 1u64.to_le_bytes());
        assert_eq!(bytes[LEAST_UNIT as usize..][..4], *b"own\0");
        assert_eq!(bytes[BLOCK as usize..][..8], 2u64.to_le_bytes());
        assert_eq!(ram.next_data(901 * BLOCK), Ok(None));
        assert_eq!(ram.next_data(3 * BLOCK), Ok(Some(900 * BLOCK)));
    }

    #[test]
    fn a_block_that_is_damaged_is_told() {
        let (_, clean) = template(&[1]);
        let mut buffer = vec![0; BLOCK as usize];
        clean.check(BLOCK, &mut buffer).unwrap();
        let (_, other) = template(&[1]);
        std::os::unix::fs::FileExt::write_all_at(other.file(), &[1], BLOCK + 100).unwrap();
        assert!(matches!(
            other.check(BLOCK, &mut buffer),
            Err(BlockError::Sum)
        ));
    }
}
