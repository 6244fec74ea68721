//! Falcon: parallel attention and feed-forward under LayerNorms, one fused `query_key_value`, ungated GELU. 7B has
//! one key head and one norm. The new architecture (11B, 40B, 180B) groups its heads by key head and has one norm
//! or two. The first Falcon models use ALiBi positions, which are refused.

use super::reading::{self, Plain};
use crate::facts::config::Config;
use crate::facts::rope::Dialect;
use crate::facts::{Activation, Function};
use crate::facts::{Attention, Dense, Facts, FeedForward, LayerFacts, Names, NormForm, NormKind, Projection};
use crate::facts::{Heads, Layout};
use crate::fault::Result;

/// Reads the facts of a Falcon model.
pub fn facts(config: &Config) -> Result<Facts> {
    reading::no_dropout(config, &["attention_dropout", "hidden_dropout"])?;
    if config.flag("alibi")? {
        return Err(config.refuse("alibi", "false (rotary positions)"));
    }
    let width = config.integer("hidden_size")?;
    let inner = config.integer_or_none("ffn_hidden_size")?.unwrap_or(4 * width);
    let bias = config.flag("bias")?;
    let heads = heads(config, width)?;
    let projection = |path, rows, cols| Projection { path, rows, cols, bias };
    let layer = LayerFacts {
        attention: Attention {
            heads,
            rope: Some(0),
            head_norm: None,
            query_key_value: vec![projection("self_attention.query_key_value", heads.columns(), width)],
            output: projection("self_attention.dense", width, width),
        },
        feed_forward: FeedForward::Dense(Dense {
            gate_up: vec![projection("mlp.dense_h_to_4h", inner, width)],
            activation: Activation {
                function: reading::function(config, "activation", Function::GeluErf)?,
                gated: false,
            },
            down: projection("mlp.dense_4h_to_h", width, inner),
        }),
    };
    let norm =
        NormKind { form: NormForm::Layer, eps: config.number_or_none("layer_norm_epsilon")?.unwrap_or(1e-5) };
    let dialect = &Dialect::PLAIN;
    let plain = Plain { family: "falcon", norm, layer, dialect, positions: 2048, tied_head: true };
    Ok(Facts {
        parallel: config.flag_or("parallel_attn", true)?,
        names: names(config)?,
        ..reading::plain(config, plain)?
    })
}

/// Returns the heads, always as `Layout::Grouped`: with one key head both layouts have the same columns. Without
/// `multi_query`, each query head is followed by its own key and value.
fn heads(config: &Config, width: usize) -> Result<Heads> {
    let query = config.integer("num_attention_heads")?;
    if !width.is_multiple_of(query) {
        return Err(config.refuse("num_attention_heads", &format!("a divisor of hidden_size {width}")));
    }
    let multi_query = config.flag_or("multi_query", true)? && !config.flag("new_decoder_architecture")?;
    let key = match multi_query {
        true => 1,
        false => config.integer_or_none("num_kv_heads")?.unwrap_or(query),
    };
    if !query.is_multiple_of(key) {
        return Err(config.refuse("num_kv_heads", &format!("a divisor of num_attention_heads {query}")));
    }
    Ok(Heads { layout: Layout::Grouped, ..Heads::plain(query, key, width / query) })
}

fn names(config: &Config) -> Result<Names> {
    let (new, parallel) = (config.flag("new_decoder_architecture")?, config.flag_or("parallel_attn", true)?);
    let norms = config.integer_or_none("num_ln_in_parallel_attn")?.unwrap_or(if new { 2 } else { 1 });
    let (attention, feed_forward) = match (new, parallel, norms) {
        (true, true, 2) => ("ln_attn", "ln_mlp"),
        (_, true, 1) => ("input_layernorm", "input_layernorm"),
        (false, false, _) => ("input_layernorm", "post_attention_layernorm"),
        (true, false, _) => return Err(config.refuse("parallel_attn", "true with new_decoder_architecture")),
        (_, true, _) => {
            return Err(config.refuse("num_ln_in_parallel_attn", "1, or 2 in the new architecture"));
        }
    };
    Ok(Names {
        embedding: "transformer.word_embeddings.weight",
        final_norm: "transformer.ln_f",
        layers: "transformer.h",
        attention_norm: Some(attention),
        feed_forward_norm: Some(feed_forward),
        ..Names::LLAMA
    })
}
