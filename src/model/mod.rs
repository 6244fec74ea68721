//! config.json + safetensors -> one decoder: frozen 4-bit base and LoRA, with forward and backward.

use std::path::PathBuf;

use crate::facts::{LoraOptions, Precision, Quantization};

pub mod batch;
pub mod decoder;
pub mod layer;
pub mod linear;
pub mod load;
pub mod lora;
pub mod norm;
pub mod random;
pub mod stored;
pub mod weights;

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
