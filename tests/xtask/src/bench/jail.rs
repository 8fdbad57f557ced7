//! # `cargo xtask bench jail`
//!
//! **Job.** Where the time of jailing a device goes: each step from the broker's request to the moment when the process waits
//! for its first message, for one device alone and for two at once, and how far several devices are jailed side by side.
//! `bench startup` shows it too.
//!
//! The goal, at most 1.5 ms of wall time a device, is one for the jail's own rows (with `*`): what a process costs with a jail and
//! would not cost without. It is asked of a device alone, where nothing hides a step, and of N devices that are started at once,
//! where it is what each adds to the wall time: the N-fold start divided by N, times the jail's part of the steps. The rows of two at once are
//! longer than of one alone wherever there are fewer processors than processes that start (two devices, broker, control process).
//!
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** The product's own trace is read, so that what is measured is what runs. The time stamps are taken where
//! the steps are done; writing them down costs some 30 µs a device, which is in the figures.

use ::tests::host::Tap;
use ::tests::lab::chain;
use ::tests::payload::Payload;
use ::tests::vm::Vm;
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);
/// What one device's jail may cost, in milliseconds.
const GOAL: f64 = 1.5;

/// The steps in the order of the table: its row, the trace's words for its end, and what its beginning is measured from.
#[rustfmt::skip]
const STEPS: &[Row] = &[
    Row::jail("fork into user and pid ns", "clone", "begin"),
    Row::jail("child runs", "signal mask", "clone"),
    Row::jail("session and keys", "session", "signal mask"),
    Row::jail("mount, net, ipc, uts, cgroup ns", "namespaces", "session"),
    Row::jail("empty root", "root", "namespaces"),
    Row::jail("user map by the broker", "waiting for the user map", "root"),
    Row::jail("bounding set, user, groups", "user and groups", "waiting for the user map"),
    Row::jail("capabilities", "capabilities", "user and groups"),
    Row::jail("descriptors", "descriptors", "capabilities"),
    Row::jail("resource limits", "resource limits", "descriptors"),
    Row::jail("no_new_privs", "no_new_privs", "resource limits"),
    Row::jail("death with the parent", "death with the parent", "no_new_privs"),
    Row::other("exec, libc, start message", "start message read", "death with the parent"),
    Row::other("image or tap taken over", "prepared", "start message read"),
    Row::jail("Landlock, checks", "locked", "prepared"),
    Row::jail("seccomp filter", "jailed", "locked"),
    Row::other("ready for the first message", "serving", "jailed"),
];

struct Row {
    name: &'static str,
    end: &'static str,
    from: &'static str,
    /// Whether it is the jail's doing, or what starting any process takes.
    jail: bool,
}

impl Row {
    const fn jail(name: &'static str, end: &'static str, from: &'static str) -> Self {
        Self {
            name,
            end,
            from,
            jail: true,
        }
    }

    const fn other(name: &'static str, end: &'static str, from: &'static str) -> Self {
        Self {
            jail: false,
            ..Self::jail(name, end, from)
        }
    }
}

/// When each step of one device was done, in nanoseconds of the monotonic clock.
type Marks = BTreeMap<String, u64>;
/// The devices of one VM by id.
type Devices = [(String, Marks)];

/// Each step of jailing a disk and a card, in milliseconds.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often.
    #[arg(long, value_name = "N", default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    runs: u32,
}

pub(crate) fn run(options: &Options) -> Result<std::process::ExitCode, String> {
    let runs = options.runs as usize;
    let programs = crate::tool::build_release()?;
    table(&programs.join("stratovirt"), runs)?;
    Ok(std::process::ExitCode::SUCCESS)
}

/// Measures VMs with one (a disk, a card), two and four devices in turn, and prints the tables.
pub(crate) fn table(program: &Path, runs: usize) -> Result<(), String> {
    ::tests::host::require_kvm();
    let work = tempfile::tempdir().map_err(|e| format!("a temporary folder: {e}"))?;
    let disk = |n: usize| {
        let path = work.path().join(format!("disk{n}.img"));
        let file = std::fs::File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        file.set_len(64 << 20)
            .map_err(|e| format!("{}: {e}", path.display()))?;
        Ok::<_, String>(path)
    };
    let disks = [disk(0)?, disk(1)?];
    let tap = |name| Tap::new(name, "10.0.4.1/24").map_err(|e| chain(&e));
    let taps = [tap("sv-jb0")?, tap("sv-jb1")?];
    // Disks and cards of each VM.
    let shapes = [(1, 0), (0, 1), (1, 1), (2, 2)];
    let mut samples: [Vec<Vec<(String, Marks)>>; 4] = Default::default();
    // One round more than counted, as in the start-up tables.
    for round in 0..=runs {
        for ((disk_count, tap_count), samples) in shapes.into_iter().zip(&mut samples) {
            let (payload, append, ready) = if disk_count > 0 {
                (Payload::BlkRw, "end=halt", "BLK-RW OK")
            } else {
                (
                    Payload::NetTx,
                    "host=10.0.4.1 own=10.0.4.2 end=halt",
                    "NET-TX OK",
                )
            };
            let mut vm = Vm::builder()
                .program(program)
                .env("STRATOVIRT_LOG_LEVEL", "trace")
                .args(["-machine", "microvm", "-m", "128"])
                .kernel(&payload.path(), append);
            for (n, disk) in disks.iter().take(disk_count).enumerate() {
                vm = vm.disk(&format!("disk{n}"), disk, "");
            }
            for (n, tap) in taps.iter().take(tap_count).enumerate() {
                vm = vm.tap(
                    &format!("card{n}"),
                    &tap.name,
                    &format!("52:54:00:00:01:0{n}"),
                );
            }
            let mut vm = vm.start().map_err(|e| chain(&e))?;
            vm.wait_for(ready, LIMIT)?;
            let marks = marks(&vm.messages())?;
            if marks.len() != disk_count + tap_count {
                return Err(format!(
                    "the trace tells of {} devices instead of {}:\n{}",
                    marks.len(),
                    disk_count + tap_count,
                    vm.messages()
                ));
            }
            if round > 0 {
                samples.push(marks);
            }
        }
    }
    phases("one device alone", [&samples[0], &samples[1]], runs);
    phases("one disk and one card at once", [&samples[2]; 2], runs);
    side_by_side(&shapes, &samples, runs);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default().to_owned();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{processors} processors, load {load} (the bench's own included)");
    Ok(())
}

/// How far the steps of several devices overlap, and what each adds.
fn side_by_side(shapes: &[(usize, usize)], samples: &[Vec<Vec<(String, Marks)>>], runs: usize) {
    println!(
        "\ndevices side by side, medians of {runs} interleaved runs, ms from the first request to the last process that serves"
    );
    println!(
        "{:<16} {:>8} {:>20} {:>10} {:>14} {:>22}",
        "devices", "wall", "one after another", "overlap", "wall a device", "of that, for its jail"
    );
    let own: Vec<&Row> = STEPS.iter().filter(|row| row.jail).collect();
    for ((disks, cards), samples) in shapes.iter().zip(samples) {
        #[allow(clippy::cast_precision_loss)] // a handful
        let count = (disks + cards) as f64;
        let wall = |vm: &Devices| {
            let all = || vm.iter().map(|(_, marks)| marks);
            let first = all().filter_map(|m| m.get("begin")).min();
            let last = all().filter_map(|m| m.get("serving")).max();
            between(first, last)
        };
        let sum = |vm: &Devices| -> f64 {
            let each = vm
                .iter()
                .map(|(_, m)| between(m.get("begin"), m.get("serving")));
            each.sum()
        };
        let jails = |vm: &Devices| -> f64 {
            let each = vm.iter().map(|(_, marks)| {
                let rows = own.iter();
                let steps = rows.map(|row| between(marks.get(row.from), marks.get(row.end)));
                steps.sum::<f64>()
            });
            each.sum()
        };
        let median = |of: &dyn Fn(&Devices) -> f64| median(samples.iter().map(|vm| of(vm)));
        let (whole, one) = (median(&wall), median(&sum));
        let mine = median(&|vm| wall(vm) / count * jails(vm) / sum(vm));
        let name = match (disks, cards) {
            (disks, 0) => format!("{disks} disk"),
            (0, cards) => format!("{cards} card"),
            (disks, cards) => format!("{} ({disks} + {cards})", disks + cards),
        };
        println!(
            "{name:<16} {whole:>8.2} {one:>20.2} {:>9.1}x {:>14.2} {mine:>22.2}",
            one / whole,
            whole / count
        );
    }
    println!("goal for the last column: at most {GOAL}");
}

/// The table of steps of the disk in the VMs of the first samples and of the card in those of the second.
fn phases(what: &str, samples: [&Vec<Vec<(String, Marks)>>; 2], runs: usize) {
    println!(
        "\njailing {what}, ms a step, medians of {runs} runs, least in brackets (rows with * are the jail's)"
    );
    println!("{:<36} {:>18} {:>18}", "", "disk", "card");
    let line = |name: &str, rows: &[&Row], more: &str| {
        let kinds = [("disk", samples[0]), ("card", samples[1])];
        let cells = kinds.map(|(kind, samples)| {
            let sums = samples.iter().filter_map(|vm| {
                let (_, marks) = vm.iter().find(|(id, _)| id.contains(kind))?;
                let of = |row: &&Row| between(marks.get(row.from), marks.get(row.end));
                Some(rows.iter().map(of).sum::<f64>())
            });
            let sums = sorted(sums);
            let at = |at: usize| sums.get(at).copied().unwrap_or(f64::NAN);
            format!("{:.3} [{:.3}]", at(sums.len() / 2), at(0))
        });
        println!("{name:<36} {:>18} {:>18}{more}", cells[0], cells[1]);
    };
    for row in STEPS {
        let mark = if row.jail { "*" } else { " " };
        line(&format!("{mark} {}", row.name), &[row], "");
    }
    let jails: Vec<&Row> = STEPS.iter().filter(|row| row.jail).collect();
    line(
        "  the jail's steps",
        &jails,
        &format!("   goal: at most {GOAL}"),
    );
    line("  all", &STEPS.iter().collect::<Vec<_>>(), "");
}

/// Milliseconds from one mark to another.
fn between(from: Option<&u64>, to: Option<&u64>) -> f64 {
    match (from, to) {
        #[allow(clippy::cast_precision_loss)] // less than 2^52 ns
        (Some(from), Some(to)) => (*to as f64 - *from as f64) / 1e6,
        _ => f64::NAN,
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let values = sorted(values);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The marks of each device in a VM's trace: those of the broker (`device ID: jail: STEP at N ns`), and those of the process
/// itself, whose lines carry the time of day.
fn marks(log: &str) -> Result<Vec<(String, Marks)>, String> {
    let clock = |id| {
        let now = clock_gettime(id).map_err(|e| format!("clock_gettime: {e}"))?;
        Ok::<_, String>(Duration::from(now))
    };
    let ahead = clock(ClockId::CLOCK_REALTIME)?.saturating_sub(clock(ClockId::CLOCK_MONOTONIC)?);
    let mut all: BTreeMap<String, Marks> = BTreeMap::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once(" device ")
            && let Some((id, rest)) = rest.split_once(": jail: ")
            && let Some((step, at)) = rest.split_once(" at ")
            && let Some(at) = at.strip_suffix(" ns").and_then(|at| at.parse().ok())
        {
            let marks = all.entry(id.to_owned()).or_default();
            marks.insert(step.to_owned(), at);
        } else if let Some((id, rest)) = line.strip_prefix('[').and_then(|l| l.split_once("] "))
            && let Some((time, rest)) = rest.split_once(' ')
            && let Some((_, step)) = rest.split_once(": ")
            && let Some(of_day) = time_of_day(time)
        {
            const DAY: u128 = 86_400_000_000_000;
            // The monotonic clock at that time of the day that the other clock shows.
            let now = ahead.as_nanos() % DAY;
            let of_day = (of_day.as_nanos() + DAY - now) % DAY;
            let marks = all.entry(id.to_owned()).or_default();
            if let Some(begin) = marks.get("begin").copied() {
                // Both are within one day, and the process is later.
                let base = u128::from(begin) / DAY * DAY;
                let at = u64::try_from(base + of_day).unwrap_or(0);
                marks.insert(step.to_owned(), at);
            } else {
                marks.insert(format!("early {step}"), u64::try_from(of_day).unwrap_or(0));
            }
        }
    }
    Ok(all
        .into_iter()
        .map(|(id, marks)| (id, resolved(marks)))
        .filter(|(_, marks)| marks.contains_key("serving"))
        .collect())
}

/// The process may have written before its broker told when it began.
fn resolved(marks: Marks) -> Marks {
    const DAY: u64 = 86_400_000_000_000;
    let base = marks.get("begin").map_or(0, |begin| begin / DAY * DAY);
    marks
        .into_iter()
        .map(|(step, at)| match step.strip_prefix("early ") {
            Some(step) => (step.to_owned(), base + at),
            None => (step, at),
        })
        .collect()
}

/// `2026-01-31T12:00:00.000001Z`, without the day.
fn time_of_day(text: &str) -> Option<Duration> {
    let (_, time) = text.strip_suffix('Z')?.split_once('T')?;
    let (clock, micros) = time.split_once('.')?;
    let mut parts = clock.split(':').map(|part| part.parse::<u64>().ok());
    let (h, m, s) = (parts.next()??, parts.next()??, parts.next()??);
    let seconds = Duration::from_secs(h * 3600 + m * 60 + s);
    Some(seconds + Duration::from_micros(micros.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_day_are_read() {
        assert_eq!(
            time_of_day("2026-01-31T01:02:03.000004Z"),
            Some(Duration::from_micros(3_723_000_004))
        );
        assert_eq!(time_of_day("yesterday"), None);
    }

    #[test]
    fn both_writers_of_a_trace_are_understood() {
        let log = "\
x TRACE broker vmm_main::broker::devices: device dev-disk0: jail: begin at 5000 ns\n\
x TRACE broker vmm_main::broker::devices: device dev-disk0: jail: clone at 9000 ns\n\
[dev-disk0] 2026-01-31T01:02:03.000004Z TRACE block device_host::start: serving\n\
something else\n";
        let marks = marks(log).unwrap();
        assert_eq!(marks.len(), 1);
        let (id, marks) = &marks[0];
        assert_eq!(id, "dev-disk0");
        assert_eq!((marks["begin"], marks["clone"]), (5000, 9000));
        assert!(marks.contains_key("serving"));
    }
}
