//! The machine with real vCPUs: tiny programs in 32-bit code, entered by PVH, on this host's `/dev/kvm`.
//!
//! Each program is a few bytes that any KVM runs, also a software one. Without `/dev/kvm` the tests say so and pass;
//! with one they must.

#![allow(clippy::unwrap_used)] // a test

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_main::boot::{BootSource, Protocol};
use vmm_main::kvm::cpuid::CpuFeatures;
use vmm_main::kvm::run::ThreadStart;
use vmm_main::kvm::{Kvm, Topology, Vm};
use vmm_main::machine::bus::BusDevice;
use vmm_main::machine::events::{EventReceiver, VmEvent};
use vmm_main::machine::layout;
use vmm_main::machine::microvm::{Error, MMIO_SLOTS, Microvm, MicrovmConfig};
use vmm_main::memory::{GuestRam, RamConfig};
use vmm_main::platform::serial::SerialSink;
use vmm_sys_util::eventfd::EventFd;

const CODE: u32 = 0x10_0000;
const CELL: u32 = 0x20_0000;
/// Longest that any event may take, however busy the host.
const PATIENCE: Duration = Duration::from_secs(30);

/// 32-bit code, assembled by hand.
#[derive(Default, Clone)]
struct Code(Vec<u8>);

impl Code {
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn word(self, opcode: &[u8], value: u32) -> Self {
        self.raw(opcode).raw(&value.to_le_bytes())
    }
    /// `mov dx, port; mov al, value; out dx, al`
    fn out(self, port: u16, value: u8) -> Self {
        self.port(port).raw(&[0xB0, value, 0xEE])
    }
    /// `mov dx, port`
    fn port(self, port: u16) -> Self {
        self.raw(&[0x66, 0xBA]).raw(&port.to_le_bytes())
    }
    /// Prints `al` plus `'0'`.
    fn print_digit(self) -> Self {
        self.raw(&[0x04, b'0'])
            .port(layout::SERIAL_PORT)
            .raw(&[0xEE])
    }
    /// `mov dword [address], value`
    fn store(self, address: u32, value: u32) -> Self {
        self.word(&[0xC7, 0x05], address).raw(&value.to_le_bytes())
    }
    fn power_off(self) -> Self {
        self.out(layout::POWER_PORT, (5 << 2) | (1 << 5)).stop()
    }
    fn reset(self) -> Self {
        self.out(layout::POWER_PORT + 2, 1).stop()
    }
    /// `hlt; jmp` to it
    fn stop(self) -> Self {
        self.raw(&[0xF4, 0xEB, 0xFD])
    }

    /// An ELF file with the code at [`CODE`] and a PVH note that enters there.
    fn elf(&self) -> File {
        let mut note = Vec::new();
        for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), CODE] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        let headers = 64 + 2 * 56u64;
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        elf.extend_from_slice(&2u16.to_le_bytes());
        elf.extend_from_slice(&62u16.to_le_bytes());
        elf.extend_from_slice(&1u32.to_le_bytes());
        for word in [CODE.into(), 64, 0u64] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
        elf.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, 2, 0, 0, 0] {
            elf.extend_from_slice(&half.to_le_bytes());
        }
        let (code, notes) = (self.0.len() as u64, note.len() as u64);
        for (kind, offset, address, size) in [
            (1u32, headers, CODE.into(), code),
            (4, headers + code, 0u64, notes),
        ] {
            elf.extend_from_slice(&kind.to_le_bytes());
            elf.extend_from_slice(&7u32.to_le_bytes());
            for word in [offset, address, address, size, size, 4096] {
                elf.extend_from_slice(&word.to_le_bytes());
            }
        }
        elf.extend_from_slice(&self.0);
        elf.extend_from_slice(&note);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&elf).unwrap();
        file
    }
}

struct Bytewise(Sender<u8>);

impl SerialSink for Bytewise {
    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let _ = self.0.send(*byte);
        }
    }
}

struct Guest {
    machine: Microvm,
    events: EventReceiver,
    output: Receiver<u8>,
}

/// A machine that is assembled and loaded, or `None` on a host without KVM.
fn guest_with(code: &Code, cpus: u32, plug: impl FnOnce(&mut Microvm)) -> Option<Guest> {
    guest_by(code, cpus, Protocol::Auto, plug)
}

fn guest_by(
    code: &Code,
    cpus: u32,
    protocol: Protocol,
    plug: impl FnOnce(&mut Microvm),
) -> Option<Guest> {
    if !std::path::Path::new("/dev/kvm").exists() {
        eprintln!("skipped: this host has no /dev/kvm");
        return None;
    }
    let kvm = Kvm::open().unwrap();
    let vm = Vm::create(&kvm).unwrap();
    let ram = Arc::new(GuestRam::new(RamConfig::new(128 << 20)).unwrap());
    let (sender, output) = channel();
    let config = MicrovmConfig {
        topology: Topology::flat(cpus).unwrap(),
        features: CpuFeatures::default(),
        serial: Some(Box::new(Bytewise(sender))),
        numa: None,
    };
    let mut machine = Microvm::new(&kvm, vm, ram, config).unwrap();
    plug(&mut machine);
    let source = BootSource {
        kernel: code.elf(),
        initrd: None,
        cmdline: String::from("quiet"),
        protocol,
    };
    machine.load(source).unwrap();
    let events = machine.take_events().unwrap();
    Some(Guest {
        machine,
        events,
        output,
    })
}

fn guest(code: &Code) -> Option<Guest> {
    guest_with(code, 1, |_| {})
}

impl Guest {
    fn run(&mut self) {
        let on_start: ThreadStart = Arc::new(|_| Ok(()));
        self.machine.start(&on_start).unwrap();
        self.machine.resume().unwrap();
    }

    fn event(&self) -> VmEvent {
        self.events
            .recv_until(Instant::now() + PATIENCE)
            .expect("an event in time")
    }

    fn text(&self) -> String {
        String::from_utf8(self.output.try_iter().collect()).unwrap()
    }

    fn cell(&self) -> u32 {
        self.machine
            .ram()
            .memory()
            .read_obj(GuestAddress(CELL.into()))
            .unwrap()
    }
}

#[test]
fn output_and_power_off() {
    // A string instruction brings several bytes in one exit: cld; mov esi, text; mov ecx, 5; rep outsb
    let text = CODE + 0x100;
    let mut code = Code::default()
        .raw(&[0xFC])
        .word(&[0xBE], text)
        .word(&[0xB9], 5)
        .port(layout::SERIAL_PORT)
        .raw(&[0xF3, 0x6E])
        .out(layout::SERIAL_PORT, b'!')
        .power_off();
    code.0.resize(0x100, 0xCC);
    let Some(mut guest) = guest(&code.raw(b"hello")) else {
        return;
    };
    guest.run();
    assert!(matches!(guest.event(), VmEvent::Shutdown));
    assert_eq!(guest.text(), "hello!");
}

#[test]
fn the_64bit_entry_finds_the_zero_page_and_the_device_windows() {
    // The same bytes mean the same in both modes. mov al, [rsi + e820_entries]; print; then a byte of a window.
    let window = u32::try_from(layout::VIRTIO_MMIO_BASE).unwrap();
    let code = Code::default()
        .word(&[0x8A, 0x86], 0x1E8)
        .print_digit()
        .word(&[0xB9], window)
        .raw(&[0x8A, 0x01]) // mov al, [rcx]
        .print_digit()
        .power_off();
    let plug = |machine: &mut Microvm| {
        machine
            .attach_mmio(0, Arc::new(Mutex::new(Window::default())))
            .unwrap();
    };
    let Some(mut guest) = guest_by(&code, 1, Protocol::Linux64, plug) else {
        return;
    };
    guest.run();
    assert!(matches!(guest.event(), VmEvent::Shutdown));
    assert_eq!(guest.text(), "37");
}

#[test]
fn reset_in_place_gives_every_life_the_same_machine() {
    // Print a cell of RAM and the UART's scratch register, change both, ask for a reset.
    let code = Code::default()
        .word(&[0xA1], CELL)
        .print_digit()
        .word(&[0xFF, 0x05], CELL)
        .port(layout::SERIAL_PORT + 7)
        .raw(&[0xEC])
        .print_digit()
        .out(layout::SERIAL_PORT + 7, 5)
        .reset();
    let Some(mut guest) = guest(&code) else {
        return;
    };
    guest.run();
    for _ in 0..3 {
        assert!(matches!(guest.event(), VmEvent::Reset));
        assert_eq!(guest.cell(), 1);
        assert_eq!(guest.text(), "00");
        guest.machine.reset().unwrap();
        assert_eq!(guest.cell(), 0);
        assert!(guest.events.try_recv().is_none());
        guest.machine.resume().unwrap();
    }
}

#[test]
fn triple_fault_is_reported_with_registers() {
    // lidt of six zero bytes; ud2
    let code = Code::default()
        .store(CELL, 0)
        .word(&[0x0F, 0x01, 0x1D], CELL)
        .raw(&[0x0F, 0x0B]);
    let Some(mut guest) = guest(&code) else {
        return;
    };
    guest.run();
    let event = guest.event();
    assert!(matches!(event, VmEvent::TripleFault { .. }), "{event}");
    assert!(event.to_string().contains("vcpu0 rip="), "{event}");
    // The machine is still there: a reset brings the guest back, to fault again.
    guest.machine.reset().unwrap();
    guest.machine.resume().unwrap();
    assert!(matches!(guest.event(), VmEvent::TripleFault { .. }));
}

/// Offset and bytes of each write.
type Writes = Vec<(u64, Vec<u8>)>;

#[derive(Default)]
struct Window(Arc<Mutex<Writes>>);

impl BusDevice for Window {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(7);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

#[test]
fn windows_reach_their_device_and_doorbells_do_not() {
    let base = u32::try_from(layout::VIRTIO_MMIO_BASE + 10 * layout::VIRTIO_MMIO_SIZE).unwrap();
    let code = Code::default()
        .word(&[0xA1], base)
        .print_digit()
        .word(&[0xA1], base + 0x1000)
        .raw(&[0x24, 0x01]) // and al, 1: nothing there reads as ones
        .print_digit()
        .store(base + 0x50, 3)
        .store(base + 0x50, 4)
        .power_off();
    let writes = Arc::new(Mutex::new(Vec::new()));
    let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let plug = |machine: &mut Microvm| {
        let device = Arc::new(Mutex::new(Window(writes.clone())));
        assert!(matches!(
            machine.attach_mmio(MMIO_SLOTS, device.clone()),
            Err(Error::Slot { slot: MMIO_SLOTS })
        ));
        let slot = machine.attach_mmio(10, device.clone()).unwrap();
        assert_eq!((slot.base, slot.gsi), (base.into(), 11));
        assert!(matches!(
            machine.attach_mmio(10, device),
            Err(Error::SlotTaken { slot: 10 })
        ));
        machine
            .vm()
            .register_ioeventfd(&doorbell, slot.base + 0x50, Some(3))
            .unwrap();
    };
    let Some(mut guest) = guest_with(&code, 1, plug) else {
        return;
    };
    guest.run();
    assert!(matches!(guest.event(), VmEvent::Shutdown));
    assert_eq!(guest.text(), "71");
    assert_eq!(doorbell.read().unwrap(), 1);
    assert_eq!(*writes.lock().unwrap(), [(0x50, vec![4, 0, 0, 0])]);
    // The window was described on the command line.
    let mut line = [0; 64];
    guest
        .machine
        .ram()
        .memory()
        .read_slice(&mut line, GuestAddress(layout::COMMAND_LINE))
        .unwrap();
    assert!(
        line.starts_with(b"quiet virtio_mmio.device=4K@0xd000a000:11\0"),
        "{}",
        line.escape_ascii()
    );
}

#[test]
fn pause_stops_the_guest_and_resume_goes_on() {
    // inc dword [CELL]; jmp to it
    let code = Code::default().word(&[0xFF, 0x05], CELL).raw(&[0xEB, 0xF8]);
    let Some(mut guest) = guest_with(&code, 2, |_| {}) else {
        return;
    };
    assert!(guest.machine.resume().is_err(), "not started");
    guest.run();
    let deadline = Instant::now() + PATIENCE;
    let mut last = 0;
    for _ in 0..20 {
        while guest.cell() == last {
            assert!(Instant::now() < deadline, "the guest does not run");
            std::thread::yield_now();
        }
        assert!(
            guest.machine.registers().is_err(),
            "a running guest's registers cannot be read"
        );
        guest.machine.pause().unwrap();
        last = guest.cell();
        let registers = guest.machine.registers().unwrap();
        assert!(
            (CODE.into()..u64::from(CODE) + 8).contains(&registers[0].regs.rip),
            "{}",
            registers[0]
        );
        for _ in 0..1000 {
            assert_eq!(guest.cell(), last);
        }
        guest.machine.resume().unwrap();
    }
}

#[test]
fn threads_are_named_and_told_apart() {
    let Some(mut guest) = guest_with(&Code::default().power_off(), 3, |_| {}) else {
        return;
    };
    assert!(guest.machine.vcpu_thread_ids().is_err());
    let on_start: ThreadStart = Arc::new(|_| Ok(()));
    guest.machine.start(&on_start).unwrap();
    let names: Vec<_> = guest
        .machine
        .vcpu_thread_ids()
        .unwrap()
        .into_iter()
        .map(|id| std::fs::read_to_string(format!("/proc/self/task/{id}/comm")).unwrap())
        .collect();
    assert_eq!(names, ["vcpu0\n", "vcpu1\n", "vcpu2\n"]);
    assert!(guest.machine.start(&on_start).is_err());
    // Dropped without ever having run: the threads must end.
}

#[test]
fn a_thread_that_cannot_start_never_runs_the_guest() {
    let Some(mut guest) = guest(&Code::default().out(layout::SERIAL_PORT, b'x').power_off()) else {
        return;
    };
    let on_start: ThreadStart = Arc::new(|vcpu| Err(format!("no filter for {vcpu}").into()));
    guest.machine.start(&on_start).unwrap();
    guest.machine.resume().unwrap();
    match guest.event() {
        VmEvent::VcpuError { vcpu: 0, message } => {
            assert!(message.contains("no filter for 0"), "{message}");
        }
        other => panic!("{other}"),
    }
    guest.machine.resume().unwrap();
    guest.machine.pause().unwrap();
    assert_eq!(guest.text(), "");
}
