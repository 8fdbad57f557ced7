//! See `src/cmdline.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::cmdline::run(data));
