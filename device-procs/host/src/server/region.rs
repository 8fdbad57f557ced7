//! The in-flight region: what this process must not forget when it dies.
//!
//! **Job.** Lays the region out (requests in flight, what the device keeps, what it counts), and takes the one that the front end
//! gives, or this process's own. **Who is not trusted.** The front end, for the region's shape and its file.

use std::fs::File;
use std::rc::Rc;

use vhost::vhost_user::Result as VhostResult;
use vhost::vhost_user::message::VhostUserInflight;

use super::refusal::Refusal;
use super::{ServeError, Server};
use crate::counters::Counters;
use crate::device::Device;
use crate::inflight::{InflightQueue, queue_bytes};
use crate::kept::{KeptArea, area_bytes};
use crate::memory::{Mapping, MemoryError};
use crate::ring::Ring;

impl<D: Device> Server<D> {
    pub(crate) fn use_inflight(
        &mut self,
        region: &VhostUserInflight,
        file: &File,
    ) -> VhostResult<()> {
        let message = "SET_INFLIGHT_FD";
        if self.rings.iter().any(Ring::is_started) {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        let needed = self.inflight_bytes(message, region)?;
        if region.mmap_size < needed {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: region.mmap_size,
                allowed: "the size that GET_INFLIGHT_FD told",
            }));
        }
        let mapping = match Mapping::new(file, region.mmap_offset, needed) {
            Ok(mapping) => Rc::new(mapping),
            Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
        };
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let part = (index < usize::from(region.num_queues))
                .then(|| InflightQueue::new(mapping.clone(), index, region.queue_size));
            ring.set_inflight(part);
        }
        self.inflight_shape = (region.mmap_offset, region.num_queues, region.queue_size);
        if let Some(start) = counters_start(&self.device, region.num_queues, region.queue_size) {
            let counters = Counters::new(mapping.clone(), start);
            self.device.count_in(counters);
        }
        let most = self.device.kept_len();
        if most > 0 {
            let start = usize::from(region.num_queues) * queue_bytes(region.queue_size);
            let area = KeptArea::new(mapping, start, most);
            if let Some(kept) = area.load() {
                self.device.go_on_with(&kept);
            }
            self.kept = Some(area);
            self.keep();
        }
        Ok(())
    }

    /// Without a front end that tracks requests in flight they are tracked for this program's own sake.
    pub(crate) fn track_by_default(&mut self) -> Result<(), ServeError> {
        let (queues, size) = (self.device.num_queues(), self.device.max_queue_size());
        let Some(file) = self.inflight_memory.take() else {
            return Ok(());
        };
        // Who asks for it gets it emptied.
        self.inflight_given = true;
        let region = VhostUserInflight::new(u64::MAX, 0, queues, size);
        let used = self.use_inflight(&region, &file);
        self.inflight_memory = Some(file);
        used.map_err(|source| self.refused_record(source))
    }

    pub(super) fn inflight_bytes(
        &mut self,
        message: &'static str,
        region: &VhostUserInflight,
    ) -> VhostResult<u64> {
        if usize::from(region.num_queues) > self.rings.len() {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: u64::from(region.num_queues),
                allowed: "at most the device's queues",
            }));
        }
        if region.queue_size > self.device.max_queue_size() {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: u64::from(region.queue_size),
                allowed: "at most the device's queue size",
            }));
        }
        Ok(region_bytes(&self.device, region.num_queues, region.queue_size) as u64)
    }
}

/// Bytes of an in-flight region: the queues' parts, what the device keeps, and what it counts.
pub(super) fn region_bytes(device: &impl Device, queues: u16, queue_size: u16) -> usize {
    counters_start(device, queues, queue_size).map_or_else(
        || kept_end(device, queues, queue_size),
        |start| start + ipc::counters::BYTES,
    )
}

pub(super) fn kept_end(device: &impl Device, queues: u16, queue_size: u16) -> usize {
    usize::from(queues) * queue_bytes(queue_size) + area_bytes(device.kept_len())
}

/// Where a device's counters are in the region: at its end, on a cache line.
fn counters_start(device: &impl Device, queues: u16, queue_size: u16) -> Option<usize> {
    device
        .counts()
        .then(|| kept_end(device, queues, queue_size).next_multiple_of(64))
}

/// Zeroes the first `size` bytes of the region, for a front end that asks for a fresh one again.
pub(super) fn clear(file: &File, size: u64) -> Result<(), MemoryError> {
    let mapping = Mapping::new(file, 0, size)?;
    let bytes = mapping.bytes();
    let zeros = [0u8; 256];
    let mut done = 0;
    while done < bytes.len() {
        let Ok(rest) = bytes.offset(done) else { break };
        rest.copy_from(&zeros);
        done += zeros.len().min(rest.len());
    }
    Ok(())
}
