//! SmolLM3: Llama's shape, but some layers (by default every fourth) have no rope.

use crate::facts::Facts;
use crate::facts::config::Config;
use crate::fault::Result;

use super::reading;
use super::split::{self, Biases, Defaults};

/// Reads the facts of a SmolLM3 model.
pub fn facts(config: &Config) -> Result<Facts> {
    let biases = Biases::both(config)?;
    let defaults = Defaults { theta: 2_000_000.0, tied_head: true, ..Defaults::of("smollm3", biases) };
    let mut facts = split::facts(config, &defaults)?;
    let turned = turned_layers(config, facts.layers.len())?;
    let window = match config.flag("use_sliding_window")? {
        true => config.integer_or_none("sliding_window")?,
        false => None,
    };
    let sliding = reading::sliding_layers(config, facts.layers.len(), |layer| !turned[layer])?;
    reading::set_windows(&mut facts, window, &sliding);
    for (layer, turned) in facts.layers.iter_mut().zip(turned) {
        layer.attention.rope = turned.then_some(0);
    }
    Ok(facts)
}

/// Reads which layers have rope. `no_rope_layers` holds a 1 for a layer with rope, contrary to its name.
fn turned_layers(config: &Config, layers: usize) -> Result<Vec<bool>> {
    if !config.has("no_rope_layers") {
        let interval = config.integer_or_none("no_rope_layer_interval")?.unwrap_or(4);
        return Ok((1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect());
    }
    let list = config.numbers("no_rope_layers")?;
    if list.len() < layers {
        return Err(
            config.refuse("no_rope_layers", &format!("a list of at least {layers} numbers, each 0 or 1"))
        );
    }
    Ok(list[..layers].iter().map(|&turned| turned != 0.0).collect())
}
