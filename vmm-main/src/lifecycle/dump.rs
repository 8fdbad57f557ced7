//! `dump-guest-memory`: an ELF core file of the guest.
//!
//! **Job.** Pauses the guest, writes its registers and RAM a few milliseconds at a time so that the main loop goes on, and lets
//! the guest run again. **Who is not trusted.** The client: what it passed is written to by position, which a pipe or socket
//! refuses, and only if it is empty.
//!
//! **Why this way.** The file is a descriptor that a client passed, or one that the broker has made where snapshots may be made: this
//! process opens no path. Devices are not held, since a
//! dump is wanted most when one of them does not do what it should: what they write meanwhile may be in it or not.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ipc::log::{info, warn};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Whence, lseek};

use super::event_loop::{End, Vm};
use super::snapshot::place;
use super::with_causes;
use crate::qmp::{DumpOrder, DumpProgress, DumpStatus, Event, QmpError, Reply, RunState};
use crate::snapshot::elf_core::CoreWriter;

/// A core file that is being written.
#[derive(Debug)]
pub(super) struct Dump {
    /// Who waits for its end.
    reply: Option<Reply<()>>,
    /// The guest goes on by itself afterwards.
    resume: bool,
    writer: CoreWriter,
}

impl Dump {
    /// The guest stays paused afterwards.
    pub(super) fn stay_paused(&mut self) {
        self.resume = false;
    }
}

fn refused(why: &str) -> Result<(), QmpError> {
    Err(QmpError::generic(format!("No dump: {why}")))
}

impl Vm {
    /// QMP's `dump-guest-memory`.
    pub(super) fn dump(&mut self, order: &DumpOrder, reply: Reply<()>) -> Result<(), End> {
        let found = match self.why_no_dump() {
            Some(why) => Err(refused(why)),
            None => self
                .dump_target(order.uri.as_deref(), &order.fds)
                .map_err(Err),
        };
        match found {
            Ok(Target::File(file)) => self.dump_to(file, reply, order.detach),
            Ok(Target::Name(folder, name)) => {
                self.dump_to_come = Some((reply, order.detach));
                self.ask_for_dump_file(folder, name)
            }
            Err(answer) => {
                reply.send(answer);
                Ok(())
            }
        }
    }

    /// The broker has made the file, or says why not.
    pub(super) fn dump_file_is_there(&mut self, made: Result<File, String>) -> Result<(), End> {
        let Some((reply, detach)) = self.dump_to_come.take() else {
            return Ok(());
        };
        // Something else may have begun meanwhile.
        match (made, self.why_no_dump()) {
            (Ok(file), None) => self.dump_to(file, reply, detach),
            (Err(why), _) => {
                reply.send(refused(&why));
                Ok(())
            }
            (Ok(_), Some(why)) => {
                reply.send(refused(why));
                Ok(())
            }
        }
    }

    /// For `query-dump`.
    pub(super) fn dump_progress(&self) -> DumpProgress {
        match &self.dump {
            Some(dump) => progress(&dump.writer, DumpStatus::Active),
            None => self.dumped,
        }
    }

    fn why_no_dump(&self) -> Option<&'static str> {
        if self.dump.is_some() || self.dump_to_come.is_some() || self.job.is_some() {
            return Some("another one, or a snapshot, is being made");
        }
        if self.parts.pager.is_some() {
            return Some("guest memory is still coming in");
        }
        if self.parts.machine.is_none() {
            return Some("machine 'none' has no guest");
        }
        None
    }

    /// Where it goes.
    fn dump_target(&self, uri: Option<&str>, fds: &[Arc<OwnedFd>]) -> Result<Target, QmpError> {
        let wrong = |why: String| QmpError::generic(format!("No dump: {why}"));
        if let Some(uri) = uri {
            let (folder, name) = place(uri, &self.parts.spec.snapshot_dirs)?;
            let Some(name) = name else {
                return Err(wrong(format!("{uri} is a folder; allowed: a file in it")));
            };
            return Ok(Target::Name(folder, name));
        }
        let Some(file) = fds.first() else {
            return Err(wrong("no descriptor came with it".into()));
        };
        let file = match file.as_fd().try_clone_to_owned() {
            Ok(file) => File::from(file),
            Err(e) => return Err(wrong(format!("duplicating the descriptor: {e}"))),
        };
        let open = fcntl(&file, FcntlArg::F_GETFL)
            .map(OFlag::from_bits_truncate)
            .map_err(|errno| wrong(format!("the descriptor tells nothing of itself: {errno}")))?;
        // Linux takes no heed of a position where it appends, and a dump is not written from its beginning to its end.
        if open.contains(OFlag::O_APPEND) {
            return Err(wrong(
                "the descriptor appends (O_APPEND); allowed: an empty file that is open for writing by position".into(),
            ));
        }
        if open & OFlag::O_ACCMODE == OFlag::O_RDONLY {
            return Err(wrong(
                "the descriptor is for reading only; allowed: an empty file that is open for writing".into(),
            ));
        }
        match lseek(&file, 0, Whence::SeekEnd) {
            Ok(0) => Ok(Target::File(file)),
            Ok(length) => Err(wrong(format!("the file has {length} bytes; allowed: 0"))),
            Err(errno) => Err(wrong(format!(
                "the descriptor is no file ({errno}); allowed: an empty file that is open for writing"
            ))),
        }
    }

    fn dump_to(&mut self, file: File, reply: Reply<()>, detach: bool) -> Result<(), End> {
        let resume = self.state == RunState::Running;
        if resume {
            self.pause(RunState::Paused)?;
            // A vCPU may have said something just before; nothing of it may be lost.
            self.vm_events()?;
        }
        let begun = match &self.parts.machine {
            None => Err("machine 'none' has no guest".into()),
            Some(machine) => {
                machine
                    .registers()
                    .map_err(|e| with_causes(&e))
                    .and_then(|registers| {
                        CoreWriter::new(machine.ram().clone(), file, &registers)
                            .map_err(|e| with_causes(&e))
                    })
            }
        };
        match begun {
            Ok(writer) => {
                let reply = if detach {
                    reply.send(Ok(()));
                    None
                } else {
                    Some(reply)
                };
                self.dump = Some(Dump {
                    reply,
                    resume,
                    writer,
                });
                Ok(())
            }
            Err(why) => {
                reply.send(refused(&why));
                if resume && self.state == RunState::Paused {
                    self.resume()?;
                }
                Ok(())
            }
        }
    }

    /// Some milliseconds' worth of a dump, or its end.
    pub(super) fn go_on_with_dump(&mut self) -> Result<(), End> {
        let Some(mut dump) = self.dump.take() else {
            return Ok(());
        };
        let failed = match dump.writer.step() {
            Ok(true) => {
                self.dump = Some(dump);
                return Ok(());
            }
            Ok(false) => None,
            Err(e) => Some(with_causes(&e)),
        };
        let status = match &failed {
            None => {
                info!("dump made");
                DumpStatus::Completed
            }
            Some(why) => {
                warn!("no dump: {why}");
                DumpStatus::Failed
            }
        };
        self.dumped = progress(&dump.writer, status);
        if dump.resume && self.state == RunState::Paused {
            self.resume()?;
        }
        self.parts
            .qmp
            .emit(&Event::DumpCompleted(self.dumped, failed.clone()));
        if let Some(reply) = dump.reply {
            reply.send(failed.map_or(Ok(()), |why| refused(&why)));
        }
        Ok(())
    }
}

/// Where a dump goes.
enum Target {
    /// To a file that a client passed.
    File(File),
    /// To one that the broker makes: number of the folder, name.
    Name(u32, String),
}

fn progress(writer: &CoreWriter, status: DumpStatus) -> DumpProgress {
    let (done, total) = writer.progress();
    DumpProgress {
        status,
        done,
        total,
    }
}
