//! # `link`: a device process's answers to the control process
//!
//! A thread plays the device: it answers each request truthfully unless the input says otherwise. The control process shakes
//! hands, hands queues over, writes configuration space and takes the queues back, as far as the answers let it.

use crate::bytes::Input;
use crate::{once, planted};
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_main::virtio::remote::{Handshake, QueueHandover, QueueState, RemoteDevice, RemoteError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const RAM: usize = 1 << 20;
const QUEUES: u64 = 1;

// Requests of the vhost-user protocol whose replies are not plain acknowledgements.
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;

/// What both ends share.
pub(crate) struct Fixture {
    pub(crate) memory: GuestMemoryMmap<()>,
    event: EventFd,
    pub(crate) file: File,
}

pub(crate) fn fixture() -> Fixture {
    let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).expect("memfd_create"));
    file.set_len(RAM as u64).expect("ftruncate");
    let part = (
        GuestAddress(0),
        RAM,
        Some(FileOffset::new(file.try_clone().expect("dup"), 0)),
    );
    Fixture {
        memory: GuestMemoryMmap::from_ranges_with_files([part]).expect("RAM"),
        event: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        file,
    }
}

/// What is sent.
struct Answer {
    bytes: Vec<u8>,
    fds: usize,
}

/// The truth; `None` where the request wants no reply.
fn truth(request: u32, need_reply: bool, body: &[u8], mode: u8) -> Option<Answer> {
    let mut protocol: u64 = 1 | 1 << 3 | 1 << 9;
    if mode & 4 != 0 {
        protocol |= 1 << 12;
    }
    if mode & 8 != 0 {
        protocol |= 1 << 13;
    }
    let mut fds = 0;
    let reply = match request {
        GET_FEATURES => (1u64 << 32 | 1 << 30 | 1 << 29 | 1 << 38 | 1 << 9)
            .to_le_bytes()
            .to_vec(),
        GET_PROTOCOL_FEATURES => protocol.to_le_bytes().to_vec(),
        GET_QUEUE_NUM => QUEUES.to_le_bytes().to_vec(),
        GET_VRING_BASE => body.to_vec(),
        GET_CONFIG => body.to_vec(),
        GET_INFLIGHT_FD => {
            fds = 1;
            let mut reply = 4096u64.to_le_bytes().to_vec();
            reply.extend(body.get(8..).unwrap_or_default());
            reply
        }
        _ if need_reply => vec![0; 8],
        _ => return None,
    };
    let mut bytes = Vec::new();
    for word in [request, 5, reply.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(reply);
    Some(Answer { bytes, fds })
}

fn put(socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> bool {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    bytes.is_empty()
        || sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .is_ok()
}

/// Plays the device until the other end or the script wants no more. Silence is left to a slower test than this.
pub(crate) fn lie(mut socket: UnixStream, file: &File, mut script: Input<'_>, mode: u8) {
    let mut head = [0; 12];
    while socket.read_exact(&mut head).is_ok() {
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        let mut body = vec![0; size];
        if socket.read_exact(&mut body).is_err() {
            return;
        }
        let Some(mut answer) = truth(request, flags & 8 != 0, &body, mode) else {
            continue;
        };
        let lie = script.byte();
        let mut again = 1;
        let mut split = 0;
        // What a header promises and the script does not send would be waited for.
        let mut promised = false;
        match lie % 8 {
            1 => {
                let len = usize::from(script.byte());
                answer.bytes = script.take(len).to_vec();
            }
            2 => {
                for _ in 0..=lie >> 6 {
                    let at = usize::from(script.u16()) % answer.bytes.len();
                    answer.bytes[at] ^= script.byte();
                    promised |= (8..12).contains(&at);
                }
            }
            3 => answer.fds = usize::from(lie >> 3) * 8,
            4 => return,
            5 => split = usize::from(script.u16()) % answer.bytes.len(),
            6 => again = 1 + usize::from(lie >> 3),
            7 => {
                // A body of another length, with a header that tells it.
                let len = usize::from(script.u16() % 4200);
                answer.bytes.resize(12 + len, lie);
                answer.bytes[8..12].copy_from_slice(&(len as u32).to_le_bytes());
            }
            _ => {}
        }
        let fds = vec![file.as_raw_fd(); answer.fds.min(253)];
        for _ in 0..again {
            let (front, rest) = answer.bytes.split_at(split);
            if !(put(&socket, front, &[]) && put(&socket, rest, &fds)) {
                return;
            }
        }
        if promised || lie % 8 == 7 || lie % 8 == 1 {
            let _ = socket.shutdown(std::net::Shutdown::Write);
        }
    }
}

/// The device that the control process believes in.
pub(crate) fn spec() -> DeviceSpec {
    DeviceSpec::Block(BlockSpec {
        id: "disk".into(),
        readonly: false,
        direct: false,
        serial: String::new(),
        num_queues: QUEUES as u16,
        queue_size: 128,
        io: Default::default(),
    })
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mode = input.byte();
    let spec = spec();
    once!(Fixture, fixture(), |fixture: &mut Fixture| {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        std::thread::scope(|scope| {
            let file = &fixture.file;
            scope.spawn(move || lie(theirs, file, input, mode));
            if let Ok(device) = Handshake::begin(ours, &spec).and_then(Handshake::finish) {
                // A disk's size that no disk has.
                planted!(device.config()[7] >= 0x70);
                let _ = talk(device, fixture, mode);
            }
        });
    });
}

fn talk(mut device: RemoteDevice, fixture: &Fixture, mode: u8) -> Result<(), RemoteError> {
    assert_eq!(device.config().len(), ipc::limits::MAX_CONFIG_SPACE);
    // Nothing is offered that a transport here cannot do: legacy bits, vhost-user's own.
    assert_eq!(device.features() & (1 << 24 | 1 << 30 | 1 << 38), 0);
    let state = QueueState {
        max_size: 128,
        size: 128,
        ready: true,
        desc: 0x1000,
        driver: 0x2000,
        device: 0x3000,
    };
    if mode & 1 != 0 {
        device.write_config(4, &[1, 2, 3])?;
    }
    for _ in 0..=mode >> 7 {
        let queue = QueueHandover {
            base: 0,
            index: 0,
            state: &state,
            kick: &fixture.event,
            call: &fixture.event,
            error: &fixture.event,
        };
        device.activate(1 << 32, &fixture.memory, &[queue])?;
        if mode & 2 != 0 {
            device.refresh_config()?;
        }
        device.deactivate()?;
        assert!(!device.is_active());
    }
    Ok(())
}
