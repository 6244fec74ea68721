//! One decoder layer with hand-written forward and backward passes: attention and feed-forward around the residual
//! stream. A level (`Keep`) chooses the values that are kept between the two passes.
//!
//! `middle = x + attention(x)`, `y = middle + feed_forward(middle)`; in a parallel layer the feed-forward reads x.

use candle_core::{Device, Result, Tensor};

use crate::facts::{Facts, Keep, Projection};
use crate::ops::attention::cached::{Segments, Store};

use super::feed_forward::{self, FeedForward, Form};
use super::inside::rounded_in;
use super::linear::Linear;
use super::norm::{self, Norm};
use super::operand::Operand;
use super::pass::Pass;
use super::self_attention::{self, SelfAttention};

/// One layer of the frozen base.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The layer's attention.
    pub attention: SelfAttention,
    /// The layer's feed-forward.
    pub feed_forward: FeedForward,
    /// Whether the feed-forward reads the layer's input instead of the stream after attention.
    pub parallel: bool,
}

/// The tensors that a layer keeps for its backward pass: its input, and as much of the rest as its level allows.
pub struct Kept {
    /// `None`: the decoder has moved it to host memory.
    x: Option<Tensor>,
    attention: self_attention::Kept,
    feed_forward: feed_forward::Kept,
}

impl Kept {
    /// Drops values that the level does not keep.
    fn reduce(mut self, keep: Keep) -> Kept {
        self.attention.reduce(keep);
        self.feed_forward.reduce(keep);
        if keep == Keep::HostInputs {
            self.x = None;
        }
        self
    }

    /// Returns whether the input waits in host memory.
    pub fn is_away(&self) -> bool {
        self.x.is_none()
    }

    /// Takes the input, which is on the device again.
    pub fn arrived(&mut self, x: Tensor) {
        self.x = Some(x);
    }

    /// Returns the number of values held on the device. It must equal what the memory plan counted.
    #[cfg(test)]
    pub fn values(&self) -> usize {
        self.x.as_ref().map_or(0, Tensor::elem_count) + self.attention.values() + self.feed_forward.values()
    }
}

/// Returns the number of values per token that a layer keeps on the device at a level. `rank` gives the rank of a
/// projection's pair, 0 if it has none.
pub fn kept_values(facts: &Facts, layer: usize, rank: impl Fn(&Projection) -> usize, keep: Keep) -> usize {
    let x = if keep == Keep::HostInputs { 0 } else { facts.width };
    x + self_attention::kept_values(facts, layer, &rank, keep)
        + feed_forward::kept_values(facts, layer, &rank, keep)
}

/// Returns the number of values per token that a layer's backward pass holds beside the kept values, in its widest
/// moment: the gradient of its output, and the feed-forward's own.
pub fn working_values(facts: &Facts, layer: usize, dropout: bool) -> usize {
    facts.width + feed_forward::working_values(facts, layer, dropout)
}

/// Returns the number of values per token that a step of running sequences holds in a layer's widest moment.
pub fn step_values(facts: &Facts, layer: usize) -> usize {
    3 * facts.width + self_attention::step_values(facts, layer).max(feed_forward::step_values(facts, layer))
}

impl Layer {
    /// Returns the layer's linear layers, in the order in which sites are numbered.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let Form::Dense(dense) = &self.feed_forward.form;
        let attention = self.attention.query_key_value.iter().chain([&self.attention.output]);
        attention.chain(&dense.gate_up).chain([&dense.down])
    }

    /// Returns the same, to be changed.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let Form::Dense(dense) = &mut self.feed_forward.form;
        let attention = self.attention.query_key_value.iter_mut().chain([&mut self.attention.output]);
        attention.chain(&mut dense.gate_up).chain([&mut dense.down]).collect()
    }

    /// Returns the number of spare columns that the gradient of the layer's output must have in a pass over `tokens`
    /// rows. The gradient in front of a norm has columns of its own.
    pub fn spare(&self, tokens: usize, device: &Device, pass: &Pass) -> usize {
        let Form::Dense(dense) = &self.feed_forward.form;
        let of = |linear: &Linear, post_norm: &Option<Norm>| match post_norm {
            Some(_) => 0,
            None => linear.spare(tokens, device, pass),
        };
        let output = of(&self.attention.output, &self.attention.post_norm);
        output.max(of(&dense.down, &self.feed_forward.post_norm))
    }

    /// Returns whether the backward pass reads the gradient of the layer's output in 8 bits first.
    pub fn rounds(&self, tokens: usize, device: &Device, pass: &Pass) -> bool {
        let Form::Dense(dense) = &self.feed_forward.form;
        self.feed_forward.post_norm.is_none()
            && rounded_in(std::slice::from_ref(&dense.down), tokens, device, pass)
    }

    /// x [T, C] -> the layer's output, and the values for its backward pass that `keep` allows. If an input waits in
    /// host memory, the caller copies it there and back.
    pub fn forward(&self, x: Tensor, keep: Keep, pass: &Pass) -> Result<(Tensor, Kept)> {
        let attention = self.attention.complete(Default::default(), &x, pass)?;
        let middle = attention.sum();
        let (sum, feed_forward) = self.feed_forward.forward(self.fed(&x, middle), middle, pass)?;
        let kept = Kept { x: Some(x), attention: attention.into(), feed_forward: feed_forward.into() };
        Ok((sum, kept.reduce(keep)))
    }

    /// x [T, C] of new rows of running sequences -> the layer's output. Only keys and values are kept, in `store`.
    pub fn step(&self, x: &Tensor, pass: &Pass, segments: &Segments, store: &mut Store) -> Result<Tensor> {
        let middle = self.attention.step(x, pass, segments, store)?;
        Ok(self.feed_forward.forward(self.fed(x, &middle), &middle, pass)?.0)
    }

    /// Turns `d` [T, C] from the gradient of the output into that of x, in place, in 8 bits too if `rounded` is set.
    /// Behind it are at least as many spare columns as `spare` says. With `lowest`, no layer below needs the gradient,
    /// and work that only serves it is skipped.
    pub fn backward(
        &self,
        d: Operand,
        kept: Kept,
        lowest: bool,
        rounded: bool,
        pass: &Pass,
    ) -> Result<Operand> {
        let stream = d.values.clone();
        let x = kept.x.expect("an input that was away has arrived");
        let attention = self.attention.complete(kept.attention, &x, pass)?;
        let input = self.fed(&x, attention.sum()).clone();
        let feed_forward = self.feed_forward.complete(kept.feed_forward, &input, pass)?;
        let d_fed = self.feed_forward.backward(d, &input, feed_forward, lowest && self.parallel, pass)?;
        // In a parallel layer, attention needs the gradient of the layer's output too, so `d` must not change
        // before it.
        let (before, behind) = if self.parallel { (None, d_fed) } else { (d_fed, None) };
        let d = match before {
            Some(d_fed) => {
                let output = std::slice::from_ref(&self.attention.output);
                let rounded = self.attention.post_norm.is_none()
                    && rounded_in(output, input.dim(0)?, input.device(), pass);
                norm::backward(&self.feed_forward.norm, &d_fed, &input, stream.clone(), rounded)?
            }
            None => stream.clone().into(),
        };
        let d_read = self.attention.backward(d, &x, attention, lowest, pass)?;
        if let Some(d_fed) = behind {
            norm::backward(&self.feed_forward.norm, &d_fed, &input, stream.clone(), false)?;
        }
        match d_read {
            Some(d_read) => norm::backward(&self.attention.norm, &d_read, &x, stream, rounded),
            None => Ok(stream.into()),
        }
    }

    /// Returns the input of the feed-forward.
    fn fed<'a>(&self, x: &'a Tensor, middle: &'a Tensor) -> &'a Tensor {
        if self.parallel { x } else { middle }
    }
}
