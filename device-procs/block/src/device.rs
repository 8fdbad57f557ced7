//! The device: takes requests off the rings and answers them.

use device_host::{
    BackendFds, Chain, Device, DeviceFault, FaultKind, GuestBuffers, HostFault, Ring,
};
use ipc::limits::{BLOCK_ID_BYTES, MAX_BLOCK_QUEUES, MAX_CHAIN_SEGMENTS, MAX_QUEUE_SIZE};
use ipc::spec::DeviceSpec;
use ipc::start::StartMessage;
use nix::errno::Errno;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
};

use crate::backend::raw::RawImage;
use crate::config_space::ConfigSpace;
use crate::engine::Engine;
use crate::error::BuildError;
use crate::request::{HEADER, Request, Status, place};

/// Smallest ring: header, one buffer, status, and a power of two.
const MIN_QUEUE_SIZE: u16 = 4;

/// A disk.
#[derive(Debug)]
pub struct Block {
    engine: Engine,
    config: ConfigSpace,
    serial: [u8; BLOCK_ID_BYTES],
    readonly: bool,
    num_queues: u16,
    queue_size: u16,
    /// The driver cannot flush, so each write is durable before it is acknowledged (virtio 1.3, 5.2.6.2).
    write_through: bool,
}

impl Block {
    /// From the start message and the image descriptor.
    ///
    /// # Errors
    /// The spec and the descriptors do not make one.
    pub fn build(start: &StartMessage, fds: &mut BackendFds) -> Result<Self, BuildError> {
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
        let id = spec.serial.as_bytes();
        check(
            "length of serial",
            id.len() as u64,
            id.len() <= BLOCK_ID_BYTES,
            "at most 20 bytes",
        )?;
        let mut serial = [0; BLOCK_ID_BYTES];
        serial[..id.len()].copy_from_slice(id);

        let image = fds.take().ok_or(BuildError::NoImage)?;
        let image = RawImage::new(image, spec.readonly, spec.direct)?;
        // A request is a header, its data, and a status; all descriptors of a queue may be one request.
        let seg_max = usize::from(size).min(MAX_CHAIN_SEGMENTS) - 2;
        Ok(Self {
            config: ConfigSpace::new(image.size, seg_max as u32, queues),
            engine: Engine::new(image),
            serial,
            readonly: spec.readonly,
            num_queues: queues,
            queue_size: size,
            write_through: true,
        })
    }

    /// Serves one request; returns the bytes written from the front of its writable buffers.
    fn serve(
        &mut self,
        mut readable: GuestBuffers<'_>,
        mut writable: GuestBuffers<'_>,
    ) -> Result<u32, FaultKind> {
        let Some(status_byte) = writable.take_last_byte() else {
            return Err(FaultKind::Request("no room for a status"));
        };
        let room = writable.len();
        let mut header = [0; HEADER];
        let (status, data) = if readable.read(&mut header) < HEADER {
            ipc::guest_warn!("request with a header of less than {HEADER} bytes");
            (Status::IoError, 0)
        } else {
            self.execute(Request::parse(header), readable, writable)
        };
        status_byte.set(status.byte());
        // The status is behind the data, so it counts only if all of that was written (virtio 1.3, 2.7.8.2).
        let written = if data == room { data + 1 } else { data };
        // A chain has at most 2^32 - 1 bytes.
        Ok(written as u32)
    }

    /// Does it; returns the status and the bytes of data written to the guest.
    fn execute(
        &mut self,
        request: Request,
        readable: GuestBuffers<'_>,
        mut writable: GuestBuffers<'_>,
    ) -> (Status, usize) {
        let size = self.engine.size();
        match request {
            Request::In { sector } => {
                let len = writable.len();
                let Some(at) = place(sector, len, size) else {
                    return out_of_range("read", sector, len);
                };
                match self.engine.read(writable, at) {
                    Ok(()) => (Status::Ok, len),
                    Err(errno) => failed("read", sector, errno),
                }
            }
            Request::Out { sector } => {
                let len = readable.len();
                if self.readonly {
                    ipc::guest_warn!("write to a read-only disk");
                    return (Status::IoError, 0);
                }
                let Some(at) = place(sector, len, size) else {
                    return out_of_range("write", sector, len);
                };
                match self.engine.write(readable, at).and_then(|()| {
                    if self.write_through {
                        self.engine.flush()
                    } else {
                        Ok(())
                    }
                }) {
                    Ok(()) => (Status::Ok, 0),
                    Err(errno) => failed("write", sector, errno),
                }
            }
            Request::Flush if self.readonly => (Status::Ok, 0),
            Request::Flush => match self.engine.flush() {
                Ok(()) => (Status::Ok, 0),
                Err(errno) => failed("flush", 0, errno),
            },
            Request::GetId => (Status::Ok, writable.write(&self.serial)),
            Request::Unsupported => (Status::Unsupported, 0),
        }
    }
}

fn out_of_range(what: &str, sector: u64, len: usize) -> (Status, usize) {
    ipc::guest_warn!("{what} of {len} bytes at sector {sector} is not inside of the disk");
    (Status::IoError, 0)
}

fn failed(what: &str, sector: u64, errno: Errno) -> (Status, usize) {
    ipc::guest_warn!("{what} at sector {sector} failed: {errno}");
    (Status::IoError, 0)
}

impl Device for Block {
    fn features(&self) -> u64 {
        let mut bits =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.readonly {
            bits |= 1 << VIRTIO_BLK_F_RO;
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
        self.write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        Ok(())
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        self.config.read(offset, out);
    }

    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        while let Some(Chain {
            token,
            readable,
            writable,
        }) = ring.pop()?
        {
            match self.serve(readable, writable) {
                Ok(written) => ring.complete(token, written)?,
                Err(kind) => return Err(ring.fault(kind).into()),
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.write_through = true;
    }
}
