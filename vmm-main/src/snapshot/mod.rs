//! Snapshots: a VM as two files.
//!
//! **Job.** The file `state`: what it holds ([`Snapshot`]), how it is written and read ([`format`]), and whether it fits
//! the VM that is to go on from it ([`shape`]). The file `memory`: guest RAM at its own offsets, with holes where it is
//! zero ([`memory`]); its checksums are part of `state`.
//!
//! **Who is not trusted.** Whoever made or changed the files, by accident or not. Every length is held against a limit before
//! anything is allocated for it, all bytes are under a checksum, and the values inside are those that a guest could have
//! brought about, or are refused by whoever takes them. A checksum is no signature: who can write a snapshot owns the
//! guest that goes on from it, as who can write its disk does, and nothing more.
//!
//! **Why this way.** `memory` can be mapped or read at any place without looking at the rest, so nothing of it has to be
//! read before the guest runs. No path is part of a snapshot: files of devices are the command line's.
//!
//! | file | job |
//! |---|---|
//! | `format.rs` | the envelope of `state`: magic number, version, length, checksums |
//! | `shape.rs` | what VM a snapshot is of |
//! | `memory.rs` | guest RAM to and from the file `memory` |
//! | `elf_core.rs` | guest RAM and registers as an ELF core file, which nothing goes on from |

pub mod elf_core;
pub mod format;
pub mod memory;
pub mod shape;

use serde::{Deserialize, Serialize};

use crate::machine::microvm::MachineState;
use crate::virtio::snapshot::DeviceState;
use memory::Index;
use shape::Shape;

#[cfg(any(test, fuzzing))]
impl Snapshot {
    /// Of a guest with 128 MiB, one vCPU and a disk.
    pub fn example() -> Self {
        use crate::virtio::core::CoreState;
        use crate::virtio::remote::QueueState;
        let queue = QueueState {
            max_size: 256,
            size: 256,
            ready: true,
            desc: 0x1000,
            driver: 0x2000,
            device: 0x3000,
        };
        let core = CoreState {
            status: 15,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: [0, 1, 0, 0],
            queue_select: 0,
            config_generation: 3,
            config_changed: false,
            queues: vec![queue],
        };
        Self {
            shape: Shape {
                memory: 128 << 20,
                cpus: ipc::spec::vm::CpuSpec::default(),
                nodes: Vec::new(),
                distances: Vec::new(),
                processor: vec![crate::kvm::cpuid::CpuidLeaf([0, 0, 13, 1, 2, 3])],
                serial: false,
                devices: vec![shape::DeviceShape {
                    kind: 2,
                    queues: 1,
                    queue_size: 256,
                    window: 0,
                }],
            },
            machine: MachineState::example(),
            devices: vec![DeviceState {
                core,
                bases: vec![7],
                config: vec![0; 256],
                inflight: Some(vec![0; 64]),
                held: None,
            }],
            memory: Index {
                block: ipc::limits::SNAPSHOT_BLOCK,
                sums: vec![None, Some(1)],
            },
        }
    }
}

/// Everything but the contents of guest RAM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// What VM it is of.
    pub shape: Shape,
    /// KVM and the platform.
    pub machine: MachineState,
    /// Virtio devices, in the order of [`Shape::devices`].
    pub devices: Vec<DeviceState>,
    /// What is in the file `memory`.
    pub memory: Index,
}
