//! Guest RAM to and from a snapshot's file `memory`.
//!
//! **Job.** Writes RAM in steps that are short enough for a main loop, with holes where it is zero and a checksum for each
//! block of [`SNAPSHOT_BLOCK`] bytes; reads it back, every block checked.
//! **Who is not trusted**: whoever made the file; and device processes, which can write to RAM at any time: a block is copied
//! once, and what was copied is checked and used.
//! **Why this way.** The file has RAM at the offsets that it has in its memfd, so a place in one is a place in the other.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ipc::limits::SNAPSHOT_BLOCK;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::memory::GuestRam;

const BLOCK: usize = SNAPSHOT_BLOCK as usize;
/// Bytes of one [`Writer::step`]: a few milliseconds of work.
pub(super) const STEP: u64 = 8 << 20;
/// Threads that read RAM back, at most: memory bandwidth is used up by then.
const READERS: usize = 8;

/// What is in the file `memory`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Bytes of a block.
    pub block: u32,
    /// CRC-32 of each block; `None` for one that is zero, and a hole in the file.
    pub sums: Vec<Option<u32>>,
}

/// Why guest RAM cannot be written or read.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A call failed.
    #[error("{what} failed")]
    Io {
        /// What was done.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The index is not one for this RAM.
    #[error("is not of a guest with {0} bytes of memory")]
    Index(u64),
    /// The file has another length.
    #[error("has {got} bytes and should have {want}: it is truncated or of another snapshot")]
    Length {
        /// Its length.
        got: u64,
        /// The guest's RAM.
        want: u64,
    },
    /// A block's checksum is wrong.
    #[error(
        "is damaged or of another snapshot: the checksum of {BLOCK} bytes at {offset:#x} is wrong"
    )]
    Damaged {
        /// Where the block starts.
        offset: u64,
    },
}

pub(super) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> MemoryError {
    move |source| MemoryError::Io { what, source }
}

impl Index {
    /// Whether this can be the index of a guest with `size` bytes.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self, size: u64) -> Result<(), MemoryError> {
        let blocks = size.div_ceil(u64::from(SNAPSHOT_BLOCK));
        if self.block != SNAPSHOT_BLOCK || self.sums.len() as u64 != blocks {
            return Err(MemoryError::Index(size));
        }
        Ok(())
    }

    /// Bytes that are not zero.
    #[must_use]
    pub fn present(&self) -> u64 {
        self.sums.iter().flatten().count() as u64 * u64::from(self.block)
    }
}

/// RAM on its way into a file.
#[derive(Debug)]
pub struct Writer {
    ram: Arc<GuestRam>,
    file: File,
    next: u64,
    sums: Vec<Option<u32>>,
    buffer: Vec<u8>,
}

impl Writer {
    /// From the start of `ram` into `file`, which is as long and all holes.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, file: File) -> Self {
        Self {
            ram,
            file,
            next: 0,
            sums: Vec::new(),
            buffer: vec![0; BLOCK],
        }
    }

    /// Bytes that are done.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.next.min(self.ram.size())
    }

    /// The next few milliseconds' worth; `false` when all is written.
    ///
    /// # Errors
    /// The file system is full, say.
    pub fn step(&mut self) -> Result<bool, MemoryError> {
        let mut work = 0;
        while self.next < self.ram.size() {
            if work >= STEP {
                return Ok(true);
            }
            if let Some(data) = next_data(&self.ram, self.next)? {
                let data = (data - data % u64::from(SNAPSHOT_BLOCK)).max(self.next);
                // Blocks in between are holes in RAM's own file.
                let empty = (data - self.next) / u64::from(SNAPSHOT_BLOCK);
                self.sums.extend((0..empty).map(|_| None));
                self.next += empty * u64::from(SNAPSHOT_BLOCK);
                self.write_block()?;
                work += u64::from(SNAPSHOT_BLOCK);
            } else {
                let blocks = self.ram.size().div_ceil(u64::from(SNAPSHOT_BLOCK));
                self.sums.resize(usize::try_from(blocks).unwrap_or(0), None);
                self.next = self.ram.size();
            }
        }
        Ok(false)
    }

    fn write_block(&mut self) -> Result<(), MemoryError> {
        let length =
            usize::try_from(self.ram.size() - self.next).map_or(BLOCK, |rest| rest.min(BLOCK));
        let bytes = &mut self.buffer[..length];
        // By the file: a look at a page that nobody has touched would make one, which a hugetlbfs may not have.
        self.ram
            .read_file_at(self.next, bytes)
            .map_err(io("reading guest RAM"))?;
        if is_zero(bytes) {
            self.sums.push(None);
        } else {
            self.sums.push(Some(crc32fast::hash(bytes)));
            self.file
                .write_all_at(bytes, self.next)
                .map_err(io("writing the snapshot's file memory"))?;
        }
        self.next += length as u64;
        Ok(())
    }

    /// What was written, when [`Writer::step`] has said that all is.
    #[must_use]
    pub fn finish(self) -> Index {
        Index {
            block: SNAPSHOT_BLOCK,
            sums: self.sums,
        }
    }
}

/// The first place of RAM from `next` on where there is data; `None` if there is none.
pub(super) fn next_data(ram: &GuestRam, next: u64) -> Result<Option<u64>, MemoryError> {
    let data = ram.next_data(next);
    data.map_err(|e| io("looking for data in guest RAM")(e.into()))
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // In this form the compiler compares whole vectors.
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Whether `file` is as long as `ram`.
///
/// # Errors
/// It is not.
pub fn check_length(file: &File, want: u64) -> Result<(), MemoryError> {
    let got = file
        .metadata()
        .map_err(io("looking at the snapshot's file memory"))?
        .len();
    if got == want {
        Ok(())
    } else {
        Err(MemoryError::Length { got, want })
    }
}

/// Reads all of `file` into `ram`, which is zero. Uses several threads, so it comes before the lock-down.
///
/// # Errors
/// A block is damaged, or the file cannot be read. RAM then holds a part.
pub fn read(ram: &GuestRam, file: &File, index: &Index) -> Result<(), MemoryError> {
    index.check(ram.size())?;
    check_length(file, ram.size())?;
    let blocks: Vec<(u64, u32)> = (0u64..)
        .zip(&index.sums)
        .filter_map(|(at, sum)| Some((at * u64::from(SNAPSHOT_BLOCK), (*sum)?)))
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = vec![0; BLOCK];
        // A mebibyte at a time.
        let share = (1 << 20) / BLOCK;
        loop {
            let from = next.fetch_add(share, Ordering::Relaxed);
            let Some(piece) = blocks.get(from..) else {
                return Ok(());
            };
            for (offset, sum) in piece.iter().take(share) {
                let bytes = read_block(file, *offset, ram.size(), &mut buffer)?;
                if crc32fast::hash(bytes) != *sum {
                    return Err(MemoryError::Damaged { offset: *offset });
                }
                ram.write_at(*offset, bytes).ok_or_else(|| {
                    io("writing guest RAM")(std::io::ErrorKind::InvalidInput.into())
                })?;
            }
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // Four mebibytes are not worth a thread.
    let threads = ((blocks.len() * BLOCK) >> 22).min(processors).min(READERS);
    if threads <= 1 {
        return work();
    }
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        // A reader's panic aborts the process, so joining cannot fail.
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or(Ok(())))
    })
}

fn read_block<'a>(
    file: &File,
    offset: u64,
    size: u64,
    buffer: &'a mut [u8],
) -> Result<&'a [u8], MemoryError> {
    let length = usize::try_from(size - offset).map_or(BLOCK, |rest| rest.min(BLOCK));
    let bytes = &mut buffer[..length];
    file.read_exact_at(bytes, offset)
        .map_err(io("reading the snapshot's file memory"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MIN_SIZE, RamConfig};

    fn ram() -> Arc<GuestRam> {
        Arc::new(GuestRam::new(RamConfig::new(MIN_SIZE)).unwrap())
    }

    fn saved(ram: &Arc<GuestRam>) -> (File, Index, usize) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(ram.size()).unwrap();
        let mut writer = Writer::new(ram.clone(), file.try_clone().unwrap());
        let mut steps = 1;
        while writer.step().unwrap() {
            steps += 1;
        }
        assert_eq!(writer.done(), ram.size());
        (file, writer.finish(), steps)
    }

    #[test]
    fn ram_comes_back_and_what_is_zero_takes_no_room() {
        let old = ram();
        let places = [0, 4096, 65_535, 70_000, 50 << 20, MIN_SIZE - 3];
        for (value, place) in (1u8..).zip(places) {
            old.write_at(place, &[value, 0, 7]).unwrap();
        }
        // A page that is there and zero again.
        old.write_at(20 << 20, &[1]).unwrap();
        old.write_at(20 << 20, &[0]).unwrap();
        let (file, index, _) = saved(&old);
        assert_eq!(index.sums.iter().flatten().count(), 4);
        assert_eq!(index.present(), 4 * u64::from(SNAPSHOT_BLOCK));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert!(blocks * 512 <= index.present(), "{blocks}");
        let new = ram();
        read(&new, &file, &index).unwrap();
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for at in (0..MIN_SIZE).step_by(1 << 20) {
            old.read_at(at, &mut a).unwrap();
            new.read_at(at, &mut b).unwrap();
            assert!(a == b, "{at:#x}");
        }
    }

    #[test]
    fn a_full_guest_takes_several_steps_and_several_readers() {
        let old = ram();
        let noise: Vec<u8> = (0..1u32 << 20)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 | 1)
            .collect();
        for at in (0..MIN_SIZE).step_by(1 << 20) {
            old.write_at(at, &noise).unwrap();
        }
        let (file, index, steps) = saved(&old);
        assert!(steps > 8, "{steps}");
        assert_eq!(index.present(), MIN_SIZE);
        let new = ram();
        read(&new, &file, &index).unwrap();
        let mut bytes = vec![0; 1 << 20];
        for at in (0..MIN_SIZE).step_by(1 << 20) {
            new.read_at(at, &mut bytes).unwrap();
            assert!(bytes == noise, "{at:#x}");
        }
    }

    #[test]
    fn files_that_are_not_of_this_snapshot_are_refused() {
        let old = ram();
        old.write_at(1 << 20, b"something").unwrap();
        let (file, index, _) = saved(&old);
        let refused = |file: &File, index: &Index| read(&ram(), file, index).unwrap_err();
        file.write_all_at(&[1], (1 << 20) + 100).unwrap();
        assert!(matches!(
            refused(&file, &index),
            MemoryError::Damaged { offset } if offset == 1 << 20
        ));
        file.set_len(MIN_SIZE - 1).unwrap();
        assert!(matches!(refused(&file, &index), MemoryError::Length { .. }));
        file.set_len(MIN_SIZE).unwrap();
        for other in [
            Index {
                block: 4096,
                ..index.clone()
            },
            Index {
                sums: index.sums[1..].to_vec(),
                ..index
            },
        ] {
            assert!(matches!(refused(&file, &other), MemoryError::Index(_)));
        }
    }
}
