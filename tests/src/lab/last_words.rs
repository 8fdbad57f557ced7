//! # What a nested machine that hangs was at
//!
//! **Job.** Tell a test that waits too long from a machine that stands still, and get out of the latter what can be got: L1's kernel
//! by an NMI, on which it panics and prints its log, each task's stack and each processor's; else QEMU's processors and threads.
//! **Who is not trusted.** Nobody, but everything here may hang as well, so each step has a limit.
//! **Why this way.** A kernel answers an NMI whatever it is at. One that does not is not being emulated any more: then nothing was found
//! out about what ran in it, which is neither a pass nor a failure.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::wait::{Deadline, readable};

/// What L1 says over its status port while it lives.
pub(super) const BEAT: &str = "beat";
/// Seconds between two of them.
pub(super) const BEAT_EVERY: u32 = 5;
/// How long L1 may say nothing; its boot, on a busy host, is the longest pause.
pub(super) const SILENCE: Duration = Duration::from_secs(90);
/// How long a machine that hangs may take to tell what it was at.
const PANIC: Duration = Duration::from_secs(60);
/// How long QEMU may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Why no status came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// L1 lives, or what it said is wrong.
    Told(String),
    /// L1 ended by itself.
    Ended,
    /// Nothing came for [`SILENCE`].
    Silent,
}

/// Waits for the line with the status. Without a limit, the machine may be silent as well.
pub(super) fn status(port: &mut UnixStream, limit: Option<Duration>) -> Result<i32, Lost> {
    const YEAR: Duration = Duration::from_secs(365 * 86400);
    let end = Deadline::after(limit.unwrap_or(YEAR));
    let silence = limit.map_or(YEAR, |_| SILENCE);
    let mut line = Vec::new();
    loop {
        let next = Deadline::after(silence.min(end.left()));
        match readable(&[port.as_fd()], next) {
            Err(error) => return Err(Lost::Told(format!("cannot be watched ({error})"))),
            Ok(None) if end.left().is_zero() => {
                let limit = limit.unwrap_or_default();
                return Err(Lost::Told(format!("took longer than {limit:?}")));
            }
            Ok(None) => return Err(Lost::Silent),
            Ok(Some(_)) => {}
        }
        let mut chunk = [0; 64];
        let count = port.read(&mut chunk).unwrap_or(0);
        if count == 0 {
            return Err(Lost::Ended);
        }
        line.extend_from_slice(&chunk[..count]);
        while let Some(end) = line.iter().position(|&b| b == b'\n') {
            let text: Vec<u8> = line.drain(..=end).collect();
            let text = String::from_utf8_lossy(&text).trim().to_owned();
            if text != BEAT {
                let no_status = |_| Lost::Told(format!("gave {text:?} as the command's status"));
                return text.parse().map_err(no_status);
            }
        }
    }
}

/// Sends the NMI. `Ok` when L1's kernel answered it: its last words are among its output then. Else what QEMU tells of itself.
pub(super) fn ask(port: &mut UnixStream, monitor: &mut UnixStream, pid: u32) -> Result<(), String> {
    let asked = monitor.write_all(
        br#"{"execute":"qmp_capabilities"}{"execute":"human-monitor-command","arguments":{"command-line":"info registers -a"}}{"execute":"inject-nmi"}"#,
    );
    if asked.is_ok() && panicked(port) {
        return Ok(());
    }
    let mut told = match asked {
        Ok(()) => format!("QEMU's monitor: {}\n", answers(monitor)),
        Err(error) => format!("QEMU's monitor cannot be written to: {error}\n"),
    };
    told.push_str(&threads(pid));
    Err(told)
}

/// Whether the machine ends: it does so when its kernel panics.
fn panicked(port: &mut UnixStream) -> bool {
    let end = Deadline::after(PANIC);
    let mut chunk = [0; 64];
    while let Ok(Some(_)) = readable(&[port.as_fd()], end) {
        // Beats that were under way.
        if port.read(&mut chunk).unwrap_or(0) == 0 {
            return true;
        }
    }
    false
}

fn answers(monitor: &mut UnixStream) -> String {
    let end = Deadline::after(ANSWER);
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(Some(_)) = readable(&[monitor.as_fd()], end) {
        match monitor.read(&mut chunk) {
            Ok(count) if count > 0 => text.extend_from_slice(&chunk[..count]),
            _ => break,
        }
    }
    if text.is_empty() {
        return "no answer".into();
    }
    String::from_utf8_lossy(&text).replace("\\r\\n", "\n")
}

/// The threads of a process: name, state, processor time in ticks, and where in the kernel each one waits.
fn threads(pid: u32) -> String {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return format!("process {pid} is gone\n");
    };
    let mut text = String::new();
    for task in tasks.flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        // proc(5): state and times are fields 3, 14 and 15; the name before them may hold anything.
        let stat = read("stat");
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_whitespace()
            .collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or("?");
        text.push_str(&format!(
            "QEMU's thread {} {}: state {}, ticks {} + {}, in {}\n{}",
            task.file_name().display(),
            read("comm").trim(),
            field(3),
            field(14),
            field(15),
            read("wchan"),
            read("stack"),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_told_from_beats_silence_and_the_end() {
        let limit = Some(Duration::from_millis(50));
        let (mut port, mut machine) = UnixStream::pair().unwrap();
        machine.write_all(b"beat\nbeat\n3\n").unwrap();
        assert_eq!(status(&mut port, limit), Ok(3));
        machine.write_all(b"beat\n").unwrap();
        let late = Lost::Told("took longer than 50ms".into());
        assert_eq!(status(&mut port, limit), Err(late));
        machine.write_all(b"beats\n").unwrap();
        let wrong = Lost::Told("gave \"beats\" as the command's status".into());
        assert_eq!(status(&mut port, limit), Err(wrong));
        drop(machine);
        assert_eq!(status(&mut port, limit), Err(Lost::Ended));
    }

    #[test]
    fn a_process_is_told_by_its_threads() {
        let told = threads(std::process::id());
        assert!(told.contains("state R"), "{told}");
        assert!(threads(u32::MAX).contains("is gone"));
    }
}
