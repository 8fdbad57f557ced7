//! See `src/net.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::net::run(data));
