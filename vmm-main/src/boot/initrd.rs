//! The initial RAM disk.
//!
//! Job: place it as high as the kernel can reach, page aligned, and read it there.
//! Who is not trusted: the file may be of any size, and may shrink while it is read.
//! Why this way: kernels unpack themselves upwards from 1 or 16 MiB, so the far end is the one place that never
//! collides.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::memory::GuestRam;

const PAGE: u64 = 4096;

/// Reads the initrd so that it ends at or below `limit` and starts at or above `kernel_end`; returns (address, size).
pub(super) fn load(
    ram: &GuestRam,
    file: &mut File,
    kernel_end: u64,
    limit: u64,
) -> Result<(u64, u64), Error> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::ReadInitrd)?;
    if size == 0 {
        return Err(Error::EmptyInitrd);
    }
    let limit = limit.min(ram.low_end());
    let range_error = Error::InitrdRange {
        size,
        kernel_end,
        limit,
    };
    let Some(start) = limit.checked_sub(size).map(|start| start & !(PAGE - 1)) else {
        return Err(range_error);
    };
    if start < kernel_end {
        return Err(range_error);
    }
    file.rewind().map_err(Error::ReadInitrd)?;
    let length = usize::try_from(size).map_err(|_| range_error)?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(start), file, length)
        .map_err(|source| Error::Write {
            what: "the initrd",
            source,
        })?;
    Ok((start, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RamConfig;
    use std::io::Write;

    #[test]
    fn placed_page_aligned_below_the_limit() {
        let ram = GuestRam::new(RamConfig::new(128 << 20)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0x5A; 5000]).unwrap();
        let (start, size) = load(&ram, &mut file, 0x20_0000, u64::MAX).unwrap();
        assert_eq!((start, size), ((128 << 20) - 8192, 5000));
        assert_eq!(
            ram.memory()
                .read_obj::<u8>(GuestAddress(start + 4999))
                .unwrap(),
            0x5A
        );
        let (start, _) = load(&ram, &mut file, 0x20_0000, 0x37F_FFFF).unwrap();
        assert_eq!(start, 0x37F_E000 - 0x1000 + 0x1000 - (start % PAGE));
        assert!(start + 5000 <= 0x380_0000);
    }

    #[test]
    fn too_large_or_empty_is_refused() {
        let ram = GuestRam::new(RamConfig::new(128 << 20)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        assert!(matches!(
            load(&ram, &mut file, 0, u64::MAX),
            Err(Error::EmptyInitrd)
        ));
        file.set_len(127 << 20).unwrap();
        let error = load(&ram, &mut file, 2 << 20, u64::MAX).unwrap_err();
        assert!(matches!(error, Error::InitrdRange { .. }), "{error}");
        file.set_len(1 << 30).unwrap();
        assert!(matches!(
            load(&ram, &mut file, 0, u64::MAX),
            Err(Error::InitrdRange { .. })
        ));
    }
}
