//! The command line of a stand-alone device: what all of them have in common.
//!
//! **Job.** Words to values by a table, without any I/O; the help text from the same table; the options of socket, log and jail.
//! **Who is not trusted.** Nobody; but nothing that is asked for is silently ignored: what cannot be done is an error that says
//! what is possible.
//! **Why this way.** Options take one dash or two, and a value after a space or '=': QEMU's programs are started one way and
//! stratovirt the other.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::str::FromStr;

use ipc::log::Level;
use ipc::start::{SandboxMode, SeccompMode};
use thiserror::Error;

use super::Socket;
use super::program::Command;

/// What is wrong with the arguments.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UsageError {
    /// An option that is not in the table.
    #[error("{0}: no such option (--help lists them)")]
    Unknown(String),
    /// A word that is no option.
    #[error("{0}: not an option; {1}")]
    Operand(String, &'static str),
    /// More than once.
    #[error("--{0} is given twice")]
    Twice(&'static str),
    /// Nothing follows.
    #[error("--{0} needs a value: {1}")]
    NoValue(&'static str, &'static str),
    /// A value that is not possible.
    #[error("--{option} {value}: {allowed}")]
    Wrong {
        /// Its name.
        option: &'static str,
        /// The value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// What the device cannot do without.
    #[error("--{0} is missing: {1}")]
    Missing(&'static str, &'static str),
    /// Nobody could connect.
    #[error("--socket-path or --fd is missing: where the front end connects")]
    NoSocket,
    /// Two that contradict each other.
    #[error("--{0} and --{1} exclude each other")]
    Conflict(&'static str, &'static str),
    /// One without the other.
    #[error("--{0} needs --{1}")]
    Needs(&'static str, &'static str),
}

/// `value` is not possible for `option`.
pub fn wrong(option: &'static str, value: &str, allowed: impl Into<String>) -> UsageError {
    UsageError::Wrong {
        option,
        value: value.to_owned(),
        allowed: allowed.into(),
    }
}

/// What follows an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// `on` or `off`; `on` without a value.
    Switch,
    /// What, for messages and help.
    Value(&'static str),
    /// Nothing at all.
    Nothing,
    /// The same as another one.
    Alias(&'static str),
}

/// Name without dashes, what follows it, and what it means.
pub type Definition = (&'static str, Takes, &'static str);

/// Options of every stand-alone device.
#[rustfmt::skip]
pub const COMMON: &[Definition] = &[
    ("socket-path", Takes::Value("PATH"), "listen for the front end on a unix socket at PATH"),
    ("socket-group", Takes::Value("GROUP"), "members of this group may connect to --socket-path too"),
    ("fd", Takes::Value("NUMBER"), "use an inherited socket, listening or connected, instead of --socket-path"),
    ("keep", Takes::Nothing, "wait for another front end when one has left"),
    ("D", Takes::Value("FILE"), "append messages to FILE instead of standard error"),
    ("log-level", Takes::Value("LEVEL"), "error, warn (default), info, debug or trace"),
    ("sandbox", Takes::Value("MODE"), "strict: refuse to serve when the host cannot give a layer of the jail; best-effort (default): say so"),
    ("seccomp", Takes::Value("ACTION"), "on a system call that is not expected: kill (default), trap, log, or allow (no filter)"),
    ("print-capabilities", Takes::Nothing, "what management tools ask for, as JSON"),
    ("help", Takes::Nothing, "this text"),
    ("version", Takes::Nothing, "the version"),
    ("h", Takes::Alias("help"), ""),
    ("V", Takes::Alias("version"), ""),
];

/// A line for each option of `own` and [`COMMON`] that is no alias.
#[must_use]
pub fn help(own: &[Definition]) -> String {
    let mut lines = Vec::new();
    for (name, takes, what) in own.iter().chain(COMMON) {
        let value = match takes {
            Takes::Nothing => String::new(),
            Takes::Switch => "[=on|off]".to_owned(),
            Takes::Value(value) => format!(" {value}"),
            Takes::Alias(_) => continue,
        };
        lines.push((format!("--{name}{value}"), what));
    }
    let width = lines.iter().map(|(option, _)| option.len()).max();
    let width = width.unwrap_or_default();
    let mut text = String::new();
    for (option, what) in lines {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {option:<width$}  {what}");
    }
    text
}

/// The options that were given, with their values.
#[derive(Debug)]
pub struct Given(BTreeMap<&'static str, String>);

impl Given {
    /// Reads `arguments`, which are those of `own` and [`COMMON`]. `hint` says how what is served is named, for a word that is no
    /// option.
    ///
    /// # Errors
    /// [`UsageError`]
    pub fn collect(
        own: &[Definition],
        hint: &'static str,
        arguments: impl Iterator<Item = String>,
    ) -> Result<Self, UsageError> {
        let mut given = BTreeMap::new();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let Some(word) = argument.strip_prefix('-') else {
                return Err(UsageError::Operand(argument, hint));
            };
            let word = word.strip_prefix('-').unwrap_or(word);
            let (word, inline) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word, None),
            };
            let find = |word: &str| {
                let mut all = own.iter().chain(COMMON);
                all.find(|(known, _, _)| *known == word)
            };
            let found = match find(word) {
                Some((_, Takes::Alias(other), _)) => find(other),
                found => found,
            };
            let Some((name, takes, _)) = found else {
                return Err(UsageError::Unknown(argument));
            };
            let value = match (takes, inline) {
                (Takes::Nothing, Some(value)) => {
                    return Err(wrong(name, &value, "it takes no value"));
                }
                (Takes::Nothing | Takes::Alias(_), _) => String::new(),
                (Takes::Switch, inline) => inline.unwrap_or_else(|| "on".to_owned()),
                (Takes::Value(what), inline) => inline
                    .or_else(|| arguments.next())
                    .ok_or(UsageError::NoValue(name, what))?,
            };
            if given.insert(*name, value).is_some() {
                return Err(UsageError::Twice(name));
            }
        }
        Ok(Self(given))
    }

    /// What is asked about the program itself, if anything: then nothing else needs to be right.
    #[must_use]
    pub fn question<O>(&self) -> Option<Command<O>> {
        if self.has("help") {
            Some(Command::Help)
        } else if self.has("version") {
            Some(Command::Version)
        } else if self.has("print-capabilities") {
            Some(Command::Capabilities)
        } else {
            None
        }
    }

    /// Whether it was given.
    #[must_use]
    pub fn has(&self, option: &str) -> bool {
        self.0.contains_key(option)
    }

    /// Its value.
    #[must_use]
    pub fn text(&self, option: &str) -> Option<&str> {
        self.0.get(option).map(String::as_str)
    }

    /// A path, which is not empty.
    ///
    /// # Errors
    /// [`UsageError::Wrong`]
    pub fn path(&self, option: &'static str) -> Result<Option<PathBuf>, UsageError> {
        match self.text(option) {
            Some("") => Err(wrong(option, "", "a path")),
            value => Ok(value.map(PathBuf::from)),
        }
    }

    /// One of several words.
    ///
    /// # Errors
    /// [`UsageError::Wrong`]
    pub fn choice<T: Copy>(
        &self,
        option: &'static str,
        choices: &[(&str, T)],
        default: T,
    ) -> Result<T, UsageError> {
        let Some(value) = self.text(option) else {
            return Ok(default);
        };
        let found = choices.iter().find(|(name, _)| *name == value);
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let words: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            wrong(option, value, format!("one of {}", words.join(", ")))
        })
    }

    /// `on` or `off`; off by default.
    ///
    /// # Errors
    /// [`UsageError::Wrong`]
    pub fn switch(&self, option: &'static str) -> Result<bool, UsageError> {
        self.choice(option, &[("on", true), ("off", false)], false)
    }

    /// A number in `range`.
    ///
    /// # Errors
    /// [`UsageError::Wrong`]
    pub fn number<T: FromStr + PartialOrd + std::fmt::Display + Copy>(
        &self,
        option: &'static str,
        range: RangeInclusive<T>,
        default: T,
    ) -> Result<T, UsageError> {
        let Some(value) = self.text(option) else {
            return Ok(default);
        };
        match value.parse() {
            Ok(number) if range.contains(&number) => Ok(number),
            _ => Err(wrong(
                option,
                value,
                format!("a number from {} to {}", range.start(), range.end()),
            )),
        }
    }

    /// A power of two in `range`.
    ///
    /// # Errors
    /// [`UsageError::Wrong`]
    pub fn power_of_two(
        &self,
        option: &'static str,
        range: RangeInclusive<u16>,
        default: u16,
    ) -> Result<u16, UsageError> {
        let number = self.number(option, range.clone(), default)?;
        if number.is_power_of_two() {
            return Ok(number);
        }
        Err(wrong(
            option,
            &number.to_string(),
            format!("a power of two from {} to {}", range.start(), range.end()),
        ))
    }
}

/// Where the front end comes from, where messages go, and how strict the jail is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Common {
    /// `--socket-path`, `--socket-group` or `--fd`
    pub socket: Socket,
    /// `-D`
    pub log: Option<PathBuf>,
    /// `--log-level`
    pub log_level: Level,
    /// `--seccomp`
    pub seccomp: SeccompMode,
    /// `--sandbox`
    pub sandbox: SandboxMode,
    /// `--keep`
    pub keep: bool,
}

impl Common {
    /// The options of [`COMMON`].
    ///
    /// # Errors
    /// [`UsageError`]
    pub fn of(given: &Given) -> Result<Self, UsageError> {
        let socket = match (given.path("socket-path")?, given.has("fd")) {
            (Some(_), true) => return Err(UsageError::Conflict("socket-path", "fd")),
            (Some(path), false) => {
                Socket::Path(path, given.text("socket-group").map(str::to_owned))
            }
            (None, true) => Socket::Fd(given.number("fd", 3..=RawFd::MAX, 3)?),
            (None, false) => return Err(UsageError::NoSocket),
        };
        if given.has("socket-group") && given.has("fd") {
            return Err(UsageError::Needs("socket-group", "socket-path"));
        }
        Ok(Self {
            socket,
            log: given.path("D")?,
            log_level: match given.text("log-level") {
                None => Level::Warn,
                Some(name) => Level::from_name(name).ok_or_else(|| {
                    wrong("log-level", name, "one of error, warn, info, debug, trace")
                })?,
            },
            seccomp: given.choice(
                "seccomp",
                &[
                    ("kill", SeccompMode::Kill),
                    ("trap", SeccompMode::Trap),
                    ("log", SeccompMode::Log),
                    ("allow", SeccompMode::Disabled),
                ],
                SeccompMode::Kill,
            )?,
            sandbox: given.choice(
                "sandbox",
                &[
                    ("strict", SandboxMode::Strict),
                    ("best-effort", SandboxMode::BestEffort),
                ],
                SandboxMode::BestEffort,
            )?,
            keep: given.has("keep"),
        })
    }

    /// Where messages go.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open_log(&self) -> Result<OwnedFd, LogError> {
        let Some(path) = &self.log else {
            return io::stderr()
                .as_fd()
                .try_clone_to_owned()
                .map_err(|e| LogError("standard error".into(), e));
        };
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map(OwnedFd::from)
            .map_err(|e| LogError(path.clone(), e))
    }
}

/// Messages have no place to go.
#[derive(Debug, Error)]
#[error("-D {}", .0.display())]
pub struct LogError(PathBuf, #[source] io::Error);
