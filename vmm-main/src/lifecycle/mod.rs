//! The life of one VM, from arguments to exit status.
//!
//! **Job.** Decide what this process is (a question about options, the broker, or a VM), bring the parts together in the
//! order that ARCHITECTURE.md tells, and run the main loop until the VM ends.
//!
//! **Who is not trusted.** At start nobody yet; after lock-down the guest, every device process and every client. So
//! everything that needs a right happens in [`start`], and [`event_loop`] needs none.
//!
//! **Why this way.** One thread decides about the VM's state. vCPU threads, the QMP thread and the broker send it messages;
//! nobody else pauses, resets or ends anything, so there is no lock and no order between them to get wrong.
//!
//! | file | job |
//! |---|---|
//! | `start.rs` | from spec to a machine that is ready to run |
//! | `event_loop.rs` | the main loop and the VM's state |
//! | `lockdown.rs` | what every thread gives up before the first guest instruction |
//! | `descriptors.rs` | inherited descriptors that nobody asked for |
//! | `daemon.rs` | `-daemonize` |
//! | `phases.rs` | where start-up time goes, at log level trace |
//! | `snapshot.rs` | `migrate`: a snapshot of the VM, in steps of the main loop |
//! | `incoming.rs` | `-incoming`: going on from one |
//! | `dump.rs` | `dump-guest-memory`, in steps of the main loop |
//! | `poller.rs` | the epoll of the main loop |
//! | `serial.rs` | the serial port's other end in the main loop |
//! | `hotplug.rs` | devices that come and go while the VM runs |
//! | `stand_in.rs` | who answers the driver of a card that was taken out |
//! | `tap.rs` | `netdev_replace`: a card that runs gets another tap |
//! | `supervise.rs` | device processes that die, and those that take their place |

mod daemon;
mod descriptors;
mod disk;
mod dump;
mod event_loop;
mod hotplug;
mod incoming;
mod lockdown;
mod phases;
mod poller;
mod serial;
mod snapshot;
mod stand_in;
mod start;
mod supervise;
mod tap;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use ipc::spec::vm::VmSpec;
use ipc::start::{SandboxMode, SeccompMode};

use crate::broker;
use crate::cmdline::{self, Env, Request};
use phases::Phases;

pub(crate) use descriptors::close_all_but;
pub(crate) use ipc::log::with_causes;
pub(crate) use lockdown::filter;

/// Runs this program with `args`, its own name first.
pub fn run(args: &[OsString]) -> ExitCode {
    let phases = Phases::begin();
    if let Some(channel) = broker::is_broker(args) {
        // The name in `ps` would else be "exe", after the link that was executed. Without it, nothing but that is lost.
        let _ = nix::sys::prctl::set_name(c"broker");
        return broker::run(channel);
    }
    let env = Env {
        log_level: std::env::var_os("STRATOVIRT_LOG_LEVEL"),
    };
    match cmdline::parse(args.get(1..).unwrap_or_default(), &env) {
        Ok(Request::Run(spec)) => run_vm(*spec, phases),
        Ok(Request::Usage) => print(&cmdline::usage()),
        Ok(Request::Version) => print(&cmdline::version()),
        Err(e) => fail(&e),
    }
}

fn print(text: &str) -> ExitCode {
    // A reader that has seen enough (`stratovirt --help | head -1`) is no error.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    ExitCode::SUCCESS
}

fn run_vm(spec: VmSpec, phases: Phases) -> ExitCode {
    warn_about_weak_jails(&spec);
    let ready = if spec.daemonize {
        match daemon::detach() {
            Ok(daemon::Side::Caller(status)) => return status,
            Ok(daemon::Side::Daemon(ready)) => Some(ready),
            Err(e) => return fail(&e),
        }
    } else {
        None
    };
    match start::start(spec, ready, phases) {
        Ok(vm) => vm.run(),
        Err(e) => fail(&e),
    }
}

/// Every option that weakens a jail says so, on standard error and whatever the log level.
fn warn_about_weak_jails(spec: &VmSpec) {
    let what = match spec.seccomp {
        SeccompMode::Kill => None,
        SeccompMode::Disabled => {
            Some("no process of this VM has a system call filter (-disable-seccomp)")
        }
        SeccompMode::Log => Some("system calls outside the filters are only logged (-seccomp log)"),
        SeccompMode::Trap => Some("system calls outside the filters raise SIGSYS (-seccomp trap)"),
    };
    if let Some(what) = what {
        let note = match spec.sandbox {
            SandboxMode::Strict => "; -sandbox strict does not cover this",
            SandboxMode::BestEffort => "",
        };
        tell(&format!("warning: weakened jail: {what}{note}"));
    }
}

/// Tells an error with its causes on standard error.
fn fail(error: &dyn std::error::Error) -> ExitCode {
    tell(&with_causes(error));
    ExitCode::FAILURE
}

/// One line on standard error; nobody there to read it is no reason to abort, as `eprintln!` would.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "stratovirt: {line}");
}
