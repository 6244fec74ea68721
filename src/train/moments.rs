//! The optimizer's moments, in 32 bits or in 8, and the update that uses them: gradients in -> parameters out.

use candle_core::{Result, Tensor};

use crate::model::lora::Trainable;
use crate::ops::adamw::{self, Update};
use crate::ops::adamw_8bit::{self, Matrix};
use crate::ops::number::Number;

/// The moments of an adapter's parameters.
#[derive(Clone, Debug)]
pub enum Moments {
    /// f32.
    Full(adamw::Moments),
    /// 8 bits each, in blocks.
    EightBit(adamw_8bit::Moments),
}

impl Moments {
    /// Returns moments of zero.
    pub fn zeros(adapter: &Trainable, eight_bit: bool) -> Result<Moments> {
        Ok(match eight_bit {
            false => Moments::Full(adamw::Moments::zeros_like(&adapter.params)?),
            true => Moments::EightBit(adamw_8bit::Moments::zeros(&adapter.params, matrices(adapter))?),
        })
    }

    /// Returns a message about them, if there is anything to say.
    pub fn note(&self) -> Option<String> {
        let Moments::EightBit(moments) = self else { return None };
        let (narrow, all) = moments.narrow_values();
        let small = match all - narrow {
            0 => String::new(),
            _ => format!(", those of matrices with fewer than {} values 32", adamw_8bit::VALUES_MIN),
        };
        Some(format!("AdamW's moments of {narrow} of {all} parameters take 8 bits each{small}"))
    }

    /// Returns their content in a checkpoint, by name.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Moments::Full(moments) => vec![("first", &moments.first), ("second", &moments.second)],
            Moments::EightBit(moments) => {
                vec![("codes", &moments.codes), ("scales", &moments.scales), ("wide", &moments.wide)]
            }
        }
    }

    /// Updates the adapter's parameters by its gradients, whose sum of squares is `squares`. With `ratio`, each B
    /// and each of DoRA's magnitudes learn at so many times the rate of A (LoRA+, Hayou and others 2024).
    pub fn step(
        &self,
        adapter: &Trainable,
        update: &Update,
        ratio: Option<f64>,
        squares: &Number,
    ) -> Result<()> {
        let (params, grads, copy) = (&adapter.params, &adapter.grads, adapter.copy());
        adapter.changed();
        match (self, ratio) {
            (Moments::EightBit(moments), _) => {
                adamw_8bit::step(params, grads, moments, update, ratio.unwrap_or(1.0), squares, copy)
            }
            (Moments::Full(moments), None) => adamw::step(params, grads, moments, update, squares, copy),
            (Moments::Full(moments), Some(ratio)) => by_matrix(adapter, moments, update, ratio, squares),
        }
    }
}

/// Returns the trained tensors in the order of the flat buffers. As in PEFT's LoRA+, B and the magnitudes are faster.
fn matrices(adapter: &Trainable) -> Vec<Matrix> {
    let of_site = adapter.sites.iter().flat_map(|site| {
        site.tensors().enumerate().map(|(number, values)| Matrix { values, faster: number > 0 })
    });
    let rows = adapter.tokens.iter().map(|rows| Matrix { values: rows.values(), faster: false });
    rows.chain(of_site).collect()
}

fn by_matrix(
    adapter: &Trainable,
    moments: &adamw::Moments,
    update: &Update,
    ratio: f64,
    squares: &Number,
) -> Result<()> {
    let faster = Update { learning_rate: update.learning_rate * ratio, ..*update };
    for Matrix { values, faster: is_b } in matrices(adapter) {
        let part = |flat: &Tensor| flat.narrow(0, values.start, values.len());
        let moments = adamw::Moments { first: part(&moments.first)?, second: part(&moments.second)? };
        let (params, grads) = (part(&adapter.params)?, part(&adapter.grads)?);
        let copy = adapter.copy().map(part).transpose()?;
        let update = if is_b { &faster } else { update };
        adamw::step(&params, &grads, &moments, update, squares, copy.as_ref())?;
    }
    Ok(())
}
