//! What the host has a disk's process do with its image, and what came of it.
//!
//! **Job.** An order in parts, the run, the answer in pages. **Who is not trusted**: the device process: its answer is bounded, and is one of the
//! answers that there are or ends the process.
//! **Why this way.** Places of configuration space that only the front end reaches (`VHOST_USER_SET_CONFIG` with the flag of migration) need no
//! message that vhost-user does not have.

use std::time::Duration;

use ipc::codec::{decode_within, encode_within};
use ipc::disk::{self, Answer, Order};
use ipc::limits::{DISK_ORDER_MS, MAX_DISK_ANSWER, MAX_DISK_ORDER};
use vhost::vhost_user::message::{FrontendReq, VhostUserConfig, VhostUserConfigFlags};
use vm_memory::ByteValued;

use super::offer::config_space;
use super::{RemoteDevice, RemoteError};
use crate::virtio::link::{Link, LinkError};

/// Writes where only the host does.
fn post_order(link: &mut Link, place: usize, data: &[u8]) -> Result<(), LinkError> {
    let flags = VhostUserConfigFlags::LIVE_MIGRATION;
    let header = VhostUserConfig::new(place as u32, data.len() as u32, flags);
    link.post(FrontendReq::SET_CONFIG, &[header.as_slice(), data], &[])
}

/// Reads where only the host does.
fn post_answer(link: &mut Link) -> Result<(), LinkError> {
    let flags = VhostUserConfigFlags::LIVE_MIGRATION;
    let header = VhostUserConfig::new(0, disk::PAGE as u32, flags);
    link.post(
        FrontendReq::GET_CONFIG,
        &[header.as_slice(), &[0; disk::PAGE]],
        &[],
    )
}

impl RemoteDevice {
    /// Has a disk's process do something with its image, and waits for that.
    pub fn order(&mut self, order: &Order) -> Result<Answer, RemoteError> {
        let patience = Duration::from_millis(DISK_ORDER_MS);
        let id = self.id.clone();
        let bytes = encode_within::<MAX_DISK_ORDER, _>(order);
        let bytes = bytes.map_err(|source| RemoteError::Order {
            id: id.clone(),
            source,
        })?;
        let first = self.talk(|link| {
            let mut place = disk::BEGIN;
            for part in bytes.chunks(disk::PART) {
                post_order(link, place, part)?;
                place = disk::MORE;
            }
            link.start_clock_of(patience);
            post_order(link, disk::RUN, &[0])?;
            post_answer(link)?;
            link.finish()
        })?;
        let mut answer = self.page(first.first())?;
        let length = answer
            .first_chunk()
            .map_or(0, |word| u32::from_le_bytes(*word) as usize);
        let whole = 4 + length.min(MAX_DISK_ANSWER);
        if answer.len() < whole {
            let pages = self.talk(|link| {
                for at in (disk::PAGE..whole).step_by(disk::PAGE) {
                    post_order(link, disk::SEEK, &(at as u32).to_le_bytes())?;
                    post_answer(link)?;
                }
                link.finish()
            })?;
            for page in &pages {
                answer.extend(self.page(Some(page))?);
            }
        }
        answer.truncate(whole);
        decode_within::<MAX_DISK_ANSWER, _>(&answer[4..]).map_err(|source| {
            self.hang_up();
            RemoteError::Order { id, source }
        })
    }

    fn page(&mut self, reply: Option<&Vec<u8>>) -> Result<Vec<u8>, RemoteError> {
        config_space(&self.id, reply, disk::PAGE).inspect_err(|_| self.hang_up())
    }
}
