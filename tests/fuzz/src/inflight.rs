//! # `inflight`: what the process before left in the in-flight region
//!
//! The region is the input, and the queue starts with it: heads are taken back, replayed and given back. A second start reads
//! what the first one left.

use crate::bytes::Input;
use crate::chains::{Queue, REGIONS};
use crate::harness::Echo;
use crate::{once, planted};
use device_host::fuzzing::Bench;

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let entries = 1u16 << (input.byte() % 8);
    let len = usize::from(input.u16() % 4096);
    let region = input.take(len);
    let used_index = input.u16();
    let queue = Queue::read(&mut input);
    once!(
        Bench<Echo>,
        Bench::new(Echo::default(), &REGIONS),
        |bench: &mut Bench<Echo>| {
            bench.reset();
            bench.accept(queue.features);
            queue.place(bench);
            bench.write(crate::chains::USED + 2, &used_index.to_le_bytes());
            bench.inflight(region, 1 + u16::from(kind & 1), entries);
            let shape = queue.shape(u16::from(kind & 1));
            bench.start(&shape);
            assert!(bench.turns(4));
            let mut index = [0; 2];
            bench.read(crate::chains::USED + 2, &mut index);
            let done = u16::from_le_bytes(index).wrapping_sub(used_index);
            // What was replayed and what is new: neither is more than a ring, and the ring is at most this large.
            assert!(
                usize::from(done) <= usize::from(queue.size) + 4 * usize::from(queue.size),
                "{done} given back"
            );
            planted!(done > 2 && queue.heads.is_empty());
            bench.start(&shape);
            assert!(bench.turns(4));
        }
    );
}
