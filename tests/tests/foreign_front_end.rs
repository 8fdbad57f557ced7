//! # Our device processes behind a front end that nobody here wrote
//!
//! **Job.** QEMU in pure emulation boots Debian's kernel with our `block` and `net` processes as its vhost-user back ends: the
//! guest reads and writes the disk and pings the host. No KVM is needed. Once as a broker would start them, and once as a person
//! does: `block --socket-path` and `net --socket-path`, whose serving process is killed while the guest works.
//! **Who is not trusted.** The device processes, which are under test with their filters on.
//! **Why this way.** Our own front end and our back end could share a misreading of the specification; QEMU does not share it.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use device_host::test_frontend::DeviceProcess;
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use ipc::spec::net::NetSpec;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;
use tests::console::Console;
use tests::daemon::with_descriptors_of_other_kinds;
use tests::host::{Tap, require_root};
use tests::jail::{Jail, NAMESPACES};
use tests::lab::{Flavour, Guest, Script, ensure_packages};
use tests::vm::binary;
use tests::wait::{Deadline, Watched, readable};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// The front end's connection, once it is there.
fn accept(listener: &UnixListener) -> UnixStream {
    let ready = readable(&[listener.as_fd()], Deadline::after(LIMIT)).unwrap();
    assert!(ready.is_some(), "QEMU did not connect");
    listener.accept().unwrap().0
}

fn device(name: &str) -> String {
    binary(name).unwrap().display().to_string()
}

fn digest(path: &Path, skip: u64, count: u64) -> String {
    let mut bytes = vec![0; (count * MIB) as usize];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, skip * MIB)
        .unwrap();
    let part = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(part.path(), bytes).unwrap();
    let output = Command::new("md5sum").arg(part.path()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

/// QEMU with the guest, without any device yet.
fn qemu(guest: &Guest, initrd: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-M", "q35"])
        .args(["-m", "512", "-smp", "2"])
        .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
        .args(["-numa", "node,memdev=ram", "-nodefaults", "-nographic"])
        .args(["-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&guest.kernel.bzimage)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 quiet no_timer_check"]);
    qemu
}

#[test]
fn qemu_drives_block_and_net() {
    require_root();
    ensure_packages(&["qemu-system-x86"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tap = Tap::new("svforeign0", "10.7.99.1/24").unwrap();
    let image = dir.path().join("disk.img");
    let mut pattern = vec![0; 4 * MIB as usize];
    std::io::Read::read_exact(&mut File::open("/dev/urandom").unwrap(), &mut pattern).unwrap();
    let file = File::create(&image).unwrap();
    file.set_len(16 * MIB).unwrap();
    file.write_all_at(&pattern, 0).unwrap();

    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let script = Script::new(
        "set -e\n\
         echo SERIAL $(cat /sys/block/vda/serial)\n\
         echo READ $(dd if=/dev/vda bs=1M count=4 2>/dev/null | md5sum)\n\
         dd if=/dev/urandom of=/data bs=1M count=4 2>/dev/null\n\
         dd if=/data of=/dev/vda bs=1M seek=8 conv=fsync 2>/dev/null\n\
         echo WROTE $(md5sum < /data)\n\
         ifconfig eth0 10.7.99.2 up\n\
         ping -c 3 -s 1400 10.7.99.1\n\
         echo ALL-DONE\n",
    );
    let initrd = guest.initrd_with(&script).unwrap();
    let sockets = ["blk", "net"].map(|name| dir.path().join(name));
    let listeners = sockets
        .each_ref()
        .map(|path| UnixListener::bind(path).unwrap());
    let chardev =
        |index: usize, id: &str| format!("socket,id={id},path={}", sockets[index].display());
    // Without MSI-X for the card: QEMU 7.2 crashes when it sets its vectors up for a vhost-user card without KVM.
    let mut qemu = qemu(&guest, initrd.path())
        .args(["-chardev", &chardev(0, "c0")])
        .args(["-device", "vhost-user-blk-pci,chardev=c0,num-queues=2"])
        .args(["-chardev", &chardev(1, "c1")])
        .args(["-netdev", "vhost-user,id=n0,chardev=c1"])
        .args([
            "-device",
            "virtio-net-pci,netdev=n0,mac=52:54:00:00:63:02,vectors=0",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();

    // QEMU asks one back end after the other.
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let block = DeviceProcess::start_on(
        &device("block"),
        DeviceSpec::Block(BlockSpec {
            id: "disk".into(),
            readonly: false,
            direct: false,
            serial: "foreign".into(),
            num_queues: 2,
            queue_size: 128,
            io: Default::default(),
        }),
        vec![open.into()],
        accept(&listeners[0]),
    );
    let net = DeviceProcess::start_on(
        &device("net"),
        DeviceSpec::Net(NetSpec {
            id: "card".into(),
            mac: [0x52, 0x54, 0, 0, 0x63, 2],
            queue_pairs: 1,
            queue_size: 256,
            control_queue: true,
            vhost: false,
            limits: Default::default(),
            stands_in: None,
            poll_us: 0,
        }),
        vec![tap.queue().unwrap()],
        accept(&listeners[1]),
    );

    let output = qemu.stdout.take().unwrap();
    let text = std::thread::spawn(move || std::io::read_to_string(output).unwrap());
    // The guest powers off by itself; QEMU's end closes the pipe.
    let watched = Watched::new(qemu.id() as i32).unwrap();
    if !watched.ended(Deadline::after(LIMIT)).unwrap() {
        qemu.kill().unwrap();
    }
    let qemu_status = qemu.wait().unwrap();
    let text = text.join().unwrap();
    let (block_status, block_log) = block.finish();
    let (net_status, net_log) = net.finish();
    let all = format!(
        "{text}\nQEMU: {qemu_status}\nblock: {block_status} {block_log}\nnet: {net_status} {net_log}"
    );
    assert!(text.contains("ALL-DONE"), "{all}");
    assert!(text.contains("SERIAL foreign"), "{all}");
    assert!(
        text.contains(&format!("READ {}", digest(&image, 0, 4))),
        "{all}"
    );
    assert!(
        text.contains(&format!("WROTE {}", digest(&image, 8, 4))),
        "{all}"
    );
    assert!(text.contains("3 packets received"), "{all}");
    assert!(block_status.success() && net_status.success(), "{all}");
}

/// A stand-alone `block` or `net`, which is killed if the test does not get that far.
struct Alone {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Alone {
    /// Returns once it listens.
    fn start(image: &Path, socket: &Path, more: &[&str]) -> Self {
        let mut command = Command::new(binary("block").unwrap());
        command.arg("--file").arg(image).args(more);
        Self::listening(command, socket)
    }

    fn listening(mut command: Command, socket: &Path) -> Self {
        let mut child = command
            .arg("--socket-path")
            .arg(socket)
            .args(["--log-level", "info"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut alone = Self { child, log };
        alone.log_until("listening");
        alone
    }

    /// Reads the log up to a line with `text` in it, and returns that.
    fn log_until(&mut self, text: &str) -> String {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(
                self.log.read_line(&mut line).unwrap() > 0,
                "it ended before it said {text:?}"
            );
        }
        line
    }

    /// The end of its story, for whoever did not see what was wanted.
    fn rest(&mut self) -> String {
        let _ = self.child.kill();
        let mut rest = String::new();
        let _ = std::io::Read::read_to_string(&mut self.log, &mut rest);
        rest
    }

    /// The process that serves the front end that came last.
    fn serving(&mut self) -> i32 {
        let line = self.log_until("serving a front end, process ");
        line.trim_end().rsplit(' ').next().unwrap().parse().unwrap()
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As much as for a device's process that a broker started. `back_ends` are what it has from descriptor 4 on.
fn is_jailed_with(pid: i32, back_ends: &[&str]) {
    let jail = Jail::of(pid).unwrap();
    assert_eq!(jail.own_namespaces, NAMESPACES, "{jail:?}");
    assert_eq!((jail.uid, jail.no_new_privs), (65534, true), "{jail:?}");
    assert_eq!(jail.capabilities, [0; 5], "{jail:?}");
    assert!(jail.read_only_root && jail.root.is_empty(), "{jail:?}");
    assert!(jail.threads.iter().all(|(_, mode)| *mode == 2), "{jail:?}");
    let want = [&["pipe", "pipe", "pipe", "socket"][..], back_ends].concat();
    let count = want.len() as i32;
    let kinds: Vec<&str> = (0..count).map(|fd| jail.fds[&fd].kind()).collect();
    assert_eq!(kinds, want, "{jail:?}");
    let others: BTreeSet<&str> = jail.fds.range(count..).map(|(_, fd)| fd.kind()).collect();
    assert_eq!(others, BTreeSet::from(["eventfd", "memfd"]), "{jail:?}");
}

fn is_jailed(pid: i32, image: &Path) {
    is_jailed_with(pid, &["io_uring", image.to_str().unwrap(), "eventpoll"]);
}

#[test]
fn qemu_drives_a_stand_alone_block_whose_process_is_killed() {
    require_root();
    ensure_packages(&["qemu-system-x86"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("disk.img"), dir.path().join("disk.sock"));
    let file = File::create(&image).unwrap();
    file.set_len(32 * MIB).unwrap();
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    // The last sector is where the host says that the process is gone: from then on, the guest's reads are another one's.
    let script = Script::new(
        "set -e\n\
         dd if=/dev/urandom of=/data bs=1M count=4 2>/dev/null\n\
         dd if=/data of=/dev/vda bs=1M conv=fsync 2>/dev/null\n\
         echo SERIAL $(cat /sys/block/vda/serial) RO $(cat /sys/block/vda/ro)\n\
         echo FIRST-PART\n\
         says() { dd if=/dev/vda bs=512 skip=65535 count=1 2>/dev/null | grep -q $1; }\n\
         until says gone; do echo 1 > /proc/sys/vm/drop_caches; done\n\
         echo SECOND-PART\n\
         until says done; do echo 1 > /proc/sys/vm/drop_caches; done\n\
         dd if=/data of=/dev/vda bs=1M seek=8 conv=fsync 2>/dev/null\n\
         echo 1 > /proc/sys/vm/drop_caches\n\
         echo READ $(dd if=/dev/vda bs=1M count=4 2>/dev/null | md5sum)\n\
         echo WROTE $(md5sum < /data)\n\
         echo ALL-DONE\n",
    );
    let initrd = guest.initrd_with(&script).unwrap();
    let mut block = Alone::start(&image, &socket, &["--serial=alone-1", "--aio=io_uring"]);

    let chardev = format!("socket,id=c0,path={},reconnect=1", socket.display());
    let mut qemu = qemu(&guest, initrd.path())
        .args(["-chardev", &chardev])
        .args(["-device", "vhost-user-blk-pci,chardev=c0,num-queues=2"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut console = Console::new(OwnedFd::from(qemu.stdout.take().unwrap()), None);
    let first = block.serving();
    let before = console.wait_for("FIRST-PART", LIMIT).unwrap();
    assert!(before.contains("SERIAL alone-1 RO 0"), "{before}");
    is_jailed(first, &image);
    let outside = Jail::of(block.child.id().cast_signed()).unwrap();
    let mapping = 1 << 6 | 1 << 7;
    assert_eq!(outside.capabilities.map(|set| set & !mapping), [0; 5]);
    assert!(outside.no_new_privs);

    let watched = Watched::new(first).unwrap();
    nix::sys::signal::kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
    file.write_all_at(b"gone", 32 * MIB - 512).unwrap();
    let second = block.serving();
    assert_ne!(first, second);
    // It has served a read by then, and the guest does not end before it is told to.
    console.wait_for("SECOND-PART", LIMIT).unwrap();
    is_jailed(second, &image);
    file.write_all_at(b"done", 32 * MIB - 512).unwrap();
    let after = console.wait_for("ALL-DONE", LIMIT).unwrap();
    let wrote = after.split("WROTE ").nth(1).unwrap()[..32].to_owned();
    assert_eq!(digest(&image, 0, 4), wrote, "before the kill");
    assert_eq!(digest(&image, 8, 4), wrote, "after it");
    assert!(after.contains(&format!("READ {wrote}")), "{after}");
    console.wait_end(LIMIT).unwrap();
    assert!(qemu.wait().unwrap().success());
    assert!(block.child.wait().unwrap().success());
    assert!(!socket.exists(), "the socket is gone with the program");
}

#[test]
fn qemu_drives_a_stand_alone_net_whose_process_is_killed() {
    require_root();
    ensure_packages(&["qemu-system-x86"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("net.sock");
    let tap = Tap::of_queues("svalone0", "10.7.97.1/24").unwrap();
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    // The other addresses are the host's as soon as the next process is there.
    let script = Script::new(
        "set -e\n\
         ifconfig eth0 10.7.97.2 up\n\
         ping -c 3 -s 1400 10.7.97.1\n\
         echo PAIRS $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)\n\
         echo FIRST-PART\n\
         until ping -c 1 -W 1 10.7.97.9 > /dev/null 2>&1; do :; done\n\
         echo SECOND-PART\n\
         ping -c 3 -s 1400 10.7.97.1\n\
         until ping -c 1 -W 1 10.7.97.10 > /dev/null 2>&1; do :; done\n\
         echo ALL-DONE\n",
    );
    let initrd = guest.initrd_with(&script).unwrap();
    let mut command = Command::new(binary("net").unwrap());
    command.args(["--tap", &tap.name, "--queues=2"]);
    let mut net = Alone::listening(command, &socket);

    let chardev = format!("socket,id=c0,path={},reconnect=1", socket.display());
    let mut qemu = qemu(&guest, initrd.path())
        .args(["-chardev", &chardev])
        .args(["-netdev", "vhost-user,id=n0,chardev=c0,queues=2", "-device"])
        // As above.
        .arg("virtio-net-pci,netdev=n0,mac=52:54:00:00:61:02,mq=on,vectors=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut console = Console::new(OwnedFd::from(qemu.stdout.take().unwrap()), None);
    let seen = |console: &mut Console, net: &mut Alone, text| match console.wait_for(text, LIMIT) {
        Ok(before) => before,
        Err(error) => panic!("{error}\nnet: {}", net.rest()),
    };
    let first = net.serving();
    let before = seen(&mut console, &mut net, "FIRST-PART");
    assert!(before.contains("3 packets received"), "{before}");
    assert!(before.contains("PAIRS 2"), "{before}");
    let back_ends = ["eventpoll", "/dev/net/tun", "/dev/net/tun"];
    is_jailed_with(first, &back_ends);

    let watched = Watched::new(first).unwrap();
    nix::sys::signal::kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
    let second = net.serving();
    assert_ne!(first, second);
    tap.add_address("10.7.97.9/24").unwrap();
    seen(&mut console, &mut net, "SECOND-PART");
    is_jailed_with(second, &back_ends);
    tap.add_address("10.7.97.10/24").unwrap();
    let after = seen(&mut console, &mut net, "ALL-DONE");
    assert!(after.contains("3 packets received"), "{after}");
    console.wait_end(LIMIT).unwrap();
    assert!(qemu.wait().unwrap().success());
    assert!(net.child.wait().unwrap().success());
    assert!(!socket.exists(), "the socket is gone with the program");
}

#[test]
fn what_a_stand_alone_net_cannot_open_is_told() {
    require_root();
    let tap = Tap::new("svalone1", "10.7.96.1/24").unwrap();
    let said = |words: &[&str]| {
        let output = Command::new(binary("net").unwrap())
            .args(words)
            .args(["--socket-path", "/nowhere/net.sock"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let text = said(&["--tap", "svnone0"]);
    let wanted = "net: --tap svnone0: no such network interface; make it with: ip tuntap add";
    assert!(text.contains(wanted), "{text}");
    let text = said(&["--tap", "lo"]);
    assert!(text.contains("--tap lo: not a tap device"), "{text}");
    let text = said(&["--tap", &tap.name, "--queues=2"]);
    assert!(text.contains("cannot attach 2 queues"), "{text}");
    let _taken = tap.queue().unwrap();
    let text = said(&["--tap", &tap.name]);
    assert!(text.contains("is in use by another process"), "{text}");
}

#[test]
fn a_stand_alone_block_that_is_told_to_end_leaves_nothing() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("disk.img"), dir.path().join("disk.sock"));
    File::create(&image).unwrap().set_len(MIB).unwrap();
    let mut block = Alone::start(&image, &socket, &["--keep"]);
    // A front end that leaves, and one that stays.
    drop(UnixStream::connect(&socket).unwrap());
    let first = block.serving();
    block.log_until("the front end left");
    let front_end = UnixStream::connect(&socket).unwrap();
    let second = block.serving();
    assert_ne!(first, second);
    // Another program may not have the image meanwhile, nor the socket.
    let other = |image: &Path, socket: &Path| {
        let output = Command::new(binary("block").unwrap())
            .arg("--file")
            .arg(image)
            .arg("--socket-path")
            .arg(socket)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = other(&image, &dir.path().join("other.sock"));
    assert!(
        said.contains("another process holds a lock on this image"),
        "{said}"
    );
    let free = dir.path().join("free.img");
    File::create(&free).unwrap();
    let said = other(&free, &socket);
    assert!(said.contains("another process listens there"), "{said}");

    let watched = Watched::new(second).unwrap();
    nix::sys::signal::kill(
        Pid::from_raw(block.child.id().cast_signed()),
        Signal::SIGTERM,
    )
    .unwrap();
    assert!(block.child.wait().unwrap().success());
    // It was ended before the program did.
    assert!(watched.ended(Deadline::after(Duration::ZERO)).unwrap());
    assert!(!socket.exists());
    drop(front_end);
}

#[test]
fn a_stand_alone_block_takes_no_descriptor_but_a_unix_stream() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let words = ["--fd", "3", "--file"].map(OsStr::new);
    let words = [&words[..], &[image.path().as_os_str()]].concat();
    let tried = with_descriptors_of_other_kinds(&binary("block").unwrap(), &words).unwrap();
    for (what, status, said) in tried {
        assert_eq!(status, Some(1), "{what}: {said}");
        let expected = "--fd 3: not an open unix stream socket";
        assert!(said.contains(expected), "{what}: {said}");
    }
}
