//! Examples and a frozen decoder -> optimizer steps in their order, metrics and checkpoints.
//!
//! The loss of a step is the sum over its supervised tokens divided by their number, over all micro-batches of the
//! step. Gradient accumulation and packing therefore do not change what is minimised.

use std::cell::RefCell;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Kind, Result};
use crate::interrupt;
use crate::model::decoder::Decoder;
use crate::model::lora::Trainable;
use crate::model::recorded::{Done, Recorder, TrainingPass};
use crate::model::residency::{Ring, Together};
use crate::ops::dropout::mix;
use crate::ops::number::{Number, Numbers};
use crate::ops::{flat, out_of_memory};
use crate::ranks::{Alone, Collective};
use crate::report::{Event, Report, Stage, StepMetrics, Task, Unit};

use super::checkpoint::{self, Checkpoints, State};
use super::deal::Cost;
use super::metric::Metric;
use super::moments::Moments;
use super::options::{Every, Options};
use super::order::{self, Rows, Share, Steps};
use super::passes::Passes;
use super::pieces::{Cut, Sums};
use super::sets::Sets;
use super::spike::Policy;
use super::together::{Outcome, Said, agree};
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
    run_together(&Alone, decoder, adapter, data, options, passes, checkpoints, report, log)
}

/// Does `run` together with the other ranks, which have the same decoder, data and options. An optimizer step has the
/// same examples for every number of ranks. Rank 0 alone reads and writes `checkpoints`, sends events to `report` and
/// calls `log`; every rank ends with the same adapter, or with a fault of the same kind.
#[allow(clippy::too_many_arguments)]
pub fn run_together<'a>(
    ranks: &dyn Collective,
    decoder: &Decoder,
    adapter: &Trainable,
    data: impl Into<Sets<'a>>,
    options: &Options,
    passes: &mut Passes,
    checkpoints: Option<&Checkpoints>,
    report: &Report,
    log: &mut dyn FnMut(&Metric) -> Result<()>,
) -> Result<Trained> {
    let (silent, mut unlogged) = (Report::silent(), |_: &Metric| Ok(()));
    let leads = ranks.place().leads();
    let log: &mut dyn FnMut(&Metric) -> Result<()> = if leads { log } else { &mut unlogged };
    let report = if leads { report } else { &silent };
    let ended = Trainer::new(ranks, decoder, adapter, data.into(), options, passes, report)
        .and_then(|trainer| trainer.train(checkpoints.filter(|_| leads), log));
    if let Err(fault) = &ended {
        // A rank that failed by itself reports its fault in any call that the others are in. If they know it, they
        // report the same.
        ranks.fails(fault);
    }
    ended
}

/// The results of one optimizer step.
pub(super) struct Step {
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) learning_rate: f64,
}

/// An optimizer step that was queued. Its numbers may still be on their way to the host.
struct Sent {
    /// The loss sum of each pass, or of all passes of all ranks, then the sums of squares of the gradient and of the
    /// updated parameters.
    numbers: Numbers,
    /// 1 / (supervised tokens of the step).
    scale: f64,
    tokens: u64,
    learning_rate: f64,
    /// The reason why the step was skipped, if it was.
    spike: Option<String>,
}

/// The gradient of one optimizer step, which lies in its buffer.
struct Gradient {
    /// The loss sum of each pass, or of all passes of all ranks.
    losses: Vec<Number>,
    /// The factor on them: 1 / (supervised tokens of the step).
    scale: f64,
    /// Tokens of the step.
    tokens: u64,
    /// Whether rank 0's clock says that an evaluation is due.
    clock: bool,
}

/// A rank's message to the others after its passes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Beat {
    /// Steps whose numbers are known.
    step: u64,
    /// The bits of the last known sums of squares, of the gradient and of the updated parameters. They are equal on all
    /// ranks.
    squares: [u64; 2],
    /// Whether an evaluation is due by this rank's clock. Rank 0's counts.
    clock: bool,
}

/// A rank's message to the others before the first step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Start {
    /// Number of examples to train on, of steps, and of parameters. They are equal on all ranks.
    sizes: [u64; 3],
    /// Most tokens per pass by this rank's memory. The least counts.
    rows_max: usize,
    /// The state of the checkpoint that rank 0 continues from.
    state: Option<State>,
}

pub(super) struct Trainer<'a> {
    pub(super) ranks: &'a dyn Collective,
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
    /// The time at which the last evaluation ended, or training began.
    pub(super) evaluated_at: Instant,
    /// The queued step after which an evaluation is due by the clock. It is decided when the step is queued, so that
    /// the evaluation sees the parameters of that step.
    pub(super) due_by_clock: Option<u64>,
    /// Most tokens per pass: the least of all ranks, so that every rank lays the same passes.
    pub(super) rows_max: usize,
    /// The costs of examples, for dealing them to the ranks.
    pub(super) cost: Cost,
    /// The pieces in which the ranks add up their gradients.
    cut: Cut,
    /// The sums of squares of the step before, of the gradient and of the updated parameters.
    squares: [f64; 2],
    /// The graphs of passes on a GPU.
    recorder: RefCell<Recorder>,
}

impl<'a> Trainer<'a> {
    fn new(
        ranks: &'a dyn Collective,
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
            rows_max: passes.tokens_max(),
            cost: Cost::of(&decoder.facts),
            cut: cut(ranks, decoder, adapter),
            squares: [0.0; 2],
            recorder: RefCell::new(Recorder::new(passes.graph_bytes())),
            ranks,
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

    /// Trains from the beginning, or from a checkpoint, to the end.
    fn train(
        mut self,
        checkpoints: Option<&Checkpoints>,
        log: &mut dyn FnMut(&Metric) -> Result<()>,
    ) -> Result<Trained> {
        let resumed_at = self.resume(checkpoints)?;
        let began_at = self.state.step;
        self.evaluate_if_due(checkpoints, log)?;
        let mut behind: Option<Sent> = None;
        while self.sent < self.steps.total && !self.state.best.stop {
            let sent = self.send()?;
            let stopped = sent.is_none();
            // A GPU works on this step while the numbers of the step before are copied to the host.
            if let Some(before) = std::mem::replace(&mut behind, sent) {
                self.settle(before, checkpoints, log)?;
            }
            if stopped {
                return Err(self.stop(checkpoints));
            }
            if let Some(sent) = behind.take_if(|sent| sent.numbers.are_here() || self.waits_after(self.sent))
            {
                self.settle(sent, checkpoints, log)?;
            }
        }
        let seconds = self.began.elapsed().as_secs_f64();
        let restored_step = self.restore_best(checkpoints)?;
        Ok(Trained {
            best: self.best(),
            restored_step,
            stopped_early: self.state.step < self.steps.total,
            skipped_steps: self.state.spikes.skipped,
            steps: self.state.step,
            first_loss: self.state.first_loss.unwrap_or(self.state.loss),
            loss: self.state.loss,
            train_loss: self.loss_sum / (self.state.step - began_at).max(1) as f64,
            eval_loss: self.state.eval_loss,
            tokens: self.state.tokens,
            seconds,
            tokens_per_second: self.tokens_here as f64 / seconds.max(1e-9),
            resumed_at,
        })
    }

    /// Continues from the newest checkpoint of rank 0, and agrees with the other ranks on the start.
    fn resume(&mut self, checkpoints: Option<&Checkpoints>) -> Result<Option<u64>> {
        let newest =
            |checkpoints| checkpoint::newest(checkpoints, &self.adapter.params, &self.moments, self.report);
        let found = checkpoints.map(newest).transpose().map(Option::flatten);
        let sizes = [self.data.train.len(), self.steps.total as usize, self.adapter.params.elem_count()];
        let start = Start {
            sizes: sizes.map(|size| size as u64),
            rows_max: self.rows_max,
            state: found.as_ref().ok().cloned().flatten(),
        };
        let mut told = agree(self.ranks, Said::of(&found), start)?.told;
        refuse_another_run(&told)?;
        self.rows_max = told.iter().map(|start| start.rows_max).min().unwrap_or(self.rows_max);
        let state = told.swap_remove(0).state;
        self.share(&self.adapter.params)?;
        if state.is_some() {
            self.moments.tensors().into_iter().try_for_each(|(_, tensor)| self.share(tensor))?;
        }
        if state.is_some() || self.ranks.place().world > 1 {
            self.adapter.refresh()?;
        }
        let Some(state) = state else { return Ok(None) };
        self.report
            .note(Stage::Train, format!("training continues after step {} from a checkpoint", state.step));
        self.progress.set(state.step);
        self.sent = state.step;
        self.state = state;
        Ok(Some(self.state.step))
    }

    /// Fills a flat tensor of every rank with the values of rank 0.
    pub(super) fn share(&self, flat: &Tensor) -> Result<()> {
        let place = self.ranks.place();
        if place.world == 1 || flat.elem_count() == 0 {
            return Ok(());
        }
        if flat.dtype() == DType::U8 {
            // Ranks add f32 only, which holds every byte.
            let there = |tensor: &Tensor, dtype| tensor.to_device(&Device::Cpu)?.to_dtype(dtype);
            let wide = there(flat, DType::F32)?.to_device(flat.device())?;
            self.share(&wide)?;
            return Ok(flat::write(flat, &there(&wide, DType::U8)?)?);
        }
        if !place.leads() {
            // Adding -0 changes no bit of rank 0's values, and adding 0 would turn -0 into 0.
            let zeros = Tensor::full(-0f32, flat.elem_count(), &Device::Cpu)?.to_dtype(flat.dtype())?;
            flat::write(flat, &zeros)?;
        }
        self.ranks.sum(flat)
    }

    /// Queues one optimizer step. Returns `None`, with nothing changed, if a signal came between its passes. A
    /// gradient that is not finite changes nothing either; `settle` finds it. If spikes are skipped, the step's numbers
    /// are awaited before the update.
    fn send(&mut self) -> Result<Option<Sent>> {
        let Some(Gradient { losses, scale, tokens, clock }) = self.gradient()? else { return Ok(None) };
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
        if clock {
            self.due_by_clock = Some(self.sent);
        }
        Ok(Some(Sent { numbers: Numbers::send(&numbers)?, scale, tokens, learning_rate, spike }))
    }

    /// Computes the gradient of the next step on all ranks together. Returns `None` after a signal to any of them. Only
    /// the gradient changes, so a step that ran out of memory somewhere is repeated from its beginning.
    fn gradient(&mut self) -> Result<Option<Gradient>> {
        loop {
            let share = self.share_of_step();
            let scale = 1.0 / share.targets.max(1) as f64;
            let (said, losses) = self.passes_of(&share, scale);
            let heard = agree(self.ranks, said, self.beat())?;
            refuse_other_numbers(&heard.told)?;
            match heard.outcome {
                Outcome::Stopped => return Ok(None),
                Outcome::OutOfMemory(errors) => self.shrink(&errors)?,
                Outcome::Done => {
                    if let Some(why) = self.recorder.get_mut().refusal() {
                        let text = format!("training goes on launch by launch, without CUDA graphs: {why}");
                        self.report.warn(Stage::Train, text);
                    }
                    let (losses, clock) = (self.summed(losses)?, heard.told[0].clock);
                    return Ok(Some(Gradient { losses, scale, tokens: share.tokens as u64, clock }));
                }
            }
        }
    }

    /// Computes this rank's passes of a step. Returns the end that they reached, and the loss sum of each.
    fn passes_of(&self, share: &Share, scale: f64) -> (Said, Vec<Number>) {
        let mut together = match self.decoder.together(share.batches.len(), Some(self.adapter)) {
            Ok(together) => together,
            Err(fault) => return (Said::from(&fault), Vec::new()),
        };
        let mut sums = Sums::new(self.ranks, self.adapter, &self.cut);
        let done = self.passes(share, scale, &mut together, &mut sums);
        drop(together);
        let summed = sums.finish();
        let said = match (done, summed) {
            (Ok(Some(losses)), Ok(())) => return (Said::Done, losses),
            (Ok(None), _) => Said::Stopped,
            (Err(error), _) if out_of_memory(&error) => Said::OutOfMemory(error.to_string()),
            (Ok(_), Err(fault)) => Said::from(&fault),
            (Err(error), summed) => {
                let gathering = self.decoder.ring.as_ref().and_then(Ring::fault);
                Said::from(&gathering.or(summed.err()).unwrap_or_else(|| error.into()))
            }
        };
        (said, Vec::new())
    }

    /// Computes the passes, and returns the loss sum of each; `None` after a signal. The last pass completes the
    /// gradients of a layer, so that the ranks' sum of them may begin.
    fn passes(
        &self,
        share: &Share,
        scale: f64,
        together: &mut Together,
        sums: &mut Sums,
    ) -> candle_core::Result<Option<Vec<Number>>> {
        let alone = self.ranks.place().world == 1;
        flat::zero(if alone { &self.adapter.grads } else { &self.adapter.sums })?;
        if let Some(layers) = self.passes.expanded() {
            self.decoder.keep_expanded(layers);
        }
        let keep = self.passes.keep(self.decoder.layers.len());
        let mut losses = Vec::with_capacity(share.batches.len());
        for (at, batch) in share.batches.iter().enumerate() {
            if interrupt::requested() {
                return Ok(None);
            }
            together.pass();
            let is_last = at + 1 == share.batches.len();
            let mut begin = |layer| sums.done(layer);
            let done: Option<Done> = if is_last && !alone { Some(&mut begin) } else { None };
            let (adapter, decoder) = (self.adapter, self.decoder);
            let pass = TrainingPass { decoder, adapter, keep: &keep, batch, scale };
            losses.push(self.recorder.borrow_mut().pass(pass, done)?);
        }
        Ok(if interrupt::requested() && losses.is_empty() { None } else { Some(losses) })
    }

    /// Adds up over the ranks the values that are in no piece of the gradient: those of the lowest layers and the
    /// losses. Each rank's loss has a place of its own, so that no rank's loss is rounded to another's.
    fn summed(&self, losses: Vec<Number>) -> Result<Vec<Number>> {
        let place = self.ranks.place();
        if place.world == 1 {
            return Ok(losses);
        }
        let mut own = losses.into_iter();
        if let Some(first) = own.next() {
            let loss = own.try_fold(first, |sum, loss| sum.add(&loss))?;
            loss.split(&self.adapter.loss_of(place.rank)?)?;
        }
        self.ranks.sum(&self.cut.rest(self.adapter)?)?;
        Ok(vec![Number::total(&self.adapter.losses()?)?])
    }

    /// Ends all ranks if they computed different numbers in this step, the last one whose numbers are known. It comes
    /// before the parameters of that step are kept, so that no checkpoint and no adapter holds values that the ranks do
    /// not agree on.
    fn confirm(&self, step: u64) -> Result<()> {
        if self.ranks.place().world == 1 {
            return Ok(());
        }
        refuse_other_numbers(&agree(self.ranks, Said::Done, Beat { step, ..self.beat() })?.told)
    }

    fn beat(&self) -> Beat {
        let minutes = match self.options.evaluation {
            Every::Minutes(minutes) => minutes,
            _ => f64::INFINITY,
        };
        Beat {
            step: self.state.step,
            squares: self.squares.map(f64::to_bits),
            clock: self.evaluated_at.elapsed().as_secs_f64() >= minutes * 60.0,
        }
    }

    /// Changes to smaller plans on the ranks whose memory ran out, and agrees on the size of passes. `errors` are those
    /// of the ranks that ran out.
    fn shrink(&mut self, errors: &[Option<String>]) -> Result<()> {
        let (place, step) = (self.ranks.place(), self.sent + 1);
        // The graphs' memory is freed first. Graphs hold addresses of tensors that a smaller plan does not keep.
        let gave_up = self.recorder.get_mut().give_up();
        let own = errors[place.rank].as_ref().map(|error| match gave_up {
            true => Ok(format!("out of memory at step {step}; the step is repeated without CUDA graphs")),
            false => self.passes.shrink(step, error),
        });
        let own = own.transpose();
        let told = (own.as_ref().ok().cloned().flatten(), self.passes.tokens_max());
        let told = agree(self.ranks, Said::of(&own), told)?.told;
        self.rows_max = told.iter().map(|(_, rows_max)| *rows_max).min().unwrap_or(self.rows_max);
        for (rank, text) in told.into_iter().enumerate().filter_map(|(rank, (text, _))| Some((rank, text?))) {
            let text = if place.world == 1 { text } else { format!("rank {rank}: {text}") };
            self.report.warn(Stage::Train, text);
        }
        Ok(())
    }

    /// Returns the passes of this rank in the next step, and the sizes of the whole step.
    fn share_of_step(&self) -> Share {
        let step = self.sent;
        let epoch = mix(self.options.seed ^ mix(self.steps.epoch(step)));
        let key = |example: usize| mix(epoch ^ example as u64);
        let (micro_batches, place) = (self.steps.micro_batches(step), self.ranks.place());
        let rows = Rows { packing: self.options.packing, max: self.rows_max };
        let mut share = order::share(self.data.train, &micro_batches, rows, place, &self.cost, key);
        let (smoothing, noise) = (self.options.label_smoothing, self.options.neftune_alpha);
        let batches = share.batches.iter_mut();
        batches.for_each(|batch| (batch.label_smoothing, batch.noise) = (smoothing, noise));
        // The next step's tokens come from the disk while this step is computed.
        if step + 1 < self.steps.total {
            let next = self.steps.micro_batches(step + 1);
            next.iter().flatten().for_each(|&example| self.data.train.will_need(example));
        }
        share
    }

    /// Waits for a step's numbers and accounts for them.
    fn settle(
        &mut self,
        sent: Sent,
        checkpoints: Option<&Checkpoints>,
        log: &mut dyn FnMut(&Metric) -> Result<()>,
    ) -> Result<()> {
        let values = sent.numbers.values()?;
        if let Some(fault) = self.ranks.ended() {
            return Err(fault);
        }
        let [losses @ .., squares, parameters] = values.as_slice() else {
            unreachable!("two sums of squares")
        };
        self.squares = [*squares, *parameters];
        if self.waits_after(self.state.step + 1) {
            self.confirm(self.state.step + 1)?;
        }
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

    /// Returns whether an evaluation, a checkpoint or the end needs the parameters as they are after `done` steps.
    fn waits_after(&self, done: u64) -> bool {
        let evaluates = self.evaluates_after(done);
        // The next step is compared with all steps before it.
        let compares = self.options.spikes.is_some_and(|rule| rule.policy == Policy::Skip);
        done == self.steps.total || evaluates || compares || self.steps.due(self.options.checkpoint, done)
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
        // A skipped step's loss may be no number. Then it is no part of any mean, and the next line has the mean of the
        // other steps.
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

    /// Returns the fault for a signal. Rank 0 writes a checkpoint first if possible.
    pub(super) fn stop(&self, checkpoints: Option<&Checkpoints>) -> Fault {
        let step = self.state.step;
        if let Err(fault) = self.confirm(step) {
            return fault;
        }
        let saved = match checkpoints {
            Some(checkpoints) if step > 0 => self.save(checkpoints).map_err(|why| why.message),
            _ => Err("nothing to save".to_owned()),
        };
        let saved = match agree(self.ranks, Said::Done, saved) {
            Ok(mut heard) => heard.told.swap_remove(0),
            Err(fault) => Err(fault.message),
        };
        match saved {
            Ok(()) => Fault::new(
                Kind::Interrupted,
                format!("stopped by a signal after step {step}; checkpoint written"),
            )
            .help("start it again with the same output folder to continue from there"),
            Err(why) => Fault::new(
                Kind::InterruptedUnsaved,
                format!("stopped by a signal after step {step}, not saved: {why}"),
            ),
        }
    }
}

/// Returns the cut of the gradient. Ranks that share the base gather its layers while a pass computes, which takes far
/// longer than the sum of an adapter, so that they sum it at the end.
fn cut(ranks: &dyn Collective, decoder: &Decoder, adapter: &Trainable) -> Cut {
    let shares = decoder.ring.as_ref().is_some_and(Ring::is_shared);
    match shares || ranks.place().world == 1 {
        true => Cut::whole(&adapter.sites),
        false => Cut::of(&adapter.sites),
    }
}

/// Refuses ranks that begin another run than rank 0.
fn refuse_another_run(starts: &[Start]) -> Result<()> {
    if let Some((rank, start)) = starts.iter().enumerate().find(|(_, start)| start.sizes != starts[0].sizes) {
        let say = |[examples, steps, parameters]: [u64; 3]| {
            format!("{examples} examples, {steps} steps and {parameters} parameters")
        };
        let (found, expected) = (say(start.sizes), say(starts[0].sizes));
        return Err(Fault::new(Kind::Device, format!("rank {rank} has {found}, and rank 0 has {expected}"))
            .help("start all ranks with the same options and the same data"));
    }
    Ok(())
}

/// Refuses ranks whose numbers differ from rank 0's: all of them compute the same update from the same sum.
fn refuse_other_numbers(beats: &[Beat]) -> Result<()> {
    let numbers = |beat: &Beat| (beat.step, beat.squares);
    if let Some((rank, beat)) = beats.iter().enumerate().find(|(_, beat)| numbers(beat) != numbers(&beats[0]))
    {
        let say = |beat: &Beat| {
            let [gradient, parameters] = beat.squares.map(f64::from_bits);
            format!("{gradient:e} and {parameters:e} after step {}", beat.step)
        };
        return Err(Fault::new(
            Kind::Device,
            format!(
                "rank {rank} does not compute what rank 0 computes: its sums of squares (gradient, parameters) are {}, \
                 expected {}",
                say(beat),
                say(&beats[0])
            ),
        )
        .help("give all ranks the same kind of device; if they have it, the memory of one of them may be faulty"));
    }
    Ok(())
}
