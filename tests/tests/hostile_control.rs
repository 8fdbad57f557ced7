//! # A control process that its guest has taken over, against its broker
//!
//! **Job.** The real broker on the channel that its control process has, which now sends anything: cut, long, unknown, repeated, with
//! descriptors, without end. It refuses or ends, opens nothing beyond its policy, and leaves nothing behind.
//! **Who is not trusted.** The test's own side. **Why this way.** The binary in its role, with its filter on; what it holds is read
//! from /proc, and what it made from the folder.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use ipc::PROTOCOL_VERSION;
use ipc::channel::{Channel, ChannelError};
use ipc::codec::encode;
use ipc::control::added::{Addition, AdditionGrant, Additions};
use ipc::control::{BackendGrant, DeviceGrant, FileGrant, Policy, Reply, Request, SnapshotGrant};
use ipc::limits::MAX_MESSAGE;
use ipc::log::Level;
use ipc::spec::DeviceSpec;
use ipc::spec::block::{BlockIo, BlockSpec};
use ipc::spec::net::{NetLimits, NetSpec};
use ipc::start::{SandboxMode, SeccompMode};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tests::host::require_root;
use tests::procfs;
use tests::vm::binary;
use tests::wait::{Deadline, Watched, readable};

const LIMIT: Duration = Duration::from_secs(10);
const WORDS: &[u8] = b"what the command line names";

struct Broker {
    child: Child,
    channel: Channel,
    log: std::io::PipeReader,
    dir: PathBuf,
}

fn broker(dir: &Path) -> Broker {
    require_root();
    std::fs::write(dir.join("granted"), WORDS).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    setsockopt(&ours, sockopt::SndBuf, &(4 * MAX_MESSAGE)).unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let (log, log_end) = std::io::pipe().unwrap();
    let child = Command::new(binary("stratovirt").unwrap())
        .arg0("stratovirt-broker")
        .arg(theirs.as_fd().as_raw_fd().to_string())
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log_end)
        .spawn()
        .unwrap();
    Broker {
        child,
        channel: ours,
        log,
        dir: dir.to_owned(),
    }
}

fn policy(dir: &Path) -> Policy {
    Policy {
        additions: Additions::default(),
        growing: Vec::new(),
        vhost_fds: Vec::new(),
        iothreads: Vec::new(),
        version: PROTOCOL_VERSION,
        files: vec![
            FileGrant::Read {
                option: "-kernel".into(),
                path: dir.join("granted"),
            },
            FileGrant::Read {
                option: "-initrd".into(),
                path: dir.join("absent"),
            },
        ],
        devices: Vec::new(),
        userfault: false,
        snapshots: Some(SnapshotGrant {
            folders: vec![dir.to_owned()],
            memory: 4096,
        }),
        seccomp: SeccompMode::Kill,
        sandbox: SandboxMode::BestEffort,
        log_level: Level::Error,
        log_file: None,
        pidfile: None,
        restore_terminal: false,
        daemonize: false,
    }
}

impl Broker {
    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Any packet; whether it went.
    fn raw(&self, bytes: &[u8], fds: &[RawFd]) -> bool {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(
            self.channel.as_fd().as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .is_ok()
    }

    fn reply(&self) -> Option<(Reply, Vec<OwnedFd>)> {
        let ready = readable(&[self.channel.as_fd()], Deadline::after(LIMIT)).unwrap();
        assert!(ready.is_some(), "the broker says nothing");
        match self.channel.receive() {
            Ok(message) => Some(message),
            Err(ChannelError::Closed) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn ask(&self, request: &Request) -> Option<(Reply, Vec<OwnedFd>)> {
        self.channel.send(request, &[]).unwrap();
        self.reply()
    }

    #[track_caller]
    fn refuses(&self, request: &Request, words: &str) {
        let Some((Reply::Failed { message }, fds)) = self.ask(request) else {
            panic!("{request:?} was not refused");
        };
        assert!(
            message.contains(words) && fds.is_empty(),
            "{request:?}: {message}"
        );
    }

    fn with_policy(dir: &Path) -> Self {
        Self::with(dir, policy(dir))
    }

    fn with(dir: &Path, policy: Policy) -> Self {
        let broker = broker(dir);
        let answer = broker.ask(&Request::SetPolicy(policy));
        assert!(
            matches!(answer, Some((Reply::PolicySet { .. }, _))),
            "{answer:?}"
        );
        broker
    }

    /// What the policy grants works as before, and brings what it always brought.
    #[track_caller]
    fn still_serves(&self) {
        let Some((Reply::Opened { index: 0, .. }, mut fds)) = self.ask(&Request::Open { index: 0 })
        else {
            panic!("the broker does not serve any more");
        };
        assert_eq!(fds.len(), 1);
        let mut text = Vec::new();
        File::from(fds.remove(0)).read_to_end(&mut text).unwrap();
        assert_eq!(text, WORDS);
    }

    /// What it holds between two requests. Requests are served one after the other, and what one of them brought or got is closed
    /// before the next is read, but after the answer has gone: so a request that brings and gets nothing comes first.
    fn fds(&self) -> BTreeMap<i32, procfs::Fd> {
        self.refuses(&Request::Open { index: u32::MAX }, "the policy has no file");
        procfs::fds(self.pid()).unwrap()
    }

    /// Descriptors of files; standard streams, sockets and pipes are none.
    fn files(&self) -> Vec<String> {
        let named = self.fds().into_values().map(|fd| fd.target);
        named
            .filter(|target| target.starts_with('/') && target != "/dev/null")
            .collect()
    }

    /// The channel closes: it ends by itself, and nothing is there that was not before.
    #[track_caller]
    fn ends(self) -> (ExitStatus, String) {
        let Self {
            mut child,
            channel,
            mut log,
            dir,
        } = self;
        let watched = Watched::new(i32::try_from(child.id()).unwrap()).unwrap();
        drop(channel);
        assert!(
            watched.ended(Deadline::after(LIMIT)).unwrap(),
            "the broker hangs"
        );
        let status = child.wait().unwrap();
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        assert_eq!(status.signal(), None, "{text}");
        let names: Vec<_> = std::fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["granted"], "{text}");
        assert_eq!(std::fs::read(dir.join("granted")).unwrap(), WORDS);
        (status, text)
    }
}

#[test]
fn what_is_no_policy_ends_the_broker_with_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = encode(&Request::SetPolicy(policy(dir.path()))).unwrap();
    let mut trailing = good.clone();
    trailing.push(0);
    let mut packets = vec![
        vec![0xff; 64],
        vec![0; 1],
        trailing,
        vec![0; MAX_MESSAGE + 1],
    ];
    // Cut anywhere.
    packets.extend((1..good.len()).step_by(7).map(|len| good[..len].to_vec()));
    for packet in packets {
        let broker = broker(dir.path());
        assert!(
            broker.raw(&packet, &[]),
            "{} bytes cannot be sent",
            packet.len()
        );
        assert_eq!(broker.reply().map(|(reply, _)| reply), None);
        let (status, log) = broker.ends();
        assert_eq!((status.code(), log.lines().count()), (Some(1), 1), "{log}");
        assert!(log.contains("message"), "{log}");
    }
    // Nothing at all.
    let (status, log) = broker(dir.path()).ends();
    assert_eq!((status.code(), log.as_str()), (Some(0), ""));
}

#[test]
fn the_policy_comes_first_and_once() {
    let dir = tempfile::tempdir().unwrap();
    for request in [
        Request::Open { index: 0 },
        Request::Start { index: 0 },
        Request::Stop { index: 0 },
        Request::Ready,
    ] {
        let broker = broker(dir.path());
        broker.refuses(&request, "the policy must come first");
        assert!(broker.reply().is_none());
        broker.ends();
    }
    let other = broker(dir.path());
    let version = PROTOCOL_VERSION + 1;
    let wrong = Policy {
        version,
        ..policy(dir.path())
    };
    other.refuses(&Request::SetPolicy(wrong), "protocol version");
    other.ends();

    let broker = Broker::with_policy(dir.path());
    let mut greedy = policy(dir.path());
    for file in &mut greedy.files {
        *file = FileGrant::Output {
            option: "-kernel".into(),
            path: dir.path().join("made"),
        };
    }
    greedy.pidfile = Some(dir.path().join("pid"));
    broker.refuses(&Request::SetPolicy(greedy), "the policy is fixed");
    broker.still_serves();
    // Without a pid file in the policy, none is written.
    assert!(matches!(
        broker.ask(&Request::Ready),
        Some((Reply::ReadyDone, _))
    ));
    broker.ends();
}

#[test]
fn numbers_that_the_policy_does_not_have_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Broker::with_policy(dir.path());
    for index in [2, 3, 255, 65536, u32::MAX / 2, u32::MAX] {
        broker.refuses(&Request::Open { index }, "the policy has no file");
        broker.refuses(&Request::Start { index }, "the policy has no device");
        let size = 1 << 40;
        broker.refuses(&Request::Resize { index, size }, "the policy has no device");
        broker.refuses(&Request::Stop { index }, "");
    }
    broker.refuses(&Request::Open { index: 1 }, "absent");
    broker.still_serves();
    assert_eq!(broker.files(), Vec::<String>::new());
    broker.ends();
}

/// It may make a snapshot where the command line says, and can name nothing else.
#[test]
fn a_snapshots_name_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Broker::with_policy(dir.path());
    let begin = |folder: u32, name: Option<&str>| {
        let name = name.map(str::to_owned);
        broker.ask(&Request::SnapshotBegin {
            folder,
            name,
            exchanges: 0,
        })
    };
    let long = "n".repeat(5000);
    for (folder, name) in [
        (0, Some("")),
        (0, Some(".")),
        (0, Some("..")),
        (0, Some("../x")),
        (0, Some("/etc")),
        (0, Some("a/b")),
        (0, Some("a\0b")),
        (0, Some(".x")),
        (0, Some("granted")),
        (0, Some(&long)),
        (1, Some("x")),
        (u32::MAX, None),
        // The folder itself is no snapshot.
        (0, None),
    ] {
        let Some((Reply::SnapshotFailed { .. }, fds)) = begin(folder, name) else {
            panic!("{folder} {name:?}");
        };
        assert!(fds.is_empty());
    }
    let Some((Reply::SnapshotFailed { .. }, _)) = broker.ask(&Request::SnapshotEnd { keep: true })
    else {
        panic!("nothing was begun");
    };
    // One that is begun again and again, and never ended, leaves nothing: `ends` looks.
    for _ in 0..3 {
        let Some((Reply::SnapshotBegun, fds)) = begin(0, Some("x")) else {
            panic!("a granted one");
        };
        assert_eq!(fds.len(), 2);
    }
    broker.still_serves();
    broker.ends();
}

/// A disk as a control process that was taken over may ask for.
fn disk(readonly: bool, queues: u16) -> DeviceSpec {
    DeviceSpec::Block(BlockSpec {
        id: "hot".into(),
        readonly,
        direct: false,
        serial: String::new(),
        num_queues: queues,
        queue_size: 256,
        io: BlockIo::default(),
    })
}

#[test]
fn what_may_be_added_is_what_was_granted() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    std::fs::create_dir(other.path().join("images")).unwrap();
    std::fs::write(other.path().join("images/a"), [0; 4096]).unwrap();
    std::fs::write(other.path().join("granted"), WORDS).unwrap();
    std::os::unix::fs::symlink("../granted", other.path().join("images/link")).unwrap();
    let policy = Policy {
        additions: Additions {
            devices: 2,
            grants: vec![AdditionGrant::Images {
                path: other.path().join("images"),
                readonly: true,
            }],
        },
        ..policy(dir.path())
    };
    let devices = policy.devices.len() as u32;
    let broker = Broker::with(dir.path(), policy);
    let image = |name: &str, readonly| Addition::Image {
        path: other.path().join(name),
        readonly,
        direct: false,
    };
    let add = |backend, addition| Request::Add { backend, addition };
    let plug = |index, backend, spec| Request::Plug {
        index,
        backend,
        below: Vec::new(),
        spec,
        iothread: None,
    };
    for (addition, words) in [
        (image("granted", true), "not beneath a folder"),
        (image("images/../granted", true), "'..'"),
        (image("images/link", true), "symbolic link"),
        (image("images/a", false), "not beneath a folder"),
        (
            Addition::Folder {
                path: other.path().join("images"),
                readonly: true,
            },
            "not beneath a folder",
        ),
        (
            Addition::Tap {
                ifname: "lo".into(),
                queues: 1,
            },
            "not one of the taps",
        ),
        (Addition::GivenTap, "descriptors are missing"),
    ] {
        broker.refuses(&add(0, addition), words);
    }
    broker.refuses(&add(u32::MAX, image("images/a", true)), "not free");
    let added = broker.ask(&add(0, image("images/a", true)));
    assert!(
        matches!(added, Some((Reply::Added { backend: 0 }, _))),
        "{added:?}"
    );
    for (request, words) in [
        (plug(devices, 1, disk(true, 1)), "no back end 1"),
        (plug(devices, 0, disk(false, 1)), "not one for back end 0"),
        (plug(devices, 0, disk(true, 33)), "num-queues 33"),
        (
            plug(devices + 2, 0, disk(true, 1)),
            "not one that can be plugged",
        ),
        (
            plug(u32::MAX, 0, disk(true, 1)),
            "not one that can be plugged",
        ),
        (
            Request::Unplug { index: u32::MAX },
            "the policy has no device",
        ),
        (
            Request::StandIn {
                index: 0,
                features: u64::MAX,
            },
            "device 0 is no card that was taken out",
        ),
        (
            Request::StandIn {
                index: u32::MAX,
                features: 0,
            },
            "is no card that was taken out",
        ),
        (Request::Remove { backend: 7 }, "no back end 7"),
        (
            Request::Start { index: devices },
            "the policy has no device",
        ),
    ] {
        broker.refuses(&request, words);
    }
    let removed = broker.ask(&Request::Remove { backend: 0 });
    assert!(
        matches!(removed, Some((Reply::Removed { backend: 0 }, _))),
        "{removed:?}"
    );
    broker.still_serves();
    assert_eq!(
        broker.files(),
        [other.path().join("images").display().to_string()]
    );
    broker.ends();
}

#[test]
fn a_card_gets_another_tap_only_as_one_may_be_added() {
    let dir = tempfile::tempdir().unwrap();
    let card = DeviceSpec::Net(NetSpec {
        id: "card".into(),
        mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
        queue_pairs: 2,
        queue_size: 256,
        control_queue: true,
        vhost: false,
        limits: NetLimits::default(),
        stands_in: None,
        poll_us: 0,
    });
    let tap = |ifname: &str, queues| Addition::Tap {
        ifname: ifname.into(),
        queues,
    };
    let grant = |spec, backend| DeviceGrant {
        spec,
        backend,
        iothread: None,
    };
    let policy = Policy {
        devices: vec![
            grant(disk(true, 1), BackendGrant::Nothing),
            grant(card.clone(), BackendGrant::Nothing),
            grant(
                card,
                BackendGrant::Socket {
                    option: "-chardev id=c".into(),
                    path: dir.path().join("none"),
                },
            ),
        ],
        additions: Additions {
            devices: 1,
            grants: vec![AdditionGrant::Tap {
                ifname: "lo".into(),
            }],
        },
        ..policy(dir.path())
    };
    let broker = Broker::with(dir.path(), policy);
    let image = Addition::Image {
        path: dir.path().to_owned(),
        readonly: true,
        direct: false,
    };
    for (index, addition, words) in [
        (u32::MAX, tap("lo", 2), "the policy has no device"),
        // Not one that may be plugged and is not.
        (3, tap("lo", 2), "the policy has no device 3"),
        (0, tap("lo", 1), "device hot is no card"),
        (2, tap("lo", 2), "device card is nobody's here"),
        (1, image, "only a tap takes the place of a tap"),
        (1, Addition::GivenTap, "descriptors are missing"),
        (1, tap("eth0", 2), "not one of the taps"),
        (1, tap("lo", 17), "queues 17 is out of range"),
        (
            1,
            tap("lo", 1),
            "the tap has 1 queues for a card with 2 queue pairs",
        ),
        (1, tap("lo", 2), "-netdev ifname=lo: "),
    ] {
        broker.refuses(&Request::Replace { index, addition }, words);
    }
    broker.still_serves();
    broker.ends();
}

#[test]
fn malformed_requests_end_the_broker_and_with_it_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let good = encode(&Request::Open { index: 0 }).unwrap();
    let mut packets: Vec<Vec<u8>> = (1..good.len()).map(|len| good[..len].to_vec()).collect();
    packets.push([&good[..], &[0]].concat());
    packets.push(vec![0; MAX_MESSAGE + 1]);
    // Requests that do not exist, and the length of a string that has no end.
    packets.extend((40..60u32).map(|tag| [tag.to_le_bytes(), [0; 4]].concat()));
    packets.push([&0u32.to_le_bytes()[..], &[0; 4], &u64::MAX.to_le_bytes()].concat());
    // Noise that is the same each time (a linear congruence).
    let mut noise = 1u64;
    for len in 1..64 {
        packets.push(
            (0..len)
                .map(|_| {
                    noise = noise
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (noise >> 56) as u8 | 0x80
                })
                .collect(),
        );
    }
    for packet in packets {
        let broker = Broker::with_policy(dir.path());
        assert!(broker.raw(&packet, &[]));
        assert_eq!(broker.reply().map(|(reply, _)| reply), None, "{packet:x?}");
        let (_, log) = broker.ends();
        assert!(log.contains("control channel"), "{log}");
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Broker::with_policy(dir.path());
    broker.still_serves();
    let before = broker.fds().len();
    let secret = File::open("/etc/passwd").unwrap();
    let good = encode(&Request::Open { index: 99 }).unwrap();
    for count in [1, 2, 64] {
        for _ in 0..50 {
            assert!(broker.raw(&good, &vec![secret.as_raw_fd(); count]));
            assert!(matches!(broker.reply(), Some((Reply::Failed { .. }, _))));
        }
    }
    assert_eq!(broker.fds().len(), before);
    assert_eq!(broker.files(), Vec::<String>::new());
    // More than any message has.
    assert!(broker.raw(&good, &[secret.as_raw_fd(); 253]));
    assert_eq!(broker.reply().map(|(reply, _)| reply), None);
    broker.ends();
}

#[test]
fn a_flood_that_reads_no_answer_ends_with_the_control_process() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Broker::with_policy(dir.path());
    let before = broker.fds().len();
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    fcntl(&broker.channel, FcntlArg::F_SETFL(flags)).unwrap();
    let request = encode(&Request::Open { index: 0 }).unwrap();
    let mut sent = 0;
    while broker.raw(&request, &[]) {
        sent += 1;
    }
    assert!(sent > 10, "{sent} requests are no flood");
    // The answers wait in the channel, and the descriptors with them: the broker has at most the one on its way.
    let after = procfs::fds(broker.pid()).unwrap().len();
    assert!(after <= before + 2, "{before} descriptors, then {after}");
    broker.ends();
}
