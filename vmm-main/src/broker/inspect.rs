//! What confines each process of the VM, read from `/proc`.
//!
//! **Job.** The facts of [`ipc::control::sandbox`] about the control process, the broker itself and every device process.
//! **Who is not trusted**: the processes that are looked at. Everything they can make large or odd is capped and cleaned.
//! **Why this way.** No capability is kept for this. The kernel lets a process look into those of a user namespace that it
//! made, whatever else it may do, and device processes live in such ones. The control process does not; it opens itself for
//! the moment of [`Witness::of`], before the guest runs. What stays readable from then on is read anew each time: its
//! threads, limits and mappings, and the numbers of its descriptors. Its namespaces and root cannot change, since its
//! filters know no call for that. What a descriptor leads to is told as it was at that moment, and said to be so.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ipc::control::sandbox::{
    Fact, FdFacts, Limit, MemoryFacts, NAMESPACES, ProcessFacts, Role, RootFacts, ThreadFacts,
};
use ipc::limits::{
    MAX_INSPECTED_FDS, MAX_INSPECTED_NAME, MAX_INSPECTED_NAMES, MAX_INSPECTED_THREADS,
    MAX_PROC_FILE,
};
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fstatat};

/// What the control process showed at lock-down, and what of it can still be read.
#[derive(Debug)]
pub(super) struct Witness {
    pid: i32,
    namespaces: Fact<[u64; 7]>,
    program: Fact<PathBuf>,
    /// What its descriptors led to, by number.
    kinds: BTreeMap<i32, String>,
    /// Its `/proc/PID/fd` and `/proc/PID/maps`, whose rights were checked when they were opened.
    numbers: Fact<Dir>,
    maps: Fact<File>,
}

impl Witness {
    /// Looks into `pid`, which is open to that now.
    pub(super) fn of(pid: i32) -> Self {
        let folder = of_process(pid);
        Self {
            pid,
            namespaces: namespaces(&folder),
            program: told("exe", fs::read_link(folder.join("exe"))),
            kinds: kinds(&folder),
            numbers: told(
                "fd",
                Dir::open(
                    &folder.join("fd"),
                    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
                    Mode::empty(),
                ),
            ),
            maps: told("maps", File::open(folder.join("maps"))),
        }
    }

    /// The control process as it is now.
    pub(super) fn facts(&mut self) -> ProcessFacts {
        let mut facts = readable_by_all(Role::Control, self.pid);
        facts.namespaces = self.namespaces.clone();
        facts.dumpable = dumpable(self.pid, &facts, &facts.namespaces);
        facts.fds = self.descriptors();
        facts.memory = self.memory();
        facts
    }

    fn memory(&self) -> Fact<MemoryFacts> {
        let program = self.program.as_ref().map_err(Clone::clone)?;
        let mut maps: &File = self.maps.as_ref().map_err(Clone::clone)?;
        let text = told(
            "maps",
            maps.seek(SeekFrom::Start(0)).and_then(|_| text_of(maps)),
        )?;
        Ok(memory(&text, program))
    }

    /// Numbers as they are now, kinds as they were.
    fn descriptors(&mut self) -> Fact<Vec<FdFacts>> {
        let folder = self.numbers.as_mut().map_err(|why| why.clone())?;
        let mut numbers: Vec<i32> = folder
            .iter()
            .filter_map(|entry| entry.ok()?.file_name().to_str().ok()?.parse().ok())
            .take(MAX_INSPECTED_FDS)
            .collect();
        numbers.sort_unstable();
        Ok(numbers
            .into_iter()
            .map(|fd| {
                let name = fd.to_string();
                // The link's own rights are those of the open file.
                let mode = fstatat(&*folder, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                    .ok()
                    .map(|stat| stat.st_mode);
                FdFacts {
                    fd,
                    kind: self.kinds.get(&fd).cloned(),
                    access: mode.map(|mode| (mode & libc::S_IRUSR != 0, mode & libc::S_IWUSR != 0)),
                    since_lock_down: true,
                }
            })
            .collect())
    }
}

/// This process.
pub(super) fn broker() -> ProcessFacts {
    let pid = nix::unistd::getpid().as_raw();
    let mut facts = readable_by_its_owner(Role::Broker, pid);
    facts.dumpable = told("PR_GET_DUMPABLE", nix::sys::prctl::get_dumpable());
    facts
}

/// The process of a device.
pub(super) fn device(role: Role, pid: i32) -> ProcessFacts {
    let mut facts = readable_by_its_owner(role, pid);
    facts.dumpable = dumpable(pid, &facts, &facts.namespaces);
    if let Ok(root) = &mut facts.root {
        root.entries = fs::read_dir(of_process(pid).join("root/"))
            .ok()
            // A shared folder has as many as the guest likes.
            .map(|entries| entries.take(MAX_INSPECTED_NAMES).count() as u32);
    }
    facts
}

fn of_process(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

fn told<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Fact<T> {
    result.map_err(|e| format!("{what}: {e}"))
}

/// Everything that takes the right to look into the process, and everything else.
fn readable_by_its_owner(role: Role, pid: i32) -> ProcessFacts {
    let folder = of_process(pid);
    let mut facts = readable_by_all(role, pid);
    facts.namespaces = namespaces(&folder);
    facts.fds = descriptors(&folder);
    facts.memory = told("exe", fs::read_link(folder.join("exe")))
        .and_then(|program| Ok(memory(&read(&folder, "maps")?, &program)));
    facts
}

/// What the kernel shows of every process to everyone.
fn readable_by_all(role: Role, pid: i32) -> ProcessFacts {
    let folder = of_process(pid);
    let status = read(&folder, "status").map(|text| fields(&text));
    let list = |name: &str| -> Fact<Vec<u32>> {
        let status = status.as_ref().map_err(Clone::clone)?;
        status
            .get(name)
            .and_then(|text| text.split_whitespace().map(|w| w.parse().ok()).collect())
            .ok_or_else(|| format!("status: no {name}"))
    };
    let four = |name: &str| -> Fact<[u32; 4]> {
        list(name)?
            .try_into()
            .map_err(|_| format!("status: {name} has an unknown form"))
    };
    let not_asked = || "not looked at".to_owned();
    ProcessFacts {
        role,
        pid,
        name: status
            .as_ref()
            .map_err(Clone::clone)
            .map(|status| clean(status.get("Name").map_or("", String::as_str))),
        uids: four("Uid"),
        gids: four("Gid"),
        groups: list("Groups"),
        uid_map: id_map(&folder, "uid_map"),
        gid_map: id_map(&folder, "gid_map"),
        dumpable: Err(not_asked()),
        threads: threads(&folder),
        namespaces: Err(not_asked()),
        root: root(&folder),
        limits: limits(&folder),
        fds: Err(not_asked()),
        memory: Err(not_asked()),
    }
}

/// Whether the kernel treats the process as dumpable. No file says so. Files of a process that is not belong to user 0; if
/// its own user is that too, the kernel's answer to a look into it decides, provided that nothing else could forbid that.
fn dumpable(pid: i32, facts: &ProcessFacts, namespaces: &Fact<[u64; 7]>) -> Fact<bool> {
    let folder = of_process(pid);
    let user = facts.uids.as_ref().map_err(Clone::clone)?[1];
    let owner = told("status", fs::metadata(folder.join("status")))?.uid();
    if user != 0 {
        return Ok(owner == user);
    }
    let own_pid = nix::unistd::getpid().as_raw();
    let users = |all: &Fact<[u64; 7]>| all.as_ref().map(|all| all[0]).map_err(Clone::clone);
    if users(namespaces)? != users(&self::namespaces(&of_process(own_pid)))? {
        return Err("shown to the maker of its user namespace either way".into());
    }
    let own = readable_by_all(Role::Broker, own_pid);
    let permitted = |facts: &ProcessFacts| {
        facts.threads.as_ref().ok().map(|threads| {
            let sets = threads.iter().map(|thread| thread.capabilities[1]);
            sets.fold(0, |all, set| all | set)
        })
    };
    const CAP_SYS_PTRACE: u64 = 1 << 19; // include/uapi/linux/capability.h
    match (permitted(facts), permitted(&own)) {
        (Some(its), Some(ours))
            if its & !ours == 0
                && ours & CAP_SYS_PTRACE == 0
                && own.uids == facts.uids
                && own.gids == facts.gids => {}
        _ => return Err("another right than dumpable would decide".into()),
    }
    match fs::read_link(folder.join("ns/user")) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(false),
        Err(e) => Err(format!("ns/user: {e}")),
    }
}

fn read(folder: &Path, name: &str) -> Fact<String> {
    told(name, File::open(folder.join(name)).and_then(text_of))
}

fn text_of(file: impl Read) -> std::io::Result<String> {
    // Most are shorter, and are read by one call then.
    let mut bytes = Vec::with_capacity(4096);
    file.take(MAX_PROC_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `Name: value` lines.
fn fields(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// A text that a process chose: short, and without control characters.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .scan(0, |length, c| {
            *length += c.len_utf8();
            (*length <= MAX_INSPECTED_NAME).then_some(c)
        })
        .collect()
}

fn id_map(folder: &Path, name: &str) -> Fact<Vec<[u32; 3]>> {
    read(folder, name)?
        .lines()
        .map(|line| {
            let numbers: Option<Vec<u32>> =
                line.split_whitespace().map(|w| w.parse().ok()).collect();
            numbers.and_then(|numbers| numbers.try_into().ok())
        })
        .collect::<Option<_>>()
        .ok_or_else(|| format!("{name}: unknown form"))
}

/// The numbers that a folder's entries are named after, at most `most`.
fn numbered(folder: &Path, name: &str, most: usize) -> Fact<Vec<i32>> {
    let mut numbers: Vec<i32> = told(name, fs::read_dir(folder.join(name)))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .take(most)
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn threads(folder: &Path) -> Fact<Vec<ThreadFacts>> {
    Ok(numbered(folder, "task", MAX_INSPECTED_THREADS)?
        .into_iter()
        // One that has ended meanwhile confines nothing.
        .filter_map(|tid| Some((tid, read(folder, &format!("task/{tid}/status")).ok()?)))
        .map(|(tid, text)| thread(tid, &fields(&text)))
        .collect::<Option<_>>()
        .ok_or("status: unknown form of a thread's")?)
}

fn thread(tid: i32, status: &BTreeMap<String, String>) -> Option<ThreadFacts> {
    let mut capabilities = [0; 5];
    for (set, name) in capabilities
        .iter_mut()
        .zip(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
    {
        *set = u64::from_str_radix(status.get(name)?, 16).ok()?;
    }
    Some(ThreadFacts {
        tid,
        name: clean(status.get("Name")?),
        seccomp: status.get("Seccomp")?.parse().ok()?,
        filters: status
            .get("Seccomp_filters")
            .and_then(|count| count.parse().ok()),
        capabilities,
        no_new_privs: status.get("NoNewPrivs")? == "1",
    })
}

fn namespaces(folder: &Path) -> Fact<[u64; 7]> {
    let mut inodes = [0; 7];
    for (inode, name) in inodes.iter_mut().zip(NAMESPACES) {
        let name = format!("ns/{name}");
        let link = told(&name, fs::read_link(folder.join(&name)))?;
        *inode = link
            .to_str()
            .and_then(|link| link.split(['[', ']']).nth(1)?.parse().ok())
            .ok_or_else(|| format!("{name}: unknown form"))?;
    }
    Ok(inodes)
}

/// The root folder's mount is the last one at `/`. Fields of a line: id, parent, device, root, mount point, options,
/// optional fields, `-`, type, source, options of the file system.
fn root(folder: &Path) -> Fact<RootFacts> {
    let text = read(folder, "mountinfo")?;
    let line = text
        .lines()
        .rfind(|line| line.split_whitespace().nth(4) == Some("/"))
        .ok_or("mountinfo: no mount at the root")?;
    let (mount, file_system) = line
        .split_once(" - ")
        .ok_or("mountinfo: unknown form of a line")?;
    let mut words = file_system.split_whitespace();
    let (kind, of_file_system) = (words.next(), words.nth(1));
    Ok(RootFacts {
        file_system: clean(kind.unwrap_or_default()),
        options: mount
            .split_whitespace()
            .nth(5)
            .into_iter()
            .chain(of_file_system)
            .flat_map(|options| options.split(','))
            // Options with a path are of the host's file systems.
            .filter(|option| !option.contains('/'))
            .take(MAX_INSPECTED_NAMES)
            .map(clean)
            .collect(),
        mounts: text.lines().count() as u32,
        entries: None,
    })
}

/// Columns of fixed width: name, soft limit, hard limit, unit.
fn limits(folder: &Path) -> Fact<Vec<Limit>> {
    let text = read(folder, "limits")?;
    text.lines()
        .skip(1)
        .map(|line| {
            let (name, rest) = line.split_at_checked(26)?;
            let mut words = rest.split_whitespace();
            let mut limit = || match words.next()? {
                "unlimited" => Some(None),
                number => number.parse().ok().map(Some),
            };
            Some(Limit {
                name: clean(name.trim()),
                soft: limit()?,
                hard: limit()?,
            })
        })
        .collect::<Option<_>>()
        .ok_or_else(|| "limits: unknown form".into())
}

/// `fdinfo` and not `fd` is listed: it is open to whoever may look into the process, `fd` to the files' owner only.
fn descriptors(folder: &Path) -> Fact<Vec<FdFacts>> {
    let facts = numbered(folder, "fdinfo", MAX_INSPECTED_FDS)?
        .into_iter()
        .filter_map(|fd| {
            // One that is closed by now is none.
            let info = fields(&read(folder, &format!("fdinfo/{fd}")).ok()?);
            let kind = || kind_of_info(&info).map(str::to_owned);
            Some(FdFacts {
                fd,
                kind: kind_of_link(folder, fd).or_else(kind),
                access: info.get("flags").and_then(|flags| access(flags)),
                since_lock_down: false,
            })
        })
        .collect();
    Ok(facts)
}

/// What is open under each number, as far as the links tell. A VM starts only once this is known, so that nothing is read
/// that can still be read later.
fn kinds(folder: &Path) -> BTreeMap<i32, String> {
    numbered(folder, "fd", MAX_INSPECTED_FDS)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|fd| Some((fd, kind_of_link(folder, fd)?)))
        .collect()
}

fn kind_of_link(folder: &Path, fd: i32) -> Option<String> {
    let target = fs::read_link(folder.join(format!("fd/{fd}"))).ok()?;
    Some(clean(&kind(&target.to_string_lossy())))
}

/// What a link of `/proc/PID/fd` leads to, without a path of the host's.
fn kind(target: &str) -> String {
    if let Some(rest) = target.strip_prefix("anon_inode:") {
        return rest.trim_matches(['[', ']']).to_owned();
    }
    if let Some(rest) = target.strip_prefix("/memfd:") {
        return format!("memfd:{}", rest.trim_end_matches(" (deleted)"));
    }
    if target.starts_with("/dev/") {
        return target.to_owned();
    }
    if target.starts_with("/proc/") {
        return "proc".to_owned();
    }
    match target.split_once(":[") {
        Some((kind, _)) => kind.to_owned(),
        None => "file".to_owned(),
    }
}

/// What the lines of `fdinfo` give away where the link is not to be read.
fn kind_of_info(info: &BTreeMap<String, String>) -> Option<&'static str> {
    [
        ("eventfd-count", "eventfd"),
        ("tfd", "eventpoll"),
        ("sigmask", "signalfd"),
        ("iff", "/dev/net/tun"),
        ("Pid", "pidfd"),
    ]
    .into_iter()
    .find(|(line, _)| info.contains_key(*line))
    .map(|(_, kind)| kind)
}

/// Reads and writes, by the open flags in octal.
fn access(flags: &str) -> Option<(bool, bool)> {
    let flags = i32::from_str_radix(flags, 8).ok()?;
    Some(match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => (false, false),
        libc::O_RDONLY => (true, false),
        libc::O_WRONLY => (false, true),
        _ => (true, true),
    })
}

/// A line of `maps`: range, rights, offset, device, inode, name.
fn memory(maps: &str, program: &Path) -> MemoryFacts {
    let mut facts = MemoryFacts::default();
    let program = program.to_string_lossy();
    for line in maps.lines() {
        let mut words = line.splitn(6, ' ');
        let (rights, inode) = (words.nth(1).unwrap_or_default(), words.nth(2));
        let name = words.next().unwrap_or_default().trim_start();
        facts.mappings += 1;
        if rights.contains('x') {
            facts.executable += 1;
            facts.writable_executable += u32::from(rights.contains('w'));
        }
        if name.starts_with("/memfd:") {
            facts.memfds += 1;
        } else if inode != Some("0")
            && name != program
            && !name.starts_with("anon_inode:")
            // What the kernel calls anonymous memory that is shared.
            && name != "/dev/zero (deleted)"
            && facts.foreign.len() < MAX_INSPECTED_NAMES
        {
            let file = name.rsplit('/').next().unwrap_or_default();
            facts.foreign.push(clean(file));
        }
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_sees_itself() {
        let facts = broker();
        assert_eq!(facts.dumpable, Ok(true));
        let memory = facts.memory.unwrap();
        assert!(memory.mappings > 3 && memory.executable > 0, "{memory:?}");
        assert_eq!(
            (memory.writable_executable, memory.foreign),
            (0, Vec::new())
        );
        let fds = facts.fds.unwrap();
        assert!(fds.iter().any(|fd| fd.fd == 2), "{fds:?}");
        assert!(facts.namespaces.unwrap().iter().all(|inode| *inode != 0));
        let threads = facts.threads.unwrap();
        assert!(threads.iter().all(|thread| thread.seccomp == 0));
        let limits = facts.limits.unwrap();
        assert!(limits.iter().any(|limit| limit.name == "Max open files"));
        assert!(!facts.root.unwrap().file_system.is_empty());
        assert!(!facts.uid_map.unwrap().is_empty());
    }

    #[test]
    fn a_witness_tells_old_descriptors_from_new_ones() {
        let mut witness = Witness::of(nix::unistd::getpid().as_raw());
        let new = File::open("/dev/null").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&new);
        let fds = witness.facts().fds.unwrap();
        let find = |fd| fds.iter().find(|facts| facts.fd == fd).unwrap();
        assert!(find(2).kind.is_some());
        assert_eq!(find(number).kind, None);
        assert_eq!(find(number).access, Some((true, false)));
        drop(new);
        let fds = witness.facts().fds.unwrap();
        assert!(fds.iter().all(|facts| facts.fd != number));
    }

    #[test]
    fn kinds_tell_no_paths() {
        assert_eq!(kind("anon_inode:[eventfd]"), "eventfd");
        assert_eq!(kind("anon_inode:kvm-vm"), "kvm-vm");
        assert_eq!(kind("/memfd:guest-ram (deleted)"), "memfd:guest-ram");
        assert_eq!(kind("socket:[17]"), "socket");
        assert_eq!(kind("/var/lib/secret.img"), "file");
        assert_eq!(kind("/dev/net/tun"), "/dev/net/tun");
    }

    #[test]
    fn mappings_that_should_not_be_are_named() {
        let maps = "\
7f0000000000-7f0000001000 rwxp 00000000 00:00 0 \n\
7f0000001000-7f0000002000 r-xp 00000000 08:01 17                         /usr/bin/block\n\
7f0000002000-7f0000003000 r--p 00000000 08:01 18                         /usr/lib/li bc.so\n\
7f0000003000-7f0000004000 rw-s 00000000 00:01 19                         /memfd:guest-ram (deleted)\n\
7f0000004000-7f0000005000 r-xp 00000000 00:00 0                          [vdso]\n";
        let facts = memory(maps, Path::new("/usr/bin/block"));
        assert_eq!((facts.mappings, facts.executable), (5, 3));
        assert_eq!((facts.writable_executable, facts.memfds), (1, 1));
        assert_eq!(facts.foreign, ["li bc.so"]);
    }

    #[test]
    fn names_are_short_and_clean() {
        assert_eq!(clean("a\u{1b}[31m"), "a?[31m");
        assert_eq!(clean(&"ä".repeat(100)).len(), MAX_INSPECTED_NAME);
    }
}
