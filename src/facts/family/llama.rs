//! Llama 1, 2, 3.x and models of the same shape: split projections, optional biases, rope scaling, tied or separate
//! head.

use crate::facts::Facts;
use crate::facts::config::Config;
use crate::fault::Result;

use super::split::{self, Biases, Defaults};

/// Reads the facts of a Llama model.
pub fn facts(config: &Config) -> Result<Facts> {
    split::facts(config, &Defaults { positions: 2048, ..Defaults::of("llama", Biases::both(config)?) })
}
