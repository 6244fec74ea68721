//! Keys and values of running sequences, in pages that all layers share by number: a page holds so many tokens of one
//! sequence in every layer.

use candle_core::{DType, Device, Result};

use crate::facts::Facts;
use crate::ops::attention::cached::{PAGE, Store};

/// The pages of all layers, and which of them are free.
pub struct Cache {
    pub(super) layers: Vec<Store>,
    free: Vec<u32>,
    pages: usize,
}

impl Cache {
    /// Room for at least so many tokens over all sequences, each of which begins on a page of its own.
    pub fn new(facts: &Facts, tokens: usize, dtype: DType, device: &Device) -> Result<Cache> {
        let pages = tokens.div_ceil(PAGE);
        let layers = facts.layers.iter();
        let layers = layers.map(|layer| Store::new(pages, &layer.attention.heads, dtype, device));
        let layers = layers.collect::<Result<_>>()?;
        Ok(Cache { layers, free: (0..pages as u32).rev().collect(), pages })
    }

    /// Bytes of one token in all layers.
    pub fn token_bytes(facts: &Facts, dtype: DType) -> usize {
        facts.layers.iter().map(|layer| Store::token_bytes(&layer.attention.heads, dtype)).sum()
    }

    /// Pages for a sequence of so many tokens; `None` if too few are free.
    pub fn reserve(&mut self, tokens: usize) -> Option<Vec<u32>> {
        let left = self.free.len().checked_sub(tokens.div_ceil(PAGE))?;
        Some(self.free.split_off(left))
    }

    /// Gives a sequence's pages back.
    pub fn release(&mut self, pages: Vec<u32>) {
        self.free.extend(pages);
    }

    /// Tokens that fit over all sequences.
    pub fn tokens(&self) -> usize {
        self.pages * PAGE
    }

    /// Pages in use, from 0 to 1.
    pub fn usage(&self) -> f64 {
        1.0 - self.free.len() as f64 / self.pages.max(1) as f64
    }
}
