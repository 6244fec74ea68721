//! A Workspace -> the labels and the owner reference of its objects.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::kind::{GROUP, KIND, VERSIONS, Workspace};
use super::{MANAGED_BY, MANAGER, WORKSPACE_LABEL};

/// Returns the labels of an object that hone makes for a Workspace.
pub(super) fn labels(workspace: &Workspace) -> BTreeMap<String, String> {
    BTreeMap::from([
        (WORKSPACE_LABEL.to_owned(), workspace.name().to_owned()),
        (MANAGED_BY.to_owned(), MANAGER.to_owned()),
    ])
}

/// Returns the owner reference of the Workspace's objects, which are deleted with it. A Workspace without a uid owns
/// nothing.
pub fn owner(workspace: &Workspace) -> Option<OwnerReference> {
    Some(OwnerReference {
        api_version: format!("{GROUP}/{}", VERSIONS[VERSIONS.len() - 1]),
        kind: KIND.into(),
        name: workspace.name().into(),
        uid: workspace.metadata.uid.clone()?,
        controller: Some(true),
        block_owner_deletion: Some(true),
    })
}
