//! Memory for packed panels. Each thread keeps its buffers for later products; large ones lie on huge pages if
//! Linux has them.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;

thread_local! {
    /// Buffers that are not in use. It is a list because a thread that waits in one product may run a task of
    /// another.
    static FREE: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// Lends `bytes` of memory to `work`, aligned to 64 bytes, with arbitrary content.
pub fn with_buffer<R>(bytes: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    let mut buffer = FREE
        .with_borrow_mut(|free| {
            // Takes the smallest buffer that is large enough, else the largest one, which is then replaced.
            let fit = |index: &usize| {
                let size = free[*index].layout.size();
                (size < bytes, size.abs_diff(bytes))
            };
            (0..free.len()).min_by_key(fit).map(|index| free.swap_remove(index))
        })
        .filter(|buffer| buffer.layout.size() >= bytes)
        .unwrap_or_else(|| Buffer::new(bytes));
    let result = work(&mut buffer.slice()[..bytes]);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}

const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

struct Buffer {
    data: NonNull<u8>,
    layout: Layout,
}

impl Buffer {
    fn new(bytes: usize) -> Self {
        // From half a huge page on, whole huge pages are used: tiles of many panels would need an address
        // translation each.
        let page = if bytes >= HUGE_PAGE / 2 { HUGE_PAGE } else { PAGE };
        let layout =
            Layout::from_size_align(bytes.max(1).next_multiple_of(page), page).expect("a valid size");
        // SAFETY: the size is not zero.
        let data = unsafe { alloc(layout) };
        let data = NonNull::new(data).unwrap_or_else(|| handle_alloc_error(layout));
        #[cfg(target_os = "linux")]
        if page == HUGE_PAGE {
            // SAFETY: this is advice about memory that the buffer owns; a refusal changes nothing.
            unsafe { libc::madvise(data.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the buffer owns this memory. It is touched only now, after the advice, and initialised for
        // `slice`.
        unsafe { data.as_ptr().write_bytes(0, layout.size()) };
        Buffer { data, layout }
    }

    fn slice(&mut self) -> &mut [u8] {
        // SAFETY: the buffer owns this many initialised bytes.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the memory was allocated with this layout.
        unsafe { dealloc(self.data.as_ptr(), self.layout) }
    }
}
