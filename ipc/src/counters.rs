//! What a disk's process counts, and where it does.
//!
//! **Job.** The layout of some numbers at the end of a disk's in-flight region: its process adds to them, and the control
//! process reads them when a client asks (`query-blockstats`).
//!
//! **Who is not trusted.** The disk's process: what it wrote is read as numbers and is shown to people, so a hostile one
//! tells lies about itself and nothing more. No number is an index, a length or a condition anywhere.
//!
//! **Why this way.** Both processes have the region already: no further descriptor, message or wake-up. It outlives the process, so
//! numbers go on where another one left off, and it is part of a snapshot. A front end that is not ours passes the region
//! on without looking into it.
//!
//! Layout, all little-endian u64: for each [`Kind`] in its order one of each [`Field`] in its order, then the first byte behind the
//! highest one that was written.

/// Bytes of the counters; a multiple of a cache line.
pub const BYTES: usize = 192;

/// Kinds of requests, as in QAPI's `BlockDeviceStats`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Data to the guest.
    Read,
    /// Data from the guest, and zeroes written by its order.
    Write,
    /// Written data made durable.
    Flush,
    /// Ranges that the guest needs no longer.
    Unmap,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Unmap];
}

/// What is counted of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// Requests that went well.
    Operations,
    /// Bytes of them.
    Bytes,
    /// Requests that the host failed.
    Failed,
    /// Requests that no disk like this one could do.
    Invalid,
    /// Nanoseconds from when each was taken to its end, those that failed as well.
    Nanoseconds,
}

/// Fields of a kind.
const FIELDS: usize = 5;
/// Place of the last number.
pub const WRITTEN_TO: usize = Kind::ALL.len() * FIELDS * 8;

/// Where a number is, from the start of the counters.
pub const fn place(kind: Kind, field: Field) -> usize {
    (kind as usize * FIELDS + field as usize) * 8
}

/// What a disk's process has counted, read at one time; a request that ends at that moment may be counted in one number and not
/// yet in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCounters([u8; BYTES]);

impl Default for BlockCounters {
    fn default() -> Self {
        Self([0; BYTES])
    }
}

impl BlockCounters {
    /// From the bytes.
    pub const fn from_bytes(bytes: [u8; BYTES]) -> Self {
        Self(bytes)
    }

    fn at(&self, place: usize) -> u64 {
        let word = self.0.get(place..).and_then(|rest| rest.first_chunk());
        word.map_or(0, |word| u64::from_le_bytes(*word))
    }

    /// One number.
    pub fn get(&self, kind: Kind, field: Field) -> u64 {
        self.at(place(kind, field))
    }

    /// The first byte behind the highest one that was written; 0 if none was.
    pub fn written_to(&self) -> u64 {
        self.at(WRITTEN_TO)
    }

    /// These and what was counted before them.
    #[must_use]
    pub fn after(&self, before: &Self) -> Self {
        let mut sum = [0; BYTES];
        for (place, word) in (0..).step_by(8).zip(sum.chunks_exact_mut(8)) {
            let (now, then) = (self.at(place), before.at(place));
            let number = if place == WRITTEN_TO {
                now.max(then)
            } else {
                now.wrapping_add(then)
            };
            word.copy_from_slice(&number.to_le_bytes());
        }
        Self(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(numbers: &[(usize, u64)]) -> BlockCounters {
        let mut bytes = [0; BYTES];
        for (place, number) in numbers {
            bytes[*place..*place + 8].copy_from_slice(&number.to_le_bytes());
        }
        BlockCounters::from_bytes(bytes)
    }

    #[test]
    fn each_number_has_a_place_of_its_own() {
        use Field::*;
        let mut places: Vec<usize> = Kind::ALL
            .into_iter()
            .flat_map(|kind| {
                [Operations, Bytes, Failed, Invalid, Nanoseconds].map(|field| place(kind, field))
            })
            .chain([WRITTEN_TO])
            .collect();
        assert!(places.iter().all(|place| place + 8 <= BYTES));
        places.dedup();
        assert_eq!(places.len(), 21);
        let unmaps = counted(&[(place(Kind::Unmap, Invalid), 7)]);
        assert_eq!(unmaps.get(Kind::Unmap, Invalid), 7);
        assert_eq!(unmaps.get(Kind::Unmap, Nanoseconds), 0);
    }

    #[test]
    fn what_was_counted_before_is_added_and_the_highest_place_stays() {
        let reads = place(Kind::Read, Field::Operations);
        let sum = counted(&[(reads, 3), (WRITTEN_TO, 512)])
            .after(&counted(&[(reads, u64::MAX), (WRITTEN_TO, 4096)]));
        assert_eq!(sum.get(Kind::Read, Field::Operations), 2, "it wraps");
        assert_eq!(sum.written_to(), 4096);
    }
}
