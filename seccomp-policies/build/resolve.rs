//! Files into flat rule lists: pulls in the shared pieces, resolves names, and refuses what is
//! wrong or superfluous. Everything that can be said about a policy without BPF is checked here.

use crate::{
    constants,
    parse::{Allow, Arg, Errno, Files, Op, PolicyFile, Rare, Value, Width},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

/// Architectures that the product is built for. A call must exist on at least one.
pub(crate) const ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];

/// A policy with everything looked up.
#[derive(Debug)]
pub(crate) struct Policy {
    /// File name without `.toml`.
    pub(crate) file: String,
    pub(crate) process: String,
    pub(crate) thread: String,
    pub(crate) about: String,
    /// Most distinct calls that it may allow.
    pub(crate) budget: usize,
    pub(crate) budget_why: Option<String>,
    pub(crate) needs: Option<PathBuf>,
    pub(crate) rules: Vec<Rule>,
    /// Calls that this architecture does not have, though the rule is for all.
    pub(crate) absent: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) call: String,
    pub(crate) number: i64,
    pub(crate) why: String,
    /// The file that holds the rule, with its folder: `policies/base/event-loop.toml`.
    pub(crate) from: String,
    /// Why an audit may find the rule unused.
    pub(crate) rare: Option<Rare>,
    /// The policy of a child for whose sake the rule is there.
    pub(crate) child: Option<String>,
    pub(crate) kind: Kind,
}

impl Policy {
    /// Distinct calls that are let through, whatever their arguments. What is there for a child's sake counts there.
    pub(crate) fn allowed(&self) -> usize {
        let allow = |r: &&Rule| matches!(r.kind, Kind::Allow(_)) && r.child.is_none();
        let calls: BTreeSet<_> = self.rules.iter().filter(allow).map(|r| &r.call).collect();
        calls.len()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All checks must hold.
    Allow(Vec<Check>),
    /// Name and number of the error that the caller gets, if the check holds.
    Errno(String, u32, Option<Check>),
}

impl Kind {
    /// Whether it decides about every call of that number.
    fn is_open(&self) -> bool {
        match self {
            Self::Allow(checks) => checks.is_empty(),
            Self::Errno(_, _, check) => check.is_none(),
        }
    }
}

/// An argument check with its values looked up; any of the values satisfies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) index: u8,
    pub(crate) width: Width,
    pub(crate) op: Op,
    pub(crate) mask: Option<(u64, String)>,
    pub(crate) values: Vec<(u64, String)>,
}

impl Check {
    /// Whether every call that satisfies all of `others` surely satisfies this one.
    pub(crate) fn admits(&self, others: &[Self]) -> bool {
        let holds = |given: u64| {
            self.values.iter().any(|(value, _)| match self.op {
                Op::Eq => given == *value,
                Op::MaskedEq => self.mask.as_ref().is_some_and(|(m, _)| given & m == *value),
                _ => false,
            })
        };
        others.iter().any(|other| {
            other == self
                || other.index == self.index
                    && other.width == self.width
                    && other.op == Op::Eq
                    && other.values.iter().all(|(value, _)| holds(*value))
        })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.values.iter().map(|(_, n)| n.as_str()).collect();
        let sign = match self.op {
            Op::Eq | Op::MaskedEq => "==",
            Op::Ne => "!=",
            Op::Lt => "<",
            Op::Le => "<=",
            Op::Gt => ">",
            Op::Ge => ">=",
        };
        write!(f, "arg{}", self.index)?;
        if let Some((_, mask)) = &self.mask {
            write!(f, " & {mask}")?;
        }
        write!(f, " {sign} {}", names.join(" or "))
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum PolicyError {
    #[error("{file}: base piece {name:?} has no file policies/base/{name}.toml")]
    NoBase { file: String, name: String },
    #[error("{file}: child {name:?} has no file policies/{name}.toml")]
    NoChild { file: String, name: String },
    #[error("{file}: child {name:?} has children itself, which must all be in {file} too")]
    NestedChildren { file: String, name: String },
    #[error("{file}: no architecture of {ARCHITECTURES:?} has a call {call:?}")]
    UnknownCall { file: String, call: String },
    #[error("{file}: {call}: architecture {name:?} is not one of {ARCHITECTURES:?}")]
    UnknownArch {
        file: String,
        call: String,
        name: String,
    },
    #[error("{file}: {call}: the reason ({why:?}) is missing or shorter than 10 characters")]
    NoReason {
        file: String,
        call: String,
        why: String,
    },
    #[error("{file}: {call}: constant {name:?} is not in build/constants.rs")]
    UnknownConstant {
        file: String,
        call: String,
        name: String,
    },
    #[error("{file}: {call}: error {name:?} is not in build/constants.rs")]
    UnknownError {
        file: String,
        call: String,
        name: String,
    },
    #[error("{file}: {call}: argument index {index} is outside 0 to 5")]
    BadIndex {
        file: String,
        call: String,
        index: u8,
    },
    #[error("{file}: {call}: argument {index} is checked twice in one rule")]
    RepeatedIndex {
        file: String,
        call: String,
        index: u8,
    },
    #[error("{file}: {call}: argument {index}: give `value` or `values` (not empty), not both")]
    BadValues {
        file: String,
        call: String,
        index: u8,
    },
    #[error("{file}: {call}: argument {index}: `mask` goes with op masked_eq, and only with it")]
    BadMask {
        file: String,
        call: String,
        index: u8,
    },
    #[error("{file}: {call}: argument {index}: several values make no sense with op {op:?}")]
    ManyValues {
        file: String,
        call: String,
        index: u8,
        op: Op,
    },
    #[error("{file}: {call}: argument {index}: {value:#x} does not fit a dword")]
    TooWide {
        file: String,
        call: String,
        index: u8,
        value: u64,
    },
    #[error("{file}: {call}: argument {index}: value {value:#x} has bits outside mask {mask:#x}")]
    OutsideMask {
        file: String,
        call: String,
        index: u8,
        value: u64,
        mask: u64,
    },
    #[error("{file}: {call} is said twice, in {first} and in {second}")]
    Duplicate {
        file: String,
        call: String,
        first: String,
        second: String,
    },
    #[error("{file}: {call} is allowed with any argument in {first}, so {second} is dead")]
    Shadowed {
        file: String,
        call: String,
        first: String,
        second: String,
    },
    #[error(
        "{file}: {call}: an answer depends on one argument at most, a dword compared with `eq`"
    )]
    AnswerArgs { file: String, call: String },
    #[error("{file}: needs {}, which is not beneath /dev", .needs.display())]
    Needs { file: String, needs: PathBuf },
    #[error("{file}: allows {found} distinct calls, its budget is {budget}")]
    OverBudget {
        file: String,
        found: usize,
        budget: usize,
    },
    #[error(transparent)]
    Names(#[from] crate::compile::CompileError),
}

/// Resolves every policy for one architecture.
pub(crate) fn resolve(files: &Files, arch: &str) -> Result<Vec<Policy>, PolicyError> {
    let numbers = Numbers::new(files)?;
    let mut resolved = Vec::new();
    for (name, file) in &files.policies {
        let mut policy = resolve_one(files, &numbers, name, file, arch)?;
        for child in &file.children {
            adopt(&mut policy, files, &numbers, child, arch)?;
        }
        let (found, budget) = (policy.allowed(), file.budget);
        if found > budget {
            let file = name.clone();
            return Err(PolicyError::OverBudget {
                file,
                found,
                budget,
            });
        }
        resolved.push(policy);
    }
    Ok(resolved)
}

fn resolve_one(
    files: &Files,
    numbers: &Numbers,
    name: &str,
    file: &PolicyFile,
    arch: &str,
) -> Result<Policy, PolicyError> {
    let mut policy = Policy {
        file: name.to_owned(),
        process: file.process.clone(),
        thread: file.thread.clone(),
        about: file.about.clone(),
        budget: file.budget,
        budget_why: file.budget_why.clone(),
        needs: file.needs.clone(),
        rules: Vec::new(),
        absent: Vec::new(),
    };
    let own = format!("policies/{name}.toml");
    let mut context = Context {
        numbers,
        arch,
        policy: &mut policy,
    };
    check_reason(&own, "about", &file.about)?;
    if let Some(needs) = file.needs.as_ref().filter(|at| !at.starts_with("/dev")) {
        return Err(PolicyError::Needs {
            file: own,
            needs: needs.clone(),
        });
    }
    context.add(&own, &file.allow, &file.errno)?;
    for piece in &file.base {
        let base = files.base.get(piece).ok_or_else(|| PolicyError::NoBase {
            file: name.to_owned(),
            name: piece.clone(),
        })?;
        let from = format!("policies/base/{piece}.toml");
        check_reason(&from, "about", &base.about)?;
        context.add(&from, &base.allow, &base.errno)?;
    }
    refuse_repetition(&policy)?;
    Ok(policy)
}

/// A child inherits its parent's filter, and the kernel takes the strictest answer of all filters,
/// so the parent's must admit whatever the child's does. What the child's answers with an error must
/// not be killed by the parent's, which may answer or let through as much of it as its own rules say.
fn adopt(
    policy: &mut Policy,
    files: &Files,
    numbers: &Numbers,
    child: &str,
    arch: &str,
) -> Result<(), PolicyError> {
    let file = files
        .policies
        .get(child)
        .ok_or_else(|| PolicyError::NoChild {
            file: policy.file.clone(),
            name: child.to_owned(),
        })?;
    let listed = &files.policies[&policy.file].children;
    if !file.children.iter().all(|below| listed.contains(below)) {
        return Err(PolicyError::NestedChildren {
            file: policy.file.clone(),
            name: child.to_owned(),
        });
    }
    for rule in resolve_one(files, numbers, child, file, arch)?.rules {
        let same_call = |r: &&Rule| r.number == rule.number;
        let checks = match rule.kind {
            Kind::Allow(checks) => checks,
            Kind::Errno(..) if policy.rules.iter().any(|r| r.number == rule.number) => continue,
            Kind::Errno(..) => {
                let child = Some(child.to_owned());
                policy.rules.push(Rule { child, ..rule });
                continue;
            }
        };
        // Another child's answer gives way: that child's own filter still gives it.
        policy.rules.retain(|r| {
            r.number != rule.number || r.child.is_none() || matches!(r.kind, Kind::Allow(_))
        });
        let open = Kind::Allow(Vec::new());
        if policy
            .rules
            .iter()
            .filter(same_call)
            .any(|r| r.kind == open)
        {
            continue;
        }
        if checks.is_empty() {
            policy.rules.retain(|r| r.number != rule.number);
        }
        if policy
            .rules
            .iter()
            .filter(same_call)
            .any(|r| match &r.kind {
                Kind::Allow(admitted) => admitted.iter().all(|a| a.admits(&checks)),
                Kind::Errno(..) => false,
            })
        {
            continue;
        }
        let kind = Kind::Allow(checks);
        let child = Some(child.to_owned());
        policy.rules.push(Rule {
            kind,
            child,
            ..rule
        });
    }
    Ok(())
}

fn refuse_repetition(policy: &Policy) -> Result<(), PolicyError> {
    let mut by_call: BTreeMap<&str, Vec<&Rule>> = BTreeMap::new();
    for rule in &policy.rules {
        by_call.entry(&rule.call).or_default().push(rule);
    }
    for (call, rules) in by_call {
        for (i, first) in rules.iter().enumerate() {
            for second in &rules[i + 1..] {
                let file = policy.file.clone();
                let (call, one, two) = (call.to_owned(), first.from.clone(), second.from.clone());
                let answer = |r: &Rule| matches!(r.kind, Kind::Errno(..));
                let mixed = answer(first) != answer(second);
                let unclear = mixed && (first.kind.is_open() || second.kind.is_open());
                if first.kind == second.kind || unclear {
                    return Err(PolicyError::Duplicate {
                        file,
                        call,
                        first: one,
                        second: two,
                    });
                }
                if first.kind.is_open() {
                    return Err(PolicyError::Shadowed {
                        file,
                        call,
                        first: one,
                        second: two,
                    });
                }
                if second.kind.is_open() {
                    return Err(PolicyError::Shadowed {
                        file,
                        call,
                        first: two,
                        second: one,
                    });
                }
            }
        }
    }
    Ok(())
}

struct Context<'a> {
    numbers: &'a Numbers,
    arch: &'a str,
    policy: &'a mut Policy,
}

impl Context<'_> {
    fn add(&mut self, from: &str, allow: &[Allow], errno: &[Errno]) -> Result<(), PolicyError> {
        for rule in allow {
            check_reason(from, &rule.call, &rule.why)?;
            if let Some(name) = rule
                .only
                .iter()
                .find(|a| !ARCHITECTURES.contains(&a.as_str()))
            {
                return Err(PolicyError::UnknownArch {
                    file: from.to_owned(),
                    call: rule.call.clone(),
                    name: name.clone(),
                });
            }
            let checks = checks(from, &rule.call, &rule.args)?;
            if let Some(rare) = &rule.rare {
                check_reason(from, &rule.call, &rare.why)?;
                check_reason(from, &rule.call, &rare.test)?;
            }
            let here = rule.only.is_empty() || rule.only.iter().any(|a| a == self.arch);
            let kind = Kind::Allow(checks);
            self.push(from, &rule.call, (&rule.why, &rule.rare), kind, here)?;
        }
        for rule in errno {
            check_reason(from, &rule.call, &rule.why)?;
            let number = constants::ERRORS.iter().find(|(n, _)| *n == rule.error);
            let (_, number) = number.ok_or_else(|| PolicyError::UnknownError {
                file: from.to_owned(),
                call: rule.call.clone(),
                name: rule.error.clone(),
            })?;
            if let Some(rare) = &rule.rare {
                check_reason(from, &rule.call, &rare.why)?;
                check_reason(from, &rule.call, &rare.test)?;
            }
            let mut checks = checks(from, &rule.call, &rule.args)?.into_iter();
            let check = checks.next();
            let simple = |c: &Check| c.op == Op::Eq && c.width == Width::Dword;
            if checks.next().is_some() || !check.iter().all(simple) {
                return Err(PolicyError::AnswerArgs {
                    file: from.to_owned(),
                    call: rule.call.clone(),
                });
            }
            let kind = Kind::Errno(rule.error.clone(), *number, check);
            self.push(from, &rule.call, (&rule.why, &rule.rare), kind, true)?;
        }
        Ok(())
    }

    fn push(
        &mut self,
        from: &str,
        call: &str,
        (why, rare): (&str, &Option<Rare>),
        kind: Kind,
        here: bool,
    ) -> Result<(), PolicyError> {
        if !self.numbers.exists(call) {
            return Err(PolicyError::UnknownCall {
                file: from.to_owned(),
                call: call.to_owned(),
            });
        }
        if !here {
            return Ok(());
        }
        let Some(number) = self.numbers.on(self.arch, call) else {
            self.policy.absent.push(call.to_owned());
            return Ok(());
        };
        self.policy.rules.push(Rule {
            call: call.to_owned(),
            number,
            why: why.trim().to_owned(),
            from: from.to_owned(),
            rare: rare.clone(),
            child: None,
            kind,
        });
        Ok(())
    }
}

fn check_reason(file: &str, call: &str, why: &str) -> Result<(), PolicyError> {
    if why.trim().len() < 10 {
        return Err(PolicyError::NoReason {
            file: file.to_owned(),
            call: call.to_owned(),
            why: why.to_owned(),
        });
    }
    Ok(())
}

fn checks(file: &str, call: &str, args: &[Arg]) -> Result<Vec<Check>, PolicyError> {
    let mut seen = BTreeSet::new();
    let mut checks = Vec::new();
    for arg in args {
        let index = arg.index;
        let (file, call) = (file.to_owned(), call.to_owned());
        if index > 5 {
            return Err(PolicyError::BadIndex { file, call, index });
        }
        if !seen.insert(index) {
            return Err(PolicyError::RepeatedIndex { file, call, index });
        }
        let values = match (&arg.value, &arg.values) {
            (Some(one), None) => vec![one.clone()],
            (None, Some(many)) if !many.is_empty() => many.clone(),
            _ => return Err(PolicyError::BadValues { file, call, index }),
        };
        if values.len() > 1 && !matches!(arg.op, Op::Eq | Op::MaskedEq) {
            return Err(PolicyError::ManyValues {
                file,
                call,
                index,
                op: arg.op,
            });
        }
        if arg.mask.is_some() != (arg.op == Op::MaskedEq) {
            return Err(PolicyError::BadMask { file, call, index });
        }
        let number = |value: &Value| -> Result<(u64, String), PolicyError> {
            let (number, name) = evaluate(&file, &call, value)?;
            if arg.width == Width::Dword && number > u64::from(u32::MAX) {
                let (file, call) = (file.clone(), call.clone());
                return Err(PolicyError::TooWide {
                    file,
                    call,
                    index,
                    value: number,
                });
            }
            Ok((number, name))
        };
        let mask = arg.mask.as_ref().map(number).transpose()?;
        let values = values.iter().map(number).collect::<Result<Vec<_>, _>>()?;
        if let Some((mask, _)) = mask
            && let Some((value, _)) = values.iter().find(|(v, _)| v & !mask != 0)
        {
            return Err(PolicyError::OutsideMask {
                file,
                call,
                index,
                value: *value,
                mask,
            });
        }
        checks.push(Check {
            index,
            width: arg.width,
            op: arg.op,
            mask,
            values,
        });
    }
    Ok(checks)
}

fn evaluate(file: &str, call: &str, value: &Value) -> Result<(u64, String), PolicyError> {
    let name = match value {
        Value::Number(n) => return Ok((*n, format!("{n:#x}"))),
        Value::Name(name) => name,
    };
    let mut sum = 0;
    for part in name.split('|').map(str::trim) {
        sum |= constants::lookup(part).ok_or_else(|| PolicyError::UnknownConstant {
            file: file.to_owned(),
            call: call.to_owned(),
            name: part.to_owned(),
        })?;
    }
    Ok((sum, name.clone()))
}

/// Call numbers per architecture, for the calls that the files name.
struct Numbers(BTreeMap<String, BTreeMap<&'static str, i64>>);

impl Numbers {
    fn new(files: &Files) -> Result<Self, PolicyError> {
        let mut names = BTreeSet::new();
        for file in files.policies.values() {
            names.extend(file.allow.iter().map(|r| r.call.clone()));
            names.extend(file.errno.iter().map(|r| r.call.clone()));
        }
        for file in files.base.values() {
            names.extend(file.allow.iter().map(|r| r.call.clone()));
            names.extend(file.errno.iter().map(|r| r.call.clone()));
        }
        let mut numbers = BTreeMap::new();
        for name in names {
            let mut found = BTreeMap::new();
            for arch in ARCHITECTURES {
                if let Some(number) = crate::compile::number_of(&name, arch)? {
                    found.insert(arch, number);
                }
            }
            numbers.insert(name, found);
        }
        Ok(Self(numbers))
    }

    fn exists(&self, call: &str) -> bool {
        self.0.get(call).is_some_and(|n| !n.is_empty())
    }

    fn on(&self, arch: &str, call: &str) -> Option<i64> {
        self.0.get(call)?.get(arch).copied()
    }
}
