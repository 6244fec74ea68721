//! A Workspace that serves -> its StatefulSet, Services and adapters in the cluster; their state -> its status.
//!
//! `apply` writes the objects, `servers` describes their state.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::controller::Action;

use super::apply::apply;
use super::ask::{self, Adapters};
use super::events::Weight;
use super::observe;
use super::reconciler::{RESTING, Reconciler};
use super::servers::{ADAPTERS_READY, Serving, observe, tell, with_adapters};
use super::status::without_tag;
use super::{nodes as claims, words};
use crate::serving::live::file_digest;
use crate::workspace::adapters::TUNED;
use crate::workspace::annotations::PREFIX;
use crate::workspace::files::entry_of;
use crate::workspace::kind::{Status, Workspace};
use crate::workspace::serve::{Asked, Served, Tuned, serve};
use crate::workspace::{config_name, inference};

/// The first and the longest pause between two queries to servers that have not applied a change. A kubelet updates a
/// changed ConfigMap in a pod within a minute or two.
const ANSWERS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Returns whether a Workspace takes an adapter from the tuning Workspace of that name.
pub fn follows(workspace: &Workspace, tuning: &str) -> bool {
    let adapters = workspace.inference.iter().flat_map(|inference| &inference.adapters);
    let mut images = adapters.filter_map(|adapter| adapter.source.as_ref()?.image.strip_prefix(TUNED));
    images.any(|name| name == tuning)
}

/// Reconciles the servers of a Workspace, and returns when to reconcile again. `other`: why the Workspace now cannot
/// be carried out; its servers then stay as they are.
///
/// # Errors
/// The errors of the API server.
pub async fn bring(of: &Reconciler<'_>, other: Option<String>) -> kube::Result<Action> {
    let name = of.workspace.name();
    let set = of.context.sets.find(&of.owner, name).filter(|set| of.owns(set.as_ref()));
    let turned = other.is_some();
    let served = match other {
        Some(why) => Err(why),
        None => render(of).await?,
    };
    let refused = match &served {
        Err(why) => Some(why.clone()),
        Ok(served) => apply(of, set.as_deref(), served).await?,
    };
    let set = match set {
        Some(set) => Some(set),
        None => of.api::<StatefulSet>().get_opt(name).await?.filter(|set| of.owns(set)).map(Arc::new),
    };
    let pods = of.context.pods.of(&of.owner);
    let mut serving = observe(set.as_deref(), &pods, refused.clone());
    let node = pods.iter().find_map(|pod| pod.spec.as_ref()?.node_name.clone());
    match (&set, &refused) {
        (None, Some(_)) => of.give_back().await?,
        _ if !turned => nodes_of(of, set.is_some()).await?,
        _ => {}
    }
    let adapters = match served.as_ref().ok().filter(|_| refused.is_none()) {
        Some(served) => adapters(of, served, &pods).await,
        None => None,
    };
    let mut seen = observe::observe(None, &[], false);
    seen.place(node);
    seen.mute = mute(&serving, set.as_deref(), &pods);
    if let Some(warning) = of.warning(&seen).await? {
        serving.trouble =
            Some(("WorkspaceInferenceStatusPending", format!("Inference workload is not ready: {warning}")));
    }
    let nodes = of.nodes(&seen);
    let workers = pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
    let status = tell(&of.workspace, &serving, &seen.nodes, &nodes, workers, Timestamp::now());
    let status = with_adapters(&of.workspace, status, adapters.as_ref(), Timestamp::now());
    write(of, status, &serving).await?;
    annotate(of, adapters.as_ref()).await?;
    if refused.is_some() {
        return Ok(Action::requeue(of.pause_of_refusals()));
    }
    let due = of.context.note(&of.workspace, |notes| {
        notes.failures = 0;
        let warning = notes.warning_due.left().filter(|_| seen.mute.is_some());
        notes.answers_due.left().into_iter().chain(warning).min()
    });
    Ok(Action::requeue(due.map_or(RESTING, |due| due.min(RESTING).max(Duration::from_millis(100)))))
}

/// Asks for the nodes of servers that are missing. Somebody may have removed the finalizer, without which a claim could
/// stay behind.
async fn nodes_of(of: &Reconciler<'_>, there: bool) -> kube::Result<()> {
    let known = of.context.claims.of(&of.owner);
    if there && claims::differs(&of.workspace, of.context.presence().provider, &known) {
        return of.ask_for_node().await;
    }
    match claims::alive(&known) {
        0 => Ok(()),
        _ => of.finalizer(true).await,
    }
}

/// Writes an error that repeats into the status. Servers that answer are not in trouble.
///
/// # Errors
/// The errors of the API server.
pub async fn tell_trouble(of: &Reconciler<'_>, why: String) -> kube::Result<()> {
    let set = of.context.sets.find(&of.owner, of.workspace.name()).filter(|set| of.owns(set.as_ref()));
    let pods = of.context.pods.of(&of.owner);
    let mut serving = observe(set.as_deref(), &pods, None);
    let why = format!("Inference workload is not ready: {why}");
    serving.trouble = serving.trouble.or(Some(("WorkspaceInferenceStatusPending", why)));
    let workers: Vec<String> = pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
    let mut seen = observe::observe(None, &[], false);
    seen.place(workers.first().cloned());
    let nodes = of.nodes(&seen);
    let status = tell(&of.workspace, &serving, &seen.nodes, &nodes, workers, Timestamp::now());
    write(of, status, &serving).await
}

/// Returns the objects of the Workspace, or why there are none.
async fn render(of: &Reconciler<'_>) -> kube::Result<Result<Served, String>> {
    let map = of.config().await?;
    let config = map.as_deref().map(|map| entry_of(map, &config_name(&of.workspace), inference::CONFIG_FILE));
    Ok(config
        .transpose()
        .and_then(|config| {
            let tuned = tuned(of);
            serve(&Asked { workspace: &of.workspace, config, settings: &of.context.settings, tuned: &tuned })
        })
        .map_err(words::of_fault))
}

/// Returns the state of the adapters. Servers are queried after increasing pauses until all have applied the change.
/// `None`: no server was asked yet, and the condition stays as it is.
async fn adapters(of: &Reconciler<'_>, served: &Served, pods: &[Arc<Pod>]) -> Option<Adapters> {
    let any = of.workspace.inference.as_ref().is_some_and(|inference| !inference.adapters.is_empty());
    let idle = || of.context.note(&of.workspace, |notes| notes.answers_due = Default::default());
    if !any {
        idle();
        return Some(Adapters::None);
    }
    let file = file_digest(served.adapters_file());
    let answers = of.context.note(&of.workspace, |notes| {
        if notes.asked_of != file {
            notes.asked_of = file.clone();
            notes.answers_due = Default::default();
        }
        notes.answers.clone()
    });
    let stands = ask::stand(&answers, pods, &file);
    if matches!(stands, Adapters::Answer(_)) {
        idle();
        return Some(stands);
    }
    // Without a ready server there is nobody to ask. The next pod that becomes ready starts another reconciliation.
    if !ask::any_ready(pods) {
        idle();
        return Some(stands);
    }
    let due = of.context.note(&of.workspace, |notes| notes.answers_due.is_now(ANSWERS.0, ANSWERS.1));
    if !due {
        return if answers.is_empty() { None } else { Some(stands) };
    }
    let answers = ask::all(&of.context.http, pods).await;
    let stands = ask::stand(&answers, pods, &file);
    of.context.note(&of.workspace, |notes| {
        notes.answers = answers;
        if matches!(stands, Adapters::Answer(_)) {
            notes.answers_due = Default::default();
        }
    });
    Some(stands)
}

/// Returns the uid of the pod or StatefulSet whose Warnings may say why servers are missing: a pod that has not begun,
/// or the set that cannot make one.
fn mute(serving: &Serving, set: Option<&StatefulSet>, pods: &[Arc<Pod>]) -> Option<String> {
    if serving.is_ready() || serving.trouble.is_some() {
        return None;
    }
    let mut alive: Vec<&Arc<Pod>> =
        pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
    alive.sort_by_key(|pod| pod.name_any());
    let has_begun = |pod: &Pod| {
        let states = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        states
            .into_iter()
            .any(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()))
    };
    if let Some(pod) = alive.iter().find(|pod| !has_begun(pod)) {
        return pod.metadata.uid.clone();
    }
    let missing = alive.len() < usize::try_from(serving.wanted).unwrap_or(0);
    set.filter(|_| missing)?.metadata.uid.clone()
}

/// Returns the images that tuning Workspaces of the namespace pushed, by digest.
fn tuned(of: &Reconciler<'_>) -> Tuned {
    let named = |workspace: &Arc<Workspace>| {
        let output = workspace.tuning.as_ref()?.output.as_ref()?;
        let name = workspace.name().to_owned();
        if workspace.namespace() != of.workspace.namespace() || !follows(&of.workspace, &name) {
            return None;
        }
        let pushed = workspace.annotation(&format!("{PREFIX}pushed"));
        // Earlier controllers wrote the digest alone.
        let digest = workspace.annotation(&format!("{PREFIX}digest"));
        Some((
            name,
            match (pushed, digest, output.image.is_empty()) {
                (Some(image), ..) => Ok(image.to_owned()),
                (None, _, true) => {
                    Err(format!("Workspace {} writes to a volume, not to an image", workspace.name()))
                }
                (None, Some(digest), _) => Ok(format!("{}@{digest}", without_tag(&output.image))),
                (None, None, _) => {
                    Err(format!("Workspace {} has not pushed its adapter yet", workspace.name()))
                }
            },
        ))
    };
    of.context.workspaces.state().iter().filter_map(named).collect()
}

async fn write(of: &Reconciler<'_>, status: Status, serving: &Serving) -> kube::Result<()> {
    of.context.metrics.saw(&of.workspace, status.state.as_deref().unwrap_or_default());
    let old = of.workspace.status.as_ref();
    if old == Some(&status) {
        return Ok(());
    }
    let told = |status: &Status, type_: &str| {
        let mut list = status.conditions.iter();
        list.find(|condition| condition.type_ == type_)
            .map(|condition| (condition.reason.clone(), condition.message.clone()))
    };
    let message = |status: &Status| told(status, "InferenceReady").map(|(_, message)| message);
    let adapters = told(&status, ADAPTERS_READY).filter(|told_now| {
        told_now.0 != "AdaptersPending"
            && old.and_then(|old| told(old, ADAPTERS_READY)).as_ref() != Some(told_now)
    });
    of.write_status(&status).await?;
    let bad = serving.trouble.is_some() || serving.refused.is_some();
    let changed = old.and_then(|old| old.state.clone()) != status.state;
    if changed || (bad && old.and_then(message) != message(&status)) {
        let weight = if bad && !serving.is_ready() { Weight::Warning } else { Weight::Normal };
        let reason = status.state.clone().unwrap_or_default();
        of.event(weight, &reason, &message(&status).unwrap_or_default()).await;
    }
    if let Some((reason, message)) = adapters {
        let weight = if reason == "AdaptersRefused" { Weight::Warning } else { Weight::Normal };
        of.event(weight, &reason, &message).await;
    }
    Ok(())
}

/// Writes the annotation with the adapters that answer.
async fn annotate(of: &Reconciler<'_>, adapters: Option<&Adapters>) -> kube::Result<()> {
    let told = match adapters {
        Some(Adapters::Answer(parts)) => Some(parts.join(", ")),
        Some(Adapters::None) => None,
        // The adapters before still answer.
        _ => return Ok(()),
    };
    of.annotate([(format!("{PREFIX}adapters"), told)].into()).await
}

#[cfg(test)]
mod tests {
    use super::super::servers::tests::{container, set};
    use super::*;
    use serde_json::{Value, json};

    /// Events are read about a pod that has not begun, and about a set that cannot make one.
    #[test]
    fn whose_warnings_are_read() {
        let with_uid = |uid: &str, status: Value| -> Arc<Pod> {
            let object = json!({"metadata": {"name": uid, "uid": uid}, "status": status});
            Arc::new(serde_json::from_value(object).unwrap())
        };
        let mut two = set(0, true);
        two.metadata.uid = Some("set".into());
        let mute_of = |pods: &[Arc<Pod>]| mute(&observe(Some(&two), pods, None), Some(&two), pods);
        let waits = |uid: &str| {
            with_uid(uid, container(json!({"waiting": {"reason": "ContainerCreating"}}), json!({})))
        };
        let runs = |uid: &str| with_uid(uid, container(json!({"running": {}}), json!({})));
        assert_eq!(mute_of(&[]).as_deref(), Some("set"));
        assert_eq!(mute_of(&[runs("a")]).as_deref(), Some("set"), "the second cannot be made");
        assert_eq!(mute_of(&[runs("a"), waits("b")]).as_deref(), Some("b"));
        assert_eq!(mute_of(&[runs("a"), runs("b")]), None, "they load");
        let fails = with_uid("c", container(json!({"waiting": {"reason": "ImagePullBackOff"}}), json!({})));
        assert_eq!(mute_of(&[fails]), None, "it says why");
        assert_eq!(mute(&observe(Some(&set(2, true)), &[], None), Some(&two), &[]), None, "they are ready");
    }
}
