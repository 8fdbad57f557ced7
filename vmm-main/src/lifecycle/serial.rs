//! The serial port's other end in the main loop.
//!
//! **Job.** Make a [`Chardev`] of each one that the command line uses, join it to the serial port, and poll it.
//! **Who is not trusted**: whoever reads or writes the other end; see [`crate::chardev`].
//! **Why this way.** A chardev is one descriptor to the main loop, whatever it is made of.

use std::io::Write;

use ipc::log::info;
use ipc::spec::vm::{ChardevBackend, VmSpec};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;

use super::poller::Poller;
use super::start::{Files, StartError};
use crate::chardev::{Chardev, EventSource};
use crate::cmdline::{ChardevPlan, Plan};
use crate::platform::serial::{SerialInput, SerialSink};
use crate::qmp::ChardevInfo;

/// The chardevs of a VM that something uses.
#[derive(Debug)]
pub(super) struct Chardevs {
    chardevs: Vec<(Chardev, ChardevInfo)>,
    /// Position of the serial port's.
    serial: Option<usize>,
}

impl Chardevs {
    /// Makes them of what the broker opened. Before lock-down: standard streams are opened again by path.
    pub(super) fn open(spec: &VmSpec, plan: &Plan, files: &mut Files) -> Result<Self, StartError> {
        let mut chardevs = Vec::with_capacity(plan.chardevs.len());
        for (id, chardev) in &plan.chardevs {
            let backend = spec
                .chardevs
                .iter()
                .find(|chardev| chardev.id == *id)
                .map(|c| &c.backend);
            let mut pty_name = None;
            let mut take = |file| {
                let (fd, name) = files.take_named(file)?;
                pty_name = name;
                Some(fd)
            };
            let made = match *chardev {
                ChardevPlan::Stdio => Some(Chardev::stdio(id)?),
                ChardevPlan::Pty { file } => {
                    take(file).map(|fd| Chardev::pty(id, fd)).transpose()?
                }
                ChardevPlan::Listener { file, wait } => take(file)
                    .map(|fd| Chardev::listening(id, fd, wait))
                    .transpose()?,
                ChardevPlan::Connected { file } => take(file)
                    .map(|fd| Chardev::connected(id, fd))
                    .transpose()?,
                ChardevPlan::Output { file } => {
                    take(file).map(|fd| Chardev::file(id, fd)).transpose()?
                }
            };
            if let Some(name) = &pty_name {
                // Whoever started this VM without QMP has no other way to learn it; QEMU prints the same line.
                let _ = writeln!(
                    std::io::stdout(),
                    "char device redirected to {name} (label {id})"
                );
            }
            if let Some(made) = made {
                let filename = filename(backend, pty_name.as_deref());
                chardevs.push((
                    made,
                    ChardevInfo {
                        label: id.clone(),
                        filename,
                        frontend_open: true,
                    },
                ));
            }
        }
        let serial = chardevs
            .iter()
            .position(|(_, info)| Some(&info.label) == spec.serial.as_ref());
        Ok(Self { chardevs, serial })
    }

    /// Where the serial port's output goes, if there is a serial port.
    pub(super) fn serial_sink(&self) -> Option<Box<dyn SerialSink>> {
        let (chardev, _) = self.chardevs.get(self.serial?)?;
        Some(Box::new(chardev.output()))
    }

    /// Joins input to the serial port, and adds all to the main loop with tokens from `first` on.
    pub(super) fn watch(
        &mut self,
        poller: &Poller,
        first: u64,
        input: Option<SerialInput>,
    ) -> Result<(), Errno> {
        if let (Some(serial), Some(input)) = (self.serial, input)
            && let Some((chardev, _)) = self.chardevs.get_mut(serial)
        {
            chardev.connect_input(Box::new(input));
        }
        for (token, (chardev, _)) in (first..).zip(&self.chardevs) {
            poller.add(chardev.fd(), token, EpollFlags::EPOLLIN)?;
        }
        Ok(())
    }

    /// Waits for the first client of each server without `nowait`.
    pub(super) fn wait_for_clients(&mut self) -> Result<(), Errno> {
        for (chardev, info) in &mut self.chardevs {
            while !chardev.is_ready() {
                info!(
                    "chardev {}: waiting for a client on {}",
                    info.label, info.filename
                );
                match poll(
                    &mut [PollFd::new(chardev.fd(), PollFlags::POLLIN)],
                    PollTimeout::NONE,
                ) {
                    Ok(_) | Err(Errno::EINTR) => chardev.handle(),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    /// Handles an event of the chardev at `position`.
    pub(super) fn handle(&mut self, position: usize) {
        if let Some((chardev, _)) = self.chardevs.get_mut(position) {
            chardev.handle();
        }
    }

    /// Answer to `query-chardev`.
    pub(super) fn info(&self) -> Vec<ChardevInfo> {
        self.chardevs.iter().map(|(_, info)| info.clone()).collect()
    }

    /// Writes what waits and can be written without waiting.
    pub(super) fn flush(&mut self) {
        for (chardev, _) in &mut self.chardevs {
            chardev.handle();
            let dropped = chardev.dropped();
            if dropped > 0 {
                info!(
                    "chardev {}: {dropped} bytes of output had no reader",
                    chardev.id()
                );
            }
        }
    }
}

/// A chardev's other end as QEMU writes it.
fn filename(backend: Option<&ChardevBackend>, pty: Option<&str>) -> String {
    match backend {
        Some(ChardevBackend::Stdio) => "stdio".into(),
        Some(ChardevBackend::Pty) => format!("pty:{}", pty.unwrap_or_default()),
        Some(ChardevBackend::Socket { path, server, .. }) => {
            format!(
                "unix:{}{}",
                path.display(),
                if *server { ",server=on" } else { "" }
            )
        }
        Some(ChardevBackend::Inherited { fd, server, .. }) => {
            format!("fd:{fd}{}", if *server { ",server=on" } else { "" })
        }
        Some(ChardevBackend::File { .. }) => "file".into(),
        None => "null".into(),
    }
}
