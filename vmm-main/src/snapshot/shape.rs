//! What VM a snapshot is of.
//!
//! **Job.** The part of a command line, and of the host, that a guest has seen and that has to be the same where it goes on;
//! each difference with the option that makes it.
//! **Who is not trusted**: whoever made the snapshot; it is only compared.
//! **Why this way.** Names, paths and everything that only the host sees are not part of it: a clone has its own disk and
//! tap.

use ipc::spec::DeviceSpec;
use ipc::spec::cpus::CpuList;
use ipc::spec::vm::{CpuSpec, MemorySpec};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::kvm::cpuid::CpuidLeaf;

/// What a guest has seen of its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes of RAM.
    pub memory: u64,
    /// `-smp`
    pub cpus: CpuSpec,
    /// `-numa node`, by their numbers.
    pub nodes: Vec<NodeShape>,
    /// `-numa dist`
    pub distances: Vec<u8>,
    /// The boot processor's CPUID.
    pub processor: Vec<CpuidLeaf>,
    /// There is a serial port.
    pub serial: bool,
    /// What is behind each window.
    pub devices: Vec<DeviceShape>,
}

/// What a guest has seen of a memory node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeShape {
    /// Its vCPUs.
    pub cpus: CpuList,
    /// Bytes of its memory.
    pub memory: u64,
}

/// What a guest has seen of the nodes of its memory.
#[must_use]
pub fn nodes(memory: &MemorySpec) -> Vec<NodeShape> {
    let size = |zone: u32| memory.zones.get(zone as usize).map(|zone| zone.size);
    let nodes = memory.nodes.iter().map(|node| NodeShape {
        cpus: node.cpus,
        memory: node.zone.and_then(size).unwrap_or_default(),
    });
    nodes.collect()
}

/// What a guest has seen of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceShape {
    /// Virtio device ID.
    pub kind: u32,
    /// Queues.
    pub queues: u16,
    /// Entries of each at most.
    pub queue_size: u16,
    /// Bytes of its window in guest memory; 0 for none.
    pub window: u64,
}

impl From<&DeviceSpec> for DeviceShape {
    fn from(spec: &DeviceSpec) -> Self {
        Self {
            kind: spec.virtio_id(),
            queues: spec.num_queues(),
            queue_size: spec.queue_size(),
            window: match spec {
                DeviceSpec::Fs(folder) => folder.window,
                _ => 0,
            },
        }
    }
}

impl std::fmt::Display for DeviceShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Virtio 1.3, section 5.
        match self.kind {
            1 => f.write_str("a network card")?,
            2 => f.write_str("a disk")?,
            26 => f.write_str("a shared folder")?,
            kind => write!(f, "a device of kind {kind}")?,
        }
        write!(
            f,
            " with {} queues of {} entries",
            self.queues, self.queue_size
        )?;
        match self.window {
            0 => Ok(()),
            bytes => write!(f, " and a window of {bytes} bytes (cache-size=)"),
        }
    }
}

/// The first difference between a snapshot and the VM that should go on from it.
#[derive(Debug, Error)]
pub enum ShapeError {
    /// `-m`
    #[error("has a guest of {saved} bytes of memory; -m gives {now}")]
    Memory {
        /// In the snapshot.
        saved: u64,
        /// On the command line.
        now: u64,
    },
    /// `-smp`
    #[error("has other processors than -smp gives: {saved:?}")]
    Cpus {
        /// In the snapshot.
        saved: CpuSpec,
    },
    /// `-numa`
    #[error(
        "has a guest with {saved} memory nodes; -numa gives {now}, or other vCPUs, memory or distances of them"
    )]
    Nodes {
        /// In the snapshot.
        saved: usize,
        /// On the command line.
        now: usize,
    },
    /// `-serial`
    #[error("has {}", if *.saved { "a serial port; the command line has no -serial" } else { "no serial port; the command line has -serial" })]
    Serial {
        /// Whether there was one.
        saved: bool,
    },
    /// `-device`
    #[error("has {saved} devices; the command line has {now} (-device)")]
    Devices {
        /// In the snapshot.
        saved: usize,
        /// On the command line.
        now: usize,
    },
    /// A `-device`
    #[error(
        "has {saved} as device {at}, counted from 0; the command line has {now} there (-device)"
    )]
    Device {
        /// Its place.
        at: usize,
        /// In the snapshot.
        saved: DeviceShape,
        /// On the command line.
        now: DeviceShape,
    },
    /// The host.
    #[error(
        "was made on a host with another processor or another KVM: CPUID leaf {leaf:#x}, index {index:#x} differs"
    )]
    Processor {
        /// Function.
        leaf: u32,
        /// Index.
        index: u32,
    },
}

impl Shape {
    /// Whether a VM of shape `now` can go on from this. Processors are compared by [`Shape::check_processor`].
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, now: &Self) -> Result<(), ShapeError> {
        if self.memory != now.memory {
            return Err(ShapeError::Memory {
                saved: self.memory,
                now: now.memory,
            });
        }
        if self.cpus != now.cpus {
            return Err(ShapeError::Cpus { saved: self.cpus });
        }
        if self.nodes != now.nodes || self.distances != now.distances {
            return Err(ShapeError::Nodes {
                saved: self.nodes.len(),
                now: now.nodes.len(),
            });
        }
        if self.serial != now.serial {
            return Err(ShapeError::Serial { saved: self.serial });
        }
        if self.devices.len() != now.devices.len() {
            return Err(ShapeError::Devices {
                saved: self.devices.len(),
                now: now.devices.len(),
            });
        }
        let differs = self
            .devices
            .iter()
            .zip(&now.devices)
            .position(|(saved, now)| saved != now);
        match differs {
            None => Ok(()),
            Some(at) => Err(ShapeError::Device {
                at,
                saved: self.devices[at].clone(),
                now: now.devices[at].clone(),
            }),
        }
    }

    /// Whether the boot processor is the same.
    ///
    /// # Errors
    /// The first leaf that differs.
    pub fn check_processor(&self, now: &[CpuidLeaf]) -> Result<(), ShapeError> {
        let longest = self.processor.len().max(now.len());
        for at in 0..longest {
            let (saved, now) = (self.processor.get(at), now.get(at));
            if saved != now {
                let CpuidLeaf([leaf, index, ..]) = *saved.or(now).unwrap_or(&CpuidLeaf([0; 6]));
                return Err(ShapeError::Processor { leaf, index });
            }
        }
        Ok(())
    }
}
