//! Mistral 7B and Nemo, Mistral Small's text part: Llama's shape, a window on every layer where the config has one.
//! Ministral besides: `layer_types` say which layers have it.

use crate::fault::Result;
use crate::model::config::Config;
use crate::model::facts::Facts;

use super::split::{self, Biases, Defaults};

pub fn facts(config: &Config) -> Result<Facts> {
    read(config, "mistral", |facts| Ok(vec![true; facts.layers]))
}

pub fn ministral(config: &Config) -> Result<Facts> {
    read(config, "ministral", |facts| super::sliding_layers(config, facts.layers, |_| true))
}

fn read(
    config: &Config,
    family: &'static str,
    sliding: impl Fn(&Facts) -> Result<Vec<bool>>,
) -> Result<Facts> {
    let defaults = Defaults { positions: 131_072, ..Defaults::of(family, Biases::NONE) };
    let mut facts = split::facts(config, &defaults)?;
    // transformers' default where the key is absent; null means none.
    let window = super::window_or(config, Some(4096))?;
    let sliding = sliding(&facts)?;
    super::set_windows(&mut facts, window, &sliding);
    Ok(facts)
}
