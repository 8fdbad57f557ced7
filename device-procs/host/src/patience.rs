//! How long a device process looks for more work before it sleeps.
//!
//! **Job.** A time that grows when a sleep was so short that looking a little longer would have saved it, and shrinks when it
//! was long. **Who is not trusted.** The guest sets the pace; all it gets is a process that is awake at most for the limit
//! after each request. **Why this way.** A sleep and the wake-up from it cost several microseconds on both sides, which is longer than a
//! small request takes; a disk that is idle, or slow, must cost nothing. On a host whose processors are all wanted, looking costs more
//! than it saves: the processor that is looked on is the one that the guest, or somebody else, would answer on, and who takes what is
//! not needed is made to wait for all of the next one's turn. That shows in looks that last longer than they can; and, if the guest waits
//! behind this very process for the processor, in looks that find nothing, though what they are for comes as soon as they have ended.

use std::time::Duration;

/// The first step up from not looking at all.
const FIRST: Duration = Duration::from_micros(4);

/// A look that lasts so much longer than the limit was interrupted by somebody else's turn.
const INTERRUPTED: Duration = Duration::from_micros(100);

/// What a look that finds something saves: a sleep, and the wake-up from it on both sides.
const SAVED: Duration = Duration::from_micros(20);

/// Of the longest looks, how many may be lost before that is as bad as an interruption. Growing to them takes two.
const LOSSES: u32 = 5;

/// Sleeps without a look before them after such trouble, which happens on any host once in a while.
const ONCE: u32 = 64;

/// The same after trouble that came soon after other: for a guest that is always busy about a hundred milliseconds, which is some turns
/// of the scheduler, and after many in a row one or two seconds.
const AGAIN: (u32, u32) = (4096, 65_536);

/// What is multiplied with each time, and divided by after [`CALM`] looks that were worth it.
const STEP: u32 = 4;

/// A turn of the scheduler has some hundred looks.
const CALM: u32 = 1024;

/// See the module's page.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Patience {
    now: Duration,
    /// Sleeps that are still to come without a look, and those after the last trouble.
    wary: u32,
    lesson: u32,
    /// Looks since then that found something, up to [`CALM`].
    calm: u32,
    /// The time of looks that were in vain and had a short sleep behind them, less what others have saved.
    lost: Duration,
}

impl Patience {
    /// To look for, at most `limit`.
    pub(crate) fn window(&self, limit: Duration) -> Duration {
        self.now.min(limit)
    }

    /// A look took so long, and `found` something or not.
    pub(crate) fn looked(&mut self, time: Duration, found: bool, limit: Duration) {
        if time > limit + INTERRUPTED {
            self.stop();
        } else if found {
            self.lost = self.lost.saturating_sub(SAVED);
            self.calm += 1;
            if self.calm > CALM {
                self.calm = 0;
                self.lesson /= STEP;
            }
        }
    }

    /// Looking does not pay for a while, and for longer each time.
    fn stop(&mut self) {
        self.lesson = match self.lesson {
            0 => ONCE,
            lesson => (lesson * STEP).clamp(AGAIN.0, AGAIN.1),
        };
        self.wary = self.lesson;
        self.now = Duration::ZERO;
        self.lost = Duration::ZERO;
        self.calm = 0;
    }

    /// The process slept for so long, after it had looked for the window in vain.
    pub(crate) fn slept(&mut self, time: Duration, limit: Duration) {
        if self.wary > 0 {
            self.wary -= 1;
        } else if time <= limit {
            self.lost += self.window(limit);
            self.now = (self.now * 2).clamp(FIRST, LONGEST);
            if self.lost > limit * LOSSES {
                self.stop();
            }
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
        while patience.window(limit) < limit {
            patience.looked(patience.window(limit), false, limit);
            patience.slept(Duration::from_micros(10), limit);
        }
        for _ in 0..20 {
            patience.slept(Duration::from_millis(10), limit);
        }
        assert_eq!(patience.window(limit), Duration::ZERO);
    }

    #[test]
    fn whoever_is_interrupted_while_it_looks_stops_looking() {
        let limit = Duration::from_micros(50);
        let short = Duration::from_micros(10);
        let long = limit + 2 * INTERRUPTED;
        let mut patience = Patience::default();
        // How many sleeps it takes until it looks again.
        let sleeps = |patience: &mut Patience| {
            let mut count = 0;
            while patience.window(limit).is_zero() {
                patience.slept(short, limit);
                count += 1;
            }
            count
        };
        assert_eq!(sleeps(&mut patience), 1);
        for expected in [64, 4096, 16_384, 65_536] {
            patience.looked(long, true, limit);
            assert_eq!(sleeps(&mut patience), expected + 1);
        }
        for _ in 0..20 {
            patience.looked(long, false, limit);
        }
        assert_eq!(sleeps(&mut patience), 65_537, "it tries again in the end");
        // Later, it happens once in a while only.
        for _ in 0..20 * CALM {
            patience.looked(limit, true, limit);
        }
        patience.looked(long, true, limit);
        assert_eq!(sleeps(&mut patience), 65);
    }

    #[test]
    fn whoever_looks_in_vain_until_it_sleeps_stops_looking() {
        let short = Duration::from_micros(10);
        // Looks until it stops, of which `found` per 100 find something; `None` if it goes on.
        let looks = |patience: &mut Patience, found: u32, limit| {
            (0..2000).find(|look| {
                let window = patience.window(limit);
                let found = look % 100 < found;
                patience.looked(window, found, limit);
                if !found {
                    patience.slept(short, limit);
                }
                patience.wary > 0
            })
        };
        for limit in [20, 50, 200].map(Duration::from_micros) {
            // Each time it gets to its limit, and looks a few times more.
            let mut patience = Patience::default();
            for wait in [64, 4096] {
                let count = looks(&mut patience, 0, limit);
                assert!(
                    count.is_some_and(|count| (6..=12).contains(&count)),
                    "{count:?} of {limit:?}"
                );
                for _ in 0..wait {
                    assert_eq!(patience.window(limit), Duration::ZERO);
                    patience.slept(short, limit);
                }
                patience.slept(short, limit);
                assert_eq!(patience.window(limit), FIRST, "it tries again");
            }
        }
        // One that is worth it most of the time goes on.
        let limit = Duration::from_micros(50);
        assert_eq!(looks(&mut Patience::default(), 97, limit), None);
        assert!(looks(&mut Patience::default(), 50, limit).is_some());
    }
}
