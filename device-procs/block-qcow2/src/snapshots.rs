//! Internal snapshots of an image.
//!
//! **Job.** Lists them, makes one of the disk as it is, and takes one away (qcow2's specification, "Snapshots"). **Who is not
//! trusted.** The image: its table of snapshots is bounded before memory is taken for it, and what it names is found to be in the image
//! before it is followed. **Why this way.** `imago` 0.2.6 keeps what snapshots have, and knows nothing else of them. All that it holds of
//! the image is on the disk, and it is gone, before anything here begins; it reads the image anew afterwards. The table is written to
//! another place, and the header names that place by one write of twelve bytes: whenever the process or the host ends, the image has the
//! table of before, or the one of after. References are added before that write and taken away after it, so that such an end leaves
//! clusters that are counted and not used, and never the other way round.

use std::io;

use imago::{Storage, StorageExt};
use ipc::disk::Snapshot;
use ipc::limits::{MAX_INTERNAL_SNAPSHOTS, MAX_SNAPSHOT_NAME, MAX_SNAPSHOT_TABLE};
use nix::errno::Errno;

use crate::header::Header;
use crate::mappings::{COPIED, Root, Walk};
use crate::refcounts::{Counts, be64, wrong};
use crate::storage::Descriptor;

/// Bytes of an entry before what may follow in it.
const ENTRY: usize = 40;
/// Bytes of "extra data" that is written: the size of the VM's state, that of the disk, and how many instructions there were.
const EXTRA: usize = 24;
/// Bytes of extra data that are taken; QEMU takes no more.
const MAX_EXTRA: usize = 1024;
/// Nobody counted instructions.
const NO_COUNT: u64 = u64::MAX;
/// Where the header has the number of snapshots and the place of their table, 12 bytes that are written at once.
const IN_HEADER: u64 = 60;
/// Bytes of the largest first table of a snapshot; QEMU takes no larger one.
const MAX_ROOT: u64 = 32 << 20;

/// When a snapshot is made, and how long the guest had been running.
#[derive(Debug, Clone, Copy)]
pub(crate) struct When {
    /// Since 1970.
    pub(crate) seconds: u32,
    pub(crate) nanoseconds: u32,
    /// Nanoseconds.
    pub(crate) clock: u64,
}

/// One entry of the table.
#[derive(Debug)]
struct Entry {
    /// As it is in the image, without what fills it up to a multiple of eight.
    bytes: Vec<u8>,
    root: Root,
    shown: Snapshot,
}

fn be(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes.get(at..at + width).map_or(0, be64)
}

/// The table of an image's snapshots.
#[derive(Debug)]
struct Table {
    entries: Vec<Entry>,
    /// Bytes that it takes.
    bytes: usize,
}

impl Table {
    /// Reads it.
    fn read(file: &Descriptor, header: &Header) -> io::Result<Self> {
        let (count, start) = (header.snapshots.count as usize, header.snapshots.place);
        if count > MAX_INTERNAL_SNAPSHOTS {
            return Err(wrong(Errno::EFBIG));
        }
        let mut table = Self {
            entries: Vec::with_capacity(count),
            bytes: 0,
        };
        for _ in 0..count {
            let place = start.checked_add(table.bytes as u64);
            let place = place.filter(|place| *place < file.end());
            let place = place.ok_or(wrong(Errno::EINVAL))?;
            let mut bytes = vec![0; ENTRY];
            file.read(&mut bytes[..], place)?;
            let [id, name] = [12, 14].map(|at| be(&bytes, at, 2) as usize);
            let extra = be(&bytes, 36, 4) as usize;
            if extra > MAX_EXTRA {
                return Err(wrong(Errno::EFBIG));
            }
            bytes.resize(ENTRY + extra + id + name, 0);
            table.bytes += bytes.len().next_multiple_of(8);
            if table.bytes > MAX_SNAPSHOT_TABLE {
                return Err(wrong(Errno::EFBIG));
            }
            file.read(&mut bytes[ENTRY..], place + ENTRY as u64)?;
            let text = |at: usize, len: usize| {
                let text = String::from_utf8_lossy(&bytes[at..at + len]);
                let mut end = text.len().min(MAX_SNAPSHOT_NAME);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                text[..end].to_owned()
            };
            let more = |at: usize| (extra >= at + 8).then(|| be(&bytes, ENTRY + at, 8));
            let shown = Snapshot {
                id: text(ENTRY + extra, id),
                name: text(ENTRY + extra + id, name),
                vm_state: more(0).unwrap_or(be(&bytes, 32, 4)),
                seconds: be(&bytes, 16, 4) as u32,
                nanoseconds: be(&bytes, 20, 4) as u32,
                clock: be(&bytes, 24, 8),
                icount: more(16).filter(|count| *count != NO_COUNT),
            };
            let root = Root {
                place: be(&bytes, 0, 8),
                entries: be(&bytes, 8, 4) as u32,
            };
            table.entries.push(Entry { bytes, root, shown });
        }
        Ok(table)
    }

    /// As it is in the image.
    fn encoded(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in &self.entries {
            bytes.extend_from_slice(&entry.bytes);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes
    }
}

/// What an image has, in its order.
///
/// # Errors
/// `EFBIG` if that is more than is shown; the image cannot be read, or is broken.
pub(crate) fn list(file: &Descriptor, header: &Header) -> io::Result<Vec<Snapshot>> {
    let table = Table::read(file, header)?;
    Ok(table.entries.into_iter().map(|entry| entry.shown).collect())
}

/// An image that nobody else changes meanwhile.
pub(crate) struct Work<'a> {
    file: &'a Descriptor,
    header: &'a Header,
    counts: Counts<'a>,
    /// Freed clusters are punched out of the file.
    punch: bool,
}

/// What is to be taken back if a snapshot does not come to be.
#[derive(Default)]
struct Begun {
    /// References that were added.
    added: u64,
    /// Clusters that were taken: the offset of the first, and how many.
    taken: Vec<(u64, u64)>,
}

impl<'a> Work<'a> {
    pub(crate) fn new(file: &'a Descriptor, header: &'a Header, punch: bool) -> Self {
        Self {
            file,
            header,
            counts: Counts::new(file, header),
            punch,
        }
    }

    fn root(&self) -> Root {
        Root {
            place: self.header.tables.l1,
            entries: self.header.tables.entries,
        }
    }

    fn walk(&mut self) -> Walk<'a, '_> {
        Walk {
            file: self.file,
            counts: &mut self.counts,
            cluster: self.header.cluster,
            punch: self.punch,
        }
    }

    /// Makes a snapshot of the disk as it is in the image; `false` if there is one of that name.
    ///
    /// # Errors
    /// `EFBIG` if there are as many as there may be; `EINVAL` if an image's counts have no room; the image cannot be read or written,
    /// or is broken. The image then has the snapshots of before.
    pub(crate) fn create(&mut self, name: &str, when: When) -> io::Result<bool> {
        let mut table = Table::read(self.file, self.header)?;
        if table.entries.iter().any(|entry| entry.shown.name == name) {
            return Ok(false);
        }
        if table.entries.len() >= MAX_INTERNAL_SNAPSHOTS {
            return Err(wrong(Errno::EFBIG));
        }
        let (count, before) = (table.entries.len() + 1, table.bytes);
        let mut begun = Begun::default();
        let written = self.prepare(&mut table, name, when, &mut begun);
        let place = match written {
            Ok(place) => place,
            Err(error) => {
                self.undo(&begun)
                    .unwrap_or_else(|e| ipc::guest_warn!("what was begun of a snapshot: {e}"));
                return Err(error);
            }
        };
        self.name(count as u32, place)?;
        self.release(before)
            .unwrap_or_else(|e| ipc::guest_warn!("the table of snapshots of before: {e}"));
        Ok(true)
    }

    /// All but the header: returns where the new table is.
    fn prepare(
        &mut self,
        table: &mut Table,
        name: &str,
        when: When,
        begun: &mut Begun,
    ) -> io::Result<u64> {
        let (own, size) = (self.root(), self.header.cluster);
        let copy = Root {
            place: self.take(own.clusters(size), begun)?,
            ..own
        };
        own.parts(self.file, |part, at| {
            for entry in part.chunks_exact_mut(8) {
                let word = be64(entry) & !COPIED;
                entry.copy_from_slice(&word.to_be_bytes());
            }
            self.file.write(&*part, copy.place + at)?;
            Ok(false)
        })?;
        self.walk().change(own, 1, u64::MAX, &mut begun.added)?;
        let ids = table.entries.iter();
        let ids = ids.filter_map(|entry| entry.shown.id.parse::<u64>().ok());
        let id = ids.max().unwrap_or(0).saturating_add(1).to_string();
        let entry = entry(self.header.size, copy, &id, name, when);
        table.entries.push(entry);
        let bytes = table.encoded();
        if bytes.len() > MAX_SNAPSHOT_TABLE {
            return Err(wrong(Errno::EFBIG));
        }
        let place = self.take((bytes.len() as u64).div_ceil(size), begun)?;
        self.file.write(&bytes[..], place)?;
        self.counts.write_back()?;
        self.walk().mark(own)?;
        Ok(place)
    }

    fn take(&mut self, clusters: u64, begun: &mut Begun) -> io::Result<u64> {
        let place = self.counts.take(clusters)?;
        begun.taken.push((place, clusters));
        Ok(place)
    }

    /// The header names this table. Everything before is on the disk by then, and so is that.
    fn name(&mut self, count: u32, place: u64) -> io::Result<()> {
        self.counts.write_back()?;
        self.file.sync()?;
        let mut field = [0; 12];
        field[..4].copy_from_slice(&count.to_be_bytes());
        field[4..].copy_from_slice(&place.to_be_bytes());
        self.file.write(&field[..], IN_HEADER)?;
        self.file.sync()
    }

    /// The table of before, of so many bytes, is free.
    fn release(&mut self, bytes: usize) -> io::Result<()> {
        if bytes > 0 {
            let clusters = (bytes as u64).div_ceil(self.header.cluster);
            self.counts
                .give_back(self.header.snapshots.place, clusters)?;
        }
        self.counts.write_back()
    }

    fn undo(&mut self, begun: &Begun) -> io::Result<()> {
        let own = self.root();
        let mut done = 0;
        self.walk().change(own, -1, begun.added, &mut done)?;
        for (place, clusters) in &begun.taken {
            self.counts.give_back(*place, *clusters)?;
        }
        self.counts.write_back()?;
        self.walk().mark(own)
    }

    /// Takes away the first snapshot that has all of what is given, and tells what it was.
    ///
    /// # Errors
    /// The image cannot be read or written, or is broken.
    pub(crate) fn delete(
        &mut self,
        id: Option<&str>,
        name: Option<&str>,
    ) -> io::Result<Option<Snapshot>> {
        let mut table = Table::read(self.file, self.header)?;
        let found = table.entries.iter().position(|entry| {
            id.is_none_or(|id| entry.shown.id == id)
                && name.is_none_or(|name| entry.shown.name == name)
        });
        let Some(found) = found else {
            return Ok(None);
        };
        let before = table.bytes;
        let gone = table.entries.remove(found);
        let size = self.header.cluster;
        if u64::from(gone.root.entries) * 8 > MAX_ROOT || !gone.root.place.is_multiple_of(size) {
            return Err(wrong(Errno::EFBIG));
        }
        let bytes = table.encoded();
        let mut begun = Begun::default();
        let mut place = 0;
        if !bytes.is_empty() {
            place = self.take((bytes.len() as u64).div_ceil(size), &mut begun)?;
            self.file.write(&bytes[..], place)?;
        }
        self.name(table.entries.len() as u32, place)?;
        self.forget(gone.root, before)
            .unwrap_or_else(|e| ipc::guest_warn!("what a snapshot had stays counted: {e}"));
        Ok(Some(gone.shown))
    }

    /// What only a snapshot had is free.
    fn forget(&mut self, root: Root, table: usize) -> io::Result<()> {
        let own = self.root();
        self.walk().change(root, -1, u64::MAX, &mut 0)?;
        let clusters = root.clusters(self.header.cluster);
        if root.entries > 0 {
            self.counts.give_back(root.place, clusters)?;
        }
        self.release(table)?;
        self.walk().mark(own)?;
        self.file.sync()
    }
}

/// A new entry, which a table has last.
fn entry(size: u64, root: Root, id: &str, name: &str, when: When) -> Entry {
    let mut bytes = Vec::with_capacity(ENTRY + EXTRA + id.len() + name.len());
    bytes.extend_from_slice(&root.place.to_be_bytes());
    bytes.extend_from_slice(&root.entries.to_be_bytes());
    for text in [id, name] {
        bytes.extend_from_slice(&(text.len() as u16).to_be_bytes()); // at most 255
    }
    bytes.extend_from_slice(&when.seconds.to_be_bytes());
    bytes.extend_from_slice(&when.nanoseconds.to_be_bytes());
    bytes.extend_from_slice(&when.clock.to_be_bytes());
    bytes.extend_from_slice(&0u32.to_be_bytes());
    bytes.extend_from_slice(&(EXTRA as u32).to_be_bytes());
    for word in [0, size, NO_COUNT] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(id.as_bytes());
    bytes.extend_from_slice(name.as_bytes());
    let shown = Snapshot {
        id: id.into(),
        name: name.into(),
        vm_state: 0,
        seconds: when.seconds,
        nanoseconds: when.nanoseconds,
        clock: when.clock,
        icount: None,
    };
    Entry { bytes, root, shown }
}
