//! # Whole VMs in outer jails
//!
//! **Job.** What `ozone` promises, on real VMs with a disk and a network card: two tenants with users, networks and limits of
//! their own; inside, every device process still in a full jail of its own. **Who is not trusted.** The VMMs and their devices.
//! **Why this way.** `ozone`'s own tests use a stand-in; this is the product as a host launches it.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::host::{require_kvm, require_root};
use tests::jail::{Jail, NAMESPACES};
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::Qmp;
use tests::vm::{Vm, binary};
use tests::wait::Watched;

const LIMIT: Duration = Duration::from_secs(60);

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

/// A tenant: a user, a network namespace with a tap, a disk, a VM.
struct Tenant {
    name: String,
    uid: u32,
    network: String,
    dir: tempfile::TempDir,
}

impl Tenant {
    fn new(letter: char, uid: u32) -> Self {
        let name = format!("tenant-{letter}-{}", std::process::id());
        let network = format!("ozone-{letter}-{}", std::process::id());
        ip(&format!("netns add {network}"));
        let dir = tempfile::tempdir().unwrap();
        let tenant = Self {
            name,
            uid,
            network,
            dir,
        };
        let inside = format!("-n {}", tenant.network);
        ip(&format!("{inside} tuntap add dev tap0 mode tap user {uid}"));
        ip(&format!("{inside} addr add 10.0.2.1/24 dev tap0"));
        ip(&format!("{inside} link set tap0 up"));
        let disk = tenant.disk();
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(4 << 20)
            .unwrap();
        // The disk is the tenant's, so that any file system will do.
        std::os::unix::fs::chown(&disk, Some(uid), Some(uid)).unwrap();
        tenant
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    fn folder(&self) -> PathBuf {
        Path::new("/srv/zozne/stratovirt").join(&self.name)
    }

    fn own_words(&self) -> Vec<String> {
        let (uid, program) = (self.uid.to_string(), binary("stratovirt").unwrap());
        let program = program.display().to_string();
        ["-name", &self.name, "-exec_file", &program]
            .into_iter()
            .chain(["-uid", &uid, "-gid", &uid])
            .map(str::to_owned)
            .collect()
    }

    fn start(&self, limits: &[&str]) -> Vm {
        let kernel = Payload::NetTx.path();
        let mut vm = Vm::builder()
            .program(binary("ozone").unwrap())
            .args(self.own_words())
            .args(["-netns", &format!("/run/netns/{}", self.network)])
            .args(limits)
            .arg("-source")
            .args([&kernel, &self.disk()])
            .args(["--", "-sandbox", "strict", "-m", "128"])
            .kernel(
                &Path::new(".").join(kernel.file_name().unwrap()),
                "end=halt",
            )
            .disk("d0", Path::new("./disk.img"), "")
            .tap("n0", "tap0", "52:54:00:00:00:11")
            .args(["-qmp", "unix:./qmp.sock,server,nowait"])
            .start()
            .unwrap();
        vm.wait_for("NET-TX OK", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        vm
    }

    fn end(&self, mut vm: Vm) {
        let watched = Watched::new(vm.pid()).unwrap();
        let mut qmp = Qmp::connect(&self.folder().join("qmp.sock"), &watched, LIMIT).unwrap();
        qmp.execute("quit", serde_json::json!({})).unwrap();
        let status = vm.wait(LIMIT).unwrap();
        assert!(status.success(), "{status}: {}", vm.messages());
        // The broker had the time to clean up behind the VM.
        assert!(!self.folder().join("qmp.sock").exists());
        let cleaned = Command::new(binary("ozone").unwrap())
            .args(self.own_words())
            .arg("-clean-resource")
            .status()
            .unwrap();
        assert!(cleaned.success());
        assert!(!self.folder().exists());
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        // After a failed test the jail is still there; otherwise there is nothing to clean.
        let _ = Command::new(binary("ozone").unwrap_or_default())
            .args(["-name", &self.name, "-exec_file", "stratovirt"])
            .arg("-clean-resource")
            .status();
        // It fails only when someone else has removed it.
        let _ = Command::new("ip")
            .args(["netns", "del", &self.network])
            .status();
    }
}

#[test]
fn two_tenants_are_apart_and_their_devices_are_jailed() {
    require_kvm();
    require_root();
    let (a, b) = (Tenant::new('a', 64_301), Tenant::new('b', 64_302));
    // The host of this test may have no cgroups mounted; ozone's own tests say so if theirs are missing.
    let cgroups = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let limited = cgroups.contains(" - cgroup");
    if !limited {
        println!("limits: not run: no cgroup hierarchy is mounted");
    }
    let limits = [
        "-numa",
        "0",
        "-cgroup",
        "cpuset.cpus=0",
        "memory.limit_in_bytes=1G",
    ];
    let limits = if limited { limits.as_slice() } else { &[] };
    let (mut first, mut second) = (a.start(limits), b.start(limits));

    let mut networks = Vec::new();
    for (tenant, vm) in [(&a, &mut first), (&b, &mut second)] {
        let pids = vm.processes().unwrap();
        let inside: Vec<i32> = pids.into_iter().filter(|pid| *pid != vm.pid()).collect();
        // The first process, the control process, its broker, two devices.
        assert_eq!(inside.len(), 5, "{inside:?}");
        for &pid in &inside {
            let jail = Jail::of(pid).unwrap();
            assert_eq!(jail.uid, tenant.uid, "{}", jail.name);
            assert_eq!(jail.capabilities, [0; 5], "{}", jail.name);
            assert!(jail.no_new_privs, "{}", jail.name);
            if limited {
                let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
                let path = format!("/zozne/stratovirt/{}", tenant.name);
                assert_eq!(
                    groups.matches(&path).count(),
                    limit_groups(&groups),
                    "{groups}"
                );
            }
        }
        let control = vm.process("stratovirt").unwrap().unwrap();
        let outer = procfs::namespaces(control).unwrap();
        networks.push(outer["net"]);
        let mut devices = 0;
        for pid in inside {
            let jail = Jail::of(pid).unwrap();
            if !["block", "net"].contains(&jail.name.as_str()) {
                continue;
            }
            devices += 1;
            let inner = procfs::namespaces(pid).unwrap();
            for kind in NAMESPACES {
                assert_ne!(inner[kind], outer[kind], "{}: {kind}", jail.name);
            }
            assert!(jail.root.is_empty() && jail.read_only_root, "{}", jail.name);
            assert!(
                jail.threads.iter().all(|(_, mode)| *mode == 2),
                "{}",
                jail.name
            );
        }
        assert_eq!(devices, 2);
    }
    assert_ne!(networks[0], networks[1]);
    a.end(first);
    b.end(second);
}

/// How many hierarchies put a process into a group of ours: two of version 1, or one of version 2.
fn limit_groups(groups: &str) -> usize {
    let version_1 = groups
        .lines()
        .filter(|l| l.contains(":memory:") || l.contains(":cpuset:"));
    match version_1.count() {
        0 => 1,
        count => count,
    }
}
