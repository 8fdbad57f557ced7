//! # Numbers by chance
//!
//! **Job.** A row of numbers that a seed determines: what a test does by chance can be done again. **Who is not trusted.** Nobody.
//! **Why this way.** The seed is printed and the row is the same everywhere and for ever, which no crate promises.

/// xorshift (Marsaglia 2003).
#[derive(Debug)]
pub struct Chance(u64);

impl Chance {
    /// The row of this seed, which is not 0.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `end`.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// An index of something that has so many.
    pub const fn index(&mut self, count: usize) -> usize {
        // Not above `count`.
        self.below(count as u64) as usize
    }
}
