//! Mistral 7B, Nemo and Small's text part: Llama's shape, a window on every layer where the config has one.
//! Ministral besides: `layer_types` say which layers have it. Ministral 3: queries that grow with the position.

use crate::facts::config::Config;
use crate::facts::{Facts, QueryGrowth};
use crate::fault::Result;

use super::split::{self, Biases, Defaults};

pub fn mistral(config: &Config) -> Result<Facts> {
    let mut facts = split::facts(config, &defaults("mistral"))?;
    let sliding = vec![true; facts.layers.len()];
    super::set_windows(&mut facts, super::window_or(config, Some(4096))?, &sliding);
    Ok(facts)
}

pub fn ministral(config: &Config) -> Result<Facts> {
    let mut facts = split::facts(config, &defaults("ministral"))?;
    let sliding = super::sliding_layers(config, facts.layers.len(), |_| true)?;
    super::set_windows(&mut facts, super::window_or(config, Some(4096))?, &sliding);
    Ok(facts)
}

pub fn ministral3(config: &Config) -> Result<Facts> {
    let section = config.nonempty_section("rope_parameters")?;
    let section = section.ok_or_else(|| config.refuse("rope_parameters", "an object"))?;
    let defaults = Defaults { eps: 1e-5, head_dim: Some(128), positions: 262_144, ..defaults("ministral3") };
    let mut facts = split::facts(config, &defaults)?;
    let sliding = vec![true; facts.layers.len()];
    super::set_windows(&mut facts, super::window_or(config, None)?, &sliding);
    facts.query_growth = Some(QueryGrowth {
        beta: section.number("llama_4_scaling_beta")?,
        positions: section.integer("original_max_position_embeddings")?,
    });
    Ok(facts)
}

fn defaults(family: &'static str) -> Defaults {
    Defaults { positions: 131_072, ..Defaults::of(family, Biases::NONE) }
}
