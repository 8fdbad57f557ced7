//! Extended attributes.
//!
//! Off unless asked for, since an attribute can be a right: `security.capability` on a file that the host executes from this
//! tree is the guest's choice then. What needs privileges on the host beyond the tree (`trusted.*`) its kernel refuses.

use std::ffi::CString;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::{Passthrough, sys};
use crate::fuse::XattrName;
use crate::fuse::decode::XATTR_SIZE_MAX;
use crate::fuse::reply::Put;
use crate::fuse::wire::flag;

/// Bytes of a list of names at most (include/uapi/linux/limits.h).
const XATTR_LIST_MAX: usize = 65536;
const ACL_PREFIX: &[u8] = b"system.posix_acl_";

/// Whether new files in the folder get their permissions from a list.
pub(super) fn has_default_acl(folder: BorrowedFd<'_>) -> Result<bool, Errno> {
    let name = XattrName::of(c"system.posix_acl_default");
    match sys::get_xattr(folder, name, &mut []) {
        Ok(_) => Ok(true),
        Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno),
    }
}

impl Passthrough {
    /// Takes away what stands for `security.capability` on the host, as the kernel does with that itself when a file changes.
    pub(super) fn drop_mapped_capability(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let Some(name) = &self.mapped_capability else {
            return Ok(());
        };
        match sys::remove_xattr(fd, XattrName::of(name)) {
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// The host's name for one of the guest.
    fn host_name(&self, name: XattrName<'_>) -> Result<CString, Errno> {
        self.may_use(name)?;
        match &self.config.xattrmap {
            Some(map) => map.to_host(name.as_c_str()),
            None => Ok(name.as_c_str().to_owned()),
        }
    }

    fn may_use(&self, name: XattrName<'_>) -> Result<(), Errno> {
        if !self.config.xattr {
            // The guest stops asking.
            return Err(Errno::ENOSYS);
        }
        let acl = name.as_c_str().to_bytes().starts_with(ACL_PREFIX);
        if acl && !self.config.posix_acl {
            return Err(Errno::EOPNOTSUPP);
        }
        Ok(())
    }

    pub(super) fn get_xattr(
        &mut self,
        node: u64,
        name: XattrName<'_>,
        size: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let name = self.host_name(name)?;
        let fd = self.inodes.get(node)?.fd();
        answer(size, out, |buffer| {
            sys::get_xattr(fd, XattrName::of(&name), buffer)
        })
    }

    pub(super) fn list_xattr(
        &mut self,
        node: u64,
        size: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        if !self.config.xattr {
            return Err(Errno::ENOSYS);
        }
        let fd = self.inodes.get(node)?.fd();
        let Some(map) = &self.config.xattrmap else {
            return answer(size, out, |buffer| sys::list_xattr(fd, buffer));
        };
        let mut names = vec![0; XATTR_LIST_MAX];
        let len = sys::list_xattr(fd, &mut names)?;
        names.truncate(len);
        let mut seen = Vec::new();
        for name in names.split_inclusive(|byte| *byte == 0) {
            seen.extend_from_slice(map.to_guest(name).filter(|n| n.len() > 1).unwrap_or(&[]));
        }
        if size == 0 {
            // At most 64 KiB.
            out.u32(seen.len() as u32).u32(0);
        } else if seen.len() > size as usize {
            return Err(Errno::ERANGE);
        } else {
            out.append(&mut seen);
        }
        Ok(())
    }

    /// As [`Self::set_xattr`], done once even if the process that did it died before it could answer.
    pub(super) fn set_xattr_once(
        &mut self,
        node: u64,
        name: XattrName<'_>,
        value: &[u8],
        flags: (u32, u32),
    ) -> Result<(), Errno> {
        match self.set_xattr(node, name, value, flags) {
            // It was created, and then the process that created it died.
            Err(Errno::EEXIST) if self.journal.again().is_some() => {
                let mut there = Vec::new();
                // Values are below the cap of a request.
                self.get_xattr(node, name, value.len() as u32, &mut there)?;
                if there == value {
                    Ok(())
                } else {
                    Err(Errno::EEXIST)
                }
            }
            other => other,
        }
    }

    /// As [`Self::remove_xattr`], likewise.
    pub(super) fn remove_xattr_once(
        &mut self,
        node: u64,
        name: XattrName<'_>,
    ) -> Result<(), Errno> {
        match self.remove_xattr(node, name) {
            // It was removed, and then the process that removed it died.
            Err(Errno::ENODATA) if self.journal.again().is_some() => Ok(()),
            other => other,
        }
    }

    fn set_xattr(
        &mut self,
        node: u64,
        name: XattrName<'_>,
        value: &[u8],
        (flags, setxattr_flags): (u32, u32),
    ) -> Result<(), Errno> {
        let name = self.host_name(name)?;
        let fd = self.inodes.get(node)?.fd();
        sys::set_xattr(fd, XattrName::of(&name), value, flags.cast_signed())?;
        if setxattr_flags & flag::SETXATTR_ACL_KILL_SGID != 0 {
            let mode = u32::from(sys::stat(fd)?.stx_mode);
            if mode & libc::S_ISGID != 0 {
                self.own.chmod(fd, mode & 0o7777 & !libc::S_ISGID)?;
            }
        }
        Ok(())
    }

    fn remove_xattr(&mut self, node: u64, name: XattrName<'_>) -> Result<(), Errno> {
        let name = self.host_name(name)?;
        sys::remove_xattr(self.inodes.get(node)?.fd(), XattrName::of(&name))
    }
}

/// Answers with the bytes that `get` gives, or with their number if the guest asks for that with a size of 0.
fn answer(
    size: u32,
    out: &mut Vec<u8>,
    get: impl Fn(&mut [u8]) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    if size == 0 {
        let len = get(&mut [])?;
        // At most 64 KiB.
        out.u32(len as u32).u32(0);
        return Ok(());
    }
    out.resize((size as usize).min(XATTR_SIZE_MAX), 0);
    let len = get(out)?;
    out.truncate(len);
    Ok(())
}
