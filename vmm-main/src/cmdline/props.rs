//! Property lists: `word,key=value,flag,…`, checked against a table.
//!
//! **Job.** Splits one option's argument (`,,` stands for a comma in a value), finds out which [`Shape`] its leading word
//! names, and turns each value into the type that the table gives for its key. What comes out has no unknown, repeated,
//! missing or out-of-range property.

use super::error::{CmdlineError, list};
use super::nearest::nearest;
use super::table::{Arg, OptionDef};
use ipc::limits;
use ipc::spec::cpus::{self, CpuList};

/// The type of a value, with its range.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// `on`, `off` and their synonyms; the bare key means on, the key with `no` before it means off.
    Bool,
    /// Any text of 1 to so many bytes.
    Text(usize),
    /// A name that other options refer to: 1 to 255 letters, digits, `-`, `_`, `.`, `:` and `/`.
    Id,
    /// A path.
    Path,
    /// A number from the first to the second.
    Int(u64, u64),
    /// A power of two from the first to the second.
    PowerOfTwo(u64, u64),
    /// One of these words.
    Choice(&'static [&'static str]),
    /// One of these words, which all say what happens anyway; other values are not supported yet.
    Fixed(&'static [&'static str]),
    /// No value is supported yet.
    Later,
    /// Memory size: a number with `m`, `M`, `g`, `G` (or libvirt's `k`), default unit MiB.
    Size,
    /// Memory size, in which a number without unit is in bytes.
    Bytes,
    /// Size of a window into which files are mapped.
    Window,
    /// MAC address, `52:54:00:12:34:56`.
    Mac,
    /// Inherited descriptors, separated by `:`; at most so many.
    Fds(usize),
    /// Processors of the host, as in `0-3:6`.
    Cpus,
    /// Memory nodes of the host, in the same form; more than once is all of them.
    Nodes,
    /// Processors of the guest, in the same form; more than once is all of them.
    Vcpus,
}

impl Kind {
    /// What is allowed, for errors and pages.
    pub fn allowed(self) -> String {
        match self {
            Self::Bool => "on, off".into(),
            Self::Text(max) => format!("1 to {max} bytes"),
            Self::Id => "1 to 255 letters, digits and -_.:/".into(),
            Self::Path => "a path".into(),
            Self::Int(min, max) => format!("{min} to {max}"),
            Self::PowerOfTwo(min, max) => format!("a power of two from {min} to {max}"),
            Self::Choice(words) | Self::Fixed(words) => list(words.iter().copied()),
            Self::Later => "nothing yet".into(),
            Self::Size => "an integer number of MiB from 128M to 512G, as in 256, 256m, 1G".into(),
            Self::Bytes => "bytes, or a number with m, M, g or G; whole MiB from 1M to 512G".into(),
            Self::Window => "0, or a multiple of 2M up to 8G, as in 512M or 2G".into(),
            Self::Mac => {
                "six hexadecimal bytes, as in 52:54:00:12:34:56, the first one even".into()
            }
            Self::Cpus => format!(
                "processors of the host, 0 to {}, as in 0-3:6",
                cpus::MAX_CPUS - 1
            ),
            Self::Nodes => format!(
                "memory nodes of the host, 0 to {}, as in 0-3:6",
                cpus::MAX_CPUS - 1
            ),
            Self::Vcpus => format!("vCPUs, 0 to {}, as in 0-3:6", ipc::limits::MAX_VCPUS - 1),
            Self::Fds(1) => "an inherited descriptor, 3 to 65535".into(),
            Self::Fds(max) => {
                format!("1 to {max} inherited descriptors, 3 to 65535, separated by ':'")
            }
        }
    }

    /// Stands for the value in a synopsis.
    pub fn placeholder(self) -> String {
        match self {
            Self::Bool => "on|off".into(),
            Self::Choice(words) | Self::Fixed(words) => words.join("|"),
            Self::Text(_) => "TEXT".into(),
            Self::Id => "ID".into(),
            Self::Path => "PATH".into(),
            Self::Int(..) | Self::PowerOfTwo(..) => "N".into(),
            Self::Later => "…".into(),
            Self::Size | Self::Bytes | Self::Window => "SIZE".into(),
            Self::Mac => "MAC".into(),
            Self::Cpus | Self::Nodes | Self::Vcpus => "N-N:N:…".into(),
            Self::Fds(1) => "FD".into(),
            Self::Fds(_) => "FD:FD:…".into(),
        }
    }

    /// The value that `text` stands for.
    fn read(self, text: &str) -> Result<Value, String> {
        let wrong = || format!("not valid; allowed: {}", self.allowed());
        Ok(match self {
            Self::Bool => Value::Bool(read_bool(text).ok_or_else(wrong)?),
            Self::Text(max) if (1..=max).contains(&text.len()) => Value::Text(text.to_owned()),
            Self::Id if is_id(text) => Value::Text(text.to_owned()),
            Self::Path if !text.is_empty() && !text.contains('\0') => Value::Text(text.to_owned()),
            Self::Int(min, max) => {
                let number = read_int(text).filter(|n| (min..=max).contains(n));
                Value::Int(
                    number.ok_or_else(|| format!("out of range; allowed: {}", self.allowed()))?,
                )
            }
            Self::PowerOfTwo(min, max) => {
                let number =
                    read_int(text).filter(|n| (min..=max).contains(n) && n.is_power_of_two());
                Value::Int(number.ok_or_else(wrong)?)
            }
            Self::Choice(words) => {
                let word = words.iter().find(|word| word.eq_ignore_ascii_case(text));
                Value::Text((*word.ok_or_else(wrong)?).to_owned())
            }
            Self::Fixed(words) => {
                // Booleans may be spelled in several ways here as well.
                let same = |word: &&&str| {
                    word.eq_ignore_ascii_case(text)
                        || read_bool(word).is_some() && read_bool(word) == read_bool(text)
                };
                let Some(word) = words.iter().find(same) else {
                    return Err(format!("not supported yet; allowed: {}", self.allowed()));
                };
                Value::Text((*word).to_owned())
            }
            Self::Later => return Err("not supported yet".into()),
            Self::Size => Value::Int(
                read_size(text, 20)
                    .filter(|size| *size >= ipc::limits::MIN_MEMORY)
                    .ok_or_else(wrong)?,
            ),
            Self::Bytes => Value::Int(read_size(text, 0).ok_or_else(wrong)?),
            Self::Window => Value::Int(read_window(text).ok_or_else(wrong)?),
            Self::Mac => Value::Mac(read_mac(text).ok_or_else(wrong)?),
            Self::Cpus | Self::Nodes => Value::Cpus(CpuList::parse(text).ok_or_else(wrong)?),
            Self::Vcpus => {
                let few = |list: &CpuList| {
                    list.iter()
                        .all(|vcpu| vcpu < ipc::limits::MAX_VCPUS as usize)
                };
                Value::Cpus(CpuList::parse(text).filter(few).ok_or_else(wrong)?)
            }
            Self::Fds(max) => {
                let fds: Option<Vec<i32>> = text.split(':').map(read_fd).collect();
                Value::Fds(fds.filter(|fds| fds.len() <= max).ok_or_else(wrong)?)
            }
            Self::Text(_) | Self::Id | Self::Path => return Err(wrong()),
        })
    }
}

/// One property.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// Its type and range.
    pub kind: Kind,
    /// Whether it has to be there.
    pub required: bool,
    /// Value when it is not there, for pages; may be empty.
    pub default: &'static str,
    /// What it does, one sentence without full stop.
    pub help: &'static str,
}

/// One form of an option: the properties that go together.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// The leading word, as in `-netdev tap,…`; empty if the option has one form only.
    pub name: &'static str,
    /// What this form is, one sentence without full stop; may be empty.
    pub help: &'static str,
    /// Key that a leading value without a key belongs to; may be empty. Only for options of one form.
    pub implied: &'static str,
    /// The properties.
    pub keys: &'static [Key],
}

/// A value of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Bool(bool),
    Text(String),
    Int(u64),
    Mac([u8; 6]),
    Fds(Vec<i32>),
    Cpus(CpuList),
}

/// One option's argument, checked.
#[derive(Debug)]
pub(super) struct Props<'a> {
    option: &'static OptionDef,
    raw: &'a str,
    shape: &'static Shape,
    values: Vec<(&'static str, Value)>,
}

impl<'a> Props<'a> {
    /// Checks `raw`, the argument of `option`, against the option's table.
    pub(super) fn read(option: &'static OptionDef, raw: &'a str) -> Result<Self, CmdlineError> {
        let fail = |text: String| CmdlineError::new(&option.dashed(), raw, text);
        let Arg::Props {
            selector,
            noun,
            shapes,
            later,
        } = option.arg
        else {
            return Err(fail("takes no properties".into()));
        };
        let mut items = if raw.trim_start().starts_with('{') {
            json_items(raw).map_err(fail)?
        } else {
            split(raw)
        };
        let shape = if selector.is_empty() {
            &shapes[0]
        } else {
            let at = items
                .iter()
                .position(|item| item.split_once('=').is_some_and(|(key, _)| key == selector));
            let word = match (at, items.first()) {
                (Some(at), _) => items.remove(at)[selector.len() + 1..].to_owned(),
                (None, Some(first)) if !first.contains('=') => items.remove(0),
                _ => {
                    return Err(fail(format!(
                        "names no {noun}; it comes first; available: {}",
                        list(shapes.iter().map(|shape| shape.name))
                    )));
                }
            };
            find_shape(&word, noun, shapes, later).map_err(fail)?
        };
        let mut props = Self {
            option,
            raw,
            shape,
            values: Vec::new(),
        };
        for (position, item) in items.iter().enumerate() {
            props.add(position, item).map_err(fail)?;
        }
        if let Some(key) = shape
            .keys
            .iter()
            .find(|key| key.required && !props.has(key.name))
        {
            return Err(fail(format!(
                "{}= is missing; allowed: {}",
                key.name,
                key.kind.allowed()
            )));
        }
        Ok(props)
    }

    fn add(&mut self, position: usize, item: &str) -> Result<(), String> {
        let keys = self.shape.keys;
        let find = |name: &str| keys.iter().find(|key| key.name == name);
        let implied = find(self.shape.implied).filter(|_| position == 0);
        let (key, text) = match (item.split_once('='), implied) {
            // A path may hold '=', a key never holds anything but these.
            (Some((name, _)), Some(implied)) if !is_key(name) => (implied, item.to_owned()),
            (Some((name, text)), _) => (
                find(name).ok_or_else(|| self.unknown(name))?,
                text.to_owned(),
            ),
            (None, Some(implied)) if find(item).is_none_or(|key| !is_bool(key)) => {
                (implied, item.to_owned())
            }
            (None, _) => match (find(item), item.strip_prefix("no").and_then(find)) {
                (Some(key), _) if is_bool(key) => (key, "on".into()),
                (Some(_), _) => return Err(format!("{item} needs a value: {item}=…")),
                (None, Some(key)) if is_bool(key) => (key, "off".into()),
                _ => return Err(self.unknown(item)),
            },
        };
        let value = key
            .kind
            .read(&text)
            .map_err(|why| format!("{}={text} is {why}", key.name));
        let before = self.values.iter_mut().find(|(name, _)| *name == key.name);
        match (before, key.kind) {
            (None, _) => self.values.push((key.name, value?)),
            // QEMU's way to write what is no single range.
            (Some((_, Value::Cpus(list))), Kind::Nodes | Kind::Vcpus) => {
                if let Value::Cpus(more) = value? {
                    more.iter().for_each(|number| list.insert(number));
                }
            }
            (Some(_), _) => return Err(format!("{} is given twice", key.name)),
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> String {
        let names = || self.shape.keys.iter().map(|key| key.name);
        let near =
            nearest(name, names()).map_or(String::new(), |near| format!(", nearest is {near}"));
        format!("unknown property {name}{near}; allowed: {}", list(names()))
    }

    /// The argument as it was given.
    pub(super) fn raw(&self) -> &'a str {
        self.raw
    }

    /// The option, as it is given.
    pub(super) fn dashed(&self) -> String {
        self.option.dashed()
    }

    /// The leading word's table name.
    pub(super) fn shape(&self) -> &'static str {
        self.shape.name
    }

    /// An error about this option.
    pub(super) fn error(&self, text: impl Into<String>) -> CmdlineError {
        CmdlineError::new(&self.option.dashed(), self.raw, text)
    }

    /// Whether the property was given.
    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.values
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    /// A boolean.
    pub(super) fn bool(&self, name: &str) -> Option<bool> {
        match self.get(name) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    /// Text, a path, an id or a choice.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Some(Value::Text(value)) => Some(value),
            _ => None,
        }
    }

    /// Text of a required property.
    pub(super) fn required(&self, name: &str) -> Result<String, CmdlineError> {
        self.text(name)
            .map(str::to_owned)
            .ok_or_else(|| self.error(format!("{name}= is missing")))
    }

    /// A number or a size in bytes.
    pub(super) fn int(&self, name: &str) -> Option<u64> {
        match self.get(name) {
            Some(Value::Int(value)) => Some(*value),
            _ => None,
        }
    }

    /// A number that its range lets fit.
    pub(super) fn small<T: TryFrom<u64>>(&self, name: &str) -> Option<T> {
        self.int(name).and_then(|value| T::try_from(value).ok())
    }

    /// A MAC address.
    pub(super) fn mac(&self, name: &str) -> Option<[u8; 6]> {
        match self.get(name) {
            Some(Value::Mac(value)) => Some(*value),
            _ => None,
        }
    }

    /// Processors or memory nodes.
    pub(super) fn cpus(&self, name: &str) -> Option<CpuList> {
        match self.get(name) {
            Some(Value::Cpus(value)) => Some(*value),
            _ => None,
        }
    }

    /// Descriptors.
    pub(super) fn fds(&self, name: &str) -> Option<&[i32]> {
        match self.get(name) {
            Some(Value::Fds(value)) => Some(value),
            _ => None,
        }
    }
}

fn is_bool(key: &Key) -> bool {
    matches!(key.kind, Kind::Bool)
}

fn find_shape(
    word: &str,
    noun: &str,
    shapes: &'static [Shape],
    later: &[&str],
) -> Result<&'static Shape, String> {
    if let Some(shape) = shapes.iter().find(|shape| shape.name == word) {
        return Ok(shape);
    }
    let available = list(shapes.iter().map(|shape| shape.name));
    if later.contains(&word) {
        return Err(format!(
            "{noun} {word} is not available in this build; available: {available}"
        ));
    }
    let near = nearest(word, shapes.iter().map(|shape| shape.name))
        .map_or(String::new(), |near| format!(", nearest is {near}"));
    Err(format!(
        "unknown {noun} {word}{near}; available: {available}"
    ))
}

/// The items between single commas, with `,,` turned into a comma. A trailing comma adds nothing.
fn split(raw: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = raw.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    if items.last().is_some_and(String::is_empty) {
        items.pop();
    }
    items
}

/// The members of a JSON object as items. What is inside another object gets its name in front: `file.filename`.
fn json_items(raw: &str) -> Result<Vec<String>, String> {
    fn add(
        items: &mut Vec<String>,
        prefix: &str,
        name: &str,
        value: &serde_json::Value,
    ) -> Result<(), String> {
        use serde_json::Value;
        let key = format!("{prefix}{name}");
        if !is_key(&key) {
            return Err(format!("unknown property {key}"));
        }
        items.push(match value {
            // As QEMU's clients end a chain of images.
            Value::Null if key == "backing" => return Ok(()),
            Value::Bool(on) => format!("{key}={}", if *on { "on" } else { "off" }),
            Value::Number(number) => format!("{key}={number}"),
            Value::String(text) => format!("{key}={text}"),
            Value::Object(inner) => {
                let prefix = format!("{key}.");
                return inner
                    .iter()
                    .try_for_each(|(name, value)| add(items, &prefix, name, value));
            }
            // A set, as of nodes.
            Value::Array(members) if members.iter().all(Value::is_u64) => {
                let members: Vec<String> = members.iter().map(Value::to_string).collect();
                format!("{key}={}", members.join(":"))
            }
            Value::Null | Value::Array(_) => {
                return Err(format!(
                    "{key} is {value}; allowed: text, a number, true, false"
                ));
            }
        });
        Ok(())
    }
    match crate::qmp::json_object(raw)? {
        serde_json::Value::Object(members) => {
            let mut items = Vec::new();
            for (name, value) in &members {
                add(&mut items, "", name, value)?;
            }
            Ok(items)
        }
        _ => Err("is no JSON object".into()),
    }
}

fn is_key(text: &str) -> bool {
    text.chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// Whether `text` can name something.
pub(super) fn is_id(text: &str) -> bool {
    (1..=ipc::limits::MAX_ID).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '/'))
}

/// `on`, `true`, `yes` and their opposites, in any case.
fn read_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" => Some(true),
        "off" | "false" | "no" => Some(false),
        _ => None,
    }
}

/// A number in decimal or, after `0x`, in hexadecimal digits. No sign, no space.
pub(super) fn read_int(text: &str) -> Option<u64> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |hex| (hex, 16));
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

/// Bytes of a window.
fn read_window(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let shift = match text.as_bytes().last()? {
        b'm' | b'M' => 20,
        b'g' | b'G' => 30,
        _ => return None,
    };
    let digits = &text[..text.len() - 1];
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let bytes = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    let allowed = (limits::DAX_UNIT..=limits::MAX_DAX_WINDOW).contains(&bytes)
        && bytes.is_multiple_of(limits::DAX_UNIT);
    allowed.then_some(bytes)
}

/// Bytes; a whole number of MiB, at most the manual's. `shift` is the unit of a number that has none.
fn read_size(text: &str, shift: u32) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, shift),
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let bytes = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    let range = 1 << 20..=ipc::limits::MAX_MEMORY;
    (range.contains(&bytes) && bytes.is_multiple_of(1 << 20)).then_some(bytes)
}

pub(crate) fn read_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // An odd first byte is a group address, which no card may have (IEEE 802, 8.2).
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// A descriptor number. 0 to 2 are the standard streams.
fn read_fd(text: &str) -> Option<i32> {
    let fd = read_int(text).filter(|fd| (3..=65_535).contains(fd))?;
    i32::try_from(fd).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_are_escaped_by_doubling() {
        for (raw, want) in [
            ("", &[][..]),
            ("a", &["a"]),
            ("a,b=c", &["a", "b=c"]),
            ("file=/x,,y,id=z", &["file=/x,y", "id=z"]),
            ("a,,,b", &["a,", "b"]),
            ("a,", &["a"]),
        ] {
            assert_eq!(split(raw), want, "{raw}");
        }
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("128", Some(128 << 20)),
            ("256m", Some(256 << 20)),
            ("1G", Some(1 << 30)),
            ("1048576k", Some(1 << 30)),
            ("512g", Some(512 << 30)),
            ("127", Some(127 << 20)),
            ("0", None),
            ("513G", None),
            ("1.5G", None),
            ("131073k", None),
            ("", None),
            ("G", None),
            ("-1", None),
            ("+256", None),
            ("18446744073709551615G", None),
        ] {
            assert_eq!(read_size(text, 20), want, "{text}");
        }
    }

    #[test]
    fn macs() {
        assert_eq!(
            read_mac("12:34:56:78:9A:bc"),
            Some([0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc])
        );
        for text in [
            "",
            "12:34:56:78:9A",
            "12:34:56:78:9A:BC:DE",
            "1:2:3:4:5:6",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "+1:34:56:78:9A:BC",
        ] {
            assert_eq!(read_mac(text), None, "{text}");
        }
    }
}
