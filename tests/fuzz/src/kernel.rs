//! # `kernel`: an ELF or bzImage and an initrd into guest memory
//!
//! Byte 0 chooses the protocol, whether there is an initrd and how long the command line is. What is accepted lies in RAM.

use crate::bytes::Input;
use crate::once;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use vmm_main::boot::{BootSource, Protocol, load};
use vmm_main::memory::{GuestRam, RamConfig};

const RAM: u64 = 128 << 20;

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let file = |bytes: &[u8]| {
        let file =
            File::from(memfd_create(c"kernel", MFdFlags::MFD_CLOEXEC).expect("memfd_create"));
        nix::sys::uio::pwrite(&file, bytes, 0).expect("pwrite");
        file
    };
    let mut source = BootSource {
        kernel: file(input.0),
        initrd: (kind & 4 != 0).then(|| file(&[0x30; 5000])),
        cmdline: "x".repeat(usize::from(kind >> 3) * 70),
        protocol: match kind & 3 {
            0 => Protocol::Linux64,
            1 => Protocol::Pvh,
            _ => Protocol::Auto,
        },
    };
    once!(
        GuestRam,
        GuestRam::new(RamConfig::new(RAM)).expect("RAM"),
        |ram: &mut GuestRam| {
            match load(
                ram,
                &mut source,
                &["virtio_mmio.device=4K@0xd0000000:5".to_owned()],
            ) {
                Ok(loaded) => {
                    assert!(loaded.kernel_end <= RAM);
                    if let Some((start, size)) = loaded.initrd {
                        assert!(start >= loaded.kernel_end && start + size <= RAM);
                    }
                    crate::planted!(loaded.format == vmm_main::boot::KernelFormat::BzImage);
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    );
}
