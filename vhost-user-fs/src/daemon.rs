//! From options to serving.
//!
//! **Job.** Opens the log and the socket, enters the jail, waits for the front end, shuts the jail, serves it, ends.
//! **Who is not trusted.** The front end and the guest, from the moment the front end is connected; by then the process inside
//! has lost every right but those on the tree, and its first message is read behind the system call filter.
//! **Why this way.** One daemon serves one front end and ends with it, so that no guest inherits another's state. The process
//! that serves can be killed at any time: the one outside, which can do little else by its filter, starts another, which goes on with the guest's open files and the
//! front end's connection (`device_host::Record`, `passthrough::Store`). The front end notices nothing, neither then nor when another
//! program takes this one's place ([`crate::upgrade`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use device_host::alone::socket::{self, Inherited, SocketError};
use device_host::alone::{Deaths, close_others};
use device_host::{MoversError, Record, ServeError, Standalone};
use fs_device::FsDevice;
use fs_device::passthrough::{Config, OwnFds, Passthrough, Store};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{getegid, geteuid};
use ozone::successor;
use ozone::tree::{self, Ended, IdRange, Inside, Outside, Side, TreeError, Wanted, Woken};
use seccomp_policies::{Action, Policy};
use thiserror::Error;

use crate::cli::{LogTo, Options, Seccomp, Socket};
use crate::upgrade::{self, Estate, Handed, Previous, UpgradeError};
use crate::{inherited, movers};

/// Descriptors that are not for the guest's files: the socket, queues, memory while it is mapped, the log.
const RESERVED: u64 = 128;
/// Descriptors when nothing is said; less if the host allows less.
const DEFAULT_NOFILE: u64 = 1_000_000;

// include/uapi/linux/capability.h
const CHOWN: u64 = 1;
const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const FOWNER: u64 = 1 << 3;
const FSETID: u64 = 1 << 4;
const SETGID: u64 = 1 << 6;
const SETUID: u64 = 1 << 7;
const LINUX_IMMUTABLE: u64 = 1 << 9;
const SYS_ADMIN: u64 = 1 << 21;
const SYS_RESOURCE: u64 = 1 << 24;
const MKNOD: u64 = 1 << 27;
const SETFCAP: u64 = 1 << 31;
/// These count in the host's user namespace only.
pub(crate) const OF_THE_HOST: u64 = LINUX_IMMUTABLE | SYS_ADMIN | SYS_RESOURCE | MKNOD;

impl From<TreeError> for DaemonError {
    fn from(error: TreeError) -> Self {
        match error {
            TreeError::Users => Self::NotRoot,
            other => Self::Jail(other),
        }
    }
}

impl DaemonError {
    /// Whether it was met on the way into the jail.
    fn is_inside(&self) -> bool {
        matches!(self, Self::Jail(TreeError::Inside(_)))
    }
}

#[derive(Debug, Error)]
enum DaemonError {
    #[error("-source {0}")]
    Source(PathBuf, #[source] io::Error),
    #[error("-source {0}: not a folder")]
    NoFolder(PathBuf),
    #[error("-D {0}")]
    Log(PathBuf, #[source] io::Error),
    #[error("-socket-path {0}")]
    Socket(SocketError),
    #[error("-socket-group {0}: neither a number nor a group of /etc/group")]
    Group(String),
    #[error("-fd {0}: not an open unix stream socket")]
    Fd(i32, #[source] Errno),
    #[error("closing inherited descriptors")]
    Inherited(#[source] Errno),
    #[error("-rlimit-nofile {wanted}: the host allows {allowed}")]
    Limit { wanted: u64, allowed: u64 },
    #[error("resource limits")]
    Limits(#[source] Errno),
    #[error(transparent)]
    Jail(TreeError),
    #[error(
        "-uid-map, -gid-map: only root with CAP_SETUID and CAP_SETGID chooses the users that there are; for another user there \
         is himself, as user 0 (newuidmap(1) is not run), and -translate-uid changes what the guest sees"
    )]
    NotRoot,
    #[error("memory for what the guest holds")]
    Kept(#[source] Errno),
    #[error("shared folder")]
    Tree(#[source] Errno),
    #[error("-thread-pool-size")]
    Movers(#[from] MoversError),
    #[error("-tag does not fit")]
    Tag,
    #[error("the process that serves {0}")]
    Ended(Ended),
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    #[error("there is no socket for the front end any more")]
    NoFrontEnd,
    #[error("waiting for the front end")]
    Accept(#[source] io::Error),
    #[error(transparent)]
    Seccomp(#[from] seccomp_policies::Error),
    #[error("serving")]
    Serve(#[from] ServeError),
}

/// Shares the folder until the front end leaves; as a `trial`, starts as if to and says how that went.
pub(crate) fn run(options: &Options, trial: bool) -> ExitCode {
    let handed = Handed::take().map_err(DaemonError::Upgrade);
    let result = match handed {
        Ok(Some(handed)) if trial => {
            // The process inside shares this one's descriptors, and both get to the end of this.
            let mut handed = ManuallyDrop::new(handed);
            let says = handed.plan().ok().and_then(|plan| plan.says());
            return try_start(options, &mut handed, says);
        }
        Ok(None) if trial => Err(DaemonError::Upgrade(UpgradeError::Environment)),
        Ok(Some(handed)) => go_on(options, handed),
        Ok(None) => start(options),
        Err(error) => Err(error),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            let line = ipc::log::with_causes(&error);
            if ipc::log::descriptor().is_none() || matches!(options.log, LogTo::Stderr) {
                eprintln!("vhost_user_fs: {line}");
            } else {
                ipc::log::error!("{line}");
            }
            ExitCode::FAILURE
        }
    }
}

/// By the command line alone.
fn start(options: &Options) -> Result<ExitCode, DaemonError> {
    // First, since its number must not be given to anything else.
    let inherited = match options.socket {
        Socket::Fd(fd) => {
            close_others(Some(fd)).map_err(DaemonError::Inherited)?;
            Some(inherited::take(fd).map_err(|errno| DaemonError::Fd(fd, errno))?)
        }
        Socket::Path(_) => {
            close_others(None).map_err(DaemonError::Inherited)?;
            None
        }
    };
    // Before anybody puts another program there.
    let program = std::env::current_exe().unwrap_or_default();
    let log = open_log(&options.log)?;
    let log_number = log.as_raw_fd();
    ipc::log::init("vhost_user_fs", options.log_level, log);
    let source = std::fs::canonicalize(&options.source)
        .map_err(|error| DaemonError::Source(options.source.clone(), error))?;
    if !source.is_dir() {
        return Err(DaemonError::NoFolder(source));
    }
    let front_end = match (&options.socket, inherited) {
        (Socket::Path(path), _) => {
            let unknown = |name: &String| DaemonError::Group(name.clone());
            let group = options
                .socket_group
                .as_ref()
                .map(|name| socket::group(name).ok_or_else(|| unknown(name)))
                .transpose()?;
            Inherited::Listening(socket::listen(path, group).map_err(DaemonError::Socket)?)
        }
        (Socket::Fd(fd), handed) => handed
            .ok_or(Errno::EBADF)
            .and_then(socket::inherited)
            .map_err(|e| DaemonError::Fd(*fd, e))?,
    };
    let descriptors = limit_descriptors(options.rlimit_nofile)?;
    Post {
        options,
        estate: Estate {
            program,
            source,
            store: tables(descriptors).map_err(DaemonError::Kept)?,
            record: Record::new().map_err(DaemonError::Kept)?,
            descriptors,
            movers: options.threads.unwrap_or_else(movers::sensible),
            front_end: ManuallyDrop::new(Some(front_end)),
            log: log_number,
            filters: Vec::new(),
        },
        probation: None,
        outside: true,
    }
    .hold()
}

/// Tables that another program can go on with, if the limit of a file's size allows them.
fn tables(descriptors: usize) -> Result<Store, Errno> {
    let (most, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
    if Store::bytes(descriptors) <= most {
        return Store::new_to_hand_over(descriptors);
    }
    ipc::log::info!(
        "by its limit of a file's size, no other program can take the place of this one"
    );
    Store::new(descriptors)
}

/// In the place of another program.
fn go_on(options: &Options, mut handed: Handed) -> Result<ExitCode, DaemonError> {
    // An executed descriptor's number is no name.
    let _ = nix::sys::prctl::set_name(c"vhost_user_fs");
    let taken = take_over(options, &mut handed);
    let (plan, previous) = handed.into_parts();
    let (error, plan, previous) = match (taken, previous) {
        (Ok((estate, from)), previous) => {
            drop(plan);
            let mut post = Post {
                options,
                estate,
                probation: previous.map(|previous| Probation { previous, from }),
                outside: true,
            };
            let result = post.hold();
            match (result, post.probation) {
                // What befell one that serves is not for that one to decide.
                (Err(error), Some(probation)) if post.outside && !error.is_inside() => {
                    (error, post.estate.hand_on(), probation.previous)
                }
                (result, _) => return result,
            }
        }
        (Err(error), Some(previous)) => (error, Ok(plan), previous),
        (Err(error), None) => return Err(error),
    };
    ipc::log::error!(
        "upgrade: version {}: {}; the program of before goes on",
        env!("CARGO_PKG_VERSION"),
        ipc::log::with_causes(&error)
    );
    Err(previous.give_place_back(plan).into())
}

/// What the program before this one had, and its version.
fn take_over(options: &Options, handed: &mut Handed) -> Result<(Estate, String), DaemonError> {
    let plan = handed.plan()?;
    let log = plan.log()?;
    let number = log.as_raw_fd();
    ipc::log::init("vhost_user_fs", options.log_level, log);
    plan.check()?;
    let version = plan.version.clone();
    let estate = plan.estate(number)?;
    successor::hand_on_nothing().map_err(DaemonError::Inherited)?;
    Ok((estate, version))
}

/// What a start does, up to where it would serve.
fn try_start(options: &Options, handed: &mut Handed, says: Option<File>) -> ExitCode {
    let Some(says) = says else {
        eprintln!(
            "vhost_user_fs: {}: only an upgrade has use for it",
            upgrade::TRIAL
        );
        return ExitCode::from(2);
    };
    // Both processes have it.
    let says = ManuallyDrop::new(says);
    let started = start_for_a_try(options, handed);
    let said = match &started {
        Ok(true) => upgrade::say_ready(&says),
        Ok(false) => Ok(()),
        Err(error) => upgrade::say(&says, ipc::log::with_causes(error).as_bytes()),
    };
    if started.is_ok() && said.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Whether all went well, in the process outside.
fn start_for_a_try(options: &Options, handed: &mut Handed) -> Result<bool, DaemonError> {
    let plan = handed.plan()?;
    plan.check()?;
    plan.tables()?;
    plan.connection()?;
    let source = plan.source();
    let (told, tells) = word()?;
    match tree::enter(&wanted(options, &source))? {
        Side::Inside(mut inside) => {
            inside.lock()?;
            let action = action(options.seccomp);
            // They end with this process.
            let _movers = ManuallyDrop::new(movers::start(plan.movers as usize, action)?);
            if let Some(action) = action {
                seccomp_policies::install(Policy::VhostUserFs, action)?;
            }
            let _ = nix::unistd::write(&*tells, b"1");
            Ok(false)
        }
        Side::Outside(outside) => {
            if let Some(action) = action(options.seccomp) {
                upgrade::filter(&plan.filters, action)?;
            }
            let told = outside.is_told(told.as_fd(), upgrade::PATIENCE)?;
            match outside.end()? {
                _ if told => Ok(true),
                // It has said why.
                Ended::Exited(status) if status != 0 => Ok(false),
                ended => Err(DaemonError::Ended(ended)),
            }
        }
    }
}

fn wanted<'a>(options: &'a Options, source: &'a Path) -> Wanted<'a> {
    Wanted {
        source,
        kind: options.sandbox,
        readonly: options.readonly,
        capabilities: capabilities(options),
        own_users: options.add_caps & OF_THE_HOST == 0,
        users: chosen(&options.uid_map, geteuid().as_raw()),
        groups: chosen(&options.gid_map, getegid().as_raw()),
    }
}

/// A program that has taken another one's place, until it serves.
#[derive(Debug)]
struct Probation {
    previous: Previous,
    /// Version of that one.
    from: String,
}

/// The process outside, and what it starts those that serve with.
struct Post<'a> {
    options: &'a Options,
    estate: Estate,
    probation: Option<Probation>,
    /// This is not one that serves.
    outside: bool,
}

impl Post<'_> {
    /// Has the folder served until the front end leaves.
    fn hold(&mut self) -> Result<ExitCode, DaemonError> {
        let source = self.estate.source.clone();
        let wanted = wanted(self.options, &source);
        let mut deaths = Deaths::default();
        // Both processes have both ends, and the one outside closes them when it was told.
        let mut word = self.probation.as_ref().map(|_| word()).transpose()?;
        let mut side = tree::enter(&wanted)?;
        loop {
            let outside = match side {
                Side::Inside(inside) => {
                    self.outside = false;
                    let tells = word.map(|(_, tells)| tells);
                    return serve(self.options, inside, &mut self.estate, tells);
                }
                Side::Outside(outside) => outside,
            };
            // Another process inside has it from here.
            if let Some(action) = action(self.options.seccomp) {
                self.estate.filter(action)?;
            }
            if let Some((told, tells)) = word.take() {
                if !outside.is_told(told.as_fd(), upgrade::PATIENCE)? {
                    let ended = outside.end()?;
                    self.close_others(|_| false)?;
                    return Err(DaemonError::Ended(ended));
                }
                drop((
                    ManuallyDrop::into_inner(told),
                    ManuallyDrop::into_inner(tells),
                ));
            }
            if let Some(Probation { previous, from }) = self.probation.take() {
                previous.close();
                let version = env!("CARGO_PKG_VERSION");
                ipc::log::warn!("upgrade: version {version} goes on for version {from}");
            }
            ozone::give_code_back();
            let ended = loop {
                match outside.wait()? {
                    Woken::Ended(ended) => break Ok(ended),
                    Woken::Upgrade => match self.upgrade(&outside) {
                        Ok(Err(ended)) => break Ok(ended),
                        Ok(Ok(())) => break Err(()),
                        Err(error) => stays(&error),
                    },
                }
            };
            match ended {
                Ok(Ended::Killed(signal))
                    if outside.is_repeatable() && deaths.allow_another(signal, Instant::now()) =>
                {
                    ipc::log::warn!(
                        "the serving process was killed by {signal}; another one goes on"
                    );
                    self.close_others(|fd| outside.owns(fd))?;
                }
                Err(()) => {}
                Ok(ended) => {
                    if let Socket::Path(path) = &self.options.socket {
                        // It may be gone, or belong to the next daemon's preparations by now; neither is a fault.
                        let _ = std::fs::remove_file(path);
                    }
                    return Ok(exit_code(ended));
                }
            }
            side = outside.again(&wanted)?;
        }
    }

    /// Puts the program in this one's place that its path names by now. Returns if that fails: with an error when the process
    /// inside goes on, `Ok(Ok(()))` when another one has to.
    fn upgrade(&self, outside: &Outside) -> Result<Result<(), Ended>, UpgradeError> {
        if !outside.is_repeatable() {
            return Err(UpgradeError::Alone);
        }
        let tried = self.estate.try_out()?;
        let ended = outside
            .end()
            .map_err(|_| UpgradeError::Call("ending the process that serves", Errno::ECHILD))?;
        if ended != Ended::Killed(Signal::SIGKILL) {
            return Ok(Err(ended));
        }
        let error = match self.close_others(|fd| outside.owns(fd)) {
            Ok(()) => self.estate.take_place(&tried),
            Err(_) => UpgradeError::Call("closing descriptors", Errno::EBADF),
        };
        stays(&error);
        Ok(Ok(()))
    }

    /// Closes what a process that is gone had open for itself, or for a request that it was at.
    fn close_others(&self, owned: impl Fn(RawFd) -> bool) -> Result<(), DaemonError> {
        let (own, kept) = (self.estate.own(), self.estate.kept());
        let previous = self.probation.as_ref().map(|p| p.previous.number());
        inherited::close_unless(|fd| {
            own.contains(&fd) || kept.contains(&fd) || owned(fd) || previous == Some(fd)
        })
        .map_err(DaemonError::Inherited)
    }
}

fn stays(error: &UpgradeError) {
    let why = ipc::log::with_causes(error);
    ipc::log::error!("upgrade: {why}; the running program goes on");
}

/// One end of a line, which no object closes.
type End = ManuallyDrop<OwnedFd>;

/// Over which a process that serves tells that it does: where that is heard, and where it is said.
fn word() -> Result<(End, End), DaemonError> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::Stream, None, flags)
        .map(|(told, tells)| (ManuallyDrop::new(told), ManuallyDrop::new(tells)))
        .map_err(DaemonError::Inherited)
}

/// The ranges of a map that are not what there is anyway: a user who is not root has himself, as user 0.
fn chosen(map: &[IdRange], own: u32) -> &[IdRange] {
    match map {
        [range] if own != 0 && (range.inside, range.host, range.count) == (0, own, 1) => &[],
        _ => map,
    }
}

fn exit_code(ended: Ended) -> ExitCode {
    match ended {
        Ended::Exited(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Ended::Killed(signal) => {
            ipc::log::error!("the serving process was killed by {signal}");
            // As shells do: signal numbers have 7 bits.
            ExitCode::from(128 + signal as u8)
        }
        Ended::Stopped(_) => ExitCode::SUCCESS,
    }
}

/// Inside of the jail: locks it and serves.
fn serve(
    options: &Options,
    mut inside: Inside,
    estate: &mut Estate,
    mut tells: Option<End>,
) -> Result<ExitCode, DaemonError> {
    let Estate {
        store,
        record,
        movers,
        descriptors,
        ..
    } = *estate;
    // Once: from then on its number may be another one's.
    let mut tell = || {
        if let Some(tells) = tells.take() {
            // If nobody hears it, this process will be ended.
            let _ = nix::unistd::write(&*tells, b"1");
        }
    };
    let all_users = inside.all_users;
    let locked = inside.lock()?;
    if let Some(missing) = tree::describe_missing(locked.layers()) {
        ipc::log::warn!("sandbox: {missing}");
    }
    let switching = SETUID | SETGID;
    let switch_user = all_users && locked.capabilities() & switching == switching;
    if !switch_user && !options.readonly {
        ipc::log::info!("all new files belong to the user of this process");
    }
    let config = Config {
        cache: options.cache,
        writeback: options.writeback,
        readonly: options.readonly,
        xattr: options.xattr,
        xattrmap: options.xattrmap.clone(),
        posix_acl: options.posix_acl,
        announce_submounts: options.announce_submounts,
        readdirplus: options.readdirplus,
        posix_lock: options.posix_lock,
        flock: options.flock,
        allow_mmap: options.allow_mmap,
        switch_user,
        users: options.users.clone(),
        groups: options.groups.clone(),
        noatime: options.noatime,
        descriptors,
        ..Config::default()
    };
    let own = OwnFds::new(inside.own_fds);
    let tree = if store.is_used() {
        let mut tree = Passthrough::resume(Some(&inside.tree), own, store, config)
            .map_err(DaemonError::Tree)?;
        // With a connection this waits until its queues are known.
        if !record.is_connected() {
            tree.go_on(|_| false).map_err(DaemonError::Tree)?;
        }
        tree
    } else {
        store.keep_open(inside.mounts);
        Passthrough::new(inside.tree, own, store, config).map_err(DaemonError::Tree)?
    };
    let action = action(options.seccomp);
    let movers = movers::start(movers, action)?;
    let device = FsDevice::new(tree, &options.tag)
        .ok_or(DaemonError::Tag)?
        .with_window(options.dax_window)
        .with_movers(movers)
        .with_lifeline(inside.lifeline)
        .with_rest(ozone::give_code_back);
    let prepared = Standalone::new(device)?;
    let jailed = prepared.locked(&locked);
    let serving = if record.is_connected() {
        // What was listened at is closed, or is the connection that is gone on with.
        jailed.resume(record)?
    } else {
        // Without one there is a connection.
        let front_end = estate.front_end.take().ok_or(DaemonError::NoFrontEnd)?;
        let (stream, listener) = match front_end {
            Inherited::Listening(listener) => {
                tell();
                let stream = listener.accept().map_err(DaemonError::Accept)?.0;
                (stream, Some(listener))
            }
            Inherited::Connected(stream) => (stream, None),
        };
        let serving = jailed.serve_on_record(stream, record)?;
        // Only now, so that whoever goes on after a kill has one of the two.
        drop(listener);
        serving
    };
    if action != Some(Action::Kill) {
        ipc::log::warn!("-seccomp: unexpected system calls do not end this process");
    }
    // What follows needs none of it until the front end speaks.
    ozone::give_code_back();
    if let Some(action) = action {
        seccomp_policies::install(Policy::VhostUserFs, action)?;
    }
    tell();
    serving.run()?;
    ipc::log::info!("the front end left");
    Ok(ExitCode::SUCCESS)
}

/// What the filters do; `None` without any.
fn action(wanted: Seccomp) -> Option<Action> {
    match wanted {
        Seccomp::Allow => None,
        Seccomp::Kill => Some(Action::Kill),
        Seccomp::Log => Some(Action::Log),
        Seccomp::Trap => Some(Action::Trap),
    }
}

/// What the options need, with the user's changes.
fn capabilities(options: &Options) -> u64 {
    let mut needed = if options.readonly {
        DAC_READ_SEARCH
    } else {
        CHOWN | DAC_OVERRIDE | FOWNER | FSETID | SETGID | SETUID
    };
    if options.xattr && !options.readonly {
        needed |= SETFCAP;
    }
    (needed | options.add_caps) & !options.drop_caps
}

fn open_log(to: &LogTo) -> Result<OwnedFd, DaemonError> {
    match to {
        LogTo::Stderr => io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| DaemonError::Log("standard error".into(), error)),
        LogTo::File(path) => OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map(OwnedFd::from)
            .map_err(|error| DaemonError::Log(path.clone(), error)),
    }
}

/// Sets the limit of open descriptors; returns how many the guest may hold.
fn limit_descriptors(wanted: Option<u64>) -> Result<usize, DaemonError> {
    let resource = Resource::RLIMIT_NOFILE;
    let (_, hard) = getrlimit(resource).map_err(DaemonError::Limits)?;
    let limit = match wanted {
        Some(wanted) => setrlimit(resource, wanted, wanted)
            .map(|()| wanted)
            .map_err(|_| DaemonError::Limit {
                wanted,
                allowed: hard,
            })?,
        // Root may raise it; otherwise the hard limit is what there is.
        None => match setrlimit(resource, DEFAULT_NOFILE, DEFAULT_NOFILE) {
            Ok(()) => DEFAULT_NOFILE,
            Err(_) => {
                let limit = hard.min(DEFAULT_NOFILE);
                setrlimit(resource, limit, limit).map_err(DaemonError::Limits)?;
                limit
            }
        },
    };
    // At most 2^30.
    Ok(limit.saturating_sub(RESERVED) as usize)
}
