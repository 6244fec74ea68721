//! The facts of a decoder: family files read them from `config.json`, and layers are built from them.

use crate::facts::Activation;
use crate::facts::Heads;

use super::rope::Rope;

/// One linear projection of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// Path inside the layer, as the checkpoint names it: `self_attn.q_proj`.
    pub path: &'static str,
    /// Output width (N); the weight is [N, K].
    pub rows: usize,
    /// Input width (K).
    pub cols: usize,
    /// Whether the projection has a bias `[N]`.
    pub bias: bool,
}

/// Names of a checkpoint's tensors outside and inside the layers. Names of norms leave out `.weight`. If a norm has
/// no name, the model does not have it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Names {
    /// The token embedding's weight.
    pub embedding: &'static str,
    /// The norm after the last layer.
    pub final_norm: &'static str,
    /// The output head's module; its tensors are `.weight` and, with a bias, `.bias`.
    pub head: &'static str,
    /// The list of layers (`model.layers`): layer i is `{layers}.{i}`.
    pub layers: &'static str,
    /// The norm before attention.
    pub attention_norm: Option<&'static str>,
    /// The norm after attention.
    pub attention_post_norm: Option<&'static str>,
    /// The norm before the feed-forward. In a parallel layer it may be the one before attention.
    pub feed_forward_norm: Option<&'static str>,
    /// The norm after the feed-forward.
    pub feed_forward_post_norm: Option<&'static str>,
}

impl Names {
    /// The names in Llama's checkpoints; most later families use them too.
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

/// The norms of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormKind {
    /// The formula of the norm.
    pub form: NormForm,
    /// The value added to the mean square or the variance.
    pub eps: f64,
}

/// The form of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormForm {
    /// Root mean square norm; the stored weight is the factor.
    Rms,
    /// Root mean square norm whose stored weight is the factor minus one (Gemma).
    RmsPlusOne,
    /// LayerNorm: the mean is removed, and there is a bias.
    Layer,
}

/// Norms of queries and keys before rope. Their form and eps are those of the residual norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorm {
    /// Path of the query norm inside the layer, without `.weight`.
    pub query: &'static str,
    /// Path of the key norm inside the layer, without `.weight`.
    pub key: &'static str,
    /// The values that share one norm.
    pub over: Over,
}

/// The values that a head norm normalises together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Each head on its own; all heads share one weight `[D]`.
    Head,
    /// The whole projection, with weights [H * D] and [K * D] (OLMo 2).
    Projection,
}

/// The facts of one layer: its attention and its feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerFacts {
    /// The layer's attention.
    pub attention: Attention,
    /// The layer's feed-forward.
    pub feed_forward: FeedForward,
}

/// The facts of one layer's attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Counts, widths and order of the heads.
    pub heads: Heads,
    /// Index in `Facts::ropes` of the rope that rotates queries and keys. `None`: this layer has no rope.
    pub rope: Option<usize>,
    /// Norms of queries and keys, if the layer has them.
    pub head_norm: Option<HeadNorm>,
    /// One fused projection or three. Their outputs side by side are [T, (H + 2K) * D] in the heads' layout.
    pub query_key_value: Vec<Projection>,
    /// The projection of the heads' outputs back to the residual stream.
    pub output: Projection,
}

/// The facts of one layer's feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    /// One feed-forward for all tokens.
    Dense(Dense),
}

/// A feed-forward that computes every token in the same way.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// One or two projections. Their outputs side by side are the activation's input: [T, 2F] (gate, then up) or
    /// [T, F].
    pub gate_up: Vec<Projection>,
    /// The function between `gate_up` and `down`.
    pub activation: Activation,
    /// The projection back to the residual stream, [C, F].
    pub down: Projection,
}

/// A factor on queries, `1 + beta * ln(1 + floor(position / positions))`, which keeps attention sharp at late
/// positions (Ministral 3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    /// Strength of the growth; `llama_4_scaling_beta` in the config.
    pub beta: f64,
    /// Positions after which the factor begins to grow; `original_max_position_embeddings` in the config.
    pub positions: usize,
}

/// A factor on the embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingScale {
    /// The factor.
    pub factor: f64,
    /// Whether the factor is rounded to the type the model computes in, because it is a tensor there (Gemma).
    pub rounded: bool,
}

impl QueryGrowth {
    /// Returns the factor at a position.
    pub fn at(&self, position: u32) -> f64 {
        1.0 + self.beta * (1.0 + (position as usize / self.positions) as f64).ln()
    }
}

impl EmbeddingScale {
    /// No scaling.
    pub const NONE: EmbeddingScale = EmbeddingScale { factor: 1.0, rounded: false };
}

/// The facts of a decoder: layers with attention and feed-forward on a residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// `model_type`.
    pub family: &'static str,
    /// Rows of the embedding (V). The tokenizer may have fewer tokens.
    pub vocab: usize,
    /// Width of the residual stream (C).
    pub width: usize,
    /// Form and eps of the residual norms.
    pub norm: NormKind,
    /// The layers from first to last, at least one. Their head counts and widths are all the same.
    pub layers: Vec<LayerFacts>,
    /// The ropes that layers choose from by index.
    pub ropes: Vec<Rope>,
    /// A factor on queries that grows with the position, if the model has one.
    pub query_growth: Option<QueryGrowth>,
    /// Whether the feed-forward reads the layer's input instead of the stream after attention.
    pub parallel: bool,
    /// Factor on the outputs of attention and feed-forward before they are added to the stream (Granite).
    pub residual_scale: f64,
    /// Factor on the embeddings.
    pub embedding_scale: EmbeddingScale,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
    /// Whether the output head has a bias.
    pub head_bias: bool,
    /// Factor on the logits (Granite).
    pub logits_scale: f64,
    /// Soft cap of the logits: `cap * tanh(logit / cap)` (Gemma 2).
    pub logits_softcap: Option<f64>,
    /// Longest sequence that the model was trained for, in tokens.
    pub positions_max: usize,
    /// Names of the checkpoint's tensors.
    pub names: Names,
    /// (name, module): names of split projections, which users also write for models with fused ones (KAITO's
    /// defaults for phi-3), and the fused module that holds each.
    pub aliases: &'static [(&'static str, &'static str)],
}

/// A tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Name in the checkpoint.
    pub name: String,
    /// The shape that the facts imply.
    pub shape: Vec<usize>,
    /// The tensor's use.
    pub role: Role,
}

/// The use of a checkpoint's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The token embedding [V, C].
    Embedding,
    /// The weight of a linear layer [N, K].
    Matrix,
    /// The weight of a norm.
    NormWeight,
    /// The bias of a linear layer or a norm.
    Bias,
}

impl Facts {
    /// Returns every projection of the model with its layer's index, in the order of computation. Adapters number
    /// linear layers by their place in this order.
    pub fn projections(&self) -> impl Iterator<Item = (usize, &Projection)> {
        let numbered = self.layers.iter().enumerate();
        numbered.flat_map(|(number, layer)| layer.projections().map(move |projection| (number, projection)))
    }

    /// Returns the full path of a projection: `model.layers.3.self_attn.q_proj`.
    pub fn path(&self, layer: usize, projection: &Projection) -> String {
        self.inside(layer, projection.path)
    }

    /// Returns the full path of a module or tensor of a layer: `model.layers.3.{path}`.
    pub fn inside(&self, layer: usize, path: &str) -> String {
        format!("{}.{layer}.{path}", self.names.layers)
    }

    /// Returns the path of the embedding's module, which has the wrapper's names in a multimodal model.
    pub fn embedding_path(&self) -> String {
        let path = self.names.embedding.trim_end_matches(".weight");
        match (self.names.layers.strip_suffix("language_model.layers"), path.strip_prefix("model.")) {
            (Some(wrapper), Some(inner)) => format!("{wrapper}language_model.{inner}"),
            _ => path.to_owned(),
        }
    }

    /// Returns the heads of the first layer. Other layers differ only in their windows.
    pub fn heads(&self) -> &Heads {
        &self.layers[0].attention.heads
    }

    /// Lists every tensor that the decoder reads, in the order of computation. A tied head has no tensor of its
    /// own.
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

    /// Returns the number of parameters of the base model. A tied head counts once.
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
    /// Returns the layer's projections in the order of computation.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        let attention = self.attention.query_key_value.iter().chain([&self.attention.output]);
        attention.chain(self.feed_forward.projections())
    }
}

impl Attention {
    /// Returns widths of the weights of the query norm and the key norm.
    pub fn head_norm_widths(&self, norm: &HeadNorm) -> (usize, usize) {
        let heads = &self.heads;
        match norm.over {
            Over::Head => (heads.width, heads.width),
            Over::Projection => (heads.query * heads.width, heads.key * heads.width),
        }
    }
}

impl FeedForward {
    /// Returns the projections in the order of computation.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        match self {
            FeedForward::Dense(dense) => dense.gate_up.iter().chain([&dense.down]),
        }
    }

    /// Returns the activation's function.
    pub fn activation(&self) -> crate::facts::Function {
        match self {
            FeedForward::Dense(dense) => dense.activation.function,
        }
    }

    /// Returns the number of columns between the activation and the down projection (F).
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
