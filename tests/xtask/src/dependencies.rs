//! # What the project depends on
//!
//! **Job.** Holds every crate that a build can contain against `deny.toml`: where it comes from, under which licence it may be used,
//! whether it is one that is not wanted, and that no version is left open.
//! **Who is not trusted.** A dependency that a version or a habit brings along.
//! **Why this way.** The file is cargo-deny's, and whoever has that tool gets all of its checks; but it takes minutes to build, so
//! that what matters here is checked by this as well, on every machine. Flaws that are known (RUSTSEC) are not: their list is
//! not in the registry.

use crate::tool;
use serde_json::Value;
use std::fs;

/// The one registry.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// The parts of `deny.toml` that are checked.
#[derive(Debug, serde::Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Debug, serde::Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, serde::Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Debug, serde::Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

/// All crates that the lock file has for Linux on x86-64, those of tests and of the build included.
pub(crate) fn are_allowed() -> Result<(), String> {
    let path = tool::root().join("deny.toml");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let deny: Deny = toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let metadata = tool::output(&mut tool::cargo(&[
        "metadata",
        "--offline",
        "--locked",
        // Crates for others need not be on this machine.
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
        "--format-version",
        "1",
    ]))?;
    let metadata: Value =
        serde_json::from_str(&metadata).map_err(|e| format!("cargo metadata: {e}"))?;
    let packages = metadata["packages"].as_array();
    let packages = packages
        .filter(|packages| packages.iter().any(|package| !package["source"].is_null()))
        .ok_or("cargo metadata names no dependency")?;
    let broken: Vec<String> = packages
        .iter()
        .flat_map(|package| against(package, &deny))
        .collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(broken.join("\n"))
}

/// What is wrong with one crate.
fn against(package: &Value, deny: &Deny) -> Vec<String> {
    let text = |member: &str| package[member].as_str().unwrap_or_default();
    let name = format!("{} {}", text("name"), text("version"));
    let mut broken = Vec::new();
    for ban in deny.bans.deny.iter().filter(|ban| ban.name == text("name")) {
        broken.push(format!("{name} is not wanted: {}", ban.reason));
    }
    if package["source"].is_null() {
        // Of this workspace: its own licence is not asked for, but what it leaves open is.
        let all = package["dependencies"].as_array().into_iter().flatten();
        for open in all.filter(|d| d["req"] == "*" && d["path"].is_null()) {
            let of = open["name"].as_str().unwrap_or_default();
            broken.push(format!("{name} takes any version of {of}"));
        }
        return broken;
    }
    if text("source") != REGISTRY {
        broken.push(format!("{name} comes from {}", text("source")));
    }
    let allowed = |licence: &str| deny.licenses.allow.iter().any(|one| one == licence);
    match holds(text("license"), &allowed) {
        Some(true) => {}
        Some(false) => broken.push(format!("{name} is under {}", text("license"))),
        None => broken.push(format!("{name}: {:?} is no licence", text("license"))),
    }
    broken
}

/// Whether an SPDX expression holds when the licences hold that `allowed` says; `None` if it is none. An old way to write OR is a
/// slash.
fn holds(expression: &str, allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let value = any(&mut rest, allowed)?;
    rest.is_empty().then_some(value)
}

/// `all OR all ...`
fn any(rest: &mut &[&str], allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut value = all(rest, allowed)?;
    while let ["OR", behind @ ..] = *rest {
        *rest = behind;
        value |= all(rest, allowed)?;
    }
    Some(value)
}

/// `one AND one ...`, which binds closer.
fn all(rest: &mut &[&str], allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut value = one(rest, allowed)?;
    while let ["AND", behind @ ..] = *rest {
        *rest = behind;
        value &= one(rest, allowed)?;
    }
    Some(value)
}

/// A licence, one with an exception, or an expression in brackets.
fn one(rest: &mut &[&str], allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    match *rest {
        ["(", behind @ ..] => {
            *rest = behind;
            let value = any(rest, allowed)?;
            let [")", behind @ ..] = *rest else {
                return None;
            };
            *rest = behind;
            Some(value)
        }
        ["OR" | "AND" | "WITH" | ")", ..] | [] => None,
        [licence, "WITH", exception, behind @ ..] => {
            *rest = behind;
            Some(allowed(&format!("{licence} WITH {exception}")))
        }
        [licence, behind @ ..] => {
            *rest = behind;
            Some(allowed(licence))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deny() -> Deny {
        let text = "[licenses]\nallow = [\"MIT\", \"Unicode-3.0\", \"Apache-2.0 WITH LLVM-exception\"]\n\
                    [bans]\ndeny = [{ crate = \"anyhow\", reason = \"errors\" }]";
        toml::from_str(text).unwrap()
    }

    #[test]
    fn expressions_hold_or_not_or_are_none() {
        let deny = deny();
        let allowed = |licence: &str| deny.licenses.allow.iter().any(|one| one == licence);
        for (expression, wanted) in [
            ("MIT", Some(true)),
            ("GPL-2.0-only", Some(false)),
            ("MIT OR GPL-2.0-only", Some(true)),
            ("GPL-2.0-only/MIT", Some(true)),
            ("MIT AND GPL-2.0-only", Some(false)),
            // AND binds closer.
            ("MIT OR GPL-2.0-only AND GPL-3.0-only", Some(true)),
            ("(MIT OR GPL-2.0-only) AND GPL-3.0-only", Some(false)),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", Some(true)),
            ("Apache-2.0 WITH LLVM-exception", Some(true)),
            ("Apache-2.0", Some(false)),
            ("MIT WITH LLVM-exception", Some(false)),
            ("", None),
            ("MIT OR", None),
            ("MIT MIT", None),
            ("(MIT", None),
            ("MIT)", None),
            ("OR MIT", None),
        ] {
            assert_eq!(holds(expression, &allowed), wanted, "{expression}");
        }
    }

    #[test]
    fn each_way_to_be_wrong_is_told() {
        let package = |name: &str, source: Value, licence: Value| {
            json!({ "name": name, "version": "1.0.0", "source": source, "license": licence,
                    "dependencies": [{ "name": "open", "req": "*", "path": null },
                                     { "name": "own", "req": "*", "path": "/own" }] })
        };
        let registry = json!(REGISTRY);
        let wrong = |package: Value| against(&package, &deny());
        assert!(wrong(package("fine", registry.clone(), json!("MIT"))).is_empty());
        for (package, wanted) in [
            (
                package("anyhow", registry.clone(), json!("MIT")),
                "anyhow 1.0.0 is not wanted: errors",
            ),
            (
                package("fork", json!("git+https://example.org/fork"), json!("MIT")),
                "fork 1.0.0 comes from git+https://example.org/fork",
            ),
            (
                package("copyleft", registry.clone(), json!("GPL-3.0-only")),
                "copyleft 1.0.0 is under GPL-3.0-only",
            ),
            (
                package("silent", registry, Value::Null),
                "silent 1.0.0: \"\" is no licence",
            ),
            (
                package("ours", Value::Null, Value::Null),
                "ours 1.0.0 takes any version of open",
            ),
        ] {
            assert_eq!(wrong(package), [wanted]);
        }
    }
}
