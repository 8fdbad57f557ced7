//! # Debian's programs in a guest
//!
//! **Job.** An ext4 image with a program of the distribution and every library that it is linked with, for guests that have
//! busybox alone. **Who is not trusted.** Nobody: the files are Debian's.
//! **Why this way.** The loader that comes along is told where the libraries are, so that they need no folders of their own and
//! the guest needs no file system like a host's. The image is read page by page, so a large library costs only what is used
//! of it. It is kept in the lab's cache for as long as the program is the one that is installed.

use super::kernel::{cache_dir, lock_cache};
use super::{LabError, packages, run_program};
use crate::host::ext4_image;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// How a guest starts the program of an image that is mounted at `at`.
#[must_use]
pub fn command(at: &str, name: &str) -> String {
    format!("{at}/loader --library-path {at}/lib {at}/{name}")
}

/// The image with the program `name`, which Debian's package of the same name has in `/usr/bin` or `/usr/sbin`.
///
/// # Errors
/// When the package cannot be installed, or the image cannot be made.
pub fn image(name: &str) -> Result<PathBuf, LabError> {
    packages::ensure(&[name])?;
    let folders = ["/usr/bin", "/usr/sbin"].map(Path::new);
    let program = folders.map(|folder| folder.join(name));
    let program = program.into_iter().find(|program| program.exists());
    let program = program
        .ok_or_else(|| LabError::Host(format!("Debian's package {name} has no program {name}")))?;
    let made = |path: &Path| fs::metadata(path).and_then(|one| one.modified());
    let image = cache_dir().join(format!("program-{name}.ext4"));
    let _lock = lock_cache()?;
    let since = made(&program).map_err(LabError::file("look at", &program))?;
    if made(&image).is_ok_and(|then| then > since) {
        return Ok(image);
    }
    let work = tempfile::tempdir().map_err(LabError::system("create a temporary folder"))?;
    let content = work.path().join("content");
    let libraries = content.join("lib");
    fs::create_dir_all(&libraries).map_err(LabError::file("create", &libraries))?;
    let mut bytes = 0;
    let mut copy = |from: &Path, to: PathBuf| {
        let copied = fs::copy(from, to).map_err(LabError::file("copy", from))?;
        bytes += copied;
        Ok::<(), LabError>(())
    };
    copy(&program, content.join(name))?;
    let linked = run_program(Command::new("ldd").arg(&program))?;
    for line in String::from_utf8_lossy(&linked).lines() {
        let library = library(line);
        match library {
            Some(Library::Loader(path)) => copy(path, content.join("loader"))?,
            Some(Library::Other(name, path)) => copy(path, libraries.join(name))?,
            None => {}
        }
    }
    let temporary = image.with_extension("new");
    // A quarter for what ext4 itself needs.
    ext4_image(&temporary, (bytes >> 20) * 5 / 4 + 8, &content)?;
    fs::rename(&temporary, &image).map_err(LabError::file("rename", &temporary))?;
    Ok(image)
}

/// What a line of ldd's names.
#[derive(Debug, PartialEq, Eq)]
enum Library<'a> {
    Loader(&'a Path),
    Other(&'a str, &'a Path),
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`; the kernel's own page has no file.
fn library(line: &str) -> Option<Library<'_>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        [name, "=>", path, _] => Some(Library::Other(name, Path::new(path))),
        [path, _] if path.starts_with('/') => Some(Library::Loader(Path::new(path))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Library, library};
    use std::path::Path;

    #[test]
    fn what_ldd_prints_is_read() {
        assert_eq!(
            library("\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f74ce35c000)"),
            Some(Library::Other(
                "libz.so.1",
                Path::new("/lib/x86_64-linux-gnu/libz.so.1")
            ))
        );
        assert_eq!(
            library("\t/lib64/ld-linux-x86-64.so.2 (0x00007f74ce3a2000)"),
            Some(Library::Loader(Path::new("/lib64/ld-linux-x86-64.so.2")))
        );
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007f74ce3a0000)"), None);
        assert_eq!(library("\tnot a dynamic executable"), None);
    }
}
