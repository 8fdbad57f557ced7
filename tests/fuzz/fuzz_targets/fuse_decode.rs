//! See `src/fuse_decode.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::fuse_decode::run(data));
