//! # The project's own rules
//!
//! **Job.** What no linter knows: which crates may meet in one process, that each module has its page, where `unsafe`
//! lives. **Who is not trusted.** Habit. **Why this way.** A rule that is a program cannot be forgotten.

use crate::{dependencies, named_tests, tool};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

type Rule = fn() -> Result<(), String>;

/// All rules with their names.
pub(crate) const ALL: &[(&str, Rule)] = &[
    (
        "no parser of guest data in a process that holds KVM",
        kvm_crates_parse_nothing,
    ),
    (
        "dependencies' sources and licences",
        dependencies::are_allowed,
    ),
    ("each module starts with its page", modules_have_pages),
    ("unsafe code is where the list says", unsafe_is_listed),
    ("one build of the product", features_are_listed),
    ("tests that SECURITY.md names exist", named_tests::exist),
    (
        "tests of rare system calls exist",
        named_tests::exist_for_policies,
    ),
    (
        "README shows the system call policies",
        crate::policy::readme_is_right,
    ),
];

/// Crates that give a process KVM.
const KVM: &[&str] = &["kvm-ioctls"];
/// Crates that parse virtqueues, images, packets, FUSE or USB messages, by name or beginning of the name.
const PARSERS: &[&str] = &[
    "virtio-queue",
    "vhost-user-backend",
    "imago",
    "qcow",
    "fuse-",
    "fuse_",
    "fuse-backend-rs",
    "usb",
    "smoltcp",
    "etherparse",
    "device-host",
    "block",
    "net",
    "template",
];

/// Workspace crates that are allowed to have both: none. The `tests` crates start processes and hold nothing.
fn kvm_crates_parse_nothing() -> Result<(), String> {
    let mut broken = Vec::new();
    let mut kvm_crates = 0;
    for package in workspace_packages()? {
        let tree = tool::output(&mut tool::cargo(&[
            "tree",
            "--offline",
            "-p",
            &package,
            "-e",
            "normal",
            "--prefix",
            "none",
        ]))?;
        let crates: BTreeSet<&str> = tree
            .lines()
            .filter_map(|l| l.split_whitespace().next())
            .collect();
        if !KVM.iter().any(|k| crates.contains(k)) {
            continue;
        }
        kvm_crates += 1;
        for found in crates.iter().filter(|c| is_parser(c)) {
            broken.push(format!("{package} holds KVM and depends on {found}"));
        }
    }
    if kvm_crates == 0 {
        broken.push(format!(
            "no crate depends on {KVM:?}: this rule looks for the wrong names"
        ));
    }
    none(&broken)
}

fn is_parser(name: &str) -> bool {
    PARSERS.iter().any(|p| {
        if p.ends_with(['-', '_']) {
            name.starts_with(p)
        } else {
            name == *p
        }
    })
}

/// What cargo knows of each package of the workspace.
fn workspace_metadata() -> Result<Vec<serde_json::Value>, String> {
    let text = tool::output(&mut tool::cargo(&[
        "metadata",
        "--offline",
        "--no-deps",
        "--format-version",
        "1",
    ]))?;
    let mut data: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| format!("cargo metadata: {e}"))?;
    match data["packages"].take() {
        serde_json::Value::Array(packages) => Ok(packages),
        _ => Err("cargo metadata names no packages".into()),
    }
}

fn workspace_packages() -> Result<Vec<String>, String> {
    let packages = workspace_metadata()?;
    Ok(packages
        .iter()
        .filter_map(|p| p["name"].as_str().map(str::to_owned))
        .collect())
}

/// Each source file, but not those of tests, starts with `//!`.
fn modules_have_pages() -> Result<(), String> {
    let mut broken = Vec::new();
    for file in sources()? {
        let text = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        let first = text
            .lines()
            .find(|l| !l.trim().is_empty() && !l.starts_with("#!"));
        if !first.is_some_and(|l| l.starts_with("//!")) {
            broken.push(format!(
                "{} does not start with a //! page",
                relative(&file)
            ));
        }
    }
    none(&broken)
}

/// Crates whose code is not the product's.
const NOT_PRODUCT: &[&str] = &["tests", "xtask"];
/// Features that the product's crates may have: this one is a library for tests of device processes, which no program uses.
const FEATURES: &[(&str, &str)] = &[("device-host", "test-frontend")];

/// A feature is another build. One that leaves a layer of a jail out, for a test, could be shipped by mistake; layers are
/// taken away from the shipped programs instead (`tests/src/jail/saboteur.rs`).
fn features_are_listed() -> Result<(), String> {
    let packages = workspace_metadata()?;
    let mut found = BTreeSet::new();
    for package in &packages {
        let name = package["name"].as_str().unwrap_or_default();
        if NOT_PRODUCT.contains(&name) {
            continue;
        }
        let features = package["features"].as_object().into_iter().flatten();
        found.extend(features.map(|(feature, _)| (name.to_owned(), feature.clone())));
    }
    let is_listed = |(name, feature): &(String, String)| FEATURES.contains(&(name, feature));
    let mut broken: Vec<String> = found
        .iter()
        .filter(|one| !is_listed(one))
        .map(|(name, feature)| format!("{name} has the feature {feature}, which is not listed"))
        .collect();
    broken.extend(
        FEATURES
            .iter()
            .filter(|(name, feature)| !found.contains(&((*name).to_owned(), (*feature).to_owned())))
            .map(|(name, feature)| format!("{name} has no feature {feature} any more")),
    );
    none(&broken)
}

/// `unsafe` is opted into by file, and each such file is in the list, so that a new one is seen in review.
fn unsafe_is_listed() -> Result<(), String> {
    let list = tool::root().join("tests/xtask/unsafe-files.txt");
    let text = fs::read_to_string(&list).map_err(|e| format!("{}: {e}", list.display()))?;
    let listed: BTreeSet<String> = text
        .lines()
        .filter(|l| !l.starts_with('#') && !l.trim().is_empty())
        .map(|l| l.split_whitespace().next().unwrap_or_default().to_owned())
        .collect();
    let mut found = BTreeSet::new();
    for file in sources()? {
        let text = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        // put together, so that this file is not one of them
        let opt_in = ["allow(unsafe", "_code"].concat();
        if text.contains(&opt_in) {
            found.insert(relative(&file));
        }
    }
    let mut broken: Vec<String> = found
        .difference(&listed)
        .map(|f| format!("{f} uses unsafe code and is not in tests/xtask/unsafe-files.txt"))
        .collect();
    broken.extend(
        listed
            .difference(&found)
            .map(|f| format!("tests/xtask/unsafe-files.txt lists {f}, which uses none")),
    );
    none(&broken)
}

pub(crate) fn sources() -> Result<Vec<PathBuf>, String> {
    let text = tool::output(
        std::process::Command::new("git")
            .args(["ls-files", "-co", "--exclude-standard", "*.rs"])
            .current_dir(tool::root()),
    );
    // A source archive has no git; then the folders are walked.
    let files = match text {
        Ok(text) => text
            .lines()
            .map(|l| tool::root().join(l))
            .filter(|f| f.exists())
            .collect(),
        Err(_) => {
            let mut files = Vec::new();
            walk(&tool::root(), &mut files)?;
            files
        }
    };
    if files.is_empty() {
        Err("found no source files".into())
    } else {
        Ok(files)
    }
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    for entry in fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))? {
        let path = entry.map_err(|e| format!("{}: {e}", dir.display()))?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            walk(&path, files)?;
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn relative(file: &Path) -> String {
    file.strip_prefix(tool::root())
        .unwrap_or(file)
        .display()
        .to_string()
}

pub(crate) fn none(broken: &[String]) -> Result<(), String> {
    if broken.is_empty() {
        Ok(())
    } else {
        Err(broken.join("\n  "))
    }
}

#[cfg(test)]
mod tests {
    use super::is_parser;

    #[test]
    fn parsers_are_known_by_name_or_beginning() {
        assert!(is_parser("virtio-queue") && is_parser("fuse-backend-rs") && is_parser("fuse-abi"));
        assert!(!is_parser("virtio-bindings") && !is_parser("vhost") && !is_parser("networking"));
    }
}
