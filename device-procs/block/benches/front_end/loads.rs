//! # The loads
//!
//! **Job.** Names and parameters. **Who is not trusted.** Nobody.
//! **Why this way.** A short list that shows each regime is what one looks at; `--all` is every combination.

/// Bytes in flight at most: what a load needs of the front end's memory.
pub(crate) const IN_FLIGHT: u64 = 32 << 20;
/// Queues of each back end.
pub(crate) const QUEUES: usize = 4;
/// Requests at a time in one queue at most.
pub(crate) const DEPTH: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) write: bool,
    pub(crate) random: bool,
    /// Bytes of a request.
    pub(crate) block: u64,
    /// Requests at a time in each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
}

impl Load {
    pub(crate) fn name(&self) -> String {
        format!(
            "{}{} {}k d{} q{}",
            if self.random { "rand" } else { "" },
            if self.write { "write" } else { "read" },
            self.block >> 10,
            self.depth,
            self.queues
        )
    }

    fn fits(&self) -> bool {
        self.block * (self.depth * self.queues) as u64 <= IN_FLIGHT
    }
}

const fn load(write: bool, random: bool, kib: u64, depth: usize, queues: usize) -> Load {
    Load {
        write,
        random,
        block: kib << 10,
        depth,
        queues,
    }
}

const SHORT: &[Load] = &[
    load(false, true, 4, 1, 1),
    load(false, true, 4, 8, 1),
    load(false, true, 4, 32, 1),
    load(false, true, 4, 128, 1),
    load(false, true, 4, 32, 4),
    load(true, true, 4, 1, 1),
    load(true, true, 4, 32, 1),
    load(true, false, 4, 8, 1),
    load(true, false, 4, 32, 1),
    load(true, false, 4, 128, 1),
    load(false, false, 64, 8, 1),
    load(true, false, 64, 8, 1),
    load(false, false, 1024, 1, 1),
    load(false, false, 1024, 8, 1),
    load(true, false, 1024, 8, 1),
];

/// The short list, or every combination that fits into memory.
pub(crate) fn all(every: bool) -> Vec<Load> {
    if !every {
        return SHORT.to_vec();
    }
    let mut all = Vec::new();
    for write in [false, true] {
        for random in [true, false] {
            for kib in [4, 64, 1024] {
                for depth in [1, 8, 32, DEPTH] {
                    for queues in [1, 2, QUEUES] {
                        all.push(load(write, random, kib, depth, queues));
                    }
                }
            }
        }
    }
    all.retain(Load::fits);
    all
}
