//! From the tap to the guest.
//!
//! **Job.** A packet is read straight into the driver's next buffers: one, or with mergeable buffers (virtio 1.3, 5.1.6.4) as many
//! as lately were enough. One that is larger all the same is read partly behind them, put together here, and copied into as
//! many buffers as it needs; if there are not enough, it waits here until the driver adds more. While packets are small they are read
//! here first, and copied.
//! **Who is not trusted.** The driver, for the number and size of its buffers; the packet is not looked at.
//! **Why this way.** A tap does not tell how long its next packet is. Packets of one kind come in rows, so that the last ones are a good
//! guess; a wrong one costs a look at buffers in vain, or a copy.

use std::time::Instant;

use device_host::{Chain, DeviceFault, FaultKind, HostFault, Ring, Token};
use nix::errno::Errno;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

use crate::backend::tap::TapQueue;
use crate::features::Features;
use crate::filter::{Filter, LOOKED_AT};
use crate::header::{HEADER, MAX_PACKET, NUM_BUFFERS, SMALL};
use crate::limit::Limiter;

/// Why receiving stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// The tap has no packet.
    Idle,
    /// The driver has not enough buffers.
    NoBuffers,
    /// The limit is reached until then.
    Limited(Instant),
    /// The tap cannot be read any more.
    Gone,
}

/// One tap queue's way to the guest.
#[derive(Debug, Default)]
pub(crate) struct Receiver {
    /// Room for a packet with its header; of no length until it is needed.
    buffer: Vec<u8>,
    /// Bytes of a packet that waits in `buffer`.
    waiting: usize,
    /// Buffers that the current packet takes, kept for its capacity.
    taken: Vec<(Token, u32)>,
    /// Buffers that the next packet may take, with their sizes.
    gathered: Vec<(Token, usize)>,
    /// Bytes that the next packet is expected to have.
    expected: usize,
}

impl Receiver {
    /// Forgets a packet that waits.
    pub(crate) fn reset(&mut self) {
        self.waiting = 0;
        self.taken.clear();
        self.gathered.clear();
        self.expected = 0;
    }

    /// Hands packets over until something is missing.
    pub(crate) fn process(
        &mut self,
        ring: &mut Ring,
        tap: &TapQueue,
        features: Features,
        filter: &Filter,
        limit: &mut Limiter,
    ) -> Result<Stopped, DeviceFault> {
        if self.buffer.is_empty() {
            // Once; pages that no large packet uses stay untouched.
            self.buffer = vec![0; HEADER + MAX_PACKET];
        }
        loop {
            if self.waiting > 0 && !self.deliver(ring, features)? {
                return Ok(Stopped::NoBuffers);
            }
            let now = (!limit.is_off()).then(Instant::now);
            if let Some(at) = now.and_then(|now| limit.wait(now)) {
                return Ok(Stopped::Limited(at));
            }
            if self.expected <= SMALL {
                let Some(Chain {
                    token,
                    mut writable,
                    ..
                }) = ring.pop()?
                else {
                    return Ok(Stopped::NoBuffers);
                };
                let room = writable.len();
                if room < HEADER {
                    return Err(too_small(ring));
                }
                let len = match tap.read(&mut self.buffer) {
                    Ok(len) => len,
                    Err(errno) => {
                        ring.put_back(token)?;
                        return stopped_by(errno);
                    }
                };
                if let Some(now) = now {
                    limit.take(len.saturating_sub(HEADER), now);
                }
                if !filter.is_open() && !wanted(filter, &self.buffer, len) {
                    ring.put_back(token)?;
                    continue;
                }
                self.expected = len.max(self.expected - self.expected / 8);
                if len > room {
                    ring.put_back(token)?;
                    self.wait_or_drop(len, room, features);
                    continue;
                }
                self.head(features);
                writable.write(&self.buffer[..len]);
                // At most HEADER + MAX_PACKET.
                ring.complete_later(std::iter::once((token, len as u32)))?;
                continue;
            }
            // A driver without mergeable buffers gives room for a whole packet in each.
            let want = if features.mergeable() {
                self.expected.min(self.buffer.len())
            } else {
                0
            };
            let Some(mut buffers) = ring.gather(want, &mut self.gathered)? else {
                return Ok(Stopped::NoBuffers);
            };
            if self.gathered.iter().any(|(_, room)| *room == 0)
                || self.gathered.first().is_none_or(|(_, room)| *room < HEADER)
            {
                return Err(too_small(ring));
            }
            // A packet is at most this long, so that nothing of it is cut off.
            buffers.truncate(self.buffer.len());
            buffers.keep_segments(device_host::PACKET_SEGMENTS);
            let room = buffers.len();
            let behind = self.buffer.get_mut(room..).unwrap_or(&mut []);
            let read = buffers.fill_from_stream(tap.fd(), behind);
            if let (Ok(len), Some(now)) = (read, now) {
                limit.take(len.saturating_sub(HEADER), now);
            }
            if let Ok(len) = read
                && !filter.is_open()
            {
                let mut start = [0; HEADER + LOOKED_AT];
                let seen = buffers.read_at(0, &mut start);
                // What is not in the driver's buffers is in this one, at its place in the packet.
                for (to, from) in start.iter_mut().zip(&self.buffer).skip(seen) {
                    *to = *from;
                }
                if !wanted(filter, &start, len) {
                    self.put_back(ring)?;
                    continue;
                }
            }
            match read {
                Ok(len) if len <= room => {
                    self.expected = len.max(self.expected - self.expected / 8);
                    let mut left = len;
                    let used = self.gathered.iter().take_while(|(_, room)| {
                        let more = left > 0;
                        left = left.saturating_sub(*room);
                        more
                    });
                    let count = used.count();
                    // 5.1.6.4.1: 1 even without mergeable buffers. At most one for each entry of the queue.
                    buffers.write_at(NUM_BUFFERS, &(count as u16).to_le_bytes());
                    if !features.has(VIRTIO_NET_F_GUEST_CSUM) {
                        // 5.1.6.4.1: no flags for a driver that cannot know them.
                        buffers.write_at(0, &[0]);
                    }
                    for (token, _) in self.gathered.drain(count..).rev() {
                        ring.put_back(token)?;
                    }
                    let mut left = len;
                    ring.complete_later(self.gathered.drain(..).map(|(token, room)| {
                        let part = room.min(left);
                        left -= part;
                        // At most HEADER + MAX_PACKET.
                        (token, part as u32)
                    }))?;
                }
                Ok(len) => {
                    // The buffers are still the device's; what the guest makes of its own packet meanwhile harms no one.
                    buffers.read_at(0, &mut self.buffer[..room]);
                    self.put_back(ring)?;
                    if features.mergeable() {
                        self.expected = self.buffer.len();
                    }
                    self.wait_or_drop(len, room, features);
                }
                Err(errno) => {
                    self.put_back(ring)?;
                    return stopped_by(errno);
                }
            }
        }
    }

    /// Leaves the driver what was taken for a packet that did not come.
    fn put_back(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        for (token, _) in self.gathered.drain(..).rev() {
            ring.put_back(token)?;
        }
        Ok(())
    }

    /// A packet that was read here is larger than the `room` that there was for it.
    fn wait_or_drop(&mut self, len: usize, room: usize, features: Features) {
        if features.mergeable() {
            self.waiting = len;
        } else {
            ipc::guest_warn!(
                "packet of {} bytes dropped: the receive buffer has {room} bytes",
                len - HEADER
            );
        }
    }

    /// The header of a packet that was read here, for a driver that finds it in one buffer.
    fn head(&mut self, features: Features) {
        if !features.has(VIRTIO_NET_F_GUEST_CSUM) {
            // 5.1.6.4.1: no flags for a driver that cannot know them.
            self.buffer[0] = 0;
        }
        // 5.1.6.4.1: 1 even without mergeable buffers.
        self.buffer[NUM_BUFFERS..HEADER].copy_from_slice(&1u16.to_le_bytes());
    }

    /// Copies the packet that waits into as many buffers as it needs; `false` if there are not enough.
    fn deliver(&mut self, ring: &mut Ring, features: Features) -> Result<bool, DeviceFault> {
        self.head(features);
        // A malformed chain ends this in the middle; what was taken before it belongs to a queue that is given up.
        self.taken.clear();
        let mut at = 0;
        while at < self.waiting {
            let Some(Chain {
                token,
                mut writable,
                ..
            }) = ring.pop()?
            else {
                while let Some((token, _)) = self.taken.pop() {
                    ring.put_back(token)?;
                }
                return Ok(false);
            };
            let len = writable.write(&self.buffer[at..self.waiting]);
            if len == 0 || (at == 0 && len < HEADER) {
                return Err(too_small(ring));
            }
            at += len;
            // At most HEADER + MAX_PACKET.
            self.taken.push((token, len as u32));
        }
        self.waiting = 0;
        if let [(first, _), _, ..] = self.taken.as_slice() {
            // At most one for each entry of the queue.
            let count = self.taken.len() as u16;
            ring.writable_of(first)?
                .write_at(NUM_BUFFERS, &count.to_le_bytes());
        }
        ring.complete_later(self.taken.drain(..))?;
        Ok(true)
    }
}

/// Whether the driver wants a packet of `len` bytes with its header that begins like `start`.
fn wanted(filter: &Filter, start: &[u8], len: usize) -> bool {
    let mut seen = [0; HEADER + LOOKED_AT];
    for (to, from) in seen.iter_mut().zip(start.iter().take(len)) {
        *to = *from;
    }
    seen.last_chunk().is_none_or(|frame| filter.wants(frame))
}

/// The tap gave no packet.
fn stopped_by(errno: Errno) -> Result<Stopped, DeviceFault> {
    match errno {
        Errno::EAGAIN => Ok(Stopped::Idle),
        // The interface was deleted. Only a process with another descriptor could go on, or none: whoever manages the VM is told
        // either way.
        Errno::EBADFD => Err(HostFault::of("reading the tap, which is gone,")(errno).into()),
        errno => {
            ipc::guest_log!(error, "tap cannot be read any more: {errno}");
            Ok(Stopped::Gone)
        }
    }
}

fn too_small(ring: &Ring) -> DeviceFault {
    ring.fault(FaultKind::Request(
        "receive buffer is smaller than a header",
    ))
    .into()
}
