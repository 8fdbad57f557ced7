//! See `src/kernel.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::kernel::run(data));
