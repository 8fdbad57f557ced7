//! # Memory
//!
//! **Job.** What a daemon costs when it does nothing, and with many inodes looked up and none forgotten.
//! **Who is not trusted.** See `session`. **Why this way.** A guest's cache decides how many inodes a daemon holds, so the
//! cost of one is what a host has to plan for.

use std::fs;
use std::path::Path;
use std::time::Duration;

use fs_device::fuse::wire::opcode;

use crate::daemons::{Cache, Daemon};
use crate::session::{Body, Request, Session, u64_at};

/// Files in one folder.
const PER_FOLDER: usize = 1000;

/// How long a daemon has had nothing to do when its memory is looked at.
const REST: Duration = Duration::from_secs(3);

/// Proportional memory of each daemon that has a session and no request.
pub(crate) fn idle(daemons: &[Daemon], source: &Path) {
    for daemon in daemons {
        let session = Session::start(daemon, source, Cache::Auto);
        session.rest(REST);
        let (pss, count) = (
            session.memory("smaps_rollup", "Pss"),
            session.processes().len(),
        );
        let anonymous = session.memory("smaps_rollup", "Pss_Anon");
        println!(
            "idle {:<20} {pss:>8} KiB PSS, {anonymous} KiB of it anonymous, {count} processes",
            daemon.name
        );
        session.finish();
    }
}

/// Peak memory of each daemon with `count` inodes looked up.
pub(crate) fn inodes(daemons: &[Daemon], source: &Path, count: usize) {
    let folders = count.div_ceil(PER_FOLDER);
    let name = |n: usize| format!("f{n}");
    for folder in 0..folders {
        let path = source.join(name(folder));
        fs::create_dir(&path).unwrap();
        for file in 0..PER_FOLDER.min(count - folder * PER_FOLDER) {
            fs::write(path.join(name(file)), b"").unwrap();
        }
    }
    for daemon in daemons {
        let mut session = Session::start(daemon, source, Cache::Auto);
        let mut known = 0;
        'all: for folder in 0..folders {
            let lookup = |node, n| {
                let body = Body::default().name(&name(n));
                Request::new(opcode::LOOKUP, node, body, 0, 144)
            };
            let Ok(entry) = session.try_call(lookup(1, folder)) else {
                break;
            };
            let node = u64_at(&entry, 0);
            known += 1;
            for file in 0..PER_FOLDER.min(count - folder * PER_FOLDER) {
                if session.try_call(lookup(node, file)).is_err() {
                    break 'all;
                }
                known += 1;
            }
        }
        println!(
            "{known} inodes {:<20} peak RSS {:>8} KiB, PSS {:>8} KiB",
            daemon.name,
            session.memory("status", "VmHWM"),
            session.memory("smaps_rollup", "Pss"),
        );
        session.finish();
    }
}
