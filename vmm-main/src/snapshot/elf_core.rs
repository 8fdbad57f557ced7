//! Guest RAM and registers as an ELF core file, for `dump-guest-memory`.
//!
//! **Job.** The file that QEMU makes of the same command without paging: a `PT_LOAD` for each region of RAM by its physical
//! address, and a `PT_NOTE` with `NT_PRSTATUS` and `QEMU` of each vCPU, which `crash`, `gdb` and `readelf` read. RAM is written
//! in steps that are short enough for a main loop.
//!
//! **Who is not trusted.** Nobody here: the guest's bytes are copied and not looked at, and the file is one that a client
//! opened itself.
//!
//! **Why this way.** Written by position, so a pipe or socket, which could make this process wait, is refused by the kernel. What
//! is zero stays a hole, which needs an empty file. Addresses in the file's headers are physical ones, also where ELF has
//! virtual ones, so that `gdb` finds what a guest that maps its memory as it is has there; QEMU writes 0.
//!
//! Layouts: ELF-64 (System V ABI, "Object Files"); `NT_PRSTATUS` is Linux's `struct elf_prstatus` of x86-64
//! (`include/linux/elfcore.h`); `QEMU` is `QEMUCPUState` version 1 of 432 bytes, before it had the base of gs in the kernel.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm_bindings::{kvm_dtable, kvm_segment};

use super::memory::{MemoryError, STEP, io, is_zero, next_data};
use crate::kvm::regs::RegisterDump;
use crate::memory::GuestRam;

/// Bytes that are read and written at a time, and what a region starts at a multiple of in the file.
const BLOCK: u64 = 64 << 10;
const PAGE: u64 = 4096;

const HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
/// Before the registers of `struct elf_prstatus`: signal, masks, process id, times.
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGISTERS: usize = 112;
const PRSTATUS: usize = 336;
const QEMU_STATE: u32 = 432;

/// A region of RAM, and where it is in RAM as a whole.
#[derive(Debug, Clone, Copy)]
struct Load {
    address: u64,
    size: u64,
    source: u64,
    target: u64,
}

/// A core file on its way.
#[derive(Debug)]
pub struct CoreWriter {
    ram: Arc<GuestRam>,
    file: File,
    loads: Vec<Load>,
    /// The region on its way, and how much of it is done.
    at: (usize, u64),
    buffer: Vec<u8>,
}

impl CoreWriter {
    /// Writes the headers and notes to `file`, which is empty.
    ///
    /// # Errors
    /// The file system is full, say, or it is no file with positions.
    pub fn new(
        ram: Arc<GuestRam>,
        file: File,
        registers: &[RegisterDump],
    ) -> Result<Self, MemoryError> {
        let notes = notes(registers);
        let regions: Vec<_> = ram
            .regions()
            .map(|region| (region.guest_address, region.size, region.ram_offset))
            .collect();
        let (front, loads) = front(&notes, &regions);
        let end = loads.last().map_or(0, |last| last.target + last.size);
        let write = |bytes: &[u8], at| file.write_all_at(bytes, at);
        write(&front, 0)
            // Whatever is zero there, the file is as long as it says.
            .and_then(|()| end.checked_sub(1).map_or(Ok(()), |last| write(&[0], last)))
            .map_err(io("writing the core file"))?;
        Ok(Self {
            ram,
            file,
            loads,
            at: (0, 0),
            buffer: vec![0; BLOCK as usize],
        })
    }

    /// The next few milliseconds' worth; `false` when all is written.
    ///
    /// # Errors
    /// The file system is full, say.
    pub fn step(&mut self) -> Result<bool, MemoryError> {
        let mut work = 0;
        while let Some(load) = self.loads.get(self.at.0).copied() {
            let done = self.at.1;
            let next = next_data(&self.ram, load.source + done)?;
            let skipped = next.map_or(load.size, |next| {
                (next - next % PAGE).max(load.source + done) - load.source
            });
            if skipped >= load.size {
                self.at = (self.at.0 + 1, 0);
                continue;
            }
            if work >= STEP {
                return Ok(true);
            }
            work += self.copy(load, skipped)?;
        }
        Ok(false)
    }

    /// Bytes of RAM that are done, and all.
    pub fn progress(&self) -> (u64, u64) {
        let (at, within) = self.at;
        let before = self.loads.iter().take(at).map(|load| load.size);
        let all = self.loads.iter().map(|load| load.size).sum();
        (before.sum::<u64>() + within, all)
    }

    /// Copies the next bytes of a region, and tells how many.
    fn copy(&mut self, load: Load, from: u64) -> Result<u64, MemoryError> {
        let length = (load.size - from).min(BLOCK);
        let bytes = &mut self.buffer[..length as usize]; // at most BLOCK
        self.ram
            .read_file_at(load.source + from, bytes)
            .map_err(io("reading guest RAM"))?;
        if !is_zero(bytes) {
            self.file
                .write_all_at(bytes, load.target + from)
                .map_err(io("writing the core file"))?;
        }
        self.at.1 = from + length;
        Ok(length)
    }
}

/// All before the first region, and where regions are. `regions`: physical address, size, place in RAM as a whole.
fn front(notes: &[u8], regions: &[(u64, u64, u64)]) -> (Vec<u8>, Vec<Load>) {
    let headers = 1 + regions.len() as u64;
    let notes_at = u64::from(HEADER) + headers * u64::from(PROGRAM_HEADER);
    let mut target = (notes_at + notes.len() as u64).next_multiple_of(PAGE);
    let mut loads = Vec::with_capacity(regions.len());
    for &(address, size, source) in regions {
        loads.push(Load {
            address,
            size,
            source,
            target,
        });
        target = (target + size).next_multiple_of(PAGE);
    }
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |out: &mut Vec<u8>, value: u16| out.extend(value.to_le_bytes());
    let word = |out: &mut Vec<u8>, value: u32| out.extend(value.to_le_bytes());
    let long = |out: &mut Vec<u8>, value: u64| out.extend(value.to_le_bytes());
    half(&mut out, ET_CORE);
    half(&mut out, EM_X86_64);
    word(&mut out, 1); // version
    long(&mut out, 0); // entry
    long(&mut out, u64::from(HEADER));
    long(&mut out, 0); // no section headers
    word(&mut out, 0); // flags
    half(&mut out, HEADER);
    half(&mut out, PROGRAM_HEADER);
    half(&mut out, headers as u16); // RAM has far fewer regions
    for value in [0, 0, 0] {
        half(&mut out, value);
    }
    let mut program = |kind: u32, offset: u64, address: u64, size: u64| {
        word(&mut out, kind);
        word(&mut out, 0);
        for value in [offset, address, address, size, size, 0] {
            long(&mut out, value);
        }
    };
    program(PT_NOTE, notes_at, 0, notes.len() as u64);
    for load in &loads {
        program(PT_LOAD, load.target, load.address, load.size);
    }
    out.extend(notes);
    (out, loads)
}

fn notes(registers: &[RegisterDump]) -> Vec<u8> {
    let mut out = Vec::new();
    for dump in registers {
        note(&mut out, b"CORE\0", NT_PRSTATUS, &prstatus(dump));
    }
    for dump in registers {
        note(&mut out, b"QEMU\0", 0, &qemu_state(dump));
    }
    out
}

fn note(out: &mut Vec<u8>, name: &[u8; 5], kind: u32, body: &[u8]) {
    for value in [name.len() as u32, body.len() as u32, kind] {
        out.extend(value.to_le_bytes());
    }
    out.extend(name);
    out.extend([0; 3]);
    out.extend(body);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// `struct elf_prstatus`, with the vCPU's number from 1 on as process id.
fn prstatus(dump: &RegisterDump) -> Vec<u8> {
    let (r, s) = (&dump.regs, &dump.sregs);
    let mut out = vec![0; PRSTATUS_REGISTERS];
    out[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&(dump.vcpu + 1).to_le_bytes());
    let selector = |segment: &kvm_segment| u64::from(segment.selector);
    // Linux's `struct user_regs_struct`.
    for value in [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        0, // orig_rax: no system call
        r.rip,
        selector(&s.cs),
        r.rflags,
        r.rsp,
        selector(&s.ss),
        s.fs.base,
        s.gs.base,
        selector(&s.ds),
        selector(&s.es),
        selector(&s.fs),
        selector(&s.gs),
    ] {
        out.extend(value.to_le_bytes());
    }
    out.resize(PRSTATUS, 0);
    out
}

/// `QEMUCPUState`.
fn qemu_state(dump: &RegisterDump) -> Vec<u8> {
    let (r, s) = (&dump.regs, &dump.sregs);
    let mut out = Vec::with_capacity(QEMU_STATE as usize);
    out.extend(1u32.to_le_bytes());
    out.extend(QEMU_STATE.to_le_bytes());
    for value in [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ] {
        out.extend(value.to_le_bytes());
    }
    for segment in [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.ldt, s.tr] {
        out.extend(u32::from(segment.selector).to_le_bytes());
        out.extend(segment.limit.to_le_bytes());
        out.extend(attributes(&segment).to_le_bytes());
        out.extend([0; 4]);
        out.extend(segment.base.to_le_bytes());
    }
    for kvm_dtable { base, limit, .. } in [s.gdt, s.idt] {
        out.extend([0; 4]);
        out.extend(u32::from(limit).to_le_bytes());
        out.extend([0; 8]);
        out.extend(base.to_le_bytes());
    }
    for value in [s.cr0, 0, s.cr2, s.cr3, s.cr4] {
        out.extend(value.to_le_bytes());
    }
    out
}

/// The second half of a segment's descriptor, without its base and limit (Intel SDM 3A, 3.4.5).
fn attributes(segment: &kvm_segment) -> u32 {
    u32::from(segment.type_) << 8
        | u32::from(segment.s) << 12
        | u32::from(segment.dpl) << 13
        | u32::from(segment.present) << 15
        | u32::from(segment.avl) << 20
        | u32::from(segment.l) << 21
        | u32::from(segment.db) << 22
        | u32::from(segment.g) << 23
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_lead_to_notes_and_regions() {
        let dump = RegisterDump {
            vcpu: 1,
            regs: Default::default(),
            sregs: Default::default(),
        };
        assert_eq!(prstatus(&dump).len(), PRSTATUS);
        assert_eq!(qemu_state(&dump).len(), QEMU_STATE as usize);
        let notes = notes(&[dump]);
        assert_eq!(notes.len(), 20 + PRSTATUS + 20 + QEMU_STATE as usize);
        let (front, loads) = front(&notes, &[(0, 0x1800, 0), (1 << 32, 0x1000, 0x1800)]);
        assert_eq!(front.len(), 64 + 3 * 56 + notes.len());
        assert!(loads[0].target >= front.len() as u64);
        assert_eq!(loads[1].target, loads[0].target + 0x2000);
    }
}
