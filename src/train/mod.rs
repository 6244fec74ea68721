//! Examples -> optimizer steps: loss, gradient, clipping, AdamW, schedule, evaluation, checkpoints.
//!
//! The loss of a step is the sum over its supervised tokens divided by their number, over all micro-batches of the
//! step. Gradient accumulation and packing therefore do not change what is minimised.

pub mod best;
pub mod checkpoint;
pub mod order;
pub mod schedule;
pub mod spike;

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Tensor;

use crate::dataset::{Example, Examples};
use crate::facts::Keep;
use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::memory::Running;
use crate::model::batch::Batch;
use crate::model::decoder::Decoder;
use crate::model::lora::{Lora, Trainable};
use crate::ops::adamw::{self, Moments, Update};
use crate::ops::dropout::mix;
use crate::ops::number::{Number, Numbers};
use crate::ops::{flat, out_of_memory};
use crate::report::{Event, Report, Stage, StepMetrics, Task, Unit};

use best::{Best, Evaluation, Judging, Scores, SourceScores};
use checkpoint::State;
use order::Steps;
pub use schedule::Schedule;
use spike::{Policy, Spikes};

/// The keys of HF's TrainingArguments that have an effect in hone. `plan` fills them.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Peak of the learning rate.
    pub learning_rate: f64,
    /// How the learning rate changes after warm-up.
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
    /// When a line of metrics is logged.
    pub logging: Every,
    /// When the evaluation data is scored.
    pub evaluation: Every,
    /// When a checkpoint is written.
    pub checkpoint: Every,
    /// Most checkpoints to keep (`save_total_limit`).
    pub checkpoints_max: Option<usize>,
    /// The base is evaluated before the first step (`eval_on_start`).
    pub eval_on_start: bool,
    /// No evaluation before so many steps, or epochs if it is due each epoch (`eval_delay`).
    pub eval_delay: f64,
    /// Which evaluation is the best, and what follows from it.
    pub judging: Option<Judging>,
    /// B learns at so many times the rate of A (LoRA+).
    pub loraplus_ratio: Option<f64>,
    /// Share of the target that goes to all tokens alike (`label_smoothing_factor`).
    pub label_smoothing: f64,
    /// Size of the noise on embeddings in training (`neftune_noise_alpha`); 0: none.
    pub neftune_alpha: f64,
    /// What is a spike, and what follows from it; `None`: no step is judged.
    pub spikes: Option<Spikes>,
}

impl Default for Options {
    /// TRL's and KAITO's defaults, with packing.
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
        }
    }
}

/// When something happens.
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
    /// At each evaluation that is better than all before it; for checkpoints.
    Best,
}

/// The length of warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A share of all steps, rounded up as HF does.
    Ratio(f64),
}

impl Every {
    /// Whether it happens after `done` steps.
    fn due(self, done: u64, steps: &Steps) -> bool {
        match self {
            Every::Never | Every::Best => false,
            Every::Steps(every) => done.is_multiple_of(every.max(1)),
            Every::Share(share) => done.is_multiple_of(((steps.total as f64 * share).ceil() as u64).max(1)),
            Every::Minutes(_) => false, // The trainer looks at the clock.
            Every::Epoch => done.is_multiple_of(steps.per_epoch) || done == steps.total,
        }
    }
}

/// The folder of checkpoints, and the run that they must belong to.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    /// The folder.
    pub folder: PathBuf,
    /// Identifies model, data and options. A checkpoint of another run is not continued.
    pub fingerprint: String,
}

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
    /// Training ended before its end, since evaluations did not improve.
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
    /// Which state of the training the adapter is, in words.
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
        /// Share of the supervised tokens that are the most probable ones; `None` on a GPU.
        #[serde(skip_serializing_if = "Option::is_none")]
        eval_mean_token_accuracy: Option<f64>,
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
    /// The step that the line belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Metric::Step { step, .. } | Metric::Evaluation { step, .. } => *step,
        }
    }
}

/// Examples to train on, and examples to evaluate on.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Examples to train on.
    pub train: &'a [Example],
    /// Examples to evaluate on; may be empty.
    pub evaluation: &'a [Example],
}

/// Examples, wherever they are.
#[derive(Clone)]
pub struct Sets<'a> {
    /// Examples to train on.
    pub train: Examples<'a>,
    /// Examples to score, by source.
    pub evaluation: Vec<Source<'a>>,
}

/// Examples to score that come from one entry of the data.
#[derive(Clone)]
pub struct Source<'a> {
    /// The entry.
    pub entry: usize,
    /// Its name in metrics.
    pub name: String,
    /// Its examples.
    pub examples: Examples<'a>,
}

impl<'a> From<Data<'a>> for Sets<'a> {
    fn from(data: Data<'a>) -> Sets<'a> {
        let source = Source { entry: 0, name: String::new(), examples: data.evaluation.into() };
        Sets { train: data.train.into(), evaluation: vec![source] }
    }
}

/// The size of passes, and what the layers keep in them.
#[derive(Clone, Debug)]
pub enum Passes {
    /// Passes by the memory plan. If memory runs out, the next smaller plan follows.
    Planned(Box<Running>),
    /// Passes as large as the options make them, with every layer at one level.
    Fixed(Keep),
}

impl Passes {
    /// Passes by a memory plan.
    pub fn planned(running: Running) -> Passes {
        Passes::Planned(Box::new(running))
    }

    /// Most tokens per pass.
    fn tokens_max(&self) -> usize {
        match self {
            Passes::Planned(running) => running.plan.tokens,
            Passes::Fixed(_) => usize::MAX,
        }
    }

    /// The level of each layer.
    fn keep(&self, layers: usize) -> Vec<Keep> {
        match self {
            Passes::Planned(running) => running.plan.keep.clone(),
            Passes::Fixed(keep) => vec![*keep; layers],
        }
    }
}

/// Trains the adapter in place beside the frozen decoder. `log` receives each metric when it is known. Afterwards
/// `passes` holds the plan that the run ended with. A loss or gradient that is not finite, an adapter without
/// effect, memory that even the smallest plan exceeds, and a signal are faults.
#[allow(clippy::too_many_arguments)]
pub fn run<'a>(
    decoder: &Decoder,
    adapter: &Trainable,
    data: impl Into<Sets<'a>>,
    options: &Options,
    passes: &mut Passes,
    checkpoints: Option<&Checkpoints>,
    report: &Report,
    log: &mut dyn FnMut(&Metric) -> Result<()>,
) -> Result<Trained> {
    let mut trainer = Trainer::new(decoder, adapter, data.into(), options, passes, report)?;
    let resumed_at = trainer.resume(checkpoints)?;
    let began_at = trainer.state.step;
    trainer.evaluate_if_due(checkpoints, log)?;
    let mut behind: Option<Sent> = None;
    while trainer.sent < trainer.steps.total && !trainer.state.best.stop {
        let sent = if interrupt::requested() { None } else { trainer.send()? };
        let stopped = sent.is_none();
        trainer.look_at_the_clock();
        // A GPU works on this step while the numbers of the step before are copied to the host.
        if let Some(before) = std::mem::replace(&mut behind, sent) {
            trainer.settle(before, checkpoints, log)?;
        }
        if stopped {
            return Err(trainer.stop(checkpoints));
        }
        if let Some(sent) =
            behind.take_if(|sent| sent.numbers.are_here() || trainer.waits_after(trainer.sent))
        {
            trainer.settle(sent, checkpoints, log)?;
        }
    }
    let seconds = trainer.began.elapsed().as_secs_f64();
    let restored_step = trainer.restore_best(checkpoints)?;
    Ok(Trained {
        best: trainer.best(),
        restored_step,
        stopped_early: trainer.state.step < trainer.steps.total,
        skipped_steps: trainer.state.spikes.skipped,
        steps: trainer.state.step,
        first_loss: trainer.state.first_loss.unwrap_or(trainer.state.loss),
        loss: trainer.state.loss,
        train_loss: trainer.loss_sum / (trainer.state.step - began_at).max(1) as f64,
        eval_loss: trainer.state.eval_loss,
        tokens: trainer.state.tokens,
        seconds,
        tokens_per_second: trainer.tokens_here as f64 / seconds.max(1e-9),
        resumed_at,
    })
}

/// Loss and token accuracy over the supervised tokens of `examples`, without dropout, in passes of at most `rows_max`
/// tokens or one example. `Lora::None` evaluates the bare base.
pub fn evaluate<'a>(
    decoder: &Decoder,
    lora: Lora,
    examples: impl Into<Examples<'a>>,
    batch_examples: usize,
    rows_max: usize,
    report: &Report,
) -> Result<Scores> {
    let examples = examples.into();
    let progress = report.task(Stage::Evaluate, Unit::Rows, "evaluation", Some(examples.len() as u64));
    let (mut losses, mut tokens, mut hits) = (Vec::new(), 0_usize, Some(0));
    let indices: Vec<usize> = (0..examples.len()).collect();
    for group in indices.chunks(batch_examples.max(1)) {
        for batch in order::batches(examples, &[group.to_vec()], None, rows_max, |_| 0) {
            let (loss, found) = decoder.loss_and_hits(&batch, lora)?;
            losses.push(loss);
            hits = hits.zip(found).map(|(hits, found)| hits + found);
            tokens += batch.targets.len();
        }
        progress.advance(group.len() as u64);
        interrupt::check()?;
    }
    let loss: f64 = Numbers::send(&losses)?.values()?.into_iter().sum();
    let count = tokens.max(1) as f64;
    let accuracy = hits.map(|hits| hits as f64 / count);
    Ok(Scores { loss: loss / count, accuracy, tokens: tokens as u64 })
}

/// Steps after warm-up by which an adapter must have some effect.
const EFFECT_STEPS: u64 = 8;
/// Steps after warm-up by which some loss must differ from the first.
const CONSTANT_STEPS: u64 = 32;
/// The gradient norm from which a square may exceed f32: the root of its largest number.
const MOMENT_NORM_MAX: f64 = 1.8e19;

/// The results of one optimizer step.
struct Step {
    loss: f64,
    grad_norm: f64,
    learning_rate: f64,
}

/// An optimizer step that was queued. Its numbers may still be on their way to the host.
struct Sent {
    /// The loss sum of each pass, then the sums of squares of the gradient and of the updated parameters.
    numbers: Numbers,
    /// 1 / (supervised tokens of the step).
    scale: f64,
    tokens: u64,
    learning_rate: f64,
    /// Why the step was skipped, if it was.
    spike: Option<String>,
}

struct Trainer<'a> {
    decoder: &'a Decoder,
    adapter: &'a Trainable,
    data: Sets<'a>,
    options: &'a Options,
    passes: &'a mut Passes,
    report: &'a Report,
    steps: Steps,
    moments: Moments,
    state: State,
    /// Steps queued. `state` counts those whose numbers are known.
    sent: u64,
    progress: Task,
    began: Instant,
    /// Tokens that this process handled; a resumed run's earlier tokens are not included.
    tokens_here: u64,
    /// Steps of this process.
    steps_here: u64,
    /// Sum of the losses of this process's steps.
    loss_sum: f64,
    /// Parameters of the best evaluation of this process.
    best_params: Option<Tensor>,
    /// When the last evaluation ended, or training began.
    evaluated_at: Instant,
    /// The queued step after which an evaluation is due by the clock. It is decided when the step is queued, so that
    /// the evaluation sees the parameters of that step.
    due_by_clock: Option<u64>,
}

impl<'a> Trainer<'a> {
    fn new(
        decoder: &'a Decoder,
        adapter: &'a Trainable,
        data: Sets<'a>,
        options: &'a Options,
        passes: &'a mut Passes,
        report: &'a Report,
    ) -> Result<Trainer<'a>> {
        let steps = Steps::new(data.train.len(), options);
        let progress = report.task(Stage::Train, Unit::Steps, "training", Some(steps.total));
        Ok(Trainer {
            moments: Moments::zeros_like(&adapter.params)?,
            state: State::default(),
            sent: 0,
            began: Instant::now(),
            tokens_here: 0,
            steps_here: 0,
            loss_sum: 0.0,
            best_params: None,
            evaluated_at: Instant::now(),
            due_by_clock: None,
            decoder,
            adapter,
            data,
            options,
            passes,
            report,
            steps,
            progress,
        })
    }

    fn resume(&mut self, checkpoints: Option<&Checkpoints>) -> Result<Option<u64>> {
        let Some(checkpoints) = checkpoints else { return Ok(None) };
        let found = checkpoint::newest(checkpoints, &self.adapter.params, &self.moments, self.report)?;
        let Some(state) = found else { return Ok(None) };
        self.report
            .note(Stage::Train, format!("training continues after step {} from a checkpoint", state.step));
        self.adapter.refresh()?;
        self.progress.set(state.step);
        self.sent = state.step;
        self.state = state;
        Ok(Some(self.state.step))
    }

    /// Queues one optimizer step. Returns `None`, with nothing changed, if a signal came between its passes. A
    /// gradient that is not finite changes nothing either; `settle` finds it. If spikes are skipped, the step's numbers
    /// are awaited before the update.
    fn send(&mut self) -> Result<Option<Sent>> {
        let (losses, scale, tokens) = loop {
            match self.gradients() {
                Ok(Some(gradients)) => break gradients,
                Ok(None) => return Ok(None),
                Err(error) if out_of_memory(&error) => self.shrink(&error)?,
                Err(error) => return Err(error.into()),
            }
        };
        let warmup = self.options.warmup.steps(self.steps.total);
        let factor = self.options.schedule.factor(self.sent, self.steps.total, warmup);
        let learning_rate = self.options.learning_rate * factor;
        let squares = Number::squares(&self.adapter.grads)?;
        let spike = self.spike_to_skip(&losses, scale, &squares)?;
        if spike.is_none() {
            self.update(learning_rate, &squares)?;
        }
        let mut numbers = losses;
        numbers.extend([squares, Number::squares(&self.adapter.params)?]);
        self.sent += 1;
        Ok(Some(Sent { numbers: Numbers::send(&numbers)?, scale, tokens, learning_rate, spike }))
    }

    /// Why this step must be skipped, if it must. All steps before it are settled.
    fn spike_to_skip(&self, losses: &[Number], scale: f64, squares: &Number) -> Result<Option<String>> {
        let Some(rule) = self.options.spikes.filter(|rule| rule.policy == Policy::Skip) else {
            return Ok(None);
        };
        let values = Numbers::send(losses)?.values()?;
        let loss = values.iter().map(|loss| loss * scale).sum();
        Ok(self.state.spikes.spike(&rule, loss, squares.value()?.sqrt()))
    }

    /// Returns the loss sum of each pass, the factor on them, and the tokens of the step, and leaves the gradient
    /// in its buffer. Returns `None` after a signal. Only the gradient changes, so a step that ran out of memory
    /// can be repeated from its beginning.
    fn gradients(&self) -> candle_core::Result<Option<(Vec<Number>, f64, u64)>> {
        let batches = self.batches();
        let targets: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        let scale = 1.0 / targets.max(1) as f64;
        flat::zero(&self.adapter.grads)?;
        let keep = self.passes.keep(self.decoder.layers.len());
        let mut losses = Vec::with_capacity(batches.len());
        for batch in &batches {
            if interrupt::requested() {
                return Ok(None);
            }
            losses.push(self.decoder.forward_backward(self.adapter, &keep, batch, scale)?);
        }
        let tokens = batches.iter().map(Batch::rows).sum::<usize>() as u64;
        Ok(Some((losses, scale, tokens)))
    }

    /// Waits for a step's numbers and accounts for them.
    fn settle(
        &mut self,
        sent: Sent,
        checkpoints: Option<&Checkpoints>,
        log: &mut dyn FnMut(&Metric) -> Result<()>,
    ) -> Result<()> {
        let values = sent.numbers.values()?;
        let [losses @ .., squares, parameters] = values.as_slice() else {
            unreachable!("two sums of squares")
        };
        let loss = losses.iter().map(|loss| loss * sent.scale).sum();
        let step = Step { loss, grad_norm: squares.sqrt(), learning_rate: sent.learning_rate };
        match &sent.spike {
            None => self.judge_step(&step)?,
            Some(why) => self.skip(why)?,
        }
        // A finite gradient does not ensure a finite update: an epsilon of 0 can give 0 / 0, and values can
        // overflow.
        if !parameters.is_finite() {
            return Err(self.diverged("the update made parameters that are not finite"));
        }
        self.state.changed |= self.state.first_loss.is_some_and(|first| first != step.loss);
        self.refuse_no_effect()?;
        self.state.tokens += sent.tokens;
        self.tokens_here += sent.tokens;
        self.after_step(step, checkpoints, log)
    }

    /// Judges the numbers of a step that was done, and keeps them for later steps.
    fn judge_step(&mut self, step: &Step) -> Result<()> {
        self.refuse_divergence(step.loss, step.grad_norm)?;
        self.refuse_overflow(step.grad_norm)?;
        let Some(rule) = self.options.spikes else { return Ok(()) };
        if let Some(why) = self.state.spikes.spike(&rule, step.loss, step.grad_norm) {
            return Err(self.diverged(&format!("{why} (spike_policy: stop)")));
        }
        self.state.spikes.add(&rule, step.loss, step.grad_norm);
        Ok(())
    }

    /// Accounts for a step that was skipped.
    fn skip(&mut self, why: &str) -> Result<()> {
        self.state.spikes.skip();
        if self.state.spikes.in_a_row > spike::IN_A_ROW_MAX {
            let most = spike::IN_A_ROW_MAX;
            return Err(self.diverged(&format!("{why}, and the {most} steps before it were spikes too")));
        }
        let (step, count) = (self.state.step + 1, self.state.spikes.skipped);
        let text = format!("step {step} is a spike and changes nothing: {why}; skipped so far: {count}");
        self.report.warn(Stage::Train, text);
        Ok(())
    }

    /// Refuses a gradient whose squares are beyond f32, since the second moment becomes infinite there, and an infinite
    /// moment makes every later update zero.
    fn refuse_overflow(&self, grad_norm: f64) -> Result<()> {
        let clipped = self.options.grad_norm_max.map_or(grad_norm, |most| grad_norm.min(most));
        match clipped < MOMENT_NORM_MAX {
            true => Ok(()),
            false => {
                Err(self.diverged(&format!("a gradient norm of {grad_norm:.3e} overflows AdamW's moments")))
            }
        }
    }

    /// Refuses an adapter that has no effect although all numbers are finite: a zero gradient makes every update zero,
    /// and an update may be too small to change any result. It is checked some steps after warm-up, when the learning
    /// rate was above zero, and at the end.
    fn refuse_no_effect(&self) -> Result<()> {
        let done = self.state.step + 1;
        let warmup = self.options.warmup.steps(self.steps.total);
        let (early, last) = (warmup + EFFECT_STEPS, done == self.steps.total);
        let compares = done == warmup + CONSTANT_STEPS || (last && done >= early);
        // A loss of exactly 0 has nothing left to learn.
        if compares && !self.state.changed && self.state.first_loss.is_some_and(|loss| loss != 0.0) {
            return Err(Fault::new(
                Kind::Diverged,
                format!("the training changes nothing: the loss is exactly the same in all of {done} steps"),
            )
            .help("raise learning_rate or lora_alpha: the updates are too small to count; no adapter was written"));
        }
        if done != early && !last {
            return Ok(());
        }
        match self.adapter.is_without_effect()? {
            false => Ok(()),
            true => Err(Fault::new(
                Kind::Diverged,
                format!("the adapter has no effect after {done} steps: every value of lora_B is still zero"),
            )
            .help(
                "the updates are nothing: lower learning_rate or lora_alpha if they are far from the usual (a moment \
                 overflowed), raise them from 0; no adapter was written",
            )),
        }
    }

    /// Whether an evaluation, a checkpoint or the end needs the parameters as they are after `done` steps.
    fn waits_after(&self, done: u64) -> bool {
        let due = |every: Every| every.due(done, &self.steps);
        let evaluates = self.evaluates_after(done);
        // The next step is compared with all steps before it.
        let compares = self.options.spikes.is_some_and(|rule| rule.policy == Policy::Skip);
        done == self.steps.total || evaluates || compares || due(self.options.checkpoint)
    }

    /// Changes to the next smaller plan. If there is none, this is a capacity fault.
    fn shrink(&mut self, error: &candle_core::Error) -> Result<()> {
        let step = self.sent + 1;
        let Passes::Planned(memory) = &mut *self.passes else {
            return Err(Fault::capacity(format!("out of memory at step {step}: {error}")));
        };
        if !memory.shrink() {
            return Err(Fault::capacity(format!(
                "out of memory at step {step} with the smallest plan, {}: {error}",
                memory.plan.choice()
            ))
            .help("lower TrainingArguments.max_length or LoraConfig.r, or use a machine with more memory"));
        }
        let text = format!(
            "out of memory at step {step}; the step is repeated with a smaller plan: {}",
            memory.plan.choice()
        );
        self.report.warn(Stage::Train, text);
        Ok(())
    }

    /// Most tokens per pass.
    fn rows_max(&self) -> usize {
        self.passes.tokens_max()
    }

    fn batches(&self) -> Vec<Batch> {
        let step = self.sent;
        let epoch = mix(self.options.seed ^ mix(self.steps.epoch(step)));
        let key = |example: usize| mix(epoch ^ example as u64);
        let micro_batches = self.steps.micro_batches(step);
        let mut batches =
            order::batches(self.data.train, &micro_batches, self.options.packing, self.rows_max(), key);
        let (smoothing, noise) = (self.options.label_smoothing, self.options.neftune_alpha);
        batches.iter_mut().for_each(|batch| (batch.label_smoothing, batch.noise) = (smoothing, noise));
        // The next step's tokens come from the disk while this step is computed.
        if step + 1 < self.steps.total {
            let next = self.steps.micro_batches(step + 1);
            next.iter().flatten().for_each(|&example| self.data.train.will_need(example));
        }
        batches
    }

    fn refuse_divergence(&self, loss: f64, grad_norm: f64) -> Result<()> {
        if loss.is_finite() && grad_norm.is_finite() {
            return Ok(());
        }
        Err(self.diverged(&format!("loss {loss}, gradient norm {grad_norm}")))
    }

    fn diverged(&self, what: &str) -> Fault {
        Fault::new(Kind::Diverged, format!("training diverged at step {}: {what}", self.state.step + 1))
            .help("lower TrainingArguments.learning_rate or add warmup_steps; no adapter was written")
    }

    /// Clips by the global norm as torch does (`max / (norm + 1e-6)`, at most 1) and updates. `squares` is the sum of
    /// squares of the gradient.
    fn update(&mut self, learning_rate: f64, squares: &Number) -> Result<()> {
        let update = Update {
            learning_rate,
            beta1: self.options.beta1,
            beta2: self.options.beta2,
            epsilon: self.options.epsilon,
            weight_decay: self.options.weight_decay,
            // Skipped steps left the moments as they were.
            step: self.sent + 1 - self.state.spikes.skipped,
            norm_max: self.options.grad_norm_max,
        };
        let trainable = self.adapter;
        match self.options.loraplus_ratio {
            None => {
                let (params, grads) = (&trainable.params, &trainable.grads);
                adamw::step(params, grads, &self.moments, &update, squares, trainable.copy())?;
            }
            Some(ratio) => self.update_by_matrix(&update, ratio, squares)?,
        }
        Ok(())
    }

    /// LoRA+ (Hayou and others 2024): each A at the learning rate, each B at `ratio` times it.
    fn update_by_matrix(&self, update: &Update, ratio: f64, squares: &Number) -> Result<()> {
        let trainable = self.adapter;
        let faster = Update { learning_rate: update.learning_rate * ratio, ..*update };
        for site in &trainable.sites {
            let a = site.rank * site.projection.cols;
            let b = site.rank * site.projection.rows;
            for (from, count, update) in [(site.offset, a, update), (site.offset + a, b, &faster)] {
                let part = |flat: &Tensor| flat.narrow(0, from, count);
                let moments =
                    Moments { first: part(&self.moments.first)?, second: part(&self.moments.second)? };
                let (params, grads) = (part(&trainable.params)?, part(&trainable.grads)?);
                let copy = trainable.copy().map(part).transpose()?;
                adamw::step(&params, &grads, &moments, update, squares, copy.as_ref())?;
            }
        }
        Ok(())
    }

    fn after_step(
        &mut self,
        step: Step,
        checkpoints: Option<&Checkpoints>,
        log: &mut dyn FnMut(&Metric) -> Result<()>,
    ) -> Result<()> {
        self.state.step += 1;
        self.steps_here += 1;
        self.progress.advance(1);
        let done = self.state.step;
        let last = done == self.steps.total;
        // A skipped step's loss may be no number; then it is no part of any mean, and the next line tells of the rest.
        if step.loss.is_finite() && step.grad_norm.is_finite() {
            self.state.first_loss.get_or_insert(step.loss);
            self.state.loss = step.loss;
            self.state.window_loss += step.loss;
            self.state.window_steps += 1;
            self.loss_sum += step.loss;
            if self.options.logging.due(done, &self.steps) || (last && self.options.logging != Every::Never) {
                self.log_step(&step, log)?;
            }
        }
        self.evaluate_if_due(checkpoints, log)?;
        if let Some(checkpoints) = checkpoints.filter(|_| self.options.checkpoint.due(done, &self.steps)) {
            self.save(checkpoints)?;
        }
        Ok(())
    }

    /// Logs the mean loss since the last line, as transformers does.
    fn log_step(&mut self, step: &Step, log: &mut dyn FnMut(&Metric) -> Result<()>) -> Result<()> {
        let seconds = self.began.elapsed().as_secs_f64().max(1e-9);
        let metrics = StepMetrics {
            step: self.state.step,
            loss: self.state.window_loss / self.state.window_steps as f64,
            grad_norm: step.grad_norm,
            learning_rate: step.learning_rate,
            epoch: self.epoch(),
            num_tokens: self.state.tokens,
            tokens_per_second: self.tokens_here as f64 / seconds,
            eta_seconds: seconds / self.steps_here as f64 * (self.steps.total - self.state.step) as f64,
        };
        (self.state.window_loss, self.state.window_steps) = (0.0, 0);
        log(&Metric::Step {
            step: metrics.step,
            loss: metrics.loss,
            grad_norm: metrics.grad_norm,
            learning_rate: metrics.learning_rate,
            epoch: metrics.epoch,
            num_tokens: metrics.num_tokens,
        })?;
        self.report.say(Event::Step(metrics));
        Ok(())
    }

    /// Evaluates after the step just done. A resumed run first makes up for an evaluation that a signal prevented.
    fn evaluate_if_due(
        &mut self,
        checkpoints: Option<&Checkpoints>,
        log: &mut dyn FnMut(&Metric) -> Result<()>,
    ) -> Result<()> {
        let (step, epoch) = (self.state.step, self.epoch());
        let done = step == self.state.evaluated_step && (step > 0 || self.state.eval_loss.is_some());
        if done || !self.evaluates_after(step) {
            return Ok(());
        }
        let evaluation = match self.evaluation() {
            Err(_) if interrupt::requested() => return Err(self.stop(checkpoints)),
            evaluated => evaluated?,
        };
        self.evaluated_at = Instant::now();
        let scores = &evaluation.all;
        (self.state.eval_loss, self.state.evaluated_step) = (Some(scores.loss), step);
        let sources = evaluation.by_source();
        log(&Metric::Evaluation {
            step,
            epoch,
            eval_loss: scores.loss,
            eval_perplexity: scores.perplexity(),
            eval_mean_token_accuracy: scores.accuracy,
            sources: Named(sources.clone()),
        })?;
        let (eval_loss, accuracy) = (scores.loss, scores.accuracy);
        self.report.say(Event::Evaluated { step, epoch, eval_loss, accuracy, sources });
        // The untrained adapter is no candidate, as in transformers.
        if step > 0 { self.judge(&evaluation, checkpoints) } else { Ok(()) }
    }

    /// Scores every source.
    fn evaluation(&self) -> Result<Evaluation> {
        let (batch, lora) = (self.options.eval_batch_examples, self.adapter.evaluated());
        let score = |source: &Source| {
            let Source { entry, name, examples } = source.clone();
            let scores = evaluate(self.decoder, lora, examples, batch, self.rows_max(), self.report)?;
            Ok(SourceScores { entry, name, scores })
        };
        let there = self.data.evaluation.iter().filter(|source| !source.examples.is_empty());
        Ok(Evaluation::of(there.map(score).collect::<Result<_>>()?))
    }

    /// Decides whether an evaluation is due by the clock after the step that was queued last.
    fn look_at_the_clock(&mut self) {
        if let Every::Minutes(minutes) = self.options.evaluation
            && self.evaluated_at.elapsed().as_secs_f64() >= minutes * 60.0
        {
            self.due_by_clock = Some(self.sent);
        }
    }

    /// Whether an evaluation is due after `done` steps.
    fn evaluates_after(&self, done: u64) -> bool {
        if self.data.evaluation.iter().all(|source| source.examples.is_empty()) {
            return false;
        }
        if done == 0 {
            return self.options.eval_on_start;
        }
        let (every, last) = (self.options.evaluation, done == self.steps.total);
        match every {
            Every::Steps(_) | Every::Share(_) => {
                (last || every.due(done, &self.steps)) && self.options.eval_delay <= done as f64
            }
            Every::Minutes(_) => {
                (last || self.due_by_clock == Some(done)) && self.options.eval_delay <= done as f64
            }
            _ => every.due(done, &self.steps) && self.options.eval_delay <= self.steps.epochs_done(done),
        }
    }

    /// Compares an evaluation with those before it, and keeps the parameters of the best.
    fn judge(&mut self, evaluation: &Evaluation, checkpoints: Option<&Checkpoints>) -> Result<()> {
        let Some(judging) = &self.options.judging else { return Ok(()) };
        let step = self.state.step;
        let is_best = self.state.best.judge(judging, evaluation, step);
        if self.state.best.stop {
            let Best { waited, step: best, .. } = self.state.best;
            let text =
                format!("stops early: {waited} evaluations without an improvement on that of step {best}");
            self.report.note(Stage::Train, text);
        }
        if !is_best {
            return Ok(());
        }
        if judging.restore {
            self.best_params = Some(self.adapter.params.to_device(&candle_core::Device::Cpu)?.copy()?);
            if let Some(checkpoints) = checkpoints {
                checkpoint::save_best(checkpoints, &self.state, &self.adapter.params)?;
            }
        }
        match checkpoints.filter(|_| self.options.checkpoint == Every::Best) {
            Some(checkpoints) => self.save(checkpoints),
            None => Ok(()),
        }
    }

    /// `load_best_model_at_end`: the parameters of the best evaluation, and its step; `None` if they are those in
    /// force.
    fn restore_best(&mut self, checkpoints: Option<&Checkpoints>) -> Result<Option<u64>> {
        let restores = self.options.judging.as_ref().is_some_and(|judging| judging.restore);
        let step = self.state.best.step;
        if !restores || self.state.best.metric.is_none() || step == self.state.step {
            return Ok(None);
        }
        let kept = match self.best_params.take() {
            Some(params) => Some(params),
            None => checkpoints.and_then(|checkpoints| checkpoint::best(checkpoints, step)),
        };
        let Some(params) = kept else {
            let text = format!(
                "the adapter of step {step}, the best, is no longer there: the last one is the result"
            );
            self.report.warn(Stage::Train, text);
            return Ok(None);
        };
        flat::write(&self.adapter.params, &params)?;
        self.adapter.refresh()?;
        self.report.note(Stage::Train, format!("the adapter of step {step}, the best, is the result"));
        Ok(Some(step))
    }

    fn best(&self) -> Option<BestEvaluation> {
        let (judging, value) = (self.options.judging.as_ref()?, self.state.best.metric?);
        Some(BestEvaluation { step: self.state.best.step, metric: judging.metric(), value })
    }

    fn epoch(&self) -> f64 {
        self.steps.epochs_done(self.state.step)
    }

    fn save(&self, checkpoints: &Checkpoints) -> Result<()> {
        let params = &self.adapter.params;
        checkpoint::save(checkpoints, &self.state, params, &self.moments, self.options.checkpoints_max)
    }

    /// The fault for a signal. A checkpoint is written first if possible.
    fn stop(&self, checkpoints: Option<&Checkpoints>) -> Fault {
        let step = self.state.step;
        let saved = match checkpoints {
            Some(checkpoints) if step > 0 => self.save(checkpoints),
            _ => Err(Fault::internal("nothing to save")),
        };
        match saved {
            Ok(()) => Fault::new(
                Kind::Interrupted,
                format!("stopped by a signal after step {step}; checkpoint written"),
            )
            .help("start it again with the same output folder to continue from there"),
            Err(why) => Fault::new(
                Kind::InterruptedUnsaved,
                format!("stopped by a signal after step {step}, not saved: {}", why.message),
            ),
        }
    }
}

#[cfg(test)]
mod tests;
