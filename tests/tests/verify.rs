//! # `fio --verify` through every engine and format
//!
//! **Job.** A stock kernel in QEMU, which is the front end, has one disk for each of `aio=off|io_uring|native`, raw and qcow2, with and
//! without `O_DIRECT`: `fio` writes all of each and verifies it in the guest, ranges are discarded or written with zeroes, and the host
//! verifies what the images then have. A few MiB a disk each time; `cargo xtask test verify --long`: 10 GiB in all, or `--mib N`.
//! **Who is not trusted.** The device processes, and our reading of qcow2: `qemu-img` checks, compares and converts.
//! **Why this way.** The first half of a disk has checksums that `fio` finds again on the host, the second half what every disk of the same
//! run must have in common, so that a qcow2 image has a raw twin to be compared with. QEMU emulates the guest, without KVM.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use device_host::test_frontend::DeviceProcess;
use ipc::spec::DeviceSpec;
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes, ImageFormat};
use tests::console::Console;
use tests::host::require_root;
use tests::jail::Jail;
use tests::lab::{Flavour, Guest, Script, ensure_packages, programs};
use tests::qcow2::{create_sized, well};
use tests::vm::binary;
use tests::wait::{Deadline, readable};

/// For the boot, and for a disk of a few MiB.
const LIMIT: Duration = Duration::from_secs(180);
/// MiB of one disk in every day's run: a whole number of all the parts below.
const SHORT: u64 = 4;
/// MiB of all disks of a long run, when nobody says.
const LONG: u64 = 10 << 10;

/// The first half but for its last eighth, in the words that guest and host have in common.
const BIG: &str = "--name=big --rw=randwrite --bs=32k --verify=crc32c --verify_fatal=1 --randrepeat=1 --offset=0 --size=BIGk";
/// That eighth: nothing of it fits a block of the host's file system, a page, or a cluster.
const ODD: &str = "--name=odd --rw=randwrite --bs=3584 --verify=crc32c --verify_fatal=1 --randrepeat=1 --offset=BIGk --size=ODDk";

/// For each disk, in the order of the disks: writes that are verified, then the half that all disks have in common, then a hole in it
/// which is discarded or written with zeroes. All of it goes past the guest's own page cache.
const SCRIPT: &str = r#"
mkdir -p /tools
mount -t ext4 -o ro /dev/disk-tools /tools || exit 11
for disk in DISKS; do
    case $disk in
        *unmap*) hole="--name=hole --stonewall --rw=trim --bs=64k --offset=HOLEk --size=ODDk" ;;
        *) hole= ;;
    esac
    FIO --output=/fio.txt --eta=never --thread --direct=1 --ioengine=libaio --iodepth=16 --filename=/dev/disk-$disk \
        BIGJOB ODDJOB --stonewall \
        --name=same --stonewall --rw=write --bs=128k --verify=pattern --verify_pattern='"same"%o0x5a' --verify_fatal=1 --offset=HALFk --size=HALFk \
        $hole || { cat /fio.txt; exit 12; }
    grep -E 'err=' /fio.txt
    [ -n "$hole" ] || dd if=/dev/zero of=/dev/disk-$disk bs=64k seek=$((HOLE/64)) count=$((ODD/64)) oflag=direct 2>/dev/null || exit 13
    dd if=/dev/disk-$disk bs=64k skip=$((HOLE/64)) count=$((ODD/64)) iflag=direct 2>/dev/null | tr -d '\0' | head -c 1 > /left
    [ -s /left ] && exit 14
    echo VERIFIED $disk
done
echo ALL-VERIFIED
"#;

/// One combination.
struct Disk {
    /// Also the serial number, by which the guest knows it.
    name: String,
    path: PathBuf,
    spec: BlockSpec,
}

impl Disk {
    fn is_qcow2(&self) -> bool {
        self.spec.io.format != ImageFormat::Raw
    }
}

/// All of them, their images made.
fn disks(dir: &Path, mib: u64) -> Vec<Disk> {
    let mut disks = Vec::new();
    for qcow2 in [false, true] {
        for (aio, detect_zeroes, name) in [
            (Aio::Off, DetectZeroes::Off, "off"),
            (Aio::IoUring, DetectZeroes::On, "uring"),
            (Aio::Native, DetectZeroes::Unmap, "native-unmap"),
        ] {
            for direct in [false, true] {
                let name = format!(
                    "{}-{name}-{}",
                    if qcow2 { "q" } else { "r" },
                    if direct { "d" } else { "c" }
                );
                let path = if qcow2 {
                    create_sized(dir, &name, &[], &format!("{mib}M"))
                } else {
                    let path = dir.join(&name);
                    File::create(&path).unwrap().set_len(mib << 20).unwrap();
                    path
                };
                let format = if qcow2 {
                    ImageFormat::Qcow2 {
                        below: 0,
                        raw_base: false,
                        most: u64::MAX,
                    }
                } else {
                    ImageFormat::Raw
                };
                disks.push(Disk {
                    spec: BlockSpec {
                        id: name.clone(),
                        readonly: false,
                        direct,
                        serial: name.clone(),
                        num_queues: 2,
                        queue_size: 128,
                        io: BlockIo {
                            aio,
                            detect_zeroes,
                            discard: detect_zeroes == DetectZeroes::Unmap,
                            format,
                            ..BlockIo::default()
                        },
                    },
                    name,
                    path,
                });
            }
        }
    }
    disks
}

/// The parts of a disk of so many MiB, in KiB, put into `text`.
fn filled(text: &str, mib: u64) -> String {
    let half = mib << 9;
    // Of 64 KiB, and of 7 sectors as well.
    let odd = (half / 8).next_multiple_of(448);
    let parts = [
        ("BIGk", format!("{}k", half - odd)),
        ("ODDk", format!("{odd}k")),
        ("ODD/", format!("{odd}/")),
        ("HALFk", format!("{half}k")),
        ("HOLEk", format!("{}k", half + odd)),
        ("HOLE/", format!("{}/", half + odd)),
    ];
    let fill = |text: String, (name, value): &(&str, String)| text.replace(name, value);
    parts.iter().fold(text.to_owned(), fill)
}

fn script(disks: &[Disk], mib: u64) -> Script {
    let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
    let text = SCRIPT
        .replace("DISKS", &names.join(" "))
        .replace("BIGJOB", BIG)
        .replace("ODDJOB", ODD)
        .replace("FIO", &programs::command("/tools", "fio"));
    let names =
        "for at in /sys/block/vd*; do ln -s $(basename $at) /dev/disk-$(cat $at/serial); done\n";
    Script::new(&format!("{names}{}", filled(&text, mib)))
}

/// QEMU with these sockets as its disks.
fn qemu(guest: &Guest, initrd: &Path, sockets: &[PathBuf]) -> Child {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35"])
        .args(["-m", "512", "-smp", "2"])
        .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
        .args(["-numa", "node,memdev=ram", "-nodefaults", "-nographic"])
        .args(["-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&guest.kernel.bzimage)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 quiet no_timer_check"])
        .arg("-drive")
        .arg(format!(
            "if=none,id=t,format=raw,readonly=on,file={}",
            programs::image("fio").unwrap().display()
        ))
        .args(["-device", "virtio-blk-pci,drive=t,serial=tools"]);
    for (number, path) in sockets.iter().enumerate() {
        qemu.arg("-chardev")
            .arg(format!("socket,id=c{number},path={}", path.display()))
            .arg("-device")
            .arg(format!("vhost-user-blk-pci,chardev=c{number},num-queues=2"));
    }
    qemu.stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The process that serves a disk, for the front end that connects to `listener`.
fn serve(disk: &Disk, listener: &UnixListener) -> DeviceProcess {
    let ready = readable(&[listener.as_fd()], Deadline::after(LIMIT)).unwrap();
    assert!(ready.is_some(), "QEMU did not connect for {}", disk.name);
    let image = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if disk.spec.direct { libc::O_DIRECT } else { 0 })
        .open(&disk.path)
        .unwrap();
    let program = if disk.is_qcow2() {
        "block-qcow2"
    } else {
        "block"
    };
    DeviceProcess::start_on(
        &binary(program).unwrap().display().to_string(),
        DeviceSpec::Block(disk.spec.clone()),
        vec![image.into()],
        listener.accept().unwrap().0,
    )
}

/// Whether the process has the engine that its disk is to be served by.
fn has_its_engine(disk: &Disk, process: &DeviceProcess) {
    let jail = Jail::of(process.id().cast_signed()).unwrap();
    let has = jail.fds.values().any(|fd| fd.kind() == "io_uring");
    let wanted = !disk.is_qcow2() && disk.spec.io.aio != Aio::Off;
    assert_eq!(has, wanted, "{}: {jail:?}", disk.name);
}

/// What `fio` says of the first half of a raw image.
fn verify_here(image: &Path, name: &str, mib: u64) {
    for job in [BIG, ODD] {
        let output = Command::new("fio")
            .args(filled(job, mib).split(' '))
            .args(["--thread", "--ioengine=psync", "--verify_only=1"])
            .arg(format!("--filename={}", image.display()))
            // Where it leaves what it knows of a failure.
            .current_dir(image.parent().unwrap())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {told}{output:?}");
        assert!(told.contains("err= 0"), "{name}: {told}");
        // One that had read nothing would have found nothing wrong.
        assert!(!told.contains("issued rwts: total=0,"), "{name}: {told}");
    }
}

/// `qemu-img compare` of the second half of an image with that of its raw twin.
fn is_like(disk: &Disk, twin: &Disk, mib: u64) {
    let half = mib << 19;
    let part = |disk: &Disk| {
        let file = format!("file.driver=file,file.filename={}", disk.path.display());
        let inner = if disk.is_qcow2() {
            format!(
                "file.driver=qcow2,file.{}",
                file.replace(",file", ",file.file")
            )
        } else {
            file
        };
        format!("driver=raw,offset={half},size={half},{inner}")
    };
    let output = Command::new("qemu-img")
        .args(["compare", "--image-opts", &part(disk), &part(twin)])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{} and {}: {output:?}",
        disk.name,
        twin.name
    );
}

/// The images, once nobody has them any more.
fn judge(dir: &Path, disks: &[Disk], mib: u64) {
    for disk in disks {
        is_like(disk, &disks[0], mib);
        if disk.is_qcow2() {
            well(&["check", "-q", "-f", "qcow2"], &[&disk.path]);
            let raw = dir.join("converted");
            well(
                &["convert", "-f", "qcow2", "-O", "raw"],
                &[&disk.path, &raw],
            );
            verify_here(&raw, &disk.name, mib);
            std::fs::remove_file(&raw).unwrap();
        } else {
            verify_here(&disk.path, &disk.name, mib);
        }
    }
}

/// `mib` of each disk: a multiple of [`SHORT`].
fn verify(mib: u64, limit: Duration) {
    require_root();
    ensure_packages(&["qemu-system-x86", "qemu-utils", "fio"]).unwrap();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disks = disks(dir.path(), mib);
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let initrd = guest.initrd_with(&script(&disks, mib)).unwrap();
    let sockets: Vec<PathBuf> = disks
        .iter()
        .map(|disk| dir.path().join(format!("{}.sock", disk.name)))
        .collect();
    let listeners: Vec<UnixListener> = sockets
        .iter()
        .map(|path| UnixListener::bind(path).unwrap())
        .collect();
    let mut qemu = qemu(&guest, initrd.path(), &sockets);
    // QEMU asks one back end after the other.
    let processes: Vec<DeviceProcess> = disks
        .iter()
        .zip(&listeners)
        .map(|(disk, listener)| serve(disk, listener))
        .collect();
    let mut console = Console::new(OwnedFd::from(qemu.stdout.take().unwrap()), None);
    let mut since = Instant::now();
    for (disk, process) in disks.iter().zip(&processes) {
        let said = console.wait_for(&format!("VERIFIED {}\r", disk.name), limit);
        let said = match said {
            Ok(said) => said,
            Err(error) => {
                let _ = qemu.kill();
                panic!("{}: {error}", disk.name);
            }
        };
        let jobs = 3 + usize::from(disk.spec.io.discard);
        assert_eq!(
            said.matches("err= 0").count(),
            jobs,
            "{}: {said}",
            disk.name
        );
        has_its_engine(disk, process);
        println!(
            "{:<16} {mib} MiB written and verified in {:.1} s",
            disk.name,
            since.elapsed().as_secs_f64()
        );
        since = Instant::now();
    }
    console.wait_for("ALL-VERIFIED", LIMIT).unwrap();
    console.wait_end(LIMIT).unwrap();
    assert!(qemu.wait().unwrap().success());
    for process in processes {
        process.finish_well();
    }
    judge(dir.path(), &disks, mib);
    println!(
        "verified on the host in {:.1} s",
        since.elapsed().as_secs_f64()
    );
}

#[test]
fn fio_verifies_every_engine_and_format() {
    verify(SHORT, LIMIT);
}

#[test]
#[ignore = "writes and verifies 10 GiB: run by `cargo xtask test verify --long`, with `--mib N` for as many in all"]
fn fio_verifies_ten_gigabytes() {
    let all = std::env::var("VERIFY_MIB").map_or(LONG, |text| text.parse().unwrap());
    let mib = (all / 12).next_multiple_of(SHORT);
    verify(mib, LIMIT + Duration::from_secs(mib * 2));
}
