//! Rotary frequencies from `config.json`: plain, linear, dynamic NTK, llama3, longrope; old and new spellings.
//!
//! Computed in f32 in the order transformers does (`modeling_rope_utils.py`), since angles at late positions
//! magnify every rounding.

use candle_core::{DType, Device, Tensor};

use crate::fault::Result;
use crate::ops::rope::Angles;

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
    /// Reads `rope_theta`, `rope_scaling` or `rope_parameters`, `partial_rotary_factor`.
    pub fn read(config: &Config, head_width: usize, dialect: &Dialect) -> Result<Rope> {
        let scaling = match config.nonempty_section("rope_scaling")? {
            Some(section) => Some(section),
            None => config.nonempty_section("rope_parameters")?,
        };
        Rope::read_section(scaling, config, head_width, dialect)
    }

    /// `read` with the section that scales, for families with more than one.
    pub fn read_section(
        scaling: Option<Config>,
        config: &Config,
        head_width: usize,
        dialect: &Dialect,
    ) -> Result<Rope> {
        let scaled = |key: &str| scaling.as_ref().map_or(Ok(None), |scaling| scaling.number_or_none(key));
        let theta = scaled("rope_theta")?.or(config.number_or_none("rope_theta")?).unwrap_or(dialect.theta);
        let partial = scaled("partial_rotary_factor")?.or(config.number_or_none("partial_rotary_factor")?);
        let rotary = (head_width as f64 * partial.unwrap_or(dialect.partial)) as usize;
        if rotary == 0 || rotary > head_width || !rotary.is_multiple_of(2) {
            return Err(
                config.refuse("partial_rotary_factor", "an even number of rotated elements in a head")
            );
        }
        let scaling = match &scaling {
            Some(section) => read_scaling(section, config, rotary, dialect)?,
            None => Scaling::None,
        };
        Ok(Rope { theta: theta as f32, rotary, scaling })
    }

    /// cos and sin [T, rotary / 2] for rows at `positions`; `lengths` is the length that decides each row's
    /// scaling: the padded length of its micro-batch, as transformers sees it.
    pub fn angles(&self, positions: &[u32], lengths: &[u32], dtype: DType) -> candle_core::Result<Angles> {
        let half = self.rotary / 2;
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        let attention = self.attention_factor();
        let mut table: Option<(u32, Vec<f32>)> = None;
        for (&position, &length) in positions.iter().zip(lengths) {
            if table.as_ref().is_none_or(|(of, _)| *of != length) {
                table = Some((length, self.frequencies(length as usize)));
            }
            let (_, frequencies) = table.as_ref().expect("just filled");
            for frequency in frequencies {
                let angle = position as f32 * frequency;
                cos.push(angle.cos() * attention);
                sin.push(angle.sin() * attention);
            }
        }
        let tensor =
            |values| Tensor::from_vec(values, (positions.len(), half), &Device::Cpu)?.to_dtype(dtype);
        Ok(Angles { cos: tensor(cos)?, sin: tensor(sin)? })
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

    fn attention_factor(&self) -> f32 {
        match self.scaling {
            Scaling::Long { attention, .. } => attention,
            _ => 1.0,
        }
    }
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
        None | Some("default") => Ok(Scaling::None),
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
        Some(name) if name == "longrope" || dialect.longrope.contains(&name) => {
            read_long(section, config, rotary, original()?)
        }
        Some(_) => {
            let key = if section.has("rope_type") { "rope_type" } else { "type" };
            Err(section.refuse(key, "one of default, linear, dynamic, llama3, longrope"))
        }
    }
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
