//! The language of the schema: types, commands and events as data.
//!
//! **Job.** Plain `const` values that everything else reads: the argument check, `query-qmp-schema`, the manual page.
//! **Who is not trusted.** Nobody: this is part of the program. **Why this way.** Constants cost nothing at start, and a
//! command that is not in a table cannot be called at all.

use serde_json::{Map, Value};

use super::super::command::{QmpError, Ticket, VmCommand};
use super::super::descriptors::Desk;
use super::super::session::Info;
use super::Arguments;

/// Type of a value.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// Text of at most this many bytes.
    Text(usize),
    /// on or off.
    Bool,
    /// A whole number in this range, its ends included.
    Int(i64, u64),
    /// Any number.
    Number,
    /// null.
    Null,
    /// Anything.
    Any,
    /// A list.
    List(&'static Self),
    /// One of several words.
    Enum(&'static Enum),
    /// Named members.
    Object(&'static Object),
    /// One of several types, told apart by what JSON shows.
    OneOf(&'static OneOf),
}

impl Type {
    /// Text of any length that a request can have.
    pub const TEXT: Self = Self::Text(ipc::limits::MAX_QMP_REQUEST);
    /// An id.
    pub const ID: Self = Self::Text(ipc::limits::MAX_ID);
    /// A list of text.
    pub const TEXTS: Self = Self::List(&Self::TEXT);
    /// A whole number from 0 on.
    pub const UINT: Self = Self::Int(0, u64::MAX);
    /// A whole number.
    pub const INT: Self = Self::Int(i64::MIN, i64::MAX as u64);
    /// No members: what a command without result returns.
    pub const NOTHING: Self = Self::Object(&Object {
        name: "q_empty",
        members: &[],
        variants: None,
    });
}

/// Words of which one is chosen.
#[derive(Debug)]
pub struct Enum {
    /// Its name.
    pub name: &'static str,
    /// The words.
    pub values: &'static [&'static str],
}

/// Members by their names.
#[derive(Debug)]
pub struct Object {
    /// Its name.
    pub name: &'static str,
    /// The members that are always possible.
    pub members: &'static [Member],
    /// More of them, by the value of one of these.
    pub variants: Option<Variants>,
}

/// Members that depend on the value of another one.
#[derive(Debug, Clone, Copy)]
pub struct Variants {
    /// That member; of an [`Enum`] type.
    pub tag: &'static str,
    /// Value and further members; a value that is not here adds none.
    pub cases: &'static [(&'static str, &'static Object)],
}

/// Types of which one is there.
#[derive(Debug)]
pub struct OneOf {
    /// Its name.
    pub name: &'static str,
    /// The types.
    pub types: &'static [Type],
}

/// A member of an object.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Type,
    /// Whether it may be left out.
    pub optional: bool,
    /// What it is, without full stop.
    pub help: &'static str,
}

/// A member that has to be there.
pub(super) const fn must(name: &'static str, kind: Type, help: &'static str) -> Member {
    Member {
        name,
        kind,
        optional: false,
        help,
    }
}

/// A member that may be left out.
pub(super) const fn may(name: &'static str, kind: Type, help: &'static str) -> Member {
    Member {
        name,
        kind,
        optional: true,
        help,
    }
}

/// An object without variants.
pub(super) const fn object(name: &'static str, members: &'static [Member]) -> Object {
    Object {
        name,
        members,
        variants: None,
    }
}

/// Who answers.
#[derive(Clone, Copy)]
pub(crate) enum Run {
    /// The negotiation.
    Capabilities,
    /// This thread.
    Here(fn(&Info, Arguments) -> Result<Value, QmpError>),
    /// This thread, from what it keeps of descriptors.
    Desk(fn(&mut Desk<'_>, Arguments) -> Result<Value, QmpError>),
    /// The main thread.
    Main(fn(Ticket, Arguments) -> VmCommand),
}

/// One command. Made by [`here`] or [`main`] and what is chained to it.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it does, in one or a few sentences without the last full stop.
    pub help: &'static str,
    /// Its arguments.
    pub arguments: &'static [Member],
    /// More arguments, by the value of one of these.
    pub variants: Option<Variants>,
    /// Arguments beyond these are handed on unchecked, because they depend on more than this table knows.
    pub open: bool,
    /// What it returns.
    pub returns: Type,
    /// What to use instead, for one that is only there for old clients.
    pub deprecated: &'static str,
    /// Puts descriptors to the arguments that name some.
    pub(crate) brings: Option<Brings>,
    pub(crate) run: Run,
}

/// See [`Command::brings`].
pub(crate) type Brings = fn(&mut Desk<'_>, &mut Arguments) -> Result<(), QmpError>;

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

const fn command(name: &'static str, help: &'static str, run: Run) -> Command {
    Command {
        name,
        help,
        arguments: &[],
        variants: None,
        open: false,
        returns: Type::NOTHING,
        deprecated: "",
        brings: None,
        run,
    }
}

/// A command that the QMP thread answers itself.
pub(super) const fn here(
    name: &'static str,
    help: &'static str,
    run: fn(&Info, Arguments) -> Result<Value, QmpError>,
) -> Command {
    command(name, help, Run::Here(run))
}

/// A command about descriptors, which the QMP thread keeps.
pub(super) const fn desk(
    name: &'static str,
    help: &'static str,
    run: fn(&mut Desk<'_>, Arguments) -> Result<Value, QmpError>,
) -> Command {
    command(name, help, Run::Desk(run))
}

/// A command for the main thread.
pub(super) const fn main(
    name: &'static str,
    help: &'static str,
    run: fn(Ticket, Arguments) -> VmCommand,
) -> Command {
    command(name, help, Run::Main(run))
}

/// The negotiation.
pub(super) const fn negotiation(name: &'static str, help: &'static str) -> Command {
    command(name, help, Run::Capabilities)
}

impl Command {
    /// With these arguments.
    pub(super) const fn takes(mut self, arguments: &'static [Member]) -> Self {
        self.arguments = arguments;
        self
    }

    /// With more arguments, by the value of one of those that it always takes.
    #[allow(dead_code)] // of use to back ends that have kinds
    pub(super) const fn varies(
        mut self,
        tag: &'static str,
        cases: &'static [(&'static str, &'static Object)],
    ) -> Self {
        self.variants = Some(Variants { tag, cases });
        self
    }

    /// With arguments besides, which are checked by whoever executes it.
    #[allow(dead_code)] // of use to device_add
    pub(super) const fn takes_more(mut self) -> Self {
        self.open = true;
        self
    }

    /// With descriptors that its arguments name.
    pub(super) const fn brings(mut self, brings: Brings) -> Self {
        self.brings = Some(brings);
        self
    }

    /// With this result.
    pub(super) const fn returns(mut self, returns: Type) -> Self {
        self.returns = returns;
        self
    }

    /// Only there for old clients.
    pub(super) const fn deprecated(mut self, instead: &'static str) -> Self {
        self.deprecated = instead;
        self
    }
}

/// One event.
#[derive(Debug)]
pub struct EventDef {
    /// Its name.
    pub name: &'static str,
    /// When it is sent, without full stop.
    pub help: &'static str,
    /// Its data.
    pub data: &'static [Member],
}

/// An event.
pub(super) const fn event(
    name: &'static str,
    data: &'static [Member],
    help: &'static str,
) -> EventDef {
    EventDef { name, help, data }
}

/// Members by their names, as JSON has them.
pub(super) type Given = Map<String, Value>;
