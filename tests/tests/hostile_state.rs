//! # Snapshots of devices that lie about their state
//!
//! **Job.** Device processes that lie while a snapshot is made of them, or while they are to go on from one: each lie has its
//! end, which is told, the guest goes on or nothing starts, and nothing stays behind.
//! **Who is not trusted.** The process in place of `block`, and a daemon for a shared folder.
//! **Why this way.** The lying one is truthful in everything else, so that what is told is about that lie.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use ipc::limits::SNAPSHOT_WAIT_MS;
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tests::daemon::Daemon;
use tests::host::{require_kvm, require_root};
use tests::lying;
use tests::payload::Payload;
use tests::qmp::{Qmp, QmpError};
use tests::vm::{Vm, VmBuilder, binary};
use tests::wait::Deadline;

/// Serves in place of `block`, or as a daemon for a folder.
const LIAR: &str = env!("CARGO_BIN_EXE_lying-device");
const LIMIT: Duration = Duration::from_secs(60);

/// A daemon for a folder, which lies as `how` says.
fn daemon(dir: &Path, how: &str) -> Daemon {
    let socket = dir.join("socket");
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new(LIAR);
    Daemon::start(command.arg(how).arg(socket), "listening").unwrap()
}

/// A VM with a folder of that daemon's, which its guest has started.
fn with_folder(dir: &Path) -> VmBuilder {
    require_kvm();
    require_root();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::StartDevice.path(), "device=26 queues=2")
        .arg("-chardev")
        .arg(format!("socket,id=c,path={}", dir.join("socket").display()))
        .args(["-device", "vhost-user-fs-device,chardev=c,tag=share,id=fs0"])
        .arg("-snapshot-dir")
        .arg(dir)
        .with_qmp()
}

/// A VM whose disk is served by a process that lies as `how` says.
fn with_disk(dir: &Path, how: &str) -> VmBuilder {
    lying::disk(LIAR, dir, how)
        .kernel(&Payload::StartDevice.path(), "device=2")
        .arg("-snapshot-dir")
        .arg(dir)
        .with_qmp()
}

fn incoming(vm: VmBuilder, dir: &Path) -> VmBuilder {
    vm.arg("-incoming")
        .arg(format!("file:{}", dir.join("template").display()))
}

#[track_caller]
fn started(vm: VmBuilder) -> (Vm, Qmp) {
    let mut vm = vm.start().unwrap();
    vm.wait_for("STARTED", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let qmp = vm.qmp().unwrap();
    (vm, qmp)
}

fn migrate(qmp: &mut Qmp, dir: &Path) -> Result<(), String> {
    let uri = format!("file:{}", dir.join("template").display());
    match qmp.execute("migrate", json!({ "uri": uri })) {
        Ok(_) => Ok(()),
        Err(QmpError::Refused { description, .. }) => Err(description),
        Err(error) => panic!("{error}"),
    }
}

/// It runs and answers; then it is ended, and leaves nothing.
#[track_caller]
fn goes_on(how: &str, mut vm: Vm, mut qmp: Qmp) {
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status["running"], true, "{how}: {status}");
    qmp.execute("quit", json!({})).unwrap();
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{how}: {e}"));
    assert_eq!(status.code(), Some(0), "{how}: {}", vm.messages());
    leaves_nothing(how, &vm);
}

#[track_caller]
fn leaves_nothing(how: &str, vm: &Vm) {
    assert!(vm.survivors(Deadline::after(LIMIT)).is_empty(), "{how}");
}

#[track_caller]
fn ends_with(how: &str, vm: VmBuilder, words: &str) {
    let mut vm = vm.start().unwrap();
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{how}: {e}"));
    let messages = vm.messages();
    assert_eq!(status.code(), Some(1), "{how}: {messages}");
    assert!(messages.contains(words), "{how}: {messages}");
    leaves_nothing(how, &vm);
}

/// No snapshot, and no part of one.
#[track_caller]
fn no_snapshot(how: &str, dir: &Path) {
    let known = ["socket", "stratovirt", "block", "disk.img"];
    for entry in std::fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(known.contains(&name.as_str()), "{how}: {name} stayed");
    }
}

/// Nothing is written of a device that lies; a daemon that cannot be understood any more is given up, and the guest goes on.
fn saved_with(cases: &[(&str, &str, bool)]) {
    for (how, words, serves_on) in cases {
        let dir = tempfile::tempdir().unwrap();
        let _daemon = daemon(dir.path(), how);
        let (mut vm, mut qmp) = started(with_folder(dir.path()));
        let told = migrate(&mut qmp, dir.path()).expect_err(how);
        assert!(
            told.contains(words) && told.contains("\"fs0\""),
            "{how}: {told}"
        );
        no_snapshot(how, dir.path());
        let status = qmp.execute("query-migrate", json!({})).unwrap();
        assert_eq!(status["status"], "failed", "{how}: {status}");
        if *serves_on {
            // The guest, too, gets on with it.
            qmp.execute("system_reset", json!({})).unwrap();
            vm.wait_for("STARTED", LIMIT)
                .unwrap_or_else(|e| panic!("{how}: {e}"));
        } else {
            let failed = qmp
                .wait_event("DEVICE_FAILED", LIMIT)
                .unwrap_or_else(|e| panic!("{how}: {e}: {}", vm.messages()));
            assert_eq!(failed["data"]["device"], "fs0", "{how}");
        }
        goes_on(how, vm, qmp);
    }
}

#[test]
fn a_lie_while_state_is_saved_is_told_and_the_guest_goes_on() {
    let refused = "cannot be saved: its process tells why in its log";
    saved_with(&[
        ("save-is-refused", refused, true),
        ("save-without-the-bit", refused, true),
        ("save-fails-in-the-end", refused, true),
        ("save-is-too-long", "file too large", true),
        ("save-has-no-end", "file too large", true),
        ("save-brings-a-descriptor", "it brings descriptors", false),
        ("save-is-a-short-answer", "it is too short", false),
        (
            "save-is-another-answer",
            "malformed answer to SET_DEVICE_STATE_FD: it is for another request",
            false,
        ),
        (
            "save-ends-with-a-long-answer",
            "malformed answer to CHECK_DEVICE_STATE: it is too long",
            false,
        ),
        ("save-is-the-end", "closed its vhost-user socket", false),
        (
            "save-leaves-before-the-end",
            "closed its vhost-user socket",
            false,
        ),
    ]);
}

#[test]
fn silence_while_state_is_saved_has_an_end() {
    saved_with(&[
        (
            "save-is-silence",
            "did not answer SET_DEVICE_STATE_FD within",
            false,
        ),
        (
            "save-is-silence-in-the-end",
            "did not answer CHECK_DEVICE_STATE within",
            false,
        ),
    ]);
}

/// A snapshot of a VM with a folder whose daemon lies as `how` says.
fn snapshot(how: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let _daemon = daemon(dir.path(), how);
    let (mut vm, mut qmp) = started(with_folder(dir.path()));
    migrate(&mut qmp, dir.path()).unwrap();
    vm.kill().unwrap();
    dir
}

fn loaded_with(dir: &Path, cases: &[(&str, &str)]) {
    for (how, words) in cases {
        let _daemon = daemon(dir, how);
        ends_with(how, incoming(with_folder(dir), dir), words);
    }
}

#[test]
fn a_lie_while_state_is_restored_is_told_and_nothing_starts() {
    let dir = snapshot("truth");
    let refused = "cannot be restored: its process tells why in its log";
    loaded_with(
        dir.path(),
        &[
            ("load-is-refused", refused),
            ("load-without-the-bit", refused),
            ("load-fails-in-the-end", refused),
            ("load-brings-a-descriptor", "it brings descriptors"),
            ("load-is-a-short-answer", "it is too short"),
            ("load-is-another-answer", "it is for another request"),
            (
                "load-ends-with-a-long-answer",
                "malformed answer to CHECK_DEVICE_STATE: it is too long",
            ),
            ("load-is-the-end", "closed its vhost-user socket"),
            ("load-leaves-before-the-end", "closed its vhost-user socket"),
        ],
    );
    // None of that was the snapshot's fault; and writing where it should read harms nobody but the liar.
    for how in ["truth", "load-has-no-end", "load-is-too-long"] {
        let _daemon = daemon(dir.path(), how);
        let vm = incoming(with_folder(dir.path()), dir.path());
        let vm = vm.start().unwrap();
        let mut qmp = vm.qmp().unwrap();
        if how == "truth" {
            // It goes on with what it said, so that another snapshot has the same.
            std::fs::remove_dir_all(dir.path().join("template")).unwrap();
            migrate(&mut qmp, dir.path()).unwrap();
        }
        goes_on(how, vm, qmp);
    }
}

#[test]
fn silence_while_state_is_restored_has_an_end() {
    let dir = snapshot("truth");
    loaded_with(
        dir.path(),
        &[
            (
                "load-is-silence",
                "did not answer SET_DEVICE_STATE_FD within",
            ),
            (
                "load-is-silence-in-the-end",
                "did not answer CHECK_DEVICE_STATE within",
            ),
        ],
    );
}

/// A daemon may have nothing to say; what another one makes of that is its own matter, and told.
#[test]
fn state_that_was_never_written_is_nothing_to_go_on_from() {
    let dir = snapshot("save-is-nothing");
    let refused = "cannot be restored: its process tells why in its log";
    loaded_with(dir.path(), &[("truth", refused)]);
    std::fs::remove_file(dir.path().join("socket")).unwrap();
    let tree = tempfile::tempdir().unwrap();
    let _own = Daemon::sharing(
        &binary("vhost_user_fs").unwrap(),
        tree.path(),
        &dir.path().join("socket"),
        &[],
    )
    .unwrap();
    ends_with(
        "vhost_user_fs",
        incoming(with_folder(dir.path()), dir.path()),
        refused,
    );
}

/// A process that does not say where its queues go on is replaced; one that lies again is given up, and the guest goes on.
fn stopped_with(cases: &[(&str, &str)]) {
    for (how, words) in cases {
        let dir = tempfile::tempdir().unwrap();
        let vm = with_disk(dir.path(), how).env("STRATOVIRT_LOG_LEVEL", "info");
        let (vm, mut qmp) = started(vm);
        let mut other = vm.qmp().unwrap();
        let uri = format!("file:{}", dir.path().join("template").display());
        let migrate = json!({ "execute": "migrate", "arguments": { "uri": uri } });
        qmp.send_raw(&format!("{migrate}\n")).unwrap();
        let failed = other
            .wait_event("DEVICE_FAILED", LIMIT)
            .unwrap_or_else(|e| panic!("{how}: {e}: {}", vm.messages()));
        assert_eq!(failed["data"]["device"], *how);
        // A device that was given up is not waited for. If its time is over by then there is no snapshot, else one in which it has failed.
        let given_up = Instant::now();
        let answer = qmp.reply("migrate").unwrap();
        let waited = given_up.elapsed().as_millis();
        assert!(
            waited < u128::from(SNAPSHOT_WAIT_MS) * 4 / 5,
            "{how}: {waited} ms: {answer}"
        );
        let messages = vm.messages();
        assert!(messages.contains(words), "{how}: {answer}: {messages}");
        goes_on(how, vm, other);
    }
}

#[test]
fn a_queue_that_goes_on_nowhere_costs_the_device_and_not_the_vm() {
    stopped_with(&[
        (
            "base-of-another-queue",
            "answered with index 0 of queue 9; allowed: index 0 to 65535",
        ),
        (
            "base-beyond-16-bits",
            "answered with index 65536 of queue 0; allowed: index 0 to 65535",
        ),
        (
            "base-is-short",
            "malformed answer to GET_VRING_BASE: it is too short",
        ),
        (
            "base-is-long",
            "malformed answer to GET_VRING_BASE: it is too long",
        ),
        ("base-is-the-end", "closed its vhost-user socket"),
    ]);
}

#[test]
fn silence_about_where_a_queue_goes_on_costs_the_device_and_not_the_vm() {
    stopped_with(&[("base-is-silence", "did not answer GET_VRING_BASE within")]);
}

/// An in-flight region that cannot be read is no part of a snapshot: nothing is made, and the guest goes on with its disk.
#[test]
fn an_inflight_region_that_is_none_is_told() {
    for how in [
        "inflight-is-a-pipe",
        "inflight-is-short",
        "inflight-is-everything",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (vm, mut qmp) = started(with_disk(dir.path(), how));
        let told = migrate(&mut qmp, dir.path()).expect_err(how);
        let words = format!("in-flight region of device \"{how}\" cannot be saved");
        assert!(told.contains(&words), "{how}: {told}");
        no_snapshot(how, dir.path());
        goes_on(how, vm, qmp);
    }
}

/// A guest goes on from a snapshot beside a disk whose process lies when it gets the queues.
#[test]
fn a_process_that_lies_when_it_is_to_go_on_costs_the_device_and_not_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut qmp) = started(with_disk(dir.path(), "truth"));
    migrate(&mut qmp, dir.path()).unwrap();
    vm.kill().unwrap();
    drop(vm);
    for how in [
        "no-memory",
        "no-inflight",
        "two-inflights",
        "empty-inflight",
        "inflight-is-a-pipe",
        "inflight-is-everything",
        "leaves-at-kick",
        "wrong-ack",
    ] {
        let vm = incoming(with_disk(dir.path(), how), dir.path());
        let vm = vm.start().unwrap();
        let mut qmp = vm.qmp().unwrap();
        qmp.wait_failed(how, LIMIT)
            .unwrap_or_else(|e| panic!("{how}: {e}: {}", vm.messages()));
        goes_on(how, vm, qmp);
    }
}

/// Where clones share memory, a process that does not let its page faults be watched, as it says that it does, gets no memory.
#[test]
fn a_process_whose_faults_cannot_be_watched_costs_the_device_and_not_the_vm() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (mut vm, mut qmp) = started(with_disk(dir.path(), "truth"));
    migrate(&mut qmp, dir.path()).unwrap();
    vm.kill().unwrap();
    drop(vm);
    for (how, words) in [
        ("faults-are-a-file", "cannot be watched"),
        ("faults-are-a-pipe", "cannot be watched"),
        ("faults-are-nothing", "cannot be watched"),
        ("faults-are-nobodys", "refused POSTCOPY_LISTEN"),
        (
            "faults-have-no-table",
            "malformed answer to SET_MEM_TABLE: it is too short",
        ),
        ("faults-leave", "closed its vhost-user socket"),
    ] {
        let lazily = format!("file:{},lazy=on", dir.path().join("template").display());
        let vm = with_disk(dir.path(), how)
            .arg("-incoming")
            .arg(lazily)
            .env("STRATOVIRT_LOG_LEVEL", "info");
        let vm = vm.start().unwrap();
        let mut qmp = vm.qmp().unwrap();
        if vm.messages().contains("not shared") {
            eprintln!(
                "this kernel cannot share memory of clones: {}",
                vm.messages()
            );
            return;
        }
        qmp.wait_failed(how, LIMIT)
            .unwrap_or_else(|e| panic!("{how}: {e}: {}", vm.messages()));
        let messages = vm.messages();
        assert!(messages.contains(words), "{how}: {messages}");
        goes_on(how, vm, qmp);
    }
}

/// An index that no driver wrote is its device's own matter: the guest goes on here and in another VM.
#[test]
fn an_index_that_no_driver_wrote_ends_no_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, mut qmp) = started(with_disk(dir.path(), "base-far-ahead"));
    migrate(&mut qmp, dir.path()).unwrap();
    goes_on("base-far-ahead", vm, qmp);
    let mut vm = incoming(with_disk(dir.path(), "truth"), dir.path())
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    // After a reset the queue begins at 0, like any other.
    qmp.execute("system_reset", json!({})).unwrap();
    vm.wait_for("STARTED", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    goes_on("truth", vm, qmp);
}
