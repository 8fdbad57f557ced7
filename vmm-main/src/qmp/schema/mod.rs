//! What QMP is here: every command, argument, result and event, in tables.
//!
//! **Job.** One description from which the check of arguments ([`check`]), `query-qmp-schema` ([`introspect`]),
//! `query-commands`, `query-events` and `docs/qmp.md` ([`page()`]) come.
//!
//! **Who is not trusted.** Clients: only what a table allows reaches the code behind it.
//!
//! **Why this way.** To add a command, add its entry to a list in [`mod@commands`], its [`VmCommand`](super::VmCommand) if main
//! executes it, and run `UPDATE_DOCS=1 cargo test -p vmm-main --lib qmp::schema`. To add an event, add its entry to
//! [`EVENTS`] and its variant to [`Event`](super::Event). Builds with debug assertions compare everything that is sent with
//! the tables, so every test that asks for something also checks the description of its answer.

mod arguments;
pub(super) mod check;
mod commands;
mod events;
pub(super) mod introspect;
mod page;
mod types;

pub use arguments::Arguments;
pub(super) use commands::topology;
pub use commands::{GROUPS, Group};
pub use events::EVENTS;
pub use page::page;
pub(super) use types::Run;
pub use types::{Command, Enum, EventDef, Member, Object, OneOf, Type, Variants};

use serde_json::{Map, Value, json};

use super::command::QmpError;
use check::shown;

/// All commands.
pub fn commands() -> impl Iterator<Item = &'static Command> + Clone {
    GROUPS.iter().flat_map(|group| group.commands)
}

/// The command of this name.
pub(super) fn find(name: &str) -> Result<&'static Command, QmpError> {
    commands()
        .find(|command| command.name == name)
        .ok_or_else(|| {
            let near = crate::cmdline::nearest(name, commands().map(|command| command.name))
                .map_or(String::new(), |near| format!(", nearest is {near}"));
            QmpError::command_not_found(format!(
                "The command {} has not been found{near}",
                shown(name)
            ))
        })
}

/// Checks arguments against the table.
pub(super) fn arguments(
    command: &Command,
    given: Map<String, Value>,
) -> Result<Arguments, QmpError> {
    check::arguments(command, &given)?;
    Ok(Arguments::new(given))
}

/// In builds with debug assertions: what is sent is what the tables say.
pub(super) fn assert_conforms(what: &str, kind: Type, value: &Value) {
    if cfg!(debug_assertions)
        && let Err(why) = check::value(kind, value, what)
    {
        debug_assert!(false, "not as in the schema: {why}: {value}");
    }
}

/// The same for an event's data.
pub(super) fn assert_event(name: &str, data: Option<&Value>) {
    if cfg!(debug_assertions) {
        let def = EVENTS.iter().find(|event| event.name == name);
        debug_assert!(def.is_some(), "event {name} is not in the schema");
        let empty = Map::new();
        let data = data.and_then(Value::as_object).unwrap_or(&empty);
        let told = def.map_or(Ok(()), |def| check::members(data, def.data));
        debug_assert!(
            told.is_ok(),
            "event {name} is not as in the schema: {told:?}"
        );
    }
}

/// Version as in the greeting.
pub(super) fn version() -> Value {
    let (major, minor, micro) = crate::cmdline::QMP_VERSION;
    json!({
        "qemu": { "major": major, "minor": minor, "micro": micro },
        "package": concat!("stratovirt ", env!("CARGO_PKG_VERSION")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_entry_has_a_name_of_its_own_and_words() {
        let mut names = BTreeSet::new();
        let members = commands().flat_map(|command| command.arguments);
        let data = EVENTS.iter().flat_map(|event| event.data);
        for (name, help) in commands()
            .map(|command| (command.name, command.help))
            .chain(EVENTS.iter().map(|event| (event.name, event.help)))
        {
            assert!(names.insert(name), "{name} twice");
            assert!(!help.is_empty() && !help.ends_with('.'), "{name}: {help}");
        }
        for member in members.chain(data) {
            assert!(!member.help.is_empty(), "{}", member.name);
        }
    }
}
