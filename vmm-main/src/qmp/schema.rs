//! Every command with its arguments: the one table that argument checks and `query-commands` come from.

use serde_json::{Map, Value, json};

use ipc::limits;
use ipc::spec::vm::MachineKind;

use super::command::{CpuThread, QmpError, Reply, Ticket, VmCommand};
use super::event;
use super::session::Info;

/// Type of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// Text.
    String,
    /// A list of text.
    StringList,
}

impl Type {
    const fn name(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::StringList => "array of strings",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::String => value.is_string(),
            Self::StringList => value
                .as_array()
                .is_some_and(|list| list.iter().all(Value::is_string)),
        }
    }
}

/// One argument.
#[derive(Debug, Clone, Copy)]
pub struct Argument {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Type,
    /// Whether it has to be there.
    pub required: bool,
}

/// Who answers.
#[derive(Clone, Copy)]
pub(super) enum Run {
    /// The negotiation.
    Capabilities,
    /// This thread.
    Here(fn(&Info) -> Value),
    /// The main thread.
    Main(fn(Ticket) -> VmCommand),
}

/// One command.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: &'static [Argument],
    /// What it does, one sentence without full stop.
    pub help: &'static str,
    pub(super) run: Run,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

const fn here(name: &'static str, run: fn(&Info) -> Value, help: &'static str) -> Command {
    Command {
        name,
        arguments: &[],
        help,
        run: Run::Here(run),
    }
}

const fn main(name: &'static str, run: fn(Ticket) -> VmCommand, help: &'static str) -> Command {
    Command {
        name,
        arguments: &[],
        help,
        run: Run::Main(run),
    }
}

/// All commands.
pub static COMMANDS: &[Command] = &[
    Command {
        name: "qmp_capabilities",
        arguments: &[Argument {
            name: "enable",
            kind: Type::StringList,
            required: false,
        }],
        help: "Ends the negotiation; the first command of each client",
        run: Run::Capabilities,
    },
    here(
        "query-version",
        |_| version(),
        "Version of QMP and of this program",
    ),
    here(
        "query-commands",
        |_| names(COMMANDS.iter().map(|command| command.name)),
        "Names of all commands",
    ),
    here(
        "query-events",
        |_| names(event::NAMES.into_iter()),
        "Names of all events",
    ),
    here("query-name", name, "Name of the VM"),
    here("query-uuid", uuid, "UUID of the VM"),
    here(
        "query-kvm",
        |_| json!({ "enabled": true, "present": true }),
        "Whether KVM is used",
    ),
    here(
        "query-accelerators",
        |_| json!({ "enabled": "kvm", "present": ["kvm"] }),
        "Accelerators",
    ),
    here(
        "query-target",
        |_| json!({ "arch": std::env::consts::ARCH }),
        "Architecture of the guest",
    ),
    here("query-machines", machines, "Boards"),
    main(
        "query-status",
        |ticket| {
            VmCommand::Status(Reply::new(ticket, |_, state| {
                let running = state == super::RunState::Running;
                json!({ "status": state.name(), "running": running, "singlestep": false })
            }))
        },
        "State of the VM",
    ),
    main(
        "query-cpus",
        |ticket| {
            VmCommand::Cpus(Reply::new(ticket, |info, cpus| {
                cpus.iter().map(|cpu| cpu_slow(info, cpu)).collect()
            }))
        },
        "vCPUs with their threads, in the form that QEMU has given up; it stops no vCPU",
    ),
    main(
        "query-cpus-fast",
        |ticket| {
            VmCommand::Cpus(Reply::new(ticket, |info, cpus| {
                cpus.iter().map(|cpu| cpu_fast(info, cpu)).collect()
            }))
        },
        "vCPUs with their threads",
    ),
    main(
        "query-iothreads",
        |ticket| {
            VmCommand::Iothreads(Reply::new(ticket, |_, threads| {
                let one = |thread: super::IothreadInfo| json!({ "id": thread.id, "thread-id": thread.thread_id });
                threads.into_iter().map(one).collect()
            }))
        },
        "iothreads",
    ),
    main(
        "query-chardev",
        |ticket| {
            VmCommand::Chardevs(Reply::new(ticket, |_, chardevs| {
                let one = |chardev: super::ChardevInfo| {
                    json!({
                        "label": chardev.label,
                        "filename": chardev.filename,
                        "frontend-open": chardev.frontend_open,
                    })
                };
                chardevs.into_iter().map(one).collect()
            }))
        },
        "Character devices; a pty's filename names its terminal",
    ),
    main(
        "query-sandbox",
        |ticket| {
            VmCommand::Sandbox(Reply::new(ticket, |_, report| {
                super::sandbox::shape(&report)
            }))
        },
        "What confines each process of the VM, as the broker reads it from the kernel; `pids` names them all, this one first",
    ),
    main(
        "stop",
        |ticket| VmCommand::Stop(nothing(ticket)),
        "Pause the vCPUs",
    ),
    main(
        "cont",
        |ticket| VmCommand::Cont(nothing(ticket)),
        "Let the vCPUs run",
    ),
    main(
        "system_reset",
        |ticket| VmCommand::SystemReset(nothing(ticket)),
        "Reset the VM",
    ),
    main(
        "system_powerdown",
        |ticket| VmCommand::SystemPowerdown(nothing(ticket)),
        "Press the power button; the guest decides what follows",
    ),
    main(
        "quit",
        |ticket| VmCommand::Quit(nothing(ticket)),
        "End the VM at once",
    ),
];

fn nothing(ticket: Ticket) -> Reply<()> {
    Reply::new(ticket, |_, ()| json!({}))
}

/// The command of this name.
pub(super) fn find(name: &str) -> Result<&'static Command, QmpError> {
    COMMANDS
        .iter()
        .find(|command| command.name == name)
        .ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            let near = crate::cmdline::nearest(name, COMMANDS.iter().map(|command| command.name))
                .map_or(String::new(), |near| format!(", nearest is {near}"));
            QmpError::command_not_found(format!("The command {shown} has not been found{near}"))
        })
}

/// Checks arguments against the table.
pub(super) fn check(command: &Command, given: &Map<String, Value>) -> Result<(), QmpError> {
    for (name, value) in given {
        let Some(argument) = command
            .arguments
            .iter()
            .find(|argument| argument.name == name)
        else {
            let shown: String = name.chars().take(64).collect();
            let allowed = command.arguments.iter().map(|argument| argument.name);
            let allowed: Vec<&str> = allowed.collect();
            let allowed = if allowed.is_empty() {
                "none".to_owned()
            } else {
                allowed.join(", ")
            };
            return Err(QmpError::generic(format!(
                "Parameter '{shown}' of {} is unexpected; allowed: {allowed}",
                command.name
            )));
        };
        if !argument.kind.fits(value) {
            return Err(QmpError::generic(format!(
                "Invalid parameter type for '{name}', expected: {}",
                argument.kind.name()
            )));
        }
    }
    match command
        .arguments
        .iter()
        .find(|one| one.required && !given.contains_key(one.name))
    {
        Some(missing) => Err(QmpError::generic(format!(
            "Parameter '{}' is missing",
            missing.name
        ))),
        None => Ok(()),
    }
}

/// Version as in the greeting.
pub(super) fn version() -> Value {
    let (major, minor, micro) = crate::cmdline::QMP_VERSION;
    json!({
        "qemu": { "major": major, "minor": minor, "micro": micro },
        "package": concat!("stratovirt ", env!("CARGO_PKG_VERSION")),
    })
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Value {
    names.map(|name| json!({ "name": name })).collect()
}

fn name(info: &Info) -> Value {
    info.name
        .as_ref()
        .map_or(json!({}), |name| json!({ "name": name }))
}

fn uuid(info: &Info) -> Value {
    let mut text = String::new();
    for (at, byte) in info.uuid.unwrap_or_default().iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    json!({ "UUID": text })
}

fn machines(_: &Info) -> Value {
    let machine = |name: &str, cpu_max: u32, kind: MachineKind| {
        json!({
            "name": name,
            "cpu-max": cpu_max,
            "hotpluggable-cpus": false,
            "numa-mem-supported": false,
            "deprecated": false,
            "is-default": kind == MachineKind::default(),
            "acpi": kind == MachineKind::Microvm,
        })
    };
    json!([
        machine("microvm", limits::MAX_VCPUS, MachineKind::Microvm),
        machine("none", 1, MachineKind::None),
    ])
}

fn qom_path(cpu: &CpuThread) -> String {
    format!("/machine/unattached/device[{}]", cpu.index)
}

/// Where a vCPU is in the topology of `-smp`.
fn props(info: &Info, cpu: &CpuThread) -> Value {
    let spec = &info.cpus;
    let of = |count: u8| u32::from(count.max(1));
    let index = u32::from(cpu.index);
    let (threads, cores, dies) = (
        of(spec.threads),
        of(spec.cores) * of(spec.clusters),
        of(spec.dies),
    );
    json!({
        "thread-id": index % threads,
        "core-id": index / threads % cores,
        "die-id": index / (threads * cores) % dies,
        "socket-id": index / (threads * cores * dies),
    })
}

fn cpu_fast(info: &Info, cpu: &CpuThread) -> Value {
    json!({
        "cpu-index": cpu.index,
        "qom-path": qom_path(cpu),
        "thread-id": cpu.thread_id,
        "props": props(info, cpu),
        "target": std::env::consts::ARCH,
    })
}

fn cpu_slow(info: &Info, cpu: &CpuThread) -> Value {
    let arch = if cfg!(target_arch = "x86_64") {
        "x86"
    } else {
        "arm"
    };
    json!({
        "CPU": cpu.index,
        "current": cpu.index == 0,
        "halted": false,
        "qom_path": qom_path(cpu),
        "thread_id": cpu.thread_id,
        "props": props(info, cpu),
        "arch": arch,
    })
}
