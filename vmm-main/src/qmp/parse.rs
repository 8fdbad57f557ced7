//! One JSON value as QEMU's lexer and parser take it, which is a little more and a little less than JSON.
//!
//! **Job.** Text in single quotes is text, too; a member that comes twice is an error, because two readers could take one
//! each; the request's `id` is kept as it was written, whatever size its numbers have. **Who is not trusted.** The client: the
//! splitter has capped size and nesting, and nothing is looked up by position here.
//!
//! **Why this way.** `serde_json` takes the last of two equal members and rounds what does not fit 64 bits; a client that
//! numbers its requests must find its number again.

use std::fmt::Write as _;

use serde_json::{Map, Number, Value};

/// What a request is made of.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parsed {
    /// Its members, but for `id`.
    pub(super) value: Value,
    /// Its `id` as strict JSON.
    pub(super) id: Option<String>,
}

/// Reads `bytes`, which are one bracketed value.
///
/// # Errors
/// What is wrong, in the words that QEMU has for it.
pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "invalid UTF-8 sequence".to_owned())?;
    let mut parser = Parser {
        rest: text,
        depth: 0,
        id: None,
    };
    let value = parser.value()?;
    parser.space();
    match parser.rest.chars().next() {
        None => Ok(Parsed {
            value,
            id: parser.id,
        }),
        Some(stray) => Err(format!("stray '{stray}'")),
    }
}

/// A JSON object outside QMP: an option's argument on the command line.
///
/// # Errors
/// What is wrong.
pub(crate) fn json_object(text: &str) -> Result<Value, String> {
    let told = |why| format!("JSON parse error, {why}");
    let parsed = parse(text.as_bytes()).map_err(told)?;
    let mut value = parsed.value;
    if let (Some(id), Some(members)) = (parsed.id, value.as_object_mut()) {
        // Kept aside as it was written, for requests; here it is a member like others.
        let id = serde_json::from_str(&id).map_err(|why| told(why.to_string()))?;
        members.insert("id".into(), id);
    }
    Ok(value)
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
    id: Option<String>,
}

impl<'a> Parser<'a> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
    }

    /// Whether `wanted` comes next; if so it is taken.
    fn take(&mut self, wanted: char) -> bool {
        self.space();
        match self.rest.strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn value(&mut self) -> Result<Value, String> {
        self.space();
        match self.rest.chars().next() {
            Some('{') => self.nested(Self::object),
            Some('[') => self.nested(Self::array),
            Some('"' | '\'') => self.text().map(Value::String),
            Some('-' | '0'..='9') => number(self.number()?),
            Some('a'..='z') => match self.word() {
                "true" => Ok(Value::Bool(true)),
                "false" => Ok(Value::Bool(false)),
                "null" => Ok(Value::Null),
                other => Err(format!("invalid keyword '{}'", shown(other))),
            },
            Some(':' | ',' | '}' | ']') | None => Err("expecting value".into()),
            Some(other) => Err(format!("stray '{}'", other.escape_debug())),
        }
    }

    fn nested(&mut self, inner: fn(&mut Self) -> Result<Value, String>) -> Result<Value, String> {
        if self.depth == ipc::limits::MAX_QMP_NESTING {
            return Err("nested too deeply".into());
        }
        self.depth += 1;
        let value = inner(self);
        self.depth -= 1;
        value
    }

    fn object(&mut self) -> Result<Value, String> {
        let mut members = Map::new();
        self.take('{');
        if self.take('}') {
            return Ok(members.into());
        }
        loop {
            self.space();
            if !self.rest.starts_with(['"', '\'']) {
                return Err("key is not a string in object".into());
            }
            let name = self.text()?;
            if !self.take(':') {
                return Err("missing : in object pair".into());
            }
            let is_id = self.depth == 1 && name == "id";
            if members.contains_key(&name) || (is_id && self.id.is_some()) {
                return Err(format!("duplicate key '{}'", shown(&name)));
            }
            if is_id {
                let mut id = String::new();
                self.copy(&mut id)?;
                self.id = Some(id);
            } else {
                let value = self.value()?;
                members.insert(name, value);
            }
            if self.take('}') {
                return Ok(members.into());
            }
            if !self.take(',') {
                return Err("expected separator in dict".into());
            }
        }
    }

    fn array(&mut self) -> Result<Value, String> {
        let mut list = Vec::new();
        self.take('[');
        if self.take(']') {
            return Ok(list.into());
        }
        loop {
            list.push(self.value()?);
            if self.take(']') {
                return Ok(list.into());
            }
            if !self.take(',') {
                return Err("expected separator in list".into());
            }
        }
    }

    /// Copies the next value as strict JSON.
    fn copy(&mut self, out: &mut String) -> Result<(), String> {
        let start = self.rest;
        self.value_or_large_number()?;
        let written = &start[..start.len() - self.rest.len()];
        let mut rest = Parser {
            rest: written,
            depth: 0,
            id: None,
        };
        loop {
            rest.space();
            match rest.rest.chars().next() {
                None => return Ok(()),
                Some('"' | '\'') => {
                    let text = rest.text()?;
                    let _ = write!(out, "{}", Value::String(text));
                }
                Some(other) => {
                    out.push(other);
                    rest.rest = &rest.rest[other.len_utf8()..];
                }
            }
        }
    }

    /// Like [`Parser::value`], for a value that is only copied: a number of any size will do.
    fn value_or_large_number(&mut self) -> Result<(), String> {
        self.space();
        if self
            .rest
            .starts_with(|c: char| c == '-' || c.is_ascii_digit())
        {
            self.number().map(|_| ())
        } else {
            self.value().map(|_| ())
        }
    }

    /// A number as it is written (RFC 8259, section 6).
    fn number(&mut self) -> Result<&'a str, String> {
        let start = self.rest;
        let digits = |rest: &'a str| rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let mut rest = start.strip_prefix('-').unwrap_or(start);
        let whole = rest;
        rest = digits(rest);
        let count = whole.len() - rest.len();
        let mut good = count == 1 || (count > 1 && !whole.starts_with('0'));
        if let Some(fraction) = rest.strip_prefix('.') {
            rest = digits(fraction);
            good &= rest.len() < fraction.len();
        }
        if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
            let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            rest = digits(exponent);
            good &= rest.len() < exponent.len();
        }
        let written = &start[..start.len() - rest.len()];
        self.rest = rest;
        if good {
            Ok(written)
        } else {
            Err(format!("invalid number '{}'", shown(written)))
        }
    }

    fn word(&mut self) -> &'a str {
        let rest = self
            .rest
            .trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '_');
        let word = &self.rest[..self.rest.len() - rest.len()];
        self.rest = rest;
        word
    }

    /// A text in the quotes that come next.
    fn text(&mut self) -> Result<String, String> {
        let mut chars = self.rest.chars();
        let quote = chars.next();
        let mut text = String::new();
        loop {
            match chars.next() {
                None => return Err("unterminated string".into()),
                end if end == quote => break,
                Some('\\') => text.push(escape(&mut chars)?),
                Some(control @ '\0'..='\x1f') => {
                    return Err(format!(
                        "control character {:#04x} in a string",
                        u32::from(control)
                    ));
                }
                Some(other) => text.push(other),
            }
        }
        self.rest = chars.as_str();
        Ok(text)
    }
}

/// What follows a backslash.
fn escape(chars: &mut std::str::Chars<'_>) -> Result<char, String> {
    Ok(match chars.next() {
        Some('b') => '\x08',
        Some('f') => '\x0c',
        Some('n') => '\n',
        Some('r') => '\r',
        Some('t') => '\t',
        Some(same @ ('"' | '\'' | '\\' | '/')) => same,
        Some('u') => {
            let first = hex(chars)?;
            let invalid = || Err(format!("invalid Unicode sequence '\\u{first:04x}'"));
            match first {
                // A pair of surrogates is one character (RFC 8259, section 7).
                0xd800..=0xdbff => {
                    if chars.next() != Some('\\') || chars.next() != Some('u') {
                        return invalid();
                    }
                    match hex(chars)? {
                        second @ 0xdc00..=0xdfff => {
                            let code = 0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00);
                            char::from_u32(code).map_or_else(invalid, Ok)?
                        }
                        _ => return invalid(),
                    }
                }
                _ => char::from_u32(first).map_or_else(invalid, Ok)?,
            }
        }
        Some(other) => {
            return Err(format!(
                "invalid escape sequence '\\{}'",
                other.escape_debug()
            ));
        }
        None => return Err("unterminated string".into()),
    })
}

/// Four hexadecimal digits.
fn hex(chars: &mut std::str::Chars<'_>) -> Result<u32, String> {
    let mut code = 0;
    for _ in 0..4 {
        let digit = chars.next().and_then(|digit| digit.to_digit(16));
        code = code * 16 + digit.ok_or("invalid escape sequence '\\u'")?;
    }
    Ok(code)
}

/// The number that `written` stands for: exact up to 64 bits.
fn number(written: &str) -> Result<Value, String> {
    let exact = written
        .parse::<i64>()
        .map(Number::from)
        .or_else(|_| written.parse::<u64>().map(Number::from));
    exact
        .ok()
        .or_else(|| written.parse::<f64>().ok().and_then(Number::from_f64))
        .map(Value::Number)
        .ok_or_else(|| format!("number '{}' is out of range", shown(written)))
}

fn shown(text: &str) -> String {
    super::schema::check::shown(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn value(text: &str) -> Value {
        parse(text.as_bytes())
            .unwrap_or_else(|why| panic!("{text}: {why}"))
            .value
    }

    #[test]
    fn what_json_is() {
        for text in [
            "{}",
            "[]",
            " {\"a\" : [ 1 , -2.5e3 , null , true , false , \"x\" ] } ",
            "{\"a\":{\"b\":{\"c\":[[],{}]}}}",
            "[0, -1, 18446744073709551615, -9223372036854775808, 1e-2, 0.5E+2]",
            "[\"\\u00e4\\ud83d\\ude00\\\"\\\\\\/\\b\\f\\n\\r\\t\", \"\u{e4}\u{1f600}\"]",
        ] {
            let theirs: Value = serde_json::from_str(text).unwrap();
            assert_eq!(value(text), theirs, "{text}");
        }
    }

    #[test]
    fn what_qemu_takes_beyond_json() {
        assert_eq!(
            value("{'execute': 'quit', 'a': 'it\\'s \"so\"'}"),
            json!({ "execute": "quit", "a": "it's \"so\"" })
        );
        assert_eq!(value("[\"\\'\"]"), json!(["'"]));
    }

    #[test]
    fn what_is_refused() {
        for (text, why) in [
            ("{\"a\":1,\"a\":2}", "duplicate key 'a'"),
            ("{\"id\":1,\"id\":2}", "duplicate key 'id'"),
            ("{\"x\":{\"b\":1,'b':2}}", "duplicate key 'b'"),
            ("{1:2}", "key is not a string in object"),
            ("{\"a\":1,}", "key is not a string in object"),
            ("{\"a\" 1}", "missing : in object pair"),
            ("{\"a\":}", "expecting value"),
            ("{\"a\":1 \"b\":2}", "expected separator in dict"),
            ("[1 2]", "expected separator in list"),
            ("[1,]", "expecting value"),
            ("[tru]", "invalid keyword 'tru'"),
            ("[nullx]", "invalid keyword 'nullx'"),
            ("[True]", "stray 'T'"),
            ("[01]", "invalid number '01'"),
            ("[1.]", "invalid number '1.'"),
            ("[-]", "invalid number '-'"),
            ("[1e]", "invalid number '1e'"),
            ("[1e999]", "number '1e999' is out of range"),
            ("[\"\\x\"]", "invalid escape sequence '\\x'"),
            ("[\"\\u12g4\"]", "invalid escape sequence '\\u'"),
            ("[\"\\ud800\"]", "invalid Unicode sequence '\\ud800'"),
            ("[\"\\udc00\"]", "invalid Unicode sequence '\\udc00'"),
            ("[\"a\tb\"]", "control character 0x09 in a string"),
            ("{} {}", "stray '{'"),
            ("{'id': [1e]}", "invalid number '1e'"),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(why.to_owned()), "{text}");
        }
        assert_eq!(
            parse(b"[\"\xff\"]"),
            Err("invalid UTF-8 sequence".to_owned())
        );
        let deep = "[".repeat(ipc::limits::MAX_QMP_NESTING + 1);
        assert_eq!(parse(deep.as_bytes()), Err("nested too deeply".to_owned()));
    }

    #[test]
    fn an_id_is_kept_as_it_was_written() {
        for (written, kept) in [
            ("18446744073709551617", "18446744073709551617"),
            ("1e999", "1e999"),
            ("-0", "-0"),
            ("0.10", "0.10"),
            ("'it\\'s'", "\"it's\""),
            ("[ 1 , {'a' : null} ]", "[1,{\"a\":null}]"),
            ("null", "null"),
        ] {
            let text = format!("{{'execute':'x','id': {written} }}");
            let parsed = parse(text.as_bytes()).unwrap();
            assert_eq!(parsed.id.as_deref(), Some(kept));
            assert_eq!(parsed.value, json!({ "execute": "x" }));
        }
        assert_eq!(parse(b"{\"x\":{\"id\":1}}").unwrap().id, None);
    }
}
