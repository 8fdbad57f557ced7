//! # A Linux guest at work whose device processes are killed all the time
//!
//! **Job.** Debian's stock kernel with `fio --verify` on two disks, a tree that is written and verified in a shared folder, and a
//! TCP stream that the host sends back, while one device process after the other is killed, 50 to 500 ms apart: the guest must
//! see no error and every checksum must be right, in the guest and on the host. `cargo xtask test soak --long`, for half a minute,
//! or with `--minutes N` for as many. **Who is not trusted.** The VMM.
//! **Why this way.** Who dies when follows from a seed that is printed, and that `--seed N` sets; the programs that verify are the
//! distribution's. `fio` itself lies on a third disk, whose process dies like the others.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::chance::Chance;
use tests::host::Tap;
use tests::lab::{Flavour, Guest, Nested, Script, programs, where_linux_boots_or_in};
use tests::qmp::Qmp;
use tests::test_path;
use tests::vm::Vm;
use tests::wait::{Deadline, accept, readable};

/// For one step of a guest that is two emulations deep on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);
/// How long fio runs when nobody says.
const DEFAULT: Duration = Duration::from_secs(30);

const FOLDER: &str = "share";
/// The devices whose processes are killed.
const DEVICES: [&str; 5] = ["disk0", "disk1", "tools", "card", FOLDER];

/// What both sides of the last pass over a disk have in common: the guest writes with it, the host verifies.
const LAST_PASS: &str =
    "--name=last --rw=write --bs=16k --size=2m --verify=crc32c --verify_fatal=1 --randrepeat=1";

/// `SECONDS`, `FIO` and `LAST` are filled in. Each load leaves its outcome on the console, and the word that is waited for.
const SCRIPT: &str = r#"
mkdir -p /tools /s
ip addr add 10.7.51.2/24 dev eth0
ip link set eth0 up
until ping -c 1 -W 2 10.7.51.1 > /dev/null; do :; done
mount -t ext4 -o ro /dev/vdc /tools || exit 11
mount -t virtiofs share /s || exit 12

# The card: what is sent comes back.
mkfifo /sent
md5sum < /sent > /sent-sum & sums=$!
(until [ -e /stop ]; do dd if=/dev/urandom bs=16k count=8 2>/dev/null; usleep 20000; done) |
    tee /sent | nc 10.7.51.1 5000 | md5sum > /back-sum & stream=$!

# The folder: a tree that is made, changed, read back without what the guest remembers of it, and removed.
tree() {
    set -e
    n=0
    until [ -e /stop ]; do
        t=/s/tree
        rm -rf $t; mkdir $t $t/a $t/a/b $t/c
        for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=$t/a/b/f$i bs=7k count=$i 2>/dev/null; done
        mv $t/a/b/f1 $t/c/moved; ln $t/a/b/f2 $t/c/hard; ln -s ../a/b/f3 $t/c/soft
        rm $t/a/b/f4; echo appended >> $t/a/b/f5; mv $t/a/b $t/c/b
        (cd $t; find . -type f | sort | xargs md5sum) > /tree-sums
        cp /tree-sums $t/sums
        [ $(wc -l < /tree-sums) = 6 ]
        sync; echo 3 > /proc/sys/vm/drop_caches
        (cd $t; md5sum -c sums > /tree-told 2>&1) || { cat /tree-told; exit 1; }
        [ "$(readlink $t/c/soft)" = ../a/b/f3 ]
        n=$((n+1)); echo $n > /tree-rounds
    done
}
(tree) & tree=$!

# The disks.
FIO --output=/fio.txt --eta=never --thread --direct=1 --verify=crc32c --verify_fatal=1 --time_based --runtime=SECONDS --size=48m \
    --name=deep --filename=/dev/vda --ioengine=libaio --iodepth=16 --rw=randrw --bs=8k --verify_backlog=64 \
    --name=durable --filename=/dev/vdb --ioengine=psync --rw=randwrite --bs=4k --fsync=32 --verify_backlog=32 & fio=$!
for disk in vda vdb; do
    # The fifth number is of writes that were done.
    until [ $(awk '{ print $5 }' /sys/block/$disk/stat) -gt 20 ]; do
        [ -e /proc/$fio ] || { cat /fio.txt; exit 13; }
        usleep 50000
    done
done
until [ -e /tree-rounds ]; do [ -e /proc/$tree ] || exit 14; usleep 50000; done
echo ALL-AT-WORK
wait $fio; echo FIO-STATUS $?
grep -E 'err=|read:|write:|issued' /fio.txt
for disk in vda vdb; do
    FIO --output=/last.txt --eta=never --thread --direct=1 --ioengine=libaio --iodepth=16 --filename=/dev/$disk --do_verify=0 --end_fsync=1 LAST
    echo LAST-STATUS $?
done
touch /stop
wait $tree; echo TREE-STATUS $? ROUNDS $(cat /tree-rounds)
wait $stream; wait $sums
echo SENT $(cut -d' ' -f1 /sent-sum)
echo BACK $(cut -d' ' -f1 /back-sum)
umount /s || exit 15
dmesg > /dmesg
grep -i -E 'I/O error|Buffer I/O|EXT4-fs (error|warning)|blocked for more|BUG:|Oops|virtio.*(error|fail|reset)|virtiofs.*(err|fail)|NETDEV WATCHDOG|fuse.*err' /dmesg
echo ERRORS-ABOVE
cat /proc/net/snmp | grep Tcp:
"#;

#[test]
#[ignore = "takes minutes: run by `cargo xtask test soak --long`, with `--minutes N` for as long"]
fn a_linux_guest_at_work_notices_no_death_of_a_device_process() {
    let length = match std::env::var("RECOVERY_MINUTES") {
        Ok(minutes) => Duration::from_secs(60 * minutes.parse::<u64>().unwrap()),
        Err(_) => DEFAULT,
    };
    let nested = Nested {
        // One processor: with two, QEMU 7.2 breaks KVM within minutes. An interrupt from one of them reaches the other where none may come.
        limit: Some(length * 2 + Duration::from_secs(600)),
        ..Nested::default()
    };
    // Made out here, where it is kept.
    programs::image("fio").unwrap();
    where_linux_boots_or_in(&nested, test_path!(), || soak(length));
}

fn soak(length: Duration) {
    let seed = std::env::var("SOAK_SEED").map_or_else(
        |_| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            u64::from(now.subsec_nanos()) << 10 | 1
        },
        |text| text.parse().unwrap(),
    );
    println!("seed: {seed}");
    let mut setting = Setting::new(length);
    let listener = TcpListener::bind("10.7.51.1:5000").unwrap();
    let vm = setting.start();
    let mut guest = Loaded::new(vm);
    let echo = echo(accept(&listener, LIMIT).unwrap());
    guest.expect("ALL-AT-WORK");

    let (toll, said) = guest.kill_until("TREE-STATUS ", seed, length);
    let tree = guest.rest();
    for (outcome, times) in [("FIO-STATUS 0\r", 1), ("LAST-STATUS 0\r", 2)] {
        assert_eq!(said.matches(outcome).count(), times, "{said}");
    }
    guest.expect("SENT ");
    let sent = guest.rest();
    guest.expect("BACK ");
    let back = guest.rest();
    let errors = guest.expect("ERRORS-ABOVE");
    assert_eq!(errors.trim(), "", "the guest's kernel has seen errors");
    guest.expect("GUEST-END status=0");
    let status = guest.vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", guest.vm.messages());

    let (bytes, sum) = echo.join().unwrap();
    assert_eq!((sent.as_str(), back.as_str()), (sum.as_str(), sum.as_str()));
    let rounds = tree.strip_prefix("0 ROUNDS ");
    let rounds = rounds.unwrap_or_else(|| panic!("the tree: {tree}"));
    setting.verify();
    println!("{toll}");
    // Otherwise nothing has been replayed, and nothing is proven.
    let in_flight: u64 = toll.in_flight.values().sum();
    assert!(in_flight > 0, "nobody died with a request in flight");
    println!(
        "{rounds} trees, {bytes} bytes sent and back, {} lines of log",
        guest.vm.messages().lines().count()
    );
}

/// What the VM is made of.
struct Setting {
    dir: tempfile::TempDir,
    tap: Tap,
    guest: Guest,
    initrd: tempfile::NamedTempFile,
}

impl Setting {
    fn new(length: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for disk in ["disk0", "disk1"] {
            let image = fs::File::create(dir.path().join(disk)).unwrap();
            image.set_len(48 << 20).unwrap();
        }
        fs::create_dir(dir.path().join(FOLDER)).unwrap();
        let script = SCRIPT
            .replace("SECONDS", &length.as_secs().to_string())
            .replace(
                "FIO --",
                &format!("{} --", programs::command("/tools", "fio")),
            )
            .replace("LAST\n", &format!("{LAST_PASS}\n"));
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        Self {
            dir,
            tap: Tap::new("sv-load", "10.7.51.1/24").unwrap(),
            initrd: guest.initrd_with(&Script::new(&script)).unwrap(),
            guest,
        }
    }

    fn start(&mut self) -> Vm {
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        let tools = programs::image("fio").unwrap();
        let mut builder = Vm::builder()
            .args(["-machine", "microvm", "-m", "384", "-smp", "1"])
            .kernel(
                &self.guest.kernel.elf,
                "console=ttyS0 quiet panic=-1 reboot=k",
            )
            .arg("-initrd")
            .arg(self.initrd.path())
            .with_qmp();
        let disks = [
            ("disk0", at("disk0"), ""),
            ("disk1", at("disk1"), ""),
            ("tools", tools.display().to_string(), ",readonly=on"),
        ];
        for (id, file, more) in disks {
            builder = builder
                .arg("-drive")
                .arg(format!("id=on-{id},file={file},direct=off{more}"))
                .arg("-device")
                .arg(format!(
                    "virtio-blk-device,drive=on-{id},id={id},max-restarts=1000"
                ));
        }
        builder
            .arg("-netdev")
            .arg(format!("tap,id=n0,ifname={}", self.tap.name))
            .args([
                "-device",
                "virtio-net-device,netdev=n0,id=card,max-restarts=1000",
            ])
            .arg("-fsdev")
            .arg(format!("local,id=f,path={}", at(FOLDER)))
            .arg("-device")
            .arg(format!(
                "virtio-fs-device,fsdev=f,tag={FOLDER},id={FOLDER},max-restarts=1000"
            ))
            .start()
            .unwrap()
    }

    /// What the guest has left, as the host sees it.
    fn verify(&self) {
        let at = |name: &str| self.dir.path().join(name);
        for disk in ["disk0", "disk1"] {
            let verified = Command::new("fio")
                .args(LAST_PASS.split(' '))
                .args(["--thread", "--ioengine=psync", "--verify_only=1"])
                .arg(format!("--filename={}", at(disk).display()))
                .output()
                .unwrap();
            let told = String::from_utf8_lossy(&verified.stdout);
            assert!(verified.status.success(), "{disk}: {told}{verified:?}");
            assert!(told.contains("err= 0"), "{disk}: {told}");
            // One that had read nothing would have found nothing wrong.
            assert!(told.contains("issued rwts: total=128,"), "{disk}: {told}");
        }
        let tree = at(FOLDER).join("tree");
        let checked = Command::new("md5sum")
            .args(["-c", "sums"])
            .current_dir(&tree)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&checked.stdout);
        assert!(checked.status.success(), "{told}{checked:?}");
        assert_eq!(
            told.lines().filter(|line| line.ends_with(": OK")).count(),
            6
        );
        assert_eq!(names(&tree), ["a", "c", "sums"]);
        assert_eq!(names(&tree.join("c")), ["b", "hard", "moved", "soft"]);
        assert_eq!(names(&tree.join("c/b")), ["f2", "f3", "f5", "f6"]);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

/// The guest under load, and who serves it.
struct Loaded {
    vm: Vm,
    qmp: Qmp,
    /// The process of each device, if it has one that is known.
    serving: BTreeMap<&'static str, Option<i32>>,
}

/// What the killing led to.
#[derive(Default)]
struct Toll {
    kills: BTreeMap<&'static str, usize>,
    in_flight: BTreeMap<&'static str, u64>,
    /// Processes that the VMM itself has ended, since they did not answer in time on a busy machine.
    late: usize,
    stalls: Vec<f64>,
    took: Duration,
}

impl std::fmt::Display for Toll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} kills in {:.0} s: {:?}",
            self.kills.values().sum::<usize>(),
            self.took.as_secs_f64(),
            self.kills
        )?;
        writeln!(f, "requests in flight at the deaths: {:?}", self.in_flight)?;
        writeln!(f, "ended by the VMM for being late: {}", self.late)?;
        let mut stalls = self.stalls.clone();
        stalls.sort_by(f64::total_cmp);
        let at = |percent: usize| stalls[(stalls.len() * percent).div_ceil(100).max(1) - 1];
        write!(
            f,
            "stall in ms, 50 %, 99 %, most: {:.1}, {:.1}, {:.1}",
            at(50),
            at(99),
            at(100)
        )
    }
}

impl Loaded {
    fn new(vm: Vm) -> Self {
        let mut qmp = vm.qmp().unwrap();
        let all = qmp.execute("query-workloads", json!({})).unwrap();
        let pid = |device: &str| {
            let mut all = all.as_array().unwrap().iter();
            let one = all.find(|one| one["module"] == device).unwrap();
            i32::try_from(one["pid"].as_i64().unwrap()).unwrap()
        };
        let serving = DEVICES.map(|device| (device, Some(pid(device)))).into();
        Self { vm, qmp, serving }
    }

    #[track_caller]
    fn expect(&mut self, text: &str) -> String {
        self.vm
            .wait_for(text, LIMIT)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn rest(&mut self) -> String {
        self.vm
            .console
            .rest_of_line(LIMIT)
            .unwrap()
            .trim()
            .to_owned()
    }

    /// Kills one process after the other until `text` is on the console, and waits for the last ones' successors.
    /// What came before the text is returned, too.
    fn kill_until(&mut self, text: &str, seed: u64, length: Duration) -> (Toll, String) {
        let mut chance = Chance::new(seed);
        let mut toll = Toll::default();
        let begin = Instant::now();
        let latest = length * 2 + 2 * LIMIT;
        let said = loop {
            let pause = Duration::from_millis(50 + chance.below(450));
            if let Some(said) = self.pass(pause, &mut toll, text) {
                break said;
            }
            assert!(
                begin.elapsed() < latest,
                "no {text:?} after {latest:?}; {toll}\n{}\n{}",
                self.vm.console.transcript(),
                self.vm.messages()
            );
            let device = DEVICES[chance.index(DEVICES.len())];
            // One that is being replaced is left alone, and nobody dies this time.
            let Some(pid) = self.serving.get_mut(device).unwrap().take() else {
                continue;
            };
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) => {}
                // The VMM was faster: it has found it late, and its event is on the way.
                Err(Errno::ESRCH) => continue,
                Err(errno) => panic!("{errno}"),
            }
            *toll.kills.entry(device).or_default() += 1;
        };
        toll.took = begin.elapsed();
        while self.serving.values().any(Option::is_none) {
            let event = self.qmp.next_event(LIMIT).unwrap();
            let event = event.unwrap_or_else(|| panic!("{:?}", self.serving));
            self.take(&event, &mut toll);
        }
        for device in DEVICES {
            assert!(
                toll.kills.contains_key(device),
                "{device} was never killed: {toll}"
            );
        }
        (toll, said)
    }

    /// Lets `pause` pass, unless `text` comes: what came before it.
    fn pass(&mut self, pause: Duration, toll: &mut Toll, text: &str) -> Option<String> {
        let until = Deadline::after(pause);
        loop {
            // What comes first tells what to read; each is read without waiting for more of it.
            let said = self.vm.console.poll_for(text).unwrap();
            if said.is_some() {
                return said;
            }
            while let Some(event) = self.qmp.next_event(Duration::ZERO).unwrap() {
                self.take(&event, toll);
            }
            let both = [self.vm.console.as_fd(), self.qmp.as_fd()];
            readable(&both, until).unwrap()?;
        }
    }

    fn take(&mut self, event: &serde_json::Value, toll: &mut Toll) {
        let data = &event["data"];
        let device = DEVICES.into_iter().find(|device| data["device"] == *device);
        match (event["event"].as_str().unwrap(), device) {
            ("DEVICE_CRASHED", Some(device)) => {
                if data["unresponsive"] == true {
                    toll.late += 1;
                    self.serving.insert(device, None);
                } else {
                    assert_eq!(data["signal"], 9, "{event}\n{}", self.vm.messages());
                    assert_eq!(self.serving[device], None, "nobody killed it: {event}");
                }
                *toll.in_flight.entry(device).or_default() +=
                    data["in-flight"].as_u64().unwrap_or(0);
            }
            ("DEVICE_RECOVERED", Some(device)) => {
                let pid = i32::try_from(data["pid"].as_i64().unwrap()).unwrap();
                self.serving.insert(device, Some(pid));
                toll.stalls.push(data["stall-ms"].as_f64().unwrap());
            }
            _ => panic!("{event}\n{}", self.vm.messages()),
        }
    }
}

/// Sends back what comes, until its end: how many bytes, and their sum. It reads on while the other side does not, which
/// could otherwise wait for this side as this side for it.
fn echo(mut stream: TcpStream) -> JoinHandle<(usize, String)> {
    let mut back = stream.try_clone().unwrap();
    let (sender, receiver) = channel::<Vec<u8>>();
    let writer = std::thread::spawn(move || {
        for chunk in receiver {
            back.write_all(&chunk).unwrap();
        }
        back.shutdown(std::net::Shutdown::Write).unwrap();
    });
    std::thread::spawn(move || {
        let mut sum = Command::new("md5sum")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = sum.stdin.take().unwrap();
        let (mut bytes, mut chunk) = (0, vec![0; 64 << 10]);
        loop {
            let count = stream.read(&mut chunk).unwrap();
            if count == 0 {
                break;
            }
            bytes += count;
            input.write_all(&chunk[..count]).unwrap();
            sender.send(chunk[..count].to_vec()).unwrap();
        }
        drop((input, sender));
        writer.join().unwrap();
        let output = sum.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (bytes, text[..32].to_owned())
    })
}
