//! A limit on requests a second.
//!
//! **Job.** Says whether one more request may start now, and if not, when. **Who is not trusted.** The guest, which asks as
//! fast as it can. **Why this way.** One number is kept: the time at which the requests so far would all be done at exactly the limit's
//! pace. The average is exact however late a timer comes, and a guest that paused may catch up by [`BURST`], no more.

use std::time::{Duration, Instant};

/// What a guest may catch up: the requests of this time at once.
const BURST: Duration = Duration::from_millis(100);

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// Between two requests at the limit's pace.
    pace: Duration,
    /// When the requests so far are paid for.
    paid: Instant,
}

impl Throttle {
    /// At most `iops` requests a second; `None` if that is 0, which is no limit.
    pub(crate) fn new(iops: u32) -> Option<Self> {
        Some(Self {
            pace: Duration::from_secs(1).checked_div(iops)?,
            paid: Instant::now(),
        })
    }

    /// Takes the right to one request; if there is none, when there is.
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        // An idle guest saves up no more than a burst. A request may start that much before its time, so a late timer costs nothing.
        let paid = self.paid.max(now);
        let free = paid.checked_sub(BURST).unwrap_or(now);
        if free > now {
            return Err(free);
        }
        self.paid = paid + self.pace;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that start within `time`, asked for every `every`.
    fn started(throttle: &mut Throttle, time: Duration, every: Duration) -> u32 {
        let start = throttle.paid;
        let mut now = start;
        let mut count = 0;
        while now < start + time {
            while throttle.take(now).is_ok() {
                count += 1;
            }
            now += every;
        }
        count
    }

    #[test]
    fn the_average_is_exact_however_late_the_timer_is() {
        for iops in [1, 7, 200, 9_999, 1_000_000] {
            for every in [1, 10, 90] {
                let mut throttle = Throttle::new(iops).unwrap();
                let time = Duration::from_secs(20);
                let count = started(&mut throttle, time, Duration::from_millis(every));
                let wanted = f64::from(iops) * 20.0;
                let burst = (f64::from(iops) * 0.1).max(1.0);
                assert!(
                    f64::from(count) >= wanted * 0.98 - burst
                        && f64::from(count) <= wanted * 1.001 + burst,
                    "{iops} a second, timer {every} ms: {count} for {wanted}"
                );
            }
        }
        assert!(Throttle::new(0).is_none());
    }

    #[test]
    fn a_guest_that_paused_gets_one_burst() {
        let mut throttle = Throttle::new(100).unwrap();
        let now = throttle.paid + Duration::from_secs(60);
        let mut count = 0;
        let free = loop {
            match throttle.take(now) {
                Ok(()) => count += 1,
                Err(free) => break free,
            }
        };
        assert_eq!(count, 11, "the burst, and the one that is due");
        assert!(free > now && free <= now + Duration::from_millis(10));
    }
}
