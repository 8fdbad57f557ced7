//! What the outer jail adds to the start of a VM: the time from the start of `ozone` to the first line
//! of the program in the jail, next to the same program started without it.
//!
//! Arguments: the command `ozone` and the example `vm_probe`, both built for release. Needs root.

use std::{
    env,
    error::Error,
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

const ROUNDS: usize = 100;
/// Device programs beside the control program, as a full installation has them.
const PROGRAMS: [&str; 7] = ["block", "net", "console", "rng", "balloon", "vsock", "scsi"];

fn main() -> ExitCode {
    let args: Vec<PathBuf> = env::args().skip(1).map(PathBuf::from).collect();
    let [ozone, probe] = args.as_slice() else {
        eprintln!("usage: outer_bench OZONE PROBE");
        return ExitCode::from(2);
    };
    match measure(ozone, probe) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outer_bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(ozone: &Path, probe: &Path) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    for name in PROGRAMS.into_iter().chain(["bench-probe"]) {
        fs::copy(probe, path(name))?;
    }
    for (name, mode) in [("kernel", 0o644), ("disk", 0o600)] {
        fs::write(path(name), "content")?;
        fs::set_permissions(path(name), fs::Permissions::from_mode(mode))?;
    }
    let program = path("bench-probe").display().to_string();
    let (kernel, disk) = (
        path("kernel").display().to_string(),
        path("disk").display().to_string(),
    );
    let sources = ["-source", &kernel, &disk];
    let limits = [
        "-numa",
        "0",
        "-cgroup",
        "cpuset.cpus=0",
        "memory.limit_in_bytes=1G",
    ];
    let all = [sources.as_slice(), limits.as_slice()].concat();
    let cases: [(&str, &[&str]); 4] = [
        ("namespaces, programs, /dev, /proc", &[]),
        ("and a kernel and an id-mapped disk", &sources),
        ("and cgroups instead", &limits),
        ("and all of these", &all),
    ];
    let direct = median(|| first_line(Command::new(&program).arg("-ready")))?;
    println!("without ozone: {direct:.2?} to the first line");
    for (what, own) in cases {
        let common = [
            "-name",
            "bench",
            "-exec_file",
            &program,
            "-uid",
            "65001",
            "-gid",
            "65001",
        ];
        let time = median(|| {
            let mut start = Command::new(ozone);
            start.args(common).args(own);
            start.args([
                "--",
                "-kernel",
                "./kernel",
                "-drive",
                "file=./disk,id=d",
                "-ready",
            ]);
            let time = first_line(&mut start);
            let cleaned = Command::new(ozone)
                .args(common)
                .arg("-clean-resource")
                .status()?;
            if !cleaned.success() {
                return Err("cleaning up failed".into());
            }
            time
        })?;
        println!("{what}: adds {:.2?}", time.saturating_sub(direct));
    }
    Ok(())
}

fn median(
    mut once: impl FnMut() -> Result<Duration, Box<dyn Error>>,
) -> Result<Duration, Box<dyn Error>> {
    let mut times = (0..ROUNDS).map(|_| once()).collect::<Result<Vec<_>, _>>()?;
    times.sort_unstable();
    times
        .get(ROUNDS / 2)
        .copied()
        .ok_or_else(|| "no rounds".into())
}

/// The time until the command has printed a line; then waits for its end.
fn first_line(command: &mut Command) -> Result<Duration, Box<dyn Error>> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let output = child.stdout.take().ok_or("no pipe")?;
    BufReader::new(output).read_line(&mut line)?;
    let time = start.elapsed();
    child.wait()?;
    if line.starts_with("ready") {
        Ok(time)
    } else {
        Err("the program did not start".into())
    }
}
