//! A StatefulSet and its pods -> the state of the servers -> the status of their Workspace.
//!
//! Conditions, states and reasons are KAITO's (v0.12, `updateInferenceStatus`); `AdaptersReady` is hone's own.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::ask::Adapters;
use super::ended::Ended;
use super::status::{self, Conditions, Nodes};
use super::words::plain;
use crate::workspace::kind::{Status, Workspace};

/// The condition of the adapters.
pub const ADAPTERS_READY: &str = "AdaptersReady";
/// LIMIT: bytes of a condition's message.
const MESSAGE_BYTES_MAX: usize = 1024;

/// The state of the servers, as the cluster reports it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Serving {
    /// Number of servers in the Workspace's `resource.count`.
    pub wanted: i32,
    /// Number of servers that are ready.
    pub ready: i32,
    /// KAITO's reason and message if a server is not ready.
    pub trouble: Option<(&'static str, String)>,
    /// The reason why the current Workspace is not applied.
    pub refused: Option<String>,
}

impl Serving {
    /// Returns whether all servers answer.
    pub fn is_ready(&self) -> bool {
        self.wanted > 0 && self.ready >= self.wanted
    }
}

/// Returns the state of the servers from the StatefulSet's counts and the pods. Pure.
pub fn observe(set: Option<&StatefulSet>, pods: &[Arc<Pod>], refused: Option<String>) -> Serving {
    let wanted = set.and_then(|set| set.spec.as_ref()?.replicas).unwrap_or(1);
    let status = set.and_then(|set| set.status.as_ref());
    // The counts may include pods of an older template.
    let settled = status.is_some_and(|status| {
        status.observed_generation >= set.and_then(|set| set.metadata.generation)
            && status.update_revision == status.current_revision
    });
    let ready = status.and_then(|status| status.ready_replicas).unwrap_or(0);
    let ready = if settled { ready } else { ready.min(wanted - 1) };
    let trouble = if ready >= wanted { None } else { pods.iter().find_map(|pod| trouble(pod)) };
    Serving { wanted, ready, trouble, refused }
}

/// Returns the first of KAITO's reasons that holds.
fn trouble(pod: &Pod) -> Option<(&'static str, String)> {
    let status = pod.status.as_ref()?;
    let containers: Vec<&ContainerStatus> = status.container_statuses.iter().flatten().collect();
    let last = |container: &&ContainerStatus| {
        let ended =
            |state: &Option<k8s_openapi::api::core::v1::ContainerState>| state.as_ref()?.terminated.clone();
        ended(&container.state).or_else(|| ended(&container.last_state))
    };
    let terminated = containers.iter().find_map(last);
    let told = terminated.as_ref().map(|state| Ended::of(state).told()).unwrap_or_default();
    if terminated.as_ref().is_some_and(|state| state.reason.as_deref() == Some("OOMKilled")) {
        return Some(("ContainerOOMKilled", told));
    }
    let waiting = containers.iter().find_map(|container| container.state.as_ref()?.waiting.clone());
    if let Some(waiting) = waiting {
        let why = waiting.reason.unwrap_or_default();
        let message = waiting.message.unwrap_or_default();
        let line = if message.is_empty() { why.clone() } else { format!("{why}: {message}") };
        match why.as_str() {
            "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
                return Some(("ImagePullError", line));
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
                return Some(("ContainerStartError", line));
            }
            "CrashLoopBackOff" if !told.is_empty() => return Some(("ContainerCrashLoopBackOff", told)),
            "CrashLoopBackOff" => return Some(("ContainerCrashLoopBackOff", line)),
            _ => {}
        }
    }
    if status.reason.as_deref() == Some("Evicted") {
        return Some(("PodEvicted", status.message.clone().unwrap_or_default()));
    }
    let conditions = status.conditions.iter().flatten();
    let unscheduled = conditions
        .into_iter()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    unscheduled.map(|condition| ("Unschedulable", condition.message.clone().unwrap_or_default()))
}

/// Returns the status of a Workspace that serves. Pure.
pub fn tell(
    workspace: &Workspace,
    serving: &Serving,
    placed: &[String],
    nodes: &Nodes,
    workers: Vec<String>,
    now: Timestamp,
) -> Status {
    let mut status = workspace.status.clone().unwrap_or_default();
    let mut conditions =
        Conditions::of(std::mem::take(&mut status.conditions), workspace.metadata.generation, now);
    conditions.remove("JobStarted");
    status::nodes(&mut conditions, placed, 0, nodes, false);
    let ready = serving.is_ready();
    let (reason, mut words) = match (&serving.trouble, &serving.refused) {
        _ if ready => {
            ("WorkspaceInferenceStatusSuccess", "Inference has been deployed successfully".to_owned())
        }
        (Some((reason, words)), _) => (*reason, words.clone()),
        (None, Some(_)) => ("WorkspaceInferenceStatusFailed", "Inference workload is not ready".into()),
        (None, None) => (
            "WorkspaceInferenceStatusPending",
            format!("Inference workload is not ready: {} of {} servers are", serving.ready, serving.wanted),
        ),
    };
    if let Some(why) = &serving.refused {
        words += &format!("; the Workspace is not applied: {why}");
    }
    let words = plain(&words, MESSAGE_BYTES_MAX);
    conditions.set("InferenceReady", ready, reason, words.clone());
    let succeeded = if ready { "workspaceSucceeded" } else { "workspacePending" };
    for type_ in ["WorkspaceSucceeded", "WorkspaceReady"] {
        conditions.set(type_, ready, succeeded, words.clone());
    }
    status.conditions = conditions.list;
    let before = status.state.as_deref();
    status.state = Some(
        match (ready, before) {
            (true, _) => "Ready",
            (false, Some("Ready" | "NotReady")) => "NotReady",
            (false, _) => "Pending",
        }
        .into(),
    );
    status.worker_nodes = workers;
    status.target_node_count = Some(serving.wanted);
    status
}

/// Returns the status with the condition of the adapters. Pure.
pub fn with_adapters(
    workspace: &Workspace,
    mut status: Status,
    adapters: Option<&Adapters>,
    now: Timestamp,
) -> Status {
    let mut conditions = Conditions::of(status.conditions, workspace.metadata.generation, now);
    let mut set = |ready, reason: &str, words: &str| {
        conditions.set(ADAPTERS_READY, ready, reason, plain(words, MESSAGE_BYTES_MAX));
    };
    match adapters {
        None => {}
        Some(Adapters::None) => conditions.remove(ADAPTERS_READY),
        Some(Adapters::Answer(parts)) => set(true, "AdaptersAnswer", &parts.join(", ")),
        Some(Adapters::Pending(why)) => set(false, "AdaptersPending", why),
        Some(Adapters::Refused(why)) => {
            set(false, "AdaptersRefused", &format!("{why}; the servers keep the earlier adapters"))
        }
    }
    status.conditions = conditions.list;
    status
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: Value) -> Arc<Pod> {
        Arc::new(serde_json::from_value(json!({"status": status})).unwrap())
    }

    /// Returns the status of a pod with one container.
    pub fn container(state: Value, last: Value) -> Value {
        json!({"containerStatuses": [{
            "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 1, "state": state, "lastState": last,
        }]})
    }

    /// Returns a StatefulSet of two servers.
    pub fn set(ready: i32, settled: bool) -> StatefulSet {
        serde_json::from_value(json!({
            "metadata": {"generation": 2},
            "spec": {"replicas": 2, "serviceName": "a", "selector": {}, "template": {}},
            "status": {
                "observedGeneration": 2, "replicas": 2, "readyReplicas": ready, "currentRevision": "a",
                "updateRevision": if settled { "a" } else { "b" },
            },
        }))
        .unwrap()
    }

    /// KAITO's table of reasons.
    #[test]
    fn why_it_does_not_answer() {
        let why = |status: Value| {
            observe(Some(&set(0, true)), &[pod(status)], None).trouble.map(|(reason, _)| reason)
        };
        let ended = json!({"terminated": {"exitCode": 12, "reason": "Error"}});
        assert_eq!(
            why(container(json!({"waiting": {"reason": "ImagePullBackOff"}}), json!({}))),
            Some("ImagePullError")
        );
        assert_eq!(
            why(container(json!({"waiting": {"reason": "CreateContainerConfigError"}}), json!({}))),
            Some("ContainerStartError")
        );
        let crash = container(json!({"waiting": {"reason": "CrashLoopBackOff"}}), ended);
        let told = observe(Some(&set(0, true)), &[pod(crash)], None).trouble.unwrap();
        assert_eq!(told, ("ContainerCrashLoopBackOff", "exit code 12 (model)".to_owned()));
        let oom = json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}});
        assert_eq!(
            why(container(json!({"waiting": {"reason": "CrashLoopBackOff"}}), oom)),
            Some("ContainerOOMKilled")
        );
        assert_eq!(why(json!({"reason": "Evicted", "message": "disk"})), Some("PodEvicted"));
        let unscheduled =
            json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]});
        assert_eq!(why(unscheduled), Some("Unschedulable"));
        assert_eq!(why(container(json!({"running": {}}), json!({}))), None);
    }

    #[test]
    fn states_are_kaitos() {
        let mut workspace = Workspace::default();
        let second = |second| Timestamp::from_second(second).unwrap();
        let mut state = |serving: &Serving| {
            let status = tell(&workspace, serving, &[], &Nodes::default(), Vec::new(), second(1));
            workspace.status = Some(status.clone());
            let shown = |type_: &str| {
                let condition = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
                format!("{} {}", condition.status, condition.reason)
            };
            (status.state.clone().unwrap(), shown("InferenceReady"), shown("WorkspaceSucceeded"))
        };
        let expect = |state: &str, ready: &str, succeeded: &str| {
            (state.to_owned(), ready.to_owned(), succeeded.to_owned())
        };
        let of = |ready, settled| observe(Some(&set(ready, settled)), &[], None);
        assert_eq!(
            state(&of(0, true)),
            expect("Pending", "False WorkspaceInferenceStatusPending", "False workspacePending")
        );
        assert_eq!(
            state(&of(2, true)),
            expect("Ready", "True WorkspaceInferenceStatusSuccess", "True workspaceSucceeded")
        );
        assert_eq!(state(&of(1, true)).0, "NotReady");
        assert_eq!(state(&of(2, false)).0, "NotReady", "they are of the older template");
        assert_eq!(
            state(&observe(None, &[], Some("strength".into()))),
            expect("NotReady", "False WorkspaceInferenceStatusFailed", "False workspacePending")
        );
    }
}
