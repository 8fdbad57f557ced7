//! What a device process logs, on its way to the log of whoever started it.
//!
//! **Job.** Lines from a pipe to a descriptor, each with the device's id before it.
//! **Who is not trusted.** The device process: its lines are cut, cleaned of control characters and rate limited, so that none can
//! pass for another process's or reach a terminal as a command.
//! **Why this way.** The process gets a pipe only, never the log itself.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::limits::MAX_LOG_LINE;
use crate::log::RateLimit;

/// The log pipe of one device process.
#[derive(Debug)]
pub struct LogLines {
    /// Id of the device. Each of its lines begins with it, so that none can pass for another process's.
    id: String,
    pipe: File,
    open: bool,
    partial: Vec<u8>,
    last: String,
    limit: RateLimit,
}

impl LogLines {
    /// Lines of device `id` come from `pipe`, which should not block.
    #[must_use]
    pub fn new(id: &str, pipe: OwnedFd) -> Self {
        Self {
            id: id.to_owned(),
            pipe: pipe.into(),
            open: true,
            partial: Vec::new(),
            last: String::new(),
            limit: RateLimit::new(),
        }
    }

    /// Moves what is in the pipe to the log, line by line; at most one pipe's worth, so that a flood cannot hold the loop.
    pub fn relay(&mut self, log: Option<BorrowedFd<'_>>) {
        let mut buffer = [0u8; 4096];
        for _ in 0..16 {
            match self.pipe.read(&mut buffer) {
                Ok(0) => {
                    self.open = false;
                    break;
                }
                Ok(len) => {
                    for &byte in &buffer[..len] {
                        self.take(byte, log);
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if !self.open && !self.partial.is_empty() {
            self.take(b'\n', log);
        }
    }

    /// What to wait for; `None` once the pipe's other end is closed.
    #[must_use]
    pub fn pipe(&self) -> Option<BorrowedFd<'_>> {
        self.open.then(|| self.pipe.as_fd())
    }

    /// The last line, which is then forgotten.
    pub fn take_last(&mut self) -> String {
        std::mem::take(&mut self.last)
    }

    fn take(&mut self, byte: u8, log: Option<BorrowedFd<'_>>) {
        if byte != b'\n' {
            if self.partial.len() < MAX_LOG_LINE {
                self.partial.push(byte);
            }
            return;
        }
        let line: String = String::from_utf8_lossy(&self.partial)
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        self.partial.clear();
        if let (Some(dropped), Some(log)) = (self.limit.admit(), log) {
            let note = if dropped > 0 {
                format!(" ({dropped} lines dropped before)")
            } else {
                String::new()
            };
            let _ = nix::unistd::write(log, format!("[{}] {line}{note}\n", self.id).as_bytes());
        }
        self.last = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn log_lines_are_cut_and_cleaned() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (mut out, log) = std::io::pipe().unwrap();
        let log = OwnedFd::from(log);
        let mut lines = LogLines::new("d0", OwnedFd::from(reader));
        writer.write_all(b"one\x1b[31m\n").unwrap();
        writer.write_all(&[b'x'; 3 * MAX_LOG_LINE]).unwrap();
        drop(writer);
        lines.relay(Some(log.as_fd()));
        drop(log);
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        let mut got = text.lines();
        assert_eq!(got.next(), Some("[d0] one [31m"));
        assert_eq!(got.next().map(str::len), Some("[d0] ".len() + MAX_LOG_LINE));
        assert_eq!(got.next(), None);
        assert_eq!(lines.last.len(), MAX_LOG_LINE);
    }
}
