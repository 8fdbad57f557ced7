//! The host itself: modules, clocks, tracing, ports, and the large interfaces of the kernel.

use super::*;
use crate::escape::{Expect, Held, Jail, Which};
use libc::*;

pub(super) const LIST: &[Attempt] = &[
    one("bpf-map", SYS_bpf, &[n(0), Arg::Bytes(BPF_ARRAY), n(72)]),
    one("bpf-program", SYS_bpf, &[n(5), Arg::Room(72), n(72)]).refused(&[EPERM, EINVAL, E2BIG]),
    one(
        "perf-of-kernel",
        SYS_perf_event_open,
        &[Arg::Bytes(PERF), NONE, n(0), NONE, n(0)],
    )
    .refused(&[EACCES, EPERM, ENOENT]),
    one(
        "perf-of-self",
        SYS_perf_event_open,
        &[Arg::Bytes(PERF_SELF), n(0), NONE, NONE, n(0)],
    )
    .either(&[EACCES, EPERM, ENOENT, ENOSYS], "its own processor time"),
    one("io-uring", SYS_io_uring_setup, &[n(4), Arg::Room(120)]).either(
        &[ENOMEM, EPERM, ENOSYS],
        "its calls are checked as this process's own",
    ),
    steps("io-uring-open", io_uring_open).refused(&[EACCES, ENOENT, ENOMEM, EPERM, ENOSYS]),
    steps("io-uring-socket", io_uring_connect).refused(&[
        EACCES,
        ENETUNREACH,
        EINVAL,
        ENOMEM,
        EPERM,
        ENOSYS,
    ]),
    one(
        "io-uring-enter",
        SYS_io_uring_enter,
        &[Arg::Fd(Which::Socket), n(1), n(0), n(0), NULL, n(0)],
    )
    .refused(&[EOPNOTSUPP, EBADF])
    .but(
        Jail::Block,
        Expect::KilledOr(&[EOPNOTSUPP]),
        Expect::Refused(&[EOPNOTSUPP]),
    ),
    // A disk's own ring: what it may do was said before the jail was shut.
    own_ring("own-ring-open", own_ring_open),
    own_ring("own-ring-socket", own_ring_socket),
    own_ring("own-ring-send", own_ring_send),
    own_ring("own-ring-poll", own_ring_poll),
    own_ring("own-ring-close", own_ring_close),
    own_ring("own-ring-unlink", own_ring_unlink),
    own_ring("own-ring-splice", own_ring_splice),
    own_ring("own-ring-command", own_ring_command),
    own_ring("own-ring-message", own_ring_message),
    own_ring("own-ring-timeout", own_ring_timeout),
    own_ring("own-ring-fixed-file", own_ring_fixed_file),
    one(
        "own-ring-register-files",
        SYS_io_uring_register,
        &[Arg::Fd(Which::Ring), n(2), Arg::Bytes(&[3, 0, 0, 0]), n(1)],
    )
    .refused(&[EACCES])
    .only(&[Jail::Block]),
    one(
        "own-ring-lift-restrictions",
        SYS_io_uring_register,
        &[Arg::Fd(Which::Ring), n(11), Arg::Room(16), n(1)],
    )
    .refused(&[EACCES, EBADFD])
    .only(&[Jail::Block]),
    one(
        "io-uring-register",
        SYS_io_uring_register,
        &[Arg::Fd(Which::Socket), n(0), NULL, n(0)],
    )
    .refused(&[EOPNOTSUPP, EBADF, EINVAL]),
    one("aio", SYS_io_setup, &[n(1), Arg::Room(8)])
        .filter_only("its calls are checked as this process's own"),
    one(
        "load-module",
        SYS_init_module,
        &[Arg::Room(64), n(64), Arg::Bytes(b"\0")],
    )
    .refused(&[EPERM, ENOSYS]),
    one(
        "load-module-file",
        SYS_finit_module,
        &[Arg::Fd(Which::Backend), Arg::Bytes(b"\0"), n(0)],
    )
    .refused(&[EPERM, ENOSYS]),
    one(
        "remove-module",
        SYS_delete_module,
        &[Arg::Bytes(b"kvm\0"), n(0)],
    )
    .refused(&[EPERM, ENOSYS]),
    one("kexec", SYS_kexec_load, &[n(0), n(0), NULL, n(0)]).refused(&[EPERM, ENOSYS]),
    one(
        "kexec-file",
        SYS_kexec_file_load,
        &[Arg::Fd(Which::Backend), NONE, n(0), NULL, n(4)],
    )
    .refused(&[EPERM, ENOSYS]),
    one(
        "reboot",
        SYS_reboot,
        &[Arg::N(0xfee1_dead), Arg::N(672_274_793), Arg::N(0), NULL],
    ),
    one("swap-on", SYS_swapon, &[Arg::Bytes(b"/loot\0"), n(0)]),
    one("swap-off", SYS_swapoff, &[Arg::Bytes(b"/loot\0")]),
    one(
        "quota",
        SYS_quotactl,
        &[Arg::N(0x8000_0300), Arg::Bytes(b"/\0"), n(0), Arg::Room(64)],
    )
    .refused(&[EPERM, ENOTBLK, ENOENT, EACCES]),
    one("kernel-log", SYS_syslog, &[n(3), Arg::Room(64), n(64)]),
    one("clear-kernel-log", SYS_syslog, &[n(5), NULL, n(0)]),
    one("set-clock", SYS_clock_settime, &[n(0), Arg::Room(16)]),
    one("set-time-of-day", SYS_settimeofday, &[Arg::Room(16), NULL]),
    one("adjust-clock", SYS_adjtimex, &[Arg::Bytes(&[0xff; 208])]).refused(&[EPERM, EINVAL]),
    one(
        "wake-alarm",
        SYS_timer_create,
        &[n(CLOCK_BOOTTIME_ALARM), NULL, Arg::Room(8)],
    )
    .refused(&[EPERM, EOPNOTSUPP]),
    one("io-ports", SYS_iopl, &[n(3)]).refused(&[EPERM, ENOSYS]),
    one("io-port", SYS_ioperm, &[n(0x60), n(1), n(1)]).refused(&[EPERM, ENOSYS]),
    one(
        "local-descriptor-table",
        SYS_modify_ldt,
        &[n(1), Arg::Bytes(LDT), n(16)],
    )
    .filter_only("a segment of its own; the kernel's code behind it"),
    one("hang-up-terminal", SYS_vhangup, &[]),
    one(
        "lookup-cookie",
        SYS_lookup_dcookie,
        &[n(1), Arg::Room(64), n(64)],
    )
    .refused(&[EPERM, ENOSYS]),
    one("old-sysctl", SYS__sysctl, &[Arg::Room(64)]).refused(&[ENOSYS]),
    one("nfs-server", SYS_nfsservctl, &[n(0), NULL, NULL]).refused(&[ENOSYS]),
    one("use-library", SYS_uselib, &[Arg::Bytes(b"/lib/x\0")]).refused(&[ENOSYS, EACCES, ENOENT]),
    one(
        "restart-sequence",
        SYS_rseq,
        &[Arg::Room(64), n(32), n(0), n(0x5305_3053)],
    )
    .refused(&[EINVAL, EBUSY, EPERM]),
    one(
        "core-scheduling",
        SYS_prctl,
        &[n(62), n(1), n(2), n(0), NULL],
    )
    .refused(&[ESRCH, ENODEV, EINVAL]),
    one("speculation", SYS_prctl, &[n(53), n(0), n(2), NULL, NULL])
        .refused(&[EPERM, ENXIO, ENODEV, ERANGE]),
    one(
        "speed-of-signals",
        SYS_prctl,
        &[n(PR_SET_TIMERSLACK), n(1), NULL, NULL, NULL],
    )
    .filter_only("its own timers"),
    one(
        "disable-tsc",
        SYS_prctl,
        &[n(PR_SET_TSC), n(2), NULL, NULL, NULL],
    )
    .filter_only("its own"),
    one("gs-base", SYS_arch_prctl, &[n(0x1001), Arg::N(0x1000)]).filter_only("its own register"),
    one("amx-permission", SYS_arch_prctl, &[n(0x1023), n(18)])
        .refused(&[EINVAL, EOPNOTSUPP, ENODEV, EPERM]),
    one("monitor-memory", SYS_membarrier, &[n(2), n(0), n(0)])
        .refused(&[EPERM, EINVAL])
        .rest_expedited(),
];

impl Attempt {
    /// `MEMBARRIER_CMD_GLOBAL_EXPEDITED` interrupts processors that run threads which registered for it.
    const fn rest_expedited(self) -> Self {
        self.filter_only("an interrupt for processors whose threads asked for it")
    }
}

/// `union bpf_attr`: an array of one, 4 and 4 bytes.
const BPF_ARRAY: &[u8] = &{
    let mut attributes = [0u8; 72];
    attributes[0] = 2;
    attributes[4] = 4;
    attributes[8] = 4;
    attributes[12] = 1;
    attributes
};

/// `struct perf_event_attr`: software processor clock, of all.
const PERF: &[u8] = &perf(0);
/// The same, without the kernel.
const PERF_SELF: &[u8] = &perf(1 << 5 | 1 << 6);

const fn perf(flags: u8) -> [u8; 128] {
    let mut attributes = [0u8; 128];
    attributes[0] = 1;
    attributes[4] = 128;
    attributes[40] = flags;
    attributes
}

/// `struct user_desc`: a small data segment.
const LDT: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 1, 0, 0, 0];

/// A ring of four with one entry in it; the result of that (`io_uring_cqe.res`).
fn through_ring(m: &mut dyn Machine, entry: &[u8; 64]) -> Result<u64, Stop> {
    let parameters = m.put(&[0; 120])?;
    let ring = m.call(SYS_io_uring_setup, &[4, parameters])?;
    let p = m.get(parameters, 120)?;
    let word = |bytes: &[u8], at: usize| {
        u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    // struct io_uring_params: sq_off at 40 (head, tail, mask, entries, flags, dropped, array), cq_off at 80 (…, cqes at 20).
    let (tail, array) = (word(&p, 44), word(&p, 64));
    let completions = word(&p, 100);
    let protection = (PROT_READ | PROT_WRITE) as u64;
    let map = |m: &mut dyn Machine, offset: u64| {
        m.call(
            SYS_mmap,
            &[0, 4096, protection, MAP_SHARED as u64, ring, offset],
        )
    };
    // One mapping holds both rings since Linux 5.4; the entries have their own.
    let rings = map(m, 0)?;
    let entries = map(m, 0x1000_0000)?;
    m.set(entries, entry)?;
    m.set(rings + u64::from(array), &0u32.to_ne_bytes())?;
    m.set(rings + u64::from(tail), &1u32.to_ne_bytes())?;
    m.call(SYS_io_uring_enter, &[ring, 1, 1, 1, 0, 0])?;
    let completion = m.get(rings + u64::from(completions), 16)?;
    match word(&completion, 8).cast_signed() {
        error @ ..0 => Err(Stop::Errno(-error)),
        value => Ok(value as u64),
    }
}

/// `IORING_OP_OPENAT` of a path: no system call of that name is ever made.
fn io_uring_open(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let path = m.put(b"/etc/passwd\0")?;
    let mut entry = [0; 64];
    entry[0] = 18;
    entry[4..8].copy_from_slice(&AT_FDCWD.to_ne_bytes());
    entry[16..24].copy_from_slice(&path.to_ne_bytes());
    through_ring(m, &entry).map(Verdict::Through)
}

/// `IORING_OP_SOCKET`, then `IORING_OP_CONNECT` in another ring.
fn io_uring_connect(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let mut entry = [0; 64];
    entry[0] = 45;
    entry[4..8].copy_from_slice(&AF_INET.to_ne_bytes());
    entry[8] = SOCK_STREAM as u8;
    let fd = through_ring(m, &entry)?;
    let mut address = vec![2, 0, 0, 80, 192, 0, 2, 1];
    address.extend([0; 8]);
    let at = m.put(&address)?;
    let mut entry = [0; 64];
    entry[0] = 16;
    entry[4..8].copy_from_slice(&(fd as u32).to_ne_bytes());
    entry[8..16].copy_from_slice(&16u64.to_ne_bytes());
    entry[16..24].copy_from_slice(&at.to_ne_bytes());
    through_ring(m, &entry).map(Verdict::Through)
}

const fn own_ring(
    name: &'static str,
    make: fn(&mut dyn Machine, &Held) -> Result<Verdict, Stop>,
) -> Attempt {
    steps(name, make)
        .refused(&[EACCES])
        .passes()
        .only(&[Jail::Block])
}

/// One entry through the ring that the process has, which nothing else uses; the result of that.
fn through_own_ring(m: &mut dyn Machine, held: &Held, entry: &[u8; 64]) -> Result<Verdict, Stop> {
    let ring = held.ring as u64;
    let protection = (PROT_READ | PROT_WRITE) as u64;
    let map = |m: &mut dyn Machine, offset: u64| {
        m.call(
            SYS_mmap,
            &[0, 4096, protection, MAP_SHARED as u64, ring, offset],
        )
    };
    let rings = map(m, 0)?;
    let entries = map(m, 0x1000_0000)?;
    let page = m.get(rings, 64)?;
    let word = |at: usize| u32::from_ne_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
    // Where Linux 5.4 and later put them: head and tail of the entries, of the completions, the masks, the sizes; then the
    // completions, and behind them the entries' numbers.
    let (tail, done, completions) = (word(4), word(12), word(28));
    let array = 64 + 16 * completions;
    m.set(entries, entry)?;
    let slot = u64::from(tail & word(16));
    m.set(rings + u64::from(array) + 4 * slot, &0u32.to_ne_bytes())?;
    m.set(rings + 4, &tail.wrapping_add(1).to_ne_bytes())?;
    m.call(SYS_io_uring_enter, &[ring, 1, 1, 1, 0, 0])?;
    let at = rings + 64 + 16 * u64::from(done & word(20));
    let completion = m.get(at, 16)?;
    match i32::from_ne_bytes([completion[8], completion[9], completion[10], completion[11]]) {
        error @ ..0 => Err(Stop::Errno(-error)),
        value => Ok(Verdict::Through(value as u64)),
    }
}

/// `struct io_uring_sqe`: operation, flags, descriptor, offset or second address, address, length.
fn entry(operation: u8, flags: u8, fd: i32, offset: u64, address: u64, length: u32) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = operation;
    entry[1] = flags;
    entry[4..8].copy_from_slice(&fd.to_ne_bytes());
    entry[8..16].copy_from_slice(&offset.to_ne_bytes());
    entry[16..24].copy_from_slice(&address.to_ne_bytes());
    entry[24..28].copy_from_slice(&length.to_ne_bytes());
    entry
}

fn own_ring_open(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let path = m.put(b"/\0")?;
    through_own_ring(m, held, &entry(18, 0, AT_FDCWD, 0, path, 0))
}

fn own_ring_socket(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    through_own_ring(m, held, &entry(45, 0, AF_UNIX, SOCK_STREAM as u64, 0, 0))
}

fn own_ring_send(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let bytes = m.put(b"out")?;
    through_own_ring(m, held, &entry(26, 0, held.socket, 0, bytes, 3))
}

fn own_ring_poll(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    through_own_ring(m, held, &entry(6, 0, held.kick, 0, 0, 0))
}

fn own_ring_close(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    through_own_ring(m, held, &entry(19, 0, held.log, 0, 0, 0))
}

fn own_ring_unlink(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let path = m.put(b"/x\0")?;
    through_own_ring(m, held, &entry(36, 0, AT_FDCWD, 0, path, 0))
}

fn own_ring_splice(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    through_own_ring(m, held, &entry(30, 0, held.log, 0, 0, 1))
}

/// `IORING_OP_URING_CMD`: a driver's own commands, of a block device for one.
fn own_ring_command(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    through_own_ring(m, held, &entry(46, 0, held.backend, 0, 0, 0))
}

/// `IORING_OP_MSG_RING`: descriptors pass between rings.
fn own_ring_message(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    through_own_ring(m, held, &entry(40, 0, held.ring, 0, 0, 0))
}

fn own_ring_timeout(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let time = m.put(&[0; 16])?;
    through_own_ring(m, held, &entry(11, 0, -1, 0, time, 1))
}

/// A read, with a flag that the device never gives (`IOSQE_FIXED_FILE`).
fn own_ring_fixed_file(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let room = m.put(&[0; 16])?;
    through_own_ring(m, held, &entry(22, 1, 0, 0, room, 16))
}
