//! Watches of the cluster -> copies of its objects by Workspace, and the Workspaces to reconcile.
//!
//! Each watch has its own retries, with pauses of two seconds at most, and its own health. A watch that fails stops no
//! other, and `/readyz` reports it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use crate::workspace::Workspace;

/// The first retry of a watch, which doubles up to the longest.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// The longest wait for a list; after that it is requested again.
const LIST_MAX: Duration = Duration::from_secs(30);

/// Namespace and name of the Workspace that an object belongs to.
pub type Owner = (String, String);

/// The queue of Workspaces to reconcile.
#[derive(Clone)]
pub struct Triggers(mpsc::UnboundedSender<ObjectRef<Workspace>>);

impl Triggers {
    /// Returns a queue and the stream that the controller reads.
    pub fn new() -> (Triggers, impl Stream<Item = ObjectRef<Workspace>>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|found| (found, receiver))
        });
        (Triggers(sender), stream)
    }

    /// Adds a Workspace to the queue of reconciliations.
    pub fn look_at(&self, (namespace, name): &Owner) {
        // The receiver is gone only at the end of the process.
        _ = self.0.send(ObjectRef::new(name).within(namespace));
    }
}

/// The health of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// The first list has not arrived yet.
    Starting,
    /// Events arrive.
    Fine,
    /// The watch fails and is tried again; the reason.
    Broken(String),
}

/// The health of every watch, by the name of the objects that it watches.
#[derive(Clone, Default)]
pub struct Healths(Arc<Mutex<BTreeMap<&'static str, Health>>>);

impl Healths {
    fn list(&self) -> MutexGuard<'_, BTreeMap<&'static str, Health>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Logs a change of health once.
    fn set(&self, name: &'static str, health: Health) {
        let before = self.list().insert(name, health.clone());
        match (&before, &health) {
            (Some(Health::Broken(_)), Health::Broken(_)) => {}
            (_, Health::Broken(why)) => {
                tracing::warn!(target: "hone", "the watch of {name} fails: {why}; it is tried again");
            }
            (Some(Health::Broken(_)), Health::Fine) => {
                tracing::info!(target: "hone", "the watch of {name} works again");
            }
            _ => {}
        }
    }

    /// Leaves out a watch that was ended on purpose.
    pub fn forget(&self, name: &str) {
        self.list().remove(name);
    }

    /// Returns whether events of this watch arrive.
    pub fn is_fine(&self, name: &str) -> bool {
        self.list().get(name) == Some(&Health::Fine)
    }

    /// Returns the first that does not work, and why.
    pub fn trouble(&self) -> Option<String> {
        self.list().iter().find_map(|(name, health)| match health {
            Health::Fine => None,
            Health::Starting => Some(format!("{name} have not been listed yet")),
            Health::Broken(why) => Some(format!("{name} cannot be watched: {why}")),
        })
    }
}

/// The receiver of a watch's events.
pub trait Sink<K>: Send {
    /// Receives the next event.
    fn take(&mut self, event: Event<K>);
}

impl<K, F: FnMut(Event<K>) + Send> Sink<K> for F {
    fn take(&mut self, event: Event<K>) {
        self(event);
    }
}

/// Runs a watch without end. `restart` starts it again, for connections that died silently.
pub async fn keep<K>(
    name: &'static str,
    api: kube::Api<K>,
    config: watcher::Config,
    mut sink: impl Sink<K>,
    healths: Healths,
    mut restart: watch::Receiver<u64>,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    healths.set(name, Health::Starting);
    loop {
        let mut stream = std::pin::pin!(watcher(api.clone(), config.clone()));
        let begun = Instant::now();
        let (mut listed, mut pause) = (false, RETRY);
        restart.mark_unchanged();
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                changed = restart.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                () = tokio::time::sleep(LIST_MAX.saturating_sub(begun.elapsed())), if !listed => {
                    healths.set(name, Health::Broken("the API server does not answer".into()));
                    break;
                }
            };
            match event {
                Some(Ok(event)) => {
                    listed |= matches!(event, Event::InitDone | Event::Apply(_) | Event::Delete(_));
                    let works = listed && !matches!(event, Event::Init);
                    sink.take(event);
                    if works {
                        pause = RETRY;
                        healths.set(name, Health::Fine);
                    }
                }
                Some(Err(error)) => {
                    healths.set(name, Health::Broken(error.to_string()));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
                None => break,
            }
        }
    }
}

/// Objects of the cluster, one group for each Workspace.
#[derive(Debug)]
pub struct Cache<K> {
    groups: RwLock<Groups<K>>,
}

#[derive(Debug)]
struct Groups<K> {
    known: HashMap<Owner, BTreeMap<String, Arc<K>>>,
    /// The objects of a list that is still arriving.
    fresh: Option<HashMap<Owner, BTreeMap<String, Arc<K>>>>,
}

impl<K> Default for Cache<K> {
    fn default() -> Self {
        Cache { groups: RwLock::new(Groups { known: HashMap::new(), fresh: None }) }
    }
}

impl<K: Resource + Clone> Cache<K> {
    /// Returns the objects of a Workspace, in the order of their names.
    pub fn of(&self, owner: &Owner) -> Vec<Arc<K>> {
        let groups = self.groups.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        groups.known.get(owner).map(|group| group.values().cloned().collect()).unwrap_or_default()
    }

    /// Returns the object of that name that belongs to a Workspace.
    pub fn find(&self, owner: &Owner, name: &str) -> Option<Arc<K>> {
        let groups = self.groups.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        groups.known.get(owner)?.get(name).cloned()
    }

    /// Takes an event; returns the Workspaces whose objects changed. `of` gives the owner of an object.
    pub fn take(
        &self,
        event: Event<K>,
        of: impl Fn(&K) -> Option<Owner>,
        same: impl Fn(&K, &K) -> bool,
    ) -> Vec<Owner> {
        let mut groups = self.groups.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        match event {
            Event::Init => {
                groups.fresh = Some(HashMap::new());
                Vec::new()
            }
            Event::InitApply(object) => {
                if let (Some(owner), Some(fresh)) = (of(&object), groups.fresh.as_mut()) {
                    fresh.entry(owner).or_default().insert(object.name_any(), Arc::new(object));
                }
                Vec::new()
            }
            Event::InitDone => {
                let fresh = groups.fresh.take().unwrap_or_default();
                let old = std::mem::replace(&mut groups.known, fresh);
                changed(&old, &groups.known, same)
            }
            Event::Apply(object) => {
                let Some(owner) = of(&object) else { return Vec::new() };
                let name = object.name_any();
                let group = groups.known.entry(owner.clone()).or_default();
                let before = group.insert(name, Arc::new(object.clone()));
                match before.is_some_and(|before| same(&before, &object)) {
                    true => Vec::new(),
                    false => vec![owner],
                }
            }
            Event::Delete(object) => {
                let Some(owner) = of(&object) else { return Vec::new() };
                if let Some(group) = groups.known.get_mut(&owner) {
                    group.remove(&object.name_any());
                    if group.is_empty() {
                        groups.known.remove(&owner);
                    }
                }
                vec![owner]
            }
        }
    }
}

/// Returns the owners whose groups differ.
fn changed<K>(
    old: &HashMap<Owner, BTreeMap<String, Arc<K>>>,
    new: &HashMap<Owner, BTreeMap<String, Arc<K>>>,
    same: impl Fn(&K, &K) -> bool,
) -> Vec<Owner> {
    let equal = |one: &BTreeMap<String, Arc<K>>, two: &BTreeMap<String, Arc<K>>| {
        one.len() == two.len()
            && one
                .iter()
                .zip(two)
                .all(|((one_name, one), (two_name, two))| one_name == two_name && same(one, two))
    };
    let differs = |owner: &&Owner| match (old.get(*owner), new.get(*owner)) {
        (Some(one), Some(two)) => !equal(one, two),
        _ => true,
    };
    let gone = old.keys().filter(|owner| !new.contains_key(*owner));
    new.keys().chain(gone).filter(differs).cloned().collect()
}

/// Returns whether two copies have the same version of the API server.
pub fn same_version<K: Resource>(one: &K, two: &K) -> bool {
    one.meta().uid == two.meta().uid && one.meta().resource_version == two.meta().resource_version
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;

    fn pod(name: &str, owner: &str, version: &str) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "namespace": "n", "resourceVersion": version, "labels": {"w": owner}},
        }))
        .unwrap()
    }

    fn of(pod: &Pod) -> Option<Owner> {
        Some(("n".into(), pod.labels().get("w")?.clone()))
    }

    #[test]
    fn a_cache_tells_whose_objects_changed() {
        let cache = Cache::default();
        let take = |event| {
            let mut owners: Vec<String> =
                cache.take(event, of, same_version).into_iter().map(|(_, name)| name).collect();
            owners.sort();
            owners
        };
        let list = |pods: &[Pod]| {
            take(Event::Init);
            pods.iter().for_each(|pod| _ = take(Event::InitApply(pod.clone())));
            take(Event::InitDone)
        };
        assert_eq!(list(&[pod("a", "x", "1"), pod("b", "y", "2")]), ["x", "y"]);
        assert_eq!(take(Event::Apply(pod("a", "x", "3"))), ["x"]);
        assert_eq!(take(Event::Apply(pod("a", "x", "3"))), [""; 0], "the same again");
        // A new list: one gone, one the same, one more.
        assert_eq!(list(&[pod("a", "x", "3"), pod("c", "z", "4")]), ["y", "z"]);
        assert_eq!(cache.of(&("n".into(), "x".into())).len(), 1);
        assert_eq!(take(Event::Delete(pod("a", "x", "5"))), ["x"]);
        assert!(cache.find(&("n".into(), "x".into()), "a").is_none());
    }
}
