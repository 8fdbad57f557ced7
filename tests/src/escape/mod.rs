//! # Ways out of a jail
//!
//! **Job.** A table of attempts ([`attempts::all`]), what must become of each with the system call filter and without it
//! ([`Expect`]), and the two machines that make them: [`local`] inside of a program that stands in for a device, [`remote`] in
//! a live process of the product that a tracer has taken over.
//! **Who is not trusted.** The process that tries: that an attempt was killed is known from how its process ended, and by which
//! call, not from what it says afterwards.
//! **Why this way.** A jail that is only ever seen with all its layers tells nothing about them: behind a filter that kills,
//! everything else could be missing. So each attempt is made twice, and the second time without the filter.

pub mod attempts;
pub mod exhaust;
pub mod local;
pub mod remote;

use std::fmt;

/// Something that can make system calls in a jail.
pub trait Machine {
    /// Makes call `number`; at most six arguments, the rest are 0.
    ///
    /// # Errors
    /// The call's own error, or that there is nobody left to make calls.
    fn call(&mut self, number: i64, args: &[u64]) -> Result<u64, Stop>;

    /// Makes call `number` of the 32-bit table, without arguments.
    ///
    /// # Errors
    /// As for [`Self::call`].
    fn call32(&mut self, number: u32) -> Result<u64, Stop>;

    /// The address of a copy of `bytes` in the jailed process's memory, which it can write too; stays until the attempt's end.
    ///
    /// # Errors
    /// There is no room, or nobody left.
    fn put(&mut self, bytes: &[u8]) -> Result<u64, Stop>;

    /// `length` bytes of the jailed process's memory.
    ///
    /// # Errors
    /// Nothing is mapped there, or nobody is left.
    fn get(&mut self, address: u64, length: usize) -> Result<Vec<u8>, Stop>;

    /// Writes to the jailed process's memory.
    ///
    /// # Errors
    /// Nothing is mapped there, or nobody is left.
    fn set(&mut self, address: u64, bytes: &[u8]) -> Result<(), Stop>;
}

/// Why an attempt goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The kernel's answer to a call.
    Errno(i32),
    /// The process is gone.
    Gone,
}

/// What an attempt has to say once all its calls were answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It has something that a jail should keep from it.
    Through(u64),
    /// What it got concerns itself alone, which was looked at.
    Confined,
}

/// The jail that an attempt is made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jail {
    /// A disk's process.
    Block,
    /// The process of a disk whose image is qcow2.
    Qcow2,
    /// A network card's process.
    Net,
    /// The file-sharing daemon.
    Fs,
    /// The control process's event loop.
    Main,
    /// The control process's QMP thread.
    Qmp,
    /// A thread of the control process that runs a guest's processor.
    Vcpu,
    /// The control process's thread that maps files of shared folders for the guest.
    Window,
    /// The control process's thread that brings in the memory of a snapshot.
    Pager,
    /// A thread of the file-sharing daemon that moves data.
    Mover,
}

impl Jail {
    /// Whether it is a process that serves one device.
    #[must_use]
    pub const fn is_device(self) -> bool {
        matches!(self, Self::Block | Self::Qcow2 | Self::Net | Self::Fs)
    }
}

impl fmt::Display for Jail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "block",
            Self::Qcow2 => "qcow2",
            Self::Net => "net",
            Self::Fs => "fs",
            Self::Main => "control main",
            Self::Qmp => "control qmp",
            Self::Vcpu => "control vcpu",
            Self::Window => "control window",
            Self::Pager => "control pager",
            Self::Mover => "fs mover",
        })
    }
}

/// Descriptors that the process holds; -1 for what it has none of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The log pipe.
    pub log: i32,
    /// The vhost-user socket.
    pub socket: i32,
    /// The image, the tap, the shared folder.
    pub backend: i32,
    /// Guest RAM.
    pub ram: i32,
    /// A queue's doorbell.
    pub kick: i32,
    /// A queue's interrupt.
    pub call: i32,
    /// A disk's own io_uring, as its process makes it.
    pub ring: i32,
}

impl Held {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = i32> + use<> {
        let Self {
            log,
            socket,
            backend,
            ram,
            kick,
            call,
            ring,
        } = *self;
        [log, socket, backend, ram, kick, call, ring]
            .into_iter()
            .filter(|fd| *fd >= 0)
    }
}

/// One of [`Held`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // as there
pub enum Which {
    Log,
    Socket,
    Backend,
    Ram,
    Kick,
    Ring,
}

impl Which {
    const fn of(self, held: &Held) -> i32 {
        match self {
            Self::Log => held.log,
            Self::Socket => held.socket,
            Self::Backend => held.backend,
            Self::Ram => held.ram,
            Self::Kick => held.kick,
            Self::Ring => held.ring,
        }
    }
}

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// A number.
    N(u64),
    /// Address of these bytes.
    Bytes(&'static [u8]),
    /// Address of so many zeros.
    Room(usize),
    /// A descriptor.
    Fd(Which),
}

/// What is tried.
#[derive(Clone, Copy)]
pub enum Act {
    /// One call; that it is answered is enough to be through.
    Call(i64, &'static [Arg]),
    /// This call on each descriptor that is held, in place of its first argument; through if one takes it.
    Each(i64, &'static [Arg]),
    /// Several.
    Steps(fn(&mut dyn Machine, &Held) -> Result<Verdict, Stop>),
}

impl fmt::Debug for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(number, args) => write!(f, "call {number} {args:?}"),
            Self::Each(number, args) => write!(f, "call {number} {args:?} on each descriptor"),
            Self::Steps(_) => f.write_str("steps"),
        }
    }
}

/// What must become of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The filter kills the process.
    Killed,
    /// The kernel's answer is one of these.
    Refused(&'static [i32]),
    /// It is answered, and of no use outside of the process.
    Confined,
    /// The filter kills the process, or, if it lets the call pass, the kernel's answer is one of these.
    KilledOr(&'static [i32]),
    /// It works: the filter is the only layer, for this reason.
    FilterOnly(&'static str),
    /// It works, with the filter too: it is what the process is for.
    Granted(&'static str),
    /// It works, for this reason, unless the host's kernel lacks what it takes and says so by one of these.
    Either(&'static [i32], &'static str),
}

/// What became of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// SIGSYS.
    Killed,
    /// The kernel's answer.
    Refused(i32),
    /// See [`Verdict`].
    Confined,
    /// See [`Verdict`].
    Through(u64),
}

impl Outcome {
    /// From what an attempt returned; `None` if its process is gone, and only its end can tell.
    #[must_use]
    pub const fn of(result: Result<Verdict, Stop>) -> Option<Self> {
        match result {
            Ok(Verdict::Through(value)) => Some(Self::Through(value)),
            Ok(Verdict::Confined) => Some(Self::Confined),
            Err(Stop::Errno(errno)) => Some(Self::Refused(errno)),
            Err(Stop::Gone) => None,
        }
    }

    /// Whether it is what was expected.
    #[must_use]
    pub fn is(self, expect: Expect) -> bool {
        match (self, expect) {
            (Self::Killed, Expect::Killed | Expect::KilledOr(_))
            | (Self::Confined, Expect::Confined)
            | (Self::Through(_), Expect::FilterOnly(_) | Expect::Either(..) | Expect::Granted(_)) => {
                true
            }
            (
                Self::Refused(errno),
                Expect::Refused(list) | Expect::KilledOr(list) | Expect::Either(list, _),
            ) => list.contains(&errno),
            _ => false,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Killed => f.write_str("killed"),
            Self::Refused(errno) => {
                write!(f, "refused {:?}", nix::errno::Errno::from_raw(*errno))
            }
            Self::Confined => f.write_str("confined"),
            Self::Through(value) => write!(f, "through {value:#x}"),
        }
    }
}

/// One way out, tried.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// Its name: letters, digits and dashes.
    pub name: &'static str,
    /// What is done.
    pub act: Act,
    /// The image of the disk is for reading only.
    pub readonly: bool,
    filtered: Expect,
    rest: Expect,
    others: [Option<(Jail, Expect, Expect)>; 4],
    only: Option<&'static [Jail]>,
}

impl Attempt {
    /// An attempt that the filter kills, and that something else refuses with EPERM.
    #[must_use]
    pub const fn new(name: &'static str, act: Act) -> Self {
        Self {
            name,
            act,
            readonly: false,
            filtered: Expect::Killed,
            rest: Expect::Refused(&[libc::EPERM]),
            others: [None; 4],
            only: None,
        }
    }

    /// What stops it without the filter.
    #[must_use]
    pub const fn rest(mut self, rest: Expect) -> Self {
        self.rest = rest;
        self
    }

    /// The errors that stop it without the filter.
    #[must_use]
    pub const fn refused(self, errnos: &'static [i32]) -> Self {
        self.rest(Expect::Refused(errnos))
    }

    /// It works without the filter.
    #[must_use]
    pub const fn filter_only(self, why: &'static str) -> Self {
        self.rest(Expect::FilterOnly(why))
    }

    /// It works without the filter, unless the host's kernel lacks it.
    #[must_use]
    pub const fn either(self, errnos: &'static [i32], why: &'static str) -> Self {
        self.rest(Expect::Either(errnos, why))
    }

    /// It works without the filter, and is of no use outside.
    #[must_use]
    pub const fn confined(self) -> Self {
        self.rest(Expect::Confined)
    }

    /// The filter may let its calls pass, since the device needs such calls; what else stops it then does so.
    #[must_use]
    pub const fn passes(mut self) -> Self {
        self.filtered = match self.rest {
            Expect::Refused(errnos) => Expect::KilledOr(errnos),
            other => other,
        };
        self
    }

    /// The filter answers its call with an error, or kills.
    #[must_use]
    pub const fn answered(mut self, errnos: &'static [i32]) -> Self {
        self.filtered = Expect::KilledOr(errnos);
        self
    }

    /// The filter of a shared folder's process may let its calls pass; what else stops it then does so.
    #[must_use]
    pub const fn passes_in_fs(self) -> Self {
        let filtered = match self.rest {
            Expect::Refused(errnos) => Expect::KilledOr(errnos),
            other => other,
        };
        let rest = self.rest;
        self.but(Jail::Fs, filtered, rest)
    }

    /// A shared folder's process may do that, in its folder.
    #[must_use]
    pub const fn granted_in_fs(self, why: &'static str) -> Self {
        self.but(Jail::Fs, Expect::Granted(why), Expect::Granted(why))
    }

    /// The filter alone stops that in a shared folder's process.
    #[must_use]
    pub const fn filter_only_in_fs(self, why: &'static str) -> Self {
        self.but(Jail::Fs, Expect::Killed, Expect::FilterOnly(why))
    }

    /// One jail expects something else, with and without the filter.
    #[must_use]
    pub const fn but(mut self, jail: Jail, filtered: Expect, rest: Expect) -> Self {
        let mut at = 0;
        while self.others[at].is_some() {
            at += 1;
        }
        self.others[at] = Some((jail, filtered, rest));
        self
    }

    /// Makes sense in these jails only.
    #[must_use]
    pub const fn only(mut self, jails: &'static [Jail]) -> Self {
        self.only = Some(jails);
        self
    }

    /// With a disk that is for reading only.
    #[must_use]
    pub const fn on_readonly(mut self) -> Self {
        self.readonly = true;
        self.only(&[Jail::Block, Jail::Qcow2])
    }

    /// What must become of it in `jail`, with and without the filter; `None` if it makes no sense there.
    #[must_use]
    pub fn expected(&self, jail: Jail) -> Option<(Expect, Expect)> {
        if self.only.is_some_and(|only| !only.contains(&jail)) {
            return None;
        }
        let other = self.others.iter().flatten().find(|(j, ..)| *j == jail);
        Some(
            other.map_or((self.filtered, self.rest), |(_, with, without)| {
                (*with, *without)
            }),
        )
    }

    /// What must become of it with a filter, in a process that no [`Jail`] stands for.
    #[must_use]
    pub const fn filtered(&self) -> Expect {
        self.filtered
    }

    /// Makes it.
    ///
    /// # Errors
    /// Where the kernel stopped it.
    pub fn make(&self, machine: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
        match self.act {
            Act::Call(number, args) => {
                let args = arguments(machine, held, args)?;
                machine.call(number, &args).map(Verdict::Through)
            }
            Act::Each(number, args) => {
                let mut answer = Stop::Errno(libc::EBADF);
                for fd in held.all() {
                    let mut list = vec![fd as u64];
                    list.extend(arguments(machine, held, args)?);
                    match machine.call(number, &list) {
                        Ok(value) => return Ok(Verdict::Through(value)),
                        Err(Stop::Gone) => return Err(Stop::Gone),
                        // "Not for this kind of descriptor" is the least that can be said.
                        Err(Stop::Errno(libc::ENOTTY | libc::ENOSYS))
                            if answer != Stop::Errno(libc::EBADF) => {}
                        Err(stop) => answer = stop,
                    }
                }
                Err(answer)
            }
            Act::Steps(steps) => steps(machine, held),
        }
    }
}

fn arguments(machine: &mut dyn Machine, held: &Held, args: &[Arg]) -> Result<Vec<u64>, Stop> {
    args.iter()
        .map(|arg| match *arg {
            Arg::N(number) => Ok(number),
            Arg::Bytes(bytes) => machine.put(bytes),
            Arg::Room(length) => machine.put(&vec![0; length]),
            Arg::Fd(which) => Ok(which.of(held) as u64),
        })
        .collect()
}
