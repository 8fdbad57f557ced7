//! How long a device process looks for more work before it sleeps.
//!
//! **Job.** A time that grows when a sleep was so short that looking a little longer would have saved it, and shrinks when it
//! was long. **Who is not trusted.** The guest sets the pace; all it gets is a process that is awake at most for the limit
//! after each request. **Why this way.** A sleep and the wake-up from it cost several microseconds on both sides, which is longer than a
//! small request takes; a disk that is idle, or slow, must cost nothing.

use std::time::Duration;

/// The first step up from not looking at all.
const FIRST: Duration = Duration::from_micros(4);

/// See the module's page.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Patience {
    now: Duration,
}

impl Patience {
    /// To look for, at most `limit`.
    pub(crate) fn window(&self, limit: Duration) -> Duration {
        self.now.min(limit)
    }

    /// The process slept for so long, after it had looked for the window in vain.
    pub(crate) fn slept(&mut self, time: Duration, limit: Duration) {
        if time <= limit {
            self.now = (self.now * 2).clamp(FIRST, LONGEST);
        } else {
            // Two vain looks in a row and it is a quarter.
            self.now /= 2;
            if self.now < FIRST {
                self.now = Duration::ZERO;
            }
        }
    }
}

/// No limit of a device is above it.
pub(crate) const LONGEST: Duration = Duration::from_micros(ipc::limits::MAX_POLL_US as u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_make_it_longer_and_long_ones_shorter() {
        let limit = Duration::from_micros(50);
        let mut patience = Patience::default();
        assert_eq!(
            patience.window(limit),
            Duration::ZERO,
            "an idle device sleeps at once"
        );
        patience.slept(Duration::from_micros(10), limit);
        assert_eq!(patience.window(limit), FIRST);
        for _ in 0..20 {
            patience.slept(Duration::from_micros(10), limit);
        }
        assert_eq!(patience.window(limit), limit);
        for _ in 0..20 {
            patience.slept(Duration::from_millis(10), limit);
        }
        assert_eq!(patience.window(limit), Duration::ZERO);
    }
}
