//! # What the benches with a front end of their own share
//!
//! **Job.** Reads their command lines, takes the turns of who is measured, and tells the load. **Who is not trusted.** Nobody: these
//! are tools for developers, and a wrong line ends them with what is wrong, and status 2. **Why this way.** Figures of three benches can be compared
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
    /// This program's. `usage` is what `--help` shows.
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

    /// The option's value. Without one the program ends.
    pub fn value(&mut self) -> String {
        self.next_value().unwrap_or_else(|why| self.wrong(&why))
    }

    /// Parts of the option's value between commas. Without one the program ends.
    pub fn texts(&mut self) -> Vec<String> {
        self.value().split(',').map(str::to_owned).collect()
    }

    /// The option's value as a number of at least `least`. When it is something else the program ends.
    pub fn number<T: Copy + FromStr + PartialOrd + std::fmt::Display>(&mut self, least: T) -> T {
        self.next_number(least)
            .unwrap_or_else(|why| self.wrong(&why))
    }

    /// Ends the program for an option that is wrong.
    #[allow(clippy::disallowed_methods)] // nothing is there yet that would have to be given back
    pub fn wrong(&self, why: &str) -> ! {
        eprintln!("{}", self.error(why));
        std::process::exit(2)
    }

    fn error(&self, why: &str) -> String {
        // The first line of a usage says whose options follow.
        let bench = self.usage.lines().next().unwrap_or_default();
        let bench = bench
            .trim_start_matches("options of ")
            .trim_end_matches(':');
        format!(
            "xtask {bench}: {} {why} (--help tells all options)",
            self.option
        )
    }

    fn next_value(&mut self) -> Result<String, String> {
        self.words.next().ok_or_else(|| "needs a value".to_owned())
    }

    fn next_number<T: Copy + FromStr + PartialOrd + std::fmt::Display>(
        &mut self,
        least: T,
    ) -> Result<T, String> {
        let value = self.next_value()?;
        match value.parse() {
            Ok(number) if number >= least => Ok(number),
            _ => Err(format!(
                "{value}: not valid; allowed: a number from {least} on"
            )),
        }
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
        Words::new(
            line.split(' ').map(str::to_owned).collect(),
            "options of bench x:\n  --rounds N",
        )
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
    fn what_is_wrong_is_one_line_with_option_value_and_what_is_allowed() {
        for (line, wanted) in [
            (
                "--rounds 0",
                "xtask bench x: --rounds 0: not valid; allowed: a number from 1 on (--help tells all options)",
            ),
            (
                "--rounds many",
                "xtask bench x: --rounds many: not valid; allowed: a number from 1 on (--help tells all options)",
            ),
            (
                "--rounds",
                "xtask bench x: --rounds needs a value (--help tells all options)",
            ),
        ] {
            let mut line = words(line);
            line.option();
            let why = line.next_number(1_u64).unwrap_err();
            assert_eq!(line.error(&why), wanted);
        }
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
