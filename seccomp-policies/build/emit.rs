//! Compiled policies as Rust source for `src/lib.rs` to include.

use crate::{
    compile::Programs,
    resolve::{Kind, Policy},
};
use std::{collections::BTreeSet, fmt::Write};

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
        "pub(crate) static {name}: Compiled = Compiled {{ kill: {}, log: {}, trap: {} }};",
        bpf(&programs.kill),
        bpf(&programs.log),
        bpf(&programs.trap),
    );

    let mut rules = String::new();
    for rule in &policy.rules {
        let (args, error) = match &rule.kind {
            Kind::Allow(checks) => (
                checks
                    .iter()
                    .map(|c| format!("{:?},", c.to_string()))
                    .collect::<String>(),
                String::from("None"),
            ),
            Kind::Errno(name, _) => (String::new(), format!("Some({name:?})")),
        };
        let _ = writeln!(
            rules,
            "  RuleInfo {{ call: {:?}, number: {}, args: &[{args}], error: {error}, why: {:?}, from: {:?} }},",
            rule.call, rule.number, rule.why, rule.from
        );
    }
    let calls: BTreeSet<_> = policy.rules.iter().map(|r| &r.call).collect();
    let _ = writeln!(
        text,
        "pub(crate) static {name}_INFO: PolicyInfo = PolicyInfo {{ name: {:?}, process: {:?}, thread: {:?}, about: {:?}, syscalls: {}, instructions: {}, rules: &[\n{rules}] }};",
        policy.file,
        policy.process,
        policy.thread,
        policy.about,
        calls.len(),
        programs.kill.len(),
    );
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
