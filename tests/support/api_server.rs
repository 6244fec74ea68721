//! A Kubernetes API server in memory, over real HTTP: versions, conflicts, server-side apply, status, watches that expire,
//! foreground deletion, owners, logs. As much of it as hone's controller meets.

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

/// plural, kind, apiVersion
const KINDS: [(&str, &str, &str); 13] = [
    ("workspaces", "Workspace", "kaito.sh/v1beta1"),
    ("jobs", "Job", "batch/v1"),
    ("pods", "Pod", "v1"),
    ("configmaps", "ConfigMap", "v1"),
    ("nodes", "Node", "v1"),
    ("namespaces", "Namespace", "v1"),
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

type Key = (String, String, String);
type Body = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    /// Version, plural, namespace, kind of change, object.
    history: Vec<(u64, String, String, &'static str, Value)>,
    /// Watches from before this version are told that it is gone.
    oldest: u64,
    absent: HashSet<String>,
    /// Writes of a resource that answer 409.
    conflicts: HashMap<String, u32>,
    logs: HashMap<(String, String), String>,
    requests: Vec<String>,
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
                let (state, changed) = (shared.clone(), signal.clone());
                let service = service_fn(move |request| {
                    let (state, changed) = (state.clone(), changed.clone());
                    async move { Ok::<_, Infallible>(answer(&state, &changed, request).await) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        ApiServer { state, changed, address, runtime: Some(runtime) }
    }

    pub fn config(&self) -> kube::Config {
        kube::Config::new(format!("http://{}", self.address).parse().unwrap())
    }

    /// As if a CRD were not installed.
    pub fn without(self, plural: &str) -> ApiServer {
        self.state.lock().unwrap().absent.insert(plural.into());
        self
    }

    /// The next writes of a resource answer 409.
    pub fn conflict_next(&self, plural: &str, times: u32) {
        self.state.lock().unwrap().conflicts.insert(plural.into(), times);
    }

    /// Ends every watch with 410, and refuses to go on from what clients know.
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

    /// What the garbage collector does after a foreground deletion: dependents, then the object itself.
    pub fn finish_deletions(&self) {
        let mut state = self.state.lock().unwrap();
        let gone: Vec<Key> = state
            .objects
            .iter()
            .filter(|(_, object)| {
                object["metadata"]["finalizers"]
                    .as_array()
                    .is_some_and(|list| list == &[json!("foregroundDeletion")])
            })
            .map(|(key, _)| key.clone())
            .collect();
        gone.iter().for_each(|key| state.remove(key));
        drop(state);
        self.changed.notify_waiters();
    }

    /// Waits until `holds`; tells the last state of affairs when it does not.
    pub fn wait<T>(&self, what: &str, holds: impl Fn(&ApiServer) -> Option<T>) -> T {
        /// LIMIT: everything here takes milliseconds, but a retry seconds.
        const PATIENCE: Duration = Duration::from_secs(30);
        let start = Instant::now();
        loop {
            if let Some(found) = holds(self) {
                return found;
            }
            if start.elapsed() > PATIENCE {
                let workspaces: Vec<Value> = self.list("workspaces");
                panic!(
                    "{what}: not within {PATIENCE:?}\n{workspaces:#?}\n{:#?}",
                    self.requests().iter().rev().take(20).collect::<Vec<_>>()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl State {
    /// The object under its next version. `whole`: with what a status subresource keeps apart.
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
        object["metadata"]["generation"] = (generation + i64::from(changed)).into();
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let leaving = object["metadata"]["deletionTimestamp"].is_string();
        if leaving && object["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty) {
            self.objects.insert(key.clone(), object.clone());
            self.remove(&key);
            return object;
        }
        let change = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.history.push((self.version, key.0.clone(), key.1.clone(), change, object.clone()));
        self.objects.insert(key, object.clone());
        object
    }

    /// Takes an object away, and what it owned.
    fn remove(&mut self, key: &Key) {
        let Some(mut object) = self.objects.remove(key) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.history.push((self.version, key.0.clone(), key.1.clone(), "DELETED", object.clone()));
        let uid = &object["metadata"]["uid"];
        let owned = |other: &Value| {
            other["metadata"]["ownerReferences"]
                .as_array()
                .is_some_and(|list| list.iter().any(|owner| &owner["uid"] == uid))
        };
        let dependents: Vec<Key> =
            self.objects.iter().filter(|(_, other)| owned(other)).map(|(key, _)| key.clone()).collect();
        dependents.iter().for_each(|key| self.remove(key));
    }
}

/// What a change of `generation` is about.
fn inner(object: &Value) -> Value {
    let mut object = object.clone();
    object.as_object_mut().unwrap().remove("metadata");
    object.as_object_mut().unwrap().remove("status");
    object
}

/// But for the version itself.
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

/// RFC 7386.
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
    let Some(asked) = parse(&path, &query) else { return refuse(404, "NotFound", "no such path") };
    let known = KINDS.iter().any(|(plural, ..)| *plural == asked.plural);
    if !known || state.lock().unwrap().absent.contains(&asked.plural) {
        return refuse(404, "NotFound", "the server could not find the requested resource");
    }
    let watch = asked.query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
    let response = match (&parts.method, &asked.name, &asked.sub) {
        (&Method::GET, None, _) if watch => return stream(state.clone(), changed.clone(), asked),
        (&Method::GET, None, _) => list(&state.lock().unwrap(), &asked),
        (&Method::GET, Some(name), Some(sub)) if sub == "log" => log(&state.lock().unwrap(), &asked, name),
        (&Method::GET, Some(name), _) => get(&state.lock().unwrap(), &asked, name),
        _ => {
            let kind =
                parts.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
            let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
            write(&mut state.lock().unwrap(), &parts.method, &asked, kind, body)
        }
    };
    changed.notify_waiters();
    response
}

fn write(state: &mut State, method: &Method, asked: &Asked, kind: &str, body: Value) -> Response<Body> {
    if let Some(left) = state.conflicts.get_mut(&asked.plural).filter(|left| **left > 0) {
        *left -= 1;
        return refuse(409, "Conflict", "the object has been modified");
    }
    let name = asked.name.clone().or_else(|| body["metadata"]["name"].as_str().map(str::to_owned));
    let Some(name) = name else { return refuse(422, "Invalid", "no name") };
    let key = key(&asked.plural, &asked.namespace, &name);
    let old = state.objects.get(&key).cloned();
    let stale = |body: &Value| match (&old, body["metadata"]["resourceVersion"].as_str()) {
        (Some(old), Some(version)) => old["metadata"]["resourceVersion"] != version,
        _ => false,
    };
    let whole = asked.sub.as_deref() == Some("status");
    match (method, old.clone()) {
        (&Method::POST, Some(_)) => refuse(409, "AlreadyExists", "it already exists"),
        (&Method::POST, None) => {
            let mut object = body;
            object["metadata"]["namespace"] = asked.namespace.clone().into();
            if asked.namespace.is_empty() {
                object["metadata"].as_object_mut().unwrap().remove("namespace");
            }
            object.as_object_mut().unwrap().remove("status");
            reply(201, &state.store(key, object, false))
        }
        (&Method::PATCH, None) if kind.contains("apply-patch") => {
            let mut object = body;
            if !asked.namespace.is_empty() {
                object["metadata"]["namespace"] = asked.namespace.clone().into();
            }
            reply(201, &state.store(key, object, false))
        }
        (_, None) => refuse(404, "NotFound", &format!("{} {name:?} not found", asked.plural)),
        (&Method::PUT | &Method::PATCH, Some(_)) if stale(&body) => {
            refuse(409, "Conflict", "the object has been modified")
        }
        (&Method::PUT, Some(_)) => reply(200, &state.store(key, body, false)),
        (&Method::PATCH, Some(mut object)) => {
            if whole {
                merge(&mut object["status"], &body["status"]);
            } else {
                let status = object["status"].clone();
                merge(&mut object, &body);
                object["status"] = status;
            }
            reply(200, &state.store(key, object, true))
        }
        (&Method::DELETE, Some(mut object)) => {
            let foreground = body["propagationPolicy"] == "Foreground";
            let mut finalizers = object["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
            if foreground {
                finalizers.push(json!("foregroundDeletion"));
            }
            if finalizers.is_empty() {
                state.remove(&key);
                return reply(
                    200,
                    &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 200}),
                );
            }
            object["metadata"]["finalizers"] = finalizers.into();
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            reply(200, &state.store(key, object, true))
        }
        _ => refuse(405, "MethodNotAllowed", "not that"),
    }
}

fn get(state: &State, asked: &Asked, name: &str) -> Response<Body> {
    match state.objects.get(&key(&asked.plural, &asked.namespace, name)) {
        Some(object) => reply(200, object),
        None => refuse(404, "NotFound", &format!("{} {name:?} not found", asked.plural)),
    }
}

fn list(state: &State, asked: &Asked) -> Response<Body> {
    let (_, kind, version) = KINDS.into_iter().find(|(plural, ..)| *plural == asked.plural).unwrap();
    let items: Vec<&Value> = state
        .objects
        .iter()
        .filter(|((plural, namespace, _), object)| {
            *plural == asked.plural && asked.selects(namespace, object)
        })
        .map(|(_, object)| object)
        .collect();
    reply(
        200,
        &json!({
            "kind": format!("{kind}List"), "apiVersion": version,
            "metadata": {"resourceVersion": state.version.to_string()}, "items": items,
        }),
    )
}

impl Asked {
    /// By namespace and labels: `a=b,c`.
    fn selects(&self, namespace: &str, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        let wanted = self.query.get("labelSelector").map_or("", String::as_str);
        let holds = |part: &str| match part.split_once('=') {
            Some((name, value)) => labels[name] == value.trim_start_matches('='),
            None => labels.get(part).is_some(),
        };
        (self.namespace.is_empty() || self.namespace == namespace)
            && wanted.split(',').filter(|part| !part.is_empty()).all(holds)
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

/// Lines of what happened since, the version they reach, and whether that is too long ago.
fn events(state: &State, asked: &Asked, from: u64) -> (String, u64, bool) {
    if from < state.oldest {
        let gone = json!({"type": "ERROR", "object": status(410, "Expired", "too old resource version")});
        return (format!("{gone}\n"), from, true);
    }
    let mut text = String::new();
    for (_, plural, namespace, change, object) in state.history.iter().filter(|(version, ..)| *version > from)
    {
        if *plural == asked.plural && asked.selects(namespace, object) {
            text += &format!("{}\n", json!({"type": change, "object": object}));
        }
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
