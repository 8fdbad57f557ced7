//! What a keeper hands over to one of another program.
//!
//! **Job.** The tables as a descriptor of their memory, and every descriptor that they name, which gets the very number that it
//! had, so that nothing in the tables changes and whoever had them before can go on if this fails.
//! **Who is not trusted.** The keeper that hands over: it shares its descriptors with a process that a guest may have taken
//! over. Numbers that are this process's own are refused; everything else that the tables say is checked by who reads them.
//! **Why this way.** Open files, locks and unlinked files exist only as descriptors. The kernel gives out the lowest number that is
//! free, so the n-th descriptor of a message that is sent by rising numbers never arrives above the n-th number that it is
//! to have: put on their places from the last one down, none is in the way of another.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use ipc::channel::{Channel, ChannelError};
use ipc::keeper::Heritage;
use ipc::limits::MAX_MESSAGE_FDS;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use thiserror::Error;

use crate::record;

/// Why nothing was taken over.
#[derive(Debug, Error)]
pub enum HeritageError {
    /// The other keeper cannot be talked with, or hands nothing over.
    #[error("the keeper of before")]
    Line(#[from] ChannelError),
    /// It is of a program that kept things in another way.
    #[error(
        "what is kept has layout {theirs:#x}, and this program goes on with layout {ours:#x} only"
    )]
    Layout {
        /// Of what there is.
        theirs: u64,
        /// Of this program.
        ours: u64,
    },
    /// It sent something else than what was its turn.
    #[error("the keeper of before sent {0:?} with {1} descriptors out of order")]
    OutOfOrder(Heritage, usize),
    /// A number that is in use here.
    #[error("descriptor {0} is kept and is one of this process's own")]
    Own(RawFd),
    /// A descriptor cannot have its number.
    #[error("descriptor {0} cannot have the number that it had")]
    Number(RawFd, #[source] Errno),
}

/// Sends everything: `memory`, and the descriptors `numbers`.
pub(crate) fn hand_over(
    line: &Channel,
    memory: BorrowedFd<'_>,
    numbers: &BTreeSet<RawFd>,
) -> Result<(), ChannelError> {
    line.send(&Heritage::Memory, &[memory])?;
    let numbers: Vec<RawFd> = numbers.iter().copied().collect();
    for some in numbers.chunks(MAX_MESSAGE_FDS) {
        let fds: Vec<_> = some.iter().map(record::look).collect();
        line.send(&Heritage::Files, &fds)?;
    }
    line.send(&Heritage::End, &[])
}

/// The layout of what is offered is `ours`.
pub(crate) fn offered(line: &Channel, ours: u64) -> Result<(), HeritageError> {
    match line.receive()? {
        (Heritage::Layout(theirs), fds) if fds.is_empty() => {
            if theirs == ours {
                Ok(())
            } else {
                Err(HeritageError::Layout { theirs, ours })
            }
        }
        (other, fds) => Err(HeritageError::OutOfOrder(other, fds.len())),
    }
}

/// Waits for the memory with the tables.
pub(crate) fn memory(line: &Channel) -> Result<OwnedFd, HeritageError> {
    let (what, mut fds) = line.receive()?;
    match (what, fds.pop()) {
        (Heritage::Memory, Some(memory)) if fds.is_empty() => Ok(memory),
        (_, last) => Err(HeritageError::OutOfOrder(
            what,
            fds.len() + usize::from(last.is_some()),
        )),
    }
}

/// Takes the descriptors `numbers`, none of which may be in `own`. They are the tables' from then on. `socket` gets a number
/// that is not in the way.
pub(crate) fn files(
    line: Channel,
    numbers: &BTreeSet<RawFd>,
    own: &BTreeSet<RawFd>,
    socket: UnixStream,
) -> Result<UnixStream, HeritageError> {
    if let Some(both) = numbers.intersection(own).next() {
        return Err(HeritageError::Own(*both));
    }
    let above = numbers.last().map_or(0, |last| last.saturating_add(1));
    let line = Channel::from_fd(lift(line.into_fd(), above)?);
    let socket = lift(socket.into(), above)?;
    let mut wanted = numbers.iter().copied();
    loop {
        let (what, fds) = line.receive()?;
        let some: Vec<RawFd> = wanted.by_ref().take(fds.len()).collect();
        match what {
            Heritage::Files if !fds.is_empty() && some.len() == fds.len() => {
                for (fd, number) in fds.into_iter().zip(some).rev() {
                    put(fd, number)?;
                }
            }
            Heritage::End if fds.is_empty() && wanted.len() == 0 => return Ok(socket.into()),
            _ => return Err(HeritageError::OutOfOrder(what, fds.len())),
        }
    }
}

/// Moves a descriptor to a number from `above` on.
fn lift(fd: OwnedFd, above: RawFd) -> Result<OwnedFd, HeritageError> {
    let before = fd.as_raw_fd();
    let lifted = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(above));
    drop(fd);
    let failed = |errno| HeritageError::Number(before, errno);
    // The kernel has just made it, and nobody else knows its number.
    record::adopt(record::stored(Some(&lifted.map_err(failed)?)))
        .ok_or_else(|| failed(Errno::EBADF))
}

/// Puts a descriptor on `number`, where nothing is; the tables own it from there on.
fn put(fd: OwnedFd, number: RawFd) -> Result<(), HeritageError> {
    let failed = |errno| HeritageError::Number(number, errno);
    if fd.as_raw_fd() == number {
        let _ = fd.into_raw_fd();
        return Ok(());
    }
    match fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(number)) {
        Ok(got) if got == number => Ok(()),
        Ok(got) => {
            drop(record::adopt(record::stored(Some(&got))));
            Err(failed(Errno::EBUSY))
        }
        Err(errno) => Err(failed(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::MetadataExt;

    /// Files on numbers that nothing else in this process has, with what tells them apart.
    #[allow(unsafe_code)] // takes numbers that were just given away
    fn files_at(first: RawFd, count: usize) -> (BTreeSet<RawFd>, Vec<(File, u64)>) {
        let mut numbers = BTreeSet::new();
        let mut files = Vec::new();
        for _ in 0..count {
            let file = tempfile::tempfile().unwrap();
            let number = fcntl(&file, FcntlArg::F_DUPFD_CLOEXEC(first)).unwrap();
            numbers.insert(number);
            // SAFETY: just made, and known to nobody else.
            let there = unsafe { File::from_raw_fd(number) };
            files.push((there, file.metadata().unwrap().ino()));
        }
        (numbers, files)
    }

    #[test]
    fn a_layout_that_is_not_ours_is_refused_before_anything_comes() {
        let (old, new) = Channel::pair().unwrap();
        old.send(&Heritage::Layout(7), &[]).unwrap();
        offered(&new, 7).unwrap();
        old.send(&Heritage::Layout(7), &[]).unwrap();
        let error = offered(&new, 8).unwrap_err();
        assert!(
            matches!(error, HeritageError::Layout { theirs: 7, ours: 8 }),
            "{error}"
        );
        old.send(&Heritage::End, &[]).unwrap();
        let error = offered(&new, 8).unwrap_err();
        assert!(
            matches!(error, HeritageError::OutOfOrder(Heritage::End, 0)),
            "{error}"
        );
        drop(old);
        assert!(matches!(offered(&new, 8), Err(HeritageError::Line(_))));
    }

    #[test]
    fn own_numbers_and_numbers_that_are_taken_are_refused() {
        let (numbers, there) = files_at(300, 3);
        let taken = || {
            let (old, new) = Channel::pair().unwrap();
            let (socket, _) = UnixStream::pair().unwrap();
            let memory = tempfile::tempfile().unwrap();
            hand_over(&old, memory.as_fd(), &numbers).unwrap();
            super::memory(&new).unwrap();
            (new, socket)
        };
        let (line, socket) = taken();
        let own = BTreeSet::from([*numbers.first().unwrap()]);
        let error = files(line, &numbers, &own, socket).unwrap_err();
        assert!(matches!(error, HeritageError::Own(_)), "{error}");
        // They are open here.
        let (line, socket) = taken();
        let error = files(line, &numbers, &BTreeSet::new(), socket).unwrap_err();
        assert!(
            matches!(error, HeritageError::Number(_, Errno::EBUSY)),
            "{error}"
        );
        // Fewer than the tables name.
        let (line, socket) = taken();
        let mut more = numbers.clone();
        more.insert(500);
        drop(there);
        let error = files(line, &more, &BTreeSet::new(), socket).unwrap_err();
        assert!(
            matches!(error, HeritageError::OutOfOrder(Heritage::End, 0)),
            "{error}"
        );
    }

    #[test]
    #[allow(unsafe_code)] // takes what the tables would own
    fn each_gets_the_number_that_it_had() {
        // More than one message carries.
        let (numbers, there) = files_at(600, 3 * MAX_MESSAGE_FDS + 1);
        let (old, new) = Channel::pair().unwrap();
        let (socket, mut other) = UnixStream::pair().unwrap();
        let memory = tempfile::tempfile().unwrap();
        hand_over(&old, memory.as_fd(), &numbers).unwrap();
        let inodes: Vec<_> = there.iter().map(|(_, inode)| *inode).collect();
        drop(there);
        super::memory(&new).unwrap();
        let mut socket = files(new, &numbers, &BTreeSet::new(), socket).unwrap();
        assert!(socket.as_raw_fd() > *numbers.last().unwrap());
        std::io::Write::write_all(&mut socket, b"x").unwrap();
        std::io::Read::read_exact(&mut other, &mut [0]).unwrap();
        for (number, inode) in numbers.into_iter().zip(inodes) {
            // SAFETY: it was put there for whoever knows the number.
            let file = unsafe { File::from_raw_fd(number) };
            assert_eq!(file.metadata().unwrap().ino(), inode, "{number}");
        }
    }
}
