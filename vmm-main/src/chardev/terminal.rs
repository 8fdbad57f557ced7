//! The user's terminal: raw while a guest's console uses it, and as it was before on every way out.
//!
//! **Job.** [`TerminalState`] remembers a terminal's settings and puts them back. [`RawTerminal`] does so when dropped.
//! The broker holds a `TerminalState` as well and restores it when the control process is gone, whatever killed it.
//!
//! **Who is not trusted**: the guest, whose bytes reach the terminal as they are, escape sequences included, as over any
//! serial line. A user who does not trust the guest that far reads it through a pty, socket or file instead.
//!
//! **Why this way.** Restoring must work from the background too: once the control process has died, the shell owns the
//! terminal, and a process outside of the foreground group that sets a terminal up is stopped by SIGTTOU unless it
//! blocks that signal.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::termios::{
    ControlFlags, InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices, Termios,
    tcgetattr, tcsetattr,
};
use thiserror::Error;

/// Why a terminal could not be set up.
#[derive(Debug, Error)]
#[error("{call} on the terminal of -serial stdio failed")]
pub struct TerminalError {
    /// The system call.
    call: &'static str,
    /// What the kernel said.
    source: Errno,
}

/// A terminal's settings at one time.
#[derive(Debug)]
pub struct TerminalState {
    terminal: OwnedFd,
    settings: Termios,
}

impl TerminalState {
    /// Remembers the settings of `terminal`; `None` if it is none.
    pub fn of(terminal: impl AsFd) -> Result<Option<Self>, TerminalError> {
        let settings = match tcgetattr(&terminal) {
            Ok(settings) => settings,
            Err(Errno::ENOTTY) => return Ok(None),
            Err(source) => {
                return Err(TerminalError {
                    call: "tcgetattr",
                    source,
                });
            }
        };
        let terminal = nix::unistd::dup(&terminal).map_err(|source| TerminalError {
            call: "dup",
            source,
        })?;
        Ok(Some(Self { terminal, settings }))
    }

    /// Puts the settings back at once. Works from a background process too.
    pub fn restore(&self) -> Result<(), TerminalError> {
        set(&self.terminal, &self.settings)
    }
}

/// A terminal in raw mode; dropping it restores what was before.
#[derive(Debug)]
pub struct RawTerminal(TerminalState);

impl RawTerminal {
    /// Makes `terminal` raw: every key goes to the guest as it is typed, Ctrl-C included. `None` if it is no terminal.
    pub fn enter(terminal: impl AsFd) -> Result<Option<Self>, TerminalError> {
        let Some(state) = TerminalState::of(terminal)? else {
            return Ok(None);
        };
        set(&state.terminal, &raw(&state.settings))?;
        Ok(Some(Self(state)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Fails when the terminal is gone, and then there is nothing to restore.
        let _ = self.0.restore();
    }
}

/// `settings` without echo, line editing, signals and translation of input. Output keeps its processing, so that messages
/// of this process, which end lines by a bare newline, still start at the left.
pub(super) fn raw(settings: &Termios) -> Termios {
    let mut raw = settings.clone();
    raw.input_flags.remove(
        InputFlags::IGNBRK
            | InputFlags::BRKINT
            | InputFlags::PARMRK
            | InputFlags::ISTRIP
            | InputFlags::INLCR
            | InputFlags::IGNCR
            | InputFlags::ICRNL
            | InputFlags::IXON,
    );
    raw.output_flags.insert(OutputFlags::OPOST);
    raw.local_flags.remove(
        LocalFlags::ECHO
            | LocalFlags::ECHONL
            | LocalFlags::ICANON
            | LocalFlags::IEXTEN
            | LocalFlags::ISIG,
    );
    raw.control_flags
        .remove(ControlFlags::CSIZE | ControlFlags::PARENB);
    raw.control_flags.insert(ControlFlags::CS8);
    raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
    raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
    raw
}

fn set(terminal: &OwnedFd, settings: &Termios) -> Result<(), TerminalError> {
    let failed = |call| move |source| TerminalError { call, source };
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTTOU);
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&stop), Some(&mut before))
        .map_err(failed("pthread_sigmask"))?;
    let result = loop {
        match tcsetattr(terminal, SetArg::TCSANOW, settings) {
            Err(Errno::EINTR) => {}
            other => break other.map_err(failed("tcsetattr")),
        }
    };
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)
        .map_err(failed("pthread_sigmask"))?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_raw_until_the_guard_goes() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let before = tcgetattr(&pair.slave).unwrap();
        assert!(
            before
                .local_flags
                .contains(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG)
        );
        let guard = RawTerminal::enter(&pair.slave).unwrap().unwrap();
        let during = tcgetattr(&pair.slave).unwrap();
        assert!(
            !during
                .local_flags
                .intersects(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG)
        );
        assert!(!during.input_flags.contains(InputFlags::ICRNL));
        drop(guard);
        assert_eq!(tcgetattr(&pair.slave).unwrap(), before);
    }

    #[test]
    fn another_process_can_put_it_back() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let before = tcgetattr(&pair.slave).unwrap();
        let saved = TerminalState::of(&pair.slave).unwrap().unwrap();
        let guard = RawTerminal::enter(&pair.slave).unwrap().unwrap();
        saved.restore().unwrap();
        assert_eq!(tcgetattr(&pair.slave).unwrap(), before);
        drop(guard);
        assert_eq!(tcgetattr(&pair.slave).unwrap(), before);
    }

    #[test]
    fn what_is_no_terminal_stays_alone() {
        let file = tempfile::tempfile().unwrap();
        assert!(RawTerminal::enter(&file).unwrap().is_none());
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(RawTerminal::enter(&reader).unwrap().is_none());
    }

    #[test]
    fn a_terminal_that_went_away_does_not_hurt() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let guard = RawTerminal::enter(&pair.slave).unwrap().unwrap();
        drop(pair);
        drop(guard);
    }
}
