//! Load from a polling vhost-user front end without a guest, on this disk's process and on others beside it.
//!
//! `cargo xtask bench block` runs it; its options are in [`options`]. All back ends run at the same time on the same file and
//! take turns of some hundred milliseconds with each load, and fio's io_uring on the plain file takes one as well: what the
//! ring and the process in between cost is what lies between the two. Printed are medians over the rounds; ratios are taken
//! within each round, so that whatever else the machine does falls out.

#![allow(missing_docs, clippy::unwrap_used)] // a tool for developers

mod cycles;
mod fio;
mod loads;
mod options;
mod parties;
mod report;
mod ring;

use std::io::Write;
use std::time::Instant;

use loads::Load;
use options::Options;
use parties::{Party, Place};
use report::{Round, Row, Sample};
use tests::bench::{self, is_wanted, load_average};
use tests::calls::Counter;
use tests::procfs::processor_time;

/// One turn of one back end.
fn turn(party: &mut Party, load: &Load, options: &Options) -> Sample {
    let cpu = || processor_time(party.pid).unwrap_or_default();
    let (before, start) = (cpu(), Instant::now());
    let latencies = ring::run(&mut party.rings, load, options.bytes(), options.slice);
    let seconds = start.elapsed().as_secs_f64();
    let count = latencies.len().max(1) as f64;
    Sample {
        rate: count / seconds,
        cpu: (cpu() - before).as_secs_f64() * 1e6 / count,
        latencies,
    }
}

fn rounds(parties: &mut [Party], load: &Load, options: &Options, place: &Place) -> Vec<Round> {
    let mut rounds = Vec::new();
    // The first is the warm-up.
    for number in 0..=options.rounds {
        let samples = bench::round(parties, number, |party| turn(party, load, options));
        let floor = options.fio.then(|| fio::run(&place.file, load, options));
        if number > 0 {
            rounds.push(Round { samples, floor });
        }
    }
    rounds
}

fn show_cycles(options: &Options, loads: &[Load]) {
    let place = Place::make(options);
    let mut party = parties::ours(options, &place);
    let mut columns = Vec::new();
    for load in loads {
        let (shares, samples) = cycles::measure(&mut party, load, options, &place);
        println!("{}: {samples} samples", load.name());
        columns.push((load.name(), shares));
    }
    println!();
    cycles::print(&columns);
    party.finish();
}

fn main() {
    let mut options = Options::read();
    if options.cycles && options.only.is_empty() {
        options.only = ["randread 4k d1 q1", "randread 4k d32 q1"]
            .map(Into::into)
            .into();
    }
    if options.help {
        println!("{}", options::USAGE);
        return;
    }
    let loads: Vec<Load> = loads::all(options.every)
        .into_iter()
        .filter(|load| is_wanted(&options.only, &load.name()))
        .collect();
    if options.list {
        for load in loads {
            println!("{}", load.name());
        }
        return;
    }
    if options.cycles {
        show_cycles(&options, &loads);
        println!("\nload average: {}", load_average());
        return;
    }
    tests::lab::ensure_packages(&["fio", "qemu-system-common"]).unwrap();
    let place = Place::make(&options);
    let mut parties = parties::all(&options, &place);
    let counter = Counter::new();
    println!(
        "a file of {} MiB in {}, {}; load average before: {}",
        options.mebibytes,
        place.folder().display(),
        if options.direct {
            "O_DIRECT"
        } else {
            "in the page cache"
        },
        load_average()
    );
    let names: Vec<&str> = parties.iter().map(|p| p.name.as_str()).collect();
    report::head(&names, options.fio);
    let mut rows = Vec::new();
    for load in &loads {
        let rounds = rounds(&mut parties, load, &options, &place);
        // Counting costs time, so it has a turn of its own.
        let calls: Vec<Option<f64>> = parties
            .iter_mut()
            .map(|party| {
                let counter = counter.as_ref()?;
                counter.begin(party.pid);
                let done = turn(party, load, &options).latencies.len();
                Some(counter.end() as f64 / done.max(1) as f64)
            })
            .collect();
        let row = Row::new(load.name(), rounds, &calls);
        row.print();
        // A run of minutes shows how far it is.
        std::io::stdout().flush().unwrap();
        rows.push(row);
    }
    report::summary(&rows, &parties, options.direct);
    if let Some(file) = &options.plot {
        let way = if options.direct {
            "O_DIRECT"
        } else {
            "page cache"
        };
        report::plot(&rows, &parties, format!("block, {way}")).write(file);
    }
    println!("load average after: {}", load_average());
    for party in parties {
        party.finish();
    }
}
