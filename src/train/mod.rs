//! Examples -> optimizer steps: loss, gradient, clip, AdamW, schedule, evaluation, checkpoints.
//!
//! The loss of a step is the sum over its supervised tokens divided by their number, over all micro-batches
//! of the step: gradient accumulation and packing do not change what is minimised.

pub mod checkpoint;
pub mod order;
pub mod schedule;

use std::path::PathBuf;
use std::time::Instant;

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

use checkpoint::State;
use order::Steps;

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
    /// Lay the examples of a whole step behind one another, up to so many tokens at a time; `None`: a
    /// micro-batch at a time.
    pub packing: Option<usize>,
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
        }
    }
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

impl Every {
    /// Whether it is due after `done` steps.
    fn due(self, done: u64, steps: &Steps) -> bool {
        match self {
            Every::Never => false,
            Every::Steps(every) => done.is_multiple_of(every.max(1)),
            Every::Epoch => done.is_multiple_of(steps.per_epoch) || done == steps.total,
        }
    }
}

/// Where checkpoints live, and what they must belong to.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    pub folder: PathBuf,
    /// Identifies model, data and options: a checkpoint of another run is not continued.
    pub fingerprint: String,
}

/// How training went.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Trained {
    pub steps: u64,
    /// Of the first step of the run.
    pub first_loss: f64,
    /// Of the last step.
    pub loss: f64,
    /// Mean over all steps of this process, as transformers' `train_loss`.
    pub train_loss: f64,
    pub eval_loss: Option<f64>,
    pub tokens: u64,
    pub seconds: f64,
    pub tokens_per_second: f64,
    pub resumed_at: Option<u64>,
}

/// A line for `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum Metric {
    Step { step: u64, loss: f64, grad_norm: f64, learning_rate: f64, epoch: f64, num_tokens: u64 },
    Evaluation { step: u64, epoch: f64, eval_loss: f64 },
}

impl Metric {
    pub fn step(&self) -> u64 {
        match self {
            Metric::Step { step, .. } | Metric::Evaluation { step, .. } => *step,
        }
    }
}

/// Examples in memory.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// Examples to train on.
    pub train: &'a [Example],
    /// Examples to score.
    pub evaluation: &'a [Example],
}

/// Examples, wherever they are.
#[derive(Clone, Copy)]
pub struct Sets<'a> {
    /// Examples to train on.
    pub train: Examples<'a>,
    /// Examples to score.
    pub evaluation: Examples<'a>,
}

impl<'a> From<Data<'a>> for Sets<'a> {
    fn from(data: Data<'a>) -> Sets<'a> {
        Sets { train: data.train.into(), evaluation: data.evaluation.into() }
    }
}

/// How large passes are, and what the layers keep in them.
#[derive(Clone, Debug)]
pub enum Passes {
    /// As the memory plan says; running out of memory takes the next smaller plan.
    Planned(Box<Running>),
    /// Each as large as the options make it, with every layer at one level.
    Fixed(Keep),
}

impl Passes {
    /// Passes by a memory plan.
    pub fn planned(running: Running) -> Passes {
        Passes::Planned(Box::new(running))
    }

    /// Most tokens of a pass.
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

/// Trains the adapter in place beside the frozen decoder. `log` receives each metric as it is made, from the first step
/// on. `passes` holds afterwards what the run ended with.
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
    while trainer.sent < trainer.steps.total {
        let sent = if interrupt::requested() { None } else { trainer.send()? };
        let stopped = sent.is_none();
        // A GPU works on this step while the numbers of the one before come home.
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
    Ok(Trained {
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

/// Mean loss over the supervised tokens of `examples`, without dropout, in passes of at most `rows_max` tokens or one
/// example. `Lora::None` evaluates the bare base.
pub fn evaluate<'a>(
    decoder: &Decoder,
    lora: Lora,
    examples: impl Into<Examples<'a>>,
    batch_examples: usize,
    rows_max: usize,
    report: &Report,
) -> Result<f64> {
    let examples = examples.into();
    let progress = report.task(Stage::Evaluate, Unit::Rows, "evaluation", Some(examples.len() as u64));
    let (mut losses, mut tokens) = (Vec::new(), 0);
    let indices: Vec<usize> = (0..examples.len()).collect();
    for group in indices.chunks(batch_examples.max(1)) {
        for batch in order::batches(examples, &[group.to_vec()], None, rows_max, |_| 0) {
            losses.push(decoder.loss(&batch, lora)?);
            tokens += batch.targets.len();
        }
        progress.advance(group.len() as u64);
        interrupt::check()?;
    }
    let loss: f64 = Numbers::send(&losses)?.values()?.into_iter().sum();
    Ok(loss / tokens.max(1) as f64)
}

/// Steps with a learning rate after which an adapter has some effect.
const EFFECT_STEPS: u64 = 8;

/// What one optimizer step gave.
struct Step {
    loss: f64,
    grad_norm: f64,
    learning_rate: f64,
}

/// An optimizer step that was asked for; its numbers may still be on their way.
struct Sent {
    /// The loss sum of each pass, then the sums of squares of the gradient and of the updated parameters.
    numbers: Numbers,
    /// One over the step's supervised tokens.
    scale: f64,
    tokens: u64,
    learning_rate: f64,
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
    /// Steps asked for; `state` counts those whose numbers are known.
    sent: u64,
    progress: Task,
    began: Instant,
    /// Tokens this process handled; a resumed run's earlier tokens are not included.
    tokens_here: u64,
    steps_here: u64,
    loss_sum: f64,
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
        self.report.note(Stage::Train, format!("continues after step {} from a checkpoint", state.step));
        self.adapter.refresh()?;
        self.progress.set(state.step);
        self.sent = state.step;
        self.state = state;
        Ok(Some(self.state.step))
    }

    /// Asks for one optimizer step; `None` if a signal came between its passes, with nothing changed. A gradient that
    /// is not finite changes nothing either; `settle` finds it.
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
        let mut numbers = losses;
        numbers.extend(self.update(learning_rate)?);
        self.sent += 1;
        Ok(Some(Sent { numbers: Numbers::send(&numbers)?, scale, tokens, learning_rate }))
    }

    /// The loss sum of each pass, the factor on them, and the tokens of the step; the gradient is left in its buffer.
    /// `None` after a signal. Nothing but the gradient changes, so that a step that ran out of memory can be done again
    /// from its beginning.
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

    /// Waits for a step's numbers and accounts for it.
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
        self.refuse_divergence(step.loss, step.grad_norm)?;
        // A finite gradient does not make a finite update: 0 / 0 with an epsilon of 0, or overflow.
        if !parameters.is_finite() {
            return Err(self.diverged("the update made parameters that are not finite"));
        }
        self.refuse_no_effect()?;
        self.state.tokens += sent.tokens;
        self.tokens_here += sent.tokens;
        self.after_step(step, checkpoints, log)
    }

    /// Finite numbers can lie: a second moment that overflowed makes every update zero, and so does a gradient of nothing.
    /// Looked at some steps after the warm-up, when the learning rate has been more than nothing, and at the end.
    fn refuse_no_effect(&self) -> Result<()> {
        let done = self.state.step + 1;
        let early = self.options.warmup.steps(self.steps.total) + EFFECT_STEPS;
        if done != early && done != self.steps.total {
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

    /// Whether something must see the parameters as they are after `done` steps.
    fn waits_after(&self, done: u64) -> bool {
        let due = |every: Every| every.due(done, &self.steps);
        let evaluates = !self.data.evaluation.is_empty() && due(self.options.evaluation);
        done == self.steps.total || evaluates || due(self.options.checkpoint)
    }

    /// Goes on with the next smaller plan.
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
            .help("lower TrainingArguments.max_length or LoraConfig.r, or take a machine with more memory"));
        }
        let text = format!("out of memory at step {step}, which is done again: {}", memory.plan.choice());
        self.report.warn(Stage::Train, text);
        Ok(())
    }

    /// Most tokens of a pass.
    fn rows_max(&self) -> usize {
        self.passes.tokens_max()
    }

    fn batches(&self) -> Vec<Batch> {
        let step = self.sent;
        let epoch = mix(self.options.seed ^ mix(self.steps.epoch(step)));
        let key = |example: usize| mix(epoch ^ example as u64);
        let micro_batches = self.steps.micro_batches(step);
        let batches =
            order::batches(self.data.train, &micro_batches, self.options.packing, self.rows_max(), key);
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

    /// Clips by the global norm as torch does (`max / (norm + 1e-6)`, at most 1) and updates. Returns the sums of
    /// squares of the gradient and of the new parameters.
    fn update(&mut self, learning_rate: f64) -> Result<[Number; 2]> {
        let update = Update {
            learning_rate,
            beta1: self.options.beta1,
            beta2: self.options.beta2,
            epsilon: self.options.epsilon,
            weight_decay: self.options.weight_decay,
            step: self.sent + 1,
            norm_max: self.options.grad_norm_max,
        };
        let trainable = self.adapter;
        let squares = Number::squares(&trainable.grads)?;
        let (params, grads) = (&trainable.params, &trainable.grads);
        adamw::step(params, grads, &self.moments, &update, &squares, trainable.copy())?;
        let parameters = Number::squares(&trainable.params)?;
        Ok([squares, parameters])
    }

    fn after_step(
        &mut self,
        step: Step,
        checkpoints: Option<&Checkpoints>,
        log: &mut dyn FnMut(&Metric) -> Result<()>,
    ) -> Result<()> {
        self.state.step += 1;
        self.state.first_loss.get_or_insert(step.loss);
        self.state.loss = step.loss;
        self.state.window_loss += step.loss;
        self.state.window_steps += 1;
        self.steps_here += 1;
        self.loss_sum += step.loss;
        self.progress.advance(1);
        let done = self.state.step;
        let last = done == self.steps.total;
        if self.options.logging.due(done, &self.steps) || (last && self.options.logging != Every::Never) {
            self.log_step(&step, log)?;
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

    /// Evaluates after the step just done, or, continued, after the step that a signal cut off from its evaluation.
    fn evaluate_if_due(
        &mut self,
        checkpoints: Option<&Checkpoints>,
        log: &mut dyn FnMut(&Metric) -> Result<()>,
    ) -> Result<()> {
        let (step, epoch) = (self.state.step, self.epoch());
        let due = !self.data.evaluation.is_empty() && self.options.evaluation.due(step, &self.steps);
        if !due || step == self.state.evaluated_step {
            return Ok(());
        }
        let batch = self.options.eval_batch_examples;
        let (lora, examples) = (self.adapter.evaluated(), self.data.evaluation);
        let eval_loss = match evaluate(self.decoder, lora, examples, batch, self.rows_max(), self.report) {
            Err(_) if interrupt::requested() => return Err(self.stop(checkpoints)),
            evaluated => evaluated?,
        };
        (self.state.eval_loss, self.state.evaluated_step) = (Some(eval_loss), step);
        log(&Metric::Evaluation { step, epoch, eval_loss })?;
        self.report.say(Event::Evaluated { step, epoch, eval_loss });
        Ok(())
    }

    fn epoch(&self) -> f64 {
        self.steps.epochs_done(self.state.step)
    }

    fn save(&self, checkpoints: &Checkpoints) -> Result<()> {
        let params = &self.adapter.params;
        checkpoint::save(checkpoints, &self.state, params, &self.moments, self.options.checkpoints_max)
    }

    /// The end by a signal: saves first where that is possible.
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
            .help("start it again with the same output folder: it continues from there"),
            Err(why) => Fault::new(
                Kind::InterruptedUnsaved,
                format!("stopped by a signal after step {step}, not saved: {}", why.message),
            ),
        }
    }
}

#[cfg(test)]
mod tests;
