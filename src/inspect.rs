//! A model folder -> the facts that hone reads in it: family, facts, quantised layers, LoRA sites, memory, missing
//! files.
//!
//! It reads config.json, the headers of the weights and the tokenizer, but no weight.

use std::path::Path;

use serde_json::{Value as Json, json};

use crate::adapter::serving;
use crate::dataset::Tokenizer;
use crate::facts::config::Config;
use crate::facts::rope::{Rope, Scaling};
use crate::facts::{Facts, NormForm};
use crate::facts::{FourBitCode, Keep, LoraOptions, Precision, Quantization, family};
use crate::facts::{quantization, sites};
use crate::fault::{Fault, Result};
use crate::memory::{self, Task, card};
use crate::model::load;
use crate::model::weights::Checkpoint;
use crate::ops::four_bit::FourBit;
use crate::words::{count, size};

/// Sequence lengths of the memory estimate.
const TOKENS: [usize; 3] = [1024, 4096, 16384];

/// The content of a model folder.
pub struct Inspection {
    folder: String,
    wrapper: Option<String>,
    facts: Facts,
    stored: Option<Quantization>,
    /// The type of the weights according to config.json.
    dtype: Option<String>,
    sites: sites::Sites,
    rank: usize,
    /// Bytes of the language model's tensors, if they can be read.
    weights: Option<usize>,
    tokenizer: Option<Tokenizer>,
    missing: Vec<Fault>,
    warnings: Vec<String>,
}

/// Reads the folder. The result lists what is missing or does not fit.
///
/// # Errors
/// Model, Config: config.json is not understood, or the LoRA targets match nothing.
pub fn read(folder: &Path, lora: &LoraOptions) -> Result<Inspection> {
    let config = Config::read(folder)?;
    let facts = family::describe(&config)?;
    let language = config.language_part()?;
    let mut missing = Vec::new();
    let mut keep = |fault: Fault| missing.push(fault);
    let checkpoint = Checkpoint::open(folder).map_err(&mut keep).ok();
    if let Some(checkpoint) = &checkpoint {
        load::fits(&facts, checkpoint).unwrap_or_else(&mut keep);
    }
    let tokenizer = Tokenizer::open(folder).map_err(&mut keep).ok();
    let sites = sites::sites(&facts, lora)?;
    let warnings = sites.warnings().into_iter().chain(serving::warnings(&facts, lora)).collect();
    Ok(Inspection {
        folder: folder.display().to_string(),
        wrapper: language.wrapper().map(str::to_owned),
        stored: quantization::read(&config)?,
        dtype: config.dtype()?.or(language.dtype()?),
        weights: checkpoint.map(|checkpoint| checkpoint.bytes()),
        rank: lora.r,
        facts,
        sites,
        tokenizer,
        missing,
        warnings,
    })
}

/// GPU memory for training with passes of so many tokens.
struct Memory {
    tokens: usize,
    /// Bytes if layers keep everything.
    everything: u64,
    /// Bytes if layers keep only their inputs.
    layer_inputs: u64,
}

impl Inspection {
    /// Returns the inspection as lines for people.
    pub fn table(&self) -> String {
        let mut rows = self.rows();
        rows.push(("LoRA sites", self.site_text()));
        rows.extend(self.sites.renamed.iter().map(|(from, to)| ("", format!("{from} is part of {to}"))));
        rows.extend(self.memory().iter().enumerate().map(|(i, memory)| {
            let name = if i == 0 { "memory of a GPU" } else { "" };
            let text = format!(
                "{} at {} tokens a pass; {} with gradient_checkpointing",
                size(memory.everything),
                memory.tokens,
                size(memory.layer_inputs)
            );
            (name, text)
        }));
        let mut text = table(&rows);
        for (head, lines) in [
            ("missing", self.missing.iter().map(Fault::to_string).collect()),
            ("warnings", self.warnings.clone()),
        ] {
            if !lines.is_empty() {
                text += &format!("\n{head}:\n");
                lines.iter().for_each(|line: &String| text += &format!("  {}\n", line.replace('\n', "\n  ")));
            }
        }
        text
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let facts = &self.facts;
        let heads = facts.heads();
        let inside = self.wrapper.as_ref().map(|wrapper| format!(", the language model of {wrapper}"));
        let tied = if facts.tied_head { "tied" } else { "its own" };
        let bias = if facts.head_bias { ", with a bias" } else { "" };
        let mut rows = vec![
            ("model", self.folder.clone()),
            ("family", facts.family.to_owned() + &inside.unwrap_or_default()),
            ("parameters", count(facts.parameters() as u64)),
            (
                "layers",
                format!(
                    "{} of width {}, feed-forward {}",
                    facts.layers.len(),
                    facts.width,
                    facts.layers[0].feed_forward.width()
                ),
            ),
            ("heads", format!("{} of queries, {} of keys, of width {}", heads.query, heads.key, heads.width)),
            ("window", window(facts)),
            ("rope", facts.ropes.iter().map(rope).collect::<Vec<_>>().join("; then ")),
            ("norms", norms(facts)),
            ("head", format!("{tied}{bias}")),
            ("context", format!("{} tokens", facts.positions_max)),
            ("vocabulary", self.vocabulary()),
            ("chat template", self.template().into()),
        ];
        rows.extend(
            self.weights.map(|bytes| ("weights", format!("{}{}", size(bytes as u64), self.stored_as()))),
        );
        rows.push(("in 4 bits", self.quantized()));
        rows
    }

    fn stored_as(&self) -> String {
        self.dtype.as_ref().map(|dtype| format!(", {dtype} by config.json")).unwrap_or_default()
    }

    fn vocabulary(&self) -> String {
        match self.tokenizer.as_ref().map(Tokenizer::vocab_size) {
            None => format!("{} rows, no tokenizer", self.facts.vocab),
            Some(ids) if ids == self.facts.vocab => format!("{ids} ids"),
            Some(ids) if ids < self.facts.vocab => format!("{ids} ids, padded to {} rows", self.facts.vocab),
            Some(ids) => format!("{ids} ids, more than the {} rows of the embedding", self.facts.vocab),
        }
    }

    fn template(&self) -> &'static str {
        match self.tokenizer.as_ref().map(Tokenizer::chat_template) {
            Some(Some(_)) => "the tokenizer's",
            Some(None) => "none: conversations need ModelConfig.chat_template",
            None => "unknown without a tokenizer",
        }
    }

    fn quantized(&self) -> String {
        let sites = self.facts.projections().count();
        let bytes = size(self.four_bit_bytes() as u64);
        match self.stored {
            Some(Quantization::Stored { code, double }) => {
                let scales = if double { ", scales too" } else { "" };
                format!("{sites} linear layers already, by bitsandbytes ({}{scales}): {bytes}", code.name())
            }
            _ => format!("{sites} linear layers with load_in_4bit (double): {bytes}; the rest as stored"),
        }
    }

    fn site_text(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for site in &self.sites.list {
            if !names.contains(&site.projection.path) {
                names.push(site.projection.path);
            }
        }
        format!(
            "{} of rank {}, {} parameters: {}",
            self.sites.list.len(),
            self.rank,
            count(self.sites.parameters() as u64),
            names.join(", ")
        )
    }

    /// Returns the inspection as JSON.
    pub fn json(&self) -> Json {
        let facts = &self.facts;
        let heads = facts.heads();
        let memory: Vec<Json> = self
            .memory()
            .iter()
            .map(|m| json!({"tokens": m.tokens, "everything_bytes": m.everything, "layer_inputs_bytes": m.layer_inputs}))
            .collect();
        let missing: Vec<Json> =
            self.missing.iter().map(|fault| json!({"message": fault.message, "help": fault.help})).collect();
        json!({
            "family": facts.family,
            "wrapper": self.wrapper,
            "parameters": facts.parameters(),
            "layers": facts.layers.len(),
            "width": facts.width,
            "feed_forward": facts.layers[0].feed_forward.width(),
            "heads": {"query": heads.query, "key": heads.key, "width": heads.width},
            "windows": facts.layers.iter().map(|layer| layer.attention.heads.window).collect::<Vec<_>>(),
            "rope": facts.ropes.iter().map(rope).collect::<Vec<_>>(),
            "norms": norms(facts),
            "tied_head": facts.tied_head,
            "positions_max": facts.positions_max,
            "vocabulary": {"rows": facts.vocab, "ids": self.tokenizer.as_ref().map(Tokenizer::vocab_size)},
            "chat_template": self.tokenizer.as_ref().map(|tokenizer| tokenizer.chat_template().is_some()),
            "weights": {"bytes": self.weights, "dtype": self.dtype},
            "four_bit": {
                "stored": self.stored.is_some(),
                "linear_layers": facts.projections().count(),
                "bytes": self.four_bit_bytes(),
            },
            "adapter": {
                "rank": self.rank,
                "trainable_parameters": self.sites.parameters(),
                "linear_layers": self.sites.list.iter().map(|site| site.path.as_str()).collect::<Vec<_>>(),
            },
            "memory": memory,
            "missing": missing,
            "warnings": self.warnings,
        })
    }

    /// Returns the number of bytes of the codes and scales of all linear layers, as they are stored or as
    /// `load_in_4bit` with double quantisation would store them.
    fn four_bit_bytes(&self) -> usize {
        let double = !matches!(self.stored, Some(Quantization::Stored { double: false, .. }));
        self.facts.projections().map(|(_, p)| FourBit::bytes_of(p.rows, p.cols, double)).sum()
    }

    /// Returns the memory plan's bytes for a 4-bit base trained in bf16. They are the same on every card.
    fn memory(&self) -> Vec<Memory> {
        let (card, _) = card::find("h200").expect("it is in the table");
        let gpu = card.machine(None).expect("it computes in bf16");
        let quantization = Quantization::FourBit { code: FourBitCode::Nf4, double: true };
        let task = |tokens: usize| Task {
            facts: self.facts.clone(),
            sites: self.sites.list.clone(),
            tokens: self.sites.tokens.clone(),
            quantization: self.stored.unwrap_or(quantization),
            precision: Precision::Bf16,
            dropout: false,
            bf16_checkpoint: true,
            tokens_min: tokens,
            tokens_max: tokens,
            example_tokens: tokens,
            eight_bit_moments: false,
            keep: None,
            residency: None,
        };
        let needed = |tokens: usize| {
            let bytes = |keep| memory::needed(&task(tokens), &gpu, tokens, keep);
            Memory { tokens, everything: bytes(Keep::Everything), layer_inputs: bytes(Keep::LayerInputs) }
        };
        TOKENS.map(needed).into()
    }
}

/// Shows names and values in two columns.
pub fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

fn window(facts: &Facts) -> String {
    let windows: Vec<Option<usize>> = facts.layers.iter().map(|layer| layer.attention.heads.window).collect();
    let first = windows.iter().flatten().next();
    let layers = windows.iter().flatten().count();
    match first {
        None => "none".into(),
        Some(tokens) if layers == facts.layers.len() => format!("{tokens} tokens"),
        Some(tokens) => format!("{tokens} tokens in {layers} of {} layers", facts.layers.len()),
    }
}

fn rope(rope: &Rope) -> String {
    let scaling = match &rope.scaling {
        Scaling::None => "plain".to_owned(),
        Scaling::Linear { factor } => format!("linear, factor {factor}"),
        Scaling::Dynamic { factor, positions } => {
            format!("dynamic, factor {factor} beyond {positions} tokens")
        }
        Scaling::Yarn { factor, positions, .. } => format!("yarn, factor {factor} over {positions} tokens"),
        Scaling::Llama3 { factor, positions, .. } => {
            format!("llama3, factor {factor} over {positions} tokens")
        }
        Scaling::Long { positions, .. } => format!("longrope beyond {positions} tokens"),
    };
    format!("theta {}, {scaling}, {} of a head", rope.theta, rope.rotary)
}

fn norms(facts: &Facts) -> String {
    let form = match facts.norm.form {
        NormForm::Rms => "RMS",
        NormForm::RmsPlusOne => "RMS, weight plus 1",
        NormForm::Layer => "LayerNorm",
    };
    let heads = if facts.layers[0].attention.head_norm.is_some() { "; of queries and keys" } else { "" };
    let place = if facts.parallel { "; parallel layers" } else { "" };
    format!("{form}, eps {:e}{heads}{place}", facts.norm.eps)
}
