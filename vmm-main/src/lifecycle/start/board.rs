//! The board and what is put on it.
//!
//! **Job.** Makes VM, RAM and vCPUs as the spec says, and puts devices behind their registers. **Who is not trusted.** Device processes
//! and snapshots, whose part was checked before it comes here.

use std::sync::{Arc, Mutex};

use ipc::control::DeviceGrant;
use ipc::log::info;
use ipc::spec::DeviceSpec;
use ipc::spec::vm::{MemorySpec, NumaNode, VmSpec};

use super::error::{StartError, why_boot_failed};
use super::given::{Files, Given};
use crate::boot::{BootSource, Protocol};
use crate::cmdline::Plan;
use crate::kvm::cpuid::{CpuFeatures, CpuidTemplate};
use crate::kvm::processor::Processor;
use crate::kvm::{self, Kvm, Topology};
use crate::lifecycle::event_loop::lock;
use crate::lifecycle::incoming::Incoming;
use crate::lifecycle::phases::Phases;
use crate::machine::microvm::{Microvm, MicrovmConfig};
use crate::memory::pager::Pager;
use crate::memory::{self, Backing, GuestRam, RamConfig, Zone, ZoneRange};
use crate::platform::numa::Numa;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::remote::{Handshake, RemoteDevice};
use crate::virtio::snapshot::DeviceState;
use crate::virtio::window::Windows;

/// The board with its RAM and vCPUs, before anything is plugged.
pub(super) fn board(
    kvm: &Kvm,
    (spec, plan): (&VmSpec, &Plan),
    files: &mut Files,
) -> Result<Microvm, StartError> {
    let zones = spec.memory.zones.iter().zip(&plan.memory);
    let zones = zones.map(|(zone, file)| Zone {
        size: zone.size,
        backing: file
            .and_then(|file| files.take(file))
            .map_or(Backing::Memfd, |file| match Backing::from(file) {
                // A snapshot brings other content.
                Backing::Copy(_) if spec.incoming.is_some() => Backing::Memfd,
                backing => backing,
            }),
        prealloc: zone.prealloc,
        dump_guest_core: zone.dump_guest_core,
        policy: zone.policy,
        host_nodes: zone.host_nodes,
    });
    let ram = Arc::new(GuestRam::new(RamConfig {
        zones: zones.collect(),
        huge_pages: false,
    })?);
    let config = MicrovmConfig {
        topology: topology(spec)?,
        features: CpuFeatures::default(),
        serial: None,
        numa: numa(&spec.memory),
    };
    Ok(Microvm::new(kvm, kvm::Vm::create(kvm)?, ram, config)?)
}

/// What a guest of one vCPU would see. KVM is closed again.
pub(super) fn processor_without_guest() -> Result<Processor, StartError> {
    let features = CpuFeatures::default();
    let template = CpuidTemplate::new(&Kvm::open()?, Topology::flat(1)?, features)?;
    Ok(template.processor())
}

/// What the guest is told of nodes.
fn numa(memory: &MemorySpec) -> Option<Numa> {
    let nodes = &memory.nodes;
    if nodes.is_empty() {
        return None;
    }
    let node_of = |is: &dyn Fn(&NumaNode) -> bool| {
        let node = nodes.iter().position(is).unwrap_or_default();
        u8::try_from(node).unwrap_or_default()
    };
    let vcpus = nodes.iter().flat_map(|node| node.cpus.iter()).max();
    let sizes: Vec<u64> = memory.zones.iter().map(|zone| zone.size).collect();
    let ranges = memory::zone_ranges(&sizes).into_iter();
    Some(Numa {
        nodes: nodes.len(),
        cpus: (0..=vcpus.unwrap_or_default())
            .map(|vcpu| node_of(&|node| node.cpus.contains(vcpu)))
            .collect(),
        memory: ranges
            .map(
                |ZoneRange {
                     address,
                     size,
                     zone,
                 }| {
                    let node = node_of(&|node| node.zone.is_some_and(|one| one as usize == zone));
                    (address, size, node)
                },
            )
            .collect(),
        distances: memory.distances.clone(),
    })
}

fn topology(spec: &VmSpec) -> Result<Topology, StartError> {
    let cpus = &spec.cpus;
    Ok(Topology::new(
        cpus.cpus.into(),
        cpus.sockets.into(),
        cpus.dies.into(),
        cpus.clusters.into(),
        cpus.cores.into(),
        cpus.threads.into(),
    )?)
}

/// A device behind its window, shared between vCPU threads and the main loop.
pub(in crate::lifecycle) type SharedTransport = Arc<Mutex<MmioTransport>>;

/// Devices behind their registers.
#[derive(Default)]
pub(super) struct Plugged {
    pub(super) transports: Vec<SharedTransport>,
    pub(super) windows: Option<Windows>,
}

impl Plugged {
    /// All devices, in their order. All processes are asked before any answer is waited for.
    pub(super) fn all(
        machine: &mut Microvm,
        (spec, plan): (&VmSpec, &Plan),
        given: &mut Given,
        mut handshakes: Vec<Handshake>,
        incoming: &mut Option<Incoming>,
    ) -> Result<Self, StartError> {
        let mut plugged = Self::default();
        for (index, handshake) in (0u32..).zip(&mut handshakes) {
            handshake
                .negotiate()
                .map_err(|e| given.why_failed(index, plan, e))?;
        }
        for (index, handshake) in (0u32..).zip(handshakes) {
            let device = handshake
                .finish()
                .map_err(|e| given.why_failed(index, plan, e))?;
            let state = match incoming {
                Some(incoming) => Some(incoming.device(index as usize, &device)?),
                None => None,
            };
            plugged.add(machine, (spec, plan), device, state)?;
        }
        Ok(plugged)
    }

    /// The next device, as it was when the snapshot with its `state` was made.
    fn add(
        &mut self,
        machine: &mut Microvm,
        (spec, plan): (&VmSpec, &Plan),
        device: RemoteDevice,
        state: Option<DeviceState>,
    ) -> Result<(), StartError> {
        let index = self.transports.len();
        let most = spec
            .devices
            .get(index)
            .map_or(0, |device| device.restart.most);
        let grant = plan.policy.devices.get(index);
        if most > 0 && grant.is_some_and(DeviceGrant::is_foreign) {
            device.check_account()?;
        }
        let mut transport = MmioTransport::new(device, machine.ram().memory().clone())?;
        if let Some(DeviceSpec::Fs(folder)) = grant.map(|grant| &grant.spec)
            && folder.window != 0
        {
            let windows = match &mut self.windows {
                Some(windows) => windows,
                none => none.insert(Windows::new()?),
            };
            transport.set_window(machine.add_window(windows, &folder.id, folder.window)?)?;
        }
        let transport = attach(machine, index, transport)?;
        if let Some(state) = state {
            lock(&transport).restore(state)?;
        }
        self.transports.push(transport);
        Ok(())
    }
}

fn attach(
    machine: &mut Microvm,
    slot: usize,
    transport: MmioTransport,
) -> Result<SharedTransport, StartError> {
    let transport = Arc::new(Mutex::new(transport));
    let window = machine.attach_mmio(slot, transport.clone())?;
    let guard = transport
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    for (offset, value, kick) in guard.ioeventfds() {
        machine
            .vm()
            .register_ioeventfd(kick, window.base + offset, Some(value))?;
    }
    for call in guard.irqfds() {
        machine.vm().register_irqfd(call, window.gsi)?;
    }
    drop(guard);
    Ok(transport)
}

/// Puts the kernel into guest RAM, or what the snapshot has: a pager if that is to come later.
pub(super) fn load(
    machine: &mut Microvm,
    (spec, plan): (&VmSpec, &Plan),
    files: &mut Files,
    incoming: Option<Incoming>,
    phases: &mut Phases,
) -> Result<Option<Pager>, StartError> {
    let Some(kernel) = plan.kernel.and_then(|file| files.take(file)) else {
        return Ok(None);
    };
    let source = BootSource {
        kernel,
        initrd: plan.initrd.and_then(|file| files.take(file)),
        cmdline: spec.boot.cmdline.clone(),
        protocol: Protocol::Auto,
    };
    if let Some(incoming) = incoming {
        let lazy = incoming.finish(machine, source)?;
        phases.done("machine restored");
        return Ok(lazy);
    }
    let loaded = machine
        .load(source)
        .map_err(|e| why_boot_failed(&spec.boot, e))?;
    info!(
        "kernel loaded: {:?}, ends at {:#x}, initrd {:x?}",
        loaded.format, loaded.kernel_end, loaded.initrd
    );
    phases.done("kernel loaded");
    Ok(None)
}
