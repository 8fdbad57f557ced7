//! # Snapshots
//!
//! **Job.** `migrate` and `-incoming`: bare guests in the middle of their work with a disk go on in another VM; what is
//! wrong with a snapshot is told and nothing starts; the old snapshot or the new one is there, whole.
//! **Who is not trusted.** The VMM; and whoever had the snapshot in hands.
//! **Why this way.** A bare guest checks every byte that it reads and every completion, so that one that is lost or done
//! twice is seen at once.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::host::{require_kvm, require_root};
use tests::payload::Payload;
use tests::qmp::QmpError;
use tests::vm::{Vm, VmBuilder};

/// A bare guest needs milliseconds; this is for a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

#[track_caller]
fn expect(vm: &mut Vm, text: &str) -> String {
    vm.wait_for(text, LIMIT).unwrap_or_else(|e| panic!("{e}"))
}

#[track_caller]
fn ends_well(vm: &mut Vm) {
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
}

/// A guest that writes to and reads from a disk until a key is pressed, and checks every byte.
struct Bench {
    dir: tempfile::TempDir,
    disk: PathBuf,
}

impl Bench {
    fn new() -> Self {
        require_kvm();
        require_root();
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.img");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        Self { dir, disk }
    }

    fn snapshot(&self) -> PathBuf {
        self.dir.path().join("template")
    }

    fn vm(&self) -> VmBuilder {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&Payload::BlkLoop.path(), "spin=1")
            .disk("d0", &self.disk, "")
            .arg("-snapshot-dir")
            .arg(self.dir.path())
            .with_qmp()
    }

    fn incoming(&self) -> VmBuilder {
        self.vm()
            .arg("-incoming")
            .arg(format!("file:{}", self.snapshot().display()))
    }
}

fn migrate(vm: &Vm, to: &Path) -> Result<Value, QmpError> {
    let mut qmp = vm.qmp().unwrap();
    // The disk is not part of the snapshot: nobody may write to it after that.
    qmp.execute("stop", json!({})).unwrap();
    qmp.execute(
        "migrate",
        json!({ "uri": format!("file:{}", to.display()) }),
    )
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_guest_with_a_busy_disk_goes_on_in_another_vm_twice_in_a_row() {
    let bench = Bench::new();
    let mut vm = bench.vm().start().unwrap();
    for _ in 0..2 {
        expect(&mut vm, "LOOP ");
        expect(&mut vm, "LOOP ");
        migrate(&vm, &bench.snapshot()).unwrap();
        assert_eq!(names(&bench.snapshot()), ["memory", "state"]);
        vm.kill().unwrap();
        drop(vm);
        vm = bench.incoming().start().unwrap();
    }
    let text = expect(&mut vm, "LOOP ");
    assert!(!text.contains("LOOP 0\r"), "it did not begin anew: {text}");
    expect(&mut vm, "LOOP ");
    vm.console.send("x").unwrap();
    expect(&mut vm, "BLK-LOOP OK bursts ");
    ends_well(&mut vm);
}

/// A snapshot of a paused guest whose VM is gone.
fn made() -> Bench {
    let bench = Bench::new();
    let mut vm = bench.vm().start().unwrap();
    expect(&mut vm, "LOOP ");
    migrate(&vm, &bench.snapshot()).unwrap();
    vm.kill().unwrap();
    bench
}

/// Starts it, waits for its end, and gives its messages. No device's process was started.
#[track_caller]
fn refused(vm: VmBuilder) -> String {
    let mut vm = vm.env("STRATOVIRT_LOG_LEVEL", "info").start().unwrap();
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    let messages = vm.messages();
    assert_eq!(status.code(), Some(1), "{messages}");
    assert!(!messages.contains(" is process "), "{messages}");
    let last = messages.lines().last().unwrap_or_default().to_owned();
    assert!(last.contains("-incoming "), "{messages}");
    last
}

#[test]
fn a_running_guest_goes_on_after_its_snapshot_and_one_that_is_paused_stays_so() {
    let bench = Bench::new();
    let mut vm = bench.vm().start().unwrap();
    expect(&mut vm, "LOOP ");
    let mut qmp = vm.qmp().unwrap();
    let uri = json!({ "uri": format!("file:{}", bench.snapshot().display()) });
    let status = |qmp: &mut tests::qmp::Qmp| {
        qmp.execute("query-status", json!({})).unwrap()["status"].clone()
    };
    assert_eq!(
        qmp.execute("query-migrate", json!({})).unwrap(),
        json!({"status": "none"})
    );
    qmp.execute("migrate", uri.clone()).unwrap();
    assert_eq!(status(&mut qmp), "running");
    let told = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(told["status"], "completed");
    assert_eq!(told["ram"]["total"], 128 << 20);
    assert_eq!(told["ram"]["remaining"], 0);
    let before = vm.console.transcript().len();
    expect(&mut vm, "LOOP ");
    assert!(vm.console.transcript().len() > before);
    qmp.execute("stop", json!({})).unwrap();
    // The second one takes the place of the first.
    let first = std::fs::read(bench.snapshot().join("state")).unwrap();
    qmp.execute("migrate", uri).unwrap();
    assert_eq!(status(&mut qmp), "paused");
    assert_ne!(
        std::fs::read(bench.snapshot().join("state")).unwrap(),
        first
    );
    assert_eq!(names(bench.dir.path()), ["disk.img", "template"]);
    qmp.execute("cont", json!({})).unwrap();
    vm.console.send("x").unwrap();
    expect(&mut vm, "BLK-LOOP OK bursts ");
    ends_well(&mut vm);
}

#[test]
fn snapshots_are_made_where_the_command_line_says_and_nowhere_else() {
    let bench = Bench::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let mut vm = bench.vm().start().unwrap();
    expect(&mut vm, "LOOP ");
    let refused = |to: &Path| match migrate(&vm, to).unwrap_err() {
        QmpError::Refused { description, .. } => description,
        other => panic!("{other}"),
    };
    assert!(refused(&elsewhere.path().join("x")).contains("-snapshot-dir"));
    assert!(refused(&bench.dir.path().join("a/b")).contains("-snapshot-dir"));
    assert!(refused(&bench.dir.path().join("..")).contains("name"));
    // What is there and no snapshot stays as it is.
    assert!(refused(&bench.disk).contains("not a folder"));
    let home = bench.dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("letter"), "text").unwrap();
    assert!(refused(&home).contains("letter"));
    assert_eq!(names(bench.dir.path()), ["disk.img", "home"]);
    assert_eq!(names(&home), ["letter"]);
    assert!(names(elsewhere.path()).is_empty());
    // And the guest and its disk go on.
    let mut qmp = vm.qmp().unwrap();
    qmp.execute("cont", json!({})).unwrap();
    vm.console.send("x").unwrap();
    expect(&mut vm, "BLK-LOOP OK bursts ");
    ends_well(&mut vm);
}

#[test]
fn a_snapshot_that_is_damaged_foreign_or_newer_starts_nothing() {
    let bench = made();
    let state = bench.snapshot().join("state");
    let good = std::fs::read(&state).unwrap();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(&state, bytes).unwrap();
        refused(bench.incoming())
    };
    /// A header that is right but for what was changed in it.
    fn sealed(bytes: &mut [u8]) {
        let sum = crc32(&bytes[..28]);
        bytes[28..32].copy_from_slice(&sum.to_le_bytes());
    }
    for length in [0, 5, 20, 32, 33, good.len() / 2, good.len() - 1] {
        let text = with(&|bytes| bytes.truncate(length));
        let expected = if length == 0 {
            "no magic number"
        } else {
            "truncated"
        };
        assert!(text.contains(expected), "{length}: {text}");
    }
    assert!(with(&|bytes| bytes.push(0)).contains("damaged"));
    assert!(with(&|bytes| bytes[0] = b'X').contains("no magic number"));
    assert!(with(&|bytes| bytes[8] = 9).contains("checksum of its header"));
    let newer = with(&|bytes| {
        bytes[8] = 9;
        sealed(bytes);
    });
    assert!(
        newer.contains("version 9") && newer.contains("reads version 1"),
        "{newer}"
    );
    let huge = with(&|bytes| {
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        sealed(bytes);
    });
    assert!(huge.contains("at most"), "{huge}");
    for at in [32, 40, good.len() / 2, good.len() - 1] {
        let text = with(&|bytes| bytes[at] ^= 0x10);
        assert!(text.contains("checksum of its body"), "{at}: {text}");
    }
    // A body whose checksum is right and whose contents are nonsense: all lengths are as large as can be.
    let nonsense = with(&|bytes| {
        bytes[32..].fill(0xff);
        let sum = crc32(&bytes[32..]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        sealed(bytes);
    });
    assert!(nonsense.contains("cannot be understood"), "{nonsense}");
    std::fs::write(&state, &good).unwrap();

    let memory = bench.snapshot().join("memory");
    let file = std::fs::File::options()
        .write(true)
        .read(true)
        .open(&memory)
        .unwrap();
    use std::os::unix::fs::FileExt;
    let place = (0..1 << 27)
        .step_by(4096)
        .find(|at| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, *at).unwrap();
            byte != [0]
        })
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 1], place).unwrap();
    let text = refused(bench.incoming());
    assert!(text.contains("memory is damaged"), "{text}");
    file.write_all_at(&byte, place).unwrap();
    file.set_len((1 << 27) - 1).unwrap();
    assert!(refused(bench.incoming()).contains("truncated"));
    file.set_len(1 << 27).unwrap();
    std::fs::rename(&memory, bench.snapshot().join("elsewhere")).unwrap();
    assert!(refused(bench.incoming()).contains("memory"));
    std::fs::rename(bench.snapshot().join("elsewhere"), &memory).unwrap();

    // And whole again, it works.
    let mut vm = bench.incoming().start().unwrap();
    expect(&mut vm, "LOOP ");
    vm.console.send("x").unwrap();
    expect(&mut vm, "BLK-LOOP OK bursts ");
    ends_well(&mut vm);
}

/// CRC-32 as in Ethernet, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum: u32, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            if sum & 1 == 1 {
                sum >> 1 ^ 0xedb8_8320
            } else {
                sum >> 1
            }
        })
    })
}

#[test]
fn another_command_line_is_told_by_its_option_and_starts_nothing() {
    let bench = made();
    let incoming = format!("file:{}", bench.snapshot().display());
    let line = |memory: &str, more: &[&str]| {
        Vm::builder()
            .args(["-machine", "microvm", "-m", memory, "-incoming", &incoming])
            .kernel(&Payload::BlkLoop.path(), "spin=1")
            .args(more)
    };
    let with_disk = |vm: VmBuilder| vm.disk("d0", &bench.disk, "");
    for (vm, expected) in [
        (with_disk(line("256", &[])), "-m gives 268435456"),
        (with_disk(line("128", &["-smp", "2"])), "-smp"),
        (with_disk(line("128", &[])).without_serial(), "no -serial"),
        (line("128", &[]), "1 devices; the command line has 0"),
    ] {
        let text = refused(vm);
        assert!(text.contains(expected), "{text}");
    }
    let drive = format!("id=d0,file={},direct=off", bench.disk.display());
    let text = refused(line(
        "128",
        &[
            "-drive",
            &drive,
            "-device",
            "virtio-blk-device,drive=d0,id=b,num-queues=2",
        ],
    ));
    assert!(
        text.contains("a disk with 1 queues") && text.contains("with 2 queues"),
        "{text}"
    );
    // Of a disk, only its process knows the size.
    let other = bench.dir.path().join("other.img");
    std::fs::File::create(&other)
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    let mut vm = line("128", &[]).disk("d0", &other, "").start().unwrap();
    assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(1));
    assert!(
        vm.messages().contains("the image has another size"),
        "{}",
        vm.messages()
    );
}
