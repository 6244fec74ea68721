//! Rotary frequencies from `config.json`: plain, linear, dynamic NTK, yarn, llama3, longrope; old and new
//! spellings.
//!
//! Frequencies are computed in f32 and in the order of transformers (`modeling_rope_utils.py`), because late
//! positions magnify every rounding.

use crate::fault::Result;

use super::config::Config;

/// The rotation of the pairs of a head with the position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `rope_theta`: the base of the frequencies.
    pub theta: f32,
    /// Elements of a head that are rotated (even); the others pass unchanged.
    pub rotary: usize,
    /// The change of the frequencies for long sequences.
    pub scaling: Scaling,
}

/// The names of scalings in a family's config, and its defaults.
pub struct Dialect {
    /// Other names for longrope in this family.
    pub longrope: &'static [&'static str],
    /// Default of `original_max_position_embeddings` if the top level does not set it. `None`: the section's value.
    pub original_positions: Option<usize>,
    /// Default of `rope_theta`.
    pub theta: f64,
    /// Default of `partial_rotary_factor`.
    pub partial: f64,
}

impl Dialect {
    /// The dialect of most families.
    pub const PLAIN: Dialect =
        Dialect { longrope: &[], original_positions: None, theta: 10_000.0, partial: 1.0 };
}

/// Kinds of layers for which `rope_parameters` may have separate sections.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// The change of frequencies by which a model reaches longer sequences than it was pre-trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// No change.
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// NTK-aware: theta grows beyond `positions`, by the length of each micro-batch. transformers uses the longest
    /// length it has seen so far, so beyond `positions` its result depends on earlier batches and hone's does not.
    Dynamic {
        /// Strength of the growth.
        factor: f32,
        /// The length up to which theta stays as it is.
        positions: usize,
    },
    /// High frequencies are kept, low ones are divided by `factor`, with a ramp between them. Pairs that rotate at
    /// least `fast` times within `positions` are high; pairs that rotate at most `slow` times are low. cos and sin
    /// are multiplied by `attention`.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f32,
        /// `beta_fast`: rotations within `positions` where the ramp begins.
        fast: f64,
        /// `beta_slow`: rotations within `positions` where the ramp ends.
        slow: f64,
        /// The length that the model was pre-trained on.
        positions: usize,
        /// Whether the ramp's ends are rounded to whole pairs.
        truncate: bool,
        /// Factor on cos and sin.
        attention: f32,
    },
    /// Llama 3.1: low frequencies are divided, high ones are kept, with a smooth ramp between them.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// `low_freq_factor`: a wavelength above `positions / low` counts as a low frequency.
        low: f32,
        /// `high_freq_factor`: a wavelength below `positions / high` counts as a high frequency.
        high: f32,
        /// The length that the model was pre-trained on.
        positions: usize,
    },
    /// Phi-3: one list of divisors for lengths up to `positions`, another beyond. cos and sin are multiplied by
    /// `attention`.
    Long {
        /// Divisors up to `positions`, [rotary / 2].
        short: Vec<f32>,
        /// Divisors beyond `positions`, [rotary / 2].
        long: Vec<f32>,
        /// The longest length that uses `short`.
        positions: usize,
        /// Factor on cos and sin.
        attention: f32,
    },
}

impl Rope {
    /// Reads the rope from `rope_theta`, `rope_scaling` or `rope_parameters`, and `partial_rotary_factor`. If the
    /// parameters differ by kind of layer, those of full attention are read.
    pub fn read(config: &Config, head_width: usize, dialect: &Dialect) -> Result<Rope> {
        let section = match config.nonempty_section("rope_scaling")? {
            Some(section) => Some(section),
            None => parameters(config, FULL)?,
        };
        Rope::read_section(section, config, head_width, dialect)
    }

    /// Reads the rope of layers with a window, if they have their own (Gemma 3): the new spelling's
    /// `sliding_attention`, or `rope_local_base_freq` without scaling.
    pub fn read_sliding(config: &Config, head_width: usize, dialect: &Dialect) -> Result<Rope> {
        let section = parameters(config, SLIDING)?;
        let said = section.as_ref().map_or(Ok(None), |section| section.number_or_none("rope_theta"))?;
        let theta = said.or(config.number_or_none("rope_local_base_freq")?).unwrap_or(dialect.theta);
        Ok(Rope { theta: theta as f32, ..Rope::read_section(section, config, head_width, dialect)? })
    }

    /// Reads the rope with the given section of scaling parameters, for families that have more than one.
    pub fn read_section(
        section: Option<Config>,
        config: &Config,
        head_width: usize,
        dialect: &Dialect,
    ) -> Result<Rope> {
        let said = section.as_ref().map_or(Ok(None), |section| section.number_or_none("rope_theta"))?;
        let theta = said.or(config.number_or_none("rope_theta")?).unwrap_or(dialect.theta);
        let rotary = rotary(config, section.as_ref(), head_width, dialect)?;
        let scaling = match &section {
            Some(section) => read_scaling(section, config, rotary, dialect)?,
            None => Scaling::None,
        };
        Ok(Rope { theta: theta as f32, rotary, scaling })
    }

    /// Returns whether the frequencies change with the length of a sequence.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, Scaling::Dynamic { .. } | Scaling::Long { .. })
    }

    /// Frequencies for sequences of `length`, in radians per position, [rotary / 2].
    pub fn frequencies(&self, length: usize) -> Vec<f32> {
        let exponent = |i: usize| (2 * i) as f32 / self.rotary as f32;
        let plain =
            |theta: f32| (0..self.rotary / 2).map(|i| 1.0 / theta.powf(exponent(i))).collect::<Vec<f32>>();
        match &self.scaling {
            Scaling::None => plain(self.theta),
            Scaling::Linear { factor } => plain(self.theta).iter().map(|f| f / factor).collect(),
            Scaling::Dynamic { factor, positions } => {
                let (length, positions) = (length.max(*positions) as f32, *positions as f32);
                let growth = factor * length / positions - (factor - 1.0);
                plain(self.theta * growth.powf(self.rotary as f32 / (self.rotary as f32 - 2.0)))
            }
            Scaling::Yarn { factor, fast, slow, positions, truncate, .. } => {
                let (from, to) = yarn_ramp(self, *fast, *slow, *positions, *truncate);
                let blend = |(i, high): (usize, &f32)| {
                    let low = 1.0 / (factor * self.theta.powf(exponent(i)));
                    let kept = 1.0 - ((i as f32 - from as f32) / (to - from) as f32).clamp(0.0, 1.0);
                    low * (1.0 - kept) + high * kept
                };
                plain(self.theta).iter().enumerate().map(blend).collect()
            }
            Scaling::Llama3 { factor, low, high, positions } => {
                let stretch = |f: &f32| llama3(*f, *factor, *low, *high, *positions as f32);
                plain(self.theta).iter().map(stretch).collect()
            }
            Scaling::Long { short, long, positions, .. } => {
                let factors = if length > *positions { long } else { short };
                factors.iter().enumerate().map(|(i, f)| 1.0 / (f * self.theta.powf(exponent(i)))).collect()
            }
        }
    }

    /// Returns the factor on cos and sin.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            Scaling::Long { attention, .. } | Scaling::Yarn { attention, .. } => attention,
            _ => 1.0,
        }
    }
}

/// Reads `rope_parameters`, or its part for one kind of layer.
fn parameters(config: &Config, layers: &str) -> Result<Option<Config>> {
    let Some(parameters) = config.nonempty_section("rope_parameters")? else { return Ok(None) };
    if parameters.keys().all(|key| [FULL, SLIDING].contains(&key)) {
        return parameters.nonempty_section(layers);
    }
    // The section is one set for all layers.
    Ok(Some(parameters).filter(|_| layers == FULL))
}

/// Reads how many elements of a head are rotated.
fn rotary(config: &Config, section: Option<&Config>, head_width: usize, dialect: &Dialect) -> Result<usize> {
    const PARTIAL: &str = "partial_rotary_factor";
    let said = section.map_or(Ok(None), |section| section.number_or_none(PARTIAL))?;
    let partial = said.or(config.number_or_none(PARTIAL)?).unwrap_or(dialect.partial);
    let rotary = (head_width as f64 * partial) as usize;
    if rotary == 0 || rotary > head_width || !rotary.is_multiple_of(2) {
        return Err(config.refuse(PARTIAL, "an even number of rotated elements in a head"));
    }
    Ok(rotary)
}

fn read_scaling(section: &Config, config: &Config, rotary: usize, dialect: &Dialect) -> Result<Scaling> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let kind = section.text("rope_type")?.or(section.text("type")?);
    let original = || -> Result<usize> {
        match (
            config.integer_or_none(ORIGINAL)?,
            dialect.original_positions,
            section.integer_or_none(ORIGINAL)?,
        ) {
            (Some(positions), _, _) | (None, Some(positions), _) | (None, None, Some(positions)) => {
                Ok(positions)
            }
            (None, None, None) => config.integer("max_position_embeddings"),
        }
    };
    let factor = || section.number("factor").map(|factor| factor as f32);
    match kind.as_deref() {
        // For text, the three axes of mrope are the same positions.
        None | Some("default" | "mrope") => Ok(Scaling::None),
        Some("linear") => Ok(Scaling::Linear { factor: factor()? }),
        Some("dynamic") => {
            Ok(Scaling::Dynamic { factor: factor()?, positions: config.integer("max_position_embeddings")? })
        }
        Some("llama3") => Ok(Scaling::Llama3 {
            factor: factor()?,
            low: section.number("low_freq_factor")? as f32,
            high: section.number("high_freq_factor")? as f32,
            positions: original()?,
        }),
        Some("yarn") if !dialect.longrope.contains(&"yarn") => read_yarn(section, config, original()?),
        Some(name) if name == "longrope" || dialect.longrope.contains(&name) => {
            read_long(section, config, rotary, original()?)
        }
        Some(_) => {
            let key = if section.has("rope_type") { "rope_type" } else { "type" };
            Err(section.refuse(key, "one of default, linear, dynamic, yarn, llama3, longrope"))
        }
    }
}

fn read_yarn(section: &Config, config: &Config, positions: usize) -> Result<Scaling> {
    let factor = match section.number_or_none("factor")? {
        Some(factor) => factor,
        None => config.integer("max_position_embeddings")? as f64 / positions as f64,
    };
    let nonzero =
        |key: &str| -> Result<Option<f64>> { Ok(section.number_or_none(key)?.filter(|value| *value != 0.0)) };
    let strength = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention =
        match (section.number_or_none("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(attention), _, _) => attention,
            (None, Some(scale), Some(all)) => strength(scale) / strength(all),
            _ => strength(1.0),
        };
    Ok(Scaling::Yarn {
        factor: factor as f32,
        fast: nonzero("beta_fast")?.unwrap_or(32.0),
        slow: nonzero("beta_slow")?.unwrap_or(1.0),
        positions,
        truncate: !section.has("truncate") || section.flag("truncate")?,
        attention: attention as f32,
    })
}

/// Returns the pairs at which yarn's ramp begins and ends.
fn yarn_ramp(rope: &Rope, fast: f64, slow: f64, positions: usize, truncate: bool) -> (f64, f64) {
    let width = rope.rotary as f64;
    let pair = |turns: f64| {
        let turn = positions as f64 / (turns * std::f64::consts::TAU);
        width * turn.ln() / (2.0 * f64::from(rope.theta).ln())
    };
    let (from, to) = match truncate {
        true => (pair(fast).floor(), pair(slow).ceil()),
        false => (pair(fast), pair(slow)),
    };
    let (from, to) = (from.max(0.0), to.min(width - 1.0));
    // An empty ramp would divide 0 by 0.
    if from == to { (from, to + 0.001) } else { (from, to) }
}

fn read_long(section: &Config, config: &Config, rotary: usize, positions: usize) -> Result<Scaling> {
    let factors = |key: &str| -> Result<Vec<f32>> {
        let factors = section.numbers(key)?;
        if factors.len() != rotary / 2 {
            return Err(section.refuse(key, &format!("{} factors, one per rotated pair", rotary / 2)));
        }
        Ok(factors.into_iter().map(|factor| factor as f32).collect())
    };
    let factor = match section.number_or_none("factor")? {
        Some(factor) => factor,
        None => config.integer("max_position_embeddings")? as f64 / positions as f64,
    };
    let attention = match section.number_or_none("attention_factor")? {
        Some(attention) => attention,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (positions as f64).ln()).sqrt(),
    };
    Ok(Scaling::Long {
        short: factors("short_factor")?,
        long: factors("long_factor")?,
        positions,
        attention: attention as f32,
    })
}

fn llama3(frequency: f32, factor: f32, low: f32, high: f32, positions: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength < positions / high {
        frequency
    } else if wavelength > positions / low {
        frequency / factor
    } else {
        let smooth = (positions / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Each case is recorded from transformers (`tests/scripts/rope_frequencies.py`): all scalings, both spellings,
    /// parameters by kind of layer. The tolerance is a few units in the last place, because `powf` differs by
    /// library.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/rope.json");
        let recorded: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let cases = recorded["cases"].as_array().unwrap();
        assert!(cases.len() > 25, "{} cases", cases.len());
        for case in cases {
            let config = Config::from_json(case["config"].as_object().unwrap().clone());
            let rope = match (case["family"].as_str().unwrap(), case["layers"].as_str()) {
                ("phi3", _) => {
                    let dialect = Dialect { original_positions: Some(4096), ..Dialect::PLAIN };
                    Rope::read(&config, 64, &dialect)
                }
                (_, Some("sliding_attention")) => Rope::read_sliding(&config, 64, &Dialect::PLAIN),
                _ => Rope::read(&config, 64, &Dialect::PLAIN),
            };
            let (rope, name) = (rope.unwrap(), format!("{} {}", case["name"], case["layers"]));
            let expected: Vec<f64> =
                case["frequencies"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap()).collect();
            let found = rope.frequencies(case["length"].as_u64().unwrap() as usize);
            assert_eq!(found.len(), expected.len(), "{name}");
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let relative = (f64::from(*found) - expected).abs() / expected;
                assert!(relative < 5e-7, "{name}, length {}: {i}: {found} {expected}", case["length"]);
            }
            let attention = case["attention"].as_f64().unwrap();
            assert!((f64::from(rope.attention_factor()) - attention).abs() < 1e-7, "{name}");
        }
    }

    #[test]
    fn an_unknown_scaling_is_refused_by_its_own_key() {
        for key in ["type", "rope_type"] {
            let json = serde_json::json!({"rope_scaling": {key: "proportional", "factor": 2.0}});
            let config = Config::from_json(json.as_object().unwrap().clone());
            let fault = Rope::read(&config, 64, &Dialect::PLAIN).unwrap_err();
            assert!(
                fault.message.contains(&format!("rope_scaling: {key}: found \"proportional\"")),
                "{fault}"
            );
        }
    }
}
