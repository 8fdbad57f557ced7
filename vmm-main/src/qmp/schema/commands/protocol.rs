//! What a client asks about the protocol itself.

use log::LevelFilter;
use serde_json::{Value, json};

use crate::qmp::command::QmpError;
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{
    Command, Enum, Member, Object, Type, here, may, must, negotiation, object,
};
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
    here(
        "human-monitor-command",
        "Refuses, because there is no monitor for people, and names the command that tells or does the same",
        |_, mut arguments| Err(no_monitor(&arguments.required_text("command-line"))),
    )
    .takes(&[
        must("command-line", Type::TEXT, "what a person would type"),
        may("cpu-index", Type::INT, "the vCPU that it is about"),
    ])
    .returns(Type::TEXT),
    here(
        "trace-event-get-state",
        "Tells which trace events are on: the control process's log levels, by the names below",
        |_, mut arguments| trace_states(&arguments.required_text("name")),
    )
    .takes(&[TRACE_NAME, may("vcpu", Type::INT, "accepted; no event is one vCPU's")])
    .returns(TRACE_STATES),
    here(
        "trace-get-state",
        "Does the same as `trace-event-get-state`",
        |_, mut arguments| trace_states(&arguments.required_text("pattern")),
    )
    .takes(&[TRACE_PATTERN])
    .returns(TRACE_STATES),
    here(
        "trace-event-set-state",
        "Switches trace events of the control process on or off. A level includes those above it in the list: \
         switching one off switches off what comes after it, too",
        |_, mut arguments| {
            let enable = arguments.flag("enable") == Some(true);
            let unknown = arguments.flag("ignore-unavailable") == Some(true);
            trace_set(&arguments.required_text("name"), enable, unknown)
        },
    )
    .takes(&[
        TRACE_NAME,
        TRACE_ENABLE,
        may("ignore-unavailable", Type::Bool, "a name that no event has is no error"),
        may("vcpu", Type::INT, "accepted; no event is one vCPU's"),
    ]),
    here(
        "trace-set-state",
        "Does the same as `trace-event-set-state`",
        |_, mut arguments| {
            let enable = arguments.flag("enable") == Some(true);
            trace_set(&arguments.required_text("pattern"), enable, false)
        },
    )
    .takes(&[TRACE_PATTERN, TRACE_ENABLE]),
];

const TRACE_NAME: Member = must(
    "name",
    Type::Text(64),
    "`log_warn`, `log_info`, `log_debug` or `log_trace`; a `*` at its end stands for any rest",
);
const TRACE_PATTERN: Member = must("pattern", Type::Text(64), "as `name` above");
const TRACE_ENABLE: Member = must("enable", Type::Bool, "on or off");
const TRACE_STATES: Type = Type::List(&Type::Object(&object(
    "TraceEventInfo",
    &[
        must("name", Type::TEXT, "its name"),
        must(
            "state",
            Type::Enum(&Enum {
                name: "TraceEventState",
                values: &["disabled", "enabled"],
            }),
            "whether it is logged",
        ),
        must("vcpu", Type::Bool, "always false"),
    ],
)));

/// Errors are always logged.
const TRACE_EVENTS: [(&str, LevelFilter, LevelFilter); 4] = [
    ("log_warn", LevelFilter::Warn, LevelFilter::Error),
    ("log_info", LevelFilter::Info, LevelFilter::Warn),
    ("log_debug", LevelFilter::Debug, LevelFilter::Info),
    ("log_trace", LevelFilter::Trace, LevelFilter::Debug),
];

/// Those that `pattern` names: level and the one below.
fn trace_events(
    pattern: &str,
) -> Result<impl DoubleEndedIterator<Item = (&'static str, LevelFilter, LevelFilter)>, QmpError> {
    let pattern = pattern.to_owned();
    let fits = {
        let pattern = pattern.clone();
        move |name: &str| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        }
    };
    if TRACE_EVENTS.iter().any(|(name, ..)| fits(name)) {
        Ok(TRACE_EVENTS
            .into_iter()
            .filter(move |(name, ..)| fits(name)))
    } else {
        let names: Vec<&str> = TRACE_EVENTS.iter().map(|(name, ..)| *name).collect();
        Err(QmpError::generic(format!(
            "Trace event '{}' does not exist; allowed: {}",
            shown(&pattern),
            names.join(", ")
        )))
    }
}

fn trace_states(pattern: &str) -> Result<Value, QmpError> {
    let state = |level| {
        if log::max_level() >= level {
            "enabled"
        } else {
            "disabled"
        }
    };
    Ok(trace_events(pattern)?
        .map(|(name, level, _)| json!({ "name": name, "state": state(level), "vcpu": false }))
        .collect())
}

fn trace_set(pattern: &str, enable: bool, ignore_unknown: bool) -> Result<Value, QmpError> {
    let mut events = match trace_events(pattern) {
        Err(_) if ignore_unknown => return Ok(json!({})),
        events => events?,
    };
    // The last one includes the others when they go on; the first one does when they go off.
    let one = if enable {
        events.next_back()
    } else {
        events.next()
    };
    if let Some((_, level, below)) = one {
        let now = log::max_level();
        log::set_max_level(if enable {
            now.max(level)
        } else {
            now.min(below)
        });
    }
    Ok(json!({}))
}

/// What a person would type, and the command instead.
const INSTEAD: &[(&str, &str)] = &[
    ("c", "cont"),
    ("cont", "cont"),
    ("stop", "stop"),
    ("s", "stop"),
    ("q", "quit"),
    ("quit", "quit"),
    ("system_reset", "system_reset"),
    ("system_powerdown", "system_powerdown"),
    ("info status", "query-status"),
    ("info name", "query-name"),
    ("info uuid", "query-uuid"),
    ("info version", "query-version"),
    ("info kvm", "query-accelerators"),
    ("info cpus", "query-cpus-fast"),
    ("info hotpluggable-cpus", "query-hotpluggable-cpus"),
    ("info block", "query-block"),
    ("info chardev", "query-chardev"),
    ("info iothreads", "query-iothreads"),
    ("info balloon", "query-balloon"),
    ("info qom-tree", "qom-list"),
    ("info memory-devices", "query-memory-devices"),
    ("info memory_size_summary", "query-memory-size-summary"),
    ("qom-list", "qom-list"),
    ("qom-get", "qom-get"),
    ("balloon", "balloon"),
    ("x", "query-mem-gpa"),
    ("xp", "query-mem-gpa"),
    ("trace-event", "trace-event-set-state"),
    ("info trace-events", "trace-event-get-state"),
];

fn no_monitor(line: &str) -> QmpError {
    let line = line.trim();
    let named = |typed: &str| {
        line.strip_prefix(typed)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '/']))
    };
    let instead = INSTEAD.iter().find(|(typed, _)| named(typed)).map_or_else(
        || "query-commands lists the commands of QMP".to_owned(),
        |(_, command)| format!("use the command {command} of QMP"),
    );
    QmpError::generic(format!(
        "There is no monitor for people, so '{}' is not executed; {instead}",
        shown(line)
    ))
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Value {
    names.map(|name| json!({ "name": name })).collect()
}
