//! What confines the VM's processes.

use crate::qmp::command::{Reply, VmCommand};
use crate::qmp::schema::types::{Command, Enum, Object, Type, main, must, object};

const LANDLOCK: Object = object(
    "SandboxLandlock",
    &[
        must(
            "abi",
            Type::UINT,
            "Landlock's version in the running kernel, 0 for none",
        ),
        must(
            "readable",
            Type::Bool,
            "always false: no kernel shows which process is restricted by it",
        ),
    ],
);

const REPORT: Object = object(
    "SandboxInfo",
    &[
        must(
            "pids",
            Type::List(&Type::INT),
            "every process of the VM, the control process first",
        ),
        must(
            "seccomp",
            Type::Enum(&Enum {
                name: "SandboxSeccomp",
                values: &["kill", "log", "trap", "disabled"],
            }),
            "`-seccomp`",
        ),
        must(
            "sandbox",
            Type::Enum(&Enum {
                name: "SandboxMode",
                values: &["best-effort", "strict"],
            }),
            "`-sandbox`",
        ),
        must("landlock", Type::Object(&LANDLOCK), "Landlock"),
        must(
            "processes",
            Type::List(&Type::Any),
            "one object a process, in the order of `pids`",
        ),
    ],
);

pub(super) static COMMANDS: &[Command] = &[main(
    "query-sandbox",
    "Tells what confines each process of the VM, as the broker reads it from the kernel; see \
     [query-sandbox](query-sandbox.md)",
    |ticket, _| {
        VmCommand::Sandbox(Reply::new(ticket, |_, report| {
            crate::qmp::sandbox::shape(&report)
        }))
    },
)
.returns(Type::Object(&REPORT))];
