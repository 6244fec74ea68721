//! The losses and gradient norms of the steps so far, and of this one -> whether this step is a spike.
//!
//! A step is a spike if its loss or its gradient norm (before clipping) is more than `factor` times the median over the
//! last `window` steps that were no spikes. Before that many steps are known, no step is judged. A loss or a norm that
//! is not finite is always a spike. The history is part of a checkpoint, so that a continued run judges as an
//! undisturbed one.

use serde::{Deserialize, Serialize};

/// LIMIT: spikes in a row that `skip` passes over. More are no spike: the run has diverged, or its data has changed.
pub const IN_A_ROW_MAX: u64 = 10;

/// The consequence of a spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The run ends.
    Stop,
    /// The step changes neither the adapter nor the optimizer's moments, and the run continues.
    Skip,
}

/// The rules for finding spikes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spikes {
    /// The consequence of a spike.
    pub policy: Policy,
    /// A spike exceeds the median by this factor.
    pub factor: f64,
    /// Steps that the median is taken over.
    pub window: usize,
}

/// The steps that later ones are compared with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// Steps that were skipped.
    pub skipped: u64,
    /// Steps that were skipped since the last one that was not.
    pub in_a_row: u64,
}

impl History {
    /// Returns the reason why a step is a spike; `None` if it is none.
    pub fn spike(&self, rule: &Spikes, loss: f64, norm: f64) -> Option<String> {
        let exceeds = |name: &str, value: f64, before: &[f64]| {
            if !value.is_finite() {
                return Some(format!("{name} {value}"));
            }
            let median = median(before)?;
            let known = before.len() >= rule.window;
            (known && value > rule.factor * median).then(|| {
                let (factor, window) = (rule.factor, rule.window);
                format!(
                    "{name} {value:.4} is more than {factor} times {median:.4}, the median of {window} steps"
                )
            })
        };
        exceeds("loss", loss, &self.losses).or_else(|| exceeds("gradient norm", norm, &self.norms))
    }

    /// Adds a step that was no spike.
    pub fn add(&mut self, rule: &Spikes, loss: f64, norm: f64) {
        for (values, value) in [(&mut self.losses, loss), (&mut self.norms, norm)] {
            values.push(value);
            let surplus = values.len().saturating_sub(rule.window);
            values.drain(..surplus);
        }
        self.in_a_row = 0;
    }

    /// Counts a step that was skipped.
    pub fn skip(&mut self) {
        self.skipped += 1;
        self.in_a_row += 1;
    }
}

/// Returns the middle value, or the mean of the two in the middle; `None` of no values.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let high = *sorted.get(sorted.len() / 2)?;
    match sorted.len() % 2 {
        1 => Some(high),
        _ => Some((sorted[sorted.len() / 2 - 1] + high) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Spikes = Spikes { policy: Policy::Skip, factor: 3.0, window: 4 };

    fn after(losses: &[f64]) -> History {
        let mut history = History::default();
        losses.iter().for_each(|loss| history.add(&RULE, *loss, 1.0));
        history
    }

    #[test]
    fn a_spike_exceeds_the_median_of_a_full_window() {
        let spike = |losses: &[f64], loss, norm| after(losses).spike(&RULE, loss, norm);
        assert_eq!(spike(&[1.0, 1.0, 1.0], 100.0, 1.0), None, "three steps are too few");
        let window = [9.0, 1.0, 2.0, 3.0, 2.0];
        assert_eq!(spike(&window, 6.0, 3.0), None, "exactly the factor is no spike");
        let told = spike(&window, 6.01, 1.0).unwrap();
        assert_eq!(told, "loss 6.0100 is more than 3 times 2.0000, the median of 4 steps");
        let told = spike(&window, 1.0, 3.5).unwrap();
        assert_eq!(told, "gradient norm 3.5000 is more than 3 times 1.0000, the median of 4 steps");
    }

    #[test]
    fn what_is_not_finite_is_a_spike_from_the_first_step() {
        for (loss, norm, told) in [
            (f64::NAN, 1.0, "loss NaN"),
            (f64::INFINITY, 1.0, "loss inf"),
            (1.0, f64::INFINITY, "gradient norm inf"),
        ] {
            assert_eq!(History::default().spike(&RULE, loss, norm).as_deref(), Some(told));
        }
    }

    #[test]
    fn an_even_number_of_steps_has_the_mean_of_the_middle_two() {
        assert_eq!((median(&[]), median(&[4.0])), (None, Some(4.0)));
        assert_eq!((median(&[4.0, 1.0]), median(&[3.0, 1.0, 2.0])), (Some(2.5), Some(2.0)));
    }

    #[test]
    fn the_history_is_no_longer_than_the_window_and_reads_back() {
        let mut history = after(&[1.0, 2.0, 3.0, 4.0, 0.1]);
        assert_eq!(history.losses, [2.0, 3.0, 4.0, 0.1]);
        history.skip();
        history.skip();
        let text = serde_json::to_string(&history).unwrap();
        assert_eq!(serde_json::from_str::<History>(&text).unwrap(), history);
        assert_eq!(history.in_a_row, 2);
        history.add(&RULE, 1.0, 1.0);
        assert_eq!((history.skipped, history.in_a_row), (2, 0));
        assert_eq!(serde_json::from_str::<History>("{}").unwrap(), History::default(), "earlier checkpoints");
    }
}
