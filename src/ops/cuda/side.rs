//! A second stream that fills two buffers while the device computes: from page-locked memory, or from other ranks. The
//! ranks' sums run there too.
//!
//! Two events order it with the device's own stream. A copy begins when all work queued before it is done, since that
//! work may still read the buffer. Work that reads a buffer is queued behind `wait`.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, sys};
use candle_core::{CudaDevice, Result, Tensor, bail};

use super::pinned::Pinned;

/// The stream of copies, and the events between it and the device's own stream.
pub struct Side {
    compute: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    /// Work that may read a buffer is done.
    free: CudaEvent,
    /// The last copy to each buffer is done.
    filled: [CudaEvent; 2],
}

impl Side {
    /// A stream beside that of the device.
    pub fn new(device: &CudaDevice) -> Result<Side> {
        let compute = device.cuda_stream();
        let context = compute.context().clone();
        let event = || context.new_event(None).w();
        let copies = context.new_stream().w()?;
        Ok(Side { copies, free: event()?, filled: [event()?, event()?], compute })
    }

    /// Queues a copy of all of `from` to the beginning of buffer `number`, behind all work queued so far.
    pub fn fill(&self, number: usize, buffer: &Tensor, from: &Pinned) -> Result<()> {
        let bytes = buffer.elem_count() * buffer.dtype().size_in_bytes();
        if from.bytes() > bytes {
            bail!("{} bytes into a buffer of {bytes}", from.bytes());
        }
        let stream = self.begin()?;
        // SAFETY: both ranges hold so many bytes. Buffers and pinned memory outlive the copy, because whoever owns them
        // owns this value too and drops it first, and `drop` waits for the copies.
        unsafe {
            let (to, from, bytes) = (super::address(buffer, 0)?, from.at(0), from.bytes());
            sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream)
        }
        .result()
        .w()?;
        self.end(number)
    }

    /// The stream, for work on a buffer that begins behind all work queued so far. `end` says which buffer it fills.
    pub fn begin(&self) -> Result<sys::CUstream> {
        if !omitted(Omitted::Free) {
            self.free.record(&self.compute).w()?;
            self.copies.wait(&self.free).w()?;
        }
        Ok(self.copies.cu_stream())
    }

    /// The work that was queued since `begin` fills buffer `number`.
    pub fn end(&self, number: usize) -> Result<()> {
        self.filled[number].record(&self.copies).w()
    }

    /// An event behind all work that was queued on the second stream so far.
    pub fn mark(&self) -> Result<CudaEvent> {
        self.copies.record_event(None).w()
    }

    /// Work queued from here on begins after the last copy to buffer `number`.
    pub fn wait(&self, number: usize) -> Result<()> {
        if omitted(Omitted::Filled) {
            return Ok(());
        }
        self.compute.wait(&self.filled[number]).w()
    }
}

impl Drop for Side {
    /// Waits for the copies, because their memory is freed next.
    fn drop(&mut self) {
        let _ = self.copies.synchronize();
    }
}

/// An event that a test leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Omitted {
    /// Copies do not wait for the work that reads the buffer.
    Free,
    /// Work does not wait for the copy that fills the buffer.
    Filled,
}

#[cfg(not(test))]
fn omitted(_: Omitted) -> bool {
    false
}

#[cfg(test)]
thread_local! {
    /// The event that a test leaves out.
    pub static OMITTED: std::cell::Cell<Option<Omitted>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
fn omitted(event: Omitted) -> bool {
    OMITTED.get() == Some(event)
}
