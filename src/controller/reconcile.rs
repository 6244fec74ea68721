//! One Workspace, looked at from nothing: what there should be is made, what there is is told. Doing it twice changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams};
use kube::runtime::controller::Action;
use kube::runtime::events::{Event, EventType};
use kube::{Client, Resource};
use serde_json::{Value, json};

use super::observe::{self, Seen, Stage};
use super::progress::{self, Progress};
use super::status::{self, Nodes, Report};
use super::{Context, FIELD_MANAGER, nodes, revision};
use crate::fault::Fault;
use crate::workspace::annotations::{self, PREFIX};
use crate::workspace::files::entry;
use crate::workspace::{
    Asked, MANAGED_BY, MANAGER, Method, REVISION, Rendered, WORKSPACE_LABEL, Workspace, config_name,
    inputs_hash, render, validate,
};

/// KAITO's finalizer: a Workspace that has it is its controller's.
const KAITO_FINALIZER: &str = "workspace.finalizer.kaito.sh";
/// Ours, while a node was asked for.
const FINALIZER: &str = "hone.sh/nodes";
/// How often a running training is looked at.
const RUNNING: Duration = Duration::from_secs(30);
/// How often anything else is, besides when it changes.
const RESTING: Duration = Duration::from_secs(600);
/// While something is on its way out.
const SOON: Duration = Duration::from_secs(2);

pub async fn reconcile(workspace: Arc<Workspace>, context: Arc<Context>) -> kube::Result<Action> {
    let timer = context.metrics.started();
    let result = Reconciler::new(&workspace, &context).run().await;
    context.metrics.ended(timer, result.is_ok());
    result
}

struct Reconciler<'a> {
    workspace: &'a Workspace,
    context: &'a Context,
    client: &'a Client,
}

/// What is to be done, or why it cannot.
enum Wanted {
    Job { rendered: Box<Rendered>, revision: i64 },
    Refused(Fault),
}

impl<'a> Reconciler<'a> {
    fn new(workspace: &'a Workspace, context: &'a Context) -> Reconciler<'a> {
        Reconciler { workspace, context, client: &context.client }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), self.workspace.namespace())
    }

    async fn run(&self) -> kube::Result<Action> {
        if self.is_not_ours() {
            self.context.metrics.forget(self.workspace);
            return Ok(Action::await_change());
        }
        if self.workspace.metadata.deletion_timestamp.is_some() {
            return self.end().await;
        }
        let job = self.api::<Job>().get_opt(self.workspace.name()).await?;
        if job.as_ref().is_some_and(|job| !self.made(job)) {
            return self.refuse_foreign().await;
        }
        match self.wanted().await? {
            Wanted::Refused(fault) => self.tell(job.as_ref(), 0, Some(fault.to_string())).await,
            Wanted::Job { rendered, revision } => self.bring(job, *rendered, revision).await,
        }
    }

    fn is_not_ours(&self) -> bool {
        let ignored = annotations::read(self.workspace).is_ok_and(|options| options.ignore);
        let kaitos = self.finalizers().iter().any(|finalizer| finalizer == KAITO_FINALIZER);
        self.workspace.tuning.is_none() || ignored || kaitos || self.context.kaito_is_here()
    }

    fn finalizers(&self) -> &[String] {
        self.workspace.metadata.finalizers.as_deref().unwrap_or_default()
    }

    /// Whether the Job is one that this controller made of this very Workspace.
    fn made(&self, job: &Job) -> bool {
        let ours = job.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY));
        let owners = job.metadata.owner_references.iter().flatten();
        let owner = owners.into_iter().find(|owner| owner.controller == Some(true));
        let same = owner.is_some_and(|owner| Some(&owner.uid) == self.workspace.metadata.uid.as_ref());
        ours.is_some_and(|manager| manager == MANAGER) && same
    }

    async fn refuse_foreign(&self) -> kube::Result<Action> {
        let told = format!(
            "Job {} is not of this Workspace: rename the Workspace, or remove the Job",
            self.workspace.name()
        );
        self.tell(None, 0, Some(told)).await
    }

    /// Inputs -> the Job that there should be. A new revision is written down before its Job is made.
    async fn wanted(&self) -> kube::Result<Wanted> {
        let name = config_name(self.workspace);
        let map = self.api::<ConfigMap>().get_opt(&name).await?;
        let config = match map.as_ref().map(|map| entry(map, &name)).transpose() {
            Ok(config) => config,
            Err(fault) => return Ok(Wanted::Refused(fault)),
        };
        let revisions = self.api();
        let known = revision::newest(&revisions, self.workspace.name()).await?;
        let default =
            Method::named(&self.workspace.tuning.as_ref().expect("it tunes").method).map(Method::config);
        let hash = inputs_hash(self.workspace, config.or(default).unwrap_or_default());
        let is_known = known.as_ref().is_some_and(|known| known.hash == hash);
        let number = known.as_ref().map_or(0, |known| known.number) + i64::from(!is_known);
        if let Some(old) = known.as_ref().filter(|_| !is_known).and_then(|known| known.workspace.as_ref()) {
            let own_model = annotations::read(self.workspace).is_ok_and(|options| options.model.is_some());
            if let Err(fault) = validate::update(old, self.workspace, own_model) {
                return Ok(Wanted::Refused(fault));
            }
        }
        let asked =
            Asked { workspace: self.workspace, config, settings: &self.context.settings, revision: number };
        match render(&asked) {
            Err(fault) => Ok(Wanted::Refused(fault)),
            Ok(rendered) => {
                if !is_known {
                    revision::add(&revisions, self.workspace, &hash, number).await?;
                }
                Ok(Wanted::Job { rendered: Box::new(rendered), revision: number })
            }
        }
    }

    async fn bring(&self, job: Option<Job>, rendered: Rendered, revision: i64) -> kube::Result<Action> {
        let made_from = |job: &Job| job.metadata.annotations.as_ref()?.get(REVISION)?.parse::<i64>().ok();
        match job {
            // One that had ended before somebody deleted it, or its time to live did: its end stays what it was.
            Some(job)
                if job.metadata.deletion_timestamp.is_some()
                    && made_from(&job) == Some(revision)
                    && (observe::observe(Some(&job), &[]).stage.is_over()
                        || self.was_done(revision).await?) =>
            {
                Ok(Action::requeue(SOON))
            }
            Some(job) if job.metadata.deletion_timestamp.is_some() => {
                self.tell(None, revision, None).await?;
                Ok(Action::requeue(SOON))
            }
            Some(job) if made_from(&job) != Some(revision) => {
                let parameters = DeleteParams::foreground();
                ignore(404, self.api::<Job>().delete(self.workspace.name(), &parameters).await.map(|_| ()))?;
                self.event(
                    EventType::Normal,
                    "Rerun",
                    &format!("revision {revision}: the inputs have changed"),
                )
                .await;
                self.tell(None, revision, None).await?;
                Ok(Action::requeue(SOON))
            }
            Some(job) => self.tell(Some(&job), revision, None).await,
            None if self.was_done(revision).await? => Ok(Action::requeue(RESTING)),
            None => {
                self.make(rendered, revision).await?;
                self.tell(None, revision, None).await
            }
        }
    }

    /// A Job that ended may be gone by its time to live; it is not done again. The server is asked, since what a watch brought
    /// may be older than the Job's end. A Workspace that is gone wants nothing.
    async fn was_done(&self, revision: i64) -> kube::Result<bool> {
        let Some(workspace) = self.api::<Workspace>().get_opt(self.workspace.name()).await? else {
            return Ok(true);
        };
        let state = workspace.status.as_ref().and_then(|status| status.state.as_deref());
        let over = state
            .is_some_and(|state| Stage::ALL.iter().any(|stage| stage.is_over() && stage.name() == state));
        Ok(over && workspace.annotation(&format!("{PREFIX}revision")) == Some(&revision.to_string()))
    }

    async fn make(&self, rendered: Rendered, revision: i64) -> kube::Result<()> {
        if let Some(map) = &rendered.config_map {
            // Somebody else may have made it in between; theirs stays.
            ignore(409, self.api::<ConfigMap>().create(&PostParams::default(), map).await.map(|_| ()))?;
        }
        if nodes::wanted(self.workspace, self.context.provider) {
            self.finalizer(true).await?;
            nodes::ask(self.client, self.workspace, self.context.provider, self.context.settings.cloud)
                .await?;
        }
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        self.api::<Job>().patch(self.workspace.name(), &parameters, &Patch::Apply(&rendered.job)).await?;
        let mut told = format!("Job {} is made from revision {revision}", self.workspace.name());
        for warning in &rendered.warnings {
            told += &format!("; {warning}");
        }
        let kind = if rendered.warnings.is_empty() { EventType::Normal } else { EventType::Warning };
        self.event(kind, "JobCreated", &told).await;
        Ok(())
    }

    /// Writes what is seen, if it is new. `refused`: what keeps the Workspace as it is now from being done.
    async fn tell(&self, job: Option<&Job>, revision: i64, refused: Option<String>) -> kube::Result<Action> {
        let seen = self.see(job).await?;
        let progress = self.progress(&seen).await;
        let over = seen.stage.is_over();
        if over && nodes::wanted(self.workspace, self.context.provider) {
            nodes::give_back(self.client, self.workspace, self.context.provider).await?;
            self.finalizer(false).await?;
        }
        let nodes = match over {
            true => Nodes::default(),
            false => nodes::look(self.client, self.workspace, self.context.provider).await?,
        };
        let stuck = refused.is_some() && job.is_none();
        let report = Report { seen, progress, nodes, refused, stuck };
        // The state first: with it, the annotation of a revision says that this revision is done.
        self.write(&report).await?;
        self.annotate(status::annotations(&report, revision)).await?;
        Ok(match status::stage(&report) {
            Stage::Running => Action::requeue(RUNNING),
            _ => Action::requeue(RESTING),
        })
    }

    async fn see(&self, job: Option<&Job>) -> kube::Result<Seen> {
        if job.is_none() {
            return Ok(observe::observe(None, &[]));
        }
        let selected = ListParams::default()
            .labels(&format!("{WORKSPACE_LABEL}={},{MANAGED_BY}={MANAGER}", self.workspace.name()));
        let mut pods = self.api::<Pod>().list(&selected).await?.items;
        // Those of an older revision may still be going.
        let uid = job.and_then(|job| job.metadata.uid.clone());
        pods.retain(|pod| {
            let mut owners = pod.metadata.owner_references.iter().flatten();
            owners.any(|owner| Some(&owner.uid) == uid.as_ref())
        });
        Ok(observe::observe(job, &pods))
    }

    /// A log that cannot be read is no reason to fail.
    async fn progress(&self, seen: &Seen) -> Option<Progress> {
        let pod = seen.running.as_deref().filter(|_| !seen.stage.is_over())?;
        let parameters = LogParams { tail_lines: Some(progress::LINES), ..LogParams::default() };
        let log = self.api::<Pod>().logs(pod, &parameters).await.ok()?;
        Progress::parse(&log)
    }

    async fn annotate(&self, mut wanted: BTreeMap<String, Option<String>>) -> kube::Result<()> {
        if let Some(Some(revision)) = wanted.get(&format!("{PREFIX}revision")).cloned() {
            wanted.insert(REVISION.into(), Some(revision));
        } else {
            // Of the Job that goes on.
            wanted.remove(&format!("{PREFIX}revision"));
        }
        let changed: BTreeMap<&String, &Option<String>> = wanted
            .iter()
            .filter(|(name, value)| self.workspace.annotation(name) != value.as_deref())
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        let patch = json!({"metadata": {"annotations": changed}});
        self.patch(&patch).await
    }

    async fn patch(&self, patch: &Value) -> kube::Result<()> {
        let api = self.api::<Workspace>();
        api.patch(self.workspace.name(), &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ())
    }

    async fn write(&self, report: &Report) -> kube::Result<()> {
        let status = status::status(self.workspace, report, Timestamp::now());
        let stage = status::stage(report);
        self.context.metrics.saw(self.workspace, stage);
        let old = self.workspace.status.as_ref();
        if old == Some(&status) {
            return Ok(());
        }
        let patch = json!({"status": status});
        let api = self.api::<Workspace>();
        api.patch_status(self.workspace.name(), &PatchParams::default(), &Patch::Merge(&patch)).await?;
        let before = old.and_then(|status| status.state.as_deref());
        if before != Some(stage.name()) {
            let kind = if stage == Stage::Failed { EventType::Warning } else { EventType::Normal };
            self.event(kind, stage.name(), &status::message(report)).await;
        }
        Ok(())
    }

    /// The last words: the node goes back, then the Workspace may go. Its Job goes by its owner.
    async fn end(&self) -> kube::Result<Action> {
        if self.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
            nodes::give_back(self.client, self.workspace, self.context.provider).await?;
            self.finalizer(false).await?;
        }
        self.context.metrics.forget(self.workspace);
        Ok(Action::await_change())
    }

    /// With the version that was read: a list is replaced whole, and others may have theirs in it.
    async fn finalizer(&self, there: bool) -> kube::Result<()> {
        let mut list = self.finalizers().to_vec();
        let had = list.iter().any(|finalizer| finalizer == FINALIZER);
        if had == there {
            return Ok(());
        }
        list.retain(|finalizer| finalizer != FINALIZER);
        list.extend(there.then(|| FINALIZER.to_owned()));
        let version = &self.workspace.metadata.resource_version;
        self.patch(&json!({"metadata": {"finalizers": list, "resourceVersion": version}})).await
    }

    /// An event that cannot be written is no reason to fail.
    async fn event(&self, type_: EventType, reason: &str, note: &str) {
        /// LIMIT: of the API.
        const NOTE_BYTES_MAX: usize = 1000;
        let note = Some(crate::report::clean::clean(note, NOTE_BYTES_MAX));
        let event = Event { type_, reason: reason.into(), note, action: "Tune".into(), secondary: None };
        if let Err(error) = self.context.recorder.publish(&event, &self.workspace.object_ref(&())).await {
            tracing::warn!(target: "hone", "event {reason}: {error}");
        }
    }
}

fn ignore(code: u16, result: kube::Result<()>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == code => Ok(()),
        other => other,
    }
}
