//! A connection that goes on in another process.
//!
//! **Job.** Writes the [`Record`] after each message, and builds a [`Connection`] from it as it was when the last process was
//! killed.
//! **Who is not trusted.** The record's contents; see its module.
//! **Why this way.** The library that reads messages keeps what was negotiated to itself, so the negotiation is said to it
//! once more, over a socket that then becomes the front end's.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use ipc::limits::{MAX_MEMORY_REGIONS, MAX_QUEUES};
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight, VhostUserVirtioFeatures};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::Device;
use crate::fault::HostFault;
use crate::memory::Region;
use crate::record::{self, Record, Word};
use crate::ring::UserAddresses;
use crate::server::{Connection, FIRST_KICK, Resources, ServeError, Server, lock};
use crate::window::Window;

const STARTED: u64 = 1;
const ENABLED: u64 = 1 << 1;
const BROKEN: u64 = 1 << 2;

fn gone(what: &'static str) -> ServeError {
    HostFault::of(what)(Errno::EBADF).into()
}

impl<D: Device> Server<D> {
    /// Everything that a message may have changed.
    pub(crate) fn save(&self, record: Record) {
        record.store(Word::Features, self.features);
        record.store(Word::ProtocolFeatures, self.protocol_features);
        let regions = self.ram.as_ref().map_or(&[][..], |ram| ram.regions());
        for (index, region) in regions.iter().enumerate() {
            let file = record::stored(region.file.as_deref());
            let words = [region.guest, region.size, region.user, region.offset, file];
            record.set_region(index, words);
        }
        for index in regions.len()..MAX_MEMORY_REGIONS {
            record.set_region(index, [0; 5]);
        }
        record.store(Word::Regions, regions.len() as u64);
        record.store(
            Word::InflightFile,
            record::stored(self.inflight_memory.as_ref()),
        );
        let channel = self.window.as_ref().map(|window| window.channel());
        record.store(Word::Channel, record::stored(channel));
        let (offset, queues, size) = self.inflight_shape;
        record.store(Word::InflightOffset, offset);
        record.store(
            Word::InflightShape,
            u64::from(queues) << 16 | u64::from(size),
        );
        for (index, ring) in self.rings.iter().enumerate() {
            let flag = |on: bool, flag: u64| if on { flag } else { 0 };
            let state = flag(ring.is_started(), STARTED)
                | flag(ring.enabled, ENABLED)
                | flag(ring.is_broken(), BROKEN)
                | u64::from(ring.size()) << 16
                | u64::from(ring.base) << 32;
            let at = ring.addresses.as_ref();
            record.set_queue(
                index,
                [
                    state,
                    at.map_or(0, |a| a.descriptors),
                    at.map_or(0, |a| a.available),
                    at.map_or(0, |a| a.used),
                    record::stored(ring.kick.as_ref()),
                    record::stored(ring.call()),
                    record::stored(ring.error.as_ref()),
                ],
            );
        }
    }

    fn restore(&mut self, record: Record) -> Result<(), ServeError> {
        if let Some(channel) = record::adopt(record.load(Word::Channel)) {
            let window = Window::resume(channel, record, self.device.window_len())
                .map_err(|_| gone("request to the front end that was at hand"))?;
            self.open_window(window);
        }
        let mut regions = Vec::new();
        // Capped where it is written, and once more where it is used.
        for index in 0..(record.load(Word::Regions) as usize).min(MAX_MEMORY_REGIONS) {
            let word = |at| record.region(index, at);
            let file =
                record::adopt_file(word(record::FILE)).ok_or_else(|| gone("guest memory"))?;
            let (guest, size, user) = (word(record::GUEST), word(record::SIZE), word(record::USER));
            let region = Region::new(guest, size, user, &file, word(record::OFFSET))
                .map_err(|error| self.unusable(&error))?;
            regions.push(region.with_file(file));
        }
        if !regions.is_empty() {
            self.set_regions("record", regions)
                .map_err(|source| self.refused_record(source))?;
        }
        let file = record::adopt_file(record.load(Word::InflightFile))
            .ok_or_else(|| gone("in-flight region"))?;
        {
            let shape = record.load(Word::InflightShape);
            let (queues, size) = ((shape >> 16) as u16, shape as u16);
            let region =
                VhostUserInflight::new(u64::MAX, record.load(Word::InflightOffset), queues, size);
            let used = self.use_inflight(&region, &file);
            self.inflight_memory = Some(file);
            self.inflight_given = true;
            used.map_err(|source| self.refused_record(source))?;
        }
        for index in 0..self.rings.len().min(usize::from(MAX_QUEUES)) {
            self.restore_ring(record, index)?;
        }
        Ok(())
    }

    fn restore_ring(&mut self, record: Record, index: usize) -> Result<(), ServeError> {
        let word = |at| record.queue(index, at);
        let state = word(record::STATE);
        let ram = self.ram.clone();
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let indirect = self.features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let Some(ring) = self.rings.get_mut(index) else {
            return Ok(());
        };
        // Each 16 bits wide.
        ring.set_size((state >> 16) as u16);
        ring.base = (state >> 32) as u16;
        ring.enabled = state & ENABLED != 0;
        ring.set_call(record::adopt(word(record::CALL)));
        ring.error = record::adopt(word(record::ERROR));
        if word(record::DESCRIPTORS) != 0 || word(record::USED) != 0 {
            ring.addresses = Some(UserAddresses {
                descriptors: word(record::DESCRIPTORS),
                available: word(record::AVAILABLE),
                used: word(record::USED),
            });
        }
        let Some(kick) = record::adopt(word(record::KICK)) else {
            return Ok(());
        };
        let event = EpollEvent::new(
            EpollFlags::EPOLLIN | EpollFlags::EPOLLET,
            FIRST_KICK + index as u64,
        );
        self.epoll
            .add(&kick, event)
            .map_err(HostFault::of("epoll_ctl of a kick"))?;
        ring.kick = Some(kick);
        let Some(ram) = ram.filter(|_| state & STARTED != 0) else {
            return Ok(());
        };
        if let Err(fault) = ring.start(&ram, event_idx, indirect) {
            ring.break_with(fault.kind);
        } else if state & BROKEN != 0 {
            ring.stay_broken();
        }
        Ok(())
    }
}

impl<D: Device> Connection<D> {
    /// Has `record` written from now on.
    pub(crate) fn keep(&mut self, record: Record) -> Result<(), ServeError> {
        let mut server = lock(&self.server);
        server.record = Some(record);
        server.track_by_default()?;
        server.save(record);
        record.store(Word::Socket, record::stored(Some(&self.messages)));
        Ok(())
    }

    /// Takes over the connection of `record`; [`restore`](Self::restore) does the rest.
    pub(crate) fn resume(
        record: Record,
        device: D,
        resources: Resources,
    ) -> Result<Self, ServeError> {
        let socket = record::adopt(record.load(Word::Socket)).ok_or_else(|| gone("connection"))?;
        if record.load(Word::Busy) != 0 {
            // What the front end waits for cannot be known; it sees the end of the connection.
            return Err(HostFault::of("message that was at hand")(Errno::EINTR).into());
        }
        let (ours, mut theirs) =
            UnixStream::pair().map_err(|e| HostFault::of("socketpair")(errno(&e)))?;
        let mut connection = Self::unpolled(ours, device, resources)?;
        connection.negotiate(record, &mut theirs)?;
        let number = connection.messages.as_raw_fd();
        record::replace(number, &socket).map_err(HostFault::of("dup3"))?;
        // There is one number that is right at each moment.
        record.store(Word::Socket, record::stored(Some(&connection.messages)));
        drop(socket);
        Ok(connection)
    }

    /// Maps the guest's memory and starts its queues as they were.
    pub(crate) fn restore(&mut self, record: Record) -> Result<(), ServeError> {
        {
            let mut server = lock(&self.server);
            server.record = Some(record);
            server.restore(record)?;
            let Server { device, rings, .. } = &mut *server;
            device.resumed(rings)?;
            server.save(record);
        }
        self.poll()
    }

    /// Says once more what the front end said: the features that were offered, and those that were accepted.
    fn negotiate(&mut self, record: Record, peer: &mut UnixStream) -> Result<(), ServeError> {
        let features = record.load(Word::Features);
        let protocol = record.load(Word::ProtocolFeatures);
        let accepted = (features != 0).then_some((FrontendReq::SET_FEATURES, features));
        let negotiated =
            features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 || protocol != 0;
        let set = negotiated.then_some((FrontendReq::SET_PROTOCOL_FEATURES, protocol));
        for (request, value) in [Some((FrontendReq::GET_FEATURES, 0)), set, accepted]
            .into_iter()
            .flatten()
        {
            // Request, version 1, size of the payload; then the payload.
            let size: u32 = if request == FrontendReq::GET_FEATURES {
                0
            } else {
                8
            };
            let mut message = Vec::with_capacity(20);
            for word in [request as u32, 1, size] {
                message.extend_from_slice(&word.to_ne_bytes());
            }
            if size > 0 {
                message.extend_from_slice(&value.to_ne_bytes());
            }
            peer.write_all(&message)
                .map_err(|e| HostFault::of("socketpair")(errno(&e)))?;
            if !self.message()? {
                return Err(gone("socketpair"));
            }
        }
        Ok(())
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
