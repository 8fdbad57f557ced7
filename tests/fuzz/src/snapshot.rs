//! # `snapshot`: a snapshot's file `state`, and a device that goes on from it
//!
//! The first byte says whether the rest is a file, the body of one whose checksums are right, or what is to be changed in the device
//! of a snapshot that is right (four bytes a change). What is read can be written and read again, fits itself, and never names
//! more than its limits. Each device in it is then held against a live one, as at `-incoming`; if that can go on from it, its
//! process gets the queues, and the next snapshot is the same but for what the process has to say.

use crate::bytes::Input;
use crate::link::{Fixture, fixture, lie, spec};
use crate::mmio::lies_in_ram;
use crate::once;
use ipc::limits::{MAX_INFLIGHT_REGION, SNAPSHOT_BLOCK};
use std::os::unix::net::UnixStream;
use vmm_main::snapshot::Snapshot;
use vmm_main::snapshot::format::{decode, encode, seal};
use vmm_main::virtio::core::status;
use vmm_main::virtio::mmio::MmioTransport;
use vmm_main::virtio::remote::Handshake;
use vmm_main::virtio::snapshot::DeviceState;

/// A process that keeps account of requests in flight, and takes its queues back when it is reset.
const MODE: u8 = 4 | 8;
/// Devices of one input that are tried.
const MOST: usize = 2;

/// One input.
pub fn run(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let read = match kind % 3 {
        0 => decode(rest),
        1 => decode(&seal(rest)),
        _ => decode(&changed(Input(rest))),
    };
    let Ok(snapshot) = read else {
        return;
    };
    check(&snapshot, rest.len().max(CHANGES));
    for device in snapshot.devices.iter().take(MOST) {
        go_on(device);
    }
}

/// Bytes that changes make a list longer by at most.
const CHANGES: usize = 1 << 16;

/// The file of a snapshot whose device was changed.
fn changed(mut input: Input<'_>) -> Vec<u8> {
    let mut snapshot = Snapshot::example();
    let device = &mut snapshot.devices[0];
    // As the live one has it.
    let core = &mut device.core;
    core.queues[0].max_size = 128;
    core.queues[0].size = 128;
    while !input.is_empty() {
        let (what, which, value) = (input.byte(), usize::from(input.byte()), input.u16());
        let core = &mut device.core;
        let queue = which % core.queues.len().max(1);
        let queue = core.queues.get_mut(queue);
        match (what % 16, queue) {
            (0, _) => core.status = value as u8,
            (1, _) => core.driver_features[which % 4] ^= 1 << (value % 32),
            (2, _) => core.queue_select = value.into(),
            (3, Some(queue)) => queue.size = value,
            (4, Some(queue)) => queue.max_size = value,
            (5, Some(queue)) => queue.ready = value & 1 != 0,
            (6, Some(queue)) => queue.desc = u64::from(value) << (which / 8),
            (7, Some(queue)) => queue.driver = u64::from(value) << (which / 8),
            (8, Some(queue)) => queue.device = u64::from(value) << (which / 8),
            (9, Some(queue)) => {
                let queue = queue.clone();
                core.queues.resize(usize::from(value % 8), queue);
            }
            (10, _) => device.bases.resize(usize::from(value % 8), value),
            (11, _) => device.bases.iter_mut().for_each(|base| *base = value),
            (12, _) => device.config.resize(usize::from(value % 512), which as u8),
            (13, _) => {
                if let Some(byte) = device.config.get_mut(usize::from(value)) {
                    *byte = which as u8;
                }
            }
            (14, _) => {
                let bytes = vec![which as u8; usize::from(value)];
                device.inflight = (which != 0).then_some(bytes);
            }
            (15, _) => device.held = (which != 0).then(|| vec![which as u8; usize::from(value)]),
            _ => {}
        }
    }
    encode(&snapshot).expect("it is small")
}

fn check(snapshot: &Snapshot, given: usize) {
    // As what is KVM's may be shorter than its structure, the second time is the same and not the first.
    let once = encode(snapshot).expect("it was read");
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
        assert!(inflight <= given && inflight as u64 <= MAX_INFLIGHT_REGION.max(given as u64));
    }
}

/// A live device takes the place of the one in the snapshot.
fn go_on(state: &DeviceState) {
    once!(Fixture, fixture(), |fixture: &mut Fixture| {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        std::thread::scope(|scope| {
            let file = &fixture.file;
            scope.spawn(move || lie(theirs, file, Input(&[]), MODE));
            let device = Handshake::begin(ours, &spec())
                .and_then(Handshake::finish)
                .expect("the truth is believed");
            if state.check(&device).is_ok() {
                let transport = MmioTransport::new(device, fixture.memory.clone());
                restore(transport.expect("a device at power-on"), state);
            }
        });
    });
}

fn restore(mut transport: MmioTransport, state: &DeviceState) {
    if transport.restore(state.clone()).is_err() {
        // Its process does not take it: nothing starts.
        return;
    }
    assert_eq!(transport.core().state(), &state.core);
    transport.release();
    let core = transport.core();
    if core.is_running() && core.status() & status::NEEDS_RESET == 0 {
        lies_in_ram(core);
    }
    if !core.device().is_active() {
        return;
    }
    crate::planted!(state.inflight.as_ref().map_or(0, Vec::len) > 64 && state.bases == [16]);
    let told = core.state().clone();
    transport.hold().expect("the truth is believed");
    let again = transport.save(None).expect("a disk has no other state");
    assert_eq!(again.core, told);
    assert_eq!(again.bases.len(), told.queues.len());
}
