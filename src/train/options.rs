//! The keys of transformers' TrainingArguments that have an effect in hone -> plain values. `plan` fills them.

use super::best::Judging;
use super::schedule::{Schedule, Warmup};
use super::spike::Spikes;

/// The keys of HF's TrainingArguments that have an effect in hone. `plan` fills them.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Peak of the learning rate.
    pub learning_rate: f64,
    /// The course of the learning rate after warm-up.
    pub schedule: Schedule,
    /// Steps in which the learning rate rises from 0.
    pub warmup: Warmup,
    /// Examples per micro-batch (`per_device_train_batch_size`).
    pub batch_examples: usize,
    /// Examples per batch of an evaluation (`per_device_eval_batch_size`).
    pub eval_batch_examples: usize,
    /// Micro-batches per optimizer step (`gradient_accumulation_steps`).
    pub accumulation: usize,
    /// Passes over the training data.
    pub epochs: f64,
    /// Number of optimizer steps; overrides `epochs`.
    pub steps_max: Option<u64>,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// Largest global norm of the gradient; a larger gradient is scaled down. `None` (HF: 0) never clips.
    pub grad_norm_max: Option<f64>,
    /// Lays the examples of a whole step one after the other, in batches of at most so many tokens. `None`: one
    /// micro-batch at a time.
    pub packing: Option<usize>,
    /// Seed of the order of the examples in each epoch; `None` keeps the dataset's order.
    pub order_seed: Option<u64>,
    /// Seed of dropout.
    pub seed: u64,
    /// The steps at which a line of metrics is logged.
    pub logging: Every,
    /// The steps at which the evaluation data is scored.
    pub evaluation: Every,
    /// The steps at which a checkpoint is written.
    pub checkpoint: Every,
    /// Most checkpoints to keep (`save_total_limit`).
    pub checkpoints_max: Option<usize>,
    /// Whether the base is evaluated before the first step (`eval_on_start`).
    pub eval_on_start: bool,
    /// No evaluation before so many steps, or epochs if it is due each epoch (`eval_delay`).
    pub eval_delay: f64,
    /// The choice of the best evaluation, and its consequences.
    pub judging: Option<Judging>,
    /// B learns at so many times the rate of A (LoRA+).
    pub loraplus_ratio: Option<f64>,
    /// Share of the target that goes to all tokens alike (`label_smoothing_factor`).
    pub label_smoothing: f64,
    /// Size of the noise on embeddings in training (`neftune_noise_alpha`); 0: none.
    pub neftune_alpha: f64,
    /// The definition of a spike and its consequence; `None`: no step is judged.
    pub spikes: Option<Spikes>,
    /// AdamW's moments take 8 bits each, in blocks, as bitsandbytes keeps them; otherwise 32.
    pub eight_bit_moments: bool,
}

impl Default for Options {
    /// Returns TRL's and KAITO's defaults, with packing.
    fn default() -> Options {
        Options {
            learning_rate: 2e-5,
            schedule: Schedule::Linear,
            warmup: Warmup::Steps(0),
            batch_examples: 1,
            eval_batch_examples: 8,
            accumulation: 1,
            epochs: 3.0,
            steps_max: None,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            grad_norm_max: Some(1.0),
            packing: Some(1024),
            order_seed: Some(42),
            seed: 42,
            logging: Every::Steps(10),
            evaluation: Every::Never,
            checkpoint: Every::Never,
            checkpoints_max: None,
            eval_on_start: false,
            eval_delay: 0.0,
            judging: None,
            loraplus_ratio: None,
            label_smoothing: 0.0,
            neftune_alpha: 0.0,
            spikes: None,
            eight_bit_moments: false,
        }
    }
}

/// The steps at which something happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Every {
    /// Never.
    Never,
    /// After every so many steps.
    Steps(u64),
    /// After every so many steps, as a share of all steps of the run, rounded up.
    Share(f64),
    /// After so many minutes since the last time, at the end of a step, and after the last step; for evaluations.
    Minutes(f64),
    /// At the end of every epoch and after the last step.
    Epoch,
    /// Each evaluation that is better than all before it; for checkpoints.
    Best,
}
