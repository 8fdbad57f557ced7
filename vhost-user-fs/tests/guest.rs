//! A Linux guest on QEMU, a front end that no one here wrote, works on the shared tree; the host compares.

#![allow(clippy::unwrap_used)] // test code

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::daemon::Daemon;
use tests::lab::{Flavour, Guest, Script};

/// How long the daemon may take to notice that its front end is gone, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What the guest does. Every line that can fail ends the script with the line's number.
const SCRIPT: &str = r#"
mkdir -p /mnt
mount -t virtiofs shared /mnt || exit 1
cd /mnt || exit 2
[ "$(cat greeting)" = "from the host" ] || exit 3
[ "$(readlink link)" = "/etc/hostname" ] || exit 4
echo "from the guest" > answer || exit 5
dd if=/dev/urandom of=random bs=64k count=64 2>/dev/null || exit 6
dd if=random of=copy bs=1000 conv=fsync 2>/dev/null || exit 7
cmp random copy || exit 8
md5sum random | cut -d' ' -f1 > random.md5
dd if=/dev/zero of=holes bs=1 count=1 seek=10M 2>/dev/null || exit 9
printf 'middle' | dd of=holes bs=1 seek=5M conv=notrunc 2>/dev/null || exit 10
mkdir -p deep/er/est && mv answer deep/er/est/moved || exit 11
ln deep/er/est/moved hard && ln -s deep/er/est/moved soft || exit 12
[ "$(cat soft)" = "from the guest" ] || exit 13
[ "$(stat -c %h hard)" = 2 ] || exit 14
chmod 640 hard && chown 1234:77 hard && touch -d '2001-02-03 04:05:06' hard || exit 15
mkdir full && touch full/x && ! rmdir full 2>/dev/null || exit 16
rm -r full && [ ! -e full ] || exit 17
echo one > a; echo two > b; mv a b && [ "$(cat b)" = one ] || exit 18
echo data > open; exec 3< open; rm open; [ "$(cat <&3)" = data ] || exit 19; exec 3<&-
mkfifo pipe && (echo through > pipe &) && [ "$(cat pipe)" = through ] || exit 20
mkdir small; i=0
while [ $i -lt FILES ]; do echo $i > small/$i || exit 21; i=$((i + 1)); done
[ "$(ls small | wc -l)" = FILES ] || exit 22
i=0; while [ $i -lt FILES ]; do rm small/$i || exit 23; i=$((i + 2)); done
[ "$(ls small | wc -l)" = $((FILES / 2)) ] || exit 24
echo 3 > /proc/sys/vm/drop_caches
[ "$(cat small/777)" = 777 ] || exit 25
cat secret/../link >/dev/null 2>&1 && exit 26
ls -la . > listing || exit 27
sync
cd / && umount /mnt || exit 28
"#;

/// Boots the guest with the script; returns what it printed, of which each line is told at once.
fn boot(socket: &Path, script: &str, mut each: impl FnMut(&str)) -> String {
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let initrd = guest.initrd_with(&Script::new(script)).unwrap();
    let chardev = format!("socket,id=c,path={}", socket.display());
    let mut child = Command::new("timeout")
        .args([
            "300",
            "qemu-system-x86_64",
            "-M",
            "pc",
            "-accel",
            "tcg",
            "-cpu",
            "max",
        ])
        .args([
            "-m",
            "512",
            "-nodefaults",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "stdio",
        ])
        .args([
            "-object",
            "memory-backend-memfd,id=m,size=512M,share=on",
            "-numa",
            "node,memdev=m",
        ])
        .args([
            "-chardev",
            &chardev,
            "-device",
            "vhost-user-fs-pci,chardev=c,tag=shared",
        ])
        .args(["-append", "console=ttyS0 quiet panic=-1 reboot=t"])
        .arg("-kernel")
        .arg(&guest.kernel.bzimage)
        .arg("-initrd")
        .arg(initrd.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    let mut console = BufReader::new(child.stdout.take().unwrap());
    loop {
        let before = text.len();
        if console.read_line(&mut text).unwrap() == 0 {
            break;
        }
        each(&text[before..]);
    }
    child.wait().unwrap();
    text
}

/// Shares a fresh tree with a guest that runs the script, and looks at what it left.
fn run(options: &[&str], files: usize) {
    let program = Path::new(env!("CARGO_BIN_EXE_vhost_user_fs"));
    run_with(program, options, files, SCRIPT, |_, _| {});
}

/// As [`run`], of another program and a script; each line of the guest's console is told, with the daemon's process.
fn run_with(
    program: &Path,
    options: &[&str],
    files: usize,
    script: &str,
    mut each: impl FnMut(&str, Pid),
) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    let socket = dir.path().join("socket");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("greeting"), "from the host\n").unwrap();
    symlink("/etc/hostname", tree.join("link")).unwrap();
    let mut daemon = Daemon::sharing(program, &tree, &socket, options).unwrap();
    let pid = Pid::from_raw(daemon.pid());
    let script = script.replace("FILES", &files.to_string());
    let console = boot(&socket, &script, |line| each(line, pid));
    assert!(
        console.contains("GUEST-END status=0"),
        "{options:?}: {console}"
    );
    assert!(daemon.wait(LIMIT).unwrap().success(), "{options:?}");
    assert!(!socket.exists(), "the socket is gone with the daemon");

    let read = |name: &str| fs::read(tree.join(name)).unwrap();
    assert_eq!(read("deep/er/est/moved"), b"from the guest\n");
    let hard = fs::metadata(tree.join("hard")).unwrap();
    assert_eq!(
        (hard.mode() & 0o7777, hard.nlink(), hard.mtime()),
        (0o640, 2, 981_173_106)
    );
    if nix::unistd::geteuid().is_root() {
        assert_eq!((hard.uid(), hard.gid()), (1234, 77));
    }
    assert_eq!(
        fs::read_link(tree.join("soft")).unwrap(),
        Path::new("deep/er/est/moved")
    );
    let sum = Command::new("md5sum")
        .arg(tree.join("random"))
        .output()
        .unwrap()
        .stdout;
    assert_eq!(sum[..32], read("random.md5")[..32]);
    assert_eq!(read("random"), read("copy"));
    let holes = read("holes");
    assert_eq!(holes.len(), (10 << 20) + 1);
    assert_eq!(&holes[5 << 20..(5 << 20) + 6], b"middle");
    assert_eq!(holes.iter().filter(|b| **b != 0).count(), 6);
    let small: BTreeMap<u32, String> = fs::read_dir(tree.join("small"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let number = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            (number, fs::read_to_string(path).unwrap())
        })
        .collect();
    assert_eq!(small.len(), files / 2);
    assert!(
        small
            .iter()
            .all(|(n, text)| n % 2 == 1 && *text == format!("{n}\n"))
    );
    for name in ["open", "full", "a"] {
        assert!(!tree.join(name).exists(), "{name}");
    }
}

#[test]
fn a_linux_guest_works_on_the_tree() {
    run(&[], 10_000);
    run(&["-cache", "never"], 1000);
    run(
        &["-cache=always", "-writeback", "-xattr", "-posix-acl"],
        1000,
    );
}

/// Between two steps the guest has a file open that has no name any more, and in each loop it is in the midst of a folder.
#[test]
fn a_linux_guest_works_while_the_program_is_replaced() {
    let programs = tempfile::tempdir().unwrap();
    let program = programs.path().join("vhost_user_fs");
    let beside = programs.path().join("new");
    let put = || {
        fs::copy(env!("CARGO_BIN_EXE_vhost_user_fs"), &beside).unwrap();
        fs::rename(&beside, &program).unwrap();
    };
    put();
    let script = SCRIPT
        .replace("rm open; [", "rm open; echo STEP; [")
        .replace(
            " || exit 21;",
            " || exit 21; [ $((i % 100)) = 0 ] && echo STEP;",
        )
        .replace('\n', "\necho STEP\n");
    // A file that is executed keeps its number to itself.
    let (mut runs, mut asked, mut done) = (0, 0, 0);
    run_with(&program, &[], 1000, &script, |line, pid| {
        if line.contains("STEP") {
            // On a busy machine the last lines are read when the guest has ended, and the daemon with it.
            let Ok(program) = fs::metadata(format!("/proc/{pid}/exe")) else {
                return;
            };
            let now = program.ino();
            done += u32::from(now != runs);
            runs = now;
            put();
            kill(pid, Signal::SIGUSR2).unwrap();
            asked += 1;
        }
    });
    println!("{done} programs ran, {asked} were asked for");
    // Those that are asked for while one takes its place are one.
    assert!(done > 3, "{done} of {asked}");
}
