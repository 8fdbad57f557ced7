//! Compiled policies as Rust source for `src/lib.rs` to include.

use crate::{
    compile::Programs,
    parse::{Rare, Width},
    resolve::{Check, Kind, Policy},
};
use std::fmt::Write;

/// The statics of one policy: `NAME` (the filters) and `NAME_INFO` (what they say).
pub(crate) fn policy(text: &mut String, policy: &Policy, programs: &Programs) {
    let name = identifier(&policy.file);
    let bpf = |program: &[seccompiler::sock_filter]| {
        let mut list = String::from("&[");
        for i in program {
            let _ = write!(list, "i({},{},{},{}),", i.code, i.jt, i.jf, i.k);
        }
        list + "]"
    };
    let _ = writeln!(
        text,
        "pub(crate) static {name}: Compiled = Compiled {{ name: {:?}, kill: {}, log: {}, trap: {} }};",
        policy.file,
        bpf(&programs.kill),
        bpf(&programs.log),
        bpf(&programs.trap),
    );

    let mut rules = String::new();
    for rule in &policy.rules {
        let (args, error) = match &rule.kind {
            Kind::Allow(checks) => (
                checks.iter().map(check).collect::<String>(),
                String::from("None"),
            ),
            Kind::Errno(name, _, answered) => (
                answered.iter().map(check).collect::<String>(),
                format!("Some({name:?})"),
            ),
        };
        let rare = rule.rare.as_ref().map_or_else(
            || String::from("None"),
            |rare| {
                let Rare { takes, why, test } = rare;
                format!("Some(Rare {{ takes: Takes::{takes:?}, why: {why:?}, test: {test:?} }})")
            },
        );
        let _ = writeln!(
            rules,
            "  RuleInfo {{ call: {:?}, number: {}, args: &[{args}], error: {error}, why: {:?}, from: {:?}, rare: {rare}, child: {:?} }},",
            rule.call, rule.number, rule.why, rule.from, rule.child
        );
    }
    let _ = writeln!(
        text,
        "pub(crate) static {name}_INFO: PolicyInfo = PolicyInfo {{ name: {:?}, process: {:?}, thread: {:?}, about: {:?}, budget: {}, budget_why: {:?}, needs: {:?}, syscalls: {}, instructions: {}, rules: &[\n{rules}] }};",
        policy.file,
        policy.process,
        policy.thread,
        policy.about,
        policy.budget,
        policy.budget_why,
        policy.needs,
        policy.allowed(),
        programs.kill.len(),
    );
}

fn check(check: &Check) -> String {
    let values: String = check
        .values
        .iter()
        .map(|(value, name)| format!("({value}, {name:?}),"))
        .collect();
    format!(
        "ArgInfo {{ index: {}, wide: {}, op: Op::{:?}, mask: {}, text: {:?}, values: &[{values}] }},",
        check.index,
        check.width == Width::Qword,
        check.op,
        check.mask.as_ref().map_or(u64::MAX, |(mask, _)| *mask),
        check.to_string(),
    )
}

/// The list of all policies.
pub(crate) fn table(text: &mut String, policies: &[Policy]) {
    let names: String = policies
        .iter()
        .map(|p| format!("&{}_INFO, ", identifier(&p.file)))
        .collect();
    let _ = writeln!(
        text,
        "pub(crate) static TABLE: [&PolicyInfo; {}] = [{names}];",
        policies.len()
    );
}

fn identifier(file: &str) -> String {
    file.replace('-', "_").to_uppercase()
}
