//! The device: takes requests off the rings and answers them.
//!
//! **Job.** One [`Pending`] for each request from the time it is taken until its status is written. **Who is not trusted.** The
//! guest. **Why this way.** Requests of all queues go to the engine in one batch, after the queues have had their turns, and come back in
//! any order; none is forgotten when a queue is stopped, since the harness drains the device first.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use device_host::{
    Access, BackendFds, Chain, Counters, Device, DeviceFault, FaultKind, FileIo, GuestBuffers,
    HeldByte, HostFault, Interest, Ring, Token,
};
use ipc::counters::{Field, Kind};
use ipc::limits::{
    BLOCK_ID_BYTES, MAX_BLOCK_QUEUES, MAX_CHAIN_SEGMENTS, MAX_DISK_DEPTH, MAX_IOPS, MAX_POLL_US,
    MAX_QUEUE_SIZE, MAX_RANGES,
};
use ipc::spec::DeviceSpec;
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes, ImageFormat, IoStop, OnError};
use ipc::start::StartMessage;
use nix::errno::Errno;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::backend::raw::RawImage;
use crate::config_space::{ConfigSpace, Geometry};
use crate::engine::{RawEngine, Started};
use crate::error::BuildError;
use crate::formatted::{Engine, Format, Formatted};
use crate::orders::Orders;
use crate::request::{Extent, HEADER, RANGE, Request, Status, place};
use crate::throttle::Throttle;

/// Smallest ring: header, one buffer, status, and a power of two.
pub(crate) const MIN_QUEUE_SIZE: u16 = 4;

/// Bytes that an image in a format of its own is read and written in at best.
const PHYSICAL_BLOCK: u32 = 4096;

/// Names of requests in the log.
const READ: &str = "read";
const WRITE: &str = "write";
const FLUSH: &str = "flush";
const DISCARD: &str = "discard";
const WRITE_ZEROES: &str = "write-zeroes";

/// A disk.
#[derive(Debug)]
pub struct Block {
    engine: Box<dyn Engine<Pending>>,
    config: ConfigSpace,
    serial: [u8; BLOCK_ID_BYTES],
    readonly: bool,
    num_queues: u16,
    queue_size: u16,
    io: BlockIo,
    throttle: Option<Throttle>,
    /// Requests are in the rings, and this is when the throttle lets the next one through.
    throttled_until: Option<Instant>,
    /// Requests are in the rings because the engine had no room for them.
    starved: bool,
    /// A request that failed is left in flight, and this ends the process, so that the guest stops.
    stop: Option<HostFault>,
    /// Nothing may be left in flight.
    draining: bool,
    /// The driver can flush. If not, each write is durable before it is acknowledged (virtio 1.3, 5.2.6.2).
    flushes: bool,
    /// The driver can switch the write cache.
    switches_cache: bool,
    /// What is told of the requests, if there is somebody to tell.
    counters: Option<Counters>,
    /// What the control process wants of the image.
    orders: Orders,
    /// The time, as far as the counters need it: asked once for all that is taken, or done, at once.
    clock: Instant,
}

/// A request that is on its way.
#[derive(Debug)]
struct Pending {
    queue: u16,
    token: Token,
    status: HeldByte,
    /// Bytes for the driver if all goes well.
    data: usize,
    /// Bytes that there is room for.
    room: usize,
    what: &'static str,
    sector: u64,
    /// Bytes of the disk that it is about.
    bytes: u64,
    /// When it was taken.
    taken: Instant,
    /// The range on its way first, then those that follow.
    extents: Vec<Extent>,
}

/// What a request comes to at once.
enum Answer {
    /// Its status, and the bytes of data written to the guest.
    Now(Status, usize),
    /// Ranges, one after the other.
    Extents(&'static str, Vec<Extent>),
}

impl Block {
    /// From the start message and the image descriptor.
    ///
    /// # Errors
    /// The spec and the descriptors do not make one.
    pub fn build(start: &StartMessage, fds: &mut BackendFds) -> Result<Self, BuildError> {
        Self::make(start, |spec, depth| {
            if spec.io.format != ImageFormat::Raw {
                return Err(BuildError::Format);
            }
            let image = fds.take().ok_or(BuildError::NoImage)?;
            let image = RawImage::new(image, spec.readonly, spec.direct)?;
            let physical_block = image.physical_block;
            let engine = choose_engine(image, spec.readonly, spec.io.aio, depth)?;
            Ok((Box::new(engine) as Box<dyn Engine<_>>, physical_block))
        })
    }

    /// From the start message, with an image that `open` makes. All its requests are done one after the other, whatever
    /// `aio=` says.
    ///
    /// # Errors
    /// The spec does not make one, or `open` fails.
    pub fn build_formatted(
        start: &StartMessage,
        open: impl FnOnce(&BlockSpec) -> Result<Box<dyn Format>, BuildError>,
    ) -> Result<Self, BuildError> {
        Self::make(start, |spec, _| {
            let format = Formatted::new(open(spec)?);
            Ok((Box::new(format) as Box<dyn Engine<_>>, PHYSICAL_BLOCK))
        })
    }

    fn make(
        start: &StartMessage,
        open: impl FnOnce(&BlockSpec, u16) -> Result<(Box<dyn Engine<Pending>>, u32), BuildError>,
    ) -> Result<Self, BuildError> {
        let DeviceSpec::Block(spec) = &start.device else {
            return Err(BuildError::NotABlockDevice);
        };
        let check = |property, value: u64, good: bool, allowed| {
            if good {
                return Ok(());
            }
            Err(BuildError::Property {
                property,
                value,
                allowed,
            })
        };
        let (queues, size) = (spec.num_queues, spec.queue_size);
        check(
            "num-queues",
            u64::from(queues),
            (1..=MAX_BLOCK_QUEUES).contains(&queues),
            "1 to 32",
        )?;
        check(
            "queue-size",
            u64::from(size),
            size.is_power_of_two() && (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size),
            "a power of two from 4 to 4096",
        )?;
        let io = spec.io;
        check(
            "poll-us",
            u64::from(io.poll_us),
            io.poll_us <= MAX_POLL_US,
            "0 to 200",
        )?;
        check(
            "throttling.iops-total",
            u64::from(io.iops_total),
            io.iops_total <= MAX_IOPS,
            "0 to 1000000",
        )?;
        let id = spec.serial.as_bytes();
        check(
            "length of serial",
            id.len() as u64,
            id.len() <= BLOCK_ID_BYTES,
            "at most 20 bytes",
        )?;
        let mut serial = [0; BLOCK_ID_BYTES];
        serial[..id.len()].copy_from_slice(id);

        let depth = usize::from(queues) * usize::from(size);
        let depth = depth.min(usize::from(MAX_DISK_DEPTH)) as u16;
        let (engine, physical_block) = open(spec, depth)?;
        // A request is a header, its data, and a status; all descriptors of a queue may be one request.
        let seg_max = usize::from(size).min(MAX_CHAIN_SEGMENTS) - 2;
        let config = ConfigSpace::new(Geometry {
            bytes: engine.size(),
            seg_max: seg_max as u32, // below MAX_CHAIN_SEGMENTS
            num_queues: queues,
            physical_block,
            may_unmap: io.discard,
        });
        Ok(Self {
            engine,
            config,
            serial,
            readonly: spec.readonly,
            num_queues: queues,
            queue_size: size,
            io,
            throttle: Throttle::new(io.iops_total),
            throttled_until: None,
            starved: false,
            stop: None,
            draining: false,
            flushes: false,
            switches_cache: false,
            counters: None,
            orders: Orders::default(),
            clock: Instant::now(),
        })
    }

    /// Serves one request; returns the bytes written from the front of its writable buffers, or nothing if it is on its way.
    fn serve(
        &mut self,
        queue: u16,
        token: Token,
        mut readable: GuestBuffers<'_>,
        mut writable: GuestBuffers<'_>,
    ) -> Result<Option<(Token, u32)>, FaultKind> {
        let Some(status) = writable.take_last_byte() else {
            return Err(FaultKind::Request("no room for a status"));
        };
        let mut pending = Pending {
            queue,
            token,
            status: status.hold(),
            data: 0,
            room: writable.len(),
            what: "request",
            sector: 0,
            bytes: 0,
            taken: self.clock,
            extents: Vec::new(),
        };
        let mut header = [0; HEADER];
        if readable.read(&mut header) < HEADER {
            return Ok(self.refused(pending, "has a header of less than 16 bytes"));
        }
        let request = Request::parse(header);
        let size = self.engine.size();
        let started = match request {
            Request::In { sector } => {
                (pending.what, pending.sector) = (READ, sector);
                pending.bytes = pending.room as u64;
                let Some(at) = place(sector, pending.room, size) else {
                    return Ok(self.refused(pending, "is not inside of the disk"));
                };
                pending.data = pending.room;
                self.engine.read(writable, at, pending)
            }
            Request::Out { sector } => {
                (pending.what, pending.sector) = (WRITE, sector);
                pending.bytes = readable.len() as u64;
                if self.readonly {
                    return Ok(self.refused(pending, "on a read-only disk"));
                }
                let Some(at) = place(sector, readable.len(), size) else {
                    return Ok(self.refused(pending, "is not inside of the disk"));
                };
                self.write(readable, at, pending)
            }
            Request::Flush => {
                pending.what = FLUSH;
                if self.readonly {
                    Started::Done(pending, Ok(()))
                } else {
                    self.engine.flush(pending)
                }
            }
            Request::Discard | Request::WriteZeroes | Request::GetId | Request::Unsupported => {
                match self.answer(request, readable, writable) {
                    Answer::Now(status, data) => {
                        pending.what = match request {
                            Request::Discard => DISCARD,
                            Request::WriteZeroes => WRITE_ZEROES,
                            _ => pending.what,
                        };
                        if status == Status::IoError {
                            self.count(&pending, Field::Invalid);
                        }
                        return Ok(Some(conclude(pending, status, data)));
                    }
                    Answer::Extents(what, extents) => {
                        pending.bytes = extents.iter().map(|extent| extent.len).sum();
                        pending.sector = extents.last().map_or(0, |extent| extent.at / 512);
                        (pending.what, pending.extents) = (what, extents);
                        match pending.extents.last() {
                            Some(extent) => self.engine.zero(*extent, pending),
                            None => Started::Done(pending, Ok(())),
                        }
                    }
                }
            }
        };
        Ok(match started {
            Started::InFlight => None,
            Started::Done(pending, result) => {
                self.look_at_the_clock();
                self.settle(pending, result)
            }
        })
    }

    fn refused(&self, pending: Pending, why: &str) -> Option<(Token, u32)> {
        ipc::guest_warn!("{} at sector {} {why}", pending.what, pending.sector);
        self.count(&pending, Field::Invalid);
        Some(conclude(pending, Status::IoError, 0))
    }

    fn look_at_the_clock(&mut self) {
        if self.counters.is_some() {
            self.clock = Instant::now();
        }
    }

    /// Tells what became of a request: [`Field::Operations`], `Failed` or `Invalid`.
    fn count(&self, pending: &Pending, outcome: Field) {
        let (Some(counters), Some(kind)) = (&self.counters, kind(pending.what)) else {
            return;
        };
        counters.add(kind, outcome, 1);
        if outcome == Field::Invalid {
            return;
        }
        let took = self.clock.saturating_duration_since(pending.taken);
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        counters.add(kind, Field::Nanoseconds, took);
        if outcome == Field::Operations {
            counters.add(kind, Field::Bytes, pending.bytes);
            if kind == Kind::Write && pending.what == WRITE {
                // Inside of the disk, which was checked.
                counters.written_to(pending.sector * 512 + pending.bytes);
            }
        }
    }

    fn write(
        &mut self,
        readable: GuestBuffers<'_>,
        at: u64,
        mut pending: Pending,
    ) -> Started<Pending> {
        let detect = self.io.detect_zeroes;
        let durable = self.is_write_through();
        if detect == DetectZeroes::Off || durable || readable.is_empty() || !readable.is_zero() {
            return self.engine.write(readable, at, durable, pending);
        }
        let extent = Extent {
            at,
            len: readable.len() as u64,
            unmap: self.io.discard && detect == DetectZeroes::Unmap,
        };
        pending.extents.push(extent);
        self.engine.zero(extent, pending)
    }

    /// Requests that move no data of the disk.
    fn answer(
        &mut self,
        request: Request,
        mut readable: GuestBuffers<'_>,
        mut writable: GuestBuffers<'_>,
    ) -> Answer {
        let (what, offered) = match request {
            Request::GetId => return Answer::Now(Status::Ok, writable.write(&self.serial)),
            Request::Discard => (DISCARD, self.io.discard),
            Request::WriteZeroes => (WRITE_ZEROES, true),
            _ => ("request", false),
        };
        if !offered {
            return Answer::Now(Status::Unsupported, 0);
        }
        if self.readonly {
            ipc::guest_warn!("{what} on a read-only disk");
            return Answer::Now(Status::IoError, 0);
        }
        if readable.is_empty()
            || !readable.len().is_multiple_of(RANGE)
            || readable.len() / RANGE > MAX_RANGES
        {
            ipc::guest_warn!("{what} with {} bytes of ranges", readable.len());
            return Answer::Now(Status::IoError, 0);
        }
        let mut extents = Vec::with_capacity(readable.len() / RANGE);
        let mut range = [0; RANGE];
        while readable.read(&mut range) == RANGE {
            match Extent::parse(range, request, self.engine.size()) {
                Ok(None) => {}
                Ok(Some(extent)) => extents.push(Extent {
                    unmap: extent.unmap && self.io.discard,
                    ..extent
                }),
                Err(status) => {
                    ipc::guest_warn!(
                        "{what} of a range that is not inside of the disk, or has unknown flags"
                    );
                    return Answer::Now(status, 0);
                }
            }
        }
        extents.reverse();
        Answer::Extents(what, extents)
    }

    /// The engine is done with a request, or with a part of it. Returns what the ring is to be given, or nothing if the rest
    /// is on its way.
    fn settle(
        &mut self,
        mut pending: Pending,
        mut result: Result<(), Errno>,
    ) -> Option<(Token, u32)> {
        loop {
            if let Some(extent) = pending.extents.pop() {
                if result == Err(Errno::EOPNOTSUPP) {
                    result = self.engine.zero_otherwise(extent);
                }
                if result == Err(Errno::EOPNOTSUPP) && pending.what == WRITE {
                    // Zeroes that the guest wrote as data: how they get there is not its business.
                    result = self.engine.write_zeroes(extent);
                }
                if result == Err(Errno::EOPNOTSUPP) && pending.what == DISCARD {
                    // A hint that cannot be followed.
                    result = Ok(());
                }
                if let (Ok(()), Some(next)) = (result, pending.extents.last()) {
                    match self.engine.zero(*next, pending) {
                        Started::InFlight => return None,
                        Started::Done(back, then) => (pending, result) = (back, then),
                    }
                    continue;
                }
                if result.is_ok() && self.is_write_through() {
                    result = self.engine.flush_now();
                }
            }
            if let Err(errno) = result
                && self.stops(pending.what, errno)
            {
                ipc::guest_warn!(
                    "{} at sector {} failed, which stops the guest: {errno}",
                    pending.what,
                    pending.sector
                );
                return None;
            }
            let (status, data) = outcome(&pending, result, self.on_error(pending.what));
            // What is not told the guest has failed all the same.
            match result {
                Ok(()) => self.count(&pending, Field::Operations),
                // The driver will do it in another way.
                Err(_) if status == Status::Unsupported => {}
                Err(_) => self.count(&pending, Field::Failed),
            }
            return Some(conclude(pending, status, data));
        }
    }

    fn on_error(&self, what: &str) -> OnError {
        if what == READ {
            self.io.rerror
        } else {
            self.io.werror
        }
    }

    /// Whether this failure is to stop the guest. If so, this process is about to end.
    fn stops(&mut self, what: &'static str, errno: Errno) -> bool {
        // What the driver may ask for and the host's file system does not have is an answer, not a failure.
        if self.draining || errno == Errno::EOPNOTSUPP {
            return false;
        }
        let no_space = matches!(errno, Errno::ENOSPC | Errno::EDQUOT);
        let stops = self.on_error(what).stops(no_space);
        if stops {
            let stop = IoStop {
                write: what != READ,
                no_space,
            };
            let fault = HostFault::of(what)(errno).with_status(stop.status());
            self.stop.get_or_insert(fault);
        }
        stops
    }

    /// An error once the guest is to stop.
    fn go_on(&self) -> Result<(), DeviceFault> {
        self.stop.map_or(Ok(()), |fault| Err(fault.into()))
    }

    fn is_write_through(&self) -> bool {
        if self.switches_cache {
            !self.config.writeback()
        } else {
            !self.flushes
        }
    }

    /// Takes requests until there are no more, or no more may be taken.
    fn take_all(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        let queue = ring.index();
        loop {
            if !self.engine.has_room() {
                self.starved = true;
                return Ok(());
            }
            if self.throttled_until.is_some() {
                return Ok(());
            }
            let Some(Chain {
                token,
                readable,
                writable,
            }) = ring.pop()?
            else {
                return Ok(());
            };
            if let Some(throttle) = &mut self.throttle
                && let Err(free) = throttle.take(Instant::now())
            {
                self.throttled_until = Some(free);
                ring.put_back(token)?;
                return Ok(());
            }
            match self.serve(queue, token, readable, writable) {
                Ok(None) => self.go_on()?,
                Ok(Some((token, written))) => ring.complete(token, written)?,
                Err(kind) => return Err(ring.fault(kind).into()),
            }
            self.tell_written(ring)?;
        }
    }

    /// Gives `ring`, whose turn it is, the writes that were held back and are done.
    fn tell_written(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        let mut any = false;
        while let Some((pending, result)) = self.engine.written() {
            if !any {
                self.look_at_the_clock();
            }
            any = true;
            if let Some((token, written)) = self.settle(pending, result) {
                ring.complete(token, written)?;
            }
        }
        if any { self.go_on() } else { Ok(()) }
    }

    /// Gives the rings what the engine has done.
    fn reap(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        let mut fault = None;
        let mut any = false;
        while let Some((pending, result)) = self.engine.finished() {
            if !any {
                self.look_at_the_clock();
            }
            any = true;
            let queue = usize::from(pending.queue);
            if let Some((token, written)) = self.settle(pending, result)
                && let Some(ring) = rings.get_mut(queue)
            {
                // The other rings' requests must not suffer.
                fault = fault.or(ring.complete(token, written).err());
            }
        }
        if any && std::mem::take(&mut self.starved) {
            rings.iter_mut().for_each(Ring::want_turn);
        }
        self.go_on()?;
        fault.map_or(Ok(()), |fault| Err(fault.into()))
    }

    fn drain_all(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        loop {
            self.engine
                .submit()
                .and_then(|()| self.engine.settle())
                .map_err(HostFault::of("io_uring_enter"))?;
            if !self.engine.is_ready() {
                return Ok(());
            }
            self.reap(rings)?;
        }
    }

    /// Tells the kernel of what was started and takes what is done, until it has to be waited for.
    fn advance(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        self.engine
            .submit()
            .map_err(HostFault::of("io_uring_enter"))?;
        self.reap(rings)?;
        // Ranges that follow others.
        self.engine
            .submit()
            .map_err(HostFault::of("io_uring_enter"))?;
        Ok(())
    }
}

fn choose_engine(
    image: RawImage,
    readonly: bool,
    aio: Aio,
    depth: u16,
) -> Result<RawEngine<Pending>, BuildError> {
    let access = if readonly {
        Access::Read
    } else {
        Access::Write
    };
    let io = match aio {
        Aio::Off => None,
        Aio::Native | Aio::IoUring => match FileIo::new(image.fd.as_fd(), depth, access) {
            Ok(io) => Some(io),
            Err(source) if aio == Aio::IoUring => return Err(BuildError::Engine { source }),
            Err(errno) => {
                ipc::log::info!("no io_uring here ({errno}): one request after the other");
                None
            }
        },
    };
    Ok(RawEngine::new(image, io))
}

/// Bytes that the driver may look at.
fn used(data: usize, room: usize) -> u32 {
    // The status is behind the data, so it counts only if all of that was written (virtio 1.3, 2.7.8.2).
    let written = if data == room { data + 1 } else { data };
    // A chain has at most 2^32 - 1 bytes.
    written as u32
}

/// Writes the status; returns what the ring is to be given.
fn conclude(pending: Pending, status: Status, data: usize) -> (Token, u32) {
    pending.status.set(status.byte());
    (pending.token, used(data, pending.room))
}

/// The status that a result comes to.
fn outcome(pending: &Pending, result: Result<(), Errno>, on_error: OnError) -> (Status, usize) {
    let Pending { what, sector, .. } = pending;
    match result {
        Ok(()) => (Status::Ok, pending.data),
        // The driver will write zeroes itself.
        Err(Errno::EOPNOTSUPP) if *what == WRITE_ZEROES => (Status::Unsupported, 0),
        Err(errno) if on_error == OnError::Ignore => {
            ipc::guest_warn!("{what} at sector {sector} failed, which is not told: {errno}");
            (Status::Ok, pending.data)
        }
        Err(errno) => {
            ipc::guest_warn!("{what} at sector {sector} failed: {errno}");
            (Status::IoError, 0)
        }
    }
}

/// Where a request is counted, by its name in the log.
fn kind(what: &str) -> Option<Kind> {
    Some(match what {
        READ => Kind::Read,
        WRITE | WRITE_ZEROES => Kind::Write,
        FLUSH => Kind::Flush,
        DISCARD => Kind::Unmap,
        _ => return None,
    })
}

impl Device for Block {
    fn features(&self) -> u64 {
        let mut bits = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        if self.readonly {
            bits |= 1 << VIRTIO_BLK_F_RO;
        } else {
            bits |= 1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            if self.io.discard {
                bits |= 1 << VIRTIO_BLK_F_DISCARD;
            }
        }
        if self.num_queues > 1 {
            bits |= 1 << VIRTIO_BLK_F_MQ;
        }
        bits
    }

    fn num_queues(&self) -> u16 {
        self.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn accept(&mut self, features: u64) -> Result<(), HostFault> {
        self.flushes = features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        self.switches_cache = features & (1 << VIRTIO_BLK_F_CONFIG_WCE) != 0;
        Ok(())
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        self.config.read(offset, out);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if self.switches_cache {
            self.config.write(offset, data);
        }
    }

    /// `block_resize` sets the capacity; the rest are parts of orders.
    fn write_config_as_host(&mut self, offset: usize, data: &[u8]) {
        if offset != 0 {
            if let Some(order) = self.orders.write(offset, data) {
                let answer = self.engine.order(&order);
                self.orders.answer(answer);
            }
            return;
        }
        let sectors = <[u8; 8]>::try_from(data).map(u64::from_le_bytes);
        let bytes = sectors.ok().and_then(|sectors| sectors.checked_mul(512));
        let Some(bytes) = bytes else {
            ipc::guest_warn!("configuration bytes {data:?} at {offset} are not the host's to set");
            return;
        };
        let now = self.engine.size();
        if bytes < now || self.readonly {
            ipc::guest_warn!("a disk of {now} bytes is not made {bytes} bytes long");
        } else if bytes > now {
            match self.engine.grow(bytes) {
                Ok(()) => ipc::log::info!("the disk has {bytes} bytes from now on"),
                Err(errno) => {
                    ipc::guest_warn!("a disk of {bytes} bytes: {}", errno.desc());
                }
            }
            self.config.set_capacity(self.engine.size());
        }
    }

    fn read_config_as_host(&self, offset: usize, out: &mut [u8]) {
        self.orders.read(offset, out);
    }

    fn counts(&self) -> bool {
        true
    }

    fn count_in(&mut self, counters: Counters) {
        self.counters = Some(counters);
    }

    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        self.look_at_the_clock();
        let taken = self.take_all(ring);
        // Whatever else is wrong: these were good.
        self.engine.write_held();
        let told = self.tell_written(ring);
        taken.and(told)
    }

    fn after_turns(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        if self
            .throttled_until
            .is_some_and(|free| free <= Instant::now())
        {
            self.throttled_until = None;
            rings.iter_mut().for_each(Ring::want_turn);
        }
        self.advance(rings)
    }

    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        self.engine.event().into_iter().collect()
    }

    fn interest(&self, _index: usize) -> Interest {
        Interest::READ
    }

    fn backend_ready(
        &mut self,
        _index: usize,
        _ready: Interest,
        rings: &mut [Ring],
    ) -> Result<(), DeviceFault> {
        self.advance(rings)
    }

    fn drain(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        self.draining = true;
        let result = self.drain_all(rings);
        self.draining = false;
        result
    }

    fn poll_limit(&self) -> Duration {
        Duration::from_micros(u64::from(self.io.poll_us))
    }

    fn has_finished(&mut self) -> bool {
        self.engine.is_ready()
    }

    fn wake_at(&self) -> Option<Instant> {
        self.throttled_until
    }

    fn reset(&mut self) {
        self.flushes = false;
        self.switches_cache = false;
        self.config.reset();
    }
}
