//! A frozen linear layer with the pair that a pass's adapter has for it: `y = factor * (x W^T + scale * dropout(x)
//! A^T B^T) + bias`.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "cuda")]
use crate::ops::adapters;
#[cfg(feature = "cuda")]
use crate::ops::change::Change;
use crate::ops::fp8::{self, Scaled};
use crate::ops::matmul::{self, Weight};
use crate::ops::{bias, row_pairs, unwritten};

use super::dora::Way;
use super::inside::spare_in;
use super::lora::{Lora, Low};
use super::norm::Normed;
use super::operand::Operand;
use super::pass::Pass;

/// A linear layer of the base.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The weight [N, K].
    pub weight: Weight,
    /// The model's own factor on the output. The stored bias already includes it.
    pub factor: f64,
    /// The bias `[N]`, if there is one.
    pub bias: Option<Tensor>,
    /// The index by which adapters know this layer (`Facts::projections`).
    pub site: usize,
}

impl Linear {
    /// Returns the number of spare columns that the input, and the gradient of the output, must have in a pass over
    /// `tokens` rows.
    pub fn spare(&self, tokens: usize, device: &Device, pass: &Pass) -> usize {
        spare_in(std::slice::from_ref(self), tokens, device, pass)
    }

    /// Writes y [T, N], or adds to it if `add` is set. Returns `x A^T` if the adapter in training needs it for its
    /// backward pass; `None` also if it stays in the spare columns of x.
    pub fn forward(&self, x: &Operand, y: &Tensor, add: bool, pass: &Pass) -> Result<Low> {
        #[cfg(feature = "cuda")]
        if let Some(group) = super::inside::Group::of(std::slice::from_ref(self), &x.values, pass)? {
            return group.forward(x, y, add).map(|()| None);
        }
        self.apart(&x.values, None, y, 0, add, pass)
    }

    /// Writes y[:, at..at+N], or adds to it: the base, then the adapter. `rounded` is x in 8 bits, if layers side by
    /// side share it.
    fn apart(
        &self,
        x: &Tensor,
        rounded: Option<&Scaled>,
        y: &Tensor,
        at: usize,
        add: bool,
        pass: &Pass,
    ) -> Result<Low> {
        if let Lora::Training(training) = &pass.lora
            && let Some(pair) = training.dora(self)
        {
            return training.forward_dora(self, pair, x, y, at, add, Way::of(pass));
        }
        let added_to = self.begin(y, at, add)?;
        #[cfg(feature = "cuda")]
        if few_rows(std::slice::from_ref(self), x, y, at, added_to.then_some(y), pass)? {
            return Ok(None);
        }
        self.product(x, rounded, y, at, if added_to { 1.0 } else { 0.0 }, pass)?;
        pass.lora.forward(self, x, y, at, pass)
    }

    /// `residual + forward(x)`, in memory of its own.
    pub fn onto(&self, operand: &Operand, residual: &Tensor, pass: &Pass) -> Result<(Tensor, Low)> {
        let x = &operand.values;
        #[cfg(feature = "cuda")]
        if pass.apart && x.device().is_cuda() && self.bias.is_none() {
            let sum = unwritten(residual.shape(), residual.dtype(), residual.device())?;
            if few_rows(std::slice::from_ref(self), x, &sum, 0, Some(residual), pass)? {
                return Ok((sum, None));
            }
        }
        #[cfg(feature = "cuda")]
        if let Some(group) = super::inside::Group::of(std::slice::from_ref(self), x, pass)? {
            return Ok((group.onto(operand, residual)?, None));
        }
        // DoRA needs the product with the frozen weight apart from the residual stream.
        if let Lora::Training(training) = &pass.lora
            && training.dora(self).is_some()
        {
            let sum = residual.copy()?;
            let low = self.apart(x, None, &sum, 0, true, pass)?;
            return Ok((sum, low));
        }
        // A step of sequences on a CPU has its own products.
        if self.bias.is_none() && !(pass.apart && x.device().is_cpu()) {
            let sum = matmul::onto(x, &self.weight, self.factor, residual, pass.frozen)?;
            let low = pass.lora.forward(self, x, &sum, 0, pass)?;
            return Ok((sum, low));
        }
        let sum = match &self.bias {
            Some(bias) => bias::onto(bias, residual)?,
            None => residual.copy()?,
        };
        #[cfg(feature = "cuda")]
        if few_rows(std::slice::from_ref(self), x, &sum, 0, Some(&sum), pass)? {
            return Ok((sum, None));
        }
        if has_short_rows(x, pass)? {
            let (weights, factor, precision) = ([&self.weight], self.factor, pass.precision);
            let product = || matmul::short_rows(x, &weights, factor, &sum, 0, 1.0, precision);
            match with_short_rows(&[(0, self)], x, &sum, pass, product)? {
                Some(true) => return Ok((sum, None)),
                Some(false) => return pass.lora.forward(self, x, &sum, 0, pass).map(|low| (sum, low)),
                None => {}
            }
        }
        self.product(x, None, &sum, 0, 1.0, pass)?;
        let low = pass.lora.forward(self, x, &sum, 0, pass)?;
        Ok((sum, low))
    }

    /// Writes or adds the bias. Returns whether the product must be added to y[:, at..at+N].
    pub(super) fn begin(&self, y: &Tensor, at: usize, add: bool) -> Result<bool> {
        if let Some(bias) = &self.bias {
            bias::apply(bias, y, at, add)?;
        }
        Ok(add || self.bias.is_some())
    }

    /// Does `forward` without an adapter.
    fn base(&self, x: &Tensor, y: &Tensor, at: usize, add: bool, pass: &Pass) -> Result<()> {
        let beta = if self.begin(y, at, add)? { 1.0 } else { 0.0 };
        self.product(x, None, y, at, beta, pass)
    }

    /// `y[:, at..at+N] = factor * x W^T + beta * y[:, at..at+N]`.
    fn product(
        &self,
        x: &Tensor,
        rounded: Option<&Scaled>,
        y: &Tensor,
        at: usize,
        beta: f64,
        pass: &Pass,
    ) -> Result<()> {
        let (weight, factor) = (&self.weight, self.factor);
        match (pass.apart, rounded) {
            (true, _) => matmul::forward_apart(x, weight, factor, y, at, beta, pass.precision, pass.short),
            (false, Some(rounded)) => fp8::forward(rounded, weight, factor, y, at, beta),
            (false, None) => matmul::forward(x, weight, factor, y, at, beta, pass.frozen),
        }
    }

    /// Adds the pair's gradients to the flat buffer. If wanted, writes the gradient of x to `dx` [T, K]. `low` is the
    /// result of `forward` or `kept_low`. Without it, x has it in its spare columns, or it is computed again.
    pub fn backward(
        &self,
        dy: &Operand,
        x: &Tensor,
        low: Option<&Tensor>,
        dx: Option<&Tensor>,
        pass: &Pass,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(group) = super::inside::Group::of(std::slice::from_ref(self), x, pass)? {
            return group.backward(dy, x, low, dx);
        }
        self.backward_apart(&dy.values, 0, x, low, dx.map(|dx| (dx, false)), pass)
    }

    /// Does `backward` for columns of `dy`, and may add to `dx`: the base, then the adapter.
    fn backward_apart(
        &self,
        dy: &Tensor,
        at: usize,
        x: &Tensor,
        low: Option<&Tensor>,
        dx: Option<(&Tensor, bool)>,
        pass: &Pass,
    ) -> Result<()> {
        if let Lora::Training(training) = &pass.lora
            && let Some(pair) = training.dora(self)
        {
            return training.backward_dora(self, pair, dy, at, x, low, dx, Way::of(pass));
        }
        if let Some((dx, add)) = dx {
            let beta = if add { 1.0 } else { 0.0 };
            matmul::input_gradient(dy, at, &self.weight, self.factor, dx, beta, pass.frozen)?;
        }
        match &pass.lora {
            Lora::None => Ok(()),
            Lora::Training(training) => {
                training.backward(self, dy, at, x, low, dx.map(|(dx, _)| dx), pass.precision)
            }
            Lora::Mixed(_) => candle_core::bail!("a mixture of adapters has no gradient"),
        }
    }
}

/// Returns each layer with its first column in the matrix that holds the outputs of all of them side by side.
pub(super) fn columns(parts: &[Linear]) -> impl Iterator<Item = (usize, &Linear)> {
    parts.iter().scan(0, |at, part| {
        let from = *at;
        *at += part.weight.dims().0;
        Some((from, part))
    })
}

/// Returns the low-rank product of x, copied out of its spare columns, for the layer's backward pass.
pub fn kept_low(linear: &Linear, x: &Tensor, pass: &Pass) -> Result<Low> {
    #[cfg(feature = "cuda")]
    if let Some(group) = super::inside::Group::of(std::slice::from_ref(linear), x, pass)? {
        return group.kept(x).map(Some);
    }
    let _ = (linear, x, pass);
    Ok(None)
}

/// x -> the outputs of all layers in the columns of one matrix, and `x A^T` of each if the adapter in training needs it
/// for its backward pass. x has as many spare columns as `spare_in` says.
pub fn side_by_side(parts: &[Linear], operand: &Operand, pass: &Pass) -> Result<(Tensor, Vec<Low>)> {
    let x = &operand.values;
    let width: usize = parts.iter().map(|part| part.weight.dims().0).sum();
    let y = unwritten((x.dim(0)?, width), x.dtype(), x.device())?;
    if let Lora::Mixed(mixture) = &pass.lora {
        if !served_side_by_side(parts, x, &y, pass)? {
            mixture.forward(&columns(parts).collect::<Vec<_>>(), x, &y, pass)?;
        }
        return Ok((y, vec![None; parts.len()]));
    }
    #[cfg(feature = "cuda")]
    if let Some(group) = super::inside::Group::of(parts, x, pass)? {
        group.forward(operand, &y, false)?;
        return Ok((y, vec![Some(group.kept(x)?)]));
    }
    let rounded = shared_in_8_bits(parts, x, width, pass)?;
    let lows = columns(parts).map(|(at, part)| part.apart(x, rounded.as_ref(), &y, at, false, pass));
    let lows = lows.collect::<Result<_>>()?;
    Ok((y, lows))
}

/// Returns x in 8 bits for all of the layers, if they are multiplied in them. `width` is that of their outputs.
fn shared_in_8_bits(parts: &[Linear], x: &Tensor, width: usize, pass: &Pass) -> Result<Option<Scaled>> {
    let takes = |(at, part): (usize, &Linear)| {
        let (n, k) = part.weight.dims();
        fp8::takes(n, k) && fp8::takes(at, width)
    };
    match parts.len() > 1 && columns(parts).all(takes) {
        true => matmul::in_8_bits(x, 0, x.dim(1)?, &parts[0].weight, (width, 0), pass.frozen),
        false => Ok(None),
    }
}

/// Computes layers side by side in a serving step. Returns whether the finished adapters' parts are added too.
fn served_side_by_side(parts: &[Linear], x: &Tensor, y: &Tensor, pass: &Pass) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if pass.apart && x.device().is_cuda() {
        let biased = parts.iter().filter(|part| part.bias.is_some()).count();
        if biased == 0 || biased == parts.len() {
            columns(parts).try_for_each(|(at, part)| part.begin(y, at, false).map(|_| ()))?;
            if few_rows(parts, x, y, 0, (biased > 0).then_some(y), pass)? {
                return Ok(true);
            }
        }
    }
    if let Some(added) = short_side_by_side(parts, x, y, pass)? {
        return Ok(added);
    }
    columns(parts).try_for_each(|(at, part)| part.base(x, y, at, false, pass)).map(|()| false)
}

/// Computes layers side by side of a serving step on a GPU, with the finished adapters' parts: one product, and one
/// launch for the adapters. The layers' columns begin at `at`; the result is added to `base` if it is given. False if
/// no kernel takes them; then nothing was done.
#[cfg(feature = "cuda")]
fn few_rows(
    parts: &[Linear],
    x: &Tensor,
    y: &Tensor,
    at: usize,
    base: Option<&Tensor>,
    pass: &Pass,
) -> Result<bool> {
    few_rows_with(parts, x, y, at, base, pass, None)
}

/// Does `few_rows` with the adapters' `x A^T` in `low`, if a launch has made it.
#[cfg(feature = "cuda")]
pub(super) fn few_rows_with(
    parts: &[Linear],
    x: &Tensor,
    y: &Tensor,
    at: usize,
    base: Option<&Tensor>,
    pass: &Pass,
    low: Option<adapters::Low>,
) -> Result<bool> {
    let factor = parts[0].factor;
    let is_served = pass.apart && x.device().is_cuda() && !matches!(pass.lora, Lora::Training(_));
    if !is_served || parts.iter().any(|part| part.factor != factor) {
        return Ok(false);
    }
    let mixture = match &pass.lora {
        Lora::Mixed(mixture) => Some(*mixture),
        _ => None,
    };
    let linears: Vec<(usize, &Linear)> = columns(parts).map(|(from, part)| (at + from, part)).collect();
    let adds = Change::Added.is_on();
    let low = || match (low, mixture) {
        (Some(low), _) => Ok(Some(low)),
        (None, Some(mixture)) if adds => mixture.low(&linears, x),
        _ => Ok(None),
    };
    let weights: Vec<&Weight> = parts.iter().map(|part| &part.weight).collect();
    if !matmul::few_rows(x, &weights, factor, y, at, base, low)? {
        return Ok(false);
    }
    match mixture {
        Some(mixture) if adds => mixture.by_products(&linears, x, y, pass)?,
        Some(mixture) => mixture.forward(&linears, x, y, pass)?,
        None => {}
    }
    Ok(true)
}

/// Computes layers side by side in a step on a CPU whose rows are all short, if the layers have one factor and no bias.
/// Returns whether the finished adapters' parts are added too. `None`: nothing was done.
fn short_side_by_side(parts: &[Linear], x: &Tensor, y: &Tensor, pass: &Pass) -> Result<Option<bool>> {
    let (factor, precision) = (parts[0].factor, pass.precision);
    if !has_short_rows(x, pass)? || parts.iter().any(|part| part.factor != factor || part.bias.is_some()) {
        return Ok(None);
    }
    let weights: Vec<&Weight> = parts.iter().map(|part| &part.weight).collect();
    let product = || matmul::short_rows(x, &weights, factor, y, 0, 0.0, precision);
    with_short_rows(&columns(parts).collect::<Vec<_>>(), x, y, pass, product)
}

/// Returns whether all rows of x belong to short segments of a step on a CPU.
fn has_short_rows(x: &Tensor, pass: &Pass) -> Result<bool> {
    Ok(pass.apart && x.device().is_cpu() && x.dim(0)? == pass.short)
}

/// Computes a product of short rows, with the finished adapters' parts: A's beside the product, B's after it. Returns
/// whether the adapters are added. `None`: no kernel takes the product; nothing was done.
fn with_short_rows(
    linears: &[(usize, &Linear)],
    x: &Tensor,
    y: &Tensor,
    pass: &Pass,
    product: impl FnOnce() -> Result<bool> + Send,
) -> Result<Option<bool>> {
    let layers = match &pass.lora {
        Lora::Mixed(mixture) if !mixture.has_magnitudes() => mixture.short_layers(linears, pass)?,
        _ => None,
    };
    let Some(layers) = layers.filter(|layers| layers.iter().any(|layer| !layer.pairs.is_empty())) else {
        return Ok(product()?.then_some(false));
    };
    let (done, lows) = row_pairs::lows_beside(x, &layers, pass.precision, product);
    if !done? {
        return Ok(None);
    }
    match lows? {
        Some(lows) => row_pairs::add_lows(y, &layers, &lows, pass.precision).map(|()| Some(true)),
        None => Ok(Some(false)),
    }
}

/// Returns the gradient of x, or `None` if nothing needs it (`lowest`). dy has as many spare columns as `spare_in`
/// says.
pub fn side_by_side_backward(
    parts: &[Linear],
    dy: &Operand,
    input: Normed,
    lows: &[Low],
    lowest: bool,
    pass: &Pass,
) -> Result<Option<Tensor>> {
    let x = input.x;
    let dx = if lowest { None } else { Some(unwritten(x.shape(), x.dtype(), x.device())?) };
    #[cfg(feature = "cuda")]
    if let Some(group) = super::inside::Group::of(parts, x, pass)? {
        let low = lows.first().and_then(Option::as_ref);
        group.backward_normed(dy, input, low, dx.as_ref())?;
        return Ok(dx);
    }
    let x = &input.values()?;
    for ((at, part), low) in columns(parts).zip(lows) {
        part.backward_apart(&dy.values, at, x, low.as_ref(), dx.as_ref().map(|dx| (dx, at > 0)), pass)?;
    }
    Ok(dx)
}
