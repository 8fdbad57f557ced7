//! # The layers that are taken away, one a case
//!
//! **Job.** A table: what is changed in which process, and the check that must find it. Where the programs themselves would
//! notice and refuse to start, what they read back is changed as well: it is these checks that are on trial.

use std::io;
use tests::jail::check::Check;
use tests::jail::expect::RAM_GUARD;
use tests::jail::saboteur::{Act, Call, Change, Who};
use tests::trace::{Registers, Tracee};

/// One layer less.
pub(crate) struct Case {
    /// What is gone.
    pub(crate) name: &'static str,
    /// How.
    pub(crate) changes: &'static [Change],
    /// The process whose check must speak, and the check.
    pub(crate) caught: (&'static str, Check),
    /// What else follows from the same change.
    pub(crate) also: &'static [Check],
}

const fn change(who: Who, number: i64, which: fn(&Call<'_>) -> bool, act: Act) -> Change {
    Change {
        who,
        number,
        which,
        act,
    }
}

const fn any(_: &Call<'_>) -> bool {
    true
}

const fn case(
    name: &'static str,
    caught: (&'static str, Check),
    also: &'static [Check],
    changes: &'static [Change],
) -> Case {
    Case {
        name,
        changes,
        caught,
        also,
    }
}

const MAIN: Who = Who::Control("stratovirt");
const SKIP: Act = Act::Skip(0);
const ALL_LANDLOCK: [Check; 4] = [
    Check::Landlock("files"),
    Check::Landlock("TCP"),
    Check::Landlock("signals"),
    Check::Landlock("abstract sockets"),
];

// Numbers that libc has not: linux/prctl.h, linux/securebits.h, linux/mount.h.
const CAP_AMBIENT_IS_SET: u64 = 1;
const CAP_AMBIENT_RAISE: u64 = 2;
const NO_CAP_AMBIENT_RAISE: u64 = 0xc0; // with its lock
const ATTR_RDONLY: u64 = 1;
const ATTR_NODEV: u64 = 4;
const ATTR_NOEXEC: u64 = 8;

const fn option(call: &Call<'_>, wanted: libc::c_int) -> bool {
    call.arguments[0] == wanted as u64
}

fn set_no_new_privs(call: &Call<'_>) -> bool {
    option(call, libc::PR_SET_NO_NEW_PRIVS)
}

fn set_not_dumpable(call: &Call<'_>) -> bool {
    option(call, libc::PR_SET_DUMPABLE) && call.arguments[1] == 0
}

fn get_dumpable(call: &Call<'_>) -> bool {
    option(call, libc::PR_GET_DUMPABLE)
}

fn drop_chown(call: &Call<'_>) -> bool {
    option(call, libc::PR_CAPBSET_DROP) && call.arguments[1] == 0
}

fn drop_setpcap(call: &Call<'_>) -> bool {
    option(call, libc::PR_CAPBSET_DROP) && call.arguments[1] == 8
}

fn set_securebits(call: &Call<'_>) -> bool {
    option(call, libc::PR_SET_SECUREBITS)
}

fn ask_ambient(call: &Call<'_>) -> bool {
    option(call, libc::PR_CAP_AMBIENT) && call.arguments[1] == CAP_AMBIENT_IS_SET
}

fn set_parent_death(call: &Call<'_>) -> bool {
    option(call, libc::PR_SET_PDEATHSIG)
}

/// `capset`'s data: twice effective, permitted, inheritable, 32 bits each.
fn capset(tracee: &mut Tracee, effective: u8, permitted: u8, inheritable: u8) -> io::Result<()> {
    let data = tracee.registers()?.rsi;
    for (at, bits) in [(0, effective), (4, permitted), (8, inheritable)] {
        let mut byte = [0];
        tracee.read(data + at, &mut byte)?;
        tracee.write(data + at, &[byte[0] | bits])?;
    }
    Ok(())
}

fn keep_permitted(tracee: &mut Tracee) -> io::Result<()> {
    capset(tracee, 0, 1, 0)
}

fn keep_effective(tracee: &mut Tracee) -> io::Result<()> {
    capset(tracee, 1, 1, 0)
}

fn keep_inheritable(tracee: &mut Tracee) -> io::Result<()> {
    capset(tracee, 0, 0, 1)
}

/// Permitted and inheritable, as an ambient capability has to be; it becomes that before what follows the call.
fn keep_ambient(tracee: &mut Tracee) -> io::Result<()> {
    capset(tracee, 0, 1, 1)
}

fn raise_ambient(tracee: &mut Tracee, _: &Registers) -> io::Result<()> {
    let raise = [libc::PR_CAP_AMBIENT as u64, CAP_AMBIENT_RAISE, 0, 0, 0];
    done(tracee.call(libc::SYS_prctl, &raise)?)
}

/// What `capget` wrote becomes nothing.
fn deny_capabilities(tracee: &mut Tracee, call: &Registers) -> io::Result<()> {
    match call.rsi {
        0 => Ok(()),
        data => tracee.write(data, &[0; 24]),
    }
}

/// An error where a call that was slipped in failed: the case would prove nothing.
fn done(result: i64) -> io::Result<()> {
    match i32::try_from(-result) {
        Ok(error) if error > 0 => Err(io::Error::from_raw_os_error(error)),
        _ => Ok(()),
    }
}

/// The same, for a call that gives a descriptor.
fn opened(result: i64) -> io::Result<u64> {
    done(result).map(|()| result.cast_unsigned())
}

/// Puts a program of `change`'s making in the place of the filter that is about to be installed.
fn filter(tracee: &mut Tracee, change: fn(&mut Vec<libc::sock_filter>)) -> io::Result<()> {
    const ROOM: u64 = 64 << 10;
    let mut registers = tracee.registers()?;
    let mut head = [0; 16];
    tracee.read(registers.rdx, &mut head)?;
    let [low, high, ..] = head;
    let mut text = vec![0; usize::from(u16::from_ne_bytes([low, high])) * 8];
    let mut address = [0; 8];
    address.copy_from_slice(&head[8..]);
    tracee.read(u64::from_ne_bytes(address), &mut text)?;
    let mut program: Vec<libc::sock_filter> = text
        .chunks_exact(8)
        .map(|i| libc::sock_filter {
            code: u16::from_ne_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect();
    change(&mut program);
    let place = map(
        tracee,
        &[0, ROOM, READ | WRITE, PRIVATE | ANONYMOUS, u64::MAX, 0],
    )?;
    let length = program.len() as u16;
    let text: Vec<u8> = program
        .iter()
        .flat_map(|i| {
            let [a, b] = i.code.to_ne_bytes();
            let [c, d, e, f] = i.k.to_ne_bytes();
            [a, b, i.jt, i.jf, c, d, e, f]
        })
        .collect();
    let mut head = vec![0; 16];
    head[..2].copy_from_slice(&length.to_ne_bytes());
    head[8..].copy_from_slice(&(place + 16).to_ne_bytes());
    tracee.write(place, &head)?;
    tracee.write(place + 16, &text)?;
    registers.rdx = place;
    tracee.set_registers(&registers)
}

const READ: u64 = libc::PROT_READ as u64;
const WRITE: u64 = libc::PROT_WRITE as u64;
const EXECUTE: u64 = libc::PROT_EXEC as u64;
const PRIVATE: u64 = libc::MAP_PRIVATE as u64;
const ANONYMOUS: u64 = libc::MAP_ANONYMOUS as u64;

fn map(tracee: &mut Tracee, arguments: &[u64]) -> io::Result<u64> {
    match tracee.call(libc::SYS_mmap, arguments)? {
        error @ -4095..0 => done(error).map(|()| 0),
        address => Ok(address.cast_unsigned()),
    }
}

/// `if the call is ptrace, allow it`, in front of everything.
fn allow_ptrace(tracee: &mut Tracee) -> io::Result<()> {
    filter(tracee, |program| {
        let instruction = |code: u32, jt, jf, k| libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        };
        let front = [
            instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            instruction(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                1,
                libc::SYS_ptrace as u32,
            ),
            instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        program.splice(0..0, front);
    })
}

/// What is forbidden is logged and let through.
fn log_only(tracee: &mut Tracee) -> io::Result<()> {
    filter(tracee, |program| {
        for one in program {
            if one.code == (libc::BPF_RET | libc::BPF_K) as u16
                && one.k == libc::SECCOMP_RET_KILL_PROCESS
            {
                one.k = libc::SECCOMP_RET_LOG;
            }
        }
    })
}

fn without_pid_namespace(tracee: &mut Tracee) -> io::Result<()> {
    let arguments = tracee.registers()?.rdi;
    let mut flags = [0; 8];
    tracee.read(arguments, &mut flags)?;
    let flags = u64::from_ne_bytes(flags) & !(libc::CLONE_NEWPID as u64);
    tracee.write(arguments, &flags.to_ne_bytes())
}

fn makes_user_namespace(call: &Call<'_>) -> bool {
    call.bytes(call.arguments[0], 8)
        .is_ok_and(|flags| flags[3] & (libc::CLONE_NEWUSER >> 24) as u8 != 0)
}

/// A user map with this text instead.
fn user_map(tracee: &mut Tracee, text: &str) -> io::Result<()> {
    let mut registers = tracee.registers()?;
    tracee.write(registers.rsi, text.as_bytes())?;
    registers.rdx = text.len() as u64;
    tracee.set_registers(&registers)
}

fn to_user_map(call: &Call<'_>) -> bool {
    call.target(call.arguments[0]).ends_with("/uid_map")
}

fn to_nested_users(call: &Call<'_>) -> bool {
    call.target(call.arguments[0])
        .ends_with("/max_user_namespaces")
}

fn of_root(call: &Call<'_>, key: &str) -> bool {
    call.text(2) == key
}

/// `mount_setattr`'s fourth argument: attributes to set, to clear, propagation, user namespace, 64 bits each.
fn mount_without(tracee: &mut Tracee, attribute: u64) -> io::Result<()> {
    let attributes = tracee.registers()?.r10;
    let mut set = [0; 8];
    tracee.read(attributes, &mut set)?;
    let set = u64::from_ne_bytes(set) & !attribute;
    tracee.write(attributes, &set.to_ne_bytes())
}

/// `statfs` tells of a mount that is read-only and on which nothing counts.
fn pretend_restricted(tracee: &mut Tracee, call: &Registers) -> io::Result<()> {
    const FLAGS: u64 = 80; // of struct statfs
    let all = libc::ST_RDONLY | libc::ST_NOSUID | libc::ST_NODEV | libc::ST_NOEXEC;
    let mut flags = [0; 8];
    tracee.read(call.rsi + FLAGS, &mut flags)?;
    let flags = u64::from_ne_bytes(flags) | all;
    tracee.write(call.rsi + FLAGS, &flags.to_ne_bytes())
}

/// The VM starts in a session with keys, before its broker is split off.
fn join_keys(tracee: &mut Tracee) -> io::Result<()> {
    const JOIN_SESSION_KEYRING: u64 = 1;
    done(tracee.call(libc::SYS_keyctl, &[JOIN_SESSION_KEYRING, 0])?)
}

/// The process has its user by now, and its root is not read-only any more.
fn leave_a_folder(tracee: &mut Tracee, _: &Registers) -> io::Result<()> {
    let arguments = [libc::AT_FDCWD as u64, 0, 0o755];
    done(tracee.call_path(libc::SYS_mkdirat, &arguments, 1, "/left")?)
}

/// Landlock's rules cover less: eight bytes each for files, TCP and scopes.
fn landlock_without(tracee: &mut Tracee, at: u64) -> io::Result<()> {
    let attributes = tracee.registers()?.rdi;
    tracee.write(attributes + at, &[0; 8])
}

fn makes_rules(call: &Call<'_>) -> bool {
    call.arguments[0] != 0
}

fn sets_limit(call: &Call<'_>, resource: u32) -> bool {
    call.arguments[1] == u64::from(resource) && call.arguments[2] != 0
}

fn asks_core_limit(call: &Call<'_>) -> bool {
    call.arguments[1] == u64::from(libc::RLIMIT_CORE) && call.arguments[2] == 0
}

fn deny_core_limit(tracee: &mut Tracee, call: &Registers) -> io::Result<()> {
    tracee.write(call.r10, &[0; 16])
}

/// Out of the way of the numbers that the process knows.
const LEAKED: u64 = 60;

/// Opens `/dev/kvm` while the host's files are still in view.
fn open_kvm(tracee: &mut Tracee) -> io::Result<()> {
    let arguments = [libc::AT_FDCWD as u64, 0, libc::O_RDWR as u64];
    let fd = opened(tracee.call_path(libc::SYS_openat, &arguments, 1, "/dev/kvm")?)?;
    let copy = [fd, libc::F_DUPFD as u64, LEAKED];
    done(tracee.call(libc::SYS_fcntl, &copy)?)?;
    done(tracee.call(libc::SYS_close, &[fd])?)
}

fn keep_at_exec(tracee: &mut Tracee) -> io::Result<()> {
    let keep = [LEAKED, libc::F_SETFD as u64, 0];
    done(tracee.call(libc::SYS_fcntl, &keep)?)
}

/// What the fork copied of the broker's descriptors: one of them stays.
fn keep_brokers(tracee: &mut Tracee, wanted: &str) -> io::Result<()> {
    let folder = format!("/proc/{}/fd", tracee.tid());
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let target = std::fs::read_link(entry.path())?;
        if let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok())
            && target.to_string_lossy().contains(wanted)
        {
            let copy = [fd, libc::F_DUPFD as u64, LEAKED];
            return done(tracee.call(libc::SYS_fcntl, &copy)?);
        }
    }
    Err(io::Error::other(format!("the broker holds no {wanted}")))
}

fn keep_other_image(tracee: &mut Tracee) -> io::Result<()> {
    keep_brokers(tracee, "/disk.img")
}

fn keep_pidfd(tracee: &mut Tracee) -> io::Result<()> {
    keep_brokers(tracee, "[pidfd]")
}

fn make_socket(tracee: &mut Tracee) -> io::Result<()> {
    let arguments = [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0];
    opened(tracee.call(libc::SYS_socket, &arguments)?).map(drop)
}

fn make_memfd(tracee: &mut Tracee) -> io::Result<()> {
    opened(tracee.call_path(libc::SYS_memfd_create, &[0, 0], 0, "inflight")?).map(drop)
}

fn open_host_file(tracee: &mut Tracee) -> io::Result<u64> {
    let arguments = [libc::AT_FDCWD as u64, 0, libc::O_RDONLY as u64];
    opened(tracee.call_path(libc::SYS_openat, &arguments, 1, "/etc/passwd")?)
}

fn leak_host_file(tracee: &mut Tracee) -> io::Result<()> {
    open_host_file(tracee).map(drop)
}

fn map_host_file(tracee: &mut Tracee) -> io::Result<()> {
    let fd = open_host_file(tracee)?;
    map(tracee, &[0, 4096, READ, PRIVATE, fd, 0])?;
    done(tracee.call(libc::SYS_close, &[fd])?)
}

/// The first back end, which is the image.
fn map_image(tracee: &mut Tracee) -> io::Result<()> {
    map(tracee, &[0, 4096, READ, PRIVATE, 5, 0]).map(drop)
}

/// Room that nothing may touch, of more than any stack's.
fn makes_guards(call: &Call<'_>) -> bool {
    call.arguments[1] > RAM_GUARD && call.arguments[2] == 0
}

/// Gives back a page in front of guest RAM, or behind it.
pub(crate) fn unmap_guard(tracee: &mut Tracee, in_front: bool) -> io::Result<()> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", tracee.tid()))?;
    let ram = maps.lines().find(|line| line.contains("/memfd:guest-ram"));
    let range = ram.and_then(|line| line.split_once(' ')?.0.split_once('-'));
    let (first, behind) = range.ok_or_else(|| io::Error::other("it maps no guest RAM"))?;
    let number = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
    let page = if in_front {
        number(first)? - 4096
    } else {
        number(behind)?
    };
    done(tracee.call(libc::SYS_munmap, &[page, 4096])?)
}

fn map_writable_code(tracee: &mut Tracee) -> io::Result<()> {
    let rights = READ | WRITE | EXECUTE;
    let arguments = [0, 4096, rights, PRIVATE | ANONYMOUS, u64::MAX, 0];
    map(tracee, &arguments).map(drop)
}

fn to_standard_output(call: &Call<'_>) -> bool {
    call.arguments[1] == 1
}

/// Standard output becomes a pipe that nobody reads.
fn replace_log(tracee: &mut Tracee, _: &Registers) -> io::Result<()> {
    let mut ends = [0; 8];
    let arguments = [0, libc::O_CLOEXEC as u64];
    done(tracee.call_with(libc::SYS_pipe2, &arguments, 0, &mut ends)?)?;
    let [.., a, b, c, d] = ends;
    let writer = u64::from(u32::from_ne_bytes([a, b, c, d]));
    done(tracee.call(libc::SYS_dup3, &[writer, 1, 0])?)
}

fn opens_fixed_image(call: &Call<'_>) -> bool {
    call.arguments[2] & libc::O_PATH as u64 == 0
        && (call.text(1).ends_with("/fixed.img") || reopens(call, "/fixed.img"))
}

fn asks_mode(call: &Call<'_>) -> bool {
    call.arguments[1] == libc::F_GETFL as u64
}

fn pretend_read_only(tracee: &mut Tracee, call: &Registers) -> io::Result<()> {
    let mut registers = *call;
    registers.rax &= !(libc::O_ACCMODE as u64);
    tracee.set_registers(&registers)
}

/// Whether the path is that of a descriptor which leads to `wanted`.
fn reopens(call: &Call<'_>, wanted: &str) -> bool {
    call.text(1)
        .strip_prefix("/proc/self/fd/")
        .and_then(|number| number.parse().ok())
        .is_some_and(|fd| call.target(fd).ends_with(wanted))
}

fn seals_guest_ram(call: &Call<'_>) -> bool {
    call.arguments[1] == libc::F_ADD_SEALS as u64
        && call.target(call.arguments[0]).contains("guest-ram")
}

/// One case for each resource limit, on the network card.
macro_rules! limit {
    ($name:literal, $kernel:literal, $resource:ident) => {
        case(
            $name,
            ("n0", Check::Limit($kernel)),
            &[],
            &[
                change(
                    Who::Child(2),
                    libc::SYS_prlimit64,
                    |call| sets_limit(call, libc::$resource),
                    SKIP,
                ),
                change(
                    Who::Device(2),
                    libc::SYS_prlimit64,
                    asks_core_limit,
                    Act::After(deny_core_limit),
                ),
            ],
        )
    };
}

/// One case for each namespace that the child makes.
macro_rules! namespace {
    ($name:literal, $kind:literal, $flag:ident, $also:expr) => {
        case(
            $name,
            ("d0", Check::Namespace($kind)),
            $also,
            &[change(
                Who::Child(0),
                libc::SYS_unshare,
                any,
                Act::Argument(0, |flags| flags & !(libc::$flag as u64)),
            )],
        )
    };
}

/// All of them.
#[rustfmt::skip]
pub(crate) const CASES: &[Case] = &[
    // Filters.
    case("no filter on the control process's main thread", ("control", Check::SeccompMode), &[Check::FilterCount],
        &[change(MAIN, libc::SYS_seccomp, any, SKIP)]),
    case("no filter on the QMP thread", ("control", Check::SeccompMode), &[Check::FilterCount],
        &[change(Who::Control("qmp"), libc::SYS_seccomp, any, SKIP)]),
    case("no filter on the vCPU thread", ("control", Check::SeccompMode), &[Check::FilterCount],
        &[change(Who::Control("vcpu"), libc::SYS_seccomp, any, SKIP)]),
    case("a filter on the leader only", ("control", Check::SeccompMode), &[Check::FilterCount],
        &[change(Who::Control("qmp"), libc::SYS_seccomp, any, SKIP), change(Who::Control("vcpu"), libc::SYS_seccomp, any, SKIP)]),
    case("no filter on the broker", ("broker", Check::SeccompMode), &[Check::FilterCount],
        &[change(Who::Broker, libc::SYS_seccomp, any, SKIP)]),
    case("no filter of its own on a disk", ("d0", Check::FilterCount), &[],
        &[change(Who::Device(0), libc::SYS_seccomp, any, SKIP)]),
    case("no filter of its own on a network card", ("n0", Check::FilterCount), &[],
        &[change(Who::Device(2), libc::SYS_seccomp, any, SKIP)]),
    case("one more call allowed to a disk", ("d0", Check::FilterProgram), &[],
        &[change(Who::Device(0), libc::SYS_seccomp, any, Act::Before(allow_ptrace))]),
    case("one more call allowed to the broker", ("broker", Check::FilterProgram), &[],
        &[change(Who::Broker, libc::SYS_seccomp, any, Act::Before(allow_ptrace))]),
    case("one more call allowed to a vCPU thread", ("control", Check::FilterProgram), &[],
        &[change(Who::Control("vcpu"), libc::SYS_seccomp, any, Act::Before(allow_ptrace))]),
    case("a network card's filter only logs", ("n0", Check::FilterProgram), &[],
        &[change(Who::Device(2), libc::SYS_seccomp, any, Act::Before(log_only))]),

    // no_new_privs. Devices inherit the broker's, and a filter takes it or a capability.
    case("the broker can gain privileges", ("broker", Check::NoNewPrivileges),
        &[Check::Capabilities("permitted"), Check::Capabilities("effective")],
        &[change(Who::Broker, libc::SYS_prctl, set_no_new_privs, SKIP), change(Who::Broker, libc::SYS_capset, any, SKIP)]),
    case("the control process can gain privileges", ("control", Check::NoNewPrivileges),
        &[Check::SeccompMode, Check::FilterCount, ALL_LANDLOCK[0], ALL_LANDLOCK[1], ALL_LANDLOCK[2], ALL_LANDLOCK[3]],
        &[change(MAIN, libc::SYS_prctl, set_no_new_privs, SKIP), change(MAIN, libc::SYS_landlock_restrict_self, any, SKIP),
          change(MAIN, libc::SYS_seccomp, any, SKIP)]),

    // Dumps.
    case("a disk can be dumped", ("d0", Check::Dumpable), &[],
        &[change(Who::Device(0), libc::SYS_prctl, set_not_dumpable, SKIP), change(Who::Device(0), libc::SYS_prctl, get_dumpable, SKIP)]),
    case("the broker can be dumped", ("broker", Check::Dumpable), &[],
        &[change(Who::Broker, libc::SYS_prctl, set_not_dumpable, SKIP)]),
    case("the control process can be dumped", ("control", Check::Dumpable), &[],
        &[change(MAIN, libc::SYS_prctl, set_not_dumpable, SKIP), change(MAIN, libc::SYS_prctl, get_dumpable, SKIP)]),

    // Capabilities. A control process with one is closed to its broker, which then holds no file of its memory.
    case("a permitted capability is kept", ("control", Check::Capabilities("permitted")), &[Check::MissingDescriptor],
        &[change(MAIN, libc::SYS_capset, any, Act::Before(keep_permitted)), change(MAIN, libc::SYS_capget, any, Act::After(deny_capabilities))]),
    case("an effective capability is kept", ("control", Check::Capabilities("effective")), &[Check::Capabilities("permitted"), Check::MissingDescriptor],
        &[change(MAIN, libc::SYS_capset, any, Act::Before(keep_effective)), change(MAIN, libc::SYS_capget, any, Act::After(deny_capabilities))]),
    case("an inheritable capability is kept", ("control", Check::Capabilities("inheritable")), &[Check::Capabilities("bounding")],
        &[change(MAIN, libc::SYS_prctl, drop_chown, SKIP), change(MAIN, libc::SYS_capset, any, Act::Before(keep_inheritable)),
          change(MAIN, libc::SYS_capget, any, Act::After(deny_capabilities))]),
    case("the bounding set is kept", ("control", Check::Capabilities("bounding")), &[],
        &[change(MAIN, libc::SYS_prctl, drop_chown, SKIP)]),
    case("an ambient capability is kept", ("control", Check::Capabilities("ambient")),
        &[Check::Capabilities("permitted"), Check::Capabilities("inheritable"), Check::Capabilities("bounding"), Check::Securebits, Check::MissingDescriptor],
        &[change(MAIN, libc::SYS_prctl, drop_chown, SKIP),
          change(MAIN, libc::SYS_prctl, set_securebits, Act::Argument(1, |bits| bits & !NO_CAP_AMBIENT_RAISE)),
          change(MAIN, libc::SYS_capset, any, Act::Before(keep_ambient)), change(MAIN, libc::SYS_capset, any, Act::After(raise_ambient)),
          change(MAIN, libc::SYS_prctl, ask_ambient, SKIP), change(MAIN, libc::SYS_capget, any, Act::After(deny_capabilities))]),
    case("the securebits are not locked", ("control", Check::Securebits), &[],
        &[change(MAIN, libc::SYS_prctl, set_securebits, SKIP)]),
    case("the broker keeps all capabilities", ("broker", Check::Capabilities("permitted")), &[Check::Capabilities("effective")],
        &[change(Who::Broker, libc::SYS_capset, any, SKIP)]),
    case("the broker's bounding set is kept", ("broker", Check::Capabilities("bounding")), &[],
        &[change(Who::Broker, libc::SYS_prctl, drop_setpcap, SKIP)]),
    case("a disk's bounding set is kept", ("d0", Check::Capabilities("bounding")), &[],
        &[change(Who::Child(0), libc::SYS_prctl, drop_chown, SKIP)]),
    case("a disk's inheritable set is kept", ("d0", Check::Capabilities("inheritable")), &[Check::Capabilities("bounding")],
        &[change(Who::Child(0), libc::SYS_prctl, drop_chown, SKIP), change(Who::Child(0), libc::SYS_capset, any, Act::Before(keep_inheritable)),
          change(Who::Device(0), libc::SYS_capget, any, Act::After(deny_capabilities))]),
    case("a disk's ambient set is kept, and with it all", ("d0", Check::Capabilities("ambient")),
        &[Check::Capabilities("permitted"), Check::Capabilities("effective"), Check::Capabilities("inheritable"),
          Check::Capabilities("bounding"), Check::Securebits],
        &[change(Who::Child(0), libc::SYS_prctl, drop_chown, SKIP),
          change(Who::Child(0), libc::SYS_prctl, set_securebits, Act::Argument(1, |bits| bits & !NO_CAP_AMBIENT_RAISE)),
          change(Who::Child(0), libc::SYS_capset, any, Act::Before(keep_ambient)),
          change(Who::Child(0), libc::SYS_capset, any, Act::After(raise_ambient)),
          change(Who::Device(0), libc::SYS_prctl, ask_ambient, SKIP),
          change(Who::Device(0), libc::SYS_capget, any, Act::After(deny_capabilities))]),

    // Namespaces.
    case("no user namespace, and so no other", ("d0", Check::Namespace("user")),
        &[Check::Namespace("mnt"), Check::Namespace("pid"), Check::Namespace("net"), Check::Namespace("ipc"), Check::Namespace("uts"),
          Check::Namespace("cgroup"), Check::RootForeign, Check::IdMap, Check::Capabilities("bounding"), Check::Securebits, Check::NestedUsers],
        &[change(Who::Broker, libc::SYS_clone3, makes_user_namespace, Act::Skip(-(libc::EPERM as i64)))]),
    case("the pid namespace is shared", ("d0", Check::Namespace("pid")), &[],
        &[change(Who::Broker, libc::SYS_clone3, any, Act::Before(without_pid_namespace))]),
    namespace!("the mount namespace is shared", "mnt", CLONE_NEWNS, &[Check::RootForeign]),
    namespace!("the network namespace is shared", "net", CLONE_NEWNET, &[]),
    namespace!("the ipc namespace is shared", "ipc", CLONE_NEWIPC, &[]),
    namespace!("the uts namespace is shared", "uts", CLONE_NEWUTS, &[]),
    namespace!("the cgroup namespace is shared", "cgroup", CLONE_NEWCGROUP, &[]),

    // The root folder.
    case("the root is not changed", ("d0", Check::RootForeign), &[],
        &[change(Who::Child(0), libc::SYS_pivot_root, any, SKIP)]),
    case("the root is writable", ("d0", Check::RootWritable), &[],
        &[change(Who::Child(0), libc::SYS_fsmount, any, Act::Argument(2, |attributes| attributes & !ATTR_RDONLY)),
          change(Who::Child(0), libc::SYS_fsconfig, |call| of_root(call, "ro"), SKIP)]),
    case("device files count in the root", ("d0", Check::RootOptions), &[],
        &[change(Who::Child(0), libc::SYS_fsmount, any, Act::Argument(2, |attributes| attributes & !ATTR_NODEV))]),
    case("the root has a file", ("d0", Check::RootNotEmpty), &[Check::RootWritable, Check::RootOptions],
        &[change(Who::Child(0), libc::SYS_fsmount, any, Act::Argument(2, |attributes| attributes & !ATTR_RDONLY)),
          change(Who::Child(0), libc::SYS_fsconfig, |call| of_root(call, "ro"), SKIP),
          change(Who::Child(0), libc::SYS_fsconfig, |call| of_root(call, "nr_inodes"), SKIP),
          change(Who::Child(0), libc::SYS_fsconfig, |call| of_root(call, "mode"), SKIP),
          change(Who::Child(0), libc::SYS_setresuid, any, Act::After(leave_a_folder))]),

    // User and groups.
    // Root cannot be mapped by a broker without CAP_SETFCAP: the kernel wants it since 5.12.
    case("a disk is root outside", ("d0", Check::User), &[Check::IdMap, Check::Capabilities("permitted"), Check::Capabilities("effective")],
        &[change(Who::Broker, libc::SYS_capset, any, SKIP), change(Who::Broker, libc::SYS_write, to_user_map, Act::Before(|tracee| user_map(tracee, "1000 0 1\n")))]),
    case("a disk has all users inside", ("d0", Check::IdMap), &[Check::User, Check::Capabilities("permitted"), Check::Capabilities("effective")],
        &[change(Who::Broker, libc::SYS_capset, any, SKIP), change(Who::Broker, libc::SYS_write, to_user_map, Act::Before(|tracee| user_map(tracee, "0 0 4294967295\n")))]),
    case("the caller's groups are kept", ("d0", Check::Groups), &[],
        &[change(Who::Child(0), libc::SYS_setgroups, any, SKIP)]),

    // Landlock.
    case("a disk without Landlock", ("d0", Check::Landlock("files")), &ALL_LANDLOCK,
        &[change(Who::Device(0), libc::SYS_landlock_restrict_self, any, SKIP)]),
    case("the control process without Landlock", ("control", Check::Landlock("files")), &ALL_LANDLOCK,
        &[change(MAIN, libc::SYS_landlock_restrict_self, any, SKIP)]),
    case("Landlock without files", ("d0", Check::Landlock("files")), &[],
        &[change(Who::Device(0), libc::SYS_landlock_create_ruleset, makes_rules, Act::Before(|tracee| landlock_without(tracee, 0)))]),
    case("Landlock without TCP", ("d0", Check::Landlock("TCP")), &[],
        &[change(Who::Device(0), libc::SYS_landlock_create_ruleset, makes_rules, Act::Before(|tracee| landlock_without(tracee, 8)))]),
    case("Landlock without scopes", ("d0", Check::Landlock("signals")), &[Check::Landlock("abstract sockets")],
        &[change(Who::Device(0), libc::SYS_landlock_create_ruleset, makes_rules, Act::Before(|tracee| landlock_without(tracee, 16)))]),

    // Limits.
    limit!("core files are not limited", "Max core file size", RLIMIT_CORE),
    limit!("message queues are not limited", "Max msgqueue size", RLIMIT_MSGQUEUE),
    limit!("real-time priority is not limited", "Max realtime priority", RLIMIT_RTPRIO),
    limit!("file size is not limited", "Max file size", RLIMIT_FSIZE),
    limit!("private memory is not limited", "Max data size", RLIMIT_DATA),
    limit!("locked memory is not limited", "Max locked memory", RLIMIT_MEMLOCK),
    limit!("threads are not limited", "Max processes", RLIMIT_NPROC),
    limit!("descriptors are not limited", "Max open files", RLIMIT_NOFILE),
    case("a disk is in the caller's session", ("d0", Check::Session), &[],
        &[change(Who::Child(0), libc::SYS_setsid, any, SKIP)]),
    case("a disk has the caller's keys", ("d0", Check::Keys), &[],
        &[change(MAIN, libc::SYS_socketpair, any, Act::Before(join_keys)), change(Who::Child(0), libc::SYS_keyctl, any, SKIP)]),
    case("a network card may make user namespaces", ("n0", Check::NestedUsers), &[],
        &[change(Who::Child(2), libc::SYS_write, to_nested_users, Act::Skip(1))]),
    case("a disk outlives its broker", ("d0", Check::ParentDeath), &[],
        &[change(Who::Child(0), libc::SYS_prctl, set_parent_death, SKIP)]),

    // Descriptors.
    case("a disk holds /dev/kvm", ("d0", Check::ExtraDescriptor), &[],
        &[change(Who::Child(0), libc::SYS_unshare, any, Act::Before(open_kvm)),
          change(Who::Child(0), libc::SYS_execveat, any, Act::Before(keep_at_exec))]),
    case("a network card holds a disk's image", ("n0", Check::ExtraDescriptor), &[],
        &[change(Who::Child(2), libc::SYS_execveat, any, Act::Before(keep_other_image))]),
    case("a disk holds another process's pidfd", ("d0", Check::ExtraDescriptor), &[],
        &[change(Who::Child(0), libc::SYS_execveat, any, Act::Before(keep_pidfd))]),
    case("a disk holds another socket", ("d0", Check::ExtraDescriptor), &[],
        &[change(Who::Device(0), libc::SYS_landlock_restrict_self, any, Act::Before(make_socket))]),
    case("a network card holds another memfd", ("n0", Check::ExtraDescriptor), &[],
        &[change(Who::Device(2), libc::SYS_landlock_restrict_self, any, Act::Before(make_memfd))]),
    case("a disk keeps its start message", ("d0", Check::Descriptor), &[Check::ExtraDescriptor, Check::MissingDescriptor],
        &[change(Who::Device(0), libc::SYS_close, |call| call.arguments[0] == 4, SKIP)]),
    case("a read-only disk may write", ("d1", Check::DescriptorAccess), &[],
        &[change(Who::Broker, libc::SYS_openat, opens_fixed_image, Act::Argument(2, |flags| flags | libc::O_RDWR as u64)),
          change(Who::Device(1), libc::SYS_fcntl, asks_mode, Act::After(pretend_read_only))]),
    case("a disk's log goes elsewhere", ("d0", Check::LogPipe), &[],
        &[change(Who::Child(0), libc::SYS_dup3, to_standard_output, Act::After(replace_log))]),
    case("the control process holds a file of the host", ("control", Check::ExtraDescriptor), &[],
        &[change(MAIN, libc::SYS_landlock_restrict_self, any, Act::Before(leak_host_file))]),
    case("guest RAM is not sealed", ("control", Check::Seals), &[],
        &[change(MAIN, libc::SYS_fcntl, seals_guest_ram, SKIP)]),

    case("what is beside guest RAM can be read", ("control", Check::Guards), &[],
        &[change(MAIN, libc::SYS_mmap, makes_guards, Act::Argument(2, |_| READ))]),
    case("guest RAM has no guard in front", ("control", Check::Guards), &[],
        &[change(MAIN, libc::SYS_landlock_restrict_self, any, Act::Before(|tracee| unmap_guard(tracee, true)))]),
    case("guest RAM has no guard behind", ("control", Check::Guards), &[],
        &[change(MAIN, libc::SYS_landlock_restrict_self, any, Act::Before(|tracee| unmap_guard(tracee, false)))]),

    // A folder of the host: the root is the folder, and some capabilities stay.
    case("no filter of its own on a folder", ("f0", Check::FilterCount), &[],
        &[change(Who::Device(1), libc::SYS_seccomp, any, SKIP)]),
    case("a folder's process has one capability more", ("f0", Check::Capabilities("bounding")), &[],
        &[change(Who::Child(1), libc::SYS_prctl, drop_setpcap, SKIP)]),
    case("a read-only folder is not mounted so", ("f1", Check::RootWritable), &[],
        &[change(Who::Child(2), libc::SYS_mount_setattr, any, Act::Before(|tracee| mount_without(tracee, ATTR_RDONLY))),
          change(Who::Device(2), libc::SYS_statfs, any, Act::After(pretend_restricted))]),
    case("programs count in a folder", ("f0", Check::RootOptions), &[],
        &[change(Who::Child(1), libc::SYS_mount_setattr, any, Act::Before(|tracee| mount_without(tracee, ATTR_NOEXEC))),
          change(Who::Device(1), libc::SYS_statfs, any, Act::After(pretend_restricted))]),
    case("a folder's process has the host's files", ("f0", Check::RootForeign), &[],
        &[change(Who::Child(1), libc::SYS_pivot_root, any, SKIP),
          change(Who::Device(1), libc::SYS_statfs, any, Act::After(pretend_restricted))]),
    case("a folder without Landlock", ("f0", Check::Landlock("files")), &ALL_LANDLOCK,
        &[change(Who::Device(1), libc::SYS_landlock_restrict_self, any, SKIP)]),
    case("a folder's process can be dumped", ("f1", Check::Dumpable), &[],
        &[change(Who::Device(2), libc::SYS_prctl, set_not_dumpable, SKIP), change(Who::Device(2), libc::SYS_prctl, get_dumpable, SKIP)]),
    case("a folder's process holds /dev/kvm", ("f0", Check::ExtraDescriptor), &[],
        &[change(Who::Child(1), libc::SYS_unshare, any, Act::Before(open_kvm)),
          change(Who::Child(1), libc::SYS_execveat, any, Act::Before(keep_at_exec))]),

    // Memory.
    case("a disk has writable code", ("d0", Check::WritableCode), &[],
        &[change(Who::Device(0), libc::SYS_landlock_restrict_self, any, Act::Before(map_writable_code))]),
    case("the control process has writable code", ("control", Check::WritableCode), &[],
        &[change(MAIN, libc::SYS_landlock_restrict_self, any, Act::Before(map_writable_code))]),
    case("a disk maps a file", ("d0", Check::ForeignFile), &[],
        &[change(Who::Device(0), libc::SYS_landlock_restrict_self, any, Act::Before(map_image))]),
    case("the control process maps a file", ("control", Check::ForeignFile), &[],
        &[change(MAIN, libc::SYS_landlock_restrict_self, any, Act::Before(map_host_file))]),
];
