//! How the C library's allocator treats what the program frees. Nothing of Xen's; it stands here because this is the
//! crate for calls that Rust calls unsafe.

/// The largest threshold that glibc takes (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits).
const MMAP_THRESHOLD_BYTES: libc::c_int = 32 << 20;

/// Freed bytes at the end of the heap that are kept.
const TRIM_THRESHOLD_BYTES: libc::c_int = 256 << 20;

/// Makes the process keep memory that it frees, for its next buffers, instead of giving it back to the kernel.
///
/// A migration takes and frees buffers of megabytes hundreds of times a second; given back each time, every page of them
/// costs a fault again (a third of the agents' processor time in a nested dom0). To be called first in `main`.
pub fn keep_freed_memory() {
    let settings = [
        // One heap: each thread's own would keep its largest buffers for itself.
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
    ];
    for (name, value) in settings {
        // SAFETY: mallopt only sets numbers of the allocator and may be called at any time. When it refuses one (0), the
        // allocator works as before.
        unsafe { libc::mallopt(name, value) };
    }
}
