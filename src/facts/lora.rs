//! The part of PEFT's LoraConfig that hone uses.

/// PEFT's LoraConfig, the part that means something here.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    pub r: usize,
    pub alpha: f64,
    pub dropout: f64,
    /// Scale by alpha/sqrt(r) instead of alpha/r.
    pub rslora: bool,
    pub targets: Targets,
    pub matching: Matching,
    /// `exclude_modules`: never adapted.
    pub exclude: Modules,
    /// `layers_to_transform`: empty means all.
    pub layers: Vec<usize>,
    /// `layers_pattern`: names of the list that the layers' numbers stand in; empty means any.
    pub layers_pattern: Vec<String>,
    /// `rank_pattern`, `alpha_pattern`: regex on the module path -> value, first match wins.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    /// `init_lora_weights`: true = Kaiming-uniform A and zero B; "gaussian" = normal A with deviation 1/r.
    pub init: LoraInit,
    pub seed: u64,
}

impl Default for LoraOptions {
    /// KAITO's defaults, on all linear layers.
    fn default() -> LoraOptions {
        LoraOptions {
            r: 8,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            targets: Targets::AllLinear,
            matching: Matching::Fused,
            exclude: Modules::Names(Vec::new()),
            layers: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            init: LoraInit::Kaiming,
            seed: 42,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraInit {
    Kaiming,
    Gaussian,
}

/// PEFT's `target_modules`.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Every linear layer except the output head.
    AllLinear,
    Modules(Modules),
}

impl Targets {
    /// `all-linear`, names with commas between, or else an expression.
    pub fn written(text: &str) -> Targets {
        let names: Vec<&str> = text.split(',').map(str::trim).collect();
        match text {
            _ if text.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            _ if names.iter().all(|name| Modules::is_name(name)) => Targets::names(names),
            _ => Targets::Modules(Modules::Pattern(text.to_owned())),
        }
    }

    pub fn names(names: impl IntoIterator<Item = impl Into<String>>) -> Targets {
        Targets::Modules(Modules::Names(names.into_iter().map(Into::into).collect()))
    }
}

/// PEFT's two ways to name modules.
#[derive(Clone, Debug, PartialEq)]
pub enum Modules {
    /// Equal to the path, or a suffix of it after a dot.
    Names(Vec<String>),
    /// A regular expression that the whole path must match (PEFT: a plain string).
    Pattern(String),
}

impl Modules {
    /// Whether a text can only be a name, which as an expression would match no whole path.
    pub fn is_name(text: &str) -> bool {
        let part_of_a_name = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
        !text.is_empty() && text.chars().all(part_of_a_name)
    }
}

/// What a name means that is only a part of a module of this model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matching {
    /// `q_proj` of a model with `qkv_proj` is that module.
    Fused,
    /// It is nothing, as in PEFT: KAITO's names adapt only o_proj and down_proj of Phi-3.
    Literal,
}
