//! KAITO's Workspace, as its API writes it: the fields hone uses are typed, the others kept as they are.
//!
//! Source: KAITO v0.12, `api/v1beta1/workspace_types.go`; v1alpha1 has the same fields except `partition`,
//! `modelAccessSecret` and three of the status. Comments of fields become descriptions of the CRD (`crd.rs`).

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::schemas;

/// API group of Workspaces.
pub const GROUP: &str = "kaito.sh";
/// Kind of the objects.
pub const KIND: &str = "Workspace";
/// Plural in addresses of the API server.
pub const PLURAL: &str = "workspaces";
/// Served versions, the stored one last.
pub const VERSIONS: [&str; 2] = ["v1alpha1", "v1beta1"];

/// A request to tune or serve a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Workspace {
    /// Group and version, such as `kaito.sh/v1beta1`.
    #[serde(default)]
    pub api_version: String,
    /// `Workspace`.
    #[serde(default)]
    pub kind: String,
    /// Name, namespace, annotations.
    #[serde(default)]
    #[schemars(schema_with = "schemas::object")]
    pub metadata: ObjectMeta,
    /// The machines that it runs on.
    #[serde(default)]
    pub resource: Resource,
    /// The model and adapters to serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference: Option<Inference>,
    /// The model to tune, and how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Tuning>,
    /// The observed state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// Nodes of a workspace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// Number of nodes that train together, or of servers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(default = "schemas::one", schema_with = "schemas::count")]
    pub count: Option<i32>,
    /// Type of machine, by the cloud's name, such as Standard_NC24ads_A100_v4.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub instance_type: String,
    /// Labels of the nodes that may be taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schemas::label_selector")]
    pub label_selector: Option<LabelSelector>,
    /// Nodes to prefer. Deprecated; not read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preferred_nodes: Vec<String>,
    /// A part of a GPU; not for tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schemas::anything")]
    pub partition: Option<Value>,
}

/// One fine-tuning: base model, method, data in, adapter out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Tuning {
    /// The base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// lora (the base stays as it is) or qlora (the base in 4 bits).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub method: String,
    /// Name of the ConfigMap with training_config.yaml, in the same namespace; empty: the method's default.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub config: String,
    /// The dataset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Source>,
    /// The place that the adapter is sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Destination>,
}

/// A model that answers, with adapters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Inference {
    /// The base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// A pod template of the user's own. KAITO's controller reads it, hone does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schemas::anything")]
    pub template: Option<Value>,
    /// Name of the ConfigMap with inference_config.yaml, in the same namespace: vllm.max-model-len, vllm.max-num-seqs,
    /// vllm.served-model-name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub config: String,
    /// Adapters that are added to the base.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<Adapter>,
}

/// An adapter, and how much of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Adapter {
    /// Its name, and an image or a volume that holds it. An image workspace://NAME is what that tuning Workspace pushed
    /// last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The strength, from 0 to 1. If it is missing, it is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<String>,
}

/// A model of the catalogue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Preset {
    /// Its name, as `hone model --preset` knows it.
    #[serde(default)]
    pub name: String,
    /// public or private. Deprecated; not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schemas::access_mode")]
    pub access_mode: Option<String>,
    /// How it is reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset_options: Option<PresetOptions>,
}

/// How a model is reached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PresetOptions {
    /// An image with the model's folder, in place of the catalogue's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// Secrets (kubernetes.io/dockerconfigjson) to pull it with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<String>,
    /// Secret whose key HF_TOKEN opens a gated model of the Hugging Face hub.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model_access_secret: String,
}

/// The source of data: exactly one of urls, image and volumeSource.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// A name for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Files to download: http(s), hf://datasets/, s3://, gs://, az:// and oci:// addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// A volume that holds the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schemas::anything")]
    pub volume_source: Option<Value>,
    /// An image that holds the files under /data.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// Secrets (kubernetes.io/dockerconfigjson) to pull it with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<String>,
}

/// The place that the adapter is sent to: exactly one of image and volumeSource.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    /// A volume to write to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schemas::anything")]
    pub volume_source: Option<Value>,
    /// The image to push.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// Secret (kubernetes.io/dockerconfigjson) to push it with.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image_push_secret: String,
}

/// The observed state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Nodes it runs on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub worker_nodes: Vec<String>,
    /// Pending, Running, Succeeded or Failed; for serving Pending, Ready or NotReady.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Latest observations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schemas::conditions")]
    pub conditions: Vec<Condition>,
    /// Number of nodes wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node_count: Option<i32>,
    /// Measurements of serving.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schemas::anything")]
    pub performance: Option<Value>,
}

impl Workspace {
    /// Returns the namespace, `default` where none is written.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or("default")
    }

    /// Returns the name; empty if there is none.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Returns the value of an annotation, by its full name.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        Some(self.metadata.annotations.as_ref()?.get(name)?.as_str())
    }
}

impl kube::Resource for Workspace {
    type DynamicType = ();
    type Scope = k8s_openapi::NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        KIND.into()
    }
    fn group(_: &()) -> Cow<'_, str> {
        GROUP.into()
    }
    fn version(_: &()) -> Cow<'_, str> {
        VERSIONS[VERSIONS.len() - 1].into()
    }
    fn plural(_: &()) -> Cow<'_, str> {
        PLURAL.into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
