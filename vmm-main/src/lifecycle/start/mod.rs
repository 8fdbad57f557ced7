//! From spec to a machine that is ready to run.
//!
//! **Job.** Ask the broker for everything at once, make VM and RAM meanwhile, put devices behind their windows, lock down,
//! start the threads.
//! **Who is not trusted**: nobody yet, except the device processes, whose first answers are checked in the handshake.
//! **Why this way.** Start-up time is the sum of what nobody overlaps. The broker starts device processes while this process
//! makes the VM; handshakes of all devices are under way at once; nothing waits until it must.

use std::os::fd::{AsFd, AsRawFd};

use ipc::log::warn;
use ipc::spec::vm::{MachineKind, VmSpec};
use seccomp_policies::Policy;

use super::daemon::Ready;
use super::event_loop::{Parts, Vm};
use super::phases::Phases;
use super::serial::Chardevs;
use super::{close_all_but, lockdown, with_causes};
use crate::affinity;
use crate::broker::Client;
use crate::cmdline::plan;
use crate::kvm::Kvm;
use crate::kvm::processor::Processor;
use crate::qmp;

mod board;
mod error;
mod given;
mod threads;

pub(super) use board::SharedTransport;
pub(super) use error::StartError;
pub(super) use given::Files;
pub(super) use threads::termination_signals;

use board::{Plugged, board, load, processor_without_guest};
use given::Given;
use threads::{Coming, serve_windows, signals, start_vcpus};

/// Brings the VM up to the point where its vCPUs wait at the gate and every thread is locked down.
pub(super) fn start(
    spec: VmSpec,
    ready: Option<Ready>,
    mut phases: Phases,
) -> Result<Vm, StartError> {
    // Before anything is opened or started.
    affinity::check(&spec)?;
    let broker = Client::spawn()?;
    let mut keep = vec![broker.as_fd().as_raw_fd()];
    keep.extend(ready.iter().flat_map(Ready::descriptors));
    close_all_but(&keep);
    let plan = plan(
        &spec,
        nix::unistd::isatty(std::io::stdin()).unwrap_or(false),
    );
    let both = (&spec, &plan);
    let mut given = Given::begin(broker, &spec, &plan)?;
    phases.done("broker started and asked");

    let kvm = match spec.machine.kind {
        MachineKind::None => None,
        MachineKind::Microvm => Some(Kvm::open()?),
    };
    // Files for RAM come from the broker; a memfd, and the board on it, are made while the broker works.
    let mut machine = match &kvm {
        Some(kvm) if given.has_memory(&plan) => Some(board(kvm, both, &mut given.files)?),
        _ => None,
    };
    // Without a guest too clients ask what one would see; without KVM as well they get the reason.
    let imagined = kvm.is_none().then(processor_without_guest);
    phases.done("VM, guest RAM and vCPUs");
    let mut incoming = match &machine {
        Some(machine) => given.snapshot(both, machine)?,
        None => None,
    };
    if incoming.is_some() {
        phases.done("snapshot read");
    }
    given.take_rest(&spec, &plan)?;
    phases.done("descriptors from the broker");
    let handshakes = given.greet(&plan)?;
    let chardevs = Chardevs::open(&spec, &plan, &mut given.files)?;
    if let Some(kvm) = kvm
        && machine.is_none()
    {
        machine = Some(board(&kvm, both, &mut given.files)?);
        phases.done("VM, guest RAM and vCPUs");
    }

    let (mut plugged, mut lazy) = (Plugged::default(), None);
    if let Some(machine) = &mut machine {
        if plan.policy.additions.devices > 0 {
            machine.offer_slots();
        }
        if let Some(sink) = chardevs.serial_sink() {
            machine.add_serial(sink)?;
        }
        plugged = Plugged::all(machine, both, &mut given, handshakes, &mut incoming)?;
        phases.done("devices serve");
        lazy = load(machine, both, &mut given.files, incoming, &mut phases)?;
    }
    let Plugged {
        transports,
        windows,
    } = plugged;
    let sources = given.monitors(&plan);

    // Not earlier: until here a signal ends this process at once, whatever it waits for, and the broker cleans up. Not
    // later: threads inherit what is blocked.
    let signals = signals()?;
    lockdown::lock(spec.sandbox)?;
    phases.done("process locked down");
    let mode = spec.seccomp;
    let (qmp, commands) = qmp::Server::spawn(
        sources,
        qmp::Info::from(&spec),
        Box::new(move || lockdown::hook(Policy::ControlQmp, mode)),
    )?;
    if let Some(machine) = &mut machine {
        start_vcpus(machine, &spec)?;
    }
    let has_windows = windows.is_some();
    if let Some(windows) = windows {
        serve_windows(windows, mode)?;
    }
    let coming = match lazy {
        Some(lazy) => Coming::serve(lazy, &transports, mode)?,
        None => Coming::default(),
    };
    qmp.started()?;
    phases.done("threads locked down");

    for option in &spec.ignored {
        warn!("{option} is accepted without effect");
    }
    let processor = match (&machine, imagined) {
        (Some(machine), _) => Ok(machine.described_processor()),
        (None, Some(imagined)) => imagined.map_err(|e| with_causes(&e)),
        (None, None) => Ok(Processor::default()),
    };
    let mut vm = Vm::new(Parts {
        spec,
        plan,
        broker: given.broker,
        machine,
        processor,
        transports,
        chardevs,
        qmp,
        commands,
        signals,
        pager: coming.progress,
        has_windows,
        sharing: coming.sharing,
    })?;
    vm.wait_for_clients()?;
    let vm = vm.announce(ready)?;
    phases.done("announced");
    phases.tell();
    Ok(vm)
}
