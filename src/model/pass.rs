//! The inputs that all layers of one pass share: positions, precision and adapter of a batch. A serving step has
//! its own form, because its rows belong to many sequences.

use crate::facts::Precision;
use crate::ops::attention::Packing;
use crate::ops::attention::cached::Segment;
use crate::ops::rope::Angles;

use super::lora::Lora;

/// The inputs that all layers of a pass share.
pub struct Pass<'a> {
    /// The precision of matrix products on a CPU, except those with the frozen linear layers.
    pub precision: Precision,
    /// The precision of products with the frozen linear layers, forward and backward. Serving's rows are multiplied
    /// in `precision`.
    pub frozen: Precision,
    /// Whether a row's bits must depend on that row alone. In serving, other rows belong to other callers.
    pub apart: bool,
    /// In serving, the first rows that belong to short segments (`Step::short`); a CPU multiplies them in a way of
    /// their own.
    pub short: usize,
    /// The adapters added to the frozen base.
    pub lora: Lora<'a>,
    /// The angles of each rope, with one row for each of the heads' runs (`Heads::turning`).
    pub angles: &'a [Angles],
    /// Factors on the queries, row by row, as rotations by angle zero that change the length.
    pub growth: Option<&'a Angles>,
    /// The rows of each example.
    pub packing: &'a Packing,
}

/// New rows of running sequences.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// The sequences' rows, one after the other; together they cover all rows.
    pub segments: Vec<Segment>,
    /// The length that decides rope's scaling, one per segment.
    pub rope_lengths: Vec<usize>,
    /// Rows whose logits are wanted, ascending.
    pub wanted: Vec<u32>,
}

/// Rows up to which a segment is short. The way in which a row's products are computed depends on its own segment
/// alone, never on the number of rows in a step. Measured: at 8 rows of one segment both ways take about as long.
pub const SHORT_ROWS: usize = 8;

impl Step {
    /// Returns the number of rows of short segments, which come first.
    pub fn short(&self) -> usize {
        let is_short = |segment: &&Segment| segment.rows.len() <= SHORT_ROWS;
        let short = self.segments.iter().take_while(is_short).count();
        assert!(
            !self.segments[short..].iter().any(|segment| is_short(&segment)),
            "short segments come first"
        );
        self.segments[..short].last().map_or(0, |segment| segment.rows.end)
    }

    /// Adds rows of a sequence whose first row is at position `start`. Returns the index of the first row.
    pub fn push(&mut self, ids: &[u32], start: usize, pages: Vec<u32>, rope_length: usize) -> usize {
        let from = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.segments.push(Segment { rows: from..self.ids.len(), start, pages });
        self.rope_lengths.push(rope_length);
        from
    }

    /// Returns whether each segment has one row, the logits of which are wanted.
    pub fn is_decoding(&self) -> bool {
        self.segments.iter().all(|segment| segment.rows.len() == 1)
            && self.wanted.iter().copied().eq(0..self.ids.len() as u32)
    }

    /// Returns the step with more segments of one row, up to `rows` rows. Their keys and values go to a page that no
    /// sequence has.
    pub fn filled_up(&self, rows: usize, page: u32) -> Step {
        let mut step = self.clone();
        let rope_length = self.rope_lengths.last().copied().unwrap_or(1);
        for token in 0..rows - self.ids.len() {
            let row = step.push(&[0], token, vec![page], rope_length);
            step.wanted.push(row as u32);
        }
        step
    }

    /// Returns (position in its sequence, rope length) of each row, as two lists.
    pub fn positions(&self) -> (Vec<u32>, Vec<u32>) {
        let segments = || self.segments.iter().zip(&self.rope_lengths);
        let positions = segments().flat_map(|(s, _)| (s.start..s.start + s.rows.len()).map(|at| at as u32));
        let lengths = segments().flat_map(|(s, length)| std::iter::repeat_n(*length as u32, s.rows.len()));
        (positions.collect(), lengths.collect())
    }
}
