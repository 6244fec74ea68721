//! A step or an evaluation -> a line of `metrics.jsonl`.

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum Metric {
    /// An optimizer step.
    Step {
        /// The step, counted from 1.
        step: u64,
        /// Mean loss since the last line.
        loss: f64,
        /// Norm of the step's gradient before clipping.
        grad_norm: f64,
        /// The step's learning rate.
        learning_rate: f64,
        /// Epochs done.
        epoch: f64,
        /// Tokens trained on so far.
        num_tokens: u64,
    },
    /// An evaluation.
    Evaluation {
        /// The step that it followed.
        step: u64,
        /// Epochs done.
        epoch: f64,
        /// Mean loss over the evaluation data.
        eval_loss: f64,
        /// Exponential of the loss.
        eval_perplexity: f64,
        /// Share of the supervised tokens that are the most probable ones.
        eval_mean_token_accuracy: f64,
        /// `eval_NAME_loss` and `eval_NAME_mean_token_accuracy` of each source, if there are several.
        #[serde(flatten)]
        sources: Named,
    },
}

/// Values by name, in an order of their own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Named(pub Vec<(String, f64)>);

impl serde::Serialize for Named {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl Metric {
    /// Returns the step that the line belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Metric::Step { step, .. } | Metric::Evaluation { step, .. } => *step,
        }
    }
}
