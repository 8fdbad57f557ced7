//! # `mmio`: a guest's accesses to the registers of a virtio-mmio device
//!
//! Each four bytes are one access: what kind, which register, a value. A device process that tells the truth is behind the
//! registers (`link` has the liars). While the device runs, nothing that the driver writes changes its queues; what a
//! process gets lies in guest RAM, and no feature is on that was not offered.

use crate::bytes::Input;
use crate::link::{Fixture, RAM, fixture, lie, spec};
use crate::{once, planted};
use std::os::unix::net::UnixStream;
use vmm_main::machine::bus::BusDevice;
use vmm_main::virtio::core::{Core, status};
use vmm_main::virtio::mmio::MmioTransport;
use vmm_main::virtio::remote::{Handshake, QueueState};

/// Accesses of one input at most.
const MOST: usize = 256;

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.byte();
    once!(Fixture, fixture(), |fixture: &mut Fixture| {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        std::thread::scope(|scope| {
            let file = &fixture.file;
            scope.spawn(move || lie(theirs, file, Input(&[]), mode));
            let device = Handshake::begin(ours, &spec())
                .and_then(Handshake::finish)
                .expect("the truth is believed");
            let transport = MmioTransport::new(device, fixture.memory.clone());
            drive(transport.expect("a device at power-on"), input);
        });
    });
}

fn drive(mut transport: MmioTransport, mut input: Input<'_>) {
    let mut frozen: Option<Vec<QueueState>> = None;
    for _ in 0..MOST {
        if input.is_empty() {
            return;
        }
        let (kind, register, value) = (input.byte(), input.byte(), input.u16());
        // Registers are words; sometimes the access is askew. The last ones are configuration space.
        let offset = u64::from(register) * 4 + u64::from(kind >> 3 & 1);
        let len = [4, 1, 2, 8][usize::from(kind >> 1 & 3)];
        if kind & 1 == 0 {
            let value = u64::from(value) << (4 * (kind >> 4));
            transport.write(offset, &value.to_le_bytes()[..len]);
        } else {
            let mut bytes = [0xa5; 8];
            transport.read(offset, &mut bytes[..len]);
        }
        let core = transport.core();
        match (&frozen, core.is_running()) {
            (Some(queues), true) => assert_eq!(queues, &core.state().queues),
            (None, true) => {
                // A driver that is at fault is told by this bit, and no process gets its queues.
                if core.status() & status::NEEDS_RESET == 0 {
                    lies_in_ram(core);
                } else {
                    assert!(!core.device().is_active());
                }
                frozen = Some(core.state().queues.clone());
            }
            (_, false) => frozen = None,
        }
        planted!(core.device().is_active() && core.state().queues[0].size < 128);
    }
}

pub(crate) fn lies_in_ram(core: &Core) {
    let state = core.state();
    assert_ne!(state.status & status::FEATURES_OK, 0);
    let [low, high, beyond @ ..] = state.driver_features;
    let accepted = u64::from(low) | u64::from(high) << 32;
    assert_eq!(accepted & !core.device().features(), 0);
    assert!(beyond.iter().all(|word| *word == 0));
    for queue in state.queues.iter().filter(|queue| queue.ready) {
        assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
        let size = u64::from(queue.size);
        // Virtio 1.3, section 2.7: the three parts of a split ring.
        for (at, len) in [
            (queue.desc, 16 * size),
            (queue.driver, 6 + 2 * size),
            (queue.device, 6 + 8 * size),
        ] {
            assert!(
                at.checked_add(len).is_some_and(|end| end <= RAM as u64),
                "{queue:x?}"
            );
        }
    }
}
