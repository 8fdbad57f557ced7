//! From exec to serving: [`Prepared`] -> [`Jailed`] -> [`Serving`].
//!
//! **Job.** [`run`] is the `main` of every device process that the broker starts: take the descriptors, read the start
//! message, build the device, lock the jail, serve.
//!
//! **Who is not trusted.** After [`Prepared::enter_jail`]: this process. Before it, input is the sealed start message only.
//!
//! **Why this way.** Each state is a type that only the one before can become, so code that serves without a jail does not
//! compile. How the socket came to be is not part of it: [`Jailed::serve`] takes any connected stream, so another way to start
//! needs another `run` and no other server.

use std::error::Error;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use ipc::PROTOCOL_VERSION;
use ipc::limits::MAX_MESSAGE_FDS;
use ipc::start::{FD_BACKEND, StartError, StartMessage};
use thiserror::Error;

use crate::device::Device;
use crate::inherited::Inherited;
use crate::jail::{self, JailError};
use crate::keeper::{self, Estate, KeeperError, Kept};
use crate::record::Record;
use crate::server::{Connection, Resources, ServeError};

/// The back-end descriptors, in the order that the device's spec names them.
#[derive(Debug)]
pub struct BackendFds(pub(crate) std::vec::IntoIter<OwnedFd>);

impl BackendFds {
    /// The next one; `None` after the last.
    pub fn take(&mut self) -> Option<OwnedFd> {
        self.0.next()
    }

    /// How many are left.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why a device process does not start, or ended other than by its front end's leave.
#[derive(Debug, Error)]
pub enum RunError {
    /// No usable start message.
    #[error("start")]
    Start(#[from] StartError),
    /// Another build.
    #[error(
        "start message has protocol version {got}, this binary speaks {PROTOCOL_VERSION}: install all binaries from one build"
    )]
    Version {
        /// The broker's version.
        got: u32,
    },
    /// It is for another binary.
    #[error("start message is for {wanted}, this is {this}")]
    Binary {
        /// Name in the message.
        wanted: &'static str,
        /// Own name.
        this: &'static str,
    },
    /// A descriptor is missing, or there is one too many.
    #[error(
        "start message announces {count} back-end descriptors from {FD_BACKEND} on, but descriptor {fd} does not fit that"
    )]
    Descriptors {
        /// Announced.
        count: u32,
        /// The number that is not open and should be, or is and should not.
        fd: i32,
    },
    /// More descriptors than any device has.
    #[error(
        "start message announces {count} back-end descriptors: at most {MAX_MESSAGE_FDS} are possible"
    )]
    TooManyDescriptors {
        /// Announced.
        count: u32,
    },
    /// The device left descriptors untaken.
    #[error("{count} back-end descriptors are not used by this device")]
    UnusedDescriptors {
        /// How many.
        count: usize,
    },
    /// The device could not be built.
    #[error("device")]
    Device(#[source] Box<dyn Error + Send + Sync>),
    /// The jail could not be locked.
    #[error("jail")]
    Jail(#[from] JailError),
    /// Serving failed.
    #[error("serving")]
    Serve(#[from] ServeError),
    /// The state could not be kept.
    #[error("keeper")]
    Keeper(#[from] KeeperError),
}

/// A device that is built but has not been locked in.
#[derive(Debug)]
pub struct Prepared<D> {
    device: D,
    start: StartMessage,
    resources: Resources,
}

impl<D: Device> Prepared<D> {
    /// Makes what cannot be made inside the jail.
    ///
    /// # Errors
    /// The device's shape is impossible, or the host refuses an epoll set or a memfd.
    pub fn new(device: D, start: StartMessage) -> Result<Self, ServeError> {
        let resources = Resources::prepare(&device)?;
        Ok(Self {
            device,
            start,
            resources,
        })
    }

    /// Lets the front end watch this process's memory by `device`, a `/dev/userfaultfd`. Without, it brings in all that it has first.
    fn watch(&mut self, device: Option<OwnedFd>) {
        self.resources.userfault = device.and_then(|device| {
            crate::userfault::of_this_process(device)
                .inspect_err(|e| ipc::log::debug!("{}", ipc::log::with_causes(e)))
                .ok()
        });
    }

    /// Locks this process for good.
    ///
    /// # Errors
    /// A layer cannot be had; the process must end.
    pub fn enter_jail(self) -> Result<Jailed<D>, JailError> {
        let _proof: ozone::inner::Jailed = jail::lock(&self.start)?;
        Ok(Jailed {
            device: self.device,
            resources: self.resources,
        })
    }
}

/// A device of a stand-alone daemon, which builds its jail itself, around the tree that it serves.
#[derive(Debug)]
pub struct Standalone<D> {
    device: D,
    resources: Resources,
}

impl<D: Device> Standalone<D> {
    /// Makes what cannot be made inside the jail.
    ///
    /// # Errors
    /// As [`Prepared::new`].
    pub fn new(device: D) -> Result<Self, ServeError> {
        let resources = Resources::prepare(&device)?;
        crate::signals::prepare()?;
        Ok(Self { device, resources })
    }

    /// The process is in its jail now, as `_jail` proves.
    pub fn locked(self, _jail: &ozone::tree::Locked) -> Jailed<D> {
        Jailed {
            device: self.device,
            resources: self.resources,
        }
    }
}

/// A device in its jail, without a front end. Only [`Prepared::enter_jail`] and [`Standalone::locked`] make one.
#[derive(Debug)]
pub struct Jailed<D> {
    device: D,
    resources: Resources,
}

impl<D: Device> Jailed<D> {
    /// In a process that was forked in its jail, as `_jail` proves.
    pub(crate) fn heir(device: D, _jail: &ozone::inner::Jailed) -> Result<Self, ServeError> {
        let resources = Resources::prepare(&device)?;
        Ok(Self { device, resources })
    }

    /// As [`serve`](Self::serve), and a process after this one can go on by `record`.
    ///
    /// # Errors
    /// As for [`serve`](Self::serve).
    pub fn serve_on_record(
        self,
        front_end: UnixStream,
        record: Record,
    ) -> Result<Serving<D>, ServeError> {
        let mut serving = self.serve(front_end)?;
        serving.connection.keep(record)?;
        Ok(serving)
    }

    /// Goes on with the connection of `record`, which another process had. Its memory and queues are looked at by
    /// [`Serving::run`], so that a filter can be installed before.
    ///
    /// # Errors
    /// It cannot be gone on with, and is closed.
    pub fn resume(self, record: Record) -> Result<Serving<D>, ServeError> {
        Ok(Serving {
            connection: Connection::resume(record, self.device, self.resources)?,
            restore: Some(record),
        })
    }

    /// Takes a front end.
    ///
    /// # Errors
    /// Descriptors cannot be polled.
    pub fn serve(self, front_end: UnixStream) -> Result<Serving<D>, ServeError> {
        Ok(Serving {
            connection: Connection::new(front_end, self.device, self.resources)?,
            restore: None,
        })
    }
}

/// A device that serves a front end.
pub struct Serving<D: Device> {
    connection: Connection<D>,
    /// What is to be gone on with.
    restore: Option<Record>,
}

impl<D: Device> Serving<D> {
    /// Returns when the front end has left.
    ///
    /// # Errors
    /// The front end broke the protocol, or the host failed.
    pub fn run(mut self) -> Result<(), ServeError> {
        if let Some(record) = self.restore.take() {
            self.connection.restore(record)?;
        }
        self.connection.run()
    }
}

/// The `main` of a device process that the broker starts. `name` is the binary's name; `build` makes the device from its spec
/// and takes all back-end descriptors.
pub fn run<D, E>(
    name: &'static str,
    build: impl FnOnce(&StartMessage, &mut BackendFds) -> Result<D, E>,
) -> ExitCode
where
    D: Device,
    E: Error + Send + Sync + 'static,
{
    started(name, |inherited| {
        let (start, socket, device, userfault) = build_inherited(name, inherited, build)?;
        let mut prepared = Prepared::new(device, start)?;
        prepared.watch(userfault);
        ipc::log::trace!("prepared");
        let jailed = prepared.enter_jail()?;
        ipc::log::trace!("jailed");
        let serving = jailed.serve(UnixStream::from(socket))?;
        ipc::log::trace!("serving");
        serving.run()?;
        ipc::log::trace!("front end left");
        Ok(())
    })
}

/// As [`run`], for a device whose state outlives its process: `build` makes what is kept, and the first process keeps it and
/// starts those that serve.
pub fn run_kept<K, E>(
    name: &'static str,
    build: impl FnOnce(&StartMessage, &mut BackendFds) -> Result<Kept<K>, E>,
) -> ExitCode
where
    K: Estate,
    E: Error + Send + Sync + 'static,
{
    started(name, |inherited| {
        let (start, socket, kept, _) = build_inherited(name, inherited, build)?;
        keeper::run(&start, socket, kept)
    })
}

fn started(name: &'static str, run: impl FnOnce(Inherited) -> Result<(), RunError>) -> ExitCode {
    let Some(inherited) = Inherited::take() else {
        // Not started by the broker; whoever reads this is at a terminal.
        eprintln!(
            "{name}: a part of stratovirt, which starts it with a log, a vhost-user socket and a start message on descriptors 2, 3 and 4{}",
            // Not all can do without.
            if matches!(name, "block" | "net") {
                "; --help tells how to use it alone"
            } else {
                ""
            }
        );
        return ExitCode::from(2);
    };
    match run(inherited) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ipc::log::error!("{}", ipc::log::with_causes(&error));
            match error {
                RunError::Serve(ServeError::Host(fault)) => ExitCode::from(fault.status),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// From the start message to what `build` makes of it; with the socket of the front end, and a `/dev/userfaultfd` if there is one.
fn build_inherited<T, E>(
    name: &'static str,
    inherited: Inherited,
    build: impl FnOnce(&StartMessage, &mut BackendFds) -> Result<T, E>,
) -> Result<(StartMessage, OwnedFd, T, Option<OwnedFd>), RunError>
where
    E: Error + Send + Sync + 'static,
{
    // Before the log is set up, since the message says how much to log; a bad message is then reported at any level.
    let start = match ipc::start::from_memfd(inherited.start) {
        Ok(start) => start,
        Err(error) => {
            ipc::log::init(name, ipc::log::Level::Error, inherited.log);
            return Err(error.into());
        }
    };
    let process = start.device.process();
    ipc::log::init(process, start.log_level, inherited.log);
    // It was executed through a descriptor, whose number older kernels would show in process lists.
    if let Ok(process) = CString::new(process) {
        let _ = nix::sys::prctl::set_name(&process);
    }
    ipc::log::trace!("start message read");
    if start.version != PROTOCOL_VERSION {
        return Err(RunError::Version { got: start.version });
    }
    if start.device.binary() != name {
        return Err(RunError::Binary {
            wanted: start.device.binary(),
            this: name,
        });
    }
    let count = start.backend_fds;
    if count as usize > MAX_MESSAGE_FDS {
        return Err(RunError::TooManyDescriptors { count });
    }
    let mut fds = inherited
        .backends
        .take(count + u32::from(start.userfault))
        .map_err(|fd| RunError::Descriptors { count, fd })?;
    let userfault = start.userfault.then(|| fds.pop()).flatten();
    let mut backends = BackendFds(fds.into_iter());
    let built = build(&start, &mut backends).map_err(|error| RunError::Device(Box::new(error)))?;
    if !backends.is_empty() {
        return Err(RunError::UnusedDescriptors {
            count: backends.len(),
        });
    }
    Ok((start, inherited.vhost_user, built, userfault))
}
