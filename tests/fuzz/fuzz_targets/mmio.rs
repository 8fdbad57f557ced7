//! See `src/mmio.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::mmio::run(data));
