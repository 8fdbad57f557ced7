//! # What to measure
//!
//! **Job.** The command line of the bench. **Who is not trusted.** Nobody. **Why this way.** Every option has a default with which
//! the figures that the README shows come out; `--quick` is for a look.

use std::path::PathBuf;
use std::time::Duration;

use tests::bench::Words;

/// See [`USAGE`].
pub(crate) struct Options {
    pub(crate) dir: Option<PathBuf>,
    /// Loads whose name has one of these; all if empty.
    pub(crate) only: Vec<String>,
    pub(crate) every: bool,
    pub(crate) rounds: usize,
    pub(crate) slice: Duration,
    pub(crate) mebibytes: u64,
    pub(crate) direct: bool,
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) peers: bool,
    pub(crate) fio: bool,
    pub(crate) list: bool,
    /// Where the time of a request goes, and nothing else.
    pub(crate) cycles: bool,
    pub(crate) help: bool,
    /// Where the picture goes.
    pub(crate) plot: Option<PathBuf>,
}

pub(crate) const USAGE: &str = "\
options of bench block:
  --quick               a look: 3 rounds of 50 ms
  --all                 every combination of direction, order, 4k/64k/1024k, depth 1/8/32/128, 1/2/4 queues
  --only TEXT[,TEXT]    loads whose name has one of the texts
  --list                names of the loads
  --cycles              where this process's time goes, by perf: a table of randread 4k d1 and d32, or of --only
  --direct              O_DIRECT for all
  --socket PATH         one back end more, which listens there and serves a file of the same size (may be repeated)
  --no-peers            without qemu-storage-daemon
  --no-fio              without fio on the plain file
  --rounds N            turns of each back end with each load (default 7)
  --slice-ms N          length of a turn (default 250)
  --size-mib N          size of the file (default 256)
  --dir FOLDER          where the file is made (default /var/tmp)
  --plot FILE           the ratios as a picture (SVG)";

impl Options {
    pub(crate) fn read() -> Self {
        let mut options = Self {
            dir: None,
            only: Vec::new(),
            every: false,
            rounds: 7,
            slice: Duration::from_millis(250),
            mebibytes: 256,
            direct: false,
            sockets: Vec::new(),
            peers: true,
            fio: true,
            list: false,
            cycles: false,
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
                "--all" => options.every = true,
                "--only" => options.only.extend(words.texts()),
                "--cycles" => options.cycles = true,
                "--list" => options.list = true,
                "--direct" => options.direct = true,
                "--socket" => options.sockets.push(words.value().into()),
                "--no-peers" => options.peers = false,
                "--no-fio" => options.fio = false,
                "--rounds" => options.rounds = words.number(1),
                "--slice-ms" => options.slice = Duration::from_millis(words.number(1)),
                "--size-mib" => options.mebibytes = words.number(1),
                "--dir" => options.dir = Some(words.value().into()),
                "--plot" => options.plot = Some(words.value().into()),
                "--help" => options.help = true,
                _ => words.wrong("is not known"),
            }
        }
        options
    }

    /// Size of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.mebibytes << 20
    }
}
