//! The in-flight region: which requests were taken from a ring and not yet given back.
//!
//! **Job.** Shared memory that outlives this process, laid out as the vhost-user specification's section "Inflight I/O
//! tracking" says for split virtqueues. The next process, started after this one died, submits the requests in it again.
//! Per queue, little endian: `features` u64, `version` u16 (0 = fresh, 1), `desc_num` u16, `last_batch_head` u16, `used_idx`
//! u16, then `desc_num` entries of `inflight` u8, 5 bytes of padding, `next` u16, `counter` u64.
//!
//! **Who is not trusted.** The front end that hands the region over: sizes are checked against the file, indices read from
//! it against the queue, and walks are bounded.
//!
//! **Why this way.** Every store is in program order (Release), so that a process killed between any two of them leaves a
//! region from which no request is lost: a request may be done twice, which block I/O allows, but never zero times.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use vm_memory::Bytes;

use crate::fault::FaultKind;
use crate::memory::Mapping;

const VERSION: u16 = 1;
const AT_VERSION: usize = 8;
const AT_DESC_NUM: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_IDX: usize = 14;
const HEADER: usize = 16;
const ENTRY: usize = 16;
const ENTRY_NEXT: usize = 6;
const ENTRY_COUNTER: usize = 8;
/// Queues start at multiples of a cache line, as in libvhost-user.
const ALIGN: usize = 64;

/// Bytes that one queue of `queue_size` entries takes.
pub(crate) fn queue_bytes(queue_size: u16) -> usize {
    (HEADER + usize::from(queue_size) * ENTRY).next_multiple_of(ALIGN)
}

/// One queue's part of the region.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    region: Rc<Mapping>,
    start: usize,
    entries: u16,
    counter: u64,
}

impl InflightQueue {
    /// The part for queue `index`. The caller has checked that the region has `index + 1` parts of `entries` each.
    pub(crate) fn new(region: Rc<Mapping>, index: usize, entries: u16) -> Self {
        Self {
            region,
            start: index * queue_bytes(entries),
            entries,
            counter: 0,
        }
    }

    /// Prepares for a ring whose used index is `used_idx` and that has `queue_size` entries. Returns the heads in flight in
    /// the reverse of their old order, so that the oldest is popped first; `None` if the region is fresh.
    pub(crate) fn start(
        &mut self,
        used_idx: u16,
        queue_size: u16,
    ) -> Result<Option<Vec<u16>>, FaultKind> {
        if queue_size > self.entries {
            return Err(FaultKind::Inflight);
        }
        match self.load_u16(AT_VERSION)? {
            0 => {
                self.store_u16(AT_DESC_NUM, queue_size)?;
                self.store_u16(AT_LAST_BATCH_HEAD, 0)?;
                self.store_u16(AT_USED_IDX, used_idx)?;
                self.store_u16(AT_VERSION, VERSION)?;
                Ok(None)
            }
            VERSION => {
                self.finish_last_batch(used_idx, queue_size)?;
                self.collect(queue_size).map(Some)
            }
            _ => Err(FaultKind::Inflight),
        }
    }

    /// As [`start`](Self::start), for a queue of which the used index alone tells what is in flight: whoever serves it gives back in the
    /// order in which it takes. Returns whether it was served before and not stopped in order.
    pub(crate) fn start_in_order(
        &mut self,
        used_idx: u16,
        queue_size: u16,
    ) -> Result<bool, FaultKind> {
        if queue_size > self.entries {
            return Err(FaultKind::Inflight);
        }
        let before = match self.load_u16(AT_VERSION)? {
            0 => false,
            VERSION => true,
            _ => return Err(FaultKind::Inflight),
        };
        self.store_u16(AT_DESC_NUM, queue_size)?;
        self.store_u16(AT_LAST_BATCH_HEAD, 0)?;
        self.store_u16(AT_USED_IDX, used_idx)?;
        self.store_u16(AT_VERSION, VERSION)?;
        Ok(before)
    }

    /// The old process may have died after it moved the used index and before it cleared its entries.
    fn finish_last_batch(&mut self, used_idx: u16, queue_size: u16) -> Result<(), FaultKind> {
        let batch = used_idx.wrapping_sub(self.load_u16(AT_USED_IDX)?);
        if batch > queue_size {
            return Err(FaultKind::Inflight);
        }
        let mut head = self.load_u16(AT_LAST_BATCH_HEAD)?;
        for _ in 0..batch {
            let entry = self.entry(head, queue_size)?;
            self.store_u8(entry, 0)?;
            head = self.load_u16(entry + ENTRY_NEXT)?;
        }
        self.store_u16(AT_USED_IDX, used_idx)
    }

    fn collect(&mut self, queue_size: u16) -> Result<Vec<u16>, FaultKind> {
        let mut found = Vec::new();
        for head in 0..queue_size {
            let entry = self.entry(head, queue_size)?;
            if self.load_u8(entry)? != 0 {
                found.push((self.load_u64(entry + ENTRY_COUNTER)?, head));
            }
        }
        found.sort_unstable_by(|a, b| b.cmp(a));
        self.counter = found
            .first()
            .map_or(0, |(newest, _)| newest.wrapping_add(1));
        Ok(found.into_iter().map(|(_, head)| head).collect())
    }

    /// `head` was taken from the available ring.
    pub(crate) fn taken(&mut self, head: u16) -> Result<(), FaultKind> {
        let entry = self.entry(head, self.entries)?;
        self.store_u64(entry + ENTRY_COUNTER, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.store_u8(entry, 1)
    }

    /// `head` goes back to the available ring.
    pub(crate) fn put_back(&mut self, head: u16) -> Result<(), FaultKind> {
        let entry = self.entry(head, self.entries)?;
        self.store_u8(entry, 0)
    }

    /// Before the used index moves past `head`.
    pub(crate) fn will_be_used(&mut self, head: u16) -> Result<(), FaultKind> {
        let entry = self.entry(head, self.entries)?;
        let last = self.load_u16(AT_LAST_BATCH_HEAD)?;
        self.store_u16(entry + ENTRY_NEXT, last)?;
        self.store_u16(AT_LAST_BATCH_HEAD, head)
    }

    /// After the used index has moved to `used_idx`, past the last `batch` heads given to
    /// [`will_be_used`](Self::will_be_used).
    pub(crate) fn were_used(&mut self, batch: u16, used_idx: u16) -> Result<(), FaultKind> {
        let mut head = self.load_u16(AT_LAST_BATCH_HEAD)?;
        for _ in 0..batch.min(self.entries) {
            let entry = self.entry(head, self.entries)?;
            self.store_u8(entry, 0)?;
            head = self.load_u16(entry + ENTRY_NEXT)?;
        }
        self.store_u16(AT_USED_IDX, used_idx)
    }

    /// The ring was stopped in order with nothing in flight: its next start is a fresh one.
    pub(crate) fn finish(&mut self) -> Result<(), FaultKind> {
        self.store_u16(AT_VERSION, 0)?;
        for head in 0..self.entries {
            let entry = self.entry(head, self.entries)?;
            self.store_u8(entry, 0)?;
        }
        self.counter = 0;
        Ok(())
    }

    fn entry(&self, head: u16, limit: u16) -> Result<usize, FaultKind> {
        if head >= limit {
            return Err(FaultKind::Inflight);
        }
        Ok(HEADER + usize::from(head) * ENTRY)
    }
}

/// Loads and stores at an offset from the queue's start; outside of the region they fail.
macro_rules! access {
    ($load:ident, $store:ident, $type:ty) => {
        impl InflightQueue {
            fn $load(&self, at: usize) -> Result<$type, FaultKind> {
                self.region
                    .bytes()
                    .load::<$type>(self.start + at, Ordering::Acquire)
                    .map(<$type>::from_le)
                    .map_err(|_| FaultKind::Inflight)
            }

            fn $store(&self, at: usize, value: $type) -> Result<(), FaultKind> {
                self.region
                    .bytes()
                    .store(value.to_le(), self.start + at, Ordering::Release)
                    .map_err(|_| FaultKind::Inflight)
            }
        }
    };
}

access!(load_u8, store_u8, u8);
access!(load_u16, store_u16, u16);
access!(load_u64, store_u64, u64);

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;

    fn region(queues: usize, entries: u16) -> Rc<Mapping> {
        let file = File::from(memfd_create(c"inflight", MFdFlags::MFD_CLOEXEC).unwrap());
        let size = (queues * queue_bytes(entries)) as u64;
        file.set_len(size).unwrap();
        Rc::new(Mapping::new(&file, 0, size).unwrap())
    }

    #[test]
    fn requests_come_back_oldest_first() {
        let region = region(2, 8);
        let mut queue = InflightQueue::new(region.clone(), 1, 8);
        assert_eq!(queue.start(100, 8), Ok(None));
        for head in [5, 0, 3, 7] {
            queue.taken(head).unwrap();
        }
        queue.will_be_used(0).unwrap();
        queue.were_used(1, 101).unwrap();

        let mut next = InflightQueue::new(region.clone(), 1, 8);
        assert_eq!(next.start(101, 8), Ok(Some(vec![7, 3, 5])));
        // New requests sort after the old ones.
        next.taken(1).unwrap();
        let mut third = InflightQueue::new(region.clone(), 1, 8);
        assert_eq!(third.start(101, 8), Ok(Some(vec![1, 7, 3, 5])));
        // The other queue's part is untouched.
        assert_eq!(InflightQueue::new(region, 0, 8).start(0, 8), Ok(None));
    }

    #[test]
    fn a_death_between_used_index_and_clearing_loses_and_repeats_nothing() {
        let region = region(1, 8);
        let mut queue = InflightQueue::new(region.clone(), 0, 8);
        queue.start(u16::MAX, 8).unwrap();
        queue.taken(2).unwrap();
        queue.taken(0).unwrap();
        queue.will_be_used(2).unwrap();
        // The used index moved to 0 (it wraps), then the process was killed.
        let mut next = InflightQueue::new(region.clone(), 0, 8);
        assert_eq!(next.start(0, 8), Ok(Some(vec![0])));
        // Killed before the used index moved: the request is done again.
        next.will_be_used(0).unwrap();
        let mut third = InflightQueue::new(region, 0, 8);
        assert_eq!(third.start(0, 8), Ok(Some(vec![0])));
    }

    #[test]
    fn of_a_queue_that_is_served_in_order_the_used_index_tells_all() {
        let region = region(1, 8);
        let mut queue = InflightQueue::new(region.clone(), 0, 8);
        assert_eq!(queue.start_in_order(7, 8), Ok(false));
        // Its server is gone, and has given back any number meanwhile.
        let mut next = InflightQueue::new(region.clone(), 0, 8);
        assert_eq!(next.start_in_order(40_000, 8), Ok(true));
        next.finish().unwrap();
        assert_eq!(next.start_in_order(40_000, 8), Ok(false));
        assert_eq!(next.start_in_order(0, 16), Err(FaultKind::Inflight));
        next.store_u16(AT_VERSION, 2).unwrap();
        assert_eq!(next.start_in_order(0, 8), Err(FaultKind::Inflight));
    }

    #[test]
    fn hostile_contents_are_refused() {
        let region = region(1, 8);
        let mut queue = InflightQueue::new(region.clone(), 0, 8);
        assert_eq!(
            queue.start(0, 16),
            Err(FaultKind::Inflight),
            "ring larger than region"
        );
        queue.start(0, 8).unwrap();
        assert_eq!(queue.taken(8), Err(FaultKind::Inflight));
        queue.store_u16(AT_LAST_BATCH_HEAD, 9).unwrap();
        assert_eq!(
            queue.start(1, 8),
            Err(FaultKind::Inflight),
            "head outside of the table"
        );
        assert_eq!(
            queue.start(9, 8),
            Err(FaultKind::Inflight),
            "batch larger than the ring"
        );
        queue.store_u16(AT_VERSION, 2).unwrap();
        assert_eq!(
            queue.start(0, 8),
            Err(FaultKind::Inflight),
            "unknown version"
        );
    }

    #[test]
    fn an_orderly_stop_leaves_a_fresh_region() {
        let region = region(1, 8);
        let mut queue = InflightQueue::new(region.clone(), 0, 8);
        queue.start(0, 8).unwrap();
        queue.taken(4).unwrap();
        queue.finish().unwrap();
        assert_eq!(InflightQueue::new(region, 0, 8).start(55, 8), Ok(None));
    }
}
