//! The objects of a Workspace that serves -> the cluster, if its objects differ.
//!
//! An object is applied if it is not as this controller last wrote it, or should be another; at rest no request is
//! sent.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::events::Weight;
use super::reconciler::{Reconciler, ignore};
use super::{FIELD_MANAGER, words};
use crate::source;
use crate::workspace::serve::Served;

/// The annotation of the StatefulSet with the hash of all objects.
const HASH: &str = "hone.sh/spec-hash";
/// LIMIT: checks whether a StatefulSet that is created again is gone, and the pause between two checks.
const ORPHAN_LOOKS: u32 = 20;
const ORPHAN_PAUSE: Duration = Duration::from_millis(500);

/// Applies the objects if they are not as they should be; returns why the API server refuses them.
pub async fn apply(
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
        (Some(_), true) => "repaired, because one of its objects was changed or removed",
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

/// Returns the version of an object as far as hone writes it: the generation, which the status does not move; a Service
/// has none.
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

/// Returns whether two copies of an object are the same, except for fields that its own controllers write.
pub fn same_mark<K: Resource<DynamicType = ()> + Serialize>(one: &K, two: &K) -> bool {
    one.meta().uid == two.meta().uid && mark(one) == mark(two)
}

fn place<K: Resource<DynamicType = ()>>(name: &str) -> String {
    format!("{}/{name}", K::kind(&()))
}

/// Returns the marks of the objects as the watches received them. If a watch does not work now, the mark of the applied
/// object counts.
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

/// Returns the reason why an object of this name cannot be written: it is somebody else's. The Workspace is reconciled
/// when it is gone.
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

/// Applies a StatefulSet. If an earlier hone wrote a field that cannot be changed, the set is created again, and its
/// pods go on meanwhile.
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
