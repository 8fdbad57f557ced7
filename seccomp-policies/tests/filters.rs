//! Filters on live processes: what a policy names works, everything else ends the process.
//!
//! Each case runs in a forked child that installs a policy and makes one raw call.

#![allow(unsafe_code)] // fork(2), and raw calls whose failure is the point

use libc::c_long;
use seccomp_policies::{Action, Policy, in_force, install, install_all_threads, table};
use std::collections::BTreeSet;

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum End {
    /// What the call gave, or the negative errno, cut to a byte.
    Exit(u8),
    Signal(i32),
}

const KILLED: End = End::Signal(libc::SIGSYS);
const NOT_INSTALLED: u8 = 250;

fn errno(number: i32) -> End {
    End::Exit((-number) as u8)
}

/// A byte that a forked child shares with its parent, for policies that do not let a process end.
struct Slot(*mut i16);

impl Slot {
    const EMPTY: i16 = -1;

    fn new() -> Self {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping; touches no memory that is in use.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        let slot = Self(page.cast());
        slot.set(Self::EMPTY);
        slot
    }

    fn set(&self, value: i16) {
        // SAFETY: points to a page that lives as long as `self`; parent and child never use it at once.
        unsafe { self.0.write_volatile(value) };
    }

    fn get(&self) -> i16 {
        // SAFETY: as in `set`.
        unsafe { self.0.read_volatile() }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody else has the address.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// Forks; the child installs `policy`, makes the call and tells its result.
fn child(policy: Policy, action: Action, call: c_long, args: [c_long; 6]) -> End {
    let slot = Slot::new();
    // SAFETY: the child of this threaded process makes only raw calls and allocates nothing.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let status = if install(policy, action).is_ok() {
            let [a, b, c, d, e, f] = args;
            // SAFETY: in a child that does nothing else; pointers are null or to the child's own data.
            match unsafe { libc::syscall(call, a, b, c, d, e, f) } {
                -1 => {
                    End::Exit((-std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) as u8)
                }
                other => End::Exit(other as u8),
            }
        } else {
            End::Exit(NOT_INSTALLED)
        };
        let End::Exit(code) = status else {
            unreachable!()
        };
        slot.set(code.into());
        // SAFETY: ends the child without running the parent's exit handlers, if need be by SIGSYS.
        unsafe { libc::syscall(libc::SYS_exit_group, c_long::from(code)) };
    }
    let mut status = 0;
    // SAFETY: `status` is ours; the pid is our child's.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if slot.get() != Slot::EMPTY {
        End::Exit(slot.get() as u8)
    } else if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status) as u8)
    }
}

fn kill(policy: Policy, call: c_long, args: [c_long; 6]) -> End {
    child(policy, Action::Kill, call, args)
}

const NONE: [c_long; 6] = [0; 6];
const DEVICES: [Policy; 5] = [
    Policy::Block,
    Policy::BlockQcow2,
    Policy::Net,
    Policy::NetVhost,
    Policy::Template,
];
const CONTROL: [Policy; 5] = [
    Policy::ControlMain,
    Policy::ControlPager,
    Policy::ControlQmp,
    Policy::ControlVcpu,
    Policy::ControlWindow,
];
const OZONE: [Policy; 2] = [Policy::OzoneOutside, Policy::OzoneFirst];
const THREADS: [Policy; 13] = [
    Policy::ControlMain,
    Policy::ControlPager,
    Policy::ControlQmp,
    Policy::ControlVcpu,
    Policy::ControlWindow,
    Policy::FsMover,
    Policy::Block,
    Policy::BlockQcow2,
    Policy::Net,
    Policy::NetVhost,
    Policy::Template,
    Policy::OzoneOutside,
    Policy::OzoneFirst,
];

/// `uretprobe` and `uprobe`: the kernel lets these two past every filter, because they belong to
/// code that it put into a process itself; anyone else gets SIGILL or an error.
#[cfg(target_arch = "x86_64")]
const PAST_FILTERS: [c_long; 2] = [335, 336];
#[cfg(not(target_arch = "x86_64"))]
const PAST_FILTERS: [c_long; 0] = [];

/// No descriptor, no address, no process, no user. Not -1, which kill(2) takes for everybody.
const NOBODY: u64 = 0x7fff_fff0;

/// Each argument check lets each of its values through and refuses another, for real.
///
/// What is not checked is [`NOBODY`], so that nothing happens but the filter's answer.
#[test]
fn every_argument_check_accepts_and_refuses() {
    let mut checked = 0;
    for policy in Policy::ALL {
        let rules = policy.info().rules;
        let call = |number, args: [u64; 6]| kill(policy, number, args.map(u64::cast_signed));
        for rule in rules.iter().filter(|r| !r.args.is_empty()) {
            let mut good = [NOBODY; 6];
            for arg in rule.args {
                good[usize::from(arg.index)] = arg.values[0].0;
            }
            for arg in rule.args {
                let at = usize::from(arg.index);
                let name = format!("{policy}: {} {}", rule.call, arg.text);
                for (value, word) in arg.values {
                    let mut args = good;
                    args[at] = *value;
                    assert!(rule.matches(rule.number, &args), "{name}: {word}");
                    let end = call(rule.number, args);
                    match rule.error {
                        None => assert_ne!(end, KILLED, "{name}: {word}"),
                        Some("ENOSYS") => assert_eq!(end, errno(libc::ENOSYS), "{name}"),
                        Some(other) => panic!("{name}: no test of answer {other}"),
                    }
                }
                // Near misses first: the next number, another bit, a bit more.
                let value = arg.values[0].0;
                let bits = (0..32).map(|bit| value ^ (1 << bit));
                let wrong = [value + 1, value.wrapping_sub(1)].into_iter().chain(bits);
                let mut refused = 0;
                for other in wrong.map(|w| w & 0xffff_ffff) {
                    let mut args = good;
                    args[at] = other;
                    if !rules.iter().any(|r| r.matches(rule.number, &args)) {
                        assert_eq!(call(rule.number, args), KILLED, "{name}: {other:#x}");
                        refused += 1;
                    }
                }
                assert!(refused > 0, "{name} refuses nothing");
                checked += 1;
            }
        }
    }
    assert!(checked >= 50, "only {checked} checks");
}

/// Every call number that a policy does not name, and a range that no kernel has, kills.
#[test]
fn every_unnamed_call_kills() {
    for policy in Policy::ALL {
        let named: BTreeSet<_> = policy.info().rules.iter().map(|r| r.number).collect();
        for number in 0..480 {
            if !named.contains(&number) && !PAST_FILTERS.contains(&number) {
                assert_eq!(
                    kill(policy, number, NONE),
                    KILLED,
                    "{policy}: call {number}"
                );
            }
        }
    }
}

/// The numbers of the x32 interface differ by one bit only, and are a way around sloppy filters.
#[test]
#[cfg(target_arch = "x86_64")]
fn x32_calls_kill() {
    for policy in Policy::ALL {
        for rule in policy.info().rules {
            assert_eq!(
                kill(policy, rule.number | 0x4000_0000, NONE),
                KILLED,
                "{policy}: {}",
                rule.call
            );
        }
    }
}

/// The calls that matter most, by name, so that a look-up mistake in the table cannot hide them.
#[test]
fn ways_out_kill() {
    let calls = [
        ("open", libc::SYS_open),
        ("openat", libc::SYS_openat),
        ("openat2", libc::SYS_openat2),
        ("socket", libc::SYS_socket),
        ("connect", libc::SYS_connect),
        ("execve", libc::SYS_execve),
        ("execveat", libc::SYS_execveat),
        ("fork", libc::SYS_fork),
        ("vfork", libc::SYS_vfork),
        ("clone", libc::SYS_clone),
        ("unshare", libc::SYS_unshare),
        ("setns", libc::SYS_setns),
        ("ptrace", libc::SYS_ptrace),
        ("process_vm_readv", libc::SYS_process_vm_readv),
        ("process_vm_writev", libc::SYS_process_vm_writev),
        ("kill", libc::SYS_kill),
        ("mount", libc::SYS_mount),
        ("bpf", libc::SYS_bpf),
        ("perf_event_open", libc::SYS_perf_event_open),
        ("userfaultfd", libc::SYS_userfaultfd),
        ("keyctl", libc::SYS_keyctl),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("memfd_create", libc::SYS_memfd_create),
        ("ftruncate", libc::SYS_ftruncate),
        ("prctl", libc::SYS_prctl),
        ("seccomp", libc::SYS_seccomp),
        ("setresuid", libc::SYS_setresuid),
        ("capset", libc::SYS_capset),
    ];
    for policy in THREADS {
        for (name, number) in calls {
            assert_eq!(kill(policy, number, NONE), KILLED, "{policy}: {name}");
        }
    }
    // The daemon that serves files opens and cuts them, and has no other way.
    for (name, number) in calls {
        if !["openat", "openat2", "ftruncate"].contains(&name) {
            assert_eq!(kill(Policy::VhostUserFs, number, NONE), KILLED, "{name}");
        }
    }
}

#[test]
fn executable_memory_kills() {
    let page = 4096;
    let anonymous = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let rwx = c_long::from(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    let rw = c_long::from(libc::PROT_READ | libc::PROT_WRITE);
    for policy in Policy::ALL {
        assert_eq!(
            kill(policy, libc::SYS_mmap, [0, page, rwx, anonymous, -1, 0]),
            KILLED,
            "{policy}: mmap"
        );
        let mprotect = [0, page, c_long::from(libc::PROT_EXEC), 0, 0, 0];
        // Where it is answered, it is not made either.
        let end = kill(policy, libc::SYS_mprotect, mprotect);
        let answered = errno(libc::ENOSYS);
        assert!(
            end == KILLED || end == answered,
            "{policy}: mprotect: {end:?}"
        );
        // The result is a page address, whose low byte is zero. A thread that only moves data takes no memory.
        let plain = match policy {
            Policy::FsMover => KILLED,
            _ => End::Exit(0),
        };
        assert_eq!(
            kill(policy, libc::SYS_mmap, [0, page, rw, anonymous, -1, 0]),
            plain,
            "{policy}: plain mmap"
        );
    }
}

#[test]
fn arguments_are_checked() {
    let get_flags = c_long::from(libc::F_GETFD);
    let set_owner = c_long::from(libc::F_SETOWN);
    for policy in DEVICES {
        assert_eq!(
            kill(policy, libc::SYS_fcntl, [-1, get_flags, 0, 0, 0, 0]),
            errno(libc::ENOSYS),
            "{policy}"
        );
        assert_eq!(
            kill(policy, libc::SYS_fcntl, [-1, set_owner, 0, 0, 0, 0]),
            KILLED,
            "{policy}"
        );
    }
    // A user that can be taken back, and none that cannot; locks that do not wait.
    let fs = |call, args| kill(Policy::VhostUserFs, call, args);
    for call in [libc::SYS_setresuid, libc::SYS_setresgid] {
        assert_eq!(fs(call, [-1, -1, -1, 0, 0, 0]), End::Exit(0));
        assert_eq!(fs(call, [0, -1, -1, 0, 0, 0]), KILLED);
        assert_eq!(fs(call, [-1, -1, 0, 0, 0, 0]), KILLED);
    }
    let (lock, try_lock) = (libc::LOCK_EX, libc::LOCK_EX | libc::LOCK_NB);
    assert_eq!(
        fs(libc::SYS_flock, [-1, c_long::from(lock), 0, 0, 0, 0]),
        KILLED
    );
    assert_eq!(
        fs(libc::SYS_flock, [-1, c_long::from(try_lock), 0, 0, 0, 0]),
        errno(libc::EBADF)
    );
    let ioctl = |policy, request| kill(policy, libc::SYS_ioctl, [-1, request, 0, 0, 0, 0]);
    const KVM_RUN: c_long = 0xae80;
    const KVM_CREATE_VM: c_long = 0xae01;
    assert_eq!(ioctl(Policy::ControlVcpu, KVM_RUN), errno(libc::EBADF));
    assert_eq!(ioctl(Policy::ControlVcpu, KVM_CREATE_VM), KILLED);
    assert_eq!(ioctl(Policy::ControlMain, KVM_RUN), KILLED);
    assert_eq!(ioctl(Policy::ControlQmp, KVM_RUN), KILLED);
    assert_eq!(
        ioctl(Policy::Net, libc::TUNSETOFFLOAD as c_long),
        errno(libc::EBADF)
    );
    assert_eq!(ioctl(Policy::Net, libc::TUNSETIFF as c_long), KILLED);
    assert_eq!(ioctl(Policy::Block, libc::TIOCSTI as c_long), KILLED);
    // A signal that is not a kick cannot be sent.
    let tgkill = |signal| {
        kill(
            Policy::ControlMain,
            libc::SYS_tgkill,
            [-1, -1, c_long::from(signal), 0, 0, 0],
        )
    };
    assert_eq!(tgkill(libc::SIGRTMIN()), errno(libc::EINVAL));
    assert_eq!(tgkill(libc::SIGKILL), KILLED);
}

/// The two processes of `ozone` that stay: one is root's, and must not signal what it likes; the other may only signal its VM.
#[test]
fn ozones_signals_are_those_of_a_manager() {
    let signal =
        |policy, number, sig: i32| kill(policy, number, [-1, c_long::from(sig), 0, 0, 0, 0]);
    let outside = Policy::OzoneOutside;
    for (sig, end) in [(libc::SIGKILL, errno(libc::EBADF)), (libc::SIGTERM, KILLED)] {
        assert_eq!(signal(outside, libc::SYS_pidfd_send_signal, sig), end);
    }
    for number in [
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_tgkill,
        libc::SYS_rt_sigqueueinfo,
    ] {
        assert_eq!(
            signal(outside, number, libc::SIGTERM),
            KILLED,
            "call {number}"
        );
    }
    // A process group that is not there: the call is made, and nobody gets the signal.
    let nobody = |sig: i32| {
        kill(
            Policy::OzoneFirst,
            libc::SYS_kill,
            [c_long::from(i32::MIN + 1), c_long::from(sig), 0, 0, 0, 0],
        )
    };
    for sig in [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
    ] {
        assert_eq!(nobody(sig), errno(libc::ESRCH), "signal {sig}");
    }
    for sig in [0, libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV] {
        assert_eq!(nobody(sig), KILLED, "signal {sig}");
    }
    let option = |option: i32| {
        kill(
            Policy::OzoneFirst,
            libc::SYS_prctl,
            [c_long::from(option), 0, 0, 0, 0, 0],
        )
    };
    assert_eq!(option(libc::PR_SET_PDEATHSIG), End::Exit(0));
    assert_eq!(option(libc::PR_SET_DUMPABLE), KILLED);
}

#[test]
fn plain_work_goes_on() {
    for policy in THREADS {
        if policy == Policy::OzoneFirst {
            continue; // it has nothing to write to
        }
        let bad = [-1, 0, 0, 0, 0, 0];
        // What a mover uses is opened and closed by another thread.
        let close = match policy {
            Policy::FsMover => KILLED,
            _ => errno(libc::EBADF),
        };
        assert_eq!(kill(policy, libc::SYS_close, bad), close, "{policy}: close");
        assert_eq!(
            kill(policy, libc::SYS_write, bad),
            errno(libc::EBADF),
            "{policy}: write"
        );
        // Threads besides the first neither end nor end the process.
        let ends = ![
            Policy::ControlQmp,
            Policy::ControlVcpu,
            Policy::ControlWindow,
            Policy::FsMover,
        ]
        .contains(&policy);
        assert_eq!(
            kill(policy, libc::SYS_exit_group, [7, 0, 0, 0, 0, 0]),
            if ends { End::Exit(7) } else { KILLED },
            "{policy}: exit"
        );
    }
    for policy in CONTROL {
        let wake = c_long::from(libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG);
        let requeue = c_long::from(libc::FUTEX_REQUEUE | libc::FUTEX_PRIVATE_FLAG);
        let futex = |op| kill(policy, libc::SYS_futex, [0, op, 0, 0, 0, 0]);
        assert_eq!(futex(wake), End::Exit(0), "{policy}: wake");
        assert_eq!(futex(requeue), KILLED, "{policy}: requeue");
    }
    let pwrite = [-1, 0, 0, 0, 0, 0];
    assert_eq!(
        kill(Policy::Block, libc::SYS_pwritev, pwrite),
        errno(libc::EBADF)
    );
    assert_eq!(kill(Policy::Net, libc::SYS_pwrite64, pwrite), KILLED);
}

/// libc must take "no such call" for an answer and try clone, whose flags a filter can see.
#[test]
fn clone3_is_not_implemented() {
    for policy in THREADS.into_iter().chain([Policy::VhostUserFs]) {
        // A thread that only moves data has nothing behind its back that would start one.
        let answer = match policy {
            Policy::FsMover => KILLED,
            _ => errno(libc::ENOSYS),
        };
        assert_eq!(kill(policy, libc::SYS_clone3, NONE), answer, "{policy}");
    }
    assert_eq!(
        kill(Policy::Broker, libc::SYS_clone3, NONE),
        errno(libc::EINVAL)
    );
}

#[test]
fn other_actions_are_chosen_not_built() {
    let call = |action| child(Policy::Template, action, libc::SYS_getppid, NONE);
    assert_eq!(in_force(Policy::Template), None, "only children install it");
    assert_eq!(call(Action::Kill), KILLED);
    assert_eq!(call(Action::Trap), KILLED, "nobody handles the signal");
    assert!(
        matches!(call(Action::Log), End::Exit(_)),
        "logged and let through"
    );
}

/// A device's filter comes on top of the broker's, and the narrower one decides.
#[test]
fn a_second_filter_narrows() {
    // SAFETY: as in `child`.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let done = install(Policy::Broker, Action::Kill)
            .and_then(|()| install_all_threads(Policy::Block, Action::Kill));
        let code = if done.is_ok() {
            0
        } else {
            c_long::from(NOT_INSTALLED)
        };
        // SAFETY: raw calls in the child.
        unsafe {
            if libc::syscall(libc::SYS_pwrite64, -1, 0, 0, 0) != -1 {
                libc::syscall(libc::SYS_exit_group, 1);
            }
            if code == 0 {
                libc::syscall(libc::SYS_openat, 0, 0, 0, 0);
            }
            libc::syscall(libc::SYS_exit_group, code);
        }
    }
    let mut status = 0;
    // SAFETY: `status` is ours; the pid is our child's.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS,
        "status {status:#x}"
    );
}

#[test]
fn the_table_tells_what_is_installed() {
    assert_eq!(table().len(), Policy::ALL.len());
    for policy in Policy::ALL {
        let info = policy.info();
        assert!(
            table().iter().any(|t| std::ptr::eq(*t, info)),
            "{policy} is not in the table"
        );
        let allowed = info.rules.iter();
        let allowed = allowed.filter(|r| r.error.is_none() && r.child.is_none());
        let distinct: BTreeSet<_> = allowed.map(|r| r.call).collect();
        assert_eq!(info.syscalls, distinct.len());
        assert!(info.syscalls <= info.budget, "{policy}");
        assert!(info.instructions < 4096);
        for rule in info.rules {
            assert!(
                rule.why.len() >= 10 && rule.from.starts_with("policies/"),
                "{policy}: {}",
                rule.call
            );
        }
    }
    let number = |name| {
        Policy::Block
            .info()
            .rules
            .iter()
            .find(|r| r.call == name)
            .map(|r| r.number)
    };
    assert_eq!(number("pwritev"), Some(libc::SYS_pwritev));
    assert_eq!(number("fdatasync"), Some(libc::SYS_fdatasync));
}

/// What libc and std do behind a program's back, allocation, locks, a thread's end, stays possible.
#[test]
fn the_runtime_works_under_every_policy() {
    let me = std::env::current_exe().unwrap();
    let probe = me
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .join("examples/runtime_probe");
    let run = |policy: Policy, main: bool| {
        let mut command = std::process::Command::new(&probe);
        command.arg(policy.to_string()).args(main.then_some("main"));
        let status = command.status().unwrap();
        assert!(status.success(), "{policy}, main thread {main}: {status}");
    };
    for policy in DEVICES.into_iter().chain(OZONE) {
        run(policy, true);
    }
    for policy in CONTROL {
        run(policy, false);
    }
    run(Policy::ControlMain, true);
    run(Policy::Broker, true);
}
