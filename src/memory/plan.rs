//! How a run uses its memory: levels, tokens per pass, and everything that takes bytes.

use super::terms::Term;
use crate::facts::Keep;

/// How a run uses its memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The level of each layer.
    pub keep: Vec<Keep>,
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
}

/// Lines of the table that grow with the tokens of a pass: kept by the layers, one layer at work, gaps between
/// blocks.
pub(super) const GROWING: usize = 3;

impl Plan {
    /// Bytes of all terms.
    pub fn bytes(&self) -> u64 {
        self.terms.iter().map(|term| term.bytes).sum()
    }

    /// Predicted tokens per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    pub(super) fn growing(&self) -> u64 {
        self.terms.iter().rev().take(GROWING).map(|term| term.bytes).sum()
    }
}
