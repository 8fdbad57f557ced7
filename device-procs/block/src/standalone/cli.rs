//! The command line of a stand-alone disk.
//!
//! **Job.** Arguments to [`Options`], without any I/O; the help text from the same table.
//! **Who is not trusted.** Nobody; but nothing that is asked for is silently ignored: what cannot be done is an error that says
//! what is possible.
//! **Why this way.** Names are those of `-drive` and `-device`; those of QEMU's vhost-user-blk programs (`--blk-file`, `--read-only`,
//! `--print-capabilities`) mean the same here, so that what starts one of them can start this one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use device_host::alone::Socket;
use ipc::limits::{
    BLOCK_ID_BYTES, DEFAULT_QUEUE_SIZE, MAX_BLOCK_QUEUES, MAX_DISK_QUEUE_SIZE, MAX_IOPS,
    MAX_POLL_US,
};
use ipc::log::Level;
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes, ImageFormat, OnError};
use ipc::start::{SandboxMode, SeccompMode};
use thiserror::Error;

use crate::device::MIN_QUEUE_SIZE;

/// Everything that can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) file: PathBuf,
    pub(super) socket: Socket,
    pub(super) disk: BlockSpec,
    pub(super) log: Option<PathBuf>,
    pub(super) log_level: Level,
    pub(super) seccomp: SeccompMode,
    pub(super) sandbox: SandboxMode,
    pub(super) keep: bool,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Serve a disk.
    Serve(Box<Options>),
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// `--print-capabilities`
    Capabilities,
}

/// What is wrong with the arguments.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum UsageError {
    #[error("{0}: no such option (--help lists them)")]
    Unknown(String),
    #[error("{0}: not an option; the image is given by --file")]
    Operand(String),
    #[error("--{0} is given twice")]
    Twice(&'static str),
    #[error("--{0} needs a value: {1}")]
    NoValue(&'static str, &'static str),
    #[error("--{option} {value}: {allowed}")]
    Wrong {
        option: &'static str,
        value: String,
        allowed: String,
    },
    #[error("--file is missing: the image to serve")]
    NoFile,
    #[error("--socket-path or --fd is missing: where the front end connects")]
    NoSocket,
    #[error("--{0} and --{1} exclude each other")]
    Conflict(&'static str, &'static str),
    #[error("--{0} needs --{1}")]
    Needs(&'static str, &'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// `on` or `off`; `on` without a value.
    Switch,
    /// What, for messages and help.
    Value(&'static str),
    /// Nothing at all.
    Nothing,
    /// The same as another one.
    Alias(&'static str),
}

#[rustfmt::skip]
const OPTIONS: &[(&str, Takes, &str)] = &[
    ("file", Takes::Value("IMAGE"), "the raw image or block device to serve"),
    ("socket-path", Takes::Value("PATH"), "listen for the front end on a unix socket at PATH"),
    ("socket-group", Takes::Value("GROUP"), "members of this group may connect to --socket-path too"),
    ("fd", Takes::Value("NUMBER"), "use an inherited socket, listening or connected, instead of --socket-path"),
    ("readonly", Takes::Switch, "the guest can only read, and so can the process"),
    ("direct", Takes::Switch, "O_DIRECT: not through the host's page cache (default: off)"),
    ("aio", Takes::Value("HOW"), "native (default): io_uring where the host has it; io_uring: or not at all; off: one request after the other"),
    ("num-queues", Takes::Value("NUMBER"), "queues that a front end may use: 1 to 32 (default: 32)"),
    ("queue-size", Takes::Value("NUMBER"), "entries of a queue at most: a power of two from 4 to 1024 (default: 256)"),
    ("serial", Takes::Value("TEXT"), "serial number, at most 20 bytes"),
    ("discard", Takes::Value("HOW"), "unmap: the guest can give space back; ignore (default)"),
    ("detect-zeroes", Takes::Value("HOW"), "writes of zeroes: off (default): are writes; on: mark a range; unmap: free it if --discard=unmap"),
    ("iops-total", Takes::Value("NUMBER"), "requests a second on average, over all queues; 0 (default) for no limit"),
    ("poll-us", Takes::Value("NUMBER"), "microseconds to look for work before sleeping: 0 to 200 (default: 20)"),
    ("werror", Takes::Value("HOW"), "a write that the host fails: report (default) or ignore"),
    ("rerror", Takes::Value("HOW"), "a read that the host fails: report (default) or ignore"),
    ("keep", Takes::Nothing, "wait for another front end when one has left"),
    ("D", Takes::Value("FILE"), "append messages to FILE instead of standard error"),
    ("log-level", Takes::Value("LEVEL"), "error, warn (default), info, debug or trace"),
    ("sandbox", Takes::Value("MODE"), "strict: refuse to serve when the host cannot give a layer of the jail; best-effort (default): say so"),
    ("seccomp", Takes::Value("ACTION"), "on a system call that is not expected: kill (default), trap, log, or allow (no filter)"),
    ("print-capabilities", Takes::Nothing, "what management tools ask for, as JSON"),
    ("help", Takes::Nothing, "this text"),
    ("version", Takes::Nothing, "the version"),
    ("blk-file", Takes::Alias("file"), ""),
    ("read-only", Takes::Alias("readonly"), ""),
    ("throttling.iops-total", Takes::Alias("iops-total"), ""),
    ("h", Takes::Alias("help"), ""),
    ("V", Takes::Alias("version"), ""),
];

/// The answer to `--print-capabilities` (QEMU's conventions for back-end programs).
pub(super) const CAPABILITIES: &str =
    "{\n  \"type\": \"block\",\n  \"features\": [\"read-only\", \"blk-file\"]\n}";

/// The text of `--help`.
pub(super) fn help() -> String {
    let mut text = String::from(
        "usage: block --file IMAGE --socket-path PATH [OPTIONS]\n\
         Serves a disk to a virtual machine over vhost-user (stratovirt, QEMU, and others). The process that does it is in a jail.\n\
         Values follow after a space or '='; switches take on or off.\n\n",
    );
    for (name, takes, what) in OPTIONS {
        let value = match takes {
            Takes::Nothing => String::new(),
            Takes::Switch => "[=on|off]".to_owned(),
            Takes::Value(value) => format!(" {value}"),
            Takes::Alias(_) => continue,
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {:<24} {what}", format!("--{name}{value}"));
    }
    text.push_str(
        "\nA guest of QEMU, whose memory must be shared:\n  \
         block --file disk.img --socket-path disk.sock &\n  \
         qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\\n    \
         -chardev socket,id=c,path=disk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=c …\n",
    );
    text
}

type Given = BTreeMap<&'static str, String>;

fn collect(arguments: impl Iterator<Item = String>) -> Result<Given, UsageError> {
    let mut given = Given::new();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let Some(word) = argument.strip_prefix('-') else {
            return Err(UsageError::Operand(argument));
        };
        let word = word.strip_prefix('-').unwrap_or(word);
        let (word, inline) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word, None),
        };
        let find = |word: &str| OPTIONS.iter().find(|(known, _, _)| *known == word);
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
        if given.insert(name, value).is_some() {
            return Err(UsageError::Twice(name));
        }
    }
    Ok(given)
}

fn wrong(option: &'static str, value: &str, allowed: impl Into<String>) -> UsageError {
    UsageError::Wrong {
        option,
        value: value.to_owned(),
        allowed: allowed.into(),
    }
}

/// Takes one of several words.
fn choice<T: Copy>(
    given: &Given,
    option: &'static str,
    choices: &[(&str, T)],
    default: T,
) -> Result<T, UsageError> {
    let Some(value) = given.get(option) else {
        return Ok(default);
    };
    let found = choices.iter().find(|(name, _)| name == value);
    found.map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        wrong(option, value, format!("one of {}", words.join(", ")))
    })
}

fn switch(given: &Given, option: &'static str) -> Result<bool, UsageError> {
    choice(given, option, &[("on", true), ("off", false)], false)
}

fn number<T: FromStr + PartialOrd + std::fmt::Display + Copy>(
    given: &Given,
    option: &'static str,
    range: std::ops::RangeInclusive<T>,
    default: T,
) -> Result<T, UsageError> {
    let Some(value) = given.get(option) else {
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

/// Understands the arguments after the program's name.
pub(super) fn parse(arguments: impl Iterator<Item = String>) -> Result<Command, UsageError> {
    let given = collect(arguments)?;
    let has = |option| given.contains_key(option);
    let path = |option| match given.get(option) {
        Some(value) if value.is_empty() => Err(wrong(option, "", "a path")),
        value => Ok(value.map(PathBuf::from)),
    };
    for (option, command) in [
        ("help", Command::Help),
        ("version", Command::Version),
        ("print-capabilities", Command::Capabilities),
    ] {
        if has(option) {
            return Ok(command);
        }
    }
    let file = path("file")?.ok_or(UsageError::NoFile)?;
    let socket = match (path("socket-path")?, has("fd")) {
        (Some(_), true) => return Err(UsageError::Conflict("socket-path", "fd")),
        (Some(path), false) => Socket::Path(path, given.get("socket-group").cloned()),
        (None, true) => Socket::Fd(number(&given, "fd", 3..=RawFd::MAX, 3)?),
        (None, false) => return Err(UsageError::NoSocket),
    };
    if has("socket-group") && has("fd") {
        return Err(UsageError::Needs("socket-group", "socket-path"));
    }
    let queue_size = number(
        &given,
        "queue-size",
        MIN_QUEUE_SIZE..=MAX_DISK_QUEUE_SIZE,
        DEFAULT_QUEUE_SIZE,
    )?;
    if !queue_size.is_power_of_two() {
        return Err(wrong(
            "queue-size",
            &queue_size.to_string(),
            "a power of two",
        ));
    }
    let serial = given.get("serial").cloned().unwrap_or_default();
    if serial.len() > BLOCK_ID_BYTES {
        return Err(wrong(
            "serial",
            &serial,
            format!("at most {BLOCK_ID_BYTES} bytes"),
        ));
    }
    let on_error = [("report", OnError::Report), ("ignore", OnError::Ignore)];
    let io = BlockIo::default();
    Ok(Command::Serve(Box::new(Options {
        file,
        socket,
        disk: BlockSpec {
            id: "alone".to_owned(),
            readonly: switch(&given, "readonly")?,
            direct: switch(&given, "direct")?,
            serial,
            num_queues: number(&given, "num-queues", 1..=MAX_BLOCK_QUEUES, MAX_BLOCK_QUEUES)?,
            queue_size,
            io: BlockIo {
                format: ImageFormat::Raw,
                aio: choice(
                    &given,
                    "aio",
                    &[
                        ("native", Aio::Native),
                        ("io_uring", Aio::IoUring),
                        ("off", Aio::Off),
                    ],
                    io.aio,
                )?,
                discard: choice(
                    &given,
                    "discard",
                    &[("unmap", true), ("ignore", false)],
                    false,
                )?,
                detect_zeroes: choice(
                    &given,
                    "detect-zeroes",
                    &[
                        ("off", DetectZeroes::Off),
                        ("on", DetectZeroes::On),
                        ("unmap", DetectZeroes::Unmap),
                    ],
                    io.detect_zeroes,
                )?,
                iops_total: number(&given, "iops-total", 0..=MAX_IOPS, 0)?,
                poll_us: number(&given, "poll-us", 0..=MAX_POLL_US, io.poll_us)?,
                werror: choice(&given, "werror", &on_error, OnError::Report)?,
                rerror: choice(&given, "rerror", &on_error, OnError::Report)?,
            },
        },
        log: path("D")?,
        log_level: match given.get("log-level") {
            None => Level::Warn,
            Some(name) => Level::from_name(name).ok_or_else(|| {
                wrong("log-level", name, "one of error, warn, info, debug, trace")
            })?,
        },
        seccomp: choice(
            &given,
            "seccomp",
            &[
                ("kill", SeccompMode::Kill),
                ("trap", SeccompMode::Trap),
                ("log", SeccompMode::Log),
                ("allow", SeccompMode::Disabled),
            ],
            SeccompMode::Kill,
        )?,
        sandbox: choice(
            &given,
            "sandbox",
            &[
                ("strict", SandboxMode::Strict),
                ("best-effort", SandboxMode::BestEffort),
            ],
            SandboxMode::BestEffort,
        )?,
        keep: has("keep"),
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Command, UsageError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn every_wrong_line_has_its_message() {
        for case in include_str!("wrong.txt").split("$ ").skip(1) {
            let (line, message) = case.split_once('\n').unwrap();
            let error = parse_words(line).unwrap_err().to_string();
            assert_eq!(error, message.trim_end(), "block {line}");
        }
    }

    #[test]
    fn what_is_given_is_what_is_served() {
        let line = "--blk-file=/i --socket-path /s --read-only --direct=off --aio off --num-queues 3 --queue-size 64 \
             --serial S1 --discard unmap --detect-zeroes=unmap --throttling.iops-total 100 --poll-us 0 --werror ignore \
             --keep -D /l --log-level info --sandbox strict --seccomp trap --socket-group 12";
        let Command::Serve(options) = parse_words(line).unwrap() else {
            panic!("{line}");
        };
        let want = Options {
            file: "/i".into(),
            socket: Socket::Path("/s".into(), Some("12".into())),
            disk: BlockSpec {
                id: "alone".into(),
                readonly: true,
                direct: false,
                serial: "S1".into(),
                num_queues: 3,
                queue_size: 64,
                io: BlockIo {
                    aio: Aio::Off,
                    discard: true,
                    detect_zeroes: DetectZeroes::Unmap,
                    iops_total: 100,
                    poll_us: 0,
                    werror: OnError::Ignore,
                    rerror: OnError::Report,
                    format: ImageFormat::Raw,
                },
            },
            log: Some("/l".into()),
            log_level: Level::Info,
            seccomp: SeccompMode::Trap,
            sandbox: SandboxMode::Strict,
            keep: true,
        };
        assert_eq!(*options, want);
    }

    #[test]
    fn help_names_every_option_that_is_no_alias() {
        let help = help();
        for (name, takes, _) in OPTIONS {
            let is_alias = matches!(takes, Takes::Alias(_));
            let listed = help.lines().any(|line| {
                line.trim_start().split([' ', '[']).next() == Some(&format!("--{name}"))
            });
            assert_eq!(listed, !is_alias, "{name}");
        }
        assert_eq!(parse_words("-h"), Ok(Command::Help));
        assert_eq!(parse_words("--version"), Ok(Command::Version));
        assert_eq!(
            parse_words("--print-capabilities"),
            Ok(Command::Capabilities)
        );
    }
}
