//! # `cargo xtask fuzz`
//!
//! **Job.** Builds the targets in `tests/fuzz` with coverage and AddressSanitizer, runs each for some seconds on as many
//! processors as there are, and prints executions, coverage and new crashes. A crash fails the command.
//! **Who is not trusted.** The inputs that it makes up. **Why this way.** The layout is cargo-fuzz's, so `cargo fuzz run`
//! works as well; but cargo-fuzz wants a nightly compiler, and the stable one brings the same sanitizer, which
//! `RUSTC_BOOTSTRAP` lets this build, and no other, use.

use crate::tool;
use ::tests::lab::{chain, ensure_packages};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread;

/// What cargo-fuzz passes to the compiler. Without `+crt-static`: the sanitizer needs a loader.
const RUSTFLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0 \
    -Zsanitizer=address -Cdebug-assertions -Ccodegen-units=1 --cfg fuzzing";
/// Bytes of an input at most; a target says itself if it takes less. The largest first input, a snapshot with one vCPU, fits.
const MAX_LEN: u32 = 12 << 10;
/// Seconds for one input: none takes a tenth of one.
const TIMEOUT: u32 = 10;
/// Megabytes of one target: a parser that allocates by what it reads gets there.
const MEMORY: u32 = 2048;

/// Run the fuzz targets of tests/fuzz; a crash fails.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds for each target.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// Only this one; may be given again.
    #[arg(long = "target", value_name = "NAME")]
    targets: Vec<String>,
    /// Build with a defect in each target, and fail if it is not found.
    #[arg(long)]
    planted: bool,
}

/// What became of one target.
struct Outcome {
    target: String,
    executed: u64,
    per_second: u64,
    edges: u64,
    corpus: u64,
    /// Reason and file of a crash.
    crash: Option<(String, PathBuf)>,
    /// Its end was none of libFuzzer's.
    failure: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    if !(has_program("c++") || has_program("clang++")) {
        ensure_packages(&["g++"]).map_err(|e| chain(&e))?;
    }
    let folder = tool::root().join("tests/fuzz");
    let all = targets(&folder)?;
    let mut chosen: Vec<String> = all.clone();
    if !options.targets.is_empty() {
        if let Some(unknown) = options.targets.iter().find(|t| !all.contains(t)) {
            return Err(format!("--target {unknown}: one of {}", all.join(", ")));
        }
        chosen.clone_from(&options.targets);
    }
    let programs = build(&folder, options.planted)?;
    let made = tempfile::tempdir().map_err(|e| format!("a scratch folder: {e}"))?;
    tool::run(Command::new(programs.join("examples/seeds")).arg(made.path()))?;

    let queue = Mutex::new(chosen.iter().rev().cloned().collect::<Vec<_>>());
    let outcomes = Mutex::new(Vec::new());
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().map_or(None, |mut queue| queue.pop());
                    let Some(target) = next else { break };
                    let outcome = fuzz(&folder, &programs, made.path(), &target, options);
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.push(outcome);
                    }
                }
            });
        }
    });
    let mut outcomes = outcomes
        .into_inner()
        .map_err(|_| "a thread of this program panicked")?
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    outcomes.sort_by_key(|o| chosen.iter().position(|t| *t == o.target));
    print!("{}", table(&outcomes));
    if outcomes.len() != chosen.len() {
        return Err("a target was not run".into());
    }
    let failed = |o: &&Outcome| o.failure.is_some() || o.crash.is_some() != options.planted;
    let bad: Vec<&str> = outcomes
        .iter()
        .filter(failed)
        .map(|o| o.target.as_str())
        .collect();
    match (bad.is_empty(), options.planted) {
        (true, _) => Ok(ExitCode::SUCCESS),
        (false, false) => Err(format!("inputs that crash: {}", bad.join(", "))),
        (false, true) => Err(format!(
            "the planted input was not found in {} s: {}",
            options.seconds,
            bad.join(", ")
        )),
    }
}

fn has_program(name: &str) -> bool {
    let found = Command::new(name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    found.is_ok_and(|status| status.success())
}

/// Names of the targets: the programs in `fuzz_targets`.
fn targets(folder: &Path) -> Result<Vec<String>, String> {
    let dir = folder.join("fuzz_targets");
    let entries = fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    if names.is_empty() {
        return Err(format!("{}: no targets", dir.display()));
    }
    Ok(names)
}

/// Builds all targets and the seed maker; gives the folder of the programs.
fn build(folder: &Path, planted: bool) -> Result<PathBuf, String> {
    let target = folder.join("target");
    let mut command = tool::cargo(&["build", "--release", "--bins", "--examples"]);
    command
        .args(["--target", tool::TARGET])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(folder)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", RUSTFLAGS);
    if planted {
        command.args(["--features", "planted"]);
    }
    tool::run(&mut command)?;
    Ok(target.join(tool::TARGET).join("release"))
}

fn fuzz(
    folder: &Path,
    programs: &Path,
    made: &Path,
    target: &str,
    options: &Options,
) -> Result<Outcome, String> {
    let root = if options.planted { made } else { folder };
    let artifacts = root.join("artifacts").join(target);
    // A corpus that has grown may hold the planted input already: then finding it would prove nothing.
    let corpus = root.join("corpus").join(target);
    for dir in [&artifacts, &corpus] {
        fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    let before = files(&artifacts);
    let mut command = Command::new(programs.join(target));
    command
        .arg(&corpus)
        .arg(made.join("seeds").join(target))
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-max_len={MAX_LEN}"))
        .arg(format!("-timeout={TIMEOUT}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-detect_leaks=0"])
        // Where the target may write, if it locks itself in.
        .env("FUZZ_FOLDER", root)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null());
    // Inputs that were found once stay in the repository.
    let kept = folder.join("seeds").join(target);
    if kept.is_dir() && !options.planted {
        command.arg(kept);
    }
    let dictionary = made.join("dictionaries").join(target);
    if dictionary.exists() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    let output = command
        .output()
        .map_err(|e| format!("cannot start {target}: {e}"))?;
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let log_file = artifacts.join("log");
    fs::write(&log_file, &log).map_err(|e| format!("{}: {e}", log_file.display()))?;
    let crash = files(&artifacts)
        .into_iter()
        .find(|file| !before.contains(file) && *file != log_file)
        .map(|file| (reason(&log), file));
    let failure = (!output.status.success() && crash.is_none()).then(|| {
        format!(
            "{target} ended with {}; see {}",
            output.status,
            log_file.display()
        )
    });
    Ok(read_log(target, &log, crash, failure))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map_or_else(
        |_| Vec::new(),
        |entries| entries.filter_map(|e| Some(e.ok()?.path())).collect(),
    )
}

/// The line that says why: a panic's message, or the sanitizer's.
fn reason(log: &str) -> String {
    let mut lines = log.lines();
    let found = lines.find(|l| l.contains("panicked at") || l.contains("ERROR:"));
    let Some(found) = found else {
        return "no reason given".into();
    };
    if found.contains("panicked at") {
        return format!("{} {}", found.trim(), lines.next().unwrap_or_default());
    }
    found.trim().to_owned()
}

fn number_after(line: &str, label: &str) -> Option<u64> {
    let rest = line.split_once(label)?.1.trim_start();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn read_log(
    target: &str,
    log: &str,
    crash: Option<(String, PathBuf)>,
    failure: Option<String>,
) -> Outcome {
    let last = |label: &str| log.lines().rev().find_map(|l| number_after(l, label));
    Outcome {
        target: target.to_owned(),
        executed: last("stat::number_of_executed_units:").unwrap_or(0),
        per_second: last("stat::average_exec_per_sec:").unwrap_or(0),
        edges: last(" cov:").unwrap_or(0),
        corpus: last(" corp:").unwrap_or(0),
        crash,
        failure,
    }
}

fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "{:<12} {:>12} {:>9} {:>7} {:>7}  crashes\n",
        "target", "executions", "a second", "edges", "corpus"
    );
    for o in outcomes {
        let state = match (&o.crash, &o.failure) {
            (Some((why, file)), _) => format!("{}\n    {why}", file.display()),
            (None, Some(why)) => why.clone(),
            (None, None) => "none".into(),
        };
        let _ = writeln!(
            text,
            "{:<12} {:>12} {:>9} {:>7} {:>7}  {state}",
            o.target, o.executed, o.per_second, o.edges, o.corpus
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read() {
        let log = "INFO: Loaded 1 modules   (9000 inline 8-bit counters)\n\
            #2\tINITED cov: 7 ft: 8 corp: 1/1b exec/s: 0\n\
            #99\tDONE   cov: 841 ft: 1949 corp: 184/5297b lim: 814 exec/s: 15905 rss: 346Mb\n\
            stat::number_of_executed_units: 143149\n\
            stat::average_exec_per_sec:     15905\n";
        let outcome = read_log("x", log, None, None);
        assert_eq!(
            (
                outcome.executed,
                outcome.per_second,
                outcome.edges,
                outcome.corpus
            ),
            (143_149, 15_905, 841, 184)
        );
        let log =
            "x\nthread '<unnamed>' panicked at src/a.rs:1:2:\nplanted: b\n==1== ERROR: libFuzzer";
        assert!(reason(log).ends_with("planted: b"), "{}", reason(log));
    }
}
