//! # Bare guests are built with the crate that boots them
//!
//! **Job.** Compile `payloads/` with the C compiler that Rust links with anyway. **Who is not trusted.** Nobody.
//! **Why this way.** A guest at privilege level 0 must use general registers only, since a software KVM may not
//! emulate SSE; Rust's precompiled `core` for this target uses SSE, a freestanding C file does not.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Name of the program and the files that it consists of.
const PAYLOADS: &[(&str, &[&str])] = &[
    ("hello", &["hello.S"]),
    ("first-byte", &["first-byte.S"]),
    (
        "virtio-probe",
        &["start.S", "payload.c", "virtio.c", "virtio-probe.c"],
    ),
    ("blk-rw", &["start.S", "payload.c", "virtio.c", "blk-rw.c"]),
    ("net-tx", &["start.S", "payload.c", "virtio.c", "net-tx.c"]),
    (
        "blk-loop",
        &["start.S", "payload.c", "virtio.c", "blk-loop.c"],
    ),
    (
        "net-loop",
        &["start.S", "payload.c", "virtio.c", "net-loop.c"],
    ),
    ("machine", &["start.S", "payload.c", "machine.c"]),
    ("restored", &["start.S", "payload.c", "restored.c"]),
    (
        "start-device",
        &["start.S", "payload.c", "virtio.c", "start-device.c"],
    ),
    ("dax", &["start.S", "payload.c", "virtio.c", "dax.c"]),
    (
        "hostile",
        &[
            "start.S",
            "level3.S",
            "payload.c",
            "virtio.c",
            "hostile.c",
            "hostile-ring.c",
            "hostile-chain.c",
            "hostile-disk.c",
            "hostile-card.c",
            "hostile-registers.c",
            "hostile-race.c",
            "second.S",
            "hostile-platform.c",
        ],
    ),
];

/// Position-dependent, no red zone (a triple fault test uses the stack), no vector registers, no libc.
const FLAGS: &[&str] = &[
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-std=gnu11",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-mcmodel=small",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
    "-Wl,--no-warn-rwx-segments",
];

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=payloads");
    // Bare guests are x86-64 code; on another host the programs are absent, and their tests say so.
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return Ok(());
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
    let sources = Path::new("payloads");
    for (name, files) in PAYLOADS {
        let status = Command::new("cc")
            .args(FLAGS)
            .arg("-T")
            .arg(sources.join("link.ld"))
            .args(files.iter().map(|f| sources.join(f)))
            .arg("-o")
            .arg(out.join(name))
            .status()
            .map_err(|e| format!("cannot start cc: {e}"))?;
        if !status.success() {
            return Err(format!("cc cannot build payload {name}: {status}"));
        }
    }
    Ok(())
}
