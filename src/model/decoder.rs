//! The decoder: embedding, layers, final norm, output head; one pass gives the loss and adds the LoRA gradients.

use candle_core::{DType, Result, Tensor};

use crate::ops::matmul::{Precision, Weight};
use crate::ops::rope::Angles;
use crate::ops::{cross_entropy, embedding, rms_norm, rows};

use super::Keep;
use super::batch::Batch;
use super::facts::Facts;
use super::layer::{Kept, Layer, Shape};
use super::linear::Pass;
use super::lora::Trainable;

/// A frozen base with its adapter.
pub struct Decoder {
    pub facts: Facts,
    /// [V, C], in the checkpoint's type.
    pub embedding: Tensor,
    pub layers: Vec<Layer>,
    /// `[C]`
    pub final_norm: Tensor,
    /// [V, C]; the embedding itself when tied.
    pub head: Weight,
    pub trainable: Trainable,
    pub precision: Precision,
    /// One level a layer; the result is the same whatever they are.
    pub keep: Vec<Keep>,
    /// What activations are computed in: f32, or f64 in tests.
    pub dtype: DType,
}

impl Decoder {
    /// Sum of the targets' losses. Adds the gradient of `scale` times that sum to the flat gradient buffer.
    pub fn forward_backward(&self, batch: &Batch, scale: f64) -> Result<f64> {
        let (angles, ranges) = (self.angles(batch)?, batch.ranges());
        let shape = self.shape(&angles, &ranges, Some(&batch.keys));
        let mut x = self.embed(batch)?;
        let mut kept: Vec<Kept> = Vec::with_capacity(self.layers.len());
        // Nothing below the lowest adapted layer is needed again.
        let lowest = self.trainable.sites.iter().map(|site| site.layer).min().unwrap_or(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let keep = if i < lowest { Keep::LayerInputs } else { self.keep[i] };
            let (y, of_layer) = layer.forward(x, keep, &shape)?;
            x = y;
            if i >= lowest {
                kept.push(of_layer);
            }
        }
        let (loss, d) = self.head_forward_backward(&x, batch, scale)?;
        drop(x);
        for (i, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            let kept = kept.pop().expect("one entry a layer");
            layer.backward(&d, kept, i == lowest, &shape)?;
        }
        Ok(loss)
    }

    /// Sum of the targets' losses, without gradients or dropout.
    pub fn loss(&self, batch: &Batch) -> Result<f64> {
        let hidden = rows::gather(&self.hidden(batch)?, &batch.target_rows)?;
        let hidden = rms_norm::forward(&hidden, &self.final_norm, self.facts.norm_eps)?;
        cross_entropy::forward(&hidden, &self.head, &batch.targets, self.precision)
    }

    /// Logits of every row, [T, V]; for tests and generation.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let hidden = rms_norm::forward(&self.hidden(batch)?, &self.final_norm, self.facts.norm_eps)?;
        cross_entropy::logits(&hidden, &self.head, self.precision)
    }

    /// Bytes of the frozen base.
    pub fn base_bytes(&self) -> usize {
        let linear = |layer: &Layer| -> usize {
            let attention = layer.query_key_value.iter().chain([&layer.output]);
            attention.chain(&layer.gate_up).chain([&layer.down]).map(|linear| linear.weight.bytes()).sum()
        };
        let head = if self.facts.tied_head { 0 } else { self.head.bytes() };
        let embedding = self.embedding.elem_count() * self.embedding.dtype().size_in_bytes();
        embedding + head + self.layers.iter().map(linear).sum::<usize>()
    }

    /// The residual stream after the last layer, [T, C].
    fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let (angles, ranges) = (self.angles(batch)?, batch.ranges());
        let shape = self.shape(&angles, &ranges, None);
        let forward = |x, layer: &Layer| Ok(layer.forward(x, Keep::LayerInputs, &shape)?.0);
        self.layers.iter().try_fold(self.embed(batch)?, forward)
    }

    fn embed(&self, batch: &Batch) -> Result<Tensor> {
        embedding::forward(&self.embedding, &batch.ids, self.dtype)
    }

    fn angles(&self, batch: &Batch) -> Result<Angles> {
        let (positions, lengths) = batch.positions();
        // Angles are as wide as the arithmetic, f32 even beside bf16 activations.
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        self.facts.rope.angles(&positions, &lengths, wide, self.embedding.device())
    }

    fn shape<'a>(
        &self,
        angles: &'a Angles,
        examples: &'a [std::ops::Range<usize>],
        dropout_keys: Option<&'a [u64]>,
    ) -> Shape<'a> {
        let pass = Pass { precision: self.precision, dropout_keys };
        Shape { heads: self.facts.heads, norm_eps: self.facts.norm_eps, angles, examples, pass }
    }

    /// The loss and the gradient of the last layer's output, [T, C]. Only supervised rows reach the head.
    fn head_forward_backward(&self, x: &Tensor, batch: &Batch, scale: f64) -> Result<(f64, Tensor)> {
        let x_rows = rows::gather(x, &batch.target_rows)?;
        let hidden = rms_norm::forward(&x_rows, &self.final_norm, self.facts.norm_eps)?;
        let targets = &batch.targets;
        let (loss, d_hidden) =
            cross_entropy::forward_backward(&hidden, &self.head, targets, scale, self.precision)?;
        let d_rows = x_rows.zeros_like()?;
        rms_norm::backward(&d_hidden, &x_rows, &self.final_norm, self.facts.norm_eps, &d_rows)?;
        Ok((loss, rows::scatter(&d_rows, &batch.target_rows, batch.rows())?))
    }
}
