//! Suites that nobody here wrote, in a guest on the shared tree and on the host's own file system, with one outcome.
//!
//! The guest is the nested machine: Debian's kernel in QEMU with this host's programs, and a mount of the tree. The short run
//! has `basics.py`, `lists.sh`, `dbench` and some of `stress-ng`; `cargo xtask test vhost-user-fs posix --long` has other caches, `pjdfstest`, `fsx`
//! and more stressors of `stress-ng` as well.

#![allow(clippy::unwrap_used)] // test code

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tests::daemon::Daemon;
use tests::lab::{Nested, cache_dir, ensure_packages};

/// How long the daemon may take to notice that its front end is gone, on a busy machine.
const LEAVE: Duration = Duration::from_secs(60);

/// Every line of a script's output that begins with this is an outcome: name and result.
const MARK: &str = "OUTCOME ";

/// What the scripts share. Their working folder is on the file system under test.
const PRELUDE: &str = r#"
outcome() { echo "OUTCOME $1 $2"; }
# check NAME COMMAND: whether it succeeds.
check() { name=$1; shift; if "$@" > /tmp/suite-out 2>&1; then outcome "$name" ok; else outcome "$name" failed; tail -3 /tmp/suite-out; fi; }
umask 022
"#;

/// Names, modes, times, contents, attributes, lists and locks.
const BASICS: &str = concat!("python3 ", env!("CARGO_MANIFEST_DIR"), "/tests/basics.py\n");

/// Lists by setfacl and getfacl, and locks that are waited for.
const TOOLS: &str = include_str!("lists.sh");

/// `dbench`'s own load, and stressors that verify what they do.
const LOADS: &str = r#"
check dbench dbench -D . -t SECONDS -c /usr/share/dbench/client.txt 2
stress() {
    for s in "$@"; do
        out=$(timeout 300 stress-ng --$s 1 --timeout SECONDS --verify --temp-path . 2>&1)
        case $? in
        0) outcome "stress-ng-$s" ok ;;
        124) outcome "stress-ng-$s" "took too long" ;;
        *) outcome "stress-ng-$s" failed; echo "$out" | tail -5 ;;
        esac
    done
}
"#;

const SHORT_STRESSORS: &str = "stress chmod fallocate flock rename xattr\n";

/// Those of the class that work on files of the folder; the others are about pipes and /proc, or take devices.
const LONG_STRESSORS: &str = "stress access chdir chmod chown copy-file dentry dir dirdeep dup fallocate fcntl \
    filename flock fpunch fstat getdent hdd iomix link locka lockf lockofd mknod open rename seek sendfile splice symlink \
    sync-file touch utime xattr\n";

/// Outcomes by their names.
type Outcomes = BTreeMap<String, String>;

fn outcomes(text: &str) -> Outcomes {
    let mut all = Outcomes::new();
    for line in text.lines().filter_map(|line| line.strip_prefix(MARK)) {
        let (name, outcome) = line.split_once(' ').unwrap_or((line, ""));
        all.insert(name.to_owned(), outcome.trim().to_owned());
    }
    all
}

/// Where both trees are, on one file system, and what is left of them goes away.
fn workplace() -> tempfile::TempDir {
    // Not /tmp, which may be a tmpfs with other rules.
    tempfile::tempdir_in("/var/tmp").unwrap()
}

fn on_the_host(script: &str) -> Outcomes {
    let dir = workplace();
    let output = Command::new("bash")
        .args(["-c", &format!("{PRELUDE}{script}")])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    outcomes(&String::from_utf8_lossy(&output.stdout))
}

fn in_a_guest(script: &str, options: &[&str], limit: Duration) -> (Outcomes, String) {
    let dir = workplace();
    let (tree, socket, results) = (
        dir.path().join("tree"),
        dir.path().join("socket"),
        dir.path().join("results"),
    );
    fs::create_dir(&tree).unwrap();
    fs::create_dir(&results).unwrap();
    fs::write(results.join("script"), format!("{PRELUDE}{script}")).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_vhost_user_fs"));
    let mut daemon = Daemon::sharing(program, &tree, &socket, options).unwrap();
    let nested = Nested {
        share: Some(results.clone()),
        limit: Some(limit),
        qemu: vec![
            "-chardev".into(),
            format!("socket,id=under-test,path={}", socket.display()),
            "-device".into(),
            "vhost-user-fs-pci,chardev=under-test,tag=under-test".into(),
        ],
        ..Nested::default()
    };
    let results = results.display();
    let command = format!(
        "mkdir -p /run/under-test && mount -t virtiofs under-test /run/under-test && cd /run/under-test && \
         bash {results}/script > {results}/output 2>&1 < /dev/null; cd /; umount /run/under-test && sync"
    );
    let ended = nested.run(&[command]);
    let text = fs::read_to_string(dir.path().join("results/output")).unwrap_or_default();
    let status = ended.unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(status, 0, "unmounting: {text}");
    assert!(daemon.wait(LEAVE).unwrap().success());
    (outcomes(&text), text)
}

/// A difference that is meant: beginning and end of the name, the outcome in the guest, and why.
type Known = (&'static str, &'static str, &'static str, &'static str);

const NO_MODE: &str = "Linux's FUSE does not pass this mode on";
const NO_DEVICE: &str = "no guest makes devices on the host";

const KNOWN: &[Known] = &[
    ("fallocate-collapse", "", "ENOTSUP", NO_MODE),
    ("fallocate-insert", "", "ENOTSUP", NO_MODE),
    (
        "suid-after-roots-",
        "-6777",
        "0o100777",
        "to the host's kernel no writer in a user namespace of its own may keep these bits",
    ),
    (
        "suid-after-",
        "-2767",
        "0o102767",
        "FUSE_HANDLE_KILLPRIV_V2 says that the group's bit stays on a file that the group cannot execute",
    ),
    ("pjdfstest-", "::block", "FAILED", NO_DEVICE),
    ("pjdfstest-mknod::", "::char", "FAILED", NO_DEVICE),
    (
        "pjdfstest-link::link_count_max",
        "",
        "skipped",
        "pathconf(3) knows no limit for this kind of file system",
    ),
];

fn is_known(name: &str, outcome: &str) -> bool {
    KNOWN.iter().any(|(start, end, other, _)| {
        name.starts_with(start) && name.ends_with(end) && *other == outcome
    })
}

/// Runs the script at both places and compares.
#[track_caller]
fn same(script: &str, options: &[&str], limit: Duration, at_least: usize) {
    let host = on_the_host(script);
    let unfit: Vec<_> = host
        .iter()
        .filter(|(_, outcome)| *outcome == "took too long")
        .collect();
    assert!(unfit.is_empty(), "on the host: {unfit:?}");
    assert!(host.len() >= at_least, "only {} outcomes", host.len());
    let (guest, text) = in_a_guest(script, options, limit);
    let mut differences = Vec::new();
    for (name, outcome) in &host {
        let there = guest.get(name).map_or("never came", String::as_str);
        if there != outcome && !is_known(name, there) {
            differences.push(format!(
                "{name}: {outcome:?} on the host, {there:?} in the guest"
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{options:?}: {} of {} differ:\n{}\n{text}",
        differences.len(),
        host.len(),
        differences.join("\n")
    );
}

/// An idle machine needs a tenth of it.
const LIMIT: Duration = Duration::from_secs(540);
const WITH_LISTS: [&str; 2] = ["-xattr", "-posix-acl"];

fn ready() {
    ensure_packages(&["stress-ng", "dbench", "python3", "acl"]).unwrap();
}

#[test]
fn posix_basics_are_those_of_the_hosts_file_system() {
    ready();
    let loads = format!("{LOADS}{SHORT_STRESSORS}").replace("SECONDS", "1");
    same(&format!("{BASICS}{loads}"), &WITH_LISTS, LIMIT, 165);
}

#[test]
fn posix_lists_by_tools_and_locks_that_are_waited_for() {
    ready();
    // Not with those of above: who waits for a lock of the host cannot be interrupted.
    same(TOOLS, &["-xattr", "-posix-acl", "-flock"], LIMIT, 10);
}

#[test]
#[ignore = "takes minutes: cargo xtask test vhost-user-fs posix --long"]
fn posix_basics_hold_with_writes_that_the_guest_gathers() {
    ready();
    let options = ["-xattr", "-posix-acl", "-cache", "always", "-writeback"];
    same(BASICS, &options, LIMIT, 150);
}

#[test]
#[ignore = "takes minutes: cargo xtask test vhost-user-fs posix --long"]
fn posix_basics_hold_without_any_cache() {
    ready();
    // A file that is not cached can be mapped shared with this.
    let options = ["-xattr", "-posix-acl", "-cache", "never", "-allow-mmap"];
    same(BASICS, &options, LIMIT, 150);
}

/// Programs of crates.io, built once into the lab's cache.
fn tool(name: &str) -> PathBuf {
    let root = cache_dir().join("suites");
    let path = root.join("bin").join(name);
    if !path.exists() {
        ensure_packages(&["libacl1-dev"]).unwrap();
        let target = root.join("target");
        let status = Command::new("cargo")
            .args([
                "install",
                "--locked",
                "--target",
                "x86_64-unknown-linux-gnu",
                "--root",
            ])
            .arg(&root)
            .arg(name)
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .status();
        assert!(status.unwrap().success(), "cargo install {name}");
        fs::remove_dir_all(target).unwrap();
    }
    path
}

#[test]
#[ignore = "takes minutes: cargo xtask test vhost-user-fs posix --long"]
fn posix_tests_of_others_pass_as_on_the_host() {
    ready();
    let (pjdfstest, fsx) = (tool("pjdfstest"), tool("fsx"));
    let config = cache_dir().join("suites/pjdfstest.toml");
    fs::write(
        &config,
        "[features]\nposix_fallocate = {}\nrename_ctime = {}\nutimensat = {}\nutime_now = {}\nstat_st_birthtime = {}\n\
         [settings]\nnaptime = 0.05\nallow_remount = false\n\
         [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n",
    )
    .unwrap();
    let script = format!(
        "{} -c {} -p . 2>/dev/null | sed 's/\\x1b\\[[0-9;]*m//g' | grep -E ' (ok|FAILED|skipped)$' | \
             while read -r name result; do outcome \"pjdfstest-$name\" \"$result\"; done\n\
         for seed in 1 2 3 4 5; do check fsx-$seed {} -N 3000 -S $seed fsx-file; done\n",
        pjdfstest.display(),
        config.display(),
        fsx.display()
    );
    same(&script, &WITH_LISTS, Duration::from_secs(1800), 200);
}

#[test]
#[ignore = "takes minutes: cargo xtask test vhost-user-fs posix --long"]
fn posix_stressors_all_run_as_on_the_host() {
    ready();
    let script = format!("{LOADS}{LONG_STRESSORS}").replace("SECONDS", "3");
    same(&script, &WITH_LISTS, Duration::from_secs(3600), 30);
}
