//! Devices that come and go while the VM runs.
//!
//! **Job.** Carry out `blockdev-add`, `device_add` and the like: the broker opens and starts, the handshake goes on in the main
//! loop, then the device is put behind the registers of a window and the guest is told. Whatever fails on the way leaves
//! nothing behind. Take devices out again.
//!
//! **Who is not trusted.** QMP's clients, whose ids may be any text; the new device process, as in every handshake; the
//! guest, whose driver may go on using a device that is taken out.
//!
//! **Why this way.** A window's registers, once a guest's driver knows them, stay for the life of the VM: no stock kernel
//! takes a virtio-mmio device away that its driver holds, on whatever notice (its platform device goes only with its
//! ACPI table). So a device that is taken out leaves its registers, as StratoVirt's replaceable devices do: the disk has no
//! medium, the card no link. `addr` puts another back end behind the same registers. Without `addr` a new device gets a
//! window that no driver holds, since data that a guest has cached of one disk must not reach another one.
//!
//! ```text
//! blockdev-add ─Add─▶ broker      device_add ─Plug─▶ broker ─socket─▶ handshake ─▶ window ─▶ guest
//! device_del: absence shown ─▶ queues taken back ─Unplug─▶ broker ─▶ DEVICE_DELETED (─▶ stand_in.rs, of a card)
//! ```

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use ipc::control::added::AdditionGrant;
use ipc::control::{BackendGrant, DeviceGrant, Request};
use ipc::limits::{
    MAX_ADDED_BACKENDS, MAX_IOTHREADS, MAX_MICROVM_DISKS, MAX_MICROVM_NICS, MAX_MMIO_DEVICES,
};
use ipc::log::{error, info, warn};
use ipc::spec::DeviceSpec;
use ipc::spec::block::{BlockSpec, ImageFormat};
use ipc::spec::vm::{
    ChardevBackend, ChardevSpec, DeviceKind, DeviceOption, DriveSpec, IothreadSpec, NetBackend,
    NetdevSpec, RestartPolicy, VmSpec,
};
use nix::sys::epoll::EpollFlags;

use super::event_loop::{DEVICES, End, PLUGS, Parts, Vm, borrow, lock};
use super::stand_in::Coming;
use super::start::SharedTransport;
use super::supervise::Told;
use super::with_causes;
use crate::broker::{DeviceExit, NO_VHOST, Notice};
use crate::machine::microvm::{self, Microvm};
use crate::qmp::{
    BackendKind, ChardevInfo, Event, NewBackend, NewDevice, NodeOver, QmpError, Reply,
};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::remote::Handshake;

/// Everything that was added or is about to be.
#[derive(Debug)]
pub(super) struct Hotplug {
    backends: Vec<Backend>,
    units: Vec<Unit>,
    /// Requests that the broker has not answered yet.
    waiting: Vec<(u64, Waiting)>,
    plugging: Vec<Plugging>,
    /// See [`stand_in`](super::stand_in).
    pub(super) stand_ins: Vec<Coming>,
    next: u64,
}

/// A back end that was added.
#[derive(Debug)]
struct Backend {
    what: NewBackend,
    number: u32,
    /// The broker has opened it.
    open: bool,
    /// Id of the device that it belongs to.
    user: Option<String>,
    /// The node that it was added as, if another one was put over it.
    below: Option<DriveSpec>,
    /// Its device is one of StratoVirt's clients, for whom the two have one name and go together.
    goes_along: bool,
    /// That device was taken out: whoever needs its name or its place has it.
    left: bool,
}

/// What is known of one window that has or had a device: units are numbered as windows and as the broker's devices are.
#[derive(Debug)]
struct Unit {
    kind: Kind,
    /// Number among those of its kind.
    addr: u8,
    /// Id of the device that is there now.
    device: Option<String>,
}

/// Kinds of devices, by how they are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Disk,
    Card,
    Folder,
}

impl Kind {
    const fn of(spec: &DeviceSpec) -> Self {
        match spec {
            DeviceSpec::Block(_) => Self::Disk,
            DeviceSpec::Net(_) => Self::Card,
            _ => Self::Folder,
        }
    }

    const fn most(self) -> usize {
        match self {
            Self::Disk => MAX_MICROVM_DISKS,
            Self::Card => MAX_MICROVM_NICS,
            Self::Folder => MAX_MMIO_DEVICES,
        }
    }

    const fn noun(self) -> &'static str {
        match self {
            Self::Disk => "disks",
            Self::Card => "network cards",
            Self::Folder => "devices",
        }
    }
}

/// A request under way.
#[derive(Debug)]
pub(super) enum Waiting {
    Add {
        number: u32,
        reply: Reply<()>,
    },
    Remove {
        reply: Reply<()>,
    },
    /// An image has another size; its process does not know it yet.
    Resize {
        unit: usize,
        reply: Reply<()>,
    },
    Plug {
        unit: usize,
    },
    /// A device that failed on its way in, or a back end that made room.
    Undo,
    /// A file for a dump.
    Dump,
    Unplug {
        unit: usize,
        device: String,
    },
    /// A process for the driver of a card that was taken out.
    StandIn {
        unit: usize,
    },
}

/// A device on its way in.
#[derive(Debug)]
struct Plugging {
    unit: usize,
    addr: u8,
    new: NewDevice,
    /// As the broker has it, as far as is of interest here.
    grant: DeviceGrant,
    most: u16,
    pid: i32,
    handshake: Option<Handshake>,
    /// Its process hung up; its end, with its last words, is about to be told.
    failed: Option<String>,
    reply: Option<Reply<()>>,
}

impl Hotplug {
    /// With the devices of the command line, and the sockets there that a device to come may name, as `grants` has them.
    pub(super) fn new(spec: &VmSpec, grants: &[AdditionGrant]) -> Self {
        let mut units: Vec<Unit> = Vec::new();
        for device in &spec.devices {
            let kind = match device.kind {
                DeviceKind::Block { .. } | DeviceKind::ForeignBlock { .. } => Kind::Disk,
                DeviceKind::Net { .. } => Kind::Card,
                DeviceKind::Fs { .. } => Kind::Folder,
            };
            units.push(Unit {
                kind,
                addr: units.iter().filter(|unit| unit.kind == kind).count() as u8,
                device: Some(device.id.clone()),
            });
        }
        let named = grants.iter().filter_map(|grant| match grant {
            AdditionGrant::Daemon { id, path } => Some(ChardevSpec {
                id: id.clone(),
                backend: ChardevBackend::Socket {
                    path: path.clone(),
                    server: false,
                    nowait: true,
                },
            }),
            _ => None,
        });
        let backends = (0u32..).zip(named).map(|(number, chardev)| Backend {
            what: NewBackend::Chardev(chardev),
            number,
            open: true,
            user: None,
            below: None,
            goes_along: false,
            left: false,
        });
        Self {
            backends: backends.collect(),
            units,
            waiting: Vec::new(),
            plugging: Vec::new(),
            stand_ins: Vec::new(),
            next: 0,
        }
    }

    /// When the next device on its way in has to have answered.
    pub(super) fn deadline(&self) -> Option<std::time::Instant> {
        self.plugging
            .iter()
            .filter_map(|plugging| Some(plugging.handshake.as_ref()?.deadline()))
            .chain(self.stand_ins.iter().map(Coming::deadline))
            .min()
    }

    /// Why there can be no snapshot of the devices as they are now: one is on its way, or a window lost its device.
    pub(super) fn unsettled(&self) -> Option<String> {
        if let Some(coming) = self.plugging.first() {
            return Some(format!(
                "Device '{}' is being added; wait for the answer of its device_add",
                coming.new.id
            ));
        }
        let leaving = self.waiting.iter().find_map(|(_, waiting)| match waiting {
            Waiting::Unplug { device, .. } => Some(device),
            _ => None,
        });
        if let Some(device) = leaving {
            return Some(format!(
                "Device '{device}' is being taken out; wait for its DEVICE_DELETED"
            ));
        }
        let empty = self.units.iter().position(|unit| unit.device.is_none())?;
        Some(format!(
            "Window {empty}, counted from 0, lost its device, which no command line can say where the guest goes on: put another one in (device_add with addr={:#x})",
            self.units.get(empty).map_or(0, |unit| unit.addr)
        ))
    }

    /// Nobody waits for the process that was to stand in at window `unit`; whether somebody did.
    pub(super) fn forget_stand_in(&mut self, unit: usize) -> bool {
        let before = self.waiting.len();
        let is =
            |waiting: &Waiting| matches!(waiting, Waiting::StandIn { unit: at } if *at == unit);
        self.waiting.retain(|(_, waiting)| !is(waiting));
        self.waiting.len() < before
    }

    /// The place of the device with this id.
    pub(super) fn unit_of(&self, device: &str) -> Option<usize> {
        let mut units = self.units.iter();
        units.position(|unit| unit.device.as_deref() == Some(device))
    }

    /// Netdevs that were added.
    pub(super) fn netdevs_mut(&mut self) -> impl Iterator<Item = &mut NetdevSpec> {
        let all = self.backends.iter_mut();
        all.filter_map(|backend| match &mut backend.what {
            NewBackend::Netdev(netdev) => Some(netdev),
            _ => None,
        })
    }

    fn backend(&mut self, kind: BackendKind, id: &str) -> Option<&mut Backend> {
        self.backends
            .iter_mut()
            .find(|backend| backend.what.kind() == kind && backend.what.id() == id)
    }

    /// What was put over the node with this name.
    fn over(&self, name: &str) -> Option<&Backend> {
        let is = |backend: &&Backend| matches!(&backend.below, Some(below) if below.id == name);
        self.backends.iter().find(is)
    }

    /// What has the node with this name below it as `backing`.
    fn on_top(&self, name: &str) -> Option<&Backend> {
        let is = |backend: &&Backend| matches!(&backend.what, NewBackend::Drive(_, Some(lower)) if lower == name);
        self.backends.iter().find(is)
    }

    /// The added node with this name, if nothing else has it: no other node and no device.
    fn free_node(&self, name: &str) -> Result<&Backend, QmpError> {
        if let Some(over) = self.over(name).or_else(|| self.on_top(name)) {
            let over = over.what.id();
            return Err(generic(format!(
                "Block node '{name}' is in use by block node '{over}'"
            )));
        }
        self.loose_node(name)
    }

    /// The added node with this name, if it is open and no device has it.
    fn loose_node(&self, name: &str) -> Result<&Backend, QmpError> {
        let is = |backend: &&Backend| {
            backend.what.kind() == BackendKind::Drive && backend.what.id() == name
        };
        match self.backends.iter().find(is) {
            None => Err(generic(format!(
                "Cannot find device='' nor node-name='{name}' among the nodes that were added"
            ))),
            Some(Backend {
                user: Some(user), ..
            }) => Err(generic(format!(
                "Block node '{name}' is in use by device '{user}'"
            ))),
            Some(Backend { open: false, .. }) => {
                Err(generic(format!("Block node '{name}' is being added")))
            }
            Some(backend) => Ok(backend),
        }
    }

    /// Puts `drive`, a qcow2 image, on top of node `name`, which others may stand on as well.
    fn put_on(&self, drive: &mut DriveSpec, name: &str) -> Result<(), QmpError> {
        if let Some(over) = self.over(name) {
            let over = over.what.id();
            return Err(generic(format!(
                "Block node '{name}' is in use by block node '{over}'"
            )));
        }
        let wrong = |what: &str| Err(generic(format!("Block node '{name}' {what} of 'backing'")));
        let NewBackend::Drive(lower, _) = &self.loose_node(name)?.what else {
            return wrong("is of another kind than that");
        };
        if !lower.readonly {
            return wrong("is not read-only, as it has to be for the node");
        }
        if lower.direct != drive.direct {
            return wrong("has another cache.direct than the node");
        }
        drive
            .stand_on(lower)
            .map_err(|what| generic(format!("Block node '{}': {what}", drive.id)))
    }

    /// Numbers of the back ends below `backend`, the next one first.
    fn below(&self, backend: &Backend) -> Vec<u32> {
        let mut numbers = Vec::new();
        let mut next = &backend.what;
        while let NewBackend::Drive(_, Some(name)) = next {
            let Ok(lower) = self.loose_node(name) else {
                break;
            };
            numbers.push(lower.number);
            next = &lower.what;
        }
        numbers
    }

    /// Id of the netdev whose packets go to the chardev with this id.
    fn netdev_over(&self, kind: BackendKind, chardev: &str) -> Option<String> {
        let mut all = self.backends.iter();
        let over = all.find(|one| match &one.what {
            NewBackend::Netdev(netdev) => {
                kind == BackendKind::Chardev
                    && matches!(&netdev.backend, NetBackend::Daemon(id) if id == chardev)
            }
            _ => false,
        });
        over.map(|one| one.what.id().to_owned())
    }

    fn free_user(&mut self, device: &str) {
        for backend in &mut self.backends {
            if backend.user.as_deref() == Some(device) {
                backend.user = None;
            }
        }
    }

    /// Path of the socket that is number `number`, and whether a client passed a connection instead.
    fn socket_of(&self, number: u32) -> (PathBuf, bool) {
        let paths = self.backends.iter().filter(|one| one.number == number);
        let mut paths = paths.filter_map(|one| match &one.what {
            NewBackend::Chardev(ChardevSpec {
                backend: ChardevBackend::Socket { path, .. },
                ..
            }) => Some(path.clone()),
            _ => None,
        });
        let path = paths.next();
        let passed = path.is_none();
        (path.unwrap_or_default(), passed)
    }

    fn take_waiting(&mut self, number: u64) -> Option<Waiting> {
        let at = self.waiting.iter().position(|(one, _)| *one == number)?;
        Some(self.waiting.swap_remove(at).1)
    }

    pub(super) fn is_plugging(&self, unit: usize) -> bool {
        self.plugging.iter().any(|plugging| plugging.unit == unit)
    }

    /// Devices of this kind that are there or on their way.
    fn count(&self, kind: Kind) -> usize {
        let there = self
            .units
            .iter()
            .filter(|unit| unit.kind == kind && unit.device.is_some());
        let coming = self
            .plugging
            .iter()
            .filter(|plugging| Kind::of(&plugging.grant.spec) == kind);
        there.count() + coming.count()
    }

    /// The lowest number that no device of this kind has ever had.
    fn fresh_addr(&self, kind: Kind) -> u8 {
        (0..=u8::MAX)
            .find(|addr| {
                let taken = |unit: &Unit| unit.kind == kind && unit.addr == *addr;
                let coming =
                    |one: &Plugging| Kind::of(&one.grant.spec) == kind && one.addr == *addr;
                !self.units.iter().any(taken) && !self.plugging.iter().any(coming)
            })
            .unwrap_or(u8::MAX)
    }
}

/// Unit of a device to come, number among its kind, numbers of its back end and of those below it, and spec.
type Prepared = (usize, u8, (u32, Vec<u32>), DeviceSpec);

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Why nothing may come or go now.
pub(super) const SNAPSHOT: &str = "A snapshot is being made: wait for its end";

fn generic(text: impl Into<String>) -> QmpError {
    QmpError::generic(text)
}

impl Vm {
    /// Sends a request of this part's to the broker.
    pub(super) fn ask_broker(&mut self, request: &Request, waiting: Waiting) -> Result<(), End> {
        self.ask_broker_with(request, &[], waiting)
    }

    /// Has the broker make a file for a dump; [`Vm::dump_file_is_there`] follows.
    pub(super) fn ask_for_dump_file(&mut self, folder: u32, name: String) -> Result<(), End> {
        self.ask_broker(&Request::DumpFile { folder, name }, Waiting::Dump)
    }

    /// The same, with descriptors.
    fn ask_broker_with(
        &mut self,
        request: &Request,
        fds: &[Arc<OwnedFd>],
        waiting: Waiting,
    ) -> Result<(), End> {
        let number = self.hotplug.next;
        self.hotplug.next += 1;
        self.hotplug.waiting.push((number, waiting));
        self.supervise(|supervisor, cx| supervisor.request(number, request, fds, cx))
    }

    /// `blockdev-add`, `netdev_add`, `fsdev-add`
    pub(super) fn add_backend(
        &mut self,
        mut what: NewBackend,
        fds: &[Arc<OwnedFd>],
        reply: Reply<()>,
    ) -> Result<(), End> {
        let (kind, id) = (what.kind(), what.id().to_owned());
        self.make_room(kind, &id)?;
        let spec = &self.parts.spec;
        let cold = match kind {
            BackendKind::Drive => spec.drives.iter().any(|one| one.id == id),
            BackendKind::Netdev => spec.netdevs.iter().any(|one| one.id == id),
            BackendKind::Fsdev => spec.fsdevs.iter().any(|one| one.id == id),
            BackendKind::Chardev => spec.chardevs.iter().any(|one| one.id == id),
        };
        let hidden = kind == BackendKind::Drive && self.hotplug.over(&id).is_some();
        if cold || hidden || self.hotplug.backend(kind, &id).is_some() {
            reply.send(Err(generic(match kind {
                BackendKind::Chardev => format!("Chardev with id '{id}' already exists"),
                _ => format!("{} '{id}' exists already", kind.noun()),
            })));
            return Ok(());
        }
        if let NewBackend::Netdev(netdev) = &what
            && let NetBackend::Daemon(chardev) = &netdev.backend
        {
            let chardev = chardev.clone();
            reply.send(self.put_card_behind(&chardev, what));
            return Ok(());
        }
        if matches!(&what, NewBackend::Netdev(netdev) if netdev.vhost)
            && !spec.hotplug.contains(&AdditionGrant::Vhost)
        {
            reply.send(Err(generic(format!("Netdev '{id}': {NO_VHOST}"))));
            return Ok(());
        }
        if let NewBackend::Drive(drive, Some(lower)) = &mut what
            && let Err(error) = self.hotplug.put_on(drive, lower)
        {
            reply.send(Err(error));
            return Ok(());
        }
        let used = |number: &u32| {
            self.hotplug
                .backends
                .iter()
                .all(|one| one.number != *number)
        };
        let Some(number) = (0..MAX_ADDED_BACKENDS).find(used) else {
            reply.send(Err(generic(format!(
                "{} '{id}' is one too many; allowed: {MAX_ADDED_BACKENDS} that were added and not removed",
                kind.noun()
            ))));
            return Ok(());
        };
        let request = Request::Add {
            backend: number,
            addition: what.addition(!fds.is_empty()),
        };
        self.hotplug.backends.push(Backend {
            what,
            number,
            open: false,
            user: None,
            below: None,
            goes_along: false,
            left: false,
        });
        self.ask_broker_with(&request, fds, Waiting::Add { number, reply })
    }

    /// `blockdev-del`, `netdev_del`, `fsdev-del`
    pub(super) fn remove_backend(
        &mut self,
        kind: BackendKind,
        id: &str,
        reply: Reply<()>,
    ) -> Result<(), End> {
        let over = |id| self.hotplug.over(id).or_else(|| self.hotplug.on_top(id));
        if kind == BackendKind::Drive
            && let Some(over) = over(id)
        {
            let over = over.what.id();
            reply.send(Err(generic(format!(
                "Block node '{id}' is in use by block node '{over}'"
            ))));
            return Ok(());
        }
        let behind = self.hotplug.netdev_over(kind, id);
        if let Some(netdev) = behind {
            info!("chardev {id} is in use by netdev {netdev}");
            reply.send(Err(generic(format!("Chardev '{id}' is busy"))));
            return Ok(());
        }
        let cold = self.parts.spec.chardevs.iter().any(|one| one.id == id);
        let refused = match self.hotplug.backend(kind, id) {
            _ if kind == BackendKind::Chardev && cold => Some(format!(
                "Chardev '{id}' is of the command line, and stays as long as the VM"
            )),
            None if kind == BackendKind::Chardev => Some(format!("Chardev '{id}' not found")),
            Some(Backend { user: Some(_), .. }) if kind == BackendKind::Chardev => {
                Some(format!("Chardev '{id}' is busy"))
            }
            // The node that was put over another goes, and that one is there again.
            Some(
                backend @ Backend {
                    user: None,
                    below: Some(_),
                    ..
                },
            ) => {
                if let Some(below) = backend.below.take() {
                    backend.what = NewBackend::Drive(below, None);
                }
                reply.send(Ok(()));
                return Ok(());
            }
            None => Some(format!(
                "{} '{id}' was not added, or was removed already",
                kind.noun()
            )),
            Some(Backend {
                user: Some(user), ..
            }) => Some(format!(
                "{} '{id}' is in use by device '{user}'",
                kind.noun()
            )),
            Some(Backend { open: false, .. }) => {
                Some(format!("{} '{id}' is being added", kind.noun()))
            }
            Some(_) => None,
        };
        if let Some(refused) = refused {
            reply.send(Err(generic(refused)));
            return Ok(());
        }
        let (mut number, mut chardevs_own) = (0, false);
        self.hotplug.backends.retain(|backend| {
            let gone = backend.what.kind() == kind && backend.what.id() == id;
            if gone {
                number = backend.number;
                chardevs_own = kind == BackendKind::Netdev && backend.what.is_foreign();
            }
            !gone
        });
        if chardevs_own {
            // The broker knows of the chardev only, which stays.
            reply.send(Ok(()));
            return Ok(());
        }
        self.ask_broker(
            &Request::Remove { backend: number },
            Waiting::Remove { reply },
        )
    }

    /// Lets go of a back end whose device was taken out by a client that names both alike and never removes the first: Kata adds
    /// and takes out volumes for as long as a sandbox lives.
    fn make_room(&mut self, kind: BackendKind, id: &str) -> Result<(), End> {
        let backends = &self.hotplug.backends;
        let full = (0..MAX_ADDED_BACKENDS)
            .all(|number| backends.iter().any(|backend| backend.number == number));
        let old = backends.iter().position(|backend| {
            let same = backend.what.kind() == kind && backend.what.id() == id;
            let alone = self.hotplug.on_top(backend.what.id()).is_none();
            backend.left && backend.user.is_none() && alone && (same || full)
        });
        let Some(old) = old else {
            return Ok(());
        };
        let old = self.hotplug.backends.remove(old);
        info!(
            "{} {} makes room for another",
            old.what.kind().noun(),
            old.what.id()
        );
        let request = Request::Remove {
            backend: old.number,
        };
        self.ask_broker(&request, Waiting::Undo)
    }

    /// `netdev_add` of a card whose packets somebody else's daemon moves.
    fn put_card_behind(&mut self, chardev: &str, what: NewBackend) -> Result<(), QmpError> {
        let behind = self.hotplug.netdev_over(BackendKind::Chardev, chardev);
        let found = self.hotplug.backend(BackendKind::Chardev, chardev);
        let Some(Backend {
            open: true,
            user,
            number,
            ..
        }) = found
        else {
            return Err(generic(format!("chardev \"{chardev}\" not found")));
        };
        if user.is_some() || behind.is_some() {
            return Err(generic(format!("Chardev '{chardev}' is busy")));
        }
        let number = *number;
        self.hotplug.backends.push(Backend {
            what,
            number,
            open: true,
            user: None,
            below: None,
            goes_along: false,
            left: false,
        });
        Ok(())
    }

    /// `query-chardev`
    pub(super) fn chardevs(&self) -> Vec<ChardevInfo> {
        let mut all = self.parts.chardevs.info();
        let open = self.hotplug.backends.iter().filter(|one| one.open);
        all.extend(open.filter_map(|backend| {
            let NewBackend::Chardev(chardev) = &backend.what else {
                return None;
            };
            let netdev = self.hotplug.netdev_over(BackendKind::Chardev, &chardev.id);
            let netdev = netdev.and_then(|id| {
                let mut all = self.hotplug.backends.iter();
                all.find(|one| one.what.kind() == BackendKind::Netdev && one.what.id() == id)
            });
            Some(ChardevInfo {
                label: chardev.id.clone(),
                filename: match &chardev.backend {
                    ChardevBackend::Socket { path, .. } => format!("unix:{}", path.display()),
                    _ => "fd".into(),
                },
                frontend_open: backend.user.is_some()
                    || netdev.is_some_and(|netdev| netdev.user.is_some()),
            })
        }));
        all
    }

    /// `blockdev-add` of a format over a node.
    pub(super) fn put_over(&mut self, node: &NodeOver) -> Result<(), QmpError> {
        let (name, file) = (&node.name, &node.file);
        let known = self.parts.spec.drives.iter().any(|one| one.id == *name);
        if known
            || self.hotplug.over(name).is_some()
            || self.hotplug.backend(BackendKind::Drive, name).is_some()
        {
            return Err(generic(format!("Block node '{name}' exists already")));
        }
        let backend = self.hotplug.free_node(file)?;
        let NewBackend::Drive(below, _) = &backend.what else {
            return Err(generic(format!("Block node '{file}' is of another kind")));
        };
        if backend.below.is_some() || below.io.format != ImageFormat::Raw {
            return Err(generic(format!(
                "Block node '{file}' is a format itself; allowed: one of driver file or host_device"
            )));
        }
        let below = below.clone();
        let mut drive = node.over(&below).map_err(generic)?;
        if let Some(lower) = &node.backing {
            if lower == file {
                return Err(generic(format!(
                    "Block node '{file}' is in use by block node '{name}'"
                )));
            }
            self.hotplug.put_on(&mut drive, lower)?;
        }
        if let Some(backend) = self.hotplug.backend(BackendKind::Drive, file) {
            backend.below = Some(below);
            backend.what = NewBackend::Drive(drive, node.backing.clone());
        }
        Ok(())
    }

    /// `object-add`: a name that devices may give, as those of the command line.
    pub(super) fn add_iothread(&mut self, id: String) -> Result<(), QmpError> {
        let iothreads = &mut self.parts.spec.iothreads;
        if iothreads.iter().any(|one| one.id == id) {
            return Err(generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        if iothreads.len() == MAX_IOTHREADS {
            return Err(generic(format!(
                "Iothread '{id}' is one too many; allowed: {MAX_IOTHREADS}"
            )));
        }
        iothreads.push(IothreadSpec { id, cpus: None });
        Ok(())
    }

    /// `object-del`
    pub(super) fn remove_object(&mut self, id: &str) -> Result<(), QmpError> {
        let units = &self.hotplug.units;
        let there = |device: &&DeviceOption| {
            units
                .iter()
                .any(|unit| unit.device.as_ref() == Some(&device.id))
        };
        let names = |iothread: &Option<String>| iothread.as_deref() == Some(id);
        let devices = self.parts.spec.devices.iter().filter(there);
        let coming = self.hotplug.plugging.iter().map(|one| &one.new);
        let mut users = devices
            .filter(|device| names(&device.iothread))
            .map(|device| &device.id)
            .chain(coming.filter(|new| names(&new.iothread)).map(|new| &new.id));
        if let Some(user) = users.next() {
            return Err(generic(format!(
                "object '{id}' is in use by device '{user}', can not be deleted"
            )));
        }
        let iothreads = &mut self.parts.spec.iothreads;
        let Some(at) = iothreads.iter().position(|one| one.id == id) else {
            return Err(generic(format!("object '{id}' not found")));
        };
        // The broker knows those of the command line by their numbers.
        if at < self.parts.plan.policy.iothreads.len() {
            return Err(generic(format!(
                "object '{id}' is of the command line, and stays as long as the VM"
            )));
        }
        iothreads.remove(at);
        Ok(())
    }

    /// The command line, and what was added since.
    pub(super) fn spec_with_added(&self) -> VmSpec {
        let mut spec = self.parts.spec.clone();
        for backend in self.hotplug.backends.iter().filter(|one| one.open) {
            match &backend.what {
                NewBackend::Drive(drive, _) => spec.drives.push(drive.clone()),
                NewBackend::Netdev(netdev) => spec.netdevs.push(netdev.clone()),
                NewBackend::Fsdev(fsdev) => spec.fsdevs.push(fsdev.clone()),
                // One of the command line is there already.
                NewBackend::Chardev(chardev) => {
                    if self
                        .parts
                        .spec
                        .chardevs
                        .iter()
                        .all(|one| one.id != chardev.id)
                    {
                        spec.chardevs.push(chardev.clone());
                    }
                }
            }
        }
        spec
    }

    /// `device_add`
    pub(super) fn add_device(&mut self, new: NewDevice, reply: Reply<()>) -> Result<(), End> {
        match self.prepare(&new) {
            Ok((unit, addr, (number, below), spec)) => {
                let (kind, name) = new.backend();
                let mut source = BackendGrant::Given;
                let mut passed = false;
                if let Some(backend) = self.hotplug.backend(kind, name) {
                    backend.user = Some(new.id.clone());
                    backend.goes_along = new.goes_along;
                    backend.left = false;
                    if backend.what.is_foreign() {
                        let (path, given) = self.hotplug.socket_of(number);
                        passed = given;
                        source = BackendGrant::Socket {
                            option: "chardev-add".into(),
                            path,
                        };
                    }
                }
                let iothread = self.iothread_of(&new);
                let request = Request::Plug {
                    index: unit as u32,
                    backend: number,
                    below,
                    spec: spec.clone(),
                    iothread,
                };
                let grant = DeviceGrant {
                    spec,
                    backend: source,
                    iothread,
                };
                let most = new.restarts(passed);
                self.end_stand_in(unit)?;
                self.hotplug.plugging.push(Plugging {
                    unit,
                    addr,
                    new,
                    grant,
                    most,
                    pid: 0,
                    handshake: None,
                    failed: None,
                    reply: Some(reply),
                });
                self.ask_broker(&request, Waiting::Plug { unit })
            }
            Err(error) => {
                reply.send(Err(error));
                Ok(())
            }
        }
    }

    fn iothread_of(&self, new: &NewDevice) -> Option<u32> {
        let id = new.iothread.as_ref()?;
        let number = self.parts.spec.iothread(id)?;
        // One that was added has no processors of its own, and the broker knows nothing of it.
        let known = (number as usize) < self.parts.plan.policy.iothreads.len();
        known.then_some(number)
    }

    /// What a device to come is going to be.
    fn prepare(&mut self, new: &NewDevice) -> Result<Prepared, QmpError> {
        if self.parts.machine.is_none() {
            return Err(generic("Machine 'none' takes no devices"));
        }
        if self.job.is_some() {
            return Err(generic(SNAPSHOT));
        }
        let id = &new.id;
        let there = self
            .hotplug
            .units
            .iter()
            .any(|unit| unit.device.as_ref() == Some(id))
            || self.hotplug.plugging.iter().any(|one| one.new.id == *id);
        if there {
            return Err(generic(format!("Device '{id}' exists already")));
        }
        if let Some(iothread) = &new.iothread
            && self.parts.spec.iothread(iothread).is_none()
        {
            return Err(generic(format!(
                "iothread {iothread} of device '{id}' does not exist"
            )));
        }
        let mac = self.unused_mac();
        let vcpus = u16::from(self.parts.spec.cpus.cpus);
        let (kind, name) = new.backend();
        let behind = self.hotplug.netdev_over(kind, name);
        let hotplug = &self.hotplug;
        let is = |one: &&Backend| one.what.kind() == kind && one.what.id() == name;
        let Some(backend) = hotplug.backends.iter().find(is) else {
            return Err(generic(format!(
                "{} '{name}' of device '{id}' was not added",
                kind.noun()
            )));
        };
        if !backend.open {
            return Err(generic(format!("{} '{name}' is being added", kind.noun())));
        }
        if let Some(user) = &backend.user {
            return Err(generic(format!(
                "{} '{name}' is in use by device '{user}'",
                kind.noun()
            )));
        }
        if let Some(netdev) = behind {
            return Err(generic(format!(
                "Chardev '{name}' is in use by netdev '{netdev}'"
            )));
        }
        if kind == BackendKind::Drive
            && let Some(over) = hotplug.on_top(name)
        {
            let over = over.what.id();
            return Err(generic(format!(
                "Block node '{name}' is in use by block node '{over}'"
            )));
        }
        let numbers = (backend.number, hotplug.below(backend));
        let spec = new
            .spec(&backend.what, vcpus, mac)
            .ok_or_else(|| generic(format!("{} '{name}' is of another kind", kind.noun())))?;
        spec.check()
            .map_err(|what| generic(format!("Device '{id}': {what}")))?;
        let kind = Kind::of(&spec);
        if self.hotplug.count(kind) >= kind.most() {
            return Err(generic(format!(
                "Device '{id}' is one too many; allowed: {} {}",
                kind.most(),
                kind.noun()
            )));
        }
        let (unit, addr) = self.place(new, &spec)?;
        Ok((unit, addr, numbers, spec))
    }

    /// Where a device goes: see the module's page.
    fn place(&self, new: &NewDevice, spec: &DeviceSpec) -> Result<(usize, u8), QmpError> {
        let hotplug = &self.hotplug;
        let kind = Kind::of(spec);
        if let Some(addr) = new.addr {
            let known = hotplug
                .units
                .iter()
                .position(|unit| unit.kind == kind && unit.addr == addr);
            if let Some(unit) = known {
                if let Some(user) = &hotplug.units[unit].device {
                    return Err(generic(format!(
                        "addr {addr:#x} is taken by device '{user}'"
                    )));
                }
                if hotplug.is_plugging(unit) || self.is_leaving(unit) {
                    return Err(generic(format!("addr {addr:#x} is being changed")));
                }
                return Ok((unit, addr));
            }
        }
        let addr = new.addr.unwrap_or_else(|| hotplug.fresh_addr(kind));
        // Only the next one: units that nobody had yet are taken in order.
        let next = hotplug.units.len();
        if next < MAX_MMIO_DEVICES && !hotplug.is_plugging(next) {
            return Ok((next, addr));
        }
        let given_up = hotplug.units.iter().enumerate().position(|(at, unit)| {
            unit.device.is_none()
                && !hotplug.is_plugging(at)
                && !self.is_leaving(at)
                && self
                    .parts
                    .transports
                    .get(at)
                    .is_some_and(|transport| lock(transport).core().status() == 0)
        });
        match given_up {
            Some(unit) => Ok((unit, addr)),
            None if next < MAX_MMIO_DEVICES => Err(generic(
                "Another device is being added; wait for its answer",
            )),
            None => Err(generic(format!(
                "Device '{}': no window is free: all {MAX_MMIO_DEVICES} have a device, or a driver of the guest still holds them; give the addr of a device that was taken out, or reset the guest",
                new.id
            ))),
        }
    }

    fn is_leaving(&self, unit: usize) -> bool {
        self.hotplug.waiting.iter().any(|(_, waiting)| {
            matches!(waiting, Waiting::Unplug { unit: leaving, .. } if *leaving == unit)
        })
    }

    fn unused_mac(&self) -> [u8; 6] {
        let used: Vec<[u8; 6]> = self
            .parts
            .spec
            .devices
            .iter()
            .filter_map(|device| match device.kind {
                DeviceKind::Net { mac, .. } => Some(mac),
                _ => None,
            })
            .collect();
        let mut mac = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
        while used.contains(&mac) {
            mac[5] = mac[5].wrapping_add(1);
        }
        mac
    }

    /// `device_del`
    pub(super) fn remove_device(&mut self, id: &str, reply: Reply<()>) -> Result<(), End> {
        let Some(unit) = self.hotplug.unit_of(id) else {
            reply.send(Err(QmpError::device_not_found(id)));
            return Ok(());
        };
        if self.job.is_some() {
            reply.send(Err(generic(SNAPSHOT)));
            return Ok(());
        }
        if !self.supervisor.is_settled(unit) {
            reply.send(Err(generic(format!(
                "Device '{id}' is about to get another process; wait for DEVICE_RECOVERED or DEVICE_FAILED"
            ))));
            return Ok(());
        }
        if let Some(transport) = self.parts.transports.get(unit) {
            // One that does not stop is ended by the broker, as all are.
            lock(transport).take_out();
        }
        self.supervisor.unplug(unit);
        if let Some(machine) = &mut self.parts.machine
            && let Err(e) = machine.retire_mmio(unit)
        {
            error!("{}", with_causes(&e));
        }
        self.hotplug.units[unit].device = None;
        for backend in &mut self.hotplug.backends {
            backend.left |= backend.goes_along && backend.user.as_deref() == Some(id);
        }
        self.hotplug.free_user(id);
        reply.send(Ok(()));
        self.ask_broker(
            &Request::Unplug { index: unit as u32 },
            Waiting::Unplug {
                unit,
                device: id.to_owned(),
            },
        )
    }

    /// The disk with this id, or whose drive has it, and its place among the devices.
    pub(super) fn disk(&self, name: &str) -> Option<(&DeviceOption, usize)> {
        let disk = |device: &&DeviceOption| match &device.kind {
            DeviceKind::Block { drive, .. } => drive == name || device.id == name,
            DeviceKind::ForeignBlock { .. } => device.id == name,
            _ => false,
        };
        let device = self.parts.spec.devices.iter().find(disk)?;
        let mut units = self.hotplug.units.iter();
        let unit = units.position(|unit| unit.device.as_ref() == Some(&device.id))?;
        Some((device, unit))
    }

    /// `block_resize`: the broker makes the image longer, and another process takes the place of the one that serves, which tells
    /// the guest.
    pub(super) fn resize_disk(
        &mut self,
        name: &str,
        size: u64,
        reply: Reply<()>,
    ) -> Result<(), End> {
        let Some((device, unit)) = self.disk(name) else {
            reply.send(Err(generic(format!(
                "Cannot find device='{name}' nor node-name='{name}' behind a disk"
            ))));
            return Ok(());
        };
        if matches!(device.kind, DeviceKind::ForeignBlock { .. }) {
            let id = &device.id;
            reply.send(Err(generic(format!(
                "Device '{id}' has its image from somebody else's daemon, which alone can resize it"
            ))));
            return Ok(());
        }
        if self.job.is_some() || self.parts.pager.is_some() {
            reply.send(Err(generic(SNAPSHOT)));
            return Ok(());
        }
        let grant = self.parts.plan.policy.devices.get(unit);
        if let Some(DeviceSpec::Block(disk)) = grant.map(|grant| &grant.spec)
            && let ImageFormat::Qcow2 { most, .. } = disk.io.format
        {
            let (disk, most) = (disk.clone(), Some(most).filter(|most| *most > 0));
            reply.send(self.resize_qcow2(unit, &disk, most, size));
            return Ok(());
        }
        let request = Request::Resize {
            index: unit as u32,
            size,
        };
        self.ask_broker(&request, Waiting::Resize { unit, reply })
    }

    /// The same for an image whose format only its process knows: that one makes the disk longer, in the midst of its work.
    fn resize_qcow2(
        &self,
        unit: usize,
        disk: &BlockSpec,
        most: Option<u64>,
        size: u64,
    ) -> Result<(), QmpError> {
        let id = &disk.id;
        let told = |what: String| generic(format!("device {id}: {what}"));
        let Some(transport) = self.parts.transports.get(unit) else {
            return Err(QmpError::device_not_found(id));
        };
        if !self.supervisor.is_settled(unit) {
            return Err(generic(format!(
                "Device '{id}' is about to get another process; wait for DEVICE_RECOVERED or DEVICE_FAILED"
            )));
        }
        let mut transport = lock(transport);
        let config = transport.core().device().config();
        let sectors = config
            .first_chunk()
            .map_or(0, |word| u64::from_le_bytes(*word));
        let now = sectors.saturating_mul(SECTOR);
        crate::broker::check_resize(disk.readonly, most, now, size)
            .map_err(|e| told(e.to_string()))?;
        if size == now {
            return Ok(());
        }
        match transport.set_capacity(size / SECTOR) {
            Ok(true) => Ok(()),
            Ok(false) => Err(told(format!(
                "its image cannot be made {size} bytes long; its process has told why in the log"
            ))),
            Err(error) => Err(generic(with_causes(&error))),
        }
    }

    /// `device-upgrade`
    pub(super) fn upgrade_device(&mut self, id: &str, reply: Reply<()>) -> Result<(), End> {
        let Some(unit) = self.hotplug.unit_of(id) else {
            reply.send(Err(QmpError::device_not_found(id)));
            return Ok(());
        };
        if self.job.is_some() || self.parts.pager.is_some() {
            reply.send(Err(generic(SNAPSHOT)));
            return Ok(());
        }
        self.supervise(|supervisor, cx| supervisor.upgrade(unit, reply, cx))
    }

    /// Takes what the broker said to this part.
    pub(super) fn told(&mut self) -> Result<(), End> {
        while let Some(told) = self.supervisor.told() {
            match told {
                Told::Exited(exit) => self.plug_exited(&exit)?,
                Told::Retapped { index, tap } => self.retapped(index, tap),
                Told::Serves { index, pid } => {
                    let unit = index as usize;
                    for plugging in &mut self.hotplug.plugging {
                        if plugging.unit == unit {
                            plugging.pid = pid;
                        }
                    }
                }
                Told::Answer(number, answer) => {
                    if let Some(waiting) = self.hotplug.take_waiting(number) {
                        self.answered(waiting, answer)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn answered(&mut self, waiting: Waiting, answer: Result<Notice, String>) -> Result<(), End> {
        match (waiting, answer) {
            (Waiting::Add { number, reply }, Ok(_)) => {
                for backend in &mut self.hotplug.backends {
                    backend.open |= backend.number == number;
                }
                reply.send(Ok(()));
            }
            (Waiting::Add { number, reply }, Err(why)) => {
                let mut why = why;
                self.hotplug.backends.retain(|backend| {
                    let failed = backend.number == number;
                    if failed && backend.what.kind() == BackendKind::Chardev {
                        why = format!("Failed to add chardev '{}': {why}", backend.what.id());
                    }
                    !failed
                });
                reply.send(Err(generic(why)));
            }
            (Waiting::Remove { reply }, answer) => {
                reply.send(answer.map(drop).map_err(generic));
            }
            (Waiting::Resize { unit, reply }, Ok(_)) => {
                // Its process has the old size, and the limit that goes with it.
                return self.supervise(|supervisor, cx| supervisor.upgrade(unit, reply, cx));
            }
            (Waiting::Resize { reply, .. }, Err(why)) => reply.send(Err(generic(why))),
            (Waiting::Plug { unit }, Ok(Notice::Started { pid, socket, .. })) => {
                return self.plug_started(unit, pid, socket);
            }
            (Waiting::Plug { unit }, answer) => {
                let why = answer.err().unwrap_or_else(|| "no socket".into());
                // The broker has undone its part.
                self.drop_plug(unit, why);
            }
            (Waiting::Dump, answer) => {
                return self.dump_file_is_there(match answer {
                    Ok(Notice::DumpFile(file)) => Ok(file),
                    Ok(_) => Err("no file came".into()),
                    Err(why) => Err(why),
                });
            }
            (Waiting::Undo, answer) => {
                if let Err(why) = answer {
                    error!("{why}");
                }
            }
            (Waiting::Unplug { unit, device }, answer) => {
                if let Err(why) = answer {
                    error!("{why}");
                }
                if let Some(transport) = self.parts.transports.get(unit) {
                    lock(transport).device_gone();
                }
                info!("device {device} is taken out");
                self.parts.qmp.emit(&Event::DeviceDeleted { device });
                return self.ask_stand_in(unit);
            }
            (Waiting::StandIn { unit }, Ok(Notice::Started { pid, socket, .. })) => {
                return self.stand_in_started(unit, pid, socket);
            }
            (Waiting::StandIn { unit }, answer) => {
                let why = answer.err().unwrap_or_else(|| "no socket".into());
                warn!("nobody answers the driver of window {unit} any more: {why}");
            }
        }
        Ok(())
    }

    fn plug_started(&mut self, unit: usize, pid: i32, socket: UnixStream) -> Result<(), End> {
        let Some(plugging) = self.hotplug.plugging.iter_mut().find(|p| p.unit == unit) else {
            return Ok(());
        };
        plugging.pid = pid;
        let begun = Handshake::begin_for(socket, &plugging.grant)
            .map_err(|e| with_causes(&e))
            .and_then(|handshake| {
                self.poller
                    .add(&handshake, PLUGS + unit as u64, EpollFlags::EPOLLIN)
                    .map_err(|e| format!("epoll_ctl: {}", e.desc()))?;
                plugging.handshake = Some(handshake);
                Ok(())
            });
        match begun {
            Ok(()) => Ok(()),
            Err(why) => self.undo(unit, why),
        }
    }

    /// The process of a device on its way in has something to say, or its time is over.
    pub(super) fn plug_event(&mut self, unit: usize) -> Result<(), End> {
        if self.stand_in_event(unit)? {
            return Ok(());
        }
        let Some(plugging) = self.hotplug.plugging.iter_mut().find(|p| p.unit == unit) else {
            return Ok(());
        };
        let Some(handshake) = &mut plugging.handshake else {
            return Ok(());
        };
        match handshake.advance() {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            Err(error) => {
                let why = with_causes(&error);
                // Nobody tells of the end of somebody else's.
                let own = !plugging.grant.is_foreign();
                if own && error.is_hang_up() && plugging.failed.is_none() {
                    // Its last words say more.
                    let deaf = self.poller.remove(&*handshake);
                    plugging.failed = Some(why.clone());
                    if deaf.is_ok() {
                        return Ok(());
                    }
                }
                return self.undo(unit, why);
            }
        }
        let Some(handshake) = plugging.handshake.take() else {
            return Ok(());
        };
        let done = self
            .poller
            .remove(&handshake)
            .map_err(|e| format!("epoll_ctl: {}", e.desc()))
            .and_then(|()| self.put_in(unit, handshake));
        match done {
            Ok(()) => Ok(()),
            Err(why) => self.undo(unit, why),
        }
    }

    /// Ends what takes too long.
    pub(super) fn plug_overdue(&mut self) -> Result<(), End> {
        let now = std::time::Instant::now();
        let late: Vec<usize> = self
            .hotplug
            .plugging
            .iter()
            .filter(|plugging| {
                plugging
                    .handshake
                    .as_ref()
                    .is_some_and(|handshake| handshake.deadline() <= now)
            })
            .map(|plugging| plugging.unit)
            .chain(
                self.hotplug
                    .stand_ins
                    .iter()
                    .filter(|coming| coming.deadline() <= now)
                    .map(|coming| coming.unit),
            )
            .collect();
        for unit in late {
            self.plug_event(unit)?;
        }
        Ok(())
    }

    fn plug_exited(&mut self, exit: &DeviceExit) -> Result<(), End> {
        let unit = exit.index as usize;
        self.stand_in_exited(unit, exit.pid, &exit.last_words);
        let Some(plugging) = self
            .hotplug
            .plugging
            .iter()
            .find(|plugging| plugging.unit == unit && plugging.pid == exit.pid)
        else {
            return Ok(());
        };
        let words = if exit.last_words.is_empty() {
            String::new()
        } else {
            format!(": {}", exit.last_words)
        };
        let why = format!(
            "device {}: its process ended{words}",
            plugging.grant.spec.id()
        );
        self.undo(unit, why)
    }

    /// A device failed on its way in, and the broker has to know.
    fn undo(&mut self, unit: usize, why: String) -> Result<(), End> {
        self.drop_plug(unit, why);
        self.ask_broker(&Request::Unplug { index: unit as u32 }, Waiting::Undo)
    }

    fn drop_plug(&mut self, unit: usize, why: String) {
        let Some(at) = self.hotplug.plugging.iter().position(|p| p.unit == unit) else {
            return;
        };
        // Its socket leaves the poller by being closed.
        let plugging = self.hotplug.plugging.remove(at);
        self.hotplug.free_user(&plugging.new.id);
        error!("{why}");
        if let Some(reply) = plugging.reply {
            reply.send(Err(generic(why)));
        }
    }

    /// Puts a device that serves behind its registers, and tells the guest.
    fn put_in(&mut self, unit: usize, handshake: Handshake) -> Result<(), String> {
        let told = |e: &dyn std::error::Error| with_causes(e);
        let fresh = handshake.finish().map_err(|e| told(&e))?;
        let Some(at) = self.hotplug.plugging.iter().position(|p| p.unit == unit) else {
            return Ok(());
        };
        let (grant, pid, most) = {
            let plugging = &self.hotplug.plugging[at];
            (plugging.grant.clone(), plugging.pid, plugging.most)
        };
        if grant.is_foreign() && most > 0 {
            fresh.check_account().map_err(|e| told(&e))?;
        }
        let Some(machine) = &mut self.parts.machine else {
            return Err("machine none takes no devices".into());
        };
        let memory = machine.ram().memory().clone();
        match self.parts.transports.get(unit).cloned() {
            None => {
                let mut transport = MmioTransport::new(fresh, memory).map_err(|e| told(&e))?;
                if let Some(sharing) = &self.parts.sharing {
                    transport.share(sharing.clone());
                }
                let transport = Arc::new(Mutex::new(transport));
                machine
                    .attach_mmio(unit, transport.clone())
                    .map_err(|e| told(&e))?;
                let added = connect(machine, unit, &transport)
                    .map_err(|e| told(&e))
                    .and_then(|()| {
                        self.poller
                            .add(
                                borrow(lock(&transport).error_event()),
                                DEVICES + unit as u64,
                                EpollFlags::EPOLLIN,
                            )
                            .map_err(|e| format!("epoll_ctl: {}", e.desc()))
                    });
                if let Err(why) = added {
                    disconnect(machine, unit, &transport);
                    machine.detach_mmio(unit);
                    return Err(why);
                }
                self.parts.transports.push(transport.clone());
                self.supervise_unit(|supervisor, cx| {
                    supervisor.add(&grant, &transport, most, pid, cx)
                })?;
            }
            Some(transport) => {
                let free = lock(&transport).core().status() == 0;
                if free {
                    // No driver knows what was here before: registers, doorbells and interrupts are made anew.
                    disconnect(machine, unit, &transport);
                    let _ = self.poller.remove(borrow(lock(&transport).error_event()));
                    let mut anew = MmioTransport::new(fresh, memory).map_err(|e| told(&e))?;
                    if let Some(sharing) = &self.parts.sharing {
                        anew.share(sharing.clone());
                    }
                    *lock(&transport) = anew;
                    connect(machine, unit, &transport).map_err(|e| told(&e))?;
                    self.poller
                        .add(
                            borrow(lock(&transport).error_event()),
                            DEVICES + unit as u64,
                            EpollFlags::EPOLLIN,
                        )
                        .map_err(|e| format!("epoll_ctl: {}", e.desc()))?;
                } else {
                    let back = lock(&transport).device_back(fresh).map_err(|e| {
                        format!(
                            "{}; the driver of the guest still holds a device with those: give another addr, or the same properties",
                            with_causes(&e)
                        )
                    })?;
                    if !back {
                        return Err(format!(
                            "device {}: its process does not take its queues",
                            grant.spec.id()
                        ));
                    }
                }
                machine.revive_mmio(unit);
                self.supervise_unit(|supervisor, cx| {
                    supervisor.replace(unit, &grant, most, pid, cx)
                })?;
            }
        }
        let plugging = self.hotplug.plugging.remove(at);
        self.record(unit, &plugging);
        if let Some(machine) = &self.parts.machine
            && let Err(e) = machine.announce_mmio(unit)
        {
            error!("{}", with_causes(&e));
        }
        if grant.is_foreign() {
            info!("device {} is another process's", grant.spec.id());
        } else {
            info!("device {} is process {pid}", grant.spec.id());
        }
        if let Some(reply) = plugging.reply {
            reply.send(Ok(()));
        }
        Ok(())
    }

    fn supervise_unit(
        &mut self,
        work: impl FnOnce(
            &mut super::supervise::Supervisor,
            &mut super::supervise::Context<'_>,
        ) -> Result<(), nix::errno::Errno>,
    ) -> Result<(), String> {
        let mut outcome = Ok(());
        let done = self.supervise(|supervisor, cx| {
            outcome = work(supervisor, cx);
            Ok(())
        });
        match (done, outcome) {
            (Ok(()), Ok(())) => Ok(()),
            (_, Err(e)) => Err(format!("epoll_ctl: {}", e.desc())),
            (Err(_), Ok(())) => Err("the broker is gone".into()),
        }
    }

    /// Everything that lists devices lists this one too.
    fn record(&mut self, unit: usize, plugging: &Plugging) {
        let option = DeviceOption {
            id: plugging.new.id.clone(),
            kind: plugging.new.option(&plugging.grant.spec),
            iothread: plugging.new.iothread.clone(),
            restart: RestartPolicy {
                most: plugging.most,
            },
            bootindex: None,
        };
        let record = Unit {
            kind: Kind::of(&plugging.grant.spec),
            addr: plugging.addr,
            device: Some(plugging.new.id.clone()),
        };
        let Parts { spec, plan, .. } = &mut self.parts;
        put(&mut spec.devices, unit, option);
        put(&mut plan.policy.devices, unit, plugging.grant.clone());
        put(&mut plan.devices, unit, unit as u32);
        put(&mut self.hotplug.units, unit, record);
    }
}

/// Replaces number `at`, or appends it.
fn put<T>(list: &mut Vec<T>, at: usize, one: T) {
    match list.get_mut(at) {
        Some(place) => *place = one,
        None => list.push(one),
    }
}

/// Registers the doorbells and interrupts of the device behind window `unit` with KVM.
fn connect(
    machine: &Microvm,
    unit: usize,
    transport: &SharedTransport,
) -> Result<(), microvm::Error> {
    let Some(window) = microvm::mmio_slots().get(unit).copied() else {
        return Err(microvm::Error::Slot { slot: unit });
    };
    let guard = lock(transport);
    for (offset, value, kick) in guard.ioeventfds() {
        machine
            .vm()
            .register_ioeventfd(kick, window.base + offset, Some(value))?;
    }
    for call in guard.irqfds() {
        machine.vm().register_irqfd(call, window.gsi)?;
    }
    Ok(())
}

/// Undoes what [`connect`] did, as far as it came.
fn disconnect(machine: &Microvm, unit: usize, transport: &SharedTransport) {
    let Some(window) = microvm::mmio_slots().get(unit).copied() else {
        return;
    };
    let guard = lock(transport);
    for (offset, value, kick) in guard.ioeventfds() {
        let _ = machine
            .vm()
            .unregister_ioeventfd(kick, window.base + offset, Some(value));
    }
    for call in guard.irqfds() {
        let _ = machine.vm().unregister_irqfd(call, window.gsi);
    }
}
