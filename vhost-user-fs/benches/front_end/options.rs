//! # What to measure
//!
//! **Job.** The command line of the bench. **Who is not trusted.** Nobody. **Why this way.** Every option has a default with which
//! the figures that the README shows come out; `--quick` is for a look.

use std::path::PathBuf;
use std::time::Duration;

use crate::daemons::Cache;

/// See [`USAGE`].
pub(crate) struct Options {
    pub(crate) dir: Option<PathBuf>,
    /// Loads whose name has one of these; all if empty.
    pub(crate) only: Vec<String>,
    /// Peers whose name has one of these; all if empty.
    pub(crate) peers: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) slice: Duration,
    pub(crate) files: usize,
    pub(crate) cache: Vec<Cache>,
    pub(crate) inodes: usize,
    pub(crate) idle: bool,
    pub(crate) guest: bool,
    pub(crate) list: bool,
    pub(crate) help: bool,
    pub(crate) virtiofsd: Option<PathBuf>,
}

pub(crate) const USAGE: &str = "\
options of bench fs:
  --quick               a look: 5 rounds of 20 ms, 2000 files, one cache mode
  --only TEXT[,TEXT]    loads whose name has one of the texts
  --list                names of the loads
  --peers TEXT[,TEXT]   peers whose name has one of the texts; `none` for none
  --virtiofsd PROGRAM   the crate's virtiofsd, if it is not on PATH
  --cache none|auto|both
  --rounds N            turns of each daemon with each load
  --slice-ms N          length of a turn with reads and writes
  --files N             small files to make, find, list and remove
  --inodes N            memory with N inodes looked up, and nothing else (0: not)
  --idle                memory at rest, and nothing else
  --guest               from one Linux guest under QEMU with fio, and nothing else
                        (3 rounds, 300 files if not given; minutes)
  --dir FOLDER          where the shared folder is made";

impl Options {
    pub(crate) fn read() -> Self {
        let mut options = Self {
            dir: None,
            only: Vec::new(),
            peers: Vec::new(),
            rounds: 0,
            slice: Duration::from_millis(40),
            files: 0,
            cache: vec![Cache::None, Cache::Auto],
            inodes: 0,
            idle: false,
            guest: false,
            list: false,
            help: false,
            virtiofsd: None,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .unwrap_or_else(|| panic!("{argument} needs a value\n{USAGE}"))
            };
            let texts = |value: String| value.split(',').map(str::to_owned).collect();
            let number = |value: String| -> usize {
                value
                    .parse()
                    .unwrap_or_else(|_| panic!("{argument} {value}: a number is needed\n{USAGE}"))
            };
            match argument.as_str() {
                "--quick" => {
                    options.rounds = 5;
                    options.slice = Duration::from_millis(20);
                    options.files = 2000;
                    options.cache = vec![Cache::Auto];
                }
                "--dir" => options.dir = Some(value().into()),
                "--only" => options.only = texts(value()),
                "--peers" => options.peers = texts(value()),
                "--rounds" => options.rounds = number(value()),
                "--slice-ms" => options.slice = Duration::from_millis(number(value()) as u64),
                "--files" => options.files = number(value()),
                "--inodes" => options.inodes = number(value()),
                "--idle" => options.idle = true,
                "--guest" => options.guest = true,
                "--list" => options.list = true,
                "--virtiofsd" => options.virtiofsd = Some(value().into()),
                "--cache" => {
                    options.cache = match value().as_str() {
                        "none" => vec![Cache::None],
                        "auto" => vec![Cache::Auto],
                        "both" => vec![Cache::None, Cache::Auto],
                        other => panic!("--cache {other}: none, auto or both\n{USAGE}"),
                    }
                }
                // From cargo.
                "--bench" => {}
                "--help" => options.help = true,
                other => panic!("{other}: unknown\n{USAGE}"),
            }
        }
        let (rounds, files) = if options.guest {
            (3, 300)
        } else {
            (15, 100_000)
        };
        for (value, default) in [(&mut options.rounds, rounds), (&mut options.files, files)] {
            if *value == 0 {
                *value = default;
            }
        }
        options
    }
}
