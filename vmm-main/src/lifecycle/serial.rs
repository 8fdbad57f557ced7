//! The serial port's other end in the main loop.
//!
//! **Job.** Bring the chardev of the serial port and the main thread's epoll together.
//! **Who is not trusted**: whoever reads or writes the other end.

use std::os::fd::OwnedFd;

use ipc::spec::vm::VmSpec;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;

use super::poller::Poller;
use super::start::{Files, StartError};
use crate::cmdline::{ChardevPlan, Plan};
use crate::platform::serial::{SerialInput, SerialSink};
use crate::qmp::ChardevInfo;

/// The chardevs of a VM.
#[derive(Debug)]
pub(in crate::lifecycle) struct Chardevs {
    out: Option<OwnedFd>,
}

struct Out(OwnedFd);

impl SerialSink for Out {
    fn push(&mut self, bytes: &[u8]) {
        let _ = nix::unistd::write(&self.0, bytes);
    }
}

impl Chardevs {
    pub(in crate::lifecycle) fn open(_: &VmSpec, plan: &Plan, files: &mut Files) -> Result<Self, StartError> {
        use std::os::fd::AsFd;
        let out = plan.chardevs.iter().find_map(|(_, chardev)| match chardev {
            ChardevPlan::Stdio => std::io::stdout().as_fd().try_clone_to_owned().ok(),
            ChardevPlan::Output { file } | ChardevPlan::Connected { file } | ChardevPlan::Pty { file } => files.take(*file).map(Into::into),
            ChardevPlan::Listener { .. } => None,
        });
        Ok(Self { out })
    }

    pub(in crate::lifecycle) fn serial_sink(&self) -> Option<Box<dyn SerialSink>> {
        let out = self.out.as_ref()?.try_clone().ok()?;
        Some(Box::new(Out(out)))
    }

    pub(in crate::lifecycle) fn watch(&mut self, _: &Poller, _: u64, _: Option<SerialInput>) -> Result<(), Errno> {
        Ok(())
    }

    pub(in crate::lifecycle) fn handle(&mut self, _: &Poller, _: u64, _: EpollFlags) {}

    pub(in crate::lifecycle) fn info(&self) -> Vec<ChardevInfo> {
        Vec::new()
    }

    pub(in crate::lifecycle) fn flush(&mut self) {}
}
