//! The server over real sockets, with the test as main thread.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::channel;
use std::time::Duration;

use ipc::limits;
use ipc::spec::vm::{CpuSpec, MachineKind, MemorySpec};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

use super::*;

fn info() -> Info {
    Info {
        name: Some("vm".into()),
        uuid: Some(*b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef"),
        machine: MachineKind::Microvm,
        cpus: CpuSpec {
            cpus: 4,
            maxcpus: 4,
            sockets: 2,
            cores: 1,
            threads: 2,
            ..CpuSpec::default()
        },
        memory: MemorySpec {
            size: 512 << 20,
            ..MemorySpec::default()
        },
    }
}

fn spawn(sources: Vec<Source>) -> (ServerHandle, Commands) {
    let (handle, commands) = Server::spawn(sources, info(), Box::new(|| Ok(()))).unwrap();
    handle.started().unwrap();
    (handle, commands)
}

struct Client {
    read: BufReader<UnixStream>,
    write: UnixStream,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        // A server that does not answer fails the test instead of hanging it.
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            read: BufReader::new(stream.try_clone().unwrap()),
            write: stream,
        }
    }

    fn send(&mut self, text: &str) {
        self.write.write_all(text.as_bytes()).unwrap();
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.read.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|why| panic!("{line:?}: {why}"))
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.line()
    }

    fn negotiate(&mut self) {
        assert!(self.line()["QMP"].is_object());
        assert_eq!(
            self.ask("{\"execute\":\"qmp_capabilities\"}"),
            json!({ "return": {} })
        );
    }

    fn is_at_end(&mut self) -> bool {
        let mut rest = Vec::new();
        matches!(self.read.read_to_end(&mut rest), Ok(0))
    }
}

/// A server on one end of a pair.
fn pair() -> (Client, ServerHandle, Commands) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (handle, commands) = spawn(vec![Source::Connected(OwnedFd::from(theirs))]);
    (Client::new(ours), handle, commands)
}

fn wait_command(commands: &Commands) -> VmCommand {
    loop {
        if let Some(command) = commands.next() {
            return command;
        }
        let mut fds = [PollFd::new(commands.as_fd(), PollFlags::POLLIN)];
        assert_eq!(
            poll(&mut fds, PollTimeout::from(20_000_u16)).unwrap(),
            1,
            "no command came"
        );
    }
}

fn error_of(answer: &Value) -> (&str, &str) {
    (
        answer["error"]["class"].as_str().unwrap(),
        answer["error"]["desc"].as_str().unwrap(),
    )
}

#[test]
fn the_greeting_comes_at_once_and_nothing_else_before_negotiation() {
    let (mut client, handle, _commands) = pair();
    let greeting = client.line();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    assert!(
        greeting["QMP"]["version"]["qemu"]["major"]
            .as_u64()
            .unwrap()
            >= 6
    );
    assert!(
        greeting["QMP"]["version"]["package"]
            .as_str()
            .unwrap()
            .starts_with("stratovirt ")
    );

    handle.emit(&Event::Stop);
    let answer = client.ask("{\"execute\":\"query-status\",\"id\":1}");
    assert_eq!(error_of(&answer).0, "CommandNotFound");
    assert_eq!(answer["id"], 1);

    let oob = "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}";
    assert_eq!(
        error_of(&client.ask(oob)),
        (
            "GenericError",
            "Capability 'oob' is not available; allowed: none"
        )
    );
    let none = "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[]}}";
    assert_eq!(client.ask(none), json!({ "return": {} }));
    assert_eq!(error_of(&client.ask(none)).0, "CommandNotFound");

    handle.emit(&Event::Shutdown(Cause::GuestShutdown));
    let event = client.line();
    assert_eq!(event["event"], "SHUTDOWN");
    assert_eq!(
        event["data"],
        json!({ "guest": true, "reason": "guest-shutdown" })
    );
    assert!(event["timestamp"]["seconds"].as_i64().unwrap() > 0);
    assert!((0..1_000_000).contains(&event["timestamp"]["microseconds"].as_i64().unwrap()));
}

#[test]
fn any_json_is_an_id() {
    let (mut client, _handle, _commands) = pair();
    client.negotiate();
    for id in [
        json!(null),
        json!(7),
        json!("libvirt-1"),
        json!([1, { "a": [] }]),
        json!({ "x": 1.5 }),
        json!(true),
    ] {
        let answer = client.ask(&json!({ "execute": "query-name", "id": id }).to_string());
        assert_eq!(answer, json!({ "return": { "name": "vm" }, "id": id }));
        let answer = client.ask(&json!({ "execute": "nope", "id": id }).to_string());
        assert_eq!(answer["id"], id);
    }
    assert_eq!(client.ask("{\"execute\":\"query-name\"}").get("id"), None);
}

#[test]
fn wrong_requests_are_told() {
    let (mut client, _handle, _commands) = pair();
    client.negotiate();
    for (request, class, desc) in [
        (
            "{\"execute\":\"query-statu\"}",
            "CommandNotFound",
            "The command query-statu has not been found, nearest is query-status",
        ),
        (
            "{\"execute\":1}",
            "GenericError",
            "QMP input member 'execute' must be a string",
        ),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        ("[]", "GenericError", "QMP input must be a JSON object"),
        (
            "{\"execute\":\"stop\",\"arguments\":[]}",
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        (
            "{\"execute\":\"stop\",\"arguments\":{\"now\":1}}",
            "GenericError",
            "Parameter 'now' of stop is unexpected; allowed: none",
        ),
        (
            "{\"execute\":\"stop\",\"extra\":1}",
            "GenericError",
            "QMP input member 'extra' is unexpected",
        ),
        (
            "{\"exec-oob\":\"stop\"}",
            "GenericError",
            "QMP input member 'exec-oob' is unexpected: oob is not offered",
        ),
        (
            "hello\n",
            "GenericError",
            "JSON parse error, expecting an object",
        ),
        (
            "{\"execute\":\"st\n",
            "GenericError",
            "JSON parse error, control character in a string",
        ),
        (
            "{ ] \n",
            "GenericError",
            "JSON parse error, brackets do not match",
        ),
    ] {
        let answer = client.ask(request);
        assert_eq!(error_of(&answer), (class, desc), "{request}");
    }
    let answer = client.ask("{ foo }");
    assert!(
        error_of(&answer).1.starts_with("JSON parse error, "),
        "{answer}"
    );
    // The stream is intact after all that.
    assert_eq!(
        client.ask("{\"execute\":\"query-target\"}"),
        json!({ "return": { "arch": "x86_64" } })
    );
}

#[test]
fn arguments_of_a_wrong_type_are_told() {
    let (mut client, _handle, _commands) = pair();
    client.line();
    let answer =
        client.ask("{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":\"oob\"}}");
    assert_eq!(
        error_of(&answer),
        (
            "GenericError",
            "Invalid parameter type for 'enable', expected: array"
        )
    );
}

#[test]
fn commands_cross_to_main_one_at_a_time_and_in_order() {
    let (mut client, handle, commands) = pair();
    client.negotiate();
    client.send("{\"execute\":\"stop\",\"id\":1}{\"execute\":\"query-status\",\"id\":2}\n{\"execute\":\"query-name\",\"id\":3}");
    let VmCommand::Stop(reply) = wait_command(&commands) else {
        panic!()
    };
    assert!(
        commands.next().is_none(),
        "the second command waits for the first one's answer"
    );
    handle.emit(&Event::Stop);
    reply.send(Ok(()));
    let VmCommand::Status(reply) = wait_command(&commands) else {
        panic!()
    };
    reply.send(Ok(RunState::Paused));
    assert_eq!(client.line()["event"], "STOP");
    assert_eq!(client.line(), json!({ "return": {}, "id": 1 }));
    assert_eq!(
        client.line(),
        json!({ "return": { "status": "paused", "running": false, "singlestep": false }, "id": 2 })
    );
    assert_eq!(client.line()["id"], 3);
}

#[test]
fn a_command_that_main_drops_is_answered() {
    let (mut client, _handle, commands) = pair();
    client.negotiate();
    client.send("{\"execute\":\"cont\",\"id\":\"x\"}");
    drop(wait_command(&commands));
    let answer = client.line();
    assert_eq!(
        (error_of(&answer).0, &answer["id"]),
        ("GenericError", &json!("x"))
    );
    // Nor does it hang when nobody takes commands at all.
    drop(commands);
    assert_eq!(
        error_of(&client.ask("{\"execute\":\"cont\"}")).0,
        "GenericError"
    );
}

#[test]
fn input_may_come_byte_by_byte() {
    let (mut client, _handle, _commands) = pair();
    client.negotiate();
    for byte in "{\"execute\": \"query-uuid\",\r\n \"id\": \"}{\\\"\"}\n".bytes() {
        client.write.write_all(&[byte]).unwrap();
    }
    let answer = client.line();
    assert_eq!(
        answer["return"]["UUID"],
        "01234567-89ab-cdef-0123-456789abcdef"
    );
    assert_eq!(answer["id"], "}{\"");
}

#[test]
fn queries_have_the_shapes_that_clients_read() {
    let (mut client, _handle, commands) = pair();
    client.negotiate();
    let all = client.ask("{\"execute\":\"query-commands\"}");
    let names: Vec<&str> = all["return"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), schema::commands().count());
    assert!(names.contains(&"qmp_capabilities") && names.contains(&"system_powerdown"));
    let kvm = client.ask("{\"execute\":\"query-kvm\"}");
    assert_eq!(kvm["return"], json!({ "enabled": true, "present": true }));
    let machines = client.ask("{\"execute\":\"query-machines\"}");
    assert_eq!(machines["return"][0]["name"], "microvm");
    assert_eq!(machines["return"][0]["cpu-max"], 254);
    let events = client.ask("{\"execute\":\"query-events\"}");
    assert_eq!(events["return"][0]["name"], "SHUTDOWN");

    for request in ["query-cpus-fast", "query-cpus"] {
        client.send(&json!({ "execute": request }).to_string());
        let VmCommand::Cpus(reply) = wait_command(&commands) else {
            panic!()
        };
        reply.send(Ok((0..4)
            .map(|index| CpuThread {
                index,
                thread_id: 100 + i32::from(index),
            })
            .collect()));
        let cpu = client.line()["return"][3].clone();
        assert_eq!(
            cpu["props"],
            json!({ "socket-id": 1, "die-id": 0, "core-id": 0, "thread-id": 1 })
        );
        let (number, thread) = if request == "query-cpus" {
            ("CPU", "thread_id")
        } else {
            ("cpu-index", "thread-id")
        };
        assert_eq!(
            (cpu[number].as_i64(), cpu[thread].as_i64()),
            (Some(3), Some(103))
        );
    }
    client.send("{\"execute\":\"query-chardev\"}");
    let VmCommand::Chardevs(reply) = wait_command(&commands) else {
        panic!()
    };
    reply.send(Ok(vec![ChardevInfo {
        label: "c".into(),
        filename: "pty:/dev/pts/3".into(),
        frontend_open: true,
    }]));
    assert_eq!(
        client.line()["return"],
        json!([{ "label": "c", "filename": "pty:/dev/pts/3", "frontend-open": true }])
    );
    client.send("{\"execute\":\"query-iothreads\"}");
    let VmCommand::Iothreads(reply) = wait_command(&commands) else {
        panic!()
    };
    reply.send(Err(QmpError::device_not_found("io")));
    assert_eq!(
        error_of(&client.line()),
        ("DeviceNotFound", "Device 'io' not found")
    );
}

#[test]
fn several_clients_get_every_event_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let (handle, _commands) = spawn(vec![Source::Listener {
        fd: listener.into(),
        wait: false,
    }]);
    handle.wait_for_clients().unwrap();
    let mut clients: Vec<Client> = (0..3)
        .map(|_| Client::new(UnixStream::connect(&path).unwrap()))
        .collect();
    for client in &mut clients {
        client.negotiate();
    }
    const EVENTS: [Event; 5] = [
        Event::Stop,
        Event::Resume,
        Event::Powerdown,
        Event::Reset(Cause::HostQmpSystemReset),
        Event::Shutdown(Cause::HostQmpQuit),
    ];
    for _ in 0..200 {
        for event in EVENTS {
            handle.emit(&event);
        }
    }
    for client in &mut clients {
        for _ in 0..200 {
            for event in EVENTS {
                assert_eq!(client.line()["event"], event.name());
            }
        }
    }
    // One leaving does not disturb the others.
    drop(clients.remove(0));
    handle.emit(&Event::Stop);
    assert_eq!(clients[0].line()["event"], "STOP");
    // The end brings everything that is on its way.
    handle.emit(&Event::Resume);
    handle.finish();
    assert_eq!(clients[1].line()["event"], "STOP");
    assert_eq!(clients[1].line()["event"], "RESUME");
    assert!(clients[1].is_at_end());
}

#[test]
fn one_client_too_many_is_told_and_a_place_becomes_free() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let (_handle, _commands) = spawn(vec![Source::Listener {
        fd: listener.into(),
        wait: false,
    }]);
    let connect = || Client::new(UnixStream::connect(&path).unwrap());
    let mut clients: Vec<Client> = (0..limits::MAX_QMP_CLIENTS).map(|_| connect()).collect();
    for client in &mut clients {
        client.negotiate();
    }
    let mut extra = connect();
    assert_eq!(error_of(&extra.line()).1, "Too many clients; allowed: 8");
    assert!(extra.is_at_end());
    let mut leaving = clients.remove(0);
    leaving.write.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(
        leaving.is_at_end(),
        "a client that has said everything is let go"
    );
    connect().negotiate();
}

#[test]
fn main_can_wait_for_the_first_client() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (handle, _commands) = spawn(vec![Source::Listener {
        fd: listener.into(),
        wait: true,
    }]);
    let (sender, done) = channel();
    let waiter = std::thread::spawn(move || {
        handle.wait_for_clients().unwrap();
        sender.send(()).unwrap();
        handle
    });
    assert!(done.try_recv().is_err());
    let mut client = TcpStream::connect(address).unwrap();
    done.recv_timeout(Duration::from_secs(20)).unwrap();
    let mut greeting = [0; 8];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"{\"QMP\":{");
    drop(waiter.join().unwrap());
}

#[test]
fn what_a_client_sent_before_it_left_is_executed() {
    let (mut client, _handle, commands) = pair();
    client.send("{\"execute\":\"qmp_capabilities\"}{\"execute\":\"stop\"}{\"execute\":\"quit\"}");
    drop(client);
    let VmCommand::Stop(reply) = wait_command(&commands) else {
        panic!()
    };
    reply.send(Ok(()));
    assert!(matches!(wait_command(&commands), VmCommand::Quit(_)));
}

#[test]
fn a_client_that_closed_its_writing_side_gets_its_answers() {
    let (mut client, _handle, commands) = pair();
    client.send("{\"execute\":\"qmp_capabilities\"}{\"execute\":\"stop\"}");
    client.write.shutdown(std::net::Shutdown::Write).unwrap();
    client.line();
    client.line();
    let VmCommand::Stop(reply) = wait_command(&commands) else {
        panic!()
    };
    reply.send(Ok(()));
    assert_eq!(client.line(), json!({ "return": {} }));
    assert!(client.is_at_end());
}

#[test]
fn an_oversized_request_ends_the_connection() {
    let (mut client, _handle, _commands) = pair();
    client.negotiate();
    let writer = client.write.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let mut writer = writer;
        // The server hangs up in the middle.
        let _ = writer.write_all(b"{\"execute\":\"");
        let _ = writer.write_all(&vec![b'x'; 4 * limits::MAX_QMP_REQUEST]);
    });
    let answer = client.line();
    assert!(
        error_of(&answer).1.starts_with("Request is too large"),
        "{answer}"
    );
    sending.join().unwrap();
}

#[test]
fn a_client_that_never_reads_is_dropped_and_harms_nobody() {
    let (mut lazy, theirs) = UnixStream::pair().unwrap();
    let (good, theirs_too) = UnixStream::pair().unwrap();
    let (handle, _commands) = spawn(vec![
        Source::Connected(theirs.into()),
        Source::Connected(theirs_too.into()),
    ]);
    let mut good = Client::new(good);
    good.negotiate();
    lazy.write_all(b"{\"execute\":\"qmp_capabilities\"}")
        .unwrap();
    // The good client's answer is proof that the thread has been through its events; and it never waits for the lazy one.
    let line = Event::Reset(Cause::HostQmpSystemReset)
        .message()
        .to_string()
        .len();
    for at in 0..2 * limits::MAX_QMP_BACKLOG / line {
        handle.emit(&Event::Reset(Cause::HostQmpSystemReset));
        assert_eq!(good.line()["event"], "RESET", "{at}");
    }
    // Its socket is closed: what had been sent comes, and then the end.
    lazy.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut rest = Vec::new();
    lazy.read_to_end(&mut rest).unwrap();
    assert!(rest.starts_with(b"{\"QMP\""));
}

#[test]
fn a_flood_of_requests_from_a_client_that_does_not_read_is_held_back() {
    let (lazy, theirs) = UnixStream::pair().unwrap();
    let (_handle, _commands) = spawn(vec![Source::Connected(theirs.into())]);
    lazy.set_nonblocking(true).unwrap();
    let mut lazy_writer = &lazy;
    lazy_writer
        .write_all(b"{\"execute\":\"qmp_capabilities\"}")
        .unwrap();
    let request = b"{\"execute\":\"query-commands\"}".repeat(100);
    let mut sent = 0_usize;
    // Until nothing has been taken for a while, which only happens if the server stops reading.
    loop {
        match lazy_writer.write(&request) {
            Ok(count) => sent += count,
            Err(_) => {
                let mut fds = [PollFd::new(lazy.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut fds, PollTimeout::from(500_u16)).unwrap() == 0 {
                    break;
                }
            }
        }
        assert!(sent < 64 << 20, "the server takes requests without end");
    }
    // It is still served once it reads.
    lazy.set_nonblocking(false).unwrap();
    lazy.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut reader = BufReader::new(&lazy);
    let mut line = String::new();
    for _ in 0..100 {
        line.clear();
        reader.read_line(&mut line).unwrap();
    }
    assert!(line.starts_with("{\"return\":"), "{line}");
}

#[test]
fn a_probe_is_free_and_a_client_without_end_is_slowed_down() {
    let (mut client, _handle, _commands) = pair();
    client.negotiate();
    let most = limits::QMP_COMMANDS_AT_ONCE as usize;
    let mut writer = client.write.try_clone().unwrap();
    let start = std::time::Instant::now();
    let sending = std::thread::spawn(move || {
        let request = b"{\"execute\":\"query-name\"}".repeat(3 * most);
        writer.write_all(&request).unwrap();
    });
    for _ in 0..3 * most {
        assert_eq!(client.line(), json!({ "return": { "name": "vm" } }));
    }
    // However fast the machine is, what is not free comes at its rate; what was earned before the first answer is little.
    let slow = (2 * most - 1) as u64 * 1000 / u64::from(limits::QMP_COMMANDS_PER_SECOND);
    assert!(start.elapsed() + Duration::from_millis(50) >= Duration::from_millis(slow));
    sending.join().unwrap();
}

#[test]
fn a_lock_down_that_fails_is_told() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let hook: StartHook = Box::new(|| Err("no filter".into()));
    let (handle, _commands) =
        Server::spawn(vec![Source::Connected(theirs.into())], info(), hook).unwrap();
    let error = handle.started().unwrap_err();
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "no filter"
    );
}

#[test]
fn no_socket_no_thread() {
    let (handle, commands) = spawn(Vec::new());
    handle.emit(&Event::Stop);
    handle.wait_for_clients().unwrap();
    assert!(commands.next().is_none());
    handle.finish();
}

/// Sends `text` with `fds`.
fn pass(client: &Client, text: &str, fds: &[&OwnedFd]) {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::os::fd::AsRawFd;
    let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let sent = sendmsg::<()>(
        client.write.as_raw_fd(),
        &[std::io::IoSlice::new(text.as_bytes())],
        &[ControlMessage::ScmRights(&raw)],
        MsgFlags::empty(),
        None,
    );
    assert_eq!(sent, Ok(text.len()));
}

fn pipe() -> (std::io::PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader, writer.into())
}

/// Waits until nobody has the other end.
fn is_closed(mut reader: std::io::PipeReader) {
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

fn is_open(reader: &std::io::PipeReader) -> bool {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 0
}

#[test]
fn each_command_gets_the_descriptor_that_came_with_it() {
    let (mut client, _handle, _commands) = pair();
    client.negotiate();
    let ((first, one), (second, two), (surplus, three)) = (pipe(), pipe(), pipe());
    // One after the other, without a look at the answers, and one of them in pieces.
    pass(
        &client,
        "{'execute':'getfd','arguments':{'fdname':'a'}}",
        &[&one, &three],
    );
    pass(&client, "{'execute':'getfd',", &[&two]);
    client.send("'arguments':{'fdname':'b'}}{'execute':'closefd','arguments':{'fdname':'a'}}");
    for _ in 0..3 {
        assert_eq!(client.line(), json!({ "return": {} }));
    }
    drop((one, two, three));
    is_closed(surplus);
    is_closed(first);
    assert!(is_open(&second));
    // One that comes with a command that wants none is the next one's, unless a newer one comes.
    let ((older, one), (newer, two)) = (pipe(), pipe());
    pass(&client, "{'execute':'query-name'}", &[&one]);
    assert_eq!(client.line()["return"]["name"], "vm");
    assert!(is_open(&older));
    pass(&client, "{'execute':'add-fd'}", &[&two]);
    assert_eq!(client.line()["return"]["fdset-id"], 0);
    drop((one, two));
    is_closed(older);
    // Names go with their client, sets stay until they are removed.
    drop(client);
    is_closed(second);
    assert!(is_open(&newer));
}

#[test]
fn what_there_is_not_is_told_by_an_empty_answer_or_a_reason() {
    let (mut client, _handle, _commands) = pair();
    client.negotiate();
    for (request, answer) in [
        ("query-migrate-parameters", json!({})),
        ("migrate-set-parameters", json!({})),
        ("query-stats-schemas", json!([])),
    ] {
        let request = format!("{{\"execute\":\"{request}\"}}");
        assert_eq!(
            client.ask(&request),
            json!({ "return": answer }),
            "{request}"
        );
    }
    let stats = "{'execute':'query-stats','arguments':{'target':'vcpu','vcpus':['/machine']}}";
    assert_eq!(client.ask(stats), json!({ "return": [] }));
    for (request, desc) in [
        (
            "{'execute':'migrate-set-parameters','arguments':{'max-bandwidth':1}}",
            "Migration parameter 'max-bandwidth' is not available; allowed: none",
        ),
        (
            "{'execute':'query-stats','arguments':{'target':'cryptodev'}}",
            "Parameter 'target' does not accept value 'cryptodev'; allowed: vm, vcpu",
        ),
    ] {
        assert_eq!(error_of(&client.ask(request)), ("GenericError", desc));
    }
}

#[test]
fn character_devices_that_cannot_be_added_are_refused_with_the_reason() {
    let (mut client, _handle, commands) = pair();
    client.negotiate();
    let add = |backend: &str| {
        format!("{{'execute':'chardev-add','arguments':{{'id':'c','backend':{backend}}}}}")
    };
    let socket = |kind: &str, data: &str| {
        add(&format!(
            "{{'type':'socket','data':{{'addr':{{'type':'{kind}','data':{{{data}}}}}}}}}"
        ))
    };
    for (request, desc) in [
        (
            add("{'type':'null','data':{}}"),
            "Parameter 'backend.type' does not accept value 'null'; allowed: socket",
        ),
        (
            add("{'type':'socket','data':{}}"),
            "Parameter 'backend.data.addr' is missing",
        ),
        (
            socket("inet", "'host':'h','port':'1'"),
            "Parameter 'backend.data.addr.type' does not accept value 'inet'; allowed: unix, fd",
        ),
        (
            socket("unix", "'str':'x'"),
            "Parameter 'backend.data.addr.data.str' is unexpected; allowed: path, abstract, tight",
        ),
        (
            socket("unix", ""),
            "Parameter 'backend.data.addr.data.path' is missing",
        ),
        (
            socket("unix", "'path':'/x','abstract':true"),
            "Parameter 'backend.data.addr.data.abstract' is true; allowed: false",
        ),
        (
            socket("fd", "'str':'nofd'"),
            "File descriptor named 'nofd' not found",
        ),
        (
            "{'execute':'netdev_add','arguments':{'id':'n','type':'vhost-user'}}".into(),
            "Parameter 'chardev' is missing",
        ),
        (
            "{'execute':'netdev_add','arguments':{'id':'n','type':'vhost-user','chardev':'c','queues':2}}".into(),
            "Parameter 'queues' is not 1; allowed with vhost-user: 1",
        ),
        (
            "{'execute':'netdev_add','arguments':{'id':'n','type':'vhost-user','chardev':'c','ifname':'t'}}".into(),
            "Parameter 'ifname' is unexpected: not of type vhost-user",
        ),
        (
            "{'execute':'netdev_add','arguments':{'id':'n','type':'vhost-user','chardev':'c','poll-us':9}}".into(),
            "Parameter 'poll-us' is unexpected: not of type vhost-user",
        ),
        (
            "{'execute':'netdev_add','arguments':{'id':'n','ifname':'t','vhost':true,'poll-us':9}}".into(),
            "Parameter 'poll-us' contradicts 'vhost', with which packets do not pass this program; allowed with it: 0",
        ),
        (
            "{'execute':'netdev_add','arguments':{'id':'n','ifname':'t','chardev':'c'}}".into(),
            "Parameter 'chardev' is unexpected: of type vhost-user",
        ),
    ] {
        assert_eq!(error_of(&client.ask(&request)), ("GenericError", desc));
    }
    // As Kata and libvirt write it.
    client.send(&add(
        "{'type':'socket','data':{'wait':false,'server':false,'addr':{'type':'unix','data':{'path':'/run/x'}}}}",
    ));
    let VmCommand::BackendAdd(what, fds, reply) = wait_command(&commands) else {
        panic!("a socket is not taken");
    };
    assert!(fds.is_empty());
    assert_eq!(
        what.addition(false),
        ipc::control::added::Addition::Socket {
            path: "/run/x".into()
        }
    );
    reply.send(Ok(()));
    assert_eq!(client.line(), json!({ "return": {} }));
    for (arguments, why) in [
        (
            "'driver':'vhost-user-fs-device'",
            "Parameter 'chardev' is missing",
        ),
        (
            "'driver':'virtio-net-device','chardev':'c'",
            "Property 'virtio-net-device.chardev' not found; a card's is of its netdev",
        ),
    ] {
        client.send(&format!(
            "{{'execute':'device_add','arguments':{{'id':'d',{arguments}}}}}"
        ));
        let VmCommand::Wrong(said, reply) = wait_command(&commands) else {
            panic!("{arguments} is taken");
        };
        reply.send(Err(QmpError::generic(said)));
        assert_eq!(error_of(&client.line()), ("GenericError", why));
    }
}

#[test]
fn objects_that_cannot_be_added_are_refused_with_the_reason() {
    let (mut client, _handle, commands) = pair();
    client.negotiate();
    for (arguments, told) in [
        (
            "'qom-type':'memory-backend-ram','size':1048576",
            "the guest's memory is what the command line gave",
        ),
        (
            "'qom-type':'rng-random','filename':'/dev/urandom'",
            "there is no device yet that could use it",
        ),
        ("'qom-type':'cryptodev-backend'", "allowed: iothread"),
        (
            "'qom-type':'iothread','poll':1",
            "Parameter 'poll' is unexpected",
        ),
    ] {
        client.send(&format!(
            "{{'execute':'object-add','arguments':{{'id':'o',{arguments}}}}}"
        ));
        let VmCommand::Wrong(why, reply) = wait_command(&commands) else {
            panic!("{arguments} is taken");
        };
        reply.send(Err(QmpError::generic(why)));
        let answer = client.line();
        assert!(error_of(&answer).1.contains(told), "{answer}");
    }
    client.send(
        "{'execute':'object-add','arguments':{'id':'o','qom-type':'iothread','poll-max-ns':0}}",
    );
    let VmCommand::IothreadAdd(id, reply) = wait_command(&commands) else {
        panic!("an iothread is not taken");
    };
    assert_eq!(id, "o");
    reply.send(Ok(()));
    assert_eq!(client.line(), json!({ "return": {} }));
}
