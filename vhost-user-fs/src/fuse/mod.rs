//! FUSE as Linux speaks it over virtio-fs.
//!
//! **Job.** [`wire`] names the numbers of the protocol, [`decode`] turns bytes into a [`Request`], [`reply`] encodes answers.
//! **Who is not trusted.** The guest: each request is a copy that was made once, of capped size.
//! **Why this way.** Everything here is a pure function of bytes, so that it can be fuzzed and tested without files, and
//! no structure is ever laid over memory that a guest writes to.

pub mod decode;
pub mod reply;
pub mod wire;

pub use decode::{Body, Name, Request, XattrName, decode};
pub use wire::InHeader;
