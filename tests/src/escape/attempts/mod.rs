//! # The attempts
//!
//! **Job.** [`all`] of them, by what they are after. **Who is not trusted.** See the parent module.
//! **Why this way.** An attempt is data where one call is enough; a function where a success has to be looked at before it
//! means anything.

mod calls;
mod descriptors;
mod identity;
mod ipc;
mod kernel;
mod memory;
mod namespaces;
mod paths;
mod processes;
mod sockets;

pub use identity::{RAISE_AMBIENT, RAISE_CAPABILITIES};

use super::{Act, Arg, Attempt, Machine, Stop, Verdict};

/// All attempts. Names are unique.
#[must_use]
pub fn all() -> Vec<Attempt> {
    [
        paths::LIST,
        processes::LIST,
        sockets::LIST,
        namespaces::LIST,
        memory::LIST,
        descriptors::LIST,
        identity::LIST,
        ipc::LIST,
        kernel::LIST,
        calls::LIST,
    ]
    .concat()
}

/// `AT_FDCWD` as an argument.
const HERE: Arg = Arg::N(libc::AT_FDCWD as u64);
const NULL: Arg = Arg::N(0);
/// -1 as an argument.
const NONE: Arg = Arg::N(u64::MAX);

const fn n(number: i32) -> Arg {
    // As C does: a flag is its 32 bits, a negative number its 64.
    Arg::N(number as i64 as u64)
}

const fn one(name: &'static str, number: i64, args: &'static [Arg]) -> Attempt {
    Attempt::new(name, Act::Call(number, args))
}

const fn each(name: &'static str, number: i64, args: &'static [Arg]) -> Attempt {
    Attempt::new(name, Act::Each(number, args))
}

const fn steps(
    name: &'static str,
    steps: fn(&mut dyn Machine, &super::Held) -> Result<Verdict, Stop>,
) -> Attempt {
    Attempt::new(name, Act::Steps(steps))
}

/// The words of a structure, as the kernel reads it.
fn words(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::escape::Jail;

    #[test]
    fn names_are_unique_and_each_jail_has_its_eighty() {
        let all = all();
        let mut names: Vec<_> = all.iter().map(|a| a.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        for jail in [Jail::Block, Jail::Qcow2, Jail::Net, Jail::Fs] {
            let tried = all.iter().filter(|a| a.expected(jail).is_some()).count();
            assert!(tried >= 80, "{tried} in {jail}");
        }
    }
}
