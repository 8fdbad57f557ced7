//! The host's side while the VM runs: a process without rights that a manager can signal and wait for.
//!
//! Job: hear from the first process of the jail, pass signals on, end as the VM ended.
//! Not trusted: the first process runs as the VM's user; its messages are short, typed and bounded,
//! and nothing is done on its word but to end.
//! Why this way: a process cannot change its own pid namespace, so the VM cannot take this process's
//! place. A manager sees one child: what it sends arrives, and the end is the VM's end.

use crate::{
    fault::{Fault, shown},
    steps::{caps, dumpable, landlock, no_new_privs},
    sys::process as sys,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        resource::{Resource, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{MsgFlags, recv, send},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
};
use seccomp_policies::{Action, Policy};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Signals that are passed on.
const PASSED_ON: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Longest message, in bytes.
const MAX_MESSAGE: usize = 4096;

/// How long the signal that ends this process may take to come.
const SIGNAL_WAY: std::time::Duration = std::time::Duration::from_millis(200);

/// What the two sides say to each other. On the wire: one byte for the kind, then the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// Inside to outside: a step failed, for the reason in the text.
    Failed(String),
    /// Inside to outside: the VM's program runs.
    Running,
    /// Inside to outside: it ended, with this status of wait(2).
    Ended(i32),
    /// Outside to inside: send the VM this signal.
    Signal(i32),
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Failed(text) => {
                let mut bytes = vec![b'F'];
                bytes.extend(text.bytes().take(MAX_MESSAGE - 1));
                bytes
            }
            Self::Running => vec![b'R'],
            Self::Ended(status) => [b"E".as_slice(), status.to_ne_bytes().as_slice()].concat(),
            Self::Signal(number) => [b"S".as_slice(), number.to_ne_bytes().as_slice()].concat(),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, content) = bytes.split_first()?;
        let number = || content.try_into().ok().map(i32::from_ne_bytes);
        match kind {
            b'F' => Some(Self::Failed(String::from_utf8_lossy(content).into_owned())),
            b'R' if content.is_empty() => Some(Self::Running),
            b'E' => number().map(Self::Ended),
            b'S' => number().map(Self::Signal),
            _ => None,
        }
    }
}

/// Sends a message; if nobody listens any more, nobody needs it.
pub(crate) fn send_message(socket: &OwnedFd, message: &Message) {
    let _ = send(
        socket.as_raw_fd(),
        &message.encode(),
        MsgFlags::MSG_NOSIGNAL,
    );
}

/// The next message; `None` at the end of the stream.
pub(crate) fn receive_message(socket: &OwnedFd) -> Result<Option<Message>, Errno> {
    let mut buffer = [0; MAX_MESSAGE];
    let length = loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    match buffer.get(..length) {
        None | Some([]) => Ok(None),
        Some(bytes) => Message::decode(bytes).map(Some).ok_or(Errno::EBADMSG),
    }
}

/// The set of [`PASSED_ON`].
pub(crate) fn signals() -> SigSet {
    PASSED_ON.into_iter().collect()
}

/// Waits until the VM's program runs.
pub(crate) fn start(first: &OwnedFd, socket: &OwnedFd) -> Result<(), Fault> {
    let fault = match receive_message(socket) {
        Ok(Some(Message::Running)) => return Ok(()),
        // Its text is a fault's, which was cleaned there.
        Ok(Some(Message::Failed(text))) => match text.split_once(": ") {
            Some((subject, what)) => Fault::new(subject, what),
            None => Fault::new("jail", text),
        },
        Ok(Some(_)) | Err(_) => Fault::new("jail", "its first process misbehaved"),
        Ok(None) => Fault::new(
            "jail",
            "its first process was killed; perhaps memory.limit_in_bytes is too small",
        ),
    };
    // All that is in the namespace ends with it, and only then can folders and groups be removed.
    let _ = sys::kill(first.as_fd());
    let _ = reap_first(first);
    Err(fault)
}

fn reap_first(first: &OwnedFd) -> Result<WaitStatus, Errno> {
    loop {
        match waitid(Id::PIDFd(first.as_fd()), WaitPidFlag::WEXITED) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// Passes signals on until the VM has ended; gives its status of wait(2).
pub(crate) fn until_end(
    first: &OwnedFd,
    socket: &OwnedFd,
    signals: &SigSet,
    daemon: bool,
) -> Result<i32, Fault> {
    let failed = |what: &'static str| move |e| Fault::os("jail", what, e);
    let arrived = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC)
        .map_err(failed("cannot watch signals"))?;
    if let Err(why) = give_up_rights() {
        // The VM runs and this process does nothing with its rights, so that is no reason to end it.
        eprintln!("ozone: cannot give its own rights up: {}", shown(&why));
    }
    loop {
        let mut fds = [
            PollFd::new(arrived.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        match ppoll(&mut fds, None, None) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(failed("cannot wait")(e)),
        }
        let (signalled, spoken) = (fds[0].any().unwrap_or(true), fds[1].any().unwrap_or(true));
        if signalled && let Ok(Some(info)) = arrived.read_signal() {
            let number = info.ssi_signo as i32;
            send_message(socket, &Message::Signal(number));
        }
        if spoken {
            match receive_message(socket) {
                Ok(Some(Message::Ended(status))) => {
                    // In the background, the first process and the VM live on without this one.
                    // Otherwise, all that the VM was is gone when the first process is.
                    if !(daemon && status == 0) {
                        reap_first(first).map_err(failed("cannot wait for the jail's end"))?;
                    }
                    return Ok(status);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => {
                    let _ = sys::kill(first.as_fd());
                    let _ = reap_first(first);
                    return Err(Fault::new("jail", "its first process was killed"));
                }
            }
        }
    }
}

/// From now on this process can only wait, send on its socket, and end.
fn give_up_rights() -> Result<(), String> {
    let named = |what: &'static str| move |e: Errno| format!("{what}: {}", e.desc());
    // The VM's core, if any, is the VM's; this process has nothing to tell in one.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(named("core limit"))?;
    dumpable::switch_off().map_err(named("dumps"))?;
    no_new_privs::set().map_err(named("no_new_privs"))?;
    landlock::deny_all().map_err(|e| format!("Landlock: {e}"))?;
    caps::seal().map_err(named("bounding set"))?;
    caps::clear().map_err(named("capabilities"))?;
    seccomp_policies::install(Policy::OzoneOutside, Action::Kill).map_err(|e| e.to_string())
}

/// Ends this process by the VM's signal, or gives the VM's exit status.
pub(crate) fn end_like(status: i32) -> u8 {
    let signal = status & 0x7f;
    if signal == 0 {
        return (status >> 8 & 0xff) as u8;
    }
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = sys::default_action(signal);
        let _ = SigSet::from(signal).thread_unblock();
        if sys::signal_self(signal).is_ok() {
            // It is on its way. Where it ends nothing, as in a first process of a namespace, the status has to do.
            let _ = ppoll(&mut [], Some(SIGNAL_WAY.into()), None);
        }
    }
    128 + signal as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire_and_others_do_not() {
        for message in [
            Message::Failed("-netns x: no".into()),
            Message::Running,
            Message::Ended(9),
            Message::Signal(15),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        for wrong in [b"".as_slice(), b"X", b"R1", b"E", b"E123", b"S12345"] {
            assert_eq!(Message::decode(wrong), None, "{wrong:?}");
        }
        let long = Message::Failed("x".repeat(2 * MAX_MESSAGE)).encode();
        assert_eq!(long.len(), MAX_MESSAGE);
    }

    #[test]
    fn exit_statuses_are_kept() {
        assert_eq!(end_like(0), 0);
        assert_eq!(end_like(3 << 8), 3);
        assert_eq!(end_like(255 << 8), 255);
    }
}
