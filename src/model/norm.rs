//! Norms as the layers use them: before a branch, behind it where it joins the residual stream, and of queries and
//! keys inside qkv. All frozen.

use candle_core::{Result, Tensor};

use crate::facts::Heads;
use crate::ops::head_norm::{self, Groups};
use crate::ops::{layer_norm, rms_norm, rows, unwritten};

use super::linear::Linear;
use super::lora::Low;
use super::pass::Pass;

/// A norm over the residual stream: weight and bias `[C]`.
#[derive(Clone, Debug)]
pub enum Norm {
    Rms { weight: Tensor, eps: f64 },
    Layer { weight: Tensor, bias: Tensor, eps: f64 },
}

impl Norm {
    /// x [T, C] -> [T, C].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Norm::Rms { weight, eps } => rms_norm::forward(x, weight, *eps),
            Norm::Layer { weight, bias, eps } => layer_norm::forward(x, weight, bias, *eps),
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

/// x itself where there is no norm.
pub fn forward(norm: &Option<Norm>, x: &Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(x),
        None => Ok(x.clone()),
    }
}

/// Adds the gradient of x to `dx`.
pub fn backward(norm: &Option<Norm>, dy: &Tensor, x: &Tensor, dx: &Tensor) -> Result<()> {
    match norm {
        Some(norm) => norm.backward(dy, x, dx),
        None => rows::add(dx, dy),
    }
}

/// `residual + norm(linear(x))`, with what the backward pass needs of it.
pub struct Branch {
    pub sum: Tensor,
    /// The linear layer's result if a norm follows it; otherwise it is never needed again.
    pub branch: Option<Tensor>,
    pub low: Low,
}

impl Branch {
    /// Values held beside the sum.
    #[cfg(test)]
    pub fn values(&self) -> usize {
        use super::layer::count;
        count(&self.branch) + count(&self.low)
    }
}

/// Adds what the linear layer and the norm behind it make of x to the residual stream.
pub fn join(
    linear: &Linear,
    norm: &Option<Norm>,
    x: &Tensor,
    residual: &Tensor,
    pass: &Pass,
) -> Result<Branch> {
    let Some(norm) = norm else {
        let (sum, low) = linear.onto(x, residual, pass)?;
        return Ok(Branch { sum, branch: None, low });
    };
    let branch = unwritten(residual.shape(), residual.dtype(), residual.device())?;
    let low = linear.forward(x, &branch, 0, false, pass)?;
    let sum = norm.forward(&branch)?;
    rows::add(&sum, residual)?;
    Ok(Branch { sum, branch: Some(branch), low })
}

/// The gradient of a branch from that of the sum it was added to.
pub fn through(norm: &Option<Norm>, branch: &Option<Tensor>, d: &Tensor) -> Result<Tensor> {
    let (Some(norm), Some(branch)) = (norm, branch) else { return Ok(d.clone()) };
    let d_branch = d.zeros_like()?;
    norm.backward(d, branch, &d_branch)?;
    Ok(d_branch)
}

/// Norms of queries and keys: weights of a head `[D]`, or of the whole projection.
#[derive(Clone, Debug)]
pub struct HeadNorm {
    pub query: Tensor,
    pub key: Tensor,
    pub eps: f64,
}

impl HeadNorm {
    /// Normalises queries and keys of qkv [T, (H + 2K) * D], blocked, in place; returns what they were,
    /// [T, (H + K) * D].
    pub fn forward(&self, qkv: &Tensor, heads: &Heads) -> Result<Tensor> {
        let raw = rows::columns(qkv, (heads.query + heads.key) * heads.width)?;
        for (groups, weight) in self.parts(heads) {
            head_norm::forward(qkv, groups, weight, self.eps)?;
        }
        Ok(raw)
    }

    /// The gradient of the normalised qkv becomes that of the raw one, in place.
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
