//! One client's side of the protocol, without its socket: bytes in, steps out.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use ipc::limits::{MAX_QMP_REQUEST, MAX_QMP_WAITING_FDS};
use ipc::spec::vm::{CpuSpec, MachineKind, MemorySpec, VmSpec};

use super::command::{Outbox, QmpError, Ticket, VmCommand, answer};
use super::descriptors::{Descriptors, Desk};
use super::json::{Broken, Splitter};
use super::parse::Parsed;
use super::schema::check::shown;
use super::schema::{self, Arguments, Command, Run};

/// What queries answer that never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// `-name`
    pub name: Option<String>,
    /// `-uuid`
    pub uuid: Option<[u8; 16]>,
    /// The board.
    pub machine: MachineKind,
    /// The topology.
    pub cpus: CpuSpec,
    /// Guest RAM, and its nodes.
    pub memory: MemorySpec,
}

impl From<&VmSpec> for Info {
    fn from(spec: &VmSpec) -> Self {
        Self {
            name: spec.name.clone(),
            uuid: spec.uuid,
            machine: spec.machine.kind,
            cpus: spec.cpus,
            memory: spec.memory.clone(),
        }
    }
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Send this.
    Answer(String),
    /// Have main execute this, and take nothing more until it has answered.
    Forward(Forward),
    /// Send this and hang up.
    HangUp(String),
}

/// A command for main, until it is known whose it is.
#[derive(Debug)]
pub(super) struct Forward {
    pub(super) command: &'static Command,
    arguments: Arguments,
    build: fn(Ticket, Arguments) -> VmCommand,
    /// The request's id as JSON.
    pub(super) id: Option<String>,
}

impl Forward {
    /// Descriptors that go with it.
    pub(super) fn brings(&self) -> Vec<Arc<OwnedFd>> {
        self.arguments.brought()
    }

    /// The command, with the way back.
    pub(super) fn build(self, client: u64, info: &Arc<Info>, outbox: &Outbox) -> VmCommand {
        let ticket = Ticket {
            client,
            command: self.command,
            id: self.id,
            info: Arc::clone(info),
            outbox: outbox.clone(),
        };
        (self.build)(ticket, self.arguments)
    }
}

/// A client.
#[derive(Debug, Default)]
pub(super) struct Session {
    input: Splitter,
    negotiated: bool,
    /// Descriptors that came with bytes which were not looked at yet, and where these begin.
    arrived: VecDeque<(u64, OwnedFd)>,
    /// The last one that came with bytes that were.
    fresh: Option<OwnedFd>,
}

/// The first message to each client.
pub(super) fn greeting() -> String {
    json!({ "QMP": { "version": schema::version(), "capabilities": [] } }).to_string()
}

impl Session {
    /// Takes what has arrived: bytes, and the first of the descriptors that came with them.
    pub(super) fn push(&mut self, bytes: &[u8], fd: Option<OwnedFd>) {
        if let Some(fd) = fd {
            self.arrived.push_back((self.input.received(), fd));
            // As the newest counts, nobody misses the oldest of so many.
            if self.arrived.len() > MAX_QMP_WAITING_FDS {
                self.arrived.pop_front();
            }
        }
        self.input.push(bytes);
    }

    /// Whether the client is to get events.
    pub(super) fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// The next step; `None` when more has to arrive.
    /// `client` is whose session this is, `all` the descriptors that were passed before.
    pub(super) fn step(&mut self, info: &Info, client: u64, all: &mut Descriptors) -> Option<Step> {
        let parsed = self.input.next()?.map(super::parse::parse);
        // Those that came with the request or before it: the newest counts, as in QEMU.
        let position = self.input.position();
        while self.arrived.front().is_some_and(|(at, _)| *at < position) {
            self.fresh = self.arrived.pop_front().map(|(_, fd)| fd);
        }
        let parsed = match parsed {
            Ok(parsed) => parsed,
            Err(Broken::TooLarge) => {
                let error = QmpError::generic(format!(
                    "Request is too large; allowed: {MAX_QMP_REQUEST} bytes"
                ));
                return Some(Step::HangUp(answer(None, &Err(error))));
            }
            Err(why) => Err(match why {
                Broken::Control => "control character in a string",
                Broken::Bracket => "brackets do not match",
                Broken::Nesting => "nested too deeply",
                Broken::Garbage | Broken::TooLarge => "expecting an object",
            }
            .to_owned()),
        };
        let (id, result) = match parsed {
            Ok(Parsed {
                value: Value::Object(request),
                id,
            }) => (id, self.execute(info, client, all, request)),
            Ok(_) => (
                None,
                Err(QmpError::generic("QMP input must be a JSON object")),
            ),
            Err(why) => (
                None,
                Err(QmpError::generic(format!("JSON parse error, {why}"))),
            ),
        };
        Some(match result {
            Ok(Executed::Done(value)) => Step::Answer(answer(id.as_deref(), &Ok(value))),
            Ok(Executed::Forward(command, arguments, build)) => Step::Forward(Forward {
                command,
                arguments,
                build,
                id,
            }),
            Err(error) => Step::Answer(answer(id.as_deref(), &Err(error))),
        })
    }

    fn execute(
        &mut self,
        info: &Info,
        client: u64,
        all: &mut Descriptors,
        mut request: Map<String, Value>,
    ) -> Result<Executed, QmpError> {
        if request.contains_key("exec-oob") {
            return Err(QmpError::generic(
                "QMP input member 'exec-oob' is unexpected: oob is not offered",
            ));
        }
        let name = match request.remove("execute") {
            Some(Value::String(name)) => name,
            Some(_) => {
                return Err(QmpError::generic(
                    "QMP input member 'execute' must be a string",
                ));
            }
            None => return Err(QmpError::generic("QMP input lacks member 'execute'")),
        };
        let arguments = match request.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => {
                return Err(QmpError::generic(
                    "QMP input member 'arguments' must be an object",
                ));
            }
            None => Map::new(),
        };
        if let Some((other, _)) = request.into_iter().next() {
            return Err(QmpError::generic(format!(
                "QMP input member '{}' is unexpected",
                shown(&other)
            )));
        }
        let negotiating = name == "qmp_capabilities";
        if !self.negotiated && !negotiating {
            return Err(QmpError::command_not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        if self.negotiated && negotiating {
            return Err(QmpError::command_not_found(
                "Capabilities negotiation is already complete, command ignored",
            ));
        }
        let command = schema::find(&name)?;
        let mut arguments = schema::arguments(command, arguments)?;
        match command.run {
            Run::Capabilities => {
                // None is offered, so none can be enabled.
                if let Some(capability) = arguments.texts("enable").first() {
                    return Err(QmpError::generic(format!(
                        "Capability '{}' is not available; allowed: none",
                        shown(capability)
                    )));
                }
                self.negotiated = true;
                Ok(Executed::Done(json!({})))
            }
            Run::Here(run) => {
                let value = run(info, arguments)?;
                schema::assert_conforms(command.name, command.returns, &value);
                Ok(Executed::Done(value))
            }
            Run::Desk(run) => {
                let value = run(&mut self.desk(client, all), arguments)?;
                schema::assert_conforms(command.name, command.returns, &value);
                Ok(Executed::Done(value))
            }
            Run::Main(build) => {
                if let Some(brings) = command.brings {
                    brings(&mut self.desk(client, all), &mut arguments)?;
                }
                Ok(Executed::Forward(command, arguments, build))
            }
        }
    }

    fn desk<'a>(&'a mut self, client: u64, all: &'a mut Descriptors) -> Desk<'a> {
        Desk {
            client,
            fresh: &mut self.fresh,
            all,
        }
    }
}

enum Executed {
    Done(Value),
    Forward(
        &'static Command,
        Arguments,
        fn(Ticket, Arguments) -> VmCommand,
    ),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_comes_back_as_it_was_sent() {
        let info = Info {
            name: None,
            uuid: None,
            machine: MachineKind::Microvm,
            cpus: CpuSpec::default(),
            memory: MemorySpec::default(),
        };
        for id in [
            "3e91",
            "0.10",
            "123456789012345678901234567890",
            "[{\"a\":null}]",
        ] {
            let mut session = Session::default();
            let request = format!("{{\"execute\":\"qmp_capabilities\",\"id\":{id}}}");
            session.push(request.as_bytes(), None);
            let mut none = Descriptors::default();
            let Some(Step::Answer(answer)) = session.step(&info, 0, &mut none) else {
                panic!("{id} was not answered");
            };
            assert_eq!(answer, format!("{{\"return\":{{}},\"id\":{id}}}"));
        }
    }
}
