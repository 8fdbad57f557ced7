//! What the host has a disk's process do with its image, and what came of it.
//!
//! **Job.** An order in parts, the run, the answer in pages. **Who is not trusted**: the device process: its answer is bounded, and is one of the
//! answers that there are or ends the process.
//! **Why this way.** Places of configuration space that only the front end reaches (`VHOST_USER_SET_CONFIG` with the flag of migration) need no
//! message that vhost-user does not have. Nobody waits for the answer, which may take as long as the disk does: whoever has something
//! else to say to the process meanwhile hears the answer first, keeps it, and says so.

use std::time::{Duration, Instant};

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

/// An order that the process has been given.
#[derive(Debug)]
pub(super) struct Ordered {
    /// When patience ends.
    deadline: Instant,
    /// The first page of the answer, if somebody heard it who had something else to say.
    heard: Option<Vec<Vec<u8>>>,
}

impl RemoteDevice {
    /// Has a disk's process do something with its image. Nothing else was ordered that is not answered.
    pub fn begin_order(&mut self, order: &Order) -> Result<(), RemoteError> {
        let patience = Duration::from_millis(DISK_ORDER_MS);
        let bytes = encode_within::<MAX_DISK_ORDER, _>(order);
        let bytes = bytes.map_err(|source| RemoteError::Order {
            id: self.id.clone(),
            source,
        })?;
        self.talk(|link| {
            let mut place = disk::BEGIN;
            for part in bytes.chunks(disk::PART) {
                post_order(link, place, part)?;
                place = disk::MORE;
            }
            post_order(link, disk::RUN, &[0])?;
            post_answer(link)?;
            link.flush()
        })?;
        self.ordered = Some(Ordered {
            deadline: Instant::now() + patience,
            heard: None,
        });
        Ok(())
    }

    /// When the answer to what was ordered has to be there.
    pub fn order_deadline(&self) -> Option<Instant> {
        self.ordered.as_ref().map(|ordered| ordered.deadline)
    }

    /// What came of it, if that is known.
    pub fn order_answer(&mut self) -> Result<Option<Answer>, RemoteError> {
        let id = self.id.clone();
        let (Some(ordered), Some(link)) = (&mut self.ordered, &mut self.link) else {
            // The process that had the order is gone.
            return Err(RemoteError::Failed { id });
        };
        let first = match ordered.heard.take() {
            Some(heard) => heard,
            None => {
                link.set_deadline(ordered.deadline, DISK_ORDER_MS);
                match link.try_finish() {
                    Ok(Some(first)) => first,
                    Ok(None) => return Ok(None),
                    Err(source) => {
                        self.hang_up();
                        return Err(RemoteError::Link { id, source });
                    }
                }
            }
        };
        self.ordered = None;
        self.rest_of_answer(first.first()).map(Some)
    }

    /// The process is about to be told something else: what it was ordered is done before, since it does one thing after the other. A
    /// vCPU that waits here holds the device, and whoever pauses it, so it waits no longer than for any answer; then the process
    /// counts as one that hangs, and its image has the snapshots of before or those of after.
    pub(super) fn hear_order(&mut self) -> Result<(), RemoteError> {
        let (Some(ordered), Some(link)) = (&mut self.ordered, &mut self.link) else {
            return Ok(());
        };
        if ordered.heard.is_some() {
            return Ok(());
        }
        link.start_clock();
        match link.finish() {
            Ok(heard) => {
                ordered.heard = Some(heard);
                Ok(())
            }
            Err(source) => {
                self.hang_up();
                Err(RemoteError::Link {
                    id: self.id.clone(),
                    source,
                })
            }
        }
    }

    /// Whether the answer was heard by somebody who had something else to say.
    pub fn order_is_heard(&self) -> bool {
        let ordered = self.ordered.as_ref();
        ordered.is_some_and(|ordered| ordered.heard.is_some())
    }

    /// The answer that begins with this page; what is missing of it is there, and is asked for.
    fn rest_of_answer(&mut self, first: Option<&Vec<u8>>) -> Result<Answer, RemoteError> {
        let mut answer = self.page(first)?;
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
            RemoteError::Order {
                id: self.id.clone(),
                source,
            }
        })
    }

    fn page(&mut self, reply: Option<&Vec<u8>>) -> Result<Vec<u8>, RemoteError> {
        config_space(&self.id, reply, disk::PAGE).inspect_err(|_| self.hang_up())
    }
}
