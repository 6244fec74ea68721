//! Bytes of several tensors in one buffer: parts are written into it and viewed in it, and it is filled from host
//! memory while the device computes.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::cpu;

/// Parts begin at multiples of this, which is more than any kernel or copy asks for.
pub const ALIGNMENT: usize = 256;

/// Writes the bytes of a u8 or f32 tensor on the same device to `slab` (u8) from byte `at` on.
pub fn write(slab: &Tensor, at: usize, part: &Tensor) -> Result<()> {
    let bytes = part.elem_count() * part.dtype().size_in_bytes();
    if slab.dtype() != DType::U8 || at + bytes > slab.elem_count() {
        bail!("{bytes} bytes at {at} of {} in {:?}", slab.elem_count(), slab.dtype());
    }
    if bytes == 0 {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if slab.device().is_cuda() {
        return gpu::write(slab, at, part, bytes);
    }
    match part.dtype() {
        DType::U8 => slab.slice_set(part, 0, at),
        DType::F32 => {
            let values = cpu::read::<f32>(part)?;
            let values: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
            slab.slice_set(&cpu::tensor(values, bytes)?, 0, at)
        }
        other => bail!("no bytes of {other:?}"),
    }
}

/// Bytes in host memory: page-locked if they are for a GPU.
pub enum Host {
    /// A u8 tensor.
    Plain(Tensor),
    /// Page-locked memory.
    #[cfg(feature = "cuda")]
    Pinned(super::cuda::pinned::Pinned),
}

impl Host {
    /// Returns host memory for `bytes` bytes that will be copied to `device`.
    pub fn new(bytes: usize, device: &Device) -> Result<Host> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Host::Pinned(super::cuda::pinned::Pinned::on(device, bytes)?)),
            _ => Ok(Host::Plain(Tensor::zeros(bytes, DType::U8, &Device::Cpu)?)),
        }
    }

    /// Writes a tensor's bytes from byte `at` on. Waits for the device.
    pub fn write(&self, at: usize, part: &Tensor) -> Result<()> {
        match self {
            Host::Plain(slab) => write(slab, at, part),
            #[cfg(feature = "cuda")]
            Host::Pinned(memory) => memory.take(at, part),
        }
    }
}

/// Fills two buffers of a device from host memory.
pub enum Fills {
    /// At once, on a CPU.
    AtOnce,
    /// Fills run on a stream beside the device's own.
    #[cfg(feature = "cuda")]
    Beside(super::cuda::side::Side),
}

impl Fills {
    /// Returns the function that fills buffers of `device`.
    pub fn new(device: &Device) -> Result<Fills> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Fills::Beside(super::cuda::side::Side::new(device, 2)?)),
            _ => Ok(Fills::AtOnce),
        }
    }

    /// Copies `host` to the beginning of buffer `number`, behind all work queued so far.
    pub fn fill(&self, number: usize, buffer: &Tensor, host: &Host) -> Result<()> {
        assert!(number < 2, "there are two buffers");
        match (self, host) {
            (Fills::AtOnce, Host::Plain(host)) => buffer.slice_set(host, 0, 0),
            #[cfg(feature = "cuda")]
            (Fills::Beside(side), Host::Pinned(host)) => side.fill(number, buffer, host, host.bytes()),
            #[cfg(feature = "cuda")]
            _ => bail!("buffer {number} lies on another device than its source is for"),
        }
    }

    /// Makes work queued from here on begin after the last fill of buffer `number`.
    pub fn wait(&self, number: usize) -> Result<()> {
        match self {
            Fills::AtOnce if number < 2 => Ok(()),
            Fills::AtOnce => bail!("there are two buffers"),
            #[cfg(feature = "cuda")]
            Fills::Beside(side) => side.wait(number),
        }
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::result;

    use crate::ops::cuda;

    /// Copies on the device, in the order of its stream.
    pub fn write(slab: &Tensor, at: usize, part: &Tensor, bytes: usize) -> Result<()> {
        let stream = cuda::device(slab)?.cuda_stream();
        let (to, from) = (cuda::address(slab, at)?, cuda::address(part, 0)?);
        stream.context().bind_to_thread().w()?;
        // SAFETY: the caller has checked that both tensors hold so many bytes from these addresses on.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }.w()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_where_they_were_written() -> Result<()> {
        let slab = Tensor::zeros(16, DType::U8, &Device::Cpu)?;
        write(&slab, 3, &Tensor::new(&[7u8, 8], &Device::Cpu)?)?;
        write(&slab, 8, &Tensor::new(&[1.5f32], &Device::Cpu)?)?;
        let bytes = slab.to_vec1::<u8>()?;
        assert_eq!(bytes[..8], [0, 0, 0, 7, 8, 0, 0, 0]);
        assert_eq!(bytes[8..12], 1.5f32.to_ne_bytes());
        write(&slab, 16, &Tensor::zeros(0, DType::U8, &Device::Cpu)?)?;
        assert!(write(&slab, 15, &Tensor::new(&[7u8, 8], &Device::Cpu)?).is_err());
        assert!(write(&slab, 0, &Tensor::new(&[7u32], &Device::Cpu)?).is_err());
        Ok(())
    }
}
