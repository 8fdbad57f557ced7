//! # Tests that documents name
//!
//! **Job.** Each test that `SECURITY.md` names, as `` `folder/file::function` ``, exists: the file by the end of its path without
//! `.rs`, and in it a test of that name. So does each that a policy's rare rule names. **Who is not trusted.** Renames: a proof that is gone must not stay in the document.
//! **Why this way.** The document's claims are worth as much as the tests behind them, so the names are checked, not trusted.

use crate::{rules, tool};
use std::fs;
use std::path::Path;

/// The document, and how many tests it names at least: a change of its form must not make the rule blind.
const DOCUMENT: (&str, usize) = ("SECURITY.md", 60);

/// Runs the rule.
pub(crate) fn exist() -> Result<(), String> {
    let (name, least) = DOCUMENT;
    let path = tool::root().join(name);
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let named = named(&text);
    if named.len() < least {
        return Err(format!(
            "{name} names {} tests, fewer than {least}",
            named.len()
        ));
    }
    all_exist(named.into_iter().map(|test| (name, test)))
}

/// Runs the rule on what the policies say of their rare calls.
pub(crate) fn exist_for_policies() -> Result<(), String> {
    let rules = seccomp_policies::table().iter().flat_map(|p| p.rules);
    let mut named = Vec::new();
    for rule in rules {
        if let Some(rare) = rule.rare {
            let test = rare.test.rsplit_once("::");
            named.push((rule.from, test.unwrap_or((rare.test, ""))));
        }
    }
    all_exist(named)
}

/// Where a test is named, and its file and function.
fn all_exist<'a>(
    named: impl IntoIterator<Item = (&'a str, (&'a str, &'a str))>,
) -> Result<(), String> {
    let sources = rules::sources()?;
    let mut broken = Vec::new();
    for (name, (file, test)) in named {
        let mut files = sources
            .iter()
            .filter(|source| ends_with(source, file))
            .peekable();
        if files.peek().is_none() {
            broken.push(format!(
                "{name} names {file}::{test}: there is no file {file}.rs"
            ));
            continue;
        }
        let found =
            files.any(|source| fs::read_to_string(source).is_ok_and(|text| is_test(&text, test)));
        if !found {
            broken.push(format!(
                "{name} names {file}::{test}: that file has no such test"
            ));
        }
    }
    rules::none(&broken)
}

/// All `` `folder/file::function` `` of a text.
fn named(text: &str) -> Vec<(&str, &str)> {
    let in_ticks = text.split('`').skip(1).step_by(2);
    in_ticks
        .filter_map(|word| word.rsplit_once("::"))
        .filter(|(file, _)| file.contains('/'))
        .collect()
}

fn ends_with(source: &Path, file: &str) -> bool {
    source.ends_with(format!("{file}.rs"))
}

/// Whether the source has a test of that name: after `#[test]` and other attributes, or in the list of a runner of its own.
fn is_test(source: &str, name: &str) -> bool {
    let signature = format!("fn {name}()");
    let mut marked = false;
    let mut listed = false;
    let mut is_list = false;
    for line in source.lines().map(str::trim) {
        match line {
            "#[test]" => marked = true,
            _ if line.starts_with("#[") || line.starts_with("//") => {}
            _ if line.starts_with(&signature) && marked => return true,
            _ => marked = false,
        }
        is_list |= line.ends_with("= stories! {");
        is_list &= line != "};";
        listed |= is_list && line == name;
    }
    listed && source.contains(&signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_test_exists() {
        assert_eq!(exist(), Ok(()));
        assert_eq!(exist_for_policies(), Ok(()));
    }

    #[test]
    fn a_test_that_does_not_exist_is_told() {
        let told = all_exist([("here", ("tests/recovery", "nothing_of_the_kind"))]).unwrap_err();
        assert!(told.contains("has no such test"), "{told}");
        let told = all_exist([("here", ("tests/nowhere", "x"))]).unwrap_err();
        assert!(told.contains("there is no file"), "{told}");
    }

    #[test]
    fn names_are_found_and_others_are_not() {
        let text = "see `a/b::c`, `ipc::limits` and `virtio/mmio::x_y`; a/b::d is none";
        assert_eq!(named(text), [("a/b", "c"), ("virtio/mmio", "x_y")]);
    }

    #[test]
    fn only_tests_count() {
        let source = "#[test]\n#[cfg(unix)]\nfn one() {}\nfn two() {}\nconst S: X = stories! {\n    three\n};\nfn three() {}\nfn four() {}\n";
        for (name, wanted) in [
            ("one", true),
            ("two", false),
            ("three", true),
            ("four", false),
            ("on", false),
        ] {
            assert_eq!(is_test(source, name), wanted, "{name}");
        }
    }
}
