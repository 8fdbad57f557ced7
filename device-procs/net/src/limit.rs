//! How many packets and bytes may pass in a time.
//!
//! **Job.** Two buckets for a direction, of packets and of bytes, which fill up at a steady rate and are full at first; all queues
//! of a card share them.
//! **Who is not trusted.** The guest and the network: what is over the limit waits, in the driver's queue or in the tap's, and the
//! kernel drops what the tap's has no room for.
//! **Why this way.** A bucket is kept as the moment when all that passed is paid for, so that nothing is counted down by a timer and the
//! average is exact however late one is. A packet passes when anything is left, and is paid for as a whole, so that no
//! bucket is too small for it.

use std::time::{Duration, Instant};

use ipc::spec::net::{Bucket, Limit};

/// Nanoseconds in a second.
const SECOND: u128 = 1_000_000_000;

#[derive(Debug, Clone, Copy)]
struct Meter {
    rate: u64,
    /// What a full bucket pays for.
    burst: Duration,
    /// When all so far is paid for.
    paid: Instant,
}

impl Meter {
    fn new(bucket: Bucket, now: Instant) -> Option<Self> {
        (bucket.rate > 0).then(|| Self {
            rate: bucket.rate,
            burst: time(bucket.burst, bucket.rate),
            paid: now,
        })
    }

    /// When there is something in the bucket, if there is nothing now.
    fn wait(&self, now: Instant) -> Option<Instant> {
        let free = self.paid.checked_sub(self.burst)?;
        (free >= now).then_some(free)
    }

    fn take(&mut self, count: u64, now: Instant) {
        self.paid = self.paid.max(now) + time(count, self.rate);
    }
}

/// How long `count` takes at `rate` a second.
fn time(count: u64, rate: u64) -> Duration {
    let nanoseconds = u128::from(count) * SECOND / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

/// The limits of one direction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limiter([Option<Meter>; 2]);

impl Limiter {
    pub(crate) fn new(limit: Limit, now: Instant) -> Self {
        Self([Meter::new(limit.packets, now), Meter::new(limit.bytes, now)])
    }

    /// Whether nothing is limited: then nobody needs to know the time.
    pub(crate) fn is_off(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// When a packet may pass, if none may now.
    pub(crate) fn wait(&self, now: Instant) -> Option<Instant> {
        self.0.iter().flatten().filter_map(|m| m.wait(now)).max()
    }

    /// A packet of `bytes` passes.
    pub(crate) fn take(&mut self, bytes: usize, now: Instant) {
        for (meter, count) in self.0.iter_mut().zip([1, bytes as u64]) {
            if let Some(meter) = meter {
                meter.take(count, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(packets: (u64, u64), bytes: (u64, u64)) -> Limit {
        let bucket = |(rate, burst)| Bucket { rate, burst };
        Limit {
            packets: bucket(packets),
            bytes: bucket(bytes),
        }
    }

    /// Packets of `len` that pass within `time`, tried for every `every`.
    fn passed(
        limiter: &mut Limiter,
        start: Instant,
        len: usize,
        time: Duration,
        every: Duration,
    ) -> u64 {
        let (mut now, mut count) = (start, 0);
        while now < start + time {
            while limiter.wait(now).is_none() {
                limiter.take(len, now);
                count += 1;
                assert!(count < 10_000_000, "not limited");
            }
            now += every;
        }
        count
    }

    #[test]
    fn the_average_is_exact_and_the_burst_comes_on_top() {
        for (rate, burst) in [(10, 1), (1000, 100), (1000, 5000), (100_000, 10_000)] {
            for every in [1, 10, 90] {
                let start = Instant::now();
                let mut limiter = Limiter::new(limit((rate, burst), (0, 0)), start);
                let every = Duration::from_millis(every);
                let count = passed(&mut limiter, start, 1500, Duration::from_secs(20), every);
                // What fills the bucket while nobody looks is lost when it runs over.
                let lost = (rate as f64 * every.as_secs_f64() - burst as f64).max(0.0)
                    / every.as_secs_f64()
                    * 20.0;
                let wanted = (rate * 20 + burst) as f64 - lost;
                let late = rate as f64 * every.as_secs_f64();
                assert!(
                    (count as f64) >= wanted * 0.99 - late - 2.0
                        && count as f64 <= wanted * 1.01 + 2.0,
                    "{rate} and {burst}, every {every:?}: {count} for {wanted}"
                );
            }
        }
    }

    #[test]
    fn the_narrower_limit_holds_and_a_packet_larger_than_the_bucket_passes() {
        let start = Instant::now();
        let mut limiter = Limiter::new(limit((1000, 10), (100_000, 100)), start);
        assert!(limiter.wait(start).is_none());
        limiter.take(60_000, start);
        let free = limiter.wait(start).unwrap();
        // 60,000 bytes at 100,000 a second, less what the bucket has.
        assert_eq!(free - start, Duration::from_millis(599));
        assert!(limiter.wait(free + Duration::from_nanos(1)).is_none());
    }

    #[test]
    fn zero_is_no_limit() {
        let limiter = Limiter::new(Limit::default(), Instant::now());
        assert!(limiter.is_off() && limiter.wait(Instant::now()).is_none());
    }
}
