//! # Daemons that are started before their front end
//!
//! **Job.** Start a back end as its user would, and wait until it says that it listens.
//! **Who is not trusted.** The daemon: its end is waited for with a limit, and it is killed when its test is over.
//! **Why this way.** A front end that comes before the socket is there fails, and the line is the event to wait for.

use crate::wait::{Deadline, Watched};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Starts `program` with `words`, which say that its front end is descriptor 3, once for each kind of descriptor that is no unix
/// stream socket: `(what it is, exit status, what it said)`. One of the network would let others in than whoever has the host's
/// word.
///
/// # Errors
/// A descriptor cannot be made, or the program not be started.
pub fn with_descriptors_of_other_kinds(
    program: &Path,
    words: &[&OsStr],
) -> io::Result<Vec<(&'static str, Option<i32>, String)>> {
    let others: [(_, OwnedFd); 3] = [
        ("TCP", TcpListener::bind("127.0.0.1:0")?.into()),
        ("datagrams", UnixDatagram::unbound()?.into()),
        ("a file", File::open(program)?.into()),
    ];
    let one = |(what, other)| {
        let output = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"])
            .arg(program)
            .args(words)
            .stdin::<OwnedFd>(other)
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((what, output.status.code(), said))
    };
    others.into_iter().map(one).collect()
}

/// One that listens.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// What it had said by then.
    pub said: String,
}

impl Daemon {
    /// Starts `command` and reads its messages up to a line that has `ready` in it. Later ones go to this process's standard
    /// error.
    ///
    /// # Errors
    /// It cannot be started, or ends before.
    pub fn start(command: &mut Command, ready: &str) -> io::Result<Self> {
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let pipe = child.stderr.take();
        let mut daemon = Self {
            child,
            said: String::new(),
        };
        let mut log = BufReader::new(pipe.ok_or(io::ErrorKind::BrokenPipe)?);
        loop {
            let before = daemon.said.len();
            if log.read_line(&mut daemon.said)? == 0 {
                return Err(io::Error::other(format!(
                    "it ended before it was ready: {}",
                    daemon.said
                )));
            }
            if daemon.said.get(before..).is_some_and(|l| l.contains(ready)) {
                break;
            }
        }
        // Whatever else it says must not fill the pipe.
        std::thread::spawn(move || io::copy(&mut log, &mut io::stderr()));
        Ok(daemon)
    }

    /// `program` is `vhost_user_fs`, and shares `tree` with whoever comes to `socket`.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn sharing(
        program: &Path,
        tree: &Path,
        socket: &Path,
        options: &[&str],
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        command
            .arg("-source")
            .arg(tree)
            .arg("-socket-path")
            .arg(socket)
            .args(["-log-level", "info"])
            .args(options);
        Self::start(&mut command, "listening")
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It has not ended in time.
    pub fn wait(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        // One that was waited for already has no number any more.
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        if Watched::new(self.pid())?.ended(Deadline::after(limit))? {
            self.child.wait()
        } else {
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended by itself already, when all is well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
