//! How often the process that serves may die.
//!
//! **Job.** Says of each death whether another process may follow: five within 10 seconds after faults, as with
//! `max-restarts=`, more if somebody on the host kills it again and again, none after the system call filter.
//! **Who is not trusted.** The process that died: its guest may bring the fault about with every request that is done again.
//! **Why this way.** One rule for the back ends that stand alone, disk, card and folder.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ipc::limits::{DEFAULT_RESTARTS, MAX_RESTARTS, RESTART_WINDOW_MS};
use nix::sys::signal::Signal;

/// When serving processes died by a signal, the last ones only.
#[derive(Debug, Default)]
pub struct Deaths(VecDeque<Instant>);

impl Deaths {
    /// Whether another process may go on after one that died by `signal` at `now`.
    pub fn allow_another(&mut self, signal: Signal, now: Instant) -> bool {
        let most = match signal {
            // By its filter: it did what it must never do.
            Signal::SIGSYS => return false,
            // By someone outside of it.
            Signal::SIGKILL => MAX_RESTARTS,
            _ => DEFAULT_RESTARTS,
        };
        let window = Duration::from_millis(RESTART_WINDOW_MS);
        while self
            .0
            .front()
            .is_some_and(|then| now.saturating_duration_since(*then) > window)
        {
            self.0.pop_front();
        }
        self.0.push_back(now);
        self.0.len() <= usize::from(most)
    }

    /// How many of the last 10 seconds there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The manual pages: the sixth death by a fault within 10 seconds is the end, and the first by the filter.
    #[test]
    fn the_sixth_fault_in_ten_seconds_and_the_first_forbidden_call_are_the_end() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut deaths = Deaths::default();
        for second in 0..5 {
            assert!(deaths.allow_another(Signal::SIGSEGV, at(second)));
        }
        assert!(!deaths.allow_another(Signal::SIGABRT, at(5)));
        assert_eq!(deaths.count(), 6);
        // Those of long ago do not count.
        assert!(!deaths.allow_another(Signal::SIGBUS, at(10)));
        assert!(deaths.allow_another(Signal::SIGBUS, at(21)));

        let mut deaths = Deaths::default();
        for _ in 0..MAX_RESTARTS {
            assert!(deaths.allow_another(Signal::SIGKILL, at(0)));
        }
        assert!(!deaths.allow_another(Signal::SIGKILL, at(0)));

        assert!(!Deaths::default().allow_another(Signal::SIGSYS, at(0)));
    }
}
