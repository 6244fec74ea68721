//! Nodes of a Workspace: those that its labels select, or one that Karpenter is asked for and given back to.
//!
//! Source: KAITO v0.12, `pkg/utils/nodeclaim` (a NodeClaim of its own, as its GPU provisioner serves it) and
//! `pkg/nodeprovision/karpenter` (a NodePool for each Workspace).

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, NodeCondition, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::watches::Owner;
use crate::source;
use crate::workspace::annotations::PREFIX;
use crate::workspace::{Cloud, MANAGED_BY, MANAGER, WORKSPACE_LABEL, Workspace};

const NAMESPACE_LABEL: &str = "kaito.sh/workspacenamespace";
const NODE_POOL_LABEL: &str = "karpenter.sh/nodepool";
/// The pool that KAITO's claims say they are of, so that Karpenter leaves them alone.
const NODE_POOL: &str = "kaito";
/// Of a node that tunes, in KAITO whatever the model.
const DISK: &str = "1024Gi";
const NODE_CLASS: &str = "default";
/// What a claim was asked for with.
const SPEC_HASH: &str = "hone.sh/spec-hash";

/// What of Karpenter a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    None,
    NodeClaims,
    NodePools,
}

impl Provider {
    /// For the log.
    pub fn name(self) -> &'static str {
        match self {
            Provider::None => "nobody",
            Provider::NodeClaims => "NodeClaims of Karpenter",
            Provider::NodePools => "NodePools of Karpenter",
        }
    }
}

/// What is there decides: a NodeClaim is enough, and is given back with one call.
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

/// Whether a node is asked for: by its type, where somebody can bring one.
pub fn wanted(workspace: &Workspace, provider: Provider) -> bool {
    provider != Provider::None && !workspace.resource.instance_type.is_empty()
}

/// Asks for the Workspace's node unless one like it is there, and gives others of the Workspace back. A claim that is on its way
/// out is no node: another one is asked for, under a name of its own, since neither can a claim's spec be changed.
pub async fn ask(
    client: &Client,
    workspace: &Workspace,
    provider: Provider,
    cloud: Option<Cloud>,
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
    let known = list(client, workspace, provider).await?;
    let mut there = false;
    for old in known.iter().filter(|old| is_alive(old)) {
        match old.annotations().get(SPEC_HASH) == Some(&hash) {
            true => there = true,
            false => delete(client, provider, &old.name_any()).await?,
        }
    }
    if there {
        return Ok(());
    }
    let mut names = (0..).map(|attempt| name(workspace, provider, &hash, attempt));
    let free =
        names.find(|name| known.iter().all(|old| old.name_any() != *name)).expect("one of endless names");
    object["metadata"]["name"] = free.into();
    object["metadata"]["annotations"][SPEC_HASH] = hash.into();
    let object: DynamicObject = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
    match api(client, provider).create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Gives every node of the Workspace back.
pub async fn give_back(client: &Client, workspace: &Workspace, provider: Provider) -> kube::Result<()> {
    if provider == Provider::None {
        return Ok(());
    }
    for old in list(client, workspace, provider).await?.iter().filter(|old| is_alive(old)) {
        delete(client, provider, &old.name_any()).await?;
    }
    Ok(())
}

async fn list(
    client: &Client,
    workspace: &Workspace,
    provider: Provider,
) -> kube::Result<Vec<DynamicObject>> {
    let (name, namespace) = (workspace.name(), workspace.namespace());
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

/// Whether none of what was asked for is still there, so that it is to be asked for again.
pub fn is_missing(claims: &[Arc<DynamicObject>]) -> bool {
    !claims.iter().any(|claim| is_alive(claim))
}

/// What has come of the asking: whether the node is there, and its provider's words.
pub fn claimed(claims: &[Arc<DynamicObject>]) -> Option<(bool, String)> {
    let alive = claims.iter().find(|claim| is_alive(claim));
    match (alive, claims.first()) {
        (Some(claim), _) => Some(readiness(&claim.data)),
        (None, Some(_)) => Some((false, "the node that was asked for is on its way out".into())),
        (None, None) => None,
    }
}

/// Whose claim it is, by its labels.
pub fn owner(object: &DynamicObject) -> Option<Owner> {
    let labels = object.labels();
    Some((labels.get(NAMESPACE_LABEL)?.clone(), labels.get(WORKSPACE_LABEL)?.clone()))
}

/// How many nodes with the Workspace's labels are ready.
pub fn ready(nodes: &[Arc<Node>], selector: Option<&LabelSelector>) -> usize {
    nodes.iter().filter(|node| is_ready(node) && selects(selector, node.labels())).count()
}

/// What of a node is looked at.
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

/// Whether two looks at a node say the same.
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

pub fn api(client: &Client, provider: Provider) -> Api<DynamicObject> {
    let (kind, plural) = match provider {
        Provider::NodePools => ("NodePool", "nodepools"),
        _ => ("NodeClaim", "nodeclaims"),
    };
    let resource =
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("karpenter.sh", "v1", kind), plural);
    Api::all_with(client.clone(), &resource)
}

/// `spec.nodeClassRef`: how the cloud's machines are set up.
fn class(workspace: &Workspace, cloud: Cloud) -> Value {
    let name = workspace.annotation(&format!("{PREFIX}node-class")).unwrap_or(NODE_CLASS);
    let (group, kind) = match cloud {
        Cloud::Aws => ("karpenter.k8s.aws", "EC2NodeClass"),
        _ => ("karpenter.azure.com", "AKSNodeClass"),
    };
    json!({"group": group, "kind": kind, "name": name})
}

/// What identifies it, and what the pod's affinity looks for.
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
            "replicas": 1,
            "template": {
                "metadata": {"labels": labels(workspace)},
                "spec": {
                    "nodeClassRef": class(workspace, cloud), "taints": taints(), "requirements": requirements,
                },
            },
        },
    })
}

/// Its `Ready` condition, with the words of whichever condition says why not.
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
        true => (false, "the node was asked for".into()),
        false => (false, format!("{}: {}", text("reason"), text("message"))),
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// As Kubernetes reads a selector; none selects every node.
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
        assert!(is_missing(std::slice::from_ref(&leaves)) && !is_missing(&[leaves.clone(), failed.clone()]));
        assert_eq!(claimed(&[leaves]).map(|(there, _)| there), Some(false));
    }
}
