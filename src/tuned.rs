//! A finished adapter and the user's arguments -> its base, its configuration and rows to look at, as its run had them.
//!
//! A run's folder records the run's arguments (`plan/asked.rs`); the command line overrides them. Images and folders of
//! other tools have no such record, so that the command line must name their base and data.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value as Json, json};

use crate::adapter::{self, Adapter};
use crate::dataset::{self, Chat, EncodedRow, Tokenizer};
use crate::facts::config::Config;
use crate::facts::{Facts, Quantization, Residency, family, quantization};
use crate::fault::{Fault, Kind, Result};
use crate::fetch;
use crate::generate::defaults::Defaults;
use crate::memory::{self, Machine, Task};
use crate::model;
use crate::model::decoder::Decoder;
use crate::model::load;
use crate::model::lora::{Mixture, Pairs, Part};
use crate::model::residency::Home;
use crate::plan::{self, Plan};
use crate::registry::{self, Target};
use crate::report::{Report, Stage};
use crate::run_folder::Record;
use crate::spec::keys::Section;
use crate::spec::{self, Environment, Origin, Request, Setting, Spec, Written};
use crate::{job, source};

/// Tokens of a pass for which a base must fit on a GPU.
const PASS_TOKENS: usize = 512;

/// An adapter as it was named: SOURCE or SOURCE:STRENGTH.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// A folder or an image.
    pub source: String,
    /// 1 is as trained, 0 is nothing of it.
    pub strength: f64,
}

impl Named {
    /// Returns a folder, or `oci://IMAGE`, each with or without `:STRENGTH` behind it. A folder that is there is taken
    /// as it is written; the tag of an image is no strength.
    ///
    /// # Errors
    /// Usage: the strength is no number from -16 to 16.
    pub fn parse(text: &str) -> Result<Named> {
        let whole = || Named { source: text.to_owned(), strength: 1.0 };
        let Some((source, strength)) = text.rsplit_once(':') else { return Ok(whole()) };
        let image = text.starts_with("oci:");
        let name = source.rsplit('/').next().unwrap_or(source);
        let tagged = name.contains(':') && !name.starts_with("oci:");
        if source.is_empty() || (image && !tagged) || (!image && Path::new(text).is_dir()) {
            return Ok(whole());
        }
        let number = strength.parse::<f64>().ok().filter(|number| (-16.0..=16.0).contains(number));
        let wrong = || {
            Fault::usage(format!("adapter {text:?}: the strength {strength:?} is no number from -16 to 16"))
                .help("write SOURCE or SOURCE:STRENGTH, such as ./adapter:0.7")
        };
        Ok(Named { source: source.to_owned(), strength: number.ok_or_else(wrong)? })
    }
}

/// The rows that a command reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The rows that the configuration holds out.
    Evaluation,
    /// The rows that train.
    Train,
    /// Every row.
    All,
}

/// Whether the adapter was trained on the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trained {
    /// On none of them.
    No,
    /// On all of them.
    Yes,
    /// On some of them.
    Partly,
    /// Nothing says.
    Unknown,
}

impl Trained {
    fn told(self) -> &'static str {
        match self {
            Trained::No => "the adapter was not trained on them",
            Trained::Yes => "the adapter was trained on them",
            Trained::Partly => "the adapter was trained on some of them",
            Trained::Unknown => "no record says if the adapter was trained on them",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Trained::No => "no",
            Trained::Yes => "yes",
            Trained::Partly => "partly",
            Trained::Unknown => "unknown",
        }
    }
}

/// One adapter of the sum.
pub struct Member {
    /// The adapter as the user named it.
    pub named: Named,
    /// The folder of the adapter's files.
    pub folder: PathBuf,
    /// The content of the files.
    pub adapter: Adapter,
}

/// The adapter that a command reads.
pub struct Tuned {
    /// Everything resolved, as in the run.
    pub plan: Plan,
    /// The adapters; at least one.
    pub members: Vec<Member>,
    /// The record of the first adapter.
    pub record: Option<Record>,
    /// The base.
    pub facts: Facts,
    /// The storage of the base, as in the run.
    pub model: model::Options,
    spec: Spec,
    /// Adapters that were pulled lie here.
    _pulled: Option<tempfile::TempDir>,
}

/// Rows, and their origin.
pub struct Rows {
    /// The rows.
    pub records: Vec<dataset::Record>,
    /// The tokens of the rows; rows with nothing to learn are left out.
    pub encoded: Vec<EncodedRow>,
    /// Files of the data.
    pub files: Vec<String>,
    /// The part of the rows.
    pub split: Split,
    /// Rows of that part in all.
    pub of: usize,
    /// Whether the adapter was trained on the rows.
    pub trained: Trained,
}

/// Adapters loaded for a base, with their strengths.
pub struct Sum {
    /// Each adapter.
    pub pairs: Vec<Pairs>,
    /// The strength of each.
    pub strengths: Vec<f64>,
}

impl Sum {
    /// Returns all adapters on all rows of a batch.
    pub fn on(&self, rows: usize) -> Mixture<'_> {
        let parts = self.pairs.iter().zip(&self.strengths);
        Mixture::new(parts.map(|(adapter, &strength)| Part { adapter, rows: 0..rows, strength }).collect())
    }
}

impl Tuned {
    /// Fetches the adapters, reads the arguments of the first one's run, and resolves them with the arguments of now.
    ///
    /// # Errors
    /// Config: an adapter or the base is not named or not there. Model: an adapter that is none of the base.
    pub fn find(
        adapters: &[Named],
        request: &Request,
        environment: Environment,
        report: &Report,
    ) -> Result<Tuned> {
        let first = adapters.first().ok_or_else(|| Fault::usage("no adapter is named"))?;
        let record = match is_image(&first.source) {
            true => None,
            false => Record::of(&there(&first.source)?)?,
        };
        let recorded =
            record.as_ref().map(|record| settings(record, &first.source)).transpose()?.unwrap_or_default();
        let mut request = Request { remembered: recorded, ..request.clone() };
        let mut spec = spec::gather(&request, environment)?;
        let is_remembered =
            |name| spec.get(Section::Hone, name).is_none_or(|given: &spec::Given| remembered(&given.origin));
        // Rows to evaluate on that the run recorded belong to its own data; so does the share that it set aside.
        let outdated = match (is_remembered("data"), is_remembered("evaluation_data")) {
            (false, true) => Some("evaluation_data"),
            (_, false) => Some("DatasetConfig.train_test_split"),
            (true, true) => None,
        };
        if let Some(outdated) = outdated {
            request.remembered.retain(|setting| setting.key != outdated);
            spec = spec::gather(&request, environment)?;
        }
        let plan =
            plan::look(&spec).map_err(|fault| without_base(fault, &spec, record.is_some(), &first.source))?;
        plan.warnings.iter().for_each(|warning| report.warn(Stage::Plan, warning.as_str()));
        let (folders, pulled) = bring(adapters, &plan.registry, report)?;
        let members = adapters.iter().zip(folders).map(|(named, folder)| {
            let adapter = adapter::read(&folder)?;
            Ok(Member { named: named.clone(), folder, adapter })
        });
        let members = members.collect::<Result<Vec<_>>>()?;
        let folder = fetch::texts(&plan.base, plan.access(), report)?;
        let config = Config::read(&folder)?;
        let facts = family::describe(&config)?;
        let mut model = plan.model.clone();
        model.quantization = quantization::read(&config)?.unwrap_or(model.quantization);
        let tuned = Tuned { plan, members, record, facts, model, spec, _pulled: pulled };
        tuned.sum(DType::F32, &Device::Cpu)?; // an adapter of another base is refused before anything long
        Ok(tuned)
    }

    /// Returns the model's tokenizer, with the time of the run for templates that print it.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = Tokenizer::open(&self.plan.model.folder)?;
        job::fits_vocabulary(&tokenizer, &self.facts)?;
        dataset::check_template(&tokenizer, &self.plan.tokens)?;
        Ok(match &self.record {
            Some(record) => tokenizer.with_now(record.started()),
            None => tokenizer,
        })
    }

    /// Returns the template of the training.
    pub fn chat(&self, tokenizer: &Tokenizer) -> Result<Option<Chat>> {
        Chat::of(tokenizer, self.plan.tokens.chat_template.as_deref())
    }

    /// Returns the defaults of generation, and the tokens that end an answer.
    pub fn defaults(&self, tokenizer: &Tokenizer, chat: Option<&Chat>) -> Result<Defaults> {
        Defaults::read(&self.plan.model.folder, tokenizer, chat)
    }

    /// Returns the adapters' pairs for this base.
    pub fn sum(&self, dtype: DType, device: &Device) -> Result<Sum> {
        let pairs = self.members.iter().map(|member| {
            let pairs = member.adapter.pairs(&self.facts, dtype, dtype, device);
            pairs.map_err(|fault| fault.at(&member.named.source))
        });
        let strengths = self.members.iter().map(|member| member.named.strength).collect();
        Ok(Sum { pairs: pairs.collect::<Result<_>>()?, strengths })
    }

    /// Returns the base, held as in the run.
    pub fn decoder(&self, device: &Device, report: &Report) -> Result<Decoder> {
        fetch::weights(&self.plan.base, self.plan.access(), report)?;
        let home = self.home(device);
        if let Home::Host = home {
            report.warn(
                Stage::Load,
                "the base does not fit on the GPU: its layers are streamed from host memory in every pass, so that each \
                 generated token takes as long as a copy of the base",
            );
        }
        load::load_at(&home, self.facts.clone(), &self.model, device, report)
    }

    /// Returns the host memory if the base does not fit on a GPU.
    fn home(&self, device: &Device) -> Home {
        let task = Task {
            facts: self.facts.clone(),
            sites: Vec::new(),
            tokens: Vec::new(),
            quantization: self.model.quantization,
            precision: self.model.precision,
            dropout: false,
            bf16_checkpoint: true,
            tokens_min: PASS_TOKENS,
            tokens_max: PASS_TOKENS,
            example_tokens: PASS_TOKENS,
            eight_bit_moments: false,
            keep: None,
            residency: self.plan.memory.residency,
        };
        let plan = memory::solve(&task, &Machine::of(device, self.plan.memory.limit));
        match plan.map(|plan| plan.residency) {
            Ok(Residency::Streamed) => Home::Host,
            // If nothing fits, loading reports the missing memory.
            _ => Home::Device,
        }
    }

    /// Returns whether the command line names data, so that it is not the run's own.
    pub fn names_data(&self) -> bool {
        self.names(Section::Hone, "data") || self.names(Section::DatasetConfig, "dataset_path")
    }

    /// Returns whether the command line names data to evaluate on.
    fn names_evaluation(&self) -> bool {
        self.names(Section::Hone, "evaluation_data")
    }

    fn names(&self, section: Section, key: &str) -> bool {
        self.spec.get(section, key).is_some_and(|given| !remembered(&given.origin))
    }

    /// Returns rows of the data, at most `limit`, encoded as the training encodes them.
    ///
    /// # Errors
    /// Config: no data is named or recorded, or the wanted part of it is empty.
    pub fn rows(
        &self,
        split: Option<Split>,
        limit: usize,
        tokenizer: &Tokenizer,
        report: &Report,
    ) -> Result<Rows> {
        if self.plan.data.is_empty() {
            return Err(self.no_data());
        }
        let files = fetch::data(&self.plan.data, self.plan.access(), report)?;
        let same = self.same(&files);
        let mut options = self.plan.dataset.clone();
        let whole = split == Some(Split::All) || (split.is_none() && !self.holds_out(same));
        if whole {
            (options.train_share, options.evaluation_from) = (1.0, None);
        }
        let from = options.evaluation_from;
        let dataset = dataset::read(&files, &options, report)?;
        let (split, mut records) = match split {
            _ if whole => (Split::All, dataset.train),
            Some(Split::Train) => (Split::Train, dataset.train),
            None if dataset.evaluation.is_empty() => (Split::Train, dataset.train),
            _ => (Split::Evaluation, dataset.evaluation),
        };
        if records.is_empty() {
            return Err(Fault::config("the configuration holds no rows out for evaluation")
                .help("take --split train or all, or other data with --data"));
        }
        let of = records.len();
        records.truncate(limit);
        let files: Vec<source::File> =
            files.into_iter().filter(|file| has_rows_of(file, split, from)).collect();
        let trained = match split == Split::Evaluation && self.names_evaluation() {
            true => self.trained_on_named(&files),
            false => self.trained(split, same),
        };
        let encoded = dataset::encode_rows(&records, tokenizer, &self.plan.tokens, report)?;
        let files = files.into_iter().map(|file| file.name).collect();
        Ok(Rows { records, encoded, files, split, of, trained })
    }

    fn no_data(&self) -> Fault {
        let name = &self.members[0].named.source;
        let why = match &self.record {
            Some(_) => {
                "its run's data is not recorded, since its address held a secret or an older hone made it"
            }
            None => "it does not record what it was trained on",
        };
        Fault::config(format!("no rows: {name}: {why}")).help("name data with --data FILE")
    }

    /// Returns the files that the run trained from: all, some or none; `None` if nothing is recorded.
    fn same(&self, files: &[source::File]) -> Option<Trained> {
        let record = self.record.as_ref()?;
        let known = |file: &&source::File| record.data.iter().any(|other| other.sha256 == file.sha256);
        // Under a name of the run's, other bytes: rows that were trained may be among them.
        let name = |name: &str| Path::new(name).file_name().map(std::ffi::OsStr::to_owned);
        let same_name =
            |file: &source::File| record.data.iter().any(|other| name(&other.name) == name(&file.name));
        let changed = files.iter().any(|file| !known(&file) && same_name(file));
        Some(match files.iter().filter(known).count() {
            0 if !changed => Trained::No,
            count if count == files.len() && count == record.data.len() => Trained::Yes,
            _ => Trained::Partly,
        })
    }

    /// Returns whether the held-out part is used by default.
    fn holds_out(&self, same: Option<Trained>) -> bool {
        match same {
            _ if self.names_evaluation() => true,
            Some(Trained::Yes) => true,
            Some(_) => !self.names_data(),
            None => self.spec.get(Section::DatasetConfig, "train_test_split").is_some(),
        }
    }

    /// Whether the adapter was trained on rows of files that are named now to evaluate on.
    fn trained_on_named(&self, files: &[source::File]) -> Trained {
        match self.same(files) {
            None => Trained::Unknown,
            Some(Trained::No) => Trained::No,
            Some(_) => Trained::Partly,
        }
    }

    /// Returns whether the configuration sets rows aside for evaluation.
    fn holds_rows_out(&self) -> bool {
        self.plan.dataset.train_share < 1.0 || self.plan.dataset.evaluation_from.is_some()
    }

    fn trained(&self, split: Split, same: Option<Trained>) -> Trained {
        let keys = ["shuffle_dataset", "shuffle_seed", "train_test_split"];
        let other_split = keys.iter().any(|name| {
            self.spec.get(Section::DatasetConfig, name).is_some_and(|given| !remembered(&given.origin))
        });
        match (same, split) {
            (None, _) => Trained::Unknown,
            (Some(Trained::No), _) => Trained::No,
            (Some(Trained::Yes), Split::All) => match self.holds_rows_out() {
                true => Trained::Partly,
                false => Trained::Yes,
            },
            (Some(Trained::Yes), Split::Evaluation) if !other_split => Trained::No,
            (Some(Trained::Yes), Split::Train) if !other_split => Trained::Yes,
            (Some(_), _) => Trained::Partly,
        }
    }

    /// Returns the format, such as `NF4, scales quantised too`.
    pub fn base_format(&self) -> String {
        match self.model.quantization {
            Quantization::None => "as the checkpoint has it".into(),
            Quantization::FourBit { code, double } | Quantization::Stored { code, double } => {
                let scales = if double { ", scales quantised too" } else { "" };
                format!("{} in 4 bits{scales}", code.name())
            }
        }
    }

    /// Returns the adapter that is read, for machines.
    pub fn json(&self) -> Json {
        let member =
            |member: &Member| json!({"source": member.named.source, "strength": member.named.strength});
        json!({
            "base": self.plan.model_name,
            "base_format": self.base_format(),
            "adapters": self.members.iter().map(member).collect::<Vec<_>>(),
        })
    }

    /// Returns the same in two lines.
    pub fn text(&self) -> String {
        let member = |member: &Member| match member.named.strength == 1.0 {
            true => member.named.source.clone(),
            false => format!("{} x {}", member.named.strength, member.named.source),
        };
        let adapters: Vec<String> = self.members.iter().map(member).collect();
        format!(
            "base:    {} ({})\nadapter: {}\n",
            self.plan.model_name,
            self.base_format(),
            adapters.join(" + ")
        )
    }
}

impl Rows {
    /// Returns a line such as `12 of 20 held-out rows of rows.parquet; the adapter was not trained on them`.
    pub fn told(&self) -> String {
        let part = match self.split {
            Split::Evaluation => "held-out rows",
            Split::Train => "training rows",
            Split::All => "rows",
        };
        let files = match self.files.as_slice() {
            [only] => only.clone(),
            [first, ..] => format!("{first} and {} more files", self.files.len() - 1),
            [] => String::new(),
        };
        format!("{} of {} {part} of {files}; {}", self.records.len(), self.of, self.trained.told())
    }

    /// Returns JSON for machines.
    pub fn json(&self) -> Json {
        let split = match self.split {
            Split::Evaluation => "evaluation",
            Split::Train => "train",
            Split::All => "all",
        };
        json!({
            "used": self.records.len(), "of": self.of, "split": split, "files": self.files,
            "trained_on": self.trained.name(),
        })
    }
}

/// Returns whether a part of the rows is of this file; entries from `evaluation_from` on are to evaluate on.
fn has_rows_of(file: &source::File, split: Split, evaluation_from: Option<usize>) -> bool {
    match (split, evaluation_from) {
        (Split::Evaluation, Some(from)) => file.entry >= from,
        (Split::Train, Some(from)) => file.entry < from,
        _ => true,
    }
}

fn is_image(source: &str) -> bool {
    source.starts_with("oci:")
}

/// Returns an adapter's folder, if it is there.
fn there(source: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(source);
    if folder.join(adapter::CONFIG_FILE).is_file() {
        return Ok(folder);
    }
    let what = match folder.is_dir() {
        true => format!("holds no {}", adapter::CONFIG_FILE),
        false => "there is no such folder".into(),
    };
    Err(Fault::config(format!("adapter {source:?}: {what}"))
        .help("name the folder of an adapter (a run's output, or any PEFT folder), or oci://IMAGE"))
}

/// Returns folders as they are, and images pulled into a folder that is removed with the command.
fn bring(
    adapters: &[Named],
    registry: &registry::Options,
    report: &Report,
) -> Result<(Vec<PathBuf>, Option<tempfile::TempDir>)> {
    let mut pulled = None;
    let mut folders = Vec::new();
    for (number, named) in adapters.iter().enumerate() {
        if !is_image(&named.source) {
            folders.push(there(&named.source)?);
            continue;
        }
        let image = named.source.strip_prefix("oci://").unwrap_or(&named.source);
        if pulled.is_none() {
            let made = tempfile::tempdir();
            pulled = Some(made.map_err(|error| Fault::storage("create", &std::env::temp_dir(), &error))?);
        }
        let folder = pulled.as_ref().expect("just made").path().join(number.to_string());
        registry::pull(&Target::parse(image)?, &folder, registry, report)?;
        folders.push(folder);
    }
    Ok((folders, pulled))
}

/// Returns the record's keys as settings, which everything else wins over.
///
/// # Errors
/// Config: a key that no run records.
fn settings(record: &Record, source: &str) -> Result<Vec<Setting>> {
    let name = Path::new(source).join("hone.json").to_string_lossy().into_owned();
    if let Some(key) = record.asked.keys().find(|key| plan::is_of_one_start(key)) {
        return Err(Fault::config(format!(
            "{name}: asked: `{key}` belongs to one start, and no run records it"
        ))
        .help("the file was changed by hand: remove the key, and give it to the command instead"));
    }
    let setting = |(key, value): (&String, &Json)| Setting {
        key: key.clone(),
        written: match value {
            Json::String(text) => Written::Text(text.clone()),
            Json::Array(items) if items.iter().all(Json::is_string) => {
                Written::Texts(items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect())
            }
            other => Written::Yaml(other.to_string()),
        },
        origin: Origin::File { name: name.clone(), line: 1, column: 1 },
    };
    Ok(record.asked.iter().map(setting).collect())
}

fn remembered(origin: &Origin) -> bool {
    matches!(origin, Origin::File { name, .. } if Path::new(name).file_name().is_some_and(|name| name == "hone.json"))
}

/// Replaces the fault of a base that is not named by one with the base's name in the adapter's configuration.
fn without_base(fault: Fault, spec: &Spec, recorded: bool, source: &str) -> Fault {
    let named = spec.get(Section::Hone, "model").is_some()
        || spec.get(Section::ModelConfig, "pretrained_model_name_or_path").is_some();
    if named || fault.kind != Kind::Config || !fault.message.contains("no model:") {
        return fault;
    }
    let base = adapter::read_config(Path::new(source)).ok().and_then(|config| config.base_model_name_or_path);
    let of = base.map_or(String::new(), |base| format!("; its {} names {base:?}", adapter::CONFIG_FILE));
    let why = match recorded {
        true => "its hone.json was written by a version that does not record the base",
        false => "no run of hone left a record in it",
    };
    Fault::config(format!("adapter {source:?} does not say where its base model is: {why}{of}")).help(
        "name the base with --model DIR or hf://OWNER/NAME, and the run's configuration with --config FILE",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strength_stands_behind_the_last_colon() {
        let parse = |text: &str| Named::parse(text).map(|named| (named.source, named.strength)).unwrap();
        assert_eq!(parse("./a"), ("./a".into(), 1.0));
        assert_eq!(parse("./a:0.7"), ("./a".into(), 0.7));
        assert_eq!(parse("oci://host:5000/a"), ("oci://host:5000/a".into(), 1.0));
        assert_eq!(parse("oci://host:5000/a:1"), ("oci://host:5000/a:1".into(), 1.0));
        assert_eq!(parse("oci://host:5000/a:1:0.5"), ("oci://host:5000/a:1".into(), 0.5));
        assert_eq!(parse("oci://host/a@sha256:00"), ("oci://host/a@sha256:00".into(), 1.0));
        assert_eq!(parse("oci://host/a@sha256:00:-1"), ("oci://host/a@sha256:00".into(), -1.0));
        assert_eq!(parse("oci:image"), ("oci:image".into(), 1.0));
        for wrong in ["./a:much", "./a:99", "./a:nan", "./a:"] {
            assert_eq!(Named::parse(wrong).unwrap_err().kind, Kind::Usage, "{wrong}");
        }
    }

    #[test]
    fn a_record_does_not_decide_whom_a_start_trusts() {
        let record = |asked: Json| -> Record {
            let record = serde_json::json!({"hone": "1", "fingerprint": "f", "started": 0, "data": [], "asked": asked});
            serde_json::from_value(record).unwrap()
        };
        let kept = settings(&record(serde_json::json!({"LoraConfig.r": 4, "model": "m"})), "a").unwrap();
        assert_eq!(kept.len(), 2);
        for key in ["push", "ca_file", "plain_http", "docker_config", "output", "mlflow", "init_adapter"] {
            let fault = settings(&record(serde_json::json!({"model": "m", key: "x"})), "a").unwrap_err();
            assert_eq!((fault.kind, fault.message.contains(key)), (Kind::Config, true), "{fault}");
        }
    }

    #[test]
    fn a_folder_that_is_there_is_taken_as_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("run:1");
        std::fs::create_dir(&odd).unwrap();
        let named = Named::parse(odd.to_str().unwrap()).unwrap();
        assert_eq!((Path::new(&named.source), named.strength), (odd.as_path(), 1.0));
    }
}
