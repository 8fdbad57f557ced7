//! # Ways out of the jails of live processes
//!
//! **Job.** Every attempt of [`tests::escape::attempts`] in the jail of each device process, once with the system call filter
//! and once without; and what wasting resources does to the host and to the VM's other devices.
//! **Who is not trusted.** The probe in place of the device: what became of an attempt is what the broker says of its process,
//! and, where that lived on, what the kernel answered.
//! **Why this way.** The broker of the product starts each probe as it would the device. A filter that kills ends the process,
//! so every attempt has a VM of its own.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

#[path = "escape/bait.rs"]
mod bait;
#[path = "escape/broker.rs"]
mod broker;
#[path = "escape/control.rs"]
mod control;
#[path = "escape/landlock.rs"]
mod landlock;
#[path = "escape/waste.rs"]
mod waste;

use bait::Bait;
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::console::Console;
use tests::escape::{Attempt, Expect, Jail, Outcome, attempts};
use tests::host::{Tap, require_kvm, require_root};
use tests::lab::ensure_packages;
use tests::payload::Payload;
use tests::vm::{Vm, VmBuilder, binary};

const LIMIT: Duration = Duration::from_secs(30);
const CARD: &str = "52:54:00:00:00:41";

/// The product's programs with the probe in place of one.
struct Place {
    dir: tempfile::TempDir,
    jail: Jail,
    tap: String,
    made: RefCell<Option<Tap>>,
}

impl Place {
    fn new(jail: Jail, tap: &str) -> Self {
        require_kvm();
        require_root();
        let dir = tempfile::tempdir().unwrap();
        let program = match jail {
            Jail::Net => "net",
            Jail::Fs => "vhost_user_fs",
            Jail::Qcow2 => "block-qcow2",
            _ => "block",
        };
        for name in ["stratovirt", "block", "block-qcow2", "net", "vhost_user_fs"] {
            let from = if name == program {
                PathBuf::from(env!("CARGO_BIN_EXE_escape-probe"))
            } else {
                binary(name).unwrap()
            };
            std::fs::copy(from, dir.path().join(name)).unwrap();
        }
        Self {
            dir,
            jail,
            tap: tap.to_owned(),
            made: RefCell::default(),
        }
    }

    /// A VM whose one device does what `id` says, and the log.
    fn vm(&self, id: &str, readonly: bool, filter: bool) -> (Vm, Console) {
        let log = self.dir.path().join("log");
        let _ = std::fs::remove_file(&log);
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&log)
            .unwrap();
        let mut builder = Vm::builder()
            .program(self.dir.path().join("stratovirt"))
            .args(["-machine", "microvm", "-m", "128", "-D"])
            .arg(&log);
        if !filter {
            builder = builder.arg("-disable-seccomp");
        }
        builder = match self.jail {
            Jail::Net => self.with_card(builder, id),
            Jail::Fs => self.with_folder(builder, id),
            _ => self.with_disk(builder, id, readonly),
        };
        (builder.start().unwrap(), Console::new(reader, None))
    }

    fn with_disk(&self, builder: VmBuilder, id: &str, readonly: bool) -> VmBuilder {
        let disk = self.dir.path().join("disk.img");
        let format = if self.jail == Jail::Qcow2 {
            ensure_packages(&["qemu-utils"]).unwrap();
            let made = std::process::Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&disk)
                .arg(DISK.to_string())
                .status();
            assert!(made.unwrap().success());
            ",format=qcow2"
        } else {
            File::create(&disk).unwrap().set_len(DISK).unwrap();
            ""
        };
        let readonly = if readonly { ",readonly=on" } else { "" };
        builder
            .kernel(&Payload::BlkRw.path(), "")
            .arg("-drive")
            .arg(format!(
                "id=d0,file={},direct=off{format}{readonly}",
                disk.display()
            ))
            .arg("-device")
            .arg(format!("virtio-blk-device,drive=d0,id={id},restart=off"))
    }

    fn with_card(&self, builder: VmBuilder, id: &str) -> VmBuilder {
        let tap = &self.tap;
        // An attempt may have taken it away.
        if !Path::new("/sys/class/net").join(tap).exists() {
            let _ = self.made.take();
            *self.made.borrow_mut() = Some(Tap::new(tap, "10.7.41.1/24").unwrap());
        }
        builder
            .kernel(&Payload::NetTx.path(), "")
            .arg("-netdev")
            .arg(format!("tap,id=n0,ifname={tap}"))
            .arg("-device")
            .arg(format!(
                "virtio-net-device,netdev=n0,id={id},mac={CARD},restart=off"
            ))
    }

    fn with_folder(&self, builder: VmBuilder, id: &str) -> VmBuilder {
        let folder = self.dir.path().join("shared");
        // As empty as at first.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        builder
            .kernel(&Payload::StartDevice.path(), "device=26 queues=2")
            .arg("-fsdev")
            .arg(format!("local,id=f,path={}", folder.display()))
            .arg("-device")
            .arg(format!(
                "virtio-fs-device,fsdev=f,tag=share,id={id},restart=off"
            ))
    }

    /// What becomes of an attempt, and what the log says of it.
    fn make(&self, attempt: &Attempt, filter: bool) -> (Result<Outcome, String>, String) {
        let (mut vm, mut log) = self.vm(attempt.name, attempt.readonly, filter);
        let told = log.wait_for("ended (", LIMIT);
        let how = told.and_then(|before| {
            Ok((
                before,
                log.wait_for("): ", LIMIT)?,
                log.rest_of_line(LIMIT)?,
            ))
        });
        let (before, how, last) = match how {
            Ok(told) => told,
            Err(e) => return (Err(vm.explain(&e)), String::new()),
        };
        let _ = vm.kill();
        // What it put in the log itself may stand before its last words.
        (judge(&before, &how, last.trim_start()), before)
    }
}

/// Bytes of a disk.
const DISK: u64 = 4 << 20;

/// From the log before the device's end, how it ended, and its last words.
fn judge(before: &str, how: &str, last: &str) -> Result<Outcome, String> {
    let wrong = || format!("{before}\nended ({how}): {last}");
    if !before.contains("] ready\n") {
        return Err(wrong());
    }
    match how {
        // The last word is the announcement of the call that it died of.
        "Signal(31)" if last.starts_with("call ") => return Ok(Outcome::Killed),
        "Code(77)" => return Ok(Outcome::Through(77)),
        // Strict mode, into which a process may go, ends it at the call that ends it.
        "Signal(9)" if last.starts_with("answer") => {}
        "Code(0)" => {}
        _ => return Err(wrong()),
    }
    let mut words = last.split(' ');
    let (answer, what, value) = (words.next(), words.next(), words.next());
    let value = || value.and_then(|v| v.parse::<u64>().ok()).ok_or_else(wrong);
    match (answer, what) {
        (Some("answer"), Some("refused")) => Ok(Outcome::Refused(
            i32::try_from(value()?).map_err(|_| wrong())?,
        )),
        (Some("answer"), Some("confined")) => Ok(Outcome::Confined),
        (Some("answer"), Some("through")) => Ok(Outcome::Through(value()?)),
        _ => Err(wrong()),
    }
}

/// Makes all attempts in `jail` and returns how many there were. Fails with every one that did not end as it must.
fn all_attempts(jail: Jail, tap: &str) -> usize {
    let bait = Bait::lay();
    let place = Place::new(jail, tap);
    let (mut wrong, mut silent) = (Vec::new(), 0);
    let (mut count, mut allowed, mut layers) = (0, 0, [0; 3]);
    for attempt in attempts::all() {
        let Some((filtered, rest)) = attempt.expected(jail) else {
            continue;
        };
        let granted = matches!(filtered, Expect::Granted(_));
        let (mut both, mut stopped) = (String::new(), 0);
        for (filter, expected) in [(true, filtered), (false, rest)] {
            let (outcome, _) = place.make(&attempt, filter);
            let leg = if filter { "with filter" } else { "without" };
            match outcome {
                Ok(outcome) => {
                    both += &format!("  {leg}: {outcome}");
                    if !matches!(outcome, Outcome::Through(_)) {
                        stopped += 1;
                    }
                    if !outcome.is(expected) {
                        wrong.push(format!(
                            "{} {leg}: {outcome}, must be {expected:?}",
                            attempt.name
                        ));
                    }
                }
                Err(e) => {
                    wrong.push(format!("{} {leg}: {e}", attempt.name));
                    silent += 1;
                    // Each waits for its limit: so many are no jail's doing but the probe's that does not begin.
                    assert!(silent < 4, "{}", wrong.join("\n"));
                }
            }
        }
        if granted {
            allowed += 1;
        } else {
            count += 1;
            layers[stopped] += 1;
        }
        println!("{jail:6} {:32} {both}", attempt.name);
    }
    drop(bait);
    assert!(
        wrong.is_empty(),
        "{} outcomes of {count} attempts in {jail} are not as they must be:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    println!(
        "blocked {count}/{count} in {jail}: {} by two layers or more, {} by the filter alone; {allowed} more are what it is for",
        layers[2], layers[1]
    );
    count
}

#[test]
fn nothing_gets_out_of_a_disks_process() {
    assert!(all_attempts(Jail::Block, "") >= 80);
}

#[test]
fn nothing_gets_out_of_a_qcow2_disks_process() {
    assert!(all_attempts(Jail::Qcow2, "") >= 80);
}

#[test]
fn nothing_gets_out_of_a_network_cards_process() {
    assert!(all_attempts(Jail::Net, "sv-esc") >= 80);
}

#[test]
fn nothing_gets_out_of_a_shared_folders_process() {
    assert!(all_attempts(Jail::Fs, "") >= 80);
}
