//! What the guest's processor is, in words.
//!
//! Job: name the bits of CPUID that the guest will see, for clients that ask for them (`query-cpu-model-expansion`).
//! Who is not trusted: nobody; the leaves are KVM's, after [`super::cpuid`] has worked on them.
//! Why this way: one table, by leaf and register, so that a new feature is one more pair in it. Positions are from Intel's SDM 2A
//! "CPUID", AMD's APM 3 appendix E and the kernel's "KVM CPUID bits"; the names are QEMU's, as clients know them. Features that only
//! an MSR tells, and those of nested virtualisation, which no guest has here, are not in it.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of the CPUID instruction's answer.
#[derive(Debug, Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Names of the bits of one register.
#[derive(Debug)]
struct Word {
    function: u32,
    index: u32,
    register: Register,
    bits: &'static [(&'static str, u32)],
}

const fn word(
    function: u32,
    index: u32,
    register: Register,
    bits: &'static [(&'static str, u32)],
) -> Word {
    Word {
        function,
        index,
        register,
        bits,
    }
}

static WORDS: &[Word] = &[
    word(
        1,
        0,
        Register::Edx,
        &[
            ("fpu", 0),
            ("vme", 1),
            ("de", 2),
            ("pse", 3),
            ("tsc", 4),
            ("msr", 5),
            ("pae", 6),
            ("mce", 7),
            ("cx8", 8),
            ("apic", 9),
            ("sep", 11),
            ("mtrr", 12),
            ("pge", 13),
            ("mca", 14),
            ("cmov", 15),
            ("pat", 16),
            ("pse36", 17),
            ("pn", 18),
            ("clflush", 19),
            ("ds", 21),
            ("acpi", 22),
            ("mmx", 23),
            ("fxsr", 24),
            ("sse", 25),
            ("sse2", 26),
            ("ss", 27),
            ("ht", 28),
            ("tm", 29),
            ("ia64", 30),
            ("pbe", 31),
        ],
    ),
    word(
        1,
        0,
        Register::Ecx,
        &[
            ("pni", 0),
            ("pclmulqdq", 1),
            ("dtes64", 2),
            ("monitor", 3),
            ("ds-cpl", 4),
            ("vmx", 5),
            ("smx", 6),
            ("est", 7),
            ("tm2", 8),
            ("ssse3", 9),
            ("cid", 10),
            ("fma", 12),
            ("cx16", 13),
            ("xtpr", 14),
            ("pdcm", 15),
            ("pcid", 17),
            ("dca", 18),
            ("sse4.1", 19),
            ("sse4.2", 20),
            ("x2apic", 21),
            ("movbe", 22),
            ("popcnt", 23),
            ("tsc-deadline", 24),
            ("aes", 25),
            ("xsave", 26),
            ("avx", 28),
            ("f16c", 29),
            ("rdrand", 30),
            ("hypervisor", 31),
        ],
    ),
    word(
        7,
        0,
        Register::Ebx,
        &[
            ("fsgsbase", 0),
            ("tsc-adjust", 1),
            ("sgx", 2),
            ("bmi1", 3),
            ("hle", 4),
            ("avx2", 5),
            ("smep", 7),
            ("bmi2", 8),
            ("erms", 9),
            ("invpcid", 10),
            ("rtm", 11),
            ("mpx", 14),
            ("avx512f", 16),
            ("avx512dq", 17),
            ("rdseed", 18),
            ("adx", 19),
            ("smap", 20),
            ("avx512ifma", 21),
            ("pcommit", 22),
            ("clflushopt", 23),
            ("clwb", 24),
            ("intel-pt", 25),
            ("avx512pf", 26),
            ("avx512er", 27),
            ("avx512cd", 28),
            ("sha-ni", 29),
            ("avx512bw", 30),
            ("avx512vl", 31),
        ],
    ),
    word(
        7,
        0,
        Register::Ecx,
        &[
            ("avx512vbmi", 1),
            ("umip", 2),
            ("pku", 3),
            ("waitpkg", 5),
            ("avx512vbmi2", 6),
            ("gfni", 8),
            ("vaes", 9),
            ("vpclmulqdq", 10),
            ("avx512vnni", 11),
            ("avx512bitalg", 12),
            ("avx512-vpopcntdq", 14),
            ("la57", 16),
            ("rdpid", 22),
            ("bus-lock-detect", 24),
            ("cldemote", 25),
            ("movdiri", 27),
            ("movdir64b", 28),
            ("sgxlc", 30),
            ("pks", 31),
        ],
    ),
    word(
        7,
        0,
        Register::Edx,
        &[
            ("avx512-4vnniw", 2),
            ("avx512-4fmaps", 3),
            ("fsrm", 4),
            ("avx512-vp2intersect", 8),
            ("md-clear", 10),
            ("serialize", 14),
            ("tsx-ldtrk", 16),
            ("arch-lbr", 19),
            ("amx-bf16", 22),
            ("avx512-fp16", 23),
            ("amx-tile", 24),
            ("amx-int8", 25),
            ("spec-ctrl", 26),
            ("stibp", 27),
            ("arch-capabilities", 29),
            ("core-capability", 30),
            ("ssbd", 31),
        ],
    ),
    word(7, 1, Register::Eax, &[("avx-vnni", 4), ("avx512-bf16", 5)]),
    word(
        0xD,
        1,
        Register::Eax,
        &[
            ("xsaveopt", 0),
            ("xsavec", 1),
            ("xgetbv1", 2),
            ("xsaves", 3),
            ("xfd", 4),
        ],
    ),
    word(0x14, 0, Register::Ecx, &[("intel-pt-lip", 31)]),
    word(6, 0, Register::Eax, &[("arat", 2)]),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        &[
            ("syscall", 11),
            ("nx", 20),
            ("mmxext", 22),
            ("fxsr-opt", 25),
            ("pdpe1gb", 26),
            ("rdtscp", 27),
            ("lm", 29),
            ("3dnowext", 30),
            ("3dnow", 31),
        ],
    ),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        &[
            ("lahf-lm", 0),
            ("cmp-legacy", 1),
            ("svm", 2),
            ("extapic", 3),
            ("cr8legacy", 4),
            ("abm", 5),
            ("sse4a", 6),
            ("misalignsse", 7),
            ("3dnowprefetch", 8),
            ("osvw", 9),
            ("ibs", 10),
            ("xop", 11),
            ("skinit", 12),
            ("wdt", 13),
            ("lwp", 15),
            ("fma4", 16),
            ("tce", 17),
            ("nodeid-msr", 19),
            ("tbm", 21),
            ("topoext", 22),
            ("perfctr-core", 23),
            ("perfctr-nb", 24),
        ],
    ),
    word(0x8000_0007, 0, Register::Edx, &[("invtsc", 8)]),
    word(
        0x8000_0008,
        0,
        Register::Ebx,
        &[
            ("clzero", 0),
            ("xsaveerptr", 2),
            ("wbnoinvd", 9),
            ("ibpb", 12),
            ("ibrs", 14),
            ("amd-stibp", 15),
            ("amd-ssbd", 24),
            ("virt-ssbd", 25),
            ("amd-no-ssb", 26),
        ],
    ),
    word(
        0x4000_0001,
        0,
        Register::Eax,
        &[
            ("kvmclock", 3),
            ("kvm-nopiodelay", 1),
            ("kvm-mmu", 2),
            ("kvm-asyncpf", 4),
            ("kvm-steal-time", 5),
            ("kvm-pv-eoi", 6),
            ("kvm-pv-unhalt", 7),
            ("kvm-pv-tlb-flush", 9),
            ("kvm-pv-ipi", 11),
            ("kvm-poll-control", 12),
            ("kvm-pv-sched-yield", 13),
            ("kvm-asyncpf-int", 14),
            ("kvm-msi-ext-dest-id", 15),
            ("kvmclock-stable-bit", 24),
        ],
    ),
    word(0x4000_0001, 0, Register::Edx, &[("kvm-hint-dedicated", 0)]),
];

/// A processor as CPUID describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Processor {
    /// Who made it: twelve characters of leaf 0.
    pub vendor: String,
    /// Its name (leaves 8000_0002 to 8000_0004).
    pub name: String,
    /// Family, with its extension (leaf 1).
    pub family: u32,
    /// Model, with its extension (leaf 1).
    pub model: u32,
    /// Stepping (leaf 1).
    pub stepping: u32,
    /// Highest basic leaf.
    pub level: u32,
    /// Highest extended leaf.
    pub extended_level: u32,
    /// Every feature that has a name here, and whether it is there.
    pub features: Vec<(&'static str, bool)>,
}

impl Processor {
    /// Reads the leaves that all vCPUs of a guest have in common.
    pub(super) fn read(leaves: &[kvm_cpuid_entry2]) -> Self {
        let find = |function, index| {
            let mut leaves = leaves.iter();
            leaves.find(|leaf| leaf.function == function && leaf.index == index)
        };
        let or_none = |function| find(function, 0).copied().unwrap_or_default();
        let (basic, version, extended) = (or_none(0), or_none(1), or_none(0x8000_0000));
        let name = (0x8000_0002..=0x8000_0004)
            .map(or_none)
            .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        let base = version.eax >> 8 & 0xF;
        Self {
            vendor: text([basic.ebx, basic.edx, basic.ecx]),
            name: text(name),
            family: match base {
                0xF => base + (version.eax >> 20 & 0xFF),
                base => base,
            },
            model: version.eax >> 4 & 0xF | version.eax >> 12 & 0xF0,
            stepping: version.eax & 0xF,
            level: basic.eax,
            extended_level: extended.eax,
            features: WORDS
                .iter()
                .flat_map(|word| {
                    let value =
                        find(word.function, word.index).map_or(0, |leaf| match word.register {
                            Register::Eax => leaf.eax,
                            Register::Ebx => leaf.ebx,
                            Register::Ecx => leaf.ecx,
                            Register::Edx => leaf.edx,
                        });
                    let bits = word.bits.iter();
                    bits.map(move |(name, bit)| (*name, value >> bit & 1 != 0))
                })
                .collect(),
        }
    }
}

/// The characters of these registers, up to the first zero, without blanks around them.
fn text(registers: impl IntoIterator<Item = u32>) -> String {
    let bytes = registers.into_iter().flat_map(u32::to_le_bytes);
    let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_bit_has_one_name_and_every_name_one_bit() {
        let (mut names, mut places) = (BTreeSet::new(), BTreeSet::new());
        for word in WORDS {
            for (name, bit) in word.bits {
                assert!(*bit < 32 && names.insert(*name), "{name}");
                let place = (word.function, word.index, word.register as u8, *bit);
                assert!(places.insert(place), "{name}: {place:x?}");
            }
        }
    }

    #[test]
    fn a_processor_is_read_from_its_leaves() {
        let leaf = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let leaves = [
            leaf(0, 0, [0xD, word(b"Auth"), word(b"cAMD"), word(b"enti")]),
            // Zen 2: base family F and extended family 8, model 1 and extended model 3, stepping 0.
            leaf(1, 0, [0x0083_0F10, 0, 1 << 19, 1 << 25]),
            leaf(7, 0, [1, 1 << 5, 0, 0]),
            leaf(7, 1, [1 << 4, 0, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_001E, 0, 0, 0]),
            leaf(
                0x8000_0002,
                0,
                [word(b"  A "), word(b"CPU "), 0, word(b"lost")],
            ),
        ];
        let processor = Processor::read(&leaves);
        assert_eq!(processor.vendor, "AuthenticAMD");
        assert_eq!(processor.name, "A CPU");
        let numbers = (processor.family, processor.model, processor.stepping);
        assert_eq!(numbers, (23, 0x31, 0));
        assert_eq!(
            (processor.level, processor.extended_level),
            (0xD, 0x8000_001E)
        );
        let there: Vec<_> = processor.features.iter().filter(|(_, is)| *is).collect();
        assert_eq!(
            there,
            [
                &("sse", true),
                &("sse4.1", true),
                &("avx2", true),
                &("avx-vnni", true)
            ]
        );
    }
}
