//! # `cargo xtask bench restore`
//!
//! **Job.** From exec to the first byte that a restored bare guest writes, with its memory read as a whole and brought in
//! later, for guests of several sizes and amounts of memory; and what clones of one template take together.
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** Firecracker, where it is on PATH, does the same in turn: a template that is the same guest's, a process for each clone, and
//! the first byte. The guest writes one letter again and again, so the first that comes is the first after the restore. The
//! file `memory` is in the page cache, as a template's is; where clones are to share it, on a tmpfs. Clones are measured when each
//! guest has looked at all that it has: what it has not looked at would cost nothing.

use super::firecracker::Firecracker;
use crate::tool;
use serde_json::json;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tests::lab::chain;
use tests::payload::Payload;
use tests::procfs;
use tests::vm::Vm;
use tests::wait::{Deadline, readable};

const LIMIT: Duration = Duration::from_secs(30);
const CLONES: usize = 20;

/// A guest of this size that has touched this much of its memory.
struct Template {
    memory_mib: u64,
    touched_mib: u64,
}

const TEMPLATES: [Template; 4] = [
    Template {
        memory_mib: 128,
        touched_mib: 0,
    },
    Template {
        memory_mib: 128,
        touched_mib: 64,
    },
    Template {
        memory_mib: 1024,
        touched_mib: 0,
    },
    Template {
        memory_mib: 1024,
        touched_mib: 64,
    },
];

/// From exec to the first byte of a guest that goes on from a snapshot, and what clones take, beside firecracker.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often.
    #[arg(long, value_name = "N", default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    runs: u32,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    let runs = options.runs as usize;
    let program = tool::build_release()?.join("stratovirt");
    let work = tempfile::tempdir().map_err(|e| format!("a temporary folder: {e}"))?;
    let tmpfs =
        tempfile::tempdir_in("/dev/shm").map_err(|e| format!("a folder in /dev/shm: {e}"))?;
    let peer = Firecracker::found();
    if peer.is_none() {
        eprintln!("bench: firecracker is not on PATH and is left out");
    }
    println!(
        "from exec to the guest's first byte, ms: median [quartiles] of {runs} interleaved runs"
    );
    print!("{:>8} {:>10}", "memory", "not zero");
    for way in &WAYS {
        print!(" {:>24}", way.name());
    }
    println!(" {:>24}", "ratio");
    for template in &TEMPLATES {
        let place = |way: &Way| folder(if way.shm() { &tmpfs } else { &work }, template, *way);
        for tmpfs in [false, true] {
            make(&program, template, &place(&Way::Own { lazy: true, tmpfs }))?;
        }
        if let Some(peer) = &peer {
            peer.make(
                template.memory_mib,
                template.touched_mib,
                &place(&Way::Firecracker),
            )?;
        }
        let mut times = WAYS.map(|_| Vec::new());
        // One round more than counted: the first brings files into the page cache.
        for round in 0..=runs {
            for (way, times) in WAYS.iter().zip(&mut times) {
                let Some((mut child, time)) =
                    restore(&program, peer.as_ref(), template, &place(way), *way)?
                else {
                    continue;
                };
                end(&mut child);
                if round > 0 {
                    times.push(time.as_secs_f64() * 1000.0);
                }
            }
        }
        print!(
            "{:>5} MiB {:>6} MiB",
            template.memory_mib, template.touched_mib
        );
        let shown = times.map(quartiles_of);
        for [low, middle, high] in shown {
            print!(" {:>24}", format!("{middle:.2} [{low:.2} {high:.2}]"));
        }
        let [.., [_, clone, _], [_, theirs, _]] = shown;
        println!(" {:>24}", format!("{:.2} × as fast", theirs / clone));
    }
    let template = &TEMPLATES[1];
    for way in &WAYS {
        let dir = if way.shm() { &tmpfs } else { &work };
        let folder = folder(dir, template, *way);
        clones(&program, peer.as_ref(), &folder, *way)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How a guest comes back.
#[derive(Debug, Clone, Copy)]
enum Way {
    Own { lazy: bool, tmpfs: bool },
    Firecracker,
}

/// The last two are compared.
const WAYS: [Way; 4] = [
    Way::Own {
        lazy: false,
        tmpfs: false,
    },
    Way::Own {
        lazy: true,
        tmpfs: false,
    },
    Way::Own {
        lazy: true,
        tmpfs: true,
    },
    Way::Firecracker,
];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Own { lazy: false, .. } => "read as a whole",
            Self::Own { tmpfs: false, .. } => "lazy=on",
            Self::Own { .. } => "lazy=on, tmpfs",
            Self::Firecracker => "firecracker, tmpfs",
        }
    }

    /// Whether the template is on a tmpfs.
    fn shm(self) -> bool {
        match self {
            Self::Own { tmpfs, .. } => tmpfs,
            Self::Firecracker => true,
        }
    }
}

fn folder(dir: &TempDir, template: &Template, way: Way) -> PathBuf {
    let whose = match way {
        Way::Own { .. } => "own",
        Way::Firecracker => "firecracker",
    };
    dir.path().join(format!(
        "{whose}-{}-{}",
        template.memory_mib, template.touched_mib
    ))
}

fn command(program: &Path, template: &Template) -> Command {
    let mut command = Command::new(program);
    command
        .args([
            "-machine",
            "microvm",
            "-m",
            &template.memory_mib.to_string(),
        ])
        .arg("-kernel")
        .arg(Payload::Restored.path())
        .args(["-append", &format!("touch={}", template.touched_mib)])
        .args(["-serial", "stdio"]);
    command
}

fn make(program: &Path, template: &Template, folder: &Path) -> Result<(), String> {
    let mut vm = Vm::builder()
        .program(program)
        .args([
            "-machine",
            "microvm",
            "-m",
            &template.memory_mib.to_string(),
        ])
        .kernel(
            &Payload::Restored.path(),
            &format!("touch={}", template.touched_mib),
        )
        .arg("-snapshot-dir")
        .arg(folder)
        .with_qmp()
        .start()
        .map_err(|e| chain(&e))?;
    vm.wait_for("....", LIMIT)?;
    let mut qmp = vm.qmp().map_err(|e| chain(&e))?;
    qmp.execute(
        "migrate",
        json!({ "uri": format!("file:{}", folder.display()) }),
    )
    .map_err(|e| chain(&e))?;
    Ok(())
}

/// Starts a clone; gives it and the time to its first byte. `None` for a peer that is not there.
fn restore(
    program: &Path,
    peer: Option<&Firecracker>,
    template: &Template,
    folder: &Path,
    way: Way,
) -> Result<Option<(Child, Duration)>, String> {
    let start = Instant::now();
    let mut child = match (way, peer) {
        (Way::Own { lazy, .. }, _) => {
            let option = if lazy { ",lazy=on" } else { "" };
            command(program, template)
                .arg("-incoming")
                .arg(format!("file:{}{option}", folder.display()))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .map_err(|e| format!("cannot start it: {e}"))?
        }
        (Way::Firecracker, Some(peer)) => peer.restore(folder)?,
        (Way::Firecracker, None) => return Ok(None),
    };
    let output = child.stdout.as_mut().ok_or("no output")?;
    let deadline = Deadline::after(LIMIT);
    let ready = readable(&[output.as_fd()], deadline).map_err(|e| format!("poll: {e}"))?;
    let time = start.elapsed();
    let mut byte = [0];
    if ready.is_none() || output.read(&mut byte).map_err(|e| e.to_string())? == 0 {
        end(&mut child);
        return Err("the restored guest says nothing".into());
    }
    Ok(Some((child, time)))
}

pub(super) fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// What clones take together, once each guest has looked at all its memory.
fn clones(
    program: &Path,
    peer: Option<&Firecracker>,
    folder: &Path,
    way: Way,
) -> Result<(), String> {
    let template = &TEMPLATES[1];
    let mut children = Vec::new();
    let start = Instant::now();
    for _ in 0..CLONES {
        let Some((child, _)) = restore(program, peer, template, folder, way)? else {
            return Ok(());
        };
        children.push(child);
    }
    let took = start.elapsed();
    // A letter a page.
    let mut letters = vec![0; template.touched_mib as usize * 256];
    for child in &mut children {
        let output = child.stdout.as_mut().ok_or("no output")?;
        output
            .read_exact(&mut letters)
            .map_err(|e| format!("a clone's guest says no more: {e}"))?;
    }
    let (mut all, mut without) = (0, 0);
    for child in &children {
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let below = procfs::descendants(pid).map_err(|e| e.to_string())?;
        for pid in std::iter::once(pid).chain(below) {
            all += procfs::pss(pid).map_err(|e| e.to_string())?;
            without += procfs::pss_without_ram(pid, u64::MAX).map_err(|e| e.to_string())?;
        }
    }
    children.iter_mut().for_each(end);
    println!(
        "{CLONES} clones of {} MiB with {} MiB not zero, {}: {:.0} ms one after the other, sum of PSS {} MiB, beside memory of their own {} MiB",
        template.memory_mib,
        template.touched_mib,
        way.name(),
        took.as_secs_f64() * 1000.0,
        all >> 10,
        without >> 10
    );
    Ok(())
}

/// Lower quartile, median, upper quartile.
fn quartiles_of(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|part| {
        values
            .get(values.len() * part / 4)
            .copied()
            .unwrap_or(f64::NAN)
    })
}
