//! What a device process needs of the host, computed from what it is: its resource limits.
//!
//! Whoever starts the process, broker or stand-alone, gives it these and no more.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::DeviceSpec;
use super::block::ImageFormat;
use crate::limits::{
    FS_INODE_MEMORY, MAX_DEVICE_MEMORY, MAX_FS_DESCRIPTORS, MAX_FS_TABLES, MAX_INFLIGHT_REGION,
    MAX_MEMORY_REGIONS, MAX_RING_MEMORY,
};

/// Limits of one device process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Open descriptors.
    pub descriptors: u64,
    /// Bytes of private memory that can be written.
    pub memory: u64,
    /// Largest offset that may be written in any file, in bytes; `None` without limit.
    pub file_size: Option<u64>,
    /// Bytes of locked memory.
    pub locked_memory: u64,
    /// Threads that the kernel makes in it and counts as its own, but for those of an io_uring.
    pub kernel_threads: u64,
}

impl DeviceSpec {
    /// What a process of this device with these back ends needs.
    ///
    /// # Errors
    /// The image cannot be looked at.
    pub fn needs(&self, backend: &[OwnedFd]) -> std::io::Result<Needs> {
        let queues = u64::from(self.num_queues());
        let is_fs = matches!(self, Self::Fs(_));
        Ok(Needs {
            // Its own, and for each queue a kick, a call and an error eventfd, with room for a second set in a message.
            descriptors: if is_fs {
                MAX_FS_DESCRIPTORS
            } else {
                64 + 6 * queues + MAX_MEMORY_REGIONS as u64
            },
            memory: if is_fs {
                MAX_DEVICE_MEMORY + MAX_FS_DESCRIPTORS * FS_INODE_MEMORY
            } else {
                MAX_DEVICE_MEMORY
            },
            file_size: self.longest_file(backend)?,
            locked_memory: match self {
                Self::Block(block) if block.io.format == ImageFormat::Raw => MAX_RING_MEMORY,
                _ => 0,
            },
            // One for each descriptor of vhost-net (Linux 6.4).
            kernel_threads: match self {
                Self::Net(net) if net.vhost => u64::from(net.queue_pairs),
                _ => 0,
            },
        })
    }

    /// How far the device may write into any file. A disk that is written keeps the size that it has, so that its process
    /// cannot fill the host's file system; a shared folder's files are the guest's, and where it has none there are tables; all
    /// others make one memfd, for their in-flight region.
    fn longest_file(&self, backend: &[OwnedFd]) -> std::io::Result<Option<u64>> {
        let image = match (self, backend) {
            // It grows as its guest writes, as far as its file system and the quota of its owner let it.
            (Self::Block(block), _)
                if !block.readonly && matches!(block.io.format, ImageFormat::Qcow2 { .. }) =>
            {
                return Ok(None);
            }
            (Self::Block(block), [image, ..]) if !block.readonly => image,
            (Self::Fs(fs), _) if !fs.readonly => return Ok(None),
            (Self::Fs(_), _) => return Ok(Some(MAX_FS_TABLES)),
            _ => return Ok(Some(MAX_INFLIGHT_REGION)),
        };
        let image = File::from(image.try_clone()?).metadata()?;
        // Others, block devices above all, have their size from elsewhere.
        Ok(image
            .is_file()
            .then(|| image.len().max(MAX_INFLIGHT_REGION)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::block::BlockSpec;

    #[test]
    fn a_disk_may_write_as_far_as_its_image_goes() {
        let spec = |readonly| {
            DeviceSpec::Block(BlockSpec {
                id: "d".into(),
                readonly,
                direct: false,
                serial: String::new(),
                num_queues: 2,
                queue_size: 256,
                io: Default::default(),
            })
        };
        let image = |bytes| {
            let fd = nix::sys::memfd::memfd_create(c"i", nix::sys::memfd::MFdFlags::empty());
            let file = File::from(fd.unwrap());
            file.set_len(bytes).unwrap();
            [OwnedFd::from(file)]
        };
        let far = |readonly, bytes| spec(readonly).needs(&image(bytes)).unwrap().file_size;
        assert_eq!(far(false, 1 << 30), Some(1 << 30));
        assert_eq!(far(false, 512), Some(MAX_INFLIGHT_REGION));
        assert_eq!(far(true, 1 << 30), Some(MAX_INFLIGHT_REGION));
    }
}
