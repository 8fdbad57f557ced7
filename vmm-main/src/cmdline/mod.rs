//! The command line: text in, [`VmSpec`] out.
//!
//! **Job.** Reads arguments in StratoVirt's syntax (`-option key=value,key`), checks them against one table
//! ([`table::OPTIONS`]), and gives the spec of the whole VM, or one error that names option, value and what is allowed.
//! [`plan`] then lists what the broker may open and start for that spec. Nothing here opens, looks up or asks anything:
//! the environment is passed in, and paths stay text.
//!
//! **Who is not trusted.** Whoever composed the arguments may be a pod annotation away from a tenant. So no argument can
//! loosen a jail beyond `-seccomp` and `-disable-seccomp`, unknown or repeated properties are errors instead of guesses,
//! and what would silently do nothing is refused unless the manual lists it as accepted without effect.
//!
//! **Why this way.** One table gives parsing, errors, `--help` and the manual page (`docs/stratovirt.1.md`, checked by a
//! test), so they cannot disagree. No argument-parser crate: single-dash long options, leading words that select a form,
//! `,,` escapes and `-append` with several arguments fit none of them, and the control process links as little as it can.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use ipc::limits;
use ipc::log::Level;
use ipc::spec::vm::{
    BootSpec, CpuSpec, DeviceOption, LogSpec, MachineKind, MachineSpec, MemorySpec, VcpuAffinity,
    VmSpec,
};
use ipc::start::{SandboxMode, SeccompMode};

mod character;
mod check;
mod device;
mod error;
mod help;
mod machine;
mod memory;
mod nearest;
pub mod plan;
pub mod props;
pub mod table;

pub use error::CmdlineError;
pub(crate) use help::QMP_VERSION;
pub use help::{manual, usage, version};
pub(crate) use nearest::nearest;
pub use plan::{ChardevPlan, Plan, plan};
pub(crate) use props::read_mac;

use props::Props;
use table::{Arg, Group, OptionDef};

/// What the environment says.
#[derive(Debug, Clone, Default)]
pub struct Env {
    /// `STRATOVIRT_LOG_LEVEL`
    pub log_level: Option<OsString>,
}

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// A VM.
    Run(Box<VmSpec>),
    /// [`usage`] on standard output, status 0.
    Usage,
    /// [`version()`] on standard output, status 0.
    Version,
}

/// One option as given.
struct Given<'a> {
    option: &'static OptionDef,
    /// Its argument; empty for a flag.
    value: String,
    /// Whether there was one, for options that may go without.
    has_value: bool,
    /// As it was spelled, for errors.
    _spelled: &'a str,
}

/// The spec on its way, with what cross-checks need to name their culprits.
struct Draft {
    spec: VmSpec,
    /// Arguments of `-drive`, `-netdev`, `-fsdev`, `-chardev` and `-device`, in the order of the spec's lists.
    /// The arguments of `-vcpu-affinity`, in their order.
    affinity_args: Vec<String>,
    drive_args: Vec<String>,
    netdev_args: Vec<String>,
    fsdev_args: Vec<String>,
    chardev_args: Vec<String>,
    /// Devices, whose defaults need the whole command line.
    devices: Vec<device::Draft>,
    /// Guest memory.
    memory: memory::Draft,
    /// Argument of `-serial`.
    serial_arg: String,
    /// Arguments of `-mon` with the chardev each names.
    mon_args: Vec<(String, String)>,
    /// Whether there was a `-D`.
    log_option: bool,
    /// Whether there was a `-seccomp`.
    seccomp_option: bool,
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// The first mistake found: unknown options in their order first, then each option's own, then contradictions.
pub fn parse(args: &[OsString], env: &Env) -> Result<Request, CmdlineError> {
    let args = args
        .iter()
        .map(|arg| text(arg))
        .collect::<Result<Vec<&str>, _>>()?;
    let given = collect(&args)?;
    if given.iter().any(|given| given.option.name == "help") {
        return Ok(Request::Usage);
    }
    if given.iter().any(|given| given.option.name == "version") {
        return Ok(Request::Version);
    }
    let mut draft = Draft::new(env)?;
    for (at, one) in given.iter().enumerate() {
        if !one.option.many
            && given[..at]
                .iter()
                .any(|other| other.option.name == one.option.name)
        {
            return Err(one.error("is given twice"));
        }
        draft.take(one)?;
    }
    check::finish(draft).map(|spec| Request::Run(Box::new(spec)))
}

fn text(arg: &OsStr) -> Result<&str, CmdlineError> {
    arg.to_str()
        .filter(|arg| !arg.contains('\0'))
        .ok_or_else(|| {
            CmdlineError::new(
                "",
                "",
                format!("argument {} is not valid UTF-8", arg.to_string_lossy()),
            )
        })
}

/// Splits the arguments into options.
fn collect<'a>(args: &[&'a str]) -> Result<Vec<Given<'a>>, CmdlineError> {
    let mut given = Vec::new();
    let mut rest = args.iter().copied().peekable();
    while let Some(spelled) = rest.next() {
        let Some(name) = dashless(spelled) else {
            return Err(CmdlineError::new(
                "",
                "",
                format!("argument {spelled} belongs to no option"),
            ));
        };
        let option = table::find(name).ok_or_else(|| unknown(spelled, name))?;
        let mut one = Given {
            option,
            value: String::new(),
            has_value: false,
            _spelled: spelled,
        };
        let is_option = |arg: &&str| dashless(arg).is_some_and(|name| table::find(name).is_some());
        match option.arg {
            Arg::Flag => {}
            Arg::Optional(_) => {
                if let Some(value) = rest.next_if(|next| !next.starts_with('-')) {
                    one.set(value);
                }
            }
            Arg::Text(_) | Arg::Words(_) | Arg::Props { .. } => {
                match rest.next_if(|next| !is_option(next)) {
                    Some(value) => one.set(value),
                    None => {
                        let found = rest
                            .peek()
                            .map_or("nothing".to_owned(), |next| format!("the option {next}"));
                        return Err(one.error(format!("needs a value, but {found} follows")));
                    }
                }
            }
        }
        if matches!(option.arg, Arg::Words(_)) {
            while let Some(word) = rest.next_if(|next| !next.starts_with('-')) {
                one.value.push(' ');
                one.value.push_str(word);
            }
        }
        given.push(one);
    }
    Ok(given)
}

/// The name behind one or two dashes.
fn dashless(arg: &str) -> Option<&str> {
    let name = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    (!name.is_empty()).then_some(name)
}

fn unknown(spelled: &str, name: &str) -> CmdlineError {
    if let Some((option, value)) = name.split_once('=')
        && table::find(option).is_some()
    {
        let text =
            format!("unknown option; the value is an argument of its own: -{option} {value}");
        return CmdlineError::new(spelled, "", text);
    }
    let names = table::OPTIONS
        .iter()
        .flat_map(|option| option.aliases.iter().copied().chain([option.name]));
    let near = nearest(name, names).map_or(String::new(), |near| format!(", nearest is -{near}"));
    CmdlineError::new(
        spelled,
        "",
        format!("unknown option{near}; --help lists all"),
    )
}

impl Given<'_> {
    fn set(&mut self, value: &str) {
        value.clone_into(&mut self.value);
        self.has_value = true;
    }

    fn error(&self, text: impl Into<String>) -> CmdlineError {
        CmdlineError::new(&self.option.dashed(), &self.value, text)
    }

    fn props(&self) -> Result<Props<'_>, CmdlineError> {
        Props::read(self.option, &self.value)
    }

    fn path(&self) -> Result<PathBuf, CmdlineError> {
        if self.value.is_empty() {
            return Err(self.error("is empty; allowed: a path"));
        }
        Ok(PathBuf::from(&self.value))
    }
}

impl Draft {
    fn new(env: &Env) -> Result<Self, CmdlineError> {
        const LEVEL: &str = "STRATOVIRT_LOG_LEVEL";
        let level = match &env.log_level {
            None => Level::default(),
            Some(name) if name.is_empty() => Level::default(),
            Some(name) => {
                let name = name.to_string_lossy();
                Level::from_name(&name).ok_or_else(|| {
                    CmdlineError::new(
                        LEVEL,
                        &name,
                        "not valid; allowed: error, warn, info, debug, trace",
                    )
                })?
            }
        };
        Ok(Self {
            spec: VmSpec {
                name: None,
                uuid: None,
                machine: MachineSpec {
                    kind: MachineKind::default(),
                },
                cpus: CpuSpec::default(),
                memory: MemorySpec::default(),
                boot: BootSpec::default(),
                drives: Vec::new(),
                netdevs: Vec::new(),
                fsdevs: Vec::new(),
                chardevs: Vec::new(),
                serial: None,
                devices: Vec::<DeviceOption>::new(),
                hotplug: Vec::new(),
                iothreads: Vec::new(),
                vcpu_affinity: Vec::new(),
                monitors: Vec::new(),
                log: LogSpec { level, file: None },
                daemonize: false,
                pidfile: None,
                incoming: None,
                incoming_lazy: false,
                snapshot_dirs: Vec::new(),
                start_paused: false,
                no_reboot: false,
                no_shutdown: false,
                seccomp: SeccompMode::default(),
                sandbox: SandboxMode::default(),
                ignored: Vec::new(),
            },
            affinity_args: Vec::new(),
            drive_args: Vec::new(),
            netdev_args: Vec::new(),
            fsdev_args: Vec::new(),
            chardev_args: Vec::new(),
            devices: Vec::new(),
            memory: memory::Draft::default(),
            serial_arg: String::new(),
            mon_args: Vec::new(),
            log_option: false,
            seccomp_option: false,
        })
    }

    /// Takes one option in.
    fn take(&mut self, given: &Given<'_>) -> Result<(), CmdlineError> {
        match given.option.group {
            Group::Accepted => return self.accept(given),
            Group::Later => return Err(given.error("this option is not supported yet")),
            _ => {}
        }
        let spec = &mut self.spec;
        match given.option.name {
            "machine" => {
                let props = given.props()?;
                machine::machine(spec, &mut self.memory.whole, &props)?;
                self.memory.named = props
                    .text("memory-backend")
                    .map(|id| (given.value.clone(), id.to_owned()));
            }
            // Their tables allow one value only.
            "accel" | "cpu" => drop(given.props()?),
            "smp" => spec.cpus = machine::smp(&given.props()?)?,
            "vcpu-affinity" => self.vcpu_affinity(given)?,
            "m" => {
                self.memory.sized = true;
                self.memory.whole.size =
                    given.props()?.int("size").unwrap_or(limits::DEFAULT_MEMORY);
            }
            "mem-prealloc" => self.memory.whole.prealloc = true,
            "mem-path" => {
                let path = given.path()?;
                if !path.is_absolute() {
                    return Err(given.error("not an absolute path"));
                }
                self.memory.whole.path = Some(path);
            }
            "numa" => self.memory.numa(&given.props()?)?,
            "name" => spec.name = given.props()?.text("guest").map(str::to_owned),
            "uuid" => {
                let uuid = machine::uuid(&given.value);
                spec.uuid = Some(uuid.ok_or_else(|| {
                    given.error("not valid; allowed: hexadecimal digits as in 01234567-89ab-cdef-0123-456789abcdef")
                })?);
            }
            "kernel" => spec.boot.kernel = Some(given.path()?),
            "initrd" => spec.boot.initrd = Some(given.path()?),
            "append" => {
                fits(given, limits::MAX_CMDLINE - 1)?; // The last byte is the terminating NUL's.
                given.value.clone_into(&mut spec.boot.cmdline);
            }
            "drive" => self.drive(&given.props()?)?,
            "blockdev" => self.blockdev(&given.props()?)?,
            "netdev" => self.netdev(&given.props()?)?,
            "fsdev" => self.fsdev(&given.props()?)?,
            "device" => self.device(&given.props()?)?,
            "hotplug" => self.hotplug(&given.props()?)?,
            "object" => self.object(&given.props()?)?,
            "serial" => self.serial(given)?,
            "chardev" => self.chardev(&given.props()?)?,
            "qmp" => self.qmp(&given.props()?)?,
            "mon" => self.mon(&given.props()?)?,
            "incoming" => (spec.incoming, spec.incoming_lazy) = incoming(given)?,
            "snapshot-dir" => self.snapshot_dir(given)?,
            "S" => spec.start_paused = true,
            "no-reboot" => spec.no_reboot = true,
            "no-shutdown" => spec.no_shutdown = true,
            "D" => {
                self.log_option = true;
                if given.has_value {
                    spec.log.file = Some(given.path()?);
                }
            }
            "daemonize" => spec.daemonize = true,
            "pidfile" => spec.pidfile = Some(given.path()?),
            "sandbox" => {
                let props = given.props()?;
                spec.sandbox = match props.text("mode") {
                    Some("strict") => SandboxMode::Strict,
                    _ => SandboxMode::BestEffort,
                };
            }
            "seccomp" | "disable-seccomp" => self.seccomp(given)?,
            // A test feeds every option of the table through here.
            _ => return Err(given.error("this option is not supported yet")),
        }
        Ok(())
    }

    fn vcpu_affinity(&mut self, given: &Given<'_>) -> Result<(), CmdlineError> {
        let props = given.props()?;
        let vcpu = props.small("vcpu");
        let pinned = &mut self.spec.vcpu_affinity;
        if pinned.iter().any(|one| one.vcpu == vcpu) {
            return Err(props.error(match vcpu {
                Some(vcpu) => format!("vCPU {vcpu} has processors already"),
                None => "the other vCPUs have processors already".into(),
            }));
        }
        self.affinity_args.push(given.value.clone());
        pinned.extend(props.cpus("cpus").map(|cpus| VcpuAffinity { vcpu, cpus }));
        Ok(())
    }

    fn snapshot_dir(&mut self, given: &Given<'_>) -> Result<(), CmdlineError> {
        let path = given.path()?;
        if path.file_name().is_none() {
            return Err(given.error(
                "not a folder's name; allowed: a path that does not end in '..' or '/' alone",
            ));
        }
        if self.spec.snapshot_dirs.len() == limits::MAX_SNAPSHOT_GRANTS {
            return Err(given.error(format!(
                "one too many; allowed: 0 to {}",
                limits::MAX_SNAPSHOT_GRANTS
            )));
        }
        self.spec.snapshot_dirs.push(path);
        Ok(())
    }

    /// `-seccomp` and `-disable-seccomp`, of which there is one at most.
    fn seccomp(&mut self, given: &Given<'_>) -> Result<(), CmdlineError> {
        if given.option.name == "disable-seccomp" {
            if self.seccomp_option {
                return Err(given.error("contradicts -seccomp"));
            }
            self.spec.seccomp = SeccompMode::Disabled;
            return Ok(());
        }
        let props = given.props()?;
        if self.spec.seccomp == SeccompMode::Disabled {
            return Err(given.error("contradicts -disable-seccomp"));
        }
        self.seccomp_option = true;
        self.spec.seccomp = match props.text("action") {
            Some("log") => SeccompMode::Log,
            Some("trap") => SeccompMode::Trap,
            _ => SeccompMode::Kill,
        };
        Ok(())
    }

    /// An option that the manual lists as accepted without effect.
    fn accept(&mut self, given: &Given<'_>) -> Result<(), CmdlineError> {
        if given.option.name == "display" && given.value != "none" {
            return Err(given.error("not supported yet; allowed: none"));
        }
        if matches!(given.option.arg, Arg::Props { .. }) {
            // What its table does not list is an error here as well.
            given.props()?;
        }
        let mut note = given.option.dashed();
        if given.has_value {
            note.push(' ');
            note.push_str(&given.value);
        }
        self.spec.ignored.push(note);
        Ok(())
    }
}

/// Whether the value has at most `max` bytes.
fn fits(given: &Given<'_>, max: usize) -> Result<(), CmdlineError> {
    let len = given.value.len();
    if len > max {
        return Err(given.error(format!("is {len} bytes long; allowed: 0 to {max}")));
    }
    Ok(())
}

/// The folder of a snapshot, and whether its memory is to come later.
fn incoming(given: &Given<'_>) -> Result<(Option<PathBuf>, bool), CmdlineError> {
    let value = given.value.as_str();
    let (value, lazy) = match value.strip_suffix(",lazy=on") {
        Some(value) => (value, true),
        None => (value.strip_suffix(",lazy=off").unwrap_or(value), false),
    };
    let path = value.strip_prefix("file:").filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| {
        given.error(
            "not valid; allowed: file:PATH or file:PATH,lazy=on, where PATH is a folder that migrate made",
        )
    })?;
    Ok((Some(PathBuf::from(path)), lazy))
}

#[cfg(test)]
mod tests;
