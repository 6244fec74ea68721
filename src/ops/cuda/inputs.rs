//! Host values of a step -> places in device memory that are the same in every step of the same shape, filled by
//! copies from page-locked memory that a graph can hold.
//!
//! Within `Inputs::fill`, everything that this thread uploads becomes a view of these inputs instead of a tensor of its
//! own. The lengths of the uploads, in order, are the step's shape. Two steps of one shape have the same addresses.

use std::cell::RefCell;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, result};
use candle_core::{DType, Device, Result, Tensor, WithDType, bail};
use half::bf16;

use super::pinned::Pinned;

/// Every upload begins at a multiple of so many bytes, which is more than kernels need.
const ALIGNMENT: usize = 64;

/// Lengths of a step's uploads, and numbers that its launches depend on besides.
pub type Shape = Vec<usize>;

/// Device memory for the uploads of a step, and the page-locked memory that is copied to it.
pub struct Inputs {
    device: Device,
    parts: Vec<Part>,
    /// For each page-locked memory, the event behind the last copies from it by `send_apart`.
    sent: Vec<Option<CudaEvent>>,
    /// The page-locked memory of the last `fill`.
    turn: usize,
    /// The type of the upload that the last `fill` had no room for.
    full: Option<DType>,
}

/// The uploads of one type, one behind the other.
struct Part {
    memory: Tensor,
    /// Several take turns, so that the next step's values can be written while this step's are copied.
    hosts: Vec<Pinned>,
    /// Elements that the last `fill` took.
    used: usize,
}

/// The uploads of a running `fill`.
struct Filling {
    parts: Vec<Part>,
    turn: usize,
    shape: Shape,
    /// The type of an upload that found no room.
    full: Option<DType>,
}

thread_local! {
    /// The buffers that uploads of this thread go to, if not to tensors of their own.
    static FILLING: RefCell<Option<Filling>> = const { RefCell::new(None) };
}

impl Inputs {
    /// Returns inputs with room for so many bytes of numbers, of f32 values, of activations in `dtype`, and of f64
    /// values.
    pub fn new(device: &Device, dtype: DType, bytes: [usize; 4]) -> Result<Inputs> {
        let types = [DType::U32, DType::F32, dtype, DType::F64];
        Inputs::of(device, &types.into_iter().zip(bytes).collect::<Vec<_>>(), 1)
    }

    /// Returns inputs with room for so many bytes of each type; the first entry of a type counts. `turns` page-locked
    /// memories take turns.
    pub fn of(device: &Device, bytes: &[(DType, usize)], turns: usize) -> Result<Inputs> {
        let mut parts: Vec<Part> = Vec::new();
        let cuda = device.as_cuda_device()?;
        for &(dtype, bytes) in bytes {
            if parts.iter().all(|part| part.memory.dtype() != dtype) {
                let bytes = bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
                let memory = crate::ops::unwritten(bytes / dtype.size_in_bytes(), dtype, device)?;
                let hosts = (0..turns).map(|_| Pinned::on(cuda, bytes)).collect::<Result<_>>()?;
                parts.push(Part { memory, hosts, used: 0 });
            }
        }
        let sent = (0..turns).map(|_| None).collect();
        Ok(Inputs { device: device.clone(), parts, sent, turn: 0, full: None })
    }

    /// Runs `prepare`, whose uploads lie in these inputs, and returns its result and the step's shape. `None`: they
    /// have no room for it. The device must have read the uploads of an earlier call, unless `send_apart` sent them.
    pub fn fill<T>(&mut self, prepare: impl FnOnce() -> Result<T>) -> Result<Option<(T, Shape)>> {
        self.turn = (self.turn + 1) % self.sent.len();
        if let Some(event) = self.sent[self.turn].take().filter(|event| !event.is_complete()) {
            event.synchronize().w()?;
        }
        let mut parts = std::mem::take(&mut self.parts);
        parts.iter_mut().for_each(|part| part.used = 0);
        FILLING.set(Some(Filling { parts, turn: self.turn, shape: Shape::new(), full: None }));
        let done = prepare();
        let Some(filling) = FILLING.take() else { bail!("a step's inputs are gone") };
        (self.parts, self.full) = (filling.parts, filling.full);
        match self.full {
            Some(_) => Ok(None),
            None => done.map(|done| Some((done, filling.shape))),
        }
    }

    /// Returns the bytes of each type, doubled for the type for which the last `fill` found no room.
    pub fn larger(&self) -> Vec<(DType, usize)> {
        let bytes = |part: &Part| part.memory.elem_count() * part.memory.dtype().size_in_bytes();
        let factor = |part: &Part| if Some(part.memory.dtype()) == self.full { 2 } else { 1 };
        self.parts.iter().map(|part| (part.memory.dtype(), factor(part) * bytes(part))).collect()
    }

    /// Queues the copies of the values that the last `fill` took.
    pub fn send(&self) -> Result<()> {
        let stream = self.device.as_cuda_device()?.cuda_stream();
        stream.context().bind_to_thread().w()?;
        for part in self.parts.iter().filter(|part| part.used > 0) {
            let bytes = part.used * part.memory.dtype().size_in_bytes();
            // SAFETY: both memories hold so many bytes and live as long as this value. A caller that fills them again
            // has waited for the copies, and pinned memory is freed behind all work of the stream.
            unsafe {
                let from = std::slice::from_raw_parts(part.hosts[self.turn].at(0), bytes);
                result::memcpy_htod_async(super::address(&part.memory, 0)?, from, stream.cu_stream())
            }
            .w()?;
        }
        Ok(())
    }

    /// Does the same outside of a graph. A later `fill` waits for these copies if it needs their page-locked memory.
    pub fn send_apart(&mut self) -> Result<()> {
        self.send()?;
        let stream = self.device.as_cuda_device()?.cuda_stream();
        self.sent[self.turn] = Some(stream.record_event(None).w()?);
        Ok(())
    }
}

impl Drop for Inputs {
    /// Waits for copies from the memory that is freed next.
    fn drop(&mut self) {
        for event in self.sent.iter().flatten() {
            let _ = event.synchronize();
        }
    }
}

/// Makes a number part of the shape, because launches depend on it and no upload shows it.
pub fn depends_on(number: usize) {
    FILLING.with_borrow_mut(|filling| {
        if let Some(filling) = filling {
            filling.shape.push(number);
        }
    });
}

/// Returns the place of these values, if this thread fills inputs.
pub(super) fn place<T: WithDType>(values: &[T]) -> Option<Result<Tensor>> {
    FILLING.with_borrow_mut(|filling| filling.as_mut().map(|filling| filling.place(values)))
}

impl Filling {
    fn place<T: WithDType>(&mut self, values: &[T]) -> Result<Tensor> {
        self.shape.push(values.len());
        let Some(part) = self.parts.iter_mut().find(|part| part.memory.dtype() == T::DTYPE) else {
            bail!("a step's inputs hold no {:?}", T::DTYPE)
        };
        let (size, at) = (size_of::<T>(), part.used);
        if at + values.len() > part.memory.elem_count() {
            self.full.get_or_insert(T::DTYPE);
            bail!("{} values of a step find no room", values.len());
        }
        // SAFETY: the range was just checked; nothing reads the pinned memory meanwhile, since whoever fills it has
        // waited for the copies of the last time.
        unsafe {
            let from = values.as_ptr().cast::<u8>();
            std::ptr::copy_nonoverlapping(from, part.hosts[self.turn].at(at * size), values.len() * size);
        }
        part.used = (at + values.len()).next_multiple_of(ALIGNMENT / size).min(part.memory.elem_count());
        part.memory.narrow(0, at, values.len())
    }
}

/// A tensor in host memory -> the same on the device: a tensor of its own, or a place in this thread's inputs.
pub fn put(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if FILLING.with_borrow(Option::is_none) {
        return tensor.to_device(device);
    }
    let flat = tensor.flatten_all()?;
    let placed = match tensor.dtype() {
        DType::F32 => super::upload(&flat.to_vec1::<f32>()?, device)?,
        DType::BF16 => super::upload(&flat.to_vec1::<bf16>()?, device)?,
        other => bail!("a step's inputs hold no {other:?}"),
    };
    placed.reshape(tensor.shape())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    #[test]
    fn steps_of_one_shape_have_one_place_and_too_many_values_none() -> Result<()> {
        let Some(device) = judge::gpu() else { return Ok(()) };
        let cuda = device.as_cuda_device()?;
        let mut inputs = Inputs::new(&device, DType::BF16, [256, 64, 64, 64])?;
        let mut places = Vec::new();
        for round in 0..2u32 {
            let prepare = || {
                depends_on(7);
                let numbers = super::super::upload(&[round, 5, 6], &device)?;
                let wide = put(&Tensor::new(&[[0.5f32], [1.5 + round as f32]], &Device::Cpu)?, &device)?;
                let half = super::super::upload(&[bf16::from_f32(2.5)], &device)?;
                Ok([numbers, wide, half])
            };
            let (tensors, shape) = inputs.fill(prepare)?.expect("there is room");
            assert_eq!(shape, [7, 3, 2, 1]);
            inputs.send()?;
            assert_eq!(tensors[0].to_vec1::<u32>()?, [round, 5, 6]);
            assert_eq!(tensors[1].to_vec2::<f32>()?, [[0.5], [1.5 + round as f32]]);
            assert_eq!(tensors[2].to_vec1::<bf16>()?, [bf16::from_f32(2.5)]);
            super::super::synchronize(cuda)?;
            places.push(super::super::address(&tensors[1], 0)?);
        }
        assert_eq!(places[0], places[1]);
        let many = inputs.fill(|| super::super::upload(&[1u32; 65], &device))?;
        assert!(many.is_none());
        // Afterwards uploads are tensors of their own.
        assert_eq!(super::super::upload(&[1u32; 65], &device)?.to_vec1::<u32>()?, [1; 65]);
        Ok(())
    }
}
