//! # QMP as clients use it
//!
//! **Job.** The published client `qemu.qmp` drives a VM, and what it hides (ids, errors, order) is checked raw.
//! **Who is not trusted.** The VMM. **Why this way.** Management software speaks QEMU's dialect; a client that was
//! written against QEMU is the best judge.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use serde_json::json;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tests::host::require_kvm;
use tests::lab::cache_dir;
use tests::payload::Payload;
use tests::qmp::{Qmp, QmpError};
use tests::vm::Vm;
use tests::wait::Watched;

const LIMIT: Duration = Duration::from_secs(30);

fn sleeping_guest() -> Vm {
    require_kvm();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::Machine.path(), "end=halt")
        .with_qmp()
        .start()
        .unwrap();
    vm.wait_for("MACHINE OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    vm
}

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

/// What the first of `virsh`'s two runs says is that the binary was probed to the end; the second runs a guest.
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
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/libvirt.sh");
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", script])
        .arg(dir.path())
        .arg(tests::vm::binary("stratovirt").unwrap())
        .arg(Payload::Machine.path())
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
