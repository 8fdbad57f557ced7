//! ACPI tables of a machine with several memory nodes.
//!
//! **Job.** SRAT and SLIT (ACPI 6.5, 5.2.16 and 5.2.17): which processors and which memory belong together, and how far it is
//! from one node to another.
//! **Who is not trusted**: nobody; the input is this machine's own description.
//! **Why this way.** `acpi_tables` has an SRAT without structures for x86 processors, and a SLIT in which both ways between two
//! nodes are equally far, so the bodies are written here, behind its header and checksum.

use acpi_tables::sdt::Sdt;

/// Processor Local APIC/SAPIC Affinity Structure (5.2.16.1): its type and length, and the flag that it counts.
const PROCESSOR: [u8; 2] = [0, 16];
/// Memory Affinity Structure (5.2.16.2).
const MEMORY: [u8; 2] = [1, 40];
const ENABLED: u32 = 1;
/// Bytes of a table's header (5.2.6).
const HEADER: u32 = 36;

/// Which parts of the machine belong together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numa {
    /// Number of nodes.
    pub nodes: usize,
    /// The node of each vCPU, by its number.
    pub cpus: Vec<u8>,
    /// (guest-physical address, bytes, node) of each part of RAM.
    pub memory: Vec<(u64, u64, u8)>,
    /// Distances, row by row.
    pub distances: Vec<u8>,
}

/// System Resource Affinity Table; `apic_ids` are those of all vCPUs, by their numbers.
pub(super) fn srat(numa: &Numa, apic_ids: &[u8], empty: impl Fn([u8; 4], u32, u8) -> Sdt) -> Sdt {
    // Before revision 2 a node's number had eight bits.
    let mut table = empty(*b"SRAT", HEADER, 3);
    let mut body = Vec::new();
    // Reserved, must be 1; then eight bytes reserved.
    body.extend_from_slice(&1u32.to_le_bytes());
    body.extend_from_slice(&[0; 8]);
    for (node, apic_id) in numa.cpus.iter().zip(apic_ids) {
        body.extend_from_slice(&PROCESSOR);
        body.extend_from_slice(&[*node, *apic_id]);
        body.extend_from_slice(&ENABLED.to_le_bytes());
        // SAPIC EID, upper bytes of the node, clock domain.
        body.extend_from_slice(&[0; 8]);
    }
    for (base, size, node) in &numa.memory {
        body.extend_from_slice(&MEMORY);
        body.extend_from_slice(&u32::from(*node).to_le_bytes());
        body.extend_from_slice(&[0; 2]);
        body.extend_from_slice(&base.to_le_bytes());
        body.extend_from_slice(&size.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&ENABLED.to_le_bytes());
        body.extend_from_slice(&[0; 8]);
    }
    table.append_slice(&body);
    table
}

/// System Locality Information Table.
pub(super) fn slit(numa: &Numa, empty: impl Fn([u8; 4], u32, u8) -> Sdt) -> Sdt {
    let mut table = empty(*b"SLIT", HEADER, 1);
    table.append_slice(&(numa.nodes as u64).to_le_bytes());
    table.append_slice(&numa.distances);
    table
}
