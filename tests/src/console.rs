//! # A console as a stream of events
//!
//! **Job.** Read what a guest or a program writes, wait for a text in it, and type into it.
//! **Who is not trusted.** The writer: its bytes are kept raw, and there is a cap on what is kept.
//! **Why this way.** Each text is looked for behind the last one found, so a test reads as the story that the
//! console tells, and a text that came early is not found twice.

use crate::wait::{Deadline, readable};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// More than this from one console is a fault of the test or of the guest, in bytes.
const KEPT: usize = 64 << 20;

/// Why a text did not come.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The time is over.
    #[error("no {wanted} within {limit:?}; the console's last lines:\n{last}")]
    Late {
        /// What was waited for.
        wanted: String,
        /// For how long.
        limit: Duration,
        /// What the console showed last.
        last: String,
    },
    /// The other side has closed.
    #[error("the console was closed before {wanted}; its last lines:\n{last}")]
    Closed {
        /// What was waited for.
        wanted: String,
        /// What the console showed last.
        last: String,
    },
    /// The other side wrote too much.
    #[error("the console wrote more than {KEPT} bytes")]
    TooMuch,
    /// Reading or writing failed.
    #[error("the console")]
    Io(#[from] io::Error),
}

/// One console.
#[derive(Debug)]
pub struct Console {
    input: File,
    output: Option<File>,
    bytes: Vec<u8>,
    seen: usize,
}

impl Console {
    /// A console that is read from `input` and typed into through `output`.
    #[must_use]
    pub fn new(input: impl Into<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self {
            input: File::from(input.into()),
            output: output.map(File::from),
            bytes: Vec::new(),
            seen: 0,
        }
    }

    /// Waits for `text` behind the last one found, and returns all that came before it.
    ///
    /// # Errors
    /// When it does not come within `limit`, or the console closes first.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String, ConsoleError> {
        self.wait_for_any(&[text], limit).map(|(_, before)| before)
    }

    /// Waits for the earliest of `texts`, and returns which one came and all that came before it.
    ///
    /// # Errors
    /// As [`Self::wait_for`].
    pub fn wait_for_any(
        &mut self,
        texts: &[&str],
        limit: Duration,
    ) -> Result<(usize, String), ConsoleError> {
        let deadline = Deadline::after(limit);
        let mut from = self.seen;
        loop {
            let found = texts
                .iter()
                .enumerate()
                .filter_map(|(i, t)| {
                    find(&self.bytes[from..], t.as_bytes()).map(|at| (from + at, i))
                })
                .min();
            if let Some((at, which)) = found {
                let before = String::from_utf8_lossy(&self.bytes[self.seen..at]).into_owned();
                self.seen = at + texts[which].len();
                return Ok((which, before));
            }
            // A text may be split over two reads, so the next search starts a little before the end.
            let longest = texts.iter().map(|t| t.len()).max().unwrap_or(1);
            from = self.bytes.len().saturating_sub(longest).max(self.seen);
            match self.more(deadline)? {
                More::Some => {}
                More::End => {
                    return Err(ConsoleError::Closed {
                        wanted: quote(texts),
                        last: self.last_lines(),
                    });
                }
                More::Late => {
                    return Err(ConsoleError::Late {
                        wanted: quote(texts),
                        limit,
                        last: self.last_lines(),
                    });
                }
            }
        }
    }

    /// If `text` has come already behind the last one found, all that came before it; what comes later is not waited for.
    ///
    /// # Errors
    /// As [`Self::wait_for`], but for its limit.
    pub fn poll_for(&mut self, text: &str) -> Result<Option<String>, ConsoleError> {
        match self.wait_for(text, Duration::ZERO) {
            Ok(before) => Ok(Some(before)),
            Err(ConsoleError::Late { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The rest of the line behind the last text found.
    ///
    /// # Errors
    /// As [`Self::wait_for`].
    pub fn rest_of_line(&mut self, limit: Duration) -> Result<String, ConsoleError> {
        self.wait_for("\n", limit)
            .map(|l| l.trim_end_matches('\r').to_owned())
    }

    /// Waits until the other side closes, and returns all that came since the last text found.
    ///
    /// # Errors
    /// When it does not close within `limit`.
    pub fn wait_end(&mut self, limit: Duration) -> Result<String, ConsoleError> {
        let deadline = Deadline::after(limit);
        loop {
            match self.more(deadline)? {
                More::Some => {}
                More::End => {
                    let rest = String::from_utf8_lossy(&self.bytes[self.seen..]).into_owned();
                    self.seen = self.bytes.len();
                    return Ok(rest);
                }
                More::Late => {
                    return Err(ConsoleError::Late {
                        wanted: "end".into(),
                        limit,
                        last: self.last_lines(),
                    });
                }
            }
        }
    }

    /// Types `text`.
    ///
    /// # Errors
    /// When the console cannot be written or takes no input.
    pub fn send(&mut self, text: &str) -> Result<(), ConsoleError> {
        let output = self
            .output
            .as_mut()
            .ok_or_else(|| io::Error::other("this console takes no input"))?;
        output.write_all(text.as_bytes())?;
        Ok(())
    }

    /// Closes the typing side, as the end of a user's input does.
    pub fn close_input(&mut self) {
        self.output = None;
    }

    /// Reads what there is, past what was kept: for a terminal that shows the console as it is. 0 is the end.
    ///
    /// # Errors
    /// When the console cannot be read.
    pub fn read_available(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.seen < self.bytes.len() {
            let kept = &self.bytes[self.seen..];
            let count = kept.len().min(to.len());
            to[..count].copy_from_slice(&kept[..count]);
            self.seen += count;
            return Ok(count);
        }
        match self.input.read(to) {
            Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(0),
            other => other,
        }
    }

    /// All that came so far.
    #[must_use]
    pub fn transcript(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    fn last_lines(&self) -> String {
        let text = self.transcript();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    fn more(&mut self, deadline: Deadline) -> Result<More, ConsoleError> {
        if readable(&[self.input.as_fd()], deadline)?.is_none() {
            return Ok(More::Late);
        }
        let mut chunk = [0; 16 << 10];
        let count = match self.input.read(&mut chunk) {
            Ok(count) => count,
            // The master side of a terminal reports the end of the other side this way.
            Err(e) if e.raw_os_error() == Some(libc::EIO) => 0,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(More::Some);
            }
            Err(e) => return Err(e.into()),
        };
        if count == 0 {
            return Ok(More::End);
        }
        if self.bytes.len() + count > KEPT {
            return Err(ConsoleError::TooMuch);
        }
        self.bytes.extend_from_slice(&chunk[..count]);
        Ok(More::Some)
    }
}

impl AsFd for Console {
    /// The side that is read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }
}

enum More {
    Some,
    End,
    Late,
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len().max(1))
        .position(|w| w == needle)
}

fn quote(texts: &[&str]) -> String {
    texts
        .iter()
        .map(|t| format!("{t:?}"))
        .collect::<Vec<_>>()
        .join(" or ")
}

#[cfg(test)]
mod tests {
    use super::{Console, ConsoleError};
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn texts_are_found_in_order_and_once() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut console = Console::new(reader, None);
        writer.write_all(b"one two one").unwrap();
        drop(writer);
        let limit = Duration::from_secs(5);
        assert_eq!(console.wait_for("one", limit).unwrap(), "");
        assert_eq!(console.wait_for("one", limit).unwrap(), " two ");
        assert!(matches!(
            console.wait_for("one", limit),
            Err(ConsoleError::Closed { .. })
        ));
    }

    #[test]
    fn a_silent_console_is_late() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut console = Console::new(reader, None);
        assert!(matches!(
            console.wait_for("x", Duration::from_millis(1)),
            Err(ConsoleError::Late { .. })
        ));
    }
}
