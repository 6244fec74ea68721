//! The pods of a Job -> their nodes, the reasons why some wait, and the end that explains a failure.
//!
//! Pure. A Job on one node has one pod at a time, which counts as pod 0. A Job on several nodes has one for each index,
//! and pod 0 is the one that logs, writes and pushes.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, Pod};

use super::ended::Ended;
use crate::fault::Kind;
use crate::workspace::WORKSPACE_LABEL;

/// Kubernetes' label of a pod of an Indexed Job, with its index.
const INDEX_LABEL: &str = "batch.kubernetes.io/job-completion-index";
/// The time within which all pods of a set end after one has failed. An earlier end belongs to an earlier failure.
const SAME_FAILURE: SignedDuration = SignedDuration::from_secs(180);

/// The pods of one Job, by index.
pub(super) struct Pods<'a> {
    /// Number of pods that the Job runs at once.
    pub wanted: usize,
    newest: BTreeMap<usize, &'a Pod>,
    all: &'a [Arc<Pod>],
}

impl<'a> Pods<'a> {
    /// Returns the pods of a Job; without a Job one is expected.
    pub fn of(job: Option<&Job>, all: &'a [Arc<Pod>]) -> Pods<'a> {
        let spec = job.and_then(|job| job.spec.as_ref());
        let wanted = spec.and_then(|spec| spec.completions).and_then(|count| usize::try_from(count).ok());
        let mut newest: BTreeMap<usize, &Pod> = BTreeMap::new();
        let mut sorted: Vec<&Pod> = all.iter().map(|pod| &**pod).collect();
        sorted.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
        for pod in sorted {
            newest.insert(index(pod), pod);
        }
        Pods { wanted: wanted.unwrap_or(1).max(1), newest, all }
    }

    fn is_set(&self) -> bool {
        self.wanted > 1
    }

    /// Returns the name of the pod whose log shows the progress, if its container runs.
    pub fn speaker(&self) -> Option<String> {
        self.newest.get(&0).filter(|pod| is_running(pod)).and_then(|pod| pod.metadata.name.clone())
    }

    /// Returns the number of pods whose container runs.
    pub fn running(&self) -> usize {
        self.newest.values().filter(|pod| is_running(pod)).count()
    }

    /// Returns nodes of the newest pods in the order of their index, each once; and the number of pods without a node.
    pub fn nodes(&self) -> (Vec<String>, usize) {
        let mut nodes: Vec<String> = Vec::new();
        let mut placed = 0;
        for node in self.newest.values().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()) {
            placed += 1;
            if !nodes.contains(&node) {
                nodes.push(node);
            }
        }
        (nodes, self.wanted.saturating_sub(placed))
    }

    /// Returns the reason why pods wait: each reason once, with the pods of a set that have it.
    pub fn waiting(&self) -> Option<String> {
        let mut reasons: Vec<(String, Vec<usize>)> = Vec::new();
        for (index, pod) in &self.newest {
            let Some(reason) = waiting(pod) else { continue };
            match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, list)) => list.push(*index),
                None => reasons.push((reason, vec![*index])),
            }
        }
        let told = reasons.into_iter().map(|(reason, list)| match self.is_set() {
            true => format!("{}: {reason}", named(&list)),
            false => reason,
        });
        Some(told.collect::<Vec<_>>().join("; ")).filter(|text| !text.is_empty())
    }

    /// Returns the uid of a pod that does not run and does not say why. `Err`: no such pod, but some are missing.
    pub fn mute(&self) -> Option<Result<String, ()>> {
        let alive = |pod: &&Pod| terminated(pod).is_none() && pod.metadata.deletion_timestamp.is_none();
        let mut lacking = (0..self.wanted).filter(|index| {
            let pod = self.newest.get(index);
            !pod.is_some_and(|pod| is_running(pod) || (self.is_set() && is_over_well(pod)))
        });
        let first = lacking.next()?;
        let pod = [first]
            .into_iter()
            .chain(lacking)
            .find_map(|index| self.newest.get(&index).copied().filter(alive));
        Some(pod.and_then(|pod| pod.metadata.uid.clone()).ok_or(()))
    }

    /// Returns the most informative end: after success that of pod 0; else the cause of the last failure.
    pub fn ended(&self, has_succeeded: bool) -> Option<Ended> {
        let mut ends: Vec<(usize, &ContainerStateTerminated)> =
            self.all.iter().filter_map(|pod| Some((index(pod), terminated(pod)?))).collect();
        ends.sort_by_key(|(_, end)| end.finished_at.clone());
        let last = ends.last().map(|(_, end)| end.finished_at.as_ref().map(|time| time.0));
        let pushed = ends.iter().rev().find(|(index, end)| *index == 0 && end.exit_code == 0);
        let chosen = match self.is_set() {
            false => ends.last(),
            true if has_succeeded && pushed.is_some() => pushed,
            true => ends.iter().rev().min_by_key(|(index, end)| {
                let late = is_of_the_last_failure(end, last.flatten());
                (blame(end.exit_code, late), *index)
            }),
        };
        let (index, end) = chosen?;
        Some(Ended { pod: self.is_set().then_some(*index), ..Ended::of(end) })
    }
}

/// Ends by how much they say about the cause of a failure, the best first. A code that no retry helps ends the whole
/// Job, so it is the cause whenever it came. The other ranks also end with a device fault (22), and stopped pods end
/// with 30 and 31.
fn blame(code: i32, is_of_the_last_failure: bool) -> u8 {
    let kind = Kind::ALL.into_iter().find(|kind| i32::from(kind.exit_code()) == code);
    match kind {
        Some(kind) if !kind.retry_helps() => 0,
        _ if !is_of_the_last_failure => 5,
        _ if code == 0 => 4,
        Some(Kind::Interrupted | Kind::InterruptedUnsaved) => 3,
        Some(Kind::Device) => 2,
        _ => 1,
    }
}

fn is_of_the_last_failure(end: &ContainerStateTerminated, last: Option<Timestamp>) -> bool {
    let time = end.finished_at.as_ref().map(|time| time.0);
    time.zip(last).is_none_or(|(time, last)| last.duration_since(time) <= SAME_FAILURE)
}

/// Returns a text such as `pod 2` or `pods 1, 3`.
fn named(indexes: &[usize]) -> String {
    let list: Vec<String> = indexes.iter().map(ToString::to_string).collect();
    format!("pod{} {}", if list.len() > 1 { "s" } else { "" }, list.join(", "))
}

fn index(pod: &Pod) -> usize {
    let label = pod.metadata.labels.as_ref().and_then(|labels| labels.get(INDEX_LABEL));
    label.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Returns the state of hone's container, which has the Workspace's name; the pod may have further containers.
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

fn is_over_well(pod: &Pod) -> bool {
    terminated(pod).is_some_and(|end| end.exit_code == 0)
}

/// Returns the reason why a pod does not run: it is not scheduled, or an image or a mount is missing.
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn job(count: u32) -> Job {
        serde_json::from_value(json!({"spec": {"completions": count, "template": {}}})).unwrap()
    }

    /// Returns a pod of a set; `second` is when it was created.
    fn pod(index: u32, second: u32, state: Value) -> Arc<Pod> {
        let pod = serde_json::from_value(json!({
            "metadata": {
                "name": format!("w-{index}-{second}"), "uid": format!("uid-{index}"),
                "labels": {INDEX_LABEL: index.to_string(), WORKSPACE_LABEL: "w"},
                "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z"),
            },
            "spec": {"nodeName": format!("node-{index}"), "containers": []},
            "status": {"containerStatuses": [{
                "name": "w", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
            }]},
        }));
        Arc::new(pod.unwrap())
    }

    fn end(code: i32, at: &str, message: &str) -> Value {
        let said = json!({"code": code, "kind": "x", "message": message}).to_string();
        json!({"terminated": {"exitCode": code, "message": said, "finishedAt": format!("2026-01-01T{at}Z")}})
    }

    fn cause(pods: &[Arc<Pod>]) -> String {
        let ended = Pods::of(Some(&job(3)), pods).ended(false).unwrap();
        format!("{} {}", ended.pod.unwrap(), ended.exit_code)
    }

    #[test]
    fn each_reason_stands_once_with_its_pods() {
        let pull = json!({"waiting": {"reason": "ErrImagePull", "message": "none"}});
        let mount = json!({"waiting": {"reason": "CreateContainerConfigError"}});
        let running = json!({"running": {}});
        let told = |pods: &[Arc<Pod>]| Pods::of(Some(&job(4)), pods).waiting();
        assert_eq!(
            told(&[
                pod(0, 1, running.clone()),
                pod(3, 1, pull.clone()),
                pod(1, 1, pull.clone()),
                pod(2, 1, mount)
            ])
            .as_deref(),
            Some("pods 1, 3: ErrImagePull: none; pod 2: CreateContainerConfigError")
        );
        assert_eq!(
            told(&[pod(0, 1, pull.clone()), pod(0, 2, running)]),
            None,
            "the newest pod of an index counts"
        );
        assert_eq!(Pods::of(None, &[pod(0, 1, pull)]).waiting().as_deref(), Some("ErrImagePull: none"));
    }

    /// The other ranks end with a device fault, and pods that Kubernetes stops with 30.
    #[test]
    fn the_cause_of_a_failure_is_told_and_not_its_consequences() {
        let lost = |index, at: &str| pod(index, 1, end(22, at, "rank 2 is gone"));
        let killed = pod(2, 1, end(137, "01:00:00", ""));
        assert_eq!(cause(&[lost(0, "01:00:20"), killed.clone(), lost(1, "01:00:30")]), "2 137");
        assert_eq!(cause(&[lost(0, "01:00:20"), lost(1, "01:00:30")]), "0 22", "rank 0 knows who is gone");
        let stopped = |index, at: &str| pod(index, 1, end(30, at, ""));
        let data = pod(1, 1, end(11, "01:00:00", "row 3"));
        assert_eq!(
            cause(&[stopped(0, "01:04:50"), data, stopped(2, "01:04:59")]),
            "1 11",
            "their grace is long"
        );
        assert_eq!(cause(&[stopped(1, "01:00:00"), lost(0, "01:00:01"), stopped(2, "01:00:02")]), "0 22");
        let later = |index, code| pod(index, 2, end(code, "02:00:00", ""));
        assert_eq!(cause(&[killed, later(0, 22), later(1, 20)]), "1 20", "an earlier failure is over");
    }

    #[test]
    fn a_set_that_succeeded_tells_what_pod_0_pushed() {
        let pods = [pod(0, 1, end(0, "01:00:00", "")), pod(1, 1, end(30, "01:00:09", ""))];
        let ended = Pods::of(Some(&job(2)), &pods).ended(true).unwrap();
        assert_eq!((ended.pod, ended.exit_code), (Some(0), 0));
    }

    #[test]
    fn where_pods_are_and_whose_warnings_are_read() {
        let creating = json!({"waiting": {"reason": "ContainerCreating"}});
        let pods = [pod(0, 1, json!({"running": {}})), pod(1, 1, creating)];
        let set = Pods::of(Some(&job(3)), &pods);
        assert_eq!((set.wanted, set.running(), set.speaker().as_deref()), (3, 1, Some("w-0-1")));
        assert_eq!(set.nodes(), (vec!["node-0".to_owned(), "node-1".to_owned()], 1));
        assert_eq!(set.mute(), Some(Ok("uid-1".to_owned())));
        assert_eq!(Pods::of(Some(&job(3)), &pods[..1]).mute(), Some(Err(())), "the Job cannot create them");
        assert_eq!(Pods::of(Some(&job(1)), &pods[..1]).mute(), None);
    }
}
