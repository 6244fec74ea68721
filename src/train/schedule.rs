//! The learning rate of each step, as transformers' `get_scheduler` computes it.

use super::{Schedule, Warmup};

impl Warmup {
    /// Steps of warm-up out of `total`.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (total as f64 * ratio).ceil() as u64,
        }
    }
}

impl Schedule {
    /// Factor on the learning rate in `step` (0 for the first) out of `total`.
    pub fn factor(self, step: u64, total: u64, warmup: u64) -> f64 {
        let rising = step < warmup;
        let rise = step as f64 / warmup.max(1) as f64;
        let after = step.saturating_sub(warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Constant => 1.0,
            _ if rising => rise,
            Schedule::ConstantWithWarmup => 1.0,
            Schedule::Linear => (1.0 - after).max(0.0),
            Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * after).cos())).max(0.0),
        }
    }

    /// The name in `lr_scheduler_type`.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
            Schedule::Constant => "constant",
            Schedule::ConstantWithWarmup => "constant_with_warmup",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of transformers 5.14's schedulers for 10 steps, of which 3 are warm-up.
    #[test]
    fn factors_equal_transformers() {
        let factors = |schedule: Schedule| (0..10).map(|i| schedule.factor(i, 10, 3)).collect::<Vec<f64>>();
        let rise = [0.0, 1.0 / 3.0, 2.0 / 3.0];
        let with = |rest: [f64; 7]| [&rise[..], &rest].concat();
        let near = |found: Vec<f64>, expected: Vec<f64>| {
            assert!(
                found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-12),
                "{found:?} {expected:?}"
            );
        };
        near(factors(Schedule::Linear), with([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0].map(|n| n / 7.0)));
        let cosine = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0f64]
            .map(|n| 0.5 * (1.0 + (n / 7.0 * std::f64::consts::PI).cos()));
        near(factors(Schedule::Cosine), with(cosine));
        near(factors(Schedule::Constant), vec![1.0; 10]);
        near(factors(Schedule::ConstantWithWarmup), with([1.0; 7]));
        assert_eq!(Warmup::Ratio(0.03).steps(101), 4);
    }
}
