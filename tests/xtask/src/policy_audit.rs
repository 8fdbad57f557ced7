//! # `cargo xtask policy --audit`
//!
//! **Job.** Run suites under the kernel's tracer, note which rule of which policy each filtered thread really used, and fail on
//! rules, and on values of argument checks, that nothing used. A rule that takes another host or a coincidence may say so in its
//! file, with the test that makes the call all the same; it is then named only. A policy for what this host does not have is not judged,
//! and that is said; what runs in the nested machine, which may have it, is not traced. A trace with gaps proves nothing: a lost event can
//! be the one that says which policy a thread is under. It is taken once more with larger buffers, and fails the audit then.
//! **Who is not trusted.** The memory of whoever wrote a rule.
//! **Why this way.** The tracepoint `raw_syscalls/sys_enter` sees every call of every process with its arguments, jailed and not
//! dumpable ones too, and costs the traced ones next to nothing, where strace would make timing tests fail. Which policy a
//! thread is under is said by the call that installs it, in an argument that the kernel does not look at.

use crate::{policy::what, tool};
use ::tests::wait::{Deadline, Watched};
use seccomp_policies::{ArgInfo, Policy, Rare, RuleInfo, Takes, traced};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// What is run if nothing else is asked for: suites of whole VMs, and crates whose tests start their program in its jail. Not
/// `seccomp-policies`, whose tests make every call there is, nor what installs a policy without being the process it is for, nor
/// most Linux guests, which take minutes and use no rule that the other tests do not.
const SUITES: &str = "(package(tests) & binary(/^(affinity|bare|dax|qcow2|processes|rare_calls|recovery|faults|qmp|hostile|hostile_client|hostile_state|ozone|asleep|cmdline)$/)) \
     | (package(tests) & binary(/^(snapshot|hotplug|other_tap|shared_folder)$/) - test(/linux|stock|guest_notices|serves_a_vm|a_reboot/)) \
     | (package(/^(block|net|template|vhost-user-fs)$/) & kind(test) - binary(/^(guest|suites)$/)) \
     | (package(tests) & binary(jail) & test(every_process)) | (package(ozone) & binary(outer)) \
     | (package(vmm-main) & binary(chardev_filter))";

/// What is run as well where the host has the device.
const SUITES_OF_DEVICES: &[(&str, &str)] =
    &[("/dev/vhost-net", "(package(tests) & binary(vhost))")];

/// Where they are.
const PACKAGES: &[&str] = &[
    "tests",
    "block",
    "net",
    "template",
    "vhost-user-fs",
    "ozone",
    "vmm-main",
];

/// How often the trace is read. A reader that waits for more would not learn that there is no more.
const LOOK: Duration = Duration::from_millis(20);

/// Kilobytes of trace, of all processors together, at the first and at the second try. A run of all suites makes some 200 MiB.
const BUFFERS: [usize; 2] = [256 << 10, 1 << 20];

#[derive(Debug, clap::Args)]
pub(crate) struct Audit {
    /// Run suites under the kernel's tracer and fail on rules, and values of argument checks, that nothing used.
    #[arg(long, group = "what")]
    audit: bool,
    /// The suites to run, as a filter of cargo-nextest.
    #[arg(long, value_name = "FILTER", requires = "audit")]
    run: Option<String>,
    /// Write what was used to a file, for --with.
    #[arg(long, value_name = "FILE", requires = "audit")]
    keep: Option<PathBuf>,
    /// Add what an earlier run used; may be given again.
    #[arg(long, value_name = "FILE", requires = "audit")]
    with: Vec<PathBuf>,
    /// Run nothing: judge what --with names.
    #[arg(long, requires = "with")]
    no_run: bool,
    /// Trace this instead of suites.
    #[arg(last = true, requires = "audit", conflicts_with = "no_run")]
    command: Vec<String>,
}

impl Audit {
    pub(crate) fn is_wanted(&self) -> bool {
        self.audit
    }
}

pub(crate) fn run(options: &Audit) -> Result<ExitCode, String> {
    let mut used = Used::default();
    for file in &options.with {
        used.read(file)?;
    }
    let command = if options.no_run || !options.command.is_empty() {
        options.command.clone()
    } else {
        suites(options.run.as_deref().unwrap_or(&usual()))?
    };
    let passed = command.is_empty() || trace_without_gaps(&command, &mut used)?;
    if let Some(file) = &options.keep {
        used.write(file)?;
    }
    let verdict = judge(&used, is_here);
    print!("{}", verdict.text);
    if verdict.unused > 0 {
        return Err(format!(
            "{} rules or values were used by nothing: remove them, drive them by a test, or say why they are `rare`",
            verdict.unused
        ));
    }
    if !passed {
        return Err("a suite failed: what it used may be what it should not".into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Traces `command`, with larger buffers if events were lost, and adds what was used. Whether the command succeeded.
fn trace_without_gaps(command: &[String], used: &mut Used) -> Result<bool, String> {
    let mut lost = 0;
    for kilobytes in BUFFERS {
        let mut now = Used::default();
        let traced = trace(command, kilobytes, &mut now)?;
        if traced.lost == 0 {
            used.add(now);
            return Ok(traced.passed);
        }
        lost = traced.lost;
        eprintln!("policy: {lost} events were lost with {kilobytes} KiB of buffers");
    }
    Err(format!(
        "{lost} events were lost: nothing was audited; try again when the machine has less to do"
    ))
}

/// Builds what the suites need, so that the compiler is not traced, and gives the command that runs them.
fn suites(filter: &str) -> Result<Vec<String>, String> {
    if !tool::has_subcommand("nextest") {
        return Err("needs cargo-nextest to select suites; or name a command behind `--`".into());
    }
    tool::run(&mut tool::cargo(&["build", "--workspace", "--bins"]))?;
    let mut words = vec!["nextest", "run", "-E", filter];
    for package in PACKAGES {
        words.extend(["-p", package]);
    }
    tool::run(tool::cargo(&words).arg("--no-run"))?;
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    words.insert(2, "--no-fail-fast");
    let words = words.into_iter().map(str::to_owned);
    Ok(std::iter::once(cargo).chain(words).collect())
}

/// Which rules were used, and of their argument checks which values: policy, rule, check, value, by position.
#[derive(Debug, Default)]
struct Used {
    rules: BTreeSet<(usize, usize)>,
    values: BTreeSet<(usize, usize, usize, usize)>,
}

impl Used {
    fn add(&mut self, other: Self) {
        self.rules.extend(other.rules);
        self.values.extend(other.values);
    }

    fn note(&mut self, policy: Policy, number: i64, args: &[u64; 6]) {
        let at = policy as usize;
        for (r, rule) in policy.info().rules.iter().enumerate() {
            if !rule.matches(number, args) {
                continue;
            }
            self.rules.insert((at, r));
            for (a, arg) in rule.args.iter().enumerate() {
                for (v, (value, _)) in arg.values.iter().enumerate() {
                    if arg.holds_for(*value, args) {
                        self.values.insert((at, r, a, v));
                    }
                }
            }
        }
    }

    /// One line a rule or value, in words, so that a file survives a change of the policies.
    fn write(&self, file: &Path) -> Result<(), String> {
        let mut text = String::new();
        for policy in Policy::ALL {
            for (r, rule) in policy.info().rules.iter().enumerate() {
                if self.rules.contains(&(policy as usize, r)) {
                    text.push_str(&key(policy, rule));
                    text.push('\n');
                }
                for (a, arg) in rule.args.iter().enumerate() {
                    for (v, (_, name)) in arg.values.iter().enumerate() {
                        if self.values.contains(&(policy as usize, r, a, v)) {
                            text.push_str(&value_key(policy, rule, arg, name));
                            text.push('\n');
                        }
                    }
                }
            }
        }
        fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
    }

    fn read(&mut self, file: &Path) -> Result<(), String> {
        let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let lines: BTreeSet<&str> = text.lines().collect();
        for policy in Policy::ALL {
            for (r, rule) in policy.info().rules.iter().enumerate() {
                if lines.contains(key(policy, rule).as_str()) {
                    self.rules.insert((policy as usize, r));
                }
                for (a, arg) in rule.args.iter().enumerate() {
                    for (v, (_, name)) in arg.values.iter().enumerate() {
                        if lines.contains(value_key(policy, rule, arg, name).as_str()) {
                            self.values.insert((policy as usize, r, a, v));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

fn key(policy: Policy, rule: &RuleInfo) -> String {
    format!("{policy} {} {}", rule.call, what(rule))
}

fn value_key(policy: Policy, rule: &RuleInfo, arg: &ArgInfo, name: &str) -> String {
    format!("{}: arg{} {name}", key(policy, rule), arg.index)
}

struct Verdict {
    text: String,
    unused: usize,
}

/// What a run of the suites under the tracer was worth.
struct Traced {
    /// Events that the kernel had no room for.
    lost: u64,
    /// Whether the command succeeded.
    passed: bool,
}

const UNUSED: &str = "NOT USED";
const RARE: &str = "rare, not used";

/// The suites that are run if nothing else is asked for, on this host.
fn usual() -> String {
    let mut filter = SUITES.to_owned();
    let of_devices = SUITES_OF_DEVICES.iter();
    for (_, suites) in of_devices.filter(|(device, _)| is_here(device)) {
        filter.push_str(&format!(" | {suites}"));
    }
    filter
}

fn is_here(device: &str) -> bool {
    Path::new(device).exists()
}

/// A piece that several policies share is judged for each of them: a rule that one needs may be one too many in another.
fn judge(used: &Used, has: impl Fn(&str) -> bool) -> Verdict {
    let mut text = String::new();
    let mut unused = 0;
    for policy in Policy::ALL {
        if let Some(needs) = policy.info().needs.filter(|needs| !has(needs)) {
            text.push_str(&format!(
                "{policy}: not judged here: this host has no {needs}\n"
            ));
            continue;
        }
        let mut lines: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for rule in policy.info().rules {
            // What a child needs is judged in the child's own policy. A call that is answered is not made, so the tracer does
            // not see it; an answer gives nobody a right.
            if rule.child.is_some() || rule.error.is_some() {
                continue;
            }
            let what = match missing(used, policy, rule) {
                Missing::Nothing => continue,
                Missing::Values(values) => values,
                Missing::All => what(rule),
            };
            let mut line = format!("{} ({what}) [{}]", rule.call, rule.from);
            if let Some(rare) = rule.rare {
                line += &format!("; {}, shown by {}", words(rare), rare.test);
            }
            let kind = if rule.rare.is_some() { RARE } else { UNUSED };
            lines.entry(kind).or_default().push(line);
        }
        unused += lines.get(UNUSED).map_or(0, Vec::len);
        for (kind, lines) in lines {
            for line in lines {
                text.push_str(&format!("{policy}: {kind}: {line}\n"));
            }
        }
    }
    Verdict { text, unused }
}

/// Why a rule is rare.
pub(crate) fn words(rare: Rare) -> String {
    match rare.takes {
        Takes::Host => format!("takes another host: {}", rare.why),
        Takes::Chance => format!("takes a coincidence: {}", rare.why),
    }
}

enum Missing {
    Nothing,
    /// Of some argument checks, in words.
    Values(String),
    All,
}

fn missing(used: &Used, policy: Policy, rule: &RuleInfo) -> Missing {
    // A process that comes with one policy or another needs what both have in one of its lives.
    let lives = twins(policy, rule);
    if !lives.iter().any(|life| used.rules.contains(life)) {
        return Missing::All;
    }
    let mut texts = Vec::new();
    for (a, arg) in rule.args.iter().enumerate() {
        let seen = |v| {
            let mut lives = lives.iter();
            lives.any(|(p, r)| used.values.contains(&(*p, *r, a, v)))
        };
        let names = arg.values.iter().enumerate();
        let unseen: Vec<_> = names.filter(|(v, _)| !seen(*v)).map(|(_, n)| n.1).collect();
        if !unseen.is_empty() {
            texts.push(format!("arg{} == {}", arg.index, unseen.join(", ")));
        }
    }
    if texts.is_empty() {
        Missing::Nothing
    } else {
        Missing::Values(texts.join("; "))
    }
}

/// The rule in each policy of the same process and thread that has it, by position.
fn twins(policy: Policy, rule: &RuleInfo) -> Vec<(usize, usize)> {
    let own = policy.info();
    let same = |p: &Policy| (p.info().process, p.info().thread) == (own.process, own.thread);
    let mut found = Vec::new();
    for other in Policy::ALL.into_iter().filter(same) {
        for (r, twin) in other.info().rules.iter().enumerate() {
            if (twin.call, what(twin), twin.from) == (rule.call, what(rule), rule.from) {
                found.push((other as usize, r));
            }
        }
    }
    found
}

/// Runs `command` and everything that it starts under the tracer.
fn trace(command: &[String], kilobytes: usize, used: &mut Used) -> Result<Traced, String> {
    let instance = Instance::new(kilobytes)?;
    let pipe = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(instance.file("trace_pipe"))
        .map_err(|e| format!("trace_pipe: {e}"))?;
    let mut pipe = BufReader::with_capacity(1 << 20, pipe);
    // The shell puts itself on the list of traced processes, before it becomes the command. This process is not on it: it
    // would trace its own reading.
    let script = "echo $$ >\"$0\" && exec \"$@\"";
    let failed = |e: std::io::Error| format!("{}: {e}", command.join(" "));
    let mut child = Command::new("sh")
        .args(["-c", script])
        .arg(instance.file("set_event_pid"))
        .args(command)
        .current_dir(tool::root())
        .spawn()
        .map_err(failed)?;
    let end = Watched::new(child.id().cast_signed()).map_err(failed)?;
    // The reader must keep up with what it reads of. Without it the buffers may not do, which is found out.
    let _ = Command::new("renice")
        .args(["-n", "-10", "-p", &std::process::id().to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let mut reader = Reader::default();
    let mut drain = |reader: &mut Reader| {
        let read = reader.lines(&mut pipe, used);
        read.map_err(|e| format!("trace_pipe: {e}"))
    };
    while !end.ended(Deadline::after(LOOK)).map_err(failed)? {
        drain(&mut reader)?;
    }
    instance.set("tracing_on", "0");
    drain(&mut reader)?;
    // The pipe tells of gaps where it met them; the buffers tell of all.
    let lost = reader.lost.max(instance.lost()?);
    let status = child.wait().map_err(failed)?;
    eprintln!(
        "policy: {} calls of {} filtered threads seen; the suites ended with {status}",
        reader.calls, reader.installed
    );
    if reader.installed == 0 {
        return Err("no thread installed a filter: nothing was audited".into());
    }
    Ok(Traced {
        lost,
        passed: status.success(),
    })
}

/// Follows who is under which policy, from the tracer's text.
#[derive(Debug, Default)]
struct Reader {
    /// The innermost policy of each thread that has one.
    policies: HashMap<u32, Policy>,
    installed: u64,
    calls: u64,
    lost: u64,
    /// The beginning of a line whose end has not come yet.
    part: Vec<u8>,
}

impl Reader {
    /// What there is now.
    fn lines(&mut self, pipe: &mut impl BufRead, used: &mut Used) -> std::io::Result<()> {
        loop {
            // Names of threads may be any bytes.
            match pipe.read_until(b'\n', &mut self.part) {
                Ok(0) => return Ok(()),
                Ok(_) => {
                    let line = std::mem::take(&mut self.part);
                    self.line(&String::from_utf8_lossy(&line), used);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// `  block-1234  [001] .....  12.3: sys_enter: NR 1 (2, 7ff0, …)` and the like.
    fn line(&mut self, line: &str, used: &mut Used) {
        if let Some((_, rest)) = line.split_once("[LOST ") {
            self.lost += rest
                .split(' ')
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(1);
            return;
        }
        let Some((pid, rest)) = thread_of(line) else {
            return;
        };
        if let Some((_, call)) = rest.split_once("sys_enter: NR ") {
            self.call(pid, call, used);
        } else if let Some((_, child)) = rest.split_once("task_newtask: pid=") {
            let number = child.split(' ').next().and_then(|n| n.parse::<u32>().ok());
            if let Some(child) = number {
                // A number may have been somebody else's before.
                match self.policies.get(&pid).copied() {
                    Some(policy) => self.policies.insert(child, policy),
                    None => self.policies.remove(&child),
                };
            }
        }
    }

    fn call(&mut self, pid: u32, call: &str, used: &mut Used) {
        let Some((number, args)) = parse_call(call) else {
            return;
        };
        // Installing a second one is a call of whom the first one is for.
        if let Some(policy) = self.policies.get(&pid) {
            self.calls += 1;
            used.note(*policy, number, &args);
        }
        if let Some(policy) = traced(number, &args) {
            self.installed += 1;
            self.policies.insert(pid, policy);
        }
    }
}

/// The thread and what stands behind it. Names of threads may have dashes and blanks in them.
fn thread_of(line: &str) -> Option<(u32, &str)> {
    let (head, rest) = line.split_once(" [")?;
    let (_, pid) = head.trim_end().rsplit_once('-')?;
    Some((pid.parse().ok()?, rest))
}

/// `1 (2, 7ff0, 0, 0, 0, 0)`: the number in decimal, the arguments in hexadecimal digits.
fn parse_call(text: &str) -> Option<(i64, [u64; 6])> {
    let (number, rest) = text.split_once(" (")?;
    let mut args = [0; 6];
    let mut words = rest.trim_end().trim_end_matches(')').split(", ");
    for arg in &mut args {
        *arg = u64::from_str_radix(words.next()?, 16).ok()?;
    }
    Some((number.parse().ok()?, args))
}

/// The sum of what a processor's statistics say was overwritten or not written.
fn lost_of(stats: &str) -> u64 {
    let lines = stats.lines().filter_map(|line| line.split_once(": "));
    lines
        .filter(|(name, _)| matches!(*name, "overrun" | "commit overrun" | "dropped events"))
        .filter_map(|(_, number)| number.trim().parse::<u64>().ok())
        .sum()
}

/// A tracer of our own, which nobody else's tracing disturbs and which is gone afterwards.
struct Instance(PathBuf);

impl Instance {
    fn new(kilobytes: usize) -> Result<Self, String> {
        let root = Path::new("/sys/kernel/tracing/instances");
        if !root.exists() {
            let mounted = Command::new("mount")
                .args(["-t", "tracefs", "tracefs", "/sys/kernel/tracing"])
                .status();
            if !mounted.is_ok_and(|s| s.success()) || !root.exists() {
                return Err("needs root and a kernel with tracefs (CONFIG_FTRACE_SYSCALLS)".into());
            }
        }
        // Of audits that were killed.
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name.strip_prefix("policy-audit-");
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = fs::remove_dir(entry.path());
            }
        }
        let path = root.join(format!("policy-audit-{}", std::process::id()));
        fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let instance = Self(path);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let each = (kilobytes / processors).to_string();
        for (file, value) in [
            ("buffer_size_kb", each.as_str()),
            ("options/event-fork", "1"),
            // The emulator of a guest's processor makes more calls than everybody else together.
            (
                "events/raw_syscalls/sys_enter/filter",
                "comm != \"qemu-system-x86\" && !(comm ~ \"CPU *\")",
            ),
            // Written first, so that nobody else is traced.
            ("set_event_pid", "0"),
            ("events/raw_syscalls/sys_enter/enable", "1"),
            ("events/task/task_newtask/enable", "1"),
        ] {
            let path = instance.file(file);
            fs::write(&path, value).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(instance)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Events of all processors that there was no room for.
    fn lost(&self) -> Result<u64, String> {
        let folder = self.file("per_cpu");
        let told = |e: std::io::Error| format!("{}: {e}", folder.display());
        let mut lost = 0;
        for processor in fs::read_dir(&folder).map_err(told)? {
            let stats = processor.map_err(told)?.path().join("stats");
            lost += lost_of(&fs::read_to_string(stats).map_err(told)?);
        }
        Ok(lost)
    }

    /// Best effort, for the way out.
    fn set(&self, name: &str, value: &str) {
        let _ = fs::write(self.file(name), value);
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.set("tracing_on", "0");
        self.set("events/enable", "0");
        let _ = fs::remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow(text: &str) -> (Reader, Used) {
        let (mut reader, mut used) = (Reader::default(), Used::default());
        reader.lines(&mut text.as_bytes(), &mut used).unwrap();
        (reader, used)
    }

    fn rule(policy: Policy, call: &str) -> (usize, usize) {
        let rules = policy.info().rules;
        (
            policy as usize,
            rules.iter().position(|r| r.call == call).unwrap(),
        )
    }

    /// What a thread did before its filter does not count; what its children do, does.
    #[test]
    fn calls_count_from_the_filter_on() {
        let [op, flags, program, mark] = [1, 0, 0xbeef, seccomp_policies::mark(Policy::Block)];
        let text = format!(
            "a b-c-7 [000] ..... 1.0: sys_enter: NR 74 (3, 0, 0, 0, 0, 0)\n\
             CPU:1 [LOST 12 EVENTS]\n\
             a b-c-7 [000] ..... 1.1: sys_enter: NR 317 ({op:x}, {flags:x}, {program:x}, {mark:x}, 0, 0)\n\
             a b-c-7 [000] ..... 1.2: sys_enter: NR 75 (3, 0, 0, 0, 0, 0)\n\
             a b-c-7 [000] ..... 1.3: task_newtask: pid=8 comm=x clone_flags=0 oom_score_adj=0\n\
             x-8 [001] ..... 1.4: sys_enter: NR 8 (3, 0, 2, 0, 0, 0)\n\
             y-9 [001] ..... 1.5: sys_enter: NR 1 (3, 0, 2, 0, 0, 0)\n"
        );
        let (reader, used) = follow(&text);
        assert_eq!((reader.installed, reader.calls, reader.lost), (1, 2, 12));
        assert!(used.rules.contains(&rule(Policy::Block, "fdatasync")));
        assert!(used.rules.contains(&rule(Policy::Block, "lseek")));
        assert!(!used.rules.contains(&rule(Policy::Block, "write")));
        assert_eq!(used.values.len(), 1, "SEEK_END");
    }

    #[test]
    fn what_was_used_is_not_reported_and_what_was_not_is() {
        let mut used = Used::default();
        let before = judge(&used, |_| true);
        assert!(before.text.contains("block: NOT USED: fdatasync"));
        used.note(Policy::Block, nix::libc::SYS_fdatasync, &[0; 6]);
        let after = judge(&used, |_| true);
        assert!(!after.text.contains("block: NOT USED: fdatasync"));
        assert_eq!(after.unused + 1, before.unused);
        // One of several values.
        let run = [3, 0xae80, 0, 0, 0, 0];
        used.note(Policy::ControlVcpu, nix::libc::SYS_ioctl, &run);
        let text = judge(&used, |_| true).text;
        assert!(text.contains("control-vcpu: NOT USED: ioctl (arg1 == KVM_GET_REGS"));
        assert!(!text.contains("KVM_RUN,"));
    }

    #[test]
    fn a_policy_is_judged_where_there_is_what_it_needs() {
        let used = Used::default();
        let with = judge(&used, |_| true);
        assert!(with.text.contains("net-vhost: NOT USED: ioctl"));
        assert!(!with.text.contains("not judged here"));
        let without = judge(&used, |device| device != "/dev/vhost-net");
        let lines = without.text.lines();
        let lines: Vec<_> = lines
            .filter(|line| line.starts_with("net-vhost: "))
            .collect();
        assert_eq!(
            lines,
            ["net-vhost: not judged here: this host has no /dev/vhost-net"]
        );
        assert!(without.unused < with.unused);
    }

    #[test]
    fn losses_are_counted() {
        let stats = "entries: 3\noverrun: 5\ncommit overrun: 1\nbytes: 80\noldest event ts:  7.1\nnow ts:  9.0\ndropped events: 2\nread events: 4\n";
        assert_eq!(lost_of(stats), 8);
    }

    #[test]
    fn a_kept_file_says_the_same() {
        let mut used = Used::default();
        used.note(
            Policy::ControlVcpu,
            nix::libc::SYS_ioctl,
            &[3, 0xae80, 0, 0, 0, 0],
        );
        used.note(Policy::Net, nix::libc::SYS_readv, &[0; 6]);
        let dir = tempfile::tempdir().unwrap();
        used.write(&dir.path().join("kept")).unwrap();
        let mut again = Used::default();
        again.read(&dir.path().join("kept")).unwrap();
        assert_eq!((again.rules, again.values), (used.rules, used.values));
    }
}
