//! Choices of a request -> one JSON answer, or a stream of server-sent events.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use hyper::body::Bytes;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::ask::{Ask, Form};
use super::error::{Error, Result};
use super::metrics::{InUse, Metrics};
use super::model::Model;
use super::speak::{End, Piece, Speaker};
use super::state::Stop;
use super::tools::{Call, Said};
use crate::generate::text::token_name;
use crate::generate::{Scored, Usage};

/// The values that all parts of an answer need.
pub struct Context {
    /// The model that answers.
    pub model: Arc<Model>,
    /// The request.
    pub ask: Ask,
    /// Counts of the server.
    pub metrics: Arc<Metrics>,
    /// Ends the answer if the server ends.
    pub stop: Stop,
    id: String,
    created: u64,
    begun: Instant,
    _adapters: InUse,
}

impl Context {
    /// Returns the context of one request, with a new id and the present time.
    pub fn new(model: Arc<Model>, ask: Ask, metrics: Arc<Metrics>, stop: Stop) -> Context {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let kind = if ask.form == Form::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{kind}-{:x}{count:06x}", now.as_micros());
        let _adapters = metrics.uses(&ask);
        Context { model, ask, metrics, stop, id, created: now.as_secs(), begun: Instant::now(), _adapters }
    }

    /// Submits all choices, or none.
    pub fn submit(&self) -> Result<Vec<Speaker>> {
        let submit = |request: crate::generate::Request| {
            let answer = self.model.engine.submit(request.clone()).map_err(Error::from)?;
            Ok(Speaker::new(self.model.clone(), answer, &self.ask, &request))
        };
        self.ask.requests().map(submit).collect()
    }

    fn prompt(&self, index: usize) -> &super::ask::Prompt {
        &self.ask.prompts[index / self.ask.n]
    }

    /// The prompt's text before an answer: as it was given, or of its tokens.
    fn echo(&self, index: usize) -> String {
        let prompt = self.prompt(index);
        let decoded = || self.model.tokenizer.decode(&prompt.ids, self.ask.skip_special);
        prompt.text.clone().unwrap_or_else(decoded)
    }

    fn head(&self, object: &str) -> Map<String, Value> {
        let head = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.ask.model,
        });
        head.as_object().cloned().expect("an object")
    }

    /// Returns a call as OpenAI shows it.
    fn call(call: &Call) -> Value {
        json!({
            "id": call.id, "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        })
    }

    /// Returns the form of `chat.completion`, with at most so many alternatives of each token.
    fn logprobs(&self, scored: &[Scored], most: usize) -> Value {
        let entry = |token: u32, logprob: f32| {
            json!({
                "token": token_name(&self.model.tokenizer, token),
                "logprob": logprob,
                "bytes": self.model.tokenizer.token_bytes(token),
            })
        };
        let one = |scored: &Scored| {
            let mut one = entry(scored.token, scored.logprob);
            let top = scored.top.iter().take(most);
            one["top_logprobs"] = top.map(|&(token, logprob)| entry(token, logprob)).collect();
            one
        };
        json!({"content": scored.iter().map(one).collect::<Vec<_>>()})
    }
}

/// Waits for the choice's next piece, but not beyond the server's end.
async fn next(speaker: &mut Speaker, stop: &Stop) -> Piece {
    tokio::select! {
        piece = speaker.next() => piece,
        () = stop.reached() => Piece::Failed(Error::unavailable("The server ends; the answer is not complete")),
    }
}

/// The older form's four lists, which grow token by token.
#[derive(Default)]
struct Legacy {
    /// Alternatives of each token.
    most: usize,
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Letters of the text before the next token.
    offset: usize,
    /// The prompt as the text shows it, and its bytes before the next token.
    prompt: String,
    bytes: usize,
    /// Whether control tokens are left out of the text.
    skip_special: bool,
}

impl Legacy {
    fn new(ask: &Ask) -> Legacy {
        let most = ask.request.logprobs.unwrap_or(0);
        Legacy { most, skip_special: ask.skip_special, ..Legacy::default() }
    }

    fn push(&mut self, model: &Model, token: u32, scored: Option<&Scored>) {
        let name = token_name(&model.tokenizer, token);
        let mut top = Map::new();
        for (token, logprob) in scored.iter().flat_map(|scored| scored.top.iter().take(self.most)) {
            // Two tokens may have one text: the more probable comes first and stays.
            top.entry(token_name(&model.tokenizer, *token)).or_insert(json!(logprob));
        }
        if let Some(scored) = scored {
            top.entry(name.clone()).or_insert(json!(scored.logprob));
        }
        self.tokens.push(name);
        self.token_logprobs.push(scored.map(|scored| scored.logprob));
        self.top_logprobs.push(scored.map_or(Value::Null, |_| Value::Object(top)));
        self.text_offset.push(self.offset);
        let bytes = model.tokenizer.token_bytes(token);
        let shown = self.shown(&bytes, model.tokenizer.is_special(token));
        self.bytes += shown.len();
        // A letter whose bytes are several tokens counts where it begins.
        self.offset += shown.iter().filter(|byte| **byte & 0xc0 != 0x80).count();
    }

    /// The bytes of the next token that stand in the text. The text of a prompt has no control tokens that the
    /// tokenizer put around it, and no blank that it put before the first word.
    fn shown<'a>(&self, bytes: &'a [u8], special: bool) -> &'a [u8] {
        let prompt = self.prompt.as_bytes().get(self.bytes..).filter(|rest| !rest.is_empty());
        match (prompt, special) {
            (Some(rest), true) if !rest.starts_with(bytes) => &[],
            (None, true) if self.skip_special => &[],
            (Some(rest), false) if rest[0] != b' ' => bytes.strip_prefix(b" ").unwrap_or(bytes),
            _ => bytes,
        }
    }

    /// The tokens that follow are the answer's, behind the prompt's text.
    fn prompt_ends(&mut self) {
        if !self.prompt.is_empty() {
            self.offset = self.prompt.chars().count();
            self.prompt.clear();
        }
    }

    /// Returns the text that was pushed since the last call.
    fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.token_logprobs),
            "top_logprobs": std::mem::take(&mut self.top_logprobs),
            "text_offset": std::mem::take(&mut self.text_offset),
        })
    }
}

/// A whole choice.
struct Whole {
    index: usize,
    choice: Value,
    usage: Usage,
}

async fn whole(context: &Context, index: usize, mut speaker: Speaker) -> Result<Whole> {
    let mut said = Said::default();
    let mut prompt_scores: Vec<Scored> = Vec::new();
    let mut scores: Vec<Scored> = Vec::new();
    let mut clock = context.metrics.clock(context.begun);
    let end: End = loop {
        match next(&mut speaker, &context.stop).await {
            Piece::Started => clock.started(),
            Piece::Prompt(more) => prompt_scores.extend(more),
            Piece::Said(more, tokens) => {
                clock.tokens(tokens.len());
                said = said.and(more);
                scores.extend(tokens);
            }
            Piece::End(more, tokens, end) => {
                clock.tokens(tokens.len());
                said = said.and(more);
                scores.extend(tokens);
                break end;
            }
            Piece::Failed(error) => {
                clock.ended("error", &Usage::default());
                return Err(error);
            }
        }
    };
    clock.ended(end.reason, &end.usage);
    let choice = choice(context, index, said, &prompt_scores, &scores, &end);
    Ok(Whole { index, choice, usage: end.usage })
}

/// Returns a whole choice as OpenAI shows it.
fn choice(
    context: &Context,
    index: usize,
    said: Said,
    prompt_scores: &[Scored],
    scores: &[Scored],
    end: &End,
) -> Value {
    let ask = &context.ask;
    let Said { mut text, calls } = said;
    let mut choice = json!({"index": index, "finish_reason": end.reason, "stop_reason": end.by});
    let prompt = context.prompt(index);
    if ask.form == Form::Chat {
        choice["message"] = json!({"role": "assistant", "content": text, "refusal": null});
        if !calls.is_empty() {
            choice["message"]["tool_calls"] = calls.iter().map(Context::call).collect();
            if text.trim().is_empty() {
                choice["message"]["content"] = Value::Null;
            }
        }
        choice["logprobs"] = ask.request.logprobs.map_or(Value::Null, |most| context.logprobs(scores, most));
    } else {
        let mut legacy = Legacy::new(ask);
        if ask.echo {
            legacy.prompt = context.echo(index);
            text.insert_str(0, &legacy.prompt);
            legacy.push(&context.model, prompt.ids[0], None);
            prompt_scores.iter().for_each(|scored| legacy.push(&context.model, scored.token, Some(scored)));
            legacy.prompt_ends();
        }
        scores.iter().for_each(|scored| legacy.push(&context.model, scored.token, Some(scored)));
        choice["text"] = text.into();
        choice["logprobs"] = ask.request.logprobs.map_or(Value::Null, |_| legacy.take());
    }
    if ask.token_ids {
        choice["token_ids"] = scores.iter().map(|scored| scored.token).collect();
        choice["prompt_token_ids"] = json!(prompt.ids);
    }
    if let Some(most) = ask.prompt_logprobs {
        let scored = context.logprobs(prompt_scores, most);
        choice["prompt_logprobs"] = scored["content"].clone();
    }
    choice
}

/// Returns the counts of tokens. A prompt counts once for all of its choices, and so do its tokens that were in the
/// cache at its first choice.
fn usage(context: &Context, of_choices: &[(usize, Usage)]) -> Value {
    let prompt: usize = context.ask.prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let generated: usize = of_choices.iter().map(|(_, usage)| usage.generated_tokens).sum();
    let first = of_choices.iter().filter(|(index, _)| index % context.ask.n == 0);
    let cached: usize = first.map(|(_, usage)| usage.cached_tokens).sum();
    json!({
        "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}

/// Returns the whole answer in one piece.
pub async fn complete(context: Arc<Context>) -> Result<Value> {
    let mut tasks = JoinSet::new();
    for (index, speaker) in context.submit()?.into_iter().enumerate() {
        let context = context.clone();
        tasks.spawn(async move { whole(&context, index, speaker).await });
    }
    let mut done = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        done.push(joined.unwrap_or_else(|_| Err(internal()))?);
    }
    done.sort_by_key(|whole| whole.index);
    let usages: Vec<_> = done.iter().map(|whole| (whole.index, whole.usage)).collect();
    let choices: Vec<Value> = done.into_iter().map(|whole| whole.choice).collect();
    if context.ask.form == Form::Kaito {
        return Ok(json!({"Result": choices[0]["text"]}));
    }
    let object = if context.ask.form == Form::Chat { "chat.completion" } else { "text_completion" };
    let mut answer = context.head(object);
    answer.insert("choices".into(), choices.into());
    answer.insert("usage".into(), usage(&context, &usages));
    Ok(answer.into())
}

fn internal() -> Error {
    Error::new(hyper::StatusCode::INTERNAL_SERVER_ERROR, "a defect of the server: see its log")
}

/// A reader that is slower than this many events lets its sequence's tokens wait, and harms nobody else.
const EVENTS_WAITING: usize = 16;

/// Starts the choices. Their text arrives at the receiver as server-sent events.
pub fn stream(context: Arc<Context>) -> Result<mpsc::Receiver<Bytes>> {
    let speakers = context.submit()?;
    let (sender, receiver) = mpsc::channel(EVENTS_WAITING);
    tokio::spawn(async move {
        let mut tasks = JoinSet::new();
        for (index, speaker) in speakers.into_iter().enumerate() {
            let (context, sender) = (context.clone(), sender.clone());
            tasks.spawn(async move { Some((index, parts(&context, index, speaker, &sender).await?)) });
        }
        let mut usages = Vec::new();
        while let Some(joined) = tasks.join_next().await {
            match joined.unwrap_or(None) {
                Some(usage) => usages.push(usage),
                None => return, // It failed and said so, or nobody reads: the other choices end too.
            }
        }
        if context.ask.include_usage {
            let mut last = context.head(object(&context));
            last.insert("choices".into(), json!([]));
            last.insert("usage".into(), usage(&context, &usages));
            let _ = sender.send(event(&last.into())).await;
        }
        let _ = sender.send(Bytes::from_static(b"data: [DONE]\n\n")).await;
    });
    Ok(receiver)
}

fn object(context: &Context) -> &'static str {
    if context.ask.form == Form::Chat { "chat.completion.chunk" } else { "text_completion" }
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// Sends one choice. `None`: it ended early.
async fn parts(
    context: &Context,
    index: usize,
    mut speaker: Speaker,
    sender: &mpsc::Sender<Bytes>,
) -> Option<Usage> {
    let ask = &context.ask;
    let chat = ask.form == Form::Chat;
    let mut clock = context.metrics.clock(context.begun);
    let mut legacy = Legacy::new(ask);
    let mut called = 0;
    let send = async |mut choice: Value, last: Option<&End>| {
        choice["index"] = index.into();
        choice["finish_reason"] = last.map_or(Value::Null, |end| end.reason.into());
        if let Some(end) = last {
            choice["stop_reason"] = end.by.clone().unwrap_or(Value::Null);
        }
        let mut chunk = context.head(object(context));
        chunk.insert("choices".into(), json!([choice]));
        if ask.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        sender.send(event(&chunk.into())).await.ok()
    };
    if chat {
        send(json!({"delta": {"role": "assistant", "content": ""}, "logprobs": null}), None).await?;
    }
    if ask.echo {
        legacy.prompt = context.echo(index);
        legacy.push(&context.model, context.prompt(index).ids[0], None);
        if ask.request.prompt_logprobs.is_none() {
            legacy.take();
        }
        send(json!({"text": legacy.prompt, "logprobs": null}), None).await?;
    }
    loop {
        let piece = tokio::select! {
            piece = next(&mut speaker, &context.stop) => piece,
            () = sender.closed() => return None,
        };
        let (said, tokens, end) = match piece {
            Piece::Started => {
                clock.started();
                continue;
            }
            Piece::Prompt(scored) => {
                scored.iter().for_each(|scored| legacy.push(&context.model, scored.token, Some(scored)));
                continue;
            }
            Piece::Said(said, tokens) => (said, tokens, None),
            Piece::End(said, tokens, end) => (said, tokens, Some(end)),
            Piece::Failed(error) => {
                clock.ended("error", &Usage::default());
                let _ = sender.send(event(&error.body())).await;
                return None;
            }
        };
        clock.tokens(tokens.len());
        let mut choice = match chat {
            true => json!({"delta": {"content": said.text}}),
            false => json!({"text": said.text}),
        };
        if !said.calls.is_empty() {
            let list = said.calls.iter().map(Context::call).zip(called..);
            let list = list.map(|(mut call, index)| {
                call["index"] = index.into();
                call
            });
            choice["delta"]["tool_calls"] = list.collect();
            called += said.calls.len();
            if said.text.is_empty() {
                choice["delta"]["content"] = Value::Null;
            }
        }
        choice["logprobs"] = match (ask.request.logprobs, chat) {
            (None, _) => Value::Null,
            (Some(most), true) => context.logprobs(&tokens, most),
            (Some(_), false) => {
                legacy.prompt_ends();
                tokens.iter().for_each(|scored| legacy.push(&context.model, scored.token, Some(scored)));
                legacy.take()
            }
        };
        if ask.token_ids {
            choice["token_ids"] = tokens.iter().map(|scored| scored.token).collect();
        }
        if let Some(end) = &end {
            clock.ended(end.reason, &end.usage);
        }
        send(choice, end.as_ref()).await?;
        if let Some(end) = end {
            return Some(end.usage);
        }
    }
}
