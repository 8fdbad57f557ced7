//! What an outer jail needs, worked out from the arguments alone.
//!
//! Job: read the options and the control program's command line, and list every step in its order.
//! Not trusted: the command line. It decides which device nodes and descriptors the jail gets, so
//! only known words open anything, and what is not understood opens nothing.
//! Why this way: pure, so that what a command line grants is tested without root.

use crate::{
    cli::{Cgroup, Options},
    fault::Fault,
    steps::{devices::Device, place::Access},
};
use std::{
    ffi::{CStr, CString},
    os::{fd::RawFd, unix::ffi::OsStrExt},
    path::PathBuf,
};

/// Device programs, looked for beside the control program and then in [`LIBEXEC`]. All that are
/// there come along: a device can be plugged in later.
const DEVICE_PROGRAMS: [&CStr; 15] = [
    c"block",
    c"block-qcow2",
    c"net",
    c"console",
    c"rng",
    c"balloon",
    c"vsock",
    c"scsi",
    c"input",
    c"gpu",
    c"usb",
    c"sound",
    c"display",
    c"vhost_user_fs",
    c"template",
];

/// The other place, from the control program's folder.
const LIBEXEC: &str = "../libexec/stratovirt";

/// Most descriptors that a command line may name.
const MAX_DESCRIPTORS: usize = 256;

/// One file that is placed in the jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    /// The argument that asks for it, for errors.
    pub(crate) subject: String,
    /// Where it may be; the first that is there is taken.
    pub(crate) candidates: Vec<PathBuf>,
    /// Its name in the jail.
    pub(crate) name: CString,
    /// What the VM's user does with it.
    pub(crate) access: Access,
    /// It may be missing.
    pub(crate) optional: bool,
}

/// A step on the host's side. All that is done is undone when a later step fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostStep {
    /// Open the network namespace.
    OpenNetwork(PathBuf),
    /// Open a file, check it, and make a mount of it.
    Prepare(Item),
    /// Make a tmpfs with these nodes.
    PrepareDevices(Vec<Device>),
    /// Make `/srv/zozne/{program}/{name}`.
    MakeFolder,
    /// Make what is mounted on in it.
    MakeMountPoints,
    /// Make the cgroups.
    MakeCgroups(Cgroup),
}

/// A step inside the new namespaces. The kernel undoes them when the last process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InsideStep {
    /// Move into the cgroups.
    JoinCgroups,
    /// Move into the network namespace.
    EnterNetwork,
    /// An own view of the cgroup tree, from the group downwards.
    OwnCgroupView,
    /// Attach the folder as the root to be.
    AttachRoot,
    /// Attach files and programs.
    AttachFiles,
    /// Attach device nodes.
    AttachDevices,
    /// Attach a `/proc` of the new pid namespace.
    AttachProc,
    /// Give the folder to the VM's user, now that nothing is made or mounted in it any more.
    GiveRoot,
    /// Swap the roots.
    EnterRoot,
    /// A host name that tells nothing.
    HideHostName,
    /// No controlling terminal of the caller, none of its keys.
    LeaveSession,
}

/// A whole jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Name of the control program: part of the folder's path.
    pub(crate) program: CString,
    /// Name of the jail: likewise.
    pub(crate) name: CString,
    /// User and group that the VM runs as.
    pub(crate) user: (u32, u32),
    /// Capabilities that it keeps.
    pub(crate) capabilities: Vec<u8>,
    /// Inherited descriptors that it keeps, above 2, in order.
    pub(crate) descriptors: Vec<RawFd>,
    /// First these.
    pub(crate) host: Vec<HostStep>,
    /// Then these.
    pub(crate) inside: Vec<InsideStep>,
    /// Arguments of the control program, its name first.
    pub(crate) argv: Vec<CString>,
    /// It goes to the background: its first process ends early.
    pub(crate) daemon: bool,
}

/// Works the plan out.
pub(crate) fn plan(options: &Options) -> Result<Plan, Fault> {
    let line = CommandLine::read(&options.arguments);
    let mut host = Vec::new();
    host.extend(options.netns.clone().map(HostStep::OpenNetwork));
    host.extend(items(options, &line)?.into_iter().map(HostStep::Prepare));
    host.push(HostStep::PrepareDevices(line.devices()));
    host.push(HostStep::MakeFolder);
    host.push(HostStep::MakeMountPoints);
    let limited = options.cgroup != Cgroup::default();
    if limited {
        host.push(HostStep::MakeCgroups(options.cgroup.clone()));
    }
    let mut inside = Vec::new();
    if limited {
        inside.push(InsideStep::JoinCgroups);
    }
    if options.netns.is_some() {
        inside.push(InsideStep::EnterNetwork);
    }
    inside.extend([
        InsideStep::OwnCgroupView,
        InsideStep::AttachRoot,
        InsideStep::AttachFiles,
        InsideStep::AttachDevices,
        InsideStep::AttachProc,
        InsideStep::GiveRoot,
        InsideStep::EnterRoot,
        InsideStep::HideHostName,
        InsideStep::LeaveSession,
    ]);
    let mut argv = vec![options.exec_name.clone()];
    argv.extend(options.arguments.iter().cloned());
    Ok(Plan {
        program: options.exec_name.clone(),
        name: options.name.clone(),
        user: (options.uid, options.gid),
        capabilities: options.capabilities.clone(),
        descriptors: line.descriptors()?,
        host,
        inside,
        argv,
        daemon: line.has("daemonize"),
    })
}

fn items(options: &Options, line: &CommandLine) -> Result<Vec<Item>, Fault> {
    let folder = match options.exec_file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let mut items = vec![Item {
        subject: format!("-exec_file {}", options.exec_file.display()),
        candidates: vec![options.exec_file.clone()],
        name: options.exec_name.clone(),
        access: Access::Execute,
        optional: false,
    }];
    for name in DEVICE_PROGRAMS {
        if name == options.exec_name.as_c_str() {
            continue;
        }
        let file = std::ffi::OsStr::from_bytes(name.to_bytes());
        items.push(Item {
            subject: format!("device program {}", name.to_string_lossy()),
            candidates: vec![folder.join(file), folder.join(LIBEXEC).join(file)],
            name: name.to_owned(),
            access: Access::Execute,
            optional: true,
        });
    }
    for (path, name) in &options.sources {
        let subject = format!("-source {}", path.display());
        let taken = [c"dev", c"proc"].contains(&name.as_c_str());
        if taken || items.iter().any(|item| item.name == *name) {
            return Err(Fault::new(
                subject,
                format!(
                    "the name {} is taken in the jail: by dev, proc, a program or another source",
                    name.to_string_lossy()
                ),
            ));
        }
        items.push(Item {
            subject,
            candidates: vec![path.clone()],
            name: name.clone(),
            access: line.access(&name.to_string_lossy()),
            optional: false,
        });
    }
    Ok(items)
}

/// The control program's command line: options with their values.
struct CommandLine {
    options: Vec<(String, Vec<String>)>,
}

/// `key=value` pairs of a value; a bare word has an empty value. Two commas stand for one.
fn properties(value: &str) -> Vec<(String, String)> {
    let mut words = vec![String::new()];
    let mut rest = value.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(c);
        }
    }
    let pair = |word: String| match word.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => (word, String::new()),
    };
    words.into_iter().map(pair).collect()
}

fn is_on(value: &str) -> bool {
    matches!(value, "" | "on" | "true" | "yes")
}

impl CommandLine {
    fn read(arguments: &[CString]) -> Self {
        let mut options: Vec<(String, Vec<String>)> = Vec::new();
        for argument in arguments {
            let text = argument.to_string_lossy();
            match text.strip_prefix("--").or_else(|| text.strip_prefix('-')) {
                Some(name) if !name.is_empty() => options.push((name.to_owned(), Vec::new())),
                _ => {
                    if let Some((_, values)) = options.last_mut() {
                        values.push(text.into_owned());
                    }
                }
            }
        }
        // Words for the guest's kernel mean nothing here.
        options.retain(|(name, _)| name != "append");
        Self { options }
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|(name, _)| name == option)
    }

    /// Every value of every option, as properties.
    fn values(&self) -> impl Iterator<Item = (&str, Vec<(String, String)>)> {
        self.options.iter().flat_map(|(name, values)| {
            values
                .iter()
                .map(|value| (name.as_str(), properties(value)))
        })
    }

    fn descriptors(&self) -> Result<Vec<RawFd>, Fault> {
        let mut all = Vec::new();
        for (option, properties) in self.values() {
            for (key, value) in properties {
                if !matches!(key.as_str(), "fd" | "fds" | "vhostfd" | "vhostfds") {
                    continue;
                }
                for number in value.split(':') {
                    match number.parse::<RawFd>() {
                        Ok(0..=2) => {}
                        Ok(fd) if fd > 0 => all.push(fd),
                        _ => {
                            return Err(Fault::new(
                                format!("-{option} {key}={value}"),
                                "must be numbers of open descriptors, separated by ':'",
                            ));
                        }
                    }
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        if all.len() > MAX_DESCRIPTORS {
            return Err(Fault::new(
                "fd=",
                format!("{} descriptors; at most {MAX_DESCRIPTORS}", all.len()),
            ));
        }
        Ok(all)
    }

    /// What the command line does with the file `./name`: with one that it does not mention, a disk
    /// to be plugged in later perhaps, it may do everything.
    fn access(&self, name: &str) -> Access {
        let mut mentioned = false;
        for (option, properties) in self.values() {
            let reads = match option {
                "kernel" | "initrd" | "firmware" | "bios" => true,
                "drive" | "blockdev" | "pflash" => properties
                    .iter()
                    .any(|(key, value)| key == "readonly" && is_on(value)),
                _ => false,
            };
            // A bare word is a path too: -kernel ./vmlinux, -mem-path ./file.
            let words = properties.iter().flat_map(|(key, value)| [key, value]);
            for word in words {
                let word = word.strip_prefix("unix:").unwrap_or(word);
                let inner = word.strip_prefix("./").unwrap_or(word).trim_matches('/');
                if inner.split('/').next() == Some(name) {
                    if !reads {
                        return Access::Write;
                    }
                    mentioned = true;
                }
            }
        }
        if mentioned {
            Access::Read
        } else {
            Access::Write
        }
    }

    fn devices(&self) -> Vec<Device> {
        let mut needed = Vec::new();
        let mut kvm = true;
        for (option, properties) in self.values() {
            let first = properties
                .first()
                .map_or("", |(key, value)| match key.as_str() {
                    "type" | "backend" | "driver" => value.as_str(),
                    _ => key.as_str(),
                });
            let has = |key: &str| properties.iter().any(|(k, _)| k == key);
            let on = |key: &str| properties.iter().any(|(k, v)| k == key && is_on(v));
            match option {
                "machine" | "M" if first == "none" => kvm = false,
                "netdev" if first == "tap" => {
                    if has("ifname") || !(has("fd") || has("fds")) {
                        needed.push(Device::Tun);
                    }
                    if on("vhost") && !(has("vhostfd") || has("vhostfds")) {
                        needed.push(Device::VhostNet);
                    }
                }
                "device" if first.starts_with("vhost-vsock") && !has("vhostfd") => {
                    needed.push(Device::VhostVsock);
                }
                "chardev" | "serial" if first == "pty" => needed.push(Device::Ptmx),
                _ => {}
            }
            // Whatever else is named by its path, as in -object rng-random,filename=/dev/urandom.
            for (key, value) in &properties {
                let nodes = [Device::Null, Device::Random, Device::Urandom, Device::Hwrng];
                needed.extend(nodes.into_iter().filter(|device| {
                    let path = format!("/dev/{}", device.node().0);
                    *key == path || *value == path
                }));
            }
        }
        if kvm {
            needed.push(Device::Kvm);
        }
        if self.has("daemonize") {
            needed.push(Device::Null);
        }
        needed.sort_unstable();
        needed.dedup();
        needed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> CommandLine {
        let words: Vec<_> = text
            .split_whitespace()
            .map(|word| CString::new(word).unwrap())
            .collect();
        CommandLine::read(&words)
    }

    #[test]
    fn only_needed_devices_are_there() {
        use Device::*;
        for (text, wanted) in [
            ("-kernel ./k", vec![Kvm]),
            ("-machine none -qmp unix:./q", vec![]),
            ("-machine type=none", vec![]),
            (
                "-machine microvm -append /dev/null -netdev tap",
                vec![Kvm, Tun],
            ),
            ("-netdev tap,id=n,ifname=tap0", vec![Kvm, Tun]),
            ("-netdev tap,id=n,fd=5", vec![Kvm]),
            ("-netdev tap,id=n,fds=5:6,vhost=on,vhostfds=7:8", vec![Kvm]),
            ("-netdev tap,id=n,fd=5,vhost=on", vec![Kvm, VhostNet]),
            ("-netdev type=tap,id=n,ifname=t,vhost=off", vec![Kvm, Tun]),
            (
                "-device vhost-vsock-device,guest-cid=3",
                vec![Kvm, VhostVsock],
            ),
            ("-device vhost-vsock-pci,vhostfd=9", vec![Kvm]),
            ("-daemonize", vec![Kvm, Null]),
            (
                "-object rng-random,id=r,filename=/dev/urandom",
                vec![Kvm, Urandom],
            ),
            ("-serial pty", vec![Kvm, Ptmx]),
            ("-chardev pty,id=c --serial stdio", vec![Kvm, Ptmx]),
            ("-drive file=/dev/sda,id=d", vec![Kvm]),
        ] {
            assert_eq!(line(text).devices(), wanted, "{text}");
        }
    }

    #[test]
    fn every_device_program_of_this_project_comes_along() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../device-procs");
        let mut found = 0;
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let program = entry.path().join("src/main.rs").exists();
            let name = CString::new(entry.file_name().as_bytes()).unwrap();
            assert!(
                !program || DEVICE_PROGRAMS.contains(&name.as_c_str()),
                "{name:?}"
            );
            found += usize::from(program);
        }
        assert!(found >= 3);
    }

    #[test]
    fn every_device_has_its_own_node() {
        for (n, one) in Device::ALL.iter().enumerate() {
            for other in &Device::ALL[..n] {
                assert_ne!(one.node(), other.node());
            }
        }
    }

    #[test]
    fn sources_are_written_only_if_the_command_line_writes_them() {
        for (text, wanted) in [
            ("-kernel ./f", Access::Read),
            ("-kernel /f", Access::Read),
            ("-initrd f", Access::Read),
            ("-drive file=./f,id=d,readonly=on", Access::Read),
            ("-drive id=d,readonly,file=./f", Access::Read),
            ("-drive file=./f,id=d,readonly=off", Access::Write),
            ("-drive file=./f,id=d", Access::Write),
            ("-kernel ./f -drive file=./f,id=d", Access::Write),
            ("-mem-path ./f/huge", Access::Write),
            ("-kernel ./g", Access::Write),
            ("-kernel ./f -append root=./f", Access::Read),
        ] {
            assert_eq!(line(text).access("f"), wanted, "{text}");
        }
        let odd = line("-drive file=./a,,b,readonly=on");
        assert_eq!(odd.access("a,b"), Access::Read);
    }

    #[test]
    fn descriptors_are_those_that_are_named() {
        let named = line("-netdev tap,fds=9:7,vhostfds=7:12 -netdev tap,fd=2 -append fd=50");
        assert_eq!(named.descriptors(), Ok(vec![7, 9, 12]));
        for wrong in ["fd=x", "fds=3:", "fd=-1", "fd="] {
            let error = line(&format!("-netdev tap,{wrong}")).descriptors();
            let error = error.unwrap_err().to_string();
            assert!(error.starts_with(&format!("-netdev {wrong}: ")), "{error}");
        }
    }

    fn options(more: &str) -> Options {
        Options {
            name: c"vm".into(),
            exec_file: "/opt/bin/stratovirt".into(),
            exec_name: c"stratovirt".into(),
            uid: 100,
            gid: 101,
            capabilities: vec![],
            netns: None,
            sources: more
                .split_whitespace()
                .map(|p| {
                    (
                        p.into(),
                        CString::new(p.rsplit('/').next().unwrap()).unwrap(),
                    )
                })
                .collect(),
            cgroup: Cgroup::default(),
            arguments: vec![],
        }
    }

    #[test]
    fn steps_come_in_their_order() {
        let mut all = options("/img/disk");
        all.netns = Some("/run/netns/n".into());
        all.cgroup.memory = Some(1);
        let plan = plan(&all).unwrap();
        assert_eq!(plan.host[0], HostStep::OpenNetwork("/run/netns/n".into()));
        let HostStep::Prepare(program) = &plan.host[1] else {
            panic!("{:?}", plan.host[1]);
        };
        assert_eq!(program.access, Access::Execute);
        let HostStep::Prepare(device) = &plan.host[2] else {
            panic!("{:?}", plan.host[2]);
        };
        assert_eq!(
            device.candidates,
            [
                PathBuf::from("/opt/bin/block"),
                "/opt/bin/../libexec/stratovirt/block".into()
            ]
        );
        let made = plan.host.len() - 4;
        assert_eq!(
            plan.host[made..],
            [
                HostStep::PrepareDevices(vec![Device::Kvm]),
                HostStep::MakeFolder,
                HostStep::MakeMountPoints,
                HostStep::MakeCgroups(all.cgroup.clone()),
            ]
        );
        assert_eq!(plan.inside[0], InsideStep::JoinCgroups);
        assert_eq!(plan.inside[1], InsideStep::EnterNetwork);
        assert_eq!(super::plan(&options("")).unwrap().inside.len(), 9);
    }

    #[test]
    fn names_in_the_jail_are_unique() {
        for sources in [
            "/a/f /b/f",
            "/a/stratovirt",
            "/a/block",
            "/a/dev",
            "/a/proc",
        ] {
            let error = plan(&options(sources)).unwrap_err().to_string();
            assert!(error.contains("is taken in the jail"), "{error}");
        }
    }
}
