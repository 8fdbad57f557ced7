//! The command line of a stand-alone card.
//!
//! **Job.** Arguments to [`Options`], without any I/O; the help text from the same table.
//! **Who is not trusted.** Nobody.
//! **Why this way.** Names are those of `-netdev tap` and `-device`; the address is not among them, since a guest gets that from
//! the front end.

use device_host::alone::cli::{Common, Definition, Given, Takes, UsageError, help as listed};
use device_host::alone::program::{About, Command};
use ipc::limits::{MAX_NET_QUEUE_PAIRS, MAX_NET_RATE, MAX_POLL_US, MAX_QUEUE_SIZE, NET_POLL_US};
use ipc::spec::net::{Bucket, Limit, NetLimits, NetSpec};

use crate::device::MIN_QUEUE_SIZE;

/// Entries of a queue, unless told otherwise: as many as QEMU lets one choose.
const QUEUE_SIZE: u16 = 1024;

/// Everything that can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) tap: String,
    pub(super) card: NetSpec,
    pub(super) common: Common,
}

#[rustfmt::skip]
const OPTIONS: &[Definition] = &[
    ("tap", Takes::Value("NAME"), "the tap device that packets go to and come from"),
    ("queues", Takes::Value("NUMBER"), "queue pairs that a front end may use: 1 to 16 (default: 1); above 1 the tap is one made with multi_queue"),
    ("queue-size", Takes::Value("NUMBER"), "entries of a queue at most: a power of two from 4 to 4096 (default: 1024)"),
    ("rx-packets", Takes::Value("NUMBER"), "packets a second to the guest on average, over all queues; 0 (default) for no limit"),
    ("rx-packets-burst", Takes::Value("NUMBER"), "what of them may pass at once after a pause (default: 100 ms worth)"),
    ("rx-bytes", Takes::Value("NUMBER"), "the same for bytes of packets to the guest"),
    ("rx-bytes-burst", Takes::Value("NUMBER"), "what of them may pass at once"),
    ("tx-packets", Takes::Value("NUMBER"), "the same for packets from the guest"),
    ("tx-packets-burst", Takes::Value("NUMBER"), "what of them may pass at once"),
    ("tx-bytes", Takes::Value("NUMBER"), "the same for bytes of packets from the guest"),
    ("tx-bytes-burst", Takes::Value("NUMBER"), "what of them may pass at once"),
    ("poll-us", Takes::Value("NUMBER"), "microseconds to look for more packets before sleeping: 0 to 200 (default: 50)"),
    ("ifname", Takes::Alias("tap"), ""),
    ("throttling.rx-packets", Takes::Alias("rx-packets"), ""),
    ("throttling.rx-packets-burst", Takes::Alias("rx-packets-burst"), ""),
    ("throttling.rx-bytes", Takes::Alias("rx-bytes"), ""),
    ("throttling.rx-bytes-burst", Takes::Alias("rx-bytes-burst"), ""),
    ("throttling.tx-packets", Takes::Alias("tx-packets"), ""),
    ("throttling.tx-packets-burst", Takes::Alias("tx-packets-burst"), ""),
    ("throttling.tx-bytes", Takes::Alias("tx-bytes"), ""),
    ("throttling.tx-bytes-burst", Takes::Alias("tx-bytes-burst"), ""),
];

/// The program.
pub(super) const ABOUT: About = About {
    name: "net",
    version: env!("CARGO_PKG_VERSION"),
    capabilities: "{\n  \"type\": \"net\"\n}",
    help,
};

/// The text of `--help`.
fn help() -> String {
    format!(
        "usage: net --tap NAME --socket-path PATH [OPTIONS]\n\
         Serves a network card to a virtual machine over vhost-user (stratovirt, QEMU, and others). The process that does it is in a jail.\n\
         Values follow after a space or '='; switches take on or off.\n\n{}\
         \nA guest of QEMU, whose memory must be shared:\n  \
         ip tuntap add tap0 mode tap && ip link set tap0 up\n  \
         net --tap tap0 --socket-path net.sock &\n  \
         qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\\n    \
         -chardev socket,id=c,path=net.sock,reconnect=1 -netdev vhost-user,id=n,chardev=c -device virtio-net-pci,netdev=n …\n",
        listed(OPTIONS)
    )
}

fn bucket(given: &Given, rate: &'static str, burst: &'static str) -> Result<Bucket, UsageError> {
    let value = given.number(rate, 0..=MAX_NET_RATE, 0)?;
    if value == 0 && given.has(burst) {
        return Err(UsageError::Needs(burst, rate));
    }
    Ok(Bucket {
        rate: value,
        // A tenth of a second's worth.
        burst: given.number(burst, 1..=MAX_NET_RATE, value.div_ceil(10))?,
    })
}

/// Understands the arguments after the program's name.
pub(super) fn parse(
    arguments: impl Iterator<Item = String>,
) -> Result<Command<Options>, UsageError> {
    let given = Given::collect(OPTIONS, "the tap is given by --tap", arguments)?;
    if let Some(question) = given.question() {
        return Ok(question);
    }
    let tap = given
        .text("tap")
        .ok_or(UsageError::Missing("tap", "the tap device to serve"))?;
    let common = Common::of(&given)?;
    let queue_size =
        given.power_of_two("queue-size", MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE, QUEUE_SIZE)?;
    Ok(Command::Serve(Options {
        tap: tap.to_owned(),
        card: NetSpec {
            id: "alone".to_owned(),
            // The front end tells the guest which.
            mac: [0; 6],
            queue_pairs: given.number("queues", 1..=MAX_NET_QUEUE_PAIRS, 1)?,
            queue_size,
            control_queue: false,
            vhost: false,
            limits: NetLimits {
                rx: Limit {
                    packets: bucket(&given, "rx-packets", "rx-packets-burst")?,
                    bytes: bucket(&given, "rx-bytes", "rx-bytes-burst")?,
                },
                tx: Limit {
                    packets: bucket(&given, "tx-packets", "tx-packets-burst")?,
                    bytes: bucket(&given, "tx-bytes", "tx-bytes-burst")?,
                },
            },
            stands_in: None,
            poll_us: given.number("poll-us", 0..=MAX_POLL_US, NET_POLL_US)?,
        },
        common,
    }))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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
            assert_eq!(error, message.trim_end(), "net {line}");
        }
    }

    #[test]
    fn what_is_given_is_what_is_served() {
        let line = "--ifname=tap7 --socket-path /s --queues 3 --queue-size=256 --throttling.rx-bytes 1000 --rx-bytes-burst=7 \
             --tx-packets 55 --poll-us 7 --keep -D /l --log-level info --sandbox strict --seccomp trap --socket-group 12";
        let Command::Serve(options) = parse_words(line).unwrap() else {
            panic!("{line}");
        };
        let mut limits = NetLimits::default();
        limits.rx.bytes = Bucket {
            rate: 1000,
            burst: 7,
        };
        limits.tx.packets = Bucket { rate: 55, burst: 6 };
        let want = Options {
            tap: "tap7".into(),
            card: NetSpec {
                id: "alone".into(),
                mac: [0; 6],
                queue_pairs: 3,
                queue_size: 256,
                control_queue: false,
                vhost: false,
                limits,
                stands_in: None,
                poll_us: 7,
            },
            common: Common {
                socket: Socket::Path("/s".into(), Some("12".into())),
                log: Some(PathBuf::from("/l")),
                log_level: Level::Info,
                seccomp: SeccompMode::Trap,
                sandbox: SandboxMode::Strict,
                keep: true,
            },
        };
        assert_eq!(options, want);
    }

    #[test]
    fn help_version_and_capabilities_need_nothing_else() {
        assert_eq!(parse_words("-h"), Ok(Command::Help));
        assert_eq!(parse_words("--version"), Ok(Command::Version));
        let capabilities = parse_words("--print-capabilities");
        assert_eq!(capabilities, Ok(Command::Capabilities));
        assert!(help().contains("\n  --tap NAME"));
        assert!(!help().contains("--ifname"));
    }
}
