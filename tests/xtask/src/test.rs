//! # `cargo xtask test`
//!
//! **Job.** Install what the tests need, build all programs, and run all tests, or one suite (the name of a file in
//! `tests/tests`) or one crate. **Who is not trusted.** Nobody.
//! **Why this way.** Tests find the product's programs beside themselves, so those are built first and whole; what
//! needs a Linux guest finds its own place to run, so one runner and its summary tell all.

use crate::tool;
use std::process::ExitCode;
use tests::lab::{chain, ensure_packages, place};

/// What the tests use beyond what the lab installs for itself.
const PACKAGES: &[&str] = &[
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "python3",
    "python3-venv",
];

/// How many operations the hostile guest does.
const OPERATIONS: &str = "HOSTILE_OPERATIONS";
/// How long device processes are killed.
const MINUTES: &str = "RECOVERY_MINUTES";
/// Flags of the suites of the hostile guest, of recovery and of the soak, and what they read.
const SETTINGS: &[(&str, &str)] = &[
    ("--operations", OPERATIONS),
    ("--seed", "HOSTILE_SEED"),
    ("--seed", "SOAK_SEED"),
    ("--minutes", MINUTES),
];

/// Runs the tests of the selection that take too long for every day, and says so of themselves by `#[ignore]`.
const LONG: &str = "--long";

/// Suites that are two halves of one question, the second of which comes along.
const TOGETHER: &[(&str, &str)] = &[("jail", "escape")];

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, String> {
    ensure_packages(PACKAGES).map_err(|e| chain(&e))?;
    let place = place(tests::lab::Flavour::Cloud).map_err(|e| chain(&e))?;
    eprintln!("tests with Linux guests: {place:?}");

    let mut select: Vec<String> = Vec::new();
    let mut filters: Vec<String> = Vec::new();
    let mut settings: Vec<(&str, String)> = Vec::new();
    let mut ignored = false;
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut variables = SETTINGS
            .iter()
            .filter(|(flag, _)| flag == argument)
            .peekable();
        if variables.peek().is_some() {
            let value = arguments.next().and_then(|text| text.parse::<u64>().ok());
            let value = value.ok_or_else(|| format!("{argument} takes a number"))?;
            settings.extend(variables.map(|(_, variable)| (*variable, value.to_string())));
            continue;
        }
        if argument == LONG {
            ignored = true;
            continue;
        }
        let root = tool::root();
        if root.join(format!("tests/tests/{argument}.rs")).exists() {
            let more = TOGETHER.iter().filter(|(suite, _)| suite == argument);
            let suites = std::iter::once(argument.as_str()).chain(more.map(|(_, with)| *with));
            select.extend(["-p".into(), "tests".into()]);
            select.extend(suites.flat_map(|suite| ["--test".into(), suite.to_owned()]));
        } else if select.is_empty() && filters.is_empty() && is_crate(argument) {
            select.extend(["-p".into(), argument.clone()]);
        } else {
            filters.push(argument.clone());
        }
    }
    if select.is_empty() {
        select.push("--workspace".into());
    }
    // A run that was asked for by its length may take long, tells its figures, and is one of what ships.
    let counted = settings
        .iter()
        .any(|(name, _)| [OPERATIONS, MINUTES].contains(name));
    if counted {
        let programs = tool::build_release()?.display().to_string();
        settings.push(("STRATOVIRT_BIN_DIR", programs));
    } else {
        tool::run(&mut tool::cargo(&["build", "--workspace", "--bins"]))?;
    }
    let mut runner = Vec::new();
    if tool::has_subcommand("nextest") {
        runner.extend(["nextest", "run"]);
        if counted || ignored {
            runner.extend(["--profile", "long", "--success-output", "final"]);
        }
        if ignored {
            runner.extend(["--run-ignored", "only"]);
        }
    } else {
        runner.extend(["test", "--no-fail-fast"]);
        if ignored {
            filters.extend(["--".into(), "--ignored".into()]);
        }
    }
    tool::run(
        tool::cargo(&runner)
            .args(&select)
            .args(&filters)
            .envs(settings),
    )?;
    Ok(ExitCode::SUCCESS)
}

fn is_crate(name: &str) -> bool {
    let mut command = tool::cargo(&["pkgid", "-p", name]);
    command.output().is_ok_and(|o| o.status.success())
}
