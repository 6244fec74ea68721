//! A Job and its pods -> the state of the training: its stage, why it waits, how its last container ended.
//!
//! Pure. The Job's conditions decide, not its counters. KAITO takes a pod that failed and is tried again for a failed
//! training.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, Pod};
use serde::Deserialize;

use crate::fault::Kind;
use crate::workspace::WORKSPACE_LABEL;

/// The state of a training as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// No container has started yet.
    Pending,
    /// The training runs, or waits for its next pod after a failure.
    Running,
    /// The Job is complete.
    Succeeded,
    /// The Job has failed for good.
    Failed,
}

impl Stage {
    /// All stages.
    pub const ALL: [Stage; 4] = [Stage::Pending, Stage::Running, Stage::Succeeded, Stage::Failed];

    /// KAITO's `status.state`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Pending => "Pending",
            Stage::Running => "Running",
            Stage::Succeeded => "Succeeded",
            Stage::Failed => "Failed",
        }
    }

    /// Whether nothing more happens: the Job succeeded or failed.
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
    /// The end of the container that ended last.
    pub ended: Option<Ended>,
    /// The number of pods that failed so far.
    pub failures: i32,
    /// The name of a pod whose container runs.
    pub running: Option<String>,
    /// The node of the newest pod.
    pub node: Option<String>,
    /// The reason why Kubernetes gave the Job up.
    pub given_up: Option<String>,
    /// The uid of a pod or Job that does not go on and does not say why; its Warnings may.
    pub mute: Option<String>,
}

/// The end of a container, with hone's termination message if there is one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ended {
    /// Exit code of the process; 128 and the signal's number if a signal ended it.
    pub exit_code: i32,
    /// The kubelet's reason, such as `OOMKilled`.
    pub reason: String,
    /// The termination message; empty if there is none.
    pub said: Said,
}

/// The termination message, as `report::termination` writes it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Said {
    /// Name of the fault's kind; `ok` after success.
    pub kind: String,
    /// The error message.
    pub message: Option<String>,
    /// What to do about it.
    pub help: Option<String>,
    /// The last logged optimizer step.
    pub step: Option<u64>,
    /// Loss of that step.
    pub loss: Option<f64>,
    /// Loss of the newest evaluation.
    pub eval_loss: Option<f64>,
    /// The pushed image with its tag.
    pub image: Option<String>,
    /// Digest of the pushed image.
    pub digest: Option<String>,
}

/// Observes a Job. `ran`: whether the same Job was running before; it still is between one pod and the next.
pub fn observe(job: Option<&Job>, pods: &[Arc<Pod>], ran: bool) -> Seen {
    let newest = pods.iter().max_by_key(|pod| pod.metadata.creation_timestamp.clone()).map(|pod| &**pod);
    let status = job.and_then(|job| job.status.as_ref());
    let counted = |count: Option<i32>| count.unwrap_or(0);
    let condition = |name: &str| {
        let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        conditions.into_iter().find(|condition| condition.type_ == name && condition.status == "True")
    };
    let suspension = condition("Suspended").is_some();
    let begun = status.map_or(0, |status| {
        [status.active, status.ready, status.failed, status.succeeded, status.terminating]
            .map(counted)
            .iter()
            .sum()
    });
    let ending = ["FailureTarget", "SuccessCriteriaMet"].into_iter().any(|name| condition(name).is_some());
    let stage = match () {
        () if condition("Complete").is_some() => Stage::Succeeded,
        () if condition("Failed").is_some() => Stage::Failed,
        () if begun > 0 || ending || (ran && job.is_some() && !suspension) => Stage::Running,
        () => Stage::Pending,
    };
    let suspended = || {
        suspension.then_some(())?;
        Some("it is suspended until its queue lets it start".to_owned())
    };
    let waiting = newest.filter(|_| !stage.is_over()).and_then(waiting).or_else(suspended);
    let running = newest.filter(|pod| is_running(pod)).and_then(|pod| pod.metadata.name.clone());
    let silent = !stage.is_over() && waiting.is_none() && running.is_none();
    Seen {
        stage,
        mute: match newest
            .filter(|pod| terminated(pod).is_none() && pod.metadata.deletion_timestamp.is_none())
        {
            Some(pod) => pod.metadata.uid.clone(),
            None => job.and_then(|job| job.metadata.uid.clone()),
        }
        .filter(|_| silent),
        waiting,
        ended: pods
            .iter()
            .filter_map(|pod| terminated(pod))
            .max_by_key(|ended| ended.finished_at.clone())
            .map(Ended::of),
        failures: status.map_or(0, |status| counted(status.failed)),
        running,
        node: newest.and_then(|pod| pod.spec.as_ref()?.node_name.clone()),
        given_up: condition("Failed").map(|condition| {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            format!("{}: {}", text(&condition.reason), text(&condition.message))
        }),
    }
}

/// The state of hone's container, which has the Workspace's name; others may have been put beside it.
fn state(pod: &Pod) -> Option<&ContainerState> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    let name = pod.metadata.labels.as_ref().and_then(|labels| labels.get(WORKSPACE_LABEL));
    let own = containers.iter().find(|container| Some(&container.name) == name);
    own.or(containers.first())?.state.as_ref()
}

fn is_running(pod: &Pod) -> bool {
    state(pod).is_some_and(|state| state.running.is_some())
}

fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    state(pod)?.terminated.as_ref()
}

/// The reason why a pod does not run: it is not scheduled, or an image or a mount is missing.
fn waiting(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let told = |reason: &Option<String>, message: &Option<String>| {
        let reason = reason.clone()?;
        Some(match message.as_deref().filter(|message| !message.is_empty()) {
            Some(message) => format!("{reason}: {message}"),
            None => reason,
        })
    };
    let container = state(pod).and_then(|state| state.waiting.as_ref());
    if let Some(waiting) = container {
        // These reasons are normal before a container runs.
        let usual = ["ContainerCreating", "PodInitializing"];
        return told(&waiting.reason, &waiting.message).filter(|text| !usual.contains(&text.as_str()));
    }
    let unscheduled = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")?;
    told(&unscheduled.reason, &unscheduled.message)
}

impl Ended {
    /// The end as the kubelet reports it.
    pub fn of(state: &ContainerStateTerminated) -> Ended {
        let text = state.message.as_deref().unwrap_or_default();
        // With FallbackToLogsOnError the message may be the end of the log, whose lines are JSON too, but of no kind.
        let said = text.lines().rev().filter_map(|line| serde_json::from_str::<Said>(line.trim()).ok());
        let said = said.into_iter().find(|said| !said.kind.is_empty());
        Ended {
            exit_code: state.exit_code,
            reason: state.reason.clone().unwrap_or_default(),
            said: said.unwrap_or_default(),
        }
    }

    /// `exit code 11 (data): row 3 ...; what to do`
    pub fn told(&self) -> String {
        let kind = Kind::ALL.into_iter().find(|kind| i32::from(kind.exit_code()) == self.exit_code);
        let name = kind.map_or(self.reason.as_str(), |kind| kind.name());
        let name = if name.is_empty() { String::new() } else { format!(" ({name})") };
        let parts = [self.said.message.as_deref(), self.said.help.as_deref()];
        let words: Vec<&str> = parts.into_iter().flatten().collect();
        match (words.is_empty(), self.exit_code) {
            (false, code) => format!("exit code {code}{name}: {}", words.join("; ")),
            (true, 137) if self.reason == "OOMKilled" => {
                format!("exit code 137{name}: killed for its memory; raise hone.sh/memory")
            }
            (true, 137) => format!("exit code 137{name}: killed from outside, by a person or by its node"),
            (true, code) => format!("exit code {code}{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        assert_eq!(running.running.as_deref(), Some("pod-01"));
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
        assert_eq!((seen.running, seen.ended.map(|ended| ended.exit_code)), (None, Some(11)));
    }

    /// Its Events are asked where neither pod nor Job says why nothing moves.
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
