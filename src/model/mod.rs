//! config.json + safetensors -> one frozen decoder, and adapters that a pass lays beside it; forward and backward.

use std::path::PathBuf;

use crate::facts::{LoraOptions, Precision, Quantization};

pub mod batch;
pub mod cache;
pub mod decoder;
pub mod feed_forward;
pub mod layer;
pub mod linear;
pub mod load;
pub mod lora;
pub mod norm;
pub mod pages;
pub mod pass;
pub mod random;
pub mod self_attention;
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
