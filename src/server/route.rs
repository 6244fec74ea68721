//! A request over HTTP -> its answer: every route there is.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes};
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Options;
use super::answer::{self, Context};
use super::ask::{self, Ask, Form};
use super::body::Received;
use super::changes;
use super::error::{Error, Result};
use super::fields::Fields;
use super::metrics::Metrics;
use super::model::Model;
use super::origins::Origins;
use super::reply::{Answer, Reply, json_answer, typed};
use super::state::{Phase, State};
use crate::dataset::{Chat, Tokenizer};
use crate::endpoint::PROMETHEUS;
use crate::generate::Strength;

const PAGE: &str = include_str!("page.html");
/// LIMIT: time a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// LIMIT: bodies of all connections together, until they are read.
const BODIES_BYTES_MAX: usize = 256 << 20;
/// LIMIT: memory that reading bodies takes, of all connections together.
const READING_BYTES_MAX: usize = 1 << 30;
/// Memory of a value of JSON, and of a token while a text is tokenized.
const VALUE_BYTES: usize = 64;
const TOKEN_BYTES: usize = 256;
/// LIMIT: letters of the header that names fields without effect.
const IGNORED_LETTERS_MAX: usize = 1000;

/// The values that all connections share.
pub struct Service {
    /// Loading, ready or ending.
    pub state: State,
    /// Counts of all connections.
    pub metrics: Arc<Metrics>,
    body_bytes_max: usize,
    bodies: Arc<Semaphore>,
    reading: Arc<Semaphore>,
    /// Digest of the key: comparing digests takes the same time wherever they differ.
    key: Option<[u8; 32]>,
    origins: Origins,
}

impl Service {
    /// Answers clients that send the key, if there is one; larger bodies are refused.
    pub fn new(state: State, options: &Options) -> Service {
        Service {
            state,
            metrics: Arc::default(),
            body_bytes_max: options.body_bytes_max,
            bodies: Arc::new(Semaphore::new(BODIES_BYTES_MAX.max(options.body_bytes_max))),
            reading: Arc::new(Semaphore::new(READING_BYTES_MAX)),
            key: options.key.as_deref().map(digest),
            origins: Origins::new(&options.origins),
        }
    }

    /// Every request gets an answer.
    pub async fn respond(&self, request: Request<Received>) -> Response<Reply> {
        let kaito = request.uri().path() == "/chat";
        let for_pages = self.origins.headers(request.headers());
        let answer = match self.origins.preflight(&request) {
            Some(response) => Ok(response),
            None => self.route(request).await,
        };
        let mut response = answer.unwrap_or_else(|error| {
            if error.status == StatusCode::TOO_MANY_REQUESTS {
                self.metrics.rejected();
            }
            failed(&error, kaito)
        });
        response.headers_mut().extend(for_pages);
        response
    }

    async fn route(&self, request: Request<Received>) -> Answer {
        let path = request.uri().path().to_owned();
        let (get, post, delete) = match *request.method() {
            Method::GET | Method::HEAD => (true, false, false),
            Method::POST => (false, true, false),
            Method::DELETE => (false, false, true),
            _ => (false, false, false),
        };
        match path.as_str() {
            "/" if get => return Ok(typed(Bytes::from_static(PAGE.as_bytes()), "text/html; charset=utf-8")),
            "/livez" if get => return Ok(json_answer(&json!({"status": "ok"}))),
            "/health" | "/healthz" if get => return self.health(),
            "/readyz" if get => return self.ready(),
            "/metrics" if get => {
                let text = self.metrics.text(self.model().ok().as_deref());
                return Ok(typed(Bytes::from(text), PROMETHEUS));
            }
            _ => self.allowed(&request)?,
        }
        if delete || post && CHANGES.contains(&path.as_str()) {
            self.origins.may_change(&request)?;
        }
        match path.as_str() {
            "/version" if get => Ok(json_answer(&json!({"version": env!("CARGO_PKG_VERSION")}))),
            "/v1/models" if get => Ok(json_answer(&models(&*self.serving()?))),
            "/v1/chat/completions" if post => self.generate(request, ask::chat).await,
            "/v1/completions" if post => self.generate(request, ask::completion).await,
            "/chat" if post => self.generate(request, ask::kaito).await,
            "/tokenizer_info" if get => Ok(json_answer(&tokenizer_info(&*self.serving()?))),
            "/tokenize" if post => self.with_body(request, &TOKENIZE, tokenize).await,
            "/detokenize" if post => self.with_body(request, &["model", "tokens"], detokenize).await,
            "/v1/load_lora_adapter" if post => self.with_body(request, &LOAD, changes::load).await,
            "/v1/unload_lora_adapter" if post => {
                self.with_body(request, &["lora_name", "lora_int_id"], changes::unload).await
            }
            "/v1/mixes" if post => self.with_body(request, &["name", "adapters"], changes::mix).await,
            "/v1/mixes" if get => Ok(json_answer(&changes::mixes(&*self.serving()?))),
            other if delete && other.starts_with(MIX) => {
                changes::remove_mix(&*self.serving()?, &decoded(&other[MIX.len()..]))
            }
            other if get && other.starts_with(MODEL) => {
                one_model(&*self.serving()?, &decoded(&other[MODEL.len()..]))
            }
            other => Err(match methods(other) {
                Some(taken) => Error::method(other, request.method().as_str(), taken),
                None => Error::new(StatusCode::NOT_FOUND, format!("There is nothing at {other}")),
            }),
        }
    }

    /// The key, if one is asked for.
    fn allowed(&self, request: &Request<Received>) -> Result<()> {
        let Some(key) = self.key else { return Ok(()) };
        let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.split_once(' '));
        let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let given = digest(given.map_or("", |(_, key)| key).trim());
        let differ = key.iter().zip(given).fold(0, |all, (a, b)| all | (a ^ b));
        match std::hint::black_box(differ) {
            0 => Ok(()),
            _ => Err(Error::new(
                StatusCode::UNAUTHORIZED,
                "The API key is missing or wrong; send it as Authorization: Bearer KEY",
            )
            .code("invalid_api_key")),
        }
    }

    fn model(&self) -> Result<Arc<Model>> {
        match self.state.phase() {
            Phase::Ready(model) | Phase::Draining(Some(model)) => Ok(model),
            Phase::Loading => Err(Error::unavailable("Loading model")),
            Phase::Draining(None) | Phase::Stopped => Err(Error::unavailable("The server ends")),
        }
    }

    /// Returns the model, for a new request.
    fn serving(&self) -> Result<Arc<Model>> {
        match self.state.phase() {
            Phase::Draining(_) => {
                Err(Error::unavailable("The server is shutting down and takes no new requests"))
            }
            _ => self.model(),
        }
    }

    fn health(&self) -> Answer {
        match self.model()?.engine.failure() {
            None => Ok(json_answer(&json!({"status": "Healthy"}))),
            Some(fault) => Err(Error::new(StatusCode::INTERNAL_SERVER_ERROR, fault.message)),
        }
    }

    fn ready(&self) -> Answer {
        self.serving()?;
        self.health()
    }

    async fn generate(
        &self,
        request: Request<Received>,
        read: fn(&Map<String, Value>, &Model) -> Result<Ask>,
    ) -> Answer {
        let model = self.serving()?;
        let stop = self.state.begin();
        let reader = model.clone();
        let ask = self.read(request, move |map| read(map, &reader)).await?;
        let ignored = ignored_header(&ask.ignored);
        let context = Arc::new(Context::new(model, ask, self.metrics.clone(), stop));
        let mut response = match context.ask.stream && context.ask.form != Form::Kaito {
            true => {
                let mut response = Response::new(Reply::Stream(answer::stream(context)?));
                let headers = response.headers_mut();
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
                headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
                headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
                response
            }
            false => json_answer(&answer::complete(context).await?),
        };
        response.headers_mut().extend(ignored);
        Ok(response)
    }

    async fn with_body(
        &self,
        request: Request<Received>,
        known: &'static [&'static str],
        work: fn(&Fields, &Model) -> Answer,
    ) -> Answer {
        let model = self.serving()?;
        let work = move |map: &Map<String, Value>| {
            let fields = Fields::new(map, "");
            let mut response = work(&fields, &model)?;
            response.headers_mut().extend(ignored_header(&fields.unknown(known)));
            Ok(response)
        };
        self.read(request, work).await
    }

    /// Reads a body and parses it while other connections go on, since tokens of a long prompt take a while. The memory
    /// of bodies and their values is bounded over all connections.
    async fn read<T: Send + 'static>(
        &self,
        request: Request<Received>,
        work: impl FnOnce(&Map<String, Value>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (bytes, room) = self.body(request).await?;
        let memory = self.reading.clone().acquire_many_owned(reading_bytes(&bytes)).await;
        // The work goes on if the client leaves, and so do its rooms.
        let work = move || {
            let _rooms = (room, memory.expect("never closed"));
            work(&object(&bytes)?)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| {
            Error::new(StatusCode::INTERNAL_SERVER_ERROR, "a defect of the server: see its log")
        })?
    }

    /// Returns the room for so many bytes of a body. Nobody waits for it, since everyone who waits has room that others
    /// wait for.
    fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit> {
        let full = |_| Error::busy("Other requests take the memory for bodies; try again later");
        self.bodies.clone().try_acquire_many_owned(bytes as u32).map_err(full)
    }

    /// A body, and its room among all bodies, to be held as long as the body. Only bytes that came take room, so that
    /// clients that say much and send little keep nobody out.
    async fn body(&self, request: Request<Received>) -> Result<(Bytes, OwnedSemaphorePermit)> {
        plain(request.headers())?;
        let limit = self.body_bytes_max;
        let too_large =
            || Error::new(StatusCode::PAYLOAD_TOO_LARGE, format!("The body has more than {limit} bytes"));
        if request.body().size_hint().upper().is_some_and(|bytes| bytes > limit as u64) {
            return Err(too_large());
        }
        let read = async {
            let (mut body, mut bytes, mut held) = (request.into_body(), Vec::new(), self.room(0)?);
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|_| Error::bad("The body ended early"))?;
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len() + data.len() > limit {
                    return Err(too_large());
                }
                held.merge(self.room(data.len())?);
                bytes.extend_from_slice(&data);
            }
            Ok::<_, Error>((Bytes::from(bytes), held))
        };
        let late = |_| Error::new(StatusCode::REQUEST_TIMEOUT, "The body did not arrive in time");
        tokio::time::timeout(BODY_TIMEOUT, read).await.map_err(late)?
    }
}

/// Returns the methods of a path, as the header `allow` lists them; `None`: there is no such path.
fn methods(path: &str) -> Option<&'static str> {
    match path {
        "/" | "/livez" | "/health" | "/healthz" | "/readyz" | "/metrics" | "/version" | "/v1/models"
        | "/tokenizer_info" => Some("GET, HEAD"),
        "/v1/chat/completions"
        | "/v1/completions"
        | "/chat"
        | "/tokenize"
        | "/detokenize"
        | "/v1/load_lora_adapter"
        | "/v1/unload_lora_adapter" => Some("POST"),
        "/v1/mixes" => Some("GET, HEAD, POST"),
        other if other.starts_with(MIX) => Some("DELETE"),
        other if other.starts_with(MODEL) => Some("GET, HEAD"),
        _ => None,
    }
}

/// `DELETE /v1/mixes/NAME`.
const MIX: &str = "/v1/mixes/";
/// `GET /v1/models/NAME`.
const MODEL: &str = "/v1/models/";
const TOKENIZE: [&str; 13] = [
    "model",
    "prompt",
    "messages",
    "add_special_tokens",
    "return_token_strs",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "documents",
    "reasoning_effort",
];
/// Routes whose POST changes what is served.
const CHANGES: [&str; 3] = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/mixes"];
const LOAD: [&str; 4] = ["lora_name", "lora_path", "load_inplace", "strength"];

/// Returns a name in an address: clients write `/` and other characters as `%2F`.
fn decoded(name: &str) -> Cow<'_, str> {
    percent_decode_str(name).decode_utf8_lossy()
}

/// Returns the header that lists the fields of a request that had no effect. A header holds visible letters alone.
fn ignored_header(names: &[String]) -> Option<(HeaderName, HeaderValue)> {
    let letters = names.iter().flat_map(|name| name.chars().chain([','])).take(IGNORED_LETTERS_MAX);
    let letters: String = letters.map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect();
    let value = HeaderValue::from_str(letters.trim_end_matches(',')).ok();
    let value = value.filter(|value| !value.is_empty())?;
    Some((HeaderName::from_static("x-ignored-fields"), value))
}

fn digest(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

/// Returns the memory that reading a body may take: its values, and the tokens of its texts, of which so many are made
/// at once.
fn reading_bytes(body: &[u8]) -> u32 {
    let values = body.iter().filter(|byte| matches!(byte, b',' | b':' | b'[' | b'{')).count();
    let tokens = body.len().min(Tokenizer::TEXT_BYTES_AT_ONCE);
    (values * VALUE_BYTES + tokens * TOKEN_BYTES).min(READING_BYTES_MAX) as u32
}

/// Refuses a body that is compressed: it would look like broken JSON.
fn plain(headers: &HeaderMap) -> Result<()> {
    let codings = headers.get_all(CONTENT_ENCODING).into_iter();
    let mut other = codings.filter(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"));
    match other.next() {
        None => Ok(()),
        Some(coding) => {
            let message = format!("The body has the content-encoding {coding:?}; send it without one");
            Err(Error::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
        }
    }
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>> {
    // Some editors and shells begin a file with a byte order mark.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.is_empty() {
        return Err(Error::bad("The body is empty; send a JSON object"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::bad("The body must be a JSON object")),
        Err(error) => Err(Error::bad(format!("The body is not valid JSON: {error}"))),
    }
}

/// Returns an error in the form of KAITO's server, whose clients read `detail`.
fn failed(error: &Error, kaito: bool) -> Response<Reply> {
    let mut body = error.body();
    if kaito {
        body["detail"] = error.message.clone().into();
    }
    let mut response = json_answer(&body);
    *response.status_mut() = error.status;
    if let Some(seconds) = error.retry_after {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Some(methods) = error.allow {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    }
    if error.status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Returns the answer to `GET /v1/models`.
pub fn models(model: &Model) -> Value {
    let context = model.engine.facts().context;
    let loaded = model.engine.adapters();
    let parts =
        |parts: &[Strength]| -> Value { parts.iter().map(|part| changes::part(model, part)).collect() };
    let entry = |id: &str, root: String, parent: Option<&str>, adapters: Value| {
        json!({
            "id": id, "object": "model", "created": 0, "owned_by": "hone", "root": root, "parent": parent,
            "max_model_len": context, "adapters": adapters,
        })
    };
    let base = entry(&model.name, model.name.clone(), None, json!([]));
    let adapters = loaded.iter().map(|adapter| {
        let alone = [Strength { name: adapter.name.clone(), strength: 1.0 }];
        entry(&adapter.name, adapter.folder.display().to_string(), Some(&model.name), parts(&alone))
    });
    let mixes = model.named.mixes().into_iter().map(|(name, list)| {
        let root: Vec<String> = list.iter().map(|part| format!("{}:{}", part.name, part.strength)).collect();
        entry(&name, root.join(","), Some(&model.name), parts(&list))
    });
    let data: Vec<Value> = [base].into_iter().chain(adapters).chain(mixes).collect();
    let mut list = json!({"object": "list", "data": data, "default": model.default_name()});
    if let Some(file) = model.named.file() {
        list["adapters_file"] = json!({"digest": file.digest, "refused": file.refused});
    }
    list
}

fn one_model(model: &Model, name: &str) -> Answer {
    let list = models(model);
    let found = list["data"].as_array().and_then(|list| list.iter().find(|entry| entry["id"] == name));
    found.map(json_answer).ok_or_else(|| Error::unknown_model(name, &model.names()))
}

/// Answers as vLLM does: `{prompt}` or `{messages}` -> `{tokens, count, max_model_len}`.
fn tokenize(fields: &Fields, model: &Model) -> Answer {
    if let Some(name) = fields.text("model")? {
        model.named(name)?;
    }
    let specials = fields.flag("add_special_tokens")?;
    let tokens = match (fields.text("prompt")?, fields.get("messages")) {
        (Some(prompt), _) => model.tokens(prompt, specials.unwrap_or(true))?,
        (None, Some(_)) => model.tokens(&ask::chat_text(fields, model)?, specials.unwrap_or(false))?,
        (None, None) => return Err(Error::field("prompt", "prompt or messages is missing")),
    };
    let count = tokens.len();
    let mut answer = json!({"count": count, "max_model_len": model.engine.facts().context, "tokens": tokens});
    if fields.flag("return_token_strs")?.unwrap_or(false) {
        let name = |token: &u32| crate::generate::text::token_name(&model.tokenizer, *token);
        answer["token_strs"] = tokens.iter().map(name).collect();
    }
    Ok(json_answer(&answer))
}

/// Returns vLLM's description of the tokenizer, by which a client counts and joins tokens as the server does.
/// lm-evaluation-harness requests it.
fn tokenizer_info(model: &Model) -> Value {
    let tokenizer = &model.tokenizer;
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.bos(), "eos_token": tokenizer.eos(),
        "vocab_size": tokenizer.vocab_size(), "model_max_length": model.engine.facts().context,
        "chat_template": model.chat.as_ref().map(Chat::source),
    })
}

fn detokenize(fields: &Fields, model: &Model) -> Answer {
    let tokens = fields.tokens("tokens")?.ok_or_else(|| Error::field("tokens", "tokens is missing"))?;
    if let Some(name) = fields.text("model")? {
        model.named(name)?;
    }
    let vocabulary = model.engine.facts().vocabulary;
    if let Some(&token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
        return Err(Error::from(crate::generate::Refusal::UnknownToken { token, vocabulary }).of("tokens"));
    }
    Ok(json_answer(&json!({"prompt": model.tokenizer.decode(&tokens, false)})))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A short body has little weight. A body that consists of values has the weight of its values.
    #[test]
    fn a_body_weighs_what_reading_it_takes() {
        assert_eq!(reading_bytes(br#"{"prompt": [1, 2]}"#), (4 * VALUE_BYTES + 18 * TOKEN_BYTES) as u32);
        assert!(reading_bytes(&[b'0'; 16 << 20]) <= 256 << 20, "its texts are tokenized in parts");
        assert_eq!(
            reading_bytes(&[b','; 64 << 20]) as usize,
            READING_BYTES_MAX,
            "it can still be read, alone"
        );
    }
}
