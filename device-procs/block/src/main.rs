//! The process `block`, which the broker starts: all of it is in the library, where fuzz targets reach it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    device_host::run("block", block_device::Block::build)
}
