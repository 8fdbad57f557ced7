//! Numbers that a device keeps for the control process to read.
//!
//! **Job.** Adds to the counters at the end of the in-flight region ([`ipc::counters`] has their layout).
//! **Who is not trusted.** Whoever hands the region over: what is in it are numbers to add to, nothing else.
//! **Why this way.** Loads and stores without a lock: one process serves at a time, in one thread.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use ipc::counters::{Field, Kind, WRITTEN_TO, place};
use vm_memory::Bytes;

use crate::memory::Mapping;

/// See the module's page.
#[derive(Debug)]
pub struct Counters {
    region: Rc<Mapping>,
    start: usize,
}

impl Counters {
    /// From byte `start` of `region` on, which has [`ipc::counters::BYTES`] bytes there.
    pub(crate) fn new(region: Rc<Mapping>, start: usize) -> Self {
        Self { region, start }
    }

    fn change(&self, place: usize, to: impl FnOnce(u64) -> u64) {
        let (bytes, at) = (self.region.bytes(), self.start + place);
        // The region has room for all of them, or there would be no counters.
        if let Ok(old) = bytes.load::<u64>(at, Ordering::Relaxed) {
            let _ = bytes.store(to(u64::from_le(old)).to_le(), at, Ordering::Relaxed);
        }
    }

    /// Adds `amount` to a number, which wraps.
    pub fn add(&self, kind: Kind, field: Field, amount: u64) {
        self.change(place(kind, field), |old| old.wrapping_add(amount));
    }

    /// Something was written up to byte `end` of the disk.
    pub fn written_to(&self, end: u64) {
        self.change(WRITTEN_TO, |old| old.max(end));
    }
}
