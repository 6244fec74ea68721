//! A second stream of copies beside the device's computation: buffers are filled from page-locked memory or from other
//! ranks, and tensors are copied to page-locked memory. The ranks' sums run there too.
//!
//! Events order it with the device's own stream. A copy begins when all work queued before it is done, since that work
//! may still use the memory. Work that depends on a copy, or that writes or frees its source, is queued behind `wait`.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, sys};
use candle_core::{CudaDevice, Result, Tensor, bail};

use super::pinned::Pinned;

/// The stream of copies, and the events between it and the device's own stream.
pub struct Side {
    compute: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    /// Work that may use the memory of the next copy is done.
    free: CudaEvent,
    /// The last copy of each number is done.
    done: Vec<CudaEvent>,
}

impl Side {
    /// Returns a stream beside that of the device, for copies of `numbers` numbers.
    pub fn new(device: &CudaDevice, numbers: usize) -> Result<Side> {
        let compute = device.cuda_stream();
        let context = compute.context().clone();
        let event = || context.new_event(None).w();
        let copies = context.new_stream().w()?;
        let done = (0..numbers).map(|_| event()).collect::<Result<_>>()?;
        Ok(Side { copies, free: event()?, done, compute })
    }

    /// Queues a copy of the first `bytes` bytes of `from` to the beginning of buffer `number`, behind all work queued
    /// so far.
    pub fn fill(&self, number: usize, buffer: &Tensor, from: &Pinned, bytes: usize) -> Result<()> {
        fits(bytes, buffer, from)?;
        let stream = self.begin()?;
        // SAFETY: both ranges hold so many bytes. Buffers and pinned memory outlive the copy, because whoever owns them
        // owns this value too and drops it first, and `drop` waits for the copies. A buffer that is freed earlier is
        // freed behind `wait`.
        unsafe { sys::cuMemcpyHtoDAsync_v2(super::address(buffer, 0)?, from.at(0).cast(), bytes, stream) }
            .result()
            .w()?;
        self.end(number)
    }

    /// Queues a copy of a tensor to the beginning of `to` as number `number`, behind all work queued so far. The tensor
    /// must stay as it is until work that is queued behind `wait`.
    pub fn take(&self, number: usize, tensor: &Tensor, to: &Pinned) -> Result<()> {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        fits(bytes, tensor, to)?;
        let stream = self.begin()?;
        // SAFETY: both ranges hold so many bytes. Nobody reads the pinned memory on the host, and it is freed after
        // this value, whose `drop` waits for the copies.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.at(0).cast(), super::address(tensor, 0)?, bytes, stream) }
            .result()
            .w()?;
        self.end(number)
    }

    /// Waits until all copies are done.
    pub fn synchronize(&self) -> Result<()> {
        self.copies.synchronize().w()
    }

    /// Returns the stream, for work on a buffer that begins behind all work queued so far. `end` says which buffer it
    /// fills.
    pub fn begin(&self) -> Result<sys::CUstream> {
        if !omitted(Omitted::Free) {
            self.free.record(&self.compute).w()?;
            self.copies.wait(&self.free).w()?;
        }
        Ok(self.copies.cu_stream())
    }

    /// Ends the copy of number `number`, which is the work that was queued since `begin`.
    pub fn end(&self, number: usize) -> Result<()> {
        self.done[number].record(&self.copies).w()
    }

    /// Returns an event behind all work that was queued on the second stream so far.
    pub fn mark(&self) -> Result<CudaEvent> {
        self.copies.record_event(None).w()
    }

    /// Makes work queued from here on begin after the last copy to buffer `number`.
    pub fn wait(&self, number: usize) -> Result<()> {
        self.wait_unless(number, Omitted::Filled)
    }

    /// Makes work queued from here on begin after the last copy from tensor `number`, which it may change or free.
    pub fn wait_taken(&self, number: usize) -> Result<()> {
        self.wait_unless(number, Omitted::Taken)
    }

    fn wait_unless(&self, number: usize, event: Omitted) -> Result<()> {
        if omitted(event) {
            return Ok(());
        }
        self.compute.wait(&self.done[number]).w()
    }
}

fn fits(bytes: usize, tensor: &Tensor, memory: &Pinned) -> Result<()> {
    let all = tensor.elem_count() * tensor.dtype().size_in_bytes();
    match bytes <= all && bytes <= memory.bytes() {
        true => Ok(()),
        false => {
            bail!("a copy of {bytes} bytes between a tensor of {all} and host memory of {}", memory.bytes())
        }
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
    /// Copies do not wait for the work that uses the memory.
    Free,
    /// Work does not wait for the copy that fills the buffer.
    Filled,
    /// Work does not wait for the copy from the tensor.
    Taken,
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
