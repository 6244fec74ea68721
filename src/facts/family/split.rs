//! Models of Llama's shape: split projections, gated feed-forward, RMS norms. A family file states its differences.

use super::reading::{self, Plain};
use crate::facts::config::Config;
use crate::facts::rope::Dialect;
use crate::facts::{Activation, Function};
use crate::facts::{Attention, Dense, Facts, FeedForward, Heads, LayerFacts, NormForm, NormKind, Projection};
use crate::fault::Result;

/// The values that a family's classes in transformers use if the config does not set them, and the biases they
/// have.
pub struct Defaults {
    /// `model_type`.
    pub family: &'static str,
    /// `rms_norm_eps`.
    pub eps: f64,
    /// `rope_theta`.
    pub theta: f64,
    /// `max_position_embeddings`.
    pub positions: usize,
    /// `head_dim`. `None`: hidden_size / num_attention_heads.
    pub head_dim: Option<usize>,
    /// `tie_word_embeddings`.
    pub tied_head: bool,
    /// The activation function.
    pub activation: Function,
    /// The key that names the activation function.
    pub activation_key: &'static str,
    /// The projections that have biases.
    pub biases: Biases,
}

/// The projections that have biases.
pub struct Biases {
    /// Queries, keys and values.
    pub query_key_value: bool,
    /// Attention's output projection.
    pub output: bool,
    /// Gate, up and down.
    pub feed_forward: bool,
}

impl Biases {
    /// No biases.
    pub const NONE: Biases = Biases { query_key_value: false, output: false, feed_forward: false };

    /// Returns the biases of all four attention projections, by `attention_bias`.
    pub fn attention(config: &Config) -> Result<Biases> {
        let bias = config.flag("attention_bias")?;
        Ok(Biases { query_key_value: bias, output: bias, feed_forward: false })
    }

    /// Biases by `attention_bias` and `mlp_bias`.
    pub fn both(config: &Config) -> Result<Biases> {
        Ok(Biases { feed_forward: config.flag("mlp_bias")?, ..Biases::attention(config)? })
    }
}

impl Defaults {
    /// Returns the defaults of most families.
    pub fn of(family: &'static str, biases: Biases) -> Defaults {
        Defaults {
            family,
            eps: 1e-6,
            theta: 10_000.0,
            positions: 32_768,
            head_dim: None,
            tied_head: false,
            activation: Function::Silu,
            activation_key: "hidden_act",
            biases,
        }
    }
}

/// Reads the facts of a model of Llama's shape, with full attention and one rope on every layer.
pub fn facts(config: &Config, defaults: &Defaults) -> Result<Facts> {
    reading::no_dropout(config, &["attention_dropout"])?;
    let (width, inner) = (config.integer("hidden_size")?, config.integer("intermediate_size")?);
    let (query, key, head) = reading::head_counts(config, width, defaults.head_dim)?;
    let biases = &defaults.biases;
    let attention = |path, rows, cols| Projection { path, rows, cols, bias: biases.query_key_value };
    let mlp = |path, rows, cols| Projection { path, rows, cols, bias: biases.feed_forward };
    let heads = Heads::plain(query, key, head);
    let dialect = Dialect { theta: defaults.theta, ..Dialect::PLAIN };
    let layer = LayerFacts {
        attention: Attention {
            heads,
            rope: Some(0),
            head_norm: None,
            query_key_value: vec![
                attention("self_attn.q_proj", query * head, width),
                attention("self_attn.k_proj", key * head, width),
                attention("self_attn.v_proj", key * head, width),
            ],
            output: Projection {
                path: "self_attn.o_proj",
                rows: width,
                cols: query * head,
                bias: biases.output,
            },
        },
        feed_forward: FeedForward::Dense(Dense {
            gate_up: vec![mlp("mlp.gate_proj", inner, width), mlp("mlp.up_proj", inner, width)],
            activation: Activation {
                function: reading::function(config, defaults.activation_key, defaults.activation)?,
                gated: true,
            },
            down: mlp("mlp.down_proj", width, inner),
        }),
    };
    let norm =
        NormKind { form: NormForm::Rms, eps: config.number_or_none("rms_norm_eps")?.unwrap_or(defaults.eps) };
    let Defaults { family, positions, tied_head, .. } = *defaults;
    reading::plain(config, Plain { family, norm, layer, dialect: &dialect, positions, tied_head })
}
