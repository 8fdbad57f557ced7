//! # Guests that misuse devices and the board
//!
//! **Job.** A bare guest does to a disk, a network card and the board's registers whatever a driver must not, by a list of
//! named cases and by chance, and checks what each leads to (`device-procs/README.md` has the rule). This side sees to it
//! that no process died or was replaced, that nothing grew, that the log was not flooded and that no other data changed.
//! **Who is not trusted.** The VMM. The guest tells what it saw, and how much it did.
//! **Why this way.** The generator is in the guest, where one processor makes more misuse than a process outside could
//! pass on; a seed repeats a run: `HOSTILE_SEED`, and `HOSTILE_OPERATIONS` for long ones
//! (`cargo xtask test hostile_guest --operations 10000000 --seed 7`).
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use ipc::limits::{DEVICE_REPLY_MS, MAX_LOG_LINES_PER_SECOND};
use serde_json::json;
use tests::host::{Tap, require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::Qmp;
use tests::vm::{Vm, VmBuilder};
use tests::wait::Deadline;

/// Operations of a short run, all suites together.
const SHORT: u64 = 300_000;
/// Bytes that the control process may gain while a guest does its worst. One vhost-user message, one log line and their
/// allocator's slack are far below.
const GROWTH: u64 = 2 << 20;
/// Longest time that the control process may take to answer a question meanwhile: less than it waits for a device
/// ([`DEVICE_REPLY_MS`]), much more than it needs on a busy machine.
const ANSWER: Duration = Duration::from_millis(DEVICE_REPLY_MS - 500);
const SECTOR: u64 = 512;
/// Of each disk.
const SECTORS: u64 = 2048;

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is not a number"))
    })
}

/// Time for `operations`: a busy machine does far more than 1000 a second.
fn limit(operations: u64) -> Duration {
    Duration::from_secs(120 + operations / 1_000)
}

struct Attack {
    dir: tempfile::TempDir,
    builder: VmBuilder,
    words: String,
    operations: u64,
    _tap: Option<Tap>,
}

fn empty_disk(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path)
        .unwrap()
        .set_len(SECTORS * SECTOR)
        .unwrap();
    path
}

/// A VM with something to attack and a disk that is left alone.
fn attack(target: &str, what: &str, operations: u64) -> Attack {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let seed = setting("HOSTILE_SEED", 1);
    let mut words = format!("target={target} what={what} seed={seed} ops={operations}");
    let vcpus = if what == "race" { "2" } else { "1" };
    let mut builder = Vm::builder()
        .with_qmp()
        .args(["-machine", "microvm", "-m", "128", "-smp", vcpus])
        // What a guest causes is a warning.
        .env("STRATOVIRT_LOG_LEVEL", "warn");
    let mut tap = None;
    if target == "card" {
        // Tests run one at a time, but not the whole day's: a name and a network of its own for each kind.
        let own = match what {
            "cases" => 20,
            "race" => 22,
            _ => 21,
        };
        let name = format!("sv-hg{own}");
        tap = Some(Tap::new(&name, &format!("10.7.{own}.1/24")).unwrap());
        words += &format!(" own=10.7.{own}.2 host=10.7.{own}.1");
        builder = builder
            .arg("-netdev")
            .arg(format!("tap,id=n0,ifname={name}"))
            .args([
                "-device",
                "virtio-net-device,netdev=n0,id=victim,queue-size=1024",
            ]);
    } else {
        let image = empty_disk(dir.path(), "victim.img");
        builder = builder
            .arg("-drive")
            .arg(format!("id=victim,file={},direct=off", image.display()))
            .args(["-device", "virtio-blk-device,drive=victim,id=dev-victim,queue-size=1024,num-queues=4,serial=0123456789abcdefghij"]);
    }
    let witness = empty_disk(dir.path(), "witness.img");
    builder = builder.disk("witness", &witness, "");
    Attack {
        dir,
        builder,
        words,
        operations,
        _tap: tap,
    }
}

/// Memory of its own that a process has, in bytes: not the guest's.
fn own_memory(pid: i32) -> u64 {
    let status = procfs::Status::of(pid).unwrap();
    let text = status.field("RssAnon");
    let kilobytes: u64 = text.trim_end_matches(" kB").parse().unwrap();
    kilobytes << 10
}

/// Asks for the VM's state again and again until `over` ends; the longest wait for an answer comes back.
fn ask(mut qmp: Qmp, over: &Receiver<()>) -> Duration {
    let mut longest = Duration::ZERO;
    while over.recv_timeout(Duration::from_millis(50)) == Err(RecvTimeoutError::Timeout) {
        let start = Instant::now();
        let state = qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(state["status"], "running");
        longest = longest.max(start.elapsed());
    }
    longest
}

/// The numbers of the guest's last line, by name.
fn numbers(line: &str) -> BTreeMap<String, u64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    words
        .chunks_exact(2)
        .map(|pair| (pair[0].to_owned(), pair[1].parse().unwrap()))
        .collect()
}

impl Attack {
    /// Runs it to its end and judges the host's side. The guest's own verdict and counts come back, and what it printed.
    #[track_caller]
    fn run(self) -> (BTreeMap<String, u64>, String) {
        let limit = limit(self.operations);
        let start = Instant::now();
        let builder = self
            .builder
            .clone()
            .kernel(&Payload::Hostile.path(), &self.words);
        let mut vm = builder.start().unwrap();
        let wait = |vm: &mut Vm, text: &str| {
            let found = vm.console.wait_for_any(&[text, "HOSTILE FAILED"], limit);
            let (which, before) = found.unwrap_or_else(|e| panic!("{}", vm.explain(&e)));
            if which == 1 {
                let line = vm.console.rest_of_line(limit).unwrap_or_default();
                panic!("{line}\n{}\n{}", self.words, vm.messages());
            }
            before
        };
        wait(&mut vm, "HOSTILE\r\n");
        let processes = vm.processes().unwrap();
        let before: Vec<u64> = processes
            .iter()
            .chain([&vm.pid()])
            .map(|&p| own_memory(p))
            .collect();
        let qmp = vm.qmp().unwrap();
        let (end, over) = channel();
        let asking = std::thread::spawn(move || ask(qmp, &over));
        let transcript = wait(&mut vm, "HOSTILE OK ");
        let line = vm.console.rest_of_line(limit).unwrap();
        drop(end);
        let answered = asking.join().unwrap();
        assert!(
            answered < ANSWER,
            "the control process did not answer for {answered:?}: {}",
            self.words
        );
        let messages = vm.messages();
        assert_eq!(
            vm.processes().unwrap(),
            processes,
            "a process died or was replaced: {}\n{messages}",
            self.words
        );
        let after: Vec<u64> = processes
            .iter()
            .chain([&vm.pid()])
            .map(|&p| own_memory(p))
            .collect();
        for ((pid, before), after) in processes.iter().chain([&vm.pid()]).zip(&before).zip(&after) {
            assert!(
                after.saturating_sub(*before) <= GROWTH,
                "process {pid} had {before} bytes and has {after}: {}",
                self.words
            );
        }
        // The guest waits for this byte, so that all processes could be looked at.
        vm.console.send("!").unwrap();
        let status = vm.wait(limit).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(0), "{messages}");
        assert!(
            vm.survivors(Deadline::after(Duration::from_secs(10)))
                .is_empty()
        );

        let seconds = start.elapsed().as_secs() + 2;
        let most = seconds * u64::from(MAX_LOG_LINES_PER_SECOND) * (processes.len() as u64 + 1);
        let lines = messages.lines().count() as u64;
        assert!(lines <= most, "{lines} lines of log in {seconds} s");
        self.untouched();

        eprintln!(
            "{}: {line}; {lines} lines of log; QMP answered within {answered:?}",
            self.words
        );
        let numbers = numbers(&line);
        (numbers, transcript)
    }

    /// The guest wrote 64 sectors of the other disk, and sees to them itself.
    fn untouched(&self) {
        let bytes = std::fs::read(self.dir.path().join("witness.img")).unwrap();
        assert_eq!(bytes.len() as u64, SECTORS * SECTOR);
        let (from, to) = (8 * SECTOR as usize, 72 * SECTOR as usize);
        assert!(bytes[..from].iter().chain(&bytes[to..]).all(|&b| b == 0));
        if let Ok(victim) = std::fs::metadata(self.dir.path().join("victim.img")) {
            assert_eq!(victim.len(), SECTORS * SECTOR, "the image keeps its size");
        }
    }
}

/// How many cases are named in what a guest printed.
fn cases(transcript: &str) -> usize {
    let mut names: Vec<&str> = transcript
        .lines()
        .filter_map(|line| line.strip_prefix("CASE ")?.strip_suffix(": ok"))
        .collect();
    names.sort_unstable();
    names.dedup();
    names.len()
}

#[test]
fn each_misuse_of_a_disk_has_the_end_that_the_rule_says() {
    let (numbers, transcript) = attack("disk", "cases", 0).run();
    assert!(cases(&transcript) >= 58, "{transcript}");
    assert!(numbers["needs_reset"] >= 100, "{numbers:?}");
}

#[test]
fn each_misuse_of_a_card_has_the_end_that_the_rule_says() {
    let (numbers, transcript) = attack("card", "cases", 0).run();
    assert!(cases(&transcript) >= 48, "{transcript}");
    assert!(numbers["needs_reset"] >= 150, "{numbers:?}");
}

/// A part of all operations that are asked for, in percent.
fn share(percent: u64) -> u64 {
    setting("HOSTILE_OPERATIONS", SHORT) * percent / 100
}

#[track_caller]
fn all_done(numbers: &BTreeMap<String, u64>, wanted: u64) {
    assert!(
        numbers["chains"] + numbers["registers"] >= wanted,
        "{numbers:?}"
    );
    assert!(numbers["checks"] > 0, "{numbers:?}");
}

#[track_caller]
fn chains_by_chance(device: &str, weight: u64) {
    let wanted = share(weight);
    let (numbers, _) = attack(device, "rings", wanted).run();
    all_done(&numbers, wanted);
    assert!(numbers["needs_reset"] > 0 && numbers["answered"] > wanted / 2);
}

#[test]
fn chains_by_chance_do_no_harm_from_a_disk() {
    chains_by_chance("disk", 42);
}

#[test]
fn chains_by_chance_do_no_harm_from_a_card() {
    chains_by_chance("card", 26);
}

#[test]
fn registers_by_chance_do_no_harm_to_a_disk() {
    let wanted = share(1);
    all_done(&attack("disk", "registers", wanted).run().0, wanted);
}

#[test]
fn registers_by_chance_do_no_harm_to_a_card() {
    let wanted = share(1);
    all_done(&attack("card", "registers", wanted).run().0, wanted);
}

/// One processor resets, sets up, kicks or rewrites what the other one does the same with.
#[track_caller]
fn two_processors_at(device: &str) {
    let wanted = share(15);
    let (numbers, _) = attack(device, "race", wanted).run();
    all_done(&numbers, wanted);
    // Whether the device needs a reset at the end of a round is up to the scheduler.
    assert!(numbers["second"] > wanted / 10, "{numbers:?}");
}

#[test]
fn two_processors_at_one_disk_do_no_harm() {
    two_processors_at("disk");
}

#[test]
fn two_processors_at_one_card_do_no_harm() {
    two_processors_at("card");
}

#[test]
fn the_board_takes_any_access() {
    // Slower than all the others: one access may be a string of thousands, and each of them leaves the guest.
    let wanted = share(1).clamp(1, 20_000);
    all_done(&attack("disk", "platform", wanted).run().0, wanted);
}
