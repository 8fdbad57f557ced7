//! # A device process that does not do its job
//!
//! **Job.** Put in place of `block`, it misbehaves in the way that the id of its device names: `silent` says one word to the
//! log and never answers, `chatty` fills its log and ends; every other id is a lie in [`lie`], told at one request while all
//! others are answered truthfully.
//! **Who is not trusted.** This program: it stands for a device process that its guest owns.
//! **Why this way.** The VMM starts it as it would the real one, so that all that bounds a device process bounds this one.

use nix::sys::socket::{MsgFlags, recv};
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;
use tests::vhost_user::{NEED_REPLY, REPLY, VERSION, frame, receive, request as req, send, words};
use tests::wait::Deadline;

/// The vhost-user socket.
const SOCKET: i32 = 3;
/// Lines of `chatty`: many times what a pipe holds.
const LINES: usize = 1024;
/// Longer than any VM of the suite.
const LONG: Duration = Duration::from_secs(3600);

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("silent") => silent(),
        Some("chatty") => chatty(),
        Some(how) => serve(how),
        None => ExitCode::from(2),
    }
}

fn silent() -> ExitCode {
    let _ = std::io::stderr().write_all(b"silent from now on\n");
    let mut bytes = [0; 4096];
    while recv(SOCKET, &mut bytes, MsgFlags::empty()).is_ok_and(|length| length > 0) {}
    ExitCode::SUCCESS
}

fn chatty() -> ExitCode {
    let mut line = [b'x'; 1000];
    line[999] = b'\n';
    for _ in 0..LINES {
        // The pipe does not block, and this program may not wait: it tries until there is room.
        while std::io::stderr().write(&line).is_err() {}
    }
    ExitCode::from(3)
}

/// Another answer than the true one.
enum Lie {
    /// Another body.
    Body(Vec<u8>),
    /// Other bytes altogether.
    Bytes(Vec<u8>),
    /// The true answer with so many descriptors.
    Descriptors(usize),
    /// The true answer so many times.
    Again(usize),
    /// None, and silence from here on.
    Silence,
    /// The end.
    Close,
}

/// What `how` answers to `request`, if not the truth.
fn lie(how: &str, request: u32) -> Option<Lie> {
    let (at, lie) = match how {
        "liar" => (
            req::GET_FEATURES,
            Lie::Bytes(frame(9999, VERSION | REPLY, 8, &[0; 8])),
        ),
        "no-version-1" => (req::GET_FEATURES, Lie::Body(words(&[1 << 30]))),
        "no-config" => (req::GET_PROTOCOL_FEATURES, Lie::Body(words(&[1]))),
        "many-queues" => (req::GET_QUEUE_NUM, Lie::Body(words(&[99]))),
        "all-queues" => (req::GET_QUEUE_NUM, Lie::Body(words(&[u64::MAX]))),
        "short-config" => (req::GET_CONFIG, Lie::Body(vec![0; 12 + 8])),
        "long-config" => (req::GET_CONFIG, Lie::Body(vec![0; 4000])),
        "short-number" => (req::GET_FEATURES, Lie::Body(vec![0; 4])),
        "huge" => (
            req::GET_FEATURES,
            Lie::Bytes(frame(req::GET_FEATURES, VERSION | REPLY, u32::MAX, &[])),
        ),
        "no-reply-flag" => (
            req::GET_FEATURES,
            Lie::Bytes(frame(req::GET_FEATURES, VERSION, 8, &[0; 8])),
        ),
        "descriptor" => (req::GET_FEATURES, Lie::Descriptors(1)),
        "descriptors" => (req::GET_QUEUE_NUM, Lie::Descriptors(253)),
        "twice" => (req::GET_FEATURES, Lie::Again(2)),
        "flood" => (req::GET_FEATURES, Lie::Again(100_000)),
        "half" => (
            req::GET_CONFIG,
            Lie::Bytes(frame(req::GET_CONFIG, VERSION | REPLY, 268, &[0; 100])),
        ),
        "leaves" => (req::GET_QUEUE_NUM, Lie::Close),
        // With a guest at work.
        "no-memory" => (req::SET_MEM_TABLE, Lie::Body(words(&[1]))),
        "no-inflight" => (req::GET_INFLIGHT_FD, Lie::Descriptors(0)),
        "two-inflights" => (req::GET_INFLIGHT_FD, Lie::Descriptors(2)),
        "empty-inflight" => (req::GET_INFLIGHT_FD, Lie::Body(vec![0; 24])),
        "leaves-at-kick" => (req::SET_VRING_KICK, Lie::Close),
        "wrong-ack" => (
            req::SET_VRING_NUM,
            Lie::Bytes(frame(req::SET_VRING_BASE, VERSION | REPLY, 8, &[0; 8])),
        ),
        "silent-at-enable" => (req::SET_VRING_ENABLE, Lie::Silence),
        _ => return None,
    };
    (at == request).then_some(lie)
}

fn serve(how: &str) -> ExitCode {
    use std::os::fd::FromRawFd;
    #[allow(unsafe_code)] // exec left it open, and its number is all there is
    // SAFETY: nobody else uses the number, and it is never closed.
    let socket = ManuallyDrop::new(UnixStream::from(unsafe { OwnedFd::from_raw_fd(SOCKET) }));
    while let Ok(Some(message)) = receive(&socket, Deadline::after(LONG)) {
        let mut fds = 0;
        let truth = match message.request {
            req::GET_FEATURES => words(&[1 << 32 | 1 << 30 | 1 << 9]),
            // MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE.
            req::GET_PROTOCOL_FEATURES => words(&[1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13]),
            req::GET_QUEUE_NUM => words(&[1]),
            req::GET_CONFIG | req::GET_VRING_BASE => message.body.clone(),
            req::GET_INFLIGHT_FD => {
                fds = 1;
                [&words(&[4096])[..], &message.body[8..]].concat()
            }
            _ if message.flags & NEED_REPLY != 0 => words(&[0]),
            _ => continue,
        };
        let mut again = 1;
        let mut bytes = frame(message.request, VERSION | REPLY, truth.len() as u32, &truth);
        match lie(how, message.request) {
            None => {}
            Some(Lie::Body(body)) => {
                bytes = frame(message.request, VERSION | REPLY, body.len() as u32, &body);
            }
            Some(Lie::Bytes(other)) => bytes = other,
            Some(Lie::Descriptors(count)) => fds = count,
            Some(Lie::Again(count)) => again = count,
            Some(Lie::Silence) => return silent(),
            Some(Lie::Close) => return ExitCode::SUCCESS,
        }
        let Ok(own) = std::io::stderr().as_fd().try_clone_to_owned() else {
            return ExitCode::FAILURE;
        };
        let fds: Vec<RawFd> = vec![own.as_raw_fd(); fds];
        for _ in 0..again {
            if send(&socket, &bytes, &fds).is_err() {
                break;
            }
        }
    }
    ExitCode::SUCCESS
}
