//! # What the benches with a front end of their own share
//!
//! **Job.** Reads their command lines, takes the turns of who is measured, and tells the load. **Who is not trusted.** Nobody: these
//! are tools for developers, and a wrong line ends them with their usage. **Why this way.** Figures of three benches can be compared
//! only if they are taken alike.

use std::str::FromStr;

/// A bench's command line, word by word.
#[derive(Debug)]
pub struct Words {
    words: std::vec::IntoIter<String>,
    option: String,
    usage: &'static str,
}

impl Words {
    /// This program's. `usage` is shown when it is wrong.
    #[must_use]
    pub fn of_program(usage: &'static str) -> Self {
        // The one that is left out is cargo's own.
        let words = std::env::args().skip(1).filter(|word| word != "--bench");
        Self::new(words.collect(), usage)
    }

    fn new(words: Vec<String>, usage: &'static str) -> Self {
        Self {
            words: words.into_iter(),
            option: String::new(),
            usage,
        }
    }

    /// The next option; what is asked for afterwards is its value.
    pub fn option(&mut self) -> Option<String> {
        self.option = self.words.next()?;
        Some(self.option.clone())
    }

    /// The option's value.
    ///
    /// # Panics
    /// Without one.
    pub fn value(&mut self) -> String {
        self.words
            .next()
            .unwrap_or_else(|| self.wrong("needs a value"))
    }

    /// Parts of the option's value between commas.
    ///
    /// # Panics
    /// Without one.
    pub fn texts(&mut self) -> Vec<String> {
        self.value().split(',').map(str::to_owned).collect()
    }

    /// The option's value as a number of at least `least`.
    ///
    /// # Panics
    /// When it is something else.
    pub fn number<T: Copy + FromStr + PartialOrd + std::fmt::Display>(&mut self, least: T) -> T {
        let value = self.value();
        match value.parse() {
            Ok(number) if number >= least => number,
            _ => self.wrong(&format!("{value}: is a number of at least {least}")),
        }
    }

    /// Ends the program for an option that is wrong.
    ///
    /// # Panics
    /// Always.
    pub fn wrong(&self, why: &str) -> ! {
        panic!("{} {why}\n{}", self.option, self.usage)
    }
}

/// Whether `name` has one of `texts`, or there are none.
#[must_use]
pub fn is_wanted(texts: &[String], name: &str) -> bool {
    texts.is_empty() || texts.iter().any(|text| name.contains(text))
}

/// One turn of each party in the round of this number; samples stand in the parties' order.
///
/// Whoever comes first finds the host's caches as the turn before left them, so each is first in turn.
pub fn round<P, S: Default>(
    parties: &mut [P],
    number: usize,
    mut turn: impl FnMut(&mut P) -> S,
) -> Vec<S> {
    let mut samples: Vec<S> = parties.iter().map(|_| S::default()).collect();
    for at in 0..parties.len() {
        let at = (number + at) % parties.len();
        samples[at] = turn(&mut parties[at]);
    }
    samples
}

/// The load averages of the last 1, 5 and 15 minutes.
#[must_use]
pub fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Words {
        Words::new(line.split(' ').map(str::to_owned).collect(), "USAGE")
    }

    #[test]
    fn a_line_is_read_word_by_word() {
        let mut line = words("--list --rounds 0 --only a,b");
        assert_eq!(line.option().as_deref(), Some("--list"));
        assert_eq!(line.option().as_deref(), Some("--rounds"));
        assert_eq!(line.number(0_usize), 0);
        assert_eq!(line.option().as_deref(), Some("--only"));
        assert_eq!(line.texts(), ["a", "b"]);
        assert_eq!(line.option(), None);
    }

    #[test]
    #[should_panic = "--rounds 0: is a number of at least 1\nUSAGE"]
    fn a_number_has_its_least() {
        let mut line = words("--rounds 0");
        line.option();
        line.number(1_u64);
    }

    #[test]
    #[should_panic = "--dir needs a value\nUSAGE"]
    fn a_value_is_there() {
        let mut line = words("--dir");
        line.option();
        line.value();
    }

    #[test]
    fn each_is_first_in_turn() {
        let mut order = Vec::new();
        for number in 0..2 {
            let mut parties = ['a', 'b'];
            let samples = round(&mut parties, number, |party| {
                order.push(*party);
                *party
            });
            assert_eq!(samples, ['a', 'b']);
        }
        assert_eq!(order, ['a', 'b', 'b', 'a']);
        assert!(is_wanted(&[], "x") && is_wanted(&["b".into()], "abc"));
        assert!(!is_wanted(&["d".into()], "abc"));
    }
}
