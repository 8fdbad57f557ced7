//! # `cmdline`: arguments to a spec, and the spec to the broker's policy
//!
//! Arguments are separated by zero bytes, as the kernel has them. An error is one line of bounded length; a policy fits into
//! one message.

use ipc::control::Request;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use vmm_main::cmdline::{self, Env};

/// One input.
pub fn run(data: &[u8]) {
    if data.len() > 16 * 1024 {
        return;
    }
    let words: Vec<OsString> = data
        .split(|b| *b == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect();
    match cmdline::parse(&words, &Env::default()) {
        Err(error) => {
            let text = error.to_string();
            assert!(
                !text.is_empty() && text.len() < 16 * 1024,
                "{} bytes",
                text.len()
            );
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
        Ok(cmdline::Request::Run(spec)) => {
            let plan = cmdline::plan(&spec, false);
            assert_eq!(plan.devices.len(), spec.devices.len());
            ipc::codec::encode(&Request::SetPolicy(plan.policy))
                .expect("a policy fits into a message");
            crate::planted!(spec.devices.iter().any(|_| spec.cpus.cpus == 3));
        }
        Ok(_) => {}
    }
}
