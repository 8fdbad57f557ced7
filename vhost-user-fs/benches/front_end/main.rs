//! Load from a vhost-user front end without a guest, on this daemon and on others beside it.
//!
//! `cargo xtask bench fs` runs it; its options are in [`options`]. All daemons take turns on the same folder in every round;
//! printed are medians over the rounds: operations per second, CPU time of the daemon's processes per operation, and how
//! often ours goes into each peer's, computed within each round so that drift of the machine falls out.

#![allow(missing_docs, clippy::unwrap_used, clippy::needless_pass_by_value)] // a tool for developers

mod daemons;
mod loads;
mod memory;
mod session;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use daemons::{Cache, Daemon};
use loads::Load;
use session::Session;

struct Options {
    dir: Option<PathBuf>,
    only: Option<String>,
    rounds: usize,
    files: usize,
    cache: Vec<Cache>,
    inodes: usize,
    rust: Option<PathBuf>,
}

const USAGE: &str = "the options are --dir FOLDER, --only TEXT, --rounds N, --files N, --cache none|auto|both, --inodes N, --virtiofsd PROGRAM";

fn options() -> Options {
    let mut options = Options {
        dir: None,
        only: None,
        rounds: 5,
        files: 10_000,
        cache: vec![Cache::Auto],
        inodes: 0,
        rust: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .unwrap_or_else(|| panic!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--dir" => options.dir = Some(value().into()),
            "--only" => options.only = Some(value()),
            "--rounds" => options.rounds = value().parse().unwrap(),
            "--files" => options.files = value().parse().unwrap(),
            "--inodes" => options.inodes = value().parse().unwrap(),
            "--virtiofsd" => options.rust = Some(value().into()),
            "--cache" => {
                options.cache = match value().as_str() {
                    "none" => vec![Cache::None],
                    "auto" => vec![Cache::Auto],
                    "both" => vec![Cache::None, Cache::Auto],
                    other => panic!("--cache {other}: {USAGE}"),
                }
            }
            "--bench" => {}
            other => panic!("{other}: {USAGE}"),
        }
    }
    assert!(options.rounds > 0, "--rounds 0: at least one is needed");
    options
}

/// One daemon's figures of one round.
#[derive(Clone, Copy)]
struct Sample {
    /// Operations per second.
    rate: f64,
    /// Microseconds of CPU time per operation.
    cpu: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn one(daemon: &Daemon, load: &Load, source: &Path, cache: Cache) -> Sample {
    let small = |n: usize| source.join(format!("small-{n}"));
    if load.small && load.name != loads::CREATE {
        for n in 0..load.count {
            fs::write(small(n), b"").unwrap();
        }
    }
    let mut session = Session::start(daemon, source, cache);
    let (cpu, start) = (session.cpu(), Instant::now());
    (load.run)(&mut session, load.count);
    let seconds = start.elapsed().as_secs_f64();
    let cpu = (session.cpu() - cpu) as f64 / 1000.0;
    session.finish();
    if load.small {
        for n in 0..load.count {
            let _ = fs::remove_file(small(n));
        }
    }
    let count = load.count as f64;
    Sample {
        rate: count / seconds,
        cpu: cpu / count,
    }
}

/// All loads in one cache mode; returns the ratios to each peer.
fn table(options: &Options, daemons: &[Daemon], source: &Path, cache: Cache) {
    println!("cache {cache:?}, medians of {} rounds", options.rounds);
    print!("{:<22}", "load");
    for daemon in daemons {
        print!("{:>28}", daemon.name);
    }
    println!("{:>14}", "preadv loop");
    print!("{:<22}{:>17}{:>11}", "", "ops/s", "CPU µs/op");
    println!(
        "{}",
        "    ops/s  ratio  CPU ratio".repeat(daemons.len() - 1)
    );
    let mut ratios = vec![Vec::new(); daemons.len() - 1];
    for load in loads::all(options.files) {
        if options
            .only
            .as_ref()
            .is_some_and(|o| !load.name.contains(o))
        {
            continue;
        }
        let mut rounds = Vec::new();
        let mut floors = Vec::new();
        for round in 0..options.rounds {
            if let Some(floor) = &load.floor {
                floors.push(floor.measure(source));
            }
            // Whoever comes first finds the host's cache as the load before left it, so each is first in turn.
            let mut samples = vec![
                Sample {
                    rate: 0.0,
                    cpu: 0.0
                };
                daemons.len()
            ];
            for turn in 0..daemons.len() {
                let at = (round + turn) % daemons.len();
                samples[at] = one(&daemons[at], &load, source, cache);
            }
            if let (Some(floor), Some(ours)) = (floors.last_mut(), samples.first()) {
                *floor = ours.rate / *floor;
            }
            rounds.push(samples);
        }
        let over = |f: &dyn Fn(&[Sample]) -> f64| median(rounds.iter().map(|r| f(r)).collect());
        print!(
            "{:<22}{:>17.0}{:>11.2}",
            load.name,
            over(&|r| r[0].rate),
            over(&|r| r[0].cpu)
        );
        for (peer, ratios) in ratios.iter_mut().enumerate() {
            let peer = peer + 1;
            let ratio = over(&|r| r[0].rate / r[peer].rate);
            let cpu = over(&|r| r[0].cpu / r[peer].cpu);
            print!("{:>10.0}{ratio:>7.2}{cpu:>11.2}", over(&|r| r[peer].rate));
            ratios.push(ratio);
        }
        if floors.is_empty() {
            println!();
        } else {
            println!("{:>14.2}", median(floors));
        }
    }
    print!("{:<22}{:>28}", "geometric mean", "");
    for of in &ratios {
        let mean = of.iter().map(|r| r.ln()).sum::<f64>() / of.len() as f64;
        print!("{:>17.2}{:>11}", mean.exp(), "");
    }
    print!("\n{:<22}{:>28}", "lowest", "");
    for of in &ratios {
        let lowest = of.iter().copied().fold(f64::INFINITY, f64::min);
        print!("{lowest:>17.2}{:>11}", "");
    }
    println!();
}

fn main() {
    let options = options();
    let place = match &options.dir {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let daemons = daemons::all(options.rust.as_deref());
    let source = place.path();
    memory::idle(&daemons, source);
    if options.inodes > 0 {
        memory::inodes(&daemons, source, options.inodes);
        return;
    }
    let data = vec![0x5a; usize::try_from(loads::FILE_SIZE).unwrap()];
    fs::write(source.join(loads::DATA_FILE), data).unwrap();
    for cache in &options.cache {
        table(&options, &daemons, source, *cache);
    }
}
