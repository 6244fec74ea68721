//! The observed state of a training -> the Workspace's conditions, state and annotations, with KAITO's names and
//! reasons.
//!
//! Pure. Source: KAITO v0.12, `api/v1beta1/condition_types.go` and `applyTuningWorkspaceStatus`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::ended::Ended;
use super::observe::{Seen, Stage};
use super::progress::Progress;
use super::words::plain;
use crate::workspace::annotations::PREFIX;
use crate::workspace::kind::{Status, Workspace};
use crate::workspace::several;

/// The words before the reason why a change is not carried out.
const NOT_APPLIED: &str = "; the change is not applied: ";
/// LIMIT: bytes of a condition's message. The CRD allows 32,768; people read this much.
const MESSAGE_BYTES_MAX: usize = 4096;

/// The inputs of a status.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// State of Job and pods.
    pub seen: Seen,
    /// Progress of a running training, if its log shows it.
    pub progress: Option<Progress>,
    /// State of the requested nodes.
    pub nodes: Nodes,
    /// The reason why the current Workspace cannot be carried out; an older Job continues.
    pub refused: Option<String>,
    /// True if the Workspace makes no progress until somebody corrects that.
    pub stuck: bool,
    /// A Warning of the cluster about a pod or Job that does not go on.
    pub warning: Option<String>,
}

/// The state of the nodes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nodes {
    /// The number of ready nodes; `None`: this controller may not list nodes.
    pub ready: Option<usize>,
    /// Whether the claimed nodes are there, and the provider's message.
    pub claim: Option<(bool, String)>,
}

/// Returns the new status; it equals the old one if nothing changed.
pub fn status(workspace: &Workspace, report: &Report, now: Timestamp) -> Status {
    let mut status = workspace.status.clone().unwrap_or_default();
    let stage = stage(report);
    let mut conditions = Conditions {
        list: std::mem::take(&mut status.conditions),
        generation: workspace.metadata.generation,
        now,
    };
    let (started, reason, words) = match stage {
        // No Job failed here. The reason distinguishes a Job that could not be created from a failed one.
        Stage::Failed if report.stuck => {
            (false, "WorkspaceTuningJobStatusPending", "tuning job was not made")
        }
        Stage::Pending => (false, "WorkspaceTuningJobStatusPending", "tuning job has not started"),
        Stage::Running => (true, "WorkspaceTuningJobStatusStarted", "tuning job has started"),
        Stage::Succeeded => (true, "WorkspaceTuningJobStatusStarted", "tuning job has completed"),
        Stage::Failed => (false, "WorkspaceTuningJobStatusFailed", "tuning job failed"),
    };
    conditions.set("JobStarted", started, reason, words.into());
    let (succeeded, reason) = match stage {
        Stage::Pending | Stage::Running => (false, "workspacePending"),
        Stage::Succeeded => (true, "workspaceSucceeded"),
        Stage::Failed => (false, "workspaceFailed"),
    };
    conditions.set("WorkspaceSucceeded", succeeded, reason, message(report));
    let Seen { nodes: placed, unplaced, .. } = &report.seen;
    nodes(&mut conditions, placed, *unplaced, &report.nodes, report.seen.stage.is_over());
    status.conditions = conditions.list;
    status.state = Some(stage.name().into());
    status.worker_nodes = report.seen.nodes.clone();
    status.target_node_count = Some(several::nodes(workspace));
    status
}

/// Returns the stage of the Workspace. One that was refused before it had a Job has failed, because somebody must act.
pub fn stage(report: &Report) -> Stage {
    match report.stuck {
        true => Stage::Failed,
        false => report.seen.stage,
    }
}

/// Returns the annotations that the controller writes; `None` removes one.
pub fn annotations(report: &Report, revision: i64) -> BTreeMap<String, Option<String>> {
    let said = report.seen.ended.as_ref().map(|ended| &ended.said);
    let over = report.seen.stage.is_over();
    let progress = report.progress.as_ref();
    let step = match (over, progress) {
        (false, Some(progress)) => Some(progress.steps()),
        _ => said.and_then(|said| said.step).map(|step| step.to_string()),
    };
    let loss = match (over, progress) {
        (false, Some(progress)) => Some(progress.loss),
        _ => said.and_then(|said| said.loss),
    };
    let pushed = said.filter(|_| report.seen.stage == Stage::Succeeded);
    let digest = pushed.and_then(|said| said.digest.clone());
    let image = pushed.and_then(|said| said.image.clone()).zip(digest.clone());
    let image = image.map(|(image, digest)| format!("{}@{digest}", without_tag(&image)));
    let values = [
        ("revision", (revision > 0).then(|| revision.to_string())),
        ("step", step),
        ("loss", loss.map(|loss| format!("{loss:.4}"))),
        ("eta", progress.filter(|_| !over).map(Progress::eta)),
        ("exit-code", report.seen.ended.as_ref().map(|ended| ended.exit_code.to_string())),
    ];
    // The image that was pushed last stays known while the next revision runs, because servers may follow it.
    let kept = [("digest", digest), ("pushed", image)].into_iter().filter(|(_, value)| value.is_some());
    values.into_iter().chain(kept).map(|(name, value)| (format!("{PREFIX}{name}"), value)).collect()
}

/// Returns an image's name without its tag.
pub fn without_tag(image: &str) -> &str {
    let last = image.rfind('/').map_or(0, |at| at + 1);
    image[last..].find(':').map_or(image, |at| &image[..last + at])
}

/// Returns the message for people: KAITO's words, then the details.
pub fn message(report: &Report) -> String {
    let seen = &report.seen;
    let ended = seen.ended.as_ref();
    let mut text = match stage(report) {
        Stage::Pending => "workspace is initializing, tuning job has not started".to_owned(),
        Stage::Running => "workspace has not completed yet, tuning job is running".into(),
        Stage::Succeeded => "workspace succeeds".into(),
        Stage::Failed => "workspace failed".into(),
    };
    let mut add = |more: String| text += &more;
    match stage(report) {
        Stage::Pending | Stage::Running => {
            if let Some(waiting) = seen.waiting.as_ref().or(report.warning.as_ref()) {
                add(format!("; waiting: {waiting}"));
            }
            if seen.wanted > 1 && (1..seen.wanted).contains(&seen.running) {
                add(format!("; {} of {} pods run", seen.running, seen.wanted));
            }
            if let Some(progress) = &report.progress {
                add(format!("; {}", progress.told()));
            }
            if let Some(ended) = ended.filter(|ended| ended.exit_code != 0) {
                add(format!("; tried again after {} failed: {}", seen.failures.max(1), ended.told()));
            }
        }
        Stage::Succeeded => {
            let said = ended.map(|ended| ended.said.clone()).unwrap_or_default();
            if let (Some(image), Some(digest)) = (said.image, said.digest) {
                add(format!(": pushed {image} ({digest})"));
            }
            if let (Some(step), Some(loss)) = (said.step, said.loss) {
                add(format!("; {step} steps, loss {loss:.4}"));
            }
        }
        Stage::Failed => {
            // The failure policy only repeats the exit code.
            let given_up =
                seen.given_up.clone().filter(|why| ended.is_none() || !why.starts_with("PodFailurePolicy"));
            let parts: Vec<String> = ended.map(Ended::told).into_iter().chain(given_up).collect();
            if !parts.is_empty() {
                add(format!(": {}", parts.join("; ")));
            }
        }
    }
    match &report.refused {
        Some(why) if report.stuck => add(format!(": {why}")),
        Some(why) => add(format!("{NOT_APPLIED}{why}")),
        None => {}
    }
    plain(&text, MESSAGE_BYTES_MAX)
}

/// Sets the conditions of the nodes. `placed` are the nodes of the pods; `unplaced` pods have none yet. Conditions that
/// no longer hold are removed.
pub fn nodes(conditions: &mut Conditions, placed: &[String], unplaced: usize, nodes: &Nodes, over: bool) {
    let Nodes { ready, claim } = nodes;
    match claim {
        Some((there, told)) => {
            let reason = if *there { "NodeClaimReady" } else { "NodeClaimNotReady" };
            conditions.set("NodeClaimReady", *there, reason, told.clone());
        }
        None => conditions.remove("NodeClaimReady"),
    }
    let names = Some(placed.join(", ")).filter(|names| !names.is_empty());
    let (there, told) = match (names, ready) {
        (Some(names), _) if over => (true, format!("ran on {names}")),
        (Some(names), _) if unplaced == 0 => (true, format!("runs on {names}")),
        (Some(names), _) => {
            let (noun, verb) = if unplaced == 1 { ("pod", "has") } else { ("pods", "have") };
            (false, format!("runs on {names}; {unplaced} {noun} {verb} no node yet"))
        }
        (None, Some(0)) => (false, "no ready node has the labels of resource.labelSelector".into()),
        (None, Some(count)) => (true, format!("{count} nodes have the labels")),
        // The pod is gone, so the node that was written before stays.
        (None, None) if over && conditions.holds("ResourceReady") => return,
        (None, None) => {
            conditions.remove("NodesReady");
            return conditions.remove("ResourceReady");
        }
    };
    let reason = if there { "NodesReady" } else { "NodesNotReady" };
    conditions.set("NodesReady", there, reason, told.clone());
    let reason = if there { "workspaceResourceStatusSuccess" } else { "workspaceResourceStatusPending" };
    conditions.set("ResourceReady", there, reason, told);
}

/// Returns the status of a Workspace that is over, with the reason why a later change is not carried out, or without
/// one.
pub fn after_end(old: &Status, refused: Option<&str>) -> Status {
    let mut status = old.clone();
    for condition in status.conditions.iter_mut().filter(|condition| condition.type_ == "WorkspaceSucceeded")
    {
        let told = condition.message.split(NOT_APPLIED).next().unwrap_or_default();
        let told = refused.map_or(told.to_owned(), |why| format!("{told}{NOT_APPLIED}{why}"));
        condition.message = plain(&told, MESSAGE_BYTES_MAX);
    }
    status
}

/// Returns whether a status says that its revision's Job ended: in success, or in a failure of the Job's own.
pub fn tells_an_end(status: &Status) -> bool {
    let reason = |type_: &str| {
        let condition = status.conditions.iter().find(|condition| condition.type_ == type_);
        condition.map(|condition| condition.reason.as_str())
    };
    let over =
        Stage::ALL.into_iter().any(|stage| stage.is_over() && status.state.as_deref() == Some(stage.name()));
    over && reason("JobStarted") != Some("WorkspaceTuningJobStatusPending")
}

/// Conditions of a status on their way to the next one.
pub struct Conditions {
    /// The conditions as they are now.
    pub list: Vec<Condition>,
    generation: Option<i64>,
    now: Timestamp,
}

impl Conditions {
    /// Returns the conditions that change at `now` and belong to that generation of the Workspace.
    pub fn of(list: Vec<Condition>, generation: Option<i64>, now: Timestamp) -> Conditions {
        Conditions { list, generation, now }
    }

    /// Removes the condition of that type.
    pub fn remove(&mut self, type_: &str) {
        self.list.retain(|condition| condition.type_ != type_);
    }

    fn holds(&self, type_: &str) -> bool {
        self.list.iter().any(|condition| condition.type_ == type_ && condition.status == "True")
    }

    /// Sets a condition. Its time changes only with its status, as Kubernetes' convention demands.
    pub fn set(&mut self, type_: &str, holds: bool, reason: &str, message: String) {
        let status = if holds { "True" } else { "False" };
        let old = self.list.iter().position(|condition| condition.type_ == type_);
        let since = old.map(|at| &self.list[at]).filter(|old| old.status == status);
        let condition = Condition {
            type_: type_.into(),
            status: status.into(),
            reason: reason.into(),
            message,
            observed_generation: self.generation,
            last_transition_time: since.map_or(Time(self.now), |old| old.last_transition_time.clone()),
        };
        match old {
            Some(at) => self.list[at] = condition,
            None => self.list.push(condition),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ended::Said;
    use super::*;

    fn seen(stage: Stage) -> Seen {
        Seen {
            stage,
            waiting: None,
            ended: None,
            failures: 0,
            speaker: None,
            running: 0,
            wanted: 1,
            nodes: Vec::new(),
            unplaced: 1,
            given_up: None,
            mute: None,
        }
    }

    fn report(seen: Seen) -> Report {
        Report { seen, progress: None, nodes: Nodes::default(), refused: None, stuck: false, warning: None }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn shown(status: &Status, type_: &str) -> String {
        let condition = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
        format!("{} {} {}", condition.status, condition.reason, condition.message)
    }

    /// KAITO's table of tuning's states.
    #[test]
    fn conditions_and_states_are_kaitos() {
        let told = |stage| {
            let status = status(&Workspace::default(), &report(seen(stage)), at(1));
            (
                status.state.clone().unwrap(),
                shown(&status, "JobStarted"),
                shown(&status, "WorkspaceSucceeded"),
            )
        };
        let table = [
            (
                Stage::Pending,
                "False WorkspaceTuningJobStatusPending tuning job has not started",
                "False workspacePending workspace is initializing, tuning job has not started",
            ),
            (
                Stage::Running,
                "True WorkspaceTuningJobStatusStarted tuning job has started",
                "False workspacePending workspace has not completed yet, tuning job is running",
            ),
            (
                Stage::Succeeded,
                "True WorkspaceTuningJobStatusStarted tuning job has completed",
                "True workspaceSucceeded workspace succeeds",
            ),
            (
                Stage::Failed,
                "False WorkspaceTuningJobStatusFailed tuning job failed",
                "False workspaceFailed workspace failed",
            ),
        ];
        for (stage, started, succeeded) in table {
            assert_eq!(told(stage), (stage.name().into(), started.into(), succeeded.into()));
        }
    }

    #[test]
    fn messages_say_what_is_known() {
        let ended = Ended {
            exit_code: 20,
            said: Said { message: Some("no answer".into()), ..Said::default() },
            ..Ended::default()
        };
        let mut retried = report(Seen { ended: Some(ended.clone()), failures: 2, ..seen(Stage::Running) });
        retried.progress =
            Progress::parse("{\"event\":\"step\",\"step\":3,\"loss\":2.5,\"eta_seconds\":90.0}");
        let text = message(&retried);
        assert!(text.contains("step 3, loss 2.5000, 1m30s left"), "{text}");
        assert!(text.ends_with("tried again after 2 failed: exit code 20 (network): no answer"), "{text}");
        let given_up = |why: &str| {
            report(Seen { ended: Some(ended.clone()), given_up: Some(why.into()), ..seen(Stage::Failed) })
        };
        assert_eq!(
            message(&given_up("PodFailurePolicy: x")),
            "workspace failed: exit code 20 (network): no answer"
        );
        let late = message(&given_up("DeadlineExceeded: too long"));
        assert_eq!(late, "workspace failed: exit code 20 (network): no answer; DeadlineExceeded: too long");
        let said = Said {
            image: Some("h/a:1".into()),
            digest: Some("sha256:ab".into()),
            step: Some(9),
            loss: Some(1.0),
            ..Said::default()
        };
        let done = report(Seen { ended: Some(Ended { said, ..Ended::default() }), ..seen(Stage::Succeeded) });
        assert_eq!(message(&done), "workspace succeeds: pushed h/a:1 (sha256:ab); 9 steps, loss 1.0000");
        assert_eq!(annotations(&done, 2)["hone.sh/digest"].as_deref(), Some("sha256:ab"));
        assert_eq!(annotations(&done, 2)["hone.sh/pushed"].as_deref(), Some("h/a@sha256:ab"));
        assert_eq!(annotations(&done, 2)["hone.sh/eta"], None);
        let next = annotations(&report(seen(Stage::Running)), 3);
        assert!(!next.contains_key("hone.sh/digest") && !next.contains_key("hone.sh/pushed"), "they stay");
        let refused = Report { refused: Some("bad".into()), ..report(seen(Stage::Running)) };
        assert!(message(&refused).ends_with("; the change is not applied: bad"));
        let stuck = Report { refused: Some("bad".into()), stuck: true, ..report(seen(Stage::Pending)) };
        assert_eq!((stage(&stuck), message(&stuck).as_str()), (Stage::Failed, "workspace failed: bad"));
    }

    #[test]
    fn an_image_without_its_tag() {
        for (image, bare) in
            [("h.example:5000/a/b:1", "h.example:5000/a/b"), ("h:5000/a", "h:5000/a"), ("a:1", "a")]
        {
            assert_eq!(without_tag(image), bare);
        }
    }

    #[test]
    fn a_change_after_the_end_does_not_undo_it() {
        let over = status(&Workspace::default(), &report(seen(Stage::Succeeded)), at(1));
        let told = after_end(&over, Some("bad"));
        assert!(tells_an_end(&told) && told.state == over.state);
        assert!(
            shown(&told, "WorkspaceSucceeded")
                .ends_with("workspace succeeds; the change is not applied: bad")
        );
        assert_eq!(after_end(&told, Some("worse")), after_end(&over, Some("worse")));
        assert_eq!(after_end(&told, None), over);
    }

    #[test]
    fn times_move_with_the_status_only() {
        let mut workspace = Workspace::default();
        let first = status(&workspace, &report(seen(Stage::Pending)), at(1));
        workspace.status = Some(first.clone());
        assert_eq!(status(&workspace, &report(seen(Stage::Pending)), at(2)), first, "nothing to write");
        let next = status(&workspace, &report(seen(Stage::Running)), at(3));
        let time = |type_: &str| {
            next.conditions.iter().find(|condition| condition.type_ == type_).unwrap().last_transition_time.0
        };
        assert_eq!((time("JobStarted"), time("WorkspaceSucceeded")), (at(3), at(1)));
    }

    #[test]
    fn what_no_longer_holds_is_taken_away() {
        let mut workspace = Workspace::default();
        let mut waits = report(seen(Stage::Pending));
        waits.nodes = Nodes { ready: Some(0), claim: Some((false, "asked for".into())) };
        workspace.status = Some(status(&workspace, &waits, at(1)));
        let mut done = report(seen(Stage::Succeeded));
        done.seen.nodes = vec!["n".into()];
        done.seen.unplaced = 0;
        let ended = status(&workspace, &done, at(2));
        assert!(ended.conditions.iter().all(|condition| condition.type_ != "NodeClaimReady"));
        assert!(shown(&ended, "ResourceReady").ends_with("ran on n"));
        workspace.status = Some(ended.clone());
        (done.seen.nodes, done.seen.unplaced) = (Vec::new(), 1);
        assert_eq!(status(&workspace, &done, at(3)).conditions, ended.conditions, "its pod is gone");
        let never = status(&Workspace::default(), &report(seen(Stage::Failed)), at(1));
        assert!(never.conditions.iter().all(|condition| condition.type_ != "ResourceReady"));
    }

    #[test]
    fn a_set_is_ready_once_all_its_pods_have_a_node() {
        let mut workspace = Workspace::default();
        workspace.resource.count = Some(3);
        let mut part = report(Seen { wanted: 3, running: 1, unplaced: 1, ..seen(Stage::Running) });
        part.seen.nodes = vec!["a".into(), "b".into()];
        let told = status(&workspace, &part, at(1));
        assert_eq!((told.target_node_count, &told.worker_nodes), (Some(3), &part.seen.nodes));
        assert_eq!(
            shown(&told, "ResourceReady"),
            "False workspaceResourceStatusPending runs on a, b; 1 pod has no node yet"
        );
        assert!(message(&part).ends_with("tuning job is running; 1 of 3 pods run"), "{}", message(&part));
        part.seen = Seen { running: 3, unplaced: 0, ..part.seen };
        assert!(message(&part).ends_with("tuning job is running"));
        assert!(shown(&status(&workspace, &part, at(2)), "ResourceReady").ends_with("runs on a, b"));
    }

    #[test]
    fn an_end_is_not_a_refusal() {
        let of = |report: &Report| tells_an_end(&status(&Workspace::default(), report, at(1)));
        assert!(of(&report(seen(Stage::Failed))) && of(&report(seen(Stage::Succeeded))));
        let refused = Report { refused: Some("quota".into()), stuck: true, ..report(seen(Stage::Pending)) };
        assert!(!of(&refused) && !of(&report(seen(Stage::Running))));
        let mut last = report(Seen { ended: Some(Ended::default()), ..seen(Stage::Running) });
        assert!(!message(&last).contains("tried again"), "its last pod ended well");
        last.warning = Some("FailedMount: no Secret".into());
        assert!(message(&last).contains("waiting: FailedMount: no Secret"));
    }
}
