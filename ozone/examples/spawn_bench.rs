//! Measures the start of jailed processes: `spawn_bench PROBE [ROUNDS] [PARALLEL]`.
//!
//! PROBE is the built example `jail_probe`. Prints, for one process at a time, the median time of
//! each phase from the request to the probe's `main`, then the time until PARALLEL probes all run.

use nix::sys::{
    socket::{AddressFamily, SockFlag, SockType, socketpair},
    wait::{Id, WaitPidFlag, waitid},
};
use ozone::{Child, DeviceLaunch, Identity, Limits, Sandbox, spawn};
use std::{
    collections::BTreeMap,
    env,
    error::Error,
    ffi::CString,
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn launch(binary: &File, trace: bool) -> Result<(ozone::Pending, File)> {
    let null = || -> Result<OwnedFd> { Ok(File::open("/dev/null")?.into()) };
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let pending = spawn(DeviceLaunch {
        name: "probe",
        binary: binary.as_fd(),
        argv: vec![CString::new("probe")?, CString::new("start")?],
        fds: vec![(null()?, 0), (null()?, 1), (null()?, 2), (theirs, 3)],
        identity: Identity::least(),
        tree: None,
        limits: Limits::default(),
        cpus: None,
        mode: Sandbox::Strict,
        trace,
    })?;
    Ok((pending, File::from(ours)))
}

fn main_began(link: &mut File) -> Result<u64> {
    let mut time = [0; 8];
    link.read_exact(&mut time)?;
    Ok(u64::from_ne_bytes(time))
}

fn reap(child: &Child) -> Result<()> {
    waitid(Id::PIDFd(child.pidfd.as_fd()), WaitPidFlag::WEXITED)?;
    Ok(())
}

fn median(list: &mut [f64]) -> f64 {
    list.sort_by(f64::total_cmp);
    list.get(list.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let path = arguments
        .next()
        .ok_or("usage: spawn_bench PROBE [ROUNDS] [PARALLEL]")?;
    let rounds: usize = arguments.next().map_or(Ok(200), |a| a.parse())?;
    let parallel: usize = arguments.next().map_or(Ok(4), |a| a.parse())?;
    let binary = File::open(path)?;

    let mut phases: BTreeMap<usize, (String, Vec<f64>)> = BTreeMap::new();
    for _ in 0..rounds {
        let (pending, mut link) = launch(&binary, true)?;
        let child = pending.finish()?;
        let main_began = main_began(&mut link)?;
        reap(&child)?;
        let start = child.phases.first().map_or(0, |p| p.at);
        let stamps = child.phases.iter().map(|p| (p.step.to_string(), p.at));
        for (i, (name, at)) in stamps
            .chain([("main begins".into(), main_began)])
            .enumerate()
        {
            let after = at.saturating_sub(start) as f64 / 1000.0;
            phases
                .entry(i)
                .or_insert_with(|| (name, Vec::new()))
                .1
                .push(after);
        }
    }
    println!("median of {rounds} starts, microseconds after the request:");
    for (name, times) in phases.values_mut() {
        println!("{:>9.1}  {name}", median(times));
    }

    for count in [1, parallel] {
        let mut walls = Vec::new();
        for _ in 0..rounds {
            let begin = Instant::now();
            let started = (0..count)
                .map(|_| launch(&binary, false))
                .collect::<Result<Vec<_>>>()?;
            let mut running = Vec::new();
            for (pending, mut link) in started {
                let child = pending.finish()?;
                main_began(&mut link)?;
                running.push(child);
            }
            walls.push(begin.elapsed().as_secs_f64() * 1e6);
            for child in &running {
                reap(child)?;
            }
        }
        println!(
            "{:>9.1}  until {count} started together are all in main (median)",
            median(&mut walls)
        );
    }
    Ok(())
}
