//! The broker's own loop.
//!
//! **Job.** Take the policy, then serve requests, relay device log lines, and tell the control process when a device
//! process ends. When the channel closes, everything that belongs to this VM is ended and removed.
//! **Who is not trusted**: the control process after the policy; device processes always.
//! **Why this way.** One thread and one `poll`: the jail's `clone3` needs a single-threaded parent, and there is nothing here
//! that could wait for anything else.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::Instant;

use ipc::PROTOCOL_VERSION;
use ipc::channel::{Channel, ChannelError};
use ipc::control::added::{Addition, AdditionGrant};
use ipc::control::{BackendGrant, DeviceGrant, FileGrant, Policy, Reply, Request};
use ipc::limits::MAX_MMIO_DEVICES;
use ipc::log::{debug, error};
use ipc::spec::DeviceSpec;
use ipc::spec::block::ImageFormat;
use ipc::spec::net::{NetLimits, NetSpec};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::added::{Added, OtherTap};
use super::cleanup::Cleanup;
use super::devices::{Devices, Order, Succession};
use super::inspect::{self, Witness};
use super::log_target;
use super::open;
use super::snapshot::{self, Draft};
use crate::lifecycle::{close_all_but, filter, with_causes};

/// First argument of a process that is a broker.
pub(super) const ROLE: &str = "stratovirt-broker";

/// The number of the channel's descriptor, if these arguments are a broker's.
pub fn is_broker(args: &[std::ffi::OsString]) -> Option<RawFd> {
    let [role, number] = args else { return None };
    (role == ROLE)
        .then(|| number.to_str()?.parse().ok())
        .flatten()
}

/// Descriptors that the VM was started with, for `-netdev fd=` and `-chardev socket,fd=`.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    fds: Vec<OwnedFd>,
}

impl Inherited {
    /// Keeps the open ones among `numbers` and closes every other descriptor above standard error but `channel`.
    #[allow(unsafe_code)] // inherited descriptors are numbers
    fn keep(numbers: &[RawFd], channel: RawFd) -> Self {
        let mut kept: Vec<RawFd> = numbers
            .iter()
            .copied()
            .filter(|&fd| {
                // SAFETY: only asks whether the number is open.
                fd > 2 && fd != channel && unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0
            })
            .collect();
        kept.sort_unstable();
        kept.dedup();
        close_all_but(&[kept.as_slice(), &[channel]].concat());
        for &fd in &kept {
            // SAFETY: changes a flag of a descriptor that was just found open; close-on-exec keeps it away from device
            // processes that it is not for.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        let own = |fd| {
            // SAFETY: each number was just found open, is there once, and has no other owner.
            unsafe { OwnedFd::from_raw_fd(fd) }
        };
        Self {
            fds: kept.into_iter().map(own).collect(),
        }
    }

    /// The descriptor with this number itself, once.
    pub(super) fn take(&mut self, number: RawFd) -> Option<OwnedFd> {
        let at = self.fds.iter().position(|fd| fd.as_raw_fd() == number)?;
        Some(self.fds.swap_remove(at))
    }

    /// A duplicate of the descriptor with this number: the first stays here for a restart of the device.
    pub(super) fn duplicate(&self, number: RawFd) -> Option<OwnedFd> {
        self.fds
            .iter()
            .find(|fd| fd.as_raw_fd() == number)?
            .try_clone()
            .ok()
    }
}

/// Runs as the broker on an inherited channel until the control process is gone.
#[allow(unsafe_code)] // the channel is an inherited number
pub fn run(channel: RawFd) -> ExitCode {
    // SAFETY: only asks whether the number is open.
    if channel < 3 || unsafe { libc::fcntl(channel, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        let _ = writeln!(
            std::io::stderr(),
            "stratovirt-broker is started by stratovirt, not by hand"
        );
        return ExitCode::FAILURE;
    }
    // SAFETY: the control process passed this descriptor to this process alone, as its argument says.
    let channel = Channel::from_fd(unsafe { OwnedFd::from_raw_fd(channel) });
    // It was executed through a link of /proc, whose name would else be shown in process lists.
    let _ = nix::sys::prctl::set_name(c"broker");
    // A terminal's signals are for the control process; the broker ends when that one has.
    let _ = nix::unistd::setsid();
    for ignored in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGPIPE,
        Signal::SIGTTOU,
    ] {
        // SAFETY: ignoring a signal runs no handler.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    match take_policy(channel) {
        Ok(mut broker) => broker.serve(),
        Err(ChannelError::Closed) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "stratovirt-broker: {e}");
            ExitCode::FAILURE
        }
    }
}

fn take_policy(channel: Channel) -> Result<Broker, ChannelError> {
    let (request, _) = channel.receive::<Request>()?;
    let Request::SetPolicy(mut policy) = request else {
        channel.send(
            &Reply::Failed {
                message: "the policy must come first".into(),
            },
            &[],
        )?;
        return Err(ChannelError::Closed);
    };
    if policy.version != PROTOCOL_VERSION {
        let message = format!(
            "control process speaks protocol version {}, this broker {PROTOCOL_VERSION}",
            policy.version
        );
        channel.send(&Reply::Failed { message }, &[])?;
        return Err(ChannelError::Closed);
    }
    let wanted: Vec<RawFd> = policy
        .devices
        .iter()
        .filter_map(|device| match &device.backend {
            BackendGrant::Inherited { fds } => Some(fds.as_slice()),
            _ => None,
        })
        .flatten()
        .chain(policy.vhost_fds.iter().flat_map(|(_, fds)| fds))
        .copied()
        .chain(policy.files.iter().filter_map(|file| match file {
            FileGrant::InheritedSocket { fd, .. } => Some(*fd),
            _ => None,
        }))
        .collect();
    let inherited = Inherited::keep(&wanted, channel.as_fd().as_raw_fd());
    let added = match Added::new(&policy.additions) {
        Ok(added) => added,
        Err(message) => {
            channel.send(&Reply::Failed { message }, &[])?;
            return Err(ChannelError::Closed);
        }
    };
    let mut cleanup = Cleanup::default();
    if policy.restore_terminal {
        cleanup.terminal();
    }
    let log = match &policy.log_file {
        None => log_target::standard_error(),
        Some(path) => open::log(path),
    };
    let log = match log {
        Ok(fd) => fd,
        Err(e) => {
            let path = policy.log_file.clone().unwrap_or_default();
            let message = format!("-D {}: cannot open for appending: {e}", path.display());
            channel.send(&Reply::Failed { message }, &[])?;
            return Err(ChannelError::Closed);
        }
    };
    channel.send(
        &Reply::PolicySet {
            version: PROTOCOL_VERSION,
        },
        &[log.as_fd()],
    )?;
    ipc::log::init("broker", policy.log_level, log);
    let devices = Devices::new(policy.devices.len() + policy.additions.devices as usize);
    if let Err(e) = nix::sys::prctl::set_dumpable(false) {
        error!("dumps cannot be switched off: {}", e.desc());
        return Err(ChannelError::Closed);
    }
    if let Err(e) = super::rights::narrow(&policy) {
        error!("capabilities that the policy gives no use for cannot be dropped: {e}");
        return Err(ChannelError::Closed);
    }
    let folders = policy
        .devices
        .iter()
        .any(|device| matches!(device.backend, BackendGrant::Folder { .. }))
        || policy
            .additions
            .grants
            .iter()
            .any(|grant| matches!(grant, AdditionGrant::Folders { .. }));
    // Its children inherit it, and those that serve folders take many calls.
    let own = if folders {
        seccomp_policies::Policy::BrokerFs
    } else {
        seccomp_policies::Policy::Broker
    };
    if let Err(e) = filter(own, policy.seccomp) {
        error!("{}", with_causes(&e));
        return Err(ChannelError::Closed);
    }
    let vhost_fds = std::mem::take(&mut policy.vhost_fds);
    Ok(Broker {
        channel,
        policy,
        vhost_fds: vhost_fds.into_iter().collect(),
        vhost_given: BTreeSet::new(),
        inherited,
        added,
        plugged: BTreeMap::new(),
        taken_out: BTreeMap::new(),
        cleanup,
        devices,
        holds: BTreeMap::new(),
        kept: BTreeMap::new(),
        taps: BTreeMap::new(),
        given: BTreeMap::new(),
        draft: None,
        witness: None,
    })
}

struct Broker {
    channel: Channel,
    policy: Policy,
    /// Numbers of descriptors of vhost-net that are still here, by their device.
    vhost_fds: BTreeMap<u32, Vec<i32>>,
    /// Devices whose process has such descriptors.
    vhost_given: BTreeSet<u32>,
    inherited: Inherited,
    /// Back ends that were added.
    added: Added,
    /// Devices that were plugged, by their index.
    plugged: BTreeMap<u32, DeviceGrant>,
    /// Devices that were taken out: others may have their places, also those of the policy's.
    taken_out: BTreeMap<u32, DeviceGrant>,
    cleanup: Cleanup,
    devices: Devices,
    /// Images that were opened, by their device, for a restart.
    holds: BTreeMap<u32, open::Hold>,
    /// What the processes that run were given, for those that take their place while they do.
    kept: BTreeMap<u32, Vec<OwnedFd>>,
    /// Taps of processes that are about to take the place of those that serve, with those of their queues that were opened by name.
    taps: BTreeMap<u32, (OtherTap, Vec<OwnedFd>)>,
    /// Taps that cards of the command line were given since.
    given: BTreeMap<u32, Vec<OwnedFd>>,
    /// A snapshot that is being written.
    draft: Option<Draft>,
    /// What the control process showed of itself at lock-down.
    witness: Option<Witness>,
}

/// Descriptors of the kernel's vhost-net for a process of a card that needs some. Each process has its own, so that what one that was
/// killed had ends with it.
fn vhost(
    grant: &DeviceGrant,
    given: Option<Vec<i32>>,
    inherited: &mut Inherited,
) -> Result<Vec<OwnedFd>, String> {
    match (&grant.spec, given) {
        (DeviceSpec::Net(card), Some(fds)) if card.vhost => {
            open::given_vhost(&fds, inherited, &card.id)
        }
        (DeviceSpec::Net(card), None) if card.vhost => open::vhost(card.queue_pairs, &card.id),
        _ => Ok(Vec::new()),
    }
}

/// Memory through which device processes give what they hold, for a control process that may make none by then.
fn exchange_memory(count: u32) -> Result<Vec<OwnedFd>, String> {
    if count as usize > MAX_MMIO_DEVICES {
        return Err(format!(
            "memory for {count} devices is more than for {MAX_MMIO_DEVICES}"
        ));
    }
    (0..count)
        .map(|_| memfd_create(c"device-state", MFdFlags::MFD_CLOEXEC))
        .collect::<Result<_, _>>()
        .map_err(|e| format!("memory for the state of devices: {}", e.desc()))
}

impl Broker {
    fn serve(&mut self) -> ExitCode {
        loop {
            match self.step() {
                Ok(()) => {}
                Err(ChannelError::Closed) => break,
                Err(e) => {
                    error!("control channel: {e}");
                    break;
                }
            }
        }
        debug!("control process is gone: ending its device processes");
        self.devices.end_all();
        ExitCode::SUCCESS
    }

    /// Waits for one round of events and handles them.
    fn step(&mut self) -> Result<(), ChannelError> {
        let (request_waits, ready) = {
            let watched: Vec<(usize, BorrowedFd<'_>)> = self.devices.watched().collect();
            let mut polled = vec![PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
            polled.extend(
                watched
                    .iter()
                    .map(|(_, fd)| PollFd::new(*fd, PollFlags::POLLIN)),
            );
            let heirs = self.devices.heirs_deadline();
            let timeout = heirs.map_or(PollTimeout::NONE, |deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                // A millisecond more: what was waited for is over then.
                let left = left.as_millis().saturating_add(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut polled, timeout) {
                Ok(_) => {}
                Err(Errno::EINTR) => return Ok(()),
                Err(source) => {
                    return Err(ChannelError::Socket {
                        call: "poll",
                        source,
                    });
                }
            }
            let fired = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
            let ready: Vec<usize> = watched
                .iter()
                .zip(&polled[1..])
                .filter(|(_, fd)| fired(fd))
                .map(|((index, _), _)| *index)
                .collect();
            (fired(&polled[0]), ready)
        };
        for index in ready {
            for news in [self.devices.handle(index), self.devices.handle_newer(index)]
                .into_iter()
                .flatten()
            {
                if !self.devices.is_running(index) {
                    // An image is to be locked, and a tap attached to, no longer than somebody uses it.
                    self.kept.remove(&(index as u32));
                }
                self.channel.send(&news, &[])?;
            }
        }
        for index in self.devices.heirs() {
            if let Some(succession) = self.devices.follow_heir(index) {
                self.succeed(index as u32, succession)?;
            }
        }
        if request_waits && let Some((request, fds)) = self.channel.try_receive::<Request>()? {
            self.answer(&request, fds)?;
            if matches!(request, Request::Ready) {
                // The way here ran through most of the program; a broker that waits needs little of it.
                ozone::give_code_back();
            }
        }
        Ok(())
    }

    /// Tells what came of the upgrade of a shared folder.
    fn succeed(&self, index: u32, succession: Succession) -> Result<(), ChannelError> {
        match succession {
            Ok((socket, pid)) => self
                .channel
                .send(&Reply::Started { index, pid }, &[socket.as_fd()]),
            Err(message) => self.channel.send(&Reply::GoesOn { index, message }, &[]),
        }
    }

    fn answer(&mut self, request: &Request, fds: Vec<OwnedFd>) -> Result<(), ChannelError> {
        let outcome = match request {
            Request::SetPolicy(_) => Err("the policy is fixed".into()),
            Request::Open { index } => self.open(*index),
            Request::Start { index } => self.start(*index),
            Request::Stop { index } => {
                let stopped = self.devices.stop(*index as usize);
                self.kept.remove(index);
                stopped.map(|()| (Reply::Stopped { index: *index }, None))
            }
            Request::Upgrade { index } => match self.upgrade(*index) {
                Ok(Some((socket, pid))) => {
                    Ok((Reply::Started { index: *index, pid }, Some(socket)))
                }
                // Its answer follows.
                Ok(None) => return Ok(()),
                Err(message) if self.is_folder(*index) => {
                    return self.succeed(*index, Err(message));
                }
                Err(message) => Err(message),
            },
            Request::Replace { index, addition } => self
                .replace(*index, addition, fds)
                .map(|(socket, pid)| (Reply::Started { index: *index, pid }, Some(socket))),
            Request::Settle { index, newer } => self.settle(*index, *newer),
            Request::Resize { index, size } => self
                .resize(*index, *size)
                .map(|()| (Reply::Resized { index: *index }, None)),
            Request::DumpFile { folder, name } => {
                snapshot::dump_file(self.policy.snapshots.as_ref(), *folder, name)
                    .map(|file| (Reply::DumpFile, Some(file)))
            }
            Request::Add { backend, addition } => self
                .added
                .add(*backend, addition, fds)
                .map(|()| (Reply::Added { backend: *backend }, None)),
            Request::Remove { backend } => self
                .added
                .remove(*backend)
                .map(|()| (Reply::Removed { backend: *backend }, None)),
            Request::Plug {
                index,
                backend,
                below,
                spec,
                iothread,
            } => self.plug(*index, (*backend, below), spec, *iothread),
            Request::Unplug { index } => self.unplug(*index),
            Request::StandIn { index, features } => self.stand_in(*index, *features),
            Request::Ready => self.ready(),
            Request::Inspect => return self.inspect(),
            Request::SnapshotBegin {
                folder,
                name,
                exchanges,
            } => {
                return self.begin_snapshot(*folder, name.as_deref(), *exchanges);
            }
            Request::SnapshotEnd { keep } => return self.end_snapshot(*keep),
        };
        match outcome {
            Ok((reply, fd)) => self
                .channel
                .send(&reply, &fd.iter().map(AsFd::as_fd).collect::<Vec<_>>()),
            Err(message) => self.channel.send(&Reply::Failed { message }, &[]),
        }
    }

    fn open(&mut self, index: u32) -> Result<(Reply, Option<OwnedFd>), String> {
        let grant = self
            .policy
            .files
            .get(index as usize)
            .ok_or_else(|| format!("the policy has no file {index}"))?;
        let opened = open::file(grant, &self.inherited, &mut self.cleanup)?;
        Ok((
            Reply::Opened {
                index,
                name: opened.name,
            },
            Some(opened.fd),
        ))
    }

    fn start(&mut self, index: u32) -> Result<(Reply, Option<OwnedFd>), String> {
        let grant = match self.plugged.get(&index) {
            Some(grant) => grant,
            None => self
                .policy
                .devices
                .get(index as usize)
                .ok_or_else(|| format!("the policy has no device {index}"))?,
        };
        // The kernel serves the queues on for whoever holds these open, and two would serve them then.
        if self.vhost_given.contains(&index) {
            return Err(format!(
                "device {}: its process had the descriptors of -netdev vhostfd=, which whoever passed them may still hold open; \
                 no other process can have its queues",
                grant.spec.id()
            ));
        }
        // What is in use can be neither locked nor attached to again.
        self.kept.remove(&index);
        // Another file at the same path would be another disk, in the middle of the guest's work.
        let backend = match (self.holds.get(&index), &grant.backend) {
            (_, BackendGrant::Given) => self.given(index)?,
            (_, BackendGrant::Socket { .. }) if self.plugged.contains_key(&index) => {
                vec![self.added.connection(index)?]
            }
            (Some(hold), _) => hold.reopen(&grant.backend)?,
            (None, _) => open::backend(&grant.backend, grant.spec.id(), &self.inherited)?,
        };
        if !self.holds.contains_key(&index)
            && let Some(hold) = open::Hold::on(&grant.backend, &backend)?
        {
            self.holds.insert(index, hold);
        }
        if grant.is_foreign() {
            return Ok((Reply::Started { index, pid: 0 }, backend.into_iter().next()));
        }
        let kept = match grant.backend {
            BackendGrant::Image { .. } | BackendGrant::Tap { .. } => duplicates(&backend)?,
            _ => Vec::new(),
        };
        let mut backend = backend;
        let given = self.vhost_fds.remove(&index);
        if given.is_some() {
            self.vhost_given.insert(index);
        }
        backend.extend(vhost(grant, given, &mut self.inherited)?);
        let order = Order {
            grant,
            backend,
            policy: &self.policy,
        };
        let (socket, pid) = self.devices.start(index as usize, order)?;
        if !kept.is_empty() {
            self.kept.insert(index, kept);
        }
        Ok((Reply::Started { index, pid }, Some(socket)))
    }

    /// The socket and the process id of another process beside the one that serves; `None` if they are told later.
    fn upgrade(&mut self, index: u32) -> Result<Option<(OwnedFd, i32)>, String> {
        let grant = match self.plugged.get(&index) {
            Some(grant) => grant,
            None => self
                .policy
                .devices
                .get(index as usize)
                .ok_or_else(|| format!("the policy has no device {index}"))?,
        };
        let backend = match (&grant.backend, self.kept.get(&index)) {
            (BackendGrant::Given, _) => self.given(index)?,
            // The very same: a second lock on the image or a second user of the tap would be refused.
            (BackendGrant::Image { .. } | BackendGrant::Tap { .. }, Some(kept)) => {
                duplicates(kept)?
            }
            (BackendGrant::Folder { .. }, _) => match self.holds.get(&index) {
                Some(hold) => hold.reopen(&grant.backend)?,
                None => open::backend(&grant.backend, grant.spec.id(), &self.inherited)?,
            },
            (BackendGrant::Nothing | BackendGrant::Inherited { .. }, _) => {
                open::backend(&grant.backend, grant.spec.id(), &self.inherited)?
            }
            _ => {
                return Err(format!(
                    "device {}: no other process can take the place of this one",
                    grant.spec.id()
                ));
            }
        };
        let mut backend = backend;
        backend.extend(vhost(grant, None, &mut self.inherited)?);
        let order = Order {
            grant,
            backend,
            policy: &self.policy,
        };
        let at = index as usize;
        match grant.spec {
            DeviceSpec::Fs(_) => self.devices.take_over(at, order).map(|()| None),
            _ => self.devices.upgrade(at, order).map(Some),
        }
    }

    /// Descriptors for device `index` that came from a client.
    fn given(&self, index: u32) -> Result<Vec<OwnedFd>, String> {
        match self.given.get(&index) {
            Some(fds) => duplicates(fds),
            None => self.added.duplicates(index),
        }
    }

    /// The socket and the process id of another process of a card, beside the one that serves, with another tap.
    fn replace(
        &mut self,
        index: u32,
        addition: &Addition,
        fds: Vec<OwnedFd>,
    ) -> Result<(OwnedFd, i32), String> {
        let grant = self.plugged.get(&index);
        let grant = grant.or_else(|| self.policy.devices.get(index as usize));
        let grant = grant.ok_or_else(|| format!("the policy has no device {index}"))?;
        let DeviceSpec::Net(card) = &grant.spec else {
            return Err(format!("device {} is no card", grant.spec.id()));
        };
        if grant.is_foreign() {
            return Err(format!("device {} is nobody's here", card.id));
        }
        let tap = self.added.tap(card.queue_pairs, addition, fds)?;
        let (kept, mut backend) = match &tap.grant {
            BackendGrant::Given => (Vec::new(), duplicates(&tap.given)?),
            named => {
                let opened = open::backend(named, &card.id, &self.inherited)?;
                (duplicates(&opened)?, opened)
            }
        };
        backend.extend(vhost(grant, None, &mut self.inherited)?);
        let order = Order {
            grant,
            backend,
            policy: &self.policy,
        };
        let started = self.devices.replace(index as usize, order)?;
        self.taps.insert(index, (tap, kept));
        Ok(started)
    }

    /// Card `index` has the tap of the process that took another one's place, and lets go of the one before.
    fn retap(&mut self, index: u32, (tap, kept): (OtherTap, Vec<OwnedFd>)) {
        self.kept.remove(&index);
        if !kept.is_empty() {
            self.kept.insert(index, kept);
        }
        let grant = match self.plugged.get_mut(&index) {
            Some(grant) => Some(grant),
            None => self.policy.devices.get_mut(index as usize),
        };
        let Some(grant) = grant else {
            return;
        };
        let before = std::mem::replace(&mut grant.backend, tap.grant.clone());
        if let BackendGrant::Inherited { fds } = before {
            // They are no other card's, as the command line was checked for.
            for number in fds {
                self.inherited.take(number);
            }
        }
        self.given.remove(&index);
        // One of the command line was not added.
        if let Some(tap) = self.added.retap(index, tap)
            && !tap.given.is_empty()
        {
            self.given.insert(index, tap.given);
        }
    }

    /// Whether device `index` is a folder that this process shares.
    fn is_folder(&self, index: u32) -> bool {
        let plugged = self.plugged.get(&index);
        let grant = plugged.or_else(|| self.policy.devices.get(index as usize));
        grant.is_some_and(|grant| matches!(grant.spec, DeviceSpec::Fs(_)))
    }

    /// Makes a disk's image longer, as far as the command line allowed it.
    fn resize(&self, index: u32, size: u64) -> Result<(), String> {
        let grant = self.plugged.get(&index);
        let grant = grant.or_else(|| self.policy.devices.get(index as usize));
        let disk = match grant.map(|grant| &grant.spec) {
            Some(DeviceSpec::Block(disk)) if disk.io.format == ImageFormat::Raw => disk,
            Some(DeviceSpec::Block(disk)) => {
                return Err(format!("device {}: its image is no raw one", disk.id));
            }
            Some(other) => return Err(format!("device {} is no disk", other.id())),
            None => return Err(format!("the policy has no device {index}")),
        };
        let duplicates;
        let image = match self.kept.get(&index) {
            Some(kept) => kept.first(),
            None => {
                duplicates = self.added.duplicates(index)?;
                duplicates.first()
            }
        }
        .ok_or_else(|| format!("device {}: its image is not here", disk.id))?;
        // What the command line says of a disk is not said of one that has its place.
        let growing = self.policy.growing.iter();
        let mut growing = growing.filter(|_| !self.plugged.contains_key(&index));
        let most = growing.find(|(at, _)| *at == index);
        super::resize::resize(image, disk.readonly, most.map(|(_, most)| *most), size)
            .map_err(|e| format!("device {}: {e}", disk.id))
    }

    fn settle(&mut self, index: u32, newer: bool) -> Result<(Reply, Option<OwnedFd>), String> {
        let ended = self.devices.settle_on(index as usize, newer)?;
        if newer {
            // It has its own, and has the queues from the one before, which gave them back.
            self.vhost_given.remove(&index);
        }
        // The old process is gone, and its tap is free when this is answered; or the new one is, and so is that.
        if let Some(tap) = self.taps.remove(&index)
            && newer
        {
            self.retap(index, tap);
        }
        if !self.devices.is_running(index as usize) {
            self.kept.remove(&index);
        }
        Ok((Reply::Settled { index, ended }, None))
    }

    fn begin_snapshot(
        &mut self,
        folder: u32,
        name: Option<&str>,
        exchanges: u32,
    ) -> Result<(), ChannelError> {
        // One that was not ended is given up.
        self.draft = None;
        let begun = exchange_memory(exchanges).and_then(|exchanges| {
            let draft = Draft::begin(self.policy.snapshots.as_ref(), folder, name)?;
            Ok((draft, exchanges))
        });
        match begun {
            Ok((draft, exchanges)) => {
                let mut files = draft.files().to_vec();
                files.extend(exchanges.iter().map(AsFd::as_fd));
                let sent = self.channel.send(&Reply::SnapshotBegun, &files);
                self.draft = Some(draft);
                sent
            }
            Err(message) => self.channel.send(&Reply::SnapshotFailed { message }, &[]),
        }
    }

    fn end_snapshot(&mut self, keep: bool) -> Result<(), ChannelError> {
        let ended = match self.draft.take() {
            Some(draft) if keep => draft.keep(),
            Some(_) => Ok(()),
            None => Err("no snapshot is being written".into()),
        };
        let reply = match ended {
            Ok(()) => Reply::SnapshotEnded,
            Err(message) => Reply::SnapshotFailed { message },
        };
        self.channel.send(&reply, &[])
    }

    /// Makes an added back end a device. What a failure leaves behind is nothing.
    fn plug(
        &mut self,
        index: u32,
        (backend, below): (u32, &[u32]),
        spec: &DeviceSpec,
        iothread: Option<u32>,
    ) -> Result<(Reply, Option<OwnedFd>), String> {
        let first = self.policy.devices.len() as u32;
        let all = first + self.policy.additions.devices;
        let free = (first..all).contains(&index) || self.taken_out.contains_key(&index);
        if !free || self.plugged.contains_key(&index) {
            return Err(format!("device {index} is not one that can be plugged now"));
        }
        if let Some(number) = iothread
            && number as usize >= self.policy.iothreads.len()
        {
            return Err(format!("the policy has no iothread {number}"));
        }
        let parts = self.added.give(backend, below, index, spec)?;
        if let Some(hold) = parts.hold {
            self.holds.insert(index, hold);
        }
        self.plugged.insert(
            index,
            DeviceGrant {
                spec: spec.clone(),
                backend: parts.grant,
                iothread,
            },
        );
        let started = self.start(index);
        if started.is_err() {
            self.forget(index);
        }
        started
    }

    fn unplug(&mut self, index: u32) -> Result<(Reply, Option<OwnedFd>), String> {
        self.devices.stop(index as usize)?;
        if let Some(grant) = self.plugged.remove(&index) {
            self.taken_out.insert(index, grant);
        } else if let Some(grant) = self.policy.devices.get(index as usize) {
            // Not if that was another one, of which this is what stood in for it.
            self.taken_out.entry(index).or_insert_with(|| grant.clone());
        }
        self.forget(index);
        Ok((Reply::Unplugged { index }, None))
    }

    /// Starts a process without a back end, in the jail of any card's, for the driver of one that is gone.
    fn stand_in(&mut self, index: u32, features: u64) -> Result<(Reply, Option<OwnedFd>), String> {
        let gone = self.taken_out.get(&index);
        let gone = gone.filter(|gone| !gone.is_foreign() && !self.plugged.contains_key(&index));
        let Some((DeviceSpec::Net(card), iothread)) = gone.map(|gone| (&gone.spec, gone.iothread))
        else {
            return Err(format!("device {index} is no card that was taken out"));
        };
        let grant = DeviceGrant {
            spec: DeviceSpec::Net(NetSpec {
                vhost: false,
                limits: NetLimits::default(),
                stands_in: Some(features),
                ..card.clone()
            }),
            backend: BackendGrant::Nothing,
            iothread,
        };
        let order = Order {
            grant: &grant,
            backend: Vec::new(),
            policy: &self.policy,
        };
        let (socket, pid) = self.devices.start(index as usize, order)?;
        Ok((Reply::Started { index, pid }, Some(socket)))
    }

    /// Gives up what device `index` had. One of the policy's can be started again, from its path.
    fn forget(&mut self, index: u32) {
        self.plugged.remove(&index);
        self.holds.remove(&index);
        self.kept.remove(&index);
        self.taps.remove(&index);
        self.given.remove(&index);
        self.added.free(index);
    }

    fn inspect(&mut self) -> Result<(), ChannelError> {
        for news in self.devices.settle() {
            self.channel.send(&news, &[])?;
        }
        let control = nix::unistd::getppid().as_raw();
        let witness = self.witness.get_or_insert_with(|| Witness::of(control));
        let devices = self.devices.processes();
        let all = std::iter::once(witness.facts())
            .chain(std::iter::once_with(inspect::broker))
            .chain(devices.map(|(role, pid)| inspect::device(role, pid)));
        for facts in all {
            self.channel.send(&Reply::Inspected(Box::new(facts)), &[])?;
        }
        let landlock_abi = ozone::landlock_abi();
        self.channel
            .send(&Reply::InspectionDone { landlock_abi }, &[])
    }

    fn ready(&mut self) -> Result<(Reply, Option<OwnedFd>), String> {
        // The control process is open to this now, and never again.
        self.witness = Some(Witness::of(nix::unistd::getppid().as_raw()));
        if let Some(path) = &self.policy.pidfile {
            let told = |e: std::io::Error| match e.kind() {
                std::io::ErrorKind::AlreadyExists => format!(
                    "-pidfile {}: exists already; remove it if no VM uses it",
                    path.display()
                ),
                _ => format!("-pidfile {}: {e}", path.display()),
            };
            let mut file = std::fs::File::options()
                .write(true)
                .create_new(true)
                .open(path)
                .map_err(told)?;
            self.cleanup.created(path.clone());
            writeln!(file, "{}", nix::unistd::getppid()).map_err(told)?;
        }
        if self.policy.daemonize {
            let_go_of_standard_streams(self.policy.log_file.is_none())
                .map_err(|e| format!("-daemonize: letting go of the standard streams: {e}"))?;
        }
        Ok((Reply::ReadyDone, None))
    }
}

fn duplicates(fds: &[OwnedFd]) -> Result<Vec<OwnedFd>, String> {
    let all: std::io::Result<Vec<OwnedFd>> = fds.iter().map(OwnedFd::try_clone).collect();
    all.map_err(|e| format!("a device's descriptors cannot be kept: {e}"))
}

/// A caller that reads from a pipe until its end must not wait for the broker of a daemon. `and_log`: the log goes there too.
#[allow(unsafe_code)] // the standard streams are numbers
fn let_go_of_standard_streams(and_log: bool) -> std::io::Result<()> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    for standard in 0..3 {
        // SAFETY: 0 to 2 are the standard streams, which nobody owns as a Rust value.
        Errno::result(unsafe { libc::dup2(null.as_raw_fd(), standard) })?;
    }
    if and_log && let Some(log) = ipc::log::descriptor() {
        // SAFETY: both are open; the owner of `log` keeps its number, which leads to /dev/null from here on.
        Errno::result(unsafe { libc::dup2(null.as_raw_fd(), log.as_raw_fd()) })?;
    }
    Ok(())
}
