//! The device: queue pairs, the taps behind them, and who waits for whom.
//!
//! Queue 2k receives and 2k+1 transmits (virtio 1.3, 5.1.2). The kernel spreads packets over all queues of the tap, also when the
//! driver uses fewer pairs than there are; so tap queue i feeds receive queue i modulo the pairs in use.

use std::os::fd::BorrowedFd;

use device_host::{BackendFds, Device, DeviceFault, HostFault, Interest, Ring};
use ipc::limits::{MAX_NET_QUEUE_PAIRS, MAX_QUEUE_SIZE};
use ipc::spec::DeviceSpec;
use ipc::start::StartMessage;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;

use crate::backend::tap::TapQueue;
use crate::config_space::ConfigSpace;
use crate::control;
use crate::error::BuildError;
use crate::features::Features;
use crate::receive::{Receiver, Stopped};
use crate::transmit;

/// Smallest ring that a driver gets along with.
const MIN_QUEUE_SIZE: u16 = 4;

/// One tap queue and the state of both its directions.
#[derive(Debug)]
struct Pair {
    tap: TapQueue,
    receiver: Receiver,
    /// The driver has buffers, so a packet can be taken. Not before the driver's first.
    receiving: bool,
    /// Packets of the guest wait for room in the tap.
    full: bool,
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    pairs: Vec<Pair>,
    config: ConfigSpace,
    queue_size: u16,
    offered: Features,
    accepted: Features,
    /// Pairs that the driver uses.
    active: usize,
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
        if fds.len() != usize::from(pairs) {
            return Err(BuildError::Descriptors {
                pairs,
                fds: fds.len(),
            });
        }
        let mut list = Vec::with_capacity(usize::from(pairs));
        while let Some(fd) = fds.take() {
            list.push(Pair {
                tap: TapQueue::new(fd, list.len())?,
                receiver: Receiver::default(),
                receiving: false,
                full: false,
            });
        }
        let uso = list.first().is_some_and(|pair| pair.tap.has_uso());
        Ok(Self {
            config: ConfigSpace::new(spec.mac, pairs),
            queue_size: size,
            offered: Features::offered(pairs, uso),
            accepted: Features::default(),
            active: 1,
            copy: Vec::new(),
            pairs: list,
        })
    }

    /// Index of the control queue, if the driver knows one (5.1.2: after the pairs that the driver knows).
    fn control_queue(&self) -> usize {
        if self.accepted.has(VIRTIO_NET_F_MQ) {
            2 * self.pairs.len()
        } else {
            2
        }
    }

    /// Takes packets from tap queue `index` for `ring`.
    fn receive(&mut self, index: usize, ring: &mut Ring) -> Result<(), DeviceFault> {
        let features = self.accepted;
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        pair.receiving = false;
        let stopped = pair.receiver.process(ring, &pair.tap, features)?;
        pair.receiving = stopped == Stopped::Idle;
        Ok(())
    }

    fn transmit(&mut self, index: usize, ring: &mut Ring) -> Result<(), DeviceFault> {
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        pair.full = transmit::process(ring, &pair.tap, self.accepted, &mut self.copy)?;
        Ok(())
    }

    /// Sets the offloads of the tap, which all its queues share.
    fn set_offloads(&self) -> Result<(), HostFault> {
        match self.pairs.first() {
            Some(pair) => {
                device_host::tap::set_offloads(pair.tap.fd(), self.accepted.tap_offloads())
                    .map_err(HostFault::of("TUNSETOFFLOAD"))
            }
            None => Ok(()),
        }
    }
}

impl Device for Net {
    fn features(&self) -> u64 {
        self.offered.0
    }

    fn num_queues(&self) -> u16 {
        // At most 16 pairs.
        let pairs = self.pairs.len() as u16;
        2 * pairs + u16::from(pairs > 1)
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn accept(&mut self, features: u64) -> Result<(), HostFault> {
        self.accepted = Features(features);
        for pair in &mut self.pairs {
            // A packet that waits has the shape of the old set.
            pair.receiver.reset();
        }
        self.set_offloads()
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        self.config.read(offset, out);
    }

    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        let index = usize::from(ring.index());
        if index == self.control_queue() && self.pairs.len() > 1 {
            // At most 16 pairs.
            if let Some(pairs) = control::process(ring, self.pairs.len() as u16)? {
                self.active = usize::from(pairs);
                // Each tap queue feeds another ring now, whose buffers it has not looked at.
                for pair in &mut self.pairs {
                    pair.receiving = true;
                }
            }
            return Ok(());
        }
        let pair = index / 2;
        if index % 2 == 1 {
            return self.transmit(pair, ring);
        }
        if pair < self.active {
            for tap in (pair..self.pairs.len()).step_by(self.active) {
                self.receive(tap, ring)?;
            }
        }
        Ok(())
    }

    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        self.pairs.iter().map(|pair| pair.tap.fd()).collect()
    }

    fn interest(&self, index: usize) -> Interest {
        self.pairs
            .get(index)
            .map_or(Interest::NONE, |pair| Interest {
                readable: pair.receiving,
                writable: pair.full,
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
            && let Some(ring) = rings.get_mut(2 * (index % self.active))
        {
            self.receive(index, ring)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.accepted = Features::default();
        self.active = 1;
        for pair in &mut self.pairs {
            pair.receiver.reset();
            pair.receiving = false;
            pair.full = false;
        }
        if let Err(fault) = self.set_offloads() {
            ipc::guest_log!(error, "{fault}: {}", fault.source);
        }
    }
}
