//! What a decoder is, in facts: the families read them from `config.json`, the layers are built by them.

use crate::facts::Activation;
use crate::facts::Heads;

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

/// Names of tensors outside and inside the layers. Norms are named without `.weight`; a norm without a name is
/// not there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Names {
    pub embedding: &'static str,
    pub final_norm: &'static str,
    /// The module; its tensors are `.weight` and, with a bias, `.bias`.
    pub head: &'static str,
    /// `model.layers`: layer i is `{layers}.{i}`.
    pub layers: &'static str,
    /// Before attention and after it.
    pub attention_norm: Option<&'static str>,
    pub attention_post_norm: Option<&'static str>,
    /// Before the feed-forward and after it. In a parallel layer it may be the attention's.
    pub feed_forward_norm: Option<&'static str>,
    pub feed_forward_post_norm: Option<&'static str>,
}

impl Names {
    /// What Llama's checkpoints call them, and most families after it.
    pub const LLAMA: Names = Names {
        embedding: "model.embed_tokens.weight",
        final_norm: "model.norm",
        head: "lm_head",
        layers: "model.layers",
        attention_norm: Some("input_layernorm"),
        attention_post_norm: None,
        feed_forward_norm: Some("post_attention_layernorm"),
        feed_forward_post_norm: None,
    };

    fn layer_norms(&self) -> impl Iterator<Item = &'static str> {
        let shared = self.feed_forward_norm == self.attention_norm;
        let before = if shared { None } else { self.feed_forward_norm };
        [self.attention_norm, self.attention_post_norm, before, self.feed_forward_post_norm]
            .into_iter()
            .flatten()
    }
}

/// The norms over the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormKind {
    pub form: NormForm,
    pub eps: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormForm {
    Rms,
    /// The stored weight is the factor minus one (Gemma).
    RmsPlusOne,
    /// Mean removed, with a bias.
    Layer,
}

/// Norms of queries and keys, of the residual norms' form and eps, before rope.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorm {
    pub query: &'static str,
    pub key: &'static str,
    pub over: Over,
}

/// What is normalised together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Each head, all with one weight `[D]`.
    Head,
    /// The whole projection, weights [H * D] and [K * D] (OLMo 2).
    Projection,
}

/// One layer: its attention and its feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerFacts {
    pub attention: Attention,
    pub feed_forward: FeedForward,
}

/// One layer's attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    pub heads: Heads,
    /// The entry of `Facts::ropes` that rotates queries and keys; `None`: this layer has no positions.
    pub rope: Option<usize>,
    pub head_norm: Option<HeadNorm>,
    /// Together [T, (H + 2K) * D] in the heads' layout: one fused projection or three.
    pub query_key_value: Vec<Projection>,
    pub output: Projection,
}

/// One layer's feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    Dense(Dense),
}

/// A feed-forward that every token passes through.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// Together the activation's input: [T, 2F], gate then up, or [T, F].
    pub gate_up: Vec<Projection>,
    pub activation: Activation,
    pub down: Projection,
}

/// Queries times `1 + beta * ln(1 + floor(position / positions))`, so that late ones stay sharp (Ministral 3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    pub beta: f64,
    pub positions: usize,
}

/// A factor on the embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingScale {
    pub factor: f64,
    /// Gemma's factor is a tensor, rounded to the type the model computes in.
    pub rounded: bool,
}

impl QueryGrowth {
    pub fn at(&self, position: u32) -> f64 {
        1.0 + self.beta * (1.0 + (position as usize / self.positions) as f64).ln()
    }
}

impl EmbeddingScale {
    pub const NONE: EmbeddingScale = EmbeddingScale { factor: 1.0, rounded: false };
}

/// A decoder of layers with residual attention and feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// `model_type`.
    pub family: &'static str,
    /// Rows of the embedding (V), which may exceed the tokenizer's.
    pub vocab: usize,
    /// Width of the residual stream (C).
    pub width: usize,
    pub norm: NormKind,
    /// The layers from the first to the last, at least one. All of them have heads of the same numbers and widths.
    pub layers: Vec<LayerFacts>,
    pub ropes: Vec<Rope>,
    pub query_growth: Option<QueryGrowth>,
    /// The feed-forward reads the layer's input, not attention's sum.
    pub parallel: bool,
    /// Factor on what attention and feed-forward add to the stream (Granite).
    pub residual_scale: f64,
    pub embedding_scale: EmbeddingScale,
    /// The output head is the embedding.
    pub tied_head: bool,
    pub head_bias: bool,
    /// Factor on the logits (Granite), and their soft cap (Gemma 2).
    pub logits_scale: f64,
    pub logits_softcap: Option<f64>,
    /// Longest sequence the model was made for.
    pub positions_max: usize,
    pub names: Names,
    /// Names of split projections that people write for fused ones (KAITO's defaults for phi-3), and the
    /// module that holds them.
    pub aliases: &'static [(&'static str, &'static str)],
}

/// A tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Embedding,
    Matrix,
    NormWeight,
    Bias,
}

impl Facts {
    /// Every projection of the model with its layer's number, in the order of computation. Its place in this order is
    /// the number by which adapters know a linear layer.
    pub fn projections(&self) -> impl Iterator<Item = (usize, &Projection)> {
        let numbered = self.layers.iter().enumerate();
        numbered.flat_map(|(number, layer)| layer.projections().map(move |projection| (number, projection)))
    }

    /// `model.layers.3.self_attn.q_proj`, of a projection or a norm.
    pub fn path(&self, layer: usize, projection: &Projection) -> String {
        self.inside(layer, projection.path)
    }

    /// `model.layers.3.{path}`
    pub fn inside(&self, layer: usize, path: &str) -> String {
        format!("{}.{layer}.{path}", self.names.layers)
    }

    /// Heads of every layer; only their windows differ.
    pub fn heads(&self) -> &Heads {
        &self.layers[0].attention.heads
    }

    /// Every tensor the decoder reads, in the order of computation; a tied head is the embedding.
    pub fn tensors(&self) -> Vec<Stored> {
        let matrix = [self.vocab, self.width];
        let mut list = vec![Stored::new(self.names.embedding, &matrix, Role::Embedding)];
        for layer in 0..self.layers.len() {
            self.layer_tensors(layer, &mut list);
        }
        self.norm_tensors(self.names.final_norm, &mut list);
        if !self.tied_head {
            list.push(Stored::new(format!("{}.weight", self.names.head), &matrix, Role::Matrix));
        }
        if self.head_bias {
            list.push(Stored::new(format!("{}.bias", self.names.head), &[self.vocab], Role::Bias));
        }
        list
    }

    /// Parameters of the base, the shared head counted once.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }

    fn layer_tensors(&self, layer: usize, list: &mut Vec<Stored>) {
        for norm in self.names.layer_norms() {
            self.norm_tensors(&self.inside(layer, norm), list);
        }
        let attention = &self.layers[layer].attention;
        if let Some(norm) = &attention.head_norm {
            let (query, key) = attention.head_norm_widths(norm);
            for (name, width) in [(norm.query, query), (norm.key, key)] {
                let name = format!("{}.weight", self.inside(layer, name));
                list.push(Stored::new(name, &[width], Role::NormWeight));
            }
        }
        for projection in self.layers[layer].projections() {
            let path = self.path(layer, projection);
            let shape = [projection.rows, projection.cols];
            list.push(Stored::new(format!("{path}.weight"), &shape, Role::Matrix));
            if projection.bias {
                list.push(Stored::new(format!("{path}.bias"), &[projection.rows], Role::Bias));
            }
        }
    }

    fn norm_tensors(&self, path: &str, list: &mut Vec<Stored>) {
        list.push(Stored::new(format!("{path}.weight"), &[self.width], Role::NormWeight));
        if self.norm.form == NormForm::Layer {
            list.push(Stored::new(format!("{path}.bias"), &[self.width], Role::Bias));
        }
    }
}

impl LayerFacts {
    /// The layer's projections in the order of computation.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        let attention = self.attention.query_key_value.iter().chain([&self.attention.output]);
        attention.chain(self.feed_forward.projections())
    }
}

impl Attention {
    /// Widths of the query norm's and the key norm's weights.
    pub fn head_norm_widths(&self, norm: &HeadNorm) -> (usize, usize) {
        let heads = &self.heads;
        match norm.over {
            Over::Head => (heads.width, heads.width),
            Over::Projection => (heads.query * heads.width, heads.key * heads.width),
        }
    }
}

impl FeedForward {
    /// The projections in the order of computation.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        match self {
            FeedForward::Dense(dense) => dense.gate_up.iter().chain([&dense.down]),
        }
    }

    /// The activation's function.
    pub fn activation(&self) -> crate::facts::Function {
        match self {
            FeedForward::Dense(dense) => dense.activation.function,
        }
    }

    /// Columns between the activation and the down projection (F).
    pub fn width(&self) -> usize {
        match self {
            FeedForward::Dense(dense) => dense.down.cols,
        }
    }
}

impl Stored {
    fn new(name: impl Into<String>, shape: &[usize], role: Role) -> Stored {
        Stored { name: name.into(), shape: shape.to_vec(), role }
    }
}
