//! The frozen decoder: embedding, layers, final norm, output head. Each pass takes its adapter: none, the one in
//! training (the pass then returns the loss and adds the gradients), or several finished ones.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::facts::sites::Table;
use crate::facts::{Facts, Keep, LoraOptions, Precision, QueryGrowth, sites};
use crate::fault;
use crate::ops::attention::Packing;
use crate::ops::attention::cached::{Segments, Store};
use crate::ops::cross_entropy::{self, Goal, Head};
use crate::ops::matmul::Weight;
use crate::ops::number::Number;
use crate::ops::rope::Angles;
use crate::ops::stash::Stash;
use crate::ops::{dropout, embedding, noise, put, rope, rows};

use super::batch::Batch;
use super::cache::Cache;
use super::layer::{Kept, Layer};
use super::lora::{Lora, Trainable, Training};
use super::norm::Norm;
use super::operand::Operand;
use super::pass::{Pass, Step};
use super::residency::{Ring, Together, Tour};
use super::tokens::Wanted;

/// The frozen base model.
pub struct Decoder {
    /// The facts that it was built from.
    pub facts: Facts,
    /// The token embedding [V, C] in the checkpoint's type.
    pub embedding: Tensor,
    /// The layers from first to last.
    pub layers: Vec<Layer>,
    /// The norm after the last layer.
    pub final_norm: Norm,
    /// The output head. Its weight is the embedding if the head is tied.
    pub head: Head,
    /// The precision of matrix products on a CPU, except those with the frozen linear layers.
    pub precision: Precision,
    /// The precision of products with the frozen linear layers in training and evaluation.
    pub frozen: Precision,
    /// The type of activations: f32, bf16 on a GPU, or f64 in tests.
    pub dtype: DType,
    /// The device that the layers compute on. The embedding may lie elsewhere.
    pub device: Device,
    /// The source of the layers' 4-bit weights, if they do not lie on the device.
    pub ring: Option<Ring>,
    /// Host memory for inputs of layers, between the forward and the backward pass.
    pub inputs: Stash,
}

/// The rotations of a batch's queries and keys: the angles of each rope, and the growth of the queries.
struct Turns {
    ropes: Vec<Angles>,
    growth: Option<Angles>,
}

/// The same before a GPU has computed the angles.
struct SentTurns {
    ropes: Vec<rope::Sent>,
    growth: Option<Angles>,
}

/// The inputs of a training pass besides the tokens, on the device that computes the layers.
pub(super) struct Prepared<'a> {
    turns: SentTurns,
    pub(super) packing: Packing,
    keys: Tensor,
    /// The bounds of NEFTune's noise, if the batch asks for it.
    noise: Option<noise::Bounds>,
    /// The supervised rows.
    wanted: rows::Index<'a>,
    aims: cross_entropy::Aims<'a>,
}

/// Tokens and positions of a step, on the device.
pub(super) struct Sent {
    embedded: embedding::Sent,
    turns: SentTurns,
}

impl SentTurns {
    fn turns(&self) -> Result<Turns> {
        let ropes = self.ropes.iter().map(rope::Sent::angles).collect::<Result<_>>()?;
        Ok(Turns { ropes, growth: self.growth.clone() })
    }
}

impl Decoder {
    /// Returns the type that finished pairs are held in: products round them to bf16 unless the precision is f32.
    pub fn pair_type(&self) -> DType {
        match (self.dtype, self.precision) {
            (DType::F32, Precision::Bf16 | Precision::Fp8) => DType::BF16,
            (dtype, _) => dtype,
        }
    }

    /// Returns a new adapter to train on this base. Its sites are chosen and its parameters initialised by `options`.
    pub fn trainable(&self, options: &LoraOptions) -> fault::Result<Trainable> {
        let sites = sites::sites(&self.facts, options)?;
        let adapter = Trainable::init(sites, options, self.dtype, &self.device)?;
        if adapter.has_magnitudes() {
            self.begin_magnitudes(&adapter)?;
        }
        if !adapter.tokens.is_empty() {
            self.begin_token_rows(&adapter)?;
        }
        Ok(adapter)
    }

    /// Sets DoRA's magnitudes to the lengths of the frozen rows.
    fn begin_magnitudes(&self, adapter: &Trainable) -> Result<()> {
        let mut tour = self.tour(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            tour.enter(i)?;
            layer.linears().try_for_each(|linear| adapter.begin_magnitudes(linear))?;
        }
        Ok(())
    }

    /// Keeps the 4-bit weights of the upper `layers` layers expanded beside their codes from their next products on,
    /// and those of no other layer. Products of these layers have the same bits and need not expand a weight again. On
    /// a CPU it changes nothing.
    pub fn keep_expanded(&self, layers: usize) {
        let below = self.layers.len() - layers.min(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            for linear in layer.linears() {
                if let Weight::FourBit(weight) = &linear.weight {
                    weight.expanded.keep(i >= below);
                }
            }
        }
    }

    /// Returns the sum of the targets' losses, and adds the gradient of `scale` times that sum to the adapter's
    /// gradient buffer. `keep` has one level per layer; the levels do not change the result.
    pub fn forward_backward(
        &self,
        adapter: &Trainable,
        keep: &[Keep],
        batch: &Batch,
        scale: f64,
    ) -> Result<Number> {
        self.forward_backward_by_layer(adapter, keep, batch, scale, &mut |_| Ok(()))
    }

    /// Does `forward_backward`, and calls `done` with each layer whose gradients this pass has added, from the last
    /// layer to the lowest adapted one.
    pub fn forward_backward_by_layer(
        &self,
        adapter: &Trainable,
        keep: &[Keep],
        batch: &Batch,
        scale: f64,
        done: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Number> {
        // It comes first: if anything fails, other ranks wait for its gatherings.
        let tour = self.tour(self.lowest(adapter));
        let (embedded, prepared) = self.prepare(batch, scale)?;
        self.run(tour, adapter, keep, batch, embedded, &prepared, done)
    }

    /// Computes a pass from its batch's copy on the device. `recorded` decides whether a graph can hold it.
    #[cfg(feature = "cuda")]
    pub(super) fn forward_backward_prepared(
        &self,
        adapter: &Trainable,
        keep: &[Keep],
        batch: &Batch,
        (embedded, prepared): (&embedding::Sent, &Prepared),
    ) -> Result<Number> {
        let tour = self.tour(self.lowest(adapter));
        self.run(tour, adapter, keep, batch, embedded.clone(), prepared, &mut |_| Ok(()))
    }

    /// Copies the values that a training pass reads of its batch to the device: the tokens, which the first layer
    /// takes, and the rest.
    pub(super) fn prepare<'a>(
        &self,
        batch: &'a Batch,
        scale: f64,
    ) -> Result<(embedding::Sent, Prepared<'a>)> {
        let device = &self.device;
        let (positions, lengths) = batch.positions();
        let noise = match batch.noise {
            0.0 => None,
            alpha => Some(noise::Bounds::send(alpha, &lengths, self.facts.width, device)?),
        };
        let goal = Goal { scale, smoothing: batch.label_smoothing };
        let (ids, factor) = (&batch.ids, self.embedding_factor());
        let embedded = embedding::send(&self.embedding, ids, factor, self.dtype, device)?;
        let prepared = Prepared {
            turns: self.send_turns(positions, lengths, batch.room)?,
            packing: batch.packing(),
            keys: dropout::keys(&batch.keys, device)?,
            noise,
            wanted: rows::Index::send(&batch.target_rows, batch.rows(), device)?,
            aims: cross_entropy::Aims::send(&batch.targets, goal, device)?,
        };
        Ok((embedded, prepared))
    }

    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        mut tour: Tour,
        adapter: &Trainable,
        keep: &[Keep],
        batch: &Batch,
        embedded: embedding::Sent,
        prepared: &Prepared,
        done: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Number> {
        // The backward pass needs nothing below.
        let lowest = self.lowest(adapter);
        let below = adapter.rows_of(Table::Embedding).is_some();
        let turns = prepared.turns.turns()?;
        let lora = Lora::Training(Training { adapter, dropout_keys: Some(&prepared.keys) });
        let pass = self.pass(&turns, &prepared.packing, lora);
        let mut x = self.embed_with_noise(batch, embedded, prepared, &lora)?;
        let mut kept: Vec<Kept> = Vec::with_capacity(self.layers.len());
        let mut host = self.inputs.open(self.layers.len(), &self.device)?;
        for (i, layer) in self.layers.iter().enumerate() {
            tour.enter(i)?;
            let keep = if i < lowest { Keep::LayerInputs } else { keep[i] };
            if keep == Keep::HostInputs {
                host.leave(i, &x)?;
            }
            let (y, of_layer) = layer.forward(x, keep, &pass)?;
            host.left()?;
            x = y;
            if i >= lowest {
                kept.push(of_layer);
            }
        }
        let spare =
            self.layers.iter().skip(lowest).map(|layer| layer.spare(batch.rows(), &self.device, &pass));
        let (loss, d) = self.head_forward_backward(&x, batch, prepared, &lora, spare.max().unwrap_or(0))?;
        drop(x);
        let mut d = Operand::from(d);
        for (i, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            tour.enter(i)?;
            let mut of_layer = kept.pop().expect("one entry a layer");
            if of_layer.is_away() {
                of_layer.arrived(host.bring(i)?);
            }
            // The next input comes while this layer is computed.
            if kept.last().is_some_and(Kept::is_away) {
                host.expect(i - 1)?;
            }
            let rounded = i > lowest && self.layers[i - 1].rounds(batch.rows(), &self.device, &pass);
            d = layer.backward(d, of_layer, i == lowest && !below, rounded, &pass)?;
            done(i)?;
        }
        self.collect_embedding(&d.values, &batch.ids, adapter)?;
        Ok(loss)
    }

    /// Returns the number of values that each layer holds after the forward pass.
    #[cfg(test)]
    pub fn kept_values(&self, adapter: &Trainable, keep: &[Keep], batch: &Batch) -> Result<Vec<usize>> {
        let (turns, packing) = (self.turns(batch)?, batch.packing());
        let pass = self.pass(&turns, &packing, adapter.evaluated());
        let mut x = self.embed(&batch.ids, &Lora::None)?;
        let (mut values, mut tour) = (Vec::new(), self.tour(self.layers.len()));
        for (i, (layer, keep)) in self.layers.iter().zip(keep).enumerate() {
            tour.enter(i)?;
            let (y, kept) = layer.forward(x, *keep, &pass)?;
            values.push(kept.values());
            x = y;
        }
        Ok(values)
    }

    /// Returns the sum of the targets' losses, without gradients or dropout.
    pub fn loss(&self, batch: &Batch, lora: Lora) -> Result<Number> {
        let hidden = rows::gather(&self.hidden(batch, lora)?, &batch.target_rows)?;
        let hidden = self.final_norm.forward(&hidden)?;
        let head = self.head_with(&lora, Wanted::Some(&batch.target_rows))?;
        cross_entropy::forward(&hidden, &head, &batch.targets, self.precision)
    }

    /// Returns the result of `loss`, and the number of targets that are the most probable token (the lowest id of equal
    /// ones).
    pub fn loss_and_hits(&self, batch: &Batch, lora: Lora) -> Result<(Number, Number)> {
        let hidden = rows::gather(&self.hidden(batch, lora)?, &batch.target_rows)?;
        let hidden = self.final_norm.forward(&hidden)?;
        let head = self.head_with(&lora, Wanted::Some(&batch.target_rows))?;
        cross_entropy::forward_counting(&hidden, &head, &batch.targets, self.precision)
    }

    /// Returns logits of every row, [T, V].
    pub fn logits(&self, batch: &Batch, lora: Lora) -> Result<Tensor> {
        let hidden = self.final_norm.forward(&self.hidden(batch, lora)?)?;
        let head = self.head_with(&lora, Wanted::All(batch.rows()))?;
        cross_entropy::logits(&hidden, &head, self.precision)
    }

    /// Returns the loss of every target of the batch, and whether the target is the most probable token (the lowest id
    /// of equal ones).
    pub fn scores(&self, batch: &Batch, lora: Lora) -> Result<Vec<(f64, bool)>> {
        let hidden = rows::gather(&self.hidden(batch, lora)?, &batch.target_rows)?;
        let hidden = self.final_norm.forward(&hidden)?;
        let head = self.head_with(&lora, Wanted::Some(&batch.target_rows))?;
        let chunk = cross_entropy::chunk_rows(self.facts.vocab, 4, !self.device.is_cpu());
        let mut scores = Vec::with_capacity(batch.targets.len());
        for (at, targets) in batch.targets.chunks(chunk).enumerate() {
            let logits = cross_entropy::logits(
                &hidden.narrow(0, at * chunk, targets.len())?,
                &head.from_row(at * chunk),
                self.precision,
            )?;
            let logits = logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            let rows = logits.par_iter().zip(targets);
            scores.par_extend(rows.map(|(row, &target)| score(row, target as usize)));
        }
        Ok(scores)
    }

    /// Computes one step of serving: new rows of running sequences, whose keys and values are added to the cache.
    /// Returns the logits of the wanted rows, [wanted, V]. A row's bits depend on its own sequence alone.
    pub fn step(&self, step: &Step, cache: &mut Cache, lora: Lora) -> Result<Tensor> {
        let (sent, segments) = (self.send(step)?, Segments::new(&step.segments));
        let hidden = self.step_hidden(step, &sent, &segments, &mut cache.layers, lora)?;
        if step.wanted.is_empty() {
            return Tensor::zeros((0, self.facts.vocab), DType::F32, &Device::Cpu);
        }
        let short = step.wanted.partition_point(|row| (*row as usize) < step.short());
        let head = self.head_with(&lora, Wanted::Some(&step.wanted))?;
        cross_entropy::logits_apart(&hidden, &head, self.precision, short)
    }

    /// Copies a step's tokens and positions to the device.
    pub(super) fn send(&self, step: &Step) -> Result<Sent> {
        let (positions, lengths) = step.positions();
        let (ids, factor) = (&step.ids, self.embedding_factor());
        let embedded = embedding::send(&self.embedding, ids, factor, self.dtype, &self.device)?;
        Ok(Sent { embedded, turns: self.send_turns(positions, lengths, 0)? })
    }

    /// Returns the wanted rows of a step behind the final norm.
    pub(super) fn step_hidden(
        &self,
        step: &Step,
        sent: &Sent,
        segments: &Segments,
        stores: &mut [Store],
        lora: Lora,
    ) -> Result<Tensor> {
        let (turns, packing) = (sent.turns.turns()?, Packing::new(Vec::new()));
        let (short, frozen) = (step.short(), self.precision);
        let pass = Pass { apart: true, short, frozen, ..self.pass(&turns, &packing, lora) };
        let (mut x, mut tour) = (sent.embedded.rows(&self.embedding)?, self.tour(self.layers.len()));
        self.embed_trained(&x, &step.ids, &lora)?;
        for (i, (layer, store)) in self.layers.iter().zip(stores).enumerate() {
            tour.enter(i)?;
            x = layer.step(&x, &pass, segments, store)?;
        }
        // They ascend: as many as there are rows are all of them.
        let wanted = match step.wanted.len() {
            all if all == step.ids.len() => x,
            0 => return Ok(x),
            _ => rows::gather(&x, &step.wanted)?,
        };
        self.final_norm.forward(&wanted)
    }

    /// Returns the number of bytes of the frozen base.
    pub fn base_bytes(&self) -> usize {
        let linear = |layer: &Layer| layer.linears().map(|linear| linear.weight.bytes()).sum::<usize>();
        let head = if self.facts.tied_head { 0 } else { self.head.weight.bytes() };
        let embedding = self.embedding.elem_count() * self.embedding.dtype().size_in_bytes();
        embedding + head + self.layers.iter().map(linear).sum::<usize>()
    }

    /// Returns the residual stream after the last layer, [T, C].
    fn hidden(&self, batch: &Batch, lora: Lora) -> Result<Tensor> {
        let mut tour = self.tour(self.layers.len());
        let (turns, packing) = (self.turns(batch)?, batch.packing());
        let pass = self.pass(&turns, &packing, lora);
        let mut x = self.embed(&batch.ids, &lora)?;
        for (i, layer) in self.layers.iter().enumerate() {
            tour.enter(i)?;
            x = layer.forward(x, Keep::LayerInputs, &pass)?.0;
        }
        Ok(x)
    }

    /// Returns a pass's way through the layers: forward, and back to `lowest`.
    fn tour(&self, lowest: usize) -> Tour<'_> {
        Tour::new(self.ring.as_ref(), self.layers.len(), lowest)
    }

    /// Announces so many passes of this rank: forward and backward for an adapter in training, forward without one. All
    /// ranks announce theirs at the same time. If they share the base, those with fewer passes gather for the others.
    ///
    /// # Errors
    /// The errors of the ranks.
    pub fn together(&self, passes: usize, adapter: Option<&Trainable>) -> fault::Result<Together<'_>> {
        let layers = self.layers.len();
        let lowest = adapter.map_or(layers, |adapter| self.lowest(adapter));
        Together::new(self.ring.as_ref(), layers, lowest, passes)
    }

    /// Returns the layers that the backward pass reaches, from the lowest on.
    pub(super) fn gradients_from(&self, adapter: &Trainable) -> std::ops::Range<usize> {
        self.lowest(adapter)..self.layers.len()
    }

    /// Returns the lowest layer that the backward pass reaches.
    fn lowest(&self, adapter: &Trainable) -> usize {
        sites::lowest(&adapter.sites, &adapter.tokens, self.layers.len())
    }

    fn embed(&self, ids: &[u32], lora: &Lora) -> Result<Tensor> {
        let factor = self.embedding_factor();
        let x = embedding::forward(&self.embedding, ids, factor, self.dtype, &self.device)?;
        self.embed_trained(&x, ids, lora)?;
        Ok(x)
    }

    /// Returns the embeddings with NEFTune's noise, if the batch asks for it. The noise lies behind a factor that the
    /// embedding itself applies, and before one that the model applies afterwards.
    fn embed_with_noise(
        &self,
        batch: &Batch,
        embedded: embedding::Sent,
        prepared: &Prepared,
        lora: &Lora,
    ) -> Result<Tensor> {
        let x = embedded.rows(&self.embedding)?;
        self.embed_trained(&x, &batch.ids, lora)?;
        if let Some(bounds) = &prepared.noise {
            let factor = if self.facts.embedding_scale.rounded { 1.0 } else { self.embedding_factor() };
            noise::add(&x, bounds, factor, &prepared.keys)?;
        }
        Ok(x)
    }

    /// Returns the factor on the embeddings, rounded as the reference rounds it.
    pub(super) fn embedding_factor(&self) -> f64 {
        let scale = &self.facts.embedding_scale;
        match (scale.rounded, self.precision) {
            (false, _) => scale.factor,
            (true, Precision::F32) => scale.factor as f32 as f64,
            (true, Precision::Bf16 | Precision::Fp8) => half::bf16::from_f64(scale.factor).to_f64(),
        }
    }

    /// Returns the rotations of a batch's rows. Each row has one row of angles for each of the heads' runs.
    fn turns(&self, batch: &Batch) -> Result<Turns> {
        let (positions, lengths) = batch.positions();
        self.turns_at(positions, lengths)
    }

    fn turns_at(&self, positions: Vec<u32>, lengths: Vec<u32>) -> Result<Turns> {
        self.send_turns(positions, lengths, 0)?.turns()
    }

    /// Sends the angles to the device. The lists have room for `examples` examples; 0: for those that there are.
    fn send_turns(&self, positions: Vec<u32>, lengths: Vec<u32>, examples: usize) -> Result<SentTurns> {
        let growth = self.facts.query_growth.map(|growth| self.growth(&growth, &positions)).transpose()?;
        let (runs, _) = self.facts.heads().turning();
        let for_each_run = |numbers: Vec<u32>| -> Vec<u32> {
            numbers.into_iter().flat_map(|number| std::iter::repeat_n(number, runs)).collect()
        };
        let (positions, lengths) = (for_each_run(positions), for_each_run(lengths));
        let ropes = self.facts.ropes.iter();
        let ropes =
            ropes.map(|rope| Angles::send(rope, &positions, &lengths, examples, self.wide(), &self.device));
        Ok(SentTurns { ropes: ropes.collect::<Result<_>>()?, growth })
    }

    /// Returns the type of angles and growth: f32 even for bf16 activations.
    fn wide(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }

    fn growth(&self, growth: &QueryGrowth, positions: &[u32]) -> Result<Angles> {
        let (rows, half) = (positions.len(), self.facts.heads().width / 2);
        let lengths: Vec<f64> = positions.iter().map(|&position| growth.at(position)).collect();
        let lengths = Tensor::from_vec(lengths, (rows, 1), &Device::Cpu)?.to_dtype(self.wide())?;
        let cos = lengths.expand((rows, half))?.contiguous()?;
        Ok(Angles { sin: put(&cos.zeros_like()?, &self.device)?, cos: put(&cos, &self.device)? })
    }

    fn pass<'a>(&self, turns: &'a Turns, packing: &'a Packing, lora: Lora<'a>) -> Pass<'a> {
        let (angles, growth) = (turns.ropes.as_slice(), turns.growth.as_ref());
        Pass {
            precision: self.precision,
            frozen: self.frozen,
            apart: false,
            short: 0,
            lora,
            angles,
            growth,
            packing,
        }
    }

    /// Returns the loss and the gradient of the last layer's output, [T, C + spare]. Only supervised rows reach the
    /// head.
    fn head_forward_backward(
        &self,
        x: &Tensor,
        batch: &Batch,
        prepared: &Prepared,
        lora: &Lora,
        spare: usize,
    ) -> Result<(Number, Tensor)> {
        let x_rows = rows::gather_at(x, &prepared.wanted)?;
        let hidden = self.final_norm.forward(&x_rows)?;
        let head = self.head_with(lora, Wanted::Some(&batch.target_rows))?;
        let (loss, d_hidden) =
            cross_entropy::forward_backward_to(&hidden, &head, &prepared.aims, self.precision)?;
        let d_rows = x_rows.zeros_like()?;
        self.final_norm.backward(&d_hidden, &x_rows, &d_rows)?;
        Ok((loss, rows::scatter_at(&d_rows, &prepared.wanted, batch.rows(), spare)?))
    }
}

/// Returns the loss of one target in f64, and whether it is the first of the largest logits.
fn score(logits: &[f32], target: usize) -> (f64, bool) {
    let (mut largest, mut first) = (f32::NEG_INFINITY, 0);
    for (at, &logit) in logits.iter().enumerate() {
        if logit > largest {
            (largest, first) = (logit, at);
        }
    }
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    (sum.ln() + f64::from(largest) - f64::from(logits[target]), first == target)
}
