//! `block` started by hand or by a manager: a disk for any vhost-user front end.
//!
//! **Job.** From options to an open image; `device_host::alone` does the rest.
//! **Who is not trusted.** The front end, which this process never reads from, and the image's maker.
//! **Why this way.** The process that serves is the one that a VM's broker would start, in the same jail; this one only opens.

mod cli;

use std::path::PathBuf;
use std::process::ExitCode;

use ipc::image::ImageError;
use ipc::spec::DeviceSpec;
use thiserror::Error;

use cli::{ABOUT, Options};

/// Why there is no disk.
#[derive(Debug, Error)]
#[error("--file {}", .0.display())]
struct DiskError(PathBuf, #[source] ImageError);

/// The program, with the arguments after its name.
pub fn run(arguments: impl Iterator<Item = String>) -> ExitCode {
    ABOUT.answer(cli::parse(arguments), |options| {
        let Options { file, disk, common } = options;
        ABOUT.serve(common, || {
            match ipc::image::open(&file, disk.readonly, disk.direct) {
                Ok(image) => Ok((DeviceSpec::Block(disk), vec![image.into()])),
                Err(error) => Err(DiskError(file, error)),
            }
        })
    })
}
