//! The attempts whose answer depends on Landlock, where the kernel's is an old one.
//!
//! Debian 12's kernel (6.1) knows files and, but for truncation, all that can be done to them; it does not know TCP (Linux 6.7),
//! ioctls on devices (6.10), signals and abstract sockets (6.12). The other layers have to do there: an empty root, a network
//! namespace without an interface, a pid namespace of its own.

use tests::escape::{Expect, Jail, Outcome, attempts};
use tests::host::landlock_abi;
use tests::lab::{Nested, in_a_nested_machine};
use tests::test_path;

use super::Place;
use super::bait::Bait;

/// Landlock that knows TCP.
const KNOWS_TCP: u32 = 4;

/// What Landlock has a word in, on one kernel or another. The filter kills all of them first, which is shown elsewhere.
const NAMES: &[&str] = &[
    "open-passwd",
    "open-root",
    "open-path-and-climb",
    "open-dev-kvm",
    "create-file",
    "create-nameless",
    "mkdir",
    "truncate-passwd",
    "rename",
    "link-image",
    "reopen-image-for-writing",
    "execve-shell",
    "unix-path",
    "unix-bind",
    "unix-abstract",
    "tcp-loopback",
    "tcp-outside",
    "tcp-listen",
    "leave-landlock",
];

#[test]
fn an_old_landlock_leaves_the_other_layers() {
    in_a_nested_machine(&Nested::default(), test_path!(), || {
        let abi = landlock_abi();
        assert!(
            (1..KNOWS_TCP).contains(&abi),
            "Landlock ABI {abi} is no old one"
        );
        let _bait = Bait::lay();
        let place = Place::new(Jail::Block, "");
        let all = attempts::all();
        let mut wrong = Vec::new();
        for name in NAMES {
            let attempt = all.iter().find(|attempt| attempt.name == *name);
            let attempt = attempt.unwrap_or_else(|| panic!("no attempt {name}"));
            let (_, mut expected) = attempt.expected(Jail::Block).unwrap();
            if *name == "tcp-listen" {
                expected = Expect::FilterOnly("its own network namespace, which has no other end");
            }
            match place.make(attempt, false) {
                (Ok(outcome), _) => {
                    println!("Landlock ABI {abi}: {name:28} {outcome}");
                    if !outcome.is(expected) {
                        wrong.push(format!("{name}: {outcome}, must be {expected:?}"));
                    }
                }
                (Err(e), _) => wrong.push(format!("{name}: {e}")),
            }
        }
        // The rest of the jail is there as well: with its filter on, an attempt is the process's end.
        let open = all.iter().find(|attempt| attempt.name == "open-passwd");
        let (outcome, _) = place.make(open.unwrap(), true);
        if outcome != Ok(Outcome::Killed) {
            wrong.push(format!("open-passwd with the filter: {outcome:?}"));
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}
