//! One descriptor chain, walked and checked as a whole before a device sees it.
//!
//! **Job.** Follows a chain from its head (virtio 1.3, 2.7.5), through an indirect table if there is one, and resolves every
//! descriptor to host addresses: the device-readable ones first, then the device-writable ones.
//!
//! **Who is not trusted.** The driver. Each descriptor is copied once; loops, tables and buffers outside of RAM, wrong order
//! and excess length are told apart from the end of a chain, so that a device never works on half a request.
//!
//! **Why this way.** `virtio-queue`'s own iterator ends silently at a fault, logs without a limit, and cannot start from a
//! given head, which replaying requests in flight needs. Its descriptor layout is used here.

use ipc::limits::MAX_CHAIN_SEGMENTS;
use virtio_queue::desc::split::Descriptor;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{Address, Bytes, GuestAddress, VolatileMemory};

use crate::fault::FaultKind;
use crate::memory::{GuestBuffers, GuestRam, ResolveError, SegmentList};

/// Bytes of a descriptor (virtio 1.3, 2.7.5).
pub(crate) const DESCRIPTOR_SIZE: usize = 16;

/// The right to complete one request, once.
#[derive(Debug)]
pub struct Token {
    pub(crate) head: u16,
    pub(crate) replayed: bool,
}

impl Token {
    /// The request's first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Whether a process before this one took the request.
    pub fn is_replayed(&self) -> bool {
        self.replayed
    }
}

/// One request.
#[derive(Debug)]
pub struct Chain<'r> {
    /// To be given back by [`Ring::complete`](crate::ring::Ring::complete) or [`Ring::put_back`](crate::ring::Ring::put_back).
    pub token: Token,
    /// What the driver gives.
    pub readable: GuestBuffers<'r>,
    /// Where the driver wants the answer.
    pub writable: GuestBuffers<'r>,
}

/// Where a chain starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'r> {
    /// The descriptor table.
    pub(crate) descriptors: VolatileSlice<'r>,
    /// Its entries.
    pub(crate) size: u16,
    /// Whether `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub(crate) indirect: bool,
}

/// Fills both lists with the chain that starts at `head`.
pub(crate) fn walk(
    ram: &GuestRam,
    table: Table<'_>,
    head: u16,
    readable: &mut SegmentList,
    writable: &mut SegmentList,
) -> Result<(), FaultKind> {
    readable.clear();
    writable.clear();
    walk_on(ram, table, head, readable, writable)
}

/// Adds the chain that starts at `head` to both lists.
pub(crate) fn walk_on(
    ram: &GuestRam,
    table: Table<'_>,
    head: u16,
    readable: &mut SegmentList,
    writable: &mut SegmentList,
) -> Result<(), FaultKind> {
    let mut entries = Entries::Here(table.descriptors);
    let mut size = u32::from(table.size);
    let mut may_be_indirect = table.indirect;
    let mut index = head;
    let mut seen = 0u32;
    let mut total = 0usize;
    let mut bytes = 0u32;
    let mut writing = false;
    loop {
        if u32::from(index) >= size {
            return Err(FaultKind::DescriptorIndex { index, size });
        }
        seen += 1;
        if seen > size {
            return Err(FaultKind::Loop);
        }
        let descriptor = entries.read(ram, index)?;
        if descriptor.refers_to_indirect_table() {
            let len = descriptor.len();
            if !may_be_indirect
                || descriptor.has_next()
                || len == 0
                || !len.is_multiple_of(DESCRIPTOR_SIZE as u32)
            {
                return Err(FaultKind::Indirect);
            }
            may_be_indirect = false;
            entries = Entries::find(ram, descriptor.addr(), len as usize);
            // Indices are 16 bits wide, so a larger table has entries that nothing can name.
            size = len / DESCRIPTOR_SIZE as u32;
            index = 0;
            seen = 0;
            continue;
        }
        total += 1;
        // Descriptors of no length count too: an indirect table may have 2^28 entries, and its owner's loop would keep this
        // process from everything else.
        if total > MAX_CHAIN_SEGMENTS {
            return Err(FaultKind::TooManySegments);
        }
        bytes = bytes
            .checked_add(descriptor.len())
            .ok_or(FaultKind::TooLarge)?;
        let list = if descriptor.is_write_only() {
            writing = true;
            &mut *writable
        } else if writing {
            return Err(FaultKind::Order);
        } else {
            &mut *readable
        };
        ram.resolve(descriptor.addr(), descriptor.len(), list)
            .map_err(|why| match why {
                ResolveError::OutsideRam => FaultKind::OutsideRam {
                    address: descriptor.addr().raw_value(),
                    len: descriptor.len(),
                },
                ResolveError::TooMany => FaultKind::TooManySegments,
            })?;
        if !descriptor.has_next() {
            return Ok(());
        }
        index = descriptor.next();
    }
}

/// Where the descriptors of a table are.
#[derive(Debug, Clone, Copy)]
enum Entries<'r> {
    /// All of them.
    Here(VolatileSlice<'r>),
    /// Over the end of a region, or partly not in RAM: each is looked for.
    At(GuestAddress),
}

impl<'r> Entries<'r> {
    fn find(ram: &'r GuestRam, address: GuestAddress, len: usize) -> Self {
        ram.piece(address, len)
            .map_or(Self::At(address), Self::Here)
    }

    /// A copy of one.
    #[inline]
    fn read(self, ram: &GuestRam, index: u16) -> Result<Descriptor, FaultKind> {
        let offset = usize::from(index) * DESCRIPTOR_SIZE;
        match self {
            Self::Here(table) => {
                let half = |at| -> Result<u64, FaultKind> {
                    let half = table.get_ref(at).map_err(|_| FaultKind::QueueMemory)?;
                    Ok(u64::from_le(half.load()))
                };
                let (address, rest) = (half(offset)?, half(offset + 8)?);
                // le64 addr, le32 len, le16 flags, le16 next.
                let (len, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
                Ok(Descriptor::new(address, len, flags, next))
            }
            Self::At(table) => {
                let offset = offset as u64;
                let fault = FaultKind::OutsideRam {
                    address: table.raw_value().saturating_add(offset),
                    len: DESCRIPTOR_SIZE as u32,
                };
                let address = table.checked_add(offset).ok_or(fault)?;
                ram.map().read_obj(address).map_err(|_| fault)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::rc::Rc;

    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    const TABLE: u64 = 0x1000;

    fn ram() -> Rc<GuestRam> {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(1 << 20).unwrap();
        Rc::new(GuestRam::new(vec![Region::new(0, 1 << 20, 0, &file, 0).unwrap()]).unwrap())
    }

    fn describe(ram: &GuestRam, table: u64, index: u64, raw: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = raw;
        let descriptor = Descriptor::new(address, len, flags, next);
        let at = GuestAddress(table + 16 * index);
        ram.map().write_obj(descriptor, at).unwrap();
    }

    fn walked(ram: &Rc<GuestRam>, head: u16) -> Result<(usize, usize), FaultKind> {
        let (mut readable, mut writable) = (SegmentList::default(), SegmentList::default());
        let table = Table {
            descriptors: ram.piece(GuestAddress(0), 16 * DESCRIPTOR_SIZE).unwrap(),
            size: 16,
            indirect: true,
        };
        walk(ram, table, head, &mut readable, &mut writable)?;
        Ok((readable.buffers(ram).len(), writable.buffers(ram).len()))
    }

    /// A table of 2^28 entries of which the first is its own next: without a limit this takes many seconds.
    #[test]
    fn a_loop_of_nothing_in_a_huge_table_ends() {
        let ram = ram();
        describe(&ram, 0, 0, (TABLE, 0xffff_fff0, INDIRECT, 0));
        describe(&ram, TABLE, 0, (u64::MAX, 0, NEXT, 0));
        assert_eq!(walked(&ram, 0), Err(FaultKind::TooManySegments));
    }

    #[test]
    fn descriptors_count_whether_or_not_they_have_bytes() {
        let ram = ram();
        let last = MAX_CHAIN_SEGMENTS as u64 - 1;
        describe(&ram, 0, 0, (TABLE, 0x8000, INDIRECT, 0));
        for at in 0..=last {
            let next = at as u16 + 1;
            describe(&ram, TABLE, at, (0, (at % 2) as u32, NEXT, next));
        }
        describe(&ram, TABLE, last + 1, (0, 1, 0, 0));
        assert_eq!(walked(&ram, 0), Err(FaultKind::TooManySegments));
        describe(&ram, TABLE, last, (0, 1, 0, 0));
        assert_eq!(walked(&ram, 0), Ok((MAX_CHAIN_SEGMENTS / 2, 0)));
    }

    #[test]
    fn loops_of_nothing_in_the_queue_itself_are_loops() {
        let ram = ram();
        describe(&ram, 0, 3, (0, 0, NEXT, 4));
        describe(&ram, 0, 4, (0, 0, NEXT, 3));
        assert_eq!(walked(&ram, 3), Err(FaultKind::Loop));
    }
}
