//! A Workspace -> its nodes: those that its labels select, and the claims that Karpenter provides nodes for.
//!
//! Source: KAITO v0.12, `pkg/utils/nodeclaim` (a NodeClaim of its own, as its GPU provisioner serves it) and
//! `pkg/nodeprovision/karpenter` (a NodePool for each Workspace).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, NodeCondition, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::watches::Owner;
use crate::source;
use crate::workspace::annotations::PREFIX;
use crate::workspace::several;
use crate::workspace::{Cloud, MANAGED_BY, MANAGER, WORKSPACE_LABEL, Workspace};

const NAMESPACE_LABEL: &str = "kaito.sh/workspacenamespace";
const NODE_POOL_LABEL: &str = "karpenter.sh/nodepool";
/// The pool that KAITO's claims name, so that Karpenter leaves them alone.
const NODE_POOL: &str = "kaito";
/// The disk of a node; KAITO requests the same for every model.
const DISK: &str = "1024Gi";
const NODE_CLASS: &str = "default";
/// The annotation with the hash of a claim's spec.
const SPEC_HASH: &str = "hone.sh/spec-hash";

/// The kinds of Karpenter that a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The cluster has none: nodes are somebody else's work.
    None,
    /// NodeClaims are created one for each node.
    NodeClaims,
    /// NodePools are created, and Karpenter creates their NodeClaims.
    NodePools,
}

impl Provider {
    /// Returns the name in the log.
    pub fn name(self) -> &'static str {
        match self {
            Provider::None => "nobody",
            Provider::NodeClaims => "NodeClaims of Karpenter",
            Provider::NodePools => "NodePools of Karpenter",
        }
    }
}

/// Reads which kinds are installed. NodeClaims are preferred, because one call deletes a node.
pub async fn provider(client: &Client) -> kube::Result<Provider> {
    let resources = match client.list_api_group_resources("karpenter.sh/v1").await {
        Ok(list) => list.resources,
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(Provider::None),
        Err(error) => return Err(error),
    };
    let has = |name: &str| resources.iter().any(|resource| resource.name == name);
    Ok(match () {
        () if has("nodeclaims") => Provider::NodeClaims,
        () if has("nodepools") => Provider::NodePools,
        () => Provider::None,
    })
}

/// Returns whether the Workspace gets node claims: it names an instance type and Karpenter is there.
pub fn wanted(workspace: &Workspace, provider: Provider) -> bool {
    provider != Provider::None && !workspace.resource.instance_type.is_empty()
}

/// Returns the number of nodes of a Workspace: those that train together, or one for each server.
pub fn count(workspace: &Workspace) -> usize {
    usize::try_from(several::nodes(workspace)).unwrap_or(1)
}

/// Creates the Workspace's missing node claims and deletes those with another spec. A claim that is being deleted does
/// not count, and the new claim has a name of its own. If there are more claims than wanted, those whose nodes are not
/// in `used` are deleted.
pub async fn ask(
    client: &Client,
    workspace: &Workspace,
    provider: Provider,
    cloud: Option<Cloud>,
    used: &BTreeSet<String>,
) -> kube::Result<()> {
    if provider == Provider::None {
        return Ok(());
    }
    let cloud = cloud.unwrap_or_else(|| Cloud::of_instance(&workspace.resource.instance_type));
    let mut object = match provider {
        Provider::NodePools => pool(workspace, cloud),
        _ => claim(workspace, cloud),
    };
    let hash = source::digest(object["spec"].to_string().as_bytes())[..16].to_owned();
    let owner = (workspace.namespace().to_owned(), workspace.name().to_owned());
    let known = list(client, &owner, provider).await?;
    let mut there = Vec::new();
    for old in known.iter().filter(|old| is_alive(old)) {
        match old.annotations().get(SPEC_HASH) == Some(&hash) {
            true => there.push(old),
            false => delete(client, provider, &old.name_any()).await?,
        }
    }
    if provider == Provider::NodePools {
        // One pool has all the nodes. Their number is no part of its hash, because it can be changed.
        let replicas = json!({"spec": {"replicas": count(workspace)}});
        object["spec"]["replicas"] = count(workspace).into();
        if let Some(pool) = there.first() {
            return scale(client, pool, &replicas).await;
        }
    }
    let wanted = if provider == Provider::NodePools { 1 } else { count(workspace) };
    let surplus = there.len().saturating_sub(wanted);
    let idle = |claim: &&&DynamicObject| {
        claim.data["status"]["nodeName"].as_str().is_none_or(|node| !used.contains(node))
    };
    for claim in there.iter().filter(idle).take(surplus) {
        delete(client, provider, &claim.name_any()).await?;
    }
    object["metadata"]["annotations"][SPEC_HASH] = hash.clone().into();
    let names = (0..).map(|attempt| name(workspace, provider, &hash, attempt));
    let free = names.filter(|name| known.iter().all(|old| old.name_any() != *name));
    for name in free.take(wanted.saturating_sub(there.len())) {
        object["metadata"]["name"] = name.into();
        let object = serde_json::from_value(object.clone()).map_err(kube::Error::SerdeError)?;
        match api(client, provider).create(&PostParams::default(), &object).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            other => _ = other?,
        }
    }
    Ok(())
}

async fn scale(client: &Client, pool: &DynamicObject, replicas: &Value) -> kube::Result<()> {
    if pool.data["spec"]["replicas"] == replicas["spec"]["replicas"] {
        return Ok(());
    }
    let api = api(client, Provider::NodePools);
    api.patch(&pool.name_any(), &PatchParams::default(), &Patch::Merge(replicas)).await.map(|_| ())
}

/// Deletes every node claim of the Workspace.
pub async fn give_back(client: &Client, owner: &Owner, provider: Provider) -> kube::Result<()> {
    if provider == Provider::None {
        return Ok(());
    }
    for old in list(client, owner, provider).await?.iter().filter(|old| is_alive(old)) {
        delete(client, provider, &old.name_any()).await?;
    }
    Ok(())
}

async fn list(
    client: &Client,
    (namespace, name): &Owner,
    provider: Provider,
) -> kube::Result<Vec<DynamicObject>> {
    let ours = format!("{MANAGED_BY}={MANAGER},{WORKSPACE_LABEL}={name},{NAMESPACE_LABEL}={namespace}");
    Ok(api(client, provider).list(&ListParams::default().labels(&ours)).await?.items)
}

async fn delete(client: &Client, provider: Provider, name: &str) -> kube::Result<()> {
    match api(client, provider).delete(name, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(|_| ()),
    }
}

fn is_alive(object: &DynamicObject) -> bool {
    object.metadata.deletion_timestamp.is_none()
}

/// Returns the number of claims that are not being deleted.
pub fn alive(claims: &[Arc<DynamicObject>]) -> usize {
    claims.iter().filter(|claim| is_alive(claim)).count()
}

/// Returns whether claims are missing.
pub fn lacks(workspace: &Workspace, provider: Provider, claims: &[Arc<DynamicObject>]) -> bool {
    match provider {
        Provider::None => false,
        Provider::NodeClaims => alive(claims) < count(workspace),
        Provider::NodePools => alive(claims) == 0,
    }
}

/// Returns whether claims are missing or too many.
pub fn differs(workspace: &Workspace, provider: Provider, claims: &[Arc<DynamicObject>]) -> bool {
    match provider {
        Provider::None => false,
        Provider::NodeClaims => alive(claims) != count(workspace),
        Provider::NodePools => {
            let pool = claims.iter().find(|claim| is_alive(claim));
            pool.is_none_or(|pool| pool.data["spec"]["replicas"] != count(workspace))
        }
    }
}

/// Returns whether all nodes of the claims are there, and the provider's message about the first that is not.
pub fn claimed(claims: &[Arc<DynamicObject>]) -> Option<(bool, String)> {
    let mut alive = claims.iter().filter(|claim| is_alive(claim)).map(|claim| readiness(&claim.data));
    let Some(first) = alive.next() else {
        return claims.first().map(|_| (false, "the requested node is being deleted".into()));
    };
    let missing = |told: &(bool, String)| !told.0;
    Some(if missing(&first) { first } else { alive.find(missing).unwrap_or(first) })
}

/// Returns the Workspace that the labels of a claim name.
pub fn owner(object: &DynamicObject) -> Option<Owner> {
    let labels = object.labels();
    Some((labels.get(NAMESPACE_LABEL)?.clone(), labels.get(WORKSPACE_LABEL)?.clone()))
}

/// Returns the number of ready nodes with the Workspace's labels.
pub fn ready(nodes: &[Arc<Node>], selector: Option<&LabelSelector>) -> usize {
    nodes.iter().filter(|node| is_ready(node) && selects(selector, node.labels())).count()
}

/// Removes the parts of a node that the controller does not read.
pub fn strip(node: &mut Node) {
    node.spec = None;
    node.metadata.managed_fields = None;
    node.metadata.annotations = None;
    node.status = node.status.take().map(|status| NodeStatus {
        conditions: status.conditions.map(|list| {
            let ready = list.into_iter().filter(|condition| condition.type_ == "Ready");
            ready
                .map(|condition| NodeCondition {
                    type_: condition.type_,
                    status: condition.status,
                    ..NodeCondition::default()
                })
                .collect()
        }),
        ..NodeStatus::default()
    });
}

/// Returns whether two versions of a node are the same for the controller.
pub fn same(one: &Node, two: &Node) -> bool {
    one.metadata.labels == two.metadata.labels && is_ready(one) == is_ready(two)
}

fn name(workspace: &Workspace, provider: Provider, hash: &str, attempt: u32) -> String {
    let (namespace, name) = (workspace.namespace(), workspace.name());
    let uid = workspace.metadata.uid.as_deref().unwrap_or_default();
    match provider {
        Provider::NodePools if attempt == 0 => format!("{namespace}-{name}"),
        Provider::NodePools => format!("{namespace}-{name}-{attempt}"),
        _ => {
            let text = format!("{namespace}/{name}/{uid}/{hash}/{attempt}");
            format!("ws{}", &source::digest(text.as_bytes())[..9])
        }
    }
}

/// Returns the API of the objects that ask for nodes.
pub fn api(client: &Client, provider: Provider) -> Api<DynamicObject> {
    let (kind, plural) = match provider {
        Provider::NodePools => ("NodePool", "nodepools"),
        _ => ("NodeClaim", "nodeclaims"),
    };
    let resource =
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("karpenter.sh", "v1", kind), plural);
    Api::all_with(client.clone(), &resource)
}

/// Returns `spec.nodeClassRef`: the class that describes the cloud's machines.
fn class(workspace: &Workspace, cloud: Cloud) -> Value {
    let name = workspace.annotation(&format!("{PREFIX}node-class")).unwrap_or(NODE_CLASS);
    let (group, kind) = match cloud {
        Cloud::Aws => ("karpenter.k8s.aws", "EC2NodeClass"),
        _ => ("karpenter.azure.com", "AKSNodeClass"),
    };
    json!({"group": group, "kind": kind, "name": name})
}

/// Returns the labels that identify the Workspace and that the pod's affinity selects.
fn labels(workspace: &Workspace) -> Value {
    let selector = workspace.resource.label_selector.as_ref();
    let mut labels: serde_json::Map<String, Value> = selector
        .and_then(|selector| selector.match_labels.as_ref())
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.clone().into()))
        .collect();
    labels.insert(WORKSPACE_LABEL.into(), workspace.name().into());
    labels.insert(NAMESPACE_LABEL.into(), workspace.namespace().into());
    labels.into()
}

fn taints() -> Value {
    json!([{"key": "sku", "value": "gpu", "effect": "NoSchedule"}])
}

fn one_of(key: &str, value: &str) -> Value {
    json!({"key": key, "operator": "In", "values": [value]})
}

fn claim(workspace: &Workspace, cloud: Cloud) -> Value {
    let instance = &workspace.resource.instance_type;
    let mut labels = labels(workspace);
    labels[NODE_POOL_LABEL] = NODE_POOL.into();
    labels[MANAGED_BY] = MANAGER.into();
    let mut requirements = vec![
        one_of(NODE_POOL_LABEL, NODE_POOL),
        one_of("node.kubernetes.io/instance-type", instance),
        one_of("kubernetes.io/os", "linux"),
    ];
    requirements.push(match cloud {
        Cloud::Aws => {
            json!({"key": "karpenter.k8s.aws/instance-gpu-count", "operator": "Gt", "values": ["0"]})
        }
        _ => one_of("karpenter.azure.com/sku-name", instance),
    });
    json!({
        "apiVersion": "karpenter.sh/v1", "kind": "NodeClaim",
        "metadata": {
            "labels": labels,
            "annotations": {"karpenter.sh/do-not-disrupt": "true"},
        },
        "spec": {
            "nodeClassRef": class(workspace, cloud), "taints": taints(), "requirements": requirements,
            "resources": {"requests": {"ephemeral-storage": DISK}},
        },
    })
}

fn pool(workspace: &Workspace, cloud: Cloud) -> Value {
    let requirements = [one_of("node.kubernetes.io/instance-type", &workspace.resource.instance_type)];
    json!({
        "apiVersion": "karpenter.sh/v1", "kind": "NodePool",
        "metadata": {
            "labels": {
                MANAGED_BY: MANAGER, WORKSPACE_LABEL: workspace.name(), NAMESPACE_LABEL: workspace.namespace(),
            },
            "annotations": {},
        },
        "spec": {
            "template": {
                "metadata": {"labels": labels(workspace)},
                "spec": {
                    "nodeClassRef": class(workspace, cloud), "taints": taints(), "requirements": requirements,
                },
            },
        },
    })
}

/// Returns the `Ready` condition, with the message of the condition that says why not.
fn readiness(object: &Value) -> (bool, String) {
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let ready =
        conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    if ready {
        return (true, "the node is there".into());
    }
    let why = conditions.iter().find(|condition| condition["status"] == "False");
    let text = |field: &str| why.and_then(|why| why[field].as_str()).unwrap_or_default().to_owned();
    match text("message").is_empty() {
        true => (false, "the node was requested".into()),
        false => (false, format!("{}: {}", text("reason"), text("message"))),
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Returns whether a selector selects the labels, by Kubernetes' rules. No selector selects every node.
fn selects(selector: Option<&LabelSelector>, labels: &BTreeMap<String, String>) -> bool {
    let Some(selector) = selector else { return true };
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    equal
        && selector.match_expressions.iter().flatten().all(|expression| {
            let value = labels.get(&expression.key);
            let listed =
                value.is_some_and(|value| expression.values.iter().flatten().any(|other| other == value));
            match expression.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "DoesNotExist" => value.is_none(),
                _ => value.is_some(),
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_read_as_kubernetes_does() {
        let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let holds = |value: Value| selects(Some(&serde_json::from_value(value).unwrap()), &labels);
        let expression = |operator: &str, key: &str, values: &[&str]| {
            holds(json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]}))
        };
        assert!(selects(None, &labels) && holds(json!({})) && holds(json!({"matchLabels": {"a": "b"}})));
        assert!(!holds(json!({"matchLabels": {"a": "c"}})));
        assert!(expression("In", "a", &["x", "b"]) && !expression("In", "z", &["b"]));
        assert!(
            expression("NotIn", "a", &["x"])
                && expression("NotIn", "z", &["x"])
                && !expression("NotIn", "a", &["b"])
        );
        assert!(expression("Exists", "a", &[]) && !expression("Exists", "z", &[]));
        assert!(expression("DoesNotExist", "z", &[]) && !expression("DoesNotExist", "a", &[]));
    }

    #[test]
    fn what_became_of_a_claim() {
        let claim = |value: Value| Arc::new(serde_json::from_value::<DynamicObject>(value).unwrap());
        assert_eq!(claimed(&[]), None);
        let failed = claim(json!({"metadata": {"name": "a"}, "status": {"conditions": [
            {"type": "Launched", "status": "False", "reason": "InsufficientCapacity", "message": "none left"},
        ]}}));
        assert_eq!(
            claimed(std::slice::from_ref(&failed)),
            Some((false, "InsufficientCapacity: none left".into()))
        );
        let leaves = claim(json!({"metadata": {"name": "b", "deletionTimestamp": "2026-01-01T00:00:00Z"}}));
        assert_eq!((alive(std::slice::from_ref(&leaves)), alive(&[leaves.clone(), failed.clone()])), (0, 1));
        assert_eq!(claimed(&[leaves]).map(|(there, _)| there), Some(false));
        let ready = claim(
            json!({"metadata": {"name": "c"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}),
        );
        assert_eq!(claimed(&[ready.clone(), ready.clone()]), Some((true, "the node is there".into())));
        assert_eq!(claimed(&[ready, failed]), Some((false, "InsufficientCapacity: none left".into())));
    }
}
