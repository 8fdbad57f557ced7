//! # `cargo xtask test`
//!
//! **Job.** Install what the tests need, build all programs, and run all tests, or one suite (the name of a file in
//! `tests/tests`) or one crate. **Who is not trusted.** Nobody.
//! **Why this way.** Tests find the product's programs beside themselves, so those are built first and whole; what
//! needs a Linux guest finds its own place to run, so one runner and its summary tell all.

use crate::{rules, tool};
use ::tests::lab::{Flavour, chain, ensure_packages, place};
use std::fs;
use std::process::ExitCode;

/// What the tests use beyond what the lab installs for itself.
const PACKAGES: &[&str] = &[
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "python3",
    "python3-venv",
];

/// Run all tests, or those of a suite or a crate.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Suites (the files in tests/tests) or one crate, then parts of tests' names; all tests without.
    #[arg(value_name = "SUITE|CRATE|FILTER")]
    words: Vec<String>,
    /// Those of the selection that take too long for every day.
    #[arg(long)]
    long: bool,
    /// How many operations the hostile guest does, and inodes are looked up.
    #[arg(long, value_name = "N")]
    operations: Option<u64>,
    /// What chance begins with, in the suites of the hostile guest and of the soak.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How long device processes are killed, in the suites of recovery and of the soak.
    #[arg(long, value_name = "N")]
    minutes: Option<u64>,
    /// MiB that the suite `verify` writes to all its disks together.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(48..=1 << 20))]
    mib: Option<u64>,
}

impl Options {
    /// What the suites read.
    fn variables(&self) -> Vec<(&'static str, String)> {
        [
            ("HOSTILE_OPERATIONS", self.operations),
            ("HOSTILE_SEED", self.seed),
            ("SOAK_SEED", self.seed),
            ("RECOVERY_MINUTES", self.minutes),
            ("VERIFY_MIB", self.mib),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?.to_string())))
        .collect()
    }

    /// A run that was asked for by its length may take long, tells its figures, and is one of what ships.
    fn is_counted(&self) -> bool {
        self.operations.is_some() || self.minutes.is_some() || self.mib.is_some()
    }
}

/// Suites that are two halves of one question, the second of which comes along.
const TOGETHER: &[(&str, &str)] = &[("jail", "escape")];

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    let selection = Selection::of(&options.words)?;
    ensure_packages(PACKAGES).map_err(|e| chain(&e))?;
    let place = place(Flavour::Cloud).map_err(|e| chain(&e))?;
    eprintln!("tests with Linux guests: {place:?}");

    let mut variables = options.variables();
    if options.is_counted() {
        let programs = tool::build_release()?.display().to_string();
        variables.push(("STRATOVIRT_BIN_DIR", programs));
    } else {
        tool::run(&mut tool::cargo(&["build", "--workspace", "--bins"]))?;
    }
    let mut command = if tool::has_subcommand("nextest") {
        let mut command = tool::cargo(&["nextest", "run"]);
        if options.is_counted() || options.long {
            command.args(["--profile", "long", "--success-output", "final"]);
        }
        if options.long {
            command.args(["--run-ignored", "only"]);
        }
        command.args(&selection.packages).args(&selection.filters);
        command
    } else {
        let mut command = tool::cargo(&["test", "--no-fail-fast"]);
        command.args(&selection.packages).args(&selection.filters);
        if options.long {
            command.args(["--", "--ignored"]);
        }
        command
    };
    tool::run(command.envs(variables))?;
    Ok(ExitCode::SUCCESS)
}

/// What of the tests is run, in cargo's words.
#[derive(Debug, PartialEq, Eq)]
struct Selection {
    packages: Vec<String>,
    filters: Vec<String>,
}

impl Selection {
    /// A word that is no suite, no crate and in no test's name is told before anything is built.
    fn of(words: &[String]) -> Result<Self, String> {
        let mut packages: Vec<String> = Vec::new();
        let mut filters: Vec<String> = Vec::new();
        for word in words {
            if suites()?.contains(word) {
                let more = TOGETHER.iter().filter(|(suite, _)| suite == word);
                let chosen = std::iter::once(word.as_str()).chain(more.map(|(_, with)| *with));
                packages.extend(["-p".into(), "tests".into()]);
                packages.extend(chosen.flat_map(|suite| ["--test".into(), suite.to_owned()]));
            } else if packages.is_empty() && filters.is_empty() && is_crate(word) {
                packages.extend(["-p".into(), word.clone()]);
            } else if is_in_a_name(word)? {
                filters.push(word.clone());
            } else {
                return Err(format!(
                    "there is no suite, crate or test named {word:?}; the suites are: {}",
                    suites()?.join(", ")
                ));
            }
        }
        if packages.is_empty() {
            packages.push("--workspace".into());
        }
        Ok(Self { packages, filters })
    }
}

/// The files in `tests/tests`, by name.
fn suites() -> Result<Vec<String>, String> {
    let folder = tool::root().join("tests/tests");
    let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "rs"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn is_crate(name: &str) -> bool {
    let mut command = tool::cargo(&["pkgid", "-p", name]);
    command.output().is_ok_and(|o| o.status.success())
}

/// Whether a function or a module of the sources has `word` in its name; of `module::test` the last part has to.
fn is_in_a_name(word: &str) -> Result<bool, String> {
    let word = word.rsplit("::").next().unwrap_or(word);
    let has = |text: &str| {
        text.lines().any(|line| {
            let line = line.trim_start();
            let name = line.strip_prefix("fn ").or(line.strip_prefix("mod "));
            name.is_some_and(|name| name.split('(').next().is_some_and(|n| n.contains(word)))
        })
    };
    let sources = rules::sources()?;
    Ok(sources
        .iter()
        .any(|file| fs::read_to_string(file).is_ok_and(|text| has(&text))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(line: &str) -> Result<Selection, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Selection::of(&words)
    }

    fn is(selection: &Selection, packages: &str, filters: &str) -> bool {
        selection.packages.join(" ") == packages && selection.filters.join(" ") == filters
    }

    #[test]
    fn suites_crates_and_parts_of_names_are_told_apart() {
        let all = selection("").unwrap();
        assert!(is(&all, "--workspace", ""), "{all:?}");
        let both = selection("jail").unwrap();
        assert!(
            is(&both, "-p tests --test jail --test escape", ""),
            "{both:?}"
        );
        let one = selection("linux reboot").unwrap();
        assert!(is(&one, "-p tests --test linux", "reboot"), "{one:?}");
        let own = selection("xtask told_apart").unwrap();
        assert!(is(&own, "-p xtask", "told_apart"), "{own:?}");
    }

    #[test]
    fn a_word_that_is_nothing_of_all_that_is_told_with_the_suites() {
        let told = selection("nonesuch").unwrap_err();
        assert!(
            told.contains("\"nonesuch\"") && told.contains("snapshot, soak"),
            "{told}"
        );
    }
}
