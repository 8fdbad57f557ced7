//! Giving back the pages of code that has had its time.
//!
//! **Job.** Takes this binary's code and constants out of the page table once start-up is over. The kernel maps them again, from
//! its page cache, where serving needs them.
//! **Who is not trusted.** Nobody: nothing here depends on input.
//! **Why this way.** A static binary runs most of its C library's and its own start-up code once, and the kernel maps sixteen
//! pages around each one that is touched. Without this, each device process keeps a megabyte in its page table that it never
//! looks at again.

#![allow(unsafe_code)] // the program headers are found by address

use nix::errno::Errno;

/// Unmaps the pages of the segments that are never written. Failing means that they stay, which is no error.
pub(crate) fn forget_code() {
    // SAFETY: the callback has the type that is asked for and uses no pointer after it returns.
    unsafe {
        libc::dl_iterate_phdr(Some(forget_object), std::ptr::null_mut());
    }
}

unsafe extern "C" fn forget_object(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the C library passes a valid description of an object that stays loaded.
    let info = unsafe { &*info };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: the table has that many entries, and is part of the object.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    // Addresses and sizes of this process fit into usize.
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = (info.dlpi_addr + header.p_vaddr) as usize;
        let end = start + header.p_memsz as usize;
        // Whole pages only: those at the borders may belong to a segment that was written.
        let (start, end) = (start.next_multiple_of(PAGE), end - end % PAGE);
        if start < end {
            // SAFETY: the range is inside of a private mapping of a file that is never written, not even by relocations
            // (those are in segments with PF_W), so dropping its pages changes no content.
            let result =
                unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_DONTNEED) };
            if let Err(errno) = Errno::result(result) {
                ipc::log::debug!("start-up pages stay mapped: {errno}");
            }
        }
    }
    0
}

/// Largest page size of the architectures that this is built for, so that rounding is right with each.
const PAGE: usize = if cfg!(target_arch = "x86_64") {
    4096
} else {
    65536
};
