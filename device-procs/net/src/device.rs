//! The device: queue pairs, the taps behind them, and who waits for whom.
//!
//! Queue 2k receives and 2k+1 transmits (virtio 1.3, 5.1.2). The kernel spreads packets over all queues of the tap, also when the
//! driver uses fewer pairs than there are; so tap queue i feeds receive queue i modulo the pairs in use.
//!
//! With `vhost=on` the kernel serves the pairs, and this process the control queue alone: tap queues of pairs that are not in use are
//! detached then, and while the link is down nobody serves a pair.
//!
//! The process that stands in for a card that was taken out has no tap and never a link: it answers the control queue, for whose answers
//! a driver waits with a processor of the guest, and else for ever.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use device_host::{
    BackendFds, Device, DeviceFault, HostFault, Interest, KernelQueue, Ring, VhostNet,
};
use ipc::limits::{MAX_NET_QUEUE_PAIRS, MAX_POLL_US, MAX_QUEUE_SIZE};
use ipc::spec::DeviceSpec;
use ipc::spec::net::NetLimits;
use ipc::start::StartMessage;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ};

use crate::announce;
use crate::backend::tap::TapQueue;
use crate::config_space::ConfigSpace;
use crate::control::{self, Command};
use crate::error::BuildError;
use crate::features::Features;
use crate::kept::{self, Told};
use crate::limit::Limiter;
use crate::receive::{Receiver, Stopped};
use crate::transmit;

/// Smallest ring that a driver gets along with.
pub(crate) const MIN_QUEUE_SIZE: u16 = 4;

/// One tap queue and the state of both its directions.
#[derive(Debug)]
struct Pair {
    /// `None` in a process that stands in.
    tap: Option<TapQueue>,
    receiver: Receiver,
    /// The driver has buffers, so a packet can be taken. Not before the driver's first.
    receiving: bool,
    /// Packets of the guest wait for room in the tap.
    full: bool,
    /// The kernel passes its packets.
    vhost: Option<VhostNet>,
    /// The limits let nothing pass to the guest, or from it, before then.
    rx_wait: Option<Instant>,
    tx_wait: Option<Instant>,
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    pairs: Vec<Pair>,
    config: ConfigSpace,
    queue_size: u16,
    /// There is a control queue; if not, `enabled` says which receive queues the front end lets run.
    control: bool,
    enabled: u32,
    offered: Features,
    accepted: Features,
    /// On the control queue.
    told: Told,
    /// Another one than was kept.
    unkept: bool,
    mac: [u8; 6],
    /// What has come until the queues do is for nobody: the card had another tap then, and got what is broadcast through that one.
    early: bool,
    rx_limit: Limiter,
    tx_limit: Limiter,
    /// How long to look for more packets before sleeping.
    poll: Duration,
    /// For packets in too many pieces.
    copy: Vec<u8>,
}

impl Net {
    /// From the start message and the tap's descriptors.
    ///
    /// # Errors
    /// The spec and the descriptors do not make one.
    pub fn build(start: &StartMessage, fds: &mut BackendFds) -> Result<Self, BuildError> {
        let DeviceSpec::Net(spec) = &start.device else {
            return Err(BuildError::NotANetDevice);
        };
        let (pairs, size) = (spec.queue_pairs, spec.queue_size);
        if !(1..=MAX_NET_QUEUE_PAIRS).contains(&pairs) {
            return Err(BuildError::Property {
                property: "queues",
                value: u64::from(pairs),
                allowed: "1 to 16",
            });
        }
        if !size.is_power_of_two() || !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size) {
            return Err(BuildError::Property {
                property: "queue-size",
                value: u64::from(size),
                allowed: "a power of two from 4 to 4096",
            });
        }
        if spec.poll_us > MAX_POLL_US || spec.vhost && spec.poll_us > 0 {
            return Err(BuildError::Property {
                property: "poll-us",
                value: u64::from(spec.poll_us),
                allowed: "0 to 200, with vhost=on 0",
            });
        }
        let wanted = match spec.stands_in {
            Some(_) => 0,
            None => usize::from(pairs),
        };
        let all = fds.len();
        if all < wanted || !spec.vhost && all != wanted {
            return Err(BuildError::Descriptors { pairs, fds: all });
        }
        if spec.vhost && all != 2 * wanted {
            let fds = all - wanted;
            return Err(BuildError::VhostDescriptors { pairs, fds });
        }
        if spec.vhost && spec.limits != NetLimits::default() {
            return Err(BuildError::Limits);
        }
        let mut list = Vec::with_capacity(usize::from(pairs));
        while list.len() < usize::from(pairs) {
            let tap = match (list.len() < wanted).then(|| fds.take()).flatten() {
                Some(fd) => Some(TapQueue::new(fd, list.len())?),
                None => None,
            };
            list.push(Pair {
                tap,
                receiver: Receiver::default(),
                receiving: false,
                full: false,
                vhost: None,
                rx_wait: None,
                tx_wait: None,
            });
        }
        let mut offered = None;
        for (number, pair) in list.iter_mut().enumerate() {
            // None without vhost.
            let Some(fd) = fds.take() else { break };
            let vhost = VhostNet::new(fd).map_err(|source| BuildError::Vhost { number, source })?;
            offered = Some(offered.unwrap_or(u64::MAX) & vhost.features());
            pair.vhost = Some(vhost);
        }
        let now = Instant::now();
        let first = list.first().and_then(|pair| pair.tap.as_ref());
        let uso = first.is_some_and(TapQueue::has_uso);
        let features = match (spec.stands_in, offered) {
            (Some(features), _) => {
                Features::offered(pairs, true, spec.control_queue).among(features)
            }
            (None, None) => Features::offered(pairs, uso, spec.control_queue),
            (None, Some(vhost)) => {
                Features::offered(pairs, uso, spec.control_queue).with_vhost(vhost)
            }
        };
        Ok(Self {
            config: ConfigSpace::new(spec.mac, pairs, first.is_some()),
            queue_size: size,
            control: spec.control_queue,
            enabled: 0,
            offered: features,
            accepted: Features::default(),
            told: Told::new(spec.mac),
            unkept: false,
            mac: spec.mac,
            early: start.instead,
            rx_limit: Limiter::new(spec.limits.rx, now),
            tx_limit: Limiter::new(spec.limits.tx, now),
            poll: Duration::from_micros(u64::from(spec.poll_us)),
            copy: Vec::new(),
            pairs: list,
        })
    }

    /// Index of the control queue, if the driver knows one (5.1.2: after the pairs that the driver knows).
    fn control_queue(&self) -> Option<usize> {
        let pairs = if self.accepted.has(VIRTIO_NET_F_MQ) {
            self.pairs.len()
        } else {
            1
        };
        self.control.then_some(2 * pairs)
    }

    /// Pairs in use; the driver's word is held against those that there are.
    fn active(&self) -> usize {
        usize::from(self.told.pairs).clamp(1, self.pairs.len())
    }

    fn use_pairs(&mut self, count: u16) {
        self.told.pairs = count;
        self.attach();
        // Each tap queue feeds another ring now, whose buffers it has not looked at.
        for pair in &mut self.pairs {
            pair.receiving = true;
        }
    }

    /// Where the kernel passes packets, a tap queue feeds its own receive queue and no other one: those that the driver does not use
    /// get none.
    fn attach(&self) {
        let active = self.active();
        // The first one always is.
        for (index, pair) in self.pairs.iter().enumerate().skip(1) {
            if pair.vhost.is_some()
                && let Some(tap) = &pair.tap
                && let Err(errno) = device_host::tap::attach(tap.fd(), index < active)
            {
                ipc::guest_warn!("tap queue {index} cannot be attached or detached: {errno}");
            }
        }
    }

    /// Takes packets from tap queue `index` for `ring`.
    fn receive(&mut self, index: usize, ring: &mut Ring) -> Result<(), DeviceFault> {
        let features = self.accepted;
        let Some(pair) = self
            .pairs
            .get_mut(index)
            .filter(|_| self.config.link_is_up())
        else {
            return Ok(());
        };
        pair.receiving = false;
        let Some(tap) = &pair.tap else {
            return Ok(());
        };
        let filter = &self.told.filter;
        let stopped = pair
            .receiver
            .process(ring, tap, features, filter, &mut self.rx_limit)?;
        pair.receiving = stopped == Stopped::Idle;
        pair.rx_wait = match stopped {
            Stopped::Limited(at) => Some(at),
            _ => None,
        };
        Ok(())
    }

    fn transmit(&mut self, index: usize, ring: &mut Ring) -> Result<(), DeviceFault> {
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        let tap = pair.tap.as_ref().filter(|_| self.config.link_is_up());
        let limit = &mut self.tx_limit;
        let stopped = transmit::process(ring, tap, self.accepted, &mut self.copy, limit)?;
        pair.full = stopped == transmit::Stopped::Full;
        pair.tx_wait = match stopped {
            transmit::Stopped::Limited(at) => Some(at),
            _ => None,
        };
        Ok(())
    }

    /// Sets the offloads of the tap, which all its queues share.
    fn set_offloads(&self) -> Result<(), HostFault> {
        let chosen = match self.told.offloads {
            Some(offloads) => Features(self.accepted.0 & offloads),
            None => self.accepted,
        };
        match self.pairs.first().and_then(|pair| pair.tap.as_ref()) {
            Some(tap) => device_host::tap::set_offloads(tap.fd(), chosen.tap_offloads())
                .map_err(HostFault::of("TUNSETOFFLOAD")),
            None => Ok(()),
        }
    }

    /// Does one command of the control queue; `false` if it is not possible.
    fn obey(&mut self, command: Command<'_>) -> bool {
        let told = &mut self.told;
        let done = match command {
            Command::Pairs(count) => {
                let possible = (1..=self.pairs.len()).contains(&usize::from(count));
                if possible {
                    self.use_pairs(count);
                }
                possible
            }
            Command::Promiscuous(on) => {
                told.filter.set_promiscuous(on);
                true
            }
            Command::AllMulticast(on) => {
                told.filter.set_all_multicast(on);
                true
            }
            Command::Tables(raw) => told.filter.set_tables(raw),
            Command::Mac(mac) => {
                told.filter.set_mac(mac);
                true
            }
            Command::Vlan(id, on) => told.filter.set_vlan(id, on),
            Command::Announced => {
                self.config.announced();
                true
            }
            Command::Offloads(offloads) => {
                // 5.1.6.5.6.2: none that was not negotiated.
                let possible = offloads & !self.accepted.guest_offloads() == 0;
                if possible {
                    told.offloads = Some(offloads);
                }
                possible && self.set_offloads().is_ok()
            }
        };
        self.unkept |= done;
        done
    }

    /// The network is to learn where the guest is: from its driver, if that can do it, and from here if not.
    fn announce(&mut self) {
        if !self.config.announces()
            || self.config.link_is_up() && self.accepted.has(VIRTIO_NET_F_GUEST_ANNOUNCE)
        {
            return;
        }
        self.config.announced();
        let tap = self.pairs.first().and_then(|pair| pair.tap.as_ref());
        if let Some(tap) = tap.filter(|_| self.config.link_is_up()) {
            let frame = announce::frame(self.told.filter.mac());
            if let Err(errno) = tap.send(&frame) {
                ipc::guest_warn!("the network was not told where the guest is: {errno}");
            }
        }
    }

    /// Packets that came while the link was down, or for another tap, are nobody's.
    fn discard(&mut self) {
        for pair in &mut self.pairs {
            // As many as any tap's queue holds; whoever sends on meanwhile keeps this process from nothing.
            for _ in 0..MAX_QUEUE_SIZE {
                if pair.tap.as_ref().is_none_or(|tap| tap.discard().is_err()) {
                    break;
                }
            }
            pair.receiver.reset();
            pair.receiving = true;
        }
    }
}

impl Device for Net {
    fn features(&self) -> u64 {
        self.offered.0
    }

    fn num_queues(&self) -> u16 {
        // At most 16 pairs.
        2 * self.pairs.len() as u16 + u16::from(self.control)
    }

    fn told_queues(&self) -> u64 {
        if self.control {
            u64::from(self.num_queues())
        } else {
            self.pairs.len() as u64
        }
    }

    fn takes_single_regions(&self) -> bool {
        self.control || self.pairs.len() == 1
    }

    fn enabled(&mut self, index: u16, on: bool) {
        if self.control || index % 2 == 1 {
            return;
        }
        let bit = 1u32.checked_shl(u32::from(index / 2)).unwrap_or(0);
        self.enabled = if on {
            self.enabled | bit
        } else {
            self.enabled & !bit
        };
        // Drivers use the first ones. At most 32.
        self.use_pairs((self.enabled.trailing_ones() as u16).max(1));
    }

    fn kernel_queue(&self, index: u16) -> Option<KernelQueue<'_>> {
        if self.control_queue() == Some(usize::from(index)) {
            return None;
        }
        let number = usize::from(index / 2);
        let pair = self.pairs.get(number)?;
        Some(KernelQueue {
            vhost: pair.vhost.as_ref()?,
            number: u32::from(index % 2),
            tap: pair.tap.as_ref()?.fd(),
            on: self.config.link_is_up() && number < self.active(),
            features: self.accepted.for_vhost(),
        })
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn accept(&mut self, features: u64) -> Result<(), HostFault> {
        self.accepted = Features(features);
        if std::mem::take(&mut self.early) {
            self.discard();
        }
        for pair in &mut self.pairs {
            // A packet that waits has the shape of the old set.
            pair.receiver.reset();
        }
        self.attach();
        self.set_offloads()
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        self.config.read(offset, out);
    }

    fn write_config_as_host(&mut self, offset: usize, data: &[u8]) {
        let before = self.config.link_is_up();
        if !self.config.set_status(offset, data) {
            ipc::guest_warn!("configuration bytes {data:?} at {offset} are not the host's to set");
        } else {
            if !before && self.config.link_is_up() {
                self.discard();
            }
            self.announce();
        }
    }

    fn kept_len(&self) -> usize {
        kept::MOST
    }

    fn keep(&mut self) -> Option<Vec<u8>> {
        std::mem::take(&mut self.unkept).then(|| self.told.save())
    }

    fn go_on_with(&mut self, kept: &[u8]) {
        let Some(told) = Told::load(kept) else {
            ipc::guest_warn!("what the driver told a process before this one cannot be read");
            return;
        };
        self.told = told;
        self.attach();
        // Features come before queues, and then this is done again.
        if let Err(fault) = self.set_offloads() {
            ipc::guest_warn!("{fault}: {}", fault.source);
        }
    }

    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        let index = usize::from(ring.index());
        if self.control_queue() == Some(index) {
            return control::process(ring, self.accepted, |command| self.obey(command));
        }
        let pair = index / 2;
        if index % 2 == 1 {
            return self.transmit(pair, ring);
        }
        let active = self.active();
        if pair < active {
            for tap in (pair..self.pairs.len()).step_by(active) {
                self.receive(tap, ring)?;
            }
        }
        Ok(())
    }

    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        let taps = self.pairs.iter().filter_map(|pair| pair.tap.as_ref());
        taps.map(TapQueue::fd).collect()
    }

    fn interest(&self, index: usize) -> Interest {
        self.pairs
            .get(index)
            .map_or(Interest::NONE, |pair| Interest {
                readable: pair.vhost.is_none() && pair.receiving && self.config.link_is_up(),
                writable: pair.full,
                ..Interest::NONE
            })
    }

    fn backend_ready(
        &mut self,
        index: usize,
        ready: Interest,
        rings: &mut [Ring],
    ) -> Result<(), DeviceFault> {
        if ready.writable
            && let Some(ring) = rings.get_mut(2 * index + 1)
        {
            self.transmit(index, ring)?;
        }
        if ready.readable
            && let Some(ring) = rings.get_mut(2 * (index % self.active()))
        {
            self.receive(index, ring)?;
        }
        Ok(())
    }

    fn poll_limit(&self) -> Duration {
        self.poll
    }

    fn looks_at_backends(&self) -> bool {
        true
    }

    fn wake_at(&self) -> Option<Instant> {
        let waits = self
            .pairs
            .iter()
            .flat_map(|pair| [pair.rx_wait, pair.tx_wait]);
        waits.flatten().min()
    }

    fn after_turns(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        if self.rx_limit.is_off() && self.tx_limit.is_off() {
            return Ok(());
        }
        let now = Instant::now();
        let over = |wait: &mut Option<Instant>| wait.take_if(|at| *at <= now).is_some();
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            pair.receiving |= over(&mut pair.rx_wait);
            if over(&mut pair.tx_wait)
                && let Some(ring) = rings.get_mut(2 * index + 1)
            {
                ring.want_turn();
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.accepted = Features::default();
        self.told = Told::new(self.mac);
        self.config.announced();
        self.enabled = 0;
        self.unkept = true;
        for pair in &mut self.pairs {
            pair.receiver.reset();
            pair.receiving = false;
            pair.full = false;
            pair.rx_wait = None;
            pair.tx_wait = None;
        }
        if let Err(fault) = self.set_offloads() {
            ipc::guest_log!(error, "{fault}: {}", fault.source);
        }
    }
}
