//! How often a device's process may be replaced.
//!
//! **Job.** Counts restarts of the last while against the most that a device may have. **Who is not trusted**: processes that die as soon as they
//! start. **Why this way.** What is long ago counts no more, so that a device that fails once a day is never given up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ipc::limits::RESTART_WINDOW_MS;

/// Restarts that are left.
#[derive(Debug)]
pub(super) struct Budget {
    pub(super) most: usize,
    /// When the latest ones were, the oldest first.
    spent: VecDeque<Instant>,
}

impl Budget {
    pub(super) const fn new(most: u16) -> Self {
        Self {
            most: most as usize,
            spent: VecDeque::new(),
        }
    }

    /// Takes one, unless too many were taken in the last while.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let window = Duration::from_millis(RESTART_WINDOW_MS);
        while self
            .spent
            .front()
            .is_some_and(|&then| now.saturating_duration_since(then) >= window)
        {
            self.spent.pop_front();
        }
        let left = self.spent.len() < self.most;
        if left {
            self.spent.push_back(now);
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_comes_back_with_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut budget = Budget {
            most: 2,
            spent: VecDeque::new(),
        };
        assert!(budget.take(at(0)));
        assert!(budget.take(at(5_000)));
        assert!(!budget.take(at(9_999)));
        assert!(budget.take(at(10_000)), "the first one is forgotten");
        assert!(!budget.take(at(14_999)));
        let mut none = Budget {
            most: 0,
            spent: VecDeque::new(),
        };
        assert!(!none.take(start));
    }
}
