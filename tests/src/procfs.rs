//! # What the kernel says about a process
//!
//! **Job.** Typed readers of `/proc/PID`: credentials and jail, namespaces, descriptors, memory, processor time,
//! and the tree below a process.
//! **Who is not trusted.** The process: nothing here asks it anything. A process may end between two reads, so
//! each reader is fallible on its own.
//! **Why this way.** A jail is proved by what the kernel enforces, and this is where the kernel shows it. Landlock is
//! the exception: no kernel shows a process's domain, so it is proved by `jail::probe`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn path(pid: i32, name: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(name)
}

fn read(pid: i32, name: &str) -> io::Result<String> {
    fs::read_to_string(path(pid, name))
}

fn malformed(name: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("/proc/PID/{name} has an unknown form"),
    )
}

/// `/proc/PID/status`, or that of one thread.
#[derive(Debug, Clone)]
pub struct Status(BTreeMap<String, String>);

impl Status {
    /// Of the process's first thread.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: i32) -> io::Result<Self> {
        read(pid, "status").map(|t| Self::parse(&t))
    }

    /// Of each thread, by thread id.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of_threads(pid: i32) -> io::Result<BTreeMap<i32, Self>> {
        let mut threads = BTreeMap::new();
        for tid in numbered(&path(pid, "task"))? {
            // A thread may end meanwhile.
            if let Ok(text) = read(pid, &format!("task/{tid}/status")) {
                threads.insert(tid, Self::parse(&text));
            }
        }
        Ok(threads)
    }

    fn parse(text: &str) -> Self {
        let fields = text.lines().filter_map(|l| l.split_once(':'));
        Self(
            fields
                .map(|(k, v)| (k.to_owned(), v.trim().to_owned()))
                .collect(),
        )
    }

    /// A field's text; empty when the kernel has no such field.
    #[must_use]
    pub fn field(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// The name, at most 15 bytes.
    #[must_use]
    pub fn name(&self) -> &str {
        self.field("Name")
    }

    /// 0 none, 1 strict, 2 a filter.
    #[must_use]
    pub fn seccomp_mode(&self) -> u32 {
        self.field("Seccomp").parse().unwrap_or(0)
    }

    /// Whether `no_new_privs` is set.
    #[must_use]
    pub fn no_new_privs(&self) -> bool {
        self.field("NoNewPrivs") == "1"
    }

    /// The five capability sets: inheritable, permitted, effective, bounding, ambient.
    #[must_use]
    pub fn capabilities(&self) -> [u64; 5] {
        ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
            .map(|n| u64::from_str_radix(self.field(n), 16).unwrap_or(u64::MAX))
    }

    /// Real, effective, saved and file system user id, as this process's user namespace sees them.
    #[must_use]
    pub fn uids(&self) -> Vec<u32> {
        self.field("Uid")
            .split_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect()
    }

    /// The process's id in each pid namespace, from this process's to its own.
    #[must_use]
    pub fn namespaced_pids(&self) -> Vec<i32> {
        self.field("NSpid")
            .split_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect()
    }
}

/// The inode numbers of a process's namespaces by their name ("user", "mnt", …).
///
/// # Errors
/// When there is no such process, or it may not be inspected.
pub fn namespaces(pid: i32) -> io::Result<BTreeMap<String, u64>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(path(pid, "ns"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let target = fs::read_link(entry.path())?.to_string_lossy().into_owned();
        let number = target.split(['[', ']']).nth(1).and_then(|n| n.parse().ok());
        all.insert(name, number.ok_or_else(|| malformed("ns"))?);
    }
    Ok(all)
}

/// One open descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fd {
    /// What the kernel's link says, for example `/dev/kvm` or `socket:[12]`.
    pub target: String,
    /// The open flags of `open(2)`, from `fdinfo`.
    pub flags: i32,
}

impl Fd {
    /// What kind of thing it is, in one word.
    #[must_use]
    pub fn kind(&self) -> &str {
        let target = self.target.as_str();
        if let Some(rest) = target.strip_prefix("anon_inode:") {
            return rest.trim_matches(['[', ']']);
        }
        if target.starts_with("/memfd:") {
            return "memfd";
        }
        match target.split_once(":[") {
            Some((kind, _)) => kind,
            None => target,
        }
    }

    /// Whether it was opened for writing.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }
}

/// The open descriptors by number.
///
/// # Errors
/// When there is no such process, or it may not be inspected.
pub fn fds(pid: i32) -> io::Result<BTreeMap<i32, Fd>> {
    let mut all = BTreeMap::new();
    for number in numbered(&path(pid, "fd"))? {
        let Ok(target) = fs::read_link(path(pid, &format!("fd/{number}"))) else {
            continue;
        };
        let info = read(pid, &format!("fdinfo/{number}")).unwrap_or_default();
        let flags = info
            .lines()
            .find_map(|l| l.strip_prefix("flags:"))
            .map(str::trim);
        let flags = flags
            .and_then(|f| i32::from_str_radix(f, 8).ok())
            .unwrap_or(0);
        all.insert(
            number,
            Fd {
                target: target.to_string_lossy().into_owned(),
                flags,
            },
        );
    }
    Ok(all)
}

/// The children of a process and theirs, parents first, without the process itself.
///
/// # Errors
/// When there is no such process.
pub fn descendants(pid: i32) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    let mut open = vec![pid];
    while let Some(parent) = open.pop() {
        let tasks = numbered(&path(parent, "task"));
        if parent == pid {
            tasks
                .as_ref()
                .map_err(|e| io::Error::new(e.kind(), e.to_string()))?;
        }
        for tid in tasks.unwrap_or_default() {
            let children = read(parent, &format!("task/{tid}/children")).unwrap_or_default();
            for child in children.split_whitespace().filter_map(|w| w.parse().ok()) {
                found.push(child);
                open.push(child);
            }
        }
    }
    Ok(found)
}

/// The processes whose standard error is the file at `path`.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn complaining_to(path: &Path) -> io::Result<Vec<i32>> {
    let mut pids = numbered(Path::new("/proc"))?;
    // One that has ended meanwhile complains no more.
    pids.retain(|pid| {
        std::fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|file| file == path)
    });
    Ok(pids)
}

/// The parent's id.
///
/// # Errors
/// When there is no such process.
pub fn parent(pid: i32) -> io::Result<i32> {
    Status::of(pid)?
        .field("PPid")
        .parse()
        .map_err(|_| malformed("status"))
}

/// The command line's words.
///
/// # Errors
/// When there is no such process.
pub fn command_line(pid: i32) -> io::Result<Vec<String>> {
    let text = read(pid, "cmdline")?;
    Ok(text.split_terminator('\0').map(str::to_owned).collect())
}

/// Proportional set size in KiB of all mappings but the guest's RAM, which is recognised by its size in bytes or,
/// where a process maps a part of it, by the memfd that it lies in.
///
/// # Errors
/// When there is no such process, or it may not be inspected.
pub fn pss_without_ram(pid: i32, ram: u64) -> io::Result<u64> {
    let text = read(pid, "smaps")?;
    let mut total = 0;
    let mut counted = false;
    for line in text.lines() {
        if let Some((range, rest)) = mapping(line) {
            counted = !is_ram(range, rest, ram);
        } else if counted && let Some(value) = line.strip_prefix("Pss:") {
            let kib = value.trim().trim_end_matches("kB").trim();
            total += kib.parse::<u64>().map_err(|_| malformed("smaps"))?;
        }
    }
    Ok(total)
}

/// Proportional set size in KiB of all mappings, the guest's RAM among them.
///
/// # Errors
/// When there is no such process, or it may not be inspected.
pub fn pss(pid: i32) -> io::Result<u64> {
    let text = read(pid, "smaps_rollup")?;
    text.lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .and_then(|value| value.trim().trim_end_matches("kB").trim().parse().ok())
        .ok_or_else(|| malformed("smaps_rollup"))
}

/// KiB of `file`'s pages that a process has mapped, and of its private copies of such pages.
///
/// # Errors
/// When there is no such process, or it may not be inspected.
pub fn pages_of(pid: i32, file: &Path) -> io::Result<(u64, u64)> {
    let text = read(pid, "smaps")?;
    let file = file.to_string_lossy();
    let (mut resident, mut copied, mut counted) = (0, 0, false);
    for line in text.lines() {
        if let Some((_, rest)) = mapping(line) {
            counted = rest.ends_with(&*file);
        } else if counted
            && let Some((name, value)) = line.split_once(':')
            && let Some(sum) = match name {
                "Rss" => Some(&mut resident),
                "Anonymous" => Some(&mut copied),
                _ => None,
            }
        {
            let kib = value.trim().trim_end_matches("kB").trim();
            *sum += kib.parse::<u64>().map_err(|_| malformed("smaps"))?;
        }
    }
    Ok((resident - copied, copied))
}

/// A mapping's head line: its address range, and the rest of the line.
fn mapping(line: &str) -> Option<((u64, u64), &str)> {
    let (range, rest) = line.split_once(' ')?;
    let (from, to) = range.split_once('-')?;
    Some((
        (
            u64::from_str_radix(from, 16).ok()?,
            u64::from_str_radix(to, 16).ok()?,
        ),
        rest,
    ))
}

fn is_ram(range: (u64, u64), rest: &str, ram: u64) -> bool {
    let name = rest.split_whitespace().nth(4).unwrap_or_default();
    range.1 - range.0 == ram || (name.starts_with("/memfd:") && name.contains("ram"))
}

/// Processor time of all live threads, as the scheduler counts it (`schedstat`, in nanoseconds).
///
/// # Errors
/// When there is no such process.
pub fn processor_time(pid: i32) -> io::Result<Duration> {
    let mut total = 0;
    for tid in numbered(&path(pid, "task"))? {
        let Ok(text) = read(pid, &format!("task/{tid}/schedstat")) else {
            continue;
        };
        total += text
            .split_whitespace()
            .next()
            .and_then(|w| w.parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(Duration::from_nanos(total))
}

/// Voluntary and involuntary context switches of all live threads.
///
/// # Errors
/// When there is no such process.
pub fn context_switches(pid: i32) -> io::Result<u64> {
    let count = |s: &Status, name: &str| s.field(name).parse::<u64>().unwrap_or(0);
    Ok(Status::of_threads(pid)?
        .values()
        .map(|s| count(s, "voluntary_ctxt_switches") + count(s, "nonvoluntary_ctxt_switches"))
        .sum())
}

/// The names in a process's root folder, seen from outside of its jail.
///
/// # Errors
/// When there is no such process, or it may not be inspected.
pub fn root_entries(pid: i32) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path(pid, "root/"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Soft and hard limit by the kernel's name of it ("Max open files"); "unlimited" is the largest number.
///
/// # Errors
/// When there is no such process.
pub fn limits(pid: i32) -> io::Result<BTreeMap<String, (u64, u64)>> {
    let text = read(pid, "limits")?;
    let number = |w: &str| w.parse().unwrap_or(u64::MAX);
    let mut all = BTreeMap::new();
    for line in text.lines().skip(1) {
        let Some((name, rest)) = line.split_at_checked(26) else {
            continue;
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        if let [soft, hard, ..] = words[..] {
            all.insert(name.trim().to_owned(), (number(soft), number(hard)));
        }
    }
    Ok(all)
}

fn numbered(dir: &Path) -> io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        if let Ok(number) = entry?.file_name().to_string_lossy().parse() {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Where each thread of a process stands in the kernel, a line each: its name, its state and the functions that it waits in, the
/// innermost first. For the report of a test that has waited too long; the stacks can be read by root only.
#[must_use]
pub fn standing(pid: i32) -> String {
    let Ok(tasks) = fs::read_dir(path(pid, "task")) else {
        return format!("process {pid} is gone\n");
    };
    let mut lines = String::new();
    for task in tasks.flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|l| l.strip_prefix("State:"));
        let stack = read("stack");
        let calls: Vec<&str> = stack
            .lines()
            .filter_map(|l| l.split_whitespace().nth(1)?.split('+').next())
            .take(6)
            .collect();
        lines.push_str(&format!(
            "{} {} {}: {}\n",
            task.file_name().display(),
            read("comm").trim(),
            state.unwrap_or("ended").trim(),
            calls.join(" < ")
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn own() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn a_process_sees_itself() {
        let status = Status::of(own()).unwrap();
        assert_eq!(status.namespaced_pids().first(), Some(&own()));
        assert!(!status.uids().is_empty());
        assert!(namespaces(own()).unwrap().contains_key("user"));
        assert!(limits(own()).unwrap().contains_key("Max open files"));
        assert!(processor_time(own()).unwrap() > Duration::ZERO);
        assert!(pss_without_ram(own(), 1).unwrap() > 0);
    }

    #[test]
    fn a_thread_that_waits_tells_where() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut told = standing(pid);
        while !told.contains("S (sleeping)") {
            told = standing(pid);
        }
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(told.contains(" cat S (sleeping): "), "{told}");
        assert!(standing(pid).contains("is gone"));
    }

    #[test]
    fn descriptors_have_kinds_and_modes() {
        let file = fs::File::open("/dev/null").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let all = fds(own()).unwrap();
        assert_eq!(all[&number].kind(), "/dev/null");
        assert!(!all[&number].writable());
        assert_eq!(all[&std::os::fd::AsRawFd::as_raw_fd(&a)].kind(), "socket");
    }

    #[test]
    fn children_are_found() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(descendants(own()).unwrap().contains(&pid));
        assert_eq!(parent(pid).unwrap(), own());
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn guest_ram_is_not_counted() {
        let head = "7f0000000000-7f0008000000 rw-s 00000000 00:01 1026 /memfd:guest-ram (deleted)";
        let (range, rest) = mapping(head).unwrap();
        assert!(is_ram(range, rest, 128 << 20));
        assert!(is_ram(range, rest, 1), "a part of it, by its name");
        let (range, rest) = mapping("7f0000000000-7f0008000000 rw-p 00000000 00:00 0 ").unwrap();
        assert!(is_ram(range, rest, 128 << 20));
        assert!(!is_ram(range, rest, 64 << 20));
        assert!(mapping("Pss:                   4 kB").is_none());
    }
}
