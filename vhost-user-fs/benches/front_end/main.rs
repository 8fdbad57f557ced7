//! Load from a vhost-user front end without a guest, on this daemon and on others beside it.
//!
//! `cargo xtask bench fs` runs it; its options are in [`options`]. All daemons run at the same time on the same folder, and
//! take turns of some milliseconds with each load; printed are medians over the rounds: operations per second, CPU time of
//! the daemon's processes per operation, and how often ours goes into each peer's, computed within each round so that
//! whatever else the machine does falls out.

#![allow(missing_docs, clippy::unwrap_used, clippy::needless_pass_by_value)] // a tool for developers

mod daemons;
mod guest;
mod loads;
mod memory;
mod options;
mod report;
mod session;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use daemons::{Cache, Daemon};
use loads::{Load, Part, Work};
use nix::sys::resource::{Resource, getrlimit};
use options::Options;
use report::{Round, Row, Sample};
use session::{SLOTS, Session};
use tests::bench::{self, is_wanted, load_average};

/// Longer than a daemon goes on after its last reply.
const AFTER_TURN: Duration = Duration::from_millis(1);

/// One turn of one daemon.
fn turn(part: &mut Part, work: Work, options: &Options) -> Sample {
    let (cpu, start) = (part.session.cpu(), Instant::now());
    let count = part.turn(work, options.slice) as f64;
    let seconds = start.elapsed().as_secs_f64();
    // What it does after its last reply is its time as well, and the scheduler counts whoever sleeps to the end.
    part.session.rest(AFTER_TURN);
    Sample {
        rate: count / seconds,
        cpu: (part.session.cpu() - cpu) as f64 / 1000.0 / count,
    }
}

/// All rounds of a load.
fn rounds(parts: &mut [Part], load: &Load, source: &Path, options: &Options) -> Vec<Round> {
    for part in parts.iter_mut() {
        part.begin(load.work);
    }
    let mut rounds = Vec::new();
    loop {
        let samples = bench::round(parts, rounds.len(), |part| turn(part, load.work, options));
        let floor = load
            .floor()
            .map(|data| loads::floor(source, data, options.slice / 4));
        let asked = load
            .floor()
            .filter(|data| data.jobs == 1)
            .map(|data| loads::asked(source, data, options.slice / 4));
        rounds.push(Round {
            samples,
            floors: [floor, asked],
        });
        let done = match load.work {
            // One round more, of which the first is the warm-up.
            Work::Data(_) => rounds.len() > options.rounds,
            Work::Small(small) if parts.iter().any(Part::is_done) => {
                let enough = rounds.len() > options.rounds || !small.is_repeatable();
                if !enough {
                    for part in parts.iter_mut() {
                        part.begin(load.work);
                    }
                }
                enough
            }
            Work::Small(_) => false,
        };
        if done {
            break;
        }
    }
    if matches!(load.work, Work::Data(_)) {
        rounds.remove(0);
    } else if rounds.len() > 2 {
        // The last turn may be a short one.
        rounds.pop();
    }
    rounds
}

/// All loads in one cache mode.
fn table(options: &Options, daemons: &[Daemon], source: &Path, cache: Cache) -> Vec<Row> {
    let names: Vec<&str> = daemons.iter().map(|d| d.name).collect();
    report::head(cache, &names);
    let mut parts: Vec<Part> = daemons
        .iter()
        .enumerate()
        .map(|(n, daemon)| {
            let folder = format!("small-of-{n}");
            fs::create_dir(source.join(&folder)).unwrap();
            let mut session = Session::start(daemon, source, cache);
            session.awake = options.awake;
            Part::new(session, &folder, options.files)
        })
        .collect();
    let mut rows = Vec::new();
    let mut made = false;
    for load in loads::all() {
        if !is_wanted(&options.only, &load.name) {
            continue;
        }
        if let Work::Small(small) = load.work {
            if !made && small != loads::Small::Create {
                // Only some of the loads were wanted; the files are needed all the same.
                for part in &mut parts {
                    part.begin(Work::Small(loads::Small::Create));
                    while !part.is_done() {
                        part.turn(Work::Small(loads::Small::Create), options.slice);
                    }
                }
            }
            made = true;
        }
        let row = Row::new(
            load.name.clone(),
            &rounds(&mut parts, &load, source, options),
        );
        row.print();
        rows.push(row);
    }
    report::summary(&rows, &names);
    for part in parts {
        part.session.finish();
    }
    for n in 0..daemons.len() {
        fs::remove_dir_all(source.join(format!("small-of-{n}"))).unwrap();
    }
    rows
}

/// How many files a load may have, of those that are wanted: virtiofsd holds a descriptor for each, and ends its session without one.
fn files_within_limits(wanted: usize, daemons: &[Daemon]) -> usize {
    /// What a daemon has open beside the files.
    const OTHERS: usize = 500;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let held = most.saturating_sub(OTHERS);
    if daemons.len() < 2 || wanted <= held {
        return wanted;
    }
    println!(
        "{held} small files instead of {wanted}: a daemon may have {most} descriptors here (RLIMIT_NOFILE)"
    );
    held
}

fn main() {
    let mut options = Options::read();
    if options.help {
        println!("{}", options::USAGE);
        return;
    }
    if options.list {
        for load in loads::all() {
            println!("{}", load.name);
        }
        return;
    }
    let place = match &options.dir {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let daemons = daemons::all(options.virtiofsd.as_deref(), &options.peers);
    options.files = files_within_limits(options.files, &daemons);
    let source = place.path();
    println!("load average before: {}", load_average());
    if options.guest {
        guest::run(&daemons, options.rounds, options.files);
        println!("load average after: {}", load_average());
        return;
    }
    memory::idle(&daemons, source);
    if options.inodes > 0 {
        memory::inodes(&daemons, source, options.inodes);
    }
    if !options.idle && options.inodes == 0 {
        let data = vec![0x5a; usize::try_from(loads::FILE_SIZE).unwrap()];
        for job in 0..SLOTS {
            fs::write(source.join(loads::data_file(job)), &data).unwrap();
        }
        drop(data);
        let names: Vec<&str> = daemons.iter().map(|d| d.name).collect();
        let mut plot = report::plot(&names);
        for cache in &options.cache {
            let rows = table(&options, &daemons, source, *cache);
            report::add(&mut plot, &rows, *cache, names.len());
        }
        if let Some(file) = &options.plot {
            plot.write(file);
        }
    }
    println!("load average after: {}", load_average());
}
