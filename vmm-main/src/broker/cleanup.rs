//! What must be gone when the VM is.
//!
//! **Job.** Remember every path that was created for this VM, with its inode, and the terminal's mode; undo both on drop.
//! **Who is not trusted**: whoever may have replaced a path meanwhile: only the very inode that was created is removed.

use std::path::PathBuf;

use ipc::log::warn;
use nix::sys::stat::{FileStat, lstat};

use crate::chardev::terminal::TerminalState;

/// Paths and terminal to put back.
#[derive(Debug, Default)]
pub(super) struct Cleanup {
    paths: Vec<(PathBuf, FileStat)>,
    terminal: Option<TerminalState>,
}

impl Cleanup {
    /// Remembers a path that was just created.
    pub(super) fn created(&mut self, path: PathBuf) {
        if let Ok(stat) = lstat(&path) {
            self.paths.push((path, stat));
        }
    }

    /// Remembers the mode of the terminal on standard input, if it is one.
    pub(super) fn terminal(&mut self) {
        self.terminal = TerminalState::of(std::io::stdin()).unwrap_or_default();
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        for (path, created) in self.paths.drain(..) {
            if lstat(&path)
                .is_ok_and(|now| now.st_ino == created.st_ino && now.st_dev == created.st_dev)
            {
                let _ = nix::unistd::unlink(&path);
            }
        }
        if let Some(terminal) = self.terminal.take()
            && let Err(e) = terminal.restore()
        {
            warn!("{e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_what_was_created_but_not_what_replaced_it() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&ours, "").unwrap();
        std::fs::write(&theirs, "").unwrap();
        let mut cleanup = Cleanup::default();
        cleanup.created(ours.clone());
        cleanup.created(theirs.clone());
        // Keep the old inode alive while the path changes, so that its number is not reused.
        let old = std::fs::File::open(&theirs).unwrap();
        std::fs::remove_file(&theirs).unwrap();
        std::fs::write(&theirs, "someone else's").unwrap();
        drop(cleanup);
        drop(old);
        assert!(!ours.exists());
        assert!(theirs.exists());
    }
}
