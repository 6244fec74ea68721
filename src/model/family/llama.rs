//! Llama 1, 2, 3.x and models of the same shape: split projections, optional biases, rope scaling, tied or own head.

use crate::fault::Result;
use crate::model::config::Config;
use crate::model::facts::{Facts, Names, Projection};
use crate::model::rope::{Dialect, Rope};
use crate::ops::attention::Heads;

pub fn facts(config: &Config) -> Result<Facts> {
    super::gated_silu(config)?;
    super::no_dropout(config, &["attention_dropout"])?;
    let (width, inner) = (config.integer("hidden_size")?, config.integer("intermediate_size")?);
    let (query, key, head) = super::head_counts(config, width)?;
    let (attention_bias, mlp_bias) = (config.flag("attention_bias")?, config.flag("mlp_bias")?);
    let attention = |path, rows, cols| Projection { path, rows, cols, bias: attention_bias };
    let mlp = |path, rows, cols| Projection { path, rows, cols, bias: mlp_bias };
    Ok(Facts {
        family: "llama",
        vocab: config.integer("vocab_size")?,
        width,
        layers: config.integer("num_hidden_layers")?,
        feed_forward: inner,
        norm_eps: config.number_or_none("rms_norm_eps")?.unwrap_or(1e-6),
        heads: Heads { query, key, width: head, scale: (head as f64).sqrt().recip(), window: None },
        rope: Rope::read(config, head, &Dialect::PLAIN)?,
        query_key_value: vec![
            attention("self_attn.q_proj", query * head, width),
            attention("self_attn.k_proj", key * head, width),
            attention("self_attn.v_proj", key * head, width),
        ],
        output: attention("self_attn.o_proj", width, query * head),
        gate_up: vec![mlp("mlp.gate_proj", inner, width), mlp("mlp.up_proj", inner, width)],
        down: mlp("mlp.down_proj", width, inner),
        tied_head: config.flag("tie_word_embeddings")?,
        positions_max: config.integer_or_none("max_position_embeddings")?.unwrap_or(2048),
        names: Names::LLAMA,
        aliases: &[],
    })
}
