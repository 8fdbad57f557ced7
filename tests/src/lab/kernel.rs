//! # Debian's kernels
//!
//! **Job.** Unpack a stock kernel package into the cache: the bzImage, the same kernel as an ELF file, and its
//! modules. Nothing is installed.
//! **Who is not trusted.** Nobody; apt checks the package's signature.
//! **Why this way.** Guests that a distribution ships are what users boot. The ELF form boots seconds sooner
//! under emulation, as no decompressor runs in the guest, and is the second format that the product must boot.

use super::{LabError, packages, run_program};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Which of Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flavour {
    /// `linux-image-cloud-amd64`: small, all that a virtual machine needs.
    #[default]
    Cloud,
    /// `linux-image-amd64`: also graphics, USB, sound and cameras.
    Full,
}

impl Flavour {
    fn metapackage(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Full => "linux-image-amd64",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Full => "full",
        }
    }
}

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The folder that holds everything below; `lib/modules` is in it.
    pub root: PathBuf,
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The uncompressed ELF kernel.
    pub elf: PathBuf,
    /// The release, as `uname -r` prints it in the guest.
    pub release: String,
}

/// Where kernels and initial RAM file systems are kept: `$STRATOVIRT_LAB_DIR`, else a folder in the user's cache,
/// else one in `/var/tmp`.
#[must_use]
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("STRATOVIRT_LAB_DIR") {
        return dir.into();
    }
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache")))
        .filter(|p| p.is_absolute());
    base.map_or_else(
        || "/var/tmp/stratovirt-lab".into(),
        |b| b.join("stratovirt-lab"),
    )
}

/// Holds the cache's lock until dropped, so that tests that run at once fill it once.
pub(crate) fn lock_cache() -> Result<nix::fcntl::Flock<File>, LabError> {
    let dir = cache_dir();
    fs::create_dir_all(&dir).map_err(LabError::file("create", &dir))?;
    let path = dir.join("lock");
    let file = File::create(&path).map_err(LabError::file("create", &path))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).map_err(|(_, errno)| {
        LabError::System {
            action: "lock the lab's cache",
            source: errno.into(),
        }
    })
}

impl Kernel {
    /// The kernel from the cache, or from Debian when it is not there yet. The cache must be locked.
    pub(crate) fn unpacked(flavour: Flavour) -> Result<Self, LabError> {
        let root = cache_dir().join(flavour.name());
        if !root.join("release").exists() {
            unpack(flavour, &root)?;
        }
        let path = root.join("release");
        let release = fs::read_to_string(&path).map_err(LabError::file("read", &path))?;
        Ok(Self {
            bzimage: root.join("vmlinuz"),
            elf: root.join("vmlinux"),
            release: release.trim().to_owned(),
            root,
        })
    }

    /// The files of `modules` and of all that they need, in the order to load them. Built-in ones give none.
    pub(crate) fn modules(&self, modules: &[&str]) -> Result<Vec<PathBuf>, LabError> {
        let mut files = Vec::new();
        for module in modules {
            let mut modprobe = Command::new("modprobe");
            modprobe.arg("-d").arg(&self.root).args([
                "-S",
                &self.release,
                "--show-depends",
                module,
            ]);
            let text = run_program(&mut modprobe)?;
            for line in String::from_utf8_lossy(&text).lines() {
                let Some(rest) = line.strip_prefix("insmod ") else {
                    continue;
                };
                let file = PathBuf::from(rest.split_whitespace().next().unwrap_or_default());
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }
}

fn unpack(flavour: Flavour, root: &Path) -> Result<(), LabError> {
    packages::ensure(&["kmod", "lz4", "xz-utils", "zstd"])?;
    let package = match newest_package(flavour)? {
        Some(package) => package,
        None => {
            packages::refresh_lists()?;
            newest_package(flavour)?.ok_or_else(|| {
                LabError::Host(format!(
                    "apt knows no package for {}",
                    flavour.metapackage()
                ))
            })?
        }
    };
    eprintln!("fetching {package} from Debian (unpacked into the cache, not installed)");
    // Everything is made beside the cache and renamed, so that an interrupted run leaves no half of a kernel.
    let parent = root.parent().unwrap_or(root);
    let work = tempfile::Builder::new()
        .prefix("unpack-")
        .tempdir_in(parent)
        .map_err(LabError::file("create a folder in", parent))?;
    let download = work.path().join("deb");
    fs::create_dir(&download).map_err(LabError::file("create", &download))?;
    run_program(
        Command::new("apt-get")
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", &package])
            .current_dir(&download),
    )?;
    let deb = only_entry(&download)?;
    let out = work.path().join("out");
    run_program(Command::new("dpkg").arg("-x").arg(&deb).arg(&out))?;
    // Debian 13 has /usr/lib/modules only; depmod and modprobe look in lib/modules below their root.
    if !out.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", out.join("lib"))
            .map_err(LabError::file("link", out.join("lib")))?;
    }
    let release = only_entry(&out.join("lib/modules"))?;
    let release = release
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    run_program(Command::new("depmod").arg("-b").arg(&out).arg(&release))?;
    let bzimage = out.join("vmlinuz");
    let shipped = out.join(format!("boot/vmlinuz-{release}"));
    fs::rename(&shipped, &bzimage).map_err(LabError::file("rename", &shipped))?;
    let elf = out.join("vmlinux");
    fs::write(&elf, elf_from_bzimage(&bzimage)?).map_err(LabError::file("write", &elf))?;
    fs::write(out.join("release"), &release)
        .map_err(LabError::file("write", out.join("release")))?;
    fs::rename(&out, root).map_err(LabError::file("rename", &out))
}

/// The package that a metapackage stands for today.
fn newest_package(flavour: Flavour) -> Result<Option<String>, LabError> {
    let text = run_program(Command::new("apt-cache").args(["depends", flavour.metapackage()]))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok(text
        .lines()
        .find_map(|l| l.trim().strip_prefix("Depends: "))
        .filter(|p| p.starts_with("linux-image"))
        .map(str::to_owned))
}

fn only_entry(dir: &Path) -> Result<PathBuf, LabError> {
    let mut entries = fs::read_dir(dir).map_err(LabError::file("read", dir))?;
    match entries.next() {
        Some(Ok(entry)) => Ok(entry.path()),
        _ => Err(LabError::Host(format!("{} is empty", dir.display()))),
    }
}

/// Takes the compressed ELF kernel out of a bzImage: `payload_offset` and `payload_length` of the setup header
/// (x86 boot protocol 2.08, at 0x248) give a compressed stream that is followed by its size in four bytes.
fn elf_from_bzimage(path: &Path) -> Result<Vec<u8>, LabError> {
    let image = fs::read(path).map_err(LabError::file("read", path))?;
    let wrong = |reason: &str| LabError::Image {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let word = |at: usize| -> Option<usize> {
        let bytes: [u8; 4] = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(wrong("no setup header"));
    }
    // Zero setup sectors mean four, for the sake of very old loaders.
    let sectors = image
        .get(0x1f1)
        .map_or(0, |&s| if s == 0 { 4 } else { usize::from(s) });
    let (offset, length) = word(0x248)
        .zip(word(0x24c))
        .ok_or_else(|| wrong("a short setup header"))?;
    let start = (sectors + 1) * 512 + offset;
    let stream = image
        .get(start..(start + length).saturating_sub(4))
        .ok_or_else(|| wrong("a payload outside of the file"))?;
    let decompressor = match stream {
        [0x02, 0x21, 0x4c, 0x18, ..] => ["lz4", "-dqc"],
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ["zstd", "-dqc"],
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ["xz", "-dc"],
        [0x1f, 0x8b, ..] => ["gzip", "-dc"],
        _ => return Err(wrong("a payload in an unknown compression")),
    };
    let elf = decompress(decompressor, stream)?;
    if elf.get(..4) != Some(b"\x7fELF") {
        return Err(wrong("a payload that is no ELF file"));
    }
    Ok(elf)
}

fn decompress(program: [&str; 2], stream: &[u8]) -> Result<Vec<u8>, LabError> {
    let mut input = tempfile::tempfile().map_err(LabError::system("create a temporary file"))?;
    input
        .write_all(stream)
        .map_err(LabError::system("write a temporary file"))?;
    std::io::Seek::rewind(&mut input).map_err(LabError::system("rewind a temporary file"))?;
    let output = Command::new(program[0])
        .arg(program[1])
        .stdin(Stdio::from(input))
        .output()
        .map_err(|source| LabError::Start {
            program: program.join(" "),
            source,
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(LabError::Failed {
        program: program.join(" "),
        status: output.status,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
