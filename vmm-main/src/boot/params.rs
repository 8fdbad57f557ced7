//! What the kernel is told: the zero page or PVH's start info, and the page tables of the 64-bit entry.
//!
//! Job: write the structures of the chosen protocol to guest RAM and return the registers that point to them.
//! Who is not trusted: nobody; all values were checked before.
//! Why this way: one protocol's structures are written, not both, since each touched page costs a fault at start-up.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::kernel::{Entry, Kernel};
use super::{Error, memory_map, write};
use crate::kvm::BootRegisters;
use crate::machine::layout;
use crate::memory::GuestRam;

/// A boot loader without a number of its own (boot.rst, `type_of_loader`).
const LOADER_UNDEFINED: u8 = 0xFF;
const BOOT_FLAG: u16 = 0xAA55;
const SETUP_MAGIC: u32 = 0x5372_6448;

/// Page-table entry bits: present, writable; and 2 MiB page.
const PTE_TABLE: u64 = 0x03;
const PTE_LARGE: u64 = 0x83;
const GIB: u64 = 1 << 30;

/// Writes the structures; `cmdline_length` is without the NUL.
pub(super) fn write_params(
    ram: &GuestRam,
    kernel: &Kernel,
    initrd: Option<(u64, u64)>,
    cmdline_length: usize,
) -> Result<BootRegisters, Error> {
    match kernel.entry {
        Entry::Linux64(entry) => {
            write(
                ram,
                zero_page(ram.size(), kernel, initrd, cmdline_length).as_slice(),
                layout::ZERO_PAGE,
                "the zero page",
            )?;
            write_page_tables(ram)?;
            Ok(BootRegisters::Linux64 {
                entry,
                zero_page: layout::ZERO_PAGE,
                stack: layout::BOOT_STACK,
                page_table: layout::BOOT_PML4,
            })
        }
        Entry::Pvh(entry) => {
            write_start_info(ram, initrd)?;
            Ok(BootRegisters::Pvh {
                entry,
                start_info: layout::PVH_START_INFO,
            })
        }
    }
}

/// Address of the initrd as the 32-bit fields of both structures hold it: it lies below the hole, hence below 4 GiB.
fn low_32(value: u64) -> u32 {
    debug_assert!(value <= u64::from(u32::MAX));
    (value & u64::from(u32::MAX)) as u32
}

fn zero_page(
    ram_size: u64,
    kernel: &Kernel,
    initrd: Option<(u64, u64)>,
    cmdline_length: usize,
) -> boot_params {
    let mut params = boot_params::default();
    if let Some(header) = kernel.header {
        params.hdr = header;
    } else {
        // An ELF kernel has no setup header; these fields are what its 64-bit entry checks.
        params.hdr.header = SETUP_MAGIC;
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low_32(layout::COMMAND_LINE);
    params.hdr.cmdline_size = low_32(cmdline_length as u64);
    if let Some((address, size)) = initrd {
        params.hdr.ramdisk_image = low_32(address);
        params.hdr.ramdisk_size = low_32(size);
    }
    params.acpi_rsdp_addr = layout::ACPI_RSDP;
    let map = memory_map(ram_size);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.address,
            size: entry.size,
            r#type: entry.kind,
        };
    }
    params.e820_entries = map.len() as u8; // four at most
    params
}

fn write_start_info(ram: &GuestRam, initrd: Option<(u64, u64)>) -> Result<(), Error> {
    let map = memory_map(ram.size());
    for (index, entry) in (0u64..).zip(&map) {
        let item = hvm_memmap_table_entry {
            addr: entry.address,
            size: entry.size,
            type_: entry.kind,
            reserved: 0,
        };
        let address = layout::PVH_MEMORY_MAP + index * size_of_val(&item) as u64;
        write(ram, item.as_slice(), address, "the PVH memory map")?;
    }
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        write(
            ram,
            module.as_slice(),
            layout::PVH_MODULES,
            "the PVH module list",
        )?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() {
            layout::PVH_MODULES
        } else {
            0
        },
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI_RSDP,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: low_32(map.len() as u64),
        ..Default::default()
    };
    write(
        ram,
        info.as_slice(),
        layout::PVH_START_INFO,
        "the PVH start info",
    )
}

/// Maps the first GiB (kernel, parameters) and the last GiB below 4 GiB (device windows) onto themselves, 2 MiB a page.
fn write_page_tables(ram: &GuestRam) -> Result<(), Error> {
    const WHAT: &str = "the boot page tables";
    let [pml4, pdpt, low, high] = [0, 1, 2, 3].map(|page| layout::BOOT_PML4 + page * 0x1000);
    write(ram, &(pdpt | PTE_TABLE).to_le_bytes(), pml4, WHAT)?;
    let mut directory = [0u8; 32];
    directory[..8].copy_from_slice(&(low | PTE_TABLE).to_le_bytes());
    directory[24..].copy_from_slice(&(high | PTE_TABLE).to_le_bytes());
    write(ram, &directory, pdpt, WHAT)?;
    for (table, base) in [(low, 0), (high, 3 * GIB)] {
        let mut page = [0u8; 4096];
        for (index, slot) in (0u64..).zip(page.chunks_exact_mut(8)) {
            slot.copy_from_slice(&((base + (index << 21)) | PTE_LARGE).to_le_bytes());
        }
        write(ram, &page, table, WHAT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::kernel::KernelFormat;
    use super::*;
    use crate::memory::RamConfig;
    use vm_memory::{Bytes, GuestAddress};

    fn kernel(entry: Entry) -> Kernel {
        Kernel {
            format: KernelFormat::Elf,
            entry,
            end: 0x200_0000,
            header: None,
        }
    }

    #[test]
    fn zero_page_tells_ram_initrd_and_command_line() {
        let ram = GuestRam::new(RamConfig::new(4 << 30)).unwrap();
        write_params(
            &ram,
            &kernel(Entry::Linux64(0x100_0000)),
            Some((0x7F0_0000, 77)),
            12,
        )
        .unwrap();
        let params: boot_params = ram
            .memory()
            .read_obj(GuestAddress(layout::ZERO_PAGE))
            .unwrap();
        assert_eq!({ params.hdr.header }, SETUP_MAGIC);
        assert_eq!(
            ({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size }),
            (0x7F0_0000, 77)
        );
        assert_eq!(
            ({ params.hdr.cmd_line_ptr }, { params.hdr.cmdline_size }),
            (0x2_0000, 12)
        );
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_RSDP);
        assert_eq!(params.e820_entries, 4);
        let last = params.e820_table[3];
        assert_eq!(
            ({ last.addr }, { last.size }, { last.r#type }),
            (1 << 32, 1 << 30, 1)
        );
    }

    #[test]
    fn page_tables_map_low_ram_and_the_device_windows() {
        let ram = GuestRam::new(RamConfig::new(128 << 20)).unwrap();
        write_page_tables(&ram).unwrap();
        let read = |address| ram.memory().read_obj::<u64>(GuestAddress(address)).unwrap();
        let translate = |address: u64| {
            let pdpt = read(layout::BOOT_PML4) & !0xFFF;
            let table = read(pdpt + 8 * (address >> 30)) & !0xFFF;
            let entry = read(table + 8 * (address >> 21 & 0x1FF));
            assert_eq!(entry & 0xFFF, PTE_LARGE);
            (entry & !0xFFF) | (address & 0x1F_FFFF)
        };
        for address in [0x7000, 0x3FFF_FFFF, layout::VIRTIO_MMIO_BASE, 0xFEE0_0000] {
            assert_eq!(translate(address), address);
        }
    }

    #[test]
    fn start_info_points_to_map_and_module() {
        let ram = GuestRam::new(RamConfig::new(128 << 20)).unwrap();
        write_params(
            &ram,
            &kernel(Entry::Pvh(0x100_0000)),
            Some((0x700_0000, 5)),
            0,
        )
        .unwrap();
        let info: hvm_start_info = ram
            .memory()
            .read_obj(GuestAddress(layout::PVH_START_INFO))
            .unwrap();
        assert_eq!(
            (info.magic, info.nr_modules, info.memmap_entries),
            (XEN_HVM_START_MAGIC_VALUE, 1, 3)
        );
        assert_eq!(info.rsdp_paddr, layout::ACPI_RSDP);
        let module: hvm_modlist_entry = ram
            .memory()
            .read_obj(GuestAddress(info.modlist_paddr))
            .unwrap();
        assert_eq!((module.paddr, module.size), (0x700_0000, 5));
        let second = GuestAddress(info.memmap_paddr + 24);
        let entry: hvm_memmap_table_entry = ram.memory().read_obj(second).unwrap();
        assert_eq!((entry.addr, entry.type_), (layout::BASE_MEMORY_END, 2));
    }
}
