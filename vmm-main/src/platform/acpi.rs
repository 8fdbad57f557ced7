//! ACPI tables of a machine without firmware.
//!
//! Job: RSDP, XSDT, FADT, MADT, DSDT, and with nodes SRAT and SLIT (ACPI 6.5), so that a stock kernel finds processors, devices and the ways to
//! power off and reset.
//! Who is not trusted: nobody; the input is this machine's own description.
//! Why this way: the hardware-reduced profile (4.1) needs no power-management chip and no SCI; sleep and reset are one
//! port each, events come through a generic event device. AML is built by acpi_tables, laid out here as one block.

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::numa::{self, Numa};
use super::{power, rtc, slots};
use crate::machine::layout;

const OEM: [u8; 6] = *b"STRATO";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// FADT `IAPC_BOOT_ARCH` bit 2: do not probe for VGA.
const NO_VGA: u16 = 1 << 2;

/// A virtio-mmio window that has a device behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioWindow {
    /// Number of the window, which becomes the device's name and `_UID`.
    pub slot: u8,
    /// Guest-physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Line, edge triggered.
    pub gsi: u32,
}

/// What the tables describe.
#[derive(Debug)]
pub struct Description<'a> {
    /// APIC ids of all processors, the boot processor first.
    pub apic_ids: &'a [u8],
    /// Id of the IOAPIC, distinct from all of the above.
    pub io_apic_id: u8,
    /// The devices.
    pub windows: &'a [VirtioWindow],
    /// Windows that may get a device while the guest runs.
    pub slots: &'a [VirtioWindow],
    /// Whether there is a serial port.
    pub serial: bool,
    /// Nodes, if the guest is to know of any.
    pub numa: Option<&'a Numa>,
}

/// All tables as one block whose first byte, the RSDP's, goes to `address` (16-byte aligned, below 4 GiB).
#[must_use]
pub fn build(address: u64, description: &Description<'_>) -> Vec<u8> {
    let mut block = vec![0; Rsdp::len()];
    let place = |block: &mut Vec<u8>, table: &dyn Aml| {
        block.resize(block.len().next_multiple_of(16), 0);
        let at = address + block.len() as u64;
        table.to_aml_bytes(block);
        at
    };
    block.resize(block.len().next_multiple_of(16), 0);
    let dsdt_at = address + block.len() as u64;
    block.extend_from_slice(dsdt(description).as_slice());
    let fadt_at = place(&mut block, &fadt(dsdt_at));
    let madt_at = place(&mut block, &madt(description));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    if let Some(numa) = description.numa {
        let empty = |signature, length, revision| {
            Sdt::new(signature, length, revision, OEM, OEM_TABLE, OEM_REVISION)
        };
        let srat = numa::srat(numa, description.apic_ids, empty);
        xsdt.add_entry(place(&mut block, &srat));
        xsdt.add_entry(place(&mut block, &numa::slit(numa, empty)));
    }
    let xsdt_at = place(&mut block, &xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt_at).to_aml_bytes(&mut rsdp);
    block[..rsdp.len()].copy_from_slice(&rsdp);
    block
}

fn port(offset: u64) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(layout::POWER_PORT) + offset,
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // Power and sleep buttons, if any, are devices in the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = NO_VGA.into();
    fadt.century = rtc::CENTURY;
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"STRATOVR").into();
    fadt.finalize()
}

fn madt(description: &Description<'_>) -> MADT {
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LAPIC),
    );
    madt.add_structure(IoApic::new(description.io_apic_id, layout::IOAPIC, 0));
    for (uid, apic_id) in (0u8..).zip(description.apic_ids) {
        madt.add_structure(ProcessorLocalApic::new(
            uid,
            *apic_id,
            EnabledStatus::Enabled,
        ));
    }
    madt
}

/// One edge-triggered, active-high line, as AML's `Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive)`.
fn line(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(description: &Description<'_>) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    let mut code = Vec::new();
    let zero = aml::ZERO;
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&power::SLEEP_TYPE_S5, &zero, &zero, &zero]),
    )
    .to_aml_bytes(&mut code);
    let mut devices = Vec::new();
    processors(description, &mut devices);
    if description.serial {
        serial(&mut devices);
    }
    clock(&mut devices);
    events(description, &mut devices);
    if !description.slots.is_empty() {
        hotplug(description.slots, &mut devices);
    }
    generation(&mut devices);
    for window in description.windows {
        virtio(window, &mut devices);
    }
    code.extend_from_slice(&aml::Scope::raw("\\_SB_".into(), devices));
    dsdt.append_slice(&code);
    dsdt
}

/// Processor devices: Linux counts processors by the MADT, but names them (`/sys/devices/system/cpu/*/firmware_node`)
/// and lets drivers bind by these.
fn processors(description: &Description<'_>, out: &mut dyn AmlSink) {
    for uid in (0u8..).zip(description.apic_ids).map(|(uid, _)| uid) {
        aml::Device::new(
            format!("C{uid:03}").as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"ACPI0007"),
                &aml::Name::new("_UID".into(), &uid),
            ],
        )
        .to_aml_bytes(out);
    }
}

fn ports(first: u16, count: u16) -> aml::IO {
    aml::IO::new(first, first, 1, u8::try_from(count).unwrap_or(u8::MAX))
}

fn serial(out: &mut dyn AmlSink) {
    aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &line(layout::SERIAL_GSI),
                    &ports(layout::SERIAL_PORT, layout::SERIAL_PORTS),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn clock(out: &mut dyn AmlSink) {
    aml::Device::new(
        "RTC_".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0B00")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&ports(layout::RTC_PORT, layout::RTC_PORTS)]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// The power button, and the generic event device whose method finds out that it was pressed, or that slots changed.
fn events(description: &Description<'_>, out: &mut dyn AmlSink) {
    aml::Device::new(
        "PWRB".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
        ],
    )
    .to_aml_bytes(out);
    let status: Path = "ESTS".into();
    // Reading clears it, so read once.
    let store = aml::Store::new(&aml::Local(0), &status);
    let masked = aml::And::new(&aml::Local(1), &aml::Local(0), &power::EVENT_POWER_BUTTON);
    let button = Path::new("\\_SB_.PWRB");
    let press = aml::Notify::new(&button, &0x80u8);
    let pressed = aml::If::new(&aml::Local(1), vec![&press]);
    let scan = aml::MethodCall::new("\\_SB_.HPSC".into(), Vec::new());
    let mut actions: Vec<&dyn Aml> = vec![&store, &masked, &pressed];
    if !description.slots.is_empty() {
        actions.push(&scan);
    }
    aml::Device::new(
        "GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&line(layout::GED_GSI)]),
            ),
            &aml::OpRegion::new(
                "EREG".into(),
                aml::OpRegionSpace::SystemIO,
                &(u32::from(layout::POWER_PORT) + power::EVENT_STATUS as u32),
                &aml::ONE,
            ),
            &aml::Field::new(
                "EREG".into(),
                aml::FieldAccessType::Byte,
                aml::FieldLockRule::NoLock,
                aml::FieldUpdateRule::WriteAsZeroes,
                vec![aml::FieldEntry::Named(*b"ESTS", 8)],
            ),
            &aml::Method::new("_EVT".into(), 1, true, actions),
        ],
    )
    .to_aml_bytes(out);
}

/// The VM's generation id, and an event device for it alone: see [`super::generation`].
fn generation(out: &mut dyn AmlSink) {
    // Below 4 GiB, so the upper half of the address is zero.
    let (low, high) = (layout::GENERATION_ID as u32, aml::ZERO);
    aml::Device::new(
        "VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"STRA0001"),
            // The second name is the standard's; the first is its short form, which Linux knows as well.
            &aml::Name::new(
                "_CID".into(),
                &aml::Package::new(vec![&"VMGENCTR", &"VM_Gen_Counter"]),
            ),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(out);
    aml::Device::new(
        "GEDG".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&line(layout::GENERATION_GSI)]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// A window's bit in the registers of [`slots`].
const fn bit(window: &VirtioWindow) -> u16 {
    1 << window.slot
}

/// The registers of [`slots`], the method that notifies of what changed there, and a container a slot.
fn hotplug(windows: &[VirtioWindow], out: &mut dyn AmlSink) {
    let port = u32::from(layout::SLOT_PORT);
    aml::OpRegion::new(
        "HPRG".into(),
        aml::OpRegionSpace::SystemIO,
        &port,
        &(layout::SLOT_PORTS as u8),
    )
    .to_aml_bytes(out);
    // In the order of their offsets.
    const _: () = assert!(slots::PRESENT == 0 && slots::PLUGGED == 2);
    const _: () = assert!(slots::EJECT == 4 && slots::EJECTED == 6);
    aml::Field::new(
        "HPRG".into(),
        aml::FieldAccessType::Word,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::WriteAsZeroes,
        [*b"HPPR", *b"HPAD", *b"HPEJ", *b"HPDN"]
            .map(|name| aml::FieldEntry::Named(name, 16))
            .into(),
    )
    .to_aml_bytes(out);
    for window in windows {
        slot(window, out);
    }

    const DEVICE_CHECK: u8 = 1;
    const EJECT_REQUEST: u8 = 3;
    let mut body = Vec::new();
    // Reading clears them, so read once.
    let (plugged, eject): (Path, Path) = ("HPAD".into(), "HPEJ".into());
    aml::Store::new(&aml::Local(0), &plugged).to_aml_bytes(&mut body);
    aml::Store::new(&aml::Local(1), &eject).to_aml_bytes(&mut body);
    for window in windows {
        let container = Path::new(&format!("HP{:02}", window.slot));
        for (changed, what) in [
            (aml::Local(0), DEVICE_CHECK),
            (aml::Local(1), EJECT_REQUEST),
        ] {
            aml::And::new(&aml::Local(2), &changed, &bit(window)).to_aml_bytes(&mut body);
            aml::If::new(&aml::Local(2), vec![&aml::Notify::new(&container, &what)])
                .to_aml_bytes(&mut body);
        }
    }
    aml::Method::new("HPSC".into(), 0, true, vec![&Raw(body)]).to_aml_bytes(out);
}

/// A container with a window in it, both absent until the window has a device.
fn slot(window: &VirtioWindow, out: &mut dyn AmlSink) {
    let (present, ejected): (Path, Path) = ("HPPR".into(), "HPDN".into());
    let bit = bit(window);
    let mut device = Vec::new();
    virtio(window, &mut device);
    aml::Device::new(
        format!("HP{:02}", window.slot).as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0004"),
            &aml::Name::new("_UID".into(), &window.slot),
            &aml::Method::new(
                "_STA".into(),
                0,
                false,
                vec![
                    &aml::And::new(&aml::Local(0), &present, &bit),
                    &aml::If::new(&aml::Local(0), vec![&aml::Return::new(&0x0Fu8)]),
                    &aml::Return::new(&aml::ZERO),
                ],
            ),
            &aml::Method::new(
                "_EJ0".into(),
                1,
                false,
                vec![&aml::Store::new(&ejected, &bit)],
            ),
            &Raw(device),
        ],
    )
    .to_aml_bytes(out);
}

/// AML that was put together before.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn virtio(window: &VirtioWindow, out: &mut dyn AmlSink) {
    // All windows lie in the hole below 4 GiB.
    let (base, size) = (window.base as u32, window.size as u32);
    aml::Device::new(
        format!("VR{:02}", window.slot).as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &window.slot),
            // The device reads and writes guest RAM coherently.
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, base, size),
                    &line(window.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = layout::ACPI_RSDP;

    fn windows(count: u8) -> Vec<VirtioWindow> {
        (0..count)
            .map(|slot| VirtioWindow {
                slot,
                base: layout::VIRTIO_MMIO_BASE + u64::from(slot) * layout::VIRTIO_MMIO_SIZE,
                size: layout::VIRTIO_MMIO_SIZE,
                gsi: layout::VIRTIO_MMIO_GSIS[usize::from(slot)],
            })
            .collect()
    }

    fn block(cpus: u8, devices: u8) -> Vec<u8> {
        let ids: Vec<u8> = (0..cpus).collect();
        build(
            AT,
            &Description {
                apic_ids: &ids,
                io_apic_id: cpus,
                windows: &windows(devices),
                slots: &windows(11)[usize::from(devices)..],
                serial: true,
                numa: None,
            },
        )
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, with its checksum verified.
    fn table<'a>(block: &'a [u8], at: u64, signature: &[u8; 4]) -> &'a [u8] {
        let start = usize::try_from(at - AT).unwrap();
        let length = u32::from_le_bytes(block[start + 4..start + 8].try_into().unwrap()) as usize;
        let table = &block[start..start + length];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0, "{signature:?}");
        table
    }

    #[test]
    fn every_table_is_reachable_and_its_checksum_holds() {
        for (cpus, devices) in [(1, 0), (2, 3), (254, 11)] {
            let block = block(cpus, devices);
            assert!(
                AT + block.len() as u64 <= layout::ACPI_END,
                "{} bytes",
                block.len()
            );
            assert_eq!(&block[..8], b"RSD PTR ");
            assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
            let xsdt = table(&block, word(&block, 24), b"XSDT");
            let fadt = table(&block, word(xsdt, 36), b"FACP");
            let madt = table(&block, word(xsdt, 44), b"APIC");
            table(&block, word(fadt, 140), b"DSDT");
            assert_eq!(madt.len(), 44 + 12 + 8 * usize::from(cpus));
        }
    }

    #[test]
    fn nodes_are_described_and_there_is_room_for_the_largest_machine() {
        let numa = Numa {
            nodes: 8,
            cpus: (0..254).map(|vcpu| vcpu / 32).collect(),
            memory: (0..9)
                .map(|part| (part << 30, 1 << 30, part as u8 % 8))
                .collect(),
            distances: (0..64).collect(),
        };
        let ids: Vec<u8> = (0..254).collect();
        let description = Description {
            apic_ids: &ids,
            io_apic_id: 254,
            windows: &windows(11),
            slots: &[],
            serial: true,
            numa: Some(&numa),
        };
        let block = build(AT, &description);
        assert!(AT + block.len() as u64 <= layout::ACPI_END);
        let xsdt = table(&block, word(&block, 24), b"XSDT");
        let srat = table(&block, word(xsdt, 52), b"SRAT");
        let slit = table(&block, word(xsdt, 60), b"SLIT");
        assert_eq!(srat.len(), 48 + 254 * 16 + 9 * 40);
        // vCPU 33: node 1, its APIC id, enabled.
        assert_eq!(srat[48 + 33 * 16..][..8], [0, 16, 1, 33, 1, 0, 0, 0]);
        let last = &srat[48 + 254 * 16 + 8 * 40..];
        assert_eq!((last[0], last[1], last[2]), (1, 40, 0));
        assert_eq!((word(last, 8), word(last, 16)), (8 << 30, 1 << 30));
        assert_eq!(last[28], 1, "enabled");
        assert_eq!(word(slit, 36), 8);
        assert_eq!(slit[44..], numa.distances);
    }

    #[test]
    fn fadt_is_hardware_reduced_with_sleep_and_reset_ports() {
        let block = block(1, 0);
        let xsdt = table(&block, word(&block, 24), b"XSDT");
        let fadt = table(&block, word(xsdt, 36), b"FACP");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(
            flags & ((1 << 20) | (1 << 10) | (1 << 4)),
            (1 << 20) | (1 << 10) | (1 << 4)
        );
        let gas = |at: usize| (fadt[at], fadt[at + 1], word(fadt, at + 4));
        assert_eq!(gas(116), (1, 8, 0x602), "reset register");
        assert_eq!(fadt[128], power::RESET_VALUE);
        assert_eq!(gas(244), (1, 8, 0x600), "sleep control");
        assert_eq!(gas(256), (1, 8, 0x601), "sleep status");
        assert_eq!(fadt[108], rtc::CENTURY);
    }

    #[test]
    fn only_present_devices_are_described() {
        let count = |block: &[u8]| {
            block
                .windows(8)
                .filter(|bytes| bytes == b"LNRO0005")
                .count()
        };
        assert_eq!(
            [
                count(&block(1, 0)),
                count(&block(1, 3)),
                count(&block(1, 11))
            ],
            [11, 11, 11],
            "each once: as a device, or in a slot"
        );
        let containers = |devices| {
            let block = block(1, devices);
            let found = block.windows(8).filter(|bytes| bytes == b"ACPI0004");
            found.count()
        };
        assert_eq!([containers(0), containers(3), containers(11)], [11, 8, 0]);
        let none = build(
            AT,
            &Description {
                apic_ids: &[0],
                io_apic_id: 1,
                windows: &windows(2),
                slots: &[],
                serial: false,
                numa: None,
            },
        );
        assert_eq!(count(&none), 2);
        assert!(!none.windows(4).any(|bytes| bytes == b"HPSC"));
    }
}
