//! # Bare guests
//!
//! **Job.** The paths of the programs in `payloads/`, which this crate's build script compiles.
//! **Who is not trusted.** They are guests: what they print is evidence about the VMM, not about themselves.
//! **Why this way.** A guest of a few thousand instructions runs on any `/dev/kvm`, also where Linux cannot.

use std::path::PathBuf;

/// One bare guest; `payloads/README.md` says what each does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// One byte on the serial port, a line, the end.
    Hello,
    /// One byte on the serial port, then sleep.
    FirstByte,
    /// Prints what each virtio-mmio window says.
    VirtioProbe,
    /// Writes, flushes, reads and compares sectors.
    BlkRw,
    /// Writes a dot again and again, keeps as much memory as it was told, and looks whether other memory is zero.
    Restored,
    /// Writes, reads and compares without a pause.
    BlkLoop,
    /// Sends ARP requests without a pause.
    NetLoop,
    /// Sends an ARP request and waits for the answer.
    NetTx,
    /// Prints what the boot protocol passed.
    Machine,
    /// Starts one device and sleeps.
    StartDevice,
    /// Has a file of a shared folder put into its memory, and taken away.
    Dax,
    /// Misuses a device or the board in every way there is.
    Hostile,
}

/// What [`Payload::FirstByte`] writes.
pub const FIRST_BYTE: u8 = 0xaa;

impl Payload {
    /// The ELF file.
    #[must_use]
    pub fn path(self) -> PathBuf {
        let name = match self {
            Self::Hello => "hello",
            Self::FirstByte => "first-byte",
            Self::VirtioProbe => "virtio-probe",
            Self::Restored => "restored",
            Self::BlkRw => "blk-rw",
            Self::BlkLoop => "blk-loop",
            Self::NetLoop => "net-loop",
            Self::NetTx => "net-tx",
            Self::Machine => "machine",
            Self::StartDevice => "start-device",
            Self::Dax => "dax",
            Self::Hostile => "hostile",
        };
        PathBuf::from(concat!(env!("OUT_DIR"), "/")).join(name)
    }
}
