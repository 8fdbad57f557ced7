//! `-incoming file:PATH`: a VM that goes on from a snapshot.
//!
//! **Job.** Reads and checks the snapshot before any device's process exists, fills RAM, and gives each part of the VM its
//! state as it comes up.
//! **Who is not trusted**: whoever made or changed the snapshot; see [`crate::snapshot`].
//! **Why this way.** A start that fails leaves nothing behind, and most of what can be wrong with a snapshot is seen when
//! there is nothing yet.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ipc::limits::MAX_SNAPSHOT_STATE;
use ipc::log::{info, with_causes};
use ipc::spec::vm::{MemoryPolicy, VmSpec};
use thiserror::Error;

use crate::boot::BootSource;
use crate::cmdline::Plan;
use crate::machine::microvm::{self, MachineState, Microvm};
use crate::memory::lazy::LazyRam;
use crate::memory::pager::Pager;
use crate::memory::sharing::{Refusal, SharingRam};
use crate::snapshot::Snapshot;
use crate::snapshot::format::{self, FormatError};
use crate::snapshot::memory::{self, MemoryError};
use crate::snapshot::shape::{self, Shape, ShapeError};
use crate::virtio::remote::RemoteDevice;
use crate::virtio::snapshot::{DeviceState, Misfit};

/// Why a VM cannot go on from a snapshot.
#[derive(Debug, Error)]
pub(super) enum IncomingError {
    /// The broker gave no file.
    #[error("-incoming file:{}: its files were not opened", .0.display())]
    Files(PathBuf),
    /// The file `state` cannot be read.
    #[error("-incoming file:{}: the file state cannot be read", .path.display())]
    Read {
        /// The snapshot.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file `state` is none.
    #[error("-incoming file:{}: the file state {source}", .path.display())]
    State {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: FormatError,
    },
    /// The snapshot is of another VM.
    #[error("-incoming file:{}: the snapshot {source}", .path.display())]
    Shape {
        /// The snapshot.
        path: PathBuf,
        /// How it differs.
        source: ShapeError,
    },
    /// The file `memory` is not the right one.
    #[error("-incoming file:{}: the file memory {source}", .path.display())]
    Memory {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: MemoryError,
    },
    /// A device cannot go on.
    #[error("-incoming file:{}: {source}", .path.display())]
    Device {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: Misfit,
    },
    /// No thread for guest memory.
    #[error("-incoming file:{}: guest memory cannot be brought in", .path.display())]
    Pager {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// KVM refuses a value, or a device's state is none.
    #[error("-incoming file:{}", .path.display())]
    Machine {
        /// The snapshot.
        path: PathBuf,
        /// Which.
        source: microvm::Error,
    },
}

/// What a VM looks like to its guest.
pub(super) fn shape(spec: &VmSpec, plan: &Plan, machine: &Microvm) -> Shape {
    Shape {
        memory: spec.memory.size,
        cpus: spec.cpus,
        nodes: shape::nodes(&spec.memory),
        distances: spec.memory.distances.clone(),
        processor: machine.processor().to_vec(),
        serial: spec.serial.is_some(),
        devices: plan
            .policy
            .devices
            .iter()
            .map(|grant| (&grant.spec).into())
            .collect(),
    }
}

/// A snapshot that has been read; RAM is filled.
#[derive(Debug)]
pub(super) struct Incoming {
    path: PathBuf,
    machine: MachineState,
    devices: Vec<Option<DeviceState>>,
    lazy: Option<Pager>,
}

impl Incoming {
    /// Reads the snapshot and fills the RAM of `machine`, which has no devices yet.
    pub(super) fn read(
        spec: &VmSpec,
        plan: &Plan,
        machine: &Microvm,
        state: Option<File>,
        memory: Option<File>,
    ) -> Result<Self, IncomingError> {
        let path = spec.incoming.clone().unwrap_or_default();
        let (Some(mut state), Some(memory)) = (state, memory) else {
            return Err(IncomingError::Files(path));
        };
        let snapshot = read_state(&mut state, &path)?;
        let now = shape(spec, plan, machine);
        snapshot
            .shape
            .check(&now)
            .and_then(|()| snapshot.shape.check_processor(machine.processor()))
            .map_err(|source| IncomingError::Shape {
                path: path.clone(),
                source,
            })?;
        let ram = machine.ram();
        let told = |source| IncomingError::Memory {
            path: path.clone(),
            source,
        };
        let Snapshot {
            machine,
            devices,
            memory: index,
            ..
        } = snapshot;
        let whole = Self {
            path: path.clone(),
            machine,
            devices: devices.into_iter().map(Some).collect(),
            lazy: None,
        };
        let zones = &spec.memory.zones;
        let (memory, index) = if spec.incoming_lazy
            && zones
                .iter()
                .all(|zone| !zone.prealloc && zone.path.is_none())
        {
            index.check(ram.size()).map_err(told)?;
            memory::check_length(&memory, ram.size()).map_err(told)?;
            // The template's pages are on whatever node they are.
            let alike = zones
                .iter()
                .all(|zone| zone.policy == MemoryPolicy::Default)
                && zones
                    .windows(2)
                    .all(|two| two[0].dump_guest_core == two[1].dump_guest_core);
            let sharing = if alike {
                SharingRam::new(ram, memory, index)
            } else {
                Err((Refusal::Zones, memory, index))
            };
            let lazy = match sharing {
                Ok(sharing) => Ok(Pager::Sharing(sharing)),
                Err((why, memory, index)) => {
                    info!(
                        "lazy=on: memory is copied and not shared with other clones: {}",
                        with_causes(&why)
                    );
                    LazyRam::new(ram, memory, index).map(Pager::Copying)
                }
            };
            match lazy {
                Ok(lazy) => {
                    return Ok(Self {
                        lazy: Some(lazy),
                        ..whole
                    });
                }
                Err(back) => {
                    info!("this host has no userfaultfd for this process: lazy=on has no effect");
                    back
                }
            }
        } else {
            (memory, index)
        };
        if zones.iter().any(|zone| zone.path.is_some()) {
            // A file may hold something.
            ram.zero().map_err(|source| IncomingError::Machine {
                path: path.clone(),
                source: source.into(),
            })?;
        }
        memory::read(ram, &memory, &index).map_err(told)?;
        Ok(whole)
    }

    /// The state of device `index`, which `device` can go on from.
    pub(super) fn device(
        &mut self,
        index: usize,
        device: &RemoteDevice,
    ) -> Result<DeviceState, IncomingError> {
        let misfit = |source| IncomingError::Device {
            path: self.path.clone(),
            source,
        };
        let Some(state) = self.devices.get_mut(index).and_then(Option::take) else {
            return Err(misfit(Misfit::State {
                id: device.id().to_owned(),
            }));
        };
        match state.check(device) {
            Ok(()) => Ok(state),
            Err(source) => Err(misfit(source)),
        }
    }

    /// Gives KVM and the platform their state. What comes back brings in guest memory.
    pub(super) fn finish(
        self,
        machine: &mut Microvm,
        source: BootSource,
    ) -> Result<Option<Pager>, IncomingError> {
        let path = self.path;
        // KVM writes to guest memory when some registers are set.
        let restored = match &self.lazy {
            Some(lazy) => lazy
                .serve_during(|| machine.restore(&self.machine, source))
                .map_err(|source| IncomingError::Pager {
                    path: path.clone(),
                    source,
                })?,
            None => machine.restore(&self.machine, source),
        };
        match restored {
            Ok(()) => Ok(self.lazy),
            Err(source) => Err(IncomingError::Machine { path, source }),
        }
    }
}

fn read_state(file: &mut File, path: &Path) -> Result<Snapshot, IncomingError> {
    let failed = |source| IncomingError::Read {
        path: path.to_owned(),
        source,
    };
    let wrong = |source| IncomingError::State {
        path: path.to_owned(),
        source,
    };
    let length = file.metadata().map_err(failed)?.len();
    if length > MAX_SNAPSHOT_STATE as u64 {
        return Err(wrong(FormatError::Large(length)));
    }
    // Below the limit.
    let mut bytes = Vec::with_capacity(length as usize);
    file.take(MAX_SNAPSHOT_STATE as u64)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    format::decode(&bytes).map_err(wrong)
}
