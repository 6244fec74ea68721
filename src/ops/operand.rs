//! Operands of a product on the CPU: a slice, bf16 values or a 4-bit weight as it is stored -> a matrix of `ops/gemm`.

use half::bf16;

use super::gemm::{self, Matrix};
use crate::facts::Precision;

/// A matrix inside a slice: element (i, j) is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    /// The slice.
    pub data: &'a [T],
    /// Distance between rows, in elements.
    pub row: usize,
    /// Distance between columns, in elements.
    pub col: usize,
}

impl<'a, T> View<'a, T> {
    /// Returns a matrix whose rows are contiguous and lie `row` elements apart.
    pub fn rows(data: &'a [T], row: usize) -> View<'a, T> {
        View { data, row, col: 1 }
    }

    /// Returns the transpose of this view.
    pub fn transposed(self) -> View<'a, T> {
        View { data: self.data, row: self.col, col: self.row }
    }
}

/// A matrix in its stored form.
#[derive(Clone, Copy)]
pub enum Operand<'a, T> {
    /// Values of the type that the product computes in.
    View(View<'a, T>),
    /// Values in bf16.
    Bf16(View<'a, bf16>),
    /// A 4-bit weight.
    FourBit {
        /// The weight. If its scales are nested, it has none of its own.
        weight: gemm::FourBitView<'a>,
        /// Scales that were quantised, too; only products of few rows read them so.
        nested: Option<gemm::Nested<'a>>,
        /// Whether the operand is W^T [K, N].
        transposed: bool,
    },
}

impl<'a> View<'a, f32> {
    /// Returns the view as a matrix [rows, cols].
    pub fn matrix(self, rows: usize, cols: usize) -> Matrix<'a> {
        Matrix::F32 { data: self.data, rows, cols, row_stride: self.row, col_stride: self.col }
    }
}

impl<'a> Operand<'a, f32> {
    /// Returns a weight with rows of `depth` values, for a product of few rows.
    pub fn of_few(&self, depth: usize, precision: Precision) -> gemm::Weight<'a> {
        let rows = match self {
            Operand::View(view) => view.data.len() / view.row.max(1),
            Operand::Bf16(view) => view.data.len() / view.row.max(1),
            Operand::FourBit { weight, .. } => weight.rows,
        };
        let nested = match *self {
            Operand::FourBit { nested, .. } => nested,
            _ => None,
        };
        gemm::Weight { matrix: self.matrix(rows, depth, precision), nested }
    }

    /// Rounds dequantised values as the reference does: not at all in f32, to bf16 in bf16.
    pub fn matrix(self, rows: usize, cols: usize, precision: Precision) -> Matrix<'a> {
        match self {
            Operand::View(view) => view.matrix(rows, cols),
            Operand::Bf16(View { data, row, col }) => {
                Matrix::Bf16 { data, rows, cols, row_stride: row, col_stride: col }
            }
            Operand::FourBit { weight, transposed, .. } => {
                let rounding = match precision {
                    Precision::F32 => gemm::Rounding::None,
                    Precision::Bf16 | Precision::Fp8 => gemm::Rounding::Bf16,
                };
                let weight = gemm::FourBitView { rounding, ..weight };
                Matrix::FourBit { weight, transposed }
            }
        }
    }
}
