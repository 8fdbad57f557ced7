//! Logging for all processes: one line a message, to a descriptor that was there before lock-down.
//!
//! **Job.** A sink for the `log` facade that writes to one descriptor, with time, level, process and module.
//! **Who is not trusted**: whoever caused the message. What a guest can cause goes through [`guest_warn!`](crate::guest_warn), which is
//! rate limited where it is written; control characters never reach a terminal.
//! **Why this way.** After lock-down nothing can be opened, so a sink that opens, rotates or looks the time zone up does not
//! work: this one calls `write` and `clock_gettime` only.

use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::limits::{MAX_LOG_LINE, MAX_LOG_LINES_PER_PLACE, MAX_LOG_LINES_PER_SECOND};

pub use log::{debug, error, info, trace, warn};

/// Importance of a message (manual 1.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Level {
    /// Something does not work.
    #[default]
    Error,
    /// Something is odd.
    Warn,
    /// What a manager wants to know.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Every step, with start-up phases.
    Trace,
}

impl Level {
    /// The level that the text names, as `STRATOVIRT_LOG_LEVEL` spells it.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "error" => Self::Error,
            "warn" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return None,
        })
    }

    const fn filter(self) -> log::LevelFilter {
        match self {
            Self::Error => log::LevelFilter::Error,
            Self::Warn => log::LevelFilter::Warn,
            Self::Info => log::LevelFilter::Info,
            Self::Debug => log::LevelFilter::Debug,
            Self::Trace => log::LevelFilter::Trace,
        }
    }
}

/// An error with its causes in one line; a cause that the text already contains is not repeated.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |&inner| inner.source()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

struct Sink {
    process: &'static str,
    fd: OwnedFd,
}

static SINK: OnceLock<Sink> = OnceLock::new();

/// Starts logging to `fd` as `process`. Only the first call has an effect. From then on a panic is one line of the log,
/// made without any other call: std's own message asks for the thread's id and may look for debug information in files.
pub fn init(process: &'static str, level: Level, fd: OwnedFd) {
    if SINK.set(Sink { process, fd }).is_ok()
        && let Some(sink) = SINK.get()
        && log::set_logger(sink).is_ok()
    {
        log::set_max_level(level.filter());
        std::panic::set_hook(Box::new(|panic| {
            let text = panic.payload_as_str().unwrap_or("no message");
            match panic.location() {
                Some(place) => error!("panic at {place}: {text}"),
                None => error!("panic: {text}"),
            }
        }));
    }
}

/// What is logged to, once [`init`] was called.
pub fn descriptor() -> Option<BorrowedFd<'static>> {
    SINK.get().map(|sink| sink.fd.as_fd())
}

impl log::Log for Sink {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let mut line = String::with_capacity(160);
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME);
        if let Ok(now) = now {
            push_utc(&mut line, now.tv_sec(), now.tv_nsec() / 1000);
        }
        let _ = write!(
            line,
            " {:5} {} {}: ",
            record.level(),
            self.process,
            record.target()
        );
        let text_at = line.len();
        let _ = write!(line, "{}", record.args());
        let line = printable(&line, text_at);
        // A log that cannot be written is no reason to stop: there is nobody left to tell.
        let _ = nix::unistd::write(self.fd.as_fd(), line.as_bytes());
    }

    fn flush(&self) {}
}

/// One line, ended by a newline, without control characters from `text_at` on, cut at [`MAX_LOG_LINE`] bytes.
fn printable(line: &str, text_at: usize) -> String {
    let mut out = String::with_capacity(line.len() + 1);
    for (at, c) in line.char_indices() {
        if out.len() + c.len_utf8() >= MAX_LOG_LINE {
            break;
        }
        out.push(if at >= text_at && c.is_control() {
            ' '
        } else {
            c
        });
    }
    out.push('\n');
    out
}

/// ISO 8601 in UTC with microseconds: `2026-01-31T12:00:00.000001Z`.
fn push_utc(out: &mut String, seconds: i64, micros: i64) {
    // Civil date from days since 1970-01-01, for the proleptic Gregorian calendar.
    let days = seconds.div_euclid(86_400);
    let second_of_day = seconds.rem_euclid(86_400);
    let shifted = days + 719_468; // days since 0000-03-01
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
    );
    let _ = write!(
        out,
        "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{micros:06}Z"
    );
}

/// A counter that lets [`MAX_LOG_LINES_PER_PLACE`] messages a second through, and all of a process's counters together
/// [`MAX_LOG_LINES_PER_SECOND`]; one stands at each place that logs.
#[derive(Debug, Default)]
pub struct RateLimit {
    here: Window,
    dropped: AtomicU32,
}

/// Messages of the current second.
#[derive(Debug, Default)]
struct Window {
    second: AtomicU64,
    count: AtomicU32,
}

impl Window {
    const fn new() -> Self {
        Self {
            second: AtomicU64::new(0),
            count: AtomicU32::new(0),
        }
    }

    fn has_room(&self, now: u64, most: u32) -> bool {
        if self.second.swap(now, Ordering::Relaxed) != now {
            self.count.store(0, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed) < most
    }
}

impl RateLimit {
    /// A fresh counter.
    pub const fn new() -> Self {
        Self {
            here: Window::new(),
            dropped: AtomicU32::new(0),
        }
    }

    /// Whether this message may go out, and how many were dropped before it.
    pub fn admit(&self) -> Option<u32> {
        /// All places of this process.
        static PROCESS: Window = Window::new();
        self.admit_in(&PROCESS)
    }

    /// The same with `process` for what all places have together.
    fn admit_in(&self, process: &Window) -> Option<u32> {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
            .map_or(0, |t| t.tv_sec().unsigned_abs());
        if self.here.has_room(now, MAX_LOG_LINES_PER_PLACE)
            && process.has_room(now, MAX_LOG_LINES_PER_SECOND)
        {
            Some(self.dropped.swap(0, Ordering::Relaxed))
        } else {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

/// Tells, at a level (`error`, `warn`, `info`), of something that a guest or a peer can cause as often as it likes: rate
/// limited at this place.
#[macro_export]
macro_rules! guest_log {
    ($level:ident, $($arg:tt)+) => {{
        static LIMIT: $crate::log::RateLimit = $crate::log::RateLimit::new();
        match LIMIT.admit() {
            Some(0) => $crate::log::$level!($($arg)+),
            Some(dropped) => $crate::log::$level!("{} ({dropped} similar messages dropped)", format_args!($($arg)+)),
            None => {}
        }
    }};
}

/// [`guest_log!`](crate::guest_log) at level `warn`.
#[macro_export]
macro_rules! guest_warn {
    ($($arg:tt)+) => {
        $crate::guest_log!(warn, $($arg)+)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        for (seconds, want) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000000Z"),
        ] {
            let mut out = String::new();
            push_utc(&mut out, seconds, 0);
            assert_eq!(out, want);
        }
    }

    #[test]
    fn a_panic_is_one_line_of_the_log() {
        use std::io::{BufRead, BufReader};
        let (reader, writer) = std::io::pipe().unwrap();
        init("probe", Level::Error, writer.into());
        let end = std::thread::spawn(|| panic!("told\nto")).join();
        assert!(end.is_err());
        let mut line = String::new();
        BufReader::new(reader).read_line(&mut line).unwrap();
        assert!(
            line.contains("ERROR probe ipc::log: panic at ipc/src/log.rs:"),
            "{line}"
        );
        assert!(line.ends_with(": told to\n"), "{line}");
    }

    #[test]
    fn control_characters_and_overlong_text_do_not_pass() {
        let line = printable(&format!("head\u{1b}: \u{1b}[2J\n{}", "x".repeat(5000)), 7);
        assert!(line.len() <= MAX_LOG_LINE + 1);
        assert!(line.starts_with("head\u{1b}:  [2J x"), "{line:?}");
        assert_eq!(line.matches('\n').count(), 1);
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        // Not the process's own: with plain `cargo test` that is what other tests log by at the same time.
        let process = Window::new();
        let places = [const { RateLimit::new() }; 10];
        let admitted = places.each_ref().map(|place| {
            (0..10 * MAX_LOG_LINES_PER_PLACE)
                .filter(|_| place.admit_in(&process).is_some())
                .count()
        });
        // The clock may tick over once while this runs.
        assert!(admitted[0] > 0);
        assert!(
            admitted
                .iter()
                .all(|&lines| lines <= 2 * MAX_LOG_LINES_PER_PLACE as usize)
        );
        assert!(admitted.iter().sum::<usize>() <= 2 * MAX_LOG_LINES_PER_SECOND as usize);
        assert!(
            places
                .iter()
                .all(|place| place.dropped.load(Ordering::Relaxed) > 0)
        );
    }
}
