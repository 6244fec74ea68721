//! Granite 3: Llama's shape with factors on the embeddings, the attention scores, the blocks' outputs, and the
//! logits.

use crate::facts::config::Config;
use crate::facts::{EmbeddingScale, Facts};
use crate::fault::Result;

use super::reading;
use super::split::{self, Biases, Defaults};

/// Reads the facts of a Granite model.
pub fn facts(config: &Config) -> Result<Facts> {
    let defaults = Defaults { positions: 2048, ..Defaults::of("granite", Biases::both(config)?) };
    let mut facts = split::facts(config, &defaults)?;
    let scale = factor(config, "attention_multiplier")?;
    reading::every_attention(&mut facts, |attention| attention.heads.scale = scale);
    facts.embedding_scale =
        EmbeddingScale { factor: factor(config, "embedding_multiplier")?, rounded: false };
    facts.residual_scale = factor(config, "residual_multiplier")?;
    facts.logits_scale = factor(config, "logits_scaling")?.recip();
    Ok(facts)
}

fn factor(config: &Config, key: &str) -> Result<f64> {
    match config.number_or_none(key)?.unwrap_or(1.0) {
        factor if factor > 0.0 => Ok(factor),
        _ => Err(config.refuse(key, "a number above 0")),
    }
}
