//! One decoder layer, forward and backward by hand: what is kept between the two is a choice.
//!
//! `x -> norm -> q k v -> rope -> attention -> output + x -> norm -> gate up -> SwiGLU -> down + mid`
//!
//! The backward pass never runs the down projection again: its output is not needed.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use crate::ops::attention::{self, Heads};
use crate::ops::rope::{self, Angles, Direction};
use crate::ops::{rms_norm, swiglu};

use super::linear::{Linear, Pass};

#[derive(Clone, Debug)]
pub struct Layer {
    pub attention_norm: Tensor,
    /// Side by side in the columns of one matrix, in order.
    pub query_key_value: Vec<Linear>,
    pub output: Linear,
    pub feed_forward_norm: Tensor,
    pub gate_up: Vec<Linear>,
    pub down: Linear,
}

/// What every layer of a pass shares.
pub struct Shape<'a> {
    pub heads: Heads,
    pub norm_eps: f64,
    pub angles: &'a Angles,
    pub examples: &'a [Range<usize>],
    pub pass: Pass<'a>,
}

/// What a layer keeps for its backward pass; all of it follows from `x`.
pub struct Kept {
    query_key_value: Tensor,
    attended: Tensor,
    log_sum: Tensor,
    middle: Tensor,
    gate_up: Tensor,
    /// LoRA's `x A^T` of each linear layer, in order.
    down: Downs,
}

#[derive(Default)]
struct Downs {
    query_key_value: Vec<Option<Tensor>>,
    output: Option<Tensor>,
    gate_up: Vec<Option<Tensor>>,
    down: Option<Tensor>,
}

impl Layer {
    /// x [T, C] -> the layer's output and what its backward pass needs.
    pub fn forward(&self, x: &Tensor, shape: &Shape) -> Result<(Tensor, Kept)> {
        let mut kept = self.keep(x, shape)?;
        let y = kept.middle.copy()?;
        kept.down.down = self.down.forward(&swiglu::forward(&kept.gate_up)?, &y, 0, true, &shape.pass)?;
        Ok((y, kept))
    }

    /// Everything up to the gate: what the backward pass needs, from x alone.
    pub fn keep(&self, x: &Tensor, shape: &Shape) -> Result<Kept> {
        let mut down = Downs::default();
        let normed = rms_norm::forward(x, &self.attention_norm, shape.norm_eps)?;
        let query_key_value = side_by_side(&self.query_key_value, &normed, &mut down.query_key_value, shape)?;
        turn(&query_key_value, shape, Direction::Forward)?;
        let (attended, log_sum) =
            attention::forward(&query_key_value, &shape.heads, shape.examples, shape.pass.precision)?;
        let middle = x.copy()?;
        down.output = self.output.forward(&attended, &middle, 0, true, &shape.pass)?;
        let normed = rms_norm::forward(&middle, &self.feed_forward_norm, shape.norm_eps)?;
        let gate_up = side_by_side(&self.gate_up, &normed, &mut down.gate_up, shape)?;
        Ok(Kept { query_key_value, attended, log_sum, middle, gate_up, down })
    }

    /// `d` [T, C] holds the gradient of the output and becomes that of x, in place. With `lowest`, nothing
    /// below needs it, and the work that would only serve it is left out.
    pub fn backward(&self, d: &Tensor, x: &Tensor, kept: &Kept, lowest: bool, shape: &Shape) -> Result<()> {
        self.feed_forward_backward(d, kept, shape)?;
        let d_attended = kept.attended.zeros_like()?;
        let down = kept.down.output.as_ref();
        self.output.backward(d, 0, &kept.attended, down, Some((&d_attended, false)), &shape.pass)?;
        let d_qkv = attention::backward(
            &d_attended,
            &kept.query_key_value,
            &kept.attended,
            &kept.log_sum,
            &shape.heads,
            shape.examples,
            shape.pass.precision,
        )?;
        turn(&d_qkv, shape, Direction::Backward)?;
        let normed = rms_norm::forward(x, &self.attention_norm, shape.norm_eps)?;
        let downs = &kept.down.query_key_value;
        if lowest {
            return side_by_side_backward(&self.query_key_value, &d_qkv, &normed, downs, None, shape);
        }
        let d_normed = x.zeros_like()?;
        side_by_side_backward(&self.query_key_value, &d_qkv, &normed, downs, Some(&d_normed), shape)?;
        rms_norm::backward(&d_normed, x, &self.attention_norm, shape.norm_eps, d)
    }

    fn feed_forward_backward(&self, d: &Tensor, kept: &Kept, shape: &Shape) -> Result<()> {
        let activated = swiglu::forward(&kept.gate_up)?;
        let d_activated = activated.zeros_like()?;
        let down = kept.down.down.as_ref();
        self.down.backward(d, 0, &activated, down, Some((&d_activated, false)), &shape.pass)?;
        let d_gate_up = swiglu::backward(&d_activated, &kept.gate_up)?;
        let normed = rms_norm::forward(&kept.middle, &self.feed_forward_norm, shape.norm_eps)?;
        let d_normed = normed.zeros_like()?;
        side_by_side_backward(
            &self.gate_up,
            &d_gate_up,
            &normed,
            &kept.down.gate_up,
            Some(&d_normed),
            shape,
        )?;
        rms_norm::backward(&d_normed, &kept.middle, &self.feed_forward_norm, shape.norm_eps, d)
    }
}

fn turn(qkv: &Tensor, shape: &Shape, direction: Direction) -> Result<()> {
    let heads = &shape.heads;
    rope::rotate(qkv, heads.query + heads.key, heads.width, shape.angles, direction)
}

/// Columns where each part begins.
fn columns(parts: &[Linear]) -> impl Iterator<Item = (usize, &Linear)> {
    parts.iter().scan(0, |at, part| {
        let from = *at;
        *at += part.weight.dims().0;
        Some((from, part))
    })
}

fn side_by_side(
    parts: &[Linear],
    x: &Tensor,
    downs: &mut Vec<Option<Tensor>>,
    shape: &Shape,
) -> Result<Tensor> {
    let width: usize = parts.iter().map(|part| part.weight.dims().0).sum();
    let y = Tensor::zeros((x.dim(0)?, width), x.dtype(), &Device::Cpu)?;
    for (at, part) in columns(parts) {
        downs.push(part.forward(x, &y, at, false, &shape.pass)?);
    }
    Ok(y)
}

fn side_by_side_backward(
    parts: &[Linear],
    dy: &Tensor,
    x: &Tensor,
    downs: &[Option<Tensor>],
    dx: Option<&Tensor>,
    shape: &Shape,
) -> Result<()> {
    for ((at, part), down) in columns(parts).zip(downs) {
        part.backward(dy, at, x, down.as_ref(), dx.map(|dx| (dx, at > 0)), &shape.pass)?;
    }
    Ok(())
}
