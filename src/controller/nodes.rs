//! Nodes of a Workspace: those that its labels select, or one that Karpenter is asked for and given back to.
//!
//! Source: KAITO v0.12, `pkg/utils/nodeclaim` (a NodeClaim of its own, as its GPU provisioner serves it) and
//! `pkg/nodeprovision/karpenter` (a NodePool for each Workspace).

use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use super::FIELD_MANAGER;
use super::status::Nodes;
use crate::source;
use crate::workspace::annotations::PREFIX;
use crate::workspace::{Cloud, MANAGED_BY, MANAGER, WORKSPACE_LABEL, Workspace};
use k8s_openapi::api::core::v1::Node;

const NAMESPACE_LABEL: &str = "kaito.sh/workspacenamespace";
const NODE_POOL_LABEL: &str = "karpenter.sh/nodepool";
/// The pool that KAITO's claims say they are of, so that Karpenter leaves them alone.
const NODE_POOL: &str = "kaito";
/// Of a node that tunes, in KAITO whatever the model.
const DISK: &str = "1024Gi";
const NODE_CLASS: &str = "default";
/// LIMIT: more nodes than this are not counted.
const NODES_MAX: u32 = 500;

/// What of Karpenter a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    None,
    NodeClaims,
    NodePools,
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

/// Asks for the Workspace's node; asking again changes nothing.
pub async fn ask(
    client: &Client,
    workspace: &Workspace,
    provider: Provider,
    cloud: Option<Cloud>,
) -> kube::Result<()> {
    let cloud = cloud.unwrap_or_else(|| Cloud::of_instance(&workspace.resource.instance_type));
    let object = match provider {
        Provider::None => return Ok(()),
        Provider::NodeClaims => claim(workspace, cloud),
        Provider::NodePools => pool(workspace, cloud),
    };
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    api(client, provider)
        .patch(&name(workspace, provider), &parameters, &Patch::Apply(&object))
        .await
        .map(|_| ())
}

/// Gives it back; one that is gone already is fine.
pub async fn give_back(client: &Client, workspace: &Workspace, provider: Provider) -> kube::Result<()> {
    if provider == Provider::None {
        return Ok(());
    }
    match api(client, provider).delete(&name(workspace, provider), &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(|_| ()),
    }
}

/// What can be taken, and what has come of the asking.
pub async fn look(client: &Client, workspace: &Workspace, provider: Provider) -> kube::Result<Nodes> {
    let claim = match wanted(workspace, provider) {
        true => api(client, provider)
            .get_opt(&name(workspace, provider))
            .await?
            .map(|object| readiness(&object.data)),
        false => None,
    };
    let selected = ListParams::default().labels(&selector(workspace)).limit(NODES_MAX);
    let ready = match Api::<Node>::all(client.clone()).list(&selected).await {
        Ok(nodes) => Some(nodes.items.iter().filter(|node| is_ready(node)).count()),
        // A controller of one namespace may not look at nodes.
        Err(kube::Error::Api(status)) if status.code == 403 => None,
        Err(error) => return Err(error),
    };
    Ok(Nodes { ready, claim })
}

/// The same for the same Workspace, so that a controller that starts again finds what it asked for.
pub fn name(workspace: &Workspace, provider: Provider) -> String {
    let (namespace, name) = (workspace.namespace(), workspace.name());
    let uid = workspace.metadata.uid.as_deref().unwrap_or_default();
    match provider {
        Provider::NodePools => format!("{namespace}-{name}"),
        _ => format!("ws{}", &source::digest(format!("{namespace}/{name}/{uid}").as_bytes())[..9]),
    }
}

fn api(client: &Client, provider: Provider) -> Api<DynamicObject> {
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
            "name": name(workspace, Provider::NodeClaims), "labels": labels,
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
            "name": name(workspace, Provider::NodePools),
            "labels": {
                MANAGED_BY: MANAGER, WORKSPACE_LABEL: workspace.name(), NAMESPACE_LABEL: workspace.namespace(),
            },
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

/// As the API takes it in a query.
fn selector(workspace: &Workspace) -> String {
    let Some(selector) = &workspace.resource.label_selector else { return String::new() };
    let labels = selector.match_labels.iter().flatten().map(|(key, value)| format!("{key}={value}"));
    let expressions = selector.match_expressions.iter().flatten().map(|expression| {
        let values = expression.values.clone().unwrap_or_default().join(",");
        match expression.operator.as_str() {
            "In" => format!("{} in ({values})", expression.key),
            "NotIn" => format!("{} notin ({values})", expression.key),
            "DoesNotExist" => format!("!{}", expression.key),
            _ => expression.key.clone(),
        }
    });
    labels.chain(expressions).collect::<Vec<_>>().join(",")
}
