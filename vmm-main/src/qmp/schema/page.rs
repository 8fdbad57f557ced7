//! The manual page of QMP, from the tables.
//!
//! **Job.** `docs/qmp.md`: every command, event and type in words. **Who is not trusted.** Nobody.
//! **Why this way.** A page that is generated cannot fall behind; a test compares it with the file.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::types::{Member, Object, Type, Variants};

const INTRODUCTION: &str = include_str!("page.md");

/// The page, in Markdown.
pub fn page() -> String {
    let mut page = Page {
        out: INTRODUCTION.to_owned(),
        types: Vec::new(),
        known: BTreeSet::new(),
    };
    for group in super::GROUPS {
        let _ = write!(page.out, "\n## {}\n", group.title);
        for command in group.commands {
            let _ = write!(page.out, "\n### {}\n\n{}.\n", command.name, command.help);
            if !command.deprecated.is_empty() {
                let _ = write!(
                    page.out,
                    "\nFor old clients only: {}.\n",
                    command.deprecated
                );
            }
            page.table("argument", command.arguments, command.variants);
            if command.open {
                page.out
                    .push_str("\nFurther arguments are those that the text above names.\n");
            }
            let returns = page.name(command.returns);
            if returns != "nothing" {
                let _ = write!(page.out, "\nReturns: {returns}\n");
            }
        }
    }
    page.out.push_str(
        "\n## Events\n\nEach has a `timestamp` with `seconds` and `microseconds`, and the `data` below.\n",
    );
    for event in super::EVENTS {
        let _ = write!(page.out, "\n### {}\n\n{}.\n", event.name, event.help);
        page.table("data", event.data, None);
    }
    page.out.push_str("\n## Types\n");
    let mut at = 0;
    while let Some(kind) = page.types.get(at).copied() {
        at += 1;
        match kind {
            Type::Object(object) => {
                let _ = write!(page.out, "\n### {}\n", object.name);
                page.table("member", object.members, object.variants);
            }
            Type::Enum(words) => {
                let values = words.values.join("`, `");
                let _ = write!(page.out, "\n### {}\n\nOne of `{values}`.\n", words.name);
            }
            _ => {}
        }
    }
    page.out
}

struct Page {
    out: String,
    /// Types that have a paragraph of their own, in the order in which they are met.
    types: Vec<Type>,
    known: BTreeSet<&'static str>,
}

impl Page {
    fn table(&mut self, noun: &str, members: &[Member], variants: Option<Variants>) {
        if members.is_empty() {
            return;
        }
        let _ = write!(self.out, "\n| {noun} | type | what |\n|---|---|---|\n");
        self.rows(members, "");
        for (case, object) in variants.iter().flat_map(|variants| variants.cases) {
            let tag = variants.map_or("", |variants| variants.tag);
            self.rows(object.members, &format!("{tag} {case}: "));
        }
    }

    fn rows(&mut self, members: &[Member], when: &str) {
        for member in members {
            let optional = if member.optional { ", optional" } else { "" };
            let kind = self.name(member.kind);
            let _ = writeln!(
                self.out,
                "| `{}` | {kind}{optional} | {when}{} |",
                member.name,
                member.help.replace('|', "\\|"),
            );
        }
    }

    /// In words.
    fn name(&mut self, kind: Type) -> String {
        match kind {
            Type::Text(most) if most < ipc::limits::MAX_QMP_REQUEST => {
                format!("text, at most {most} bytes")
            }
            Type::Text(_) => "text".into(),
            Type::Bool => "true or false".into(),
            Type::Int(least, most) => match (least, most) {
                (0, u64::MAX) => "whole number from 0".into(),
                (i64::MIN, _) => "whole number".into(),
                _ => format!("whole number, {least} to {most}"),
            },
            Type::Number => "number".into(),
            Type::Null => "null".into(),
            Type::Any => "anything".into(),
            Type::List(of) => format!("list of {}", self.name(*of)),
            Type::Enum(words) => self.linked(words.name, kind),
            Type::Object(Object { members: [], .. }) => "nothing".into(),
            Type::Object(object) => self.linked(object.name, kind),
            Type::OneOf(one_of) => {
                let names: Vec<String> = one_of.types.iter().map(|kind| self.name(*kind)).collect();
                names.join(" or ")
            }
        }
    }

    fn linked(&mut self, name: &'static str, kind: Type) -> String {
        if self.known.insert(name) {
            self.types.push(kind);
        }
        format!("[{name}](#{})", name.to_lowercase())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn the_page_in_docs_is_the_generated_one() {
        let page = super::page();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/qmp.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&file, &page).unwrap();
        }
        let there = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            there == page,
            "docs/qmp.md is not the generated page: UPDATE_DOCS=1 cargo test -p vmm-main --lib qmp::schema"
        );
    }
}
