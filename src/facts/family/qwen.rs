//! Qwen2 and 2.5: Llama's shape with biases on queries, keys and values. Qwen3: no biases, but queries and keys are
//! normalised head by head. Both have a window on the upper layers if `use_sliding_window` is set.

use crate::facts::config::Config;
use crate::facts::{Facts, HeadNorm, Over};
use crate::fault::Result;

use super::reading;
use super::split::{self, Biases, Defaults};

/// Reads the facts of a Qwen2 model.
pub fn qwen2(config: &Config) -> Result<Facts> {
    let biases = Biases { query_key_value: true, ..Biases::NONE };
    windowed(config, split::facts(config, &Defaults::of("qwen2", biases))?)
}

/// Reads the facts of a Qwen3 model.
pub fn qwen3(config: &Config) -> Result<Facts> {
    let defaults = Defaults { head_dim: Some(128), ..Defaults::of("qwen3", Biases::attention(config)?) };
    let mut facts = windowed(config, split::facts(config, &defaults)?)?;
    let norm = HeadNorm { query: "self_attn.q_norm", key: "self_attn.k_norm", over: Over::Head };
    reading::every_attention(&mut facts, |attention| attention.head_norm = Some(norm));
    Ok(facts)
}

fn windowed(config: &Config, mut facts: Facts) -> Result<Facts> {
    let window = match config.flag("use_sliding_window")? {
        true => reading::window_or(config, Some(4096))?,
        false => None,
    };
    let from = config.whole_or("max_window_layers", 28)?;
    let sliding = reading::sliding_layers(config, facts.layers.len(), |layer| layer >= from)?;
    reading::set_windows(&mut facts, window, &sliding);
    Ok(facts)
}
