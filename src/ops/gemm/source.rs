//! An operand as the packers see it: lanes (rows of `a`, columns of `b`) by depth (`k`), read in runs.

use super::{FourBitView, Matrix, Rounding};
use crate::facts::Precision;
use half::bf16;

/// The operand that a panel belongs to; the two have different layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The left operand, `a`.
    A,
    /// The right operand, `b`.
    B,
}

/// An operand as runs of elements. A run is read along the direction that is contiguous in memory, if there is one.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The elements.
    pub elements: Elements<'a>,
    /// Whether a run follows the depth of one lane. If not, it crosses the lanes at one depth.
    pub along_depth: bool,
}

/// The elements of an operand in their stored form.
#[derive(Clone, Copy)]
pub enum Elements<'a> {
    /// f32; runs lie `run_stride` apart and the elements of a run `stride` apart.
    F32 { data: &'a [f32], run_stride: usize, stride: usize },
    /// bf16; runs lie `run_stride` apart and the elements of a run `stride` apart.
    Bf16 { data: &'a [bf16], run_stride: usize, stride: usize },
    /// A 4-bit weight, whose runs are its rows.
    FourBit(FourBitView<'a>),
}

impl<'a> Source<'a> {
    /// Describes a matrix as an operand on this side of a product.
    pub fn new(matrix: &Matrix<'a>, side: Side) -> Self {
        // Runs go along rows of the matrix if its columns are adjacent. Rows of `a` are lanes, rows of `b` are
        // depths.
        let (elements, along_rows) = match *matrix {
            Matrix::F32 { data, row_stride, col_stride, rows, .. } => {
                let along_rows = col_stride == 1 || (row_stride != 1 && rows != 1);
                let (run_stride, stride) =
                    if along_rows { (row_stride, col_stride) } else { (col_stride, row_stride) };
                (Elements::F32 { data, run_stride, stride }, along_rows)
            }
            Matrix::Bf16 { data, row_stride, col_stride, rows, .. } => {
                let along_rows = col_stride == 1 || (row_stride != 1 && rows != 1);
                let (run_stride, stride) =
                    if along_rows { (row_stride, col_stride) } else { (col_stride, row_stride) };
                (Elements::Bf16 { data, run_stride, stride }, along_rows)
            }
            Matrix::FourBit { weight, transposed } => (Elements::FourBit(weight), !transposed),
        };
        Source { elements, along_depth: along_rows == (side == Side::A) }
    }

    /// Returns the number of bf16 summands that represent an element exactly.
    pub fn planes(&self, precision: Precision) -> usize {
        match (precision, self.elements) {
            (Precision::Bf16, _) | (_, Elements::Bf16 { .. }) => 1,
            (_, Elements::F32 { .. }) => 3,
            (_, Elements::FourBit(weight)) => match weight.rounding {
                Rounding::Bf16 => 1,
                Rounding::F16 => 2,
                Rounding::None => 3,
            },
        }
    }

    /// Reads the elements `start..start + out.len()` of a run as f32.
    pub fn read(&self, run: usize, start: usize, out: &mut [f32]) {
        match self.elements {
            Elements::F32 { data, run_stride, stride } => {
                let data = &data[run * run_stride + start * stride..];
                if stride == 1 {
                    out.copy_from_slice(&data[..out.len()]);
                } else {
                    out.iter_mut().zip(data.iter().step_by(stride.max(1))).for_each(|(out, &x)| *out = x);
                }
            }
            Elements::Bf16 { data, run_stride, stride } => {
                let data = &data[run * run_stride + start * stride..];
                out.iter_mut().zip(data.iter().step_by(stride.max(1))).for_each(|(out, x)| *out = x.to_f32());
            }
            Elements::FourBit(weight) => weight.read(run * weight.cols + start, out),
        }
    }
}
