//! Loading a kernel the way a boot loader does.
//!
//! Job: put an ELF or bzImage kernel, its initrd, its command line and the description of RAM into guest RAM, and tell
//! which registers to start with.
//! Who is not trusted: the files come from the user, but may be anything; formats are recognised and every range is
//! checked against the RAM before a byte is read into it.
//! Why this way: files are read straight into guest RAM, and are kept open, so that a reset loads them again. Nothing
//! is written to the guest that it does not need for its protocol.

pub mod cmdline;
mod initrd;
mod kernel;
mod params;

use std::fs::File;

use vm_memory::{Bytes, GuestAddress};

pub use kernel::KernelFormat;

use crate::kvm::BootRegisters;
use crate::machine::layout;
use crate::memory::GuestRam;

/// What can go wrong with loading a kernel.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the message of each variant says all there is to say
pub enum Error {
    #[error("cannot read the kernel")]
    ReadKernel(#[source] std::io::Error),
    #[error("the kernel is {0}; x86_64 machines boot an ELF vmlinux or a bzImage")]
    Format(&'static str),
    #[error("the kernel is truncated: {what} ends at byte {end}, the file has {length} bytes")]
    Truncated {
        what: &'static str,
        end: u64,
        length: u64,
    },
    #[error("the kernel's {what} is not valid: {value:#x}")]
    Invalid { what: &'static str, value: u64 },
    #[error(
        "the kernel occupies guest addresses {start:#x} to {end:#x}, free RAM is {} to {ram_end:#x}: give the guest more memory or use another kernel",
        format_args!("{:#x}", layout::HIGH_MEMORY_START)
    )]
    KernelRange { start: u64, end: u64, ram_end: u64 },
    #[error("cannot load the kernel")]
    Load(#[source] linux_loader::loader::Error),
    #[error("the kernel has no {0} entry point")]
    NoEntry(&'static str),
    #[error("cannot read the initrd")]
    ReadInitrd(#[source] std::io::Error),
    #[error("the initrd is empty")]
    EmptyInitrd,
    #[error(
        "the initrd of {size} bytes does not fit between the kernel's end at {kernel_end:#x} and {limit:#x}: give the guest more memory"
    )]
    InitrdRange {
        size: u64,
        kernel_end: u64,
        limit: u64,
    },
    #[error(
        "the kernel command line has {length} bytes ({added} of them added for devices), this kernel takes at most {max}"
    )]
    CommandLine {
        length: usize,
        added: usize,
        max: usize,
    },
    #[error("the kernel command line contains a NUL byte at position {0}")]
    CommandLineNul(usize),
    #[error("cannot write {what} to guest RAM")]
    Write {
        what: &'static str,
        source: vm_memory::GuestMemoryError,
    },
}

/// Which entry point to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Protocol {
    /// PVH if an ELF kernel has its note, else the 64-bit entry.
    #[default]
    Auto,
    /// The 64-bit entry of the Linux boot protocol.
    Linux64,
    /// The PVH entry of an ELF kernel.
    Pvh,
}

/// What to boot. The files stay open for resets.
#[derive(Debug)]
pub struct BootSource {
    /// The kernel: ELF vmlinux or bzImage; a regular file, open for reading.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The user's command line.
    pub cmdline: String,
    /// Which entry point to use.
    pub protocol: Protocol,
}

/// A kernel in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// What the boot processor starts with.
    pub registers: BootRegisters,
    /// What the file was.
    pub format: KernelFormat,
    /// First byte after the kernel, its zero-initialised data included.
    pub kernel_end: u64,
    /// Address and size of the initrd.
    pub initrd: Option<(u64, u64)>,
}

/// Loads the kernel with `device_parameters` added to its command line.
///
/// # Errors
/// See [`Error`]; the guest's RAM is then in no defined state.
pub fn load(
    ram: &GuestRam,
    source: &mut BootSource,
    device_parameters: &[String],
) -> Result<Loaded, Error> {
    let kernel = kernel::load(ram, &mut source.kernel, source.protocol)?;
    let line = cmdline::compose(&source.cmdline, device_parameters, kernel.cmdline_max())?;
    write(ram, &line, layout::COMMAND_LINE, "the kernel command line")?;
    let initrd = match &mut source.initrd {
        Some(file) => Some(initrd::load(ram, file, kernel.end, kernel.initrd_limit())?),
        None => None,
    };
    let registers = params::write_params(ram, &kernel, initrd, line.len() - 1)?;
    for (index, descriptor) in (0u64..).zip(registers.gdt()) {
        write(
            ram,
            &descriptor.to_le_bytes(),
            layout::BOOT_GDT + 8 * index,
            "the boot GDT",
        )?;
    }
    Ok(Loaded {
        registers,
        format: kernel.format,
        kernel_end: kernel.end,
        initrd,
    })
}

fn write(ram: &GuestRam, bytes: &[u8], address: u64, what: &'static str) -> Result<(), Error> {
    ram.memory()
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| Error::Write { what, source })
}

/// One entry of the memory map that the guest gets, whatever its protocol calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// 1 RAM, 2 reserved: the same numbers in e820 (ACPI 6.5, table 15.11) and PVH.
    pub kind: u32,
}

const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

/// The memory map of a guest with `size` bytes of RAM.
#[must_use]
pub fn memory_map(size: u64) -> Vec<MemoryMapEntry> {
    let entry = |address, end: u64, kind| MemoryMapEntry {
        address,
        size: end - address,
        kind,
    };
    let mut map = vec![
        entry(0, layout::BASE_MEMORY_END, MAP_RAM),
        // EBDA, ACPI and MP tables. Plain "reserved": kernels map ACPI tables from there and never reclaim them.
        entry(
            layout::BASE_MEMORY_END,
            layout::HIGH_MEMORY_START,
            MAP_RESERVED,
        ),
        entry(
            layout::HIGH_MEMORY_START,
            size.min(layout::LOW_RAM_END),
            MAP_RAM,
        ),
    ];
    if size > layout::LOW_RAM_END {
        let high = size - layout::LOW_RAM_END;
        map.push(entry(
            layout::HIGH_RAM_START,
            layout::HIGH_RAM_START + high,
            MAP_RAM,
        ));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_of_a_small_guest() {
        let map = memory_map(128 << 20);
        assert_eq!(map.len(), 3);
        assert_eq!(
            map[0],
            MemoryMapEntry {
                address: 0,
                size: 0x9_FC00,
                kind: 1
            }
        );
        assert_eq!(
            map[1],
            MemoryMapEntry {
                address: 0x9_FC00,
                size: 0x6_0400,
                kind: 2
            }
        );
        assert_eq!(
            map[2],
            MemoryMapEntry {
                address: 0x10_0000,
                size: (128 << 20) - 0x10_0000,
                kind: 1
            }
        );
    }

    #[test]
    fn memory_map_leaves_the_hole_out() {
        let map = memory_map(8 << 30);
        let ram: u64 = map.iter().filter(|e| e.kind == 1).map(|e| e.size).sum();
        assert_eq!(ram, (8 << 30) - 0x6_0400);
        assert_eq!(map[2].address + map[2].size, layout::LOW_RAM_END);
        assert_eq!(
            map[3],
            MemoryMapEntry {
                address: 1 << 32,
                size: 5 << 30,
                kind: 1
            }
        );
        assert!(
            map.windows(2)
                .all(|pair| pair[0].address + pair[0].size <= pair[1].address)
        );
    }
}
