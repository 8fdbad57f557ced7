//! How fast one client's commands are taken.
//!
//! **Job.** Main answers most commands, and main is also who takes care of the guest: a client that asks without end must not
//! get all of its time. **Who is not trusted.** Clients. **Why this way.** A client that is too fast waits; nothing of what it
//! sent is refused or lost, so no client has to know. What a manager asks when it connects is far below what is free: libvirt's
//! longest probe is a few hundred commands.

use std::time::{Duration, Instant};

use ipc::limits::{QMP_COMMANDS_AT_ONCE, QMP_COMMANDS_PER_SECOND};

/// One client's account.
#[derive(Debug)]
pub(super) struct Pace {
    /// Commands that are free at `since`.
    left: u32,
    since: Instant,
}

impl Pace {
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            left: QMP_COMMANDS_AT_ONCE,
            since: now,
        }
    }

    /// Pays for one command. If nothing is left, the next one has to wait until then.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let each = Duration::from_secs(1) / QMP_COMMANDS_PER_SECOND;
        let earned = now.saturating_duration_since(self.since).as_nanos() / each.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(QMP_COMMANDS_AT_ONCE);
            // What is not a whole command yet stays in the account.
            self.since += each.saturating_mul(earned);
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            return Err(self.since + each);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_commands_are_free_and_later_ones_come_at_their_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for _ in 1..QMP_COMMANDS_AT_ONCE {
            assert_eq!(pace.take(start), Ok(()));
        }
        let each = Duration::from_secs(1) / QMP_COMMANDS_PER_SECOND;
        assert_eq!(pace.take(start), Err(start + each));
        assert_eq!(pace.take(start + each), Err(start + each * 2));
        // Three and a half later, three; the half is not lost.
        let later = start + each * 9 / 2;
        for _ in 1..3 {
            assert_eq!(pace.take(later), Ok(()));
        }
        assert_eq!(pace.take(later), Err(start + each * 5));
        // A pause brings back what is free, and no more.
        let much_later = later + Duration::from_secs(1_000_000);
        for _ in 1..QMP_COMMANDS_AT_ONCE {
            assert_eq!(pace.take(much_later), Ok(()));
        }
        assert!(pace.take(much_later).is_err());
    }
}
