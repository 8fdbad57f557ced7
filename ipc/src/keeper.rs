//! What the broker and the keeper of a device's state say to each other.
//!
//! **Job.** A device whose state cannot be had again from outside (the open files of a shared folder) has a second process in
//! its jail, its keeper, that holds the state and starts the process that serves. Both messages go over one packet socket.
//! **Who is not trusted.** For the broker: the keeper, since the process that serves has the same descriptors and can write
//! to the same socket. The worst that it can say is that it has ended, or to name another process of its own jail.
//! **Why this way.** The keeper starts nothing unasked: restarts are counted and limited where those of all other devices are.

use serde::{Deserialize, Serialize};

use crate::control::Exit;

/// What the broker wants. Another program goes on with a device in three steps, so that only the last one disturbs the guest:
/// the new keeper gets one end of a socket at its start and the old one the other ([`Order::Offer`]), over which that one tells
/// the layout of what it keeps; if the new one can go on with that it says so ([`Told::Ready`]); then the old one ends the process
/// that serves and sends everything ([`Order::HandOver`]), and goes on keeping it until it is ended itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Start a process that serves the vhost-user socket that comes along. One that is there is ended first.
    Serve,
    /// End the process that serves, if there is one.
    Stop,
    /// Tell the layout of what is kept over the socket that comes along: see [`Heritage`].
    Offer,
    /// End the process that serves, and send what is kept over the socket that came before.
    HandOver,
}

/// What a keeper sends to the one that goes on in another program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Heritage {
    /// What a program must know to go on with it, as one number.
    Layout(u64),
    /// The memory with the tables comes along.
    Memory,
    /// The next ones of the descriptors that they name come along, by rising numbers.
    Files,
    /// That was all.
    End,
}

/// What the keeper tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// A process serves, whose pidfd comes along.
    Serving,
    /// It has ended. Said once for each [`Serving`](Self::Serving).
    Ended(Exit),
    /// [`Order::Stop`] is done: none serves.
    Stopped,
    /// What another keeper has can be gone on with. Said at most once, by one that is to.
    Ready,
}
