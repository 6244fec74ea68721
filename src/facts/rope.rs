//! Rotary frequencies from `config.json`: plain, linear, dynamic NTK, yarn, llama3, longrope; old and new spellings.
//!
//! Computed in f32 in the order transformers does (`modeling_rope_utils.py`), since angles at late positions
//! magnify every rounding.

use crate::fault::Result;

use super::config::Config;

/// How a head's pairs turn with position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f32,
    /// Elements of a head that turn (even); the rest pass.
    pub rotary: usize,
    pub scaling: Scaling,
}

/// What a family's config means by names and absences.
pub struct Dialect {
    /// Other names of longrope.
    pub longrope: &'static [&'static str],
    /// `original_max_position_embeddings` where the top level does not say it; `None`: as the section says.
    pub original_positions: Option<usize>,
    /// `rope_theta` and `partial_rotary_factor` where nothing says them.
    pub theta: f64,
    pub partial: f64,
}

impl Dialect {
    pub const PLAIN: Dialect =
        Dialect { longrope: &[], original_positions: None, theta: 10_000.0, partial: 1.0 };
}

/// Kinds of layers that `rope_parameters` may tell apart.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    None,
    Linear {
        factor: f32,
    },
    /// NTK-aware growth of theta beyond `positions`, by each micro-batch's own length. transformers keeps the
    /// longest length it has met instead, so beyond `positions` its result depends on history and ours does not.
    Dynamic {
        factor: f32,
        positions: usize,
    },
    /// High frequencies kept, low ones divided by `factor`, a ramp between: pairs that turn `fast` times or more
    /// within `positions`, and those that turn `slow` times or less. cos and sin times `attention`.
    Yarn {
        factor: f32,
        fast: f64,
        slow: f64,
        positions: usize,
        /// The ramp's ends are whole pairs.
        truncate: bool,
        attention: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        positions: usize,
    },
    /// Phi-3: one list of factors up to `positions`, another beyond; cos and sin times `attention`.
    Long {
        short: Vec<f32>,
        long: Vec<f32>,
        positions: usize,
        attention: f32,
    },
}

impl Rope {
    /// Reads `rope_theta`, `rope_scaling` or `rope_parameters`, `partial_rotary_factor`. Where the parameters differ
    /// by kind of layer, those of full attention.
    pub fn read(config: &Config, head_width: usize, dialect: &Dialect) -> Result<Rope> {
        let section = match config.nonempty_section("rope_scaling")? {
            Some(section) => Some(section),
            None => parameters(config, FULL)?,
        };
        Rope::read_section(section, config, head_width, dialect)
    }

    /// The rope of layers with a window, where they have their own (Gemma 3): the new spelling's
    /// `sliding_attention`, or `rope_local_base_freq` without any scaling.
    pub fn read_sliding(config: &Config, head_width: usize, dialect: &Dialect) -> Result<Rope> {
        let section = parameters(config, SLIDING)?;
        let said = section.as_ref().map_or(Ok(None), |section| section.number_or_none("rope_theta"))?;
        let theta = said.or(config.number_or_none("rope_local_base_freq")?).unwrap_or(dialect.theta);
        Ok(Rope { theta: theta as f32, ..Rope::read_section(section, config, head_width, dialect)? })
    }

    /// `read` with the section that scales, for families with more than one.
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

    /// Whether the frequencies change with the length of a sequence.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, Scaling::Dynamic { .. } | Scaling::Long { .. })
    }

    /// Radians a position, [rotary / 2], for sequences of `length`.
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

    /// Factor on cos and sin.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            Scaling::Long { attention, .. } | Scaling::Yarn { attention, .. } => attention,
            _ => 1.0,
        }
    }
}

/// `rope_parameters`, or its part for one kind of layer.
fn parameters(config: &Config, layers: &str) -> Result<Option<Config>> {
    let Some(parameters) = config.nonempty_section("rope_parameters")? else { return Ok(None) };
    if parameters.keys().all(|key| [FULL, SLIDING].contains(&key)) {
        return parameters.nonempty_section(layers);
    }
    // One set for all layers.
    Ok(Some(parameters).filter(|_| layers == FULL))
}

/// How many elements of a head turn.
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
        // Of text, the three axes of mrope are the same positions.
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

/// The pairs between which yarn's ramp runs.
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
    // No ramp at all would divide 0 by 0.
    if from == to { (from, to + 0.001) } else { (from, to) }
}

fn read_long(section: &Config, config: &Config, rotary: usize, positions: usize) -> Result<Scaling> {
    let factors = |key: &str| -> Result<Vec<f32>> {
        let factors = section.numbers(key)?;
        if factors.len() != rotary / 2 {
            return Err(section.refuse(key, &format!("{} factors, one a rotated pair", rotary / 2)));
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

    /// Each case recorded from transformers (`tests/scripts/rope_frequencies.py`): all scalings, both spellings,
    /// parameters by kind of layer. The tolerance is a few units of the last place: `powf` differs by library.
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
