//! Rules into BPF, with `seccompiler`. Its JSON front end is used because only that knows call
//! numbers by name; the JSON is made here and never seen by anyone.

use crate::{
    parse::{Op, Width},
    resolve::{Check, Kind, Policy, Rule},
};
use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde_json::{Value, json};

/// A policy in its variants.
pub(crate) struct Programs {
    /// Answers forbidden calls by killing the process.
    pub(crate) kill: BpfProgram,
    /// Logs forbidden calls and lets them through.
    pub(crate) log: BpfProgram,
    /// Answers forbidden calls with a catchable SIGSYS.
    pub(crate) trap: BpfProgram,
    /// One filter per error number that the policy answers with, to be installed first.
    pub(crate) errno: Vec<BpfProgram>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CompileError {
    #[error("no filter can be made for architecture {0:?}")]
    Arch(String),
    #[error("{file}: seccompiler refuses the policy: {source}")]
    Filter {
        file: String,
        source: Box<seccompiler::Error>,
    },
    #[error("{call}: no call number in the compiled filter")]
    NoNumber { call: String },
    #[error("{file}: the policy allows nothing")]
    Empty { file: String },
}

/// Compiles one policy for `arch`.
pub(crate) fn compile(policy: &Policy, arch: &str) -> Result<Programs, CompileError> {
    let arch = target(arch)?;
    if policy.rules.is_empty() {
        return Err(CompileError::Empty {
            file: policy.file.clone(),
        });
    }
    // A call answered with an error number must pass the main filter: of all filters' answers the
    // kernel takes the strictest, and "kill" would win over the error number.
    let allowed: Vec<Value> = policy.rules.iter().flat_map(json_rules).collect();
    let main = |action: &str| {
        program(
            &policy.file,
            &json!(action),
            &json!("allow"),
            &allowed,
            arch,
        )
    };

    let mut errors: Vec<u32> = policy.rules.iter().filter_map(error_number).collect();
    errors.sort_unstable();
    errors.dedup();
    let errno = errors.into_iter().map(|number| {
        let rules: Vec<Value> = policy
            .rules
            .iter()
            .filter(|r| error_number(r) == Some(number))
            .map(|r| json!({ "syscall": r.call }))
            .collect();
        program(
            &policy.file,
            &json!("allow"),
            &json!({ "errno": number }),
            &rules,
            arch,
        )
    });
    Ok(Programs {
        kill: main("kill_process")?,
        log: main("log")?,
        trap: main("trap")?,
        errno: errno.collect::<Result<_, _>>()?,
    })
}

/// The number of a call, if `arch` has it.
pub(crate) fn number_of(call: &str, arch: &str) -> Result<Option<i64>, CompileError> {
    let target = target(arch)?;
    let rule = [json!({ "syscall": call })];
    let Ok(program) = program(call, &json!("kill_process"), &json!("allow"), &rule, target) else {
        return Ok(None);
    };
    // ld arch; jeq; ret; ld nr; jeq NUMBER
    const JUMP_IF_EQUAL: u16 = 0x15;
    let number = program
        .get(4)
        .filter(|i| i.code == JUMP_IF_EQUAL)
        .map(|i| i64::from(i.k));
    number.map(Some).ok_or_else(|| CompileError::NoNumber {
        call: call.to_owned(),
    })
}

fn target(arch: &str) -> Result<TargetArch, CompileError> {
    TargetArch::try_from(arch).map_err(|_| CompileError::Arch(arch.to_owned()))
}

fn error_number(rule: &Rule) -> Option<u32> {
    match rule.kind {
        Kind::Errno(_, number) => Some(number),
        Kind::Allow(_) => None,
    }
}

/// One rule with several accepted values is several rules to seccompiler: every combination.
fn json_rules(rule: &Rule) -> Vec<Value> {
    let checks = match &rule.kind {
        Kind::Allow(checks) => checks.as_slice(),
        Kind::Errno(..) => &[],
    };
    let mut combinations: Vec<Vec<Value>> = vec![Vec::new()];
    for check in checks {
        combinations = combinations
            .iter()
            .flat_map(|done| {
                check.values.iter().map(|(value, _)| {
                    let mut next = done.clone();
                    next.push(json_check(check, *value));
                    next
                })
            })
            .collect();
    }
    let call = &rule.call;
    combinations
        .into_iter()
        .map(|args| {
            if args.is_empty() {
                json!({ "syscall": call })
            } else {
                json!({ "syscall": call, "args": args })
            }
        })
        .collect()
}

fn json_check(check: &Check, value: u64) -> Value {
    let op = match check.op {
        Op::Eq => json!("eq"),
        Op::Ne => json!("ne"),
        Op::Lt => json!("lt"),
        Op::Le => json!("le"),
        Op::Gt => json!("gt"),
        Op::Ge => json!("ge"),
        Op::MaskedEq => json!({ "masked_eq": check.mask.as_ref().map_or(0, |(m, _)| *m) }),
    };
    let width = match check.width {
        Width::Dword => "dword",
        Width::Qword => "qword",
    };
    json!({ "index": check.index, "type": width, "op": op, "val": value })
}

fn program(
    file: &str,
    mismatch: &Value,
    matched: &Value,
    rules: &[Value],
    arch: TargetArch,
) -> Result<BpfProgram, CompileError> {
    let text = json!({
        "policy": { "mismatch_action": mismatch, "match_action": matched, "filter": rules }
    })
    .to_string();
    let wrap = |source| CompileError::Filter {
        file: file.to_owned(),
        source: Box::new(source),
    };
    let mut programs = compile_from_json(text.as_bytes(), arch).map_err(wrap)?;
    programs
        .remove("policy")
        .ok_or_else(|| CompileError::Empty {
            file: file.to_owned(),
        })
}
