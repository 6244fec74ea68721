//! A Workspace that serves -> the StatefulSet of `hone serve`, its adapters, its Services and its disruption budget, or
//! why not.
//!
//! Names, ports, labels and folders are KAITO's (v0.12, `pkg/workspace/inference`). Unlike there, addresses of pods
//! that are not ready are not published, every replica answers, and strengths count for all adapters. Adapters
//! and strengths stand in a ConfigMap that the servers follow (`serving/live.rs`): a change of them is no change of the
//! pod's template, so that no server starts again. Only a new Secret to pull with, or a volume, is one.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapVolumeSource, ContainerPort, EnvVar, HTTPGetAction, Lifecycle, LifecycleHandler,
    LocalObjectReference, PodSpec, PodTemplateSpec, Probe, Service, ServicePort, ServiceSpec, SleepAction,
    Volume, VolumeMount,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};

use super::adapters::{self, TUNED};
use super::annotations::{self, Options};
use super::inference;
use super::kind::{Adapter, Inference, PresetOptions, Workspace};
use super::marks::{labels, owner};
use super::needs::{self, Needs};
use super::pod::{self, Frame, PORT};
use super::{Settings, WORKSPACE_LABEL, validate};
use crate::facts::presets::{self, Preset};
use crate::facts::shapes;
use crate::fault::{Fault, Result};
use crate::fetch;
use crate::memory::card::Card;

/// The folder of mounted adapters, KAITO's.
const ADAPTER_FOLDER: &str = "/mnt/adapter";
/// The folder of the file that servers follow.
const SERVED_FOLDER: &str = "/mnt/served";
/// The entry of the ConfigMap.
pub const ADAPTERS_FILE: &str = "adapters.json";
/// KAITO's annotation for a load balancer of the cloud.
const BALANCER: &str = "kaito.sh/enablelb";
/// LIMIT: time for the download and loading of weights; KAITO waits 30 minutes too.
const START_SECONDS: i32 = 30 * 60;
const PROBE_SECONDS: i32 = 5;
/// Time from the order to end until a pod is killed.
const GRACE_SECONDS: i64 = 60;
/// Time in which every node learns that a pod ends and sends it no more requests.
const FAREWELL_SECONDS: i64 = 5;
/// The part of the grace period that is left when the last answers are cut off.
const REST_SECONDS: i64 = 5;
/// The port on which a server shows the adapters that answer. No Service leads there, and it asks for no key.
pub const STATUS_PORT: i32 = 5001;

/// The objects of a Workspace that serves, in the order of application.
#[derive(Clone, Debug, PartialEq)]
pub struct Served {
    /// The file that servers follow.
    pub adapters: ConfigMap,
    /// The Service of clients, and the headless one.
    pub services: [Service; 2],
    /// The servers.
    pub set: StatefulSet,
    /// The disruption budget, if there are several servers.
    pub budget: Option<PodDisruptionBudget>,
    /// Warnings; the servers can run all the same.
    pub warnings: Vec<String>,
}

/// The images that tuning Workspaces of the same namespace pushed, by the Workspace's name: with digest, or why there
/// is none.
pub type Tuned = BTreeMap<String, std::result::Result<String, String>>;

/// The inputs of the objects.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The Workspace.
    pub workspace: &'a Workspace,
    /// `inference_config.yaml` of the ConfigMap that the Workspace names; `None`: there is none.
    pub config: Option<&'a str>,
    /// The cluster's settings.
    pub settings: &'a Settings,
    /// The images that tuning Workspaces pushed.
    pub tuned: &'a Tuned,
}

/// Renders a Workspace that serves.
///
/// # Errors
/// Config: all mistakes of the Workspace or its configuration, and adapters that a tuning Workspace has not
/// pushed yet. Capacity: weights that no GPU of that type holds.
pub fn serve(asked: &Asked) -> Result<Served> {
    let Asked { workspace, settings, tuned, .. } = *asked;
    let options = annotations::read(workspace)?;
    validate::create(workspace, options.model.is_some())?;
    let inference = workspace.inference.as_ref().ok_or_else(|| Fault::config("inference: missing"))?;
    let gpus = needs::gpus(workspace, &options, settings);
    let name = inference.preset.as_ref().map(|preset| preset.name.as_str()).unwrap_or_default();
    let preset = presets::find(name).ok();
    let mut warnings = needs::doubts(workspace, gpus);
    if gpus.count > 1 {
        warnings.push(format!(
            "{} GPUs are reserved and a server uses one: hone.sh/gpus: \"1\" leaves the others free for more servers \
             (resource.count), a smaller instanceType costs less",
            gpus.count
        ));
    }
    let needs = what_it_needs(workspace, preset, &options, gpus.card)?;
    let config = config(asked, inference)?;
    let mut config = config;
    if config.gpu_memory.is_some() && gpus.count == 0 {
        config.gpu_memory = None;
        config.unused.push("vllm.gpu-memory-utilization: the servers have no GPU".into());
    }
    if !config.unused.is_empty() {
        warnings.push(format!(
            "inference.config {}: not used: {}",
            inference.config,
            config.unused.join("; ")
        ));
    }
    let frame = Frame { workspace, options: &options, settings, gpus, needs: &needs };
    let server = Server { frame, inference, tuned, config };
    let replicas = workspace.resource.count.unwrap_or(1);
    Ok(Served {
        adapters: server.adapters()?,
        services: [server.service(false), server.service(true)],
        set: server.set(replicas)?,
        budget: (replicas > 1).then(|| server.budget()),
        warnings,
    })
}

fn config(asked: &Asked, inference: &Inference) -> Result<inference::Config> {
    let name = &inference.config;
    match asked.config {
        _ if name.is_empty() => Ok(inference::Config::default()),
        Some(text) => inference::read(name, text, !inference.adapters.is_empty()),
        None => Err(Fault::config(format!(
            "inference.config: there is no ConfigMap {name} in namespace {}",
            asked.workspace.namespace()
        ))
        .help("apply it, or give its file with -f; without inference.config hone's own settings are used")),
    }
}

impl Served {
    /// Returns the text of the file that servers follow.
    pub fn adapters_file(&self) -> &str {
        let data = self.adapters.data.as_ref();
        data.and_then(|data| data.get(ADAPTERS_FILE)).map(String::as_str).unwrap_or_default()
    }

    /// Returns all objects as JSON.
    pub fn objects(&self) -> Vec<Value> {
        let object = |value: serde_json::Result<Value>| value.expect("texts and numbers");
        let mut list = vec![object(serde_json::to_value(&self.adapters))];
        list.extend(self.services.iter().map(|service| object(serde_json::to_value(service))));
        list.push(object(serde_json::to_value(&self.set)));
        list.extend(self.budget.iter().map(|budget| object(serde_json::to_value(budget))));
        list
    }
}

/// Returns the host memory, disk and the card's memory, by the catalogue's parameter counts; without them the server
/// itself reports it.
fn what_it_needs(
    workspace: &Workspace,
    preset: Option<&Preset>,
    options: &Options,
    card: Option<Card>,
) -> Result<Needs> {
    const GIB: f64 = (1u64 << 30) as f64;
    /// Memory of the process, its caches of keys and values on a CPU, and adapters.
    const PROCESS_BYTES: f64 = 4.0 * GIB;
    /// Weights of a model without a known shape, in 16 bits.
    const UNKNOWN_BYTES: f64 = 15.0 * GIB;
    let shape = preset.filter(|_| options.model.is_none()).and_then(|preset| preset.shape.as_deref());
    let facts = shape.map(shapes::facts).transpose()?;
    // Linear layers in 4 bits with their scales, embeddings in 16.
    let held = facts.as_ref().map(|facts| {
        let embeddings = (facts.vocab * facts.width) as f64;
        0.6 * (facts.parameters() as f64 - embeddings) + 2.0 * 2.0 * embeddings
    });
    if let (Some(held), Some(card)) = (held, card)
        && held > card.memory_gib * GIB
    {
        return Err(Fault::capacity(format!(
            "resource.instanceType {}: the weights take {:.0} GiB in 4 bits, and {} has {:.0} GiB",
            workspace.resource.instance_type,
            held / GIB,
            card.name,
            card.memory_gib
        ))
        .help("take a larger instance type, or a smaller preset"));
    }
    let weights = facts.as_ref().map_or(UNKNOWN_BYTES, |facts| 2.0 * 1.05 * facts.parameters() as f64);
    let downloads = if options.cache_claim.is_some() { 0.0 } else { weights };
    let on_gpu = card.is_some();
    let host = PROCESS_BYTES + if on_gpu { 0.0 } else { held.unwrap_or(UNKNOWN_BYTES / 2.0) };
    let gibibytes = |bytes: f64| format!("{}Gi", (bytes / GIB).ceil() as u64);
    let text = |asked: &Option<String>, planned: String| asked.clone().unwrap_or(planned);
    Ok(Needs {
        cpu: text(&options.cpu, "2".into()),
        memory: text(&options.memory, gibibytes(host)),
        ephemeral_storage: text(&options.ephemeral_storage, gibibytes(2.0 * GIB + downloads)),
        warnings: Vec::new(),
    })
}

struct Server<'a> {
    frame: Frame<'a>,
    inference: &'a Inference,
    tuned: &'a Tuned,
    config: inference::Config,
}

/// Returns the name of the ConfigMap with the adapters of a Workspace's servers.
pub fn adapters_name(workspace: &Workspace) -> String {
    format!("{}-adapters", workspace.name())
}

impl Server<'_> {
    fn name(&self) -> &str {
        self.frame.workspace.name()
    }

    fn metadata(&self, name: String) -> ObjectMeta {
        ObjectMeta {
            name: Some(name),
            namespace: self.frame.workspace.metadata.namespace.clone(),
            labels: Some(labels(self.frame.workspace)),
            owner_references: owner(self.frame.workspace).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        }
    }

    fn selector(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(WORKSPACE_LABEL.to_owned(), self.name().to_owned())])
    }

    fn set(&self, replicas: i32) -> Result<StatefulSet> {
        Ok(StatefulSet {
            metadata: self.metadata(self.name().into()),
            spec: Some(StatefulSetSpec {
                replicas: Some(replicas),
                service_name: Some(self.headless_name()),
                pod_management_policy: Some("Parallel".into()),
                selector: LabelSelector { match_labels: Some(self.selector()), ..LabelSelector::default() },
                template: PodTemplateSpec {
                    metadata: Some(ObjectMeta {
                        labels: Some(labels(self.frame.workspace)),
                        ..ObjectMeta::default()
                    }),
                    spec: Some(self.pod()?),
                },
                ..StatefulSetSpec::default()
            }),
            ..StatefulSet::default()
        })
    }

    fn headless_name(&self) -> String {
        format!("{}-headless", self.name())
    }

    /// Returns the Service, whose port 80 leads to the server's port. Only pods that are ready are found by either.
    fn service(&self, headless: bool) -> Service {
        let balanced =
            self.frame.workspace.annotation(BALANCER).is_some_and(|text| text.eq_ignore_ascii_case("true"));
        let name = if headless { self.headless_name() } else { self.name().to_owned() };
        Service {
            metadata: self.metadata(name),
            spec: Some(ServiceSpec {
                type_: Some(if balanced && !headless { "LoadBalancer" } else { "ClusterIP" }.into()),
                cluster_ip: headless.then(|| "None".into()),
                selector: Some(self.selector()),
                ports: Some(vec![ServicePort {
                    name: Some("http".into()),
                    protocol: Some("TCP".into()),
                    port: 80,
                    target_port: Some(IntOrString::String("http".into())),
                    ..ServicePort::default()
                }]),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        }
    }

    fn budget(&self) -> PodDisruptionBudget {
        PodDisruptionBudget {
            metadata: self.metadata(self.name().into()),
            spec: Some(PodDisruptionBudgetSpec {
                max_unavailable: Some(IntOrString::Int(1)),
                // A server that is not ready serves nobody, and must not keep a node from being emptied.
                unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
                selector: Some(LabelSelector {
                    match_labels: Some(self.selector()),
                    ..LabelSelector::default()
                }),
                ..PodDisruptionBudgetSpec::default()
            }),
            ..PodDisruptionBudget::default()
        }
    }

    fn pod(&self) -> Result<PodSpec> {
        let probe = |path: &str, failures: i32| Probe {
            http_get: Some(HTTPGetAction {
                path: Some(path.into()),
                port: IntOrString::String("http".into()),
                ..HTTPGetAction::default()
            }),
            period_seconds: Some(PROBE_SECONDS),
            timeout_seconds: Some(PROBE_SECONDS),
            failure_threshold: Some(failures),
            ..Probe::default()
        };
        let secrets = self.docker_secrets();
        let served = Volume {
            name: "served".into(),
            config_map: Some(ConfigMapVolumeSource {
                name: adapters_name(self.frame.workspace),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        };
        let mut mounts = vec![(served, pod::read_only("served", SERVED_FOLDER))];
        mounts.extend(self.adapter_volumes()?);
        mounts.extend(self.frame.volumes(secrets.clone()));
        let (volumes, volume_mounts) = mounts.into_iter().unzip();
        let mut container = self.frame.container();
        container.args = Some(self.arguments()?);
        container.env = Some(self.environment(!secrets.is_empty()));
        let port = |name: &str, container_port: i32| ContainerPort {
            name: Some(name.into()),
            container_port,
            ..ContainerPort::default()
        };
        container.ports = Some(vec![port("http", PORT), port("status", STATUS_PORT)]);
        container.volume_mounts = Some(volume_mounts);
        // The start takes what the weights take; afterwards one that no longer answers is started again, and one that
        // drains gets no more requests.
        container.startup_probe = Some(probe("/health", START_SECONDS / PROBE_SECONDS));
        container.liveness_probe = Some(probe("/health", 6));
        container.readiness_probe = Some(probe("/readyz", 1));
        // Requests that are on their way when the pod begins to end are still answered.
        let sleep = |seconds| LifecycleHandler {
            sleep: Some(SleepAction { seconds }),
            ..LifecycleHandler::default()
        };
        container.lifecycle = Some(self.farewell())
            .filter(|seconds| *seconds > 0)
            .map(|seconds| Lifecycle { pre_stop: Some(sleep(seconds)), ..Lifecycle::default() });
        let named = |name: &String| LocalObjectReference { name: name.clone() };
        let pull: Vec<LocalObjectReference> =
            self.frame.options.image_pull_secrets.iter().map(named).collect();
        Ok(PodSpec {
            containers: vec![container],
            volumes: Some(volumes),
            image_pull_secrets: Some(pull).filter(|list| !list.is_empty()),
            termination_grace_period_seconds: Some(self.grace()),
            ..self.frame.pod()
        })
    }

    fn grace(&self) -> i64 {
        self.frame.options.grace_seconds.unwrap_or(GRACE_SECONDS)
    }

    /// Kubernetes wants it shorter than the grace period.
    fn farewell(&self) -> i64 {
        FAREWELL_SECONDS.min(self.grace() - 1)
    }

    /// Returns the arguments: `serve MODEL --name=... --listen=... --adapters-file=...`.
    fn arguments(&self) -> Result<Vec<String>> {
        let mut arguments = vec!["serve".to_owned(), self.model()?];
        arguments.extend(self.base_name().map(|name| format!("--name={name}")));
        arguments.push(format!("--listen=0.0.0.0:{PORT}"));
        arguments.push(format!("--status=0.0.0.0:{STATUS_PORT}"));
        arguments.push(format!("--adapters-file={SERVED_FOLDER}/{ADAPTERS_FILE}"));
        arguments.push(format!("--grace={}", (self.grace() - self.farewell() - REST_SECONDS).max(1)));
        arguments.extend(self.config.context.map(|tokens| format!("--context={tokens}")));
        arguments.extend(self.config.sequences.map(|count| format!("--sequences={count}")));
        arguments.extend(self.config.gpu_memory.map(|share| format!("--set=memory_max={share}")));
        arguments.extend(self.frame.options.config_overrides.iter().map(|text| format!("--set={text}")));
        Ok(arguments)
    }

    /// Returns the base's id for clients: as the configuration says, else the preset's name, as KAITO's servers have
    /// it.
    fn base_name(&self) -> Option<String> {
        let preset = self.inference.preset.as_ref().map(|preset| preset.name.clone());
        self.config.name.clone().or(preset).filter(|name| !name.is_empty())
    }

    /// Returns the adapters with their sources, and their sum under the Workspace's name, which answers requests that
    /// name no model.
    fn adapters(&self) -> Result<ConfigMap> {
        let mut adapters = Vec::new();
        let mut parts = Vec::new();
        for (place, adapter) in self.inference.adapters.iter().enumerate() {
            let name = adapters::name_of(adapter, place);
            if self.base_name().as_deref() == Some(name.as_str()) {
                return Err(Fault::config(format!(
                    "inference.adapters[{place}].source.name: {name} is the name of the base for clients"
                ))
                .help("give the adapter another name"));
            }
            adapters.push(json!({"name": name, "source": self.source(adapter, place)?}));
            let strength = adapter.strength.as_deref().and_then(|text| text.trim().parse::<f64>().ok());
            parts.push(json!({"name": name, "strength": strength.unwrap_or(1.0)}));
        }
        let taken = |name: &str| {
            let adapters = self.inference.adapters.iter().enumerate();
            self.base_name().as_deref() == Some(name)
                || adapters.into_iter().any(|(place, adapter)| adapters::name_of(adapter, place) == name)
        };
        let mut names = ["", "-mix", "-mix-of-all"].iter().map(|end| format!("{}{end}", self.name()));
        let sum = names.find(|name| !taken(name)).unwrap_or_else(|| "mix.of.all".to_owned());
        let mixes = if parts.is_empty() { Vec::new() } else { vec![json!({"name": sum, "adapters": parts})] };
        let text = serde_json::to_string_pretty(&json!({"adapters": adapters, "mixes": mixes}));
        Ok(ConfigMap {
            metadata: self.metadata(adapters_name(self.frame.workspace)),
            data: Some(BTreeMap::from([(ADAPTERS_FILE.to_owned(), text.expect("texts and numbers") + "\n")])),
            ..ConfigMap::default()
        })
    }

    /// Returns the source of an adapter: an image, the image of a tuning Workspace, or a mounted folder.
    fn source(&self, adapter: &Adapter, place: usize) -> Result<String> {
        let image = adapter.source.as_ref().map(|source| source.image.as_str()).unwrap_or_default();
        if let Some(name) = image.strip_prefix(TUNED) {
            let field = format!("inference.adapters[{place}].source.image");
            return match self.tuned.get(name) {
                Some(Ok(image)) => Ok(format!("oci://{image}")),
                Some(Err(why)) => Err(Fault::config(format!("{field}: {why}"))),
                None => {
                    Err(Fault::config(format!("{field}: there is no Workspace {name} in this namespace"))
                        .help("create it (`hone render`: give its file with another -f), or name an image"))
                }
            };
        }
        Ok(match image {
            "" => format!("{ADAPTER_FOLDER}/{}", adapters::name_of(adapter, place)),
            image => format!("oci://{image}"),
        })
    }

    fn model(&self) -> Result<String> {
        let preset = self.inference.preset.as_ref();
        let image =
            self.preset_options().map(|options| options.image.as_str()).filter(|image| !image.is_empty());
        Ok(match (&self.frame.options.model, image) {
            (Some(address), _) => address.clone(),
            (None, Some(image)) => format!("oci://{image}"),
            _ => {
                let name = preset.map(|preset| preset.name.as_str()).unwrap_or_default();
                fetch::Model::parse(&format!("preset:{name}"))?.to_string()
            }
        })
    }

    fn environment(&self, with_secrets: bool) -> Vec<EnvVar> {
        self.frame.environment(Vec::new(), with_secrets, self.preset_options())
    }

    fn preset_options(&self) -> Option<&PresetOptions> {
        self.inference.preset.as_ref()?.preset_options.as_ref()
    }

    /// Returns the Secrets for pulling adapters and weights.
    fn docker_secrets(&self) -> Vec<(String, String)> {
        let adapters = self.inference.adapters.iter().filter_map(|adapter| adapter.source.as_ref());
        let adapters = adapters.flat_map(|source| &source.image_pull_secrets);
        let model = self.preset_options().into_iter().flat_map(|options| &options.image_pull_secrets);
        let mut secrets: Vec<(String, String)> = Vec::new();
        for secret in adapters.chain(model) {
            if !secrets.iter().any(|(known, _)| known == secret) {
                secrets.push((secret.clone(), format!("config.d/{secret}.json")));
            }
        }
        secrets
    }

    fn adapter_volumes(&self) -> Result<Vec<(Volume, VolumeMount)>> {
        let adapters = self.inference.adapters.iter().enumerate();
        let sources = adapters.filter_map(|(place, adapter)| {
            Some((place, adapter, adapter.source.as_ref()?.volume_source.as_ref()?))
        });
        sources
            .map(|(place, adapter, source)| {
                let volume = format!("adapter-volume-{place}");
                let field = format!("inference.adapters[{place}].source.volumeSource");
                let folder = format!("{ADAPTER_FOLDER}/{}", adapters::name_of(adapter, place));
                Ok((pod::from_source(&volume, source, &field)?, pod::read_only(&volume, &folder)))
            })
            .collect()
    }
}
