//! What a device process has taken from the queues and not done yet (vhost-user, "Inflight I/O tracking").
//!
//! **Job.** Keeps the in-flight region for the process that comes next, and for snapshots. **Who is not trusted**: the device process, which writes
//! it; no more is read here than the region's bytes, for people and for files.
//! **Why this way.** The region is never mapped here: it is passed on as a descriptor, so that nothing in it can do harm.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ipc::counters::{self, BlockCounters};
use ipc::limits::MAX_INFLIGHT_REGION;
use vhost::vhost_user::message::FrontendReq;

use super::{RemoteDevice, RemoteError, VIRTIO_ID_BLOCK};

/// Bytes of an in-flight description (vhost-user, "Inflight description": size, offset, queues, queue size, and padding
/// to a multiple of 8).
pub(super) const INFLIGHT_LAYOUT: usize = 24;

/// An in-flight region as its device described it. This process passes it on and never maps it, so nothing that a
/// device writes into the description or the region can harm here.
#[derive(Debug)]
pub(super) struct InflightRegion {
    pub(super) layout: [u8; INFLIGHT_LAYOUT],
    pub(super) file: File,
    /// Which of the device's processes has it.
    pub(super) process: u32,
}

impl InflightRegion {
    /// Bytes, and where they start in the file.
    fn place(&self) -> (usize, u64) {
        let word = |at: usize| {
            self.layout[at..]
                .first_chunk::<8>()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        (usize::try_from(word(0)).unwrap_or(usize::MAX), word(8))
    }

    /// What a disk of ours has counted: the last bytes.
    pub(super) fn counters(&self) -> std::io::Result<BlockCounters> {
        let (size, offset) = self.place();
        let mut bytes = [0; counters::BYTES];
        let before = size.saturating_sub(bytes.len()) as u64;
        self.file
            .read_exact_at(&mut bytes, offset.saturating_add(before))?;
        Ok(BlockCounters::from_bytes(bytes))
    }

    /// How many requests it holds that were taken and not answered (vhost-user, "Inflight I/O tracking", split virtqueue). For
    /// people to read: what a hostile process wrote there gives a wrong number and nothing else.
    pub(super) fn count(&self) -> std::io::Result<u32> {
        // Before the entries of a queue, and each of them, which begins with a byte that is 1 while it is in flight.
        const HEADER: usize = 16;
        const ENTRY: usize = 16;
        // All back ends that are known here start each part on a cache line.
        const ALIGN: usize = 64;
        let (size, offset) = self.place();
        let half = |at: usize| {
            self.layout[at..]
                .first_chunk::<2>()
                .map_or(0, |bytes| usize::from(u16::from_le_bytes(*bytes)))
        };
        let (queues, entries) = (half(16), half(18));
        let mut bytes = vec![0; size.min(MAX_INFLIGHT_REGION as usize)];
        self.file.read_exact_at(&mut bytes, offset)?;
        // What follows the queues' parts is the device's own.
        let part = (HEADER + entries * ENTRY).next_multiple_of(ALIGN);
        let taken = bytes.chunks_exact(part).take(queues).flat_map(|queue| {
            let entries = queue
                .get(HEADER..)
                .unwrap_or_default()
                .chunks_exact(ENTRY)
                .take(entries);
            entries.filter(|entry| entry.first() == Some(&1))
        });
        Ok(u32::try_from(taken.count()).unwrap_or(u32::MAX))
    }
}

impl RemoteDevice {
    /// What a disk of ours has counted since the VM began, or before that in the VM whose snapshot this is; zeros for any other
    /// device. Nobody is asked: the numbers are in the in-flight region.
    pub fn counters(&self) -> BlockCounters {
        let ours = self.virtio_id == VIRTIO_ID_BLOCK && self.config_from.is_own();
        let regions = self.past.iter().chain(&self.inflight);
        regions
            .filter(|_| ours)
            .filter_map(|region| region.counters().ok())
            .fold(self.counted, |before, counters| counters.after(&before))
    }

    /// What is in flight belongs to nobody any more. What was counted is not read here: a vCPU's thread comes this way, and
    /// may read no file.
    pub(super) fn retire_inflight(&mut self) {
        if let Some(region) = self.inflight.take() {
            // One process hands out the same memory each time, and counts on in it.
            self.past.retain(|past| past.process != region.process);
            self.past.push(region);
        }
    }

    /// How many requests were taken and not answered, as far as the in-flight region tells.
    pub fn in_flight(&self) -> Option<u32> {
        self.inflight.as_ref()?.count().ok()
    }

    /// What the in-flight region holds, for a snapshot; `None` if there is none.
    pub fn save_inflight(&self) -> Result<Option<Vec<u8>>, RemoteError> {
        let Some(region) = &self.inflight else {
            return Ok(None);
        };
        let (size, offset) = region.place();
        let told = |source| RemoteError::InflightAccess {
            id: self.id.clone(),
            what: "saved",
            source,
        };
        let mut bytes = vec![0; size.min(MAX_INFLIGHT_REGION as usize)];
        region
            .file
            .read_exact_at(&mut bytes, offset)
            .map_err(told)?;
        Ok(Some(bytes))
    }

    /// The next in-flight region starts with what a snapshot says.
    pub fn restore_inflight(&mut self, bytes: Option<Vec<u8>>) {
        self.restored = bytes;
    }

    pub(super) fn fill_inflight(
        &self,
        region: &InflightRegion,
        bytes: &[u8],
    ) -> Result<(), RemoteError> {
        let (size, offset) = region.place();
        let told = |source| RemoteError::InflightAccess {
            id: self.id.clone(),
            what: "restored",
            source,
        };
        if bytes.len() > size {
            return Err(told(std::io::ErrorKind::FileTooLarge.into()));
        }
        region.file.write_all_at(bytes, offset).map_err(told)
    }

    pub(super) fn get_inflight(&mut self) -> Result<InflightRegion, RemoteError> {
        let mut ask = [0; INFLIGHT_LAYOUT];
        ask[16..18].copy_from_slice(&self.num_queues.to_le_bytes());
        ask[18..20].copy_from_slice(&self.queue_size.to_le_bytes());
        let (values, fd) = self.talk(|link| {
            // Alone on the way, so that the descriptor is known to belong to this reply.
            link.finish()?;
            link.post(FrontendReq::GET_INFLIGHT_FD, &[&ask], &[])?;
            let values = link.finish()?;
            Ok((values, link.take_fd()))
        })?;
        let layout = values
            .first()
            .and_then(|value| <[u8; INFLIGHT_LAYOUT]>::try_from(&value[..]).ok());
        let what = match (layout, fd) {
            (Some(layout), Some(fd)) if layout[..8] != [0; 8] => {
                // What this process has counted is in this memory, too.
                self.past.retain(|past| past.process != self.processes);
                return Ok(InflightRegion {
                    layout,
                    file: File::from(fd),
                    process: self.processes,
                });
            }
            (_, None) => "a descriptor",
            _ => "a size",
        };
        self.hang_up();
        Err(RemoteError::Inflight {
            id: self.id.clone(),
            what,
        })
    }
}
