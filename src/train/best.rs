//! Evaluations -> the best of them, and the time to stop, as transformers' Trainer and its `EarlyStoppingCallback`
//! decide.

use serde::{Deserialize, Serialize};

/// The measures of an evaluation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Mean over the supervised tokens.
    pub loss: f64,
    /// Share of the supervised tokens that are the most probable ones.
    pub accuracy: f64,
    /// Number of the supervised tokens.
    pub tokens: u64,
}

/// The scores of one source of an evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceScores {
    /// The entry that it stands for.
    pub entry: usize,
    /// The source's name in metrics.
    pub name: String,
    /// The source's scores.
    pub scores: Scores,
}

/// An evaluation: over all tokens, and over those of each source if there are several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Over all sources.
    pub all: Scores,
    /// The losses of each source; empty if there is one.
    pub sources: Vec<SourceScores>,
}

impl Evaluation {
    /// Sums up the scores of several sources; each token counts the same.
    pub fn of(mut sources: Vec<SourceScores>) -> Evaluation {
        if sources.len() < 2 {
            let all = sources.pop().map_or(Scores::default(), |source| source.scores);
            return Evaluation { all, sources };
        }
        let tokens: u64 = sources.iter().map(|source| source.scores.tokens).sum();
        let mean = |value: &dyn Fn(&Scores) -> f64| {
            let parts = sources.iter().map(|source| value(&source.scores) * source.scores.tokens as f64);
            parts.sum::<f64>() / tokens.max(1) as f64
        };
        let (loss, accuracy) = (mean(&|scores| scores.loss), mean(&|scores| scores.accuracy));
        Evaluation { all: Scores { loss, accuracy, tokens }, sources }
    }

    /// `eval_NAME_loss` and `eval_NAME_mean_token_accuracy` of each source.
    pub fn by_source(&self) -> Vec<(String, f64)> {
        let metrics = self.sources.iter().flat_map(|SourceScores { name, scores, .. }| {
            let accuracy = (format!("eval_{name}_mean_token_accuracy"), scores.accuracy);
            [(format!("eval_{name}_loss"), scores.loss), accuracy]
        });
        metrics.collect()
    }
}

impl Scores {
    /// Returns the exponential of the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// The names that `metric_for_best_model` may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Mean loss.
    Loss,
    /// Exponential of the loss.
    Perplexity,
    /// Share of tokens that are the most probable ones.
    Accuracy,
}

impl Measure {
    /// Names without `eval_`, as metrics have them.
    pub const NAMES: [(&'static str, Measure); 3] = [
        ("loss", Measure::Loss),
        ("perplexity", Measure::Perplexity),
        ("mean_token_accuracy", Measure::Accuracy),
    ];

    /// Returns the measure of this name, with `eval_` or without.
    pub fn named(name: &str) -> Option<Measure> {
        let bare = name.strip_prefix("eval_").unwrap_or(name);
        Measure::NAMES.iter().find(|(name, _)| *name == bare).map(|(_, measure)| *measure)
    }

    /// Returns the name of the metric: `eval_loss` and so on.
    pub fn name(self) -> String {
        let (name, _) =
            Measure::NAMES.iter().find(|(_, measure)| *measure == self).expect("every measure has a name");
        format!("eval_{name}")
    }

    fn of(self, scores: &Scores) -> f64 {
        match self {
            Measure::Loss => scores.loss,
            Measure::Perplexity => scores.perplexity(),
            Measure::Accuracy => scores.accuracy,
        }
    }
}

/// The rules for comparing evaluations.
#[derive(Clone, Debug, PartialEq)]
pub struct Judging {
    /// The source whose scores decide, by its entry and its name; `None`: all together.
    pub source: Option<(usize, String)>,
    /// `metric_for_best_model`
    pub measure: Measure,
    /// `greater_is_better`
    pub greater: bool,
    /// `load_best_model_at_end`: the result is the adapter of the best evaluation.
    pub restore: bool,
    /// `None`: training goes to its end.
    pub stopping: Option<Stopping>,
}

impl Judging {
    /// Returns the name of the metric: `eval_loss`, `eval_NAME_loss` and so on.
    pub fn metric(&self) -> String {
        let name = self.measure.name();
        match &self.source {
            None => name,
            Some((_, source)) => name.replacen("eval_", &format!("eval_{source}_"), 1),
        }
    }
}

/// The condition under which training stops early.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stopping {
    /// Evaluations in a row without an improvement.
    pub patience: u64,
    /// The difference that an improvement must exceed.
    pub threshold: f64,
}

/// The best evaluation so far; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Best {
    /// The value of the best evaluation; `None` before the first evaluation.
    pub metric: Option<f64>,
    /// The step that it followed.
    pub step: u64,
    /// Evaluations in a row without an improvement.
    pub waited: u64,
    /// Training is to end.
    pub stop: bool,
}

impl Best {
    /// Takes an evaluation into account; true if it is the best so far.
    pub fn judge(&mut self, judging: &Judging, evaluation: &Evaluation, step: u64) -> bool {
        let scores = match &judging.source {
            None => Some(&evaluation.all),
            Some((entry, _)) => {
                let source = evaluation.sources.iter().find(|source| source.entry == *entry);
                source.map(|source| &source.scores)
            }
        };
        let Some(value) = scores.map(|scores| judging.measure.of(scores)) else { return false };
        let better = |than: f64| if judging.greater { value > than } else { value < than };
        // The callback compares with the best before this evaluation.
        if let Some(stopping) = judging.stopping {
            let improved =
                self.metric.is_none_or(|best| better(best) && (value - best).abs() > stopping.threshold);
            self.waited = if improved { 0 } else { self.waited + 1 };
            self.stop |= self.waited >= stopping.patience;
        }
        let is_best = self.metric.map_or(value.is_finite(), better);
        if is_best {
            (self.metric, self.step) = (Some(value), step);
        }
        is_best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the steps that were best, and the evaluation (from 1) after which training ends.
    fn course(judging: Judging, losses: &[f64]) -> (Vec<u64>, Option<u64>) {
        let (mut best, mut steps, mut end) = (Best::default(), Vec::new(), None);
        for (place, loss) in (1..).zip(losses) {
            let all = Scores { loss: *loss, ..Scores::default() };
            if best.judge(&judging, &Evaluation { all, sources: Vec::new() }, place) {
                steps.push(place);
            }
            if best.stop && end.is_none() {
                end = Some(place);
            }
        }
        (steps, end)
    }

    fn judging(stopping: Option<Stopping>) -> Judging {
        Judging { source: None, measure: Measure::Loss, greater: false, restore: true, stopping }
    }

    /// Recorded with transformers 5.24: TrainerState and EarlyStoppingCallback driven with these losses
    /// (tests/scripts/early_stopping.py).
    #[test]
    fn best_and_end_are_those_of_transformers() {
        let text = include_str!("../../tests/fixtures/early_stopping.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let losses: Vec<f64> = serde_json::from_value(case["values"].clone()).unwrap();
            let stopping = Stopping {
                patience: case["patience"].as_u64().unwrap(),
                threshold: case["threshold"].as_f64().unwrap(),
            };
            let judging = Judging { greater: case["greater"].as_bool().unwrap(), ..judging(Some(stopping)) };
            let (steps, end) = course(judging, &losses);
            assert_eq!(end, case["stopped_at"].as_u64(), "{case}");
            let until = end.unwrap_or(losses.len() as u64);
            let best = steps.into_iter().rfind(|step| *step <= until);
            assert_eq!(best, case["best_step"].as_u64(), "{case}");
        }
    }

    #[test]
    fn an_equal_value_is_no_better_and_nothing_is_better_than_nan() {
        assert_eq!(course(judging(None), &[2.0, 2.0, 1.0, 1.5]), (vec![1, 3], None));
        assert_eq!(course(judging(None), &[f64::NAN, 2.0]), (vec![2], None));
    }

    #[test]
    fn measures_are_named_with_and_without_their_prefix() {
        for (name, measure) in Measure::NAMES {
            assert_eq!(
                (Measure::named(name), Measure::named(&measure.name())),
                (Some(measure), Some(measure))
            );
        }
        assert_eq!(Measure::named("eval_rouge"), None);
    }
}
