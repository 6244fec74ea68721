//! A Kubernetes API server in memory, over real HTTP: versions, conflicts, server-side apply with owners of fields,
//! status, watches with bookmarks that expire, lists in pages, foreground deletion and its garbage collector, the
//! controller of Jobs' time to live, logs, answers that hang. As much of it as hone's controller meets, as strict as
//! the real one is (`api_rules.rs`). Requests need the rights that `hone controller` is installed with.

#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::Notify;

#[path = "api_rules.rs"]
mod rules;

/// plural, kind, apiVersion
const KINDS: [(&str, &str, &str); 18] = [
    ("workspaces", "Workspace", "kaito.sh/v1beta1"),
    ("jobs", "Job", "batch/v1"),
    ("pods", "Pod", "v1"),
    ("configmaps", "ConfigMap", "v1"),
    ("nodes", "Node", "v1"),
    ("namespaces", "Namespace", "v1"),
    ("services", "Service", "v1"),
    ("statefulsets", "StatefulSet", "apps/v1"),
    ("poddisruptionbudgets", "PodDisruptionBudget", "policy/v1"),
    ("persistentvolumeclaims", "PersistentVolumeClaim", "v1"),
    ("secrets", "Secret", "v1"),
    ("events", "Event", "events.k8s.io/v1"),
    ("leases", "Lease", "coordination.k8s.io/v1"),
    ("controllerrevisions", "ControllerRevision", "apps/v1"),
    ("nodeclaims", "NodeClaim", "karpenter.sh/v1"),
    ("nodepools", "NodePool", "karpenter.sh/v1"),
    ("customresourcedefinitions", "CustomResourceDefinition", "apiextensions.k8s.io/v1"),
    ("validatingwebhookconfigurations", "ValidatingWebhookConfiguration", "admissionregistration.k8s.io/v1"),
];
/// A watch ends by itself after this; clients begin another.
const WATCH_MAX: Duration = Duration::from_secs(20);
/// The token of a user with every right; requests without it are the controller's.
const ADMIN: &str = "admin";
/// LIMIT: objects of one page, if a client asks for pages.
const PAGE_MAX: usize = 250;
/// The delay of the garbage collector.
const GARBAGE_DELAY: Duration = Duration::from_millis(150);
/// The interval of the cluster's own controllers.
const CONTROLLERS_INTERVAL: Duration = Duration::from_millis(20);

type Key = (String, String, String);
type Body = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    /// Version, plural, namespace, kind of change, object, its labels before.
    history: Vec<(u64, String, String, &'static str, Value, Value)>,
    /// The oldest known version. Watches from before it get the answer that it is gone.
    oldest: u64,
    absent: HashSet<String>,
    /// Requests of a verb and a resource that answer this code, and how many of them still do.
    failures: HashMap<(String, String), (u16, u32, Option<String>)>,
    logs: HashMap<(String, String), String>,
    requests: Vec<String>,
    /// The time since which an object is to be deleted, or a Job is over.
    since: HashMap<(Key, &'static str), Instant>,
    /// The fields that somebody applied or wrote.
    owners: HashMap<Key, rules::Owners>,
    /// Nothing is answered.
    hangs: bool,
    /// Nobody can connect.
    down: bool,
    /// Objects that wait for the garbage collector stay.
    collector_stopped: bool,
}

pub struct ApiServer {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl ApiServer {
    pub fn start() -> ApiServer {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Arc::new(Mutex::new(State { version: 100, ..State::default() }));
        let changed = Arc::new(Notify::new());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (shared, signal) = (state.clone(), changed.clone());
        runtime.spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                if shared.lock().unwrap().down {
                    continue;
                }
                let (state, changed) = (shared.clone(), signal.clone());
                let service = service_fn(move |request| {
                    let (state, changed) = (state.clone(), changed.clone());
                    async move {
                        until(&state, &changed, |state| !state.hangs).await;
                        Ok::<_, Infallible>(answer(&state, &changed, request).await)
                    }
                });
                let (state, changed) = (shared.clone(), signal.clone());
                tokio::spawn(async move {
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        _ = connection => {}
                        () = until(&state, &changed, |state| state.down) => {}
                    }
                });
            }
        });
        let (shared, signal) = (state.clone(), changed.clone());
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(CONTROLLERS_INTERVAL).await;
                if shared.lock().unwrap().control() {
                    signal.notify_waiters();
                }
            }
        });
        ApiServer { state, changed, address, runtime: Some(runtime) }
    }

    pub fn config(&self) -> kube::Config {
        kube::Config::new(format!("http://{}", self.address).parse().unwrap())
    }

    /// Returns the configuration of a user who may do everything.
    pub fn config_of_admin(&self) -> kube::Config {
        let mut config = self.config();
        config.auth_info.token = Some(ADMIN.to_owned().into());
        config
    }

    /// Returns a server on which a CRD is not installed.
    pub fn without(self, plural: &str) -> ApiServer {
        self.state.lock().unwrap().absent.insert(plural.into());
        self
    }

    /// Answers the next requests of a verb (`GET`, `LIST`, `WATCH`, `POST`, `PATCH`, `PUT`, `DELETE`) for a resource
    /// with this code.
    pub fn fail_next(&self, verb: &str, plural: &str, code: u16, times: u32) {
        self.state.lock().unwrap().failures.insert((verb.into(), plural.into()), (code, times, None));
    }

    /// Refuses requests of a verb for a resource with this message, as admission does; `None`: no longer.
    pub fn refuse(&self, verb: &str, plural: &str, why: Option<&str>) {
        let times = if why.is_some() { u32::MAX } else { 0 };
        let failure = (403, times, why.map(str::to_owned));
        self.state.lock().unwrap().failures.insert((verb.into(), plural.into()), failure);
    }

    /// Replaces an object as `kubectl replace` does: annotations, labels and finalizers that are not written go.
    pub fn replace(&self, plural: &str, namespace: &str, name: &str, mut object: Value) {
        let old = self.get(plural, namespace, name).expect("an object");
        for field in ["uid", "creationTimestamp"] {
            object["metadata"][field] = old["metadata"][field].clone();
        }
        object["status"] = old["status"].clone();
        self.put(plural, object);
    }

    /// Gives the controller's account this right, or takes it away.
    pub fn deny(&self, verb: &str, plural: &str, denied: bool) {
        self.fail_next(verb, plural, 403, if denied { u32::MAX } else { 0 });
        if denied {
            self.expire_watches();
        }
    }

    /// Takes requests and does not answer them, as a stopped server.
    pub fn hang(&self, hangs: bool) {
        self.state.lock().unwrap().hangs = hangs;
        self.changed.notify_waiters();
    }

    /// Ends every connection and accepts no other. Afterwards no watch can continue from before.
    pub fn go_down(&self) {
        self.state.lock().unwrap().down = true;
        self.changed.notify_waiters();
    }

    pub fn come_up(&self) {
        self.expire_watches();
        self.state.lock().unwrap().down = false;
    }

    /// Installs or removes the CRD of a resource.
    pub fn install(&self, plural: &str, installed: bool) {
        let mut state = self.state.lock().unwrap();
        match installed {
            true => _ = state.absent.remove(plural),
            false => {
                state.absent.insert(plural.into());
                let gone: Vec<Key> = state.objects.keys().filter(|key| key.0 == plural).cloned().collect();
                gone.iter().for_each(|key| state.remove(key));
            }
        }
        drop(state);
        self.expire_watches();
    }

    /// Stops the collector, or starts it again. Meanwhile an object that is deleted in the foreground stays.
    pub fn stop_collector(&self, stopped: bool) {
        self.state.lock().unwrap().collector_stopped = stopped;
    }

    /// Deletes as `kubectl delete --cascade=POLICY` does.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str, policy: &str) {
        let key = key(plural, namespace, name);
        self.state.lock().unwrap().delete(&key, Some(policy));
        self.changed.notify_waiters();
    }

    /// Takes a finalizer of somebody else away.
    pub fn release(&self, plural: &str, namespace: &str, name: &str, finalizer: &str) {
        let mut object = self.get(plural, namespace, name).expect("an object");
        let list = object["metadata"]["finalizers"].as_array_mut().expect("finalizers");
        list.retain(|other| other != finalizer);
        self.put(plural, object);
    }

    /// Writes a Workspace through v1alpha1: the defaults of that version are filled in.
    pub fn write_through_v1alpha1(&self, namespace: &str, name: &str, patch: &Value) {
        let mut object = self.get("workspaces", namespace, name).expect("a Workspace");
        merge(&mut object, patch);
        if object["resource"]["instanceType"].is_null() {
            object["resource"]["instanceType"] = json!("Standard_NC24ads_A100_v4");
        }
        self.put("workspaces", object);
    }

    /// Ends every watch with 410, and refuses to continue from versions that clients know.
    pub fn expire_watches(&self) {
        let mut state = self.state.lock().unwrap();
        state.version += 1;
        state.oldest = state.version;
        drop(state);
        self.changed.notify_waiters();
    }

    pub fn set_log(&self, namespace: &str, pod: &str, text: &str) {
        self.state.lock().unwrap().logs.insert((namespace.into(), pod.into()), text.into());
    }

    pub fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }

    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.state.lock().unwrap().objects.get(&key(plural, namespace, name)).cloned()
    }

    pub fn list(&self, plural: &str) -> Vec<Value> {
        let state = self.state.lock().unwrap();
        state
            .objects
            .iter()
            .filter(|((other, ..), _)| other == plural)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// Writes an object as it stands, status and all, as the cluster's own controllers do.
    pub fn put(&self, plural: &str, object: Value) {
        let mut state = self.state.lock().unwrap();
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        state.store(key(plural, &namespace, &name), object, true);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Merges into an object, status and all.
    pub fn merge(&self, plural: &str, namespace: &str, name: &str, patch: &Value) {
        let mut object =
            self.get(plural, namespace, name).unwrap_or_else(|| panic!("no {plural} {namespace}/{name}"));
        merge(&mut object, patch);
        self.put(plural, object);
    }

    /// Waits until `holds`; fails with the last state if it does not.
    pub fn wait<T>(&self, what: &str, holds: impl Fn(&ApiServer) -> Option<T>) -> T {
        /// LIMIT: everything here takes milliseconds, but a retry seconds.
        const PATIENCE: Duration = Duration::from_secs(90);
        self.wait_for(PATIENCE, what, holds)
    }

    /// Waits longer than `wait`, for a crowd on a machine that does other things too.
    pub fn wait_longer<T>(&self, what: &str, holds: impl Fn(&ApiServer) -> Option<T>) -> T {
        self.wait_for(Duration::from_secs(300), what, holds)
    }

    fn wait_for<T>(&self, patience: Duration, what: &str, holds: impl Fn(&ApiServer) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = holds(self) {
                return found;
            }
            if start.elapsed() > patience {
                let workspaces: Vec<Value> = self.list("workspaces").into_iter().take(3).collect();
                panic!(
                    "{what}: not within {patience:?}\n{workspaces:#?}\n{:#?}",
                    self.requests().iter().rev().take(20).collect::<Vec<_>>()
                );
            }
            std::thread::sleep(if patience.as_secs() > 100 {
                Duration::from_millis(500)
            } else {
                Duration::from_millis(10)
            });
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl State {
    /// Returns the object under its next version. `whole`: with the fields that a status subresource separates.
    fn store(&mut self, key: Key, mut object: Value, whole: bool) -> Value {
        let old = self.objects.get(&key).cloned();
        if let (Some(old), false) = (&old, whole) {
            object["status"] = old["status"].clone();
        }
        if object["status"].is_null() {
            object.as_object_mut().unwrap().remove("status");
        }
        let (_, kind, version) = KINDS.into_iter().find(|(plural, ..)| *plural == key.0).unwrap();
        object["kind"] = kind.into();
        object["apiVersion"] = version.into();
        rules::defaults(&key.0, &mut object);
        if old.as_ref().is_some_and(|old| same(old, &object)) {
            return old.unwrap();
        }
        self.version += 1;
        let meta = object["metadata"].as_object_mut().unwrap();
        meta.entry("uid").or_insert_with(|| format!("uid-{}", self.version).into());
        meta.entry("creationTimestamp").or_insert_with(|| {
            format!("2026-01-01T00:{:02}:{:02}Z", self.version / 60 % 60, self.version % 60).into()
        });
        let generation = old.as_ref().map_or(0, |old| old["metadata"]["generation"].as_i64().unwrap_or(0));
        let changed = old.as_ref().is_none_or(|old| !same(&inner(old), &inner(&object)));
        if !rules::WITHOUT_GENERATION.contains(&key.0.as_str()) {
            object["metadata"]["generation"] = (generation + i64::from(changed)).into();
        }
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let leaving = object["metadata"]["deletionTimestamp"].is_string();
        if leaving && object["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty) {
            self.objects.insert(key.clone(), object.clone());
            self.remove(&key);
            return object;
        }
        let change = if old.is_some() { "MODIFIED" } else { "ADDED" };
        let before = old.map(|old| old["metadata"]["labels"].clone()).unwrap_or_default();
        self.history.push((self.version, key.0.clone(), key.1.clone(), change, object.clone(), before));
        self.objects.insert(key, object.clone());
        object
    }

    /// Removes an object, and the objects that it owned.
    fn remove(&mut self, key: &Key) {
        let Some(mut object) = self.objects.remove(key) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let before = object["metadata"]["labels"].clone();
        self.history.push((self.version, key.0.clone(), key.1.clone(), "DELETED", object.clone(), before));
        self.owners.remove(key);
        self.since.retain(|(other, _), _| other != key);
        for dependent in self.dependents(&object) {
            self.since.insert((dependent, "orphaned"), Instant::now());
        }
    }

    /// Returns the objects that this one owns.
    fn dependents(&self, object: &Value) -> Vec<Key> {
        let uid = &object["metadata"]["uid"];
        let owned = |other: &Value| {
            other["metadata"]["ownerReferences"]
                .as_array()
                .is_some_and(|list| list.iter().any(|owner| &owner["uid"] == uid))
        };
        self.objects.iter().filter(|(_, other)| owned(other)).map(|(key, _)| key.clone()).collect()
    }

    /// Deletes as the API server does: at once, or with finalizers and a time of deletion. Jobs without a policy leave
    /// their pods.
    fn delete(&mut self, key: &Key, policy: Option<&str>) -> Option<Value> {
        let mut object = self.objects.get(key)?.clone();
        let default = if key.0 == "jobs" { "Orphan" } else { "Background" };
        let policy = policy.unwrap_or(default).to_lowercase();
        let mut finalizers = object["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
        if policy == "orphan" && !finalizers.contains(&json!("orphan")) {
            finalizers.push(json!("orphan"));
            self.since.insert((key.clone(), "orphan"), Instant::now());
        }
        if policy == "foreground" && !finalizers.contains(&json!("foregroundDeletion")) {
            finalizers.push(json!("foregroundDeletion"));
            self.since.insert((key.clone(), "foreground"), Instant::now());
        }
        if finalizers.is_empty() {
            self.remove(key);
            return Some(object);
        }
        object["metadata"]["finalizers"] = finalizers.into();
        if object["metadata"]["deletionTimestamp"].is_null() {
            object["metadata"]["deletionTimestamp"] = json!(rules::now());
        }
        Some(self.store(key.clone(), object, true))
    }

    /// Does one round of the garbage collector and of the controller of Jobs' time to live. Returns whether anything
    /// changed.
    fn control(&mut self) -> bool {
        let before = self.version;
        let due = |since: &Instant| since.elapsed() >= GARBAGE_DELAY;
        let collected: Vec<(Key, &'static str)> = match self.collector_stopped {
            true => Vec::new(),
            false => self.since.iter().filter(|(_, at)| due(at)).map(|(key, _)| key.clone()).collect(),
        };
        for (key, why) in collected.into_iter().filter(|(_, why)| *why != "over") {
            self.since.remove(&(key.clone(), why));
            let Some(mut object) = self.objects.get(&key).cloned() else { continue };
            match why {
                "foreground" => {
                    for dependent in self.dependents(&object) {
                        self.delete(&dependent, Some("Background"));
                    }
                    let list = object["metadata"]["finalizers"].as_array_mut().unwrap();
                    list.retain(|finalizer| finalizer != "foregroundDeletion");
                    self.store(key, object, true);
                }
                "orphan" => {
                    for dependent in self.dependents(&object) {
                        let mut other = self.objects[&dependent].clone();
                        other["metadata"].as_object_mut().unwrap().remove("ownerReferences");
                        self.store(dependent, other, true);
                    }
                    let list = object["metadata"]["finalizers"].as_array_mut().unwrap();
                    list.retain(|finalizer| finalizer != "orphan");
                    self.store(key, object, true);
                }
                _ => _ = self.delete(&key, Some("Background")),
            }
        }
        let over: Vec<(Key, u64)> = self
            .objects
            .iter()
            .filter(|(key, job)| key.0 == "jobs" && rules::is_over(job))
            .filter_map(|(key, job)| Some((key.clone(), job["spec"]["ttlSecondsAfterFinished"].as_u64()?)))
            .collect();
        for (key, ttl) in over {
            let since = *self.since.entry((key.clone(), "over")).or_insert_with(Instant::now);
            let leaves = self.objects[&key]["metadata"]["deletionTimestamp"].is_string();
            if !leaves && since.elapsed() >= Duration::from_secs(ttl) {
                self.delete(&key, Some("Foreground"));
            }
        }
        self.version != before
    }
}

async fn until(state: &Mutex<State>, changed: &Notify, holds: impl Fn(&State) -> bool) {
    loop {
        let wake = changed.notified();
        tokio::pin!(wake);
        wake.as_mut().enable();
        if holds(&state.lock().unwrap()) {
            return;
        }
        wake.await;
    }
}

/// Returns the part of an object whose change counts for `generation`.
fn inner(object: &Value) -> Value {
    let mut object = object.clone();
    object.as_object_mut().unwrap().remove("metadata");
    object.as_object_mut().unwrap().remove("status");
    object
}

/// Returns whether two objects are equal except for version and generation.
fn same(one: &Value, two: &Value) -> bool {
    let strip = |object: &Value| {
        let mut object = object.clone();
        if let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            meta.remove("resourceVersion");
            meta.remove("generation");
        }
        object
    };
    strip(one) == strip(two)
}

/// Applies a merge patch (RFC 7386).
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let object = target.as_object_mut().unwrap();
    for (name, value) in fields {
        match value {
            Value::Null => _ = object.remove(name),
            value => merge(object.entry(name.clone()).or_insert(Value::Null), value),
        }
    }
}

fn key(plural: &str, namespace: &str, name: &str) -> Key {
    (plural.into(), namespace.into(), name.into())
}

/// A request's path and query.
struct Asked {
    plural: String,
    namespace: String,
    name: Option<String>,
    sub: Option<String>,
    query: HashMap<String, String>,
    /// As core/v1, where events have other names for their fields.
    core: bool,
    metadata_only: bool,
}

fn parse(path: &str, query: &str) -> Option<Asked> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let rest = match parts.as_slice() {
        ["api", "v1", rest @ ..] => rest,
        ["apis", _, _, rest @ ..] => rest,
        _ => return None,
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let query = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    Some(Asked {
        plural: rest.first()?.to_string(),
        namespace: namespace.into(),
        name: rest.get(1).map(|name| name.to_string()),
        sub: rest.get(2).map(|sub| sub.to_string()),
        query,
        core: path.starts_with("/api/v1/"),
        metadata_only: false,
    })
}

async fn answer(
    state: &Arc<Mutex<State>>,
    changed: &Arc<Notify>,
    request: Request<Incoming>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    state.lock().unwrap().requests.push(format!("{} {path}", parts.method));
    let accept = parts.headers.get("accept").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if path == "/version" {
        return reply(
            200,
            &json!({
                "major": "1", "minor": "36", "gitVersion": "v1.36.0-fake", "gitCommit": "", "gitTreeState": "clean",
                "buildDate": "", "goVersion": "", "compiler": "", "platform": "",
            }),
        );
    }
    if path == "/apis/karpenter.sh/v1" {
        return karpenter(&state.lock().unwrap());
    }
    let Some(mut asked) = parse(&path, &query) else { return refuse(404, "NotFound", "no such path") };
    asked.metadata_only = accept.contains("as=PartialObjectMetadata");
    let known = KINDS.iter().any(|(plural, ..)| *plural == asked.plural);
    if !known || state.lock().unwrap().absent.contains(&asked.plural) {
        return refuse(404, "NotFound", "the server could not find the requested resource");
    }
    let watch = asked.query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
    let verb = match (parts.method.as_str(), &asked.name, watch) {
        ("GET", None, true) => "WATCH",
        ("GET", None, false) => "LIST",
        (verb, ..) => verb,
    };
    let applies = parts
        .headers
        .get("content-type")
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/apply-patch"));
    let admin = parts.headers.get("authorization").is_some_and(|value| value == &format!("Bearer {ADMIN}"));
    if !admin && let Err(why) = asked.is_allowed(&path, verb, applies, &state.lock().unwrap()) {
        return refuse(403, "Forbidden", &why);
    }
    if let Some((code, left, why)) =
        state.lock().unwrap().failures.get_mut(&(verb.to_owned(), asked.plural.clone()))
        && *left > 0
    {
        *left -= u32::from(*left != u32::MAX);
        return match *code {
            code if why.is_some() => refuse(code, "Forbidden", why.as_deref().unwrap_or_default()),
            409 => refuse(409, "Conflict", "the object has been modified"),
            403 => refuse(
                403,
                "Forbidden",
                &format!("{} is forbidden: User \"hone\" cannot {}", asked.plural, verb.to_lowercase()),
            ),
            code => refuse(code, "InternalError", "the server is currently unable to handle the request"),
        };
    }
    let response = match (&parts.method, &asked.name, &asked.sub) {
        (&Method::GET, None, _) if watch => return stream(state.clone(), changed.clone(), asked),
        (&Method::GET, None, _) => list(&state.lock().unwrap(), &asked),
        (&Method::GET, Some(name), Some(sub)) if sub == "log" => log(&state.lock().unwrap(), &asked, name),
        (&Method::GET, Some(name), _) => get(&state.lock().unwrap(), &asked, name),
        _ => {
            let kind =
                parts.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
            let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
            if let Err((code, reason, message)) = rules::form(&parts.method, kind, &asked.query) {
                return refuse(code, reason, &message);
            }
            write(&mut state.lock().unwrap(), &parts.method, &asked, kind, body)
        }
    };
    changed.notify_waiters();
    response
}

fn write(state: &mut State, method: &Method, asked: &Asked, kind: &str, body: Value) -> Response<Body> {
    let name = asked.name.clone().or_else(|| body["metadata"]["name"].as_str().map(str::to_owned));
    let generated = || Some(format!("{}{:05}", body["metadata"]["generateName"].as_str()?, state.version));
    let Some(name) = name.or_else(generated) else { return refuse(422, "Invalid", "no name") };
    let key = key(&asked.plural, &asked.namespace, &name);
    let old = state.objects.get(&key).cloned();
    let stale = |body: &Value| match (&old, body["metadata"]["resourceVersion"].as_str()) {
        (Some(old), Some(version)) => old["metadata"]["resourceVersion"] != version,
        _ => false,
    };
    let manager = asked.query.get("fieldManager").cloned().unwrap_or_else(|| "unknown".into());
    let applies = kind.contains("apply-patch");
    let placed = |mut object: Value| {
        object["metadata"]["name"] = name.clone().into();
        if !asked.namespace.is_empty() {
            object["metadata"]["namespace"] = asked.namespace.clone().into();
        }
        object
    };
    let mut owners = state.owners.get(&key).cloned().unwrap_or_default();
    let (code, object) = match (method, old.clone()) {
        (&Method::POST, Some(_)) => return refuse(409, "AlreadyExists", "it already exists"),
        (&Method::POST, None) => {
            let mut object = placed(body);
            object.as_object_mut().unwrap().remove("status");
            (201, object)
        }
        (&Method::PATCH, None) if applies => {
            owners.apply(&manager, &body);
            (201, placed(body))
        }
        (_, None) => return refuse(404, "NotFound", &format!("{} {name:?} not found", asked.plural)),
        (&Method::PUT | &Method::PATCH, Some(_)) if stale(&body) => {
            return refuse(409, "Conflict", "the object has been modified");
        }
        (&Method::PUT, Some(_)) => (200, body),
        (&Method::PATCH, Some(mut object)) => {
            if applies {
                let force = asked.query.get("force").is_some_and(|force| force == "true");
                if let Some(field) = owners.conflict(&manager, &object, &body).filter(|_| !force) {
                    return refuse(409, "Conflict", &format!("Apply failed with 1 conflict: {field}"));
                }
                for path in owners.apply(&manager, &body) {
                    rules::take_away(&mut object, &path);
                }
            } else {
                owners.write(&manager, &object, &body);
            }
            if asked.sub.as_deref() == Some("status") {
                merge(&mut object["status"], &body["status"]);
            } else {
                let status = object["status"].clone();
                merge(&mut object, &body);
                object["status"] = status;
            }
            (200, object)
        }
        (&Method::DELETE, Some(object)) => {
            let uid = &body["preconditions"]["uid"];
            if !uid.is_null() && *uid != object["metadata"]["uid"] {
                return refuse(
                    409,
                    "Conflict",
                    "the UID in the precondition does not match the UID in record",
                );
            }
            let gone = state.delete(&key, body["propagationPolicy"].as_str());
            return reply(200, &gone.unwrap_or_default());
        }
        _ => return refuse(405, "MethodNotAllowed", "not that"),
    };
    if let Err(message) = rules::validate(&asked.plural, old.as_ref(), &object) {
        let (_, kind, _) = KINDS.into_iter().find(|(plural, ..)| *plural == asked.plural).unwrap();
        return refuse(422, "Invalid", &format!("{kind} {name:?} is invalid: {message}"));
    }
    if asked.query.get("dryRun").is_some_and(|dry| dry == "All") {
        return reply(code, &object);
    }
    state.owners.insert(key.clone(), owners);
    // A PUT of the object itself leaves the status as it is.
    let whole = *method == Method::PATCH;
    reply(code, &state.store(key, object, whole))
}

fn get(state: &State, asked: &Asked, name: &str) -> Response<Body> {
    match state.objects.get(&key(&asked.plural, &asked.namespace, name)) {
        Some(object) => reply(200, object),
        None => refuse(404, "NotFound", &format!("{} {name:?} not found", asked.plural)),
    }
}

fn list(state: &State, asked: &Asked) -> Response<Body> {
    let (_, kind, version) = KINDS.into_iter().find(|(plural, ..)| *plural == asked.plural).unwrap();
    let number = |name: &str| asked.query.get(name).and_then(|text| text.parse::<usize>().ok());
    let (from, limit) = (number("continue").unwrap_or(0), number("limit").unwrap_or(usize::MAX));
    // Pages are short, so that every list has several.
    let limit = if limit > 100 { limit.min(PAGE_MAX) } else { limit };
    let mut found = state
        .objects
        .range(key(&asked.plural, "", "")..)
        .take_while(|((plural, ..), _)| *plural == asked.plural)
        .filter(|((_, namespace, _), object)| asked.selects(namespace, object))
        .map(|(_, object)| asked.shown(object))
        .skip(from);
    let items: Vec<Value> = found.by_ref().take(limit).collect();
    let mut meta = json!({"resourceVersion": state.version.to_string()});
    if found.next().is_some() {
        meta["continue"] = (from + items.len()).to_string().into();
    }
    reply(
        200,
        &json!({"kind": format!("{kind}List"), "apiVersion": version, "metadata": meta, "items": items}),
    )
}

impl Asked {
    /// Checks that the controller's own roles allow the request; an apply that creates needs both rights.
    fn is_allowed(&self, path: &str, verb: &str, applies: bool, state: &State) -> Result<(), String> {
        let group = match path.split('/').collect::<Vec<_>>().as_slice() {
            ["", "apis", group, ..] => *group,
            _ => "",
        };
        let verb = match verb {
            "POST" => "create".to_owned(),
            "PUT" => "update".into(),
            other => other.to_lowercase(),
        };
        let resource = match &self.sub {
            Some(sub) => format!("{}/{sub}", self.plural),
            None => self.plural.clone(),
        };
        let name = self.name.as_deref().unwrap_or_default();
        let there = state.objects.contains_key(&key(&self.plural, &self.namespace, name));
        let verbs = if applies && !there { vec![verb, "create".to_owned()] } else { vec![verb] };
        for verb in verbs {
            if !rules::is_allowed(&self.namespace, group, &resource, name, &verb) {
                return Err(format!(
                    "{resource} is forbidden: User \"system:serviceaccount:hone-system:hone-controller\" cannot {verb} \
                     resource \"{resource}\" in API group \"{group}\" in the namespace {:?}",
                    self.namespace
                ));
            }
        }
        Ok(())
    }

    /// Returns whether an object matches a namespace and labels: `a=b,c`.
    fn selects(&self, namespace: &str, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        let wanted = self.query.get("labelSelector").map_or("", String::as_str);
        let holds = |part: &str| match part.split_once('=') {
            Some((name, value)) => labels[name] == value.trim_start_matches('='),
            None => labels.get(part).is_some(),
        };
        let fields = self.query.get("fieldSelector").map_or("", String::as_str);
        // core/v1 has another name for the subject of an event.
        let renamed = self.plural == "events" && self.core && object["involvedObject"].is_null();
        let field = |part: &str| match part.split_once('=') {
            Some((path, value)) => {
                let found = path.split('.').fold(object, |at, name| match name {
                    "involvedObject" if renamed => &at["regarding"],
                    _ => &at[name],
                });
                found.as_str().unwrap_or_default() == value.trim_start_matches('=')
            }
            None => false,
        };
        (self.namespace.is_empty() || self.namespace == namespace)
            && wanted.split(',').filter(|part| !part.is_empty()).all(holds)
            && fields.split(',').filter(|part| !part.is_empty()).all(field)
    }

    /// Returns an object in the version of this request.
    fn shown(&self, object: &Value) -> Value {
        if self.metadata_only {
            return json!({
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"],
            });
        }
        let mut object = object.clone();
        if self.plural == "events" && self.core {
            for (new, old) in [("regarding", "involvedObject"), ("note", "message")] {
                if object[old].is_null() {
                    object[old] = object[new].take();
                }
            }
            object["apiVersion"] = "v1".into();
        }
        object
    }
}

fn log(state: &State, asked: &Asked, pod: &str) -> Response<Body> {
    let text = state.logs.get(&(asked.namespace.clone(), pod.to_owned())).cloned().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = asked.query.get("tailLines").and_then(|tail| tail.parse().ok()).unwrap_or(lines.len());
    let text = lines[lines.len().saturating_sub(tail)..].join("\n");
    Response::new(Full::from(text).boxed_unsync())
}

fn stream(state: Arc<Mutex<State>>, changed: Arc<Notify>, asked: Asked) -> Response<Body> {
    let from =
        asked.query.get("resourceVersion").and_then(|version| version.parse::<u64>().ok()).unwrap_or(0);
    let asked = Arc::new(asked);
    let frames = futures_util::stream::unfold((from, false), move |(from, ended)| {
        let (state, changed, asked) = (state.clone(), changed.clone(), asked.clone());
        async move {
            if ended {
                return None;
            }
            let deadline = Instant::now() + WATCH_MAX;
            loop {
                let wake = changed.notified();
                tokio::pin!(wake);
                wake.as_mut().enable();
                let (lines, last, gone) = events(&state.lock().unwrap(), &asked, from);
                until(&state, &changed, |state| !state.hangs).await;
                if gone || !lines.is_empty() {
                    let frame: Result<Frame<Bytes>, Infallible> = Ok(Frame::data(Bytes::from(lines)));
                    return Some((frame, (last, gone)));
                }
                if tokio::time::timeout_at(deadline.into(), wake).await.is_err() {
                    return None;
                }
            }
        }
    });
    Response::new(StreamBody::new(frames).boxed_unsync())
}

/// Returns the lines of all events since a version, the version that they reach, and whether the first one is too old.
fn events(state: &State, asked: &Asked, from: u64) -> (String, u64, bool) {
    if from < state.oldest {
        let gone = json!({"type": "ERROR", "object": status(410, "Expired", "too old resource version")});
        return (format!("{gone}\n"), from, true);
    }
    let mut text = String::new();
    let begin = state.history.partition_point(|(version, ..)| *version <= from);
    for (_, plural, namespace, change, object, before) in &state.history[begin..] {
        if *plural != asked.plural {
            continue;
        }
        let selected = asked.selects(namespace, object);
        let was = asked.selects(namespace, &json!({"metadata": {"labels": before}}));
        if !selected && !was {
            continue;
        }
        let mut object = asked.shown(object);
        // An object that a selector no longer selects is gone for its watch, which gets the last object.
        let change = match (selected, was, *change) {
            (true, false, "MODIFIED") => "ADDED",
            (false, true, "MODIFIED") => {
                object["metadata"]["labels"] = before.clone();
                "DELETED"
            }
            (true, _, change) => change,
            _ => continue,
        };
        text += &format!("{}\n", json!({"type": change, "object": object}));
    }
    if !text.is_empty() && asked.query.get("allowWatchBookmarks").is_some_and(|wanted| wanted == "true") {
        let (_, kind, version) = KINDS.into_iter().find(|(plural, ..)| *plural == asked.plural).unwrap();
        let metadata = json!({"resourceVersion": state.version.to_string(), "creationTimestamp": null});
        let object = json!({"kind": kind, "apiVersion": version, "metadata": metadata});
        text += &format!("{}\n", json!({"type": "BOOKMARK", "object": object}));
    }
    (text, state.version, false)
}

fn karpenter(state: &State) -> Response<Body> {
    let here = [("nodeclaims", "NodeClaim"), ("nodepools", "NodePool")]
        .into_iter()
        .filter(|(plural, _)| !state.absent.contains(*plural));
    let resources: Vec<Value> = here
        .map(|(plural, kind)| json!({"name": plural, "singularName": "", "namespaced": false, "kind": kind, "verbs": ["get"]}))
        .collect();
    match resources.is_empty() {
        true => refuse(404, "NotFound", "the server could not find the requested resource"),
        false => reply(
            200,
            &json!({
                "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "karpenter.sh/v1", "resources": resources,
            }),
        ),
    }
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
        "reason": reason, "message": message,
    })
}

fn refuse(code: u16, reason: &str, message: &str) -> Response<Body> {
    reply(code, &status(code, reason, message))
}

fn reply(code: u16, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::from(value.to_string()).boxed_unsync());
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap();
    response.headers_mut().insert("content-type", "application/json".parse().unwrap());
    response
}
