//! The feed-forward's activation function.

/// The activation between the two matrix products of a feed-forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activation {
    /// The function that is applied to each element.
    pub function: Function,
    /// Whether the input is [T, 2F] (the gate's columns, then the up columns) and the output is `function(gate) *
    /// up`. If not, the input is [T, F].
    pub gated: bool,
}

/// A scalar activation function, as transformers defines it.
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
    /// Returns the number of output columns (F) for an input of `columns`.
    pub fn width(&self, columns: usize) -> usize {
        if self.gated { columns / 2 } else { columns }
    }
}
