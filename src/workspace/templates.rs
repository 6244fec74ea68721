//! A Workspace that names no configuration -> KAITO's default ConfigMap, as examples/training_config has it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::kind::Workspace;
use super::{MANAGED_BY, MANAGER};

/// The entry of a ConfigMap that is read, and the file it becomes.
pub const CONFIG_FILE: &str = "training_config.yaml";

/// The method of a tuning: how the base is held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The base is held as the checkpoint has it.
    Lora,
    /// The base is held in 4 bits.
    Qlora,
}

impl Method {
    /// Returns the method of that name, in any letter case, as KAITO's webhook takes it.
    pub fn named(name: &str) -> Option<Method> {
        match name.to_lowercase().as_str() {
            "lora" => Some(Method::Lora),
            "qlora" => Some(Method::Qlora),
            _ => None,
        }
    }

    /// Returns the name in a Workspace.
    pub fn name(self) -> &'static str {
        match self {
            Method::Lora => "lora",
            Method::Qlora => "qlora",
        }
    }

    /// Returns the ConfigMap that KAITO copies into a namespace.
    pub fn config_name(self) -> &'static str {
        match self {
            Method::Lora => "lora-params-template",
            Method::Qlora => "qlora-params-template",
        }
    }

    /// Returns the method's `training_config.yaml`.
    pub fn config(self) -> &'static str {
        match self {
            Method::Lora => include_str!("../../examples/training_config/lora.yaml"),
            Method::Qlora => include_str!("../../examples/training_config/qlora.yaml"),
        }
    }
}

/// Returns the ConfigMap in force: the one that is named, or the method's default. A Workspace that serves has no
/// default: an empty name.
pub fn config_name(workspace: &Workspace) -> String {
    if let (None, Some(inference)) = (&workspace.tuning, &workspace.inference) {
        return inference.config.clone();
    }
    let tuning = workspace.tuning.as_ref();
    let named = tuning.map(|tuning| tuning.config.as_str()).filter(|name| !name.is_empty());
    let default =
        tuning.and_then(|tuning| Method::named(&tuning.method)).unwrap_or(Method::Qlora).config_name();
    named.unwrap_or(default).to_owned()
}

/// Returns the default ConfigMap. Several Workspaces share it, so none owns it.
pub fn config_map(method: Method, namespace: Option<String>) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(method.config_name().into()),
            namespace,
            labels: Some(BTreeMap::from([(MANAGED_BY.into(), MANAGER.into())])),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(CONFIG_FILE.into(), method.config().into())])),
        ..ConfigMap::default()
    }
}
