//! `query-cpu-model-expansion`: a processor as a model with properties.
//!
//! **Job.** From what CPUID tells a guest to QEMU's `CpuModelInfo`, and from the model that a client names to what it may be.
//! **Who is not trusted.** The client: names and properties are any JSON, and are looked up in what the processor has.
//!
//! **Why this way.** There is one model, the host's, and `-cpu` switches nothing of it; a client that asks what the host would be
//! without a feature is told that this cannot be had, rather than of a guest that nobody can start. `base` is what libvirt takes
//! from a `static` expansion into a `full` one: only its properties count.

use serde_json::{Map, Value, json};

use super::command::QmpError;
use super::objects::CPU_TYPE;
use super::schema::check::shown;
use crate::kvm::processor::Processor;

/// Properties of libvirt's that a client may set and that change nothing here, as with `-cpu`.
const WITHOUT_EFFECT: &[&str] = &["migratable", "pmu"];

/// The answer: `name` with `props`, as far as this `processor` can be it.
pub(super) fn expand(
    processor: &Processor,
    full: bool,
    name: &str,
    props: Option<Value>,
) -> Result<Value, QmpError> {
    let base = match name {
        "base" => true,
        "host" | "max" => false,
        _ => {
            return Err(QmpError::generic(format!(
                "CPU model '{}' not found; allowed: host, max, base",
                shown(name)
            )));
        }
    };
    let mut model = properties(processor, base);
    let wanted = match props {
        None => Map::new(),
        Some(Value::Object(wanted)) => wanted,
        Some(_) => return Err(wrong_type("props", "object")),
    };
    for (property, value) in wanted {
        if WITHOUT_EFFECT.contains(&property.as_str()) {
            if !value.is_boolean() {
                return Err(wrong_type(&property, "boolean"));
            }
            continue;
        }
        let Some(here) = model.get_mut(&property) else {
            let kind = if base { "base-x86_64-cpu" } else { CPU_TYPE };
            return Err(QmpError::generic(format!(
                "Property '{kind}.{}' not found",
                shown(&property)
            )));
        };
        match (&*here, &value) {
            (Value::Bool(_), Value::Bool(_)) | (Value::String(_), Value::String(_)) => {}
            (Value::Number(_), Value::Number(number)) if number.is_u64() => {}
            (Value::Bool(_), _) => return Err(wrong_type(&property, "boolean")),
            (Value::String(_), _) => return Err(wrong_type(&property, "string")),
            _ => return Err(wrong_type(&property, "integer")),
        }
        if base {
            *here = value;
        } else if *here != value {
            return Err(QmpError::generic(format!(
                "Property '{property}' of CPU model '{name}' is {here} on this host, and cannot be switched"
            )));
        }
    }
    Ok(json!({ "model": { "name": if full { name } else { "base" }, "props": model } }))
}

fn wrong_type(name: &str, expected: &str) -> QmpError {
    QmpError::generic(format!(
        "Invalid parameter type for '{}', expected: {expected}",
        shown(name)
    ))
}

/// What this processor is, or one that has nothing yet.
fn properties(processor: &Processor, base: bool) -> Map<String, Value> {
    let nothing = Processor::default();
    let has = if base { &nothing } else { processor };
    let mut all = Map::new();
    for (name, value) in [
        ("vendor", json!(has.vendor)),
        ("model-id", json!(has.name)),
        ("family", json!(has.family)),
        ("model", json!(has.model)),
        ("stepping", json!(has.stepping)),
        ("min-level", json!(has.level)),
        ("min-xlevel", json!(has.extended_level)),
    ] {
        all.insert(name.to_owned(), value);
    }
    for (name, is) in &processor.features {
        all.insert((*name).to_owned(), json!(*is && !base));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor() -> Processor {
        Processor {
            vendor: "GenuineIntel".into(),
            name: "A CPU".into(),
            family: 6,
            model: 85,
            features: vec![("sse", true), ("avx", false)],
            ..Processor::default()
        }
    }

    fn asked(full: bool, name: &str, props: Value) -> Result<Value, String> {
        let answer = expand(&processor(), full, name, Some(props));
        answer
            .map(|answer| answer["model"].clone())
            .map_err(|e| e.desc)
    }

    #[test]
    fn what_a_static_expansion_gives_a_full_one_takes() {
        let host = expand(&processor(), false, "host", None).unwrap();
        let model = &host["model"];
        assert_eq!(model["name"], "base");
        let props = &model["props"];
        assert_eq!(
            (&props["sse"], &props["avx"], &props["model"]),
            (&json!(true), &json!(false), &json!(85))
        );
        assert_eq!(asked(true, "base", props.clone()).unwrap(), *model);
        // Without properties it has none.
        let empty = asked(true, "base", json!({})).unwrap();
        assert_eq!(
            (&empty["props"]["sse"], &empty["props"]["vendor"]),
            (&json!(false), &json!(""))
        );
        let max = asked(true, "max", json!({ "migratable": false, "sse": true })).unwrap();
        assert_eq!((&max["name"], &max["props"]), (&json!("max"), props));
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_the_reason() {
        for (name, props, why) in [
            (
                "EPYC",
                json!({}),
                "CPU model 'EPYC' not found; allowed: host, max, base",
            ),
            (
                "host",
                json!([]),
                "Invalid parameter type for 'props', expected: object",
            ),
            (
                "host",
                json!({ "nope": true }),
                "Property 'host-x86_64-cpu.nope' not found",
            ),
            (
                "host",
                json!({ "sse": 1 }),
                "Invalid parameter type for 'sse', expected: boolean",
            ),
            (
                "host",
                json!({ "sse": false }),
                "Property 'sse' of CPU model 'host' is true on this host, and cannot be switched",
            ),
            (
                "base",
                json!({ "family": -1 }),
                "Invalid parameter type for 'family', expected: integer",
            ),
            (
                "base",
                json!({ "vendor": 1 }),
                "Invalid parameter type for 'vendor', expected: string",
            ),
            (
                "max",
                json!({ "migratable": "on" }),
                "Invalid parameter type for 'migratable', expected: boolean",
            ),
        ] {
            assert_eq!(asked(true, name, props), Err(why.to_owned()));
        }
    }
}
