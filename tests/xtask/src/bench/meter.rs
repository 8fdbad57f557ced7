//! # What one start costs
//!
//! **Job.** Start one VMM, wait for the guest's first byte, and read wall time, processor time of all its processes,
//! and their memory without guest RAM.
//! **Who is not trusted.** The VMM's own figures: the scheduler counts its processor time, per control group, so that
//! helpers that have ended count too; the kernel's `smaps` counts its memory.
//! **Why this way.** The same meter for all candidates. This program's share of the group's time (it forks inside the
//! group) is taken away by its own exact counter.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tests::payload::FIRST_BYTE;
use tests::procfs;
use tests::wait::{Deadline, Watched, readable};

/// A start that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the processes may take to come to rest after the first byte.
const REST: Duration = Duration::from_millis(200);

/// One start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// From before `fork` to the first byte.
    pub wall: Duration,
    /// Processor time of all processes, once they rest after the first byte.
    pub cpu: Duration,
    /// Proportional set size of all processes without guest RAM, in KiB.
    pub pss: u64,
    /// How many processes there are.
    pub processes: usize,
}

/// Control group for processor time, version 1 or 2.
#[derive(Debug)]
pub(crate) struct Group {
    dir: PathBuf,
    parent: PathBuf,
    usage: &'static str,
}

impl Group {
    pub(crate) fn new() -> Result<Self, String> {
        let candidates = [
            ("/sys/fs/cgroup/cpuacct", "cpuacct.usage"),
            ("/sys/fs/cgroup/cpu,cpuacct", "cpuacct.usage"),
            ("/sys/fs/cgroup", "cpu.stat"),
            ("/sys/fs/cgroup/unified", "cpu.stat"),
        ];
        for (parent, usage) in candidates {
            let dir = Path::new(parent).join(format!("stratovirt-bench-{}", std::process::id()));
            if !Path::new(parent).join("cgroup.procs").exists() || fs::create_dir(&dir).is_err() {
                continue;
            }
            let group = Self {
                dir,
                parent: parent.into(),
                usage,
            };
            if group.used().is_ok() {
                return Ok(group);
            }
        }
        Err("no control group counts processor time here: mount cpuacct (version 1) or version 2 at /sys/fs/cgroup".into())
    }

    fn used(&self) -> Result<Duration, String> {
        let path = self.dir.join(self.usage);
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let number = |t: &str| {
            t.trim()
                .parse::<u64>()
                .map_err(|e| format!("{}: {e}", path.display()))
        };
        if self.usage == "cpu.stat" {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix("usage_usec "))
                .ok_or("cpu.stat has no usage_usec")?;
            return number(line).map(Duration::from_micros);
        }
        number(&text).map(Duration::from_nanos)
    }

    fn enter(dir: &Path) -> Result<(), String> {
        let path = dir.join("cgroup.procs");
        fs::write(&path, std::process::id().to_string())
            .map_err(|e| format!("{}: {e}", path.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = Self::enter(&self.parent);
        // It fails while a process is left in it, which the next run would report.
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Processor time of this program so far, exact to a microsecond.
fn own_time() -> Result<Duration, String> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).map_err(|e| format!("getrusage: {e}"))?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros).unwrap_or(0)))
}

/// Starts `command`, whose standard output carries the guest's serial port, and measures it. `ram` is the guest's RAM
/// in bytes.
pub(crate) fn measure(
    command: &mut Command,
    group: &Group,
    ram: u64,
    scratch: &Path,
) -> Result<Sample, String> {
    let errors = scratch.join("stderr");
    let file = fs::File::create(&errors).map_err(|e| format!("{}: {e}", errors.display()))?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(file);

    Group::enter(&group.dir)?;
    let (group_before, own_before) = (group.used()?, own_time()?);
    let start = Instant::now();
    let mut child = command
        .spawn()
        .map_err(|e| format!("cannot start it: {e}"))?;
    let own = own_time()?.saturating_sub(own_before);
    Group::enter(&group.parent)?;

    let result = first_byte(&mut child, start).and_then(|wall| {
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let pids = at_rest(pid)?;
        let cpu = group
            .used()?
            .saturating_sub(group_before)
            .saturating_sub(own);
        let mut pss = 0;
        for &pid in &pids {
            pss += procfs::pss_without_ram(pid, ram).map_err(|e| format!("smaps of {pid}: {e}"))?;
        }
        Ok((
            Sample {
                wall,
                cpu,
                pss,
                processes: pids.len(),
            },
            pids,
        ))
    });
    // Whatever came of it, nothing of it may run while the next candidate is measured.
    let pids = match &result {
        Ok((_, pids)) => pids.clone(),
        Err(_) => procfs::descendants(i32::try_from(child.id()).unwrap_or(0)).unwrap_or_default(),
    };
    let watched: Vec<Watched> = pids.iter().filter_map(|&p| Watched::new(p).ok()).collect();
    let _ = child.kill();
    let _ = child.wait();
    for process in watched {
        if !process
            .ended(Deadline::after(Duration::from_secs(2)))
            .unwrap_or(true)
        {
            return Err(format!("process {} has outlived its VMM", process.pid));
        }
    }
    result.map(|(sample, _)| sample).map_err(|message| {
        let text = fs::read_to_string(&errors).unwrap_or_default();
        format!(
            "{message}; its messages: {}",
            text.lines().take(5).collect::<Vec<_>>().join(" / ")
        )
    })
}

fn first_byte(child: &mut std::process::Child, start: Instant) -> Result<Duration, String> {
    let output = child.stdout.as_mut().ok_or("no output")?;
    let deadline = Deadline::after(LIMIT);
    let mut chunk = [0; 4096];
    loop {
        match readable(&[output.as_fd()], deadline) {
            Ok(Some(_)) => {}
            Ok(None) => return Err(format!("no byte from the guest within {LIMIT:?}")),
            Err(error) => return Err(format!("poll: {error}")),
        }
        let count = output
            .read(&mut chunk)
            .map_err(|e| format!("its output: {e}"))?;
        if chunk[..count].contains(&FIRST_BYTE) {
            return Ok(start.elapsed());
        }
        if count == 0 {
            return Err("it ended before the guest wrote a byte".into());
        }
    }
}

/// The process and all below it, once each of their threads sleeps.
fn at_rest(pid: i32) -> Result<Vec<i32>, String> {
    let deadline = Deadline::after(REST);
    loop {
        let mut pids = vec![pid];
        pids.extend(procfs::descendants(pid).map_err(|e| format!("its processes: {e}"))?);
        let running = pids.iter().any(|&p| {
            procfs::Status::of_threads(p)
                .is_ok_and(|threads| threads.values().any(|t| t.field("State").starts_with('R')))
        });
        if !running || deadline.left().is_zero() {
            return Ok(pids);
        }
    }
}
