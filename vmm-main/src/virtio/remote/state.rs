//! What a device process holds for the guest that no register and no queue tells (vhost-user, "Back-end state").
//!
//! **Job.** Gets it for a snapshot and gives it back. **Who is not trusted**: the device process: its bytes are bounded and copied once.
//! **Why this way.** They go through memory that a third party made, so that neither side waits for the other to read.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use ipc::limits::MAX_DEVICE_STATE;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostUserProtocolFeatures,
};

use super::{RemoteDevice, RemoteError, VIRTIO_ID_FS, number};

/// In the answer to `SET_DEVICE_STATE_FD`: no descriptor comes with it. All else is failure.
const NO_DESCRIPTOR: u64 = 1 << 8;

impl RemoteDevice {
    /// Whether its process holds something for the guest that no register and no queue tells.
    pub fn has_state(&self) -> bool {
        self.virtio_id == VIRTIO_ID_FS
    }

    /// What its process holds for the guest, for a snapshot. It goes through `exchange`, an empty file that nobody else has.
    /// All queues are stopped.
    pub fn save_state(&mut self, exchange: Option<&File>) -> Result<Vec<u8>, RemoteError> {
        let what = "saved";
        let exchange = exchange.ok_or_else(|| RemoteError::State {
            id: self.id.clone(),
            what,
            why: "the broker gave no memory for it",
        })?;
        self.move_state(VhostTransferStateDirection::SAVE, exchange, what)?;
        let failed = |source| RemoteError::StateFile {
            id: self.id.clone(),
            what,
            source,
        };
        // One copy, whatever the process writes from now on.
        let mut bytes = Vec::new();
        loop {
            const PIECE: usize = 64 << 10;
            let start = bytes.len();
            bytes.resize(start + PIECE, 0);
            let read = exchange
                .read_at(&mut bytes[start..], start as u64)
                .map_err(failed)?;
            bytes.truncate(start + read);
            if bytes.len() > MAX_DEVICE_STATE {
                return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
            }
            if read == 0 {
                return Ok(bytes);
            }
        }
    }

    /// Has its process go on with what a snapshot holds. No queue has been started.
    pub fn load_state(&mut self, bytes: &[u8]) -> Result<(), RemoteError> {
        let what = "restored";
        let exchange = memfd_create(c"device-state", MFdFlags::MFD_CLOEXEC)
            .map(File::from)
            .map_err(Into::into)
            .and_then(|file| file.write_all_at(bytes, 0).map(|()| file))
            .map_err(|source| RemoteError::StateFile {
                id: self.id.clone(),
                what,
                source,
            })?;
        self.move_state(VhostTransferStateDirection::LOAD, &exchange, what)
    }

    fn move_state(
        &mut self,
        direction: VhostTransferStateDirection,
        exchange: &File,
        what: &'static str,
    ) -> Result<(), RemoteError> {
        let failed = |id: &str, why| RemoteError::State {
            id: id.to_owned(),
            what,
            why,
        };
        if !self
            .protocol
            .contains(VhostUserProtocolFeatures::DEVICE_STATE)
        {
            return Err(failed(
                &self.id,
                "it does not offer that (VHOST_USER_PROTOCOL_F_DEVICE_STATE)",
            ));
        }
        // `struct vhost_user_transfer_device_state`: the direction, and the phase, of which there is one: queues are stopped.
        let mut body = [0; 8];
        body[..4].copy_from_slice(&(direction as u32).to_le_bytes());
        let values = self.talk(|link| {
            link.post(
                FrontendReq::SET_DEVICE_STATE_FD,
                &[&body],
                &[exchange.as_fd()],
            )?;
            link.post(FrontendReq::CHECK_DEVICE_STATE, &[], &[])?;
            link.finish()
        })?;
        if (number(&values, 0), number(&values, 1)) == (NO_DESCRIPTOR, 0) {
            Ok(())
        } else {
            Err(failed(&self.id, "its process tells why in its log"))
        }
    }
}
