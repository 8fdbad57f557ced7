//! What the broker and the keeper of a device's state say to each other.
//!
//! **Job.** A device whose state cannot be had again from outside (the open files of a shared folder) has a second process in
//! its jail, its keeper, that holds the state and starts the process that serves. Both messages go over one packet socket.
//! **Who is not trusted.** For the broker: the keeper, since the process that serves has the same descriptors and can write
//! to the same socket. The worst that it can say is that it has ended, or to name another process of its own jail.
//! **Why this way.** The keeper starts nothing unasked: restarts are counted and limited where those of all other devices are.

use serde::{Deserialize, Serialize};

use crate::control::Exit;

/// What the broker wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Start a process that serves the vhost-user socket that comes along. One that is there is ended first.
    Serve,
    /// End the process that serves, if there is one.
    Stop,
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
}
