//! The feed-forward's activation function.

/// What a feed-forward does between its two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activation {
    pub function: Function,
    /// The input is [T, 2F], gate then up; else [T, F].
    pub gated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// `x * sigmoid(x)`
    Silu,
    /// `x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`
    GeluTanh,
    /// `x/2 * (1 + erf(x / sqrt(2)))`
    GeluErf,
}

impl Activation {
    /// Columns of the output (F) for an input of `columns`.
    pub fn width(&self, columns: usize) -> usize {
        if self.gated { columns / 2 } else { columns }
    }
}
