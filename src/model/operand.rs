//! Operands of linear layers: activations or gradients of outputs, and the same in 8 bits if the kernel that made them
//! wrote both. If it did not, a product in 8 bits rounds its operand in a pass of its own.

use candle_core::Tensor;

use crate::ops::fp8::Scaled;

/// A matrix [T, any] that linear layers read.
#[derive(Clone, Debug)]
pub struct Operand {
    /// The matrix, with the spare columns that the layers ask for.
    pub values: Tensor,
    /// The matrix without spare columns in 8 bits, or the gradient of each of the layers side by side; empty: not
    /// rounded yet.
    pub rounded: Vec<Scaled>,
}

impl From<Tensor> for Operand {
    fn from(values: Tensor) -> Operand {
        Operand { values, rounded: Vec::new() }
    }
}
