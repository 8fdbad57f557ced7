//! What a device has to say for itself; the harness does the rest.
//!
//! **Job.** The one trait that each device crate implements.
//! **Who is not trusted.** What arrives through [`Ring::pop`] and [`Device::write_config`] was written by a guest.
//! **Why this way.** A device is called from one thread only, so it needs no locks. What it has the kernel do between two
//! calls it ends in [`Device::drain`], so a stopped queue is really stopped.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::counters::Counters;
use crate::fault::{DeviceFault, HostFault};
use crate::ring::Ring;
use crate::vhost_net::KernelQueue;
use crate::window::Window;

/// What a back-end descriptor is polled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    /// Something can be read.
    pub readable: bool,
    /// Something can be written.
    pub writable: bool,
    /// Told once for each time that it becomes so, whether or not anything is read: for an eventfd that nobody reads.
    pub edge: bool,
}

impl Interest {
    /// Not polled now.
    pub const NONE: Self = Self {
        readable: false,
        writable: false,
        edge: false,
    };
    /// Polled for reading.
    pub const READ: Self = Self {
        readable: true,
        ..Self::NONE
    };
    /// An eventfd that is never read.
    pub const EVENT: Self = Self {
        edge: true,
        ..Self::READ
    };
}

/// A virtio device behind vhost-user.
pub trait Device {
    /// Device-specific feature bits (virtio 1.3, section 5, and the reserved ones that only the device can promise). The
    /// harness adds `VERSION_1`, `RING_INDIRECT_DESC`, `RING_EVENT_IDX` and vhost-user's protocol bit.
    fn features(&self) -> u64;

    /// Queues that the device has at most.
    fn num_queues(&self) -> u16;

    /// What `GET_QUEUE_NUM` tells: queues, but pairs of them for a card whose control queue is the front end's.
    fn told_queues(&self) -> u64 {
        u64::from(self.num_queues())
    }

    /// Whether regions of memory may be added one by one. QEMU does it once for each pair of a card's queues, so that each would
    /// be there several times.
    fn takes_single_regions(&self) -> bool {
        true
    }

    /// The front end lets queue `index` run, or not.
    fn enabled(&mut self, _index: u16, _on: bool) {}

    /// Who in the kernel serves queue `index`, if that is not this process's work: it is never given to
    /// [`process_queue`](Self::process_queue) then. With the same accepted features for each queue always somebody, or always nobody;
    /// whether it is served now is asked after each turn and each message.
    fn kernel_queue(&self, _index: u16) -> Option<KernelQueue<'_>> {
        None
    }

    /// Entries of a queue at most: a power of two.
    fn max_queue_size(&self) -> u16;

    /// The driver accepted `features`, a subset of what was offered. May come more than once.
    ///
    /// # Errors
    /// A back end could not be set up for it.
    fn accept(&mut self, features: u64) -> Result<(), HostFault>;

    /// Fills `out` with configuration space from `offset` on, by [`copy_config`]. The harness has cleared it and capped it at
    /// [`MAX_CONFIG_SPACE`](ipc::limits::MAX_CONFIG_SPACE); what the device does not have stays zero.
    fn read_config(&self, offset: usize, out: &mut [u8]);

    /// The driver writes to configuration space. Most devices have nothing there that can be written; such a write is ignored,
    /// as on a bus.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The host, not the driver, changes configuration space: a cable is pulled. As for [`write_config`](Self::write_config)
    /// otherwise.
    fn write_config_as_host(&mut self, _offset: usize, _data: &[u8]) {}

    /// Fills `out` with what the host, not the driver, reads. As for [`read_config`](Self::read_config) otherwise.
    fn read_config_as_host(&self, _offset: usize, _out: &mut [u8]) {}

    /// Bytes that the device keeps at most for a process that comes after this one: what the driver told it beside its queues.
    /// Always the same number.
    fn kept_len(&self) -> usize {
        0
    }

    /// What is to be kept, if that has changed since this was asked last. Asked before the driver sees that what
    /// changed it is done, if that was given back by [`Ring::complete_later`].
    fn keep(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// A process before this one kept `kept`, or somebody says so: nothing of it is to be trusted. Comes before any queue
    /// starts, and after [`accept`](Self::accept).
    fn go_on_with(&mut self, _kept: &[u8]) {}

    /// Whether the device counts what it does for the control process, by [`Counters`]. Always the same answer.
    fn counts(&self) -> bool {
        false
    }

    /// Here are the numbers to add to from now on.
    fn count_in(&mut self, _counters: Counters) {}

    /// Requests may be available on `ring`: take and complete them until [`Ring::pop`] has no more, or leave them there when
    /// they wait for a back end.
    ///
    /// # Errors
    /// [`DeviceFault::Guest`] breaks this queue, [`DeviceFault::Host`] ends the process.
    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault>;

    /// Back-end descriptors to poll. Asked once, before serving starts.
    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// What to poll back end `index` for. Asked after each call of the device; must be cheap.
    fn interest(&self, _index: usize) -> Interest {
        Interest::NONE
    }

    /// Back end `index` is ready. `rings` are all queues, running or not.
    ///
    /// # Errors
    /// As for [`process_queue`](Self::process_queue).
    fn backend_ready(
        &mut self,
        _index: usize,
        _ready: Interest,
        _rings: &mut [Ring],
    ) -> Result<(), DeviceFault> {
        Ok(())
    }

    /// A connection goes on that a process before this one had. `rings` are started; requests that were in flight come first
    /// ([`Ring::is_replayed`]).
    ///
    /// # Errors
    /// The device cannot go on.
    fn resumed(&mut self, _rings: &[Ring]) -> Result<(), HostFault> {
        Ok(())
    }

    /// Called before the first request is taken from any queue, and again after each queue that starts until it says `true`. A
    /// device that goes on where another process was can wait here until it knows what was in flight.
    ///
    /// # Errors
    /// The device cannot go on.
    fn begin(&mut self, _rings: &[Ring]) -> Result<bool, HostFault> {
        Ok(true)
    }

    /// All queues that were due have had their [`process_queue`](Self::process_queue): the place to start what they asked for
    /// in one go, and to complete what is done at once.
    ///
    /// # Errors
    /// As for [`process_queue`](Self::process_queue).
    fn after_turns(&mut self, _rings: &mut [Ring]) -> Result<(), DeviceFault> {
        Ok(())
    }

    /// Completes every request that was taken from a ring, and waits for it: a ring is about to be stopped.
    ///
    /// # Errors
    /// As for [`process_queue`](Self::process_queue).
    fn drain(&mut self, _rings: &mut [Ring]) -> Result<(), DeviceFault> {
        Ok(())
    }

    /// How long the process may look for more work, awake, after it had some. Only done as far as it has paid lately.
    fn poll_limit(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether what shows at a back end only is work to look for as well, which takes a system call now and then: packets, which come
    /// without a request. Always the same answer.
    fn looks_at_backends(&self) -> bool {
        false
    }

    /// While the process looks for more work: whether [`after_turns`](Self::after_turns) has something to complete.
    fn has_finished(&mut self) -> bool {
        false
    }

    /// The process is about to sleep until something happens: whether it may, or [`after_turns`](Self::after_turns) has something
    /// to do at once. What finishes later must show at a back end.
    fn may_sleep(&mut self) -> bool {
        true
    }

    /// [`after_turns`](Self::after_turns) is to be called again at once, and returned only so that other queues have their turn.
    fn is_due(&self) -> bool {
        false
    }

    /// When [`after_turns`](Self::after_turns) is to be called even if nothing happens.
    fn wake_at(&self) -> Option<Instant> {
        None
    }

    /// Whether the device holds something for the driver that neither queues nor what is [kept](Self::keep) tell, and that a
    /// snapshot needs. Always the same answer.
    fn has_state(&self) -> bool {
        false
    }

    /// Writes that to `to`, an empty file. No queue runs.
    ///
    /// # Errors
    /// A line for the log; the device goes on.
    fn save_state(&mut self, _to: BorrowedFd<'_>) -> Result<(), String> {
        Err("this device has no state".to_owned())
    }

    /// Goes on with what another process has [written](Self::save_state), or somebody says so: nothing of it is to be trusted. No
    /// queue has been started.
    ///
    /// # Errors
    /// A line for the log; the device is of no further use.
    fn load_state(&mut self, _from: BorrowedFd<'_>) -> Result<(), String> {
        Err("this device has no state".to_owned())
    }

    /// Bytes of the device's shared memory region 0, into which it has the front end map files for the driver (virtio 1.3, 2.10);
    /// 0 if it has none. Always the same number.
    fn window_len(&self) -> u64 {
        0
    }

    /// The front end takes requests for that region from now on. Comes before any queue starts.
    fn open_window(&mut self, _window: Arc<Window>) {}

    /// The driver resets the device: forget everything that it told. The front end unmaps what is in the shared memory region.
    fn reset(&mut self) {}
}

/// What `space` has from `offset` on goes to the beginning of `out`; the rest of `out` stays as it is.
pub fn copy_config(space: &[u8], offset: usize, out: &mut [u8]) {
    for (to, from) in out.iter_mut().zip(space.iter().skip(offset)) {
        *to = *from;
    }
}
