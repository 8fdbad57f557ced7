//! What a client asks about the protocol itself.

use serde_json::{Value, json};

use crate::qmp::schema::types::{Command, Object, Type, here, may, must, negotiation, object};
use crate::qmp::schema::{EVENTS, commands, introspect, version};

const NAME: Object = object("NameOf", &[must("name", Type::TEXT, "the name")]);
const NAMES: Type = Type::List(&Type::Object(&NAME));

const VERSION: Object = object(
    "VersionInfo",
    &[
        must(
            "qemu",
            Type::Object(&object(
                "VersionTriple",
                &[
                    must("major", Type::UINT, "first number"),
                    must("minor", Type::UINT, "second number"),
                    must("micro", Type::UINT, "third number"),
                ],
            )),
            "the version of QEMU whose QMP this is",
        ),
        must("package", Type::TEXT, "this program and its version"),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    negotiation(
        "qmp_capabilities",
        "Ends the negotiation; the first command of each client",
    )
    .takes(&[may(
        "enable",
        Type::TEXTS,
        "capabilities to switch on; none is offered",
    )]),
    here(
        "query-version",
        "Tells the version of QMP and of this program",
        |_, _| Ok(version()),
    )
    .returns(Type::Object(&VERSION)),
    here("query-commands", "Names all commands", |_, _| {
        Ok(names(commands().map(|command| command.name)))
    })
    .returns(NAMES),
    here("query-events", "Names all events", |_, _| {
        Ok(names(EVENTS.iter().map(|event| event.name)))
    })
    .returns(NAMES)
    .deprecated("query-qmp-schema tells more"),
    here(
        "query-qmp-schema",
        "Describes all commands, events and their types, in the form of QEMU's introspection (`SchemaInfo`)",
        |_, _| Ok(introspect::schema()),
    )
    .returns(Type::List(&Type::Any)),
];

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Value {
    names.map(|name| json!({ "name": name })).collect()
}
