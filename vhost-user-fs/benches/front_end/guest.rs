//! # The same from a guest
//!
//! **Job.** One Linux guest under QEMU mounts the folder by each daemon and has `fio` and a load of small files take turns on the
//! mounts. **Who is not trusted.** Absolute figures: without KVM the guest's processor is an emulated one, so only ratios say
//! something, and they are nearer to 1 than those of the daemons alone.
//! **Why this way.** All mounts in one guest see the same slow processor within the same seconds.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use tests::lab::{Nested, ensure_packages};

use crate::daemons::{Cache, Daemon};
use crate::report;
use crate::session::launch;

/// Loads of `fio`: name and arguments.
const FIO: &[(&str, &str)] = &[
    ("seq read 64k", "--rw=read --bs=64k"),
    ("rand read 4k", "--rw=randread --bs=4k"),
    (
        "rand read 4k x4",
        "--rw=randread --bs=4k --numjobs=4 --group_reporting",
    ),
    ("seq write 64k", "--rw=write --bs=64k"),
    ("rand write 4k", "--rw=randwrite --bs=4k"),
];

/// Prints `FIGURE load daemon operations-per-second` for each turn. Fields 8 and 49 of a terse line are read and write IOPS.
const SCRIPT: &str = r#"
exec < /dev/null
for n in $DAEMONS; do
    mkdir -p /run/bench$n && mount -t virtiofs bench$n /run/bench$n && mkdir /run/bench$n/of-$n || exit 1
done
figure() { echo "FIGURE $1;$2;$3"; }
one() {
    line=$(fio --minimal --name=load --filename=$PWD/file --size=16M --runtime=2 --time_based --ioengine=psync --direct=1 $3) || exit 2
    figure "$1" "$2" $(echo "$line" | awk -F';' '{ print $8 + $49 }')
}
now() { date +%s%N; }
rate() { figure "$1" "$2" $((FILES * 1000000000 / ($4 - $3))); }
small() {
    a=$(now); i=0; while [ $i -lt $FILES ]; do : > s$i; i=$((i + 1)); done
    b=$(now); rate create $1 $a $b
    echo 2 > /proc/sys/vm/drop_caches
    a=$(now); i=0; while [ $i -lt $FILES ]; do [ -f s$i ] || exit 3; i=$((i + 1)); done
    b=$(now); rate stat $1 $a $b
    echo 2 > /proc/sys/vm/drop_caches
    a=$(now); ls -l > /dev/null
    b=$(now); rate list $1 $a $b
    a=$(now); rm s*
    b=$(now); rate unlink $1 $a $b
}
for n in $DAEMONS; do (cd /run/bench$n/of-$n && dd if=/dev/zero of=file bs=1M count=16 2> /dev/null) || exit 4; done
round=0
while [ $round -lt ROUNDS ]; do
LOADS
    for n in $DAEMONS; do cd /run/bench$n/of-$n; small $n; done
    round=$((round + 1))
done
cd /
for n in $DAEMONS; do umount /run/bench$n || exit 5; done
sync
"#;

/// Boots the guest and prints the table.
pub(crate) fn run(daemons: &[Daemon], rounds: usize, files: usize) {
    ensure_packages(&["fio"]).unwrap();
    // Not /tmp, which may be a tmpfs.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (source, results) = (dir.path().join("tree"), dir.path().join("results"));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&results).unwrap();
    let mut children = Vec::new();
    let mut nested = Nested {
        share: Some(results.clone()),
        limit: Some(Duration::from_secs(1800)),
        ..Nested::default()
    };
    for (n, daemon) in daemons.iter().enumerate() {
        let socket = dir.path().join(format!("socket-{n}"));
        let listener = UnixListener::bind(&socket).unwrap();
        children.push(launch(
            daemon,
            &source,
            Cache::Auto,
            OwnedFd::from(listener),
        ));
        nested.qemu.extend([
            "-chardev".to_owned(),
            format!("socket,id=bench{n},path={}", socket.display()),
            "-device".to_owned(),
            format!("vhost-user-fs-pci,chardev=bench{n},tag=bench{n}"),
        ]);
    }
    let loads: Vec<String> = FIO
        .iter()
        .map(|(name, arguments)| {
            format!("    for n in $DAEMONS; do cd /run/bench$n/of-$n; one '{name}' $n '{arguments}'; done")
        })
        .collect();
    let numbers: Vec<String> = (0..daemons.len()).map(|n| n.to_string()).collect();
    let script = SCRIPT
        .replace("LOADS", &loads.join("\n"))
        .replace("ROUNDS", &rounds.to_string());
    let script = format!("DAEMONS='{}'\nFILES={files}\n{script}", numbers.join(" "));
    fs::write(results.join("script"), script).unwrap();
    let at = results.display();
    let ended = nested.run(&[format!("bash {at}/script > {at}/output 2>&1")]);
    let text = fs::read_to_string(results.join("output")).unwrap_or_default();
    let status = ended.unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(status, 0, "{text}");
    for mut child in children {
        child.wait().unwrap();
    }
    print(daemons, &text);
}

fn print(daemons: &[Daemon], text: &str) {
    let mut figures: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("FIGURE ")) {
        let fields: Vec<&str> = line.split(';').collect();
        let [load, daemon, rate] = fields[..] else {
            panic!("{line}");
        };
        let of = figures
            .entry(load)
            .or_insert_with(|| vec![Vec::new(); daemons.len()]);
        of[daemon.parse::<usize>().unwrap()].push(rate.parse().unwrap());
    }
    print!("{:<18}{:>16}", "in a guest, ops/s", daemons[0].name);
    for daemon in &daemons[1..] {
        print!("{:>18} {:>6}", daemon.name, "ratio");
    }
    println!();
    let mut ratios = vec![Vec::new(); daemons.len()];
    for (load, rates) in &figures {
        print!("{load:<18}{:>16.0}", report::median(rates[0].clone()));
        for (n, peer) in rates.iter().enumerate().skip(1) {
            let of_rounds = rates[0].iter().zip(peer).map(|(ours, peer)| ours / peer);
            let ratio = report::median(of_rounds.collect());
            print!("{:>18.0} {ratio:>6.2}", report::median(peer.clone()));
            ratios[n].push(ratio);
        }
        println!();
    }
    for (n, ratios) in ratios.iter().enumerate().skip(1) {
        println!(
            "beside {}: {:.2} times in geometric mean, lowest {:.2}",
            daemons[n].name,
            report::mean(ratios),
            ratios.iter().copied().fold(f64::INFINITY, f64::min),
        );
    }
}
