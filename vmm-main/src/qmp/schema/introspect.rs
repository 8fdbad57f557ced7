//! `query-qmp-schema`: the tables in the form of QEMU's introspection (QAPI `SchemaInfo`).
//!
//! **Job.** One entry a command, event and type that one of them reaches, each with its `meta-type`.
//! **Who is not trusted.** Nobody. **Why this way.** Computed on request from the tables that requests are checked against,
//! so it cannot tell anything else. QEMU hides the names of types behind numbers; ours are readable, which the format allows.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::types::{Member, Object, Type, Variants};

/// All of it.
pub(in crate::qmp) fn schema() -> Value {
    let mut out = Schema {
        entries: Vec::new(),
        known: BTreeSet::new(),
    };
    for command in super::commands() {
        let arguments = out.members(
            &format!("q_obj_{}-arg", command.name),
            command.arguments,
            command.variants,
        );
        let mut entry = json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": arguments,
            "ret-type": out.name(command.returns),
        });
        if !command.deprecated.is_empty() {
            entry["features"] = json!(["deprecated"]);
        }
        out.entries.push(entry);
    }
    for event in super::EVENTS {
        let data = out.members(&format!("q_obj_{}-arg", event.name), event.data, None);
        out.entries
            .push(json!({ "name": event.name, "meta-type": "event", "arg-type": data }));
    }
    Value::Array(out.entries)
}

struct Schema {
    entries: Vec<Value>,
    known: BTreeSet<String>,
}

impl Schema {
    /// The name of a type, which is added if it is new.
    fn name(&mut self, kind: Type) -> String {
        match kind {
            Type::Text(_) => self.builtin("str", "string"),
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Int(..) => self.builtin("int", "int"),
            Type::Number => self.builtin("number", "number"),
            Type::Null => self.builtin("null", "null"),
            Type::Any => self.builtin("any", "value"),
            Type::List(of) => {
                let element = self.name(*of);
                let name = format!("[{element}]");
                self.add(
                    &name,
                    json!({ "meta-type": "array", "element-type": element }),
                );
                name
            }
            Type::Enum(words) => {
                let members: Vec<Value> = words
                    .values
                    .iter()
                    .map(|value| json!({ "name": value }))
                    .collect();
                let entry =
                    json!({ "meta-type": "enum", "members": members, "values": words.values });
                self.add(words.name, entry);
                words.name.to_owned()
            }
            Type::Object(Object {
                name,
                members,
                variants,
            }) => self.members(name, members, *variants),
            Type::OneOf(one_of) => {
                if self.known.insert(one_of.name.to_owned()) {
                    let members: Vec<Value> = one_of
                        .types
                        .iter()
                        .map(|kind| json!({ "type": self.name(*kind) }))
                        .collect();
                    self.entries.push(json!({
                        "name": one_of.name,
                        "meta-type": "alternate",
                        "members": members,
                    }));
                }
                one_of.name.to_owned()
            }
        }
    }

    /// The name of an object type.
    fn members(&mut self, name: &str, members: &[Member], variants: Option<Variants>) -> String {
        let name = if members.is_empty() { "q_empty" } else { name };
        // Known before its members are looked at: one of them may be of the same type.
        if !self.known.insert(name.to_owned()) {
            return name.to_owned();
        }
        let list: Vec<Value> = members.iter().map(|member| self.member(member)).collect();
        let mut entry = Map::new();
        entry.insert("name".into(), name.into());
        entry.insert("meta-type".into(), "object".into());
        entry.insert("members".into(), list.into());
        if let Some(variants) = variants {
            let tag = members.iter().find(|member| member.name == variants.tag);
            let words = match tag.map(|member| member.kind) {
                Some(Type::Enum(words)) => words.values,
                _ => &[],
            };
            let cases: Vec<Value> = words
                .iter()
                .map(|word| {
                    let object = variants.cases.iter().find(|(case, _)| case == word);
                    let kind = object.map_or(Type::NOTHING, |(_, object)| Type::Object(object));
                    json!({ "case": word, "type": self.name(kind) })
                })
                .collect();
            entry.insert("tag".into(), variants.tag.into());
            entry.insert("variants".into(), cases.into());
        }
        self.entries.push(entry.into());
        name.to_owned()
    }

    fn member(&mut self, member: &Member) -> Value {
        let mut entry = json!({ "name": member.name, "type": self.name(member.kind) });
        if member.optional {
            // Left out, something else holds than any value: QEMU's own are all null, too.
            entry["default"] = Value::Null;
        }
        entry
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        self.add(
            name,
            json!({ "meta-type": "builtin", "json-type": json_type }),
        );
        name.to_owned()
    }

    fn add(&mut self, name: &str, mut entry: Value) {
        if self.known.insert(name.to_owned()) {
            entry["name"] = name.into();
            self.entries.push(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_name_is_there_once_and_every_reference_leads_somewhere() {
        let schema = schema();
        let entries = schema.as_array().unwrap();
        let mut by_name = BTreeMap::new();
        for entry in entries {
            let name = entry["name"].as_str().unwrap();
            assert!(by_name.insert(name, entry).is_none(), "{name} twice");
        }
        let exists = |name: &Value, of: &Value| {
            let name = name.as_str().unwrap_or_else(|| panic!("{of}"));
            assert!(by_name.contains_key(name), "{name} of {of}");
        };
        for entry in entries {
            match entry["meta-type"].as_str().unwrap() {
                "builtin" => assert!(entry["json-type"].is_string()),
                "enum" => assert!(!entry["values"].as_array().unwrap().is_empty()),
                "array" => exists(&entry["element-type"], entry),
                "object" => {
                    let members = entry["members"].as_array().unwrap();
                    for member in members {
                        exists(&member["type"], entry);
                    }
                    for case in entry["variants"].as_array().into_iter().flatten() {
                        exists(&case["type"], entry);
                        let tag = members.iter().find(|one| one["name"] == entry["tag"]);
                        let words = by_name[tag.unwrap()["type"].as_str().unwrap()];
                        assert!(words["values"].as_array().unwrap().contains(&case["case"]));
                    }
                }
                "alternate" => {
                    for member in entry["members"].as_array().unwrap() {
                        exists(&member["type"], entry);
                    }
                }
                "command" => {
                    exists(&entry["arg-type"], entry);
                    exists(&entry["ret-type"], entry);
                }
                "event" => exists(&entry["arg-type"], entry),
                other => panic!("{other}"),
            }
        }
        assert_eq!(by_name["quit"]["ret-type"], "q_empty");
        assert_eq!(
            by_name["q_obj_qmp_capabilities-arg"]["members"][0]["name"],
            "enable"
        );
        assert_eq!(by_name["SHUTDOWN"]["meta-type"], "event");
    }
}
