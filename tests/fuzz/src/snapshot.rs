//! # `snapshot`: a snapshot's file `state`
//!
//! The first byte says whether the rest is a file, or the body of one whose checksums are right. What is read can be written
//! and read again, fits itself, and never names more than its limits.

use ipc::limits::{MAX_INFLIGHT_REGION, SNAPSHOT_BLOCK};
use vmm_main::snapshot::format::{decode, encode, seal};

/// One input.
pub fn run(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let read = if kind & 1 == 0 {
        decode(data)
    } else {
        decode(&seal(data))
    };
    let Ok(snapshot) = read else {
        return;
    };
    crate::planted!(snapshot.devices.len() == 1 && snapshot.devices[0].bases.len() == 2);
    // As what is KVM's may be shorter than its structure, the second time is the same and not the first.
    let once = encode(&snapshot).expect("it was read");
    let again = decode(&once).expect("it was written");
    assert_eq!(encode(&again).expect("it was read"), once);
    assert!(snapshot.shape.check(&again.shape).is_ok());
    assert!(
        snapshot
            .shape
            .check_processor(&again.shape.processor)
            .is_ok()
    );
    let size = snapshot.shape.memory;
    if snapshot.memory.check(size).is_ok() {
        assert!(snapshot.memory.present() <= size.next_multiple_of(u64::from(SNAPSHOT_BLOCK)));
    }
    for device in &snapshot.devices {
        let inflight = device.inflight.as_ref().map_or(0, Vec::len);
        assert!(
            inflight <= data.len() && inflight as u64 <= MAX_INFLIGHT_REGION.max(data.len() as u64)
        );
    }
}
