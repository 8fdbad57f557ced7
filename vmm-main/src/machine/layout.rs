//! The guest-physical address map and the interrupt lines of the x86_64 machines.
//!
//! Job: the one place that says which address or line means what; every table that describes the machine to the
//! guest (e820, PVH memory map, ACPI, MP table, kernel parameters) is computed from these values.
//! Who is not trusted: nothing here comes from outside.
//! Why this way: two tables that name the same device can only disagree if the number exists twice.
//!
//! ```text
//! 0x0000_0000  RAM: boot page (GDT), zero page or PVH info, page tables, command line (below 640 KiB)
//! 0x0009_fc00  reserved; 0xe_0000 RSDP and ACPI tables, 0xe_f000 generation id, 0xf_0000 MP table, 0xf_fff0 reset vector
//! 0x0010_0000  RAM: kernel upwards, initrd downwards from the end of low RAM
//! 0xc000_0000  hole: 0xd000_0000 virtio-mmio windows, 0xfec0_0000 IOAPIC, 0xfee0_0000 LAPIC, 0xfffb_c000 KVM
//! 0x1_0000_0000  rest of the RAM, then, from a multiple of 1 GiB on, windows of shared folders
//! ```

/// First address above low RAM: RAM never reaches into the hole from here to 4 GiB.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where RAM goes on when it does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Where the first window of a shared folder begins in a guest whose RAM ends at `end`: above it and the hole, at a multiple of 1 GiB.
#[must_use]
pub const fn first_window(end: u64) -> u64 {
    let above = if end < HIGH_RAM_START {
        HIGH_RAM_START
    } else {
        end
    };
    // RAM is never as much as to overflow.
    above.next_multiple_of(1 << 30)
}

/// GDT of the boot processor (5 descriptors).
pub const BOOT_GDT: u64 = 0x500;
/// An empty IDT of the boot processor.
pub const BOOT_IDT: u64 = 0x540;
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// The only entry of PVH's module list: the initrd.
pub const PVH_MODULES: u64 = 0x6080;
/// PVH's memory map.
pub const PVH_MEMORY_MAP: u64 = 0x60C0;
/// `boot_params` ("zero page") of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack of the 64-bit entry, growing down into the page above the zero page.
pub const BOOT_STACK: u64 = 0x8FF0;
/// Root page table of the 64-bit entry; its three lower tables follow, one page each.
pub const BOOT_PML4: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// End of the RAM below 1 MiB that the guest may use: the last KiB of the 640 is the classic EBDA.
pub const BASE_MEMORY_END: u64 = 0x9_FC00;
/// RSDP; the other ACPI tables follow it.
pub const ACPI_RSDP: u64 = 0xE_0000;
/// The VM's generation id, 16 bytes in a page of which nothing else is in use, as its standard asks.
pub const GENERATION_ID: u64 = 0xE_F000;
/// End of the window for ACPI tables.
pub const ACPI_END: u64 = GENERATION_ID;
/// MP floating pointer; the MP configuration table follows it.
pub const MP_TABLE: u64 = 0xF_0000;
/// Where a processor in real mode starts after a reset: 16 bytes.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// Start of the RAM above 1 MiB. No part of a kernel may lie below.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// First virtio-mmio window.
pub const VIRTIO_MMIO_BASE: u64 = 0xD000_0000;
/// Size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt lines of the virtio-mmio windows, in order of their number.
///
/// The eight IOAPIC-only inputs come first. The other three are ISA lines that no device of this machine or driver
/// of a stock kernel claims (0 PIT, 1 keyboard, 2 cascade, 3 and 4 serial, 6 floppy, 7 parallel port and spurious
/// interrupt of the PIC, 8 RTC, 9 [`GED_GSI`], 12 mouse, 13 [`GENERATION_GSI`], 14 and 15 IDE are left alone).
pub const VIRTIO_MMIO_GSIS: [u32; 11] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 10, 11];

/// IOAPIC (fixed by KVM).
pub const IOAPIC: u32 = 0xFEC0_0000;
/// Inputs of the IOAPIC (fixed by KVM).
pub const IOAPIC_PINS: u8 = 24;
/// Local APIC (fixed by KVM at reset).
pub const LAPIC: u32 = 0xFEE0_0000;
/// One page that KVM uses on Intel hosts without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages that KVM uses on Intel hosts without unrestricted guests.
pub const KVM_TSS: usize = 0xFFFB_D000;

/// Port range and line of the first serial port.
pub const SERIAL_PORT: u16 = 0x3F8;
/// Number of ports of a 16550.
pub const SERIAL_PORTS: u16 = 8;
/// Line of the first serial port.
pub const SERIAL_GSI: u32 = 4;
/// First port of the keyboard controller (0x60 data, 0x64 command; 0x61 is KVM's speaker).
pub const I8042_PORT: u16 = 0x60;
/// Number of ports from the first to the last of the keyboard controller.
pub const I8042_PORTS: u16 = 5;
/// Line of the keyboard.
pub const I8042_GSI: u32 = 1;
/// Index port of the CMOS real-time clock; the data port follows.
pub const RTC_PORT: u16 = 0x70;
/// Number of ports of the CMOS real-time clock.
pub const RTC_PORTS: u16 = 2;
/// Sleep control, sleep status, reset and event status: see `platform::power`.
pub const POWER_PORT: u16 = 0x600;
/// Number of ports of the power block.
pub const POWER_PORTS: u16 = 4;
/// Hot-plug registers: see `platform::slots`.
pub const SLOT_PORT: u16 = 0x610;
/// Number of ports of the hot-plug registers.
pub const SLOT_PORTS: u16 = 8;
/// Line of the generic event device (power button, hot-plug).
pub const GED_GSI: u32 = 9;

/// Line that tells of a new generation id: once the FPU's, which no driver of a stock kernel claims.
pub const GENERATION_GSI: u32 = 13;

/// Most vCPUs of a machine: APIC ids are 8 bits, 255 is the broadcast, and the IOAPIC takes one more.
pub const MAX_VCPUS: u32 = 254;
