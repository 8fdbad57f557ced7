//! # `cargo xtask bench restore`
//!
//! **Job.** From exec to the first byte that a restored bare guest writes, with its memory read as a whole and brought in
//! later, for guests of several sizes and amounts of memory; and what clones of one template take together.
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** The guest writes one letter again and again, so the first that comes is the first after the restore. The
//! file `memory` is in the page cache, as a template's is; where clones are to share it, on a tmpfs. Clones are measured when each
//! guest has looked at all that it has: what it has not looked at would cost nothing.

use crate::tool;
use serde_json::json;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
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

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let runs = match arguments {
        [] => 21,
        [flag, number] if flag == "--runs" => number
            .parse()
            .ok()
            .filter(|n| (1..=1000).contains(n))
            .ok_or(format!(
                "--runs {number}: a number from 1 to 1000 is wanted"
            ))?,
        _ => return Err("bench restore takes --runs N".into()),
    };
    let program = tool::build_release()?.join("stratovirt");
    let work = tempfile::tempdir().map_err(|e| format!("a temporary folder: {e}"))?;
    let tmpfs =
        tempfile::tempdir_in("/dev/shm").map_err(|e| format!("a folder in /dev/shm: {e}"))?;
    println!(
        "from exec to the guest's first byte, ms: median [quartiles] of {runs} interleaved runs"
    );
    println!(
        "{:>8} {:>10} {:>24} {:>24} {:>24}",
        "memory", "not zero", "read as a whole", "lazy=on", "lazy=on, tmpfs"
    );
    for template in &TEMPLATES {
        let folders = [&work, &tmpfs].map(|dir| folder(dir.path(), template));
        for folder in &folders {
            make(&program, template, folder)?;
        }
        let [disk, shm] = &folders;
        let ways = [(disk, false), (disk, true), (shm, true)];
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        // One round more than counted: the first brings files into the page cache.
        for round in 0..=runs {
            for ((folder, lazy), times) in ways.into_iter().zip(&mut times) {
                let (mut child, time) = restore(&program, template, folder, lazy)?;
                end(&mut child);
                if round > 0 {
                    times.push(time.as_secs_f64() * 1000.0);
                }
            }
        }
        let shown = times.map(|times| {
            let [low, middle, high] = quartiles_of(times);
            format!("{middle:.2} [{low:.2} {high:.2}]")
        });
        println!(
            "{:>5} MiB {:>6} MiB {:>24} {:>24} {:>24}",
            template.memory_mib, template.touched_mib, shown[0], shown[1], shown[2]
        );
    }
    let template = &TEMPLATES[1];
    let [disk, shm] = [&work, &tmpfs].map(|dir| folder(dir.path(), template));
    clones(&program, &disk, false, "read as a whole")?;
    clones(&program, &disk, true, "lazy=on")?;
    clones(&program, &shm, true, "lazy=on, tmpfs")?;
    Ok(ExitCode::SUCCESS)
}

fn folder(dir: &Path, template: &Template) -> PathBuf {
    dir.join(format!("{}-{}", template.memory_mib, template.touched_mib))
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

/// Starts a clone; gives it and the time to its first byte.
fn restore(
    program: &Path,
    template: &Template,
    folder: &Path,
    lazy: bool,
) -> Result<(Child, Duration), String> {
    let option = if lazy { ",lazy=on" } else { "" };
    let mut command = command(program, template);
    command
        .arg("-incoming")
        .arg(format!("file:{}{option}", folder.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command
        .spawn()
        .map_err(|e| format!("cannot start it: {e}"))?;
    let output = child.stdout.as_mut().ok_or("no output")?;
    let deadline = Deadline::after(LIMIT);
    let ready = readable(&[output.as_fd()], deadline).map_err(|e| format!("poll: {e}"))?;
    let time = start.elapsed();
    let mut byte = [0];
    if ready.is_none() || output.read(&mut byte).map_err(|e| e.to_string())? == 0 {
        end(&mut child);
        return Err("the restored guest says nothing".into());
    }
    Ok((child, time))
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// What clones take together, once each guest has looked at all its memory.
fn clones(program: &Path, folder: &Path, lazy: bool, how: &str) -> Result<(), String> {
    let template = &TEMPLATES[1];
    let mut children = Vec::new();
    let start = Instant::now();
    for _ in 0..CLONES {
        children.push(restore(program, template, folder, lazy)?.0);
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
        "{CLONES} clones of {} MiB with {} MiB not zero, {how}: {:.0} ms one after the other, sum of PSS {} MiB, beside memory of their own {} MiB",
        template.memory_mib,
        template.touched_mib,
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
