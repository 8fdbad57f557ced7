//! The few devices that stay in the control process, and the tables that describe the machine.
//!
//! Job: serial port, keyboard controller, real-time clock and power ports, each a handful of registers; ACPI and MP
//! tables.
//! Who is not trusted: the guest, which reads and writes every register in any order and size.
//! Why this way: a register that needs no host resource gains nothing from a process of its own; what these devices
//! reach is one eventfd each, plus the serial port's byte sink, which never blocks.

pub mod acpi;
pub mod generation;
pub mod i8042;
pub mod mptable;
pub mod numa;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod slots;
