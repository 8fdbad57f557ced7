//! The VM as a whole: what it is called, what state it is in, start, stop, end.

use serde_json::{Value, json};

use crate::qmp::RunState;
use crate::qmp::command::{QmpError, Reply, Ticket, VmCommand};
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{Command, Enum, Object, Type, here, main, may, must, object};
use crate::qmp::session::Info;

const RUN_STATE: Type = Type::Enum(&Enum {
    name: "RunState",
    values: &RunState::NAMES,
});

const CAPABILITY: Object = object(
    "MigrationCapabilityStatus",
    &[
        must("capability", Type::TEXT, "its name"),
        must("state", Type::Bool, "whether it is on"),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    here("query-name", "Tells the name of the VM", |info, _| {
        Ok(name(info))
    })
    .returns(Type::Object(&object(
        "NameInfo",
        &[may("name", Type::TEXT, "the name, if `-name` gave one")],
    ))),
    here("query-uuid", "Tells the UUID of the VM", |info, _| {
        Ok(uuid(info))
    })
    .returns(Type::Object(&object(
        "UuidInfo",
        &[must(
            "UUID",
            Type::TEXT,
            "the UUID; all zeroes if `-uuid` gave none",
        )],
    ))),
    main("query-status", "Tells the state of the VM", |ticket, _| {
        VmCommand::Status(Reply::new(ticket, |_, state| {
            let running = state == RunState::Running;
            json!({ "status": state.name(), "running": running, "singlestep": false })
        }))
    })
    .returns(Type::Object(&object(
        "StatusInfo",
        &[
            must("running", Type::Bool, "whether vCPUs run"),
            must("singlestep", Type::Bool, "always false"),
            must("status", RUN_STATE, "the state"),
        ],
    ))),
    main("stop", "Pauses the vCPUs", |ticket, _| {
        VmCommand::Stop(nothing(ticket))
    }),
    main("cont", "Lets the vCPUs run", |ticket, _| {
        VmCommand::Cont(nothing(ticket))
    }),
    main("system_reset", "Resets the VM", |ticket, _| {
        VmCommand::SystemReset(nothing(ticket))
    }),
    main(
        "system_powerdown",
        "Presses the power button; the guest decides what follows",
        |ticket, _| VmCommand::SystemPowerdown(nothing(ticket)),
    ),
    here(
        "query-migrate-capabilities",
        "Lists what a migration can do differently: nothing but to tell of its steps, which it always does",
        |_, _| Ok(json!([{ "capability": "events", "state": true }])),
    )
    .returns(Type::List(&Type::Object(&CAPABILITY))),
    here(
        "migrate-set-capabilities",
        "Sets what a migration does differently; `events` is always on, and everything else off",
        |_, mut arguments| match arguments.value("capabilities") {
            Some(Value::Array(list)) => list.iter().try_for_each(capability).map(|()| json!({})),
            _ => Ok(json!({})),
        },
    )
    .takes(&[must(
        "capabilities",
        Type::List(&Type::Object(&CAPABILITY)),
        "what to set",
    )]),
    here(
        "query-migrate-parameters",
        "Tells the numbers that a migration goes by, of which there are none: a snapshot is written as fast as the disk takes it",
        |_, _| Ok(json!({})),
    )
    .returns(Type::NOTHING),
    here(
        "migrate-set-parameters",
        "Refuses every parameter, because there is none",
        |_, arguments| match arguments.rest().keys().next() {
            None => Ok(json!({})),
            Some(name) => Err(QmpError::generic(format!(
                "Migration parameter '{}' is not available; allowed: none",
                shown(name)
            ))),
        },
    )
    .takes_more(),
    main("quit", "Ends the VM at once", |ticket, _| {
        VmCommand::Quit(nothing(ticket))
    }),
];

/// A reply without content.
fn nothing(ticket: Ticket) -> Reply<()> {
    Reply::new(ticket, |_, ()| json!({}))
}

/// Whether this is how it is anyway.
fn capability(wanted: &Value) -> Result<(), QmpError> {
    let name = wanted["capability"].as_str().unwrap_or_default();
    match (name, wanted["state"] == true) {
        ("events", false) => Err(QmpError::generic(
            "Migration capability 'events' is always on; allowed: true",
        )),
        ("events", true) | (_, false) => Ok(()),
        (_, true) => Err(QmpError::generic(format!(
            "Migration capability '{}' is not available; allowed: events",
            shown(name)
        ))),
    }
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
