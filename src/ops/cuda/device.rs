//! Opens a GPU for training, or says why it cannot be used.

use std::sync::OnceLock;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::{CudaDevice, Device, Result as TensorResult};

use crate::fault::{Fault, Kind, Result};

/// CUDA 13 kernels and libraries need a driver for CUDA 13: 580 or later.
const DRIVER_MIN: i32 = 13_000;
/// bf16 arithmetic and its tensor cores begin with Ampere.
const CAPABILITY_MIN: (i32, i32) = (8, 0);

/// The properties of a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Card {
    /// The driver's name for it.
    pub name: String,
    /// Compute capability (major, minor).
    pub capability: (i32, i32),
    /// Device memory in bytes.
    pub memory_bytes: usize,
}

/// Returns the number of GPUs that the driver shows; 0 without a driver.
pub fn count() -> usize {
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) => count.max(0) as usize,
        Err(_) => 0,
    }
}

/// Opens GPU `number` with one stream of its own, without events per tensor, and with freed memory kept for later
/// tensors. A GPU that cannot be used is a fault that says why.
pub fn open(number: usize) -> Result<Device> {
    usable(number)?;
    let failed = |error: candle_core::Error| {
        Fault::new(Kind::Device, format!("cuda:{number}: {error}"))
            .help("hone needs CUDA 13's libcublas and libcublasLt: name their folders in HONE_CUDA_LIBS")
    };
    let device = Device::new_cuda_with_stream(number).map_err(failed)?;
    let cuda = device.as_cuda_device().map_err(failed)?;
    // SAFETY: this process uses only this stream, so the order of launches is the order of uses.
    unsafe { cuda.disable_event_tracking() };
    keep_freed_memory(cuda).map_err(failed)?;
    Ok(device)
}

/// Refuses a GPU that is missing or too old, or whose driver is.
pub fn usable(number: usize) -> Result<()> {
    // Another node may have the GPU that is missing here; an old one stays old.
    let refuse = |kind, message: String, help: &str| Err(Fault::new(kind, message).help(help.to_owned()));
    if let Err(error) = result::init() {
        return refuse(
            Kind::Device,
            format!("cuda:{number}: no NVIDIA driver responds ({error})"),
            "install the driver (580 or later), give the container a GPU (nvidia.com/gpu), or set device: cpu",
        );
    }
    let mut driver = 0;
    // SAFETY: the pointer is to one number that may be written.
    unsafe { sys::cuDriverGetVersion(&mut driver) };
    if driver < DRIVER_MIN {
        let version = |number: i32| format!("{}.{}", number / 1000, number % 1000 / 10);
        return refuse(
            Kind::Config,
            format!(
                "cuda:{number}: the driver is for CUDA {}, expected {} or later",
                version(driver),
                version(DRIVER_MIN)
            ),
            "install NVIDIA driver 580 or later, or set device: cpu",
        );
    }
    let count = count();
    if number >= count {
        return refuse(
            Kind::Device,
            format!("cuda:{number}: the driver shows {count} GPUs"),
            "choose a lower number; CUDA_VISIBLE_DEVICES may hide other GPUs",
        );
    }
    let capability = card(number)?.capability;
    if capability < CAPABILITY_MIN {
        return refuse(
            Kind::Config,
            format!(
                "cuda:{number}: compute capability {}.{} has no bf16, expected 8.0 or later",
                capability.0, capability.1
            ),
            "use an A10, A100, L4, L40S, H100, H200 or newer GPU, or set device: cpu",
        );
    }
    Ok(())
}

/// Asks the driver for the properties of GPU `number`.
pub fn card(number: usize) -> Result<Card> {
    let read = || -> TensorResult<Card> {
        use sys::CUdevice_attribute_enum as Attribute;
        result::init().w()?;
        let device = result::device::get(number as i32).w()?;
        // SAFETY: the driver just gave this device number.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) }.w();
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        // SAFETY: as above.
        let memory_bytes = unsafe { result::device::total_mem(device) }.w()?;
        let name = result::device::get_name(device).w()?;
        Ok(Card { name, capability, memory_bytes })
    };
    read().map_err(|error| Fault::new(Kind::Device, format!("cuda:{number}: {error}")))
}

/// Returns the compute capability (major, minor) of an opened device.
pub fn capability(device: &CudaDevice) -> TensorResult<(i32, i32)> {
    device.cuda_stream().context().compute_capability().w()
}

/// Returns (bytes of shared memory that a block may ask for, number of processors that run blocks).
pub fn block_limits(device: &CudaDevice) -> TensorResult<(usize, usize)> {
    use sys::CUdevice_attribute_enum as Attribute;
    static FIRST: OnceLock<(usize, (usize, usize))> = OnceLock::new();
    let context = device.cuda_stream().context().clone();
    let asked = || -> TensorResult<(usize, usize)> {
        let shared_bytes =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).w()?;
        let processors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()?;
        Ok((shared_bytes as usize, processors as usize))
    };
    let context_of = context.cu_ctx() as usize;
    match FIRST.get() {
        Some((known, limits)) if *known == context_of => Ok(*limits),
        _ => {
            let limits = asked()?;
            // Another thread may have been first.
            let _ = FIRST.set((context_of, limits));
            Ok(limits)
        }
    }
}

/// Returns (free bytes, all bytes) of an opened device.
pub fn memory(device: &CudaDevice) -> TensorResult<(usize, usize)> {
    device.cuda_stream().context().bind_to_thread().w()?;
    result::mem_get_info().w()
}

/// Returns bytes of the memory pool: (in use now, most in use since `reset_peak`).
pub fn pool(device: &CudaDevice) -> TensorResult<(usize, usize)> {
    use sys::CUmemPool_attribute_enum as Attribute;
    let pool = default_pool(device)?;
    let read = |which| -> TensorResult<usize> {
        let mut value = 0u64;
        // SAFETY: these attributes are 64-bit numbers.
        unsafe { result::mem_pool::get_attribute(pool, which, (&raw mut value).cast()) }.w()?;
        Ok(value as usize)
    };
    Ok((read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?, read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?))
}

/// Returns the most bytes that graphs have reserved for their own tensors, beside the pool.
pub fn graphs_peak(device: &CudaDevice) -> TensorResult<usize> {
    let context = device.cuda_stream().context().clone();
    context.bind_to_thread().w()?;
    let which = sys::CUgraphMem_attribute_enum::CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH;
    let mut value = 0u64;
    // SAFETY: the device belongs to the context, and the attribute is a 64-bit number.
    unsafe { sys::cuDeviceGetGraphMemAttribute(context.cu_device(), which, (&raw mut value).cast()) }
        .result()
        .w()?;
    Ok(value as usize)
}

/// Gives memory back that no graph needs any more.
pub fn trim_graphs(device: &CudaDevice) -> TensorResult<()> {
    let context = device.cuda_stream().context().clone();
    context.bind_to_thread().w()?;
    // SAFETY: the device belongs to the context.
    unsafe { sys::cuDeviceGraphMemTrim(context.cu_device()) }.result().w()
}

/// Restarts the peak of `pool` at the current use.
pub fn reset_peak(device: &CudaDevice) -> TensorResult<()> {
    set(device, sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
}

/// Keeps freed memory in the pool. By default the pool releases it at every synchronisation and the next step maps
/// it again, which stalls.
fn keep_freed_memory(device: &CudaDevice) -> TensorResult<()> {
    set(device, sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

fn set(device: &CudaDevice, attribute: sys::CUmemPool_attribute, mut value: u64) -> TensorResult<()> {
    let pool = default_pool(device)?;
    // SAFETY: the attribute is a 64-bit number.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) }.w()
}

fn default_pool(device: &CudaDevice) -> TensorResult<sys::CUmemoryPool> {
    let context = device.cuda_stream().context().clone();
    context.bind_to_thread().w()?;
    // SAFETY: the device belongs to the context.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }.w()
}
