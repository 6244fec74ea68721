//! What a cluster gets to run the controller: its namespace, its rights and its Deployment.

use serde_json::{Value, json};

use crate::workspace::kind::{GROUP, PLURAL};
use crate::workspace::{MANAGED_BY, MANAGER};

pub const NAMESPACE: &str = "hone-system";
const NAME: &str = "hone-controller";
const PORT: u16 = 8080;

/// In the order of application.
pub fn objects(image: &str) -> Vec<Value> {
    let labels = json!({"app.kubernetes.io/name": NAME, MANAGED_BY: MANAGER});
    let named = |name: &str| json!({"name": name, "labels": labels});
    let placed = |name: &str| json!({"name": name, "namespace": NAMESPACE, "labels": labels});
    let subject = json!([{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}]);
    let role = |kind: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": NAME});
    vec![
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": named(NAMESPACE)}),
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": placed(NAME)}),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": named(NAME),
            "rules": cluster_rules(),
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": named(NAME),
            "roleRef": role("ClusterRole"), "subjects": subject,
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": placed(NAME),
            "rules": [
                // One of several leads.
                rule("coordination.k8s.io", &["leases"], &["get", "create", "update"]),
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": placed(NAME),
            "roleRef": role("Role"), "subjects": subject,
        }),
        deployment(image, placed(NAME)),
    ]
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

/// No Secret is read: Jobs name them, the kubelet mounts them.
fn cluster_rules() -> Vec<Value> {
    let status = format!("{PLURAL}/status");
    let finalizers = format!("{PLURAL}/finalizers");
    vec![
        // Workspaces are looked at; annotations and a finalizer are written to them.
        rule(GROUP, &[PLURAL], &["get", "list", "watch", "patch"]),
        rule(GROUP, &[&status], &["get", "patch"]),
        // Owners that block deletion ask for this one.
        rule(GROUP, &[&finalizers], &["update"]),
        rule("batch", &["jobs"], &["get", "list", "watch", "create", "patch", "delete"]),
        // Why a pod waits, how its container ended, how far it is.
        rule("", &["pods"], &["get", "list", "watch"]),
        rule("", &["pods/log"], &["get"]),
        // Configurations are read; a default is made where there is none.
        rule("", &["configmaps"], &["get", "list", "watch", "create"]),
        // Whether any node has the labels.
        rule("", &["nodes"], &["get", "list"]),
        rule("apps", &["controllerrevisions"], &["get", "list", "create", "delete"]),
        rule("events.k8s.io", &["events"], &["create", "patch"]),
        // Nodes are asked for and given back.
        rule("karpenter.sh", &["nodeclaims", "nodepools"], &["get", "create", "patch", "delete"]),
        // Whether KAITO's own controller is there.
        json!({
            "apiGroups": ["admissionregistration.k8s.io"], "resources": ["validatingwebhookconfigurations"],
            "resourceNames": ["validation.workspace.kaito.sh"], "verbs": ["get"],
        }),
    ]
}

fn deployment(image: &str, metadata: Value) -> Value {
    let labels = json!({"app.kubernetes.io/name": NAME});
    let probe = |path: &str| json!({"httpGet": {"path": path, "port": "http"}, "periodSeconds": 10});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata,
        "spec": {
            // One leads, the other is there when it is gone.
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "serviceAccountName": NAME,
                    "securityContext": {
                        "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [{
                        "name": "controller",
                        "image": image,
                        "args": ["controller"],
                        "env": [
                            {"name": "HONE_LOG", "value": "json"},
                            {"name": "HONE_ELECT", "value": "true"},
                            {"name": "HONE_LEASE_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
                            {"name": "HONE_IDENTITY", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                        ],
                        "ports": [{"name": "http", "containerPort": PORT}],
                        "livenessProbe": probe("/healthz"),
                        "readinessProbe": probe("/readyz"),
                        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}},
                        "securityContext": {
                            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    }],
                },
            },
        },
    })
}
