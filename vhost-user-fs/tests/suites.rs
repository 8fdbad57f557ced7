//! Suites that nobody here wrote, in a guest on the shared tree and on the host's own file system, with one outcome.
//!
//! The guest is the nested machine: Debian's kernel in QEMU with this host's programs, and a mount of the tree. The short run
//! has `basics.py`, `lists.sh`, `dbench` and some of `stress-ng`; `cargo xtask test vhost-user-fs posix --long` has other caches, `pjdfstest`, `fsx`
//! and more stressors of `stress-ng` as well. The same with our own VM as the front end, in the lab, where its folder is on a disk. Each
//! comparison prints a table.

#![allow(clippy::unwrap_used)] // test code

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tests::console::{Console, ConsoleError};
use tests::daemon::Daemon;
use tests::host::ext4_image;
use tests::lab::{
    Flavour, Guest, Nested, Script, cache_dir, ensure_packages, in_nested, where_linux_boots_or_in,
};
use tests::test_path;
use tests::vm::Vm;

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
        out=$(timeout 1500 stress-ng --$s 1 --timeout SECONDS --verify --temp-path . 2>&1)
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

/// What a script says behind its last outcome.
const ALL: &str = "ALL-OUTCOMES-CAME";

/// How long a script may take from one outcome to the next; a little longer than it gives a stressor. The slowest one makes and looks at 8192
/// symbolic links however long that takes: more than 300 seconds where our own VM was emulated twice, on two processors with a load of 14.
const STEP: Duration = Duration::from_secs(1600);

/// What a script told.
#[derive(Default)]
struct Told {
    outcomes: Outcomes,
    /// All of it.
    text: String,
}

impl Told {
    /// Follows a script to its end: however long that takes, each outcome comes within `step` of the one before. Prints how
    /// long each took, so that what is slow and what hangs can be told apart.
    fn from(output: &mut Console, step: Duration) -> Result<Self, ConsoleError> {
        let (mut told, mut before) = (Self::default(), Instant::now());
        loop {
            let (which, text) = output.wait_for_any(&[MARK, ALL], step)?;
            told.text.push_str(&text);
            if which == 1 {
                told.outcomes = outcomes(&told.text);
                return Ok(told);
            }
            let line = output.rest_of_line(step)?;
            println!("{:>9.1?} {line}", before.elapsed());
            told.text.push_str(&format!("{MARK}{line}\n"));
            before = Instant::now();
        }
    }
}

#[test]
fn a_script_that_stands_still_is_told_with_its_last_outcome() {
    let script = "for n in 1 2 3; do echo OUTCOME $n ok; done; cat";
    let mut bash = Command::new("bash")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = Console::new(bash.stdout.take().unwrap(), None);
    // All three come before anything is waited for.
    output.wait_for("3 ok", LEAVE).unwrap();
    let still = Told::from(&mut output, Duration::from_millis(50));
    let still = still.err().unwrap().to_string();
    assert!(
        still.contains(ALL) && still.contains("OUTCOME 3 ok"),
        "{still}"
    );
    // It goes on, and ends as it should.
    let mut input = bash.stdin.take().unwrap();
    writeln!(input, "{MARK}4 ok\nmore\n{ALL}").unwrap();
    let told = Told::from(&mut output, LEAVE).unwrap();
    assert_eq!(told.outcomes["4"], "ok");
    assert!(told.text.ends_with("more\n"), "{:?}", told.text);
    drop(input);
    assert!(bash.wait().unwrap().success());
}

/// Where both trees are, on one file system, and what is left of them goes away.
fn workplace() -> tempfile::TempDir {
    // Not /tmp, which may be a tmpfs with other rules.
    tempfile::tempdir_in(if in_nested() { DISK } else { "/var/tmp" }).unwrap()
}

fn on_the_host(script: &str) -> Told {
    let dir = workplace();
    let mut bash = Command::new("bash")
        .args(["-c", &format!("{PRELUDE}{script}\necho {ALL}\n")])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut output = Console::new(bash.stdout.take().unwrap(), None);
    let told = Told::from(&mut output, STEP);
    let _ = bash.kill();
    bash.wait().unwrap();
    told.unwrap_or_else(|error| panic!("on the host: {error}"))
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

/// A difference that stays.
struct Known {
    /// Beginning and end of the test's name.
    test: (&'static str, &'static str),
    /// The outcome in the guest.
    outcome: &'static str,
    /// The option that it takes; empty if it takes none.
    with: &'static str,
    /// Why; the manual page says it in the same words.
    why: &'static str,
}

const fn known(
    test: (&'static str, &'static str),
    outcome: &'static str,
    why: &'static str,
) -> Known {
    Known {
        test,
        outcome,
        with: "",
        why,
    }
}

const NO_MODE: &str = "Linux's FUSE does not pass this mode of fallocate(2) on";
const NO_DEVICE: &str = "no guest makes devices on the host";
const GATHERED: &str = "-writeback";

const KNOWN: &[Known] = &[
    known(("fallocate-collapse", ""), "ENOTSUP", NO_MODE),
    known(("fallocate-insert", ""), "ENOTSUP", NO_MODE),
    known(
        ("suid-after-roots-", "-6777"),
        "0o100777",
        "to the host's kernel no writer in a user namespace of its own may keep these bits",
    ),
    known(
        ("suid-after-", "-2767"),
        "0o102767",
        "FUSE_HANDLE_KILLPRIV_V2 says that the group's bit stays on a file that the group cannot execute",
    ),
    known(("pjdfstest-", "::block"), "FAILED", NO_DEVICE),
    known(("pjdfstest-mknod::", "::char"), "FAILED", NO_DEVICE),
    known(
        ("pjdfstest-link::link_count_max", ""),
        "skipped",
        "pathconf(3) knows no limit of links for this kind of file system",
    ),
    Known {
        with: "-allow-mmap",
        ..known(
            ("mmap", ""),
            "ENODEV",
            "Linux maps files shared that it does not cache from 6.6 on",
        )
    },
    Known {
        with: GATHERED,
        ..known(
            ("holes", ""),
            "ENXIO",
            "Linux asks the host where data is before it has sent the writes that it gathered",
        )
    },
    Known {
        with: GATHERED,
        ..known(
            ("times-after-same-truncate", ""),
            "(False, False)",
            "Linux keeps the times of a file itself, and does not change them when the size stays",
        )
    },
];

fn why(name: &str, outcome: &str, options: &str) -> Option<&'static str> {
    let fits = |known: &&Known| {
        let (start, end) = known.test;
        name.starts_with(start)
            && name.ends_with(end)
            && known.outcome == outcome
            && options.contains(known.with)
    };
    KNOWN.iter().find(fits).map(|known| known.why)
}

#[test]
fn the_manual_page_explains_every_difference() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/vhost_user_fs.1.md");
    let page = fs::read_to_string(page).unwrap();
    let words: Vec<&str> = page.split_whitespace().collect();
    let page = words.join(" ");
    for known in KNOWN {
        assert!(page.contains(known.why), "not in the page: {}", known.why);
    }
}

/// Which suite a test is of.
fn suite(name: &str) -> &'static str {
    let suites = [
        "pjdfstest",
        "fsx",
        "stress-ng",
        "dbench",
        "setfacl",
        "flock-waits",
    ];
    let is = |suite: &&str| name.starts_with(*suite);
    suites.into_iter().find(is).unwrap_or("basics.py")
}

/// Tests of one suite: how many, how many passed on the host and in the guest, how many are different there.
#[derive(Default)]
struct Row {
    tests: usize,
    host: usize,
    guest: usize,
    different: usize,
}

/// Prints what came of each suite, and fails for differences that nobody has explained.
#[track_caller]
fn compare(options: &str, host: &Outcomes, guest: &Outcomes, text: &str) {
    let passes = |outcome: &str| {
        !["failed", "FAILED", "skipped", "never came", "took too long"].contains(&outcome)
    };
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    let (mut explained, mut differences) = (Vec::new(), Vec::new());
    for (name, outcome) in host {
        let there = guest.get(name).map_or("never came", String::as_str);
        let row = rows.entry(suite(name)).or_default();
        row.tests += 1;
        row.host += usize::from(passes(outcome));
        // Most of our own tests tell what they saw, and what the host shows is what is right.
        row.guest += usize::from(passes(there) && (there == outcome || there == "ok"));
        if there == outcome {
            continue;
        }
        row.different += 1;
        let line = format!("{name}: {outcome:?} on the host, {there:?} in the guest");
        match why(name, there, options) {
            Some(why) => explained.push(format!("{line}: {why}")),
            None => differences.push(line),
        }
    }
    println!(
        "{options}\n| suite | tests | passed on the host | passed in the guest | different |\n|---|---|---|---|---|"
    );
    for (suite, row) in &rows {
        println!(
            "| {suite} | {} | {} | {} | {} |",
            row.tests, row.host, row.guest, row.different
        );
    }
    for line in &explained {
        println!("{line}");
    }
    assert!(
        differences.is_empty(),
        "{options}: {} of {} differ:\n{}\n{text}",
        differences.len(),
        host.len(),
        differences.join("\n")
    );
}

/// What the host's own file system does, which must be at least so many things.
#[track_caller]
fn norm(script: &str, at_least: usize) -> Outcomes {
    let host = on_the_host(script).outcomes;
    let unfit: Vec<_> = host
        .iter()
        .filter(|(_, outcome)| *outcome == "took too long")
        .collect();
    assert!(unfit.is_empty(), "on the host: {unfit:?}");
    assert!(host.len() >= at_least, "only {} outcomes", host.len());
    host
}

/// Runs the script at both places and compares.
#[track_caller]
fn same(script: &str, options: &[&str], limit: Duration, at_least: usize) {
    let host = norm(script, at_least);
    let (guest, text) = in_a_guest(script, options, limit);
    compare(
        &format!("QEMU, {}", options.join(" ")),
        &host,
        &guest,
        &text,
    );
}

/// Where the file system under test is in a nested machine: a disk of its own, as its root is none that disks have.
const DISK: &str = "/run/under-test";

/// Our own VM shares a folder, in the lab, with a guest whose programs are the host's own by another folder.
#[track_caller]
fn same_in_our_vm(test: &str, script: &str, limit: Duration, at_least: usize) {
    let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    let mut nested = Nested {
        limit: Some(limit),
        ..Nested::default()
    };
    if !in_nested() {
        let nothing = tempfile::tempdir().unwrap();
        ext4_image(image.path(), 4096, nothing.path()).unwrap();
        let image = image.path().display();
        nested.qemu = vec![
            "-drive".into(),
            format!("file={image},format=raw,if=none,id=tree,cache=unsafe"),
            "-device".into(),
            "virtio-blk-pci,drive=tree".into(),
        ];
    }
    where_linux_boots_or_in(&nested, test, || {
        if in_nested() {
            fs::create_dir(DISK).unwrap();
            let mount = Command::new("mount").args(["/dev/vda", DISK]).status();
            assert!(mount.unwrap().success());
        }
        let began = Instant::now();
        let host = norm(script, at_least);
        println!(
            "{} outcomes without a guest after {:?}",
            host.len(),
            began.elapsed()
        );
        let dir = workplace();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let script = format!(
            "mkdir -p /r && mount -t virtiofs root /r || exit 1\n\
             for d in tmp run dev/shm; do mount -t tmpfs none /r/$d || mount -t tmpfs none /$d; done\n\
             mount -t proc proc /r/proc && mount -t sysfs sys /r/sys && mount -o bind /dev /r/dev || exit 2\n\
             mkdir -p /dev/shm && mount -t tmpfs none /dev/shm; mkdir /r/run/t && mount -t virtiofs tree /r/run/t || exit 3\n\
             cat > /r/run/script << 'END-OF-SUITE'\n{PRELUDE}{script}\nEND-OF-SUITE\n\
             export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
             chroot /r /bin/bash -c 'mkdir /run/t/work && cd /run/t/work && bash /run/script 2>&1 < /dev/null'; echo {ALL}\n\
             sync && umount /r/run/t\n"
        );
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let initrd = guest.initrd_with(&Script::new(&script)).unwrap();
        let share = |id: &str, path: &Path, more: &str| {
            [
                "-fsdev".to_owned(),
                format!("local,id=f-{id},path={}{more}", path.display()),
                "-device".to_owned(),
                format!("virtio-fs-device,fsdev=f-{id},tag={id},id={id}"),
            ]
        };
        let mut vm = Vm::builder()
            .args(["-machine", "microvm", "-m", "1024"])
            .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
            .arg("-initrd")
            .arg(initrd.path())
            .args(share("root", Path::new("/"), ",readonly=on"))
            .args(share("tree", &tree, ",xattr=on,posix-acl=on"))
            .start()
            .unwrap();
        let told = Told::from(&mut vm.console, STEP)
            .unwrap_or_else(|error| panic!("{}", vm.explain(&error)));
        vm.wait_for("GUEST-END status=0", STEP)
            .unwrap_or_else(|error| panic!("{error}"));
        vm.wait(LEAVE).unwrap();
        compare(
            "stratovirt, xattr=on,posix-acl=on",
            &host,
            &told.outcomes,
            &told.text,
        );
    });
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
fn tool(name: &str, version: &str) -> PathBuf {
    let root = cache_dir().join("suites");
    let path = root.join("bin").join(name);
    // In a nested machine they are those of the host.
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
            .args([name, "--version", version])
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .status();
        assert!(status.unwrap().success(), "cargo install {name}");
        fs::remove_dir_all(target).unwrap();
    }
    path
}

/// `pjdfstest` and `fsx`.
fn of_others() -> String {
    let (pjdfstest, fsx) = (tool("pjdfstest", "0.2.2"), tool("fsx", "0.3.2"));
    let config = cache_dir().join("suites/pjdfstest.toml");
    fs::write(
        &config,
        "[features]\nposix_fallocate = {}\nrename_ctime = {}\nutimensat = {}\nutime_now = {}\nstat_st_birthtime = {}\n\
         [settings]\nnaptime = 0.05\nallow_remount = false\n\
         [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n",
    )
    .unwrap();
    format!(
        "{} -c {} -p . 2>/dev/null | sed -u 's/\\x1b\\[[0-9;]*m//g' | grep --line-buffered -E ' (ok|FAILED|skipped)$' | \
             while read -r name result; do outcome \"pjdfstest-$name\" \"$result\"; done\n\
         for seed in 1 2 3 4 5; do check fsx-$seed {} -N 3000 -S $seed fsx-file; done\n",
        pjdfstest.display(),
        config.display(),
        fsx.display()
    )
}

#[test]
#[ignore = "takes minutes: cargo xtask test vhost-user-fs posix --long"]
fn posix_tests_of_others_pass_as_on_the_host() {
    ready();
    same(&of_others(), &WITH_LISTS, Duration::from_secs(1800), 200);
}

#[test]
#[ignore = "takes minutes: cargo xtask test vhost-user-fs posix --long"]
fn posix_stressors_all_run_as_on_the_host() {
    ready();
    let script = format!("{LOADS}{LONG_STRESSORS}").replace("SECONDS", "3");
    same(&script, &WITH_LISTS, Duration::from_secs(3600), 30);
}

#[test]
fn posix_basics_hold_in_a_guest_of_our_own_vm() {
    ready();
    same_in_our_vm(test_path!(), BASICS, LIMIT, 150);
}

#[test]
#[ignore = "takes minutes: cargo xtask test vhost-user-fs posix --long"]
fn posix_everything_runs_in_a_guest_of_our_own_vm() {
    ready();
    let loads = format!("{LOADS}{LONG_STRESSORS}").replace("SECONDS", "3");
    let script = format!("{BASICS}{}{loads}", of_others());
    // Below the two hours of the runner; what hangs is told sooner, by the steps.
    same_in_our_vm(test_path!(), &script, Duration::from_secs(7000), 400);
}
