//! A card that runs gets another tap: `netdev_replace`.
//!
//! **Job.** Find the card, hold what is asked for against what its guest has negotiated, have another process with the new tap take the
//! place of the one that serves, and remember the tap.
//! **Who is not trusted.** QMP's clients. Which taps there are to be had is the broker's to say, as for `netdev_add`.
//! **Why this way.** A process has the descriptors that it was started with and no way to get others, so that a card with another tap
//! is another process, in an identical jail. The way of `device-upgrade` is there for that: until the new one has shown that it can do
//! its work, the old one serves with the old tap.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ipc::control::added::Addition;
use ipc::spec::vm::{DeviceKind, NetBackend, NetdevSpec};

use super::event_loop::{End, Vm, lock};
use super::hotplug::SNAPSHOT;
use crate::qmp::{OtherTap, QmpError, Reply, Workload};

impl Vm {
    /// `netdev_replace`
    pub(super) fn replace_tap(
        &mut self,
        other: OtherTap,
        fds: &[Arc<OwnedFd>],
        reply: Reply<()>,
    ) -> Result<(), End> {
        match self.card_for(&other, fds.len()) {
            Ok((unit, addition)) => self.supervise(|supervisor, cx| {
                supervisor.retap(unit, (addition, fds), other.tap, reply, cx)
            }),
            Err(error) => {
                reply.send(Err(error));
                Ok(())
            }
        }
    }

    /// The place of the card that is to have another tap, and what the broker is asked for. `given` descriptors came along.
    fn card_for(&self, other: &OtherTap, given: usize) -> Result<(usize, Addition), QmpError> {
        let generic = |what: String| Err(QmpError::generic(what));
        let id = &other.netdev;
        let netdevs = self.netdevs();
        let Some(netdev) = netdevs.iter().find(|one| one.id == *id) else {
            return generic(format!("Netdev '{id}' not found"));
        };
        if matches!(netdev.backend, NetBackend::Daemon(_)) {
            return generic(format!(
                "Netdev '{id}' is of type vhost-user, whose daemon has the tap; allowed: one of type tap"
            ));
        }
        let pairs = netdev.queues;
        if given > 0 && given != usize::from(pairs) {
            return generic(format!(
                "Netdev '{id}' has {pairs} queue pairs, and {given} descriptors came; one for each is needed"
            ));
        }
        if let Some(queues) = other.queues.filter(|queues| *queues != pairs) {
            return generic(format!(
                "Parameter 'queues' is {queues}, and netdev '{id}' has {pairs} queue pairs, which its guest knows; allowed: {pairs}"
            ));
        }
        let addition = match &other.tap {
            NetBackend::TapName(ifname) => {
                let same = |one: &&NetdevSpec| matches!(&one.backend, NetBackend::TapName(theirs) if theirs == ifname);
                if let Some(user) = netdevs.iter().find(same) {
                    return generic(format!("Tap '{ifname}' is netdev '{}' already", user.id));
                }
                Addition::Tap {
                    ifname: ifname.clone(),
                    queues: pairs,
                }
            }
            _ => Addition::GivenTap,
        };
        let card = self.parts.spec.devices.iter().find_map(|device| {
            let is = matches!(&device.kind, DeviceKind::Net { netdev, .. } if netdev == id);
            is.then(|| self.hotplug.unit_of(&device.id)).flatten()
        });
        let Some(unit) = card else {
            return generic(format!(
                "Netdev '{id}' has no card: remove it (netdev_del) and add another one"
            ));
        };
        if self.job.is_some() || self.parts.pager.is_some() {
            return generic(SNAPSHOT.into());
        }
        Ok((unit, addition))
    }

    /// Card `unit` has another tap than before.
    pub(super) fn retapped(&mut self, unit: usize, tap: NetBackend) {
        let devices = self.parts.spec.devices.iter();
        let mut netdevs = devices.filter_map(|device| match &device.kind {
            DeviceKind::Net { netdev, .. } => {
                (self.hotplug.unit_of(&device.id) == Some(unit)).then_some(netdev)
            }
            _ => None,
        });
        let Some(id) = netdevs.next().cloned() else {
            return;
        };
        let cold = self.parts.spec.netdevs.iter_mut();
        let mut all = cold.chain(self.hotplug.netdevs_mut());
        if let Some(netdev) = all.find(|one| one.id == id) {
            netdev.backend = tap;
        }
        // Whoever sends to the guest knows it behind the tap that it had.
        if let Some(transport) = self.parts.transports.get(unit) {
            lock(transport).announce();
        }
    }

    fn netdevs(&self) -> Vec<NetdevSpec> {
        self.spec_with_added().netdevs
    }

    /// `query-workloads`
    pub(super) fn workloads(&self) -> Vec<Workload> {
        let netdevs = self.netdevs();
        let ifname = |device: &str| {
            let mut devices = self.parts.spec.devices.iter();
            let device = devices.find(|one| one.id == device)?;
            let DeviceKind::Net { netdev: id, .. } = &device.kind else {
                return None;
            };
            let netdev = netdevs.iter().find(|one| one.id == *id)?;
            match &netdev.backend {
                NetBackend::TapName(name) => Some(name.clone()),
                _ => None,
            }
        };
        let mut all = self.supervisor.workloads();
        for workload in &mut all {
            workload.ifname = ifname(&workload.device);
        }
        all
    }
}
