//! # A device process that does not do its job
//!
//! **Job.** Put in place of `block`, it misbehaves in the way that the id of its device names: `silent` says one word to the
//! log and never answers, `liar` answers another question than the one that was asked, `chatty` fills its log and ends.
//! **Who is not trusted.** This program: it stands for a device process that its guest owns.
//! **Why this way.** The VMM starts it as it would the real one, so that all that bounds a device process bounds this one.

use nix::sys::socket::{MsgFlags, recv, send};
use std::io::Write;
use std::process::ExitCode;

/// The vhost-user socket.
const SOCKET: i32 = 3;
/// Lines of `chatty`: many times what a pipe holds.
const LINES: usize = 1024;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("silent") => silent(),
        Some("liar") => liar(),
        Some("chatty") => chatty(),
        _ => ExitCode::from(2),
    }
}

fn silent() -> ExitCode {
    let _ = std::io::stderr().write_all(b"silent from now on\n");
    let mut bytes = [0; 4096];
    while recv(SOCKET, &mut bytes, MsgFlags::empty()).is_ok_and(|length| length > 0) {}
    ExitCode::SUCCESS
}

fn liar() -> ExitCode {
    let mut bytes = [0; 4096];
    while recv(SOCKET, &mut bytes, MsgFlags::empty()).is_ok_and(|length| length > 0) {
        let mut answer = Vec::new();
        // An answer with eight bytes (vhost-user, "Header") to a request that does not exist.
        for word in [9999u32, 1 | 4, 8, 0, 0] {
            answer.extend_from_slice(&word.to_le_bytes());
        }
        let _ = send(SOCKET, &answer, MsgFlags::MSG_NOSIGNAL);
    }
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
