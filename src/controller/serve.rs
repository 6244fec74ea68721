//! A Workspace that serves -> its StatefulSet, Services and adapters in the cluster; their state -> its status.
//!
//! Conditions, states and reasons are KAITO's (v0.12, `updateInferenceStatus`); `AdaptersReady` is hone's own. Objects
//! are applied if one of them is not as this controller last wrote it, or should be another; at rest no request is
//! sent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerStatus, Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::runtime::controller::Action;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ask::{self, Adapters};
use super::ended::Ended;
use super::events::Weight;
use super::observe;
use super::reconciler::{RESTING, Reconciler, ignore};
use super::status::{self, Conditions, Nodes, without_tag};
use super::{FIELD_MANAGER, nodes as claims, words};
use crate::serving::live::file_digest;
use crate::source;
use crate::workspace::annotations::PREFIX;
use crate::workspace::files::entry_of;
use crate::workspace::kind::{Status, Workspace};
use crate::workspace::serve::{Asked, Served, TUNED, Tuned, serve};
use crate::workspace::{config_name, inference};

const ADAPTERS_READY: &str = "AdaptersReady";
/// The annotation of the StatefulSet with the hash of all objects.
const HASH: &str = "hone.sh/spec-hash";
/// LIMIT: bytes of a condition's message.
const MESSAGE_BYTES_MAX: usize = 1024;
/// How often it is looked whether a StatefulSet that is made anew is gone, and the pause between two looks.
const ORPHAN_LOOKS: u32 = 20;
const ORPHAN_PAUSE: Duration = Duration::from_millis(500);
/// The first and the longest pause between two questions to servers that have not taken a change. A kubelet brings a
/// changed ConfigMap into a pod within a minute or two.
const ANSWERS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Whether a Workspace takes an adapter from the tuning Workspace of that name.
pub fn follows(workspace: &Workspace, tuning: &str) -> bool {
    let adapters = workspace.inference.iter().flat_map(|inference| &inference.adapters);
    let mut images = adapters.filter_map(|adapter| adapter.source.as_ref()?.image.strip_prefix(TUNED));
    images.any(|name| name == tuning)
}

/// The state of the servers, as the cluster reports it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Serving {
    /// Number of servers that the Workspace asks for.
    pub wanted: i32,
    /// Number of servers that are ready.
    pub ready: i32,
    /// KAITO's reason and message if a server is not ready.
    pub trouble: Option<(&'static str, String)>,
    /// Why the current Workspace is not applied.
    pub refused: Option<String>,
}

impl Serving {
    fn is_ready(&self) -> bool {
        self.wanted > 0 && self.ready >= self.wanted
    }
}

/// Brings the servers of a Workspace to what it asks for, and says when to look again. `other`: why it cannot be what
/// it says now; its servers go on as they are.
///
/// # Errors
/// Those of the API server.
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
/// Those of the API server.
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

/// The objects of the Workspace, or why there are none.
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

/// The state of the adapters. Servers are asked after growing pauses, until all of them have taken the change. `None`:
/// no server was asked yet, and the condition stays as it is.
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

/// The uid of the pod or StatefulSet whose Warnings may say why servers are missing: a pod that has not begun, or the
/// set that cannot make one.
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

/// The images that tuning Workspaces of the namespace pushed, by digest.
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

/// Applies the objects if they are not as they should be; returns why the API server refuses them.
async fn apply(
    of: &Reconciler<'_>,
    set: Option<&StatefulSet>,
    served: &Served,
) -> kube::Result<Option<String>> {
    let objects: Vec<String> = served.objects().iter().map(ToString::to_string).collect();
    let hash = source::digest(objects.join("\n").as_bytes())[..16].to_owned();
    let same = set.is_some_and(|set| set.annotations().get(HASH) == Some(&hash));
    let seen = marks(of, served);
    let known = of.context.note(&of.workspace, |notes| notes.applied.clone());
    if same && seen == known {
        return Ok(None);
    }
    match apply_all(of, served, &hash).await {
        Ok(Ok(applied)) => {
            let changed = applied != seen;
            of.context.note(&of.workspace, |notes| notes.applied = applied);
            // A controller that begins applies everything once; usually nothing changes.
            if same && !changed {
                return Ok(None);
            }
        }
        Ok(Err(why)) => return Ok(Some(why)),
        Err(error) if words::is_terminating(&error) => return Err(error),
        Err(error) => {
            return match words::refusal(&error) {
                Some(why) => Ok(Some(format!("the API server refuses it: {why}"))),
                None => Err(error),
            };
        }
    }
    let what = match (set, same) {
        (None, _) => "made",
        (Some(_), false) => "changed",
        (Some(_), true) => "put right, because one of its objects was changed or removed",
    };
    let mut told = format!("StatefulSet {} is {what}", of.workspace.name());
    for warning in &served.warnings {
        told += &format!("; {warning}");
    }
    let weight = if served.warnings.is_empty() { Weight::Normal } else { Weight::Warning };
    of.event(weight, "Applied", &told).await;
    Ok(None)
}

/// Versions of a Workspace's objects, by kind and name.
type Marks = BTreeMap<String, String>;

/// The version of an object as far as hone writes it: the generation, which the status does not move; a Service has
/// none.
fn mark<K: Resource<DynamicType = ()> + Serialize>(object: &K) -> String {
    match object.meta().generation {
        Some(generation) if K::kind(&()) != "ConfigMap" => generation.to_string(),
        _ if K::kind(&()) == "Service" => {
            let object = serde_json::to_value(object).unwrap_or_default();
            let own =
                [&object["spec"], &object["metadata"]["labels"], &object["metadata"]["ownerReferences"]];
            source::digest(format!("{own:?}").as_bytes())
        }
        _ => object.meta().resource_version.clone().unwrap_or_default(),
    }
}

/// Whether two copies of an object are the same, but for what its own controllers write.
pub fn same_mark<K: Resource<DynamicType = ()> + Serialize>(one: &K, two: &K) -> bool {
    one.meta().uid == two.meta().uid && mark(one) == mark(two)
}

fn place<K: Resource<DynamicType = ()>>(name: &str) -> String {
    format!("{}/{name}", K::kind(&()))
}

/// The marks of the objects as the watches brought them. What a watch cannot tell now counts as it was applied.
fn marks(of: &Reconciler<'_>, served: &Served) -> Marks {
    let known = of.context.note(&of.workspace, |notes| notes.applied.clone());
    let mut marks = Marks::new();
    let mut add = |list: &str, place: String, mark: Option<String>| {
        let mark = if of.context.healths.is_fine(list) { mark } else { known.get(&place).cloned() };
        marks.extend(mark.map(|mark| (place, mark)));
    };
    let adapters = served.adapters.name_any();
    let map = of.context.configs.find(&(of.workspace.namespace().to_owned(), adapters.clone()), &adapters);
    let version = map.and_then(|map| map.metadata.resource_version.clone());
    add("configmaps", place::<ConfigMap>(&adapters), version);
    for service in &served.services {
        let name = service.name_any();
        let found = of.context.services.find(&of.owner, &name);
        add("services", place::<Service>(&name), found.map(|found| mark(found.as_ref())));
    }
    let set = served.set.name_any();
    let found = of.context.sets.find(&of.owner, &set);
    add("statefulsets", place::<StatefulSet>(&set), found.map(|found| mark(found.as_ref())));
    if served.budget.is_some() {
        let found = of.context.budgets.find(&of.owner, &set);
        let found = found.map(|found| mark(found.as_ref()));
        add("poddisruptionbudgets", place::<PodDisruptionBudget>(&set), found);
    }
    marks
}

/// The status with the condition of the adapters. Pure.
fn with_adapters(
    workspace: &Workspace,
    mut status: Status,
    adapters: Option<&Adapters>,
    now: Timestamp,
) -> Status {
    let mut conditions = Conditions::of(status.conditions, workspace.metadata.generation, now);
    let mut set = |ready, reason: &str, words: &str| {
        conditions.set(ADAPTERS_READY, ready, reason, words::plain(words, MESSAGE_BYTES_MAX));
    };
    match adapters {
        None => {}
        Some(Adapters::None) => conditions.remove(ADAPTERS_READY),
        Some(Adapters::Answer(parts)) => set(true, "AdaptersAnswer", &parts.join(", ")),
        Some(Adapters::Pending(why)) => set(false, "AdaptersPending", why),
        Some(Adapters::Refused(why)) => {
            set(false, "AdaptersRefused", &format!("{why}; the adapters before go on"))
        }
    }
    status.conditions = conditions.list;
    status
}

/// Applies every object; returns their marks, or which object is somebody else's.
async fn apply_all(of: &Reconciler<'_>, served: &Served, hash: &str) -> kube::Result<Result<Marks, String>> {
    let name = of.workspace.name();
    let mut set = served.set.clone();
    set.metadata.annotations.get_or_insert_default().insert(HASH.into(), hash.into());
    // Objects of somebody else are left alone, and nothing is written beside them.
    let mut foreign = foreign::<StatefulSet>(of, name).await?;
    foreign = foreign.or(self::foreign::<ConfigMap>(of, &served.adapters.name_any()).await?);
    for service in &served.services {
        foreign = foreign.or(self::foreign::<Service>(of, &service.name_any()).await?);
    }
    if served.budget.is_some() {
        foreign = foreign.or(self::foreign::<PodDisruptionBudget>(of, name).await?);
    }
    if let Some(why) = foreign {
        return Ok(Err(why));
    }
    let mut marks = Marks::new();
    put(of, &served.adapters, &mut marks).await?;
    for service in &served.services {
        put(of, service, &mut marks).await?;
    }
    put_set(of, &set, &mut marks).await?;
    // A set that is refused must not cost a node.
    of.ask_for_node().await?;
    match &served.budget {
        Some(budget) => put(of, budget, &mut marks).await?,
        None => {
            let api = of.api::<PodDisruptionBudget>();
            if api.get_opt(name).await?.is_some_and(|old| of.owns(&old)) {
                ignore(404, api.delete(name, &DeleteParams::default()).await.map(|_| ()))?;
            }
        }
    }
    Ok(Ok(marks))
}

/// Why an object of this name cannot be written: it is somebody else's. The Workspace is reconciled when it is gone.
async fn foreign<K>(of: &Reconciler<'_>, name: &str) -> kube::Result<Option<String>>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let Some(old) = of.api::<K>().get_opt(name).await?.filter(|old| !of.owns(old)) else { return Ok(None) };
    of.wait_for_end_of(&old);
    let kind = K::kind(&());
    Ok(Some(format!("{kind} {name} is not of this Workspace: rename the Workspace, or remove the {kind}")))
}

/// Applies a StatefulSet. If an earlier hone wrote a field that cannot be changed, the set is made anew, and its pods
/// go on meanwhile.
async fn put_set(of: &Reconciler<'_>, set: &StatefulSet, marks: &mut Marks) -> kube::Result<()> {
    let fixed = |error: &kube::Error| {
        matches!(error, kube::Error::Api(status) if status.code == 422
            && status.message.contains("updates to statefulset spec for fields other than"))
    };
    match put(of, set, marks).await {
        Err(error) if fixed(&error) => {
            let name = set.name_any();
            let api = of.api::<StatefulSet>();
            let Some(old) = api.get_opt(&name).await? else { return Err(error) };
            let parameters = DeleteParams {
                propagation_policy: Some(PropagationPolicy::Orphan),
                preconditions: Some(Preconditions { uid: old.metadata.uid.clone(), resource_version: None }),
                ..DeleteParams::default()
            };
            let uid = old.metadata.uid.clone();
            ignore(404, api.delete(&name, &parameters).await.map(|_| ()))?;
            // The garbage collector lets the pods go first.
            for _ in 0..ORPHAN_LOOKS {
                if api.get_opt(&name).await?.is_none_or(|found| found.metadata.uid != uid) {
                    break;
                }
                tokio::time::sleep(ORPHAN_PAUSE).await;
            }
            put(of, set, marks).await
        }
        other => other,
    }
}

async fn put<K>(of: &Reconciler<'_>, object: &K, marks: &mut Marks) -> kube::Result<()>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + Serialize
        + DeserializeOwned,
{
    let api: Api<K> = of.api();
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    let written = api.patch(&object.name_any(), &parameters, &Patch::Apply(object)).await?;
    marks.insert(place::<K>(&written.name_any()), mark(&written));
    Ok(())
}

/// The state of the servers from the StatefulSet's counts and the pods. Pure.
pub fn observe(set: Option<&StatefulSet>, pods: &[Arc<Pod>], refused: Option<String>) -> Serving {
    let wanted = set.and_then(|set| set.spec.as_ref()?.replicas).unwrap_or(1);
    let status = set.and_then(|set| set.status.as_ref());
    // The counts may include pods of an older template.
    let settled = status.is_some_and(|status| {
        status.observed_generation >= set.and_then(|set| set.metadata.generation)
            && status.update_revision == status.current_revision
    });
    let ready = status.and_then(|status| status.ready_replicas).unwrap_or(0);
    let ready = if settled { ready } else { ready.min(wanted - 1) };
    let trouble = if ready >= wanted { None } else { pods.iter().find_map(|pod| trouble(pod)) };
    Serving { wanted, ready, trouble, refused }
}

/// The first of KAITO's reasons that holds.
fn trouble(pod: &Pod) -> Option<(&'static str, String)> {
    let status = pod.status.as_ref()?;
    let containers: Vec<&ContainerStatus> = status.container_statuses.iter().flatten().collect();
    let last = |container: &&ContainerStatus| {
        let ended =
            |state: &Option<k8s_openapi::api::core::v1::ContainerState>| state.as_ref()?.terminated.clone();
        ended(&container.state).or_else(|| ended(&container.last_state))
    };
    let terminated = containers.iter().find_map(last);
    let told = terminated.as_ref().map(|state| Ended::of(state).told()).unwrap_or_default();
    if terminated.as_ref().is_some_and(|state| state.reason.as_deref() == Some("OOMKilled")) {
        return Some(("ContainerOOMKilled", told));
    }
    let waiting = containers.iter().find_map(|container| container.state.as_ref()?.waiting.clone());
    if let Some(waiting) = waiting {
        let why = waiting.reason.unwrap_or_default();
        let message = waiting.message.unwrap_or_default();
        let line = if message.is_empty() { why.clone() } else { format!("{why}: {message}") };
        match why.as_str() {
            "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
                return Some(("ImagePullError", line));
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
                return Some(("ContainerStartError", line));
            }
            "CrashLoopBackOff" if !told.is_empty() => return Some(("ContainerCrashLoopBackOff", told)),
            "CrashLoopBackOff" => return Some(("ContainerCrashLoopBackOff", line)),
            _ => {}
        }
    }
    if status.reason.as_deref() == Some("Evicted") {
        return Some(("PodEvicted", status.message.clone().unwrap_or_default()));
    }
    let conditions = status.conditions.iter().flatten();
    let unscheduled = conditions
        .into_iter()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    unscheduled.map(|condition| ("Unschedulable", condition.message.clone().unwrap_or_default()))
}

/// The status of a Workspace that serves. Pure.
pub fn tell(
    workspace: &Workspace,
    serving: &Serving,
    placed: &[String],
    nodes: &Nodes,
    workers: Vec<String>,
    now: Timestamp,
) -> Status {
    let mut status = workspace.status.clone().unwrap_or_default();
    let mut conditions =
        Conditions::of(std::mem::take(&mut status.conditions), workspace.metadata.generation, now);
    conditions.remove("JobStarted");
    status::nodes(&mut conditions, placed, 0, nodes, false);
    let ready = serving.is_ready();
    let (reason, mut words) = match (&serving.trouble, &serving.refused) {
        _ if ready => {
            ("WorkspaceInferenceStatusSuccess", "Inference has been deployed successfully".to_owned())
        }
        (Some((reason, words)), _) => (*reason, words.clone()),
        (None, Some(_)) => ("WorkspaceInferenceStatusFailed", "Inference workload is not ready".into()),
        (None, None) => (
            "WorkspaceInferenceStatusPending",
            format!("Inference workload is not ready: {} of {} servers are", serving.ready, serving.wanted),
        ),
    };
    if let Some(why) = &serving.refused {
        words += &format!("; the Workspace is not applied: {why}");
    }
    let words = super::words::plain(&words, MESSAGE_BYTES_MAX);
    conditions.set("InferenceReady", ready, reason, words.clone());
    let succeeded = if ready { "workspaceSucceeded" } else { "workspacePending" };
    for type_ in ["WorkspaceSucceeded", "WorkspaceReady"] {
        conditions.set(type_, ready, succeeded, words.clone());
    }
    status.conditions = conditions.list;
    let before = status.state.as_deref();
    status.state = Some(
        match (ready, before) {
            (true, _) => "Ready",
            (false, Some("Ready" | "NotReady")) => "NotReady",
            (false, _) => "Pending",
        }
        .into(),
    );
    status.worker_nodes = workers;
    status.target_node_count = Some(serving.wanted);
    status
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
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: Value) -> Arc<Pod> {
        Arc::new(serde_json::from_value(json!({"status": status})).unwrap())
    }

    fn container(state: Value, last: Value) -> Value {
        json!({"containerStatuses": [{
            "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 1, "state": state, "lastState": last,
        }]})
    }

    fn set(ready: i32, settled: bool) -> StatefulSet {
        serde_json::from_value(json!({
            "metadata": {"generation": 2},
            "spec": {"replicas": 2, "serviceName": "a", "selector": {}, "template": {}},
            "status": {
                "observedGeneration": 2, "replicas": 2, "readyReplicas": ready, "currentRevision": "a",
                "updateRevision": if settled { "a" } else { "b" },
            },
        }))
        .unwrap()
    }

    /// KAITO's table of reasons.
    #[test]
    fn why_it_does_not_answer() {
        let why = |status: Value| {
            observe(Some(&set(0, true)), &[pod(status)], None).trouble.map(|(reason, _)| reason)
        };
        let ended = json!({"terminated": {"exitCode": 12, "reason": "Error"}});
        assert_eq!(
            why(container(json!({"waiting": {"reason": "ImagePullBackOff"}}), json!({}))),
            Some("ImagePullError")
        );
        assert_eq!(
            why(container(json!({"waiting": {"reason": "CreateContainerConfigError"}}), json!({}))),
            Some("ContainerStartError")
        );
        let crash = container(json!({"waiting": {"reason": "CrashLoopBackOff"}}), ended);
        let told = observe(Some(&set(0, true)), &[pod(crash)], None).trouble.unwrap();
        assert_eq!(told, ("ContainerCrashLoopBackOff", "exit code 12 (model)".to_owned()));
        let oom = json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}});
        assert_eq!(
            why(container(json!({"waiting": {"reason": "CrashLoopBackOff"}}), oom)),
            Some("ContainerOOMKilled")
        );
        assert_eq!(why(json!({"reason": "Evicted", "message": "disk"})), Some("PodEvicted"));
        let unscheduled =
            json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]});
        assert_eq!(why(unscheduled), Some("Unschedulable"));
        assert_eq!(why(container(json!({"running": {}}), json!({}))), None);
    }

    #[test]
    fn states_are_kaitos() {
        let mut workspace = Workspace::default();
        let second = |second| Timestamp::from_second(second).unwrap();
        let mut state = |serving: &Serving| {
            let status = tell(&workspace, serving, &[], &Nodes::default(), Vec::new(), second(1));
            workspace.status = Some(status.clone());
            let shown = |type_: &str| {
                let condition = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
                format!("{} {}", condition.status, condition.reason)
            };
            (status.state.clone().unwrap(), shown("InferenceReady"), shown("WorkspaceSucceeded"))
        };
        let expect = |state: &str, ready: &str, succeeded: &str| {
            (state.to_owned(), ready.to_owned(), succeeded.to_owned())
        };
        let of = |ready, settled| observe(Some(&set(ready, settled)), &[], None);
        assert_eq!(
            state(&of(0, true)),
            expect("Pending", "False WorkspaceInferenceStatusPending", "False workspacePending")
        );
        assert_eq!(
            state(&of(2, true)),
            expect("Ready", "True WorkspaceInferenceStatusSuccess", "True workspaceSucceeded")
        );
        assert_eq!(state(&of(1, true)).0, "NotReady");
        assert_eq!(state(&of(2, false)).0, "NotReady", "they are of the older template");
        assert_eq!(
            state(&observe(None, &[], Some("strength".into()))),
            expect("NotReady", "False WorkspaceInferenceStatusFailed", "False workspacePending")
        );
    }

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
