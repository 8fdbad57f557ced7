//! # A folder of the host in a guest
//!
//! **Job.** `-fsdev` with `-device virtio-fs-device`, whose process the broker starts and jails, and
//! `-device vhost-user-fs-device` with a daemon that runs already: our own and the one that QEMU came with. The jail is asked
//! from the kernel, the folder is looked at from the host. **Who is not trusted.** The VMM, its process, and the guest.
//! **Why this way.** Debian's stock kernel mounts and works; what it left is compared on the host, which it cannot fool.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::daemon::Daemon;
use tests::host::{require_kvm, require_root};
use tests::jail::{Jail, NAMESPACES};
use tests::lab::{Flavour, Guest, Script, ensure_packages, where_linux_boots};
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::{Qmp, QmpError};
use tests::test_path;
use tests::vm::{Vm, VmBuilder, binary, expect, script_ends_well};
use tests::wait::Deadline;

/// Two emulations deep, a boot takes five seconds; this is for a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(120);

/// A bare guest that sleeps, beside a shared folder.
fn asleep(folder: &Path, fsdev: &str, device: &str) -> Vm {
    require_kvm();
    require_root();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::FirstByte.path(), "")
        .arg("-fsdev")
        .arg(format!("local,id=f,path={}{fsdev}", folder.display()))
        .arg("-device")
        .arg(format!("virtio-fs-device,fsdev=f,tag=share,id=fs0{device}"))
        .with_qmp()
        .start()
        .unwrap();
    // It greets once its devices serve.
    vm.qmp().unwrap();
    assert!(vm.process("fs").unwrap().is_some(), "{}", vm.messages());
    vm
}

fn tree() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("from-host"), "from the host\n").unwrap();
    (dir, tree)
}

/// What must hold for the process of a shared folder.
#[track_caller]
fn judge(jail: &Jail, capabilities: u64) {
    assert_eq!(jail.own_namespaces, NAMESPACES, "{jail}");
    let kept = [0, capabilities, capabilities, capabilities, 0];
    assert_eq!(jail.capabilities, kept, "{jail}");
    assert!(jail.no_new_privs, "{jail}");
    assert!(jail.threads.iter().all(|t| t.1 == 2), "{jail}");
    for (number, fd) in &jail.fds {
        let expected = match fd.kind() {
            "memfd" | "socket" | "eventfd" | "eventpoll" | "pidfd" | "mnt" => true,
            "pipe" => *number <= 2,
            other => other.starts_with('/'),
        };
        assert!(expected, "holds {number}: {fd:?}\n{jail}");
    }
    let sockets = jail.fds.values().filter(|fd| fd.kind() == "socket").count();
    assert_eq!(sockets, 2, "a vhost-user socket, and the keeper's\n{jail}");
}

#[test]
fn the_process_is_jailed_with_the_folder_as_its_root() {
    let (_dir, tree) = tree();
    let mut vm = asleep(&tree, "", "");
    let pid = vm.process("fs").unwrap().unwrap();
    let jail = Jail::of(pid).unwrap();
    // chown, dac_override, fowner, fsetid, setgid, setuid
    judge(&jail, 0xdb);
    assert_eq!(jail.root, ["from-host"], "{jail}");
    assert!(!jail.read_only_root, "{jail}");
    // Its root is the very folder, on a mount where nothing is a device, a program or gives rights.
    let (inside, outside) = (
        fs::metadata(format!("/proc/{pid}/root")).unwrap(),
        fs::metadata(&tree).unwrap(),
    );
    assert_eq!((inside.dev(), inside.ino()), (outside.dev(), outside.ino()));
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for option in ["nosuid", "nodev", "noexec"] {
        assert!(mounts.contains(option), "{mounts}");
    }
    // No path came along, only the id.
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(arguments, b"fs\0fs0\0");
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    // Its keeper is in the same jail, and can do nothing with the files by itself.
    let keeper = Jail::of(vm.process("fs-keeper").unwrap().unwrap()).unwrap();
    assert_eq!(keeper.own_namespaces, jail.own_namespaces, "{keeper}");
    assert_eq!(keeper.capabilities, [0, 0xdb, 0, 0xdb, 0], "{keeper}");
    assert_eq!(keeper.root, jail.root, "{keeper}");
    // Nobody else holds the folder but the broker, for a restart; the control process above all does not.
    let control = procfs::fds(vm.pid()).unwrap();
    let name = tree.to_str().unwrap();
    assert!(control.values().all(|fd| !fd.target.contains(name)));
}

#[test]
fn a_readonly_folder_is_mounted_so_and_takes_one_capability() {
    let (_dir, tree) = tree();
    let mut vm = asleep(&tree, ",readonly=on,xattr=on", "");
    let jail = Jail::of(vm.process("fs").unwrap().unwrap()).unwrap();
    judge(&jail, 1 << 2); // dac_read_search
    assert!(jail.read_only_root, "{jail}");
}

#[test]
fn a_folder_with_attributes_takes_one_capability_more() {
    let (_dir, tree) = tree();
    let mut vm = asleep(&tree, ",xattr=on", ",num-request-queues=4,queue-size=128");
    let jail = Jail::of(vm.process("fs").unwrap().unwrap()).unwrap();
    judge(&jail, 0xdb | 1 << 31); // setfcap
}

#[test]
fn a_folder_that_only_its_owner_may_enter_is_shared_all_the_same() {
    // Root is not its owner: the jail's own capabilities lead into it.
    let (_dir, tree) = tree();
    nix::unistd::chown(&tree, Some(1234.into()), Some(1234.into())).unwrap();
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o700)).unwrap();
    let mut vm = asleep(&tree, "", "");
    let jail = Jail::of(vm.process("fs").unwrap().unwrap()).unwrap();
    assert_eq!(jail.root, ["from-host"], "{jail}");
}

#[test]
fn a_killed_process_is_replaced_in_an_identical_jail_around_the_same_folder() {
    let (dir, tree) = tree();
    let mut vm = asleep(&tree, "", "");
    let mut qmp = vm.qmp().unwrap();
    let first = vm.process("fs").unwrap().unwrap();
    let before = Jail::of(first).unwrap();
    // Another folder at the same path must not become the guest's.
    let moved = dir.path().join("moved");
    fs::rename(&tree, &moved).unwrap();
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("decoy"), "").unwrap();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    qmp.wait_event("DEVICE_CRASHED", LIMIT).unwrap();
    let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    assert_eq!(back["data"]["device"], "fs0");
    let second = vm.process("fs").unwrap().unwrap();
    assert_ne!(first, second);
    let after = Jail::of(second).unwrap();
    assert_eq!(after.root, before.root, "{after}");
    assert_eq!(after.capabilities, before.capabilities, "{after}");
    assert_eq!(after.own_namespaces, before.own_namespaces, "{after}");
    judge(&after, 0xdb);
}

#[test]
fn another_program_takes_over_in_an_identical_jail() {
    let (_dir, tree) = tree();
    let mut vm = asleep(&tree, ",readonly=on", "");
    let mut qmp = vm.qmp().unwrap();
    let before = Jail::of(both(&mut vm).0).unwrap();
    for _ in 0..3 {
        let (serving, keeper) = both(&mut vm);
        qmp.execute("device-upgrade", json!({ "id": "fs0" }))
            .unwrap_or_else(|e| panic!("{e}\n{}", vm.messages()));
        let next = both(&mut vm);
        assert!(next.0 != serving && next.1 != keeper, "{next:?}");
    }
    let after = Jail::of(both(&mut vm).0).unwrap();
    judge(&after, 1 << 2);
    assert_eq!(after.root, before.root);
    assert!(after.read_only_root, "{after}");
    // Nothing is left behind with each.
    assert_eq!(after.fds.len(), before.fds.len(), "{before}\n{after}");
    let process = both(&mut vm).0;
    kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
    let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    assert_eq!(back["data"]["device"], "fs0");
}

#[test]
fn nothing_outlives_a_killed_control_process() {
    let (_dir, tree) = tree();
    let mut vm = asleep(&tree, "", "");
    assert!(vm.processes().unwrap().len() >= 2);
    vm.kill().unwrap();
    vm.wait(LIMIT).unwrap();
    let survivors = vm.survivors(Deadline::after(LIMIT));
    assert!(survivors.is_empty(), "{survivors:?}");
}

/// The one line that a start which must fail prints.
fn refused(arguments: &[String]) -> String {
    let output = Command::new(binary("stratovirt").unwrap())
        .args(["-machine", "microvm", "-m", "128", "-kernel"])
        .arg(Payload::FirstByte.path())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn what_cannot_be_shared_is_told_at_the_start() {
    require_kvm();
    require_root();
    let (dir, tree) = tree();
    let managed = |path: &Path| {
        refused(&[
            "-fsdev".into(),
            format!("local,id=f,path={}", path.display()),
            "-device".into(),
            "virtio-fs-device,fsdev=f,tag=t".into(),
        ])
    };
    let (none, file) = (tree.join("none"), tree.join("from-host"));
    assert!(
        managed(&none).contains(&format!(
            "-fsdev path={}: cannot open: No such file",
            none.display()
        )),
        "{}",
        managed(&none)
    );
    assert!(
        managed(&file).contains(&format!("-fsdev path={}: not a folder", file.display())),
        "{}",
        managed(&file)
    );
    let external = |path: &Path| {
        refused(&[
            "-chardev".into(),
            format!("socket,id=c,path={}", path.display()),
            "-device".into(),
            "vhost-user-fs-device,chardev=c,tag=t,id=x".into(),
        ])
    };
    let socket = dir.path().join("socket");
    let said = external(&socket);
    let wanted = format!(
        "-chardev id=c {}: cannot connect: No such file or directory (os error 2); a vhost-user daemon must listen there",
        socket.display()
    );
    assert!(said.contains(&wanted), "{said}");
    // Somebody listens who is no vhost-user daemon: it hangs up at once.
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let said = external(&socket);
    thread.join().unwrap();
    assert!(said.contains("device \"x\""), "{said}");
}

/// Linux with what serves the folder: `options` are those of fsdev or chardev and device.
fn linux(script: &str, options: &[String]) -> (VmBuilder, tempfile::NamedTempFile) {
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let initrd = guest.initrd_with(&Script::new(script)).unwrap();
    let builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "256"])
        .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
        .arg("-initrd")
        .arg(initrd.path())
        .args(options);
    (builder, initrd)
}

fn managed(tree: &Path, fsdev: &str, device: &str) -> Vec<String> {
    vec![
        "-fsdev".into(),
        format!("local,id=f,path={}{fsdev}", tree.display()),
        "-device".into(),
        format!("virtio-fs-device,fsdev=f,tag=share,id=fs0{device}"),
    ]
}

/// Reads, writes, renames, links, removes, sets rights and owners; md5 of what was written is left in the folder.
const WORK: &str = "\
set -e
mkdir -p /s
mount -t virtiofs share /s
cd /s
grep -q 'from the host' from-host
dd if=/dev/urandom of=random bs=64k count=64 2>/dev/null
cp random copy
cmp random copy
md5sum random | cut -d' ' -f1 > random.md5
mkdir -p a/b && echo moved > a/b/c && mv a/b/c a/d && ln a/d hard && ln -s a/d soft
[ \"$(cat soft)\" = moved ]
rm -r a/b
umask 0; echo x > open-to-all; umask 077; echo x > closed; umask 022
chown 1234:77 hard && chmod 640 hard
i=0; while [ $i -lt 300 ]; do echo $i > many-$i; i=$((i + 1)); done
[ \"$(ls many-* | wc -l)\" = 300 ]
rm many-*
cd /
umount /s
mount -t virtiofs share /s
[ \"$(cat /s/hard)\" = moved ]
umount /s
";

/// What [`WORK`] has left, seen from the host.
#[track_caller]
fn check_work(tree: &Path) {
    let read = |name: &str| fs::read(tree.join(name)).unwrap();
    let sum = Command::new("md5sum").arg(tree.join("random")).output();
    assert_eq!(sum.unwrap().stdout[..32], read("random.md5")[..32]);
    assert_eq!(read("random").len(), 4 << 20);
    assert_eq!(read("random"), read("copy"));
    let hard = fs::metadata(tree.join("hard")).unwrap();
    assert_eq!((hard.mode() & 0o7777, hard.nlink()), (0o640, 2));
    assert_eq!((hard.uid(), hard.gid()), (1234, 77));
    assert_eq!(fs::read_link(tree.join("soft")).unwrap(), Path::new("a/d"));
    for (name, mode) in [("open-to-all", 0o666), ("closed", 0o600)] {
        let file = fs::metadata(tree.join(name)).unwrap();
        assert_eq!(file.mode() & 0o7777, mode, "{name}");
    }
    assert!(!tree.join("a/b").exists() && !tree.join("many-1").exists());
}

#[test]
fn a_linux_guest_works_in_a_folder_that_the_vm_shares() {
    where_linux_boots(test_path!(), || {
        let (_dir, tree) = tree();
        let options = managed(&tree, ",xattr=on", ",num-request-queues=2");
        let (builder, _initrd) = linux(WORK, &options);
        let mut vm = builder.args(["-smp", "2"]).start().unwrap();
        script_ends_well(&mut vm);
        check_work(&tree);
    });
}

#[test]
fn a_linux_guest_cannot_change_a_readonly_folder() {
    where_linux_boots(test_path!(), || {
        let (_dir, tree) = tree();
        let script = "mkdir -p /s; mount -t virtiofs share /s || exit 1\n\
            cat /s/from-host\n\
            (echo x > /s/new) 2>&1; (echo x >> /s/from-host) 2>&1; rm /s/from-host 2>&1\n\
            mkdir /s/d 2>&1; chmod 777 /s/from-host 2>&1\n\
            [ -e /s/from-host ]";
        let (builder, _initrd) = linux(script, &managed(&tree, ",readonly=on", ""));
        let mut vm = builder.start().unwrap();
        expect(&mut vm, "from the host");
        for _ in 0..5 {
            expect(&mut vm, "Read-only file system");
        }
        script_ends_well(&mut vm);
        assert_eq!(fs::read_dir(&tree).unwrap().count(), 1);
        assert_eq!(
            fs::read_to_string(tree.join("from-host")).unwrap(),
            "from the host\n"
        );
    });
}

#[test]
fn users_of_a_guest_are_others_on_the_host_whichever_process_serves() {
    where_linux_boots(test_path!(), || {
        let (_dir, tree) = tree();
        let script = "mkdir -p /s; mount -t virtiofs share /s || exit 1\n\
            : > /s/roots && mkdir /s/folder && : > /s/given && chown 12:34 /s/given || exit 2\n\
            [ \"$(stat -c %u:%g /s/given)\" = 12:34 ] || exit 3\n\
            chown 70 /s/given 2>&1; echo KILL; read next\n\
            : > /s/later && chown 56 /s/later || exit 4\n\
            [ \"$(stat -c %u:%g /s/given /s/later | tr '\\n' ' ')\" = '12:34 56:0 ' ]";
        let rules =
            ",translate-uid=map:0:100000:60+forbid-guest:60:1000,translate-gid=map:0:200000:1000";
        let (builder, _initrd) = linux(script, &managed(&tree, rules, ""));
        let mut vm = builder.with_qmp().start().unwrap();
        let mut qmp = vm.qmp().unwrap();
        expect(&mut vm, "Operation not permitted");
        expect(&mut vm, "KILL");
        let pid = vm.process("fs").unwrap().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        vm.console.send("go on\n").unwrap();
        script_ends_well(&mut vm);
        let owner = |name: &str| {
            let file = fs::metadata(tree.join(name)).unwrap();
            (file.uid(), file.gid())
        };
        for name in ["roots", "folder"] {
            assert_eq!(owner(name), (100_000, 200_000), "{name}");
        }
        assert_eq!(owner("given"), (100_012, 200_034));
        assert_eq!(owner("later"), (100_056, 200_000));
    });
}

#[test]
fn a_reboot_mounts_the_folder_again() {
    where_linux_boots(test_path!(), || {
        let (_dir, tree) = tree();
        let script = "mkdir -p /s; mount -t virtiofs share /s || exit 1\n\
            echo boot >> /s/boots; sync; echo BOOTS=$(wc -l < /s/boots); read next\n\
            [ \"$next\" = reboot ] && reboot -f\n\
            true";
        let (builder, _initrd) = linux(script, &managed(&tree, "", ""));
        let mut vm = builder.start().unwrap();
        for boot in ["BOOTS=1", "BOOTS=2"] {
            expect(&mut vm, boot);
            vm.console.send("reboot\n").unwrap();
        }
        expect(&mut vm, "BOOTS=3");
        vm.console.send("off\n").unwrap();
        script_ends_well(&mut vm);
    });
}

/// Both daemons serve one VM each, by the manual's words.
fn external(daemon: impl FnOnce(&Path, &Path) -> Daemon) {
    let (dir, tree) = tree();
    let socket = dir.path().join("socket");
    let mut daemon = daemon(&tree, &socket);
    let options = [
        "-chardev".to_owned(),
        format!(
            "socket,id=virtio_fs,path={},server,nowait",
            socket.display()
        ),
        "-device".to_owned(),
        "vhost-user-fs-device,id=fs0,chardev=virtio_fs,tag=share".to_owned(),
    ];
    let (builder, _initrd) = linux(WORK, &options);
    let mut vm = builder.start().unwrap();
    script_ends_well(&mut vm);
    check_work(&tree);
    let ended = daemon.wait(LIMIT);
    assert!(
        ended.is_ok(),
        "the daemon ends with its front end: {ended:?}"
    );
}

fn own_daemon(tree: &Path, socket: &Path) -> Daemon {
    Daemon::sharing(&binary("vhost_user_fs").unwrap(), tree, socket, &[]).unwrap()
}

#[test]
fn our_own_daemon_serves_a_vm_that_did_not_start_it() {
    where_linux_boots(test_path!(), || external(own_daemon));
}

#[test]
fn the_daemon_that_came_with_qemu_serves_a_vm() {
    // Debian 12 is the last release with this one.
    ensure_packages(&["qemu-system-common"]).unwrap();
    where_linux_boots(test_path!(), || {
        external(|tree, socket| {
            let mut command = Command::new("/usr/lib/qemu/virtiofsd");
            command
                .arg(format!("--socket-path={}", socket.display()))
                .arg("-o")
                .arg(format!("source={},sandbox=chroot", tree.display()));
            Daemon::start(&mut command, "Waiting for vhost-user socket connection").unwrap()
        });
    });
}

/// A bare guest that sleeps, beside a folder that whoever listens at `socket` shares.
fn served_by(socket: &Path, device: &str) -> Vm {
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::FirstByte.path(), "")
        .arg("-chardev")
        .arg(format!("socket,id=c,path={}", socket.display()))
        .arg("-device")
        .arg(format!(
            "vhost-user-fs-device,chardev=c,tag=share,id=fs0{device}"
        ))
        .with_qmp()
        .start()
        .unwrap()
}

#[test]
fn a_vm_finds_a_daemon_that_left_and_came_back() {
    require_kvm();
    require_root();
    let (dir, tree) = tree();
    let socket = dir.path().join("socket");
    let daemon = own_daemon(&tree, &socket);
    let vm = served_by(&socket, ",restart=on");
    let mut qmp = vm.qmp().unwrap();
    let mut daemon = Some(daemon);
    for _ in 0..3 {
        drop(daemon.take());
        let gone = qmp.wait_event("DEVICE_CRASHED", LIMIT).unwrap();
        assert_eq!(gone["data"]["device"], "fs0");
        // Somebody listens at the same place who is no daemon and hangs up: that is no reason to give up.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        drop(listener.accept().unwrap());
        drop(listener);
        daemon = Some(own_daemon(&tree, &socket));
        let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        assert_eq!(back["data"]["device"], "fs0");
    }
}

#[test]
fn a_vm_goes_on_without_a_daemon_that_left() {
    require_kvm();
    require_root();
    let (dir, tree) = tree();
    let socket = dir.path().join("socket");
    let daemon = own_daemon(&tree, &socket);
    let vm = served_by(&socket, "");
    let mut qmp = vm.qmp().unwrap();
    drop(daemon);
    let failed = qmp.wait_event("DEVICE_FAILED", LIMIT).unwrap();
    assert_eq!(failed["data"]["device"], "fs0");
    let status = qmp.execute("query-status", serde_json::json!({})).unwrap();
    assert_eq!(status["status"], "running", "{status}");
}

/// Appends numbered lines through a file that stays open, through one that is opened anew each time, and to one that has no
/// name any more, and reads a folder with more entries than one reply holds, until the host makes `stop`.
const HELD: &str = "\
mkdir -p /s
mount -t virtiofs share /s || exit 1
cd /s
mkdir many
i=0; while [ $i -lt 100 ]; do : > many/a-file-with-a-longer-name-$i || exit 1; i=$((i + 1)); done
exec 3>> kept 4> gone
rm gone
echo READY
n=0
while ! [ -e stop ]; do
  n=$((n + 1))
  echo A-$n
  echo line $n >&3 || exit 2
  echo B-$n
  echo line $n >> log || exit 3
  echo C-$n
  echo line $n >&4 || exit 4
  echo D-$n
  [ \"$(find many -type f | sort -u | wc -l)\" = 100 ] || exit 5
done
echo LINES=$n HIDDEN=$(wc -l < /proc/self/fd/4)/$(sort -u /proc/self/fd/4 | wc -l)
";

/// What is there as long as the guest runs.
type Kept = (tempfile::TempDir, tempfile::NamedTempFile);

/// A guest that does [`HELD`] in a folder whose process may be killed at will, started as `how` says.
fn at_work(how: impl FnOnce(VmBuilder) -> VmBuilder) -> (Kept, PathBuf, Vm, Qmp) {
    let (dir, tree) = tree();
    let (builder, initrd) = linux(HELD, &managed(&tree, "", ",max-restarts=1000"));
    let mut vm = how(builder).with_qmp().start().unwrap();
    let qmp = vm.qmp().unwrap();
    expect(&mut vm, "READY");
    ((dir, initrd), tree, vm, qmp)
}

#[test]
fn a_guest_notices_nothing_when_the_process_of_its_folder_is_killed() {
    const KILLS: usize = 12;
    where_linux_boots(test_path!(), || {
        let (_kept, tree, mut vm, mut qmp) = at_work(|builder| builder);
        let keeper = vm.process("fs-keeper").unwrap().unwrap();
        for n in 0..KILLS {
            // At another step of its round each time; how far it gets with it is anybody's guess.
            let step = ["A-", "B-", "C-", "D-"][n % 4];
            expect(&mut vm, step);
            let pid = vm.process("fs").unwrap().unwrap();
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            let crashed = qmp.wait_event("DEVICE_CRASHED", LIMIT).unwrap();
            assert_eq!(crashed["data"]["pid"], pid);
            let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
            assert_eq!(back["data"]["device"], "fs0");
            println!("stall {} ms", back["data"]["stall-ms"]);
        }
        assert_eq!(vm.process("fs-keeper").unwrap(), Some(keeper));
        all_is_written(&mut vm, &tree);
    });
}

/// The guest stops, and each of its lines is there, in each of its files.
#[track_caller]
fn all_is_written(vm: &mut Vm, tree: &Path) {
    fs::write(tree.join("stop"), "").unwrap();
    expect(vm, "LINES=");
    let count: usize = expect(vm, " HIDDEN=").trim().parse().unwrap();
    let hidden = expect(vm, "\n");
    assert_eq!(hidden.trim(), format!("{count}/{count}"));
    script_ends_well(vm);
    let lines: String = (1..=count).map(|n| format!("line {n}\n")).collect();
    for name in ["kept", "log"] {
        let written = fs::read_to_string(tree.join(name)).unwrap();
        assert!(written == lines, "{name}");
    }
}

/// Puts a program in the place of another one, as a package manager does.
fn put(from: &Path, to: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut program = fs::read(from).unwrap();
    change(&mut program);
    let beside = to.with_extension("new");
    fs::write(&beside, program).unwrap();
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&beside, to).unwrap();
}

/// Makes the program one that keeps its tables in another way.
fn lay_out_differently(program: &mut [u8]) {
    const MARK: &[u8] = b"kept tables of a folder, layout ";
    let found: Vec<usize> = program
        .windows(MARK.len())
        .enumerate()
        .filter_map(|(at, window)| (window == MARK).then_some(at))
        .collect();
    let [at] = found[..] else {
        panic!("{} marks", found.len());
    };
    program[at + MARK.len()] ^= 0x40;
}

#[test]
fn another_program_takes_over_what_the_guest_has_open() {
    where_linux_boots(test_path!(), || {
        let programs = tempfile::tempdir().unwrap();
        let at = |name: &str| programs.path().join(name);
        for name in ["stratovirt", "vhost_user_fs"] {
            put(&binary(name).unwrap(), &at(name), |_| {});
        }
        let (_kept, tree, mut vm, mut qmp) = at_work(|builder| builder.program(at("stratovirt")));
        let upgrade = json!({ "id": "fs0" });
        for n in 0..12 {
            let (serving, keeper) = both(&mut vm);
            expect(&mut vm, ["A-", "B-", "C-", "D-"][n % 4]);
            if n % 3 == 2 {
                // Whoever took over keeps as well as the one before.
                kill(Pid::from_raw(serving), Signal::SIGKILL).unwrap();
                qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
                assert_eq!(both(&mut vm).1, keeper);
                continue;
            }
            put(
                &binary("vhost_user_fs").unwrap(),
                &at("vhost_user_fs"),
                |_| {},
            );
            qmp.execute("device-upgrade", upgrade.clone()).unwrap();
            let done = qmp.wait_event("DEVICE_UPGRADED", LIMIT).unwrap();
            println!("asked to served {} ms", done["data"]["stall-ms"]);
            let next = both(&mut vm);
            assert_eq!(done["data"]["pid"], next.0);
            assert!(next.0 != serving && next.1 != keeper, "{next:?}");
            // The broker has reaped the old keeper, and its pid namespace went with it.
            for gone in [serving, keeper] {
                assert!(procfs::Status::of(gone).is_err(), "{gone} is still there");
            }
            let is = |of: &Path| fs::metadata(of).unwrap().ino();
            let runs = PathBuf::from(format!("/proc/{}/exe", next.0));
            assert_eq!(is(&runs), is(&at("vhost_user_fs")));
        }
        // One that keeps its tables in another way, one that is no program, none at all.
        let before = both(&mut vm);
        let mut refused = |said: &str| match qmp.execute("device-upgrade", upgrade.clone()) {
            Err(QmpError::Refused { description, .. }) => {
                assert!(description.contains(said), "{description}");
            }
            other => panic!("{other:?}"),
        };
        put(
            &binary("vhost_user_fs").unwrap(),
            &at("vhost_user_fs"),
            |p| lay_out_differently(p),
        );
        refused("Device 'fs0' goes on with the process that it has: ");
        refused("this program goes on with layout 0x4001");
        put(Path::new("/etc/passwd"), &at("vhost_user_fs"), |_| {});
        refused("");
        fs::remove_file(at("vhost_user_fs")).unwrap();
        refused("device binary vhost_user_fs");
        expect(&mut vm, "A-");
        assert_eq!(both(&mut vm), before);
        all_is_written(&mut vm, &tree);
    });
}

/// Asks for another program of folder `id` and does not wait for the answer, which is that to "upgrade".
fn begin_upgrade(qmp: &mut Qmp, id: &str) {
    let command = json!({ "execute": "device-upgrade", "arguments": { "id": id } });
    qmp.send_raw(&format!("{command}\n")).unwrap();
}

/// What came of it; why it was refused.
#[track_caller]
fn upgraded(qmp: &mut Qmp) -> Result<(), String> {
    let reply = qmp.reply("device-upgrade").unwrap();
    match reply["error"]["desc"].as_str() {
        Some(refused) => Err(refused.to_owned()),
        None => Ok(()),
    }
}

/// The keeper that is on its way beside those in `known`, all of which are children of the broker; `None` once it is none any more.
fn newcomer(broker: i32, known: &[i32], deadline: Deadline) -> Option<i32> {
    while !deadline.left().is_zero() {
        let children = procfs::descendants(broker).unwrap();
        let new = children
            .into_iter()
            .find(|pid| !known.contains(pid) && procfs::parent(*pid).is_ok_and(|p| p == broker));
        if new.is_some() {
            return new;
        }
    }
    None
}

#[test]
fn another_folder_is_cared_for_while_one_is_handed_over() {
    require_kvm();
    require_root();
    let (_dir, tree) = tree();
    let share = |id: &str| {
        let (fsdev, device) = (
            format!("local,id=of-{id},path={}", tree.display()),
            format!("virtio-fs-device,fsdev=of-{id},tag={id},id={id}"),
        );
        ["-fsdev".to_owned(), fsdev, "-device".to_owned(), device]
    };
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::FirstByte.path(), "")
        .args(share("one"))
        .args(share("other"))
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let processes = |id: &str| {
        let mut found: Vec<(String, i32)> = procfs::descendants(vm.pid())
            .unwrap()
            .into_iter()
            // The keeper and what it started have the words that the broker gave them.
            .filter(|pid| procfs::command_line(*pid).is_ok_and(|words| words == ["fs", id]))
            .map(|pid| (procfs::Status::of(pid).unwrap().name().to_owned(), pid))
            .collect();
        found.sort();
        let [(serves, serving), (keeps, keeper)] = &found[..] else {
            panic!("{found:?}");
        };
        assert_eq!((serves.as_str(), keeps.as_str()), ("fs", "fs-keeper"));
        (*serving, *keeper)
    };
    let (before, other) = (processes("one"), processes("other"));
    // One that has what the guest opened and does not say so: the new one waits for it.
    kill(Pid::from_raw(before.1), Signal::SIGSTOP).unwrap();
    begin_upgrade(&mut qmp, "one");
    kill(Pid::from_raw(other.0), Signal::SIGKILL).unwrap();
    let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    assert_eq!(back["data"]["device"], "other");
    // It is the same keeper's, and the hand-over has not ended.
    let again = processes("other");
    assert!(again.0 != other.0 && again.1 == other.1, "{again:?}");
    assert!(procfs::Status::of(before.0).is_ok());
    kill(Pid::from_raw(before.1), Signal::SIGCONT).unwrap();
    upgraded(&mut qmp).unwrap();
    let after = processes("one");
    assert!(after.0 != before.0 && after.1 != before.1, "{after:?}");

    // The one that is to take over is killed while it waits: nothing has changed.
    kill(Pid::from_raw(after.1), Signal::SIGSTOP).unwrap();
    begin_upgrade(&mut qmp, "one");
    let broker = procfs::parent(after.1).unwrap();
    let known = [after.1, again.1];
    let new = newcomer(broker, &known, Deadline::after(LIMIT)).unwrap();
    kill(Pid::from_raw(new), Signal::SIGKILL).unwrap();
    let refused = upgraded(&mut qmp).unwrap_err();
    let wanted = "Device 'one' goes on with the process that it has: ";
    assert!(refused.starts_with(wanted), "{refused}");
    kill(Pid::from_raw(after.1), Signal::SIGCONT).unwrap();
    assert_eq!(processes("one"), after);

    // The one that has everything is killed, and what the guest had open goes with it; a new one begins anew.
    kill(Pid::from_raw(after.1), Signal::SIGSTOP).unwrap();
    begin_upgrade(&mut qmp, "one");
    newcomer(broker, &known, Deadline::after(LIMIT)).unwrap();
    kill(Pid::from_raw(after.1), Signal::SIGKILL).unwrap();
    upgraded(&mut qmp).unwrap_err();
    let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    assert_eq!(back["data"]["device"], "one");
    qmp.execute("device-upgrade", json!({ "id": "one" }))
        .unwrap();
}

#[test]
fn a_guest_loses_nothing_when_a_hand_over_is_broken_off() {
    where_linux_boots(test_path!(), || {
        let (_kept, tree, mut vm, mut qmp) = at_work(|builder| builder);
        for n in 0..12 {
            expect(&mut vm, ["A-", "B-", "C-", "D-"][n % 4]);
            let (serving, keeper) = both(&mut vm);
            let broker = procfs::parent(keeper).unwrap();
            let signal = |pid, signal| kill(Pid::from_raw(pid), signal);
            match n % 3 {
                // The one that is to take over is killed.
                0 => {
                    signal(keeper, Signal::SIGSTOP).unwrap();
                    begin_upgrade(&mut qmp, "fs0");
                    let new = newcomer(broker, &[keeper], Deadline::after(LIMIT)).unwrap();
                    signal(new, Signal::SIGKILL).unwrap();
                    upgraded(&mut qmp).unwrap_err();
                    signal(keeper, Signal::SIGCONT).unwrap();
                    assert_eq!(both(&mut vm), (serving, keeper));
                }
                // The one that serves is, before the hand-over, in it, or after it, which it does not live to see.
                1 => {
                    begin_upgrade(&mut qmp, "fs0");
                    let _ = signal(serving, Signal::SIGKILL);
                    match upgraded(&mut qmp) {
                        Ok(()) => println!("it was taken over from"),
                        Err(refused) => {
                            println!("{refused}");
                            qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
                        }
                    }
                    assert_ne!(both(&mut vm).0, serving);
                }
                // The one that has just taken over is.
                _ => {
                    begin_upgrade(&mut qmp, "fs0");
                    upgraded(&mut qmp).unwrap();
                    let (next, keeper) = both(&mut vm);
                    signal(next, Signal::SIGKILL).unwrap();
                    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
                    assert_eq!(both(&mut vm).1, keeper);
                }
            }
        }
        all_is_written(&mut vm, &tree);
    });
}

/// The process that serves the folder, and its keeper.
#[track_caller]
fn both(vm: &mut Vm) -> (i32, i32) {
    let mut pid = |name| vm.process(name).unwrap().unwrap();
    (pid("fs"), pid("fs-keeper"))
}
