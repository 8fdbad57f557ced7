//! Back ends that are added while the guest runs, within the policy's rule.
//!
//! **Job.** Holds the granted folders open from the start, finds what is asked for beneath them, checks descriptors that
//! clients passed, and keeps each back end until it is removed, so that a restart of its device gets the very same one.
//!
//! **Who is not trusted.** The control process, which asks. A name is resolved below a folder that was opened before the
//! guest ran, without `..`, links or mounts of `/proc` ([`openat2`](openat2)); whatever else it says is compared with the
//! grant. Descriptors may be anything that the control process holds: only files, block devices, taps and sockets are taken,
//! and the device that gets them holds guest memory anyhow.
//!
//! **Why this way.** The folder's descriptor is the grant: no later rename or link changes what it stands for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use ipc::control::BackendGrant;
use ipc::control::added::{Addition, AdditionGrant, Additions};
use ipc::limits::{MAX_ADDED_BACKENDS, MAX_NET_QUEUE_PAIRS};
use ipc::spec::DeviceSpec;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};

use super::open::Hold;

/// What the kernel does with packets is outside of every jail, so that it takes a grant.
pub(crate) const NO_VHOST: &str = "vhost takes -hotplug vhost=on when the VM is started";

/// A granted folder.
#[derive(Debug)]
struct Root {
    path: PathBuf,
    folder: OwnedFd,
    readonly: bool,
}

/// An added back end.
#[derive(Debug)]
struct Backend {
    grant: BackendGrant,
    /// On an image or folder.
    hold: Option<Hold>,
    /// What came along.
    given: Vec<OwnedFd>,
    /// Queue pairs of a tap.
    queues: u16,
    /// Device that it belongs to.
    user: Option<u32>,
    /// Numbers of the images below it, while it belongs to a device.
    below: Vec<u32>,
    /// Devices that have it below an image of theirs.
    under: Vec<u32>,
}

/// What a device is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) grant: BackendGrant,
    pub(super) hold: Option<Hold>,
}

/// A tap that takes the place of the one that a card has.
#[derive(Debug)]
pub(super) struct OtherTap {
    pub(super) grant: BackendGrant,
    /// What came along, for this process and those after it.
    pub(super) given: Vec<OwnedFd>,
}

/// The rule, and what was added.
#[derive(Debug, Default)]
pub(super) struct Added {
    images: Vec<Root>,
    folders: Vec<Root>,
    sockets: Vec<Root>,
    taps: Vec<String>,
    /// Sockets that the command line names, in the order of their numbers.
    named: Vec<PathBuf>,
    vhost: bool,
    backends: BTreeMap<u32, Backend>,
}

impl Added {
    /// Opens the folders that the policy grants.
    pub(super) fn new(additions: &Additions) -> Result<Self, String> {
        let mut added = Self::default();
        for grant in &additions.grants {
            match grant {
                AdditionGrant::Images { path, readonly } => {
                    added.images.push(Root::open("images", path, *readonly)?);
                }
                AdditionGrant::Folders { path, readonly } => {
                    added.folders.push(Root::open("folders", path, *readonly)?);
                }
                AdditionGrant::Tap { ifname } => added.taps.push(ifname.clone()),
                AdditionGrant::Daemon { id, path } => {
                    let number = added.named.len() as u32;
                    let mut backend = Backend::daemon(path.clone(), Vec::new());
                    backend.grant = BackendGrant::Socket {
                        option: format!("-chardev id={id}"),
                        path: path.clone(),
                    };
                    added.backends.insert(number, backend);
                    added.named.push(path.clone());
                }
                AdditionGrant::Vhost => added.vhost = true,
                AdditionGrant::Sockets { path } => {
                    added.sockets.push(Root::open("sockets", path, false)?);
                }
            }
        }
        Ok(added)
    }

    /// Opens what is asked for and keeps it as number `number`. `fds` came along.
    pub(super) fn add(
        &mut self,
        number: u32,
        addition: &Addition,
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if number >= MAX_ADDED_BACKENDS || self.backends.contains_key(&number) {
            return Err(format!("back end {number} is not free"));
        }
        let backend = self.open(addition, fds)?;
        self.backends.insert(number, backend);
        Ok(())
    }

    /// What `addition` asks for, if the policy allows it. `fds` came along.
    fn open(&self, addition: &Addition, fds: Vec<OwnedFd>) -> Result<Backend, String> {
        let expected = matches!(
            addition,
            Addition::GivenImage { .. } | Addition::GivenTap | Addition::GivenSocket
        );
        if expected == fds.is_empty() {
            return Err("descriptors are missing, or nobody asked for them".into());
        }
        let backend = match addition {
            Addition::Image {
                path,
                readonly,
                direct,
            } => {
                let file = find(&self.images, "images", path, *readonly)?;
                Backend::held(
                    BackendGrant::Image {
                        path: path.clone(),
                        readonly: *readonly,
                        direct: *direct,
                        backing: Vec::new(),
                    },
                    file,
                )?
            }
            Addition::Folder { path, readonly } => {
                let file = find(&self.folders, "folders", path, *readonly)?;
                if !file.metadata().is_ok_and(|meta| meta.is_dir()) {
                    return Err(format!("{}: not a folder", path.display()));
                }
                Backend::held(BackendGrant::Folder { path: path.clone() }, file)?
            }
            Addition::GivenImage { readonly, direct } => given_image(fds, *readonly, *direct)?,
            Addition::Tap { ifname, queues } => {
                if !self.taps.contains(ifname) {
                    let there = granted(self.taps.iter().map(|tap| format!("tap={tap}")));
                    return Err(format!(
                        "ifname {ifname} is not one of the taps that may be added (-hotplug: {there}); grant it when the VM is started"
                    ));
                }
                if !(1..=MAX_NET_QUEUE_PAIRS).contains(queues) {
                    return Err(format!(
                        "queues {queues} is out of range; allowed: 1 to {MAX_NET_QUEUE_PAIRS}"
                    ));
                }
                Backend {
                    grant: BackendGrant::Tap {
                        ifname: ifname.clone(),
                        queues: *queues,
                    },
                    hold: None,
                    given: Vec::new(),
                    queues: *queues,
                    user: None,
                    below: Vec::new(),
                    under: Vec::new(),
                }
            }
            Addition::GivenTap => given_tap(fds)?,
            Addition::Socket { path } => {
                // The daemon may have made it anew by the time a device is made of it: only the name is kept.
                self.socket(path)?;
                Backend::daemon(path.clone(), Vec::new())
            }
            Addition::GivenSocket => given_socket(fds)?,
        };
        // Whoever adds it learns of a mistake, not whoever plugs a device. A tap is attached to by its device only.
        if let Some(hold) = &backend.hold {
            hold.reopen(&backend.grant)?;
        }
        Ok(backend)
    }

    /// Another tap for a card with `pairs` queue pairs. `fds` came along.
    pub(super) fn tap(
        &self,
        pairs: u16,
        addition: &Addition,
        fds: Vec<OwnedFd>,
    ) -> Result<OtherTap, String> {
        let (Addition::Tap { .. } | Addition::GivenTap) = addition else {
            return Err("only a tap takes the place of a tap".into());
        };
        let tap = self.open(addition, fds)?;
        if tap.queues != pairs {
            return Err(format!(
                "the tap has {} queues for a card with {pairs} queue pairs",
                tap.queues
            ));
        }
        Ok(OtherTap {
            grant: tap.grant,
            given: tap.given,
        })
    }

    /// The back end of device `index`, if that was added, is `tap` from now on.
    pub(super) fn retap(&mut self, index: u32, tap: OtherTap) -> Option<OtherTap> {
        let backends = self.backends.values_mut();
        let Some(backend) = backends.into_iter().find(|one| one.user == Some(index)) else {
            return Some(tap);
        };
        backend.grant = tap.grant;
        backend.given = tap.given;
        None
    }

    /// Lets go of back end `number`.
    pub(super) fn remove(&mut self, number: u32) -> Result<(), String> {
        match self.backends.get(&number) {
            None => Err(format!("there is no back end {number}")),
            Some(Backend {
                user: Some(user), ..
            }) => Err(format!("back end {number} belongs to device {user}")),
            Some(Backend { under, .. }) if !under.is_empty() => {
                let above = under[0];
                Err(format!(
                    "back end {number} is below an image of device {above}"
                ))
            }
            Some(_) if (number as usize) < self.named.len() => {
                Err(format!("back end {number} is of the command line"))
            }
            Some(_) => {
                self.backends.remove(&number);
                Ok(())
            }
        }
    }

    /// Gives back end `number` to device `index` if `spec` is one for it; `below` are those of the images below a qcow2 image,
    /// which its process gets for reading whatever they were added for.
    pub(super) fn give(
        &mut self,
        number: u32,
        below: &[u32],
        index: u32,
        spec: &DeviceSpec,
    ) -> Result<Parts, String> {
        spec.check()
            .map_err(|what| format!("device {:?}: {what}", spec.id()))?;
        let backend = self.free_one(number)?;
        if let Some(above) = backend.under.first() {
            return Err(format!(
                "back end {number} is below an image of device {above}"
            ));
        }
        if matches!(spec, DeviceSpec::Net(card) if card.vhost) && !self.vhost {
            return Err(format!("device {:?}: {NO_VHOST}", spec.id()));
        }
        let images = match spec {
            DeviceSpec::Block(spec) => spec.io.format.images(),
            _ => 1,
        };
        let fits = images == 1 + below.len()
            && match (spec, &backend.grant) {
                (
                    DeviceSpec::Block(spec),
                    BackendGrant::Image {
                        readonly, direct, ..
                    },
                ) => spec.direct == *direct && (spec.readonly || !*readonly),
                (DeviceSpec::Net(spec), BackendGrant::Tap { .. }) => {
                    spec.queue_pairs == backend.queues
                }
                (DeviceSpec::Net(spec), BackendGrant::Given) => {
                    spec.queue_pairs == backend.queues && backend.hold.is_none()
                }
                (DeviceSpec::Block(spec), BackendGrant::Given) => {
                    backend.image_mode() == Some((spec.readonly, spec.direct))
                }
                (DeviceSpec::Net(spec), BackendGrant::Socket { .. }) => !spec.control_queue,
                (DeviceSpec::Block(_) | DeviceSpec::Fs(_), BackendGrant::Socket { .. }) => true,
                (DeviceSpec::Fs(spec), BackendGrant::Folder { path }) => {
                    spec.readonly || find(&self.folders, "folders", path, false).is_ok()
                }
                _ => false,
            };
        if !fits {
            return Err(format!(
                "device {:?} is not one for back end {number}",
                spec.id()
            ));
        }
        let mut parts = Parts {
            grant: backend.grant.clone(),
            hold: backend.hold.as_ref().map(Hold::share).transpose()?,
        };
        if let (BackendGrant::Image { readonly, .. }, DeviceSpec::Block(spec)) =
            (&mut parts.grant, spec)
        {
            // Less than was added, never more.
            *readonly = spec.readonly;
        }
        for (at, lower) in below.iter().enumerate() {
            if *lower == number || below[..at].contains(lower) {
                return Err(format!("back end {lower} is below itself"));
            }
            self.put_below(&mut parts, *lower, spec)?;
        }
        for lower in below {
            if let Some(lower) = self.backends.get_mut(lower) {
                lower.under.push(index);
            }
        }
        if let Some(backend) = self.backends.get_mut(&number) {
            backend.user = Some(index);
            backend.below = below.to_vec();
        }
        Ok(parts)
    }

    /// Back end `number`, which belongs to nobody.
    fn free_one(&self, number: u32) -> Result<&Backend, String> {
        match self.backends.get(&number) {
            None => Err(format!("there is no back end {number}")),
            Some(Backend {
                user: Some(user), ..
            }) => Err(format!("back end {number} belongs to device {user}")),
            Some(backend) => Ok(backend),
        }
    }

    /// Adds image `number` to the lower end of what a disk is made of.
    fn put_below(&self, parts: &mut Parts, number: u32, spec: &DeviceSpec) -> Result<(), String> {
        let lower = self.free_one(number)?;
        match (&mut parts.grant, &lower.grant) {
            (BackendGrant::Image { backing, .. }, BackendGrant::Image { path, .. }) => {
                backing.push(path.clone());
                if let (Some(all), Some(hold)) = (&mut parts.hold, &lower.hold) {
                    all.and(hold.share()?);
                }
                Ok(())
            }
            (BackendGrant::Given, BackendGrant::Given) => {
                let direct = matches!(spec, DeviceSpec::Block(spec) if spec.direct);
                if lower.image_mode() == Some((true, direct)) {
                    return Ok(());
                }
                Err(format!(
                    "device {:?}: the descriptor of an image below is not one for reading, or its cache.direct is not that of the image above",
                    spec.id()
                ))
            }
            _ => Err(format!(
                "device {:?}: the images of a chain come all by name or all as descriptors",
                spec.id()
            )),
        }
    }

    /// Descriptors for device `index` whose back end came along.
    pub(super) fn duplicates(&self, index: u32) -> Result<Vec<OwnedFd>, String> {
        let backend = self
            .backends
            .values()
            .find(|backend| backend.user == Some(index))
            .ok_or_else(|| format!("device {index} has no back end"))?;
        let below = backend.below.iter();
        let below = below.filter_map(|number| self.backends.get(number));
        std::iter::once(backend)
            .chain(below)
            .flat_map(|backend| &backend.given)
            .map(|fd| {
                fd.try_clone()
                    .map_err(|e| format!("device {index}: descriptor: {e}"))
            })
            .collect()
    }

    /// A connection to the daemon behind device `index`.
    pub(super) fn connection(&mut self, index: u32) -> Result<OwnedFd, String> {
        let users = self.backends.values_mut();
        let Some(backend) = users.into_iter().find(|one| one.user == Some(index)) else {
            return Err(format!("device {index} has no back end"));
        };
        let BackendGrant::Socket { option, path } = &backend.grant else {
            return Err(format!("device {index} is nobody else's"));
        };
        if self.named.contains(path) {
            return super::open::foreign(option, path);
        }
        if path.as_os_str().is_empty() {
            return backend.given.pop().ok_or_else(|| {
                "the socket came as a descriptor, which serves one device once".into()
            });
        }
        let path = path.clone();
        let socket = self.socket(&path)?;
        super::open::connect_at(&path, &socket)
    }

    /// The socket at `path`, only to hold it.
    fn socket(&self, path: &Path) -> Result<File, String> {
        let file = find(&self.sockets, "sockets", path, true)?;
        match file.metadata() {
            Ok(meta) if meta.file_type().is_socket() => Ok(file),
            Ok(_) => Err(format!("{}: not a socket", path.display())),
            Err(e) => Err(format!("{}: {e}", path.display())),
        }
    }

    /// Takes back what device `index` had.
    pub(super) fn free(&mut self, index: u32) {
        for backend in self.backends.values_mut() {
            if backend.user == Some(index) {
                backend.user = None;
                backend.below = Vec::new();
            }
            backend.under.retain(|above| *above != index);
        }
    }
}

impl Root {
    fn open(what: &str, path: &Path, readonly: bool) -> Result<Self, String> {
        File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)
            .map(|folder| Self {
                path: path.to_owned(),
                folder: folder.into(),
                readonly,
            })
            .map_err(|e| format!("-hotplug {what}={}: cannot open: {e}", path.display()))
    }
}

impl Backend {
    fn held(grant: BackendGrant, file: File) -> Result<Self, String> {
        Ok(Self {
            grant,
            hold: Some(Hold::of(file)),
            given: Vec::new(),
            queues: 0,
            user: None,
            below: Vec::new(),
            under: Vec::new(),
        })
    }

    /// Somebody else's; `path` is empty if a connection came along.
    fn daemon(path: PathBuf, given: Vec<OwnedFd>) -> Self {
        Self {
            grant: BackendGrant::Socket {
                option: "chardev-add".into(),
                path,
            },
            hold: None,
            below: Vec::new(),
            under: Vec::new(),
            given,
            queues: 0,
            user: None,
        }
    }

    /// `readonly` and `direct` of an image that came along.
    fn image_mode(&self) -> Option<(bool, bool)> {
        let [fd] = self.given.as_slice() else {
            return None;
        };
        let file = File::from(fd.try_clone().ok()?);
        let kind = file.metadata().ok()?;
        if !is_image(&kind) {
            return None;
        }
        let flags = flags(fd).ok()?;
        Some((
            flags & OFlag::O_ACCMODE == OFlag::O_RDONLY,
            flags.contains(OFlag::O_DIRECT),
        ))
    }
}

/// Opens `path`, which must lie beneath one of `roots`, only to hold it.
fn find(roots: &[Root], what: &str, path: &Path, readonly: bool) -> Result<File, String> {
    let told = |text: String| format!("{}: {text}", path.display());
    let plain = path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !plain {
        return Err(told(
            "not an absolute path, or one with '..'; it must be beneath a folder that -hotplug grants"
                .into(),
        ));
    }
    let beneath = |root: &&Root| path.starts_with(&root.path) && (readonly || !root.readonly);
    // The longest that fits: grants may lie inside each other.
    let Some(root) = roots
        .iter()
        .filter(beneath)
        .max_by_key(|root| root.path.components().count())
    else {
        let there = granted(roots.iter().map(|root| {
            format!(
                "{what}={}{}",
                root.path.display(),
                if root.readonly { ",readonly=on" } else { "" }
            )
        }));
        return Err(told(format!(
            "not beneath a folder that may be used for this (-hotplug: {there}); grant its folder when the VM is started"
        )));
    };
    let name = path.strip_prefix(&root.path).unwrap_or(Path::new(""));
    let name = if name.as_os_str().is_empty() {
        Path::new(".")
    } else {
        name
    };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    openat2(&root.folder, name, how)
        .map(File::from)
        .map_err(|e| {
            told(match e {
                Errno::ELOOP => "leads through a symbolic link, which is not followed here".into(),
                Errno::EXDEV => format!("leads out of {}", root.path.display()),
                other => format!("cannot open: {}", other.desc()),
            })
        })
}

fn granted(all: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = all.collect();
    if all.is_empty() {
        "none".into()
    } else {
        all.join(", ")
    }
}

fn is_image(meta: &std::fs::Metadata) -> bool {
    meta.is_file() || meta.file_type().is_block_device()
}

fn flags(fd: &OwnedFd) -> Result<OFlag, String> {
    nix::fcntl::fcntl(fd.as_fd(), FcntlArg::F_GETFL)
        .map(OFlag::from_bits_retain)
        .map_err(|e| e.desc().to_owned())
}

fn given_image(fds: Vec<OwnedFd>, readonly: bool, direct: bool) -> Result<Backend, String> {
    let told = |what: String| format!("the image's descriptor: {what}");
    let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
        return Err(told("exactly one is needed".into()));
    };
    let file = File::from(fd);
    if !file.metadata().is_ok_and(|meta| is_image(&meta)) {
        return Err(told("neither a regular file nor a block device".into()));
    }
    let mut fd = OwnedFd::from(file);
    let mut now = flags(&fd).map_err(told)?;
    let access = now & OFlag::O_ACCMODE;
    if now.contains(OFlag::O_PATH) || access == OFlag::O_WRONLY {
        return Err(told("is not open for reading".into()));
    }
    if !readonly && access != OFlag::O_RDWR {
        return Err(told(
            "is open for reading only; open it for both, or use read-only".into(),
        ));
    }
    if readonly && access != OFlag::O_RDONLY {
        // The device process must not hold more than it may do.
        let file = File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|e| {
            told(format!(
                "cannot be made one for reading only: {e}; pass one that is"
            ))
        })?;
        fd = file.into();
        now = flags(&fd).map_err(told)?;
    }
    let kept = now - OFlag::O_ACCMODE - OFlag::O_DIRECT - OFlag::O_NONBLOCK;
    let wanted = kept
        | if direct {
            OFlag::O_DIRECT
        } else {
            OFlag::empty()
        };
    nix::fcntl::fcntl(fd.as_fd(), FcntlArg::F_SETFL(wanted)).map_err(|e| match e {
        Errno::EINVAL if direct => {
            told("its file system does not support O_DIRECT; use cache.direct=false".into())
        }
        other => told(other.desc().into()),
    })?;
    ipc::image::lock(&fd, readonly).map_err(|e| told(e.to_string()))?;
    Ok(Backend {
        grant: BackendGrant::Given,
        hold: None,
        given: vec![fd],
        queues: 0,
        user: None,
        below: Vec::new(),
        under: Vec::new(),
    })
}

fn given_tap(fds: Vec<OwnedFd>) -> Result<Backend, String> {
    let queues = u16::try_from(fds.len())
        .ok()
        .filter(|count| *count <= MAX_NET_QUEUE_PAIRS)
        .ok_or_else(|| {
            format!("too many descriptors for a tap; allowed: 1 to {MAX_NET_QUEUE_PAIRS}")
        })?;
    for fd in &fds {
        ipc::tap::check(fd).map_err(|what| format!("the tap's descriptor: {what}"))?;
    }
    Ok(Backend {
        grant: BackendGrant::Given,
        hold: None,
        given: fds,
        queues,
        user: None,
        below: Vec::new(),
        under: Vec::new(),
    })
}

fn given_socket(fds: Vec<OwnedFd>) -> Result<Backend, String> {
    let told = |what: &str| format!("the socket's descriptor: {what}");
    let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
        return Err(told("exactly one is needed"));
    };
    // Others carry no descriptors, and may keep whoever closes them (SO_LINGER).
    match getsockname::<SockaddrStorage>(fd.as_raw_fd()).map(|name| name.family()) {
        Ok(Some(AddressFamily::Unix)) => Ok(Backend::daemon(PathBuf::new(), vec![fd])),
        Ok(_) => Err(told("not a unix socket")),
        Err(Errno::ENOTSOCK) => Err(told("not a socket")),
        Err(e) => Err(told(e.desc())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn image(path: &Path, readonly: bool) -> Addition {
        Addition::Image {
            path: path.to_owned(),
            readonly,
            direct: false,
        }
    }

    fn rule(dir: &Path) -> Added {
        Added::new(&Additions {
            devices: 4,
            grants: vec![
                AdditionGrant::Images {
                    path: dir.join("images"),
                    readonly: false,
                },
                AdditionGrant::Images {
                    path: dir.join("images/base"),
                    readonly: true,
                },
                AdditionGrant::Images {
                    path: dir.join("frozen"),
                    readonly: true,
                },
                AdditionGrant::Tap {
                    ifname: "tap7".into(),
                },
                AdditionGrant::Sockets {
                    path: dir.join("frozen"),
                },
            ],
        })
        .unwrap()
    }

    fn spec(readonly: bool) -> DeviceSpec {
        DeviceSpec::Block(ipc::spec::block::BlockSpec {
            id: "d".into(),
            readonly,
            direct: false,
            serial: String::new(),
            num_queues: 1,
            queue_size: 256,
            io: ipc::spec::block::BlockIo::default(),
        })
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["images/deep", "images/base", "frozen", "outside"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        for file in [
            "images/a",
            "images/deep/b",
            "frozen/c",
            "outside/d",
            "images/base/e",
        ] {
            fs::write(dir.path().join(file), [0; 4096]).unwrap();
        }
        symlink("../outside/d", dir.path().join("images/link")).unwrap();
        symlink("../outside", dir.path().join("images/out")).unwrap();
        dir
    }

    #[test]
    fn images_are_found_beneath_a_grant_and_nowhere_else() {
        let dir = tree();
        let at = |name: &str| dir.path().join(name);
        let mut added = rule(dir.path());
        for (number, name) in (0..).zip(["images/a", "images/deep/b"]) {
            added
                .add(number, &image(&at(name), false), Vec::new())
                .unwrap();
        }
        added
            .add(3, &image(&at("frozen/c"), true), Vec::new())
            .unwrap();
        for (path, readonly, part) in [
            (at("outside/d"), true, "not beneath a folder"),
            (at("frozen/c"), false, "not beneath a folder"),
            (at("images/link"), true, "symbolic link"),
            (at("images/out/d"), true, "symbolic link"),
            (at("images/../outside/d"), true, "'..'"),
            (PathBuf::from("images/a"), true, "not an absolute path"),
            (at("images/none"), true, "cannot open"),
            (at("images/deep"), true, "neither a regular file"),
            (at("imagesandmore"), true, "not beneath a folder"),
        ] {
            let refused = added
                .add(9, &image(&path, readonly), Vec::new())
                .unwrap_err();
            assert!(refused.contains(part), "{}: {refused}", path.display());
        }
    }

    #[test]
    fn a_folder_that_is_renamed_or_replaced_later_stays_the_one_that_was_granted() {
        let dir = tree();
        let at = |name: &str| dir.path().join(name);
        let mut added = rule(dir.path());
        fs::rename(at("images"), at("moved")).unwrap();
        symlink(at("outside"), at("images")).unwrap();
        let refused = added.add(0, &image(&at("images/d"), true), Vec::new());
        assert!(refused.unwrap_err().contains("cannot open"));
        added
            .add(0, &image(&at("images/a"), true), Vec::new())
            .unwrap();
    }

    #[test]
    fn a_back_end_belongs_to_one_device_of_its_kind() {
        let dir = tree();
        let mut added = rule(dir.path());
        let disk = image(&dir.path().join("images/a"), false);
        added.add(0, &disk, Vec::new()).unwrap();
        assert!(added.add(0, &disk, Vec::new()).is_err(), "taken");
        assert!(added.add(MAX_ADDED_BACKENDS, &disk, Vec::new()).is_err());
        assert!(added.give(1, &[], 7, &spec(false)).is_err(), "not there");
        let mut wrong = spec(false);
        if let DeviceSpec::Block(spec) = &mut wrong {
            spec.num_queues = 4000;
        }
        assert!(
            added
                .give(0, &[], 7, &wrong)
                .unwrap_err()
                .contains("num-queues")
        );
        added.give(0, &[], 7, &spec(false)).unwrap();
        assert!(added.give(0, &[], 8, &spec(false)).is_err(), "used");
        assert!(added.remove(0).is_err(), "used");
        added.free(7);
        added.remove(0).unwrap();
        assert!(added.remove(0).is_err());
    }

    #[test]
    fn a_chain_is_read_below_its_top_and_stays_as_long_as_a_device_has_it() {
        let dir = tree();
        let at = |name: &str| dir.path().join(name);
        let mut added = rule(dir.path());
        for (number, name, readonly) in [
            (0, "images/a", false),
            // As libvirt adds it: for writing, and the format over it for reading.
            (1, "images/deep/b", false),
            (2, "images/base/e", true),
        ] {
            added
                .add(number, &image(&at(name), readonly), Vec::new())
                .unwrap();
        }
        let chain = |below| {
            let mut chain = spec(false);
            if let DeviceSpec::Block(spec) = &mut chain {
                spec.io.format = ipc::spec::block::ImageFormat::Qcow2 {
                    below,
                    raw_base: true,
                    most: 0,
                };
            }
            chain
        };
        for (below, images, part) in [
            (&[1, 2][..], 1, "not one for back end 0"),
            (&[1], 2, "not one for back end 0"),
            (&[1, 0], 2, "back end 0 is below itself"),
            (&[1, 1], 2, "back end 1 is below itself"),
            (&[1, 7], 2, "no back end 7"),
        ] {
            let refused = added.give(0, below, 5, &chain(images)).unwrap_err();
            assert!(refused.contains(part), "{below:?}: {refused}");
        }
        // Nothing of that is left.
        let parts = added.give(0, &[1, 2], 5, &chain(2)).unwrap();
        let fds = parts.hold.unwrap().reopen(&parts.grant).unwrap();
        let modes: Vec<OFlag> = fds
            .iter()
            .map(|fd| flags(fd).unwrap() & OFlag::O_ACCMODE)
            .collect();
        assert_eq!(modes, [OFlag::O_RDWR, OFlag::O_RDONLY, OFlag::O_RDONLY]);
        let there: Vec<PathBuf> = fds
            .iter()
            .map(|fd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap())
            .collect();
        assert_eq!(
            there,
            ["images/a", "images/deep/b", "images/base/e"].map(at)
        );
        for number in 0..3 {
            let refused = added.remove(number).unwrap_err();
            assert!(refused.contains("device 5"), "{refused}");
        }
        let refused = added.give(2, &[], 6, &spec(true)).err().unwrap();
        assert!(refused.contains("below an image of device 5"), "{refused}");
        added.free(5);
        for number in 0..3 {
            added.remove(number).unwrap();
        }
    }

    #[test]
    fn descriptors_are_files_with_no_more_rights_than_the_device() {
        let dir = tree();
        let path = dir.path().join("outside/d");
        let open = |write: bool| {
            OwnedFd::from(File::options().read(true).write(write).open(&path).unwrap())
        };
        let mut added = rule(dir.path());
        let given = |readonly| Addition::GivenImage {
            readonly,
            direct: false,
        };
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let refused = added.add(0, &given(false), vec![socket.into()]);
        assert!(refused.unwrap_err().contains("neither a regular file"));
        let refused = added.add(0, &given(false), vec![open(false)]);
        assert!(refused.unwrap_err().contains("for reading only"));
        assert!(added.add(0, &given(false), Vec::new()).is_err());
        assert!(
            added
                .add(0, &image(&path, true), vec![open(false)])
                .is_err()
        );
        let refused = added.add(0, &Addition::GivenTap, vec![open(true)]);
        assert!(refused.unwrap_err().contains("not an open tap"));
        added.add(0, &given(true), vec![open(true)]).unwrap();
        assert!(added.give(0, &[], 7, &spec(false)).is_err());
        added.give(0, &[], 7, &spec(true)).unwrap();
        let fds = added.duplicates(7).unwrap();
        let access = flags(&fds[0]).unwrap() & OFlag::O_ACCMODE;
        assert_eq!(access, OFlag::O_RDONLY);
        added.free(7);
        // A chain of descriptors, and one that is half of names.
        let mut chain = spec(true);
        if let DeviceSpec::Block(spec) = &mut chain {
            spec.io.format = ipc::spec::block::ImageFormat::Qcow2 {
                below: 1,
                raw_base: false,
                most: 0,
            };
        }
        let other = |write: bool| {
            let path = dir.path().join("images/deep/b");
            OwnedFd::from(File::options().read(true).write(write).open(path).unwrap())
        };
        added.add(1, &given(false), vec![other(true)]).unwrap();
        let named = image(&dir.path().join("images/a"), true);
        added.add(2, &named, Vec::new()).unwrap();
        let refused = added.give(0, &[1], 7, &chain).err().unwrap();
        assert!(refused.contains("not one for reading"), "{refused}");
        let refused = added.give(0, &[2], 7, &chain).err().unwrap();
        assert!(refused.contains("all by name"), "{refused}");
        added.remove(1).unwrap();
        added.add(1, &given(true), vec![other(false)]).unwrap();
        added.give(0, &[1], 7, &chain).unwrap();
        assert_eq!(added.duplicates(7).unwrap().len(), 2);
    }

    #[test]
    fn daemons_are_found_beneath_a_grant_and_whenever_they_listen() {
        use std::io::{Read, Write};
        use std::os::unix::net::{UnixListener, UnixStream};
        let dir = tree();
        let at = |name: &str| dir.path().join(name);
        let mut added = rule(dir.path());
        let socket = |name: &str| Addition::Socket { path: at(name) };
        let disk = spec(false);
        let first = UnixListener::bind(at("frozen/socket")).unwrap();
        let _outside = UnixListener::bind(at("outside/socket")).unwrap();
        symlink("../outside/socket", at("frozen/link")).unwrap();
        for (name, why) in [
            ("outside/socket", "not beneath a folder"),
            ("frozen/link", "symbolic link"),
            ("frozen/../outside/socket", "'..'"),
            ("frozen/none", "No such file"),
            ("frozen/c", "not a socket"),
        ] {
            let refused = added.add(9, &socket(name), Vec::new()).unwrap_err();
            assert!(refused.contains(why), "{name}: {refused}");
        }
        added.add(0, &socket("frozen/socket"), Vec::new()).unwrap();
        added.give(0, &[], 7, &disk).unwrap();
        let mut hear = |listener: &UnixListener| {
            let mut ours = UnixStream::from(added.connection(7).unwrap());
            let (mut theirs, _) = listener.accept().unwrap();
            theirs.write_all(b"x").unwrap();
            ours.read_exact(&mut [0]).unwrap();
        };
        hear(&first);
        // The daemon left, and another one listens.
        drop(first);
        fs::remove_file(at("frozen/socket")).unwrap();
        hear(&UnixListener::bind(at("frozen/socket")).unwrap());
        let refused = added.connection(7).unwrap_err();
        assert!(refused.contains("cannot connect"), "{refused}");
        // A connection serves once, and is one.
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let given = Addition::GivenSocket;
        added.add(1, &given, vec![ours.into()]).unwrap();
        added.give(1, &[], 8, &disk).unwrap();
        added.connection(8).unwrap();
        assert!(added.connection(8).unwrap_err().contains("once"));
        let file = File::open(at("outside/d")).unwrap();
        let refused = added.add(2, &given, vec![file.into()]).unwrap_err();
        assert!(refused.contains("not a socket"), "{refused}");
        let other = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let refused = added.add(2, &given, vec![other.into()]).unwrap_err();
        assert!(refused.contains("not a unix socket"), "{refused}");
        assert!(added.add(2, &given, Vec::new()).is_err());
    }

    #[test]
    fn a_tap_must_be_granted_by_its_name() {
        let dir = tree();
        let mut added = rule(dir.path());
        let tap = |ifname: &str, queues| Addition::Tap {
            ifname: ifname.into(),
            queues,
        };
        let refused = added.add(0, &tap("tap8", 1), Vec::new()).unwrap_err();
        assert!(refused.contains("tap=tap7"), "{refused}");
        assert!(added.add(0, &tap("tap7", 17), Vec::new()).is_err());
        added.add(0, &tap("tap7", 2), Vec::new()).unwrap();
    }
}
