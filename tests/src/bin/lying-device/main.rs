//! # A device process that does not do its job
//!
//! **Job.** Put in place of `block`, it misbehaves in the way that the id of its device names: `silent` says one word to the
//! log and never answers, `chatty` fills its log and ends; every other id is a lie in [`lies`], told at one request while all
//! others are answered truthfully. With a second word it is somebody else's daemon for a shared folder, which listens at that path,
//! serves one front end after the other and has state that a snapshot takes along.
//! **Who is not trusted.** This program: it stands for a device process that its guest owns.
//! **Why this way.** The VMM starts it as it would the real one, so that all that bounds a device process bounds this one.

mod lies;

use lies::{Lie, TOO_LONG, lie};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, recv};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
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
/// Bytes of its in-flight region.
const INFLIGHT: u64 = 4096;
/// Answer to `SET_DEVICE_STATE_FD`: the front end's descriptor is used.
const NO_DESCRIPTOR: u64 = 1 << 8;
/// What it holds for its guest.
const STATE: &[u8] = b"what a lying device holds";
/// State without end begins anew there, so that it takes no more of the host's memory.
const AROUND: u64 = 64 << 20;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    match (words.next().as_deref(), words.next()) {
        (Some("silent"), None) => silent(&SOCKET),
        (Some("chatty"), None) => chatty(),
        (Some(how), None) => managed(how),
        (Some(how), Some(path)) => foreign(how, &path),
        (None, _) => ExitCode::from(2),
    }
}

/// Says nothing until its front end leaves.
fn silent(socket: &impl AsRawFd) -> ExitCode {
    let _ = io::stderr().write_all(b"silent from now on\n");
    let mut bytes = [0; 4096];
    while recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()).is_ok_and(|length| length > 0) {}
    ExitCode::SUCCESS
}

fn chatty() -> ExitCode {
    let mut line = [b'x'; 1000];
    line[999] = b'\n';
    for _ in 0..LINES {
        // The pipe does not block, and this program may not wait: it tries until there is room.
        while io::stderr().write(&line).is_err() {}
    }
    ExitCode::from(3)
}

/// As the VMM starts a device's process.
fn managed(how: &str) -> ExitCode {
    use std::os::fd::FromRawFd;
    #[allow(unsafe_code)] // exec left it open, and its number is all there is
    // SAFETY: nobody else uses the number, and it is never closed.
    let socket = ManuallyDrop::new(UnixStream::from(unsafe { OwnedFd::from_raw_fd(SOCKET) }));
    // MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE.
    let mut offers = 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13;
    if how.starts_with("faults-") {
        // PAGEFAULT
        offers |= 1 << 8;
    }
    serve(how, &socket, offers, 1)
}

/// As the user starts a daemon.
fn foreign(how: &str, path: &str) -> ExitCode {
    let Ok(listener) = UnixListener::bind(path) else {
        return ExitCode::from(2);
    };
    let _ = io::stderr().write_all(b"listening\n");
    while let Ok((socket, _)) = listener.accept() {
        // MQ, REPLY_ACK, INFLIGHT_SHMFD, DEVICE_STATE; the queue of priority, and one for requests.
        serve(how, &socket, 1 | 1 << 3 | 1 << 12 | 1 << 19, 2);
    }
    ExitCode::FAILURE
}

/// A file in memory with `bytes` in it.
fn memory(bytes: usize) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"lies", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&vec![0; bytes])?;
    Ok(file)
}

fn serve(how: &str, socket: &UnixStream, offers: u64, queues: u64) -> ExitCode {
    match talk(how, socket, offers, queues) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{how}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn talk(how: &str, socket: &UnixStream, offers: u64, queues: u64) -> io::Result<ExitCode> {
    let pipe = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let mut direction = None;
    let (mut loaded, mut listens) = (true, false);
    while let Some(message) = receive(socket, Deadline::after(LONG))? {
        let mut file = None;
        let truth = match message.request {
            req::GET_FEATURES => words(&[1 << 32 | 1 << 30 | 1 << 9]),
            req::GET_PROTOCOL_FEATURES => words(&[offers]),
            req::GET_QUEUE_NUM => words(&[queues]),
            req::GET_CONFIG => message.body.clone(),
            req::GET_VRING_BASE => [&message.body[..4], &[0; 4]].concat(),
            req::GET_INFLIGHT_FD => {
                file = Some(memory(INFLIGHT as usize)?);
                [&words(&[INFLIGHT, 0])[..], &message.body[16..]].concat()
            }
            req::SET_DEVICE_STATE_FD => {
                direction = message.body.first().copied();
                words(&[NO_DESCRIPTOR])
            }
            req::CHECK_DEVICE_STATE => words(&[u64::from(!loaded)]),
            req::POSTCOPY_ADVISE => {
                // No such descriptor is its own to give, so a regular file has to do.
                file = Some(memory(1)?);
                Vec::new()
            }
            // The table as it came: its own addresses are anybody's guess.
            req::SET_MEM_TABLE if listens && message.body.len() > 8 => message.body.clone(),
            _ if message.flags & NEED_REPLY != 0 => {
                listens |= message.request == req::POSTCOPY_LISTEN;
                words(&[0])
            }
            _ => continue,
        };
        let mut again = 1;
        let mut bytes = frame(message.request, VERSION | REPLY, truth.len() as u32, &truth);
        let mut pipes = 0;
        let lie = lie(how, message.request, &message.body, direction);
        if message.request == req::SET_DEVICE_STATE_FD
            && let Some(exchange) = message.fds.first()
        {
            let mut exchange = File::from(exchange.try_clone()?);
            match (&lie, direction) {
                (Some(Lie::State(length)), _) => exchange.write_all(&vec![b'x'; *length])?,
                (Some(Lie::Endless), _) => {
                    exchange.write_all(&vec![b'x'; TOO_LONG])?;
                    std::thread::spawn(move || without_end(&exchange));
                }
                (_, Some(0)) => exchange.write_all(STATE)?,
                _ => {
                    let mut state = Vec::new();
                    exchange.read_to_end(&mut state)?;
                    loaded = state == STATE;
                }
            }
        }
        match lie {
            None | Some(Lie::State(_) | Lie::Endless) => {}
            Some(Lie::Body(body)) => {
                bytes = frame(message.request, VERSION | REPLY, body.len() as u32, &body);
            }
            Some(Lie::Bytes(other)) => bytes = other,
            Some(Lie::Descriptors(count)) => (file, pipes) = (None, count),
            Some(Lie::Short(length)) => file = Some(memory(length)?),
            Some(Lie::Again(count)) => again = count,
            Some(Lie::Silence) => return Ok(silent(socket)),
            Some(Lie::Close) => return Ok(ExitCode::SUCCESS),
        }
        let file = file.iter().map(AsRawFd::as_raw_fd);
        let fds: Vec<RawFd> = file.chain(vec![pipe.as_raw_fd(); pipes]).collect();
        for _ in 0..again {
            if send(socket, &bytes, &fds).is_err() {
                break;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes for as long as this program runs.
fn without_end(exchange: &File) {
    let piece = vec![b'x'; 1 << 20];
    let mut at = 0;
    while exchange.write_all_at(&piece, at).is_ok() {
        at = (at + piece.len() as u64) % AROUND;
    }
}
