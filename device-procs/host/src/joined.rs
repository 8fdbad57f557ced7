//! Buffers of several requests, one behind the other, for one system call.
//!
//! **Job.** Keeps what the requests point to beyond the calls in which they were taken, and lends all of it or one request's part.
//! **Who is not trusted.** The front end may take guest memory away meanwhile, so it stays mapped; the guest may write to it, as it
//! may to the buffers of any request. **Why this way.** The list is used again: no request allocates once it is long enough, and it
//! never gets longer than what one call takes.

use std::ops::Range;
use std::rc::Rc;

use ipc::limits::MAX_CHAIN_SEGMENTS;

use crate::memory::{GuestBuffers, GuestRam, SegmentList};

/// See the module's page.
#[derive(Debug, Default)]
pub struct JoinedBuffers {
    pieces: SegmentList,
    /// That of all pieces, if there are any.
    ram: Option<Rc<GuestRam>>,
}

impl JoinedBuffers {
    /// Puts `buffers` behind the others and tells which pieces are theirs; `None` if the kernel would not take as many at once, or
    /// if they are in other memory than the others.
    pub fn join(&mut self, buffers: &GuestBuffers<'_>) -> Option<Range<usize>> {
        let first = self.pieces.count();
        let last = first + buffers.segments();
        let same = match &self.ram {
            Some(ram) => Rc::ptr_eq(ram, buffers.ram()),
            None => true,
        };
        if !same || last > MAX_CHAIN_SEGMENTS {
            return None;
        }
        self.ram.get_or_insert_with(|| buffers.ram().clone());
        self.pieces.extend(buffers);
        Some(first..last)
    }

    /// The pieces in `range`; `None` if there are none.
    pub fn part(&mut self, range: Range<usize>) -> Option<GuestBuffers<'_>> {
        let ram = self.ram.as_ref()?;
        Some(self.pieces.part(range, ram))
    }

    /// All of them; `None` if there are none.
    pub fn all(&mut self) -> Option<GuestBuffers<'_>> {
        self.part(0..self.pieces.count())
    }

    /// Lets go of them.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.ram = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::os::fd::AsFd;
    use vm_memory::{Bytes, GuestAddress};

    fn memfd() -> File {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(0x10000).unwrap();
        file
    }

    fn ram() -> Rc<GuestRam> {
        Rc::new(GuestRam::new(vec![Region::new(0, 0x10000, 0, &memfd(), 0).unwrap()]).unwrap())
    }

    fn list(ram: &GuestRam, pieces: &[(u64, u32)]) -> SegmentList {
        let mut list = SegmentList::default();
        for (at, len) in pieces {
            ram.resolve(GuestAddress(*at), *len, &mut list).unwrap();
        }
        list
    }

    #[test]
    fn each_request_finds_its_own_part() {
        let ram = ram();
        ram.map().write_slice(b"abcdef", GuestAddress(9)).unwrap();
        let mut joined = JoinedBuffers::default();
        assert!(joined.all().is_none());
        let first = joined.join(&list(&ram, &[(13, 2), (9, 1)]).buffers(&ram));
        let second = joined.join(&list(&ram, &[(10, 3)]).buffers(&ram));
        assert_eq!((first, second.clone()), (Some(0..2), Some(2..3)));
        let file = memfd();
        assert_eq!(joined.all().unwrap().send_to_file(file.as_fd(), 0), Ok(6));
        let mut got = [0; 6];
        nix::sys::uio::pread(&file, &mut got, 0).unwrap();
        assert_eq!(&got, b"efabcd");
        let mut part = joined.part(second.unwrap()).unwrap();
        assert_eq!((part.len(), part.read(&mut got)), (3, 3));
        assert_eq!(&got[..3], b"bcd");
        assert!(joined.part(2..4).unwrap().is_empty());
        joined.clear();
        assert!(joined.all().is_none());
    }

    #[test]
    fn there_are_never_more_than_one_call_takes_nor_of_other_memory() {
        let (ram, other) = (ram(), ram());
        let mut joined = JoinedBuffers::default();
        let most: Vec<(u64, u32)> = (0..MAX_CHAIN_SEGMENTS as u64 - 1)
            .map(|at| (at, 1))
            .collect();
        assert!(joined.join(&list(&ram, &most).buffers(&ram)).is_some());
        let mut two = list(&ram, &[(0, 1), (1, 1)]);
        assert_eq!(joined.join(&two.buffers(&ram)), None);
        assert_eq!(joined.join(&list(&other, &[(0, 1)]).buffers(&other)), None);
        let last = joined.join(&list(&ram, &[(0, 1)]).buffers(&ram));
        assert_eq!(last, Some(MAX_CHAIN_SEGMENTS - 1..MAX_CHAIN_SEGMENTS));
        assert_eq!(joined.join(&list(&ram, &[(0, 1)]).buffers(&ram)), None);
        joined.clear();
        assert_eq!(
            joined.join(&list(&other, &[(0, 1)]).buffers(&other)),
            Some(0..1)
        );
    }
}
