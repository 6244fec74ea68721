//! The part of PEFT's LoraConfig that hone uses.

/// LIMIT: the largest rank. Beyond the width of the widest layer it only takes memory; sizes must not overflow.
pub const RANK_MAX: usize = 1 << 20;

/// The keys of PEFT's LoraConfig that have an effect in hone.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    /// `r`: the rank of each pair.
    pub r: usize,
    /// `lora_alpha`: the numerator of the scale.
    pub alpha: f64,
    /// `lora_dropout`: the probability that an element of a pair's input is dropped.
    pub dropout: f64,
    /// `use_rslora`: the scale is alpha/sqrt(r) instead of alpha/r.
    pub rslora: bool,
    /// `use_dora`: each row of an adapted weight also learns its length.
    pub dora: bool,
    /// `target_modules`: the linear layers that get a pair.
    pub targets: Targets,
    /// The meaning of names of split projections if the model has a fused one.
    pub matching: Matching,
    /// `exclude_modules`: linear layers that never get a pair.
    pub exclude: Modules,
    /// `layers_to_transform`: indices of the layers that get pairs; empty means all.
    pub layers: Vec<usize>,
    /// `layers_pattern`: names of the module lists that the layer indices refer to; empty means any.
    pub layers_pattern: Vec<String>,
    /// `rank_pattern`: (regular expression for the module path, rank); the first match wins.
    pub rank_pattern: Vec<(String, usize)>,
    /// `alpha_pattern`: (regular expression for the module path, alpha); the first match wins.
    pub alpha_pattern: Vec<(String, f64)>,
    /// `trainable_token_indices`: tokens whose rows of the embedding and of the output head are trained.
    pub tokens: Tokens,
    /// `init_lora_weights`: the distribution that the pairs start from.
    pub init: LoraInit,
    /// Seed of the initial values.
    pub seed: u64,
}

impl Default for LoraOptions {
    /// Returns KAITO's defaults, on all linear layers.
    fn default() -> LoraOptions {
        LoraOptions {
            r: 8,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            dora: false,
            targets: Targets::AllLinear,
            matching: Matching::Fused,
            exclude: Modules::Names(Vec::new()),
            layers: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            tokens: Tokens::default(),
            init: LoraInit::Kaiming,
            seed: 42,
        }
    }
}

/// PEFT's `trainable_token_indices`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Tokens whose rows of the embedding are trained. With a tied head, the rows are the head's too.
    pub embedding: Vec<u32>,
    /// Tokens whose rows of the output head are trained.
    pub head: Vec<u32>,
}

/// The initialisation of a pair. The product of B and A is always zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraInit {
    /// `true`: A is Kaiming-uniform, B zero.
    Kaiming,
    /// `"gaussian"`: A is normal with standard deviation 1/r, B zero.
    Gaussian,
    /// `"orthogonal"`: A and B are random in two halves of the rank's space that are orthogonal to one another, so that
    /// both learn from the first step. The rank is even.
    Orthogonal,
}

/// PEFT's `target_modules`.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Every linear layer except the output head.
    AllLinear,
    /// The modules that a list or an expression names.
    Modules(Modules),
}

impl Targets {
    /// Parses `all-linear`, a list of names separated by commas, or else a regular expression.
    pub fn written(text: &str) -> Targets {
        let names: Vec<&str> = text.split(',').map(str::trim).collect();
        match text {
            _ if text.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            _ if names.iter().all(|name| Modules::is_name(name)) => Targets::names(names),
            _ => Targets::Modules(Modules::Pattern(text.to_owned())),
        }
    }

    /// Targets given by a list of names.
    pub fn names(names: impl IntoIterator<Item = impl Into<String>>) -> Targets {
        Targets::Modules(Modules::Names(names.into_iter().map(Into::into).collect()))
    }
}

/// PEFT's two ways to name modules.
#[derive(Clone, Debug, PartialEq)]
pub enum Modules {
    /// Names that equal the path or its end after a dot.
    Names(Vec<String>),
    /// A regular expression that the whole path must match (PEFT: a plain string).
    Pattern(String),
}

impl Modules {
    /// Returns whether a text can only be a name: as a regular expression it would match no whole path.
    pub fn is_name(text: &str) -> bool {
        let part_of_a_name = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
        !text.is_empty() && text.chars().all(part_of_a_name)
    }
}

/// The meaning of a name that is only a part of a module of this model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matching {
    /// The fused module that holds it: `q_proj` means `qkv_proj`.
    Fused,
    /// Nothing, as in PEFT. KAITO's names then adapt only o_proj and down_proj of Phi-3.
    Literal,
}
