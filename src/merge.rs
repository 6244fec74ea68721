//! A base and adapters -> the merged model in a folder, compared with base and adapters side by side: `hone merge`.

use std::path::PathBuf;

use candle_core::{DType, Device};

use crate::dataset::{Chat, Example, Tokenizer};
use crate::device;
use crate::evaluate::{self, Measures};
use crate::export::folder::Folder;
use crate::export::gguf::architecture::Architecture;
use crate::export::gguf::store::GgufStore;
use crate::export::gguf::vocabulary::OfModel;
use crate::export::merged::Merged;
use crate::export::{gguf, model_folder};
use crate::facts::config::Config;
use crate::facts::{FourBitCode, Quantization, family};
use crate::fault::{Fault, Result};
use crate::fetch;
use crate::model;
use crate::model::decoder::Decoder;
use crate::model::load;
use crate::model::weights::Checkpoint;
use crate::report::{Report, Stage};
use crate::spec::{Environment, Request};
use crate::tuned::{Named, Sum, Tuned};
use crate::words;

pub use crate::export::Stored;

/// Shown where rows are missing: the merged model is compared on it.
const TEXT: [&str; 4] = [
    "The harbour was quiet in the morning. Two fishermen mended a net and spoke of the weather, which had been bad for a \
     week and would, they thought, be bad for another.",
    "To reset your password, open the settings page, choose Account, and follow the link that is sent to your address. The \
     link is valid for thirty minutes.",
    "def mean(values):\n    if not values:\n        raise ValueError(\"no values\")\n    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level. At 3,000 metres it boils at about 90 degrees, so that food takes \
     longer to cook.",
];
/// A difference of the losses above which the merged model is no longer what was trained.
const DIFFERENCE_TOLD: f64 = 0.01;

/// Kind of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// A model folder.
    Safetensors,
    /// One file.
    Gguf,
}

/// The model that the adapters are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onto {
    /// The checkpoint's own weights.
    Original,
    /// The weights that the training computed with.
    Trained,
}

/// The request of `hone merge`, apart from the job.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The adapters, which are added.
    pub adapters: Vec<Named>,
    /// The new folder.
    pub to: PathBuf,
    /// Kind of files.
    pub format: FileFormat,
    /// Type of the weights.
    pub stored: Stored,
    /// Whether the adapter is written without the base.
    pub adapter_only: bool,
    /// Largest file of safetensors.
    pub shard_bytes: u64,
    /// Base that the adapters are added to.
    pub onto: Onto,
    /// Rows of the comparison; 0 is no comparison.
    pub check_rows: usize,
}

/// The result of `hone merge`.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// The new folder.
    pub folder: PathBuf,
    /// Its files and their bytes.
    pub files: Vec<(String, u64)>,
    /// `None` if nothing was compared.
    pub comparison: Option<Comparison>,
}

/// The same rows, three times.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The rows that the loss is measured on.
    pub rows: String,
    /// The base alone.
    pub base: Measures,
    /// Base and adapters side by side, as in the training.
    pub beside: Measures,
    /// The files, read back.
    pub merged: Measures,
}

impl Comparison {
    /// Returns the growth of the loss by merging.
    pub fn difference(&self) -> f64 {
        self.merged.loss - self.beside.loss
    }
}

impl Done {
    /// Returns text for people.
    pub fn text(&self) -> String {
        let mut text = format!("Written: {}\n", self.folder.display());
        for (name, bytes) in &self.files {
            text += &format!("  {name}  {}\n", words::size(*bytes));
        }
        if let Some(comparison) = &self.comparison {
            let Comparison { rows, base, beside, merged } = comparison;
            text += &format!("\nloss over {rows}\n");
            text += &format!("  base                {:.4}\n", base.loss);
            text += &format!("  base with adapter   {:.4}\n", beside.loss);
            text += &format!("  merged              {:.4}  ({:+.4})\n", merged.loss, comparison.difference());
        }
        text
    }
}

/// Merges, writes and compares.
///
/// # Errors
/// As [`Tuned::find`]; Config: the folder is not empty. Capacity: the volume is too small. Model: a family that the
/// format does not have, or a value that the type cannot hold.
pub fn run(request: &Request, options: &Options, environment: Environment, report: &Report) -> Result<Done> {
    let tuned = Tuned::find(&options.adapters, request, environment, report)?;
    let tokenizer = tuned.tokenizer()?;
    let architecture = match options.format {
        FileFormat::Gguf => Some(Architecture::of(&tuned.facts)?),
        FileFormat::Safetensors => None,
    };
    for warning in architecture.iter().flat_map(|architecture| &architecture.warnings) {
        report.warn(Stage::Load, warning.as_str());
    }
    let sum = tuned.sum(DType::F32, &Device::Cpu)?;
    let folder = Folder::begin(&options.to)?;
    if options.adapter_only {
        let architecture = architecture.ok_or_else(|| Fault::usage("--adapter-only needs --format gguf"))?;
        return adapter_alone(&tuned, &sum, &architecture, options, folder);
    }
    fetch::weights(&tuned.plan.base, tuned.plan.access(), report)?;
    let checkpoint = Checkpoint::open(&tuned.plan.model.folder)?;
    load::fits(&tuned.facts, &checkpoint)?;
    let pairs = sum.pairs.iter().zip(sum.strengths.iter().copied()).collect();
    let merged = Merged::new(&tuned.facts, &checkpoint, four_bit(&tuned, options.onto), pairs);
    let chat = tuned.chat(&tokenizer)?;
    let writing = Writing { tuned: &tuned, options, merged: &merged, architecture, folder: &folder };
    let planned = writing.plan(&tokenizer, chat.as_ref(), report)?; // a lack of space is reported before the long part
    let device = device::open(tuned.plan.device, report)?;
    let rows = match options.check_rows {
        0 => None,
        _ if !room_to_compare(&tuned, options, &device, report) => None,
        count => Some(examples(&tuned, count, &tokenizer, report)?),
    };
    let before = match &rows {
        None => None,
        Some((_, examples)) => Some(side_by_side(&tuned, examples, &device, report)?),
    };
    writing.write(&planned, &tokenizer, chat.as_ref(), report)?;
    let comparison = match (rows, before) {
        (Some((rows, examples)), Some((base, beside))) => {
            let decoder = writing.decoder(&device, report)?;
            let batch = tuned.plan.train.eval_batch_examples;
            let merged = evaluate::measure(&decoder, None, &examples, batch, report)?;
            Some(Comparison { rows, base, beside, merged })
        }
        _ => None,
    };
    warn(&tuned, options, comparison.as_ref(), report);
    done(folder, comparison)
}

/// Returns whether the merged model, which the comparison loads as a whole, has room in memory. If not, a message says
/// so; the model itself is written piece by piece.
fn room_to_compare(tuned: &Tuned, options: &Options, device: &Device, report: &Report) -> bool {
    let bytes = if options.stored == Stored::F32 { 4 } else { 2 };
    let needed = (tuned.facts.parameters() * bytes) as u64;
    let free = device::memory_free(device).unwrap_or(u64::MAX);
    if needed > free {
        let (needed, free) = (words::size(needed), words::size(free));
        report.warn(
            Stage::Evaluate,
            format!("the merged model is not compared with base and adapter: that needs {needed} of memory, {free} are free"),
        );
    }
    needed <= free
}

fn done(folder: Folder, comparison: Option<Comparison>) -> Result<Done> {
    let folder = folder.finish()?;
    let entries = std::fs::read_dir(&folder).map_err(|error| Fault::storage("read", &folder, &error))?;
    let file = |entry: std::fs::DirEntry| {
        let data = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some((entry.file_name().to_string_lossy().into_owned(), data.len()))
    };
    let mut files: Vec<(String, u64)> = entries.flatten().filter_map(file).collect();
    files.sort();
    Ok(Done { folder, files, comparison })
}

/// Returns the adapters without the base, as a GGUF LoRA.
fn adapter_alone(
    tuned: &Tuned,
    sum: &Sum,
    architecture: &Architecture,
    options: &Options,
    folder: Folder,
) -> Result<Done> {
    let parts: Vec<_> = sum.pairs.iter().zip(sum.strengths.iter().copied()).collect();
    let alpha = tuned.members[0].adapter.config.lora_alpha.as_f64().unwrap_or(1.0);
    let name = format!("adapter-{}.gguf", options.stored.name());
    let title = format!("LoRA adapter for {}", tuned.plan.model_name);
    gguf::write_adapter(&tuned.facts, architecture, &parts, alpha, options.stored, (&name, &title), &folder)?;
    done(folder, None)
}

/// Returns the form in which the training held the base, if the merge uses this form.
fn four_bit(tuned: &Tuned, onto: Onto) -> Option<(FourBitCode, bool)> {
    match (onto, tuned.model.quantization) {
        (Onto::Trained, Quantization::FourBit { code, double }) => Some((code, double)),
        _ => None,
    }
}

/// Returns rows of the run or of given data; without any, a text that is built in.
fn examples(
    tuned: &Tuned,
    count: usize,
    tokenizer: &Tokenizer,
    report: &Report,
) -> Result<(String, Vec<Example>)> {
    let built_in = || {
        let example = |text: &&str| {
            let ids = tokenizer.encode(text, true).map_err(Fault::model)?;
            Ok(Example { supervised: vec![true; ids.len()], ids })
        };
        let examples = TEXT.iter().map(example).collect::<Result<Vec<_>>>()?;
        Ok::<_, Fault>(("a text that is built in".to_owned(), examples))
    };
    if tuned.plan.data.is_empty() {
        return built_in();
    }
    match tuned.rows(None, count, tokenizer, report) {
        Ok(rows) => {
            let examples = rows.encoded.iter().map(|row| row.example.clone()).collect();
            Ok((rows.told(), examples))
        }
        // Data of the run may be gone, but data that is named now must exist.
        Err(fault) if !tuned.names_data() => {
            let why = fault.in_a_line();
            report
                .warn(Stage::Read, format!("the run's rows cannot be read: {why}; a built-in text is used"));
            built_in()
        }
        Err(fault) => Err(fault),
    }
}

/// Returns the base, and the base with the adapters, held as in the training.
fn side_by_side(
    tuned: &Tuned,
    examples: &[Example],
    device: &Device,
    report: &Report,
) -> Result<(Measures, Measures)> {
    let decoder = tuned.decoder(device, report)?;
    let sum = tuned.sum(decoder.dtype, device)?;
    let batch = tuned.plan.train.eval_batch_examples;
    let base = evaluate::measure(&decoder, None, examples, batch, report)?;
    Ok((base, evaluate::measure(&decoder, Some(&sum), examples, batch, report)?))
}

/// Warns of the changes that merging made.
fn warn(tuned: &Tuned, options: &Options, comparison: Option<&Comparison>, report: &Report) {
    let over_four_bit = matches!(tuned.model.quantization, Quantization::FourBit { .. });
    let changed = match comparison {
        Some(comparison) => format!(
            "its loss is {:.4}, that of base and adapter {:.4} ({:+.4})",
            comparison.merged.loss,
            comparison.beside.loss,
            comparison.difference()
        ),
        None => "how much that changes was not measured".into(),
    };
    if over_four_bit && options.onto == Onto::Original {
        report.warn(
            Stage::Evaluate,
            format!(
                "the adapter was trained over {}, and the merged model has the checkpoint's own weights: {changed}; \
                 --onto trained merges into the weights of the training",
                tuned.base_format()
            ),
        );
    } else if comparison.is_some_and(|comparison| comparison.difference().abs() > DIFFERENCE_TOLD) {
        report.warn(Stage::Evaluate, format!("merging changed the model: {changed}"));
    }
}

/// The files to be written, and their sources.
struct Writing<'a> {
    tuned: &'a Tuned,
    options: &'a Options,
    merged: &'a Merged<'a>,
    architecture: Option<Architecture>,
    folder: &'a Folder,
}

impl Writing<'_> {
    fn gguf_name(&self) -> String {
        format!("model-{}.gguf", self.options.stored.name())
    }

    /// Returns the plan of the file, if the result is one file. Refuses a volume that is too small.
    fn plan(
        &self,
        tokenizer: &Tokenizer,
        chat: Option<&Chat>,
        report: &Report,
    ) -> Result<Option<gguf::Planned>> {
        let Some(architecture) = &self.architecture else {
            self.folder.require(model_folder::bytes(self.merged, self.options.stored))?;
            return Ok(None);
        };
        let around = tokenizer.encode("a", true).map_err(Fault::model)?;
        let of_model = OfModel {
            bos: tokenizer.bos_id(),
            eos: tokenizer.eos_id(),
            pad: tokenizer.pad_id(),
            end_of_turn: chat.and_then(|chat| chat.end_of_turn(tokenizer)),
            adds_bos: tokenizer.bos_id().is_some() && around.first().copied() == tokenizer.bos_id(),
            adds_eos: around.len() > 1 && around.last() == Some(&tokenizer.eos_id()),
            chat_template: chat.map(Chat::source),
        };
        let folder = &self.tuned.plan.model.folder;
        let vocabulary = gguf::tokenizer(folder, self.tuned.facts.vocab, &of_model)?;
        vocabulary.warnings.iter().for_each(|warning| report.warn(Stage::Load, warning.as_str()));
        let name = format!("{} tuned", self.tuned.plan.model_name);
        let planned = gguf::plan(self.merged, architecture, vocabulary.keys, self.options.stored, &name)?;
        self.folder.require(planned.bytes())?;
        Ok(Some(planned))
    }

    fn write(
        &self,
        planned: &Option<gguf::Planned>,
        tokenizer: &Tokenizer,
        chat: Option<&Chat>,
        report: &Report,
    ) -> Result<()> {
        if let Some(planned) = planned {
            return gguf::write(self.merged, planned, &self.gguf_name(), self.folder, report);
        }
        let Options { stored, shard_bytes, .. } = *self.options;
        model_folder::write_weights(self.merged, stored, shard_bytes, self.folder, report)?;
        let stop_tokens = self.tuned.defaults(tokenizer, chat)?.stop_tokens;
        // The model's own comes with its files.
        let own = chat.filter(|_| self.tuned.plan.tokens.chat_template.is_some()).map(Chat::source);
        let card = self.card();
        let beside = model_folder::Beside {
            from: &self.tuned.plan.model.folder,
            chat_template: own,
            stop_tokens: &stop_tokens,
            card: &card,
        };
        model_folder::write_beside(&beside, stored, self.folder)
    }

    /// Returns README.md, as the hub shows it.
    fn card(&self) -> String {
        let onto = match (self.options.onto, self.tuned.model.quantization) {
            (_, Quantization::Stored { .. }) | (Onto::Trained, Quantization::FourBit { .. }) => {
                "the dequantised 4-bit weights of the training"
            }
            _ => "the weights of the checkpoint",
        };
        let list: String = self
            .tuned
            .members
            .iter()
            .map(|member| {
                // A path of this machine says nothing to others.
                let name = member.named.source.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
                format!("- {name}, strength {}\n", member.named.strength)
            })
            .collect();
        format!(
            "---\nbase_model: {}\nlibrary_name: transformers\n---\n\n# {} with merged adapters\n\n\
             The adapters' weights were added to {onto}:\n\n{list}",
            self.tuned.plan.model_name, self.tuned.plan.model_name
        )
    }

    /// Returns the files that were written, read back.
    fn decoder(&self, device: &Device, report: &Report) -> Result<Decoder> {
        let mut model = model::Options { quantization: Quantization::None, ..self.tuned.model.clone() };
        match &self.architecture {
            None => {
                model.folder = self.folder.work().to_owned();
                let facts = family::describe(&Config::read(&model.folder)?)?;
                load::load(facts, &model, device, report)
            }
            Some(architecture) => {
                let file = self.folder.work().join(self.gguf_name());
                let store = GgufStore::open(&file, &self.tuned.facts, architecture)?;
                let checkpoint = Checkpoint::of_store(Box::new(store));
                load::load_from(&checkpoint, self.tuned.facts.clone(), &model, device, report)
            }
        }
    }
}
