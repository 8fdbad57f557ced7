//! From the guest to the tap.

use std::time::Instant;

use device_host::{Chain, DeviceFault, GuestBuffers, PACKET_SEGMENTS, Ring};
use nix::errno::Errno;

use crate::backend::tap::TapQueue;
use crate::features::Features;
use crate::header::{HEADER, MAX_PACKET, SMALL, checked};
use crate::limit::Limiter;

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Sent,
    Dropped,
    /// The tap takes no more now.
    Full,
}

/// Why sending stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// The driver has no more, or its turn is over.
    Done,
    /// The tap became full: what is left waits until it is writable.
    Full,
    /// The limit is reached until then.
    Limited(Instant),
}

/// Sends all that is available; without a `tap`, since the link is down, to nowhere.
pub(crate) fn process(
    ring: &mut Ring,
    tap: Option<&TapQueue>,
    features: Features,
    copy: &mut Vec<u8>,
    limit: &mut Limiter,
) -> Result<Stopped, DeviceFault> {
    loop {
        let now = (!limit.is_off()).then(Instant::now);
        if let Some(at) = now.and_then(|now| limit.wait(now)) {
            return Ok(Stopped::Limited(at));
        }
        let Some(Chain {
            token, readable, ..
        }) = ring.pop()?
        else {
            return Ok(Stopped::Done);
        };
        let Some(tap) = tap else {
            ring.complete_later(std::iter::once((token, 0)))?;
            continue;
        };
        let bytes = readable.len().saturating_sub(HEADER);
        match send(readable, tap, features, copy) {
            Fate::Sent | Fate::Dropped => {
                if let Some(now) = now {
                    limit.take(bytes, now);
                }
                ring.complete_later(std::iter::once((token, 0)))?;
            }
            Fate::Full => {
                ring.put_back(token)?;
                return Ok(Stopped::Full);
            }
        }
    }
}

fn send(
    mut packet: GuestBuffers<'_>,
    tap: &TapQueue,
    features: Features,
    copy: &mut Vec<u8>,
) -> Fate {
    let mut raw = [0; HEADER];
    let all = packet.len();
    let len = all.saturating_sub(HEADER);
    // Small, or in so many pieces as no driver in use makes.
    let copied = all <= SMALL || packet.segments() > PACKET_SEGMENTS;
    if copied {
        if copy.is_empty() {
            // Once; pages that no such packet uses stay untouched.
            *copy = vec![0; HEADER + MAX_PACKET];
        }
        packet.read(copy);
        raw.copy_from_slice(&copy[..HEADER]);
    } else {
        packet.read(&mut raw);
    }
    let Some(header) = (all >= HEADER)
        .then(|| checked(raw, len, features))
        .flatten()
    else {
        ipc::guest_warn!("packet of {len} bytes with a malformed header dropped");
        return Fate::Dropped;
    };
    let sent = if copied {
        // No more than there is room for: `checked` allows no longer ones.
        copy[..HEADER].copy_from_slice(&header);
        nix::unistd::write(tap.fd(), &copy[..all])
    } else {
        packet.send_to_stream_after(&header, tap.fd())
    };
    match sent {
        Ok(_) => Fate::Sent,
        Err(Errno::EAGAIN) => Fate::Full,
        Err(errno) => {
            // EIO: the interface is down. EINVAL: the kernel finds the header at odds with the packet.
            ipc::guest_warn!("packet of {len} bytes dropped: {errno}");
            Fate::Dropped
        }
    }
}
