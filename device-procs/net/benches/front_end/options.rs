//! # What to measure
//!
//! **Job.** The command line of the bench. **Who is not trusted.** Nobody. **Why this way.** Every option has a default with which
//! the figures that the README shows come out; `--quick` is for a look.

use std::time::Duration;

/// See [`USAGE`].
pub(crate) struct Options {
    /// Loads whose name has one of these; all if empty.
    pub(crate) only: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) slice: Duration,
    pub(crate) peers: bool,
    pub(crate) list: bool,
    pub(crate) help: bool,
}

pub(crate) const USAGE: &str = "\
options of bench net:
  --quick               a look: 3 rounds of 50 ms
  --only TEXT[,TEXT]    loads whose name has one of the texts
  --list                names of the loads
  --no-peers            without dpdk-testpmd
  --rounds N            turns of each back end with each load (default 11)
  --slice-ms N          length of a turn (default 200)";

impl Options {
    pub(crate) fn read() -> Self {
        let mut options = Self {
            only: Vec::new(),
            rounds: 11,
            slice: Duration::from_millis(200),
            peers: true,
            list: false,
            help: false,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .unwrap_or_else(|| panic!("{argument} needs a value\n{USAGE}"))
            };
            let number = |value: String| -> u64 {
                let number = value.parse().ok().filter(|n| *n > 0);
                number.unwrap_or_else(|| panic!("{value} is not a number above 0\n{USAGE}"))
            };
            match argument.as_str() {
                "--quick" => {
                    options.rounds = 3;
                    options.slice = Duration::from_millis(50);
                }
                "--only" => options.only.extend(value().split(',').map(str::to_owned)),
                "--list" => options.list = true,
                "--no-peers" => options.peers = false,
                "--rounds" => options.rounds = number(value()) as usize,
                "--slice-ms" => options.slice = Duration::from_millis(number(value())),
                "--help" => options.help = true,
                // cargo's own.
                "--bench" => {}
                _ => panic!("{argument} is not known\n{USAGE}"),
            }
        }
        options
    }
}
