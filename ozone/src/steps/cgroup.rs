//! Cgroups: processors, memory nodes and memory of a VM, by version 1 or version 2.
//!
//! A controller belongs to one hierarchy of a host, which `/proc/self/mountinfo` tells. Below its
//! top, the group of a VM is `zozne/{program}/{name}`, so that cleaning up finds it without having
//! been there at the start. Version 1 wants a cpuset's parents filled in first; version 2 wants the
//! controllers handed down, and calls `memory.limit_in_bytes` `memory.max`.

use crate::{
    cli::Cgroup,
    fault::{Fault, TRIES},
    steps::folder,
};
use nix::{errno::Errno, fcntl::OFlag, sys::stat::Mode, unistd};
use std::{
    ffi::{CStr, CString, OsStr},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

/// The folder below the top of a hierarchy that holds all groups of this launcher.
const OURS: &CStr = c"zozne";

/// Most bytes of a control file that are read.
const MAX_READ: usize = 4096;

/// Version of a hierarchy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    mount: PathBuf,
    /// Controllers as version 1 mounts name them; empty with version 2.
    controllers: Vec<String>,
}

/// One value to be written, and the argument that asked for it.
struct Setting {
    controller: &'static str,
    file: CString,
    value: String,
    argument: String,
}

/// A group that was made.
#[derive(Debug)]
pub(crate) struct Made {
    /// `cgroup.procs` of the group: a process that writes 0 to it joins.
    pub(crate) procs: OwnedFd,
    /// Folders that were made, outermost first: the parent and the name.
    pub(crate) folders: Vec<(OwnedFd, CString)>,
}

/// Why `text` is not a list like `0-1,4` of processors or memory nodes.
pub(crate) fn check_list(text: &str) -> Result<(), &'static str> {
    numbers(text).map(drop)
}

/// The numbers of a list, in its order.
fn numbers(text: &str) -> Result<Vec<u32>, &'static str> {
    const HIGHEST: u32 = 65_535;
    let number = |digits: &str| match digits.parse::<u32>() {
        Ok(n) if n <= HIGHEST && digits.bytes().all(|b| b.is_ascii_digit()) => Ok(n),
        _ => Err("not a list of numbers from 0 to 65535"),
    };
    let mut all = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err("a range goes upwards");
        }
        all.extend(first..=last);
    }
    Ok(all)
}

/// Hierarchies in the text of `/proc/self/mountinfo` (proc(5)).
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let one = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mount = unescape(left.split(' ').nth(4)?);
        let mut right = right.split(' ');
        let version = match right.next()? {
            "cgroup" => Version::One,
            "cgroup2" => Version::Two,
            _ => return None,
        };
        let options = right.nth(1).unwrap_or_default();
        let controllers = match version {
            Version::One => options.split(',').map(str::to_owned).collect(),
            Version::Two => Vec::new(),
        };
        Some(Hierarchy {
            version,
            mount,
            controllers,
        })
    };
    mountinfo.lines().filter_map(one).collect()
}

/// Undoes mountinfo's `\040` for a space and the like.
fn unescape(text: &str) -> PathBuf {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let code = match (byte, after.first_chunk::<3>()) {
            (b'\\', Some(digits)) => std::str::from_utf8(digits)
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 8).ok()),
            _ => None,
        };
        out.push(code.unwrap_or(byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsStr::from_bytes(&out))
}

fn mounted() -> Result<Vec<Hierarchy>, Fault> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(path)
        .map_err(|e| Fault::new(path, format!("cannot be read: {e}")))?;
    Ok(hierarchies(&text))
}

/// Makes the groups that `wanted` needs. What was made before an error is in `made`.
pub(crate) fn make(
    wanted: &Cgroup,
    program: &CStr,
    name: &CStr,
    made: &mut Vec<Made>,
) -> Result<(), Fault> {
    let all = mounted()?;
    let mut left = settings(wanted);
    // Version 1 first: a controller that it has is not version 2's.
    for version in [Version::One, Version::Two] {
        for hierarchy in all.iter().filter(|h| h.version == version) {
            let has = controllers(hierarchy)?;
            let (mine, others) = left
                .into_iter()
                .partition::<Vec<_>, _>(|s| has.iter().any(|c| c == s.controller));
            left = others;
            if !mine.is_empty() {
                let mut tries = 1;
                loop {
                    match make_in(hierarchy, &mine, program, name, made) {
                        Err(fault) if fault.is_vanished() && tries < TRIES => tries += 1,
                        other => break other?,
                    }
                }
            }
        }
    }
    match left.first() {
        None => Ok(()),
        Some(setting) => Err(Fault::new(
            setting.argument.clone(),
            format!(
                "no mounted cgroup hierarchy, version 1 or 2, has the {} controller",
                setting.controller
            ),
        )),
    }
}

/// The values with their names of version 2, which [`make_in`] translates.
fn settings(wanted: &Cgroup) -> Vec<Setting> {
    let mut list = Vec::new();
    if let Some((cpus, nodes)) = &wanted.cpuset {
        list.push(Setting {
            controller: "cpuset",
            file: c"cpuset.cpus".into(),
            value: cpus.clone(),
            argument: format!("-cgroup cpuset.cpus={cpus}"),
        });
        list.push(Setting {
            controller: "cpuset",
            file: c"cpuset.mems".into(),
            value: nodes.clone(),
            argument: format!("-numa {nodes}"),
        });
    }
    if let Some(bytes) = wanted.memory {
        list.push(Setting {
            controller: "memory",
            file: c"memory.max".into(),
            value: bytes.to_string(),
            argument: format!("-cgroup memory.limit_in_bytes={bytes}"),
        });
    }
    list
}

fn controllers(hierarchy: &Hierarchy) -> Result<Vec<String>, Fault> {
    match hierarchy.version {
        Version::One => Ok(hierarchy.controllers.clone()),
        Version::Two => {
            let top = open_top(hierarchy)?;
            let text = read(top.as_fd(), c"cgroup.controllers")
                .map_err(|e| Fault::os(hierarchy.mount.display().to_string(), "cgroups", e))?;
            Ok(text.split_whitespace().map(str::to_owned).collect())
        }
    }
}

fn open_top(hierarchy: &Hierarchy) -> Result<OwnedFd, Fault> {
    folder::open_absolute(&hierarchy.mount).map_err(|e| {
        Fault::os(
            hierarchy.mount.display().to_string(),
            "cannot open the cgroup hierarchy",
            e,
        )
    })
}

fn make_in(
    hierarchy: &Hierarchy,
    settings: &[Setting],
    program: &CStr,
    name: &CStr,
    made: &mut Vec<Made>,
) -> Result<(), Fault> {
    let path = |depth: &CStr| {
        format!(
            "cgroup {}/{}",
            hierarchy.mount.display(),
            depth.to_string_lossy()
        )
    };
    let mut folders = Vec::new();
    let mut parent = open_top(hierarchy)?;
    let outcome = (|| {
        for name in [OURS, program] {
            hand_down(hierarchy.version, parent.as_fd(), settings)?;
            let (inner, new) = folder::ensure(parent.as_fd(), name)
                .map_err(|e| Fault::os(path(name), "cannot be made", e))?;
            let outer = std::mem::replace(&mut parent, inner);
            let filled = fill_cpuset(hierarchy.version, outer.as_fd(), parent.as_fd(), settings);
            if new {
                folders.push((outer, name.to_owned()));
            }
            filled?;
        }
        hand_down(hierarchy.version, parent.as_fd(), settings)?;
        let mode = Mode::from_bits_truncate(0o755);
        // Before the group is there: without the copy nobody could remove it.
        let above = parent
            .try_clone()
            .map_err(|e| Fault::new(path(name), e.to_string()))?;
        let group = folder::make(parent.as_fd(), name, mode).map_err(|e| match e {
            Errno::EEXIST => Fault::new(
                path(name),
                "exists already: the name is in use, or was not cleaned up; see -clean-resource",
            ),
            e => Fault::os(path(name), "cannot be made", e),
        })?;
        folders.push((above, name.to_owned()));
        for setting in settings {
            apply(hierarchy.version, parent.as_fd(), group.as_fd(), setting)?;
        }
        folder::open_in(
            group.as_fd(),
            c"cgroup.procs",
            OFlag::O_WRONLY,
            Mode::empty(),
        )
        .map_err(|e| Fault::os(path(name), "cannot be joined", e))
    })();
    match outcome {
        Ok(procs) => {
            made.push(Made { procs, folders });
            Ok(())
        }
        Err(fault) => {
            for (parent, name) in folders.iter().rev() {
                // Others may have groups beside ours; those that we filled first are empty.
                let _ = folder::remove_folder(parent.as_fd(), name);
            }
            Err(fault)
        }
    }
}

/// Version 2: lets the groups below `group` have the controllers.
fn hand_down(version: Version, group: BorrowedFd<'_>, settings: &[Setting]) -> Result<(), Fault> {
    if version == Version::One {
        return Ok(());
    }
    for setting in settings {
        let value = format!("+{}", setting.controller);
        write(group, c"cgroup.subtree_control", &value).map_err(|e| {
            Fault::os(
                setting.argument.clone(),
                format!(
                    "the {} controller cannot be handed down",
                    setting.controller
                ),
                e,
            )
        })?;
    }
    Ok(())
}

/// Version 1: a cpuset without processors and nodes lets no group below have any.
fn fill_cpuset(
    version: Version,
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    settings: &[Setting],
) -> Result<(), Fault> {
    if version == Version::Two {
        return Ok(());
    }
    for setting in settings.iter().filter(|s| s.controller == "cpuset") {
        let copy = || -> Result<(), Errno> {
            if read(to, &setting.file)?.trim().is_empty() {
                write(to, &setting.file, read(from, &setting.file)?.trim())?;
            }
            Ok(())
        };
        copy().map_err(|e| {
            Fault::os(
                setting.argument.clone(),
                "the groups above cannot be prepared",
                e,
            )
        })?;
    }
    Ok(())
}

fn apply(
    version: Version,
    parent: BorrowedFd<'_>,
    group: BorrowedFd<'_>,
    setting: &Setting,
) -> Result<(), Fault> {
    let file = match (version, setting.controller) {
        (Version::One, "memory") => c"memory.limit_in_bytes",
        _ => &setting.file,
    };
    let offered = || {
        let suffix = if version == Version::Two {
            ".effective"
        } else {
            ""
        };
        let file = format!("{}{suffix}", setting.file.to_string_lossy());
        let file = CString::new(file).unwrap_or_default();
        read(parent, &file).unwrap_or_default().trim().to_owned()
    };
    if setting.controller == "cpuset" {
        // Version 2 takes what is not there and leaves it out; so does neither tell which it is.
        let offered = offered();
        let wanted = numbers(&setting.value).unwrap_or_default();
        let there = numbers(&offered).unwrap_or_default();
        if let Some(missing) = wanted.iter().find(|n| !there.contains(n)) {
            return Err(Fault::new(
                setting.argument.clone(),
                format!("{missing} is not there; the host offers {offered}"),
            ));
        }
    }
    write(group, file, &setting.value)
        .map_err(|e| Fault::os(setting.argument.clone(), "the kernel refuses it", e))
}

fn read(folder: BorrowedFd<'_>, name: &CStr) -> Result<String, Errno> {
    let file = folder::open_in(folder, name, OFlag::O_RDONLY, Mode::empty())?;
    let mut buffer = vec![0; MAX_READ];
    let length = unistd::read(&file, &mut buffer)?;
    buffer.truncate(length);
    String::from_utf8(buffer).map_err(|_| Errno::EINVAL)
}

fn write(folder: BorrowedFd<'_>, name: &CStr, value: &str) -> Result<(), Errno> {
    let file = folder::open_in(folder, name, OFlag::O_WRONLY, Mode::empty())?;
    unistd::write(&file, value.as_bytes()).map(drop)
}

/// Moves the calling process into the group behind a [`Made::procs`].
pub(crate) fn join(procs: BorrowedFd<'_>) -> Result<(), Errno> {
    unistd::write(procs, b"0").map(drop)
}

/// Removes the groups of a VM wherever they are, and the folders above that are empty then.
pub(crate) fn remove(program: &CStr, name: &CStr) -> Result<(), Fault> {
    for hierarchy in mounted()? {
        let Ok(top) = folder::open_absolute(&hierarchy.mount) else {
            // Covered by another mount; no group of ours was made through it.
            continue;
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let Ok(ours) = folder::open_in(top.as_fd(), OURS, flags, Mode::empty()) else {
            continue;
        };
        if let Ok(group) = folder::open_in(ours.as_fd(), program, flags, Mode::empty()) {
            folder::remove_folder(group.as_fd(), name).map_err(|e| {
                let path = format!(
                    "cgroup {}/{}/{}/{}",
                    hierarchy.mount.display(),
                    OURS.to_string_lossy(),
                    program.to_string_lossy(),
                    name.to_string_lossy()
                );
                match e {
                    Errno::EBUSY => Fault::new(path, "still has processes"),
                    e => Fault::os(path, "cannot be removed", e),
                }
            })?;
        }
        for (parent, name) in [(&ours, program), (&top, OURS)] {
            match folder::remove_folder(parent.as_fd(), name) {
                // Other VMs are there.
                Ok(()) | Err(Errno::EBUSY | Errno::ENOTEMPTY) => {}
                Err(e) => {
                    let name = name.to_string_lossy();
                    return Err(Fault::os(format!("cgroup {name}"), "cannot be removed", e));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_does() {
        assert_eq!(numbers("0"), Ok(vec![0]));
        assert_eq!(numbers("0-2,7"), Ok(vec![0, 1, 2, 7]));
        for wrong in [
            "", "a", "1-", "-1", "1,,2", "+1", "65536", "2-1", "0x1", "1 ",
        ] {
            assert!(numbers(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let text = "\
24 23 0:21 / /proc rw - proc proc rw
31 30 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:27 / /sys/fs/cgroup/memory rw shared:10 master:1 - cgroup cgroup rw,memory
33 30 0:28 / /a\\040b rw - cgroup2 cgroup2 rw,nsdelegate
";
        let found = hierarchies(text);
        let paths: Vec<_> = found.iter().map(|h| h.mount.to_str().unwrap()).collect();
        assert_eq!(
            paths,
            [
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/memory",
                "/a b"
            ]
        );
        assert!(found[1].controllers.iter().any(|c| c == "memory"));
        assert_eq!(found[2].version, Version::Two);
    }
}
