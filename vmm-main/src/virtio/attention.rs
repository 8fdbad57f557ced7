//! A device process that has to be ended before the guest goes on.
//!
//! **Job.** A vCPU thread that resets a device learns that the device process does not give its queues back. Only the main
//! loop can have a process ended (it asks the broker), so the vCPU tells it here and waits until that is done.
//!
//! **Who is not trusted**: the device process, which may hang or lie about having stopped.
//!
//! **Why this way.** The guest reuses a queue's memory as soon as its reset is over, and a driver for virtio-mmio does not
//! wait for the status to read as zero. So the write itself must last until the old process cannot touch memory any more.
//! The wait has a limit, because the main loop may be waiting for this very vCPU to pause; the guest then stands still after
//! the write as well, and the main loop ends the process before it lets the guest run again.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipc::limits::DEVICE_END_MS;
use vmm_sys_util::eventfd::EventFd;

/// What is known of the process that may hold queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    /// Nobody complains.
    Fine,
    /// It has to be ended.
    Unwanted,
    /// It is gone, or has never been given a queue.
    Gone,
}

/// One device's line from its transport to the main loop.
#[derive(Debug)]
pub struct Attention {
    event: EventFd,
    process: Mutex<Process>,
    changed: Condvar,
}

impl Attention {
    pub(super) fn new(event: EventFd) -> Self {
        Self {
            event,
            process: Mutex::new(Process::Gone),
            changed: Condvar::new(),
        }
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        // A panic aborts the process, so a poisoned lock cannot be seen.
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when the process may have to be ended; then call [`Attention::take`].
    pub const fn event(&self) -> &EventFd {
        &self.event
    }

    /// Main loop: quiets the event; whether the process has to be ended.
    pub fn take(&self) -> bool {
        let _ = self.event.read();
        *self.process() == Process::Unwanted
    }

    /// Main loop: the process is reaped. Comes before the transport is locked, since its owner may be waiting for this.
    pub fn ended(&self) {
        *self.process() = Process::Gone;
        self.changed.notify_all();
    }

    /// Transport: a process is about to get queues.
    pub(super) fn serves(&self) {
        *self.process() = Process::Fine;
    }

    /// Transport: has the process ended, if there is one.
    pub(super) fn unwanted(&self) {
        let mut process = self.process();
        if *process == Process::Fine {
            *process = Process::Unwanted;
            // Fails only when it is readable anyway.
            let _ = self.event.write(1);
        }
    }

    /// Transport: has the main loop look at the device, whose process is none the worse.
    pub(super) fn look(&self) {
        // Fails only when it is readable anyway.
        let _ = self.event.write(1);
    }

    /// vCPU: waits until the unwanted process is gone; `false` if that took too long.
    pub(super) fn wait(&self) -> bool {
        let limit = Duration::from_millis(DEVICE_END_MS);
        let waited = self
            .changed
            .wait_timeout_while(self.process(), limit, |process| {
                *process == Process::Unwanted
            });
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn attention() -> Attention {
        Attention::new(EventFd::new(EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn nobody_waits_for_a_process_that_is_not_there() {
        let attention = attention();
        attention.unwanted();
        assert!(!attention.take());
        assert!(attention.wait());
        attention.serves();
        assert!(attention.wait());
    }

    #[test]
    fn who_waits_goes_on_when_the_process_is_gone() {
        let attention = Arc::new(attention());
        attention.serves();
        attention.unwanted();
        let vcpu = std::thread::spawn({
            let attention = attention.clone();
            move || attention.wait()
        });
        assert!(attention.take());
        attention.ended();
        assert!(vcpu.join().unwrap());
        assert!(!attention.take());
    }

    #[test]
    fn the_wait_has_a_limit() {
        let attention = attention();
        attention.serves();
        attention.unwanted();
        assert!(!attention.wait());
        assert!(attention.take(), "the main loop still hears of it");
    }
}
