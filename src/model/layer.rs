//! One decoder layer, forward and backward by hand: what is kept between the two is a choice.
//!
//! `x -> norm -> q k v -> rope -> attention -> output + x -> norm -> gate up -> SwiGLU -> down + mid`
//!
//! The backward pass computes again what was not kept (`Keep`), never the down projection: its output is not needed.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use crate::ops::attention::{self, Heads};
use crate::ops::rope::{self, Angles, Direction};
use crate::ops::{rms_norm, swiglu, unwritten};

use super::Keep;
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

/// What a layer keeps for its backward pass: its input, and what its level allows of all that follows from it.
pub struct Kept {
    x: Tensor,
    /// Where x came from, when it was moved to the host.
    home: Option<Device>,
    /// Attention's three inputs, turned.
    query_key_value: Option<(Tensor, Vec<Down>)>,
    attended: Option<Attended>,
    gate_up: Option<(Tensor, Vec<Down>)>,
    /// Of the down projection. It is never run again, so `None` may also mean that its pair makes its own.
    down: Down,
}

/// LoRA's `x A^T` of one linear layer, if it is adapted.
type Down = Option<Tensor>;

/// Attention's output and all that follows from it and x alone.
struct Attended {
    output: Tensor,
    log_sum: Tensor,
    down: Down,
    /// The residual stream after attention.
    middle: Tensor,
}

/// `Kept` with nothing missing.
struct Whole {
    x: Tensor,
    query_key_value: (Tensor, Vec<Down>),
    attended: Attended,
    gate_up: (Tensor, Vec<Down>),
    down: Down,
}

impl Kept {
    fn of(x: Tensor) -> Kept {
        Kept { x, home: None, query_key_value: None, attended: None, gate_up: None, down: None }
    }

    /// Lets go of what the level does not keep.
    fn reduce(mut self, keep: Keep) -> Result<Kept> {
        if keep >= Keep::WithoutGateUp {
            self.gate_up = None;
        }
        if keep >= Keep::AttentionOutput {
            self.query_key_value = None;
        }
        if keep >= Keep::LayerInputs {
            (self.attended, self.down) = (None, None);
        }
        if keep == Keep::HostInputs {
            self.home = Some(self.x.device().clone());
            self.x = self.x.to_device(&Device::Cpu)?;
        }
        Ok(self)
    }
}

impl Layer {
    /// x [T, C] -> the layer's output and what its backward pass needs, as far as `keep` allows.
    pub fn forward(&self, x: Tensor, keep: Keep, shape: &Shape) -> Result<(Tensor, Kept)> {
        let whole = self.complete(Kept::of(x), shape)?;
        let y = whole.attended.middle.copy()?;
        let activated = swiglu::forward(&whole.gate_up.0)?;
        let down = self.down.forward(&activated, &y, 0, true, &shape.pass)?;
        let kept = Kept {
            x: whole.x,
            home: None,
            query_key_value: Some(whole.query_key_value),
            attended: Some(whole.attended),
            gate_up: Some(whole.gate_up),
            down,
        };
        Ok((y, kept.reduce(keep)?))
    }

    /// Computes what is missing of everything up to the gate.
    fn complete(&self, kept: Kept, shape: &Shape) -> Result<Whole> {
        let x = match &kept.home {
            Some(device) => kept.x.to_device(device)?,
            None => kept.x,
        };
        let query_key_value = match kept.query_key_value {
            Some(kept) => kept,
            None => self.query_key_value(&x, shape)?,
        };
        let attended = match kept.attended {
            Some(kept) => kept,
            None => self.attended(&x, &query_key_value.0, shape)?,
        };
        let gate_up = match kept.gate_up {
            Some(kept) => kept,
            None => self.gate_up(&attended.middle, shape)?,
        };
        Ok(Whole { x, query_key_value, attended, gate_up, down: kept.down })
    }

    fn query_key_value(&self, x: &Tensor, shape: &Shape) -> Result<(Tensor, Vec<Down>)> {
        let normed = rms_norm::forward(x, &self.attention_norm, shape.norm_eps)?;
        let (query_key_value, downs) = side_by_side(&self.query_key_value, &normed, shape)?;
        turn(&query_key_value, shape, Direction::Forward)?;
        Ok((query_key_value, downs))
    }

    fn attended(&self, x: &Tensor, query_key_value: &Tensor, shape: &Shape) -> Result<Attended> {
        let (output, log_sum) =
            attention::forward(query_key_value, &shape.heads, shape.examples, shape.pass.precision)?;
        let middle = x.copy()?;
        let down = self.output.forward(&output, &middle, 0, true, &shape.pass)?;
        Ok(Attended { output, log_sum, down, middle })
    }

    fn gate_up(&self, middle: &Tensor, shape: &Shape) -> Result<(Tensor, Vec<Down>)> {
        let normed = rms_norm::forward(middle, &self.feed_forward_norm, shape.norm_eps)?;
        side_by_side(&self.gate_up, &normed, shape)
    }

    /// `d` [T, C] holds the gradient of the output and becomes that of x, in place. With `lowest`, nothing
    /// below needs it, and the work that would only serve it is left out.
    pub fn backward(&self, d: &Tensor, kept: Kept, lowest: bool, shape: &Shape) -> Result<()> {
        let Whole { x, query_key_value, attended, gate_up, down } = self.complete(kept, shape)?;
        self.feed_forward_backward(d, &attended.middle, gate_up, down, shape)?;
        let d_attended = unwritten_like(&attended.output)?;
        let down = attended.down.as_ref();
        self.output.backward(d, 0, &attended.output, down, Some((&d_attended, false)), &shape.pass)?;
        let (query_key_value, downs) = query_key_value;
        let d_qkv = attention::backward(
            &d_attended,
            &query_key_value,
            &attended.output,
            &attended.log_sum,
            &shape.heads,
            shape.examples,
            shape.pass.precision,
        )?;
        drop((query_key_value, attended, d_attended));
        turn(&d_qkv, shape, Direction::Backward)?;
        let normed = rms_norm::forward(&x, &self.attention_norm, shape.norm_eps)?;
        if lowest {
            return side_by_side_backward(&self.query_key_value, &d_qkv, &normed, &downs, None, shape);
        }
        let d_normed = unwritten_like(&x)?;
        side_by_side_backward(&self.query_key_value, &d_qkv, &normed, &downs, Some(&d_normed), shape)?;
        rms_norm::backward(&d_normed, &x, &self.attention_norm, shape.norm_eps, d)
    }

    /// Takes gate and up, so that they are gone before attention's gradients are made.
    fn feed_forward_backward(
        &self,
        d: &Tensor,
        middle: &Tensor,
        (gate_up, downs): (Tensor, Vec<Down>),
        down: Down,
        shape: &Shape,
    ) -> Result<()> {
        let activated = swiglu::forward(&gate_up)?;
        let d_activated = unwritten_like(&activated)?;
        self.down.backward(d, 0, &activated, down.as_ref(), Some((&d_activated, false)), &shape.pass)?;
        drop(activated);
        let d_gate_up = swiglu::backward(&d_activated, &gate_up)?;
        drop((gate_up, d_activated));
        let normed = rms_norm::forward(middle, &self.feed_forward_norm, shape.norm_eps)?;
        let d_normed = unwritten_like(&normed)?;
        side_by_side_backward(&self.gate_up, &d_gate_up, &normed, &downs, Some(&d_normed), shape)?;
        rms_norm::backward(&d_normed, middle, &self.feed_forward_norm, shape.norm_eps, d)
    }
}

/// For what the next product writes whole.
fn unwritten_like(tensor: &Tensor) -> Result<Tensor> {
    unwritten(tensor.shape(), tensor.dtype(), tensor.device())
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

fn side_by_side(parts: &[Linear], x: &Tensor, shape: &Shape) -> Result<(Tensor, Vec<Down>)> {
    let width: usize = parts.iter().map(|part| part.weight.dims().0).sum();
    let y = unwritten((x.dim(0)?, width), x.dtype(), x.device())?;
    let downs = columns(parts).map(|(at, part)| part.forward(x, &y, at, false, &shape.pass));
    let downs = downs.collect::<Result<_>>()?;
    Ok((y, downs))
}

fn side_by_side_backward(
    parts: &[Linear],
    dy: &Tensor,
    x: &Tensor,
    downs: &[Down],
    dx: Option<&Tensor>,
    shape: &Shape,
) -> Result<()> {
    for ((at, part), down) in columns(parts).zip(downs) {
        part.backward(dy, at, x, down.as_ref(), dx.map(|dx| (dx, at > 0)), &shape.pass)?;
    }
    Ok(())
}
