//! A layer's feed-forward with hand-written forward and backward passes: `input -> norm -> gate up -> activation ->
//! down (-> norm)`, added to the residual stream. `kept_values` says how much it keeps at each level.
//!
//! The backward pass computes the down projection again only if a norm after it needs its output.

use candle_core::{Result, Tensor};

use crate::facts::{self, Activation, Facts, Keep, Projection};
use crate::ops::activation;
#[cfg(feature = "cuda")]
use crate::ops::change::Change;
use crate::ops::unwritten;

use super::inside::{rounded_in, spare_in};
use super::linear::{self, Linear, side_by_side, side_by_side_backward};
use super::lora::Low;
#[cfg(feature = "cuda")]
use super::made;
use super::norm::{self, Norm, Normed};
use super::operand::Operand;
use super::pass::Pass;

/// One layer's feed-forward with its norms.
#[derive(Clone, Debug)]
pub struct FeedForward {
    /// The norm before it.
    pub norm: Option<Norm>,
    /// The computation between the norms.
    pub form: Form,
    /// The norm after it.
    pub post_norm: Option<Norm>,
}

/// The computation between the norms.
#[derive(Clone, Debug)]
pub enum Form {
    /// One feed-forward for all tokens.
    Dense(Dense),
}

/// A feed-forward that computes every token in the same way.
#[derive(Clone, Debug)]
pub struct Dense {
    /// One or two projections whose outputs lie side by side in the columns of one matrix, in order.
    pub gate_up: Vec<Linear>,
    /// The function between `gate_up` and `down`.
    pub activation: Activation,
    /// The projection back to the residual stream.
    pub down: Linear,
}

/// The tensors kept between forward and backward, as far as the level allows.
#[derive(Default)]
pub struct Kept {
    gate_up: Option<GateUp>,
    /// The output of the down projection if a norm follows it. Without a norm it is never needed again.
    branch: Option<Tensor>,
    /// LoRA's `x A^T` of the down projection. `None`: no pair, or the backward pass computes it again.
    low: Low,
}

/// `Kept` with nothing missing.
pub struct Whole {
    gate_up: GateUp,
    branch: Option<Tensor>,
    low: Low,
}

/// The activation's input, and LoRA's `x A^T` of each projection.
struct GateUp {
    values: Tensor,
    /// The factors of the norm's rows, if `norm::forward_beside` gave them.
    scales: Option<Tensor>,
    lows: Vec<Low>,
}

impl Kept {
    /// Drops values that the level does not keep.
    pub fn reduce(&mut self, keep: Keep) {
        if keep >= Keep::WithoutGateUp {
            self.gate_up = None;
        }
        if keep >= Keep::LayerInputs {
            (self.branch, self.low) = (None, None);
        }
    }

    /// Returns the number of values held. It must equal the memory plan's count.
    #[cfg(test)]
    pub fn values(&self) -> usize {
        use super::norm::count;
        let lows = |kept: &GateUp| kept.lows.iter().map(count).sum::<usize>();
        let gate_up = |kept: &GateUp| kept.values.elem_count() + count(&kept.scales) + lows(kept);
        self.gate_up.as_ref().map_or(0, gate_up) + count(&self.branch) + count(&self.low)
    }
}

impl From<Whole> for Kept {
    fn from(whole: Whole) -> Kept {
        Kept { gate_up: Some(whole.gate_up), branch: whole.branch, low: whole.low }
    }
}

/// Returns the number of values per token that a layer's feed-forward keeps at a level. `rank` gives the rank of a
/// projection's pair, 0 if it has none.
pub fn kept_values(facts: &Facts, layer: usize, rank: impl Fn(&Projection) -> usize, keep: Keep) -> usize {
    let facts::FeedForward::Dense(dense) = &facts.layers[layer].feed_forward;
    let gate_up: usize = dense.gate_up.iter().map(|p| p.rows + rank(p)).sum();
    let behind = if facts.names.feed_forward_post_norm.is_some() { facts.width } else { 0 };
    let down = rank(&dense.down) + behind;
    match keep {
        Keep::Everything => gate_up + down,
        Keep::WithoutGateUp | Keep::AttentionOutput => down,
        Keep::LayerInputs | Keep::HostInputs => 0,
    }
}

/// Returns the number of values per token of the backward pass in its widest moment: the gradients of gate and up and
/// of their product, and the masked product if its pair has dropout.
pub fn working_values(facts: &Facts, layer: usize, dropout: bool) -> usize {
    let facts::FeedForward::Dense(dense) = &facts.layers[layer].feed_forward;
    step_values(facts, layer) + if dropout { dense.down.cols } else { 0 }
}

/// Returns the number of values per token of the forward pass in its widest moment: gate, up and their product.
pub fn step_values(facts: &Facts, layer: usize) -> usize {
    let facts::FeedForward::Dense(dense) = &facts.layers[layer].feed_forward;
    dense.gate_up.iter().map(|p| p.rows).sum::<usize>() + dense.down.cols
}

impl FeedForward {
    fn dense(&self) -> &Dense {
        let Form::Dense(dense) = &self.form;
        dense
    }

    /// Returns the residual stream with the feed-forward's output added, and the tensors that the backward pass
    /// needs.
    pub fn forward(&self, input: &Tensor, residual: &Tensor, pass: &Pass) -> Result<(Tensor, Whole)> {
        let (dense, gate_up) = (self.dense(), self.gate_up(input, pass)?);
        #[cfg(feature = "cuda")]
        if self.post_norm.is_none()
            && let Some(sum) = made::onto(&gate_up.values, dense.activation, &dense.down, residual, pass)?
        {
            return Ok((sum, Whole { gate_up, branch: None, low: None }));
        }
        let activated = self.activated(&gate_up, pass)?;
        let added = norm::join(&dense.down, &self.post_norm, &activated, residual, pass)?;
        let low = self.kept_low(added.low, &activated.values, pass)?;
        Ok((added.sum, Whole { gate_up, branch: added.branch, low }))
    }

    /// Computes those tensors of the backward pass that were not kept.
    pub fn complete(&self, kept: Kept, input: &Tensor, pass: &Pass) -> Result<Whole> {
        let (dense, Kept { gate_up, mut branch, mut low }) = (self.dense(), kept);
        let gate_up = match gate_up {
            Some(gate_up) => gate_up,
            None => self.gate_up(input, pass)?,
        };
        if self.post_norm.is_some() && branch.is_none() {
            let activated = self.activated(&gate_up, pass)?;
            let result = unwritten(input.shape(), input.dtype(), input.device())?;
            low = dense.down.forward(&activated, &result, false, pass)?;
            low = self.kept_low(low, &activated.values, pass)?;
            branch = Some(result);
        }
        Ok(Whole { gate_up, branch, low })
    }

    /// Returns the input of the down projection, with the spare columns that it needs.
    fn activated(&self, gate_up: &GateUp, pass: &Pass) -> Result<Operand> {
        let (dense, values) = (self.dense(), &gate_up.values);
        let (rows, device) = (values.dim(0)?, values.device());
        let spare = dense.down.spare(rows, device, pass);
        #[cfg(feature = "cuda")]
        if rounded_in(std::slice::from_ref(&dense.down), rows, device, pass) {
            let (values, rounded) = activation::forward_rounded(values, dense.activation, spare)?;
            return Ok(Operand { values, rounded: vec![rounded] });
        }
        Ok(activation::forward_beside(values, dense.activation, spare)?.into())
    }

    /// Returns the low-rank product of the down projection, in memory of its own, because its input is not kept.
    fn kept_low(&self, low: Low, activated: &Tensor, pass: &Pass) -> Result<Low> {
        match low {
            Some(low) => Ok(Some(low)),
            None => linear::kept_low(&self.dense().down, activated, pass),
        }
    }

    fn gate_up(&self, input: &Tensor, pass: &Pass) -> Result<GateUp> {
        #[cfg(feature = "cuda")]
        if let Some(values) = made::side_by_side(&self.norm, input, &self.dense().gate_up, pass)? {
            return Ok(GateUp { values, scales: None, lows: Vec::new() });
        }
        let (parts, rows) = (&self.dense().gate_up, input.dim(0)?);
        let spare = spare_in(parts, rows, input.device(), pass);
        let rounded = rounded_in(parts, rows, input.device(), pass);
        let (normed, scales) = norm::forward_beside(&self.norm, input, spare, rounded)?;
        let (values, lows) = side_by_side(parts, &normed, pass)?;
        Ok(GateUp { values, scales, lows })
    }

    /// `d` is the gradient of the sum. Returns the gradient of the input of the gate and up projections, or `None`
    /// if nothing needs it (`lowest`). Gate and up are freed before attention's gradients are computed.
    pub fn backward(
        &self,
        d: Operand,
        input: &Tensor,
        whole: Whole,
        lowest: bool,
        pass: &Pass,
    ) -> Result<Option<Tensor>> {
        let (dense, Whole { gate_up: GateUp { values, scales, lows }, branch, low }) = (self.dense(), whole);
        let (rows, device) = (input.dim(0)?, input.device());
        let spare = dense.down.spare(rows, device, pass);
        let rounded = rounded_in(std::slice::from_ref(&dense.down), rows, device, pass);
        let d_branch = norm::through(&self.post_norm, &branch, d, spare, rounded)?;
        drop(branch);
        let d_gate_up = self.through_activation(d_branch, &values, low.as_ref(), pass)?;
        drop(values);
        let normed = Normed { norm: &self.norm, x: input, scales: scales.as_ref() };
        side_by_side_backward(&dense.gate_up, &d_gate_up, normed, &lows, lowest, pass)
    }

    /// Returns the gradient of gate and up [T, any + spare] from that of the down projection's output; adds the
    /// gradients of its pair.
    fn through_activation(
        &self,
        dy: Operand,
        values: &Tensor,
        low: Option<&Tensor>,
        pass: &Pass,
    ) -> Result<Operand> {
        let Dense { gate_up, activation, down } = self.dense();
        let (rows, device) = (values.dim(0)?, values.device());
        let spare = spare_in(gate_up, rows, device, pass);
        let d_activated = unwritten((rows, down.weight.dims().1), values.dtype(), device)?;
        #[cfg(feature = "cuda")]
        let through = |keep: bool| match rounded_in(gate_up, rows, device, pass) {
            true => {
                let parts = gate_up.len();
                let (values, rounded) =
                    activation::backward_rounded(&d_activated, values, *activation, spare, keep, parts)?;
                Ok(Operand { values, rounded })
            }
            false if keep => {
                activation::backward_keeping(&d_activated, values, *activation, spare).map(Operand::from)
            }
            false => activation::backward_beside(&d_activated, values, *activation, spare).map(Operand::from),
        };
        #[cfg(not(feature = "cuda"))]
        let through =
            |_| activation::backward_beside(&d_activated, values, *activation, spare).map(Operand::from);
        #[cfg(feature = "cuda")]
        if let Some(low) = low.filter(|_| Change::Activated.is_on())
            && let Some(group) = super::inside::Group::of(std::slice::from_ref(down), values, pass)?
        {
            // Only the gradient of A needs the activation, which takes its gradient's place.
            group.backward_input(&dy, low, &d_activated)?;
            let dy = dy.values;
            let d_gate_up = through(true)?;
            group.backward_pairs(&dy, &d_activated)?;
            return Ok(d_gate_up);
        }
        let activated = activation::forward(values, *activation)?;
        down.backward(&dy, &activated, low, Some(&d_activated), pass)?;
        drop((dy, activated));
        through(false)
    }
}
