//! Operations: each one a formula, its gradient, a fast CPU path; kernels share the stem.
//!
//! Never candle_nn's fused layers here: they drop gradients silently, and hone's backward passes are its own.

pub mod gemm;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod activation;
pub mod adamw;
#[cfg(feature = "cuda")]
pub mod adapters;
pub mod attention;
pub mod bias;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod flat;
pub mod four_bit;
pub mod head_norm;
#[cfg(feature = "cuda")]
pub mod largest;
pub mod layer_norm;
pub mod matmul;
pub mod number;
pub mod rms_norm;
pub mod rope;
pub mod rows;

#[cfg(test)]
pub mod judge;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};

/// A tensor whose elements are written before anyone reads them: zeros on a CPU, whatever is there on a GPU.
pub fn unwritten(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    #[cfg(test)]
    starve::check()?;
    match device {
        Device::Cpu => Tensor::zeros(shape, dtype, device),
        // SAFETY: device memory holds numbers whatever its bits are, and the caller writes all of them.
        _ => unsafe { Tensor::empty(shape, dtype, device) },
    }
}

/// Whether an operation failed for want of device memory; a smaller plan may then do.
pub fn out_of_memory(error: &Error) -> bool {
    let text = format!("{error:?}");
    text.contains("CUDA_ERROR_OUT_OF_MEMORY") || text.contains("CUBLAS_STATUS_ALLOC_FAILED")
}

/// Allocations that fail on purpose, for tests of what follows.
#[cfg(test)]
pub mod starve {
    use std::cell::Cell;

    thread_local!(static FAILS: Cell<Option<(usize, usize)>> = const { Cell::new(None) });

    /// The `at`-th allocation of this thread from now on fails, and those after it, so many in all.
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
