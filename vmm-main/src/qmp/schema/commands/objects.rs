//! QEMU's object model, as far as this program has objects, and the options of the command line.

use crate::qmp::command::{Reply, VmCommand};
use crate::qmp::objects;
use crate::qmp::schema::types::{
    Command, Enum, Member, Object, Type, here, main, may, must, object,
};

const TYPE: Object = object(
    "ObjectTypeInfo",
    &[
        must("name", Type::TEXT, "its name"),
        may(
            "abstract",
            Type::Bool,
            "true if no object is of this very type",
        ),
        may("parent", Type::TEXT, "the type that it comes from"),
    ],
);

const PROPERTY: Object = object(
    "ObjectPropertyInfo",
    &[
        must("name", Type::TEXT, "its name"),
        must(
            "type",
            Type::TEXT,
            "its type; `child<…>` leads to another object",
        ),
        may(
            "description",
            Type::TEXT,
            "what it does and what is allowed",
        ),
    ],
);

const PROPERTIES: Type = Type::List(&Type::Object(&PROPERTY));

const PARAMETER: Object = object(
    "CommandLineParameterInfo",
    &[
        must("name", Type::TEXT, "its name"),
        must(
            "type",
            Type::Enum(&Enum {
                name: "CommandLineParameterType",
                values: &["string", "boolean", "number", "size"],
            }),
            "its type",
        ),
        may("help", Type::TEXT, "what it does"),
    ],
);

const OPTION: Object = object(
    "CommandLineOptionInfo",
    &[
        must("option", Type::TEXT, "its name without dash"),
        must(
            "parameters",
            Type::List(&Type::Object(&PARAMETER)),
            "its properties; none if it takes something else than a list of properties",
        ),
    ],
);

const TYPENAME: &[Member] = &[must("typename", Type::TEXT, "a type of `qom-list-types`")];
const PATH: Member = must(
    "path",
    Type::TEXT,
    "path of the object, or its last part if that is unambiguous",
);

pub(super) static COMMANDS: &[Command] = &[
    here(
        "qom-list-types",
        "Lists the types of objects: boards, processors, what `-device`, `-object` and `-chardev` take",
        |_, mut arguments| {
            Ok(objects::types(
                arguments.text("implements").as_deref(),
                arguments.flag("abstract") == Some(true),
            ))
        },
    )
    .takes(&[
        may("implements", Type::TEXT, "only those that come from this one"),
        may("abstract", Type::Bool, "also those that no object is of itself"),
    ])
    .returns(Type::List(&Type::Object(&TYPE))),
    here(
        "qom-list-properties",
        "Lists the properties that objects of a type take",
        |_, mut arguments| objects::properties(&arguments.required_text("typename"), false),
    )
    .takes(TYPENAME)
    .returns(PROPERTIES),
    here(
        "device-list-properties",
        "Lists the properties that `-device` takes for a type",
        |_, mut arguments| objects::properties(&arguments.required_text("typename"), true),
    )
    .takes(TYPENAME)
    .returns(PROPERTIES),
    main(
        "qom-list",
        "Lists the properties of an object, and the objects below it",
        |ticket, mut arguments| {
            let path = arguments.required_text("path");
            VmCommand::Facts(Reply::with(ticket, move |info, facts| {
                objects::list(info, &facts, &path)
            }))
        },
    )
    .takes(&[PATH])
    .returns(PROPERTIES),
    main(
        "qom-get",
        "Tells the value of an object's property",
        |ticket, mut arguments| {
            let path = arguments.required_text("path");
            let property = arguments.required_text("property");
            VmCommand::Facts(Reply::with(ticket, move |info, facts| {
                objects::get(info, &facts, &path, &property)
            }))
        },
    )
    .takes(&[PATH, must("property", Type::TEXT, "its name")])
    .returns(Type::Any),
    here(
        "query-command-line-options",
        "Lists the options of the command line with their properties",
        |_, mut arguments| objects::options(arguments.text("option").as_deref()),
    )
    .takes(&[may("option", Type::TEXT, "only this one, without dash")])
    .returns(Type::List(&Type::Object(&OPTION))),
];
