//! Memory of the program's own code.
//!
//! **Job.** Gives back the pages of code that only the start needed, or the work before a rest.
//! **Who is not trusted.** Nobody. **Why this way.** The kernel maps code by 16 pages around each one that is run, and a start runs
//! through most of the program; a process that then waits for months needs a few of them. What is still needed comes back from
//! the page cache by itself.

unsafe extern "C" {
    // Made by the linker: the first byte of the program, and the first one behind its code.
    static __executable_start: u8;
    static etext: u8;
}

const PAGE: usize = 4096;

/// Gives the pages back. Failing changes nothing but the amount of memory.
pub fn give_code_back() {
    let start = (&raw const __executable_start)
        .addr()
        .next_multiple_of(PAGE);
    let end = (&raw const etext).addr() / PAGE * PAGE;
    if start < end {
        // SAFETY: from the program's start to the end of its code there are headers and code only, mapped from the file and
        // never written to, so that a page that is touched again has the same bytes as before.
        unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(start),
                end - start,
                libc::MADV_DONTNEED,
            )
        };
    }
}
