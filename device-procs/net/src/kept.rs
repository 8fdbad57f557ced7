//! What the driver told on the control queue, for a process that comes after this one.
//!
//! **Job.** The bytes that the harness keeps: a version u8, pairs in use le16, whether offloads were chosen u8 and which le64, then the
//! filter's. **Who is not trusted.** Whoever hands them over: what does not fit is nothing, and the device checks the rest.
//! **Why this way.** A driver tells all this once. Without it a card with several queues would, after a restart, go on
//! with one of them, and send the guest packets that it did not want.

use crate::filter::{self, Filter};

const VERSION: u8 = 1;
const FIXED: usize = 1 + 2 + 1 + 8;
/// Bytes at most.
pub(crate) const MOST: usize = FIXED + filter::SAVED;

/// See the module's page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Told {
    /// Queue pairs in use.
    pub(crate) pairs: u16,
    /// Offloads of received packets, if others than the negotiated ones.
    pub(crate) offloads: Option<u64>,
    pub(crate) filter: Filter,
}

impl Told {
    /// Of a driver that has told nothing.
    pub(crate) fn new(mac: [u8; 6]) -> Self {
        Self {
            pairs: 1,
            offloads: None,
            filter: Filter::new(mac),
        }
    }

    pub(crate) fn save(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend(self.pairs.to_le_bytes());
        out.push(u8::from(self.offloads.is_some()));
        out.extend(self.offloads.unwrap_or(0).to_le_bytes());
        self.filter.save(&mut out);
        out
    }

    pub(crate) fn load(raw: &[u8]) -> Option<Self> {
        let ([VERSION, p0, p1, chosen, offloads @ ..], rest) = raw.split_first_chunk::<FIXED>()?
        else {
            return None;
        };
        Some(Self {
            pairs: u16::from_le_bytes([*p0, *p1]),
            offloads: (*chosen == 1).then_some(u64::from_le_bytes(*offloads)),
            filter: Filter::load(rest)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back() {
        let mut told = Told::new([2, 0, 0, 0, 0, 1]);
        assert_eq!(Told::load(&told.save()), Some(told.clone()));
        told.pairs = 300;
        told.offloads = Some(1 << 7);
        told.filter.set_vlan(9, true);
        let raw = told.save();
        assert!(raw.len() <= MOST);
        assert_eq!(Told::load(&raw), Some(told));
        for len in 0..raw.len() {
            assert_eq!(Told::load(&raw[..len]), None);
        }
        let mut other = raw;
        other[0] = 2;
        assert_eq!(Told::load(&other), None, "another version");
    }
}
