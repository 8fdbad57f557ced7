//! Arguments of `ozone`: text to [`Options`].

use super::Request;
use crate::{
    fault::Fault,
    steps::{caps, cgroup},
};
use std::{
    ffi::{CString, OsString},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

/// Longest name of a jail: a file name of the host.
const MAX_NAME: usize = 255;
/// Most files that may be placed in a jail: each is a mount.
const MAX_SOURCES: usize = 64;
/// Highest user or group id: the one above means "unchanged" to the kernel.
const MAX_ID: u32 = u32::MAX - 1;

/// Everything that the arguments say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Name of the jail: one path component.
    pub(crate) name: CString,
    /// The control program.
    pub(crate) exec_file: PathBuf,
    /// Its last component.
    pub(crate) exec_name: CString,
    /// User that the VM runs as; not 0. 0 only with `-clean-resource`, which does not need it.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
    /// Numbers of the capabilities that it keeps.
    pub(crate) capabilities: Vec<u8>,
    /// Network namespace.
    pub(crate) netns: Option<PathBuf>,
    /// What is placed in the jail, with the name it gets there.
    pub(crate) sources: Vec<(PathBuf, CString)>,
    /// Limits by cgroups.
    pub(crate) cgroup: Cgroup,
    /// Arguments of the control program.
    pub(crate) arguments: Vec<CString>,
}

/// Limits by cgroups; those that are not given are not set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Cgroup {
    /// Processors and memory nodes, as lists in the kernel's syntax.
    pub(crate) cpuset: Option<(String, String)>,
    /// Bytes of memory, the guest's and the processes' together.
    pub(crate) memory: Option<u64>,
}

/// Arguments with their values, in the manual's order.
#[derive(Default)]
struct Given {
    values: Vec<(&'static str, Vec<OsString>)>,
}

enum Takes {
    Nothing,
    One,
    Some,
}

const KNOWN: [(&str, Takes); 10] = [
    ("name", Takes::One),
    ("exec_file", Takes::One),
    ("gid", Takes::One),
    ("uid", Takes::One),
    ("capability", Takes::Some),
    ("netns", Takes::One),
    ("source", Takes::Some),
    ("numa", Takes::Some),
    ("cgroup", Takes::Some),
    ("clean-resource", Takes::Nothing),
];

/// Reads the arguments, without the program's name.
pub(super) fn parse(args: Vec<OsString>) -> Result<Request, Fault> {
    let mut args = args.into_iter();
    let mut own = Vec::new();
    let mut arguments = None;
    while let Some(arg) = args.next() {
        if arg == "--" {
            arguments = Some(args.collect::<Vec<_>>());
            break;
        }
        own.push(arg);
    }
    for arg in &own {
        match arg.as_bytes() {
            b"-h" | b"-help" | b"--help" => return Ok(Request::Help),
            b"-V" | b"-version" | b"--version" => return Ok(Request::Version),
            _ => {}
        }
    }
    let given = collect(own)?;
    let clean = given.get("clean-resource").is_some();
    let options = options(&given, clean, arguments.unwrap_or_default())?;
    Ok(if clean {
        Request::Clean(options)
    } else {
        Request::Launch(options)
    })
}

fn collect(args: Vec<OsString>) -> Result<Given, Fault> {
    let mut given = Given::default();
    for arg in args {
        let Some(name) = arg
            .as_bytes()
            .strip_prefix(b"--")
            .or_else(|| arg.as_bytes().strip_prefix(b"-"))
        else {
            match given.values.last_mut() {
                Some((name, values)) => {
                    let room = match takes(name) {
                        Takes::Nothing => 0,
                        Takes::One => 1,
                        Takes::Some => usize::MAX,
                    };
                    if values.len() >= room {
                        let allowed = if room == 0 { "no value" } else { "one value" };
                        return Err(Fault::new(
                            format!("-{name} {}", arg.display()),
                            format!("takes {allowed}; what is for stratovirt comes after --"),
                        ));
                    }
                    values.push(arg);
                    continue;
                }
                None => {
                    return Err(Fault::new(
                        arg.display().to_string(),
                        "not an argument; the first one starts with a dash",
                    ));
                }
            }
        };
        let Some((name, _)) = KNOWN.iter().find(|(known, _)| known.as_bytes() == name) else {
            let all: Vec<String> = KNOWN.iter().map(|(name, _)| format!("-{name}")).collect();
            return Err(Fault::new(
                arg.display().to_string(),
                format!(
                    "no such argument; allowed are {}; what is for stratovirt comes after --",
                    all.join(", ")
                ),
            ));
        };
        if given.get(name).is_some() {
            return Err(Fault::new(format!("-{name}"), "given twice"));
        }
        given.values.push((name, Vec::new()));
    }
    for (name, values) in &given.values {
        if values.is_empty() && !matches!(takes(name), Takes::Nothing) {
            return Err(Fault::new(format!("-{name}"), "needs a value"));
        }
    }
    Ok(given)
}

fn takes(name: &str) -> &'static Takes {
    KNOWN
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(&Takes::Nothing, |(_, takes)| takes)
}

impl Given {
    fn get(&self, name: &str) -> Option<&[OsString]> {
        self.values
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, values)| values.as_slice())
    }

    /// The value of an argument that takes one.
    fn one(&self, name: &str) -> Option<&OsString> {
        self.get(name)?.first()
    }

    fn must(&self, name: &str, allowed: &str) -> Result<&OsString, Fault> {
        self.one(name).ok_or_else(|| {
            Fault::new(
                format!("-{name}"),
                format!("must be given; allowed: {allowed}"),
            )
        })
    }

    /// The values of an argument that takes several, also separated by commas, as text.
    fn words(&self, name: &str) -> Result<Vec<&str>, Fault> {
        let mut words = Vec::new();
        for value in self.get(name).unwrap_or_default() {
            let text = value.to_str().ok_or_else(|| {
                Fault::new(format!("-{name} {}", value.display()), "not UTF-8 text")
            })?;
            words.extend(text.split(',').filter(|word| !word.is_empty()));
        }
        Ok(words)
    }
}

fn options(given: &Given, clean: bool, arguments: Vec<OsString>) -> Result<Options, Fault> {
    let name = given.must("name", "1 to 255 bytes")?;
    let name = component("-name", name.as_bytes())?;
    let exec_file = PathBuf::from(given.must("exec_file", "a static program")?);
    let exec_name = last_component("-exec_file", &exec_file)?;
    if [c"dev", c"proc"].contains(&exec_name.as_c_str()) {
        return Err(Fault::new(
            format!("-exec_file {}", exec_file.display()),
            "the names dev and proc are taken in the jail",
        ));
    }
    let sources = given.get("source").unwrap_or_default();
    if sources.len() > MAX_SOURCES {
        return Err(Fault::new(
            "-source",
            format!("{} files; at most {MAX_SOURCES}", sources.len()),
        ));
    }
    let sources = sources
        .iter()
        .map(|path| {
            let path = PathBuf::from(path);
            let name = last_component("-source", &path)?;
            Ok((path, name))
        })
        .collect::<Result<_, Fault>>()?;
    let text = |value: OsString| {
        CString::new(value.as_bytes())
            .map_err(|_| Fault::new(value.display().to_string(), "holds a zero byte"))
    };
    Ok(Options {
        name,
        exec_name,
        exec_file,
        uid: id(given, "uid", clean)?,
        gid: id(given, "gid", clean)?,
        capabilities: given
            .words("capability")?
            .into_iter()
            .map(|word| {
                caps::by_name(word).ok_or_else(|| {
                    Fault::new(
                        format!("-capability {word}"),
                        "no such capability; allowed are the names of capabilities(7), \
                         from CAP_CHOWN to CAP_CHECKPOINT_RESTORE",
                    )
                })
            })
            .collect::<Result<_, _>>()?,
        netns: given.one("netns").map(PathBuf::from),
        sources,
        cgroup: limits(given)?,
        arguments: arguments.into_iter().map(text).collect::<Result<_, _>>()?,
    })
}

fn id(given: &Given, name: &str, optional: bool) -> Result<u32, Fault> {
    let allowed = format!("1 to {MAX_ID}");
    if optional && given.one(name).is_none() {
        return Ok(0);
    }
    let value = given.must(name, &allowed)?;
    let number = value.to_str().filter(|text| !text.starts_with('+'));
    match number.and_then(|text| text.parse().ok()) {
        Some(id @ 1..=MAX_ID) => Ok(id),
        Some(0) => Err(Fault::new(
            format!("-{name} 0"),
            format!("a VM never runs as root; allowed: {allowed}"),
        )),
        _ => Err(Fault::new(
            format!("-{name} {}", value.display()),
            format!("not a number in the allowed range, {allowed}"),
        )),
    }
}

/// One name of a folder: what a path is built from.
fn component(subject: &str, bytes: &[u8]) -> Result<CString, Fault> {
    let shown = format!("{subject} {}", String::from_utf8_lossy(bytes));
    if bytes.is_empty() || bytes.len() > MAX_NAME {
        return Err(Fault::new(
            shown,
            format!("{} bytes; allowed: 1 to {MAX_NAME}", bytes.len()),
        ));
    }
    if matches!(bytes, b"." | b"..") || bytes.iter().any(|b| *b == b'/' || b.is_ascii_control()) {
        return Err(Fault::new(
            shown,
            "must be a plain name: no '/', no control character, not '.' or '..'",
        ));
    }
    CString::new(bytes).map_err(|_| Fault::new(subject, "holds a zero byte"))
}

fn last_component(subject: &str, path: &std::path::Path) -> Result<CString, Fault> {
    match path.file_name() {
        Some(name) => component(subject, name.as_bytes()),
        None => Err(Fault::new(
            format!("{subject} {}", path.display()),
            "does not end with a file name",
        )),
    }
}

fn limits(given: &Given) -> Result<Cgroup, Fault> {
    let mut cpus: Option<String> = None;
    let mut memory = None;
    let mut last = "";
    for word in given.words("cgroup")? {
        let (key, value) = match word.split_once('=') {
            Some(pair) => pair,
            // The list of processors has commas of its own.
            None if last == "cpuset.cpus" => ("", word),
            None => {
                return Err(Fault::new(
                    format!("-cgroup {word}"),
                    "must be CONTROLLER=VALUE",
                ));
            }
        };
        match key {
            "" => {
                if let Some(cpus) = &mut cpus {
                    *cpus = format!("{cpus},{value}");
                }
                continue;
            }
            "cpuset.cpus" if cpus.is_none() => cpus = Some(value.to_owned()),
            "memory.limit_in_bytes" if memory.is_none() => memory = Some(bytes(value)?),
            "cpuset.cpus" | "memory.limit_in_bytes" => {
                return Err(Fault::new(format!("-cgroup {key}"), "given twice"));
            }
            _ => {
                return Err(Fault::new(
                    format!("-cgroup {word}"),
                    "no such controller; allowed: cpuset.cpus, memory.limit_in_bytes",
                ));
            }
        }
        last = key;
    }
    let nodes = given.words("numa")?.join(",");
    let list = |subject: &str, text: &str, what: &str| {
        cgroup::check_list(text).map_err(|why| Fault::new(subject, format!("{why}; {what}")))
    };
    if let Some(cpus) = &cpus {
        let subject = format!("-cgroup cpuset.cpus={cpus}");
        list(
            &subject,
            cpus,
            "allowed is a list of processors, like 0-1,4",
        )?;
    }
    if given.get("numa").is_some() {
        list(
            &format!("-numa {nodes}"),
            &nodes,
            "allowed is a memory node, or a list like 0-1",
        )?;
    }
    let cpuset = match (cpus, given.get("numa").is_some()) {
        (Some(cpus), true) => Some((cpus, nodes)),
        (Some(cpus), false) => {
            return Err(Fault::new(
                format!("-cgroup cpuset.cpus={cpus}"),
                "also needs -numa NODE, the memory node that belongs to these processors",
            ));
        }
        (None, true) => {
            return Err(Fault::new(
                format!("-numa {nodes}"),
                "has no effect without -cgroup cpuset.cpus=LIST",
            ));
        }
        (None, false) => None,
    };
    Ok(Cgroup { cpuset, memory })
}

/// A number of bytes with an optional K, M or G.
fn bytes(text: &str) -> Result<u64, Fault> {
    /// What a signed 64-bit number holds: v1 takes no more.
    const MOST: u64 = i64::MAX as u64;
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = (!digits.starts_with('+'))
        .then(|| digits.parse::<u64>().ok())
        .flatten();
    number
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|n| (1..=MOST).contains(n))
        .ok_or_else(|| {
            Fault::new(
                format!("-cgroup memory.limit_in_bytes={text}"),
                format!("not a number of bytes; allowed: 1 to {MOST}, also with K, M or G"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Request, String> {
        parse(line.split_whitespace().map(OsString::from).collect()).map_err(|e| e.to_string())
    }

    fn launch(line: &str) -> Options {
        match read(line) {
            Ok(Request::Launch(options)) => options,
            other => panic!("{line}: {other:?}"),
        }
    }

    const LEAST: &str = "-name vm -exec_file /opt/stratovirt -uid 100 -gid 101";

    #[test]
    fn the_manuals_example() {
        let options = launch(
            "-name stratovirt_ozone -exec_file /path/to/stratovirt -gid 100 -uid 100 \
             -capability CAP_CHOWN -netns /var/run/netns/mynet -source /path/to/vmlinux.bin \
             /path/to/rootfs -numa 0 -cgroup cpuset.cpus=4-5 memory.limit_in_bytes=1000000 -- \
             -kernel ./vmlinux.bin -append console=ttyS0 -- x",
        );
        assert_eq!(options.name.as_c_str(), c"stratovirt_ozone");
        assert_eq!(options.exec_name.as_c_str(), c"stratovirt");
        assert_eq!((options.uid, options.gid), (100, 100));
        assert_eq!(options.capabilities, [0]);
        assert_eq!(options.netns, Some("/var/run/netns/mynet".into()));
        let names: Vec<_> = options.sources.iter().map(|(_, name)| name).collect();
        assert_eq!(names, [c"vmlinux.bin", c"rootfs"]);
        assert_eq!(options.cgroup.cpuset, Some(("4-5".into(), "0".into())));
        assert_eq!(options.cgroup.memory, Some(1_000_000));
        assert_eq!(options.arguments.len(), 6);
        assert_eq!(options.arguments[4].as_c_str(), c"--");
    }

    #[test]
    fn the_manuals_cleaning() {
        let line = "-name vm -exec_file /x/stratovirt -gid 100 -uid 100 -netns /n -source /a /b \
                    -clean-resource";
        assert!(matches!(read(line), Ok(Request::Clean(_))));
        assert!(matches!(
            read("--name vm --exec_file stratovirt --clean-resource"),
            Ok(Request::Clean(_))
        ));
    }

    #[test]
    fn commas_separate_too() {
        let options = launch(&format!(
            "{LEAST} -numa 0 -cgroup cpuset.cpus=0,2-3,memory.limit_in_bytes=2G \
             -capability CAP_CHOWN,CAP_NET_ADMIN"
        ));
        assert_eq!(options.cgroup.cpuset, Some(("0,2-3".into(), "0".into())));
        assert_eq!(options.cgroup.memory, Some(2 << 30));
        assert_eq!(options.capabilities, [0, 12]);
    }

    #[test]
    fn mistakes_name_argument_value_and_range() {
        for (more, wanted) in [
            ("-uid 5", "-uid: given twice"),
            (
                "-numa 0",
                "-numa 0: has no effect without -cgroup cpuset.cpus=LIST",
            ),
            (
                "-cgroup cpuset.cpus=1",
                "-cgroup cpuset.cpus=1: also needs -numa NODE",
            ),
            (
                "-cgroup cpu.shares=1",
                "-cgroup cpu.shares=1: no such controller; allowed: cpuset.cpus, memory.limit_in_bytes",
            ),
            (
                "-cgroup memory.limit_in_bytes=0",
                "-cgroup memory.limit_in_bytes=0: not a number of bytes; allowed: 1 to",
            ),
            ("-cgroup memory.limit_in_bytes=+1", "allowed: 1 to"),
            (
                "-cgroup memory.limit_in_bytes=99999999999G",
                "allowed: 1 to",
            ),
            ("-cgroup memory.limit_in_bytes=", "allowed: 1 to"),
            ("-cgroup cpuset.cpus=a -numa 0", "-cgroup cpuset.cpus=a: "),
            (
                "-cgroup cpuset.cpus=3-1 -numa 0",
                "-cgroup cpuset.cpus=3-1: ",
            ),
            ("-cgroup cpuset.cpus=1 -numa x", "-numa x: "),
            (
                "-capability CAP_ROOT",
                "-capability CAP_ROOT: no such capability",
            ),
            ("-source", "-source: needs a value"),
            ("-source /", "-source /: does not end with a file name"),
            ("-netns a b", "-netns b: takes one value"),
            ("-clean-resource x", "-clean-resource x: takes no value"),
            (
                "-drive file=x",
                "-drive: no such argument; allowed are -name, -exec_file",
            ),
        ] {
            let error = read(&format!("{LEAST} {more}")).expect_err(more);
            assert!(error.contains(wanted), "{more}: {error}");
        }
        for (line, wanted) in [
            ("-exec_file x -uid 1 -gid 1", "-name: must be given"),
            ("-name x -uid 1 -gid 1", "-exec_file: must be given"),
            (
                "-name x -exec_file y -gid 1",
                "-uid: must be given; allowed: 1 to 4294967294",
            ),
            (
                "-name x -exec_file y -uid 0 -gid 1",
                "-uid 0: a VM never runs as root",
            ),
            (
                "-name x -exec_file y -uid 4294967295 -gid 1",
                "-uid 4294967295: not a number in the allowed range, 1 to 4294967294",
            ),
            ("-name x -exec_file y -uid +1 -gid 1", "-uid +1: "),
            (
                "-name a/b -exec_file y -uid 1 -gid 1",
                "-name a/b: must be a plain name",
            ),
            (
                "-name .. -exec_file y -uid 1 -gid 1",
                "-name ..: must be a plain name",
            ),
            (
                "-name x -exec_file /a/.. -uid 1 -gid 1",
                "-exec_file /a/..: does not end",
            ),
            (
                "-name x -exec_file proc -uid 1 -gid 1",
                "-exec_file proc: the names dev and proc",
            ),
            ("vm", "vm: not an argument"),
        ] {
            let error = read(line).expect_err(line);
            assert!(error.contains(wanted), "{line}: {error}");
        }
        let long = "n".repeat(256);
        let error = read(&format!("-name {long} -exec_file y -uid 1 -gid 1")).unwrap_err();
        assert!(error.ends_with("256 bytes; allowed: 1 to 255"), "{error}");
    }

    #[test]
    fn help_tells_of_every_argument() {
        for (name, _) in KNOWN {
            assert!(
                super::super::help::TEXT.contains(&format!("-{name}")),
                "{name}"
            );
        }
        assert_eq!(read("-uid x --help"), Ok(Request::Help));
        assert_eq!(read("-version"), Ok(Request::Version));
    }
}
