//! Prints every policy: process, thread, calls, arguments, reasons. `policy_table [POLICY…]`; with
//! `-s` one line per policy.

use seccomp_policies::{PolicyInfo, table};
use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

fn print(out: &mut impl Write, policy: &PolicyInfo, short: bool) -> io::Result<()> {
    let PolicyInfo {
        name,
        process,
        thread,
        about,
        syscalls,
        instructions,
        rules,
    } = policy;
    if short {
        return writeln!(
            out,
            "{name:<16} {process:<14} {thread:<8} {syscalls:>3} calls, {:>3} rules, {instructions:>4} instructions",
            rules.len()
        );
    }
    writeln!(
        out,
        "\n{name}: {process}, {thread}: {syscalls} calls\n  {about}"
    )?;
    for rule in *rules {
        let what = match rule.error {
            Some(error) => format!("answers {error}"),
            None if rule.args.is_empty() => String::from("any"),
            None => rule.args.join(" and "),
        };
        writeln!(
            out,
            "  {:<18} {what}\n  {:<18}   {} [{}]",
            rule.call, "", rule.why, rule.from
        )?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let short = arguments.iter().any(|a| a == "-s");
    let wanted: Vec<_> = arguments.iter().filter(|a| *a != "-s").collect();
    if let Some(unknown) = wanted
        .iter()
        .find(|w| table().iter().all(|p| p.name != **w))
    {
        eprintln!("there is no policy {unknown:?}");
        return ExitCode::from(2);
    }
    let mut out = io::stdout().lock();
    for policy in table()
        .iter()
        .filter(|p| wanted.is_empty() || wanted.iter().any(|w| *w == p.name))
    {
        if print(&mut out, policy, short).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
