//! config.json -> the facts of a model, in plain values: no tensor, no device, no weight.
//!
//! `family` reads a configuration into [`Facts`]. Modules that need only a model's shape (the memory plan, `hone
//! model`, the controller) use nothing below this module.

pub mod activation;
pub mod config;
pub mod decoder;
pub mod family;
pub mod heads;
pub mod keep;
pub mod lora;
pub mod precision;
pub mod presets;
pub mod quantization;
pub mod residency;
pub mod rope;
pub mod shapes;
pub mod sites;

pub use activation::{Activation, Function};
pub use decoder::{
    Attention, Dense, EmbeddingScale, Facts, FeedForward, HeadNorm, LayerFacts, Names, NormForm, NormKind,
    Over, Projection, QueryGrowth, Role, Stored,
};
pub use heads::{Heads, Layout};
pub use keep::Keep;
pub use lora::{LoraInit, LoraOptions, Matching, Modules, RANK_MAX, Targets, Tokens};
pub use precision::Precision;
pub use quantization::{Code as FourBitCode, Quantization};
pub use residency::Residency;
