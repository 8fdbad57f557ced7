//! Whether a file is a program that runs where there is no loader and no library.

/// Bytes at the start of a file that are enough: the header, and the program headers, which every
/// linker puts right behind it.
pub(crate) const ENOUGH: usize = 4096;

/// `e_machine` of this build (System V ABI, chapter 4).
#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

/// Why the file that starts with `head` is not a static program for this machine.
///
/// Layout: System V ABI, chapters 4 and 5, ELF64 little-endian: `e_type` at 16, `e_machine` at 18,
/// `e_phoff` at 32, `e_phentsize` at 54, `e_phnum` at 56; `p_type` is a program header's first word.
pub(crate) fn fault(head: &[u8]) -> Option<&'static str> {
    const EXEC: u16 = 2;
    const DYN: u16 = 3;
    const PT_INTERP: u32 = 3;
    const HEADER_SIZE: u16 = 56;
    let half = |at: usize| Some(u16::from_le_bytes(*head.get(at..at + 2)?.first_chunk()?));
    if !head.starts_with(b"\x7fELF") {
        return Some("not an ELF file");
    }
    if head.get(4..6) != Some(&[2, 1]) {
        return Some("not a 64-bit little-endian ELF file");
    }
    if !matches!(half(16), Some(EXEC | DYN)) {
        return Some("an ELF file, but not a program");
    }
    if half(18) != Some(MACHINE) {
        return Some("a program for another kind of processor");
    }
    let table = head
        .get(32..40)
        .and_then(|b| b.first_chunk())
        .map(|b| u64::from_le_bytes(*b));
    let (Some(table), Some(HEADER_SIZE), Some(count)) = (table, half(54), half(56)) else {
        return Some("an ELF file with a damaged header");
    };
    for index in 0..u64::from(count) {
        let at = table
            .checked_add(index * u64::from(HEADER_SIZE))
            .and_then(|at| usize::try_from(at).ok());
        let kind = at
            .and_then(|at| head.get(at..)?.first_chunk())
            .map(|b| u32::from_le_bytes(*b));
        match kind {
            Some(PT_INTERP) => {
                return Some(
                    "not statically linked: it asks for a loader, and there is none in the jail",
                );
            }
            Some(_) => {}
            None => return Some("an ELF file whose program headers are not at its start"),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(kinds: &[u32]) -> Vec<u8> {
        let mut head = vec![0u8; 64];
        head[..6].copy_from_slice(b"\x7fELF\x02\x01");
        head[16] = 3;
        head[18..20].copy_from_slice(&MACHINE.to_le_bytes());
        head[32] = 64;
        head[54] = 56;
        head[56] = kinds.len() as u8;
        for kind in kinds {
            head.extend(kind.to_le_bytes());
            head.extend([0; 52]);
        }
        head
    }

    #[test]
    fn static_and_dynamic_are_told_apart() {
        assert_eq!(fault(&file(&[1, 2, 6])), None);
        assert!(fault(&file(&[6, 3, 1])).is_some_and(|why| why.starts_with("not statically")));
    }

    #[test]
    fn damage_is_an_error() {
        assert_eq!(fault(b"#!/bin/sh\n"), Some("not an ELF file"));
        let good = file(&[1, 1]);
        for length in 0..good.len() - 53 {
            assert!(fault(&good[..length]).is_some(), "cut at {length}");
        }
        let mut far = good.clone();
        far[32..40].fill(0xff);
        assert!(fault(&far).is_some());
        let mut other = good;
        other[18] ^= 1;
        assert!(fault(&other).is_some_and(|why| why.contains("processor")));
    }

    #[test]
    fn this_very_test_is_static() {
        let me = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(fault(&me[..ENOUGH]), None);
    }
}
