//! What a device keeps for a process that comes after it.
//!
//! **Job.** Some bytes behind the queues' parts of the in-flight region, which outlives the process and is part of a
//! snapshot: what the driver told this device beside its queues, and will not tell again.
//! **Who is not trusted.** Whoever hands the region over: a length is checked against the room there is, and what the bytes mean is the
//! device's to check.
//! **Why this way.** There are two places, and one byte that says which of them holds; so a process killed while it writes leaves
//! what was there before. A front end needs to know nothing of it: it passes the region on as a whole.
//!
//! Layout: a byte (0 = nothing, 1 or 2 = the place) and 63 of padding, then twice a `le16` length and the bytes.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use vm_memory::Bytes;

use crate::memory::Mapping;

const HEAD: usize = 64;
const LENGTH: usize = 2;

/// Bytes behind the queues' parts for a device that keeps at most `most`.
pub(crate) fn area_bytes(most: usize) -> usize {
    if most == 0 {
        0
    } else {
        HEAD + 2 * (LENGTH + most)
    }
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct KeptArea {
    region: Rc<Mapping>,
    start: usize,
    most: usize,
}

impl KeptArea {
    /// From byte `start` of `region` on, which has [`area_bytes`] bytes there.
    pub(crate) fn new(region: Rc<Mapping>, start: usize, most: usize) -> Self {
        Self {
            region,
            start,
            most,
        }
    }

    fn place(&self, which: u8) -> usize {
        self.start + HEAD + usize::from(which == 2) * (LENGTH + self.most)
    }

    fn which(&self) -> Option<u8> {
        let which = self.region.bytes().load(self.start, Ordering::Acquire);
        which.ok().filter(|which| (1..=2).contains(which))
    }

    /// What a process before this one kept.
    pub(crate) fn load(&self) -> Option<Vec<u8>> {
        let place = self.place(self.which()?);
        let bytes = self.region.bytes();
        let mut length = [0; LENGTH];
        bytes.read_slice(&mut length, place).ok()?;
        let length = usize::from(u16::from_le_bytes(length));
        if length > self.most {
            return None;
        }
        let mut out = vec![0; length];
        bytes.read_slice(&mut out, place + LENGTH).ok()?;
        Some(out)
    }

    /// Keeps `what` from now on; more than the device said is cut off.
    pub(crate) fn store(&self, what: &[u8]) {
        let what = &what[..what.len().min(self.most)];
        let which = if self.which() == Some(1) { 2 } else { 1 };
        let place = self.place(which);
        let bytes = self.region.bytes();
        // The region has room for both places, or there would be no area.
        let _ = bytes.write_slice(&(what.len() as u16).to_le_bytes(), place);
        let _ = bytes.write_slice(what, place + LENGTH);
        let _ = bytes.store(which, self.start, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;

    fn area(most: usize) -> KeptArea {
        let file = File::from(memfd_create(c"kept", MFdFlags::MFD_CLOEXEC).unwrap());
        let size = (128 + area_bytes(most)) as u64;
        file.set_len(size).unwrap();
        KeptArea::new(Rc::new(Mapping::new(&file, 0, size).unwrap()), 128, most)
    }

    #[test]
    fn the_last_holds() {
        let area = area(10);
        assert_eq!(area.load(), None);
        for what in [&[1, 2, 3][..], &[4], &[], &[9; 10]] {
            area.store(what);
            assert_eq!(area.load().as_deref(), Some(what));
        }
        area.store(&[7; 11]);
        assert_eq!(area.load(), Some(vec![7; 10]));
    }

    #[test]
    fn a_death_while_it_is_written_leaves_what_was_there() {
        let area = area(4);
        area.store(&[1; 4]);
        // All of the other place, but not the byte that says so.
        let bytes = area.region.bytes();
        bytes
            .write_slice(&[4, 0, 2, 2, 2, 2], area.place(2))
            .unwrap();
        assert_eq!(area.load(), Some(vec![1; 4]));
    }

    #[test]
    fn nonsense_is_nothing() {
        let area = area(4);
        area.store(&[1; 4]);
        let bytes = area.region.bytes();
        bytes.write_slice(&[5, 0], area.place(1)).unwrap();
        assert_eq!(area.load(), None, "longer than there is room");
        bytes.write_slice(&[3], area.start).unwrap();
        assert_eq!(area.load(), None, "no such place");
    }
}
