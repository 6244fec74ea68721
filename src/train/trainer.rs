//! Examples and a frozen decoder -> optimizer steps in their order, metrics and checkpoints.
//!
//! The loss of a step is the sum over its supervised tokens divided by their number, over all micro-batches of the
//! step. Gradient accumulation and packing therefore do not change what is minimised.

use std::time::Instant;

use candle_core::Tensor;

use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::model::batch::Batch;
use crate::model::decoder::Decoder;
use crate::model::lora::Trainable;
use crate::ops::dropout::mix;
use crate::ops::number::{Number, Numbers};
use crate::ops::{flat, out_of_memory};
use crate::report::{Event, Report, Stage, StepMetrics, Task, Unit};

use super::checkpoint::{self, Checkpoints, State};
use super::metric::Metric;
use super::moments::Moments;
use super::options::{Every, Options};
use super::order::{self, Steps};
use super::passes::Passes;
use super::sets::Sets;
use super::spike::Policy;
use super::trained::Trained;

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

/// The results of one optimizer step.
pub(super) struct Step {
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) learning_rate: f64,
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

pub(super) struct Trainer<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) adapter: &'a Trainable,
    pub(super) data: Sets<'a>,
    pub(super) options: &'a Options,
    pub(super) passes: &'a mut Passes,
    pub(super) report: &'a Report,
    pub(super) steps: Steps,
    pub(super) moments: Moments,
    pub(super) state: State,
    /// Steps queued. `state` counts those whose numbers are known.
    pub(super) sent: u64,
    pub(super) progress: Task,
    pub(super) began: Instant,
    /// Tokens that this process handled; a resumed run's earlier tokens are not included.
    pub(super) tokens_here: u64,
    /// Steps of this process.
    pub(super) steps_here: u64,
    /// Sum of the losses of this process's steps.
    pub(super) loss_sum: f64,
    /// Parameters of the best evaluation of this process.
    pub(super) best_params: Option<Tensor>,
    /// When the last evaluation ended, or training began.
    pub(super) evaluated_at: Instant,
    /// The queued step after which an evaluation is due by the clock. It is decided when the step is queued, so that
    /// the evaluation sees the parameters of that step.
    pub(super) due_by_clock: Option<u64>,
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
        let moments = Moments::zeros(adapter, options.eight_bit_moments)?;
        moments.note().into_iter().for_each(|note| report.note(Stage::Train, note));
        Ok(Trainer {
            moments,
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
                Err(error) if out_of_memory(&error) => {
                    let text = self.passes.shrink(self.sent + 1, &error)?;
                    self.report.warn(Stage::Train, text);
                }
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

    /// Whether an evaluation, a checkpoint or the end needs the parameters as they are after `done` steps.
    fn waits_after(&self, done: u64) -> bool {
        let evaluates = self.evaluates_after(done);
        // The next step is compared with all steps before it.
        let compares = self.options.spikes.is_some_and(|rule| rule.policy == Policy::Skip);
        done == self.steps.total || evaluates || compares || self.steps.due(self.options.checkpoint, done)
    }

    /// Most tokens per pass.
    pub(super) fn rows_max(&self) -> usize {
        self.passes.tokens_max()
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
            if self.steps.due(self.options.logging, done) || (last && self.options.logging != Every::Never) {
                self.log_step(&step, log)?;
            }
        }
        self.evaluate_if_due(checkpoints, log)?;
        if let Some(checkpoints) = checkpoints.filter(|_| self.steps.due(self.options.checkpoint, done)) {
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

    pub(super) fn epoch(&self) -> f64 {
        self.steps.epochs_done(self.state.step)
    }

    pub(super) fn save(&self, checkpoints: &Checkpoints) -> Result<()> {
        let params = &self.adapter.params;
        checkpoint::save(checkpoints, &self.state, params, &self.moments, self.options.checkpoints_max)
    }

    /// The fault for a signal. A checkpoint is written first if possible.
    pub(super) fn stop(&self, checkpoints: Option<&Checkpoints>) -> Fault {
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
