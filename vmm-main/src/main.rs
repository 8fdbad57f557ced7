//! `stratovirt`: control process and broker; see [`vmm_main::lifecycle`].

use std::process::ExitCode;

fn main() -> ExitCode {
    one_heap();
    let args: Vec<_> = std::env::args_os().collect();
    vmm_main::lifecycle::run(&args)
}

/// Threads here allocate next to nothing, but libc would give each vCPU an arena of its own: address space to map, pages to
/// touch, and calls that its filter would have to allow.
#[allow(unsafe_code)] // libc's tunables
fn one_heap() {
    // SAFETY: no other thread exists yet, and the call only sets a number.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
