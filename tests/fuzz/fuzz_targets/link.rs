//! See `src/link.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::link::run(data));
