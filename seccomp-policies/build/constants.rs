//! Names that policy files may use instead of numbers.
//!
//! Values are those of the kernel's generic headers, equal on `x86_64` and `aarch64`; a test
//! compares those that `libc` also has. ioctl numbers follow `asm-generic/ioctl.h`.

const fn ioc(dir: u64, kind: u8, nr: u64, size: u64) -> u64 {
    (dir << 30) | (size << 16) | ((kind as u64) << 8) | nr
}
const fn io(kind: u8, nr: u64) -> u64 {
    ioc(0, kind, nr, 0)
}
const fn iow(kind: u8, nr: u64, size: u64) -> u64 {
    ioc(1, kind, nr, size)
}
const fn ior(kind: u8, nr: u64, size: u64) -> u64 {
    ioc(2, kind, nr, size)
}
const fn iowr(kind: u8, nr: u64, size: u64) -> u64 {
    ioc(3, kind, nr, size)
}

const KVM: u8 = 0xAE; // include/uapi/linux/kvm.h: KVMIO
const VHOST: u8 = 0xAF; // include/uapi/linux/vhost.h: VHOST_VIRTIO
const TUN: u8 = b'T'; // include/uapi/linux/if_tun.h

/// Every name, with its value.
pub(crate) const TABLE: &[(&str, u64)] = &[
    // mmap(2), mprotect(2)
    ("PROT_NONE", 0),
    ("PROT_READ", 1),
    ("PROT_WRITE", 2),
    ("PROT_EXEC", 4),
    ("MAP_SHARED", 1),
    ("MAP_PRIVATE", 2),
    ("MAP_FIXED", 0x10),
    ("MAP_ANONYMOUS", 0x20),
    ("MAP_NORESERVE", 0x4000),
    ("MAP_STACK", 0x20000),
    // madvise(2)
    ("MADV_DONTNEED", 4),
    ("MADV_REMOVE", 9),
    ("MADV_HUGEPAGE", 14),
    ("MADV_DONTDUMP", 16),
    ("MADV_POPULATE_WRITE", 23),
    // keyctl(2)
    ("KEYCTL_JOIN_SESSION_KEYRING", 1),
    // fcntl(2)
    ("F_DUPFD", 0),
    ("F_GETFD", 1),
    ("F_SETFD", 2),
    ("F_GETFL", 3),
    ("F_SETFL", 4),
    ("F_OFD_GETLK", 36),
    ("F_OFD_SETLK", 37),
    ("F_DUPFD_CLOEXEC", 1030),
    ("F_ADD_SEALS", 1033),
    ("F_GET_SEALS", 1034),
    // io_uring_register(2)
    ("IORING_REGISTER_RESTRICTIONS", 11),
    ("IORING_REGISTER_ENABLE_RINGS", 12),
    ("IORING_REGISTER_IOWQ_AFF", 17),
    ("IORING_REGISTER_IOWQ_MAX_WORKERS", 19),
    // fallocate(2)
    ("FALLOC_FL_KEEP_SIZE", 1),
    ("FALLOC_FL_PUNCH_HOLE", 2),
    ("FALLOC_FL_ZERO_RANGE", 0x10),
    // lseek(2)
    ("SEEK_SET", 0),
    ("SEEK_CUR", 1),
    ("SEEK_END", 2),
    ("SEEK_DATA", 3),
    ("SEEK_HOLE", 4),
    // clock_gettime(2)
    ("CLOCK_REALTIME", 0),
    // shutdown(2)
    ("SHUT_RD", 0),
    ("SHUT_WR", 1),
    ("SHUT_RDWR", 2),
    // futex(2); the private flag is 128
    ("FUTEX_WAIT", 0),
    ("FUTEX_WAKE", 1),
    ("FUTEX_REQUEUE", 3),
    ("FUTEX_WAIT_BITSET", 9),
    ("FUTEX_PRIVATE_FLAG", 128),
    ("FUTEX_CLOCK_REALTIME", 256),
    // prctl(2), seccomp(2)
    ("PR_SET_PDEATHSIG", 1),
    ("PR_GET_DUMPABLE", 3),
    ("PR_SET_DUMPABLE", 4),
    ("PR_SET_NAME", 15),
    ("PR_CAPBSET_READ", 23),
    ("PR_CAPBSET_DROP", 24),
    ("PR_GET_SECUREBITS", 27),
    ("PR_SET_SECUREBITS", 28),
    ("PR_GET_SECCOMP", 21),
    ("PR_SET_NO_NEW_PRIVS", 38),
    ("PR_GET_NO_NEW_PRIVS", 39),
    ("PR_CAP_AMBIENT", 47),
    ("SECCOMP_SET_MODE_FILTER", 1),
    // signals
    ("SIGHUP", 1),
    ("SIGINT", 2),
    ("SIGQUIT", 3),
    ("SIGABRT", 6),
    ("SIGKILL", 9),
    ("SIGUSR1", 10),
    ("SIGUSR2", 12),
    ("SIGTERM", 15),
    ("SIGCHLD", 17),
    ("SIGRTMIN", 34), // glibc keeps 32 and 33 for itself
    // open(2), dup3(2)
    ("O_CLOEXEC", 0x8_0000),
    // clone(2)
    ("CLONE_VM", 0x100),
    ("CLONE_FS", 0x200),
    ("CLONE_FILES", 0x400),
    ("CLONE_SIGHAND", 0x800),
    ("CLONE_PIDFD", 0x1000),
    ("CLONE_THREAD", 0x1_0000),
    ("CLONE_NEWNS", 0x2_0000),
    ("MS_REC", 0x4000),
    ("MS_PRIVATE", 0x4_0000),
    ("CLONE_SYSVSEM", 0x4_0000),
    ("CLONE_SETTLS", 0x8_0000),
    ("CLONE_PARENT_SETTID", 0x10_0000),
    ("CLONE_CHILD_CLEARTID", 0x20_0000),
    ("CLONE_NEWCGROUP", 0x200_0000),
    ("CLONE_NEWUTS", 0x400_0000),
    ("CLONE_NEWIPC", 0x800_0000),
    ("CLONE_NEWUSER", 0x1000_0000),
    ("CLONE_NEWPID", 0x2000_0000),
    ("CLONE_NEWNET", 0x4000_0000),
    // timer_create(2)
    ("CLOCK_MONOTONIC", 1),
    // sockets
    ("AF_UNIX", 1),
    ("SOCK_STREAM", 1),
    ("SOCK_CLOEXEC", 0x80000),
    ("AF_INET", 2),
    ("AF_INET6", 10),
    ("AF_VSOCK", 40),
    // execveat(2)
    ("AT_EMPTY_PATH", 0x1000),
    // terminals and files (asm-generic/ioctls.h)
    ("TCGETS", 0x5401),
    ("TCSETS", 0x5402),
    ("TCSETSW", 0x5403),
    ("TCSETSF", 0x5404),
    ("TIOCGPTN", 0x8004_5430),
    ("TIOCSPTLCK", 0x4004_5431),
    ("TIOCGWINSZ", 0x5413),
    ("FIONREAD", 0x541B),
    ("FIONBIO", 0x5421),
    ("SIOCGIFINDEX", 0x8933),
    ("FIOCLEX", 0x5451),
    ("BLKDISCARD", io(0x12, 119)),
    ("BLKZEROOUT", io(0x12, 127)),
    ("BLKGETSIZE64", ior(0x12, 114, 8)),
    ("BLKSSZGET", io(0x12, 104)),
    ("BLKPBSZGET", io(0x12, 123)),
    // tap devices
    ("TUNSETNOCSUM", iow(TUN, 200, 4)),
    ("TUNSETIFF", iow(TUN, 202, 4)),
    ("TUNSETPERSIST", iow(TUN, 203, 4)),
    ("TUNGETFEATURES", ior(TUN, 207, 4)),
    ("TUNSETOFFLOAD", iow(TUN, 208, 4)),
    ("TUNGETIFF", ior(TUN, 210, 4)),
    ("TUNSETSNDBUF", iow(TUN, 212, 4)),
    ("TUNGETVNETHDRSZ", ior(TUN, 215, 4)),
    ("TUNSETVNETHDRSZ", iow(TUN, 216, 4)),
    ("TUNSETQUEUE", iow(TUN, 217, 4)),
    ("VHOST_SET_OWNER", io(VHOST, 1)),
    ("VHOST_SET_FEATURES", iow(VHOST, 0, 8)),
    ("VHOST_GET_FEATURES", ior(VHOST, 0, 8)),
    ("VHOST_SET_MEM_TABLE", iow(VHOST, 3, 8)),
    ("VHOST_SET_VRING_NUM", iow(VHOST, 0x10, 8)),
    ("VHOST_SET_VRING_ADDR", iow(VHOST, 0x11, 40)),
    ("VHOST_SET_VRING_BASE", iow(VHOST, 0x12, 8)),
    ("VHOST_GET_VRING_BASE", iowr(VHOST, 0x12, 8)),
    ("VHOST_SET_VRING_KICK", iow(VHOST, 0x20, 8)),
    ("VHOST_SET_VRING_CALL", iow(VHOST, 0x21, 8)),
    ("VHOST_SET_VRING_ERR", iow(VHOST, 0x22, 8)),
    ("VHOST_NET_SET_BACKEND", iow(VHOST, 0x30, 8)),
    ("TUNSETVNETLE", iow(TUN, 220, 4)),
    // KVM, the calls that a running VM makes
    ("KVM_CHECK_EXTENSION", io(KVM, 0x03)),
    ("KVM_SET_USER_MEMORY_REGION", iow(KVM, 0x46, 32)),
    ("KVM_IRQ_LINE", iow(KVM, 0x61, 8)),
    ("KVM_GET_IRQCHIP", iowr(KVM, 0x62, 520)),
    ("KVM_SET_IRQCHIP", ior(KVM, 0x63, 520)),
    ("KVM_IRQFD", iow(KVM, 0x76, 32)),
    ("KVM_SET_CLOCK", iow(KVM, 0x7B, 48)),
    ("KVM_GET_CLOCK", ior(KVM, 0x7C, 48)),
    ("KVM_IOEVENTFD", iow(KVM, 0x79, 64)),
    ("KVM_RUN", io(KVM, 0x80)),
    ("KVM_GET_REGS", ior(KVM, 0x81, 144)),
    ("KVM_SET_REGS", iow(KVM, 0x82, 144)),
    ("KVM_GET_SREGS", ior(KVM, 0x83, 312)),
    ("KVM_SET_SREGS", iow(KVM, 0x84, 312)),
    ("KVM_GET_MSRS", iowr(KVM, 0x88, 8)),
    ("KVM_SET_MSRS", iow(KVM, 0x89, 8)),
    ("KVM_GET_FPU", ior(KVM, 0x8C, 416)),
    ("KVM_SET_FPU", iow(KVM, 0x8D, 416)),
    ("KVM_GET_LAPIC", ior(KVM, 0x8E, 1024)),
    ("KVM_SET_LAPIC", iow(KVM, 0x8F, 1024)),
    ("KVM_SET_CPUID2", iow(KVM, 0x90, 8)),
    ("KVM_GET_MP_STATE", ior(KVM, 0x98, 4)),
    ("KVM_SET_MP_STATE", iow(KVM, 0x99, 4)),
    ("KVM_NMI", io(KVM, 0x9A)),
    ("KVM_GET_VCPU_EVENTS", ior(KVM, 0x9F, 64)),
    ("KVM_SET_VCPU_EVENTS", iow(KVM, 0xA0, 64)),
    ("KVM_GET_PIT2", ior(KVM, 0x9F, 112)),
    ("KVM_SET_PIT2", iow(KVM, 0xA0, 112)),
    ("KVM_GET_DEBUGREGS", ior(KVM, 0xA1, 128)),
    ("KVM_SET_DEBUGREGS", iow(KVM, 0xA2, 128)),
    ("KVM_SET_TSC_KHZ", io(KVM, 0xA2)),
    ("KVM_GET_TSC_KHZ", io(KVM, 0xA3)),
    ("KVM_GET_XSAVE", ior(KVM, 0xA4, 4096)),
    ("KVM_SET_XSAVE", iow(KVM, 0xA5, 4096)),
    ("KVM_GET_XCRS", ior(KVM, 0xA6, 392)),
    ("KVM_SET_XCRS", iow(KVM, 0xA7, 392)),
    ("KVM_SIGNAL_MSI", iow(KVM, 0xA5, 32)),
    ("KVM_KVMCLOCK_CTRL", io(KVM, 0xAD)),
    // include/uapi/linux/userfaultfd.h
    ("USERFAULTFD_IOC_NEW", io(0xAA, 0x00)),
    ("UFFDIO_API", iowr(0xAA, 0x3F, 24)),
    ("UFFDIO_REGISTER", iowr(0xAA, 0x00, 32)),
    ("UFFDIO_UNREGISTER", ior(0xAA, 0x01, 16)),
    ("UFFDIO_WAKE", ior(0xAA, 0x02, 16)),
    ("UFFDIO_COPY", iowr(0xAA, 0x03, 40)),
    ("UFFDIO_ZEROPAGE", iowr(0xAA, 0x04, 32)),
    ("UFFDIO_CONTINUE", iowr(0xAA, 0x07, 32)),
];

/// Error numbers that a policy may answer with. `0` gives the caller the result 0, for brk(2), which has no error numbers.
pub(crate) const ERRORS: &[(&str, u32)] = &[
    ("0", 0),
    ("EPERM", 1),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("ENOSYS", 38),
];

/// The value of one name.
pub(crate) fn lookup(name: &str) -> Option<u64> {
    TABLE.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
}
