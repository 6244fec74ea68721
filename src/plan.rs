//! What will be done: every default, limit and name resolved, each with its origin. Looks at which paths exist;
//! reads nothing but a chat template, fetches nothing.

mod reader;
mod places;
mod rows;
mod base;
mod training;
mod show;

pub use places::{below_mnt, registry_access};

use crate::facts::{FourBitCode, LoraOptions, Quantization};
use crate::fault::Result;
use crate::run_folder::Earlier;
use crate::spec::keys::{Effect, Section};
use crate::spec::{Origin, Spec};
use crate::{dataset, device, fetch, memory, model, registry, source, train};
use reader::Reader;
use std::path::PathBuf;

/// Everything `hone run` needs to know; stages take their own part.
#[derive(Clone, Debug)]
pub struct Plan {
    pub source: source::Options,
    pub data: Vec<fetch::Data>,
    /// Where the base model is; `model.folder` is where its files are, or will be.
    pub base: fetch::Model,
    pub dataset: dataset::Options,
    pub tokens: dataset::TokenOptions,
    pub model: model::Options,
    pub memory: memory::Options,
    /// Name of the base model, for the image and the adapter's card.
    pub model_name: String,
    pub train: train::Options,
    pub output: PathBuf,
    /// What happens to another run's results there.
    pub earlier: Earlier,
    pub push: Option<registry::Target>,
    pub registry: registry::Options,
    pub init_adapter: Option<PathBuf>,
    pub device: device::Choice,
    /// Every value that counts, in the table's order.
    pub values: Vec<Value>,
    /// Given keys that change nothing here.
    pub ignored: Vec<Ignored>,
    /// What somebody should look at although the run goes on.
    pub warnings: Vec<String>,
}

/// One resolved value.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// `Section.key`, a key of hone, or what hone made of them (`precision`).
    pub name: String,
    pub value: serde_json::Value,
    pub origin: Origin,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Ignored {
    pub name: String,
    pub origin: Origin,
    pub why: &'static str,
}

impl Plan {
    /// How the base model and the data are reached.
    pub fn access(&self) -> fetch::Access<'_> {
        fetch::Access { source: &self.source, registry: &self.registry }
    }
}

/// How models are reached outside a run, for commands that have no other keys.
///
/// # Errors
/// Config: what these few keys say cannot be used.
pub fn access(spec: &Spec) -> Result<(source::Options, registry::Options)> {
    let mut reader = Reader::new(spec);
    let ca_file = places::existing_file(&mut reader, "ca_file");
    let options = (
        places::source_options(&mut reader, ca_file.clone()),
        places::registry_options(&mut reader, ca_file),
    );
    reader.check().map(|()| options)
}

/// What serving a model needs of the keys.
#[derive(Clone, Debug)]
pub struct Serving {
    pub source: source::Options,
    pub registry: registry::Options,
    pub base: fetch::Model,
    /// NF4 with quantised scales unless the keys say otherwise.
    pub model: model::Options,
    /// The id of the base.
    pub model_name: String,
    pub device: device::Choice,
    pub chat_template: Option<String>,
    /// How much of the free memory may be used.
    pub memory_limit: Option<crate::memory::Limit>,
}

/// Resolves what was asked of a server.
///
/// # Errors
/// Config: all contradictions and missing things in one fault.
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
    let precision = base::precision(&mut reader, quantization);
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

/// Resolves what was asked. All contradictions and missing things are told in one fault.
pub fn make(spec: &Spec) -> Result<Plan> {
    let mut reader = Reader::new(spec);
    let plan = resolve(&mut reader, spec);
    reader.finish(plan)
}

fn resolve(reader: &mut Reader, spec: &Spec) -> Plan {
    let ca_file = places::existing_file(reader, "ca_file");
    let source = places::source_options(reader, ca_file.clone());
    let (base, folder) = places::model(reader, &source.cache, spec.kaito);
    let model_name = reader.text(Section::Hone, "name").unwrap_or_else(|| base.name());
    let origin = reader.origin(Section::Hone, "name");
    reader.derive("model name", model_name.as_str(), origin);
    let (data, shares) = places::data(reader, spec.kaito);
    let dataset = rows::dataset_options(reader, shares);
    let seed = reader.integer(Section::TrainingArguments, "seed") as u64;
    let quantization = base::quantization(reader);
    let precision = base::precision(reader, quantization);
    let memory = base::memory(reader);
    let model = model::Options { folder, quantization, precision, lora: base::lora(reader, seed) };
    let tokens = rows::token_options(reader);
    let train = training::train_options(reader, &dataset, tokens.tokens_max, seed);
    Plan {
        source,
        data,
        base,
        tokens,
        model,
        memory,
        model_name,
        train,
        output: places::output(reader, spec.kaito),
        earlier: places::earlier(reader),
        push: places::push(reader),
        registry: places::registry_options(reader, ca_file),
        init_adapter: places::init_adapter(reader),
        device: places::device(reader),
        dataset,
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
