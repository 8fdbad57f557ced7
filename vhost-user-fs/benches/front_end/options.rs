//! # What to measure
//!
//! **Job.** The command line of the bench. **Who is not trusted.** Nobody. **Why this way.** Every option has a default with which
//! the figures that the README shows come out; `--quick` is for a look.

use std::path::PathBuf;
use std::time::Duration;

use tests::bench::Words;

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
    /// The front end does not sleep.
    pub(crate) awake: bool,
    pub(crate) list: bool,
    pub(crate) help: bool,
    pub(crate) virtiofsd: Option<PathBuf>,
    /// Where the picture goes.
    pub(crate) plot: Option<PathBuf>,
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
  --awake               the front end looks for replies all the time and needs no interrupt:
                        what is left are the daemons and the copying
  --dir FOLDER          where the shared folder is made
  --plot FILE           the ratios as a picture (SVG)";

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
            awake: false,
            list: false,
            help: false,
            virtiofsd: None,
            plot: None,
        };
        let mut words = Words::of_program(USAGE);
        while let Some(option) = words.option() {
            match option.as_str() {
                "--quick" => {
                    options.rounds = 5;
                    options.slice = Duration::from_millis(20);
                    options.files = 2000;
                    options.cache = vec![Cache::Auto];
                }
                "--dir" => options.dir = Some(words.value().into()),
                "--only" => options.only = words.texts(),
                "--peers" => options.peers = words.texts(),
                "--rounds" => options.rounds = words.number(1),
                "--slice-ms" => options.slice = Duration::from_millis(words.number(1)),
                "--files" => options.files = words.number(1),
                "--inodes" => options.inodes = words.number(0),
                "--idle" => options.idle = true,
                "--guest" => options.guest = true,
                "--awake" => options.awake = true,
                "--list" => options.list = true,
                "--virtiofsd" => options.virtiofsd = Some(words.value().into()),
                "--cache" => {
                    options.cache = match words.value().as_str() {
                        "none" => vec![Cache::None],
                        "auto" => vec![Cache::Auto],
                        "both" => vec![Cache::None, Cache::Auto],
                        other => {
                            words.wrong(&format!("{other}: not valid; allowed: none, auto, both"))
                        }
                    }
                }
                "--plot" => options.plot = Some(words.value().into()),
                "--help" => options.help = true,
                _ => words.wrong("is not known"),
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
