//! # The fuzz targets
//!
//! **Job.** One module a target, each with `run`, which feeds one input to the product's own code. `fuzz_targets/` has the
//! programs. **Who is not trusted.** The input. **Why this way.** The product is compiled with `cfg(fuzzing)`, which opens
//! its parsers to this crate and changes nothing in them; what is checked beside "no crash" is written as an assertion here.

pub mod block;
pub mod bytes;
pub mod chains;
pub mod cmdline;
pub mod control;
pub mod fs;
pub mod fuse_decode;
pub mod harness;
pub mod inflight;
pub mod kernel;
pub mod link;
pub mod mmio;
pub mod net;
pub mod qcow2;
pub mod qmp;
pub mod seeds;
pub mod snapshot;
pub mod start;

/// With the feature `planted`, a known bad input is a crash: the proof that the fuzzer gets there.
#[macro_export]
macro_rules! planted {
    ($condition:expr) => {
        if cfg!(feature = "planted") && $condition {
            panic!("planted: {}", stringify!($condition));
        }
    };
}

/// A value that is made once a process; targets have one thread.
#[macro_export]
macro_rules! once {
    ($type:ty, $make:expr, $use:expr) => {{
        thread_local! {
            static VALUE: std::cell::RefCell<$type> = std::cell::RefCell::new($make);
        }
        VALUE.with_borrow_mut($use)
    }};
}
