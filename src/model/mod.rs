//! config.json + safetensors -> one frozen decoder, with adapters that a pass adds to it; forward and backward.

use std::path::PathBuf;

use crate::facts::{LoraOptions, Precision, Quantization};

pub mod batch;
pub mod cache;
#[cfg(feature = "cuda")]
pub mod decode;
pub mod decoder;
pub mod dora;
pub mod feed_forward;
pub mod filled;
pub mod fingerprint;
mod handover;
pub mod inside;
pub mod layer;
pub mod linear;
pub mod load;
pub mod lora;
#[cfg(feature = "cuda")]
mod made;
pub mod norm;
pub mod operand;
pub mod pages;
pub mod pass;
pub mod random;
pub mod recorded;
#[cfg(feature = "cuda")]
pub mod replay;
pub mod residency;
pub mod self_attention;
pub mod shape;
pub mod stored;
pub mod tokens;
pub mod weights;

#[cfg(test)]
mod judge;
#[cfg(all(test, feature = "cuda"))]
mod judge_on_gpu;

/// The settings of loading: the model and its quantisation. `plan` fills them.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The model folder.
    pub folder: PathBuf,
    /// The storage of the base's linear layers.
    pub quantization: Quantization,
    /// The adapter.
    pub lora: LoraOptions,
    /// The precision of matrix products.
    pub precision: Precision,
}
