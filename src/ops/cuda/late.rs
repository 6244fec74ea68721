//! One-element tensors of a device -> numbers on the host, while the device goes on working: the copies are queued
//! behind the kernels that compute the numbers, and are read later.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

use super::pinned::Pinned;

/// Bytes for a number.
const SLOT: usize = 8;

/// Eight bytes per number in host memory that the device writes to directly, and the event that marks the copies as
/// done.
pub struct Late {
    memory: Pinned,
    event: CudaEvent,
    arrived: bool,
    /// The source tensors, in order. They live until the copies are done.
    tensors: Vec<Tensor>,
}

impl Late {
    /// Queues the copies of tensors of one element each, in f32 or f64, that lie on the same device.
    pub fn send(tensors: Vec<Tensor>) -> Result<Late> {
        let Some(first) = tensors.first() else { bail!("no number lies on a device") };
        let stream = super::device(first)?.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let memory = Pinned::new(SLOT * tensors.len())?;
        for (i, tensor) in tensors.iter().enumerate() {
            let bytes = match (tensor.elem_count(), tensor.dtype()) {
                (1, DType::F64) => 8,
                (1, DType::F32) => 4,
                (_, dtype) => bail!("a number of shape {:?}, {dtype:?}", tensor.dims()),
            };
            // SAFETY: the slot is eight bytes of pinned memory that lives as long as `self`, and `self` waits for the
            // event before it reads or frees it; the source is one element of a live tensor.
            unsafe {
                sys::cuMemcpyDtoHAsync_v2(
                    memory.at(SLOT * i).cast(),
                    super::address(tensor, 0)?,
                    bytes,
                    stream.cu_stream(),
                )
            }
            .result()
            .w()?;
        }
        let event = stream.record_event(None).w()?;
        Ok(Late { memory, event, arrived: false, tensors })
    }

    /// Waits for the copies and returns the numbers in their order.
    pub fn values(mut self) -> Result<Vec<f64>> {
        self.event.synchronize().w()?;
        self.arrived = true;
        let value = |(i, tensor): (usize, &Tensor)| match tensor.dtype() {
            // SAFETY: the event has passed, so the slot holds the number.
            DType::F64 => unsafe { self.memory.at(SLOT * i).cast::<f64>().read() },
            // SAFETY: as above.
            _ => unsafe { f64::from(self.memory.at(SLOT * i).cast::<f32>().read()) },
        };
        Ok(self.tensors.iter().enumerate().map(value).collect())
    }
}

/// Page-locked places for numbers of 32 bits that the device writes in each step.
pub struct Words {
    memory: Pinned,
}

impl Words {
    /// Returns places for `count` numbers.
    pub fn new(device: &CudaDevice, count: usize) -> Result<Words> {
        Ok(Words { memory: Pinned::on(device, 4 * count.max(1))? })
    }

    /// Queues the copy of a tensor of such numbers to the first places. A reader must wait for the device first.
    pub fn send(&self, tensor: &Tensor) -> Result<()> {
        let bytes = 4 * tensor.elem_count();
        if tensor.dtype() != DType::U32 || bytes > self.memory.bytes() {
            bail!("{:?} of shape {:?} for {} bytes", tensor.dtype(), tensor.dims(), self.memory.bytes());
        }
        let stream = super::device(tensor)?.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: both sides hold so many bytes, and both live until the device is awaited.
        unsafe {
            let to = self.memory.at(0).cast();
            sys::cuMemcpyDtoHAsync_v2(to, super::address(tensor, 0)?, bytes, stream.cu_stream())
        }
        .result()
        .w()
    }

    /// Returns the first `count` numbers. The device must have been awaited since they were sent.
    pub fn read(&self, count: usize) -> Vec<u32> {
        assert!(4 * count <= self.memory.bytes(), "{count} numbers");
        // SAFETY: the memory holds so many, and any bits are numbers.
        (0..count).map(|i| unsafe { self.memory.at(4 * i).cast::<u32>().read() }).collect()
    }
}

impl Drop for Late {
    /// Waits for the event, because the device may still write to the memory that is freed next.
    fn drop(&mut self) {
        if !self.arrived {
            let _ = self.event.synchronize();
        }
    }
}
