//! The disk's process behind the control process's own virtio-mmio transport, without KVM: what the guest's driver writes
//! goes through the registers, and kicks and interrupts through the descriptors that KVM would hold.

#![allow(clippy::unwrap_used)] // a test

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use device_host::test_frontend::{Buffer, DeviceProcess, DriverQueue, GuestMemory, wait_readable};
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use seccomp_policies::{Action, Policy};
use vmm_main::machine::bus::BusDevice;
use vmm_main::virtio::core::status;
use vmm_main::virtio::mmio::MmioTransport;
use vmm_main::virtio::remote::Handshake;
use vmm_sys_util::eventfd::EventFd;

const BINARY: &str = env!("CARGO_BIN_EXE_block");
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;
const DATA: u64 = 0x90_0000; // in the second region
const SECTORS: u64 = 64;
const QUEUES: u16 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

const ALL_OK: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

struct Guest {
    transport: MmioTransport,
    process: DeviceProcess,
    memory: GuestMemory,
    queues: Vec<DriverQueue>,
    image: std::fs::File,
}

#[allow(unsafe_code)] // vmm-sys-util's EventFd has no AsFd
fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn driver_queues() -> Vec<DriverQueue> {
    (0..QUEUES)
        .map(|index| DriverQueue::new(index.into(), 64, 0x2_0000 * u64::from(index)))
        .collect()
}

impl Guest {
    fn power_on() -> Self {
        let image = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image.set_len(SECTORS * 512).unwrap();
        let spec = DeviceSpec::Block(BlockSpec {
            id: "disk0".into(),
            readonly: false,
            direct: false,
            serial: "serial".into(),
            num_queues: QUEUES,
            queue_size: 64,
            io: Default::default(),
        });
        let backends = vec![OwnedFd::from(image.try_clone().unwrap())];
        let mut process = DeviceProcess::start(BINARY, spec.clone(), backends);
        let device = Handshake::begin(process.socket(), &spec)
            .and_then(Handshake::finish)
            .unwrap();
        let memory = GuestMemory::new();
        let transport = MmioTransport::new(device, memory.map().clone()).unwrap();
        Self {
            transport,
            process,
            memory,
            queues: Vec::new(),
            image,
        }
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn add_status(&mut self, bit: u8) {
        let status = self.get(0x70);
        self.set(0x70, status | u32::from(bit));
    }

    /// A driver from reset to `DRIVER_OK`.
    fn probe(&mut self) {
        self.probe_with(driver_queues());
    }

    fn probe_with(&mut self, queues: Vec<DriverQueue>) {
        self.set(0x70, 0);
        assert_eq!(self.get(0x70), 0);
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        for word in [0, 1] {
            self.set(0x14, word);
            // Without event index: every used buffer interrupts.
            let features = self.get(0x10) & if word == 0 { !(1 << 29) } else { u32::MAX };
            self.set(0x24, word);
            self.set(0x20, features);
        }
        self.add_status(status::FEATURES_OK);
        for queue in &queues {
            // What an earlier driver left is not ours.
            self.memory.write(queue.table, &[0; 0x1000]);
            self.set(0x30, queue.index as u32);
            self.set(0x38, 64);
            for (register, address) in [
                (0x80, queue.table),
                (0x90, queue.available()),
                (0xa0, queue.used()),
            ] {
                self.set(register, address as u32);
                self.set(register + 4, (address >> 32) as u32);
            }
            self.set(0x44, 1);
        }
        self.queues = queues;
        self.add_status(status::DRIVER_OK);
        assert_eq!(self.get(0x70), u32::from(ALL_OK));
    }

    /// One request on queue `index`, kicked and answered by descriptors; gives its status.
    fn request(&mut self, index: usize, kind: u32, sector: u64, data: Option<Buffer>) -> u8 {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write(HEADER, &header);
        self.memory.write(STATUS, &[0xee]);
        let mut buffers = vec![Buffer::readable(HEADER, 16)];
        buffers.extend(data);
        buffers.push(Buffer::writable(STATUS, 1));
        let head = self.queues[index].chain(&self.memory, &buffers);
        self.queues[index].offer(&self.memory, head);
        self.set(0x50, index as u32);
        loop {
            let line = self.transport.irqfds().next().unwrap();
            wait_readable(fd(line), "an interrupt");
            let _ = line.read();
            // As a driver's interrupt handler: which events, acknowledge, look at the ring.
            let events = self.get(0x60);
            assert_eq!(events & 1, 1);
            self.set(0x64, events);
            if let Some((used, _)) = self.queues[index].try_used(&self.memory) {
                assert_eq!(used, head);
                return self.memory.read(STATUS, 1)[0];
            }
        }
    }

    fn write_and_read_back(&mut self, fill: u8) {
        for index in 0..usize::from(QUEUES) {
            let fill = fill + index as u8;
            self.memory.write(DATA, &[fill; 512]);
            assert_eq!(
                self.request(index, OUT, 7, Some(Buffer::readable(DATA, 512))),
                0
            );
            assert_eq!(self.request(index, FLUSH, 0, None), 0);
            let mut sector = [0; 512];
            self.image.read_exact_at(&mut sector, 7 * 512).unwrap();
            assert_eq!(sector, [fill; 512]);
            self.memory.write(DATA, &[0; 512]);
            assert_eq!(
                self.request(index, IN, 7, Some(Buffer::writable(DATA, 512))),
                0
            );
            assert_eq!(self.memory.read(DATA, 512), [fill; 512]);
        }
    }

    fn power_off(self) {
        let Self {
            transport, process, ..
        } = self;
        drop(transport);
        process.finish_well();
    }
}

#[test]
fn a_driver_finds_reads_and_writes_the_disk() {
    let mut guest = Guest::power_on();
    assert_eq!((guest.get(0x00), guest.get(0x08)), (0x7472_6976, 2));
    let mut capacity = [0; 8];
    guest.transport.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    guest.probe();
    guest.write_and_read_back(1);
    guest.power_off();
}

#[test]
fn the_disk_comes_back_after_resets_of_driver_and_machine() {
    let mut guest = Guest::power_on();
    for turn in 0..3 {
        guest.probe();
        guest.write_and_read_back(16 * turn);
    }
    guest.transport.reset();
    assert_eq!(guest.get(0x70), 0);
    guest.probe();
    guest.write_and_read_back(99);
    guest.power_off();
}

#[test]
fn a_broken_ring_needs_a_reset_and_only_that() {
    let mut guest = Guest::power_on();
    guest.probe();
    // A head that is no descriptor's number.
    guest.queues[1].offer(&guest.memory, 1000);
    guest.set(0x50, 1);
    wait_readable(fd(guest.transport.error_event()), "the error eventfd");
    guest.transport.device_error();
    assert_eq!(guest.get(0x70), u32::from(ALL_OK | status::NEEDS_RESET));
    assert_eq!(guest.get(0x60), 3);
    guest.probe();
    guest.write_and_read_back(3);
    guest.power_off();
}

#[test]
fn rings_that_overlap_the_end_of_ram_never_reach_the_process() {
    let mut guest = Guest::power_on();
    guest.probe();
    guest.set(0x70, 0);
    guest.add_status(status::ACKNOWLEDGE);
    guest.add_status(status::DRIVER);
    guest.set(0x24, 1);
    guest.set(0x20, 1);
    guest.add_status(status::FEATURES_OK);
    guest.set(0x80, (4 << 20) - 16);
    guest.set(0x44, 1);
    guest.add_status(status::DRIVER_OK);
    assert_eq!(guest.get(0x70), u32::from(ALL_OK | status::NEEDS_RESET));
    guest.probe();
    guest.write_and_read_back(5);
    guest.power_off();
}

#[test]
fn the_death_of_the_process_is_told_to_the_driver() {
    let mut guest = Guest::power_on();
    guest.probe();
    guest.process.kill();
    wait_readable(
        guest.transport.core().device().socket().unwrap(),
        "the hang-up",
    );
    guest.transport.device_lost();
    assert_eq!(guest.get(0x70), u32::from(ALL_OK | status::NEEDS_RESET));
    // The registers still work, and a new attempt fails at once instead of waiting for nobody.
    guest.set(0x70, 0);
    guest.add_status(status::ACKNOWLEDGE);
    assert_eq!(guest.get(0x70), u32::from(status::ACKNOWLEDGE));
    let (exit, _) = guest.process.finish();
    assert!(!exit.success());
}

/// A forbidden call kills this whole test process with SIGSYS.
#[test]
fn the_filter_of_a_vcpu_lets_a_driver_work() {
    let mut guest = Guest::power_on();
    let first = driver_queues();
    let second = driver_queues();
    // As the control process does: the new thread uses the first heap.
    seccomp_policies::heap::settle();
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        seccomp_policies::install(Policy::ControlVcpu, Action::Kill).unwrap();
        guest.probe_with(first);
        assert_eq!(guest.request(0, FLUSH, 0, None), 0);
        // Configuration space: `writeback` (virtio 1.3, 5.2.4).
        guest.transport.write(0x120, &[1]);
        guest.probe_with(second);
        assert_eq!(guest.request(1, FLUSH, 0, None), 0);
        guest.transport.reset();
        done.send(guest).unwrap();
        // Filtered threads do not end.
        loop {
            std::thread::park();
        }
    });
    result.recv().unwrap().power_off();
}
