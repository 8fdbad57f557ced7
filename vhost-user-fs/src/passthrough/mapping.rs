//! Files that the guest's kernel maps instead of reading them (virtio 1.3, 5.11.6.4: the DAX window).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ipc::limits::DAX_UNIT;
use nix::errno::Errno;

use super::Passthrough;
use super::store::Word;
use crate::fuse::wire::{flag, init};

/// Where mappings begin, in the file and in the window: multiples of 2 to the power of this, which is [`DAX_UNIT`].
pub(super) const ALIGNMENT_SHIFT: u16 = DAX_UNIT.trailing_zeros() as u16;

/// A file that is to be mapped.
#[derive(Debug)]
pub enum Mapped<'a> {
    /// It was opened for that.
    Opened(OwnedFd),
    /// The guest has it open.
    Handle(BorrowedFd<'a>),
}

impl AsFd for Mapped<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Opened(fd) => fd.as_fd(),
            Self::Handle(fd) => fd.as_fd(),
        }
    }
}

/// Whether a mapping with the `flags` of a `SETUPMAPPING` can be written.
///
/// # Errors
/// `EINVAL` for other flags than those of the protocol, and for none.
pub fn is_writable(flags: u64) -> Result<bool, Errno> {
    let known = u64::from(flag::SETUPMAPPING_READ | flag::SETUPMAPPING_WRITE);
    if flags & !known != 0 || flags == 0 {
        return Err(Errno::EINVAL);
    }
    Ok(flags & u64::from(flag::SETUPMAPPING_WRITE) != 0)
}

impl Passthrough {
    /// Files can be mapped from now on, by guests that begin a session from now on.
    pub fn offer_mappings(&mut self) {
        self.window = true;
    }

    /// The front end keeps account of what is mapped, and asks for the state of a session only while nothing is. No other front end
    /// is known to, and this process could not tell: one that comes after a killed one does not know what was mapped before.
    pub fn leave_mappings_to_front_end(&mut self) {
        self.window_is_watched = true;
    }

    /// Whether this guest's session has mappings.
    pub fn has_mappings(&self) -> bool {
        self.agreed(init::MAP_ALIGNMENT)
    }

    /// The file that a `SETUPMAPPING` on `node` maps: the open file `fh`, or the inode itself, which is how Linux asks. A mapping
    /// that can be written takes the same right as opening the file for it.
    ///
    /// # Errors
    /// `ESTALE` without a session, `ENOSYS` in one without mappings, `EROFS` and `EACCES` for what may not be written (or read),
    /// `EBADF`, and what opening the file says.
    pub fn file_to_map(
        &mut self,
        node: u64,
        fh: Option<u64>,
        writable: bool,
    ) -> Result<Mapped<'_>, Errno> {
        if self.store.load(Word::Agreed) == 0 {
            return Err(Errno::ESTALE);
        }
        if !self.has_mappings() {
            return Err(Errno::ENOSYS);
        }
        if writable && self.config.readonly {
            return Err(Errno::EROFS);
        }
        if let Some(fh) = fh {
            let (file, flags) = self.handles.file_and_flags(fh)?;
            let enough = match flags.cast_signed() & libc::O_ACCMODE {
                libc::O_RDWR => true,
                libc::O_RDONLY => !writable,
                // A mapping that can be written can be read.
                _ => false,
            };
            if !enough {
                return Err(Errno::EACCES);
            }
            if writable {
                self.drop_mapped_capability(file)?;
            }
            return Ok(Mapped::Handle(file));
        }
        self.need([node, 0])?;
        self.room()?;
        let inode = self.inodes.get(node)?;
        if inode.kind != libc::S_IFREG {
            return Err(Errno::ENODEV);
        }
        let flags = if writable {
            self.drop_mapped_capability(inode.fd())?;
            libc::O_RDWR
        } else {
            libc::O_RDONLY
        };
        self.own.reopen(inode.fd(), flags).map(Mapped::Opened)
    }
}
