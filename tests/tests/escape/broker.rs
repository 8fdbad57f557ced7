//! What a broker that was taken over can still do, and what it cannot.
//!
//! The broker has its caller's name and the host's files before it, because it opens what the command line names and starts what
//! serves a device. So this is not a jail that nothing gets out of: the filter closes every call that no device and no file needs,
//! the capabilities that it gave up close most of the rest, and what remains is named here as granted, one by one. A tracer takes
//! the broker of a VM with a disk and a card over, as root starts it, which is the most that a broker can have.

use std::collections::BTreeSet;

use libc::*;
use seccomp_policies::Policy;
use tests::escape::remote::Remote;
use tests::escape::{Act, Arg, Attempt, Expect, Held, Machine, Outcome, Stop, Verdict, attempts};
use tests::host::{Tap, require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs;
use tests::vm::Vm;
use tests::wait::Deadline;

use super::{DISK, LIMIT};

const TAP: &str = "sv-escb";
const NULL: Arg = Arg::N(0);

const fn n(number: i32) -> Arg {
    // As C does: a flag is its 32 bits, a negative number its 64.
    Arg::N(number as i64 as u64)
}

/// An attempt that must end in a kill.
const fn killed(name: &'static str, number: i64, args: &'static [Arg]) -> Attempt {
    Attempt::new(name, Act::Call(number, args))
}

/// Its filter has the call, for its children; a right that it gave up is missing.
const fn refused(name: &'static str, number: i64, args: &'static [Arg]) -> Attempt {
    Attempt::new(name, Act::Call(number, args)).passes()
}

const fn steps(
    name: &'static str,
    expect: Expect,
    steps: fn(&mut dyn Machine, &Held) -> Result<Verdict, Stop>,
) -> Attempt {
    Attempt::new(name, Act::Steps(steps)).rest(expect).passes()
}

/// Each by an argument or a right: calls that the filter does not have at all are taken from the list of all attempts.
const LIST: &[Attempt] = &[
    // Mounts and namespaces: a child makes them in a user namespace of its own, the broker has none.
    killed(
        "mount-bind",
        SYS_mount,
        &[
            Arg::Bytes(b"/\0"),
            Arg::Bytes(b"/mnt\0"),
            NULL,
            n(MS_BIND as i32),
            NULL,
        ],
    ),
    killed(
        "mount-new",
        SYS_mount,
        &[
            Arg::Bytes(b"x\0"),
            Arg::Bytes(b"/mnt\0"),
            Arg::Bytes(b"tmpfs\0"),
            NULL,
            NULL,
        ],
    ),
    killed(
        "remount",
        SYS_mount,
        &[
            NULL,
            Arg::Bytes(b"/\0"),
            NULL,
            n((MS_REMOUNT | MS_RDONLY) as i32),
            NULL,
        ],
    ),
    refused(
        "mounts-private",
        SYS_mount,
        &[
            NULL,
            Arg::Bytes(b"/\0"),
            NULL,
            n((MS_REC | MS_PRIVATE) as i32),
            NULL,
        ],
    ),
    refused(
        "umount",
        SYS_umount2,
        &[Arg::Bytes(b"/proc\0"), n(MNT_DETACH)],
    ),
    refused(
        "pivot-root",
        SYS_pivot_root,
        &[Arg::Bytes(b"/\0"), Arg::Bytes(b"/\0")],
    ),
    refused(
        "file-system-tmpfs",
        SYS_fsopen,
        &[Arg::Bytes(b"tmpfs\0"), n(1)],
    ),
    refused(
        "file-system-ext4",
        SYS_fsopen,
        &[Arg::Bytes(b"ext4\0"), n(1)],
    ),
    refused(
        "move-mount",
        SYS_move_mount,
        &[
            n(AT_FDCWD),
            Arg::Bytes(b"/proc\0"),
            n(AT_FDCWD),
            Arg::Bytes(b"/mnt\0"),
            NULL,
        ],
    ),
    refused(
        "namespaces",
        SYS_unshare,
        &[n(CLONE_NEWNS
            | CLONE_NEWNET
            | CLONE_NEWIPC
            | CLONE_NEWUTS
            | CLONE_NEWCGROUP)],
    ),
    refused("namespace-mount", SYS_unshare, &[n(CLONE_NEWNS)]),
    refused("namespace-net", SYS_unshare, &[n(CLONE_NEWNET)]),
    killed("namespace-user", SYS_unshare, &[n(CLONE_NEWUSER)]),
    killed(
        "namespace-user-and-mount",
        SYS_unshare,
        &[n(CLONE_NEWUSER | CLONE_NEWNS)],
    ),
    killed("namespace-pid", SYS_unshare, &[n(CLONE_NEWPID)]),
    refused("host-name", SYS_sethostname, &[Arg::Bytes(b"loot"), n(4)]),
    // Programs by path, and code of its own.
    killed(
        "program-by-path",
        SYS_execveat,
        &[n(AT_FDCWD), Arg::Bytes(b"/bin/sh\0"), NULL, NULL, NULL],
    ),
    killed(
        "code-in-memory",
        SYS_mmap,
        &[
            NULL,
            n(4096),
            n(PROT_READ | PROT_EXEC),
            n(MAP_PRIVATE | MAP_ANONYMOUS),
            n(-1),
            NULL,
        ],
    ),
    killed(
        "code-from-data",
        SYS_mprotect,
        &[NULL, n(4096), n(PROT_READ | PROT_EXEC)],
    ),
    // Rights.
    Attempt::new("capabilities", attempts::RAISE_CAPABILITIES).passes(),
    Attempt::new("ambient", attempts::RAISE_AMBIENT).passes(),
    refused(
        "securebits",
        SYS_prctl,
        &[n(PR_SET_SECUREBITS), NULL, NULL, NULL, NULL],
    ),
    Attempt::new(
        "new-privileges",
        Act::Call(SYS_prctl, &[n(PR_SET_NO_NEW_PRIVS), NULL, NULL, NULL, NULL]),
    )
    .refused(&[EINVAL])
    .passes(),
    killed(
        "keep-capabilities",
        SYS_prctl,
        &[n(PR_SET_KEEPCAPS), n(1), NULL, NULL, NULL],
    ),
    killed(
        "any-tracer",
        SYS_prctl,
        &[n(0x5961_6d61), n(-1), NULL, NULL, NULL],
    ),
    killed("memory-map", SYS_prctl, &[n(35), n(14), n(-1), NULL, NULL]),
    killed(
        "no-more-end-with-parent",
        SYS_prctl,
        &[n(PR_SET_CHILD_SUBREAPER), n(1), NULL, NULL, NULL],
    ),
    killed(
        "old-filter-call",
        SYS_prctl,
        &[n(PR_SET_SECCOMP), n(2), Arg::Room(16), NULL, NULL],
    ),
    killed("strict-mode", SYS_seccomp, &[n(0), NULL, NULL]),
    // Keys.
    killed(
        "read-key",
        SYS_keyctl,
        &[n(11), n(-3), Arg::Room(64), n(64)],
    ),
    killed(
        "search-key",
        SYS_keyctl,
        &[
            n(10),
            n(-3),
            Arg::Bytes(b"user\0"),
            Arg::Bytes(b"stratovirt-escape\0"),
            NULL,
        ],
    ),
    // Signals other than the end.
    killed(
        "signal-stop",
        SYS_pidfd_send_signal,
        &[n(-1), n(SIGSTOP), NULL, NULL],
    ),
    killed(
        "signal-terminate",
        SYS_pidfd_send_signal,
        &[n(-1), n(SIGTERM), NULL, NULL],
    ),
    // Sockets of other kinds than those of the command line.
    killed(
        "socket-netlink",
        SYS_socket,
        &[n(AF_NETLINK), n(SOCK_RAW), n(0)],
    ),
    killed(
        "socket-packet",
        SYS_socket,
        &[n(AF_PACKET), n(SOCK_RAW), n(0x300)],
    ),
    killed(
        "socket-vsock",
        SYS_socket,
        &[n(AF_VSOCK), n(SOCK_STREAM), n(0)],
    ),
    killed(
        "socket-crypto",
        SYS_socket,
        &[n(AF_ALG), n(SOCK_SEQPACKET), n(0)],
    ),
    killed(
        "socket-bluetooth",
        SYS_socket,
        &[n(AF_BLUETOOTH), n(SOCK_RAW), n(1)],
    ),
    refused("socket-raw", SYS_socket, &[n(AF_INET), n(SOCK_RAW), n(1)]),
    refused(
        "socket-raw-6",
        SYS_socket,
        &[n(AF_INET6), n(SOCK_RAW), n(58)],
    ),
    steps("port-below-1024", Expect::Refused(&[EACCES]), low_port),
    // Devices.
    Attempt::new(
        "terminal-input-broker",
        Act::Each(SYS_ioctl, &[n(TIOCSTI as i32), Arg::Bytes(b"x")]),
    ),
    Attempt::new(
        "kvm-create-vm-broker",
        Act::Each(SYS_ioctl, &[n(0xae01), NULL]),
    ),
    Attempt::new(
        "interface-down",
        Act::Each(SYS_ioctl, &[n(SIOCSIFFLAGS as i32), Arg::Room(40)]),
    ),
    Attempt::new(
        "interface-address",
        Act::Each(SYS_ioctl, &[n(0x8916), Arg::Room(40)]),
    ),
    Attempt::new(
        "tap-owner-broker",
        Act::Each(SYS_ioctl, &[n(0x4004_54cc), n(0)]),
    ),
    Attempt::new(
        "tap-for-ever",
        Act::Each(SYS_ioctl, &[n(0x4004_54cb), n(0)]),
    ),
    Attempt::new(
        "discard-blocks",
        Act::Each(SYS_ioctl, &[n(0x1277), Arg::Room(16)]),
    ),
    Attempt::new(
        "immutable-flag-broker",
        Act::Each(SYS_ioctl, &[Arg::N(0x4008_6602), Arg::Room(8)]),
    ),
    killed("lease", SYS_fcntl, &[n(1), n(F_SETLEASE), n(F_RDLCK)]),
    killed("signals-of-a-file", SYS_fcntl, &[n(1), n(F_SETOWN), n(1)]),
    killed(
        "ring-buffers",
        SYS_io_uring_register,
        &[n(1), n(0), Arg::Room(16), n(1)],
    ),
    killed(
        "ring-personality",
        SYS_io_uring_register,
        &[n(1), n(9), NULL, NULL],
    ),
    // Files that take a right that it gave up: memory of the host, of processes of others, of the control process.
    steps("host-memory", NO_ENTRY, |m, _| {
        open(m, b"/dev/mem\0", O_RDWR)
    }),
    steps("host-ports", NO_ENTRY, |m, _| {
        open(m, b"/dev/port\0", O_RDWR)
    }),
    steps("kernel-memory", NO_ENTRY, |m, _| {
        open(m, b"/proc/kcore\0", O_RDONLY)
    }),
    steps("processor-registers", NO_ENTRY, |m, _| {
        open(m, b"/dev/cpu/0/msr\0", O_RDWR)
    }),
    steps("memory-of-init", NO_ENTRY, |m, _| {
        open(m, b"/proc/1/mem\0", O_RDWR)
    }),
    steps("environment-of-init", NO_ENTRY, |m, _| {
        open(m, b"/proc/1/environ\0", O_RDONLY)
    }),
    steps("root-of-init", NO_ENTRY, |m, _| {
        open(m, b"/proc/1/root/etc\0", O_RDONLY)
    }),
    steps("memory-of-the-control-process", NO_ENTRY, |m, _| {
        open_of_parent(m, "mem")
    }),
    steps("maps-of-the-control-process", NO_ENTRY, |m, _| {
        open_of_parent(m, "maps")
    }),
    steps("a-descriptor-of-the-control-process", NO_ENTRY, |m, _| {
        open_of_parent(m, "fd/0")
    }),
    // What it is for, or cannot be kept from as long as it opens what its caller may open.
    steps(
        "file-of-the-caller",
        Expect::Granted("a command line may name any file of its caller's"),
        |m, _| open(m, b"/etc/shadow\0", O_RDONLY),
    ),
    steps(
        "setting-of-the-kernel",
        Expect::Granted("root's name is enough for sysctl; ozone and other users' VMs lack it"),
        |m, _| open(m, b"/proc/sys/kernel/core_pattern\0", O_WRONLY),
    ),
    steps(
        "memory-of-its-own-device",
        Expect::Granted("who makes a user namespace is its master"),
        device_memory,
    ),
    steps(
        "end-of-anybody",
        Expect::Granted("devices run as other users, so CAP_KILL stays"),
        pidfd_of_init,
    ),
    steps(
        "socket-by-ring",
        Expect::Either(
            &[EINVAL, ENOMEM, EPERM, ENOSYS],
            "a disk's process makes its ring under this filter, and what a ring does no filter sees",
        ),
        socket_by_ring,
    ),
];

const NO_ENTRY: Expect = Expect::Refused(&[EPERM, EACCES, ENOENT, ENXIO]);

fn open(m: &mut dyn Machine, path: &[u8], flags: i32) -> Result<Verdict, Stop> {
    let path = m.put(path)?;
    let flags = (flags | O_CLOEXEC) as u64;
    m.call(SYS_openat, &[AT_FDCWD as u64, path, flags, 0])
        .map(Verdict::Through)
}

fn open_of_parent(m: &mut dyn Machine, file: &str) -> Result<Verdict, Stop> {
    let parent = m.call(SYS_getppid, &[])?;
    let path = format!("/proc/{parent}/{file}\0");
    open(m, path.as_bytes(), O_RDONLY)
}

fn low_port(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let socket = m.call(SYS_socket, &[AF_INET as u64, SOCK_STREAM as u64, 0])?;
    let mut address = [0; 16];
    address[..2].copy_from_slice(&(AF_INET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&1017_u16.to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    let address = m.put(&address)?;
    m.call(SYS_bind, &[socket, address, 16])
        .map(Verdict::Through)
}

/// The first process of its own, which is a device's.
fn device_memory(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let path = m.put(b"/proc/self/task/\0")?;
    let flags = (O_RDONLY | O_DIRECTORY | O_CLOEXEC) as u64;
    let folder = m.call(SYS_openat, &[AT_FDCWD as u64, path, flags, 0])?;
    let room = m.put(&[0; 1024])?;
    let read = m.call(SYS_getdents64, &[folder, room, 1024])?;
    let entries = m.get(room, usize::try_from(read).unwrap_or(0))?;
    // struct linux_dirent64: the name from byte 19 on; the only one of digits is its thread.
    let text: String = entries
        .split(|byte| *byte == 0)
        .filter_map(|word| {
            let digits = word.iter().rposition(|b| !b.is_ascii_digit());
            let name = &word[digits.map_or(0, |at| at + 1)..];
            (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
        })
        .next()
        .unwrap_or_default();
    let children = format!("/proc/self/task/{text}/children\0");
    let Verdict::Through(list) = open(m, children.as_bytes(), O_RDONLY)? else {
        return Err(Stop::Errno(ENOENT));
    };
    let read = m.call(SYS_read, &[list, room, 1024])?;
    let children = m.get(room, usize::try_from(read).unwrap_or(0))?;
    let children = String::from_utf8_lossy(&children).into_owned();
    let first = children.split(' ').next().unwrap_or_default();
    open(m, format!("/proc/{first}/mem\0").as_bytes(), O_RDWR)
}

/// Nothing is sent: that the descriptor of a process of others is to be had is enough.
fn pidfd_of_init(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    m.call(SYS_pidfd_open, &[1, 0]).map(Verdict::Through)
}

/// A netlink socket, which the filter refuses to `socket`, by a ring of its own.
fn socket_by_ring(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    const NO_SQARRAY: u32 = 1 << 16; // include/uapi/linux/io_uring.h
    const OP_SOCKET: u8 = 45;
    let mut parameters = [0; 120];
    parameters[8..12].copy_from_slice(&NO_SQARRAY.to_ne_bytes());
    let parameters = m.put(&parameters)?;
    let ring = m.call(SYS_io_uring_setup, &[2, parameters])?;
    let protection = (PROT_READ | PROT_WRITE) as u64;
    let map = |m: &mut dyn Machine, at: u64| {
        m.call(
            SYS_mmap,
            &[0, 4096, protection, MAP_SHARED as u64, ring, at],
        )
    };
    let (rings, entries) = (map(m, 0)?, map(m, 0x1000_0000)?);
    let told = m.get(parameters, 120)?;
    let word = |at: usize| {
        u64::from(u32::from_ne_bytes([
            told[at],
            told[at + 1],
            told[at + 2],
            told[at + 3],
        ]))
    };
    let (sq_tail, cqes) = (word(44), word(100));
    // struct io_uring_sqe: operation, family, type, protocol.
    let mut entry = [0; 64];
    entry[0] = OP_SOCKET;
    entry[4..8].copy_from_slice(&AF_NETLINK.to_ne_bytes());
    entry[8..16].copy_from_slice(&(SOCK_RAW as u64).to_ne_bytes());
    m.set(entries, &entry)?;
    m.set(rings + sq_tail, &1_u32.to_ne_bytes())?;
    m.call(SYS_io_uring_enter, &[ring, 1, 1, 1, 0, 0])?;
    let done = m.get(rings + cqes + 8, 4)?;
    let result = i32::from_ne_bytes([done[0], done[1], done[2], done[3]]);
    match result {
        0.. => Ok(Verdict::Through(result as u64)),
        errno => Err(Stop::Errno(-errno)),
    }
}

fn running(dir: &std::path::Path, tap: &Tap) -> Vm {
    let disk = dir.join("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(DISK).unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::StartDevice.path(), "device=2 queues=1")
        .disk("d0", &disk, "")
        .tap("n0", &tap.name, "52:54:00:00:00:43")
        .start()
        .unwrap();
    // A guest that runs finds everything locked down.
    vm.wait_for("STARTED", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    vm.processes().unwrap();
    vm
}

fn held(pid: i32) -> Held {
    let fds = procfs::fds(pid).unwrap();
    let first = |kind: &str| {
        let found = fds.iter().find(|(_, fd)| fd.kind().contains(kind));
        found.map_or(-1, |(number, _)| *number)
    };
    Held {
        log: 2,
        socket: first("socket"),
        backend: first("/disk.img"),
        ram: first("pidfd"),
        kick: first("pipe"),
        call: -1,
        ring: -1,
    }
}

/// All attempts whose call its filter does not have at all.
fn unnamed() -> Vec<Attempt> {
    let rules = Policy::Broker.info().rules;
    let named: BTreeSet<i64> = rules.iter().map(|rule| rule.number).collect();
    let outside = |attempt: &Attempt| match attempt.act {
        Act::Call(number, _) | Act::Each(number, _) => !named.contains(&number),
        Act::Steps(_) => false,
    };
    let kill = |attempt: Attempt| Attempt::new(attempt.name, attempt.act);
    let all = attempts::all().into_iter();
    // It is getpid, which it has: the kernel looks at 32 bits of the number.
    all.filter(|attempt| attempt.name != "high-bits-of-number")
        .filter(outside)
        .map(kill)
        .collect()
}

#[test]
fn a_broker_that_was_taken_over_has_what_this_says_and_no_more() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let tap = Tap::new(TAP, "10.7.43.1/24").unwrap();
    let mut vm = None;
    let (mut wrong, mut blocked, mut by_filter, mut granted) = (Vec::new(), 0, 0, 0);
    for attempt in LIST.iter().copied().chain(unnamed()) {
        let expected = attempt.filtered();
        let now = vm.get_or_insert_with(|| running(dir.path(), &tap));
        let broker = now.process("broker").unwrap().unwrap();
        let mut remote = Remote::take(broker).unwrap();
        let outcome = Outcome::of(attempt.make(&mut remote, &held(broker)));
        let outcome = match (outcome, remote.died_of()) {
            (None, Some(SIGSYS)) => Outcome::Killed,
            (Some(outcome), None) => outcome,
            other => {
                wrong.push(format!("{}: {other:?}", attempt.name));
                vm = None;
                continue;
            }
        };
        drop(remote);
        let as_expected = match expected {
            Expect::Granted(_) | Expect::Either(..) => {
                granted += 1;
                println!(
                    "broker {:36} {outcome}: granted, {expected:?}",
                    attempt.name
                );
                outcome.is(expected)
            }
            _ => {
                blocked += usize::from(!matches!(outcome, Outcome::Through(_)));
                outcome.is(expected) || outcome == Outcome::Refused(ENOSYS)
            }
        };
        if !as_expected {
            wrong.push(format!("{}: {outcome}, must be {expected:?}", attempt.name));
        }
        if outcome == Outcome::Killed {
            by_filter += 1;
            // A VM without its broker ends, with all of its processes.
            let mut ended = vm.take().unwrap();
            let status = ended.wait(LIMIT).unwrap();
            assert!(!status.success(), "{}: {status}", attempt.name);
            assert!(ended.survivors(Deadline::after(LIMIT)).is_empty());
        }
    }
    assert!(
        wrong.is_empty(),
        "{} attempts of the broker did not end as they must:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    println!(
        "blocked {blocked} in the broker, {by_filter} by its filter; {granted} are what it has"
    );
    assert!(blocked >= 150, "only {blocked}");
}
