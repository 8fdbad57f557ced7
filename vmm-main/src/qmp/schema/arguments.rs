//! A command's arguments after the check, by name and with their types.
//!
//! **Job.** Spare each command the unwrapping of JSON. **Who is not trusted.** The client; but [`super::check`] has seen the
//! arguments, so a name that the command's table requires is there and of its type. **Why this way.** A getter that is
//! asked for something else than the table says gives nothing and never panics.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Map, Value};

/// Checked arguments.
#[derive(Debug, Clone, Default)]
pub struct Arguments {
    members: Map<String, Value>,
    fds: Vec<Arc<OwnedFd>>,
}

impl Arguments {
    pub(super) const fn new(checked: Map<String, Value>) -> Self {
        Self {
            members: checked,
            fds: Vec::new(),
        }
    }

    /// Names of what was not taken yet.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// A text, if it is there.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.members.remove(name)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A text that the table requires.
    pub fn required_text(&mut self, name: &str) -> String {
        self.text(name).unwrap_or_default()
    }

    /// A list of text; empty if it is not there.
    pub fn texts(&mut self, name: &str) -> Vec<String> {
        match self.members.remove(name) {
            Some(Value::Array(list)) => list
                .into_iter()
                .filter_map(|one| match one {
                    Value::String(text) => Some(text),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    /// A whole number, if it is there.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.members.get(name)?.as_i64()
    }

    /// A whole number from 0 on, if it is there.
    pub fn uint(&self, name: &str) -> Option<u64> {
        self.members.get(name)?.as_u64()
    }

    /// on or off, if it is there.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.members.get(name)?.as_bool()
    }

    /// Any value, if it is there.
    pub fn value(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name)
    }

    /// The members of an object; none if it is not there.
    pub fn object(&mut self, name: &str) -> Self {
        match self.members.remove(name) {
            Some(Value::Object(members)) => Self {
                members,
                fds: Vec::new(),
            },
            _ => Self::default(),
        }
    }

    /// Everything that was not asked for yet.
    pub fn rest(self) -> Map<String, Value> {
        self.members
    }

    /// The value at the end of these names, which lead through objects.
    pub fn at(&self, names: &[&str]) -> Option<&Value> {
        let (first, rest) = names.split_first()?;
        rest.iter()
            .try_fold(self.members.get(*first)?, |value, name| value.get(*name))
    }

    /// Puts a descriptor that the client passed to what the arguments name.
    pub(in crate::qmp) fn bring(&mut self, fds: Vec<Arc<OwnedFd>>) {
        self.fds = fds;
    }

    /// Those, to hold them as well.
    pub(in crate::qmp) fn brought(&self) -> Vec<Arc<OwnedFd>> {
        self.fds.clone()
    }

    /// Descriptors that came along.
    pub fn descriptors(&mut self) -> Vec<Arc<OwnedFd>> {
        std::mem::take(&mut self.fds)
    }
}
