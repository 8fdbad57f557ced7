//! System calls of a process, counted.
//!
//! **Job.** Counts them while a turn lasts, by the kernel's trace point. **Who is not trusted.** Nobody.
//! **Why this way.** Only the ring buffer's own counters are read, so nothing is lost when it is full, and nobody stops the
//! process at each call as strace does.

#![allow(clippy::unwrap_used)] // a bench that cannot count ends

use std::fs;
use std::path::PathBuf;

/// An instance of the kernel's tracer, which goes away with this.
#[derive(Debug)]
pub struct Counter {
    dir: PathBuf,
}

impl Counter {
    /// `None`, with a line, where this is not root's kernel.
    pub fn new() -> Option<Self> {
        let dir = PathBuf::from(format!(
            "/sys/kernel/tracing/instances/bench-{}",
            std::process::id()
        ));
        if let Err(error) = fs::create_dir(&dir) {
            eprintln!("system calls are not counted: {}: {error}", dir.display());
            return None;
        }
        Some(Self { dir })
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.dir.join(file), value).unwrap();
    }

    /// Counts from now on what the process calls, and all that it starts.
    pub fn begin(&self, pid: i32) {
        self.set("trace", "");
        let threads: Vec<String> = fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .map(|task| task.unwrap().file_name().into_string().unwrap())
            .collect();
        self.set("set_event_pid", &threads.join(" "));
        self.set("events/raw_syscalls/sys_enter/enable", "1");
    }

    /// System calls since then.
    pub fn end(&self) -> u64 {
        self.set("events/raw_syscalls/sys_enter/enable", "0");
        let mut sum = 0;
        for cpu in fs::read_dir(self.dir.join("per_cpu")).unwrap() {
            let stats = fs::read_to_string(cpu.unwrap().path().join("stats")).unwrap();
            let counts = stats.lines().filter_map(|line| line.split_once(": "));
            sum += counts
                .filter(|(name, _)| ["entries", "overrun"].contains(name))
                .map(|(_, count)| count.parse::<u64>().unwrap())
                .sum::<u64>();
        }
        sum
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}
