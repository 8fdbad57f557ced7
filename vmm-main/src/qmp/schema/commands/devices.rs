//! Devices and what is behind them.

use serde_json::json;

use crate::qmp::command::{ChardevInfo, IothreadInfo, Reply, VmCommand};
use crate::qmp::schema::types::{Command, Object, Type, main, must, object};

const IOTHREAD: Object = object(
    "IOThreadInfo",
    &[
        must("id", Type::ID, "its id"),
        must(
            "thread-id",
            Type::INT,
            "id on the host of the process that does its work",
        ),
    ],
);

const CHARDEV: Object = object(
    "ChardevInfo",
    &[
        must("label", Type::ID, "its id"),
        must(
            "filename",
            Type::TEXT,
            "where it leads; a pty's names its terminal",
        ),
        must(
            "frontend-open",
            Type::Bool,
            "whether the guest's device uses it",
        ),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    main(
        "query-chardev",
        "Lists the character devices",
        |ticket, _| {
            VmCommand::Chardevs(Reply::new(ticket, |_, chardevs| {
                let one = |chardev: ChardevInfo| {
                    json!({
                        "label": chardev.label,
                        "filename": chardev.filename,
                        "frontend-open": chardev.frontend_open,
                    })
                };
                chardevs.into_iter().map(one).collect()
            }))
        },
    )
    .returns(Type::List(&Type::Object(&CHARDEV))),
    main("query-iothreads", "Lists the iothreads", |ticket, _| {
        VmCommand::Iothreads(Reply::new(ticket, |_, threads| {
            let one =
                |thread: IothreadInfo| json!({ "id": thread.id, "thread-id": thread.thread_id });
            threads.into_iter().map(one).collect()
        }))
    })
    .returns(Type::List(&Type::Object(&IOTHREAD))),
];
