//! # A device process that tries to get out
//!
//! **Job.** Put in place of a device's binary, it takes every step of the harness up to and including the jail, answers the
//! front end until guest RAM and a queue's descriptors are here, and then makes the attempt that its device's id names, or
//! wastes what the host has ([`exhaust`]). The log tells each call before it is made, and the answer.
//! **Who is not trusted.** This program: it stands for a device process that its guest owns.
//! **Why this way.** The harness's own types make the jail, so it is the one that the device would be in; the front end is
//! answered here, because the harness drops guest RAM's descriptor as soon as it is mapped and an attacker would not.
#![allow(unsafe_code)] // descriptors that exec left open are known by their numbers only

use device_host::{Access, Device, DeviceFault, FileIo, HostFault, Prepared, Ring};
use ipc::spec::DeviceSpec;
use ipc::spec::block::ImageFormat;
use ipc::start::{FD_BACKEND, FD_LOG, FD_START, FD_VHOST_USER};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use tests::escape::local::Local;
use tests::escape::{Held, Outcome, attempts, exhaust};

/// A device that is never served.
struct Idle {
    queues: u16,
    size: u16,
}

impl Device for Idle {
    fn features(&self) -> u64 {
        0
    }

    fn num_queues(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self) -> u16 {
        self.size
    }

    fn accept(&mut self, _features: u64) -> Result<(), HostFault> {
        Ok(())
    }

    fn read_config(&self, _offset: usize, _out: &mut [u8]) {}

    fn process_queue(&mut self, _ring: &mut Ring) -> Result<(), DeviceFault> {
        Ok(())
    }
}

fn main() -> ExitCode {
    let Some(what) = std::env::args().nth(1) else {
        return ExitCode::from(2);
    };
    match run(&what) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("{what}: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

/// One line in the log.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn run(what: &str) -> Result<(), Box<dyn std::error::Error>> {
    // SAFETY: the broker opened these for this program, and nothing else in it owns them.
    let (log, start) = unsafe { (OwnedFd::from_raw_fd(FD_LOG), OwnedFd::from_raw_fd(FD_START)) };
    let start = ipc::start::from_memfd(start)?;
    ipc::log::init("escape-probe", start.log_level, log);
    let (queues, size) = (start.device.num_queues(), start.device.queue_size());
    let backends = start.backend_fds;
    // As a disk's process has it.
    let ring = match &start.device {
        DeviceSpec::Block(disk) if disk.io.format == ImageFormat::Raw => {
            // SAFETY: the broker opened it, and nothing in this program closes it.
            let image = unsafe { BorrowedFd::borrow_raw(FD_BACKEND) };
            let access = if disk.readonly {
                Access::Read
            } else {
                Access::Write
            };
            Some(FileIo::<()>::new(image, 8, access)?)
        }
        _ => None,
    };
    let device = start.device.clone();
    let jailed = Prepared::new(Idle { queues, size }, start)?.enter_jail()?;
    let last = match &device {
        // A guest may never start a device that wastes.
        _ if exhaust::is_waste(what) => None,
        // A driver may leave the control queue alone.
        DeviceSpec::Net(card) => (2 * card.queue_pairs).checked_sub(1),
        other => other.num_queues().checked_sub(1),
    };
    let mut held = answer_until_ready(queues, backends, last)?;
    held.ring = ring.as_ref().map_or(-1, |ring| ring.as_fd().as_raw_fd());
    say("ready\n");
    if let Some(attempt) = attempts::all().into_iter().find(|a| a.name == what) {
        let outcome = Outcome::of(attempt.make(&mut Local::default(), &held));
        match outcome {
            Some(Outcome::Refused(errno)) => say(&format!("answer refused {errno}\n")),
            Some(Outcome::Confined) => say("answer confined\n"),
            Some(Outcome::Through(value)) => say(&format!("answer through {value}\n")),
            Some(Outcome::Killed) | None => return Err("alive, and cannot say how".into()),
        }
    } else {
        exhaust::run(what, &mut Local::silent(), &held, say)?;
    }
    drop(jailed);
    Ok(())
}

// vhost-user, "Front-end message types"
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
/// `VIRTIO_F_VERSION_1`, `VHOST_USER_F_PROTOCOL_FEATURES`.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// `MQ`, `REPLY_ACK`, `CONFIG`.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 9;
const NEED_REPLY: u32 = 8;
const HEADER: usize = 12;

/// Says what the front end wants to hear until queue `last` is enabled; without one, until it has been told all it asked.
fn answer_until_ready(
    queues: u16,
    backends: u32,
    last: Option<u16>,
) -> Result<Held, Box<dyn std::error::Error>> {
    let backend = if backends > 0 { FD_BACKEND } else { -1 };
    let mut held = Held {
        log: FD_LOG,
        socket: FD_VHOST_USER,
        backend,
        ram: -1,
        kick: -1,
        call: -1,
        ring: -1,
    };
    let mut buffer = vec![0; 1 << 16];
    let mut length = 0;
    loop {
        let needed = match buffer.first_chunk::<HEADER>().filter(|_| length >= HEADER) {
            Some(_) => HEADER + word(&buffer, 8) as usize,
            None => HEADER,
        };
        if length < needed || length < HEADER {
            let mut space = nix::cmsg_space!([i32; 32]);
            let mut parts = [IoSliceMut::new(&mut buffer[length..needed])];
            let got = recvmsg::<()>(
                FD_VHOST_USER,
                &mut parts,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            )?;
            let mut fds = Vec::new();
            for message in got.cmsgs()? {
                if let ControlMessageOwned::ScmRights(list) = message {
                    fds.extend(list);
                }
            }
            let bytes = got.bytes;
            if bytes == 0 {
                return Err("the front end left".into());
            }
            length += bytes;
            let place = match word(&buffer, 0) {
                SET_MEM_TABLE => &mut held.ram,
                SET_VRING_KICK => &mut held.kick,
                SET_VRING_CALL => &mut held.call,
                _ => continue,
            };
            if let Some(fd) = fds.first() {
                *place = *fd;
            }
            continue;
        }
        let (request, flags) = (word(&buffer, 0), word(&buffer, 4));
        let payload = buffer[HEADER..needed].to_vec();
        length = 0;
        let answer = match request {
            GET_FEATURES => Some(FEATURES.to_ne_bytes().to_vec()),
            GET_PROTOCOL_FEATURES => Some(PROTOCOL_FEATURES.to_ne_bytes().to_vec()),
            GET_QUEUE_NUM => Some(u64::from(queues).to_ne_bytes().to_vec()),
            // As it was asked, with a capacity in it that is not 0.
            GET_CONFIG => Some(
                payload
                    .iter()
                    .enumerate()
                    .map(|(at, b)| if at == 13 { 8 } else { *b })
                    .collect(),
            ),
            _ if flags & NEED_REPLY != 0 => Some(vec![0; 8]),
            _ => None,
        };
        if let Some(answer) = answer {
            let mut message = Vec::new();
            for number in [request, 1 | 4, answer.len() as u32] {
                message.extend(number.to_ne_bytes());
            }
            message.extend(answer);
            // sendmsg is what a device may call.
            let part = [std::io::IoSlice::new(&message)];
            nix::sys::socket::sendmsg::<()>(
                FD_VHOST_USER,
                &part,
                &[],
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?;
        }
        let done = match last {
            Some(last) => request == SET_VRING_ENABLE && word(&payload, 0) == u32::from(last),
            None => request == GET_CONFIG,
        };
        if done {
            return Ok(held);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
