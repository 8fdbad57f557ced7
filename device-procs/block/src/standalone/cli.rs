//! The command line of a stand-alone disk.
//!
//! **Job.** Arguments to [`Options`], without any I/O; the help text from the same table.
//! **Who is not trusted.** Nobody; but nothing that is asked for is silently ignored: what cannot be done is an error that says
//! what is possible.
//! **Why this way.** Names are those of `-drive` and `-device`; those of QEMU's vhost-user-blk programs (`--blk-file`, `--read-only`,
//! `--print-capabilities`) mean the same here, so that what starts one of them can start this one.

use std::path::PathBuf;

use device_host::alone::cli::{
    Common, Definition, Given, Takes, UsageError, help as listed, wrong,
};
use device_host::alone::program::{About, Command};
use ipc::limits::{
    BLOCK_ID_BYTES, DEFAULT_QUEUE_SIZE, MAX_BLOCK_QUEUES, MAX_DISK_QUEUE_SIZE, MAX_IOPS,
    MAX_POLL_US,
};
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes, ImageFormat, OnError};

use crate::device::MIN_QUEUE_SIZE;

/// Everything that can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) file: PathBuf,
    pub(super) disk: BlockSpec,
    pub(super) common: Common,
}

#[rustfmt::skip]
const OPTIONS: &[Definition] = &[
    ("file", Takes::Value("IMAGE"), "the raw image or block device to serve"),
    ("readonly", Takes::Switch, "the guest can only read, and so can the process"),
    ("direct", Takes::Switch, "O_DIRECT: not through the host's page cache (default: off)"),
    ("aio", Takes::Value("HOW"), "native (default): io_uring where the host has it; io_uring: or not at all; off: one request after the other"),
    ("num-queues", Takes::Value("NUMBER"), "queues that a front end may use: 1 to 32 (default: 32)"),
    ("queue-size", Takes::Value("NUMBER"), "entries of a queue at most: a power of two from 4 to 1024 (default: 256)"),
    ("serial", Takes::Value("TEXT"), "serial number, at most 20 bytes"),
    ("discard", Takes::Value("HOW"), "unmap: the guest can give space back; ignore (default)"),
    ("detect-zeroes", Takes::Value("HOW"), "writes of zeroes: off (default): are writes; on: mark a range; unmap: free it if --discard=unmap"),
    ("iops-total", Takes::Value("NUMBER"), "requests a second on average, over all queues; 0 (default) for no limit"),
    ("poll-us", Takes::Value("NUMBER"), "microseconds to look for work before sleeping: 0 to 200 (default: 50)"),
    ("werror", Takes::Value("HOW"), "a write that the host fails: report (default) or ignore"),
    ("rerror", Takes::Value("HOW"), "a read that the host fails: report (default) or ignore"),
    ("blk-file", Takes::Alias("file"), ""),
    ("read-only", Takes::Alias("readonly"), ""),
    ("throttling.iops-total", Takes::Alias("iops-total"), ""),
];

/// The program.
pub(super) const ABOUT: About = About {
    name: "block",
    version: env!("CARGO_PKG_VERSION"),
    capabilities: "{\n  \"type\": \"block\",\n  \"features\": [\"read-only\", \"blk-file\"]\n}",
    help,
};

/// The text of `--help`.
fn help() -> String {
    format!(
        "usage: block --file IMAGE --socket-path PATH [OPTIONS]\n\
         Serves a disk to a virtual machine over vhost-user (stratovirt, QEMU, and others). The process that does it is in a jail.\n\
         Values follow after a space or '='; switches take on or off.\n\n{}\
         \nA guest of QEMU, whose memory must be shared:\n  \
         block --file disk.img --socket-path disk.sock &\n  \
         qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\\n    \
         -chardev socket,id=c,path=disk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=c …\n",
        listed(OPTIONS)
    )
}

/// Understands the arguments after the program's name.
pub(super) fn parse(
    arguments: impl Iterator<Item = String>,
) -> Result<Command<Options>, UsageError> {
    let given = Given::collect(OPTIONS, "the image is given by --file", arguments)?;
    if let Some(question) = given.question() {
        return Ok(question);
    }
    let file = given
        .path("file")?
        .ok_or(UsageError::Missing("file", "the image to serve"))?;
    let common = Common::of(&given)?;
    let queue_size = given.power_of_two(
        "queue-size",
        MIN_QUEUE_SIZE..=MAX_DISK_QUEUE_SIZE,
        DEFAULT_QUEUE_SIZE,
    )?;
    let serial = given.text("serial").unwrap_or_default().to_owned();
    if serial.len() > BLOCK_ID_BYTES {
        return Err(wrong(
            "serial",
            &serial,
            format!("at most {BLOCK_ID_BYTES} bytes"),
        ));
    }
    let on_error = [("report", OnError::Report), ("ignore", OnError::Ignore)];
    let io = BlockIo::default();
    Ok(Command::Serve(Options {
        file,
        disk: BlockSpec {
            id: "alone".to_owned(),
            readonly: given.switch("readonly")?,
            direct: given.switch("direct")?,
            serial,
            num_queues: given.number("num-queues", 1..=MAX_BLOCK_QUEUES, MAX_BLOCK_QUEUES)?,
            queue_size,
            io: BlockIo {
                format: ImageFormat::Raw,
                aio: given.choice(
                    "aio",
                    &[
                        ("native", Aio::Native),
                        ("io_uring", Aio::IoUring),
                        ("off", Aio::Off),
                    ],
                    io.aio,
                )?,
                discard: given.choice("discard", &[("unmap", true), ("ignore", false)], false)?,
                detect_zeroes: given.choice(
                    "detect-zeroes",
                    &[
                        ("off", DetectZeroes::Off),
                        ("on", DetectZeroes::On),
                        ("unmap", DetectZeroes::Unmap),
                    ],
                    io.detect_zeroes,
                )?,
                iops_total: given.number("iops-total", 0..=MAX_IOPS, 0)?,
                poll_us: given.number("poll-us", 0..=MAX_POLL_US, io.poll_us)?,
                werror: given.choice("werror", &on_error, OnError::Report)?,
                rerror: given.choice("rerror", &on_error, OnError::Report)?,
            },
        },
        common,
    }))
}

#[cfg(test)]
mod tests {
    use device_host::alone::Socket;
    use ipc::log::Level;
    use ipc::start::{SandboxMode, SeccompMode};

    use super::*;

    fn parse_words(line: &str) -> Result<Command<Options>, UsageError> {
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
            common: Common {
                socket: Socket::Path("/s".into(), Some("12".into())),
                log: Some("/l".into()),
                log_level: Level::Info,
                seccomp: SeccompMode::Trap,
                sandbox: SandboxMode::Strict,
                keep: true,
            },
        };
        assert_eq!(options, want);
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
