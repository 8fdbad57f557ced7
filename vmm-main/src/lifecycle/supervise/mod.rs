//! Device processes that die, hang or lie, and those that take their place.
//!
//! **Job.** Each device has one process at a time. When it ends, or has to be ended because it does not answer, the broker
//! is asked for another one in an identical jail; that one gets the queues as they are and the in-flight region of the one
//! before, so the guest loses nothing. After too many restarts in a short time the device is given up: the guest sees one
//! that needs a reset, and the VM goes on.
//!
//! **Who is not trusted**: device processes. One that hangs up may still have guest memory mapped, so it is ended in any
//! case before another starts; one that answers its handshake slowly, in drips or never is ended when its time is over.
//!
//! A device whose daemon is somebody else's has no process here: when that daemon leaves, the device is given up, or, with
//! `restart=on`, its socket is tried again every [`RECONNECT_MS`] without end, each time with the whole handshake.
//!
//! **Why this way.** Nothing here waits for a device process: replies of the broker and of the handshake are events of the
//! main loop, and vCPUs stop only if they touch the registers of a device at the moment when it gets its queues back.
//!
//! ```text
//! Serving ──Exited──> Starting ──Started──> Handshaking ──answers──> Serving
//!    └─does not answer─> Stopping ──Stopped──┘    └─garbage, silence─> Stopping
//! ```
//!
//! `device-upgrade` starts a second process beside the one that serves, of the program that is then at the place that the
//! broker knows; only when its handshake is done is the old one asked to finish what it took and to stop, and the new one
//! gets the queues in the same breath. Whatever fails before that leaves the old one serving. `netdev_replace` does the same with a
//! process that has another tap.
//!
//! What a shared folder's process has open cannot be had by two: there the broker answers when a new keeper has taken it over
//! and the old process is gone, and the queues are handed over as after a crash.

mod budget;
mod notice;
mod upgrade;

use crate::broker::{Client, ClientError, DeviceExit, Notice};
use crate::lifecycle::event_loop::{borrow, lock};
use crate::lifecycle::poller::Poller;
use crate::lifecycle::start::SharedTransport;
use crate::lifecycle::with_causes;
use crate::qmp::{Event, QmpError, Reply, ServerHandle, Workload};
use crate::virtio::attention::Attention;
use crate::virtio::remote::{Handshake, RemoteError};
use budget::Budget;
use ipc::control::{DeviceGrant, Exit, Request};
use ipc::limits::RESTART_WINDOW_MS;
use ipc::log::{debug, error, info, warn};
use ipc::spec::DeviceSpec;
use ipc::spec::block::IoStop;
use ipc::spec::net::NetSpec;
use ipc::spec::vm::NetBackend;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use upgrade::Upgrade;

/// Milliseconds between two tries to reach somebody else's daemon.
const RECONNECT_MS: u64 = 500;

/// What the supervisor works with.
pub(super) struct Context<'a> {
    pub(super) broker: &'a mut Client,
    pub(super) poller: &'a Poller,
    pub(super) qmp: &'a ServerHandle,
}

/// All devices by their index in the broker's policy.
#[derive(Debug)]
pub(super) struct Supervisor {
    devices: Vec<Device>,
    /// What was asked for and not yet answered, in order.
    asked: VecDeque<Asked>,
    /// Answers to [`Asked::Other`], and ends of processes that are not watched over, in the order in which they came.
    others: VecDeque<Told>,
    /// Token of the first device's [`Attention`].
    attentions: u64,
    /// Token of the first device's socket.
    sockets: u64,
    /// Disks that were failed, and nobody asked for that yet.
    io_stops: Vec<(String, IoStop)>,
}

/// A request to the broker whose answer tells whether it worked.
#[derive(Debug)]
enum Asked {
    /// A start of the process of this device.
    Start(usize),
    /// Another process beside the one of this device.
    Upgrade(usize),
    /// The end of one of two processes of this device; then this is answered.
    Settle(usize, Option<(Reply<()>, Result<(), QmpError>)>),
    /// Somebody else's, known by a number.
    Other(u64),
}

/// What is for others to hear.
#[derive(Debug)]
pub(super) enum Told {
    /// The answer to the request with this number; an error is for the user.
    Answer(u64, Result<Notice, String>),
    /// Another process than the one that was started does the work of a device that nobody watches over yet.
    Serves {
        /// Index of the device.
        index: u32,
        /// Its process id.
        pid: i32,
    },
    /// A process has ended that nobody watches over yet, or any more.
    Exited(DeviceExit),
    /// Card `index` has another tap than before.
    Retapped {
        /// Index of the device.
        index: usize,
        /// The tap.
        tap: NetBackend,
    },
}

#[derive(Debug)]
struct Device {
    /// Where its daemon listens, if that is somebody else's.
    foreign: Option<DeviceGrant>,
    spec: DeviceSpec,
    transport: SharedTransport,
    attention: Arc<Attention>,
    budget: Budget,
    process: Process,
    /// Since when nobody serves.
    since: Option<Instant>,
    /// The process that is to take the place of the one that serves.
    upgrade: Option<Upgrade>,
    /// The one whose place another has taken: its end is no news.
    retired: Option<i32>,
    /// When the last one took over from another.
    back: Option<Instant>,
    /// The device was taken out, and its process stands in for it: no news, and followed by none.
    stands_in: bool,
}

/// A device's process.
#[derive(Debug)]
enum Process {
    Serving {
        pid: i32,
    },
    /// The broker was asked to end it.
    Stopping {
        pid: i32,
        how: Option<Exit>,
    },
    /// The broker was asked to start it.
    Starting,
    /// It has a socket.
    Handshaking {
        pid: i32,
        handshake: Box<Handshake>,
    },
    /// Somebody else's, which nobody here started and nobody here can end.
    Foreign,
    /// It has ended because the host failed a request; another one comes when the guest goes on.
    Waiting(IoStop),
    /// Somebody else's has left; its socket is tried again at this time.
    Away(Instant),
    /// None will come.
    Failed,
    /// The device was taken out; another one may be put in.
    Unplugged,
}

impl Process {
    const fn pid(&self) -> Option<i32> {
        match self {
            Self::Serving { pid } | Self::Stopping { pid, .. } | Self::Handshaking { pid, .. } => {
                Some(*pid)
            }
            Self::Starting
            | Self::Foreign
            | Self::Waiting(_)
            | Self::Away(_)
            | Self::Failed
            | Self::Unplugged => None,
        }
    }
}

/// What the process of a device is that has just been put in.
fn serving(grant: &DeviceGrant, pid: i32) -> Process {
    if grant.is_foreign() {
        Process::Foreign
    } else {
        Process::Serving { pid }
    }
}

impl Supervisor {
    /// Watches over `transports`, whose processes serve. `most` are the devices' restarts. Tokens from `attentions` and
    /// from `sockets` on belong to this, one a device each.
    pub(super) fn new(
        transports: &[SharedTransport],
        grants: &[DeviceGrant],
        most: impl Iterator<Item = u16>,
        cx: &Context<'_>,
        (attentions, sockets): (u64, u64),
    ) -> Result<Self, Errno> {
        let mut devices = Vec::with_capacity(transports.len());
        for (((index, transport), grant), most) in (0u32..).zip(transports).zip(grants).zip(most) {
            let attention = lock(transport).attention().clone();
            cx.poller.add(
                borrow(attention.event()),
                attentions + u64::from(index),
                EpollFlags::EPOLLIN,
            )?;
            if grant.is_foreign()
                && let Some(socket) = lock(transport).device_socket()
            {
                // Replies are for whoever asks; only its end is of interest here.
                cx.poller
                    .add(socket, sockets + u64::from(index), EpollFlags::EPOLLRDHUP)?;
            }
            devices.push(Device {
                foreign: grant.is_foreign().then(|| grant.clone()),
                spec: grant.spec.clone(),
                transport: transport.clone(),
                attention,
                budget: Budget::new(most),
                process: match cx.broker.device_pid(index) {
                    _ if grant.is_foreign() => Process::Foreign,
                    Some(pid) => Process::Serving { pid },
                    None => Process::Failed,
                },
                since: None,
                upgrade: None,
                retired: None,
                back: None,
                stands_in: false,
            });
        }
        Ok(Self {
            devices,
            asked: VecDeque::new(),
            others: VecDeque::new(),
            attentions,
            sockets,
            io_stops: Vec::new(),
        })
    }

    /// What each device's process does, in the devices' order.
    pub(super) fn workloads(&self) -> Vec<Workload> {
        self.devices
            .iter()
            .filter(|device| !matches!(device.process, Process::Unplugged) && !device.stands_in)
            .map(|device| Workload {
                device: device.spec.id().to_owned(),
                state: match device.process {
                    Process::Serving { .. } => "serving",
                    Process::Stopping { .. } => "stopping",
                    Process::Starting | Process::Handshaking { .. } | Process::Away(_) => {
                        "starting"
                    }
                    Process::Waiting(_) => "waiting",
                    Process::Foreign => "foreign",
                    Process::Failed | Process::Unplugged => "failed",
                },
                pid: device.process.pid(),
                ifname: None,
            })
            .collect()
    }

    /// Disks that the host failed.
    pub(super) fn stopped(&self) -> Vec<(String, IoStop)> {
        self.devices
            .iter()
            .filter_map(|device| match device.process {
                Process::Waiting(stop) => Some((device.spec.id().to_owned(), stop)),
                _ => None,
            })
            .collect()
    }

    /// Disks that the host has failed since the last call, so that the guest is to stop.
    pub(super) fn take_io_stops(&mut self) -> Vec<(String, IoStop)> {
        std::mem::take(&mut self.io_stops)
    }

    /// The guest goes on: disks that the host failed get another process, which tries again.
    pub(super) fn try_again(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        for index in 0..self.devices.len() {
            let device = &mut self.devices[index];
            if matches!(device.process, Process::Waiting(_)) {
                // Not one of the restarts that are limited: somebody asked for it.
                device.since = Some(Instant::now());
                self.ask(index, cx)?;
            }
        }
        Ok(())
    }

    /// Asks the broker for a process.
    fn ask(&mut self, index: usize, cx: &Context<'_>) -> Result<(), ClientError> {
        self.devices[index].process = Process::Starting;
        self.asked.push_back(Asked::Start(index));
        cx.broker.send(&Request::Start {
            index: index as u32,
        })
    }

    /// An event of one of the own tokens.
    pub(super) fn event(&mut self, token: u64, cx: &mut Context<'_>) -> Result<(), ClientError> {
        if let Some(index) = token.checked_sub(self.sockets) {
            return self.answered(index as usize, cx);
        }
        let index = (token - self.attentions) as usize;
        let wanted = self
            .devices
            .get(index)
            .is_some_and(|device| device.attention.take());
        if wanted { self.stop(index, cx) } else { Ok(()) }
    }

    /// Sends somebody else's request to the broker; the answer comes as [`Told::Answer`] with `number`.
    pub(super) fn request(
        &mut self,
        number: u64,
        request: &Request,
        fds: &[Arc<OwnedFd>],
        cx: &Context<'_>,
    ) -> Result<(), ClientError> {
        cx.broker.send_with(request, fds)?;
        self.asked.push_back(Asked::Other(number));
        Ok(())
    }

    /// The oldest message that is for others.
    pub(super) fn told(&mut self) -> Option<Told> {
        self.others.pop_front()
    }

    /// Watches over one device more, whose process `pid` serves: the one after all others.
    pub(super) fn add(
        &mut self,
        grant: &DeviceGrant,
        transport: &SharedTransport,
        most: u16,
        pid: i32,
        cx: &Context<'_>,
    ) -> Result<(), Errno> {
        let attention = lock(transport).attention().clone();
        cx.poller.add(
            borrow(attention.event()),
            self.attentions + self.devices.len() as u64,
            EpollFlags::EPOLLIN,
        )?;
        let index = self.devices.len() as u64;
        self.devices.push(Device {
            foreign: grant.is_foreign().then(|| grant.clone()),
            spec: grant.spec.clone(),
            transport: transport.clone(),
            attention,
            budget: Budget::new(most),
            process: serving(grant, pid),
            since: None,
            upgrade: None,
            retired: None,
            back: None,
            stands_in: false,
        });
        self.watch_foreign(grant, transport, index, cx)
    }

    /// Somebody else's daemon may leave.
    fn watch_foreign(
        &self,
        grant: &DeviceGrant,
        transport: &SharedTransport,
        index: u64,
        cx: &Context<'_>,
    ) -> Result<(), Errno> {
        match lock(transport).device_socket() {
            Some(socket) if grant.is_foreign() => {
                cx.poller
                    .add(socket, self.sockets + index, EpollFlags::EPOLLRDHUP)
            }
            _ => Ok(()),
        }
    }

    /// Another device is behind the registers of `index`, which was unplugged. `pid` serves.
    pub(super) fn replace(
        &mut self,
        index: usize,
        grant: &DeviceGrant,
        most: u16,
        pid: i32,
        cx: &Context<'_>,
    ) -> Result<(), Errno> {
        let Some(device) = self.devices.get_mut(index) else {
            return Ok(());
        };
        let attention = lock(&device.transport).attention().clone();
        if !Arc::ptr_eq(&attention, &device.attention) {
            cx.poller.remove(borrow(device.attention.event()))?;
            cx.poller.add(
                borrow(attention.event()),
                self.attentions + index as u64,
                EpollFlags::EPOLLIN,
            )?;
        }
        device.attention = attention;
        device.foreign = grant.is_foreign().then(|| grant.clone());
        device.spec = grant.spec.clone();
        device.budget = Budget::new(most);
        device.process = serving(grant, pid);
        device.stands_in = false;
        device.since = None;
        device.back = None;
        let transport = device.transport.clone();
        self.watch_foreign(grant, &transport, index as u64, cx)
    }

    /// Whether device `index` may be taken out now: not while one of its processes takes the place of another.
    pub(super) fn is_settled(&self, index: usize) -> bool {
        self.devices.get(index).is_some_and(|device| {
            // Nobody here waits for the end of somebody else's.
            let foreign = device.foreign.is_some();
            (foreign
                || matches!(
                    device.process,
                    Process::Serving { .. } | Process::Failed | Process::Foreign
                ))
                && device.upgrade.is_none()
        }) && !self.is_settling(index)
    }

    fn is_unplugged(&self, index: usize) -> bool {
        let device = self.devices.get(index);
        device.is_some_and(|device| matches!(device.process, Process::Unplugged))
    }

    /// Device `index` is taken out: its process is not missed any more.
    pub(super) fn unplug(&mut self, index: usize) {
        if let Some(device) = self.devices.get_mut(index) {
            device.process = Process::Unplugged;
            device.stands_in = false;
            // A vCPU that waits for this holds the transport's lock.
            device.attention.ended();
        }
    }

    /// The card at `index`, or the one that was taken out there, unless it is a daemon's.
    pub(super) fn card(&self, index: usize) -> Option<&NetSpec> {
        let device = self.devices.get(index)?;
        match &device.spec {
            DeviceSpec::Net(card) if device.foreign.is_none() => Some(card),
            _ => None,
        }
    }

    /// Process `pid` stands in for the card at `index`, which was taken out.
    pub(super) fn stands_in(&mut self, index: usize, pid: i32) {
        if let Some(device) = self.devices.get_mut(index) {
            device.process = Process::Serving { pid };
            device.stands_in = true;
        }
    }

    /// Whether somebody stands in for the card at `index`.
    pub(super) fn has_stand_in(&self, index: usize) -> bool {
        self.devices.get(index).is_some_and(|one| one.stands_in)
    }

    /// Somebody else's daemon is not there, or not as it should be.
    fn try_later(&mut self, index: usize) {
        let again = Instant::now() + Duration::from_millis(RECONNECT_MS);
        self.devices[index].process = Process::Away(again);
    }

    /// Ends processes that do not give their queues back, and waits for that. Guest memory may then get a new owner. The
    /// guest does not run meanwhile.
    pub(super) fn settle(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        for index in 0..self.devices.len() {
            if self.devices[index].attention.take() {
                self.stop(index, cx)?;
            }
            while matches!(self.devices[index].process, Process::Stopping { .. }) {
                let notice = cx.broker.wait()?;
                self.notice(notice, cx)?;
            }
        }
        Ok(())
    }

    /// Takes all queues back before the machine is reset.
    pub(super) fn take_back(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        for device in &self.devices {
            // One that does not obey asks for attention.
            lock(&device.transport).take_back();
        }
        self.settle(cx)
    }

    /// When the next process that is asked for something has to have answered.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.devices
            .iter()
            .filter_map(|device| match &device.process {
                Process::Handshaking { handshake, .. } => Some(handshake.deadline()),
                Process::Away(again) => Some(*again),
                _ => {
                    let coming = device.upgrade.as_ref()?.coming.as_ref()?;
                    Some(coming.handshake.deadline())
                }
            })
            .min()
    }

    /// Ends processes whose time is over.
    pub(super) fn overdue(&mut self, cx: &mut Context<'_>) -> Result<(), ClientError> {
        let now = Instant::now();
        for index in 0..self.devices.len() {
            if matches!(self.devices[index].process, Process::Away(again) if again <= now) {
                self.devices[index].process = Process::Starting;
                self.asked.push_back(Asked::Start(index));
                cx.broker.send(&Request::Start {
                    index: index as u32,
                })?;
            }
            let coming = self.devices[index].upgrade.as_ref();
            let coming = coming.and_then(|upgrade| upgrade.coming.as_ref());
            if coming.is_some_and(|coming| coming.handshake.deadline() <= now) {
                self.give_up(index, "the new one does not answer in time", cx)?;
            }
            let late = match &self.devices[index].process {
                Process::Handshaking { handshake, .. } => handshake.deadline() <= now,
                _ => false,
            };
            if late {
                self.answered(index, cx)?;
            }
        }
        Ok(())
    }

    /// Asks the broker to end the process.
    fn stop(&mut self, index: usize, cx: &mut Context<'_>) -> Result<(), ClientError> {
        if self.is_taking_over(index) {
            // Perhaps it is gone by now, as it should.
            if let Some(upgrade) = &mut self.devices[index].upgrade {
                upgrade.unwell = true;
            }
            return Ok(());
        }
        self.give_up(index, "that one does not answer either and is replaced", cx)?;
        let device = &mut self.devices[index];
        if matches!(device.process, Process::Foreign) {
            self.left(index, cx);
            return Ok(());
        }
        if device.foreign.is_some() {
            if matches!(device.process, Process::Handshaking { .. }) {
                self.try_later(index);
            }
            return Ok(());
        }
        let Some(pid) = device.process.pid() else {
            return Ok(());
        };
        if matches!(device.process, Process::Stopping { .. }) {
            return Ok(());
        }
        warn!(
            "device {}: process {pid} does not answer as it should and is ended",
            device.spec.id()
        );
        device.since.get_or_insert_with(Instant::now);
        // A handshake's socket leaves the poller by being closed.
        device.process = Process::Stopping { pid, how: None };
        cx.broker.send(&Request::Stop {
            index: index as u32,
        })
    }

    /// The process is reaped: another one takes its place, or none.
    fn ended(
        &mut self,
        index: usize,
        how: Option<Exit>,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientError> {
        let taking_over = self.is_taking_over(index);
        if !taking_over {
            self.give_up(index, "that one has ended and is replaced", cx)?;
        }
        let device = &mut self.devices[index];
        // A vCPU that waits for this holds the transport's lock.
        device.attention.ended();
        lock(&device.transport).device_gone();
        if std::mem::take(&mut device.stands_in) {
            device.process = Process::Unplugged;
            warn!("nobody answers the driver of window {index} any more");
            return Ok(());
        }
        if let (DeviceSpec::Block(disk), Some(Exit::Code(status))) = (&device.spec, how)
            && let Some(stop) = IoStop::from_status(status)
            && (if stop.write {
                disk.io.werror
            } else {
                disk.io.rerror
            })
            .stops(stop.no_space)
        {
            self.io_stops.push((disk.id.clone(), stop));
            device.process = Process::Waiting(stop);
            return Ok(());
        }
        device.since.get_or_insert_with(Instant::now);
        if let Some(pid) = device.process.pid() {
            cx.qmp.emit(&Event::DeviceCrashed {
                device: device.spec.id().to_owned(),
                pid,
                how,
                in_flight: lock(&device.transport).core().in_flight(),
            });
        }
        if taking_over {
            // What the broker says next starts another one, or is one.
            device.process = Process::Starting;
            return Ok(());
        }
        self.start(index, cx)
    }

    fn start(&mut self, index: usize, cx: &mut Context<'_>) -> Result<(), ClientError> {
        let device = &mut self.devices[index];
        if device.budget.take(Instant::now()) {
            return self.ask(index, cx);
        }
        let reason = match device.budget.most {
            0 => "it is not to be restarted (restart=off)".to_owned(),
            most => format!(
                "it was restarted {most} times within {} s (max-restarts={most})",
                RESTART_WINDOW_MS / 1000
            ),
        };
        let id = device.spec.id().to_owned();
        error!("device {id}: given up: {reason}");
        device.process = Process::Failed;
        lock(&device.transport).device_lost();
        cx.qmp.emit(&Event::DeviceFailed { device: id, reason });
        Ok(())
    }

    fn started(
        &mut self,
        index: usize,
        pid: i32,
        socket: UnixStream,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientError> {
        let unplugged = self.is_unplugged(index);
        let Some(device) = self.devices.get_mut(index).filter(|_| !unplugged) else {
            return Ok(());
        };
        let begun = match &device.foreign {
            Some(grant) => Handshake::begin_for(socket, grant),
            None => Handshake::begin(socket, &device.spec),
        };
        match begun {
            Ok(handshake) => {
                let watched =
                    cx.poller
                        .add(&handshake, self.sockets + index as u64, EpollFlags::EPOLLIN);
                device.process = Process::Handshaking {
                    pid,
                    handshake: Box::new(handshake),
                };
                if let Err(e) = watched {
                    error!("device {}: epoll_ctl: {}", device.spec.id(), e.desc());
                    return self.stop(index, cx);
                }
                Ok(())
            }
            Err(e) if device.foreign.is_some() => {
                debug!("{}", with_causes(&e));
                self.try_later(index);
                Ok(())
            }
            Err(e) => {
                device.process = Process::Serving { pid };
                self.complain(index, &e, cx)
            }
        }
    }

    /// The connection to somebody else's daemon is over, by its will or because it does not do as it should.
    fn left(&mut self, index: usize, cx: &Context<'_>) {
        let device = &mut self.devices[index];
        // A vCPU that waits for this holds the transport's lock.
        device.attention.ended();
        let mut transport = lock(&device.transport);
        transport.device_gone();
        let id = device.spec.id().to_owned();
        cx.qmp
            .emit(&Event::BackEndDisconnected { device: id.clone() });
        if device.budget.most > 0 {
            device.since.get_or_insert_with(Instant::now);
            let pause = Duration::from_millis(RECONNECT_MS);
            // One that leaves as soon as it has its queues would otherwise be asked without a pause.
            let again = match device.back {
                Some(back) => Instant::now().max(back + pause),
                None => Instant::now(),
            };
            device.process = Process::Away(again);
            error!(
                "device {id}: its daemon has left, or does not answer as it should; its socket is tried again"
            );
            // Nobody here knows its number.
            cx.qmp.emit(&Event::DeviceCrashed {
                device: id,
                pid: 0,
                how: None,
                in_flight: transport.core().in_flight(),
            });
            return;
        }
        device.process = Process::Failed;
        transport.device_lost();
        let reason = "its daemon has left, or does not answer as it should".to_owned();
        error!("device {id}: given up: {reason}");
        cx.qmp.emit(&Event::DeviceFailed { device: id, reason });
    }

    /// A handshake goes on, or its time is over.
    fn answered(&mut self, index: usize, cx: &mut Context<'_>) -> Result<(), ClientError> {
        let Some(device) = self.devices.get_mut(index) else {
            return Ok(());
        };
        if matches!(device.process, Process::Foreign) {
            self.left(index, cx);
            return Ok(());
        }
        if device.upgrade.is_some() && !matches!(device.spec, DeviceSpec::Fs(_)) {
            return self.coming_answered(index, cx);
        }
        let Process::Handshaking { pid, handshake } = &mut device.process else {
            return Ok(());
        };
        let pid = *pid;
        match handshake.advance() {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            Err(e) => return self.complain(index, &e, cx),
        }
        let next = if device.foreign.is_some() {
            Process::Foreign
        } else {
            Process::Serving { pid }
        };
        let process = std::mem::replace(&mut device.process, next);
        let Process::Handshaking { handshake, .. } = process else {
            return Ok(());
        };
        if let Err(e) = cx.poller.remove(&*handshake) {
            error!("device {}: epoll_ctl: {}", device.spec.id(), e.desc());
            return self.stop(index, cx);
        }
        let back = handshake
            .finish()
            .and_then(|fresh| lock(&device.transport).device_back(fresh));
        match back {
            Ok(true) => {
                device.back = Some(Instant::now());
                let stall = device
                    .since
                    .take()
                    .map_or(Duration::ZERO, |since| since.elapsed());
                let id = device.spec.id().to_owned();
                if device.foreign.is_some()
                    && let Some(socket) = lock(&device.transport).device_socket()
                    && let Err(e) =
                        cx.poller
                            .add(socket, self.sockets + index as u64, EpollFlags::EPOLLRDHUP)
                {
                    error!("device {id}: epoll_ctl: {}", e.desc());
                }
                if device.foreign.is_some() {
                    cx.qmp.emit(&Event::BackEndConnected { device: id.clone() });
                }
                info!(
                    "device {id}: process {pid} goes on after {:.1} ms",
                    stall.as_secs_f64() * 1000.0
                );
                if let Some(upgrade) = device.upgrade.take() {
                    cx.qmp.emit(&Event::DeviceUpgraded {
                        device: id,
                        pid,
                        stall,
                    });
                    upgrade.reply.send(Ok(()));
                    return Ok(());
                }
                cx.qmp.emit(&Event::DeviceRecovered {
                    device: id,
                    pid,
                    stall,
                });
                Ok(())
            }
            // It failed when it got its queues, and asks for attention.
            Ok(false) => Ok(()),
            Err(e) => self.complain(index, &e, cx),
        }
    }

    fn complain(
        &mut self,
        index: usize,
        error: &RemoteError,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientError> {
        error!("{}", with_causes(error));
        self.stop(index, cx)
    }
}
