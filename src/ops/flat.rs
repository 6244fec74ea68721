//! Flat buffers of parameters, gradients and moments: filled and cleared in place on any device.

use candle_core::{DType, Result, Tensor, bail};

use super::cpu;
use crate::with_real;

/// Fills `target` with the values of `source`, which has the same size and type and may lie on any device.
pub fn write(target: &Tensor, source: &Tensor) -> Result<()> {
    if (target.elem_count(), target.dtype()) != (source.elem_count(), source.dtype()) {
        bail!("{:?} {:?} into {:?} {:?}", source.dims(), source.dtype(), target.dims(), target.dtype());
    }
    let source = source.to_device(target.device())?;
    #[cfg(feature = "cuda")]
    if target.device().is_cuda() {
        return gpu::copy(target, &source);
    }
    if target.dtype() == DType::U8 {
        return copy::<u8>(target, &source);
    }
    with_real!(target, T => copy::<T>(target, &source))
}

fn copy<T: cpu::Stored>(target: &Tensor, source: &Tensor) -> Result<()> {
    let source = &*cpu::read::<T>(source)?;
    cpu::edit(target, |target: &mut [T]| target.copy_from_slice(source))
}

/// Sets all elements to zero.
pub fn zero(target: &Tensor) -> Result<()> {
    #[cfg(feature = "cuda")]
    if target.device().is_cuda() {
        return gpu::zero(target);
    }
    with_real!(target, T => cpu::edit(target, |target: &mut [T]| target.fill(<T as cpu::Real>::ZERO)))
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::result;
    use candle_core::{Result, Tensor};

    use crate::ops::cuda;

    /// Copies one buffer of the device to another of the same length.
    pub fn copy(target: &Tensor, source: &Tensor) -> Result<()> {
        let stream = cuda::device(target)?.cuda_stream();
        let bytes = target.elem_count() * target.dtype().size_in_bytes();
        let (to, from) = (cuda::address(target, 0)?, cuda::address(source, 0)?);
        stream.context().bind_to_thread().w()?;
        // SAFETY: both tensors hold `bytes` bytes from their addresses on.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }.w()
    }

    /// Sets all bytes of a buffer of the device to zero.
    pub fn zero(target: &Tensor) -> Result<()> {
        let stream = cuda::device(target)?.cuda_stream();
        let bytes = target.elem_count() * target.dtype().size_in_bytes();
        stream.context().bind_to_thread().w()?;
        // SAFETY: the tensor holds `bytes` bytes from its address on; zero bits are zero in every type.
        unsafe { result::memset_d8_async(cuda::address(target, 0)?, 0, bytes, stream.cu_stream()) }.w()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::judge;

    fn fills_a_part_only(flat: &Tensor, part: &Tensor) -> Result<Vec<f32>> {
        zero(flat)?;
        write(&flat.narrow(0, 2, 3)?, part)?;
        flat.to_device(&candle_core::Device::Cpu)?.to_vec1::<f32>()
    }

    #[test]
    fn writes_reach_their_part_and_nothing_else() -> Result<()> {
        let (flat, part) =
            (Tensor::ones(6, candle_core::DType::F32, &candle_core::Device::Cpu)?, [1f32, 2., 3.]);
        let part = Tensor::new(&part, &candle_core::Device::Cpu)?;
        assert_eq!(fills_a_part_only(&flat, &part)?, [0., 0., 1., 2., 3., 0.]);
        assert!(write(&flat, &part).is_err(), "another size");
        judge::on_gpu(|gpu| {
            let flat = flat.ones_like()?.to_device(&gpu.device)?;
            assert_eq!(fills_a_part_only(&flat, &part)?, [0., 0., 1., 2., 3., 0.]);
            Ok(())
        })
    }
}
