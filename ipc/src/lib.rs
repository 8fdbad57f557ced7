//! What two processes of one VM must agree on.
//!
//! **Job.** Plain-data specs of a VM and its devices, the typed messages between control process, broker and device
//! processes, the socket that carries them together with file descriptors, how memory that they share is mapped ([`guarded`]), what is counted in it ([`counters`]),
//! every size cap, and the log macros.
//! No device logic lives here: a device crate depends on this one, never the other way round.
//!
//! **Who is not trusted.** Each side of a message treats the other as hostile: lengths are capped before anything is
//! allocated ([`limits`]), decoding refuses unknown versions and trailing bytes ([`codec`]), and a message brings exactly
//! the descriptors its type announces or it is refused ([`channel`]).
//!
//! **Why this way.** One place for formats means that the broker can be written against types instead of text, and that
//! a device's jail can be computed from the same spec that builds it.

pub mod channel;
pub mod codec;
pub mod control;
pub mod counters;
pub mod disk;
pub mod guarded;
pub mod image;
pub mod keeper;
pub mod limits;
pub mod log;
pub mod relay;
pub mod rights;
pub mod spec;
pub mod start;
pub mod tap;

/// Version of every message in this crate. Both ends of a channel must have been built from the same value.
pub const PROTOCOL_VERSION: u32 = 1;
