//! Power ports: sleep, reset and the power button.
//!
//! Job: the registers that the hardware-reduced FADT points to (ACPI 6.5, 4.8.3.7 and 4.8.3.6) and the event status
//! that the generic event device's method reads (ACPI 6.5, 5.6.9).
//! Who is not trusted: the guest; all it can do here is to end or reset itself.
//! Why this way: writing the sleep control register is how every ACPI kernel powers off without a power-management
//! chip. The event is sent by the write itself, and the vCPU does not return to the guest afterwards.
//!
//! | port | register | access |
//! |---|---|---|
//! | 0x600 | sleep control | bits 2..4 type, bit 5 enable; type 5 powers off |
//! | 0x601 | sleep status | reads 0 |
//! | 0x602 | reset | write 1: reset |
//! | 0x603 | event status | bit 0 power button; cleared by reading |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::kvm::run::Gate;
use crate::machine::bus::BusDevice;
use crate::machine::events::{EventSender, VmEvent};

/// Offsets of the registers.
pub const SLEEP_CONTROL: u64 = 0;
/// Sleep status.
pub const SLEEP_STATUS: u64 = 1;
/// Reset.
pub const RESET: u64 = 2;
/// Event status.
pub const EVENT_STATUS: u64 = 3;

/// What a guest writes to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of the soft-off state, as `_S5` tells it.
pub const SLEEP_TYPE_S5: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;
/// Event status: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;

/// Real-mode code for the reset vector: write [`RESET_VALUE`] to the reset port, then halt for good.
///
/// A Linux kernel that finds a hardware-reduced FADT takes for granted that EFI can reset the machine
/// (`efi_reboot_required`). Without EFI it falls back to the oldest way there is, a jump to the BIOS's reset vector, and
/// never tries the FADT's reset register. So the vector must lead there.
#[must_use]
pub fn reset_vector() -> [u8; 9] {
    let [low, high] = (crate::machine::layout::POWER_PORT + RESET as u16).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    [0xBA, low, high, 0xB0, RESET_VALUE, 0xEE, 0xF4, 0xEB, 0xFD]
}

/// Lets a device end or reset the guest: sends the event and keeps the vCPUs from running on.
#[derive(Debug, Clone)]
pub struct PowerControl {
    gate: Arc<Gate>,
    events: EventSender,
}

impl PowerControl {
    /// Power control over the vCPUs behind `gate`.
    #[must_use]
    pub fn new(gate: Arc<Gate>, events: EventSender) -> Self {
        Self { gate, events }
    }

    /// The guest powered off.
    pub fn shutdown(&self) {
        self.gate.close();
        self.events.send(VmEvent::Shutdown);
    }

    /// The guest asked for a reset.
    pub fn reset(&self) {
        self.gate.close();
        self.events.send(VmEvent::Reset);
    }
}

/// The machine's power button.
#[derive(Debug, Clone)]
pub struct PowerButton {
    pressed: Arc<AtomicBool>,
    line: Arc<EventFd>,
}

impl PowerButton {
    /// A button that raises `line`, an irqfd on the generic event device's line.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self {
            pressed: Arc::new(AtomicBool::new(false)),
            line: Arc::new(line),
        }
    }

    /// Whether it was pressed and the guest has not looked yet.
    pub(crate) fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::SeqCst)
    }

    /// Presses it.
    ///
    /// # Errors
    /// The line's eventfd cannot be written.
    pub fn press(&self) -> std::io::Result<()> {
        self.pressed.store(true, Ordering::SeqCst);
        self.line.write(1)
    }
}

/// The power ports.
#[derive(Debug)]
pub struct PowerPorts {
    control: PowerControl,
    button: PowerButton,
}

impl PowerPorts {
    /// The ports.
    #[must_use]
    pub fn new(control: PowerControl, button: PowerButton) -> Self {
        Self { control, button }
    }
}

impl BusDevice for PowerPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (EVENT_STATUS, [byte]) = (offset, data) {
            *byte =
                u8::from(self.button.pressed.swap(false, Ordering::SeqCst)) * EVENT_POWER_BUTTON;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, [byte]) => {
                let kind = byte >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if byte & SLEEP_ENABLE != 0 && kind == SLEEP_TYPE_S5 {
                    self.control.shutdown();
                }
            }
            (RESET, [RESET_VALUE]) => self.control.reset(),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.button.pressed.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::kvm::VcpuThreads;
    use crate::machine::events::{EventReceiver, channel};

    pub(crate) fn power() -> (PowerControl, EventReceiver) {
        let (sender, receiver) = channel().unwrap();
        (
            PowerControl::new(VcpuThreads::new(Vec::new()).gate(), sender),
            receiver,
        )
    }

    #[test]
    fn soft_off_ends_the_guest_and_nothing_else_does() {
        let (control, events) = power();
        let mut ports = PowerPorts::new(control, PowerButton::new(EventFd::new(0).unwrap()));
        for value in [0, SLEEP_ENABLE, SLEEP_TYPE_S5 << 2, SLEEP_ENABLE | (3 << 2)] {
            ports.write(SLEEP_CONTROL, &[value]);
        }
        ports.write(SLEEP_CONTROL, &[SLEEP_ENABLE | (SLEEP_TYPE_S5 << 2), 0]);
        assert!(events.try_recv().is_none());
        ports.write(SLEEP_CONTROL, &[SLEEP_ENABLE | (SLEEP_TYPE_S5 << 2)]);
        assert!(matches!(events.try_recv(), Some(VmEvent::Shutdown)));
        ports.write(RESET, &[0]);
        assert!(events.try_recv().is_none());
        ports.write(RESET, &[RESET_VALUE]);
        assert!(matches!(events.try_recv(), Some(VmEvent::Reset)));
    }

    #[test]
    fn reset_vector_fits_its_place_and_writes_the_reset_port() {
        use crate::machine::layout;
        let code = reset_vector();
        assert!(layout::RESET_VECTOR + code.len() as u64 <= layout::HIGH_MEMORY_START);
        assert_eq!(code[..3], [0xBA, 0x02, 0x06], "mov dx, 0x602");
        assert_eq!(
            code[3..6],
            [0xB0, RESET_VALUE, 0xEE],
            "mov al, 1; out dx, al"
        );
        assert_eq!(
            code[6..],
            [0xF4, 0xEB, (-3i8).cast_unsigned()],
            "hlt; jmp to it"
        );
    }

    #[test]
    fn button_raises_its_line_and_is_read_once() {
        let (control, _events) = power();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let button = PowerButton::new(line.try_clone().unwrap());
        let mut ports = PowerPorts::new(control, button.clone());
        let mut status = || {
            let mut byte = [0xAA];
            ports.read(EVENT_STATUS, &mut byte);
            byte[0]
        };
        assert_eq!(status(), 0);
        button.press().unwrap();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!((status(), status()), (EVENT_POWER_BUTTON, 0));
    }
}
