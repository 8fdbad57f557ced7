//! # The candidates
//!
//! **Job.** For each VMM, the command line that boots the same guest on the same machine: one processor, the same RAM,
//! one disk, and perhaps one network card, with the serial port on standard output.
//! **Who is not trusted.** Nobody. **Why this way.** Each peer runs as its own manual starts it, with its default
//! filters; none is tuned, neither up nor down.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is booted.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub kernel: PathBuf,
    pub disk: PathBuf,
    pub tap: Option<String>,
    pub memory_mib: u64,
}

/// Program, setting and scratch folder to a command line.
type Recipe = fn(&Path, &Setting, &Path) -> Result<Command, String>;

/// One VMM.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub name: &'static str,
    pub program: PathBuf,
    pub command: Recipe,
}

/// The product, the product in its outer jail, and all peers that are on PATH.
pub(crate) fn all(own: PathBuf) -> Vec<Candidate> {
    let mut found = vec![
        Candidate {
            name: "stratovirt",
            program: own.clone(),
            command: stratovirt,
        },
        Candidate {
            name: OZONE,
            program: own,
            command: in_ozone,
        },
    ];
    let peers: [(&str, Recipe); 3] = [
        ("firecracker", firecracker),
        ("cloud-hypervisor", cloud_hypervisor),
        ("qemu-system-x86_64", qemu),
    ];
    for (name, command) in peers {
        match on_path(name) {
            Some(program) => found.push(Candidate {
                name,
                program,
                command,
            }),
            None => eprintln!("bench: {name} is not on PATH and is left out"),
        }
    }
    found
}

pub(super) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

fn stratovirt(program: &Path, setting: &Setting, _scratch: &Path) -> Result<Command, String> {
    let mut command = Command::new(program);
    command
        .args([
            "-machine",
            "microvm",
            "-smp",
            "1",
            "-m",
            &setting.memory_mib.to_string(),
        ])
        .arg("-kernel")
        .arg(&setting.kernel)
        .args(["-append", "console=ttyS0", "-serial", "stdio"])
        .arg("-drive")
        .arg(format!(
            "id=disk,file={},direct=off",
            setting.disk.display()
        ))
        .args(["-device", "virtio-blk-device,drive=disk,id=blk0"]);
    if let Some(tap) = &setting.tap {
        command.args(["-netdev", &format!("tap,id=net0,ifname={tap}")]);
        command.args(["-device", "virtio-net-device,netdev=net0,id=nic0"]);
    }
    Ok(command)
}

/// The name of the product in its outer jail among the candidates.
pub(crate) const OZONE: &str = "ozone";
/// The jail of the bench; each start makes it anew.
const JAIL: &str = "bench-startup";
/// Who the VM in the jail runs as. The disk and the tap must be this user's.
pub(crate) const JAIL_USER: u32 = 64_700;

/// The same command line behind `ozone`, with everything that a tenant gets: own user, sources, limits of both kinds.
fn in_ozone(program: &Path, setting: &Setting, scratch: &Path) -> Result<Command, String> {
    let ozone = program.with_file_name("ozone");
    clean(&ozone, program)?;
    let file = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        Path::new(".").join(name)
    };
    let within = Setting {
        kernel: file(&setting.kernel),
        disk: file(&setting.disk),
        ..setting.clone()
    };
    let user = JAIL_USER.to_string();
    let mut command = Command::new(&ozone);
    command
        .args(["-name", JAIL, "-exec_file"])
        .arg(program)
        .args(["-uid", &user, "-gid", &user])
        .arg("-source")
        .args([&setting.kernel, &setting.disk])
        .args([
            "-numa",
            "0",
            "-cgroup",
            "cpuset.cpus=0-1",
            "memory.limit_in_bytes=1G",
        ])
        .arg("--")
        .args(stratovirt(program, &within, scratch)?.get_args());
    Ok(command)
}

/// Removes what the start before has left; nothing is fine. Not part of what is measured.
pub(crate) fn clean(ozone: &Path, program: &Path) -> Result<(), String> {
    let output = Command::new(ozone)
        .args(["-name", JAIL, "-clean-resource", "-exec_file"])
        .arg(program)
        .output()
        .map_err(|e| format!("{}: {e}", ozone.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn firecracker(program: &Path, setting: &Setting, scratch: &Path) -> Result<Command, String> {
    let mut config = serde_json::json!({
        "boot-source": {"kernel_image_path": setting.kernel, "boot_args": "console=ttyS0"},
        "drives": [{"drive_id": "disk", "path_on_host": setting.disk, "is_root_device": false, "is_read_only": false}],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": setting.memory_mib},
    });
    if let Some(tap) = &setting.tap {
        config["network-interfaces"] =
            serde_json::json!([{"iface_id": "net0", "host_dev_name": tap}]);
    }
    let file = scratch.join("firecracker.json");
    fs::write(&file, config.to_string()).map_err(|e| format!("{}: {e}", file.display()))?;
    let mut command = Command::new(program);
    command.args(["--no-api", "--config-file"]).arg(file);
    Ok(command)
}

fn cloud_hypervisor(program: &Path, setting: &Setting, _scratch: &Path) -> Result<Command, String> {
    let mut command = Command::new(program);
    command
        .arg("--kernel")
        .arg(&setting.kernel)
        .args([
            "--cmdline",
            "console=ttyS0",
            "--cpus",
            "boot=1",
            "--serial",
            "tty",
            "--console",
            "off",
        ])
        .args(["--memory", &format!("size={}M", setting.memory_mib)])
        .arg("--disk")
        .arg(format!("path={},image_type=raw", setting.disk.display()));
    if let Some(tap) = &setting.tap {
        command.args(["--net", &format!("tap={tap}")]);
    }
    Ok(command)
}

fn qemu(program: &Path, setting: &Setting, _scratch: &Path) -> Result<Command, String> {
    let mut command = Command::new(program);
    command
        .args([
            "-M",
            "microvm,pit=off,pic=off,rtc=off",
            "-accel",
            "kvm",
            "-cpu",
            "host,arch-capabilities=off",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
        ])
        .args(["-m", &setting.memory_mib.to_string(), "-smp", "1"])
        .arg("-kernel")
        .arg(&setting.kernel)
        .arg("-drive")
        .arg(format!(
            "id=disk,file={},format=raw,if=none",
            setting.disk.display()
        ))
        .args(["-device", "virtio-blk-device,drive=disk"]);
    if let Some(tap) = &setting.tap {
        command.args([
            "-netdev",
            &format!("tap,id=net0,ifname={tap},script=no,downscript=no"),
        ]);
        command.args(["-device", "virtio-net-device,netdev=net0"]);
    }
    Ok(command)
}
