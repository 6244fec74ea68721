//! Flags of the commands that write or watch objects of a cluster: `hone render`, `hone tune`, `hone controller`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::command::{Command, ObjectFormat};
use crate::controller;
use crate::workspace::{Cloud, Settings, tune};

/// Print the Kubernetes objects of a KAITO Workspace: a Job for tuning, or servers for inference
#[derive(Args)]
#[command(after_help = "Examples:\n  hone render -f workspace.yaml | kubectl apply -f -\n  \
    hone render -f workspace.yaml -f my-params.yaml --image registry.example.com/hone:cuda")]
pub(super) struct Render {
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
    /// Format of the output: YAML documents, or a List in JSON
    #[arg(long, value_enum, default_value = "yaml", env = "HONE_FORMAT")]
    format: ObjectFormat,
}

impl Render {
    pub(super) fn command(self) -> Command {
        Command::Render { files: self.files, settings: self.cluster.settings(), format: self.format }
    }
}

/// Print a new Workspace that tunes a preset
#[derive(Args)]
#[command(
    after_help = "Example:\n  hone tune --preset phi-3-mini-4k-instruct --data https://host/rows.parquet \\\n    \
    --push registry.example.com/adapters/support:1 --secret registry-login | kubectl apply -f -\n\
    If no controller watches Workspaces, let hone print the Job:\n  hone tune ... | hone render -f - | kubectl apply -f -"
)]
pub(super) struct Tune {
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
    /// Train LoRA on the base as it is, instead of QLoRA on a 4-bit base
    #[arg(long, env = "HONE_LORA")]
    lora: bool,
    /// ConfigMap with training_config.yaml [default: the default one of LoRA or QLoRA]
    #[arg(long, value_name = "NAME", env = "HONE_CONFIG")]
    config: Option<String>,
    /// Instance type to request and to plan for, such as Standard_NC24ads_A100_v4
    #[arg(long, value_name = "TYPE", env = "HONE_INSTANCE")]
    instance: Option<String>,
    /// Number of nodes that train together; above 1, the named claims must be ReadWriteMany [default: 1]
    #[arg(long, value_name = "NUMBER", env = "HONE_NODES")]
    nodes: Option<i32>,
    /// Label of the nodes that may be used, key=value; may be repeated [default: apps=NAME]
    #[arg(long, value_name = "KEY=VALUE", env = "HONE_LABEL")]
    label: Vec<String>,
    /// An annotation of docs/annotations.md without its prefix, such as work-claim=results; may be repeated
    #[arg(long, value_name = "NAME=VALUE", env = "HONE_ANNOTATE")]
    annotate: Vec<String>,
}

impl Tune {
    pub(super) fn command(self) -> Command {
        Command::Tune(self.options())
    }

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
            nodes: self.nodes,
            labels: self.label,
            annotations: self.annotate,
        }
    }
}

/// Watch KAITO Workspaces, create their Jobs and servers, and report their state
#[derive(Args)]
#[command(after_help = "Installed in a cluster: kubectl apply -f jobs/crd.yaml -f jobs/controller.yaml\n\
    By hand, against the current kubeconfig:\n  hone controller --namespace default --image registry.example.com/hone:cuda")]
pub(super) struct Controller {
    /// Watch only the Workspaces of this namespace [default: all]
    #[arg(short, long, value_name = "NAME", env = "HONE_NAMESPACE")]
    namespace: Option<String>,
    #[command(flatten)]
    cluster: Cluster,
    /// Run as one of several controllers that elect a leader
    #[arg(long, env = "HONE_ELECT")]
    elect: bool,
    /// Namespace of the leader's Lease
    #[arg(long, value_name = "NAME", default_value = "hone-system", env = "HONE_LEASE_NAMESPACE")]
    lease_namespace: String,
    /// Name of this process in the election [default: host name and process number]
    #[arg(long, value_name = "NAME", env = "HONE_IDENTITY")]
    identity: Option<String>,
    /// Address that serves /healthz, /readyz and /metrics
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8080", env = "HONE_ADDRESS")]
    address: SocketAddr,
    /// Validate Workspaces when they are applied, so that kubectl apply shows their mistakes (jobs/webhook)
    #[arg(long, env = "HONE_WEBHOOK")]
    webhook: bool,
    /// Address of the admission webhook, which the API server calls
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:9443", env = "HONE_WEBHOOK_ADDRESS")]
    webhook_address: SocketAddr,
}

impl Controller {
    pub(super) fn command(self) -> Command {
        Command::Controller(self.options())
    }

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

/// The settings of a cluster that runs hone.
#[derive(Args)]
struct Cluster {
    /// Image of hone in the cluster [default: hone:cuda, or hone:cpu with --gpus 0]
    #[arg(long, value_name = "IMAGE", env = "HONE_IMAGE")]
    image: Option<String>,
    /// Number of GPUs of a pod [default: those of the instance type, or else 1]; 0 trains on the CPU
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
