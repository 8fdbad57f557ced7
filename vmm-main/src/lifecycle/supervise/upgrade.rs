//! `device-upgrade` and `netdev_replace`: another process takes the place of one that serves.
//!
//! **Job.** The new process, of the program that is at its place now, gets its handshake done beside the one that serves, and then the queues; or
//! it is given up, and the one that serves goes on. That of a card may have another tap. **Who is not trusted**: the new process, which is no better than any other.
//! **Why this way.** Nothing is taken from the old one before the new one has shown that it can do its work.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipc::control::Request;
use ipc::control::added::Addition;
use ipc::log::{info, warn};
use ipc::spec::DeviceSpec;
use ipc::spec::vm::NetBackend;
use nix::sys::epoll::EpollFlags;

use super::{Asked, Context, Device, Process, Supervisor, Told};
use crate::broker::ClientError;
use crate::lifecycle::event_loop::lock;
use crate::lifecycle::with_causes;
use crate::qmp::{Event, QmpError, Reply};
use crate::virtio::remote::Handshake;

/// A process on its way in, while another one serves.
#[derive(Debug)]
pub(super) struct Upgrade {
    pub(super) reply: Reply<()>,
    /// Once it has a socket.
    pub(super) coming: Option<Coming>,
    /// The old one asks for attention, and the broker has not answered yet.
    pub(super) unwell: bool,
    /// When it was asked for.
    asked: Instant,
    /// The tap that the new one has, if it is another one.
    tap: Option<NetBackend>,
}

#[derive(Debug)]
pub(super) struct Coming {
    pub(super) pid: i32,
    pub(super) handshake: Handshake,
    /// It hung up; its end, with its last words, is about to be told.
    deaf: bool,
}

impl Supervisor {
    /// No other process takes the place of the one that serves, or served.
    pub(super) fn upgrade_refused(
        &mut self,
        index: usize,
        message: String,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientError> {
        let device = &mut self.devices[index];
        let Some(upgrade) = device.upgrade.take() else {
            return Ok(());
        };
        warn!("{message}");
        upgrade.reply.send(Err(QmpError::generic(message)));
        if matches!(device.process, Process::Starting) {
            self.start(index, cx)
        } else if upgrade.unwell {
            self.stop(index, cx)
        } else {
            Ok(())
        }
    }

    /// Whether one of two processes of device `index` is about to end.
    pub(super) fn is_settling(&self, index: usize) -> bool {
        self.asked.iter().any(|asked| match asked {
            Asked::Upgrade(at) | Asked::Settle(at, _) => *at == index,
            _ => false,
        })
    }

    /// Whether any device is about to get another process while one serves.
    pub(in crate::lifecycle) fn is_upgrading(&self) -> bool {
        self.devices.iter().any(|device| device.upgrade.is_some())
    }

    /// `device-upgrade`: another process, of the program that is at its place now, is to take the place of the one that
    /// serves.
    pub(in crate::lifecycle) fn upgrade(
        &mut self,
        index: usize,
        reply: Reply<()>,
        cx: &Context<'_>,
    ) -> Result<(), ClientError> {
        let request = Request::Upgrade {
            index: index as u32,
        };
        self.renew(index, (&request, &[]), None, reply, cx)
    }

    /// `netdev_replace`: another process, with the tap `addition`, is to take the place of the one that serves; people know that tap
    /// as `tap`.
    pub(in crate::lifecycle) fn retap(
        &mut self,
        index: usize,
        (addition, fds): (Addition, &[Arc<OwnedFd>]),
        tap: NetBackend,
        reply: Reply<()>,
        cx: &Context<'_>,
    ) -> Result<(), ClientError> {
        let request = Request::Replace {
            index: index as u32,
            addition,
        };
        self.renew(index, (&request, fds), Some(tap), reply, cx)
    }

    /// Has the broker start another process beside the one that serves.
    fn renew(
        &mut self,
        index: usize,
        (request, fds): (&Request, &[Arc<OwnedFd>]),
        tap: Option<NetBackend>,
        reply: Reply<()>,
        cx: &Context<'_>,
    ) -> Result<(), ClientError> {
        let id = self.devices.get(index).map_or("", |one| one.spec.id());
        let refused = match self.devices.get(index) {
            Some(Device {
                process: Process::Serving { .. },
                ..
            }) if self.is_settled(index) => None,
            _ => Some(format!(
                "Device '{id}' has no process that serves, or is about to get another one"
            )),
        };
        if let Some(refused) = refused {
            reply.send(Err(QmpError::generic(refused)));
            return Ok(());
        }
        self.devices[index].upgrade = Some(Upgrade {
            reply,
            coming: None,
            unwell: false,
            asked: Instant::now(),
            tap,
        });
        self.asked.push_back(Asked::Upgrade(index));
        cx.broker.send_with(request, fds)
    }

    /// The new process has a socket.
    pub(super) fn coming(
        &mut self,
        index: usize,
        pid: i32,
        socket: UnixStream,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientError> {
        let device = &mut self.devices[index];
        if matches!(device.spec, DeviceSpec::Fs(_)) {
            // The old one is gone, and is not missed. Since when, the broker knows; it was not before this.
            let asked = device.upgrade.as_ref().map(|upgrade| upgrade.asked);
            let asked = asked.unwrap_or_else(Instant::now);
            device.since.get_or_insert(asked);
            device.attention.ended();
            lock(&device.transport).device_gone();
            device.process = Process::Starting;
            return self.started(index, pid, socket, cx);
        }
        let Some(upgrade) = &mut device.upgrade else {
            // Given up meanwhile, and so is it.
            return Ok(());
        };
        let watched = Handshake::begin(socket, &device.spec)
            .map_err(|e| with_causes(&e))
            .and_then(|handshake| {
                cx.poller
                    .add(&handshake, self.sockets + index as u64, EpollFlags::EPOLLIN)
                    .map_err(|e| format!("epoll_ctl: {}", e.desc()))?;
                upgrade.coming = Some(Coming {
                    pid,
                    handshake,
                    deaf: false,
                });
                Ok(())
            });
        match watched {
            Ok(()) => Ok(()),
            Err(why) => self.give_up(index, &why, cx),
        }
    }

    /// The handshake of a new process goes on, or its time is over.
    pub(super) fn coming_answered(
        &mut self,
        index: usize,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientError> {
        let device = &mut self.devices[index];
        let Some(Upgrade {
            coming: Some(coming),
            ..
        }) = &mut device.upgrade
        else {
            return Ok(());
        };
        match coming.handshake.advance() {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            Err(e) => {
                let late = coming.handshake.deadline() <= Instant::now();
                if e.is_hang_up() && !late && !coming.deaf {
                    // Its last words say more.
                    coming.deaf = true;
                    if cx.poller.remove(&coming.handshake).is_ok() {
                        return Ok(());
                    }
                }
                return self.give_up(index, &with_causes(&e), cx);
            }
        }
        let Some(Upgrade {
            reply,
            coming: Some(coming),
            asked,
            tap,
            ..
        }) = device.upgrade.take()
        else {
            return Ok(());
        };
        let (Process::Serving { pid: old }, Ok(())) =
            (&device.process, cx.poller.remove(&coming.handshake))
        else {
            device.upgrade = Some(Upgrade {
                reply,
                coming: None,
                unwell: false,
                asked,
                tap,
            });
            return self.give_up(index, "the process that serves is not there any more", cx);
        };
        let old = *old;
        let mut stall = Duration::ZERO;
        let done = coming.handshake.finish().and_then(|fresh| {
            let mut transport = lock(&device.transport);
            let since = Instant::now();
            let done = transport.upgrade(fresh);
            stall = since.elapsed();
            done
        });
        let id = device.spec.id().to_owned();
        let done = match done {
            Ok(done) => done,
            Err(e) => {
                device.upgrade = Some(Upgrade {
                    reply,
                    coming: None,
                    unwell: false,
                    asked,
                    tap,
                });
                return self.give_up(index, &with_causes(&e), cx);
            }
        };
        device.process = Process::Serving { pid: coming.pid };
        device.retired = Some(old);
        let retapped = tap.is_some();
        self.others
            .extend(tap.map(|tap| Told::Retapped { index, tap }));
        let reply = if done {
            info!(
                "device {id}: process {} has taken the place of {old} within {:.3} ms",
                coming.pid,
                stall.as_secs_f64() * 1000.0
            );
            cx.qmp.emit(&Event::DeviceUpgraded {
                device: id,
                pid: coming.pid,
                stall,
            });
            Some((reply, Ok(())))
        } else {
            // It asks for attention, and yet another one follows.
            let tap = if retapped { " with the new tap" } else { "" };
            reply.send(Err(QmpError::generic(format!(
                "Device '{id}': the new process failed when it got its queues; it is replaced as after a crash{tap}"
            ))));
            None
        };
        self.settle_on(index, true, reply, cx)
    }

    fn settle_on(
        &mut self,
        index: usize,
        newer: bool,
        reply: Option<(Reply<()>, Result<(), QmpError>)>,
        cx: &Context<'_>,
    ) -> Result<(), ClientError> {
        self.asked.push_back(Asked::Settle(index, reply));
        cx.broker.send(&Request::Settle {
            index: index as u32,
            newer,
        })
    }

    /// Whether the broker has yet to say what became of the upgrade of a shared folder.
    pub(super) fn is_taking_over(&self, index: usize) -> bool {
        let device = &self.devices[index];
        let asked = |asked: &Asked| matches!(asked, Asked::Upgrade(at) if *at == index);
        matches!(device.spec, DeviceSpec::Fs(_)) && self.asked.iter().any(asked)
    }

    /// The new process, if there is to be one, does not take the place of the old one.
    pub(super) fn give_up(
        &mut self,
        index: usize,
        why: &str,
        cx: &Context<'_>,
    ) -> Result<(), ClientError> {
        let device = &mut self.devices[index];
        let Some(upgrade) = device.upgrade.take() else {
            return Ok(());
        };
        if matches!(device.spec, DeviceSpec::Fs(_)) {
            // There is no other any more.
            upgrade.reply.send(Err(QmpError::generic(format!(
                "Device '{}': the new process failed when it got its queues; it is replaced as after a crash",
                device.spec.id()
            ))));
            return Ok(());
        }
        let text = format!(
            "Device '{}' goes on with the process that it has: {why}",
            device.spec.id()
        );
        warn!("{text}");
        // Answered when the new one is gone, so that whoever reads it may try again. A handshake's socket leaves the poller by being closed. The broker may not have started it yet: requests are
        // obeyed one after the other.
        drop(upgrade.coming);
        let answer = (upgrade.reply, Err(QmpError::generic(text)));
        self.settle_on(index, false, Some(answer), cx)
    }
}
