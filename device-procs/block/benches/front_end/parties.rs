//! # Who takes part
//!
//! **Job.** Starts each back end on the same file, and its rings. **Who is not trusted.** Nobody.
//! **Why this way.** Ours is the process that ships, with its filter on; the peer has an I/O thread of its own with QEMU's default
//! polling, which is its best.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use device_host::test_frontend::DeviceProcess;
use device_host::test_frontend::polled::PolledFrontend;
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use nix::sys::socket::{getsockopt, sockopt};

use crate::loads::QUEUES;
use crate::options::Options;
use crate::ring::{self, Ring};

/// The file, which goes away with this.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    pub(crate) file: PathBuf,
}

impl Place {
    pub(crate) fn make(options: &Options) -> Self {
        let base = options.dir.as_deref().unwrap_or(Path::new("/var/tmp"));
        let folder = tempfile::tempdir_in(base).unwrap();
        let path = folder.path().join("disk");
        let mut file = File::create(&path).unwrap();
        // Written, not only sized: a hole would be read from nowhere.
        std::io::copy(
            &mut std::io::Read::take(std::io::repeat(0x5a), options.bytes()),
            &mut file,
        )
        .unwrap();
        file.sync_all().unwrap();
        Self { folder, file: path }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

enum Process {
    Ours(DeviceProcess),
    Peer(Child),
    Stranger,
}

/// One back end that serves the file.
pub(crate) struct Party {
    pub(crate) name: String,
    pub(crate) pid: i32,
    pub(crate) rings: Vec<Ring>,
    front: PolledFrontend,
    process: Process,
}

impl Party {
    fn new(name: String, pid: i32, process: Process, socket: UnixStream) -> Self {
        let (front, rings) = ring::connect(socket);
        Self {
            name,
            pid,
            rings,
            front,
            process,
        }
    }

    /// Closes the connection, with which a back end ends.
    pub(crate) fn finish(self) {
        drop(self.front);
        match self.process {
            Process::Ours(process) => {
                process.finish_well();
            }
            Process::Peer(mut child) => {
                // It would wait for the next front end.
                child.kill().unwrap();
                child.wait().unwrap();
            }
            Process::Stranger => {}
        }
    }
}

/// The process that ships.
pub(crate) fn ours(options: &Options, place: &Place) -> Party {
    let flags = if options.direct { libc::O_DIRECT } else { 0 };
    let image = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(&place.file)
        .unwrap();
    let spec = DeviceSpec::Block(BlockSpec {
        id: "bench".into(),
        readonly: false,
        direct: options.direct,
        serial: String::new(),
        num_queues: QUEUES as u16,
        queue_size: ring::SIZE,
        io: Default::default(),
    });
    let program = env!("CARGO_BIN_EXE_block");
    let mut process = DeviceProcess::start(program, spec, vec![image.into()]);
    let socket = process.socket();
    let pid = i32::try_from(process.id()).unwrap();
    Party::new("block".into(), pid, Process::Ours(process), socket)
}

fn qemu(options: &Options, place: &Place) -> Party {
    let path = place.folder().join("qemu");
    let listener = UnixListener::bind(&path).unwrap();
    let child = Command::new("sh")
        .args(["-c", "exec qemu-storage-daemon \"$@\" 3<&0 </dev/null", "-"])
        .args(["--object", "iothread,id=io"])
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=disk,aio=io_uring,locking=off,cache.direct={},filename={}",
            if options.direct { "on" } else { "off" },
            place.file.display()
        ))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=out,node-name=disk,writable=on,iothread=io,num-queues={QUEUES},addr.type=fd,addr.str=3"
        ))
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let socket = UnixStream::connect(&path).unwrap();
    let name = "qemu-storage-daemon".to_owned();
    Party::new(name, pid, Process::Peer(child), socket)
}

fn stranger(path: &Path) -> Party {
    let socket = UnixStream::connect(path)
        .unwrap_or_else(|error| panic!("--socket {}: {error}", path.display()));
    let pid = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)
        .unwrap()
        .pid();
    let name = path.display().to_string();
    Party::new(name, pid, Process::Stranger, socket)
}

/// Ours first.
pub(crate) fn all(options: &Options, place: &Place) -> Vec<Party> {
    let mut all = vec![ours(options, place)];
    if options.peers {
        all.push(qemu(options, place));
    }
    all.extend(options.sockets.iter().map(|path| stranger(path)));
    all
}
