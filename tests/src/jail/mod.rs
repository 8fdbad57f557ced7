//! # A process's jail, as the kernel shows it
//!
//! **Job.** Collect what confines one process, for the demo's picture and for the tests' assertions.
//! **Who is not trusted.** The process. **Why this way.** One reader for both, so the picture cannot be prettier than
//! what the tests check.
//!
//! [`check`] compares a whole VM with what [`expect`] says it should be; [`probe`] asks what only calls in a process's name
//! can tell; [`saboteur`] removes layers while a VM starts, so that the checks themselves are checked.

#[cfg(target_arch = "x86_64")]
pub mod check;
pub mod expect;
#[cfg(target_arch = "x86_64")]
pub mod probe;
#[cfg(target_arch = "x86_64")]
pub mod saboteur;

use crate::procfs::{self, Fd, Status};
use std::collections::BTreeMap;
use std::fmt;
use std::io;

/// The namespaces that a device process must not share with its host.
pub const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// What confines one process.
#[derive(Debug, Clone)]
pub struct Jail {
    /// Its id.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// Its effective user id as seen here.
    pub uid: u32,
    /// Those of [`NAMESPACES`] that it does not share with this process.
    pub own_namespaces: Vec<&'static str>,
    /// Name and seccomp mode of each thread (2 is a filter).
    pub threads: Vec<(String, u32)>,
    /// Whether all threads have `no_new_privs`.
    pub no_new_privs: bool,
    /// The union over threads of the five capability sets.
    pub capabilities: [u64; 5],
    /// Its open descriptors.
    pub fds: BTreeMap<i32, Fd>,
    /// What its root folder holds.
    pub root: Vec<String>,
    /// Whether its root's file system is mounted read-only.
    pub read_only_root: bool,
}

impl Jail {
    /// Reads the jail of `pid`.
    ///
    /// # Errors
    /// When there is no such process, or it may not be inspected.
    pub fn of(pid: i32) -> io::Result<Self> {
        let status = Status::of(pid)?;
        let uid = status.uids().get(1).copied().unwrap_or(u32::MAX);
        let (host, own) = (
            procfs::namespaces(i32::try_from(std::process::id()).unwrap_or(0))?,
            procfs::namespaces(pid)?,
        );
        let threads = Status::of_threads(pid)?;
        let mut capabilities = [0; 5];
        for thread in threads.values() {
            for (sum, set) in capabilities.iter_mut().zip(thread.capabilities()) {
                *sum |= set;
            }
        }
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        // fields: id, parent, device, root, mount point, options, ...
        let root_line = mounts
            .lines()
            .rfind(|l| l.split_whitespace().nth(4) == Some("/"));
        let read_only_root = root_line
            .and_then(|l| l.split_whitespace().nth(5))
            .is_some_and(|options| options.split(',').any(|o| o == "ro"));
        Ok(Self {
            pid,
            name: status.name().to_owned(),
            uid,
            own_namespaces: NAMESPACES
                .into_iter()
                .filter(|n| host.get(*n) != own.get(*n))
                .collect(),
            threads: threads
                .values()
                .map(|t| (t.name().to_owned(), t.seccomp_mode()))
                .collect(),
            no_new_privs: threads.values().all(Status::no_new_privs),
            capabilities,
            fds: procfs::fds(pid)?,
            root: procfs::root_entries(pid)?,
            read_only_root,
        })
    }
}

impl fmt::Display for Jail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (pid {}, uid {})", self.name, self.pid, self.uid)?;
        let namespaces = match self.own_namespaces[..] {
            [] => "shared with the host".to_owned(),
            ref own if own.len() == NAMESPACES.len() => format!("own {}", own.join(" ")),
            ref own => format!("own {}; the others are the host's", own.join(" ")),
        };
        writeln!(f, "    namespaces    {namespaces}")?;
        let root = match (&self.root[..], self.read_only_root) {
            ([], true) => "empty and read-only".to_owned(),
            ([], false) => "empty and writable".to_owned(),
            (names, _) if !self.own_namespaces.contains(&"mnt") => {
                format!("the host's ({} entries)", names.len())
            }
            (names, _) => names.join(" "),
        };
        writeln!(f, "    root folder   {root}")?;
        let modes: Vec<String> = self
            .threads
            .iter()
            .map(|(name, mode)| match mode {
                2 => format!("{name} filtered"),
                _ => format!("{name} NOT FILTERED"),
            })
            .collect();
        writeln!(f, "    seccomp       {}", modes.join(", "))?;
        let sets = [
            "inheritable",
            "permitted",
            "effective",
            "bounding",
            "ambient",
        ];
        let held: Vec<String> = sets
            .iter()
            .zip(self.capabilities)
            .filter(|(_, c)| *c != 0)
            .map(|(n, c)| format!("{n} {c:#x}"))
            .collect();
        let held = if held.is_empty() {
            "none in all five sets".to_owned()
        } else {
            held.join(", ")
        };
        writeln!(f, "    capabilities  {held}")?;
        writeln!(
            f,
            "    no_new_privs  {}",
            if self.no_new_privs { "yes" } else { "NO" }
        )?;
        let fds: Vec<String> = self
            .fds
            .iter()
            .map(|(n, fd)| format!("{n}:{}", fd.kind()))
            .collect();
        write!(f, "    descriptors   {}", fds.join(" "))
    }
}
