//! What a decoder is, in facts: the families read them from `config.json`, the layers are built by them.

use crate::ops::attention::Heads;

use super::rope::Rope;

/// One linear layer of every decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// Path inside the layer, as in the checkpoint: `self_attn.q_proj`.
    pub path: &'static str,
    /// Output width (N) and input width (K); the weight is [N, K].
    pub rows: usize,
    pub cols: usize,
    pub bias: bool,
}

/// Names of tensors outside and inside the layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Names {
    pub embedding: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
    /// `model.layers`: layer i is `{layers}.{i}`.
    pub layers: &'static str,
    pub attention_norm: &'static str,
    pub feed_forward_norm: &'static str,
}

impl Names {
    /// What Llama's checkpoints call them, and most families after it.
    pub const LLAMA: Names = Names {
        embedding: "model.embed_tokens.weight",
        final_norm: "model.norm.weight",
        head: "lm_head.weight",
        layers: "model.layers",
        attention_norm: "input_layernorm.weight",
        feed_forward_norm: "post_attention_layernorm.weight",
    };
}

/// A pre-norm decoder with rotary positions and a gated feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// `model_type`.
    pub family: &'static str,
    /// Rows of the embedding (V), which may exceed the tokenizer's.
    pub vocab: usize,
    /// Width of the residual stream (C).
    pub width: usize,
    pub layers: usize,
    pub feed_forward: usize,
    pub norm_eps: f64,
    pub heads: Heads,
    pub rope: Rope,
    /// Together [T, (H + 2K) * D]: one fused projection or three.
    pub query_key_value: Vec<Projection>,
    pub output: Projection,
    /// Together [T, 2F]: gate, then up; one fused projection or two.
    pub gate_up: Vec<Projection>,
    pub down: Projection,
    /// The output head is the embedding.
    pub tied_head: bool,
    /// Longest sequence the model was made for.
    pub positions_max: usize,
    pub names: Names,
    /// Names of split projections that people write for fused ones (KAITO's defaults for phi-3), and the
    /// module that holds them.
    pub aliases: &'static [(&'static str, &'static str)],
}

impl Facts {
    /// The projections of one layer in the order of computation.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        let attention = self.query_key_value.iter().chain([&self.output]);
        attention.chain(&self.gate_up).chain([&self.down])
    }

    /// `model.layers.3.self_attn.q_proj`
    pub fn path(&self, layer: usize, projection: &Projection) -> String {
        format!("{}.{layer}.{}", self.names.layers, projection.path)
    }

    /// Parameters of the base, the shared head counted once.
    pub fn parameters(&self) -> usize {
        let bias = |p: &Projection| if p.bias { p.rows } else { 0 };
        let linear: usize = self.projections().map(|p| p.rows * p.cols + bias(p)).sum();
        let ends = if self.tied_head { 1 } else { 2 };
        self.layers * (linear + 2 * self.width) + self.width + ends * self.vocab * self.width
    }
}
