//! Executable memory, guest RAM, and memory that a process should not get.

use super::*;
use crate::escape::{Expect, Held, Jail, Which};
use libc::*;

const OWN_CODE: &str = "code of its own runs in the same jail";
/// By the seal, or before that by the limit of file sizes.
const TOO_LARGE: &[i32] = &[EPERM, EFBIG];
/// io_uring's own memory counts as locked.
const FOR_ITS_RING: Expect = Expect::Either(
    &[EPERM, ENOMEM, EAGAIN],
    "a disk's process may lock 8 MiB, for its ring",
);
const PAGE: Arg = Arg::N(4096);

pub(super) const LIST: &[Attempt] = &[
    one(
        "map-executable",
        SYS_mmap,
        &[
            NULL,
            PAGE,
            n(PROT_READ | PROT_WRITE | PROT_EXEC),
            n(MAP_PRIVATE | MAP_ANONYMOUS),
            NONE,
            n(0),
        ],
    )
    .filter_only(OWN_CODE),
    one(
        "map-image-executable",
        SYS_mmap,
        &[
            NULL,
            PAGE,
            n(PROT_READ | PROT_EXEC),
            n(MAP_PRIVATE),
            Arg::Fd(Which::Ram),
            n(0),
        ],
    )
    .filter_only(OWN_CODE),
    steps("make-executable", make_executable).filter_only(OWN_CODE),
    steps("make-executable-by-key", make_executable_by_key).filter_only(OWN_CODE),
    steps("make-writable-and-executable", make_writable_and_executable).filter_only(OWN_CODE),
    one("read-implies-exec", SYS_personality, &[n(0x0040_0000)]).filter_only(OWN_CODE),
    one("no-randomisation", SYS_personality, &[n(0x0004_0000)])
        .filter_only("for what it executes, and there is nothing to execute"),
    steps("shared-memory-executable", shared_executable).filter_only(OWN_CODE),
    steps("remap-file-pages", remap_file_pages)
        .filter_only("the pages are guest RAM, which it has"),
    steps("execute-memfd", execute_memfd).filter_only(OWN_CODE),
    one(
        "map-page-0",
        SYS_mmap,
        &[
            NULL,
            PAGE,
            n(PROT_READ | PROT_WRITE),
            n(MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED),
            NONE,
            n(0),
        ],
    )
    .passes(),
    one(
        "map-image-for-writing",
        SYS_mmap,
        &[
            NULL,
            PAGE,
            n(PROT_READ | PROT_WRITE),
            n(MAP_SHARED),
            Arg::Fd(Which::Backend),
            n(0),
        ],
    )
    .refused(&[EACCES])
    .passes()
    .on_readonly(),
    one(
        "map-log",
        SYS_mmap,
        &[
            NULL,
            PAGE,
            n(PROT_READ | PROT_WRITE),
            n(MAP_SHARED),
            Arg::Fd(Which::Log),
            n(0),
        ],
    )
    .refused(&[EACCES, ENODEV])
    .passes(),
    one(
        "map-huge-page",
        SYS_mmap,
        &[
            NULL,
            Arg::N(2 << 20),
            n(PROT_READ | PROT_WRITE),
            n(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB),
            NONE,
            n(0),
        ],
    )
    .refused(&[ENOMEM])
    .passes(),
    one(
        "map-shared-nameless",
        SYS_mmap,
        &[
            NULL,
            PAGE,
            n(PROT_READ | PROT_WRITE),
            n(MAP_SHARED | MAP_ANONYMOUS),
            NONE,
            n(0),
        ],
    )
    .filter_only("memory that RLIMIT_DATA does not count; the kernel has no limit for it"),
    one(
        "map-locked",
        SYS_mmap,
        &[
            NULL,
            PAGE,
            n(PROT_READ | PROT_WRITE),
            n(MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED),
            NONE,
            n(0),
        ],
    )
    .refused(&[EPERM, EAGAIN])
    .passes()
    .but(Jail::Block, Expect::KilledOr(&[EPERM]), FOR_ITS_RING),
    one("mlockall", SYS_mlockall, &[n(MCL_CURRENT | MCL_FUTURE)])
        .refused(&[EPERM, ENOMEM])
        .but(Jail::Block, Expect::Killed, FOR_ITS_RING),
    steps("mlock", mlock)
        .refused(&[EPERM, ENOMEM])
        .but(Jail::Block, Expect::Killed, FOR_ITS_RING),
    one("memfd-secret", SYS_memfd_secret, &[n(0)]).either(
        &[ENOSYS],
        "mapping it counts as locked memory, of which there is none",
    ),
    steps("userfaultfd", userfaultfd)
        .filter_only("faults of its own memory only: the kernel's are refused"),
    steps("userfaultfd-of-kernel", userfaultfd_of_kernel),
    one("shrink-ram", SYS_ftruncate, &[Arg::Fd(Which::Ram), n(0)]).passes_in_fs(),
    one(
        "grow-ram",
        SYS_ftruncate,
        &[Arg::Fd(Which::Ram), Arg::N(1 << 40)],
    )
    .refused(TOO_LARGE)
    .passes_in_fs(),
    one(
        "grow-ram-by-fallocate",
        SYS_fallocate,
        &[Arg::Fd(Which::Ram), n(0), n(0), Arg::N(1 << 40)],
    )
    .refused(TOO_LARGE)
    .passes_in_fs(),
    one(
        "grow-ram-by-writing",
        SYS_pwrite64,
        &[Arg::Fd(Which::Ram), Arg::Bytes(b"x"), n(1), Arg::N(1 << 40)],
    )
    .refused(TOO_LARGE)
    .passes(),
    one(
        "seal-ram-against-writing",
        SYS_fcntl,
        &[Arg::Fd(Which::Ram), n(F_ADD_SEALS), n(F_SEAL_FUTURE_WRITE)],
    ),
    one(
        "seal-ram",
        SYS_fcntl,
        &[Arg::Fd(Which::Ram), n(F_ADD_SEALS), n(F_SEAL_SEAL)],
    ),
    one("chmod-ram", SYS_fchmod, &[Arg::Fd(Which::Ram), n(0)]).filter_only_in_fs(
        "its user owns the memory, as it owns files; the descriptors of others keep working",
    ),
    one(
        "lease-ram",
        SYS_fcntl,
        &[Arg::Fd(Which::Ram), n(1024), n(F_RDLCK)],
    )
    .refused(&[EACCES, EAGAIN, EPERM, EINVAL])
    .filter_only_in_fs(
        "its user owns the memory, as it owns files; the descriptors of others keep working",
    ),
    one(
        "swap-ram-out",
        SYS_process_madvise,
        &[Arg::Fd(Which::Ram), Arg::Room(16), n(1), n(21), n(0)],
    )
    .refused(&[EBADF]),
    steps("poison-a-page", poison).refused(&[EPERM, EINVAL]),
    one(
        "mbind-all",
        SYS_set_mempolicy,
        &[
            n(2),
            Arg::Bytes(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            n(64),
        ],
    )
    .either(&[EINVAL, ENOSYS], "where its own memory is taken from"),
    one(
        "move-own-brk",
        SYS_prctl,
        &[n(PR_SET_MM), n(PR_SET_MM_BRK), n(0x1000), NULL, NULL],
    ),
];

fn private(m: &mut dyn Machine) -> Result<u64, Stop> {
    let protection = (PROT_READ | PROT_WRITE) as u64;
    m.call(
        SYS_mmap,
        &[
            0,
            4096,
            protection,
            (MAP_PRIVATE | MAP_ANONYMOUS) as u64,
            u64::MAX,
            0,
        ],
    )
}

fn make_executable(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let page = private(m)?;
    m.call(SYS_mprotect, &[page, 4096, (PROT_READ | PROT_EXEC) as u64])
        .map(Verdict::Through)
}

fn make_executable_by_key(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let page = private(m)?;
    m.call(
        SYS_pkey_mprotect,
        &[page, 4096, (PROT_READ | PROT_EXEC) as u64, u64::MAX],
    )
    .map(Verdict::Through)
}

fn make_writable_and_executable(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let page = private(m)?;
    let all = (PROT_READ | PROT_WRITE | PROT_EXEC) as u64;
    m.call(SYS_mprotect, &[page, 4096, all])
        .map(Verdict::Through)
}

fn shared_executable(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let id = m.call(SYS_shmget, &[IPC_PRIVATE as u64, 4096, 0o700])?;
    m.call(SYS_shmat, &[id, 0, SHM_EXEC as u64])
        .map(Verdict::Through)
}

fn remap_file_pages(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let protection = (PROT_READ | PROT_WRITE) as u64;
    let at = m.call(
        SYS_mmap,
        &[0, 8192, protection, MAP_SHARED as u64, held.ram as u64, 0],
    )?;
    m.call(SYS_remap_file_pages, &[at, 4096, 0, 1, 0])
        .map(Verdict::Through)
}

/// The smallest program: it exits with this status.
pub(crate) const EXECUTED: u8 = 77;

fn execute_memfd(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let name = m.put(b"loot\0")?;
    let fd = m.call(SYS_memfd_create, &[name, 0])?;
    let program = program();
    let at = m.put(&program)?;
    m.call(SYS_write, &[fd, at, program.len() as u64])?;
    let empty = m.put(b"\0")?;
    m.call(SYS_execveat, &[fd, empty, 0, 0, AT_EMPTY_PATH as u64])
        .map(Verdict::Through)
}

/// ELF64 (System V ABI, chapters 4 and 5): a header, one segment, `exit_group(EXECUTED)`.
fn program() -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    let code = [0xbf, EXECUTED, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05];
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(words(&[AT + 120, 64, 0]));
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(words(&[1 | 5 << 32, 0, AT, AT, 132, 132, 4096]));
    elf.extend(code);
    elf
}

fn mlock(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let page = private(m)?;
    m.call(SYS_mlock, &[page, 4096]).map(Verdict::Through)
}

fn userfaultfd(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    m.call(SYS_userfaultfd, &[1]).map(Verdict::Through) // UFFD_USER_MODE_ONLY
}

/// Holds the kernel at a fault of its own: what exploits of races use.
fn userfaultfd_of_kernel(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    m.call(SYS_userfaultfd, &[0]).map(Verdict::Through)
}

/// `MADV_HWPOISON` takes a page away from the host for good.
fn poison(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let page = private(m)?;
    m.call(SYS_madvise, &[page, 4096, MADV_HWPOISON as u64])
        .map(Verdict::Through)
}
