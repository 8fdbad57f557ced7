//! The main loop and the VM's state.
//!
//! **Job.** Wait for signals, the broker, QMP commands, vCPU events, device complaints and the serial port's other end; decide
//! what becomes of the VM.
//! **Who is not trusted**: everybody whose message arrives here. Each is a typed value that was checked where it came in.
//! **Why this way.** State changes happen in one place and one thread, so events leave in the order in which things happened.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ipc::control::Request;
use ipc::guest_log;
use ipc::log::{debug, error, info, warn};
use ipc::spec::vm::{DeviceKind, IothreadSpec, VmSpec};
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::signalfd::SignalFd;
use seccomp_policies::Policy;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::daemon::Ready;
use super::disk::{DiskOrder, RunClock};
use super::dump::Dump;
use super::hotplug::Hotplug;
use super::poller::Poller;
use super::serial::Chardevs;
use super::snapshot::Job;
use super::start::{SharedTransport, StartError, termination_signals};
use super::supervise::{Context, Supervisor};
use super::{lockdown, with_causes};
use crate::broker::{Client, ClientError};
use crate::cmdline::Plan;
use crate::kvm::processor::Processor;
use crate::machine::events::{EventReceiver, VmEvent};
use crate::machine::microvm::Microvm;
use crate::memory::pager::Progress;
use crate::memory::sharing::Orders;
use crate::qmp::{
    Cause, Commands, Counted, CpuThread, DumpProgress, Event, IothreadInfo, Migration,
    MigrationStatus, QmpError, Reply, RunState, SandboxReport, ServerHandle, VmCommand, VmFacts,
};

/// Everything a VM is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) spec: VmSpec,
    pub(super) plan: Plan,
    pub(super) broker: Client,
    pub(super) machine: Option<Microvm>,
    /// What a guest sees, or why that is not known.
    pub(super) processor: Result<Processor, String>,
    pub(super) transports: Vec<SharedTransport>,
    pub(super) chardevs: Chardevs,
    pub(super) qmp: ServerHandle,
    pub(super) commands: Commands,
    pub(super) signals: SignalFd,
    /// Guest memory that is still coming in from a snapshot.
    pub(super) pager: Option<Arc<Progress>>,
    /// Files of shared folders are mapped into the guest's memory.
    pub(super) has_windows: bool,
    /// Guest memory is a template's where nobody has written.
    pub(super) sharing: Option<Arc<Orders>>,
}

/// A VM.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) parts: Parts,
    pub(super) poller: Poller,
    events: Option<EventReceiver>,
    pub(super) supervisor: Supervisor,
    pub(super) hotplug: Hotplug,
    pub(super) state: RunState,
    /// For how long the guest has been running.
    pub(super) clock: RunClock,
    /// A snapshot that is being made.
    pub(super) job: Option<Job>,
    /// A core file that is being written.
    pub(super) dump: Option<Dump>,
    /// One that waits for its file, and whether its client waits for more than that.
    pub(super) dump_to_come: Option<(Reply<()>, bool)>,
    /// The last one, for `query-dump`.
    pub(super) dumped: DumpProgress,
    /// The last one, for `query-migrate`.
    pub(super) migration: Migration,
    /// The last step of it that clients know.
    told_migration: MigrationStatus,
    /// What a disk's process is doing with its image.
    pub(super) order: Option<DiskOrder>,
    /// Commands that wait until it is done.
    held_back: VecDeque<VmCommand>,
    /// Clients that wait for the broker's facts, in the order in which it was asked.
    inspections: VecDeque<Reply<SandboxReport>>,
    /// This process: asking later would be one more call for the filter to allow.
    pid: i32,
}

/// How the VM ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    cause: Cause,
    status: ExitCode,
}

const SIGNALS: u64 = 0;
const BROKER: u64 = 1;
const COMMANDS: u64 = 2;
const EVENTS: u64 = 3;
const PAGER: u64 = 4;
/// The socket of the process that has a [`DiskOrder`].
pub(super) const ORDER: u64 = 5;
/// Tokens from here on belong to the serial port's other end.
const CHARDEV: u64 = 16;
/// Tokens from here on are devices by their position: their rings, their processes that hang, their new processes.
pub(super) const DEVICES: u64 = 1 << 32;
const ATTENTIONS: u64 = 2 << 32;
const SOCKETS: u64 = 3 << 32;
/// Tokens from here on are devices on their way in.
pub(super) const PLUGS: u64 = 4 << 32;

impl Vm {
    /// Puts every event source into one epoll.
    pub(super) fn new(mut parts: Parts) -> Result<Self, StartError> {
        let failed = |call| move |source| StartError::System { call, source };
        let poller = Poller::new().map_err(failed("epoll_create1"))?;
        let events = parts.machine.as_mut().and_then(Microvm::take_events);
        let readable = EpollFlags::EPOLLIN;
        let add = failed("epoll_ctl");
        (|| {
            poller.add(&parts.signals, SIGNALS, readable)?;
            poller.add(&parts.broker, BROKER, readable)?;
            poller.add(&parts.commands, COMMANDS, readable)?;
            if let Some(events) = &events {
                poller.add(borrow(events.event_fd()), EVENTS, readable)?;
            }
            if let Some(pager) = &parts.pager {
                poller.add(borrow(pager.event()), PAGER, readable)?;
            }
            for (token, transport) in (DEVICES..).zip(&parts.transports) {
                poller.add(borrow(lock(transport).error_event()), token, readable)?;
            }
            Ok(())
        })()
        .map_err(add)?;
        let input = parts.machine.as_ref().and_then(Microvm::serial_input);
        parts
            .chardevs
            .watch(&poller, CHARDEV, input)
            .map_err(failed("epoll_ctl"))?;
        let supervisor = Supervisor::new(
            &parts.transports,
            &parts.plan.policy.devices,
            parts.spec.devices.iter().map(|device| device.restart.most),
            &Context {
                broker: &mut parts.broker,
                poller: &poller,
                qmp: &parts.qmp,
            },
            (ATTENTIONS, SOCKETS),
        )
        .map_err(failed("epoll_ctl"))?;
        // There is nothing to wait for.
        let migration = match &parts.sharing {
            Some(_) => Migration::completed(parts.spec.memory.size),
            None => Migration::default(),
        };
        Ok(Self {
            hotplug: Hotplug::new(&parts.spec, &parts.plan.policy.additions.grants),
            pid: nix::unistd::getpid().as_raw(),
            parts,
            poller,
            events,
            supervisor,
            state: RunState::Prelaunch,
            clock: RunClock::default(),
            job: None,
            dump: None,
            dump_to_come: None,
            dumped: DumpProgress::default(),
            migration,
            told_migration: MigrationStatus::default(),
            order: None,
            held_back: VecDeque::new(),
            inspections: VecDeque::new(),
        })
    }

    /// Waits for the clients that the command line waits for: sockets without `nowait`. Nothing reads signals yet, so for
    /// this long they end the process, and the broker cleans up.
    pub(super) fn wait_for_clients(&mut self) -> Result<(), StartError> {
        let signals = termination_signals();
        signals
            .thread_unblock()
            .map_err(|source| StartError::System {
                call: "sigprocmask",
                source,
            })?;
        self.parts
            .chardevs
            .wait_for_clients()
            .map_err(|source| StartError::System {
                call: "poll",
                source,
            })?;
        self.parts.qmp.wait_for_clients()?;
        signals.thread_block().map_err(|source| StartError::System {
            call: "sigprocmask",
            source,
        })
    }

    /// Says that the VM is there, and gives up the last of this thread's rights.
    pub(super) fn announce(mut self, ready: Option<Ready>) -> Result<Self, StartError> {
        // It takes a look at this process, the last one that anybody gets.
        ozone::while_open_to_inspection(|| self.parts.broker.ready())??;
        if let Some(ready) = ready {
            ready.tell(self.parts.spec.log.file.is_none())?;
        }
        // The start ran through most of the program; from here on a few pages of it do.
        ozone::give_code_back();
        lockdown::filter(Policy::ControlMain, self.parts.spec.seccomp)?;
        Ok(self)
    }

    /// Runs the VM until it ends.
    pub(super) fn run(mut self) -> ExitCode {
        // What the broker told while it was asked for something else.
        if let Err(end) = self.broker() {
            return self.finish(end);
        }
        // Those of a snapshot that this VM goes on from; where its memory is not there yet, they would read zeroes.
        if self.parts.pager.is_none() {
            self.release_devices();
        }
        if !self.parts.spec.start_paused
            && let Err(end) = self.let_run()
        {
            return self.finish(end);
        }
        loop {
            let snapshot = self.job.as_ref().and_then(Job::deadline);
            let deadline = [
                self.supervisor.deadline(),
                self.hotplug.deadline(),
                self.order.as_ref().map(DiskOrder::deadline),
                snapshot,
            ];
            let deadline = deadline.into_iter().flatten().min();
            let wake = match &self.job {
                Some(job) if job.has_work() => Some(Instant::now()),
                _ if self.dump.is_some() || self.parts.broker.has_answers() => Some(Instant::now()),
                _ => deadline,
            };
            let events = match self.poller.wait(wake) {
                Ok(events) => events,
                Err(e) => {
                    error!("waiting for events: {}", e.desc());
                    return self.finish(HOST_ERROR);
                }
            };
            for token in events {
                if let Err(end) = self.handle(token).and_then(|()| self.tell_the_rest()) {
                    return self.finish(end);
                }
            }
            self.answer_inspections();
            self.go_on_with_order();
            if let Err(end) = self
                .commands_held_back()
                .and_then(|()| self.go_on_with_snapshot())
                .and_then(|()| self.go_on_with_dump())
            {
                return self.finish(end);
            }
            if deadline.is_some()
                && let Err(end) = self
                    .supervise(Supervisor::overdue)
                    .and_then(|()| self.plug_overdue())
            {
                return self.finish(end);
            }
            // A snapshot's next step is met here, not by an event; the end of the VM by whichever of this loop's waits.
            if let Err(end) = self.tell_the_rest().and_then(|()| self.told()) {
                return self.finish(end);
            }
        }
    }

    /// What happened besides while something was handled.
    fn tell_the_rest(&mut self) -> Result<(), End> {
        if self.told_migration != self.migration.status {
            self.told_migration = self.migration.status;
            self.parts.qmp.emit(&Event::Migration(self.told_migration));
        }
        self.stop_for_disks()
    }

    /// The host has failed disks that stop the guest.
    fn stop_for_disks(&mut self) -> Result<(), End> {
        let stops = self.supervisor.take_io_stops();
        for (device, stop) in &stops {
            let kind = self.parts.spec.devices.iter().find(|one| one.id == *device);
            let drive = match kind.map(|device| &device.kind) {
                Some(DeviceKind::Block { drive, .. }) => drive.clone(),
                _ => String::new(),
            };
            self.parts.qmp.emit(&Event::BlockIoError {
                device: device.clone(),
                drive,
                stop: *stop,
            });
        }
        if !stops.is_empty() && self.state == RunState::Running {
            return self.pause(RunState::IoError);
        }
        Ok(())
    }

    fn handle(&mut self, token: u64) -> Result<(), End> {
        match token {
            SIGNALS => self.signal(),
            BROKER => self.broker(),
            COMMANDS => self.commands(),
            EVENTS => self.vm_events(),
            PAGER => {
                self.memory_is_whole();
                Ok(())
            }
            // The loop looks after each round.
            ORDER => Ok(()),
            plug if plug >= PLUGS => self.plug_event((plug - PLUGS) as usize),
            own if own >= ATTENTIONS => self.supervise(|supervisor, cx| supervisor.event(own, cx)),
            device if device >= DEVICES => {
                self.device_error((device - DEVICES) as usize);
                Ok(())
            }
            chardev => {
                self.parts.chardevs.handle((chardev - CHARDEV) as usize);
                Ok(())
            }
        }
    }

    fn signal(&mut self) -> Result<(), End> {
        match self.parts.signals.read_signal() {
            Ok(Some(signal)) => {
                info!("signal {} ends the VM", signal.ssi_signo);
                Err(End {
                    cause: Cause::HostSignal,
                    status: ExitCode::SUCCESS,
                })
            }
            Ok(None) | Err(Errno::EINTR) => Ok(()),
            Err(e) => {
                error!("reading a signal: {}", e.desc());
                Err(HOST_ERROR)
            }
        }
    }

    fn broker(&mut self) -> Result<(), End> {
        self.supervise(|supervisor, cx| {
            while let Some(notice) = cx.broker.poll()? {
                supervisor.notice(notice, cx)?;
            }
            Ok(())
        })
    }

    pub(super) fn supervise(
        &mut self,
        work: impl FnOnce(&mut Supervisor, &mut Context<'_>) -> Result<(), ClientError>,
    ) -> Result<(), End> {
        let Parts { broker, qmp, .. } = &mut self.parts;
        work(
            &mut self.supervisor,
            &mut Context {
                broker,
                poller: &self.poller,
                qmp,
            },
        )
        .map_err(|e| host_error(&e))
    }

    /// The guest broke a ring of this device.
    fn device_error(&mut self, index: usize) {
        if let Some(transport) = self.parts.transports.get(index) {
            lock(transport).device_error();
        }
    }

    pub(super) fn vm_events(&mut self) -> Result<(), End> {
        let Some(receiver) = &self.events else {
            return Ok(());
        };
        // Cleared first: an event that comes in between makes it readable again.
        let _ = receiver.event_fd().read();
        let events: Vec<VmEvent> = std::iter::from_fn(|| receiver.try_recv()).collect();
        for event in events {
            self.vm_event(&event)?;
        }
        Ok(())
    }

    fn vm_event(&mut self, event: &VmEvent) -> Result<(), End> {
        match event {
            VmEvent::Shutdown => {
                info!("{event}");
                self.guest_shutdown(Cause::GuestShutdown)
            }
            VmEvent::Reset if self.parts.spec.no_reboot => {
                info!("{event}, which ends the VM (-no-reboot)");
                self.guest_shutdown(Cause::GuestReset)
            }
            VmEvent::Reset => {
                guest_log!(info, "{event}");
                // It may have been sent just before a `stop` that has been carried out already.
                let was = self.state;
                self.reset(Cause::GuestReset)?;
                if was == RunState::Running {
                    self.let_run()
                } else {
                    Ok(())
                }
            }
            VmEvent::TripleFault { .. } => {
                tell_lines(&event.to_string());
                Err(End {
                    cause: Cause::GuestPanic,
                    status: ExitCode::FAILURE,
                })
            }
            VmEvent::MemoryFault { .. } if self.parts.has_windows => {
                tell_lines(&format!(
                    "{event}: the guest touched a part of a shared folder's window (cache-size=) in which no file is, or not any more since it was made shorter on the host, or that it may not write; it is stopped, and 'cont' has it try again"
                ));
                match self.state {
                    RunState::Running => self.pause(RunState::IoError),
                    _ => Ok(()),
                }
            }
            VmEvent::MemoryFault { .. }
            | VmEvent::InternalError { .. }
            | VmEvent::FailEntry { .. }
            | VmEvent::VcpuError { .. } => {
                tell_lines(&event.to_string());
                Err(HOST_ERROR)
            }
        }
    }

    fn guest_shutdown(&mut self, cause: Cause) -> Result<(), End> {
        if !self.parts.spec.no_shutdown {
            return Err(End {
                cause,
                status: ExitCode::SUCCESS,
            });
        }
        self.parts.qmp.emit(&Event::Shutdown(cause));
        self.pause(RunState::Shutdown)
    }

    fn commands(&mut self) -> Result<(), End> {
        while let Some(command) = self.parts.commands.next() {
            // In their order, but for those that need not wait.
            let free = self.order.is_none() && self.held_back.is_empty();
            if free || command.goes_beside_an_order() {
                self.command(command)?;
            } else {
                self.held_back.push_back(command);
            }
        }
        Ok(())
    }

    /// Those that waited for a disk's process, until one of them has to again.
    fn commands_held_back(&mut self) -> Result<(), End> {
        while self.order.is_none()
            && let Some(command) = self.held_back.pop_front()
        {
            self.command(command)?;
        }
        Ok(())
    }

    fn command(&mut self, command: VmCommand) -> Result<(), End> {
        let job = self.job.as_mut().filter(|job| job.holds_the_guest());
        match (command, job) {
            (VmCommand::Cont(reply) | VmCommand::SystemReset(reply), Some(_)) => {
                reply.send(Err(QmpError::generic(
                    "A snapshot is being made: wait for it, or give it up with 'migrate_cancel'",
                )));
                Ok(())
            }
            (VmCommand::Cont(reply) | VmCommand::SystemReset(reply), None)
                if self.dump.is_some() =>
            {
                reply.send(Err(QmpError::generic(
                    "Guest memory is being dumped: wait for that",
                )));
                Ok(())
            }
            (command, job) => {
                if let (VmCommand::Stop(_), Some(job)) = (&command, job) {
                    job.stay_paused();
                }
                if let (VmCommand::Stop(_), Some(dump)) = (&command, &mut self.dump) {
                    dump.stay_paused();
                }
                self.execute(command)
            }
        }
    }

    fn execute(&mut self, command: VmCommand) -> Result<(), End> {
        match command {
            VmCommand::Migrate(uri, reply) => self.migrate(&uri, reply)?,
            VmCommand::Dump(order, reply) => self.dump(&order, reply)?,
            VmCommand::QueryDump(reply) => reply.send(Ok(self.dump_progress())),
            VmCommand::QueryMigrate(reply) => reply.send(Ok(self.migration())),
            VmCommand::CancelMigration(reply) => {
                let done = self.cancel_migration();
                reply.send(Ok(()));
                done?;
            }
            VmCommand::Status(reply) => reply.send(Ok(self.state)),
            VmCommand::Cpus(reply) => reply.send(self.cpus()),
            VmCommand::Processor(reply) => {
                let processor = self.parts.processor.clone();
                reply.send(processor.map_err(|why| {
                    QmpError::generic(format!("The processor is not known: {why}"))
                }));
            }
            VmCommand::Iothreads(reply) => reply.send(Ok(self.iothreads())),
            VmCommand::Chardevs(reply) => reply.send(Ok(self.chardevs())),
            VmCommand::Facts(reply) => reply.send(self.facts()),
            VmCommand::Disks(reply) => self.tell_of_disks(reply),
            VmCommand::DiskSnapshot(device, name, reply) => {
                self.snapshot_disk(device, name, reply);
            }
            VmCommand::DiskSnapshotDelete {
                device,
                id,
                name,
                reply,
            } => self.forget_snapshot(device, id, name, reply),
            VmCommand::Blockstats(reply) => reply.send(self.counted()),
            VmCommand::Workloads(reply) => reply.send(Ok(self.workloads())),
            VmCommand::Register(reply, vcpu, number) => reply.send(self.register(vcpu, &number)),
            VmCommand::Memory(reply, address) => reply.send(self.memory(&address)),
            VmCommand::Sandbox(reply) => {
                self.inspections.push_back(reply);
                self.parts
                    .broker
                    .send(&Request::Inspect)
                    .map_err(|e| host_error(&e))?;
            }
            VmCommand::BackendAdd(what, fds, reply) => self.add_backend(*what, &fds, reply)?,
            VmCommand::NodeOver(node, reply) => reply.send(self.put_over(&node)),
            VmCommand::IothreadAdd(id, reply) => reply.send(self.add_iothread(id)),
            VmCommand::ObjectDel(id, reply) => reply.send(self.remove_object(&id)),
            VmCommand::BackendDel(kind, id, reply) => self.remove_backend(kind, &id, reply)?,
            VmCommand::DeviceAdd(new, reply) => self.add_device(*new, reply)?,
            VmCommand::BlockResize(name, size, reply) => self.resize_disk(&name, size, reply)?,
            VmCommand::DeviceUpgrade(id, reply) => self.upgrade_device(&id, reply)?,
            VmCommand::NetdevReplace(tap, fds, reply) => self.replace_tap(tap, &fds, reply)?,
            VmCommand::DeviceDel(id, reply) => self.remove_device(&id, reply)?,
            VmCommand::SetLink(name, up, reply) => reply.send(self.set_link(&name, up)),
            VmCommand::AnnounceSelf(names, reply) => reply.send(self.announce_guest(&names)),
            VmCommand::Wrong(why, reply) => reply.send(Err(QmpError::generic(why))),
            VmCommand::Stop(reply) => {
                let done = match self.state {
                    RunState::Running => self.pause(RunState::Paused),
                    _ => Ok(()),
                };
                reply.send(Ok(()));
                done?;
            }
            VmCommand::Cont(reply) => {
                let done = match self.state {
                    RunState::Running => Ok(()),
                    RunState::Prelaunch | RunState::Paused | RunState::IoError => self.resume(),
                    state => {
                        reply.send(Err(QmpError::generic(format!(
                            "The VM is in state '{}': reset it before 'cont'",
                            state.name()
                        ))));
                        return Ok(());
                    }
                };
                reply.send(Ok(()));
                done?;
            }
            VmCommand::SystemReset(reply) => {
                let was = self.state;
                let done = self.reset(Cause::HostQmpSystemReset);
                reply.send(Ok(()));
                done?;
                match was {
                    RunState::Running => self.let_run()?,
                    RunState::Shutdown => self.state = RunState::Prelaunch,
                    _ => {}
                }
            }
            VmCommand::SystemPowerdown(reply) => reply.send(self.powerdown()),
            VmCommand::Quit(reply) => {
                reply.send(Ok(()));
                return Err(End {
                    cause: Cause::HostQmpQuit,
                    status: ExitCode::SUCCESS,
                });
            }
        }
        Ok(())
    }

    /// Passes on what the broker has read, whichever of this loop's waits met it.
    fn answer_inspections(&mut self) {
        while let Some(inspection) = self.parts.broker.inspection() {
            let Some(reply) = self.inspections.pop_front() else {
                return;
            };
            let devices = &self.parts.plan.policy.devices;
            reply.send(Ok(SandboxReport {
                seccomp: self.parts.spec.seccomp,
                sandbox: self.parts.spec.sandbox,
                devices: devices.iter().map(|d| (&d.spec).into()).collect(),
                landlock_abi: inspection.landlock_abi,
                processes: inspection.processes,
            }));
        }
    }

    fn cpus(&self) -> Result<Vec<CpuThread>, QmpError> {
        let Some(machine) = &self.parts.machine else {
            return Ok(Vec::new());
        };
        let ids = machine
            .vcpu_thread_ids()
            .map_err(|e| QmpError::generic(with_causes(&e)))?;
        Ok((0..)
            .zip(ids)
            .map(|(index, id)| CpuThread {
                index,
                thread_id: id.as_raw(),
            })
            .collect())
    }

    pub(super) fn facts(&self) -> Result<VmFacts, QmpError> {
        Ok(VmFacts {
            spec: self.spec_with_added(),
            cpus: self.cpus()?,
            stopped: self.supervisor.stopped(),
        })
    }

    /// No device process is asked: the numbers are in memory that it has in common with this one.
    fn counted(&self) -> Result<Counted, QmpError> {
        let transports = self.parts.transports.iter().map(lock);
        let disks = transports.map(|transport| {
            let device = transport.core().device();
            (device.id().to_owned(), device.counters())
        });
        Ok(Counted {
            disks: disks.collect(),
            facts: self.facts()?,
        })
    }

    /// Has cards tell the network where the guest is: those with these names, or all.
    fn announce_guest(&self, names: &[String]) -> Result<(), QmpError> {
        let cards: Vec<&str> = if names.is_empty() {
            let all = self.parts.spec.devices.iter();
            let cards = all.filter(|device| matches!(device.kind, DeviceKind::Net { .. }));
            cards.map(|device| device.id.as_str()).collect()
        } else {
            let named = names.iter().map(|name| self.card(name));
            named.collect::<Result<_, _>>()?
        };
        for mut transport in self.parts.transports.iter().map(lock) {
            if cards.contains(&transport.core().device().id()) {
                transport.announce();
            }
        }
        Ok(())
    }

    /// Id of the card with this name, or whose netdev has it.
    fn card(&self, name: &str) -> Result<&str, QmpError> {
        let named = |device: &&ipc::spec::vm::DeviceOption| {
            device.id == name
                || matches!(&device.kind, DeviceKind::Net { netdev, .. } if netdev == name)
        };
        let Some(device) = self.parts.spec.devices.iter().find(named) else {
            return Err(QmpError::device_not_found(name));
        };
        if !matches!(device.kind, DeviceKind::Net { .. }) {
            return Err(QmpError::generic(format!(
                "Device '{name}' is no network card; allowed: the id of one, or of its netdev"
            )));
        }
        Ok(&device.id)
    }

    /// Pulls the cable of the card with this name, or whose netdev has it, or plugs it in.
    fn set_link(&self, name: &str, up: bool) -> Result<(), QmpError> {
        let card = self.card(name)?;
        let mut transports = self.parts.transports.iter().map(lock);
        let transport = transports.find(|one| one.core().device().id() == card);
        match transport {
            Some(transport) if transport.core().device().is_failed() => Err(
                QmpError::device_not_active(format!("Device '{name}' was given up")),
            ),
            Some(mut transport) => {
                transport.set_link(up);
                Ok(())
            }
            None => Err(QmpError::device_not_found(name)),
        }
    }

    /// A register of a vCPU, which has to stand still for it.
    fn register(&self, vcpu: u64, number: &str) -> Result<u64, QmpError> {
        let Some(machine) = &self.parts.machine else {
            return Err(QmpError::generic("Machine 'none' has no processors"));
        };
        if self.state == RunState::Running {
            return Err(QmpError::generic(
                "Registers of a vCPU that runs cannot be read: 'stop' the guest before",
            ));
        }
        let dumps = machine
            .registers()
            .map_err(|e| QmpError::generic(with_causes(&e)))?;
        let dump = usize::try_from(vcpu).ok().and_then(|at| dumps.get(at));
        let Some(dump) = dump else {
            return Err(QmpError::generic(format!(
                "Parameter 'vcpu' is {vcpu}; allowed: 0 to {}",
                dumps.len().saturating_sub(1)
            )));
        };
        u64::from_str_radix(number.strip_prefix("0x").unwrap_or(number), 16)
            .ok()
            .and_then(|number| dump.by_number(number))
            .ok_or_else(|| {
                QmpError::generic(format!(
                    "Parameter 'addr' is '{number}'; allowed: 0 to 10, 31 to 37, 3A, 3B, the registers' numbers in DWARF in \
                     hexadecimal digits"
                ))
            })
    }

    /// What the guest would read there. The guest may run, and write to it meanwhile.
    fn memory(&self, address: &str) -> Result<u32, QmpError> {
        let Some(machine) = &self.parts.machine else {
            return Err(QmpError::generic("Machine 'none' has no memory"));
        };
        let digits = address.strip_prefix("0x").unwrap_or(address);
        let word = u64::from_str_radix(digits, 16)
            .ok()
            .and_then(|gpa| machine.ram().memory().read_obj(GuestAddress(gpa)).ok());
        word.ok_or_else(|| {
            QmpError::generic(format!(
                "Parameter 'gpa' is '{address}'; allowed: the address of four bytes of guest memory, of which there are {} \
                 MiB, in hexadecimal digits",
                self.parts.spec.memory.size >> 20
            ))
        })
    }

    /// An iothread is no thread here: the device processes that name it do its work, on its processors, and the first one
    /// stands for it.
    fn iothreads(&self) -> Vec<IothreadInfo> {
        let process_of = |id: &String| {
            let position = self
                .parts
                .spec
                .devices
                .iter()
                .position(|device| device.iothread.as_ref() == Some(id))?;
            self.parts
                .plan
                .devices
                .get(position)
                .and_then(|&index| self.parts.broker.device_pid(index))
        };
        self.parts
            .spec
            .iothreads
            .iter()
            .map(|IothreadSpec { id, .. }| IothreadInfo {
                id: id.clone(),
                thread_id: process_of(id).unwrap_or(self.pid),
            })
            .collect()
    }

    fn powerdown(&mut self) -> Result<(), QmpError> {
        let Some(machine) = &self.parts.machine else {
            return Err(QmpError::generic("Machine 'none' has no power button"));
        };
        machine
            .power_button()
            .map_err(|e| QmpError::generic(with_causes(&e)))?;
        self.parts.qmp.emit(&Event::Powerdown);
        Ok(())
    }

    /// Lets the guest run without telling anybody: at the start, and when a reset is over.
    fn let_run(&mut self) -> Result<(), End> {
        // A vCPU that reset a device may have been paused before that device's process was ended.
        self.supervise(Supervisor::settle)?;
        self.supervise(Supervisor::try_again)?;
        if let Some(machine) = &mut self.parts.machine {
            machine.resume().map_err(|e| host_error(&e))?;
        }
        self.clock.goes();
        self.state = RunState::Running;
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), End> {
        self.let_run()?;
        self.parts.qmp.emit(&Event::Resume);
        Ok(())
    }

    pub(super) fn pause(&mut self, state: RunState) -> Result<(), End> {
        if let Some(machine) = &self.parts.machine {
            machine.pause().map_err(|e| host_error(&e))?;
        }
        self.clock.stands();
        self.state = state;
        self.parts.qmp.emit(&Event::Stop);
        Ok(())
    }

    fn reset(&mut self, cause: Cause) -> Result<(), End> {
        if let Some(pager) = &self.parts.pager {
            // What is emptied must not be filled from the snapshot afterwards.
            pager.wait();
            self.memory_is_whole();
        }
        if let Some(machine) = &self.parts.machine {
            machine.pause().map_err(|e| host_error(&e))?;
            // Before RAM is emptied, nobody else may write to it.
            self.supervise(Supervisor::take_back)?;
            if let Some(sharing) = &self.parts.sharing {
                sharing.forget();
            }
        }
        for unit in 0..self.parts.transports.len() {
            self.end_stand_in(unit)?;
        }
        if let Some(machine) = &mut self.parts.machine {
            machine.reset().map_err(|e| host_error(&e))?;
        }
        self.parts.qmp.emit(&Event::Reset(cause));
        Ok(())
    }

    /// Ends everything in the order in which nobody misses what is gone already.
    fn finish(mut self, end: End) -> ExitCode {
        if let Some(machine) = &self.parts.machine
            && let Err(e) = machine.pause()
        {
            warn!("{}", with_causes(&e));
        }
        self.parts.qmp.emit(&Event::Shutdown(end.cause));
        self.parts.qmp.finish();
        self.parts.chardevs.flush();
        drop(self.parts.machine.take());
        drop(self.supervisor);
        drop(self.parts.transports);
        drop(self.parts.chardevs);
        debug!("waiting for the broker to clean up");
        self.parts.broker.shut_down();
        end.status
    }
}

const HOST_ERROR: End = End {
    cause: Cause::HostError,
    status: ExitCode::FAILURE,
};

pub(super) fn host_error(error: &dyn std::error::Error) -> End {
    error!("{}", with_causes(error));
    HOST_ERROR
}

/// A text of several lines, one log line each.
fn tell_lines(text: &str) {
    for line in text.lines() {
        error!("{line}");
    }
}

/// vmm-sys-util's eventfds know only their number.
#[allow(unsafe_code)]
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns this descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A panic aborts the process, so a poisoned lock cannot be seen.
pub(super) fn lock(
    transport: &SharedTransport,
) -> std::sync::MutexGuard<'_, crate::virtio::mmio::MmioTransport> {
    transport
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
