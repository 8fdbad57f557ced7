//! # The Linux guest
//!
//! **Job.** Kernel and initial RAM file system of the guest that tests, demo and benches boot, and the script
//! that it runs. **Who is not trusted.** The guest has no say here; what it prints is read by the tests.
//! **Why this way.** Debian's stock kernel and busybox: nothing that was made to suit this product.
//!
//! The guest prints `GUEST-UP uptime=… cpus=…`, runs the test's script (or the `run=` words of the kernel's
//! command line, with `+` for a space), prints `GUEST-END status=…`, and then does what `then=` says:
//! `poweroff` (also the default after a script), `reboot`, or `shell` (the default without a script).

use super::kernel::{Flavour, Kernel, cache_dir, lock_cache};
use super::{Archive, LabError, initramfs, packages};
use std::fs;
use std::path::PathBuf;

/// What the guest's disks, network cards and consoles need, on either transport.
const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "ext4",
    "button",
    "evdev",
    "vmw_vsock_virtio_transport",
    "virtiofs",
];

/// Raised with each change of [`INIT`] or [`MODULES`], so that a cached system is made anew.
const VERSION: u32 = 2;

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin:/sbin HOME=/root
/bin/busybox --install -s /bin
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
for m in /mods/*; do insmod "$m" || echo "GUEST-MODULE-FAILED $m"; done
ifconfig lo up
echo "GUEST-UP uptime=$(cut -d' ' -f1 /proc/uptime) cpus=$(nproc)"
then=shell; status=0
if [ -e /lab-script ]; then then=poweroff; sh /lab-script; status=$?; fi
for word in $(cat /proc/cmdline); do
  case "$word" in
    run=*) then=poweroff; sh -c "$(echo "${word#run=}" | tr '+' ' ')"; status=$? ;;
  esac
done
for word in $(cat /proc/cmdline); do
  case "$word" in then=*) then=${word#then=} ;; esac
done
echo "GUEST-END status=$status then=$then"
case "$then" in
  reboot) reboot -f ;;
  shell) while :; do setsid cttyhack sh -l; done ;;
  *) poweroff -f ;;
esac
"#;

/// A script that the guest runs with busybox' shell after its start.
#[derive(Debug, Clone, Default)]
pub struct Script(String);

impl Script {
    /// A script of these lines; the status of the last is the one that `GUEST-END` tells.
    #[must_use]
    pub fn new(lines: &str) -> Self {
        Self(lines.to_owned())
    }
}

/// The material of a guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel.
    pub kernel: Kernel,
    /// The initial RAM file system without a script.
    pub initrd: PathBuf,
}

impl Guest {
    /// The guest on Debian's kernel, from the cache or made now.
    ///
    /// # Errors
    /// When something is missing that cannot be installed.
    pub fn ready(flavour: Flavour) -> Result<Self, LabError> {
        let _lock = lock_cache()?;
        let kernel = Kernel::unpacked(flavour)?;
        let initrd = cache_dir().join(format!("guest-{}-{VERSION}.cpio", flavour.name()));
        if !initrd.exists() {
            packages::ensure(&["busybox-static", "kmod", "xz-utils"])?;
            let system = initramfs::busybox_system(INIT, &kernel.modules(MODULES)?)?;
            let temporary = initrd.with_extension("new");
            fs::write(&temporary, system).map_err(LabError::file("write", &temporary))?;
            fs::rename(&temporary, &initrd).map_err(LabError::file("rename", &temporary))?;
        }
        Ok(Self { kernel, initrd })
    }

    /// An initial RAM file system that also holds `script`; it is gone when the returned file is dropped.
    ///
    /// # Errors
    /// When files cannot be read or written.
    pub fn initrd_with(&self, script: &Script) -> Result<tempfile::NamedTempFile, LabError> {
        let mut bytes = fs::read(&self.initrd).map_err(LabError::file("read", &self.initrd))?;
        let mut archive = Archive::default();
        archive.file("lab-script", script.0.as_bytes());
        bytes.extend(archive.finish());
        let file =
            tempfile::NamedTempFile::new().map_err(LabError::system("create a temporary file"))?;
        fs::write(file.path(), bytes).map_err(LabError::file("write", file.path()))?;
        Ok(file)
    }
}
