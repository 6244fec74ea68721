//! A Workspace that trains on several nodes -> the further parts of its Job: an index for each pod, a Service that
//! gives the pods names, rules for a set that ends as one, and the variables by which the pods find each other.
//!
//! One pod is one node, and hone starts one rank for each GPU of it. If a rank fails, the ranks of all pods end within
//! about a minute and every pod fails. Kubernetes then creates the pod of each index again, and the set resumes from
//! the checkpoint of pod 0. Failures are counted for each index, because one failure of the set is one of each pod: a
//! limit for the whole Job would be used up by one failure of a large set, and its growing pause (10 s, doubled with
//! each pod that failed) would reach ten minutes after the first. A pod that only stopped because another one was
//! stopped (exit codes 30 and 31) costs nothing, as a pod that is moved costs nothing.

use k8s_openapi::api::batch::v1::{
    JobSpec, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyRule, SuccessPolicy, SuccessPolicyRule,
};
use k8s_openapi::api::core::v1::{
    ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, ObjectFieldSelector, Service, ServicePort,
    ServiceSpec, Volume,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Workspace;
use super::annotations::Options;
use super::marks::{labels, owner};
use crate::fault::Kind;

/// The port on which rank 0 waits for the others. NCCL takes ports of its own.
const PORT: i32 = 29500;
const PORT_NAME: &str = "ranks";
/// Kubernetes' label of a Job's pods with the name of the Job.
const JOB_LABEL: &str = "batch.kubernetes.io/job-name";
/// Kubernetes' label of a Job's pods with the Job's uid: random, the same for all pods of one Job, and another for the
/// next Job of the same name.
const JOB_UID_LABEL: &str = "batch.kubernetes.io/controller-uid";
/// Time that pods wait for each other: nodes may still have to come, and images to be pulled.
const WAIT_SECONDS: u32 = 1800;
/// The secret that the ranks of a run share.
pub(super) const TOKEN_VARIABLE: &str = "HONE_RANKS_TOKEN";
/// Memory that processes of one node share. The container runtime's own has 64 MiB, which NCCL exceeds.
pub(super) const SHARED_MEMORY: &str = "/dev/shm";

/// Returns the number of nodes that a Workspace asks for.
pub fn nodes(workspace: &Workspace) -> i32 {
    workspace.resource.count.unwrap_or(1).max(1)
}

/// Returns whether a Workspace trains on more than one node.
pub fn is_set(workspace: &Workspace) -> bool {
    workspace.tuning.is_some() && nodes(workspace) > 1
}

/// Returns the name of the Service that gives the pods of a set their names.
pub fn service_name(workspace: &Workspace) -> String {
    format!("{}-ranks", workspace.name())
}

/// Returns the headless Service of a set. Pods have their names before they are ready, because they find each other
/// first.
pub fn service(workspace: &Workspace) -> Service {
    Service {
        metadata: ObjectMeta {
            name: Some(service_name(workspace)),
            namespace: workspace.metadata.namespace.clone(),
            labels: Some(labels(workspace)),
            owner_references: owner(workspace).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".into()),
            cluster_ip: Some("None".into()),
            publish_not_ready_addresses: Some(true),
            selector: Some([(JOB_LABEL.to_owned(), workspace.name().to_owned())].into()),
            ports: Some(vec![ServicePort {
                name: Some(PORT_NAME.into()),
                protocol: Some("TCP".into()),
                port: PORT,
                target_port: Some(IntOrString::String(PORT_NAME.into())),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// Returns the Job of a set: a pod for each index, all at once. The set succeeds with pod 0, which writes and pushes
/// the adapter, and it fails with the first pod that failed more often than `retries` allows.
pub(super) fn indexed(workspace: &Workspace, retries: i32, mut spec: JobSpec) -> JobSpec {
    let count = nodes(workspace);
    if let Some(policy) = spec.pod_failure_policy.as_mut() {
        policy.rules.push(stopped_with_the_others(workspace.name()));
    }
    if let Some(pod) = spec.template.spec.as_mut() {
        pod.subdomain = Some(service_name(workspace));
    }
    JobSpec {
        completion_mode: Some("Indexed".into()),
        completions: Some(count),
        parallelism: Some(count),
        backoff_limit: None,
        backoff_limit_per_index: Some(retries),
        max_failed_indexes: Some(0),
        success_policy: Some(SuccessPolicy {
            rules: vec![SuccessPolicyRule {
                succeeded_indexes: Some("0".into()),
                ..SuccessPolicyRule::default()
            }],
        }),
        ..spec
    }
}

/// Returns the rule for the codes of a pod whose own ranks were not stopped, but a rank of another pod was. It uses up
/// no retry.
fn stopped_with_the_others(container: &str) -> PodFailurePolicyRule {
    let stopped = [Kind::Interrupted, Kind::InterruptedUnsaved];
    PodFailurePolicyRule {
        action: "Ignore".into(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(container.into()),
            operator: "In".into(),
            values: stopped.map(|kind| kind.exit_code().into()).into(),
        }),
        ..PodFailurePolicyRule::default()
    }
}

/// Returns the variables by which the pods of a set find each other. The shared secret is the Job's uid: nobody can
/// guess it, a pod of an earlier Job does not have it, and no Secret has to be created or read. Everybody who may read
/// the pods of the namespace can see it; `hone.sh/env` takes a Secret instead.
pub(super) fn environment(workspace: &Workspace) -> Vec<EnvVar> {
    let text = |name: &str, value: String| EnvVar { name: name.into(), value: Some(value), value_from: None };
    let field = ObjectFieldSelector {
        api_version: Some("v1".into()),
        field_path: format!("metadata.labels['{JOB_UID_LABEL}']"),
    };
    let token = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    vec![
        text("HONE_NODES", nodes(workspace).to_string()),
        text("HONE_MASTER_ADDR", format!("{}-0.{}", workspace.name(), service_name(workspace))),
        text("HONE_MASTER_PORT", PORT.to_string()),
        text("HONE_RANKS_WAIT", WAIT_SECONDS.to_string()),
        EnvVar { name: TOKEN_VARIABLE.into(), value: None, value_from: Some(token) },
    ]
}

/// Returns the port of rank 0; every pod of the set has it, because pods differ in their index only.
pub(super) fn port() -> ContainerPort {
    ContainerPort { name: Some(PORT_NAME.into()), container_port: PORT, ..ContainerPort::default() }
}

/// Returns the shared memory for the ranks of a node. Its content counts as memory of the container.
pub(super) fn shared_memory() -> Volume {
    let source = EmptyDirVolumeSource { medium: Some("Memory".into()), size_limit: None };
    Volume { name: "dshm".into(), empty_dir: Some(source), ..Volume::default() }
}

/// Returns the demand of a set on its volumes that cannot be known without the cluster.
pub(super) fn warnings(workspace: &Workspace, options: &Options) -> Vec<String> {
    if !is_set(workspace) {
        return Vec::new();
    }
    let count = nodes(workspace);
    let claims = claims(workspace, options);
    let mut warnings = Vec::new();
    if !claims.is_empty() {
        let (noun, verb) = if claims.len() == 1 { ("claim", "is") } else { ("claims", "are") };
        warnings.push(format!(
            "resource.count is {count}: the {noun} {} {verb} mounted by the pods of {count} nodes at once, which needs the \
             access mode ReadWriteMany (ReadOnlyMany is enough for data); with ReadWriteOnce all pods but one wait for ever",
            claims.join(", ")
        ));
    }
    let output = workspace.tuning.as_ref().and_then(|tuning| tuning.output.as_ref());
    let is_kept = options.work_claim.is_some() || output.is_some_and(|output| output.volume_source.is_some());
    if !is_kept {
        warnings.push(format!(
            "resource.count is {count}: checkpoints are on the disk of pod 0 and are lost with it, and every failure of a \
             node creates all pods anew: set hone.sh/work-claim to a ReadWriteMany claim, so that the set resumes"
        ));
    }
    warnings
}

/// Returns the claims that every pod mounts.
fn claims<'a>(workspace: &'a Workspace, options: &'a Options) -> Vec<&'a str> {
    let tuning = workspace.tuning.as_ref();
    let input = tuning.and_then(|tuning| tuning.input.as_ref()?.volume_source.as_ref());
    let output = tuning.and_then(|tuning| tuning.output.as_ref()?.volume_source.as_ref());
    let sources = [input, output].into_iter().flatten();
    let named = sources.filter_map(|source| source["persistentVolumeClaim"]["claimName"].as_str());
    let mut claims: Vec<&str> = Vec::new();
    for claim in named.chain(options.work_claim.as_deref()).chain(options.cache_claim.as_deref()) {
        if !claims.contains(&claim) {
            claims.push(claim);
        }
    }
    claims
}
