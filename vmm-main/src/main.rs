//! `stratovirt`: control process and broker; see [`vmm_main::lifecycle`].

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    vmm_main::lifecycle::run(&args)
}
