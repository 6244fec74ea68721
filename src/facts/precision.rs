//! The arithmetic of matrix products.

/// The precision of matrix products. Sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As exact as f32: each product is right to 2^-23 or better, on every hardware unit.
    F32,
    /// Both operands are first rounded to bf16 (nearest even).
    Bf16,
    /// Operands of products with the frozen linear layers are first rounded to E4M3, with a scale for each row
    /// (`ops/fp8.rs`). All other products are as in `Bf16`.
    Fp8,
}

impl Precision {
    /// Returns the name in plans, reports and options of commands.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Fp8 => "fp8",
        }
    }

    /// Returns the precision of a name.
    pub fn named(name: &str) -> Option<Precision> {
        [Precision::F32, Precision::Bf16, Precision::Fp8]
            .into_iter()
            .find(|precision| precision.name() == name)
    }

    /// Returns the precision of all products but those with the frozen linear layers.
    pub fn beside(self) -> Precision {
        match self {
            Precision::F32 => Precision::F32,
            Precision::Bf16 | Precision::Fp8 => Precision::Bf16,
        }
    }
}
