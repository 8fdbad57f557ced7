//! The harness without a process, a jail or a wait: what fuzz targets drive.
//!
//! **Job.** [`Bench`] holds a device, its rings and guest memory, and gives turns exactly as the event loop does.
//! [`serve`] runs the real loop on a socket whose other end has said all that it will.
//!
//! **Who is not trusted.** Nobody: the input is hostile on purpose, and what this file does with it is the product's code.
//!
//! **Why this way.** A live process gives some hundred inputs a second, this gives tens of thousands. Compiled only with
//! `cfg(fuzzing)`, so that no build of the product has a way around [`Prepared::enter_jail`](crate::Prepared::enter_jail).

#![allow(clippy::expect_used)] // a fuzz target that cannot be set up has to stop

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::sys::epoll::EpollFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserMemoryRegion};
use vm_memory::{Bytes, GuestAddress};

use super::{Connection, Resources, ServeError, Server, lock};
use crate::device::Device;
use crate::inflight::queue_bytes;
use crate::ring::UserAddresses;
use crate::start::BackendFds;

/// Where a queue is: guest physical addresses.
#[derive(Debug, Clone, Copy)]
pub struct QueueShape {
    /// Its number.
    pub index: u16,
    /// Entries; what is no power of two or too large is refused as a front end's would be.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Where to go on in the available ring.
    pub base: u16,
}

/// The descriptors of a device's back ends.
pub fn backend_fds(fds: Vec<OwnedFd>) -> BackendFds {
    BackendFds(fds.into_iter())
}

/// Serves `socket` until it ends, as a device process does.
///
/// # Errors
/// As [`Serving::run`](crate::Serving::run).
pub fn serve<D: Device>(device: D, socket: UnixStream) -> Result<(), ServeError> {
    let resources = Resources::prepare(&device)?;
    Connection::new(socket, device, resources)?.run()
}

/// A device with memory and queues.
pub struct Bench<D: Device> {
    connection: Connection<D>,
    /// Open, so that the device is not told of its end.
    _front: UnixStream,
}

impl<D: Device> Bench<D> {
    /// `regions`: guest physical address and bytes of each.
    pub fn new(device: D, regions: &[(u64, u64)]) -> Self {
        let resources = Resources::prepare(&device).expect("the device has a possible shape");
        let (front, back) = UnixStream::pair().expect("socketpair");
        let bench = Self {
            connection: Connection::new(back, device, resources).expect("a connection"),
            _front: front,
        };
        let (table, files): (Vec<_>, Vec<_>) = regions
            .iter()
            .map(|(guest, size)| {
                let region = VhostUserMemoryRegion::new(*guest, *size, *guest, 0);
                (region, memory_file(*size))
            })
            .unzip();
        bench
            .with(|server| server.set_mem_table(&table, files, None))
            .expect("guest memory");
        bench
    }

    fn with<R>(&self, use_it: impl FnOnce(&mut Server<D>) -> R) -> R {
        use_it(&mut lock(&self.connection.server))
    }

    /// Writes to guest memory; what is outside of it is left out.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.with(|server| {
            if let Some(ram) = &server.ram {
                let _ = ram.map().write(bytes, GuestAddress(at));
            }
        });
    }

    /// Reads guest memory; what is outside of it is 0.
    pub fn read(&self, at: u64, out: &mut [u8]) {
        self.with(|server| {
            if let Some(ram) = &server.ram {
                let _ = ram.map().read(out, GuestAddress(at));
            }
        });
    }

    /// A driver resets the device.
    pub fn reset(&self) {
        let _ = self.with(Server::reset_device);
    }

    /// A driver accepts those of `features` that are offered.
    pub fn accept(&self, features: u64) {
        self.with(|server| {
            let accepted = features & server.offered();
            let _ = server.set_features(accepted);
        });
    }

    /// A region with `contents` becomes the in-flight region of `queues` queues of `size` entries.
    pub fn inflight(&self, contents: &[u8], queues: u16, size: u16) {
        let bytes = u64::from(queues) * queue_bytes(size) as u64;
        let file = memory_file(bytes.max(1));
        let end = contents.len().min(bytes as usize);
        let _ = nix::sys::uio::pwrite(&file, &contents[..end], 0);
        let region = VhostUserInflight::new(bytes, 0, queues, size);
        let _ = self.with(|server| server.set_inflight_fd(&region, file));
    }

    /// Describes, starts and enables a queue; its turn is due then.
    pub fn start(&self, shape: &QueueShape) {
        self.with(|server| {
            let index = u32::from(shape.index);
            let _ = server.set_vring_num(index, u32::from(shape.size));
            let _ = server.set_vring_base(index, u32::from(shape.base));
            let (event_idx, indirect) = (
                server.features & (1 << 29) != 0,
                server.features & (1 << 28) != 0,
            );
            let ram = server.ram.clone();
            if let (Some(ring), Some(ram)) = (server.rings.get_mut(usize::from(shape.index)), ram) {
                ring.addresses = Some(UserAddresses {
                    descriptors: shape.descriptors,
                    available: shape.available,
                    used: shape.used,
                });
                ring.enabled = true;
                if let Err(fault) = ring.start(&ram, event_idx, indirect) {
                    ring.break_with(fault.kind);
                }
            }
        });
    }

    /// A kick.
    pub fn kick(&self, index: u16) {
        self.with(|server| {
            let _ = server.event(super::FIRST_KICK + u64::from(index), EpollFlags::EPOLLIN);
        });
    }

    /// Turns for all queues that are due, `most` times at most. `false` when the device gave up.
    pub fn turns(&self, most: usize) -> bool {
        self.with(|server| {
            for _ in 0..most {
                if !server.rings.iter().any(|ring| ring.due) {
                    break;
                }
                if server.take_turns().is_err() {
                    return false;
                }
            }
            true
        })
    }

    /// Back end `index` has become readable and writable, as far as the device asked to be told.
    pub fn backend_ready(&self, index: usize) -> bool {
        self.with(|server| {
            let interest = server.device.interest(index);
            let mut ready = EpollFlags::empty();
            ready.set(EpollFlags::EPOLLIN, interest.readable);
            ready.set(EpollFlags::EPOLLOUT, interest.writable);
            ready.is_empty() || server.backend_event(index, ready).is_ok()
        })
    }

    /// Whether the queue was found faulty.
    pub fn is_broken(&self, index: u16) -> bool {
        self.with(|server| {
            server
                .rings
                .get(usize::from(index))
                .is_some_and(crate::Ring::is_broken)
        })
    }
}

fn memory_file(size: u64) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd_create"));
    file.set_len(size).expect("ftruncate");
    file
}
