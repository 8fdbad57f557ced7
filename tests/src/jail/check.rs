//! # A VM compared with what it should be
//!
//! **Job.** Read every process of a VM back from the kernel, compare it with [`super::expect`], and return every deviation
//! with the check that found it. `query-sandbox` is compared too: what it says must be what this reads.
//! **Who is not trusted.** The VM. **Why this way.** Deviations are values, so that a test of a whole VM asserts that there
//! are none, and a test of a VM with a removed layer asserts that the check for that layer is the one that speaks.

use super::expect::{
    BackEnd, CONTROL_THREADS, Device, KVM_WORKER, MOVER, RAM_GUARD, RING_WORKER, Setting, Want,
};
use super::{NAMESPACES, probe};
use crate::procfs::{self, Fd, Status};
use crate::trace::Tracee;
use crate::vm::Vm;
use seccomp_policies::{Action, Policy};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io;

/// What a deviation is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// Which processes there are.
    Processes,
    /// Which threads a process has.
    Threads,
    /// A thread without a filter.
    SeccompMode,
    /// Another number of filters.
    FilterCount,
    /// A filter that is not the policy's, instruction by instruction.
    FilterProgram,
    /// `no_new_privs`
    NoNewPrivileges,
    /// A capability set, by its name.
    Capabilities(&'static str),
    /// Securebits that are not locked.
    Securebits,
    /// Others of its user may look into it.
    Dumpable,
    /// It outlives its parent.
    ParentDeath,
    /// A session or process group of somebody else's.
    Session,
    /// Keys of somebody else's.
    Keys,
    /// It may make user namespaces.
    NestedUsers,
    /// A namespace that is shared, by its name.
    Namespace(&'static str),
    /// A root folder that is not a file system of its own.
    RootForeign,
    /// A root folder that is writable.
    RootWritable,
    /// A root folder in which devices or programs would count, or with room for files.
    RootOptions,
    /// A root folder with something in it.
    RootNotEmpty,
    /// User and group.
    User,
    /// Supplementary groups.
    Groups,
    /// The maps of its user namespace.
    IdMap,
    /// A resource limit, by the kernel's name.
    Limit(&'static str),
    /// What Landlock does not forbid.
    Landlock(&'static str),
    /// A descriptor that should not be there.
    ExtraDescriptor,
    /// A descriptor that should be there.
    MissingDescriptor,
    /// A descriptor that leads elsewhere.
    Descriptor,
    /// A descriptor with other rights.
    DescriptorAccess,
    /// A log that does not lead to the broker.
    LogPipe,
    /// A memfd without its seals.
    Seals,
    /// Guest RAM mapped where no driver has shared it, or not mapped where one has.
    GuestRam,
    /// Guest RAM beside addresses that can be touched.
    Guards,
    /// Memory that is writable and executable.
    WritableCode,
    /// A mapped file that is not the program.
    ForeignFile,
    /// `query-sandbox` says something else, in this member.
    Query(&'static str),
    /// `query-sandbox` says that it could not read this member.
    Unread(&'static str),
}

/// A deviation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The process: `control`, `broker`, or the device's id.
    pub process: String,
    /// The check that found it.
    pub check: Check,
    /// What was found.
    pub detail: String,
}

/// What every reader of `/proc` may fail with, and the process that it failed for.
fn of<T>(process: &str, what: &str, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|e| format!("{what} of {process}: {e}"))
}

/// Compares the VM, which must be at rest, with what it should be.
///
/// # Errors
/// When something could not be read. That is no finding and no success.
pub fn check(vm: &mut Vm, setting: &Setting, reply: &Value) -> Result<Vec<Finding>, String> {
    let mut report = Report::default();
    let control = vm.pid();
    let below = vm.processes().map_err(|e| e.to_string())?;
    let Some((&broker, devices)) = below.split_first() else {
        return Err("the control process has no broker".into());
    };
    let parents = devices
        .iter()
        .map(|pid| Ok((*pid, of("a device", "parent", procfs::parent(*pid))?)))
        .collect::<Result<Vec<_>, String>>()?;
    let children = |parent| {
        let all = parents.iter().filter(move |(_, of)| *of == parent);
        all.map(|(pid, _)| *pid).collect::<Vec<_>>()
    };
    // The broker starts them in this order, in which the kernel lists them; their numbers may have begun anew in between.
    let devices = children(broker);
    if devices.len() != setting.devices.len() {
        let found = format!("{} device processes: {devices:?}", devices.len());
        report.add("control", Check::Processes, found);
        return Ok(report.findings);
    }
    let hosts = of("control", "namespaces", procfs::namespaces(control))?;
    let abi = crate::host::landlock_abi();

    let mut process = Process::read("control", control)?;
    let own = |status: &&Status| status.name() != KVM_WORKER;
    for (tid, status) in process.threads.iter().filter(|(_, status)| own(status)) {
        let name = status.name().trim_end_matches(|c: char| c.is_ascii_digit());
        match CONTROL_THREADS.iter().find(|(known, _)| *known == name) {
            Some((_, policy)) => {
                process.filters.insert(*tid, vec![*policy]);
            }
            None => report.add("control", Check::Threads, format!("a thread {name}")),
        }
    }
    let threads = 2 + setting.vcpus;
    let count = process.threads.values().filter(own).count();
    if count != threads {
        let found = format!("{count} instead of {threads}");
        report.add("control", Check::Threads, found);
    }
    report.every(&process)?;
    report.capabilities(&process, [0; 5]);
    report.descriptors(&process, &setting.control_descriptors());
    report.seals(&process)?;
    report.guest_ram(&process, &setting.ram_pieces());
    report.ask(&process, Some(abi), None)?;
    let mut all = vec![process];

    let mut process = Process::read("broker", broker)?;
    process.filters = each(&process, &[setting.broker_policy()]);
    report.one_thread(&process);
    report.ring_workers(&process, None);
    report.every(&process)?;
    let kept = setting.broker_capabilities();
    report.capabilities(&process, [0, kept, kept, kept, 0]);
    report.descriptors(&process, &setting.broker_descriptors());
    report.guest_ram(&process, &[]);
    report.ask(&process, None, None)?;
    let log_pipes = process.pipes();
    all.push(process);

    for (device, first) in setting.devices.iter().zip(devices) {
        let kind = device
            .kind()
            .ok_or_else(|| format!("the table of devices does not know {}", device.binary))?;
        let below = children(first);
        let pid = match below.as_slice() {
            [] if !device.has_keeper() => first,
            [serving] if device.has_keeper() => *serving,
            _ => {
                let found = format!("{} processes below its first", below.len());
                report.add(device.id, Check::Processes, found);
                continue;
            }
        };
        let mut process = Process::read(device.id, pid)?;
        if process.status.name() != device.binary {
            let found = format!("its process is {}", process.status.name());
            report.add(device.id, Check::Processes, found);
        }
        let mut filters = vec![setting.broker_policy(), kind.policy];
        if device.has_keeper() {
            filters.insert(1, Policy::FsKeeper);
        }
        process.filters = each(&process, &filters);
        let movers = process.filter_movers();
        let wanted = device.movers();
        if movers != wanted {
            let found = format!("{movers} threads that move data instead of {wanted}");
            report.add(device.id, Check::Threads, found);
        }
        report.threads(&process, 1 + wanted);
        report.ring_workers(&process, device.has_ring().then_some(2));
        report.every(&process)?;
        let kept = match device.back_end {
            BackEnd::Folder { capabilities, .. } => capabilities,
            _ => 0,
        };
        report.capabilities(&process, [0, kept, kept, kept, 0]);
        report.descriptors(&process, &device.descriptors());
        report.namespaces(&process, &hosts, &all);
        match &device.back_end {
            BackEnd::Folder { path, readonly, .. } => {
                process.folder = true;
                report.folder(&process, path, *readonly)?;
                report.owner_of_all(&process)?;
            }
            _ => {
                report.root(&process)?;
                report.identity(&process)?;
            }
        }
        report.session(&process, first)?;
        report.limits(&process, device)?;
        let shared = (device.started > 0).then(|| setting.ram_pieces());
        report.guest_ram(&process, &shared.unwrap_or_default());
        for (number, fd) in process.fds.iter().filter(|(number, _)| **number < 3) {
            if !log_pipes.contains(&fd.target) {
                let found = format!("{number} is {}, which the broker does not read", fd.target);
                report.add(device.id, Check::LogPipe, found);
            }
        }
        report.ask(&process, Some(abi), Some((device, !device.has_keeper())))?;
        let keeper = device
            .has_keeper()
            .then(|| report.keeper(first, &process, setting, (device, kept), abi))
            .transpose()?;
        all.push(process);
        all.extend(keeper);
    }
    report.query(&all, reply);
    Ok(report.findings)
}

/// The same filters on each thread.
fn each(process: &Process, policies: &[Policy]) -> BTreeMap<i32, Vec<Policy>> {
    let threads = process.own_threads();
    threads.map(|(tid, _)| (*tid, policies.to_vec())).collect()
}

/// One process, read once.
struct Process {
    label: String,
    pid: i32,
    status: Status,
    threads: BTreeMap<i32, Status>,
    namespaces: BTreeMap<String, u64>,
    fds: BTreeMap<i32, Fd>,
    maps: Vec<Mapping>,
    /// What each thread should have.
    filters: BTreeMap<i32, Vec<Policy>>,
    /// Whether it is user 0 in a user namespace of the broker's making, so that the broker cannot tell if it is dumpable.
    folder: bool,
}

struct Mapping {
    start: u64,
    end: u64,
    rights: String,
    name: String,
    file: bool,
}

/// What `/proc/PID/maps` says.
fn mappings(maps: &str, program: &str) -> Vec<Mapping> {
    let mapping = |line: &str| {
        let mut words = line.splitn(6, ' ');
        let range = words.next().and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
        let (start, end) = range.map_or((0, 0), |(from, to)| (number(from), number(to)));
        let (rights, inode) = (words.next().unwrap_or_default(), words.nth(2));
        let name = words.next().unwrap_or_default().trim_start();
        Mapping {
            start,
            end,
            rights: rights.to_owned(),
            name: name.to_owned(),
            file: inode != Some("0")
                && name != program
                && !name.starts_with("/memfd:")
                // What the kernel calls anonymous memory that is shared: with a fork, or an heir.
                && name != "/dev/zero (deleted)"
                && !name.starts_with("anon_inode:kvm-vcpu")
                && name != "anon_inode:[io_uring]",
        }
    };
    maps.lines().map(mapping).collect()
}

/// Sizes of the pieces in which a process maps guest RAM, the largest first, and the places beside them that could be touched.
fn ram_in(maps: &[Mapping]) -> (Vec<u64>, Vec<String>) {
    // In a memfd, or in a file that was made in a folder.
    let ram = |m: &Mapping| {
        m.name.starts_with("/memfd:guest-ram") || m.name.contains("/.stratovirt-ram-")
    };
    let together = |a: &Mapping, b: &Mapping| ram(a) && ram(b) && a.end == b.start;
    let (mut sizes, mut open) = (Vec::new(), Vec::new());
    for run in maps.chunk_by(together).filter(|run| ram(&run[0])) {
        let (first, last) = (run[0].start, run[run.len() - 1].end);
        sizes.push(last - first);
        for (from, to) in [(first - RAM_GUARD, first), (last, last + RAM_GUARD)] {
            // Of one piece: neighbours of one kind are one to the kernel.
            let guard = |m: &Mapping| m.start <= from && to <= m.end && m.rights == "---p";
            if !maps.iter().any(guard) {
                open.push(format!(
                    "{from:#x} to {to:#x} beside {first:#x} to {last:#x}"
                ));
            }
        }
    }
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    (sizes, open)
}

/// As the suite looks at guest RAM, for a process that it does not look at: sizes of the pieces in which it maps guest RAM, and the
/// places beside them where there is no guard.
///
/// # Errors
/// When its maps cannot be read.
pub fn guest_ram_of(pid: i32) -> io::Result<(Vec<u64>, Vec<String>)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(ram_in(&mappings(&maps, "")))
}

impl Process {
    fn read(label: &str, pid: i32) -> Result<Self, String> {
        let maps = of(
            label,
            "maps",
            fs::read_to_string(format!("/proc/{pid}/maps")),
        )?;
        let program = of(label, "exe", fs::read_link(format!("/proc/{pid}/exe")))?;
        let program = program.to_string_lossy();
        Ok(Self {
            label: label.to_owned(),
            pid,
            status: of(label, "status", Status::of(pid))?,
            threads: of(label, "threads", Status::of_threads(pid))?,
            namespaces: of(label, "namespaces", procfs::namespaces(pid))?,
            fds: of(label, "descriptors", procfs::fds(pid))?,
            maps: mappings(&maps, &program),
            filters: BTreeMap::new(),
            folder: false,
        })
    }

    /// Those that run the program's instructions.
    fn own_threads(&self) -> impl Iterator<Item = (&i32, &Status)> {
        self.threads
            .iter()
            .filter(|(_, status)| !is_ring_worker(status))
    }

    /// Gives threads that only move data their own filter in place of the serving one's; returns how many there are.
    fn filter_movers(&mut self) -> usize {
        let mut count = 0;
        for (tid, status) in &self.threads {
            let number = status.name().strip_prefix(MOVER).map(str::parse::<usize>);
            if matches!(number, Some(Ok(_)))
                && let Some(last) = self.filters.get_mut(tid).and_then(|f| f.last_mut())
            {
                *last = Policy::FsMover;
                count += 1;
            }
        }
        count
    }

    fn pipes(&self) -> Vec<String> {
        let reading = self.fds.values().filter(|fd| !fd.writable());
        reading
            .filter(|fd| fd.kind() == "pipe")
            .map(|fd| fd.target.clone())
            .collect()
    }
}

#[derive(Default)]
struct Report {
    findings: Vec<Finding>,
    /// The control process's session of keys.
    keys: i64,
    /// Which process said itself that it can be dumped.
    dumpable: BTreeMap<i32, bool>,
}

impl Report {
    fn add(&mut self, process: &str, check: Check, detail: impl Into<String>) {
        self.findings.push(Finding {
            process: process.to_owned(),
            check,
            detail: detail.into(),
        });
    }

    fn one_thread(&mut self, process: &Process) {
        self.threads(process, 1);
    }

    fn threads(&mut self, process: &Process, wanted: usize) {
        let count = process.own_threads().count();
        if count != wanted {
            self.add(
                &process.label,
                Check::Threads,
                format!("{count} instead of {wanted}"),
            );
        }
    }

    /// The kernel's workers for io_uring have the filters of the thread that they work for, and are only where there is a ring.
    fn ring_workers(&mut self, process: &Process, wanted: Option<usize>) {
        for status in process.threads.values().filter(|s| is_ring_worker(s)) {
            let filters = status.field("Seccomp_filters");
            let check = match wanted {
                None => Check::Threads,
                Some(wanted) if filters != wanted.to_string() => Check::FilterCount,
                Some(_) => continue,
            };
            let found = format!("{} with {filters} filters", status.name());
            self.add(&process.label, check, found);
        }
    }

    /// What holds for every process: filters, `no_new_privs`, memory.
    fn every(&mut self, process: &Process) -> Result<(), String> {
        let label = process.label.as_str();
        for (tid, status) in &process.threads {
            let name = status.name();
            if status.seccomp_mode() != 2 {
                let found = format!("thread {name} has mode {}", status.seccomp_mode());
                self.add(label, Check::SeccompMode, found);
            }
            if !status.no_new_privs() {
                self.add(label, Check::NoNewPrivileges, format!("thread {name}"));
            }
            let Some(wanted) = process.filters.get(tid) else {
                continue; // no thread of the program's
            };
            let count = status.field("Seccomp_filters");
            if count != wanted.len().to_string() {
                let found = format!("thread {name} has {count} instead of {}", wanted.len());
                self.add(label, Check::FilterCount, found);
                continue;
            }
            let tracee = of(label, "thread", Tracee::stop(*tid))?;
            let filters = of(label, "filters", tracee.filters())?;
            for (filter, policy) in filters.iter().zip(wanted) {
                if filter.as_slice() != policy.program(Action::Kill) {
                    let found = format!("thread {name}: its filter is not {policy}");
                    self.add(label, Check::FilterProgram, found);
                }
            }
        }
        for mapping in &process.maps {
            if mapping.rights.contains('w') && mapping.rights.contains('x') {
                let found = format!("{} {}", mapping.rights, mapping.name);
                self.add(label, Check::WritableCode, found);
            }
            if mapping.file {
                self.add(label, Check::ForeignFile, mapping.name.clone());
            }
        }
        Ok(())
    }

    /// `wanted`: inheritable, permitted, effective, bounding, ambient.
    fn capabilities(&mut self, process: &Process, wanted: [u64; 5]) {
        const SETS: [&str; 5] = [
            "inheritable",
            "permitted",
            "effective",
            "bounding",
            "ambient",
        ];
        for status in process.threads.values() {
            let all = SETS.into_iter().zip(status.capabilities()).zip(wanted);
            for ((set, has), wanted) in all {
                if has != wanted {
                    let found = format!("thread {}: {has:#x}", status.name());
                    self.add(&process.label, Check::Capabilities(set), found);
                }
            }
        }
    }

    fn namespaces(&mut self, process: &Process, hosts: &BTreeMap<String, u64>, others: &[Process]) {
        for name in NAMESPACES {
            let own = process.namespaces.get(name);
            if own.is_none() || own == hosts.get(name) {
                self.add(&process.label, Check::Namespace(name), "the host's");
            } else if let Some(other) = others.iter().find(|o| o.namespaces.get(name) == own) {
                let found = format!("that of {}", other.label);
                self.add(&process.label, Check::Namespace(name), found);
            }
        }
    }

    /// An empty tmpfs without room for a file, which nothing can be executed from.
    fn root(&mut self, process: &Process) -> Result<(), String> {
        let label = process.label.as_str();
        let path = format!("/proc/{}/mountinfo", process.pid);
        let mounts = of(label, "mounts", fs::read_to_string(path))?;
        let line = mounts
            .lines()
            .rfind(|l| l.split_whitespace().nth(4) == Some("/"))
            .ok_or_else(|| format!("{label} has no root"))?;
        if mounts.lines().count() != 1 || !line.contains(" - tmpfs ") {
            let found = format!("{} mounts; {line}", mounts.lines().count());
            self.add(label, Check::RootForeign, found);
            return Ok(());
        }
        let mut words = line.split_whitespace();
        let (mount, file_system) = (words.nth(5), words.next_back());
        let has = |options: Option<&str>, wanted: &str| {
            options.is_some_and(|all| all.split(',').any(|option| option == wanted))
        };
        if !has(mount, "ro") || !has(file_system, "ro") {
            self.add(label, Check::RootWritable, line);
        }
        let nothing_counts = ["nosuid", "nodev", "noexec"].iter().all(|o| has(mount, o));
        if !nothing_counts || !has(file_system, "nr_inodes=1") {
            self.add(label, Check::RootOptions, line);
        }
        let entries = of(label, "root folder", procfs::root_entries(process.pid))?;
        if !entries.is_empty() {
            self.add(label, Check::RootNotEmpty, entries.join(" "));
        }
        Ok(())
    }

    /// The very folder, on a mount where nothing is a device, a program or gives rights.
    fn folder(&mut self, process: &Process, path: &str, readonly: bool) -> Result<(), String> {
        use std::os::unix::fs::MetadataExt;
        let label = process.label.as_str();
        let root = format!("/proc/{}/root", process.pid);
        let inside = of(label, "root folder", fs::metadata(root))?;
        let outside = of(label, "folder", fs::metadata(path))?;
        let line_of = format!("/proc/{}/mountinfo", process.pid);
        let mounts = of(label, "mounts", fs::read_to_string(line_of))?;
        if mounts.lines().count() != 1
            || (inside.dev(), inside.ino()) != (outside.dev(), outside.ino())
        {
            self.add(label, Check::RootForeign, mounts.trim());
            return Ok(());
        }
        let options = mounts.split_whitespace().nth(5).unwrap_or_default();
        let has = |wanted: &str| options.split(',').any(|option| option == wanted);
        if readonly && !has("ro") {
            self.add(label, Check::RootWritable, options);
        }
        if !["nosuid", "nodev", "noexec"].into_iter().all(has) {
            self.add(label, Check::RootOptions, options);
        }
        Ok(())
    }

    /// Every user that the caller is, in a user namespace of its own: files can be given to any of them.
    fn owner_of_all(&mut self, process: &Process) -> Result<(), String> {
        let label = process.label.as_str();
        for field in ["Uid", "Gid"] {
            let ids = process.status.field(field);
            if ids.split_whitespace().any(|id| id != "0") {
                self.add(label, Check::User, format!("{field} {ids}"));
            }
        }
        let groups = process.status.field("Groups");
        if !groups.is_empty() {
            self.add(label, Check::Groups, groups);
        }
        for map in ["uid_map", "gid_map"] {
            let read = |pid: &str| fs::read_to_string(format!("/proc/{pid}/{map}"));
            let its = of(label, map, read(&process.pid.to_string()))?;
            let ours = of("this process", map, read("self"))?;
            if !its.split_whitespace().eq(ours.split_whitespace()) {
                self.add(label, Check::IdMap, format!("{map}: {}", its.trim()));
            }
        }
        Ok(())
    }

    /// The process that keeps a device's state: the same jail and the same descriptors as `serving`'s, its capabilities not in
    /// effect, and nothing of the guest's memory.
    fn keeper(
        &mut self,
        pid: i32,
        serving: &Process,
        setting: &Setting,
        (device, kept): (&Device, u64),
        abi: u32,
    ) -> Result<Process, String> {
        let label = format!("{}-keeper", device.id);
        let mut process = Process::read(&label, pid)?;
        let name = format!("{}-keeper", device.binary);
        if process.status.name() != name {
            let found = format!("its process is {}", process.status.name());
            self.add(&label, Check::Processes, found);
        }
        process.folder = true;
        process.filters = each(&process, &[setting.broker_policy(), Policy::FsKeeper]);
        self.one_thread(&process);
        self.every(&process)?;
        self.capabilities(&process, [0, kept, 0, kept, 0]);
        self.descriptors(&process, &device.descriptors());
        for name in NAMESPACES {
            if process.namespaces.get(name) != serving.namespaces.get(name) {
                self.add(
                    &label,
                    Check::Namespace(name),
                    "not that of the one that serves",
                );
            }
        }
        if let BackEnd::Folder { path, readonly, .. } = &device.back_end {
            self.folder(&process, path, *readonly)?;
        }
        self.owner_of_all(&process)?;
        self.session(&process, pid)?;
        self.limits(&process, device)?;
        self.guest_ram(&process, &[]);
        self.ask(&process, Some(abi), Some((device, true)))?;
        Ok(process)
    }

    /// `leader`: the first process of the jail, whose session it is.
    fn session(&mut self, process: &Process, leader: i32) -> Result<(), String> {
        let label = process.label.as_str();
        let path = format!("/proc/{}/stat", process.pid);
        let stat = of(label, "stat", fs::read_to_string(path))?;
        // After the name in brackets: state, parent, process group, session.
        let behind = stat.rsplit(')').next().unwrap_or_default();
        let ids: Vec<&str> = behind.split_whitespace().skip(2).take(2).collect();
        let own = leader.to_string();
        if ids != [&own, &own] {
            self.add(label, Check::Session, format!("group and session {ids:?}"));
        }
        Ok(())
    }

    /// Nobody, without other groups, as the only user of a user namespace.
    fn identity(&mut self, process: &Process) -> Result<(), String> {
        const NOBODY: &str = "65534";
        let label = process.label.as_str();
        for field in ["Uid", "Gid"] {
            let ids = process.status.field(field);
            if ids.split_whitespace().any(|id| id != NOBODY) {
                self.add(label, Check::User, format!("{field} {ids}"));
            }
        }
        let groups = process.status.field("Groups");
        if !groups.is_empty() {
            self.add(label, Check::Groups, groups);
        }
        for map in ["uid_map", "gid_map"] {
            let path = format!("/proc/{}/{map}", process.pid);
            let text = of(label, map, fs::read_to_string(path))?;
            let words: Vec<&str> = text.split_whitespace().collect();
            if words != ["1000", NOBODY, "1"] {
                self.add(label, Check::IdMap, format!("{map}: {}", text.trim()));
            }
        }
        Ok(())
    }

    fn limits(&mut self, process: &Process, device: &Device) -> Result<(), String> {
        let limits = of(&process.label, "limits", procfs::limits(process.pid))?;
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let own = of("this process", "limits", procfs::limits(own))?;
        for (name, wanted) in device.limits() {
            let wanted = wanted.min(own.get(name).map_or(u64::MAX, |own| own.1));
            let has = limits.get(name).copied();
            if has != Some((wanted, wanted)) {
                let found = format!("{has:?} instead of {wanted}");
                self.add(&process.label, Check::Limit(name), found);
            }
        }
        Ok(())
    }

    /// Each descriptor is wanted, and each wanted one is there.
    fn descriptors(&mut self, process: &Process, wanted: &[Want]) {
        let label = process.label.as_str();
        let mut open: BTreeMap<i32, &Fd> = process.fds.iter().map(|(n, fd)| (*n, fd)).collect();
        let mut wanted: Vec<&Want> = wanted.iter().collect();
        wanted.sort_by_key(|want| want.number.is_none());
        let mut missing = Vec::new();
        for want in wanted {
            let fits = |fd: &Fd| fd.target.contains(&want.target);
            let number = match want.number {
                Some(number) => open.contains_key(&number).then_some(number),
                // Of those that fit, one with the right access if there is one.
                None => {
                    let all = || open.iter().filter(|(_, fd)| fits(fd));
                    let right = all().find(|(_, fd)| access(fd) == want.access);
                    right.or_else(|| all().next()).map(|(number, _)| *number)
                }
            };
            let Some((number, fd)) = number.and_then(|n| Some((n, open.remove(&n)?))) else {
                missing.push(want);
                continue;
            };
            if !fits(fd) {
                let found = format!("{number} is {} instead of {}", fd.target, want.target);
                self.add(label, Check::Descriptor, found);
            } else if access(fd) != want.access {
                let found = format!(
                    "{number}, {}, is {:?} instead of {:?}",
                    fd.target,
                    access(fd),
                    want.access
                );
                self.add(label, Check::DescriptorAccess, found);
            }
        }
        for want in missing {
            self.add(label, Check::MissingDescriptor, format!("{want:?}"));
        }
        for (number, fd) in open {
            let found = format!("{number}: {} {}", fd.target, access(fd));
            self.add(label, Check::ExtraDescriptor, found);
        }
    }

    fn seals(&mut self, process: &Process) -> Result<(), String> {
        let label = process.label.as_str();
        for (number, fd) in &process.fds {
            if !fd.target.contains("memfd:guest-ram") {
                continue;
            }
            let path = format!("/proc/{}/fd/{number}", process.pid);
            let file = of(label, "guest RAM", fs::File::open(path))?;
            let seals = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GET_SEALS);
            let seals = of(label, "seals", seals.map_err(io::Error::from))?;
            let wanted = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
            if seals & wanted != wanted {
                let found = format!("{number}, guest RAM: {seals:#x}");
                self.add(label, Check::Seals, found);
            }
        }
        Ok(())
    }

    /// Guest RAM is mapped in pieces of these sizes, and each lies between guards that nothing can touch.
    fn guest_ram(&mut self, process: &Process, wanted: &[u64]) {
        let label = process.label.as_str();
        let (sizes, open) = ram_in(&process.maps);
        for found in open {
            self.add(label, Check::Guards, found);
        }
        if sizes != wanted {
            let found = format!("pieces of {sizes:?} bytes instead of {wanted:?}");
            self.add(label, Check::GuestRam, found);
        }
    }

    /// What only calls in the process's name can tell.
    fn ask(
        &mut self,
        process: &Process,
        landlock: Option<u32>,
        device: Option<(&Device, bool)>,
    ) -> Result<(), String> {
        /// `NOROOT`, `NO_SETUID_FIXUP`, `NO_CAP_AMBIENT_RAISE`, each with its lock, and the lock of `KEEP_CAPS`.
        const LOCKED: i64 = 0xef;
        let label = process.label.as_str();
        let mut tracee = of(label, "main thread", Tracee::stop(process.pid))?;
        let dumpable = of(label, "dumpable flag", probe::dumpable(&mut tracee))?;
        self.dumpable.insert(process.pid, dumpable);
        if dumpable {
            self.add(
                label,
                Check::Dumpable,
                "others of its user may look into it",
            );
        }
        if landlock.is_some() {
            let bits = of(label, "securebits", probe::securebits(&mut tracee))?;
            if bits != LOCKED {
                self.add(label, Check::Securebits, format!("{bits:#x}"));
            }
        }
        let keys = of(label, "keys", probe::session_keys(&mut tracee))?;
        if process.label == "control" {
            self.keys = keys;
        }
        if device.is_some() {
            // A kernel without keys has nothing to hide.
            if keys >= 0 && keys == self.keys {
                self.add(label, Check::Keys, format!("session {keys:#x}"));
            }
            let signal = probe::signal_at_parents_death(&mut tracee);
            let signal = of(label, "signal at the parent's death", signal)?;
            // One that a keeper has started dies with their pid namespace.
            let wanted = device.is_some_and(|(_, dies)| dies);
            if wanted && signal != libc::SIGKILL {
                self.add(label, Check::ParentDeath, format!("signal {signal}"));
            }
        }
        if let Some(abi) = landlock {
            let folder = device.is_some_and(|(d, _)| matches!(d.back_end, BackEnd::Folder { .. }));
            let missing = probe::missing_landlock(&mut tracee, abi, folder);
            for what in of(label, "Landlock", missing)? {
                self.add(label, Check::Landlock(what), "a probe was not refused");
            }
        }
        // Last, for there is no way back if it can. Linux makes none for a process of several tasks, so one for which it keeps
        // workers at this moment cannot be asked; the other disk, which writes nothing, has none.
        let alone = !process.threads.values().any(is_ring_worker);
        if device.is_some() && alone && of(label, "namespaces", probe::makes_users(&mut tracee))? {
            self.add(label, Check::NestedUsers, "it made one");
        }
        Ok(())
    }

    /// What `query-sandbox` says about the same processes.
    fn query(&mut self, processes: &[Process], reply: &Value) {
        let pids: Vec<i32> = processes.iter().map(|process| process.pid).collect();
        if reply["pids"] != json!(pids) {
            let found = format!("{} instead of {pids:?}", reply["pids"]);
            self.add("control", Check::Query("pids"), found);
            return;
        }
        for (at, process) in processes.iter().enumerate() {
            let said = &reply["processes"][at];
            let mut facts = facts(process);
            if !process.folder {
                let flag = self.dumpable.get(&process.pid);
                facts.push(("dumpable", json!(flag)));
            }
            for (member, wanted) in facts {
                if let Some(why) = said["unreadable"][member].as_str() {
                    self.add(&process.label, Check::Unread(member), why);
                    continue;
                }
                let said = picked(member, &said[member]);
                if said != wanted {
                    let found = format!("{said} instead of {wanted}");
                    self.add(&process.label, Check::Query(member), found);
                }
            }
        }
    }
}

fn is_ring_worker(status: &Status) -> bool {
    is_ring_workers_name(status.name())
}

fn is_ring_workers_name(name: &str) -> bool {
    name.starts_with(RING_WORKER)
}

fn access(fd: &Fd) -> &'static str {
    match fd.flags & libc::O_ACCMODE {
        _ if fd.flags & libc::O_PATH != 0 => "",
        libc::O_RDONLY => "r",
        libc::O_WRONLY => "w",
        _ => "rw",
    }
}

/// What was read here, in the form of the reply's members.
fn facts(process: &Process) -> Vec<(&'static str, Value)> {
    let numbers = |field: &str| -> Value {
        let words = process.status.field(field).split_whitespace();
        words.filter_map(|w| w.parse::<u32>().ok()).collect()
    };
    let threads: Value = process
        .own_threads()
        .map(|(tid, status)| {
            let sets = status.capabilities();
            json!({
                "tid": tid,
                "name": status.name(),
                "seccomp": if status.seccomp_mode() == 2 { "filter" } else { "none" },
                "filters": status.field("Seccomp_filters").parse::<u32>().ok(),
                "no-new-privs": status.no_new_privs(),
                "capabilities": {
                    "inheritable": format!("{:016x}", sets[0]),
                    "permitted": format!("{:016x}", sets[1]),
                    "effective": format!("{:016x}", sets[2]),
                    "bounding": format!("{:016x}", sets[3]),
                    "ambient": format!("{:016x}", sets[4]),
                },
            })
        })
        .collect();
    let namespaces: serde_json::Map<String, Value> = NAMESPACES
        .iter()
        .map(|name| ((*name).to_owned(), json!(process.namespaces.get(*name))))
        .collect();
    let rights = |wanted: &[char]| {
        let all = process.maps.iter();
        all.filter(|m| wanted.iter().all(|c| m.rights.contains(*c)))
            .count()
    };
    let foreign = process.maps.iter().filter(|m| m.file);
    let foreign: Vec<&str> = foreign
        .map(|m| m.name.rsplit('/').next().unwrap_or_default())
        .collect();
    let fds: Value = process
        .fds
        .iter()
        .map(|(number, fd)| {
            json!([
                number,
                match access(fd) {
                    "r" => "read",
                    "w" => "write",
                    "rw" => "read-write",
                    _ => "none",
                }
            ])
        })
        .collect();
    let mut facts = vec![
        ("pid", json!(process.pid)),
        ("name", json!(process.status.name())),
        ("uids", numbers("Uid")),
        ("gids", numbers("Gid")),
        ("groups", numbers("Groups")),
        ("threads", threads),
        ("namespaces", namespaces.into()),
        (
            "memory",
            json!([rights(&['x']), rights(&['w', 'x']), foreign]),
        ),
    ];
    // The broker has some more open while it reads.
    if process.label != "broker" {
        facts.push(("fds", fds));
    }
    facts
}

/// A member of the reply, reduced to what [`facts`] has of it.
fn picked(member: &str, said: &Value) -> Value {
    let list = |said: &Value| said.as_array().cloned().unwrap_or_default();
    match member {
        "namespaces" => said
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, one)| (name.clone(), one["inode"].clone()))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        "fds" => list(said)
            .iter()
            .map(|fd| json!([fd["fd"], fd["access"]]))
            .collect(),
        "memory" => json!([
            said["executable"],
            said["writable-executable"],
            said["foreign-files"]
        ]),
        // Workers may have come or gone between the two looks.
        "threads" => list(said)
            .into_iter()
            .filter(|one| !one["name"].as_str().is_some_and(is_ring_workers_name))
            .collect(),
        _ => said.clone(),
    }
}
