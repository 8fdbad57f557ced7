//! # A front end that breaks every message
//!
//! **Job.** Live `block`, `net` and `vhost_user_fs` processes, with their filters on, against a vhost-user front end that sends what no
//! front end should. [`CASES`] says what each thing leads to; never a signal, never a hang, no descriptor and no memory kept.
//! **Who is not trusted.** The test's own side. **Why this way.** A table, so that what a device process promises can be read; one
//! process a case, so that no case hides behind the one before.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

#[path = "hostile_front_end/cases.rs"]
mod cases;
#[path = "hostile_front_end/front.rs"]
mod front;

use cases::CASES;
use front::Leads::{End, Leave, No, On};
use front::{Case, Front, RAM};

use device_host::test_frontend::DeviceProcess;
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use ipc::spec::net::NetSpec;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tests::daemon::Daemon;
use tests::host::{Tap, require_root};
use tests::procfs;
use tests::vhost_user::{VERSION, frame, request as req, words};
use tests::vm::binary;
use tests::wait::{Deadline, Watched};

/// More than any answer takes on a busy machine; a hang is longer.
const LIMIT: Duration = Duration::from_secs(10);
/// Descriptors that a process may have more than before a case: one region, a queue's four, one on its way.
const MORE_FDS: usize = 8;
/// KiB of its own memory that a process may have more than before a case.
const MORE_MEMORY: u64 = 4096;

/// Which process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Block,
    Net,
    Fs,
}

enum Process {
    Device(DeviceProcess),
    Daemon { child: Child, log: File },
}

struct Running {
    process: Process,
    /// The process that serves.
    pid: i32,
    watched: Watched,
}

struct Place {
    dir: tempfile::TempDir,
    tap: Option<Tap>,
}

const TAP: &str = "svhostile0";

impl Place {
    fn new(subject: Subject) -> Self {
        require_root();
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("disk"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        Self {
            dir,
            tap: (subject == Subject::Net).then(|| Tap::new(TAP, "10.7.98.1/24").unwrap()),
        }
    }

    fn start(&self, subject: Subject) -> (Running, UnixStream) {
        let device = |name: &str, spec, fds| {
            let name = binary(name).unwrap().display().to_string();
            let mut process = DeviceProcess::start(&name, spec, fds);
            let socket = process.socket();
            (
                i32::try_from(process.id()).unwrap(),
                Process::Device(process),
                socket,
            )
        };
        let (pid, process, socket) = match subject {
            Subject::Block => {
                let disk = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(self.dir.path().join("disk"))
                    .unwrap();
                let spec = DeviceSpec::Block(BlockSpec {
                    id: "disk0".into(),
                    readonly: false,
                    direct: false,
                    serial: String::new(),
                    num_queues: 2,
                    queue_size: 256,
                    io: Default::default(),
                });
                device("block", spec, vec![disk.into()])
            }
            Subject::Net => {
                let tap = self.tap.as_ref().expect("a card has its tap");
                let spec = DeviceSpec::Net(NetSpec {
                    id: "net0".into(),
                    mac: [2, 0, 0, 0, 0, 9],
                    queue_pairs: 1,
                    queue_size: 256,
                    control_queue: true,
                    vhost: false,
                    limits: Default::default(),
                    stands_in: None,
                    poll_us: 0,
                });
                device("net", spec, vec![tap.queue().unwrap()])
            }
            Subject::Fs => daemon(self.dir.path()),
        };
        let watched = Watched::new(pid).unwrap();
        (
            Running {
                process,
                pid,
                watched,
            },
            socket,
        )
    }
}

/// The stand-alone daemon on a connected socket; its serving process has answered, so it is the one with the filter.
fn daemon(dir: &Path) -> (i32, Process, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (log, log_end) = std::io::pipe().unwrap();
    let child = Command::new("sh")
        .args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"])
        .arg(binary("vhost_user_fs").unwrap())
        .args(["-fd", "3", "-source"])
        .arg(dir.join("tree"))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stderr(log_end)
        .spawn()
        .unwrap();
    let mut front = Front::new(ours.try_clone().unwrap(), false);
    assert!(front.ask(req::GET_FEATURES, &[]).is_some());
    let outside = i32::try_from(child.id()).unwrap();
    let inside = procfs::descendants(outside)
        .unwrap()
        .into_iter()
        .next_back()
        .unwrap_or(outside);
    let log = File::from(OwnedFd::from(log));
    (inside, Process::Daemon { child, log }, ours)
}

impl Running {
    fn fds(&self) -> usize {
        procfs::fds(self.pid).map_or(0, |fds| fds.len())
    }

    /// KiB that are its own.
    fn memory(&self) -> u64 {
        procfs::Status::of(self.pid).map_or(0, |status| {
            status
                .field("RssAnon")
                .split_whitespace()
                .next()
                .and_then(|number| number.parse().ok())
                .unwrap_or(0)
        })
    }

    fn ended(&self) -> bool {
        self.watched.ended(Deadline::after(LIMIT)).unwrap()
    }

    /// How it ended, and its log.
    fn finish(self) -> (ExitStatus, String) {
        match self.process {
            Process::Device(process) => process.finish(),
            Process::Daemon { mut child, mut log } => {
                let status = child.wait().unwrap();
                let mut text = String::new();
                log.read_to_string(&mut text).unwrap();
                (status, text)
            }
        }
    }
}

/// Plays one case; `Err` says what was not as expected.
fn play(place: &Place, subject: Subject, case: &Case, acks: bool) -> Result<(), String> {
    let (name, action, leads) = case;
    let (running, socket) = place.start(subject);
    let mut front = Front::new(socket, acks);
    if subject != Subject::Fs {
        // It has to have started before it can be measured.
        front
            .ask(req::GET_FEATURES, &[])
            .ok_or_else(|| format!("{subject:?} does not start"))?;
    }
    let before = (running.fds(), running.memory());
    action(&mut front);
    let what = format!("{subject:?}, {name}, acks {acks}");
    let ends = match leads {
        End(words) | No(words) => Some(*words),
        On | Leave => None,
    };
    if matches!(leads, No(_)) && acks && front.acknowledged.is_none_or(|ack| ack == 0) {
        return Err(format!(
            "{what}: acknowledged with {:?}",
            front.acknowledged
        ));
    }
    if ends.is_some() && !running.ended() {
        return Err(format!("{what}: the process goes on"));
    }
    if matches!(leads, On) {
        if front.ask(req::GET_FEATURES, &[]).is_none() {
            let (status, log) = running.finish();
            return Err(format!(
                "{what}: the process has ended with {status}: {log}"
            ));
        }
        let after = (running.fds(), running.memory());
        if after.0 > before.0 + MORE_FDS || after.1 > before.1 + MORE_MEMORY {
            return Err(format!(
                "{what}: from {before:?} descriptors and KiB to {after:?}"
            ));
        }
    }
    drop(front);
    if !running.ended() {
        return Err(format!("{what}: the process hangs"));
    }
    let (status, log) = running.finish();
    // A test's processes have no namespaces of their own, which they say; and a library says why a queue is broken.
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("ERROR") || line.starts_with("vhost_user_fs: "))
        .filter(|line| !line.contains("jail layer not in force") && !line.contains("virtio_queue"))
        .collect();
    let good = match (leads, ends) {
        (Leave, _) => matches!(status.code(), Some(0 | 1)),
        (_, Some(words)) => {
            status.code() == Some(1) && matches!(lines[..], [line] if line.contains(words))
        }
        (_, None) => status.code() == Some(0) && lines.is_empty(),
    };
    if good && status.signal().is_none() {
        return Ok(());
    }
    Err(format!("{what}: {status}, errors {lines:#?}"))
}

fn play_all(subject: Subject) {
    let place = Place::new(subject);
    let mut wrong = Vec::new();
    for case in CASES {
        for acks in [true, false] {
            // What a case itself finds wrong is one of the results, not the end of the table.
            let played = catch_unwind(AssertUnwindSafe(|| play(&place, subject, case, acks)));
            let result = played.unwrap_or_else(|_| {
                Err(format!("{subject:?}, {}, acks {acks}: see above", case.0))
            });
            wrong.extend(result.err());
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        2 * CASES.len(),
        wrong.join("\n")
    );
}

#[test]
fn block_stands_every_message() {
    play_all(Subject::Block);
}

#[test]
fn net_stands_every_message() {
    play_all(Subject::Net);
}

#[test]
fn vhost_user_fs_stands_every_message() {
    play_all(Subject::Fs);
}

/// A whole session's bytes with the descriptors of its messages.
fn session(front: &Front) -> Vec<(Vec<u8>, Vec<RawFd>)> {
    let one = |request: u32, body: &[u64], fds: &[RawFd]| {
        let body = words(body);
        (
            frame(request, VERSION, body.len() as u32, &body),
            fds.to_vec(),
        )
    };
    let (kick, call) = (front.kick.as_raw_fd(), front.call.as_raw_fd());
    vec![
        one(req::SET_OWNER, &[], &[]),
        one(req::GET_FEATURES, &[], &[]),
        one(req::SET_FEATURES, &[1 << 32], &[]),
        one(
            req::SET_MEM_TABLE,
            &[1, 0, RAM, 0, 0],
            &[front.memory.as_raw_fd()],
        ),
        one(req::SET_VRING_NUM, &[16 << 32], &[]),
        one(req::SET_VRING_ADDR, &[0, 0, 0x2000, 0x1000, 0], &[]),
        one(req::SET_VRING_CALL, &[0], &[call]),
        one(req::SET_VRING_KICK, &[0], &[kick]),
        one(req::GET_VRING_BASE, &[0], &[]),
    ]
}

/// Between two messages the front end may leave; in the middle of one it breaks the protocol. Every byte has its turn.
#[test]
fn a_front_end_may_leave_at_any_byte() {
    let place = Place::new(Subject::Block);
    let length = |front: &Front| {
        session(front)
            .iter()
            .map(|(bytes, _)| bytes.len())
            .sum::<usize>()
    };
    let mut cut = 0;
    loop {
        let (running, socket) = place.start(Subject::Block);
        let mut front = Front::new(socket, false);
        if cut > length(&front) {
            break;
        }
        let mut left = cut;
        let mut between = true;
        for (bytes, fds) in session(&front) {
            let now = left.min(bytes.len());
            front.raw(&bytes[..now], if now > 0 { &fds } else { &[] });
            between = now == 0 || now == bytes.len();
            if now == bytes.len() && bytes[0] == req::GET_FEATURES as u8 {
                // With an answer on its way, leaving is leaving, whatever comes after.
                front.reply(req::GET_FEATURES);
            }
            left -= now;
            if left == 0 {
                break;
            }
        }
        drop(front);
        assert!(running.ended(), "cut after {cut} bytes: it hangs");
        let (status, log) = running.finish();
        let want = i32::from(!between);
        assert_eq!(
            status.code(),
            Some(want),
            "cut after {cut} bytes: {status}: {log}"
        );
        cut += 1;
    }
    assert!(cut > 200, "{cut} bytes are no session");
}

/// The socket's path is as good for the next daemon as it was for the one whose front end misbehaved.
#[test]
fn the_next_client_at_the_same_path_is_served() {
    let place = Place::new(Subject::Fs);
    let path = place.dir.path().join("socket");
    let kinds: [fn(&mut Front); 4] = [
        |f| f.raw(&[0xa5; 64], &[]),
        |f| f.raw(&frame(req::SET_FEATURES, VERSION, 8, &[0; 3]), &[]),
        |f| f.ram(),
        |f| {
            f.run();
            f.turns();
            f.memory.set_len(0).unwrap();
            f.kick.write(1).unwrap();
            f.turns();
        },
    ];
    for misbehave in kinds {
        let tree = place.dir.path().join("tree");
        let program = binary("vhost_user_fs").unwrap();
        let mut daemon = Daemon::sharing(&program, &tree, &path, &[]).unwrap();
        let mut front = Front::new(UnixStream::connect(&path).unwrap(), false);
        // Served like the first one.
        front.greet();
        misbehave(&mut front);
        drop(front);
        let status = daemon.wait(LIMIT).unwrap();
        assert!(matches!(status.code(), Some(0 | 1)), "{status}");
        assert!(!path.exists(), "the socket stays behind");
    }
}
