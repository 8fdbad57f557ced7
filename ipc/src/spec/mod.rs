//! Plain-data specs: what the user asked for ([`vm`]) and what one device process is told ([`block`], [`net`], …).
//!
//! No file, no lock, no descriptor lives in a spec. The command line turns text into [`vm::VmSpec`] without any I/O;
//! building from a spec is somebody else's second step.

use serde::{Deserialize, Serialize};

use crate::limits;

pub mod block;
pub mod cpus;
pub mod fs;
pub mod ids;
pub mod needs;
pub mod net;
pub mod template;
pub mod vm;

/// What one device process is told to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum DeviceSpec {
    /// A disk.
    Block(block::BlockSpec),
    /// A network card.
    Net(net::NetSpec),
    /// A shared folder.
    Fs(fs::FsSpec),
    /// The template device, which tests of the harness use.
    Template(template::TemplateSpec),
}

impl DeviceSpec {
    /// The device's id on the command line, or the one made for it.
    pub fn id(&self) -> &str {
        match self {
            Self::Block(spec) => &spec.id,
            Self::Net(spec) => &spec.id,
            Self::Fs(spec) => &spec.id,
            Self::Template(spec) => &spec.id,
        }
    }

    /// Whether every value is in its range, for who gets a spec from somebody that is not trusted. The error names the value
    /// and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let id = self.id();
        if id.is_empty() || id.len() > limits::MAX_ID || id.chars().any(char::is_control) {
            return Err(format!(
                "id {id:?} is not valid; allowed: 1 to {} printable bytes",
                limits::MAX_ID
            ));
        }
        let within = |what: &str, value: u16, min: u16, max: u16| {
            (min..=max)
                .contains(&value)
                .then_some(())
                .ok_or_else(|| format!("{what} {value} is out of range; allowed: {min} to {max}"))
        };
        let size = |min: u16, max: u16| {
            within("queue-size", self.queue_size(), min, max)?;
            if self.queue_size().is_power_of_two() {
                Ok(())
            } else {
                Err(format!(
                    "queue-size {} is not a power of two",
                    self.queue_size()
                ))
            }
        };
        match self {
            Self::Block(spec) => {
                if spec.serial.len() > limits::BLOCK_ID_BYTES {
                    return Err(format!(
                        "serial has {} bytes; allowed: 0 to {}",
                        spec.serial.len(),
                        limits::BLOCK_ID_BYTES
                    ));
                }
                if spec.io.poll_us > limits::MAX_POLL_US || spec.io.iops_total > limits::MAX_IOPS {
                    return Err("poll-us or throttling.iops-total is out of range".into());
                }
                if spec.io.format.images() > 1 + limits::MAX_BACKING_IMAGES {
                    return Err("more images below a qcow2 image than allowed".into());
                }
                within("num-queues", spec.num_queues, 1, limits::MAX_BLOCK_QUEUES)?;
                size(4, limits::MAX_DISK_QUEUE_SIZE)
            }
            Self::Net(spec) => {
                if spec.poll_us > limits::MAX_POLL_US {
                    return Err(format!(
                        "poll-us {} is out of range; allowed: 0 to {}",
                        spec.poll_us,
                        limits::MAX_POLL_US
                    ));
                }
                within("queues", spec.queue_pairs, 1, limits::MAX_NET_QUEUE_PAIRS)?;
                size(256, limits::MAX_QUEUE_SIZE)
            }
            Self::Fs(spec) => {
                if spec.tag.is_empty() || spec.tag.len() > limits::MAX_FS_TAG {
                    return Err(format!(
                        "tag has {} bytes; allowed: 1 to {}",
                        spec.tag.len(),
                        limits::MAX_FS_TAG
                    ));
                }
                within(
                    "num-request-queues",
                    spec.request_queues,
                    1,
                    limits::MAX_FS_REQUEST_QUEUES,
                )?;
                if spec.window > limits::MAX_DAX_WINDOW
                    || !spec.window.is_multiple_of(limits::DAX_UNIT)
                {
                    return Err(format!(
                        "cache-size is {}; allowed: multiples of {}, up to {}",
                        spec.window,
                        limits::DAX_UNIT,
                        limits::MAX_DAX_WINDOW
                    ));
                }
                size(limits::MIN_FS_QUEUE_SIZE, limits::MAX_FS_QUEUE_SIZE)
            }
            Self::Template(_) => Ok(()),
        }
    }

    /// Name of the binary that serves this device.
    pub const fn binary(&self) -> &'static str {
        match self {
            Self::Block(spec) => match spec.io.format {
                block::ImageFormat::Raw => "block",
                block::ImageFormat::Qcow2 { .. } => "block-qcow2",
            },
            Self::Net(_) => "net",
            Self::Fs(_) => "vhost_user_fs",
            Self::Template(_) => "template",
        }
    }

    /// Name of the process, as `ps` shows it and as it logs.
    pub const fn process(&self) -> &'static str {
        match self {
            Self::Fs(_) => "fs",
            _ => self.binary(),
        }
    }

    /// Virtio device ID (virtio 1.3, section 5).
    pub const fn virtio_id(&self) -> u32 {
        match self {
            Self::Net(_) => 1,
            Self::Block(_) => 2,
            Self::Fs(_) => 26,
            // 5.22 names no device 42: nothing in a guest binds to the template.
            Self::Template(_) => 42,
        }
    }

    /// Virtqueues that the device has at most.
    pub const fn num_queues(&self) -> u16 {
        match self {
            Self::Block(spec) => spec.num_queues,
            Self::Net(spec) => spec.num_queues(),
            Self::Fs(spec) => spec.num_queues(),
            Self::Template(_) => 1,
        }
    }

    /// Entries of each virtqueue at most.
    pub const fn queue_size(&self) -> u16 {
        match self {
            Self::Block(spec) => spec.queue_size,
            Self::Net(spec) => spec.queue_size,
            Self::Fs(spec) => spec.queue_size,
            Self::Template(_) => crate::limits::DEFAULT_QUEUE_SIZE,
        }
    }
}
