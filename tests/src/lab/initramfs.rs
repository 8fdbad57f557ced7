//! # Initial RAM file systems
//!
//! **Job.** Write cpio archives in the "newc" format that Linux unpacks at boot
//! (kernel documentation, `driver-api/early-userspace/buffer-format`), and put a busybox system with a set of
//! kernel modules into one.
//! **Who is not trusted.** Nobody; all input is this project's or Debian's.
//! **Why this way.** The format is a few lines, Linux accepts several archives one after the other (so a test's
//! own script is appended to a cached system), and no archiver has to be installed.

use super::{LabError, run_program};
use std::path::Path;
use std::process::Command;

/// File type and permission bits, as `stat` gives them.
const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// A cpio archive under construction.
#[derive(Debug, Default, Clone)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder. Its parent must have been added before.
    pub fn dir(&mut self, path: &str) -> &mut Self {
        self.entry(path, DIRECTORY, &[])
    }

    /// Adds a file that root can execute.
    pub fn file(&mut self, path: &str, content: &[u8]) -> &mut Self {
        self.entry(path, EXECUTABLE, content)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(path, SYMLINK, target.as_bytes())
    }

    /// The archive's bytes; further archives may follow them.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> &mut Self {
        self.entries += 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }
}

/// A busybox system: `init` is run as process 1, the modules lie in `/mods` in the order to load them.
pub(crate) fn busybox_system(
    init: &str,
    modules: &[std::path::PathBuf],
) -> Result<Vec<u8>, LabError> {
    let busybox = std::fs::read("/bin/busybox").map_err(LabError::file("read", "/bin/busybox"))?;
    let mut archive = Archive::default();
    for dir in [
        "bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "run", "root", "mnt", "mods", "lower",
        "upper", "new",
    ] {
        archive.dir(dir);
    }
    archive
        .file("bin/busybox", &busybox)
        .symlink("bin/sh", "busybox");
    for (number, module) in modules.iter().enumerate() {
        let stem = module
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let stem = stem.trim_end_matches(".ko");
        archive.file(
            &format!("mods/{number:03}-{stem}.ko"),
            &uncompressed_module(module)?,
        );
    }
    archive.file("init", init.as_bytes());
    Ok(archive.finish())
}

/// Newer Debian releases compress modules; busybox' insmod takes them plain.
fn uncompressed_module(path: &Path) -> Result<Vec<u8>, LabError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => run_program(Command::new("xz").arg("-dc").arg(path)),
        Some("zst") => run_program(Command::new("zstd").arg("-dcq").arg(path)),
        _ => std::fs::read(path).map_err(LabError::file("read", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn an_archive_is_what_cpio_lists() {
        let mut archive = Archive::default();
        archive
            .dir("etc")
            .file("etc/name", b"guest")
            .symlink("etc/link", "name");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(&bytes[..6], b"070701");
        // the second header follows "etc\0" padded to four bytes: 110 + 4 -> 116
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(&bytes[116 + 54..116 + 62], b"00000005", "size of etc/name");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }
}
