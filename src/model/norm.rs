//! Norms as the layers use them: of the residual stream, and of queries and keys inside qkv. All frozen.

use candle_core::{Result, Tensor};

use crate::facts::Heads;
use crate::ops::head_norm::{self, Groups};
use crate::ops::{layer_norm, rms_norm, rows};

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
