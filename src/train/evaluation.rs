//! Examples to score -> losses after the steps that are due, the best of them, and the end if they do not improve.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::dataset::Examples;
use crate::fault::Result;
use crate::interrupt;
use crate::model::decoder::Decoder;
use crate::model::lora::Lora;
use crate::model::residency::Ring;
use crate::ops::flat;
use crate::ops::number::Numbers;
use crate::ranks::{Alone, Collective};
use crate::report::{Event, Report, Stage, Task, Unit};

use super::best::{Best, Evaluation, Scores, SourceScores};
use super::checkpoint::{self, Checkpoints};
use super::deal::{self, Cost};
use super::metric::{Metric, Named};
use super::options::Every;
use super::order;
use super::sets::Source;
use super::together::{Outcome, Said, agree};
use super::trained::BestEvaluation;
use super::trainer::Trainer;

/// Returns the loss and token accuracy over the supervised tokens of `examples`, without dropout, in passes of at most
/// `rows_max` tokens or one example. `Lora::None` evaluates the bare base.
pub fn evaluate<'a>(
    decoder: &Decoder,
    lora: Lora,
    examples: impl Into<Examples<'a>>,
    batch_examples: usize,
    rows_max: usize,
    report: &Report,
) -> Result<Scores> {
    let scores = evaluate_together(&Alone, decoder, lora, examples, batch_examples, rows_max, report)?;
    scores.ok_or_else(interrupt::stopped)
}

/// Does `evaluate` with the examples dealt to the ranks. Every rank gets the same scores, whose bits do not depend on
/// the number of ranks. `None`: a signal came to some rank.
pub fn evaluate_together<'a>(
    ranks: &dyn Collective,
    decoder: &Decoder,
    lora: Lora,
    examples: impl Into<Examples<'a>>,
    batch_examples: usize,
    rows_max: usize,
    report: &Report,
) -> Result<Option<Scores>> {
    let (examples, place) = (examples.into(), ranks.place());
    let indices: Vec<usize> = (0..examples.len()).collect();
    let groups: Vec<&[usize]> = indices.chunks(batch_examples.max(1)).collect();
    let cost = Cost::of(&decoder.facts);
    let of_example = |&example: &usize| cost.of_example(examples.tokens(example));
    let costs: Vec<u64> = groups.iter().map(|group| group.iter().map(of_example).sum()).collect();
    let own = deal::deal(&costs, place.world).swap_remove(place.rank);
    let count: usize = own.iter().map(|&number| groups[number].len()).sum();
    let progress = report.task(Stage::Evaluate, Unit::Rows, "evaluation", Some(count as u64));
    let own: Vec<(usize, &[usize])> = own.into_iter().map(|number| (number, groups[number])).collect();
    let scored = score(decoder, lora, examples, &own, rows_max, &progress);
    let (said, scored) = match scored {
        Ok(Some(scored)) => (Said::Done, scored),
        Ok(None) => (Said::Stopped, Scored::default()),
        Err(fault) => (Said::from(&fault), Scored::default()),
    };
    let heard = agree(ranks, said, scored)?;
    Ok((heard.outcome == Outcome::Done).then(|| sum_up(heard.told)))
}

/// A rank's result of its part of an evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Scored {
    /// The loss sum of each batch as bits, with the number of its group.
    losses: Vec<(usize, u64)>,
    /// Supervised tokens.
    tokens: u64,
    /// The number of targets that are the most probable token.
    hits: u64,
}

/// Scores groups of examples, given with their numbers; `None` after a signal.
fn score(
    decoder: &Decoder,
    lora: Lora,
    examples: Examples,
    groups: &[(usize, &[usize])],
    rows_max: usize,
    progress: &Task,
) -> Result<Option<Scored>> {
    let (mut numbers, mut losses, mut hits, mut tokens) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let batches = |group: &[usize]| order::batches(examples, &[group.to_vec()], None, rows_max, |_| 0);
    // Ranks that share the base gather its layers for each other.
    let shares = decoder.ring.as_ref().is_some_and(Ring::is_shared);
    let passes = if shares { groups.iter().map(|(_, group)| batches(group).len()).sum() } else { 0 };
    let mut together = decoder.together(passes, None)?;
    for &(number, group) in groups {
        for batch in batches(group) {
            together.pass();
            let (loss, found) = decoder.loss_and_hits(&batch, lora)?;
            numbers.push(number);
            losses.push(loss);
            hits.push(found);
            tokens += batch.targets.len() as u64;
        }
        progress.advance(group.len() as u64);
        if interrupt::requested() {
            return Ok(None);
        }
    }
    let losses = Numbers::send(&losses)?.values()?.into_iter().map(f64::to_bits);
    let hits: f64 = Numbers::send(&hits)?.values()?.into_iter().sum();
    Ok(Some(Scored { losses: numbers.into_iter().zip(losses).collect(), tokens, hits: hits as u64 }))
}

/// Returns the scores over all ranks' parts. Losses are added in the order of the examples.
fn sum_up(parts: Vec<Scored>) -> Scores {
    let tokens: u64 = parts.iter().map(|part| part.tokens).sum();
    let hits: u64 = parts.iter().map(|part| part.hits).sum();
    let mut losses: Vec<(usize, u64)> = parts.into_iter().flat_map(|part| part.losses).collect();
    losses.sort_by_key(|(group, _)| *group);
    let loss: f64 = losses.into_iter().map(|(_, bits)| f64::from_bits(bits)).sum();
    let count = tokens.max(1) as f64;
    Scores { loss: loss / count, accuracy: hits as f64 / count, tokens }
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
        let Some(evaluation) = self.evaluation()? else { return Err(self.stop(checkpoints)) };
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

    /// Scores every source; `None` after a signal.
    fn evaluation(&self) -> Result<Option<Evaluation>> {
        let (batch, lora) = (self.options.eval_batch_examples, self.adapter.evaluated());
        let mut found = Vec::new();
        for Source { entry, name, examples } in &self.data.evaluation {
            if examples.is_empty() {
                continue;
            }
            let (examples, rows) = (*examples, self.rows_max);
            let scores =
                evaluate_together(self.ranks, self.decoder, lora, examples, batch, rows, self.report)?;
            let Some(scores) = scores else { return Ok(None) };
            found.push(SourceScores { entry: *entry, name: name.clone(), scores });
        }
        Ok(Some(Evaluation::of(found)))
    }

    /// Returns whether an evaluation is due after `done` steps.
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
        // Rank 0 keeps them for all.
        if judging.restore && self.ranks.place().leads() {
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

    /// Restores the parameters of the best evaluation (`load_best_model_at_end`), and returns its step; `None` if they
    /// are those in force.
    pub(super) fn restore_best(&mut self, checkpoints: Option<&Checkpoints>) -> Result<Option<u64>> {
        let restores = self.options.judging.as_ref().is_some_and(|judging| judging.restore);
        let step = self.state.best.step;
        if !restores || self.state.best.metric.is_none() || step == self.state.step {
            return Ok(None);
        }
        let kept = match self.best_params.take() {
            Some(params) => Some(params),
            None => {
                checkpoints.and_then(|checkpoints| checkpoint::best(checkpoints, step, &self.adapter.params))
            }
        };
        // A continued run has them on the disk of rank 0 alone.
        let there = agree(self.ranks, Said::Done, kept.is_some())?.told[0];
        if !there {
            let text = format!(
                "the adapter of step {step}, the best, is no longer there: the last one is the result"
            );
            self.report.warn(Stage::Train, text);
            return Ok(None);
        }
        if let Some(params) = kept {
            flat::write(&self.adapter.params, &params)?;
        }
        self.share(&self.adapter.params)?;
        self.adapter.refresh()?;
        self.report.note(Stage::Train, format!("the adapter of step {step}, the best, is the result"));
        Ok(Some(step))
    }

    pub(super) fn best(&self) -> Option<BestEvaluation> {
        let (judging, value) = (self.options.judging.as_ref()?, self.state.best.metric?);
        Some(BestEvaluation { step: self.state.best.step, metric: judging.metric(), value })
    }
}
