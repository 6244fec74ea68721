//! LoRA adapters beside the frozen base: one in training with its gradients, or several finished ones with
//! strengths.
//!
//! All pairs of the adapter in training share one flat parameter buffer and one flat gradient buffer (f32; f64 in
//! tests), so that the optimizer and the norm are one operation each. The buffer holds A [R, K], then B [N, R], then
//! DoRA's magnitudes `[N]` if there are any (`model/dora.rs`), site by site. Finished adapters are added without
//! merging: the sum of strength * scale * B A.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::facts::sites::{Site, Sites, TokenRows};
use crate::facts::{LoraInit, LoraOptions, Precision};
use crate::ops::matmul::{self, Weight};
#[cfg(feature = "cuda")]
use crate::ops::{adapters, low_rank};
use crate::ops::{dropout, flat, row_pairs, unwritten};

use super::dora::{self, Dora};
use super::inside::Member;
use super::linear::Linear;
use super::pass::Pass;
use super::tokens::{self, FinishedRows};

/// LoRA's `dropout(x) A^T` [T, R] of one linear layer. `None`: the layer is not adapted, or the adapter is not in
/// training.
pub type Low = Option<Tensor>;

/// The adapters that a pass adds to the base.
#[derive(Clone, Copy)]
pub enum Lora<'a> {
    /// No adapter: the bare base.
    None,
    /// The adapter in training, on every row.
    Training(Training<'a>),
    /// Finished adapters, each on its own rows.
    Mixed(&'a Mixture<'a>),
}

/// The adapter in training, for one pass.
#[derive(Clone, Copy)]
pub struct Training<'a> {
    /// The adapter.
    pub adapter: &'a Trainable,
    /// The dropout keys of the rows in a training pass; `None` in evaluation.
    pub dropout_keys: Option<&'a Tensor>,
}

/// A finished adapter on some rows of a batch.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The adapter.
    pub adapter: &'a Pairs,
    /// The rows that it is added to.
    pub rows: Range<usize>,
    /// Factor on its output; 0 skips it.
    pub strength: f64,
}

/// Finished adapters over the rows of one batch. Parts may overlap: a row gets the sum of all parts that cover it,
/// in the order of the list.
#[derive(Debug, Default)]
pub struct Mixture<'a> {
    parts: Vec<Part<'a>>,
    /// The adapters of short parts, row by row, on a GPU; made once a step.
    #[cfg(feature = "cuda")]
    items: std::sync::OnceLock<Option<adapters::Items>>,
}

/// A [R, K] and B [N, R] of one linear layer.
#[derive(Clone, Debug)]
pub struct Pair {
    /// A [R, K].
    pub a: Weight,
    /// B [N, R].
    pub b: Weight,
    /// Factor on `x A^T B^T`: alpha / r, or alpha / sqrt(r).
    pub scale: f64,
    /// DoRA's magnitudes, if the pair has them.
    pub dora: Option<Dora>,
}

/// The pairs of a finished adapter, by the index of their linear layer (`Facts::projections`).
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    list: Vec<Option<Pair>>,
    /// Trained rows of tables of tokens.
    tokens: Vec<FinishedRows>,
    /// B of each pair as `row_pairs` reads it, for few rows on a CPU; made once.
    across: std::sync::OnceLock<Vec<Option<Tensor>>>,
    /// Addresses of the matrices on a GPU; made once.
    #[cfg(feature = "cuda")]
    table: std::sync::OnceLock<Tensor>,
}

/// The adapter in training: the flat buffers of all pairs.
#[derive(Clone, Debug)]
pub struct Trainable {
    /// The linear layers with a pair, in order.
    pub sites: Vec<Site>,
    /// The trained rows of tables of tokens; their values stand before those of the pairs.
    pub tokens: Vec<TokenRows>,
    pub(super) token_learners: Vec<tokens::Learner>,
    /// The parameters that the optimizer updates: f32 (f64 in tests).
    pub params: Tensor,
    /// The gradients, as long as `params`: all of `sums` behind the losses.
    pub grads: Tensor,
    /// The values that the ranks of a run add up: the ranks' losses, then the gradients. The losses are known last, and
    /// so are the gradients of the first layers, which stand beside them.
    pub sums: Tensor,
    /// The parameters that passes compute with: `params` itself, or its bf16 copy.
    pub compute: Tensor,
    /// Probability that a training pass drops an element of a pair's input.
    pub dropout: f64,
    /// The pairs by the index of their linear layer.
    learners: Vec<Option<Learner>>,
}

/// Elements before the gradients for the ranks' losses, and for one of them. Kernels read from multiples of 16 bytes
/// on.
pub const LOSSES: usize = 128;
const LOSS: usize = 4;

/// Returns the number of bytes of a parameter and its gradient in f32. `copied`: passes compute with a bf16 copy.
pub fn parameter_bytes(copied: bool) -> usize {
    8 + if copied { 2 } else { 0 }
}

/// One pair in training: views into the flat buffers.
#[derive(Clone, Debug)]
pub(super) struct Learner {
    /// A and B as passes compute with them.
    pub pair: Pair,
    /// B [N, R] in the parameters' own type.
    #[cfg(feature = "cuda")]
    b: Tensor,
    /// The gradient of A.
    pub grad_a: Tensor,
    /// The gradient of B.
    pub grad_b: Tensor,
    /// The gradient of DoRA's magnitudes, if the pair has them.
    pub grad_magnitude: Option<Tensor>,
    /// Index of A's first element in the flat buffer.
    offset: usize,
    /// A number that makes this pair's dropout masks differ from the others'.
    pub mask: u64,
}

impl Lora<'_> {
    /// Adds the adapter's output for x to y[:, at..at+N].
    pub(super) fn forward(
        &self,
        linear: &Linear,
        x: &Tensor,
        y: &Tensor,
        at: usize,
        pass: &Pass,
    ) -> Result<Low> {
        match self {
            Lora::None => Ok(None),
            Lora::Training(training) => training.forward(linear, x, y, at, pass.precision),
            Lora::Mixed(mixture) => mixture.forward(&[(at, linear)], x, y, pass).map(|()| None),
        }
    }
}

#[cfg(feature = "cuda")]
impl Part<'_> {
    /// Rows from which on two products are quicker than each row for itself.
    const LONG_ROWS: usize = 64;

    fn is_long(&self) -> bool {
        self.rows.len() >= Self::LONG_ROWS
    }

    fn is_short_with_magnitudes(&self) -> bool {
        !self.is_long() && self.adapter.has_magnitudes()
    }
}

impl Pair {
    /// Returns x A^T [T, R].
    pub(super) fn low(&self, x: &Tensor, precision: Precision) -> Result<Tensor> {
        let low = unwritten((x.dim(0)?, self.a.dims().0), x.dtype(), x.device())?;
        matmul::forward(x, &self.a, 1.0, &low, 0, 0.0, precision)?;
        Ok(low)
    }
}

impl Pairs {
    /// Makes an adapter from pairs with the indices of their linear layers.
    pub fn new(pairs: impl IntoIterator<Item = (usize, Pair)>) -> Pairs {
        Pairs {
            list: by_number(pairs),
            tokens: Vec::new(),
            across: Default::default(),
            #[cfg(feature = "cuda")]
            table: Default::default(),
        }
    }

    /// Returns the same adapter with trained rows of tables of tokens.
    pub fn with_tokens(self, tokens: Vec<FinishedRows>) -> Pairs {
        Pairs { tokens, ..self }
    }

    /// Returns the trained rows of tables of tokens.
    pub fn tokens(&self) -> &[FinishedRows] {
        &self.tokens
    }

    /// Returns the pair of a linear layer, if this adapter has one.
    pub fn get(&self, linear: usize) -> Option<&Pair> {
        self.list.get(linear).and_then(Option::as_ref)
    }

    /// Returns the largest rank of a pair; 0 without pairs.
    pub fn rank(&self) -> usize {
        self.list.iter().flatten().map(|pair| pair.a.dims().0).max().unwrap_or(0)
    }

    /// Returns B of each pair as `row_pairs` reads it, by the index of its linear layer; `None`: there is none, or it
    /// is in 4 bits.
    fn across(&self) -> Result<&[Option<Tensor>]> {
        if self.across.get().is_none() {
            let across = |pair: &Option<Pair>| match pair {
                Some(Pair { b: Weight::Dense(b), .. }) => row_pairs::across(b).map(Some),
                _ => Ok(None),
            };
            // Two threads may make it at once: either is right.
            let _ = self.across.set(self.list.iter().map(across).collect::<Result<_>>()?);
        }
        Ok(self.across.get().expect("just made"))
    }

    /// Returns whether a pair has magnitudes.
    pub fn has_magnitudes(&self) -> bool {
        self.list.iter().flatten().any(|pair| pair.dora.is_some())
    }

    /// Returns addresses of the matrices, for the launches that serve many adapters.
    #[cfg(feature = "cuda")]
    fn table(&self, device: &Device) -> Result<&Tensor> {
        if self.table.get().is_none() {
            let layer = |pair: &Option<Pair>| match pair {
                Some(Pair { a: Weight::Dense(a), b: Weight::Dense(b), scale, .. }) => {
                    Ok(Some((a.clone(), b.clone(), *scale)))
                }
                Some(_) => candle_core::bail!("an adapter in 4 bits"),
                None => Ok(None),
            };
            let layers = self.list.iter().map(layer).collect::<Result<Vec<_>>>()?;
            let layers = layers
                .iter()
                .map(|layer| layer.as_ref().map(|(a, b, scale)| adapters::Matrices { a, b, scale: *scale }));
            // Two threads may make it at once: either is right.
            let _ = self.table.set(adapters::table(layers, device)?);
        }
        Ok(self.table.get().expect("just made"))
    }

    /// Returns the number of bytes of all matrices, and of the magnitudes with the lengths that belong to them. A CPU
    /// holds B twice (`across`).
    pub fn bytes(&self) -> usize {
        let magnitudes = |pair: &Pair| if pair.dora.is_some() { 12 * pair.b.dims().0 } else { 0 };
        let held = |b: &Weight| match b {
            Weight::Dense(tensor) if tensor.device().is_cpu() => 2 * b.bytes(),
            _ => b.bytes(),
        };
        let pairs = self.list.iter().flatten().map(|pair| pair.a.bytes() + held(&pair.b) + magnitudes(pair));
        pairs.chain(self.tokens.iter().map(FinishedRows::bytes)).sum()
    }
}

fn by_number<T>(entries: impl IntoIterator<Item = (usize, T)>) -> Vec<Option<T>> {
    let mut list = Vec::new();
    for (number, entry) in entries {
        if list.len() <= number {
            list.resize_with(number + 1, || None);
        }
        list[number] = Some(entry);
    }
    list
}

impl<'a> Mixture<'a> {
    /// Returns the sum of these adapters, each on its rows and with its strength.
    pub fn new(parts: Vec<Part<'a>>) -> Mixture<'a> {
        Mixture {
            parts,
            #[cfg(feature = "cuda")]
            items: Default::default(),
        }
    }

    /// Returns whether an adapter has magnitudes.
    pub(super) fn has_magnitudes(&self) -> bool {
        self.parts.iter().any(|part| part.adapter.has_magnitudes())
    }

    /// Returns the adapters with their rows and strengths.
    pub(super) fn parts(&self) -> &[Part<'a>] {
        &self.parts
    }

    /// Adds the adapters' parts of x, for layers that read the same x, each with the first of its columns in y.
    pub(super) fn forward(
        &self,
        linears: &[(usize, &Linear)],
        x: &Tensor,
        y: &Tensor,
        pass: &Pass,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return self.forward_on_gpu(linears, x, y, pass);
        }
        let layers = self.short_layers(linears, pass)?;
        let is_added = layers.map_or(Ok(false), |layers| row_pairs::add(x, y, &layers, pass.precision))?;
        let short = if is_added { pass.short } else { 0 };
        // The part that a row gets from an adapter does not depend on other rows' adapters.
        let behind = |part: &Part<'a>| {
            let from = if part.adapter.has_magnitudes() { 0 } else { short };
            Part { rows: part.rows.start.max(from)..part.rows.end.max(from), ..part.clone() }
        };
        let parts: Vec<Part> = self.parts.iter().map(behind).collect();
        linears.iter().try_for_each(|(at, linear)| self.products(linear, x, y, *at, pass, pass.apart, &parts))
    }

    /// Returns the pairs on the rows of short segments on a CPU, except those of adapters with magnitudes, which also
    /// change the base's output. `None`: they are left to products.
    pub(super) fn short_layers(
        &self,
        linears: &[(usize, &Linear)],
        pass: &Pass,
    ) -> Result<Option<Vec<row_pairs::Layer<'_>>>> {
        let short = if pass.apart { pass.short } else { 0 };
        if short == 0 {
            return Ok(None);
        }
        let across = self.parts.iter().map(|part| part.adapter.across()).collect::<Result<Vec<_>>>()?;
        let mut layers = Vec::with_capacity(linears.len());
        for (at, linear) in linears {
            let mut pairs = Vec::new();
            for (Part { adapter, rows, strength }, across) in self.parts.iter().zip(&across) {
                let rows = rows.start..rows.end.min(short);
                let adds = *strength != 0.0 && !rows.is_empty() && !adapter.has_magnitudes();
                let Some(pair) = adapter.get(linear.site).filter(|_| adds) else { continue };
                let (Weight::Dense(a), Some(b)) = (&pair.a, &across[linear.site]) else { return Ok(None) };
                let factor = pair.scale * linear.factor * strength;
                pairs.push(row_pairs::Pair { a, b, rows, factor });
            }
            layers.push(row_pairs::Layer { at: *at, columns: linear.weight.dims().0, pairs });
        }
        Ok(Some(layers))
    }

    /// Adds short parts row by row, so that a row's bits depend on its own adapters alone, and the other parts by
    /// products.
    #[cfg(feature = "cuda")]
    fn forward_on_gpu(
        &self,
        linears: &[(usize, &Linear)],
        x: &Tensor,
        y: &Tensor,
        pass: &Pass,
    ) -> Result<()> {
        if let Some(items) = self.items(x)? {
            // Layers side by side have one factor; if not, they are no layers of one launch.
            for group in linears.chunk_by(|(_, left), (_, right)| left.factor == right.factor) {
                let part = |(at, linear): &(usize, &Linear)| adapters::Part {
                    site: linear.site,
                    at: *at,
                    columns: linear.weight.dims().0,
                };
                items.add(x, y, &group.iter().map(part).collect::<Vec<_>>(), group[0].1.factor)?;
            }
        }
        self.by_products(linears, x, y, pass)
    }

    /// `x A^T` of the short parts' adapters, for layers with one factor whose product adds the rest. `None`: none of
    /// them has a pair for these layers.
    #[cfg(feature = "cuda")]
    pub(super) fn low(&self, linears: &[(usize, &Linear)], x: &Tensor) -> Result<Option<adapters::Low<'_>>> {
        let sites: Vec<usize> = linears.iter().map(|(_, linear)| linear.site).collect();
        self.items(x)?.map_or(Ok(None), |items| items.low(x, &sites, linears[0].1.factor))
    }

    /// Returns the layers' input and `low` of it in one launch, if that is better.
    #[cfg(feature = "cuda")]
    pub(super) fn make(
        &self,
        linears: &[Linear],
        source: &adapters::Source,
        x: &Tensor,
    ) -> Result<Option<(Tensor, adapters::Low<'_>)>> {
        let sites: Vec<usize> = linears.iter().map(|linear| linear.site).collect();
        self.items(x)?.map_or(Ok(None), |items| items.make(source, &sites, linears[0].factor))
    }

    /// Adds the parts that `low` leaves out to y.
    #[cfg(feature = "cuda")]
    pub(super) fn by_products(
        &self,
        linears: &[(usize, &Linear)],
        x: &Tensor,
        y: &Tensor,
        pass: &Pass,
    ) -> Result<()> {
        let long: Vec<Part> = self.parts.iter().filter(|part| part.is_long()).cloned().collect();
        // Magnitudes have no launch for single rows.
        let apart: Vec<Part> =
            self.parts.iter().filter(|part| part.is_short_with_magnitudes()).cloned().collect();
        for (at, linear) in linears {
            self.products(linear, x, y, *at, pass, false, &long)?;
            self.products(linear, x, y, *at, pass, pass.apart, &apart)?;
        }
        Ok(())
    }

    /// Returns the adapters of short parts, row by row, for a step with the rows of x.
    #[cfg(feature = "cuda")]
    fn items(&self, x: &Tensor) -> Result<Option<&adapters::Items>> {
        if self.items.get().is_none() {
            // The cell is not shared between threads.
            let _ = self.items.set(self.short_items(x.dim(0)?, false, x.device())?);
        }
        Ok(self.items.get().and_then(Option::as_ref))
    }

    /// Returns whether all adapters are added row by row. Then launches depend on the numbers of `send` alone.
    #[cfg(feature = "cuda")]
    pub(super) fn is_row_by_row(&self) -> bool {
        let row_by_row = |part: &Part| {
            let is_plain = !part.adapter.has_magnitudes() && part.adapter.tokens().is_empty();
            part.strength == 0.0 || (is_plain && !part.is_long())
        };
        self.parts.iter().all(row_by_row)
    }

    /// Returns the same adapters, of which nothing was copied to a GPU yet.
    #[cfg(feature = "cuda")]
    pub(super) fn again(&self) -> Mixture<'a> {
        Mixture::new(self.parts.clone())
    }

    /// Makes the adapters' tables, which outlive a step.
    #[cfg(feature = "cuda")]
    pub(super) fn make_tables(&self, device: &Device) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.adapter.table(device).map(|_| ()))
    }

    /// Copies the values that layers read of the adapters to a GPU, once, for a step of `rows` rows.
    #[cfg(feature = "cuda")]
    pub(super) fn send(&self, rows: usize, device: &Device) -> Result<()> {
        let _ = self.items.set(self.short_items(rows, true, device)?);
        Ok(())
    }

    /// `fill_up`: the lists have few different lengths.
    #[cfg(feature = "cuda")]
    fn short_items(
        &self,
        step_rows: usize,
        fill_up: bool,
        device: &Device,
    ) -> Result<Option<adapters::Items>> {
        let mut rows = std::collections::BTreeMap::<usize, Vec<&Part>>::new();
        let mut extent = adapters::Extent { rows: step_rows, rank: 0, sites: Vec::new() };
        let alone = |part: &&Part| {
            let adds = part.strength != 0.0 && part.adapter.rank() > 0;
            adds && !part.is_long() && !part.adapter.has_magnitudes()
        };
        for part in self.parts.iter().filter(alone) {
            part.rows.clone().for_each(|row| rows.entry(row).or_default().push(part));
            let list = &part.adapter.list;
            extent.rank = extent.rank.max(part.adapter.rank());
            extent.sites.resize(extent.sites.len().max(list.len()), false);
            extent.sites.iter_mut().zip(list).for_each(|(any, pair)| *any |= pair.is_some());
        }
        if rows.is_empty() {
            return Ok(None);
        }
        // Rows with the same adapter share the loaded values of it.
        let mut rows: Vec<(usize, Vec<&Part>)> = rows.into_iter().collect();
        rows.sort_by_key(|(row, parts)| (std::ptr::from_ref(parts[0].adapter), *row));
        let mut list = Vec::new();
        for (row, parts) in rows {
            for part in parts {
                list.push(adapters::Item {
                    row,
                    table: part.adapter.table(device)?,
                    strength: part.strength,
                });
            }
        }
        match fill_up {
            true => adapters::Items::filled_up(&list, extent, device).map(Some),
            false => {
                let few = step_rows <= matmul::FEW_ROWS;
                adapters::Items::new(&list, extent, few, device).map(Some)
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn products(
        &self,
        linear: &Linear,
        x: &Tensor,
        y: &Tensor,
        at: usize,
        pass: &Pass,
        apart: bool,
        parts: &[Part],
    ) -> Result<()> {
        for Part { adapter, rows, strength } in parts {
            let Some(pair) = adapter.get(linear.site).filter(|_| *strength != 0.0 && !rows.is_empty()) else {
                continue;
            };
            let (x, y) = (x.narrow(0, rows.start, rows.len())?, y.narrow(0, rows.start, rows.len())?);
            let short = pass.short.saturating_sub(rows.start);
            if let Some(magnitudes) = &pair.dora {
                let way = dora::Way { apart: apart.then_some(short), ..dora::Way::of(pass) };
                dora::serve(linear, pair, magnitudes, *strength, &x, &y, at, way)?;
                continue;
            }
            let low = unwritten((rows.len(), pair.a.dims().0), x.dtype(), x.device())?;
            let product =
                |x: &Tensor, weight: &Weight, alpha: f64, y: &Tensor, at: usize, beta: f64| match apart {
                    true => matmul::forward_apart(x, weight, alpha, y, at, beta, pass.precision, short),
                    false => matmul::forward(x, weight, alpha, y, at, beta, pass.precision),
                };
            product(&x, &pair.a, 1.0, &low, 0, 0.0)?;
            let scale = pair.scale * linear.factor * strength;
            product(&low, &pair.b, scale, &y, at, 1.0)?;
        }
        Ok(())
    }
}

impl Training<'_> {
    fn forward(
        &self,
        linear: &Linear,
        x: &Tensor,
        y: &Tensor,
        at: usize,
        precision: Precision,
    ) -> Result<Low> {
        let Some(learner) = self.adapter.learner(linear.site) else { return Ok(None) };
        let low = learner.pair.low(&self.input(learner, x)?, precision)?;
        let scale = learner.pair.scale * linear.factor;
        matmul::forward(&low, &learner.pair.b, scale, y, at, 1.0, precision)?;
        Ok(Some(low))
    }

    /// Adds the gradients of A and B to the flat buffer and, if wanted, that of x to `dx`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn backward(
        &self,
        linear: &Linear,
        dy: &Tensor,
        at: usize,
        x: &Tensor,
        low: Option<&Tensor>,
        dx: Option<&Tensor>,
        precision: Precision,
    ) -> Result<()> {
        let Some(learner) = self.adapter.learner(linear.site) else { return Ok(()) };
        let (pair, scale) = (&learner.pair, learner.pair.scale * linear.factor);
        let x = self.input(learner, x)?;
        let low = match low {
            Some(low) => low.clone(),
            None => pair.low(&x, precision)?,
        };
        matmul::weight_gradient(dy, at, &low, scale, &learner.grad_b, precision)?;
        let d_low = unwritten((x.dim(0)?, pair.a.dims().0), x.dtype(), x.device())?; // scale * dy B, [T, R]
        matmul::input_gradient(dy, at, &pair.b, scale, &d_low, 0.0, precision)?;
        matmul::weight_gradient(&d_low, 0, &x, 1.0, &learner.grad_a, precision)?;
        match (dx, self.dropout_keys) {
            (None, _) => Ok(()),
            (Some(dx), Some(keys)) if self.adapter.dropout > 0.0 => {
                let through = unwritten(dx.shape(), dx.dtype(), dx.device())?;
                matmul::input_gradient(&d_low, 0, &pair.a, 1.0, &through, 0.0, precision)?;
                let kept = dropout::apply(&through, self.adapter.dropout, keys, learner.mask)?;
                crate::ops::rows::add(dx, &kept)
            }
            (Some(dx), _) => matmul::input_gradient(&d_low, 0, &pair.a, 1.0, dx, 1.0, precision),
        }
    }

    /// Returns the pair's input: x, or x after dropout.
    pub(super) fn input(&self, learner: &Learner, x: &Tensor) -> Result<Tensor> {
        match self.dropout_keys {
            Some(keys) if self.adapter.dropout > 0.0 => {
                dropout::apply(x, self.adapter.dropout, keys, learner.mask)
            }
            _ => Ok(x.clone()),
        }
    }
}

impl Trainable {
    /// Returns whether every B is zero, so that the adapter changes nothing.
    pub fn is_without_effect(&self) -> candle_core::Result<bool> {
        let params = self.params.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let zero = |site: &Site| {
            let from = site.offset + site.rank * site.projection.cols;
            params[from..][..site.rank * site.projection.rows].iter().all(|value| *value == 0.0)
        };
        Ok(self.sites.iter().all(zero))
    }

    /// Initialises an adapter as PEFT does; the product of B and A is zero. Each site draws from its own stream of the
    /// seed, so that its values do not depend on the other chosen sites.
    ///
    /// `dtype` is the type of activations.
    pub fn init(sites: Sites, options: &LoraOptions, dtype: DType, device: &Device) -> Result<Trainable> {
        let total = sites.parameters();
        let Sites { list: sites, tokens, .. } = sites;
        let mut values = vec![0f32; total];
        for site in &sites {
            let [a, b] = site.matrices();
            let (before, after) = values.split_at_mut(b.start);
            initialize(&mut before[a], &mut after[..b.len()], site, options);
        }
        let master = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let params = Tensor::from_vec(values, total, &Device::Cpu)?.to_dtype(master)?;
        let compute = if dtype == master { None } else { Some(params.to_dtype(dtype)?.to_device(device)?) };
        let params = params.to_device(device)?;
        let sums = Tensor::zeros(LOSSES + total, master, device)?;
        let grads = sums.narrow(0, LOSSES, total)?;
        let compute = compute.unwrap_or_else(|| params.clone());
        let learners = sites.iter().enumerate().map(|(mask, site)| {
            let (a, b) = views(&compute, site)?;
            let (grad_a, grad_b) = views(&grads, site)?;
            // The magnitudes are never rounded to bf16: they scale whole columns.
            let dora = magnitudes(&params, site)?.map(Dora::new);
            let pair = Pair { a: Weight::Dense(a), b: Weight::Dense(b), scale: site.scale, dora };
            let learner = Learner {
                pair,
                #[cfg(feature = "cuda")]
                b: views(&params, site)?.1,
                grad_a,
                grad_b,
                grad_magnitude: magnitudes(&grads, site)?,
                offset: site.offset,
                mask: mask as u64,
            };
            Ok((site.linear, learner))
        });
        let learners = by_number(learners.collect::<Result<Vec<_>>>()?);
        let token_learner = |of: &TokenRows| {
            let (rows, gradient) = (tokens::view(&compute, of)?, tokens::view(&grads, of)?);
            Ok(tokens::Learner { rows, gradient })
        };
        let token_learners = tokens.iter().map(token_learner).collect::<Result<Vec<_>>>()?;
        Ok(Trainable {
            sites,
            tokens,
            token_learners,
            grads,
            sums,
            compute,
            params,
            dropout: options.dropout,
            learners,
        })
    }

    /// Returns this adapter for a pass without dropout.
    pub fn evaluated(&self) -> Lora<'_> {
        Lora::Training(Training { adapter: self, dropout_keys: None })
    }

    /// Copies the pairs as they are now; training does not change the copy.
    pub fn finished(&self) -> Result<Pairs> {
        let pair = |site: &Site| {
            let (a, b) = views(&self.compute, site)?;
            let (a, b) = (Weight::Dense(a.copy()?), Weight::Dense(b.copy()?));
            let dora = self.learner(site.linear).and_then(|learner| learner.pair.dora.as_ref());
            let dora = dora.map(Dora::copied).transpose()?;
            Ok((site.linear, Pair { a, b, scale: site.scale, dora }))
        };
        let params = self.params.to_device(&Device::Cpu)?;
        let rows = |of: &TokenRows| {
            Ok(FinishedRows::new(of.table, of.ids.clone(), self.token_view(&params, of)?.copy()?))
        };
        let tokens = self.tokens.iter().map(rows).collect::<Result<Vec<_>>>()?;
        let pairs = self.sites.iter().map(pair).collect::<Result<Vec<_>>>()?;
        Ok(Pairs::new(pairs).with_tokens(tokens))
    }

    /// Returns the copy that passes compute with, if it is not the parameters themselves.
    pub fn copy(&self) -> Option<&Tensor> {
        (self.compute.dtype() != self.params.dtype()).then_some(&self.compute)
    }

    /// Marks the parameters as changed. Values that were computed from them are computed again when they are needed.
    pub fn changed(&self) {
        self.learners
            .iter()
            .flatten()
            .filter_map(|learner| learner.pair.dora.as_ref())
            .for_each(Dora::forget);
    }

    /// Sets DoRA's magnitudes of a layer to the lengths of its weight's rows.
    pub(super) fn begin_magnitudes(&self, linear: &Linear) -> Result<()> {
        match self.learner(linear.site).map(|learner| &learner.pair) {
            Some(pair @ Pair { dora: Some(dora), .. }) => dora.begin(&linear.weight, pair),
            _ => Ok(()),
        }
    }

    /// Returns whether pairs have DoRA's magnitudes.
    pub fn has_magnitudes(&self) -> bool {
        self.sites.iter().any(|site| site.dora)
    }

    /// Updates the copy that passes compute with after the parameters were read from a file.
    pub fn refresh(&self) -> Result<()> {
        self.changed();
        if self.compute.dtype() == self.params.dtype() {
            return Ok(());
        }
        flat::write(&self.compute, &self.params.to_device(&Device::Cpu)?.to_dtype(self.compute.dtype())?)
    }

    /// Returns the losses of all ranks in `sums`.
    pub fn losses(&self) -> Result<Tensor> {
        self.sums.narrow(0, 0, LOSSES)
    }

    /// Returns the two elements of `losses` for one rank's loss. Ranks beyond 32 share places, which a sum allows.
    pub fn loss_of(&self, rank: usize) -> Result<Tensor> {
        self.losses()?.narrow(0, rank * LOSS % LOSSES, 2)
    }

    /// Returns A [R, K] and B [N, R] of a site as views of one of the flat buffers.
    pub fn views(&self, flat: &Tensor, site: &Site) -> Result<(Tensor, Tensor)> {
        views(flat, site)
    }

    /// Returns the magnitudes of a site as a view of one of the flat buffers, if it has them.
    pub fn magnitudes(&self, flat: &Tensor, site: &Site) -> Result<Option<Tensor>> {
        magnitudes(flat, site)
    }

    pub(super) fn learner(&self, linear: usize) -> Option<&Learner> {
        self.learners.get(linear).and_then(Option::as_ref)
    }

    /// Returns a linear layer and its pair, as far as they decide whether the pair lies inside the product.
    pub(super) fn member(&self, linear: &Linear) -> Member {
        let learner = self.learner(linear.site);
        Member {
            rows: linear.weight.dims().0,
            rank: learner.map_or(0, Learner::rank),
            offset: learner.map_or(0, |learner| learner.offset),
            dense: matches!(linear.weight, Weight::Dense(_)),
        }
    }
}

impl Learner {
    /// Returns the rank of the pair.
    pub fn rank(&self) -> usize {
        self.pair.a.dims().0
    }

    /// Returns the pair for the product that it lies inside of.
    #[cfg(feature = "cuda")]
    pub fn inside(&self) -> low_rank::Pair<'_> {
        let Weight::Dense(a) = &self.pair.a else { unreachable!("an adapter in training is dense") };
        low_rank::Pair { a, b: &self.b, scale: self.pair.scale }
    }
}

fn views(flat: &Tensor, site: &Site) -> Result<(Tensor, Tensor)> {
    let (rows, cols) = (site.projection.rows, site.projection.cols);
    let a = flat.narrow(0, site.offset, site.rank * cols)?.reshape((site.rank, cols))?;
    let b = flat.narrow(0, site.offset + site.rank * cols, rows * site.rank)?.reshape((rows, site.rank))?;
    Ok((a, b))
}

fn magnitudes(flat: &Tensor, site: &Site) -> Result<Option<Tensor>> {
    site.magnitudes().map(|values| flat.narrow(0, values.start, values.len())).transpose()
}

/// Draws A, and B if it does not begin as zero. Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(K); gaussian
/// has standard deviation 1/r.
fn initialize(a: &mut [f32], b: &mut [f32], site: &Site, options: &LoraOptions) {
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    random.set_stream(dropout::mix(fnv(&site.path)));
    let mut unit = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let bound = (site.projection.cols as f64).sqrt().recip();
    match options.init {
        LoraInit::Kaiming => a.iter_mut().for_each(|value| *value = ((2.0 * unit() - 1.0) * bound) as f32),
        LoraInit::Gaussian => {
            a.iter_mut().for_each(|value| *value = (normal(&mut unit) / site.rank as f64) as f32);
        }
        LoraInit::Orthogonal => orthogonal(a, b, site.rank, &mut || normal(&mut unit)),
    }
}

/// Returns a normal number from two uniform ones (Box and Muller).
fn normal(unit: &mut impl FnMut() -> f64) -> f64 {
    let radius = (-2.0 * (1.0 - unit()).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit()).cos()
}

/// PEFT's `orthogonal_init`: A^T = X Q' / 10 and B = Y Q'' / 10, where X and Y are normal, and Q' and Q'' are every
/// second row of a random orthogonal matrix [R, R].
fn orthogonal(a: &mut [f32], b: &mut [f32], rank: usize, normal: &mut impl FnMut() -> f64) {
    let rows = orthonormal_rows(rank, normal);
    let (cols, half) = (a.len() / rank, rank / 2);
    let mut mixed = |from: usize| {
        let mut values = vec![0f64; rank];
        for row in rows[from..].iter().step_by(2).take(half) {
            let factor = normal() / 10.0;
            values.iter_mut().zip(row).for_each(|(value, q)| *value += factor * q);
        }
        values
    };
    for column in 0..cols {
        mixed(0).iter().enumerate().for_each(|(row, value)| a[row * cols + column] = *value as f32);
    }
    for row in b.chunks_mut(rank) {
        row.iter_mut().zip(mixed(1)).for_each(|(to, value)| *to = value as f32);
    }
}

/// Returns a random orthogonal matrix: normal rows, each without its parts along those before it (twice, for
/// exactness).
fn orthonormal_rows(rank: usize, normal: &mut impl FnMut() -> f64) -> Vec<Vec<f64>> {
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(rank);
    for _ in 0..rank {
        let mut row: Vec<f64> = (0..rank).map(|_| normal()).collect();
        for before in rows.iter().chain(&rows) {
            let along = dot(&row, before);
            row.iter_mut().zip(before).for_each(|(value, q)| *value -= along * q);
        }
        let length = dot(&row, &row).sqrt();
        row.iter_mut().for_each(|value| *value /= length);
        rows.push(row);
    }
    rows
}

/// Returns the FNV-1a hash of a path, which is stable.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// B A is zero, both have the size of PEFT's, and another seed gives others.
    #[test]
    fn an_orthogonal_start_changes_nothing_and_is_zero_nowhere() {
        let (rank, rows, cols) = (16, 96, 128);
        let draw = |seed: u64| {
            let (mut a, mut b) = (vec![0f32; rank * cols], vec![0f32; rows * rank]);
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut unit = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            orthogonal(&mut a, &mut b, rank, &mut || normal(&mut unit));
            (a, b)
        };
        let (a, b) = draw(1);
        for row in 0..rows {
            for column in 0..cols {
                let product: f32 = (0..rank).map(|i| b[row * rank + i] * a[i * cols + column]).sum();
                assert!(product.abs() < 1e-6, "{product}");
            }
        }
        // A value is the sum of r/2 normal numbers, each times an entry of a unit vector of length r, over 10.
        for values in [&a, &b] {
            let variance = values.iter().map(|x| f64::from(x * x)).sum::<f64>() / values.len() as f64;
            assert!((variance / 0.005 - 1.0).abs() < 0.1, "{variance}");
        }
        assert_ne!(draw(2), (a, b));
    }
}
