//! Open files and folders of the guest.
//!
//! **Job.** File handles to descriptors, and for folders the place that their descriptor stands at.
//! **Who is not trusted.** The guest: handles may be invented, or used after release. The number of handles is bounded by the
//! caller's budget of descriptors.
//! **Why this way.** A handle holds a generation like a node id does, so that a late request does not hit another file.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

/// What is open.
#[derive(Debug)]
pub(crate) enum Handle {
    /// A regular file.
    File(OwnedFd),
    /// A folder.
    Folder {
        fd: OwnedFd,
        /// Where the kernel's position is.
        position: u64,
    },
}

/// All handles.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    slots: Vec<(u32, Option<Handle>)>,
    free: Vec<u32>,
}

impl Handles {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds one; returns its number, which is never 0.
    pub(crate) fn insert(&mut self, handle: Handle) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            // There are fewer slots than descriptors, whose numbers have 31 bits.
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.1 = Some(handle);
        u64::from(slot.0) << 32 | (u64::from(index) + 1)
    }

    fn slot(&mut self, number: u64) -> Option<&mut (u32, Option<Handle>)> {
        let index = u32::try_from(number & 0xffff_ffff).ok()?.checked_sub(1)?;
        self.slots
            .get_mut(index as usize)
            .filter(|(generation, _)| u64::from(*generation) == number >> 32)
    }

    fn get(&self, number: u64) -> Option<&Handle> {
        let index = u32::try_from(number & 0xffff_ffff).ok()?.checked_sub(1)?;
        let (generation, handle) = self.slots.get(index as usize)?;
        handle
            .as_ref()
            .filter(|_| u64::from(*generation) == number >> 32)
    }

    /// An open regular file.
    ///
    /// # Errors
    /// `EBADF`.
    pub(crate) fn file(&self, number: u64) -> Result<BorrowedFd<'_>, Errno> {
        match self.get(number) {
            Some(Handle::File(fd)) => Ok(fd.as_fd()),
            _ => Err(Errno::EBADF),
        }
    }

    /// An open folder and its position.
    ///
    /// # Errors
    /// `EBADF`.
    pub(crate) fn folder(&mut self, number: u64) -> Result<(BorrowedFd<'_>, &mut u64), Errno> {
        match self.slot(number) {
            Some((_, Some(Handle::Folder { fd, position }))) => Ok(((*fd).as_fd(), position)),
            _ => Err(Errno::EBADF),
        }
    }

    /// Takes a handle out.
    ///
    /// # Errors
    /// `EBADF`.
    pub(crate) fn remove(&mut self, number: u64) -> Result<Handle, Errno> {
        let slot = self.slot(number).ok_or(Errno::EBADF)?;
        let handle = slot.1.take().ok_or(Errno::EBADF)?;
        slot.0 = slot.0.wrapping_add(1);
        // The low half is a slot's number plus one, as `slot` found.
        self.free.push((number & 0xffff_ffff) as u32 - 1);
        Ok(handle)
    }

    /// Closes all.
    pub(crate) fn clear(&mut self) {
        for (index, (generation, handle)) in self.slots.iter_mut().enumerate() {
            if handle.take().is_some() {
                *generation = generation.wrapping_add(1);
                // As in `insert`.
                self.free.push(index as u32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_released_handle_is_bad_even_when_its_slot_is_used_again() {
        let mut handles = Handles::default();
        let first = handles.insert(Handle::File(null()));
        assert!(handles.file(first).is_ok());
        assert_eq!(handles.folder(first).unwrap_err(), Errno::EBADF);
        handles.remove(first).unwrap();
        assert_eq!(handles.remove(first).unwrap_err(), Errno::EBADF);
        let second = handles.insert(Handle::Folder {
            fd: null(),
            position: 0,
        });
        assert_eq!(handles.len(), 1);
        assert_eq!(handles.file(first).unwrap_err(), Errno::EBADF);
        assert!(handles.folder(second).is_ok());
        for invented in [0, 2, u64::MAX, 0xffff_ffff, second + (1 << 32)] {
            assert_eq!(handles.file(invented).unwrap_err(), Errno::EBADF);
            assert_eq!(handles.remove(invented).unwrap_err(), Errno::EBADF);
        }
        handles.clear();
        assert_eq!(handles.len(), 0);
        assert_eq!(handles.folder(second).unwrap_err(), Errno::EBADF);
    }
}
