//! `dump-guest-memory`: an ELF core file of the guest.
//!
//! **Job.** Pauses the guest, writes its registers and RAM a few milliseconds at a time so that the main loop goes on, and lets
//! the guest run again. **Who is not trusted.** The client: what it passed is written to by position, which a pipe or socket
//! refuses, and only if it is empty.
//!
//! **Why this way.** The file is a descriptor that a client passed: this process opens no path. Devices are not held, since a
//! dump is wanted most when one of them does not do what it should: what they write meanwhile may be in it or not.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ipc::log::info;
use nix::unistd::{Whence, lseek};

use super::event_loop::{End, Vm};
use super::with_causes;
use crate::qmp::{QmpError, Reply, RunState};
use crate::snapshot::elf_core::CoreWriter;

/// A core file that is being written.
#[derive(Debug)]
pub(super) struct Dump {
    reply: Reply<()>,
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

impl Vm {
    /// QMP's `dump-guest-memory`.
    pub(super) fn dump(&mut self, fds: Vec<Arc<OwnedFd>>, reply: Reply<()>) -> Result<(), End> {
        let resume = self.state == RunState::Running;
        let begun = self.begin_dump(fds, resume)?;
        match begun {
            Ok(writer) => {
                self.dump = Some(Dump {
                    reply,
                    resume,
                    writer,
                });
                Ok(())
            }
            Err(why) => {
                reply.send(Err(QmpError::generic(format!("No dump: {why}"))));
                if resume && self.state == RunState::Paused {
                    self.resume()?;
                }
                Ok(())
            }
        }
    }

    fn begin_dump(
        &mut self,
        mut fds: Vec<Arc<OwnedFd>>,
        pause: bool,
    ) -> Result<Result<CoreWriter, String>, End> {
        if self.dump.is_some() || self.job.is_some() {
            return Ok(Err("another one, or a snapshot, is being made".into()));
        }
        if self.parts.pager.is_some() {
            return Ok(Err("guest memory is still coming in".into()));
        }
        if self.parts.machine.is_none() {
            return Ok(Err("machine 'none' has no guest".into()));
        }
        let Some(file) = fds.pop() else {
            return Ok(Err("no descriptor came with it".into()));
        };
        let file = match file.as_fd().try_clone_to_owned() {
            Ok(file) => File::from(file),
            Err(e) => return Ok(Err(format!("duplicating the descriptor: {e}"))),
        };
        match lseek(&file, 0, Whence::SeekEnd) {
            Ok(0) => {}
            Ok(length) => return Ok(Err(format!("the file has {length} bytes; allowed: 0"))),
            Err(errno) => {
                return Ok(Err(format!(
                    "the descriptor is no file ({errno}); allowed: an empty file that is open for writing"
                )));
            }
        }
        if pause {
            self.pause(RunState::Paused)?;
            // A vCPU may have said something just before; nothing of it may be lost.
            self.vm_events()?;
        }
        let Some(machine) = &self.parts.machine else {
            return Ok(Err("machine 'none' has no guest".into()));
        };
        Ok(machine
            .registers()
            .map_err(|e| with_causes(&e))
            .and_then(|registers| {
                CoreWriter::new(machine.ram().clone(), file, &registers)
                    .map_err(|e| with_causes(&e))
            }))
    }

    /// Some milliseconds' worth of a dump, or its end.
    pub(super) fn go_on_with_dump(&mut self) -> Result<(), End> {
        let Some(mut dump) = self.dump.take() else {
            return Ok(());
        };
        let outcome = match dump.writer.step() {
            Ok(true) => {
                self.dump = Some(dump);
                return Ok(());
            }
            Ok(false) => {
                info!("dump made");
                Ok(())
            }
            Err(e) => Err(QmpError::generic(format!("No dump: {}", with_causes(&e)))),
        };
        if dump.resume && self.state == RunState::Paused {
            self.resume()?;
        }
        dump.reply.send(outcome);
        Ok(())
    }
}
