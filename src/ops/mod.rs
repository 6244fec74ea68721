//! Operations. Each file has a formula, its gradient and a fast CPU path; the operation's GPU kernel has the same
//! file name.
//!
//! candle_nn's fused layers must not be used here: they drop gradients silently, and hone's backward passes are its
//! own.

pub mod gemm;
pub mod operand;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod activation;
pub mod adamw;
pub mod adamw_8bit;
#[cfg(feature = "cuda")]
pub mod adapters;
pub mod attention;
pub mod bias;
pub mod change;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
pub mod draw;
pub mod dropout;
pub mod eight_bits;
pub mod noise;
pub mod embedding;
pub mod flat;
pub mod four_bit;
pub mod fp8;
pub mod head_norm;
#[cfg(feature = "cuda")]
pub mod largest;
pub mod layer_norm;
pub mod matmul;
#[cfg(feature = "cuda")]
pub mod low_rank;
pub mod magnitude;
pub mod number;
pub mod rms_norm;
pub mod rope;
pub mod row_pairs;
pub mod rows;
pub mod slab;
pub mod stash;
pub mod tokens;
pub mod weight;

#[cfg(test)]
pub mod judge;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};

/// Returns a tensor whose elements are written before they are read: zeros on a CPU, unspecified values on a GPU.
pub fn unwritten(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    #[cfg(test)]
    starve::check()?;
    if device.is_cpu() {
        return Tensor::zeros(shape, dtype, device);
    }
    placed(&shape.into(), dtype, |shape: &Shape| {
        // SAFETY: any bits in device memory are numbers, and the caller writes all of them before it reads.
        unsafe { Tensor::empty(shape, dtype, device) }
    })
}

#[cfg(feature = "cuda")]
use cuda::graph::tensor as placed;
#[cfg(not(feature = "cuda"))]
fn placed(shape: &Shape, _: DType, make: impl FnOnce(&Shape) -> Result<Tensor>) -> Result<Tensor> {
    make(shape)
}

/// A tensor in host memory -> the same on `device`.
pub fn put(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return cuda::inputs::put(tensor, device);
    }
    tensor.to_device(device)
}

/// Returns whether an operation failed for lack of device memory, in which case a smaller plan may succeed.
pub fn out_of_memory(error: &Error) -> bool {
    let text = format!("{error:?}");
    text.contains("CUDA_ERROR_OUT_OF_MEMORY") || text.contains("CUBLAS_STATUS_ALLOC_FAILED")
}

/// Allocations that fail on purpose, for tests of the recovery.
#[cfg(test)]
pub mod starve {
    use std::cell::Cell;

    thread_local!(static FAILS: Cell<Option<(usize, usize)>> = const { Cell::new(None) });

    /// Makes the `at`-th allocation of this thread from now on fail, and the ones after it: `times` in all.
    pub fn set(at_and_times: Option<(usize, usize)>) {
        FAILS.set(at_and_times);
    }

    pub(super) fn check() -> super::Result<()> {
        let Some((at, times)) = FAILS.get() else { return Ok(()) };
        if at > 1 {
            FAILS.set(Some((at - 1, times)));
            return Ok(());
        }
        FAILS.set((times > 1).then_some((1, times - 1)));
        Err(super::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY, as the test wants it".into()))
    }
}
