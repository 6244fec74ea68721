//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, longrope with two sets of factors, partial rotary,
//! window.

use super::reading::{self, Plain};
use crate::facts::config::Config;
use crate::facts::rope::Dialect;
use crate::facts::{Activation, Function};
use crate::facts::{Attention, Dense, Facts, FeedForward, Heads, LayerFacts, NormForm, NormKind, Projection};
use crate::fault::Result;

/// The first Phi-3 checkpoints call longrope `su` or `yarn`. 4096 is the default of transformers' Phi3Config.
const DIALECT: Dialect =
    Dialect { longrope: &["su", "yarn"], original_positions: Some(4096), ..Dialect::PLAIN };

/// Reads the facts of a Phi-3 or Phi-4 model.
pub fn facts(config: &Config) -> Result<Facts> {
    reading::no_dropout(config, &["attention_dropout", "resid_pdrop", "embd_pdrop"])?;
    let (width, inner) = (config.integer("hidden_size")?, config.integer("intermediate_size")?);
    let (query, key, head) = reading::head_counts(config, width, None)?;
    let window = config.integer_or_none("sliding_window")?;
    let projection = |path, rows, cols| Projection { path, rows, cols, bias: false };
    let layer = LayerFacts {
        attention: Attention {
            heads: Heads { window, ..Heads::plain(query, key, head) },
            rope: Some(0),
            head_norm: None,
            query_key_value: vec![projection("self_attn.qkv_proj", (query + 2 * key) * head, width)],
            output: projection("self_attn.o_proj", width, query * head),
        },
        feed_forward: FeedForward::Dense(Dense {
            gate_up: vec![projection("mlp.gate_up_proj", 2 * inner, width)],
            activation: Activation {
                function: reading::function(config, "hidden_act", Function::Silu)?,
                gated: true,
            },
            down: projection("mlp.down_proj", width, inner),
        }),
    };
    let norm = NormKind { form: NormForm::Rms, eps: config.number_or_none("rms_norm_eps")?.unwrap_or(1e-5) };
    let plain = Plain { family: "phi3", norm, layer, dialect: &DIALECT, positions: 4096, tied_head: false };
    Ok(Facts {
        aliases: &[
            ("q_proj", "qkv_proj"),
            ("k_proj", "qkv_proj"),
            ("v_proj", "qkv_proj"),
            ("gate_proj", "gate_up_proj"),
            ("up_proj", "gate_up_proj"),
        ],
        ..reading::plain(config, plain)?
    })
}
