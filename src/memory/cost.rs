//! Facts and a level -> work; work and a machine's rates -> seconds. Plans are compared by these seconds.
//!
//! The model is a roofline: products run at a share of the highest matrix rate, attention at a smaller one, and
//! everything else at the rate of the bytes it moves. A GPU's step is never shorter than its launches, nor than the
//! copies to and from its host, which run beside it. Shares are
//! those of `benches/LOG.md` if measured, and otherwise assumptions that the plan's table states.

use crate::facts::sites::Site;
use crate::facts::{FeedForward, Keep, Projection, Quantization, Residency};
use crate::model::inside;

use super::machine::{Machine, Place};
use super::task::Task;
use super::terms;

pub use super::machine::Rates;

/// Share of the highest matrix rate that products of a layer's shapes reach.
pub const MATRIX_SHARE: f64 = 0.82;
/// The speed of products in 8 bits over that in bf16, for a layer's shapes. Others measured 1.5 (a contraction
/// of 3,072) to 1.75 (large ones) on an H100; to be confirmed.
pub const EIGHT_BITS_TIMES: f64 = 1.55;
/// Share of the highest matrix rate that attention's kernels reach.
pub const ATTENTION_SHARE: f64 = 0.25;
/// Share of the copy rate that passes over memory reach.
pub const COPY_SHARE: f64 = 0.85;
/// Share of the copies between device and host that slows the computation beside them: an assumption. It also makes
/// such a copy dearer than none.
const LINK_SHOWN: f64 = 0.1;
/// Seconds to launch a kernel.
const LAUNCH_SECONDS: f64 = 4e-6;
/// Seconds between two kernels of a graph, predicted.
const GRAPH_SECONDS: f64 = 1.25e-6;
// Kernels of a layer's forward pass; the backward pass has twice as many.
const LAUNCHES: f64 = 30.0;
// Further kernels per pair.
const LAUNCHES_OF_A_PAIR: f64 = 8.0;
/// Further launches of a pair with DoRA's magnitudes.
const LAUNCHES_OF_MAGNITUDES: f64 = 5.0;

/// An amount of work of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// FLOPs of products.
    pub matrix: f64,
    /// FLOPs of products in 8 bits.
    pub eight_bits: f64,
    /// FLOPs of attention.
    pub attention: f64,
    /// Bytes moved.
    pub bytes: f64,
    /// Bytes moved between device and host, beside the computation.
    pub linked: f64,
    /// Kernel launches.
    pub launches: f64,
}

impl Work {
    /// Returns the predicted seconds at these rates.
    pub fn seconds(&self, rates: &Rates) -> f64 {
        self.seconds_with(rates, LAUNCH_SECONDS)
    }

    /// Returns the same if a graph launches the kernels.
    pub fn seconds_by_graph(&self, rates: &Rates) -> f64 {
        self.seconds_with(rates, GRAPH_SECONDS)
    }

    fn seconds_with(&self, rates: &Rates, launch: f64) -> f64 {
        let busy = (self.matrix + self.eight_bits / EIGHT_BITS_TIMES) / (rates.matrix * MATRIX_SHARE)
            + self.attention / (rates.matrix * ATTENTION_SHARE)
            + self.bytes / (rates.copy * COPY_SHARE);
        let linked = self.linked / rates.link;
        busy.max(self.launches * launch).max(linked) + linked * LINK_SHOWN
    }

    /// Returns the FLOPs of products and attention.
    pub fn flops(&self) -> f64 {
        self.matrix + self.eight_bits + self.attention
    }
}

impl std::ops::Add for Work {
    type Output = Work;
    fn add(self, other: Work) -> Work {
        Work {
            matrix: self.matrix + other.matrix,
            eight_bits: self.eight_bits + other.eight_bits,
            attention: self.attention + other.attention,
            bytes: self.bytes + other.bytes,
            linked: self.linked + other.linked,
            launches: self.launches + other.launches,
        }
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Work>>(list: I) -> Work {
        list.fold(Work::default(), |sum, work| sum + work)
    }
}

/// Seconds of a step that ranks wait for the slowest of them, as a share: passes have nearly the same tokens.
const IMBALANCE: f64 = 0.02;
/// Most pieces of a gradient that are summed over the ranks while the last pass computes lower layers. The last piece
/// is summed behind the pass.
pub const GRADIENT_PIECES: usize = 8;
/// Share of a pass that is its way back, beside which sums run.
const BACKWARD: f64 = 0.5;

/// Returns the share of their added speeds that all ranks reach together, if a step has a pass of `seconds` on each.
/// Ranks that share the base sum their gradients behind the pass.
pub(super) fn efficiency(task: &Task, machine: &Machine, residency: Residency, seconds: f64) -> f64 {
    let ranks = machine.ranks as f64;
    if machine.ranks == 1 {
        return 1.0;
    }
    let gradient = task.parameters() as f64 * 4.0;
    let sum = 2.0 * gradient * (ranks - 1.0) / ranks / machine.rates.peer;
    let seen = match residency {
        Residency::Shared => sum,
        Residency::Resident | Residency::Streamed => {
            (sum / GRADIENT_PIECES as f64).max(sum - BACKWARD * seconds)
        }
    };
    seconds / (seconds * (1.0 + IMBALANCE) + seen)
}

/// Counts the work of passes of `tokens` tokens, in examples of `example_tokens` tokens.
pub(super) struct Counter<'a> {
    /// The training run.
    pub task: &'a Task,
    /// The device.
    pub machine: &'a Machine,
    /// Tokens per pass.
    pub tokens: usize,
    /// Number of the upper layers whose weights are kept expanded.
    pub expanded: usize,
}

impl Counter<'_> {
    /// Returns the work of the forward and backward pass of a layer that keeps everything. `trained`: the layer is not
    /// below the lowest adapted one, so that gradients pass through it.
    pub fn layer(&self, layer: usize, trained: bool) -> Work {
        let facts = &self.task.facts;
        let products = || facts.layers[layer].projections().map(|p| self.product(layer, p)).sum::<Work>();
        let groups = || terms::groups(facts, layer).into_iter();
        let forward = products() + groups().map(|group| self.rounded_input(layer, group)).sum::<Work>();
        let forward = forward + self.attention(1.0);
        let pairs: Work = groups().map(|group| self.pairs(layer, group)).sum();
        let rounded = groups().map(|group| self.rounded_gradient(layer, group)).sum::<Work>();
        let backward = products() + self.attention(2.5) + pairs + rounded;
        // Bytes in widths. Forward: two norms, two sums, rope, and the product of gate and up. Backward: more than
        // twice that.
        let tokens = self.tokens as f64 * self.element();
        let (wide, inner) = (facts.width as f64, facts.layers[layer].feed_forward.width() as f64);
        let heads = facts.heads();
        let turned = (2 * (heads.query + heads.key) * heads.width) as f64;
        let bytes = |norms: f64, gates: f64| tokens * (norms * wide + gates * inner + turned);
        let forward = forward + Work { bytes: bytes(6.0, 3.0), launches: LAUNCHES, ..Work::default() };
        let backward =
            backward + Work { bytes: bytes(12.0, 8.0), launches: 2.0 * LAUNCHES, ..Work::default() };
        if trained { forward + backward } else { forward }
    }

    /// Returns the work that the backward pass of a layer repeats because of a level.
    pub fn again(&self, layer: usize, keep: Keep) -> Work {
        let facts = &self.task.facts;
        let attention = &facts.layers[layer].attention;
        let FeedForward::Dense(feed_forward) = &facts.layers[layer].feed_forward;
        let products = |list: &[Projection]| {
            list.iter().map(|p| self.product(layer, p)).sum::<Work>() + self.rounded_input(layer, list)
        };
        // A norm after the down projection needs that projection's output.
        let fed = match facts.names.feed_forward_post_norm {
            Some(_) => products(std::slice::from_ref(&feed_forward.down)),
            None => Work::default(),
        };
        let steps = [
            Work::default(),
            products(&feed_forward.gate_up),
            products(&attention.query_key_value),
            products(std::slice::from_ref(&attention.output)) + self.attention(1.0) + fed,
            Work {
                linked: 2.0 * self.tokens as f64 * facts.width as f64 * self.element(),
                ..Work::default()
            },
        ];
        let depth = Keep::ALL.iter().position(|level| *level == keep).expect("a level");
        steps[..=depth].iter().copied().sum()
    }

    /// Returns the work of the output head, loss and gradient, over all rows, which is the largest number that can be
    /// supervised.
    pub fn head(&self) -> Work {
        let values = (self.task.facts.vocab * self.task.facts.width) as f64;
        let logits = (self.tokens * self.task.facts.vocab) as f64 * self.element();
        Work {
            matrix: 4.0 * values * self.tokens as f64,
            bytes: 4.0 * logits,
            launches: LAUNCHES,
            ..Work::default()
        }
    }

    /// Returns the work of the optimizer: three f32 passes over the adapter, and two over its moments.
    pub fn update(&self) -> Work {
        let parameters = self.task.parameters();
        Work {
            bytes: (12 * parameters + 2 * terms::moments(self.task)) as f64,
            launches: 6.0,
            ..Work::default()
        }
    }

    /// Returns the work of one product with a frozen weight. A GPU expands a 4-bit weight before it, if it is not kept
    /// expanded; a CPU does so while it packs panels.
    fn product(&self, layer: usize, projection: &Projection) -> Work {
        let values = (projection.rows * projection.cols) as f64;
        let is_kept = layer + self.expanded >= self.task.facts.layers.len();
        let in_8_bits = self.task.in_8_bits(projection.rows, projection.cols);
        let expand = match (self.machine.place, self.task.quantization) {
            (Place::Gpu, Quantization::None) if in_8_bits => values * (self.element() + 1.0),
            (_, Quantization::None) | (Place::Cpu { .. }, _) => 0.0,
            (Place::Gpu, _) if is_kept => 0.0,
            (Place::Gpu, _) if in_8_bits => values * (0.52 + 1.0),
            (Place::Gpu, _) => values * (0.52 + self.element()),
        };
        let flops = 2.0 * values * self.tokens as f64;
        if in_8_bits {
            // Cards that do not scale within the product write sums, read them and the base of the sum, and write the
            // result.
            let width = (projection.rows + projection.cols) as f64 / 2.0;
            let behind = if self.machine.scales_8_bits() { 0.0 } else { 3.0 * self.tokens as f64 * width };
            let bytes = expand + behind * self.element();
            return Work { eight_bits: flops, bytes, launches: 1.0, ..Work::default() };
        }
        Work { matrix: flops, bytes: expand, ..Work::default() }
    }

    /// Returns the work of rounding the shared input of layers to 8 bits. No block has a whole row of attention's
    /// output.
    fn rounded_input(&self, layer: usize, group: &[Projection]) -> Work {
        let [_, output, ..] = terms::groups(&self.task.facts, layer);
        self.rounded(layer, group, &group[0], group[0].cols, group[0].path == output[0].path)
    }

    /// Returns the work of rounding the gradient of their outputs. No block has a whole row of the gradient of queries,
    /// keys and values.
    fn rounded_gradient(&self, layer: usize, group: &[Projection]) -> Work {
        let [projected, ..] = terms::groups(&self.task.facts, layer);
        let apart = group[0].path == projected[0].path;
        group.iter().map(|p| self.rounded(layer, group, p, p.rows, apart)).sum()
    }

    /// Returns the work of rounding an operand of `width` columns to 8 bits, for a product with a frozen weight:
    /// `apart` in a pass of its own. The kernel that makes it rounds it only for layers that have their pairs in its
    /// spare columns.
    fn rounded(
        &self,
        layer: usize,
        group: &[Projection],
        projection: &Projection,
        width: usize,
        apart: bool,
    ) -> Work {
        if !self.task.in_8_bits(projection.rows, projection.cols) {
            return Work::default();
        }
        let values = (self.tokens * width) as f64;
        match apart || terms::spare(self.task, self.machine.place, layer, group, self.tokens) == 0 {
            true => Work { bytes: values * (self.element() + 1.0), launches: 1.0, ..Work::default() },
            false => Work { bytes: values, ..Work::default() },
        }
    }

    /// Returns the work of the pairs of layers that read the same input, forward and backward. Inside the product with
    /// the weight, they cost its longer contraction, two passes over the input, and one or two over the gradient of the
    /// outputs.
    fn pairs(&self, layer: usize, group: &[Projection]) -> Work {
        let sites = || group.iter().filter_map(|p| terms::site(self.task, layer, p));
        let spare = terms::spare(self.task, self.machine.place, layer, group, self.tokens) as f64;
        if spare == 0.0 {
            return sites().map(|site| self.pair(site.rank, &site.projection) + self.magnitudes(site)).sum();
        }
        let tokens = self.tokens as f64;
        let (rows, cols) = (group.iter().map(|p| p.rows).sum::<usize>() as f64, group[0].cols as f64);
        let around = rows + cols;
        let rank = |p: &Projection| terms::site(self.task, layer, p).map_or(0, |site| site.rank);
        let both = inside::takes_both(self.element() == 2.0, group.iter().map(|p| (p.rows, rank(p))));
        let passes = 2.0 * cols + if both { rows } else { 2.0 * rows };
        // In 8 bits, products of the pairs' own write what the weights' products add to.
        let in_8_bits = group.iter().all(|p| self.task.in_8_bits(p.rows, p.cols));
        let passes = passes + if in_8_bits { 2.0 * around } else { 0.0 };
        // With dropout, inputs are copied twice, and a pair's results are copied and added.
        let passes = passes + if self.task.dropout { 9.0 * cols * sites().count() as f64 } else { 0.0 };
        let gradients: f64 = sites().map(|site| site.parameters() as f64).sum();
        Work {
            matrix: (4.0 * spare * around + 2.0 * gradients) * tokens,
            // The pairs are written beside and below the weight twice.
            bytes: (tokens * passes + 2.0 * spare * around) * self.element(),
            launches: 6.0 + 2.0 * sites().count() as f64,
            ..Work::default()
        }
    }

    /// Returns the work of a pair's forward and backward pass: six skinny products, each a pass over its wide operand.
    fn pair(&self, rank: usize, projection: &Projection) -> Work {
        let (tokens, around) = (self.tokens as f64, (projection.rows + projection.cols) as f64);
        Work {
            matrix: 6.0 * rank as f64 * around * tokens,
            bytes: 4.0 * around * tokens * self.element(),
            launches: LAUNCHES_OF_A_PAIR,
            ..Work::default()
        }
    }

    /// Returns the work that DoRA's magnitudes add to a pair: the frozen product again in the backward pass, three
    /// passes over its output forward and four backward; with dropout two products more.
    fn magnitudes(&self, site: &Site) -> Work {
        if !site.dora {
            return Work::default();
        }
        let products = if self.task.dropout { 3 } else { 1 };
        let columns = (self.tokens * site.projection.rows) as f64 * self.element();
        let passes = Work { bytes: 7.0 * columns, launches: LAUNCHES_OF_MAGNITUDES, ..Work::default() };
        (0..products).map(|_| self.product(site.layer, &site.projection)).sum::<Work>() + passes
    }

    /// Returns the work of causal attention: half of all pairs of rows, at most a window's worth; the mean over the
    /// layers' windows.
    fn attention(&self, times: f64) -> Work {
        let facts = &self.task.facts;
        let heads = facts.heads();
        let example = self.task.example_tokens.min(self.tokens).max(1) as f64;
        let seen =
            |window: Option<usize>| window.map_or(example / 2.0, |window| (example / 2.0).min(window as f64));
        let seen = facts.layers.iter().map(|layer| seen(layer.attention.heads.window)).sum::<f64>();
        let seen = seen / facts.layers.len() as f64;
        let flops = 4.0 * self.tokens as f64 * seen * (heads.query * heads.width) as f64;
        let columns = (heads.columns() + heads.query * heads.width) as f64;
        let bytes = times * self.tokens as f64 * columns * self.element();
        Work { attention: times * flops, bytes, ..Work::default() }
    }

    fn element(&self) -> f64 {
        self.task.activation_bytes(self.machine.place) as f64
    }
}
