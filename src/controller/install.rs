//! The objects that run the controller in a cluster: namespace, rights, Deployment; the webhook's; the chart and the
//! kustomization.

use serde_json::{Value, json};

use super::certificates::{CONFIGURATION, SECRET, SERVICE};
use super::webhook::PATH;
use crate::workspace::kind::{GROUP, PLURAL, VERSIONS};
use crate::workspace::{MANAGED_BY, MANAGER, crd, yaml};

/// Namespace of the controller and of all objects that belong to it.
pub const NAMESPACE: &str = "hone-system";
const NAME: &str = "hone-controller";
const PORT: u16 = 8080;
const WEBHOOK_PORT: u16 = 9443;
const WEBHOOK_VARIABLE: &str = "HONE_WEBHOOK";

/// Returns the objects, in the order of application.
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
    ]
    .into_iter()
    .chain(user_roles())
    .chain([deployment(image, placed(NAME))])
    .collect()
}

/// Returns the objects of the webhook. The controller answers it with HONE_WEBHOOK=true; without an answer Workspaces
/// are accepted.
pub fn webhook() -> Vec<Value> {
    const NAME: &str = "hone-webhook";
    let labels = json!({"app.kubernetes.io/name": NAME, MANAGED_BY: MANAGER});
    let named = |name: &str| json!({"name": name, "labels": labels});
    let placed = |name: &str| json!({"name": name, "namespace": NAMESPACE, "labels": labels});
    let subject = json!([{"kind": "ServiceAccount", "name": self::NAME, "namespace": NAMESPACE}]);
    let binding = |kind: &str, role: &str, metadata: Value| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role, "name": NAME}, "subjects": subject,
        })
    };
    vec![
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": placed(SERVICE),
            "spec": {
                "selector": {"app.kubernetes.io/name": self::NAME},
                "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": WEBHOOK_PORT}],
            },
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": named(NAME),
            "rules": [
                // The trust in the certificates is written there.
                {
                    "apiGroups": ["admissionregistration.k8s.io"], "resources": ["validatingwebhookconfigurations"],
                    "resourceNames": [CONFIGURATION], "verbs": ["get", "update"],
                },
            ],
        }),
        binding("ClusterRoleBinding", "ClusterRole", named(NAME)),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": placed(NAME),
            "rules": [
                // The controller's own certificates; no other Secret can be read.
                {"apiGroups": [""], "resources": ["secrets"], "resourceNames": [SECRET], "verbs": ["get", "update"]},
                {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
            ],
        }),
        binding("RoleBinding", "Role", placed(NAME)),
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": named(CONFIGURATION),
            "webhooks": [{
                "name": format!("workspaces.{CONFIGURATION}"),
                "clientConfig": {"service": {"name": SERVICE, "namespace": NAMESPACE, "path": PATH, "port": 443}},
                "rules": [{
                    "apiGroups": [GROUP], "apiVersions": VERSIONS, "resources": [PLURAL],
                    "operations": ["CREATE", "UPDATE"], "scope": "Namespaced",
                }],
                "admissionReviewVersions": ["v1"], "sideEffects": "None", "failurePolicy": "Ignore",
                "matchPolicy": "Equivalent", "timeoutSeconds": 5,
            }],
        }),
    ]
}

/// Returns the webhook as a part of a kustomization, beside the controller's: `components: [.../jobs/webhook]`.
pub fn webhook_component() -> Value {
    let patch = yaml::write(&[json!([{
        "op": "add", "path": "/spec/template/spec/containers/0/env/-",
        "value": {"name": WEBHOOK_VARIABLE, "value": "true"},
    }])]);
    json!({
        "apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", "resources": ["webhook.yaml"],
        "patches": [{"target": {"kind": "Deployment", "name": NAME}, "patch": patch}],
    })
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

/// The verbs for objects that the controller creates, changes and deletes.
const MADE: [&str; 6] = ["get", "list", "watch", "create", "patch", "delete"];

/// Returns the rights of users: `admin` and `edit` of a cluster may change Workspaces, `view` may read them.
pub fn user_roles() -> Vec<Value> {
    let status = format!("{PLURAL}/status");
    let role = |what: &str, to: &[&str], rules: Value| {
        let mut labels = json!({"app.kubernetes.io/name": NAME, MANAGED_BY: MANAGER});
        for name in to {
            labels[format!("rbac.authorization.k8s.io/aggregate-to-{name}")] = "true".into();
        }
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": format!("hone-workspaces-{what}"), "labels": labels}, "rules": rules,
        })
    };
    let edit = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];
    vec![
        role(
            "edit",
            &["admin", "edit"],
            json!([rule(GROUP, &[PLURAL], &edit), rule(GROUP, &[&status], &["get"])]),
        ),
        role("view", &["view"], json!([rule(GROUP, &[PLURAL, &status], &["get", "list", "watch"])])),
    ]
}

/// Returns the files of the chart, by path. A template holds nothing but names of values, and variables that are left
/// out if their value is empty, so that it renders what `objects` returns.
pub fn chart() -> Vec<(&'static str, String)> {
    // The namespace is the release's.
    let mut list = objects("VALUE-image");
    list.remove(0);
    let spec = &mut list.last_mut().expect("the Deployment")["spec"];
    spec["replicas"] = "VALUE-replicas".into();
    let container = &mut spec["template"]["spec"]["containers"][0];
    container["imagePullPolicy"] = "VALUE-imagePullPolicy".into();
    let variables = container["env"].as_array_mut().expect("a list");
    for (name, value) in [
        ("HONE_IMAGE", "jobImage"),
        ("HONE_GPUS", "gpus"),
        ("HONE_CLOUD", "cloud"),
        ("HONE_NAMESPACE", "namespace"),
        (WEBHOOK_VARIABLE, "webhook"),
    ] {
        variables.push(json!({"name": name, "value": format!("VALUE-{value}")}));
    }
    let named = regex::Regex::new(r"VALUE-(\w+)").expect("an expression");
    // A variable without a value is not set: an empty one would be a value.
    let optional =
        regex::Regex::new(r"( +)- name: (HONE_\w+)\n +value: VALUE-(\w+)\n").expect("an expression");
    let text = yaml::write(&list);
    let text = optional
        .replace_all(&text, "$1{{- if .Values.$3 }}\n$1- name: $2\n$1  value: VALUE-$3\n$1{{- end }}\n")
        .replace(NAMESPACE, "{{ .Release.Namespace }}");
    // Texts are quoted, since a value may be empty; the number is not.
    let text = text.replace("VALUE-replicas", "{{ .Values.replicas }}");
    let text = named.replace_all(&text, "{{ .Values.$1 | quote }}").into_owned();
    let webhook = yaml::write(&webhook()).replace(NAMESPACE, "{{ .Release.Namespace }}");
    let webhook = format!("{{{{- if .Values.webhook }}}}\n{webhook}{{{{- end }}}}\n");
    let version = env!("CARGO_PKG_VERSION");
    let about = json!({
        "apiVersion": "v2", "name": "hone", "version": version, "appVersion": version, "type": "application",
        "description": "The controller that tunes and serves KAITO Workspaces with hone", "kubeVersion": ">=1.31.0-0",
    });
    vec![
        ("Chart.yaml", yaml::write(&[about])),
        ("values.yaml", VALUES.into()),
        ("crds/workspaces.yaml", yaml::write(&[crd::definition()])),
        ("templates/controller.yaml", text),
        ("templates/webhook.yaml", webhook),
    ]
}

const VALUES: &str = "\
# Image of the controller; hone:cpu as README builds it, under the name of a registry.
image: hone:cpu
imagePullPolicy: IfNotPresent
# Image of tuning Jobs and of servers; empty: hone:cuda, or hone:cpu if a Workspace needs no GPU.
jobImage: \"\"
# One replica is the leader, the others wait.
replicas: 2
# GPUs of a pod; empty: those of the instance type.
gpus: \"\"
# azure, aws or other; empty: derived from the instance type.
cloud: \"\"
# Only this namespace's Workspaces; empty: all.
namespace: \"\"
# Validate Workspaces when they are applied, so that kubectl apply shows their mistakes.
webhook: false
";

/// Returns the kustomization that `kubectl apply -k` reads.
pub fn kustomization() -> Value {
    json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": ["crd.yaml", "controller.yaml"],
        "images": [{"name": "hone", "newName": "hone", "newTag": "cpu"}],
    })
}

/// Returns the rights of the controller. No Secret is read: Jobs name them, the kubelet mounts them.
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
        // The states of pods show why one waits, how its container ended, and its progress.
        rule("", &["pods"], &["get", "list", "watch"]),
        rule("", &["pods/log"], &["get"]),
        // The controller reads configurations, creates a default one if there is none, and writes the adapters of
        // servers into ConfigMaps of its own.
        rule("", &["configmaps"], &["get", "list", "watch", "create", "patch"]),
        // Whether any node has the labels.
        rule("", &["nodes"], &["get", "list", "watch"]),
        rule("apps", &["controllerrevisions"], &["get", "list", "create", "delete"]),
        // The StatefulSet that serves, its Services, and its disruption budget.
        rule("apps", &["statefulsets"], &MADE),
        rule("", &["services"], &MADE),
        rule("policy", &["poddisruptionbudgets"], &MADE),
        rule("events.k8s.io", &["events"], &["create"]),
        // Events alone say why a pod cannot be made or mounted.
        rule("", &["events"], &["list"]),
        // The controller requests nodes and gives them back.
        rule(
            "karpenter.sh",
            &["nodeclaims", "nodepools"],
            &["get", "list", "watch", "create", "patch", "delete"],
        ),
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
