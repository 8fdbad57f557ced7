//! Two messages that are obeyed before the library sees them.
//!
//! **Job.** Looks at the head of the next message, and takes it off the socket if it is one that the library would refuse, or of which
//! it would keep what is needed here. **Who is not trusted.** The front end: only a message that is exactly as expected is taken.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use ipc::rights;
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use vhost::vhost_user::Error as VhostError;
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag, VhostUserProtocolFeatures};

use super::{Connection, ServeError, lock};
use crate::device::Device;
use crate::record;
use crate::window::Window;

/// Bytes of a message's header.
const HEADER: usize = 12;

impl<D: Device> Connection<D> {
    /// QEMU's network card sends SET_VRING_ENABLE once, before SET_FEATURES, when nobody can know yet whether the message is
    /// allowed; the library refuses it then. Such a message, and no other, is taken off the socket and obeyed here.
    /// A queue is served only after it has been started all the same, which takes the features.
    pub(super) fn early_enable(&self) -> bool {
        /// Request, flags and payload size, then queue and state, all of 32 bits.
        const LEN: usize = 20;
        let mut server = lock(&self.server);
        if server.features != 0 {
            return false;
        }
        let socket = self.messages.as_raw_fd();
        let take = |flags| {
            let mut bytes = [0; LEN];
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = flags | MsgFlags::MSG_DONTWAIT;
            match recvmsg::<()>(socket, &mut parts, None, flags) {
                Ok(message) if message.bytes == LEN => Some(bytes),
                _ => None,
            }
        };
        let Some(bytes) = take(MsgFlags::MSG_PEEK) else {
            return false;
        };
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let (request, flags, size, index, state) = (word(0), word(4), word(8), word(12), word(16));
        // Version 1, no reply, no answer wanted.
        if (request, flags, size) != (FrontendReq::SET_VRING_ENABLE as u32, 1, 8) || state > 1 {
            return false;
        }
        let Some(ring) = server.rings.get_mut(index as usize) else {
            return false;
        };
        ring.enabled = state == 1;
        let number = ring.index();
        server.device.enabled(number, state == 1);
        take(MsgFlags::empty()).is_some()
    }

    /// Obeys `SET_BACKEND_REQ_FD`, if that is next: the library would keep the descriptor of the channel to itself, which a process
    /// after this one needs as well. `None` for other messages, and from front ends that have not said that they know of windows.
    pub(super) fn channel(&self) -> Option<Result<(), ServeError>> {
        let needed = VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::SHMEM
            | VhostUserProtocolFeatures::REPLY_ACK;
        let mut server = lock(&self.server);
        if server.protocol_features & needed.bits() != needed.bits() {
            return None;
        }
        let socket = self.messages.as_raw_fd();
        let mut bytes = [0; HEADER];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recvmsg::<()>(socket, &mut parts, None, flags) {
            Ok(message) if message.bytes == HEADER => {}
            _ => return None,
        }
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let (request, flags, size) = (word(0), word(4), word(8));
        let wants_answer = VhostUserHeaderFlag::NEED_REPLY.bits();
        // Version 1, no reply, no payload.
        if request != FrontendReq::SET_BACKEND_REQ_FD as u32
            || flags & !wants_answer != 1
            || size != 0
        {
            return None;
        }
        let Some(channel) = take_descriptor(record::look(&self.messages)) else {
            let what = "SET_BACKEND_REQ_FD without one descriptor".to_owned();
            let source = VhostError::InvalidMessage;
            return Some(Err(ServeError::Frontend { what, source }));
        };
        let window = Window::new(channel, server.record);
        server.open_window(window);
        if flags & wants_answer == 0 {
            return Some(Ok(()));
        }
        let mut reply = Vec::with_capacity(HEADER + 8);
        for word in [request, 1 | VhostUserHeaderFlag::REPLY.bits(), 8, 0, 0] {
            reply.extend_from_slice(&word.to_ne_bytes());
        }
        // One that has left is seen to have done so by the next look at the socket.
        let _ = sendmsg::<()>(
            socket,
            &[IoSlice::new(&reply)],
            &[],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        Some(Ok(()))
    }
}

/// Takes a message without payload off `socket`, and the one descriptor that came with it.
fn take_descriptor(socket: impl AsFd) -> Option<OwnedFd> {
    let mut got = rights::receive(socket, &mut [0; HEADER], MsgFlags::MSG_DONTWAIT).ok()?;
    match got.fds.len() {
        1 if !got.cut => got.fds.pop(),
        _ => None,
    }
}
