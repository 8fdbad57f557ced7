//! The smallest device process: to read first, and to copy from.
//!
//! **Job.** Configuration space answers the greeting of its spec; queue 0 copies what the driver gives into the buffers that
//! the driver offers, up to [`device::ECHO_MAX`] bytes.
//!
//! **Who is not trusted.** The guest.
//!
//! **Why this way.** Every device has these files: `main.rs` (this one), `device.rs`, `error.rs`, and where they are needed
//! `request.rs`, `config_space.rs` and `backend/`.

#![forbid(unsafe_code)]

mod device;
mod error;

use std::process::ExitCode;

fn main() -> ExitCode {
    device_host::run("template", device::Template::build)
}
