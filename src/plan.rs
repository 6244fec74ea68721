//! The plan: every default, limit and name resolved, each value with its origin. It checks which paths exist, but
//! reads only a chat template and downloads nothing.

mod reader;
mod places;
mod rows;
mod base;
mod schedule;
mod judging;
mod training;
mod tracking;
mod show;
mod asked;
mod reach;

pub use asked::is_of_one_start;
pub use places::{below_mnt, registry_access};
pub use reach::reach;

use crate::facts::{FourBitCode, LoraOptions, Quantization};
use crate::fault::Result;
use crate::ranks::launch::Wish;
use crate::run_folder::Earlier;
use crate::spec::keys::{Effect, Section};
use crate::spec::{Origin, Spec};
use crate::{dataset, device, fetch, memory, model, publish, registry, source, trackers, train};
use reader::Reader;
use std::path::PathBuf;

/// Everything that `hone run` needs to know. Each stage takes its own part.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Options of downloads and of their cache.
    pub source: source::Options,
    /// Addresses of the dataset: the entries to train on, then those to evaluate on (`dataset.evaluation_from`).
    pub data: Vec<fetch::Data>,
    /// The name of each entry of `data` in metrics.
    pub sources: Vec<String>,
    /// Address of the base model. `model.folder` is the folder where its files are, or will be.
    pub base: fetch::Model,
    /// Options of reading rows.
    pub dataset: dataset::Options,
    /// Options of turning rows into token examples.
    pub tokens: dataset::TokenOptions,
    /// The place where tokens are kept.
    pub token_cache: dataset::TokenCache,
    /// The storage and precision of the base, and the adapted modules.
    pub model: model::Options,
    /// Limits of memory.
    pub memory: memory::Options,
    /// Name of the base model, for the image and the adapter's card.
    pub model_name: String,
    /// Optimizer, schedule, batches and evaluation.
    pub train: train::Options,
    /// The output folder.
    pub output: PathBuf,
    /// The treatment of another run's results in the output folder.
    pub earlier: Earlier,
    /// The place that the adapter is sent to.
    pub push: Vec<publish::Destination>,
    /// How registries are reached.
    pub registry: registry::Options,
    /// Folder of an adapter whose parameters training starts from.
    pub init_adapter: Option<PathBuf>,
    /// The device to train on.
    pub device: device::Choice,
    /// The processes that train together on this machine.
    pub ranks: Wish,
    /// The services that metrics go to besides the results.
    pub trackers: trackers::Options,
    /// Number of held-out rows that base and tuned model answer at the end of the run.
    pub answers: usize,
    /// The given keys; the run's folder remembers them.
    pub asked: serde_json::Map<String, serde_json::Value>,
    /// Every value in force, in the order of the table of keys.
    pub values: Vec<Value>,
    /// Keys that were given and have no effect.
    pub ignored: Vec<Ignored>,
    /// Warnings; the run continues.
    pub warnings: Vec<String>,
}

/// One resolved value.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// `Section.key`, a key of hone, or a value that hone derived from keys (`precision`).
    pub name: String,
    /// The value in force.
    pub value: serde_json::Value,
    /// The place where the value was written.
    pub origin: Origin,
}

/// A key that was given and has no effect.
#[derive(Clone, Debug, PartialEq)]
pub struct Ignored {
    /// The key, with its section.
    pub name: String,
    /// The place where the key was written.
    pub origin: Origin,
    /// The reason why the key has no effect.
    pub why: &'static str,
}

impl Plan {
    /// Returns the options of access to the base model and the data.
    pub fn access(&self) -> fetch::Access<'_> {
        fetch::Access { source: &self.source, registry: &self.registry }
    }
}

/// The settings that serving a model needs.
#[derive(Clone, Debug)]
pub struct Serving {
    /// Options of downloads and of their cache.
    pub source: source::Options,
    /// How registries are reached.
    pub registry: registry::Options,
    /// Address of the base model.
    pub base: fetch::Model,
    /// The storage and precision of the base. It is stored as NF4 with quantised scales unless the keys say otherwise.
    pub model: model::Options,
    /// The name of the base for requests.
    pub model_name: String,
    /// The device to serve on.
    pub device: device::Choice,
    /// The chat template: Jinja text, or the name of one of the model's templates. `None`: the model's default
    /// template.
    pub chat_template: Option<String>,
    /// The share of the free memory that may be used.
    pub memory_limit: Option<crate::memory::Limit>,
}

/// Resolves the settings of a server.
///
/// Config: all contradictions and missing settings in one fault.
pub fn serving(spec: &Spec) -> Result<Serving> {
    let mut reader = Reader::new(spec);
    let ca_file = places::existing_file(&mut reader, "ca_file");
    let source = places::source_options(&mut reader, ca_file.clone());
    let (base, folder) = places::model(&mut reader, &source.cache, spec.kaito);
    let model_name = reader.text(Section::Hone, "name").unwrap_or_else(|| base.name());
    let said = reader.given(Section::QuantizationConfig, "load_in_4bit").is_some();
    let quantization = match base::quantization(&mut reader) {
        Quantization::None if !said => Quantization::FourBit { code: FourBitCode::Nf4, double: true },
        said => said,
    };
    let precision = base::precision(&mut reader, quantization).beside();
    let lora = LoraOptions::default();
    let serving = Serving {
        base,
        model: model::Options { folder, quantization, precision, lora },
        model_name,
        device: places::device(&mut reader),
        memory_limit: base::memory(&mut reader).limit,
        chat_template: rows::token_options(&mut reader).chat_template,
        registry: places::registry_options(&mut reader, ca_file),
        source,
    };
    reader.check().map(|()| serving)
}

/// Resolves the settings of a run. All contradictions and missing settings are reported in one fault.
pub fn make(spec: &Spec) -> Result<Plan> {
    let mut reader = Reader::new(spec);
    let plan = resolve(&mut reader, spec, true);
    reader.finish(plan)
}

/// Returns the same for commands that look at a finished adapter: they may do without data. Products in 8 bits are for
/// training only.
pub fn look(spec: &Spec) -> Result<Plan> {
    let mut reader = Reader::new(spec);
    let mut plan = resolve(&mut reader, spec, false);
    plan.model.precision = plan.model.precision.beside();
    reader.finish(plan)
}

fn resolve(reader: &mut Reader, spec: &Spec, needs_data: bool) -> Plan {
    let ca_file = places::existing_file(reader, "ca_file");
    let source = places::source_options(reader, ca_file.clone());
    let (base, folder) = places::model(reader, &source.cache, spec.kaito);
    let model_name = reader.text(Section::Hone, "name").unwrap_or_else(|| base.name());
    let origin = reader.origin(Section::Hone, "name");
    reader.derive("model name", model_name.as_str(), origin);
    let entries = places::data(reader, spec.kaito, needs_data);
    let dataset = rows::dataset_options(reader, &entries);
    let seed = reader.integer(Section::TrainingArguments, "seed") as u64;
    let quantization = base::quantization(reader);
    let precision = base::precision(reader, quantization);
    let memory = base::memory(reader);
    let model = model::Options { folder, quantization, precision, lora: base::lora(reader, seed) };
    let tokens = rows::token_options(reader);
    let train = training::train_options(reader, &dataset, &entries, tokens.tokens_max, seed);
    let output = places::output(reader, spec.kaito);
    let trackers = tracking::trackers(reader, &output, &model_name, ca_file.clone());
    let device = places::device(reader);
    let asked = asked::asked(spec, &base, tokens.chat_template.as_deref());
    Plan {
        token_cache: rows::token_cache(reader, &source.cache),
        trackers,
        source,
        data: entries.data,
        sources: entries.names,
        base,
        tokens,
        model,
        memory,
        model_name,
        train,
        earlier: places::earlier(reader),
        push: places::push(reader, &output),
        output,
        registry: places::registry_options(reader, ca_file),
        init_adapter: places::init_adapter(reader),
        device,
        ranks: places::ranks(reader, device),
        dataset,
        answers: reader.integer(Section::Hone, "answers") as usize,
        asked,
        values: Vec::new(),
        ignored: ignored(spec),
        warnings: Vec::new(),
    }
}

fn ignored(spec: &Spec) -> Vec<Ignored> {
    let why = |effect| match effect {
        Effect::None(why) => Some(why),
        _ => None,
    };
    spec.iter()
        .filter_map(|(key, given)| {
            Some(Ignored { name: key.to_string(), origin: given.origin.clone(), why: why(key.effect)? })
        })
        .collect()
}

#[cfg(test)]
mod tests;
