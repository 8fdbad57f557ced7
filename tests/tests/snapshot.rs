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
use tests::host::{Tap, check_ext4, ext4_image, require_kvm, require_root};
use tests::jail::check::guest_ram_of;
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::payload::Payload;
use tests::qmp::QmpError;
use tests::test_path;
use tests::vm::{Vm, VmBuilder, ends_well, expect};

/// A bare guest needs milliseconds; this is for a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest that writes to and reads from a disk until a key is pressed, and checks every byte.
struct Bench {
    dir: tempfile::TempDir,
    disk: PathBuf,
}

impl Bench {
    fn new() -> Self {
        Self::in_folder(&std::env::temp_dir())
    }

    /// On a tmpfs, where clones share memory.
    fn on_tmpfs() -> Self {
        Self::in_folder(Path::new("/dev/shm"))
    }

    fn in_folder(folder: &Path) -> Self {
        require_kvm();
        require_root();
        let dir = tempfile::tempdir_in(folder).unwrap();
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
        self.vm_of("microvm")
    }

    fn vm_of(&self, machine: &str) -> VmBuilder {
        self.vm_with(machine, &self.disk)
    }

    fn vm_with(&self, machine: &str, disk: &Path) -> VmBuilder {
        Vm::builder()
            .args(["-machine", machine, "-m", "128"])
            .kernel(&Payload::BlkLoop.path(), "spin=1")
            .disk("d0", disk, "")
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
    comes_to_its_end(vm);
}

/// Its guest stops and has found every byte.
#[track_caller]
fn comes_to_its_end(mut vm: Vm) {
    vm.console.send("x").unwrap();
    expect(&mut vm, "BLK-LOOP OK bursts ");
    ends_well(&mut vm);
}

/// A snapshot of a paused guest whose VM is gone.
fn made() -> Bench {
    made_at(Bench::new())
}

fn made_at(bench: Bench) -> Bench {
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

/// The guest runs before its memory is there; its disk waits for that. Wherever that memory is mapped, it is between guards.
#[test]
fn memory_comes_in_while_the_guest_runs() {
    let bench = made();
    let mut vm = bench
        .vm()
        .arg("-incoming")
        .arg(format!("file:{},lazy=on", bench.snapshot().display()))
        .env("STRATOVIRT_LOG_LEVEL", "info")
        .start()
        .unwrap();
    expect(&mut vm, "LOOP ");
    // The disk has served, so that its process maps RAM; the broker comes first and maps none.
    let disk = vm.processes().unwrap()[1];
    for pid in [vm.pid(), disk] {
        assert_eq!(guest_ram_of(pid).unwrap(), (vec![128 << 20], Vec::new()));
    }
    expect(&mut vm, "LOOP ");
    let messages = vm.messages();
    assert!(messages.contains("guest memory has come in"), "{messages}");
    // Whole, so another snapshot can be made, from which it goes on as well.
    migrate(&vm, &bench.snapshot()).unwrap();
    vm.kill().unwrap();
    drop(vm);
    let mut vm = bench.incoming().start().unwrap();
    expect(&mut vm, "LOOP ");
    comes_to_its_end(vm);
}

/// The guest looks at pages that it has written and at pages that it has not while the former come in.
#[test]
fn pages_that_nobody_wrote_are_zero_while_others_come_in() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("template");
    let guest = || {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&Payload::Restored.path(), "touch=64 empty=16")
            .arg("-snapshot-dir")
            .arg(dir.path())
            .with_qmp()
    };
    let mut vm = guest().start().unwrap();
    expect(&mut vm, "....");
    migrate(&vm, &template).unwrap();
    vm.kill().unwrap();
    let mut vm = guest()
        .arg("-incoming")
        .arg(format!("file:{},lazy=on", template.display()))
        .start()
        .unwrap();
    // A round is 16384 pages that were written, and four through those that were not. It ends with the first wrong one.
    expect(&mut vm, &".".repeat(16384));
    let mut qmp = vm.qmp().unwrap();
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "running", "{}", vm.messages());
    // Only what is whole can be saved.
    migrate(&vm, &template).unwrap();
}

/// Clones of a template on a tmpfs have what they only look at in common, and what they write to alone; a snapshot of one has
/// both.
#[test]
fn clones_share_what_they_only_look_at() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let template = dir.path().join("template");
    let guest = || {
        Vm::builder()
            // What is mapped anew is left out of dumps as all guest memory.
            .args(["-machine", "microvm,dump-guest-core=off", "-m", "128"])
            .kernel(&Payload::Restored.path(), "touch=64 empty=16 write=2")
            .arg("-snapshot-dir")
            .arg(dir.path())
            .with_qmp()
    };
    let goes_on = |from: &Path| {
        guest()
            .arg("-incoming")
            .arg(format!("file:{},lazy=on", from.display()))
            .env("STRATOVIRT_LOG_LEVEL", "info")
            .start()
            .unwrap()
    };
    // A round is 16384 pages that were written; it ends with the first wrong one.
    let round = ".".repeat(16384);
    let go_on = |vm: &Vm| vm.qmp().unwrap().execute("cont", json!({})).unwrap();
    let mut vm = guest().start().unwrap();
    expect(&mut vm, "....");
    migrate(&vm, &template).unwrap();
    vm.kill().unwrap();
    drop(vm);
    let mut clones = [goes_on(&template), goes_on(&template), goes_on(&template)];
    for vm in &mut clones {
        expect(vm, &round);
        let messages = vm.messages();
        if messages.contains("not shared") {
            eprintln!("this kernel cannot share memory of clones: {messages}");
            return;
        }
        // There is nothing to wait for.
        let mut qmp = vm.qmp().unwrap();
        let status = qmp.execute("query-migrate", json!({})).unwrap();
        assert_eq!(status["status"], "completed", "{status}");
        assert_eq!(status["ram"]["remaining"], 0, "{status}");
    }
    for vm in &clones {
        let (shared, own) = tests::procfs::pages_of(vm.pid(), &template.join("memory")).unwrap();
        // What the guest looks at and nobody writes: 64 MiB but for 2 MiB in each round.
        assert!(shared >= 56 << 10, "{shared} KiB, {own} KiB");
        assert!(own <= 1 << 10, "{own} KiB");
    }
    let [first, second, third] = &mut clones;
    // One that goes on from a part of the template and a part of its own.
    let other = dir.path().join("other");
    migrate(first, &other).unwrap();
    go_on(first);
    expect(first, &round);
    let mut again = goes_on(&other);
    go_on(&again);
    expect(&mut again, &round);
    expect(&mut again, &round);
    // What is emptied stays empty: the guest finds nothing of the template when it starts anew.
    let mut qmp = second.qmp().unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    expect(second, &round);
    expect(third, &round);
    assert_eq!(
        third
            .qmp()
            .unwrap()
            .execute("query-status", json!({}))
            .unwrap()["status"],
        "running"
    );
}

/// Twenty clones at once take little more than one: what they only look at is there once.
#[test]
fn twenty_clones_share_their_clean_memory() {
    const CLONES: u64 = 20;
    /// KiB that the guest has written before the snapshot, and looks at afterwards.
    const CONTENT: u64 = 16 << 10;
    require_kvm();
    require_root();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let template = dir.path().join("template");
    let guest = || {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&Payload::Restored.path(), "touch=16")
            .arg("-snapshot-dir")
            .arg(dir.path())
            .env("STRATOVIRT_LOG_LEVEL", "info")
            .with_qmp()
    };
    let incoming = |how: &str| {
        guest()
            .arg("-incoming")
            .arg(format!("file:{}{how}", template.display()))
            .start()
            .unwrap()
    };
    let round = ".".repeat(CONTENT as usize / 4);
    let mut vm = guest().start().unwrap();
    expect(&mut vm, "....");
    migrate(&vm, &template).unwrap();
    vm.kill().unwrap();
    drop(vm);
    // What one takes that shares nothing.
    let mut alone = incoming("");
    expect(&mut alone, &round);
    let unshared = tests::procfs::pss(alone.pid()).unwrap();
    drop(alone);
    let mut clones: Vec<Vm> = (0..CLONES).map(|_| incoming(",lazy=on")).collect();
    for vm in &mut clones {
        expect(vm, &round);
    }
    if clones[0].messages().contains("not shared") {
        eprintln!("this kernel cannot share memory of clones");
        return;
    }
    let sum: u64 = clones
        .iter()
        .map(|vm| tests::procfs::pss(vm.pid()).unwrap())
        .sum();
    // The content once, and beside it not half of what each would take that does not share it.
    let bound = CONTENT + CLONES * CONTENT / 2;
    eprintln!("{CLONES} clones: {sum} KiB, one alone: {unshared} KiB, bound: {bound} KiB");
    assert!(sum < bound, "{sum} KiB");
    assert!(CLONES * unshared > bound, "{unshared} KiB prove nothing");
}

/// What a card receives goes into memory that is the template's still, and the guest sees it: each answer is compared byte by byte,
/// and each buffer comes back once.
#[test]
fn packets_reach_clean_memory() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let template = dir.path().join("template");
    let taps = [
        Tap::new("sv-cl0", "10.7.44.1/24").unwrap(),
        Tap::new("sv-cl1", "10.7.45.1/24").unwrap(),
    ];
    let guest = |tap: &Tap| {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&Payload::NetLoop.path(), "host=10.7.44.1 own=10.7.44.2")
            .tap("n0", &tap.name, "52:54:00:00:00:44")
            .arg("-snapshot-dir")
            .arg(dir.path())
            .env("STRATOVIRT_LOG_LEVEL", "info")
            .with_qmp()
    };
    let mut vm = guest(&taps[0]).start().unwrap();
    expect(&mut vm, "LOOP ");
    migrate(&vm, &template).unwrap();
    vm.kill().unwrap();
    drop(vm);
    for _ in 0..2 {
        let mut vm = guest(&taps[0])
            .arg("-incoming")
            .arg(format!("file:{},lazy=on", template.display()))
            .start()
            .unwrap();
        expect(&mut vm, "LOOP ");
        expect(&mut vm, "LOOP ");
        let messages = vm.messages();
        if messages.contains("not shared") || messages.contains("cannot be watched") {
            eprintln!("this kernel cannot share memory of clones: {messages}");
            return;
        }
        let (_, own) = tests::procfs::pages_of(vm.pid(), &template.join("memory")).unwrap();
        assert_eq!(own, 0, "a private copy of the template's page is nobody's");
        vm.console.send("x").unwrap();
        expect(&mut vm, "NET-LOOP OK");
        ends_well(&mut vm);
    }
}

/// A disk's process gets to see no page that is the template's still, and what it writes its guest sees; so it is for the process
/// that comes after one that was killed.
#[test]
fn devices_of_clones_take_what_they_touch() {
    let bench = made_at(Bench::on_tmpfs());
    let mut clones = Vec::new();
    for number in 0..3 {
        let disk = bench.dir.path().join(format!("disk-{number}.img"));
        std::fs::copy(&bench.disk, &disk).unwrap();
        let vm = bench
            .vm_with("microvm", &disk)
            .arg("-incoming")
            .arg(format!("file:{},lazy=on", bench.snapshot().display()))
            .env("STRATOVIRT_LOG_LEVEL", "info")
            .start()
            .unwrap();
        clones.push(vm);
    }
    for vm in &mut clones {
        expect(vm, "LOOP ");
        expect(vm, "LOOP ");
        let messages = vm.messages();
        if messages.contains("not shared") {
            eprintln!("this kernel cannot share memory of clones: {messages}");
            return;
        }
        // Nobody had to wait for memory.
        assert!(!messages.contains("guest memory has come in"), "{messages}");
        assert!(!messages.contains("copied for all"), "{messages}");
        let disk = vm.processes().unwrap()[1];
        // The front end has what it is watched by, alone.
        for (number, fd) in tests::procfs::fds(disk).unwrap() {
            assert!(!fd.target.contains("userfaultfd"), "{number}: {fd:?}");
        }
        let pid = nix::unistd::Pid::from_raw(disk);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let mut qmp = vm.qmp().unwrap();
        let status = qmp.execute("query-migrate", json!({})).unwrap();
        assert_eq!(status["status"], "completed", "{status}");
    }
    for mut vm in clones {
        for _ in 0..4 {
            expect(&mut vm, "LOOP ");
        }
        comes_to_its_end(vm);
    }
}

/// What is damaged never reaches the guest.
#[test]
fn a_damaged_block_that_comes_in_late_ends_the_vm() {
    use std::os::unix::fs::FileExt;
    let bench = made();
    let memory = std::fs::File::options()
        .read(true)
        .write(true)
        .open(bench.snapshot().join("memory"))
        .unwrap();
    let mut byte = [0];
    let place = (0..1 << 15)
        .rev()
        .map(|page| page * 4096)
        .find(|at| memory.read_exact_at(&mut byte, *at).is_ok() && byte != [0])
        .unwrap();
    memory.write_all_at(&[byte[0] ^ 1], place).unwrap();
    let mut vm = bench
        .vm()
        .arg("-incoming")
        .arg(format!("file:{},lazy=on", bench.snapshot().display()))
        .start()
        .unwrap();
    // It may be gone already.
    let _ = vm.processes();
    let status = vm.wait(LIMIT).unwrap();
    let messages = vm.messages();
    assert_eq!(status.code(), Some(1), "{messages}");
    assert!(messages.contains("checksum is wrong"), "{messages}");
    let deadline = tests::wait::Deadline::after(Duration::from_secs(5));
    assert_eq!(vm.survivors(deadline), Vec::<i32>::new());
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
    comes_to_its_end(vm);
}

/// Each step comes as an event; one client's `migrate` is given up by another, and then everything is as it was before.
#[test]
fn a_snapshot_tells_its_steps_and_is_given_up_when_somebody_says_so() {
    /// Where nothing of the guest's is.
    const FILLED: std::ops::Range<usize> = 64 << 20..512 << 20;
    let bench = Bench::new();
    let ram = bench.dir.path().join("ram");
    let mut content = vec![0; FILLED.end];
    content[FILLED].fill(0x5a);
    // Enough that it is not written before somebody can say something.
    std::fs::write(&ram, content).unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm,mem-share=on", "-m", "512", "-mem-path"])
        .arg(&ram)
        .kernel(&Payload::BlkLoop.path(), "spin=1")
        .disk("d0", &bench.disk, "")
        .arg("-snapshot-dir")
        .arg(bench.dir.path())
        .with_qmp()
        .start()
        .unwrap();
    expect(&mut vm, "LOOP ");
    let (mut client, mut other) = (vm.qmp().unwrap(), vm.qmp().unwrap());
    let uri = json!({ "uri": format!("file:{}", bench.snapshot().display()) });
    let steps = |qmp: &mut tests::qmp::Qmp, wanted: &[&str]| {
        for step in wanted {
            let event = qmp.wait_event("MIGRATION", LIMIT).unwrap();
            assert_eq!(event["data"], json!({ "status": step }));
        }
    };
    // Nothing is under way, so nothing is given up.
    other.execute("migrate_cancel", json!({})).unwrap();
    client.execute("migrate", uri.clone()).unwrap();
    steps(&mut other, &["setup", "active", "completed"]);
    let state = || std::fs::read(bench.snapshot().join("state")).unwrap();
    let (first, there) = (state(), names(bench.dir.path()));

    let request = json!({ "execute": "migrate", "arguments": uri });
    client.send_raw(&format!("{request}\r\n")).unwrap();
    steps(&mut other, &["setup", "active"]);
    let told = other.execute("query-migrate", json!({})).unwrap();
    assert_eq!(told["status"], "active");
    assert_ne!(told["ram"]["remaining"], 0, "{told}");
    other.execute("migrate_cancel", json!({})).unwrap();
    let said = client.reply("migrate").unwrap();
    assert_eq!(
        said["error"]["desc"], "No snapshot: it was cancelled",
        "{said}"
    );
    steps(&mut other, &["cancelled"]);
    let told = other.execute("query-migrate", json!({})).unwrap();
    assert_eq!(told["status"], "cancelled", "{told}");
    let status = other.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "running");
    assert_eq!((state(), names(bench.dir.path())), (first, there));
    expect(&mut vm, "LOOP ");
    // It can be made again.
    client.execute("migrate", uri).unwrap();
    steps(&mut other, &["setup", "active", "completed"]);
    comes_to_its_end(vm);
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
    comes_to_its_end(vm);
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
    let reads = format!("reads version {}", good[8]);
    assert!(
        newer.contains("version 9") && newer.contains(&reads),
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
    comes_to_its_end(vm);
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

/// Debian's kernel with a mounted disk that it writes to all the time and a card in use, both of its queue pairs: each processor sends by
/// one of its own.
#[test]
fn linux_goes_on_twice_with_its_files_its_memory_and_its_network() {
    where_linux_boots(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let tap = Tap::of_queues("sv-snap", "10.0.9.1/24").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let content = dir.path().join("content");
        std::fs::create_dir(&content).unwrap();
        let disk = dir.path().join("disk.img");
        ext4_image(&disk, 64, &content).unwrap();
        let script = Script::new(
            "set -e\n\
             ip addr add 10.0.9.2/24 dev eth0; ip link set eth0 up\n\
             mkdir -p /d; mount -t ext4 /dev/vda /d\n\
             dd if=/dev/urandom of=/tmp/memory bs=1M count=24 2>/dev/null\n\
             dd if=/dev/urandom of=/d/kept bs=64k count=64 2>/dev/null\n\
             (while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/d/busy bs=64k count=32 conv=fsync 2>/dev/null; done) &\n\
             writer=$!\n\
             for round in 0 1 2; do\n\
               for cpu in 0 1; do taskset -c $cpu ping -c 1 -w 60 10.0.9.1 > /dev/null; done\n\
               echo 3 > /proc/sys/vm/drop_caches\n\
               echo SUMS $(md5sum < /tmp/memory | cut -d' ' -f1) $(md5sum < /d/kept | cut -d' ' -f1)\n\
               echo IDENTITY $(dd if=/dev/mem bs=4096 skip=239 count=1 2>/dev/null | head -c 16 | md5sum | cut -d' ' -f1)\n\
               echo UPTIME $(cut -d. -f1 /proc/uptime)\n\
               echo ROUND $round; read line\n\
             done\n\
             touch /tmp/stop; wait $writer\n\
             umount /d\n\
             echo TOLD $(awk '/ 13-edge /{print $2 + $3}' /proc/interrupts)\n\
             if dmesg | grep -E 'I/O error|blocked for more|BUG:|EXT4-fs error'; then exit 1; fi\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let snapshot = dir.path().join("template");
        let build = || {
            Vm::builder()
                .args(["-machine", "microvm", "-m", "256", "-smp", "2"])
                .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
                .arg("-initrd")
                .arg(initrd.path())
                .disk("d0", &disk, "")
                .arg("-netdev")
                .arg(format!("tap,id=n0,ifname={},queues=2", tap.name))
                .arg("-device")
                .arg("virtio-net-device,netdev=n0,id=dev-n0,mac=52:54:00:aa:bb:01,mq=on")
                .arg("-snapshot-dir")
                .arg(&snapshot)
                .with_qmp()
        };
        let mut vm = build().start().unwrap();
        let mut sums = Vec::new();
        let mut uptimes: Vec<u64> = Vec::new();
        let mut identities = std::collections::BTreeSet::new();
        for round in 0..3 {
            expect(&mut vm, "SUMS ");
            sums.push(vm.console.rest_of_line(LIMIT).unwrap());
            expect(&mut vm, "IDENTITY ");
            identities.insert(vm.console.rest_of_line(LIMIT).unwrap());
            expect(&mut vm, "UPTIME ");
            uptimes.push(vm.console.rest_of_line(LIMIT).unwrap().parse().unwrap());
            expect(&mut vm, &format!("ROUND {round}"));
            let ping = std::process::Command::new("ping")
                // Until it is answered: a guest that is slow must not be taken for one that is gone.
                .args(["-c", "1", "-w", "60", "10.0.9.2"])
                .output()
                .unwrap();
            assert!(ping.status.success(), "{ping:?}");
            if round < 2 {
                migrate(&vm, &snapshot).unwrap();
                vm.kill().unwrap();
                drop(vm);
                vm = build()
                    .arg("-incoming")
                    .arg(format!("file:{}", snapshot.display()))
                    .start()
                    .unwrap();
            }
            vm.console.send("\n").unwrap();
        }
        // It was told of each new generation id; this kernel has no driver that would do something about it.
        expect(&mut vm, "TOLD ");
        assert_eq!(vm.console.rest_of_line(LIMIT).unwrap(), "2");
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
        assert!(sums.iter().all(|one| *one == sums[0]), "{sums:?}");
        assert_eq!(identities.len(), 3, "{identities:?}");
        assert!(uptimes.is_sorted(), "the clock went back: {uptimes:?}");
        check_ext4(&disk).unwrap();
    });
}

/// A shared folder with files open, one of them gone, a working directory and a writer that never rests: goes on with the same
/// folder, and then with a copy of it elsewhere.
#[test]
fn linux_goes_on_with_what_it_has_open_in_a_shared_folder() {
    where_linux_boots(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("deep/er")).unwrap();
        std::fs::write(tree.join("deep/er/here"), "still here").unwrap();
        std::fs::write(tree.join("lines"), "line 0\nline 1\nline 2\nline 3\n").unwrap();
        let many = tree.join("many");
        std::fs::create_dir(&many).unwrap();
        for n in 0..200 {
            std::fs::write(many.join(n.to_string()), n.to_string()).unwrap();
        }
        let script = Script::new(
            "mkdir -p /s; mount -t virtiofs share /s\n\
             exec 3>>/s/log 4</s/lines 5>/s/gone\n\
             rm /s/gone; cd /s/deep/er\n\
             cat /s/many/* > /dev/null\n\
             (while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/s/busy bs=64k count=32 conv=fsync 2>/tmp/dd || cat /tmp/dd; done) &\n\
             writer=$!\n\
             for round in 0 1 2; do\n\
               echo 3 > /proc/sys/vm/drop_caches\n\
               echo round $round >&3 || echo BAD append\n\
               read line <&4; echo READ $line\n\
               echo HERE $(cat here)\n\
               echo MANY $(cat /s/many/* | md5sum | cut -d' ' -f1)\n\
               if echo x >&5; then echo GONE writable; else echo GONE stale; fi\n\
               echo ROUND $round; read key\n\
             done\n\
             touch /tmp/stop; wait $writer\n\
             exec 3>&- 4<&- 5>&-\n\
             cd /; sync; md5sum /s/busy | cut -d' ' -f1 > /s/busy.md5\n\
             umount /s\n\
             if dmesg | grep -E 'blocked for more|BUG:'; then exit 1; fi\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let snapshot = dir.path().join("template");
        let build = |tree: &Path| {
            Vm::builder()
                .args(["-machine", "microvm", "-m", "256"])
                .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
                .arg("-initrd")
                .arg(initrd.path())
                .arg("-fsdev")
                .arg(format!("local,id=f,path={}", tree.display()))
                .args(["-device", "virtio-fs-device,fsdev=f,tag=share,id=fs0"])
                .arg("-snapshot-dir")
                .arg(&snapshot)
                .env("STRATOVIRT_LOG_LEVEL", "info")
                .with_qmp()
        };
        let copy = dir.path().join("copy");
        let mut vm = build(&tree).start().unwrap();
        let mut many = Vec::new();
        for round in 0..3 {
            expect(&mut vm, &format!("READ line {round}"));
            expect(&mut vm, "HERE still here");
            expect(&mut vm, "MANY ");
            many.push(vm.console.rest_of_line(LIMIT).unwrap());
            // A file without a name cannot be found again; all others can.
            let gone = if round == 0 { "writable" } else { "stale" };
            expect(&mut vm, &format!("GONE {gone}"));
            expect(&mut vm, &format!("ROUND {round}"));
            if round < 2 {
                migrate(&vm, &snapshot).unwrap();
                vm.kill().unwrap();
                drop(vm);
                let tree = if round == 0 {
                    &tree
                } else {
                    let copied = std::process::Command::new("cp")
                        .args(["-a"])
                        .args([&tree, &copy])
                        .status();
                    assert!(copied.unwrap().success());
                    std::fs::rename(&tree, dir.path().join("elsewhere")).unwrap();
                    &copy
                };
                vm = build(tree)
                    .arg("-incoming")
                    .arg(format!("file:{}", snapshot.display()))
                    .start()
                    .unwrap();
            }
            vm.console.send("\n").unwrap();
        }
        let text = expect(&mut vm, "GUEST-END status=0");
        assert!(!text.contains("BAD"), "{text}");
        assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(0), "{}", vm.messages());
        assert!(many.iter().all(|sum| *sum == many[0]), "{many:?}");
        let text = |name: &str| std::fs::read_to_string(copy.join(name)).unwrap();
        assert_eq!(text("log"), "round 0\nround 1\nround 2\n");
        assert!(!copy.join("gone").exists());
        let sum = std::process::Command::new("md5sum")
            .arg(copy.join("busy"))
            .output()
            .unwrap();
        assert_eq!(&sum.stdout[..32], &text("busy.md5").as_bytes()[..32]);
    });
}

/// A disk, a card and a folder are plugged into a running guest, which uses them; where it goes on they are on the command line.
#[test]
fn linux_goes_on_with_devices_that_were_plugged_where_the_command_line_has_them() {
    where_linux_boots(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let tap = Tap::new("sv-snap", "10.0.9.1/24").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["content", "images", "folder"] {
            std::fs::create_dir(at(folder)).unwrap();
        }
        std::fs::write(at("folder/lines"), "line 0\nline 1\nline 2\n").unwrap();
        let disk = at("images/plugged");
        ext4_image(&disk, 32, &at("content")).unwrap();
        let script = Script::new(
            "set -e\n\
             poll() { until eval \"$1\"; do usleep 20000; done; }\n\
             echo READY; read key\n\
             mkdir -p /d /f\n\
             poll '[ -b /dev/vda ]'; mount -t ext4 /dev/vda /d\n\
             poll '[ -e /sys/class/net/eth0 ]'\n\
             ip addr add 10.0.9.2/24 dev eth0; ip link set eth0 up\n\
             poll 'mount -t virtiofs share /f 2>/dev/null'\n\
             exec 4</f/lines\n\
             dd if=/dev/urandom of=/d/kept bs=64k count=16 2>/dev/null\n\
             (while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/d/busy bs=64k count=32 conv=fsync 2>/dev/null; done) &\n\
             writer=$!\n\
             for round in 0 1 2; do\n\
               echo 3 > /proc/sys/vm/drop_caches\n\
               read line <&4; echo READ $line\n\
               echo SUM $(md5sum < /d/kept | cut -d' ' -f1)\n\
               poll '[ \"$(cat /sys/class/net/eth0/carrier)\" = \"$key\" ]'\n\
               echo CARRIER $key\n\
               poll 'ping -c 1 -W 2 10.0.9.1 > /dev/null'\n\
               echo ROUND $round; read key\n\
             done\n\
             touch /tmp/stop; wait $writer\n\
             exec 4<&-; umount /d /f\n\
             if dmesg | grep -E 'I/O error|blocked for more|BUG:|EXT4-fs error'; then exit 1; fi\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let snapshot = at("template");
        let build = || {
            Vm::builder()
                .args(["-machine", "microvm", "-m", "256"])
                .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
                .arg("-initrd")
                .arg(initrd.path())
                .arg("-hotplug")
                .arg(format!("images={}", at("images").display()))
                .arg("-hotplug")
                .arg(format!("folders={}", at("folder").display()))
                .args(["-hotplug", "tap=sv-snap"])
                .arg("-snapshot-dir")
                .arg(&snapshot)
                .with_qmp()
        };
        let mut vm = build().start().unwrap();
        expect(&mut vm, "READY");
        let mut qmp = vm.qmp().unwrap();
        for (command, arguments) in [
            (
                "blockdev-add",
                json!({ "node-name": "d", "driver": "raw", "cache": { "direct": false },
                    "file": { "driver": "file", "filename": disk } }),
            ),
            (
                "device_add",
                json!({ "id": "disk", "driver": "virtio-blk-device", "drive": "d" }),
            ),
            (
                "netdev_add",
                json!({ "id": "n", "type": "tap", "ifname": "sv-snap" }),
            ),
            (
                "device_add",
                json!({ "id": "card", "driver": "virtio-net-device", "netdev": "n", "mac": "52:54:00:aa:bb:02" }),
            ),
            ("fsdev-add", json!({ "id": "f", "path": at("folder") })),
            (
                "device_add",
                json!({ "id": "fs", "driver": "virtio-fs-device", "fsdev": "f", "tag": "share" }),
            ),
        ] {
            qmp.execute(command, arguments).unwrap();
        }
        drop(qmp);
        // The cable is out while the second snapshot is made.
        let link = |vm: &Vm, up: bool| {
            let arguments = json!({ "name": "n", "up": up });
            vm.qmp().unwrap().execute("set_link", arguments).unwrap();
        };
        let carrier = ["1\n", "0\n", "1\n", "\n"];
        vm.console.send(carrier[0]).unwrap();
        let mut sums = Vec::new();
        for round in 0..3 {
            expect(&mut vm, &format!("READ line {round}"));
            expect(&mut vm, "SUM ");
            sums.push(vm.console.rest_of_line(LIMIT).unwrap());
            expect(&mut vm, &format!("CARRIER {}", carrier[round].trim()));
            link(&vm, true);
            expect(&mut vm, &format!("ROUND {round}"));
            if round < 2 {
                link(&vm, carrier[round + 1] == "1\n");
                migrate(&vm, &snapshot).unwrap();
                vm.kill().unwrap();
                drop(vm);
                vm = build()
                    .disk("d", &disk, "")
                    .tap("n", &tap.name, "52:54:00:aa:bb:02")
                    .arg("-fsdev")
                    .arg(format!("local,id=f,path={}", at("folder").display()))
                    .args(["-device", "virtio-fs-device,fsdev=f,tag=share,id=fs"])
                    .arg("-incoming")
                    .arg(format!("file:{}", snapshot.display()))
                    .start()
                    .unwrap();
            }
            vm.console.send(carrier[round + 1]).unwrap();
        }
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
        assert!(sums.iter().all(|one| *one == sums[0]), "{sums:?}");
        check_ext4(&disk).unwrap();
    });
}

/// The guest goes on with the size that the disk had when the snapshot was made, and with no other.
#[test]
fn a_disk_that_was_made_longer_goes_on_so() {
    let bench = Bench::new();
    let drive = format!(
        "id=d0,file={},direct=off,max-size=4194304",
        bench.disk.display()
    );
    let vm = || {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&Payload::BlkLoop.path(), "spin=1")
            .args([
                "-drive",
                &drive,
                "-device",
                "virtio-blk-device,drive=d0,id=b",
            ])
            .arg("-snapshot-dir")
            .arg(bench.dir.path())
            .with_qmp()
    };
    let incoming = format!("file:{}", bench.snapshot().display());
    let mut first = vm().start().unwrap();
    expect(&mut first, "LOOP ");
    let mut qmp = first.qmp().unwrap();
    let size = json!({ "device": "d0", "size": 2 << 20 });
    qmp.execute("block_resize", size).unwrap();
    expect(&mut first, "LOOP ");
    migrate(&first, &bench.snapshot()).unwrap();
    drop(qmp);
    first.kill().unwrap();
    drop(first);
    let mut second = vm().args(["-incoming", &incoming]).start().unwrap();
    expect(&mut second, "LOOP ");
    second.console.send("x").unwrap();
    expect(&mut second, "BLK-LOOP OK bursts ");
    ends_well(&mut second);
    let disk = std::fs::File::options().write(true).open(&bench.disk);
    disk.unwrap().set_len(1 << 20).unwrap();
    let mut third = vm().args(["-incoming", &incoming]).start().unwrap();
    assert_eq!(third.wait(LIMIT).unwrap().code(), Some(1));
    let said = third.messages();
    assert!(said.contains("the image has another size"), "{said}");
}

/// Huge pages of 2 MiB, mounted; what was there before is there again afterwards.
struct HugePages {
    before: String,
    mount: tempfile::TempDir,
}

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// So many pages more than there were; `None` if this machine has no memory in one piece for them.
    fn new(pages: usize) -> Option<Self> {
        let read = || std::fs::read_to_string(NR_HUGEPAGES).unwrap();
        let before = read();
        let wanted = before.trim().parse::<usize>().unwrap() + pages;
        std::fs::write("/proc/sys/vm/compact_memory", "1").unwrap();
        let mount = tempfile::tempdir().unwrap();
        let this = Self { before, mount };
        std::fs::write(NR_HUGEPAGES, wanted.to_string()).unwrap();
        if read().trim() != wanted.to_string() {
            return None;
        }
        nix::mount::mount(
            Some("none"),
            this.mount.path(),
            Some("hugetlbfs"),
            nix::mount::MsFlags::empty(),
            Some("pagesize=2M"),
        )
        .unwrap();
        Some(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Not mounted if there were too few.
        let _ = nix::mount::umount2(self.mount.path(), nix::mount::MntFlags::MNT_DETACH);
        std::fs::write(NR_HUGEPAGES, self.before.trim()).unwrap();
    }
}

/// A guest goes on from one kind of memory to the next, all around: what is in the snapshot is the same for all.
#[test]
fn a_guest_goes_on_whatever_its_memory_is_behind() {
    let bench = Bench::new();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = shm.path().join("ram");
    // Something of an earlier life is in it, which the guest must not see.
    std::fs::write(&file, vec![0xaa; 128 << 20]).unwrap();
    let object = |text: String| vec!["-object".to_owned(), text];
    let path = |path: &Path| vec!["-mem-path".to_owned(), path.display().to_string()];
    let mut kinds = vec![
        ("a memfd", Vec::new()),
        ("a folder of a tmpfs", path(shm.path())),
        ("a file of a tmpfs", path(&file)),
        (
            "an object of a file",
            object(format!(
                "memory-backend-file,id=ram,size=128M,share=on,mem-path={}",
                file.display()
            )),
        ),
        (
            "an object of a memfd",
            object("memory-backend-memfd,id=ram,size=128M,share=on".to_owned()),
        ),
        ("pages that are all there", vec!["-mem-prealloc".to_owned()]),
    ];
    // Less than the guest may use, and more than it does: a snapshot must not make any.
    let huge = HugePages::new(24);
    match &huge {
        Some(huge) => kinds.push(("huge pages", path(huge.mount.path()))),
        None => eprintln!("no huge pages: this machine has no memory in one piece for them"),
    }
    let mut vm = bench.vm().start().unwrap();
    expect(&mut vm, "LOOP ");
    // Once more than there are, so that each is saved and restored.
    for (kind, options) in kinds.iter().chain(kinds.first()) {
        for lazy in ["", ",lazy=on"] {
            eprintln!("{kind}{lazy}");
            expect(&mut vm, "LOOP ");
            migrate(&vm, &bench.snapshot()).unwrap_or_else(|e| panic!("{e}: {}", vm.messages()));
            vm.kill().unwrap();
            drop(vm);
            let machine = match options.first().map(String::as_str) {
                Some("-object") => "microvm,memory-backend=ram",
                _ => "microvm",
            };
            vm = bench
                .vm_of(machine)
                .args(options)
                .arg("-incoming")
                .arg(format!("file:{}{lazy}", bench.snapshot().display()))
                .start()
                .unwrap();
            // It has its memory when its disk answers.
            expect(&mut vm, "LOOP ");
        }
    }
    comes_to_its_end(vm);
}

/// What cannot be said on a command line cannot be part of a snapshot.
#[test]
fn a_window_that_lost_its_device_is_told_and_filled_again() {
    let bench = Bench::new();
    let images = bench.dir.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let second = images.join("second");
    std::fs::File::create(&second)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let vm = bench
        .vm()
        .arg("-hotplug")
        .arg(format!("images={}", images.display()));
    let mut vm = vm.start().unwrap();
    expect(&mut vm, "LOOP ");
    let mut qmp = vm.qmp().unwrap();
    let add = json!({ "node-name": "n", "driver": "raw", "cache": { "direct": false },
        "file": { "driver": "file", "filename": second } });
    qmp.execute("blockdev-add", add).unwrap();
    let plug = json!({ "id": "b", "driver": "virtio-blk-device", "drive": "n" });
    qmp.execute("device_add", plug.clone()).unwrap();
    qmp.execute("device_del", json!({ "id": "b" })).unwrap();
    qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    let refused = match migrate(&vm, &bench.snapshot()).unwrap_err() {
        QmpError::Refused { description, .. } => description,
        other => panic!("{other}"),
    };
    assert!(
        refused.contains("Window 1") && refused.contains("addr=0x1"),
        "{refused}"
    );
    // Without addr it gets a window that no driver knows, and the empty one stays.
    let mut again = plug;
    again["addr"] = json!("0x1");
    qmp.execute("device_add", again).unwrap();
    migrate(&vm, &bench.snapshot()).unwrap();
    drop(qmp);
    vm.kill().unwrap();
    drop(vm);
    // Without the plugged disk it does not start, with it it does.
    assert!(self::refused(bench.incoming()).contains("2 devices; the command line has 1"));
    let mut vm = bench.incoming().disk("n", &second, "").start().unwrap();
    expect(&mut vm, "LOOP ");
    comes_to_its_end(vm);
}
