//! Trained parameters -> a PEFT folder that `peft` and vLLM load unchanged; and a PEFT folder -> parameters.
//!
//! `adapter_model.safetensors` holds `base_model.model.<path>.lora_A.weight` [R, K] and `.lora_B.weight` [N, R] in
//! f32, and with DoRA `.lora_magnitude_vector` `[N]`; for trained rows of the embedding or the output head
//! `<path>.token_adapter.trainable_tokens_delta` [tokens, C], which is the rows themselves. `adapter_config.json` holds
//! only the keys that PEFT has had since 0.11, because older versions refuse unknown keys.

pub mod card;
pub mod serving;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::facts::sites::{self, Site, Table, TokenRows};
use crate::facts::{Facts, LoraInit, LoraOptions, Modules, RANK_MAX, Targets, Tokens};
use crate::fault::{Fault, Result};
use crate::model::dora::Dora;
use crate::model::lora::{Pair, Pairs, Trainable};
use crate::model::tokens::FinishedRows;
use crate::model::weights::unwrapped;
use crate::ops::matmul::Weight;
use crate::ops::{cpu, flat};
use crate::plain;

/// File of an adapter's configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File of an adapter's matrices.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// PEFT's name for trained rows, below the module of their table.
const ROWS: &str = "token_adapter.trainable_tokens_delta";

/// Pattern -> number, in the written order. The first match counts, here and in PEFT.
type Patterns = serde_json::Map<String, serde_json::Value>;

/// PEFT's `LoraConfig` as it is saved. The fields have PEFT's names and meanings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// lora_alpha of some modules.
    #[serde(default)]
    pub alpha_pattern: Patterns,
    /// PEFT's record of the base model's class; hone writes null.
    pub auto_mapping: Option<serde_json::Value>,
    /// Name of the base model.
    pub base_model_name_or_path: Option<String>,
    /// The biases that are trained; hone has only `none`.
    #[serde(default = "none")]
    pub bias: String,
    /// Whether weights are stored transposed.
    #[serde(default)]
    pub fan_in_fan_out: bool,
    /// Whether the adapter is loaded for inference.
    #[serde(default)]
    pub inference_mode: bool,
    /// The initialisation of the matrices.
    pub init_lora_weights: Option<serde_json::Value>,
    /// hone has only null.
    pub layer_replication: Option<serde_json::Value>,
    /// Name of the list of layers.
    pub layers_pattern: Option<serde_json::Value>,
    /// The adapted layers.
    pub layers_to_transform: Option<serde_json::Value>,
    /// Settings of LoftQ.
    pub loftq_config: Option<serde_json::Value>,
    /// The update is scaled by lora_alpha / r.
    pub lora_alpha: serde_json::Number,
    /// Share of the adapter's inputs that dropout sets to zero in training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Settings of Megatron.
    pub megatron_config: Option<serde_json::Value>,
    /// Module of Megatron.
    pub megatron_core: Option<String>,
    /// Modules that are trained fully; hone has none.
    pub modules_to_save: Option<Vec<String>>,
    /// Kind of adapter; hone has only `LORA`.
    pub peft_type: String,
    /// Rank.
    pub r: usize,
    /// Rank of some modules.
    #[serde(default)]
    pub rank_pattern: Patterns,
    /// Revision of the base model.
    pub revision: Option<String>,
    /// The adapted modules.
    pub target_modules: Option<TargetModules>,
    /// Task of the model; hone has only `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Whether the pairs have DoRA's magnitudes.
    #[serde(default)]
    pub use_dora: bool,
    /// Whether the update is scaled by lora_alpha / sqrt(r) instead.
    #[serde(default)]
    pub use_rslora: bool,
    /// Tokens whose rows of the embedding, or of tables by name, were trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trainable_token_indices: Option<serde_json::Value>,
    /// Tokens from which on the adapter counts; an adapter with them is refused.
    #[serde(default, skip_serializing)]
    pub alora_invocation_tokens: Option<serde_json::Value>,
}

/// PEFT's two forms of `target_modules`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Names or paths of modules.
    List(Vec<String>),
    /// A regular expression on the whole path.
    Pattern(String),
}

fn none() -> String {
    "none".into()
}

/// Returns the configuration of a trained adapter.
pub fn config(
    sites: &[Site],
    tokens: &[TokenRows],
    layers: usize,
    options: &LoraOptions,
    base_model: &str,
) -> AdapterConfig {
    AdapterConfig {
        alpha_pattern: options
            .alpha_pattern
            .iter()
            .map(|(key, alpha)| (key.clone(), (*alpha).into()))
            .collect(),
        auto_mapping: None,
        base_model_name_or_path: Some(base_model.to_owned()),
        bias: none(),
        fan_in_fan_out: false,
        inference_mode: true,
        init_lora_weights: Some(serde_json::Value::Bool(true)),
        layer_replication: None,
        layers_pattern: None,
        layers_to_transform: None,
        loftq_config: Some(serde_json::json!({})),
        lora_alpha: whole(options.alpha),
        lora_dropout: options.dropout,
        megatron_config: None,
        megatron_core: Some("megatron.core".into()),
        modules_to_save: None,
        peft_type: "LORA".into(),
        r: options.r,
        rank_pattern: options.rank_pattern.iter().map(|(key, rank)| (key.clone(), (*rank).into())).collect(),
        revision: None,
        target_modules: Some(TargetModules::List(target_modules(sites, layers))),
        task_type: Some("CAUSAL_LM".into()),
        use_dora: options.dora,
        use_rslora: options.rslora,
        trainable_token_indices: token_indices(tokens),
        alora_invocation_tokens: None,
    }
}

/// Returns a list if only rows of the embedding are trained, as most people write it, else a map of tables.
fn token_indices(tokens: &[TokenRows]) -> Option<serde_json::Value> {
    match tokens {
        [] => None,
        [only] if only.table == Table::Embedding => Some(only.ids.clone().into()),
        several => {
            let table = |rows: &TokenRows| (last(&rows.path).to_owned(), rows.ids.clone().into());
            Some(serde_json::Value::Object(several.iter().map(table).collect()))
        }
    }
}

/// Returns the tokens of `trainable_token_indices`. Every table but the output head is the embedding.
fn tokens_of(value: Option<&serde_json::Value>) -> Result<Tokens> {
    let ids = |value: &serde_json::Value| -> Result<Vec<u32>> {
        serde_json::from_value(value.clone()).map_err(|error| {
            Fault::model(format!("{CONFIG_FILE}: trainable_token_indices: not a list of tokens: {error}"))
        })
    };
    let mut tokens = Tokens::default();
    match value {
        None => {}
        Some(serde_json::Value::Object(tables)) => {
            for (name, value) in tables {
                match last(name) {
                    "lm_head" | "embed_out" | "output" => tokens.head = ids(value)?,
                    _ => tokens.embedding = ids(value)?,
                }
            }
        }
        Some(list) => tokens.embedding = ids(list)?,
    }
    Ok(tokens)
}

/// Writes 16 rather than 16.0, because PEFT's field is an integer and vLLM checks it.
fn whole(alpha: f64) -> serde_json::Number {
    match alpha.fract() == 0.0 && alpha.abs() < 1e15 {
        true => serde_json::Number::from(alpha as i64),
        false => serde_json::Number::from_f64(alpha).expect("alpha is finite"),
    }
}

/// Returns the adapted modules: last names if each of them is adapted in every layer, and whole paths otherwise. In a
/// multimodal wrapper, last names would match the vision tower's modules too.
fn target_modules(sites: &[Site], layers: usize) -> Vec<String> {
    let names: BTreeSet<&str> = sites.iter().map(|site| last(site.projection.path)).collect();
    let in_wrapper = sites.iter().any(|site| site.path.contains("language_model."));
    match names.len() * layers == sites.len() && !in_wrapper {
        true => names.into_iter().map(str::to_owned).collect(),
        false => sites.iter().map(|site| site.path.clone()).collect::<BTreeSet<_>>().into_iter().collect(),
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Returns the content of `adapter_model.safetensors`. The same parameters give the same bytes.
pub fn weights(trainable: &Trainable) -> Result<Vec<u8>> {
    let mut tensors = BTreeMap::new();
    let params = trainable.params.to_device(&Device::Cpu)?;
    for site in &trainable.sites {
        let (a, b) = trainable.views(&params, site)?;
        for (letter, tensor) in [("A", a), ("B", b)] {
            tensors.insert(tensor_name(&site.path, letter), tensor.to_dtype(DType::F32)?);
        }
        if let Some(magnitudes) = trainable.magnitudes(&params, site)? {
            tensors.insert(magnitude_name(&site.path), magnitudes.to_dtype(DType::F32)?);
        }
    }
    for rows in &trainable.tokens {
        let values = trainable.token_view(&params, rows)?;
        tensors.insert(rows_name(&rows.path), values.to_dtype(DType::F32)?);
    }
    let metadata = Some(std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]));
    safetensors::serialize(tensors, metadata)
        .map_err(|error| Fault::internal(format!("cannot serialise the adapter: {error}")))
}

fn tensor_name(path: &str, letter: &str) -> String {
    format!("base_model.model.{path}.lora_{letter}.weight")
}

fn rows_name(path: &str) -> String {
    format!("base_model.model.{path}.{ROWS}")
}

fn magnitude_name(path: &str) -> String {
    format!("base_model.model.{path}.lora_magnitude_vector")
}

fn is_zero(matrix: &Tensor) -> Result<bool> {
    Ok(cpu::to_f64(matrix)?.iter().all(|value| *value == 0.0))
}

fn wrong(file: &Path, what: String) -> Fault {
    Fault::model(format!("{}: {what}", file.display()))
}

/// Reads `adapter_config.json` alone.
pub fn read_config(folder: &Path) -> Result<AdapterConfig> {
    let file = folder.join(CONFIG_FILE);
    let text = plain::small(&file).map_err(|error| wrong(&file, error.to_string()).or_machines())?;
    serde_json::from_slice(&text).map_err(|error| wrong(&file, format!("not a LoRA config of PEFT: {error}")))
}

/// Returns the name that an adapter's folder gives its base model; empty if it gives none.
pub fn base_model(folder: &Path) -> String {
    let config = read_config(folder).ok();
    config.and_then(|config| config.base_model_name_or_path).unwrap_or_default()
}

/// An adapter that was read from a folder.
pub struct Adapter {
    /// The adapter's configuration.
    pub config: AdapterConfig,
    tensors: std::collections::HashMap<String, Tensor>,
    folder: std::path::PathBuf,
}

/// Reads a PEFT folder.
pub fn read(folder: &Path) -> Result<Adapter> {
    let file = folder.join(CONFIG_FILE);
    let config = read_config(folder)?;
    let refused = [
        (config.peft_type != "LORA", "peft_type other than LORA"),
        (changes_base(&config), "an initialisation that changed its base (init_lora_weights)"),
        (config.layer_replication.is_some(), "layer_replication"),
        (config.bias != "none", "a bias other than none"),
        (config.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty()), "modules_to_save"),
        (config.alora_invocation_tokens.is_some(), "alora_invocation_tokens"),
    ];
    if let Some((_, what)) = refused.iter().find(|(found, _)| *found) {
        return Err(wrong(&file, format!("{what} is not supported")).help("use a plain LoRA adapter"));
    }
    let ranks = config.rank_pattern.values().filter_map(serde_json::Value::as_u64);
    if let Some(rank) = ranks.chain([config.r as u64]).find(|rank| !(1..=RANK_MAX as u64).contains(rank)) {
        return Err(wrong(&file, format!("a rank of {rank}, expected 1 to {RANK_MAX}")));
    }
    let weights = folder.join(WEIGHTS_FILE);
    plain::open(&weights).map_err(|error| wrong(&weights, format!("cannot read: {error}")).or_machines())?;
    let tensors = candle_core::safetensors::load(&weights, &Device::Cpu)
        .map_err(|error| wrong(&weights, format!("cannot read: {error}")).or_machines())?;
    if config.lora_alpha.as_f64() == Some(0.0) {
        return Err(wrong(&file, "lora_alpha is 0, so that the adapter does nothing".into()));
    }
    let mut named = std::collections::HashMap::new();
    for (name, tensor) in tensors {
        let plain = plain_name(&name);
        if named.insert(plain.clone(), tensor).is_some() {
            return Err(wrong(&weights, format!("holds {plain} twice, once as {name}")));
        }
    }
    if !named.keys().any(|name| name.ends_with(".lora_A.weight")) {
        let mut names: Vec<&str> = named.keys().map(String::as_str).collect();
        names.sort_unstable();
        let first =
            names.first().map_or("no tensor at all".to_owned(), |name| format!("names such as {name}"));
        return Err(wrong(
            &weights,
            format!("no LoRA matrices: {first}, expected {}", tensor_name("MODULE", "A")),
        )
        .help("give a PEFT folder of LoRA"));
    }
    Ok(Adapter { config, tensors: named, folder: folder.to_owned() })
}

/// Returns a tensor's name as PEFT saves it, without the parts that `torch.compile`, data-parallel wrappers and the
/// adapter's own name add.
fn plain_name(name: &str) -> String {
    let name = unwrapped(name);
    // Saved as a bare parameter, as a parameter of the adapter's name, or as the weight of a module.
    let bare = [".lora_magnitude_vector", ROWS];
    let end = bare.iter().find_map(|part| Some(name.find(part)? + part.len()));
    let name = match end {
        Some(end) => std::borrow::Cow::Owned(name[..end].to_owned()),
        None => name,
    };
    let name = match name.strip_suffix(".weight").and_then(|name| name.rsplit_once('.')) {
        Some((module, _)) if module.ends_with(".lora_A") || module.ends_with(".lora_B") => {
            format!("{module}.weight")
        }
        _ => name.into_owned(),
    };
    match name.starts_with("base_model.model.") {
        true => name,
        false => format!("base_model.model.{name}"),
    }
}

/// Words of PEFT for beginnings that leave the base as it is.
const BEGINNINGS_OF_A_PLAIN_BASE: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// Returns whether the initialisation changed the base weights, as in PiSSA, OLoRA and similar methods. Such an adapter
/// belongs to its changed base.
fn changes_base(config: &AdapterConfig) -> bool {
    match &config.init_lora_weights {
        Some(serde_json::Value::String(name)) => {
            !BEGINNINGS_OF_A_PLAIN_BASE.iter().any(|plain| name.eq_ignore_ascii_case(plain))
        }
        _ => false,
    }
}

/// Returns the patterns with their numbers, in their order.
fn numbers<T>(
    patterns: &Patterns,
    read: impl Fn(&serde_json::Value) -> Option<T>,
) -> Result<Vec<(String, T)>> {
    let entry = |(key, value): (&String, &serde_json::Value)| {
        let number = read(value).ok_or_else(|| {
            Fault::model(format!("{CONFIG_FILE}: pattern {key}: found {value}, expected a number"))
        });
        Ok((key.clone(), number?))
    };
    patterns.iter().map(entry).collect()
}

impl Adapter {
    /// Returns the file of the matrices, for messages.
    pub fn file(&self) -> std::path::PathBuf {
        self.folder.join(WEIGHTS_FILE)
    }

    /// Returns the options `asked`, with rank, scale and targets of this adapter.
    pub fn options(&self, asked: &LoraOptions) -> Result<LoraOptions> {
        let paths = self.tensors.keys().filter_map(|name| {
            Some(name.strip_prefix("base_model.model.")?.strip_suffix(".lora_A.weight")?.to_owned())
        });
        let mut paths: Vec<String> = paths.collect();
        paths.sort();
        let alpha = self.config.lora_alpha.as_f64().expect("a JSON number");
        Ok(LoraOptions {
            r: self.config.r,
            alpha,
            rslora: self.config.use_rslora,
            dora: self.config.use_dora,
            targets: Targets::names(paths),
            exclude: Modules::Names(Vec::new()),
            layers: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: numbers(&self.config.rank_pattern, |value| {
                value.as_u64().map(|rank| rank as usize)
            })?,
            alpha_pattern: numbers(&self.config.alpha_pattern, serde_json::Value::as_f64)?,
            tokens: tokens_of(self.config.trainable_token_indices.as_ref())?,
            init: LoraInit::Kaiming,
            ..asked.clone()
        })
    }

    /// Copies the values into the flat parameters. The adapter must hold every site in its shape, and nothing else.
    pub fn apply(&self, trainable: &Trainable) -> Result<()> {
        for site in &trainable.sites {
            let (a, b) = trainable.views(&trainable.params, site)?;
            for (letter, target) in [("A", a), ("B", b)] {
                let tensor = self.matrix(site, letter)?;
                flat::write(&target, &tensor.to_dtype(target.dtype())?)?;
            }
            if let Some(target) = trainable.magnitudes(&trainable.params, site)? {
                flat::write(&target, &self.magnitudes(site)?.to_dtype(target.dtype())?)?;
            }
        }
        for rows in &trainable.tokens {
            let target = trainable.token_view(&trainable.params, rows)?;
            flat::write(&target, &self.token_rows(rows)?.to_dtype(target.dtype())?)?;
        }
        trainable.refresh()?;
        self.nothing_else(&trainable.sites, &trainable.tokens)
    }

    /// Returns the LoRA pairs for a base of these facts, on the device that serves it. `pairs` is the type of A and B
    /// if a pair has no magnitudes, `dtype` the type of everything else.
    ///
    /// # Errors
    /// Model: the adapter belongs to another base, or it would change nothing.
    pub fn pairs(&self, facts: &Facts, dtype: DType, pairs: DType, device: &Device) -> Result<Pairs> {
        let options = self.options(&LoraOptions::default())?;
        let sites = sites::sites(facts, &options).map_err(|_| self.of_another_base(facts))?;
        let (sites, tokens) = (sites.list, sites.tokens);
        self.nothing_else(&sites, &tokens)
            .map_err(|fault| fault.help(self.of_another_base(facts).message))?;
        let (mut list, mut changes) = (Vec::with_capacity(sites.len()), false);
        for site in &sites {
            let (a, b) = (self.matrix(site, "A")?, self.matrix(site, "B")?);
            changes |= site.scale != 0.0 && !is_zero(a)? && !is_zero(b)?;
            let dtype_of_pair = if site.dora { dtype } else { pairs };
            let weight = |tensor: &Tensor| {
                Ok::<_, Fault>(Weight::Dense(
                    tensor.to_dtype(dtype_of_pair)?.contiguous()?.to_device(device)?,
                ))
            };
            let dora = site.dora.then(|| self.finished_magnitudes(site, dtype, device)).transpose()?;
            changes |= dora.is_some();
            list.push((site.linear, Pair { a: weight(a)?, b: weight(b)?, scale: site.scale, dora }));
        }
        let finished = |rows: &TokenRows| {
            Ok::<_, Fault>(FinishedRows::new(rows.table, rows.ids.clone(), self.token_rows(rows)?.clone()))
        };
        let tokens = tokens.iter().map(finished).collect::<Result<Vec<_>>>()?;
        match changes || !tokens.is_empty() {
            true => Ok(Pairs::new(list).with_tokens(tokens)),
            false => Err(self
                .wrong("every pair has zeros alone in lora_A or lora_B: the adapter changes nothing".into())
                .help("use an adapter that was trained for at least one step")),
        }
    }

    fn wrong(&self, what: String) -> Fault {
        wrong(&self.folder.join(WEIGHTS_FILE), what)
    }

    /// Returns the fault for an adapter of another base; it names both bases.
    fn of_another_base(&self, facts: &Facts) -> Fault {
        let made_for = self.config.base_model_name_or_path.as_deref().unwrap_or("a base it does not name");
        let (family, layers, width) = (facts.family, facts.layers.len(), facts.width);
        self.wrong(format!(
            "the adapter was made for {made_for}; found a {family} model of {layers} layers of width {width}"
        ))
    }

    /// Returns the tensor of this name, of the expected shape and with finite values. `help`: the reason why it may be
    /// missing.
    fn checked(&self, name: &str, expected: &[usize], help: Option<&str>) -> Result<&Tensor> {
        let tensor = self.tensors.get(name).ok_or_else(|| {
            let missing = self.wrong(format!("{name} is missing"));
            match help {
                Some(help) => missing.help(help),
                None => missing,
            }
        })?;
        if tensor.dims() != expected {
            let found = tensor.dims();
            return Err(self
                .wrong(format!("{name}: found shape {found:?}, expected {expected:?}"))
                .help("the adapter must be of the same base model"));
        }
        match cpu::to_f64(tensor)?.iter().all(|value| value.is_finite()) {
            true => Ok(tensor),
            false => Err(self.wrong(format!("{name} holds values that are not finite"))),
        }
    }

    /// Returns one matrix of a site.
    fn matrix(&self, site: &Site, letter: &str) -> Result<&Tensor> {
        let expected = match letter {
            "A" => [site.rank, site.projection.cols],
            _ => [site.projection.rows, site.rank],
        };
        self.checked(&tensor_name(&site.path, letter), &expected, None)
    }

    /// Returns the magnitudes of a site, in f32 (f64 in tests).
    fn finished_magnitudes(&self, site: &Site, dtype: DType, device: &Device) -> Result<Dora> {
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Ok(Dora::new(self.magnitudes(site)?.to_dtype(wide)?.to_device(device)?))
    }

    /// Returns the magnitudes of a site, `[N]`.
    fn magnitudes(&self, site: &Site) -> Result<&Tensor> {
        let help = format!("{CONFIG_FILE} says use_dora: true");
        self.checked(&magnitude_name(&site.path), &[site.projection.rows], Some(&help))
    }

    /// Returns the trained rows of a table.
    fn token_rows(&self, rows: &TokenRows) -> Result<&Tensor> {
        let help = format!("{CONFIG_FILE} has trainable_token_indices for it");
        self.checked(&rows_name(&rows.path), &[rows.ids.len(), rows.width], Some(&help))
    }

    fn nothing_else(&self, sites: &[Site], tokens: &[TokenRows]) -> Result<()> {
        let of_sites: usize = sites.iter().map(|site| site.tensors().count()).sum();
        let (held, read) = (self.tensors.len(), of_sites + tokens.len());
        match held == read {
            true => Ok(()),
            false => Err(self.wrong(format!("holds {held} tensors, of which this model has {read}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_and_adapter_names_are_no_part_of_a_tensors_name() {
        let expected = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight";
        for name in [
            expected,
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
            "_orig_mod.base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
            "module.base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
            "base_model.model._orig_mod.model.layers.0._orig_mod.mlp.up_proj.lora_A.mine.weight",
            "model.layers.0.mlp.up_proj.lora_A.weight",
        ] {
            assert_eq!(plain_name(name), expected, "{name}");
        }
        let expected = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector";
        for name in [
            expected,
            "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.weight",
            "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight",
            "module.model.layers.0.mlp.up_proj.lora_magnitude_vector.default",
        ] {
            assert_eq!(plain_name(name), expected, "{name}");
        }
    }

    #[test]
    fn patterns_keep_their_order_since_the_first_match_counts() {
        let options = LoraOptions {
            rank_pattern: vec![("down_proj".into(), 16), (r"0\.mlp\.down_proj".into(), 4)],
            alpha_pattern: vec![("z".into(), 1.0), ("a".into(), 2.5)],
            ..LoraOptions::default()
        };
        let text = serde_json::to_string(&config(&[], &[], 1, &options, "base")).unwrap();
        let read: AdapterConfig = serde_json::from_str(&text).unwrap();
        let ranks = numbers(&read.rank_pattern, |value| value.as_u64().map(|rank| rank as usize)).unwrap();
        assert_eq!(ranks, options.rank_pattern);
        assert_eq!(numbers(&read.alpha_pattern, serde_json::Value::as_f64).unwrap(), options.alpha_pattern);
    }

    #[test]
    fn adapters_that_are_no_plain_lora_of_their_base_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let plain = serde_json::to_value(config(&[], &[], 1, &LoraOptions::default(), "base")).unwrap();
        let refusal = |key: &str, value: serde_json::Value| {
            let mut other = plain.clone();
            other[key] = value;
            std::fs::write(folder.path().join(CONFIG_FILE), other.to_string()).unwrap();
            read(folder.path()).err().expect("it has no weights").message
        };
        for word in ["pissa", "olora", "corda"] {
            let message = refusal("init_lora_weights", word.into());
            assert!(message.contains("initialisation that changed its base"), "{message}");
        }
        let key = "alora_invocation_tokens";
        let message = refusal(key, serde_json::json!([1, 2]));
        assert!(message.contains(&format!("{key} is not supported")), "{message}");
        // PEFT writes the key without a value too.
        assert!(refusal(key, serde_json::Value::Null).contains(WEIGHTS_FILE));
        for word in ["gaussian", "orthogonal", "eva"] {
            let message = refusal("init_lora_weights", word.into());
            assert!(message.contains(WEIGHTS_FILE), "its configuration is taken: {message}");
        }
    }
}
