//! Phi-1, 1.5 and 2: parallel attention and feed-forward under one LayerNorm, biases everywhere (also in the output
//! head), partial rotary, ungated GELU.

use super::reading::{self, Plain};
use crate::facts::config::Config;
use crate::facts::rope::Dialect;
use crate::facts::{Activation, Function};
use crate::facts::{
    Attention, Dense, Facts, FeedForward, Heads, LayerFacts, Names, NormForm, NormKind, Projection,
};
use crate::fault::Result;

/// If the config does not say it, half of a head's elements are rotated.
const DIALECT: Dialect = Dialect { partial: 0.5, ..Dialect::PLAIN };

/// Reads the facts of a Phi model.
pub fn facts(config: &Config) -> Result<Facts> {
    reading::no_dropout(config, &["attention_dropout", "resid_pdrop", "embd_pdrop"])?;
    if config.flag("qk_layernorm")? {
        return Err(config.refuse("qk_layernorm", "false, as in every published Phi"));
    }
    let (width, inner) = (config.integer("hidden_size")?, config.integer("intermediate_size")?);
    let (query, key, head) = reading::head_counts(config, width, None)?;
    let projection = |path, rows, cols| Projection { path, rows, cols, bias: true };
    let layer = LayerFacts {
        attention: Attention {
            heads: Heads::plain(query, key, head),
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
                function: reading::function(config, "hidden_act", Function::GeluTanh)?,
                gated: false,
            },
            down: projection("mlp.fc2", width, inner),
        }),
    };
    let norm =
        NormKind { form: NormForm::Layer, eps: config.number_or_none("layer_norm_eps")?.unwrap_or(1e-5) };
    let plain = Plain { family: "phi", norm, layer, dialect: &DIALECT, positions: 2048, tied_head: false };
    Ok(Facts {
        parallel: true,
        head_bias: true,
        names: Names {
            final_norm: "model.final_layernorm",
            feed_forward_norm: Names::LLAMA.attention_norm,
            ..Names::LLAMA
        },
        ..reading::plain(config, plain)?
    })
}
