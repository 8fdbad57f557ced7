//! What the broker gives at the start.
//!
//! **Job.** Asks for everything at once, and takes the replies, in the same order, when they are needed. **Who is not trusted.** Device
//! processes, whose sockets come from the broker; an inherited socket may be anything.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use ipc::channel::ChannelError;
use ipc::control::{DeviceGrant, Exit, FileGrant, Request};
use ipc::log::info;
use ipc::spec::vm::VmSpec;
use nix::sys::signal::Signal;

use super::error::StartError;
use crate::broker::{Client, ClientError};
use crate::cmdline::Plan;
use crate::lifecycle::incoming::Incoming;
use crate::machine::microvm::Microvm;
use crate::qmp;
use crate::virtio::remote::{Handshake, RemoteError};

/// What came from the broker.
pub(super) struct Given {
    pub(super) broker: Client,
    /// What was asked for before the rest: with a snapshot, what it takes to read that.
    first: Vec<u32>,
    /// Sockets of device processes.
    devices: Vec<UnixStream>,
    pub(super) files: Files,
}

/// Opened files by their number in the policy, each taken once.
#[derive(Debug, Default)]
pub(in crate::lifecycle) struct Files(BTreeMap<u32, (OwnedFd, Option<String>)>);

impl Files {
    /// Takes file `index`.
    pub(in crate::lifecycle) fn take(&mut self, index: u32) -> Option<File> {
        self.take_named(index).map(|(fd, _)| fd.into())
    }

    /// Takes file `index` with the name that came along.
    pub(in crate::lifecycle) fn take_named(
        &mut self,
        index: u32,
    ) -> Option<(OwnedFd, Option<String>)> {
        self.0.remove(&index)
    }
}

impl Given {
    /// Tells the policy and asks for everything in it; or, with a snapshot, for what it takes to read that, which is here on return:
    /// what is wrong with a snapshot is told before any device's process is started.
    pub(super) fn begin(broker: Client, spec: &VmSpec, plan: &Plan) -> Result<Self, StartError> {
        let first: Vec<u32> = plan.incoming.map_or(Vec::new(), |files| {
            files
                .into_iter()
                .chain(plan.memory.iter().copied().flatten())
                .collect()
        });
        ask(
            &broker,
            std::iter::once(Request::SetPolicy(plan.policy.clone()))
                .chain(first.iter().map(|&index| Request::Open { index })),
        )?;
        let mut given = Self {
            broker,
            first: Vec::new(),
            devices: Vec::new(),
            files: Files::default(),
        };
        if first.is_empty() {
            ask(&given.broker, rest(plan, &first))?;
        } else {
            given.take_policy(spec)?;
            given.take_files(plan, &first)?;
        }
        given.first = first;
        Ok(given)
    }

    /// Whether nothing of guest RAM has yet to come.
    pub(super) fn has_memory(&self, plan: &Plan) -> bool {
        !self.first.is_empty() || plan.memory.iter().all(Option::is_none)
    }

    /// The snapshot to go on from, if there is one.
    pub(super) fn snapshot(
        &mut self,
        (spec, plan): (&VmSpec, &Plan),
        machine: &Microvm,
    ) -> Result<Option<Incoming>, StartError> {
        let Some([state, memory]) = plan.incoming else {
            return Ok(None);
        };
        let (state, memory) = (self.files.take(state), self.files.take(memory));
        Ok(Some(Incoming::read(spec, plan, machine, state, memory)?))
    }

    /// Everything that is not here yet.
    pub(super) fn take_rest(&mut self, spec: &VmSpec, plan: &Plan) -> Result<(), StartError> {
        if self.first.is_empty() {
            self.take_policy(spec)?;
        } else {
            ask(&self.broker, rest(plan, &self.first))?;
        }
        self.take_devices(plan)?;
        let others: Vec<u32> = others(plan, &self.first).collect();
        self.take_files(plan, &others)
    }

    /// Says the first words to every device process; nobody's answer is waited for.
    pub(super) fn greet(&mut self, plan: &Plan) -> Result<Vec<Handshake>, StartError> {
        let mut handshakes = Vec::with_capacity(self.devices.len());
        let sockets = std::mem::take(&mut self.devices);
        for (index, (socket, grant)) in (0u32..).zip(sockets.into_iter().zip(&plan.policy.devices))
        {
            let handshake = Handshake::begin_for(socket, grant);
            handshakes.push(handshake.map_err(|e| self.why_failed(index, plan, e))?);
        }
        Ok(handshakes)
    }

    /// The reply to the policy: the descriptor to log to.
    fn take_policy(&mut self, spec: &VmSpec) -> Result<(), StartError> {
        if let Some(fd) = self.broker.policy_set()? {
            ipc::log::init("control", spec.log.level, fd);
        }
        Ok(())
    }

    fn take_devices(&mut self, plan: &Plan) -> Result<(), StartError> {
        for (index, grant) in (0u32..).zip(&plan.policy.devices) {
            let (socket, pid) = self.broker.started(index)?;
            if grant.is_foreign() {
                info!("device {} is another process's", grant.spec.id());
            } else {
                info!("device {} is process {pid}", grant.spec.id());
            }
            self.devices.push(socket.into());
        }
        Ok(())
    }

    fn take_files(&mut self, plan: &Plan, indices: &[u32]) -> Result<(), StartError> {
        for &index in indices {
            let opened = self.broker.opened(index)?;
            if let Some(FileGrant::InheritedSocket {
                option,
                fd,
                listens,
            }) = plan.policy.files.get(index as usize)
            {
                inherited_socket(&opened.0, *listens).map_err(|what| StartError::Inherited {
                    option: option.clone(),
                    fd: *fd,
                    what,
                })?;
            }
            self.files.0.insert(index, opened);
        }
        Ok(())
    }

    pub(super) fn monitors(&mut self, plan: &Plan) -> Vec<qmp::Source> {
        plan.monitors
            .iter()
            .filter_map(|monitor| {
                let (fd, _) = self.files.take_named(monitor.file)?;
                Some(if monitor.server {
                    qmp::Source::Listener {
                        fd,
                        wait: monitor.wait,
                    }
                } else {
                    qmp::Source::Connected(fd)
                })
            })
            .collect()
    }

    /// The reason behind a handshake that failed: what the process said before it ended, if it ended.
    pub(super) fn why_failed(&mut self, index: u32, plan: &Plan, error: RemoteError) -> StartError {
        let grants = &plan.policy.devices;
        if !error.is_hang_up()
            || grants
                .get(index as usize)
                .is_some_and(DeviceGrant::is_foreign)
        {
            // A process that lies or is silent ends only because it was given up; what it did is the reason.
            return error.into();
        }
        let Some(exit) = self.broker.wait_exit(index) else {
            return error.into();
        };
        StartError::DeviceEnded {
            id: grants
                .get(index as usize)
                .map_or_else(String::new, |grant| grant.spec.id().to_owned()),
            how: match exit.how {
                Exit::Code(code) => format!("with status {code}"),
                Exit::Signal(signal) => match Signal::try_from(signal) {
                    Ok(name) => format!("by {name}"),
                    Err(_) => format!("by signal {signal}"),
                },
            },
            last_words: exit.last_words,
        }
    }
}

/// Sends requests; [`Given`] takes the replies in the same order.
fn ask(broker: &Client, requests: impl Iterator<Item = Request>) -> Result<(), StartError> {
    for request in requests {
        match broker.send(&request) {
            Ok(()) => {}
            // A broker that has left said why, which the next reply tells.
            Err(ClientError::Channel(ChannelError::Closed)) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Files beside those of `first`.
fn others(plan: &Plan, first: &[u32]) -> impl Iterator<Item = u32> {
    (0..plan.policy.files.len() as u32).filter(|index| !first.contains(index))
}

/// What is asked for beside the files `first`.
fn rest(plan: &Plan, first: &[u32]) -> impl Iterator<Item = Request> {
    (0..plan.policy.devices.len() as u32)
        .map(|index| Request::Start { index })
        .chain(others(plan, first).map(|index| Request::Open { index }))
}

/// Whether an inherited socket is what the command line says.
fn inherited_socket(socket: &OwnedFd, listens: bool) -> Result<(), &'static str> {
    use nix::sys::socket::{SockType, getsockopt, sockopt};
    if getsockopt(socket, sockopt::SockType) != Ok(SockType::Stream) {
        return Err("not a stream socket");
    }
    match getsockopt(socket, sockopt::AcceptConn) {
        Ok(now) if now == listens => Ok(()),
        Ok(true) => Err("it listens; add server=on"),
        Ok(false) => Err("it does not listen; leave server=on out"),
        Err(_) => Err("cannot be asked whether it listens"),
    }
}
