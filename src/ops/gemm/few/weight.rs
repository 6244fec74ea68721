//! A weight that a product of few rows reads as it is stored, and its scales.

use std::ops::Range;

use crate::facts::Precision;
use crate::ops::gemm::{FourBitView, Matrix, Rounding};

/// A weight [n, depth].
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    /// The values. If the scales are nested, it has none of its own.
    pub matrix: Matrix<'a>,
    /// Scales that were quantised, too.
    pub nested: Option<Nested<'a>>,
}

/// Scales that were quantised: `map[code] * absmax + offset`.
#[derive(Clone, Copy)]
pub struct Nested<'a> {
    /// The code of each scale.
    pub codes: &'a [u8],
    /// The scale of each `block` codes.
    pub absmax: &'a [f32],
    /// Codes that share a scale.
    pub block: usize,
    /// The values of the codes.
    pub map: &'a [f32; 256],
    /// Added to all.
    pub offset: f32,
}

impl Nested<'_> {
    /// Writes the scales of some blocks.
    pub(super) fn read(&self, blocks: Range<usize>, out: &mut Vec<f32>) {
        out.clear();
        let mut at = blocks.start;
        while at < blocks.end {
            let end = blocks.end.min((at / self.block + 1) * self.block);
            let absmax = self.absmax[at / self.block];
            let scale = |code: &u8| self.map[usize::from(*code)] * absmax + self.offset;
            out.extend(self.codes[at..end].iter().map(scale));
            at = end;
        }
    }
}

impl Weight<'_> {
    pub(super) fn check(&self, depth: usize, precision: Precision) {
        if let (Matrix::FourBit { weight, .. }, Precision::Bf16) = (self.matrix, precision) {
            assert_eq!(weight.rounding, Rounding::Bf16, "products of bf16 have weights in bf16");
        }
        assert_eq!(self.matrix.shape().1, depth, "a weight's columns");
        assert!(is_along_rows(&self.matrix), "a weight's rows lie in order");
        match (self.matrix, self.nested) {
            (Matrix::FourBit { weight, .. }, Some(nested)) => {
                let blocks = (weight.rows * depth).div_ceil(weight.block);
                assert!(nested.codes.len() >= blocks, "{} codes for {blocks} blocks", nested.codes.len());
                assert!(nested.absmax.len() >= blocks.div_ceil(nested.block), "scales of scales");
                assert!(weight.packed.len() * 2 >= weight.rows * depth && weight.block.is_power_of_two());
            }
            (matrix, _) => matrix.check(),
        }
    }
}

/// Returns whether registers of this width read a weight as 4-bit values.
pub(super) fn is_four_bit(weight: &Weight, width: usize) -> bool {
    matches!(&weight.matrix, Matrix::FourBit { weight, .. } if fits(weight, width))
}

/// Returns whether a row's elements are neighbours.
fn is_along_rows(weight: &Matrix) -> bool {
    match *weight {
        Matrix::F32 { col_stride, .. } | Matrix::Bf16 { col_stride, .. } => col_stride == 1,
        Matrix::FourBit { transposed, .. } => !transposed,
    }
}

/// Returns whether every register of a 4-bit weight lies in one row and one block, whose number is a shift away.
pub(super) fn fits(weight: &FourBitView, width: usize) -> bool {
    let block = weight.block;
    weight.cols.is_multiple_of(2 * width) && block.is_multiple_of(2 * width) && block.is_power_of_two()
}
