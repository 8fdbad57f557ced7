//! # Snapshots of Firecracker
//!
//! **Job.** Make one of the bare guest that our own snapshots are measured with, and start clones of it, through Firecracker's API.
//! **Who is not trusted.** Nobody. **Why this way.** Firecracker is what people restore by the thousand. Its manual's way is taken: a
//! process, one request that maps the memory file privately and resumes (`PUT /snapshot/load`); nothing is tuned. The client is a few lines of
//! HTTP, whose requests have no body worth a crate.

use super::peers;
use serde_json::{Value, json};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tests::payload::Payload;
use tests::wait::Deadline;

/// How long a request may take, and a socket to come.
const LIMIT: Duration = Duration::from_secs(60);
/// Of an answer no more is read.
const ANSWER: usize = 4096;

/// Firecracker as it is on PATH.
#[derive(Debug)]
pub(super) struct Firecracker {
    program: PathBuf,
}

impl Firecracker {
    /// `None` without one on PATH.
    pub(super) fn found() -> Option<Self> {
        peers::on_path("firecracker").map(|program| Self { program })
    }

    /// Makes a snapshot in `folder` of a guest that has `memory_mib` and wrote to `touched_mib` of them.
    pub(super) fn make(
        &self,
        memory_mib: u64,
        touched_mib: u64,
        folder: &Path,
    ) -> Result<(), String> {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let socket = folder.join("make");
        let mut child = self.start(&socket)?;
        let made = (|| {
            let boot = json!({
                "kernel_image_path": Payload::Restored.path(),
                "boot_args": format!("touch={touched_mib}"),
            });
            request(&socket, "PUT", "/boot-source", &boot)?;
            let size = json!({"vcpu_count": 1, "mem_size_mib": memory_mib});
            request(&socket, "PUT", "/machine-config", &size)?;
            let start = json!({"action_type": "InstanceStart"});
            request(&socket, "PUT", "/actions", &start)?;
            first_byte(&mut child)?;
            request(&socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
            let [state, memory] = files(folder);
            let create = json!({"snapshot_path": state, "mem_file_path": memory});
            request(&socket, "PUT", "/snapshot/create", &create)
        })();
        super::restore::end(&mut child);
        made
    }

    /// Starts a clone; its guest runs on when this returns.
    pub(super) fn restore(&self, folder: &Path) -> Result<Child, String> {
        let socket = folder.join("restore");
        let mut child = self.start(&socket)?;
        let [state, memory] = files(folder);
        let load = json!({
            "snapshot_path": state,
            "mem_backend": {"backend_path": memory, "backend_type": "File"},
            "resume_vm": true,
        });
        if let Err(error) = request(&socket, "PUT", "/snapshot/load", &load) {
            super::restore::end(&mut child);
            return Err(error);
        }
        Ok(child)
    }

    fn start(&self, socket: &Path) -> Result<Child, String> {
        let _ = fs::remove_file(socket);
        Command::new(&self.program)
            .arg("--api-sock")
            .arg(socket)
            // Its log goes where the guest's serial port does.
            .args(["--level", "Error"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{}: {e}", self.program.display()))
    }
}

fn files(folder: &Path) -> [PathBuf; 2] {
    ["state", "memory"].map(|name| folder.join(name))
}

fn first_byte(child: &mut Child) -> Result<(), String> {
    let output = child.stdout.as_mut().ok_or("no output")?;
    output
        .read_exact(&mut [0])
        .map_err(|e| format!("Firecracker's guest says nothing: {e}"))
}

/// One request on a connection of its own; every answer that is wanted here is 204.
fn request(socket: &Path, method: &str, path: &str, body: &Value) -> Result<(), String> {
    let failed = |e: io::Error| format!("Firecracker's {method} {path}: {e}");
    let mut stream = connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(LIMIT)).map_err(failed)?;
    let body = body.to_string();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream
        .write_all((head + &body).as_bytes())
        .map_err(failed)?;
    let mut answer = vec![0; ANSWER];
    let length = stream.read(&mut answer).map_err(failed)?;
    let answer = String::from_utf8_lossy(&answer[..length]);
    if answer.starts_with("HTTP/1.1 204") {
        return Ok(());
    }
    Err(format!("Firecracker's {method} {path}: {answer}"))
}

/// No event tells that a socket listens, and a pause would count as Firecracker's time, so this asks without one.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let deadline = Deadline::after(LIMIT);
    loop {
        match UnixStream::connect(socket) {
            Err(e)
                if !deadline.left().is_zero()
                    && matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) =>
            {
                std::thread::yield_now();
            }
            other => return other,
        }
    }
}
