//! What the control process has disks do with their images, and tells of them.
//!
//! **Job.** `blockdev-snapshot-internal-sync` and its opposite; what `query-block` knows of images beside the command line.
//! **Who is not trusted.** QMP's clients, whose names may be any text; a disk's process, whose answers are bounded and shown, and
//! decide nothing. **Why this way.** Only that process looks into its image, and it does so between two requests of the guest. This one
//! waits for it, as QEMU's main loop does, so that no other command comes in between.

use std::time::{Duration, Instant};

use ipc::disk::{Answer, Order, Snapshot};
use ipc::limits::MAX_SNAPSHOT_NAME;
use ipc::spec::DeviceSpec;
use ipc::spec::block::ImageFormat;
use ipc::spec::vm::DeviceKind;
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

use super::event_loop::{Vm, lock};
use super::with_causes;
use crate::qmp::{ImageFacts, QmpError};

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

impl Vm {
    /// `blockdev-snapshot-internal-sync`
    pub(super) fn snapshot_disk(&self, device: &str, name: &str) -> Result<(), QmpError> {
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
        let now = clock_gettime(ClockId::CLOCK_REALTIME);
        let (seconds, nanoseconds) = now.map_or((0, 0), |now| (now.tv_sec(), now.tv_nsec()));
        let order = Order::Create {
            name: name.to_owned(),
            seconds: seconds as u32, // as in the image: until 2106
            nanoseconds: nanoseconds as u32,
            clock: self.clock.nanoseconds(),
        };
        let failed = |why: &str| {
            generic(format!(
                "Failed to create snapshot '{name}' on device '{device}': {why}"
            ))
        };
        match self.order(unit, &order)? {
            Answer::Created => Ok(()),
            Answer::Exists => Err(generic(format!(
                "Snapshot with name '{name}' already exists on device '{device}'"
            ))),
            Answer::Failed(errno) => Err(failed(Errno::from_raw(errno).desc())),
            _ => Err(failed("its process has another answer than that")),
        }
    }

    /// `blockdev-snapshot-delete-internal-sync`
    pub(super) fn forget_snapshot(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<Snapshot, QmpError> {
        let unit = self.image_with_snapshots(device)?;
        if id.is_none() && name.is_none() {
            return Err(generic("Name or id must be provided".into()));
        }
        let [shown_id, shown_name] = [id, name].map(|text| text.unwrap_or("null"));
        let unknown = || {
            generic(format!(
                "Snapshot with id '{shown_id}' and name '{shown_name}' does not exist on device '{device}'"
            ))
        };
        let given = [id, name].into_iter().flatten();
        if given.map(str::len).any(|len| len > MAX_SNAPSHOT_NAME) {
            return Err(unknown());
        }
        let failed = |why: &str| {
            generic(format!(
                "Failed to delete snapshot '{}' on device '{device}': {why}",
                name.unwrap_or(shown_id)
            ))
        };
        let order = Order::Delete {
            id: id.map(str::to_owned),
            name: name.map(str::to_owned),
        };
        match self.order(unit, &order)? {
            Answer::Deleted(snapshot) => Ok(snapshot),
            Answer::Unknown => Err(unknown()),
            Answer::Failed(errno) => Err(failed(Errno::from_raw(errno).desc())),
            _ => Err(failed("its process has another answer than that")),
        }
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

    fn order(&self, unit: usize, order: &Order) -> Result<Answer, QmpError> {
        let transport = self.parts.transports.get(unit);
        let transport = transport.ok_or_else(|| generic("there is no such device".into()))?;
        let answer = lock(transport).order(order);
        answer.map_err(|error| generic(with_causes(&error)))
    }

    /// What is known of the images of disks that are there, by the ids of their drives.
    pub(super) fn images(&self) -> Vec<(String, ImageFacts)> {
        let mut images = Vec::new();
        for device in &self.parts.spec.devices {
            let DeviceKind::Block { drive, .. } = &device.kind else {
                continue;
            };
            let Some((_, unit)) = self.disk(&device.id) else {
                continue;
            };
            let Some(transport) = self.parts.transports.get(unit) else {
                continue;
            };
            let mut facts = ImageFacts::default();
            let grant = self.parts.plan.policy.devices.get(unit);
            if let Some(DeviceSpec::Block(disk)) = grant.map(|grant| &grant.spec)
                && matches!(disk.io.format, ImageFormat::Qcow2 { .. })
                && self.supervisor.is_settled(unit)
                && let Ok(Answer::Image { cluster, snapshots }) = self.order(unit, &Order::List)
            {
                (facts.cluster, facts.snapshots) = (Some(cluster), snapshots);
            }
            let transport = lock(transport);
            let config = transport.core().device().config();
            let sectors = config.first_chunk();
            let sectors = sectors.map_or(0, |word| u64::from_le_bytes(*word));
            facts.size = sectors.saturating_mul(SECTOR);
            images.push((drive.clone(), facts));
        }
        images
    }
}
