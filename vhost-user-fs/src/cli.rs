//! The command line.
//!
//! **Job.** Arguments to [`Options`], without any I/O; the help text from the same table.
//! **Who is not trusted.** Nobody; but nothing that is asked for is silently ignored: what cannot be done is an error that says
//! what is possible.
//! **Why this way.** The manual (2.17.2) spells options with one dash, users of virtiofsd with two, and both write values
//! behind a space or an equals sign: all of these are the same here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::RawFd;
use std::path::PathBuf;

use fs_device::device::TAG_BYTES;
use fs_device::passthrough::Cache;
use ipc::log::Level;
use ozone::tree::{Kind, capability};
use thiserror::Error;

/// What the kernel does with a system call that the filter does not name (`-seccomp`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Seccomp {
    /// There is no filter.
    Allow,
    /// The process is killed.
    #[default]
    Kill,
    /// The call is logged and made.
    Log,
    /// The thread gets SIGSYS.
    Trap,
}

/// Where the front end comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Socket {
    /// A path to listen at.
    Path(PathBuf),
    /// A descriptor that is open already: a listening socket or a connected one.
    Fd(RawFd),
}

/// Where messages go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum LogTo {
    /// Standard error.
    #[default]
    Stderr,
    /// The end of a file.
    File(PathBuf),
}

/// Everything that can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) source: PathBuf,
    pub(crate) socket: Socket,
    pub(crate) log: LogTo,
    pub(crate) log_level: Level,
    pub(crate) seccomp: Seccomp,
    pub(crate) sandbox: Kind,
    /// Capabilities to add, one bit each.
    pub(crate) add_caps: u64,
    /// Capabilities to take away.
    pub(crate) drop_caps: u64,
    pub(crate) rlimit_nofile: Option<u64>,
    pub(crate) cache: Cache,
    pub(crate) writeback: bool,
    pub(crate) readonly: bool,
    pub(crate) xattr: bool,
    pub(crate) posix_acl: bool,
    pub(crate) announce_submounts: bool,
    pub(crate) allow_mmap: bool,
    pub(crate) readdirplus: bool,
    pub(crate) posix_lock: bool,
    pub(crate) flock: bool,
    pub(crate) tag: String,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    /// Share a folder.
    Serve(Box<Options>),
    /// `--help`.
    Help,
    /// `--version`.
    Version,
}

/// What is wrong with the arguments.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum UsageError {
    #[error("{0}: no such option (--help lists them)")]
    Unknown(String),
    #[error("{0}: not an option; the shared folder is given by -source")]
    Operand(String),
    #[error("-{0} is given twice")]
    Twice(&'static str),
    #[error("-{0} needs a value: {1}")]
    NoValue(&'static str, &'static str),
    #[error("-{0} takes no value")]
    Value(&'static str),
    #[error("-{option} {value}: {allowed}")]
    Wrong {
        option: &'static str,
        value: String,
        allowed: &'static str,
    },
    #[error("-source is missing: the folder to share")]
    NoSource,
    #[error("-socket-path or -fd is missing: where the front end connects")]
    NoSocket,
    #[error("-{0} and -{1} exclude each other")]
    Conflict(&'static str, &'static str),
    #[error("-{0} needs -{1}")]
    Needs(&'static str, &'static str),
    #[error("-{0} is not supported: {1}")]
    Unsupported(&'static str, &'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    /// What, for messages and help.
    Value(&'static str),
    Optional(&'static str),
    /// virtiofsd has it, this daemon does not; the reason.
    Unsupported(&'static str),
}

const NO_MAPS: &str = "ids of the guest and of the host are the same, or all are the user's own";

#[rustfmt::skip]
const OPTIONS: &[(&str, Takes, &str)] = &[
    ("source", Takes::Value("FOLDER"), "the folder to share"),
    ("socket-path", Takes::Value("PATH"), "listen for the front end on a unix socket at PATH"),
    ("fd", Takes::Value("NUMBER"), "use an inherited socket, listening or connected, instead of -socket-path"),
    ("D", Takes::Optional("FILE"), "append messages to FILE; without it they go to standard error, as by default"),
    ("log-level", Takes::Value("LEVEL"), "error, warn (default), info, debug or trace"),
    ("seccomp", Takes::Value("ACTION"), "on a system call that is not expected: kill (default), trap, log, or allow (no filter)"),
    ("sandbox", Takes::Value("KIND"), "namespace (default): own namespaces, pivot_root; chroot: chroot only"),
    ("modcaps", Takes::Value("LIST"), "take capabilities away or add them: -LEASE,+KILL"),
    ("rlimit-nofile", Takes::Value("NUMBER"), "open descriptors at most, and with them inodes and files of the guest (default 1000000, or what is allowed)"),
    ("cache", Takes::Value("POLICY"), "what the guest may keep: never, metadata, auto (default) or always"),
    ("writeback", Takes::Nothing, "the guest may gather writes"),
    ("readonly", Takes::Nothing, "nothing in the folder may change"),
    ("xattr", Takes::Nothing, "extended attributes"),
    ("posix-acl", Takes::Nothing, "POSIX access control lists; needs -xattr"),
    ("announce-submounts", Takes::Nothing, "the guest sees mounts in the folder as mounts"),
    ("allow-mmap", Takes::Nothing, "files can be mapped shared although they are not cached"),
    ("no-readdirplus", Takes::Nothing, "folders are read without the attributes of their files"),
    ("posix-lock", Takes::Nothing, "locks of fcntl(2) hold on the host too; a lock that is taken is refused instead of waited for"),
    ("flock", Takes::Nothing, "locks of flock(2) hold on the host too; a lock that is taken is refused instead of waited for"),
    ("tag", Takes::Value("NAME"), "the name to mount by, for front ends that ask for it (default: myfs)"),
    ("thread-pool-size", Takes::Value("NUMBER"), "0: requests are done by the thread that takes them; more is not supported"),
    ("inode-file-handles", Takes::Value("WHEN"), "never: inodes are kept as descriptors; others are not supported"),
    ("help", Takes::Nothing, "this text"),
    ("version", Takes::Nothing, "the version"),
    ("xattrmap", Takes::Unsupported("names of attributes are the same on both sides"), ""),
    ("uid-map", Takes::Unsupported(NO_MAPS), ""),
    ("gid-map", Takes::Unsupported(NO_MAPS), ""),
    ("translate-uid", Takes::Unsupported(NO_MAPS), ""),
    ("translate-gid", Takes::Unsupported(NO_MAPS), ""),
    ("allow-direct-io", Takes::Unsupported("the host's cache is always used; the guest's own is bypassed with O_DIRECT"), ""),
    ("shared-dir", Takes::Unsupported("the folder is given by -source"), ""),
    ("syslog", Takes::Unsupported("messages go to standard error or to a file, -D"), ""),
    ("preserve-noatime", Takes::Unsupported("O_NOATIME is not passed on"), ""),
    ("security-label", Takes::Unsupported("labels of new files are the host's"), ""),
    ("socket-group", Takes::Unsupported("the socket belongs to its creator only"), ""),
    ("print-capabilities", Takes::Unsupported("see --help"), ""),
];

/// The text of `--help`.
pub(crate) fn help() -> String {
    let mut text = String::from(
        "usage: vhost_user_fs -source FOLDER -socket-path PATH [OPTIONS]\n\
         Shares a folder with a virtual machine over virtio-fs. Options take one dash or two, values a space or '='.\n\n",
    );
    for (name, takes, what) in OPTIONS {
        let value = match takes {
            Takes::Nothing => String::new(),
            Takes::Value(value) => format!(" {value}"),
            Takes::Optional(value) => format!(" [{value}]"),
            Takes::Unsupported(_) => continue,
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {:<24} {what}", format!("-{name}{value}"));
    }
    text
}

type Given = BTreeMap<&'static str, Option<String>>;

fn collect(arguments: impl Iterator<Item = String>) -> Result<Given, UsageError> {
    let mut given = Given::new();
    let mut arguments = arguments.peekable();
    while let Some(argument) = arguments.next() {
        let Some(word) = argument.strip_prefix('-') else {
            return Err(UsageError::Operand(argument));
        };
        let word = word.strip_prefix('-').unwrap_or(word);
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word, None),
        };
        let name = match name {
            "h" => "help",
            "V" => "version",
            other => other,
        };
        let Some((name, takes, _)) = OPTIONS.iter().find(|(known, _, _)| *known == name) else {
            return Err(UsageError::Unknown(argument));
        };
        let value = match takes {
            Takes::Unsupported(why) => return Err(UsageError::Unsupported(name, why)),
            Takes::Nothing if inline.is_some() => return Err(UsageError::Value(name)),
            Takes::Nothing => None,
            Takes::Value(what) => {
                let value = inline.or_else(|| arguments.next());
                Some(value.ok_or(UsageError::NoValue(name, what))?)
            }
            Takes::Optional(_) => inline.or_else(|| arguments.next_if(|a| !a.starts_with('-'))),
        };
        if given.insert(name, value).is_some() {
            return Err(UsageError::Twice(name));
        }
    }
    Ok(given)
}

/// Takes one of several words.
fn choice<T: Copy>(
    given: &Given,
    option: &'static str,
    choices: &[(&str, T)],
    default: T,
    allowed: &'static str,
) -> Result<T, UsageError> {
    let Some(value) = given.get(option).and_then(Option::as_deref) else {
        return Ok(default);
    };
    choices
        .iter()
        .find(|(name, _)| *name == value)
        .map(|(_, choice)| *choice)
        .ok_or_else(|| UsageError::Wrong {
            option,
            value: value.to_owned(),
            allowed,
        })
}

fn number(
    given: &Given,
    option: &'static str,
    range: std::ops::RangeInclusive<u64>,
    allowed: &'static str,
) -> Result<Option<u64>, UsageError> {
    let Some(value) = given.get(option).and_then(Option::as_deref) else {
        return Ok(None);
    };
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(Some(number)),
        _ => Err(UsageError::Wrong {
            option,
            value: value.to_owned(),
            allowed,
        }),
    }
}

/// `-LEASE,+KILL` as two bit sets: added, taken away.
fn capabilities(list: &str) -> Result<(u64, u64), UsageError> {
    let wrong = |value: &str| UsageError::Wrong {
        option: "modcaps",
        value: value.to_owned(),
        allowed: "a list of capabilities without CAP_, each with + or - before it: -LEASE,+KILL",
    };
    let (mut added, mut taken) = (0, 0);
    for word in list.split([',', ':']) {
        let (set, name) = if let Some(name) = word.strip_prefix('+') {
            (&mut added, name)
        } else if let Some(name) = word.strip_prefix('-') {
            (&mut taken, name)
        } else {
            return Err(wrong(word));
        };
        let number = capability(&name.to_ascii_uppercase()).ok_or_else(|| wrong(word))?;
        *set |= 1u64 << number;
    }
    if added & taken != 0 {
        return Err(wrong(list));
    }
    Ok((added, taken))
}

/// Understands the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Command, UsageError> {
    let given = collect(arguments)?;
    let has = |option| given.contains_key(option);
    let text = |option| given.get(option).cloned().flatten();
    if has("help") {
        return Ok(Command::Help);
    }
    if has("version") {
        return Ok(Command::Version);
    }
    let source = text("source").ok_or(UsageError::NoSource)?;
    let fd = number(&given, "fd", 3..=i32::MAX as u64, "a descriptor from 3 on")?;
    let socket = match (text("socket-path"), fd) {
        (Some(_), Some(_)) => return Err(UsageError::Conflict("socket-path", "fd")),
        (Some(path), None) => Socket::Path(path.into()),
        // In the range of descriptors, as was checked.
        (None, Some(fd)) => Socket::Fd(fd as RawFd),
        (None, None) => return Err(UsageError::NoSocket),
    };
    number(
        &given,
        "thread-pool-size",
        0..=0,
        "only 0 is supported: requests are done by the thread that takes them",
    )?;
    choice(
        &given,
        "inode-file-handles",
        &[("never", ())],
        (),
        "only never is supported: inodes are kept as descriptors",
    )?;
    let (add_caps, drop_caps) = match text("modcaps") {
        Some(list) => capabilities(&list)?,
        None => (0, 0),
    };
    let tag = text("tag").unwrap_or_else(|| "myfs".to_owned());
    if tag.is_empty() || tag.len() > TAG_BYTES {
        return Err(UsageError::Wrong {
            option: "tag",
            value: tag,
            allowed: "1 to 36 bytes are possible",
        });
    }
    for (option, needed) in [("posix-acl", "xattr")] {
        if has(option) && !has(needed) {
            return Err(UsageError::Needs(option, needed));
        }
    }
    for (option, other) in [("writeback", "readonly")] {
        if has(option) && has(other) {
            return Err(UsageError::Conflict(option, other));
        }
    }
    Ok(Command::Serve(Box::new(Options {
        source: source.into(),
        socket,
        log: text("D").map_or(LogTo::Stderr, |file| LogTo::File(file.into())),
        log_level: choice(
            &given,
            "log-level",
            &[
                ("error", Level::Error),
                ("warn", Level::Warn),
                ("info", Level::Info),
                ("debug", Level::Debug),
                ("trace", Level::Trace),
            ],
            Level::Warn,
            "one of error, warn, info, debug, trace",
        )?,
        seccomp: choice(
            &given,
            "seccomp",
            &[
                ("allow", Seccomp::Allow),
                ("kill", Seccomp::Kill),
                ("log", Seccomp::Log),
                ("trap", Seccomp::Trap),
            ],
            Seccomp::Kill,
            "one of allow, kill, log, trap",
        )?,
        sandbox: choice(
            &given,
            "sandbox",
            &[("namespace", Kind::Namespace), ("chroot", Kind::Chroot)],
            Kind::Namespace,
            "one of namespace, chroot",
        )?,
        add_caps,
        drop_caps,
        rlimit_nofile: number(
            &given,
            "rlimit-nofile",
            256..=1 << 30,
            "a number from 256 to 1073741824",
        )?,
        cache: choice(
            &given,
            "cache",
            &[
                ("never", Cache::Never),
                ("none", Cache::Never),
                ("metadata", Cache::Metadata),
                ("auto", Cache::Auto),
                ("always", Cache::Always),
            ],
            Cache::Auto,
            "one of never, metadata, auto, always",
        )?,
        writeback: has("writeback"),
        readonly: has("readonly"),
        xattr: has("xattr"),
        posix_acl: has("posix-acl"),
        announce_submounts: has("announce-submounts"),
        allow_mmap: has("allow-mmap"),
        readdirplus: !has("no-readdirplus"),
        posix_lock: has("posix-lock"),
        flock: has("flock"),
        tag,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, UsageError> {
        super::parse(line.split_whitespace().map(str::to_owned))
    }

    fn options(line: &str) -> Options {
        match parse(&format!("-source /s -socket-path /p {line}")) {
            Ok(Command::Serve(options)) => *options,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_manuals_line_is_understood() {
        let Ok(Command::Serve(options)) =
            parse("-source /tmp/shared -socket-path /tmp/shared/virtio_fs.sock -D")
        else {
            panic!("refused");
        };
        assert_eq!(options.source, PathBuf::from("/tmp/shared"));
        assert_eq!(
            options.socket,
            Socket::Path("/tmp/shared/virtio_fs.sock".into())
        );
        assert_eq!(options.log, LogTo::Stderr);
        assert_eq!(options.seccomp, Seccomp::Kill);
        assert_eq!(options.sandbox, Kind::Namespace);
    }

    #[test]
    fn one_dash_and_two_a_space_and_an_equals_sign_are_the_same() {
        for line in [
            "-seccomp log",
            "--seccomp log",
            "-seccomp=log",
            "--seccomp=log",
        ] {
            assert_eq!(options(line).seccomp, Seccomp::Log, "{line}");
        }
        assert_eq!(
            options("-D /var/log/fs -readonly").log,
            LogTo::File("/var/log/fs".into())
        );
        let options = options("--modcaps=-LEASE,+KILL -rlimit-nofile 4096 --cache never");
        assert_eq!((options.add_caps, options.drop_caps), (1 << 5, 1 << 28));
        assert_eq!(options.rlimit_nofile, Some(4096));
        assert_eq!(options.cache, Cache::Never);
    }

    #[test]
    fn wrong_lines_name_option_value_and_what_is_possible() {
        for (line, words) in [
            ("", &["-source"][..]),
            ("-source /s", &["-socket-path", "-fd"]),
            ("-source", &["-source", "FOLDER"]),
            ("/tmp", &["/tmp", "-source"]),
            ("-source /s -fd 2", &["-fd 2", "from 3"]),
            ("-source /s -socket-path /p -fd 3", &["exclude"]),
            ("-source /s -source /t", &["-source", "twice"]),
            (
                "-source /s -socket-path /p -seccomp maybe",
                &["-seccomp maybe", "kill"],
            ),
            (
                "-source /s -socket-path /p -sandbox none",
                &["-sandbox none", "chroot"],
            ),
            (
                "-source /s -socket-path /p -cache some",
                &["-cache some", "metadata"],
            ),
            (
                "-source /s -socket-path /p -rlimit-nofile 10",
                &["-rlimit-nofile 10", "256"],
            ),
            (
                "-source /s -socket-path /p -rlimit-nofile many",
                &["many", "256"],
            ),
            (
                "-source /s -socket-path /p -modcaps=KILL",
                &["-modcaps KILL", "+ or -"],
            ),
            (
                "-source /s -socket-path /p -modcaps=+CAP_KILL",
                &["+CAP_KILL", "without CAP_"],
            ),
            (
                "-source /s -socket-path /p -modcaps=+KILL,-KILL",
                &["-modcaps"],
            ),
            (
                "-source /s -socket-path /p -posix-acl",
                &["-posix-acl", "-xattr"],
            ),
            (
                "-source /s -socket-path /p -writeback -readonly",
                &["exclude"],
            ),
            (
                "-source /s -socket-path /p -thread-pool-size 4",
                &["-thread-pool-size 4", "only 0"],
            ),
            (
                "-source /s -socket-path /p -inode-file-handles mandatory",
                &["mandatory", "never"],
            ),
            (
                "-source /s -socket-path /p -xattrmap :map:",
                &["-xattrmap", "not supported"],
            ),
            (
                "-source /s -socket-path /p -uid-map :0:1:2:",
                &["-uid-map", "not supported"],
            ),
            (
                "-source /s -socket-path /p -readonly=yes",
                &["-readonly", "no value"],
            ),
            (
                "-source /s -socket-path /p -frobnicate",
                &["-frobnicate", "--help"],
            ),
            (
                "-source /s -socket-path /p -tag 0123456789012345678901234567890123456",
                &["36"],
            ),
        ] {
            let message = parse(line).expect_err(line).to_string();
            for word in words {
                assert!(
                    message.contains(word),
                    "{line:?}: {message:?} does not name {word:?}"
                );
            }
        }
    }

    #[test]
    fn help_names_every_option_that_works() {
        let help = help();
        for (name, takes, what) in OPTIONS {
            let named = help.contains(&format!("  -{name}"));
            assert_eq!(named, !matches!(takes, Takes::Unsupported(_)), "{name}");
            assert_eq!(what.is_empty(), !named, "{name}");
        }
        assert_eq!(parse("--help"), Ok(Command::Help));
        assert_eq!(parse("-h"), Ok(Command::Help));
        assert_eq!(parse("-V"), Ok(Command::Version));
    }
}
