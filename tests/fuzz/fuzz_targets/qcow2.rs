//! See `src/qcow2.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::qcow2::run(data));
