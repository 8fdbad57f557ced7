//! Device processes: start, log lines, end.
//!
//! **Job.** Each entry of the policy's devices has at most one process. It gets exactly its descriptors ([`ipc::start`]),
//! its jail from [`ozone::spawn`], and a pipe for its log.
//! **Who is not trusted**: the device process. What it logs is cut into lines of bounded length, cleaned of control
//! characters and rate limited before it reaches the log.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::keeper::{Keeper, KeeperError, News};
use crate::lifecycle::with_causes;
use ipc::PROTOCOL_VERSION;
use ipc::channel::{Channel, ChannelError};
use ipc::control::sandbox::Role;
use ipc::control::{DeviceGrant, Exit, Policy, Reply};
use ipc::limits::HAND_OVER_PATIENCE_MS;
use ipc::log::{error, trace};
use ipc::relay::LogLines;
use ipc::spec::DeviceSpec;
use ipc::spec::fs::{BACKEND_FDS, FD_HERITAGE, FD_KEEPER, FD_PROCESSES, FD_TREE};
use ipc::start::{FD_BACKEND, FD_LOG, FD_START, FD_VHOST_USER, SandboxMode, StartMessage};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CpuSet;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use ozone::{Child, DeviceLaunch, Identity, Limits, Pending, Sandbox, SharedTree};

/// All device processes of this VM, by their index in the policy.
#[derive(Debug)]
pub(super) struct Devices {
    slots: Vec<Option<Process>>,
    /// Processes that are about to take the place of those, by the same index.
    newer: BTreeMap<usize, Process>,
    /// Those that are about to take over what one of those keeps.
    heirs: BTreeMap<usize, Heir>,
    log: Option<BorrowedFd<'static>>,
}

/// A process with a keeper that is to go on with what another one keeps. The broker waits for it as for all else: other devices
/// may need a new process meanwhile.
#[derive(Debug)]
struct Heir {
    process: Process,
    /// The control process's end of its vhost-user socket.
    socket: OwnedFd,
    /// It is sent what the other one keeps, which serves no more.
    takes: bool,
    /// When it must have come to the next step.
    deadline: Instant,
}

/// A process that is to be started.
#[derive(Debug)]
pub(super) struct Order<'a> {
    /// Which device it is for.
    pub(super) grant: &'a DeviceGrant,
    /// The back end's descriptors, opened as the grant says.
    pub(super) backend: Vec<OwnedFd>,
    /// How processes of this VM are confined.
    pub(super) policy: &'a Policy,
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_millis(HAND_OVER_PATIENCE_MS)
}

/// Another process that serves, or why there is none, for the control process.
pub(super) type Succession = Result<(OwnedFd, i32), String>;

#[derive(Debug)]
struct Process {
    id: String,
    pid: i32,
    /// The process that the control process knows of: this one, or the last one that it started.
    told: i32,
    stage: Stage,
    lines: LogLines,
    /// It keeps the device's state and starts those that serve, perhaps.
    keeper: Option<Keeper>,
}

/// How far a device process is.
#[derive(Debug)]
enum Stage {
    /// Building its jail.
    Pending(Pending),
    /// Running its own program.
    Running(Child),
    /// Its end was told; only for the moment between two stages.
    Gone,
}

impl Devices {
    /// Device processes log where this process does: call it once [`ipc::log::init`] was called.
    pub(super) fn new(count: usize) -> Self {
        Self {
            slots: std::iter::repeat_with(|| None).take(count).collect(),
            newer: BTreeMap::new(),
            heirs: BTreeMap::new(),
            log: ipc::log::descriptor(),
        }
    }

    /// Starts the process of entry `index`: the control process's end of its socket, and its process id.
    pub(super) fn start(
        &mut self,
        index: usize,
        order: Order<'_>,
    ) -> Result<(OwnedFd, i32), String> {
        let id = order.grant.spec.id();
        let told = |what: &str, e: &dyn std::fmt::Display| format!("device {id}: {what}: {e}");
        let again = self.slots.get_mut(index).map(|slot| slot.as_mut());
        if let Some(Some(process)) = again {
            let keeper = process.keeper.as_mut().filter(|keeper| keeper.is_idle());
            let Some(keeper) = keeper else {
                return Err(format!("device {id} has a process already"));
            };
            let (ours, theirs) = UnixStream::pair().map_err(|e| told("socket pair", &e))?;
            return match keeper.serve(theirs.as_fd()) {
                Ok(pid) => {
                    process.told = pid;
                    Ok((ours.into(), pid))
                }
                Err(e) => {
                    let message = told("keeper", &with_causes(&e));
                    // The next start begins anew, in a new jail.
                    process.end();
                    self.slots[index] = None;
                    Err(message)
                }
            };
        }
        if again.is_none() {
            return Err(format!("the policy has no device {index}"));
        }
        let (socket, process) = launch(order, Comes::First)?;
        let pid = process.pid;
        self.slots[index] = Some(process);
        Ok((socket, pid))
    }

    /// Starts another process of entry `index` beside the one that runs, with the same back end.
    pub(super) fn upgrade(
        &mut self,
        index: usize,
        order: Order<'_>,
    ) -> Result<(OwnedFd, i32), String> {
        self.start_newer(index, order, Comes::Beside)
    }

    /// The same with another back end.
    pub(super) fn replace(
        &mut self,
        index: usize,
        order: Order<'_>,
    ) -> Result<(OwnedFd, i32), String> {
        self.start_newer(index, order, Comes::Instead)
    }

    fn start_newer(
        &mut self,
        index: usize,
        order: Order<'_>,
        comes: Comes,
    ) -> Result<(OwnedFd, i32), String> {
        if !self.is_running(index) || self.newer.contains_key(&index) {
            return Err(format!(
                "device {} has no process, or two of them",
                order.grant.spec.id()
            ));
        }
        let (socket, process) = launch(order, comes)?;
        let pid = process.pid;
        self.newer.insert(index, process);
        Ok((socket, pid))
    }

    /// Starts another keeper for entry `index`, which is to take over what the one that runs keeps, and its place.
    /// [`follow_heir`](Self::follow_heir) tells what came of it. Until the new one has said that it can do that, the guest is
    /// served as before.
    pub(super) fn take_over(&mut self, index: usize, order: Order<'_>) -> Result<(), String> {
        let id = order.grant.spec.id();
        let slot = self.slots.get_mut(index).and_then(Option::as_mut);
        let keeper = slot
            .and_then(|process| process.keeper.as_ref())
            .filter(|keeper| keeper.is_serving() && !self.heirs.contains_key(&index));
        let Some(keeper) = keeper else {
            return Err(format!(
                "Device '{id}' has no process that keeps what the guest opened beside the one that serves, or is about to get another"
            ));
        };
        let told = |e: &dyn std::error::Error| goes_on(id, &with_causes(e));
        let (old, new) = Channel::pair().map_err(|e| told(&e))?;
        let (socket, process) = launch(order, Comes::Heir(new.into_fd()))?;
        keeper.offer(old.as_fd()).map_err(|e| told(&e))?;
        let heir = Heir {
            process,
            socket,
            takes: false,
            deadline: deadline(),
        };
        self.heirs.insert(index, heir);
        Ok(())
    }

    /// When the next one that is to take over must have come further.
    pub(super) fn heirs_deadline(&self) -> Option<Instant> {
        self.heirs.values().map(|heir| heir.deadline).min()
    }

    /// Those that are to take over, by their device.
    pub(super) fn heirs(&self) -> Vec<usize> {
        self.heirs.keys().copied().collect()
    }

    /// Follows the process that is to take over entry `index`, and tells when it serves or will not.
    pub(super) fn follow_heir(&mut self, index: usize) -> Option<Succession> {
        let heir = self.heirs.get_mut(&index)?;
        let keeper = self
            .slots
            .get(index)
            .and_then(|slot| slot.as_ref()?.keeper.as_ref());
        let outcome = heir.advance(self.log, keeper).transpose()?;
        let Heir {
            mut process,
            socket,
            ..
        } = self.heirs.remove(&index)?;
        match outcome {
            Ok(pid) => {
                process.told = pid;
                if let Some(mut old) = self.slots[index].replace(process) {
                    old.end();
                    old.lines.relay(self.log);
                }
                Some(Ok((socket, pid)))
            }
            Err(why) => {
                let id = process.id.clone();
                process.end();
                process.lines.relay(self.log);
                // What it said itself says more than that it is gone.
                let words = process.lines.take_last();
                let why = if words.is_empty() { &why } else { &words };
                Some(Err(goes_on(&id, why)))
            }
        }
    }

    /// Ends one of two processes of entry `index` and reaps it: its id, 0 if it was gone.
    pub(super) fn settle_on(&mut self, index: usize, newer: bool) -> Result<i32, String> {
        let slot = self
            .slots
            .get_mut(index)
            .ok_or_else(|| format!("the policy has no device {index}"))?;
        let ended = match self.newer.remove(&index) {
            other if !newer => other,
            // Without a newer one the older one goes as well: it has been told to.
            other => std::mem::replace(slot, other),
        };
        let Some(mut process) = ended else {
            return Ok(0);
        };
        process.end();
        process.lines.relay(self.log);
        Ok(process.pid)
    }

    /// Whether entry `index` has a process, or one is about to take the place of another that is gone.
    pub(super) fn is_running(&self, index: usize) -> bool {
        matches!(self.slots.get(index), Some(Some(_))) || self.newer.contains_key(&index)
    }

    /// Waits until it is known of each keeper that runs which process serves.
    pub(super) fn settle(&mut self) -> Vec<Reply> {
        let mut told = Vec::new();
        for (index, slot) in (0..).zip(&mut self.slots) {
            let Some(process) = slot.as_mut() else {
                continue;
            };
            if let (Stage::Running(_), Some(keeper)) = (&process.stage, &mut process.keeper) {
                let news = keeper.settle();
                told.extend(process.heard(news, self.log, index));
            }
        }
        told
    }

    /// Role and process id of each process of each device.
    pub(super) fn processes(&self) -> impl Iterator<Item = (Role, i32)> + use<> {
        let mut all = Vec::new();
        for (index, slot) in (0..).zip(&self.slots) {
            let Some(process) = slot else { continue };
            match process.keeper.as_ref().and_then(Keeper::serving) {
                Some(serving) => {
                    all.push((Role::Device(index), serving));
                    all.push((Role::Keeper(index), process.pid));
                }
                None => all.push((Role::Device(index), process.pid)),
            }
        }
        let newer = self.newer.iter();
        all.extend(newer.map(|(index, process)| (Role::Device(*index as u32), process.pid)));
        all.into_iter()
    }

    /// Every descriptor to poll, with the index of its device.
    pub(super) fn watched(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let older = self.slots.iter().enumerate();
        let older = older.filter_map(|(index, slot)| Some((index, slot.as_ref()?)));
        // One that hands over ends what it serves, as it was told to: that is no news yet.
        let older = older.filter(|(index, _)| !self.hands_over(*index));
        let newer = self.newer.iter().map(|(index, process)| (*index, process));
        let heirs = self.heirs.iter();
        let heirs = heirs.map(|(index, heir)| (*index, &heir.process));
        older
            .chain(newer)
            .chain(heirs)
            .flat_map(|(index, process)| {
                let pipe = process.lines.pipe();
                let life = match &process.stage {
                    Stage::Pending(pending) => Some(pending.as_fd()),
                    Stage::Running(child) => Some(child.pidfd.as_fd()),
                    Stage::Gone => None,
                };
                let line = process.keeper.as_ref().map(AsFd::as_fd);
                pipe.into_iter()
                    .chain(life)
                    .chain(line)
                    .map(move |fd| (index, fd))
            })
    }

    /// Whether the process of entry `index` is sending what it keeps to another one.
    fn hands_over(&self, index: usize) -> bool {
        self.heirs.get(&index).is_some_and(|heir| heir.takes)
    }

    /// Takes log lines of device `index`, follows it into its program, and tells if its process has ended, or another one serves.
    pub(super) fn handle(&mut self, index: usize) -> Option<Reply> {
        if self.hands_over(index) {
            return None;
        }
        let slot = self.slots.get_mut(index)?;
        let process = slot.as_mut()?;
        process.lines.relay(self.log);
        let Some((how, last_words)) = process.follow() else {
            return process.news(self.log, index as u32);
        };
        // What it wrote just before it ended is still in the pipe.
        process.lines.relay(self.log);
        let last_words = last_words.unwrap_or_else(|| process.lines.take_last());
        // With its keeper a process that serves has ended too.
        let pid = process.told;
        *slot = None;
        Some(Reply::Exited {
            index: index as u32,
            pid,
            how,
            last_words,
        })
    }

    /// The same for the process that is about to take the place of another one of device `index`.
    pub(super) fn handle_newer(&mut self, index: usize) -> Option<Reply> {
        let process = self.newer.get_mut(&index)?;
        process.lines.relay(self.log);
        let (how, last_words) = process.follow()?;
        process.lines.relay(self.log);
        let last_words = last_words.unwrap_or_else(|| process.lines.take_last());
        let pid = process.pid;
        self.newer.remove(&index);
        Some(Reply::Exited {
            index: index as u32,
            pid,
            how,
            last_words,
        })
    }

    /// Ends the process of entry `index` and reaps it.
    pub(super) fn stop(&mut self, index: usize) -> Result<(), String> {
        let slot = self
            .slots
            .get_mut(index)
            .ok_or_else(|| format!("the policy has no device {index}"))?;
        if let Some(keeper) = slot.as_mut().and_then(|process| process.keeper.as_mut()) {
            match keeper.stop() {
                Ok(()) => return Ok(()),
                Err(e) => error!("device {index}: keeper: {}", with_causes(&e)),
            }
        }
        for mut process in slot.take().into_iter().chain(self.newer.remove(&index)) {
            process.end();
            process.lines.relay(self.log);
        }
        Ok(())
    }

    /// Ends all: first every signal, then every wait, so that they go side by side.
    pub(super) fn end_all(&mut self) {
        let heirs = self.heirs.values().map(|heir| &heir.process);
        let all = self.slots.iter().flatten().chain(self.newer.values());
        for process in all.chain(heirs) {
            if let Stage::Running(child) = &process.stage {
                kill(child);
            }
        }
        let newer = std::mem::take(&mut self.newer).into_values();
        let heirs = std::mem::take(&mut self.heirs).into_values();
        let older = self.slots.iter_mut().filter_map(Option::take);
        for mut process in older.chain(newer).chain(heirs.map(|heir| heir.process)) {
            process.end();
            process.lines.relay(self.log);
        }
    }
}

/// What a process can have its own memory watched by, if the host has it and lets this process.
fn userfault() -> Option<OwnedFd> {
    let path = "/dev/userfaultfd";
    match std::fs::File::options().read(true).write(true).open(path) {
        Ok(file) => Some(file.into()),
        Err(e) => {
            ipc::log::debug!("{path}: {e}: guest memory is brought in as a whole for devices");
            None
        }
    }
}

/// What a process finds.
enum Comes {
    /// No other one.
    First,
    /// Another one that serves, whose place it is to take.
    Beside,
    /// The same, of which this one has not the back end.
    Instead,
    /// Another keeper, to which this is a line, and from which it takes over.
    Heir(OwnedFd),
}

/// Starts a process of its own for `grant`: the control process's end of its socket, and the process.
fn launch(order: Order<'_>, comes: Comes) -> Result<(OwnedFd, Process), String> {
    let Order {
        grant,
        mut backend,
        policy,
    } = order;
    let id = grant.spec.id();
    let told = |what: &str, e: &dyn std::fmt::Display| format!("device {id}: {what}: {e}");
    let limits = limits(&grant.spec, &backend).map_err(|e| told("image", &e))?;
    let (ours, theirs) = UnixStream::pair().map_err(|e| told("socket pair", &e))?;
    let (log_reader, log_writer) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)
            .map_err(|e| told("log pipe", &e))?;
    let duplicate = |fd: &OwnedFd| fd.try_clone().map_err(|e| told("log pipe", &e));
    let mut fds = vec![
        (duplicate(&log_writer)?, 0),
        (duplicate(&log_writer)?, 1),
        (log_writer, FD_LOG),
        (OwnedFd::from(theirs), FD_VHOST_USER),
    ];

    let others = (
        matches!(comes, Comes::Beside),
        matches!(comes, Comes::Instead),
    );
    let (mut folder, mut keeper, mut watched) = (None, None, None);
    let mut backend_fds = backend.len() as u32;
    if let DeviceSpec::Fs(_) = &grant.spec {
        // Its processes come and go without the broker: a keeper has what they need.
        let shared = backend.pop();
        folder = Some(shared.ok_or_else(|| told("shared folder", &"no descriptor"))?);
        let (ours, theirs) = Channel::pair().map_err(|e| told("keeper", &e))?;
        keeper = Some(Keeper::new(ours));
        fds.push((theirs.into_fd(), FD_KEEPER));
        // Two of them are made by the jail.
        backend_fds = BACKEND_FDS;
        if let Comes::Heir(line) = comes {
            fds.push((line, FD_HERITAGE));
            backend_fds += 1;
        }
    } else if policy.userfault {
        // Nobody would watch those of a keeper: memory is brought in as a whole for them.
        watched = userfault();
    }
    let start = start_message(grant, policy, others, backend_fds, watched.is_some());
    fds.push((start.map_err(|e| told("start message", &e))?, FD_START));
    fds.extend(backend.into_iter().chain(watched).zip(FD_BACKEND..));

    let binary = find_binary(grant.spec.binary())?;
    let pending = ozone::spawn(DeviceLaunch {
        name: id,
        binary: binary.as_fd(),
        argv: argv(&grant.spec),
        fds,
        identity: Identity::least(),
        tree: match (&grant.spec, &folder) {
            (DeviceSpec::Fs(spec), Some(folder)) => Some(SharedTree {
                folder: folder.as_fd(),
                readonly: spec.readonly,
                capabilities: spec.capabilities(),
                root: FD_TREE,
                processes: FD_PROCESSES,
            }),
            _ => None,
        },
        limits,
        cpus: cpus(grant, policy).map_err(|e| told("cpus", &e))?,
        mode: match policy.sandbox {
            SandboxMode::BestEffort => Sandbox::BestEffort,
            SandboxMode::Strict => Sandbox::Strict,
        },
        trace: policy.log_level == ipc::log::Level::Trace,
    })
    .map_err(|e| with_causes(&e))?;
    let pid = pending.pid().as_raw();
    let process = Process {
        id: id.to_owned(),
        pid,
        told: pid,
        stage: Stage::Pending(pending),
        lines: LogLines::new(id, log_reader),
        keeper,
    };
    Ok((ours.into(), process))
}

/// What the process is told before anything else, in a sealed file: whether another one serves, with the same back end or with another,
/// among it.
fn start_message(
    grant: &DeviceGrant,
    policy: &Policy,
    (beside, instead): (bool, bool),
    backend_fds: u32,
    userfault: bool,
) -> Result<OwnedFd, ipc::start::StartError> {
    ipc::start::to_memfd(&StartMessage {
        version: PROTOCOL_VERSION,
        device: grant.spec.clone(),
        backend_fds,
        userfault,
        beside,
        instead,
        seccomp: policy.seccomp,
        sandbox: policy.sandbox,
        log_level: policy.log_level,
    })
}

/// The command line that the process has, for whoever looks at it.
fn argv(spec: &DeviceSpec) -> Vec<CString> {
    let id = spec.id();
    // By a first dash the program would know a person's options.
    let shown = if id.starts_with('-') {
        format!("id={id}")
    } else {
        id.to_owned()
    };
    [spec.process(), &shown]
        .map(|text| CString::new(text.replace('\0', " ")).unwrap_or_default())
        .into()
}

/// Where the process of `grant` is to run.
fn cpus(grant: &DeviceGrant, policy: &Policy) -> Result<Option<CpuSet>, Errno> {
    let iothread = grant
        .iothread
        .and_then(|n| policy.iothreads.get(n as usize));
    iothread
        .and_then(Option::as_ref)
        .map(crate::affinity::to_set)
        .transpose()
}

/// What the user is told when there is no other process.
fn goes_on(id: &str, why: &str) -> String {
    format!("Device '{id}' goes on with the process that it has: {why}")
}

impl Heir {
    /// Comes a step further, if there is news: the process that serves, once it does, as a result that `keeper`, which has what is to
    /// be taken over, has a part in.
    fn advance(
        &mut self,
        log: Option<BorrowedFd<'_>>,
        keeper: Option<&Keeper>,
    ) -> Result<Option<i32>, String> {
        let process = &mut self.process;
        process.lines.relay(log);
        if let Some((how, words)) = process.follow() {
            return Err(words.unwrap_or_else(|| format!("the new one ended ({how:?})")));
        }
        let late = self.deadline <= Instant::now();
        let Some(own) = process.keeper.as_mut() else {
            // Its end, with its last words, is about to be told.
            return if late { Err(LATE.into()) } else { Ok(None) };
        };
        let told = if self.takes {
            own.news()
        } else {
            own.is_ready().map(|ready| ready.then_some(News::Ready))
        };
        match told {
            Ok(Some(News::Serves(pid))) => Ok(Some(pid)),
            Ok(Some(News::Ready)) => {
                let keeper = keeper.ok_or("the one that has what the guest opened has ended")?;
                keeper.hand_over().map_err(|e| with_causes(&e))?;
                self.takes = true;
                self.deadline = deadline();
                Ok(None)
            }
            Ok(Some(News::Ended(..))) => Err("the new one does not serve".into()),
            Ok(None) if late => Err(LATE.into()),
            Ok(None) => Ok(None),
            Err(KeeperError::Line(ChannelError::Closed)) => {
                process.keeper = None;
                Ok(None)
            }
            Err(e) => Err(with_causes(&e)),
        }
    }
}

const LATE: &str = "the new one is not ready in time";

impl Process {
    /// Moves on to the next stage if it has been reached; `Some` if the process has ended, with the reason if its jail
    /// could not be built.
    fn follow(&mut self) -> Option<(Exit, Option<String>)> {
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Pending(pending) if is_readable(pending.as_fd()) => match pending.finish() {
                Ok(child) => {
                    self.tell_jail(&child);
                    self.stage = Stage::Running(child);
                    None
                }
                Err(e) => Some((Exit::Code(127), Some(with_causes(&e)))),
            },
            Stage::Running(child) => {
                match waitid(
                    Id::PIDFd(child.pidfd.as_fd()),
                    WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
                ) {
                    Ok(WaitStatus::Exited(_, code)) => Some((Exit::Code(code), None)),
                    Ok(WaitStatus::Signaled(_, signal, _)) => {
                        Some((Exit::Signal(signal as i32), None))
                    }
                    _ => {
                        self.stage = Stage::Running(child);
                        None
                    }
                }
            }
            stage => {
                self.stage = stage;
                None
            }
        }
    }

    /// What its keeper says; one that says what it may not is ended, which the next look at it tells.
    fn news(&mut self, log: Option<BorrowedFd<'_>>, index: u32) -> Option<Reply> {
        let news = self.keeper.as_mut()?.news();
        self.heard(news, log, index)
    }

    fn heard(
        &mut self,
        news: Result<Option<News>, KeeperError>,
        log: Option<BorrowedFd<'_>>,
        index: u32,
    ) -> Option<Reply> {
        match news {
            // The latter is said to one who asks for it.
            Ok(None | Some(News::Ready)) => None,
            Ok(Some(News::Serves(pid))) => {
                self.told = pid;
                Some(Reply::Serves { index, pid })
            }
            Ok(Some(News::Ended(pid, how))) => {
                // It tells its end after its last line.
                self.lines.relay(log);
                Some(Reply::Exited {
                    index,
                    pid,
                    how,
                    last_words: self.lines.take_last(),
                })
            }
            Err(e) => {
                // With the line closed it is about to end by itself, or there is none on this host.
                if !matches!(e, KeeperError::Line(_)) {
                    error!("device {}: keeper: {}", self.id, with_causes(&e));
                }
                self.keeper = None;
                if let Stage::Running(child) = &self.stage
                    && !matches!(e, KeeperError::Line(ChannelError::Closed))
                {
                    kill(child);
                }
                None
            }
        }
    }

    /// Logs what is missing in the jail, and at trace level when each step was done, on the monotonic clock.
    fn tell_jail(&self, child: &Child) {
        for layer in child.layers.iter().filter(|layer| !layer.is_on()) {
            error!("device {}: jail layer not in force: {layer}", self.id);
        }
        // Absolute, so that devices can be seen side by side.
        for phase in &child.phases {
            trace!(
                "device {}: jail: {} at {} ns",
                self.id, phase.step, phase.at
            );
        }
    }

    /// Kills and reaps.
    fn end(&mut self) {
        // Dropping a pending one does both.
        if let Stage::Running(child) = std::mem::replace(&mut self.stage, Stage::Gone) {
            kill(&child);
            while let Err(Errno::EINTR) =
                waitid(Id::PIDFd(child.pidfd.as_fd()), WaitPidFlag::WEXITED)
            {}
        }
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// Limits by what the device does.
fn limits(spec: &DeviceSpec, backend: &[OwnedFd]) -> std::io::Result<Limits> {
    let needs = spec.needs(backend)?;
    Ok(Limits {
        descriptors: needs.descriptors,
        memory: needs.memory,
        file_size: needs.file_size,
        locked_memory: needs.locked_memory,
        threads: Limits::default().threads + needs.kernel_threads,
    })
}

#[allow(unsafe_code)] // nix has no pidfd_send_signal
fn kill(child: &Child) {
    // SAFETY: a system call on a descriptor that we own, with no pointer but the null siginfo that it allows.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            child.pidfd.as_raw_fd(),
            Signal::SIGKILL as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}

/// The device binary: beside this one, or in the libexec folder of the same prefix.
fn find_binary(name: &str) -> Result<OwnedFd, String> {
    let own = std::fs::read_link("/proc/self/exe")
        .or_else(|_| std::env::current_exe())
        .map_err(|e| format!("cannot find this program's own folder: {e}"))?;
    let folder = own.parent().map(PathBuf::from).unwrap_or_default();
    let candidates = [
        folder.join(name),
        folder.join("../libexec/stratovirt").join(name),
    ];
    for candidate in &candidates {
        match File::open(candidate) {
            Ok(file) => return Ok(file.into()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(format!("device binary {}: {e}", candidate.display())),
        }
    }
    Err(format!(
        "device binary {name} is neither in {} nor in {}",
        folder.display(),
        folder.join("../libexec/stratovirt").display()
    ))
}
