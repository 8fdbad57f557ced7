//! Another program in the place of this one, while the guest works.
//!
//! **Job.** On `SIGUSR2` the process outside has the program tried that its path names by now: beside this one, with everything that
//! a start does but serving. If that went well it ends the process that serves, executes the program in its own place, and that
//! one starts a process that serves. Until it says that it does, the program of before is at hand, open, and gets its place back
//! if anything fails.
//! **Who is not trusted.** The process that serves, which shares its descriptors with the one outside: the new program is named by
//! its path, and the one of before is opened when nobody serves, and is looked at again before it is executed.
//! **Why this way.** Executed in place, a program has the descriptors, the process id and the parent of the one before: nothing is
//! sent anywhere, and whoever manages the daemon sees the process that it has started. What is to be known beside the
//! descriptors is in the tables, which are in shared memory, and in one [`Plan`].

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use device_host::Record;
use device_host::alone::socket::Inherited;
use fs_device::passthrough::Store;
use ipc::codec::{self, CodecError};
use ipc::limits::UPGRADE_PATIENCE_MS;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use ozone::successor::{self, Words};
use ozone::tree::Ended;
use seccomp_policies::{Action, Policy};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::inherited;

/// First argument of a program that is tried: one that knows nothing of this refuses it, and ends.
pub(crate) const TRIAL: &str = "--upgrade-trial";
/// Names the descriptor of the plan, and behind a comma that of the program of before.
const NAME: &str = "VHOST_USER_FS_UPGRADE";
/// In front of a plan. The last byte is to be counted up with every change of what is behind it.
const FORM: &[u8; 12] = b"fs-upgrade\x00\x01";
/// What a program that can go on says when it was tried.
const READY: &[u8] = b"ready";
/// How long each of the two programs may take.
pub(crate) const PATIENCE: Duration = Duration::from_millis(UPGRADE_PATIENCE_MS);

/// Why this program stays.
#[derive(Debug, Error)]
pub(crate) enum UpgradeError {
    /// There is no such program, or not at this path.
    #[error("{0}")]
    Program(PathBuf, #[source] io::Error),
    /// A system call failed.
    #[error("{0}")]
    Call(&'static str, #[source] Errno),
    /// The plan cannot be written or read.
    #[error("what is handed on")]
    Plan(#[source] io::Error),
    /// The plan cannot be written or understood.
    #[error("what is handed on")]
    Codec(#[from] CodecError),
    /// It was tried, and said why it cannot go on, or did not.
    #[error("{program}: {why}")]
    Trial {
        /// Its path.
        program: PathBuf,
        /// What became of it.
        why: String,
    },
    /// There is no process that could do it.
    #[error(
        "this daemon has rights of the host's user namespace (-modcaps), which it could give to no other"
    )]
    Alone,
    /// Somebody put another one there after the try.
    #[error("{0}: was replaced while it was tried")]
    Replaced(PathBuf),
    /// It is of another version, whose plans are different.
    #[error("the running program hands on in a form that this one does not know")]
    Form,
    /// Tables are kept in another way.
    #[error(
        "what is kept has layout {theirs:#x}, and this program goes on with layout {ours:#x} only"
    )]
    Layout {
        /// Of what there is.
        theirs: u64,
        /// Of this program.
        ours: u64,
    },
    /// A descriptor is missing.
    #[error("descriptor {0} was not handed on")]
    Descriptor(RawFd),
    /// What is in the environment is not what a program before this one has put there.
    #[error("environment variable {NAME} is set, and not by an upgrade")]
    Environment,
}

/// What the next program is to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// [`Store::layout`] and [`Record::layout`].
    layouts: (u64, u64),
    /// Bytes of the path that programs are looked for at, and of the shared folder's.
    program: Vec<u8>,
    source: Vec<u8>,
    /// Descriptors that the guest may have; threads that move data.
    pub(crate) descriptors: u64,
    pub(crate) movers: u64,
    /// The tables, what is logged to, and where the front end will come from: whether it is listened at.
    memory: RawFd,
    log: RawFd,
    socket: Option<(bool, RawFd)>,
    /// The filters of the process outside.
    pub(crate) filters: Vec<u64>,
    /// [`Record::words`]
    record: Vec<u64>,
    /// Version of the program that wrote this.
    pub(crate) version: String,
    /// Where a program that is tried says what it has to say.
    says: Option<RawFd>,
}

/// What a process outside goes by, of a program that has just been started or of one that goes on.
#[derive(Debug)]
pub(crate) struct Estate {
    pub(crate) program: PathBuf,
    pub(crate) source: PathBuf,
    pub(crate) store: Store,
    pub(crate) record: Record,
    pub(crate) descriptors: usize,
    pub(crate) movers: usize,
    /// Until there is a connection. The process outside has it as a number only; who serves closes it.
    pub(crate) front_end: ManuallyDrop<Option<Inherited>>,
    pub(crate) log: RawFd,
    pub(crate) filters: Vec<u64>,
}

impl Estate {
    /// Numbers that no process that served has opened: those that are used by this one.
    pub(crate) fn own(&self) -> BTreeSet<RawFd> {
        let mut own = BTreeSet::from([0, 1, 2, self.log]);
        own.extend(self.socket().map(|(_, fd)| fd));
        own
    }

    /// Numbers that the tables name.
    pub(crate) fn kept(&self) -> BTreeSet<RawFd> {
        let mut kept = BTreeSet::new();
        self.store.descriptors(|fd| {
            kept.insert(fd);
        });
        self.record.descriptors(|fd| {
            kept.insert(fd);
        });
        kept
    }

    fn socket(&self) -> Option<(bool, RawFd)> {
        // With a connection it has been closed, and the number may be anything's.
        let front_end = self.front_end.as_ref();
        front_end
            .filter(|_| !self.record.is_connected())
            .map(|front_end| match front_end {
                Inherited::Listening(listener) => (true, listener.as_raw_fd()),
                Inherited::Connected(stream) => (false, stream.as_raw_fd()),
            })
    }

    fn plan(&self, says: Option<RawFd>) -> Result<Plan, UpgradeError> {
        let memory = self.store.memory();
        Ok(Plan {
            layouts: (Store::layout(), Record::layout()),
            program: self.program.as_os_str().as_bytes().to_vec(),
            source: self.source.as_os_str().as_bytes().to_vec(),
            descriptors: self.descriptors as u64,
            movers: self.movers as u64,
            memory: memory
                .ok_or(UpgradeError::Call("the tables", Errno::EFBIG))?
                .as_raw_fd(),
            log: self.log,
            socket: self.socket(),
            filters: self.filters.clone(),
            record: self.record.words(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            says,
        })
    }

    /// Installs the filter of a process outside.
    pub(crate) fn filter(&mut self, action: Action) -> Result<(), seccomp_policies::Error> {
        let installed = filter(&self.filters, action)?;
        self.filters.extend(installed);
        Ok(())
    }

    /// Has the program tried that is at the path now. The guest goes on meanwhile.
    ///
    /// # Errors
    /// It cannot go on with what there is, or says nothing of the kind.
    pub(crate) fn try_out(&self) -> Result<Tried, UpgradeError> {
        let call = |what| move |errno| UpgradeError::Call(what, errno);
        let (path, found) = self.look()?;
        let (hears, says) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(call("making a socket pair"))?;
        let plan = self.plan(Some(says.as_raw_fd()))?;
        let kept = [plan.memory];
        let plan = write(&plan)?;
        let words = words(true, plan.as_raw_fd(), None);
        let kept = [&kept[..], &[plan.as_raw_fd()]].concat();
        let tried = successor::try_out(&path, &words, &kept, (hears, says), PATIENCE)
            .map_err(call("starting the new program"))?;
        if tried.said == READY && tried.ended == Some(Ended::Exited(0)) {
            return Ok(Tried { path, found });
        }
        let how = tried.ended.map_or_else(
            || format!("it took more than {} seconds", PATIENCE.as_secs()),
            |ended| format!("it {ended}"),
        );
        let why = match String::from_utf8_lossy(&tried.said) {
            said if tried.said.is_empty() || tried.said == READY => {
                format!("{how} and did not say that it can go on{said:.0}")
            }
            said => said.into_owned(),
        };
        let program = self.program.clone();
        Err(UpgradeError::Trial { program, why })
    }

    fn look(&self) -> Result<(CString, Metadata), UpgradeError> {
        let wrong = |error| UpgradeError::Program(self.program.clone(), error);
        let path = CString::new(self.program.as_os_str().as_bytes())
            .map_err(|error| wrong(error.into()))?;
        let found = std::fs::metadata(&self.program).map_err(wrong)?;
        Ok((path, found))
    }

    /// Executes the program that was tried, in this one's place. To be called when nobody serves. Returns only on failure, and
    /// then this program can go on.
    pub(crate) fn take_place(&self, tried: &Tried) -> UpgradeError {
        let all = || -> Result<Errno, UpgradeError> {
            let found = self.look()?.1;
            if identity_of(&found) != identity_of(&tried.found) {
                return Err(UpgradeError::Replaced(self.program.clone()));
            }
            let previous = File::open("/proc/self/exe").map_err(UpgradeError::Plan)?;
            let plan = self.hand_on()?;
            successor::hand_on(previous.as_raw_fd())
                .map_err(|errno| UpgradeError::Call("handing a descriptor on", errno))?;
            let words = words(false, plan.as_raw_fd(), Some(previous.as_raw_fd()));
            Ok(successor::take_place(&tried.path, &words))
        };
        match all() {
            Ok(errno) => UpgradeError::Program(self.program.clone(), errno.into()),
            Err(error) => error,
        }
    }

    /// Everything stays open for the next program, and nothing else.
    pub(crate) fn hand_on(&self) -> Result<File, UpgradeError> {
        let call = |errno| UpgradeError::Call("handing descriptors on", errno);
        let plan = write(&self.plan(None)?)?;
        successor::hand_on_nothing().map_err(call)?;
        let mut numbers = self.own();
        numbers.extend(self.kept());
        for fd in numbers {
            match successor::hand_on(fd) {
                // The process that served was killed before it noted that it had closed it.
                Ok(()) | Err(Errno::EBADF) => {}
                Err(errno) => return Err(call(errno)),
            }
        }
        successor::hand_on(plan.as_raw_fd()).map_err(call)?;
        Ok(plan)
    }
}

/// A program that can go on.
#[derive(Debug)]
pub(crate) struct Tried {
    path: CString,
    found: Metadata,
}

fn identity_of(found: &Metadata) -> (u64, u64, u64, i64, i64) {
    let (seconds, nanoseconds) = (found.ctime(), found.ctime_nsec());
    (found.dev(), found.ino(), found.size(), seconds, nanoseconds)
}

/// Installs the filter of a process outside, unless it or a program before this one has the same among its `filters`. Tells the
/// new one.
pub(crate) fn filter(
    filters: &[u64],
    action: Action,
) -> Result<Option<u64>, seccomp_policies::Error> {
    let filter = identity(action);
    if filters.contains(&filter) {
        // What goes with one.
        seccomp_policies::heap::settle();
        return Ok(None);
    }
    seccomp_policies::install(Policy::FsOutside, action)?;
    Ok(Some(filter))
}

/// The filter of a process outside, as one number.
fn identity(action: Action) -> u64 {
    let program = Policy::FsOutside.program(action);
    // FNV-1a, of instructions.
    program.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, i| {
        let word = u64::from(i.code) << 48 | u64::from(i.jt) << 40 | u64::from(i.jf) << 32;
        (hash ^ (word | u64::from(i.k))).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A program's words: this one's, with the plan's number, and that of the program of before.
fn words(trial: bool, plan: RawFd, previous: Option<RawFd>) -> Words {
    let text = |text: OsString| CString::new(text.into_vec()).ok();
    let mut arguments: Vec<CString> = std::env::args_os().filter_map(text).collect();
    arguments.retain(|word| word.as_bytes() != TRIAL.as_bytes());
    if trial {
        let at = arguments.len().min(1);
        arguments.insert(at, CString::new(TRIAL).unwrap_or_default());
    }
    let mut environment: Vec<CString> = std::env::vars_os()
        .filter(|(name, _)| name != NAME)
        .filter_map(|(name, value)| text([name, OsString::from("="), value].into_iter().collect()))
        .collect();
    let value = match previous {
        Some(previous) => format!("{NAME}={plan},{previous}"),
        None => format!("{NAME}={plan}"),
    };
    environment.extend(CString::new(value));
    Words::new(arguments, environment)
}

fn write(plan: &Plan) -> Result<File, UpgradeError> {
    let bytes = [&FORM[..], &codec::encode(plan)?].concat();
    let fd = memfd_create(c"upgrade", MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| UpgradeError::Call("memory for what is handed on", errno))?;
    let mut file = File::from(fd);
    file.write_all(&bytes).map_err(UpgradeError::Plan)?;
    Ok(file)
}

fn read(file: &mut File) -> Result<Plan, UpgradeError> {
    file.rewind().map_err(UpgradeError::Plan)?;
    let mut bytes = Vec::new();
    let most = ipc::limits::MAX_MESSAGE + FORM.len() + 1;
    file.take(most as u64)
        .read_to_end(&mut bytes)
        .map_err(UpgradeError::Plan)?;
    let plan = bytes.strip_prefix(FORM).ok_or(UpgradeError::Form)?;
    Ok(codec::decode(plan)?)
}

/// What the program before this one left.
#[derive(Debug)]
pub(crate) struct Handed {
    plan: File,
    /// The program, to give its place back to.
    pub(crate) previous: Option<Previous>,
}

/// The program of before.
#[derive(Debug)]
pub(crate) struct Previous {
    file: ManuallyDrop<File>,
    found: (u64, u64),
}

impl Previous {
    fn new(file: File) -> Option<Self> {
        let found = file.metadata().ok()?;
        Some(Self {
            found: (found.dev(), found.ino()),
            file: ManuallyDrop::new(file),
        })
    }

    /// Its number, which stays open.
    pub(crate) fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// It is not needed any more.
    pub(crate) fn close(self) {
        drop(ManuallyDrop::into_inner(self.file));
    }

    /// Executes it in this program's place, with what is handed on. To be called when nobody serves. Returns only on failure.
    pub(crate) fn give_place_back(&self, plan: Result<File, UpgradeError>) -> UpgradeError {
        let call = |errno| UpgradeError::Call("giving the place back", errno);
        let all = || -> Result<Errno, UpgradeError> {
            // Whoever served in between had this number too.
            let found = self.file.metadata().map_err(UpgradeError::Plan)?;
            if (found.dev(), found.ino()) != self.found {
                return Err(call(Errno::ESTALE));
            }
            let plan = plan?;
            successor::hand_on(plan.as_raw_fd()).map_err(call)?;
            let words = words(false, plan.as_raw_fd(), None);
            Ok(successor::give_place_back(self.file.as_fd(), &words))
        };
        match all() {
            Ok(errno) => call(errno),
            Err(error) => error,
        }
    }
}

impl Handed {
    /// What there is, if this program was started to go on for another one.
    pub(crate) fn take() -> Result<Option<Self>, UpgradeError> {
        let Some(value) = std::env::var_os(NAME) else {
            return Ok(None);
        };
        let numbers: Option<Vec<RawFd>> = value
            .to_str()
            .map(|text| text.split(',').map(|number| number.parse().ok()).collect())
            .unwrap_or_default();
        let (plan, previous) = match numbers.as_deref() {
            Some([plan]) => (*plan, None),
            Some([plan, previous]) if plan != previous => (*plan, Some(*previous)),
            _ => return Err(UpgradeError::Environment),
        };
        let taken = |fd| inherited::handed_on(fd).map(File::from);
        Ok(Some(Self {
            plan: taken(plan).ok_or(UpgradeError::Environment)?,
            previous: previous.and_then(taken).and_then(Previous::new),
        }))
    }

    pub(crate) fn plan(&mut self) -> Result<Plan, UpgradeError> {
        read(&mut self.plan)
    }

    /// The plan as it came, and the program of before.
    pub(crate) fn into_parts(self) -> (File, Option<Previous>) {
        (self.plan, self.previous)
    }
}

impl Plan {
    /// What this program must know to go on.
    pub(crate) fn check(&self) -> Result<(), UpgradeError> {
        let ours = (Store::layout(), Record::layout());
        for (theirs, ours) in [(self.layouts.0, ours.0), (self.layouts.1, ours.1)] {
            if theirs != ours {
                return Err(UpgradeError::Layout { theirs, ours });
            }
        }
        Ok(())
    }

    /// What to log to.
    pub(crate) fn log(&self) -> Result<OwnedFd, UpgradeError> {
        inherited::handed_on(self.log).ok_or(UpgradeError::Descriptor(self.log))
    }

    /// Where to say what comes of a try.
    pub(crate) fn says(&self) -> Option<File> {
        self.says.and_then(inherited::handed_on).map(File::from)
    }

    /// The shared folder.
    pub(crate) fn source(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(&self.source))
    }

    /// The tables, which stay where they are.
    pub(crate) fn tables(&self) -> Result<Store, UpgradeError> {
        let memory = inherited::handed_on(self.memory)
            .map(ManuallyDrop::new)
            .ok_or(UpgradeError::Descriptor(self.memory))?;
        Store::adopt(&memory).map_err(|errno| UpgradeError::Call("what is kept", errno))
    }

    /// A page of its own with what the connection has come to.
    pub(crate) fn connection(&self) -> Result<Record, UpgradeError> {
        Record::of(&self.record)
            .map_err(|errno| UpgradeError::Call("what the connection has come to", errno))
    }

    /// What the program of before had.
    pub(crate) fn estate(self, log: RawFd) -> Result<Estate, UpgradeError> {
        let store = self.tables()?;
        let record = self.connection()?;
        let front_end = self
            .socket
            .map(|(listening, number)| {
                let socket = inherited::handed_on(number);
                let socket = socket.ok_or(UpgradeError::Descriptor(number))?;
                Ok::<_, UpgradeError>(if listening {
                    Inherited::Listening(socket.into())
                } else {
                    Inherited::Connected(socket.into())
                })
            })
            .transpose()?;
        Ok(Estate {
            program: PathBuf::from(OsStr::from_bytes(&self.program)),
            source: self.source(),
            store,
            record,
            // At most a million, and 64.
            descriptors: self.descriptors as usize,
            movers: self.movers as usize,
            front_end: ManuallyDrop::new(front_end),
            log,
            filters: self.filters,
        })
    }
}

/// Says that this program can go on.
pub(crate) fn say_ready(says: &File) -> Result<(), UpgradeError> {
    say(says, READY)
}

/// Says what keeps it from that.
pub(crate) fn say(mut says: &File, text: &[u8]) -> Result<(), UpgradeError> {
    says.write_all(text).map_err(UpgradeError::Plan)
}
