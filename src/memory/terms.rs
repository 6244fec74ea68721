//! Facts and adapter -> bytes: what is there all the time, what each level keeps, what a layer works in.

use crate::facts::sites::Site;
use crate::facts::{Facts, Projection, Role};
use crate::facts::{Keep, Precision, Quantization};
use crate::ops::cross_entropy;
use crate::ops::four_bit::{self, FourBit};

use super::{Place, Task};

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    pub what: String,
    pub bytes: u64,
}

/// cuBLAS asks for this much on Hopper, less elsewhere.
const BLAS_WORKSPACE_BYTES: u64 = 32 << 20;
/// Packed panels of the CPU's products, one set a thread.
const PANEL_BYTES: u64 = 8 << 20;

/// What does not grow with the tokens of a pass.
pub(super) fn fixed(task: &Task, place: Place) -> Vec<Term> {
    let facts = &task.facts;
    let term = |what: &str, bytes: usize| Term { what: what.into(), bytes: bytes as u64 };
    let linear: usize = facts.projections().map(|p| weight_bytes(task, p, place)).sum();
    let vectors = facts.tensors().into_iter().filter(|t| matches!(t.role, Role::NormWeight | Role::Bias));
    let vectors: usize = vectors.map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    let table = facts.vocab * facts.width * task.stored_bytes(place);
    let adapter: usize = task.sites.iter().map(Site::parameters).sum();
    let base = match task.quantization {
        Quantization::None => "base, not quantised",
        Quantization::FourBit { .. } | Quantization::Stored { .. } => "base, 4 bits with scales",
    };
    let mut terms = vec![
        term(base, facts.layers * linear),
        term("norms and biases", vectors * 4),
        term("embedding", table),
        term("output head", if facts.tied_head { 0 } else { table }),
        term("adapter, its gradient and two moments", adapter * adapter_bytes(task, place)),
        term(
            "logits of a chunk",
            cross_entropy::chunk_rows(facts.vocab, task.activation_bytes(place), place == Place::Gpu)
                .min(task.tokens_max)
                * facts.vocab
                * task.activation_bytes(place),
        ),
    ];
    match place {
        Place::Gpu => {
            terms.push(term("a weight expanded for a product", expanded(task)));
            terms.push(Term { what: "workspace of products".into(), bytes: BLAS_WORKSPACE_BYTES });
        }
        Place::Cpu { threads } => {
            terms.push(term("scales of a weight", scales(task)));
            let what = format!("panels of products, {threads} threads");
            terms.push(Term { what, bytes: threads as u64 * PANEL_BYTES });
        }
    }
    terms.retain(|term| term.bytes > 0);
    terms
}

fn weight_bytes(task: &Task, projection: &Projection, place: Place) -> usize {
    match task.quantization {
        Quantization::None => projection.rows * projection.cols * task.stored_bytes(place),
        Quantization::FourBit { double, .. } | Quantization::Stored { double, .. } => {
            FourBit::bytes_of(projection.rows, projection.cols, double)
        }
    }
}

/// f32 weights, gradient and two moments; on a GPU with bf16 products also a bf16 copy that the products read.
fn adapter_bytes(task: &Task, place: Place) -> usize {
    match (place, task.precision) {
        (Place::Gpu, Precision::Bf16) => 18,
        _ => 16,
    }
}

fn largest(facts: &Facts) -> usize {
    facts.projections().map(|p| p.rows * p.cols).max().unwrap_or(0)
}

fn expanded(task: &Task) -> usize {
    match task.quantization {
        Quantization::None => 0,
        Quantization::FourBit { .. } | Quantization::Stored { .. } => {
            largest(&task.facts) * task.activation_bytes(Place::Gpu)
        }
    }
}

fn scales(task: &Task) -> usize {
    match task.quantization {
        Quantization::None => 0,
        Quantization::FourBit { .. } | Quantization::Stored { .. } => {
            largest(&task.facts).div_ceil(four_bit::BLOCK) * 4
        }
    }
}

/// Values a token that a layer holds between forward and backward, part by part.
pub(super) struct Parts {
    pub x: usize,
    pub query_key_value: usize,
    pub attended: usize,
    pub gate_up: usize,
    /// LoRA's `x A^T` of the down projection, and its result where a norm follows it.
    down: usize,
}

impl Parts {
    /// Of layer `layer`: its pairs' ranks come on top of the widths.
    pub fn of(task: &Task, layer: usize) -> Parts {
        let facts = &task.facts;
        let rows = |list: &[Projection]| list.iter().map(|p| p.rows).sum::<usize>();
        let rank = |p: &Projection| {
            let mut sites = task.sites.iter();
            sites.find(|site| site.layer == layer && site.projection.path == p.path).map_or(0, |s| s.rank)
        };
        let ranks = |list: &[Projection]| list.iter().map(rank).sum::<usize>();
        let heads = facts.heads();
        let behind = |norm: Option<&str>| if norm.is_some() { facts.width } else { 0 };
        // Attention's output, its logsumexp for each head, and the residual stream after it.
        let attended = facts.output.cols + heads.query + facts.width;
        let attended = attended + behind(facts.names.attention_post_norm);
        let raw = if facts.head_norm.is_some() { (heads.query + heads.key) * heads.width } else { 0 };
        Parts {
            x: facts.width,
            query_key_value: rows(&facts.query_key_value) + raw + ranks(&facts.query_key_value),
            attended: attended + rank(&facts.output),
            gate_up: rows(&facts.gate_up) + ranks(&facts.gate_up),
            down: rank(&facts.down) + behind(facts.names.feed_forward_post_norm),
        }
    }

    pub fn whole(&self) -> usize {
        self.x + self.query_key_value + self.attended + self.gate_up + self.down
    }

    /// On the device.
    pub fn kept(&self, keep: Keep) -> usize {
        match keep {
            Keep::Everything => self.whole(),
            Keep::WithoutGateUp => self.whole() - self.gate_up,
            Keep::AttentionOutput => self.whole() - self.gate_up - self.query_key_value,
            Keep::LayerInputs => self.x,
            Keep::HostInputs => 0,
        }
    }
}

/// Values a token that a pass works in beside what the layers keep: the output's gradient, gate and up's gradient
/// and that of their product (the widest moment of a layer's backward pass), or the rows around the output head.
pub(super) fn working(task: &Task) -> usize {
    let facts = &task.facts;
    let gate_up: usize = facts.gate_up.iter().map(|p| p.rows).sum();
    let masked = if task.dropout { facts.down.cols } else { 0 };
    let layer = facts.width + gate_up + facts.down.cols + masked;
    let head = 6 * facts.width;
    // Rope's angles are f32 whatever the activations are.
    layer.max(head) + 2 * facts.heads().width * facts.ropes.len()
}
