//! A Workspace and its configuration -> the Job, a default ConfigMap if none is named, and a Service if the Job has
//! several nodes.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

use super::annotations::{self, Options};
use super::kind::Workspace;
use super::marks::{labels, owner};
use super::needs;
use super::pod::{Frame, Parts};
use super::request;
use super::several;
use super::templates::{self, Method};
use super::validate;
use super::{REVISION, Settings};
use crate::facts::Quantization;
use crate::fault::{Fault, Kind, Result};
use crate::source;

/// Kubernetes' own default, which KAITO keeps.
const RETRIES: i32 = 6;
const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";

/// The inputs of a Job.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The Workspace.
    pub workspace: &'a Workspace,
    /// `training_config.yaml` of the ConfigMap in force; `None`: there is none, and the method's default is made.
    pub config: Option<&'a str>,
    /// The cluster's settings for hone.
    pub settings: &'a Settings,
    /// The revision of the Workspace's inputs, from 1.
    pub revision: i64,
}

/// The objects that carry out a tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// The default configuration if the Workspace names none and none was given.
    pub config_map: Option<ConfigMap>,
    /// The Service of a Job on several nodes. It is applied before the Job, whose pods look for each other at once.
    pub service: Option<Service>,
    /// The Job to apply.
    pub job: Job,
    /// Warnings; the Job can run all the same.
    pub warnings: Vec<String>,
}

/// Returns the Job of a Workspace that tunes, and its default configuration.
///
/// # Errors
/// Config, Usage: all faults that the pod would report. Capacity: the model cannot be trained on that GPU.
pub fn render(asked: &Asked) -> Result<Rendered> {
    let workspace = asked.workspace;
    let options = annotations::read(workspace)?;
    validate::create(workspace, options.model.is_some())?;
    let method = method(workspace)?;
    let (config, config_map) = config(asked, method)?;
    let gpus = needs::gpus(workspace, &options, asked.settings);
    let run = request::run(workspace, &options, config, gpus.count > 0)?;
    fits_method(method, &run.plan.model.quantization, workspace)?;
    let needs = needs::needs(workspace, &run, gpus, &options)?;
    let frame = Frame { workspace, options: &options, settings: asked.settings, gpus, needs: &needs };
    let parts = Parts { frame, run: &run };
    let job = Job { metadata: metadata(asked, &options), spec: Some(spec(&parts)?), status: None };
    let mut warnings: Vec<String> = run.plan.warnings.iter().chain(&needs.warnings).cloned().collect();
    warnings.extend(several::warnings(workspace, &options));
    let service = several::is_set(workspace).then(|| several::service(workspace));
    Ok(Rendered { config_map, service, job, warnings })
}

/// Returns the hash of a Job's inputs: other inputs need another Job.
pub fn inputs_hash(workspace: &Workspace, config: &str) -> String {
    let inputs = json!({
        "resource": workspace.resource,
        "tuning": workspace.tuning,
        "annotations": annotations::inputs(workspace),
        "config": config,
    });
    source::digest(inputs.to_string().as_bytes())
}

fn method(workspace: &Workspace) -> Result<Method> {
    let name = workspace.tuning.as_ref().map(|tuning| tuning.method.as_str()).unwrap_or_default();
    Method::named(name)
        .ok_or_else(|| Fault::config(format!("tuning.method: expected lora or qlora, found {name:?}")))
}

/// Checks KAITO's rule: the method and the configuration must name the same form of the base (LoRA: unquantised, QLoRA:
/// 4 bits).
fn fits_method(method: Method, quantization: &Quantization, workspace: &Workspace) -> Result<()> {
    let name = templates::config_name(workspace);
    match (method, quantization) {
        (Method::Lora, Quantization::None) => Ok(()),
        (Method::Qlora, Quantization::FourBit { .. } | Quantization::Stored { .. }) => Ok(()),
        (Method::Lora, _) => Err(Fault::config(format!(
            "tuning.method is lora, and ConfigMap {name} has QuantizationConfig.load_in_4bit: true"
        ))
        .help("tune with method: qlora, or remove the QuantizationConfig")),
        (Method::Qlora, Quantization::None) => Err(Fault::config(format!(
            "tuning.method is qlora, and ConfigMap {name} has no QuantizationConfig.load_in_4bit: true"
        ))
        .help("add it (examples/training_config/qlora.yaml has it), or tune with method: lora")),
    }
}

/// Returns the configuration in force, and the ConfigMap with it if it is the default.
fn config<'a>(asked: &Asked<'a>, method: Method) -> Result<(&'a str, Option<ConfigMap>)> {
    let named = asked.workspace.tuning.as_ref().is_some_and(|tuning| !tuning.config.is_empty());
    match asked.config {
        Some(text) => Ok((text, None)),
        None if !named => Ok((
            method.config(),
            Some(templates::config_map(method, asked.workspace.metadata.namespace.clone())),
        )),
        None => Err(Fault::config(format!(
            "tuning.config: there is no ConfigMap {} in namespace {}",
            templates::config_name(asked.workspace),
            asked.workspace.namespace()
        ))
        .help("apply it, or give its file with -f; without tuning.config the method's default is used")),
    }
}

fn metadata(asked: &Asked, options: &Options) -> ObjectMeta {
    let workspace = asked.workspace;
    let mut labels = labels(workspace);
    labels.extend(options.queue_name.clone().map(|queue| (QUEUE_LABEL.to_owned(), queue)));
    ObjectMeta {
        name: Some(workspace.name().into()),
        namespace: workspace.metadata.namespace.clone(),
        labels: Some(labels),
        annotations: Some(BTreeMap::from([(REVISION.into(), asked.revision.to_string())])),
        owner_references: owner(workspace).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

fn spec(parts: &Parts) -> Result<JobSpec> {
    let options = parts.frame.options;
    let mut pod_labels = labels(parts.frame.workspace);
    if options.service_account.is_some() {
        // Azure's webhook gives an identity to pods with this label only; other clouds ignore it.
        pod_labels.insert("azure.workload.identity/use".into(), "true".into());
    }
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(pod_labels), ..ObjectMeta::default() }),
        spec: Some(parts.pod()?),
    };
    let retries = options.retries.unwrap_or(RETRIES);
    let spec = JobSpec {
        backoff_limit: Some(retries),
        pod_failure_policy: Some(failure_policy(parts.frame.workspace.name())),
        active_deadline_seconds: options.deadline_seconds,
        ttl_seconds_after_finished: options.ttl_seconds,
        // Kueue lets it go when its turn comes.
        suspend: options.queue_name.as_ref().map(|_| true),
        template,
        ..JobSpec::default()
    };
    Ok(match several::is_set(parts.frame.workspace) {
        true => several::indexed(parts.frame.workspace, retries, spec),
        false => spec,
    })
}

/// Returns the table of exit codes as a policy of Kubernetes. An evicted pod uses up no retry, a fault that a person
/// must mend ends the Job at once, and everything else is tried again.
fn failure_policy(container: &str) -> PodFailurePolicy {
    let hopeless = Kind::ALL.into_iter().filter(|kind| !kind.retry_helps());
    PodFailurePolicy {
        rules: vec![
            PodFailurePolicyRule {
                action: "Ignore".into(),
                on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
                    type_: "DisruptionTarget".into(),
                    status: "True".into(),
                }]),
                ..PodFailurePolicyRule::default()
            },
            PodFailurePolicyRule {
                action: "FailJob".into(),
                on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
                    container_name: Some(container.into()),
                    operator: "In".into(),
                    values: hopeless.map(|kind| kind.exit_code().into()).collect(),
                }),
                ..PodFailurePolicyRule::default()
            },
        ],
    }
}
