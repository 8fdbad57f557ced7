//! One device process as the control process sees it: a vhost-user front end that checks what it is told.
//!
//! **Job.** The handshake with a device process, its configuration space, and handing queues over when the guest's
//! driver is ready and taking them back when it resets the device.
//!
//! **Who is not trusted**: the device process, which reads what the guest wrote. What it claims is checked against the spec
//! that it was started with; a lie, silence or a closed socket makes the device fail, never the VM. The guest's queue
//! addresses are checked here too, so that no device process is told of memory that is not RAM.
//!
//! **Why this way.** [`Handshake`] has three steps that do not wait for each other: `begin` works before the process has
//! even been executed, since its socket exists already. With several devices call `begin` for all, do other work, then
//! `negotiate` for all, then `finish` for all: every process computes its answers while another one is read.
//!
//! Ring addresses travel as guest-physical addresses: the memory table names them as "user addresses", so a device
//! process learns nothing about where this process has its memory.

mod config;
mod error;
mod handshake;
mod inflight;
mod memory;
mod offer;
mod order;
mod state;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use ipc::counters::BlockCounters;
use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures, VhostUserVringAddr,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::link::{Link, LinkError};
use super::window::Window;
use crate::memory::sharing::{DeviceFaults, Orders};
pub(super) use config::NET_STATUS;
use config::STATUS_ANNOUNCE;
pub use error::RemoteError;
pub use handshake::Handshake;
use inflight::InflightRegion;
use offer::ConfigFrom;
pub use offer::F_VERSION_1;
use order::Ordered;

/// Device IDs (virtio 1.3, section 5).
const VIRTIO_ID_NET: u32 = 1;

const VIRTIO_ID_BLOCK: u32 = 2;

const VIRTIO_ID_FS: u32 = 26;

/// What the guest's driver said about one queue (virtio 1.3, section 4.2.2: `QueueSize`, `QueueDesc`, …).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries at most: a power of two.
    pub max_size: u16,
    /// Entries in use: a power of two.
    pub size: u16,
    /// The driver set the queue up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table, 16 bytes an entry.
    pub desc: u64,
    /// Guest-physical address of the available ring ("driver area").
    pub driver: u64,
    /// Guest-physical address of the used ring ("device area").
    pub device: u64,
}

/// A queue on its way to the device process: state and the event descriptors that go with it.
#[derive(Debug)]
pub struct QueueHandover<'a> {
    /// Queue number.
    pub index: u16,
    /// Where it is.
    pub state: &'a QueueState,
    /// Index in its available ring to go on from, unless the in-flight region knows better: 0 for a new queue.
    pub base: u16,
    /// The guest's doorbell: device process waits for it.
    pub kick: &'a EventFd,
    /// The interrupt: device process writes to it.
    pub call: &'a EventFd,
    /// Complaint about a broken ring: device process writes to it.
    pub error: &'a EventFd,
}

/// A device process after a successful handshake, and what has to outlive it.
#[derive(Debug)]
pub struct RemoteDevice {
    id: String,
    virtio_id: u32,
    num_queues: u16,
    queue_size: u16,
    /// What the guest is offered.
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// Configuration space as the device last told it; reads by the guest never wake the device.
    config: Vec<u8>,
    /// Who tells configuration space.
    config_from: ConfigFrom,
    /// In-flight region. It outlives the device process: a restarted one gets it and replays what had not been answered.
    inflight: Option<InflightRegion>,
    /// Processes that this one has had before its own.
    processes: u32,
    /// Regions before this one of processes that were not followed by another one yet, for what was counted there.
    past: Vec<InflightRegion>,
    /// What was counted in regions before those.
    counted: BlockCounters,
    /// Contents that the next region starts with: those of a snapshot.
    restored: Option<Vec<u8>>,
    /// Queues that the device process runs.
    active: Vec<u16>,
    /// Where it has files mapped for the guest.
    window: Option<Arc<Window>>,
    /// A process was given queues and has neither given them back nor ended.
    exposed: bool,
    /// No process will come any more.
    failed: bool,
    /// The host has a card's link down, which each process of it is told.
    link_down: bool,
    /// Guest memory is a template's in part.
    sharing: Option<Arc<Orders>>,
    /// Faults of the process that the link leads to, if they are watched.
    faults: Option<DeviceFaults>,
    /// What a disk's process is doing with its image.
    ordered: Option<Ordered>,
    /// `None` while there is no process that can be talked to.
    link: Option<Link>,
}

impl RemoteDevice {
    /// Device id, for messages.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Virtio device ID (virtio 1.3, section 5).
    pub const fn virtio_id(&self) -> u32 {
        self.virtio_id
    }

    /// Number of queues.
    pub const fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// Entries of a queue at most.
    pub const fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Feature bits to offer to the guest.
    pub const fn features(&self) -> u64 {
        self.features
    }

    /// Gives the process the way to `window`, as it will give it to those that come after this one.
    pub fn set_window(&mut self, window: Arc<Window>) -> Result<(), RemoteError> {
        self.window = Some(window);
        self.tell_window()
    }

    /// Where it has files mapped for the guest.
    pub fn window(&self) -> Option<&Window> {
        self.window.as_deref()
    }

    fn tell_window(&mut self) -> Result<(), RemoteError> {
        let Some(window) = self.window.clone() else {
            return Ok(());
        };
        let channel = window.connect().map_err(|source| RemoteError::Window {
            id: self.id.clone(),
            source,
        })?;
        self.talk(|link| {
            link.post(FrontendReq::SET_BACKEND_REQ_FD, &[], &[channel.as_fd()])?;
            link.finish().map(drop)
        })
    }

    /// An error if another process could not know what this one had taken from the queues and not done.
    pub fn check_account(&self) -> Result<(), RemoteError> {
        // A packet may get lost, and the used ring tells how far the process before got.
        if matches!(self.config_from, ConfigFrom::Card(_))
            || self
                .protocol
                .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            return Ok(());
        }
        Err(RemoteError::NoAccount {
            id: self.id.clone(),
        })
    }

    /// Whether the device process runs queues.
    pub fn is_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// Whether the device was given up.
    pub const fn is_failed(&self) -> bool {
        self.failed
    }

    /// Whether there is no process that can be talked to, and another may come.
    pub const fn is_away(&self) -> bool {
        self.link.is_none() && !self.failed
    }

    /// The vhost-user socket: it hangs up when the process ends.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(AsFd::as_fd)
    }

    /// Does not talk to this process any more: closes its socket, upon which a process in good order ends. What was in
    /// flight is kept for the next one.
    fn hang_up(&mut self) {
        self.link = None;
        self.ordered = None;
        self.active.clear();
    }

    /// The process is reaped.
    pub fn process_ended(&mut self) {
        self.hang_up();
        self.exposed = false;
    }

    /// Gives the device up for good. The process is reaped.
    pub fn fail(&mut self) {
        self.process_ended();
        self.failed = true;
        self.retire_inflight();
    }

    /// Goes on with another process, whose handshake gave `fresh`. The guest has negotiated with the one before, so this
    /// one must offer the same; only configuration space may differ, as it may at any time: then `true`.
    pub fn take_over(&mut self, fresh: Self) -> Result<bool, RemoteError> {
        self.fits(&fresh)?;
        let before = std::mem::replace(&mut self.config, fresh.config);
        self.active.clear();
        // Those of a process that is gone; the one that comes has memory of its own, or gets what is in flight.
        let inflight = self.inflight.take();
        self.counted = self.counters();
        self.past.clear();
        self.inflight = inflight;
        self.processes = self.processes.wrapping_add(1);
        self.ordered = None;
        self.link = fresh.link;
        self.tell_window()?;
        self.faults = None;
        if self.link_down {
            self.show_link(false);
            self.tell_link()?;
        }
        Ok(self.config != before)
    }

    /// Whether `fresh` offers what the guest has negotiated.
    pub fn fits(&self, fresh: &Self) -> Result<(), RemoteError> {
        for (kind, got, need) in [
            ("virtio", fresh.features, self.features),
            ("vhost-user", fresh.protocol.bits(), self.protocol.bits()),
        ] {
            if got != need {
                return Err(RemoteError::Changed {
                    id: self.id.clone(),
                    kind,
                    got,
                    need,
                });
            }
        }
        Ok(())
    }

    /// Guest memory is a template's in part: whoever gets it from now on is watched, or all of it is brought in before.
    pub fn share(&mut self, sharing: Arc<Orders>) {
        self.sharing = Some(sharing);
    }

    /// Whether its process can be watched.
    pub const fn can_share(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::PAGEFAULT)
    }

    /// Hands `queues` over and starts them. `features` are those that the driver accepted.
    pub fn activate(
        &mut self,
        features: u64,
        memory: &GuestMemoryMmap<()>,
        queues: &[QueueHandover<'_>],
    ) -> Result<(), RemoteError> {
        for queue in queues {
            self.check_queue(memory, queue)?;
        }
        let features =
            self.config_from.told(features) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.exposed |= self.link.is_some();
        if let Some(window) = &self.window {
            window.open();
        }
        self.talk(|link| link.post(FrontendReq::SET_FEATURES, &[&features.to_le_bytes()], &[]))?;
        self.post_memory(memory)?;
        if self
            .protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            let mut region = match self.inflight.take() {
                Some(region) => region,
                None => self.get_inflight()?,
            };
            region.process = self.processes;
            if let Some(bytes) = &self.restored {
                // A process whose region cannot be filled is replaced, and the next one has to have what was in flight.
                self.fill_inflight(&region, bytes)?;
                self.restored = None;
            }
            let sent = self.talk(|link| {
                link.post(
                    FrontendReq::SET_INFLIGHT_FD,
                    &[&region.layout],
                    &[region.file.as_fd()],
                )
            });
            self.inflight = Some(region);
            sent?;
        }
        let bases = queues.iter().map(|queue| self.base(memory, queue));
        let bases: Vec<u16> = bases.collect();
        self.talk(|link| {
            for (queue, base) in queues.iter().zip(bases) {
                post_queue(link, queue, base)?;
            }
            link.finish().map(drop)
        })?;
        self.active = queues.iter().map(|queue| queue.index).collect();
        if self.link_down && matches!(self.config_from, ConfigFrom::Card(_)) {
            self.tell_link()?;
        }
        Ok(())
    }

    /// Where the device goes on in a queue's available ring. A daemon that serves a card does not know how far the one before it
    /// got, or it does not say; it goes through buffers in their order (as QEMU too relies on), and the used ring has a number
    /// of those that are done, which is passed on and means nothing here. A new queue has 0 there.
    fn base(&self, memory: &GuestMemoryMmap<()>, queue: &QueueHandover<'_>) -> u16 {
        /// Of `idx` in the used ring (virtio 1.3, 2.7.8).
        const USED_IDX: u64 = 2;
        let address = GuestAddress(queue.state.device.wrapping_add(USED_IDX));
        match self.config_from {
            ConfigFrom::Card(_) => memory.read_obj(address).map_or(queue.base, u16::from_le),
            _ => queue.base,
        }
    }

    /// Takes the queues back. On return the device process does not touch guest memory any more. After an error it may,
    /// until [`RemoteDevice::process_ended`]: whoever started it has to end it before guest memory gets a new owner.
    pub fn deactivate(&mut self) -> Result<(), RemoteError> {
        let active = std::mem::take(&mut self.active);
        if self.virtio_id == VIRTIO_ID_NET
            && let Some(status) = self.config.get_mut(NET_STATUS)
        {
            // The next driver is asked nothing.
            *status &= !STATUS_ANNOUNCE;
        }
        // Counted to the end of what the driver asked for; what was in flight belongs to a driver that is gone.
        let stopped = self.take_queues(active);
        self.retire_inflight();
        self.restored = None;
        // Last: it may have had something mapped until here.
        if let Some(window) = &self.window {
            window.close();
        }
        stopped
    }

    fn take_queues(&mut self, active: Vec<u16>) -> Result<(), RemoteError> {
        if !self.exposed {
            return Ok(());
        }
        let resets = self
            .protocol
            .contains(VhostUserProtocolFeatures::RESET_DEVICE);
        self.talk(|link| {
            for index in active {
                let state = VhostUserVringState::new(u32::from(index), 0);
                link.post(FrontendReq::GET_VRING_BASE, &[state.as_slice()], &[])?;
            }
            if resets {
                link.post(FrontendReq::RESET_DEVICE, &[], &[])?;
            }
            link.finish().map(drop)
        })?;
        self.exposed = false;
        Ok(())
    }

    /// Stops the queues in order: what was taken from them is done, and they can be handed over again. Gives each queue's
    /// number and the index in its available ring to go on from.
    pub fn stop_queues(&mut self) -> Result<Vec<(u16, u16)>, RemoteError> {
        let active = self.active.clone();
        let values = self.talk(|link| {
            for index in &active {
                let state = VhostUserVringState::new(u32::from(*index), 0);
                link.post(FrontendReq::GET_VRING_BASE, &[state.as_slice()], &[])?;
            }
            link.finish()
        })?;
        self.active.clear();
        self.exposed = false;
        let mut bases = Vec::with_capacity(active.len());
        for (queue, value) in active.into_iter().zip(&values) {
            // `struct vring_state`: the queue's number, then the index, which goes around at 16 bits; of 32 bits each.
            let state = number(std::slice::from_ref(value), 0);
            match (state as u32, u16::try_from(state >> 32)) {
                (told, Ok(base)) if told == u32::from(queue) => bases.push((queue, base)),
                _ => {
                    self.hang_up();
                    return Err(RemoteError::Base {
                        id: self.id.clone(),
                        queue,
                        got: state,
                    });
                }
            }
        }
        Ok(bases)
    }

    /// Runs `conversation` against the clock; any error in it ends the device.
    fn talk<T>(
        &mut self,
        conversation: impl FnOnce(&mut Link) -> Result<T, LinkError>,
    ) -> Result<T, RemoteError> {
        self.hear_order()?;
        let Some(link) = &mut self.link else {
            return Err(RemoteError::Failed {
                id: self.id.clone(),
            });
        };
        link.start_clock();
        conversation(link).map_err(|source| {
            self.hang_up();
            RemoteError::Link {
                id: self.id.clone(),
                source,
            }
        })
    }

    fn check_queue(
        &self,
        memory: &GuestMemoryMmap<()>,
        queue: &QueueHandover<'_>,
    ) -> Result<(), RemoteError> {
        // Sizes of virtio 1.3, section 2.7, with the event index fields.
        let size = u64::from(queue.state.size);
        for (part, address, len) in [
            ("descriptor table", queue.state.desc, 16 * size),
            ("available ring", queue.state.driver, 6 + 2 * size),
            ("used ring", queue.state.device, 6 + 8 * size),
        ] {
            let inside = memory
                .find_region(GuestAddress(address))
                .is_some_and(|region| {
                    let from = address - region.start_addr().0;
                    len <= region.len() - from
                });
            if !inside {
                return Err(RemoteError::QueueAddress {
                    id: self.id.clone(),
                    queue: queue.index,
                    part,
                    address,
                });
            }
        }
        Ok(())
    }
}

/// Everything that one queue takes. The order matters: a device may start on the kick descriptor, so it comes last but
/// for the explicit enabling.
fn post_queue(link: &mut Link, queue: &QueueHandover<'_>, base: u16) -> Result<(), LinkError> {
    let index = u32::from(queue.index);
    let number = VhostUserVringState::new(index, u32::from(queue.state.size));
    link.post(FrontendReq::SET_VRING_NUM, &[number.as_slice()], &[])?;
    let base = VhostUserVringState::new(index, u32::from(base));
    link.post(FrontendReq::SET_VRING_BASE, &[base.as_slice()], &[])?;
    let addresses = VhostUserVringAddr::new(
        index,
        VhostUserVringAddrFlags::empty(),
        queue.state.desc,
        queue.state.device,
        queue.state.driver,
        0,
    );
    link.post(FrontendReq::SET_VRING_ADDR, &[addresses.as_slice()], &[])?;
    for (request, event) in [
        (FrontendReq::SET_VRING_CALL, queue.call),
        (FrontendReq::SET_VRING_ERR, queue.error),
        (FrontendReq::SET_VRING_KICK, queue.kick),
    ] {
        link.post(
            request,
            &[&u64::from(index).to_le_bytes()],
            &[borrow(event)],
        )?;
    }
    let enable = VhostUserVringState::new(index, 1);
    link.post(FrontendReq::SET_VRING_ENABLE, &[enable.as_slice()], &[])
}

/// Value `index` of a reply list as a number; the link has checked its size.
fn number(values: &[Vec<u8>], index: usize) -> u64 {
    values
        .get(index)
        .and_then(|value| value.first_chunk::<8>())
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[allow(unsafe_code)] // vmm-sys-util's EventFd has no AsFd
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor belongs to `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests;
