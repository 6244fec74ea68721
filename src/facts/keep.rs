//! `Keep`: how much of its intermediate results a layer keeps for the backward pass.

/// The results that a layer keeps between forward and backward, from the most memory to the least. The backward
/// pass computes the others again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// All intermediate results.
    Everything,
    /// All but the widest, gate and up.
    WithoutGateUp,
    /// The layer's input, attention's output and logsumexp, and the residual stream after attention. Attention is
    /// not computed again.
    AttentionOutput,
    /// The layer's input only.
    LayerInputs,
    /// The layer's input only, in host memory.
    HostInputs,
}

impl Keep {
    /// All levels, from the most memory to the least.
    pub const ALL: [Keep; 5] =
        [Keep::Everything, Keep::WithoutGateUp, Keep::AttentionOutput, Keep::LayerInputs, Keep::HostInputs];

    /// Returns the name that the key `keep` and printed tables use.
    pub fn name(self) -> &'static str {
        match self {
            Keep::Everything => "everything",
            Keep::WithoutGateUp => "without-gate-up",
            Keep::AttentionOutput => "attention-output",
            Keep::LayerInputs => "layer-inputs",
            Keep::HostInputs => "host-inputs",
        }
    }

    /// Returns the level of that name.
    pub fn named(name: &str) -> Option<Keep> {
        Keep::ALL.into_iter().find(|keep| keep.name() == name)
    }
}
