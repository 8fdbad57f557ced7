//! The process `net`, which the broker starts, or a person: all of it is in the library, where fuzz targets reach it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use net_device::standalone;

fn main() -> ExitCode {
    let words: Result<Vec<String>, _> = std::env::args_os()
        .map(std::ffi::OsString::into_string)
        .collect();
    let Ok(words) = words else {
        eprintln!("net: arguments must be UTF-8");
        return ExitCode::from(2);
    };
    if standalone::is_asked_for(&words) {
        return standalone::run(words.into_iter().skip(1));
    }
    device_host::run("net", net_device::Net::build)
}
