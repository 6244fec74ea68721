//! Batches -> optimizer steps: loss, gradient, clip, AdamW, schedule, evaluation, checkpoints. Knows no file format.

/// HF's TrainingArguments, the part that means something here. Filled by `plan`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub warmup: Warmup,
    /// Examples in one micro-batch (`per_device_train_batch_size`).
    pub batch_examples: usize,
    /// `per_device_eval_batch_size`.
    pub eval_batch_examples: usize,
    /// Micro-batches in one optimizer step (`gradient_accumulation_steps`).
    pub accumulation: usize,
    pub epochs: f64,
    /// Overrides `epochs` when given.
    pub steps_max: Option<u64>,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Clip to this global norm; `None` (HF: 0) never clips.
    pub grad_norm_max: Option<f64>,
    /// Put a step's examples behind one another in rows instead of padding each.
    pub packing: bool,
    /// Order of the examples in each epoch; `None` keeps the dataset's order.
    pub order_seed: Option<u64>,
    /// Dropout.
    pub seed: u64,
    pub logging: Every,
    pub evaluation: Every,
    pub checkpoint: Every,
    /// `save_total_limit`.
    pub checkpoints_max: Option<usize>,
}

/// When something happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Every {
    Never,
    Steps(u64),
    Epoch,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    Steps(u64),
    /// Share of all steps, rounded up as HF does.
    Ratio(f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    Linear,
    Cosine,
    Constant,
    ConstantWithWarmup,
}
