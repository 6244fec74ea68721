//! How much of its intermediate results a layer keeps for the backward pass.

/// What a layer keeps between forward and backward, from the most memory to the least; the rest is computed again
/// in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    Everything,
    /// Not the widest: gate and up.
    WithoutGateUp,
    /// Input, attention's output and logsumexp, the residual stream after it: attention is not run again.
    AttentionOutput,
    /// Only the layer's input.
    LayerInputs,
    /// The layer's input, in the host's memory.
    HostInputs,
}

impl Keep {
    pub const ALL: [Keep; 5] =
        [Keep::Everything, Keep::WithoutGateUp, Keep::AttentionOutput, Keep::LayerInputs, Keep::HostInputs];

    /// As the key `keep` and tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Keep::Everything => "everything",
            Keep::WithoutGateUp => "without-gate-up",
            Keep::AttentionOutput => "attention-output",
            Keep::LayerInputs => "layer-inputs",
            Keep::HostInputs => "host-inputs",
        }
    }

    pub fn named(name: &str) -> Option<Keep> {
        Keep::ALL.into_iter().find(|keep| keep.name() == name)
    }
}
