//! One decoder layer, forward and backward by hand: attention and feed-forward around the residual stream. What is
//! kept between the two passes is a choice.
//!
//! `middle = x + attention(x)`, `y = middle + feed_forward(middle)`; in a parallel layer the feed-forward reads x.

use candle_core::{Device, Result, Tensor};

use crate::facts::{Facts, Keep, Projection};
use crate::ops::attention::cached::{Segments, Store};

use super::feed_forward::{self, FeedForward};
use super::norm;
use super::pass::Pass;
use super::self_attention::{self, SelfAttention};

/// One layer of the frozen base.
#[derive(Clone, Debug)]
pub struct Layer {
    pub attention: SelfAttention,
    pub feed_forward: FeedForward,
    /// The feed-forward reads the layer's input, not attention's sum.
    pub parallel: bool,
}

/// What a layer keeps for its backward pass: its input, and what its level allows of all that follows from it.
pub struct Kept {
    x: Tensor,
    /// The device that x came from, if it was moved to the host.
    home: Option<Device>,
    attention: self_attention::Kept,
    feed_forward: feed_forward::Kept,
}

impl Kept {
    /// Lets go of what the level does not keep.
    fn reduce(mut self, keep: Keep) -> Result<Kept> {
        self.attention.reduce(keep);
        self.feed_forward.reduce(keep);
        if keep == Keep::HostInputs {
            self.home = Some(self.x.device().clone());
            self.x = self.x.to_device(&Device::Cpu)?;
        }
        Ok(self)
    }

    /// Values held on the device: what the memory plan must have counted.
    #[cfg(test)]
    pub fn values(&self) -> usize {
        let x = if self.home.is_some() { 0 } else { self.x.elem_count() };
        x + self.attention.values() + self.feed_forward.values()
    }
}

#[cfg(test)]
pub(super) fn count(tensor: &Option<Tensor>) -> usize {
    tensor.as_ref().map_or(0, Tensor::elem_count)
}

/// Values a token that a layer keeps on the device at a level. `rank` is the rank of a projection's pair, 0 without
/// one.
pub fn kept_values(facts: &Facts, layer: usize, rank: impl Fn(&Projection) -> usize, keep: Keep) -> usize {
    let x = if keep == Keep::HostInputs { 0 } else { facts.width };
    x + self_attention::kept_values(facts, layer, &rank, keep)
        + feed_forward::kept_values(facts, layer, &rank, keep)
}

impl Layer {
    /// x [T, C] -> the layer's output and what its backward pass needs, as far as `keep` allows.
    pub fn forward(&self, x: Tensor, keep: Keep, pass: &Pass) -> Result<(Tensor, Kept)> {
        let attention = self.attention.complete(Default::default(), &x, pass)?;
        let middle = attention.sum();
        let (sum, feed_forward) = self.feed_forward.forward(self.fed(&x, middle), middle, pass)?;
        let kept = Kept { x, home: None, attention: attention.into(), feed_forward: feed_forward.into() };
        Ok((sum, kept.reduce(keep)?))
    }

    /// x [T, C] of new rows of running sequences -> the layer's output; nothing is kept but keys and values.
    pub fn step(&self, x: &Tensor, pass: &Pass, segments: &Segments, store: &mut Store) -> Result<Tensor> {
        let middle = self.attention.step(x, pass, segments, store)?;
        Ok(self.feed_forward.forward(self.fed(x, &middle), &middle, pass)?.0)
    }

    /// `d` [T, C] holds the gradient of the output and becomes that of x, in place. With `lowest`, nothing
    /// below needs it, and the work that would only serve it is left out.
    pub fn backward(&self, d: &Tensor, kept: Kept, lowest: bool, pass: &Pass) -> Result<()> {
        let x = match &kept.home {
            Some(device) => kept.x.to_device(device)?,
            None => kept.x,
        };
        let attention = self.attention.complete(kept.attention, &x, pass)?;
        let input = self.fed(&x, attention.sum()).clone();
        let feed_forward = self.feed_forward.complete(kept.feed_forward, &input, pass)?;
        let d_fed = self.feed_forward.backward(d, &input, feed_forward, lowest && self.parallel, pass)?;
        // In a parallel layer, attention's gradient is that of the output too: `d` must still be it.
        let (before, behind) = if self.parallel { (None, d_fed) } else { (d_fed, None) };
        if let Some(d_fed) = before {
            norm::backward(&self.feed_forward.norm, &d_fed, &input, d)?;
        }
        let d_read = self.attention.backward(d, &x, attention, lowest, pass)?;
        if let Some(d_fed) = behind {
            norm::backward(&self.feed_forward.norm, &d_fed, &input, d)?;
        }
        match d_read {
            Some(d_read) => norm::backward(&self.attention.norm, &d_read, &x, d),
            None => Ok(()),
        }
    }

    /// What the feed-forward reads.
    fn fed<'a>(&self, x: &'a Tensor, middle: &'a Tensor) -> &'a Tensor {
        if self.parallel { x } else { middle }
    }
}
