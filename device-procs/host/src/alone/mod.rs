//! A device process without a VM's broker: for front ends that nobody here started.
//!
//! **Job.** Listens for a front end, starts this very binary as the device's process in the jail that a broker would give it, moves its
//! log, and starts another one for the next connection.
//! **Who is not trusted.** The front end and the guest behind it: nothing of theirs is read here, the connection is handed over unread.
//! The device process: its log lines are cleaned and limited, its end is all that is believed.
//! **Why this way.** One jail for both ways of starting, built by the same code: what is proven of the managed process holds for this
//! one. What stays outside keeps the right to start processes and nothing else.

pub mod cli;
mod deaths;
mod listen;
pub mod program;
pub mod socket;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use ipc::PROTOCOL_VERSION;
use ipc::limits::RESTART_WINDOW_MS;
use ipc::log::Level;
use ipc::relay::LogLines;
use ipc::spec::DeviceSpec;
use ipc::start::{
    FD_BACKEND, FD_LOG, FD_START, FD_VHOST_USER, SandboxMode, SeccompMode, StartError, StartMessage,
};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use ozone::{Child, DeviceLaunch, Identity, Layer, Limits, Sandbox, SelfLockError, SpawnError};
use thiserror::Error;

use crate::inherited;
pub use crate::inherited::close_others;
pub use deaths::Deaths;
pub use listen::ListenError;
use listen::{Door, FrontEnd};

/// What to serve and how.
#[derive(Debug)]
pub struct Alone {
    /// The device.
    pub device: DeviceSpec,
    /// Its back ends, as a broker would have opened them.
    pub backends: Vec<OwnedFd>,
    /// Where its front end comes from.
    pub socket: Socket,
    /// What the filter does with other calls.
    pub seccomp: SeccompMode,
    /// Whether a missing layer of the jail ends the start.
    pub sandbox: SandboxMode,
    /// Least important level that is logged.
    pub log_level: Level,
    /// Serve another front end when one has left.
    pub keep: bool,
}

/// Where the front end comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    /// A path to listen at, and a group whose members may connect too.
    Path(PathBuf, Option<String>),
    /// A descriptor that is open already: a listening socket or a connected one.
    Fd(RawFd),
}

/// Why a device is not served.
#[derive(Debug, Error)]
pub enum AloneError {
    /// The front end cannot come.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A system call failed.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The device process cannot be told what to be.
    #[error(transparent)]
    Start(#[from] StartError),
    /// This program cannot be opened to be executed again.
    #[error("/proc/self/exe")]
    Binary(#[source] io::Error),
    /// A descriptor cannot be looked at or duplicated.
    #[error("back end")]
    Backend(#[source] io::Error),
    /// There is no jail.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// This process cannot give its rights up.
    #[error(transparent)]
    Lock(#[from] SelfLockError),
    /// It was killed too often.
    #[error("the serving process was killed {0} times within {w} s: given up", w = RESTART_WINDOW_MS / 1000)]
    TooOften(usize),
    /// What it did must never be done.
    #[error("the serving process was killed by its system call filter")]
    Filter,
    /// It ended with an error, which its log tells.
    #[error("the serving process ended with status {0}")]
    Failed(i32),
}

fn host(what: &'static str) -> impl FnOnce(Errno) -> AloneError {
    move |source| AloneError::Host { what, source }
}

/// The socket of `--fd`, and nothing else that the caller left open. To be called before anything is opened.
///
/// # Errors
/// [`ListenError::Fd`], or descriptors cannot be closed.
pub fn inherit(socket: &Socket) -> Result<Option<OwnedFd>, AloneError> {
    let number = match socket {
        Socket::Path(..) => None,
        Socket::Fd(fd) => Some(*fd),
    };
    inherited::close_others(number).map_err(host("closing inherited descriptors"))?;
    number
        .map(|fd| inherited::take_one(fd).map_err(|source| ListenError::Fd { fd, source }.into()))
        .transpose()
}

/// Serves until there is nobody left to serve or this process is told to end; `inherited` is what [`inherit`] gave.
///
/// # Errors
/// [`AloneError`]
pub fn serve(alone: &Alone, inherited: Option<OwnedFd>) -> Result<(), AloneError> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().map_err(host("blocking signals"))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)
        .map_err(host("taking signals as a descriptor"))?;
    let binary = File::open("/proc/self/exe").map_err(AloneError::Binary)?;
    let door = Door::open(&alone.socket, inherited)?;
    let mut supervisor = Supervisor {
        alone,
        binary: binary.into(),
        deaths: Deaths::default(),
        may_start: true,
    };
    let result = supervisor.run(&door, &signals);
    door.close();
    result
}

struct Supervisor<'a> {
    alone: &'a Alone,
    binary: OwnedFd,
    deaths: Deaths,
    /// The rights of before the first start are still there.
    may_start: bool,
}

/// A device process at work.
struct Served {
    child: Child,
    lines: LogLines,
}

impl Supervisor<'_> {
    fn run(&mut self, door: &Door, signals: &SignalFd) -> Result<(), AloneError> {
        loop {
            let Some(front_end) = wait_for(door, signals)? else {
                return Ok(());
            };
            let served = self.start(front_end)?;
            let Some(ended) = follow(served, signals)? else {
                return Ok(());
            };
            match ended {
                WaitStatus::Exited(_, 0) => {
                    ipc::log::info!("the front end left");
                    if !self.alone.keep {
                        return Ok(());
                    }
                }
                WaitStatus::Signaled(_, Signal::SIGSYS, _) => return Err(AloneError::Filter),
                WaitStatus::Signaled(_, signal, _) => {
                    ipc::log::warn!("the serving process was killed by {signal}");
                    if !self.deaths.allow_another(signal, Instant::now()) {
                        return Err(AloneError::TooOften(self.deaths.count()));
                    }
                }
                WaitStatus::Exited(_, status) if !self.alone.keep => {
                    return Err(AloneError::Failed(status));
                }
                _ => {}
            }
            if !door.is_listening() {
                return Ok(());
            }
        }
    }

    fn start(&mut self, front_end: UnixStream) -> Result<Served, AloneError> {
        let Alone {
            device, backends, ..
        } = self.alone;
        let id = device.id();
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .map_err(host("making a log pipe"))?;
        let start = ipc::start::to_memfd(&StartMessage {
            version: PROTOCOL_VERSION,
            device: device.clone(),
            // A handful, which the caller opened.
            backend_fds: backends.len() as u32,
            userfault: false,
            beside: false,
            instead: false,
            seccomp: self.alone.seccomp,
            sandbox: self.alone.sandbox,
            log_level: self.alone.log_level,
        })?;
        let needs = device.needs(backends).map_err(AloneError::Backend)?;
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(AloneError::Backend);
        let mut fds = vec![
            (copy(&writer)?, 0),
            (copy(&writer)?, 1),
            (writer, FD_LOG),
            (OwnedFd::from(front_end), FD_VHOST_USER),
            (start, FD_START),
        ];
        for (fd, number) in backends.iter().zip(FD_BACKEND..) {
            fds.push((copy(fd)?, number));
        }
        let argv = [device.process(), id].map(|word| CString::new(word).unwrap_or_default());
        let child = ozone::spawn(DeviceLaunch {
            name: id,
            binary: self.binary.as_fd(),
            argv: argv.into(),
            fds,
            identity: Identity::least(),
            tree: None,
            limits: Limits {
                descriptors: needs.descriptors,
                memory: needs.memory,
                file_size: needs.file_size,
                locked_memory: needs.locked_memory,
                ..Limits::default()
            },
            cpus: None,
            mode: match self.alone.sandbox {
                SandboxMode::BestEffort => Sandbox::BestEffort,
                SandboxMode::Strict => Sandbox::Strict,
            },
            trace: false,
        })?
        .finish()?;
        for layer in child.layers.iter().filter(|layer| !layer.is_on()) {
            ipc::log::warn!("jail layer not in force: {layer}");
        }
        let has_users = child
            .layers
            .iter()
            .any(|layer| layer.layer == Layer::UserNamespace && layer.is_on());
        if std::mem::take(&mut self.may_start) {
            if has_users {
                ozone::keep_starting()?;
            } else {
                // The next jail takes the rights that this one took.
                ipc::log::warn!("without user namespaces the process outside keeps its rights");
            }
        }
        ipc::log::info!("serving a front end, process {}", child.pid);
        Ok(Served {
            child,
            lines: LogLines::new(id, reader),
        })
    }
}

/// Waits for a front end; `None` when this process is told to end.
fn wait_for(door: &Door, signals: &SignalFd) -> Result<Option<UnixStream>, AloneError> {
    match door.front_end() {
        FrontEnd::Here(stream) => stream
            .try_clone()
            .map(Some)
            .map_err(|e| ListenError::Accept(e).into()),
        FrontEnd::Listening(listener) => loop {
            let [come, told] = wait([Some(listener.as_fd()), Some(signals.as_fd())])?;
            if told {
                return Ok(None);
            }
            if come {
                match listener.accept() {
                    Ok((stream, _)) => return Ok(Some(stream)),
                    // It left before it was let in.
                    Err(e)
                        if matches!(
                            e.kind(),
                            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                        ) => {}
                    Err(e) => return Err(ListenError::Accept(e).into()),
                }
            }
        },
    }
}

/// Moves log lines until the process ends and tells how; `None` when this process is told to end, after the other has.
fn follow(mut served: Served, signals: &SignalFd) -> Result<Option<WaitStatus>, AloneError> {
    let log = ipc::log::descriptor();
    let mut told = false;
    loop {
        let life = served.child.pidfd.as_fd();
        let [line, over, signal] = wait([served.lines.pipe(), Some(life), Some(signals.as_fd())])?;
        if line {
            served.lines.relay(log);
        }
        if over {
            let ended = waitid(Id::PIDFd(life), WaitPidFlag::WEXITED)
                .map_err(host("waiting for the serving process"))?;
            served.lines.relay(log);
            return Ok((!told).then_some(ended));
        }
        if signal && !told {
            told = true;
            // Read, so that it is not told again.
            let _ = signals.read_signal();
            // It is not reaped yet, so the number is its own. It dies with this process in any case.
            if nix::sys::signal::kill(served.child.pid, Signal::SIGKILL).is_err() {
                return Ok(None);
            }
        }
    }
}

/// Which of these is readable, once one is.
fn wait<const N: usize>(fds: [Option<BorrowedFd<'_>>; N]) -> Result<[bool; N], AloneError> {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .flatten()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(host("waiting")(errno)),
        }
    }
    Ok(fds.map(|fd| {
        fd.is_some_and(|fd| {
            polled
                .iter()
                .find(|polled| polled.as_fd().as_raw_fd() == fd.as_raw_fd())
                .is_some_and(|polled| polled.any() == Some(true))
        })
    }))
}
