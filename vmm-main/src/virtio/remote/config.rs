//! Configuration space, and what the host changes in it: a card's link, a disk's size.
//!
//! **Job.** Reads it again when the device says that it has changed, passes the driver's writes on, and tells the device what the host wants.
//! **Who is not trusted**: the device process, whose answer has to have the length that was asked for.
//! **Why this way.** A copy is here, so that reads of the guest wake nobody.

use ipc::limits::MAX_CONFIG_SPACE;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserVringState,
};
use vm_memory::ByteValued;

use super::offer::ConfigFrom;
use super::{RemoteDevice, RemoteError, VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use crate::virtio::link::{Link, LinkError};

/// Where a card's `status` is, of which bit 0 says that there is a link (virtio 1.3, 5.1.4).
pub(in crate::virtio) const NET_STATUS: usize = 6;

/// The bits of it.
const STATUS_LINK_UP: u8 = 1;

pub(super) const STATUS_ANNOUNCE: u8 = 2;

/// Asks for the first `len` bytes of configuration space, at most all of it. The front end's request has to carry as many bytes
/// as it wants back.
pub(super) fn post_get_config(link: &mut Link, len: usize) -> Result<(), LinkError> {
    let header = VhostUserConfig::new(0, len as u32, VhostUserConfigFlags::empty());
    link.post(
        FrontendReq::GET_CONFIG,
        &[header.as_slice(), &[0; MAX_CONFIG_SPACE][..len]],
        &[],
    )
}

impl RemoteDevice {
    /// Configuration space, [`MAX_CONFIG_SPACE`] bytes, zero where the device has none.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// What the guest reads from now on is a disk without a medium, a card without a link. `true` if that is something new.
    pub fn show_absence(&mut self) -> bool {
        let before = self.config.clone();
        match self.virtio_id {
            // Capacity (virtio 1.3, 5.2.4).
            VIRTIO_ID_BLOCK => {
                if let Some(capacity) = self.config.get_mut(..8) {
                    capacity.fill(0);
                }
            }
            VIRTIO_ID_NET => self.show_link(false),
            _ => {}
        }
        self.config != before
    }

    /// What the guest reads of a card's link from now on.
    pub(super) fn show_link(&mut self, up: bool) {
        if let Some(status) = self.config.get_mut(NET_STATUS) {
            *status = u8::from(up);
        }
    }

    /// Pulls a card's cable, or plugs it in. `true` if that is something new for the guest. A process that comes later is told as well.
    pub fn set_link(&mut self, up: bool) -> Result<bool, RemoteError> {
        let before = self.config.clone();
        self.link_down = !up;
        self.show_link(up);
        if self.link.is_some() {
            self.tell_link()?;
        }
        Ok(self.config != before)
    }

    /// Has a card tell the network where the guest is. `true` if its driver is to do that, and has to be told: configuration space says
    /// so until the driver has seen it.
    pub fn announce(&mut self) -> Result<bool, RemoteError> {
        if self.virtio_id != VIRTIO_ID_NET || !self.config_from.is_own() || self.link_down {
            return Ok(false);
        }
        self.tell_status(STATUS_LINK_UP | STATUS_ANNOUNCE)?;
        self.refresh_config()?;
        let status = self.config.get(NET_STATUS);
        Ok(status.is_some_and(|status| status & STATUS_ANNOUNCE != 0))
    }

    pub(super) fn tell_link(&mut self) -> Result<(), RemoteError> {
        if matches!(self.config_from, ConfigFrom::Card(_)) {
            // No daemon knows a link; it has no queues to use while there is none.
            let (active, on) = (self.active.clone(), u32::from(!self.link_down));
            return self.talk(|link| {
                for index in active {
                    let state = VhostUserVringState::new(u32::from(index), on);
                    link.post(FrontendReq::SET_VRING_ENABLE, &[state.as_slice()], &[])?;
                }
                link.finish().map(drop)
            });
        }
        self.tell_status(u8::from(!self.link_down))
    }

    fn tell_status(&mut self, status: u8) -> Result<(), RemoteError> {
        let status = [status, 0];
        // Not the driver's doing: the device takes it from nobody else.
        let flags = VhostUserConfigFlags::LIVE_MIGRATION;
        let header = VhostUserConfig::new(NET_STATUS as u32, status.len() as u32, flags);
        self.talk(|link| {
            link.post(FrontendReq::SET_CONFIG, &[header.as_slice(), &status], &[])?;
            link.finish().map(drop)
        })
    }

    /// Has a disk's process make it so many sectors long; `false` if it does not, for a reason that it has told in the log.
    pub fn set_capacity(&mut self, sectors: u64) -> Result<bool, RemoteError> {
        let capacity = sectors.to_le_bytes();
        // As for a card's status.
        let flags = VhostUserConfigFlags::LIVE_MIGRATION;
        let header = VhostUserConfig::new(0, capacity.len() as u32, flags);
        self.talk(|link| {
            link.post(
                FrontendReq::SET_CONFIG,
                &[header.as_slice(), &capacity],
                &[],
            )?;
            link.finish().map(drop)
        })?;
        self.refresh_config()?;
        Ok(self.config.starts_with(&capacity))
    }

    /// Writes into configuration space and reads back what became of it. Whether the device takes the bytes is its
    /// decision: a refusal is no failure. The caller has checked the bounds.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), RemoteError> {
        if self.config_from.len() == 0 {
            return Ok(());
        }
        let header =
            VhostUserConfig::new(offset, bytes.len() as u32, VhostUserConfigFlags::empty());
        let result = self.talk(|link| {
            link.post(FrontendReq::SET_CONFIG, &[header.as_slice(), bytes], &[])?;
            match link.finish() {
                Err(error) if error.is_refusal() => Ok(()),
                other => other.map(drop),
            }
        });
        result.and_then(|()| self.refresh_config())
    }

    /// Reads the configuration space again.
    pub fn refresh_config(&mut self) -> Result<(), RemoteError> {
        if self.config_from.len() == 0 {
            return Ok(());
        }
        let len = self.config_from.len();
        let values = self.talk(|link| {
            post_get_config(link, len)?;
            link.finish()
        })?;
        match self
            .config_from
            .space(&self.id, values.first(), self.num_queues)
        {
            Ok(config) => {
                self.config = config;
                Ok(())
            }
            Err(error) => {
                self.hang_up();
                Err(error)
            }
        }
    }
}
