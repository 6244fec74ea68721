//! config.json + safetensors -> one frozen decoder, and adapters that a pass lays beside it; forward and backward.

use std::path::PathBuf;

pub mod adapter;
pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod facts;
pub mod family;
pub mod feed_forward;
pub mod layer;
pub mod linear;
pub mod load;
pub mod lora;
pub mod norm;
pub mod pass;
pub mod presets;
pub mod random;
pub mod rope;
pub mod self_attention;
pub mod shapes;
pub mod stored;

#[cfg(test)]
mod judge;

/// What to load and how to quantise it. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pub folder: PathBuf,
    pub quantization: Quantization,
    pub lora: LoraOptions,
    pub precision: Precision,
}

/// How the base's linear layers are held (bitsandbytes' formats; block 64 where they are quantised here).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    None,
    FourBit {
        code: FourBitCode,
        double: bool,
    },
    /// The checkpoint was quantised by bitsandbytes; its weights are taken as they are.
    Stored {
        code: FourBitCode,
        double: bool,
    },
}

pub use crate::ops::four_bit::Code as FourBitCode;
pub use crate::ops::matmul::Precision;

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

/// PEFT's LoraConfig, the part that means something here.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    pub r: usize,
    pub alpha: f64,
    pub dropout: f64,
    /// Scale by alpha/sqrt(r) instead of alpha/r.
    pub rslora: bool,
    pub targets: Targets,
    pub matching: Matching,
    /// `exclude_modules`: never adapted.
    pub exclude: Modules,
    /// `layers_to_transform`: empty means all.
    pub layers: Vec<usize>,
    /// `layers_pattern`: names of the list that the layers' numbers stand in; empty means any.
    pub layers_pattern: Vec<String>,
    /// `rank_pattern`, `alpha_pattern`: regex on the module path -> value, first match wins.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    /// `init_lora_weights`: true = Kaiming-uniform A and zero B; "gaussian" = normal A with deviation 1/r.
    pub init: LoraInit,
    pub seed: u64,
}

impl Default for LoraOptions {
    /// KAITO's defaults, on all linear layers.
    fn default() -> LoraOptions {
        LoraOptions {
            r: 8,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            targets: Targets::AllLinear,
            matching: Matching::Fused,
            exclude: Modules::Names(Vec::new()),
            layers: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            init: LoraInit::Kaiming,
            seed: 42,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraInit {
    Kaiming,
    Gaussian,
}

/// PEFT's `target_modules`.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Every linear layer except the output head.
    AllLinear,
    Modules(Modules),
}

impl Targets {
    /// `all-linear`, names with commas between, or else an expression.
    pub fn written(text: &str) -> Targets {
        let names: Vec<&str> = text.split(',').map(str::trim).collect();
        match text {
            _ if text.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            _ if names.iter().all(|name| Modules::is_name(name)) => Targets::names(names),
            _ => Targets::Modules(Modules::Pattern(text.to_owned())),
        }
    }

    pub fn names(names: impl IntoIterator<Item = impl Into<String>>) -> Targets {
        Targets::Modules(Modules::Names(names.into_iter().map(Into::into).collect()))
    }
}

/// PEFT's two ways to name modules.
#[derive(Clone, Debug, PartialEq)]
pub enum Modules {
    /// Equal to the path, or a suffix of it after a dot.
    Names(Vec<String>),
    /// A regular expression that the whole path must match (PEFT: a plain string).
    Pattern(String),
}

impl Modules {
    /// Whether a text can only be a name, which as an expression would match no whole path.
    pub fn is_name(text: &str) -> bool {
        let part_of_a_name = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
        !text.is_empty() && text.chars().all(part_of_a_name)
    }
}

/// What a name means that is only a part of a module of this model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matching {
    /// `q_proj` of a model with `qkv_proj` is that module.
    Fused,
    /// It is nothing, as in PEFT: KAITO's names adapt only o_proj and down_proj of Phi-3.
    Literal,
}
