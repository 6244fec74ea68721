//! The memory plan of a run: levels, tokens per pass, and everything that takes bytes.

use super::terms::Term;
use crate::facts::{Keep, Residency};
use crate::ops::change::Change;

/// The memory plan of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The level of each layer.
    pub keep: Vec<Keep>,
    /// Number of the upper layers whose 4-bit weights are also kept expanded.
    pub expanded: usize,
    /// Seconds of a pass that this saves.
    pub expanded_saves: f64,
    /// Most tokens per pass.
    pub tokens: usize,
    /// Everything that takes memory, in the table's order. The last `GROWING` lines grow with the tokens.
    pub terms: Vec<Term>,
    /// Bytes of the machine that may be used.
    pub memory: u64,
    /// Predicted seconds of a pass of `tokens` tokens.
    pub seconds: f64,
    /// FLOPs of that pass.
    pub flops: f64,
    /// The place of the layers' 4-bit weights.
    pub residency: Residency,
    /// Bytes of host memory that each rank locks for weights.
    pub host_bytes: u64,
    /// Bytes of host memory that each rank locks for inputs of layers.
    pub host_inputs: u64,
    /// Bytes of weights that a pass copies to the device.
    pub brought: u64,
    /// Seconds of the pass in which the device waits for weights.
    pub waits: f64,
    /// Processes that train together.
    pub ranks: usize,
    /// Share of their added speeds that they reach together.
    pub efficiency: f64,
}

/// Lines of the table that grow with the tokens of a pass: kept by the layers, one layer at work, gaps between
/// blocks.
pub(super) const GROWING: usize = 3;

/// Bytes that the launches of all graphs take, beside the tensors of one of them, which they share.
const GRAPHS: u64 = 256 << 20;

impl Plan {
    /// Returns the number of bytes of all terms.
    pub fn bytes(&self) -> u64 {
        self.terms.iter().map(|term| term.bytes).sum()
    }

    /// Returns the predicted tokens per second of one rank.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    /// Returns the predicted tokens per second of all ranks, if each has passes in every step.
    pub fn tokens_per_second_in_all(&self) -> f64 {
        self.tokens_per_second() * self.ranks as f64 * self.efficiency
    }

    /// Returns the number of bytes that graphs of passes may take on a GPU, of the memory that the plan leaves. The
    /// tensors of a pass lie in memory of its graph. Those of a pass without one lie beside them, so that both need
    /// room.
    pub fn graph_bytes(&self) -> u64 {
        let bytes = self.growing() + GRAPHS;
        let has = self.residency == Residency::Resident
            && !self.keep.contains(&Keep::HostInputs)
            && Change::Steps.is_on();
        if has && self.bytes() + bytes <= self.memory { bytes } else { 0 }
    }

    pub(super) fn growing(&self) -> u64 {
        self.terms.iter().rev().take(GROWING).map(|term| term.bytes).sum()
    }
}
