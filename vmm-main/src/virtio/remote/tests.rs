//! Devices that are truthful, lie, are silent or die, at each step.
//!
//! **Job.** What the parent promises of each of them. **Who is not trusted.** Nobody; the device is `fake_device`'s.
//! **Why this way.** A device in a thread of the test says exactly what a hostile one would, at the moment that is asked for.

use super::super::fake_device::{self as fake, FakeDevice, Misdeed, Script, connect, memory};
use super::inflight::INFLIGHT_LAYOUT;
use super::offer::{F_EVENT_IDX, NET_OF_FRONT_END};
use super::*;
use ipc::control::DeviceGrant;
use ipc::counters;
use ipc::limits::MAX_CONFIG_SPACE;
use ipc::spec::DeviceSpec;
use ipc::spec::net::NetSpec;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

fn misbehave(request: u32, what: Misdeed) -> Script {
    Script {
        misdeed: Some((request, what)),
        ..Script::default()
    }
}

fn queue(size: u16, desc: u64, driver: u64, device: u64) -> QueueState {
    QueueState {
        max_size: 128,
        size,
        ready: true,
        desc,
        driver,
        device,
    }
}

fn activate(device: &mut RemoteDevice, state: &QueueState) -> Result<(), RemoteError> {
    let event = || EventFd::new(0).unwrap();
    let (kick, call, error) = (event(), event(), event());
    let both = [0, 1].map(|index| QueueHandover {
        base: 0,
        index,
        state,
        kick: &kick,
        call: &call,
        error: &error,
    });
    device.activate(F_VERSION_1, &memory(), &both)
}

#[test]
fn a_truthful_device_is_accepted_and_hides_what_the_transport_cannot_do() {
    let (device, _fake) = connect(Script::default());
    let device = device.unwrap();
    assert_eq!(device.features(), F_VERSION_1 | F_EVENT_IDX | 1 << 9);
    assert_eq!(
        (device.virtio_id(), device.num_queues(), device.queue_size()),
        (2, 2, 128)
    );
    assert_eq!(device.config()[..8], 0x1122_3344_5566_7788u64.to_le_bytes());
    assert_eq!(device.config().len(), MAX_CONFIG_SPACE);
}

#[test]
fn the_steps_of_several_handshakes_can_be_interleaved() {
    let started: Vec<_> = (0..3)
        .map(|_| FakeDevice::start(Script::default()))
        .collect();
    let mut fakes = Vec::new();
    let mut handshakes = Vec::new();
    for (socket, fake) in started {
        handshakes.push(Handshake::begin(socket, &fake::spec()).unwrap());
        fakes.push(fake);
    }
    for handshake in &mut handshakes {
        handshake.negotiate().unwrap();
    }
    for handshake in handshakes {
        handshake.finish().unwrap();
    }
}

/// Calls `advance` whenever something has come, as the main loop does.
fn advance(handshake: &mut Handshake) -> Result<(), RemoteError> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        let left = handshake
            .deadline()
            .saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap();
        poll(
            &mut [PollFd::new(handshake.as_fd(), PollFlags::POLLIN)],
            timeout,
        )
        .unwrap();
        if handshake.advance()? {
            return Ok(());
        }
    }
}

#[test]
fn a_handshake_goes_on_whenever_something_has_come() {
    let (socket, _fake) = FakeDevice::start(Script::default());
    let mut handshake = Handshake::begin(socket, &fake::spec()).unwrap();
    advance(&mut handshake).unwrap();
    assert!(handshake.advance().unwrap(), "it stays so");
    assert_eq!(handshake.finish().unwrap().num_queues(), 2);
}

#[test]
fn a_handshake_that_stops_half_way_does_not_hold_its_caller_and_ends() {
    // A header that promises a body, and never the body.
    for misdeed in [
        Misdeed::Silence,
        Misdeed::Reply([fake::GET_CONFIG, 5, 268], 200),
    ] {
        let (socket, _fake) = FakeDevice::start(misbehave(fake::GET_CONFIG, misdeed));
        let mut handshake = Handshake::begin(socket, &fake::spec()).unwrap();
        let start = Instant::now();
        assert!(!handshake.advance().is_ok_and(|done| done));
        assert!(start.elapsed() < Duration::from_secs(1));
        let error = advance(&mut handshake).unwrap_err();
        assert!(
            matches!(
                error,
                RemoteError::Link {
                    source: LinkError::Timeout { .. },
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[test]
fn lies_about_queues_features_and_configuration_are_told() {
    let (device, _fake) = connect(Script {
        queues: 3,
        ..Script::default()
    });
    assert!(matches!(
        device,
        Err(RemoteError::Queues {
            got: 3,
            want: 2,
            ..
        })
    ));
    let (device, _fake) = connect(Script {
        queues: u64::MAX,
        ..Script::default()
    });
    assert!(matches!(device, Err(RemoteError::Queues { .. })));
    for len in [0, 8, 255, 257, 4000] {
        let (device, _fake) = connect(Script {
            config: vec![0; len],
            ..Script::default()
        });
        assert!(
            matches!(device, Err(RemoteError::Config { .. })),
            "{len}: {device:?}"
        );
    }
    let (device, _fake) = connect(Script {
        features: 1 << 30,
        ..Script::default()
    });
    assert!(matches!(
        device,
        Err(RemoteError::Features { kind: "virtio", .. })
    ));
    let (device, _fake) = connect(Script {
        protocol: 1,
        ..Script::default()
    });
    assert!(matches!(
        device,
        Err(RemoteError::Features {
            kind: "vhost-user",
            ..
        })
    ));
}

#[test]
fn garbage_is_an_error_at_every_step() {
    for request in [
        fake::GET_FEATURES,
        fake::GET_PROTOCOL_FEATURES,
        fake::GET_QUEUE_NUM,
        fake::GET_CONFIG,
    ] {
        for misdeed in [
            Misdeed::Reply([request, 5, u32::MAX], 0),
            Misdeed::Reply([request, 5, 4097], 0),
            Misdeed::Reply([request, 5, 4], 4),
            Misdeed::Reply([request, 5, 0], 0),
            Misdeed::Reply([request, 1, 8], 8),
            Misdeed::Reply([request, 6, 8], 8),
            Misdeed::Reply([request, 0x8000_0005, 8], 8),
            Misdeed::Reply([request + 1, 5, 8], 8),
            Misdeed::Reply([0, 0, 0], 0),
            Misdeed::Reply([u32::MAX; 3], 1000),
            Misdeed::Descriptors,
            Misdeed::Close,
        ] {
            let (device, _fake) = connect(misbehave(request, misdeed));
            let error = device.unwrap_err();
            assert!(
                matches!(error, RemoteError::Link { .. }),
                "{misdeed:?}: {error:?}"
            );
        }
    }
}

#[test]
fn silence_ends_in_an_error() {
    let start = Instant::now();
    let (device, _fake) = connect(misbehave(fake::GET_QUEUE_NUM, Misdeed::Silence));
    // The reply to the next request comes, and is not the one that is waited for.
    assert!(matches!(
        device,
        Err(RemoteError::Link {
            source: LinkError::Malformed { .. },
            ..
        })
    ));
    let (device, _fake) = connect(misbehave(fake::GET_CONFIG, Misdeed::Silence));
    assert!(matches!(
        device,
        Err(RemoteError::Link {
            source: LinkError::Timeout {
                request: Some(FrontendReq::GET_CONFIG),
                ..
            },
            ..
        })
    ));
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_reply_in_drips_is_bound_by_the_same_time() {
    // A header that promises a body, and never the body.
    let misdeed = Misdeed::Reply([fake::GET_CONFIG, 5, 268], 200);
    let (device, _fake) = connect(misbehave(fake::GET_CONFIG, misdeed));
    assert!(matches!(
        device,
        Err(RemoteError::Link {
            source: LinkError::Timeout { .. },
            ..
        })
    ));
}

#[test]
fn activation_tells_everything_and_reset_takes_it_back() {
    let (device, fake) = connect(Script::default());
    let mut device = device.unwrap();
    fake.arrived();
    let state = queue(128, 0x1000, 4 << 30, 0x3000);
    activate(&mut device, &state).unwrap();
    assert!(device.is_active());
    let seen = fake.arrived();
    let one_queue = [
        fake::SET_VRING_NUM,
        fake::SET_VRING_BASE,
        fake::SET_VRING_ADDR,
        fake::SET_VRING_CALL,
        fake::SET_VRING_ERR,
        fake::SET_VRING_KICK,
        fake::SET_VRING_ENABLE,
    ];
    let want: Vec<u32> = [fake::SET_FEATURES, fake::SET_MEM_TABLE]
        .into_iter()
        .chain(one_queue)
        .chain(one_queue)
        .collect();
    assert_eq!(
        seen.iter().map(|seen| seen.request).collect::<Vec<_>>(),
        want
    );
    let body = |request: u32| {
        &seen
            .iter()
            .rfind(|seen| seen.request == request)
            .unwrap()
            .body
    };
    let words = |request| -> Vec<u64> {
        let chunks = body(request).chunks_exact(8);
        chunks
            .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
            .collect()
    };
    assert_eq!(words(fake::SET_FEATURES), [F_VERSION_1 | 1 << 30]);
    // Number of regions; then guest address, size, "user" address, offset in the file.
    assert_eq!(
        words(fake::SET_MEM_TABLE),
        [2, 0, 1 << 20, 0, 0, 4 << 30, 1 << 20, 4 << 30, 1 << 20]
    );
    // Index and flags; then descriptor table, used ring, available ring, log.
    assert_eq!(words(fake::SET_VRING_ADDR), [1, 0x1000, 0x3000, 4 << 30, 0]);
    assert_eq!(words(fake::SET_VRING_NUM), [1 | 128 << 32]);
    assert_eq!(words(fake::SET_VRING_BASE), [1]);
    assert_eq!(words(fake::SET_VRING_KICK), [1]);
    let fds: Vec<usize> = seen.iter().map(|seen| seen.fds.len()).collect();
    assert_eq!(fds, [0, 2, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]);

    device.deactivate().unwrap();
    assert!(!device.is_active());
    device.deactivate().unwrap();
    drop(device);
    assert_eq!(
        fake.requests(),
        [
            fake::GET_VRING_BASE,
            fake::GET_VRING_BASE,
            fake::RESET_DEVICE
        ]
    );
}

#[test]
fn a_card_of_somebody_elses_daemon_has_the_front_ends_face_and_no_control_queue() {
    let grant = DeviceGrant {
        spec: DeviceSpec::Net(NetSpec {
            id: "net0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            queue_pairs: 1,
            control_queue: false,
            vhost: false,
            queue_size: 128,
            limits: Default::default(),
            stands_in: None,
            poll_us: 0,
        }),
        backend: ipc::control::BackendGrant::Socket {
            option: "-chardev id=c".into(),
            path: "/s".into(),
        },
        iothread: None,
    };
    // CTRL_VQ, MQ and MTU, which are not passed on, and MRG_RXBUF, which is.
    let (csum, mtu, mergeable, control, mq) = (1, 1 << 3, 1 << 15, 1 << 17, 1 << 22);
    let (front, fake) = FakeDevice::start(Script {
        features: F_VERSION_1 | 1 << 30 | csum | mtu | mergeable | control | mq,
        // A pair.
        queues: 1,
        protocol: 1 | 1 << 3,
        ..Script::default()
    });
    let handshake = Handshake::begin_for(front, &grant).unwrap();
    let mut device = handshake.finish().unwrap();
    assert_eq!(device.num_queues(), 2);
    assert_eq!(
        device.features(),
        F_VERSION_1 | csum | mergeable | NET_OF_FRONT_END
    );
    assert_eq!(device.config()[..10], [2, 0, 0, 0, 0, 1, 1, 0, 1, 0]);
    fake.arrived();

    // 7 buffers are done, as the used ring says.
    let memory = memory();
    let state = queue(128, 0x1000, 4 << 30, 0x3000);
    memory.write_obj(7_u16, GuestAddress(0x3002)).unwrap();
    let event = || EventFd::new(0).unwrap();
    let (kick, call, error) = (event(), event(), event());
    let both = [0, 1].map(|index| QueueHandover {
        base: 0,
        index,
        state: &state,
        kick: &kick,
        call: &call,
        error: &error,
    });
    device.activate(device.features(), &memory, &both).unwrap();
    let seen = fake.arrived();
    let of = |seen: &[fake::Seen], request| -> Vec<Vec<u8>> {
        let found = seen.iter().filter(|seen| seen.request == request);
        found.map(|seen| seen.body.clone()).collect()
    };
    let told = (F_VERSION_1 | 1 << 30 | csum | mergeable).to_le_bytes();
    assert_eq!(of(&seen, fake::SET_FEATURES), [told]);
    let words = |index: u32, value: u32| [index.to_le_bytes(), value.to_le_bytes()].concat();
    assert_eq!(of(&seen, fake::SET_VRING_BASE), [words(0, 7), words(1, 7)]);

    for up in [false, true] {
        assert!(device.set_link(up).unwrap());
        assert_eq!(device.config()[NET_STATUS], u8::from(up));
        let seen = fake.arrived();
        let want = [words(0, u32::from(up)), words(1, u32::from(up))];
        assert_eq!(of(&seen, fake::SET_VRING_ENABLE), want);
        assert_eq!(seen.len(), 2, "{seen:?}");
    }
    device.set_link(false).unwrap();
    fake.arrived();
    device.activate(device.features(), &memory, &both).unwrap();
    let seen = fake.arrived();
    let last = of(&seen, fake::SET_VRING_ENABLE);
    assert_eq!(last[last.len() - 2..], [words(0, 0), words(1, 0)]);
}

#[test]
fn many_queues_stay_within_the_window() {
    let spec = DeviceSpec::Net(ipc::spec::net::NetSpec {
        id: "net0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        queue_pairs: 16,
        control_queue: true,
        vhost: false,
        queue_size: 256,
        limits: Default::default(),
        stands_in: None,
        poll_us: 0,
    });
    let (front, fake) = FakeDevice::start(Script {
        queues: 33,
        ..Script::default()
    });
    let mut device = Handshake::begin(front, &spec)
        .and_then(Handshake::finish)
        .unwrap();
    let state = queue(256, 0x1000, 0x3000, 0x4000);
    let event = EventFd::new(0).unwrap();
    let queues: Vec<_> = (0..33)
        .map(|index| QueueHandover {
            base: 0,
            index,
            state: &state,
            kick: &event,
            call: &event,
            error: &event,
        })
        .collect();
    device.activate(F_VERSION_1, &memory(), &queues).unwrap();
    drop(device);
    let requests = fake.requests();
    let enabled = requests
        .iter()
        .filter(|&&request| request == fake::SET_VRING_ENABLE);
    assert_eq!(enabled.count(), 33);
}

#[test]
fn an_inflight_region_is_fetched_once_and_dropped_at_reset() {
    let protocol = fake::PROTOCOL | 1 << 12;
    let (device, fake) = connect(Script {
        protocol,
        ..Script::default()
    });
    let mut device = device.unwrap();
    let state = queue(128, 0x1000, 0x2000, 0x3000);
    activate(&mut device, &state).unwrap();
    device.deactivate().unwrap();
    activate(&mut device, &state).unwrap();
    drop(device);
    let requests = fake.requests();
    let count = |wanted| {
        requests
            .iter()
            .filter(|&&request| request == wanted)
            .count()
    };
    assert_eq!(
        (count(fake::GET_INFLIGHT_FD), count(fake::SET_INFLIGHT_FD)),
        (2, 2)
    );
}

#[test]
fn requests_in_flight_are_counted_and_lies_about_them_do_no_harm() {
    let region = |size: u64, queues: u16, entries: u16, bytes: &[u8]| {
        let mut layout = [0; INFLIGHT_LAYOUT];
        layout[..8].copy_from_slice(&size.to_le_bytes());
        layout[16..18].copy_from_slice(&queues.to_le_bytes());
        layout[18..20].copy_from_slice(&entries.to_le_bytes());
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        InflightRegion {
            layout,
            file,
            process: 0,
        }
    };
    // Two queues of three entries in 64 bytes each.
    let mut bytes = [0; 128];
    for at in [16, 48, 64 + 32] {
        bytes[at] = 1;
    }
    assert_eq!(region(128, 2, 3, &bytes).count().unwrap(), 3);
    assert_eq!(region(128, 2, 2, &bytes).count().unwrap(), 2);
    for (size, queues, entries) in [
        (0, 0, 0),
        (0, 9, 9),
        (128, 0, 3),
        (128, 200, 3),
        (128, u16::MAX, u16::MAX),
    ] {
        let _ = region(size, queues, entries, &bytes).count().unwrap();
    }
    assert!(region(u64::MAX, 2, 3, &bytes).count().is_err());
    assert!(region(129, 2, 3, &bytes).count().is_err());
}

#[test]
fn counters_are_the_end_of_the_region_wherever_a_device_says_that_is() {
    use ipc::counters::{Field, Kind};
    let region = |size: u64, offset: u64| {
        let mut layout = [0; INFLIGHT_LAYOUT];
        layout[..8].copy_from_slice(&size.to_le_bytes());
        layout[8..16].copy_from_slice(&offset.to_le_bytes());
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&7u64.to_le_bytes(), 64).unwrap();
        file.write_all_at(&[0xff; 8], 56).unwrap();
        file.set_len(64 + counters::BYTES as u64).unwrap();
        InflightRegion {
            layout,
            file,
            process: 0,
        }
    };
    let size = 64 + counters::BYTES as u64;
    let told = region(size, 0).counters().unwrap();
    assert_eq!(told.get(Kind::Read, Field::Operations), 7);
    for (size, offset) in [(size + 1, 0), (u64::MAX, 0), (size, u64::MAX), (size, 1)] {
        assert!(region(size, offset).counters().is_err(), "{size} {offset}");
    }
    // One that is smaller than they are: some numbers, and no harm.
    assert!(region(1, 0).counters().is_ok());
}

#[test]
fn a_refusal_or_death_in_activation_leaves_the_device_without_process() {
    for what in [
        Misdeed::Refuse,
        Misdeed::Close,
        Misdeed::Reply([1, 2, 3], 3),
    ] {
        for request in [
            fake::SET_FEATURES,
            fake::SET_MEM_TABLE,
            fake::SET_VRING_KICK,
        ] {
            let (device, _fake) = connect(misbehave(request, what));
            let mut device = device.unwrap();
            let state = queue(128, 0x1000, 0x2000, 0x3000);
            assert!(activate(&mut device, &state).is_err(), "{what:?}");
            assert!(device.is_away());
            let again = activate(&mut device, &state);
            assert!(
                matches!(again, Err(RemoteError::Failed { .. })),
                "{again:?}"
            );
            assert!(device.deactivate().is_err(), "it may still touch memory");
            device.process_ended();
            device.deactivate().unwrap();
        }
    }
}

#[test]
fn queues_outside_of_ram_never_reach_the_device() {
    let (device, fake) = connect(Script::default());
    let mut device = device.unwrap();
    fake.arrived();
    let end = 1 << 20;
    for state in [
        queue(128, end, 0x2000, 0x3000),
        queue(128, end - 16, 0x2000, 0x3000),
        queue(128, 0x1000, end - 4, 0x3000),
        queue(128, 0x1000, 0x2000, end - 1024),
        queue(128, u64::MAX - 15, 0x2000, 0x3000),
        queue(128, 0x1000, u64::MAX - 1, 0x3000),
        queue(128, 0x1000, 0x2000, 2 << 30),
    ] {
        let error = activate(&mut device, &state).unwrap_err();
        assert!(error.is_guests_fault(), "{error}");
    }
    assert!(!device.is_away() && fake.arrived().is_empty());
    // The last bytes of RAM are RAM.
    activate(
        &mut device,
        &queue(128, end - 2048, 0x2000, end - 2048 - 1032),
    )
    .unwrap();
}

#[test]
fn configuration_writes_come_back_as_the_device_took_them() {
    let (device, _fake) = connect(Script::default());
    let mut device = device.unwrap();
    device.write_config(32, &[7]).unwrap();
    assert_eq!(device.config()[32], 7);
    let (device, _fake) = connect(misbehave(fake::SET_CONFIG, Misdeed::Refuse));
    let mut device = device.unwrap();
    device.write_config(32, &[7]).unwrap();
    assert_eq!(device.config()[32], 0);
    assert!(!device.is_away(), "a refused write is the guest's affair");
    let (device, _fake) = connect(misbehave(fake::SET_CONFIG, Misdeed::Close));
    let mut device = device.unwrap();
    assert!(device.write_config(32, &[7]).is_err());
    assert!(device.is_away());
}
