//! OLMo 2: Llama's shape with norms after attention and feed-forward instead of before them. Queries and keys are
//! normalised over their whole width.

use crate::facts::config::Config;
use crate::facts::{Facts, HeadNorm, Names, Over};
use crate::fault::Result;

use super::reading;
use super::split::{self, Biases, Defaults};

/// Reads the facts of an OLMo 2 model.
pub fn facts(config: &Config) -> Result<Facts> {
    let biases = Biases::attention(config)?;
    let defaults = Defaults { eps: 1e-5, positions: 2048, ..Defaults::of("olmo2", biases) };
    let mut facts = split::facts(config, &defaults)?;
    let norm = HeadNorm { query: "self_attn.q_norm", key: "self_attn.k_norm", over: Over::Projection };
    reading::every_attention(&mut facts, |attention| attention.head_norm = Some(norm));
    facts.names = Names {
        attention_norm: None,
        attention_post_norm: Some("post_attention_layernorm"),
        feed_forward_norm: None,
        feed_forward_post_norm: Some("post_feedforward_layernorm"),
        ..Names::LLAMA
    };
    Ok(facts)
}
