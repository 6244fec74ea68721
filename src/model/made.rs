//! Layers of a serving step on a GPU whose input is a norm or an activation: one launch makes the input and `x A^T` of
//! the adapters on it, one product does the rest. Both have the bits of one operation after the other.

use candle_core::{Result, Tensor, bail};

use crate::facts::Activation;
use crate::ops::adapters::Source;
use crate::ops::change::Change;
use crate::ops::matmul::{self, Weight};
use crate::ops::unwritten;

use super::linear::{Linear, columns, few_rows_with};
use super::lora::{Lora, Mixture};
use super::norm::Norm;
use super::pass::Pass;

/// Returns the outputs of layers side by side that read the norm of x. `None`: the operations are done one after the
/// other.
pub fn side_by_side(
    norm: &Option<Norm>,
    x: &Tensor,
    parts: &[Linear],
    pass: &Pass,
) -> Result<Option<Tensor>> {
    let Some(Norm::Rms { weight, eps }) = norm else { return Ok(None) };
    let Some(mixture) = mixture(parts, x, pass) else { return Ok(None) };
    let Some((input, low)) = mixture.make(parts, &Source::Norm { x, weight, eps: *eps }, x)? else {
        return Ok(None);
    };
    let width = parts.iter().map(|part| part.weight.dims().0).sum::<usize>();
    let y = unwritten((x.dim(0)?, width), x.dtype(), x.device())?;
    for (at, part) in columns(parts) {
        part.begin(&y, at, false)?;
    }
    let base = parts[0].bias.as_ref().map(|_| &y);
    match few_rows_with(parts, &input, &y, 0, base, pass, Some(low))? {
        true => Ok(Some(y)),
        false => bail!("no product of few rows for layers side by side"),
    }
}

/// `residual + layer(activation of x)`. `None`: the operations are done one after the other.
pub fn onto(
    x: &Tensor,
    activation: Activation,
    layer: &Linear,
    residual: &Tensor,
    pass: &Pass,
) -> Result<Option<Tensor>> {
    let parts = std::slice::from_ref(layer);
    let Some(mixture) = mixture(parts, x, pass).filter(|_| layer.bias.is_none()) else { return Ok(None) };
    let Some((input, low)) = mixture.make(parts, &Source::Activation { x, activation }, x)? else {
        return Ok(None);
    };
    let sum = unwritten(residual.shape(), residual.dtype(), residual.device())?;
    match few_rows_with(parts, &input, &sum, 0, Some(residual), pass, Some(low))? {
        true => Ok(Some(sum)),
        false => bail!("no product of few rows for a layer"),
    }
}

/// Returns the adapters of the step, if a product of few rows takes these layers as they are.
fn mixture<'a>(parts: &[Linear], x: &Tensor, pass: &Pass<'a>) -> Option<&'a Mixture<'a>> {
    let Lora::Mixed(mixture) = pass.lora else { return None };
    let alike =
        |part: &Linear| part.factor == parts[0].factor && part.bias.is_some() == parts[0].bias.is_some();
    let weights: Vec<&Weight> = parts.iter().map(|part| &part.weight).collect();
    let takes = || x.dim(0).is_ok_and(|rows| matmul::has_few_rows(rows, &weights));
    let on = pass.apart && x.device().is_cuda() && Change::Added.is_on();
    (on && parts.iter().all(alike) && takes()).then_some(mixture)
}
