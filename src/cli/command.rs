//! A command with its arguments, as the program runs it.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::spec::Request;
use crate::workspace::{Settings, tune};
use crate::{bench, controller, evaluate, merge, review, serving, trial};

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
        /// The data, and the rows of it that are shown.
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
        /// The adapter and the rows that it is measured on.
        options: evaluate::Options,
        /// Form of the output.
        format: Format,
    },
    /// Ask a base and its tuned model the same.
    Try {
        /// Settings of the job.
        request: Request,
        /// The adapter and the prompts that are answered.
        options: trial::Options,
        /// Form of the output.
        format: Format,
    },
    /// Write a base with adapters as one model.
    Merge {
        /// Settings of the job.
        request: Request,
        /// The base, the adapters, and the model that is written.
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
        /// The model and the steps that are timed.
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
    #[arg(id = "lora_rank", long = "rank", value_name = "R", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..), env = "HONE_LORA_RANK")]
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
