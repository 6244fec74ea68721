//! A batch's positions, precision and adapter -> what every layer of one pass shares.

use crate::facts::Precision;
use crate::ops::attention::Packing;
use crate::ops::rope::Angles;

use super::lora::Lora;

/// What every layer of a pass shares.
pub struct Pass<'a> {
    pub precision: Precision,
    /// The adapter beside the frozen base.
    pub lora: Lora<'a>,
    /// The angles of each rope, with a row for each of the heads' runs (`Heads::turning`).
    pub angles: &'a [Angles],
    /// Rotations by no angle that lengthen the queries, row by row.
    pub growth: Option<&'a Angles>,
    pub packing: &'a Packing,
}
