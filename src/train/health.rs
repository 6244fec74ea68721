//! The numbers of a step -> training goes on, the step is skipped, or the run ends.
//!
//! A run ends if a number is not finite, if a moment would overflow, if spikes are forbidden and one occurs, or if the
//! updates have no effect.

use crate::fault::{Fault, Kind, Result};
use crate::ops::number::{Number, Numbers};
use crate::report::Stage;

use super::spike::{self, Policy};
use super::trainer::{Step, Trainer};

/// Steps after warm-up by which an adapter must have some effect.
const EFFECT_STEPS: u64 = 8;
/// Steps after warm-up by which some loss must differ from the first.
const CONSTANT_STEPS: u64 = 32;
/// The gradient norm from which a square may exceed f32: the root of its largest number.
const MOMENT_NORM_MAX: f64 = 1.8e19;

impl Trainer<'_> {
    /// Returns the reason why this step must be skipped, if it must. All steps before it are settled.
    pub(super) fn spike_to_skip(
        &self,
        losses: &[Number],
        scale: f64,
        squares: &Number,
    ) -> Result<Option<String>> {
        let Some(rule) = self.options.spikes.filter(|rule| rule.policy == Policy::Skip) else {
            return Ok(None);
        };
        let values = Numbers::send(losses)?.values()?;
        let loss = values.iter().map(|loss| loss * scale).sum();
        Ok(self.state.spikes.spike(&rule, loss, squares.value()?.sqrt()))
    }

    /// Judges the numbers of a step that was done, and keeps them for later steps.
    pub(super) fn judge_step(&mut self, step: &Step) -> Result<()> {
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
    pub(super) fn skip(&mut self, why: &str) -> Result<()> {
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

    pub(super) fn refuse_divergence(&self, loss: f64, grad_norm: f64) -> Result<()> {
        if loss.is_finite() && grad_norm.is_finite() {
            return Ok(());
        }
        Err(self.diverged(&format!("loss {loss}, gradient norm {grad_norm}")))
    }

    /// Refuses a gradient whose squares are beyond f32, since the second moment becomes infinite there, and an infinite
    /// moment makes every later update zero.
    pub(super) fn refuse_overflow(&self, grad_norm: f64) -> Result<()> {
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
    pub(super) fn refuse_no_effect(&self) -> Result<()> {
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
                "the updates were zero: lower learning_rate or lora_alpha if they are far above their usual values (a moment \
                 overflowed), or raise them if they are near 0; no adapter was written",
            )),
        }
    }

    pub(super) fn diverged(&self, what: &str) -> Fault {
        Fault::new(Kind::Diverged, format!("training diverged at step {}: {what}", self.state.step + 1))
            .help("lower TrainingArguments.learning_rate or add warmup_steps; no adapter was written")
    }
}
