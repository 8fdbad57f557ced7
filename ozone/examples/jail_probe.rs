//! A device process for the live tests: locks its jail, installs a filter and does what it is told.
//!
//! Descriptor 3 is a stream socket. Argument 1 says what to do:
//! `serve` locks, filters, writes the jail's report and waits for the stream's end;
//! `open` serves the same, then waits for one byte, without a filter, for looking at from outside;
//! `crash` locks and filters, then reads memory that is not there;
//! `panic` locks and filters, then panics;
//! `start` writes the monotonic time at which `main` began, and ends.

use nix::sys::socket::{MsgFlags, recvmsg};
use ozone::{Sandbox, inner};
use seccomp_policies::{Action, Policy, install};
use std::{
    env,
    fs::File,
    io::{IoSliceMut, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::ExitCode,
};

fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    time.map_or(0, |t| {
        t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
    })
}

fn main() -> ExitCode {
    let begun = now();
    let Some(what) = env::args().nth(1) else {
        return ExitCode::from(2);
    };
    // Everything goes through descriptor 3; the standard streams are whatever the test gave.
    #[allow(unsafe_code)]
    // SAFETY: the starter passes this descriptor to us alone.
    let mut link = File::from(unsafe { OwnedFd::from_raw_fd(3) });
    let done = match what.as_str() {
        "start" => link.write_all(&begun.to_ne_bytes()),
        "open" | "serve" | "crash" | "panic" => {
            let jailed = match inner::lock(Sandbox::BestEffort, inner::Root::Empty) {
                Ok(jailed) => jailed,
                Err(error) => {
                    let _ = writeln!(link, "refused: {error}");
                    return ExitCode::FAILURE;
                }
            };
            if what != "open"
                && let Err(error) = install(Policy::Template, Action::Kill)
            {
                let _ = writeln!(link, "refused: {error}");
                return ExitCode::FAILURE;
            }
            if what == "crash" {
                let nowhere = 0x1000 as *const u8;
                #[allow(unsafe_code)]
                // SAFETY: none; nothing is mapped there, and dying of it is what this is for.
                std::hint::black_box(unsafe { nowhere.read_volatile() });
            }
            if what == "panic" {
                // As ipc's log does it: std's own message makes calls that no policy allows.
                std::panic::set_hook(Box::new(|panic| {
                    let text = panic.payload_as_str().unwrap_or_default();
                    let _ = nix::unistd::write(std::io::stderr(), text.as_bytes());
                }));
                panic!("told to");
            }
            // recvmsg, since a device has no read.
            writeln!(link, "jailed: {}", jailed.report()).and_then(|()| {
                let mut byte = [0];
                let mut buffers = [IoSliceMut::new(&mut byte)];
                let flags = MsgFlags::empty();
                recvmsg::<()>(link.as_raw_fd(), &mut buffers, None, flags)?;
                Ok(())
            })
        }
        _ => return ExitCode::from(2),
    };
    if done.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
