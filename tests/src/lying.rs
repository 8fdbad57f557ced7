//! # VMs whose disk is served by somebody who lies
//!
//! **Job.** The real program in a folder of its own, with `lying-device` in the place of `block`. **Who is not trusted.** Nobody here:
//! the device's id says how it lies, and its suite what has to come of it. **Why this way.** One binary is exchanged and nothing
//! else, so that the product has no switch for it.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)] // in a test, a panic is the report

use std::fs::File;
use std::path::Path;

use crate::host::{require_kvm, require_root};
use crate::vm::{Vm, VmBuilder, binary};

/// A VM without a kernel yet, whose disk of 1 MiB is served by the program `liar` in the way that `how` names, and once more if it
/// ends. What is in `dir` already stays.
#[must_use]
pub fn disk(liar: &str, dir: &Path, how: &str) -> VmBuilder {
    require_kvm();
    require_root();
    let program = dir.join("stratovirt");
    if !program.exists() {
        std::fs::copy(binary("stratovirt").unwrap(), &program).unwrap();
        std::fs::copy(liar, dir.join("block")).unwrap();
    }
    let disk = dir.join("disk.img");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    Vm::builder()
        .program(program)
        .args(["-machine", "microvm", "-m", "128"])
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=off", disk.display()))
        .arg("-device")
        .arg(format!(
            "virtio-blk-device,drive=d0,id={how},max-restarts=1"
        ))
}
