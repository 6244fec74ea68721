//! One Workspace under reconciliation -> the objects that are read and written for it, both for tuning and for serving:
//! its ConfigMap, its nodes, its annotations and status, Events.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, Resource};
use serde_json::{Value, json};

use super::events::{self, Weight};
use super::observe::Seen;
use super::revision::{self, Known};
use super::status::Nodes;
use super::{Context, Owner, locked, no_owner, nodes, owner_of};
use crate::backoff;
use crate::workspace::annotations::PREFIX;
use crate::workspace::kind::Status;
use crate::workspace::{REVISION, Workspace, config_name};

/// hone's finalizer while a node claim exists.
const FINALIZER: &str = "hone.sh/nodes";
/// The interval at which a Workspace is reconciled if nothing changes. It costs no request.
pub(super) const RESTING: Duration = Duration::from_secs(600);
/// The first and the longest pause between two reads of the Warnings about a pod that does not start.
const WARNINGS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(240));
/// The first pause after a refusal of the API server, which doubles up to the longest.
const REFUSED: Duration = Duration::from_secs(6);
const REFUSED_MAX: Duration = Duration::from_secs(360);

/// A Workspace that is being reconciled.
pub(super) struct Reconciler<'a> {
    /// The Workspace as it was meant, without the default of an older version.
    pub workspace: Cow<'a, Workspace>,
    /// The values that all reconciliations share.
    pub context: &'a Context,
    /// The client of the API server.
    pub client: &'a Client,
    /// Namespace and name of the Workspace.
    pub owner: Owner,
}

impl<'a> Reconciler<'a> {
    pub fn new(workspace: &'a Workspace, context: &'a Context) -> Reconciler<'a> {
        let owner = owner_of(workspace);
        Reconciler { workspace: Cow::Borrowed(workspace), context, client: &context.client, owner }
    }
}

impl Reconciler<'_> {
    /// Returns the API of a kind of object in the Workspace's namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), self.workspace.namespace())
    }

    /// Returns whether an object belongs to this very Workspace.
    pub fn owns<K: kube::ResourceExt>(&self, object: &K) -> bool {
        let uid = self.workspace.metadata.uid.as_ref();
        object.owner_references().iter().any(|owner| Some(&owner.uid) == uid)
    }

    fn finalizers(&self) -> &[String] {
        self.workspace.metadata.finalizers.as_deref().unwrap_or_default()
    }

    /// Returns the newest revision; it is read once.
    pub async fn known(&self) -> kube::Result<Option<Known>> {
        if let Some(known) = self.context.note(&self.workspace, |notes| notes.known.clone()) {
            return Ok(known);
        }
        let known = revision::newest(&self.api(), &self.workspace).await?;
        self.context.note(&self.workspace, |notes| notes.known = Some(known.clone()));
        Ok(known)
    }

    /// Returns the ConfigMap in force. Its text is read again only if its version changed.
    pub async fn config(&self) -> kube::Result<Option<Arc<ConfigMap>>> {
        let place = (self.workspace.namespace().to_owned(), config_name(&self.workspace));
        if place.1.is_empty() {
            return Ok(None);
        }
        let version =
            self.context.configs.find(&place, &place.1).and_then(|map| map.metadata.resource_version.clone());
        if version.is_none() && self.context.healths.is_fine("configmaps") {
            return Ok(None);
        }
        let kept = locked(&self.context.texts).get(&place).cloned();
        if let Some(kept) = kept.filter(|kept| version.is_some() && kept.metadata.resource_version == version)
        {
            return Ok(Some(kept));
        }
        let map = self.api::<ConfigMap>().get_opt(&place.1).await?.map(Arc::new);
        if let Some(map) = &map {
            locked(&self.context.texts).insert(place, map.clone());
        }
        Ok(map)
    }

    /// Creates the node claims of the Workspace if Karpenter is there, also if earlier claims are gone.
    pub async fn ask_for_node(&self) -> kube::Result<()> {
        let provider = self.context.presence().provider;
        if !nodes::wanted(&self.workspace, provider) {
            return Ok(());
        }
        self.finalizer(true).await?;
        let pods = self.context.pods.of(&self.owner);
        let used = pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
        nodes::ask(self.client, &self.workspace, provider, self.context.settings.cloud, &used).await
    }

    /// Deletes the Workspace's node claims and removes the finalizer.
    pub async fn give_back(&self) -> kube::Result<()> {
        let noted = self.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
        if !noted && nodes::alive(&self.context.claims.of(&self.owner)) == 0 {
            return Ok(());
        }
        nodes::give_back(self.client, &self.owner, self.context.presence().provider).await?;
        self.finalizer(false).await
    }

    /// Returns the state of the requested nodes, for the status.
    pub fn nodes(&self, seen: &Seen) -> Nodes {
        let over = seen.stage.is_over();
        let looks = !over && seen.unplaced > 0;
        let mut waiting = locked(&self.context.without_node);
        _ = if looks { waiting.insert(self.owner.clone()) } else { waiting.remove(&self.owner) };
        let known = looks && self.context.healths.is_fine("nodes");
        let wanted = nodes::wanted(&self.workspace, self.context.presence().provider);
        let selector = self.workspace.resource.label_selector.as_ref();
        Nodes {
            ready: known.then(|| nodes::ready(&self.context.nodes.of(&no_owner()), selector)),
            claim: (!over && wanted).then(|| nodes::claimed(&self.context.claims.of(&self.owner))).flatten(),
        }
    }

    /// Returns the newest Warning about a pod or Job that does not go on and does not say why.
    pub async fn warning(&self, seen: &Seen) -> kube::Result<Option<String>> {
        let Some(uid) = seen.mute.as_deref() else {
            self.context.note(&self.workspace, |notes| {
                notes.warning = None;
                notes.warning_due = Default::default();
            });
            return Ok(None);
        };
        let due =
            self.context.note(&self.workspace, |notes| notes.warning_due.is_now(WARNINGS.0, WARNINGS.1));
        if due {
            // A scheduler's Warning is over once the pod has a node; without a node the pod's conditions have the
            // reason.
            let passed_over = ["FailedScheduling"];
            let namespace = self.workspace.namespace();
            let warning = events::newest_warning(self.client, namespace, uid, &passed_over).await?;
            self.context.note(&self.workspace, |notes| notes.warning = warning);
        }
        Ok(self.context.note(&self.workspace, |notes| notes.warning.clone()))
    }

    /// Reconciles again when somebody else's object is gone, because only hone's own objects are watched.
    pub fn wait_for_end_of<K>(&self, object: &K)
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let waits = self.context.note(&self.workspace, |notes| notes.foreign.clone());
        if waits.swap(true, Ordering::Relaxed) {
            return;
        }
        let uid = object.meta().uid.clone().unwrap_or_default();
        let (api, name) = (self.api::<K>(), object.meta().name.clone().unwrap_or_default());
        let (triggers, owner) = (self.context.triggers.clone(), self.owner.clone());
        tokio::spawn(async move {
            // An error ends the wait, and the next reconciliation starts another.
            _ = await_condition(api, &name, conditions::is_deleted(&uid)).await;
            waits.store(false, Ordering::Relaxed);
            triggers.look_at(&owner);
        });
    }

    /// Returns the pause before the next try; it doubles with each refusal in a row.
    pub fn pause_of_refusals(&self) -> Duration {
        let failures = self.context.note(&self.workspace, |notes| {
            notes.failures += 1;
            notes.failures
        });
        backoff::pause(REFUSED, REFUSED_MAX, failures)
    }

    /// Writes annotations to the Workspace if they differ from what it has; `None` removes one.
    ///
    /// # Errors
    /// The errors of the API server.
    pub async fn annotate(&self, mut wanted: BTreeMap<String, Option<String>>) -> kube::Result<()> {
        if let Some(Some(revision)) = wanted.get(&format!("{PREFIX}revision")).cloned() {
            wanted.insert(REVISION.into(), Some(revision));
        } else {
            // The annotation keeps the revision of the running Job.
            wanted.remove(&format!("{PREFIX}revision"));
        }
        let changed: BTreeMap<&String, &Option<String>> = wanted
            .iter()
            .filter(|(name, value)| self.workspace.annotation(name) != value.as_deref())
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        let patch = json!({"metadata": {"annotations": changed}});
        self.patch(&patch).await
    }

    async fn patch(&self, patch: &Value) -> kube::Result<()> {
        let api = self.api::<Workspace>();
        let written = api.patch(self.workspace.name(), &PatchParams::default(), &Patch::Merge(patch)).await?;
        self.keep(written);
        Ok(())
    }

    /// Writes the status. Fields that it no longer has are removed.
    pub async fn write_status(&self, status: &Status) -> kube::Result<()> {
        let mut fields = json!(status);
        for name in ["workerNodes", "state", "conditions", "targetNodeCount"] {
            fields.as_object_mut().expect("a status").entry(name).or_insert(Value::Null);
        }
        let api = self.api::<Workspace>();
        let patch = Patch::Merge(json!({"status": fields}));
        let written = api.patch_status(self.workspace.name(), &PatchParams::default(), &patch).await?;
        self.keep(written);
        Ok(())
    }

    fn keep(&self, written: Workspace) {
        self.context.note(&self.workspace, |notes| notes.own = Some(Arc::new(written)));
    }

    /// Adds or removes hone's finalizer. The patch names the version that was read, because it replaces the whole list.
    pub async fn finalizer(&self, there: bool) -> kube::Result<()> {
        let mut list = self.finalizers().to_vec();
        let had = list.iter().any(|finalizer| finalizer == FINALIZER);
        if had == there {
            return Ok(());
        }
        list.retain(|finalizer| finalizer != FINALIZER);
        list.extend(there.then(|| FINALIZER.to_owned()));
        let version = &self.workspace.metadata.resource_version;
        let patched =
            self.patch(&json!({"metadata": {"finalizers": list, "resourceVersion": version}})).await;
        match there {
            true => patched,
            false => ignore(404, patched),
        }
    }

    /// Writes an Event about the Workspace.
    pub async fn event(&self, weight: Weight, reason: &str, note: &str) {
        self.context.events.tell(&self.workspace, weight, reason, note).await;
    }
}

pub(super) fn ignore(code: u16, result: kube::Result<()>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == code => Ok(()),
        other => other,
    }
}
