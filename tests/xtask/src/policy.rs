//! # `cargo xtask policy`
//!
//! **Job.** Print the system call policies: a table of all (which README shows and `check` compares), the rules of some, or,
//! with `--audit`, what a run of the suites left unused. **Who is not trusted.** Nobody.
//! **Why this way.** The table comes from the same data that the filters are compiled from, so it cannot tell anything else.

use crate::{policy_audit, tool};
use seccomp_policies::{PolicyInfo, RuleInfo, table};
use std::fmt::Write;
use std::fs;
use std::process::ExitCode;

/// The table stands in README between these lines.
const BEGIN: &str = "<!-- cargo xtask policy: begin -->\n";
const END: &str = "<!-- cargo xtask policy: end -->\n";

/// Print the system call policies, or look for rules that nothing uses.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only the rules of these; without, all and the table.
    #[arg(value_name = "POLICY")]
    names: Vec<String>,
    /// Only the table that README shows.
    #[arg(long, group = "what")]
    table: bool,
    /// Put the table into README.
    #[arg(long, group = "what")]
    write: bool,
    #[command(flatten)]
    audit: policy_audit::Audit,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, String> {
    if options.table {
        print!("{}", overview());
    } else if options.write {
        write_readme()?;
    } else if options.audit.is_wanted() {
        return policy_audit::run(&options.audit);
    } else if options.names.is_empty() {
        print!("{}", overview());
        for policy in table() {
            print!("\n{}", rules(policy));
        }
    }
    for name in &options.names {
        let policy = table().iter().find(|p| p.name == *name).ok_or_else(|| {
            let known: Vec<_> = table().iter().map(|p| p.name).collect();
            format!(
                "there is no policy {name:?}; there are {}",
                known.join(", ")
            )
        })?;
        print!("{}", rules(policy));
    }
    Ok(ExitCode::SUCCESS)
}

/// One line a policy, as README shows it.
pub(crate) fn overview() -> String {
    let mut text = String::from(
        "| process | thread | calls | at most | argument checks | answered | policy |\n|---|---|---|---|---|---|---|\n",
    );
    for policy in table() {
        let checks = policy.rules.iter().filter(|r| r.error.is_none());
        let checks: usize = checks.map(|r| r.args.len()).sum();
        let answered = policy.rules.iter().filter(|r| r.error.is_some()).count();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {checks} | {answered} | [{name}](seccomp-policies/policies/{name}.toml) |",
            policy.process,
            policy.thread,
            policy.syscalls,
            policy.budget,
            name = policy.name
        );
    }
    text
}

/// A policy's rules with their arguments and reasons.
fn rules(policy: &PolicyInfo) -> String {
    let mut text = format!(
        "{}: {}, thread {}: {} calls of at most {}, {} instructions\n  {}\n",
        policy.name,
        policy.process,
        policy.thread,
        policy.syscalls,
        policy.budget,
        policy.instructions,
        policy.about
    );
    if let Some(why) = policy.budget_why {
        let _ = writeln!(text, "  at most {}: {why}", policy.budget);
    }
    if let Some(needs) = policy.needs {
        let _ = writeln!(text, "  only where the host has {needs}");
    }
    for rule in policy.rules {
        let _ = writeln!(text, "  {:<18} {}", rule.call, what(rule));
        let _ = writeln!(text, "  {:<18}   {} [{}]", "", rule.why, rule.from);
        if let Some(rare) = rule.rare {
            let why = policy_audit::words(rare);
            let _ = writeln!(text, "  {:<18}   {why}; shown by {}", "", rare.test);
        }
    }
    text
}

/// What a rule says of a call, in words.
pub(crate) fn what(rule: &RuleInfo) -> String {
    let checks: Vec<_> = rule.args.iter().map(|a| a.text).collect();
    let when = checks.join(" and ");
    match (rule.error, checks.is_empty()) {
        (None, true) => "any".into(),
        (None, false) => when,
        (Some(error), true) => format!("answered {error}"),
        (Some(error), false) => format!("answered {error} if {when}"),
    }
}

/// README shows what [`overview`] says.
pub(crate) fn readme_is_right() -> Result<(), String> {
    let text = read_readme()?;
    let (_, shown, _) = split(&text)?;
    if shown == overview() {
        Ok(())
    } else {
        Err("README.md shows another table of policies; `cargo xtask policy --write` puts this one there".into())
    }
}

fn write_readme() -> Result<(), String> {
    let text = read_readme()?;
    let (before, _, after) = split(&text)?;
    let path = tool::root().join("README.md");
    fs::write(&path, format!("{before}{}{after}", overview()))
        .map_err(|e| format!("{}: {e}", path.display()))
}

fn read_readme() -> Result<String, String> {
    let path = tool::root().join("README.md");
    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
}

/// What stands before the table, the table, and what stands behind it; the marks belong to the outer parts.
fn split(text: &str) -> Result<(&str, &str, &str), String> {
    let missing = || "README.md lacks the marks around the table of policies".to_owned();
    let begin = text.find(BEGIN).ok_or_else(missing)? + BEGIN.len();
    let length = text[begin..].find(END).ok_or_else(missing)?;
    Ok((
        &text[..begin],
        &text[begin..begin + length],
        &text[begin + length..],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readme_shows_the_table() {
        readme_is_right().unwrap();
    }

    #[test]
    fn a_table_is_found_between_its_marks_only() {
        let text = format!("a\n{BEGIN}old\n{END}b\n");
        let (before, table, after) = split(&text).unwrap();
        assert_eq!((table, after), ("old\n", &*format!("{END}b\n")));
        assert!(before.ends_with(BEGIN));
        assert!(split("no marks").is_err());
        assert!(split(END).is_err());
    }

    #[test]
    fn the_table_has_each_policy_and_its_figures() {
        let text = overview();
        for policy in table() {
            let row = format!("| {} | {} |", policy.syscalls, policy.budget);
            let line = text
                .lines()
                .find(|l| l.contains(&format!("[{}]", policy.name)))
                .unwrap();
            assert!(line.contains(&row), "{line}");
            assert!(rules(policy).contains(policy.about));
        }
    }
}
