//! # The project's own commands
//!
//! **Job.** `cargo xtask COMMAND`: one file per command, and this table. **Who is not trusted.** Nobody; this runs
//! as the developer. **Why this way.** Rules and recipes that are programs can be run, tested and kept true.

mod bench;
mod check;
mod demo;
mod dependencies;
mod fuzz;
mod lab;
mod named_tests;
mod policy;
mod policy_audit;
mod rules;
mod test;
mod tool;

use std::process::ExitCode;

type Command = fn(&[String]) -> Result<ExitCode, String>;

const COMMANDS: &[(&str, &str, Command)] = &[
    (
        "demo",
        "boot a guest with a disk and a network card, show every process's jail, leave you in its shell: demo [--check]",
        demo::run,
    ),
    (
        "test",
        "run all tests, or those of a suite or a crate: test [SUITE|CRATE] [FILTER…] [--long] [--operations N] [--seed N]",
        test::run,
    ),
    (
        "bench",
        "measure start-up beside other VMMs on PATH: bench startup [--runs N] [--only NAME,…] [--no-net], or the shared folder: bench fs [--rounds N] [--only TEXT] [--virtiofsd PROGRAM] [--inodes N] …, or a disk: bench block [--quick] [--all] [--only TEXT] [--direct] [--socket PATH] …, or a card: bench net …; of this one alone: bench jail|restore|recovery [--runs N], bench shares [--vms N] [--seconds N]",
        bench::run,
    ),
    (
        "check",
        "formatting, lints and the project's own rules",
        check::run,
    ),
    (
        "policy",
        "print the system call policies: policy [POLICY…|--table], put the table into README: --write, run suites and look for rules that nothing uses: --audit [--run FILTER] [--keep FILE] [--with FILE] [-- COMMAND…]",
        policy::run,
    ),
    (
        "fuzz",
        "run the fuzz targets of tests/fuzz: fuzz [--seconds N] [--target NAME]… [--planted]",
        fuzz::run,
    ),
    (
        "lab",
        "run a command where Linux guests boot: lab [--kernel full] [--mem MIB] [--smp N] [--timeout S] [--share DIR] [--qemu ARG] [--nested] [--where] -- COMMAND…",
        lab::run,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = arguments.split_first() else {
        usage();
        return ExitCode::from(2);
    };
    if ["help", "--help", "-h"].contains(&name.as_str()) {
        usage();
        return ExitCode::SUCCESS;
    }
    let Some((_, _, command)) = COMMANDS.iter().find(|(n, _, _)| n == name) else {
        eprintln!("xtask: there is no command {name:?}");
        usage();
        return ExitCode::from(2);
    };
    command(rest).unwrap_or_else(|message| {
        eprintln!("xtask {name}: {message}");
        ExitCode::FAILURE
    })
}

fn usage() {
    eprintln!("usage: cargo xtask COMMAND [ARGUMENTS]");
    for (name, help, _) in COMMANDS {
        eprintln!("  {name:<8} {help}");
    }
}
