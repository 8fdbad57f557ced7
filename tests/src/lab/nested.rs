//! # The nested machine
//!
//! **Job.** Boot "L1" under QEMU's pure emulation with AMD SVM, with this host's files as its own (read-only,
//! below a layer in memory), run one command there as root, and hand back its status.
//! **Who is not trusted.** What runs in L1 is under test and may crash L1: then the status channel closes
//! without a status, which is an error of its own.
//! **Why this way.** Sharing the root file system makes "build here, run there" free. The status travels over a
//! second serial port and not among the output, so nothing that a test prints can be taken for it. The socket of
//! the file server is listening before the server starts, so nothing waits for it to appear.

use super::kernel::{Flavour, Kernel, cache_dir, lock_cache};
use super::last_words::{self, BEAT, BEAT_EVERY, Lost};
use super::place::KilledOnDrop;
use super::{Archive, LabError, chain, initramfs, packages};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::fs::{self, File};
use std::io::IsTerminal;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Set in L1.
const MARK: &str = "STRATOVIRT_IN_LAB";

const MODULES: &[&str] = &[
    "virtio_pci",
    "virtiofs",
    "overlay",
    "kvm-amd",
    "tun",
    "vhost_net",
    "vhost_vsock",
    "virtio_blk",
    "virtio_net",
    "ext4",
    "loop",
];

/// Raised with each change of [`INIT`] or [`MODULES`].
const VERSION: u32 = 2;

/// An emulated AMD processor with what KVM needs; the features taken away are those that QEMU cannot emulate
/// (it would warn) and XSAVEC, which L2's kernels otherwise choose and which is slow under emulation.
const CPU: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec";

const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
# KVM keeps the TSC's frequency of the moment in which it is loaded. If the kernel measures it anew after that, and gets 250 ppm more,
# KVM makes vCPUs whose timers are late by the age of this machine ("user requested TSC rate below hardware speed").
while $b grep -qs tsc-early /sys/devices/system/clocksource/clocksource0/available_clocksource; do $b usleep 20000; done
for m in /mods/*; do $b insmod "$m"; done
$b mount -t virtiofs host /lower -o ro || exec $b poweroff -f
$b mount -t tmpfs upper /upper; $b mkdir -p /upper/u /upper/w
$b mount -t overlay root -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w /new
for d in proc sys dev; do $b mkdir -p /new/$d; $b mount --move /$d /new/$d; done
$b mount -t tmpfs run /new/run
$b mkdir -p /new/dev/shm /new/dev/pts /new/run/lab
$b mount -t tmpfs shm /new/dev/shm; $b mount -t devpts pts /new/dev/pts
. /lab-settings
$b mkdir -p /new/usr/lib/modules/$RELEASE
$b mount --bind "/new$MODULES" /new/usr/lib/modules/$RELEASE
if [ -n "$SHARE" ]; then $b mkdir -p "/new$SHARE"; $b mount -t virtiofs share "/new$SHARE"; fi
$b ifconfig lo up
$b cp /lab-run /new/run/lab/run
exec $b switch_root /new /bin/bash /run/lab/run
"#;

/// Whether this process runs in L1.
#[must_use]
pub fn in_nested() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Settings of one nested machine.
#[derive(Debug, Clone)]
pub struct Nested {
    /// Which of Debian's kernels runs as L1.
    pub flavour: Flavour,
    /// Its memory, in MiB.
    pub memory: u32,
    /// Its processors. One boots a guest as fast as two, and what emulated processors do to each other is the emulator's weakest
    /// part: of machines with two, one in some hundred stood still.
    pub processors: u32,
    /// Its memory nodes: memory and processors are divided between them.
    pub nodes: u32,
    /// How long it may run; without a limit it runs as long as the command does, and may stand still (in a debugger, for one).
    pub limit: Option<Duration>,
    /// A folder that is writable from L1, under its own path.
    pub share: Option<PathBuf>,
    /// More arguments for QEMU.
    pub qemu: Vec<String>,
    /// Whether the command gets this terminal, when there is one.
    pub interactive: bool,
}

impl Default for Nested {
    fn default() -> Self {
        Self {
            flavour: Flavour::Cloud,
            memory: 3072,
            processors: 1,
            nodes: 1,
            limit: Some(Duration::from_secs(300)),
            share: None,
            qemu: Vec::new(),
            interactive: false,
        }
    }
}

/// Whether L1's kernel died of an interrupt that came while a guest's registers were its own: after `#VMEXIT` none may come before `STGI`
/// (AMD64 manual, volume 2, 15.17), and QEMU 7.2 lets one through, of a machine with several processors within minutes to hours. The page fault that follows finds no per-processor data, faults itself,
/// and so on to the end of the stack; the first line of its trace is the instruction behind `VMRUN`.
fn was_interrupted(said: &str) -> bool {
    let Some((_, crash)) = said.split_once("stack guard page was hit") else {
        return false;
    };
    crash.contains("RIP: 0010:exc_page_fault") && crash.contains("RIP: 0010:__svm_vcpu_run")
}

impl Nested {
    /// Runs `command` in L1 and returns its exit status. A single word is a line for the shell, several are a
    /// program and its arguments.
    ///
    /// # Errors
    /// When L1 cannot be started, ends early, takes longer than its limit, or is not emulated (any more, or as a processor is), twice in a row.
    pub fn run(&self, command: &[String]) -> Result<i32, LabError> {
        match self.run_once(command) {
            // Not even its kernel was asked whether anything failed: what ran in it gets the machine that it was promised.
            Err(broken @ (LabError::Frozen(_) | LabError::Interrupted(_))) => {
                eprintln!("{}; another one is started", chain(&broken));
                self.run_once(command)
            }
            result => result,
        }
    }

    fn run_once(&self, command: &[String]) -> Result<i32, LabError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::Host(
                "sharing the root file system with the nested machine takes root".into(),
            ));
        }
        packages::ensure(&["qemu-system-x86", "busybox-static", "kmod", "util-linux"])?;
        let file_server = FileServer::find()?;
        let (kernel, initrd) = self.material()?;
        let work = tempfile::tempdir().map_err(LabError::system("create a temporary folder"))?;
        // Two machines at once would starve each other: each emulates as many processors as most hosts have.
        let _turn = take_turn()?;

        let terminal = self.interactive && std::io::stdin().is_terminal();
        let boot = work.path().join("initrd");
        let mut bytes = fs::read(&initrd).map_err(LabError::file("read", &initrd))?;
        let mut archive = Archive::default();
        archive.file("lab-settings", self.settings(&kernel).as_bytes());
        archive.file("lab-run", run_script(command, terminal)?.as_bytes());
        bytes.extend(archive.finish());
        fs::write(&boot, bytes).map_err(LabError::file("write", &boot))?;

        let mut servers = Vec::new();
        let mut shares = Vec::new();
        for (tag, dir) in [
            ("host", Some(Path::new("/"))),
            ("share", self.share.as_deref()),
        ] {
            let Some(dir) = dir else { continue };
            let socket = work.path().join(tag);
            servers.push(file_server.start(
                dir,
                &socket,
                &work.path().join(format!("{tag}.log")),
            )?);
            shares.push((tag, socket));
        }

        let (mut status, theirs) = pair_over_exec()?;
        let (mut monitor, its_monitor) = pair_over_exec()?;
        let log = work.path().join("qemu.log");
        let mut qemu = self.qemu(&kernel, &boot, &shares, &theirs, &its_monitor);
        if !terminal {
            qemu.stdin(Stdio::null());
        }
        qemu.stderr(File::create(&log).map_err(LabError::file("create", &log))?);
        let output = work.path().join("output");
        if !self.interactive {
            // A test's output must pass through this process, so that its runner can capture it.
            qemu.stdout(File::create(&output).map_err(LabError::file("create", &output))?);
        }
        let child = qemu.spawn().map_err(|source| LabError::Start {
            program: "qemu-system-x86_64".into(),
            source,
        })?;
        let mut machine = KilledOnDrop(child);
        drop((theirs, its_monitor));

        let result = last_words::status(&mut status, self.limit);
        let mut last_words = Ok(());
        if result.is_ok() {
            // A clean end lets QEMU give the terminal back as it found it.
            let pid = nix::unistd::Pid::from_raw(i32::try_from(machine.0.id()).unwrap_or(0));
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = machine.0.wait();
        } else {
            last_words = last_words::ask(&mut status, &mut monitor, machine.0.id());
        }
        drop(machine);
        let said = fs::read(&output).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        if !self.interactive {
            print!("{said}");
        }
        result.map_err(|lost| {
            let mut text = fs::read_to_string(&log).unwrap_or_default();
            for (tag, _) in &shares {
                text.push_str(
                    &fs::read_to_string(work.path().join(format!("{tag}.log"))).unwrap_or_default(),
                );
            }
            match (lost, last_words) {
                (Lost::Ended, _) if was_interrupted(&said) => LabError::Interrupted(text),
                (Lost::Ended, _) => LabError::Ended(text),
                (Lost::Silent, Err(told)) => LabError::Frozen(told + &text),
                (Lost::Silent, Ok(())) => LabError::Machine {
                    reason: "stood still, and its kernel told above what it was at".into(),
                    output: text,
                },
                (Lost::Told(reason), last_words) => LabError::Machine {
                    reason,
                    output: last_words.err().unwrap_or_default() + &text,
                },
            }
        })
    }

    fn material(&self) -> Result<(Kernel, PathBuf), LabError> {
        let _lock = lock_cache()?;
        let kernel = Kernel::unpacked(self.flavour)?;
        let initrd = cache_dir().join(format!("nested-{}-{VERSION}.cpio", self.flavour.name()));
        if !initrd.exists() {
            let system = initramfs::busybox_system(INIT, &kernel.modules(MODULES)?)?;
            let temporary = initrd.with_extension("new");
            fs::write(&temporary, system).map_err(LabError::file("write", &temporary))?;
            fs::rename(&temporary, &initrd).map_err(LabError::file("rename", &temporary))?;
        }
        Ok((kernel, initrd))
    }

    fn settings(&self, kernel: &Kernel) -> String {
        let modules = kernel.root.join("lib/modules").join(&kernel.release);
        let share = self
            .share
            .as_ref()
            .map(|p| p.display().to_string())
            .unwrap_or_default();
        format!(
            "RELEASE={}\nMODULES={}\nSHARE={}\n",
            quote(&kernel.release),
            quote(&modules.display().to_string()),
            quote(&share)
        )
    }

    fn qemu(
        &self,
        kernel: &Kernel,
        initrd: &Path,
        shares: &[(&str, PathBuf)],
        status: &OwnedFd,
        monitor: &OwnedFd,
    ) -> Command {
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU])
            .args([
                "-smp",
                &self.processors.to_string(),
                "-m",
                &self.memory.to_string(),
            ])
            .args([
                "-nic",
                "none",
                "-display",
                "none",
                "-monitor",
                "none",
                "-no-reboot",
            ])
            .args([
                "-chardev",
                "stdio,id=output,signal=off",
                "-serial",
                "chardev:output",
            ])
            .arg("-chardev")
            .arg(format!("socket,id=status,fd={}", status.as_raw_fd()))
            .args(["-serial", "chardev:status"])
            .arg("-chardev")
            .arg(format!("socket,id=monitor,fd={}", monitor.as_raw_fd()))
            .args(["-mon", "chardev=monitor,mode=control"])
            .arg("-kernel")
            .arg(&kernel.bzimage)
            .arg("-initrd")
            .arg(initrd)
            // Self-tests of ciphers that nothing here uses: under emulation they take seconds, and on a busy host one of
            // them was seen to spin for ever.
            .args([
                "-append",
                "console=ttyS0 panic=-1 quiet loglevel=1 cryptomgr.notests unknown_nmi_panic panic_print=0x61",
            ]);
        for node in 0..self.nodes {
            let size = self.memory / self.nodes;
            qemu.arg("-object").arg(format!(
                "memory-backend-memfd,id=ram{node},size={size}M,share=on"
            ));
            qemu.arg("-numa").arg(format!("node,memdev=ram{node}"));
        }
        for (tag, socket) in shares {
            qemu.arg("-chardev")
                .arg(format!("socket,id={tag},path={}", socket.display()));
            qemu.arg("-device")
                .arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag}"));
        }
        qemu.args(&self.qemu);
        qemu
    }
}

/// A pair of sockets, the second of which stays open in the program that is started next.
fn pair_over_exec() -> Result<(UnixStream, OwnedFd), LabError> {
    let (ours, theirs) = UnixStream::pair().map_err(LabError::system("make a socket pair"))?;
    let theirs = OwnedFd::from(theirs);
    keep_over_exec(&theirs)?;
    Ok((ours, theirs))
}

/// The script that L1's process 1 becomes.
fn run_script(command: &[String], terminal: bool) -> Result<String, LabError> {
    let directory = std::env::current_dir().map_err(LabError::system("find the current folder"))?;
    let mut script = String::new();
    for (name, value) in std::env::vars() {
        if passed_on(&name) {
            script.push_str(&format!("export {name}={}\n", quote(&value)));
        }
    }
    script.push_str(&format!(
        "export {MARK}=1\ncd {}\n",
        quote(&directory.display().to_string())
    ));
    // The serial driver must not add carriage returns unless a terminal shows the text.
    let tty = if terminal { "sane" } else { "-onlcr -echo" };
    script.push_str(&format!(
        "stty -F /dev/ttyS0 {tty}\nstty -F /dev/ttyS1 raw -echo\n"
    ));
    if terminal {
        script.push_str(&terminal_size());
    }
    script.push_str(&format!(
        "(while echo {BEAT}; do sleep {BEAT_EVERY}; done) </dev/null >/dev/ttyS1 2>/dev/null &\n"
    ));
    let line = match command {
        [line] => line.clone(),
        words => words.iter().map(|w| quote(w)).collect::<Vec<_>>().join(" "),
    };
    let input = if terminal { "/dev/ttyS0" } else { "/dev/null" };
    let session = if terminal {
        "setsid -c -w"
    } else {
        "setsid -w"
    };
    script.push_str(&format!(
        "{session} bash -c {} <{input} >/dev/ttyS0 2>&1\nstatus=$?\n",
        quote(&line)
    ));
    // Setting the terminal once more waits until all output has left the machine.
    script.push_str("stty -F /dev/ttyS0 onlcr\necho $status >/dev/ttyS1\nexec tail -f /dev/null\n");
    Ok(script)
}

/// The variables that a command in L1 sees as it would here.
fn passed_on(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "PATH",
        "HOME",
        "USER",
        "TERM",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "RECOVERY_MINUTES",
        "SOAK_SEED",
    ];
    const PREFIXES: &[&str] = &["RUST_", "CARGO_", "STRATOVIRT_"];
    // The shell takes no other names; cargo has some, with a program's dash.
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    plain && (NAMES.contains(&name) || PREFIXES.iter().any(|p| name.starts_with(p)))
}

fn terminal_size() -> String {
    let size = Command::new("stty")
        .arg("size")
        .stdin(Stdio::inherit())
        .output();
    let text = size
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    match text.split_whitespace().collect::<Vec<_>>()[..] {
        [rows, columns] if rows != "0" => {
            format!("stty -F /dev/ttyS0 rows {rows} columns {columns}\n")
        }
        _ => String::new(),
    }
}

fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn take_turn() -> Result<nix::fcntl::Flock<File>, LabError> {
    let path = cache_dir().join("turn");
    let file = File::create(&path).map_err(LabError::file("create", &path))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).map_err(|(_, errno)| {
        LabError::System {
            action: "wait for other nested machines",
            source: errno.into(),
        }
    })
}

fn keep_over_exec(fd: &OwnedFd) -> Result<(), LabError> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))
        .map(drop)
        .map_err(LabError::system("pass a descriptor on"))
}

/// The program that serves the host's files to L1.
enum FileServer {
    /// The one in C that comes with QEMU 7 (Debian 12).
    InC(PathBuf),
    /// The one in Rust (Debian 13 and later).
    InRust(PathBuf),
}

impl FileServer {
    fn find() -> Result<Self, LabError> {
        let c = PathBuf::from("/usr/lib/qemu/virtiofsd");
        if c.exists() {
            return Ok(Self::InC(c));
        }
        packages::ensure(&["virtiofsd"])?;
        Ok(Self::InRust("/usr/libexec/virtiofsd".into()))
    }

    fn start(&self, dir: &Path, socket: &Path, log: &Path) -> Result<KilledOnDrop, LabError> {
        let listener = UnixListener::bind(socket).map_err(LabError::file("listen on", socket))?;
        let listener = OwnedFd::from(listener);
        keep_over_exec(&listener)?;
        let log_file = File::create(log).map_err(LabError::file("create", log))?;
        let mut server = Command::new("setpriv");
        server.args(["--pdeathsig", "KILL"]);
        match self {
            Self::InC(path) => server
                .arg(path)
                .arg("-o")
                .arg(format!("source={}", dir.display()))
                .args(["-o", "cache=auto", "-o", "sandbox=chroot"]),
            Self::InRust(path) => server.arg(path).arg("--shared-dir").arg(dir).args([
                "--cache",
                "auto",
                "--sandbox",
                "chroot",
            ]),
        };
        server.arg(format!("--fd={}", listener.as_raw_fd()));
        let child = server
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .map_err(|source| LabError::Start {
                program: "virtiofsd".into(),
                source,
            })?;
        Ok(KilledOnDrop(child))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_that_the_emulator_made_is_told_from_others() {
        let crash = "BUG: TASK stack guard page was hit at 0\nRIP: 0010:exc_page_fault+0x15/0x170\n  asm_sysvec_reschedule_ipi+0x16/0x20\nRIP: 0010:__svm_vcpu_run+0x9c/0x210 [kvm_amd]\n";
        assert!(was_interrupted(crash));
        assert!(!was_interrupted(
            &crash.replace("__svm_vcpu_run", "vfs_read")
        ));
        assert!(!was_interrupted(
            "RIP: 0010:__svm_vcpu_run+0x9c/0x210\nassertion failed\n"
        ));
    }
}
