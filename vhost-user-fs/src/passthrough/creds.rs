//! Whose new files are.
//!
//! **Job.** While [`AsUser`] lives, this thread's effective user and group are those of the guest's process.
//! **Who is not trusted.** The guest: an id without a mapping, and the id that means "unchanged" to the kernel, are refused.
//! **Why this way.** Ids at creation time, not a chown after it: nobody sees the file with another owner, and quotas and
//! default groups of folders are right. The capabilities that this daemon keeps stay, since the guest's kernel has checked
//! permissions already, with the supplementary groups that are not known here.

use nix::errno::Errno;

use super::sys;
use crate::fuse::InHeader;

/// Whether this process can take the users and groups of its guest: whether it has the right, and there are others than its
/// own in its user namespace.
#[must_use]
pub fn may_switch_user() -> bool {
    // Any id that is not 0 will do: a namespace of one user has user 0 only.
    let header = InHeader {
        uid: 1,
        gid: 1,
        ..InHeader::default()
    };
    AsUser::new(&header, true).is_ok()
}

/// The guard.
#[derive(Debug)]
#[must_use]
pub(crate) struct AsUser {
    uid: u32,
    gid: u32,
}

impl AsUser {
    /// Becomes the caller of the request, if `switch` says that this process may.
    ///
    /// # Errors
    /// `EINVAL` for an id that this process's user namespace does not have, `EPERM` if it may not change.
    pub(crate) fn new(header: &InHeader, switch: bool) -> Result<Self, Errno> {
        let mut now = Self { uid: 0, gid: 0 };
        if !switch {
            return Ok(now);
        }
        if header.uid == u32::MAX || header.gid == u32::MAX {
            return Err(Errno::EINVAL);
        }
        if header.gid != 0 {
            sys::become_group(header.gid)?;
            now.gid = header.gid;
        }
        if header.uid != 0 {
            sys::become_user(header.uid)?;
            now.uid = header.uid;
        }
        Ok(now)
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        let user = if self.uid == 0 {
            Ok(())
        } else {
            sys::become_user(0)
        };
        let group = if self.gid == 0 {
            Ok(())
        } else {
            sys::become_group(0)
        };
        if user.and(group).is_err() {
            // Serving on as another user would give files to the wrong one.
            std::process::abort();
        }
    }
}
