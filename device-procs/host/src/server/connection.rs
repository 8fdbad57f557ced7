//! A device that is connected: what it is made of, and the loop that serves it.
//!
//! **Job.** Waits, obeys one message at a time, and gives the device its turns until the front end leaves.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::region::region_bytes;
use super::{SOCKET, ServeError, Server, lock};
use crate::device::{Device, Interest};
use crate::fault::HostFault;
use crate::patience::Patience;
use crate::record::{self, Word};
use crate::ring::Ring;

/// Events taken from one `epoll_wait`.
const EVENTS: usize = 16;

/// A connected device: runs until the front end leaves.
pub(crate) struct Connection<D: Device> {
    pub(crate) server: Arc<Mutex<Server<D>>>,
    pub(crate) messages: BackendReqHandler<Mutex<Server<D>>>,
}

/// Things that are made before the jail is shut and used inside.
#[derive(Debug)]
pub(crate) struct Resources {
    epoll: Epoll,
    inflight_memory: File,
    pub(crate) userfault: Option<OwnedFd>,
}

impl Resources {
    /// For a device with all its queues.
    pub(crate) fn prepare(device: &impl Device) -> Result<Self, ServeError> {
        let (queues, queue_size) = (device.num_queues(), device.max_queue_size());
        let shape = ServeError::Shape {
            queues,
            size: queue_size,
        };
        if queues == 0 || queues > ipc::limits::MAX_QUEUES || !queue_size.is_power_of_two() {
            return Err(shape);
        }
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(HostFault::of("epoll_create1"))?;
        let memory = memfd_create(
            c"inflight",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .map_err(HostFault::of("memfd_create"))?;
        let size = region_bytes(device, queues, queue_size);
        // At most 33 queues of 32768 entries of 16 bytes.
        nix::unistd::ftruncate(&memory, size as libc::off_t)
            .map_err(HostFault::of("ftruncate of the in-flight region"))?;
        // Who gets it can do nothing to the next process that maps it.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))
            .map_err(HostFault::of("fcntl(F_ADD_SEALS)"))?;
        Ok(Self {
            epoll,
            inflight_memory: memory.into(),
            userfault: None,
        })
    }
}

impl<D: Device> Connection<D> {
    pub(crate) fn new(
        stream: UnixStream,
        device: D,
        resources: Resources,
    ) -> Result<Self, ServeError> {
        let connection = Self::unpolled(stream, device, resources)?;
        connection.poll()?;
        Ok(connection)
    }

    /// Watches the front end's socket and the back ends.
    pub(crate) fn poll(&self) -> Result<(), ServeError> {
        let mut server = lock(&self.server);
        server
            .epoll
            .add(
                record::look(&self.messages),
                EpollEvent::new(EpollFlags::EPOLLIN, SOCKET),
            )
            .map_err(HostFault::of("epoll_ctl of the vhost-user socket"))?;
        Ok(server.poll_backends()?)
    }

    pub(crate) fn unpolled(
        stream: UnixStream,
        device: D,
        resources: Resources,
    ) -> Result<Self, ServeError> {
        let queues = device.num_queues();
        let size = device.max_queue_size();
        let rings = (0..queues)
            .map(|index| Ring::new(index, size))
            .collect::<Option<Vec<_>>>()
            .ok_or(ServeError::Shape { queues, size })?;
        let Resources {
            epoll,
            inflight_memory,
            userfault,
        } = resources;
        let polled = vec![Interest::NONE; device.backends().len()];
        // `BackendReqHandler` wants a handler with interior mutability. One thread, so the lock is never waited for.
        #[allow(clippy::arc_with_non_send_sync)]
        let server = Arc::new(Mutex::new(Server {
            device,
            rings,
            epoll,
            polled,
            ram: None,
            features: 0,
            protocol_features: 0,
            record: None,
            inflight_shape: (0, 0, 0),
            inflight_memory: Some(inflight_memory),
            inflight_given: false,
            userfault,
            kept: None,
            patience: Patience::default(),
            finished: false,
            begun: false,
            state_moved: false,
            window: None,
            refused: None,
            fatal: None,
        }));
        Ok(Self {
            messages: BackendReqHandler::from_stream(stream, server.clone()),
            server,
        })
    }

    /// Serves until the front end closes the connection.
    pub(crate) fn run(&mut self) -> Result<(), ServeError> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = lock(&self.server).wait(&mut events)?;
            let mut message = false;
            for event in &events[..count] {
                match event.data() {
                    SOCKET => message = true,
                    data => lock(&self.server).event(data, event.events())?,
                }
            }
            // Last, since a message may take away what the other events are about.
            if message && !self.message()? {
                return Ok(());
            }
            lock(&self.server).take_turns()?;
        }
    }

    /// One message; `false` when the front end has left.
    pub(crate) fn message(&mut self) -> Result<bool, ServeError> {
        let record = lock(&self.server).record;
        let Some(record) = record else {
            return self.obey();
        };
        record.store(Word::Busy, 1);
        let result = self.obey();
        lock(&self.server).save(record);
        record.store(Word::Busy, 0);
        result
    }

    fn obey(&mut self) -> Result<bool, ServeError> {
        if self.early_enable() {
            return Ok(true);
        }
        if let Some(done) = self.channel() {
            return done.map(|()| true);
        }
        let result = self.messages.handle_request();
        let mut server = lock(&self.server);
        if let Some(fault) = server.fatal.take() {
            return Err(fault.into());
        }
        let refused = server.refused.take();
        match result {
            Ok(()) | Err(VhostError::SocketRetry(_)) => Ok(true),
            Err(VhostError::Disconnected) => Ok(false),
            // It may leave without having read all answers, or with one on its way.
            Err(VhostError::SocketBroken(source))
                if matches!(
                    source.kind(),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                Ok(false)
            }
            Err(source) => Err(ServeError::Frontend {
                what: refused.unwrap_or_else(|| "message cannot be served".to_owned()),
                source,
            }),
        }
    }
}
