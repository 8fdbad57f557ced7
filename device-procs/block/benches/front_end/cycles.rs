//! # Where the processor time of a request goes
//!
//! **Job.** `--cycles`: has `perf` take samples of this disk's process while it is loaded, and tells what each part of a request costs.
//! **Who is not trusted.** A processor that has no counters for guests: samples are taken by the clock.
//! **Why this way.** A sample is put down to the first part of the list below that any function of its stack belongs to, so the list goes
//! from what is called to who calls. The shares are those of the processor time that a turn without `perf` took.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::loads::Load;
use crate::options::Options;
use crate::parties::{Party, Place};
use crate::turn;

/// Samples in a second.
const FREQUENCY: &str = "4999";

/// What a request costs: a name, and what functions of it have in their names.
const PARTS: &[(&str, &[&str])] = &[
    (
        "interrupts and other work of the host",
        &["asm_sysvec", "asm_common_interrupt", "irq_exit"],
    ),
    (
        "page cache: copy",
        &[
            "copy_to_iter",
            "copy_from_iter",
            "copy_page",
            "copy_folio",
            "rep_movs",
            "copy_user",
        ],
    ),
    (
        "page cache: find the page",
        &[
            "filemap_",
            "ext4_",
            "xfs_",
            "shmem_",
            "generic_perform_write",
            "generic_file_",
            "vfs_iter_",
        ],
    ),
    (
        "disk: give it the request",
        &[
            "iomap_",
            "submit_bio",
            "blk_",
            "bio_",
            "virtio_queue_rq",
            "virtqueue_",
        ],
    ),
    (
        "call: eventfd",
        &["eventfd_write", "ksys_write", "vfs_write"],
    ),
    (
        "kick: eventfd",
        &["eventfd_read", "ksys_read", "vfs_read", "eventfd_poll"],
    ),
    (
        "sleep and wake-up (epoll)",
        &["epoll_wait", "epoll_pwait", "ep_poll", "schedule", "Epoll"],
    ),
    (
        "io_uring: complete",
        &[
            "io_submit_flush_completions",
            "io_req_task",
            "tctx_task_work",
            "io_cqring",
            "FileIo<T>>::finished",
            "FileIo<T>::finished",
        ],
    ),
    (
        "io_uring: submit",
        &[
            "io_uring",
            "io_submit_sqe",
            "io_issue_sqe",
            "FileIo<T>",
            "Room<T>",
            "io_uring::",
        ],
    ),
    ("a write's system call", &["pwritev"]),
    (
        "system calls: entry and filter",
        &[
            "seccomp",
            "do_syscall_64",
            "entry_SYSCALL",
            "syscall_",
            "secure_computing",
        ],
    ),
    ("the clock", &["clock_gettime", "Instant", "Timespec"]),
    (
        "looking for work",
        &[
            "look_",
            "has_finished",
            "Server<D>::wait",
            "has_more",
            "is_ready",
        ],
    ),
    (
        "ring: take and complete",
        &[
            "device_host::ring",
            "device_host::chain",
            "virtio_queue",
            "take_turns",
            "end_turn",
            "process_queue",
        ],
    ),
    (
        "guest memory",
        &["device_host::memory", "vm_memory", "memmove", "memcpy"],
    ),
    ("the request itself", &["block_device::", "device_host::"]),
];
const REST: &str = "the rest";

/// Microseconds of a request, by part.
pub(crate) struct Shares(BTreeMap<&'static str, f64>);

/// `perf`, which takes no samples before it is told to.
struct Recorder {
    child: Child,
    control: std::fs::File,
}

impl Recorder {
    fn start(pid: i32, folder: &Path) -> Self {
        let fifos = ["control", "answers"].map(|name| folder.join(name));
        for fifo in &fifos {
            let _ = std::fs::remove_file(fifo);
        }
        let made = Command::new("mkfifo").args(&fifos).status().unwrap();
        assert!(made.success(), "mkfifo");
        // Both ways at once: neither side waits for the other to open it.
        let [control, mut answers] = fifos.each_ref().map(|fifo| {
            let both = std::fs::File::options().read(true).write(true).open(fifo);
            both.unwrap()
        });
        let child = Command::new("perf")
            .args([
                "record",
                "-q",
                "-e",
                "cpu-clock",
                "-g",
                "-D",
                "-1",
                "-F",
                FREQUENCY,
            ])
            .args(["-p", &pid.to_string(), "-o"])
            .arg(folder.join("samples"))
            .arg("--control")
            .arg(format!(
                "fifo:{},{}",
                fifos[0].display(),
                fifos[1].display()
            ))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("--cycles needs perf (Debian's package linux-perf) on PATH");
        let mut recorder = Self { child, control };
        recorder.tell("enable");
        let mut answer = [0; 4];
        answers.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ack\n");
        recorder
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.control, "{word}").unwrap();
    }

    fn finish(mut self) {
        self.tell("stop");
        self.child.wait().unwrap();
    }
}

/// The part that a sample belongs to; its stack begins with the function that ran.
fn part(stack: &[&str]) -> &'static str {
    let has = |words: &[&str]| {
        let is = |name: &&str| words.iter().any(|word| name.contains(word));
        stack.iter().any(is)
    };
    PARTS
        .iter()
        .find(|(_, words)| has(words))
        .map_or(REST, |(name, _)| name)
}

/// Samples by part.
fn counted(script: &str) -> BTreeMap<&'static str, usize> {
    let mut parts = BTreeMap::new();
    let stacks = script.split("\n\n").map(|sample| {
        let frames = sample.lines().map(str::trim);
        // An address, and the function.
        frames
            .filter_map(|line| Some(line.split_once(' ')?.1))
            .collect()
    });
    for stack in stacks.filter(|stack: &Vec<&str>| !stack.is_empty()) {
        *parts.entry(part(&stack)).or_default() += 1;
    }
    parts
}

/// The parts of one load, and how many samples that is of.
pub(crate) fn measure(
    party: &mut Party,
    load: &Load,
    options: &Options,
    place: &Place,
) -> (Shares, usize) {
    // The first is the warm-up.
    turn(party, load, options);
    let whole = turn(party, load, options).cpu;
    let recorder = Recorder::start(party.pid, place.folder());
    for _ in 0..options.rounds {
        turn(party, load, options);
    }
    recorder.finish();
    let script = Command::new("perf")
        .args(["script", "--no-inline", "-F", "ip,sym", "-i"])
        .arg(place.folder().join("samples"))
        .output()
        .unwrap();
    let counted = counted(&String::from_utf8_lossy(&script.stdout));
    let all: usize = counted.values().sum();
    assert!(all > 0, "perf has no sample: {script:?}");
    let shares = counted
        .into_iter()
        .map(|(name, count)| (name, whole * count as f64 / all as f64))
        .collect();
    (Shares(shares), all)
}

/// A table in Markdown.
pub(crate) fn print(columns: &[(String, Shares)]) {
    print!("| part |");
    for (name, _) in columns {
        print!(" {name} |");
    }
    print!("\n|---|{}\n", "---|".repeat(columns.len()));
    let names = PARTS.iter().map(|(name, _)| *name).chain([REST]);
    let row = |name: &str, of: &dyn Fn(&Shares) -> f64| {
        print!("| {name} |");
        for (_, shares) in columns {
            let (part, whole) = (of(shares), shares.0.values().sum::<f64>());
            print!(" {part:.2} µs, {:.0} % |", 100.0 * part / whole);
        }
        println!();
    };
    for name in names {
        let largest = columns
            .iter()
            .map(|(_, Shares(shares))| {
                shares.get(name).copied().unwrap_or_default() / shares.values().sum::<f64>()
            })
            .fold(0.0, f64::max);
        if largest >= 0.005 {
            row(name, &|Shares(shares)| {
                shares.get(name).copied().unwrap_or_default()
            });
        }
    }
    row("all", &|Shares(shares)| shares.values().sum());
}
