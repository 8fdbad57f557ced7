//! Messages between the control process and its broker.
//!
//! **Job.** The control process sends one [`Policy`] before anything else: the complete list of what the broker may ever
//! open, listen on or start. After that, requests name entries of the policy by number and bring nothing that could be
//! opened: no path, no address, no option. A snapshot has a name of one component, in a folder that the policy lists.
//! What may be added to the running VM has rules of its own that the policy fixes as well: [`added`].
//!
//! **Who is not trusted.** After the guest has run, the control process: whoever owns it can ask for what the command line
//! already granted, and for nothing else. The broker never trusts a length or an index, and answers a second policy with
//! an error.
//!
//! **Why this way.** "Opens only what the policy fixed before the guest ran" is then a property of the message types, not
//! of checks.

pub mod added;
pub mod sandbox;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::log::Level;
use crate::spec::DeviceSpec;
use crate::spec::cpus::CpuList;
use crate::start::{SandboxMode, SeccompMode};
use added::{Addition, Additions};
use sandbox::ProcessFacts;

/// Everything the broker may do for this VM, fixed before the guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// [`crate::PROTOCOL_VERSION`] of the control process.
    pub version: u32,
    /// What may be opened, by number.
    pub files: Vec<FileGrant>,
    /// Which device processes may be started, by number.
    pub devices: Vec<DeviceGrant>,
    /// Where the device processes of each iothread run, by its number; `None`: wherever the VM may.
    pub iothreads: Vec<Option<CpuList>>,
    /// Where snapshots may be made; `None` without `-grant snapshot=`.
    pub snapshots: Option<SnapshotGrant>,
    /// What may be added while the guest runs.
    pub additions: Additions,
    /// Disks whose image may grow: their number among the devices, and the bytes that it may have at most.
    pub growing: Vec<(u32, u64)>,
    /// Cards with `vhost=on` that have inherited descriptors for it: their number among the devices, and the descriptors. Others
    /// with it have `/dev/vhost-net` opened.
    pub vhost_fds: Vec<(u32, Vec<i32>)>,
    /// Guest RAM may be a template's in part, so device processes get a `/dev/userfaultfd` if there is one.
    pub userfault: bool,
    /// Seccomp action for the broker and all device processes.
    pub seccomp: SeccompMode,
    /// Whether a missing jail layer refuses the start.
    pub sandbox: SandboxMode,
    /// Least important level that is logged.
    pub log_level: Level,
    /// `-D FILE`, already open for the control process; the broker opens it for itself, for appending.
    pub log_file: Option<PathBuf>,
    /// Process id file to create, and to remove when the VM ends.
    pub pidfile: Option<PathBuf>,
    /// Whether standard input is a terminal that a chardev uses: the broker then puts it back however the VM ends.
    pub restore_terminal: bool,
    /// `-daemonize`: the broker lets go of the caller's standard streams when the VM is set up.
    pub daemonize: bool,
}

/// One thing that the broker may open for the control process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum FileGrant {
    /// An existing file, for reading: a kernel or an initrd. `option` names it in errors.
    Read {
        /// Option on the command line, for errors.
        option: String,
        /// Path.
        path: PathBuf,
    },
    /// A file for output, created or truncated: `-chardev file`.
    Output {
        /// Option on the command line, for errors.
        option: String,
        /// Path.
        path: PathBuf,
    },
    /// A listening unix socket, created here and removed when the VM ends. A stale one that nobody listens on is replaced.
    ListenUnix {
        /// Option on the command line, for errors.
        option: String,
        /// Path.
        path: PathBuf,
    },
    /// A connected unix socket.
    ConnectUnix {
        /// Option on the command line, for errors.
        option: String,
        /// Path.
        path: PathBuf,
    },
    /// A unix stream socket that came with the start of the VM, and listens or is connected.
    InheritedSocket {
        /// Option on the command line, for errors.
        option: String,
        /// Its number.
        fd: i32,
        /// Whether it has to listen.
        listens: bool,
    },
    /// A listening TCP socket.
    ListenTcp {
        /// Option on the command line, for errors.
        option: String,
        /// Host name or address.
        host: String,
        /// Port; 0 lets the kernel choose.
        port: u16,
    },
    /// A connected TCP socket.
    ConnectTcp {
        /// Option on the command line, for errors.
        option: String,
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A new pseudo terminal: the reply brings the controlling side and says the other's name.
    Pty,
    /// Guest memory backing: `-mem-path`, `mem-path=`. In a directory, an unlinked file is made; a file is opened, and created when
    /// absent. A file that is not shared comes open for reading only: guest memory begins with its content and is elsewhere.
    Memory {
        /// Option on the command line, for errors.
        option: String,
        /// Directory or file.
        path: PathBuf,
        /// Bytes of guest RAM that it holds.
        size: u64,
        /// `mem-share=on`, `share=on`: a file takes the guest's writes.
        share: bool,
    },
}

/// Where snapshots of this VM may be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotGrant {
    /// Each of these folders may become a snapshot, or hold some.
    pub folders: Vec<PathBuf>,
    /// Bytes of guest RAM, which the file `memory` has.
    pub memory: u64,
}

/// One device process that the broker may start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceGrant {
    /// What the process is told.
    pub spec: DeviceSpec,
    /// What it holds.
    pub backend: BackendGrant,
    /// Number of its iothread in [`Policy::iothreads`].
    pub iothread: Option<u32>,
}

impl DeviceGrant {
    /// Whether the device's process is somebody else's.
    pub const fn is_foreign(&self) -> bool {
        matches!(self.backend, BackendGrant::Socket { .. })
    }
}

/// The back-end descriptors of a device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum BackendGrant {
    /// None.
    Nothing,
    /// An image: opened read-only or for both as `readonly` says, with `O_DIRECT` as `direct` says.
    Image {
        /// Path.
        path: PathBuf,
        /// `O_RDONLY` instead of `O_RDWR`.
        readonly: bool,
        /// `O_DIRECT`.
        direct: bool,
        /// The images below it, the next one first: opened read-only, and as `direct` says.
        backing: Vec<PathBuf>,
    },
    /// A tap device by name, with `queues` queues.
    Tap {
        /// Interface name, at most 15 bytes.
        ifname: String,
        /// Queue pairs.
        queues: u16,
    },
    /// A folder, which becomes the root of the device process: the process never sees its path.
    Folder {
        /// Path.
        path: PathBuf,
    },
    /// Nobody starts a process: somebody else's listens here, and the control process gets a connection to it.
    Socket {
        /// Option on the command line, for errors.
        option: String,
        /// Path.
        path: PathBuf,
    },
    /// Inherited descriptors, which the broker kept when the VM was started.
    Inherited {
        /// Their numbers, as the command line names them.
        fds: Vec<i32>,
    },
    /// Descriptors that came with an [`Request::Add`]. Never part of a policy.
    Given,
}

/// What the control process asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The first message, once.
    SetPolicy(Policy),
    /// Open entry `index` of [`Policy::files`].
    Open {
        /// Index into the policy's files.
        index: u32,
    },
    /// Start entry `index` of [`Policy::devices`]. One process per entry at a time.
    Start {
        /// Index into the policy's devices.
        index: u32,
    },
    /// End the process of entry `index`.
    Stop {
        /// Index into the policy's devices.
        index: u32,
    },
    /// Start another process of device `index` beside the one that runs, from the program that is at its place now, with the
    /// same descriptors. [`Request::Settle`] ends one of them. A shared folder's cannot be: its keeper has the guest's open
    /// files. There the new one takes them over, and the answer, [`Reply::Started`] or [`Reply::GoesOn`], comes when that is
    /// done, while other requests are answered as ever.
    Upgrade {
        /// Index of the device.
        index: u32,
    },
    /// Start another process of card `index` beside the one that runs, in the same jail, with another tap. Descriptors may come
    /// along. The tap of the process that [`Request::Settle`] keeps is the card's from then on, for processes to come as well.
    Replace {
        /// Index of the device.
        index: u32,
        /// A tap with as many queues as the card has pairs, allowed as one of [`Request::Add`].
        addition: Addition,
    },
    /// One of the two processes of device `index` goes on, and the other is ended.
    Settle {
        /// Index of the device.
        index: u32,
        /// It is the newer one that goes on.
        newer: bool,
    },
    /// Make room for a snapshot, one at a time. A snapshot is a folder with two files; until [`Request::SnapshotEnd`] it has
    /// another name, and what is there stays.
    SnapshotBegin {
        /// Index into [`SnapshotGrant::folders`].
        folder: u32,
        /// Empty memory files that come along as well, through which device processes give what they hold: at most one a device.
        exchanges: u32,
        /// Name of a snapshot in that folder; `None`: the folder itself becomes the snapshot.
        name: Option<String>,
    },
    /// The snapshot's files are written, or it is given up.
    SnapshotEnd {
        /// Write them to the disk and give the snapshot its name; otherwise remove them.
        keep: bool,
    },
    /// Make a new file for a core file of the guest in entry `folder` of the folders where snapshots may be made.
    DumpFile {
        /// Index into [`SnapshotGrant::folders`].
        folder: u32,
        /// Its name, as a snapshot's is; nothing of that name may be there.
        name: String,
    },
    /// Make the image of disk `index` this long, if it is a file and the policy's `growing` allows it. Its process and those
    /// after it keep the limit that they were started with: an [`Request::Upgrade`] follows. A block device of the host has the
    /// size that it has; it must be this one.
    Resize {
        /// Index of the device.
        index: u32,
        /// Bytes, a multiple of 512, and not less than now.
        size: u64,
    },
    /// Open a back end for a device to come, as far as [`Policy::additions`] allows it. Descriptors may come along.
    Add {
        /// Its number, which must be free: below [`MAX_ADDED_BACKENDS`](crate::limits::MAX_ADDED_BACKENDS).
        backend: u32,
        /// What it is.
        addition: Addition,
    },
    /// Let go of an added back end that no device uses.
    Remove {
        /// Its number.
        backend: u32,
    },
    /// Make an added back end the device with number `index`, which must be free, and start its process. From then on
    /// `index` is as good as one of the policy's: [`Request::Start`] and [`Request::Stop`] work with it.
    Plug {
        /// Behind those of the policy's devices, and at most [`Additions::devices`] of them; or that of one that was taken out.
        index: u32,
        /// Number of its back end.
        backend: u32,
        /// Numbers of the images below a qcow2 image, the next one first; added back ends too, and they stay so.
        below: Vec<u32>,
        /// What the process is told.
        spec: DeviceSpec,
        /// Number of its iothread in [`Policy::iothreads`].
        iothread: Option<u32>,
    },
    /// End the process of device `index`, if there is one, and forget the device. One that was plugged gives its number and
    /// its back end free.
    Unplug {
        /// Index of the device.
        index: u32,
    },
    /// Start a process that stands in for card `index`, which was taken out by [`Request::Unplug`] while a driver of the guest had it:
    /// it answers what the driver says on the control queue, and has no back end. [`Request::Unplug`] ends it.
    StandIn {
        /// Index of the device.
        index: u32,
        /// Features that the card offered.
        features: u64,
    },
    /// The VM is set up: write the pid file, let a waiting `-daemonize` parent go.
    Ready,
    /// Read what confines each process of the VM.
    Inspect,
}

/// What the broker answers, and what it tells unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Policy taken.
    PolicySet {
        /// [`crate::PROTOCOL_VERSION`] of the broker.
        version: u32,
    },
    /// [`Request::Open`] worked; one descriptor comes along.
    Opened {
        /// Index of the request.
        index: u32,
        /// Name of the other side of a new pseudo terminal.
        name: Option<String>,
    },
    /// [`Request::Start`] or [`Request::StandIn`] worked; the control process's end of the vhost-user socket comes along. The process is not yet
    /// serving: its first answer on that socket says that it is jailed.
    Started {
        /// Index of the request.
        index: u32,
        /// Process id in the broker's pid namespace; 0 for somebody else's process ([`BackendGrant::Socket`]).
        pid: i32,
    },
    /// [`Request::Stop`] worked and the process is reaped.
    Stopped {
        /// Index of the request.
        index: u32,
    },
    /// [`Request::Settle`] worked, and the other process is reaped.
    Settled {
        /// Index of the request.
        index: u32,
        /// Process id of the one that was ended; 0 if it had ended by itself.
        ended: i32,
    },
    /// [`Request::SnapshotBegin`] worked; descriptors of the files `memory` and `state` come along, then those of the memory files.
    SnapshotBegun,
    /// [`Request::SnapshotEnd`] worked.
    SnapshotEnded,
    /// [`Request::SnapshotBegin`] or [`Request::SnapshotEnd`] failed, and nothing is left of that snapshot.
    SnapshotFailed {
        /// What went wrong, fit for the user.
        message: String,
    },
    /// [`Request::DumpFile`] worked; the file comes along, for writing.
    DumpFile,
    /// [`Request::Add`] worked.
    Added {
        /// Number of the back end.
        backend: u32,
    },
    /// [`Request::Resize`] worked.
    Resized {
        /// Index of the request.
        index: u32,
    },
    /// [`Request::Remove`] worked.
    Removed {
        /// Number of the back end.
        backend: u32,
    },
    /// [`Request::Unplug`] worked, and the process is reaped.
    Unplugged {
        /// Index of the request.
        index: u32,
    },
    /// [`Request::Ready`] is done.
    ReadyDone,
    /// [`Request::Inspect`]: what was read about one process. The control process comes first, then the broker, then every
    /// device that has a process; [`Reply::InspectionDone`] follows.
    Inspected(Box<ProcessFacts>),
    /// The last reply to [`Request::Inspect`], which never fails.
    InspectionDone {
        /// Landlock's version in the running kernel; 0 without Landlock.
        landlock_abi: u32,
    },
    /// A request failed; `message` is complete and fit for the user.
    Failed {
        /// What went wrong, naming option, value and range.
        message: String,
    },
    /// [`Request::Upgrade`] of a shared folder failed: the process that it has goes on.
    GoesOn {
        /// Index of the device.
        index: u32,
        /// What went wrong, fit for the user.
        message: String,
    },
    /// Unasked: a device process ended.
    Exited {
        /// Index into the policy's devices.
        index: u32,
        /// Process id that it had.
        pid: i32,
        /// How it ended.
        how: Exit,
        /// Its last log line, for the error that the user sees.
        last_words: String,
    },
    /// Unasked: the work of a device is done by this process, which the one that was started has started. It is the one that
    /// [`Exited`](Self::Exited) tells about; the other goes on.
    Serves {
        /// Index into the policy's devices.
        index: u32,
        /// Its process id.
        pid: i32,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// With a status.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

/// Whether `name` may be a snapshot's: 1 to 200 letters, digits, `_`, `-`, `.`, and no `.` in front.
pub fn is_snapshot_name(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    #[test]
    fn requests_carry_no_path() {
        // The policy and what may be added beneath its folders are the only requests with a path: the others encode to a
        // tag and a number.
        for request in [
            Request::Open { index: 1 },
            Request::Start { index: 1 },
            Request::Stop { index: 1 },
            Request::Remove { backend: 1 },
            Request::Unplug { index: 1 },
            Request::Upgrade { index: 1 },
        ] {
            assert_eq!(codec::encode(&request).unwrap().len(), 8);
        }
        // A snapshot's name is the one text that the control process chooses; the broker takes one component of plain letters.
        for (name, fine) in [
            ("template-1", true),
            ("a.b_c", true),
            ("", false),
            (".", false),
            ("..", false),
            (".hidden", false),
            ("a/b", false),
            ("/a", false),
            ("a\0b", false),
            ("a b", false),
            (&"n".repeat(256), false),
        ] {
            assert_eq!(is_snapshot_name(name), fine, "{name:?}");
        }
    }
}
