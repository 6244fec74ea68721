//! A planned run -> the pod of a tuning Job: one container that downloads, trains and pushes, with its volumes; and the
//! frame that it shares with a pod that serves (`serve.rs`).
//!
//! Names of volumes, tolerations and the folder of the results are KAITO's (v0.12,
//! `pkg/workspace/tuning/preset_tuning.go`). Nothing runs as root, nothing is written outside the volumes, and no token
//! of the cluster is mounted.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    KeyToPath, LocalObjectReference, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, ProjectedVolumeSource,
    ResourceRequirements, SeccompProfile, SecretProjection, SecurityContext, Toleration, Volume, VolumeMount,
    VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::annotations::{Options, secret_variable};
use super::kind::{PresetOptions, Workspace};
use super::needs::{Gpus, Needs};
use super::request::{
    CA_FOLDER, CACHE_FOLDER, CONFIG_FOLDER, DATA_FOLDER, DOCKER_FOLDER, Run, target_modules,
};
use super::several;
use super::templates::config_name;
use super::{Cloud, Settings};
use crate::fault::{Fault, Result};

/// The user of hone's image.
const USER: i64 = 65532;
/// The port of KAITO's endpoint.
pub(super) const PORT: i32 = 5000;
/// Time to end a training. A checkpoint takes seconds; the pass that runs before it a minute or two on a small GPU.
const GRACE_SECONDS: i64 = 300;
/// The key of a Secret of type kubernetes.io/dockerconfigjson.
const DOCKER_KEY: &str = ".dockerconfigjson";
const TOKEN_KEY: &str = "HF_TOKEN";

/// The inputs of a tuning pod.
pub(super) struct Parts<'a> {
    /// The inputs that every pod has.
    pub frame: Frame<'a>,
    /// The command of the container, and its plan.
    pub run: &'a Run,
}

/// The inputs that a tuning pod and a serving pod share.
#[derive(Clone, Copy)]
pub(super) struct Frame<'a> {
    /// The Workspace.
    pub workspace: &'a Workspace,
    /// Options from its annotations.
    pub options: &'a Options,
    /// The cluster's settings for hone.
    pub settings: &'a Settings,
    /// Number of GPUs, and their card.
    pub gpus: Gpus,
    /// Requests of the container.
    pub needs: &'a Needs,
}

impl Parts<'_> {
    /// Returns the pod of a tuning.
    ///
    /// # Errors
    /// Config: a volume source that is none.
    pub fn pod(&self) -> Result<PodSpec> {
        let (volumes, mounts) = self.volumes()?.into_iter().unzip();
        Ok(PodSpec {
            containers: vec![self.container(mounts)],
            volumes: Some(volumes),
            restart_policy: Some("Never".into()),
            termination_grace_period_seconds: Some(self.frame.options.grace_seconds.unwrap_or(GRACE_SECONDS)),
            image_pull_secrets: self.image_pull_secrets(),
            ..self.frame.pod()
        })
    }

    fn container(&self, mounts: Vec<VolumeMount>) -> Container {
        Container {
            args: Some(self.run.arguments.clone()),
            env: Some(self.environment()),
            ports: Some(self.ports()),
            volume_mounts: Some(mounts),
            ..self.frame.container()
        }
    }

    fn ports(&self) -> Vec<ContainerPort> {
        let metrics =
            ContainerPort { name: Some("metrics".into()), container_port: PORT, ..ContainerPort::default() };
        let ranks = several::is_set(self.frame.workspace).then(several::port);
        [metrics].into_iter().chain(ranks).collect()
    }

    fn environment(&self) -> Vec<EnvVar> {
        let mut texts = vec![
            ("HONE_OUTPUT", self.run.plan.output.display().to_string()),
            ("HONE_EARLIER_RESULTS", "move".into()),
            ("HONE_METRICS", format!("0.0.0.0:{PORT}")),
        ];
        texts.extend(target_modules(self.run.preset).map(|names| ("DEFAULT_TARGET_MODULES", names)));
        let mut own: Vec<EnvVar> = texts.into_iter().map(variable).collect();
        if several::is_set(self.frame.workspace) {
            own.extend(several::environment(self.frame.workspace));
        }
        self.frame.environment(own, !self.docker_secrets().is_empty(), self.preset_options())
    }

    /// Returns the volumes, each with its mount.
    fn volumes(&self) -> Result<Vec<(Volume, VolumeMount)>> {
        let tuning = self.frame.workspace.tuning.as_ref().expect("planned before");
        let mut volumes = vec![(
            Volume {
                config_map: Some(ConfigMapVolumeSource {
                    name: config_name(self.frame.workspace),
                    ..ConfigMapVolumeSource::default()
                }),
                ..named("config-volume")
            },
            read_only("config-volume", CONFIG_FOLDER),
        )];
        volumes.push(self.results()?);
        let source = tuning.input.as_ref().and_then(|input| input.volume_source.as_ref());
        if let Some(source) = source {
            let volume = from_source("data-volume", source, "tuning.input.volumeSource")?;
            volumes.push((volume, mount("data-volume", DATA_FOLDER)));
        }
        volumes.extend(self.frame.volumes(self.docker_secrets()));
        if self.frame.gpus.count > 1 || (self.frame.gpus.count > 0 && several::is_set(self.frame.workspace)) {
            volumes.push((several::shared_memory(), mount("dshm", several::SHARED_MEMORY)));
        }
        Ok(volumes)
    }

    /// Returns the user's volume, the claim that keeps checkpoints, or the node's disk; mounted at the output's folder.
    fn results(&self) -> Result<(Volume, VolumeMount)> {
        const NAME: &str = "results-volume";
        let folder = self.run.plan.output.display().to_string();
        let tuning = self.frame.workspace.tuning.as_ref().expect("planned before");
        let source = tuning.output.as_ref().and_then(|output| output.volume_source.as_ref());
        Ok(match (source, &self.frame.options.work_claim) {
            (Some(source), _) => {
                (from_source(NAME, source, "tuning.output.volumeSource")?, mount(NAME, &folder))
            }
            (None, Some(claim)) => {
                // Several Workspaces may share the claim.
                let sub_path = Some(self.frame.workspace.name().to_owned());
                (claimed(NAME, claim), VolumeMount { sub_path, ..mount(NAME, &folder) })
            }
            (None, None) => (empty(NAME), mount(NAME, &folder)),
        })
    }

    /// Returns secrets with docker configurations: the push secret first, which is `config.json`; the others beside it.
    fn docker_secrets(&self) -> Vec<(String, String)> {
        let tuning = self.frame.workspace.tuning.as_ref().expect("planned before");
        let push = tuning.output.as_ref().map(|output| output.image_push_secret.clone());
        let pull = tuning.input.iter().flat_map(|input| &input.image_pull_secrets);
        let model = self.preset_options().into_iter().flat_map(|options| &options.image_pull_secrets);
        let mut secrets: Vec<(String, String)> = push
            .filter(|secret| !secret.is_empty())
            .map(|secret| (secret, "config.json".to_owned()))
            .into_iter()
            .collect();
        for secret in pull.chain(model) {
            if !secrets.iter().any(|(known, _)| known == secret) {
                secrets.push((secret.clone(), format!("config.d/{secret}.json")));
            }
        }
        secrets
    }

    fn preset_options(&self) -> Option<&PresetOptions> {
        self.frame.workspace.tuning.as_ref()?.preset.as_ref()?.preset_options.as_ref()
    }

    /// Returns the push Secret, as KAITO has it, and the Secrets of hone's image.
    fn image_pull_secrets(&self) -> Option<Vec<LocalObjectReference>> {
        let tuning = self.frame.workspace.tuning.as_ref()?;
        let push = tuning.output.iter().map(|output| &output.image_push_secret);
        let mut names: Vec<&String> = push.filter(|name| !name.is_empty()).collect();
        for name in &self.frame.options.image_pull_secrets {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let secrets: Vec<LocalObjectReference> =
            names.into_iter().map(|name| LocalObjectReference { name: name.clone() }).collect();
        Some(secrets).filter(|secrets| !secrets.is_empty())
    }
}

impl Frame<'_> {
    /// Returns a pod without containers, volumes and policy of restarts.
    pub fn pod(&self) -> PodSpec {
        let user = self.options.run_as_user.unwrap_or(USER);
        PodSpec {
            // Identities of clouds are mounted by their own webhooks; hone asks the cluster nothing.
            automount_service_account_token: Some(false),
            service_account_name: self.options.service_account.clone(),
            enable_service_links: Some(false),
            priority_class_name: self.options.priority_class.clone(),
            tolerations: Some(self.tolerations()),
            affinity: self.affinity(),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(user),
                run_as_group: Some(user),
                fs_group: Some(user),
                // A volume with many files is not walked through at every start.
                fs_group_change_policy: Some("OnRootMismatch".into()),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".into(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            ..PodSpec::default()
        }
    }

    /// Returns the container without arguments, environment and mounts.
    pub fn container(&self) -> Container {
        Container {
            name: self.workspace.name().into(),
            image: Some(self.image()),
            image_pull_policy: self.options.image_pull_policy.clone(),
            resources: Some(self.resources()),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            security_context: Some(SecurityContext {
                allow_privilege_escalation: Some(false),
                read_only_root_filesystem: Some(true),
                capabilities: Some(Capabilities {
                    drop: Some(vec!["ALL".into()]),
                    ..Capabilities::default()
                }),
                ..SecurityContext::default()
            }),
            ..Container::default()
        }
    }

    fn image(&self) -> String {
        let default = if self.gpus.count > 0 { "hone:cuda" } else { "hone:cpu" };
        self.options.image.clone().or_else(|| self.settings.image.clone()).unwrap_or_else(|| default.into())
    }

    /// Returns the device. Training has one process for each GPU, and ends if a GPU is missing; a server has one GPU.
    fn device(&self) -> (&'static str, String) {
        match self.gpus.count {
            0 => ("HONE_DEVICE", "cpu".into()),
            count if count > 1 && self.workspace.tuning.is_some() => ("HONE_GPUS", count.to_string()),
            _ => ("HONE_DEVICE", "cuda".into()),
        }
    }

    /// Returns hone's variables, then the model's token. The user's variables come last and replace hone's.
    pub fn environment(
        &self,
        own: Vec<EnvVar>,
        with_secrets: bool,
        preset: Option<&PresetOptions>,
    ) -> Vec<EnvVar> {
        let first = [("HONE_LOG", "json".to_owned()), self.device(), ("HONE_CACHE", CACHE_FOLDER.into())];
        let mut variables: Vec<EnvVar> = first.into_iter().map(variable).chain(own).collect();
        if with_secrets {
            variables.push(variable(("HONE_DOCKER_CONFIG", DOCKER_FOLDER.into())));
        }
        if self.options.ca_config_map.is_some() {
            variables.push(variable(("HONE_CA_FILE", format!("{CA_FOLDER}/ca.crt"))));
        }
        let token = preset.map(|options| options.model_access_secret.clone());
        variables.extend(
            token
                .filter(|secret| !secret.is_empty())
                .map(|secret| secret_variable(TOKEN_KEY.into(), secret, TOKEN_KEY.into())),
        );
        let is_theirs =
            |variable: &EnvVar| self.options.env.iter().any(|theirs| theirs.name == variable.name);
        variables.retain(|variable| !is_theirs(variable));
        variables.extend(self.options.env.iter().cloned());
        variables
    }

    fn resources(&self) -> ResourceRequirements {
        let quantities = |list: Vec<(&str, String)>| -> BTreeMap<String, Quantity> {
            list.into_iter().map(|(name, quantity)| (name.to_owned(), Quantity(quantity))).collect()
        };
        let gpus: Vec<(&str, String)> = match self.gpus.count {
            0 => Vec::new(),
            count => vec![("nvidia.com/gpu", count.to_string())],
        };
        let mut requests = vec![
            ("cpu", self.needs.cpu.clone()),
            ("memory", self.needs.memory.clone()),
            ("ephemeral-storage", self.needs.ephemeral_storage.clone()),
        ];
        requests.extend(gpus.clone());
        ResourceRequirements {
            requests: Some(quantities(requests)),
            limits: Some(quantities(gpus)).filter(|limits| !limits.is_empty()),
            ..ResourceRequirements::default()
        }
    }

    /// Returns the cache, a folder for files in passing, docker configurations and certificates, each with its mount.
    pub fn volumes(&self, secrets: Vec<(String, String)>) -> Vec<(Volume, VolumeMount)> {
        let cache = match &self.options.cache_claim {
            Some(claim) => claimed("cache-volume", claim),
            None => empty("cache-volume"),
        };
        let mut volumes =
            vec![(cache, mount("cache-volume", CACHE_FOLDER)), (empty("tmp"), mount("tmp", "/tmp"))];
        if !secrets.is_empty() {
            volumes.push((docker_config(secrets), read_only("docker-config", DOCKER_FOLDER)));
        }
        if let Some(name) = &self.options.ca_config_map {
            let source = ConfigMapVolumeSource { name: name.clone(), ..ConfigMapVolumeSource::default() };
            volumes.push((Volume { config_map: Some(source), ..named("ca") }, read_only("ca", CA_FOLDER)));
        }
        volumes
    }

    fn tolerations(&self) -> Vec<Toleration> {
        let tolerate = |key: &str, operator: Option<&str>, value: Option<&str>| Toleration {
            key: Some(key.into()),
            operator: operator.map(str::to_owned),
            value: value.map(str::to_owned),
            effect: Some("NoSchedule".into()),
            ..Toleration::default()
        };
        let mut list = vec![tolerate("gpu", Some("Equal"), None), tolerate("sku", None, Some("gpu"))];
        let instance = &self.workspace.resource.instance_type;
        let azure = self.settings.cloud.unwrap_or_else(|| Cloud::of_instance(instance)) == Cloud::Azure;
        if self.options.spot.unwrap_or(azure) {
            list.push(tolerate("kubernetes.azure.com/scalesetpriority", Some("Equal"), Some("spot")));
        }
        list
    }

    /// Returns nodes that have the selector's labels; KAITO looks at matchLabels only.
    fn affinity(&self) -> Option<Affinity> {
        let selector = self.workspace.resource.label_selector.as_ref()?;
        let labels = selector.match_labels.iter().flatten().map(|(key, value)| NodeSelectorRequirement {
            key: key.clone(),
            operator: "In".into(),
            values: Some(vec![value.clone()]),
        });
        let expressions =
            selector.match_expressions.iter().flatten().map(|expression| NodeSelectorRequirement {
                key: expression.key.clone(),
                operator: expression.operator.clone(),
                values: expression.values.clone(),
            });
        let all: Vec<NodeSelectorRequirement> = labels.chain(expressions).collect();
        if all.is_empty() {
            return None;
        }
        let term = NodeSelectorTerm { match_expressions: Some(all), ..NodeSelectorTerm::default() };
        let required = NodeSelector { node_selector_terms: vec![term] };
        let node = NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(required),
            ..NodeAffinity::default()
        };
        Some(Affinity { node_affinity: Some(node), ..Affinity::default() })
    }
}

fn variable((name, value): (&str, String)) -> EnvVar {
    EnvVar { name: name.into(), value: Some(value), value_from: None }
}

pub(super) fn read_only(name: &str, path: &str) -> VolumeMount {
    VolumeMount { read_only: Some(true), ..mount(name, path) }
}

fn named(name: &str) -> Volume {
    Volume { name: name.into(), ..Volume::default() }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount { name: name.into(), mount_path: path.into(), ..VolumeMount::default() }
}

fn empty(name: &str) -> Volume {
    Volume { empty_dir: Some(EmptyDirVolumeSource::default()), ..named(name) }
}

fn claimed(name: &str, claim: &str) -> Volume {
    let source = PersistentVolumeClaimVolumeSource {
        claim_name: claim.into(),
        ..PersistentVolumeClaimVolumeSource::default()
    };
    Volume { persistent_volume_claim: Some(source), ..named(name) }
}

/// Returns the user's volume source under hone's name. The schema accepts any field, so unknown kinds are refused here.
pub(super) fn from_source(name: &str, source: &serde_json::Value, field: &str) -> Result<Volume> {
    let refuse = |why: String| {
        Fault::config(format!("{field}: {why}"))
            .help("give one source of a pod's volume, such as persistentVolumeClaim: {claimName: NAME}")
    };
    let mut written =
        source.as_object().cloned().ok_or_else(|| refuse("expected one source of a volume".into()))?;
    written.insert("name".into(), name.into());
    let volume: Volume =
        serde_json::from_value(written.clone().into()).map_err(|error| refuse(error.to_string()))?;
    let understood = serde_json::to_value(&volume).expect("texts and numbers");
    let kinds: Vec<&String> = written.keys().filter(|key| *key != "name").collect();
    let claim = volume.persistent_volume_claim.as_ref();
    if claim.is_some_and(|claim| claim.claim_name.is_empty()) {
        return Err(refuse("persistentVolumeClaim.claimName is missing".into()));
    }
    /// Kubernetes' kinds of a path of the node.
    const HOST_PATHS: [&str; 8] =
        ["", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];
    let path = volume.host_path.as_ref().and_then(|path| path.type_.as_deref());
    if let Some(other) = path.filter(|kind| !HOST_PATHS.contains(kind)) {
        return Err(refuse(format!(
            "hostPath.type: expected one of {}, found {other:?}",
            HOST_PATHS[1..].join(", ")
        )));
    }
    match kinds.as_slice() {
        [kind] if understood.get(kind.as_str()).is_some() => Ok(volume),
        [kind] => Err(refuse(format!("{kind} is not a kind of volume"))),
        [] => Err(refuse("it is empty".into())),
        _ => Err(refuse(format!("it has {} kinds at once", kinds.len()))),
    }
}

fn docker_config(secrets: Vec<(String, String)>) -> Volume {
    let projection = |(secret, path): (String, String)| VolumeProjection {
        secret: Some(SecretProjection {
            name: secret,
            items: Some(vec![KeyToPath { key: DOCKER_KEY.into(), path, mode: None }]),
            optional: None,
        }),
        ..VolumeProjection::default()
    };
    let source = ProjectedVolumeSource {
        // For the pod's group.
        default_mode: Some(0o440),
        sources: Some(secrets.into_iter().map(projection).collect()),
    };
    Volume { projected: Some(source), ..named("docker-config") }
}
