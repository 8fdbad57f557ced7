//! Guest memory on its way to a device process.
//!
//! **Job.** The memory table, and, if memory comes in on demand or is a template's, the agreement to be told of the process's page faults first.
//! **Who is not trusted**: the device process: its addresses are told to the kernel only, for its own page faults.
//! **Why this way.** The table is answered before the process may touch memory (vhost-user, postcopy), so that no access is missed.

use std::os::fd::AsFd;

use ipc::limits::MAX_MEMORY_REGIONS;
use nix::errno::Errno;
use vhost::vhost_user::message::{FrontendReq, VhostUserMemory, VhostUserMemoryRegion};
use vm_memory::{ByteValued, FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{RemoteDevice, RemoteError};
use crate::memory::sharing::DeviceFaults;

impl RemoteDevice {
    pub(super) fn post_memory(&mut self, memory: &GuestMemoryMmap<()>) -> Result<(), RemoteError> {
        let mut body = Vec::new();
        let mut fds = Vec::new();
        for region in memory.iter() {
            let Some(backing) = region.file_offset() else {
                return Err(RemoteError::Memory {
                    what: "a region has no file",
                });
            };
            let address = region.start_addr().0;
            let entry = VhostUserMemoryRegion::new(address, region.len(), address, backing.start());
            body.extend_from_slice(entry.as_slice());
            fds.push(backing.file().as_fd());
        }
        if fds.is_empty() || fds.len() > MAX_MEMORY_REGIONS {
            return Err(RemoteError::Memory {
                what: "it has no region or too many",
            });
        }
        let header = VhostUserMemory::new(fds.len() as u32);
        let Some(sharing) = self.sharing.clone() else {
            return self.talk(|link| {
                link.post(
                    FrontendReq::SET_MEM_TABLE,
                    &[header.as_slice(), &body],
                    &fds,
                )
            });
        };
        if !self.can_share() {
            sharing.bring_in().wait();
            self.sharing = None;
            return self.post_memory(memory);
        }
        let faults = match &self.faults {
            Some(faults) => faults.clone(),
            None => self.listen(header.as_slice().len() + body.len())?,
        };
        // The same table, with the process's own addresses.
        let values = self.talk(|link| {
            link.finish()?;
            link.post(
                FrontendReq::SET_MEM_TABLE,
                &[header.as_slice(), &body],
                &fds,
            )?;
            link.finish()
        })?;
        let answer = values
            .first()
            .and_then(|value| value.get(header.as_slice().len()..));
        let answer = answer.unwrap_or_default();
        // `struct VhostUserMemoryRegion`: guest address, size, user address, offset in the file; 64 bits each.
        let regions = answer
            .chunks_exact(32)
            .zip(memory.iter())
            .map(|(entry, region)| {
                let mut address = [0; 8];
                address.copy_from_slice(&entry[16..24]);
                let offset = region.file_offset().map_or(0, FileOffset::start);
                (offset, region.len(), u64::from_le_bytes(address))
            });
        if let Err(source) = sharing.watch(&self.id, &faults, regions) {
            self.hang_up();
            return Err(RemoteError::Watch {
                id: self.id.clone(),
                source,
            });
        }
        // It may touch its memory from here on.
        self.talk(|link| {
            link.tell(FrontendReq::SET_MEM_TABLE, &[0; 8]);
            Ok(())
        })
    }

    /// Has the process tell of its page faults; memory tables are answered from here on, by as many bytes as they have.
    fn listen(&mut self, table: usize) -> Result<DeviceFaults, RemoteError> {
        let fd = self.talk(|link| {
            // Alone on the way, so that the descriptor is known to belong to this reply.
            link.finish()?;
            link.post(FrontendReq::POSTCOPY_ADVISE, &[], &[])?;
            link.finish()?;
            let fd = link.take_fd();
            link.post(FrontendReq::POSTCOPY_LISTEN, &[], &[])?;
            link.finish()?;
            link.expect_table(table);
            Ok(fd)
        })?;
        match fd {
            Some(fd) => {
                let faults = DeviceFaults::new(fd);
                self.faults = Some(faults.clone());
                Ok(faults)
            }
            None => {
                self.hang_up();
                Err(RemoteError::Watch {
                    id: self.id.clone(),
                    source: Errno::EBADF,
                })
            }
        }
    }
}
