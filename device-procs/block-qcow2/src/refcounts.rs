//! How many references an image's clusters have.
//!
//! **Job.** Reads and changes counts (qcow2's specification, "Host cluster management"), and finds clusters that have none. **Who is not
//! trusted.** The image: its table may name blocks anywhere. One that lies behind the end of the file counts nothing and is never
//! written. **Why this way.** `imago` shows neither counts nor a way to take clusters, and is not there while this is used. Counts are
//! read and written in pieces of up to 64 KiB, many of which are kept: a walk over all mappings of an image jumps between them.

use std::collections::BTreeMap;
use std::io;

use imago::{Storage, StorageExt};
use nix::errno::Errno;

use crate::header::Header;
use crate::storage::Descriptor;

/// Bits of an entry of the refcount table that are an offset: 9 to 63.
const BLOCK_OFFSET: u64 = !0x1ff;
/// Bytes of counts that are read at once at most; a cluster may have fewer.
const PIECE: u64 = 64 << 10;
/// Pieces that are kept: 8 MiB.
const PIECES: usize = 128;
/// Counts that are looked at for free clusters: those of 16 TiB of clusters of 64 KiB, a few seconds. A table may name the same full block
/// again and again, and would be looked through for years.
const MOST_LOOKS: u64 = if cfg!(fuzzing) { 1 << 20 } else { 1 << 28 };
/// Bytes of the refcount table that are read at once.
const PART: u64 = 4096;
/// Bytes of the largest refcount table that is made here; QEMU refuses a larger one.
const MAX_TABLE: u64 = 8 << 20;
/// Where the header has the refcount table's place and its clusters, 12 bytes that are written at once.
const TABLE_IN_HEADER: u64 = 48;

/// The errors by which users know what is wrong with an image, as QEMU has them.
pub(crate) fn wrong(errno: Errno) -> io::Error {
    errno.into()
}

/// The word that eight bytes are.
pub(crate) fn be64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// Where the block is that has a count.
enum Block {
    At(u64),
    /// There is none: nothing has a count there.
    Missing,
    /// It is said to be where it cannot be.
    Nowhere,
}

/// Some counts, as they are to be in the file.
struct Piece {
    bytes: Vec<u8>,
    changed: bool,
}

/// The counts of an image that nobody else changes meanwhile.
pub(crate) struct Counts<'a> {
    file: &'a Descriptor,
    cluster: u64,
    order: u32,
    /// The refcount table, and its entries.
    table: u64,
    entries: u64,
    /// Part of it: the number of its first entry, and its bytes.
    part: Option<(u64, Vec<u8>)>,
    /// By their place in the file.
    pieces: BTreeMap<u64, Piece>,
    /// Clusters before this one have a reference.
    full_to: u64,
}

impl<'a> Counts<'a> {
    pub(crate) fn new(file: &'a Descriptor, header: &Header) -> Self {
        let tables = &header.tables;
        Self {
            file,
            cluster: header.cluster,
            order: tables.count_order,
            table: tables.counts,
            entries: u64::from(tables.count_clusters) * (header.cluster / 8),
            part: None,
            pieces: BTreeMap::new(),
            full_to: 0,
        }
    }

    /// Counts of one block.
    const fn in_a_block(&self) -> u64 {
        (self.cluster * 8) >> self.order
    }

    /// The count of the cluster with this number; `None` if nothing says what it is.
    ///
    /// # Errors
    /// The image cannot be read, or written.
    pub(crate) fn get(&mut self, cluster: u64) -> io::Result<Option<u64>> {
        match self.block(cluster / self.in_a_block())? {
            Block::At(block) => self.look(block, cluster).map(Some),
            Block::Missing | Block::Nowhere => Ok(None),
        }
    }

    /// Adds to that count, and gives what it is then.
    ///
    /// # Errors
    /// `EINVAL` if the count has no room for that, or there is none; the image cannot be read, or written.
    pub(crate) fn add(&mut self, cluster: u64, change: i64) -> io::Result<u64> {
        let Block::At(block) = self.block(cluster / self.in_a_block())? else {
            return Err(wrong(Errno::EINVAL));
        };
        let most = u64::MAX >> (64 - (1u32 << self.order));
        let now = self.look(block, cluster)?.checked_add_signed(change);
        let now = now.filter(|now| *now <= most);
        let now = now.ok_or(wrong(Errno::EINVAL))?;
        let bits = 1u32 << self.order;
        let (piece, at, shift) = self.piece(block, cluster)?;
        piece.changed = true;
        if bits < 8 {
            let mask = ((1u16 << bits) - 1) as u8;
            let byte = &mut piece.bytes[at];
            *byte = *byte & !(mask << shift) | (now as u8) << shift;
        } else {
            let width = bits as usize / 8;
            piece.bytes[at..at + width].copy_from_slice(&now.to_be_bytes()[8 - width..]);
        }
        if now == 0 {
            self.full_to = self.full_to.min(cluster);
        }
        Ok(now)
    }

    /// Gives `count` free clusters in a row one reference each, and returns the offset of the first.
    ///
    /// # Errors
    /// `EFBIG` if the image cannot count that many clusters, or none of [`MOST_LOOKS`] is free; the image cannot be read, or written.
    pub(crate) fn take(&mut self, count: u64) -> io::Result<u64> {
        let (mut cluster, mut free) = (self.full_to, 0);
        let mut all_full = true;
        let mut looks = 0;
        while free < count {
            looks += 1;
            if cluster >= i64::MAX as u64 / self.cluster || looks > MOST_LOOKS {
                return Err(wrong(Errno::EFBIG));
            }
            let number = cluster / self.in_a_block();
            match self.block(number)? {
                Block::At(block) => {
                    let is_free = self.look(block, cluster)? == 0;
                    free = if is_free { free + 1 } else { 0 };
                    cluster += 1;
                    all_full &= !is_free;
                    if all_full {
                        self.full_to = cluster;
                    }
                }
                // It is then the first that has a count in it.
                Block::Missing => {
                    self.make_block(number)?;
                    free = 0;
                }
                Block::Nowhere => return Err(wrong(Errno::EINVAL)),
            }
        }
        let first = cluster - count;
        for taken in first..cluster {
            self.add(taken, 1)?;
        }
        Ok(first * self.cluster)
    }

    /// Takes a reference from each of `count` clusters at `offset`.
    ///
    /// # Errors
    /// As for [`add`](Self::add).
    pub(crate) fn give_back(&mut self, offset: u64, count: u64) -> io::Result<()> {
        let first = offset / self.cluster;
        (first..first.saturating_add(count)).try_for_each(|cluster| self.add(cluster, -1).map(drop))
    }

    /// Writes what has changed.
    ///
    /// # Errors
    /// The image cannot be written.
    pub(crate) fn write_back(&mut self) -> io::Result<()> {
        for (place, piece) in &mut self.pieces {
            if piece.changed {
                self.file.write(&piece.bytes[..], *place)?;
                piece.changed = false;
            }
        }
        Ok(())
    }

    fn look(&mut self, block: u64, cluster: u64) -> io::Result<u64> {
        let bits = 1u32 << self.order;
        let (piece, at, shift) = self.piece(block, cluster)?;
        // Below a byte the first count has the lowest bits; above, the highest byte is first.
        Ok(if bits < 8 {
            u64::from(piece.bytes[at] >> shift) & ((1 << bits) - 1)
        } else {
            be64(&piece.bytes[at..at + bits as usize / 8])
        })
    }

    /// The piece of `block` with the count of `cluster`, the byte in it, and the bit in that.
    fn piece(&mut self, block: u64, cluster: u64) -> io::Result<(&mut Piece, usize, u64)> {
        let bit = (cluster % self.in_a_block()) << self.order;
        let size = PIECE.min(self.cluster);
        let place = block + bit / 8 / size * size;
        if !self.pieces.contains_key(&place) {
            if self.pieces.len() >= PIECES {
                self.write_back()?;
                self.pieces.clear();
            }
            let mut bytes = vec![0; size as usize]; // at most 64 KiB
            self.file.read(&mut bytes[..], place)?;
            let piece = Piece {
                bytes,
                changed: false,
            };
            self.pieces.insert(place, piece);
        }
        match self.pieces.get_mut(&place) {
            Some(piece) => Ok((piece, (bit / 8 % size) as usize, bit % 8)),
            None => Err(wrong(Errno::EIO)),
        }
    }

    fn block(&mut self, number: u64) -> io::Result<Block> {
        if number >= self.entries {
            return Ok(Block::Missing);
        }
        let in_a_part = PART / 8;
        let first = number / in_a_part * in_a_part;
        let known = self.part.as_ref().is_some_and(|(known, _)| *known == first);
        if !known {
            let Some(place) = self.table.checked_add(first * 8) else {
                return Ok(Block::Nowhere);
            };
            let mut bytes = vec![0; PART as usize];
            self.file.read(&mut bytes[..], place)?;
            self.part = Some((first, bytes));
        }
        let at = ((number - first) * 8) as usize;
        let entry = self.part.as_ref();
        let entry = entry.map_or(0, |(_, bytes)| be64(&bytes[at..at + 8]));
        Ok(match entry & BLOCK_OFFSET {
            0 => Block::Missing,
            // Nor where a piece would be none of its own.
            place if place >= self.file.end() || !place.is_multiple_of(self.cluster) => {
                Block::Nowhere
            }
            place => Block::At(place),
        })
    }

    /// Makes the block with this number, in the first of the clusters that it counts: none of them has a reference.
    fn make_block(&mut self, number: u64) -> io::Result<()> {
        while number >= self.entries {
            self.make_table()?;
        }
        if let Block::At(_) = self.block(number)? {
            return Ok(());
        }
        if number == 0 {
            // The header is not counted.
            return Err(wrong(Errno::EINVAL));
        }
        let place = number * self.in_a_block() * self.cluster;
        self.file.write(&self.full(1)[..], place)?;
        self.file.sync()?;
        self.file
            .write(&place.to_be_bytes()[..], self.table + number * 8)?;
        self.part = None;
        Ok(())
    }

    /// A block whose first `count` counts are one.
    fn full(&self, count: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.cluster as usize]; // at most 2 MiB
        for number in 0..count.min(self.in_a_block()) {
            let bit = number << self.order;
            let (at, bits) = ((bit / 8) as usize, 1usize << self.order);
            if bits < 8 {
                bytes[at] |= 1 << (bit % 8);
            } else {
                bytes[at + bits / 8 - 1] = 1;
            }
        }
        bytes
    }

    /// Makes a longer table, and blocks for where it and they are: the first clusters that the old one has no entries for.
    fn make_table(&mut self) -> io::Result<()> {
        let in_a_block = self.in_a_block();
        let per_cluster = self.cluster / 8;
        let clusters = (self.entries + self.entries / 2).div_ceil(per_cluster) + 1;
        let mut blocks = 1;
        while blocks * in_a_block < clusters + blocks {
            blocks += 1;
        }
        let entries = clusters * per_cluster;
        if entries * 8 > MAX_TABLE || entries < self.entries + blocks {
            return Err(wrong(Errno::EFBIG));
        }
        let first = self.entries * in_a_block;
        let place = |cluster: u64| cluster.checked_mul(self.cluster).filter(|at| *at < 1 << 62);
        let table = place(first + blocks).ok_or(wrong(Errno::EFBIG))?;
        let mut bytes = vec![0; (entries * 8) as usize]; // at most MAX_TABLE
        let old = (self.entries * 8) as usize;
        self.file.read(&mut bytes[..old], self.table)?;
        for number in 0..blocks {
            let at = (first + number) * self.cluster;
            let counted = (clusters + blocks).saturating_sub(number * in_a_block);
            self.file.write(&self.full(counted)[..], at)?;
            let entry = old + (number * 8) as usize;
            bytes[entry..entry + 8].copy_from_slice(&at.to_be_bytes());
        }
        self.file.write(&bytes[..], table)?;
        self.write_back()?;
        self.file.sync()?;
        let mut field = [0; 12];
        field[..8].copy_from_slice(&table.to_be_bytes());
        field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        self.file.write(&field[..], TABLE_IN_HEADER)?;
        self.file.sync()?;
        let (was, its) = (self.table, self.entries / per_cluster);
        (self.table, self.entries, self.part) = (table, entries, None);
        self.give_back(was, its)
    }
}
