//! Values against the schema.
//!
//! **Job.** Refuse arguments that the table does not allow, with a text that names the argument, its value and what is
//! allowed; and, in builds for tests, what this program itself sends. **Who is not trusted.** Clients.
//! **Why this way.** One walk over the table serves every command, so a command cannot forget a check.

use serde_json::Value;

use super::types::{Command, Given, Member, Object, Type, Variants};
use crate::qmp::command::QmpError;

/// Characters of a value that an error repeats.
const SHOWN: usize = 64;

/// What a client wrote, as far as an error repeats it.
pub(in crate::qmp) fn shown(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

/// Checks the arguments of `command`.
pub(in crate::qmp) fn arguments(command: &Command, given: &Given) -> Result<(), QmpError> {
    all_members(
        given,
        command.arguments,
        command.variants,
        command.open,
        "",
        Some(command.name),
    )
    .map_err(QmpError::generic)
}

/// Checks one value; `path` names it in errors.
pub(in crate::qmp) fn value(kind: Type, given: &Value, path: &str) -> Result<(), String> {
    let wrong = |expected: &str| {
        Err(format!(
            "Invalid parameter type for '{path}', expected: {expected}"
        ))
    };
    match kind {
        Type::Any => Ok(()),
        Type::Text(most) => match given.as_str() {
            None => wrong("string"),
            Some(text) if text.len() > most => Err(format!(
                "Parameter '{path}' has {} bytes; allowed: 0 to {most}",
                text.len()
            )),
            Some(_) => Ok(()),
        },
        Type::Bool if given.is_boolean() => Ok(()),
        Type::Bool => wrong("boolean"),
        Type::Null if given.is_null() => Ok(()),
        Type::Null => wrong("null"),
        Type::Number if given.is_number() => Ok(()),
        Type::Number => wrong("number"),
        Type::Int(least, most) => int(given, least, most, path).unwrap_or_else(|| wrong("integer")),
        Type::List(of) => match given.as_array() {
            None => wrong("array"),
            Some(list) => list
                .iter()
                .enumerate()
                .try_for_each(|(at, one)| value(*of, one, &format!("{path}[{at}]"))),
        },
        Type::Enum(words) => match given.as_str() {
            None => wrong("string"),
            Some(word) if words.values.contains(&word) => Ok(()),
            Some(word) => Err(format!(
                "Parameter '{path}' does not accept value '{}'; allowed: {}",
                shown(word),
                words.values.join(", ")
            )),
        },
        Type::Object(object) => match given.as_object() {
            None => wrong("object"),
            Some(given) => all_members(
                given,
                object.members,
                object.variants,
                false,
                &format!("{path}."),
                None,
            ),
        },
        Type::OneOf(one_of) => {
            match one_of
                .types
                .iter()
                .find(|kind| json_type(**kind) == json_type_of(given))
            {
                Some(kind) => value(*kind, given, path),
                None => {
                    let names: Vec<&str> =
                        one_of.types.iter().map(|kind| json_type(*kind)).collect();
                    wrong(&names.join(" or "))
                }
            }
        }
    }
}

/// `None` if it is not a whole number at all.
fn int(given: &Value, least: i64, most: u64, path: &str) -> Option<Result<(), String>> {
    let fits = match (given.as_i64(), given.as_u64()) {
        (Some(number), None) => number >= least,
        (_, Some(number)) => {
            number <= most && i64::try_from(number).map_or(true, |number| number >= least)
        }
        (None, None) => {
            // A number of more than 64 bits is one, too, only out of every range.
            let whole = given.as_f64().is_some_and(|number| number.fract() == 0.0);
            if !whole {
                return None;
            }
            false
        }
    };
    Some(if fits {
        Ok(())
    } else {
        Err(format!(
            "Parameter '{path}' is {}, which is out of range; allowed: {least} to {most}",
            shown(&given.to_string())
        ))
    })
}

/// Checks an event's data.
pub(in crate::qmp) fn members(given: &Given, members: &[Member]) -> Result<(), String> {
    all_members(given, members, None, false, "", None)
}

fn all_members(
    given: &Given,
    fixed: &[Member],
    variants: Option<Variants>,
    open: bool,
    prefix: &str,
    command: Option<&str>,
) -> Result<(), String> {
    // The tag first: what else is allowed depends on it.
    let case: Option<&Object> = match variants {
        Some(variants) => {
            if let (Some(tag), Some(word)) = (
                fixed.iter().find(|member| member.name == variants.tag),
                given.get(variants.tag),
            ) {
                value(tag.kind, word, &format!("{prefix}{}", tag.name))?;
            }
            given
                .get(variants.tag)
                .and_then(Value::as_str)
                .and_then(|word| variants.cases.iter().find(|(case, _)| *case == word))
                .map(|(_, object)| *object)
        }
        None => None,
    };
    let more: &[Member] = case.map_or(&[], |object| object.members);
    let all = || fixed.iter().chain(more);
    for (name, one) in given {
        match all().find(|member| member.name == name) {
            Some(member) => value(member.kind, one, &format!("{prefix}{name}"))?,
            None if open => {}
            None => {
                let allowed: Vec<&str> = all().map(|member| member.name).collect();
                let allowed = if allowed.is_empty() {
                    "none".to_owned()
                } else {
                    allowed.join(", ")
                };
                let of = command.map_or(String::new(), |name| format!(" of {name}"));
                return Err(format!(
                    "Parameter '{prefix}{}'{of} is unexpected; allowed: {allowed}",
                    shown(name)
                ));
            }
        }
    }
    match all().find(|member| !member.optional && !given.contains_key(member.name)) {
        Some(missing) => Err(format!("Parameter '{prefix}{}' is missing", missing.name)),
        None => Ok(()),
    }
}

/// What JSON shows of a type.
pub(super) const fn json_type(kind: Type) -> &'static str {
    match kind {
        Type::Text(_) | Type::Enum(_) => "string",
        Type::Bool => "boolean",
        Type::Int(..) | Type::Number => "number",
        Type::Null => "null",
        Type::Any | Type::OneOf(_) => "value",
        Type::List(_) => "array",
        Type::Object(_) => "object",
    }
}

const fn json_type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::super::types::{Enum, OneOf, may, must, object};
    use super::*;
    use serde_json::json;

    const KIND: Enum = Enum {
        name: "Kind",
        values: &["file", "socket", "null"],
    };
    const FILE: Object = object("File", &[must("path", Type::Text(8), "")]);
    const SOCKET: Object = object("Socket", &[may("port", Type::Int(1, 65535), "")]);
    const BACKEND: Object = Object {
        name: "Backend",
        members: &[
            must("kind", Type::Enum(&KIND), ""),
            may("on", Type::Bool, ""),
        ],
        variants: Some(Variants {
            tag: "kind",
            cases: &[("file", &FILE), ("socket", &SOCKET)],
        }),
    };
    const EITHER: OneOf = OneOf {
        name: "Either",
        types: &[Type::Null, Type::Text(4)],
    };

    fn told(kind: Type, given: &Value) -> String {
        value(kind, given, "x").err().unwrap_or_default()
    }

    #[test]
    fn each_type_takes_its_values_and_tells_about_others() {
        for (kind, good, bad, text) in [
            (
                Type::Text(2),
                json!("ab"),
                json!("abc"),
                "Parameter 'x' has 3 bytes; allowed: 0 to 2",
            ),
            (
                Type::TEXT,
                json!(""),
                json!(1),
                "Invalid parameter type for 'x', expected: string",
            ),
            (
                Type::Bool,
                json!(false),
                json!("on"),
                "Invalid parameter type for 'x', expected: boolean",
            ),
            (
                Type::Int(1, 5),
                json!(5),
                json!(6),
                "Parameter 'x' is 6, which is out of range; allowed: 1 to 5",
            ),
            (
                Type::Int(-3, 5),
                json!(-3),
                json!(-4),
                "Parameter 'x' is -4, which is out of range; allowed: -3 to 5",
            ),
            (
                Type::UINT,
                json!(u64::MAX),
                json!(-1),
                "Parameter 'x' is -1, which is out of range; allowed: 0 to 18446744073709551615",
            ),
            (
                Type::INT,
                json!(i64::MIN),
                json!(u64::MAX),
                "Parameter 'x' is 18446744073709551615, which is out of range; allowed: -9223372036854775808 to 9223372036854775807",
            ),
            (
                Type::UINT,
                json!(0),
                json!(1e30),
                "Parameter 'x' is 1e+30, which is out of range; allowed: 0 to 18446744073709551615",
            ),
            (
                Type::UINT,
                json!(0),
                json!(0.5),
                "Invalid parameter type for 'x', expected: integer",
            ),
            (
                Type::Number,
                json!(0.5),
                json!("0.5"),
                "Invalid parameter type for 'x', expected: number",
            ),
            (
                Type::TEXTS,
                json!(["a"]),
                json!(["a", 1]),
                "Invalid parameter type for 'x[1]', expected: string",
            ),
            (
                Type::Enum(&KIND),
                json!("file"),
                json!("pipe"),
                "Parameter 'x' does not accept value 'pipe'; allowed: file, socket, null",
            ),
            (
                Type::OneOf(&EITHER),
                json!(null),
                json!(true),
                "Invalid parameter type for 'x', expected: null or string",
            ),
            (
                Type::OneOf(&EITHER),
                json!("four"),
                json!("fives"),
                "Parameter 'x' has 5 bytes; allowed: 0 to 4",
            ),
        ] {
            assert_eq!(told(kind, &good), "", "{kind:?}");
            assert_eq!(told(kind, &bad), text, "{kind:?}");
        }
    }

    #[test]
    fn members_depend_on_the_kind() {
        let kind = Type::Object(&BACKEND);
        assert_eq!(
            told(kind, &json!({ "path": "a", "kind": "file", "on": true })),
            ""
        );
        assert_eq!(told(kind, &json!({ "kind": "null" })), "");
        for (bad, text) in [
            (json!({ "kind": "file" }), "Parameter 'x.path' is missing"),
            (json!({}), "Parameter 'x.kind' is missing"),
            (
                json!({ "kind": "socket", "path": "a" }),
                "Parameter 'x.path' is unexpected; allowed: kind, on, port",
            ),
            (
                json!({ "kind": "pipe", "path": "a" }),
                "Parameter 'x.kind' does not accept value 'pipe'; allowed: file, socket, null",
            ),
            (
                json!({ "kind": "socket", "port": 0 }),
                "Parameter 'x.port' is 0, which is out of range; allowed: 1 to 65535",
            ),
            (
                json!([]),
                "Invalid parameter type for 'x', expected: object",
            ),
        ] {
            assert_eq!(told(kind, &bad), text, "{bad}");
        }
    }
}
