//! Output of a guest on its way to a reader that may be slow or absent.
//!
//! **Job.** [`ChardevOutput`] takes bytes on vCPU threads, writes what the reader takes at once and keeps the rest, up to a
//! cap, for the main loop to write later.
//!
//! **Who is not trusted**: the guest, which writes without end, and the reader, which may never read. Beyond
//! [`MAX_CHARDEV_BACKLOG`] bytes the oldest are dropped and counted: a console's last words are worth more than its first.
//!
//! **Why this way.** Writing at once saves a wake-up of the main thread for each byte that a guest prints. The lock is held
//! for non-blocking calls only.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipc::guest_warn;
use ipc::limits::MAX_CHARDEV_BACKLOG;
use nix::errno::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::descriptor::Descriptor;
use crate::platform::serial::SerialSink;

/// What waits for a reader.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// Where output goes; `None` while nobody is there.
    pub(super) writer: Option<Descriptor>,
    /// The reader went away: the main loop has to clean up.
    pub(super) lost: bool,
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Writes what waits, as far as the reader takes it.
    pub(super) fn flush(&mut self) {
        while !self.bytes.is_empty() && !self.lost {
            let Self {
                writer,
                lost,
                bytes,
                ..
            } = self;
            match write_some(writer.as_ref(), bytes.as_slices().0, lost) {
                0 => return,
                written => drop(bytes.drain(..written)),
            }
        }
    }

    /// Takes `bytes`; tells whether the main loop has something new to do.
    fn push(&mut self, mut bytes: &[u8]) -> bool {
        let waited = !self.bytes.is_empty();
        while !waited && !bytes.is_empty() && !self.lost {
            match write_some(self.writer.as_ref(), bytes, &mut self.lost) {
                0 => break,
                written => bytes = &bytes[written..],
            }
        }
        let surplus = (self.bytes.len() + bytes.len()).saturating_sub(MAX_CHARDEV_BACKLOG);
        self.dropped += surplus as u64;
        // The oldest go first: those that wait, then the start of an overlong piece.
        let waiting = surplus.min(self.bytes.len());
        self.bytes.drain(..waiting);
        self.bytes.extend(&bytes[surplus - waiting..]);
        !waited && !self.bytes.is_empty() || self.lost
    }
}

/// Writes some of `bytes` now; 0 if the reader takes none. Sets `lost` if there will never be a reader again.
fn write_some(writer: Option<&Descriptor>, bytes: &[u8], lost: &mut bool) -> usize {
    let Some(writer) = writer else { return 0 };
    loop {
        match writer.write(bytes) {
            Ok(written) => return written,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return 0,
            Err(_) => {
                *lost = true;
                return 0;
            }
        }
    }
}

/// Shared between the vCPU threads that write and the main loop that writes the rest.
#[derive(Debug)]
pub(super) struct Shared {
    backlog: Mutex<Backlog>,
    /// Tells the main loop that there is something to do.
    pub(super) wake: EventFd,
}

impl Shared {
    pub(super) fn new(writer: Option<Descriptor>, wake: EventFd) -> Arc<Self> {
        let backlog = Mutex::new(Backlog {
            writer,
            ..Backlog::default()
        });
        Arc::new(Self { backlog, wake })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Backlog> {
        // A panic aborts the process, so a poisoned lock cannot be seen.
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The output side of a chardev, for a device front on vCPU threads.
#[derive(Debug, Clone)]
pub struct ChardevOutput(pub(super) Arc<Shared>);

impl SerialSink for ChardevOutput {
    fn push(&mut self, bytes: &[u8]) {
        let mut backlog = self.0.lock();
        let before = backlog.dropped;
        let news = backlog.push(bytes);
        let dropped = backlog.dropped;
        drop(backlog);
        if dropped != before && before == 0 {
            guest_warn!("nobody reads the serial output: the oldest bytes are dropped from now on");
        }
        if news {
            // Fails only when 2^64 - 2 wake-ups wait already.
            let _ = self.0.wake.write(1);
        }
    }
}
