//! Keys of config.json that several families have -> facts, and the facts that most families have.

use crate::facts::config::Config;
use crate::facts::rope::{Dialect, Rope};
use crate::facts::{Attention, EmbeddingScale, Facts, Function, LayerFacts, Names, NormKind};
use crate::fault::Result;

/// The values that decide the facts of a model whose layers are all equal.
pub(super) struct Plain<'a> {
    /// `model_type`.
    pub family: &'static str,
    /// The norms of the residual stream.
    pub norm: NormKind,
    /// Every layer.
    pub layer: LayerFacts,
    /// The names by which config.json describes the rope.
    pub dialect: &'a Dialect,
    /// `max_position_embeddings` if the config does not say it.
    pub positions: usize,
    /// `tie_word_embeddings` if the config does not say it.
    pub tied_head: bool,
}

/// Returns the facts of a model of equal layers with one rope, without factors and caps, and with Llama's names. A
/// family states its differences with `..`.
pub(super) fn plain(config: &Config, plain: Plain) -> Result<Facts> {
    let Plain { family, norm, layer, dialect, positions, tied_head } = plain;
    Ok(Facts {
        family,
        vocab: config.integer("vocab_size")?,
        width: config.integer("hidden_size")?,
        norm,
        ropes: vec![Rope::read(config, layer.attention.heads.width, dialect)?],
        layers: vec![layer; config.integer("num_hidden_layers")?],
        query_growth: None,
        parallel: false,
        residual_scale: 1.0,
        embedding_scale: EmbeddingScale::NONE,
        tied_head: config.flag_or("tie_word_embeddings", tied_head)?,
        head_bias: false,
        logits_scale: 1.0,
        logits_softcap: None,
        positions_max: config.integer_or_none("max_position_embeddings")?.unwrap_or(positions),
        names: Names::LLAMA,
        aliases: &[],
    })
}

/// Reads the activation function by transformers' name for it.
pub(super) fn function(config: &Config, key: &str, absent: Function) -> Result<Function> {
    match config.text(key)?.as_deref() {
        None => Ok(absent),
        Some("silu" | "swish") => Ok(Function::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Function::GeluTanh),
        Some("gelu") => Ok(Function::GeluErf),
        Some(_) => Err(config.refuse(key, "one of silu, gelu_pytorch_tanh, gelu_new, gelu")),
    }
}

/// Reads `sliding_window`; null means no window.
pub(super) fn window_or(config: &Config, absent: Option<usize>) -> Result<Option<usize>> {
    Ok(if config.says("sliding_window") { config.integer_or_none("sliding_window")? } else { absent })
}

/// Returns for each layer whether it has a window: from `layer_types` if the config has them, else by the family's
/// rule.
pub(super) fn sliding_layers(
    config: &Config,
    layers: usize,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let Some(kinds) = config.texts_or_none("layer_types")? else {
        return Ok((0..layers).map(rule).collect());
    };
    let sliding = |kind: &String| match kind.as_str() {
        "sliding_attention" => Some(true),
        "full_attention" => Some(false),
        _ => None,
    };
    let sliding: Option<Vec<bool>> = kinds.iter().map(sliding).collect();
    sliding.filter(|list| list.len() == layers).ok_or_else(|| {
        config.refuse("layer_types", &format!("a list of {layers}, each full_attention or sliding_attention"))
    })
}

/// Gives the layers for which `sliding` is true the window, and the others none.
pub(super) fn set_windows(facts: &mut Facts, window: Option<usize>, sliding: &[bool]) {
    for (layer, &sliding) in facts.layers.iter_mut().zip(sliding) {
        layer.attention.heads.window = window.filter(|_| sliding);
    }
}

/// Applies a change to the attention of every layer.
pub(super) fn every_attention(facts: &mut Facts, change: impl Fn(&mut Attention)) {
    facts.layers.iter_mut().for_each(|layer| change(&mut layer.attention));
}

/// Refuses dropout in the base model. Its dropout rates are meant for pre-training and PEFT's users leave them off,
/// but a config that sets them must not be changed in silence.
pub(super) fn no_dropout(config: &Config, keys: &[&str]) -> Result<()> {
    for key in keys {
        if config.number_or_none(key)?.is_some_and(|p| p != 0.0) {
            return Err(config.refuse(key, "0").help("set it to 0 in config.json; use lora_dropout instead"));
        }
    }
    Ok(())
}

/// Reads the counts of query heads and key heads and the head width, and checks that they agree. `head` is the
/// default width.
pub(super) fn head_counts(
    config: &Config,
    width: usize,
    head: Option<usize>,
) -> Result<(usize, usize, usize)> {
    let query = config.integer("num_attention_heads")?;
    let key = config.integer_or_none("num_key_value_heads")?.unwrap_or(query);
    let head = match config.integer_or_none("head_dim")?.or(head) {
        Some(head) => head,
        None if width.is_multiple_of(query) => width / query,
        None => {
            return Err(config.refuse("num_attention_heads", &format!("a divisor of hidden_size {width}")));
        }
    };
    if !query.is_multiple_of(key) {
        return Err(
            config.refuse("num_key_value_heads", &format!("a divisor of num_attention_heads {query}"))
        );
    }
    Ok((query, key, head))
}
