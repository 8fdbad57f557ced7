//! # Calls of this very process
//!
//! **Job.** [`Machine`] for a program that is in the jail itself. **Who is not trusted.** This process.
//! **Why this way.** Each call is announced in the log before it is made, so that whoever reads the log of a process that was
//! killed knows by which call; nothing else is called between the announcement and the call.
#![allow(unsafe_code)] // system calls by number, memory by address

use super::{Machine, Stop};
use std::io::Write;

/// This process.
#[derive(Debug, Default)]
pub struct Local {
    last: Option<i64>,
    silent: bool,
}

/// What announces a call in the log.
pub const ANNOUNCEMENT: &str = "call ";

impl Local {
    /// One that announces nothing: so many calls are to come that the log would not take what matters.
    #[must_use]
    pub const fn silent() -> Self {
        Self {
            last: None,
            silent: true,
        }
    }

    fn announce(&mut self, number: i64) {
        // The log is rate limited, and a call in a loop is one line.
        if !self.silent && self.last.replace(number) != Some(number) {
            let mut line = [0u8; 32];
            let mut rest = &mut line[..];
            let _ = writeln!(rest, "{ANNOUNCEMENT}{number}");
            let left = rest.len();
            let _ = std::io::stderr().write(&line[..32 - left]);
        }
    }
}

impl Machine for Local {
    fn call(&mut self, number: i64, args: &[u64]) -> Result<u64, Stop> {
        let mut six = [0; 6];
        six[..args.len()].copy_from_slice(args);
        self.announce(number);
        // SAFETY: none that the compiler could know: this program tries what a program should not. What it breaks is itself.
        let result =
            unsafe { libc::syscall(number, six[0], six[1], six[2], six[3], six[4], six[5]) };
        if result == -1 {
            Err(Stop::Errno(nix::errno::Errno::last_raw()))
        } else {
            Ok(result as u64)
        }
    }

    fn call32(&mut self, number: u32) -> Result<u64, Stop> {
        self.announce(i64::from(number));
        let result: u64;
        // SAFETY: calls without arguments; the gate keeps all registers but the result and r8 to r11.
        unsafe {
            std::arch::asm!(
                "int 0x80",
                inlateout("rax") u64::from(number) => result,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        // The 32-bit table answers 32 bits.
        let result = result as u32 as i32;
        if (-4095..0).contains(&result) {
            Err(Stop::Errno(-result))
        } else {
            Ok(result as u64)
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<u64, Stop> {
        // The process ends with its attempt.
        Ok(Box::leak(bytes.to_vec().into_boxed_slice()).as_mut_ptr() as u64)
    }

    fn get(&mut self, address: u64, length: usize) -> Result<Vec<u8>, Stop> {
        // SAFETY: attempts read what they have put or mapped; anything else ends this process, which is then told.
        Ok(unsafe { std::slice::from_raw_parts(address as *const u8, length) }.to_vec())
    }

    fn set(&mut self, address: u64, bytes: &[u8]) -> Result<(), Stop> {
        // SAFETY: as above; nothing else refers to it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        Ok(())
    }
}
