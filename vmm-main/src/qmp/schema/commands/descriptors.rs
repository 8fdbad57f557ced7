//! Descriptors that a client passes.

use crate::qmp::schema::types::{Command, Object, Type, desk, may, must, object};
use ipc::limits;

const NAME: Type = Type::ID;
const NUMBER: Type = Type::Int(0, i32::MAX as u64);
const SET: Type = Type::Int(0, i64::MAX as u64);
const OPAQUE: Type = Type::Text(limits::MAX_ID);

const ADDED: Object = object(
    "AddfdInfo",
    &[
        must("fdset-id", SET, "the set's number"),
        must(
            "fd",
            NUMBER,
            "the descriptor's number in the control process",
        ),
    ],
);

const INFO: Object = object(
    "FdsetFdInfo",
    &[
        must(
            "fd",
            NUMBER,
            "the descriptor's number in the control process",
        ),
        may("opaque", OPAQUE, "what the client said when it passed it"),
    ],
);

const SETS: Object = object(
    "FdsetInfo",
    &[
        must("fdset-id", SET, "the set's number"),
        must("fds", Type::List(&Type::Object(&INFO)), "its descriptors"),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    desk(
        "getfd",
        "Gives a name to the descriptor that came with the command (SCM_RIGHTS). The name is this client's and goes with it; one that was there already stands for the new one",
        |desk, mut arguments| desk.get(arguments.required_text("fdname")),
    )
    .takes(&[must("fdname", NAME, "its name, which does not start with a digit")]),
    desk("closefd", "Closes a descriptor that has a name", |desk, mut arguments| {
        desk.close(&arguments.required_text("fdname"))
    })
    .takes(&[must("fdname", NAME, "its name")]),
    desk(
        "add-fd",
        "Puts the descriptor that came with the command (SCM_RIGHTS) into a set, which all clients can name as `/dev/fdset/N`",
        |desk, mut arguments| desk.add(arguments.uint("fdset-id"), arguments.text("opaque")),
    )
    .takes(&[
        may("fdset-id", SET, "the set; default a new one, with the lowest number that is free"),
        may("opaque", OPAQUE, "anything that tells the client what it is"),
    ])
    .returns(Type::Object(&ADDED)),
    desk(
        "remove-fd",
        "Takes a descriptor out of a set and closes it; what was added with it stays as it is",
        |desk, arguments| {
            desk.remove(
                arguments.uint("fdset-id").unwrap_or_default(),
                arguments.int("fd"),
            )
        },
    )
    .takes(&[
        must("fdset-id", SET, "the set"),
        may("fd", NUMBER, "the descriptor; default all of the set"),
    ]),
    desk("query-fdsets", "Lists the sets", |desk, _| Ok(desk.tell()))
        .returns(Type::List(&Type::Object(&SETS))),
];
