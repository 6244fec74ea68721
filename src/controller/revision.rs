//! A Workspace's inputs -> the number of their revision, remembered as KAITO does: a ControllerRevision for each.
//!
//! The newest revision also holds the Workspace's spec, so that a change of a field that cannot change is seen without
//! a webhook.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::json;

use crate::workspace::Workspace;
use crate::workspace::{REVISION, owner};

/// KAITO's label and annotation.
const NAME_LABEL: &str = "workspace.kaito.io/name";
/// KAITO's annotation with the hash of a revision's inputs.
pub const HASH: &str = "workspace.kaito.io/hash";
/// The number of revisions that are kept, as KAITO does.
const HISTORY_MAX: usize = 10;

/// A recorded revision.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// Number of the revision, from 1.
    pub number: i64,
    /// Hash of its inputs.
    pub hash: String,
    /// The Workspace of this revision, as far as it was recorded.
    pub workspace: Option<Workspace>,
    /// The time of the record.
    pub since: Option<jiff::Timestamp>,
}

/// Returns the newest revision, if there is one.
pub async fn newest(api: &Api<ControllerRevision>, workspace: &Workspace) -> kube::Result<Option<Known>> {
    let list = list(api, workspace).await?;
    Ok(list.into_iter().next_back().map(|revision| Known {
        number: revision.revision,
        hash: annotation(&revision),
        since: revision.metadata.creation_timestamp.as_ref().map(|time| time.0),
        workspace: revision.data.and_then(|data| serde_json::from_value(data.0).ok()),
    }))
}

/// Records the next revision and deletes the oldest beyond ten. The name follows from the hash, so recording twice does
/// no harm.
pub async fn add(
    api: &Api<ControllerRevision>,
    workspace: &Workspace,
    hash: &str,
    number: i64,
) -> kube::Result<()> {
    let name = workspace.name();
    // A hash may come back with another number.
    let revision = ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{name}-{}-{number}", &hash[..5])),
            labels: Some(BTreeMap::from([(NAME_LABEL.to_owned(), name.to_owned())])),
            annotations: Some(BTreeMap::from([(HASH.to_owned(), hash.to_owned())])),
            owner_references: owner(workspace).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        data: Some(RawExtension(json!({
            "metadata": {"name": name}, "resource": workspace.resource, "tuning": workspace.tuning,
        }))),
        revision: number,
    };
    match api.create(&PostParams::default(), &revision).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let name = revision.metadata.name.as_deref().unwrap_or_default();
            let old = api.get_opt(name).await?;
            // A record of an earlier Workspace of this name is about to be collected; it does not count.
            if old.is_none_or(|old| !is_of(&old, workspace)) {
                return Err(kube::Error::Api(status));
            }
        }
        other => _ = other?,
    }
    if number <= HISTORY_MAX as i64 {
        return Ok(());
    }
    let list = list(api, workspace).await?;
    for old in list.iter().take(list.len().saturating_sub(HISTORY_MAX)) {
        let name = old.metadata.name.as_deref().unwrap_or_default();
        match api.delete(name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => _ = other?,
        }
    }
    Ok(())
}

/// Returns whether a revision belongs to this very Workspace, and not to an earlier one of its name.
fn is_of(revision: &ControllerRevision, workspace: &Workspace) -> bool {
    let mut owners = revision.metadata.owner_references.iter().flatten();
    owners.any(|owner| Some(&owner.uid) == workspace.metadata.uid.as_ref())
}

/// Returns all revisions, the oldest first.
async fn list(api: &Api<ControllerRevision>, workspace: &Workspace) -> kube::Result<Vec<ControllerRevision>> {
    let selected = ListParams::default().labels(&format!("{NAME_LABEL}={}", workspace.name()));
    let mut list = api.list(&selected).await?.items;
    list.retain(|revision| is_of(revision, workspace));
    list.sort_by_key(|revision| revision.revision);
    Ok(list)
}

fn annotation(revision: &ControllerRevision) -> String {
    let annotations = revision.metadata.annotations.as_ref();
    annotations.and_then(|annotations| annotations.get(HASH)).cloned().unwrap_or_default()
}

/// Revision and hash of the inputs of a Job.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Inputs {
    /// Revision of the inputs.
    pub number: i64,
    /// Hash of the inputs.
    pub hash: String,
}

impl Inputs {
    /// Returns the inputs that the Job's annotations name. A Job of an older hone has no hash.
    pub fn of(job: &Job) -> Option<Inputs> {
        let annotations = job.metadata.annotations.as_ref()?;
        let number = annotations.get(REVISION)?.parse().ok()?;
        Some(Inputs { number, hash: annotations.get(HASH).cloned().unwrap_or_default() })
    }

    /// Returns whether the Job was made from these inputs.
    pub fn made(&self, job: &Job) -> bool {
        Inputs::of(job)
            .is_some_and(|of| of.number == self.number && (of.hash == self.hash || of.hash.is_empty()))
    }
}
