//! # What to measure
//!
//! **Job.** The command line of the bench. **Who is not trusted.** Nobody. **Why this way.** Every option has a default with which
//! the figures that the README shows come out; `--quick` is for a look.

use std::path::PathBuf;
use std::time::Duration;

use tests::bench::Words;

/// See [`USAGE`].
pub(crate) struct Options {
    /// Loads whose name has one of these; all if empty.
    pub(crate) only: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) slice: Duration,
    pub(crate) peers: bool,
    /// Another build of the device process, as one more party.
    pub(crate) beside: Option<PathBuf>,
    pub(crate) list: bool,
    pub(crate) help: bool,
    /// Where the picture goes.
    pub(crate) plot: Option<PathBuf>,
}

pub(crate) const USAGE: &str = "\
options of bench net:
  --quick               a look: 3 rounds of 50 ms
  --only TEXT[,TEXT]    loads whose name has one of the texts
  --list                names of the loads
  --no-peers            without dpdk-testpmd
  --beside FILE         another build of net takes part, too: what a change is worth
  --rounds N            turns of each back end with each load (default 11)
  --slice-ms N          length of a turn (default 200)
  --plot FILE           the ratios as a picture (SVG)";

impl Options {
    pub(crate) fn read() -> Self {
        let mut options = Self {
            only: Vec::new(),
            rounds: 11,
            slice: Duration::from_millis(200),
            peers: true,
            beside: None,
            list: false,
            help: false,
            plot: None,
        };
        let mut words = Words::of_program(USAGE);
        while let Some(option) = words.option() {
            match option.as_str() {
                "--quick" => {
                    options.rounds = 3;
                    options.slice = Duration::from_millis(50);
                }
                "--only" => options.only.extend(words.texts()),
                "--list" => options.list = true,
                "--no-peers" => options.peers = false,
                "--beside" => options.beside = Some(words.value().into()),
                "--rounds" => options.rounds = words.number(1),
                "--slice-ms" => options.slice = Duration::from_millis(words.number(1)),
                "--plot" => options.plot = Some(words.value().into()),
                "--help" => options.help = true,
                _ => words.wrong("is not known"),
            }
        }
        options
    }
}
