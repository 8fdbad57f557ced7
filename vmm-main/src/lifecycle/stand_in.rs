//! Somebody who answers the driver of a card that was taken out.
//!
//! **Job.** After `device_del` of a card whose driver has a control queue, have the broker start a process without a tap, give it the
//! queues, and end it when another device comes to its window.
//! **Who is not trusted.** That process, as every device's: one that does not answer, or ends, is not followed by another one.
//! **Why this way.** No stock kernel lets go of a virtio-mmio device (see [`hotplug`](super::hotplug)), and Linux waits for the answer to
//! a command on a card's control queue with a processor, for ever: one `ip link set … down`, or what IPv6 does by itself a second after
//! the link came up, would cost the guest that processor. The control process reads no queue; so the driver keeps a process in a card's
//! jail, with no link. It is not a device: QMP neither lists it nor tells of its end.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use ipc::control::Request;
use ipc::log::{info, warn};
use ipc::spec::DeviceSpec;
use nix::sys::epoll::EpollFlags;

use super::event_loop::{End, PLUGS, Vm, lock};
use super::hotplug::Waiting;
use super::with_causes;
use crate::virtio::remote::Handshake;

/// A process that is to stand in, and does not serve yet.
#[derive(Debug)]
pub(super) struct Coming {
    pub(super) unit: usize,
    pub(super) pid: i32,
    handshake: Handshake,
}

impl Coming {
    /// When it has to have answered.
    pub(super) fn deadline(&self) -> Instant {
        self.handshake.deadline()
    }
}

impl Vm {
    /// Card `unit` was taken out, and its process is gone.
    pub(super) fn ask_stand_in(&mut self, unit: usize) -> Result<(), End> {
        let features = self.parts.transports.get(unit).and_then(|transport| {
            let transport = lock(transport);
            let core = transport.core();
            core.waits_for_commands().then(|| core.device().features())
        });
        let ours = self.supervisor.card(unit).is_some();
        match features.filter(|_| ours && !self.hotplug.is_plugging(unit)) {
            Some(features) => {
                let index = unit as u32;
                self.ask_broker(
                    &Request::StandIn { index, features },
                    Waiting::StandIn { unit },
                )
            }
            None => Ok(()),
        }
    }

    /// The broker has started it.
    pub(super) fn stand_in_started(
        &mut self,
        unit: usize,
        pid: i32,
        socket: UnixStream,
    ) -> Result<(), End> {
        let Some(spec) = self.supervisor.card(unit).cloned() else {
            return Ok(());
        };
        let begun = Handshake::begin(socket, &DeviceSpec::Net(spec))
            .map_err(|e| with_causes(&e))
            .and_then(|handshake| {
                self.poller
                    .add(&handshake, PLUGS + unit as u64, EpollFlags::EPOLLIN)
                    .map_err(|e| format!("epoll_ctl: {}", e.desc()))?;
                self.hotplug.stand_ins.push(Coming {
                    unit,
                    pid,
                    handshake,
                });
                Ok(())
            });
        match begun {
            Ok(()) => Ok(()),
            Err(why) => self.no_stand_in(unit, &why),
        }
    }

    /// Its handshake goes on, or its time is over. Whether `unit` has one on its way.
    pub(super) fn stand_in_event(&mut self, unit: usize) -> Result<bool, End> {
        let mut coming = self.hotplug.stand_ins.iter_mut();
        let Some(coming) = coming.find(|coming| coming.unit == unit) else {
            return Ok(false);
        };
        match coming.handshake.advance() {
            Ok(false) => return Ok(true),
            Ok(true) => {}
            Err(error) => {
                self.no_stand_in(unit, &with_causes(&error))?;
                return Ok(true);
            }
        }
        let at = self.hotplug.stand_ins.iter().position(|c| c.unit == unit);
        let Some(Coming { pid, handshake, .. }) = at.map(|at| self.hotplug.stand_ins.remove(at))
        else {
            return Ok(true);
        };
        let Some(transport) = self.parts.transports.get(unit).cloned() else {
            return Ok(true);
        };
        let watched = self.poller.remove(&handshake);
        // Before it gets the queues, so that it is ended if it does not give them back.
        self.supervisor.stands_in(unit, pid);
        let back = watched
            .map_err(|e| format!("epoll_ctl: {}", e.desc()))
            .and_then(|()| {
                let fresh = handshake.finish().map_err(|e| with_causes(&e))?;
                let back = lock(&transport).device_back(fresh);
                back.map_err(|e| with_causes(&e))
            });
        match back {
            Ok(true) => info!("process {pid} answers the driver of a card that was taken out"),
            // It asks for attention.
            Ok(false) => {}
            Err(why) => self.no_stand_in(unit, &why)?,
        }
        Ok(true)
    }

    /// A process has ended that nobody watches over: perhaps one on its way.
    pub(super) fn stand_in_exited(&mut self, unit: usize, pid: i32, words: &str) {
        let coming = &mut self.hotplug.stand_ins;
        let before = coming.len();
        coming.retain(|coming| coming.unit != unit || coming.pid != pid);
        if coming.len() < before {
            warn!("nobody answers the driver of window {unit} any more: process {pid}: {words}");
        }
    }

    fn no_stand_in(&mut self, unit: usize, why: &str) -> Result<(), End> {
        warn!("nobody answers the driver of window {unit} any more: {why}");
        self.dismiss(unit)
    }

    /// Another device comes to window `unit`, or nobody may be there any more: whoever stands in leaves, and its queues stay as they are.
    pub(super) fn end_stand_in(&mut self, unit: usize) -> Result<(), End> {
        let asked = self.hotplug.forget_stand_in(unit);
        let mut coming = self.hotplug.stand_ins.iter();
        let coming = coming.any(|coming| coming.unit == unit);
        if asked || coming || self.supervisor.has_stand_in(unit) {
            self.dismiss(unit)
        } else {
            Ok(())
        }
    }

    /// Has the broker end it, as far as it has come.
    fn dismiss(&mut self, unit: usize) -> Result<(), End> {
        // Its socket leaves the poller by being closed.
        self.hotplug.stand_ins.retain(|coming| coming.unit != unit);
        if self.supervisor.has_stand_in(unit)
            && let Some(transport) = self.parts.transports.get(unit)
        {
            let mut transport = lock(transport);
            transport.take_out();
            transport.device_gone();
        }
        self.supervisor.unplug(unit);
        self.ask_broker(&Request::Unplug { index: unit as u32 }, Waiting::Undo)
    }
}
