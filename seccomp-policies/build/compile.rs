//! Rules into BPF, with `seccompiler`. Its JSON front end is used because only that knows call
//! numbers by name; the JSON is made here and never seen by anyone.

use crate::{
    parse::{Op, Width},
    resolve::{Check, Kind, Policy, Rule},
};
use seccompiler::{BpfProgram, TargetArch, compile_from_json, sock_filter};
use serde_json::{Value, json};

/// A policy in its variants.
pub(crate) struct Programs {
    /// Answers forbidden calls by killing the process.
    pub(crate) kill: BpfProgram,
    /// Logs forbidden calls and lets them through.
    pub(crate) log: BpfProgram,
    /// Answers forbidden calls with a catchable SIGSYS.
    pub(crate) trap: BpfProgram,
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
    #[error("{call}: too many values to answer")]
    TooLong { call: String },
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
    let allowed: Vec<Value> = policy
        .rules
        .iter()
        .filter(|rule| matches!(rule.kind, Kind::Allow(_)))
        .flat_map(json_rules)
        .collect();
    let answers = answers(policy)?;
    let main = |action: &str| {
        let allow = json!("allow");
        let program = program(&policy.file, &json!(action), &allow, &allowed, arch)?;
        Ok(with_answers(program, &answers))
    };
    Ok(Programs {
        kill: main("kill_process")?,
        log: main("log")?,
        trap: main("trap")?,
    })
}

/// Classic BPF: load the word at `k`, jump if the accumulator equals `k`, and return `k` (`linux/bpf_common.h`).
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// `linux/seccomp.h`: the call fails with the error number in the low 16 bits.
const RET_ERRNO: u32 = 0x0005_0000;
/// Instructions with which each of seccompiler's programs begins: load and check the architecture, load the number.
const PREAMBLE: usize = 4;

/// Instructions that answer calls with error numbers, for behind the load of the call's number.
///
/// seccompiler has one answer for all rules of a program. A second filter for each error number would do, and did, but the
/// kernel compiles every filter of every thread to machine code, which is most of what installing one costs.
fn answers(policy: &Policy) -> Result<BpfProgram, CompileError> {
    let mut program = BpfProgram::new();
    for rule in &policy.rules {
        let Kind::Errno(_, error, check) = &rule.kind else {
            continue;
        };
        let answer = instruction(RETURN, 0, RET_ERRNO | error);
        let number = u32::try_from(rule.number).map_err(|_| CompileError::NoNumber {
            call: rule.call.clone(),
        })?;
        let mut then = Vec::new();
        match check {
            None => then.push(answer),
            Some(check) => {
                // The lower half of the argument in `struct seccomp_data`, on little-endian machines.
                then.push(instruction(LOAD, 0, 16 + 8 * u32::from(check.index)));
                for (value, _) in &check.values {
                    // `checks` of `resolve` refuses dwords that are wider.
                    then.push(instruction(JUMP_IF_EQUAL, 1, *value as u32));
                    then.push(answer.clone());
                }
                // What comes behind wants the call's number again.
                then.push(instruction(LOAD, 0, 0));
            }
        }
        let skip = u8::try_from(then.len()).map_err(|_| CompileError::TooLong {
            call: rule.call.clone(),
        })?;
        program.push(instruction(JUMP_IF_EQUAL, skip, number));
        program.extend(then);
    }
    Ok(program)
}

const fn instruction(code: u16, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf, k }
}

/// Puts `answers` into a program. No jump crosses the place: the preamble's only one ends before it.
fn with_answers(mut program: BpfProgram, answers: &[sock_filter]) -> BpfProgram {
    let at = PREAMBLE.min(program.len());
    program.splice(at..at, answers.iter().cloned());
    program
}

/// The number of a call, if `arch` has it.
pub(crate) fn number_of(call: &str, arch: &str) -> Result<Option<i64>, CompileError> {
    let target = target(arch)?;
    let rule = [json!({ "syscall": call })];
    let Ok(program) = program(call, &json!("kill_process"), &json!("allow"), &rule, target) else {
        return Ok(None);
    };
    let number = program
        .get(PREAMBLE)
        .filter(|i| i.code == JUMP_IF_EQUAL)
        .map(|i| i64::from(i.k));
    number.map(Some).ok_or_else(|| CompileError::NoNumber {
        call: call.to_owned(),
    })
}

fn target(arch: &str) -> Result<TargetArch, CompileError> {
    TargetArch::try_from(arch).map_err(|_| CompileError::Arch(arch.to_owned()))
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
