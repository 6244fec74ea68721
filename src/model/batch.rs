//! Batch: examples laid one after the other in rows, with the positions that keep them apart.

use std::ops::Range;

use crate::ops::attention::Packing;

/// Tokens of one or more examples, T rows in all. No row is padding, except those that `shape` adds on a GPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// The rows of each example, in order.
    pub examples: Vec<Span>,
    /// Dropout keys, `[T]`. A key identifies a token in any batch; dropout's mask follows it.
    pub keys: Vec<u64>,
    /// Rows whose next token is a target, ascending.
    pub target_rows: Vec<u32>,
    /// The target of each of `target_rows`.
    pub targets: Vec<u32>,
    /// Share of each target that goes to all tokens alike.
    pub label_smoothing: f64,
    /// NEFTune's alpha: the size of the noise on embeddings; 0: none.
    pub noise: f64,
    /// Examples that a GPU's lists have room for; 0: for these examples alone.
    pub room: usize,
}

/// The rows of one example.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The rows.
    pub rows: Range<usize>,
    /// The length that decides rope's scaling: the longest example of the micro-batch that this one belongs to.
    /// This equals the length of a padded batch in transformers, so packing does not change the result.
    pub rope_length: usize,
}

impl Batch {
    /// Returns the number of rows (T).
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Adds an example. `supervised[i]` says whether token i is a target; token 0 never is.
    pub fn push(&mut self, ids: &[u32], supervised: &[bool], rope_length: usize, key: u64) {
        assert_eq!(ids.len(), supervised.len(), "one flag a token");
        let from = self.ids.len();
        for (i, &next) in ids.iter().enumerate().skip(1) {
            if supervised[i] {
                self.target_rows.push((from + i - 1) as u32);
                self.targets.push(next);
            }
        }
        self.ids.extend_from_slice(ids);
        self.keys.extend((0..ids.len() as u64).map(|i| crate::ops::dropout::mix(key.wrapping_add(i))));
        self.examples.push(Span { rows: from..from + ids.len(), rope_length });
    }

    /// Returns (position in its example, rope length) of each row, as two lists.
    pub fn positions(&self) -> (Vec<u32>, Vec<u32>) {
        let rows = || self.examples.iter().flat_map(|span| span.rows.clone().map(move |row| (span, row)));
        let position = rows().map(|(span, row)| (row - span.rows.start) as u32).collect();
        (position, rows().map(|(span, _)| span.rope_length as u32).collect())
    }

    /// Returns the rows of each example.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        self.examples.iter().map(|span| span.rows.clone()).collect()
    }

    /// Returns the rows of each example as a `Packing` for attention; all layers use one.
    pub fn packing(&self) -> Packing {
        let packing = Packing::new(self.ranges());
        if self.room > 0 { packing.with_room_for(self.room) } else { packing }
    }
}
