//! The part of a virtio device that every transport has: status, features, queues and configuration space.
//!
//! **Job.** The device's state machine (virtio 1.3, sections 2.1 and 3.1), told by a transport what the driver wrote and
//! telling it what a read gives. It knows neither registers nor interrupts lines: those are [`super::mmio`]'s.
//!
//! **Who is not trusted**: the guest. Any value may be written at any time by any vCPU. What the standard does not allow
//! at that moment is ignored and logged (rate limited), never stored. Once the driver has set `DRIVER_OK` the queues are
//! frozen until a reset: the device process works with what it was told, and nothing here can drift from that.
//!
//! **Why this way.** The state is plain data ([`CoreState`]) so that a snapshot can hold it; descriptors and the link to
//! the device process live beside it in [`Core`].

use std::fs::File;
use std::io;
use std::sync::Arc;

use ipc::disk::{Answer, Order};
use ipc::guest_warn;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::attention::Attention;
use crate::memory::sharing::Orders;

use super::remote::{F_VERSION_1, QueueHandover, QueueState, RemoteDevice, RemoteError};
use super::snapshot::DeviceState;
use super::window::Window;

/// Device status bits (virtio 1.3, section 2.1).
pub mod status {
    /// The guest knows the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are settled.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};

/// A card has a control queue: `VIRTIO_NET_F_CTRL_VQ` (virtio 1.3, 5.1.3).
const F_CTRL_VQ: u64 = 1 << 17;
/// 32-bit words of feature bits that can be selected: 128 bits, as virtio 1.3 leaves room for.
const FEATURE_WORDS: usize = 4;

/// Why a transport could not be made.
#[derive(Debug, Error)]
pub enum CoreError {
    /// No event descriptor.
    #[error("cannot create an event descriptor for device \"{id}\"")]
    Event {
        /// Device id.
        id: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Which part of a queue's 64-bit addresses a register holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

/// Which of a queue's three areas (virtio 1.3, section 2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// Descriptor table.
    Desc,
    /// Driver area: the available ring.
    Driver,
    /// Device area: the used ring.
    Device,
}

/// Everything that the driver has told the device; plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreState {
    /// Status bits, see [`status`].
    pub status: u8,
    /// Word of the offered features that a read gives.
    pub device_features_select: u32,
    /// Word of the accepted features that a write sets.
    pub driver_features_select: u32,
    /// Accepted features in words of 32 bits. Kept as written: they are judged at `FEATURES_OK`.
    pub driver_features: [u32; FEATURE_WORDS],
    /// Queue that queue registers speak of.
    pub queue_select: u32,
    /// Changes with every change of configuration space (virtio 1.3, section 2.5.1).
    pub config_generation: u32,
    /// A configuration change that the driver has not acknowledged yet.
    pub config_changed: bool,
    /// Queues.
    pub queues: Vec<QueueState>,
}

impl CoreState {
    fn new(queues: u16, max_size: u16) -> Self {
        let queue = QueueState {
            max_size,
            size: max_size,
            ready: false,
            desc: 0,
            driver: 0,
            device: 0,
        };
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: [0; FEATURE_WORDS],
            queue_select: 0,
            config_generation: 0,
            config_changed: false,
            queues: vec![queue; usize::from(queues)],
        }
    }

    /// The 64 feature bits that exist, or `None` if the driver picked one beyond them.
    pub(super) fn accepted_features(&self) -> Option<u64> {
        let [low, high, beyond @ ..] = self.driver_features;
        beyond
            .iter()
            .all(|&word| word == 0)
            .then(|| u64::from(low) | u64::from(high) << 32)
    }
}

/// How a transport interrupts the guest.
pub trait Interrupts {
    /// Descriptor that the device process writes to when queue `index` has used buffers.
    fn queue_call(&self, index: u16) -> &EventFd;
    /// Interrupts the guest because of a configuration change.
    fn signal_config(&self);
}

/// A virtio device behind some transport.
#[derive(Debug)]
pub struct Core {
    state: CoreState,
    device: RemoteDevice,
    memory: GuestMemoryMmap<()>,
    /// One doorbell a queue.
    kicks: Vec<EventFd>,
    /// Complaints of the device process about any ring.
    error: EventFd,
    /// Complaints of this side about the device process.
    attention: Arc<Attention>,
    /// Queues stand still for a snapshot, whoever serves them.
    held: bool,
    /// It comes from a snapshot, and its network does not know yet.
    moved: bool,
    /// Where each queue goes on, when it was stopped in order.
    bases: Vec<u16>,
}

impl Core {
    /// A device at power-on.
    pub fn new(device: RemoteDevice, memory: GuestMemoryMmap<()>) -> Result<Self, CoreError> {
        let event = || {
            EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| CoreError::Event {
                id: device.id().to_owned(),
                source,
            })
        };
        let kicks = (0..device.num_queues())
            .map(|_| event())
            .collect::<Result<_, _>>()?;
        let error = event()?;
        let attention = Arc::new(Attention::new(event()?));
        attention.serves();
        let state = CoreState::new(device.num_queues(), device.queue_size());
        Ok(Self {
            state,
            device,
            memory,
            kicks,
            error,
            attention,
            held: false,
            moved: false,
            bases: Vec::new(),
        })
    }

    /// What the driver told the device.
    pub const fn state(&self) -> &CoreState {
        &self.state
    }

    /// See [`RemoteDevice::set_window`].
    pub fn set_window(&mut self, window: Arc<Window>) -> Result<(), RemoteError> {
        self.device.set_window(window)
    }

    /// The device process.
    pub const fn device(&self) -> &RemoteDevice {
        &self.device
    }

    /// Doorbells, by queue number.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Readable when the device process complains about a ring; then call [`Core::device_error`].
    pub const fn error_event(&self) -> &EventFd {
        &self.error
    }

    /// How the main loop learns that the device process has to be ended.
    pub const fn attention(&self) -> &Arc<Attention> {
        &self.attention
    }

    /// Status bits.
    pub const fn status(&self) -> u8 {
        self.state.status
    }

    /// Whether the driver and the device are at work.
    pub const fn is_running(&self) -> bool {
        self.has(DRIVER_OK)
    }

    const fn has(&self, bits: u8) -> bool {
        self.state.status & bits == bits
    }

    /// Whether queue registers take writes: between `FEATURES_OK` and `DRIVER_OK` (virtio 1.3, section 3.1.1, step 7).
    const fn takes_queue_setup(&self) -> bool {
        self.has(FEATURES_OK) && self.state.status & (DRIVER_OK | FAILED | NEEDS_RESET) == 0
    }

    /// The driver writes the status register.
    pub fn write_status(&mut self, value: u8, lines: &impl Interrupts) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.state.status;
        // NEEDS_RESET is the device's bit: a driver that adds a bit to what it read writes it back.
        let value = value & !NEEDS_RESET | old & NEEDS_RESET;
        if value & old != old {
            guest_warn!(
                "device \"{}\": driver cleared status bits without a reset ({old:#x} -> {value:#x})",
                self.device.id()
            );
            return;
        }
        // Several bits at once count as one after the other, in the standard's order.
        for (bit, needs) in [
            (FAILED, 0),
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, ACKNOWLEDGE | DRIVER),
            (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ] {
            if value & bit == 0 || self.has(bit) {
                continue;
            }
            if !self.has(needs) || self.state.status & (FAILED | NEEDS_RESET) != 0 {
                guest_warn!(
                    "device \"{}\": driver set status bit {bit:#x} out of order in {:#x}",
                    self.device.id(),
                    self.state.status
                );
                return;
            }
            match bit {
                FEATURES_OK if !self.features_are_fine() => return,
                DRIVER_OK => {
                    self.state.status |= DRIVER_OK;
                    self.activate(lines);
                }
                _ => self.state.status |= bit,
            }
        }
        if value & !(FAILED | ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET) != 0 {
            guest_warn!(
                "device \"{}\": driver set unknown status bits {value:#x}",
                self.device.id()
            );
        }
    }

    /// Whether the driver picked only what was offered, and `VIRTIO_F_VERSION_1` (virtio 1.3, section 6.1).
    fn features_are_fine(&self) -> bool {
        let offered = self.device.features();
        let fine = self
            .state
            .accepted_features()
            .is_some_and(|picked| picked & !offered == 0 && picked & F_VERSION_1 != 0);
        if !fine {
            guest_warn!(
                "device \"{}\": driver picked features {:x?} of {offered:#x}, refused",
                self.device.id(),
                self.state.driver_features
            );
        }
        fine
    }

    /// Hands the queues over. Without a process that is done when one comes; the driver may fill its queues meanwhile.
    fn activate(&mut self, lines: &impl Interrupts) {
        if self.device.is_away() || self.held {
            return;
        }
        let bases = std::mem::take(&mut self.bases);
        let queues: Vec<_> = (0u16..)
            .zip(&self.state.queues)
            .zip(&self.kicks)
            .filter(|((_, state), _)| state.ready)
            .map(|((index, state), kick)| QueueHandover {
                index,
                state,
                base: bases.get(usize::from(index)).copied().unwrap_or(0),
                kick,
                call: lines.queue_call(index),
                error: &self.error,
            })
            .collect();
        let features = self.state.accepted_features().unwrap_or(0);
        if let Err(error) = self.device.activate(features, &self.memory, &queues) {
            self.trouble(&error, lines);
        }
    }

    /// A guest's fault stops the device until the guest resets it, as does a device that was given up. A process that does
    /// not do as it should is replaced, and the guest learns nothing of it.
    fn trouble(&mut self, error: &RemoteError, lines: &impl Interrupts) {
        self.report(error);
        if error.is_guests_fault() || self.device.is_failed() {
            self.needs_reset(lines);
        } else {
            self.attention.unwanted();
        }
    }

    /// The guest can cause all of these as often as it likes.
    fn report(&self, error: &RemoteError) {
        let cause = std::error::Error::source(error)
            .map(|e| format!(": {e}"))
            .unwrap_or_default();
        guest_warn!("{error}{cause}");
    }

    /// `DEVICE_NEEDS_RESET`, told by a configuration change once the driver is at work (virtio 1.3, section 2.1.2).
    fn needs_reset(&mut self, lines: &impl Interrupts) {
        self.state.status |= NEEDS_RESET;
        if self.is_running() {
            self.state.config_changed = true;
            lines.signal_config();
        }
    }

    /// The device process signalled [`Core::error_event`]: the guest broke a ring.
    pub fn device_error(&mut self, lines: &impl Interrupts) {
        // Emptied, so that the descriptor is quiet until the next complaint. If it is empty already, the driver has reset the
        // device since the complaint woke the caller, and the queues that it was about are gone.
        if self.error.read().is_ok() && self.is_running() && !self.has(NEEDS_RESET) {
            guest_warn!("device \"{}\" reports a broken virtqueue", self.device.id());
            self.needs_reset(lines);
        }
    }

    /// How many requests the process has taken and not answered, as far as is known.
    pub fn in_flight(&self) -> Option<u32> {
        self.device.in_flight()
    }

    /// The device process is reaped, and another one will come ([`Core::device_back`]).
    pub fn device_gone(&mut self) {
        self.device.process_ended();
    }

    /// Another process has taken the place of the one that is gone; its handshake gave `fresh`. If the driver is at work
    /// the process gets the queues as they are, with what was in flight. `Ok(false)` if it failed at that.
    pub fn device_back(
        &mut self,
        fresh: RemoteDevice,
        lines: &impl Interrupts,
    ) -> Result<bool, RemoteError> {
        let changed = self.device.take_over(fresh)?;
        self.attention.serves();
        if changed {
            self.state.config_generation = self.state.config_generation.wrapping_add(1);
            if self.is_running() {
                self.state.config_changed = true;
                lines.signal_config();
            }
        }
        self.go_on(lines);
        Ok(!self.device.is_away())
    }

    /// Another process, whose handshake gave `fresh`, takes the place of the one that serves: that one finishes what it took and
    /// stops, and the new one goes on from there. `Ok(false)` if the new one failed at that; after an error the old one
    /// serves on, or has to be ended if it does not stop.
    pub fn upgrade(
        &mut self,
        fresh: RemoteDevice,
        lines: &impl Interrupts,
    ) -> Result<bool, RemoteError> {
        let id = || self.device.id().to_owned();
        if self.held {
            return Err(RemoteError::Held { id: id() });
        }
        if self.device.is_away() || self.device.is_failed() {
            return Err(RemoteError::Failed { id: id() });
        }
        // While the old one still serves.
        self.device.fits(&fresh)?;
        if self.device.is_active() {
            self.stop_queues().inspect_err(|_| {
                self.attention.unwanted();
            })?;
        }
        // It has nothing of the guest's any more; without its socket it ends.
        self.device.process_ended();
        self.device_back(fresh, lines)
    }

    /// Hands the queues to the process that is there now, if the driver is at work.
    fn go_on(&mut self, lines: &impl Interrupts) {
        if !self.is_running() || self.has(NEEDS_RESET) || self.held {
            return;
        }
        self.activate(lines);
        for (index, (_, kick)) in (0u16..)
            .zip(self.state.queues.iter().zip(&self.kicks))
            .filter(|(_, (queue, _))| queue.ready)
        {
            // The old process may have seen a doorbell and not the request behind it, or have used a buffer and not
            // interrupted the driver. Both look and find nothing if it was not so.
            let _ = kick.write(1);
            let _ = lines.queue_call(index).write(1);
        }
    }

    /// Has the device process finish what it took from the queues and stop them, until [`Core::release`]: guest memory and
    /// the queues then stand still. All vCPUs are paused meanwhile.
    pub fn hold(&mut self) -> Result<(), RemoteError> {
        if self.held {
            return Ok(());
        }
        if self.device.is_active() {
            self.stop_queues().inspect_err(|_| {
                self.attention.unwanted();
            })?;
        } else if self.is_running() && !self.has(NEEDS_RESET) {
            // Its process is being replaced.
            return Err(RemoteError::Failed {
                id: self.device.id().to_owned(),
            });
        }
        self.held = true;
        Ok(())
    }

    /// Whether the driver is at work and the process that it worked with is gone, with another one to come.
    pub fn is_between_processes(&self) -> bool {
        self.is_running()
            && !self.held
            && !self.has(NEEDS_RESET)
            && !self.device.is_active()
            && !self.device.is_failed()
    }

    /// Whether the driver of a card may send commands, and nobody is there to answer them.
    pub fn waits_for_commands(&self) -> bool {
        let accepted = self.state.accepted_features().unwrap_or(0);
        accepted & F_CTRL_VQ != 0 && self.is_between_processes()
    }

    /// Has the device process stop its queues in order, and remembers where each goes on.
    fn stop_queues(&mut self) -> Result<(), RemoteError> {
        let mut bases = vec![0; self.state.queues.len()];
        for (index, base) in self.device.stop_queues()? {
            if let Some(place) = bases.get_mut(usize::from(index)) {
                *place = base;
            }
        }
        self.bases = bases;
        Ok(())
    }

    /// See [`RemoteDevice::share`].
    pub fn share(&mut self, sharing: Arc<Orders>) {
        self.device.share(sharing);
    }

    /// Undoes [`Core::hold`], or starts what [`Core::restore`] brought.
    pub fn release(&mut self, lines: &impl Interrupts) {
        if std::mem::take(&mut self.held) {
            self.go_on(lines);
            if std::mem::take(&mut self.moved) {
                self.announce(lines);
            }
        }
    }

    /// The device in a snapshot; it is [held](Core::hold). What its process holds goes through `exchange`, an empty file.
    pub fn save(&mut self, exchange: Option<&File>) -> Result<DeviceState, RemoteError> {
        let held = if self.device.has_state() && self.is_running() && !self.has(NEEDS_RESET) {
            let saved = self.device.save_state(exchange);
            if saved.is_err() && self.device.is_away() {
                // It cannot be understood any more; nobody else would notice.
                self.attention.unwanted();
            }
            Some(saved?)
        } else {
            None
        };
        Ok(DeviceState {
            held,
            core: self.state.clone(),
            bases: self.bases.clone(),
            config: self.device.config().to_vec(),
            inflight: self.device.save_inflight()?,
        })
    }

    /// Takes a snapshot's state, of which [`DeviceState::check`] has said that it fits this device. It is held then.
    pub fn restore(&mut self, state: DeviceState) -> Result<(), RemoteError> {
        if let Some((offset, byte)) = state.written(&self.device) {
            self.device.write_config(offset, &[byte])?;
        }
        if state.link_is_down(&self.device) {
            self.device.set_link(false)?;
        }
        if let Some(held) = &state.held {
            self.device.load_state(held)?;
        }
        self.state = state.core;
        self.bases = state.bases;
        self.device.restore_inflight(state.inflight);
        self.held = true;
        self.moved = true;
        Ok(())
    }

    /// The network is to learn where a card's guest is, if a driver uses the card.
    pub fn announce(&mut self, lines: &impl Interrupts) {
        if !self.is_running() || self.device.socket().is_none() {
            return;
        }
        match self.device.announce() {
            Ok(false) => {}
            Ok(true) => {
                self.state.config_generation = self.state.config_generation.wrapping_add(1);
                self.state.config_changed = true;
                lines.signal_config();
            }
            Err(error) => self.trouble(&error, lines),
        }
    }

    /// Pulls a card's cable or plugs it in; the driver is told.
    pub fn set_link(&mut self, up: bool, lines: &impl Interrupts) {
        match self.device.set_link(up) {
            Ok(false) => {}
            Ok(true) => {
                self.state.config_generation = self.state.config_generation.wrapping_add(1);
                if self.is_running() {
                    self.state.config_changed = true;
                    lines.signal_config();
                }
            }
            // The next process is told.
            Err(error) => self.trouble(&error, lines),
        }
    }

    /// Has a disk's process make it so many sectors long, and tells the driver; `false` if the disk stays as it is.
    pub fn set_capacity(
        &mut self,
        sectors: u64,
        lines: &impl Interrupts,
    ) -> Result<bool, RemoteError> {
        if self.device.is_away() || self.device.is_failed() {
            return Err(RemoteError::Failed {
                id: self.device.id().to_owned(),
            });
        }
        let old = self.device.config().to_vec();
        let done = self
            .device
            .set_capacity(sectors)
            .inspect_err(|error| self.trouble(error, lines))?;
        if self.device.config() != old {
            self.state.config_generation = self.state.config_generation.wrapping_add(1);
            if self.is_running() {
                self.state.config_changed = true;
                lines.signal_config();
            }
        }
        Ok(done)
    }

    /// Has a disk's process do something with its image, of which the driver sees nothing; does not wait for that.
    pub fn begin_order(
        &mut self,
        order: &Order,
        lines: &impl Interrupts,
    ) -> Result<(), RemoteError> {
        if self.device.is_away() || self.device.is_failed() {
            return Err(RemoteError::Failed {
                id: self.device.id().to_owned(),
            });
        }
        let begun = self.device.begin_order(order);
        begun.inspect_err(|error| self.trouble(error, lines))
    }

    /// What came of it, if that is known; to be asked when the process's socket is readable, and after its
    /// [attention](Self::attention) was wanted.
    pub fn order_answer(&mut self, lines: &impl Interrupts) -> Result<Option<Answer>, RemoteError> {
        let had = self.device.order_deadline().is_some();
        let answer = self.device.order_answer();
        // The end of a process is told elsewhere.
        answer.inspect_err(|error| {
            if had {
                self.trouble(error, lines);
            }
        })
    }

    /// The driver had something to say while the process had an order, and heard the answer to that: the main loop is to look.
    pub fn tell_of_order(&self) {
        if self.device.order_is_heard() {
            self.attention.look();
        }
    }

    /// The device is taken out: the driver is told, then what is under way is ended in order; `false` if that failed. The
    /// process is ended after this.
    pub fn take_out(&mut self, lines: &impl Interrupts) -> bool {
        if self.device.show_absence() {
            self.state.config_generation = self.state.config_generation.wrapping_add(1);
            if self.is_running() {
                self.state.config_changed = true;
                lines.signal_config();
            }
        }
        if !self.device.is_active() {
            return true;
        }
        self.stop_queues().map_err(|e| self.report(&e)).is_ok()
    }

    /// The device process is gone for good: it is given up, and the driver told.
    pub fn device_lost(&mut self, lines: &impl Interrupts) {
        self.device.fail();
        if self.is_running() && !self.has(NEEDS_RESET) {
            self.needs_reset(lines);
        }
    }

    /// The device process says that its configuration space changed.
    pub fn device_config_changed(&mut self, lines: &impl Interrupts) {
        let old = self.device.config().to_vec();
        if let Err(error) = self.device.refresh_config() {
            self.trouble(&error, lines);
        } else if self.device.config() != old {
            self.state.config_generation = self.state.config_generation.wrapping_add(1);
            if self.is_running() {
                self.state.config_changed = true;
                lines.signal_config();
            }
        }
    }

    /// Takes the queues back from the device process; `false` if it may still touch guest memory and has to be ended.
    pub fn take_back(&mut self) -> bool {
        let Err(error) = self.device.deactivate() else {
            return true;
        };
        self.report(&error);
        self.attention.unwanted();
        false
    }

    /// Back to power-on, by the driver (status 0) or because the whole VM is reset in place. On return the device process
    /// does not touch guest memory any more, or the guest does not run before it has been ended (see
    /// [`attention`](super::attention)).
    pub fn reset(&mut self) {
        if !self.take_back() && self.attention.wait() {
            self.device.process_ended();
        }
        for kick in &self.kicks {
            // A doorbell that nobody answered is not one for the next driver.
            let _ = kick.read();
        }
        let _ = self.error.read();
        // A driver that read the old configuration must see that time has passed.
        let config_generation = self.state.config_generation;
        self.state = CoreState::new(self.device.num_queues(), self.device.queue_size());
        self.state.config_generation = config_generation;
        self.bases.clear();
    }

    /// The driver acknowledges a configuration change.
    pub fn acknowledge_config_change(&mut self) {
        self.state.config_changed = false;
    }

    /// The driver selects a word of the offered features.
    pub fn select_device_features(&mut self, word: u32) {
        self.state.device_features_select = word;
    }

    /// The selected word of the offered features.
    pub const fn device_features(&self) -> u32 {
        match self.state.device_features_select {
            0 => self.device.features() as u32,
            1 => (self.device.features() >> 32) as u32,
            _ => 0,
        }
    }

    /// The driver selects a word of the accepted features.
    pub fn select_driver_features(&mut self, word: u32) {
        self.state.driver_features_select = word;
    }

    /// The driver accepts features.
    pub fn write_driver_features(&mut self, value: u32) {
        if !self.has(ACKNOWLEDGE | DRIVER) || self.state.status & (FEATURES_OK | FAILED) != 0 {
            guest_warn!(
                "device \"{}\": driver wrote features in status {:#x}, ignored",
                self.device.id(),
                self.state.status
            );
            return;
        }
        let word = self.state.driver_features_select as usize;
        match self.state.driver_features.get_mut(word) {
            Some(features) => *features = value,
            None if value == 0 => {}
            None => guest_warn!(
                "device \"{}\": driver accepted features {value:#x} of word {word}, which has none",
                self.device.id()
            ),
        }
    }

    /// The driver selects a queue.
    pub fn select_queue(&mut self, index: u32) {
        self.state.queue_select = index;
    }

    /// The selected queue, if it exists.
    pub fn queue(&self) -> Option<&QueueState> {
        self.state.queues.get(self.state.queue_select as usize)
    }

    /// The selected queue, if it exists and takes set-up now.
    fn queue_for_setup(&mut self, what: &str) -> Option<&mut QueueState> {
        let (status, select) = (self.state.status, self.state.queue_select);
        let fine = self.takes_queue_setup() && self.queue().is_some_and(|queue| !queue.ready);
        if !fine {
            guest_warn!(
                "device \"{}\": driver wrote {what} of queue {select} in status {status:#x}, ignored",
                self.device.id()
            );
            return None;
        }
        self.state.queues.get_mut(select as usize)
    }

    /// The driver sets the number of entries of the selected queue.
    pub fn write_queue_size(&mut self, value: u32) {
        let id = self.device.id().to_owned();
        let Some(queue) = self.queue_for_setup("the size") else {
            return;
        };
        match u16::try_from(value) {
            Ok(size) if size.is_power_of_two() && size <= queue.max_size => queue.size = size,
            _ => guest_warn!(
                "device \"{id}\": queue size {value} is not a power of two up to {}, ignored",
                queue.max_size
            ),
        }
    }

    /// The driver sets half of an address of the selected queue.
    pub fn write_queue_address(&mut self, area: Area, half: Half, value: u32) {
        let Some(queue) = self.queue_for_setup("an address") else {
            return;
        };
        let address = match area {
            Area::Desc => &mut queue.desc,
            Area::Driver => &mut queue.driver,
            Area::Device => &mut queue.device,
        };
        *address = match half {
            Half::Low => *address & !0xffff_ffff | u64::from(value),
            Half::High => *address & 0xffff_ffff | u64::from(value) << 32,
        };
    }

    /// The driver enables the selected queue (1), or takes that back before `DRIVER_OK` (0).
    pub fn write_queue_ready(&mut self, value: u32) {
        let (id, setup) = (self.device.id().to_owned(), self.takes_queue_setup());
        match value {
            0 => match self.state.queues.get_mut(self.state.queue_select as usize) {
                // Drivers do this on their way out, after a reset.
                Some(queue) if !queue.ready => {}
                Some(queue) if setup => queue.ready = false,
                _ => guest_warn!("device \"{id}\": a running queue stops by a reset only, ignored"),
            },
            1 => {
                let Some(queue) = self.queue_for_setup("ready") else {
                    return;
                };
                // Alignment of virtio 1.3, section 2.7. Whether there is RAM is checked when the device gets the queue.
                if queue.desc % 16 == 0 && queue.driver % 2 == 0 && queue.device % 4 == 0 {
                    queue.ready = true;
                } else {
                    guest_warn!(
                        "device \"{id}\": queue areas are misaligned ({queue:x?}), ignored"
                    );
                }
            }
            _ => guest_warn!("device \"{id}\": queue ready takes 0 or 1, not {value}, ignored"),
        }
    }

    /// The driver rings queue `index` by a register write that no ioeventfd took.
    pub fn notify_queue(&self, index: u32) {
        match self.kicks.get(index as usize) {
            // Full counter: the device is told already.
            Some(kick) if self.is_running() => drop(kick.write(1)),
            _ => guest_warn!(
                "device \"{}\": doorbell of queue {index} in status {:#x}, ignored",
                self.device.id(),
                self.state.status
            ),
        }
    }

    /// Reads configuration space; what lies beyond it is zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = self.device.config();
        let start = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
        for (to, from) in data.iter_mut().zip(&config[start..]) {
            *to = *from;
        }
    }

    /// Writes configuration space. The driver may do so once features are settled (virtio 1.3, section 3.1.1, step 4).
    pub fn write_config(&mut self, offset: u64, data: &[u8], lines: &impl Interrupts) {
        let len = self.device.config().len() as u64;
        let inside = offset
            .checked_add(data.len() as u64)
            .is_some_and(|end| end <= len);
        let allowed = self.has(FEATURES_OK) && self.state.status & (FAILED | NEEDS_RESET) == 0;
        if !inside || !allowed {
            guest_warn!(
                "device \"{}\": driver wrote {} bytes of configuration space at {offset:#x} in status {:#x}, ignored",
                self.device.id(),
                data.len(),
                self.state.status
            );
            return;
        }
        if self.device.is_away() {
            guest_warn!(
                "device \"{}\": driver wrote configuration space while its process restarts, ignored",
                self.device.id()
            );
            return;
        }
        let old = self.device.config().to_vec();
        // `inside` keeps the offset far below 32 bits.
        if let Err(error) = self.device.write_config(offset as u32, data) {
            self.trouble(&error, lines);
        } else if self.device.config() != old {
            self.state.config_generation = self.state.config_generation.wrapping_add(1);
        }
    }
}
