//! AdmissionReviews of the API server over TLS -> whether a Workspace is allowed, by the rules of render.
//!
//! `kubectl apply` then shows mistakes as errors and doubtful settings as warnings. Cases that cannot be decided here
//! are allowed: a ConfigMap that is applied later, a Workspace of another controller, one that is being deleted. Every
//! replica answers.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use rustls::ServerConfig;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio_rustls::TlsAcceptor;

use super::certificates::Keeper;
use super::presence::{self, in_time};
use super::reconcile::is_left_alone;
use super::tuning::without_a_versions_default;
use super::{locked, words};
use crate::fault::{Fault, Result};
use crate::workspace::adapters::TUNED;
use crate::workspace::annotations::{self, PREFIX};
use crate::workspace::files::{entry, entry_of};
use crate::workspace::serve::{self, Tuned, serve};
use crate::workspace::{
    Asked, Method as Tuning, Settings, Workspace, config_name, inference, render, validate,
};

/// LIMIT: an AdmissionReview holds two objects, each of 3 MiB at most.
const BODY_BYTES_MAX: usize = 8 << 20;
/// LIMIT: connections of API servers, of which there are a few.
const CONNECTIONS_MAX: usize = 64;
/// LIMIT: reviews that are read and judged at the same time. A body of numbers takes sixteen times its size in memory.
const JUDGED_MAX: usize = 3;
/// LIMIT: time for TLS to begin, for a header and for a body.
const ARRIVAL_MAX: Duration = Duration::from_secs(5);
/// LIMIT: an idle connection is closed after it.
const CONNECTION_MAX: Duration = Duration::from_secs(600);
/// The time that a ConfigMap may take. The API server waits 5 s for the whole answer.
const CONFIG_MAX: Duration = Duration::from_secs(2);
/// Time in which API servers learn of a new trust, which they watch.
const SPREAD: Duration = Duration::from_secs(5);
const LOOK_MAX: Duration = Duration::from_secs(20);
/// LIMIT: Kubernetes shortens longer warnings.
const WARNING_BYTES_MAX: usize = 250;

/// Options of the webhook's server.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The address of the API server's reviews.
    pub address: SocketAddr,
    /// Life of a certificate.
    pub valid: Duration,
    /// The interval at which Secret and trust are checked.
    pub pause: Duration,
}

impl Options {
    /// Returns options for an address: certificates of 90 days, checked every minute.
    pub fn at(address: SocketAddr) -> Options {
        Options { address, valid: Duration::from_secs(90 * 24 * 3600), pause: Duration::from_secs(60) }
    }
}

/// A webhook that listens already, so that a port in use is reported at once.
pub struct Webhook {
    listener: TcpListener,
    options: Options,
    keeper: Keeper,
    settings: Settings,
    /// The reason that keeps it from answering; `/readyz` shows it.
    pub trouble: Arc<Mutex<Option<String>>>,
}

/// The answer to the API server.
#[derive(Clone, Debug, PartialEq)]
enum Verdict {
    /// The object is allowed, with warnings.
    Allowed(Vec<String>),
    Refused(String),
}

impl Webhook {
    /// Starts to listen; `run` answers.
    ///
    /// # Errors
    /// Config: the address cannot be listened on.
    pub fn new(client: Client, options: &Options, namespace: &str, settings: &Settings) -> Result<Webhook> {
        let refused = |error: std::io::Error| {
            Fault::config(format!("--webhook-address {}: cannot listen: {error}", options.address))
                .help("name a free port of this machine")
        };
        let listener = TcpListener::bind(options.address).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        Ok(Webhook {
            listener,
            options: options.clone(),
            keeper: Keeper {
                client,
                namespace: namespace.into(),
                valid: options.valid,
                spread: SPREAD.min(options.pause),
            },
            settings: settings.clone(),
            trouble: Arc::new(Mutex::new(Some("the webhook has no certificate yet".into()))),
        })
    }

    /// Answers reviews until the process ends.
    pub async fn run(self) {
        let Ok(listener) = self.listener.try_clone().and_then(tokio::net::TcpListener::from_std) else {
            return std::future::pending().await;
        };
        let certificate = watch::Sender::new(None);
        let kaito = watch::Sender::new(false);
        let judge = Judge::new(self.keeper.client.clone(), self.settings.clone(), kaito.subscribe());
        let judge = Arc::new(judge);
        tokio::join!(self.keep(&certificate, &kaito), accept(listener, certificate.subscribe(), judge));
    }

    async fn keep(
        &self,
        certificate: &watch::Sender<Option<Arc<ServerConfig>>>,
        kaito: &watch::Sender<bool>,
    ) {
        loop {
            let looked = in_time(LOOK_MAX, self.keeper.look()).await;
            let why = looked.as_ref().err().map(|error| format!("the webhook: {error}"));
            let before = std::mem::replace(&mut *locked(&self.trouble), why.clone());
            match (before, &why) {
                (before, Some(why)) if before.as_ref() != Some(why) => {
                    tracing::warn!(target: "hone", "{why}; it is tried again");
                }
                (Some(_), None) => tracing::info!(target: "hone", "the webhook answers"),
                _ => {}
            }
            if let Ok(config) = &looked {
                certificate.send_replace(Some(config.clone()));
            }
            if let Ok(found) = presence::look(&self.keeper.client).await {
                kaito.send_replace(found.kaito);
            }
            // After trouble the pause is short, because somebody mends it and waits for the result. A conflict means
            // that another replica was faster.
            let conflict = matches!(&looked, Err(kube::Error::Api(status)) if status.code == 409);
            let pause = match (conflict, &why) {
                (true, _) => Duration::from_millis(500).min(self.options.pause),
                (false, Some(_)) => Duration::from_secs(5).min(self.options.pause),
                (false, None) => self.options.pause,
            };
            tokio::time::sleep(pause).await;
        }
    }
}

async fn accept(
    listener: tokio::net::TcpListener,
    certificate: watch::Receiver<Option<Arc<ServerConfig>>>,
    judge: Arc<Judge>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Some(config) = certificate.borrow().clone() else { continue };
        let judge = judge.clone();
        tokio::spawn(async move {
            let accepted = tokio::time::timeout(ARRIVAL_MAX, TlsAcceptor::from(config).accept(stream)).await;
            if let Ok(Ok(stream)) = accepted {
                let service = service_fn(move |request| {
                    let judge = judge.clone();
                    async move { Ok::<_, Infallible>(judge.respond(request).await) }
                });
                let mut http = http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(ARRIVAL_MAX);
                let connection = http.serve_connection(TokioIo::new(stream), service);
                let _ = tokio::time::timeout(CONNECTION_MAX, connection).await;
            }
            drop(place);
        });
    }
}

struct Judge {
    client: Client,
    settings: Settings,
    kaito: watch::Receiver<bool>,
    turns: Semaphore,
}

impl Judge {
    fn new(client: Client, settings: Settings, kaito: watch::Receiver<bool>) -> Judge {
        Judge { client, settings, kaito, turns: Semaphore::new(JUDGED_MAX) }
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, body) = match self.answer(request).await {
            Ok(review) => (StatusCode::OK, review),
            Err((status, why)) => (status, json!({"error": why})),
        };
        let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    async fn answer(&self, request: Request<Incoming>) -> std::result::Result<Value, (StatusCode, String)> {
        if request.uri().path() != PATH || request.method() != Method::POST {
            return Err((StatusCode::NOT_FOUND, format!("only POST {PATH} is answered")));
        }
        let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
        let body = match tokio::time::timeout(ARRIVAL_MAX, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => return Err((StatusCode::PAYLOAD_TOO_LARGE, "the body is too large".into())),
            Err(_) => return Err((StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time".into())),
        };
        self.review(body).await
    }

    /// Returns the answer to one AdmissionReview. It waits for a turn to be read and for another one to be judged. It
    /// has none while its ConfigMap is asked for, so that an API server that answers late delays no other review.
    async fn review(&self, body: Bytes) -> std::result::Result<Value, (StatusCode, String)> {
        let asked = {
            let _turn = self.turn().await;
            Question::read(body).map_err(|why| (StatusCode::BAD_REQUEST, why))?
        };
        let response = match self.judge(asked.old, asked.new).await {
            Verdict::Allowed(warnings) => json!({"uid": asked.uid, "allowed": true, "warnings": warnings}),
            Verdict::Refused(why) => json!({
                "uid": asked.uid, "allowed": false,
                "status": {"code": 422, "reason": "Invalid", "message": why},
            }),
        };
        Ok(json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}))
    }

    async fn turn(&self) -> SemaphorePermit<'_> {
        self.turns.acquire().await.expect("never closed")
    }

    async fn judge(&self, old: Option<Workspace>, new: std::result::Result<Workspace, String>) -> Verdict {
        let new = match new {
            Ok(new) => new,
            Err(error) => return Verdict::Allowed(vec![short(&format!("hone cannot read it: {error}"))]),
        };
        if *self.kaito.borrow() {
            return Verdict::Allowed(Vec::new());
        }
        let config = self.config(&new).await;
        let settings = self.settings.clone();
        let _turn = self.turn().await;
        // A large model's plan takes milliseconds of one core; other reviews go on meanwhile.
        let judged =
            tokio::task::spawn_blocking(move || judge(old.as_ref(), &new, config.as_ref(), &settings)).await;
        judged.unwrap_or_else(|_| {
            Verdict::Allowed(vec!["hone's rules could not be applied: see its log".into()])
        })
    }

    /// Returns the ConfigMap in force, if it can be had.
    async fn config(&self, workspace: &Workspace) -> Option<ConfigMap> {
        let name = config_name(workspace);
        if name.is_empty() {
            return None;
        }
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), workspace.namespace());
        in_time(CONFIG_MAX, api.get_opt(&name)).await.ok().flatten()
    }
}

/// The question of one AdmissionReview.
struct Question {
    uid: String,
    /// The Workspace before an update.
    old: Option<Workspace>,
    /// The Workspace that is to be stored. Error: hone cannot read it.
    new: std::result::Result<Workspace, String>,
}

impl Question {
    /// Parses the body of a request. Error: it is no AdmissionReview.
    fn read(body: Bytes) -> std::result::Result<Question, String> {
        let review: Value =
            serde_json::from_slice(&body).map_err(|error| format!("no AdmissionReview: {error}"))?;
        let asked = &review["request"];
        let uid = asked["uid"].as_str().ok_or("request.uid is missing")?.to_owned();
        let read = |object: &Value| Workspace::deserialize(object).map_err(|error| error.to_string());
        // On creation the API server may name the namespace beside the object only.
        let namespace = asked["namespace"].as_str();
        let new = read(&asked["object"]).map(|mut new| {
            new.metadata.namespace = new.metadata.namespace.or_else(|| namespace.map(str::to_owned));
            new
        });
        let old = read(&asked["oldObject"]).ok().filter(|_| asked["operation"] == "UPDATE");
        Ok(Question { uid, old, new })
    }
}

/// The address that AdmissionReviews are sent to.
pub const PATH: &str = "/validate";

fn short(text: &str) -> String {
    words::plain(text, WARNING_BYTES_MAX)
}

/// Decides whether a written Workspace may be stored. `config`: the ConfigMap that configures it, if there is one
/// already.
fn judge(
    old: Option<&Workspace>,
    new: &Workspace,
    config: Option<&ConfigMap>,
    settings: &Settings,
) -> Verdict {
    let leaves = new.metadata.deletion_timestamp.is_some();
    // Status, labels and the controller's own annotations are not judged, so their change needs no review.
    let same = old.is_some_and(|old| {
        old.resource == new.resource
            && old.tuning == new.tuning
            && old.inference == new.inference
            && annotations::inputs(old) == annotations::inputs(new)
    });
    if leaves || same || is_left_alone(new) {
        return Verdict::Allowed(Vec::new());
    }
    match rules(old, new, config, settings) {
        Ok(warnings) => Verdict::Allowed(warnings.iter().map(|warning| short(warning)).collect()),
        Err(fault) => Verdict::Refused(match fault.help {
            Some(help) => format!("{}\n{help}", fault.message),
            None => fault.message,
        }),
    }
}

fn rules(
    old: Option<&Workspace>,
    new: &Workspace,
    config: Option<&ConfigMap>,
    settings: &Settings,
) -> Result<Vec<String>> {
    let own_model = annotations::read(new)?.model.is_some();
    // A Workspace that never had a Job can still become anything. Servers may change as the controller changes them.
    let fixed = |old: &&Workspace| {
        let begun = old.annotation(&format!("{PREFIX}revision")).is_some();
        let other = old.tuning.is_some() != new.tuning.is_some() && (begun || old.inference.is_some());
        other || (begun && new.tuning.is_some())
    };
    match old.filter(fixed) {
        Some(old) => {
            let meant = without_a_versions_default(new, Some(old));
            validate::update(old, meant.as_ref().unwrap_or(new), own_model)?;
        }
        None => validate::create(new, own_model)?,
    }
    match new.tuning.is_some() {
        true => tunes(new, config, settings),
        false => serves(new, config, settings),
    }
}

/// Reviews a Workspace that tunes. An error of its ConfigMap is only a warning, because the ConfigMap can be mended or
/// may not have been applied yet.
fn tunes(workspace: &Workspace, config: Option<&ConfigMap>, settings: &Settings) -> Result<Vec<String>> {
    let name = config_name(workspace);
    let tuning = workspace.tuning.as_ref();
    let method = tuning.and_then(|tuning| Tuning::named(&tuning.method));
    let default = method.map(Tuning::config);
    let with = |config| render(&Asked { workspace, config, settings, revision: 1 });
    let named = tuning.is_some_and(|tuning| !tuning.config.is_empty());
    let written = match config.map(|map| entry(map, &name)).transpose() {
        Ok(written) => written,
        Err(fault) => {
            return with(default).map(|_| vec![fault.in_a_line()]);
        }
    };
    match (written, named) {
        (None, true) => {
            let mut warnings = with(default)?.warnings;
            warnings
                .push(format!("tuning.config: there is no ConfigMap {name} yet; the Workspace waits for it"));
            Ok(warnings)
        }
        (None, false) => with(default).map(|rendered| rendered.warnings),
        (Some(text), _) => match with(Some(text)) {
            Ok(rendered) => Ok(rendered.warnings),
            Err(fault) => with(default).map(|_| vec![words::of_fault(fault)]),
        },
    }
}

/// Reviews a Workspace that serves, as `tunes` does one that tunes.
fn serves(workspace: &Workspace, config: Option<&ConfigMap>, settings: &Settings) -> Result<Vec<String>> {
    let tuned = anything_tuned(workspace);
    let name = config_name(workspace);
    let with = |config| {
        let asked = serve::Asked { workspace, config, settings, tuned: &tuned };
        serve(&asked).map(|served| served.warnings)
    };
    let told = |why: String| {
        let mut warnings = with(Some(""))?;
        warnings.push(why);
        Ok(warnings)
    };
    match config.map(|map| entry_of(map, &name, inference::CONFIG_FILE)).transpose() {
        Ok(None) if !name.is_empty() => {
            told(format!("inference.config: there is no ConfigMap {name} yet; the Workspace waits for it"))
        }
        Ok(written) => with(written).or_else(|fault| told(words::of_fault(fault))),
        Err(fault) => told(words::of_fault(fault)),
    }
}

/// Returns placeholders for images that tuning Workspaces have not pushed yet: they may push after the serving
/// Workspace is written.
fn anything_tuned(workspace: &Workspace) -> Tuned {
    let adapters = workspace.inference.iter().flat_map(|inference| &inference.adapters);
    let names = adapters.filter_map(|adapter| adapter.source.as_ref()?.image.strip_prefix(TUNED));
    names.map(|name| (name.to_owned(), Ok("pushed.invalid/adapter:later".to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace(change: &Value) -> Workspace {
        let mut object = json!({
            "metadata": {"name": "w", "namespace": "team"},
            "resource": {
                "instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"a": "b"}},
            },
            "tuning": {
                "preset": {"name": "phi-3-mini-4k-instruct"}, "method": "qlora",
                "input": {"urls": ["https://host.example/a.parquet"]},
                "output": {"image": "registry.example.com/adapter:1", "imagePushSecret": "login"},
            },
        });
        json_patch(&mut object, change);
        serde_json::from_value(object).unwrap()
    }

    fn json_patch(object: &mut Value, change: &Value) {
        for (name, value) in change.as_object().into_iter().flatten() {
            match value.is_object() && object[name].is_object() {
                true => json_patch(&mut object[name], value),
                false => object[name] = value.clone(),
            }
        }
    }

    fn judged(old: Option<&Value>, new: &Value, config: Option<&str>) -> Verdict {
        let map = config.map(|text| {
            let map = json!({"metadata": {"name": "c"}, "data": {"training_config.yaml": text}});
            serde_json::from_value(map).unwrap()
        });
        let old = old.map(workspace);
        judge(old.as_ref(), &workspace(new), map.as_ref(), &Settings::default())
    }

    fn refusal(old: Option<&Value>, new: &Value) -> String {
        match judged(old, new, None) {
            Verdict::Refused(why) => why,
            allowed => panic!("{allowed:?}"),
        }
    }

    fn warnings(old: Option<&Value>, new: &Value, config: Option<&str>) -> Vec<String> {
        match judged(old, new, config) {
            Verdict::Allowed(warnings) => warnings,
            refused => panic!("{refused:?}"),
        }
    }

    #[test]
    fn mistakes_are_refused_with_all_their_words() {
        assert_eq!(warnings(None, &json!({}), None), [""; 0]);
        let wrong = json!({"tuning": {"preset": {"name": "phi-3-mini-4k-instrct"}, "method": "sft"}});
        let why = refusal(None, &wrong);
        assert!(
            why.contains("2 mistakes") && why.contains("tuning.method") && why.contains("instrct"),
            "{why}"
        );
        let large = json!({
            "resource": {"instanceType": "g6.xlarge"},
            "tuning": {"preset": {"name": "llama-3.3-70b-instruct"}},
        });
        assert!(matches!(judged(None, &large, None), Verdict::Refused(_)), "no such GPU holds it");
        let unknown = json!({"metadata": {"annotations": {"hone.sh/gpu": "1"}}});
        assert!(refusal(None, &unknown).contains("did you mean hone.sh/gpus?"));
    }

    #[test]
    fn what_runs_cannot_become_something_else() {
        let running = json!({"metadata": {"annotations": {"hone.sh/revision": "1"}}});
        let changed = json!({
            "metadata": {"annotations": {"hone.sh/revision": "1"}}, "tuning": {"method": "lora"},
        });
        assert!(refusal(Some(&running), &changed).contains("tuning.method: cannot be changed"));
        // One that was never begun can still become anything.
        assert_eq!(warnings(Some(&json!({})), &json!({"tuning": {"method": "lora"}}), None), [""; 0]);
        // A write through v1alpha1 fills in that version's instance type, which nobody meant.
        let without =
            json!({"metadata": {"annotations": {"hone.sh/revision": "1"}}, "resource": {"instanceType": ""}});
        let filled = json!({
            "metadata": {"annotations": {"hone.sh/revision": "1"}, "labels": {"a": "b"}},
            "resource": {"instanceType": crate::workspace::crd::INSTANCE_DEFAULT},
        });
        assert_eq!(warnings(Some(&without), &filled, None), [""; 0]);
    }

    #[test]
    fn what_is_not_judged_is_allowed() {
        let wrong = json!({"tuning": {"method": "sft"}});
        let with = |more: Value| {
            let mut object = wrong.clone();
            json_patch(&mut object, &more);
            object
        };
        let cases = [
            ("its status", with(json!({"status": {"state": "Failed"}, "metadata": {"labels": {"a": "b"}}}))),
            ("it leaves", with(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}))),
        ];
        for (what, new) in cases {
            assert_eq!(warnings(Some(&wrong), &new, None), [""; 0], "{what}");
        }
        let ignored = with(json!({"metadata": {"annotations": {"hone.sh/ignore": "true"}}}));
        assert_eq!(warnings(None, &ignored, None), [""; 0]);
        let kaitos = with(json!({"metadata": {"finalizers": ["workspace.finalizer.kaito.sh"]}}));
        assert_eq!(warnings(None, &kaitos, None), [""; 0]);
    }

    #[test]
    fn a_configmap_that_is_wrong_or_missing_is_a_warning() {
        let named = json!({"tuning": {"config": "c"}});
        let told = warnings(None, &named, None);
        assert!(told[0].contains("there is no ConfigMap c yet"), "{told:?}");
        let told = warnings(None, &named, Some("training_config: {LoraConfig: {rr: 8}}"));
        assert!(told[0].contains("rr") && told[0].len() <= WARNING_BYTES_MAX, "{told:?}");
        assert!(
            refusal(None, &json!({"tuning": {"config": "c", "method": "sft"}})).contains("tuning.method")
        );
    }

    #[test]
    fn what_serves_is_judged_too() {
        let serves = |adapters: Value| json!({"tuning": null, "inference": {"preset": {"name": "phi-3-mini-4k-instruct"}, "adapters": adapters}});
        let follows = serves(json!([{"source": {"name": "a", "image": "workspace://later"}}]));
        assert_eq!(warnings(None, &follows, None), [""; 0]);
        let strong = serves(json!([{"source": {"name": "a", "image": "h.example/a:1"}, "strength": "2"}]));
        assert!(refusal(None, &strong).contains("expected a number from 0 to 1"));
        let configured = json!({
            "tuning": null, "inference": {"preset": {"name": "phi-3-mini-4k-instruct"}, "config": "c"},
        });
        assert!(warnings(None, &configured, None)[0].contains("there is no ConfigMap c yet"));
        let running = json!({"metadata": {"annotations": {"hone.sh/revision": "1"}}});
        assert!(
            refusal(Some(&running), &serves(json!([]))).contains("tuning: it cannot be added or removed")
        );
    }

    /// Returns a judge whose API server takes requests and answers each with 404 once `answers` is true, and the number
    /// of requests that it took.
    fn beside_slow_server(answers: &watch::Sender<bool>) -> (Arc<Judge>, watch::Receiver<usize>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let config = kube::Config::new(format!("http://{}", listener.local_addr().unwrap()).parse().unwrap());
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (taken, seen) = watch::channel(0);
        let taken = Arc::new(taken);
        let answers = answers.subscribe();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (taken, mut answers) = (taken.clone(), answers.clone());
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 4096]).await;
                    taken.send_modify(|count| *count += 1);
                    let _ = answers.wait_for(|answers| *answers).await;
                    let absent = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                    let _ = stream.write_all(absent).await;
                });
            }
        });
        let kaito = watch::Sender::new(false).subscribe();
        let client = Client::try_from(config).unwrap();
        (Arc::new(Judge::new(client, Settings::default(), kaito)), seen)
    }

    /// Returns the review of a Workspace with a ConfigMap.
    fn configured() -> Bytes {
        let object = workspace(&json!({"tuning": {"config": "c"}}));
        json!({"request": {"uid": "u", "operation": "CREATE", "object": object}}).to_string().into()
    }

    #[tokio::test]
    async fn reviews_wait_for_a_turn_to_be_read_and_to_be_judged() {
        let answers = watch::Sender::new(false);
        let (judge, mut taken) = beside_slow_server(&answers);
        let all = judge.turns.acquire_many(JUDGED_MAX as u32).await.unwrap();
        let ours = judge.clone();
        let review = tokio::spawn(async move { ours.review(configured()).await });
        let waits = async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            !review.is_finished()
        };
        assert!(waits().await && *taken.borrow() == 0, "it is read without a turn");
        drop(all);
        taken.wait_for(|count| *count == 1).await.unwrap();
        let all = judge.turns.acquire_many(JUDGED_MAX as u32).await.unwrap();
        answers.send_replace(true);
        assert!(waits().await, "it is judged without a turn");
        drop(all);
        let answer = review.await.unwrap().unwrap();
        assert_eq!(answer["response"]["allowed"], true, "{answer}");
    }

    /// The API server waits 5 s for a review.
    #[tokio::test]
    async fn an_api_server_that_answers_no_question_delays_many_reviews_no_more_than_one() {
        let answers = watch::Sender::new(false);
        let (judge, taken) = beside_slow_server(&answers);
        let reviews: Vec<_> = (0..24)
            .map(|_| {
                let judge = judge.clone();
                tokio::spawn(async move { judge.review(configured()).await })
            })
            .collect();
        let all = async {
            for review in reviews {
                let answer = review.await.unwrap().unwrap();
                assert_eq!(answer["response"]["allowed"], true, "{answer}");
            }
        };
        tokio::time::timeout(Duration::from_secs(5), all).await.expect("an answer in time");
        assert_eq!(*taken.borrow(), 24);
    }
}
