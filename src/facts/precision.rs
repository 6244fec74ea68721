//! The arithmetic of matrix products.

/// How exact matrix products are. Sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As exact as f32: each product is right to 2^-23 or better, whatever hardware unit computes it.
    F32,
    /// Both operands are first rounded to bf16 (nearest even).
    Bf16,
}
