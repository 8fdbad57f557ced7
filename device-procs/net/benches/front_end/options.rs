//! # What to measure
//!
//! **Job.** The command line of the bench. **Who is not trusted.** Nobody. **Why this way.** Every option has a default with which
//! the figures that the README shows come out; `--quick` is for a look.

use std::path::PathBuf;
use std::time::Duration;

use ipc::limits::{MAX_POLL_US, NET_POLL_US};
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
    /// `poll-us` of the card, and of others like it that take part, too.
    pub(crate) poll_us: u32,
    pub(crate) others: Vec<u32>,
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
  --poll-us N[,N]       poll-us of the card (default: that of -netdev), and of more cards like it that take part, too
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
            poll_us: NET_POLL_US,
            others: Vec::new(),
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
                "--poll-us" => {
                    let parsed = words.texts().iter().map(|text| text.parse().ok()).collect();
                    let all: Option<Vec<u32>> = parsed;
                    match all.filter(|all| all.iter().all(|one| *one <= MAX_POLL_US)) {
                        Some(mut all) => {
                            options.poll_us = all.remove(0);
                            options.others = all;
                        }
                        None => words.wrong(&format!("takes numbers from 0 to {MAX_POLL_US}")),
                    }
                }
                "--plot" => options.plot = Some(words.value().into()),
                "--help" => options.help = true,
                _ => words.wrong("is not known"),
            }
        }
        options
    }
}
