//! See `src/block.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::block::run(data));
