//! Gemma 2: norms before and after each block, soft caps, a window on every other layer, scaled embeddings. Gemma 3
//! (text): normalised queries and keys instead of soft caps. Five of six layers have a window and a rope of their
//! own.

use crate::facts::Function;
use crate::facts::config::Config;
use crate::facts::rope::{Dialect, Rope};
use crate::facts::{EmbeddingScale, Facts, HeadNorm, Names, NormForm, Over};
use crate::fault::Result;

use super::reading;
use super::split::{self, Biases, Defaults};

const NAMES: Names = Names {
    attention_post_norm: Some("post_attention_layernorm"),
    feed_forward_norm: Some("pre_feedforward_layernorm"),
    feed_forward_post_norm: Some("post_feedforward_layernorm"),
    ..Names::LLAMA
};

/// transformers' default if the key is missing; null means no window.
const WINDOW: Option<usize> = Some(4096);

/// Reads the facts of a Gemma 2 model.
pub fn gemma2(config: &Config) -> Result<Facts> {
    let mut facts = shared(config, "gemma2", 10_000.0, 8192)?;
    let softcap = config.number_unless_null("attn_logit_softcapping", 50.0)?;
    reading::every_attention(&mut facts, |attention| attention.heads.softcap = softcap);
    facts.logits_softcap = config.number_unless_null("final_logit_softcapping", 30.0)?;
    let sliding = reading::sliding_layers(config, facts.layers.len(), |layer| layer % 2 == 0)?;
    reading::set_windows(&mut facts, reading::window_or(config, WINDOW)?, &sliding);
    Ok(facts)
}

/// Reads the facts of a Gemma 3 text model.
pub fn gemma3(config: &Config) -> Result<Facts> {
    // transformers reads no soft cap for Gemma 3's attention, although its config has the key.
    let mut facts = shared(config, "gemma3_text", 1_000_000.0, 131_072)?;
    facts.logits_softcap = config.number_or_none("final_logit_softcapping")?;
    let norm = HeadNorm { query: "self_attn.q_norm", key: "self_attn.k_norm", over: Over::Head };
    reading::every_attention(&mut facts, |attention| attention.head_norm = Some(norm));
    let pattern = config.integer_or_none("sliding_window_pattern")?.unwrap_or(6);
    let sliding = reading::sliding_layers(config, facts.layers.len(), |layer| (layer + 1) % pattern != 0)?;
    reading::set_windows(&mut facts, reading::window_or(config, WINDOW)?, &sliding);
    facts.ropes.push(Rope::read_sliding(config, facts.heads().width, &Dialect::PLAIN)?);
    for (layer, &sliding) in facts.layers.iter_mut().zip(&sliding) {
        layer.attention.rope = Some(usize::from(sliding));
    }
    Ok(facts)
}

fn shared(config: &Config, family: &'static str, theta: f64, positions: usize) -> Result<Facts> {
    if config.flag("use_bidirectional_attention")? {
        return Err(config.refuse("use_bidirectional_attention", "false"));
    }
    let defaults = Defaults {
        theta,
        positions,
        head_dim: Some(256),
        tied_head: true,
        activation: Function::GeluTanh,
        activation_key: "hidden_activation",
        ..Defaults::of(family, Biases::attention(config)?)
    };
    let mut facts = split::facts(config, &defaults)?;
    let scale = config.number_or_none("query_pre_attn_scalar")?.unwrap_or(256.0).sqrt().recip();
    reading::every_attention(&mut facts, |attention| attention.heads.scale = scale);
    facts.norm.form = NormForm::RmsPlusOne;
    facts.embedding_scale = EmbeddingScale { factor: (facts.width as f64).sqrt(), rounded: true };
    facts.names = NAMES;
    Ok(facts)
}
