//! # `cargo xtask bench recovery`
//!
//! **Job.** How long a device has no process that serves: when it is killed, until another one goes on (`DEVICE_RECOVERED`), and
//! when it is replaced by `device-upgrade` (`DEVICE_UPGRADED`), for a disk and a card whose guests are at work all the time.
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** Kills and upgrades take turns, so that both meet the same load. The VM's own figure leaves out what it
//! cannot see, the time from the signal until the broker hears of it, so that is measured from outside as well.

use crate::tool;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tests::host::Tap;
use tests::lab::chain;
use tests::payload::Payload;
use tests::qmp::Qmp;
use tests::vm::Vm;

const LIMIT: Duration = Duration::from_secs(30);

/// For how long nobody serves when a device process is killed, and when it is replaced.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    runs: u32,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    let runs = options.runs as usize;
    let program = tool::build_release()?.join("stratovirt");
    let work = tempfile::tempdir().map_err(|e| format!("a temporary folder: {e}"))?;
    println!(
        "ms for which nobody served, of {runs} kills and {runs} upgrades in turns: 50 %, 99 %, most"
    );
    println!(
        "{:>8} {:>24} {:>24} {:>24}",
        "device", "kill, as told", "kill, signal to event", "upgrade, as told"
    );
    let disk = disk(&program, work.path())?;
    measure("disk", disk, runs)?;
    let tap = Tap::new("sv-bench", "10.7.60.1/24").map_err(|e| chain(&e))?;
    let card = card(&program)?;
    measure("card", card, runs)?;
    drop(tap);
    Ok(ExitCode::SUCCESS)
}

fn disk(program: &Path, work: &Path) -> Result<Vm, String> {
    let image = work.join("disk.img");
    std::fs::File::create(&image)
        .and_then(|file| file.set_len(4 << 20))
        .map_err(|e| format!("{}: {e}", image.display()))?;
    Vm::builder()
        .program(program)
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkLoop.path(), "spin=1")
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=off", image.display()))
        .args([
            "-device",
            "virtio-blk-device,drive=d0,id=disk,max-restarts=1000",
        ])
        .with_qmp()
        .start()
        .map_err(|e| chain(&e))
}

fn card(program: &Path) -> Result<Vm, String> {
    Vm::builder()
        .program(program)
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::NetLoop.path(), "host=10.7.60.1 own=10.7.60.2")
        .args(["-netdev", "tap,id=n0,ifname=sv-bench", "-device"])
        .arg("virtio-net-device,netdev=n0,id=card,mac=52:54:00:00:00:60,max-restarts=1000")
        .with_qmp()
        .start()
        .map_err(|e| chain(&e))
}

/// Kills and replaces the process of `device` by turns, while the guest says that it is at work.
fn measure(device: &str, mut vm: Vm, runs: usize) -> Result<(), String> {
    vm.wait_for("LOOP 10", LIMIT)?;
    let mut qmp = vm.qmp().map_err(|e| chain(&e))?;
    let [mut told, mut seen, mut gaps] = [const { Vec::new() }; 3];
    let all = qmp
        .execute("query-workloads", json!({}))
        .map_err(|e| chain(&e))?;
    let mut pid = number(&all[0], "pid")? as i32;
    for _ in 0..runs {
        vm.wait_for("LOOP ", LIMIT)?;
        let since = Instant::now();
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|e| format!("kill {pid}: {e}"))?;
        let event = wait(&mut qmp, "DEVICE_RECOVERED")?;
        seen.push(since.elapsed().as_secs_f64() * 1000.0);
        told.push(number(&event, "stall-ms")?);
        vm.wait_for("LOOP ", LIMIT)?;
        qmp.execute("device-upgrade", json!({ "id": device }))
            .map_err(|e| chain(&e))?;
        let event = wait(&mut qmp, "DEVICE_UPGRADED")?;
        gaps.push(number(&event, "stall-ms")?);
        pid = number(&event, "pid")? as i32;
    }
    vm.console.send("x").map_err(|e| e.to_string())?;
    // The guest has checked every byte.
    vm.wait_for("-LOOP OK", LIMIT)?;
    let [told, seen, gaps] = [told, seen, gaps].map(shown);
    println!("{device:>8} {told:>24} {seen:>24} {gaps:>24}");
    Ok(())
}

fn wait(qmp: &mut Qmp, event: &str) -> Result<Value, String> {
    let event = qmp.wait_event(event, LIMIT).map_err(|e| chain(&e))?;
    Ok(event["data"].clone())
}

fn number(value: &Value, name: &str) -> Result<f64, String> {
    value[name]
        .as_f64()
        .ok_or_else(|| format!("no {name} in {value}"))
}

fn shown(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let at = |percent: usize| {
        let place = (values.len() * percent).div_ceil(100).max(1) - 1;
        values.get(place).copied().unwrap_or(f64::NAN)
    };
    format!("{:.2} {:.2} {:.2}", at(50), at(99), at(100))
}
