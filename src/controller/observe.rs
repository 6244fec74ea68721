//! A Job and its pods -> the state of the training: its stage, why it waits, how its last container ended.
//!
//! Pure. The Job's conditions decide, not its counters. KAITO takes a pod that failed and is tried again for a failed
//! training.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobStatus};
use k8s_openapi::api::core::v1::Pod;

use super::ended::Ended;
use super::pods::Pods;

/// The state of a training as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// No container has started yet.
    Pending,
    /// The training runs, or waits for its next pod after a failure.
    Running,
    /// The Job is complete.
    Succeeded,
    /// The Job has failed permanently.
    Failed,
}

impl Stage {
    /// All stages.
    pub const ALL: [Stage; 4] = [Stage::Pending, Stage::Running, Stage::Succeeded, Stage::Failed];

    /// Returns KAITO's `status.state`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Pending => "Pending",
            Stage::Running => "Running",
            Stage::Succeeded => "Succeeded",
            Stage::Failed => "Failed",
        }
    }

    /// Returns whether nothing more happens: the Job succeeded or failed.
    pub fn is_over(self) -> bool {
        matches!(self, Stage::Succeeded | Stage::Failed)
    }
}

/// The observed state of a training.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// The state of the Job as a whole.
    pub stage: Stage,
    /// The reason why the pod or the Job waits.
    pub waiting: Option<String>,
    /// The end of the container that ended last; on several nodes the end that explains the last failure.
    pub ended: Option<Ended>,
    /// The number of failures so far. On several nodes a failure is one of all pods.
    pub failures: u32,
    /// The name of the pod whose log shows the progress, if its container runs.
    pub speaker: Option<String>,
    /// The number of pods whose container runs.
    pub running: usize,
    /// The number of pods that the Job runs at once.
    pub wanted: usize,
    /// The nodes of the newest pods.
    pub nodes: Vec<String>,
    /// The number of pods without a node.
    pub unplaced: usize,
    /// The reason why Kubernetes gave the Job up.
    pub given_up: Option<String>,
    /// The uid of a pod or Job that does not go on and does not say why; its Warnings may.
    pub mute: Option<String>,
}

impl Seen {
    /// Takes a node as the place of all pods.
    pub fn place(&mut self, node: Option<String>) {
        self.unplaced = usize::from(node.is_none());
        self.nodes = node.into_iter().collect();
    }
}

/// Observes a Job. `ran`: whether the same Job was running before; it still is between one pod and the next.
pub fn observe(job: Option<&Job>, pods: &[Arc<Pod>], ran: bool) -> Seen {
    let pods = Pods::of(job, pods);
    let status = job.and_then(|job| job.status.as_ref());
    let condition = |name: &str| {
        let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        conditions.into_iter().find(|condition| condition.type_ == name && condition.status == "True")
    };
    let is_suspended = condition("Suspended").is_some();
    let ending = ["FailureTarget", "SuccessCriteriaMet"].into_iter().any(|name| condition(name).is_some());
    let stage = match () {
        () if condition("Complete").is_some() => Stage::Succeeded,
        () if condition("Failed").is_some() => Stage::Failed,
        () if begun(status) || ending || (ran && job.is_some() && !is_suspended) => Stage::Running,
        () => Stage::Pending,
    };
    let suspended = || is_suspended.then(|| "it is suspended until its queue lets it start".to_owned());
    let waiting = pods.waiting().filter(|_| !stage.is_over()).or_else(suspended);
    let mute = pods.mute().filter(|_| !stage.is_over() && waiting.is_none());
    let (nodes, unplaced) = pods.nodes();
    let failed = status.and_then(|status| status.failed).unwrap_or(0);
    Seen {
        stage,
        mute: mute.and_then(|pod| pod.ok().or_else(|| job?.metadata.uid.clone())),
        waiting,
        ended: pods.ended(stage == Stage::Succeeded),
        // One failure of a set is one of each pod.
        failures: failed.unsigned_abs().div_ceil(pods.wanted as u32),
        speaker: pods.speaker(),
        running: pods.running(),
        wanted: pods.wanted,
        nodes,
        unplaced,
        given_up: condition("Failed").map(|condition| {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            format!("{}: {}", text(&condition.reason), text(&condition.message))
        }),
    }
}

/// Returns whether the Job has, or had, a pod.
fn begun(status: Option<&JobStatus>) -> bool {
    status.is_some_and(|status| {
        let counts = [status.active, status.ready, status.failed, status.succeeded, status.terminating];
        counts.into_iter().flatten().sum::<i32>() > 0
    })
}

/// Returns whether the Job is being deleted.
pub fn is_leaving(job: &Job) -> bool {
    job.metadata.deletion_timestamp.is_some()
}

/// Returns whether the Job succeeded, or failed permanently.
pub fn is_over(job: &Job) -> bool {
    observe(Some(job), &[], false).stage.is_over()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::WORKSPACE_LABEL;
    use serde_json::json;

    fn job(status: serde_json::Value) -> Job {
        serde_json::from_value(json!({"status": status})).unwrap()
    }

    fn pod(created: &str, state: serde_json::Value) -> Arc<Pod> {
        let pod = serde_json::from_value(json!({
            "metadata": {"name": format!("pod-{created}"), "creationTimestamp": format!("2026-01-01T00:00:{created}Z")},
            "status": {"containerStatuses": [{
                "name": "c", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": state,
            }]},
        }));
        Arc::new(pod.unwrap())
    }

    fn ended(created: &str, code: i32, message: &str) -> Arc<Pod> {
        let finished = format!("2026-01-01T00:01:{created}Z");
        pod(created, json!({"terminated": {"exitCode": code, "message": message, "finishedAt": finished}}))
    }

    /// KAITO's table of a Job's status, with the Job's own conditions in place of its counter of failures.
    #[test]
    fn stages() {
        let stage = |status| observe(Some(&job(status)), &[], false).stage;
        assert_eq!(observe(None, &[], false).stage, Stage::Pending);
        assert_eq!(stage(json!({})), Stage::Pending);
        assert_eq!(stage(json!({"active": 1})), Stage::Running);
        assert_eq!(stage(json!({"active": 1, "failed": 2})), Stage::Running, "tried again");
        let condition = |name: &str| json!([{"type": name, "status": "True", "reason": "R", "message": "m"}]);
        assert_eq!(
            stage(json!({"succeeded": 1, "failed": 1, "conditions": condition("Complete")})),
            Stage::Succeeded
        );
        assert_eq!(stage(json!({"failed": 7, "conditions": condition("Failed")})), Stage::Failed);
        assert_eq!(stage(json!({"failed": 1})), Stage::Running, "between two tries");
        assert_eq!(
            stage(json!({"conditions": condition("FailureTarget")})),
            Stage::Running,
            "its pod still goes"
        );
        let seen = observe(Some(&job(json!({"conditions": condition("Suspended")}))), &[], true);
        assert_eq!((seen.stage, seen.waiting.is_some()), (Stage::Pending, true), "a queue may stop it again");
        assert_eq!(
            observe(Some(&job(json!({}))), &[], true).stage,
            Stage::Running,
            "between a pod that goes and the next"
        );
        assert_eq!(stage(json!({"terminating": 1})), Stage::Running);
    }

    #[test]
    fn the_container_that_ended_last_is_told() {
        let line =
            "{\"code\":11,\"kind\":\"data\",\"message\":\"row 3 is empty\",\"help\":\"look\",\"step\":7}\n";
        let pods = [ended("02", 11, line), ended("01", 20, "")];
        let last = observe(Some(&job(json!({"active": 1}))), &pods, false).ended.unwrap();
        assert_eq!(last.told(), "exit code 11 (data): row 3 is empty; look");
        assert_eq!(last.said.step, Some(7));
        let logs = format!("{{\"event\":\"note\"}}\nsome words\n{line}");
        assert_eq!(observe(None, &[ended("01", 11, &logs)], false).ended.unwrap().said.kind, "data");
        assert_eq!(
            observe(None, &[ended("01", 20, "")], false).ended.unwrap().told(),
            "exit code 20 (network)"
        );
        let log = "{\"level\":\"INFO\",\"message\":\"step\",\"step\":9,\"loss\":1.0}";
        let killed = observe(None, &[ended("01", 137, log)], false).ended.unwrap();
        assert!(killed.told().contains("by a person or by its node"), "{}", killed.told());
        let hungry = Ended { reason: "OOMKilled".into(), ..killed };
        assert!(hungry.told().contains("raise hone.sh/memory"), "{}", hungry.told());
    }

    #[test]
    fn what_a_pod_waits_for() {
        let told = |state| observe(Some(&job(json!({"active": 1}))), &[pod("01", state)], false).waiting;
        assert_eq!(told(json!({"waiting": {"reason": "ContainerCreating"}})), None);
        assert_eq!(
            told(json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})).as_deref(),
            Some("ImagePullBackOff: no such image")
        );
        assert_eq!(told(json!({"running": {}})), None);
        let unscheduled: Pod = serde_json::from_value(json!({"status": {"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"},
        ]}}))
        .unwrap();
        let seen = observe(Some(&job(json!({"active": 1}))), &[Arc::new(unscheduled)], false);
        assert_eq!(seen.waiting.as_deref(), Some("Unschedulable: 0/3 nodes"));
        let running = observe(Some(&job(json!({"active": 1}))), &[pod("01", json!({"running": {}}))], false);
        assert_eq!(running.speaker.as_deref(), Some("pod-01"));
    }

    #[test]
    fn a_container_beside_it_tells_nothing() {
        let status = |name: &str, state| json!({"name": name, "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state});
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "labels": {WORKSPACE_LABEL: "w"}},
            "status": {"containerStatuses": [
                status("proxy", json!({"running": {}})), status("w", json!({"terminated": {"exitCode": 11}})),
            ]},
        }))
        .unwrap();
        let seen = observe(Some(&job(json!({"active": 1}))), &[Arc::new(pod)], false);
        assert_eq!((seen.speaker, seen.ended.map(|ended| ended.exit_code)), (None, Some(11)));
    }

    /// Events of an object are read if neither pod nor Job says why nothing moves.
    #[test]
    fn whose_warnings_are_read() {
        let mut quiet: Job = job(json!({"active": 0}));
        quiet.metadata.uid = Some("job".into());
        let mute = |pods: &[Arc<Pod>]| observe(Some(&quiet), pods, false).mute;
        assert_eq!(mute(&[]).as_deref(), Some("job"));
        let with_uid = |state| {
            let mut pod = (*pod("01", state)).clone();
            pod.metadata.uid = Some("pod".into());
            Arc::new(pod)
        };
        assert_eq!(
            mute(&[with_uid(json!({"waiting": {"reason": "ContainerCreating"}}))]).as_deref(),
            Some("pod")
        );
        assert_eq!(mute(&[with_uid(json!({"waiting": {"reason": "ErrImagePull"}}))]), None, "it says why");
        assert_eq!(mute(&[with_uid(json!({"running": {}}))]), None);
    }
}
