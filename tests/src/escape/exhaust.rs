//! # Wasting what the host has
//!
//! **Job.** What a process can use up that stays in its jail: memory, descriptors, processor time, the log, the disk.
//! **Who is not trusted.** The process. **Why this way.** Each of these goes on until the kernel says no or the suite has seen
//! enough and ends the VM; what it cost the host is measured from outside.

use super::{Held, Machine, Stop};
use libc::*;

/// Why a waste could not begin.
#[derive(Debug, thiserror::Error)]
#[error("neither an attempt nor a waste is called {0}")]
pub struct Unknown(String);

/// Whether `what` is a way to waste.
#[must_use]
pub fn is_waste(what: &str) -> bool {
    what.starts_with("waste-")
}

/// Wastes in the way that `what` names, and tells in the end how much there was.
///
/// # Errors
/// There is no such way.
pub fn run(what: &str, m: &mut dyn Machine, held: &Held, say: fn(&str)) -> Result<(), Unknown> {
    match what {
        "waste-nothing" => nothing(m, held),
        "waste-memory" => memory(m, say),
        "waste-descriptors" => descriptors(m, held, say),
        "waste-processor" => processor(say),
        "waste-log" => log(m, held),
        "waste-disk" => disk(m, held, say),
        "waste-flushes" => flushes(m, held),
        "waste-processes" => processes(m, say),
        "waste-shared-memory" => shared_memory(m, say),
        other => return Err(Unknown(other.to_owned())),
    }
    Ok(())
}

/// Told once everything is used up; the process then holds on to it.
pub const HOLDS: &str = "holds";

fn hold(say: fn(&str), text: &str) {
    say(&format!("{HOLDS} {text}\n"));
    // Until it is killed, without a call that a filter could mind.
    loop {
        std::hint::spin_loop();
    }
}

/// Waits for a message that does not come.
fn nothing(m: &mut dyn Machine, held: &Held) {
    if let Ok(message) = m.put(&[0; 56]) {
        while m
            .call(SYS_recvmsg, &[held.socket as u64, message, 0])
            .is_ok_and(|length| length > 0)
        {}
    }
}

/// Private memory, each page written.
fn memory(m: &mut dyn Machine, say: fn(&str)) {
    const STEP: u64 = 1 << 20;
    let protection = (PROT_READ | PROT_WRITE) as u64;
    let flags = (MAP_PRIVATE | MAP_ANONYMOUS) as u64;
    let mut held = 0u64;
    let refusal = loop {
        match m.call(SYS_mmap, &[0, STEP, protection, flags, u64::MAX, 0]) {
            Ok(at) => {
                for page in (0..STEP).step_by(4096) {
                    if m.set(at + page, &[1]).is_err() {
                        return;
                    }
                }
                held += STEP;
                // Far beyond any limit that there should be, and not yet the end of the host.
                if held >= 4 << 30 {
                    break 0;
                }
            }
            Err(Stop::Errno(errno)) => break errno,
            Err(Stop::Gone) => return,
        }
    };
    hold(say, &format!("{held} bytes, errno {refusal}"));
}

/// Descriptors by duplication.
fn descriptors(m: &mut dyn Machine, held: &Held, say: fn(&str)) {
    let mut count = 0u64;
    let refusal = loop {
        match m.call(SYS_fcntl, &[held.log as u64, F_DUPFD_CLOEXEC as u64, 0]) {
            Ok(_) if count < 1 << 20 => count += 1,
            Ok(_) => break 0,
            Err(Stop::Errno(errno)) => break errno,
            Err(Stop::Gone) => return,
        }
    };
    hold(say, &format!("{count} descriptors, errno {refusal}"));
}

fn processor(say: fn(&str)) {
    hold(say, "a processor");
}

/// Lines for the log without a pause: the pipe does not block.
fn log(m: &mut dyn Machine, held: &Held) {
    let mut line = vec![b'x'; 200];
    line.push(b'\n');
    let Ok(at) = m.put(&line) else { return };
    while m.call(SYS_write, &[held.log as u64, at, line.len() as u64]) != Err(Stop::Gone) {}
}

/// `struct iovec` of `length` bytes of the letter `Z`, for the call that a disk's process has for writes.
fn piece(m: &mut dyn Machine, length: usize) -> Result<u64, Stop> {
    let bytes = m.put(&vec![0x5a; length])?;
    let words = [bytes, length as u64];
    let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    m.put(&words)
}

/// The image, far behind the size that it had.
fn disk(m: &mut dyn Machine, held: &Held, say: fn(&str)) {
    let Ok(piece) = piece(m, 1 << 20) else {
        return;
    };
    let mut end = 0u64;
    let refusal = loop {
        match m.call(SYS_pwritev, &[held.backend as u64, piece, 1, end, 0]) {
            Ok(0) => break 0,
            Ok(length) => {
                end += length;
                if end >= 1 << 30 {
                    break 0;
                }
            }
            Err(Stop::Errno(errno)) => break errno,
            Err(Stop::Gone) => return,
        }
    };
    hold(say, &format!("{end} bytes, errno {refusal}"));
}

/// A write and a flush, without a pause.
fn flushes(m: &mut dyn Machine, held: &Held) {
    let Ok(piece) = piece(m, 4096) else { return };
    loop {
        for (number, args) in [
            (SYS_pwritev, &[held.backend as u64, piece, 1, 0, 0][..]),
            (SYS_fdatasync, &[held.backend as u64][..]),
        ] {
            if m.call(number, args) == Err(Stop::Gone) {
                return;
            }
        }
    }
}

/// Children that do nothing, until there may be no more. Without the filter only.
fn processes(m: &mut dyn Machine, say: fn(&str)) {
    let mut count = 0u64;
    let refusal = loop {
        // pause(2) is the child's whole life.
        match m.call(SYS_fork, &[]) {
            Ok(0) => {
                while m.call(SYS_pause, &[]) != Err(Stop::Gone) {}
                return;
            }
            Ok(_) if count < 10_000 => count += 1,
            Ok(_) => break 0,
            Err(Stop::Errno(errno)) => break errno,
            Err(Stop::Gone) => return,
        }
    };
    hold(say, &format!("{count} processes, errno {refusal}"));
}

/// Memory in files of its own, which no limit of memory counts. Without the filter only.
fn shared_memory(m: &mut dyn Machine, say: fn(&str)) {
    let (Ok(name), Ok(at)) = (m.put(b"waste\0"), m.put(&vec![1; 1 << 20])) else {
        return;
    };
    let (mut count, mut bytes) = (0u64, 0u64);
    let refusal = loop {
        let fd = match m.call(SYS_memfd_create, &[name, 0]) {
            Ok(fd) => fd,
            Err(Stop::Errno(errno)) => break errno,
            Err(Stop::Gone) => return,
        };
        count += 1;
        while let Ok(length) = m.call(SYS_write, &[fd, at, 1 << 20]) {
            bytes += length;
            if bytes >= 2 << 30 {
                break;
            }
        }
        if bytes >= 2 << 30 {
            break 0;
        }
    };
    hold(
        say,
        &format!("{bytes} bytes in {count} files, errno {refusal}"),
    );
}
