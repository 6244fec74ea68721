//! config.json + safetensors -> one decoder: frozen 4-bit base and LoRA, with forward and backward.

use std::path::PathBuf;

/// What to load and how to quantise it. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pub folder: PathBuf,
    pub quantization: Quantization,
    pub lora: LoraOptions,
    pub precision: Precision,
    /// What each layer keeps between forward and backward.
    pub keep: Keep,
}

/// How the base's linear layers are stored (bitsandbytes' formats, block 64).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    None,
    FourBit { code: FourBitCode, double: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitCode {
    Nf4,
    Fp4,
}

/// Rounding of matrix products' inputs; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Everything,
    /// Only each layer's input; the rest is computed again in the backward pass.
    LayerInputs,
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
    /// `exclude_modules`: names or suffixes never adapted.
    pub exclude: Vec<String>,
    /// `layers_to_transform`: empty means all.
    pub layers: Vec<usize>,
    /// `rank_pattern`, `alpha_pattern`: regex on the module path -> value, first match wins.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    /// `init_lora_weights`: true = Kaiming-uniform A and zero B; "gaussian" = normal A with deviation 1/r.
    pub init: LoraInit,
    pub seed: u64,
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
    /// Module names: equal to the path, or a suffix after a dot.
    Names(Vec<String>),
    /// A regular expression that the whole path must match (PEFT: a plain string).
    Pattern(String),
}
