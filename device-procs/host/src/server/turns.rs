//! The event loop's part of a device: sleeping, looking for work, and turns.
//!
//! **Job.** Decides how long to wait, gives each queue that is due a turn, settles what the kernel serves, and polls the back ends for
//! what the device wants. **Who is not trusted.** The guest: what it does wrong breaks its queue, and nothing else.

use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use super::{FIRST_BACKEND, FIRST_KICK, SOCKET, Server};
use crate::device::{Device, Interest};
use crate::fault::{DeviceFault, FaultKind, GuestFault, HostFault};
use crate::ring::Ring;
use crate::vhost_net::Refused;

/// Looks at the rings between two looks at the clock, and at the back ends if those are looked at.
const LOOKS: usize = 16;

/// What a look for work came to.
enum Look {
    Vain,
    /// Somebody's turn is due.
    Due,
    /// So many events wait.
    Events(usize),
}

impl<D: Device> Server<D> {
    pub(super) fn wait(&mut self, events: &mut [EpollEvent]) -> Result<usize, HostFault> {
        if self.is_due() {
            // Whoever does not sleep is not kicked.
            self.look_at_rings();
        } else {
            match self.look_for_work(events)? {
                Look::Events(count) => return Ok(count),
                Look::Due => {}
                Look::Vain => self.listen(),
            }
        }
        let now = self.is_due() || self.finished;
        let timeout = if now {
            EpollTimeout::ZERO
        } else {
            self.device.wake_at().map_or(EpollTimeout::NONE, until)
        };
        let asleep = (!now && !self.device.poll_limit().is_zero()).then(Instant::now);
        loop {
            match self.epoll.wait(events, timeout) {
                Err(Errno::EINTR) => {}
                other => {
                    let count = other.map_err(HostFault::of("epoll_wait"))?;
                    // A look at the rings does not see the front end's messages. Were they counted, each start would end in
                    // looks for a guest that does not run yet.
                    let woken = events.get(..count).unwrap_or_default();
                    let by_message = matches!(woken, [event] if event.data() == SOCKET);
                    if let Some(since) = asleep
                        && !by_message
                    {
                        self.patience
                            .slept(since.elapsed(), self.device.poll_limit());
                    }
                    return Ok(count);
                }
            }
        }
    }

    /// The process is about to sleep: from here on whoever has work says so.
    fn listen(&mut self) {
        for ring in &mut self.rings {
            if let Err(kind) = ring.listen() {
                ring.break_with(kind);
            }
        }
        self.finished |= !self.is_due() && !self.device.may_sleep();
    }

    fn is_due(&self) -> bool {
        self.device.is_due() || self.rings.iter().any(|ring| ring.due)
    }

    /// Gives those that have more since they were last looked at a turn. Returns whether there are any.
    fn look_at_rings(&mut self) -> bool {
        let mut found = false;
        for ring in &mut self.rings {
            if ring.has_more() {
                ring.want_turn();
                found = true;
            }
        }
        found
    }

    /// Stays awake for a while, if that has paid lately, and looks at the rings and the back end: without any system call, unless
    /// the device [has back ends](Device::looks_at_backends) that take one. Without, messages of the front end wait meanwhile, for less
    /// than [`Device::poll_limit`].
    fn look_for_work(&mut self, events: &mut [EpollEvent]) -> Result<Look, HostFault> {
        let limit = self.device.poll_limit();
        if limit.is_zero() {
            return Ok(Look::Vain);
        }
        let window = self.patience.window(limit);
        if window.is_zero() {
            return Ok(Look::Vain);
        }
        let backends = self.device.looks_at_backends();
        let start = Instant::now();
        let (found, time) = loop {
            let due = (0..LOOKS).any(|_| {
                self.finished |= self.device.has_finished();
                let found = self.look_at_rings() || self.finished;
                if !found {
                    std::hint::spin_loop();
                }
                found
            });
            let found = if due {
                Look::Due
            } else if backends {
                self.look_at_backends(events)?
            } else {
                Look::Vain
            };
            let time = start.elapsed();
            if !matches!(found, Look::Vain) || time >= window {
                break (found, time);
            }
        };
        let any = !matches!(found, Look::Vain);
        self.patience.looked(time, any, limit);
        Ok(found)
    }

    /// What would end a sleep at once.
    fn look_at_backends(&self, events: &mut [EpollEvent]) -> Result<Look, HostFault> {
        match self.epoll.wait(events, EpollTimeout::ZERO) {
            Ok(0) | Err(Errno::EINTR) => Ok(Look::Vain),
            Ok(count) => Ok(Look::Events(count)),
            Err(errno) => Err(HostFault::of("epoll_wait")(errno)),
        }
    }

    pub(super) fn event(&mut self, data: u64, ready: EpollFlags) -> Result<(), HostFault> {
        if let Some(index) = data.checked_sub(FIRST_BACKEND) {
            // Counted from a usize in `new`.
            return self.backend_event(index as usize, ready);
        }
        if let Some(ring) = data
            .checked_sub(FIRST_KICK)
            .and_then(|index| self.rings.get_mut(index as usize))
        {
            ring.due = ring.is_running();
        }
        Ok(())
    }

    pub(super) fn backend_event(
        &mut self,
        index: usize,
        ready: EpollFlags,
    ) -> Result<(), HostFault> {
        let failed = ready.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        let ready = Interest {
            readable: failed || ready.contains(EpollFlags::EPOLLIN),
            writable: failed || ready.contains(EpollFlags::EPOLLOUT),
            edge: false,
        };
        self.rings.iter_mut().for_each(Ring::refill_budget);
        let result = self.device.backend_ready(index, ready, &mut self.rings);
        self.after_device(result)?;
        self.end_turns();
        Ok(())
    }

    /// One turn for each queue that is due.
    pub(super) fn take_turns(&mut self) -> Result<(), HostFault> {
        if !self.begun && !self.begin()? {
            return Ok(());
        }
        let mut any = std::mem::take(&mut self.finished) | self.device.is_due();
        for index in 0..self.rings.len() {
            let Some(ring) = self.rings.get_mut(index) else {
                break;
            };
            if !ring.due {
                continue;
            }
            if !ring.is_running() {
                ring.due = false;
                continue;
            }
            if let Err(kind) = ring.begin_turn() {
                ring.break_with(kind);
                continue;
            }
            any = true;
            let result = self.device.process_queue(ring);
            self.after_device(result)?;
        }
        if any {
            self.settle()?;
        }
        if any || self.device.wake_at().is_some_and(|at| at <= Instant::now()) {
            let result = self.device.after_turns(&mut self.rings);
            self.after_device(result)?;
            self.end_turns();
        }
        Ok(())
    }

    /// Gives the kernel the queues that it is to serve now, and takes back those that it is not to serve any more.
    pub(super) fn settle(&mut self) -> Result<(), HostFault> {
        for ring in self.rings.iter_mut().filter(|ring| ring.outside) {
            let Some(queue) = self.device.kernel_queue(ring.index()) else {
                continue;
            };
            match (queue.on && ring.may_run(), ring.is_lent()) {
                (true, false) => match ring.lend(&queue) {
                    Ok(()) => ipc::log::debug!("queue {}: the kernel serves it", ring.index()),
                    Err(Refused::Address) => ring.break_with(FaultKind::QueueAddress),
                    Err(Refused::Host(fault)) => return Err(fault),
                },
                (false, true) => ring.take_back(&queue)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes back what the kernel has of those queues.
    pub(super) fn take_back(
        &mut self,
        mut which: impl FnMut(u16) -> bool,
    ) -> Result<(), HostFault> {
        for ring in self.rings.iter_mut().filter(|ring| which(ring.index())) {
            if let Some(queue) = self.device.kernel_queue(ring.index()) {
                ring.take_back(&queue)?;
            }
        }
        Ok(())
    }

    /// Whether the device takes requests now. If not, queues wait for the next one that starts.
    fn begin(&mut self) -> Result<bool, HostFault> {
        if !self.is_due() {
            return Ok(false);
        }
        self.begun = self.device.begin(&self.rings)?;
        if !self.begun {
            self.rings.iter_mut().for_each(|ring| ring.due = false);
        }
        Ok(self.begun)
    }

    fn end_turns(&mut self) {
        for ring in self.rings.iter_mut().filter(|r| r.is_running()) {
            if let Err(kind) = ring.end_turn() {
                ring.break_with(kind);
            }
        }
    }

    /// Nothing is in flight afterwards, so queues may be stopped.
    pub(super) fn drain(&mut self) -> Result<(), HostFault> {
        let result = self.device.drain(&mut self.rings);
        self.after_device(result)?;
        self.end_turns();
        Ok(())
    }

    /// For a process that comes after this one.
    pub(super) fn keep(&mut self) {
        if let Some(area) = &self.kept
            && let Some(what) = self.device.keep()
        {
            area.store(&what);
        }
    }

    fn after_device(&mut self, result: Result<(), DeviceFault>) -> Result<(), HostFault> {
        self.keep();
        match result {
            Ok(()) => {}
            Err(DeviceFault::Guest(fault)) => self.break_ring(fault),
            Err(DeviceFault::Host(fault)) => return Err(fault),
        }
        self.poll_backends()
    }

    fn break_ring(&mut self, fault: GuestFault) {
        if let Some(ring) = self.rings.get_mut(usize::from(fault.queue)) {
            ring.break_with(fault.kind);
        }
    }

    pub(super) fn poll_backends(&mut self) -> Result<(), HostFault> {
        if (0..self.polled.len()).all(|i| self.polled[i] == self.device.interest(i)) {
            return Ok(());
        }
        for (index, fd) in self.device.backends().into_iter().enumerate() {
            let interest = self.device.interest(index);
            let Some(polled) = self.polled.get_mut(index).filter(|p| **p != interest) else {
                continue;
            };
            let mut event = EpollEvent::new(flags(interest), FIRST_BACKEND + index as u64);
            // One that is not polled leaves the set: errors would be reported even with no interest in it.
            match (*polled == Interest::NONE, interest == Interest::NONE) {
                (true, _) => self.epoll.add(fd, event),
                (false, true) => self.epoll.delete(fd),
                (false, false) => self.epoll.modify(fd, &mut event),
            }
            .map_err(HostFault::of("epoll_ctl of a back end"))?;
            *polled = interest;
        }
        Ok(())
    }
}

fn flags(interest: Interest) -> EpollFlags {
    let mut flags = EpollFlags::empty();
    if interest.readable {
        flags |= EpollFlags::EPOLLIN;
    }
    if interest.writable {
        flags |= EpollFlags::EPOLLOUT;
    }
    if interest.edge {
        flags |= EpollFlags::EPOLLET;
    }
    flags
}

/// The time until `at` in `epoll_wait`'s milliseconds: rounded up, so that it is over afterwards.
fn until(at: Instant) -> EpollTimeout {
    let left = at.saturating_duration_since(Instant::now());
    let millis = left.as_nanos().div_ceil(1_000_000);
    EpollTimeout::try_from(millis.min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
}
