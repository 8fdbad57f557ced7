//! From options to serving.
//!
//! **Job.** Opens the log and the socket, enters the jail, waits for the front end, shuts the jail, serves it, ends.
//! **Who is not trusted.** The front end and the guest, from the moment the front end is connected; by then the process inside
//! has lost every right but those on the tree, and its first message is read behind the system call filter.
//! **Why this way.** One daemon serves one front end and ends with it, so that no guest inherits another's state. The process
//! that serves can be killed at any time: the one outside, which can do nothing else by its filter, starts another, which goes on with the guest's open files and the
//! front end's connection (`device_host::Record`, `passthrough::Store`). The front end notices nothing.

use std::collections::{HashSet, VecDeque};
use std::fs::OpenOptions;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use device_host::alone::socket::{self, Inherited, SocketError};
use device_host::{MoversError, Record, ServeError, Standalone};
use fs_device::FsDevice;
use fs_device::passthrough::{Config, OwnFds, Passthrough, Store};
use ipc::limits::{DEFAULT_RESTARTS, MAX_RESTARTS, RESTART_WINDOW_MS};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{getegid, geteuid};
use ozone::tree::{self, Ended, IdRange, Inside, Side, TreeError, Wanted};
use seccomp_policies::{Action, Policy};
use thiserror::Error;

use crate::cli::{LogTo, Options, Seccomp, Socket};
use crate::{inherited, movers, resident};

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
    #[error("waiting for the front end")]
    Accept(#[source] io::Error),
    #[error(transparent)]
    Seccomp(#[from] seccomp_policies::Error),
    #[error("serving")]
    Serve(#[from] ServeError),
}

/// Shares the folder until the front end leaves.
pub(crate) fn run(options: &Options) -> ExitCode {
    match start(options) {
        Ok(code) => code,
        Err(error) => {
            let line = ipc::log::with_causes(&error);
            if matches!(options.log, LogTo::Stderr) || matches!(error, DaemonError::Log(..)) {
                eprintln!("vhost_user_fs: {line}");
            } else {
                ipc::log::error!("{line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn start(options: &Options) -> Result<ExitCode, DaemonError> {
    // First, since its number must not be given to anything else.
    let inherited = match options.socket {
        Socket::Fd(fd) => {
            inherited::close_others(Some(fd)).map_err(DaemonError::Inherited)?;
            Some(inherited::take(fd).map_err(|errno| DaemonError::Fd(fd, errno))?)
        }
        Socket::Path(_) => {
            inherited::close_others(None).map_err(DaemonError::Inherited)?;
            None
        }
    };
    let log = open_log(&options.log)?;
    ipc::log::init("vhost_user_fs", options.log_level, log);
    let source = std::fs::canonicalize(&options.source)
        .map_err(|error| DaemonError::Source(options.source.clone(), error))?;
    if !source.is_dir() {
        return Err(DaemonError::NoFolder(source));
    }
    // The process outside has it as a number only; who serves closes it.
    let front_end = ManuallyDrop::new(match (&options.socket, inherited) {
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
    });
    let descriptors = limit_descriptors(options.rlimit_nofile)?;
    let capabilities = capabilities(options);
    let wanted = Wanted {
        source: &source,
        kind: options.sandbox,
        readonly: options.readonly,
        capabilities,
        own_users: options.add_caps & OF_THE_HOST == 0,
        users: chosen(&options.uid_map, geteuid().as_raw()),
        groups: chosen(&options.gid_map, getegid().as_raw()),
    };
    let kept = Kept {
        store: Store::new(descriptors).map_err(DaemonError::Kept)?,
        record: Record::new().map_err(DaemonError::Kept)?,
        movers: options.threads.unwrap_or_else(movers::sensible),
        own: inherited::first_free().map_err(DaemonError::Inherited)?,
    };
    let mut restarts = Restarts::default();
    let mut side = tree::enter(&wanted)?;
    loop {
        let outside = match side {
            Side::Inside(inside) => {
                return serve(options, inside, front_end, (descriptors, kept));
            }
            Side::Outside(outside) => outside,
        };
        // Another process inside has it from here.
        if seccomp_policies::in_force(Policy::FsOutside).is_none()
            && let Some(action) = action(options.seccomp)
        {
            seccomp_policies::install(Policy::FsOutside, action)?;
        }
        resident::give_code_back();
        let ended = outside.wait()?;
        match ended {
            Ended::Killed(signal) if outside.is_repeatable() && restarts.allowed(signal) => {
                ipc::log::warn!("the serving process was killed by {signal}; another one goes on");
                kept.close_others(|fd| outside.owns(fd))
                    .map_err(DaemonError::Inherited)?;
                side = outside.again(&wanted)?;
            }
            _ => {
                if let Socket::Path(path) = &options.socket {
                    // It may be gone, or belong to the next daemon's preparations by now; neither is a fault.
                    let _ = std::fs::remove_file(path);
                }
                return Ok(exit_code(ended));
            }
        }
    }
}

/// The ranges of a map that are not what there is anyway: a user who is not root has himself, as user 0.
fn chosen(map: &[IdRange], own: u32) -> &[IdRange] {
    match map {
        [range] if own != 0 && (range.inside, range.host, range.count) == (0, own, 1) => &[],
        _ => map,
    }
}

/// What outlives a serving process.
#[derive(Debug, Clone, Copy)]
struct Kept {
    store: Store,
    record: Record,
    /// Threads that move data, of each serving process.
    movers: usize,
    /// Descriptors below this number are of the process outside, from before it started any.
    own: i32,
}

impl Kept {
    /// Closes what a process that is gone had open for itself, or for a request that it was at.
    fn close_others(&self, owned: impl Fn(i32) -> bool) -> Result<(), Errno> {
        let mut wanted = HashSet::new();
        self.store.descriptors(|fd| {
            wanted.insert(fd);
        });
        self.record.descriptors(|fd| {
            wanted.insert(fd);
        });
        inherited::close_unless(|fd| fd < self.own || owned(fd) || wanted.contains(&fd))
    }
}

/// When serving processes were killed, the last ones only.
#[derive(Debug, Default)]
struct Restarts(VecDeque<Instant>);

impl Restarts {
    /// Whether another process may go on after one was killed by `signal` now.
    fn allowed(&mut self, signal: Signal) -> bool {
        let limit = match signal {
            // By its filter: it did what it must never do.
            Signal::SIGSYS => return false,
            // By someone outside of it.
            Signal::SIGKILL => MAX_RESTARTS,
            _ => DEFAULT_RESTARTS,
        };
        let window = Duration::from_millis(RESTART_WINDOW_MS);
        let now = Instant::now();
        while self.0.front().is_some_and(|then| now - *then > window) {
            self.0.pop_front();
        }
        self.0.push_back(now);
        self.0.len() <= usize::from(limit)
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
    front_end: ManuallyDrop<Inherited>,
    (descriptors, kept): (usize, Kept),
) -> Result<ExitCode, DaemonError> {
    let Kept {
        store,
        record,
        movers,
        ..
    } = kept;
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
        .with_rest(resident::give_code_back);
    let prepared = Standalone::new(device)?;
    let jailed = prepared.locked(&locked);
    let serving = if record.is_connected() {
        // What was listened at is closed, or is the connection that is gone on with.
        jailed.resume(record)?
    } else {
        let stream = match ManuallyDrop::into_inner(front_end) {
            Inherited::Listening(listener) => listener.accept().map_err(DaemonError::Accept)?.0,
            Inherited::Connected(stream) => stream,
        };
        jailed.serve_on_record(stream, record)?
    };
    if action != Some(Action::Kill) {
        ipc::log::warn!("-seccomp: unexpected system calls do not end this process");
    }
    // What follows needs none of it until the front end speaks.
    resident::give_code_back();
    if let Some(action) = action {
        seccomp_policies::install(Policy::VhostUserFs, action)?;
    }
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
