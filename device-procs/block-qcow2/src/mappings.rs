//! Everything that a table of mappings refers to.
//!
//! **Job.** Adds a reference to each of it, or takes one away, and sets the marks that say what has only one (qcow2's specification,
//! "Cluster mapping"). **Who is not trusted.** The image: what its entries name has a count or the walk ends with an error, and is never
//! written but where a count says that it is in use. **Why this way.** A snapshot is a copy of the first table, so that each table
//! and each cluster below is used once more. Tables are read one by one: the memory for it does not grow with the disk.

use std::io;

use imago::StorageExt;
use nix::errno::Errno;

use crate::refcounts::{Counts, be64, wrong};
use crate::storage::Descriptor;

/// Bits 9 to 55 of an entry: an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: what the entry names has exactly one reference, and may be written.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62: the cluster is compressed, and the offset is made otherwise.
const COMPRESSED: u64 = 1 << 62;
/// Bytes of a sector, in which the length of compressed clusters is counted.
const SECTOR: u64 = 512;
/// Bytes of an L1 table that are read at once.
const PART: u64 = 4096;

/// An L1 table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Root {
    /// Where it is.
    pub(crate) place: u64,
    /// Entries of eight bytes.
    pub(crate) entries: u32,
}

impl Root {
    /// Clusters that it takes: at least one.
    pub(crate) fn clusters(&self, cluster: u64) -> u64 {
        (u64::from(self.entries) * 8).div_ceil(cluster).max(1)
    }

    /// Has `each` look at the table part by part; what it returns `true` for is written back.
    ///
    /// # Errors
    /// The image cannot be read or written; those of `each`.
    pub(crate) fn parts(
        &self,
        file: &Descriptor,
        mut each: impl FnMut(&mut [u8], u64) -> io::Result<bool>,
    ) -> io::Result<()> {
        let bytes = u64::from(self.entries) * 8;
        let end = self.place.checked_add(bytes);
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(wrong(Errno::EINVAL));
        }
        let mut some = [0; PART as usize];
        let mut at = 0;
        while at < bytes {
            let part = &mut some[..(bytes - at).min(PART) as usize];
            file.read(&mut *part, self.place + at)?;
            if each(part, at)? {
                file.write(&*part, self.place + at)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }
}

/// A walk over all that an image's tables name.
pub(crate) struct Walk<'a, 'b> {
    pub(crate) file: &'a Descriptor,
    pub(crate) counts: &'b mut Counts<'a>,
    pub(crate) cluster: u64,
    /// What has no reference any more is punched out of the file.
    pub(crate) punch: bool,
}

impl Walk<'_, '_> {
    /// Adds `change` to the counts of all that `root` refers to, without the table itself, but not more than `most` times. `done` is
    /// how often that was.
    ///
    /// # Errors
    /// `EINVAL` if a count has no room for it, or there is none; the image cannot be read or written.
    pub(crate) fn change(
        &mut self,
        root: Root,
        change: i64,
        most: u64,
        done: &mut u64,
    ) -> io::Result<()> {
        let (file, cluster) = (self.file, self.cluster);
        let mut table = vec![0; cluster as usize]; // at most 2 MiB
        root.parts(file, |part, _| {
            for entry in part.chunks_exact(8) {
                let place = be64(entry) & OFFSET;
                if place == 0 {
                    continue;
                }
                self.read(&mut table, place)?;
                for entry in table.chunks_exact(8) {
                    for number in self.named(be64(entry)) {
                        if *done == most {
                            return Ok(false);
                        }
                        self.one(number, change)?;
                        *done += 1;
                    }
                }
                if *done == most {
                    return Ok(false);
                }
                self.one(place / cluster, change)?;
                *done += 1;
            }
            Ok(false)
        })
    }

    /// Sets each mark of `root` and below as the counts are.
    ///
    /// # Errors
    /// As for [`change`](Self::change).
    pub(crate) fn mark(&mut self, root: Root) -> io::Result<()> {
        let (file, cluster) = (self.file, self.cluster);
        let mut table = vec![0; cluster as usize]; // at most 2 MiB
        root.parts(file, |part, _| {
            let mut changed = false;
            for entry in part.chunks_exact_mut(8) {
                let place = be64(entry) & OFFSET;
                if place == 0 {
                    continue;
                }
                self.read(&mut table, place)?;
                let mut below = false;
                for entry in table.chunks_exact_mut(8) {
                    let word = be64(entry);
                    if word & COMPRESSED == 0 && word & OFFSET != 0 {
                        below |= self.set(entry, (word & OFFSET) / cluster)?;
                    }
                }
                if below {
                    file.write(&table[..], place)?;
                }
                changed |= self.set(entry, place / cluster)?;
            }
            Ok(changed)
        })
    }

    /// Marks an entry as the count of what it names is; whether that changed it.
    fn set(&mut self, entry: &mut [u8], cluster: u64) -> io::Result<bool> {
        let word = be64(entry);
        let count = self.counts.get(cluster)?;
        let wanted = match count.ok_or(wrong(Errno::EINVAL))? {
            1 => word | COPIED,
            _ => word & !COPIED,
        };
        entry.copy_from_slice(&wanted.to_be_bytes());
        Ok(wanted != word)
    }

    fn read(&self, table: &mut [u8], place: u64) -> io::Result<()> {
        if !place.is_multiple_of(self.cluster) || place >= self.file.end() {
            return Err(wrong(Errno::EINVAL));
        }
        self.file.read(&mut *table, place)
    }

    /// The clusters of the file that an entry of an L2 table refers to, by their numbers.
    fn named(&self, entry: u64) -> std::ops::Range<u64> {
        let (first, end) = if entry & COMPRESSED != 0 {
            // "Compressed Clusters Descriptor": the offset has 62 - (cluster_bits - 8) bits, and above it is the number of further
            // sectors.
            let sectors_bits = self.cluster.trailing_zeros() - 8;
            let bits = 62 - sectors_bits;
            let offset = entry & ((1 << bits) - 1);
            let sectors = (entry >> bits) & ((1 << sectors_bits) - 1);
            (offset, (offset / SECTOR + sectors + 1) * SECTOR)
        } else {
            match entry & OFFSET {
                0 => return 0..0,
                offset => (offset, offset + 1),
            }
        };
        first / self.cluster..end.div_ceil(self.cluster)
    }

    fn one(&mut self, number: u64, change: i64) -> io::Result<()> {
        if self.counts.add(number, change)? == 0 && self.punch {
            // A hint: space that stays taken is no fault.
            let _ = self.file.discard(number * self.cluster, self.cluster);
        }
        Ok(())
    }
}
