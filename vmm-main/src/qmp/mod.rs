//! QMP: the socket through which a manager drives the VM.
//!
//! **Job.** A thread of its own serves the sockets: it greets, negotiates, splits the byte stream into JSON objects, checks
//! each command against its table ([`schema`]), answers what it knows itself and hands the rest to the main
//! thread as a typed [`VmCommand`] with a one-shot [`Reply`]. Main sends events back through [`ServerHandle::emit`].
//!
//! ```text
//! client ──bytes──▶ json::Splitter ──object──▶ session::Session ──┬─▶ answered here
//!                                                                 └─▶ Commands (bounded, eventfd) ─▶ main
//! client ◀─lines── backlog ◀────────── inbox (answers and events, in the order main sent them) ◀────── main
//! ```
//!
//! **Who is not trusted.** Clients. Requests, nesting, clients and what waits for a slow reader are capped; a client that
//! does not read is dropped, never waited for. A client has one command at main at a time, and nothing more is read from it
//! meanwhile, so the queue to main cannot fill up. Nothing a client sends reaches an index or an allocation unchecked.
//!
//! **Why this way.** Main never touches JSON or a client's socket, so nothing that a client does can delay the VM. Answers
//! and events share one queue: a client sees them in the order in which they happened. The thread gets sockets that are
//! open already and opens nothing, so its system call filter knows no path. Descriptors that clients pass
//! ([`descriptors`]) are kept and handed on, never used.

mod command;
mod cpu_model;
mod descriptors;
mod event;
#[cfg(fuzzing)]
pub mod fuzzing;
mod json;
mod objects;
mod pace;
mod parse;
mod plug;
mod sandbox;
pub mod schema;
mod server;
mod session;

pub use command::{
    ChardevInfo, Counted, CpuThread, Disks, DumpOrder, DumpProgress, DumpStatus, ErrorClass,
    ImageFacts, IothreadInfo, Migration, MigrationStatus, QmpError, Reply, RunState, VmCommand,
    VmFacts, Workload,
};
pub use event::{Cause, Event};
pub(crate) use parse::json_object;
pub use plug::{BackendKind, NewBackend, NewDevice, NewKind, NodeOver, OtherTap};
pub use sandbox::{SandboxDevice, SandboxReport, SandboxTree};
pub use server::{Commands, Server, ServerError, ServerHandle, Source, StartHook};
pub use session::Info;

#[cfg(test)]
mod tests;
