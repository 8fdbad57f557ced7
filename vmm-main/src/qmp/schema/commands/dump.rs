//! The guest's memory as a file for debuggers.

use serde_json::{Value, json};

use crate::qmp::command::{DumpOrder, DumpProgress, DumpStatus, QmpError, Reply, VmCommand};
use crate::qmp::descriptors::Desk;
use crate::qmp::schema::Arguments;
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{Command, Enum, Object, Type, here, main, may, must, object};

const FORMAT: Type = Type::Enum(&Enum {
    name: "DumpGuestMemoryFormat",
    values: &["elf"],
});

/// How far a dump is.
pub(in crate::qmp::schema) const DUMP_RESULT: Object = object(
    "DumpQueryResult",
    &[
        must(
            "status",
            Type::Enum(&Enum {
                name: "DumpStatus",
                values: &DumpStatus::NAMES,
            }),
            "whether it is under way",
        ),
        must(
            "completed",
            Type::UINT,
            "bytes of guest memory that are done",
        ),
        must("total", Type::UINT, "bytes of guest memory"),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    main(
        "dump-guest-memory",
        "Writes registers and memory of the guest, by physical addresses, to an ELF core file that `crash` and `gdb` read. A running \
         guest is paused meanwhile. DUMP_COMPLETED tells when the file is written",
        |ticket, mut arguments| {
            let order = DumpOrder {
                fds: arguments.descriptors(),
                detach: arguments.flag("detach") == Some(true),
                uri: arguments
                    .text("protocol")
                    .filter(|protocol| protocol.starts_with("file:")),
            };
            VmCommand::Dump(order, Reply::new(ticket, |_, ()| json!({})))
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
            "`fd:NAME`, where NAME was given by `getfd` to an empty file; or `file:PATH`, a file that is not there yet in a folder that `-snapshot-dir` names",
        ),
        may(
            "detach",
            Type::Bool,
            "the answer comes when the file is begun; otherwise, and by default, when it is written",
        ),
        may("begin", Type::INT, "refused: all memory is written"),
        may("length", Type::INT, "refused: all memory is written"),
        may("format", FORMAT, "format of the file"),
    ])
    .brings(dump_descriptor),
    main(
        "query-dump",
        "Tells how far the last file of `dump-guest-memory` is",
        |ticket, _| {
            VmCommand::QueryDump(Reply::new(ticket, |_, progress: DumpProgress| {
                progress.value()
            }))
        },
    )
    .returns(Type::Object(&DUMP_RESULT)),
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
    if arguments.flag("paging") == Some(true) {
        return refuse("Parameter 'paging' is true; allowed: false".into());
    }
    for name in ["begin", "length"] {
        if arguments.int(name).is_some() {
            return refuse(format!(
                "Parameter '{name}' is not supported: all of the guest's memory is written"
            ));
        }
    }
    let protocol = arguments.at(&["protocol"]);
    let protocol = protocol
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if protocol.starts_with("file:") {
        return Ok(());
    }
    let Some(name) = protocol.strip_prefix("fd:") else {
        return refuse(format!(
            "Parameter 'protocol' is '{}'; allowed: file:PATH, or fd:NAME with a file that 'getfd' passed under that name",
            shown(&protocol)
        ));
    };
    let fds = desk.take("protocol", &[name])?;
    arguments.bring(fds);
    Ok(())
}
