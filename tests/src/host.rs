//! # What tests need from the host
//!
//! **Job.** Requirements that name what is missing, and things on the host that go away with their owner: disk images
//! and tap interfaces.
//! **Who is not trusted.** Nobody.
//! **Why this way.** A test that cannot run fails with the reason; one that quietly does nothing is worth nothing.

use crate::lab::{LabError, ensure_packages, run_program};
use std::collections::VecDeque;
use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// `/dev/kvm` must take a guest, be it a bare one.
///
/// # Panics
/// When it cannot be opened, with the reason.
pub fn require_kvm() {
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    assert!(
        opened.is_ok(),
        "this test needs /dev/kvm: {}",
        opened.err().map_or_else(String::new, |e| e.to_string())
    );
}

/// This process must be root: it makes interfaces, or user namespaces with a map of its own.
///
/// # Panics
/// When it is not.
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network interfaces and needs root"
    );
}

/// The last `count` messages of the kernel, with the second since its boot; nothing where they may not be read.
#[must_use]
pub fn kernel_log(count: usize) -> String {
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = opened else {
        return String::new();
    };
    let mut messages = VecDeque::new();
    let mut record = [0; 8192];
    // A read gives one record, "level,number,microseconds,flags;text" and then lines about the device, or fails when none is left
    // (Documentation/ABI/testing/dev-kmsg).
    while let Ok(length @ 1..) = log.read(&mut record) {
        let record = String::from_utf8_lossy(&record[..length]);
        let Some((prefix, text)) = record.split_once(';') else {
            continue;
        };
        let time = prefix.split(',').nth(2).and_then(|t| t.parse::<u64>().ok());
        let seconds = Duration::from_micros(time.unwrap_or(0)).as_secs_f64();
        let text = text.lines().next().unwrap_or_default();
        messages.push_back(format!("[{seconds:12.6}] {text}\n"));
        if messages.len() > count {
            messages.pop_front();
        }
    }
    messages.into_iter().collect()
}

/// Landlock's version in the running kernel; 0 without Landlock.
#[must_use]
#[allow(unsafe_code)] // no library asks for the version alone
pub fn landlock_abi() -> u32 {
    const CREATE_RULESET_VERSION: libc::c_uint = 1; // include/uapi/linux/landlock.h
    // SAFETY: with this flag the call takes a null pointer and the size 0, and gives a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).unwrap_or(0)
}

/// Makes an ext4 image of `mebibytes` that holds the files of `content`.
///
/// # Errors
/// When it cannot be made.
pub fn ext4_image(image: &Path, mebibytes: u64, content: &Path) -> Result<(), LabError> {
    ensure_packages(&["e2fsprogs"])?;
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(content)
        .arg(image)
        .arg(format!("{mebibytes}M"));
    run_program(&mut mke2fs).map(drop)
}

/// Checks an ext4 image without changing it.
///
/// # Errors
/// With what is wrong, when something is.
pub fn check_ext4(image: &Path) -> Result<(), LabError> {
    ensure_packages(&["e2fsprogs"])?;
    run_program(Command::new("/sbin/e2fsck").arg("-fn").arg(image)).map(drop)
}

/// Has the journal of an ext4 image done, as a mount does after a power failure, and then checks the image.
///
/// # Errors
/// With what is wrong beyond that, when something is.
pub fn recover_ext4(image: &Path) -> Result<(), LabError> {
    ensure_packages(&["e2fsprogs"])?;
    run_program(
        Command::new("/sbin/e2fsck")
            .args(["-E", "journal_only", "-y"])
            .arg(image),
    )?;
    check_ext4(image)
}

/// Reads a file out of an ext4 image without mounting it.
///
/// # Errors
/// When the image holds no such file.
pub fn read_from_ext4(image: &Path, file: &str) -> Result<Vec<u8>, LabError> {
    ensure_packages(&["e2fsprogs"])?;
    let out =
        tempfile::NamedTempFile::new().map_err(LabError::system("create a temporary file"))?;
    let request = format!("dump {file} {}", out.path().display());
    run_program(
        Command::new("/sbin/debugfs")
            .arg("-R")
            .arg(request)
            .arg(image),
    )?;
    fs::read(out.path()).map_err(LabError::file("read", out.path()))
}

/// A tap interface with an address, which goes away with its owner.
#[derive(Debug)]
pub struct Tap {
    /// Its name.
    pub name: String,
    /// The host's address on it.
    pub address: String,
}

impl Tap {
    /// Makes an interface `name` with `address`, given with its prefix length ("10.0.2.1/24").
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(name: &str, address: &str) -> Result<Self, LabError> {
        Self::of_user(name, address, 0)
    }

    /// As [`Tap::new`], for a user who may attach to it without being root.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn of_user(name: &str, address: &str, uid: u32) -> Result<Self, LabError> {
        Self::made(name, address, &["user", &uid.to_string()])
    }

    /// As [`Tap::new`], for several queues.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn of_queues(name: &str, address: &str) -> Result<Self, LabError> {
        Self::made(name, address, &["multi_queue"])
    }

    fn made(name: &str, address: &str, more: &[&str]) -> Result<Self, LabError> {
        ensure_packages(&["iproute2"])?;
        let words = ["tuntap", "add", "dev", name, "mode", "tap"];
        run_program(Command::new("ip").args(words).args(more))?;
        let tap = Self {
            name: name.to_owned(),
            address: address.split('/').next().unwrap_or_default().to_owned(),
        };
        run_program(Command::new("ip").args(["addr", "add", address, "dev", name]))?;
        run_program(Command::new("ip").args(["link", "set", name, "up"]))?;
        Ok(tap)
    }

    /// Gives it another address.
    ///
    /// # Errors
    /// When it cannot have it.
    pub fn add_address(&self, address: &str) -> Result<(), LabError> {
        let words = ["addr", "add", address, "dev", &self.name];
        run_program(Command::new("ip").args(words)).map(drop)
    }

    /// One queue of it with `virtio_net_hdr`, as the broker opens it.
    ///
    /// # Errors
    /// When somebody else has it.
    pub fn queue(&self) -> Result<OwnedFd, LabError> {
        tun_queue(
            &self.name,
            libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
        )
    }
}

/// One queue of the tun or tap interface `name`, opened with `flags`; one that is not there is made, for as long as this is open.
///
/// # Errors
/// When it is of another kind, or somebody else has it.
#[allow(unsafe_code)] // an interface is named to the driver by an ioctl
pub fn tun_queue(name: &str, flags: libc::c_int) -> Result<OwnedFd, LabError> {
    const TUN: &str = "/dev/net/tun";
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN)
        .map_err(LabError::file("open", TUN))?;
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&(flags as u16).to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes a structure of 40 bytes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    nix::errno::Errno::result(result).map_err(LabError::system("TUNSETIFF"))?;
    Ok(file.into())
}

impl Drop for Tap {
    fn drop(&mut self) {
        // It fails only when someone else has removed it.
        let _ = run_program(Command::new("ip").args(["link", "del", &self.name]));
    }
}
