//! One function per kind of grant: policy entry in, descriptor out.
//!
//! **Job.** Everything that takes a path, an address or an interface name for this VM.
//! **Who is not trusted**: nobody, as grants come from the command line; but paths may be anything, so a file that should
//! be read is not created, a socket is not replaced while somebody listens, and every error names the option, the value
//! and the reason.

use std::collections::hash_map::RandomState;
use std::fs::{File, Metadata};
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use ipc::control::{BackendGrant, FileGrant};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};

use super::cleanup::Cleanup;

/// What was opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) fd: OwnedFd,
    /// Name of the other side of a pseudo terminal.
    pub(super) name: Option<String>,
}

impl From<OwnedFd> for Opened {
    fn from(fd: OwnedFd) -> Self {
        Self { fd, name: None }
    }
}

/// Opens one entry of the policy's files.
pub(super) fn file(
    grant: &FileGrant,
    inherited: &super::process::Inherited,
    cleanup: &mut Cleanup,
) -> Result<Opened, String> {
    match grant {
        FileGrant::Read { option, path } => {
            let file = open(File::options().read(true), path).map_err(|e| {
                format!("{option} {}: cannot open for reading: {e}", path.display())
            })?;
            match file.metadata() {
                Ok(meta) if meta.is_file() => Ok(OwnedFd::from(file).into()),
                Ok(_) => Err(format!("{option} {}: not a regular file", path.display())),
                Err(e) => Err(format!("{option} {}: {e}", path.display())),
            }
        }
        FileGrant::Output { option, path } => open(
            File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600),
            path,
        )
        .map(|file| OwnedFd::from(file).into())
        .map_err(|e| format!("{option} {}: cannot open for writing: {e}", path.display())),
        FileGrant::ListenUnix { option, path } => listen_unix(option, path, cleanup),
        FileGrant::ConnectUnix { option, path } => connect_unix(path)
            .map(|socket| OwnedFd::from(socket).into())
            .map_err(|e| format!("{option} {}: cannot connect: {e}", path.display())),
        FileGrant::ListenTcp { option, host, port } => {
            TcpListener::bind(address(option, host, *port)?)
                .map(|socket| OwnedFd::from(socket).into())
                .map_err(|e| format!("{option} tcp:{host}:{port}: cannot listen: {e}"))
        }
        FileGrant::ConnectTcp { option, host, port } => {
            TcpStream::connect(address(option, host, *port)?)
                .map(|socket| OwnedFd::from(socket).into())
                .map_err(|e| format!("{option} tcp:{host}:{port}: cannot connect: {e}"))
        }
        FileGrant::InheritedSocket { option, fd, .. } => inherited_socket(inherited, *fd)
            .map(Into::into)
            .map_err(|what| format!("{option} fd={fd}: {what}")),
        FileGrant::Pty => pty(),
        FileGrant::Memory {
            option,
            path,
            size,
            share,
        } => memory(option, path, *size, *share).map(Into::into),
    }
}

/// Opens the log of `-D FILE`. A FIFO that nobody reads is an error; later lines that it has no room for are lost.
pub(super) fn log(path: &Path) -> std::io::Result<OwnedFd> {
    open(File::options().create(true).append(true), path).map(OwnedFd::from)
}

fn open(options: &mut std::fs::OpenOptions, path: &Path) -> std::io::Result<File> {
    // A FIFO without a writer must not hold the broker, and a terminal must not become its own.
    options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

/// Connects without waiting: a listener that accepts nobody would hold the broker, and with it the end of the VM.
fn connect_unix(path: &Path) -> std::io::Result<UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// A socket that was there at the start. Whether it listens is looked up by the control process.
fn inherited_socket(inherited: &super::process::Inherited, number: i32) -> Result<OwnedFd, String> {
    let fd = inherited
        .duplicate(number)
        .ok_or("no such open descriptor was inherited")?;
    let file = File::from(fd);
    match file.metadata() {
        Ok(meta) if meta.file_type().is_socket() => Ok(file.into()),
        Ok(_) => Err("not a socket".into()),
        Err(e) => Err(e.to_string()),
    }
}

fn listen_unix(option: &str, path: &Path, cleanup: &mut Cleanup) -> Result<Opened, String> {
    let told = |what: &str| format!("{option} {}: {what}", path.display());
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(told("exists and is not a socket"));
        }
        match connect_unix(path) {
            Ok(_) => return Err(told("another process listens on this socket")),
            // So many clients wait that there is no room for one more.
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(told("another process listens on this socket"));
            }
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                // Left behind by a process that was killed together with its broker.
                std::fs::remove_file(path)
                    .map_err(|e| told(&format!("stale socket cannot be removed: {e}")))?;
            }
            Err(e) => return Err(told(&format!("exists and cannot be tested: {e}"))),
        }
    }
    let listener =
        UnixListener::bind(path).map_err(|e| told(&format!("cannot create the socket: {e}")))?;
    cleanup.created(path.to_path_buf());
    Ok(OwnedFd::from(listener).into())
}

/// Numeric addresses and `localhost` only: a static binary has no name service switch, and a resolver would be one more
/// parser of what comes from a network.
fn address(option: &str, host: &str, port: u16) -> Result<SocketAddr, String> {
    let bare = match host {
        "" => "0.0.0.0",
        "localhost" => "127.0.0.1",
        other => other
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(other),
    };
    bare.parse::<IpAddr>()
        .map(|ip| (ip, port).into())
        .map_err(|_| {
            format!("{option} tcp:{host}:{port}: the host must be a numeric address or localhost")
        })
}

#[allow(unsafe_code)] // TIOCGPTPEER hands a descriptor over as a number
fn pty() -> Result<Opened, String> {
    let failed = |what: &str, e: Errno| format!("-chardev pty: {what}: {}", e.desc());
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let master = nix::pty::posix_openpt(flags).map_err(|e| failed("/dev/ptmx", e))?;
    nix::pty::grantpt(&master).map_err(|e| failed("grantpt", e))?;
    nix::pty::unlockpt(&master).map_err(|e| failed("unlockpt", e))?;
    let name = nix::pty::ptsname_r(&master).map_err(|e| failed("ptsname", e))?;
    // The terminal starts raw: a guest does its own echo and line editing.
    let slave = nix::fcntl::open(
        name.as_str(),
        OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(|e| failed(&name, e))?;
    if let Ok(mut mode) = nix::sys::termios::tcgetattr(&slave) {
        nix::sys::termios::cfmakeraw(&mut mode);
        let _ = nix::sys::termios::tcsetattr(&slave, nix::sys::termios::SetArg::TCSANOW, &mode);
    }
    // SAFETY: `master` gives its descriptor up, so this is the only owner.
    let fd = unsafe { OwnedFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(master)) };
    Ok(Opened {
        fd,
        name: Some(name),
    })
}

/// Backing for guest RAM: in a directory an unlinked file, else the file itself, at least `size` bytes long if it is to be written.
fn memory(option: &str, path: &Path, size: u64, share: bool) -> Result<OwnedFd, String> {
    let told = |what: String| format!("{option}{}: {what}", path.display());
    let (file, fits) = match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => (unlinked(path).map_err(told)?, false),
        _ if share => {
            let mut options = File::options();
            options.read(true).write(true).create(true).mode(0o600);
            let file = open(&mut options, path).map_err(|e| told(format!("cannot open: {e}")))?;
            (file, false)
        }
        found => unshared(path, found.ok().as_ref()).map_err(told)?,
    };
    let now = file.metadata().map_err(|e| told(e.to_string()))?;
    if !now.is_file() {
        return Err(told("neither a directory nor a regular file".into()));
    }
    let block = now.blksize();
    if !fits && now.len() < size {
        file.set_len(size).map_err(|e| {
            told(format!(
                "cannot be made {size} bytes long (page size {block} bytes): {e}"
            ))
        })?;
    }
    Ok(file.into())
}

/// Backing for guest RAM that is not to reach the file at `path`, which is `found` to be so, and whether it has the length that it needs.
/// Device processes can have guest memory only from a file that takes their writes, so this one is opened for reading, and the control
/// process begins with a copy. That would lose huge pages, which only their own file system has: there its folder has another file.
fn unshared(path: &Path, found: Option<&Metadata>) -> Result<(File, bool), String> {
    let folder = path.parent().unwrap_or(path);
    if statfs(folder).is_ok_and(|fs| fs.filesystem_type() == HUGETLBFS_MAGIC) {
        if found.is_some_and(|meta| meta.blocks() > 0) {
            return Err(
                "a file of huge pages that has content, which a guest on huge pages cannot begin with without writing to it: allow that \
                 with mem-share=on (share=on of memory-backend-file), or name the directory"
                    .into(),
            );
        }
        return Ok((unlinked(folder)?, false));
    }
    if found.is_none() {
        // As with other VMMs, a file is there afterwards.
        let mut options = File::options();
        options.write(true).create(true).mode(0o600);
        open(&mut options, path).map_err(|e| format!("cannot be made: {e}"))?;
    }
    let file = open(File::options().read(true), path).map_err(|e| format!("cannot open: {e}"))?;
    Ok((file, true))
}

/// A new file in `folder` that has no name any more.
fn unlinked(folder: &Path) -> Result<File, String> {
    // hugetlbfs has O_TMPFILE since Linux 5.18 only through a fallback: make and unlink works on every version. The name is by chance,
    // since processes of several namespaces have the same ids.
    let state = RandomState::new();
    for attempt in 0..u32::MAX {
        let chance = state.hash_one(attempt);
        let name = folder.join(format!(".stratovirt-ram-{chance:016x}"));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&name);
        let file = match file {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
            other => other.map_err(|e| format!("cannot create a file in it: {e}"))?,
        };
        std::fs::remove_file(&name).map_err(|e| format!("cannot unlink the file in it: {e}"))?;
        return Ok(file);
    }
    Err("cannot find a name for a file in it".into())
}

/// Opens the back end of one device; `inherited` are descriptors that came with the start of the VM.
pub(super) fn backend(
    grant: &BackendGrant,
    device: &str,
    inherited: &super::process::Inherited,
) -> Result<Vec<OwnedFd>, String> {
    match grant {
        BackendGrant::Nothing => Ok(Vec::new()),
        BackendGrant::Given => Err(format!("device {device}: its descriptors are not here")),
        BackendGrant::Image {
            path,
            readonly,
            direct,
            backing,
        } => {
            let top = image(path, path, *readonly, *direct);
            std::iter::once(top)
                .chain(backing.iter().map(|path| image(path, path, true, *direct)))
                .collect()
        }
        BackendGrant::Tap { ifname, queues } => tap(ifname, *queues),
        BackendGrant::Folder { path } => folder(path).map(|fd| vec![fd]),
        BackendGrant::Socket { option, path } => foreign(option, path).map(|fd| vec![fd]),
        BackendGrant::Inherited { fds } => fds
            .iter()
            .map(|number| {
                let fd = inherited.duplicate(*number).ok_or_else(|| {
                    format!("-netdev fd={number}: no such open descriptor was inherited (device {device})")
                })?;
                ipc::tap::check(&fd).map_err(|what| format!("-netdev fd={number}: {what}"))?;
                Ok(fd)
            })
            .collect(),
    }
}

/// Opens a folder that is to be shared, only to hold it.
fn folder(path: &Path) -> Result<OwnedFd, String> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENOTDIR) => format!("-fsdev path={}: not a folder", path.display()),
            _ => format!("-fsdev path={}: cannot open: {e}", path.display()),
        })
}

/// Connects to somebody else's device process at the socket that `at` holds, which the user knows as `path`.
pub(super) fn connect_at(path: &Path, at: &File) -> Result<OwnedFd, String> {
    let held = format!("/proc/self/fd/{}", at.as_raw_fd());
    let connected = connect_unix(Path::new(&held)).map(OwnedFd::from);
    connected.map_err(|e| format!("{}: cannot connect: {e}", path.display()))
}

/// Connects to somebody else's device process.
pub(super) fn foreign(option: &str, path: &Path) -> Result<OwnedFd, String> {
    connect_unix(path).map(OwnedFd::from).map_err(|e| {
        let hint = match e.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                "; a vhost-user daemon must listen there before the VM starts"
            }
            std::io::ErrorKind::WouldBlock => "; its daemon accepts no more connections",
            _ => "",
        };
        format!("{option} {}: cannot connect: {e}{hint}", path.display())
    })
}

/// A hold on a folder, or on an image and those below it, that were opened: neither reads nor writes, and leads to these very
/// files whatever becomes of their paths.
#[derive(Debug)]
pub(super) struct Hold(Vec<File>);

impl Hold {
    /// On the images behind `backend`, if that is what they are.
    pub(super) fn on(grant: &BackendGrant, backend: &[OwnedFd]) -> Result<Option<Self>, String> {
        let told = |option: &str, path: &Path, e| {
            format!("{option}={}: cannot be held: {e}", path.display())
        };
        match (grant, backend) {
            (BackendGrant::Image { path, .. }, images) => images
                .iter()
                .map(|fd| {
                    File::options()
                        .read(true)
                        .custom_flags(libc::O_PATH)
                        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
                })
                .collect::<Result<_, _>>()
                .map(|files| Some(Self(files)))
                .map_err(|e| told("-drive file", path, e)),
            (BackendGrant::Folder { path }, [fd]) => fd
                .try_clone()
                .map(|fd| Some(Self(vec![fd.into()])))
                .map_err(|e| told("-fsdev path", path, e)),
            _ => Ok(None),
        }
    }

    /// On what `file` leads to.
    pub(super) fn of(file: File) -> Self {
        Self(vec![file])
    }

    /// Holds what `below` holds as well, behind what it has.
    pub(super) fn and(&mut self, below: Self) {
        self.0.extend(below.0);
    }

    /// Another hold on the same.
    pub(super) fn share(&self) -> Result<Self, String> {
        let files = self.0.iter().map(File::try_clone);
        files
            .collect::<Result<_, _>>()
            .map(Self)
            .map_err(|e| format!("a back end cannot be held: {e}"))
    }

    /// Opens the images or the folder again as `grant` says.
    pub(super) fn reopen(&self, grant: &BackendGrant) -> Result<Vec<OwnedFd>, String> {
        match grant {
            BackendGrant::Image {
                path,
                readonly,
                direct,
                backing,
            } => std::iter::once((path, *readonly))
                .chain(backing.iter().map(|path| (path, true)))
                .zip(&self.0)
                .map(|((path, readonly), file)| {
                    let held = format!("/proc/self/fd/{}", file.as_raw_fd());
                    image(path, Path::new(&held), readonly, *direct)
                })
                .collect(),
            BackendGrant::Folder { path } => {
                let told = |e| format!("-fsdev path={}: {e}", path.display());
                let folders = self
                    .0
                    .iter()
                    .map(|file| file.try_clone().map(OwnedFd::from));
                folders.collect::<Result<_, _>>().map_err(told)
            }
            _ => Ok(Vec::new()),
        }
    }
}

/// Opens the image at `at`, which the user knows as `path`.
fn image(path: &Path, at: &Path, readonly: bool, direct: bool) -> Result<OwnedFd, String> {
    ipc::image::open(at, readonly, direct)
        .map(OwnedFd::from)
        .map_err(|e| format!("-drive file={}: {e}", path.display()))
}

fn tap(ifname: &str, queues: u16) -> Result<Vec<OwnedFd>, String> {
    ipc::tap::open(ifname, queues).map_err(|e| format!("-netdev ifname={ifname}: {e}"))
}

/// Opens `/dev/vhost-net` once for each of `pairs` queue pairs.
pub(super) fn vhost(pairs: u16, device: &str) -> Result<Vec<OwnedFd>, String> {
    (0..pairs)
        .map(|_| {
            open(File::options().read(true).write(true), Path::new(VHOST_NET))
                .map(OwnedFd::from)
                .map_err(|e| {
                    let hint = match e.raw_os_error() {
                        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                            "; the host's kernel module vhost_net is needed"
                        }
                        Some(libc::EACCES | libc::EPERM) => {
                            "; whoever may open it can pass descriptors by vhostfd= or vhostfds="
                        }
                        _ => "",
                    };
                    format!(
                        "-netdev vhost=on: {VHOST_NET}: cannot open: {e}{hint} (device {device})"
                    )
                })
        })
        .collect()
}

/// Descriptors of `/dev/vhost-net` that were there at the start. Each has one owner in its life, so that none stays here.
pub(super) fn given_vhost(
    fds: &[i32],
    inherited: &mut super::process::Inherited,
    device: &str,
) -> Result<Vec<OwnedFd>, String> {
    fds.iter()
        .map(|number| {
            let told = |what: &str| format!("-netdev vhostfd={number}: {what} (device {device})");
            let fd = inherited
                .take(*number)
                .ok_or_else(|| told("no such open descriptor was inherited"))?;
            is_vhost_net(fd).ok_or_else(|| told("not an open /dev/vhost-net"))
        })
        .collect()
}

const VHOST_NET: &str = "/dev/vhost-net";

/// By its number (`linux/miscdevice.h`), whatever it is called.
fn is_vhost_net(fd: OwnedFd) -> Option<OwnedFd> {
    let file = File::from(fd);
    let kind = file.metadata().ok()?;
    let number = nix::sys::stat::makedev(10, 238);
    (kind.file_type().is_char_device() && kind.rdev() == number).then(|| file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_nobody_reads_does_not_hold_the_broker() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("log");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = log(&fifo).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENXIO));
        let _reader = open(File::options().read(true), &fifo).unwrap();
        log(&fifo).unwrap();
    }

    #[test]
    fn a_listener_that_accepts_nobody_is_not_waited_for() {
        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let _first = connect_unix(&path).unwrap();
        let full = connect_unix(&path).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
        let refused = listen_unix("-qmp", &path, &mut Cleanup::default()).unwrap_err();
        assert!(refused.contains("another process listens"), "{refused}");
    }
}
