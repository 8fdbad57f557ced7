//! `migrate`: a snapshot of the VM.
//!
//! **Job.** Pauses the guest, has every device process stop its queues in order, reads the state of everything, writes RAM a
//! few milliseconds at a time so that the main loop goes on, and has the broker give the snapshot its name.
//!
//! **Who is not trusted.** Clients, whose path is only compared with what the command line grants; device processes, which
//! have to stop their queues in time and are replaced if they do not.
//!
//! A device whose process is being replaced at that moment is waited for, with the guest running, and so is one that turns out
//! not to answer, which is replaced for it: [`SNAPSHOT_WAIT_MS`](ipc::limits::SNAPSHOT_WAIT_MS) in all.
//!
//! **Why this way.** All files come from the broker, so this works in the locked-down state. The guest goes on as soon as
//! everything is written; that it is on the disk is waited for with the guest running. A client gets its answer at the very
//! end, so that one that then ends the VM has its snapshot.
//!
//! ```text
//! migrate ─> asked ─(files)─> waiting ─> pause, hold devices, read state ─> writing … ─> release, resume ─> ending ─> answer
//!               │                └─<──(one is being replaced)──┘
//!               └───────────────── any failure, migrate_cancel: release, resume ──────────────────┘
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ipc::control::{Request, is_snapshot_name};
use ipc::limits::SNAPSHOT_WAIT_MS;
use ipc::log::{info, warn};

use super::event_loop::{End, Vm, host_error, lock};
use super::incoming::shape;
use super::supervise::Supervisor;
use super::with_causes;
use crate::broker::{SnapshotAnswer, SnapshotFiles};
use crate::machine::microvm::MachineState;
use crate::qmp::{Migration, MigrationStatus, QmpError, Reply, RunState};
use crate::snapshot::memory::Writer;
use crate::snapshot::shape::Shape;
use crate::snapshot::{Snapshot, format};
use crate::virtio::snapshot::DeviceState;
use crate::virtio::window::Window;

/// A snapshot that is being made.
#[derive(Debug)]
pub(super) struct Job {
    reply: Reply<()>,
    /// The guest goes on by itself afterwards.
    resume: bool,
    /// The device that was waited for is given up already: nothing else will happen that is worth waiting for.
    again: bool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The broker was asked for files.
    Asked,
    /// There are files, and until then devices may get processes that can stop in order.
    Waiting(SnapshotFiles, Instant),
    /// The guest stands still, and its RAM is being written.
    Writing(Box<Writing>),
    /// The broker was asked to keep the snapshot, or to remove it because of this.
    Ending(Result<(), String>),
}

#[derive(Debug)]
struct Writing {
    state: File,
    writer: Writer,
    shape: Shape,
    machine: MachineState,
    devices: Vec<DeviceState>,
}

impl Job {
    /// Whether the guest and its devices stand still for it, or are about to.
    pub(super) const fn holds_the_guest(&self) -> bool {
        matches!(
            self.phase,
            Phase::Asked | Phase::Waiting(..) | Phase::Writing(_)
        )
    }

    /// Whether there is work to do without waiting for anything.
    pub(super) const fn has_work(&self) -> bool {
        self.again || matches!(self.phase, Phase::Writing(_))
    }

    /// When waiting is over.
    pub(super) const fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting(_, deadline) => Some(deadline),
            _ => None,
        }
    }

    /// The guest stays paused afterwards.
    pub(super) fn stay_paused(&mut self) {
        self.resume = false;
    }
}

/// Which folder of the command line's, and which name in it, `uri` means.
pub(super) fn place(
    uri: &str,
    granted: &[std::path::PathBuf],
) -> Result<(u32, Option<String>), QmpError> {
    let refuse = |text: String| Err(QmpError::generic(text));
    let Some(path) = uri.strip_prefix("file:").filter(|path| !path.is_empty()) else {
        return refuse(format!("uri '{uri}' is not supported; allowed: file:PATH"));
    };
    let path = Path::new(path);
    for (index, folder) in (0u32..).zip(granted) {
        if path == folder {
            return Ok((index, None));
        }
        if path.parent() == Some(folder) {
            let name = path.file_name().and_then(|name| name.to_str());
            return match name.filter(|name| is_snapshot_name(name)) {
                Some(name) => Ok((index, Some(name.to_owned()))),
                None => refuse(format!(
                    "{} is not a snapshot's name; allowed: 1 to 200 letters, digits, '_', '-', '.', and no '.' in front",
                    path.display()
                )),
            };
        }
    }
    let there = match granted {
        [] => "it names none".to_owned(),
        some => format!(
            "it names {}",
            some.iter()
                .map(|folder| folder.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        ),
    };
    refuse(format!(
        "{} is not a folder that -snapshot-dir names, nor in one ({there}): start the VM with -snapshot-dir and that folder, or its parent",
        path.display()
    ))
}

impl Vm {
    /// QMP's `migrate`.
    pub(super) fn migrate(&mut self, uri: &str, reply: Reply<()>) -> Result<(), End> {
        let refused = match (&self.parts.machine, self.state) {
            _ if self.job.is_some() => Some("A snapshot is being made already".to_owned()),
            _ if self.dump.is_some() => Some("Guest memory is being dumped".to_owned()),
            _ if self.supervisor.is_upgrading() => {
                Some("A device gets another process; wait for DEVICE_UPGRADED".to_owned())
            }
            _ if self.parts.pager.is_some() => Some(
                "Guest memory is still coming in; query-migrate tells how far it is".to_owned(),
            ),
            (None, _) => Some("Machine 'none' has no guest".to_owned()),
            _ if self.hotplug.unsettled().is_some() => self.hotplug.unsettled(),
            (_, RunState::Running | RunState::Paused | RunState::Prelaunch) => None,
            (_, state) => Some(format!(
                "The VM is in state '{}', of which there is no snapshot",
                state.name()
            )),
        };
        let place = match refused {
            Some(text) => Err(QmpError::generic(text)),
            None => place(uri, &self.parts.spec.snapshot_dirs),
        };
        let (folder, name) = match place {
            Ok(place) => place,
            Err(e) => {
                reply.send(Err(e));
                return Ok(());
            }
        };
        let with_state = self.parts.transports.iter().filter(|transport| {
            let transport = lock(transport);
            transport.core().device().has_state()
        });
        let exchanges = with_state.count() as u32;
        self.migration = Migration {
            status: MigrationStatus::Setup,
            ..Migration::default()
        };
        self.job = Some(Job {
            reply,
            resume: false,
            again: false,
            phase: Phase::Asked,
        });
        self.parts
            .broker
            .send(&Request::SnapshotBegin {
                folder,
                name,
                exchanges,
            })
            .map_err(|e| host_error(&e))
    }

    /// QMP's `migrate_cancel`. Without a snapshot under way there is nothing to do.
    pub(super) fn cancel_migration(&mut self) -> Result<(), End> {
        match self.job.take() {
            Some(job) if job.holds_the_guest() => {
                self.give_up(job, MigrationStatus::Cancelled, "it was cancelled")
            }
            job => {
                self.job = job;
                Ok(())
            }
        }
    }

    /// Goes on with a snapshot, as far as that is possible without waiting.
    pub(super) fn go_on_with_snapshot(&mut self) -> Result<(), End> {
        while let Some(answer) = self.parts.broker.snapshot_answer() {
            let Some(job) = self.job.take() else {
                continue;
            };
            match (answer, job.phase) {
                (SnapshotAnswer::Begun(files), Phase::Asked) => {
                    let deadline = Instant::now() + Duration::from_millis(SNAPSHOT_WAIT_MS);
                    self.job = Some(Job {
                        phase: Phase::Waiting(files, deadline),
                        ..job
                    });
                }
                (SnapshotAnswer::Failed(why), Phase::Asked) => {
                    self.finish_migration(job.reply, Err(why));
                }
                (SnapshotAnswer::Ended, Phase::Ending(outcome)) => {
                    self.finish_migration(job.reply, outcome);
                }
                (SnapshotAnswer::Failed(why), Phase::Ending(outcome)) => {
                    self.finish_migration(job.reply, outcome.and(Err(why)));
                }
                (_, phase) => self.job = Some(Job { phase, ..job }),
            }
        }
        match self.job.take() {
            Some(Job {
                reply,
                resume,
                phase: Phase::Writing(writing),
                ..
            }) => self.write(reply, resume, writing),
            Some(
                mut job @ Job {
                    phase: Phase::Waiting(..),
                    ..
                },
            ) => {
                job.again = false;
                self.capture_when_devices_are_there(job)
            }
            job => {
                self.job = job;
                Ok(())
            }
        }
    }

    fn capture_when_devices_are_there(&mut self, job: Job) -> Result<(), End> {
        let Some(deadline) = job.deadline() else {
            self.job = Some(job);
            return Ok(());
        };
        match self.awaited() {
            None => self.capture(job),
            Some(_) if Instant::now() < deadline => {
                self.job = Some(job);
                Ok(())
            }
            Some(id) => {
                let why = format!(
                    "device \"{id}\" has had no process for {SNAPSHOT_WAIT_MS} ms, and another one is awaited"
                );
                self.give_up(job, MigrationStatus::Failed, &why)
            }
        }
    }

    /// A device that has no process, and will get one.
    fn awaited(&self) -> Option<String> {
        self.parts.transports.iter().find_map(|transport| {
            let transport = lock(transport);
            let core = transport.core();
            core.is_between_processes()
                .then(|| core.device().id().to_owned())
        })
    }

    /// Pauses the guest and reads the state of everything but RAM.
    fn capture(&mut self, mut job: Job) -> Result<(), End> {
        if self.state == RunState::Running {
            job.resume = true;
            self.pause(RunState::Paused)?;
        }
        // A vCPU may have asked for a reset just before it was paused; nothing that it said may be lost.
        self.vm_events()?;
        if !matches!(self.state, RunState::Paused | RunState::Prelaunch) {
            return self.give_up(job, MigrationStatus::Failed, "the guest has ended");
        }
        self.supervise(Supervisor::settle)?;
        if let Err(why) = self.hold_devices() {
            return self.wait_or_give_up(job, &why);
        }
        let (files, job) = match job.phase {
            Phase::Waiting(files, _) => (
                files,
                Job {
                    phase: Phase::Asked,
                    ..job
                },
            ),
            phase => return self.keep_job(Job { phase, ..job }),
        };
        let mut job = job;
        match self.read_state(files) {
            Ok(writing) => {
                self.migration.status = MigrationStatus::Active;
                self.migration.total = self.parts.spec.memory.size;
                job.phase = Phase::Writing(Box::new(writing));
                self.job = Some(job);
                Ok(())
            }
            Err(why) => self.give_up(job, MigrationStatus::Failed, &why),
        }
    }

    /// Has every device's process stop in order.
    fn hold_devices(&self) -> Result<(), String> {
        self.parts
            .transports
            .iter()
            .try_for_each(|transport| lock(transport).hold().map_err(|e| with_causes(&e)))
    }

    /// A device's process did not stop in order: it is replaced, and that is waited for once the guest goes on.
    fn wait_or_give_up(&mut self, mut job: Job, why: &str) -> Result<(), End> {
        let patient = job
            .deadline()
            .is_some_and(|deadline| Instant::now() < deadline);
        if !patient {
            return self.give_up(job, MigrationStatus::Failed, why);
        }
        info!("the snapshot waits: {why}");
        self.supervise(Supervisor::settle)?;
        self.release_devices();
        if std::mem::take(&mut job.resume) && self.state == RunState::Paused {
            self.resume()?;
        }
        job.again = self.awaited().is_none();
        self.keep_job(job)
    }

    fn keep_job(&mut self, job: Job) -> Result<(), End> {
        self.job = Some(job);
        Ok(())
    }

    fn read_state(&mut self, files: SnapshotFiles) -> Result<Writing, String> {
        let SnapshotFiles {
            memory,
            state,
            exchanges,
        } = files;
        let mut exchanges = exchanges.into_iter();
        let Some(machine) = &self.parts.machine else {
            return Err("there is no guest".into());
        };
        let mut devices = Vec::with_capacity(self.parts.transports.len());
        for transport in &self.parts.transports {
            let mut transport = lock(transport);
            let device = transport.core().device();
            if let Some(ranges) = device
                .window()
                .map(Window::ranges)
                .filter(|count| *count > 0)
            {
                return Err(format!(
                    "device \"{}\": the guest has {ranges} ranges of files mapped in its window (cache-size=), which are not in a snapshot: have it unmount the folder, or drop its caches (2 to /proc/sys/vm/drop_caches), until none is",
                    device.id()
                ));
            }
            let exchange = if transport.core().device().has_state() {
                exchanges.next()
            } else {
                None
            };
            devices.push(
                transport
                    .save(exchange.as_ref())
                    .map_err(|e| with_causes(&e))?,
            );
        }
        Ok(Writing {
            state,
            writer: Writer::new(machine.ram().clone(), memory),
            shape: shape(&self.parts.spec, &self.parts.plan, machine),
            machine: machine.save().map_err(|e| with_causes(&e))?,
            devices,
        })
    }

    /// Some milliseconds' worth of RAM, or the end.
    fn write(
        &mut self,
        reply: Reply<()>,
        resume: bool,
        mut writing: Box<Writing>,
    ) -> Result<(), End> {
        let more = writing.writer.step().map_err(|e| with_causes(&e));
        self.migration.done = writing.writer.done();
        let done = match more {
            Ok(true) => {
                self.job = Some(Job {
                    reply,
                    resume,
                    again: false,
                    phase: Phase::Writing(writing),
                });
                return Ok(());
            }
            Ok(false) => write_state(*writing),
            Err(why) => Err(why),
        };
        let job = Job {
            reply,
            resume,
            again: false,
            phase: Phase::Asked,
        };
        match done {
            Ok(()) => self.end(job, true, Ok(())),
            Err(why) => self.give_up(job, MigrationStatus::Failed, &why),
        }
    }

    fn give_up(&mut self, job: Job, status: MigrationStatus, why: &str) -> Result<(), End> {
        self.migration.status = status;
        self.end(job, false, Err(why.to_owned()))
    }

    /// Lets the guest go on, and the broker decide about the files.
    fn end(&mut self, job: Job, keep: bool, outcome: Result<(), String>) -> Result<(), End> {
        let resume = job.resume;
        self.job = Some(Job {
            phase: Phase::Ending(outcome),
            ..job
        });
        self.parts
            .broker
            .send(&Request::SnapshotEnd { keep })
            .map_err(|e| host_error(&e))?;
        self.release_devices();
        if resume && self.state == RunState::Paused {
            self.resume()?;
        }
        Ok(())
    }

    /// Guest memory of a snapshot that this VM goes on from has come in.
    pub(super) fn memory_is_whole(&mut self) {
        let Some(pager) = self.parts.pager.take() else {
            return;
        };
        let _ = pager.event().read();
        self.migration = Migration::completed(self.parts.spec.memory.size);
        info!("guest memory has come in");
        self.release_devices();
    }

    /// For `query-migrate`.
    pub(super) fn migration(&self) -> Migration {
        match &self.parts.pager {
            Some(pager) => Migration {
                status: MigrationStatus::Active,
                total: self.parts.spec.memory.size,
                done: pager.done(),
                error: None,
            },
            None => self.migration.clone(),
        }
    }

    /// Has all devices go on that stand still for a snapshot, made or restored.
    pub(super) fn release_devices(&mut self) {
        for transport in &self.parts.transports {
            lock(transport).release();
        }
    }

    fn finish_migration(&mut self, reply: Reply<()>, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => {
                info!("snapshot made");
                self.migration.status = MigrationStatus::Completed;
                reply.send(Ok(()));
            }
            Err(why) => {
                warn!("no snapshot: {why}");
                if self.migration.status != MigrationStatus::Cancelled {
                    self.migration.status = MigrationStatus::Failed;
                }
                self.migration.error = Some(why.clone());
                reply.send(Err(QmpError::generic(format!("No snapshot: {why}"))));
            }
        }
    }
}

fn write_state(writing: Writing) -> Result<(), String> {
    let Writing {
        state,
        writer,
        shape,
        machine,
        devices,
    } = writing;
    let snapshot = Snapshot {
        shape,
        machine,
        devices,
        memory: writer.finish(),
    };
    let bytes = format::encode(&snapshot).map_err(|e| with_causes(&e))?;
    state
        .write_all_at(&bytes, 0)
        .map_err(|e| format!("writing the snapshot's file state: {e}"))
}

#[cfg(test)]
mod tests {
    use super::place;
    use std::path::PathBuf;

    #[test]
    fn snapshots_go_where_the_command_line_says() {
        let granted: Vec<PathBuf> = ["/srv/t", "relative", "/a/b/"].map(Into::into).to_vec();
        let at = |uri: &str| place(uri, &granted).map_err(|e| e.desc);
        assert_eq!(at("file:/srv/t"), Ok((0, None)));
        assert_eq!(at("file:/srv/t/"), Ok((0, None)));
        assert_eq!(at("file:/srv/t/one"), Ok((0, Some("one".into()))));
        assert_eq!(at("file:relative/x-1.0"), Ok((1, Some("x-1.0".into()))));
        assert_eq!(at("file:/a/b/c"), Ok((2, Some("c".into()))));
        for uri in [
            "file:/srv/other",
            "file:/srv/t/one/two",
            "file:/srv/t/../x",
            "file:/srv",
        ] {
            let error = at(uri).unwrap_err();
            assert!(
                error.contains("-snapshot-dir") || error.contains("name"),
                "{error}"
            );
        }
        for uri in ["file:/srv/t/.x", "file:/srv/t/a b"] {
            assert!(at(uri).unwrap_err().contains("letters"), "{uri}");
        }
        for uri in ["tcp:1.2.3.4:5", "file:", "/srv/t"] {
            assert!(at(uri).unwrap_err().contains("allowed: file:PATH"), "{uri}");
        }
        assert!(
            place("file:/x", &[])
                .unwrap_err()
                .desc
                .contains("it names none")
        );
    }
}
