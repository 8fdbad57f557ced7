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

use device_host::alone::program::{About, Command};
use fs_device::device::TAG_BYTES;
use fs_device::passthrough::{Cache, Translation, XattrMap};
use ipc::limits::{DAX_UNIT, MAX_DAX_WINDOW};
use ipc::log::Level;
use ozone::tree::{IdRange, Kind, capability};
use thiserror::Error;

use crate::daemon::OF_THE_HOST;

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
    pub(crate) xattrmap: Option<XattrMap>,
    pub(crate) posix_acl: bool,
    pub(crate) announce_submounts: bool,
    pub(crate) allow_mmap: bool,
    pub(crate) readdirplus: bool,
    pub(crate) posix_lock: bool,
    pub(crate) flock: bool,
    pub(crate) tag: String,
    pub(crate) users: Translation,
    pub(crate) groups: Translation,
    /// Users that the daemon's user namespace has; none stands for all of root's, or the caller alone.
    pub(crate) uid_map: Vec<IdRange>,
    /// The same for groups.
    pub(crate) gid_map: Vec<IdRange>,
    pub(crate) noatime: bool,
    /// Bytes; 0 for none.
    pub(crate) dax_window: u64,
    pub(crate) socket_group: Option<String>,
    /// That copy; as many as the host is good for if nothing is said.
    pub(crate) threads: Option<usize>,
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
    /// As `Value`, and may be given several times.
    Values(&'static str),
    /// virtiofsd has it, this daemon does not; the reason.
    Unsupported(&'static str),
}

#[rustfmt::skip]
const OPTIONS: &[(&str, Takes, &str)] = &[
    ("source", Takes::Value("FOLDER"), "the folder to share"),
    ("socket-path", Takes::Value("PATH"), "listen for the front end on a unix socket at PATH"),
    ("shared-dir", Takes::Value("FOLDER"), "the same as -source"),
    ("socket-group", Takes::Value("GROUP"), "members of this group may connect to -socket-path too"),
    ("fd", Takes::Value("NUMBER"), "use an inherited socket, listening or connected, instead of -socket-path"),
    ("D", Takes::Optional("FILE"), "append messages to FILE; without it they go to standard error, as by default"),
    ("log-level", Takes::Value("LEVEL"), "error, warn (default), info, debug or trace"),
    ("seccomp", Takes::Value("ACTION"), "on a system call that is not expected: kill (default), trap, log, or allow (no filter)"),
    ("sandbox", Takes::Value("KIND"), "namespace (default): own namespaces, pivot_root; chroot: chroot only"),
    ("modcaps", Takes::Value("LIST"), "take capabilities away or add them: -LEASE,+KILL"),
    ("rlimit-nofile", Takes::Value("NUMBER"), "open descriptors at most, and with them open files of the guest (default 1000000, or what is allowed)"),
    ("cache", Takes::Value("POLICY"), "what the guest may keep: never, metadata, auto (default) or always"),
    ("writeback", Takes::Nothing, "the guest may gather writes"),
    ("readonly", Takes::Nothing, "nothing in the folder may change"),
    ("xattr", Takes::Nothing, "extended attributes"),
    ("xattrmap", Takes::Value("RULES"), "attributes have other names on the host, as in :map::user.virtiofs.: ; needs -xattr"),
    ("posix-acl", Takes::Nothing, "POSIX access control lists; needs -xattr"),
    ("announce-submounts", Takes::Nothing, "the guest sees mounts in the folder as mounts"),
    ("allow-mmap", Takes::Nothing, "files can be mapped shared although they are not cached"),
    ("no-readdirplus", Takes::Nothing, "folders are read without the attributes of their files"),
    ("posix-lock", Takes::Nothing, "locks of fcntl(2) hold on the host too"),
    ("flock", Takes::Nothing, "locks of flock(2) hold on the host too"),
    ("translate-uid", Takes::Values("RULE"), "users of the guest are others on the host, as in map:0:100000:65536; may be given several times"),
    ("translate-gid", Takes::Values("RULE"), "the same for groups"),
    ("uid-map", Takes::Values("MAP"), "users that exist for the daemon, as in :0:100000:65536: ; may be given several times"),
    ("gid-map", Takes::Values("MAP"), "the same for groups"),
    ("preserve-noatime", Takes::Nothing, "files that the guest opens with O_NOATIME keep their time of access"),
    ("dax-window", Takes::Value("SIZE"), "files can be mapped into a window of that size, 2M to 8G, if the front end knows how (default: none)"),
    ("tag", Takes::Value("NAME"), "the name to mount by, for front ends that ask for it (default: myfs)"),
    ("thread-pool-size", Takes::Value("NUMBER"), "threads that copy large reads and writes beside the one that serves, 0 to 64 (default: one for each further processor, at most 3)"),
    ("inode-file-handles", Takes::Value("WHEN"), "never, or prefer, which is the same here: no file is opened by its handle"),
    ("print-capabilities", Takes::Nothing, "what management tools ask for, as JSON"),
    ("help", Takes::Nothing, "this text"),
    ("version", Takes::Nothing, "the version"),
    ("allow-direct-io", Takes::Unsupported("the host's cache is always used; the guest's own is bypassed with O_DIRECT"), ""),
    ("syslog", Takes::Unsupported("messages go to standard error or to a file, -D"), ""),
    ("security-label", Takes::Unsupported("labels of new files are the host's"), ""),
];

/// The text of `--help`.
fn help() -> String {
    let mut text = String::from(
        "usage: vhost_user_fs -source FOLDER -socket-path PATH [OPTIONS]\n\
         Shares a folder with a virtual machine over virtio-fs. Options take one dash or two, values a space or '='.\n\n",
    );
    for (name, takes, what) in OPTIONS {
        let value = match takes {
            Takes::Nothing => String::new(),
            Takes::Value(value) | Takes::Values(value) => format!(" {value}"),
            Takes::Optional(value) => format!(" [{value}]"),
            Takes::Unsupported(_) => continue,
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {:<24} {what}", format!("-{name}{value}"));
    }
    text.push_str(
        "\nSIGUSR2 puts the program in this one's place that its path has by then, while the guest works.\n",
    );
    text
}

type Given = BTreeMap<&'static str, Option<String>>;

/// Between the values of an option that is given several times; none of them can have it.
const SEPARATOR: char = '\0';

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
            Takes::Value(what) | Takes::Values(what) => {
                let value = inline.or_else(|| arguments.next());
                Some(value.ok_or(UsageError::NoValue(name, what))?)
            }
            Takes::Optional(_) => inline.or_else(|| arguments.next_if(|a| !a.starts_with('-'))),
        };
        match (given.get_mut(name), takes) {
            (None, _) => drop(given.insert(name, value)),
            (Some(Some(before)), Takes::Values(_)) => {
                before.push(SEPARATOR);
                before.push_str(&value.unwrap_or_default());
            }
            _ => return Err(UsageError::Twice(name)),
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

/// Bytes of a window, as in `512M` or `2G`.
fn window(size: &str) -> Option<u64> {
    let (digits, unit) = match size.strip_suffix('G') {
        Some(digits) => (digits, 1 << 30),
        None => (size.strip_suffix('M')?, 1 << 20),
    };
    let digits = digits
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then_some(digits)?;
    let bytes: u64 = digits.parse::<u64>().ok()?.checked_mul(unit)?;
    ((DAX_UNIT..=MAX_DAX_WINDOW).contains(&bytes) && bytes.is_multiple_of(DAX_UNIT))
        .then_some(bytes)
}

/// The rules of an option that may be given several times.
fn translation(given: &Given, option: &'static str) -> Result<Translation, UsageError> {
    let mut rules = Translation::default();
    let Some(Some(text)) = given.get(option) else {
        return Ok(rules);
    };
    for rule in text.split(SEPARATOR) {
        rules.add(rule).map_err(|allowed| UsageError::Wrong {
            option,
            value: rule.to_owned(),
            allowed,
        })?;
    }
    Ok(rules)
}

/// Ranges of one map at most (Linux, `UID_GID_MAP_MAX_EXTENTS`).
const MAX_RANGES: usize = 340;

/// A range in virtiofsd's form, `:INSIDE:HOST:COUNT:`, with any character instead of `:`.
fn id_range(text: &str) -> Result<IdRange, &'static str> {
    const FORM: &str = ":INSIDE:HOST:COUNT:, with COUNT ids from INSIDE in the daemon's user namespace and from HOST on the host";
    let mut rest = text.chars();
    let separator = rest.next().filter(|c| !c.is_ascii_digit()).ok_or(FORM)?;
    let inner = rest.as_str().strip_suffix(separator).ok_or(FORM)?;
    let numbers: Option<Vec<u32>> = inner
        .split(separator)
        .map(|word| word.parse().ok())
        .collect();
    let Some(&[inside, host, count]) = numbers.as_deref() else {
        return Err(FORM);
    };
    if count == 0 {
        return Err("a range has one id at least");
    }
    // 4294967295 is no id: it means none to the kernel.
    if [inside, host]
        .iter()
        .any(|first| first.checked_add(count).is_none())
    {
        return Err("ids end at 4294967294");
    }
    Ok(IdRange {
        inside,
        host,
        count,
    })
}

/// The ranges of an option that may be given several times.
fn id_map(given: &Given, option: &'static str) -> Result<Vec<IdRange>, UsageError> {
    let mut map: Vec<IdRange> = Vec::new();
    let Some(Some(text)) = given.get(option) else {
        return Ok(map);
    };
    let wrong = |value: &str, allowed| UsageError::Wrong {
        option,
        value: value.to_owned(),
        allowed,
    };
    for range in text.split(SEPARATOR) {
        let new = id_range(range).map_err(|allowed| wrong(range, allowed))?;
        let overlap = |a: u32, b: u32, old: &IdRange| a < b + old.count && b < a + new.count;
        if map
            .iter()
            .any(|old| overlap(new.inside, old.inside, old) || overlap(new.host, old.host, old))
        {
            return Err(wrong(range, "two ranges have an id in common"));
        }
        if map.len() >= MAX_RANGES {
            return Err(wrong(range, "a map has 340 ranges at most"));
        }
        map.push(new);
    }
    if map.iter().all(|range| range.inside != 0) {
        return Err(wrong(
            &text.replace(SEPARATOR, " "),
            "id 0 must be inside, which is the daemon's own",
        ));
    }
    Ok(map)
}

/// The program; virtiofsd's words for "options are separate words, none is behind `-o`".
pub(crate) const ABOUT: About = About {
    name: "vhost_user_fs",
    version: env!("CARGO_PKG_VERSION"),
    capabilities: "{\n  \"type\": \"fs\",\n  \"features\": [\"separate-options\"]\n}",
    help,
};

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

fn has(given: &Given, option: &str) -> bool {
    given.contains_key(option)
}

fn text(given: &Given, option: &str) -> Option<String> {
    given.get(option).cloned().flatten()
}

fn source(given: &Given) -> Result<PathBuf, UsageError> {
    match (text(given, "source"), text(given, "shared-dir")) {
        (Some(_), Some(_)) => Err(UsageError::Conflict("source", "shared-dir")),
        (one, other) => one.or(other).map(PathBuf::from).ok_or(UsageError::NoSource),
    }
}

fn socket(given: &Given) -> Result<Socket, UsageError> {
    let fd = number(given, "fd", 3..=i32::MAX as u64, "a descriptor from 3 on")?;
    match (text(given, "socket-path"), fd) {
        (Some(_), Some(_)) => Err(UsageError::Conflict("socket-path", "fd")),
        (Some(path), None) => Ok(Socket::Path(path.into())),
        // In the range of descriptors, as was checked.
        (None, Some(fd)) => Ok(Socket::Fd(fd as RawFd)),
        (None, None) => Err(UsageError::NoSocket),
    }
}

fn log_level(given: &Given) -> Result<Level, UsageError> {
    choice(
        given,
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
    )
}

fn seccomp(given: &Given) -> Result<Seccomp, UsageError> {
    choice(
        given,
        "seccomp",
        &[
            ("allow", Seccomp::Allow),
            ("kill", Seccomp::Kill),
            ("log", Seccomp::Log),
            ("trap", Seccomp::Trap),
        ],
        Seccomp::Kill,
        "one of allow, kill, log, trap",
    )
}

fn sandbox(given: &Given) -> Result<Kind, UsageError> {
    choice(
        given,
        "sandbox",
        &[("namespace", Kind::Namespace), ("chroot", Kind::Chroot)],
        Kind::Namespace,
        "one of namespace, chroot",
    )
}

fn cache(given: &Given) -> Result<Cache, UsageError> {
    choice(
        given,
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
    )
}

/// What is the same here, and what no sandbox allows.
fn inode_file_handles(given: &Given) -> Result<(), UsageError> {
    choice(
        given,
        "inode-file-handles",
        &[("never", ()), ("prefer", ())],
        (),
        "never or prefer. mandatory would take CAP_DAC_READ_SEARCH in the host's user namespace, with which every file of the host's file \
         systems can be opened by its handle, in the shared folder or not, and past Landlock: no -sandbox keeps that right. To hold few \
         descriptors, give a low -rlimit-nofile: inodes beyond that have none, and are found again by folder and name",
    )
}

fn xattr_map(given: &Given) -> Result<Option<XattrMap>, UsageError> {
    let Some(rules) = text(given, "xattrmap") else {
        return Ok(None);
    };
    match XattrMap::parse(&rules) {
        Ok(map) => Ok(Some(map)),
        Err(allowed) => Err(UsageError::Wrong {
            option: "xattrmap",
            value: rules,
            allowed,
        }),
    }
}

fn tag(given: &Given) -> Result<String, UsageError> {
    let tag = text(given, "tag").unwrap_or_else(|| "myfs".to_owned());
    if tag.is_empty() || tag.len() > TAG_BYTES {
        return Err(UsageError::Wrong {
            option: "tag",
            value: tag,
            allowed: "1 to 36 bytes are possible",
        });
    }
    Ok(tag)
}

fn dax_window(given: &Given) -> Result<u64, UsageError> {
    let Some(size) = text(given, "dax-window") else {
        return Ok(0);
    };
    window(&size).ok_or(UsageError::Wrong {
        option: "dax-window",
        value: size,
        allowed: "a multiple of 2M, up to 8G",
    })
}

/// Whether options go together that are right by themselves.
fn check_together(given: &Given, add_caps: u64) -> Result<(), UsageError> {
    let maps = ["uid-map", "gid-map"];
    for option in maps.into_iter().filter(|map| has(given, map)) {
        if text(given, "sandbox").as_deref() == Some("chroot") {
            return Err(UsageError::Conflict(option, "sandbox chroot"));
        }
        if add_caps & OF_THE_HOST != 0 {
            return Err(UsageError::Conflict(
                option,
                "modcaps with MKNOD, SYS_ADMIN, SYS_RESOURCE or LINUX_IMMUTABLE",
            ));
        }
    }
    for (option, needed) in [
        ("posix-acl", "xattr"),
        ("xattrmap", "xattr"),
        ("socket-group", "socket-path"),
    ] {
        if has(given, option) && !has(given, needed) {
            return Err(UsageError::Needs(option, needed));
        }
    }
    for (option, other) in [
        ("writeback", "readonly"),
        // The lists name users and groups, too.
        ("translate-uid", "posix-acl"),
        ("translate-gid", "posix-acl"),
    ] {
        if has(given, option) && has(given, other) {
            return Err(UsageError::Conflict(option, other));
        }
    }
    Ok(())
}

/// Understands the arguments after the program's name.
pub(crate) fn parse(
    arguments: impl Iterator<Item = String>,
) -> Result<Command<Box<Options>>, UsageError> {
    let given = &collect(arguments)?;
    if has(given, "help") {
        return Ok(Command::Help);
    }
    if has(given, "version") {
        return Ok(Command::Version);
    }
    if has(given, "print-capabilities") {
        return Ok(Command::Capabilities);
    }
    options(given).map(|options| Command::Serve(Box::new(options)))
}

fn options(given: &Given) -> Result<Options, UsageError> {
    inode_file_handles(given)?;
    let (add_caps, drop_caps) = match text(given, "modcaps") {
        Some(list) => capabilities(&list)?,
        None => (0, 0),
    };
    check_together(given, add_caps)?;
    let descriptors = "a number from 256 to 1073741824";
    let threads = "0 to 64 threads are possible";
    Ok(Options {
        source: source(given)?,
        socket: socket(given)?,
        log: text(given, "D").map_or(LogTo::Stderr, |file| LogTo::File(file.into())),
        log_level: log_level(given)?,
        seccomp: seccomp(given)?,
        sandbox: sandbox(given)?,
        add_caps,
        drop_caps,
        rlimit_nofile: number(given, "rlimit-nofile", 256..=1 << 30, descriptors)?,
        cache: cache(given)?,
        writeback: has(given, "writeback"),
        readonly: has(given, "readonly"),
        xattr: has(given, "xattr"),
        xattrmap: xattr_map(given)?,
        posix_acl: has(given, "posix-acl"),
        announce_submounts: has(given, "announce-submounts"),
        allow_mmap: has(given, "allow-mmap"),
        readdirplus: !has(given, "no-readdirplus"),
        posix_lock: has(given, "posix-lock"),
        flock: has(given, "flock"),
        tag: tag(given)?,
        users: translation(given, "translate-uid")?,
        groups: translation(given, "translate-gid")?,
        uid_map: id_map(given, "uid-map")?,
        gid_map: id_map(given, "gid-map")?,
        noatime: has(given, "preserve-noatime"),
        dax_window: dax_window(given)?,
        socket_group: text(given, "socket-group"),
        // At most 64.
        threads: number(given, "thread-pool-size", 0..=64, threads)?.map(|count| count as usize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parse(line: &str) -> Result<Command<Box<Options>>, UsageError> {
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
        assert_eq!(super::window("2M"), Some(2 << 20));
        assert_eq!(super::window("8G"), Some(8 << 30));
    }

    /// `wrong.txt` has a command line after each `$`, and the message that it gets after it.
    #[test]
    fn every_wrong_line_has_its_message() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/wrong.txt");
        let old = std::fs::read_to_string(&file).unwrap();
        let mut new = String::new();
        let mut count = 0;
        for line in old.lines().filter_map(|line| line.strip_prefix("$ ")) {
            let message = parse(line).expect_err(line);
            count += 1;
            new.push_str(&format!("$ {line}\n{message}\n"));
        }
        assert!(count >= 60, "only {count} wrong lines");
        if std::env::var_os("UPDATE_WRONG").is_some() {
            std::fs::write(&file, &new).unwrap();
        }
        for (got, want) in new.lines().zip(old.lines()) {
            assert_eq!(got, want);
        }
        assert_eq!(new.lines().count(), old.lines().count());
    }

    #[test]
    fn every_option_is_in_the_manual_page_and_has_a_wrong_line() {
        let read = |path: &str| {
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
            std::fs::read_to_string(file).unwrap()
        };
        let (page, wrong) = (read("../docs/vhost_user_fs.1.md"), read("src/wrong.txt"));
        for (name, takes, _) in OPTIONS {
            let named = match takes {
                Takes::Unsupported(_) => page.contains(&format!("`-{name}`")),
                _ => page.contains(&format!("**-{name}**")),
            };
            assert!(named, "-{name} is not in the page");
            // As a word of its own: some names are the beginning of others.
            let dashed = format!("-{name}");
            let told = wrong
                .lines()
                .filter_map(|line| line.strip_prefix("$ "))
                .flat_map(|line| line.split([' ', '=']))
                .any(|word| word == dashed);
            assert!(told, "-{name} has no wrong line");
        }
    }

    #[test]
    fn a_map_has_as_many_ranges_as_the_kernel_takes() {
        let line = |count: usize| {
            let ranges = (0..count).map(|n| format!("--uid-map=/{n}/{}/1/ ", 1000 + n));
            format!("-source /s -socket-path /p {}", ranges.collect::<String>())
        };
        let Ok(Command::Serve(options)) = parse(&line(MAX_RANGES)) else {
            panic!("refused");
        };
        assert_eq!(options.uid_map.len(), MAX_RANGES);
        let more = parse(&line(MAX_RANGES + 1)).unwrap_err().to_string();
        assert_eq!(more, "-uid-map /340/1340/1/: a map has 340 ranges at most");
        assert!(options.gid_map.is_empty());
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
