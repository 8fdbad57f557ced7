//! From spec to a machine that is ready to run.
//!
//! **Job.** Ask the broker for everything at once, make VM and RAM meanwhile, put devices behind their windows, lock down,
//! start the threads.
//! **Who is not trusted**: nobody yet, except the device processes, whose first answers are checked in the handshake.
//! **Why this way.** Start-up time is the sum of what nobody overlaps. The broker starts device processes while this process
//! makes the VM; handshakes of all devices are under way at once; nothing waits until it must.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use ipc::channel::ChannelError;
use ipc::control::{DeviceGrant, Exit, FileGrant, Request};
use ipc::log::{info, warn};
use ipc::spec::DeviceSpec;
use ipc::spec::vm::{BootSpec, MachineKind, MemorySpec, NumaNode, VmSpec};
use ipc::start::SeccompMode;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use seccomp_policies::Policy;
use thiserror::Error;

use super::daemon::{DaemonError, Ready};
use super::event_loop::{Parts, Vm, lock};
use super::incoming::Incoming;
use super::phases::Phases;
use super::serial::Chardevs;
use super::{close_all_but, lockdown, with_causes};
use crate::affinity::{self, AffinityError};
use crate::boot::{BootSource, Protocol};
use crate::broker::{Client, ClientError};
use crate::cmdline::{Plan, plan};
use crate::kvm::cpuid::{CpuFeatures, CpuidTemplate};
use crate::kvm::processor::Processor;
use crate::kvm::{self, Kvm, Topology};
use crate::machine::microvm::{self, Microvm, MicrovmConfig};
use crate::memory::pager::{Pager, Progress};
use crate::memory::sharing::Orders;
use crate::memory::{self, Backing, GuestRam, RamConfig, Zone, ZoneRange};
use crate::platform::numa::Numa;
use crate::qmp;
use crate::virtio::core::CoreError;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::remote::{Handshake, RemoteDevice, RemoteError};
use crate::virtio::snapshot::DeviceState;
use crate::virtio::window::{WindowError, Windows};

/// Why there is no VM.
#[derive(Debug, Error)]
pub(super) enum StartError {
    /// The broker refused something, or could not be started.
    #[error(transparent)]
    Broker(#[from] ClientError),
    /// A device process ended before it served.
    #[error("device {id}: its process ended {how}{}{last_words}", if last_words.is_empty() { "" } else { ": " })]
    DeviceEnded {
        /// The device.
        id: String,
        /// How it ended.
        how: String,
        /// Its last log line.
        last_words: String,
    },
    /// A device process does not speak vhost-user as it should.
    #[error(transparent)]
    Device(#[from] RemoteError),
    /// A device cannot be put behind its registers.
    #[error(transparent)]
    Transport(#[from] CoreError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The topology.
    #[error("-smp: {0}")]
    Topology(#[from] kvm::topology::Error),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The snapshot to go on from.
    #[error(transparent)]
    Incoming(#[from] super::incoming::IncomingError),
    /// The board.
    #[error(transparent)]
    Machine(#[from] microvm::Error),
    /// Kernel, initrd or command line cannot be used.
    #[error("{option} {value}")]
    Boot {
        /// The option at fault.
        option: &'static str,
        /// Its value.
        value: String,
        /// Why.
        source: microvm::Error,
    },
    /// QMP.
    #[error(transparent)]
    Qmp(#[from] qmp::ServerError),
    /// The serial port's other end.
    #[error(transparent)]
    Chardev(#[from] crate::chardev::ChardevError),
    /// An inherited socket is not what the command line says.
    #[error("{option} fd={fd}: {what}")]
    Inherited {
        /// The option.
        option: String,
        /// Its descriptor.
        fd: i32,
        /// What is wrong.
        what: &'static str,
    },
    /// Processors that were asked for.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// A shared folder's window.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// Lock-down.
    #[error(transparent)]
    Lock(#[from] ozone::SelfLockError),
    /// A seccomp filter.
    #[error("system call filter of a thread")]
    Filter(#[from] seccomp_policies::Error),
    /// `-daemonize`.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// Signals, or the epoll of the main loop.
    #[error("{call} failed")]
    System {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

fn failed(call: &'static str) -> impl FnOnce(Errno) -> StartError {
    move |source| StartError::System { call, source }
}

/// The error with the option that it is about.
fn why_boot_failed(boot: &BootSpec, source: microvm::Error) -> StartError {
    use crate::boot::Error;
    let path = |path: &Option<PathBuf>| {
        path.as_ref()
            .map_or_else(String::new, |path| path.display().to_string())
    };
    let (option, value) = match &source {
        microvm::Error::Boot(
            Error::ReadInitrd(_) | Error::EmptyInitrd | Error::InitrdRange { .. },
        ) => ("-initrd", path(&boot.initrd)),
        microvm::Error::Boot(Error::CommandLine { .. } | Error::CommandLineNul(_)) => {
            ("-append", boot.cmdline.clone())
        }
        microvm::Error::Boot(Error::Write { .. }) => return source.into(),
        microvm::Error::Boot(_) => ("-kernel", path(&boot.kernel)),
        _ => return source.into(),
    };
    StartError::Boot {
        option,
        value,
        source,
    }
}

/// Brings the VM up to the point where its vCPUs wait at the gate and every thread is locked down.
pub(super) fn start(
    spec: VmSpec,
    ready: Option<Ready>,
    mut phases: Phases,
) -> Result<Vm, StartError> {
    // Before anything is opened or started.
    affinity::check(&spec)?;
    let mut broker = Client::spawn()?;
    let mut keep = vec![broker.as_fd().as_raw_fd()];
    keep.extend(ready.iter().flat_map(Ready::descriptors));
    close_all_but(&keep);
    let plan = plan(
        &spec,
        nix::unistd::isatty(std::io::stdin()).unwrap_or(false),
    );
    let (mut given, first) = Given::begin(&mut broker, &spec, &plan)?;
    phases.done("broker started and asked");

    let kvm = match spec.machine.kind {
        MachineKind::None => None,
        MachineKind::Microvm => Some(Kvm::open()?),
    };
    // Files for RAM come from the broker; a memfd, and the board on it, are made while the broker works.
    let without_files = plan.memory.iter().all(Option::is_none);
    let mut early = match &kvm {
        Some(kvm) if without_files || !first.is_empty() => {
            Some(board(kvm, &spec, &plan, &mut given.files)?)
        }
        _ => None,
    };
    // Without a guest too clients ask what one would see; without KVM as well they get the reason.
    let imagined = kvm.is_none().then(processor_without_guest);
    phases.done("VM, guest RAM and vCPUs");
    let mut incoming = match (plan.incoming, &early) {
        (Some([state, memory]), Some(machine)) => {
            let (state, memory) = (given.files.take(state), given.files.take(memory));
            let incoming = Incoming::read(&spec, &plan, machine, state, memory)?;
            phases.done("snapshot read");
            Some(incoming)
        }
        _ => None,
    };
    if first.is_empty() {
        given.take_policy(&mut broker, &spec)?;
    } else {
        ask(&broker, rest(&plan, &first))?;
    }
    given.take_devices(&mut broker, &plan)?;
    let others: Vec<u32> = (0..plan.policy.files.len() as u32)
        .filter(|index| !first.contains(index))
        .collect();
    given.take_files(&mut broker, &plan, &others)?;
    phases.done("descriptors from the broker");
    let mut handshakes = Vec::with_capacity(given.devices.len());
    for (index, (device, grant)) in (0u32..).zip(given.devices.drain(..).zip(&plan.policy.devices))
    {
        let socket = UnixStream::from(device.socket);
        handshakes.push(
            Handshake::begin_for(socket, grant)
                .map_err(|e| why_device_failed(&mut broker, index, &plan.policy.devices, e))?,
        );
    }

    let chardevs = Chardevs::open(&spec, &plan, &mut given.files)?;
    let mut machine = match (early.take(), kvm) {
        (Some(machine), _) => Some(machine),
        (None, Some(kvm)) => {
            let machine = board(&kvm, &spec, &plan, &mut given.files)?;
            phases.done("VM, guest RAM and vCPUs");
            Some(machine)
        }
        (None, None) => None,
    };
    if let Some(machine) = &mut machine
        && plan.policy.additions.devices > 0
    {
        machine.offer_slots();
    }
    if let (Some(machine), Some(sink)) = (&mut machine, chardevs.serial_sink()) {
        machine.add_serial(sink)?;
    }

    let mut plugged = Plugged::default();
    let mut lazy = None;
    if let Some(machine) = &mut machine {
        for (index, handshake) in (0u32..).zip(&mut handshakes) {
            handshake
                .negotiate()
                .map_err(|e| why_device_failed(&mut broker, index, &plan.policy.devices, e))?;
        }
        for (index, handshake) in (0u32..).zip(handshakes) {
            let device = handshake
                .finish()
                .map_err(|e| why_device_failed(&mut broker, index, &plan.policy.devices, e))?;
            let state = match &mut incoming {
                Some(incoming) => Some(incoming.device(index as usize, &device)?),
                None => None,
            };
            plugged.add(machine, (&spec, &plan), device, state)?;
        }
        phases.done("devices serve");
        lazy = load(
            machine,
            (&spec, &plan),
            &mut given.files,
            incoming,
            &mut phases,
        )?;
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
    let processor = match (&machine, imagined) {
        (Some(machine), _) => Ok(machine.described_processor()),
        (None, Some(imagined)) => imagined.map_err(|e| with_causes(&e)),
        (None, None) => Ok(Processor::default()),
    };
    let has_windows = windows.is_some();
    if let Some(windows) = windows {
        serve_windows(windows, mode)?;
    }
    let sharing = lazy.as_ref().and_then(Pager::orders);
    let mut pager = lazy.map(|lazy| pager(lazy, mode)).transpose()?.flatten();
    if let Some(sharing) = &sharing {
        pager = share(&transports, sharing).or(pager);
    }
    qmp.started()?;
    phases.done("threads locked down");

    for option in &spec.ignored {
        warn!("{option} is accepted without effect");
    }
    let mut vm = Vm::new(Parts {
        spec,
        plan,
        broker,
        machine,
        processor,
        transports,
        chardevs,
        qmp,
        commands,
        signals,
        pager,
        has_windows,
        sharing,
    })?;
    vm.wait_for_clients()?;
    let vm = vm.announce(ready)?;
    phases.done("announced");
    phases.tell();
    Ok(vm)
}

/// Devices behind their registers.
#[derive(Default)]
struct Plugged {
    transports: Vec<SharedTransport>,
    windows: Option<Windows>,
}

impl Plugged {
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

/// Puts the kernel into guest RAM, or what the snapshot has: a pager if that is to come later.
fn load(
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

/// Starts the threads of vCPUs, each on its processors and behind its filter.
fn start_vcpus(machine: &mut Microvm, spec: &VmSpec) -> Result<(), StartError> {
    let mode = spec.seccomp;
    let pinned: Vec<_> = (0..u32::from(spec.cpus.maxcpus))
        .map(|vcpu| spec.vcpu_cpus(vcpu))
        .collect();
    machine.start(
        &(Arc::new(move |vcpu: u32| {
            if let Some(Some(cpus)) = pinned.get(vcpu as usize) {
                affinity::enter(cpus)?;
            }
            lockdown::hook(Policy::ControlVcpu, mode)
        }) as kvm::run::ThreadStart),
    )?;
    // Ids are asked for now: each thread says its own once it has its filter.
    machine.vcpu_thread_ids()?;
    Ok(())
}

/// Has devices work in memory that is partly a template's; if one cannot, how far all of it is on its way in.
fn share(transports: &[SharedTransport], sharing: &Arc<Orders>) -> Option<Arc<Progress>> {
    let mut watched = true;
    for transport in transports {
        let mut transport = lock(transport);
        watched &= transport.core().device().can_share();
        transport.share(sharing.clone());
    }
    if watched {
        return None;
    }
    // They map the memory file, which has nothing of what is the template's.
    info!("a device's process cannot be watched: memory is copied for all");
    Some(sharing.bring_in())
}

/// Starts the thread that answers for guest memory; returns when it has its filter.
fn pager(lazy: Pager, mode: SeccompMode) -> Result<Option<Arc<Progress>>, StartError> {
    let progress = lazy.progress();
    filtered("pager", Policy::ControlPager, mode, move || lazy.serve())?;
    Ok(progress)
}

/// Starts the thread that maps files of shared folders for the guest; returns when it has its filter.
fn serve_windows(windows: Windows, mode: SeccompMode) -> Result<(), StartError> {
    windows.hand_over();
    filtered("window", Policy::ControlWindow, mode, move || {
        windows.serve()
    })
}

/// Starts a thread that does `work` under `policy`, and returns when it has its filter.
fn filtered(
    name: &str,
    policy: Policy,
    mode: SeccompMode,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), StartError> {
    let (told, started) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let filtered = lockdown::filter(policy, mode);
            let goes = filtered.is_ok();
            let _ = told.send(filtered);
            drop(told);
            if goes {
                work();
            }
            // A thread's end takes calls that its filter would have to allow for nothing but that.
            loop {
                std::thread::park();
            }
        })
        .map_err(|e| StartError::System {
            call: "clone3",
            source: e.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw),
        })?;
    // It sends before anything can end it.
    if let Ok(filtered) = started.recv() {
        filtered?;
    }
    Ok(())
}

/// What ends the VM in good order.
pub(super) fn termination_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect()
}

/// Termination signals become events of the main loop.
fn signals() -> Result<SignalFd, StartError> {
    let set = termination_signals();
    set.thread_block().map_err(failed("sigprocmask"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(failed("signalfd"))
}

/// Sends requests; [`Given`] takes the replies in the same order.
fn ask(broker: &Client, requests: impl Iterator<Item = Request>) -> Result<(), StartError> {
    for request in requests {
        match broker.send(&request) {
            Ok(()) => {}
            // A broker that has left said why, which the next reply tells.
            Err(ClientError::Channel(ChannelError::Closed)) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// A device process that was started.
#[derive(Debug)]
struct Started {
    socket: OwnedFd,
}

/// What came from the broker.
#[derive(Debug, Default)]
struct Given {
    devices: Vec<Started>,
    files: Files,
}

/// Opened files by their number in the policy, each taken once.
#[derive(Debug, Default)]
pub(super) struct Files(BTreeMap<u32, (OwnedFd, Option<String>)>);

impl Files {
    /// Takes file `index`.
    pub(super) fn take(&mut self, index: u32) -> Option<File> {
        self.take_named(index).map(|(fd, _)| fd.into())
    }

    /// Takes file `index` with the name that came along.
    pub(super) fn take_named(&mut self, index: u32) -> Option<(OwnedFd, Option<String>)> {
        self.0.remove(&index)
    }
}

/// What is asked for beside the files `first`.
fn rest(plan: &Plan, first: &[u32]) -> impl Iterator<Item = Request> {
    let files = (0..plan.policy.files.len() as u32).filter(|index| !first.contains(index));
    (0..plan.policy.devices.len() as u32)
        .map(|index| Request::Start { index })
        .chain(files.map(|index| Request::Open { index }))
}

impl Given {
    /// Tells the policy and asks for everything in it; or, with a snapshot, for what it takes to read that, which is here on return:
    /// what is wrong with a snapshot is told before any device's process is started.
    fn begin(
        broker: &mut Client,
        spec: &VmSpec,
        plan: &Plan,
    ) -> Result<(Self, Vec<u32>), StartError> {
        let first: Vec<u32> = plan.incoming.map_or(Vec::new(), |files| {
            files
                .into_iter()
                .chain(plan.memory.iter().copied().flatten())
                .collect()
        });
        ask(
            broker,
            std::iter::once(Request::SetPolicy(plan.policy.clone()))
                .chain(first.iter().map(|&index| Request::Open { index })),
        )?;
        let mut given = Self::default();
        if first.is_empty() {
            ask(broker, rest(plan, &first))?;
        } else {
            given.take_policy(broker, spec)?;
            given.take_files(broker, plan, &first)?;
        }
        Ok((given, first))
    }

    /// The reply to the policy: the descriptor to log to.
    fn take_policy(&mut self, broker: &mut Client, spec: &VmSpec) -> Result<(), StartError> {
        if let Some(fd) = broker.policy_set()? {
            ipc::log::init("control", spec.log.level, fd);
        }
        Ok(())
    }

    fn take_devices(&mut self, broker: &mut Client, plan: &Plan) -> Result<(), StartError> {
        for (index, grant) in (0u32..).zip(&plan.policy.devices) {
            let (socket, pid) = broker.started(index)?;
            if grant.is_foreign() {
                info!("device {} is another process's", grant.spec.id());
            } else {
                info!("device {} is process {pid}", grant.spec.id());
            }
            self.devices.push(Started { socket });
        }
        Ok(())
    }

    fn take_files(
        &mut self,
        broker: &mut Client,
        plan: &Plan,
        indices: &[u32],
    ) -> Result<(), StartError> {
        for &index in indices {
            let opened = broker.opened(index)?;
            if let Some(FileGrant::InheritedSocket {
                option,
                fd,
                listens,
            }) = plan.policy.files.get(index as usize)
            {
                inherited_socket(&opened.0, *listens).map_err(|what| StartError::Inherited {
                    option: option.clone(),
                    fd: *fd,
                    what,
                })?;
            }
            self.files.0.insert(index, opened);
        }
        Ok(())
    }

    fn monitors(&mut self, plan: &Plan) -> Vec<qmp::Source> {
        plan.monitors
            .iter()
            .filter_map(|monitor| {
                let (fd, _) = self.files.take_named(monitor.file)?;
                Some(if monitor.server {
                    qmp::Source::Listener {
                        fd,
                        wait: monitor.wait,
                    }
                } else {
                    qmp::Source::Connected(fd)
                })
            })
            .collect()
    }
}

/// Whether an inherited socket is what the command line says.
fn inherited_socket(socket: &OwnedFd, listens: bool) -> Result<(), &'static str> {
    use nix::sys::socket::{SockType, getsockopt, sockopt};
    if getsockopt(socket, sockopt::SockType) != Ok(SockType::Stream) {
        return Err("not a stream socket");
    }
    match getsockopt(socket, sockopt::AcceptConn) {
        Ok(now) if now == listens => Ok(()),
        Ok(true) => Err("it listens; add server=on"),
        Ok(false) => Err("it does not listen; leave server=on out"),
        Err(_) => Err("cannot be asked whether it listens"),
    }
}

/// The board with its RAM and vCPUs, before anything is plugged.
fn board(kvm: &Kvm, spec: &VmSpec, plan: &Plan, files: &mut Files) -> Result<Microvm, StartError> {
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
fn processor_without_guest() -> Result<Processor, StartError> {
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
pub(super) type SharedTransport = Arc<Mutex<MmioTransport>>;

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

/// The reason behind a handshake that failed: what the process said before it ended, if it ended.
fn why_device_failed(
    broker: &mut Client,
    index: u32,
    grants: &[DeviceGrant],
    error: RemoteError,
) -> StartError {
    if !error.is_hang_up()
        || grants
            .get(index as usize)
            .is_some_and(DeviceGrant::is_foreign)
    {
        // A process that lies or is silent ends only because it was given up; what it did is the reason.
        return error.into();
    }
    let Some(exit) = broker.wait_exit(index) else {
        return error.into();
    };
    StartError::DeviceEnded {
        id: grants
            .get(index as usize)
            .map_or_else(String::new, |grant| grant.spec.id().to_owned()),
        how: match exit.how {
            Exit::Code(code) => format!("with status {code}"),
            Exit::Signal(signal) => match Signal::try_from(signal) {
                Ok(name) => format!("by {name}"),
                Err(_) => format!("by signal {signal}"),
            },
        },
        last_words: exit.last_words,
    }
}
