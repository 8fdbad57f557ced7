//! Build script: policy files -> checked rules -> BPF -> one generated Rust file.
//!
//! Job: read `policies/*.toml` and `policies/base/*.toml`, refuse anything that is unclear (unknown
//! call, unknown key, missing reason, duplicate), compile each policy for the target architecture
//! in three variants (kill, log, trap) and write them as `static`s, so that the BPF lies in
//! read-only data and nothing is parsed or allocated at run time.
//! Not trusted: the files' author's memory. Every rule says why it is there.
//! Why this way: a policy is reviewed as data; a mistake in it is a build error, not a dead VM.

mod compile;
mod constants;
mod emit;
mod parse;
mod resolve;

use std::{env, error::Error, fs, path::Path, process::ExitCode};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A policy's author wants the sentence, not the error's debug form.
            eprintln!("seccomp-policies: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let root = env::var("CARGO_MANIFEST_DIR")?;
    let folder = Path::new(&root).join("policies");
    println!("cargo::rerun-if-changed=policies");
    println!("cargo::rerun-if-changed=build");
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;

    let files = parse::read_folder(&folder)?;
    let policies = resolve::resolve(&files, &arch)?;
    let mut text = String::new();
    for policy in &policies {
        for skipped in &policy.absent {
            println!(
                "cargo::warning={}: {arch} has no {skipped}(2), rule skipped",
                policy.file
            );
        }
        let programs = compile::compile(policy, &arch)?;
        emit::policy(&mut text, policy, &programs);
    }
    emit::table(&mut text, &policies);
    fs::write(Path::new(&env::var("OUT_DIR")?).join("policies.rs"), text)?;
    Ok(())
}
