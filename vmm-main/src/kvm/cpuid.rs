//! What CPUID tells the guest.
//!
//! Job: take the leaves that KVM can virtualise on this host and set those that describe this guest: APIC ids,
//! sockets to threads, caches shared within them, no PMU, no nested virtualisation.
//! Who is not trusted: nobody; the input is KVM's and the command line's.
//! Why this way: the leaves common to all vCPUs are computed once, then each vCPU gets a copy with its APIC id. Leaf
//! numbers and bit positions are from Intel's SDM 2A "CPUID" and AMD's APM 3 appendix E.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::processor::Processor;
use super::topology::Topology;
use super::{Error, Kvm};

/// Who made the processor, as leaf 0 spells it; the topology leaves differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    /// AMD or Hygon.
    Amd,
    Other,
}

/// What the command line may change about the guest's processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuFeatures {
    /// Show the guest KVM's virtual performance counters (`-cpu host,pmu=on`).
    pub pmu: bool,
}

/// The leaves that all vCPUs of a guest have in common.
#[derive(Debug, Clone)]
pub struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    topology: Topology,
}

/// `CPUID.1:ECX`
mod leaf1_ecx {
    pub(super) const VMX: u32 = 1 << 5;
    pub(super) const PDCM: u32 = 1 << 15;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
}
/// `CPUID.1:EDX`
const HTT: u32 = 1 << 28;
/// `CPUID.8000_0001:ECX`
mod ext1_ecx {
    pub(super) const CMP_LEGACY: u32 = 1 << 1;
    pub(super) const SVM: u32 = 1 << 2;
    pub(super) const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
    pub(super) const PERF_CTR_EXT_CORE: u32 = 1 << 23;
}
/// `CPUID.8000_0007:EDX`: the TSC runs at one rate in all states.
const INVARIANT_TSC: u32 = 1 << 8;
/// `CPUID.(7,0):EDX`: `IA32_ARCH_CAPABILITIES` exists. KVM offers it on AMD too, where no processor has it.
const ARCH_CAPABILITIES: u32 = 1 << 29;
/// 48 characters of processor name.
const BRAND_LEAVES: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
/// Hypervisor leaf with the TSC's and the APIC timer's frequency in kHz.
const TIMING_LEAF: u32 = 0x4000_0010;
/// KVM's APIC timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

fn host_brand_string(leaf: u32) -> [u32; 4] {
    let registers = std::arch::x86_64::__cpuid(leaf);
    [registers.eax, registers.ebx, registers.ecx, registers.edx]
}

/// One answer of the CPUID instruction, as a snapshot holds it: function, index, EAX, EBX, ECX, EDX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf(pub [u32; 6]);

impl From<&kvm_cpuid_entry2> for CpuidLeaf {
    fn from(e: &kvm_cpuid_entry2) -> Self {
        Self([e.function, e.index, e.eax, e.ebx, e.ecx, e.edx])
    }
}

impl CpuidTemplate {
    /// Computes the leaves for a guest of this topology.
    ///
    /// # Errors
    /// KVM cannot list its leaves, or the list lacks leaf 0 or 1.
    pub fn new(kvm: &Kvm, topology: Topology, features: CpuFeatures) -> Result<Self, Error> {
        let supported = kvm
            .fd()
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| Error::Call {
                call: "KVM_GET_SUPPORTED_CPUID",
                source,
            })?;
        let tsc_deadline = kvm.fd().check_extension(Cap::TscDeadlineTimer);
        let supported = supported.as_slice();
        let mut template = Self::from_supported(supported, topology, features, tsc_deadline)?;
        template.brand_string(host_brand_string);
        Ok(template)
    }

    fn from_supported(
        supported: &[kvm_cpuid_entry2],
        topology: Topology,
        features: CpuFeatures,
        tsc_deadline: bool,
    ) -> Result<Self, Error> {
        // One spare place for each leaf that may be added.
        let mut entries = Vec::with_capacity(supported.len() + 8);
        entries.extend_from_slice(supported);
        let mut template = Self { entries, topology };
        let vendor = template.vendor()?;
        template.basic_features(features, tsc_deadline)?;
        template.leaf7(vendor);
        if !features.pmu {
            template.hide_pmu();
        }
        template.leaf_b();
        match vendor {
            Vendor::Intel => {
                template.intel_caches();
                template.leaf_1f()?;
            }
            Vendor::Amd => template.amd_topology(),
            Vendor::Other => {}
        }
        Ok(template)
    }

    /// The leaves of vCPU `index`, with the TSC's frequency in kHz if KVM knows it.
    ///
    /// # Errors
    /// More leaves than a KVM list can hold.
    pub(crate) fn for_vcpu(&self, index: u32, tsc_khz: Option<u32>) -> Result<CpuId, Error> {
        let apic_id = self.topology.apic_id(index);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                1 => entry.ebx = (entry.ebx & 0x00FF_FFFF) | (apic_id << 24),
                0xB | 0x1F => entry.edx = apic_id,
                0x8000_001E => {
                    let core = apic_id >> self.topology.core_shift();
                    entry.eax = apic_id;
                    entry.ebx = (entry.ebx & !0xFF) | (core & 0xFF);
                    entry.ecx =
                        (entry.ecx & !0xFF) | ((apic_id >> self.topology.die_shift()) & 0xFF);
                }
                _ => {}
            }
        }
        // A guest may rely on the frequency only if it cannot change under it.
        let invariant = entries
            .iter()
            .any(|e| e.function == 0x8000_0007 && e.edx & INVARIANT_TSC != 0);
        if let Some(tsc_khz) = tsc_khz.filter(|_| invariant)
            && let Some(root) = entries.iter_mut().find(|e| e.function == 0x4000_0000)
        {
            root.eax = root.eax.max(TIMING_LEAF);
            entries.retain(|e| e.function != TIMING_LEAF);
            entries.push(kvm_cpuid_entry2 {
                function: TIMING_LEAF,
                eax: tsc_khz,
                ebx: APIC_BUS_KHZ,
                ..Default::default()
            });
        }
        CpuId::from_entries(&entries).map_err(Error::List)
    }

    /// `CPUID.1:EAX` and `EDX`, which the MP table repeats.
    #[must_use]
    pub fn signature_and_features(&self) -> (u32, u32) {
        self.entries
            .iter()
            .find(|e| e.function == 1)
            .map_or((0, 0), |leaf1| (leaf1.eax, leaf1.edx))
    }

    /// What the guest sees, in words.
    #[must_use]
    pub fn processor(&self) -> Processor {
        Processor::read(&self.entries)
    }

    fn leaf(&mut self, function: u32, index: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries
            .iter_mut()
            .find(|e| e.function == function && e.index == index)
    }

    fn vendor(&mut self) -> Result<Vendor, Error> {
        let leaf0 = self.leaf(0, 0).ok_or(Error::MissingLeaf(0))?;
        let mut name = [0; 12];
        name[0..4].copy_from_slice(&leaf0.ebx.to_le_bytes());
        name[4..8].copy_from_slice(&leaf0.edx.to_le_bytes());
        name[8..12].copy_from_slice(&leaf0.ecx.to_le_bytes());
        Ok(match &name {
            b"GenuineIntel" => Vendor::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Other,
        })
    }

    fn basic_features(&mut self, features: CpuFeatures, tsc_deadline: bool) -> Result<(), Error> {
        // The field counts ids, not processors, and software rounds it up to a power of two (SDM 3A, 10.9.3).
        let ids_per_socket = 1u32 << self.topology.socket_shift();
        let several = self.topology.threads_per_socket() > 1;
        let leaf1 = self.leaf(1, 0).ok_or(Error::MissingLeaf(1))?;
        leaf1.ebx = (leaf1.ebx & 0x0000_FFFF) | (ids_per_socket.min(0xFF) << 16);
        leaf1.ecx |= leaf1_ecx::HYPERVISOR;
        // Nested virtualisation is a large part of KVM's attack surface and no machine of ours offers it.
        leaf1.ecx &= !leaf1_ecx::VMX;
        if tsc_deadline {
            leaf1.ecx |= leaf1_ecx::TSC_DEADLINE;
        }
        if !features.pmu {
            leaf1.ecx &= !leaf1_ecx::PDCM;
        }
        if several {
            leaf1.edx |= HTT;
        } else {
            leaf1.edx &= !HTT;
        }
        if let Some(extended) = self.leaf(0x8000_0001, 0) {
            extended.ecx &= !ext1_ecx::SVM;
        }
        // SVM's own leaf has no meaning without SVM.
        self.entries.retain(|e| e.function != 0x8000_000A);
        Ok(())
    }

    /// The processor's name, which KVM leaves empty.
    fn brand_string(&mut self, host: impl Fn(u32) -> [u32; 4]) {
        for entry in &mut self.entries {
            if BRAND_LEAVES.contains(&entry.function) {
                [entry.eax, entry.ebx, entry.ecx, entry.edx] = host(entry.function);
            }
        }
    }

    fn leaf7(&mut self, vendor: Vendor) {
        if vendor == Vendor::Amd
            && let Some(leaf7) = self.leaf(7, 0)
        {
            leaf7.edx &= !ARCH_CAPABILITIES;
        }
    }

    fn hide_pmu(&mut self) {
        if let Some(leaf) = self.leaf(0xA, 0) {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        }
        self.entries.retain(|e| e.function != 0x8000_0022);
        if let Some(extended) = self.leaf(0x8000_0001, 0) {
            extended.ecx &= !ext1_ecx::PERF_CTR_EXT_CORE;
        }
    }

    /// Replaces all sub-leaves of `function` by (level type, shift to the next level, processors at this level).
    fn set_levels(&mut self, function: u32, levels: &[(u32, u32, u32)]) {
        self.entries.retain(|e| e.function != function);
        let ends = [(0, 0, 0)]; // a level of type 0 ends the list
        for (index, (level, shift, processors)) in (0u32..).zip(levels.iter().chain(&ends)) {
            self.entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: *shift,
                ebx: *processors,
                ecx: (level << 8) | index,
                ..Default::default()
            });
        }
    }

    /// Leaf 0xB knows threads and cores only; "core" there spans all up to the package.
    fn leaf_b(&mut self) {
        if self.leaf(0, 0).is_none_or(|leaf0| leaf0.eax < 0xB) {
            return;
        }
        let t = self.topology;
        self.set_levels(
            0xB,
            &[
                (1, t.core_shift(), t.threads()),
                (2, t.socket_shift(), t.threads_per_socket()),
            ],
        );
    }

    /// Leaf 0x1F also knows modules (clusters) and dies. It is added when the guest has such levels, and kept in
    /// agreement when the host has it.
    fn leaf_1f(&mut self) -> Result<(), Error> {
        let t = self.topology;
        let leaf0 = self.leaf(0, 0).ok_or(Error::MissingLeaf(0))?;
        let deep = t.dies() > 1 || t.clusters() > 1;
        if leaf0.eax < 0xB || (!deep && leaf0.eax < 0x1F) {
            return Ok(());
        }
        leaf0.eax = leaf0.eax.max(0x1F);
        let mut levels = vec![(1, t.core_shift(), t.threads())];
        if t.clusters() > 1 {
            levels.push((2, t.cluster_shift(), t.threads_per_cluster()));
            levels.push((3, t.die_shift(), t.threads_per_die()));
        } else {
            levels.push((2, t.die_shift(), t.threads_per_die()));
        }
        if t.dies() > 1 {
            levels.push((5, t.socket_shift(), t.threads_per_socket()));
        }
        self.set_levels(0x1F, &levels);
        Ok(())
    }

    /// Leaf 4: first and second level belong to a core, the third to a die.
    fn intel_caches(&mut self) {
        let t = self.topology;
        let core_ids = (1u32 << (t.socket_shift() - t.core_shift())) - 1;
        for entry in self
            .entries
            .iter_mut()
            .filter(|e| e.function == 4 && e.eax & 0x1F != 0)
        {
            let shift = if entry.eax >> 5 & 7 < 3 {
                t.core_shift()
            } else {
                t.die_shift()
            };
            let sharing = (1u32 << shift) - 1;
            entry.eax = (entry.eax & 0x3FFF) | (sharing << 14) | (core_ids.min(0x3F) << 26);
        }
    }

    /// AMD's counts of processors (8000_0008), caches (8000_001D) and ids (8000_001E).
    fn amd_topology(&mut self) {
        let t = self.topology;
        let several = t.threads_per_socket() > 1;
        if let Some(sizes) = self.leaf(0x8000_0008, 0) {
            sizes.ecx = (sizes.ecx & !0xF0FF)
                | (t.socket_shift() << 12)
                | ((t.threads_per_socket() - 1) & 0xFF);
        }
        let highest = self.leaf(0x8000_0000, 0).map_or(0, |leaf| leaf.eax);
        let caches = self
            .entries
            .iter()
            .any(|e| e.function == 0x8000_001D && e.eax & 0x1F != 0);
        // The topology leaves come as one feature; without KVM's cache leaf it stays off, and the guest counts cores
        // by leaves 1 and 8000_0008.
        let extensions = caches && highest >= 0x8000_001E;
        if let Some(extended) = self.leaf(0x8000_0001, 0) {
            extended.ecx &= !(ext1_ecx::CMP_LEGACY | ext1_ecx::TOPOLOGY_EXTENSIONS);
            if several {
                extended.ecx |= ext1_ecx::CMP_LEGACY;
            }
            if extensions {
                extended.ecx |= ext1_ecx::TOPOLOGY_EXTENSIONS;
            }
        }
        self.entries
            .retain(|e| e.function != 0x8000_001E && e.function != 0x8000_0026);
        if extensions {
            for entry in self
                .entries
                .iter_mut()
                .filter(|e| e.function == 0x8000_001D && e.eax & 0x1F != 0)
            {
                let sharing = if entry.eax >> 5 & 7 < 3 {
                    t.threads()
                } else {
                    t.threads_per_die()
                };
                entry.eax = (entry.eax & !(0xFFF << 14)) | ((sharing - 1) << 14);
            }
            self.entries.push(kvm_cpuid_entry2 {
                function: 0x8000_001E,
                ebx: (t.threads() - 1) << 8,
                ecx: (t.dies() - 1) << 8,
                ..Default::default()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        }
    }

    fn host(vendor: &[u8; 12], highest: u32) -> Vec<kvm_cpuid_entry2> {
        let word =
            |range: std::ops::Range<usize>| u32::from_le_bytes(vendor[range].try_into().unwrap());
        let mut leaf0 = entry(0, 0, highest);
        (leaf0.ebx, leaf0.edx, leaf0.ecx) = (word(0..4), word(4..8), word(8..12));
        let mut leaf1 = entry(1, 0, 0);
        // The host's own processor number, 16 processors, SVM's and VMX's bits: all must go.
        (leaf1.ebx, leaf1.ecx, leaf1.edx) = (0xAB10_0800, leaf1_ecx::VMX | leaf1_ecx::PDCM, HTT);
        let mut ext1 = entry(0x8000_0001, 0, 0);
        ext1.ecx = ext1_ecx::SVM | ext1_ecx::PERF_CTR_EXT_CORE | 1;
        let cache = |function, index, level: u32| {
            entry(function, index, (7 << 26) | (15 << 14) | (level << 5) | 1)
        };
        vec![
            leaf0,
            leaf1,
            cache(4, 0, 1),
            cache(4, 3, 3),
            entry(4, 4, 0),
            entry(7, 0, 0),
            entry(0xA, 0, 0x0730_0404),
            entry(0xB, 0, 1),
            entry(0x4000_0000, 0, 0x4000_0001),
            entry(0x8000_0000, 0, 0x8000_0021),
            ext1,
            kvm_cpuid_entry2 {
                edx: INVARIANT_TSC,
                ..entry(0x8000_0007, 0, 0)
            },
            entry(0x8000_0008, 0, 0),
            cache(0x8000_001D, 0, 1),
            cache(0x8000_001D, 3, 3),
        ]
    }

    fn leaves(
        vendor: &[u8; 12],
        highest: u32,
        topology: Topology,
        vcpu: u32,
    ) -> Vec<kvm_cpuid_entry2> {
        CpuidTemplate::from_supported(
            &host(vendor, highest),
            topology,
            CpuFeatures::default(),
            true,
        )
        .unwrap()
        .for_vcpu(vcpu, Some(2_500_000))
        .unwrap()
        .as_slice()
        .to_vec()
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn one_vcpu_is_alone_in_its_package() {
        let leaves = leaves(b"GenuineIntel", 0x16, Topology::flat(1).unwrap(), 0);
        let leaf1 = get(&leaves, 1, 0);
        assert_eq!(leaf1.ebx, 0x0001_0800);
        assert_eq!(leaf1.ecx, leaf1_ecx::HYPERVISOR | leaf1_ecx::TSC_DEADLINE);
        assert_eq!(leaf1.edx & HTT, 0);
        assert_eq!(get(&leaves, 0xA, 0).eax, 0, "no PMU unless asked for");
        assert_eq!(get(&leaves, 0xB, 0).ecx, 0x100);
        assert!(!leaves.iter().any(|e| e.function == 0x1F));
        assert_eq!(get(&leaves, TIMING_LEAF, 0).eax, 2_500_000);
        assert_eq!(get(&leaves, 0x4000_0000, 0).eax, TIMING_LEAF);
    }

    #[test]
    fn intel_levels_follow_smp() {
        // 2 sockets, 2 dies, 3 cores, 2 threads; vCPU 23 is the last thread of the last core.
        let topology = Topology::new(24, 2, 2, 1, 3, 2).unwrap();
        let leaves = leaves(b"GenuineIntel", 0x16, topology, 23);
        let apic_id = (1 << 4) | (1 << 3) | (2 << 1) | 1;
        assert_eq!(
            get(&leaves, 1, 0).ebx,
            (apic_id << 24) | (16 << 16) | 0x0800
        );
        assert_ne!(get(&leaves, 1, 0).edx & HTT, 0);
        let level = |function, index| {
            let e = get(&leaves, function, index);
            (e.ecx >> 8, e.eax, e.ebx, e.edx)
        };
        assert_eq!(level(0xB, 0), (1, 1, 2, apic_id));
        assert_eq!(level(0xB, 1), (2, 4, 12, apic_id));
        assert_eq!(level(0xB, 2), (0, 0, 0, apic_id));
        assert_eq!(get(&leaves, 0, 0).eax, 0x1F, "dies need leaf 0x1f");
        assert_eq!(level(0x1F, 0), (1, 1, 2, apic_id));
        assert_eq!(level(0x1F, 1), (2, 3, 6, apic_id));
        assert_eq!(level(0x1F, 2), (5, 4, 12, apic_id));
        assert_eq!(level(0x1F, 3), (0, 0, 0, apic_id));
        // L1 is shared by 2 ids, L3 by the 8 ids of a die; 8 core ids per package.
        assert_eq!(get(&leaves, 4, 0).eax >> 14, (7 << 12) | 1);
        assert_eq!(get(&leaves, 4, 3).eax >> 14, (7 << 12) | 7);
    }

    #[test]
    fn clusters_are_modules_in_leaf_1f() {
        let topology = Topology::new(8, 1, 1, 2, 2, 2).unwrap();
        let leaves = leaves(b"GenuineIntel", 0x1F, topology, 7);
        let level = |index| {
            (
                get(&leaves, 0x1F, index).ecx >> 8,
                get(&leaves, 0x1F, index).eax,
            )
        };
        assert_eq!(
            [level(0), level(1), level(2), level(3)],
            [(1, 1), (2, 2), (3, 3), (0, 0)]
        );
    }

    #[test]
    fn amd_topology_follows_smp() {
        let topology = Topology::new(16, 2, 2, 1, 2, 2).unwrap();
        let leaves = leaves(b"AuthenticAMD", 0x10, topology, 13);
        let apic_id = 13;
        let extended = get(&leaves, 0x8000_0001, 0);
        assert_eq!(
            extended.ecx,
            ext1_ecx::CMP_LEGACY | ext1_ecx::TOPOLOGY_EXTENSIONS | 1
        );
        assert_eq!(get(&leaves, 0x8000_0008, 0).ecx, (3 << 12) | 7);
        assert_eq!(get(&leaves, 0x8000_001D, 0).eax >> 14 & 0xFFF, 1);
        assert_eq!(get(&leaves, 0x8000_001D, 3).eax >> 14 & 0xFFF, 3);
        let ids = get(&leaves, 0x8000_001E, 0);
        assert_eq!(
            (ids.eax, ids.ebx, ids.ecx),
            (apic_id, (1 << 8) | 6, (1 << 8) | 3)
        );
        assert_eq!(get(&leaves, 0xB, 1).eax, 3);
        assert!(!leaves.iter().any(|e| e.function == 0x1F));
    }

    #[test]
    fn all_254_vcpus_have_distinct_ids_below_the_broadcast() {
        let topology = Topology::new(254, 127, 1, 1, 2, 1).unwrap();
        let template = CpuidTemplate::from_supported(
            &host(b"GenuineIntel", 0x16),
            topology,
            CpuFeatures::default(),
            true,
        )
        .unwrap();
        let ids: std::collections::BTreeSet<u32> = (0..254)
            .map(|vcpu| get(template.for_vcpu(vcpu, None).unwrap().as_slice(), 1, 0).ebx >> 24)
            .collect();
        assert_eq!(ids.len(), 254);
        assert!(ids.iter().all(|id| *id < 0xFF));
    }

    #[test]
    fn the_processor_has_the_hosts_name() {
        let mut supported = host(b"AuthenticAMD", 0x10);
        supported.push(entry(0x8000_0002, 0, 0));
        let topology = Topology::flat(1).unwrap();
        let features = CpuFeatures::default();
        let mut template =
            CpuidTemplate::from_supported(&supported, topology, features, true).unwrap();
        template.brand_string(|leaf| [leaf, 1, 2, 3]);
        let leaf = get(&template.entries, 0x8000_0002, 0);
        assert_eq!(
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx),
            (0x8000_0002, 1, 2, 3)
        );
        assert_ne!(get(&template.entries, 1, 0).ebx, 1);
    }

    #[test]
    fn pmu_is_shown_when_asked_for() {
        let features = CpuFeatures { pmu: true };
        let template = CpuidTemplate::from_supported(
            &host(b"GenuineIntel", 0x16),
            Topology::flat(1).unwrap(),
            features,
            false,
        )
        .unwrap();
        let leaves = template.for_vcpu(0, None).unwrap();
        assert_eq!(get(leaves.as_slice(), 0xA, 0).eax, 0x0730_0404);
        assert_ne!(get(leaves.as_slice(), 1, 0).ecx & leaf1_ecx::PDCM, 0);
        assert_eq!(
            get(leaves.as_slice(), 1, 0).ecx & leaf1_ecx::TSC_DEADLINE,
            0
        );
        assert!(!leaves.as_slice().iter().any(|e| e.function == TIMING_LEAF));
    }
}
