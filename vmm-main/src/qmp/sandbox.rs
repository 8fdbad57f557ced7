//! `query-sandbox`: the broker's facts as JSON.
//!
//! **Job.** Give [`SandboxReport`] its form on the wire, and say of each process which layers it lacks.
//! **Who is not trusted.** The processes that it is about; the facts are the broker's. (A control process that somebody has
//! taken over can tell a client what it likes. Whoever must not depend on that reads `/proc` from outside, where the same is
//! to be seen.)
//! **Why this way.** What is missing is computed from what was read, not from what a process reported about itself.

use ipc::control::sandbox::{CAPABILITY_SETS, Fact, NAMESPACES, ProcessFacts, Role, ThreadFacts};
use ipc::spec::DeviceSpec;
use ipc::start::{SandboxMode, SeccompMode};
use serde_json::{Map, Value, json};

/// Landlock's versions from which on TCP, and signals and abstract sockets, are covered.
const LANDLOCK_TCP: u32 = 4;
const LANDLOCK_SCOPES: u32 = 6;

/// What `query-sandbox` answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxReport {
    /// `-seccomp`, `-disable-seccomp`
    pub seccomp: SeccompMode,
    /// `-sandbox`
    pub sandbox: SandboxMode,
    /// The devices, by their index in the broker's policy.
    pub devices: Vec<SandboxDevice>,
    /// Landlock's version in the running kernel; 0 without Landlock.
    pub landlock_abi: u32,
    /// The control process first, then the broker.
    pub processes: Vec<ProcessFacts>,
}

/// A device, as far as its jail depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxDevice {
    /// Its id.
    pub id: String,
    /// The shared folder that is its root.
    pub tree: Option<SandboxTree>,
}

/// A shared folder as the root of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxTree {
    /// Whether nothing in it may change.
    pub readonly: bool,
    /// The capabilities that serving it takes, one bit each.
    pub capabilities: u64,
}

impl From<&DeviceSpec> for SandboxDevice {
    fn from(spec: &DeviceSpec) -> Self {
        Self {
            id: spec.id().to_owned(),
            tree: match spec {
                DeviceSpec::Fs(fs) => Some(SandboxTree {
                    readonly: fs.readonly,
                    capabilities: fs.capabilities(),
                }),
                _ => None,
            },
        }
    }
}

/// On the wire.
pub(super) fn shape(report: &SandboxReport) -> Value {
    let control = report
        .processes
        .iter()
        .find(|facts| facts.role == Role::Control);
    let hosts = control.and_then(|facts| facts.namespaces.as_ref().ok());
    let pids: Vec<i32> = report.processes.iter().map(|facts| facts.pid).collect();
    let processes: Vec<Value> = report
        .processes
        .iter()
        .map(|facts| process(facts, report, hosts))
        .collect();
    json!({
        "pids": pids,
        "seccomp": match report.seccomp {
            SeccompMode::Kill => "kill",
            SeccompMode::Log => "log",
            SeccompMode::Trap => "trap",
            SeccompMode::Disabled => "disabled",
        },
        "sandbox": match report.sandbox {
            SandboxMode::BestEffort => "best-effort",
            SandboxMode::Strict => "strict",
        },
        "landlock": {
            "abi": report.landlock_abi,
            // No kernel shows which process has a domain.
            "readable": false,
        },
        "processes": processes,
    })
}

fn process(facts: &ProcessFacts, report: &SandboxReport, hosts: Option<&[u64; 7]>) -> Value {
    let mut map = Map::new();
    let mut unreadable = Map::new();
    let (role, id) = match facts.role {
        Role::Control => ("control", None),
        Role::Broker => ("broker", None),
        Role::Device(index) => ("device", report.devices.get(index as usize)),
        Role::Keeper(index) => ("keeper", report.devices.get(index as usize)),
    };
    map.insert("role".into(), role.into());
    if let Some(id) = id {
        map.insert("id".into(), id.id.as_str().into());
    }
    map.insert("pid".into(), facts.pid.into());
    let mut put = |name: &str, fact: Fact<Value>| match fact {
        Ok(value) => {
            map.insert(name.into(), value);
        }
        Err(why) => {
            map.insert(name.into(), Value::Null);
            unreadable.insert(name.into(), why.into());
        }
    };
    put("name", facts.name.clone().map(Value::from));
    put("uids", value(&facts.uids, |ids| json!(ids)));
    put("gids", value(&facts.gids, |ids| json!(ids)));
    put("groups", value(&facts.groups, |ids| json!(ids)));
    put("uid-map", value(&facts.uid_map, |lines| json!(lines)));
    put("gid-map", value(&facts.gid_map, |lines| json!(lines)));
    put("dumpable", value(&facts.dumpable, |on| json!(on)));
    put(
        "threads",
        value(&facts.threads, |threads| {
            threads.iter().map(thread).collect()
        }),
    );
    put(
        "namespaces",
        value(&facts.namespaces, |inodes| {
            namespaces(inodes, hosts.filter(|_| facts.role != Role::Control))
        }),
    );
    put(
        "root",
        value(&facts.root, |root| {
            json!({
                "file-system": root.file_system,
                "read-only": root.options.iter().any(|option| option == "ro"),
                "options": root.options,
                "mounts": root.mounts,
                "entries": root.entries,
            })
        }),
    );
    put(
        "limits",
        value(&facts.limits, |limits| {
            let one = |limit: &ipc::control::sandbox::Limit| {
                (
                    limit.name.clone(),
                    json!({ "soft": limit.soft, "hard": limit.hard }),
                )
            };
            limits.iter().map(one).collect::<Map<_, _>>().into()
        }),
    );
    put(
        "fds",
        value(&facts.fds, |fds| fds.iter().map(descriptor).collect()),
    );
    put(
        "memory",
        value(&facts.memory, |memory| {
            json!({
                "mappings": memory.mappings,
                "executable": memory.executable,
                "writable-executable": memory.writable_executable,
                "memfds": memory.memfds,
                "foreign-files": memory.foreign,
            })
        }),
    );
    map.insert(
        "missing-layers".into(),
        json!(missing(facts, report, hosts)),
    );
    map.insert("unreadable".into(), unreadable.into());
    map.into()
}

fn value<T>(fact: &Fact<T>, shape: impl FnOnce(&T) -> Value) -> Fact<Value> {
    match fact {
        Ok(value) => Ok(shape(value)),
        Err(why) => Err(why.clone()),
    }
}

fn thread(thread: &ThreadFacts) -> Value {
    let capabilities: Map<String, Value> = CAPABILITY_SETS
        .iter()
        .zip(thread.capabilities)
        // As in /proc: QMP numbers are not safe beyond 53 bits.
        .map(|(name, set)| ((*name).to_owned(), format!("{set:016x}").into()))
        .collect();
    json!({
        "tid": thread.tid,
        "name": thread.name,
        "seccomp": match thread.seccomp {
            0 => "none",
            1 => "strict",
            _ => "filter",
        },
        "filters": thread.filters,
        "no-new-privs": thread.no_new_privs,
        "capabilities": capabilities,
    })
}

/// `hosts`: to tell own ones from the control process's.
fn namespaces(inodes: &[u64; 7], hosts: Option<&[u64; 7]>) -> Value {
    let one = |at: usize| {
        let mut map = Map::from_iter([("inode".to_owned(), json!(inodes[at]))]);
        if let Some(hosts) = hosts {
            map.insert("own".into(), (inodes[at] != hosts[at]).into());
        }
        Value::from(map)
    };
    (0..inodes.len())
        .map(|at| (NAMESPACES[at].to_owned(), one(at)))
        .collect::<Map<_, _>>()
        .into()
}

fn descriptor(fd: &ipc::control::sandbox::FdFacts) -> Value {
    let access = fd.access.map(|access| match access {
        (true, true) => "read-write",
        (true, false) => "read",
        (false, true) => "write",
        (false, false) => "none",
    });
    json!({
        "fd": fd.fd,
        "kind": fd.kind,
        "access": access,
        "kind-at-lock-down": fd.since_lock_down,
    })
}

/// Layers that a process should have and has not.
#[derive(Default)]
struct Missing(Vec<&'static str>);

impl Missing {
    fn need(&mut self, layer: &'static str, there: bool) {
        if !there {
            self.0.push(layer);
        }
    }

    /// What every process has.
    fn of_all(&mut self, facts: &ProcessFacts) {
        let threads = facts.threads.as_deref().unwrap_or_default();
        self.need("seccomp", threads.iter().all(|thread| thread.seccomp == 2));
        self.need(
            "no-new-privs",
            threads.iter().all(|thread| thread.no_new_privs),
        );
        self.need("not-dumpable", facts.dumpable != Ok(true));
        let memory = facts.memory.as_ref().ok();
        self.need(
            "no-writable-code",
            memory.is_none_or(|memory| memory.writable_executable == 0),
        );
        self.need(
            "no-foreign-files",
            memory.is_none_or(|memory| memory.foreign.is_empty()),
        );
    }

    /// What the control process and devices have: nothing but `allowed` in their sets, and Landlock.
    fn of_locked(&mut self, facts: &ProcessFacts, allowed: u64, landlock_abi: u32) {
        let threads = facts.threads.as_deref().unwrap_or_default();
        self.need(
            "no-capabilities",
            threads.iter().all(|thread| {
                let [inheritable, permitted, effective, _, ambient] = thread.capabilities;
                inheritable | ambient | ((permitted | effective) & !allowed) == 0
            }),
        );
        self.need(
            "empty-bounding-set",
            threads
                .iter()
                .all(|thread| thread.capabilities[3] & !allowed == 0),
        );
        self.need("landlock", landlock_abi > 0);
        self.need("landlock-tcp", landlock_abi >= LANDLOCK_TCP);
        self.need("landlock-scopes", landlock_abi >= LANDLOCK_SCOPES);
    }

    /// What only a device's process has: a root, users and namespaces of its own, and limits.
    fn of_device(
        &mut self,
        facts: &ProcessFacts,
        tree: Option<SandboxTree>,
        hosts: Option<&[u64; 7]>,
    ) {
        const OWN: [&str; 7] = [
            "user-namespace",
            "mount-namespace",
            "pid-namespace",
            "network-namespace",
            "ipc-namespace",
            "uts-namespace",
            "cgroup-namespace",
        ];
        if let (Ok(own), Some(hosts)) = (&facts.namespaces, hosts) {
            for ((layer, own), host) in OWN.into_iter().zip(own).zip(hosts) {
                self.need(layer, own != host);
            }
        }
        if let Ok(root) = &facts.root {
            let has = |wanted: &str| root.options.iter().any(|option| option == wanted);
            self.need(
                "restricted-root",
                ["nosuid", "nodev", "noexec"].into_iter().all(has),
            );
            self.need(
                "read-only-root",
                tree.is_some_and(|tree| !tree.readonly) || has("ro"),
            );
            self.need(
                "empty-root",
                tree.is_some()
                    || root.file_system == "tmpfs" && root.mounts == 1 && root.entries == Some(0),
            );
        }
        // One that serves a folder gives its files to any user. Its user namespace is what makes that harmless.
        if let (Ok(uids), Ok(gids), None) = (&facts.uids, &facts.gids, tree) {
            self.need(
                "unprivileged-user",
                !uids.contains(&0) && !gids.contains(&0),
            );
        }
        self.need(
            "no-supplementary-groups",
            facts.groups.as_ref().is_ok_and(Vec::is_empty) || facts.groups.is_err(),
        );
        if let Ok(limits) = &facts.limits {
            let limited = |name: &str| {
                limits
                    .iter()
                    .any(|limit| limit.name == name && limit.hard.is_some())
            };
            self.need("no-core-file", limited("Max core file size"));
            self.need("process-limit", limited("Max processes"));
            self.need("descriptor-limit", limited("Max open files"));
        }
    }
}

/// The layers that this process should have and, by what was read, has not. A fact that could not be read is in
/// `unreadable` and not here.
fn missing(
    facts: &ProcessFacts,
    report: &SandboxReport,
    hosts: Option<&[u64; 7]>,
) -> Vec<&'static str> {
    let mut missing = Missing::default();
    missing.of_all(facts);
    let tree = match facts.role {
        // It opens files and starts processes: Landlock and empty sets are not for it.
        Role::Broker => return missing.0,
        Role::Device(index) | Role::Keeper(index) => {
            report.devices.get(index as usize).and_then(|d| d.tree)
        }
        _ => None,
    };
    let allowed = tree.map_or(0, |tree| tree.capabilities);
    missing.of_locked(facts, allowed, report.landlock_abi);
    if facts.role != Role::Control {
        missing.of_device(facts, tree, hosts);
    }
    missing.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::control::sandbox::{Limit, MemoryFacts, RootFacts};

    fn facts(role: Role) -> ProcessFacts {
        ProcessFacts {
            role,
            pid: 7,
            name: Ok("block".into()),
            uids: Ok([65534; 4]),
            gids: Ok([65534; 4]),
            groups: Ok(Vec::new()),
            uid_map: Ok(vec![[1000, 65534, 1]]),
            gid_map: Ok(vec![[1000, 65534, 1]]),
            dumpable: Ok(false),
            threads: Ok(vec![ThreadFacts {
                tid: 7,
                name: "block".into(),
                seccomp: 2,
                filters: Some(2),
                capabilities: [0; 5],
                no_new_privs: true,
            }]),
            namespaces: Ok(match role {
                Role::Device(_) => [1, 2, 3, 4, 5, 6, 7],
                _ => [11, 12, 13, 14, 15, 16, 17],
            }),
            root: Ok(RootFacts {
                file_system: "tmpfs".into(),
                options: ["ro", "nosuid", "nodev", "noexec"].map(Into::into).into(),
                mounts: 1,
                entries: Some(0),
            }),
            limits: Ok(["Max core file size", "Max processes", "Max open files"]
                .map(|name| Limit {
                    name: name.into(),
                    soft: Some(0),
                    hard: Some(0),
                })
                .into()),
            fds: Err("fd: Permission denied".into()),
            memory: Ok(MemoryFacts::default()),
        }
    }

    fn report(device: ProcessFacts) -> SandboxReport {
        SandboxReport {
            seccomp: SeccompMode::Kill,
            sandbox: SandboxMode::Strict,
            devices: vec![SandboxDevice {
                id: "b0".into(),
                tree: None,
            }],
            landlock_abi: 7,
            processes: vec![facts(Role::Control), facts(Role::Broker), device],
        }
    }

    fn missing_of(change: impl FnOnce(&mut ProcessFacts)) -> Value {
        let mut device = facts(Role::Device(0));
        change(&mut device);
        shape(&report(device))["processes"][2]["missing-layers"].take()
    }

    #[test]
    fn a_whole_jail_lacks_nothing_and_says_what_it_could_not_read() {
        let reply = shape(&report(facts(Role::Device(0))));
        assert_eq!(reply["pids"], json!([7, 7, 7]));
        let device = &reply["processes"][2];
        assert_eq!(
            (&device["role"], &device["id"]),
            (&json!("device"), &json!("b0"))
        );
        assert_eq!(device["missing-layers"], json!([]));
        assert_eq!(device["fds"], Value::Null);
        assert_eq!(device["unreadable"]["fds"], "fd: Permission denied");
        assert_eq!(
            device["namespaces"]["mnt"],
            json!({ "inode": 2, "own": true })
        );
        assert_eq!(
            device["threads"][0]["capabilities"]["bounding"],
            "0000000000000000"
        );
        assert_eq!(reply["processes"][0]["missing-layers"], json!([]));
    }

    #[test]
    fn each_layer_is_missed() {
        let thread = |change: fn(&mut ThreadFacts)| {
            move |facts: &mut ProcessFacts| change(&mut facts.threads.as_mut().unwrap()[0])
        };
        assert_eq!(missing_of(thread(|t| t.seccomp = 0)), json!(["seccomp"]));
        assert_eq!(
            missing_of(thread(|t| t.no_new_privs = false)),
            json!(["no-new-privs"])
        );
        assert_eq!(
            missing_of(thread(|t| t.capabilities[4] = 1)),
            json!(["no-capabilities"])
        );
        assert_eq!(
            missing_of(thread(|t| t.capabilities[3] = 1)),
            json!(["empty-bounding-set"])
        );
        assert_eq!(
            missing_of(|facts| facts.dumpable = Ok(true)),
            json!(["not-dumpable"])
        );
        assert_eq!(
            missing_of(|facts| facts.namespaces.as_mut().unwrap()[3] = 14),
            json!(["network-namespace"])
        );
        assert_eq!(
            missing_of(|facts| drop(facts.root.as_mut().unwrap().options.remove(0))),
            json!(["read-only-root"])
        );
        assert_eq!(
            missing_of(|facts| drop(facts.root.as_mut().unwrap().options.remove(3))),
            json!(["restricted-root"])
        );
        assert_eq!(
            missing_of(|facts| facts.root.as_mut().unwrap().entries = Some(1)),
            json!(["empty-root"])
        );
        assert_eq!(
            missing_of(|facts| facts.uids = Ok([0; 4])),
            json!(["unprivileged-user"])
        );
        assert_eq!(
            missing_of(|facts| facts.groups = Ok(vec![0])),
            json!(["no-supplementary-groups"])
        );
        assert_eq!(
            missing_of(|facts| facts.limits.as_mut().unwrap()[1].hard = None),
            json!(["process-limit"])
        );
        assert_eq!(
            missing_of(|facts| facts.memory.as_mut().unwrap().writable_executable = 1),
            json!(["no-writable-code"])
        );
        assert_eq!(
            missing_of(|facts| facts.memory.as_mut().unwrap().foreign = vec!["libc.so".into()]),
            json!(["no-foreign-files"])
        );
    }

    #[test]
    fn a_shared_folder_takes_its_own_rights_and_no_others() {
        let missing = |readonly, permitted: u64, options: &[&str]| {
            let mut device = facts(Role::Device(0));
            device.uids = Ok([0; 4]);
            let thread = &mut device.threads.as_mut().unwrap()[0];
            thread.capabilities = [0, permitted, permitted, permitted, 0];
            let root = device.root.as_mut().unwrap();
            root.options = options.iter().map(|&option| option.into()).collect();
            root.entries = Some(3);
            let mut report = report(device);
            report.devices[0].tree = Some(SandboxTree {
                readonly,
                capabilities: 0b110,
            });
            shape(&report)["processes"][2]["missing-layers"].take()
        };
        let restricted = ["nosuid", "nodev", "noexec"];
        assert_eq!(missing(false, 0b110, &restricted), json!([]));
        assert_eq!(missing(true, 0b110, &restricted), json!(["read-only-root"]));
        assert_eq!(
            missing(false, 0b111, &restricted),
            json!(["no-capabilities", "empty-bounding-set"])
        );
        assert_eq!(
            missing(false, 0, &restricted[..2]),
            json!(["restricted-root"])
        );
    }

    #[test]
    fn an_old_kernel_is_told() {
        let mut old = report(facts(Role::Device(0)));
        old.landlock_abi = 2;
        assert_eq!(
            shape(&old)["processes"][2]["missing-layers"],
            json!(["landlock-tcp", "landlock-scopes"])
        );
    }
}
