//! # Who takes part
//!
//! **Job.** Each daemon's program and the command line that serves a folder on descriptor 3.
//! **Who is not trusted.** Nobody. **Why this way.** Each runs with its defaults, as its own manual starts it: sandbox and
//! filter on, no tuning up or down.

use std::path::{Path, PathBuf};

use tests::bench::is_wanted;

/// One daemon.
pub(crate) struct Daemon {
    pub(crate) name: &'static str,
    pub(crate) program: PathBuf,
    /// Arguments for a folder and a cache mode.
    pub(crate) arguments: fn(&Path, Cache) -> Vec<String>,
}

/// What the guest may keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cache {
    None,
    Auto,
}

/// Ours first, then those that are there and whose name has one of the `wanted` texts, if there are any: Debian's at its place,
/// the crate's at `rust` or on the path.
pub(crate) fn all(rust: Option<&Path>, wanted: &[String]) -> Vec<Daemon> {
    let ours = Daemon {
        name: "vhost_user_fs",
        program: env!("CARGO_BIN_EXE_vhost_user_fs").into(),
        arguments: |source, cache| {
            let cache = if cache == Cache::None {
                "never"
            } else {
                "auto"
            };
            vec![
                "-fd=3".into(),
                "-source".into(),
                source.display().to_string(),
                format!("--cache={cache}"),
            ]
        },
    };
    let c = Daemon {
        name: "virtiofsd (C)",
        program: "/usr/lib/qemu/virtiofsd".into(),
        arguments: |source, cache| {
            let cache = if cache == Cache::None { "none" } else { "auto" };
            vec![
                "--fd=3".into(),
                "-o".into(),
                format!("source={}", source.display()),
                "-o".into(),
                format!("cache={cache}"),
            ]
        },
    };
    let rust = Daemon {
        name: "virtiofsd (Rust)",
        program: rust
            .map(Path::to_owned)
            .or_else(on_path)
            .unwrap_or_default(),
        arguments: |source, cache| {
            let cache = if cache == Cache::None {
                "never"
            } else {
                "auto"
            };
            vec![
                "--fd=3".into(),
                format!("--shared-dir={}", source.display()),
                format!("--cache={cache}"),
            ]
        },
    };
    let mut found = vec![ours];
    for peer in [c, rust] {
        if !is_wanted(wanted, peer.name) {
            continue;
        }
        if peer.program.exists() {
            found.push(peer);
        } else {
            eprintln!("{} is not here and is left out", peer.name);
        }
    }
    found
}

fn on_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join("virtiofsd"))
        .find(|program| program.is_file())
}
