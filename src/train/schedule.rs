//! The learning rate of each step, as transformers' `get_scheduler` computes it.

use std::f64::consts::PI;

/// Course of the learning rate, with its arguments (`lr_scheduler_kwargs`). Rates are shares of the peak.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// Falls linearly to zero.
    Linear,
    /// Falls along a cosine.
    Cosine {
        /// Waves; a half goes from the peak to zero.
        cycles: f64,
    },
    /// Stays constant, without warm-up.
    Constant,
    /// Rises during warm-up, then stays constant.
    ConstantWithWarmup,
    /// Falls to zero along a cosine, several times.
    CosineWithRestarts {
        /// The number of repetitions.
        cycles: f64,
    },
    /// Falls as a power of the remaining share of steps.
    Polynomial {
        /// Rate at the end.
        end: f64,
        /// The power.
        power: f64,
    },
    /// Falls with the square root of the step.
    InverseSqrt {
        /// `None`: the warm-up, or 10,000 steps without one.
        timescale: Option<f64>,
    },
    /// Falls along a cosine to a rate above zero.
    CosineWithMinLr {
        /// Waves.
        cycles: f64,
        /// The lowest rate.
        min: f64,
    },
    /// The same, with a warm-up that begins above zero.
    CosineWarmupWithMinLr {
        /// Waves.
        cycles: f64,
        /// The lowest rate.
        min: f64,
        /// Rate of the first step; `None`: one part of the warm-up's steps.
        first: Option<f64>,
    },
    /// Warm-up, a constant stage, decay.
    WarmupStableDecay(Stages),
}

/// The length of warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A share of all steps, rounded up as HF does.
    Ratio(f64),
}

/// Three stages: warm-up, the peak, decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stages {
    /// Steps of the last stage.
    pub decay_steps: u64,
    /// `None`: all steps except those of warm-up and decay.
    pub stable_steps: Option<u64>,
    /// Course of the warm-up.
    pub rise: Shape,
    /// Course of the decay.
    pub fall: Shape,
    /// The lowest rate.
    pub min: f64,
    /// Waves of a cosine decay.
    pub cycles: f64,
}

/// The curve by which a stage goes from one rate to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A straight line.
    Linear,
    /// Half a cosine.
    Cosine,
    /// One minus a square root.
    Root,
}

impl Shape {
    /// Finds the schedule by the name that transformers gives it.
    pub fn named(name: &str) -> Option<Shape> {
        match name {
            "linear" => Some(Shape::Linear),
            "cosine" => Some(Shape::Cosine),
            "1-sqrt" => Some(Shape::Root),
            _ => None,
        }
    }
}

impl Warmup {
    /// Returns the number of steps of warm-up out of `total`.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (total as f64 * ratio).ceil() as u64,
        }
    }
}

/// Returns the wave from 1 down: half a wave for `cycles` of a half.
fn wave(cycles: f64, progress: f64) -> f64 {
    0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos())
}

impl Schedule {
    /// Cosine from the peak to zero.
    pub const COSINE: Schedule = Schedule::Cosine { cycles: 0.5 };

    /// Returns the factor on the learning rate in `step` (0 for the first) out of `total`.
    pub fn factor(self, step: u64, total: u64, warmup: u64) -> f64 {
        let rise = step as f64 / warmup.max(1) as f64;
        let span = total.saturating_sub(warmup).max(1) as f64;
        let after = step.saturating_sub(warmup) as f64 / span;
        match self {
            Schedule::Constant => 1.0,
            Schedule::WarmupStableDecay(stages) => stages.factor(step, total, warmup),
            Schedule::CosineWarmupWithMinLr { cycles, min, .. } if step >= warmup => {
                let progress = (step as f64 - warmup as f64 + 1.0) / span;
                (wave(cycles, progress) * (1.0 - min) + min).max(0.0)
            }
            Schedule::CosineWarmupWithMinLr { first: None, .. } => (step as f64 + 1.0) / warmup.max(1) as f64,
            Schedule::CosineWarmupWithMinLr { first: Some(first), .. } => {
                first + (1.0 - first) * step as f64 / (warmup - 1).max(1) as f64
            }
            _ if step < warmup => rise,
            Schedule::ConstantWithWarmup => 1.0,
            Schedule::Linear => (1.0 - after).max(0.0),
            Schedule::Cosine { cycles } => wave(cycles, after).max(0.0),
            Schedule::CosineWithRestarts { .. } if after >= 1.0 => 0.0,
            Schedule::CosineWithRestarts { cycles } => {
                (0.5 * (1.0 + (PI * ((cycles * after) % 1.0)).cos())).max(0.0)
            }
            Schedule::Polynomial { end, .. } if step > total => end,
            Schedule::Polynomial { end, power } => (1.0 - end) * (1.0 - after).powf(power) + end,
            Schedule::InverseSqrt { timescale } => {
                let timescale = timescale.unwrap_or(if warmup > 0 { warmup as f64 } else { 10_000.0 });
                ((step as f64 + timescale - warmup as f64) / timescale).sqrt().recip()
            }
            Schedule::CosineWithMinLr { cycles, min } => (wave(cycles, after) * (1.0 - min) + min).max(0.0),
        }
    }

    /// Returns the name in `lr_scheduler_type`.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Linear => "linear",
            Schedule::Cosine { .. } => "cosine",
            Schedule::Constant => "constant",
            Schedule::ConstantWithWarmup => "constant_with_warmup",
            Schedule::CosineWithRestarts { .. } => "cosine_with_restarts",
            Schedule::Polynomial { .. } => "polynomial",
            Schedule::InverseSqrt { .. } => "inverse_sqrt",
            Schedule::CosineWithMinLr { .. } => "cosine_with_min_lr",
            Schedule::CosineWarmupWithMinLr { .. } => "cosine_warmup_with_min_lr",
            Schedule::WarmupStableDecay(_) => "warmup_stable_decay",
        }
    }
}

impl Stages {
    fn factor(self, step: u64, total: u64, warmup: u64) -> f64 {
        let floored = |factor: f64| (factor * (1.0 - self.min) + self.min).max(0.0);
        if step < warmup {
            let progress = step as f64 / warmup as f64;
            return floored(match self.rise {
                Shape::Linear => progress,
                Shape::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
                Shape::Root => 1.0 - (1.0 - progress).sqrt(),
            });
        }
        let left = total.saturating_sub(warmup).saturating_sub(self.decay_steps);
        let decay_from = warmup + self.stable_steps.unwrap_or(left);
        if step < decay_from {
            return 1.0;
        }
        let progress = (step - decay_from) as f64 / self.decay_steps.max(1) as f64;
        if step - decay_from >= self.decay_steps {
            return self.min;
        }
        floored(match self.fall {
            Shape::Linear => 1.0 - progress,
            Shape::Cosine => wave(self.cycles, progress),
            Shape::Root => 1.0 - progress.sqrt(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every case that tests/scripts/schedules.py recorded, read as the plan reads `lr_scheduler_kwargs`.
    #[test]
    fn factors_equal_transformers() {
        let text = include_str!("../../tests/fixtures/schedules.json");
        let recorded: serde_json::Value = serde_json::from_str(text).unwrap();
        let cases = recorded["cases"].as_array().unwrap();
        assert!(cases.len() >= 19);
        for case in cases {
            let number = |key: &str| case["kwargs"][key].as_f64();
            let rate = case["learning_rate"].as_f64().unwrap();
            let word = |key: &str| case["kwargs"][key].as_str().and_then(Shape::named);
            let min = number("min_lr_rate").or(number("min_lr").map(|min| min / rate)).unwrap_or(0.0);
            let cycles = number("num_cycles");
            let half = cycles.unwrap_or(0.5);
            let schedule = match case["name"].as_str().unwrap() {
                "linear" => Schedule::Linear,
                "cosine" => Schedule::Cosine { cycles: half },
                "constant" => Schedule::Constant,
                "constant_with_warmup" => Schedule::ConstantWithWarmup,
                "cosine_with_restarts" => Schedule::CosineWithRestarts { cycles: cycles.unwrap_or(1.0) },
                "polynomial" => Schedule::Polynomial {
                    end: number("lr_end").unwrap_or(1e-7) / rate,
                    power: number("power").unwrap_or(1.0),
                },
                "inverse_sqrt" => Schedule::InverseSqrt { timescale: number("timescale") },
                "cosine_with_min_lr" => Schedule::CosineWithMinLr { cycles: half, min },
                "cosine_warmup_with_min_lr" => {
                    Schedule::CosineWarmupWithMinLr { cycles: half, min, first: number("warmup_lr_rate") }
                }
                _ => Schedule::WarmupStableDecay(Stages {
                    decay_steps: number("num_decay_steps").unwrap() as u64,
                    stable_steps: number("num_stable_steps").map(|steps| steps as u64),
                    rise: word("warmup_type").unwrap_or(Shape::Linear),
                    fall: word("decay_type").unwrap_or(Shape::Cosine),
                    min: number("min_lr_ratio").unwrap_or(0.0),
                    cycles: half,
                }),
            };
            assert_eq!(schedule.name(), case["name"].as_str().unwrap());
            let (total, warmup) = (case["total"].as_u64().unwrap(), case["warmup"].as_u64().unwrap());
            for (step, expected) in (0..total).zip(case["factors"].as_array().unwrap()) {
                let (found, expected) = (schedule.factor(step, total, warmup), expected.as_f64().unwrap());
                assert!((found - expected).abs() < 1e-12, "{case}: step {step}: {found}, not {expected}");
            }
        }
        assert_eq!(Warmup::Ratio(0.03).steps(101), 4);
    }
}
