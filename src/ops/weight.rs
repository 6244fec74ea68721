//! A frozen weight in its stored form: dense or 4-bit -> its shape, place and bytes.

use candle_core::{Device, Tensor};

use super::four_bit::FourBit;

/// A weight [N, K] of a linear layer `y = x W^T`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// f32 or bf16 (f64 in tests).
    Dense(Tensor),
    /// 4-bit blocks with scales.
    FourBit(FourBit),
}

impl Weight {
    /// (N, K).
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Weight::Dense(tensor) => (tensor.dims()[0], tensor.dims()[1]),
            Weight::FourBit(weight) => (weight.rows, weight.cols),
        }
    }

    /// Returns the device that it lies on.
    pub fn device(&self) -> &Device {
        match self {
            Weight::Dense(tensor) => tensor.device(),
            Weight::FourBit(weight) => weight.packed.device(),
        }
    }

    /// Returns the number of bytes that the weight takes.
    pub fn bytes(&self) -> usize {
        match self {
            Weight::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Weight::FourBit(weight) => weight.bytes(),
        }
    }
}
