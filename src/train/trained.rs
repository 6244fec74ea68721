//! The results of a training: steps, losses, speed, and the step of the adapter.

/// The result of training.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Trained {
    /// Optimizer steps done, in all processes of the run.
    pub steps: u64,
    /// Loss of the first step of the run.
    pub first_loss: f64,
    /// Loss of the last step.
    pub loss: f64,
    /// Mean loss over all steps of this process, like transformers' `train_loss`.
    pub train_loss: f64,
    /// Loss of the last evaluation.
    pub eval_loss: Option<f64>,
    /// Tokens trained on, in all processes of the run.
    pub tokens: u64,
    /// Seconds that this process trained.
    pub seconds: f64,
    /// Tokens per second of this process.
    pub tokens_per_second: f64,
    /// The step after which this process resumed, if it did.
    pub resumed_at: Option<u64>,
    /// The best evaluation, if evaluations are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<BestEvaluation>,
    /// The step that the adapter is of; `None`: the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored_step: Option<u64>,
    /// Whether training ended early, since evaluations did not improve.
    #[serde(default)]
    pub stopped_early: bool,
    /// Steps that changed nothing, since they were spikes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped_steps: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The best evaluation of a run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct BestEvaluation {
    /// The step that it followed.
    pub step: u64,
    /// Name of the metric: `eval_loss` and so on.
    pub metric: String,
    /// Value of the metric.
    pub value: f64,
}

impl Trained {
    /// Returns the state of the training that the adapter is of, in words.
    pub fn adapter(&self) -> String {
        match (&self.best, self.restored_step) {
            (Some(best), Some(step)) => {
                format!("step {step}, the best by {} ({:.4})", best.metric, best.value)
            }
            (Some(best), None) if best.step == self.steps => {
                format!("step {}, the last and the best by {} ({:.4})", self.steps, best.metric, best.value)
            }
            _ => format!("step {}, the last", self.steps),
        }
    }
}
