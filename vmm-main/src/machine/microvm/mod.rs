//! Machine `microvm` for x86_64: virtio-mmio devices and a serial port, no PCI, no firmware.
//!
//! Job: put VM, RAM, vCPUs, platform devices and virtio windows together; load the kernel; start, pause, resume and
//! reset as one.
//! Who is not trusted: the guest. The virtio devices behind the windows are given by the caller as [`BusDevice`]s.
//!
//! How the guest learns of its devices. Each present window is described twice: in ACPI as `LNRO0005`, and on the
//! kernel command line as `virtio_mmio.device=4K@BASE:GSI`. A distribution kernel has ACPI and ignores the parameter
//! (`CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES` is off); a small kernel without ACPI needs it, and the MP table. A kernel
//! built with both finds each window twice: ACPI's devices are scanned first (subsys initcall) and get the driver;
//! the second probe of the same window fails to claim its memory with EBUSY and leaves a line in the kernel log.
//! Firecracker describes its devices in the same two ways and documents the same line. The alternative, to leave the
//! parameter out, would take its disk from a kernel that cannot be asked beforehand which kind it is.
//! Why this way: the order below is the only one that works, so it is code here and not advice to the caller:
//! devices stop before RAM is emptied, state is restored before the kernel is loaded, vCPUs go before the VM.
//!
//! ```text
//! Kvm::open, Vm::create ─┐
//! GuestRam::new ─────────┴> Microvm::new ─> attach_mmio* ─> load ─> start ─> resume <─> pause
//!                                                                     └ event Reset ─> reset ─> resume
//! ```

mod snapshot;

use std::sync::{Arc, Mutex};

use nix::unistd::Pid;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::bus::{self, Bus, BusDevice, SharedDevice};
use super::events::{self, EventReceiver, EventSender, VmEvent};
use super::layout;
use crate::boot::{self, BootSource, Loaded};
use crate::kvm::cpuid::{CpuFeatures, CpuidLeaf, CpuidTemplate};
use crate::kvm::processor::Processor;
use crate::kvm::run::{IoHandler, StopSink, ThreadStart, VcpuStop};
use crate::kvm::state::{VcpuState, VmState, msr_list};
use crate::kvm::{self, Kvm, RegisterDump, Topology, VcpuThreads, Vm, regs};
use crate::memory::{self, GuestRam};
use crate::platform::acpi::{self, VirtioWindow};
use crate::platform::generation::Generation;
use crate::platform::i8042::I8042;
use crate::platform::mptable;
use crate::platform::numa::Numa;
use crate::platform::power::{self, PowerButton, PowerControl, PowerPorts};
use crate::platform::rtc::Rtc;
use crate::platform::serial::{SerialInput, SerialPort, SerialSink};
use crate::platform::slots::Slots;
use crate::virtio::window::{self, Window, Windows};

pub use snapshot::MachineState;

/// Most devices that a user can create on this machine.
pub const MMIO_SLOTS: usize = layout::VIRTIO_MMIO_GSIS.len();

/// What can go wrong with the machine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the message of each variant says all there is to say
pub enum Error {
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Boot(#[from] boot::Error),
    #[error(transparent)]
    Bus(#[from] bus::Error),
    #[error("cannot make an eventfd for {purpose}")]
    EventFd {
        purpose: &'static str,
        source: std::io::Error,
    },
    #[error("microvm has no mmio slot {slot}: it takes at most {MMIO_SLOTS} devices, in slots 0 to {}", MMIO_SLOTS - 1)]
    Slot { slot: usize },
    #[error("mmio slot {slot} is taken")]
    SlotTaken { slot: usize },
    #[error("the generation id cannot be made or told")]
    Generation(#[source] std::io::Error),
    #[error(transparent)]
    Window(#[from] window::WindowError),
    #[error("cannot press the power button")]
    PowerButton(#[source] std::io::Error),
    #[error("cannot write {what} to guest RAM")]
    Tables {
        what: &'static str,
        source: vm_memory::GuestMemoryError,
    },
    #[error("APIC id {0} does not fit 8 bits")]
    ApicId(u32),
    #[error("the state of {what} in the snapshot is not one that this machine can have")]
    State { what: &'static str },
}

/// What the machine is made of, apart from VM and RAM.
pub struct MicrovmConfig {
    /// Number and grouping of vCPUs.
    pub topology: Topology,
    /// Changes to the processor.
    pub features: CpuFeatures,
    /// Where the serial port's output goes; without, the machine has no serial port.
    pub serial: Option<Box<dyn SerialSink>>,
    /// Which of its parts belong together, if the guest is to know of nodes.
    pub numa: Option<Numa>,
}

impl std::fmt::Debug for MicrovmConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MicrovmConfig")
            .field("topology", &self.topology)
            .field("features", &self.features)
            .field("serial", &self.serial.is_some())
            .field("numa", &self.numa)
            .finish()
    }
}

/// A virtio-mmio window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    /// Number, 0 to [`MMIO_SLOTS`] - 1.
    pub index: usize,
    /// Guest-physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Line for [`Vm::register_irqfd`], edge triggered.
    pub gsi: u32,
}

/// All windows, in order. The lower ones have lines that no ISA device ever used.
#[must_use]
pub fn mmio_slots() -> [MmioSlot; MMIO_SLOTS] {
    std::array::from_fn(|index| MmioSlot {
        index,
        base: layout::VIRTIO_MMIO_BASE + index as u64 * layout::VIRTIO_MMIO_SIZE,
        size: layout::VIRTIO_MMIO_SIZE,
        gsi: layout::VIRTIO_MMIO_GSIS[index],
    })
}

/// Both address spaces of the guest.
#[derive(Debug, Default)]
struct Buses {
    pio: Bus,
    mmio: Bus,
}

impl IoHandler for Buses {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(port.into(), data);
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }
}

/// The machine. Dropping it stops the vCPU threads.
#[derive(Debug)]
pub struct Microvm {
    // vCPUs go first, then what they use; see `Vm::map_ram`.
    vcpus: VcpuThreads,
    buses: Arc<Buses>,
    vm: Arc<Vm>,
    ram: Arc<GuestRam>,
    topology: Topology,
    numa: Option<Numa>,
    cpuid: CpuidTemplate,
    windows: [bool; MMIO_SLOTS],
    /// Windows that may get a device later are described to the guest.
    offers_slots: bool,
    slots: Slots,
    boot: Option<BootSource>,
    serial: Option<SerialPort>,
    button: PowerButton,
    keyboard: Arc<Mutex<I8042>>,
    generation: Generation,
    clock: Arc<Mutex<Rtc>>,
    events: EventSender,
    receiver: Option<EventReceiver>,
    new_vm: VmState,
    new_vcpus: Vec<VcpuState>,
    /// MSRs that KVM lists for this host.
    msrs: Vec<u32>,
    /// What the boot processor says of itself.
    processor: Vec<CpuidLeaf>,
}

impl Microvm {
    /// Puts the machine together: RAM in the VM, vCPUs with their CPUID, platform devices. Nothing runs.
    ///
    /// # Errors
    /// KVM refuses something, or no eventfds are left.
    pub fn new(
        kvm: &Kvm,
        vm: Vm,
        ram: Arc<GuestRam>,
        config: MicrovmConfig,
    ) -> Result<Self, Error> {
        let topology = config.topology;
        let max = kvm.fd().get_max_vcpus();
        if topology.cpus() as usize > max {
            return Err(kvm::Error::TooManyVcpus {
                wanted: topology.cpus(),
                max,
            }
            .into());
        }
        let (events, receiver) = events::channel().map_err(eventfd_error("events"))?;
        let cpuid = CpuidTemplate::new(kvm, topology, config.features)?;
        vm.map_ram(&ram)?;
        vm.add_interrupt_controllers()?;
        let new_vm = VmState::save(&vm)?;
        let Vcpus {
            fds,
            states: new_vcpus,
            msrs,
            processor,
        } = create_vcpus(kvm, &vm, &cpuid, topology)?;
        let vcpus = VcpuThreads::new(fds);

        let control = PowerControl::new(vcpus.gate(), events.clone());
        let button = PowerButton::new(irq_line(&vm, layout::GED_GSI, "the power button")?);
        let generation =
            Generation::new(irq_line(&vm, layout::GENERATION_GSI, "the generation id")?)
                .map_err(Error::Generation)?;
        let buses = Arc::new(Buses::default());
        let pio = |port: u16, ports: u16, device: SharedDevice| {
            buses.pio.add(port.into(), ports.into(), device)
        };
        pio(
            layout::POWER_PORT,
            layout::POWER_PORTS,
            Arc::new(Mutex::new(PowerPorts::new(control.clone(), button.clone()))),
        )?;
        let slots = Slots::new(irq_line(&vm, layout::GED_GSI, "the slots")?);
        pio(
            layout::SLOT_PORT,
            layout::SLOT_PORTS,
            Arc::new(Mutex::new(slots.clone())),
        )?;
        let keyboard_line = irq_line(&vm, layout::I8042_GSI, "the keyboard controller")?;
        let keyboard = Arc::new(Mutex::new(I8042::new(control, keyboard_line)));
        pio(layout::I8042_PORT, layout::I8042_PORTS, keyboard.clone())?;
        let clock = Arc::new(Mutex::new(Rtc::default()));
        pio(layout::RTC_PORT, layout::RTC_PORTS, clock.clone())?;
        let mut machine = Self {
            vcpus,
            buses,
            vm: Arc::new(vm),
            ram,
            topology,
            numa: config.numa,
            cpuid,
            windows: [false; MMIO_SLOTS],
            offers_slots: false,
            slots,
            boot: None,
            serial: None,
            button,
            keyboard,
            generation,
            clock,
            events,
            receiver: Some(receiver),
            new_vm,
            new_vcpus,
            msrs,
            processor,
        };
        if let Some(sink) = config.serial {
            machine.add_serial(sink)?;
        }
        Ok(machine)
    }

    /// Adds the serial port, whose output goes to `sink`, to a machine that was made without. Comes before
    /// [`Self::load`]. For callers that can put the machine together before they have the port's other end.
    ///
    /// # Errors
    /// There is one already, or no eventfds are left.
    pub fn add_serial(&mut self, sink: Box<dyn SerialSink>) -> Result<(), Error> {
        let line = irq_line(&self.vm, layout::SERIAL_GSI, "the serial port")?;
        let port = SerialPort::new(line, sink).map_err(eventfd_error("the serial port"))?;
        let device = Arc::new(Mutex::new(port.clone()));
        self.buses.pio.add(
            layout::SERIAL_PORT.into(),
            layout::SERIAL_PORTS.into(),
            device,
        )?;
        self.serial = Some(port);
        Ok(())
    }

    /// The VM, for eventfds and lines.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The guest's processor, in words.
    #[must_use]
    pub fn described_processor(&self) -> Processor {
        self.cpuid.processor()
    }

    /// The guest's RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Number and grouping of vCPUs.
    #[must_use]
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The serial port's input side, if the machine has one.
    #[must_use]
    pub fn serial_input(&self) -> Option<SerialInput> {
        self.serial.as_ref().map(SerialPort::input)
    }

    /// The receiver of this machine's events; `Some` the first time.
    pub fn take_events(&mut self) -> Option<EventReceiver> {
        self.receiver.take()
    }

    /// Puts a device behind window `slot`. It is described to the guest by the next [`Self::load`] or [`Self::reset`].
    ///
    /// # Errors
    /// There is no such slot, or it is taken.
    pub fn attach_mmio(
        &mut self,
        slot: usize,
        device: Arc<Mutex<dyn BusDevice + Send>>,
    ) -> Result<MmioSlot, Error> {
        let window = *mmio_slots().get(slot).ok_or(Error::Slot { slot })?;
        if self.windows[slot] {
            return Err(Error::SlotTaken { slot });
        }
        self.buses.mmio.add(window.base, window.size, device)?;
        self.windows[slot] = true;
        Ok(window)
    }

    /// Puts a window of `len` bytes behind those that there are, above all RAM, for device `id`.
    ///
    /// # Errors
    /// No addresses are left, or KVM refuses.
    pub fn add_window(
        &mut self,
        windows: &mut Windows,
        id: &str,
        len: u64,
    ) -> Result<Arc<Window>, Error> {
        let ram = self.ram.regions().count();
        let end = self.ram.regions().map(|one| one.guest_address + one.size);
        let guest = windows
            .end()
            .unwrap_or_else(|| layout::first_window(end.max().unwrap_or(0)));
        let slot = (ram + windows.len()) as u32;
        let window = windows.add(id, guest, len)?;
        self.vm.map_window(slot, &window)?;
        Ok(window)
    }

    /// Describes windows without a device as slots that may get one while the guest runs. Comes before [`Self::load`].
    pub fn offer_slots(&mut self) {
        self.offers_slots = true;
    }

    /// Tells the guest that the device behind window `slot` is new. Comes after [`Self::attach_mmio`], once the device's
    /// eventfds are in place.
    ///
    /// # Errors
    /// The line cannot be raised.
    pub fn announce_mmio(&self, slot: usize) -> Result<(), Error> {
        self.slots
            .plug(slot as u8)
            .map_err(eventfd_error("the slots"))
    }

    /// Takes back an [`Self::attach_mmio`] that the guest was not told of.
    pub fn detach_mmio(&mut self, slot: usize) {
        if let Some(window) = mmio_slots().get(slot) {
            self.buses.mmio.remove(window.base);
            self.windows[slot] = false;
        }
    }

    /// The device behind window `slot` is to go: the guest is asked to let go of it, and from the next [`Self::reset`] on
    /// it is not described any more. Its registers stay where they are until then.
    ///
    /// # Errors
    /// The line cannot be raised.
    pub fn retire_mmio(&mut self, slot: usize) -> Result<(), Error> {
        if let Some(window) = self.windows.get_mut(slot) {
            *window = false;
        }
        self.slots
            .eject(slot as u8)
            .map_err(eventfd_error("the slots"))
    }

    /// A device is behind the registers of window `slot` again, which [`Self::retire_mmio`] left in place.
    pub fn revive_mmio(&mut self, slot: usize) {
        if let Some(window) = self.windows.get_mut(slot) {
            *window = true;
        }
    }

    /// Loads the kernel and describes the machine to it. Keeps `source` for resets.
    ///
    /// # Errors
    /// The kernel cannot be loaded; see [`boot::Error`].
    pub fn load(&mut self, source: BootSource) -> Result<Loaded, Error> {
        self.boot = Some(source);
        self.write_guest()
    }

    /// Starts the vCPU threads. Each calls `on_start` with its number (to install its filter, say) and waits for
    /// [`Self::resume`]. Returns without waiting for them; a failure of `on_start` becomes [`VmEvent::VcpuError`].
    ///
    /// # Errors
    /// A thread cannot be created, or this was called before.
    pub fn start(&mut self, on_start: &ThreadStart) -> Result<(), Error> {
        let events = self.events.clone();
        let stop: StopSink = Arc::new(move |vcpu, reason| events.send(event_of(vcpu, reason)));
        let io: Arc<dyn IoHandler> = self.buses.clone();
        Ok(self.vcpus.start(&io, on_start, &stop)?)
    }

    /// Lets the guest run, also after it stopped itself.
    ///
    /// # Errors
    /// [`Self::start`] has not been called.
    pub fn resume(&mut self) -> Result<(), Error> {
        Ok(self.vcpus.resume()?)
    }

    /// Stops the guest; returns when no vCPU runs. Must not be called on a vCPU thread.
    ///
    /// # Errors
    /// None at present; the type leaves room.
    pub fn pause(&self) -> Result<(), Error> {
        Ok(self.vcpus.pause()?)
    }

    /// Brings the machine back to the state before its first [`Self::resume`], in place: pauses, resets all devices,
    /// empties RAM, restores KVM's state, loads the kernel again. Leaves it paused. Events sent before are dropped.
    ///
    /// # Errors
    /// A step failed; the machine is then of no more use.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.vcpus.pause()?;
        self.buses.mmio.reset();
        self.buses.pio.reset();
        self.events.start_new_life();
        self.ram.zero()?;
        self.new_vm.restore(&self.vm)?;
        let new_vcpus = &self.new_vcpus;
        self.vcpus
            .for_each(|index, vcpu| match new_vcpus.get(index as usize) {
                Some(state) => state.restore(vcpu, index),
                None => Ok(()),
            })?;
        if self.boot.is_some() {
            self.write_guest()?;
        }
        Ok(())
    }

    /// Thread ids of the vCPUs, in order; waits until all threads have started.
    ///
    /// # Errors
    /// [`Self::start`] has not been called.
    pub fn vcpu_thread_ids(&self) -> Result<Vec<Pid>, Error> {
        Ok(self.vcpus.thread_ids()?)
    }

    /// The registers of all vCPUs, in order. The guest must be paused.
    ///
    /// # Errors
    /// The guest runs, or KVM refuses.
    pub fn registers(&self) -> Result<Vec<RegisterDump>, Error> {
        let mut dumps = Vec::with_capacity(self.topology.cpus() as usize);
        self.vcpus.for_each(|index, vcpu| {
            dumps.push(RegisterDump::read(vcpu, index)?);
            Ok(())
        })?;
        Ok(dumps)
    }

    /// Presses the power button; a guest with ACPI and a button driver shuts down.
    ///
    /// # Errors
    /// The event cannot be raised.
    pub fn power_button(&self) -> Result<(), Error> {
        self.button.press().map_err(Error::PowerButton)
    }

    /// The power button, for a thread that has not the machine.
    #[must_use]
    pub fn power_button_handle(&self) -> PowerButton {
        self.button.clone()
    }

    /// Kernel, tables and boot registers, into RAM that reads as zero.
    fn write_guest(&mut self) -> Result<Loaded, Error> {
        let (windows, free): (Vec<_>, Vec<_>) = mmio_slots()
            .into_iter()
            .map(|slot| VirtioWindow {
                slot: slot.index as u8,
                base: slot.base,
                size: slot.size,
                gsi: slot.gsi,
            })
            .partition(|window| self.windows[usize::from(window.slot)]);
        let slots: &[VirtioWindow] = if self.offers_slots { &free } else { &[] };
        let parameters: Vec<_> = windows
            .iter()
            .map(|window| {
                format!(
                    "virtio_mmio.device={}K@{:#x}:{}",
                    window.size >> 10,
                    window.base,
                    window.gsi
                )
            })
            .collect();
        let Some(source) = self.boot.as_mut() else {
            return Err(boot::Error::Format("not given").into());
        };
        let loaded = boot::load(&self.ram, source, &parameters)?;

        let apic_ids = self
            .topology
            .apic_ids()
            .map(|id| u8::try_from(id).map_err(|_| Error::ApicId(id)))
            .collect::<Result<Vec<_>, _>>()?;
        // Free: `Topology` keeps all ids below 254.
        let io_apic_id = apic_ids.iter().max().map_or(0, |id| id + 1);
        let description = acpi::Description {
            apic_ids: &apic_ids,
            io_apic_id,
            windows: &windows,
            slots,
            serial: self.serial.is_some(),
            numa: self.numa.as_ref(),
        };
        self.write(
            &acpi::build(layout::ACPI_RSDP, &description),
            layout::ACPI_RSDP,
            "the ACPI tables",
        )?;
        let (signature, features) = self.cpuid.signature_and_features();
        let table = mptable::build(
            layout::MP_TABLE as u32,
            &apic_ids,
            io_apic_id,
            signature,
            features,
        );
        self.write(&table, layout::MP_TABLE, "the MP table")?;

        self.write_generation()?;
        self.write(
            &power::reset_vector(),
            layout::RESET_VECTOR,
            "the reset vector",
        )?;

        let new_vcpus = &self.new_vcpus;
        self.vcpus
            .for_each(|index, vcpu| match (index, new_vcpus.first()) {
                (0, Some(new)) => {
                    loaded
                        .registers
                        .set(vcpu, new, layout::BOOT_GDT, layout::BOOT_IDT)
                }
                // All others wait for the boot processor's start-up message.
                _ => Ok(()),
            })?;
        Ok(loaded)
    }

    fn write_generation(&self) -> Result<(), Error> {
        let id = self.generation.id();
        self.write(&id, layout::GENERATION_ID, "the generation id")
    }

    fn write(&self, bytes: &[u8], address: u64, what: &'static str) -> Result<(), Error> {
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| Error::Tables { what, source })
    }
}

fn eventfd_error(purpose: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::EventFd { purpose, source }
}

/// An eventfd that raises `gsi`.
fn irq_line(vm: &Vm, gsi: u32, purpose: &'static str) -> Result<EventFd, Error> {
    let line =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(eventfd_error(purpose))?;
    vm.register_irqfd(&line, gsi)?;
    Ok(line)
}

/// New vCPUs with what is known of them.
struct Vcpus {
    fds: Vec<kvm_ioctls::VcpuFd>,
    states: Vec<VcpuState>,
    msrs: Vec<u32>,
    processor: Vec<CpuidLeaf>,
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &Vm,
    cpuid: &CpuidTemplate,
    topology: Topology,
) -> Result<Vcpus, Error> {
    let msrs = msr_list(kvm)?;
    let mut fds = Vec::with_capacity(topology.cpus() as usize);
    let mut states = Vec::with_capacity(topology.cpus() as usize);
    let mut tsc_khz = None;
    let mut processor = Vec::new();
    for (index, apic_id) in (0u32..).zip(topology.apic_ids()) {
        let call = |call| {
            move |source| kvm::Error::VcpuCall {
                call,
                vcpu: index,
                source,
            }
        };
        let vcpu = vm.create_vcpu(apic_id)?;
        if index == 0 {
            // An error means that KVM does not know it; the guest then measures.
            tsc_khz = vcpu.get_tsc_khz().ok().filter(|khz| *khz != 0);
        }
        let leaves = cpuid.for_vcpu(index, tsc_khz)?;
        if index == 0 {
            processor = leaves.as_slice().iter().map(Into::into).collect();
        }
        vcpu.set_cpuid2(&leaves).map_err(call("KVM_SET_CPUID2"))?;
        regs::set_boot_msrs(&vcpu, index)?;
        let mut lapic = vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
        regs::set_local_lines(&mut lapic);
        vcpu.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))?;
        states.push(VcpuState::save(&vcpu, index, lapic, &msrs)?);
        fds.push(vcpu);
    }
    Ok(Vcpus {
        fds,
        states,
        msrs: msrs.as_slice().to_vec(),
        processor,
    })
}

fn event_of(vcpu: u32, reason: VcpuStop) -> VmEvent {
    match reason {
        VcpuStop::TripleFault(registers) => VmEvent::TripleFault { registers },
        VcpuStop::InternalError {
            suberror,
            data,
            registers,
        } => VmEvent::InternalError {
            suberror,
            data,
            registers,
        },
        VcpuStop::FailEntry { reason, registers } => VmEvent::FailEntry { reason, registers },
        VcpuStop::SystemEvent(1) => VmEvent::Shutdown,
        VcpuStop::SystemEvent(2) => VmEvent::Reset,
        VcpuStop::SystemEvent(kind) => VmEvent::VcpuError {
            vcpu,
            message: format!("the guest raised system event {kind}"),
        },
        VcpuStop::Fault(message) => VmEvent::MemoryFault { vcpu, message },
        VcpuStop::Error(message) => VmEvent::VcpuError { vcpu, message },
    }
}
