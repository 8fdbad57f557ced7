//! What only the whole command line tells: names that lead nowhere, things used twice, too many of them, contradictions;
//! and the defaults that depend on other options.

use std::path::Path;

use ipc::limits;
use ipc::spec::vm::{
    ChardevBackend, ChardevSpec, DeviceKind, DeviceOption, FsSource, MachineKind, MonitorAddress,
    MonitorSpec, NetBackend, VmSpec,
};

use super::Draft;
use super::device::{Draft as DraftDevice, DraftKind};
use super::error::{CmdlineError, list};
use super::nearest::nearest;

/// MAC address of the first card that has none. The last byte grows with each further one.
const FIRST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// Completes the spec.
pub(super) fn finish(mut draft: Draft) -> Result<VmSpec, CmdlineError> {
    machine(&draft)?;
    let memory = std::mem::take(&mut draft.memory);
    let (memory, notes) = memory.finish(draft.spec.cpus.cpus)?;
    draft.spec.memory = memory;
    draft.spec.ignored.extend(notes);
    affinity(&draft)?;
    devices(&mut draft)?;
    character_devices(&mut draft)?;
    process(&draft)?;
    unused(&mut draft);
    Ok(draft.spec)
}

fn machine(draft: &Draft) -> Result<(), CmdlineError> {
    let spec = &draft.spec;
    match (spec.machine.kind, &spec.boot.kernel) {
        (MachineKind::Microvm, None) => Err(CmdlineError::new(
            "-kernel",
            "",
            "is missing; machine microvm boots a kernel directly, as --help shows",
        )),
        (MachineKind::None, Some(kernel)) => Err(CmdlineError::new(
            "-kernel",
            &kernel.to_string_lossy(),
            "machine none has no guest; leave it out or choose microvm",
        )),
        (MachineKind::None, None) if spec.incoming.is_some() => Err(CmdlineError::new(
            "-incoming",
            &format!(
                "file:{}",
                spec.incoming.as_deref().unwrap_or(Path::new("")).display()
            ),
            "machine none has no guest; leave it out or choose microvm",
        )),
        (MachineKind::None, None) if !draft.devices.is_empty() => Err(CmdlineError::new(
            "-device",
            &draft.devices[0].arg,
            "machine none has no bus; leave it out or choose microvm",
        )),
        _ => Ok(()),
    }
}

/// The position of `id` among `ids`, or an error that says which there are.
pub(super) fn lookup<'a>(
    (option, arg): (&str, &str),
    (key, id): (&str, &str),
    ids: impl Iterator<Item = &'a str> + Clone,
) -> Result<usize, CmdlineError> {
    ids.clone().position(|one| one == id).ok_or_else(|| {
        let near =
            nearest(id, ids.clone()).map_or(String::new(), |near| format!(", nearest is {near}"));
        let there = list(ids);
        let there = if there.is_empty() {
            "there is none".to_owned()
        } else {
            format!("there are: {there}")
        };
        CmdlineError::new(
            option,
            arg,
            format!("{key} {id} does not exist{near}; {there}"),
        )
    })
}

fn affinity(draft: &Draft) -> Result<(), CmdlineError> {
    let last = draft.spec.cpus.cpus.saturating_sub(1);
    for (one, arg) in draft.spec.vcpu_affinity.iter().zip(&draft.affinity_args) {
        if let Some(vcpu) = one.vcpu.filter(|vcpu| *vcpu > last) {
            return Err(CmdlineError::new(
                "-vcpu-affinity",
                arg,
                format!("vCPU {vcpu} does not exist; allowed: 0 to {last}"),
            ));
        }
    }
    Ok(())
}

fn devices(draft: &mut Draft) -> Result<(), CmdlineError> {
    let all = std::mem::take(&mut draft.devices);
    let mut placed = Placed::new(&draft.spec, &all);
    for device in all {
        placed.add(device)?;
    }
    draft.spec.devices = placed.done;
    Ok(())
}

/// The devices that fit to all else, and to those before them.
struct Placed<'a> {
    spec: &'a VmSpec,
    /// Ids that the command line gives, of devices that are not looked at yet, too.
    named: Vec<String>,
    /// Addresses of cards, likewise, and those that were chosen here.
    macs: Vec<[u8; 6]>,
    disks: usize,
    nics: usize,
    folders: usize,
    done: Vec<DeviceOption>,
}

impl<'a> Placed<'a> {
    fn new(spec: &'a VmSpec, all: &[DraftDevice]) -> Self {
        let mac = |device: &DraftDevice| match device.kind {
            DraftKind::Net { mac, .. } => mac,
            DraftKind::Block { .. } | DraftKind::ForeignBlock { .. } | DraftKind::Fs { .. } => None,
        };
        Self {
            spec,
            named: all.iter().filter_map(|device| device.id.clone()).collect(),
            macs: all.iter().filter_map(mac).collect(),
            disks: 0,
            nics: 0,
            folders: 0,
            done: Vec::new(),
        }
    }

    fn add(&mut self, device: DraftDevice) -> Result<(), CmdlineError> {
        let arg = &device.arg;
        if let Some(iothread) = &device.iothread {
            let ids = self.spec.iothreads.iter().map(|one| one.id.as_str());
            lookup(("-device", arg), ("iothread", iothread), ids)?;
        }
        let kind = self.kind(arg, device.kind)?;
        if self.done.len() == limits::MAX_MMIO_DEVICES {
            return Err(wrong(
                arg,
                format!(
                    "one device too many; allowed: 0 to {}",
                    limits::MAX_MMIO_DEVICES
                ),
            ));
        }
        let id = device.id.unwrap_or_else(|| self.free_id(&kind));
        self.done.push(DeviceOption {
            id,
            kind,
            iothread: device.iothread,
            restart: device.restart,
            bootindex: device.bootindex,
        });
        Ok(())
    }

    /// What the device is, if what it names is there and free.
    fn kind(&mut self, arg: &str, kind: DraftKind) -> Result<DeviceKind, CmdlineError> {
        let queues = u16::from(self.spec.cpus.cpus).min(limits::MAX_BLOCK_QUEUES);
        Ok(match kind {
            DraftKind::Block {
                drive,
                serial,
                num_queues,
                queue_size,
            } => {
                self.drive(arg, &drive)?;
                self.one_more_disk(arg)?;
                DeviceKind::Block {
                    drive,
                    serial,
                    num_queues: num_queues.unwrap_or(queues),
                    queue_size,
                }
            }
            DraftKind::ForeignBlock {
                chardev,
                num_queues,
                queue_size,
            } => {
                daemon_socket(self.spec, arg, &chardev, &self.done)?;
                self.one_more_disk(arg)?;
                DeviceKind::ForeignBlock {
                    chardev,
                    num_queues: num_queues.unwrap_or(queues),
                    queue_size,
                }
            }
            DraftKind::Net {
                netdev,
                mac,
                mq,
                queue_size,
            } => {
                self.netdev(arg, &netdev, mq)?;
                DeviceKind::Net {
                    netdev,
                    mac: mac.unwrap_or_else(|| self.free_mac()),
                    queue_size,
                }
            }
            DraftKind::Fs {
                source,
                tag,
                request_queues,
                queue_size,
                window,
            } => {
                self.folder(arg, &source, &tag)?;
                DeviceKind::Fs {
                    source,
                    tag,
                    request_queues,
                    queue_size,
                    window,
                }
            }
        })
    }

    fn drive(&self, arg: &str, drive: &str) -> Result<(), CmdlineError> {
        let ids = self.spec.drives.iter().map(|drive| drive.id.as_str());
        lookup(("-device", arg), ("drive", drive), ids)?;
        match self
            .user(|kind| matches!(kind, DeviceKind::Block { drive: theirs, .. } if theirs == drive))
        {
            Some(user) => Err(wrong(
                arg,
                format!("drive {drive} is used by device {user}"),
            )),
            None => Ok(()),
        }
    }

    fn one_more_disk(&mut self, arg: &str) -> Result<(), CmdlineError> {
        self.disks += 1;
        if self.disks > limits::MAX_MICROVM_DISKS {
            return Err(wrong(
                arg,
                format!(
                    "one disk too many; allowed: 0 to {}",
                    limits::MAX_MICROVM_DISKS
                ),
            ));
        }
        Ok(())
    }

    fn netdev(&mut self, arg: &str, netdev: &str, mq: Option<bool>) -> Result<(), CmdlineError> {
        let ids = self.spec.netdevs.iter().map(|netdev| netdev.id.as_str());
        let at = lookup(("-device", arg), ("netdev", netdev), ids)?;
        if let Some(user) = self
            .user(|kind| matches!(kind, DeviceKind::Net { netdev: theirs, .. } if theirs == netdev))
        {
            return Err(wrong(
                arg,
                format!("netdev {netdev} is used by device {user}"),
            ));
        }
        self.nics += 1;
        if self.nics > limits::MAX_MICROVM_NICS {
            return Err(wrong(
                arg,
                format!(
                    "one network card too many; allowed: 0 to {}",
                    limits::MAX_MICROVM_NICS
                ),
            ));
        }
        let netdev = &self.spec.netdevs[at];
        if let NetBackend::Daemon(chardev) = &netdev.backend {
            daemon_socket(self.spec, arg, chardev, &self.done)?;
        }
        let (id, queues) = (&netdev.id, netdev.queues);
        if mq == Some(false) && queues > 1 {
            return Err(wrong(
                arg,
                format!("mq=off contradicts the {queues} queues of netdev {id}"),
            ));
        }
        Ok(())
    }

    fn folder(&mut self, arg: &str, source: &FsSource, tag: &str) -> Result<(), CmdlineError> {
        fs_source(self.spec, arg, source, &self.done)?;
        if let Some(user) =
            self.user(|kind| matches!(kind, DeviceKind::Fs { tag: theirs, .. } if theirs == tag))
        {
            return Err(wrong(arg, format!("tag {tag} is used by device {user}")));
        }
        self.folders += 1;
        Ok(())
    }

    /// The id of the device before of which this is so.
    fn user(&self, is: impl Fn(&DeviceKind) -> bool) -> Option<&str> {
        let user = self.done.iter().find(|other| is(&other.kind))?;
        Some(&user.id)
    }

    /// The first address from [`FIRST_MAC`] on that no card has. There are fewer cards than addresses.
    fn free_mac(&mut self) -> [u8; 6] {
        let mut mac = FIRST_MAC;
        while self.macs.contains(&mac) {
            mac[5] = mac[5].wrapping_add(1);
        }
        self.macs.push(mac);
        mac
    }

    /// An id made from kind and position, which nobody has chosen.
    fn free_id(&self, kind: &DeviceKind) -> String {
        let (prefix, count) = match kind {
            DeviceKind::Block { .. } | DeviceKind::ForeignBlock { .. } => {
                ("virtio-blk", self.disks)
            }
            DeviceKind::Net { .. } => ("virtio-net", self.nics),
            DeviceKind::Fs { .. } => ("virtio-fs", self.folders),
        };
        let mut id = format!("{prefix}{}", count - 1);
        while self.named.contains(&id) {
            id.push('\'');
        }
        id
    }
}

fn wrong(arg: &str, text: String) -> CmdlineError {
    CmdlineError::new("-device", arg, text)
}

/// The socket of a vhost-user daemon is there, and nobody else's.
fn daemon_socket(
    spec: &VmSpec,
    arg: &str,
    id: &str,
    done: &[DeviceOption],
) -> Result<(), CmdlineError> {
    let fail = |text: String| wrong(arg, text);
    let ids = spec.chardevs.iter().map(|chardev| chardev.id.as_str());
    let at = lookup(("-device", arg), ("chardev", id), ids)?;
    if !matches!(spec.chardevs[at].backend, ChardevBackend::Socket { .. }) {
        return Err(fail(format!(
            "chardev {id} is not of a kind that a vhost-user daemon has; allowed: socket with path="
        )));
    }
    if spec.serial.as_deref() == Some(id) {
        return Err(fail(format!("chardev {id} is used by -serial")));
    }
    match done.iter().find(|other| daemon(spec, other) == Some(id)) {
        Some(user) => Err(fail(format!("chardev {id} is used by device {}", user.id))),
        None => Ok(()),
    }
}

/// The fsdev or the socket of a shared folder is there, and nobody else's.
fn fs_source(
    spec: &VmSpec,
    arg: &str,
    source: &FsSource,
    done: &[DeviceOption],
) -> Result<(), CmdlineError> {
    let fail = |text: String| wrong(arg, text);
    let id = match source {
        FsSource::Fsdev(id) => {
            let ids = spec.fsdevs.iter().map(|fsdev| fsdev.id.as_str());
            lookup(("-device", arg), ("fsdev", id), ids)?;
            id
        }
        FsSource::Chardev(id) => return daemon_socket(spec, arg, id, done),
    };
    let user = done.iter().find(
        |other| matches!(&other.kind, DeviceKind::Fs { source: theirs, .. } if theirs == source),
    );
    match user {
        Some(user) => Err(fail(format!("fsdev {id} is used by device {}", user.id))),
        None => Ok(()),
    }
}

fn character_devices(draft: &mut Draft) -> Result<(), CmdlineError> {
    let ids = || {
        draft
            .spec
            .chardevs
            .iter()
            .map(|chardev| chardev.id.as_str())
    };
    if let Some(serial) = &draft.spec.serial {
        lookup(("-serial", &draft.serial_arg), ("chardev", serial), ids())?;
    }
    // Those of -mon are added behind them.
    let of_qmp = draft.spec.monitors.len();
    let mut used: Vec<String> = draft.spec.serial.iter().cloned().collect();
    used.extend(daemons(&draft.spec).map(str::to_owned));
    for (arg, id) in std::mem::take(&mut draft.mon_args) {
        let at = lookup(
            ("-mon", &arg),
            ("chardev", &id),
            draft.spec.chardevs.iter().map(|one| one.id.as_str()),
        )?;
        let fail = |text: String| CmdlineError::new("-mon", &arg, text);
        if used.contains(&id) {
            return Err(fail(format!("chardev {id} is used already")));
        }
        let (address, server, nowait) = match &draft.spec.chardevs[at].backend {
            ChardevBackend::Socket {
                path,
                server,
                nowait,
            } => (MonitorAddress::Unix(path.clone()), server, nowait),
            ChardevBackend::Inherited { fd, server, nowait } => {
                (MonitorAddress::Inherited(*fd), server, nowait)
            }
            _ => {
                return Err(fail(format!(
                    "chardev {id} is not of a kind that QMP takes; allowed: socket"
                )));
            }
        };
        if draft
            .spec
            .monitors
            .iter()
            .any(|other| other.address == address)
        {
            return Err(fail("this address has a monitor already".into()));
        }
        let monitor = MonitorSpec {
            address,
            server: *server,
            nowait: *nowait,
        };
        draft.spec.monitors.push(monitor);
        used.push(id);
    }
    same_socket(&draft.spec, &draft.chardev_args, of_qmp)
}

/// Ids of the chardevs behind which vhost-user daemons are.
fn daemons(spec: &VmSpec) -> impl Iterator<Item = &str> {
    spec.devices
        .iter()
        .filter_map(|device| daemon(spec, device))
}

/// Id of the chardev behind which this device's daemon is, if it is somebody else's.
fn daemon<'a>(spec: &'a VmSpec, device: &'a DeviceOption) -> Option<&'a str> {
    match &device.kind {
        DeviceKind::Net { netdev, .. } => {
            let netdev = spec.netdevs.iter().find(|one| one.id == *netdev)?;
            match &netdev.backend {
                NetBackend::Daemon(chardev) => Some(chardev),
                _ => None,
            }
        }
        DeviceKind::ForeignBlock { chardev, .. } => Some(chardev),
        DeviceKind::Fs {
            source: FsSource::Chardev(id),
            ..
        } => Some(id),
        _ => None,
    }
}

/// Two chardevs cannot share a path or a descriptor, nor one with one of the first `qmp` monitors, which are those of
/// `-qmp`.
fn same_socket(spec: &VmSpec, args: &[String], qmp: usize) -> Result<(), CmdlineError> {
    let path_of = |at: usize| -> Option<&Path> {
        match &spec.chardevs[at].backend {
            ChardevBackend::Socket { path, .. } | ChardevBackend::File { path } => Some(path),
            ChardevBackend::Stdio | ChardevBackend::Pty | ChardevBackend::Inherited { .. } => None,
        }
    };
    let fd_of = |at: usize| match &spec.chardevs[at].backend {
        ChardevBackend::Inherited { fd, .. } => Some(*fd),
        _ => None,
    };
    let fail = |at: usize, text: String| {
        CmdlineError::new("-chardev", args.get(at).map_or("", String::as_str), text)
    };
    let of_qmp = |path: &Path| {
        spec.monitors[..qmp].iter().any(
            |monitor| matches!(&monitor.address, MonitorAddress::Unix(theirs) if theirs == path),
        )
    };
    for at in 0..spec.chardevs.len() {
        if let Some(path) = path_of(at)
            && let Some(other) = (0..at).find(|&other| path_of(other) == Some(path))
        {
            let other = &spec.chardevs[other].id;
            return Err(fail(
                at,
                format!("path {} is also that of chardev {other}", path.display()),
            ));
        }
        if let Some(path) = path_of(at).filter(|path| of_qmp(path)) {
            return Err(fail(
                at,
                format!("path {} is also that of a -qmp", path.display()),
            ));
        }
        if let Some(fd) = fd_of(at)
            && let Some(other) = (0..at).find(|&other| fd_of(other) == Some(fd))
        {
            let other = &spec.chardevs[other].id;
            return Err(fail(at, format!("fd {fd} is also that of chardev {other}")));
        }
    }
    Ok(())
}

fn process(draft: &Draft) -> Result<(), CmdlineError> {
    let spec = &draft.spec;
    if !spec.daemonize {
        return Ok(());
    }
    if let Some(stdio) = spec
        .chardevs
        .iter()
        .find(|chardev| chardev.backend == ChardevBackend::Stdio)
    {
        let text = format!(
            "a daemon has no standard input and output, which chardev {} takes",
            stdio.id
        );
        return Err(CmdlineError::new("-daemonize", "", text));
    }
    if draft.log_option && spec.log.file.is_none() {
        return Err(CmdlineError::new(
            "-daemonize",
            "",
            "a daemon has no standard error to log to; give -D a file",
        ));
    }
    Ok(())
}

/// Notes what is there and does nothing, as it does elsewhere: it may be meant for hot-plug.
fn unused(draft: &mut Draft) {
    let spec = &mut draft.spec;
    let mut notes = Vec::new();
    for (drive, arg) in spec.drives.iter().zip(&draft.drive_args) {
        let used = |device: &DeviceOption| matches!(&device.kind, DeviceKind::Block { drive: id, .. } if *id == drive.id);
        if !spec.devices.iter().any(used) {
            notes.push(format!("{arg}: no device uses it"));
        }
    }
    for (netdev, arg) in spec.netdevs.iter().zip(&draft.netdev_args) {
        let used = |device: &DeviceOption| matches!(&device.kind, DeviceKind::Net { netdev: id, .. } if *id == netdev.id);
        if !spec.devices.iter().any(used) {
            notes.push(format!("-netdev {arg}: no device uses it"));
        }
    }
    for (fsdev, arg) in spec.fsdevs.iter().zip(&draft.fsdev_args) {
        let used = |device: &DeviceOption| matches!(&device.kind, DeviceKind::Fs { source: FsSource::Fsdev(id), .. } if *id == fsdev.id);
        if !spec.devices.iter().any(used) {
            notes.push(format!("-fsdev {arg}: no device uses it"));
        }
    }
    let listens = |chardev: &ChardevSpec| {
        matches!(chardev.backend, ChardevBackend::Socket { server: true, .. })
    };
    for (chardev, arg) in spec.chardevs.iter().zip(&draft.chardev_args) {
        if daemons(spec).any(|id| id == chardev.id) && listens(chardev) {
            notes.push(format!(
                "-chardev {arg}: server and nowait, because the vhost-user daemon is the one that listens;"
            ));
        }
    }
    for (chardev, arg) in spec.chardevs.iter().zip(&draft.chardev_args) {
        if !super::plan::chardev_is_used(spec, chardev) {
            notes.push(format!("-chardev {arg}: nothing uses it yet"));
        }
    }
    spec.ignored.append(&mut notes);
}
