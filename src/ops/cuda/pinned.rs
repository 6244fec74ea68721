//! Page-locked host memory: the device reads and writes it by itself, so queueing a copy does not wait.

use std::ffi::c_void;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::{CudaDevice, Result, Tensor, bail};

/// Page-locked bytes in host memory.
pub struct Pinned {
    memory: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone, and nothing in it depends on the thread that asked for it.
unsafe impl Send for Pinned {}
// SAFETY: shared references give an address only; a caller that reads or writes through it waits for the device first.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Asks the driver for `bytes` bytes. The device's context must be current.
    pub fn new(bytes: usize) -> Result<Pinned> {
        // SAFETY: freed once, by `drop`.
        let memory = unsafe { result::malloc_host(bytes, 0) }.w()?;
        Ok(Pinned { memory, bytes })
    }

    /// Returns the same, for copies with this device.
    pub fn on(device: &CudaDevice, bytes: usize) -> Result<Pinned> {
        device.cuda_stream().context().bind_to_thread().w()?;
        Pinned::new(bytes)
    }

    /// Returns the number of bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the address of byte `at`. The first is aligned to a page.
    pub fn at(&self, at: usize) -> *mut u8 {
        self.memory.cast::<u8>().wrapping_add(at)
    }

    /// Copies a tensor's bytes from its device to byte `at` and those after it. Waits for the stream.
    pub fn take(&self, at: usize, tensor: &Tensor) -> Result<()> {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        if at + bytes > self.bytes {
            bail!("{bytes} bytes at {at} of {}", self.bytes);
        }
        if bytes == 0 {
            return Ok(());
        }
        let stream = super::device(tensor)?.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: the range was just checked, it belongs to this value, and the source is a live tensor of `bytes`
        // bytes. The stream is awaited before anything else can touch the range.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.at(at), bytes);
            result::memcpy_dtoh_async(to, super::address(tensor, 0)?, stream.cu_stream())
        }
        .w()?;
        stream.synchronize().w()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it came from `malloc_host` and nothing refers to it any more.
        let _ = unsafe { result::free_host(self.memory) };
    }
}
