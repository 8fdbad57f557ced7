//! Files that are not where the guest last saw them.
//!
//! **Job.** Finds a file that gave its descriptor up and was renamed or removed on the host meanwhile: by what the guest has open of it, and
//! in the folder in which it was. **Who is not trusted.** The host's other processes, who move files at any time: what is found
//! must be the same file by identity and time of birth. The guest, who may ask again and again: a search has an end.
//! **Why this way.** A file handle of the kernel's (`name_to_handle_at(2)`) would find it wherever it is, on the whole file system. Opening
//! it takes a right over all files of the host, and the Landlock of older kernels, Linux 6.1 among them, refuses a file that was opened by
//! its handle alone.

use std::os::fd::AsFd;

use nix::errno::Errno;

use super::folders::names_of;
use super::{Passthrough, sys};
use crate::fuse::Name;

/// Bytes of entries that are read at once.
const READ_AT_ONCE: usize = 32 * 1024;
/// How often that is done for one file: some 16,000 names, which take a few milliseconds.
const READS: usize = 16;
/// Folders, one in the other, that may each have been moved. They count for the limit of descriptors from the next request on.
const LEVELS: usize = 16;

impl Passthrough {
    /// Gives an inode a descriptor whose file is not where it was last looked up. The caller has made room for it.
    ///
    /// # Errors
    /// `ESTALE` if it is not found.
    pub(super) fn find_moved(&mut self, node: u64) -> Result<(), Errno> {
        self.find_on_level(node, LEVELS)
    }

    fn find_on_level(&mut self, node: u64, levels: usize) -> Result<(), Errno> {
        if self.find_among_open(node)? {
            return Ok(());
        }
        let (parent, _) = self.inodes.last_seen(node).ok_or(Errno::ESTALE)?;
        if self.inodes.is_closed(parent) {
            match self.inodes.reopen(parent) {
                Err(Errno::ESTALE) if levels > 1 => self.find_on_level(parent, levels - 1)?,
                other => other?,
            }
        }
        self.find_in_folder(node, parent)
    }

    /// Whether the guest has it open.
    fn find_among_open(&mut self, node: u64) -> Result<bool, Errno> {
        let mut found = None;
        for handle in self.handles.all().filter_map(|kept| kept.handle) {
            // A file that its server has forgotten is none that could be meant.
            let Ok(stat) = sys::stat(handle.as_fd()) else {
                continue;
            };
            if self.inodes.closed(&stat) == Some(node) {
                found = Some((self.own.reopen(handle.as_fd(), libc::O_PATH)?, stat));
                break;
            }
        }
        match found {
            Some((fd, stat)) => self.inodes.recover(node, fd, &stat).map(|()| true),
            None => Ok(false),
        }
    }

    /// Looks for it under other names.
    fn find_in_folder(&mut self, node: u64, parent: u64) -> Result<(), Errno> {
        let ino = self.inodes.number_on_host(node).ok_or(Errno::ESTALE)?;
        let folder = self.inodes.folder(parent)?.fd();
        let listed = self
            .own
            .reopen(folder, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let mut buffer = vec![0; READ_AT_ONCE];
        for _ in 0..READS {
            let len = sys::read_entries(listed.as_fd(), &mut buffer)?;
            if len == 0 {
                break;
            }
            for (there, name) in names_of(&buffer[..len]) {
                let Ok(name) = Name::new(name) else { continue };
                if there != ino {
                    continue;
                }
                let Ok(fd) = sys::open_beneath(listed.as_fd(), name, libc::O_PATH, 0) else {
                    continue;
                };
                let stat = sys::stat(fd.as_fd())?;
                if self.inodes.closed(&stat) == Some(node) {
                    self.inodes.recover(node, fd, &stat)?;
                    self.inodes.seen_at(&stat, (parent, name));
                    return Ok(());
                }
            }
        }
        Err(Errno::ESTALE)
    }
}
