//! A set of the host's processors, as text and as the mask that the kernel takes.
//!
//! **Job.** `cpus=0-3:6` of `-object iothread` and `-vcpu-affinity`. **Who is not trusted**: the text. A number beyond the
//! mask is refused, so whatever a peer sends decodes to a set of processors 0 to 1023. **Why this way.** A mask has one
//! size and nothing to check, and two sets are compared by their words.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Numbers that a set can hold: glibc's `cpu_set_t` has as many.
pub const MAX_CPUS: usize = 1024;

/// Memory nodes of the host: Linux has as many numbers for them (`CONFIG_NODES_SHIFT` is 10 at most).
pub type NodeList = CpuList;

/// Processors of the host, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuList([u64; MAX_CPUS / 64]);

impl CpuList {
    /// Numbers and ranges, separated by `:`, as in `0-3:6`; `None` if that is not what `text` is, or it names none.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |word: &str| {
            let digits = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
            let cpu = digits.then(|| word.parse::<usize>().ok()).flatten()?;
            (cpu < MAX_CPUS).then_some(cpu)
        };
        let mut list = Self::default();
        for part in text.split(':') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return None;
            }
            (first..=last).for_each(|cpu| list.insert(cpu));
        }
        Some(list)
    }

    /// Adds a processor. A number that no set can hold is left out.
    pub fn insert(&mut self, cpu: usize) {
        if let Some(word) = self.0.get_mut(cpu / 64) {
            *word |= 1 << (cpu % 64);
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The set as the kernel takes one: a bit for each number, the lowest first.
    pub const fn words(&self) -> &[u64; MAX_CPUS / 64] {
        &self.0
    }

    /// Whether it is one of them.
    pub fn contains(&self, cpu: usize) -> bool {
        self.0
            .get(cpu / 64)
            .is_some_and(|word| word & 1 << (cpu % 64) != 0)
    }

    /// Their numbers, the lowest first.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..MAX_CPUS).filter(|cpu| self.contains(*cpu))
    }
}

impl FromIterator<usize> for CpuList {
    fn from_iter<T: IntoIterator<Item = usize>>(cpus: T) -> Self {
        let mut list = Self::default();
        cpus.into_iter().for_each(|cpu| list.insert(cpu));
        list
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if_eq(&(last + 1)) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ":";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_set_are_the_same() {
        for (text, shown) in [
            ("0", "0"),
            ("0-3:6", "0-3:6"),
            ("6:0-3", "0-3:6"),
            ("1:2:3", "1-3"),
            ("63-64", "63-64"),
            ("1023", "1023"),
            ("0-1023", "0-1023"),
        ] {
            assert_eq!(CpuList::parse(text).unwrap().to_string(), shown);
        }
        for wrong in [
            "", ":", "1:", "3-1", "1024", "0-1024", "-1", "+1", "a", "1-2-3", "0x1", "1,2",
        ] {
            assert_eq!(CpuList::parse(wrong), None, "{wrong}");
        }
    }
}
