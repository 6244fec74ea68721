//! The arithmetic of matrix products.

/// How exact the products are; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As exact as f32: products are right to 2^-23 or better, whatever units compute them.
    F32,
    /// Both operands are rounded to bf16 (nearest even) first.
    Bf16,
}
