//! Keys and values of running sequences, in pages that all layers share by number: a page holds so many tokens of one
//! sequence in every layer.

use candle_core::{DType, Device, Result};

use super::filled::SPARE_PAGES;
use super::pages::{Held, Key, Pool};
#[cfg(feature = "cuda")]
use super::replay::Replay;
use crate::facts::Facts;
use crate::ops::attention::cached::{PAGE, Store};

/// The pages of all layers, and the sequences that hold them.
pub struct Cache {
    pub(super) layers: Vec<Store>,
    pool: Pool,
    /// On a GPU, a page that no sequence has.
    #[cfg(feature = "cuda")]
    pub(super) spare: Option<u32>,
    /// Graphs of steps over these pages.
    #[cfg(feature = "cuda")]
    pub(super) replay: Option<Replay>,
}

impl Cache {
    /// Returns a cache for at least `tokens` tokens over all sequences. A sequence begins on a page of its own, or
    /// shares the beginning of its prompt in chunks of `chunk` tokens.
    pub fn new(facts: &Facts, tokens: usize, chunk: usize, dtype: DType, device: &Device) -> Result<Cache> {
        let pages = tokens.div_ceil(PAGE);
        let layers = facts.layers.iter();
        let all = pages + if device.is_cuda() { SPARE_PAGES } else { 0 };
        let layers = layers.map(|layer| Store::new(all, &layer.attention.heads, dtype, device));
        let layers = layers.collect::<Result<_>>()?;
        Ok(Cache {
            layers,
            pool: Pool::new(pages, chunk / PAGE),
            #[cfg(feature = "cuda")]
            spare: (all > pages).then_some(pages as u32),
            #[cfg(feature = "cuda")]
            replay: None,
        })
    }

    /// Returns the number of bytes of one token in all layers.
    pub fn token_bytes(facts: &Facts, dtype: DType) -> usize {
        facts.layers.iter().map(|layer| Store::token_bytes(&layer.attention.heads, dtype)).sum()
    }

    /// Returns pages for a sequence of so many tokens that begins with chunks of these keys; `None` if too few are
    /// free.
    pub fn reserve(&mut self, tokens: usize, keys: &[Key]) -> Option<Held> {
        self.pool.reserve(tokens.div_ceil(PAGE), keys)
    }

    /// Marks the next chunk of a sequence as computed, so that others may use it.
    pub fn share(&mut self, held: &mut Held, key: Key) {
        self.pool.share(held, key);
    }

    /// Gives a sequence's pages back.
    pub fn release(&mut self, held: Held) {
        self.pool.release(held);
    }

    /// Returns the graphs of steps over these pages, if there were such steps.
    #[cfg(feature = "cuda")]
    pub fn replay(&self) -> Option<&Replay> {
        self.replay.as_ref()
    }

    /// Returns the number of tokens that fit over all sequences.
    pub fn tokens(&self) -> usize {
        self.pool.pages() * PAGE
    }

    /// Returns the pages that sequences use, from 0 to 1.
    pub fn usage(&self) -> f64 {
        self.pool.usage()
    }
}
