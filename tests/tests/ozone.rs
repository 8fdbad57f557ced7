//! # Whole VMs in outer jails
//!
//! **Job.** What `ozone` promises, on real VMs with a disk and a network card: tenants with users, networks and limits of
//! their own, who cannot reach each other; inside, every device process still in a full jail of its own; nothing left behind.
//! **Who is not trusted.** The VMMs and their devices: [`tenant-probe`] stands for one that was taken over.
//! **Why this way.** `ozone`'s own tests use a stand-in; this is the product as a host launches it. What a test must change
//! for the whole machine (cgroup hierarchies, sysctls) it changes in a nested one.
//!
//! [`tenant-probe`]: ../src/bin/tenant-probe.rs
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::host::{require_kvm, require_root};
use tests::jail::{Jail, NAMESPACES};
use tests::lab::{Flavour, Guest, Nested, Script, in_a_nested_machine};
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::Qmp;
use tests::test_path;
use tests::vm::{Vm, VmBuilder, binary};
use tests::wait::{Deadline, Watched};

/// Two emulations deep, two boots at once take half a minute; this is for a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(180);
/// What a tenant's guest and processes may take together.
const MEMORY: u64 = 512 << 20;

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

/// A tenant: a user, a network namespace with a tap, a disk, a VM.
struct Tenant {
    name: String,
    uid: u32,
    network: String,
    /// An address that only the tenant's network has.
    own_address: String,
    /// Processors and memory node.
    cpus: &'static str,
    node: &'static str,
    dir: tempfile::TempDir,
}

impl Tenant {
    fn new(letter: char, uid: u32, cpus: &'static str, node: &'static str) -> Self {
        let name = format!("tenant-{letter}-{}", std::process::id());
        let network = format!("ozone-{letter}-{}", std::process::id());
        ip(&format!("netns add {network}"));
        let tenant = Self {
            name,
            uid,
            network,
            own_address: format!("10.77.{}.1", uid % 200),
            cpus,
            node,
            dir: tempfile::tempdir().unwrap(),
        };
        let inside = format!("-n {}", tenant.network);
        ip(&format!("{inside} tuntap add dev tap0 mode tap user {uid}"));
        ip(&format!("{inside} addr add 10.0.2.1/24 dev tap0"));
        ip(&format!("{inside} link set tap0 up"));
        ip(&format!("{inside} link set lo up"));
        ip(&format!(
            "{inside} addr add {}/32 dev lo",
            tenant.own_address
        ));
        let disk = tenant.disk();
        fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
        // The disk is the tenant's, so that any file system will do.
        chown(&disk, Some(uid), Some(uid)).unwrap();
        tenant
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    fn folder(&self) -> PathBuf {
        Path::new("/srv/zozne/stratovirt").join(&self.name)
    }

    fn network_file(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.network)
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

    /// The limits of all tenants here, if the host has cgroups.
    fn limits(&self) -> Vec<String> {
        let cpus = format!("cpuset.cpus={}", self.cpus);
        let memory = format!("memory.limit_in_bytes={MEMORY}");
        ["-numa", self.node, "-cgroup", &cpus, &memory]
            .map(str::to_owned)
            .to_vec()
    }

    /// Everything up to the kernel.
    fn builder(&self, sources: &[&Path]) -> VmBuilder {
        Vm::builder()
            .program(binary("ozone").unwrap())
            .args(self.own_words())
            .arg("-netns")
            .arg(self.network_file())
            .args(if has_cgroups() {
                self.limits()
            } else {
                Vec::new()
            })
            .arg("-source")
            .args(sources)
            .arg(self.disk())
            .args(["--", "-qmp", "unix:./qmp.sock,server,nowait"])
    }

    fn devices(builder: VmBuilder) -> VmBuilder {
        builder
            .disk("d0", Path::new("./disk.img"), "")
            .tap("n0", "tap0", "52:54:00:00:00:11")
    }

    /// A bare guest, which runs on any `/dev/kvm`; every layer of every device's jail is wanted.
    fn start_bare(&self) -> Vm {
        let mut vm = self.start_bare_with(&["-sandbox", "strict"]);
        vm.wait_for("NET-TX OK", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        vm
    }

    fn start_bare_with(&self, words: &[&str]) -> Vm {
        let kernel = Payload::NetTx.path();
        let builder = self
            .builder(&[&kernel])
            .args(words)
            .args(["-m", "128"])
            .kernel(&inside(&kernel), "end=halt");
        Self::devices(builder).start().unwrap()
    }

    /// Debian's kernel, which writes its disk, reads it back, and talks to the tenant's network, and then stays.
    fn start_linux(&self, guest: &Guest, initrd: &Path) -> Vm {
        for file in [initrd, &guest.kernel.elf] {
            fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
        }
        let builder = self
            .builder(&[&guest.kernel.elf, initrd])
            .args(["-machine", "microvm", "-m", "256"])
            .kernel(
                &inside(&guest.kernel.elf),
                "console=ttyS0 quiet panic=-1 reboot=k",
            )
            .arg("-initrd")
            .arg(inside(initrd));
        Self::devices(builder).start().unwrap()
    }

    fn control(&self, vm: &mut Vm) -> i32 {
        vm.process("stratovirt").unwrap().unwrap()
    }

    fn qmp(&self, vm: &Vm) -> Qmp {
        let watched = Watched::new(vm.pid()).unwrap();
        Qmp::connect(&self.folder().join("qmp.sock"), &watched, LIMIT).unwrap()
    }

    fn clean(&self) {
        let cleaned = Command::new(binary("ozone").unwrap())
            .args(self.own_words())
            .arg("-clean-resource")
            .output()
            .unwrap();
        assert!(
            cleaned.status.success(),
            "{}",
            String::from_utf8_lossy(&cleaned.stderr)
        );
    }

    /// Ends the VM as an operator does, cleans up, twice, and looks for traces.
    fn end(&self, mut vm: Vm) {
        let mut pids = vm.processes().unwrap();
        pids.push(vm.pid());
        self.qmp(&vm)
            .execute("quit", serde_json::json!({}))
            .unwrap();
        let status = vm.wait(LIMIT).unwrap();
        assert!(status.success(), "{status}: {}", vm.messages());
        // The broker had the time to clean up behind the VM.
        assert!(!self.folder().join("qmp.sock").exists());
        assert_eq!(
            vm.survivors(Deadline::after(Duration::from_secs(1))),
            [0i32; 0]
        );
        self.clean();
        self.leaves_no_trace();
        self.clean();
    }

    /// No folder, cgroup, mount, socket, nor reference to the network namespace.
    fn leaves_no_trace(&self) {
        assert!(!self.folder().exists());
        for group in groups(&self.name).values() {
            assert!(!group.exists(), "{} is left", group.display());
        }
        for file in ["/proc/self/mountinfo", "/proc/net/unix"] {
            let text = fs::read_to_string(file).unwrap();
            assert!(!text.contains(&self.name), "{file}: {text}");
        }
        let network = fs::metadata(self.network_file()).unwrap().ino();
        let link = format!("net:[{network}]");
        let entries = |path: String| fs::read_dir(path).into_iter().flatten().flatten();
        for process in entries("/proc".to_owned()) {
            let process = process.path();
            let own = fs::read_link(process.join("ns/net"));
            assert!(
                own.is_err() || own.unwrap() != Path::new(&link),
                "{} is in it",
                process.display()
            );
            for fd in entries(process.join("fd").display().to_string()) {
                let target = fs::read_link(fd.path());
                assert!(
                    target.is_err() || target.unwrap() != Path::new(&link),
                    "{}",
                    fd.path().display()
                );
            }
        }
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

/// The path of a source in the jail.
fn inside(file: &Path) -> PathBuf {
    Path::new(".").join(file.file_name().unwrap())
}

/// Mounted cgroup hierarchies that have one of the controllers which `ozone` uses: controller to mount point and version.
fn hierarchies() -> BTreeMap<&'static str, (PathBuf, u8)> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let (left, right) = line.split_once(" - ").unwrap();
        let mount = PathBuf::from(left.split(' ').nth(4).unwrap());
        let (version, has) = match right.split(' ').next().unwrap() {
            "cgroup" => (1, right.split(' ').nth(2).unwrap().replace(',', " ")),
            "cgroup2" => (
                2,
                fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default(),
            ),
            _ => continue,
        };
        for controller in ["cpuset", "memory"] {
            if has.split_whitespace().any(|h| h == controller) {
                found.insert(controller, (mount.clone(), version));
            }
        }
    }
    found
}

fn has_cgroups() -> bool {
    let all = hierarchies();
    if all.len() < 2 {
        println!("limits: not run: no cgroup hierarchies with cpuset and memory are mounted");
    }
    all.len() == 2
}

/// The groups of a jail.
fn groups(name: &str) -> BTreeMap<&'static str, PathBuf> {
    let all = hierarchies().into_iter();
    all.map(|(controller, (mount, _))| (controller, mount.join("zozne/stratovirt").join(name)))
        .collect()
}

/// All processes of a VM but the one outside of the jail: the first process, the control process, its broker, two devices.
fn jailed(vm: &mut Vm) -> Vec<i32> {
    let outside = vm.pid();
    let pids: Vec<i32> = vm
        .processes()
        .unwrap()
        .into_iter()
        .filter(|pid| *pid != outside)
        .collect();
    assert_eq!(pids.len(), 5, "{pids:?}");
    pids
}

/// Every process is the tenant's, without rights; every device is in a jail of its own within.
fn check_jails(tenant: &Tenant, vm: &mut Vm) {
    let outer = procfs::namespaces(tenant.control(vm)).unwrap();
    let mut devices = 0;
    for pid in jailed(vm) {
        let jail = Jail::of(pid).unwrap();
        assert_eq!(jail.uid, tenant.uid, "{}", jail.name);
        assert_eq!(jail.capabilities, [0; 5], "{}", jail.name);
        assert!(jail.no_new_privs, "{}", jail.name);
        assert!(
            jail.threads.iter().all(|(_, mode)| *mode == 2),
            "{}: {:?}",
            jail.name,
            jail.threads
        );
        let own = procfs::namespaces(pid).unwrap();
        let device = ["block", "net"].contains(&jail.name.as_str());
        for kind in NAMESPACES {
            if device {
                assert_ne!(own[kind], outer[kind], "{}: {kind}", jail.name);
            } else {
                assert_eq!(own[kind], outer[kind], "{}: {kind}", jail.name);
            }
        }
        if device {
            devices += 1;
            assert!(jail.root.is_empty() && jail.read_only_root, "{}", jail.name);
        }
    }
    assert_eq!(devices, 2);
    // The process outside has nothing to do with it all.
    let parent = Jail::of(vm.pid()).unwrap();
    assert_eq!((parent.capabilities, parent.no_new_privs), ([0; 5], true));
    assert!(
        parent.threads.iter().all(|(_, mode)| *mode == 2),
        "{:?}",
        parent.threads
    );
}

/// The limits, as the kernel tells them: of the groups, and of each process.
fn check_limits(tenant: &Tenant, vm: &mut Vm) {
    let all = hierarchies();
    let groups = groups(&tenant.name);
    let read = |controller: &str, file: &str| {
        let path = groups[controller].join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim().to_owned()
    };
    assert_eq!(read("cpuset", "cpuset.cpus"), tenant.cpus);
    assert_eq!(read("cpuset", "cpuset.mems"), tenant.node);
    let (limit, used) = match all["memory"].1 {
        1 => ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        _ => ("memory.max", "memory.current"),
    };
    assert_eq!(read("memory", limit), MEMORY.to_string());
    let used: u64 = read("memory", used).parse().unwrap();
    assert!((1..=MEMORY).contains(&used), "{used} bytes of memory");
    let members = read("memory", "cgroup.procs");
    // KVM puts a thread of the kernel's there, which has no program.
    let is_process = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    let mut members: Vec<i32> = members
        .lines()
        .map(|l| l.parse().unwrap())
        .filter(is_process)
        .collect();
    members.sort_unstable();
    let mut pids = jailed(vm);
    pids.sort_unstable();
    assert_eq!(members, pids);
    for pid in pids {
        for thread in procfs::Status::of_threads(pid).unwrap().values() {
            assert_eq!(
                thread.field("Cpus_allowed_list"),
                tenant.cpus,
                "{}",
                thread.name()
            );
            assert_eq!(
                thread.field("Mems_allowed_list"),
                tenant.node,
                "{}",
                thread.name()
            );
        }
    }
}

/// What a process of `from`'s jail meets when it tries `attempts`.
fn try_from(from: &Tenant, vm: &mut Vm, attempts: &[String]) -> BTreeMap<String, String> {
    let uid = from.uid.to_string();
    let output = Command::new(binary("tenant-probe").unwrap())
        .args([&from.control(vm).to_string(), &uid, &uid])
        .args(attempts)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let map: BTreeMap<_, _> = told
        .lines()
        .filter_map(|l| l.split_once(" = "))
        .map(|(a, o)| (a.to_owned(), o.to_owned()))
        .collect();
    assert_eq!(map.len(), attempts.len(), "{told}");
    map
}

/// From inside `here`, everything of `there` is out of sight and reach; the same attempts on its own things succeed.
fn check_reach(here: &Tenant, vm_here: &mut Vm, there: &Tenant, vm_there: &mut Vm) {
    let key = 0x5a00_0000 + i32::try_from(there.uid).unwrap();
    // Servers in the other's network namespace. A thread's own namespace ends with the thread; the sockets stay in it.
    let network = fs::File::open(there.network_file()).unwrap();
    let name = format!("tenants-{}", there.name);
    let address = there.own_address.clone();
    let abstract_name = name.clone();
    let (tcp, _abstract_server) = std::thread::spawn(move || {
        setns(network, CloneFlags::CLONE_NEWNET).unwrap();
        let tcp = TcpListener::bind((address.as_str(), 0)).unwrap();
        let name = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        (tcp, UnixListener::bind_addr(&name).unwrap())
    })
    .join()
    .unwrap();

    let reachable = [
        format!("tcp:{}", tcp.local_addr().unwrap()),
        format!("abstract:{name}"),
        format!("shm:{key}"),
    ];
    let made = try_from(there, vm_there, &[format!("make-shm:{key}")]);
    assert_eq!(made[&format!("make-shm:{key}")], "ok");
    let mut own = reachable.to_vec();
    own.extend(["processes", "open:/disk.img", "signal:2", "pidfd:2"].map(str::to_owned));
    let control = try_from(there, vm_there, &own);
    for (attempt, outcome) in &control {
        let wanted = match attempt.as_str() {
            // What it may not trace it does not see.
            "processes" => there.uid.to_string(),
            _ => "ok".to_owned(),
        };
        assert_eq!(*outcome, wanted, "{attempt} at home");
    }

    let mut attempts = vec!["processes".to_owned()];
    let mut wanted = vec![here.uid.to_string()];
    for pid in vm_there
        .processes()
        .unwrap()
        .into_iter()
        .chain([vm_there.pid()])
    {
        for what in ["signal", "pidfd", "ptrace", "memory"] {
            attempts.push(format!("{what}:{pid}"));
            wanted.push("ESRCH".to_owned());
        }
        attempts.push(format!("open:/proc/{pid}/status"));
        wanted.push("ENOENT".to_owned());
    }
    let folder = there.folder();
    for path in [
        folder.clone(),
        folder.join("qmp.sock"),
        folder.join("disk.img"),
        there.disk(),
        there.network_file(),
        PathBuf::from("/srv"),
        PathBuf::from("/sys/fs/cgroup"),
        PathBuf::from("/proc/net/unix"),
    ] {
        attempts.push(format!("open:{}", path.display()));
        wanted.push("ENOENT".to_owned());
    }
    attempts.push(format!("connect:{}", folder.join("qmp.sock").display()));
    wanted.push("ENOENT".to_owned());
    attempts.extend(reachable);
    wanted.extend(["ENETUNREACH", "ECONNREFUSED", "ENOENT"].map(str::to_owned));
    let met = try_from(here, vm_here, &attempts);
    for (attempt, wanted) in attempts.iter().zip(&wanted) {
        assert_eq!(
            met[attempt], *wanted,
            "{attempt} from {} at {}",
            here.name, there.name
        );
    }
}

fn check_pair(a: &Tenant, first: &mut Vm, b: &Tenant, second: &mut Vm) {
    for (tenant, vm) in [(a, &mut *first), (b, &mut *second)] {
        check_jails(tenant, vm);
        if has_cgroups() {
            check_limits(tenant, vm);
        }
    }
    let (outer_a, outer_b) = (a.control(first), b.control(second));
    let (outer_a, outer_b) = (
        procfs::namespaces(outer_a).unwrap(),
        procfs::namespaces(outer_b).unwrap(),
    );
    for kind in NAMESPACES.into_iter().filter(|k| *k != "user") {
        assert_ne!(outer_a[kind], outer_b[kind], "{kind}");
    }
    for tenant in [a, b] {
        let network = fs::metadata(tenant.network_file()).unwrap().ino();
        let own = if tenant.uid == a.uid {
            outer_a["net"]
        } else {
            outer_b["net"]
        };
        assert_eq!(own, network);
    }
    check_reach(a, first, b, second);
    check_reach(b, second, a, first);
}

#[test]
fn two_tenants_are_apart_and_their_devices_are_jailed() {
    require_kvm();
    require_root();
    let (a, b) = (
        Tenant::new('a', 64_301, "0", "0"),
        Tenant::new('b', 64_302, "0", "0"),
    );
    let (mut first, mut second) = (a.start_bare(), b.start_bare());
    check_pair(&a, &mut first, &b, &mut second);
    a.end(first);
    b.end(second);
}

/// Mounts the hierarchies of one version of cgroups, in a nested machine, which has none by itself.
fn mount_cgroups(version: u8) {
    let base = Path::new("/sys/fs/cgroup");
    let none = None::<&str>;
    if version == 2 {
        mount(none, base, Some("cgroup2"), MsFlags::empty(), none).unwrap();
        return;
    }
    mount(none, base, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    for controller in ["cpuset", "memory", "pids"] {
        let place = base.join(controller);
        fs::create_dir(&place).unwrap();
        mount(
            none,
            &place,
            Some("cgroup"),
            MsFlags::empty(),
            Some(controller),
        )
        .unwrap();
    }
}

fn machine() -> Nested {
    Nested {
        // A tenant for each.
        processors: 2,
        nodes: 2,
        limit: Some(Duration::from_secs(480)),
        ..Nested::default()
    }
}

fn two_linux_tenants(version: u8) {
    mount_cgroups(version);
    let found: Vec<u8> = hierarchies()
        .into_values()
        .map(|(_, version)| version)
        .collect();
    assert_eq!(found, [version; 2]);
    let before = programs();
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let script = Script::new(
        "set -e
         dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
         dd if=/tmp/data of=/dev/vda bs=64k oflag=direct 2>/dev/null
         echo 3 > /proc/sys/vm/drop_caches
         cmp -n 1048576 /tmp/data /dev/vda && echo DISK-OK
         ifconfig eth0 10.0.2.2 netmask 255.255.255.0 up
         ping -c 3 -W 20 10.0.2.1 && echo NET-OK
         echo TENANT-STAYS
         exec sleep 100000
",
    );
    let initrd = guest.initrd_with(&script).unwrap();
    // One processor and one memory node each.
    let (a, b) = (
        Tenant::new('a', 64_301, "0", "0"),
        Tenant::new('b', 64_302, "1", "1"),
    );
    let mut first = a.start_linux(&guest, initrd.path());
    let mut second = b.start_linux(&guest, initrd.path());
    for vm in [&mut first, &mut second] {
        for text in ["DISK-OK", "NET-OK", "TENANT-STAYS"] {
            vm.wait_for(text, LIMIT).unwrap_or_else(|e| panic!("{e}"));
        }
    }
    check_pair(&a, &mut first, &b, &mut second);
    for (tenant, vm) in [(&a, &mut first), (&b, &mut second)] {
        check_nodes(tenant, tenant.control(vm));
    }
    a.end(first);
    b.end(second);
    assert_eq!(programs(), before);
    for (mount, _) in hierarchies().into_values() {
        assert!(!mount.join("zozne").exists());
    }
}

/// The programs that have jails.
fn programs() -> Vec<std::ffi::OsString> {
    let entries = fs::read_dir("/srv/zozne").into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|e| e.file_name()).collect();
    names.sort();
    names
}

/// Guest RAM is on the node that was asked for (proc(5), numa_maps: `N0=pages`).
fn check_nodes(tenant: &Tenant, pid: i32) {
    let maps = fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
    let mut pages: BTreeMap<String, u64> = BTreeMap::new();
    for line in maps.lines().filter(|l| l.contains("memfd")) {
        for word in line.split_whitespace() {
            if let Some((node, count)) = word.strip_prefix('N').and_then(|w| w.split_once('='))
                && let Ok(count) = count.parse::<u64>()
            {
                *pages.entry(node.to_owned()).or_default() += count;
            }
        }
    }
    let used: Vec<_> = pages.keys().map(String::as_str).collect();
    assert_eq!(used, [tenant.node], "{maps}");
    // A Linux guest that has booted has touched more than 16 MiB.
    assert!(pages[tenant.node] > 4096, "{pages:?}");
}

#[test]
fn two_linux_tenants_are_apart_under_cgroup_version_1() {
    in_a_nested_machine(&machine(), test_path!(), || two_linux_tenants(1));
}

#[test]
fn two_linux_tenants_are_apart_under_cgroup_version_2() {
    in_a_nested_machine(&machine(), test_path!(), || two_linux_tenants(2));
}

#[test]
fn nothing_stands_in_the_way_after_everything_was_killed() {
    require_kvm();
    require_root();
    let tenant = Tenant::new('k', 64_303, "0", "0");
    let mut vm = tenant.start_bare();
    let mut pids = vm.processes().unwrap();
    // Children first, so that nobody has the time to clean up.
    pids.reverse();
    pids.push(vm.pid());
    for pid in pids {
        let pid = nix::unistd::Pid::from_raw(pid);
        let killed = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        assert!(
            matches!(killed, Ok(()) | Err(nix::errno::Errno::ESRCH)),
            "{killed:?}"
        );
    }
    assert_eq!(
        vm.survivors(Deadline::after(Duration::from_secs(5))),
        [0i32; 0]
    );
    drop(vm);
    assert!(tenant.folder().exists());
    tenant.clean();
    tenant.leaves_no_trace();
    tenant.clean();
    // The name is free again.
    let vm = tenant.start_bare();
    tenant.end(vm);
}

/// A host that keeps user namespaces from ordinary users, in either of the two ways that Debian's kernel knows: the VM's own user
/// cannot make namespaces then, and says so.
#[test]
fn without_user_namespaces_the_other_layers_stay_and_strict_refuses() {
    in_a_nested_machine(&machine(), test_path!(), || {
        for (file, normal) in [
            ("user/max_user_namespaces", "10000"),
            ("kernel/unprivileged_userns_clone", "1"),
        ] {
            let file = Path::new("/proc/sys").join(file);
            fs::write(&file, "0").unwrap();
            without_user_namespaces();
            fs::write(&file, normal).unwrap();
        }
    });
}

fn without_user_namespaces() {
    let tenant = Tenant::new('u', 64_304, "0", "0");
    let mut vm = tenant.start_bare_with(&[]);
    vm.wait_for("NET-TX OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let told = vm.messages();
    for layer in [
        "user namespace",
        "pid namespace",
        "mount namespace",
        "network namespace",
        "empty root",
    ] {
        for device in ["dev-d0", "dev-n0"] {
            let named = |l: &str| l.contains(device) && l.contains(&format!("{layer}: missing"));
            assert!(told.lines().any(named), "{device}: {layer}: {told}");
        }
    }
    let mut devices = 0;
    for pid in jailed(&mut vm) {
        let jail = Jail::of(pid).unwrap();
        // The outer jail, and all that a process can do for itself.
        assert_eq!(jail.uid, tenant.uid, "{}", jail.name);
        assert_eq!(jail.capabilities, [0; 5], "{}", jail.name);
        assert!(jail.no_new_privs, "{}", jail.name);
        assert!(
            jail.threads.iter().all(|(_, mode)| *mode == 2),
            "{}: {:?}",
            jail.name,
            jail.threads
        );
        for kind in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            assert!(jail.own_namespaces.contains(&kind), "{}: {kind}", jail.name);
        }
        devices += usize::from(["block", "net"].contains(&jail.name.as_str()));
    }
    assert_eq!(devices, 2);
    tenant.end(vm);

    let mut vm = tenant.start_bare_with(&["-sandbox", "strict"]);
    let status = vm.wait(LIMIT).unwrap();
    assert_eq!(status.code(), Some(1), "{}", vm.messages());
    let told = vm.messages();
    assert!(
        told.contains("strict") && told.contains("user namespace: missing"),
        "{told}"
    );
    tenant.clean();
    tenant.leaves_no_trace();
}
