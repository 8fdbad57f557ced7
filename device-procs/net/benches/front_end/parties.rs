//! # Who takes part
//!
//! **Job.** Starts each back end on a tap of its own, and its queues. **Who is not trusted.** Nobody.
//! **Why this way.** Ours is the process that ships, with its filter on. `dpdk-testpmd` forwards between its vhost-user port and its
//! tap port on a core that it never gives up; it takes frames from a tap whether or not there are buffers for them, so
//! it sends only.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use device_host::test_frontend::DeviceProcess;
use device_host::test_frontend::tap::{Tap, listen};
use ipc::spec::DeviceSpec;
use ipc::spec::net::NetSpec;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::procfs::processor_time;

use crate::card::{Card, SIZE};
use crate::floor::Floor;
use crate::loads::{Load, Way};
use crate::options::Options;
use crate::report::Sample;

enum Kind {
    Ours(Card, DeviceProcess),
    Peer(Card, Child),
    Floor(Floor),
}

/// One way for packets, and where they are put in.
pub(crate) struct Party {
    pub(crate) name: String,
    kind: Kind,
    host: Option<File>,
    /// A flow for each queue of the tap.
    flows: Vec<usize>,
}

/// Frames of a load that wait for a reader of the tap, `count` in each queue.
fn fill(mut host: &File, load: &Load, flows: &[usize], count: usize) {
    for flow in flows {
        let frame = load.frame(*flow);
        for _ in 0..count {
            assert_eq!(host.write(&frame).unwrap(), frame.len());
        }
    }
}

impl Party {
    /// The process, if it is one of its own.
    pub(crate) fn pid(&self) -> Option<i32> {
        match &self.kind {
            Kind::Ours(_, process) => i32::try_from(process.id()).ok(),
            Kind::Peer(_, child) => i32::try_from(child.id()).ok(),
            Kind::Floor(_) => None,
        }
    }

    /// What `work` took, and the processor time of the party's process meanwhile.
    fn measured<T>(pid: u32, work: impl FnOnce() -> T) -> (T, Duration) {
        let used = || processor_time(pid.cast_signed()).unwrap_or_default();
        let before = used();
        let result = work();
        (result, used() - before)
    }

    fn send(&mut self, load: &Load, slice: Duration) -> (usize, Duration, Duration) {
        let (card, pid) = match &mut self.kind {
            Kind::Ours(card, process) => (card, process.id()),
            Kind::Peer(card, child) => (card, child.id()),
            Kind::Floor(floor) => return floor.send(load, slice),
        };
        let ((packets, time), cpu) = Self::measured(pid, || card.send(load, slice));
        (packets, time, cpu)
    }

    /// `frames` from each queue.
    fn receive(&mut self, load: &Load, frames: usize) -> (Duration, Duration) {
        let (card, pid) = match &mut self.kind {
            Kind::Ours(card, process) => (card, process.id()),
            Kind::Peer(card, child) => (card, child.id()),
            Kind::Floor(floor) => return floor.receive(load, frames),
        };
        Self::measured(pid, || card.receive(load, frames))
    }

    /// One turn; `None` where it has no part in such a load. Who never sleeps would take the others' time, so it is held
    /// but for its turns.
    pub(crate) fn turn(&mut self, load: &Load, slice: Duration) -> Option<Sample> {
        self.signal(Signal::SIGCONT);
        let sample = self.awake(load, slice);
        self.signal(Signal::SIGSTOP);
        sample
    }

    fn signal(&self, signal: Signal) {
        if let Kind::Peer(_, child) = &self.kind {
            kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        }
    }

    fn awake(&mut self, load: &Load, slice: Duration) -> Option<Sample> {
        let (mut packets, mut time, mut cpu) = (0, Duration::ZERO, Duration::ZERO);
        if let Way::Echo(apart) = load.way {
            let (Kind::Ours(card, process), Some(host)) = (&mut self.kind, &self.host) else {
                return None;
            };
            listen(host, true);
            let work = || card.echo(host, load, Duration::from_micros(apart), slice);
            ((packets, time), cpu) = Self::measured(process.id(), work);
            listen(host, false);
        } else if load.way == Way::Send {
            (packets, time, cpu) = self.send(load, slice);
        } else {
            let host = self.host.as_ref()?.try_clone().unwrap();
            let each = load.burst() / load.queues;
            let start = Instant::now();
            while start.elapsed() < slice {
                fill(&host, load, &self.flows, each);
                let (took, used) = self.receive(load, each);
                time += took;
                cpu += used;
                packets += load.burst();
            }
        }
        Some(Sample {
            packets: packets as f64,
            rate: packets as f64 / time.as_secs_f64(),
            cpu: cpu.as_secs_f64() * 1e9 / packets as f64,
        })
    }

    /// Closes the connection, with which a back end ends.
    pub(crate) fn finish(self) {
        match self.kind {
            Kind::Ours(card, process) => {
                drop(card);
                process.finish_well();
            }
            Kind::Peer(card, mut child) => {
                drop(card);
                // It would wait for the next front end.
                child.kill().unwrap();
                child.wait().unwrap();
            }
            Kind::Floor(_) => {}
        }
    }
}

fn tap(queues: usize) -> Option<Tap> {
    let tap = Tap::in_new_namespace(queues as u16, false)?;
    tap.set_queue_len(4096);
    tap.send_with_headers();
    Some(tap)
}

/// A flow for each queue: which one a frame goes to depends on a number that the kernel keeps to itself, but not on the tap.
fn flows(floor: &mut Floor, host: &File, queues: usize) -> Vec<usize> {
    let load = Load {
        way: Way::Receive,
        size: 64,
        queues,
    };
    let mut flows = vec![None; queues];
    for flow in 100.. {
        fill(host, &load, &[flow], 1);
        flows[floor.queue_with_frame()].get_or_insert(flow);
        if flows.iter().all(Option::is_some) {
            break;
        }
    }
    flows.into_iter().flatten().collect()
}

/// This crate's process, or that of another build.
fn ours(
    name: String,
    program: &str,
    queues: usize,
    flows: Vec<usize>,
    poll_us: u32,
) -> Option<Party> {
    let tap = tap(queues)?;
    let spec = DeviceSpec::Net(NetSpec {
        id: "bench".into(),
        mac: [2, 0, 0, 0, 0, 1],
        queue_pairs: queues as u16,
        queue_size: SIZE,
        control_queue: true,
        vhost: false,
        limits: Default::default(),
        stands_in: None,
        poll_us,
    });
    let mut process = DeviceProcess::start(program, spec, tap.queues);
    let card = Card::connect(process.socket(), queues, true);
    Some(Party {
        name,
        kind: Kind::Ours(card, process),
        host: Some(tap.host),
        flows,
    })
}

/// The namespace of the tap that it makes is one more.
fn testpmd(queues: usize) -> Party {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vhost");
    let mut child = Command::new("dpdk-testpmd")
        .args([
            "--no-huge",
            "-m",
            "256",
            "--no-pci",
            "--no-telemetry",
            "-l",
            "0,1",
        ])
        .arg(format!("--file-prefix=bench-{}", std::process::id()))
        .arg(format!(
            "--vdev=net_vhost0,iface={},queues={queues},tso=1",
            path.display()
        ))
        .arg("--vdev=net_tap0,iface=tap0")
        .arg("--")
        .args([
            "--forward-mode=io",
            "--auto-start",
            "--total-num-mbufs=16384",
        ])
        .args([format!("--rxq={queues}"), format!("--txq={queues}")])
        // It ends with its standard input.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let socket = loop {
        match UnixStream::connect(&path) {
            Ok(socket) => break socket,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) =>
            {
                assert!(child.try_wait().unwrap().is_none(), "dpdk-testpmd ended");
                std::thread::yield_now();
            }
            Err(error) => panic!("dpdk-testpmd: {error}"),
        }
    };
    // The socket's name has done its work.
    drop(folder);
    let card = Card::connect(socket, queues, false);
    let party = Party {
        name: "dpdk-testpmd".into(),
        kind: Kind::Peer(card, child),
        host: None,
        flows: Vec::new(),
    };
    party.signal(Signal::SIGSTOP);
    party
}

/// Ours first, the floor second, and then the floor behind a filter. `None` where there may be no taps.
pub(crate) fn all(options: &Options, queues: usize) -> Option<Vec<Party>> {
    let mut known = None;
    let mut floor = |name: &str, filtered| {
        let tap = tap(queues)?;
        let mut floor = Floor::new(tap.queues, filtered);
        let flows = known.get_or_insert_with(|| flows(&mut floor, &tap.host, queues));
        Some(Party {
            name: name.into(),
            kind: Kind::Floor(floor),
            flows: flows.clone(),
            host: Some(tap.host),
        })
    };
    let plain = floor("floor", false)?;
    let filtered = floor("floor, filtered", true)?;
    let flows = plain.flows.clone();
    let program = env!("CARGO_BIN_EXE_net");
    let mut all = vec![
        ours(
            "net".into(),
            program,
            queues,
            flows.clone(),
            options.poll_us,
        )?,
        plain,
        filtered,
    ];
    for poll_us in &options.others {
        let name = format!("net, poll-us={poll_us}");
        all.push(ours(name, program, queues, flows.clone(), *poll_us)?);
    }
    if let Some(other) = &options.beside {
        let other = other.to_str().expect("a path of text");
        let name = "net, other build".into();
        all.push(ours(name, other, queues, flows, options.poll_us)?);
    }
    if options.peers {
        all.push(testpmd(queues));
    }
    Some(all)
}
