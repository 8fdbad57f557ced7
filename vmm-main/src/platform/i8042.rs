//! The keyboard controller: ports 0x60 and 0x64.
//!
//! Job: the reset command that kernels fall back to (`reboot=k`), and enough answers that a kernel which probes for a
//! controller finds one without keyboard and mouse and goes on.
//! Who is not trusted: the guest; each command changes a few bits here and at most one byte is pending.
//! Why this way: with ACPI a stock kernel learns from the FADT that there is no keyboard controller and never looks.
//! Without ACPI it probes; a controller that swallows commands costs it a time-out for each.

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::power::PowerControl;
use crate::machine::bus::BusDevice;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Status bits: output buffer full, last write was a command, keyboard not inhibited, byte is the mouse's, time-out.
const STATUS_FULL: u8 = 0x01;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_MOUSE: u8 = 0x20;
const STATUS_TIMEOUT: u8 = 0x40;

/// Control register: keyboard interrupt, mouse interrupt.
const CONTROL_KEYBOARD_INTERRUPT: u8 = 0x01;
/// Control register at power-on: system flag, both ports off.
const CONTROL_DEFAULT: u8 = 0x34;

/// What a keyboard that is not there "answers": resend, with the time-out bit.
const NO_DEVICE: u8 = 0xFE;
const SELF_TEST_PASSED: u8 = 0x55;
/// Result of the keyboard port's test: clock line stuck low, that is, nothing works there.
const PORT_DEAD: u8 = 0x01;

/// What the next write to the data port means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
enum Pending {
    #[default]
    Device,
    Control,
    Output,
    /// The byte comes back as if the keyboard (or the mouse) had sent it.
    Loop(u8),
}

/// The controller in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct I8042State {
    control: u8,
    output: u8,
    status: u8,
    buffer: u8,
    pending: Pending,
}

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    power: PowerControl,
    line: EventFd,
    control: u8,
    output: u8,
    status: u8,
    buffer: u8,
    pending: Pending,
}

impl I8042 {
    /// A controller that raises `line` (an irqfd on line 1) and resets through `power`.
    #[must_use]
    pub fn new(power: PowerControl, line: EventFd) -> Self {
        Self {
            power,
            line,
            control: CONTROL_DEFAULT,
            output: 0x03,
            status: STATUS_UNLOCKED,
            buffer: 0,
            pending: Pending::Device,
        }
    }

    pub(crate) fn save(&self) -> I8042State {
        I8042State {
            control: self.control,
            output: self.output,
            status: self.status,
            buffer: self.buffer,
            pending: self.pending,
        }
    }

    /// Goes on from a snapshot; any byte in any register is one that a guest can have put there.
    pub(crate) fn restore(&mut self, state: &I8042State) {
        self.control = state.control;
        self.output = state.output;
        self.status = state.status;
        self.buffer = state.buffer;
        self.pending = state.pending;
    }

    fn answer(&mut self, byte: u8, flags: u8) {
        self.buffer = byte;
        self.status = (self.status & STATUS_COMMAND) | STATUS_UNLOCKED | STATUS_FULL | flags;
    }

    fn command(&mut self, command: u8) {
        self.status |= STATUS_COMMAND;
        self.pending = Pending::Device;
        match command {
            0x20 => self.answer(self.control, 0),
            0x60 => self.pending = Pending::Control,
            0xA7 => self.control |= 0x20,
            0xA8 => self.control &= !0x20,
            0xA9 | 0xAB => self.answer(PORT_DEAD, 0),
            0xAA => self.answer(SELF_TEST_PASSED, 0),
            0xAD => self.control |= 0x10,
            0xAE => self.control &= !0x10,
            0xD0 => self.answer(self.output, 0),
            0xD1 => self.pending = Pending::Output,
            0xD2 => self.pending = Pending::Loop(0),
            0xD3 => self.pending = Pending::Loop(STATUS_MOUSE),
            // Pulse output line 0, which is the processor's reset pin.
            0xFE => self.power.reset(),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        self.status &= !STATUS_COMMAND;
        match std::mem::replace(&mut self.pending, Pending::Device) {
            Pending::Control => self.control = byte,
            Pending::Output => {
                self.output = byte;
                // Line 0 low holds the processor in reset.
                if byte & 1 == 0 {
                    self.power.reset();
                }
            }
            Pending::Loop(flags) => self.answer(byte, flags),
            Pending::Device => {
                self.answer(NO_DEVICE, STATUS_TIMEOUT);
                if self.control & CONTROL_KEYBOARD_INTERRUPT != 0 {
                    // Fails only when the line is raised already.
                    let _ = self.line.write(1);
                }
            }
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            DATA => {
                self.status &= !(STATUS_FULL | STATUS_MOUSE | STATUS_TIMEOUT);
                self.buffer
            }
            COMMAND => self.status,
            _ => 0xFF,
        };
        data.fill(0xFF);
        if let Some(byte) = data.first_mut() {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (DATA, [byte, ..]) => self.data(*byte),
            (COMMAND, [byte, ..]) => self.command(*byte),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.control = CONTROL_DEFAULT;
        self.output = 0x03;
        self.status = STATUS_UNLOCKED;
        self.buffer = 0;
        self.pending = Pending::Device;
    }
}

#[cfg(test)]
mod tests {
    use super::super::power::tests::power;
    use super::*;
    use crate::machine::events::VmEvent;

    fn read(device: &mut I8042, offset: u64) -> u8 {
        let mut byte = [0];
        device.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn reset_command_asks_for_a_reset_once() {
        let (power, events) = power();
        let mut device = I8042::new(power, EventFd::new(libc::EFD_NONBLOCK).unwrap());
        assert_eq!(
            read(&mut device, COMMAND) & 0x02,
            0,
            "never busy: kernels wait for that before the command"
        );
        device.write(COMMAND, &[0xFE]);
        assert!(matches!(events.try_recv(), Some(VmEvent::Reset)));
        assert!(events.try_recv().is_none());
    }

    #[test]
    fn a_probing_kernel_gets_an_answer_to_each_step() {
        let (power, _events) = power();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut device = I8042::new(power, line.try_clone().unwrap());
        device.write(COMMAND, &[0xAA]);
        assert_eq!(read(&mut device, DATA), SELF_TEST_PASSED);
        device.write(COMMAND, &[0x60]);
        device.write(DATA, &[0x45]);
        device.write(COMMAND, &[0x20]);
        assert_eq!(read(&mut device, COMMAND) & STATUS_FULL, STATUS_FULL);
        assert_eq!(read(&mut device, DATA), 0x45);
        assert_eq!(read(&mut device, COMMAND) & STATUS_FULL, 0);
        device.write(DATA, &[0xF2]); // identify
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(
            read(&mut device, COMMAND) & (STATUS_FULL | STATUS_TIMEOUT),
            STATUS_FULL | STATUS_TIMEOUT
        );
        assert_eq!(read(&mut device, DATA), NO_DEVICE);
    }
}
