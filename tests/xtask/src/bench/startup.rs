//! # `cargo xtask bench startup`
//!
//! **Job.** From exec to the first byte that a bare guest writes to the serial port, on this machine's own
//! `/dev/kvm`: wall time, processor time of all processes, and their memory without guest RAM, once with one disk and
//! once with a network card as well.
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** A bare guest adds two instructions to the measured time, so all of it is the VMM's.

use super::meter::{Group, Sample, measure};
use super::peers::{Candidate, JAIL_USER, OZONE, Setting, all, clean};
use crate::tool;
use std::process::ExitCode;
use std::time::Duration;
use tests::host::Tap;
use tests::lab::chain;
use tests::payload::Payload;

const MEMORY_MIB: u64 = 128;
const TAP: &str = "sv-bench0";
/// What the outer jail may add to a start, in milliseconds.
const MOST_BY_OZONE: f64 = 10.0;

/// From exec to a bare guest's first byte, beside firecracker, cloud-hypervisor and QEMU; ends with what `bench jail` shows.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often.
    #[arg(long, value_name = "N", default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    runs: u32,
    /// Only these VMMs.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    only: Vec<String>,
    /// Without the table with a network card, which takes root.
    #[arg(long)]
    no_net: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    let runs = options.runs as usize;
    tests::host::require_kvm();
    let programs = tool::build_release()?;
    let mut candidates = all(programs.join("stratovirt"));
    if !options.only.is_empty() {
        candidates.retain(|c| options.only.iter().any(|o| o == c.name));
    }
    if candidates.is_empty() {
        return Err("--only leaves no candidate".into());
    }
    let work = tempfile::tempdir().map_err(|e| format!("cannot make a temporary folder: {e}"))?;
    let disk = work.path().join("disk.img");
    let file = std::fs::File::create(&disk).map_err(|e| format!("{}: {e}", disk.display()))?;
    file.set_len(64 << 20)
        .map_err(|e| format!("{}: {e}", disk.display()))?;
    // The tenant's, so that any file system will do; root uses it all the same.
    let user = Some(JAIL_USER);
    std::os::unix::fs::chown(&disk, user, user).map_err(|e| format!("{}: {e}", disk.display()))?;
    let group = Group::new()?;
    let block = Setting {
        kernel: Payload::FirstByte.path(),
        disk,
        tap: None,
        memory_mib: MEMORY_MIB,
    };
    let mut failed = table("one disk", &candidates, &block, runs, &group, work.path());
    if !options.no_net {
        let tap = Tap::of_user(TAP, "10.0.3.1/24", JAIL_USER).map_err(|e| chain(&e))?;
        let both = Setting {
            tap: Some(tap.name.clone()),
            ..block
        };
        failed |= table(
            "one disk and one network card",
            &candidates,
            &both,
            runs,
            &group,
            work.path(),
        );
    }
    if candidates.iter().any(|c| c.name == OZONE) {
        clean(&programs.join("ozone"), &programs.join("stratovirt"))?;
    }
    if candidates.iter().any(|c| c.name == "stratovirt") {
        super::jail::table(&programs.join("stratovirt"), runs)?;
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Measures all candidates in turn and prints their medians. Returns whether the product itself failed.
fn table(
    title: &str,
    candidates: &[Candidate],
    setting: &Setting,
    runs: usize,
    group: &Group,
    scratch: &std::path::Path,
) -> bool {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); candidates.len()];
    let mut failures: Vec<Option<String>> = vec![None; candidates.len()];
    // One round more than counted: the first brings programs and libraries into the page cache.
    for round in 0..=runs {
        for (index, candidate) in candidates.iter().enumerate() {
            if failures[index].is_some() {
                continue;
            }
            let result = (candidate.command)(&candidate.program, setting, scratch).and_then(
                |mut command| measure(&mut command, group, setting.memory_mib << 20, scratch),
            );
            match result {
                Ok(sample) if round > 0 => samples[index].push(sample),
                Ok(_) => {}
                Err(message) => failures[index] = Some(message),
            }
        }
    }
    println!(
        "\nstart-up with {title}, {MEMORY_MIB} MiB, medians of {runs} interleaved runs (quartiles in brackets)"
    );
    println!(
        "{:<20} {:>24} {:>24} {:>12} {:>10}",
        "", "wall ms", "processor ms", "PSS KiB", "processes"
    );
    let mut own: Option<[f64; 3]> = None;
    for ((candidate, samples), failure) in candidates.iter().zip(&samples).zip(&failures) {
        if let Some(message) = failure {
            println!("{:<20} failed: {message}", candidate.name);
            continue;
        }
        let millis = |d: Duration| d.as_secs_f64() * 1000.0;
        let (wall, cpu) = (
            quartiles(samples, |s| millis(s.wall)),
            quartiles(samples, |s| millis(s.cpu)),
        );
        #[allow(clippy::cast_precision_loss)] // far below 2^52 KiB
        let pss = quartiles(samples, |s| s.pss as f64);
        let shown = |q: [f64; 3]| format!("{:.2} [{:.2} {:.2}]", q[1], q[0], q[2]);
        let processes = samples.last().map_or(0, |s| s.processes);
        let mut line = format!(
            "{:<20} {:>24} {:>24} {:>12.0} {:>10}",
            candidate.name,
            shown(wall),
            shown(cpu),
            pss[1],
            processes
        );
        match own {
            None if candidate.name == "stratovirt" => own = Some([wall[1], cpu[1], pss[1]]),
            Some(own) if candidate.name == OZONE => {
                line.push_str(&format!(
                    "   more than without: wall {:+.2} ms, processor {:+.2} ms (at most {MOST_BY_OZONE} ms of wall time wanted)",
                    wall[1] - own[0],
                    cpu[1] - own[1]
                ));
            }
            Some(own) => {
                let ratios = [own[0] / wall[1], own[1] / cpu[1], own[2] / pss[1]];
                line.push_str(&format!(
                    "   ours/theirs: wall {:.2}, processor {:.2}, PSS {:.2}",
                    ratios[0], ratios[1], ratios[2]
                ));
            }
            None => {}
        }
        println!("{line}");
    }
    candidates
        .iter()
        .zip(&failures)
        .any(|(c, f)| ["stratovirt", OZONE].contains(&c.name) && f.is_some())
}

/// Lower quartile, median, upper quartile.
fn quartiles(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> [f64; 3] {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let at = |part: usize| {
        values
            .get(values.len() * part / 4)
            .copied()
            .unwrap_or(f64::NAN)
    };
    [at(1), at(2), at(3)]
}
