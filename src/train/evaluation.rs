//! Examples to score -> losses after the steps that are due, the best of them, and the end if they do not improve.

use std::time::Instant;

use crate::dataset::Examples;
use crate::fault::Result;
use crate::interrupt;
use crate::model::decoder::Decoder;
use crate::model::lora::Lora;
use crate::ops::flat;
use crate::ops::number::{Number, Numbers};
use crate::report::{Event, Report, Stage, Unit};

use super::best::{Best, Evaluation, Scores, SourceScores};
use super::checkpoint::{self, Checkpoints};
use super::metric::{Metric, Named};
use super::options::Every;
use super::order;
use super::sets::Source;
use super::trained::BestEvaluation;
use super::trainer::Trainer;

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
    let (mut losses, mut hits, mut tokens) = (Vec::new(), Vec::new(), 0_usize);
    let indices: Vec<usize> = (0..examples.len()).collect();
    for group in indices.chunks(batch_examples.max(1)) {
        for batch in order::batches(examples, &[group.to_vec()], None, rows_max, |_| 0) {
            let (loss, found) = decoder.loss_and_hits(&batch, lora)?;
            losses.push(loss);
            hits.push(found);
            tokens += batch.targets.len();
        }
        progress.advance(group.len() as u64);
        interrupt::check()?;
    }
    let mean = |numbers: &[Number]| -> Result<f64> {
        Ok(Numbers::send(numbers)?.values()?.into_iter().sum::<f64>() / tokens.max(1) as f64)
    };
    Ok(Scores { loss: mean(&losses)?, accuracy: mean(&hits)?, tokens: tokens as u64 })
}

impl Trainer<'_> {
    /// Evaluates after the step just done. A resumed run first makes up for an evaluation that a signal prevented.
    pub(super) fn evaluate_if_due(
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
    pub(super) fn evaluation(&self) -> Result<Evaluation> {
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
    pub(super) fn look_at_the_clock(&mut self) {
        if let Every::Minutes(minutes) = self.options.evaluation
            && self.evaluated_at.elapsed().as_secs_f64() >= minutes * 60.0
        {
            self.due_by_clock = Some(self.sent);
        }
    }

    /// Whether an evaluation is due after `done` steps.
    pub(super) fn evaluates_after(&self, done: u64) -> bool {
        if self.data.evaluation.iter().all(|source| source.examples.is_empty()) {
            return false;
        }
        if done == 0 {
            return self.options.eval_on_start;
        }
        let (every, last) = (self.options.evaluation, done == self.steps.total);
        match every {
            Every::Steps(_) | Every::Share(_) => {
                (last || self.steps.due(every, done)) && self.options.eval_delay <= done as f64
            }
            Every::Minutes(_) => {
                (last || self.due_by_clock == Some(done)) && self.options.eval_delay <= done as f64
            }
            _ => self.steps.due(every, done) && self.options.eval_delay <= self.steps.epochs_done(done),
        }
    }

    /// Compares an evaluation with those before it, and keeps the parameters of the best.
    pub(super) fn judge(&mut self, evaluation: &Evaluation, checkpoints: Option<&Checkpoints>) -> Result<()> {
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
    pub(super) fn restore_best(&mut self, checkpoints: Option<&Checkpoints>) -> Result<Option<u64>> {
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

    pub(super) fn best(&self) -> Option<BestEvaluation> {
        let (judging, value) = (self.options.judging.as_ref()?, self.state.best.metric?);
        Some(BestEvaluation { step: self.state.best.step, metric: judging.metric(), value })
    }
}
