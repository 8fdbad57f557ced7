//! See `src/fs.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::fs::run(data));
