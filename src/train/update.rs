//! A gradient -> updated parameters: clipping and AdamW, with one learning rate or one for A and one for B.

use candle_core::Tensor;

use crate::fault::Result;
use crate::ops::adamw::{self, Moments, Update};
use crate::ops::number::Number;

use super::trainer::Trainer;

impl Trainer<'_> {
    /// Clips by the global norm as torch does (`max / (norm + 1e-6)`, at most 1) and updates. `squares` is the sum of
    /// squares of the gradient.
    pub(super) fn update(&mut self, learning_rate: f64, squares: &Number) -> Result<()> {
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
}
