//! Folders and files below a trusted root, never through a symbolic link.
//!
//! A launcher that runs as root and follows a link in a folder that somebody prepared writes
//! wherever that somebody likes. So each folder is opened from its parent's descriptor with
//! `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`, must belong to root and be closed to others' writes,
//! and what is made must not have been there.

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, fchmod, fstat, mkdirat},
    unistd::{UnlinkatFlags, fchown, unlinkat},
};
use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// A folder by its absolute path; a symbolic link anywhere in it is `ELOOP`.
pub(crate) fn open_absolute(path: &Path) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(nix::fcntl::AT_FDCWD, path, how)
}

/// Opens `name` in `folder`, and nothing but an entry of that very folder.
pub(crate) fn open_in(
    folder: BorrowedFd<'_>,
    name: &CStr,
    flags: OFlag,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .mode(mode)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    openat2(folder, name, how)
}

/// Whether only root can change what the folder holds.
pub(crate) fn is_trusted(folder: BorrowedFd<'_>) -> Result<bool, Errno> {
    let stat = fstat(folder)?;
    Ok(stat.st_uid == 0 && stat.st_mode & 0o022 == 0)
}

/// Makes the folder `name`, which must not be there (`EEXIST`), and opens it.
pub(crate) fn make(folder: BorrowedFd<'_>, name: &CStr, mode: Mode) -> Result<OwnedFd, Errno> {
    mkdirat(folder, name, mode)?;
    open_in(
        folder,
        name,
        OFlag::O_RDONLY | OFlag::O_DIRECTORY,
        Mode::empty(),
    )
    .inspect_err(|_| {
        let _ = unlinkat(folder, name, UnlinkatFlags::RemoveDir);
    })
}

/// Makes the empty file `name`, which must not be there: a place to mount a file on.
pub(crate) fn make_file(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    open_in(folder, name, flags, Mode::empty()).map(drop)
}

/// Opens the folder `name`, making it for root if it is not there. `true` if it was made.
pub(crate) fn ensure(folder: BorrowedFd<'_>, name: &CStr) -> Result<(OwnedFd, bool), Errno> {
    let mode = Mode::from_bits_truncate(0o755);
    let open = || {
        open_in(
            folder,
            name,
            OFlag::O_RDONLY | OFlag::O_DIRECTORY,
            Mode::empty(),
        )
    };
    match open() {
        Ok(fd) => Ok((fd, false)),
        Err(Errno::ENOENT) => match make(folder, name, mode) {
            Ok(fd) => Ok((fd, true)),
            // Another launcher was faster.
            Err(Errno::EEXIST) => open().map(|fd| (fd, false)),
            Err(errno) => Err(errno),
        },
        Err(errno) => Err(errno),
    }
}

/// Makes the folder root's again, closed to its former owner, and removes everything in it.
pub(crate) fn empty_for_good(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    // Refused, the former owner can at most add to the work.
    let _ = take_back(folder);
    empty(folder)
}

/// Nobody but root finds or makes anything in the folder from now on, not by a descriptor of it either.
fn take_back(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    fchown(folder, Some(0.into()), Some(0.into()))?;
    fchmod(folder, Mode::from_bits_truncate(0o700))
}

/// Removes everything in `folder`, which must be closed to others. Folders in it are taken from their owners first, since a
/// process of the owner may be at work there.
///
/// Nested folders are moved up instead of walked down, so that whoever made thousands of them can
/// exhaust neither the stack nor the descriptors. Another file system mounted inside is `EXDEV`,
/// and is not entered.
fn empty(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    let device = fstat(folder)?.st_dev;
    let mut moved = 0u64;
    loop {
        let names = entries(folder)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in &names {
            if unlink(folder, name)? {
                continue;
            }
            let inner = open_in(
                folder,
                name,
                OFlag::O_RDONLY | OFlag::O_DIRECTORY,
                Mode::empty(),
            )?;
            if fstat(&inner)?.st_dev != device {
                return Err(Errno::EXDEV);
            }
            let _ = take_back(inner.as_fd());
            for deeper in entries(inner.as_fd())? {
                if unlink(inner.as_fd(), &deeper)? {
                    continue;
                }
                move_up(inner.as_fd(), &deeper, folder, &mut moved)?;
            }
            remove_folder(folder, name)?;
        }
    }
}

/// Moves the folder `name` of `from` to a free name of `to`.
fn move_up(
    from: BorrowedFd<'_>,
    name: &CStr,
    to: BorrowedFd<'_>,
    moved: &mut u64,
) -> Result<(), Errno> {
    loop {
        let fresh = format!("removed-{moved}");
        *moved += 1;
        let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
        match nix::fcntl::renameat2(from, name, to, fresh.as_str(), flags) {
            Err(Errno::EEXIST) => {}
            other => return other,
        }
    }
}

/// Removes an entry. `false` if it is a folder that is not empty.
fn unlink(folder: BorrowedFd<'_>, name: &CStr) -> Result<bool, Errno> {
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(true),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(errno) => return Err(errno),
    }
    match unlinkat(folder, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(true),
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Removes the empty folder `name`; that it is gone already is no error.
pub(crate) fn remove_folder(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    match unlinkat(folder, name, UnlinkatFlags::RemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// Gives `name` in `folder` to a user and a group; a symbolic link itself, not what it points to.
pub(crate) fn give(folder: BorrowedFd<'_>, name: &CStr, uid: u32, gid: u32) -> Result<(), Errno> {
    nix::unistd::fchownat(
        folder,
        name,
        Some(uid.into()),
        Some(gid.into()),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )
}

fn entries(folder: BorrowedFd<'_>) -> Result<Vec<std::ffi::CString>, Errno> {
    let mut names = Vec::new();
    let mut dir = nix::dir::Dir::openat(
        folder,
        c".",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    for entry in dir.iter() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    fn temporary() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = open_absolute(&dir.path().canonicalize().unwrap()).unwrap();
        (dir, fd)
    }

    #[test]
    fn nothing_is_made_through_a_link() {
        let (dir, fd) = temporary();
        let (_elsewhere, _) = temporary();
        symlink(_elsewhere.path(), dir.path().join("link")).unwrap();
        let ensured = ensure(fd.as_fd(), c"link").err();
        assert!(matches!(ensured, Some(Errno::ELOOP | Errno::ENOTDIR)));
        let made = make(fd.as_fd(), c"link", Mode::empty());
        assert_eq!(made.err(), Some(Errno::EEXIST));
        assert_eq!(make_file(fd.as_fd(), c"link").err(), Some(Errno::EEXIST));
        let through = dir.path().canonicalize().unwrap().join("link");
        assert_eq!(open_absolute(&through).err(), Some(Errno::ELOOP));
        assert_eq!(fs::read_dir(_elsewhere.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_above_is_opened() {
        let (_dir, fd) = temporary();
        for name in [c"..", c"../x", c"/etc"] {
            let opened = open_in(fd.as_fd(), name, OFlag::O_PATH, Mode::empty());
            assert!(opened.is_err(), "{name:?}");
        }
    }

    #[test]
    fn deep_trees_and_links_are_emptied_without_leaving() {
        let (dir, fd) = temporary();
        let (outside, _) = temporary();
        fs::write(outside.path().join("kept"), "").unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        fs::create_dir(dir.path().join("removed-0")).unwrap();
        fs::write(dir.path().join("removed-0/file"), "").unwrap();
        let mut deep = dir.path().join("d");
        for _ in 0..150 {
            fs::create_dir(&deep).unwrap();
            fs::write(deep.join("file"), "").unwrap();
            deep.push("d");
        }
        empty(fd.as_fd()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(outside.path().join("kept").exists());
    }
}
