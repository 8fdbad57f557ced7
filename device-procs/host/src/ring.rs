//! One split virtqueue as a device uses it: take a chain, complete it, nothing else.
//!
//! **Job.** State of one queue between the vhost-user messages that describe it and the device that serves it: addresses,
//! eventfds, in-flight tracking, notification suppression in both directions (virtio 1.3, 2.7.7 and 2.7.10), fairness.
//!
//! **Who is not trusted.** The driver, whose indices and chains are checked before a device sees them; and the front end, whose
//! addresses are checked when the ring starts.
//!
//! **Why this way.** `virtio-queue`'s [`Queue`] keeps addresses, the two indices and the kick side. It ignores
//! `VIRTQ_AVAIL_F_NO_INTERRUPT` and publishes used elements one by one, which a packet in several buffers must not be (a driver
//! that sees the first without the rest drops it), so the used side is written here. A ring counts what a device takes from it,
//! and looks at the clock now and then: after one queue's worth, or [`DEVICE_TURN_MS`], the other queues and the front end get
//! their turn, however fast a guest refills it and however long its requests take.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use ipc::limits::DEVICE_TURN_MS;
use nix::errno::Errno;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::chain::{Chain, DESCRIPTOR_SIZE, Table, Token, walk, walk_on};
use crate::fault::{FaultKind, GuestFault, HostFault};
use crate::inflight::InflightQueue;
use crate::memory::{GuestBuffers, GuestRam, PACKET_SEGMENTS, SegmentList, Span};
use crate::vhost_net::{Described, KernelQueue, Refused};

/// Requests between two looks at the clock.
const UNCLOCKED: u8 = 7;
/// Bytes of a request after which the clock is looked at in any case.
const LARGE: usize = 1 << 20;
/// Requests that are given back without being shown to the driver at once: it looks at the index that each would move.
const LATER: usize = 32;

/// Where the front end says that the parts of a queue are, in its own address space.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UserAddresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// The three parts of a queue (virtio 1.3, 2.7.5, 2.7.6 and 2.7.8), which are looked at for each request. Each is in one region of guest
/// RAM: no front end has a way to say that it is not.
#[derive(Debug)]
struct Rings {
    descriptors: Span,
    available: Span,
    used: Span,
    /// Entries less one: their number is a power of two, and no division finds the place of an index.
    mask: u16,
}

impl Rings {
    /// le16 flags and le16 idx are in front of both.
    const INDEX: usize = 2;
    const FIRST: usize = 4;
    const USED_ELEMENT: usize = 8;

    /// `None` if one is not in one region.
    fn find(ram: &Rc<GuestRam>, queue: &Queue) -> Option<Self> {
        let size = usize::from(queue.size());
        let table = GuestAddress(queue.desc_table());
        // With the event index behind the last entry.
        let span = |at, entry| {
            Span::new(
                ram,
                GuestAddress(at),
                Self::FIRST + entry * size + size_of::<u16>(),
            )
        };
        Some(Self {
            descriptors: Span::new(ram, table, size * DESCRIPTOR_SIZE)?,
            available: span(queue.avail_ring(), size_of::<u16>())?,
            used: span(queue.used_ring(), Self::USED_ELEMENT)?,
            mask: queue.size().wrapping_sub(1),
        })
    }

    /// le16 at `at` of the available ring.
    fn available(&self, at: usize, order: Ordering) -> Result<u16, FaultKind> {
        let bytes = self.available.bytes();
        let value: u16 = bytes.load(at, order).map_err(|_| FaultKind::QueueMemory)?;
        Ok(u16::from_le(value))
    }

    /// Where chains start.
    fn table(&self, indirect: bool) -> Table<'_> {
        Table {
            descriptors: self.descriptors.bytes(),
            size: self.mask.wrapping_add(1),
            indirect,
        }
    }

    /// What the available ring has for `index`.
    fn head(&self, index: u16) -> Result<u16, FaultKind> {
        let at = Self::FIRST + usize::from(index & self.mask) * size_of::<u16>();
        self.available(at, Ordering::Relaxed)
    }

    /// Writes le32 id and le32 len of the used ring's entry for `index`.
    fn put(&self, index: u16, head: u16, written: u32) -> Result<(), FaultKind> {
        let at = Self::FIRST + Self::USED_ELEMENT * usize::from(index & self.mask);
        let bytes = self.used.bytes();
        bytes
            .store(u32::from(head).to_le(), at, Ordering::Relaxed)
            .and_then(|()| bytes.store(written.to_le(), at + 4, Ordering::Relaxed))
            .map_err(|_| FaultKind::QueueMemory)
    }

    /// Shows the driver all that was [`put`](Self::put) before.
    fn show(&self, index: u16) -> Result<(), FaultKind> {
        self.used
            .bytes()
            .store(index.to_le(), Self::INDEX, Ordering::Release)
            .map_err(|_| FaultKind::QueueMemory)
    }
}

/// A virtqueue.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    ram: Option<Rc<GuestRam>>,
    /// Where they are in `ram`; together with it or not at all.
    rings: Option<Rings>,
    pub(crate) addresses: Option<UserAddresses>,
    pub(crate) base: u16,
    pub(crate) kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    pub(crate) error: Option<OwnedFd>,
    pub(crate) enabled: bool,
    started: bool,
    broken: bool,
    indirect: bool,
    inflight: Option<InflightQueue>,
    /// Heads that were in flight when the last process died, the oldest at the end.
    replay: Vec<u16>,
    readable: SegmentList,
    writable: SegmentList,
    /// Chains that the device may still take in this turn.
    budget: u16,
    /// The available index as it was when it was last looked at: a driver that polls writes to the same line of the cache.
    known: u16,
    /// Heads and lengths that the driver has not been shown yet.
    later: Vec<(u16, u32)>,
    /// When this turn's end is, once it has been looked at.
    until: Option<Instant>,
    /// Requests that may be taken before the clock is looked at.
    unclocked: u8,
    /// The device wanted more in this turn than it may take; what it put back then does not change that.
    exhausted: bool,
    /// Where the device found nothing more available, in this turn.
    drained: Option<u16>,
    /// Used index when the driver was last considered for an interrupt.
    signalled: u16,
    /// A process before this one may have used buffers and not lived to interrupt the driver.
    owes_interrupt: bool,
    /// The device's turn is due whether or not a kick comes.
    pub(crate) due: bool,
    /// The driver was told not to kick, since someone looks.
    quiet: bool,
    /// The kernel serves it, and this process never does.
    pub(crate) outside: bool,
    /// The kernel has it now.
    lent: bool,
}

impl Ring {
    pub(crate) fn new(index: u16, max_size: u16) -> Option<Self> {
        Some(Self {
            index,
            queue: Queue::new(max_size).ok()?,
            ram: None,
            rings: None,
            addresses: None,
            base: 0,
            kick: None,
            call: None,
            error: None,
            enabled: false,
            started: false,
            broken: false,
            indirect: false,
            inflight: None,
            replay: Vec::new(),
            readable: SegmentList::default(),
            writable: SegmentList::default(),
            budget: 0,
            known: 0,
            later: Vec::new(),
            until: None,
            unclocked: 0,
            exhausted: false,
            drained: None,
            signalled: 0,
            owes_interrupt: false,
            due: false,
            quiet: false,
            outside: false,
            lent: false,
        })
    }

    /// Its number among the device's queues.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Whether the device may take chains.
    pub fn is_running(&self) -> bool {
        self.may_run() && !self.outside
    }

    /// Whether anybody may take chains.
    pub(crate) fn may_run(&self) -> bool {
        self.started && self.enabled && !self.broken
    }

    /// Whether the kernel has it.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent
    }

    /// The device wants another turn, kick or not: it left chains here that it now has room for.
    pub fn want_turn(&mut self) {
        self.due = self.is_running();
    }

    /// Whether the device would take chains from it if it had a turn now, as far as is known without a kick.
    pub fn wants_turn(&self) -> bool {
        self.due || self.has_more()
    }

    pub(crate) fn is_started(&self) -> bool {
        self.started
    }

    /// Whether it is not served any more, since something in it is malformed.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the request at `head` was taken by a process before this one and not given back.
    pub fn is_replayed(&self, head: u16) -> bool {
        self.replay.contains(&head)
    }

    pub(crate) fn call(&self) -> Option<&OwnedFd> {
        self.call.as_ref()
    }

    /// Was broken before this process, which the front end has been told.
    pub(crate) fn stay_broken(&mut self) {
        self.broken = true;
        self.due = false;
    }

    /// For an error that only the device can see.
    pub fn fault(&self, kind: FaultKind) -> GuestFault {
        GuestFault {
            queue: self.index,
            kind,
        }
    }

    /// The next request, or `None` when the driver has made none available, or when this turn is over.
    ///
    /// # Errors
    /// The driver's queue or chain is malformed; the queue must not be used any more.
    pub fn pop(&mut self) -> Result<Option<Chain<'_>>, GuestFault> {
        let head = match self.next_head() {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            Err(kind) => return Err(self.fault(kind)),
        };
        let (head, replayed) = head;
        let index = self.index;
        let at = move |kind| GuestFault { queue: index, kind };
        let (Some(ram), Some(rings)) = (&self.ram, &self.rings) else {
            return Ok(None);
        };
        let table = rings.table(self.indirect);
        walk(ram, table, head, &mut self.readable, &mut self.writable).map_err(at)?;
        let readable = self.readable.buffers(ram);
        let writable = self.writable.buffers(ram);
        if readable.len() + writable.len() >= LARGE {
            self.unclocked = 0;
        }
        Ok(Some(Chain {
            token: Token { head, replayed },
            readable,
            writable,
        }))
    }

    /// Whether the turn has lasted too long. The clock is not looked at for each small request.
    fn is_late(&mut self) -> bool {
        if self.unclocked > 0 {
            self.unclocked -= 1;
            return false;
        }
        self.unclocked = UNCLOCKED;
        let now = Instant::now();
        let until = *self
            .until
            .get_or_insert(now + Duration::from_millis(DEVICE_TURN_MS));
        now >= until
    }

    /// Whether there is one to take in this turn.
    fn may_take(&mut self) -> Result<bool, FaultKind> {
        if !self.is_running() {
            return Ok(false);
        }
        if self.budget == 0 {
            self.exhausted = true;
            return Ok(false);
        }
        let next = self.queue.next_avail();
        if self.known != next || !self.replay.is_empty() {
            return Ok(true);
        }
        let Some(rings) = &self.rings else {
            return Ok(false);
        };
        self.known = self.available_index(rings)?;
        if self.known == next {
            self.drained = Some(next);
        }
        Ok(self.known != next)
    }

    /// The next one, if the turn has not lasted too long.
    fn next_head(&mut self) -> Result<Option<(u16, bool)>, FaultKind> {
        if !self.may_take()? {
            return Ok(None);
        }
        if self.is_late() {
            self.exhausted = true;
            return Ok(None);
        }
        self.one_more_head()
    }

    /// The next one, whatever the clock says.
    fn one_more_head(&mut self) -> Result<Option<(u16, bool)>, FaultKind> {
        if !self.may_take()? {
            return Ok(None);
        }
        if let Some(head) = self.replay.pop() {
            self.budget -= 1;
            return Ok(Some((head, true)));
        }
        let Some(rings) = &self.rings else {
            return Ok(None);
        };
        let head = rings.head(self.queue.next_avail())?;
        if head >= self.queue.size() {
            return Err(FaultKind::DescriptorIndex {
                index: head,
                size: u32::from(self.queue.size()),
            });
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.taken(head)?;
        }
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_add(1));
        self.budget -= 1;
        Ok(Some((head, false)))
    }

    /// The available index, which is ahead of what was taken by no more than there are entries.
    fn available_index(&self, rings: &Rings) -> Result<u16, FaultKind> {
        let index = rings.available(Rings::INDEX, Ordering::Acquire)?;
        let ahead = index.wrapping_sub(self.queue.next_avail());
        if ahead > self.queue.size() {
            return Err(FaultKind::AvailIndex {
                index,
                size: self.queue.size(),
            });
        }
        Ok(index)
    }

    /// Takes requests until their writable buffers have room for `want` bytes, as one run of bytes, or until there are no more
    /// or [`PACKET_SEGMENTS`] pieces. `taken` gets the room in each. `None` if there is not one.
    ///
    /// # Errors
    /// As for [`pop`](Self::pop).
    pub fn gather(
        &mut self,
        want: usize,
        taken: &mut Vec<(Token, usize)>,
    ) -> Result<Option<GuestBuffers<'_>>, GuestFault> {
        let index = self.index;
        let at = move |kind| GuestFault { queue: index, kind };
        self.readable.clear();
        self.writable.clear();
        taken.clear();
        let mut room = 0;
        while taken.is_empty() || (room < want && self.writable.count() < PACKET_SEGMENTS) {
            // The time of what belongs together is looked at once.
            let head = if taken.is_empty() {
                self.next_head()
            } else {
                self.one_more_head()
            };
            let Some((head, replayed)) = head.map_err(at)? else {
                break;
            };
            let (Some(ram), Some(rings)) = (&self.ram, &self.rings) else {
                break;
            };
            let table = rings.table(self.indirect);
            let before = self.writable.count();
            walk_on(ram, table, head, &mut self.readable, &mut self.writable).map_err(at)?;
            let more = self.writable.bytes_from(before);
            taken.push((Token { head, replayed }, more));
            room += more;
        }
        let Some(ram) = self.ram.as_ref().filter(|_| !taken.is_empty()) else {
            return Ok(None);
        };
        Ok(Some(self.writable.buffers(ram)))
    }

    /// Gives several requests back: the driver sees all of them at once or none, maybe with later ones, at the end of this turn
    /// at last.
    ///
    /// # Errors
    /// As for [`complete`](Self::complete).
    pub fn complete_later(
        &mut self,
        done: impl Iterator<Item = (Token, u32)>,
    ) -> Result<(), GuestFault> {
        if self.broken {
            return Ok(());
        }
        // Before, so that all of `done` are shown at once.
        if self.later.len() >= LATER {
            self.show().map_err(|kind| self.fault(kind))?;
        }
        self.later
            .extend(done.map(|(token, written)| (token.head, written)));
        Ok(())
    }

    /// Shows the driver what was kept back. All at once: an element that is written while the driver looks at others of its line of the
    /// cache takes that from it, and it from this processor (measured).
    fn show(&mut self) -> Result<(), FaultKind> {
        let Some(rings) = self.rings.as_ref().filter(|_| !self.later.is_empty()) else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for (head, written) in &self.later {
            if let Some(inflight) = &mut self.inflight {
                inflight.will_be_used(*head)?;
            }
            rings.put(next, *head, *written)?;
            next = next.wrapping_add(1);
        }
        rings.show(next)?;
        self.queue.set_next_used(next);
        // At most one for each that was taken in a turn.
        let count = self.later.len() as u16;
        self.later.clear();
        if let Some(inflight) = &mut self.inflight {
            inflight.were_used(count, next)?;
        }
        Ok(())
    }

    /// Gives a request back with `written` bytes of its writable buffers filled, from the front (virtio 1.3, 2.7.8).
    ///
    /// # Errors
    /// The queue's memory is gone, or the in-flight region is not consistent.
    #[allow(clippy::needless_pass_by_value)] // a token is used up: no request is given back twice
    pub fn complete(&mut self, token: Token, written: u32) -> Result<(), GuestFault> {
        if self.broken {
            // Nobody looks at it until the driver has reset the device.
            return Ok(());
        }
        self.later.push((token.head, written));
        self.show().map_err(|kind| self.fault(kind))
    }

    /// Interrupts the driver now for what was completed in this turn, if it wants that, and not only when the turn is over: for
    /// requests that take long enough that the driver has something to do meanwhile.
    ///
    /// # Errors
    /// The queue's memory is gone.
    pub fn interrupt(&mut self) -> Result<(), GuestFault> {
        if self.broken {
            return Ok(());
        }
        self.show()
            .and_then(|()| self.signal_driver())
            .map_err(|kind| self.fault(kind))
    }

    /// The writable buffers of a request that was popped before the last one. Its chain is walked and checked anew, since the
    /// driver may have changed it.
    ///
    /// # Errors
    /// The chain is malformed now.
    pub fn writable_of(&mut self, token: &Token) -> Result<GuestBuffers<'_>, GuestFault> {
        let index = self.index;
        let at = move |kind| GuestFault { queue: index, kind };
        let (Some(ram), Some(rings)) = (&self.ram, &self.rings) else {
            return Err(at(FaultKind::QueueMemory));
        };
        let table = rings.table(self.indirect);
        walk(
            ram,
            table,
            token.head,
            &mut self.readable,
            &mut self.writable,
        )
        .map_err(at)?;
        Ok(self.writable.buffers(ram))
    }

    /// Undoes the last [`pop`](Self::pop) that was not undone or completed. Requests must be put back in the reverse of their
    /// order.
    ///
    /// # Errors
    /// The in-flight region is not consistent.
    #[allow(clippy::needless_pass_by_value)] // as for `complete`
    pub fn put_back(&mut self, token: Token) -> Result<(), GuestFault> {
        if token.replayed {
            self.replay.push(token.head);
        } else {
            if let Some(inflight) = &mut self.inflight {
                inflight.put_back(token.head).map_err(|kind| GuestFault {
                    queue: self.index,
                    kind,
                })?;
            }
            self.queue
                .set_next_avail(self.queue.next_avail().wrapping_sub(1));
        }
        self.budget = self.budget.saturating_add(1);
        Ok(())
    }

    // What follows is for the server only.

    /// Changes the number of entries; `false` if it is no power of two or too large.
    pub(crate) fn set_size(&mut self, size: u16) -> bool {
        self.queue.try_set_size(size).is_ok()
    }

    pub(crate) fn set_inflight(&mut self, inflight: Option<InflightQueue>) {
        self.inflight = inflight;
    }

    /// Starts to serve the queue that was described before. A fault leaves it broken.
    pub(crate) fn start(
        &mut self,
        ram: &Rc<GuestRam>,
        event_idx: bool,
        indirect: bool,
    ) -> Result<(), GuestFault> {
        self.started = true;
        self.broken = false;
        self.due = true;
        self.indirect = indirect;
        self.drained = None;
        self.quiet = false;
        self.replay.clear();
        self.later.clear();
        self.queue.set_event_idx(event_idx);
        self.place(ram)
            .and_then(|()| self.resume())
            .map_err(|kind| self.fault(kind))
    }

    /// Translates the addresses, now and whenever guest memory changes.
    pub(crate) fn place(&mut self, ram: &Rc<GuestRam>) -> Result<(), FaultKind> {
        let addresses = self.addresses.ok_or(FaultKind::QueueAddress)?;
        let guest = |user| ram.guest_address(user).ok_or(FaultKind::QueueAddress);
        let (descriptors, available, used) = (
            guest(addresses.descriptors)?,
            guest(addresses.available)?,
            guest(addresses.used)?,
        );
        self.queue
            .try_set_desc_table_address(descriptors)
            .and_then(|()| self.queue.try_set_avail_ring_address(available))
            .and_then(|()| self.queue.try_set_used_ring_address(used))
            .map_err(|_| FaultKind::QueueAddress)?;
        self.queue.set_ready(true);
        if !self.queue.is_valid(ram.map()) {
            return Err(FaultKind::QueueAddress);
        }
        self.rings = Some(Rings::find(ram, &self.queue).ok_or(FaultKind::QueueAddress)?);
        self.ram = Some(ram.clone());
        Ok(())
    }

    /// Finds the place to go on from, and what was in flight.
    fn resume(&mut self) -> Result<(), FaultKind> {
        let ram = self.ram.as_ref().ok_or(FaultKind::QueueAddress)?;
        let used = self
            .queue
            .used_idx(ram.map(), Ordering::Acquire)
            .map_err(|_| FaultKind::QueueMemory)?
            .0;
        self.queue.set_next_used(used);
        self.signalled = used;
        if self.outside {
            let on = match &mut self.inflight {
                Some(inflight) => inflight.start_in_order(used, self.queue.size())?,
                None => false,
            };
            self.queue.set_next_avail(if on { used } else { self.base });
            self.owes_interrupt = on;
            self.pay_interrupt();
            return Ok(());
        }
        let old = match &mut self.inflight {
            Some(inflight) => inflight.start(used, self.queue.size())?,
            None => None,
        };
        match old {
            // Everything that was taken is either used or in flight; a front end whose back end died cannot know better.
            Some(replay) => {
                // At most one per entry of the queue.
                let count = replay.len() as u16;
                self.queue.set_next_avail(used.wrapping_add(count));
                self.replay = replay;
                self.owes_interrupt = true;
                self.pay_interrupt();
            }
            None => self.queue.set_next_avail(self.base),
        }
        self.known = self.queue.next_avail();
        Ok(())
    }

    /// Changes the descriptor that interrupts the driver.
    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        self.pay_interrupt();
    }

    /// The driver asked for an interrupt, or did not, before it waited; what it asked is not known any more. One too many
    /// does no harm.
    fn pay_interrupt(&mut self) {
        if self.owes_interrupt
            && let Some(call) = &self.call
        {
            signal(call);
            self.owes_interrupt = false;
        }
    }

    /// Has the kernel serve it from here on.
    pub(crate) fn lend(&mut self, to: &KernelQueue<'_>) -> Result<(), Refused> {
        let Some(ram) = &self.ram else {
            return Err(Refused::Address);
        };
        let described = Described {
            size: self.queue.size(),
            base: self.queue.next_avail(),
            parts: [
                self.queue.desc_table(),
                self.queue.avail_ring(),
                self.queue.used_ring(),
            ],
            event_idx: self.queue.event_idx_enabled(),
            indirect: self.indirect,
            kick: self.kick.as_ref().map(AsFd::as_fd),
            call: self.call.as_ref().map(AsFd::as_fd),
            error: self.error.as_ref().map(AsFd::as_fd),
        };
        let result = to.vhost.start(to, &described, ram);
        // What was begun is undone by the same calls as what was done; an address is looked at before all else.
        self.lent = !matches!(result, Err(Refused::Address));
        result
    }

    /// Takes it back from the kernel, if that has it.
    pub(crate) fn take_back(&mut self, from: &KernelQueue<'_>) -> Result<(), HostFault> {
        if std::mem::take(&mut self.lent) {
            let next = from.vhost.stop(from.number)?;
            self.queue.set_next_avail(next);
        }
        Ok(())
    }

    /// Stops; returns the available index to go on from.
    pub(crate) fn stop(&mut self) -> u16 {
        if self.started {
            self.base = self.queue.next_avail();
            if self.replay.is_empty()
                && let Some(inflight) = &mut self.inflight
                && inflight.finish().is_err()
            {
                ipc::guest_warn!("queue {}: in-flight region cannot be reset", self.index);
            }
        }
        self.started = false;
        self.broken = false;
        self.owes_interrupt = false;
        self.due = false;
        self.ram = None;
        self.rings = None;
        self.replay.clear();
        self.kick = None;
        self.base
    }

    /// Back to the state before the first message, but for the in-flight region.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.enabled = false;
        self.addresses = None;
        self.base = 0;
        self.call = None;
        self.error = None;
        self.queue.reset();
    }

    /// Marks the queue unusable and tells the front end through the error eventfd.
    pub(crate) fn break_with(&mut self, kind: FaultKind) {
        ipc::guest_warn!(
            "queue {}: {kind}; the queue stays broken until the driver resets the device",
            self.index
        );
        // What was done before is done.
        if self.show().is_err() {
            self.later.clear();
        }
        self.broken = true;
        self.due = false;
        if let Some(error) = &self.error {
            signal(error);
        }
    }

    /// Before the device's turn on this queue: no kicks meanwhile.
    pub(crate) fn begin_turn(&mut self) -> Result<(), FaultKind> {
        self.due = false;
        self.drained = None;
        self.refill_budget();
        match &self.ram {
            Some(ram) => self
                .queue
                .disable_notification(ram.map())
                .map_err(|_| FaultKind::QueueMemory),
            None => Ok(()),
        }
    }

    /// Before a turn in which the device may or may not look at this queue.
    pub(crate) fn refill_budget(&mut self) {
        self.budget = self.queue.size();
        self.until = None;
        self.unclocked = 0;
        self.exhausted = false;
    }

    /// After the device's turn: interrupts the driver if it wants that, and decides what wakes the device next.
    pub(crate) fn end_turn(&mut self) -> Result<(), FaultKind> {
        self.show()?;
        self.signal_driver()?;
        if self.drained.is_some() {
            self.quiet = true;
        } else if self.exhausted || self.budget == 0 {
            self.due = true;
        }
        Ok(())
    }

    /// Whether the driver has made more available since the device found nothing more: for someone who looks again and again.
    pub(crate) fn has_more(&self) -> bool {
        let (Some(rings), Some(end)) = (&self.rings, self.drained) else {
            return false;
        };
        self.is_running()
            && rings
                .available(Rings::INDEX, Ordering::Acquire)
                .is_ok_and(|index| index != end)
    }

    /// From here on a kick wakes the device, and nothing else. A turn is due if the driver was faster.
    pub(crate) fn listen(&mut self) -> Result<(), FaultKind> {
        if !std::mem::take(&mut self.quiet) || !self.is_running() {
            return Ok(());
        }
        let (Some(ram), Some(end)) = (&self.ram, self.drained.take()) else {
            return Ok(());
        };
        // A kick is wanted for what comes after the place where nothing was left, even if the device has put back
        // chains that are before it because they were not enough.
        let next = self.queue.next_avail();
        self.queue.set_next_avail(end);
        let more = self.queue.enable_notification(ram.map());
        self.queue.set_next_avail(next);
        self.due |= more.map_err(|_| FaultKind::QueueMemory)?;
        Ok(())
    }

    fn signal_driver(&mut self) -> Result<(), FaultKind> {
        let (old, new) = (self.signalled, self.queue.next_used());
        let Some(rings) = self.rings.as_ref().filter(|_| old != new) else {
            return Ok(());
        };
        self.signalled = new;
        // The driver writes its wish and then reads the used index; we wrote the index and now read the wish.
        fence(Ordering::SeqCst);
        let event_idx = self.queue.event_idx_enabled();
        // `used_event` is behind the last entry of the available ring, `flags` is in front of all (virtio 1.3, 2.7.6).
        let offset = if event_idx {
            Rings::FIRST + usize::from(self.queue.size()) * size_of::<u16>()
        } else {
            0
        };
        let wish = rings.available(offset, Ordering::Relaxed)?;
        let wanted = if event_idx {
            // virtio 1.3, 2.7.10: the index that the driver waits for is among those just published.
            new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(wish) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted && let Some(call) = &self.call {
            signal(call);
        }
        Ok(())
    }
}

/// Adds one to an eventfd.
fn signal(eventfd: &OwnedFd) {
    match nix::unistd::write(eventfd.as_fd(), &1u64.to_ne_bytes()) {
        // A full counter has woken its reader already.
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(errno) => ipc::guest_warn!("eventfd cannot be signalled: {errno}"),
    }
}
