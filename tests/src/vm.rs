//! # A running VM
//!
//! **Job.** Start `stratovirt` with a command line, hold its serial console, its QMP socket and its processes, and
//! leave nothing behind.
//! **Who is not trusted.** The VMM under test: it may hang, crash or leave processes; the end of a [`Vm`] kills all
//! that were ever seen below it.
//! **Why this way.** Tests say what the user would type, so a test is also an example of the manual.

use crate::console::{Console, ConsoleError};
use crate::payload::Payload;
use crate::procfs;
use crate::qmp::{Qmp, QmpError};
use crate::wait::{Deadline, Watched};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Why a VM could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A binary of the product is missing.
    #[error("{0} is not built: run `cargo build --workspace`, or `cargo xtask test`, which does")]
    NotBuilt(PathBuf),
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has not ended in time.
    #[error("the VM has not ended within {limit:?}; its messages:\n{messages}")]
    StillRuns {
        /// How long it had.
        limit: Duration,
        /// What it wrote to standard error.
        messages: String,
    },
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::System { action, source }
}

/// The path of one of the product's binaries: in the folder that `STRATOVIRT_BIN_DIR` names, else in the folder of
/// the build that this program belongs to.
///
/// # Errors
/// When it is not built.
pub fn binary(name: &str) -> Result<PathBuf, VmError> {
    let dir = match std::env::var_os("STRATOVIRT_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let own = std::env::current_exe().map_err(system("find this program"))?;
            let dir = own.parent().unwrap_or(Path::new("/"));
            // Test binaries lie one folder below the others.
            if dir.ends_with("deps") {
                dir.parent().unwrap_or(dir).to_owned()
            } else {
                dir.to_owned()
            }
        }
    };
    let path = dir.join(name);
    if path.exists() {
        Ok(path)
    } else {
        Err(VmError::NotBuilt(path))
    }
}

/// A command line under construction. The serial port is on standard input and output unless said otherwise.
#[derive(Debug, Clone)]
pub struct VmBuilder {
    program: Option<PathBuf>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    serial: bool,
    qmp: bool,
}

impl VmBuilder {
    /// Runs another program than `stratovirt`.
    #[must_use]
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// One word of the command line.
    #[must_use]
    pub fn arg(mut self, word: impl AsRef<OsStr>) -> Self {
        self.arguments.push(word.as_ref().to_owned());
        self
    }

    /// Several words of the command line.
    #[must_use]
    pub fn args<W: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        self.arguments
            .extend(words.into_iter().map(|w| w.as_ref().to_owned()));
        self
    }

    /// `-kernel` and `-append`.
    #[must_use]
    pub fn kernel(self, kernel: &Path, append: &str) -> Self {
        self.arg("-kernel").arg(kernel).arg("-append").arg(append)
    }

    /// A raw disk: `-drive` and `-device virtio-blk-device`. `more` is added to the drive, for example
    /// `,readonly=on`.
    #[must_use]
    pub fn disk(self, id: &str, image: &Path, more: &str) -> Self {
        let drive = format!(
            "id={id},file={},format=raw,direct=off{more}",
            image.display()
        );
        self.arg("-drive")
            .arg(drive)
            .arg("-device")
            .arg(format!("virtio-blk-device,drive={id},id=dev-{id}"))
    }

    /// A network card on a host's tap: `-netdev tap` and `-device virtio-net-device`.
    #[must_use]
    pub fn tap(self, id: &str, ifname: &str, mac: &str) -> Self {
        let netdev = format!("tap,id={id},ifname={ifname}");
        self.arg("-netdev").arg(netdev).arg("-device").arg(format!(
            "virtio-net-device,netdev={id},id=dev-{id},mac={mac}"
        ))
    }

    /// A variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// No `-serial stdio`: the test says itself where the serial port goes.
    #[must_use]
    pub fn without_serial(mut self) -> Self {
        self.serial = false;
        self
    }

    /// A QMP socket, for [`Vm::qmp`].
    #[must_use]
    pub fn with_qmp(mut self) -> Self {
        self.qmp = true;
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// When the binary is not built or cannot be started.
    pub fn start(self) -> Result<Vm, VmError> {
        let program = self.program.map_or_else(|| binary("stratovirt"), Ok)?;
        let dir = tempfile::tempdir().map_err(system("create a temporary folder"))?;
        let errors = dir.path().join("stderr");
        let qmp = self.qmp.then(|| dir.path().join("qmp"));
        let mut command = Command::new(program);
        command.args(&self.arguments).envs(self.environment);
        if self.serial {
            command.args(["-serial", "stdio"]);
        }
        if let Some(socket) = &qmp {
            command
                .arg("-qmp")
                .arg(format!("unix:{},server,nowait", socket.display()));
        }
        let file = std::fs::File::create(&errors).map_err(system("create a file"))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .map_err(system("start the VM"))?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        let watched = Watched::new(pid).map_err(system("watch the VM"))?;
        let output = output
            .ok_or_else(|| system("read the VM's output")(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Vm {
            child,
            watched,
            console: Console::new(OwnedFd::from(output), input.map(OwnedFd::from)),
            dir,
            qmp,
            seen: Vec::new(),
        })
    }
}

/// For what a guest says and for a VM's end: two emulations deep a boot takes five seconds; this is for a machine that is busy as well,
/// and for nested machines that let their guests stand still.
pub const PATIENCE: Duration = Duration::from_secs(200);

/// Waits for `text` on the console; see [`Vm::wait_for`].
///
/// # Panics
/// When it does not come within [`PATIENCE`], with everything that helps.
#[track_caller]
pub fn expect(vm: &mut Vm, text: &str) -> String {
    vm.wait_for(text, PATIENCE)
        .unwrap_or_else(|e| panic!("{e}"))
}

/// Waits for the VM's end, which is one without an error.
///
/// # Panics
/// When it is not, or does not come within [`PATIENCE`].
#[track_caller]
pub fn ends_well(vm: &mut Vm) {
    let status = vm.wait(PATIENCE).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
}

/// A Linux guest's script has ended without an error, and then the VM.
///
/// # Panics
/// As [`expect`] and [`ends_well`].
#[track_caller]
pub fn script_ends_well(vm: &mut Vm) {
    expect(vm, "GUEST-END status=0");
    ends_well(vm);
}

/// A VM with a QMP socket whose bare guest has done its work and sleeps.
///
/// # Panics
/// When there is no KVM, or the guest does not come that far.
#[must_use]
pub fn sleeping_guest() -> Vm {
    crate::host::require_kvm();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::Machine.path(), "end=halt")
        .with_qmp()
        .start()
        .unwrap_or_else(|e| panic!("{e}"));
    expect(&mut vm, "MACHINE OK");
    vm
}

/// A VM that was started. Its end ends all its processes.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    watched: Watched,
    /// The serial port, or standard output when the serial port is elsewhere.
    pub console: Console,
    dir: tempfile::TempDir,
    qmp: Option<PathBuf>,
    /// Every process that was seen below this one, watched since, so that a reused id is not taken for it.
    seen: Vec<Watched>,
}

impl Vm {
    /// A VM with the serial port on this program's pipes.
    #[must_use]
    pub fn builder() -> VmBuilder {
        VmBuilder {
            program: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            serial: true,
            qmp: false,
        }
    }

    /// The control process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.watched.pid
    }

    /// A folder that goes away with the VM.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn messages(&self) -> String {
        std::fs::read(self.dir.path().join("stderr"))
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// The processes below the control process: the broker and the devices.
    ///
    /// # Errors
    /// When the control process is gone.
    pub fn processes(&mut self) -> Result<Vec<i32>, VmError> {
        let pids = procfs::descendants(self.pid()).map_err(system("list the VM's processes"))?;
        for &pid in &pids {
            if self.seen.iter().all(|w| w.pid != pid) {
                // One that has ended meanwhile needs no watch.
                self.seen.extend(Watched::new(pid).ok());
            }
        }
        Ok(pids)
    }

    /// The process that runs the binary `name`, for example "block".
    ///
    /// # Errors
    /// When the processes cannot be listed.
    pub fn process(&mut self, name: &str) -> Result<Option<i32>, VmError> {
        let pids = self.processes()?;
        Ok(pids
            .into_iter()
            .find(|&p| procfs::Status::of(p).is_ok_and(|s| s.name() == name)))
    }

    /// Connects to its QMP socket.
    ///
    /// # Errors
    /// When it was started without one, or does not answer.
    pub fn qmp(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.qmp_socket()?, &self.watched, Duration::from_secs(30))
    }

    /// The path of its QMP socket.
    ///
    /// # Errors
    /// When it was started without one.
    pub fn qmp_socket(&self) -> Result<PathBuf, QmpError> {
        self.qmp
            .clone()
            .ok_or_else(|| QmpError::Io(io::Error::other("this VM was started without QMP")))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, VmError> {
        if !self
            .watched
            .ended(Deadline::after(limit))
            .map_err(system("watch the VM"))?
        {
            return Err(VmError::StillRuns {
                limit,
                messages: self.messages() + &self.standing(),
            });
        }
        self.child.wait().map_err(system("reap the VM"))
    }

    /// Waits for a text on the console; see [`Console::wait_for`]. A failure also shows the VM's own messages.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String, String> {
        self.console
            .wait_for(text, limit)
            .map_err(|e| self.explain(&e))
    }

    /// An error of the console with the VM's own messages.
    #[must_use]
    pub fn explain(&self, error: &ConsoleError) -> String {
        format!(
            "{error}\nthe VM's messages:\n{}{}",
            self.messages(),
            self.standing()
        )
    }

    /// Where its threads stand, and what the kernel said last: a VM that is late may wait for a device, or for a kernel that told why.
    fn standing(&self) -> String {
        let below = procfs::descendants(self.pid()).unwrap_or_default();
        let threads: String = std::iter::once(self.pid())
            .chain(below)
            .map(procfs::standing)
            .collect();
        format!(
            "its threads:\n{threads}the kernel's last messages:\n{}",
            crate::host::kernel_log(20)
        )
    }

    /// Kills the control process, as an operator who is out of patience does.
    ///
    /// # Errors
    /// When it is gone.
    pub fn kill(&mut self) -> Result<(), VmError> {
        self.child.kill().map_err(system("kill the VM"))
    }

    /// Of the processes that were ever seen below the control process, and of those that have its standard error now, those that
    /// still run at `deadline`. The control process has ended.
    #[must_use]
    pub fn survivors(&self, deadline: Deadline) -> Vec<i32> {
        let others = procfs::complaining_to(&self.dir.path().join("stderr")).unwrap_or_default();
        let others = others.into_iter().filter(|pid| *pid != self.pid());
        let others: Vec<_> = others.filter_map(|pid| Watched::new(pid).ok()).collect();
        self.seen
            .iter()
            .chain(&others)
            .filter(|w| !w.ended(deadline).unwrap_or(false))
            .map(|w| w.pid)
            .collect()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // All of these fail only when there is nothing left to end.
        let _ = self.processes();
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.survivors(Deadline::after(Duration::from_millis(500))) {
            eprintln!("process {pid} has outlived its VM; killing it");
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}
