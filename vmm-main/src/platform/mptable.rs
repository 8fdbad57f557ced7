//! The MP table, for kernels without ACPI.
//!
//! Job: processors, the IOAPIC and which line reaches which of its inputs (MultiProcessor Specification 1.4).
//! Who is not trusted: nobody; the input is this machine's own description.
//! Why this way: a kernel with ACPI ignores it, a small one has nothing else. Every line is an ISA line that conforms
//! to the bus (edge, active high), also 16 to 23: this is how their numbers become interrupt numbers of the same value.

use crate::machine::layout;

const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const SPEC_REVISION: u8 = 4;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const BUS_ISA: u8 = 0;
const INTERRUPT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xFF;

const HEADER_SIZE: usize = 44;
const FLOATING_SIZE: usize = 16;

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

/// Floating pointer and configuration table, to be written at `address` (page aligned, below 1 MiB).
///
/// `signature` and `features` are the processor's `CPUID.1:EAX` and `EDX`.
#[must_use]
pub fn build(
    address: u32,
    apic_ids: &[u8],
    io_apic_id: u8,
    signature: u32,
    features: u32,
) -> Vec<u8> {
    let mut table = Vec::with_capacity(FLOATING_SIZE + HEADER_SIZE + 20 * apic_ids.len() + 8 * 32);
    // 4.1 floating pointer structure
    table.extend_from_slice(b"_MP_");
    table.extend_from_slice(&(address + FLOATING_SIZE as u32).to_le_bytes());
    table.extend_from_slice(&[1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    table[10] = checksum(&table);
    // 4.2 header; length, checksum and count follow at the end
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&[0, 0, SPEC_REVISION, 0]);
    table.extend_from_slice(b"STRATOVR");
    table.extend_from_slice(b"microvm     ");
    table.extend_from_slice(&[0; 8]); // no OEM table; the entry count
    table.extend_from_slice(&layout::LAPIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // no extended entries
    let mut entries = 0u16;
    let mut entry = |bytes: &[u8]| {
        table.extend_from_slice(bytes);
        entries += 1;
    };
    for (index, apic_id) in apic_ids.iter().enumerate() {
        let flags = CPU_ENABLED | if index == 0 { CPU_BOOT } else { 0 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[0, *apic_id, APIC_VERSION, flags]);
        processor[4..8].copy_from_slice(&signature.to_le_bytes());
        processor[8..12].copy_from_slice(&features.to_le_bytes());
        entry(&processor);
    }
    entry(b"\x01\x00ISA   ");
    let address = layout::IOAPIC.to_le_bytes();
    entry(&[
        2,
        io_apic_id,
        IOAPIC_VERSION,
        1,
        address[0],
        address[1],
        address[2],
        address[3],
    ]);
    for line in 0..layout::IOAPIC_PINS {
        entry(&[3, INTERRUPT, 0, 0, BUS_ISA, line, io_apic_id, line]);
    }
    // 4.3.5: the PIC on the boot processor's LINT0, NMI on everyone's LINT1
    entry(&[4, INTERRUPT_EXTINT, 0, 0, BUS_ISA, 0, 0, 0]);
    entry(&[4, INTERRUPT_NMI, 0, 0, BUS_ISA, 0, ALL_LAPICS, 1]);
    let length = (table.len() - FLOATING_SIZE) as u16; // 254 processors take 5.4 KiB
    let header = &mut table[FLOATING_SIZE..];
    header[4..6].copy_from_slice(&length.to_le_bytes());
    header[34..36].copy_from_slice(&entries.to_le_bytes());
    header[7] = checksum(header);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_checksums_hold_and_every_entry_is_counted() {
        for cpus in [1u8, 2, 254] {
            let ids: Vec<u8> = (0..cpus).collect();
            let table = build(
                layout::MP_TABLE as u32,
                &ids,
                cpus,
                0x00A2_0F10,
                0x0781_FBFD,
            );
            assert_eq!(sum(&table[..16]), 0);
            let config = &table[16..];
            assert_eq!(sum(config), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([config[4], config[5]])),
                config.len()
            );
            let (mut offset, mut count, mut processors) = (HEADER_SIZE, 0u16, 0u8);
            while offset < config.len() {
                processors += u8::from(config[offset] == 0);
                offset += if config[offset] == 0 { 20 } else { 8 };
                count += 1;
            }
            assert_eq!(offset, config.len());
            assert_eq!(count, u16::from_le_bytes([config[34], config[35]]));
            assert_eq!(processors, cpus);
            assert!(table.len() <= 0x1_0000, "must end below 1 MiB");
        }
    }

    #[test]
    fn every_device_line_has_an_entry() {
        let table = build(layout::MP_TABLE as u32, &[0], 1, 0, 0);
        let lines: Vec<u8> = table[16 + HEADER_SIZE + 20..]
            .chunks_exact(8)
            .filter(|entry| entry[0] == 3)
            .map(|entry| {
                assert_eq!(entry[5], entry[7]);
                entry[5]
            })
            .collect();
        for gsi in layout::VIRTIO_MMIO_GSIS
            .into_iter()
            .chain([layout::SERIAL_GSI])
        {
            assert!(lines.contains(&u8::try_from(gsi).unwrap()));
        }
    }
}
