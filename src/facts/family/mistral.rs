//! Mistral 7B, Nemo and the text part of Small: Llama's shape, with a window on every layer if the config has one.
//! In Ministral, `layer_types` name the layers with a window. Ministral 3: queries grow with the position.

use crate::facts::config::Config;
use crate::facts::{Facts, QueryGrowth};
use crate::fault::Result;

use super::reading;
use super::split::{self, Biases, Defaults};

/// Reads the facts of a Mistral model.
pub fn mistral(config: &Config) -> Result<Facts> {
    let mut facts = split::facts(config, &defaults("mistral"))?;
    let sliding = vec![true; facts.layers.len()];
    reading::set_windows(&mut facts, reading::window_or(config, Some(4096))?, &sliding);
    Ok(facts)
}

/// Reads the facts of a Ministral model.
pub fn ministral(config: &Config) -> Result<Facts> {
    let mut facts = split::facts(config, &defaults("ministral"))?;
    let sliding = reading::sliding_layers(config, facts.layers.len(), |_| true)?;
    reading::set_windows(&mut facts, reading::window_or(config, Some(4096))?, &sliding);
    Ok(facts)
}

/// Reads the facts of a Ministral 3 model.
pub fn ministral3(config: &Config) -> Result<Facts> {
    let section = config.nonempty_section("rope_parameters")?;
    let section = section.ok_or_else(|| config.refuse("rope_parameters", "an object"))?;
    let defaults = Defaults { eps: 1e-5, head_dim: Some(128), positions: 262_144, ..defaults("ministral3") };
    let mut facts = split::facts(config, &defaults)?;
    let sliding = vec![true; facts.layers.len()];
    reading::set_windows(&mut facts, reading::window_or(config, None)?, &sliding);
    facts.query_growth = Some(QueryGrowth {
        beta: section.number("llama_4_scaling_beta")?,
        positions: section.integer("original_max_position_embeddings")?,
    });
    Ok(facts)
}

fn defaults(family: &'static str) -> Defaults {
    Defaults { positions: 131_072, ..Defaults::of(family, Biases::NONE) }
}
