//! One Workspace and the state of the cluster -> the missing objects are created and the status is written. Doing it
//! twice changes nothing.

use std::sync::Arc;

use kube::Api;
use kube::runtime::controller::Action;

use super::reconciler::{RESTING, Reconciler};
use super::status::{self, Nodes, Report};
use super::{Context, Owner, nodes, observe, serve, words};
use crate::workspace::Workspace;
use crate::workspace::annotations::{self, PREFIX};
use crate::workspace::kind::Inference;

/// KAITO's finalizer: a Workspace that has it is its controller's.
const KAITO_FINALIZER: &str = "workspace.finalizer.kaito.sh";
/// Failures in a row after which the status names the error.
const FAILURES_TOLD: u32 = 3;

/// Reconciles one Workspace as far as this is possible now, and returns when to reconcile it again.
///
/// # Errors
/// The errors of the API server; the status names one that repeats.
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

/// Returns the newer of the watch's copy and the version that this controller last wrote. An older copy would be
/// written again.
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

impl Reconciler<'_> {
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

    /// Returns the reason why the Workspace cannot be what it says now: it tuned before and is to serve, or the other
    /// way round. KAITO's webhook refuses that; without one, the Workspace keeps its earlier kind.
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

    /// Deletes the node claims of a Workspace that is being deleted. The garbage collector deletes its Job.
    async fn end(&self) -> kube::Result<Action> {
        self.give_back().await?;
        self.context.forget(&self.workspace);
        Ok(Action::await_change())
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

/// Returns whether a Workspace is somebody else's: its user said so, KAITO has it, or its pod is the user's own, which
/// KAITO serves.
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
