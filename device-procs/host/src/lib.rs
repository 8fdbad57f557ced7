//! The harness of every device process.
//!
//! **Job.** Everything that device processes share: the way from exec into the jail, the vhost-user back end, virtqueues with
//! in-flight tracking, guest memory, the event loop. A device is an implementation of [`Device`] and a `main` of one line.
//!
//! **Who is not trusted.** The guest, whose rings and buffers are checked here; the front end, whose messages are; and the
//! process itself, once it is jailed.
//!
//! **Why this way.** One reviewed place for what every device would otherwise do in its own way; device crates forbid `unsafe`.

pub mod alone;
mod chain;
mod counters;
mod device;
mod fault;
mod file_io;
mod heritage;
mod inflight;
mod inherited;
mod jail;
mod joined;
mod keeper;
mod kept;
mod memory;
mod movers;
mod patience;
mod record;
mod resume;
mod ring;
mod server;
mod signals;
mod start;
pub mod tap;
#[cfg(feature = "test-frontend")]
pub mod test_frontend;
mod userfault;
mod vhost_net;
mod window;

pub use chain::{Chain, Token};
pub use counters::Counters;
pub use device::{Device, Interest, copy_config};
pub use fault::{DeviceFault, FaultKind, GuestFault, HostFault};
pub use file_io::{Access, FileIo, Range, Room};
pub use heritage::HeritageError;
pub use jail::{JailError, action as filter_action};
pub use joined::JoinedBuffers;
pub use keeper::{Adopt, Estate, Heir, KeeperError, Kept};
pub use memory::{
    BounceBuffer, GuestBuffers, GuestByte, GuestHead, GuestRam, HeldByte, MemoryError,
    PACKET_SEGMENTS, direct_io_alignment,
};
pub use movers::{Movers, MoversError, Moving};
pub use record::Record;
pub use ring::Ring;
pub use server::ServeError;
#[cfg(fuzzing)]
pub use server::fuzzing;
pub use start::{BackendFds, Jailed, Prepared, RunError, Serving, Standalone, run, run_kept};
pub use vhost_net::{KernelQueue, VhostNet};
pub use window::{Window, WindowError, WindowRange};
