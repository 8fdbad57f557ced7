//! User and group maps of a new user namespace.
//!
//! One user and one group exist inside, neither of them 0, so that exec grants nothing. A
//! privileged parent maps them to an unprivileged user of the host; an unprivileged one can map
//! only itself, and then the child does it, because the parent may be closed to inspection.

use crate::sys::process as sys;
use nix::{errno::Errno, fcntl, sys::stat::Mode, unistd};
use std::fmt::Write as _;

/// The only user and group that a jail has inside.
pub(crate) const INSIDE: u32 = 1000;

/// The user and group of the host that a device process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User id on the host; not 0.
    pub uid: u32,
    /// Group id on the host; not 0.
    pub gid: u32,
}

impl Identity {
    /// "nobody" on every distribution.
    const NOBODY: u32 = 65534;

    /// The least that the caller can give: nobody when it is root, otherwise its own user.
    #[must_use]
    pub fn least() -> Self {
        let (uid, gid) = (unistd::geteuid(), unistd::getegid());
        if uid.is_root() {
            Self {
                uid: Self::NOBODY,
                gid: Self::NOBODY,
            }
        } else {
            Self {
                uid: uid.as_raw(),
                gid: gid.as_raw(),
            }
        }
    }

    /// Whether it is the caller's own, which needs no privilege.
    pub(crate) fn is_own(self) -> bool {
        self.uid == unistd::geteuid().as_raw() && self.gid == unistd::getegid().as_raw()
    }
}

/// A line of a map, and a path of `/proc`, without an allocation.
struct Text {
    bytes: [u8; 48],
    length: usize,
}

impl Text {
    fn new(arguments: std::fmt::Arguments<'_>) -> Result<Self, Errno> {
        let mut text = Self {
            bytes: [0; 48],
            length: 0,
        };
        text.write_fmt(arguments).map_err(|_| Errno::ENAMETOOLONG)?;
        Ok(text)
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl std::fmt::Write for Text {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        let end = self.length + s.len();
        let room = self
            .bytes
            .get_mut(self.length..end)
            .ok_or(std::fmt::Error)?;
        room.copy_from_slice(s.as_bytes());
        self.length = end;
        Ok(())
    }
}

fn put(process: std::fmt::Arguments<'_>, file: &str, text: &[u8]) -> Result<(), Errno> {
    let path = Text::new(format_args!("/proc/{process}/{file}"))?;
    let flags = fcntl::OFlag::O_WRONLY | fcntl::OFlag::O_CLOEXEC;
    let fd = fcntl::open(path.bytes(), flags, Mode::empty())?;
    // The kernel takes a map in one write or not at all.
    unistd::write(&fd, text).map(drop)
}

/// The parent's half, with `CAP_SETUID` and `CAP_SETGID`: maps the inside user to `identity`.
/// `setgroups` stays possible, so that the child can give up the groups that it inherited.
pub(crate) fn map_child(child: libc::pid_t, identity: Identity) -> Result<(), Errno> {
    let line = |id: u32| Text::new(format_args!("{INSIDE} {id} 1\n"));
    put(
        format_args!("{child}"),
        "uid_map",
        line(identity.uid)?.bytes(),
    )?;
    put(
        format_args!("{child}"),
        "gid_map",
        line(identity.gid)?.bytes(),
    )
}

/// The child's half without privileges: maps the inside user to what the child was outside.
/// Its supplementary groups cannot be given up this way; the kernel forbids it.
pub(crate) fn map_self(outside: Identity) -> Result<(), Errno> {
    sys::set_dumpable(true)?; // or /proc/self belongs to root
    let line = |id: u32| Text::new(format_args!("{INSIDE} {id} 1\n"));
    let me = || format_args!("self");
    put(me(), "setgroups", b"deny")?;
    put(me(), "uid_map", line(outside.uid)?.bytes())?;
    put(me(), "gid_map", line(outside.gid)?.bytes())
}

/// Ids of a user namespace as others of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first one inside.
    pub inside: u32,
    /// The first one of the host, as the caller sees it.
    pub host: u32,
    /// How many.
    pub count: u32,
}

/// The parent's half for a child that works with the files of the users of some ranges: an id outside of them does not exist
/// inside. No range at all stands for every id that the caller has, which stay what they are. Takes the same capabilities as
/// [`map_child`].
pub(crate) fn map_child_to(
    child: libc::pid_t,
    users: &[IdRange],
    groups: &[IdRange],
) -> Result<(), Errno> {
    for (file, ranges) in [("uid_map", users), ("gid_map", groups)] {
        let text = if ranges.is_empty() {
            alike(file)?
        } else {
            let line = |range: &IdRange| {
                let IdRange {
                    inside,
                    host,
                    count,
                } = range;
                format!("{inside} {host} {count}\n")
            };
            ranges.iter().map(line).collect()
        };
        put(format_args!("{child}"), file, text.as_bytes())?;
    }
    Ok(())
}

/// The text of a map in which every id that the caller has is the same one inside.
fn alike(file: &str) -> Result<String, Errno> {
    let own = std::fs::read_to_string(format!("/proc/self/{file}"))
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut text = String::new();
    for line in own.lines() {
        let mut words = line.split_whitespace();
        if let (Some(inside), Some(_), Some(count)) = (words.next(), words.next(), words.next()) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{inside} {inside} {count}");
        }
    }
    Ok(text)
}

/// The child's half without privileges, for a child that serves as user 0 inside: its only user and group are the caller's.
pub(crate) fn map_self_to_root(outside: Identity) -> Result<(), Errno> {
    sys::set_dumpable(true)?; // or /proc/self belongs to root
    let line = |id: u32| Text::new(format_args!("0 {id} 1\n"));
    let me = || format_args!("self");
    put(me(), "setgroups", b"deny")?;
    put(me(), "uid_map", line(outside.uid)?.bytes())?;
    put(me(), "gid_map", line(outside.gid)?.bytes())
}

/// Whether supplementary groups are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Groups {
    Dropped,
    Kept,
}

/// Gives up the supplementary groups where the kernel allows that.
pub(crate) fn leave_groups() -> Result<Groups, Errno> {
    match sys::drop_groups() {
        Ok(()) => Ok(Groups::Dropped),
        Err(Errno::EPERM) => match unistd::getgroups() {
            Ok(list) if list.is_empty() => Ok(Groups::Dropped),
            _ => Ok(Groups::Kept),
        },
        Err(errno) => Err(errno),
    }
}

/// Becomes the given user and group, without supplementary groups where the kernel allows that.
pub(crate) fn become_user(uid: u32, gid: u32) -> Result<Groups, Errno> {
    let groups = leave_groups()?;
    sys::set_gid(gid)?;
    sys::set_uid(uid)?;
    sys::set_umask(0o077);
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_paths_fit() {
        let longest = Text::new(format_args!("/proc/{}/setgroups", i32::MIN)).unwrap();
        assert_eq!(longest.bytes(), b"/proc/-2147483648/setgroups");
        let line = Text::new(format_args!("{} {} 1\n", u32::MAX, u32::MAX)).unwrap();
        assert_eq!(line.bytes(), b"4294967295 4294967295 1\n");
        assert!(Text::new(format_args!("{:49}", "")).is_err());
    }
}
