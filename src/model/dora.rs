//! DoRA in a pass: a pair with magnitudes and the frozen weight beside it -> the layer's output, and the gradients.
//!
//! As in PEFT: without dropout the output is `c * (x W^T + s x A^T B^T)`, where c is magnitude over length, for each
//! column. With dropout the frozen product keeps its input, so that the output is
//! `x W^T + (c - 1) * x' W^T + c * s x' A^T B^T` for the masked input x'. The bias is never scaled.
//!
//! The costs beside LoRA: the backward pass computes `x W^T` again for the gradient of the magnitudes, so that an
//! adapted layer has three products with W instead of two; with dropout it has five. After each update the lengths are
//! computed again, which costs as much as r more tokens. A finished adapter has a second product with W for its rows.

use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{Result, Tensor};

use crate::facts::Precision;
use crate::ops::magnitude::{self, Columns, Factor};
use crate::ops::matmul::{self, Weight};
use crate::ops::{bias, dropout, rows, unwritten};

use super::linear::Linear;
use super::lora::{Learner, Low, Pair, Training};
use super::pass::Pass;

/// The magnitudes of a pair, and the lengths of its weight's rows as far as they are known.
#[derive(Clone, Debug)]
pub struct Dora {
    /// The length that each row of the weight shall have, `[N]`: f32 (f64 in tests).
    pub magnitude: Tensor,
    /// The squares of the frozen rows' lengths; they never change.
    squares: Arc<OnceLock<Tensor>>,
    /// The inverses of the lengths with the pair as it is.
    inverse: Arc<Mutex<Option<Tensor>>>,
}

impl Dora {
    /// Returns the magnitudes whose lengths are computed at their first use.
    pub fn new(magnitude: Tensor) -> Dora {
        Dora { magnitude, squares: Arc::default(), inverse: Arc::default() }
    }

    /// Returns the magnitudes over the same weight for a copy of the pair.
    pub(super) fn copied(&self) -> Result<Dora> {
        Ok(Dora { squares: self.squares.clone(), ..Dora::new(self.magnitude.copy()?) })
    }

    /// Forgets the lengths, because the pair has changed.
    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    /// Returns the inverses of the lengths of the rows of `W + scale * B A`, `[N]`.
    fn inverse(&self, weight: &Weight, pair: &Pair) -> Result<Tensor> {
        let mut known = self.lock();
        if let Some(inverse) = &*known {
            return Ok(inverse.clone());
        }
        let Weight::Dense(a) = &pair.a else { candle_core::bail!("an adapter's matrix in 4 bits") };
        if self.squares.get().is_none() {
            // Two threads may compute them at once: either is right.
            let _ = self.squares.set(magnitude::squares(weight, a.dtype())?);
        }
        let squares = self.squares.get().expect("just computed");
        let inverse = magnitude::inverse(weight, squares, &pair.a, &pair.b, pair.scale)?;
        *known = Some(inverse.clone());
        Ok(inverse)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Tensor>> {
        self.inverse.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Sets the magnitudes to the lengths, as PEFT begins: the pair then changes nothing.
    pub(super) fn begin(&self, weight: &Weight, pair: &Pair) -> Result<()> {
        let inverse = self.inverse(weight, pair)?.to_device(&candle_core::Device::Cpu)?;
        let lengths = crate::ops::cpu::to_f64(&inverse)?.into_iter();
        let lengths: Vec<f64> =
            lengths.map(|inverse| if inverse > 0.0 { inverse.recip() } else { 0.0 }).collect();
        let lengths = Tensor::new(lengths, &candle_core::Device::Cpu)?.to_dtype(self.magnitude.dtype())?;
        crate::ops::flat::write(&self.magnitude, &lengths)
    }

    fn factor<'a>(&'a self, inverse: &'a Tensor, shift: f64, strength: f64) -> Factor<'a> {
        Factor { magnitude: &self.magnitude, inverse, shift, strength }
    }
}

/// The product with the frozen weight: as in training, or such that a row's bits depend on that row alone.
#[derive(Clone, Copy)]
pub(super) struct Way {
    /// Precision of products on a CPU, except those with the frozen weight.
    pub precision: Precision,
    /// Precision of products with the frozen weight in training.
    pub frozen: Precision,
    /// The number of first rows that are short, if rows are apart.
    pub apart: Option<usize>,
}

impl Way {
    /// Returns the way of a pass in training.
    pub fn of(pass: &Pass) -> Way {
        Way { precision: pass.precision, frozen: pass.frozen, apart: None }
    }

    /// Writes or adds the product with the frozen weight.
    fn base(self, x: &Tensor, linear: &Linear, y: &Tensor, at: usize, beta: f64) -> Result<()> {
        let (weight, factor) = (&linear.weight, linear.factor);
        match self.apart {
            Some(short) => matmul::forward_apart(x, weight, factor, y, at, beta, self.precision, short),
            None => matmul::forward(x, weight, factor, y, at, beta, self.frozen),
        }
    }

    fn product(self, x: &Tensor, weight: &Weight, alpha: f64, y: &Tensor, beta: f64) -> Result<()> {
        match self.apart {
            Some(short) => matmul::forward_apart(x, weight, alpha, y, 0, beta, self.precision, short),
            None => matmul::forward(x, weight, alpha, y, 0, beta, self.precision),
        }
    }
}

/// Adds a finished pair's part of x, times `strength`, to y[:, at..], which has the frozen product already.
#[allow(clippy::too_many_arguments)]
pub(super) fn serve(
    linear: &Linear,
    pair: &Pair,
    dora: &Dora,
    strength: f64,
    x: &Tensor,
    y: &Tensor,
    at: usize,
    way: Way,
) -> Result<()> {
    let inverse = dora.inverse(&linear.weight, pair)?;
    let (rows, n) = (x.dim(0)?, linear.weight.dims().0);
    let to = Columns { of: y, at };
    let z = unwritten((rows, n), x.dtype(), x.device())?;
    way.base(x, linear, &z, 0, 0.0)?;
    magnitude::scale(Columns { of: &z, at: 0 }, to, true, dora.factor(&inverse, 1.0, strength))?;
    let low = unwritten((rows, pair.a.dims().0), x.dtype(), x.device())?;
    way.product(x, &pair.a, 1.0, &low, 0.0)?;
    way.product(&low, &pair.b, pair.scale * linear.factor, &z, 0.0)?;
    magnitude::scale(Columns { of: &z, at: 0 }, to, true, dora.factor(&inverse, 0.0, strength))
}

impl Training<'_> {
    /// Returns the pair of this layer if it has magnitudes.
    pub(super) fn dora(&self, linear: &Linear) -> Option<(&Learner, &Dora)> {
        let learner = self.adapter.learner(linear.site)?;
        Some((learner, learner.pair.dora.as_ref()?))
    }

    fn drops(&self) -> bool {
        self.dropout_keys.is_some() && self.adapter.dropout > 0.0
    }

    /// Writes the layer's output to y[:, at..], or adds it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn forward_dora(
        &self,
        linear: &Linear,
        (learner, dora): (&Learner, &Dora),
        x: &Tensor,
        y: &Tensor,
        at: usize,
        add: bool,
        way: Way,
    ) -> Result<Low> {
        let (pair, masked) = (&learner.pair, self.input(learner, x)?);
        let inverse = dora.inverse(&linear.weight, pair)?;
        let precision = way.precision;
        let low = pair.low(&masked, precision)?;
        let to = Columns { of: y, at };
        let mut add = add;
        if let Some(bias) = &linear.bias {
            bias::apply(bias, y, at, add)?;
            add = true;
        }
        let z = unwritten((x.dim(0)?, linear.weight.dims().0), x.dtype(), x.device())?;
        way.base(&masked, linear, &z, 0, 0.0)?;
        if self.drops() {
            let beta = if add { 1.0 } else { 0.0 };
            way.base(x, linear, y, at, beta)?;
            magnitude::scale(Columns { of: &z, at: 0 }, to, true, dora.factor(&inverse, 1.0, 1.0))?;
            way.product(&low, &pair.b, pair.scale * linear.factor, &z, 0.0)?;
            add = true;
        } else {
            way.product(&low, &pair.b, pair.scale * linear.factor, &z, 1.0)?;
        }
        magnitude::scale(Columns { of: &z, at: 0 }, to, add, dora.factor(&inverse, 0.0, 1.0))?;
        Ok(Some(low))
    }

    /// Adds the gradients of A, B and the magnitudes to the flat buffer. If wanted, writes the gradient of x to `dx`
    /// or adds it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn backward_dora(
        &self,
        linear: &Linear,
        (learner, dora): (&Learner, &Dora),
        dy: &Tensor,
        at: usize,
        x: &Tensor,
        low: Option<&Tensor>,
        dx: Option<(&Tensor, bool)>,
        way: Way,
    ) -> Result<()> {
        let (pair, scale) = (&learner.pair, learner.pair.scale * linear.factor);
        let (precision, masked) = (way.precision, self.input(learner, x)?);
        let inverse = dora.inverse(&linear.weight, pair)?;
        let low = match low {
            Some(low) => low.clone(),
            None => pair.low(&masked, precision)?,
        };
        // The product that the magnitudes scale; later its gradient, in the same memory.
        let z = unwritten((x.dim(0)?, linear.weight.dims().0), x.dtype(), x.device())?;
        way.base(&masked, linear, &z, 0, 0.0)?;
        way.product(&low, &pair.b, scale, &z, 1.0)?;
        let dy_columns = Columns { of: dy, at };
        let grad = learner.grad_magnitude.as_ref().expect("a pair with magnitudes has their gradient");
        magnitude::gradient(dy_columns, &z, &inverse, grad)?;
        let scaled = |shift: f64| {
            magnitude::scale(dy_columns, Columns { of: &z, at: 0 }, false, dora.factor(&inverse, shift, 1.0))
        };
        scaled(0.0)?;
        matmul::weight_gradient(&z, 0, &low, scale, &learner.grad_b, precision)?;
        let d_low = unwritten((x.dim(0)?, pair.a.dims().0), x.dtype(), x.device())?;
        matmul::input_gradient(&z, 0, &pair.b, scale, &d_low, 0.0, precision)?;
        matmul::weight_gradient(&d_low, 0, &masked, 1.0, &learner.grad_a, precision)?;
        let Some((dx, add)) = dx else { return Ok(()) };
        let (weight, factor) = (&linear.weight, linear.factor);
        let beta = if add { 1.0 } else { 0.0 };
        match self.dropout_keys.filter(|_| self.drops()) {
            None => {
                matmul::input_gradient(&z, 0, weight, factor, dx, beta, way.frozen)?;
                matmul::input_gradient(&d_low, 0, &pair.a, 1.0, dx, 1.0, precision)
            }
            Some(keys) => {
                matmul::input_gradient(dy, at, weight, factor, dx, beta, way.frozen)?;
                let through = unwritten(dx.shape(), dx.dtype(), dx.device())?;
                scaled(1.0)?;
                matmul::input_gradient(&z, 0, weight, factor, &through, 0.0, way.frozen)?;
                matmul::input_gradient(&d_low, 0, &pair.a, 1.0, &through, 1.0, precision)?;
                rows::add(dx, &dropout::apply(&through, self.adapter.dropout, keys, learner.mask)?)
            }
        }
    }
}
