//! # Our device processes behind a front end that nobody here wrote
//!
//! **Job.** QEMU in pure emulation boots Debian's kernel with our `block` and `net` processes as its vhost-user back ends: the
//! guest reads and writes the disk and pings the host. No KVM is needed.
//! **Who is not trusted.** The device processes, which are under test with their filters on.
//! **Why this way.** Our own front end and our back end could share a misreading of the specification; QEMU does not share it.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use device_host::test_frontend::DeviceProcess;
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use ipc::spec::net::NetSpec;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tests::host::{Tap, require_root};
use tests::lab::{Flavour, Guest, Script, ensure_packages};
use tests::vm::binary;
use tests::wait::{Deadline, readable};

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
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            "tcg,thread=multi",
            "-M",
            "q35",
            "-m",
            "512",
            "-smp",
            "2",
        ])
        .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
        .args([
            "-numa",
            "node,memdev=ram",
            "-nodefaults",
            "-nographic",
            "-no-reboot",
        ])
        .args(["-serial", "stdio"])
        .arg("-kernel")
        .arg(&guest.kernel.bzimage)
        .arg("-initrd")
        .arg(initrd.path())
        .args(["-append", "console=ttyS0 quiet no_timer_check"])
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
        }),
        vec![tap.queue().unwrap()],
        accept(&listeners[1]),
    );

    let output = qemu.stdout.take().unwrap();
    let text = std::thread::spawn(move || std::io::read_to_string(output).unwrap());
    // The guest powers off by itself; QEMU's end closes the pipe.
    let watched = tests::wait::Watched::new(qemu.id() as i32).unwrap();
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
