//! # Files of a shared folder in the guest's memory
//!
//! **Job.** `cache-size=` of `-device virtio-fs-device`: Debian's stock kernel mounts the folder with `dax=always` and reads and writes
//! in the host's page cache. What is mapped is asked from the control process's own list of mappings, what is in a file from the
//! host. **Who is not trusted.** The VMM, its process, and the guest. **Why this way.** A guest that fell back to a page cache of its own
//! would show the same bytes in most of this; the list of mappings does not.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, getsockopt, send, sockopt::PeerCredentials};
use nix::unistd::Pid;
use serde_json::json;
use tests::host::{require_kvm, require_root};
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::payload::Payload;
use tests::procfs;
use tests::test_path;
use tests::vm::{Vm, VmBuilder, expect, script_ends_well};
use tests::wait::{Deadline, Watched, readable};

/// Two emulations deep, a boot takes five seconds; this is for a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(120);

/// What is there as long as the guest runs.
type Kept = (tempfile::TempDir, tempfile::NamedTempFile);

/// The guest runs `script` with the folder, which has `from-host`, at `/s`.
fn start(script: &str, fsdev: &str, device: &str) -> (Kept, PathBuf, Vm) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("from-host"), "from the host\n").unwrap();
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let mount = "mkdir -p /s; mount -t virtiofs -o dax=always share /s || exit 1\n";
    let initrd = guest
        .initrd_with(&Script::new(&format!("{mount}{script}")))
        .unwrap();
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "256"])
        .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
        .arg("-initrd")
        .arg(initrd.path())
        .arg("-fsdev")
        .arg(format!("local,id=f,path={}{fsdev}", tree.display()))
        .arg("-device")
        .arg(format!(
            "virtio-fs-device,fsdev=f,tag=share,id=fs0,max-restarts=1000{device}"
        ))
        .with_qmp()
        .start()
        .unwrap();
    ((dir, initrd), tree, vm)
}

/// The rights with which the control process has `file` mapped; empty if it has not.
fn mapped(vm: &Vm, file: &Path) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm.pid())).unwrap();
    // The mount that it was opened on is the jail's, and has the folder as its root.
    let name = format!(" /{}", file.file_name().unwrap().to_str().unwrap());
    maps.lines()
        .filter(|line| line.ends_with(&name))
        .map(|line| line.split_whitespace().nth(1).unwrap().to_owned())
        .collect()
}

#[test]
fn both_sides_work_in_the_same_pages() {
    let script = "cat /s/from-host; echo MAPPED; read next\n\
        cat /s/from-host; read next\n\
        printf GUEST | dd of=/s/from-host conv=notrunc 2>/dev/null; echo WRITTEN; read next\n\
        cp /bin/busybox /s/busybox && /s/busybox echo RUNS\n\
        umount /s; echo UNMOUNTED; read next; true";
    where_linux_boots(test_path!(), || {
        let (_kept, tree, mut vm) = start(script, "", ",cache-size=16M");
        let file = tree.join("from-host");
        expect(&mut vm, "from the host");
        expect(&mut vm, "MAPPED");
        assert_eq!(mapped(&vm, &file), ["r--s"], "not for writing yet");
        // Of the same length, so that there is nothing but the page by which the guest could know.
        File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .write_all_at(b"FROM", 0)
            .unwrap();
        vm.console.send("next\n").unwrap();
        expect(&mut vm, "FROM the host");
        vm.console.send("next\n").unwrap();
        expect(&mut vm, "WRITTEN");
        assert_eq!(mapped(&vm, &file), ["rw-s"]);
        assert_eq!(fs::read_to_string(&file).unwrap(), "GUESTthe host\n");
        vm.console.send("next\n").unwrap();
        expect(&mut vm, "RUNS");
        expect(&mut vm, "UNMOUNTED");
        assert!(mapped(&vm, &file).is_empty() && mapped(&vm, &tree.join("busybox")).is_empty());
        vm.console.send("next\n").unwrap();
        script_ends_well(&mut vm);
    });
}

#[test]
fn a_small_window_and_a_process_that_is_killed_lose_no_byte() {
    const KILLS: usize = 8;
    // Four times as much as there is room for: mappings come and go all the time.
    let script = "dd if=/dev/urandom of=/tmp/random bs=1M count=16 2>/dev/null\n\
        cp /tmp/random /s/random; a=$(md5sum < /tmp/random)\n\
        while [ ! -e /s/stop ]; do\n\
        echo ROUND\n\
        dd if=/tmp/random of=/s/random bs=1M conv=notrunc 2>/dev/null || exit 2\n\
        b=$(md5sum < /s/random); [ \"$a\" = \"$b\" ] || exit 3\n\
        done\n\
        sync; echo \"SUM=$a\"";
    where_linux_boots(test_path!(), || {
        let (_kept, tree, mut vm) = start(script, "", ",cache-size=4M");
        let mut qmp = vm.qmp().unwrap();
        for _ in 0..KILLS {
            expect(&mut vm, "ROUND");
            let pid = vm.process("fs").unwrap().unwrap();
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
            assert_eq!(back["data"]["device"], "fs0");
        }
        fs::write(tree.join("stop"), "").unwrap();
        expect(&mut vm, "SUM=");
        script_ends_well(&mut vm);
        assert_eq!(fs::metadata(tree.join("random")).unwrap().len(), 16 << 20);
    });
}

/// A page that is gone has the vCPU wait in the host's kernel, which looks for it again and again, or, where that gives up, stops the
/// guest until somebody says `cont`. It is never the VM's end.
#[test]
fn a_guest_outlives_that_the_host_makes_a_mapped_file_shorter() {
    // Attributes that hold for a day: the guest believes that the file is as long as it was.
    let script = "cat /s/from-host; echo MAPPED; read next; echo TOUCHES; cat /s/from-host; true";
    where_linux_boots(test_path!(), || {
        let (_kept, tree, mut vm) = start(script, ",cache=always", ",cache-size=16M");
        let mut qmp = vm.qmp().unwrap();
        expect(&mut vm, "MAPPED");
        let file = tree.join("from-host");
        File::create(&file).unwrap();
        vm.console.send("next\n").unwrap();
        expect(&mut vm, "TOUCHES");
        let mut rounds = 0;
        while vm
            .wait_for("whole again!!", Duration::from_secs(2))
            .is_err()
        {
            rounds += 1;
            assert!(rounds < 60, "{}", vm.messages());
            // From the second round on, after the guest has had seconds to meet the end of the file.
            fs::write(&file, "whole again!!\n").unwrap();
            let status = qmp.execute("query-status", json!({})).unwrap();
            if status["status"] == "io-error" {
                assert!(vm.messages().contains("made shorter on the host"));
                qmp.execute("cont", json!({})).unwrap();
            }
        }
        assert!(rounds > 0, "the guest has read what was not there");
        script_ends_well(&mut vm);
    });
}

/// Without Linux in between, on this machine's own KVM.
fn bare(folder: &Path) -> Vm {
    fs::write(folder.join("from-host"), "from the host\r\n").unwrap();
    bare_with(folder, "16M").start().unwrap()
}

fn bare_with(folder: &Path, window: &str) -> VmBuilder {
    require_kvm();
    require_root();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::Dax.path(), "")
        .arg("-fsdev")
        .arg(format!("local,id=f,path={}", folder.display()))
        .arg("-device")
        .arg(format!(
            "virtio-fs-device,fsdev=f,tag=share,id=fs0,cache-size={window}"
        ))
        .env("STRATOVIRT_LOG_LEVEL", "warn")
        .with_qmp()
}

/// What is mapped is no part of a snapshot, which is told; a guest that has nothing mapped goes on elsewhere, and maps again there.
#[test]
fn a_guest_without_mappings_goes_on_with_its_window() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = tempfile::tempdir().unwrap();
    let template = snapshots.path().join("template");
    fs::write(dir.path().join("from-host"), "from the host\r\n").unwrap();
    let build = |window: &str| {
        bare_with(dir.path(), window)
            .arg("-snapshot-dir")
            .arg(snapshots.path())
    };
    let file = dir.path().join("from-host");
    let migrate = json!({ "uri": format!("file:{}", template.display()) });
    let mut vm = build("16M").start().unwrap();
    expect(&mut vm, "SAW from the host\r\n");
    let mut qmp = vm.qmp().unwrap();
    let refused = qmp.execute("migrate", migrate.clone()).unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.contains("has 1 ranges of files mapped"),
        "{refused}"
    );
    assert!(!template.exists());
    assert_eq!(mapped(&vm, &file), ["r--s"], "what the guest has stays");
    vm.console.send("x").unwrap();
    expect(&mut vm, "REMOVED");
    qmp.execute("stop", json!({})).unwrap();
    qmp.execute("migrate", migrate).unwrap();
    vm.kill().unwrap();
    let goes_on = |window: &str| {
        build(window)
            .arg("-incoming")
            .arg(format!("file:{}", template.display()))
            .start()
            .unwrap()
    };
    let mut other = goes_on("32M");
    assert_eq!(other.wait(LIMIT).unwrap().code(), Some(1));
    let messages = other.messages();
    assert!(
        messages.contains("a window of 16777216 bytes (cache-size=)"),
        "{messages}"
    );
    let mut vm = goes_on("16M");
    let mut qmp = vm.qmp().unwrap();
    for rights in ["rw-s", "r--s"] {
        assert_eq!(mapped(&vm, &file), [""; 0]);
        vm.console.send("x").unwrap();
        expect(&mut vm, "SAW From the host\r\n");
        assert_eq!(mapped(&vm, &file), [rights]);
        vm.console.send("x").unwrap();
        expect(&mut vm, "REMOVED");
    }
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(0));
}

/// The folder's process's end of the channel on which it asks for mappings: the one socket that the control process made.
fn channel(vm: &mut Vm) -> OwnedFd {
    let process = vm.process("fs").unwrap().unwrap();
    let watched = Watched::new(process).unwrap();
    let sockets = procfs::fds(process).unwrap().into_iter();
    let mut channels: Vec<OwnedFd> = sockets
        .filter(|(_, fd)| fd.kind() == "socket")
        .map(|(number, _)| watched.descriptor(number).unwrap())
        .filter(|fd| getsockopt(fd, PeerCredentials).unwrap().pid() == vm.pid())
        .collect();
    assert_eq!(channels.len(), 1, "{channels:?}");
    channels.remove(0)
}

/// Whoever talks nonsense is not listened to any more, which the log tells; the next process is.
#[test]
fn nonsense_closes_the_channel_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = bare(dir.path());
    let file = dir.path().join("from-host");
    let mut qmp = vm.qmp().unwrap();
    expect(&mut vm, "SAW from the host\r\n");
    let taken = channel(&mut vm);
    send(taken.as_raw_fd(), b"nonsense", MsgFlags::MSG_NOSIGNAL).unwrap();
    // The other end is closed after the line is written.
    assert!(
        readable(&[taken.as_fd()], Deadline::after(LIMIT))
            .unwrap()
            .is_some()
    );
    let messages = vm.messages();
    let line = "window of device \"fs0\" is closed: a message that is none";
    assert!(messages.contains(line), "{messages}");
    drop(taken);
    assert_eq!(mapped(&vm, &file), ["r--s"], "what the guest has stays");
    kill(
        Pid::from_raw(vm.process("fs").unwrap().unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    vm.console.send("x").unwrap();
    expect(&mut vm, "REMOVED");
    assert_eq!(mapped(&vm, &file), [""; 0]);
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(0));
}

/// A reset leaves nothing mapped, and the folder's process may die meanwhile.
#[test]
fn a_bare_guest_has_a_file_in_its_memory_until_it_is_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = bare(dir.path());
    let file = dir.path().join("from-host");
    let mut qmp = vm.qmp().unwrap();
    for (boot, before) in ["SAW from the host\r\n", "SAW From the host\r\n"]
        .into_iter()
        .enumerate()
    {
        expect(&mut vm, before);
        assert_eq!(mapped(&vm, &file), ["r--s"]);
        let process = vm.process("fs").unwrap().unwrap();
        kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
        qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        assert_eq!(mapped(&vm, &file), ["r--s"], "boot {boot}");
        vm.console.send("x").unwrap();
        expect(&mut vm, "REMOVED");
        assert_eq!(mapped(&vm, &file), [""; 0]);
        vm.console.send("x").unwrap();
        expect(&mut vm, "SAW From the host\r\n");
        assert_eq!(mapped(&vm, &file), ["rw-s"]);
        assert_eq!(fs::read(&file).unwrap(), b"From the host\r\n");
        qmp.execute("stop", json!({})).unwrap();
        qmp.execute("system_reset", json!({})).unwrap();
        qmp.wait_event("RESET", LIMIT).unwrap();
        assert_eq!(mapped(&vm, &file), [""; 0], "nothing is left of it");
        qmp.execute("cont", json!({})).unwrap();
    }
    expect(&mut vm, "SAW From the host\r\n");
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(0));
}
