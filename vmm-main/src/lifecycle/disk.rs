//! What the control process has disks do with their images, and tells of them.
//!
//! **Job.** `blockdev-snapshot-internal-sync` and its opposite; what `query-block` knows of images beside the command line.
//! **Who is not trusted.** QMP's clients, whose names may be any text; a disk's process, whose answers are bounded and shown, and
//! decide nothing. **Why this way.** Only that process looks into its image, and it does so between two requests of the guest, when the
//! disk has taken all that was written. Meanwhile the VM can be watched, stopped and ended; other commands wait, so that none comes in
//! between.

use std::time::{Duration, Instant};

use ipc::disk::{Answer, Order, Snapshot};
use ipc::limits::MAX_SNAPSHOT_NAME;
use ipc::spec::DeviceSpec;
use ipc::spec::block::ImageFormat;
use ipc::spec::vm::DeviceKind;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::time::{ClockId, clock_gettime};

use super::event_loop::{ORDER, Vm, lock};
use super::with_causes;
use crate::qmp::{Disks, ImageFacts, QmpError, Reply};

/// Bytes of a sector (virtio 1.3, 5.2.4: `capacity`).
const SECTOR: u64 = 512;

/// For how long the guest has been running since this process was started.
#[derive(Debug, Default)]
pub(super) struct RunClock {
    ran: Duration,
    since: Option<Instant>,
}

impl RunClock {
    pub(super) fn goes(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    pub(super) fn stands(&mut self) {
        if let Some(since) = self.since.take() {
            self.ran += since.elapsed();
        }
    }

    fn nanoseconds(&self) -> u64 {
        let now = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        u64::try_from((self.ran + now).as_nanos()).unwrap_or(u64::MAX)
    }
}

fn generic(what: String) -> QmpError {
    QmpError::generic(what)
}

/// What a disk's process is doing with its image, and for whom.
#[derive(Debug)]
pub(super) struct DiskOrder {
    unit: usize,
    deadline: Instant,
    purpose: Purpose,
}

impl DiskOrder {
    /// When the answer has to be there.
    pub(super) const fn deadline(&self) -> Instant {
        self.deadline
    }
}

#[derive(Debug)]
enum Purpose {
    Create {
        device: String,
        name: String,
        reply: Reply<()>,
    },
    Delete {
        device: String,
        id: Option<String>,
        name: Option<String>,
        reply: Reply<Snapshot>,
    },
    List(Listing),
}

/// All disks' images, as far as they have been asked for.
#[derive(Debug)]
struct Listing {
    told: Vec<(usize, Answer)>,
    /// The last one comes next.
    rest: Vec<usize>,
    reply: Reply<Disks>,
}

impl Purpose {
    /// Of what was ordered came `answer`; what goes on is given back.
    fn concluded(self, unit: usize, answer: Result<Answer, QmpError>) -> Option<Listing> {
        match self {
            Self::Create {
                device,
                name,
                reply,
            } => reply.send(answer.and_then(|answer| created(&device, &name, &answer))),
            Self::Delete {
                device,
                id,
                name,
                reply,
            } => {
                let [id, name] = [&id, &name].map(Option::as_deref);
                reply.send(answer.and_then(|answer| deleted(&device, id, name, answer)));
            }
            Self::List(mut listing) => {
                // One that cannot be asked is told of without that.
                listing
                    .told
                    .extend(answer.ok().map(|answer| (unit, answer)));
                return Some(listing);
            }
        }
        None
    }
}

/// What a client is told of the answer to [`Order::Create`].
fn created(device: &str, name: &str, answer: &Answer) -> Result<(), QmpError> {
    let failed = |why: &str| {
        generic(format!(
            "Failed to create snapshot '{name}' on device '{device}': {why}"
        ))
    };
    match answer {
        Answer::Created => Ok(()),
        Answer::Exists => Err(generic(format!(
            "Snapshot with name '{name}' already exists on device '{device}'"
        ))),
        Answer::Failed(errno) => Err(failed(Errno::from_raw(*errno).desc())),
        _ => Err(failed("its process has another answer than that")),
    }
}

/// What a client is told of the answer to [`Order::Delete`].
fn deleted(
    device: &str,
    id: Option<&str>,
    name: Option<&str>,
    answer: Answer,
) -> Result<Snapshot, QmpError> {
    let failed = |why: &str| {
        let shown = name.or(id).unwrap_or("null");
        generic(format!(
            "Failed to delete snapshot '{shown}' on device '{device}': {why}"
        ))
    };
    match answer {
        Answer::Deleted(snapshot) => Ok(snapshot),
        Answer::Unknown => Err(unknown(device, id, name)),
        Answer::Failed(errno) => Err(failed(Errno::from_raw(errno).desc())),
        _ => Err(failed("its process has another answer than that")),
    }
}

fn unknown(device: &str, id: Option<&str>, name: Option<&str>) -> QmpError {
    let [id, name] = [id, name].map(|text| text.unwrap_or("null"));
    generic(format!(
        "Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'"
    ))
}

impl Vm {
    /// `blockdev-snapshot-internal-sync`
    pub(super) fn snapshot_disk(&mut self, device: String, name: String, reply: Reply<()>) {
        let unit = match self.may_have_snapshot(&device, &name) {
            Ok(unit) => unit,
            Err(error) => return reply.send(Err(error)),
        };
        let now = clock_gettime(ClockId::CLOCK_REALTIME);
        let (seconds, nanoseconds) = now.map_or((0, 0), |now| (now.tv_sec(), now.tv_nsec()));
        let order = Order::Create {
            name: name.clone(),
            seconds: seconds as u32, // as in the image: until 2106
            nanoseconds: nanoseconds as u32,
            clock: self.clock.nanoseconds(),
        };
        let purpose = Purpose::Create {
            device,
            name,
            reply,
        };
        self.begin(unit, &order, purpose);
    }

    fn may_have_snapshot(&self, device: &str, name: &str) -> Result<usize, QmpError> {
        let unit = self.image_with_snapshots(device)?;
        if name.is_empty() {
            return Err(generic("Name is empty".into()));
        }
        if name.len() > MAX_SNAPSHOT_NAME {
            return Err(generic(format!(
                "Parameter 'name' has {} bytes; allowed: 1 to {MAX_SNAPSHOT_NAME}",
                name.len()
            )));
        }
        Ok(unit)
    }

    /// `blockdev-snapshot-delete-internal-sync`
    pub(super) fn forget_snapshot(
        &mut self,
        device: String,
        id: Option<String>,
        name: Option<String>,
        reply: Reply<Snapshot>,
    ) {
        let unit = match self.may_forget(&device, id.as_deref(), name.as_deref()) {
            Ok(unit) => unit,
            Err(error) => return reply.send(Err(error)),
        };
        let order = Order::Delete {
            id: id.clone(),
            name: name.clone(),
        };
        let purpose = Purpose::Delete {
            device,
            id,
            name,
            reply,
        };
        self.begin(unit, &order, purpose);
    }

    fn may_forget(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<usize, QmpError> {
        let unit = self.image_with_snapshots(device)?;
        if id.is_none() && name.is_none() {
            return Err(generic("Name or id must be provided".into()));
        }
        let mut given = [id, name].into_iter().flatten();
        if given.any(|text| text.len() > MAX_SNAPSHOT_NAME) {
            return Err(unknown(device, id, name));
        }
        Ok(unit)
    }

    /// The place among the devices of the disk with this name, if its image can have snapshots in it now.
    fn image_with_snapshots(&self, name: &str) -> Result<usize, QmpError> {
        let none = |format: &str| {
            generic(format!(
                "Block format '{format}' used by device '{name}' does not support internal snapshots"
            ))
        };
        let Some((device, unit)) = self.disk(name) else {
            return Err(generic(format!(
                "Cannot find device='{name}' nor node-name='{name}'"
            )));
        };
        if matches!(device.kind, DeviceKind::ForeignBlock { .. }) {
            return Err(none("vhost-user"));
        }
        if self.job.is_some() || self.parts.pager.is_some() {
            return Err(generic(super::hotplug::SNAPSHOT.into()));
        }
        let grant = self.parts.plan.policy.devices.get(unit);
        let Some(DeviceSpec::Block(disk)) = grant.map(|grant| &grant.spec) else {
            return Err(QmpError::device_not_found(name));
        };
        if disk.readonly {
            return Err(generic(format!("Device '{name}' is read only")));
        }
        match disk.io.format {
            ImageFormat::Raw => Err(none("raw")),
            ImageFormat::Qcow2 { .. } if self.supervisor.is_settled(unit) => Ok(unit),
            ImageFormat::Qcow2 { .. } => Err(generic(format!(
                "Device '{}' is about to get another process; wait for DEVICE_RECOVERED or DEVICE_FAILED",
                device.id
            ))),
        }
    }

    /// Has a disk's process do something; [`Vm::go_on_with_order`] has the answer.
    fn begin(&mut self, unit: usize, order: &Order, purpose: Purpose) {
        match self.ordered(unit, order) {
            Ok(deadline) => {
                self.order = Some(DiskOrder {
                    unit,
                    deadline,
                    purpose,
                });
            }
            Err(error) => {
                if let Some(listing) = purpose.concluded(unit, Err(error)) {
                    self.list(listing);
                }
            }
        }
    }

    fn ordered(&self, unit: usize, order: &Order) -> Result<Instant, QmpError> {
        let transport = self.parts.transports.get(unit);
        let transport = transport.ok_or_else(|| generic("there is no such device".into()))?;
        let mut transport = lock(transport);
        let begun = transport.begin_order(order);
        begun.map_err(|error| generic(with_causes(&error)))?;
        if let Some(socket) = transport.device_socket() {
            let added = self.poller.add(socket, ORDER, EpollFlags::EPOLLIN);
            added.map_err(|errno| generic(format!("epoll_ctl: {}", errno.desc())))?;
        }
        let deadline = transport.core().device().order_deadline();
        Ok(deadline.unwrap_or_else(Instant::now))
    }

    /// Looks whether a disk's process is done with what it was ordered, and answers who waits for that.
    pub(super) fn go_on_with_order(&mut self) {
        let Some(order) = &self.order else {
            return;
        };
        let unit = order.unit;
        let Some(transport) = self.parts.transports.get(unit) else {
            return;
        };
        let mut transport = lock(transport);
        let answer = match transport.order_answer() {
            Ok(None) => return,
            Ok(Some(answer)) => Ok(answer),
            Err(error) => Err(generic(with_causes(&error))),
        };
        if let Some(socket) = transport.device_socket() {
            // One that another process has by now was never watched for this.
            let _ = self.poller.remove(socket);
        }
        drop(transport);
        if let Some(order) = self.order.take()
            && let Some(listing) = order.purpose.concluded(unit, answer)
        {
            self.list(listing);
        }
    }

    /// `query-block`, `query-named-block-nodes`
    pub(super) fn tell_of_disks(&mut self, reply: Reply<Disks>) {
        let mut rest: Vec<usize> = self.images().map(|(_, unit)| unit).collect();
        rest.retain(|unit| self.has_list(*unit));
        self.list(Listing {
            told: Vec::new(),
            rest,
            reply,
        });
    }

    /// Asks the next image, or answers.
    fn list(&mut self, mut listing: Listing) {
        match listing.rest.pop() {
            Some(unit) => self.begin(unit, &Order::List, Purpose::List(listing)),
            None => {
                let images = self.facts_of_images(&listing.told);
                let facts = self.facts();
                listing
                    .reply
                    .send(facts.map(|facts| Disks { facts, images }));
            }
        }
    }

    /// Whether the image of disk `unit` tells what is in it.
    fn has_list(&self, unit: usize) -> bool {
        let grant = self.parts.plan.policy.devices.get(unit);
        matches!(grant.map(|grant| &grant.spec), Some(DeviceSpec::Block(disk))
            if matches!(disk.io.format, ImageFormat::Qcow2 { .. }))
            && self.supervisor.is_settled(unit)
    }

    /// The drives of disks that are there, with their places among the devices.
    fn images(&self) -> impl Iterator<Item = (&str, usize)> {
        self.parts.spec.devices.iter().filter_map(|device| {
            let DeviceKind::Block { drive, .. } = &device.kind else {
                return None;
            };
            Some((drive.as_str(), self.disk(&device.id)?.1))
        })
    }

    /// What is known of their images.
    fn facts_of_images(&self, told: &[(usize, Answer)]) -> Vec<(String, ImageFacts)> {
        let mut images = Vec::new();
        for (drive, unit) in self.images() {
            let Some(transport) = self.parts.transports.get(unit) else {
                continue;
            };
            let mut facts = ImageFacts::default();
            let of_it = told.iter().find(|(told, _)| *told == unit);
            if let Some((_, Answer::Image { cluster, snapshots })) = of_it {
                (facts.cluster, facts.snapshots) = (Some(*cluster), snapshots.clone());
            }
            let transport = lock(transport);
            let config = transport.core().device().config();
            let sectors = config.first_chunk();
            let sectors = sectors.map_or(0, |word| u64::from_le_bytes(*word));
            facts.size = sectors.saturating_mul(SECTOR);
            images.push((drive.to_owned(), facts));
        }
        images
    }
}
