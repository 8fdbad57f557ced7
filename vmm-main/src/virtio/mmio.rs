//! The virtio-mmio transport, version 2 (virtio 1.3, section 4.2).
//!
//! **Job.** Registers of one device in front of [`super::core`], and the descriptors that make KVM do the rest: an
//! ioeventfd for each queue's doorbell and one irqfd for the device's interrupt.
//!
//! **Who is not trusted**: the guest. Registers below 0x100 take aligned 32-bit accesses only (section 4.2.2.2); other
//! accesses, unknown registers and reads of write-only ones give 0 or are ignored, and are logged rate limited.
//!
//! **Why this way.** `InterruptStatus` normally tells which of "buffers used" and "configuration changed" an interrupt
//! means. Buffers are used by the device process, which interrupts the guest through the irqfd by itself; were this
//! process to be told each time, it would sit on the data path. So bit 0 reads as set whenever the driver is at work.
//! That is right because the bit is a hint to look at the rings and never a promise that there is something: section
//! 4.2.2.1 has the driver handle the events that the bits name, and a ring without news is handled by seeing so. Linux
//! (`vm_interrupt` in `drivers/virtio/virtio_mmio.c`) reads, acknowledges, and asks each queue, which finds nothing new
//! and says so. The interrupt line is edge triggered and not shared, so a set bit does not keep it asserted either.
//!
//! All queues and configuration changes share the one line, hence one event descriptor.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ipc::disk::{Answer, Order};
use ipc::guest_warn;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::machine::bus::BusDevice;
use crate::memory::sharing::Orders;

use super::attention::Attention;
use super::core::{Area, Core, CoreError, Half, Interrupts};
use super::remote::{RemoteDevice, RemoteError};
use super::snapshot::DeviceState;
use super::window::Window;

/// Offset of `QueueNotify`, for which each queue has an ioeventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// No vendor: no driver looks at it.
const VENDOR: u32 = 0;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;
/// Where configuration space starts.
const CONFIG: u64 = 0x100;

/// The interrupt line of one device.
#[derive(Debug)]
struct Line(EventFd);

impl Interrupts for Line {
    fn queue_call(&self, _index: u16) -> &EventFd {
        &self.0
    }

    fn signal_config(&self) {
        // Fails only when 2^64 - 2 interrupts wait already.
        let _ = self.0.write(1);
    }
}

/// One virtio-mmio device.
#[derive(Debug)]
pub struct MmioTransport {
    core: Core,
    line: Line,
    /// The shared memory region that its registers speak of.
    region_select: u32,
}

impl MmioTransport {
    /// A device at power-on. The caller registers [`MmioTransport::ioeventfds`] and [`MmioTransport::irqfds`] with KVM.
    pub fn new(device: RemoteDevice, memory: GuestMemoryMmap<()>) -> Result<Self, CoreError> {
        let line =
            EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source: io::Error| {
                CoreError::Event {
                    id: device.id().to_owned(),
                    source,
                }
            })?;
        Ok(Self {
            core: Core::new(device, memory)?,
            line: Line(line),
            region_select: 0,
        })
    }

    /// See [`RemoteDevice::set_window`].
    pub fn set_window(&mut self, window: Arc<Window>) -> Result<(), RemoteError> {
        self.core.set_window(window)
    }

    /// The state behind the registers.
    pub const fn core(&self) -> &Core {
        &self.core
    }

    /// Doorbells: offset in the window, 32-bit value to match, descriptor.
    pub fn ioeventfds(&self) -> impl Iterator<Item = (u64, u32, &EventFd)> {
        (0u32..)
            .zip(self.core.kicks())
            .map(|(index, kick)| (QUEUE_NOTIFY, index, kick))
    }

    /// Descriptors that interrupt the guest when written; all belong to the device's one GSI, edge triggered.
    pub fn irqfds(&self) -> impl Iterator<Item = &EventFd> {
        std::iter::once(&self.line.0)
    }

    /// Readable when the device process complains about a ring; then call [`MmioTransport::device_error`].
    pub const fn error_event(&self) -> &EventFd {
        self.core.error_event()
    }

    /// See [`Core::device_error`].
    pub fn device_error(&mut self) {
        self.core.device_error(&self.line);
    }

    /// See [`Core::device_lost`].
    pub fn device_lost(&mut self) {
        self.core.device_lost(&self.line);
    }

    /// See [`Core::take_out`].
    pub fn take_out(&mut self) -> bool {
        self.core.take_out(&self.line)
    }

    /// The vhost-user socket, if there is a process that can be talked to.
    pub fn device_socket(&self) -> Option<BorrowedFd<'_>> {
        self.core.device().socket()
    }

    /// See [`Core::device_gone`].
    pub fn device_gone(&mut self) {
        self.core.device_gone();
    }

    /// See [`Core::device_back`].
    pub fn device_back(&mut self, fresh: RemoteDevice) -> Result<bool, RemoteError> {
        self.core.device_back(fresh, &self.line)
    }

    /// See [`Core::upgrade`].
    pub fn upgrade(&mut self, fresh: RemoteDevice) -> Result<bool, RemoteError> {
        self.core.upgrade(fresh, &self.line)
    }

    /// See [`Core::hold`].
    pub fn hold(&mut self) -> Result<(), RemoteError> {
        self.core.hold()
    }

    /// See [`Core::release`].
    pub fn release(&mut self) {
        self.core.release(&self.line);
    }

    /// See [`RemoteDevice::share`].
    pub fn share(&mut self, sharing: Arc<Orders>) {
        self.core.share(sharing);
    }

    /// See [`Core::set_link`].
    pub fn set_link(&mut self, up: bool) {
        self.core.set_link(up, &self.line);
    }

    /// See [`Core::set_capacity`].
    pub fn set_capacity(&mut self, sectors: u64) -> Result<bool, RemoteError> {
        self.core.set_capacity(sectors, &self.line)
    }

    /// See [`Core::begin_order`].
    pub fn begin_order(&mut self, order: &Order) -> Result<(), RemoteError> {
        self.core.begin_order(order, &self.line)
    }

    /// See [`Core::order_answer`].
    pub fn order_answer(&mut self) -> Result<Option<Answer>, RemoteError> {
        self.core.order_answer(&self.line)
    }

    /// See [`Core::announce`].
    pub fn announce(&mut self) {
        self.core.announce(&self.line);
    }

    /// See [`Core::save`].
    pub fn save(&mut self, exchange: Option<&File>) -> Result<DeviceState, RemoteError> {
        self.core.save(exchange)
    }

    /// See [`Core::restore`].
    pub fn restore(&mut self, state: DeviceState) -> Result<(), RemoteError> {
        self.core.restore(state)
    }

    /// See [`Core::take_back`].
    pub fn take_back(&mut self) -> bool {
        self.core.take_back()
    }

    /// See [`Core::attention`].
    pub const fn attention(&self) -> &Arc<Attention> {
        self.core.attention()
    }

    /// See [`Core::device_config_changed`].
    pub fn device_config_changed(&mut self) {
        self.core.device_config_changed(&self.line);
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.core.device().virtio_id(),
            0x0c => VENDOR,
            0x10 => self.core.device_features(),
            0x34 => self
                .core
                .queue()
                .map_or(0, |queue| u32::from(queue.max_size)),
            0x44 => self.core.queue().map_or(0, |queue| u32::from(queue.ready)),
            0x60 => {
                let used = if self.core.is_running() {
                    INTERRUPT_USED
                } else {
                    0
                };
                let config = if self.core.state().config_changed {
                    INTERRUPT_CONFIG
                } else {
                    0
                };
                used | config
            }
            0x70 => u32::from(self.core.status()),
            0xb0 | 0xb4 | 0xb8 | 0xbc => self.region(offset),
            // A queue is never being reset: VIRTIO_F_RING_RESET is not offered.
            0xc0 => 0,
            0xfc => self.core.state().config_generation,
            _ => {
                guest_warn!(
                    "device \"{}\": read of register {offset:#x}, which cannot be read, gives 0",
                    self.core.device().id()
                );
                0
            }
        }
    }

    /// Half of the length or base of the shared memory region that is selected; all ones if there is none (section 4.2.2.1).
    fn region(&self, offset: u64) -> u32 {
        let Some(window) = self
            .core
            .device()
            .window()
            .filter(|_| self.region_select == 0)
        else {
            return u32::MAX;
        };
        let value = match offset {
            0xb0 | 0xb4 => window.size(),
            _ => window.guest_address(),
        };
        match offset {
            0xb0 | 0xb8 => value as u32,
            _ => (value >> 32) as u32,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let core = &mut self.core;
        match offset {
            0x14 => core.select_device_features(value),
            0x20 => core.write_driver_features(value),
            0x24 => core.select_driver_features(value),
            0x30 => core.select_queue(value),
            0x38 => core.write_queue_size(value),
            0x44 => core.write_queue_ready(value),
            QUEUE_NOTIFY => core.notify_queue(value),
            0x64 => {
                // Bit 0 is nobody's state, so there is nothing to take back.
                if value & INTERRUPT_CONFIG != 0 {
                    core.acknowledge_config_change();
                }
            }
            // The bits above 7 are reserved and not kept; a value that has only those is no reset.
            0x70 => match u8::try_from(value) {
                Ok(value) => core.write_status(value, &self.line),
                Err(_) => guest_warn!(
                    "device \"{}\": status {value:#x} has reserved bits, ignored",
                    core.device().id()
                ),
            },
            0x80 => core.write_queue_address(Area::Desc, Half::Low, value),
            0x84 => core.write_queue_address(Area::Desc, Half::High, value),
            0x90 => core.write_queue_address(Area::Driver, Half::Low, value),
            0x94 => core.write_queue_address(Area::Driver, Half::High, value),
            0xa0 => core.write_queue_address(Area::Device, Half::Low, value),
            0xa4 => core.write_queue_address(Area::Device, Half::High, value),
            0xac => self.region_select = value,
            _ => guest_warn!(
                "device \"{}\": write of {value:#x} to register {offset:#x}, ignored",
                core.device().id()
            ),
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            if matches!(data.len(), 1 | 2 | 4 | 8) {
                self.core.read_config(offset - CONFIG, data);
            }
            return;
        }
        let len = data.len();
        match <&mut [u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset).to_le_bytes();
            }
            _ => guest_warn!(
                "device \"{}\": read of {len} bytes at register {offset:#x}, gives 0",
                self.core.device().id()
            ),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            if matches!(data.len(), 1 | 2 | 4 | 8) {
                self.core.write_config(offset - CONFIG, data, &self.line);
                self.core.tell_of_order();
            }
            return;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(word));
                self.core.tell_of_order();
            }
            _ => guest_warn!(
                "device \"{}\": write of {} bytes at register {offset:#x}, ignored",
                self.core.device().id(),
                data.len()
            ),
        }
    }

    // The device process is told, keeps running, and does not touch guest memory on return unless it has failed.
    fn reset(&mut self) {
        self.region_select = 0;
        self.core.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::super::core::status::{
        ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET,
    };
    use super::super::fake_device::{self as fake, FakeDevice, Misdeed, Script, connect, memory};
    use super::*;

    const MAGIC_VALUE: u64 = 0x00;
    const DEVICE_FEATURES: u64 = 0x10;
    const DEVICE_FEATURES_SEL: u64 = 0x14;
    const DRIVER_FEATURES: u64 = 0x20;
    const DRIVER_FEATURES_SEL: u64 = 0x24;
    const QUEUE_SEL: u64 = 0x30;
    const QUEUE_SIZE_MAX: u64 = 0x34;
    const QUEUE_SIZE: u64 = 0x38;
    const QUEUE_READY: u64 = 0x44;
    const INTERRUPT_STATUS: u64 = 0x60;
    const INTERRUPT_ACK: u64 = 0x64;
    const STATUS: u64 = 0x70;
    const GENERATION: u64 = 0xfc;

    /// A guest's view of a device.
    struct Guest {
        device: MmioTransport,
        fake: FakeDevice,
    }

    impl Guest {
        fn new(script: Script) -> Self {
            let (device, fake) = connect(script);
            Self {
                device: MmioTransport::new(device.unwrap(), memory()).unwrap(),
                fake,
            }
        }

        fn get(&mut self, offset: u64) -> u32 {
            let mut data = [0xaa; 4];
            self.device.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn set(&mut self, offset: u64, value: u32) {
            self.device.write(offset, &value.to_le_bytes());
        }

        fn status(&mut self) -> u8 {
            u8::try_from(self.get(STATUS)).unwrap()
        }

        /// As Linux's `virtio_add_status`: reads, adds, writes.
        fn add_status(&mut self, bit: u8) {
            let status = self.get(STATUS);
            self.set(STATUS, status | u32::from(bit));
        }

        /// Up to `FEATURES_OK`, with all that is offered, as Linux does.
        fn negotiate(&mut self) {
            self.set(STATUS, 0);
            self.add_status(ACKNOWLEDGE);
            self.add_status(DRIVER);
            for word in [1, 0] {
                self.set(DEVICE_FEATURES_SEL, word);
                let features = self.get(DEVICE_FEATURES);
                self.set(DRIVER_FEATURES_SEL, word);
                self.set(DRIVER_FEATURES, features);
            }
            self.add_status(FEATURES_OK);
            assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        }

        /// As Linux's `vm_setup_vq`.
        fn set_up_queue(&mut self, index: u32) {
            self.set(QUEUE_SEL, index);
            assert_eq!(self.get(QUEUE_READY), 0);
            assert_eq!(self.get(QUEUE_SIZE_MAX), 128);
            self.set(QUEUE_SIZE, 64);
            for (register, value) in [
                (0x80, 0x1000),
                (0x84, 0),
                (0x90, 0x2000),
                (0x94, 1),
                (0xa0, 0x3000),
                (0xa4, 0),
            ] {
                self.set(register, value);
            }
            self.set(QUEUE_READY, 1);
            assert_eq!(self.get(QUEUE_READY), 1);
        }

        fn start(&mut self) {
            self.negotiate();
            for index in 0..2 {
                self.set_up_queue(index);
            }
            // Linux leaves the high half of the driver area in the second region of RAM here.
            self.add_status(DRIVER_OK);
        }

        fn requests(&self) -> Vec<u32> {
            self.fake
                .arrived()
                .iter()
                .map(|seen| seen.request)
                .collect()
        }

        fn interrupts(&self) -> u64 {
            self.device.line.0.read().unwrap_or(0)
        }
    }

    fn guest() -> Guest {
        Guest::new(Script::default())
    }

    /// RAM of the tests has its second region at 4 GiB, so 0x1_0000_2000 is inside.
    #[test]
    fn linux_finds_and_starts_the_device() {
        let mut guest = guest();
        assert_eq!(guest.get(MAGIC_VALUE).to_le_bytes(), *b"virt");
        assert_eq!((guest.get(0x04), guest.get(0x08)), (2, 2));
        guest.requests();
        guest.start();
        assert_eq!(
            guest.status(),
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        );
        let seen = guest.fake.arrived();
        let address = seen
            .iter()
            .find(|seen| seen.request == fake::SET_VRING_ADDR)
            .unwrap();
        assert_eq!(address.body[24..32], 0x1_0000_2000u64.to_le_bytes());
        let number = seen
            .iter()
            .find(|seen| seen.request == fake::SET_VRING_NUM)
            .unwrap();
        assert_eq!(number.body, [0, 0, 0, 0, 64, 0, 0, 0]);
        assert_eq!(guest.interrupts(), 0);
        // A second queue that does not exist ends the driver's search.
        guest.set(QUEUE_SEL, 2);
        assert_eq!((guest.get(QUEUE_SIZE_MAX), guest.get(QUEUE_READY)), (0, 0));
    }

    #[test]
    fn interrupt_status_names_used_buffers_whenever_the_driver_works() {
        let mut guest = guest();
        guest.negotiate();
        assert_eq!(guest.get(INTERRUPT_STATUS), 0);
        guest.set_up_queue(0);
        guest.add_status(DRIVER_OK);
        assert_eq!(guest.get(INTERRUPT_STATUS), 1);
        guest.set(INTERRUPT_ACK, 1);
        assert_eq!(guest.get(INTERRUPT_STATUS), 1);
    }

    #[test]
    fn status_bits_come_in_order_or_not_at_all() {
        let mut guest = guest();
        for wrong in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | FEATURES_OK] {
            guest.set(STATUS, u32::from(wrong));
            assert_eq!(guest.status(), 0, "{wrong:#x}");
        }
        guest.set(STATUS, u32::from(ACKNOWLEDGE | FEATURES_OK));
        assert_eq!(guest.status(), ACKNOWLEDGE);
        guest.set(STATUS, u32::from(ACKNOWLEDGE | DRIVER | DRIVER_OK));
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
        // A bit is not taken back but by a reset.
        guest.set(STATUS, u32::from(ACKNOWLEDGE));
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
        // Reserved and device bits are not stored.
        guest.add_status(NEEDS_RESET | 16 | 32);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
        guest.set(STATUS, 0x100);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
        guest.add_status(FAILED);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FAILED);
        guest.add_status(FEATURES_OK);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FAILED);
        guest.set(STATUS, 0);
        assert_eq!(guest.status(), 0);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        for (word, value) in [
            (0, 1 << 5),
            (0, 1 << 30),
            (1, 1 | 1 << 6),
            (2, 1),
            (3, 1 << 31),
        ] {
            let mut guest = guest();
            guest.add_status(ACKNOWLEDGE);
            guest.add_status(DRIVER);
            guest.set(DRIVER_FEATURES_SEL, 1);
            guest.set(DRIVER_FEATURES, 1);
            guest.set(DRIVER_FEATURES_SEL, word);
            guest.set(DRIVER_FEATURES, value);
            guest.add_status(FEATURES_OK);
            assert_eq!(
                guest.status(),
                ACKNOWLEDGE | DRIVER,
                "word {word} {value:#x}"
            );
        }
        // A legacy driver, which does not know VERSION_1.
        let mut guest = guest();
        guest.add_status(ACKNOWLEDGE);
        guest.add_status(DRIVER);
        guest.set(DRIVER_FEATURES, 1 << 9);
        guest.add_status(FEATURES_OK);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
        // Second thoughts are allowed.
        guest.set(DRIVER_FEATURES_SEL, u32::MAX);
        guest.set(DRIVER_FEATURES, u32::MAX);
        guest.set(DRIVER_FEATURES_SEL, 1);
        guest.set(DRIVER_FEATURES, 1);
        guest.add_status(FEATURES_OK);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        // Not any more.
        guest.set(DRIVER_FEATURES, 0);
        assert_eq!(guest.device.core().state().driver_features[1], 1);
    }

    #[test]
    fn features_are_not_taken_before_the_driver_is_there() {
        let mut guest = guest();
        guest.set(DRIVER_FEATURES_SEL, 1);
        guest.set(DRIVER_FEATURES, 1);
        assert_eq!(guest.device.core().state().driver_features, [0; 4]);
        guest.set(DEVICE_FEATURES_SEL, 2);
        assert_eq!(guest.get(DEVICE_FEATURES), 0);
        guest.set(DEVICE_FEATURES_SEL, u32::MAX);
        assert_eq!(guest.get(DEVICE_FEATURES), 0);
    }

    #[test]
    fn queues_take_set_up_between_features_ok_and_driver_ok_only() {
        let mut guest = guest();
        let fresh = guest.device.core().state().queues.clone();
        let scribble = |guest: &mut Guest| {
            for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
                guest.set(register, 16);
            }
            guest.set(QUEUE_READY, 1);
        };
        scribble(&mut guest);
        assert_eq!(guest.device.core().state().queues, fresh);
        guest.start();
        let running = guest.device.core().state().queues.clone();
        guest.requests();
        scribble(&mut guest);
        guest.set(QUEUE_READY, 0);
        guest.set(QUEUE_SEL, u32::MAX);
        scribble(&mut guest);
        assert_eq!(guest.device.core().state().queues, running);
        assert!(guest.requests().is_empty());
    }

    #[test]
    fn queue_sizes_and_addresses_are_checked() {
        let mut guest = guest();
        guest.negotiate();
        for bad in [0, 3, 256, 0x1_0000, u32::MAX] {
            guest.set(QUEUE_SIZE, bad);
            assert_eq!(guest.device.core().queue().unwrap().size, 128, "{bad}");
        }
        for (register, value) in [(0x80, 8), (0x90, 1), (0xa0, 2)] {
            guest.set(register, value);
            guest.set(QUEUE_READY, 1);
            assert_eq!(guest.get(QUEUE_READY), 0);
            guest.set(register, 0);
        }
        guest.set(QUEUE_READY, 2);
        assert_eq!(guest.get(QUEUE_READY), 0);
        guest.set_up_queue(0);
        guest.set(0x80, 0x10);
        assert_eq!(
            guest.device.core().queue().unwrap().desc,
            0x1000,
            "ready queues stay"
        );
        guest.set(QUEUE_READY, 0);
        guest.set(0x80, 0x10);
        assert_eq!(guest.device.core().queue().unwrap().desc, 0x10);
    }

    #[test]
    fn a_queue_outside_of_ram_needs_a_reset_and_the_device_survives() {
        let mut guest = guest();
        guest.negotiate();
        guest.set_up_queue(0);
        guest.set(QUEUE_READY, 0);
        guest.set(0x84, 0xffff_ffff);
        guest.set(QUEUE_READY, 1);
        guest.add_status(DRIVER_OK);
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(guest.get(INTERRUPT_STATUS), 3);
        guest.start();
        assert_eq!(guest.status() & NEEDS_RESET, 0);
        assert_eq!(guest.get(INTERRUPT_STATUS), 1);
    }

    #[test]
    fn registers_take_aligned_32_bit_accesses_only() {
        let mut guest = guest();
        for (offset, len) in [
            (0, 1),
            (0, 2),
            (0, 8),
            (1, 4),
            (2, 2),
            (0x6e, 4),
            (0x70, 0),
            (0, 64),
        ] {
            let mut data = vec![0xaa; len];
            guest.device.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0), "{offset:#x}+{len}");
        }
        guest.add_status(ACKNOWLEDGE);
        guest.device.write(STATUS, &[0]);
        guest.device.write(STATUS, &[0; 8]);
        guest.device.write(STATUS + 1, &[0; 4]);
        guest.device.write(STATUS, &[]);
        assert_eq!(guest.status(), ACKNOWLEDGE);
        // Nothing is there, nothing happens.
        for offset in (0..0x100).step_by(4) {
            let _ = guest.get(offset);
        }
        for offset in [
            0x00, 0x04, 0x08, 0x0c, 0x10, 0x34, 0x54, 0x60, 0xac, 0xb0, 0xc0, 0xfc,
        ] {
            guest.set(offset, u32::MAX);
        }
        assert_eq!(guest.status(), ACKNOWLEDGE);
        assert_eq!(guest.get(0xb0), u32::MAX);
        assert_eq!(guest.get(0xc0), 0);
    }

    #[test]
    fn configuration_space_has_bounds_and_sizes() {
        let mut guest = guest();
        let config = 0x1122_3344_5566_7788u64.to_le_bytes();
        for len in [1, 2, 4, 8] {
            let mut data = vec![0xaa; len];
            guest.device.read(CONFIG, &mut data);
            assert_eq!(data, config[..len]);
        }
        for (offset, len) in [
            (0x200, 4),
            (0x1fc, 8),
            (u64::MAX, 4),
            (u64::MAX - 1, 8),
            (CONFIG, 3),
        ] {
            let mut data = vec![0xaa; len];
            guest.device.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0), "{offset:#x}+{len}");
        }
        guest.requests();
        guest.device.write(CONFIG + 32, &[7]);
        assert!(guest.requests().is_empty(), "too early");
        guest.negotiate();
        let generation = guest.get(GENERATION);
        for (offset, len) in [
            (0x200, 1),
            (0x1fd, 4),
            (u64::MAX, 1),
            (CONFIG, 3),
            (CONFIG, 0),
        ] {
            guest.device.write(offset, &vec![9; len]);
        }
        assert!(guest.requests().is_empty());
        guest.device.write(CONFIG + 32, &[7]);
        assert_eq!(guest.requests(), [fake::SET_CONFIG, fake::GET_CONFIG]);
        let mut byte = [0];
        guest.device.read(CONFIG + 32, &mut byte);
        assert_eq!(byte, [7]);
        assert_ne!(guest.get(GENERATION), generation);
    }

    #[test]
    fn doorbells_lead_to_the_queue_or_nowhere() {
        let mut guest = guest();
        let doorbells: Vec<_> = guest
            .device
            .ioeventfds()
            .map(|(offset, value, _)| (offset, value))
            .collect();
        assert_eq!(doorbells, [(0x50, 0), (0x50, 1)]);
        assert_eq!(guest.device.irqfds().count(), 1);
        guest.set(QUEUE_NOTIFY, 0);
        assert!(
            guest.device.core().kicks()[0].read().is_err(),
            "not before DRIVER_OK"
        );
        guest.start();
        guest.set(QUEUE_NOTIFY, 1);
        guest.set(QUEUE_NOTIFY, 2);
        guest.set(QUEUE_NOTIFY, u32::MAX);
        assert!(guest.device.core().kicks()[0].read().is_err());
        assert_eq!(guest.device.core().kicks()[1].read().unwrap(), 1);
    }

    #[test]
    fn reset_by_the_driver_and_of_the_machine_stop_the_device() {
        for machine in [false, true] {
            let mut guest = guest();
            guest.start();
            guest.set(QUEUE_NOTIFY, 0);
            guest.requests();
            if machine {
                guest.device.reset();
            } else {
                guest.set(STATUS, 0);
            }
            assert_eq!(
                guest.requests(),
                [
                    fake::GET_VRING_BASE,
                    fake::GET_VRING_BASE,
                    fake::RESET_DEVICE
                ]
            );
            assert_eq!(guest.status(), 0);
            assert_eq!(guest.get(INTERRUPT_STATUS), 0);
            assert!(
                guest.device.core().kicks()[0].read().is_err(),
                "stale doorbell"
            );
            assert!(
                guest
                    .device
                    .core()
                    .state()
                    .queues
                    .iter()
                    .all(|queue| !queue.ready)
            );
            guest.start();
            assert_eq!(
                guest.status(),
                ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
            );
        }
    }

    /// The main loop is woken by a complaint, and gets hold of the device only after the driver has reset it.
    #[test]
    fn a_complaint_about_queues_that_are_gone_is_none() {
        let mut guest = guest();
        guest.start();
        let seen = guest.fake.arrived();
        let error = seen
            .iter()
            .find(|seen| seen.request == fake::SET_VRING_ERR)
            .unwrap();
        nix::unistd::write(&error.fds[0], &1u64.to_ne_bytes()).unwrap();
        guest.start();
        guest.device.device_error();
        assert_eq!(guest.status() & NEEDS_RESET, 0);
        assert_eq!(guest.interrupts(), 0);
    }

    #[test]
    fn a_broken_ring_needs_a_reset() {
        let mut guest = guest();
        guest.device.device_error();
        assert_eq!((guest.status(), guest.interrupts()), (0, 0));
        guest.start();
        // As the device process does.
        let seen = guest.fake.arrived();
        let error = seen
            .iter()
            .find(|seen| seen.request == fake::SET_VRING_ERR)
            .unwrap();
        nix::unistd::write(&error.fds[0], &1u64.to_ne_bytes()).unwrap();
        guest.device.device_error();
        guest.device.device_error();
        assert!(guest.device.error_event().read().is_err(), "quiet again");
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(guest.interrupts(), 1, "one complaint, one interrupt");
        assert_eq!(guest.get(INTERRUPT_STATUS), 3);
        guest.set(INTERRUPT_ACK, 2);
        assert_eq!(guest.get(INTERRUPT_STATUS), 1);
        // Linux writes back what it reads when it resets and starts again.
        guest.start();
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }

    const RUNNING: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

    #[test]
    fn a_device_that_is_given_up_needs_a_reset_and_never_comes_back_by_itself() {
        let mut guest = guest();
        guest.start();
        guest.device.device_lost();
        let failed = RUNNING | NEEDS_RESET;
        assert_eq!((guest.status(), guest.interrupts()), (failed, 1));
        guest.start();
        assert_eq!((guest.status(), guest.interrupts()), (failed, 1));
        assert!(guest.device.core().device().is_failed());
    }

    #[test]
    fn a_process_that_dies_at_work_is_replaced_and_the_driver_sees_one_more_interrupt() {
        let protocol = fake::PROTOCOL | 1 << 12;
        let script = Script {
            protocol,
            ..Script::default()
        };
        let mut guest = Guest::new(script.clone());
        guest.start();
        let file_of = |seen: &[fake::Seen]| {
            let given = seen
                .iter()
                .find(|seen| seen.request == fake::SET_INFLIGHT_FD)
                .unwrap();
            nix::sys::stat::fstat(&given.fds[0]).unwrap().st_ino
        };
        let first = file_of(&guest.fake.arrived());
        guest.device.device_gone();
        assert_eq!((guest.status(), guest.interrupts()), (RUNNING, 0));
        guest.set(QUEUE_NOTIFY, 1);
        let generation = guest.get(GENERATION);
        let (fresh, second) = connect(script);
        assert!(guest.device.device_back(fresh.unwrap()).unwrap());
        let seen = second.arrived();
        assert_eq!(
            file_of(&seen),
            first,
            "the in-flight region outlives its maker"
        );
        assert!(
            !seen
                .iter()
                .any(|seen| seen.request == fake::GET_INFLIGHT_FD)
        );
        let started = seen
            .iter()
            .filter(|seen| seen.request == fake::SET_VRING_ENABLE);
        assert_eq!(started.count(), 2);
        assert_eq!((guest.status(), guest.interrupts()), (RUNNING, 2));
        assert_eq!(guest.get(GENERATION), generation);
        let kicks: Vec<u64> = guest
            .device
            .core()
            .kicks()
            .iter()
            .map(|kick| kick.read().unwrap())
            .collect();
        assert_eq!(
            kicks,
            [1, 2],
            "nothing waits for a doorbell that the dead process took"
        );
    }

    #[test]
    fn a_driver_may_start_and_reset_while_no_process_is_there() {
        let mut guest = guest();
        guest.device.device_gone();
        guest.start();
        guest.set(STATUS, 0);
        assert_eq!(guest.status(), 0);
        guest.start();
        assert_eq!((guest.status(), guest.interrupts()), (RUNNING, 0));
        let mut script = Script::default();
        script.config[0] ^= 1;
        let (fresh, second) = connect(script);
        assert!(guest.device.device_back(fresh.unwrap()).unwrap());
        let started = second
            .arrived()
            .iter()
            .filter(|seen| seen.request == fake::SET_VRING_KICK)
            .count();
        assert_eq!(started, 2);
        assert_eq!(
            guest.get(INTERRUPT_STATUS),
            3,
            "the configuration changed meanwhile"
        );
    }

    #[test]
    fn another_process_must_offer_the_same() {
        for (features, protocol) in [
            (fake::FEATURES | 1 << 10, fake::PROTOCOL),
            (fake::FEATURES, fake::PROTOCOL | 1 << 12),
        ] {
            let mut guest = guest();
            guest.start();
            guest.device.device_gone();
            let (fresh, _fake) = connect(Script {
                features,
                protocol,
                ..Script::default()
            });
            let refused = guest.device.device_back(fresh.unwrap());
            assert!(
                matches!(refused, Err(RemoteError::Changed { .. })),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn a_process_that_fails_at_activation_is_reported_and_not_the_driver() {
        let script = Script {
            misdeed: Some((fake::SET_VRING_KICK, Misdeed::Close)),
            ..Script::default()
        };
        let mut guest = Guest::new(script);
        guest.start();
        assert_eq!((guest.status(), guest.interrupts()), (RUNNING, 0));
        let attention = guest.device.attention().clone();
        assert!(attention.take());
        attention.ended();
        guest.device.device_gone();
        let (fresh, _second) = connect(Script::default());
        assert!(guest.device.device_back(fresh.unwrap()).unwrap());
        assert!(!attention.take());
    }

    #[test]
    fn a_reset_lasts_until_a_process_that_keeps_its_queues_is_gone() {
        let script = Script {
            misdeed: Some((fake::GET_VRING_BASE, Misdeed::Close)),
            ..Script::default()
        };
        let mut guest = Guest::new(script);
        guest.start();
        let attention = guest.device.attention().clone();
        let (told, waits) = std::sync::mpsc::channel();
        let main_loop = std::thread::spawn(move || {
            let mut polled = [nix::poll::PollFd::new(
                super::super::remote::borrow(attention.event()),
                nix::poll::PollFlags::POLLIN,
            )];
            nix::poll::poll(&mut polled, nix::poll::PollTimeout::NONE).unwrap();
            assert!(attention.take());
            told.send(()).unwrap();
            attention.ended();
        });
        guest.set(STATUS, 0);
        assert!(waits.try_recv().is_ok(), "the write returned first");
        assert_eq!(guest.status(), 0);
        main_loop.join().unwrap();
    }

    #[test]
    fn the_state_is_plain_data() {
        let mut guest = guest();
        guest.start();
        let state = guest.device.core().state();
        let text = serde_json::to_string(state).unwrap();
        let back: super::super::core::CoreState = serde_json::from_str(&text).unwrap();
        assert_eq!(&back, state);
    }

    /// Every register, every byte pattern that a careless or evil driver may try, in a long pseudo-random order.
    #[test]
    fn no_sequence_of_accesses_panics_or_unfreezes_a_queue() {
        let mut guest = guest();
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        let mut frozen = None;
        for _ in 0..20_000 {
            let r = next();
            let offset = if r & 7 == 0 {
                next() % 0x280
            } else {
                (r >> 8) % 0x41 * 4
            };
            let len = [4, 4, 4, 4, 1, 2, 8, 3][(r >> 32) as usize & 7];
            let value = match (r >> 40) & 7 {
                0 => next(),
                1 => 0,
                2 | 3 => next() & 0xf,
                4 => 1,
                5 => 15,
                6 => next() & 0xff,
                _ => 0x1000,
            };
            if r & 0x80 == 0 {
                guest.device.write(offset, &value.to_le_bytes()[..len]);
            } else {
                guest.device.read(offset, &mut vec![0; len]);
            }
            let core = guest.device.core();
            match (&frozen, core.is_running()) {
                (Some(queues), true) => assert_eq!(queues, &core.state().queues),
                (None, true) => frozen = Some(core.state().queues.clone()),
                (_, false) => frozen = None,
            }
        }
    }
}
