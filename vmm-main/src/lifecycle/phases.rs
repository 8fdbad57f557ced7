//! Where start-up time goes.
//!
//! **Job.** A time stamp at each step of the start, told as a table at log level trace.
//! **Why this way.** Taking a time stamp costs some twenty nanoseconds, so it is always done; writing the table is not.

use std::time::Instant;

use ipc::log::trace;

/// Time stamps of the start, in order.
#[derive(Debug)]
pub(super) struct Phases {
    begin: Instant,
    steps: Vec<(&'static str, Instant)>,
}

impl Phases {
    /// Starts counting.
    pub(super) fn begin() -> Self {
        Self {
            begin: Instant::now(),
            steps: Vec::with_capacity(16),
        }
    }

    /// `step` is done.
    pub(super) fn done(&mut self, step: &'static str) {
        self.steps.push((step, Instant::now()));
    }

    /// Writes the table to the log.
    pub(super) fn tell(&self) {
        let mut last = self.begin;
        for (step, at) in &self.steps {
            trace!("start-up: {:>7} us  {step}", (*at - last).as_micros());
            last = *at;
        }
        trace!(
            "start-up: {:>7} us  in all",
            (last - self.begin).as_micros()
        );
    }
}
