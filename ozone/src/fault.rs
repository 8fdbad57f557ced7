//! The one error that building an outer jail ends with.

use nix::errno::Errno;
use std::fmt;

/// Characters of one error that are shown; a longer one is cut.
const MAX_SHOWN: usize = 600;

/// What could not be done: the argument or the thing that it was for, why, and what the kernel said.
///
/// Prints as one line, `subject: what: reason`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) struct Fault {
    subject: String,
    what: String,
    #[source]
    errno: Option<Errno>,
}

impl Fault {
    /// Something that the kernel did not refuse, but that is wrong all the same.
    pub(crate) fn new(subject: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            what: what.into(),
            errno: None,
        }
    }

    /// Something that the kernel refused.
    pub(crate) fn os(subject: impl Into<String>, what: impl Into<String>, errno: Errno) -> Self {
        Self {
            subject: subject.into(),
            what: what.into(),
            errno: Some(errno),
        }
    }

    /// Whether it failed because a folder that was just there is gone: somebody else cleaned up.
    pub(crate) fn is_vanished(&self) -> bool {
        matches!(self.errno, Some(Errno::ENOENT | Errno::ENODEV))
    }
}

/// How often a start tries again when others remove the folders that all share, as the last one to
/// leave does. Each time means that somebody else got something done.
pub(crate) const TRIES: usize = 32;

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", shown(&self.subject), shown(&self.what))?;
        match self.errno {
            Some(errno) => write!(f, ": {}", errno.desc()),
            None => Ok(()),
        }
    }
}

/// `text` on one line and of bounded length: arguments may hold anything, also what a terminal obeys.
pub(crate) fn shown(text: &str) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_and_length_are_tamed() {
        let fault = Fault::os("-name \x1b[2J", "no\nway", Errno::EPERM);
        assert_eq!(
            fault.to_string(),
            "-name \\u{1b}[2J: no\\nway: Operation not permitted"
        );
        assert_eq!(shown(&"x".repeat(700)).chars().count(), MAX_SHOWN + 1);
    }
}
