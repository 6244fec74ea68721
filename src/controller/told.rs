//! A Job and its pods -> the Workspace's status, annotations and Events about them, and the time of the next look.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{LogParams, Patch, PatchParams};
use kube::runtime::controller::Action;
use serde_json::json;

use super::events::Weight;
use super::observe::{self, Seen, Stage, is_leaving};
use super::progress::{self, Progress};
use super::reconciler::{RESTING, Reconciler, ignore};
use super::revision::Inputs;
use super::status::{self, Report};
use super::{nodes, words};
use crate::workspace::Workspace;
use crate::workspace::annotations::{self, PREFIX};

/// The first and the longest pause between two reads of a running pod's log: three reads in the first two minutes,
/// later ten an hour.
const PROGRESS: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(360));

impl Reconciler<'_> {
    /// Writes why the Workspace cannot be carried out, and tries again after growing pauses.
    pub async fn refuse(&self, job: Option<&Job>, why: String) -> kube::Result<Action> {
        let number = job.and_then(Inputs::of).map_or(0, |of| of.number);
        let before = self.told();
        let ended = self.workspace.status.as_ref().is_some_and(status::tells_an_end);
        if job.is_none() && ended {
            self.tell_after_end(&self.workspace, Some(&why)).await?;
            if !before.contains(&words::plain(&why, 256)) {
                self.event(Weight::Warning, "Refused", &why).await;
            }
            return Ok(Action::requeue(self.pause_of_refusals()));
        }
        self.tell(job, number, Some(why.clone())).await?;
        if job.is_some() && !before.contains(&words::plain(&why, 256)) {
            self.event(Weight::Warning, "Refused", &why).await;
        }
        Ok(Action::requeue(self.pause_of_refusals()))
    }

    /// Writes the status if it changed. `refused`: why the Workspace as it is now cannot be carried out.
    pub async fn tell(
        &self,
        job: Option<&Job>,
        revision: i64,
        refused: Option<String>,
    ) -> kube::Result<Action> {
        let stuck = refused.is_some() && job.is_none();
        if refused.is_none() {
            self.context.note(&self.workspace, |notes| notes.failures = 0);
        }
        let seen = self.see(job);
        let over = seen.stage.is_over();
        let progress = self.progress(&seen).await;
        let warning = self.warning(&seen).await?;
        let provider = self.context.presence().provider;
        let claims = self.context.claims.of(&self.owner);
        let waits = job.is_some_and(|job| !is_leaving(job)) && !over && seen.running < seen.wanted;
        if waits
            && nodes::wanted(&self.workspace, provider)
            && nodes::lacks(&self.workspace, provider, &claims)
        {
            self.ask_for_node().await?;
        }
        if !over && !stuck && nodes::alive(&claims) > 0 {
            // Somebody may have removed the finalizer, without which a claim could stay behind.
            self.finalizer(true).await?;
        }
        let report = Report { nodes: self.nodes(&seen), seen, progress, refused, stuck, warning };
        // The state is written first: an annotation of a revision beside a final state means that this revision is
        // done.
        self.write(&report).await?;
        self.annotate(status::annotations(&report, revision)).await?;
        if over || report.stuck {
            self.give_back().await?;
        }
        if let Some(job) = job.filter(|_| over) {
            self.set_ttl(job).await?;
        }
        Ok(Action::requeue(self.next_look(&report)))
    }

    /// Writes the status of a Workspace that is over and whose Job is gone. `refused`: why a later change cannot be
    /// carried out, which does not undo the end.
    pub async fn tell_after_end(&self, now: &Workspace, refused: Option<&str>) -> kube::Result<()> {
        let Some(old) = &now.status else { return Ok(()) };
        self.context.metrics.saw(&self.workspace, old.state.as_deref().unwrap_or_default());
        let status = status::after_end(old, refused);
        if status != *old {
            self.write_status(&status).await?;
        }
        Ok(())
    }

    /// Returns the message of the status.
    pub fn told(&self) -> String {
        let conditions = self.workspace.status.iter().flat_map(|status| &status.conditions);
        let mut conditions = conditions.filter(|condition| condition.type_ == "WorkspaceSucceeded");
        conditions.next().map(|condition| condition.message.clone()).unwrap_or_default()
    }

    pub async fn write(&self, report: &Report) -> kube::Result<()> {
        let status = status::status(&self.workspace, report, Timestamp::now());
        let stage = status::stage(report);
        self.context.metrics.saw(&self.workspace, stage.name());
        let old = self.workspace.status.as_ref();
        if old == Some(&status) {
            return Ok(());
        }
        self.write_status(&status).await?;
        let before = old.and_then(|status| status.state.as_deref());
        let told = status::message(report);
        if before != Some(stage.name()) || (stage == Stage::Failed && self.told() != told) {
            let weight = if stage == Stage::Failed { Weight::Warning } else { Weight::Normal };
            self.event(weight, stage.name(), &told).await;
        } else if let Some(warning) =
            report.warning.as_ref().filter(|warning| !self.told().contains(*warning))
        {
            self.event(Weight::Warning, "Waiting", warning).await;
        }
        Ok(())
    }

    /// Returns the pause until the next read of the log or of Events.
    fn next_look(&self, report: &Report) -> Duration {
        let due = self.context.note(&self.workspace, |notes| {
            let progress = notes.progress_due.left().filter(|_| report.seen.speaker.is_some());
            let warning = notes.warning_due.left().filter(|_| report.seen.mute.is_some());
            progress.into_iter().chain(warning).min()
        });
        due.map_or(RESTING, |due| due.min(RESTING).max(Duration::from_millis(100)))
    }

    fn see(&self, job: Option<&Job>) -> Seen {
        let Some(job) = job else { return observe::observe(None, &[], false) };
        let mut pods: Vec<Arc<Pod>> = self.context.pods.of(&self.owner);
        // Pods of an older revision may still be terminating.
        let uid = job.metadata.uid.as_ref();
        pods.retain(|pod| {
            let mut owners = pod.metadata.owner_references.iter().flatten();
            owners.any(|owner| Some(&owner.uid) == uid)
        });
        let state = self.workspace.status.as_ref().and_then(|status| status.state.as_deref());
        let revision =
            self.workspace.annotation(&format!("{PREFIX}revision")).and_then(|text| text.parse().ok());
        let same = Inputs::of(job).map(|of| of.number) == revision;
        observe::observe(Some(job), &pods, same && state == Some(Stage::Running.name()))
    }

    /// Returns the progress from the end of the pod's log. A log that cannot be read is no error.
    async fn progress(&self, seen: &Seen) -> Option<Progress> {
        let Some(pod) = seen.speaker.as_deref().filter(|_| !seen.stage.is_over()) else {
            self.context.note(&self.workspace, |notes| {
                notes.progress = None;
                notes.progress_due = Default::default();
            });
            return None;
        };
        let due =
            self.context.note(&self.workspace, |notes| notes.progress_due.is_now(PROGRESS.0, PROGRESS.1));
        if due {
            let parameters = LogParams { tail_lines: Some(progress::LINES), ..LogParams::default() };
            let log = self.api::<Pod>().logs(pod, &parameters).await.unwrap_or_default();
            if let Some(progress) = Progress::parse(&log) {
                self.context.note(&self.workspace, |notes| notes.progress = Some(progress));
            }
        }
        self.context.note(&self.workspace, |notes| notes.progress.clone())
    }

    /// Sets the Job's time to live after its end was written.
    async fn set_ttl(&self, job: &Job) -> kube::Result<()> {
        let ttl = annotations::read(&self.workspace).ok().and_then(|options| options.ttl_seconds);
        let has = job.spec.as_ref().and_then(|spec| spec.ttl_seconds_after_finished);
        if ttl.is_none() || ttl == has || is_leaving(job) {
            return Ok(());
        }
        let patch = json!({"spec": {"ttlSecondsAfterFinished": ttl}});
        let api = self.api::<Job>();
        let patched = api.patch(self.workspace.name(), &PatchParams::default(), &Patch::Merge(&patch)).await;
        ignore(404, patched.map(|_| ()))
    }
}
