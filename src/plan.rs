//! What will be done: every default, limit and name resolved, each with its origin. Looks at which paths exist;
//! reads nothing but a chat template, fetches nothing.

mod reader;
mod show;

use crate::dataset::{self, Layout, LossOn, TokenOptions};
use crate::fault::Result;
use crate::model::{self, FourBitCode, Keep, LoraInit, LoraOptions, Precision, Quantization, Targets};
use crate::spec::keys::{Effect, Section};
use crate::spec::value::Value as Written;
use crate::spec::{Origin, Spec};
use crate::train::{self, Every, Schedule, Warmup};
use crate::{registry, source};
use reader::Reader;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// LIMIT: stands for "not cut" where examples have a length; above every supported model's context.
const TOKENS_UNLIMITED: usize = 1 << 20;
/// LIMIT: the longest chat template in use has 20 KiB.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Everything `hone run` needs to know; stages take their own part.
#[derive(Clone, Debug)]
pub struct Plan {
    pub source: source::Options,
    pub data: Vec<source::Source>,
    pub dataset: dataset::Options,
    pub tokens: TokenOptions,
    pub model: model::Options,
    /// Name of the base model, for the image and the adapter's card.
    pub model_name: String,
    pub train: train::Options,
    pub output: PathBuf,
    pub push: Option<registry::Target>,
    pub registry: registry::Options,
    pub init_adapter: Option<PathBuf>,
    pub device: Device,
    /// Every value that counts, in the table's order.
    pub values: Vec<Value>,
    /// Given keys that change nothing here.
    pub ignored: Vec<Ignored>,
    /// What somebody should look at although the run goes on.
    pub warnings: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The first CUDA device if there is one, else the CPU.
    Auto,
    Cpu,
    Cuda(usize),
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

/// Resolves what was asked. All contradictions and missing things are told in one fault.
pub fn make(spec: &Spec) -> Result<Plan> {
    let mut reader = Reader::new(spec);
    let plan = resolve(&mut reader, spec);
    reader.finish(plan)
}

fn resolve(reader: &mut Reader, spec: &Spec) -> Plan {
    let ca_file = existing_file(reader, "ca_file");
    let folder = model_folder(reader, spec.kaito);
    let model_name = reader.text(Section::Hone, "name").unwrap_or_else(|| folder_name(&folder));
    let origin = reader.origin(Section::Hone, "name");
    reader.derive("model name", model_name.as_str(), origin);
    let data = data(reader, spec.kaito);
    let dataset = dataset_options(reader);
    let seed = reader.integer(Section::TrainingArguments, "seed") as u64;
    let quantization = quantization(reader);
    let model = model::Options {
        folder,
        quantization,
        precision: precision(reader, quantization),
        keep: keep(reader),
        lora: lora(reader, seed),
    };
    let train = train_options(reader, &dataset, seed);
    Plan {
        source: source_options(reader, ca_file.clone()),
        data,
        tokens: token_options(reader),
        model,
        model_name,
        train,
        output: output(reader, spec.kaito),
        push: push(reader),
        registry: registry_options(reader, ca_file),
        init_adapter: init_adapter(reader),
        device: device(reader),
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

// --- where things are ---

fn model_folder(reader: &mut Reader, kaito: bool) -> PathBuf {
    const MOUNTED: [&str; 2] = ["/workspace/tfs/weights", "/workspace/weights"];
    let mut origin = reader.origin(Section::Hone, "model");
    let mut folder = reader.text(Section::Hone, "model");
    if let Some(older) = reader.text(Section::ModelConfig, "pretrained_model_name_or_path")
        && folder.is_none()
    {
        origin = reader.origin(Section::ModelConfig, "pretrained_model_name_or_path");
        folder = Some(older);
    }
    if folder.is_none() && kaito {
        folder = MOUNTED.into_iter().find(|path| Path::new(path).is_dir()).map(String::from);
    }
    let Some(folder) = folder else {
        reader.wrong(&Origin::Default, "no model: name its folder with `model` (--model DIR)");
        return PathBuf::new();
    };
    let path = PathBuf::from(&folder);
    if path.is_dir() {
        if !path.join("config.json").is_file() {
            reader.wrong(
                &origin,
                format!("model: {folder} holds no config.json; expected a Hugging Face model folder"),
            );
        }
    } else if looks_like_hub_id(&folder) {
        reader.wrong(
            &origin,
            format!("model: there is no folder {folder}; hone does not fetch models from a hub: download it first (`hf download {folder} --local-dir DIR`) and give DIR"),
        );
    } else {
        reader.wrong(&origin, format!("model: there is no folder {folder}"));
    }
    reader.derive("model folder", folder.as_str(), origin);
    path
}

fn folder_name(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    folder.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned())
}

fn looks_like_hub_id(text: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.');
    text.split_once('/').is_some_and(|(owner, name)| plain(owner) && plain(name) && !name.contains('/'))
}

fn data(reader: &mut Reader, kaito: bool) -> Vec<source::Source> {
    let mut origin = reader.origin(Section::Hone, "data");
    let mut texts = reader.texts(Section::Hone, "data");
    let path = reader.text(Section::DatasetConfig, "dataset_path").filter(|path| !path.is_empty());
    // KAITO's environment names the folder; a path in its configuration is nearer.
    let from_environment = matches!(&origin, Origin::Environment(name) if name == "DATASET_FOLDER_PATH");
    if let Some(path) = path
        && (texts.is_empty() || from_environment)
    {
        origin = reader.origin(Section::DatasetConfig, "dataset_path");
        texts = vec![if kaito { Path::new("/mnt").join(path).display().to_string() } else { path }];
    }
    if texts.is_empty() && kaito {
        texts = vec!["/mnt/data".into()];
    }
    if texts.is_empty() {
        reader.wrong(&Origin::Default, "no dataset: name parquet files with `data` (--data URL_OR_PATH)");
    }
    let mut sources = Vec::new();
    for text in texts {
        match reader::parse_source(&text) {
            Ok(source) => sources.push(source),
            Err(fault) => reader.wrong(&origin, fault.message),
        }
    }
    sources
}

/// `output`, else `TrainingArguments.output_dir` as it stands; under KAITO's mounts as its controller resolves it.
fn output(reader: &mut Reader, kaito: bool) -> PathBuf {
    let asked =
        reader.text(Section::Hone, "output").map(|text| (text, reader.origin(Section::Hone, "output")));
    let older = reader.text(Section::TrainingArguments, "output_dir").unwrap_or_default();
    let older_origin = reader.origin(Section::TrainingArguments, "output_dir");
    let (folder, origin) = match asked {
        Some((text, origin)) => (PathBuf::from(text), origin),
        None if kaito => match below_mnt(&older) {
            Some(folder) => (folder, older_origin),
            None => {
                reader.wrong(
                    &older_origin,
                    format!("TrainingArguments.output_dir: {older:?} is not below /mnt"),
                );
                (PathBuf::new(), older_origin)
            }
        },
        None if older.is_empty() => (PathBuf::from("output"), Origin::Default),
        None => (PathBuf::from(older), older_origin),
    };
    reader.derive("output folder", folder.display().to_string(), origin);
    folder
}

/// The rule of KAITO's `PrepareOutputDir`: nothing is /mnt/output, anything else lies below /mnt.
fn below_mnt(text: &str) -> Option<PathBuf> {
    let text = if text.trim().is_empty() { "output" } else { text };
    let joined = if text.starts_with("/mnt") { text.to_string() } else { format!("/mnt/{text}") };
    let mut clean = PathBuf::from("/");
    for part in Path::new(&joined).components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::Normal(name) => clean.push(name),
            _ => {}
        }
    }
    (clean.starts_with("/mnt") && clean != Path::new("/mnt")).then_some(clean)
}

fn existing_file(reader: &mut Reader, name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(reader.text(Section::Hone, name)?);
    if !path.is_file() {
        let origin = reader.origin(Section::Hone, name);
        reader.wrong(&origin, format!("{name}: there is no file {}", path.display()));
    }
    Some(path)
}

fn init_adapter(reader: &mut Reader) -> Option<PathBuf> {
    let path = PathBuf::from(reader.text(Section::Hone, "init_adapter")?);
    if !path.join("adapter_config.json").is_file() {
        let origin = reader.origin(Section::Hone, "init_adapter");
        reader.wrong(&origin, format!("init_adapter: {} holds no adapter_config.json", path.display()));
    }
    Some(path)
}

fn push(reader: &mut Reader) -> Option<registry::Target> {
    let text = reader.text(Section::Hone, "push")?;
    match reader::parse_target(&text) {
        Ok(target) => Some(target),
        Err(fault) => {
            let origin = reader.origin(Section::Hone, "push");
            reader.wrong(&origin, fault.message);
            None
        }
    }
}

fn device(reader: &mut Reader) -> Device {
    let origin = reader.origin(Section::Hone, "device");
    let text = reader.text(Section::Hone, "device").unwrap_or_default();
    let use_cpu = reader.boolean(Section::TrainingArguments, "use_cpu");
    match text.as_str() {
        "auto" if use_cpu => Device::Cpu,
        "auto" => Device::Auto,
        "cpu" => Device::Cpu,
        "cuda" => Device::Cuda(0),
        _ => match text.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
            Some(number) => Device::Cuda(number),
            None => {
                reader.wrong(&origin, format!("device: expected auto, cpu, cuda or cuda:N, found {text:?}"));
                Device::Auto
            }
        },
    }
}

fn source_options(reader: &mut Reader, ca_file: Option<PathBuf>) -> source::Options {
    let cache = reader.text(Section::Hone, "cache").unwrap_or_else(|| ".hone-cache".into());
    source::Options {
        cache: cache.into(),
        connect_timeout: Duration::from_secs(10),
        read_timeout: Duration::from_secs(60),
        total_timeout: Duration::from_secs(6 * 60 * 60),
        attempts_max: 6,
        file_bytes_max: reader.integer(Section::Hone, "file_bytes_max") as u64,
        ca_file,
    }
}

fn registry_options(reader: &mut Reader, ca_file: Option<PathBuf>) -> registry::Options {
    registry::Options {
        docker_config: reader.text(Section::Hone, "docker_config").map(PathBuf::from),
        ca_file,
        plain_http: reader.boolean(Section::Hone, "plain_http"),
        attempts_max: 6,
        connect_timeout: Duration::from_secs(10),
        read_timeout: Duration::from_secs(60),
    }
}

// --- data and tokens ---

fn dataset_options(reader: &mut Reader) -> dataset::Options {
    let layout = reader.text(Section::Hone, "layout").map(|layout| match layout.as_str() {
        "messages" => Layout::Messages,
        "prompt_completion" => Layout::PromptCompletion,
        _ => Layout::Text,
    });
    let train_share = reader.number(Section::DatasetConfig, "train_test_split");
    if train_share == 0.0 {
        let origin = reader.origin(Section::DatasetConfig, "train_test_split");
        reader.wrong(
            &origin,
            "DatasetConfig.train_test_split: 0 leaves no rows to train on; 1 trains on all of them",
        );
    }
    let answer = reader.text(Section::DatasetConfig, "response_column");
    let text_field_is_given = reader.given(Section::TrainingArguments, "dataset_text_field").is_some();
    let text_field = reader.text(Section::TrainingArguments, "dataset_text_field");
    let text_column = match layout {
        _ if text_field_is_given => text_field,
        Some(Layout::Text) => answer.clone(),
        _ => None,
    };
    dataset::Options {
        layout,
        messages_column: reader.text(Section::DatasetConfig, "messages_column"),
        prompt_column: reader.text(Section::DatasetConfig, "context_column"),
        completion_column: answer,
        text_column,
        shuffle: reader.boolean(Section::DatasetConfig, "shuffle_dataset"),
        seed: reader.integer(Section::DatasetConfig, "shuffle_seed") as u64,
        train_share,
    }
}

fn token_options(reader: &mut Reader) -> TokenOptions {
    let given = reader.given(Section::TrainingArguments, "max_length").map(|given| given.value.clone());
    let tokens_max = reader.integer(Section::TrainingArguments, "max_length") as usize;
    TokenOptions {
        tokens_max: if given == Some(Written::Null) { TOKENS_UNLIMITED } else { tokens_max },
        loss: loss(reader),
        chat_template: chat_template(reader),
    }
}

/// Answers, unless a key says false and none says true.
fn loss(reader: &mut Reader) -> LossOn {
    let keys = ["completion_only_loss", "assistant_only_loss"];
    let said = keys.map(|name| {
        let value = reader.maybe_boolean(Section::TrainingArguments, name);
        (value, reader.origin(Section::TrainingArguments, name))
    });
    let find =
        |wanted| said.iter().find(|(value, _)| *value == Some(wanted)).map(|(_, origin)| origin.clone());
    let (loss, origin) = match (find(true), find(false)) {
        (None, Some(origin)) => (LossOn::Everything, origin),
        (origin, _) => (LossOn::Answers, origin.unwrap_or(Origin::Default)),
    };
    reader.derive("loss on", if loss == LossOn::Answers { "answers" } else { "every token" }, origin);
    loss
}

/// Jinja text: inline when it looks like it, else the text of the file.
fn chat_template(reader: &mut Reader) -> Option<String> {
    let older = reader.text(Section::TrainingArguments, "chat_template_path");
    let mut origin = reader.origin(Section::ModelConfig, "chat_template");
    let text = match reader.text(Section::ModelConfig, "chat_template") {
        Some(text) if text.contains(['{', '}', '\n']) => return Some(text),
        Some(path) => path,
        None => {
            origin = reader.origin(Section::TrainingArguments, "chat_template_path");
            older?
        }
    };
    let read = || {
        use std::io::Read;
        let mut template = String::new();
        std::fs::File::open(&text)?.take(TEMPLATE_BYTES_MAX + 1).read_to_string(&mut template)?;
        Ok::<_, std::io::Error>(template)
    };
    match read() {
        Ok(template) if template.len() as u64 <= TEMPLATE_BYTES_MAX => Some(template),
        Ok(_) => {
            reader.wrong(&origin, format!("chat template {text}: more than {TEMPLATE_BYTES_MAX} bytes"));
            None
        }
        Err(error) => {
            reader.wrong(
                &origin,
                format!("chat template {text}: {error}; expected Jinja text or a file of it"),
            );
            None
        }
    }
}

// --- model ---

fn quantization(reader: &mut Reader) -> Quantization {
    use Section::QuantizationConfig as Q;
    let four = reader.boolean(Q, "load_in_4bit");
    let eight = reader.boolean(Q, "load_in_8bit");
    let code = match reader.text(Q, "bnb_4bit_quant_type").as_deref() {
        Some("nf4") => FourBitCode::Nf4,
        _ => FourBitCode::Fp4,
    };
    let double = reader.boolean(Q, "bnb_4bit_use_double_quant");
    if eight {
        let origin = reader.origin(Q, "load_in_8bit");
        let message = if four {
            "QuantizationConfig: load_in_4bit and load_in_8bit are both true; choose load_in_4bit"
        } else {
            "QuantizationConfig.load_in_8bit: there is no 8-bit base; use load_in_4bit: true, or neither for plain LoRA"
        };
        reader.wrong(&origin, message);
    }
    if four {
        return Quantization::FourBit { code, double };
    }
    for name in ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"] {
        if let Some(given) = reader.given(Q, name) {
            let message = format!(
                "{}: QuantizationConfig.{name} does nothing without load_in_4bit: true",
                given.origin
            );
            reader.warn(message);
        }
    }
    Quantization::None
}

/// A 4-bit base's compute type, then `bf16`/`fp16`, then the model's type, then bf16.
fn precision(reader: &mut Reader, quantization: Quantization) -> Precision {
    use Section::{ModelConfig as M, QuantizationConfig as Q, TrainingArguments as T};
    let compute = reader.text(Q, "bnb_4bit_compute_dtype").filter(|_| quantization != Quantization::None);
    let dtype = reader.text(M, "torch_dtype");
    let bf16 = reader.maybe_boolean(T, "bf16");
    let fp16 = reader.boolean(T, "fp16");
    if fp16 && bf16 == Some(true) {
        let origin = reader.origin(T, "fp16");
        reader.wrong(&origin, "TrainingArguments: bf16 and fp16 are both true; choose one");
    }
    let from = |reader: &Reader, section, name, word: &str| (word.to_string(), reader.origin(section, name));
    let (word, origin) = match (compute, dtype) {
        (Some(word), _) => from(reader, Q, "bnb_4bit_compute_dtype", &word),
        _ if bf16 == Some(true) => from(reader, T, "bf16", "bfloat16"),
        _ if fp16 => from(reader, T, "fp16", "float16"),
        (_, Some(word)) => from(reader, M, "torch_dtype", &word),
        _ if bf16 == Some(false) => from(reader, T, "bf16", "float32"),
        _ => ("bfloat16".into(), Origin::Default),
    };
    if word == "float16" {
        reader
            .warn(format!("{origin}: float16 runs as bfloat16, which is as wide and needs no loss scaling"));
    }
    let precision = if word == "float32" { Precision::F32 } else { Precision::Bf16 };
    reader.derive("precision", if precision == Precision::F32 { "f32" } else { "bf16" }, origin);
    precision
}

fn keep(reader: &mut Reader) -> Keep {
    let given = reader.maybe_boolean(Section::TrainingArguments, "gradient_checkpointing");
    let keep = if given == Some(true) { Keep::LayerInputs } else { Keep::Everything };
    let shown = if keep == Keep::LayerInputs { "layer inputs" } else { "everything" };
    let origin = reader.origin(Section::TrainingArguments, "gradient_checkpointing");
    reader.derive("kept for the backward pass", shown, origin);
    keep
}

fn lora(reader: &mut Reader, seed: u64) -> LoraOptions {
    use Section::LoraConfig as L;
    let layers = reader.integers(L, "layers_to_transform").into_iter().map(|layer| layer as usize).collect();
    let rank_pattern = reader.map(L, "rank_pattern");
    if let Some((pattern, rank)) = rank_pattern.iter().find(|(_, rank)| rank.fract() != 0.0 || *rank < 1.0) {
        let origin = reader.origin(L, "rank_pattern");
        reader.wrong(
            &origin,
            format!("LoraConfig.rank_pattern: {pattern}: expected a whole number from 1, found {rank}"),
        );
    }
    let init = match reader.text(L, "init_lora_weights").as_deref() {
        Some("gaussian") => LoraInit::Gaussian,
        _ => LoraInit::Kaiming,
    };
    LoraOptions {
        r: reader.integer(L, "r") as usize,
        alpha: reader.number(L, "lora_alpha"),
        dropout: reader.number(L, "lora_dropout"),
        rslora: reader.boolean(L, "use_rslora"),
        targets: targets(reader),
        exclude: reader.texts(L, "exclude_modules"),
        layers,
        rank_pattern: rank_pattern.into_iter().map(|(pattern, rank)| (pattern, rank as usize)).collect(),
        alpha_pattern: reader.map(L, "alpha_pattern"),
        init,
        seed,
    }
}

/// A list holds names. One string is `all-linear`, a name (KAITO makes a list of it), or else PEFT's regular
/// expression on the whole path, which a bare name could never match.
fn targets(reader: &mut Reader) -> Targets {
    use Section::LoraConfig as L;
    let origin = reader.origin(L, "target_modules");
    let one = reader.given(L, "target_modules").is_none_or(|given| matches!(given.value, Written::Text(_)));
    let mut names = reader.texts(L, "target_modules");
    let is_name = |text: &str| {
        !text.is_empty()
            && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "_.-".contains(letter))
    };
    if names.is_empty() {
        reader.wrong(
            &origin,
            "LoraConfig.target_modules: an empty list; name modules, or remove the key for all linear layers",
        );
    }
    match names.as_slice() {
        [only] if only == "all-linear" => Targets::AllLinear,
        [only] if one && !is_name(only) => {
            if only.split(',').count() > 1 && only.split(',').all(|part| is_name(part.trim())) {
                let list = only.split(',').map(str::trim).collect::<Vec<_>>().join(", ");
                reader.wrong(
                    &origin,
                    format!("LoraConfig.target_modules: one string with commas; write a list: [{list}]"),
                );
            }
            Targets::Pattern(names.remove(0))
        }
        _ => Targets::Names(names),
    }
}

// --- training ---

fn train_options(reader: &mut Reader, dataset: &dataset::Options, seed: u64) -> train::Options {
    use Section::TrainingArguments as T;
    let optimizer = reader.text(T, "optim").unwrap_or_default();
    if !["adamw_torch", "adamw_torch_fused"].contains(&optimizer.as_str()) {
        reader.warn(format!("TrainingArguments.optim: {optimizer} runs as plain AdamW with 32-bit moments"));
    }
    let logging_steps = reader.integer(T, "logging_steps") as u64;
    let eval_steps = reader.maybe_integer(T, "eval_steps").map_or(logging_steps, |steps| steps as u64);
    let save_steps = reader.integer(T, "save_steps") as u64;
    let max_steps = reader.integer(T, "max_steps");
    let epochs = reader.number(T, "num_train_epochs");
    if max_steps <= 0 && epochs == 0.0 {
        let origin = reader.origin(T, "num_train_epochs");
        reader.wrong(
            &origin,
            "TrainingArguments: num_train_epochs 0 and no max_steps: nothing would be trained",
        );
    }
    let clip = reader.number(T, "max_grad_norm");
    let logging_strategy = reader.text(T, "logging_strategy");
    let save_strategy = reader.text(T, "save_strategy");
    train::Options {
        learning_rate: reader.number(T, "learning_rate"),
        schedule: match reader.text(T, "lr_scheduler_type").as_deref() {
            Some("cosine") => Schedule::Cosine,
            Some("constant") => Schedule::Constant,
            Some("constant_with_warmup") => Schedule::ConstantWithWarmup,
            _ => Schedule::Linear,
        },
        warmup: warmup(reader),
        batch_examples: reader.integer(T, "per_device_train_batch_size") as usize,
        eval_batch_examples: reader.integer(T, "per_device_eval_batch_size") as usize,
        accumulation: reader.integer(T, "gradient_accumulation_steps") as usize,
        epochs,
        steps_max: (max_steps > 0).then_some(max_steps as u64),
        weight_decay: reader.number(T, "weight_decay"),
        beta1: reader.number(T, "adam_beta1"),
        beta2: reader.number(T, "adam_beta2"),
        epsilon: reader.number(T, "adam_epsilon"),
        grad_norm_max: (clip > 0.0).then_some(clip),
        packing: reader.boolean(T, "packing"),
        order_seed: order_seed(reader, dataset, seed),
        seed,
        logging: every(logging_strategy.as_deref(), logging_steps),
        evaluation: evaluation(reader, dataset, eval_steps),
        checkpoint: every(save_strategy.as_deref(), save_steps),
        checkpoints_max: reader.maybe_integer(T, "save_total_limit").map(|count| count as usize),
    }
}

fn every(strategy: Option<&str>, steps: u64) -> Every {
    match strategy {
        Some("steps") => Every::Steps(steps),
        Some("epoch") => Every::Epoch,
        _ => Every::Never,
    }
}

/// Unset: once an epoch, if rows were set aside for it.
fn evaluation(reader: &mut Reader, dataset: &dataset::Options, steps: u64) -> Every {
    let split = dataset.train_share < 1.0;
    let name = "eval_strategy";
    let strategy = reader.text(Section::TrainingArguments, name);
    let origin = reader.origin(Section::TrainingArguments, name);
    let evaluation = match strategy.as_deref() {
        None if split => Every::Epoch,
        Some("steps" | "epoch") if !split => {
            reader.warn(format!("{origin}: TrainingArguments.eval_strategy without rows to evaluate: DatasetConfig.train_test_split is 1"));
            Every::Never
        }
        strategy => every(strategy, steps),
    };
    let shown = match evaluation {
        Every::Never => "never".to_string(),
        Every::Steps(steps) => format!("every {steps} steps"),
        Every::Epoch => "every epoch".to_string(),
    };
    reader.derive("evaluation", shown, origin);
    evaluation
}

/// As transformers reads them: `warmup_ratio` overrides, and a `warmup_steps` below 1 is a share.
fn warmup(reader: &mut Reader) -> Warmup {
    let steps = reader.number(Section::TrainingArguments, "warmup_steps");
    let ratio = reader.maybe_number(Section::TrainingArguments, "warmup_ratio");
    match ratio {
        Some(ratio) => Warmup::Ratio(ratio),
        None if steps > 0.0 && steps < 1.0 => Warmup::Ratio(steps),
        None => Warmup::Steps(steps as u64),
    }
}

fn order_seed(reader: &mut Reader, dataset: &dataset::Options, seed: u64) -> Option<u64> {
    let strategy = reader.text(Section::TrainingArguments, "train_sampling_strategy");
    let data_seed = reader.maybe_integer(Section::TrainingArguments, "data_seed").map(|seed| seed as u64);
    let random = match strategy.as_deref() {
        Some(strategy) => strategy == "random",
        None => dataset.shuffle,
    };
    random.then_some(data_seed.unwrap_or(seed))
}

#[cfg(test)]
mod tests;
