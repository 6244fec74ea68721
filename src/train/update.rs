//! A gradient -> updated parameters: clipping and AdamW, with one learning rate or one for A and one for B.

use crate::fault::Result;
use crate::ops::adamw::Update;
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
        Ok(self.moments.step(self.adapter, &update, self.options.loraplus_ratio, squares)?)
    }
}
