//! What the broker may do for one VM, and where the control process finds it.
//!
//! **Job.** Turns a [`VmSpec`] into the broker's [`Policy`] and names the numbers of its entries. **Who is not trusted**:
//! nobody yet; but whatever is not in this list cannot be opened later, whoever asks. **Why this way.** Pure, so that what
//! a command line grants can be tested without opening anything.

use ipc::PROTOCOL_VERSION;
use ipc::control::added::{AdditionGrant, Additions};
use ipc::control::{BackendGrant, DeviceGrant, FileGrant, Policy, SnapshotGrant};
use ipc::limits;
use ipc::spec::DeviceSpec;
use ipc::spec::block::{BlockIo, BlockSpec};
use ipc::spec::fs::{FsCache, FsSpec};
use ipc::spec::net::NetSpec;
use ipc::spec::vm::{
    ChardevBackend, ChardevSpec, DeviceKind, DeviceOption, DriveSpec, FsSource, FsdevSpec,
    MachineKind, MonitorAddress, MonitorSpec, NetBackend, NetdevSpec, VmSpec,
};

/// The broker's policy, with the numbers of its entries by their use. Numbers of files index [`Policy::files`], those of
/// devices [`Policy::devices`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What the broker may do.
    pub policy: Policy,
    /// File of the kernel; `None` with machine none.
    pub kernel: Option<u32>,
    /// File of the initrd.
    pub initrd: Option<u32>,
    /// Backing of each zone of guest memory; `None` for the memfd.
    pub memory: Vec<Option<u32>>,
    /// Files `state` and `memory` of the snapshot to go on from.
    pub incoming: Option<[u32; 2]>,
    /// QMP sockets, in the order of [`VmSpec::monitors`].
    pub monitors: Vec<MonitorPlan>,
    /// Chardevs that something uses, with their ids.
    pub chardevs: Vec<(String, ChardevPlan)>,
    /// Devices, in the order of [`VmSpec::devices`].
    pub devices: Vec<u32>,
}

/// One QMP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MonitorPlan {
    /// Its file.
    pub file: u32,
    /// It listens; otherwise it is one connected client.
    pub server: bool,
    /// The VM waits for its first client.
    pub wait: bool,
}

/// One chardev.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChardevPlan {
    /// This process's descriptors 0 and 1.
    Stdio,
    /// A pseudo terminal: the file is its controlling side.
    Pty {
        /// Its file.
        file: u32,
    },
    /// A listening socket.
    Listener {
        /// Its file.
        file: u32,
        /// The VM waits for its first client.
        wait: bool,
    },
    /// A connected socket.
    Connected {
        /// Its file.
        file: u32,
    },
    /// A file for output.
    Output {
        /// Its file.
        file: u32,
    },
}

/// Lists what `spec` needs. `stdin_is_terminal`: descriptor 0 is a terminal.
///
/// A device whose drive or netdev does not exist is left out; [`super::parse`] gives no such spec.
pub fn plan(spec: &VmSpec, stdin_is_terminal: bool) -> Plan {
    let mut files = Files(Vec::new());
    let read = |option: &str, path: &std::path::PathBuf| FileGrant::Read {
        option: option.into(),
        path: path.clone(),
    };
    let kernel = spec
        .boot
        .kernel
        .as_ref()
        .map(|path| files.add(read("-kernel", path)));
    let initrd = spec
        .boot
        .initrd
        .as_ref()
        .map(|path| files.add(read("-initrd", path)));
    let memory = spec.memory.zones.iter().map(|zone| {
        zone.path.as_ref().map(|path| {
            files.add(FileGrant::Memory {
                option: match &zone.id {
                    None => "-mem-path ".into(),
                    Some(id) => format!("-object memory-backend-file,id={id},mem-path="),
                },
                path: path.clone(),
                size: zone.size,
                share: zone.share,
            })
        })
    });
    let memory = memory.collect();
    let incoming = spec.incoming.as_ref().map(|folder| {
        ["state", "memory"].map(|file| files.add(read("-incoming", &folder.join(file))))
    });
    let monitors = spec
        .monitors
        .iter()
        .map(|monitor| files.monitor(monitor))
        .collect();
    let chardevs: Vec<_> = spec
        .chardevs
        .iter()
        .filter(|chardev| spec.serial.as_ref() == Some(&chardev.id))
        .map(|chardev| (chardev.id.clone(), files.chardev(chardev)))
        .collect();
    let devices: Vec<DeviceGrant> = spec
        .devices
        .iter()
        .filter_map(|device| device_grant(spec, device))
        .collect();
    let stdio = chardevs
        .iter()
        .any(|(_, chardev)| *chardev == ChardevPlan::Stdio);
    Plan {
        devices: (0_u32..).take(devices.len()).collect(),
        policy: Policy {
            version: PROTOCOL_VERSION,
            files: files.0,
            additions: additions(spec, devices.len()),
            growing: growing(spec),
            vhost_fds: vhost_fds(spec),
            iothreads: spec.iothreads.iter().map(|one| one.cpus).collect(),
            devices,
            snapshots: snapshots(spec),
            userfault: spec.incoming.is_some() && spec.incoming_lazy,
            seccomp: spec.seccomp,
            sandbox: spec.sandbox,
            log_level: spec.log.level,
            log_file: spec.log.file.clone(),
            pidfile: spec.pidfile.clone(),
            restore_terminal: stdio && stdin_is_terminal,
            daemonize: spec.daemonize,
        },
        kernel,
        initrd,
        memory,
        incoming,
        monitors,
        chardevs,
    }
}

/// Where snapshots may be made, if there is a guest.
fn snapshots(spec: &VmSpec) -> Option<SnapshotGrant> {
    let possible = spec.machine.kind == MachineKind::Microvm && !spec.snapshot_dirs.is_empty();
    possible.then(|| SnapshotGrant {
        folders: spec.snapshot_dirs.clone(),
        memory: spec.memory.size,
    })
}

/// What may be added later: as many devices as the board has room for, if there is anybody to ask for them.
fn additions(spec: &VmSpec, devices: usize) -> Additions {
    let possible = spec.machine.kind == MachineKind::Microvm && !spec.monitors.is_empty();
    let room = if possible {
        limits::MAX_MMIO_DEVICES.saturating_sub(devices)
    } else {
        0
    };
    let mut grants = spec.hotplug.clone();
    if room > 0 {
        let most = limits::MAX_ADDED_BACKENDS as usize;
        grants.extend(daemons_to_come(spec).take(most));
    }
    Additions {
        devices: u32::try_from(room).unwrap_or(0),
        grants,
    }
}

/// Sockets that nothing uses: `device_add` and `netdev_add` may name them.
fn daemons_to_come(spec: &VmSpec) -> impl Iterator<Item = AdditionGrant> {
    spec.chardevs
        .iter()
        .filter_map(|chardev| match &chardev.backend {
            ChardevBackend::Socket { path, .. } if !chardev_is_used(spec, chardev) => {
                Some(AdditionGrant::Daemon {
                    id: chardev.id.clone(),
                    path: path.clone(),
                })
            }
            _ => None,
        })
}

/// Whether anything of the command line uses `chardev`.
pub(super) fn chardev_is_used(spec: &VmSpec, chardev: &ChardevSpec) -> bool {
    let id = &chardev.id;
    let netdev =
        |one: &NetdevSpec| matches!(&one.backend, NetBackend::Daemon(chardev) if chardev == id);
    let device = |one: &DeviceOption| match &one.kind {
        DeviceKind::ForeignBlock { chardev, .. }
        | DeviceKind::Fs {
            source: FsSource::Chardev(chardev),
            ..
        } => chardev == id,
        _ => false,
    };
    let address = match &chardev.backend {
        ChardevBackend::Socket { path, .. } => Some(MonitorAddress::Unix(path.clone())),
        ChardevBackend::Inherited { fd, .. } => Some(MonitorAddress::Inherited(*fd)),
        _ => None,
    };
    spec.serial.as_ref() == Some(id)
        || spec.netdevs.iter().any(netdev)
        || spec.devices.iter().any(device)
        || spec
            .monitors
            .iter()
            .any(|monitor| Some(&monitor.address) == address.as_ref())
}

struct Files(Vec<FileGrant>);

impl Files {
    /// The number of the new entry.
    fn add(&mut self, grant: FileGrant) -> u32 {
        self.0.push(grant);
        // The command line's own limits keep the list short.
        u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX)
    }

    fn monitor(&mut self, monitor: &MonitorSpec) -> MonitorPlan {
        let option = "-qmp".to_owned();
        let grant = match (&monitor.address, monitor.server) {
            (MonitorAddress::Inherited(fd), listens) => FileGrant::InheritedSocket {
                option: "-chardev".to_owned(),
                fd: *fd,
                listens,
            },
            (MonitorAddress::Unix(path), true) => FileGrant::ListenUnix {
                option,
                path: path.clone(),
            },
            (MonitorAddress::Unix(path), false) => FileGrant::ConnectUnix {
                option,
                path: path.clone(),
            },
            (MonitorAddress::Tcp { host, port }, true) => FileGrant::ListenTcp {
                option,
                host: host.clone(),
                port: *port,
            },
            (MonitorAddress::Tcp { host, port }, false) => FileGrant::ConnectTcp {
                option,
                host: host.clone(),
                port: *port,
            },
        };
        MonitorPlan {
            file: self.add(grant),
            server: monitor.server,
            wait: monitor.server && !monitor.nowait,
        }
    }

    fn chardev(&mut self, chardev: &ChardevSpec) -> ChardevPlan {
        let option = format!("-chardev id={}", chardev.id);
        match &chardev.backend {
            ChardevBackend::Stdio => ChardevPlan::Stdio,
            ChardevBackend::Pty => ChardevPlan::Pty {
                file: self.add(FileGrant::Pty),
            },
            ChardevBackend::Socket {
                path,
                server: true,
                nowait,
            } => ChardevPlan::Listener {
                file: self.add(FileGrant::ListenUnix {
                    option,
                    path: path.clone(),
                }),
                wait: !nowait,
            },
            ChardevBackend::Socket {
                path,
                server: false,
                ..
            } => ChardevPlan::Connected {
                file: self.add(FileGrant::ConnectUnix {
                    option,
                    path: path.clone(),
                }),
            },
            ChardevBackend::Inherited { fd, server, nowait } => {
                let file = self.add(FileGrant::InheritedSocket {
                    option,
                    fd: *fd,
                    listens: *server,
                });
                if *server {
                    ChardevPlan::Listener {
                        file,
                        wait: !nowait,
                    }
                } else {
                    ChardevPlan::Connected { file }
                }
            }
            ChardevBackend::File { path } => ChardevPlan::Output {
                file: self.add(FileGrant::Output {
                    option,
                    path: path.clone(),
                }),
            },
        }
    }
}

/// The disks that have a `max-size`.
fn growing(spec: &VmSpec) -> Vec<(u32, u64)> {
    let most = |device: &DeviceOption| match &device.kind {
        DeviceKind::Block { drive, .. } => {
            let drive = spec.drives.iter().find(|one| one.id == *drive)?;
            drive.max_size
        }
        _ => None,
    };
    (0_u32..)
        .zip(&spec.devices)
        .filter_map(|(index, device)| Some((index, most(device)?)))
        .collect()
}

/// The cards that have inherited descriptors of vhost-net.
fn vhost_fds(spec: &VmSpec) -> Vec<(u32, Vec<i32>)> {
    let fds = |device: &DeviceOption| match &device.kind {
        DeviceKind::Net { netdev, .. } => {
            let netdev = spec.netdevs.iter().find(|one| one.id == *netdev)?;
            (!netdev.vhost_fds.is_empty()).then(|| netdev.vhost_fds.clone())
        }
        _ => None,
    };
    (0_u32..)
        .zip(&spec.devices)
        .filter_map(|(index, device)| Some((index, fds(device)?)))
        .collect()
}

/// What the process of `device` is told, and what it gets; `None` if a back end that it names does not exist.
fn device_grant(spec: &VmSpec, device: &DeviceOption) -> Option<DeviceGrant> {
    let id = device.id.clone();
    let (process, backend) = match &device.kind {
        DeviceKind::Block {
            drive,
            serial,
            num_queues,
            queue_size,
        } => {
            let drive = spec.drives.iter().find(|one| one.id == *drive)?;
            disk(id, drive, serial.as_deref(), (*num_queues, *queue_size))
        }
        DeviceKind::ForeignBlock {
            chardev,
            num_queues,
            queue_size,
        } => (
            foreign_disk(id, (*num_queues, *queue_size)),
            daemon_socket(spec, chardev)?,
        ),
        DeviceKind::Net {
            netdev,
            mac,
            queue_size,
        } => {
            let netdev = spec.netdevs.iter().find(|one| one.id == *netdev)?;
            card(spec, id, netdev, (*mac, *queue_size))?
        }
        DeviceKind::Fs {
            source,
            tag,
            request_queues,
            queue_size,
            window,
        } => {
            let (fsdev, backend) = folder(spec, source)?;
            let process = FsSpec {
                id,
                tag: tag.clone(),
                readonly: fsdev.is_some_and(|fsdev| fsdev.readonly),
                cache: fsdev.map_or(FsCache::default(), |fsdev| fsdev.cache),
                xattr: fsdev.is_some_and(|fsdev| fsdev.xattr),
                posix_acl: fsdev.is_some_and(|fsdev| fsdev.posix_acl),
                users: fsdev.map(|fsdev| fsdev.users.clone()).unwrap_or_default(),
                groups: fsdev.map(|fsdev| fsdev.groups.clone()).unwrap_or_default(),
                request_queues: *request_queues,
                queue_size: *queue_size,
                window: *window,
            };
            (DeviceSpec::Fs(process), backend)
        }
    };
    let iothread = device.iothread.as_ref();
    Some(DeviceGrant {
        spec: process,
        backend,
        iothread: iothread.and_then(|id| spec.iothread(id)),
    })
}

fn disk(
    id: String,
    drive: &DriveSpec,
    serial: Option<&str>,
    (num_queues, queue_size): (u16, u16),
) -> (DeviceSpec, BackendGrant) {
    let process = BlockSpec {
        id,
        readonly: drive.readonly,
        direct: drive.direct,
        serial: serial.unwrap_or_default().to_owned(),
        num_queues,
        queue_size,
        io: drive.io,
    };
    let backend = BackendGrant::Image {
        path: drive.file.clone(),
        readonly: drive.readonly,
        direct: drive.direct,
        backing: drive.backing.clone(),
    };
    (DeviceSpec::Block(process), backend)
}

/// What the daemon knows better is not said here: it tells size, serial and whether the disk can be written.
fn foreign_disk(id: String, (num_queues, queue_size): (u16, u16)) -> DeviceSpec {
    DeviceSpec::Block(BlockSpec {
        id,
        readonly: false,
        direct: false,
        serial: String::new(),
        num_queues,
        queue_size,
        io: BlockIo::default(),
    })
}

fn card(
    spec: &VmSpec,
    id: String,
    netdev: &NetdevSpec,
    (mac, queue_size): ([u8; 6], u16),
) -> Option<(DeviceSpec, BackendGrant)> {
    let backend = match &netdev.backend {
        NetBackend::TapName(ifname) => BackendGrant::Tap {
            ifname: ifname.clone(),
            queues: netdev.queues,
        },
        NetBackend::TapFds(fds) => BackendGrant::Inherited { fds: fds.clone() },
        NetBackend::Daemon(chardev) => daemon_socket(spec, chardev)?,
    };
    let process = NetSpec {
        id,
        mac,
        queue_pairs: netdev.queues,
        queue_size,
        // Daemons leave it to the front end, and ours reads no queue.
        control_queue: !matches!(backend, BackendGrant::Socket { .. }),
        vhost: netdev.vhost,
        limits: netdev.limits,
        stands_in: None,
        poll_us: netdev.poll_us,
    };
    Some((DeviceSpec::Net(process), backend))
}

/// The folder that this VM's own process shares, unless it is behind somebody else's.
fn folder<'a>(
    spec: &'a VmSpec,
    source: &FsSource,
) -> Option<(Option<&'a FsdevSpec>, BackendGrant)> {
    match source {
        FsSource::Fsdev(name) => {
            let fsdev = spec.fsdevs.iter().find(|one| one.id == *name)?;
            let path = fsdev.path.clone();
            Some((Some(fsdev), BackendGrant::Folder { path }))
        }
        FsSource::Chardev(name) => Some((None, daemon_socket(spec, name)?)),
    }
}

/// Where a vhost-user daemon that is somebody else's listens.
fn daemon_socket(spec: &VmSpec, chardev: &str) -> Option<BackendGrant> {
    let found = spec.chardevs.iter().find(|one| one.id == chardev)?;
    let ChardevBackend::Socket { path, .. } = &found.backend else {
        return None;
    };
    Some(BackendGrant::Socket {
        option: format!("-chardev id={chardev}"),
        path: path.clone(),
    })
}
