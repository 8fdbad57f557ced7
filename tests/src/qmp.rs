//! # A QMP client
//!
//! **Job.** Speak QMP over a unix socket: greeting, capabilities, commands with an id, events.
//! **Who is not trusted.** The server: a line has a limit, replies must carry the command's id.
//! **Why this way.** Tests need raw access too (wrong JSON, wrong order), which a ready-made client hides; that the
//! published client works as well is a test of its own.

use crate::wait::{Deadline, Watched, readable};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a reply may take; a VM answers in milliseconds, a nested one in tens of them.
const REPLY_LIMIT: Duration = Duration::from_secs(20);
/// The longest line taken, in bytes.
const LINE_LIMIT: usize = 4 << 20;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket.
    #[error("the QMP socket")]
    Io(#[from] io::Error),
    /// Nothing came in time.
    #[error("no {wanted} from QMP within {limit:?}")]
    Late {
        /// What was waited for.
        wanted: String,
        /// For how long.
        limit: Duration,
    },
    /// The server has closed the connection.
    #[error("QMP was closed before {0}")]
    Closed(String),
    /// The server sent something that is no QMP.
    #[error("not QMP: {0}")]
    Malformed(String),
    /// The command was refused.
    #[error("{class}: {description}")]
    Refused {
        /// The error class of QMP.
        class: String,
        /// Its description.
        description: String,
    },
}

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    bytes: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
    /// What the server said first.
    pub greeting: Value,
}

impl Qmp {
    /// Connects to a server that may be starting, and negotiates capabilities. `server` is the process that will
    /// listen; its end ends the wait.
    ///
    /// # Errors
    /// When nobody listens within `limit`, or the server does not greet.
    pub fn connect(socket: &Path, server: &Watched, limit: Duration) -> Result<Self, QmpError> {
        let mut qmp = Self::connect_raw(socket, server, limit)?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// As [`Self::connect`], but without negotiation.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_raw(socket: &Path, server: &Watched, limit: Duration) -> Result<Self, QmpError> {
        let deadline = Deadline::after(limit);
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e)
                    if !matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) =>
                {
                    return Err(e.into());
                }
                Err(_) if deadline.left().is_zero() => {
                    return Err(QmpError::Late {
                        wanted: "listener".into(),
                        limit,
                    });
                }
                // No event tells that a socket has begun to listen; the server's end is one that ends the wait.
                Err(_) => {
                    if server.ended(Deadline::after(Duration::from_millis(2)))? {
                        return Err(QmpError::Closed(
                            "a listener was there: the process has ended".into(),
                        ));
                    }
                }
            }
        };
        let mut qmp = Self {
            stream,
            bytes: Vec::new(),
            events: VecDeque::new(),
            next_id: 1,
            greeting: Value::Null,
        };
        qmp.greeting = qmp.read_object("greeting", Deadline::after(limit), limit)?;
        if qmp.greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed(format!("{} as greeting", qmp.greeting)));
        }
        Ok(qmp)
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Errors
    /// When it is refused, or no reply comes.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, &[])
    }

    /// As [`Self::execute`], with descriptors that go with the command.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({"execute": command, "id": id});
        if arguments.as_object().is_none_or(|a| !a.is_empty()) {
            request["arguments"] = arguments;
        }
        self.send_with(&format!("{request}\r\n"), fds)?;
        let reply = self.reply(command)?;
        if reply.get("id") != Some(&json!(id)) {
            return Err(QmpError::Malformed(format!(
                "the reply to {command} has another id: {reply}"
            )));
        }
        if let Some(error) = reply.get("error") {
            let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
            return Err(QmpError::Refused {
                class: text("class"),
                description: text("desc"),
            });
        }
        reply
            .get("return")
            .cloned()
            .ok_or_else(|| QmpError::Malformed(reply.to_string()))
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// When the socket cannot be written.
    pub fn send_raw(&mut self, text: &str) -> Result<(), QmpError> {
        Ok(self.stream.write_all(text.as_bytes())?)
    }

    /// The same, with descriptors.
    ///
    /// # Errors
    /// When the socket cannot be written.
    pub fn send_with(&mut self, text: &str, fds: &[BorrowedFd<'_>]) -> Result<(), QmpError> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(text.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(io::Error::from)?;
        self.send_raw(&text[sent..])
    }

    /// The next object that is no event.
    ///
    /// # Errors
    /// When none comes.
    pub fn reply(&mut self, to: &str) -> Result<Value, QmpError> {
        let deadline = Deadline::after(REPLY_LIMIT);
        loop {
            let object = self.read_object(&format!("reply to {to}"), deadline, REPLY_LIMIT)?;
            if object.get("event").is_some() {
                self.events.push_back(object);
            } else {
                return Ok(object);
            }
        }
    }

    /// Waits for the event `name`, and drops earlier ones.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value, QmpError> {
        let deadline = Deadline::after(limit);
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read_object(&format!("event {name}"), deadline, limit)?,
            };
            if event["event"] == name {
                return Ok(event);
            }
        }
    }

    /// Waits until `device` is given up, which may have been before this client came.
    ///
    /// # Errors
    /// When it is not, or another one is.
    pub fn wait_failed(&mut self, device: &str, limit: Duration) -> Result<(), QmpError> {
        let all = self.execute("query-workloads", json!({}))?;
        let is = |one: &Value| one["module"] == device && one["state"] == "failed";
        if all.as_array().is_some_and(|all| all.iter().any(is)) {
            return Ok(());
        }
        let event = self.wait_event("DEVICE_FAILED", limit)?;
        if event["data"]["device"] == device {
            Ok(())
        } else {
            Err(QmpError::Malformed(format!("of another device: {event}")))
        }
    }

    /// The next event, if one comes within `limit`.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn next_event(&mut self, limit: Duration) -> Result<Option<Value>, QmpError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match self.read_object("event", Deadline::after(limit), limit) {
            Ok(event) => Ok(Some(event)),
            Err(QmpError::Late { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read_object(
        &mut self,
        wanted: &str,
        deadline: Deadline,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        loop {
            if let Some(end) = self.bytes.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                let text = String::from_utf8_lossy(&line);
                if text.trim().is_empty() {
                    continue;
                }
                return serde_json::from_str(&text)
                    .map_err(|e| QmpError::Malformed(format!("{e} in {text}")));
            }
            if self.bytes.len() > LINE_LIMIT {
                return Err(QmpError::Malformed(format!(
                    "a line of more than {LINE_LIMIT} bytes"
                )));
            }
            if readable(&[self.stream.as_fd()], deadline)?.is_none() {
                return Err(QmpError::Late {
                    wanted: wanted.to_owned(),
                    limit,
                });
            }
            let mut chunk = [0; 4096];
            let count = self.stream.read(&mut chunk)?;
            if count == 0 {
                return Err(QmpError::Closed(wanted.to_owned()));
            }
            self.bytes.extend_from_slice(&chunk[..count]);
        }
    }
}

impl AsFd for Qmp {
    /// The connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
