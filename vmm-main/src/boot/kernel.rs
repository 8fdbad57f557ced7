//! Kernel files: recognising, checking and reading them.
//!
//! Job: tell an ELF vmlinux from a bzImage from what is neither, check each range against file and RAM, and read the
//! kernel into guest RAM.
//! Who is not trusted: the file. Its numbers are checked before linux-loader acts on them, which by itself reports a
//! file that is too short and RAM that is too small as the same error.
//! Why this way: ELF boots seconds faster than a bzImage under emulation, because nothing is decompressed by the
//! guest, and both are what distributions give (`vmlinux` in debug packages, bzImage as `vmlinuz`).

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::elf;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{ByteValued, GuestAddress};

use super::cmdline::COMMAND_LINE_SIZE;
use super::{Error, Protocol};
use crate::machine::layout;
use crate::memory::GuestRam;

/// What a kernel file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// 64-bit ELF for x86-64.
    Elf,
    /// The compressed image with the Linux setup header.
    BzImage,
}

/// How to enter the loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Linux64(u64),
    Pvh(u64),
}

/// A kernel in guest RAM, without parameters yet.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) format: KernelFormat,
    pub(super) entry: Entry,
    /// First free address after the kernel and the space it needs to unpack itself.
    pub(super) end: u64,
    /// The setup header of a bzImage.
    pub(super) header: Option<setup_header>,
}

impl Kernel {
    /// Bytes of command line that the kernel takes, without the NUL.
    pub(super) fn cmdline_max(&self) -> usize {
        let own = self.header.map_or(0, |header| header.cmdline_size) as usize;
        if own == 0 {
            COMMAND_LINE_SIZE - 1
        } else {
            own.min(COMMAND_LINE_SIZE - 1)
        }
    }

    /// End of the addresses that the kernel can take an initrd from.
    pub(super) fn initrd_limit(&self) -> u64 {
        match self.header.map(|header| header.initrd_addr_max) {
            None | Some(0) => u64::MAX,
            Some(highest) => u64::from(highest) + 1,
        }
    }
}

/// The setup header starts here in a bzImage (boot.rst, "The real-mode kernel header").
const SETUP_HEADER: u64 = 0x1F1;
/// `HdrS`
const SETUP_MAGIC: u32 = 0x5372_6448;
/// First protocol version with `xloadflags`, `init_size` and `pref_address`.
const SETUP_VERSION: u16 = 0x020C;
const LOADED_HIGH: u8 = 1;
/// `XLF_KERNEL_64`: the 64-bit entry is 0x200 after the start.
const XLF_KERNEL_64: u16 = 1;
const BZIMAGE_ENTRY_OFFSET: u64 = 0x200;

const SNIFF: usize = 0x210;

/// Loads the kernel of either format.
pub(super) fn load(ram: &GuestRam, file: &mut File, protocol: Protocol) -> Result<Kernel, Error> {
    // Not `metadata`: a reset loads the kernel under a filter that allows no call that could take a path, as statx.
    let length = file.seek(SeekFrom::End(0)).map_err(Error::ReadKernel)?;
    let mut start = [0; SNIFF];
    let present = read_up_to(file, &mut start)?;
    match sniff(&start[..present])? {
        KernelFormat::Elf => load_elf(ram, file, length, protocol),
        KernelFormat::BzImage => load_bzimage(ram, file, length, protocol),
    }
}

fn read_up_to(file: &File, buffer: &mut [u8]) -> Result<usize, Error> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file
            .read_at(&mut buffer[filled..], filled as u64)
            .map_err(Error::ReadKernel)?
        {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn sniff(start: &[u8]) -> Result<KernelFormat, Error> {
    let at = |offset: usize, magic: &[u8]| start.get(offset..offset + magic.len()) == Some(magic);
    if at(0, b"\x7fELF") {
        return Ok(KernelFormat::Elf);
    }
    // Before PE: an x86 kernel with an EFI stub starts with `MZ` too.
    if at(0x202, b"HdrS") {
        return Ok(KernelFormat::BzImage);
    }
    Err(Error::Format(if start.is_empty() {
        "an empty file"
    } else if at(0x38, b"ARM\x64") {
        "an aarch64 image (PE)"
    } else if at(0, b"MZ") {
        "a PE executable"
    } else if at(0, &[0x1F, 0x8B]) {
        "compressed with gzip"
    } else if at(0, &[0xFD, b'7', b'z', b'X', b'Z']) {
        "compressed with xz"
    } else if at(0, &[0x28, 0xB5, 0x2F, 0xFD]) {
        "compressed with zstd"
    } else if at(0, &[0x02, 0x21, 0x4C, 0x18]) || at(0, &[0x04, 0x22, 0x4D, 0x18]) {
        "compressed with lz4"
    } else {
        "of an unknown format"
    }))
}

fn check_ram(ram: &GuestRam, start: u64, size: u64) -> Result<u64, Error> {
    let end = start.saturating_add(size);
    if start < layout::HIGH_MEMORY_START || end > ram.low_end() {
        return Err(Error::KernelRange {
            start,
            end,
            ram_end: ram.low_end(),
        });
    }
    Ok(end)
}

fn check_file(what: &'static str, start: u64, size: u64, length: u64) -> Result<(), Error> {
    let end = start.saturating_add(size);
    if end > length {
        Err(Error::Truncated { what, end, length })
    } else {
        Ok(())
    }
}

fn load_elf(
    ram: &GuestRam,
    file: &mut File,
    length: u64,
    protocol: Protocol,
) -> Result<Kernel, Error> {
    let mut header = elf::Elf64_Ehdr::default();
    check_file("ELF header", 0, size_of_val(&header) as u64, length)?;
    file.read_exact_at(header.as_mut_slice(), 0)
        .map_err(Error::ReadKernel)?;
    if u32::from(header.e_ident[elf::EI_CLASS]) != ELFCLASS64 {
        return Err(Error::Format("a 32-bit ELF file"));
    }
    if header.e_machine != EM_X86_64 {
        return Err(Error::Format("an ELF file for another processor"));
    }
    let entry_size = size_of::<elf::Elf64_Phdr>() as u64;
    if u64::from(header.e_phentsize) != entry_size {
        return Err(Error::Invalid {
            what: "ELF program header size",
            value: header.e_phentsize.into(),
        });
    }
    let table_size = entry_size * u64::from(header.e_phnum);
    check_file(
        "ELF program header table",
        header.e_phoff,
        table_size,
        length,
    )?;
    let mut end = 0;
    let mut entry_inside = false;
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = elf::Elf64_Phdr::default();
        file.read_exact_at(segment.as_mut_slice(), header.e_phoff + index * entry_size)
            .map_err(Error::ReadKernel)?;
        if segment.p_type != elf::PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        if segment.p_filesz > segment.p_memsz {
            return Err(Error::Invalid {
                what: "ELF segment size",
                value: segment.p_filesz,
            });
        }
        check_file("ELF segment", segment.p_offset, segment.p_filesz, length)?;
        let segment_end = check_ram(ram, segment.p_paddr, segment.p_memsz)?;
        entry_inside |= (segment.p_paddr..segment_end).contains(&header.e_entry);
        end = end.max(segment_end);
    }
    if end == 0 {
        return Err(Error::Invalid {
            what: "number of ELF segments",
            value: header.e_phnum.into(),
        });
    }
    let loaded = Elf::load(ram.memory(), None, file, None).map_err(Error::Load)?;
    let pvh = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(GuestAddress(entry)) => Some(entry),
        _ => None,
    };
    let entry = match (protocol, pvh) {
        (Protocol::Auto | Protocol::Pvh, Some(entry)) => Entry::Pvh(entry),
        (Protocol::Pvh, None) => return Err(Error::NoEntry("PVH")),
        (Protocol::Auto | Protocol::Linux64, _) if entry_inside => Entry::Linux64(header.e_entry),
        _ => {
            return Err(Error::Invalid {
                what: "ELF entry point",
                value: header.e_entry,
            });
        }
    };
    Ok(Kernel {
        format: KernelFormat::Elf,
        entry,
        end,
        header: None,
    })
}

const ELFCLASS64: u32 = 2;
const EM_X86_64: u16 = 62;

fn load_bzimage(
    ram: &GuestRam,
    file: &mut File,
    length: u64,
    protocol: Protocol,
) -> Result<Kernel, Error> {
    let mut header = setup_header::default();
    check_file(
        "setup header",
        SETUP_HEADER,
        size_of_val(&header) as u64,
        length,
    )?;
    file.read_exact_at(header.as_mut_slice(), SETUP_HEADER)
        .map_err(Error::ReadKernel)?;
    debug_assert_eq!({ header.header }, SETUP_MAGIC);
    if header.version < SETUP_VERSION {
        return Err(Error::Invalid {
            what: "boot protocol version (2.12 at least)",
            value: header.version.into(),
        });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(Error::Format("a zImage"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::NoEntry("64-bit"));
    }
    if protocol == Protocol::Pvh {
        return Err(Error::NoEntry("PVH"));
    }
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let setup_size = (sectors + 1) * 512;
    // In units of 16 bytes; what lies behind it in the file (a signature) is not part of the kernel.
    check_file("kernel", setup_size, u64::from(header.syssize) * 16, length)?;
    let start = u64::from(header.code32_start);
    check_ram(ram, start, length - setup_size)?;
    // A relocatable kernel moves itself to its preferred address before it unpacks, unless it is there or above.
    let unpack_at = start.max(header.pref_address);
    let end = check_ram(ram, unpack_at, header.init_size.into())?.max(start + length - setup_size);
    let KernelLoaderResult {
        setup_header,
        kernel_load,
        ..
    } = BzImage::load(
        ram.memory(),
        None,
        file,
        Some(GuestAddress(layout::HIGH_MEMORY_START)),
    )
    .map_err(Error::Load)?;
    Ok(Kernel {
        format: KernelFormat::BzImage,
        entry: Entry::Linux64(kernel_load.0 + BZIMAGE_ENTRY_OFFSET),
        end,
        header: setup_header,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RamConfig;
    use std::io::Write;
    use vm_memory::Bytes;

    const RAM: u64 = 128 << 20;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// An ELF file with one segment of `code` at `address`, and a PVH note if asked for.
    fn elf_file(address: u64, code: &[u8], memory: u64, pvh: Option<u32>) -> Vec<u8> {
        let note: Vec<u8> = pvh.map_or(Vec::new(), |entry| {
            let mut note = Vec::new();
            for word in [4u32, 4, 18] {
                note.extend_from_slice(&word.to_le_bytes());
            }
            note.extend_from_slice(b"Xen\0");
            note.extend_from_slice(&entry.to_le_bytes());
            note
        });
        let headers = 64 + 2 * 56;
        let mut bytes = vec![0; headers];
        bytes[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(16, &2u16.to_le_bytes());
        put(18, &62u16.to_le_bytes());
        put(24, &address.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &2u16.to_le_bytes());
        let mut segment =
            |at: usize, kind: u32, offset: usize, address: u64, file: usize, memory: u64| {
                put(at, &kind.to_le_bytes());
                put(at + 8, &(offset as u64).to_le_bytes());
                put(at + 24, &address.to_le_bytes());
                put(at + 32, &(file as u64).to_le_bytes());
                put(at + 40, &memory.to_le_bytes());
            };
        segment(64, 1, headers, address, code.len(), memory);
        segment(
            64 + 56,
            4,
            headers + code.len(),
            0,
            note.len(),
            note.len() as u64,
        );
        bytes.extend_from_slice(code);
        bytes.extend_from_slice(&note);
        bytes
    }

    fn load_bytes(bytes: &[u8], protocol: Protocol) -> Result<Kernel, Error> {
        load(
            &GuestRam::new(RamConfig::new(RAM)).unwrap(),
            &mut file(bytes),
            protocol,
        )
    }

    #[test]
    fn elf_entry_is_pvh_when_the_note_is_there() {
        let with_note = elf_file(0x100_0000, &[0x90; 64], 128, Some(0x100_0010));
        let without = elf_file(0x100_0000, &[0x90; 64], 128, None);
        let entry = |bytes: &[u8], protocol| load_bytes(bytes, protocol).map(|kernel| kernel.entry);
        assert_eq!(
            entry(&with_note, Protocol::Auto).unwrap(),
            Entry::Pvh(0x100_0010)
        );
        assert_eq!(
            entry(&with_note, Protocol::Linux64).unwrap(),
            Entry::Linux64(0x100_0000)
        );
        assert_eq!(
            entry(&without, Protocol::Auto).unwrap(),
            Entry::Linux64(0x100_0000)
        );
        assert!(matches!(
            entry(&without, Protocol::Pvh),
            Err(Error::NoEntry("PVH"))
        ));
    }

    #[test]
    fn elf_segment_is_read_to_its_address() {
        let ram = GuestRam::new(RamConfig::new(RAM)).unwrap();
        let kernel = load(
            &ram,
            &mut file(&elf_file(0x20_0000, b"code", 4096, None)),
            Protocol::Auto,
        )
        .unwrap();
        assert_eq!(kernel.end, 0x20_1000);
        let mut code = [0; 4];
        ram.memory()
            .read_slice(&mut code, GuestAddress(0x20_0000))
            .unwrap();
        assert_eq!(&code, b"code");
    }

    #[test]
    fn ranges_outside_free_ram_are_refused() {
        for (address, memory) in [
            (0x1000, 64),
            (RAM - 32, 64),
            (u64::MAX - 8, 64),
            (0x20_0000, u64::MAX),
        ] {
            let error =
                load_bytes(&elf_file(address, &[0; 16], memory, None), Protocol::Auto).unwrap_err();
            assert!(matches!(error, Error::KernelRange { .. }), "{error}");
        }
    }

    #[test]
    fn truncated_elf_is_told_from_too_little_ram() {
        let bytes = elf_file(0x20_0000, &[0; 4096], 4096, None);
        for length in [20, 100, 2000] {
            let error = load_bytes(&bytes[..length], Protocol::Auto).unwrap_err();
            assert!(
                matches!(error, Error::Truncated { .. }),
                "{length}: {error}"
            );
        }
    }

    #[test]
    fn other_formats_are_named() {
        let mut arm = vec![0; 0x300];
        arm[..2].copy_from_slice(b"MZ");
        arm[0x38..0x3C].copy_from_slice(b"ARM\x64");
        let mut elf_arm = elf_file(0x20_0000, &[0; 16], 16, None);
        elf_arm[18] = 183;
        for (bytes, name) in [
            (arm, "aarch64"),
            (elf_arm, "another processor"),
            (b"\x1f\x8b\x08".to_vec(), "gzip"),
            (Vec::new(), "empty"),
            (b"hello".to_vec(), "unknown"),
        ] {
            let error = load_bytes(&bytes, Protocol::Auto).unwrap_err().to_string();
            assert!(
                error.contains(name) && error.contains("vmlinux or a bzImage"),
                "{error}"
            );
        }
    }

    fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            syssize: 4096 / 16,
            header: SETUP_MAGIC,
            version: 0x020F,
            loadflags: LOADED_HIGH,
            code32_start: 0x10_0000,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 2047,
            initrd_addr_max: 0x7FFF_FFFF,
            pref_address: 0x100_0000,
            init_size: 0x200_0000,
            ..Default::default()
        };
        change(&mut header);
        let mut bytes = vec![0; 1024 + 4096];
        bytes[0x1F1..0x1F1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        bytes
    }

    #[test]
    fn bzimage_keeps_room_to_unpack() {
        let kernel = load_bytes(&bzimage(|_| {}), Protocol::Auto).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64(0x10_0200));
        assert_eq!(kernel.end, 0x300_0000);
        assert_eq!(
            (kernel.cmdline_max(), kernel.initrd_limit()),
            (2047, 0x8000_0000)
        );
    }

    #[test]
    fn unusable_bzimages_are_refused() {
        assert!(matches!(
            load_bytes(&bzimage(|h| h.init_size = 0x7FFF_FFFF), Protocol::Auto),
            Err(Error::KernelRange { .. })
        ));
        assert!(matches!(
            load_bytes(&bzimage(|h| h.xloadflags = 0), Protocol::Auto),
            Err(Error::NoEntry(_))
        ));
        assert!(matches!(
            load_bytes(&bzimage(|h| h.loadflags = 0), Protocol::Auto),
            Err(Error::Format(_))
        ));
        assert!(matches!(
            load_bytes(&bzimage(|h| h.version = 0x200), Protocol::Auto),
            Err(Error::Invalid { .. })
        ));
        assert!(matches!(
            load_bytes(&bzimage(|_| {})[..2000], Protocol::Auto),
            Err(Error::Truncated { .. })
        ));
        assert!(matches!(
            load_bytes(&bzimage(|_| {}), Protocol::Pvh),
            Err(Error::NoEntry("PVH"))
        ));
    }
}
