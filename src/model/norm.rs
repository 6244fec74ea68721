//! Norms as the layers use them: before a branch, after it (before the sum with the residual stream), and of queries
//! and keys inside qkv. All of them are frozen.

use candle_core::{Result, Tensor};

use crate::facts::Heads;
use crate::ops::head_norm::{self, Groups};
use crate::ops::{layer_norm, rms_norm, rows, unwritten};

use super::linear::Linear;
use super::lora::Low;
use super::operand::Operand;
use super::pass::Pass;

/// A norm of the residual stream; weight and bias are `[C]`.
#[derive(Clone, Debug)]
pub enum Norm {
    /// Root mean square norm.
    Rms {
        /// The factor.
        weight: Tensor,
        /// Added to the mean square.
        eps: f64,
    },
    /// LayerNorm.
    Layer {
        /// The factor.
        weight: Tensor,
        /// The bias.
        bias: Tensor,
        /// Added to the variance.
        eps: f64,
    },
}

impl Norm {
    /// x [T, C] -> [T, C].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_beside(x, 0)
    }

    /// x [T, C] -> [T, C + spare], whose spare columns are not written.
    fn forward_beside(&self, x: &Tensor, spare: usize) -> Result<Tensor> {
        match self {
            Norm::Rms { weight, eps } => rms_norm::forward_beside(x, weight, *eps, spare),
            Norm::Layer { weight, bias, eps } => layer_norm::forward_beside(x, weight, bias, *eps, spare),
        }
    }

    /// Adds the gradient of x to `dx`.
    pub fn backward(&self, dy: &Tensor, x: &Tensor, dx: &Tensor) -> Result<()> {
        match self {
            Norm::Rms { weight, eps } => rms_norm::backward(dy, x, weight, *eps, dx),
            Norm::Layer { weight, eps, .. } => layer_norm::backward(dy, x, weight, *eps, dx),
        }
    }
}

/// Applies the norm; returns x itself if there is none.
pub fn forward(norm: &Option<Norm>, x: &Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(x),
        None => Ok(x.clone()),
    }
}

/// Does `forward` with `spare` more columns, which are not written, and in 8 bits too if `rounded` is set. With spare
/// columns it also returns the factors of the rows, f32 `[T]`, if the norm is one of root mean squares: x times them
/// and the weight is the norm.
pub fn forward_beside(
    norm: &Option<Norm>,
    x: &Tensor,
    spare: usize,
    rounded: bool,
) -> Result<(Operand, Option<Tensor>)> {
    let _ = rounded; // only a GPU has kernels for it
    match norm {
        #[cfg(feature = "cuda")]
        Some(Norm::Rms { weight, eps }) if rounded => {
            let (values, scales, rounded) = rms_norm::forward_rounded(x, weight, *eps, spare)?;
            Ok((Operand { values, rounded: vec![rounded] }, Some(scales)))
        }
        #[cfg(feature = "cuda")]
        Some(Norm::Layer { weight, bias, eps }) if rounded => {
            let (values, rounded) = layer_norm::forward_rounded(x, weight, bias, *eps, spare)?;
            Ok((Operand { values, rounded: vec![rounded] }, None))
        }
        #[cfg(feature = "cuda")]
        Some(Norm::Rms { weight, eps }) if spare > 0 => {
            let (normed, scales) = rms_norm::forward_and_scales(x, weight, *eps, spare)?;
            Ok((normed.into(), Some(scales)))
        }
        Some(norm) => Ok((norm.forward_beside(x, spare)?.into(), None)),
        None => Ok((rows::beside(x, spare)?.into(), None)),
    }
}

/// The input of linear layers in their backward pass: a norm of x.
#[derive(Clone, Copy)]
pub struct Normed<'a> {
    /// The norm; `None`: x itself.
    pub norm: &'a Option<Norm>,
    /// The norm's input, [T, C].
    pub x: &'a Tensor,
    /// The factors of its rows that `forward_beside` returned.
    pub scales: Option<&'a Tensor>,
}

impl<'a> Normed<'a> {
    /// Returns the norm, computed again.
    pub fn values(&self) -> Result<Tensor> {
        forward(self.norm, self.x)
    }

    /// Returns the factors of the rows and of the columns that make the norm of x; `None`: only `values` gives it.
    #[cfg(feature = "cuda")]
    pub(super) fn factors(&self) -> Option<(&'a Tensor, &'a Tensor)> {
        match (self.norm, self.scales) {
            (Some(Norm::Rms { weight, .. }), Some(scales)) => Some((scales, weight)),
            _ => None,
        }
    }
}

/// Adds the gradient of x to `dx`, which it returns, in 8 bits too if `rounded` is set.
pub fn backward(norm: &Option<Norm>, dy: &Tensor, x: &Tensor, dx: Tensor, rounded: bool) -> Result<Operand> {
    let _ = rounded; // only a GPU has kernels for it
    let in_8_bits = match norm {
        #[cfg(feature = "cuda")]
        Some(Norm::Rms { weight, eps }) if rounded => {
            vec![rms_norm::backward_rounded(dy, x, weight, *eps, &dx)?]
        }
        #[cfg(feature = "cuda")]
        Some(Norm::Layer { weight, eps, .. }) if rounded => {
            vec![layer_norm::backward_rounded(dy, x, weight, *eps, &dx)?]
        }
        Some(norm) => norm.backward(dy, x, &dx).map(|()| Vec::new())?,
        None => rows::add(&dx, dy).map(|()| Vec::new())?,
    };
    Ok(Operand { values: dx, rounded: in_8_bits })
}

/// `residual + norm(linear(x))`, with the tensors that the backward pass needs.
pub struct Branch {
    /// The sum.
    pub sum: Tensor,
    /// The linear layer's output if a norm follows it. Without a norm it is never needed again.
    pub branch: Option<Tensor>,
    /// LoRA's `x A^T` of the linear layer.
    pub low: Low,
}

impl Branch {
    /// Returns the number of values held beside the sum.
    #[cfg(test)]
    pub fn values(&self) -> usize {
        count(&self.branch) + count(&self.low)
    }
}

/// Returns the number of values of a tensor that may not be kept.
#[cfg(test)]
pub(super) fn count(tensor: &Option<Tensor>) -> usize {
    tensor.as_ref().map_or(0, Tensor::elem_count)
}

/// Applies the linear layer and the norm after it to x, and adds the result to the residual stream.
pub fn join(
    linear: &Linear,
    norm: &Option<Norm>,
    x: &Operand,
    residual: &Tensor,
    pass: &Pass,
) -> Result<Branch> {
    let Some(norm) = norm else {
        let (sum, low) = linear.onto(x, residual, pass)?;
        return Ok(Branch { sum, branch: None, low });
    };
    let branch = unwritten(residual.shape(), residual.dtype(), residual.device())?;
    let low = linear.forward(x, &branch, false, pass)?;
    let sum = norm.forward(&branch)?;
    rows::add(&sum, residual)?;
    Ok(Branch { sum, branch: Some(branch), low })
}

/// Returns the gradient of a branch, given that of the sum it was added to. It has at least `spare` columns more. A
/// norm writes it in 8 bits too if `rounded` is set.
pub fn through(
    norm: &Option<Norm>,
    branch: &Option<Tensor>,
    d: Operand,
    spare: usize,
    rounded: bool,
) -> Result<Operand> {
    let (Some(_), Some(branch)) = (norm, branch) else { return Ok(d) };
    let ((rows, width), d) = (branch.dims2()?, d.values);
    let d_branch = Tensor::zeros((rows, width + spare), d.dtype(), d.device())?;
    backward(norm, &d, branch, d_branch, rounded)
}

/// Norms of queries and keys. The weights are those of a head `[D]`, or of the whole projection.
#[derive(Clone, Debug)]
pub struct HeadNorm {
    /// Weight for queries.
    pub query: Tensor,
    /// Weight for keys.
    pub key: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl HeadNorm {
    /// Normalises queries and keys of qkv [T, (H + 2K) * D] (`Layout::Blocked`) in place. Returns their values
    /// before the norm, [T, (H + K) * D].
    pub fn forward(&self, qkv: &Tensor, heads: &Heads) -> Result<Tensor> {
        let raw = rows::columns(qkv, 0, (heads.query + heads.key) * heads.width)?;
        for (groups, weight) in self.parts(heads) {
            head_norm::forward(qkv, groups, weight, self.eps)?;
        }
        Ok(raw)
    }

    /// Turns the gradient of the normalised qkv into that of the raw one, in place.
    pub fn backward(&self, d_qkv: &Tensor, raw: &Tensor, heads: &Heads) -> Result<()> {
        for (groups, weight) in self.parts(heads) {
            head_norm::backward(d_qkv, raw, groups, weight, self.eps)?;
        }
        Ok(())
    }

    fn parts(&self, heads: &Heads) -> [(Groups, &Tensor); 2] {
        let (query, key) = (heads.query * heads.width, heads.key * heads.width);
        let part =
            |at: usize, columns: usize, weight: &Tensor| Groups { at, count: columns / weight.elem_count() };
        [(part(0, query, &self.query), &self.query), (part(query, key, &self.key), &self.key)]
    }
}
