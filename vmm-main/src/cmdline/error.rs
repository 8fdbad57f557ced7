//! The one error that a wrong command line ends with.

use std::fmt;

/// Characters of a value that an error repeats; a longer one is cut.
const MAX_SHOWN: usize = 600;

/// What is wrong with a command line: one line, which names option, value and what is allowed.
///
/// It prints as `-option value: text`; whoever ends the program puts `stratovirt: ` before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CmdlineError {
    option: String,
    value: String,
    text: String,
}

impl CmdlineError {
    /// An error about `value` of `option`, which has its dash. Both may be empty.
    pub(super) fn new(option: &str, value: &str, text: impl Into<String>) -> Self {
        Self {
            option: option.to_owned(),
            value: value.to_owned(),
            text: text.into(),
        }
    }
}

impl std::error::Error for CmdlineError {}

impl fmt::Display for CmdlineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.option.is_empty() {
            write!(f, "{}", shown(&self.option))?;
            if !self.value.is_empty() {
                write!(f, " {}", shown(&self.value))?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&shown(&self.text))
    }
}

/// `text` on one line and of bounded length: arguments may hold anything, also what a terminal obeys.
fn shown(text: &str) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == MAX_SHOWN {
            out.push('…');
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// `items` as a list for an error or a page: `a, b, c`.
pub(super) fn list<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    let mut out = String::new();
    for item in items {
        if !out.is_empty() {
            out.push_str(", ");
        }
        out.push_str(item);
    }
    out
}
