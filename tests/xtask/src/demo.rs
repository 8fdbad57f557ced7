//! # `cargo xtask demo`
//!
//! **Job.** Show the product's main job from nothing to a shell: install, build, make a disk, a tap and a shared folder, boot
//! Debian's stock kernel, mount disk and folder and ping the host from it, print each process with its jail, hand the guest's serial
//! console to the user, clean up. `--check` does the same without a terminal and judges it.
//! **Who is not trusted.** The guest and the VMM: what the guest claims about its disk is checked on the host with
//! `e2fsck` and by reading its files back, and what the jails are is asked from the kernel.
//! **Why this way.** The command line is the manual's, printed as a user would type it.

use crate::tool;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tests::host::{self, Tap};
use tests::jail::Jail;
use tests::lab::{Flavour, Guest, Nested, Place, Script, chain, ensure_packages, place};
use tests::vm::Vm;
use tests::wait::Deadline;

const PACKAGES: &[&str] = &[
    "e2fsprogs",
    "iproute2",
    "qemu-system-x86",
    "busybox-static",
    "kmod",
];
/// The host's and the guest's address on the tap.
const HOST: &str = "10.0.2.1";
const GUEST: &str = "10.0.2.2";
const TAP: &str = "sv-demo0";
/// Two emulations deep, a boot takes seconds; this is for a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(120);

/// What the guest does before its shell.
const SCRIPT: &str = "\
set -e
mkdir -p /mnt/disk
mount -t ext4 /dev/vda /mnt/disk
echo \"GUEST-DISK $(cat /mnt/disk/from-host)\"
echo 'written in the guest' > /mnt/disk/from-guest
sync
mkdir -p /mnt/share
mount -t virtiofs share /mnt/share
echo \"GUEST-SHARE $(cat /mnt/share/from-host)\"
echo 'written in the guest' > /mnt/share/from-guest
ip addr add 10.0.2.2/24 dev eth0
ip link set eth0 up
ping -c 3 -i 0.2 10.0.2.1
echo GUEST-PING ok
";

/// Boot a guest with a disk, a network card and a shared folder, show every process's jail, and leave you in the guest's shell.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Look by itself, without a terminal, and exit 0 or 1.
    #[arg(long)]
    check: bool,
    /// This is the machine where guests boot, and there the demo's folder.
    #[arg(long, value_name = "DIR", hide = true)]
    inside: Option<std::path::PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    let check = options.check;
    if let Some(dir) = &options.inside {
        return inside(dir, check);
    }
    if !check && !io::stdin().is_terminal() {
        return Err("this needs a terminal; without one, use --check".into());
    }
    if !nix::unistd::geteuid().is_root() {
        return Err("making a tap and jails with their own users takes root".into());
    }
    ensure_packages(PACKAGES).map_err(|e| chain(&e))?;
    let programs = tool::build_release()?;
    let place = place(Flavour::Cloud).map_err(|e| chain(&e))?;
    Guest::ready(Flavour::Cloud).map_err(|e| chain(&e))?;
    match place {
        Place::Here { why } => {
            say(&format!("the VM runs on this machine: {why}"));
            inside(&programs, check)
        }
        Place::Nested { why } => {
            say(&format!(
                "the VM runs in a nested machine (QEMU emulates AMD SVM): {why}"
            ));
            let own =
                std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
            let mut command = vec![
                own.display().to_string(),
                "demo".into(),
                "--inside".into(),
                programs.display().to_string(),
            ];
            let limit = check.then_some(Duration::from_secs(300));
            if check {
                command.push("--check".into());
            }
            let nested = Nested {
                limit,
                interactive: true,
                ..Nested::default()
            };
            let status = nested.run(&command).map_err(|e| chain(&e))?;
            Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
        }
    }
}

/// The part that runs where Linux guests boot.
fn inside(programs: &Path, check: bool) -> Result<ExitCode, String> {
    let text = |e: &dyn std::error::Error| chain(e);
    let work = tempfile::tempdir().map_err(|e| format!("cannot make a temporary folder: {e}"))?;
    let guest = Guest::ready(Flavour::Cloud).map_err(|e| text(&e))?;

    say("making an ext4 disk, a tap and a folder to share");
    let content = work.path().join("content");
    std::fs::create_dir(&content).map_err(|e| format!("cannot make a folder: {e}"))?;
    std::fs::write(content.join("from-host"), "written on the host\n")
        .map_err(|e| format!("cannot write: {e}"))?;
    let disk = work.path().join("disk.img");
    host::ext4_image(&disk, 64, &content).map_err(|e| text(&e))?;
    let share = work.path().join("share");
    std::fs::create_dir(&share).map_err(|e| format!("cannot make a folder: {e}"))?;
    std::fs::write(share.join("from-host"), "shared by the host\n")
        .map_err(|e| format!("cannot write: {e}"))?;
    let tap = Tap::new(TAP, &format!("{HOST}/24")).map_err(|e| text(&e))?;
    let initrd = guest
        .initrd_with(&Script::new(SCRIPT))
        .map_err(|e| text(&e))?;

    let arguments: Vec<String> = [
        "-machine",
        "microvm",
        "-smp",
        "1",
        "-m",
        "256m",
        "-kernel",
        &guest.kernel.elf.display().to_string(),
        "-initrd",
        &initrd.path().display().to_string(),
        "-append",
        "console=ttyS0 quiet panic=-1 reboot=k then=shell",
        "-drive",
        &format!("id=rootfs,file={},readonly=off,direct=off", disk.display()),
        "-device",
        "virtio-blk-device,drive=rootfs,id=blk0",
        "-netdev",
        &format!("tap,id=net0,ifname={}", tap.name),
        "-device",
        "virtio-net-device,netdev=net0,id=nic0,mac=52:54:00:12:34:56",
        "-fsdev",
        &format!("local,id=share0,path={}", share.display()),
        "-device",
        "virtio-fs-device,fsdev=share0,id=fs0,tag=share",
    ]
    .map(str::to_owned)
    .into();
    say(&format!(
        "starting: stratovirt {} -serial stdio",
        shown(&arguments)
    ));
    let program = programs.join("stratovirt");
    let log = work.path().join("log");
    let mut vm = Vm::builder()
        .program(program)
        .args(&arguments)
        .arg("-D")
        .arg(&log)
        .env("STRATOVIRT_LOG_LEVEL", "debug")
        .with_qmp()
        .start()
        .map_err(|e| text(&e))?;

    vm.wait_for("GUEST-UP ", LIMIT)?;
    let up = vm.console.rest_of_line(LIMIT).map_err(|e| text(&e))?;
    say(&format!("the guest's init runs ({up})"));
    vm.wait_for("GUEST-DISK ", LIMIT)?;
    let read = vm.console.rest_of_line(LIMIT).map_err(|e| text(&e))?;
    if read.trim() != "written on the host" {
        return Err(format!("the guest reads {read:?} from the disk"));
    }
    say("the guest has mounted the disk, read the host's file and written its own");
    vm.wait_for("GUEST-SHARE ", LIMIT)?;
    let read = vm.console.rest_of_line(LIMIT).map_err(|e| text(&e))?;
    if read.trim() != "shared by the host" {
        return Err(format!("the guest reads {read:?} from the shared folder"));
    }
    say("the guest has mounted the shared folder, read the host's file and written its own");
    vm.wait_for("GUEST-PING ok", LIMIT)?;
    say(&format!("the guest ({GUEST}) has pinged the host ({HOST})"));
    vm.wait_for("GUEST-END status=0", LIMIT)?;

    say("the processes of this VM, as the kernel sees them:");
    let mut pids = vec![vm.pid()];
    pids.extend(vm.processes().map_err(|e| text(&e))?);
    let told = std::fs::read_to_string(&log).map_err(|e| format!("{}: {e}", log.display()))?;
    let mut unreported = Vec::new();
    for &pid in &pids {
        let jail =
            Jail::of(pid).map_err(|e| format!("cannot read the jail of process {pid}: {e}"))?;
        println!("{jail}");
        let landlock = landlock(&told, &jail.name);
        println!("    Landlock      {landlock}");
        if landlock == NOT_TOLD {
            unreported.push(format!("{} says nothing of Landlock", jail.name));
        }
    }
    let mut problems = judge(&pids)?;
    problems.append(&mut unreported);

    if check {
        vm.console.send("poweroff -f\n").map_err(|e| text(&e))?;
    } else {
        say("the guest's shell is yours; `poweroff -f` ends the VM");
        hand_over(&mut vm)?;
    }
    let status = vm.wait(LIMIT).map_err(|e| text(&e))?;
    if !status.success() {
        problems.push(format!("the VM ended with {status}: {}", vm.messages()));
    }
    let survivors = vm.survivors(Deadline::after(Duration::from_millis(100)));
    if !survivors.is_empty() {
        problems.push(format!(
            "these processes have outlived the VM: {survivors:?}"
        ));
    }
    host::check_ext4(&disk).map_err(|e| text(&e))?;
    let written = host::read_from_ext4(&disk, "/from-guest").map_err(|e| text(&e))?;
    if written != b"written in the guest\n" {
        problems.push(format!(
            "the host reads {:?} as the guest's file",
            String::from_utf8_lossy(&written)
        ));
    }
    let written = std::fs::read(share.join("from-guest")).unwrap_or_default();
    if written != b"written in the guest\n" {
        problems.push(format!(
            "the host reads {:?} as the guest's file in the shared folder",
            String::from_utf8_lossy(&written)
        ));
    }
    drop(tap);
    if problems.is_empty() {
        say(
            "disk and shared folder hold the guest's files, the disk is clean; nothing of the VM is left. All is well.",
        );
        return Ok(ExitCode::SUCCESS);
    }
    Err(problems.join("\n"))
}

/// A process that said nothing of its Landlock domain.
const NOT_TOLD: &str = "not reported";

/// What a process has logged about its Landlock domain, which no kernel shows from outside; the jail's own tests try
/// whether it holds.
fn landlock(log: &str, name: &str) -> String {
    let source = match name {
        "stratovirt" => "control",
        "broker" => return "none: it opens files for the others".to_owned(),
        // A keeper reports by the name of the process that it starts, which has all of its jail.
        device => device.strip_suffix("-keeper").unwrap_or(device),
    };
    let mut parts = Vec::new();
    for line in log.lines() {
        let Some((head, what)) = line.split_once("Landlock for ") else {
            continue;
        };
        // The broker puts a device's id in brackets before its lines; then come time, level and process.
        let mut words = head
            .split_whitespace()
            .skip_while(|word| word.starts_with('['));
        if words.nth(2) == Some(source) {
            parts.push(what.to_owned());
        }
    }
    if parts.is_empty() {
        return NOT_TOLD.to_owned();
    }
    format!("{} (as it reports itself)", parts.join("; "))
}

/// What must hold for the picture to be worth showing; the jail suite checks far more.
fn judge(pids: &[i32]) -> Result<Vec<String>, String> {
    let mut problems = Vec::new();
    let mut names = Vec::new();
    for &pid in pids {
        let jail =
            Jail::of(pid).map_err(|e| format!("cannot read the jail of process {pid}: {e}"))?;
        let kvm = jail.fds.values().any(|fd| fd.kind().contains("kvm"));
        if kvm != (pid == pids[0]) {
            problems.push(format!("{} holds KVM: {kvm}", jail.name));
        }
        let folder = jail.name == "fs";
        let device = folder || ["block", "net"].contains(&jail.name.as_str());
        if device && jail.own_namespaces.len() != tests::jail::NAMESPACES.len() {
            problems.push(format!("{} shares namespaces with the host", jail.name));
        }
        if device
            && (jail.capabilities != capabilities(folder)
                || !jail.no_new_privs
                || jail.threads.iter().any(|t| t.1 != 2))
        {
            problems.push(format!("{} has privileges left", jail.name));
        }
        names.push(jail.name);
    }
    for wanted in ["block", "net", "fs"] {
        if !names.iter().any(|n| n == wanted) {
            problems.push(format!("no process named {wanted} among {names:?}"));
        }
    }
    Ok(problems)
}

/// The five sets of a device process. One that serves a folder keeps the rights over files, in its own user namespace: owner,
/// permissions, and becoming the guest's users.
fn capabilities(folder: bool) -> [u64; 5] {
    let kept = if folder { 0xdb } else { 0 };
    [0, kept, kept, kept, 0]
}

/// Connects this terminal with the guest's serial port until the VM ends.
fn hand_over(vm: &mut Vm) -> Result<(), String> {
    let raw = RawTerminal::enter().map_err(|e| format!("cannot set the terminal up: {e}"))?;
    vm.console.send("\n").map_err(|e| chain(&e))?;
    let result = relay(vm);
    drop(raw);
    result.map_err(|e| format!("the terminal: {e}"))
}

fn relay(vm: &mut Vm) -> io::Result<()> {
    let (mut stdin, mut stdout) = (io::stdin(), io::stdout());
    let mut typing = true;
    loop {
        let (from_guest, from_user) = {
            let mut fds = vec![PollFd::new(vm.console.as_fd(), PollFlags::POLLIN)];
            if typing {
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            poll(&mut fds, PollTimeout::NONE)?;
            (
                fds[0].any().unwrap_or(false),
                fds.get(1).is_some_and(|f| f.any().unwrap_or(false)),
            )
        };
        // As large as the buffer of standard input, so that nothing stays in it unseen by poll.
        let mut chunk = [0; 16 << 10];
        if from_guest {
            let count = vm.console.read_available(&mut chunk)?;
            if count == 0 {
                return Ok(());
            }
            stdout.write_all(&chunk[..count])?;
            stdout.flush()?;
        }
        if from_user {
            let count = stdin.read(&mut chunk)?;
            if count == 0 {
                typing = false;
            } else {
                let text = String::from_utf8_lossy(&chunk[..count]).into_owned();
                vm.console.send(&text).map_err(io::Error::other)?;
            }
        }
    }
}

/// The terminal in raw mode, given back as it was.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> nix::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

fn shown(arguments: &[String]) -> String {
    let words = arguments.iter().map(|a| {
        if a.contains(' ') {
            format!("\"{a}\"")
        } else {
            a.clone()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

fn say(text: &str) {
    println!("demo: {text}");
}
