//! A disk's image is made longer while the guest runs.
//!
//! **Job.** `block_resize` of a raw disk: the broker's half, which is the only one that may change the length of a raw image.
//! **Who is not trusted.** The control process, once the guest runs: it names a size, and what the command line said is the limit.
//! **Why this way.** A disk's process cannot write beyond the size that its image had when it was started, so that a guest cannot fill
//! the host's file system. Growing is therefore the operator's word, given before the guest ran. An image is never made shorter: what
//! the guest has at its end would be lost, whether the guest knows of it or not.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use thiserror::Error;

/// Bytes of a sector (virtio 1.3, 5.2.4: `capacity`).
const SECTOR: u64 = 512;

/// Why an image keeps its size.
#[derive(Debug, Error)]
pub(crate) enum ResizeError {
    #[error("size {0} is no multiple of {SECTOR}")]
    Sectors(u64),
    #[error("the disk is read-only")]
    Readonly,
    #[error(
        "size {size} is less than the {now} bytes of the image, whose end the guest would lose; allowed: {now} and more"
    )]
    Shorter { size: u64, now: u64 },
    #[error(
        "size {size} is out of range; allowed: {now} to {most} (max-size= of its -drive or -blockdev)"
    )]
    TooLong { size: u64, now: u64, most: u64 },
    #[error("its -drive or -blockdev has no max-size=, so the image keeps its {now} bytes")]
    NotGranted { now: u64 },
    #[error("size {size} is not that of the host's block device, {now}")]
    BlockDevice { size: u64, now: u64 },
    #[error("its image cannot be looked at: {0}")]
    Look(#[source] std::io::Error),
    #[error("its image cannot be made {size} bytes long: {source}")]
    Set { size: u64, source: std::io::Error },
}

/// Makes `image` `size` bytes long, if that is not shorter, and at most `most`. A block device has the size that it has.
pub(super) fn resize(
    image: &OwnedFd,
    readonly: bool,
    most: Option<u64>,
    size: u64,
) -> Result<(), ResizeError> {
    if !size.is_multiple_of(SECTOR) {
        return Err(ResizeError::Sectors(size));
    }
    let image = image
        .try_clone()
        .map(File::from)
        .map_err(ResizeError::Look)?;
    let meta = image.metadata().map_err(ResizeError::Look)?;
    if meta.file_type().is_block_device() {
        let end = lseek(&image, 0, Whence::SeekEnd)
            .map_err(|errno: Errno| ResizeError::Look(errno.into()))?;
        let now = u64::try_from(end).unwrap_or(0);
        return if size == now {
            Ok(())
        } else {
            Err(ResizeError::BlockDevice { size, now })
        };
    }
    check(readonly, most, meta.len(), size)?;
    image
        .set_len(size)
        .map_err(|source| ResizeError::Set { size, source })
}

/// Whether a disk of `now` bytes may get `size`, where the command line said `most`. A disk whose image has a format of its own is made
/// longer by its process, and the control process asks here before it has that done.
pub(crate) fn check(
    readonly: bool,
    most: Option<u64>,
    now: u64,
    size: u64,
) -> Result<(), ResizeError> {
    if !size.is_multiple_of(SECTOR) {
        return Err(ResizeError::Sectors(size));
    }
    if readonly {
        return Err(ResizeError::Readonly);
    }
    if size < now {
        return Err(ResizeError::Shorter { size, now });
    }
    match most {
        None if size > now => Err(ResizeError::NotGranted { now }),
        Some(most) if size > most && size > now => Err(ResizeError::TooLong { size, now, most }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_grows_as_far_as_it_may_and_never_shrinks() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let image = OwnedFd::from(file.try_clone().unwrap());
        let said =
            |readonly, most, size| resize(&image, readonly, most, size).map_err(|e| e.to_string());
        for (readonly, most, size, wanted) in [
            (
                false,
                Some(1 << 20),
                8193,
                "size 8193 is no multiple of 512",
            ),
            (true, Some(1 << 20), 16384, "the disk is read-only"),
            (
                false,
                None,
                16384,
                "its -drive or -blockdev has no max-size=, so the image keeps its 8192 bytes",
            ),
            (
                false,
                Some(12288),
                16384,
                "size 16384 is out of range; allowed: 8192 to 12288 (max-size= of its -drive or -blockdev)",
            ),
            (
                false,
                Some(1 << 20),
                4096,
                "size 4096 is less than the 8192 bytes of the image, whose end the guest would lose; allowed: 8192 and more",
            ),
        ] {
            assert_eq!(said(readonly, most, size), Err(wanted.to_owned()));
            assert_eq!(file.metadata().unwrap().len(), 8192);
        }
        assert_eq!(said(false, None, 8192), Ok(()));
        assert_eq!(said(false, Some(16384), 16384), Ok(()));
        assert_eq!(file.metadata().unwrap().len(), 16384);
    }
}
