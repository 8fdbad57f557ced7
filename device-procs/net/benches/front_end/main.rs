//! Packets from a polling vhost-user front end without a guest, through this card's process and others beside it.
//!
//! `cargo xtask bench net` runs it; its options are in [`options`]. Each back end has a tap in a network namespace of its own.
//! All run at the same time and take turns of some hundred milliseconds with each load, and a plain loop of `read` or `write`
//! on a tap takes one as well: the floor, plain and behind a filter. Printed are medians and quartiles over the rounds; ratios are taken within each
//! round, so that whatever else the machine does falls out.
//!
//! **To the tap** ("send") the front end keeps its queues full. **From the tap** ("receive") frames are put into the tap's queue
//! while the back end has no buffers; the clock runs from the moment it gets them until the last frame is there, so that who
//! makes the frames is not measured.

#![allow(missing_docs, clippy::unwrap_used)] // a tool for developers

mod card;
mod floor;
mod loads;
mod options;
mod parties;
mod report;

use std::io::Write;

use loads::Load;
use options::Options;
use parties::Party;
use report::{Row, Sample};
use tests::bench::{self, is_wanted, load_average};
use tests::calls::Counter;

/// Rounds with the samples of each party.
fn rounds(parties: &mut [Party], load: &Load, options: &Options) -> Vec<Vec<Option<Sample>>> {
    let mut rounds = Vec::new();
    // The first is the warm-up.
    for number in 0..=options.rounds {
        let samples = bench::round(parties, number, |party| party.turn(load, options.slice));
        if number > 0 {
            rounds.push(samples);
        }
    }
    rounds
}

fn main() {
    let options = Options::read();
    if options.help {
        println!("{}", options::USAGE);
        return;
    }
    let loads: Vec<Load> = loads::all()
        .into_iter()
        .filter(|load| is_wanted(&options.only, &load.name()))
        .collect();
    if options.list {
        for load in loads {
            println!("{}", load.name());
        }
        return;
    }
    let counter = Counter::new();
    println!("load average before: {}", load_average());
    let mut rows = Vec::new();
    let mut names: Vec<String> = Vec::new();
    for queues in [1, 4] {
        let loads: Vec<&Load> = loads.iter().filter(|load| load.queues == queues).collect();
        if loads.is_empty() {
            continue;
        }
        let Some(mut parties) = parties::all(&options, queues) else {
            return;
        };
        if names.is_empty() {
            names = parties.iter().map(|p| p.name.clone()).collect();
            report::head(&names);
        }
        for load in loads {
            let rounds = rounds(&mut parties, load, &options);
            // Counting costs time, so it has a turn of its own.
            let calls = parties
                .iter_mut()
                .map(|party| {
                    let (counter, pid) = (counter.as_ref()?, party.pid()?);
                    counter.begin(pid);
                    let done = party.turn(load, options.slice);
                    let calls = counter.end();
                    Some(calls as f64 / done?.packets)
                })
                .collect();
            let row = Row::new(load, &rounds, calls);
            row.print();
            // A run of minutes shows how far it is.
            std::io::stdout().flush().unwrap();
            rows.push(row);
        }
        for party in parties {
            party.finish();
        }
    }
    report::summary(&rows, &names);
    if let Some(file) = &options.plot {
        report::plot(&rows, &names).write(file);
    }
    println!("load average after: {}", load_average());
}
