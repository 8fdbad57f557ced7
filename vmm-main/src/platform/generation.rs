//! The VM's generation id: how a guest learns that it is one of several that go on from one snapshot.
//!
//! Job: 128 bits at a fixed place in the guest's memory that are new with each start and each restore, the ACPI device that
//! names the place (Microsoft, "Virtual Machine Generation ID", 2018), and the line whose event notifies of a change.
//! Who is not trusted: the guest, which may overwrite its copy; it fools nobody but itself.
//! Why this way: a kernel that hears of a change mixes the new id into its random numbers (Linux `drivers/virt/vmgenid.c`),
//! so clones of one template do not draw the same keys. The event has a generic event device and a line of its own, so it
//! needs no register to ask what happened.

#![allow(unsafe_code)] // getrandom has no safe wrapper here

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A VM's identity.
#[derive(Debug)]
pub struct Generation {
    id: [u8; 16],
    line: EventFd,
}

impl Generation {
    /// A new one, with `line` (an irqfd) for its event.
    ///
    /// # Errors
    /// The kernel has no random numbers.
    pub fn new(line: EventFd) -> io::Result<Self> {
        let mut id = [0; 16];
        // SAFETY: fills at most the 16 bytes of the array. Up to 256 bytes come whole or not at all.
        let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
        if got != 16 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { id, line })
    }

    /// The 16 bytes that the guest reads.
    #[must_use]
    pub const fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Tells the guest that they are not those that it knows.
    ///
    /// # Errors
    /// The line's eventfd cannot be written.
    pub fn changed(&self) -> io::Result<()> {
        self.line.write(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_the_same_and_a_change_raises_the_line() {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let one = Generation::new(line.try_clone().unwrap()).unwrap();
        let other = Generation::new(line.try_clone().unwrap()).unwrap();
        assert_ne!(one.id(), other.id());
        assert!(line.read().is_err());
        one.changed().unwrap();
        assert_eq!(line.read().unwrap(), 1);
    }
}
