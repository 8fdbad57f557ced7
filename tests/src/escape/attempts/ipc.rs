//! System V and POSIX objects, and keys.

use super::*;
use crate::escape::Held;
use libc::*;

const OWN_OBJECTS: &str = "an object of its own ipc namespace, which ends with it";

pub(super) const LIST: &[Attempt] = &[
    steps("shm-of-others", shm_of_others).refused(&[EINVAL]),
    one("shm-by-key", SYS_shmget, &[n(0x5354_5256), n(4096), n(0)]).refused(&[ENOENT]),
    one("shm-new", SYS_shmget, &[n(0), n(4096), n(0o1600)]).filter_only(OWN_OBJECTS),
    one("msg-new", SYS_msgget, &[n(0), n(0o1600)]).filter_only(OWN_OBJECTS),
    one("sem-new", SYS_semget, &[n(0), n(1), n(0o1600)]).filter_only(OWN_OBJECTS),
    one(
        "mq-new",
        SYS_mq_open,
        &[Arg::Bytes(b"loot\0"), n(O_CREAT | O_RDWR), n(0o600), NULL],
    )
    .refused(&[EMFILE, EACCES, ENOSPC]),
    one(
        "mq-of-others",
        SYS_mq_open,
        &[Arg::Bytes(b"stratovirt\0"), n(O_RDWR)],
    )
    .refused(&[ENOENT, EACCES]),
    one(
        "key-of-caller",
        SYS_request_key,
        &[
            Arg::Bytes(b"user\0"),
            Arg::Bytes(b"stratovirt-escape\0"),
            NULL,
            n(0),
        ],
    )
    .refused(&[ENOKEY, ENOENT, EACCES]),
    steps("keys-of-session", |m, _| keys_in(m, -3)).refused(&[ENOKEY, EACCES]),
    steps("keys-of-user", |m, _| keys_in(m, -4)).refused(&[ENOKEY, EACCES]),
    one(
        "key-in-session",
        SYS_add_key,
        &[
            Arg::Bytes(b"user\0"),
            Arg::Bytes(b"loot\0"),
            Arg::Bytes(b"x"),
            n(1),
            n(-3),
        ],
    )
    .filter_only("a keyring of its own, by the user's quota"),
];

/// Every number that the host could have given.
fn shm_of_others(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let mut last = Stop::Errno(EINVAL);
    for id in 0..64 {
        match m.call(SYS_shmat, &[id, 0, SHM_RDONLY as u64]) {
            Ok(at) => return Ok(Verdict::Through(at)),
            Err(Stop::Gone) => return Err(Stop::Gone),
            Err(stop) => last = stop,
        }
    }
    Err(last)
}

/// `KEYCTL_READ` of a keyring lists the keys in it: none, unless it is the caller's.
fn keys_in(m: &mut dyn Machine, ring: i64) -> Result<Verdict, Stop> {
    let room = m.put(&[0; 64])?;
    match m.call(SYS_keyctl, &[11, ring as u64, room, 64])? {
        0 => Err(Stop::Errno(ENOKEY)),
        length => Ok(Verdict::Through(length)),
    }
}
