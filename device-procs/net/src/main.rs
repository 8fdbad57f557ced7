//! The process `net`, which the broker starts, or a person: all of it is in the library, where fuzz targets reach it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use device_host::alone::program;

fn main() -> ExitCode {
    program::main("net", net_device::standalone::run, || {
        device_host::run("net", net_device::Net::build)
    })
}
