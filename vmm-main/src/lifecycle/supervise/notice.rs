//! What the broker says of device processes.
//!
//! **Job.** Finds who each message is for: a device that waits for a process, one whose process has ended, somebody else's request.
//! **Who is not trusted**: device processes, whose last words are for people only. The broker's answers are taken for what was asked first.
//! **Why this way.** Answers carry no number: the broker gives them in the order of the requests, which is kept here.

use ipc::control::Exit;
use ipc::log::{debug, error, warn};
use ipc::spec::DeviceSpec;

use super::{Asked, Context, Process, Supervisor, Told};
use crate::broker::{ClientError, DeviceExit, Notice};

/// How a process ended that was about to be ended: an end by itself, unless it only left because this side had hung up.
fn by_itself(how: Exit) -> Option<Exit> {
    (how != Exit::Code(0)).then_some(how)
}

impl Supervisor {
    /// What the broker says.
    pub(in crate::lifecycle) fn notice(
        &mut self,
        notice: Notice,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientError> {
        match notice {
            Notice::Exited(exit) => self.exited(exit, cx),
            Notice::Serves { index, pid } => {
                self.serves(index, pid);
                Ok(())
            }
            Notice::Stopped { index } => {
                let index = index as usize;
                match self.devices.get(index).map(|device| &device.process) {
                    Some(Process::Stopping { how, .. }) => self.ended(index, *how, cx),
                    _ => Ok(()),
                }
            }
            Notice::Started { index, pid, socket } => match self.take_asked(Some(index)) {
                Some(Asked::Upgrade(at)) => self.coming(at, pid, socket, cx),
                Some(Asked::Other(number)) => {
                    let notice = Notice::Started { index, pid, socket };
                    self.others.push_back(Told::Answer(number, Ok(notice)));
                    Ok(())
                }
                _ => self.started(index as usize, pid, socket, cx),
            },
            Notice::GoesOn { index, message } => match self.take_asked(Some(index)) {
                Some(Asked::Upgrade(index)) => self.upgrade_refused(index, message, cx),
                _ => Ok(()),
            },
            Notice::Added
            | Notice::DumpFile(_)
            | Notice::Removed
            | Notice::Resized
            | Notice::Unplugged { .. } => {
                if let Some(Asked::Other(number)) = self.take_asked(None) {
                    self.others.push_back(Told::Answer(number, Ok(notice)));
                }
                Ok(())
            }
            Notice::Settled { index } => {
                if let Some(device) = self.devices.get_mut(index as usize) {
                    device.retired = None;
                }
                if let Some(Asked::Settle(_, Some((reply, outcome)))) = self.take_asked(None) {
                    reply.send(outcome);
                }
                Ok(())
            }
            Notice::Refused { message } => self.refused(message, cx),
        }
    }

    /// A process has ended: the one that serves, or one whose place another has taken or is about to take.
    fn exited(&mut self, exit: DeviceExit, cx: &mut Context<'_>) -> Result<(), ClientError> {
        let index = exit.index as usize;
        let watched = self.devices.get_mut(index);
        let watched = watched.filter(|device| !matches!(device.process, Process::Unplugged));
        let Some(device) = watched else {
            self.others.push_back(Told::Exited(exit));
            return Ok(());
        };
        if device.retired == Some(exit.pid) {
            device.retired = None;
            return Ok(());
        }
        let coming = device.upgrade.as_ref();
        let coming = coming.and_then(|upgrade| upgrade.coming.as_ref());
        if coming.is_some_and(|coming| coming.pid == exit.pid) {
            let why = format!(
                "process {} ended ({:?}): {}",
                exit.pid, exit.how, exit.last_words
            );
            return self.give_up(index, &why, cx);
        }
        error!(
            "device {}: process {} ended ({:?}): {}",
            device.spec.id(),
            exit.pid,
            exit.how,
            exit.last_words
        );
        match &mut device.process {
            // The reply to the request follows.
            Process::Stopping { pid, how } if *pid == exit.pid => *how = by_itself(exit.how),
            process if process.pid() == Some(exit.pid) => {
                return self.ended(index, Some(exit.how), cx);
            }
            _ => {}
        }
        Ok(())
    }

    /// Another process than the one that was started does the work of a device.
    fn serves(&mut self, index: u32, pid: i32) {
        let device = self.devices.get_mut(index as usize);
        match device.map(|device| &mut device.process) {
            Some(
                Process::Serving { pid: known }
                | Process::Stopping { pid: known, .. }
                | Process::Handshaking { pid: known, .. },
            ) => *known = pid,
            _ => self.others.push_back(Told::Serves { index, pid }),
        }
    }

    /// The broker does not do what it was asked for.
    fn refused(&mut self, message: String, cx: &mut Context<'_>) -> Result<(), ClientError> {
        match self.take_asked(None) {
            Some(Asked::Upgrade(index)) => return self.upgrade_refused(index, message, cx),
            Some(Asked::Settle(..)) => error!("{message}"),
            // It was taken out meanwhile.
            Some(Asked::Start(index)) if self.is_unplugged(index) => {}
            Some(Asked::Start(index)) if self.devices[index].foreign.is_some() => {
                debug!("{message}");
                self.try_later(index);
            }
            Some(Asked::Start(index)) => {
                error!("{message}");
                return self.start(index, cx);
            }
            Some(Asked::Other(number)) => {
                self.others.push_back(Told::Answer(number, Err(message)));
            }
            None => warn!("broker: {message}"),
        }
        Ok(())
    }

    /// Takes what the broker has answered: its answers come in the order of the requests, but for the one to the upgrade of a shared
    /// folder, which it gives when it knows, and which names the folder as `index`.
    fn take_asked(&mut self, index: Option<u32>) -> Option<Asked> {
        let folder = |asked: &Asked| match asked {
            Asked::Upgrade(at) => {
                let device = self.devices.get(*at);
                device
                    .is_some_and(|device| matches!(device.spec, DeviceSpec::Fs(_)))
                    .then_some(*at as u32)
            }
            _ => None,
        };
        let own = |asked: &Asked| index.is_some() && folder(asked) == index;
        let at = self.asked.iter().position(own);
        let at = at.or_else(|| self.asked.iter().position(|asked| folder(asked).is_none()))?;
        self.asked.remove(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_was_hung_up_on_did_not_end_by_itself() {
        assert_eq!(by_itself(Exit::Code(0)), None);
        assert_eq!(by_itself(Exit::Signal(9)), Some(Exit::Signal(9)));
        assert_eq!(by_itself(Exit::Code(1)), Some(Exit::Code(1)));
    }
}
