//! Phi-1, 1.5 and 2: parallel attention and feed-forward under one LayerNorm, biases everywhere (also in the output
//! head), partial rotary, ungated GELU.

use crate::facts::config::Config;
use crate::facts::rope::{Dialect, Rope};
use crate::facts::{Activation, Function};
use crate::facts::{
    Attention, Dense, EmbeddingScale, Facts, FeedForward, LayerFacts, Names, NormForm, NormKind, Projection,
};
use crate::facts::{Heads, Layout};
use crate::fault::Result;

/// If the config does not say it, half of a head's elements are rotated.
const DIALECT: Dialect = Dialect { partial: 0.5, ..Dialect::PLAIN };

/// Reads the facts of a Phi model.
pub fn facts(config: &Config) -> Result<Facts> {
    super::no_dropout(config, &["attention_dropout", "resid_pdrop", "embd_pdrop"])?;
    if config.flag("qk_layernorm")? {
        return Err(config.refuse("qk_layernorm", "false, as in every published Phi"));
    }
    let (width, inner) = (config.integer("hidden_size")?, config.integer("intermediate_size")?);
    let layers = config.integer("num_hidden_layers")?;
    let (query, key, head) = super::head_counts(config, width, None)?;
    let heads = Heads {
        query,
        key,
        width: head,
        scale: (head as f64).sqrt().recip(),
        window: None,
        softcap: None,
        layout: Layout::Blocked,
    };
    let projection = |path, rows, cols| Projection { path, rows, cols, bias: true };
    let layer = LayerFacts {
        attention: Attention {
            heads,
            rope: Some(0),
            head_norm: None,
            query_key_value: vec![
                projection("self_attn.q_proj", query * head, width),
                projection("self_attn.k_proj", key * head, width),
                projection("self_attn.v_proj", key * head, width),
            ],
            output: projection("self_attn.dense", width, query * head),
        },
        feed_forward: FeedForward::Dense(Dense {
            gate_up: vec![projection("mlp.fc1", inner, width)],
            activation: Activation {
                function: super::function(config, "hidden_act", Function::GeluTanh)?,
                gated: false,
            },
            down: projection("mlp.fc2", width, inner),
        }),
    };
    Ok(Facts {
        family: "phi",
        vocab: config.integer("vocab_size")?,
        width,
        norm: NormKind {
            form: NormForm::Layer,
            eps: config.number_or_none("layer_norm_eps")?.unwrap_or(1e-5),
        },
        layers: vec![layer; layers],
        ropes: vec![Rope::read(config, head, &DIALECT)?],
        query_growth: None,
        parallel: true,
        residual_scale: 1.0,
        embedding_scale: EmbeddingScale::NONE,
        tied_head: config.flag("tie_word_embeddings")?,
        head_bias: true,
        logits_scale: 1.0,
        logits_softcap: None,
        positions_max: config.integer_or_none("max_position_embeddings")?.unwrap_or(2048),
        names: Names {
            final_norm: "model.final_layernorm",
            feed_forward_norm: Names::LLAMA.attention_norm,
            ..Names::LLAMA
        },
        aliases: &[],
    })
}
