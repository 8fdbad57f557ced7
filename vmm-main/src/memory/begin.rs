//! Guest memory that begins with the content of a file which the guest's writes must not reach.
//!
//! **Job.** Copies a file into its zone of the memfd, holes left out.
//! **Who is not trusted.** Nobody: the file is the command line's, and its bytes are the guest's.
//! **Why this way.** A private mapping would be this process's alone, and device processes work in guest memory too: they can have
//! it from a descriptor only, in which all of them write. So it is a copy, made once, of what the file has.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// Copies the first `size` bytes of `source`, or as many as it has, to `start` of `memory`.
pub(super) fn copy(mut source: &File, mut memory: &File, start: u64, size: u64) -> io::Result<()> {
    let end = source.metadata()?.len().min(size);
    let mut at = 0;
    while at < end {
        let data = match lseek(source, at.cast_signed(), Whence::SeekData) {
            Ok(data) => data.cast_unsigned(),
            // Nothing but a hole up to its end.
            Err(Errno::ENXIO) => return Ok(()),
            // A file system that does not know of holes.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => at,
            Err(errno) => return Err(errno.into()),
        };
        let hole = match lseek(source, data.cast_signed(), Whence::SeekHole) {
            Ok(hole) => hole.cast_unsigned().min(end),
            Err(_) => end,
        };
        if data >= end {
            return Ok(());
        }
        source.seek(SeekFrom::Start(data))?;
        memory.seek(SeekFrom::Start(start + data))?;
        let copied = io::copy(&mut source.take(hole - data), &mut memory)?;
        if copied == 0 {
            // It was made shorter meanwhile.
            return Ok(());
        }
        at = data + copied;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use vm_memory::{Bytes, GuestAddress};

    use super::super::{Backing, GuestRam, MIN_SIZE, RamConfig, Zone};

    /// The second zone of a guest begins with a file that has a hole and an odd end; the guest's writes stay away from it.
    #[test]
    fn a_guest_begins_with_a_file_that_it_does_not_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let file = std::fs::File::create(&path).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"last", (32 << 20) + 77).unwrap();
        let before = std::fs::read(&path).unwrap();
        let opened = std::fs::File::open(&path).unwrap();
        let mut config = RamConfig::new(MIN_SIZE);
        config.zones.push(Zone {
            backing: Backing::from(opened),
            ..Zone::new(64 << 20)
        });
        let ram = GuestRam::new(config).unwrap();
        let read = |address| {
            ram.memory()
                .read_obj::<[u8; 5]>(GuestAddress(address))
                .unwrap()
        };
        assert_eq!(&read(0), &[0; 5]);
        assert_eq!(&read(MIN_SIZE), b"first");
        assert_eq!(&read(MIN_SIZE + (32 << 20) + 77), b"last\0");
        let region = ram.regions().next().unwrap();
        assert!(
            region.file.metadata().unwrap().blocks() * 512 < 1 << 20,
            "a hole was copied"
        );
        ram.memory()
            .write_obj(*b"other", GuestAddress(MIN_SIZE))
            .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    /// A file that is longer than the zone ends with it.
    #[test]
    fn what_does_not_fit_stays_outside() {
        let mut config = RamConfig::new(MIN_SIZE);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        std::fs::write(&path, vec![0x5a; (MIN_SIZE + 4096) as usize]).unwrap();
        config.zones[0].backing = Backing::from(std::fs::File::open(&path).unwrap());
        config.zones.push(Zone::new(4096));
        let ram = GuestRam::new(config).unwrap();
        let read = |address| ram.memory().read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((read(MIN_SIZE - 1), read(MIN_SIZE)), (0x5a, 0));
    }
}
