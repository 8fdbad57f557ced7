//! See `src/start.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::start::run(data));
