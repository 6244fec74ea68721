//! What the machine is like, and how the process asks it for memory.

/// Keeps freed memory in the process instead of giving it back to the kernel.
///
/// A training step frees and allocates the same activations again. With glibc's defaults blocks above 32 MiB
/// are mapped anew each time and the kernel clears every page: a sixth of a step of an 88M model
/// (`benches/LOG.md`). Peak memory is the same, since activations of a step dominate it. Other C libraries
/// keep their own rules.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets numbers of the allocator; it is called before other threads exist.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
