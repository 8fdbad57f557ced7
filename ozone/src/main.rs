//! `ozone`: puts a whole VM into its outer jail. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ozone::cli::run(std::env::args_os().skip(1).collect())
}
