//! A Workspace that tunes -> its Job under the revision of its inputs: created, kept, or created again after a change.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::runtime::controller::Action;

use super::events::{self, Weight};
use super::observe::{self, Stage, is_leaving, is_over};
use super::reconciler::{RESTING, Reconciler, ignore};
use super::revision::{self, HASH, Inputs, Known};
use super::status::{self, Nodes, Report};
use super::{FIELD_MANAGER, words};
use crate::workspace::annotations::{self, PREFIX};
use crate::workspace::crd::INSTANCE_DEFAULT;
use crate::workspace::files::entry;
use crate::workspace::several;
use crate::workspace::{
    Asked, MANAGED_BY, MANAGER, Method, Rendered, Workspace, config_name, inputs_hash, render, validate,
};

/// The pause while an object is being deleted.
const SOON: Duration = Duration::from_secs(2);

/// The inputs that the Job should have, and the newest revision if it is known.
struct Wanted {
    inputs: Inputs,
    known: Option<Known>,
    config: Option<Arc<ConfigMap>>,
}

impl Reconciler<'_> {
    pub async fn tune(&self) -> kube::Result<Action> {
        let known = self.known().await?;
        let old = known.as_ref().and_then(|known| known.workspace.as_ref());
        if let Some(effective) = without_a_versions_default(&self.workspace, old) {
            let effective =
                Reconciler { workspace: Cow::Owned(effective), owner: self.owner.clone(), ..*self };
            return effective.bring(known).await;
        }
        self.bring(known).await
    }

    /// Returns whether this controller created the Job for this very Workspace.
    pub fn made(&self, job: &Job) -> bool {
        let ours = job.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY));
        let owners = job.metadata.owner_references.iter().flatten();
        let owner = owners.into_iter().find(|owner| owner.controller == Some(true));
        let same = owner.is_some_and(|owner| Some(&owner.uid) == self.workspace.metadata.uid.as_ref());
        ours.is_some_and(|manager| manager == MANAGER) && same
    }

    /// Returns whether the Job belongs to an earlier Workspace of this name. The garbage collector deletes it.
    fn is_a_predecessors(&self, job: &Job) -> bool {
        let ours = job.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY));
        let owners = job.metadata.owner_references.iter().flatten();
        ours.is_some_and(|manager| manager == MANAGER)
            && owners.into_iter().any(|owner| owner.kind == crate::workspace::kind::KIND)
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
            // A webhook that supports no dry run answers so. The creation of the Job will show the result.
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

    async fn refuse_foreign(&self, job: &Job) -> kube::Result<Action> {
        let told = format!(
            "Job {} is not of this Workspace: rename the Workspace, or remove the Job",
            self.workspace.name()
        );
        self.wait_for_end_of(job);
        self.refuse(None, told).await
    }
}

/// Returns the Workspace as it was meant: a write through v1alpha1 fills in an instance type if there was none, as that
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
