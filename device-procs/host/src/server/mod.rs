//! The vhost-user back end: one device, its queues, one front end, one event loop.
//!
//! **Job.** Answers vhost-user messages, polls kicks and back ends, gives the device its turns.
//!
//! States of a queue: *described* (size, addresses, base) -> *started* (a kick descriptor came) -> *running* (also enabled).
//! `GET_VRING_BASE` stops it. A guest fault makes it *broken* until it is started anew; the vring error eventfd
//! (`SET_VRING_ERR`) is signalled once, on which the control process sets `DEVICE_NEEDS_RESET` (virtio 1.3, 2.1.2).
//!
//! **Who is not trusted.** The front end: a message that does not fit ends the connection, and with it the process. Queue
//! addresses and sizes are the guest's choice even though the front end sends them, so those break the queue only.
//!
//! **Why this way.** `vhost-user-backend`'s handler refuses in-flight regions and wants threads; `vhost`'s request trait is
//! enough. Kicks are polled edge-triggered and never read: an eventfd that nobody reads still wakes on each write, that is one
//! system call less per kick, and the counter tells a restarted process that there was a kick before it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::epoll::Epoll;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{Error as VhostError, Result as VhostResult};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::{Device, Interest};
use crate::fault::HostFault;
use crate::kept::KeptArea;
use crate::memory::{GuestRam, MemoryError};
use crate::patience::Patience;
use crate::record::Record;
use crate::ring::Ring;
use crate::window::Window;

mod ahead;
mod connection;
#[cfg(fuzzing)]
pub mod fuzzing;
mod messages;
mod refusal;
mod region;
mod turns;

pub(crate) use connection::{Connection, Resources};

/// Bits that the harness offers for every device.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// `epoll` data: the socket, then kicks, then back ends.
pub(crate) const SOCKET: u64 = 0;
pub(crate) const FIRST_KICK: u64 = 1;
const FIRST_BACKEND: u64 = 1 << 32;

/// Why serving ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The front end sent something that it may not.
    #[error("front end: {what}")]
    Frontend {
        /// Which message, and what is wrong with it.
        what: String,
        /// The library's view.
        #[source]
        source: VhostError,
    },
    /// The host failed.
    #[error(transparent)]
    Host(#[from] HostFault),
    /// The device asks for something that virtio does not have.
    #[error(
        "device has {queues} queues of {size} entries: 1 to {} queues, a power of two of entries are possible",
        ipc::limits::MAX_QUEUES
    )]
    Shape {
        /// Its queues.
        queues: u16,
        /// Entries of each.
        size: u16,
    },
}

pub(crate) struct Server<D> {
    pub(crate) device: D,
    pub(crate) rings: Vec<Ring>,
    pub(crate) epoll: Epoll,
    /// What each back end is polled for now.
    polled: Vec<Interest>,
    pub(crate) ram: Option<Rc<GuestRam>>,
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    /// Written after each message, for a process that comes after this one.
    pub(crate) record: Option<Record>,
    /// The in-flight region in use: where it starts, its queues and their entries.
    pub(crate) inflight_shape: (u64, u16, u16),
    /// Handed out on `GET_INFLIGHT_FD` and back with `SET_INFLIGHT_FD`, which may bring another one as well; made before
    /// the jail was shut, since nothing can be made inside, and not duplicated either.
    pub(crate) inflight_memory: Option<File>,
    pub(crate) inflight_given: bool,
    /// Of this process's memory, for a front end that asks for it before it sends guest RAM.
    userfault: Option<OwnedFd>,
    /// Behind the in-flight region's queues, if this device keeps something.
    kept: Option<KeptArea>,
    /// How long to look for work before sleeping.
    patience: Patience,
    /// The device has finished something while it was looked for.
    finished: bool,
    /// The device takes requests.
    begun: bool,
    /// The last transfer of the device's state has worked.
    state_moved: bool,
    /// The shared memory region, if the device has one and the front end takes requests for it.
    pub(crate) window: Option<Arc<Window>>,
    /// The last refusal or host fault, for the log: the library passes only a code through.
    refused: Option<String>,
    fatal: Option<HostFault>,
}

pub(crate) fn lock<D>(server: &Mutex<Server<D>>) -> MutexGuard<'_, Server<D>> {
    // A panic ends the process, so nobody sees a poisoned lock.
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Device> Server<D> {
    pub(super) fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    /// The library is told of a fault by its code only.
    pub(super) fn or_fatal(&mut self, result: Result<(), HostFault>) -> VhostResult<()> {
        result.map_err(|fault| {
            self.fatal = Some(fault);
            VhostError::BackendInternalError
        })
    }

    /// The device may have files mapped for the driver from now on.
    pub(crate) fn open_window(&mut self, window: Window) {
        let window = Arc::new(window);
        self.window = Some(window.clone());
        self.device.open_window(window);
    }

    /// What was recorded, or made here, is not usable.
    pub(crate) fn refused_record(&mut self, source: VhostError) -> ServeError {
        let what = self.refused.take().unwrap_or_else(|| "record".to_owned());
        ServeError::Frontend { what, source }
    }

    pub(crate) fn unusable(&mut self, error: &MemoryError) -> ServeError {
        self.refused = Some(ipc::log::with_causes(error));
        self.refused_record(VhostError::InvalidParam)
    }
}
