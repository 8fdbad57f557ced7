//! Users, groups, capabilities and the switches that keep them away.

use super::*;
use crate::escape::Held;
use libc::*;

const ANY_USER: &str =
    "files can be given to any user, so all users are inside; their rights are those on the folder";

/// All capabilities into all sets of this process; version 3 of the call's structures (include/uapi/linux/capability.h).
pub const RAISE_CAPABILITIES: Act = Act::Call(
    SYS_capset,
    &[
        Arg::Bytes(&[0x22, 5, 8, 0x20, 0, 0, 0, 0]),
        Arg::Bytes(&[0xff; 24]),
    ],
);

/// `CAP_SYS_ADMIN` into the ambient set.
pub const RAISE_AMBIENT: Act = Act::Call(
    SYS_prctl,
    &[
        n(PR_CAP_AMBIENT),
        n(PR_CAP_AMBIENT_RAISE),
        n(21),
        NULL,
        NULL,
    ],
);

pub(super) const LIST: &[Attempt] = &[
    one("setuid-0", SYS_setuid, &[n(0)])
        .refused(&[EPERM, EINVAL])
        .filter_only_in_fs(ANY_USER),
    one("setgid-0", SYS_setgid, &[n(0)])
        .refused(&[EPERM, EINVAL])
        .filter_only_in_fs(ANY_USER),
    one("setreuid-0", SYS_setreuid, &[n(0), n(0)])
        .refused(&[EPERM, EINVAL])
        .filter_only_in_fs(ANY_USER),
    one("setresuid-0", SYS_setresuid, &[n(0), n(0), n(0)])
        .refused(&[EPERM, EINVAL])
        .filter_only_in_fs(ANY_USER),
    one("setresgid-0", SYS_setresgid, &[n(0), n(0), n(0)])
        .refused(&[EPERM, EINVAL])
        .filter_only_in_fs(ANY_USER),
    one("setuid-host-user", SYS_setuid, &[n(65534)])
        .refused(&[EPERM, EINVAL])
        .filter_only_in_fs(ANY_USER),
    one("setgroups", SYS_setgroups, &[n(1), Arg::Room(4)])
        .refused(&[EPERM, EINVAL])
        .filter_only_in_fs(ANY_USER),
    steps("setfsuid-0", setfsuid)
        .refused(&[EPERM])
        .filter_only_in_fs(ANY_USER),
    Attempt::new("raise-capabilities", RAISE_CAPABILITIES),
    Attempt::new("raise-ambient", RAISE_AMBIENT),
    one(
        "clear-securebits",
        SYS_prctl,
        &[n(PR_SET_SECUREBITS), n(0), NULL, NULL, NULL],
    ),
    one(
        "keep-capabilities",
        SYS_prctl,
        &[n(PR_SET_KEEPCAPS), n(1), NULL, NULL, NULL],
    ),
    one(
        "clear-no-new-privs",
        SYS_prctl,
        &[n(PR_SET_NO_NEW_PRIVS), n(0), NULL, NULL, NULL],
    )
    .refused(&[EINVAL]),
    one(
        "be-dumpable",
        SYS_prctl,
        &[n(PR_SET_DUMPABLE), n(1), NULL, NULL, NULL],
    )
    .filter_only("nobody else of its user sees it, and core files have a limit of 0"),
    one(
        "let-others-trace",
        SYS_prctl,
        &[n(PR_SET_PTRACER), NONE, NULL, NULL, NULL],
    )
    .refused(&[EINVAL]),
    one(
        "raise-core-limit",
        SYS_prlimit64,
        &[n(0), n(RLIMIT_CORE as i32), Arg::Bytes(&[0xff; 16]), NULL],
    ),
    one(
        "raise-descriptor-limit",
        SYS_prlimit64,
        &[n(0), n(RLIMIT_NOFILE as i32), Arg::Bytes(MILLION), NULL],
    ),
    one(
        "raise-process-limit",
        SYS_setrlimit,
        &[n(RLIMIT_NPROC as i32), Arg::Bytes(MILLION)],
    ),
    one(
        "raise-memory-limit",
        SYS_setrlimit,
        &[n(RLIMIT_DATA as i32), Arg::Bytes(&[0xff; 16])],
    ),
    one(
        "raise-lock-limit",
        SYS_setrlimit,
        &[n(RLIMIT_MEMLOCK as i32), Arg::Bytes(GIBI)],
    ),
    one(
        "raise-real-time-limit",
        SYS_setrlimit,
        &[n(RLIMIT_RTPRIO as i32), Arg::Bytes(MILLION)],
    ),
    one("strict-mode", SYS_seccomp, &[n(0), n(0), NULL])
        .filter_only("strict mode is narrower still"),
    one(
        "filter-that-allows",
        SYS_prctl,
        &[n(PR_SET_SECCOMP), n(2), NULL, NULL, NULL],
    )
    .refused(&[EFAULT, EINVAL]),
    one("leave-landlock", SYS_landlock_restrict_self, &[NONE, n(0)]).refused(&[EBADF, EBADFD]),
    one(
        "child-subreaper",
        SYS_prctl,
        &[n(PR_SET_CHILD_SUBREAPER), n(1), NULL, NULL, NULL],
    )
    .filter_only("of its own children"),
    one("new-session", SYS_setsid, &[]).refused(&[EPERM]),
];

/// Both limits are a million.
/// Soft and hard limit: 2^30.
const GIBI: &[u8] = &[0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0];
const MILLION: &[u8] = &[
    0x40, 0x42, 0x0f, 0, 0, 0, 0, 0, 0x40, 0x42, 0x0f, 0, 0, 0, 0, 0,
];

/// It answers with the old one, whatever it did.
fn setfsuid(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    m.call(SYS_setfsuid, &[0])?;
    match m.call(SYS_setfsuid, &[u64::MAX])? {
        0 => Ok(Verdict::Through(0)),
        _ => Err(Stop::Errno(EPERM)),
    }
}
