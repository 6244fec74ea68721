//! Numbers copied to the host while the device goes on working: the copy is queued behind the kernels that compute
//! them, and read later.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};
use candle_core::{DType, Result, Tensor, bail};

use super::pinned::Pinned;
use crate::ops::number::{Number, is_number};

/// Bytes for a number.
const SLOT: usize = 8;

/// Eight bytes per number in host memory that the device writes to directly, and the event that marks the copies as
/// done.
pub struct Late {
    memory: Pinned,
    kinds: Vec<Kind>,
    event: CudaEvent,
    arrived: bool,
    /// Keeps the source tensors until the copies are done.
    _tensors: Vec<Tensor>,
}

enum Kind {
    Host(f64),
    Single,
    Double,
}

impl Late {
    /// Queues the copies. At least one of the numbers lies on a device, and all of those lie on the same one.
    pub fn send(numbers: &[Number]) -> Result<Late> {
        let tensors = numbers.iter().filter_map(|number| match number {
            Number::There(tensor) => Some(tensor.clone()),
            Number::Here(_) => None,
        });
        let tensors: Vec<Tensor> = tensors.collect();
        let Some(first) = tensors.first() else { bail!("no number lies on a device") };
        let stream = super::device(first)?.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let memory = Pinned::new(SLOT * numbers.len())?;
        let mut kinds = Vec::with_capacity(numbers.len());
        for (i, number) in numbers.iter().enumerate() {
            let tensor = match number {
                Number::Here(value) => {
                    kinds.push(Kind::Host(*value));
                    continue;
                }
                Number::There(tensor) => tensor,
            };
            if !is_number(tensor) {
                bail!("a number of shape {:?}, {:?}", tensor.dims(), tensor.dtype());
            }
            let double = tensor.dtype() == DType::F64;
            kinds.push(if double { Kind::Double } else { Kind::Single });
            let bytes = if double { 8 } else { 4 };
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
        Ok(Late { memory, kinds, event, arrived: false, _tensors: tensors })
    }

    /// Waits for the copies and returns the numbers in their order.
    pub fn values(mut self) -> Result<Vec<f64>> {
        self.event.synchronize().w()?;
        self.arrived = true;
        let value = |(i, kind): (usize, &Kind)| match kind {
            Kind::Host(value) => *value,
            // SAFETY: the event has passed, so the slot holds the number.
            Kind::Single => unsafe { self.memory.at(SLOT * i).cast::<f32>().read() as f64 },
            Kind::Double => unsafe { self.memory.at(SLOT * i).cast::<f64>().read() },
        };
        Ok(self.kinds.iter().enumerate().map(value).collect())
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
