//! A plan -> the facts in its model's small files and its first adapter, before any weight or row is read.

use crate::adapter::{self, Adapter};
use crate::dataset::{self, Tokenizer};
use crate::device;
use crate::facts::config::Config;
use crate::facts::{Facts, LoraOptions, family, presets, quantization, shapes, sites};
use crate::fault::{Fault, Result};
use crate::fetch;
use crate::model;
use crate::model::load;
use crate::model::weights::Checkpoint;
use crate::plan::Plan;

/// Files of a model's folder, besides the weights, that affect training.
pub(super) const MODEL_TEXTS: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The facts that are known before any weight or row is read.
pub struct Described {
    /// Facts of the base model.
    pub facts: Facts,
    /// The plan's options, with rank and targets of the adapter that is continued, and with the quantisation that the
    /// checkpoint already has.
    pub options: model::Options,
    /// The linear layers to adapt.
    pub sites: sites::Sites,
    /// Whether the checkpoint is bf16 according to config.json.
    pub(super) bf16_checkpoint: bool,
    /// The adapter that training starts from.
    pub(super) initial: Option<Adapter>,
}

/// Reads the model's config and the adapter to start from, and chooses the sites.
pub fn describe(plan: &Plan) -> Result<Described> {
    device::check(plan.device)?;
    let config = Config::read(&plan.model.folder)?;
    let facts = family::describe(&config)?;
    let initial = plan.init_adapter.as_deref().map(adapter::read).transpose()?;
    let mut options = plan.model.clone();
    options.quantization = quantization::read(&config)?.unwrap_or(options.quantization);
    if let Some(initial) = &initial {
        options.lora = initial.options(&options.lora)?;
    }
    let sites = match &initial {
        None => sites::sites(&facts, &options.lora)?,
        // The user did not write these targets: they are the modules of the adapter's file.
        Some(initial) => adapter_sites(&facts, &options.lora, initial)?,
    };
    let bf16_checkpoint = bf16_checkpoint(&config)?;
    Ok(Described { facts, options, sites, bf16_checkpoint, initial })
}

/// Returns the shape of a preset, which is known without its files. `None` if the base is no preset of a known shape.
pub(super) fn by_name(plan: &Plan) -> Result<Option<Described>> {
    let shape = presets::find(&plan.base.name()).ok().and_then(|preset| preset.shape.as_deref());
    let Some(shape) = shape else { return Ok(None) };
    device::check(plan.device)?;
    let (facts, options) = (shapes::facts(shape)?, plan.model.clone());
    let sites = sites::sites(&facts, &options.lora)?;
    Ok(Some(Described { facts, options, sites, bf16_checkpoint: true, initial: None }))
}

fn adapter_sites(facts: &Facts, lora: &LoraOptions, initial: &Adapter) -> Result<sites::Sites> {
    let other = |what: String| {
        Fault::model(format!("{}: {what}", initial.file().display()))
            .help("the adapter to start from must be of the same base model")
    };
    let sites = sites::sites(facts, lora).map_err(|_| {
        let has: Vec<&str> = facts.layers[0].projections().map(|projection| projection.path).collect();
        other(format!("its modules are not in this {} model, which has {}", facts.family, has.join(", ")))
    })?;
    match sites.unmatched.first() {
        None => Ok(sites),
        Some(name) => {
            Err(other(format!("this {} model has no module {name} that could be adapted", facts.family)))
        }
    }
}

/// Checks small files before any data is fetched: tokenizer, chat template, and headers of weights that are on this
/// machine.
pub fn check_small_files(plan: &Plan, described: &Described) -> Result<()> {
    let tokenizer = Tokenizer::open(&plan.model.folder)?;
    fits_vocabulary(&tokenizer, &described.facts)?;
    dataset::check_template(&tokenizer, &plan.tokens)?;
    if let fetch::Model::Folder(folder) = &plan.base {
        load::fits(&described.facts, &Checkpoint::open(folder)?)?;
    }
    Ok(())
}

/// Checks that every id of the tokenizer has a row in the embedding.
pub fn fits_vocabulary(tokenizer: &Tokenizer, facts: &Facts) -> Result<()> {
    match tokenizer.vocab_size() <= facts.vocab {
        true => Ok(()),
        false => Err(Fault::model(format!(
            "tokenizer.json has ids up to {}, the model's embedding only up to {} (vocab_size {})",
            tokenizer.vocab_size() - 1,
            facts.vocab - 1,
            facts.vocab
        ))
        .help("tokenizer.json and config.json must be of the same model; added tokens need a resized model")),
    }
}

/// Returns whether the checkpoint is bf16 according to `config.json`. Most are, so this is assumed if the file does not
/// say.
pub fn bf16_checkpoint(config: &Config) -> Result<bool> {
    let dtype = match config.text("dtype")? {
        Some(dtype) => Some(dtype),
        None => config.text("torch_dtype")?,
    };
    Ok(dtype.is_none_or(|dtype| dtype == "bfloat16"))
}
