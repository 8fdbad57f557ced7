//! # `cargo xtask check`
//!
//! **Job.** Formatting, lints, licences and the project's own rules, each as a program.
//! **Who is not trusted.** Nobody. **Why this way.** All rules run before it fails, so one run tells everything.

use crate::{rules, tool};
use std::process::ExitCode;

pub(crate) fn run() -> Result<ExitCode, String> {
    let mut failures = Vec::new();
    let mut step = |name: &str, result: Result<(), String>| {
        match &result {
            Ok(()) => eprintln!("check: {name}: ok"),
            Err(message) => eprintln!("check: {name}: {message}"),
        }
        if result.is_err() {
            failures.push(name.to_owned());
        }
    };
    step(
        "format",
        tool::run(&mut tool::cargo(&["fmt", "--all", "--check"])),
    );
    step(
        "format of the fuzz targets",
        tool::run(tool::cargo(&["fmt", "--check"]).current_dir(tool::root().join("tests/fuzz"))),
    );
    let clippy = [
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    step("lints", tool::run(&mut tool::cargo(&clippy)));
    // Both pages come from tables of the product, which only the product's own tests can read.
    let pages = [
        "test",
        "--quiet",
        "--package",
        "vmm-main",
        "--lib",
        "--",
        "the_page_in_docs_is_the_generated_one",
        "the_manual_page_is_that_of_the_table",
    ];
    step("generated pages", tool::run(&mut tool::cargo(&pages)));
    if tool::has_subcommand("deny") {
        step(
            "cargo-deny",
            tool::run(&mut tool::cargo(&[
                "deny",
                "--offline",
                "check",
                "licenses",
                "bans",
                "sources",
            ])),
        );
    }
    for (name, rule) in rules::ALL {
        step(name, rule());
    }
    if failures.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    Err(format!("failed: {}", failures.join(", ")))
}
