//! Snapshots.

use serde_json::{Value, json};

use crate::qmp::command::{Migration, MigrationStatus, Reply, VmCommand};
use crate::qmp::schema::types::{Command, Enum, Object, Type, main, may, must, object};

pub(in crate::qmp::schema) const STATUS: Type = Type::Enum(&Enum {
    name: "MigrationStatus",
    values: &MigrationStatus::NAMES,
});

const RAM: Object = object(
    "MigrationStats",
    &[
        must("total", Type::UINT, "bytes of guest memory"),
        must(
            "transferred",
            Type::UINT,
            "bytes that are done, zeroes included",
        ),
        must("remaining", Type::UINT, "the rest"),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    main(
        "migrate",
        "Makes a snapshot of the VM: a folder with the files `memory` and `state`, from which `-incoming` goes on. A running \
         guest is paused meanwhile. The answer comes when the snapshot is on the disk; another client can ask \
         `query-migrate` before. Whatever happens, the folder holds the old snapshot whole, or the new one",
        |ticket, mut arguments| {
            VmCommand::Migrate(
                arguments.required_text("uri"),
                Reply::new(ticket, |_, ()| json!({})),
            )
        },
    )
    .takes(&[
        must(
            "uri",
            Type::Text(4096),
            "`file:PATH`, where PATH is a folder that `-snapshot-dir` names, or a folder to be made in one",
        ),
        may("blk", Type::Bool, "no effect, as QEMU's clients pass it"),
        may("inc", Type::Bool, "no effect, likewise"),
        may("detach", Type::Bool, "no effect, likewise"),
    ]),
    main(
        "query-migrate",
        "Tells how far the last snapshot is",
        |ticket, _| VmCommand::QueryMigrate(Reply::new(ticket, |_, migration| info(&migration))),
    )
    .returns(Type::Object(&object(
        "MigrationInfo",
        &[
            must("status", STATUS, "`none` if there was none yet"),
            may("ram", Type::Object(&RAM), "guest memory, once it is being written"),
            may("error-desc", Type::TEXT, "why it failed"),
        ],
    ))),
    main(
        "migrate_cancel",
        "Gives up a snapshot whose guest memory is still being written; otherwise does nothing",
        |ticket, _| VmCommand::CancelMigration(Reply::new(ticket, |_, ()| json!({}))),
    ),
];

fn info(migration: &Migration) -> Value {
    let mut info = json!({ "status": migration.status.name() });
    if migration.total > 0 {
        info["ram"] = json!({
            "total": migration.total,
            "transferred": migration.done,
            "remaining": migration.total.saturating_sub(migration.done),
        });
    }
    if let Some(error) = &migration.error {
        info["error-desc"] = json!(error);
    }
    info
}
