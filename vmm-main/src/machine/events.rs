//! What a machine reports to whoever runs it.
//!
//! Job: bring events from vCPU threads and devices to the main thread, with an eventfd to wait on.
//! Who is not trusted: the guest causes most events. Each one parks the vCPU that caused it, so there are never more
//! than one per vCPU under way.
//! Why this way: two vCPUs may ask for the same reset. Events carry the number of the reset they were sent after, and
//! those of an earlier life of the guest are dropped when they are received.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use vmm_sys_util::eventfd::EventFd;

use crate::kvm::RegisterDump;

/// Something the main thread must decide about. The guest is parked, or about to be, in each case.
#[derive(Debug)]
pub enum VmEvent {
    /// The guest powered off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The guest crashed its processor (or some kernel's way to reboot).
    TripleFault {
        /// Registers of the vCPU at that point. On AMD hosts KVM has put the vCPU into its reset state by then.
        registers: Box<RegisterDump>,
    },
    /// KVM could not continue.
    InternalError {
        /// KVM's `suberror`: 1 emulation failure, 2 simultaneous exceptions, 3 delivery, 4 unexpected exit.
        suberror: u32,
        /// The words that KVM adds.
        data: Vec<u64>,
        /// Registers of the vCPU at that point.
        registers: Box<RegisterDump>,
    },
    /// The processor refused to enter the guest.
    FailEntry {
        /// The processor's reason.
        reason: u64,
        /// Registers of the vCPU at that point.
        registers: Box<RegisterDump>,
    },
    /// The guest touched memory behind which the host has nothing; a vCPU stands before that access.
    MemoryFault {
        /// Number of the vCPU.
        vcpu: u32,
        /// What happened.
        message: String,
    },
    /// A vCPU cannot run for a reason on the host.
    VcpuError {
        /// Number of the vCPU.
        vcpu: u32,
        /// What happened.
        message: String,
    },
}

impl std::fmt::Display for VmEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shutdown => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest asked for a reset"),
            Self::TripleFault { registers } => write!(f, "triple fault in the guest\n{registers}"),
            Self::InternalError {
                suberror,
                data,
                registers,
            } => {
                write!(f, "KVM internal error {suberror}")?;
                if *suberror == 1 {
                    write!(f, " (emulation failure)")?;
                }
                write!(f, ", data")?;
                for word in data {
                    write!(f, " {word:#x}")?;
                }
                write!(f, "\n{registers}")
            }
            Self::FailEntry { reason, registers } => {
                write!(
                    f,
                    "the processor refused to enter the guest, reason {reason:#x}\n{registers}"
                )
            }
            Self::MemoryFault { vcpu, message } | Self::VcpuError { vcpu, message } => {
                write!(f, "vCPU {vcpu} cannot run: {message}")
            }
        }
    }
}

#[derive(Debug)]
struct Signal {
    event: EventFd,
    life: AtomicU32,
}

/// The sending side; clones send to the same receiver.
#[derive(Debug, Clone)]
pub struct EventSender {
    sender: mpsc::Sender<(u32, VmEvent)>,
    signal: Arc<Signal>,
}

/// The receiving side.
#[derive(Debug)]
pub struct EventReceiver {
    receiver: mpsc::Receiver<(u32, VmEvent)>,
    signal: Arc<Signal>,
}

/// A new pair.
///
/// # Errors
/// No eventfd could be made.
pub fn channel() -> std::io::Result<(EventSender, EventReceiver)> {
    let (sender, receiver) = mpsc::channel();
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let signal = Arc::new(Signal {
        event,
        life: AtomicU32::new(0),
    });
    Ok((
        EventSender {
            sender,
            signal: signal.clone(),
        },
        EventReceiver { receiver, signal },
    ))
}

impl EventSender {
    /// Sends an event. When nobody receives any more, it is lost, which is what a machine that is being taken down
    /// wants.
    pub fn send(&self, event: VmEvent) {
        let life = self.signal.life.load(Ordering::SeqCst);
        if self.sender.send((life, event)).is_ok() {
            // Fails only when the counter is about to overflow, and then it is readable already.
            let _ = self.signal.event.write(1);
        }
    }

    /// Makes all events sent so far void: the guest they came from is gone.
    pub(crate) fn start_new_life(&self) {
        self.signal.life.fetch_add(1, Ordering::SeqCst);
    }
}

impl EventReceiver {
    /// Readable when there may be events. Read it, then call [`Self::try_recv`] until `None`.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        &self.signal.event
    }

    /// The next event of the guest's present life.
    #[must_use]
    pub fn try_recv(&self) -> Option<VmEvent> {
        let present = self.signal.life.load(Ordering::SeqCst);
        self.receiver
            .try_iter()
            .find(|(life, _)| *life == present)
            .map(|(_, event)| event)
    }

    /// Like [`Self::recv`], but gives up at `deadline`. `None`: nothing came, or every sender is gone.
    #[must_use]
    pub fn recv_until(&self, deadline: std::time::Instant) -> Option<VmEvent> {
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let (life, event) = self.receiver.recv_timeout(left).ok()?;
            if life == self.signal.life.load(Ordering::SeqCst) {
                return Some(event);
            }
        }
    }

    /// Waits for the next event of the guest's present life. `None`: every sender is gone.
    #[must_use]
    pub fn recv(&self) -> Option<VmEvent> {
        loop {
            let (life, event) = self.receiver.recv().ok()?;
            if life == self.signal.life.load(Ordering::SeqCst) {
                return Some(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_arrive_and_wake() {
        let (sender, receiver) = channel().unwrap();
        assert!(receiver.event_fd().read().is_err());
        sender.send(VmEvent::Reset);
        assert_eq!(receiver.event_fd().read().unwrap(), 1);
        assert!(matches!(receiver.try_recv(), Some(VmEvent::Reset)));
        assert!(receiver.try_recv().is_none());
    }

    #[test]
    fn events_of_an_earlier_life_are_dropped() {
        let (sender, receiver) = channel().unwrap();
        sender.send(VmEvent::Reset);
        sender.send(VmEvent::Reset);
        assert!(matches!(receiver.try_recv(), Some(VmEvent::Reset)));
        sender.start_new_life();
        sender.send(VmEvent::Shutdown);
        assert!(matches!(receiver.try_recv(), Some(VmEvent::Shutdown)));
    }
}
