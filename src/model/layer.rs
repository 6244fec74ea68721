//! One decoder layer, forward and backward by hand: what is kept between the two is a choice.
//!
//! `x -> norm -> q k v -> (norm) -> rope -> attention -> output (-> norm) + x = mid`
//! `mid -> norm -> gate up -> activation -> down (-> norm) + mid`, or from x instead of mid in a parallel layer.
//!
//! The backward pass runs the down projection again only where a norm behind it needs its output.

use candle_core::{Device, Result, Tensor};

use crate::facts::Activation;
use crate::facts::Heads;
use crate::ops::activation;
use crate::ops::attention::{self, Packing};
use crate::ops::rope::{self, Angles, Direction};
use crate::ops::{rows, unwritten};

use super::linear::{Linear, Pass};
use super::norm::{self, HeadNorm, Norm};
use crate::facts::Keep;

#[derive(Clone, Debug)]
pub struct Layer {
    pub heads: Heads,
    /// Which of the pass's angles turn queries and keys; `None`: no positions.
    pub rope: Option<usize>,
    pub attention_norm: Option<Norm>,
    /// Side by side in the columns of one matrix, in order.
    pub query_key_value: Vec<Linear>,
    pub head_norm: Option<HeadNorm>,
    pub output: Linear,
    pub attention_post_norm: Option<Norm>,
    /// The feed-forward reads the layer's input, not attention's sum.
    pub parallel: bool,
    pub feed_forward_norm: Option<Norm>,
    pub gate_up: Vec<Linear>,
    pub activation: Activation,
    pub down: Linear,
    pub feed_forward_post_norm: Option<Norm>,
}

/// What every layer of a pass shares.
pub struct Shape<'a> {
    /// Of each rope, with a row for each of the heads' runs (`Heads::turning`).
    pub angles: &'a [Angles],
    /// Turns of no angle that lengthen the queries, by row.
    pub growth: Option<&'a Angles>,
    pub packing: &'a Packing,
    pub pass: Pass<'a>,
}

/// What a layer keeps for its backward pass: its input, and what its level allows of all that follows from it.
pub struct Kept {
    x: Tensor,
    /// Where x came from, when it was moved to the host.
    home: Option<Device>,
    query_key_value: Option<QueryKeyValue>,
    attended: Option<Attended>,
    gate_up: Option<(Tensor, Vec<Down>)>,
    /// The down projection's result where a norm follows it; elsewhere it is never needed again.
    feed_forward_branch: Option<Tensor>,
    /// Of the down projection; `None` may also mean that its pair makes its own.
    down: Down,
}

/// LoRA's `x A^T` of one linear layer, if it is adapted.
type Down = Option<Tensor>;

/// Attention's three inputs, turned.
struct QueryKeyValue {
    turned: Tensor,
    /// Queries and keys before their norm, where they have one.
    raw: Option<Tensor>,
    downs: Vec<Down>,
}

/// Attention's output and all that follows from it and x alone.
struct Attended {
    output: Tensor,
    log_sum: Tensor,
    /// The output projection's result where a norm follows it.
    branch: Option<Tensor>,
    down: Down,
    /// The residual stream after attention.
    middle: Tensor,
}

/// `Kept` with nothing missing.
struct Whole {
    x: Tensor,
    query_key_value: QueryKeyValue,
    attended: Attended,
    gate_up: (Tensor, Vec<Down>),
    feed_forward_branch: Option<Tensor>,
    down: Down,
}

impl Kept {
    fn of(x: Tensor) -> Kept {
        Kept {
            x,
            home: None,
            query_key_value: None,
            attended: None,
            gate_up: None,
            feed_forward_branch: None,
            down: None,
        }
    }

    /// Values held on the device: what the memory plan must have counted.
    #[cfg(test)]
    pub fn values(&self) -> usize {
        let of = |tensor: &Option<Tensor>| tensor.as_ref().map_or(0, Tensor::elem_count);
        let downs = |downs: &[Down]| downs.iter().map(of).sum::<usize>();
        let x = if self.home.is_some() { 0 } else { self.x.elem_count() };
        let qkv = |kept: &QueryKeyValue| kept.turned.elem_count() + of(&kept.raw) + downs(&kept.downs);
        let attended = |kept: &Attended| {
            let always = kept.output.elem_count() + kept.log_sum.elem_count() + kept.middle.elem_count();
            always + of(&kept.branch) + of(&kept.down)
        };
        x + self.query_key_value.as_ref().map_or(0, qkv)
            + self.attended.as_ref().map_or(0, attended)
            + self.gate_up.as_ref().map_or(0, |(tensor, list)| tensor.elem_count() + downs(list))
            + of(&self.feed_forward_branch)
            + of(&self.down)
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
            (self.attended, self.feed_forward_branch, self.down) = (None, None, None);
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
        let whole = self.complete_to_gate(Kept::of(x), shape)?;
        let activated = activation::forward(&whole.gate_up.0, self.activation)?;
        let middle = &whole.attended.middle;
        let joined = join(&self.down, &self.feed_forward_post_norm, &activated, middle, shape)?;
        let kept = Kept {
            x: whole.x,
            home: None,
            query_key_value: Some(whole.query_key_value),
            attended: Some(whole.attended),
            gate_up: Some(whole.gate_up),
            feed_forward_branch: joined.branch,
            down: joined.down,
        };
        Ok((joined.sum, kept.reduce(keep)?))
    }

    /// Computes what is missing of all that the backward pass needs.
    fn complete(&self, kept: Kept, shape: &Shape) -> Result<Whole> {
        let mut whole = self.complete_to_gate(kept, shape)?;
        if self.feed_forward_post_norm.is_some() && whole.feed_forward_branch.is_none() {
            let activated = activation::forward(&whole.gate_up.0, self.activation)?;
            let branch = unwritten_like(&whole.x)?;
            whole.down = self.down.forward(&activated, &branch, 0, false, &shape.pass)?;
            whole.feed_forward_branch = Some(branch);
        }
        Ok(whole)
    }

    fn complete_to_gate(&self, kept: Kept, shape: &Shape) -> Result<Whole> {
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
            None => self.attended(&x, &query_key_value.turned, shape)?,
        };
        let gate_up = match kept.gate_up {
            Some(kept) => kept,
            None => self.gate_up(self.feed_forward_input(&x, &attended.middle), shape)?,
        };
        let (feed_forward_branch, down) = (kept.feed_forward_branch, kept.down);
        Ok(Whole { x, query_key_value, attended, gate_up, feed_forward_branch, down })
    }

    fn query_key_value(&self, x: &Tensor, shape: &Shape) -> Result<QueryKeyValue> {
        let normed = norm::forward(&self.attention_norm, x)?;
        let (turned, downs) = side_by_side(&self.query_key_value, &normed, shape)?;
        let raw = match &self.head_norm {
            Some(norm) => Some(norm.forward(&turned, &self.heads)?),
            None => None,
        };
        self.turn(&turned, shape, Direction::Forward)?;
        Ok(QueryKeyValue { turned, raw, downs })
    }

    fn attended(&self, x: &Tensor, query_key_value: &Tensor, shape: &Shape) -> Result<Attended> {
        let (output, log_sum) =
            attention::forward(query_key_value, &self.heads, shape.packing, shape.pass.precision)?;
        let joined = join(&self.output, &self.attention_post_norm, &output, x, shape)?;
        Ok(Attended { output, log_sum, branch: joined.branch, down: joined.down, middle: joined.sum })
    }

    fn gate_up(&self, input: &Tensor, shape: &Shape) -> Result<(Tensor, Vec<Down>)> {
        side_by_side(&self.gate_up, &norm::forward(&self.feed_forward_norm, input)?, shape)
    }

    /// `d` [T, C] holds the gradient of the output and becomes that of x, in place. With `lowest`, nothing
    /// below needs it, and the work that would only serve it is left out.
    pub fn backward(&self, d: &Tensor, kept: Kept, lowest: bool, shape: &Shape) -> Result<()> {
        let Whole { x, query_key_value, attended, gate_up, feed_forward_branch, down } =
            self.complete(kept, shape)?;
        let input = self.feed_forward_input(&x, &attended.middle).clone();
        let d_branch = through(&self.feed_forward_post_norm, &feed_forward_branch, d)?;
        drop(feed_forward_branch);
        let lowest_fed = lowest && self.parallel;
        let d_fed = self.feed_forward_backward(&d_branch, &input, gate_up, down, lowest_fed, shape)?;
        // In a parallel layer, attention's gradient is that of the output too: `d` must still be it.
        let (before, behind) = if self.parallel { (None, d_fed) } else { (d_fed, None) };
        if let Some(d_fed) = before {
            norm::backward(&self.feed_forward_norm, &d_fed, &input, d)?;
        }
        let d_read = self.attention_backward(d, &x, query_key_value, attended, lowest, shape)?;
        if let Some(d_fed) = behind {
            norm::backward(&self.feed_forward_norm, &d_fed, &input, d)?;
        }
        match d_read {
            Some(d_read) => norm::backward(&self.attention_norm, &d_read, &x, d),
            None => Ok(()),
        }
    }

    fn feed_forward_input<'a>(&self, x: &'a Tensor, middle: &'a Tensor) -> &'a Tensor {
        if self.parallel { x } else { middle }
    }

    /// The gradient of what the feed-forward's projections read, unless nothing needs it. Takes gate and up, so that
    /// they are gone before attention's gradients are made.
    fn feed_forward_backward(
        &self,
        d: &Tensor,
        input: &Tensor,
        (gate_up, downs): (Tensor, Vec<Down>),
        down: Down,
        lowest: bool,
        shape: &Shape,
    ) -> Result<Option<Tensor>> {
        let activated = activation::forward(&gate_up, self.activation)?;
        let d_activated = unwritten_like(&activated)?;
        self.down.backward(d, 0, &activated, down.as_ref(), Some((&d_activated, false)), &shape.pass)?;
        drop(activated);
        let d_gate_up = activation::backward(&d_activated, &gate_up, self.activation)?;
        drop((gate_up, d_activated));
        let normed = norm::forward(&self.feed_forward_norm, input)?;
        side_by_side_backward(&self.gate_up, &d_gate_up, &normed, &downs, lowest, shape)
    }

    /// The gradient of what the query, key and value projections read, unless nothing needs it.
    fn attention_backward(
        &self,
        d: &Tensor,
        x: &Tensor,
        query_key_value: QueryKeyValue,
        attended: Attended,
        lowest: bool,
        shape: &Shape,
    ) -> Result<Option<Tensor>> {
        let QueryKeyValue { turned, raw, downs } = query_key_value;
        let d_branch = through(&self.attention_post_norm, &attended.branch, d)?;
        let d_attended = unwritten_like(&attended.output)?;
        let (output, down) = (&attended.output, attended.down.as_ref());
        self.output.backward(&d_branch, 0, output, down, Some((&d_attended, false)), &shape.pass)?;
        let d_qkv = attention::backward(
            &d_attended,
            &turned,
            &attended.output,
            &attended.log_sum,
            &self.heads,
            shape.packing,
            shape.pass.precision,
        )?;
        drop((turned, attended, d_attended, d_branch));
        self.turn(&d_qkv, shape, Direction::Backward)?;
        if let (Some(norm), Some(raw)) = (&self.head_norm, &raw) {
            norm.backward(&d_qkv, raw, &self.heads)?;
        }
        let normed = norm::forward(&self.attention_norm, x)?;
        side_by_side_backward(&self.query_key_value, &d_qkv, &normed, &downs, lowest, shape)
    }

    /// Turns queries and keys by their positions, in place.
    fn turn(&self, qkv: &Tensor, shape: &Shape, direction: Direction) -> Result<()> {
        let Some(rope) = self.rope else { return Ok(()) };
        let ((rows, columns), (runs, heads)) = (qkv.dims2()?, self.heads.turning());
        let runs = qkv.reshape((rows * runs, columns / runs))?;
        rope::rotate(&runs, heads, self.heads.width, &shape.angles[rope], direction)?;
        match shape.growth {
            Some(growth) => rope::rotate(qkv, self.heads.query, self.heads.width, growth, direction),
            None => Ok(()),
        }
    }
}

/// `residual + norm(linear(x))`, with what the backward pass needs of it.
struct Joined {
    sum: Tensor,
    branch: Option<Tensor>,
    down: Down,
}

fn join(
    linear: &Linear,
    norm: &Option<Norm>,
    x: &Tensor,
    residual: &Tensor,
    shape: &Shape,
) -> Result<Joined> {
    let Some(norm) = norm else {
        let sum = residual.copy()?;
        let down = linear.forward(x, &sum, 0, true, &shape.pass)?;
        return Ok(Joined { sum, branch: None, down });
    };
    let branch = unwritten_like(residual)?;
    let down = linear.forward(x, &branch, 0, false, &shape.pass)?;
    let sum = norm.forward(&branch)?;
    rows::add(&sum, residual)?;
    Ok(Joined { sum, branch: Some(branch), down })
}

/// The gradient of a branch from that of the sum it was added to.
fn through(norm: &Option<Norm>, branch: &Option<Tensor>, d: &Tensor) -> Result<Tensor> {
    let (Some(norm), Some(branch)) = (norm, branch) else { return Ok(d.clone()) };
    let d_branch = d.zeros_like()?;
    norm.backward(d, branch, &d_branch)?;
    Ok(d_branch)
}

/// For what the next product writes whole.
fn unwritten_like(tensor: &Tensor) -> Result<Tensor> {
    unwritten(tensor.shape(), tensor.dtype(), tensor.device())
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

/// The gradient of x, unless `lowest`.
fn side_by_side_backward(
    parts: &[Linear],
    dy: &Tensor,
    x: &Tensor,
    downs: &[Down],
    lowest: bool,
    shape: &Shape,
) -> Result<Option<Tensor>> {
    let dx = if lowest { None } else { Some(unwritten_like(x)?) };
    for ((at, part), down) in columns(parts).zip(downs) {
        part.backward(dy, at, x, down.as_ref(), dx.as_ref().map(|dx| (dx, at > 0)), &shape.pass)?;
    }
    Ok(dx)
}
