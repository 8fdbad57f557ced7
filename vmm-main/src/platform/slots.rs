//! Hot-plug registers: which windows got a device while the guest runs, and which are to lose theirs.
//!
//! Job: the ports that the ACPI methods of the slots read (see `platform::acpi`), and the line that makes the guest read
//! them: the generic event device's, shared with the power button.
//! Who is not trusted: the guest. All it can do here is to forget what it was told.
//! Why this way: a stock kernel scans a container device (`ACPI0004`, ACPI 6.5, 9.11) and what is below it when a Device
//! Check names it, without any agent. So each free window is the child of a container of its own, and both are absent
//! until a device is there. The kernel's answer to an eject request for a container is to ask its user space (an
//! `EVENT=offline` uevent); whether anybody listens there is up to the guest, and nothing here waits for it.
//!
//! | port | register, 16 bits, one a window | access |
//! |---|---|---|
//! | 0x610 | present | read |
//! | 0x612 | plugged since the last read | read, clears |
//! | 0x614 | to be ejected since the last read | read, clears |
//! | 0x616 | ejected | write 1: not present any more |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::bus::BusDevice;

/// Offset of the register "present".
pub const PRESENT: u64 = 0;
/// Offset of the register "plugged".
pub const PLUGGED: u64 = 2;
/// Offset of the register "to be ejected".
pub const EJECT: u64 = 4;
/// Offset of the register "ejected".
pub const EJECTED: u64 = 6;

/// The registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotsState {
    present: u16,
    plugged: u16,
    eject: u16,
}

/// The slots, shared between the main loop and the ports.
#[derive(Debug, Clone)]
pub struct Slots {
    state: Arc<Mutex<SlotsState>>,
    line: Arc<EventFd>,
}

impl Slots {
    /// Empty slots, with `line`, an irqfd on the generic event device's line.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self {
            state: Arc::new(Mutex::new(SlotsState::default())),
            line: Arc::new(line),
        }
    }

    // A panic aborts the process, so a poisoned lock cannot be seen.
    fn state(&self) -> MutexGuard<'_, SlotsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the guest that window `slot` has a device now.
    ///
    /// # Errors
    /// The line's eventfd cannot be written.
    pub fn plug(&self, slot: u8) -> std::io::Result<()> {
        let bit = bit(slot);
        let mut state = self.state();
        state.present |= bit;
        state.plugged |= bit;
        state.eject &= !bit;
        drop(state);
        self.line.write(1)
    }

    /// What the registers hold, for a snapshot.
    #[must_use]
    pub fn save(&self) -> SlotsState {
        self.state().clone()
    }

    /// Takes what a snapshot holds. Any value is one that there can be; it says only what the guest was told.
    pub fn restore(&self, saved: &SlotsState) {
        *self.state() = saved.clone();
    }

    /// Asks the guest to let go of window `slot`.
    ///
    /// # Errors
    /// The line's eventfd cannot be written.
    pub fn eject(&self, slot: u8) -> std::io::Result<()> {
        let bit = bit(slot);
        let mut state = self.state();
        if state.present & bit == 0 {
            return Ok(());
        }
        state.plugged &= !bit;
        state.eject |= bit;
        drop(state);
        self.line.write(1)
    }
}

fn bit(slot: u8) -> u16 {
    1u16.checked_shl(slot.into()).unwrap_or(0)
}

impl BusDevice for Slots {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut state = self.state();
        let value = match (offset, data.len()) {
            (PRESENT, 2) => state.present,
            (PLUGGED, 2) => std::mem::take(&mut state.plugged),
            (EJECT, 2) => std::mem::take(&mut state.eject),
            _ => return,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (EJECTED, Ok(bytes)) = (offset, <[u8; 2]>::try_from(data)) {
            let gone = u16::from_le_bytes(bytes);
            let mut state = self.state();
            state.present &= !gone;
            state.eject &= !gone;
        }
    }

    fn reset(&mut self) {
        *self.state() = SlotsState::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_learns_of_each_change_once() {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let slots = Slots::new(line.try_clone().unwrap());
        let mut ports = slots.clone();
        let mut read = |offset| {
            let mut word = [0xAA; 2];
            ports.read(offset, &mut word);
            u16::from_le_bytes(word)
        };
        slots.eject(3).unwrap();
        assert!(line.read().is_err(), "there is nothing to eject");
        slots.plug(3).unwrap();
        slots.plug(0).unwrap();
        assert_eq!(line.read().unwrap(), 2);
        assert_eq!(
            (read(PRESENT), read(PLUGGED), read(PLUGGED)),
            (0b1001, 0b1001, 0)
        );
        slots.eject(3).unwrap();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!((read(EJECT), read(EJECT), read(PRESENT)), (8, 0, 0b1001));
        let mut ports = slots.clone();
        ports.write(EJECTED, &[8, 0, 0, 0]);
        let mut word = [0; 2];
        ports.read(PRESENT, &mut word);
        assert_eq!(word, [0b1001, 0], "32 bits are no register");
        ports.write(EJECTED, &[8, 0]);
        ports.read(PRESENT, &mut word);
        assert_eq!(word, [1, 0]);
        ports.reset();
        ports.read(PRESENT, &mut word);
        assert_eq!(word, [0, 0]);
    }
}
