//! The machine in the middle of its work, without its RAM and its virtio devices.
//!
//! **Job.** Reads what KVM and the platform's devices keep, of a paused machine, and writes it into a new one instead of
//! loading a kernel.
//! **Who is not trusted**: whoever made the snapshot. Every value is one that a guest could have brought about, or is
//! refused: KVM checks its own, the devices theirs.
//! **Why this way.** The kernel image is kept all the same: a guest that reboots gets the machine that a fresh start would
//! give it, as ever.

use serde::{Deserialize, Serialize};

use super::{Error, Microvm};
use crate::boot::BootSource;
use crate::kvm::cpuid::CpuidLeaf;
use crate::kvm::snapshot::{SavedVcpu, SavedVm};
use crate::platform::i8042::I8042State;
use crate::platform::rtc::RtcState;
use crate::platform::serial::{SerialPort, SerialRegisters};
use crate::platform::slots::SlotsState;

/// What [`Microvm::save`] reads.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    vm: SavedVm,
    vcpus: Vec<SavedVcpu>,
    serial: Option<SerialRegisters>,
    clock: RtcState,
    keyboard: I8042State,
    /// The power button was pressed and the guest has not looked yet.
    button: bool,
    /// What the guest was told, or is about to be, of windows that came and went.
    slots: SlotsState,
}

#[cfg(any(test, fuzzing))]
impl MachineState {
    /// One vCPU, and devices at power-on.
    pub fn example() -> Self {
        Self {
            vm: SavedVm::example(),
            vcpus: vec![SavedVcpu::example()],
            serial: None,
            clock: crate::platform::rtc::Rtc::default().save(),
            keyboard: I8042State::default(),
            button: false,
            slots: SlotsState::default(),
        }
    }
}

fn lock<T>(device: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic aborts the process, so a poisoned lock cannot be seen.
    device
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Microvm {
    /// What the boot processor says of itself: a snapshot goes on where that is the same.
    #[must_use]
    pub fn processor(&self) -> &[CpuidLeaf] {
        &self.processor
    }

    /// Reads the state of a machine that is paused.
    ///
    /// # Errors
    /// The guest runs, or KVM refuses.
    pub fn save(&self) -> Result<MachineState, Error> {
        let mut vcpus = Vec::new();
        self.vcpus.for_each(|index, vcpu| {
            vcpus.push(SavedVcpu::save(vcpu, index, &self.msrs)?);
            Ok(())
        })?;
        Ok(MachineState {
            vcpus,
            vm: SavedVm::save(&self.vm)?,
            serial: self.serial.as_ref().and_then(SerialPort::save),
            clock: lock(&self.clock).save(),
            keyboard: lock(&self.keyboard).save(),
            button: self.button.is_pressed(),
            slots: self.slots.save(),
        })
    }

    /// Goes on from `state` instead of loading `source`, which is kept for resets. RAM is the caller's to fill. Comes
    /// before [`Microvm::start`], on a machine that was never loaded.
    ///
    /// # Errors
    /// The state does not fit this machine, or KVM refuses a part of it.
    pub fn restore(&mut self, state: &MachineState, source: BootSource) -> Result<(), Error> {
        let misfit = |what| Error::State { what };
        if state.vcpus.len() != self.topology.cpus() as usize {
            return Err(misfit("the vCPUs"));
        }
        match (&mut self.serial, &state.serial) {
            (Some(port), Some(registers)) => {
                if !port.restore(registers) {
                    return Err(misfit("the serial port"));
                }
            }
            (None, None) => {}
            _ => return Err(misfit("the serial port")),
        }
        lock(&self.clock).restore(&state.clock);
        lock(&self.keyboard).restore(&state.keyboard);
        self.slots.restore(&state.slots);
        self.vcpus
            .for_each(|index, vcpu| match state.vcpus.get(index as usize) {
                Some(saved) => saved.restore(vcpu, index),
                None => Ok(()),
            })?;
        // Last: the I/O interrupt controller delivers what waits in it, to local ones that are as they were.
        state.vm.restore(&self.vm)?;
        if state.button {
            self.button.press().map_err(Error::PowerButton)?;
        }
        // This guest is another one than any that goes on from the same snapshot.
        self.write_generation()?;
        self.generation.changed().map_err(Error::Generation)?;
        self.boot = Some(source);
        Ok(())
    }
}
