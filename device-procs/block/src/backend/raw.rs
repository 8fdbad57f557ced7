//! A raw image: byte N of the file is byte N of the disk.
//!
//! **Job.** Finds out, before the jail is shut, how large the image is and how `O_DIRECT` wants its requests.
//! **Who is not trusted.** Whoever wrote the image; nothing but its size is believed, and raw is never guessed from contents.
//! **Why this way.** A size that is no multiple of 512 is rounded down: the last bytes are out of reach, which is said in the
//! log. (QEMU rounds up and may let the file grow.) `O_DIRECT` on an image whose size is no multiple of what the file system
//! wants could only write the end by making the image longer, so it is then turned off, which is said too.

use std::os::fd::{AsFd, OwnedFd};

use device_host::direct_io_alignment;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Whence, lseek};

use crate::error::BuildError;
use crate::request::SECTOR;

/// What `O_DIRECT` wants when the file system does not say (`statx`, `STATX_DIOALIGN`): the largest that is in use.
const CAREFUL_ALIGNMENT: usize = 4096;

/// Bytes of a page.
const PAGE: usize = 4096;

/// Multiples that `O_DIRECT` demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of a buffer's address.
    pub(crate) memory: usize,
    /// Of a request's place in the file and of each buffer's length. At least 512 divides or is divided by it.
    pub(crate) offset: usize,
}

/// An open image.
#[derive(Debug)]
pub(crate) struct RawImage {
    /// The file or block device.
    pub(crate) fd: OwnedFd,
    /// Bytes that the guest can reach: a multiple of 512.
    pub(crate) size: u64,
    /// What requests must look like; `None` goes through the page cache.
    pub(crate) direct: Option<Alignment>,
    /// Bytes that the host reads and writes at once: a page, if it goes through the page cache.
    pub(crate) physical_block: u32,
    /// The multiple that a range must be to be zeroed or freed as such: 1 for a file, a logical block of a block device.
    pub(crate) zero_unit: u64,
}

impl RawImage {
    pub(crate) fn new(fd: OwnedFd, readonly: bool, direct: bool) -> Result<Self, BuildError> {
        let failed = |call| move |source| BuildError::Image { call, source };
        let flags =
            OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).map_err(failed("fcntl"))?);
        check_access(flags, readonly)?;
        let stat = fstat(&fd).map_err(failed("fstat"))?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
            return Err(BuildError::Kind { mode: stat.st_mode });
        }
        // A block device's st_size is 0; its end can be sought like a file's.
        let end = lseek(&fd, 0, Whence::SeekEnd).map_err(failed("lseek"))?;
        let end = u64::try_from(end).unwrap_or(0);
        let size = end - end % SECTOR;
        if size != end {
            ipc::log::warn!(
                "image has {end} bytes, no multiple of {SECTOR}: the guest does not see the last {}",
                end - size
            );
        }
        if direct != flags.contains(OFlag::O_DIRECT) {
            return Err(BuildError::Flags {
                is: if direct {
                    "open without O_DIRECT"
                } else {
                    "open with O_DIRECT"
                },
                wanted: if direct { "direct=on" } else { "direct=off" },
            });
        }
        let zero_unit = if kind == SFlag::S_IFBLK {
            direct_alignment(&fd).offset as u64
        } else {
            1
        };
        let direct = if direct {
            choose_direct(&fd, flags, size)?
        } else {
            None
        };
        let physical_block = direct.map_or(PAGE, |alignment| alignment.offset.max(SECTOR as usize));
        Ok(Self {
            fd,
            size,
            direct,
            // A power of two far below 4 GiB.
            physical_block: physical_block as u32,
            zero_unit,
        })
    }
}

fn check_access(flags: OFlag, readonly: bool) -> Result<(), BuildError> {
    match flags & OFlag::O_ACCMODE {
        OFlag::O_RDONLY if !readonly => Err(BuildError::Flags {
            is: "read-only",
            wanted: "writable",
        }),
        // What the guest may not do, this process should not be able to do.
        OFlag::O_RDWR | OFlag::O_WRONLY if readonly => Err(BuildError::Flags {
            is: "writable",
            wanted: "read-only",
        }),
        OFlag::O_WRONLY => Err(BuildError::Flags {
            is: "write-only",
            wanted: "readable",
        }),
        _ => Ok(()),
    }
}

fn direct_alignment(fd: &OwnedFd) -> Alignment {
    direct_io_alignment(fd.as_fd())
        .filter(|(memory, offset)| memory.is_power_of_two() && offset.is_power_of_two())
        .map_or(
            Alignment {
                memory: CAREFUL_ALIGNMENT,
                offset: CAREFUL_ALIGNMENT,
            },
            |(memory, offset)| Alignment { memory, offset },
        )
}

fn choose_direct(fd: &OwnedFd, flags: OFlag, size: u64) -> Result<Option<Alignment>, BuildError> {
    let alignment = direct_alignment(fd);
    if size.is_multiple_of(alignment.offset as u64) {
        return Ok(Some(alignment));
    }
    ipc::log::warn!(
        "image of {size} bytes is no multiple of the {} bytes that direct=on needs here: the page cache is used",
        alignment.offset
    );
    fcntl(fd, FcntlArg::F_SETFL(flags & !OFlag::O_DIRECT)).map_err(|source| BuildError::Image {
        call: "fcntl(F_SETFL)",
        source,
    })?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    fn image(bytes: u64, write: bool, flags: i32) -> OwnedFd {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(file.path())
            .unwrap()
            .into()
    }

    #[test]
    fn sizes_are_rounded_down_to_sectors() {
        for (bytes, want) in [(0, 0), (511, 0), (512, 512), (1_000_000, 999_936)] {
            let image = RawImage::new(image(bytes, true, 0), false, false).unwrap();
            assert_eq!((image.size, image.direct), (want, None));
        }
    }

    #[test]
    fn the_descriptor_must_be_what_the_spec_says() {
        for (write, flags, readonly, direct) in [
            (true, 0, true, false),
            (false, 0, false, false),
            (true, 0, false, true),
            (true, libc::O_DIRECT, false, false),
        ] {
            assert!(
                matches!(
                    RawImage::new(image(4096, write, flags), readonly, direct),
                    Err(BuildError::Flags { .. })
                ),
                "{write} {flags} {readonly} {direct}"
            );
        }
        let (_, pipe) = nix::unistd::pipe().unwrap();
        assert!(RawImage::new(pipe, false, false).is_err());
    }

    #[test]
    fn direct_is_dropped_where_it_would_make_the_image_grow() {
        let odd = RawImage::new(image(4096 + 512, true, libc::O_DIRECT), false, true).unwrap();
        let even = RawImage::new(image(8192, true, libc::O_DIRECT), false, true).unwrap();
        let alignment = even.direct.unwrap();
        assert!(alignment.offset <= 4096);
        assert_eq!(odd.direct.is_some(), 512 % alignment.offset == 0);
        let flags = OFlag::from_bits_retain(fcntl(&odd.fd, FcntlArg::F_GETFL).unwrap());
        assert_eq!(flags.contains(OFlag::O_DIRECT), odd.direct.is_some());
    }
}
