//! The border between tensors and kernels on a GPU: the device, launches, products.
//!
//! Every operation first asks where its tensors lie; on a GPU it launches kernels from the file of its own name
//! (`kernels/rms_norm.cu` for `ops/rms_norm.rs`). All work of a process goes to one stream of one device, in the
//! order of the calls; only copies that fill buffers run beside it (`side`). A function here waits for the GPU only if
//! its doc says so.

pub mod device;
pub mod graph;
pub mod inputs;
pub mod late;
pub mod launch;
mod lt;
pub mod pinned;
pub mod product;
pub mod side;
pub mod tensor_map;

pub use launch::Launch;

use candle_core::cuda_backend::cudarc::driver::{DevicePtr, result};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Storage, Tensor, WithDType, bail};
use std::sync::atomic::{AtomicU64, Ordering};

/// Returns the CUDA device that a tensor lies on. A tensor elsewhere is an error.
pub fn device(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        other => bail!("expected a tensor on a GPU, found {:?}", other.location()),
    }
}

/// Returns the address of element `at` of a contiguous tensor. It stays valid as long as the tensor: memory is freed in
/// the order of the stream, after every launch queued before.
pub fn address(tensor: &Tensor, at: usize) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    if at > to - from {
        bail!("element {at} of {}", to - from);
    }
    let Storage::Cuda(storage) = &*storage else { bail!("expected a tensor on a GPU") };
    let base = base_address(storage)?;
    Ok(base + ((from + at) * tensor.dtype().size_in_bytes()) as u64)
}

fn base_address(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    // The guard that comes with an address would record events, but events are switched off.
    macro_rules! of {
        ($($kind:ident),*) => {
            match &storage.slice {
                $(CudaStorageSlice::$kind(slice) => slice.device_ptr(&stream).0,)*
                _ => bail!("no kernel takes this type"),
            }
        };
    }
    Ok(of!(U8, U32, I64, BF16, F16, F32, F64))
}

/// Copies all bytes of a tensor to another one of the same size, in the order of the stream.
pub fn copy(from: &Tensor, to: &Tensor) -> Result<()> {
    let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    if bytes(from) != bytes(to) {
        bail!("{} bytes into {}", bytes(from), bytes(to));
    }
    if bytes(from) == 0 {
        return Ok(());
    }
    let stream = device(to)?.cuda_stream();
    stream.context().bind_to_thread().w()?;
    // SAFETY: both tensors are alive, are contiguous and have so many bytes.
    unsafe { result::memcpy_dtod_async(address(to, 0)?, address(from, 0)?, bytes(from), stream.cu_stream()) }
        .w()
}

/// Copies a host slice to the device, as a tensor of its length. Up to 64 KiB the driver takes the values at once
/// and the host goes on. Within `Inputs::fill` it is a place in these inputs.
pub fn upload<T: WithDType>(values: &[T], device: &Device) -> Result<Tensor> {
    inputs::place(values).unwrap_or_else(|| upload_apart(values, device))
}

/// Returns the same, always as a tensor of its own, for values that outlive a step.
pub fn upload_apart<T: WithDType>(values: &[T], device: &Device) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), device)
}

/// Copies a tensor's elements to the host. Waits for the stream.
pub fn download<T: WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    tensor.flatten_all()?.to_vec1()
}

/// Waits until the device has finished all queued work.
pub fn synchronize(device: &CudaDevice) -> Result<()> {
    device.cuda_stream().synchronize().w()
}

/// Returns the number of launches and products queued since the program began.
pub fn launches() -> u64 {
    LAUNCHES.load(Ordering::Relaxed)
}

static LAUNCHES: AtomicU64 = AtomicU64::new(0);

fn count_launch() {
    LAUNCHES.fetch_add(1, Ordering::Relaxed);
}

/// Returns the suffix of a kernel's name for a storage type.
pub fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => bail!("no {other:?} arithmetic on a GPU: expected f32 or bf16"),
    }
}
