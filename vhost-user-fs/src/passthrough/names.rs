//! Names of inodes that may have to be found again.
//!
//! **Job.** Keeps names of 1 to 255 bytes in the [`Store`], so that they outlive this process, and uses the room of those that
//! are gone again.
//! **Who is not trusted.** The guest chose most names; their room is bounded, and a name that is read back is checked like one that
//! comes from the guest, since the process that wrote it may have died half-way.
//! **Why this way.** Most names are short: a slot for the longest would cost ten times as much as all else of an inode.

use std::ffi::CStr;

use super::store::{NAMES, Store, Word};
use crate::fuse::Name;

/// Bytes of a unit of room.
const UNIT: usize = 16;
/// Units of the longest name, with its length in front of it.
const LONGEST: usize = 16;

/// All names. A place is a word whose high half is a unit's number plus one; the low half is the caller's.
#[derive(Debug)]
pub(crate) struct Names {
    store: Store,
    /// Units that were ever used.
    used: u32,
    /// Free runs below that, by their length.
    free: [Vec<u32>; LONGEST + 1],
}

fn unit(place: u64) -> Option<u32> {
    u32::try_from(place >> 32).ok()?.checked_sub(1)
}

fn units(len: usize) -> usize {
    (len + 1).div_ceil(UNIT)
}

impl Names {
    /// None.
    pub(crate) fn new(store: Store) -> Self {
        store.store(Word::Names, 0);
        Self {
            store,
            used: 0,
            free: std::array::from_fn(|_| Vec::new()),
        }
    }

    /// The unit of a place, if it has one: for [`resume`](Self::resume).
    pub(crate) fn place(place: u64) -> Option<u32> {
        unit(place)
    }

    /// With those that a process before this one left, which start at these units.
    pub(crate) fn resume(store: Store, mut live: Vec<u32>) -> Self {
        // Below NAMES, or nothing is found there.
        let used = (store.load(Word::Names) as u32).min(NAMES as u32);
        let mut names = Self {
            store,
            used,
            free: std::array::from_fn(|_| Vec::new()),
        };
        live.retain(|start| *start < used);
        live.sort_unstable();
        let mut at = 0;
        for start in live.into_iter().chain([used]) {
            while at < start {
                let run = (start - at).min(LONGEST as u32);
                names.free[run as usize].push(at);
                at += run;
            }
            // At most LONGEST.
            at = at.max(start + units(names.len(start)) as u32);
        }
        names
    }

    fn word(&self, unit: u32, at: usize) -> u64 {
        let unit = unit as usize + at / 2;
        self.store.get(self.store.names, unit, at % 2)
    }

    fn len(&self, unit: u32) -> usize {
        usize::from(self.word(unit, 0).to_ne_bytes()[0])
    }

    fn find_room(&mut self, units: usize) -> Option<u32> {
        if let Some(unit) = self.free[units].pop() {
            return Some(unit);
        }
        // At most LONGEST.
        if self.used as usize + units <= NAMES {
            let unit = self.used;
            self.used += units as u32;
            self.store.store(Word::Names, u64::from(self.used));
            return Some(unit);
        }
        for more in units + 1..=LONGEST {
            if let Some(unit) = self.free[more].pop() {
                self.free[more - units].push(unit + units as u32);
                return Some(unit);
            }
        }
        None
    }

    /// Keeps a name; returns its place, with nothing in the low half. `None` if there is no room.
    pub(crate) fn insert(&mut self, name: Name<'_>) -> Option<u64> {
        let text = name.as_c_str().to_bytes();
        let units = units(text.len());
        let unit = self.find_room(units)?;
        let mut bytes = [0; UNIT * LONGEST];
        // At most 255.
        bytes[0] = text.len() as u8;
        bytes[1..=text.len()].copy_from_slice(text);
        for (at, word) in bytes.chunks_exact(8).take(units * 2).enumerate() {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            self.store.set(
                self.store.names,
                unit as usize + at / 2,
                at % 2,
                u64::from_ne_bytes(value),
            );
        }
        Some((u64::from(unit) + 1) << 32)
    }

    /// The room of a name is free again. The caller has forgotten its place.
    pub(crate) fn remove(&mut self, place: u64) {
        if let Some(unit) = unit(place) {
            self.free[units(self.len(unit))].push(unit);
        }
    }

    /// The name at a place, terminated, behind a byte that counts.
    fn read(&self, place: u64) -> Option<[u8; UNIT * LONGEST + 1]> {
        let unit = unit(place)?;
        let mut bytes = [0; UNIT * LONGEST + 1];
        for at in 0..units(self.len(unit)) * 2 {
            bytes[at * 8..at * 8 + 8].copy_from_slice(&self.word(unit, at).to_ne_bytes());
        }
        Some(bytes)
    }

    /// The name at a place, if there is one: for [`checked`](Self::checked).
    pub(crate) fn get(&self, place: u64) -> Option<[u8; 256]> {
        let bytes = self.read(place)?;
        let len = usize::from(bytes[0]);
        let mut name = [0; 256];
        name[..len].copy_from_slice(&bytes[1..=len]);
        Some(name)
    }

    /// As a name that can be looked up.
    pub(crate) fn checked(name: &[u8; 256]) -> Option<Name<'_>> {
        Name::new(CStr::from_bytes_until_nul(name).ok()?).ok()
    }

    /// Whether the name at a place is this one.
    pub(crate) fn is(&self, place: u64, name: Name<'_>) -> bool {
        let text = name.as_c_str().to_bytes();
        unit(place).is_some_and(|unit| self.len(unit) == text.len())
            && self
                .read(place)
                .is_some_and(|bytes| &bytes[1..=text.len()] == text)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    fn text(n: usize) -> CString {
        CString::new("x".repeat(n % 255) + &(n % 10).to_string()).unwrap()
    }

    #[test]
    fn names_are_kept_and_their_room_is_used_again() {
        let store = Store::new(10).unwrap();
        let mut names = Names::new(store);
        let places: Vec<u64> = (0..600)
            .map(|n| names.insert(Name::new(&text(n)).unwrap()).unwrap())
            .collect();
        for (n, place) in places.iter().enumerate() {
            assert!(names.is(*place, Name::new(&text(n)).unwrap()), "{n}");
            assert!(!names.is(*place, Name::new(c"other").unwrap()));
            let name = names.get(*place).unwrap();
            assert_eq!(Names::checked(&name).unwrap().as_c_str(), &*text(n));
        }
        let used = names.used;
        for place in places.iter().step_by(2) {
            names.remove(*place);
        }
        for n in (0..600).step_by(2) {
            names.insert(Name::new(&text(n)).unwrap()).unwrap();
        }
        assert_eq!(names.used, used);
        assert_eq!(names.get(0), None);
    }

    #[test]
    fn another_process_finds_the_gaps() {
        let store = Store::new(10).unwrap();
        let mut names = Names::new(store);
        let places: Vec<u64> = (0..100)
            .map(|n| names.insert(Name::new(&text(n)).unwrap()).unwrap())
            .collect();
        let live = places.iter().step_by(2).filter_map(|p| Names::place(*p));
        let mut names = Names::resume(store, live.collect());
        let used = names.used;
        for n in (1..100).step_by(2) {
            names.insert(Name::new(&text(n)).unwrap()).unwrap();
        }
        assert_eq!(names.used, used, "each has the room that it had");
        for (n, place) in places.iter().enumerate().step_by(2) {
            assert!(names.is(*place, Name::new(&text(n)).unwrap()), "{n}");
        }
    }

    #[test]
    fn a_place_that_nobody_wrote_has_no_name() {
        let store = Store::new(10).unwrap();
        let names = Names::new(store);
        for place in [1 << 32, u64::MAX, (NAMES as u64) << 32] {
            let name = names.get(place).unwrap();
            assert_eq!(Names::checked(&name), None, "{place:#x}");
        }
    }
}
