//! Writes that follow each other in the image, as one.
//!
//! **Job.** Holds a write back until it is known whether the next one begins where it ends, and gives each its own result.
//! **Who is not trusted.** The file system, which may take a part of what it is given: a request is done if all its bytes were taken,
//! and is tried by itself if not, so that what the host has against one is not told of the others.
//! **Why this way.** For a file system a write of 4 KiB is more than its copy; of one large write it makes large pages. What is held is
//! guest memory, no copy of it, and only while the queue whose turn it is has more. A write is held if it begins where the last one
//! ended, so that those that are all over the disk are done and told at once, as they come.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use device_host::{GuestBuffers, JoinedBuffers};
use nix::errno::Errno;

use crate::engine::write_whole;

/// Bytes of one call.
const MOST: u64 = 512 * 1024;
/// Bytes of a write that is worth joining: to a larger one the call matters little, and the driver would wait longer for the first.
const SMALL: usize = 64 * 1024;

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Run<T> {
    buffers: JoinedBuffers,
    /// Where the first write begins.
    start: u64,
    /// Where the next one would begin: behind the last write, held or not.
    end: u64,
    members: Vec<Member<T>>,
}

#[derive(Debug)]
struct Member<T> {
    then: T,
    pieces: Range<usize>,
    at: u64,
    end: u64,
}

impl<T> Default for Run<T> {
    fn default() -> Self {
        Self {
            buffers: JoinedBuffers::default(),
            start: 0,
            end: 0,
            members: Vec::new(),
        }
    }
}

impl<T> Run<T> {
    /// Whether to hold a write back: it is small, and begins where the last one ended.
    pub(crate) fn goes_on(&self, at: u64, len: usize) -> bool {
        at == self.end && (1..=SMALL).contains(&len)
    }

    /// A write that was not held ends here.
    pub(crate) fn begin(&mut self, end: u64) {
        self.end = end;
    }

    /// Holds a write that [goes on](Self::goes_on). Gives `then` back if all of them together would be too many.
    pub(crate) fn hold(&mut self, buffers: &GuestBuffers<'_>, then: T) -> Result<(), T> {
        let at = self.end;
        let start = if self.members.is_empty() {
            at
        } else {
            self.start
        };
        let end = at.saturating_add(buffers.len() as u64);
        if end - start > MOST {
            return Err(then);
        }
        let Some(pieces) = self.buffers.join(buffers) else {
            return Err(then);
        };
        (self.start, self.end) = (start, end);
        self.members.push(Member {
            then,
            pieces,
            at,
            end,
        });
        Ok(())
    }

    /// Whether none is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Writes what is held, and puts each with its result behind `done`.
    pub(crate) fn write(
        &mut self,
        file: BorrowedFd<'_>,
        done: &mut VecDeque<(T, Result<(), Errno>)>,
    ) {
        // One has nobody to be told apart from.
        let together = if self.members.len() > 1 {
            self.write_together(file)
        } else {
            0
        };
        let written = self.start + together as u64;
        for member in self.members.drain(..) {
            let result = if member.end <= written {
                Ok(())
            } else {
                match self.buffers.part(member.pieces) {
                    Some(buffers) => write_whole(file, buffers, member.at),
                    None => Err(Errno::EIO),
                }
            };
            done.push_back((member.then, result));
        }
        self.buffers.clear();
    }

    /// Bytes that one call wrote.
    fn write_together(&mut self, file: BorrowedFd<'_>) -> usize {
        let all = self.buffers.all();
        let Some((all, at)) = all.zip(i64::try_from(self.start).ok()) else {
            return 0;
        };
        all.send_to_file(file, at).unwrap_or(0)
    }
}
