//! Calls by other gates and numbers, and the proof that the machine itself works.

use super::*;
use crate::escape::Held;
use libc::*;

pub(super) const LIST: &[Attempt] = &[
    steps("nothing", nothing).confined().passes(),
    steps("gate-of-32-bits", |m, _| m.call32(20).map(Verdict::Through)).either(
        &[ENOSYS],
        "the kernel offers it to all; a filter for one architecture is what closes it",
    ),
    one("x32-getpid", 0x4000_0000 | SYS_getpid, &[]).refused(&[ENOSYS]),
    one(
        "x32-open",
        0x4000_0000 | SYS_openat,
        &[HERE, Arg::Bytes(b"/\0"), n(0)],
    )
    .refused(&[ENOSYS]),
    one("unknown-call", 9999, &[]).refused(&[ENOSYS]),
    one("negative-call", -1, &[]).refused(&[ENOSYS]),
    one("high-bits-of-number", 1 << 32 | SYS_getpid, &[])
        .filter_only("the kernel looks at 32 bits, as the filter does; this is getpid"),
];

/// What every attempt does around its own calls, and nothing else: if this is killed, no kill means anything.
fn nothing(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let at = m.put(&[7; 4096])?;
    m.set(at, &[8])?;
    match m.get(at, 2)?[..] {
        [8, 7] => Ok(Verdict::Confined),
        _ => Ok(Verdict::Through(0)),
    }
}
