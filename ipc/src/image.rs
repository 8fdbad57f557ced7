//! Opening a disk image, as the broker and a stand-alone `block` both do.
//!
//! **Job.** Path in, descriptor out: with the rights that the disk has and no more, locked against a second writer.
//! **Who is not trusted.** Whoever made the path: a pipe must not hold the caller, a terminal must not become its own.
//! **Why this way.** The process that serves the disk has no path, so whoever starts it opens for it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;

/// Why an image cannot be had.
#[derive(Debug, Error)]
pub enum ImageError {
    /// `O_DIRECT` on a file system without it.
    #[error("its file system does not support O_DIRECT; use direct=off")]
    NoDirect,
    /// It may only be read.
    #[error("cannot open for writing: {0}; use readonly=on if the guest only reads")]
    NotWritable(io::Error),
    /// Another error of open(2).
    #[error("cannot open: {0}")]
    Open(io::Error),
    /// A folder, a pipe, ….
    #[error("neither a regular file nor a block device")]
    Kind,
    /// A hugetlbfs, whose files are written through mappings only.
    #[error("its file system has no write(2); use readonly=on if the guest only reads")]
    NoWrites,
    /// Another process uses it in a way that excludes this one.
    #[error("another process holds a lock on this image{}", if *.readonly { " for writing" } else { "" })]
    Locked {
        /// This one would only have read.
        readonly: bool,
    },
    /// What was opened cannot be looked at.
    #[error(transparent)]
    Other(#[from] io::Error),
}

/// Opens the image at `path`.
///
/// # Errors
/// [`ImageError`]
pub fn open(path: &Path, readonly: bool, direct: bool) -> Result<File, ImageError> {
    let flags = with_direct(OFlag::O_NONBLOCK | OFlag::O_NOCTTY, direct);
    let file = File::options()
        .read(true)
        .write(!readonly)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINVAL) if direct => ImageError::NoDirect,
            Some(Errno::EACCES | Errno::EROFS | Errno::EPERM) if !readonly => {
                ImageError::NotWritable(e)
            }
            _ => ImageError::Open(e),
        })?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::Kind);
    }
    // No bytes: a file system that takes none says so all the same.
    if !readonly && nix::unistd::write(&file, &[]) == Err(Errno::EINVAL) {
        return Err(ImageError::NoWrites);
    }
    lock(&file, readonly)?;
    // O_NONBLOCK was only for opening.
    let keep = with_direct(OFlag::empty(), direct);
    fcntl(&file, FcntlArg::F_SETFL(keep)).map_err(io::Error::from)?;
    Ok(file)
}

const fn with_direct(others: OFlag, direct: bool) -> OFlag {
    if direct {
        others.union(OFlag::O_DIRECT)
    } else {
        others
    }
}

/// Two VMs that write one image destroy it: an advisory lock on the open file description, which lives as long as the
/// device process, keeps a second writer away. Readers share.
///
/// # Errors
/// [`ImageError::Locked`]
pub fn lock(file: impl AsFd, readonly: bool) -> Result<(), ImageError> {
    let lock = nix::libc::flock {
        l_type: if readonly {
            nix::libc::F_RDLCK
        } else {
            nix::libc::F_WRLCK
        } as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Err(Errno::EAGAIN | Errno::EACCES) => Err(ImageError::Locked { readonly }),
        // Some file systems have no locks; that is no reason not to start.
        Ok(_) | Err(_) => Ok(()),
    }
}
