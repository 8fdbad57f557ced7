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

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The project's own commands. Each explains itself: cargo xtask COMMAND --help.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Options),
    Test(test::Options),
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Formatting, lints, licences and the project's own rules.
    Check,
    Policy(policy::Options),
    Fuzz(fuzz::Options),
    Lab(lab::Options),
}

fn main() -> ExitCode {
    let outcome = match Line::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(which) => bench::run(&which),
        Command::Check => check::run(),
        Command::Policy(options) => policy::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Lab(options) => lab::run(options),
    };
    outcome.unwrap_or_else(|message| {
        let command = std::env::args().nth(1).unwrap_or_default();
        eprintln!("xtask {command}: {message}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_one_that_can_be_read() {
        Line::command().debug_assert();
    }

    #[test]
    fn lines_that_documents_show_are_read() {
        for line in [
            "demo",
            "demo --check",
            "test",
            "test linux reboot",
            "test hostile_guest --operations 10000000 --seed 7",
            "test soak --long --minutes 10",
            "test verify --long --mib 48",
            "bench startup --runs 3 --only stratovirt,Firecracker --no-net",
            "bench fs --only read --plot x.svg",
            "bench net --help",
            "bench shares --vms 4 --seconds 3",
            "policy --audit --keep used -- cargo nextest run -p block",
            "fuzz --seconds 5 --target snapshot --target qcow2",
            "lab --kernel full --mem 2048 --qemu -s -- sh -c 'uname -a'",
            "lab uname -a",
        ] {
            let words = ["cargo xtask"].into_iter().chain(line.split(' '));
            assert!(Line::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn a_number_out_of_its_range_is_told_with_the_range() {
        let told = |line: &str| {
            let words = ["cargo xtask"].into_iter().chain(line.split(' '));
            Line::try_parse_from(words).unwrap_err().to_string()
        };
        assert!(told("fuzz --seconds 0").contains("0 is not in 1..=86400"));
        assert!(told("test verify --long --mib 4").contains("4 is not in 48..=1048576"));
        assert!(told("lab --mem 4").contains("4 is not in 512..=65536"));
        assert!(told("bench shares --vms 65").contains("65 is not in 1..=64"));
        assert!(told("policy --keep x").contains("--audit"));
    }
}
