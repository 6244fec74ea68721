//! The decoder: embedding, layers, final norm, output head; one pass gives the loss and adds the LoRA gradients.

use candle_core::{DType, Result, Tensor};

use crate::ops::cross_entropy::{self, Head};
use crate::ops::matmul::Precision;
use crate::ops::rope::Angles;
use crate::ops::{embedding, rows};

use super::Keep;
use super::batch::Batch;
use super::facts::Facts;
use super::layer::{Kept, Layer, Shape};
use super::linear::Pass;
use super::lora::Trainable;
use super::norm::Norm;

/// A frozen base with its adapter.
pub struct Decoder {
    pub facts: Facts,
    /// [V, C], in the checkpoint's type.
    pub embedding: Tensor,
    pub layers: Vec<Layer>,
    pub final_norm: Norm,
    /// Its weight is the embedding itself when tied.
    pub head: Head,
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
        let hidden = self.final_norm.forward(&hidden)?;
        cross_entropy::forward(&hidden, &self.head, &batch.targets, self.precision)
    }

    /// Logits of every row, [T, V]; for tests and generation.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let hidden = self.final_norm.forward(&self.hidden(batch)?)?;
        cross_entropy::logits(&hidden, &self.head, self.precision)
    }

    /// Bytes of the frozen base.
    pub fn base_bytes(&self) -> usize {
        let linear = |layer: &Layer| -> usize {
            let attention = layer.query_key_value.iter().chain([&layer.output]);
            attention.chain(&layer.gate_up).chain([&layer.down]).map(|linear| linear.weight.bytes()).sum()
        };
        let head = if self.facts.tied_head { 0 } else { self.head.weight.bytes() };
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
        let x = embedding::forward(&self.embedding, &batch.ids, self.dtype)?;
        match self.embedding_factor() {
            1.0 => Ok(x),
            factor => x * factor,
        }
    }

    /// The factor on the embeddings, rounded as the reference rounds it.
    pub(super) fn embedding_factor(&self) -> f64 {
        let scale = &self.facts.embedding_scale;
        match (scale.rounded, self.precision) {
            (false, _) => scale.factor,
            (true, Precision::F32) => scale.factor as f32 as f64,
            (true, Precision::Bf16) => half::bf16::from_f64(scale.factor).to_f64(),
        }
    }

    /// Of each rope, where the embedding lies; each row once for each of the heads' runs.
    fn angles(&self, batch: &Batch) -> Result<Vec<Angles>> {
        let (positions, lengths) = batch.positions();
        // Angles are as wide as the arithmetic, f32 even beside bf16 activations.
        let wide = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let (runs, _) = self.facts.heads().turning();
        let repeated = |table: Tensor| -> Result<Tensor> {
            let (rows, half) = table.dims2()?;
            let table = table.unsqueeze(1)?.expand((rows, runs, half))?;
            table.contiguous()?.reshape((rows * runs, half))?.to_device(self.embedding.device())
        };
        let angles = self.facts.ropes.iter().map(|rope| {
            let Angles { cos, sin } = rope.angles(&positions, &lengths, wide)?;
            Ok(Angles { cos: repeated(cos)?, sin: repeated(sin)? })
        });
        angles.collect()
    }

    fn shape<'a>(
        &self,
        angles: &'a [Angles],
        examples: &'a [std::ops::Range<usize>],
        dropout_keys: Option<&'a [u64]>,
    ) -> Shape<'a> {
        Shape { angles, examples, pass: Pass { precision: self.precision, dropout_keys } }
    }

    /// The loss and the gradient of the last layer's output, [T, C]. Only supervised rows reach the head.
    fn head_forward_backward(&self, x: &Tensor, batch: &Batch, scale: f64) -> Result<(f64, Tensor)> {
        let x_rows = rows::gather(x, &batch.target_rows)?;
        let hidden = self.final_norm.forward(&x_rows)?;
        let targets = &batch.targets;
        let (loss, d_hidden) =
            cross_entropy::forward_backward(&hidden, &self.head, targets, scale, self.precision)?;
        let d_rows = x_rows.zeros_like()?;
        self.final_norm.backward(&d_hidden, &x_rows, &d_rows)?;
        Ok((loss, rows::scatter(&d_rows, &batch.target_rows, batch.rows())?))
    }
}
