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

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::fault::FaultKind;
use crate::memory::{GuestBuffers, GuestRam, ResolveError, SegmentList};

/// Bytes of a descriptor (virtio 1.3, 2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;

/// The right to complete one request, once.
#[derive(Debug)]
pub struct Token {
    pub(crate) head: u16,
    pub(crate) replayed: bool,
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
pub(crate) struct Table {
    /// Guest physical address of the descriptor table.
    pub(crate) address: GuestAddress,
    /// Its entries.
    pub(crate) size: u16,
    /// Whether `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub(crate) indirect: bool,
}

/// Fills both lists with the chain that starts at `head`.
pub(crate) fn walk(
    ram: &GuestRam,
    table: Table,
    head: u16,
    readable: &mut SegmentList,
    writable: &mut SegmentList,
) -> Result<(), FaultKind> {
    readable.clear();
    writable.clear();
    let mut address = table.address;
    let mut size = u32::from(table.size);
    let mut may_be_indirect = table.indirect;
    let mut index = head;
    let mut seen = 0u32;
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
        let descriptor = read(ram, address, index)?;
        if descriptor.refers_to_indirect_table() {
            let len = descriptor.len();
            if !may_be_indirect
                || descriptor.has_next()
                || len == 0
                || !len.is_multiple_of(DESCRIPTOR_SIZE)
            {
                return Err(FaultKind::Indirect);
            }
            may_be_indirect = false;
            address = descriptor.addr();
            // Indices are 16 bits wide, so a larger table has entries that nothing can name.
            size = len / DESCRIPTOR_SIZE;
            index = 0;
            seen = 0;
            continue;
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

/// A copy of one descriptor.
fn read(ram: &GuestRam, table: GuestAddress, index: u16) -> Result<Descriptor, FaultKind> {
    let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
    let fault = FaultKind::OutsideRam {
        address: table.raw_value().saturating_add(offset),
        len: DESCRIPTOR_SIZE,
    };
    let address = table.checked_add(offset).ok_or(fault)?;
    ram.map().read_obj(address).map_err(|_| fault)
}
