//! Registers: what the boot processor starts with, and a dump for error reports.
//!
//! Job: general and system registers for the two boot protocols, the MSRs and local interrupt lines of every vCPU.
//! Who is not trusted: nobody when registers are set; the dump shows guest values as plain numbers.
//! Why this way: the values are those that the protocols prescribe (kernel `Documentation/arch/x86/boot.rst`
//! "64-bit boot protocol"; Xen `docs/misc/pvh.pandoc`); everything else keeps KVM's reset value.

use std::fmt;

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::Error;
use super::state::VcpuState;

/// What the boot processor starts with. The tables that `gdt`, `idt` and `page_table` point to are in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootRegisters {
    /// 64-bit entry of the Linux boot protocol: long mode, paging on, `rsi` = zero page.
    Linux64 {
        /// First instruction.
        entry: u64,
        /// `boot_params`.
        zero_page: u64,
        /// Top of a small stack.
        stack: u64,
        /// Root of identity-mapping page tables.
        page_table: u64,
    },
    /// PVH entry: 32-bit protected mode without paging, `ebx` = start info.
    Pvh {
        /// First instruction.
        entry: u64,
        /// `hvm_start_info`.
        start_info: u64,
    },
}

/// Selector indices that the Linux boot protocol fixes: `__BOOT_CS` is 0x10, `__BOOT_DS` is 0x18.
const CODE_INDEX: u16 = 2;
const DATA_INDEX: u16 = 3;
const TASK_INDEX: u16 = 4;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, everything write-back: guests that trust MTRRs must not treat RAM as uncached.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// Offsets in the LAPIC's register page (SDM 3A, table 11-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
/// Delivery modes of a local vector (SDM 3A, figure 11-8), in place.
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

impl BootRegisters {
    fn is_64bit(&self) -> bool {
        matches!(self, Self::Linux64 { .. })
    }

    /// The descriptors that the loader writes to guest RAM: null, null, code, data, task state.
    #[must_use]
    pub fn gdt(&self) -> [u64; 5] {
        let pack = |segment: &kvm_segment| {
            let (base, limit) = (segment.base, u64::from(segment.limit));
            let limit = if segment.g == 1 { limit >> 12 } else { limit };
            let bit = |value: u8, position: u32| u64::from(value) << position;
            (limit & 0xFFFF)
                | ((base & 0xFF_FFFF) << 16)
                | bit(segment.type_, 40)
                | bit(segment.s, 44)
                | bit(segment.dpl, 45)
                | bit(segment.present, 47)
                | ((limit >> 16 & 0xF) << 48)
                | bit(segment.avl, 52)
                | bit(segment.l, 53)
                | bit(segment.db, 54)
                | bit(segment.g, 55)
                | ((base >> 24 & 0xFF) << 56)
        };
        let (code, data, task) = self.segments();
        [0, 0, pack(&code), pack(&data), pack(&task)]
    }

    fn segments(&self) -> (kvm_segment, kvm_segment, kvm_segment) {
        let long = u8::from(self.is_64bit());
        let flat = |index: u16, type_: u8| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: index * 8,
            type_,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        // Types (SDM 3A, tables 3-1 and 3-2): 0xB code, readable, accessed; 3 data, writable, accessed; 0xB (system)
        // busy task state.
        let code = kvm_segment {
            l: long,
            db: 1 - long,
            ..flat(CODE_INDEX, 0xB)
        };
        let data = kvm_segment {
            db: 1,
            ..flat(DATA_INDEX, 3)
        };
        let task = kvm_segment {
            s: 0,
            g: 0,
            limit: 0x67,
            ..flat(TASK_INDEX, 0xB)
        };
        (code, data, task)
    }

    fn apply(&self, regs: &mut kvm_regs, sregs: &mut kvm_sregs, gdt: u64, idt: u64) {
        let (code, data, task) = self.segments();
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = task;
        sregs.gdt.base = gdt;
        sregs.gdt.limit = 5 * 8 - 1;
        sregs.idt.base = idt;
        sregs.idt.limit = 7;
        *regs = kvm_regs {
            rflags: RFLAGS,
            ..Default::default()
        };
        match *self {
            Self::Linux64 {
                entry,
                zero_page,
                stack,
                page_table,
            } => {
                sregs.cr0 |= CR0_PE | CR0_PG;
                sregs.cr3 = page_table;
                sregs.cr4 |= CR4_PAE;
                sregs.efer |= EFER_LME | EFER_LMA;
                regs.rip = entry;
                regs.rsi = zero_page;
                (regs.rsp, regs.rbp) = (stack, stack);
            }
            Self::Pvh { entry, start_info } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                regs.rip = entry;
                regs.rbx = start_info;
            }
        }
    }

    /// Sets the registers of the boot processor, whose reset state is `new`.
    pub(crate) fn set(
        &self,
        vcpu: &VcpuFd,
        new: &VcpuState,
        gdt: u64,
        idt: u64,
    ) -> Result<(), Error> {
        let call = |call| {
            move |source| Error::VcpuCall {
                call,
                vcpu: 0,
                source,
            }
        };
        let mut sregs = new.sregs();
        let mut regs = kvm_regs::default();
        self.apply(&mut regs, &mut sregs, gdt, idt);
        vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
        vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))
    }
}

/// Sets the MSRs whose reset value is not what firmware would leave behind.
pub(crate) fn set_boot_msrs(vcpu: &VcpuFd, index: u32) -> Result<(), Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    set_msrs(vcpu, index, &entries)
}

/// Sets MSRs, all or an error that names the first refused one.
pub(crate) fn set_msrs(
    vcpu: &VcpuFd,
    vcpu_index: u32,
    entries: &[kvm_msr_entry],
) -> Result<(), Error> {
    let list = Msrs::from_entries(entries).map_err(Error::List)?;
    let set = vcpu.set_msrs(&list).map_err(|source| Error::VcpuCall {
        call: "KVM_SET_MSRS",
        vcpu: vcpu_index,
        source,
    })?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::Msrs {
            vcpu: vcpu_index,
            set,
            given: entries.len(),
            index: refused.index,
        }),
    }
}

/// Wires the local interrupt pins as every PC does: LINT0 to the PIC, LINT1 to NMI (MP specification 1.4, 3.6.2.2).
pub(crate) fn set_local_lines(lapic: &mut kvm_lapic_state) {
    let mut set = |offset: usize, mode: u32| {
        // The page is an array of 32-bit registers; the binding types it as signed bytes.
        let field = &mut lapic.regs[offset..offset + 4];
        let mut bytes = [0; 4];
        for (byte, source) in bytes.iter_mut().zip(field.iter()) {
            *byte = source.cast_unsigned();
        }
        let value = (u32::from_le_bytes(bytes) & !DELIVERY_MASK) | mode;
        for (target, byte) in field.iter_mut().zip(value.to_le_bytes()) {
            *target = byte.cast_signed();
        }
    };
    set(APIC_LVT_LINT0, DELIVERY_EXTINT);
    set(APIC_LVT_LINT1, DELIVERY_NMI);
}

/// The registers of a vCPU that stopped for a bad reason.
#[derive(Debug, Clone)]
pub struct RegisterDump {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
}

impl RegisterDump {
    /// Reads the registers.
    pub(crate) fn read(vcpu: &VcpuFd, index: u32) -> Result<Self, Error> {
        let call = |call| {
            move |source| Error::VcpuCall {
                call,
                vcpu: index,
                source,
            }
        };
        Ok(Self {
            vcpu: index,
            regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
        })
    }
}

impl RegisterDump {
    /// A register by its number in DWARF (System V ABI for AMD64, figure 3.36): 0 to 15 general ones, 16 the instruction
    /// pointer, 49 flags, 50 to 55 segment selectors, 58 and 59 the bases of fs and gs.
    #[must_use]
    pub const fn by_number(&self, number: u64) -> Option<u64> {
        let (r, s) = (&self.regs, &self.sregs);
        Some(match number {
            0 => r.rax,
            1 => r.rdx,
            2 => r.rcx,
            3 => r.rbx,
            4 => r.rsi,
            5 => r.rdi,
            6 => r.rbp,
            7 => r.rsp,
            8 => r.r8,
            9 => r.r9,
            10 => r.r10,
            11 => r.r11,
            12 => r.r12,
            13 => r.r13,
            14 => r.r14,
            15 => r.r15,
            16 => r.rip,
            49 => r.rflags,
            50 => s.es.selector as u64,
            51 => s.cs.selector as u64,
            52 => s.ss.selector as u64,
            53 => s.ds.selector as u64,
            54 => s.fs.selector as u64,
            55 => s.gs.selector as u64,
            58 => s.fs.base,
            59 => s.gs.base,
            _ => return None,
        })
    }
}

impl fmt::Display for RegisterDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.regs, &self.sregs);
        writeln!(
            f,
            "vcpu{} rip={:016x} rflags={:08x}",
            self.vcpu, r.rip, r.rflags
        )?;
        let general = [
            [
                ("rax", r.rax),
                ("rbx", r.rbx),
                ("rcx", r.rcx),
                ("rdx", r.rdx),
            ],
            [
                ("rsi", r.rsi),
                ("rdi", r.rdi),
                ("rbp", r.rbp),
                ("rsp", r.rsp),
            ],
            [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
            [
                ("r12", r.r12),
                ("r13", r.r13),
                ("r14", r.r14),
                ("r15", r.r15),
            ],
            [
                ("cr0", s.cr0),
                ("cr2", s.cr2),
                ("cr3", s.cr3),
                ("cr4", s.cr4),
            ],
        ];
        for row in general {
            for (column, (name, value)) in row.iter().enumerate() {
                write!(
                    f,
                    "{}{name}={value:016x}",
                    if column == 0 { "  " } else { " " }
                )?;
            }
            writeln!(f)?;
        }
        for (name, segment) in [
            ("cs", s.cs),
            ("ss", s.ss),
            ("ds", s.ds),
            ("es", s.es),
            ("fs", s.fs),
            ("gs", s.gs),
            ("tr", s.tr),
        ] {
            writeln!(
                f,
                "  {name}={:04x} base={:016x} limit={:08x} type={:x} s={} dpl={} p={} l={} db={} g={}",
                segment.selector,
                segment.base,
                segment.limit,
                segment.type_,
                segment.s,
                segment.dpl,
                segment.present,
                segment.l,
                segment.db,
                segment.g
            )?;
        }
        writeln!(
            f,
            "  gdt={:016x}/{:04x} idt={:016x}/{:04x}",
            s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
        )?;
        write!(
            f,
            "  efer={:08x} apic_base={:08x} cr8={:x}",
            s.efer, s.apic_base, s.cr8
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINUX: BootRegisters = BootRegisters::Linux64 {
        entry: 0x100_0000,
        zero_page: 0x7000,
        stack: 0x8FF0,
        page_table: 0x9000,
    };
    const PVH: BootRegisters = BootRegisters::Pvh {
        entry: 0x100_0000,
        start_info: 0x6000,
    };

    #[test]
    fn descriptors_match_the_protocols() {
        // Present, flat, 64-bit code; flat data; a busy task state of 0x68 bytes.
        assert_eq!(
            LINUX.gdt(),
            [
                0,
                0,
                0x00AF_9B00_0000_FFFF,
                0x00CF_9300_0000_FFFF,
                0x0000_8B00_0000_0067
            ]
        );
        assert_eq!(PVH.gdt()[2], 0x00CF_9B00_0000_FFFF);
    }

    #[test]
    fn linux_entry_is_long_mode_and_pvh_is_flat() {
        let (mut regs, mut sregs) = (kvm_regs::default(), kvm_sregs::default());
        LINUX.apply(&mut regs, &mut sregs, 0x500, 0x540);
        assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
        assert_eq!((sregs.cr3, sregs.efer), (0x9000, EFER_LME | EFER_LMA));
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0000, 0x7000, 2));
        PVH.apply(&mut regs, &mut sregs, 0x500, 0x540);
        assert_eq!((sregs.cr0, sregs.cr4), (CR0_PE | CR0_ET, 0));
        assert_eq!((regs.rbx, regs.rsi), (0x6000, 0));
    }

    #[test]
    fn local_lines_keep_their_mask_and_vector() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT_LINT1] = 0x12;
        lapic.regs[APIC_LVT_LINT1 + 2] = 1; // masked
        set_local_lines(&mut lapic);
        assert_eq!(lapic.regs[APIC_LVT_LINT0 + 1], 7);
        assert_eq!(lapic.regs[APIC_LVT_LINT1..APIC_LVT_LINT1 + 3], [0x12, 4, 1]);
    }

    #[test]
    fn dump_shows_the_instruction_pointer_and_segments() {
        let (mut regs, mut sregs) = (kvm_regs::default(), kvm_sregs::default());
        LINUX.apply(&mut regs, &mut sregs, 0x500, 0x540);
        let text = RegisterDump {
            vcpu: 3,
            regs,
            sregs,
        }
        .to_string();
        let dump = RegisterDump {
            vcpu: 3,
            regs,
            sregs,
        };
        let numbered = [16, 4, 51, 53].map(|number| dump.by_number(number));
        assert_eq!(
            numbered,
            [Some(0x100_0000), Some(0x7000), Some(0x10), Some(0x18)]
        );
        assert_eq!(dump.by_number(17), None);
        assert!(text.starts_with("vcpu3 rip=0000000001000000"), "{text}");
        assert!(
            text.contains("cs=0010") && text.contains("cr3=0000000000009000"),
            "{text}"
        );
    }
}
