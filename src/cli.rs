//! The command line: flags and their environment variables -> a command. It has no default of the job's keys; those
//! are in the table of keys.

pub mod reference;
mod after;

use crate::bench;
use crate::controller;
use crate::device::Choice;
use crate::facts::{Keep, Precision};
use crate::fault::Fault;
use crate::memory::Limit;
use crate::memory::serving::CacheType;
use crate::review;
use crate::serving;
use crate::spec::keys::{self, Key, Section, Type};
use crate::spec::{Origin, Request, Setting, Written};
use crate::workspace::{Cloud, Settings, tune};
use crate::{evaluate, merge, trial};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A command, and how to report on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Invocation {
    /// How events are shown.
    pub log: Log,
    /// Whether only warnings and errors are shown.
    pub quiet: bool,
    /// The command to run.
    pub command: Command,
    /// Address where a run's metrics are served.
    pub metrics: Option<SocketAddr>,
}

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Fine-tune a model.
    Run(Request),
    /// Serve a model over HTTP.
    Serve {
        /// Settings of the model.
        request: Request,
        /// Settings of the server.
        options: Box<serving::Options>,
    },
    /// Show what hone reads in a model.
    Model {
        /// The model.
        about: AboutModel,
        /// Form of the output.
        format: Format,
    },
    /// Show what `run` would do.
    Plan {
        /// Settings of the job.
        request: Request,
        /// Form of the output.
        format: Format,
        /// GPUs to plan for, in place of this machine.
        gpus: Vec<String>,
        /// Prices of GPUs, `NAME=DOLLARS`.
        prices: Vec<String>,
    },
    /// Show the memory plan of a server.
    PlanServing {
        /// Settings of the model.
        request: Request,
        /// How large the server is to be.
        size: serving::room::Size,
        /// Folders of adapters.
        adapters: Vec<PathBuf>,
        /// Form of the output.
        format: Format,
        /// GPUs to plan for, in place of this machine.
        gpus: Vec<String>,
    },
    /// Show the data as it will be trained on.
    Inspect {
        /// Settings of the job.
        request: Request,
        /// Which rows to show.
        options: review::Options,
        /// Form of the output.
        format: Format,
        /// File for an HTML page.
        html: Option<PathBuf>,
    },
    /// Measure a base without and with an adapter.
    Eval {
        /// Settings of the job.
        request: Request,
        /// What to measure.
        options: evaluate::Options,
        /// Form of the output.
        format: Format,
    },
    /// Ask a base and its tuned model the same.
    Try {
        /// Settings of the job.
        request: Request,
        /// What to ask.
        options: trial::Options,
        /// Form of the output.
        format: Format,
    },
    /// Write a base with adapters as one model.
    Merge {
        /// Settings of the job.
        request: Request,
        /// What to write.
        options: merge::Options,
    },
    /// Make the page of a run, or one that compares several.
    Report {
        /// Folders of results.
        folders: Vec<PathBuf>,
        /// File for the page.
        to: Option<PathBuf>,
    },
    /// Push an adapter as an image.
    Push {
        /// Folder of the adapter.
        folder: PathBuf,
        /// Image to push.
        image: String,
        /// How to reach the registry.
        registry: RegistryArguments,
    },
    /// Pull an adapter's image.
    Pull {
        /// Image to pull.
        image: String,
        /// Folder to write.
        folder: PathBuf,
        /// How to reach the registry.
        registry: RegistryArguments,
    },
    /// Write an example and run it.
    Example {
        /// Folder to write.
        folder: PathBuf,
        /// Whether to write without a run.
        write_only: bool,
    },
    /// Measure the speed of training.
    Bench {
        /// What to measure.
        options: bench::Options,
        /// File for the result as JSON.
        json: Option<PathBuf>,
    },
    /// Print the objects of Workspaces.
    Render {
        /// Files with Workspaces and ConfigMaps.
        files: Vec<PathBuf>,
        /// How the cluster runs hone.
        settings: Settings,
        /// Form of the output.
        format: ObjectFormat,
    },
    /// Print a Workspace.
    Tune(tune::Options),
    /// Run Workspaces in a cluster.
    Controller(controller::Options),
    /// Print the keys whose name or description contains a word.
    Keys {
        /// The word; all keys contain an empty one.
        word: String,
    },
    /// Print the completion script of a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write man pages.
    Man {
        /// Folder to write.
        folder: PathBuf,
    },
}

/// How events are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Log {
    /// Bars on a terminal, JSON lines otherwise
    Auto,
    /// For people: bars, or plain lines if stderr is no terminal
    Terminal,
    /// For machines: one JSON line for each event
    Json,
}

/// Form of a command's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Text for people
    Text,
    /// JSON for programs
    Json,
}

/// Form of Kubernetes objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ObjectFormat {
    /// YAML documents
    Yaml,
    /// A List in JSON
    Json,
}

/// Reads the program's arguments. The error prints itself and knows its exit code (2, or 0 for help).
pub fn parse(
    arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Invocation, clap::Error> {
    let matches = Cli::command().try_get_matches_from(arguments)?;
    let cli = Cli::from_arg_matches(&matches)?;
    let matches = matches.subcommand().map(|(_, matches)| matches).expect("a subcommand is required");
    let mut metrics = None;
    let command = match cli.command {
        Subcommands::Run { job, metrics: address } => {
            metrics = address;
            Command::Run(job.request(matches)?)
        }
        Subcommands::Model { about, format } => Command::Model { about, format },
        Subcommands::Plan { job, serve: Some(model), size, serve_adapter, format, gpu, .. } => {
            let mut request = job.request(matches)?;
            request.settings.retain(|setting| setting.key != "model");
            let written = Written::Text(model);
            request.settings.push(Setting { key: "model".into(), written, origin: origin(matches, "serve") });
            Command::PlanServing { request, size: size.size(), adapters: serve_adapter, format, gpus: gpu }
        }
        Subcommands::Plan { job, format, gpu, price, .. } => {
            Command::Plan { request: job.request(matches)?, format, gpus: gpu, prices: price }
        }
        Subcommands::Inspect { job, format, samples, sample_seed, row, html } => {
            let options = review::Options { samples, seed: sample_seed, rows: row };
            Command::Inspect { request: job.request(matches)?, options, format, html }
        }
        Subcommands::Eval(eval) => {
            let (request, options, format) = eval.read(matches)?;
            Command::Eval { request, options, format }
        }
        Subcommands::Try(attempt) => {
            let (request, options, format) = attempt.read(matches)?;
            Command::Try { request, options, format }
        }
        Subcommands::Merge(merge) => {
            let (request, options) = merge.read(matches)?;
            Command::Merge { request, options }
        }
        Subcommands::Report { folders, to } => Command::Report { folders, to },
        Subcommands::Push { folder, image, registry } => Command::Push { folder, image, registry },
        Subcommands::Pull { image, folder, registry } => Command::Pull { image, folder, registry },
        Subcommands::Example { folder, write_only } => Command::Example { folder, write_only },
        Subcommands::Bench(arguments) => {
            let json = arguments.json.clone();
            Command::Bench { options: arguments.options()?, json }
        }
        Subcommands::Serve(serve) => {
            let request = serve.request(matches)?;
            Command::Serve { request, options: Box::new(serve.options()?) }
        }
        Subcommands::Render { files, cluster, format } => {
            Command::Render { files, settings: cluster.settings(), format }
        }
        Subcommands::Controller(arguments) => Command::Controller(arguments.options()),
        Subcommands::Tune(arguments) => Command::Tune(arguments.options()),
        Subcommands::Keys { word } => Command::Keys { word: word.unwrap_or_default() },
        Subcommands::Completions { shell } => Command::Completions { shell },
        Subcommands::Man { folder } => Command::Man { folder },
    };
    Ok(Invocation { log: cli.log, quiet: cli.quiet, command, metrics })
}

/// The reference of the keys that contain `word`; an error with the nearest key if there is none.
pub fn found_keys(word: &str) -> crate::fault::Result<String> {
    let found = keys::search(word);
    if !found.is_empty() {
        return Ok(found);
    }
    let nearest = keys::nearest(keys::all().iter().map(|key| key.name), word);
    let fault = Fault::usage(format!("no key's name or description contains {word:?}"));
    Err(fault.help(nearest.map_or("`hone keys` prints all".into(), |name| format!("did you mean {name}?"))))
}

/// Ends the process as clap would. URLs of a mistyped line are shown without secrets, because a Job's log is stored.
pub fn exit(error: &clap::Error) -> ! {
    let text = error.to_string();
    if !error.use_stderr() || shown(error) == text {
        error.exit();
    }
    eprint!("{}", shown(error));
    std::process::exit(error.exit_code())
}

/// The message of a command-line error, without the secrets of the addresses in it.
pub fn shown(error: &clap::Error) -> String {
    crate::report::clean::without_secrets(&error.to_string())
}

#[derive(Parser)]
#[command(name = "hone", version, about, max_term_width = 110, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0: done; 2, 10-15: something must be changed first; 20-23, 30, 31: a retry can help.\n\
    Every flag is also an environment variable, and every key of the job can be written in one YAML file."
)]
struct Cli {
    /// How events are shown on stderr
    #[arg(long, value_enum, default_value = "auto", env = "HONE_LOG", global = true, display_order = 100)]
    log: Log,
    /// Only warnings and errors
    #[arg(short, long, env = "HONE_QUIET", global = true, display_order = 101)]
    quiet: bool,
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Fine-tune a model and write the adapter; push it if asked
    #[command(after_help = "Examples:\n  \
        hone run --config tuning.yaml --model ./phi-3 --data https://host/rows.parquet --output ./adapter\n  \
        hone run job.yaml --set LoraConfig.r=16 --set TrainingArguments.learning_rate=2e-4\n  \
        hone run job.yaml --data 'rows/*.parquet' --push registry.example.com/adapters/support:1")]
    Run {
        #[command(flatten)]
        job: Job,
        /// Serve /metrics and /healthz of the run over HTTP: 0.0.0.0:5000
        #[arg(long, value_name = "ADDRESS:PORT", env = "HONE_METRICS")]
        metrics: Option<SocketAddr>,
    },
    /// Show everything that `run` would do, and where each value was set
    #[command(
        after_help = "Example:\n  hone plan job.yaml --format json\n  hone plan job.yaml --gpu l4,a100-80,h100\n  \
            hone plan --serve ./phi-3 --gpu l4 --context 4096"
    )]
    Plan {
        #[command(flatten)]
        job: Job,
        /// Plan the memory of `hone serve MODEL` in place of a training
        #[arg(long, value_name = "MODEL", env = "HONE_SERVE", conflicts_with_all = ["spec", "config"])]
        serve: Option<String>,
        #[command(flatten)]
        size: ServingSize,
        /// Adapter's folder that the server holds; may be repeated
        #[arg(long, value_name = "DIR", env = "HONE_SERVE_ADAPTER", requires = "serve")]
        serve_adapter: Vec<PathBuf>,
        /// A table for people, or JSON
        #[arg(long, value_enum, default_value = "text", env = "HONE_FORMAT")]
        format: Format,
        /// GPUs or instance types to plan for, in place of this machine, with time and cost on each:
        /// l4,a100-80,Standard_NC24ads_A100_v4
        #[arg(long, value_name = "NAMES", env = "HONE_GPU", value_delimiter = ',')]
        gpu: Vec<String>,
        /// Price of one hour of a GPU, in place of the clouds' list price: l4=0.70; may be repeated
        #[arg(long, value_name = "NAME=DOLLARS", env = "HONE_PRICE", value_delimiter = ',')]
        price: Vec<String>,
    },
    /// Show the data as it will be trained on: the learned parts of each row, counts, duplicates, warnings
    #[command(after_help = "Examples:\n  hone inspect job.yaml\n  \
        hone inspect job.yaml --samples 20 --html data.html\n  \
        hone inspect job.yaml --row rows.parquet:17 --format json")]
    Inspect {
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
        /// A row to show instead, named as in messages; may be repeated
        #[arg(long, value_name = "FILE:ROW", env = "HONE_ROW")]
        row: Vec<String>,
        /// Also write an HTML page to this file
        #[arg(long, value_name = "FILE", env = "HONE_HTML")]
        html: Option<PathBuf>,
    },
    /// Show what hone reads in a model: facts, LoRA sites, memory, missing files
    #[command(after_help = "Examples:\n  hone model ./phi-3\n  \
        hone model ./phi-3 --target-modules qkv_proj,o_proj --rank 16 --format json\n  \
        hone model hf://microsoft/phi-4\n  \
        hone model --preset phi-4-mini-instruct")]
    Model {
        #[command(flatten)]
        about: AboutModel,
        /// A table for people, or JSON
        #[arg(long, value_enum, default_value = "text", env = "HONE_FORMAT")]
        format: Format,
    },
    /// Ask the base and the tuned model the same, and show both answers side by side
    #[command(after_help = "Examples:\n  hone try ./adapter\n  \
        hone try ./adapter --prompt 'My order is late.' --max-tokens 64\n  \
        hone try oci://registry.example.com/adapters/support:1 --model ./phi-3 --prompt 'My order is late.'")]
    Try(after::Try),
    /// Measure loss, perplexity, token accuracy and exact match on held-out rows, without the adapter and with it
    #[command(after_help = "Examples:\n  hone eval ./adapter\n  \
        hone eval ./adapter --data test.jsonl --format json\n  \
        hone eval ./adapter:0.7 --adapter ./other:0.3 --split all")]
    Eval(after::Eval),
    /// Add an adapter to its base and write the whole model, as safetensors or GGUF; or the adapter alone as GGUF
    #[command(after_help = "Examples:\n  hone merge ./adapter --to ./merged\n  \
        hone merge ./adapter --to ./gguf --format gguf --type q8_0\n  \
        hone merge ./adapter --to ./lora --format gguf --adapter-only\n  \
        hone merge ./a:0.7 --adapter ./b:0.3 --model ./phi-3 --to ./merged")]
    Merge(after::Merge),
    /// Make the page that explains a run from its folder of results, or one that compares several runs
    #[command(after_help = "Examples:\n  hone report ./adapter\n  \
        hone report ./rank-8 ./rank-16 ./rank-32 --to ranks.html")]
    Report {
        /// Output folders of `hone run`
        #[arg(value_name = "DIR", required = true)]
        folders: Vec<PathBuf>,
        /// File for the page [default: report.html in the one folder, comparison.html here for several]
        #[arg(long, value_name = "FILE", env = "HONE_TO")]
        to: Option<PathBuf>,
    },
    /// Push an adapter's folder as an image
    #[command(after_help = "Examples:\n  hone push ./adapter registry.example.com/adapters/support:1\n  \
        hone push ./adapter oci:./image")]
    Push {
        /// Folder with adapter_config.json and adapter_model.safetensors
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// host/repository:tag, or oci:DIR for a layout on disk
        #[arg(value_name = "IMAGE")]
        image: String,
        #[command(flatten)]
        registry: RegistryArguments,
    },
    /// Pull an adapter's image into a folder
    #[command(after_help = "Example:\n  hone pull registry.example.com/adapters/support:1 ./adapter")]
    Pull {
        /// host/repository:tag, or oci:DIR for a layout on disk
        #[arg(value_name = "IMAGE")]
        image: String,
        /// Folder to write; must not hold another adapter
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        #[command(flatten)]
        registry: RegistryArguments,
    },
    /// Write a tiny model, a dataset and a configuration, and run the whole job on them in seconds
    Example {
        /// New folder for everything: model, data, configuration, adapter, image
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// Only write the files; do not run the job
        #[arg(long, env = "HONE_WRITE_ONLY")]
        write_only: bool,
    },
    /// Measure how fast this machine trains a model or a well-known shape, compared with what the machine can do
    #[command(after_help = "Examples:\n  hone bench --shape phi3-mini --tokens 4096 --json speed.json\n  \
        hone bench --model ./phi-3 --lengths one --tokens 8192")]
    Bench(Bench),
    /// Serve a model with adapters over HTTP: OpenAI's API, KAITO's /chat, and a page to talk to it
    #[command(after_help = "Examples:\n  hone serve ./phi-3 --adapter support=./adapter\n  \
        hone serve hf://microsoft/phi-4 --adapter a=./a --adapter b=oci://registry.example.com/adapters/b:1 \\\n    \
        --mix both=a:0.7,b:0.3 --listen 0.0.0.0:5000")]
    Serve(Serve),
    /// Print the Job (and the default ConfigMap) of a KAITO Workspace that tunes
    #[command(after_help = "Examples:\n  hone render -f workspace.yaml | kubectl apply -f -\n  \
        hone render -f workspace.yaml -f my-params.yaml --image registry.example.com/hone:cuda")]
    Render {
        /// Files with Workspaces and the ConfigMaps they name; - is the standard input; may be repeated
        #[arg(
            short = 'f',
            long = "files",
            value_name = "FILE",
            env = "HONE_FILES",
            value_delimiter = ',',
            required = true
        )]
        files: Vec<PathBuf>,
        #[command(flatten)]
        cluster: Cluster,
        /// YAML, or a JSON List
        #[arg(long, value_enum, default_value = "yaml", env = "HONE_FORMAT")]
        format: ObjectFormat,
    },
    /// Print a new Workspace that tunes a preset
    #[command(
        after_help = "Example:\n  hone tune --preset phi-3-mini-4k-instruct --data https://host/rows.parquet \\\n    \
        --push registry.example.com/adapters/support:1 --secret registry-login | kubectl apply -f -\n\
        If no controller watches Workspaces, let hone print the Job:\n  hone tune ... | hone render -f - | kubectl apply -f -"
    )]
    Tune(Tune),
    /// Watch KAITO Workspaces, create their Jobs and servers, and report their state
    #[command(
        after_help = "Installed in a cluster: kubectl apply -f jobs/crd.yaml -f jobs/controller.yaml\n\
        By hand, against the current kubeconfig:\n  hone controller --namespace default --image registry.example.com/hone:cuda"
    )]
    Controller(ControllerArguments),
    /// Print the configuration keys: all of them, or those whose name or description contains a word
    #[command(after_help = "Examples:\n  hone keys\n  hone keys warmup\n  hone keys LoraConfig")]
    Keys {
        /// A word to search for, in any letter case
        #[arg(value_name = "WORD")]
        word: Option<String>,
    },
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  hone completions bash > /etc/bash_completion.d/hone")]
    Completions {
        /// The shell
        #[arg(value_name = "SHELL", value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write man pages, one for each command, into a folder
    #[command(after_help = "Example:\n  hone man /usr/local/share/man/man1")]
    Man {
        /// Folder for hone.1 and the pages of the commands
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

#[derive(Args)]
struct ControllerArguments {
    /// Watch only the Workspaces of this namespace [default: all]
    #[arg(short, long, value_name = "NAME", env = "HONE_NAMESPACE")]
    namespace: Option<String>,
    #[command(flatten)]
    cluster: Cluster,
    /// Run as one of several controllers, which elect a leader
    #[arg(long, env = "HONE_ELECT")]
    elect: bool,
    /// Namespace of the leader's Lease
    #[arg(long, value_name = "NAME", default_value = "hone-system", env = "HONE_LEASE_NAMESPACE")]
    lease_namespace: String,
    /// Name of this process in the election [default: made of host name and process number]
    #[arg(long, value_name = "NAME", env = "HONE_IDENTITY")]
    identity: Option<String>,
    /// Address that serves /healthz, /readyz and /metrics
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8080", env = "HONE_ADDRESS")]
    address: SocketAddr,
    /// Review Workspaces when they are written, so that kubectl apply tells their mistakes (jobs/webhook)
    #[arg(long, env = "HONE_WEBHOOK")]
    webhook: bool,
    /// Where the API server's reviews are answered
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:9443", env = "HONE_WEBHOOK_ADDRESS")]
    webhook_address: SocketAddr,
}

impl ControllerArguments {
    fn options(self) -> controller::Options {
        let host = || std::env::var("HOSTNAME").unwrap_or_else(|_| "hone".into());
        controller::Options {
            namespace: self.namespace,
            settings: self.cluster.settings(),
            elect: self.elect,
            lease_namespace: self.lease_namespace,
            identity: self.identity.unwrap_or_else(|| format!("{}-{}", host(), std::process::id())),
            address: self.address,
            webhook: self.webhook.then(|| controller::webhook::Options::at(self.webhook_address)),
        }
    }
}

/// How a cluster runs hone.
#[derive(Args)]
struct Cluster {
    /// Image of hone in the cluster [default: hone:cuda, or hone:cpu with --gpus 0]
    #[arg(long, value_name = "IMAGE", env = "HONE_IMAGE")]
    image: Option<String>,
    /// GPUs of a pod [default: those of the instance type, or else 1]; with 0 it trains on the CPU
    #[arg(long, value_name = "GPUS", env = "HONE_GPUS", value_parser = clap::value_parser!(u32).range(0..=64))]
    gpus: Option<u32>,
    /// Cloud of the cluster: azure, aws or other [default: derived from the instance type]
    #[arg(long, value_name = "CLOUD", env = "HONE_CLOUD", value_parser = cloud)]
    cloud: Option<Cloud>,
}

impl Cluster {
    fn settings(self) -> Settings {
        Settings { image: self.image, gpus: self.gpus, cloud: self.cloud }
    }
}

fn cloud(text: &str) -> Result<Cloud, String> {
    Cloud::named(text).ok_or_else(|| "expected azure, aws or other".into())
}

#[derive(Args)]
struct Tune {
    /// Base model, by its name in KAITO's catalogue (`hone model --preset`)
    #[arg(long, value_name = "NAME", env = "HONE_PRESET")]
    preset: String,
    /// Data files to train on: URLs (may be repeated), or one oci://IMAGE or pvc://CLAIM
    #[arg(long, value_name = "URL", env = "HONE_DATA", hide_env_values = true, required = true)]
    data: Vec<String>,
    /// Image to push, or pvc://CLAIM
    #[arg(long, value_name = "IMAGE", env = "HONE_PUSH")]
    push: String,
    /// Secret for the push (type kubernetes.io/dockerconfigjson)
    #[arg(long, value_name = "NAME", env = "HONE_SECRET")]
    secret: Option<String>,
    /// Secret for pulling a data image; may be repeated
    #[arg(long, value_name = "NAME", env = "HONE_PULL_SECRET")]
    pull_secret: Vec<String>,
    /// Secret with a HF_TOKEN that may read a gated model
    #[arg(long, value_name = "NAME", env = "HONE_TOKEN_SECRET")]
    token_secret: Option<String>,
    /// Name of the Workspace [default: tune-PRESET]
    #[arg(long, value_name = "NAME", env = "HONE_NAME")]
    name: Option<String>,
    /// Namespace of the Workspace
    #[arg(short, long, value_name = "NAME", env = "HONE_NAMESPACE")]
    namespace: Option<String>,
    /// Train LoRA over the base as it is, instead of QLoRA over a 4-bit base
    #[arg(long, env = "HONE_LORA")]
    lora: bool,
    /// ConfigMap with training_config.yaml [default: the default one of LoRA or QLoRA]
    #[arg(long, value_name = "NAME", env = "HONE_CONFIG")]
    config: Option<String>,
    /// Instance type to request and to plan for, such as Standard_NC24ads_A100_v4
    #[arg(long, value_name = "TYPE", env = "HONE_INSTANCE")]
    instance: Option<String>,
    /// Label of the nodes that may be used, key=value; may be repeated [default: apps=NAME]
    #[arg(long, value_name = "KEY=VALUE", env = "HONE_LABEL")]
    label: Vec<String>,
    /// An annotation of docs/annotations.md without its prefix, such as work-claim=results; may be repeated
    #[arg(long, value_name = "NAME=VALUE", env = "HONE_ANNOTATE")]
    annotate: Vec<String>,
}

impl Tune {
    fn options(self) -> tune::Options {
        tune::Options {
            preset: self.preset,
            data: self.data,
            push: self.push,
            push_secret: self.secret,
            pull_secrets: self.pull_secret,
            token_secret: self.token_secret,
            name: self.name,
            namespace: self.namespace,
            lora: self.lora,
            config: self.config,
            instance: self.instance,
            labels: self.label,
            annotations: self.annotate,
        }
    }
}

#[derive(Args)]
struct Bench {
    /// Base model: a folder, hf://OWNER/NAME, oci://IMAGE or preset:NAME
    #[arg(long, value_name = "DIR", env = "HONE_MODEL", required_unless_present = "shape")]
    model: Option<PathBuf>,
    /// A well-known shape with random weights, in place of a model: tiny, phi3-mini, llama3.1-8b, qwen2.5-7b, ...
    #[arg(long, value_name = "NAME", env = "HONE_SHAPE", conflicts_with = "model")]
    shape: Option<String>,
    /// Tokens in an optimizer step
    #[arg(long, value_name = "TOKENS", default_value = "4096", env = "HONE_TOKENS", value_parser = positive)]
    tokens: usize,
    /// Lengths of the step's examples: one, mixed (as in instruction data), a number, or a file of numbers
    #[arg(long, value_name = "LENGTHS", default_value = "mixed", env = "HONE_LENGTHS")]
    lengths: String,
    /// Number of steps to measure
    #[arg(long, value_name = "STEPS", default_value = "10", env = "HONE_STEPS", value_parser = positive)]
    steps: usize,
    /// Number of steps before them that are not measured
    #[arg(long, value_name = "STEPS", default_value = "3", env = "HONE_WARMUP", value_parser = positive)]
    warmup: usize,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = "HONE_DEVICE")]
    device: String,
    /// Type to which the inputs of matrix products are rounded: bf16 or f32
    #[arg(long, value_name = "TYPE", default_value = "bf16", env = "HONE_PRECISION", value_parser = ["bf16", "f32"])]
    precision: String,
    /// Keep the base as the checkpoint has it, instead of storing it in 4 bits
    #[arg(long, env = "HONE_UNQUANTIZED")]
    unquantized: bool,
    /// Rank of the adapter, which is on all linear layers
    #[arg(long, value_name = "RANK", default_value = "16", env = "HONE_RANK", value_parser = positive)]
    rank: usize,
    /// How much each layer keeps for the backward pass: auto, everything, ..., host-inputs
    #[arg(long, value_name = "LEVEL", default_value = "auto", env = "HONE_KEEP")]
    keep: String,
    /// Upper limit of the memory to use: 20GiB, bytes, or a share of the free memory
    #[arg(long, value_name = "SIZE", env = "HONE_MEMORY_MAX")]
    memory_max: Option<String>,
    /// Upper limit of the tokens in one pass
    #[arg(long, value_name = "TOKENS", env = "HONE_PASS_TOKENS_MAX", value_parser = positive)]
    pass_tokens_max: Option<usize>,
    /// Also write the result as JSON to this file
    #[arg(long, value_name = "FILE", env = "HONE_JSON")]
    json: Option<PathBuf>,
}

impl Bench {
    fn options(self) -> Result<bench::Options, clap::Error> {
        let wrong = |name: &str, found: &str, expected: &str| {
            let message = format!("--{name} {found:?}: expected {expected}");
            Cli::command().error(clap::error::ErrorKind::ValueValidation, message)
        };
        let keep = match self.keep.as_str() {
            "auto" => None,
            name => Some(Keep::named(name).ok_or_else(|| {
                wrong("keep", name, &format!("auto, {}", Keep::ALL.map(Keep::name).join(", ")))
            })?),
        };
        let limit = |text: String| {
            Limit::parse(&text)
                .ok_or_else(|| wrong("memory-max", &text, "20GiB, bytes or a share from 0 to 1"))
        };
        let device = Choice::parse(&self.device)
            .ok_or_else(|| wrong("device", &self.device, "auto, cpu, cuda or cuda:N"))?;
        Ok(bench::Options {
            base: match (self.shape, self.model) {
                (Some(shape), _) => bench::Base::Shape(shape),
                (None, folder) => bench::Base::Folder(folder.unwrap_or_default()),
            },
            device,
            precision: if self.precision == "f32" { Precision::F32 } else { Precision::Bf16 },
            quantized: !self.unquantized,
            rank: self.rank,
            tokens: self.tokens,
            lengths: self.lengths,
            steps: self.steps,
            warmup: self.warmup,
            keep,
            memory_max: self.memory_max.map(limit).transpose()?,
            pass_tokens_max: self.pass_tokens_max,
        })
    }
}

#[derive(Args)]
struct Serve {
    /// Base model: a folder, hf://OWNER/NAME, oci://IMAGE or preset:NAME
    #[arg(value_name = "MODEL", env = "HONE_MODEL")]
    model: String,
    /// Name of the base in requests [default: derived from MODEL]
    #[arg(long, value_name = "NAME", env = "HONE_NAME")]
    name: Option<String>,
    /// An adapter's name and address: a folder, oci://IMAGE or hf://OWNER/NAME; may be repeated
    #[arg(long, value_name = "NAME=SOURCE", env = "HONE_ADAPTER", value_delimiter = ' ')]
    adapter: Vec<String>,
    /// Name of a weighted sum of adapters, each with its strength; may be repeated
    #[arg(long, value_name = "NAME=A:0.7,B:0.3", env = "HONE_MIX", value_delimiter = ' ')]
    mix: Vec<String>,
    /// Id that answers requests that name no model [default: the only mix, else the base]
    #[arg(long, value_name = "NAME", env = "HONE_DEFAULT")]
    default: Option<String>,
    /// JSON file of adapters and mixes that is followed while the server runs (docs/serving.md)
    #[arg(long, value_name = "FILE", env = "HONE_ADAPTERS_FILE")]
    adapters_file: Option<PathBuf>,
    /// Address and port to listen on
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8000", env = "HONE_LISTEN")]
    listen: SocketAddr,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", env = "HONE_DEVICE")]
    device: Option<String>,
    /// Folder for downloads
    #[arg(long, value_name = "DIR", env = "HONE_CACHE")]
    cache: Option<String>,
    /// How /chat uses a prompt: put into the chat template, or continued as it is
    #[arg(long, value_name = "HOW", default_value = "template", env = "HONE_CHAT", value_parser = ["template", "raw"])]
    chat: String,
    #[command(flatten)]
    size: ServingSize,
    /// Upper limit of the requests that wait; further requests are answered with 429
    #[arg(long, value_name = "COUNT", default_value = "1024", env = "HONE_WAITING", value_parser = positive)]
    waiting: usize,
    /// Allow requests to change adapters and mixes: images, repositories of the hub, and folders below this one
    #[arg(long, value_name = "DIR", env = "HONE_ALLOW_ADAPTER_CHANGES")]
    allow_adapter_changes: Option<PathBuf>,
    /// Key that clients must send as Authorization: Bearer KEY; unlike the flag, the variable is not shown in lists
    /// of processes
    #[arg(long, value_name = "KEY", env = "HONE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Certificate chain (PEM), for HTTPS
    #[arg(long, value_name = "FILE", env = "HONE_TLS_CHAIN", requires = "tls_key")]
    tls_chain: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(long, value_name = "FILE", env = "HONE_TLS_KEY", requires = "tls_chain")]
    tls_key: Option<PathBuf>,
    /// Seconds after SIGTERM in which running answers may finish
    #[arg(long, value_name = "SECONDS", default_value = "25", env = "HONE_GRACE")]
    grace: u32,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Any key: --set QuantizationConfig.load_in_4bit=false; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE", env = "HONE_SET")]
    set: Vec<String>,
}

impl Serve {
    fn request(&self, matches: &ArgMatches) -> Result<Request, clap::Error> {
        let mut settings = settings(matches);
        let variable = matches.value_source("set") == Some(ValueSource::EnvVariable);
        for given in &self.set {
            let all = if variable { assignments(given).collect() } else { vec![given.as_str()] };
            for assignment in all {
                settings.push(setting(assignment, origin(matches, "set"))?);
            }
        }
        Ok(Request { settings, ..Request::default() })
    }

    fn options(self) -> Result<serving::Options, clap::Error> {
        let wrong = |flag: &str, text: &str, expected: &str| {
            let message = format!("--{flag} {text:?}: expected {expected}");
            Cli::command().error(clap::error::ErrorKind::ValueValidation, message)
        };
        let pair = |flag: &str, text: &String, expected: &str| match text.split_once('=') {
            Some((name, rest)) if !name.is_empty() && !rest.is_empty() => {
                Ok((name.to_owned(), rest.to_owned()))
            }
            _ => Err(wrong(flag, text, expected)),
        };
        let part = |text: &str| {
            let (name, strength) = text.split_once(':')?;
            let strength = strength.parse::<f32>().ok().filter(|s| (-16.0..=16.0).contains(s))?;
            Some((name.to_owned(), strength))
        };
        let adapters = self.adapter.iter().map(|text| pair("adapter", text, "NAME=SOURCE"));
        let mut mixes = Vec::new();
        for text in &self.mix {
            const EXPECTED: &str = "NAME=A:STRENGTH,B:STRENGTH, such as both=a:0.7,b:0.3";
            let (name, parts) = pair("mix", text, EXPECTED)?;
            let parts: Option<Vec<_>> = parts.split(',').map(part).collect();
            mixes.push((name, parts.ok_or_else(|| wrong("mix", text, EXPECTED))?));
        }
        Ok(serving::Options {
            adapters: adapters.collect::<Result<_, _>>()?,
            mixes,
            default: self.default,
            adapters_file: self.adapters_file,
            size: self.size.size(),
            waiting: self.waiting,
            raw_chat: self.chat == "raw",
            adapter_folder: self.allow_adapter_changes,
            grace: std::time::Duration::from_secs(self.grace.into()),
            server: crate::server::Options {
                listen: self.listen,
                tls: self.tls_chain.zip(self.tls_key),
                key: self.api_key.filter(|key| !key.is_empty()),
                ..crate::server::Options::default()
            },
        })
    }
}

/// How large a server is to be.
#[derive(Args)]
struct ServingSize {
    /// Most tokens of prompt and answer together [default: the model's, as far as memory allows]
    #[arg(long, value_name = "TOKENS", env = "HONE_CONTEXT", value_parser = positive)]
    context: Option<usize>,
    /// Most sequences that run at once
    #[arg(long, value_name = "COUNT", default_value = "16", env = "HONE_SEQUENCES", value_parser = positive)]
    sequences: usize,
    /// Tokens whose keys and values are kept, over all sequences [default: as memory allows]
    #[arg(long, value_name = "TOKENS", env = "HONE_CACHE_TOKENS", value_parser = positive)]
    cache_tokens: Option<usize>,
    /// How keys and values are kept: bf16 or f32
    #[arg(long, value_name = "TYPE", default_value = "bf16", env = "HONE_CACHE_TYPE", value_parser = CacheType::parse)]
    cache_type: CacheType,
}

impl ServingSize {
    fn size(&self) -> serving::room::Size {
        let (context, cache_tokens) = (self.context, self.cache_tokens);
        serving::room::Size { sequences: self.sequences, context, cache_tokens, cache: self.cache_type }
    }
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "expected a whole number from 1".into())
}

/// The model of `hone model`: a folder or address, or a preset of KAITO's.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct AboutModel {
    /// Folder with config.json, tokenizer.json and *.safetensors; or hf://OWNER/NAME, oci://IMAGE, preset:NAME
    #[arg(value_name = "DIR", required_unless_present = "preset", conflicts_with = "preset")]
    pub folder: Option<PathBuf>,
    /// A preset of KAITO's, by name or hub id: shows where its weights are, its family and its defaults
    #[arg(long, value_name = "NAME", env = "HONE_PRESET")]
    pub preset: Option<String>,
    /// Modules to adapt: names separated by commas, a regular expression, or all-linear
    #[arg(long, value_name = "MODULES", default_value = "all-linear", env = "HONE_TARGET_MODULES")]
    pub target_modules: String,
    /// Rank of the adapter
    #[arg(long, value_name = "R", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..), env = "HONE_RANK")]
    pub rank: u32,
}

/// How `push` and `pull` reach a registry.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct RegistryArguments {
    /// Docker config.json, or its folder, with the registry's credentials
    #[arg(long, value_name = "PATH", env = "HONE_DOCKER_CONFIG")]
    pub docker_config: Option<PathBuf>,
    /// Root certificates (PEM) trusted besides the built-in ones
    #[arg(long, value_name = "FILE", env = "HONE_CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// Connect to the registry without TLS
    #[arg(long, env = "HONE_PLAIN_HTTP")]
    pub plain_http: bool,
}

/// The job: files, then keys. Each flag after the files has the name of a key of hone.
#[derive(Args)]
struct Job {
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
    /// repeated; #sha256=... pins the bytes
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
    /// What happens to rows that cannot be used: refuse (the run ends) or drop (they are left out and counted)
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
    /// What happens to results of another run in that folder: refuse (this run does not start) or move (to earlier/
    /// inside the folder)
    #[arg(long, value_name = "HOW", env = "HONE_EARLIER_RESULTS")]
    earlier_results: Option<String>,
    /// Held-out rows that base and tuned model answer at the end, into answers.json [default: 0]
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
    /// PEFT folder whose weights training starts from
    #[arg(long, value_name = "DIR", env = "HONE_INIT_ADAPTER")]
    init_adapter: Option<String>,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", env = "HONE_DEVICE")]
    device: Option<String>,
    /// How much each layer keeps for the backward pass: auto, everything, ..., host-inputs
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
    /// Folder in which tokens of the data are kept for later runs, or `off`: in memory
    #[arg(long, value_name = "DIR", env = "HONE_TOKEN_CACHE")]
    token_cache: Option<String>,
    /// Largest size of a downloaded data file, in bytes
    #[arg(long, value_name = "BYTES", env = "HONE_FILE_BYTES_MAX")]
    file_bytes_max: Option<String>,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Any key: --set LoraConfig.r=16; may be repeated; in the variable, separated by ; or line breaks
    #[arg(long, value_name = "SECTION.KEY=VALUE", env = "HONE_SET")]
    set: Vec<String>,
}

impl Job {
    /// The request. Settings from the environment come first, so that flags override them.
    fn request(self, matches: &ArgMatches) -> Result<Request, clap::Error> {
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
fn settings(matches: &ArgMatches) -> Vec<Setting> {
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

fn origin(matches: &ArgMatches, key: &str) -> Origin {
    match matches.value_source(key) {
        Some(ValueSource::EnvVariable) => Origin::Environment(format!("HONE_{}", key.to_uppercase())),
        _ => Origin::Flag(format!("--{}", key.replace('_', "-"))),
    }
}

/// The assignments in HONE_SET, which the flag would repeat.
fn assignments(variable: &str) -> impl Iterator<Item = &str> {
    variable.split([';', '\n']).map(str::trim).filter(|part| !part.is_empty())
}

/// Reads `Section.key=value`.
fn setting(assignment: &str, origin: Origin) -> Result<Setting, clap::Error> {
    match assignment.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            Ok(Setting { key: key.trim().into(), written: Written::Yaml(value.into()), origin })
        }
        _ => Err(Cli::command().error(
            clap::error::ErrorKind::ValueValidation,
            format!("--set {assignment:?}: expected Section.key=value, such as LoraConfig.r=16"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn request(arguments: &[&str]) -> Request {
        let arguments = ["hone", "run"].iter().chain(arguments);
        match parse(arguments.copied()).unwrap().command {
            Command::Run(request) => request,
            other => panic!("{other:?}"),
        }
    }

    fn exit_code(arguments: &[&str]) -> i32 {
        parse(["hone"].iter().chain(arguments).copied()).unwrap_err().exit_code()
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
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
    fn every_flag_has_a_variable() {
        for subcommand in Cli::command().get_subcommands() {
            for argument in subcommand.get_arguments().filter(|argument| argument.get_long().is_some()) {
                let id = argument.get_id().as_str();
                let variable = argument.get_env().map(|name| name.to_string_lossy().into_owned());
                assert_eq!(variable, Some(format!("HONE_{}", id.to_uppercase())), "{id}");
            }
        }
    }

    #[test]
    fn usage_errors_exit_with_2_and_help_with_0() {
        assert_eq!(exit_code(&["run", "--no-such-flag"]), 2);
        assert_eq!(exit_code(&["tune"]), 2);
        assert_eq!(exit_code(&["render"]), 2);
        assert_eq!(exit_code(&["push", "only-a-folder"]), 2);
        assert_eq!(exit_code(&["run", "--set", "LoraConfig.r"]), 2);
        assert_eq!(exit_code(&["plan", "--format", "xml"]), 2);
        assert_eq!(exit_code(&["run", "--help"]), 0);
    }

    #[test]
    fn other_commands() {
        let command = |arguments: &[&str]| parse(["hone"].iter().chain(arguments).copied()).unwrap();
        let push = command(&["push", "a", "oci:b", "--plain-http", "-q", "--log", "json"]);
        assert_eq!((push.log, push.quiet), (Log::Json, true));
        let registry = RegistryArguments { plain_http: true, ..RegistryArguments::default() };
        assert_eq!(push.command, Command::Push { folder: "a".into(), image: "oci:b".into(), registry });
        assert!(matches!(
            command(&["plan", "--format", "json"]).command,
            Command::Plan { format: Format::Json, .. }
        ));
        let example = |write_only| Command::Example { folder: "d".into(), write_only };
        assert_eq!(command(&["example", "d"]).command, example(false));
        assert_eq!(command(&["example", "d", "--write-only"]).command, example(true));
    }
}
