//! Where a snapshot is written.
//!
//! **Job.** Makes a folder with the files `memory` and `state` beside the snapshot's place, hands both out, and at the end
//! puts the folder there in one step, or removes it.
//!
//! **Who is not trusted.** The control process: it chooses one of the folders that the command line grants and a name of one
//! component, and can neither reach another folder through it nor replace anything but a snapshot, which is a folder with
//! no files but these two. A file for a dump of guest memory is made in such a folder as well, and must be new.
//!
//! **Why this way.** Two files that belong together are replaced together only if their folder is: files are written and
//! synced under another name, then the names are exchanged (`renameat2`). Whoever opens the snapshot at any moment, after a
//! crash of the host too, finds the old one whole or the new one.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ipc::control::{SnapshotGrant, is_snapshot_name};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, fsync, unlinkat};

/// The files of a snapshot.
pub(super) const MEMORY: &CStr = c"memory";
/// As [`MEMORY`].
pub(super) const STATE: &CStr = c"state";

/// A snapshot that is being written. It leaves nothing behind unless it is [kept](Draft::keep).
#[derive(Debug)]
pub(super) struct Draft {
    /// For messages.
    path: PathBuf,
    parent: OwnedFd,
    name: CString,
    /// The folder's name until it is kept.
    draft: CString,
    folder: OwnedFd,
    memory: File,
    state: File,
}

fn text(name: impl AsRef<[u8]>) -> Result<CString, String> {
    CString::new(name.as_ref()).map_err(|_| "a path has a NUL in it".to_owned())
}

/// A new file for a core file of the guest, for writing. Nothing that exists is opened.
pub(super) fn dump_file(
    grant: Option<&SnapshotGrant>,
    folder: u32,
    name: &str,
) -> Result<OwnedFd, String> {
    let base = grant
        .and_then(|grant| grant.folders.get(folder as usize))
        .ok_or_else(|| format!("the policy has no folder {folder} for snapshots"))?;
    if !is_snapshot_name(name) {
        return Err("the name of the file is not one".into());
    }
    let failed = |what: &'static str| {
        move |e: Errno| format!("{}/{name}: {what}: {}", base.display(), e.desc())
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = nix::fcntl::open(base, flags, Mode::empty())
        .map_err(failed("its folder cannot be opened"))?;
    let flags =
        OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(&parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(failed("cannot be created"))
}

impl Draft {
    /// Makes the folder and its files.
    pub(super) fn begin(
        grant: Option<&SnapshotGrant>,
        folder: u32,
        name: Option<&str>,
    ) -> Result<Self, String> {
        let (grant, base) = grant
            .and_then(|grant| Some((grant, grant.folders.get(folder as usize)?)))
            .ok_or_else(|| format!("the policy has no folder {folder} for snapshots"))?;
        let path = match name {
            None => base.clone(),
            Some(name) if is_snapshot_name(name) => base.join(name),
            Some(_) => return Err("the name of the snapshot is not one".into()),
        };
        let told = |what: String| format!("snapshot {}: {what}", path.display());
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(told("not a path that a folder can have".into()));
        };
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        let failed = |what: &'static str| {
            let path = path.clone();
            move |e: Errno| format!("snapshot {}: {what}: {}", path.display(), e.desc())
        };
        let name = text(name.as_bytes())?;
        let draft = text(
            [
                b".",
                name.as_bytes(),
                b".",
                std::process::id().to_string().as_bytes(),
            ]
            .concat(),
        )?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let parent = nix::fcntl::open(parent, flags, Mode::empty())
            .map_err(failed("its parent folder cannot be opened"))?;
        exists(&parent, &name).map_err(told)?;
        mkdirat(&parent, draft.as_c_str(), Mode::S_IRWXU)
            .map_err(failed("cannot create a folder beside it"))?;
        let made = (|| {
            let folder = openat(
                &parent,
                draft.as_c_str(),
                flags | OFlag::O_NOFOLLOW,
                Mode::empty(),
            )?;
            let create = |name: &CStr| {
                let flags = OFlag::O_RDWR
                    | OFlag::O_CREAT
                    | OFlag::O_EXCL
                    | OFlag::O_NOFOLLOW
                    | OFlag::O_CLOEXEC;
                openat(&folder, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from)
            };
            let (memory, state) = (create(MEMORY)?, create(STATE)?);
            let size = libc::off_t::try_from(grant.memory).map_err(|_| Errno::EFBIG)?;
            nix::unistd::ftruncate(&memory, size)?;
            Ok((folder, memory, state))
        })();
        match made {
            Ok((folder, memory, state)) => Ok(Self {
                path,
                parent,
                name,
                draft,
                folder,
                memory,
                state,
            }),
            Err(e) => {
                remove(&parent, &draft);
                Err(failed("its files cannot be created")(e))
            }
        }
    }

    /// The files `memory`, as long as guest RAM, and `state`, for whoever writes them.
    pub(super) fn files(&self) -> [std::os::fd::BorrowedFd<'_>; 2] {
        [self.memory.as_fd(), self.state.as_fd()]
    }

    /// Puts the snapshot in its place.
    pub(super) fn keep(self) -> Result<(), String> {
        let failed = |what: &'static str| {
            let path = self.path.clone();
            move |e: Errno| format!("snapshot {}: {what}: {}", path.display(), e.desc())
        };
        for file in [self.memory.as_fd(), self.state.as_fd(), self.folder.as_fd()] {
            fsync(file).map_err(failed("cannot be written to the disk"))?;
        }
        let replaces = exists(&self.parent, &self.name)
            .map_err(|what| format!("snapshot {}: {what}", self.path.display()))?;
        let flags = if replaces {
            RenameFlags::RENAME_EXCHANGE
        } else {
            RenameFlags::RENAME_NOREPLACE
        };
        renameat2(
            &self.parent,
            self.draft.as_c_str(),
            &self.parent,
            self.name.as_c_str(),
            flags,
        )
        .map_err(failed("cannot be given its name"))?;
        // From here on there is a new snapshot, and what is left under the other name, if anything, is the old one.
        fsync(&self.parent).map_err(failed("its name cannot be written to the disk"))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        remove(&self.parent, &self.draft);
    }
}

/// Whether there is a snapshot of that name, or an empty folder, that may be replaced; an error if it is something else.
fn exists(parent: &OwnedFd, name: &CStr) -> Result<bool, String> {
    let told = |e: Errno| format!("what is there cannot be looked at: {}", e.desc());
    match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => return Ok(false),
        Err(e) => return Err(told(e)),
        Ok(stat) if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFDIR.bits() => {
            return Err("exists and is not a folder".into());
        }
        Ok(_) => {}
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut folder = Dir::openat(parent, name, flags, Mode::empty()).map_err(told)?;
    for entry in folder.iter() {
        let entry = entry.map_err(told)?;
        if ![c".", c"..", MEMORY, STATE].contains(&entry.file_name()) {
            return Err(format!(
                "exists and is no snapshot: it holds {}",
                entry.file_name().to_string_lossy()
            ));
        }
    }
    Ok(true)
}

/// Removes a folder with nothing in it but a snapshot's files.
fn remove(parent: &OwnedFd, name: &CStr) {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if let Ok(folder) = openat(parent, name, flags, Mode::empty()) {
        for file in [MEMORY, STATE] {
            let _ = unlinkat(&folder, file, UnlinkatFlags::NoRemoveDir);
        }
        let _ = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn grant(dir: &Path) -> SnapshotGrant {
        SnapshotGrant {
            folders: vec![dir.to_owned()],
            memory: 4096,
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn write(draft: &Draft, state: &str) {
        (&draft.state).write_all(state.as_bytes()).unwrap();
    }

    #[test]
    fn a_dump_is_a_new_file_in_a_granted_folder() {
        let dir = tempfile::tempdir().unwrap();
        let grant = SnapshotGrant {
            folders: vec![dir.path().to_owned()],
            memory: 4096,
        };
        let make = |folder, name: &str| dump_file(Some(&grant), folder, name);
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        for (folder, name, why) in [
            (1, "core", "no folder 1"),
            (0, "../core", "not one"),
            (0, ".core", "not one"),
            (0, "link", "File exists"),
        ] {
            let refused = make(folder, name).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
        assert!(dump_file(None, 0, "core").is_err());
        let file = File::from(make(0, "core").unwrap());
        assert_eq!(file.metadata().unwrap().len(), 0);
        assert!(make(0, "core").unwrap_err().contains("File exists"));
    }

    #[test]
    fn a_snapshot_appears_whole_and_replaces_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let grant = grant(dir.path());
        for (round, state) in ["first", "second"].into_iter().enumerate() {
            let draft = Draft::begin(Some(&grant), 0, Some("t")).unwrap();
            write(&draft, state);
            assert_eq!(dir.path().join("t").exists(), round == 1);
            draft.keep().unwrap();
            let mut text = String::new();
            File::open(dir.path().join("t/state"))
                .unwrap()
                .read_to_string(&mut text)
                .unwrap();
            assert_eq!(text, state);
            assert_eq!(names(dir.path()), ["t"]);
            assert_eq!(names(&dir.path().join("t")), ["memory", "state"]);
        }
        let length = std::fs::metadata(dir.path().join("t/memory"))
            .unwrap()
            .len();
        assert_eq!(length, 4096);
    }

    #[test]
    fn one_that_is_given_up_leaves_nothing_and_the_old_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let grant = grant(dir.path());
        let draft = Draft::begin(Some(&grant), 0, Some("t")).unwrap();
        write(&draft, "first");
        draft.keep().unwrap();
        let draft = Draft::begin(Some(&grant), 0, Some("t")).unwrap();
        write(&draft, "second");
        drop(draft);
        assert_eq!(names(dir.path()), ["t"]);
        assert_eq!(std::fs::read(dir.path().join("t/state")).unwrap(), b"first");
    }

    #[test]
    fn the_granted_folder_itself_becomes_a_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let grant = grant(&dir.path().join("template"));
        Draft::begin(Some(&grant), 0, None).unwrap().keep().unwrap();
        assert_eq!(names(dir.path()), ["template"]);
        assert_eq!(names(&dir.path().join("template")), ["memory", "state"]);
    }

    #[test]
    fn nothing_but_a_snapshot_is_ever_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let grant = grant(dir.path());
        let refused = |name: &str| {
            let error = Draft::begin(Some(&grant), 0, Some(name)).unwrap_err();
            assert!(error.contains(name) || error.contains("name"), "{error}");
            error
        };
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(refused("file").contains("not a folder"));
        std::fs::create_dir(dir.path().join("home")).unwrap();
        std::fs::write(dir.path().join("home/letter"), "").unwrap();
        assert!(refused("home").contains("it holds letter"));
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("link")).unwrap();
        assert!(refused("link").contains("not a folder"));
        for name in ["..", ".", "", "a/b", "../t"] {
            refused(name);
        }
        assert!(Draft::begin(Some(&grant), 1, Some("t")).is_err());
        assert!(Draft::begin(None, 0, Some("t")).is_err());
        assert_eq!(names(dir.path()), ["file", "home", "link"]);
        assert!(names(elsewhere.path()).is_empty());
    }

    #[test]
    fn a_folder_that_fills_up_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let grant = grant(dir.path());
        let draft = Draft::begin(Some(&grant), 0, Some("t")).unwrap();
        std::fs::create_dir(dir.path().join("t")).unwrap();
        std::fs::write(dir.path().join("t/letter"), "").unwrap();
        assert!(draft.keep().unwrap_err().contains("it holds letter"));
        assert_eq!(names(dir.path()), ["t"]);
        assert_eq!(names(&dir.path().join("t")), ["letter"]);
    }
}
