//! # `cargo xtask bench shares`
//!
//! **Job.** How VMs that run at once share the machine: each guest does I/O on its disk as fast as it can, some of them behind
//! `throttling.iops-total`, and all are let go and stopped at the same moments. Throttled ones should get exactly their rate, the
//! others the same.
//! **Who is not trusted.** The machine: whatever else it does is taken from all.
//! **Why this way.** The guests are bare and each keeps one processor busy, so that there are eight times as many busy threads as
//! processors here: the case in which a VMM that wakes, polls or schedules badly takes from its neighbours. `stop` and `cont` of QMP
//! mark the time to some 100 µs, and the guest counts.

use crate::tool;
use serde_json::json;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tests::bench::load_average;
use tests::lab::chain;
use tests::payload::Payload;
use tests::qmp::Qmp;
use tests::vm::Vm;
use tests::wait::{Deadline, readable};

const LIMIT: Duration = Duration::from_secs(60);
/// Every fourth VM is throttled, to so many requests a second: fewer than it would get beside so many others.
const IOPS: u32 = 40;
/// `blk-loop` does so many in a burst.
const IN_A_BURST: f64 = 4.0;

struct Party {
    vm: Vm,
    qmp: Qmp,
    throttled: bool,
    begin: Option<Instant>,
    seconds: f64,
}

/// What each of many VMs gets that run at once, some of them throttled.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=64))]
    vms: u32,
    /// For how long.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    let (count, seconds) = (options.vms, options.seconds);
    let program = tool::build_release()?.join("stratovirt");
    let work = tempfile::tempdir().map_err(|e| format!("a temporary folder: {e}"))?;
    println!("load average before: {}", load_average());
    let mut parties = Vec::new();
    for number in 0..count {
        let image = work.path().join(format!("{number}.img"));
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(4 << 20))
            .map_err(|e| format!("{}: {e}", image.display()))?;
        let throttled = number % 4 == 3;
        let limit = if throttled { IOPS } else { 0 };
        let vm = Vm::builder()
            .program(&program)
            .args(["-machine", "microvm", "-m", "128", "-S"])
            .kernel(&Payload::BlkLoop.path(), "spin=1")
            .disk("d0", &image, &format!(",throttling.iops-total={limit}"))
            .with_qmp()
            .start()
            .map_err(|e| chain(&e))?;
        let qmp = vm.qmp().map_err(|e| chain(&e))?;
        parties.push(Party {
            vm,
            qmp,
            throttled,
            begin: None,
            seconds: 0.0,
        });
    }
    for party in &mut parties {
        party
            .qmp
            .execute("cont", json!({}))
            .map_err(|e| chain(&e))?;
        party.begin = Some(Instant::now());
    }
    // Nothing comes.
    readable(&[], Deadline::after(Duration::from_secs(seconds.into())))
        .map_err(|e| e.to_string())?;
    for party in &mut parties {
        party
            .qmp
            .execute("stop", json!({}))
            .map_err(|e| chain(&e))?;
        party.seconds = party
            .begin
            .map_or(0.0, |begin| begin.elapsed().as_secs_f64());
    }
    let mut rates = Vec::new();
    for party in &mut parties {
        // Found as soon as it goes on.
        party.vm.console.send("x").map_err(|e| e.to_string())?;
        party
            .qmp
            .execute("cont", json!({}))
            .map_err(|e| chain(&e))?;
        party.vm.wait_for("BLK-LOOP OK bursts ", LIMIT)?;
        let line = party
            .vm
            .console
            .rest_of_line(LIMIT)
            .map_err(|e| e.to_string())?;
        let bursts: f64 = line.trim().parse().map_err(|e| format!("{line:?}: {e}"))?;
        rates.push(bursts * IN_A_BURST / party.seconds);
    }
    println!("{count} VMs for {seconds} s; requests a second of each:");
    for throttled in [false, true] {
        let own: Vec<f64> = rates
            .iter()
            .zip(&parties)
            .filter(|(_, party)| party.throttled == throttled)
            .map(|(rate, _)| *rate)
            .collect();
        if own.is_empty() {
            continue;
        }
        let wanted = if throttled {
            f64::from(IOPS)
        } else {
            own.iter().sum::<f64>() / own.len() as f64
        };
        let name = if throttled {
            "throttled to"
        } else {
            "others, mean"
        };
        let list: Vec<String> = own.iter().map(|rate| format!("{rate:.0}")).collect();
        let least = own.iter().copied().fold(f64::INFINITY, f64::min);
        let most = own.iter().copied().fold(0.0, f64::max);
        println!(
            "{name} {wanted:.0}: {}; least {:+.1} %, most {:+.1} %",
            list.join(" "),
            (least / wanted - 1.0) * 100.0,
            (most / wanted - 1.0) * 100.0
        );
    }
    println!("load average after: {}", load_average());
    Ok(ExitCode::SUCCESS)
}
