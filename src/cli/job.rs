//! Flags of the job's keys, and the commands that take them -> requests.
//!
//! A flag of a key is a field of `Job` with the key's name and a row in the table of keys. Its environment variable is
//! `HONE_` and that name.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use super::command::{Command, Format, RegistryArguments};
use super::size::ServingSize;
use crate::review;
use crate::spec::keys::{self, Key, Section, Type};
use crate::spec::{Origin, Request, Setting, Written};

/// Fine-tune a model and write the adapter; push it if asked
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    hone run --config tuning.yaml --model ./phi-3 --data https://host/rows.parquet --output ./adapter\n  \
    hone run job.yaml --set LoraConfig.r=16 --set TrainingArguments.learning_rate=2e-4\n  \
    hone run job.yaml --data 'rows/*.parquet' --push registry.example.com/adapters/support:1")]
pub(super) struct Run {
    #[command(flatten)]
    job: Job,
    /// Serve /metrics and /healthz of the run over HTTP: 0.0.0.0:5000
    #[arg(long, value_name = "ADDRESS:PORT", env = "HONE_METRICS")]
    pub(super) metrics: Option<SocketAddr>,
}

impl Run {
    pub(super) fn command(self, matches: &ArgMatches) -> Result<Command, String> {
        Ok(Command::Run(self.job.request(matches)?))
    }
}

/// Show everything that `run` would do, and where each value was set
#[derive(Args)]
#[command(
    after_help = "Example:\n  hone plan job.yaml --format json\n  hone plan job.yaml --gpu l4,a100-80,4xl4\n  \
        hone plan job.yaml --preset llama-3.3-70b-instruct --gpu 4xl4\n  \
        hone plan --serve ./phi-3 --gpu l4 --context 4096"
)]
pub(super) struct Plan {
    #[command(flatten)]
    job: Job,
    /// Base model by its name in KAITO's catalogue, as --model preset:NAME does
    #[arg(long, value_name = "NAME", env = "HONE_PRESET", conflicts_with_all = ["model", "serve"])]
    preset: Option<String>,
    /// Plan the memory of `hone serve MODEL` instead of a training
    #[arg(long, value_name = "MODEL", env = "HONE_SERVE", conflicts_with_all = ["spec", "config"])]
    serve: Option<String>,
    #[command(flatten)]
    size: ServingSize,
    /// Folder of an adapter that the server will hold; may be repeated
    #[arg(long, value_name = "DIR", env = "HONE_SERVE_ADAPTER", requires = "serve")]
    serve_adapter: Vec<PathBuf>,
    /// A table for people, or JSON
    #[arg(long, value_enum, default_value = "text", env = "HONE_FORMAT")]
    format: Format,
    /// GPUs or instance types to plan for, in place of this machine, with time and cost on each:
    /// l4,4xl4,Standard_NC24ads_A100_v4
    #[arg(long, value_name = "NAMES", env = "HONE_GPU", value_delimiter = ',')]
    gpu: Vec<String>,
    /// Price of one hour of a GPU, in place of the clouds' list price: l4=0.70; may be repeated
    #[arg(long, value_name = "NAME=DOLLARS", env = "HONE_PRICE", value_delimiter = ',')]
    price: Vec<String>,
}

/// Flags that only plans of servers read, and flags that only plans of trainings read.
const OF_SERVERS: [&str; 4] = ["context", "sequences", "cache_tokens", "cache_type"];
const OF_TRAININGS: [&str; 4] = ["data", "output", "push", "price"];

/// Refuses flags that this kind of plan does not read. Variables of the environment may be there for other commands.
fn refuse_idle_flags(serves: bool, matches: &ArgMatches) -> Result<(), String> {
    let (idle, remedy) = match serves {
        true => (OF_TRAININGS, "has no effect on the plan of a server; remove it, or remove --serve"),
        false => (OF_SERVERS, "has no effect on the plan of a training; add --serve MODEL, or remove it"),
    };
    let is_given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
    match idle.into_iter().find(is_given) {
        Some(id) => Err(format!("--{} {remedy}", id.replace('_', "-"))),
        None => Ok(()),
    }
}

impl Plan {
    pub(super) fn command(self, matches: &ArgMatches) -> Result<Command, String> {
        let Plan { job, preset, serve, size, serve_adapter, format, gpu, price } = self;
        refuse_idle_flags(serve.is_some(), matches)?;
        let mut request = job.request(matches)?;
        if let Some(preset) = preset {
            let written = Written::Text(format!("preset:{preset}"));
            request.settings.retain(|setting| setting.key != "model");
            request.settings.push(Setting {
                key: "model".into(),
                written,
                origin: origin(matches, "preset"),
            });
        }
        let Some(model) = serve else {
            return Ok(Command::Plan { request, format, gpus: gpu, prices: price });
        };
        request.settings.retain(|setting| setting.key != "model");
        let written = Written::Text(model);
        request.settings.push(Setting { key: "model".into(), written, origin: origin(matches, "serve") });
        Ok(Command::PlanServing { request, size: size.size(), adapters: serve_adapter, format, gpus: gpu })
    }
}

/// Show the data as it will be trained on: the learned parts of each row, counts, duplicates, warnings
#[derive(Args)]
#[command(after_help = "Examples:\n  hone inspect job.yaml\n  \
    hone inspect job.yaml --samples 20 --html data.html\n  \
    hone inspect job.yaml --row rows.parquet:17 --format json")]
pub(super) struct Inspect {
    #[command(flatten)]
    job: Job,
    /// Lines for people, or JSON
    #[arg(long, value_enum, default_value = "text", env = "HONE_FORMAT")]
    format: Format,
    /// Number of rows to show, drawn at random from the rows to train on
    #[arg(long, value_name = "ROWS", default_value_t = 3, env = "HONE_SAMPLES")]
    samples: usize,
    /// Seed of the random draw
    #[arg(long, value_name = "SEED", default_value_t = 0, env = "HONE_SAMPLE_SEED")]
    sample_seed: u64,
    /// Row to show instead of random ones, named as in messages; may be repeated
    #[arg(long, value_name = "FILE:ROW", env = "HONE_ROW")]
    row: Vec<String>,
    /// Also write an HTML page to this file
    #[arg(long, value_name = "FILE", env = "HONE_HTML")]
    html: Option<PathBuf>,
}

impl Inspect {
    pub(super) fn command(self, matches: &ArgMatches) -> Result<Command, String> {
        let Inspect { job, format, samples, sample_seed, row, html } = self;
        let options = review::Options { samples, seed: sample_seed, rows: row };
        Ok(Command::Inspect { request: job.request(matches)?, options, format, html })
    }
}

/// The job: files, then keys. Each flag after the files has the name of a key of hone.
#[derive(Args)]
pub(super) struct Job {
    /// YAML with hone's keys and `training_config:`
    #[arg(value_name = "SPEC.yaml", env = "HONE_SPEC")]
    spec: Option<PathBuf>,
    /// KAITO's training_config.yaml, or a ConfigMap that holds it; SPEC.yaml overrides it
    #[arg(long, value_name = "FILE", env = "HONE_CONFIG")]
    config: Option<PathBuf>,
    /// Base model: a folder, hf://OWNER/NAME, hf://OWNER/NAME@REVISION, oci://IMAGE or preset:NAME
    #[arg(long, value_name = "DIR", env = "HONE_MODEL")]
    model: Option<String>,
    /// Name of the base model, for the image's annotation
    #[arg(long, value_name = "NAME", env = "HONE_NAME")]
    name: Option<String>,
    /// Data to train on (parquet, JSON lines, JSON, CSV, Arrow): a URL, file, folder, glob or oci://IMAGE; may be
    /// repeated, and the variable separates several by blanks; #sha256=... pins the bytes
    #[arg(long, value_name = "URL_OR_PATH", env = "HONE_DATA", hide_env_values = true)]
    data: Vec<String>,
    /// Data to evaluate on, in the same forms; no row of it trains; may be repeated
    #[arg(long, value_name = "URL_OR_PATH", env = "HONE_EVALUATION_DATA", hide_env_values = true)]
    evaluation_data: Vec<String>,
    /// Column whose equal values stay on one side of the split into rows to train on and rows to evaluate on
    #[arg(long, value_name = "NAME", env = "HONE_GROUP_COLUMN")]
    group_column: Option<String>,
    /// Layout of the rows: messages, prompt_completion, alpaca, question_answer, tokens or text [default: detected
    /// from the columns]
    #[arg(long, value_name = "LAYOUT", env = "HONE_LAYOUT")]
    layout: Option<String>,
    /// Treatment of rows that cannot be used: refuse (the run ends) or drop (they are left out and counted)
    #[arg(long, value_name = "HOW", env = "HONE_BAD_ROWS")]
    bad_rows: Option<String>,
    /// Largest share of rows that may be dropped
    #[arg(long, value_name = "SHARE", env = "HONE_BAD_ROWS_MAX")]
    bad_rows_max: Option<String>,
    /// Field of a message that names its speaker
    #[arg(long, value_name = "NAME", env = "HONE_ROLE_FIELD")]
    role_field: Option<String>,
    /// Field of a message that holds its text
    #[arg(long, value_name = "NAME", env = "HONE_CONTENT_FIELD")]
    content_field: Option<String>,
    /// More words for the user in a message's role, separated by commas
    #[arg(long, value_name = "WORDS", env = "HONE_USER_NAMES", value_delimiter = ',')]
    user_names: Vec<String>,
    /// More words for the assistant in a message's role, separated by commas
    #[arg(long, value_name = "WORDS", env = "HONE_ASSISTANT_NAMES", value_delimiter = ',')]
    assistant_names: Vec<String>,
    /// Column whose text becomes a row's system message
    #[arg(long, value_name = "NAME", env = "HONE_SYSTEM_COLUMN")]
    system_column: Option<String>,
    /// Column with the tools for a row's chat template
    #[arg(long, value_name = "NAME", env = "HONE_TOOLS_COLUMN")]
    tools_column: Option<String>,
    /// Folder for the adapter [default: TrainingArguments.output_dir]
    #[arg(long, value_name = "DIR", env = "HONE_OUTPUT")]
    output: Option<String>,
    /// Treatment of another run's results in that folder: refuse (this run does not start) or move (to earlier/ inside
    /// the folder)
    #[arg(long, value_name = "HOW", env = "HONE_EARLIER_RESULTS")]
    earlier_results: Option<String>,
    /// Number of held-out rows that base and tuned model answer at the end, written to answers.json [default: 0]
    #[arg(long, value_name = "ROWS", env = "HONE_ANSWERS")]
    answers: Option<String>,
    /// Place that the adapter is sent to when training is done: an image, hf://OWNER/NAME, s3://BUCKET/FOLDER,
    /// file:DIR; may be repeated
    #[arg(long, value_name = "PLACE", env = "HONE_PUSH", value_delimiter = ',')]
    push: Vec<String>,
    /// Meaning of q_proj in a model with a fused qkv_proj: fused (it adapts qkv_proj) or literal (it matches nothing,
    /// as in PEFT)
    #[arg(long, value_name = "HOW", env = "HONE_TARGET_MATCHING")]
    target_matching: Option<String>,
    /// PEFT folder with the adapter that training starts from
    #[arg(long, value_name = "DIR", env = "HONE_INIT_ADAPTER")]
    init_adapter: Option<String>,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", env = "HONE_DEVICE")]
    device: Option<String>,
    /// GPUs to train on, one process for each: all, a number of GPUs, or their numbers, such as 0,2
    #[arg(long, value_name = "GPUS", env = "HONE_GPUS")]
    gpus: Option<String>,
    /// Number of processes that train together on this machine [default: one for each GPU, or one]
    #[arg(long, value_name = "NUMBER", env = "HONE_RANKS")]
    ranks: Option<String>,
    /// Results that each layer keeps for the backward pass: auto, everything, without-gate-up, attention-output,
    /// layer-inputs or host-inputs
    #[arg(long, value_name = "LEVEL", env = "HONE_KEEP")]
    keep: Option<String>,
    /// Upper limit of the memory to use: 20GiB, bytes, or a share of the free memory
    #[arg(long, value_name = "SIZE", env = "HONE_MEMORY_MAX")]
    memory_max: Option<String>,
    /// Upper limit of the tokens in one pass
    #[arg(long, value_name = "TOKENS", env = "HONE_PASS_TOKENS_MAX")]
    pass_tokens_max: Option<String>,
    /// Folder for downloads
    #[arg(long, value_name = "DIR", env = "HONE_CACHE")]
    cache: Option<String>,
    /// Folder that keeps the tokens of the data for later runs, or `off` to hold them in memory
    #[arg(long, value_name = "DIR", env = "HONE_TOKEN_CACHE")]
    token_cache: Option<String>,
    /// Largest size of a downloaded data file, in bytes
    #[arg(long, value_name = "BYTES", env = "HONE_FILE_BYTES_MAX")]
    file_bytes_max: Option<String>,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Set any key: --set LoraConfig.r=16; may be repeated; the variable separates assignments by ; or line breaks
    #[arg(long, value_name = "SECTION.KEY=VALUE", env = "HONE_SET")]
    set: Vec<String>,
}

impl Job {
    /// The request. Settings from the environment come first, so that flags override them.
    pub(super) fn request(self, matches: &ArgMatches) -> Result<Request, String> {
        let mut settings = settings(matches);
        // clap uses the variable only if there is no flag. Here both are used, key by key.
        let variable = std::env::var("HONE_SET").unwrap_or_default();
        for assignment in assignments(&variable) {
            settings.push(setting(assignment, Origin::Environment("HONE_SET".into()))?);
        }
        if let Origin::Flag(_) = origin(matches, "set") {
            for assignment in &self.set {
                settings.push(setting(assignment, origin(matches, "set"))?);
            }
        }
        settings.sort_by_key(|setting| matches!(setting.origin, Origin::Flag(_)));
        Ok(Request { spec: self.spec, config: self.config, settings, ..Request::default() })
    }
}

/// The settings of all flags that have the name of a key of hone. Defaults of clap are not settings.
pub(super) fn settings(matches: &ArgMatches) -> Vec<Setting> {
    keys::all()
        .iter()
        .filter(|key| key.section == Section::Hone)
        .filter_map(|key| of_key(matches, key))
        .collect()
}

fn of_key(matches: &ArgMatches, key: &Key) -> Option<Setting> {
    let given = matches.try_contains_id(key.name).is_ok_and(|given| given);
    if !given || matches.value_source(key.name) == Some(ValueSource::DefaultValue) {
        return None;
    }
    let origin = origin(matches, key.name);
    let mut texts = matches.get_raw(key.name)?.map(|text| text.to_string_lossy().into_owned());
    let written = match (matches.try_get_one::<bool>(key.name), key.kind) {
        (Ok(Some(on)), _) => Written::Text(on.then(|| "true".to_owned())?),
        // Addresses in a variable are separated by blanks.
        (_, Type::Sources) if matches!(origin, Origin::Environment(_)) => {
            let texts: Vec<String> = texts.collect();
            Written::Texts(texts.iter().flat_map(|text| text.split_whitespace()).map(String::from).collect())
        }
        (_, Type::Texts | Type::Sources) => Written::Texts(texts.collect()),
        _ => Written::Text(texts.next_back()?),
    };
    Some(Setting { key: key.name.into(), written, origin })
}

pub(super) fn origin(matches: &ArgMatches, key: &str) -> Origin {
    match matches.value_source(key) {
        Some(ValueSource::EnvVariable) => Origin::Environment(format!("HONE_{}", key.to_uppercase())),
        _ => Origin::Flag(format!("--{}", key.replace('_', "-"))),
    }
}

/// The assignments in HONE_SET, which the flag would repeat.
pub(super) fn assignments(variable: &str) -> impl Iterator<Item = &str> {
    variable.split([';', '\n']).map(str::trim).filter(|part| !part.is_empty())
}

/// Reads `Section.key=value`.
pub(super) fn setting(assignment: &str, origin: Origin) -> Result<Setting, String> {
    match assignment.split_once('=') {
        // A shell variable that is not set leaves nothing behind the `=`. The default must not follow in silence.
        Some((key, value)) if !key.trim().is_empty() && value.trim().is_empty() => Err(format!(
            "--set {assignment:?}: there is no value; for the default of {0} write {0}=null, for an empty text {0}=''",
            key.trim()
        )),
        Some((key, value)) if !key.trim().is_empty() => {
            Ok(Setting { key: key.trim().into(), written: Written::Yaml(value.into()), origin })
        }
        _ => Err(format!("--set {assignment:?}: expected Section.key=value, such as LoraConfig.r=16")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::parse;
    use expect_test::expect;

    fn request(arguments: &[&str]) -> Request {
        let arguments = ["hone", "run"].iter().chain(arguments);
        match parse(arguments.copied()).unwrap().command {
            Command::Run(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_become_settings_of_the_table() {
        let request = request(&[
            "job.yaml",
            "--config",
            "c.yaml",
            "--model",
            "m",
            "--data",
            "a#sha256=ff",
            "--data",
            "*.parquet",
            "--output",
            "o",
            "--push",
            "h/r:t",
            "--target-matching",
            "literal",
            "--init-adapter",
            "i",
            "--device",
            "cuda:1",
            "--layout",
            "text",
            "--cache",
            "k",
            "--name",
            "n",
            "--ca-file",
            "ca.pem",
            "--docker-config",
            "d",
            "--plain-http",
            "--file-bytes-max",
            "9",
            "--set",
            "LoraConfig.r= 16",
        ]);
        assert_eq!((request.spec, request.config), (Some("job.yaml".into()), Some("c.yaml".into())));
        let shown: String = request
            .settings
            .iter()
            .map(|setting| format!("{} {:?} {}\n", setting.key, setting.written, setting.origin))
            .collect();
        expect![[r#"
            model Text("m") --model
            name Text("n") --name
            data Texts(["a#sha256=ff", "*.parquet"]) --data
            layout Text("text") --layout
            output Text("o") --output
            push Texts(["h/r:t"]) --push
            target_matching Text("literal") --target-matching
            init_adapter Text("i") --init-adapter
            device Text("cuda:1") --device
            cache Text("k") --cache
            ca_file Text("ca.pem") --ca-file
            plain_http Text("true") --plain-http
            docker_config Text("d") --docker-config
            file_bytes_max Text("9") --file-bytes-max
            LoraConfig.r Yaml(" 16") --set
        "#]]
        .assert_eq(&shown);
        for setting in &request.settings {
            let (section, name) = match setting.key.split_once('.') {
                Some((section, name)) => (crate::spec::keys::Section::named(section).unwrap(), name),
                None => (crate::spec::keys::Section::Hone, setting.key.as_str()),
            };
            assert!(crate::spec::keys::find(section, name).is_some(), "{}", setting.key);
        }
    }

    #[test]
    fn what_stands_in_one_variable_is_split() {
        let variable = "LoraConfig.r=16; device=cpu\nLoraConfig.target_modules=[a, b];";
        let split: Vec<&str> = assignments(variable).collect();
        assert_eq!(split, ["LoraConfig.r=16", "device=cpu", "LoraConfig.target_modules=[a, b]"]);
        assert_eq!(assignments("").count(), 0);
    }

    #[test]
    fn a_setting_without_a_value_is_no_default() {
        let read = |text: &str| setting(text, Origin::Flag("--set".into()));
        assert_eq!(
            read("LoraConfig.r= ").unwrap_err(),
            "--set \"LoraConfig.r= \": there is no value; for the default of LoraConfig.r write LoraConfig.r=null, \
             for an empty text LoraConfig.r=''"
        );
        assert_eq!(
            read("LoraConfig.r").unwrap_err(),
            "--set \"LoraConfig.r\": expected Section.key=value, such as LoraConfig.r=16"
        );
        for given in ["LoraConfig.r=null", "name=''", "ModelConfig.chat_template={{ a=b }}"] {
            assert!(read(given).is_ok(), "{given}");
        }
    }
}
