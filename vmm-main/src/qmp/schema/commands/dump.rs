//! The guest's memory as a file for debuggers.

use serde_json::json;

use crate::qmp::command::{QmpError, Reply, VmCommand};
use crate::qmp::descriptors::Desk;
use crate::qmp::schema::Arguments;
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{Command, Enum, Type, here, main, may, must, object};

const FORMAT: Type = Type::Enum(&Enum {
    name: "DumpGuestMemoryFormat",
    values: &["elf"],
});

pub(super) static COMMANDS: &[Command] = &[
    main(
        "dump-guest-memory",
        "Writes registers and memory of the guest, by physical addresses, to an ELF core file that `crash` and `gdb` read. A running \
         guest is paused meanwhile. The answer comes when the file is written",
        |ticket, mut arguments| {
            let fds = arguments.descriptors();
            VmCommand::Dump(fds, Reply::new(ticket, |_, ()| json!({})))
        },
    )
    .takes(&[
        must(
            "paging",
            Type::Bool,
            "must be false: the guest's page tables are not followed",
        ),
        must(
            "protocol",
            Type::TEXT,
            "`fd:NAME`, where NAME was given by `getfd` to an empty file; no path is opened",
        ),
        may("detach", Type::Bool, "must be false"),
        may("begin", Type::INT, "refused: all memory is written"),
        may("length", Type::INT, "refused: all memory is written"),
        may("format", FORMAT, "format of the file"),
    ])
    .brings(dump_descriptor),
    here(
        "query-dump-guest-memory-capability",
        "Tells the formats of `dump-guest-memory`",
        |_, _| Ok(json!({ "formats": ["elf"] })),
    )
    .returns(Type::Object(&object(
        "DumpGuestMemoryCapability",
        &[must("formats", Type::List(&FORMAT), "the formats")],
    ))),
];

/// The file that `protocol` names.
fn dump_descriptor(desk: &mut Desk<'_>, arguments: &mut Arguments) -> Result<(), QmpError> {
    let refuse = |what: String| Err(QmpError::generic(what));
    for name in ["paging", "detach"] {
        if arguments.flag(name) == Some(true) {
            return refuse(format!("Parameter '{name}' is true; allowed: false"));
        }
    }
    for name in ["begin", "length"] {
        if arguments.int(name).is_some() {
            return refuse(format!(
                "Parameter '{name}' is not supported: all of the guest's memory is written"
            ));
        }
    }
    let protocol = arguments.required_text("protocol");
    let Some(name) = protocol.strip_prefix("fd:") else {
        return refuse(format!(
            "Parameter 'protocol' is '{}'; allowed: fd:NAME, with a file that 'getfd' passed under that name, since no path is opened",
            shown(&protocol)
        ));
    };
    let fds = desk.take("protocol", &[name])?;
    arguments.bring(fds);
    Ok(())
}
