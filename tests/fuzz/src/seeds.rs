//! # First inputs
//!
//! Well-formed inputs of each target, from which the fuzzer goes on, made from the product's own tables and encoders so
//! that they stay well-formed when those change.

use crate::start::message;
use ipc::control::added::{Addition, AdditionGrant, Additions};
use ipc::control::{
    BackendGrant, DeviceGrant, Exit, FileGrant, Policy, Reply, Request, SnapshotGrant,
};
use ipc::log::Level;
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use ipc::spec::cpus::CpuList;
use ipc::spec::net::NetSpec;
use ipc::start::{SandboxMode, SeccompMode};
use vmm_main::cmdline::table::{Arg, OPTIONS};
use vmm_main::qmp::schema::commands;
use vmm_main::snapshot::{Snapshot, format};

type Inputs = Vec<Vec<u8>>;

/// Targets and their inputs; each target has at least one.
pub fn all() -> Vec<(&'static str, Inputs)> {
    vec![
        ("block", block()),
        ("cmdline", cmdline()),
        ("control", control()),
        ("fs", fs()),
        ("fuse_decode", fuse_decode()),
        ("harness", harness()),
        ("inflight", inflight()),
        ("kernel", kernel()),
        ("link", link()),
        ("mmio", mmio()),
        ("net", net()),
        ("qcow2", crate::qcow2::seeds::all()),
        ("qmp", qmp()),
        ("snapshot", snapshot()),
        ("start", start()),
    ]
}

/// Words of the languages that are text.
pub fn words() -> Vec<(&'static str, Vec<String>)> {
    let mut options = Vec::new();
    for option in OPTIONS {
        options.push(option.dashed());
        if let Arg::Props { shapes, .. } = option.arg {
            for shape in shapes {
                options.push(shape.name.to_owned());
                options.extend(shape.keys.iter().map(|key| format!("{}=", key.name)));
            }
        }
    }
    options.retain(|word| !word.is_empty());
    options.sort();
    options.dedup();
    let mut qmp: Vec<String> = [
        "execute",
        "arguments",
        "id",
        "return",
        "true",
        "null",
        "1e9",
        "\\u0000",
    ]
    .map(str::to_owned)
    .to_vec();
    for command in commands() {
        qmp.push(command.name.to_owned());
        qmp.extend(
            command
                .arguments
                .iter()
                .map(|argument| argument.name.to_owned()),
        );
    }
    // Flags that are set, lengths and counts, as bincode writes them.
    let bytes = || {
        ["\u{1}\u{1}", "\u{10}\0", "\u{2}\0\0\0\0\0\0\0"]
            .map(str::to_owned)
            .to_vec()
    };
    vec![
        ("cmdline", options),
        ("control", bytes()),
        ("qmp", qmp),
        ("snapshot", bytes()),
        ("start", bytes()),
    ]
}

/// place, len, flags, next as `chains` reads them.
fn descriptor(place: u16, len: u16, flags: u8, next: u8) -> Vec<u8> {
    [&place.to_le_bytes()[..], &len.to_le_bytes(), &[flags, next]].concat()
}

fn queue(
    features: u64,
    shape: u8,
    heads: &[u8],
    direct: &[Vec<u8>],
    indirect: &[Vec<u8>],
    data: &[u8],
) -> Vec<u8> {
    let mut out = features.to_le_bytes().to_vec();
    out.extend([
        shape,
        heads.len() as u8,
        direct.len() as u8,
        indirect.len() as u8,
    ]);
    out.extend(heads);
    out.extend(direct.concat());
    out.extend(indirect.concat());
    out.extend(data);
    out
}

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;
const NEXT: u8 = 1;
const WRITE: u8 = 2;
const TABLE: u8 = 4;

fn block() -> Inputs {
    let mut inputs = Vec::new();
    for (kind, sector) in [(0u32, 3u64), (1, 4), (4, 0), (8, 0), (0, 1 << 60)] {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let data_flags = if kind == 1 { NEXT } else { NEXT | WRITE };
        let chain = |len: u16| {
            vec![
                descriptor(0, 16, NEXT, 1),
                descriptor(0x1000, len, data_flags, 2),
                descriptor(0x100, 1, WRITE, 0),
            ]
        };
        // A sector where no table is allowed, and what is no sector where one is.
        for readonly in [0, 1] {
            inputs.push(
                [
                    &[readonly],
                    &queue(EVENT_IDX, 4, &[0], &chain(512), &[], &header)[..],
                ]
                .concat(),
            );
        }
        let table = [descriptor(0, 48, TABLE | 0x10, 0)];
        for (features, len) in [(EVENT_IDX, 1024), (EVENT_IDX | INDIRECT, 1536)] {
            inputs.push(
                [
                    &[2],
                    &queue(features, 4, &[0], &table, &chain(len), &header)[..],
                ]
                .concat(),
            );
        }
    }
    inputs
}

fn net() -> Inputs {
    let mut inputs = Vec::new();
    let packet = [
        &[0; 12][..],
        &[0xff; 6],
        &[2, 0, 0, 0, 0, 1],
        &[8, 0],
        &[7; 80],
    ]
    .concat();
    let transmit = [descriptor(0, 12, NEXT, 1), descriptor(12, 94, 0, 0)];
    inputs.push(
        [
            &[1, 0],
            &queue(u64::MAX & !INDIRECT, 4, &[0, 0], &transmit, &[], &packet)[..],
        ]
        .concat(),
    );
    let receive = [
        descriptor(0x1000, 1600, WRITE, 0),
        descriptor(0x2000, 300, WRITE, 0),
    ];
    for packets in [1, 6, 7] {
        inputs.push(
            [
                &[0, packets],
                &queue(u64::MAX, 2, &[0, 1, 1], &receive, &[], &packet)[..],
            ]
            .concat(),
        );
    }
    let command = [descriptor(0, 4, NEXT, 1), descriptor(0x100, 1, WRITE, 0)];
    inputs.push(
        [
            &[4, 0],
            &queue(u64::MAX, 2, &[0], &command, &[], &[4, 0, 2, 0])[..],
        ]
        .concat(),
    );
    inputs
}

/// One request of a session, as `fs` reads it.
fn request(opcode: u8, node: u8, mode: u8, handle: u8, body: &[u8]) -> Vec<u8> {
    [
        &[opcode, node, mode, handle][..],
        &(body.len() as u16).to_le_bytes(),
        body,
    ]
    .concat()
}

fn words32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn fs_init() -> Vec<u8> {
    let body = [words32(&[7, 41, 1 << 17, u32::MAX >> 1, 0x1f]), vec![0; 44]].concat();
    request(26, 0, 0, 0, &body)
}

fn fs() -> Inputs {
    let init = fs_init();
    let name = |text: &str| [text.as_bytes(), &[0]].concat();
    let lookup = |text: &str| request(1, 0, 0, 0, &name(text));
    let read = [&[0; 16][..], &words32(&[4096, 0, 0, 0, 0, 0])].concat();
    let sessions: Vec<Vec<Vec<u8>>> = vec![
        vec![
            lookup("file"),
            request(14, 1, 0, 0, &words32(&[2, 0])),
            request(15, 1, 1, 1, &read),
            request(
                16,
                1,
                1,
                1,
                &[&[0; 16][..], &words32(&[4, 0, 0, 0, 0, 0]), b"data"].concat(),
            ),
            request(46, 1, 1, 1, &words32(&[0, 0, 0, 0, 4, 0])),
            request(43, 1, 1, 1, &words32(&[0, 0, 0, 0, 64, 0, 0, 0])),
            request(20, 1, 1, 1, &words32(&[0, 0, 0, 0])),
            request(31, 1, 1, 1, &words32(&[0, 0, 1, 0, 0, 0, 9, 0, 1, 0, 0, 0])),
            request(32, 1, 1, 1, &words32(&[0, 0, 1, 0, 0, 0, 9, 0, 1, 0, 0, 0])),
            request(25, 1, 1, 1, &words32(&[0, 0, 0, 0, 1, 0])),
            request(18, 1, 1, 1, &words32(&[0; 6])),
            request(2, 1, 0, 0, &words32(&[1, 0])),
        ],
        vec![
            request(27, 0, 0, 0, &words32(&[0, 0])),
            request(44, 0, 1, 1, &read),
            request(28, 0, 1, 1, &read),
            request(30, 0, 1, 1, &words32(&[0; 4])),
            request(29, 0, 1, 1, &words32(&[0; 6])),
        ],
        vec![
            request(
                35,
                0,
                0,
                0,
                &[words32(&[0x242, 0o100_644, 0, 0]), name("new")].concat(),
            ),
            request(9, 0, 0, 0, &[words32(&[0o755, 0]), name("sub")].concat()),
            request(
                8,
                0,
                0,
                0,
                &[words32(&[0o010_644, 0, 0, 0]), name("pipe")].concat(),
            ),
            request(6, 0, 0, 0, &[name("soft"), name("/etc/passwd")].concat()),
            request(5, 4, 0, 0, &[]),
            request(13, 0, 0, 0, &[words32(&[2, 0]), name("hard")].concat()),
            request(
                12,
                0,
                0,
                0,
                &[words32(&[1, 0]), name("new"), name("moved")].concat(),
            ),
            request(
                45,
                0,
                0,
                0,
                &[words32(&[1, 0, 1, 0]), name("moved"), name("new")].concat(),
            ),
            request(10, 0, 0, 0, &name("moved")),
            request(11, 0, 0, 0, &name("sub")),
            request(51, 0, 0, 0, &words32(&[2, 0o100_600, 0, 0])),
        ],
        vec![
            lookup("file"),
            request(3, 1, 0, 0, &words32(&[0; 4])),
            request(
                4,
                1,
                0,
                0,
                &[words32(&[1 | 1 << 3, 0]), vec![0; 80]].concat(),
            ),
            request(52, 1, 0, 0, &words32(&[0; 6])),
            request(34, 1, 0, 0, &words32(&[7, 0])),
            request(
                21,
                1,
                0,
                0,
                &[words32(&[1, 0, 0, 0]), name("user.a"), b"x".to_vec()].concat(),
            ),
            request(
                21,
                1,
                0,
                0,
                &[words32(&[1, 0]), name("user.a"), b"x".to_vec()].concat(),
            ),
            request(22, 1, 0, 0, &[words32(&[64, 0]), name("user.a")].concat()),
            request(23, 1, 0, 0, &words32(&[64, 0])),
            request(24, 1, 0, 0, &name("user.a")),
            request(17, 0, 0, 0, &[]),
            request(50, 0, 0, 0, &words32(&[0, 0])),
        ],
        vec![
            lookup("file"),
            lookup("dir"),
            lookup("link"),
            lookup(".."),
            lookup("dir/inner"),
            request(14, 1, 0, 0, &words32(&[2, 0])),
            request(14, 1, 0, 0, &words32(&[2, 0])),
            request(
                47,
                1,
                1,
                1,
                &words32(&[0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0]),
            ),
            request(42, 0, 0, 0, &words32(&[2, 0, 2, 0, 1, 0, 3, 0, 1, 0])),
            request(36, 0, 0, 0, &words32(&[1, 0])),
            request(38, 0, 0, 0, &[]),
        ],
    ];
    sessions
        .into_iter()
        .map(|session| [init.clone(), session.concat()].concat())
        .collect()
}

fn fuse_decode() -> Inputs {
    let mut inputs = Vec::new();
    for opcode in 1..=52u32 {
        let body = [words32(&[1, 0, 2, 0]), b"one\0two\0".to_vec(), vec![0; 64]].concat();
        inputs.push([&opcode.to_le_bytes()[..], &[0], &body].concat());
        inputs.push([&opcode.to_le_bytes()[..], &[1], b"one\0two\0"].concat());
    }
    inputs
}

/// A message of numbers of 16 bits, shifted, as `harness` reads it.
fn wide(request: u8, fds: u8, numbers: &[(u16, u8)]) -> Vec<u8> {
    let mut out = vec![request, 1 | 4, fds, numbers.len() as u8];
    for (value, shift) in numbers {
        out.extend(value.to_le_bytes());
        out.push(*shift);
    }
    out
}

fn pair(request: u8, fds: u8, low: u8, high: u16) -> Vec<u8> {
    [&[request, 2 | 4, fds, 1, low][..], &high.to_le_bytes()].concat()
}

fn harness() -> Inputs {
    let greeting = |region: &[u8], protocol: u16| {
        [
            [&[region.len() as u8], region].concat(),
            wide(3, 0, &[]),
            wide(1, 0, &[]),
            // VERSION_1, PROTOCOL_FEATURES, EVENT_IDX and INDIRECT_DESC are bits 32 and 28 to 30.
            wide(2, 0, &[(0x17, 28)]),
            wide(15, 0, &[]),
            wide(16, 0, &[(protocol, 0)]),
            wide(17, 0, &[]),
        ]
        .concat()
    };
    let protocol = 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
    // One region: guest 0, 64 KiB, the same user addresses, offset 0.
    let memory = vec![5, 3 | 4, 1 << 4, 1, 0, 16, 0, 0];
    let one_queue = [
        pair(8, 0, 0, 16),
        pair(10, 0, 0, 0),
        wide(9, 0, &[(0, 0), (0, 0), (2, 12), (1, 12), (0, 0)]),
        wide(13, 1 << 4 | 1, &[(0, 0)]),
        wide(14, 1 << 4 | 1, &[(0, 0)]),
        wide(12, 1 << 4 | 1, &[(0, 0)]),
        pair(18, 0, 0, 1),
    ]
    .concat();
    let stop = [pair(11, 0, 0, 0), wide(34, 0, &[])].concat();
    // size, offset, then 3 queues of 64 entries, padded.
    let region = |request: u8, fds: u8| {
        let body = [
            &0xcc0u64.to_le_bytes()[..],
            &[0; 8],
            &[3, 0, 64, 0, 0, 0, 0, 0],
        ]
        .concat();
        [&[request, 4, fds, 24][..], &body].concat()
    };
    let config =
        |request: u8| [&[request, 4, 0, 16][..], &words32(&[4, 4, 0, 0x0102_0304])].concat();
    let add =
        |request: u8, fds: u8| wide(request, fds, &[(0, 0), (0, 0), (16, 12), (0, 0), (0, 0)]);
    let all = greeting(&[0; 16], protocol);
    let mut inputs = vec![
        [all.clone(), memory.clone(), one_queue.clone(), stop.clone()].concat(),
        [
            all.clone(),
            region(31, 0),
            region(32, 1 << 4 | 2),
            memory.clone(),
            one_queue.clone(),
            stop,
        ]
        .concat(),
        [
            all.clone(),
            add(37, 1 << 4),
            wide(36, 0, &[]),
            one_queue.clone(),
            add(38, 0),
        ]
        .concat(),
        [all.clone(), config(24), config(25), wide(4, 0, &[])].concat(),
    ];
    // Every bad descriptor in every place for one.
    for bad in 2..16 {
        let call = [
            wide(13, 1 << 4 | bad, &[(0, 0)]),
            wide(14, 1 << 4 | bad, &[(0, 0)]),
            wide(12, 1 << 4 | bad, &[(0, 0)]),
        ];
        inputs.push(
            [
                all.clone(),
                memory.clone(),
                one_queue.clone(),
                call.concat(),
                pair(18, 0, 0, 1),
            ]
            .concat(),
        );
        inputs.push(
            [
                all.clone(),
                vec![5, 7, 1 << 4 | bad, 1, 0, 16, 0, 0],
                region(32, 1 << 4 | bad),
            ]
            .concat(),
        );
    }
    inputs
}

fn inflight() -> Inputs {
    let mut region = vec![0; 8];
    // Version, entries, last batch head, used index.
    for word in [1u16, 8, 0, 0] {
        region.extend(word.to_le_bytes());
    }
    for entry in 0..8u8 {
        // In flight, padding, next, counter.
        region.extend([
            u8::from(entry % 2 == 0),
            0,
            0,
            0,
            0,
            0,
            entry + 1,
            0,
            entry,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
    }
    let chain = [descriptor(0, 10, NEXT, 1), descriptor(0x100, 100, WRITE, 0)];
    let ring = queue(EVENT_IDX, 3, &[0, 0], &chain, &[], b"0123456789");
    [0u8, 1]
        .map(|kind| {
            [
                &[kind, 3][..],
                &(region.len() as u16).to_le_bytes(),
                &region,
                &[0, 0],
                &ring,
            ]
            .concat()
        })
        .to_vec()
}

/// The truth in each mode; after that each answer with one bit changed, behind its header and where configuration space has a
/// disk's size, and one answer after the other that comes twice, with descriptors, in pieces, or longer than it is.
fn link() -> Inputs {
    let mut inputs: Inputs = [0, 1, 2, 4, 8, 0x8f].map(|mode| vec![mode]).to_vec();
    let mut push = |answer: usize, lie: &[u8]| {
        let mut script = vec![0x8f];
        script.extend(std::iter::repeat_n(0, answer));
        script.extend(lie);
        inputs.push(script);
    };
    for answer in 0..12 {
        push(answer, &[2, 12, 0, 1]);
        push(answer, &[2, 31, 0, 1]);
        let lie: [&[u8]; 4] = [&[6 | 1 << 3], &[3 | 1 << 3], &[5, 12, 0], &[7, 31, 0]];
        push(answer, lie[answer % 4]);
    }
    inputs
}

/// One access as `mmio` reads it: a word that is written, shifted by `nibbles`.
fn write_word(register: u8, value: u16, nibbles: u8) -> [u8; 4] {
    let [low, high] = value.to_le_bytes();
    [nibbles << 4, register / 4, low, high]
}

fn read_word(register: u8) -> [u8; 4] {
    [1, register / 4, 0, 0]
}

/// A driver that does everything as it should: a start; and a start, work, an end, and all of that again.
fn mmio() -> Inputs {
    let mut start: Vec<[u8; 4]> = [0x00, 0x04, 0x08, 0x0c].map(read_word).to_vec();
    start.extend([
        write_word(0x70, 0, 0),
        write_word(0x70, 1, 0),
        write_word(0x70, 3, 0),
        write_word(0x14, 0, 0),
        read_word(0x10),
        write_word(0x14, 1, 0),
        read_word(0x10),
        // FLUSH and EVENT_IDX in the first word, VERSION_1 in the second.
        write_word(0x24, 0, 0),
        write_word(0x20, 0x200, 0),
        write_word(0x24, 1, 0),
        write_word(0x20, 1, 0),
        write_word(0x70, 11, 0),
        read_word(0x70),
        write_word(0x30, 0, 0),
        read_word(0x34),
        // Ignored: the size stays the largest.
        write_word(0x38, 0, 0),
        write_word(0x80, 0x1000, 0),
        write_word(0x84, 0, 0),
        write_word(0x90, 0x2000, 0),
        write_word(0x94, 0, 0),
        write_word(0xa0, 0x3000, 0),
        write_word(0xa4, 0, 0),
        write_word(0x44, 1, 0),
        read_word(0x44),
        write_word(0x70, 15, 0),
    ]);
    let work = [
        write_word(0x50, 0, 0),
        read_word(0x60),
        write_word(0x64, 3, 0),
        read_word(0xfc),
        // Configuration space: a word of it is read and written.
        [1, 0x40, 0, 0],
        [0, 0x48, 1, 0],
        // What a driver must not do now.
        write_word(0x38, 64, 0),
        write_word(0x44, 0, 0),
        write_word(0x80, 0x10, 4),
        [0x0a, 0x1c, 1, 1],
    ];
    let end = [write_word(0x70, 0, 0), read_word(0x70)];
    let whole = [&start[..], &work, &end, &start, &work].concat();
    let mut inputs = Inputs::new();
    for (mode, accesses) in [(0, &start[..]), (8, &whole), (12, &whole)] {
        inputs.push([&[mode], accesses.concat().as_slice()].concat());
    }
    inputs
}

fn devices() -> [DeviceSpec; 2] {
    [
        DeviceSpec::Block(BlockSpec {
            id: "disk0".into(),
            readonly: true,
            direct: true,
            serial: "serial".into(),
            num_queues: 2,
            queue_size: 256,
            io: Default::default(),
        }),
        DeviceSpec::Net(NetSpec {
            id: "net0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            queue_pairs: 2,
            queue_size: 256,
            control_queue: true,
            vhost: false,
            limits: Default::default(),
            stands_in: None,
            poll_us: 0,
        }),
    ]
}

fn start() -> Inputs {
    // A card without a queue is a well-formed message.
    let none = DeviceSpec::Net(NetSpec {
        id: "n".into(),
        mac: [0; 6],
        queue_pairs: 0,
        queue_size: 256,
        control_queue: true,
        vhost: false,
        limits: Default::default(),
        stands_in: None,
        poll_us: 0,
    });
    devices()
        .into_iter()
        .chain([none])
        .filter_map(|device| ipc::codec::encode(&message(device)).ok())
        .collect()
}

fn control() -> Inputs {
    let grants = [
        BackendGrant::Image {
            path: "/disk".into(),
            readonly: true,
            direct: true,
            backing: vec!["/below".into()],
        },
        BackendGrant::Tap {
            ifname: "tap0".into(),
            queues: 2,
        },
    ];
    let policy = Policy {
        version: ipc::PROTOCOL_VERSION,
        growing: vec![(0, 1 << 30)],
        vhost_fds: vec![(1, vec![9, 10])],
        iothreads: vec![Some(CpuList::default()), None],
        additions: Additions {
            devices: 9,
            grants: vec![
                AdditionGrant::Images {
                    path: "/images".into(),
                    readonly: true,
                },
                AdditionGrant::Tap {
                    ifname: "tap1".into(),
                },
                AdditionGrant::Sockets {
                    path: "/sockets".into(),
                },
                AdditionGrant::Vhost,
            ],
        },
        files: vec![
            FileGrant::Read {
                option: "-kernel".into(),
                path: "/kernel".into(),
            },
            FileGrant::ListenTcp {
                option: "-qmp".into(),
                host: "localhost".into(),
                port: 4444,
            },
            FileGrant::Pty,
        ],
        devices: devices()
            .into_iter()
            .zip(grants)
            .map(|(spec, backend)| DeviceGrant {
                spec,
                backend,
                iothread: Some(0),
            })
            .collect(),
        userfault: false,
        snapshots: Some(SnapshotGrant {
            folders: vec!["/t".into()],
            memory: 1 << 27,
        }),
        seccomp: SeccompMode::Kill,
        sandbox: SandboxMode::Strict,
        log_level: Level::Info,
        log_file: Some("/log".into()),
        pidfile: None,
        restore_terminal: false,
        daemonize: false,
    };
    // Next to nothing else in them, so that what is in them is hit.
    let bare = Policy {
        additions: Additions {
            devices: 0,
            grants: Vec::new(),
        },
        files: Vec::new(),
        devices: Vec::new(),
        snapshots: None,
        log_file: None,
        ..policy.clone()
    };
    let daemon = Policy {
        daemonize: true,
        ..bare.clone()
    };
    let pidfile = Policy {
        pidfile: Some("/p".into()),
        ..bare.clone()
    };
    let terminal = Policy {
        restore_terminal: true,
        ..bare
    };
    let requests = [
        Request::SnapshotBegin {
            folder: 0,
            name: Some("template".into()),
            exchanges: 1,
        },
        Request::SnapshotEnd { keep: true },
        Request::SetPolicy(policy),
        Request::SetPolicy(daemon),
        Request::SetPolicy(pidfile),
        Request::SetPolicy(terminal),
        Request::Inspect,
        Request::Open { index: 1 },
        Request::Start { index: 0 },
        Request::Stop { index: 0 },
        Request::Add {
            backend: 3,
            addition: Addition::Image {
                path: "/images/a".into(),
                readonly: true,
                direct: false,
            },
        },
        Request::Add {
            backend: 4,
            addition: Addition::GivenTap,
        },
        Request::Add {
            backend: 5,
            addition: Addition::Socket {
                path: "/sockets/a".into(),
            },
        },
        Request::Add {
            backend: 6,
            addition: Addition::GivenSocket,
        },
        Request::DumpFile {
            folder: 0,
            name: "core".into(),
        },
        Request::Remove { backend: 3 },
        Request::Upgrade { index: 0 },
        Request::Replace {
            index: 0,
            addition: Addition::GivenTap,
        },
        Request::Resize {
            index: 0,
            size: 1 << 20,
        },
        Request::Settle {
            index: 0,
            newer: true,
        },
        Request::Unplug { index: 3 },
        Request::StandIn {
            index: 3,
            features: 1 << 17,
        },
        Request::Ready,
    ];
    let replies = [
        Reply::PolicySet { version: 1 },
        Reply::Opened {
            index: 0,
            name: Some("/dev/pts/1".into()),
        },
        Reply::Started { index: 0, pid: 7 },
        Reply::Stopped { index: 0 },
        Reply::Added { backend: 3 },
        Reply::Unplugged { index: 3 },
        Reply::ReadyDone,
        Reply::Failed {
            message: "no".into(),
        },
        Reply::Exited {
            index: 0,
            pid: 7,
            how: Exit::Signal(9),
            last_words: "bye".into(),
        },
        Reply::Serves { index: 0, pid: 8 },
    ];
    let mut inputs = Inputs::new();
    for request in &requests {
        let bytes = ipc::codec::encode(request).unwrap_or_default();
        inputs.extend([0, 2].map(|kind| [&[kind], &bytes[..]].concat()));
    }
    inputs.extend(
        replies
            .iter()
            .map(|reply| [&[1], &ipc::codec::encode(reply).unwrap_or_default()[..]].concat()),
    );
    inputs
}

fn cmdline() -> Inputs {
    [
        "-machine microvm -m 256 -smp 1 -kernel /k -append console=ttyS0 -serial stdio",
        "-machine type=microvm,dump-guest-core=off,mem-share=on -m size=1G -mem-path /dev/hugepages -kernel k -initrd i",
        "-machine microvm -kernel k -drive id=d,file=/disk,,img,readonly=on,direct=off -device virtio-blk-device,drive=d,id=b,serial=s,num-queues=2",
        "-machine microvm -kernel k -netdev tap,id=n,ifname=tap0 -device virtio-net-device,netdev=n,id=c,mac=52:54:00:12:34:56",
        "-machine microvm -kernel k -netdev tap,id=n,fds=3:4,queues=2 -device virtio-net-device,netdev=n,id=c,mq=on",
        "-qmp unix:/tmp/q,server,nowait -qmp tcp:localhost:4444,server,nowait -machine none -name vm -uuid 00000000-0000-0000-0000-000000000001",
        "-chardev socket,id=c,path=/s,server,nowait -mon chardev=c -machine none -D /log -pidfile /p -daemonize -seccomp log -sandbox strict",
        "-chardev file,id=f,path=/o -serial chardev:f -machine microvm -kernel k -smp cpus=2,sockets=1,cores=2,threads=1 -iothread id=i",
        "-machine microvm -m 256 -smp 2 -kernel k -drive id=d,file=/disk -device virtio-blk-device,drive=d,id=b",
        "-help",
        "-version",
    ]
    .map(|line| line.replace(' ', "\0").into_bytes())
    .to_vec()
}

fn qmp() -> Inputs {
    let hello = r#"{"execute":"qmp_capabilities"}"#;
    let mut inputs: Inputs = commands()
        .map(|command| {
            format!(
                "\u{40}{hello}{{\"execute\":\"{}\",\"id\":[1]}}",
                command.name
            )
            .into_bytes()
        })
        .collect();
    inputs.push(
        format!("\0{hello}\n{{\"execute\":\"stop\",\"arguments\":{{}}}}[1]\"x\"").into_bytes(),
    );
    inputs
}

/// `body` with nothing in each list of bytes that has only zeros, and at least 32 of them.
fn without_zeros(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = body;
    while let Some((length, behind)) = rest.split_first_chunk() {
        let length = u64::from_le_bytes(*length) as usize;
        let list = behind
            .get(..length)
            .filter(|list| length >= 32 && list.iter().all(|byte| *byte == 0));
        if list.is_some() {
            out.extend([0; 8]);
            rest = &behind[length..];
        } else {
            out.push(rest[0]);
            rest = &rest[1..];
        }
    }
    out.extend(rest);
    out
}

fn snapshot() -> Inputs {
    let whole = format::encode(&Snapshot::example()).expect("it fits");
    let body = |snapshot: &Snapshot| {
        let whole = format::encode(snapshot).expect("it fits");
        whole[format::HEADER..].to_vec()
    };
    // Most of it are zeros of KVM's structures and of buffers, which may be shorter. Without them, and with a configuration space
    // of two bytes, mutations hit what has a length.
    let mut short = Snapshot::example();
    short.devices[0].config.truncate(2);
    short.devices[0].inflight = None;
    let short = without_zeros(&body(&short));
    assert!(format::decode(&format::seal(&short)).is_ok());
    vec![
        [&[0], &whole[..]].concat(),
        [&[1], &body(&Snapshot::example())[..]].concat(),
        [&[1], &short[..]].concat(),
        // Nothing, an index, and a queue that is elsewhere.
        vec![2],
        vec![2, 11, 0, 9, 0, 14, 1, 64, 0],
        vec![2, 6, 64, 0x40, 0, 3, 0, 64, 0, 10, 0, 1, 0],
    ]
}

fn kernel() -> Inputs {
    // An ELF of one segment at 1 MiB with a PVH note.
    let mut note = words32(&[4, 4, 18]);
    note.extend(b"Xen\0");
    note.extend(0x10_0000u32.to_le_bytes());
    let headers = 64 + 2 * 56;
    let mut elf = vec![
        0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0, 1, 0, 0, 0,
    ];
    for word in [0x10_0000u64, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let segment = |kind: u32, offset: u64, at: u64, len: u64| {
        let mut out = words32(&[kind, 7]);
        for word in [offset, at, at, len, len, 0x1000] {
            out.extend(word.to_le_bytes());
        }
        out
    };
    elf.extend(segment(1, headers as u64, 0x10_0000, 64));
    elf.extend(segment(4, headers as u64, 0x10_0000, note.len() as u64));
    elf.extend(&note);
    elf.resize(headers + 64, 0x90);
    // A bzImage with one setup sector and a kernel of 512 bytes.
    let mut image = vec![0; 2048];
    image[0x1f1] = 1;
    image[0x1f4..0x1f8].copy_from_slice(&32u32.to_le_bytes());
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x201] = 0x66;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    image[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x1_0000u32.to_le_bytes());
    let mut inputs = Vec::new();
    for kind in [0, 1, 2, 6, 0xf2] {
        inputs.push([&[kind], &elf[..]].concat());
        inputs.push([&[kind], &image[..]].concat());
    }
    inputs
}
