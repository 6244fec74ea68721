//! A batch's positions, precision and adapter -> what every layer of one pass shares.
//! The same of a serving step, whose rows belong to many sequences.

use crate::facts::Precision;
use crate::ops::attention::Packing;
use crate::ops::attention::cached::Segment;
use crate::ops::rope::Angles;

use super::lora::Lora;

/// What every layer of a pass shares.
pub struct Pass<'a> {
    pub precision: Precision,
    /// Whether a row's bits must depend on that row alone: in serving, other rows belong to other callers.
    pub apart: bool,
    /// The adapter beside the frozen base.
    pub lora: Lora<'a>,
    /// The angles of each rope, with a row for each of the heads' runs (`Heads::turning`).
    pub angles: &'a [Angles],
    /// Rotations by no angle that lengthen the queries, row by row.
    pub growth: Option<&'a Angles>,
    pub packing: &'a Packing,
}

/// New rows of running sequences.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// `[T]` token ids.
    pub ids: Vec<u32>,
    /// The sequences' rows, one behind the other, together all of them.
    pub segments: Vec<Segment>,
    /// The length by which rope's scaling goes, one for each segment.
    pub rope_lengths: Vec<usize>,
    /// Rows whose logits are wanted, ascending.
    pub wanted: Vec<u32>,
}

impl Step {
    /// Adds rows of a sequence whose first one is at position `start`. Returns the number of the first row.
    pub fn push(&mut self, ids: &[u32], start: usize, pages: Vec<u32>, rope_length: usize) -> usize {
        let from = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.segments.push(Segment { rows: from..self.ids.len(), start, pages });
        self.rope_lengths.push(rope_length);
        from
    }

    /// Position of each row in its sequence, and the rope length that goes with it.
    pub fn positions(&self) -> (Vec<u32>, Vec<u32>) {
        let segments = || self.segments.iter().zip(&self.rope_lengths);
        let positions = segments().flat_map(|(s, _)| (s.start..s.start + s.rows.len()).map(|at| at as u32));
        let lengths = segments().flat_map(|(s, length)| std::iter::repeat_n(*length as u32, s.rows.len()));
        (positions.collect(), lengths.collect())
    }
}
