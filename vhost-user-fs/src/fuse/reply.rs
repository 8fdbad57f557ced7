//! Answers to bytes.
//!
//! **Job.** Encodes replies into a buffer of this process; the buffer goes to the guest in one copy.
//! **Who is not trusted.** Nobody here; sizes were checked against what the guest has room for by the caller.
//! **Why this way.** A buffer of our own cannot change while it is filled, and can be thrown away when something fails
//! half-way.

use super::wire::{DIRENT, OUT_HEADER};

/// `fuse_out_header`. `len` counts the header; `error` is an error number or 0.
pub fn header(len: u32, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut out = [0; OUT_HEADER];
    out[..4].copy_from_slice(&len.to_ne_bytes());
    // The protocol sends errors negated.
    out[4..8].copy_from_slice(&error.wrapping_neg().to_ne_bytes());
    out[8..].copy_from_slice(&unique.to_ne_bytes());
    out
}

/// Appends fields to a reply.
pub trait Put {
    /// A `uint16_t`.
    fn u16(&mut self, value: u16) -> &mut Self;
    /// A `uint32_t`.
    fn u32(&mut self, value: u32) -> &mut Self;
    /// A `uint64_t`.
    fn u64(&mut self, value: u64) -> &mut Self;
    /// Zeros.
    fn zeros(&mut self, count: usize) -> &mut Self;
}

impl Put for Vec<u8> {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn zeros(&mut self, count: usize) -> &mut Self {
        self.resize(self.len() + count, 0);
        self
    }
}

/// How long the guest may keep something, in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Validity {
    /// Names.
    pub entry: u64,
    /// Attributes.
    pub attr: u64,
}

/// What a file is, in the protocol's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)] // fields of fuse_attr
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
    /// Not part of `fuse_attr`; `fuse_statx` has it.
    pub btime: Option<(i64, u32)>,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: (u32, u32),
    pub blksize: u32,
    /// `FUSE_ATTR_SUBMOUNT` or 0.
    pub flags: u32,
}

/// A device number as `new_encode_dev` of Linux packs it into 32 bits.
pub fn pack_dev((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The reverse of [`pack_dev`].
pub fn unpack_dev(dev: u32) -> (u32, u32) {
    (
        (dev & 0x000f_ff00) >> 8,
        (dev & 0xff) | ((dev >> 12) & 0x000f_ff00),
    )
}

/// `fuse_attr`.
pub fn attr(out: &mut Vec<u8>, a: &Attr) {
    out.u64(a.ino).u64(a.size).u64(a.blocks);
    for (seconds, _) in [a.atime, a.mtime, a.ctime] {
        out.u64(seconds.cast_unsigned());
    }
    for (_, nanos) in [a.atime, a.mtime, a.ctime] {
        out.u32(nanos);
    }
    out.u32(a.mode).u32(a.nlink).u32(a.uid).u32(a.gid);
    out.u32(pack_dev(a.rdev)).u32(a.blksize).u32(a.flags);
}

/// `fuse_attr_out`.
pub fn attr_out(out: &mut Vec<u8>, validity: Validity, a: &Attr) {
    out.u64(validity.attr).u32(0).u32(0);
    attr(out, a);
}

/// `fuse_entry_out`. Inode 0 tells that there is no such name, and how long that holds.
pub fn entry_out(out: &mut Vec<u8>, nodeid: u64, validity: Validity, a: &Attr) {
    // The generation is part of the node id already.
    out.u64(nodeid)
        .u64(0)
        .u64(validity.entry)
        .u64(validity.attr);
    out.u32(0).u32(0);
    attr(out, a);
}

/// `fuse_open_out`.
pub fn open_out(out: &mut Vec<u8>, fh: u64, open_flags: u32) {
    out.u64(fh).u32(open_flags).u32(0);
}

/// `fuse_statx_out`.
pub fn statx_out(out: &mut Vec<u8>, validity: Validity, a: &Attr) {
    out.u64(validity.attr).u32(0).u32(0).zeros(16);
    let mask = libc::STATX_BASIC_STATS
        | if a.btime.is_some() {
            libc::STATX_BTIME
        } else {
            0
        };
    out.u32(mask)
        .u32(a.blksize)
        .u64(0)
        .u32(a.nlink)
        .u32(a.uid)
        .u32(a.gid);
    // File types and permissions have 16 bits.
    out.u16(a.mode as u16).u16(0);
    out.u64(a.ino).u64(a.size).u64(a.blocks).u64(0);
    for (seconds, nanos) in [a.atime, a.btime.unwrap_or_default(), a.ctime, a.mtime] {
        out.u64(seconds.cast_unsigned()).u32(nanos).u32(0);
    }
    out.u32(a.rdev.0).u32(a.rdev.1).u32(0).u32(0).zeros(14 * 8);
}

/// Bytes of a directory entry with a name of `name_len` bytes.
pub fn dirent_len(name_len: usize) -> usize {
    (DIRENT + name_len).next_multiple_of(8)
}

/// `fuse_dirent` with its name and padding.
pub fn dirent(out: &mut Vec<u8>, ino: u64, off: u64, kind: u8, name: &[u8]) {
    let mut head = [0; DIRENT];
    head[..8].copy_from_slice(&ino.to_ne_bytes());
    head[8..16].copy_from_slice(&off.to_ne_bytes());
    // A name has at most 255 bytes.
    head[16..20].copy_from_slice(&(name.len() as u32).to_ne_bytes());
    head[20..].copy_from_slice(&u32::from(kind).to_ne_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(name);
    out.zeros(dirent_len(name.len()) - DIRENT - name.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::wire::ENTRY_OUT;

    #[test]
    fn sizes_are_the_protocols() {
        let attr = Attr::default();
        let size = |f: &dyn Fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            f(&mut out);
            out.len()
        };
        assert_eq!(size(&|o| super::attr(o, &attr)), 88);
        assert_eq!(size(&|o| attr_out(o, Validity::default(), &attr)), 104);
        assert_eq!(
            size(&|o| entry_out(o, 1, Validity::default(), &attr)),
            ENTRY_OUT
        );
        assert_eq!(size(&|o| open_out(o, 1, 0)), 16);
        assert_eq!(size(&|o| statx_out(o, Validity::default(), &attr)), 288);
        for len in 1..=255 {
            assert_eq!(
                size(&|o| dirent(o, 1, 2, 4, &vec![b'x'; len])),
                dirent_len(len)
            );
        }
        assert_eq!(dirent_len(8), 32);
    }

    #[test]
    fn device_numbers_survive() {
        for dev in [(0, 0), (1, 3), (8, 17), (0xfff, 0xf_ffff), (259, 300)] {
            assert_eq!(unpack_dev(pack_dev(dev)), dev);
        }
    }

    #[test]
    fn errors_are_negated() {
        assert_eq!(
            header(16, libc::ENOENT, 1)[4..8],
            (-libc::ENOENT).to_ne_bytes()
        );
    }
}
