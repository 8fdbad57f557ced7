//! # `qmp`: a client's bytes to commands
//!
//! The stream arrives in pieces as the first byte says. Each answer is one JSON object that a client can read.

use crate::bytes::Input;
use ipc::spec::vm::{CpuSpec, MachineKind, MemorySpec};
use serde_json::Value;
use std::sync::Arc;
use vmm_main::qmp::{Info, fuzzing};

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let piece = 1 + usize::from(input.byte()) * 4;
    let info = Arc::new(Info {
        name: Some("vm".into()),
        uuid: Some([7; 16]),
        machine: MachineKind::Microvm,
        cpus: CpuSpec::default(),
        memory: MemorySpec::default(),
    });
    let mut forwarded = 0;
    let answers = fuzzing::converse(&info, input.0.chunks(piece), |command| {
        forwarded += 1;
        crate::planted!(format!("{command:?}").contains("SystemReset"));
    });
    for text in &answers {
        assert!(!text.contains('\n'));
        let answer: Value = serde_json::from_str(text).unwrap_or_else(|why| match text {
            // An id may be a number that no float holds.
            _ if why.to_string().contains("number out of range") => Value::Null,
            _ => panic!("{why}: {text}"),
        });
        assert!(
            answer.is_null() || answer.get("return").is_some() != answer.get("error").is_some(),
            "{answer}"
        );
    }
    assert!(forwarded <= answers.len());
}
