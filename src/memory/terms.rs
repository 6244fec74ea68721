//! Facts and adapter -> bytes of three kinds: values that are always there, values that each level keeps, and a layer
//! at work.

use crate::facts::sites::Site;
use crate::facts::{
    Facts, FeedForward, Keep, NormForm, Precision, Projection, Quantization, Residency, Role,
};
use crate::model::inside::{self, Member};
use crate::model::{layer, lora, residency};
use crate::ops::adamw_8bit::Matrix;
use crate::ops::cross_entropy;
use crate::ops::four_bit::{self, FourBit};
use crate::ops::fp8;

use super::machine::Place;
use super::task::Task;

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// The use of the memory.
    pub what: String,
    /// Bytes.
    pub bytes: u64,
}

/// The first words of the line for weights that are kept expanded.
pub(super) const EXPANDED: &str = "weights in full";
/// The most that an algorithm of cublasLt may work in (`ops/cuda/lt.rs`).
const BLAS_WORKSPACE_BYTES: u64 = 32 << 20;
/// Packed panels of the CPU's products, per thread.
const PANEL_BYTES: u64 = 8 << 20;

/// The place of the layers' weights, and the number of ranks that may share them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layers {
    /// The place of the weights.
    pub residency: Residency,
    /// Number of ranks.
    pub ranks: usize,
}

impl Layers {
    /// Layers whose weights lie on the device.
    pub const RESIDENT: Layers = Layers { residency: Residency::Resident, ranks: 1 };

    fn pieces(self) -> usize {
        if self.residency == Residency::Shared { self.ranks } else { 1 }
    }

    /// Returns bytes of each layer in a buffer.
    pub fn buffers(self, task: &Task) -> Vec<usize> {
        let double = match task.quantization {
            Quantization::None => return Vec::new(),
            Quantization::FourBit { double, .. } | Quantization::Stored { double, .. } => double,
        };
        let parts = |p: &Projection| {
            let values = p.rows * p.cols;
            let blocks = values.div_ceil(four_bit::BLOCK);
            (values.div_ceil(2), if double { blocks } else { 4 * blocks })
        };
        let layers = task.facts.layers.iter();
        layers.map(|layer| residency::buffer_bytes(layer.projections().map(parts), self.pieces())).collect()
    }

    /// Returns the part of the layers' weights that is in the device's memory.
    fn terms(self, task: &Task, place: Place) -> Vec<Term> {
        let linear: usize = task.facts.projections().map(|(_, p)| weight_bytes(task, p, place)).sum();
        let base = match task.quantization {
            Quantization::None => "base, not quantised",
            Quantization::FourBit { .. } | Quantization::Stored { .. } => "base, 4 bits with scales",
        };
        let buffers = self.buffers(task);
        let away: usize = buffers.iter().sum();
        let first = match (self.residency, place) {
            (Residency::Resident, _) => return vec![term(base, linear)],
            (Residency::Shared, _) => {
                vec![term(&format!("one of {} pieces of the base", self.ranks), away / self.pieces())]
            }
            // On a CPU, host memory is the same memory.
            (Residency::Streamed, Place::Cpu { .. }) => vec![term(base, away)],
            (Residency::Streamed, Place::Gpu) => Vec::new(),
        };
        let largest = buffers.iter().copied().max().unwrap_or(0);
        let second = second_level(task);
        let rest = [term("two buffers of a layer's weights", 2 * largest), term("scales of scales", second)];
        first.into_iter().chain(rest).collect()
    }

    /// Returns whether the embedding lies in host memory, where a GPU reads the rows of a pass.
    fn embedding_on_host(self, task: &Task, place: Place) -> bool {
        self.residency != Residency::Resident
            && place == Place::Gpu
            && residency::embedding_stays_on_host(&task.facts)
    }

    /// Returns the number of bytes of host memory: page-locked weights, and the embedding if it stays there.
    pub fn host_bytes(self, task: &Task, place: Place) -> u64 {
        let streamed = self.residency == Residency::Streamed && place == Place::Gpu;
        let layers: usize = if streamed { self.buffers(task).iter().sum() } else { 0 };
        // The embedding has the checkpoint's type there.
        let a_value = if task.bf16_checkpoint { 2 } else { task.activation_bytes(place) };
        let table = task.facts.vocab * task.facts.width * a_value;
        (layers + if self.embedding_on_host(task, place) { table } else { 0 }) as u64
    }
}

/// Returns the number of bytes of the second level of double-quantised scales.
fn second_level(task: &Task) -> usize {
    let (Quantization::FourBit { double, .. } | Quantization::Stored { double, .. }) = task.quantization
    else {
        return 0;
    };
    let of = |p: &Projection| (p.rows * p.cols).div_ceil(four_bit::BLOCK * four_bit::NESTED_BLOCK) * 4 + 4;
    if double { task.facts.projections().map(|(_, p)| of(p)).sum() } else { 0 }
}

/// Returns the model's own tensors.
pub(super) fn weights(task: &Task, place: Place, layers: Layers) -> Vec<Term> {
    let facts = &task.facts;
    let vectors = facts.tensors().into_iter().filter(|t| matches!(t.role, Role::NormWeight | Role::Bias));
    let vectors: usize = vectors.map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    let table = facts.vocab * facts.width * task.stored_bytes(place);
    let mut terms = layers.terms(task, place);
    terms.extend([
        term("norms and biases", vectors * 4),
        term("embedding", if layers.embedding_on_host(task, place) { 0 } else { table }),
        term("output head", if facts.tied_head { 0 } else { table }),
    ]);
    terms
}

fn term(what: &str, bytes: usize) -> Term {
    Term { what: what.into(), bytes: bytes as u64 }
}

/// Returns bytes of the weights of each layer if they are kept expanded; none if the weights are not 4-bit.
pub(super) fn expanded_layers(task: &Task) -> Vec<usize> {
    let a_value = match task.quantization {
        Quantization::None => 0,
        Quantization::FourBit { .. } | Quantization::Stored { .. } => task.activation_bytes(Place::Gpu),
    };
    let of_projection = |p: &Projection| match task.in_8_bits(p.rows, p.cols) && a_value > 0 {
        true => fp8::weight_bytes(p.rows, p.cols),
        false => p.rows * p.cols * a_value,
    };
    let in_8_bits = task.precision == Precision::Fp8;
    let of_group = |layer: usize, group: &[Projection]| match expanded_group(task, layer, group) {
        Some(values) if !in_8_bits => values * a_value,
        _ => group.iter().map(of_projection).sum(),
    };
    let of_layer = |layer| groups(&task.facts, layer).map(|group| of_group(layer, group)).iter().sum();
    (0..task.facts.layers.len()).map(of_layer).collect()
}

/// Returns the number of bytes more that are needed if the weights of the upper `kept` layers are kept expanded.
pub(super) fn added_by_expanded(task: &Task, place: Place, kept: usize) -> i64 {
    let layers = expanded_layers(task);
    let kept_bytes: usize = layers[layers.len() - kept..].iter().sum();
    let working = |kept| workspace(task, place, kept).iter().map(|term| term.bytes as i64).sum::<i64>();
    kept_bytes as i64 + working(kept) - working(0)
}

/// Returns the memory that all products work in. All weights but those of the upper `kept` layers are expanded for each
/// product.
pub(super) fn workspace(task: &Task, place: Place, kept: usize) -> Vec<Term> {
    match place {
        Place::Gpu => vec![
            term("a weight expanded for a product", expanded(task, kept)),
            Term { what: "workspace of products".into(), bytes: BLAS_WORKSPACE_BYTES },
        ],
        Place::Cpu { threads } => {
            let what = format!("panels of products, {threads} threads");
            vec![term("scales of a weight", scales(task)), Term { what, bytes: threads as u64 * PANEL_BYTES }]
        }
    }
}

/// Returns the terms that do not grow with the tokens of a pass. The weights of the upper `kept` layers are kept
/// expanded.
pub(super) fn fixed(task: &Task, place: Place, layers: Layers, kept: usize) -> Vec<Term> {
    let facts = &task.facts;
    let adapter = task.parameters();
    let copied = place == Place::Gpu && task.precision != Precision::F32;
    let what = match task.eight_bit_moments {
        false => "adapter, its gradient and two moments",
        true => "adapter, its gradient and two 8-bit moments",
    };
    let mut terms = weights(task, place, layers);
    let all = facts.layers.len();
    let expanded: usize = expanded_layers(task)[all - kept..].iter().sum();
    terms.extend([
        term(&format!("{EXPANDED}, {kept} of {all} layers"), expanded),
        term(what, adapter * lora::parameter_bytes(copied) + moments(task)),
        term("lengths of rows for DoRA", task.sites.iter().map(length_bytes).sum()),
        term(
            "logits of a chunk",
            cross_entropy::chunk_rows(facts.vocab, task.activation_bytes(place), place == Place::Gpu)
                .min(task.tokens_max)
                * facts.vocab
                * task.activation_bytes(place),
        ),
    ]);
    terms.extend(workspace(task, place, kept));
    terms.retain(|term| term.bytes > 0);
    terms
}

/// Returns the number of bytes of the lengths that magnitudes are compared with: of the frozen rows, and of the rows as
/// they are.
fn length_bytes(site: &Site) -> usize {
    if site.dora { 8 * site.projection.rows } else { 0 }
}

/// Returns the number of bytes of the optimizer's two moments of every parameter.
pub(super) fn moments(task: &Task) -> usize {
    let of_matrix = |values: usize| match task.eight_bit_moments {
        false => 8 * values,
        true => Matrix::moment_bytes(values),
    };
    let pairs = task.sites.iter().flat_map(Site::tensors).map(|matrix| matrix.len());
    let rows = task.tokens.iter().map(|rows| rows.values().len());
    pairs.chain(rows).map(of_matrix).sum()
}

fn weight_bytes(task: &Task, projection: &Projection, place: Place) -> usize {
    match task.quantization {
        Quantization::None => projection.rows * projection.cols * task.stored_bytes(place),
        Quantization::FourBit { double, .. } | Quantization::Stored { double, .. } => {
            FourBit::bytes_of(projection.rows, projection.cols, double)
        }
    }
}

/// Returns the number of values of the largest weight of the lower layers.
fn largest(facts: &Facts, layers: usize) -> usize {
    let projections = facts.layers[..layers].iter().flat_map(|layer| layer.projections());
    projections.map(|p| p.rows * p.cols).max().unwrap_or(0)
}

/// Returns the linear layers of a layer that read the same input: those into attention, out of it, into the activation,
/// out of it.
pub(super) fn groups(facts: &Facts, layer: usize) -> [&[Projection]; 4] {
    let layer = &facts.layers[layer];
    let (attention, FeedForward::Dense(dense)) = (&layer.attention, &layer.feed_forward);
    let one = std::slice::from_ref;
    [&attention.query_key_value, one(&attention.output), &dense.gate_up, one(&dense.down)]
}

/// Returns the number of spare columns with which LoRA lies inside the product of such a group, in a pass of `tokens`
/// tokens.
pub(super) fn spare(task: &Task, place: Place, layer: usize, group: &[Projection], tokens: usize) -> usize {
    let whole = task.precision != Precision::Fp8 || group.iter().all(|p| task.in_8_bits(p.rows, p.cols));
    if place != Place::Gpu || !whole || task.sites.iter().any(|site| site.dora) {
        return 0;
    }
    let member = |p: &Projection| {
        let site = site(task, layer, p);
        Member {
            rows: p.rows,
            rank: site.map_or(0, |site| site.rank),
            offset: site.map_or(0, |site| site.offset),
            dense: task.quantization == Quantization::None,
        }
    };
    inside::spare(group[0].cols, &group.iter().map(member).collect::<Vec<_>>(), tokens)
}

/// Returns the site of a layer's projection, if it has one.
pub(super) fn site<'a>(task: &'a Task, layer: usize, p: &Projection) -> Option<&'a Site> {
    task.sites.iter().find(|site| site.layer == layer && site.projection.path == p.path)
}

/// Returns the number of bytes of the largest weight of the lower layers in full, or of their largest group with its
/// pairs inside. The weights of the upper `kept` layers are kept.
fn expanded(task: &Task, kept: usize) -> usize {
    let layers = task.facts.layers.len() - kept;
    if task.precision == Precision::Fp8 {
        return expanded_in_8_bits(task, layers);
    }
    let single = match task.quantization {
        Quantization::None => 0,
        Quantization::FourBit { .. } | Quantization::Stored { .. } => largest(&task.facts, layers),
    };
    let groups = (0..layers).flat_map(|layer| groups(&task.facts, layer).map(|group| (layer, group)));
    let whole = groups.map(|(layer, group)| expanded_group(task, layer, group).unwrap_or(0));
    whole.max().unwrap_or(0).max(single) * task.activation_bytes(Place::Gpu)
}

/// Returns the number of bytes of the largest weight of the lower layers, in 8 bits or else in full, and of the largest
/// group's memory for pairs beside each other. A weight that is not quantised is rounded again for each product, in all
/// layers.
fn expanded_in_8_bits(task: &Task, layers: usize) -> usize {
    let (all, dense) = (&task.facts.layers, task.quantization == Quantization::None);
    let layers = if dense { &all[..] } else { &all[..layers] };
    let bytes = |p: &Projection| match task.in_8_bits(p.rows, p.cols) {
        true => p.rows * p.cols + 4 * (p.rows + p.cols),
        false if dense => 0,
        false => p.rows * p.cols * task.activation_bytes(Place::Gpu),
    };
    let weight = layers.iter().flat_map(|layer| layer.projections()).map(bytes).max().unwrap_or(0);
    let groups = (0..all.len()).flat_map(|layer| groups(&task.facts, layer).map(|group| (layer, group)));
    let pairs =
        groups.map(|(layer, group)| expanded_group(task, layer, group).unwrap_or(0)).max().unwrap_or(0);
    weight + pairs * task.activation_bytes(Place::Gpu)
}

/// Returns the number of bytes for each token of an operand in 8 bits with its scale, and of a product that is scaled
/// behind its sums; or of the gradients of gate and up, which lie there together, in the same moment as the widest
/// others.
fn rounded(task: &Task, place: Place) -> usize {
    let of = |p: &Projection| match task.in_8_bits(p.rows, p.cols) {
        true => p.rows.max(p.cols) + 4 + p.rows.min(task.facts.width) * task.activation_bytes(place),
        false => 0,
    };
    let whole = |p: &Projection| if task.in_8_bits(p.rows, p.cols) { p.rows + 4 } else { 0 };
    let gate_up = |layer| groups(&task.facts, layer)[2].iter().map(whole).sum::<usize>();
    let together = (0..task.facts.layers.len()).map(gate_up).max().unwrap_or(0);
    match place {
        Place::Gpu => task.facts.projections().map(|(_, p)| of(p)).max().unwrap_or(0).max(together),
        Place::Cpu { .. } => 0,
    }
}

/// Returns the number of values of a group with its pairs inside; `None` if they are not inside.
fn expanded_group(task: &Task, layer: usize, group: &[Projection]) -> Option<usize> {
    let rows: usize = group.iter().map(|p| p.rows).sum();
    match spare(task, Place::Gpu, layer, group, task.tokens_max) {
        0 => None,
        spare => Some((rows + spare) * (group[0].cols + spare)),
    }
}

fn scales(task: &Task) -> usize {
    match task.quantization {
        Quantization::None => 0,
        Quantization::FourBit { .. } | Quantization::Stored { .. } => {
            largest(&task.facts, task.facts.layers.len()).div_ceil(four_bit::BLOCK) * 4
        }
    }
}

/// Values per token that a layer holds on the device between forward and backward, at each level.
pub(super) struct Kept([usize; Keep::ALL.len()]);

impl Kept {
    /// Returns the values of layer `layer`; the ranks of its pairs are added to the widths.
    ///
    /// The input of attention's output projection is kept with its spare columns, if it has some.
    pub fn of(task: &Task, place: Place, layer: usize) -> Kept {
        let groups = groups(&task.facts, layer);
        let [of_input, beside, of_gate_up, _] =
            groups.map(|group| spare(task, place, layer, group, task.tokens_max));
        // A factor for each row of a norm is kept with its pairs.
        let names = &task.facts.names;
        let rms = task.facts.norm.form != NormForm::Layer;
        let scales = |name: Option<&str>, spare: usize| usize::from(rms && spare > 0 && name.is_some());
        let rank = |p: &Projection| {
            let rank = site(task, layer, p).map_or(0, |site| site.rank);
            match p.path {
                path if path == groups[1][0].path && beside > 0 => beside,
                path if path == groups[0][0].path => rank + scales(names.attention_norm, of_input),
                path if path == groups[2][0].path => rank + scales(names.feed_forward_norm, of_gate_up),
                _ => rank,
            }
        };
        Kept(Keep::ALL.map(|keep| layer::kept_values(&task.facts, layer, rank, keep)))
    }

    /// Returns the values if everything is kept.
    pub fn whole(&self) -> usize {
        self.at(Keep::Everything)
    }

    /// Returns the values at a level.
    pub fn at(&self, keep: Keep) -> usize {
        self.0[keep as usize]
    }
}

/// Returns the number of values per token of a pair with magnitudes at work: the frozen product that they scale, and
/// with dropout the masked input and its gradient.
fn dora_values(site: &Site, dropout: bool) -> usize {
    match (site.dora, dropout) {
        (false, _) => 0,
        (true, false) => site.projection.rows,
        (true, true) => site.projection.rows + 2 * site.projection.cols,
    }
}

/// Returns the number of values per token that a pass needs in addition to the values that the layers keep: those of a
/// layer's backward pass in its widest moment, or the rows around the output head. The larger number counts.
pub(super) fn working(task: &Task, place: Place) -> usize {
    let facts = &task.facts;
    let layers = 0..facts.layers.len();
    // The spare columns of the gradients of a layer's output, and of gate and up.
    let beside = |layer: usize| {
        let columns = |group: &[Projection]| spare(task, place, layer, group, task.tokens_max);
        let [_, output, gate_up, down] = groups(facts, layer).map(columns);
        output.max(down) + gate_up
    };
    let values = |layer: usize| layer::working_values(facts, layer, task.dropout) + beside(layer);
    let layer = layers.map(values).max().unwrap_or(0);
    let layer = layer + task.sites.iter().map(|site| dora_values(site, task.dropout)).max().unwrap_or(0);
    let layer = layer + rounded(task, place).div_ceil(task.activation_bytes(place));
    let head = 6 * facts.width;
    // Rope's angles are f32 for all types of activations.
    layer.max(head) + 2 * facts.heads().width * facts.ropes.len()
}
