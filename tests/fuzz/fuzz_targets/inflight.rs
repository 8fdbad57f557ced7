//! See `src/inflight.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::inflight::run(data));
