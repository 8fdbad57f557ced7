//! # QMP as clients use it
//!
//! **Job.** The published client `qemu.qmp` drives a VM, and what it hides (ids, errors, order) is checked raw.
//! **Who is not trusted.** The VMM. **Why this way.** Management software speaks QEMU's dialect; a client that was
//! written against QEMU is the best judge.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use serde_json::json;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tests::host::{Tap, require_kvm};
use tests::lab::cache_dir;
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::{Qmp, QmpError};
use tests::vm::{Vm, sleeping_guest};
use tests::wait::Watched;

const LIMIT: Duration = Duration::from_secs(30);

/// A Python with the client, in a virtual environment in the cache.
fn python_with_client() -> PathBuf {
    tests::lab::ensure_packages(&["python3", "python3-venv"]).unwrap();
    let dir = cache_dir().join("qemu-qmp-0.0.6");
    let python = dir.join("bin/python");
    if !dir.join("complete").exists() {
        let made = Command::new("/usr/bin/python3")
            .args(["-m", "venv"])
            .arg(&dir)
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let got = Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "qemu.qmp==0.0.6"])
            .output()
            .unwrap();
        assert!(
            got.status.success(),
            "{}",
            String::from_utf8_lossy(&got.stderr)
        );
        std::fs::write(dir.join("complete"), "").unwrap();
    }
    python
}

#[test]
fn the_published_client_drives_a_vm() {
    let python = python_with_client();
    let mut vm = sleeping_guest();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/qemu_qmp.py");
    let output = Command::new(python)
        .arg(script)
        .arg(vm.qmp_socket().unwrap())
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success() && text.contains("all well"),
        "{text}\n{}",
        vm.messages()
    );
    let status = vm.wait(LIMIT).unwrap();
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
}

#[test]
fn commands_wait_for_the_negotiation_and_keep_any_id() {
    let vm = sleeping_guest();
    let watched = Watched::new(vm.pid()).unwrap();
    let mut qmp = Qmp::connect_raw(&vm.qmp_socket().unwrap(), &watched, LIMIT).unwrap();
    assert!(
        qmp.greeting["QMP"]["version"]["qemu"]["major"].is_number(),
        "{}",
        qmp.greeting
    );
    let refused = qmp.execute("query-status", json!({}));
    assert!(
        matches!(&refused, Err(QmpError::Refused { class, .. }) if class == "CommandNotFound"),
        "{refused:?}"
    );
    qmp.execute("qmp_capabilities", json!({})).unwrap();
    for id in [
        json!("text"),
        json!({"a": [1, null]}),
        json!(null),
        json!(-1.5),
    ] {
        qmp.send_raw(&format!(
            "{}\n",
            json!({"execute": "query-status", "id": id})
        ))
        .unwrap();
        let reply = qmp.reply("query-status").unwrap();
        assert_eq!(reply["id"], id, "{reply}");
        assert_eq!(reply["return"]["running"], true, "{reply}");
    }
    qmp.send_raw("{\"execute\": \"query-status\"}\n").unwrap();
    assert!(
        qmp.reply("query-status").unwrap().get("id").is_none(),
        "no id, so none comes back"
    );
}

#[test]
fn nonsense_is_refused_and_the_connection_lives_on() {
    let vm = sleeping_guest();
    let mut qmp = vm.qmp().unwrap();
    for nonsense in [
        "{\"execute\": 7}\n",
        "[1, 2]\n",
        "{\"arguments\": {}}\n",
        "{\"execute\": \"stop\", \"arguments\": []}\n",
    ] {
        qmp.send_raw(nonsense).unwrap();
        let reply = qmp.reply(nonsense).unwrap();
        assert!(
            reply["error"]["class"].is_string(),
            "{nonsense} got {reply}"
        );
    }
    assert_eq!(
        qmp.execute("query-status", json!({})).unwrap()["status"],
        "running"
    );
}

#[test]
fn a_stopped_guest_does_not_run_and_goes_on_where_it_was() {
    require_kvm();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::Machine.path(), "end=reset")
        .with_qmp()
        .start()
        .unwrap();
    vm.wait_for("MACHINE OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut qmp = vm.qmp().unwrap();
    qmp.execute("stop", json!({})).unwrap();
    qmp.wait_event("STOP", LIMIT).unwrap();
    assert_eq!(
        qmp.execute("query-status", json!({})).unwrap()["status"],
        "paused"
    );
    qmp.execute("cont", json!({})).unwrap();
    qmp.wait_event("RESUME", LIMIT).unwrap();
    qmp.wait_event("RESET", LIMIT).unwrap();
    vm.wait_for("MACHINE OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    qmp.execute("quit", json!({})).unwrap();
    let event = qmp.wait_event("SHUTDOWN", LIMIT).unwrap();
    assert_eq!(event["data"]["guest"], false, "{event}");
    assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(0));
}

#[test]
fn thread_ids_are_those_of_the_processors() {
    require_kvm();
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-smp", "2"])
        .kernel(&Payload::FirstByte.path(), "")
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let cpus = qmp.execute("query-cpus-fast", json!({})).unwrap();
    let threads = tests::procfs::Status::of_threads(vm.pid()).unwrap();
    let ids: Vec<i64> = cpus
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["thread-id"].as_i64().unwrap())
        .collect();
    assert_eq!(ids.len(), 2, "{cpus}");
    for id in ids {
        let thread = threads
            .get(&i32::try_from(id).unwrap())
            .unwrap_or_else(|| panic!("no thread {id}: {threads:?}"));
        assert!(
            thread.name().to_lowercase().contains("cpu"),
            "{}",
            thread.name()
        );
    }
}

/// What the first of `virsh`'s runs says is that the binary was probed to the end; the second runs a guest with a card; the
/// others are what docs/qmp.md says of disks.
#[test]
fn libvirt_probes_the_binary_and_runs_a_guest() {
    require_kvm();
    tests::lab::ensure_packages(&[
        "libvirt-daemon",
        "libvirt-daemon-driver-qemu",
        "libvirt-clients",
    ])
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tap = Tap::new("sv-libvirt", "10.7.52.1/24").unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/libvirt.sh");
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", script])
        .arg(dir.path())
        .arg(tests::vm::binary("stratovirt").unwrap())
        .arg(Payload::Machine.path())
        .arg(&tap.name)
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    let mut rest = text.as_str();
    for step in [
        "<machine>microvm</machine>",
        "<vcpu max='254'/>",
        "<mode name='host-passthrough' supported='yes'>",
        "<value>memfd</value>",
        "<value>virtiofs</value>",
        "Domain 'guest' created",
        "running",
        "Domain 'guest' suspended",
        "paused (user)",
        "Domain 'guest' resumed",
        "running",
        "CPU(s):         2",
        "\"name\": \"guest\"",
        "Domain 'guest' was reset",
        "Domain 'guest' destroyed",
        "No PCI buses available",
        "virtio disk cannot have an address of type 'virtio-mmio'",
    ] {
        let at = rest
            .find(step)
            .unwrap_or_else(|| panic!("{step} is missing or too early in\n{text}"));
        rest = &rest[at + step.len()..];
    }
}

/// Answers of this program and of QEMU to the same bytes: class and id, and the words where they are about the protocol.
#[test]
fn mistakes_are_answered_as_qemu_answers_them() {
    require_kvm();
    tests::lab::ensure_packages(&["qemu-system-x86"]).unwrap();
    let vm = sleeping_guest();
    let mut ours = vm.qmp().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-qmp",
        ])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .spawn()
        .unwrap();
    let watched = Watched::new(i32::try_from(qemu.id()).unwrap()).unwrap();
    let mut theirs = Qmp::connect(&socket, &watched, LIMIT).unwrap();
    for (bytes, same_words) in [
        ("{'execute': 'query-status', 'id': 'single'}", false),
        (
            "{\"execute\": \"query-name\", \"id\": 18446744073709551615}",
            false,
        ),
        ("{'execute': 'query-name', 'id': [1, {'a': null}]}", false),
        ("{'execute': 'no-such-command', 'id': 1}", false),
        ("{}", true),
        ("[]", true),
        ("{'execute': 1}", true),
        ("{'execute': 'stop', 'arguments': []}", true),
        ("{'execute': 'stop', 'bogus': 1}", true),
        ("{'execute': 'stop', 'arguments': {'x': 1}}", false),
        ("{'execute': 'qom-list', 'arguments': {}}", true),
        ("{'execute': 'qom-list', 'arguments': {'path': 1}}", true),
        (
            "{'execute': 'qom-list', 'arguments': {'path': '/nowhere'}}",
            true,
        ),
        (
            "{'execute': 'qom-get', 'arguments': {'path': '/machine', 'property': 'x'}}",
            false,
        ),
        (
            "{'execute': 'device-list-properties', 'arguments': {'typename': 'x'}}",
            false,
        ),
        ("{'execute': 'balloon', 'arguments': {'value': 1}}", false),
        ("{'execute': 'query-balloon'}", true),
        ("{'execute': 'qmp_capabilities'}", true),
        (
            "{'execute': 'human-monitor-command', 'arguments': {}}",
            true,
        ),
        ("{'a': 1, 'a': 2}", false),
        ("{1: 2}", true),
        ("{'a' 1}", true),
        ("{'a': 1 'b': 2}", true),
        ("[1 2]", true),
        ("[tru]", true),
        ("[1,]", true),
    ] {
        let mut answers = [&mut ours, &mut theirs].map(|qmp| {
            qmp.send_raw(&format!("{bytes}\n")).unwrap();
            qmp.reply(bytes).unwrap()
        });
        let words = answers
            .each_mut()
            .map(|answer| answer["error"]["desc"].take());
        let [our_answer, their_answer] = &answers;
        assert_eq!(our_answer.get("id"), their_answer.get("id"), "{bytes}");
        assert_eq!(
            our_answer["error"]["class"], their_answer["error"]["class"],
            "{bytes}: {words:?}"
        );
        if same_words {
            assert_eq!(words[0], words[1], "{bytes}");
        }
    }
    theirs.execute("quit", json!({})).unwrap();
    qemu.wait().unwrap();
}

#[test]
fn what_is_told_about_the_vm_is_true() {
    require_kvm();
    let vm = Vm::builder()
        .args([
            "-machine",
            "microvm",
            "-m",
            "128",
            "-smp",
            "2,sockets=1,cores=2",
            "-name",
            "told",
            "-object",
            "{\"qom-type\":\"iothread\",\"id\":\"io\"}",
        ])
        .kernel(&Payload::Machine.path(), "end=halt")
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let mut ask = |command: &str, arguments: serde_json::Value| qmp.execute(command, arguments);
    let list = ask("qom-list", json!({ "path": "/machine/unattached" })).unwrap();
    let names: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["type", "device[0]", "device[1]"]);
    assert_eq!(
        ask("query-mem", json!({})).unwrap(),
        json!({ "regions": [{ "address": 0, "size": 128 << 20 }] })
    );
    let core = json!({ "path": "/machine/unattached/device[1]", "property": "core-id" });
    assert_eq!(ask("qom-get", core).unwrap(), 1);
    let append = json!({ "path": "/machine", "property": "append" });
    assert_eq!(ask("qom-get", append).unwrap(), "end=halt");
    assert_eq!(
        ask("qom-list", json!({ "path": "/objects" })).unwrap()[1]["name"],
        "io"
    );
    assert_eq!(
        ask("query-memory-size-summary", json!({})).unwrap(),
        json!({ "base-memory": 128 << 20, "plugged-memory": 0 })
    );
    assert_eq!(
        ask("query-hotpluggable-cpus", json!({}))
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        2
    );

    let register = json!({ "vcpu": 0, "addr": "10" });
    let running = ask("query-vcpu-reg", register.clone())
        .unwrap_err()
        .to_string();
    assert!(running.contains("'stop' the guest before"), "{running}");
    ask("stop", json!({})).unwrap();
    let pointer = ask("query-vcpu-reg", register).unwrap();
    let pointer = u64::from_str_radix(pointer.as_str().unwrap(), 16).unwrap();
    // A bare guest runs where it was loaded, and its memory is mapped as it is.
    assert!((0x10_0000..128 << 20).contains(&pointer), "{pointer:#x}");
    let code = ask("query-mem-gpa", json!({ "gpa": format!("{pointer:x}") })).unwrap();
    assert_ne!(code, "0", "no code at {pointer:#x}");
    let beyond = ask("query-mem-gpa", json!({ "gpa": "ffffffffffff" }))
        .unwrap_err()
        .to_string();
    assert!(beyond.contains("of which there are 128 MiB"), "{beyond}");
    let unknown = ask("query-vcpu-reg", json!({ "vcpu": 2, "addr": "0" }))
        .unwrap_err()
        .to_string();
    assert!(unknown.contains("allowed: 0 to 1"), "{unknown}");

    let state = json!({ "name": "log_debug" });
    assert_eq!(
        ask("trace-event-get-state", state.clone()).unwrap()[0]["state"],
        "disabled"
    );
    ask(
        "trace-event-set-state",
        json!({ "name": "log_*", "enable": true }),
    )
    .unwrap();
    assert_eq!(
        ask("trace-event-get-state", state).unwrap()[0]["state"],
        "enabled"
    );
    let monitor = ask(
        "human-monitor-command",
        json!({ "command-line": "info cpus" }),
    )
    .unwrap_err()
    .to_string();
    assert!(monitor.contains("query-cpus-fast"), "{monitor}");
}

/// A tool's output.
fn told(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Guest RAM of 128 MiB, as the kernel has it, with bytes at places that its guest does not use: between holes, and across the blocks
/// that a dump is written in.
fn scattered(vm: &Vm) -> File {
    let numbers = procfs::fds(vm.pid()).unwrap().into_keys();
    let mut files = numbers.filter_map(|number| {
        let path = format!("/proc/{}/fd/{number}", vm.pid());
        File::options().read(true).write(true).open(path).ok()
    });
    let is_ram = |file: &File| file.metadata().is_ok_and(|about| about.len() == 128 << 20);
    let memory = files.find(is_ram).unwrap();
    for island in 3..13u64 {
        let bytes = vec![island as u8 + 1; 70_001 + (island as usize) * (256 << 10)];
        memory
            .write_all_at(&bytes, island * (9 << 20) + island * 4096 + 7)
            .unwrap();
    }
    memory
}

#[test]
fn a_dump_is_a_core_file_that_debuggers_read() {
    tests::lab::ensure_packages(&["binutils", "gdb"]).unwrap();
    let vm = sleeping_guest();
    let mut qmp = vm.qmp().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let dump = |name: &str| json!({ "paging": false, "protocol": format!("fd:{name}") });
    let name = json!({ "fdname": "core" });
    qmp.execute_with("getfd", name.clone(), &[file.as_fd()])
        .unwrap();
    // So that what is dumped is what is asked for afterwards.
    qmp.execute("stop", json!({})).unwrap();
    let memory = scattered(&vm);
    qmp.execute("dump-guest-memory", dump("core")).unwrap();
    assert_eq!(
        qmp.execute("query-status", json!({})).unwrap()["status"],
        "paused"
    );
    let path = file.path().to_str().unwrap();
    let headers = told("readelf", &["--wide", "--file-header", "--segments", path]);
    assert!(headers.contains("CORE (Core file)"), "{headers}");
    let load = headers.lines().find(|line| line.contains("LOAD")).unwrap();
    let words: Vec<&str> = load.split_whitespace().collect();
    // Offset, virtual and physical address, bytes in the file and in memory.
    assert_eq!(
        words[3..6],
        ["0x0000000000000000", "0x8000000", "0x8000000"]
    );
    let offset = u64::from_str_radix(&words[1][2..], 16).unwrap();
    assert_eq!(
        file.as_file().metadata().unwrap().len(),
        offset + (128 << 20)
    );
    let dumped = std::fs::read(path).unwrap().split_off(offset as usize);
    let mut wanted = vec![0; 128 << 20];
    memory.read_exact_at(&mut wanted, 0).unwrap();
    assert!(dumped == wanted, "the file has other bytes than guest RAM");
    drop((dumped, wanted));
    let notes = told("readelf", &["--wide", "--notes", path]);
    assert!(
        notes.contains("NT_PRSTATUS") && notes.contains("QEMU"),
        "{notes}"
    );

    // The guest stands still ever since.
    let register = json!({ "vcpu": 0, "addr": "10" });
    let pointer = qmp.execute("query-vcpu-reg", register).unwrap();
    let pointer = u64::from_str_radix(pointer.as_str().unwrap(), 16).unwrap();
    let code = json!({ "gpa": format!("{pointer:x}") });
    let code = qmp.execute("query-mem-gpa", code).unwrap();
    let code = u32::from_str_radix(code.as_str().unwrap(), 16).unwrap();
    let commands = [
        "--batch",
        "--nx",
        &format!("--core={path}"),
        "--eval-command=output/x $rip",
        "--eval-command=echo \\n",
        "--eval-command=output/x *(unsigned int *)$rip",
    ];
    let seen = told("gdb", &commands);
    let expected = format!("{pointer:#x}\n{code:#x}");
    assert!(
        code != 0 && seen.trim_end().ends_with(&expected),
        "{seen}\nis not {expected}"
    );

    // One that runs goes on afterwards.
    qmp.execute("cont", json!({})).unwrap();
    let second = tempfile::tempfile().unwrap();
    qmp.execute_with("getfd", name.clone(), &[second.as_fd()])
        .unwrap();
    qmp.execute("dump-guest-memory", dump("core")).unwrap();
    assert_eq!(
        qmp.execute("query-status", json!({})).unwrap()["status"],
        "running"
    );

    // What is refused.
    let mut refuse = |arguments: serde_json::Value, why: &str| {
        let said = qmp
            .execute("dump-guest-memory", arguments)
            .unwrap_err()
            .to_string();
        assert!(said.contains(why), "{said}");
    };
    refuse(
        json!({ "paging": false, "protocol": "tcp:/tmp/core" }),
        "allowed: file:PATH, or fd:NAME",
    );
    refuse(
        json!({ "paging": false, "protocol": "file:/tmp/core" }),
        "not a folder that -snapshot-dir names",
    );
    refuse(
        json!({ "paging": true, "protocol": "fd:core" }),
        "'paging' is true",
    );
    refuse(dump("core"), "'core' not found");
    let (_reader, writer) = std::io::pipe().unwrap();
    let opened = |options: &mut std::fs::OpenOptions| options.open(vm.dir().join("other")).unwrap();
    let appends = opened(std::fs::OpenOptions::new().append(true).create(true));
    let reads = opened(std::fs::OpenOptions::new().read(true));
    for (fd, why) in [
        (file.as_fd(), "allowed: 0"),
        (writer.as_fd(), "is no file"),
        (appends.as_fd(), "appends (O_APPEND)"),
        (reads.as_fd(), "for reading only"),
    ] {
        let mut qmp = vm.qmp().unwrap();
        qmp.execute_with("getfd", name.clone(), &[fd]).unwrap();
        let said = qmp
            .execute("dump-guest-memory", dump("core"))
            .unwrap_err()
            .to_string();
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_dump_goes_to_a_new_file_where_snapshots_may_be_made() {
    require_kvm();
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-snapshot-dir"])
        .arg(dir.path())
        .kernel(&Payload::Machine.path(), "end=halt")
        .with_qmp()
        .start()
        .unwrap();
    vm.wait_for("MACHINE OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut qmp = vm.qmp().unwrap();
    let dump = |name: &str, detach: bool| {
        let uri = format!("file:{}", dir.path().join(name).display());
        json!({ "paging": false, "protocol": uri, "detach": detach })
    };
    let far = |qmp: &mut tests::qmp::Qmp| qmp.execute("query-dump", json!({})).unwrap();
    assert_eq!(
        far(&mut qmp),
        json!({ "status": "none", "completed": 0, "total": 0 })
    );
    let done = json!({ "status": "completed", "completed": 128 << 20, "total": 128 << 20 });
    for (name, detach) in [("one", false), ("two", true)] {
        qmp.execute("dump-guest-memory", dump(name, detach))
            .unwrap();
        let told = qmp.wait_event("DUMP_COMPLETED", LIMIT).unwrap();
        assert_eq!(told["data"], json!({ "result": done }));
        assert_eq!(far(&mut qmp), done);
        // The guest, which ran before, runs again before that is told.
        assert_eq!(
            qmp.execute("query-status", json!({})).unwrap()["status"],
            "running"
        );
        let bytes = std::fs::read(dir.path().join(name)).unwrap();
        assert!(bytes.len() > 128 << 20 && bytes.starts_with(b"\x7fELF\x02"));
    }
    for (name, why) in [
        ("one", "File exists"),
        ("sub/one", "not a folder that -snapshot-dir names"),
        ("", "allowed: a file in it"),
        (".one", "not a snapshot's name"),
    ] {
        let said = qmp
            .execute("dump-guest-memory", dump(name, true))
            .unwrap_err()
            .to_string();
        assert!(said.contains(why), "{name}: {said}");
    }
    assert_eq!(far(&mut qmp), done);
}

/// On a file system that is full before all is written.
#[test]
fn a_dump_that_finds_no_room_is_told_and_the_guest_goes_on() {
    require_kvm();
    tests::host::require_root();
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none"])
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(mounted.success());
    let ends = || {
        let mut vm = Vm::builder()
            .args(["-machine", "microvm", "-m", "128", "-snapshot-dir"])
            .arg(dir.path())
            .kernel(&Payload::Machine.path(), "end=halt")
            .with_qmp()
            .start()
            .unwrap();
        vm.wait_for("MACHINE OK", LIMIT)
            .map_err(|e| e.to_string())?;
        let mut qmp = vm.qmp().unwrap();
        let uri = format!("file:{}", dir.path().join("core").display());
        let dump = json!({ "paging": false, "protocol": uri, "detach": true });
        let answer = qmp.execute("dump-guest-memory", dump);
        let told = qmp.wait_event("DUMP_COMPLETED", LIMIT).unwrap();
        let status = qmp.execute("query-status", json!({})).unwrap();
        Ok::<_, String>((answer.is_ok(), told["data"].clone(), status))
    };
    let seen = ends();
    let unmounted = Command::new("umount")
        .arg("-l")
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(unmounted.success());
    let (answered, told, status) = seen.unwrap();
    assert!(answered);
    assert_eq!(told["result"]["status"], "failed", "{told}");
    let error = told["error"].as_str().unwrap();
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(status["status"], "running");
}

#[test]
fn disks_tell_what_they_have_done() {
    require_kvm();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-no-shutdown"])
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=off", image.display()))
        .args(["-device", "virtio-blk-device,drive=d0,id=disk"])
        .kernel(&Payload::BlkRw.path(), "sector=8 count=8 rounds=4")
        .with_qmp()
        .start()
        .unwrap();
    // Whatever the guest has an answer to is counted.
    vm.wait_for("BLK-RW OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut qmp = vm.qmp().unwrap();
    let disks = qmp.execute("query-blockstats", json!({})).unwrap();
    let [disk] = disks.as_array().unwrap().as_slice() else {
        panic!("{disks}");
    };
    assert_eq!(
        (&disk["device"], &disk["qdev"], &disk["node-name"]),
        (&json!("d0"), &json!("disk"), &json!("d0"))
    );
    let stats = &disk["stats"];
    for (name, number) in [
        ("rd_operations", 4),
        ("wr_operations", 4),
        ("flush_operations", 4),
        ("unmap_operations", 0),
        ("rd_bytes", 4 * 8 * 512),
        ("wr_bytes", 4 * 8 * 512),
        ("wr_highest_offset", (8 + 4 * 8) * 512),
        ("failed_rd_operations", 0),
        // Behind the end.
        ("invalid_rd_operations", 1),
        ("invalid_wr_operations", 0),
    ] {
        assert_eq!(stats[name], number, "{name} in {stats}");
    }
    for name in [
        "rd_total_time_ns",
        "wr_total_time_ns",
        "flush_total_time_ns",
    ] {
        let nanoseconds = stats[name].as_u64().unwrap();
        assert!(
            (1..LIMIT.as_nanos()).contains(&u128::from(nanoseconds)),
            "{name} in {stats}"
        );
    }
    let nodes = qmp
        .execute("query-blockstats", json!({ "query-nodes": true }))
        .unwrap();
    assert_eq!(nodes, json!([{ "node-name": "d0", "stats": stats }]));
}

/// What QEMU answers to these commands, without a guest; `accel` is of `-machine none`.
fn qemu_says(accel: &str, commands: &[serde_json::Value]) -> Vec<serde_json::Value> {
    use std::io::Write;
    tests::lab::ensure_packages(&["qemu-system-x86"]).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-machine", &format!("none{accel}")])
        .args(["-nodefaults", "-nographic", "-qmp", "stdio"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = qemu.stdin.take().unwrap();
    let (first, last) = (
        json!({ "execute": "qmp_capabilities" }),
        json!({ "execute": "quit" }),
    );
    for command in [&first].into_iter().chain(commands).chain([&last]) {
        writeln!(input, "{command}").unwrap();
    }
    let output = qemu.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    // Greeting and the answer to the negotiation come first.
    let lines = text.lines().skip(2).take(commands.len());
    lines
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["return"].clone())
        .collect()
}

/// Where CPUID of a guest here is not that of QEMU's on the same host, and why.
const OTHER_FEATURES: &[&str] = &[
    // By the topology of this guest, of which QEMU's has none yet.
    "ht",
    "cmp-legacy",
    "topoext",
    // KVM offers it on AMD too, where no processor has it.
    "arch-capabilities",
    // A guest of QEMU's has it with migratable=off.
    "invtsc",
    // No nested virtualisation and no performance counters here.
    "vmx",
    "svm",
    "pdcm",
    "perfctr-core",
    "intel-pt",
    "arch-lbr",
    // QEMU asks the kernel for large registers first.
    "amx-tile",
    "amx-int8",
    "amx-bf16",
    "xfd",
    // QEMU hides them unless told that the host's processors are the guest's alone, or its interrupt controller is another.
    "monitor",
    "waitpkg",
    "kvm-hint-dedicated",
    "kvm-msi-ext-dest-id",
    // QEMU's are as high as the features need.
    "min-level",
    "min-xlevel",
];

#[test]
fn the_processor_is_described_as_qemu_describes_it() {
    let ask = |kind: &str, model: serde_json::Value| {
        json!({
            "execute": "query-cpu-model-expansion",
            "arguments": { "type": kind, "model": model },
        })
    };
    let theirs = qemu_says(",accel=kvm", &[ask("static", json!({ "name": "host" }))]);
    let theirs = theirs[0]["model"]["props"].as_object().unwrap().clone();
    let vm = sleeping_guest();
    let mut qmp = vm.qmp().unwrap();
    let mut expand = |kind: &str, model: serde_json::Value| {
        qmp.execute(
            "query-cpu-model-expansion",
            json!({ "type": kind, "model": model }),
        )
        .unwrap()["model"]
            .clone()
    };
    let model = expand("static", json!({ "name": "host" }));
    assert_eq!(model["name"], "base");
    let ours = model["props"].as_object().unwrap();
    let mut compared = 0;
    let mut found = Vec::new();
    for (name, value) in ours {
        // Names for the bits that QEMU of this version does not know would be names of our own.
        let their = theirs.get(name).unwrap_or_else(|| panic!("{name}"));
        compared += 1;
        if value != their {
            found.push(name.as_str());
        }
    }
    assert!(compared > 150, "{compared}");
    let unknown: Vec<_> = found
        .iter()
        .filter(|name| !OTHER_FEATURES.contains(name))
        .map(|name| format!("{name}: {} here, {} in QEMU", ours[*name], theirs[*name]))
        .collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
    // As libvirt goes on.
    assert_eq!(expand("full", model.clone()), model);
    let unsafe_one = json!({ "name": "host", "props": { "migratable": false } });
    assert_eq!(expand("static", unsafe_one), model);
    // Without a guest the topology alone is another.
    let none = Vm::builder()
        .args(["-machine", "none"])
        .with_qmp()
        .start()
        .unwrap();
    let mut none = none.qmp().unwrap();
    let answer = none
        .execute(
            "query-cpu-model-expansion",
            json!({ "type": "full", "model": { "name": "max" } }),
        )
        .unwrap();
    assert_eq!(answer["model"]["name"], "max");
    assert_eq!(answer["model"]["props"], model["props"]);
}

/// Where our commands have another shape than QEMU 7.2's of the same name, and why.
const DIFFERENCES: &[&str] = &[
    // A list of text, with the same words.
    "query-migrate-capabilities: returns capability: string, not enum",
    // It always refuses, here and there.
    "query-sev-capabilities: returns value, not object",
    // QEMU 8.2 has it, and libvirt reads it.
    "query-machines: returns acpi besides",
    // The size of an image is its process's affair.
    "query-named-block-nodes: returns no image",
    // Other types than an iothread are refused with their reason, whatever their name.
    "object-add: takes qom-type: string, not enum",
    // A node without a name could be used by nobody.
    "blockdev-add: needs node-name",
    "device_add: needs id",
    "blockdev-add: takes iops besides",
    "device_add: takes driver: enum, not string",
    "BLOCK_IO_ERROR: takes qom-path besides",
    "DEVICE_DELETED: needs device",
];

/// `query-qmp-schema` of QEMU with the same board as `none` has here.
fn schema_of_qemu() -> serde_json::Value {
    qemu_says("", &[json!({ "execute": "query-qmp-schema" })]).remove(0)
}

/// A schema by the names of its entries.
struct Schema(std::collections::BTreeMap<String, serde_json::Value>);

impl Schema {
    fn new(entries: &serde_json::Value) -> Self {
        let entries = entries.as_array().unwrap().iter();
        Self(
            entries
                .map(|one| (one["name"].as_str().unwrap().to_owned(), one.clone()))
                .collect(),
        )
    }

    /// What a type is in JSON.
    fn kind(&self, name: &serde_json::Value) -> String {
        let entry = &self.0[name.as_str().unwrap()];
        let kind = match entry["meta-type"].as_str().unwrap() {
            "builtin" => &entry["json-type"],
            _ => &entry["meta-type"],
        };
        kind.as_str().unwrap().to_owned()
    }

    /// Members of an object type, or of the elements of a list of them: type, and whether they may be absent.
    fn members(
        &self,
        name: &serde_json::Value,
    ) -> std::collections::BTreeMap<String, (String, bool)> {
        let entry = &self.0[name.as_str().unwrap()];
        if entry["meta-type"] == "array" {
            return self.members(&entry["element-type"]);
        }
        let list = |key: &str| entry[key].as_array().cloned().unwrap_or_default();
        let mut members = std::collections::BTreeMap::new();
        for member in list("members") {
            // An enum's and an alternate's have no names or no types.
            if let (Some(name), true) = (member["name"].as_str(), member["type"].is_string()) {
                let optional = member.get("default").is_some();
                members.insert(name.to_owned(), (self.kind(&member["type"]), optional));
            }
        }
        for variant in list("variants") {
            for (name, (kind, _)) in self.members(&variant["type"]) {
                members.entry(name).or_insert((kind, true));
            }
        }
        members
    }
}

#[test]
fn what_qemu_has_too_has_the_shape_that_it_has_there() {
    let theirs = Schema::new(&schema_of_qemu());
    let vm = sleeping_guest();
    let mut qmp = vm.qmp().unwrap();
    let ours = Schema::new(&qmp.execute("query-qmp-schema", json!({})).unwrap());
    let mut found = Vec::new();
    let mut compared = 0;
    for (name, entry) in &ours.0 {
        let what = entry["meta-type"].as_str().unwrap();
        let Some(other) = theirs
            .0
            .get(name)
            .filter(|other| other["meta-type"] == what)
        else {
            continue;
        };
        if !["command", "event"].contains(&what) {
            continue;
        }
        compared += 1;
        let (own, their) = (
            ours.members(&entry["arg-type"]),
            theirs.members(&other["arg-type"]),
        );
        // What only devices of ours and limits of ours have is no other shape.
        let ours_alone = |member: &str| {
            name == "device_add" || name == "netdev_add" && member.starts_with("throttling.")
        };
        for (member, (kind, optional)) in &own {
            match their.get(member) {
                None if ours_alone(member) && *optional => {}
                None => found.push(format!("{name}: takes {member} besides")),
                Some((other, _)) if other != kind => {
                    found.push(format!("{name}: takes {member}: {kind}, not {other}"));
                }
                Some((_, true)) if !optional => found.push(format!("{name}: needs {member}")),
                Some(_) => {}
            }
        }
        for (member, (_, optional)) in &their {
            if !optional && !own.contains_key(member) {
                found.push(format!("{name}: does not take {member}"));
            }
        }
        if what == "event" {
            continue;
        }
        let (own, their) = (
            ours.kind(&entry["ret-type"]),
            theirs.kind(&other["ret-type"]),
        );
        if own != their {
            found.push(format!("{name}: returns {own}, not {their}"));
        }
        let own = ours.members(&entry["ret-type"]);
        // A list of anything is always empty.
        if own.is_empty() {
            continue;
        }
        let their = theirs.members(&other["ret-type"]);
        for (member, (_, optional)) in &their {
            if !optional && own.get(member).is_none_or(|(_, optional)| *optional) {
                found.push(format!("{name}: returns no {member}"));
            }
        }
        for (member, (kind, _)) in &own {
            match their.get(member) {
                None => found.push(format!("{name}: returns {member} besides")),
                Some((other, _)) if other != kind => {
                    found.push(format!("{name}: returns {member}: {kind}, not {other}"));
                }
                Some(_) => {}
            }
        }
    }
    assert!(
        compared > 50,
        "only {compared} commands and events are in both"
    );
    let unknown: Vec<_> = found
        .iter()
        .filter(|one| !DIFFERENCES.contains(&one.as_str()))
        .collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
    let old: Vec<_> = DIFFERENCES
        .iter()
        .filter(|one| !found.iter().any(|found| found == *one))
        .collect();
    assert!(old.is_empty(), "no longer so: {old:#?}");
}
