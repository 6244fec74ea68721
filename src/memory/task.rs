//! A training run as far as memory and time depend on it.

use super::machine::{Limit, Place};
use crate::facts::sites::{self, Site, TokenRows};
use crate::facts::{Facts, Keep, Precision, Quantization, Residency};
use crate::ops::fp8;

/// The memory settings of a run. `plan` fills them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The level of every layer; `None`: as memory allows.
    pub keep: Option<Keep>,
    /// The share of the free memory that may be used; `None`: the default share.
    pub limit: Option<Limit>,
    /// Most tokens per pass.
    pub tokens_max: Option<usize>,
    /// The place of the layers' 4-bit weights; `None`: on the device if they fit.
    pub residency: Option<Residency>,
}

/// The training run, as far as memory and time depend on it.
#[derive(Clone, Debug)]
pub struct Task {
    /// The model.
    pub facts: Facts,
    /// The adapter's sites.
    pub sites: Vec<Site>,
    /// The trained rows of tables of tokens.
    pub tokens: Vec<TokenRows>,
    /// The storage of the base's linear layers.
    pub quantization: Quantization,
    /// The precision of matrix products.
    pub precision: Precision,
    /// Whether training drops elements of the pairs' inputs.
    pub dropout: bool,
    /// Whether the weights that are not quantised (embedding, head, perhaps linear layers) are bf16 in the
    /// checkpoint.
    pub bf16_checkpoint: bool,
    /// Tokens of the longest example. A pass takes at least as many.
    pub tokens_min: usize,
    /// Most tokens per pass.
    pub tokens_max: usize,
    /// Usual tokens per example. The work of attention follows it.
    pub example_tokens: usize,
    /// Whether the optimizer's moments take 8 bits.
    pub eight_bit_moments: bool,
    /// The level of every layer; `None`: the fastest that fits.
    pub keep: Option<Keep>,
    /// The place of the layers' 4-bit weights; `None`: the first of `Residency::ALL` that fits.
    pub residency: Option<Residency>,
}

impl Task {
    /// Returns the number of trained parameters.
    pub fn parameters(&self) -> usize {
        let rows = self.tokens.iter().map(|rows| rows.values().len());
        self.sites.iter().map(Site::parameters).chain(rows).sum()
    }

    /// Returns the lowest layer that the backward pass reaches.
    pub fn lowest(&self) -> usize {
        sites::lowest(&self.sites, &self.tokens, self.facts.layers.len())
    }

    /// Returns the number of bytes of a value that is not quantised. On a GPU it is stored as activations are; on a CPU
    /// bf16 stays bf16 and other types become f32.
    pub fn stored_bytes(&self, place: Place) -> usize {
        match place {
            Place::Cpu { .. } if self.bf16_checkpoint => 2,
            _ => self.activation_bytes(place),
        }
    }

    /// Returns whether products with a frozen weight [rows, cols] have operands in 8 bits.
    pub fn in_8_bits(&self, rows: usize, cols: usize) -> bool {
        self.precision == Precision::Fp8 && fp8::takes(rows, cols)
    }

    /// Returns the number of bytes of an activation. On a GPU activations are stored in the precision of products.
    pub fn activation_bytes(&self, place: Place) -> usize {
        match (place, self.precision) {
            (Place::Gpu, Precision::Bf16 | Precision::Fp8) => 2,
            _ => 4,
        }
    }
}
