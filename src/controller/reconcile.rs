//! One Workspace and the state of the cluster -> the missing objects are created and the status is written. Doing it
//! twice changes nothing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use kube::api::{Api, DeleteParams, LogParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, Resource};
use serde_json::{Value, json};

use super::events::{self, Weight};
use super::observe::{self, Seen, Stage};
use super::progress::{self, Progress};
use super::revision::{self, HASH, Known};
use super::serve;
use super::status::{self, Nodes, Report};
use super::{Context, FIELD_MANAGER, Owner, locked, no_owner, nodes, owner_of, words};
use crate::backoff;
use crate::workspace::annotations::{self, PREFIX};
use crate::workspace::crd::INSTANCE_DEFAULT;
use crate::workspace::files::entry;
use crate::workspace::kind::{Inference, Status};
use crate::workspace::several;
use crate::workspace::{
    Asked, MANAGED_BY, MANAGER, Method, REVISION, Rendered, Workspace, config_name, inputs_hash, render,
    validate,
};

/// KAITO's finalizer: a Workspace that has it is its controller's.
const KAITO_FINALIZER: &str = "workspace.finalizer.kaito.sh";
/// hone's finalizer while a node claim exists.
const FINALIZER: &str = "hone.sh/nodes";
/// How often a Workspace is reconciled if nothing changes. It costs no request.
pub(super) const RESTING: Duration = Duration::from_secs(600);
/// The pause while an object is being deleted.
const SOON: Duration = Duration::from_secs(2);
/// The first and the longest pause between two reads of a running pod's log: two reads in three minutes, later ten an
/// hour.
const PROGRESS: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(360));
/// The first and the longest pause between two reads of the Warnings about a pod that does not start.
const WARNINGS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(240));
/// The first pause after a refusal of the API server, which doubles up to the longest.
const REFUSED: Duration = Duration::from_secs(6);
const REFUSED_MAX: Duration = Duration::from_secs(360);
/// Failures in a row after which the status names the error.
const FAILURES_TOLD: u32 = 3;

/// Brings one Workspace to what it asks for, as far as this is possible now, and says when to look again.
///
/// # Errors
/// Those of the API server; the status names one that repeats.
pub async fn reconcile(workspace: Arc<Workspace>, context: Arc<Context>) -> kube::Result<Action> {
    let timer = context.metrics.started();
    let workspace = newest(workspace, &context);
    let reconciler = Reconciler::new(&workspace, &context);
    let result = match reconciler.run().await {
        Err(error) if words::is_terminating(&error) => Ok(Action::requeue(RESTING)),
        Err(error) => Err(reconciler.tell_trouble(error).await),
        Ok(action) => Ok(action),
    };
    context.metrics.ended(timer, result.is_ok());
    result
}

pub(super) struct Reconciler<'a> {
    /// The Workspace as it was meant, without the default of an older version.
    pub workspace: Cow<'a, Workspace>,
    /// What all reconciliations share.
    pub context: &'a Context,
    client: &'a Client,
    /// Namespace and name of the Workspace.
    pub owner: Owner,
}

/// The newer of the watch's copy and the version that this controller last wrote. An older copy would be written again.
fn newest(workspace: Arc<Workspace>, context: &Context) -> Arc<Workspace> {
    let version = |workspace: &Workspace| workspace.metadata.resource_version.as_ref()?.parse::<u64>().ok();
    let own = context.note(&workspace, |notes| notes.own.clone());
    match own {
        Some(own) if version(&own) > version(&workspace) => own,
        _ => {
            context.note(&workspace, |notes| notes.own = None);
            workspace
        }
    }
}

/// Revision and hash of the inputs of a Job.
#[derive(Clone, Debug, PartialEq)]
struct Inputs {
    number: i64,
    hash: String,
}

impl Inputs {
    /// The inputs that the Job's annotations name. A Job of an older hone has no hash.
    fn of(job: &Job) -> Option<Inputs> {
        let annotations = job.metadata.annotations.as_ref()?;
        let number = annotations.get(REVISION)?.parse().ok()?;
        Some(Inputs { number, hash: annotations.get(HASH).cloned().unwrap_or_default() })
    }

    fn made(&self, job: &Job) -> bool {
        Inputs::of(job)
            .is_some_and(|of| of.number == self.number && (of.hash == self.hash || of.hash.is_empty()))
    }
}

/// The inputs that the Job should have, and what is known of the newest revision.
struct Wanted {
    inputs: Inputs,
    known: Option<Known>,
    config: Option<Arc<ConfigMap>>,
}

fn is_leaving(job: &Job) -> bool {
    job.metadata.deletion_timestamp.is_some()
}

fn is_over(job: &Job) -> bool {
    observe::observe(Some(job), &[], false).stage.is_over()
}

impl<'a> Reconciler<'a> {
    fn new(workspace: &'a Workspace, context: &'a Context) -> Reconciler<'a> {
        let owner = owner_of(workspace);
        Reconciler { workspace: Cow::Borrowed(workspace), context, client: &context.client, owner }
    }

    /// The API of a kind of object in the Workspace's namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), self.workspace.namespace())
    }

    async fn run(&self) -> kube::Result<Action> {
        if self.is_not_ours() {
            self.context.forget(&self.workspace);
            return Ok(Action::await_change());
        }
        if self.workspace.metadata.deletion_timestamp.is_some() {
            return self.end().await;
        }
        match (self.workspace.tuning.is_some(), self.other_kind().await?) {
            (true, None) => self.tune().await,
            (true, Some(why)) => serve::bring(self, Some(why)).await,
            (false, None) => serve::bring(self, None).await,
            (false, Some(why)) => {
                let job = self.context.jobs.find(&self.owner, self.workspace.name());
                self.refuse(job.filter(|job| self.made(job)).as_deref(), why).await
            }
        }
    }

    /// Why the Workspace cannot be what it says now: it tuned before and is to serve, or the other way round. KAITO's
    /// webhook refuses that; without one, what it was goes on.
    async fn other_kind(&self) -> kube::Result<Option<String>> {
        let was_other = match self.workspace.tuning.is_some() {
            true => {
                let set = self.context.sets.find(&self.owner, self.workspace.name());
                set.is_some_and(|set| self.owns(set.as_ref()))
            }
            false => {
                let begun = self.workspace.annotation(&format!("{PREFIX}revision")).is_some();
                let job = self.context.jobs.find(&self.owner, self.workspace.name());
                job.is_some_and(|job| self.made(&job)) || (begun && self.known().await?.is_some())
            }
        };
        const WHY: &str = "tuning: it cannot be added or removed; make another Workspace";
        Ok(was_other.then(|| WHY.to_owned()))
    }

    fn is_not_ours(&self) -> bool {
        self.context.presence().kaito || is_left_alone(&self.workspace)
    }

    fn finalizers(&self) -> &[String] {
        self.workspace.metadata.finalizers.as_deref().unwrap_or_default()
    }

    /// Whether an object belongs to this very Workspace.
    pub fn owns<K: kube::ResourceExt>(&self, object: &K) -> bool {
        let uid = self.workspace.metadata.uid.as_ref();
        object.owner_references().iter().any(|owner| Some(&owner.uid) == uid)
    }

    /// Whether this controller created the Job for this very Workspace.
    fn made(&self, job: &Job) -> bool {
        let ours = job.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY));
        let owners = job.metadata.owner_references.iter().flatten();
        let owner = owners.into_iter().find(|owner| owner.controller == Some(true));
        let same = owner.is_some_and(|owner| Some(&owner.uid) == self.workspace.metadata.uid.as_ref());
        ours.is_some_and(|manager| manager == MANAGER) && same
    }

    /// Whether the Job belongs to an earlier Workspace of this name. The garbage collector deletes it.
    fn is_a_predecessors(&self, job: &Job) -> bool {
        let ours = job.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY));
        let owners = job.metadata.owner_references.iter().flatten();
        ours.is_some_and(|manager| manager == MANAGER)
            && owners.into_iter().any(|owner| owner.kind == crate::workspace::kind::KIND)
    }

    async fn tune(&self) -> kube::Result<Action> {
        let known = self.known().await?;
        let old = known.as_ref().and_then(|known| known.workspace.as_ref());
        if let Some(effective) = without_a_versions_default(&self.workspace, old) {
            let effective =
                Reconciler { workspace: Cow::Owned(effective), owner: self.owner.clone(), ..*self };
            return effective.bring(known).await;
        }
        self.bring(known).await
    }

    /// The newest revision; it is read once.
    async fn known(&self) -> kube::Result<Option<Known>> {
        if let Some(known) = self.context.note(&self.workspace, |notes| notes.known.clone()) {
            return Ok(known);
        }
        let known = revision::newest(&self.api(), &self.workspace).await?;
        self.context.note(&self.workspace, |notes| notes.known = Some(known.clone()));
        Ok(known)
    }

    /// The ConfigMap in force. Its text is read again only if its version changed.
    pub async fn config(&self) -> kube::Result<Option<Arc<ConfigMap>>> {
        let place = (self.workspace.namespace().to_owned(), config_name(&self.workspace));
        if place.1.is_empty() {
            return Ok(None);
        }
        let version =
            self.context.configs.find(&place, &place.1).and_then(|map| map.metadata.resource_version.clone());
        if version.is_none() && self.context.healths.is_fine("configmaps") {
            return Ok(None);
        }
        let kept = locked(&self.context.texts).get(&place).cloned();
        if let Some(kept) = kept.filter(|kept| version.is_some() && kept.metadata.resource_version == version)
        {
            return Ok(Some(kept));
        }
        let map = self.api::<ConfigMap>().get_opt(&place.1).await?.map(Arc::new);
        if let Some(map) = &map {
            locked(&self.context.texts).insert(place, map.clone());
        }
        Ok(map)
    }

    async fn bring(&self, known: Option<Known>) -> kube::Result<Action> {
        let job = self.context.jobs.find(&self.owner, self.workspace.name()).filter(|job| self.made(job));
        let name = config_name(&self.workspace);
        let config = self.config().await?;
        let text = match config.as_deref().map(|map| entry(map, &name)).transpose() {
            Ok(text) => text,
            Err(fault) => return self.refuse(job.as_deref(), words::of_fault(fault)).await,
        };
        let method = self.workspace.tuning.as_ref().map(|tuning| tuning.method.as_str()).unwrap_or_default();
        let default = Method::named(method).map(Method::config);
        let hash = inputs_hash(&self.workspace, text.or(default).unwrap_or_default());
        let is_known = known.as_ref().is_some_and(|known| known.hash == hash);
        let number = known.as_ref().map_or(0, |known| known.number) + i64::from(!is_known);
        let wanted = Wanted { inputs: Inputs { number, hash }, known, config };
        match job {
            Some(job) => self.with_job(&job, wanted).await,
            None => self.without_job(wanted).await,
        }
    }

    async fn with_job(&self, job: &Job, wanted: Wanted) -> kube::Result<Action> {
        let of = Inputs::of(job);
        let number = of.as_ref().map_or(0, |of| of.number);
        if wanted.inputs.made(job) {
            if several::is_set(&self.workspace)
                && !is_leaving(job)
                && !is_over(job)
                && self.context.healths.is_fine("services")
                && let Some(why) = self.bring_service(&several::service(&self.workspace)).await?
            {
                return self.refuse(Some(job), why).await;
            }
            // The revision is recorded after the Job was created, which an earlier process may have missed.
            self.write_down(&wanted).await?;
            if is_leaving(job) && !is_over(job) {
                // The next reconciliation finds no Job and creates it again.
                return self.tell(None, number, None).await.map(|_| Action::requeue(SOON));
            }
            return self.tell(Some(job), number, None).await;
        }
        if is_leaving(job) {
            let shown = Some(job).filter(|job| is_over(job));
            return self.tell(shown, number, None).await.map(|_| Action::requeue(SOON));
        }
        let rendered = match self.render(&wanted) {
            Ok(rendered) => rendered,
            Err(why) => return self.refuse(Some(job), why).await,
        };
        if let Some(why) = self.would_be_refused(&rendered.job).await? {
            return self.refuse(Some(job), why).await;
        }
        let parameters = DeleteParams {
            preconditions: Some(Preconditions { uid: job.metadata.uid.clone(), resource_version: None }),
            ..DeleteParams::foreground()
        };
        let deleted = self.api::<Job>().delete(self.workspace.name(), &parameters).await.map(|_| ());
        ignore(404, ignore(409, deleted))?;
        let told = format!("revision {}: the inputs have changed", wanted.inputs.number);
        self.event(Weight::Normal, "Rerun", &told).await;
        self.tell(None, number, None).await?;
        Ok(Action::requeue(SOON))
    }

    /// Handles a Workspace without a known Job: a finished one stays finished, a missing Job is created. The server is
    /// asked first, because the watch's copy may be old.
    async fn without_job(&self, wanted: Wanted) -> kube::Result<Action> {
        let Some(now) = self.api::<Workspace>().get_opt(self.workspace.name()).await? else {
            return Ok(Action::await_change());
        };
        let is_known = wanted.known.as_ref().is_some_and(|known| known.hash == wanted.inputs.hash);
        let number = wanted.inputs.number;
        let noted = now.annotation(&format!("{PREFIX}revision"));
        let made = noted == Some(&number.to_string());
        // `kubectl replace` drops the annotation; the status and the recorded revision stay.
        let over = now.status.as_ref().is_some_and(status::tells_an_end);
        if is_known && over && (made || noted.is_none()) {
            return self.stay_over(&now, number).await;
        }
        if let Some(job) = self.api::<Job>().get_opt(self.workspace.name()).await? {
            return match () {
                () if self.made(&job) => Box::pin(self.with_job(&job, wanted)).await,
                () if self.is_a_predecessors(&job) => {
                    self.tell(None, 0, None).await?;
                    Ok(Action::requeue(SOON))
                }
                () => self.refuse_foreign(&job).await,
            };
        }
        if is_known
            && made
            && let Some(action) = self.end_without_job(&wanted).await?
        {
            return Ok(action);
        }
        let rendered = match self.render(&wanted) {
            Ok(rendered) => rendered,
            Err(why) => return self.refuse(None, why).await,
        };
        if let Some(service) = &rendered.service
            && let Some(why) = self.bring_service(service).await?
        {
            return self.refuse(None, why).await;
        }
        match self.make(rendered, &wanted).await {
            Ok(job) => self.tell(Some(&job), number, None).await,
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Action::requeue(SOON)),
            Err(error) if words::is_terminating(&error) => Err(error),
            Err(error) => match words::refusal(&error) {
                Some(why) => self.refuse(None, format!("the API server refuses it: {why}")).await,
                None => Err(error),
            },
        }
    }

    /// Keeps the status of a Workspace whose end was written and whose Job is gone. Its node claims are deleted all the
    /// same.
    async fn stay_over(&self, now: &Workspace, revision: i64) -> kube::Result<Action> {
        self.tell_after_end(now, None).await?;
        self.annotate([(format!("{PREFIX}revision"), Some(revision.to_string()))].into()).await?;
        self.give_back().await?;
        Ok(Action::requeue(RESTING))
    }

    /// Writes the status of a Workspace that is over and whose Job is gone. `refused`: why a later change cannot be
    /// carried out, which does not undo the end.
    async fn tell_after_end(&self, now: &Workspace, refused: Option<&str>) -> kube::Result<()> {
        let Some(old) = &now.status else { return Ok(()) };
        self.context.metrics.saw(&self.workspace, old.state.as_deref().unwrap_or_default());
        let status = status::after_end(old, refused);
        if status != *old {
            self.write_status(&status).await?;
        }
        Ok(())
    }

    /// Writes the end of a Job that ended and was deleted while no controller ran. Its Events still name the end for an
    /// hour.
    async fn end_without_job(&self, wanted: &Wanted) -> kube::Result<Option<Action>> {
        let since = wanted.known.as_ref().and_then(|known| known.since);
        let (namespace, name) = (self.workspace.namespace(), self.workspace.name());
        let Some((well, told)) = events::end_of_job(self.client, namespace, name, since).await? else {
            return Ok(None);
        };
        let mut seen = observe::observe(None, &[], false);
        seen.stage = if well { Stage::Succeeded } else { Stage::Failed };
        seen.given_up = Some(format!("{told} (its Job was removed before its end was seen)"));
        let report = Report {
            seen,
            progress: None,
            nodes: Nodes::default(),
            refused: None,
            stuck: false,
            warning: None,
        };
        self.write(&report).await?;
        self.annotate(status::annotations(&report, wanted.inputs.number)).await?;
        self.give_back().await?;
        Ok(Some(Action::requeue(RESTING)))
    }

    fn render(&self, wanted: &Wanted) -> Result<Rendered, String> {
        let name = config_name(&self.workspace);
        let is_known = wanted.known.as_ref().is_some_and(|known| known.hash == wanted.inputs.hash);
        let old = wanted.known.as_ref().filter(|_| !is_known).and_then(|known| known.workspace.as_ref());
        if let Some(old) = old {
            let own_model = annotations::read(&self.workspace).is_ok_and(|options| options.model.is_some());
            validate::update(old, &self.workspace, own_model).map_err(words::of_fault)?;
        }
        let config =
            wanted.config.as_deref().map(|map| entry(map, &name)).transpose().map_err(words::of_fault)?;
        let asked = Asked {
            workspace: &self.workspace,
            config,
            settings: &self.context.settings,
            revision: wanted.inputs.number,
        };
        let mut rendered = render(&asked).map_err(words::of_fault)?;
        let annotations = rendered.job.metadata.annotations.get_or_insert_default();
        annotations.insert(HASH.into(), wanted.inputs.hash.clone());
        if let Some(spec) = rendered.job.spec.as_mut() {
            // The time to live is set once the end is written, so that no Job goes before its end was seen.
            spec.ttl_seconds_after_finished = None;
        }
        Ok(rendered)
    }

    /// Asks the API server whether it would accept a Job, before the running Job is deleted for it.
    async fn would_be_refused(&self, job: &Job) -> kube::Result<Option<String>> {
        let mut job = job.clone();
        job.metadata.generate_name = job.metadata.name.take().map(|name| name + "-");
        let parameters = PostParams { dry_run: true, field_manager: Some(FIELD_MANAGER.into()) };
        match self.api::<Job>().create(&parameters, &job).await {
            Ok(_) => Ok(None),
            // A webhook that supports no dry run answers so. The creation of the Job will tell.
            Err(kube::Error::Api(status)) if status.code == 400 => Ok(None),
            Err(error) => match words::refusal(&error) {
                Some(why) => Ok(Some(format!("the API server refuses it: {why}"))),
                None => Err(error),
            },
        }
    }

    async fn make(&self, rendered: Rendered, wanted: &Wanted) -> kube::Result<Job> {
        let revision = wanted.inputs.number;
        if let Some(map) = &rendered.config_map {
            // Somebody else may have created it in between; then theirs stays.
            ignore(409, self.api::<ConfigMap>().create(&PostParams::default(), map).await.map(|_| ()))?;
        }
        let parameters = PostParams { dry_run: false, field_manager: Some(FIELD_MANAGER.into()) };
        let job = self.api::<Job>().create(&parameters, &rendered.job).await?;
        self.write_down(wanted).await?;
        // A Job that is refused must not cost a node.
        self.ask_for_node().await?;
        let mut told = format!("Job {} is made from revision {revision}", self.workspace.name());
        for warning in &rendered.warnings {
            told += &format!("; {warning}");
        }
        let weight = if rendered.warnings.is_empty() { Weight::Normal } else { Weight::Warning };
        self.event(weight, "JobCreated", &told).await;
        Ok(job)
    }

    /// Creates the Service of a set unless it is there; returns why it cannot be there.
    async fn bring_service(&self, service: &Service) -> kube::Result<Option<String>> {
        let name = several::service_name(&self.workspace);
        let known = self.context.services.find(&self.owner, &name);
        if known.is_some_and(|service| self.owns(&*service)) {
            return Ok(None);
        }
        let parameters = PostParams { dry_run: false, field_manager: Some(FIELD_MANAGER.into()) };
        let api = self.api::<Service>();
        match api.create(&parameters, service).await {
            Ok(_) => return Ok(None),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => {
                return match words::refusal(&error) {
                    Some(why) if !words::is_terminating(&error) => {
                        Ok(Some(format!("the API server refuses its Service: {why}")))
                    }
                    _ => Err(error),
                };
            }
        }
        let Some(there) = api.get_opt(&name).await?.filter(|there| !self.owns(there)) else {
            return Ok(None);
        };
        self.wait_for_end_of(&there);
        Ok(Some(format!(
            "Service {name} is not of this Workspace: rename the Workspace, or remove the Service"
        )))
    }

    /// Records a revision once its Job exists, so that a refused revision leaves no trace.
    async fn write_down(&self, wanted: &Wanted) -> kube::Result<()> {
        let Inputs { number, hash } = &wanted.inputs;
        if wanted.known.as_ref().is_some_and(|known| known.hash == *hash && known.number == *number) {
            return Ok(());
        }
        revision::add(&self.api(), &self.workspace, hash, *number).await?;
        let known = Known {
            number: *number,
            hash: hash.clone(),
            workspace: Some(self.workspace.clone().into_owned()),
            since: Some(Timestamp::now()),
        };
        self.context.note(&self.workspace, |notes| notes.known = Some(Some(known)));
        Ok(())
    }

    /// Creates the node claims of the Workspace if Karpenter is there, also if earlier claims are gone.
    pub async fn ask_for_node(&self) -> kube::Result<()> {
        let provider = self.context.presence().provider;
        if !nodes::wanted(&self.workspace, provider) {
            return Ok(());
        }
        self.finalizer(true).await?;
        let pods = self.context.pods.of(&self.owner);
        let used = pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
        nodes::ask(self.client, &self.workspace, provider, self.context.settings.cloud, &used).await
    }

    /// Deletes the Workspace's node claims and removes the finalizer.
    pub async fn give_back(&self) -> kube::Result<()> {
        let noted = self.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
        if !noted && nodes::alive(&self.context.claims.of(&self.owner)) == 0 {
            return Ok(());
        }
        nodes::give_back(self.client, &self.owner, self.context.presence().provider).await?;
        self.finalizer(false).await
    }

    async fn refuse_foreign(&self, job: &Job) -> kube::Result<Action> {
        let told = format!(
            "Job {} is not of this Workspace: rename the Workspace, or remove the Job",
            self.workspace.name()
        );
        self.wait_for_end_of(job);
        self.refuse(None, told).await
    }

    /// Reconciles again when somebody else's object is gone, because only hone's own objects are watched.
    pub fn wait_for_end_of<K>(&self, object: &K)
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let waits = self.context.note(&self.workspace, |notes| notes.foreign.clone());
        if waits.swap(true, Ordering::Relaxed) {
            return;
        }
        let uid = object.meta().uid.clone().unwrap_or_default();
        let (api, name) = (self.api::<K>(), object.meta().name.clone().unwrap_or_default());
        let (triggers, owner) = (self.context.triggers.clone(), self.owner.clone());
        tokio::spawn(async move {
            // An error ends the wait, and the next reconciliation starts another.
            _ = await_condition(api, &name, conditions::is_deleted(&uid)).await;
            waits.store(false, Ordering::Relaxed);
            triggers.look_at(&owner);
        });
    }

    /// Writes why the Workspace cannot be carried out, and tries again after growing pauses.
    async fn refuse(&self, job: Option<&Job>, why: String) -> kube::Result<Action> {
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

    /// The pause before the next try; it doubles with each refusal in a row.
    pub fn pause_of_refusals(&self) -> Duration {
        let failures = self.context.note(&self.workspace, |notes| {
            notes.failures += 1;
            notes.failures
        });
        backoff::pause(REFUSED, REFUSED_MAX, failures)
    }

    /// The message of the status.
    fn told(&self) -> String {
        let conditions = self.workspace.status.iter().flat_map(|status| &status.conditions);
        let mut conditions = conditions.filter(|condition| condition.type_ == "WorkspaceSucceeded");
        conditions.next().map(|condition| condition.message.clone()).unwrap_or_default()
    }

    /// Writes an error that repeats into the status, where the user looks. An end that was written stays.
    async fn tell_trouble(&self, error: kube::Error) -> kube::Error {
        let failures = self.context.note(&self.workspace, |notes| notes.failures);
        let conflict = matches!(&error, kube::Error::Api(status) if status.code == 409);
        let leaves = self.workspace.metadata.deletion_timestamp.is_some();
        if failures < FAILURES_TOLD || conflict || leaves || self.is_not_ours() {
            return error;
        }
        let told = format!("{}; it is tried again", words::of_error(&error));
        if self.workspace.tuning.is_none() {
            _ = serve::tell_trouble(self, told).await;
            return error;
        }
        let ended = self.workspace.status.as_ref().is_some_and(status::tells_an_end);
        let job = self.context.jobs.find(&self.owner, self.workspace.name()).filter(|job| self.made(job));
        if job.is_none() && !ended {
            let report = Report {
                seen: observe::observe(None, &[], false),
                progress: None,
                nodes: Nodes::default(),
                refused: None,
                stuck: false,
                warning: Some(told),
            };
            _ = self.write(&report).await;
        }
        error
    }

    /// Writes the status if it changed. `refused`: why the Workspace as it is now cannot be carried out.
    async fn tell(&self, job: Option<&Job>, revision: i64, refused: Option<String>) -> kube::Result<Action> {
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

    /// The pause until the next read of the log or of Events.
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

    /// The state of the requested nodes, for the status.
    pub fn nodes(&self, seen: &Seen) -> Nodes {
        let over = seen.stage.is_over();
        let looks = !over && seen.unplaced > 0;
        let mut waiting = locked(&self.context.without_node);
        _ = if looks { waiting.insert(self.owner.clone()) } else { waiting.remove(&self.owner) };
        let known = looks && self.context.healths.is_fine("nodes");
        let wanted = nodes::wanted(&self.workspace, self.context.presence().provider);
        let selector = self.workspace.resource.label_selector.as_ref();
        Nodes {
            ready: known.then(|| nodes::ready(&self.context.nodes.of(&no_owner()), selector)),
            claim: (!over && wanted).then(|| nodes::claimed(&self.context.claims.of(&self.owner))).flatten(),
        }
    }

    /// The progress from the end of the pod's log. A log that cannot be read is no error.
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

    /// The newest Warning about a pod or Job that does not go on and does not say why.
    pub async fn warning(&self, seen: &Seen) -> kube::Result<Option<String>> {
        let Some(uid) = seen.mute.as_deref() else {
            self.context.note(&self.workspace, |notes| {
                notes.warning = None;
                notes.warning_due = Default::default();
            });
            return Ok(None);
        };
        let due =
            self.context.note(&self.workspace, |notes| notes.warning_due.is_now(WARNINGS.0, WARNINGS.1));
        if due {
            // A scheduler's Warning is over once the pod has a node; without a node the pod's conditions tell.
            let passed_over = ["FailedScheduling"];
            let namespace = self.workspace.namespace();
            let warning = events::newest_warning(self.client, namespace, uid, &passed_over).await?;
            self.context.note(&self.workspace, |notes| notes.warning = warning);
        }
        Ok(self.context.note(&self.workspace, |notes| notes.warning.clone()))
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

    /// Writes annotations to the Workspace if they differ from what it has; `None` removes one.
    ///
    /// # Errors
    /// Those of the API server.
    pub async fn annotate(&self, mut wanted: BTreeMap<String, Option<String>>) -> kube::Result<()> {
        if let Some(Some(revision)) = wanted.get(&format!("{PREFIX}revision")).cloned() {
            wanted.insert(REVISION.into(), Some(revision));
        } else {
            // The annotation keeps the revision of the running Job.
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
        let written = api.patch(self.workspace.name(), &PatchParams::default(), &Patch::Merge(patch)).await?;
        self.keep(written);
        Ok(())
    }

    /// Writes the status. Fields that it no longer has are removed.
    pub async fn write_status(&self, status: &Status) -> kube::Result<()> {
        let mut fields = json!(status);
        for name in ["workerNodes", "state", "conditions", "targetNodeCount"] {
            fields.as_object_mut().expect("a status").entry(name).or_insert(Value::Null);
        }
        let api = self.api::<Workspace>();
        let patch = Patch::Merge(json!({"status": fields}));
        let written = api.patch_status(self.workspace.name(), &PatchParams::default(), &patch).await?;
        self.keep(written);
        Ok(())
    }

    fn keep(&self, written: Workspace) {
        self.context.note(&self.workspace, |notes| notes.own = Some(Arc::new(written)));
    }

    async fn write(&self, report: &Report) -> kube::Result<()> {
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

    /// Deletes the node claims of a Workspace that is being deleted. The garbage collector deletes its Job.
    async fn end(&self) -> kube::Result<Action> {
        self.give_back().await?;
        self.context.forget(&self.workspace);
        Ok(Action::await_change())
    }

    /// Adds or removes hone's finalizer. The patch names the version that was read, because it replaces the whole list.
    pub async fn finalizer(&self, there: bool) -> kube::Result<()> {
        let mut list = self.finalizers().to_vec();
        let had = list.iter().any(|finalizer| finalizer == FINALIZER);
        if had == there {
            return Ok(());
        }
        list.retain(|finalizer| finalizer != FINALIZER);
        list.extend(there.then(|| FINALIZER.to_owned()));
        let version = &self.workspace.metadata.resource_version;
        let patched =
            self.patch(&json!({"metadata": {"finalizers": list, "resourceVersion": version}})).await;
        match there {
            true => patched,
            false => ignore(404, patched),
        }
    }

    /// Writes an Event about the Workspace.
    pub async fn event(&self, weight: Weight, reason: &str, note: &str) {
        self.context.events.tell(&self.workspace, weight, reason, note).await;
    }
}

/// Deletes the node claims of a Workspace that is gone, whose finalizer somebody removed.
pub(super) async fn give_back_of(owner: &Owner, context: &Context) -> kube::Result<()> {
    let (namespace, name) = owner;
    let elsewhere = context.namespace.as_ref().is_some_and(|only| only != namespace);
    if elsewhere || context.presence().kaito || nodes::alive(&context.claims.of(owner)) == 0 {
        return Ok(());
    }
    let api = Api::<Workspace>::namespaced(context.client.clone(), namespace);
    match api.get_opt(name).await? {
        Some(_) => Ok(()),
        None => nodes::give_back(&context.client, owner, context.presence().provider).await,
    }
}

/// Whether a Workspace is somebody else's: its user said so, KAITO has it, or its pod is the user's own, which KAITO
/// serves.
pub(super) fn is_left_alone(workspace: &Workspace) -> bool {
    let ignored = annotations::read(workspace).is_ok_and(|options| options.ignore);
    let finalizers = workspace.metadata.finalizers.as_deref().unwrap_or_default();
    let kaitos = finalizers.iter().any(|finalizer| finalizer == KAITO_FINALIZER);
    let template = |inference: &Inference| inference.preset.is_none() && inference.template.is_some();
    let others = match (&workspace.tuning, &workspace.inference) {
        (None, None) => true,
        (None, Some(inference)) => template(inference),
        _ => false,
    };
    others || ignored || kaitos
}

/// The Workspace as it was meant: a write through v1alpha1 fills in an instance type if there was none, as that
/// version's definition has it, and would change what cannot be changed. `None`: it is as it was meant.
pub(super) fn without_a_versions_default(
    workspace: &Workspace,
    old: Option<&Workspace>,
) -> Option<Workspace> {
    let old = old?;
    let filled =
        old.resource.instance_type.is_empty() && workspace.resource.instance_type == INSTANCE_DEFAULT;
    filled.then(|| {
        let mut meant = workspace.clone();
        meant.resource.instance_type = String::new();
        meant
    })
}

pub(super) fn ignore(code: u16, result: kube::Result<()>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == code => Ok(()),
        other => other,
    }
}
