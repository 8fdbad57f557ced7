//! The control process's end of the broker channel.
//!
//! **Job.** Start the broker, send requests, keep what it tells unasked until somebody wants it.
//! **Who is not trusted**: nobody; the broker is ours and its replies are typed.
//! **Why this way.** Requests can be sent before earlier replies are taken, so that devices start side by side while the
//! control process does its own work.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use ipc::channel::{Channel, ChannelError};
use ipc::control::sandbox::ProcessFacts;
use ipc::control::{Exit, Reply, Request};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::Pid;
use thiserror::Error;

/// Why the broker did not do what it was asked.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The broker could not be started.
    #[error("broker process cannot be started: {step} failed")]
    Spawn {
        /// What failed.
        step: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The channel failed.
    #[error("broker is gone")]
    Channel(#[from] ChannelError),
    /// The broker said no; the text is for the user.
    #[error("{0}")]
    Refused(String),
    /// The broker's answer belongs to another question.
    #[error("broker answered out of order: {0}")]
    OutOfOrder(String),
}

/// A device process that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceExit {
    /// Index into the policy's devices.
    pub index: u32,
    /// Process id that it had.
    pub pid: i32,
    /// How it ended.
    pub how: Exit,
    /// Its last log line.
    pub last_words: String,
}

/// What the broker says while the VM runs.
#[derive(Debug)]
pub enum Notice {
    /// Unasked: a device process ended and is reaped.
    Exited(DeviceExit),
    /// [`Request::Start`] worked.
    Started {
        /// Index into the policy's devices.
        index: u32,
        /// Its process id.
        pid: i32,
        /// The control process's end of its vhost-user socket.
        socket: UnixStream,
    },
    /// [`Request::Stop`] worked, and the process is reaped.
    Stopped {
        /// Index into the policy's devices.
        index: u32,
    },
    /// Unasked: the work of a device is done by this process, not by the one that was started.
    Serves {
        /// Index into the policy's devices.
        index: u32,
        /// Its process id.
        pid: i32,
    },
    /// [`Request::Add`] worked.
    Added,
    /// [`Request::DumpFile`] worked.
    DumpFile(File),
    /// [`Request::Remove`] worked.
    Removed,
    /// [`Request::Resize`] worked.
    Resized,
    /// [`Request::Unplug`] worked, and the process is reaped.
    Unplugged {
        /// Index of the device.
        index: u32,
    },
    /// [`Request::Settle`] worked, and one of two processes is reaped.
    Settled {
        /// Index of the device.
        index: u32,
    },
    /// A shared folder goes on with the process that it has: no other one took over.
    GoesOn {
        /// Index of the device.
        index: u32,
        /// Why, for the user.
        message: String,
    },
    /// The oldest request without a reply failed.
    Refused {
        /// For the log.
        message: String,
    },
}

/// What a snapshot is written to.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// As long as guest RAM.
    pub memory: File,
    /// Empty.
    pub state: File,
    /// Memory for what device processes hold: one empty file for each that was asked for.
    pub exchanges: Vec<File>,
}

/// What the broker says about a snapshot that it was asked to begin or to end.
#[derive(Debug)]
pub enum SnapshotAnswer {
    /// It can be written.
    Begun(SnapshotFiles),
    /// It is in its place, or gone if that was asked for.
    Ended,
    /// There is none; the text is for the user.
    Failed(String),
}

/// What confines each process of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The control process, the broker, and each device that has a process.
    pub processes: Vec<ProcessFacts>,
    /// Landlock's version in the running kernel; 0 without Landlock.
    pub landlock_abi: u32,
}

/// The broker as the control process sees it.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    pid: Pid,
    exits: VecDeque<DeviceExit>,
    /// Index and process id of each device process.
    pids: Vec<(u32, i32)>,
    /// As they were told, those that have come to serve.
    served: VecDeque<(u32, i32)>,
    /// Replies to a [`Request::Inspect`] whose end has not come yet.
    inspected: Vec<ProcessFacts>,
    inspections: VecDeque<Inspection>,
    snapshots: VecDeque<SnapshotAnswer>,
}

/// A process whose socket has closed is about to end; this long is waited for word of it, in milliseconds.
const LAST_WORDS_MS: u16 = 1000;

impl Client {
    /// Starts the broker. Must be called while this process has one thread: its end of the channel is open to whatever is
    /// executed meanwhile.
    pub fn spawn() -> Result<Self, ClientError> {
        let failed = |step| move |source| ClientError::Spawn { step, source };
        let (ours, theirs) = Channel::pair()?;
        fcntl(theirs.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).map_err(failed("fcntl"))?;
        // Std does this with posix_spawn, whose child borrows this process's memory until it executes. A fork would copy all
        // page tables for that moment, and both sides would pay for each page that they write to afterwards.
        let child = Command::new("/proc/self/exe")
            .arg0(super::process::ROLE)
            .arg(theirs.as_fd().as_raw_fd().to_string())
            // Environment variables are nobody's business there.
            .env_clear()
            .spawn()
            .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or_default()))
            .map_err(failed("executing /proc/self/exe (is /proc mounted?)"))?;
        Ok(Self {
            channel: ours,
            pid: Pid::from_raw(child.id().cast_signed()),
            exits: VecDeque::new(),
            pids: Vec::new(),
            served: VecDeque::new(),
            inspected: Vec::new(),
            inspections: VecDeque::new(),
            snapshots: VecDeque::new(),
        })
    }

    /// The broker's process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Takes the reply to [`Request::SetPolicy`]: the descriptor to log to.
    pub fn policy_set(&mut self) -> Result<Option<OwnedFd>, ClientError> {
        match self.reply()? {
            (Reply::PolicySet { .. }, mut fds) => Ok(fds.pop()),
            (other, _) => Err(ClientError::OutOfOrder(format!("{other:?}"))),
        }
    }

    /// Sends a request whose reply is taken later, in order, with [`Client::reply`].
    pub fn send(&self, request: &Request) -> Result<(), ClientError> {
        match self.channel.send(request, &[]) {
            // It may have said why before it went.
            Err(ChannelError::Closed) => Err(loop {
                match self.receive() {
                    Ok((Reply::Failed { message }, _)) => break ClientError::Refused(message),
                    Ok(_) => {}
                    Err(e) => break e.into(),
                }
            }),
            sent => Ok(sent?),
        }
    }

    /// Sends a request with descriptors, while the VM runs.
    pub fn send_with(&self, request: &Request, fds: &[Arc<OwnedFd>]) -> Result<(), ClientError> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        Ok(self.channel.send(request, &fds)?)
    }

    /// The next message. A broker that ended before it had read everything resets the connection, which hides what it
    /// said before from one call only.
    fn receive(&self) -> Result<(Reply, Vec<OwnedFd>), ChannelError> {
        match self.channel.receive() {
            Err(ChannelError::Closed) => self.channel.receive(),
            received => received,
        }
    }

    /// Waits for the next reply to a request; what is told unasked is kept.
    pub fn reply(&mut self) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        loop {
            match self.receive()? {
                (Reply::Failed { message }, _) => return Err(ClientError::Refused(message)),
                (
                    Reply::Exited {
                        index,
                        pid,
                        how,
                        last_words,
                    },
                    _,
                ) => {
                    self.exits.push_back(DeviceExit {
                        index,
                        pid,
                        how,
                        last_words,
                    });
                }
                (Reply::Serves { index, pid }, _) => self.serves(index, pid),
                other => return Ok(other),
            }
        }
    }

    /// Another process does the work of a device.
    fn serves(&mut self, index: u32, pid: i32) {
        self.served.push_back((index, pid));
        for (_, known) in self.pids.iter_mut().filter(|(at, _)| *at == index) {
            *known = pid;
        }
    }

    /// Opens entry `index` of the policy's files: the descriptor, and for a pseudo terminal the other side's name.
    pub fn open(&mut self, index: u32) -> Result<(OwnedFd, Option<String>), ClientError> {
        self.send(&Request::Open { index })?;
        self.opened(index)
    }

    /// Takes the reply to an earlier [`Request::Open`].
    pub fn opened(&mut self, index: u32) -> Result<(OwnedFd, Option<String>), ClientError> {
        match self.reply()? {
            (Reply::Opened { index: got, name }, mut fds) if got == index => match fds.pop() {
                Some(fd) => Ok((fd, name)),
                None => Err(ClientError::OutOfOrder(format!(
                    "no descriptor came with file {index}"
                ))),
            },
            (other, _) => Err(ClientError::OutOfOrder(format!("{other:?}"))),
        }
    }

    /// Takes the reply to an earlier [`Request::Start`]: the vhost-user socket and the process id.
    pub fn started(&mut self, index: u32) -> Result<(OwnedFd, i32), ClientError> {
        match self.reply()? {
            (Reply::Started { index: got, pid }, mut fds) if got == index => match fds.pop() {
                Some(fd) => {
                    // 0 stands for somebody else's process.
                    if pid > 0 {
                        self.pids.push((index, pid));
                    }
                    Ok((fd, pid))
                }
                None => Err(ClientError::OutOfOrder(format!(
                    "no socket came with device {index}"
                ))),
            },
            (other, _) => Err(ClientError::OutOfOrder(format!("{other:?}"))),
        }
    }

    /// Tells the broker that the VM is set up, and waits until it has written the pid file.
    pub fn ready(&mut self) -> Result<(), ClientError> {
        self.send(&Request::Ready)?;
        match self.reply()? {
            (Reply::ReadyDone, _) => Ok(()),
            (other, _) => Err(ClientError::OutOfOrder(format!("{other:?}"))),
        }
    }

    /// Takes one message that is there, in the order in which the broker sent them; does not wait. For when the VM runs:
    /// requests are only [sent](Self::send) then, and their replies come here too. `Err(Channel(Closed))` means that the
    /// broker is gone.
    pub fn poll(&mut self) -> Result<Option<Notice>, ClientError> {
        if let Some(kept) = self.kept() {
            return Ok(Some(kept));
        }
        while let Some((reply, fds)) = self.channel.try_receive::<Reply>()? {
            if let Some((reply, fds)) = self.keep_aside(reply, fds) {
                return self.notice(reply, fds).map(Some);
            }
        }
        Ok(None)
    }

    /// What was told while something else was waited for: first who serves, since an end can only be that of one who did.
    fn kept(&mut self) -> Option<Notice> {
        if let Some((index, pid)) = self.served.pop_front() {
            return Some(Notice::Serves { index, pid });
        }
        let exit = self.exits.pop_front()?;
        self.forget(&exit);
        Some(Notice::Exited(exit))
    }

    /// The oldest answer to a [`Request::Inspect`], once [`poll`](Self::poll) or [`wait`](Self::wait) have met all of it.
    pub fn inspection(&mut self) -> Option<Inspection> {
        self.inspections.pop_front()
    }

    /// The oldest answer about a snapshot that [`poll`](Self::poll) or [`wait`](Self::wait) have met.
    pub fn snapshot_answer(&mut self) -> Option<SnapshotAnswer> {
        self.snapshots.pop_front()
    }

    /// Whether something that a wait for another answer has met is still to be taken: no descriptor tells of that.
    pub fn has_answers(&self) -> bool {
        !self.snapshots.is_empty() || !self.inspections.is_empty()
    }

    /// Takes what belongs to an inspection or a snapshot, and gives back everything else.
    fn keep_aside(&mut self, reply: Reply, mut fds: Vec<OwnedFd>) -> Option<(Reply, Vec<OwnedFd>)> {
        match reply {
            Reply::Inspected(facts) => self.inspected.push(*facts),
            Reply::InspectionDone { landlock_abi } => {
                let processes = std::mem::take(&mut self.inspected);
                self.inspections.push_back(Inspection {
                    processes,
                    landlock_abi,
                });
            }
            Reply::SnapshotBegun => {
                let mut files = fds.drain(..).map(File::from);
                self.snapshots
                    .push_back(match (files.next(), files.next()) {
                        (Some(memory), Some(state)) => SnapshotAnswer::Begun(SnapshotFiles {
                            memory,
                            state,
                            exchanges: files.collect(),
                        }),
                        _ => SnapshotAnswer::Failed("no files came with the snapshot".into()),
                    });
            }
            Reply::SnapshotEnded => self.snapshots.push_back(SnapshotAnswer::Ended),
            Reply::SnapshotFailed { message } => {
                self.snapshots.push_back(SnapshotAnswer::Failed(message));
            }
            other => return Some((other, fds)),
        }
        None
    }

    /// As [`poll`](Self::poll), but waits.
    pub fn wait(&mut self) -> Result<Notice, ClientError> {
        if let Some(kept) = self.kept() {
            return Ok(kept);
        }
        loop {
            let (reply, fds) = self.channel.receive::<Reply>()?;
            if let Some((reply, fds)) = self.keep_aside(reply, fds) {
                return self.notice(reply, fds);
            }
        }
    }

    fn notice(&mut self, reply: Reply, mut fds: Vec<OwnedFd>) -> Result<Notice, ClientError> {
        match reply {
            Reply::Exited {
                index,
                pid,
                how,
                last_words,
            } => {
                let exit = DeviceExit {
                    index,
                    pid,
                    how,
                    last_words,
                };
                self.forget(&exit);
                Ok(Notice::Exited(exit))
            }
            Reply::Started { index, pid } => match fds.pop() {
                Some(socket) => {
                    self.pids.push((index, pid));
                    Ok(Notice::Started {
                        index,
                        pid,
                        socket: socket.into(),
                    })
                }
                None => Err(ClientError::OutOfOrder(format!(
                    "no socket came with device {index}"
                ))),
            },
            Reply::Stopped { index } => {
                self.pids.retain(|(at, _)| *at != index);
                Ok(Notice::Stopped { index })
            }
            Reply::Serves { index, pid } => {
                self.serves(index, pid);
                self.served.clear();
                Ok(Notice::Serves { index, pid })
            }
            Reply::Added { .. } => Ok(Notice::Added),
            Reply::DumpFile => match fds.pop() {
                Some(file) => Ok(Notice::DumpFile(file.into())),
                None => Err(ClientError::OutOfOrder("no file came for a dump".into())),
            },
            Reply::Removed { .. } => Ok(Notice::Removed),
            Reply::Resized { .. } => Ok(Notice::Resized),
            Reply::Unplugged { index } => {
                self.pids.retain(|(at, _)| *at != index);
                Ok(Notice::Unplugged { index })
            }
            Reply::Settled { index, ended } => {
                self.pids.retain(|(_, pid)| *pid != ended);
                Ok(Notice::Settled { index })
            }
            Reply::Failed { message } => Ok(Notice::Refused { message }),
            Reply::GoesOn { index, message } => Ok(Notice::GoesOn { index, message }),
            other => Err(ClientError::OutOfOrder(format!("{other:?}"))),
        }
    }

    fn forget(&mut self, exit: &DeviceExit) {
        self.pids.retain(|(_, pid)| *pid != exit.pid);
    }

    /// Waits for the end of a device process whose socket has closed, for the error that follows from it. `None` if the
    /// broker itself is gone, or if the process goes on.
    pub fn wait_exit(&mut self, index: u32) -> Option<DeviceExit> {
        loop {
            if let Some(exit) = self.exits.iter().find(|exit| exit.index == index) {
                return Some(exit.clone());
            }
            let mut waited = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
            if poll(&mut waited, LAST_WORDS_MS).ok()? == 0 {
                return None;
            }
            while let Some((reply, _)) = self.channel.try_receive::<Reply>().ok()? {
                match reply {
                    Reply::Exited {
                        index,
                        pid,
                        how,
                        last_words,
                    } => self.exits.push_back(DeviceExit {
                        index,
                        pid,
                        how,
                        last_words,
                    }),
                    Reply::Serves { index, pid } => self.serves(index, pid),
                    _ => {}
                }
            }
        }
    }

    /// The process of entry `index`, if it was started and has not been heard to end.
    pub fn device_pid(&self, index: u32) -> Option<i32> {
        self.pids
            .iter()
            .find(|(at, _)| *at == index)
            .map(|(_, pid)| *pid)
    }

    /// Ends the broker and everything it started, and waits until it has cleaned up.
    pub fn shut_down(self) {
        let _ = nix::sys::socket::shutdown(
            self.channel.as_fd().as_raw_fd(),
            nix::sys::socket::Shutdown::Write,
        );
        // Its end closes when it exits; messages that still come are of no interest any more.
        while self.channel.receive::<Reply>().is_ok() {}
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
