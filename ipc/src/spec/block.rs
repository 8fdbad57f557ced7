//! A disk as its device process sees it: no path, only properties; the image is descriptor 5.

use serde::{Deserialize, Serialize};

/// What the `block` process is told. Its only back-end descriptor is the image, opened by the broker: read-only if
/// `readonly`, with `O_DIRECT` if `direct`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// Device id, for logs.
    pub id: String,
    /// The guest may not write, and the descriptor cannot.
    pub readonly: bool,
    /// The image is open with `O_DIRECT`: buffers and offsets must be aligned.
    pub direct: bool,
    /// Answer to `VIRTIO_BLK_T_GET_ID`: at most 20 bytes.
    pub serial: String,
    /// Request queues: 1 to 32.
    pub num_queues: u16,
    /// Entries of a queue: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// How requests become I/O.
    pub io: BlockIo,
}

/// How requests become I/O on the image. The default is what a `-drive` without these properties has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockIo {
    /// Who waits for the host's file system.
    pub aio: Aio,
    /// A discard of the guest frees the space of its range.
    pub discard: bool,
    /// What becomes of a write of nothing but zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Requests a second on average, over all queues; 0 for no limit.
    pub iops_total: u32,
    /// Microseconds at most that the process looks for more work before it sleeps: 0 to 200.
    pub poll_us: u32,
    /// What becomes of a write, flush or discard that the host's file system fails.
    pub werror: OnError,
    /// What becomes of a read that it fails.
    pub rerror: OnError,
    /// What the image is.
    pub format: ImageFormat,
}

/// `format=`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ImageFormat {
    /// Byte N of the file is byte N of the disk.
    #[default]
    Raw,
    /// qcow2.
    Qcow2 {
        /// Images below it, which are only read and whose descriptors follow the image's: at most
        /// [`MAX_BACKING_IMAGES`](crate::limits::MAX_BACKING_IMAGES).
        below: u8,
        /// The lowest of them is raw; all others are qcow2.
        raw_base: bool,
        /// Bytes that the control process may have the disk made long; 0: it keeps the size that it has.
        most: u64,
    },
}

impl ImageFormat {
    /// Descriptors of a disk in this format.
    pub const fn images(self) -> usize {
        match self {
            Self::Raw => 1,
            Self::Qcow2 { below, .. } => 1 + below as usize,
        }
    }
}

/// `werror=`, `rerror=`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnError {
    /// The guest is told.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The guest stops, and the request is tried again when it goes on.
    Stop,
    /// The same if the host has no space left; otherwise the guest is told.
    Enospc,
}

impl OnError {
    /// Its word on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        }
    }

    /// Whether this failure stops the guest.
    pub const fn stops(self, no_space: bool) -> bool {
        match self {
            Self::Stop => true,
            Self::Enospc => no_space,
            Self::Report | Self::Ignore => false,
        }
    }
}

/// Why a disk's process has ended so that the guest stops. The request that failed is still in flight, for the process that
/// follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoStop {
    /// It was a write, flush or discard; otherwise a read.
    pub write: bool,
    /// The host has no space left.
    pub no_space: bool,
}

impl IoStop {
    /// The exit status by which the process says so: 80 to 83. Nothing else that a device process does ends with these.
    pub const fn status(self) -> u8 {
        80 + self.write as u8 + 2 * self.no_space as u8
    }

    /// What a process with this exit status said.
    pub const fn from_status(status: i32) -> Option<Self> {
        match status {
            80..=83 => Some(Self {
                write: status & 1 != 0,
                no_space: status & 2 != 0,
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_what_it_was_made_of() {
        for (write, no_space) in [(false, false), (true, false), (false, true), (true, true)] {
            let stop = IoStop { write, no_space };
            assert_eq!(IoStop::from_status(stop.status().into()), Some(stop));
        }
        for other in [0, 1, 2, 79, 84, -1] {
            assert_eq!(IoStop::from_status(other), None);
        }
    }
}

/// `aio=`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Aio {
    /// One request after the other, by the device process itself.
    Off,
    /// Several at once, if the host can do that.
    Native,
    /// Several at once by io_uring; a host without it is an error.
    IoUring,
}

/// `detect-zeroes=`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DetectZeroes {
    /// It is a write.
    Off,
    /// The range is marked as zeroes, its space stays reserved.
    On,
    /// The range's space is freed, if discards do that too.
    Unmap,
}

impl Default for BlockIo {
    fn default() -> Self {
        Self {
            aio: Aio::Native,
            discard: false,
            detect_zeroes: DetectZeroes::Off,
            iops_total: 0,
            poll_us: crate::limits::DEFAULT_POLL_US,
            werror: OnError::Report,
            rerror: OnError::Report,
            format: ImageFormat::Raw,
        }
    }
}
