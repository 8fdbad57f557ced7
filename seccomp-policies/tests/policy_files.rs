//! Wrong policy files are refused, each with a message that says what is wrong and where.
//!
//! Drives the build script's own modules, so that what is tested is what builds the product.

#![allow(dead_code)] // the build script uses more of these modules than the tests

#[path = "../build/compile.rs"]
mod compile;
#[path = "../build/constants.rs"]
mod constants;
#[path = "../build/parse.rs"]
mod parse;
#[path = "../build/resolve.rs"]
mod resolve;

use parse::Files;
use std::path::Path;

const HEAD: &str = "process = \"p\"\nthread = \"t\"\nabout = \"a policy for tests\"\n";
const ROOM: &str = "budget = 9\n";

fn files(text: &str) -> Result<Files, String> {
    let mut files = Files::default();
    let budget = if text.starts_with("budget") { "" } else { ROOM };
    let policy = toml::from_str(&format!("{HEAD}{budget}{text}")).map_err(|e| e.to_string())?;
    files.policies.insert("test".into(), policy);
    let base =
        "about = \"a piece for tests\"\n[[allow]]\ncall = \"close\"\nwhy = \"shared by several\"";
    files.base.insert(
        "piece".into(),
        toml::from_str(base).map_err(|e| e.to_string())?,
    );
    Ok(files)
}

fn outcome(text: &str) -> Result<Vec<resolve::Policy>, String> {
    resolve::resolve(&files(text)?, "x86_64").map_err(|e| e.to_string())
}

#[track_caller]
fn refused(text: &str, words: &[&str]) {
    let message = outcome(text).expect_err("accepted a wrong policy");
    for word in words {
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

fn rule(call: &str, rest: &str) -> String {
    format!("[[allow]]\ncall = \"{call}\"\nwhy = \"a reason for tests\"\n{rest}\n")
}

#[test]
fn a_right_policy_is_accepted() {
    let text = format!("base = [\"piece\"]\n{}", rule("read", ""));
    let policies = outcome(&text).unwrap();
    let calls: Vec<_> = policies[0]
        .rules
        .iter()
        .map(|r| (r.call.as_str(), r.number))
        .collect();
    assert_eq!(
        calls,
        [("read", libc::SYS_read), ("close", libc::SYS_close)]
    );
}

#[test]
fn unknown_calls_and_keys_are_refused() {
    refused(&rule("raed", ""), &["raed", "policies/test.toml"]);
    refused(&rule("read", "argz = []"), &["argz"]);
    refused("colour = 1", &["colour"]);
    refused("base = [\"pieces\"]", &["pieces"]);
    refused("children = [\"nobody\"]", &["nobody"]);
    refused(&rule("read", "only = [\"vax\"]"), &["vax", "read"]);
}

#[test]
fn a_rule_without_a_reason_is_refused() {
    refused("[[allow]]\ncall = \"read\"", &["why"]);
    refused(
        "[[allow]]\ncall = \"read\"\nwhy = \"  \"",
        &["reason", "read"],
    );
    refused(
        "[[allow]]\ncall = \"read\"\nwhy = \"needed\"",
        &["reason", "read"],
    );
}

#[test]
fn repeated_and_dead_rules_are_refused() {
    refused(&(rule("read", "") + &rule("read", "")), &["twice", "read"]);
    let shared = format!("base = [\"piece\"]\n{}", rule("close", ""));
    refused(&shared, &["twice", "close", "policies/base/piece.toml"]);
    let check = "args = [{ index = 1, width = \"dword\", op = \"eq\", value = 1 }]";
    refused(
        &(rule("fcntl", "") + &rule("fcntl", check)),
        &["dead", "fcntl"],
    );
    let error = "[[errno]]\ncall = \"read\"\nerror = \"ENOSYS\"\nwhy = \"a reason for tests\"\n";
    refused(&(rule("read", "") + error), &["twice", "read"]);
}

#[test]
fn wrong_argument_checks_are_refused() {
    let with = |arg: &str| rule("fcntl", &format!("args = [{{ {arg} }}]"));
    refused(
        &with("index = 6, width = \"dword\", op = \"eq\", value = 1"),
        &["index 6"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"eq\", value = \"F_GETFLAGS\""),
        &["F_GETFLAGS"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"eq\", value = 0x100000000"),
        &["dword"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"eq\""),
        &["value"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"eq\", values = []"),
        &["value"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"eq\", value = 1, values = [2]"),
        &["not both"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"ne\", values = [1, 2]"),
        &["Ne"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"eq\", value = 1, mask = 1"),
        &["mask"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"masked_eq\", value = 1"),
        &["mask"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"masked_eq\", mask = 2, value = 1"),
        &["outside mask"],
    );
    refused(
        &with("index = 1, width = \"word\", op = \"eq\", value = 1"),
        &["word"],
    );
    refused(
        &with("index = 1, width = \"dword\", op = \"is\", value = 1"),
        &["is"],
    );
    let twice = "args = [{ index = 1, width = \"dword\", op = \"gt\", value = 1 }, { index = 1, width = \"dword\", op = \"lt\", value = 9 }]";
    refused(&rule("fcntl", twice), &["twice in one rule"]);
}

#[test]
fn errors_must_be_known_and_budgets_kept() {
    let error = "[[errno]]\ncall = \"read\"\nerror = \"ENOFUN\"\nwhy = \"a reason for tests\"\n";
    refused(error, &["ENOFUN"]);
    let text = format!("budget = 1\n{}{}", rule("read", ""), rule("write", ""));
    refused(&text, &["2 distinct calls", "budget is 1"]);
}

#[test]
fn calls_of_other_architectures_are_skipped_and_told() {
    let policies = resolve::resolve(&files(&rule("epoll_wait", "")).unwrap(), "aarch64").unwrap();
    assert!(policies[0].rules.is_empty());
    assert_eq!(policies[0].absent, ["epoll_wait"]);
    let only = rule("epoll_wait", "only = [\"x86_64\"]");
    let policies = resolve::resolve(&files(&only).unwrap(), "aarch64").unwrap();
    assert!(
        policies[0].absent.is_empty(),
        "meant for the other architecture, so nothing to tell"
    );
}

/// The files of the product compile for every architecture, without a skipped rule.
#[test]
fn the_policies_compile_for_all_architectures() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
    let files = parse::read_folder(&folder).unwrap();
    for arch in resolve::ARCHITECTURES {
        for policy in resolve::resolve(&files, arch).unwrap() {
            assert!(
                policy.absent.is_empty(),
                "{arch} {}: {:?}",
                policy.file,
                policy.absent
            );
            compile::compile(&policy, arch).unwrap();
        }
    }
}

/// Whether one rule lets through whatever the other does.
fn wider(one: &resolve::Rule, other: &resolve::Rule) -> bool {
    match (&one.kind, &other.kind) {
        (resolve::Kind::Allow(one), resolve::Kind::Allow(other)) => {
            one.iter().all(|check| check.admits(other))
        }
        _ => false,
    }
}

/// What a child may call, its parent's filter lets through.
#[test]
fn a_parents_filter_admits_its_childrens() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
    let files = parse::read_folder(&folder).unwrap();
    let all = resolve::resolve(&files, "x86_64").unwrap();
    let open = resolve::Kind::Allow(Vec::new());
    for (name, file) in &files.policies {
        let parent = all.iter().find(|p| p.file == *name).unwrap();
        for child in &file.children {
            let child = all.iter().find(|p| p.file == *child).unwrap();
            for rule in &child.rules {
                // What a child answers itself must only not kill it before.
                let answered = matches!(rule.kind, resolve::Kind::Errno(..));
                let admits = |r: &&resolve::Rule| {
                    r.number == rule.number && (answered || r.kind == open || wider(r, rule))
                };
                assert!(
                    parent.rules.iter().any(|r| admits(&r)),
                    "{name} stops {}'s {}",
                    child.file,
                    rule.call
                );
            }
        }
    }
}

#[test]
fn constants_are_the_kernels() {
    let same = [
        ("PROT_EXEC", libc::PROT_EXEC as u64),
        ("MAP_SHARED", libc::MAP_SHARED as u64),
        ("MAP_ANONYMOUS", libc::MAP_ANONYMOUS as u64),
        ("MADV_DONTNEED", libc::MADV_DONTNEED as u64),
        ("MADV_POPULATE_WRITE", libc::MADV_POPULATE_WRITE as u64),
        ("F_GETFL", libc::F_GETFL as u64),
        ("F_SETFL", libc::F_SETFL as u64),
        ("F_OFD_SETLK", libc::F_OFD_SETLK as u64),
        ("F_DUPFD_CLOEXEC", libc::F_DUPFD_CLOEXEC as u64),
        ("F_ADD_SEALS", libc::F_ADD_SEALS as u64),
        ("F_GET_SEALS", libc::F_GET_SEALS as u64),
        ("FALLOC_FL_PUNCH_HOLE", libc::FALLOC_FL_PUNCH_HOLE as u64),
        ("FALLOC_FL_KEEP_SIZE", libc::FALLOC_FL_KEEP_SIZE as u64),
        ("FUTEX_WAIT_BITSET", libc::FUTEX_WAIT_BITSET as u64),
        ("FUTEX_PRIVATE_FLAG", libc::FUTEX_PRIVATE_FLAG as u64),
        ("PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG as u64),
        ("PR_CAPBSET_DROP", libc::PR_CAPBSET_DROP as u64),
        ("PR_SET_SECUREBITS", libc::PR_SET_SECUREBITS as u64),
        ("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS as u64),
        ("PR_CAP_AMBIENT", libc::PR_CAP_AMBIENT as u64),
        ("SIGRTMIN", libc::SIGRTMIN() as u64),
        ("SIGHUP", libc::SIGHUP as u64),
        ("SIGINT", libc::SIGINT as u64),
        ("SIGQUIT", libc::SIGQUIT as u64),
        ("SIGUSR1", libc::SIGUSR1 as u64),
        ("SIGUSR2", libc::SIGUSR2 as u64),
        ("SIGTERM", libc::SIGTERM as u64),
        ("SIGKILL", libc::SIGKILL as u64),
        ("CLOCK_MONOTONIC", libc::CLOCK_MONOTONIC as u64),
        ("CLONE_THREAD", libc::CLONE_THREAD as u64),
        ("O_CLOEXEC", libc::O_CLOEXEC as u64),
        ("CLONE_VM", libc::CLONE_VM as u64),
        ("AT_EMPTY_PATH", libc::AT_EMPTY_PATH as u64),
        ("TCGETS", libc::TCGETS),
        ("TCSETSF", libc::TCSETSF),
        ("TIOCGPTN", libc::TIOCGPTN),
        ("TIOCSPTLCK", libc::TIOCSPTLCK),
        ("FIONBIO", libc::FIONBIO),
        ("TUNSETIFF", libc::TUNSETIFF),
        ("TUNSETOFFLOAD", libc::TUNSETOFFLOAD),
        ("TUNSETVNETHDRSZ", libc::TUNSETVNETHDRSZ),
        ("TUNGETFEATURES", libc::TUNGETFEATURES),
        ("TUNSETQUEUE", libc::TUNSETQUEUE),
        // Values printed by a C program that includes <linux/kvm.h> and <linux/fs.h>.
        ("KVM_RUN", 0xae80),
        ("KVM_IRQFD", 0x4020_ae76),
        ("KVM_IOEVENTFD", 0x4040_ae79),
        ("KVM_SET_REGS", 0x4090_ae82),
        ("KVM_SET_SREGS", 0x4138_ae84),
        ("KVM_GET_PIT2", 0x8070_ae9f),
        ("BLKGETSIZE64", 0x8008_1272),
    ];
    for (name, value) in same {
        assert_eq!(constants::lookup(name), Some(value), "{name}");
    }
    for (i, (name, _)) in constants::TABLE.iter().enumerate() {
        assert!(
            constants::TABLE[i + 1..].iter().all(|(n, _)| n != name),
            "{name} is there twice"
        );
    }
}

/// A rule that nothing uses needs a reason of the two that there are, and what shows that it is needed.
#[test]
fn rare_rules_have_a_cause_and_a_proof() {
    let rare = |what: &str| rule("read", &format!("rare = {{ {what} }}"));
    let whole = "takes = \"host\", why = \"another clock\", test = \"tests/x::some_test\"";
    assert!(outcome(&rare(whole)).is_ok());
    for (wrong, words) in [
        (
            "why = \"another clock\", test = \"tests/x::some_test\"",
            "takes",
        ),
        ("takes = \"host\", why = \"another clock\"", "test"),
        (
            "takes = \"fault\", why = \"another clock\", test = \"tests/x::some_test\"",
            "fault",
        ),
        (
            "takes = \"chance\", why = \"short\", test = \"tests/x::some_test\"",
            "short",
        ),
        (
            "takes = \"chance\", why = \"another clock\", test = \"none\"",
            "none",
        ),
    ] {
        refused(&rare(wrong), &[words]);
    }
    refused(
        &rule("read", "rare = \"a word is not enough\""),
        &["invalid type"],
    );
}
