//! A virtio device in a snapshot.
//!
//! **Job.** What its driver told it, how far its queues were, what was in flight, and the configuration space that the guest
//! knows; and whether all that fits a device of this VM.
//!
//! **Who is not trusted**: whoever made the snapshot. What is taken from it is what a driver could have written to the
//! registers, checked as the registers check it: a queue's size is one that the device offers, features are offered, the
//! queue's place is held against RAM when the device process gets it. Indices and in-flight entries are the device
//! process's to check, which does not trust them either.
//!
//! **Why this way.** The device process of a restored VM is a new one and learns its queues as after a crash of the one
//! before it.

use ipc::limits::{MAX_DEVICE_STATE, MAX_INFLIGHT_REGION};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::core::{CoreState, status};
use super::remote::{F_VERSION_1, NET_STATUS, RemoteDevice};

/// All that goes on of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// What the driver told it.
    pub core: CoreState,
    /// Index in the available ring to go on from, by queue; empty when no queue was at work.
    pub bases: Vec<u16>,
    /// Configuration space as the guest knows it.
    pub config: Vec<u8>,
    /// Contents of the in-flight region.
    pub inflight: Option<Vec<u8>>,
    /// What the device's process holds for the guest and only another one understands: open files of a shared folder.
    pub held: Option<Vec<u8>>,
}

/// Why a device cannot go on from a snapshot.
#[derive(Debug, Error)]
pub enum Misfit {
    /// Another number of queues.
    #[error("device \"{id}\" had {saved} queues in the snapshot and has {now}")]
    Queues {
        /// Device id.
        id: String,
        /// Then.
        saved: usize,
        /// Now.
        now: u16,
    },
    /// A queue that no driver can have set up.
    #[error("queue {queue} of device \"{id}\" is not one that a driver can have set up")]
    Queue {
        /// Device id.
        id: String,
        /// Queue number.
        queue: usize,
    },
    /// The driver accepted what is not offered.
    #[error(
        "the driver of device \"{id}\" uses features {used:#x}, of which {offered:#x} are offered now: the host, its tap or its file system can do less"
    )]
    Features {
        /// Device id.
        id: String,
        /// What the driver accepted.
        used: u64,
        /// What there is.
        offered: u64,
    },
    /// The guest knows another configuration space: a disk's size, a card's address, a folder's tag.
    #[error(
        "device \"{id}\" has another configuration than in the snapshot, from byte {at} on: {what}"
    )]
    Config {
        /// Device id.
        id: String,
        /// First byte that differs.
        at: usize,
        /// What users know such bytes by.
        what: &'static str,
    },
    /// A status that no device has.
    #[error("device \"{id}\" has a state in the snapshot that no device can have")]
    State {
        /// Device id.
        id: String,
    },
}

/// Virtio device IDs (virtio 1.3, section 5).
const NET: u32 = 1;
const BLOCK: u32 = 2;
/// Where a disk's driver switches its write cache (virtio 1.3, 5.2.4: `writeback`).
pub(super) const BLOCK_WRITEBACK: usize = 32;
const FS: u32 = 26;

/// Whether a driver can have brought a device to these status bits: each comes after others (virtio 1.3, 3.1.1).
const fn can_have(bits: u8) -> bool {
    const DRIVER: u8 = status::ACKNOWLEDGE | status::DRIVER;
    const SETTLED: u8 = DRIVER | status::FEATURES_OK;
    let steps = bits & (SETTLED | status::DRIVER_OK);
    // The other two may come at any time.
    let known = bits & !(status::NEEDS_RESET | status::FAILED) == steps;
    const RUNNING: u8 = SETTLED | status::DRIVER_OK;
    known && matches!(steps, 0 | status::ACKNOWLEDGE | DRIVER | SETTLED | RUNNING)
}

impl DeviceState {
    /// What the driver has written into configuration space, if another process is to be told: where, and what.
    pub(super) fn written(&self, device: &RemoteDevice) -> Option<(u32, u8)> {
        let saved = *self.config.get(BLOCK_WRITEBACK)?;
        let differs =
            device.virtio_id() == BLOCK && device.config().get(BLOCK_WRITEBACK) != Some(&saved);
        differs.then_some((BLOCK_WRITEBACK as u32, saved))
    }

    /// Whether the host had a card's link down.
    pub(super) fn link_is_down(&self, device: &RemoteDevice) -> bool {
        let status = self.config.get(NET_STATUS);
        device.virtio_id() == NET && status.is_some_and(|status| status & 1 == 0)
    }

    /// Whether `device` can go on from this.
    pub fn check(&self, device: &RemoteDevice) -> Result<(), Misfit> {
        let id = || device.id().to_owned();
        let core = &self.core;
        if core.queues.len() != usize::from(device.num_queues()) {
            return Err(Misfit::Queues {
                id: id(),
                saved: core.queues.len(),
                now: device.num_queues(),
            });
        }
        let can_be = |queue: &super::remote::QueueState| {
            queue.max_size == device.queue_size()
                && queue.size.is_power_of_two()
                && queue.size <= queue.max_size
                && (!queue.ready
                    || queue.desc.is_multiple_of(16)
                        && queue.driver.is_multiple_of(2)
                        && queue.device.is_multiple_of(4))
        };
        if let Some(queue) = core.queues.iter().position(|queue| !can_be(queue)) {
            return Err(Misfit::Queue { id: id(), queue });
        }
        let inflight = self.inflight.as_ref().map_or(0, Vec::len);
        if !can_have(core.status)
            || self.bases.len() > core.queues.len()
            || inflight > MAX_INFLIGHT_REGION as usize
            || self.held.as_ref().map_or(0, Vec::len) > MAX_DEVICE_STATE
            || self.held.is_some() && !device.has_state()
        {
            return Err(Misfit::State { id: id() });
        }
        let settled = core.status & status::FEATURES_OK != 0;
        match core.accepted_features() {
            Some(used) if used & !device.features() == 0 && used & F_VERSION_1 != 0 => {}
            _ if !settled => {}
            used => {
                return Err(Misfit::Features {
                    id: id(),
                    used: used.unwrap_or(u64::MAX),
                    offered: device.features(),
                });
            }
        }
        let now = device.config();
        let differs = (0..now.len().max(self.config.len()))
            .filter(|at| {
                let free = [(BLOCK, BLOCK_WRITEBACK), (NET, NET_STATUS)];
                !free.contains(&(device.virtio_id(), *at))
            })
            .find(|at| now.get(*at) != self.config.get(*at));
        match differs {
            None => Ok(()),
            Some(at) => Err(Misfit::Config {
                id: id(),
                at,
                what: match (device.virtio_id(), at) {
                    (BLOCK, 0..8) => "the image has another size",
                    (NET, 0..6) => "the card has another address (mac=)",
                    (FS, 0..36) => "the folder has another tag",
                    _ => "a property of -device or -drive was another one",
                },
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_bits_come_one_after_the_other() {
        let possible = (0..=u8::MAX).filter(|bits| can_have(*bits));
        let possible: Vec<u8> = possible.collect();
        let steps = [0, 1, 3, 11, 15];
        let with = |more: u8| steps.map(|bits| bits | more);
        let mut expected = [with(0), with(64), with(128), with(192)].concat();
        expected.sort_unstable();
        assert_eq!(possible, expected);
    }
}
