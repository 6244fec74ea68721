//! The body of a request -> the requests to the engine, and the form of the answer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::error::{Error, Result, too_long};
use super::fields::{Fields, token};
use super::model::Model;
use super::tools::{self, Offer};
use crate::generate::{Request, Sampling, Strength};

/// LIMIT: choices of one request.
const CHOICES_MAX: i64 = 128;
/// LIMIT: prompts of one request, and choices of all of them together.
const PROMPTS_MAX: usize = 4096;
/// LIMIT: tokens that end an answer, and tokens with a bias; each choice keeps its own list.
const STOP_TOKENS_MAX: usize = 1024;
const BIASES_MAX: usize = 1024;
/// LIMIT: stop strings of one request.
const STOPS_MAX: usize = 16;
/// LIMIT: alternatives of one token.
const ALTERNATIVES_MAX: i64 = 20;
const ADAPTERS_MAX: usize = 16;

/// The form of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `chat.completion` of OpenAI's API.
    Chat,
    /// `text_completion` of OpenAI's API.
    Completion,
    /// KAITO's `{"Result": ...}`.
    Kaito,
}

/// One prompt with its choices.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Token ids; at least one.
    pub ids: Vec<u32>,
    /// As it was given, for `echo`.
    pub text: Option<String>,
}

/// A request that was understood.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Form of the answer.
    pub form: Form,
    /// The name that was asked for.
    pub model: String,
    /// The prompts; each gets `n` choices.
    pub prompts: Vec<Prompt>,
    /// Choices of each prompt.
    pub n: usize,
    /// Without the prompt, which differs.
    pub request: Request,
    /// Strings that end a choice.
    pub stop: Vec<String>,
    /// Whether the text has the string or token that ended it.
    pub include_stop: bool,
    /// Alternatives of each token of the prompt, if its log-probabilities stand beside the choices.
    pub prompt_logprobs: Option<usize>,
    /// Whether the answer is sent as it is generated.
    pub stream: bool,
    /// Whether the last part of a stream has the numbers of tokens.
    pub include_usage: bool,
    /// Whether the prompt is part of the answer.
    pub echo: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special: bool,
    /// Whether token ids stand beside the text.
    pub token_ids: bool,
    /// The tools that the model may call.
    pub offer: Option<Offer>,
    /// Fields that nobody here knows.
    pub ignored: Vec<String>,
}

impl Ask {
    /// Returns the engine's requests in the order of the choices, each made when it is asked for.
    pub fn requests(&self) -> impl Iterator<Item = Request> {
        let choice = |prompt: &Prompt, number: usize| {
            let mut request = Request { prompt: prompt.ids.clone(), ..self.request.clone() };
            request.sampling.seed = self.request.sampling.seed.wrapping_add(number as u64);
            request
        };
        self.prompts.iter().flat_map(move |prompt| (0..self.n).map(move |n| choice(prompt, n)))
    }
}

const COMMON: [&str; 31] = [
    "model",
    "stream",
    "stream_options",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "adapters",
    "logprobs",
    "skip_special_tokens",
    "return_token_ids",
    "prompt_logprobs",
    "user",
    "best_of",
    "response_format",
    "metadata",
    "store",
    "service_tier",
];
const CHAT: [&str; 11] = [
    "messages",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "documents",
    "chat_template",
    "reasoning_effort",
];
const COMPLETION: [&str; 4] = ["prompt", "echo", "suffix", "add_special_tokens"];

const KAITO: [&str; 9] = [
    "prompt",
    "messages",
    "model",
    "adapters",
    "generate_kwargs",
    "return_full_text",
    "clean_up_tokenization_spaces",
    "prefix",
    "handle_long_generation",
];
/// The known fields of `generate_kwargs`; `pad_token_id` has no effect on one text.
const GENERATE: [&str; 17] = [
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "eos_token_id",
    "pad_token_id",
    "num_beams",
    "typical_p",
    "early_stopping",
    "use_cache",
];

/// Fields of other servers, and of `generate` in transformers, that would change the answer: refused, unless they
/// hold the value that changes nothing.
const WITHOUT: [(&str, &str); 52] = [
    ("functions", "null"),
    ("function_call", "\"none\""),
    ("modalities", "[\"text\"]"),
    ("audio", "null"),
    ("prediction", "null"),
    ("web_search_options", "null"),
    ("verbosity", "\"medium\""),
    ("guided_json", "null"),
    ("guided_regex", "null"),
    ("guided_choice", "null"),
    ("guided_grammar", "null"),
    ("structured_outputs", "null"),
    ("grammar", "\"\""),
    ("json_schema", "null"),
    ("regex", "null"),
    ("ebnf", "null"),
    ("use_beam_search", "false"),
    ("length_penalty", "1"),
    ("early_stopping", "false"),
    ("num_beams", "1"),
    ("num_beam_groups", "1"),
    ("diversity_penalty", "0"),
    ("penalty_alpha", "0"),
    ("typical_p", "1"),
    ("epsilon_cutoff", "0"),
    ("eta_cutoff", "0"),
    ("top_a", "0"),
    ("mirostat", "0"),
    ("dry_multiplier", "0"),
    ("xtc_probability", "0"),
    ("no_repeat_ngram_size", "0"),
    ("encoder_repetition_penalty", "1"),
    ("bad_words", "[]"),
    ("bad_words_ids", "[]"),
    ("allowed_token_ids", "null"),
    ("suppress_tokens", "[]"),
    ("forced_eos_token_id", "null"),
    ("truncate_prompt_tokens", "null"),
    ("prompt_embeds", "null"),
    ("mm_processor_kwargs", "null"),
    ("stop_regex", "null"),
    ("stop_strings", "null"),
    ("sequence_bias", "null"),
    ("begin_suppress_tokens", "null"),
    ("forced_bos_token_id", "null"),
    ("exponential_decay_length_penalty", "null"),
    ("guidance_scale", "1"),
    ("num_return_sequences", "1"),
    ("max_time", "null"),
    ("top_n_sigma", "-1"),
    ("dynatemp_range", "0"),
    ("return_tokens_as_token_ids", "false"),
];

/// Refuses fields that would change the answer and are not supported here.
fn without(fields: &Fields) -> Result<()> {
    for (name, usual) in WITHOUT {
        let usual: Value = serde_json::from_str(usual).expect("a constant");
        let number = usual.as_f64().map(|number| json!(number));
        let usual: Vec<Value> = [usual].into_iter().chain(number).collect();
        fields.refuse(name, &usual, "it would change the answer; leave it out")?;
    }
    Ok(())
}

/// Reads a request of `POST /v1/chat/completions`.
pub fn chat(body: &Map<String, Value>, model: &Model) -> Result<Ask> {
    let fields = Fields::new(body, "");
    let text = chat_text(&fields, model)?;
    let ids = model.encode(&text, false)?;
    let mut ask = common(&fields, model, Form::Chat, vec![Prompt { ids, text: Some(text) }])?;
    ask.ignored.extend(fields.unknown(&[&COMMON[..], &CHAT].concat()));
    ask.ignored.extend(unread(&fields, model)?);
    ask.offer = tools::offer(&fields)?;
    if fields.flag("logprobs")?.unwrap_or(false) {
        ask.request.logprobs = Some(fields.size("top_logprobs", 0..=ALTERNATIVES_MAX)?.unwrap_or(0));
    } else if fields.size("top_logprobs", 0..=ALTERNATIVES_MAX)?.unwrap_or(0) > 0 {
        return Err(Error::field("top_logprobs", "top_logprobs needs logprobs: true"));
    }
    Ok(ask)
}

/// Returns the text that the template makes of the messages.
pub fn chat_text(fields: &Fields, model: &Model) -> Result<String> {
    let messages = fields.list("messages")?.ok_or_else(|| Error::field("messages", "messages is missing"))?;
    fields.refuse("chat_template", &[], "the model's own template is used")?;
    let mut context = Map::new();
    let listed = fields.list("tools")?;
    let without = fields.get("tool_choice") == Some(&json!("none"));
    tools::offer(fields)?;
    if let Some(tools) = listed.filter(|tools| !tools.is_empty() && !without) {
        context.insert("tools".into(), json!(tools));
    }
    if let Some(documents) = fields.list("documents")? {
        context.insert("documents".into(), json!(documents));
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        context.insert("reasoning_effort".into(), effort.into());
    }
    for (name, value) in fields.object("chat_template_kwargs")?.into_iter().flatten() {
        context.insert(name.clone(), value.clone());
    }
    let goes_on = fields.flag("continue_final_message")?.unwrap_or(false);
    let begin = fields.flag("add_generation_prompt")?.unwrap_or(!goes_on);
    if goes_on && begin {
        return Err(Error::field(
            "continue_final_message",
            "continue_final_message and add_generation_prompt exclude each other",
        ));
    }
    let mut messages =
        messages.iter().enumerate().map(|(at, m)| message(at, m)).collect::<Result<Vec<_>>>()?;
    let Some(last) = messages.last() else {
        return Err(Error::field("messages", "messages is empty; give at least one"));
    };
    let last = last["content"].as_str().unwrap_or_default().trim().to_owned();
    if goes_on && last.is_empty() {
        return Err(Error::field("continue_final_message", "the last message has no text to continue"));
    }
    let chat = model.chat.as_ref().ok_or_else(|| {
        Error::bad(
            "The model has no chat template; use /v1/completions, or start the server with --set ModelConfig.chat_template=FILE",
        )
    })?;
    if !chat.reads("tool_calls") {
        // Such a template would write the content of a message that only calls tools as None.
        messages
            .iter_mut()
            .filter(|message| message["content"].is_null())
            .for_each(|message| message["content"] = json!(""));
    }
    context.insert("messages".into(), Value::Array(messages));
    context.insert("add_generation_prompt".into(), begin.into());
    let mut text = chat.text(context).map_err(|problem| Error::field("messages", problem))?;
    if goes_on {
        let end = text.rfind(&last).map(|at| at + last.len()).ok_or_else(|| {
            Error::field("continue_final_message", "the chat template changes the last message")
        })?;
        text.truncate(end);
    }
    Ok(text)
}

/// Returns the fields that are only for the template, if it has no place for them.
fn unread(fields: &Fields, model: &Model) -> Result<Vec<String>> {
    let Some(chat) = &model.chat else { return Ok(Vec::new()) };
    let fields_of_it = ["tools", "documents", "reasoning_effort"].into_iter();
    let given = |name: &&str| {
        let none = json!([]);
        fields.get(name).is_some_and(|value| *value != none)
            && !(*name == "tools" && fields.get("tool_choice") == Some(&json!("none")))
    };
    let mut unread: Vec<String> =
        fields_of_it.filter(given).filter(|name| !chat.reads(name)).map(String::from).collect();
    let calls = |message: &Value| message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    if !chat.reads("tool_calls") && fields.list("messages")?.into_iter().flatten().any(calls) {
        unread.push("messages.tool_calls".into());
    }
    for (name, _) in fields.object("chat_template_kwargs")?.into_iter().flatten() {
        let own = ["messages", "add_generation_prompt"].contains(&name.as_str());
        if own || !chat.reads(name) {
            unread.push(format!("chat_template_kwargs.{name}"));
        }
    }
    Ok(unread)
}

/// Returns a message as templates expect it: text content, arguments of tool calls as objects.
fn message(at: usize, message: &Value) -> Result<Value> {
    let place = format!("messages[{at}]");
    let wrong = |what: &str| Error::field(&place, format!("{place}: {what}"));
    let map = message.as_object().ok_or_else(|| wrong("expected an object with role and content"))?;
    let role = match map.get("role").unwrap_or(&Value::Null) {
        Value::String(role) => role.as_str(),
        Value::Null => return Err(wrong("role is missing")),
        _ => return Err(wrong("role must be a string")),
    };
    let role = match role {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role,
        other => {
            return Err(wrong(&format!(
                "role {other:?} is unknown; expected system, developer, user, assistant or tool"
            )));
        }
    };
    let mut out = map.clone();
    // Templates ask if a field is there, and an empty one is not.
    out.retain(|name, value| !(value.is_null() || name == "tool_calls" && *value == json!([])));
    if out.get("tool_calls").is_some_and(|calls| !calls.is_array()) {
        return Err(wrong("tool_calls must be a list"));
    }
    out.insert("role".into(), role.into());
    let content = match map.get("content").unwrap_or(&Value::Null) {
        Value::String(text) => Value::String(text.clone()),
        Value::Null if role == "assistant" && out.contains_key("tool_calls") => Value::Null,
        Value::Array(parts) => {
            let text = |part: &Value| {
                let kind = part["type"].as_str()?;
                // A client may send back an assistant's refusal as it came.
                let known = kind == "text" || kind == "refusal" && role == "assistant";
                known.then(|| part[kind].as_str().map(String::from)).flatten()
            };
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            Value::String(texts.ok_or_else(|| wrong("only parts of type text are supported"))?.concat())
        }
        _ => return Err(wrong("content must be a string or a list of text parts")),
    };
    out.insert("content".into(), content);
    if let Some(Value::Array(calls)) = out.get_mut("tool_calls") {
        for (number, call) in calls.iter_mut().enumerate() {
            let what = |problem: &str| wrong(&format!("tool_calls[{number}]: {problem}"));
            parse_arguments(call).map_err(what)?;
        }
    }
    Ok(Value::Object(out))
}

/// Makes an object of the arguments of a call, which clients send as text.
fn parse_arguments(call: &mut Value) -> std::result::Result<(), &'static str> {
    let function = call.get_mut("function").and_then(Value::as_object_mut);
    let function = function.ok_or("expected an object with a function")?;
    if !function.get("name").is_some_and(Value::is_string) {
        return Err("function.name is missing");
    }
    let Some(arguments) = function.get_mut("arguments") else { return Ok(()) };
    // Some clients send back a call without arguments as "".
    let parsed = match arguments.as_str().map(str::trim) {
        Some("") => Some(json!({})),
        text => text.and_then(|text| serde_json::from_str::<Value>(text).ok()),
    };
    if let Some(parsed) = parsed {
        *arguments = parsed;
    }
    Ok(())
}

/// `POST /v1/completions`.
pub fn completion(body: &Map<String, Value>, model: &Model) -> Result<Ask> {
    let fields = Fields::new(body, "");
    fields.refuse("suffix", &[json!("")], "the model only continues a text")?;
    let specials = fields.flag("add_special_tokens")?.unwrap_or(true);
    let mut ask = common(&fields, model, Form::Completion, prompts(&fields, model, specials)?)?;
    ask.ignored.extend(fields.unknown(&[&COMMON[..], &COMPLETION].concat()));
    ask.request.logprobs = fields.size("logprobs", 0..=ALTERNATIVES_MAX)?;
    ask.echo = fields.flag("echo")?.unwrap_or(false);
    if ask.echo {
        ask.request.prompt_logprobs = ask.request.prompt_logprobs.max(ask.request.logprobs);
    }
    if ask.request.max_tokens == 0 && !ask.echo {
        return Err(Error::field("max_tokens", "max_tokens 0 needs echo: true"));
    }
    Ok(ask)
}

/// Returns a text, texts, ids, or lists of ids.
fn prompts(fields: &Fields, model: &Model, specials: bool) -> Result<Vec<Prompt>> {
    let wrong = || {
        Error::field(
            "prompt",
            "prompt: expected a string, a list of strings, token ids, or lists of token ids",
        )
    };
    let text = |text: &str| Ok(Prompt { ids: model.encode(text, specials)?, text: Some(text.to_owned()) });
    let ids = |list: &Vec<Value>| {
        let ids = list.iter().map(token).collect::<Option<Vec<u32>>>().ok_or_else(wrong)?;
        Ok(Prompt { ids, text: None })
    };
    let one = |value: &Value| match value {
        Value::String(string) => text(string),
        Value::Array(list) => ids(list),
        _ => Err(wrong()),
    };
    match fields.get("prompt") {
        None => Err(Error::field("prompt", "prompt is missing")),
        Some(Value::Array(list)) if list.is_empty() => Err(Error::field("prompt", "prompt is empty")),
        Some(Value::Array(list)) if list[0].is_number() => Ok(vec![ids(list)?]),
        Some(Value::Array(list)) if list.len() > PROMPTS_MAX => {
            Err(Error::field("prompt", format!("prompt: found {} prompts, limit {PROMPTS_MAX}", list.len())))
        }
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

/// Returns the fields that both of OpenAI's forms have.
fn common(fields: &Fields, model: &Model, form: Form, prompts: Vec<Prompt>) -> Result<Ask> {
    // A list of adapters is added to the base.
    let given = fields.get("adapters").is_some();
    let usual = || if given { model.name.clone() } else { model.default_name() };
    let name = fields.text("model")?.map_or_else(usual, str::to_owned);
    let adapters = adapters(fields, model, &name)?;
    without(fields)?;
    let n = fields.size("n", 1..=CHOICES_MAX)?.unwrap_or(1);
    if prompts.len() * n > PROMPTS_MAX {
        let all = prompts.len() * n;
        return Err(Error::field("n", format!("n: {all} choices of all prompts, limit {PROMPTS_MAX}")));
    }
    holds(model, prompts.len() * n)?;
    fields.refuse("best_of", &[json!(1), json!(n)], "all choices are returned; use n")?;
    response_format(fields)?;
    let stream = fields.flag("stream")?.unwrap_or(false);
    let (include_usage, ignored) = stream_options(fields, stream)?;
    let prompt_logprobs = prompt_logprobs(fields, stream)?;
    let ignore_ends = fields.flag("ignore_eos")?.unwrap_or(false);
    let mut stop_tokens = if ignore_ends { Vec::new() } else { model.defaults.stop_tokens.clone() };
    stop_tokens.extend(few(fields.tokens("stop_token_ids")?, "stop_token_ids", STOP_TOKENS_MAX)?);
    // A conversation's answer of no tokens is none.
    let least = i64::from(form == Form::Chat);
    let asked = fields.size("max_completion_tokens", least..=i64::MAX)?;
    let asked = asked.or(fields.size("max_tokens", least..=i64::MAX)?);
    let legacy = (form == Form::Completion).then_some(16); // OpenAI's default of the older form.
    let max_tokens = room(model, &prompts, asked, model.defaults.max_tokens.or(legacy))?;
    let min_tokens = min_tokens(fields, max_tokens)?;
    let request = Request {
        prompt: Vec::new(),
        max_tokens,
        min_tokens,
        stop_tokens,
        sampling: sampling(fields, model)?,
        adapters,
        logprobs: None,
        prompt_logprobs,
    };
    Ok(Ask {
        form,
        model: name,
        prompts,
        n,
        request,
        stop: fields.texts("stop", STOPS_MAX)?,
        include_stop: fields.flag("include_stop_str_in_output")?.unwrap_or(false),
        prompt_logprobs,
        stream,
        include_usage,
        echo: false,
        skip_special: fields.flag("skip_special_tokens")?.unwrap_or(true),
        token_ids: fields.flag("return_token_ids")?.unwrap_or(false),
        offer: None,
        ignored,
    })
}

/// Refuses more choices than run and wait at once: to come again later would not help.
fn holds(model: &Model, choices: usize) -> Result<()> {
    let facts = model.engine.facts();
    let most = facts.sequences.saturating_add(facts.waiting);
    match choices > most {
        true => Err(Error::field(
            "n",
            format!(
                "n: {choices} choices of all prompts, but this server holds {most} at once (--sequences and --waiting); \
                 send them in several requests"
            ),
        )),
        false => Ok(()),
    }
}

/// Tokens before an answer may end.
fn min_tokens(fields: &Fields, max_tokens: usize) -> Result<usize> {
    match fields.size("min_tokens", 0..=i64::MAX)?.unwrap_or(0) {
        least if least > max_tokens => Err(Error::field(
            "min_tokens",
            format!("min_tokens {least} is more than max_tokens {max_tokens}"),
        )),
        least => Ok(least),
    }
}

/// Returns the number of alternatives of each token of the prompt; a stream has no place for them.
fn prompt_logprobs(fields: &Fields, stream: bool) -> Result<Option<usize>> {
    match fields.size("prompt_logprobs", 0..=ALTERNATIVES_MAX)? {
        Some(_) if stream => Err(Error::field(
            "prompt_logprobs",
            "prompt_logprobs are not part of a stream; leave out stream, or ask /v1/completions for echo and logprobs",
        )),
        asked => Ok(asked),
    }
}

/// Returns whether a stream ends with the numbers of tokens, and the names of options without effect.
fn stream_options(fields: &Fields, stream: bool) -> Result<(bool, Vec<String>)> {
    let Some(options) = fields.object("stream_options")? else { return Ok((false, Vec::new())) };
    if !stream {
        return Err(Error::field("stream_options", "stream_options needs stream: true"));
    }
    let options = Fields::new(options, "stream_options.");
    let ignored = options.unknown(&["include_usage"]);
    let ignored = ignored.into_iter().map(|name| format!("stream_options.{name}"));
    Ok((options.flag("include_usage")?.unwrap_or(false), ignored.collect()))
}

/// Refuses formats other than plain text, since answers are not constrained by a grammar.
fn response_format(fields: &Fields) -> Result<()> {
    let Some(format) = fields.object("response_format")? else { return Ok(()) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(()),
        kind => {
            let kind = kind.unwrap_or("without a type");
            let message = format!(
                "response_format {kind} is not supported: answers are not held to a grammar; \
                 ask for JSON in a message, leave response_format out, and check the answer"
            );
            Err(Error::field("response_format", message).code("unsupported_parameter"))
        }
    }
}

/// Returns the number of tokens that may be generated: the number asked for if it fits, otherwise all up to the end of
/// the context.
fn room(model: &Model, prompts: &[Prompt], asked: Option<usize>, usual: Option<usize>) -> Result<usize> {
    let facts = model.engine.facts();
    let mut longest = 0;
    for prompt in prompts {
        if prompt.ids.is_empty() {
            return Err(Error::field("prompt", "the prompt has no tokens"));
        }
        if let Some(&token) = prompt.ids.iter().find(|token| **token as usize >= facts.vocabulary) {
            return Err(crate::generate::Refusal::UnknownToken { token, vocabulary: facts.vocabulary }.into());
        }
        longest = longest.max(prompt.ids.len());
    }
    let needed = longest.saturating_add(asked.unwrap_or(1));
    if needed > facts.context {
        return Err(too_long(needed, facts.context));
    }
    Ok(asked.unwrap_or_else(|| usual.unwrap_or(usize::MAX).min(facts.context - longest)))
}

/// Returns the adapters and strengths that a name or a list adds to the base.
fn adapters(fields: &Fields, model: &Model, name: &str) -> Result<Vec<Strength>> {
    let named = model.named(name)?;
    let wrong = |what: String| Error::field("adapters", format!("adapters: {what}"));
    let Some(found) = strengths(fields, model)? else { return Ok(named) };
    if !named.is_empty() {
        return Err(wrong(format!("the model `{name}` is an adapter already; ask for `{}`", model.name)));
    }
    Ok(found)
}

/// Returns the field `adapters`: names of loaded adapters, each with its strength.
pub fn strengths(fields: &Fields, model: &Model) -> Result<Option<Vec<Strength>>> {
    let Some(list) = fields.list("adapters")? else { return Ok(None) };
    let wrong = |what: String| Error::field("adapters", format!("adapters: {what}"));
    if list.len() > ADAPTERS_MAX {
        return Err(wrong(format!("found {}, limit {ADAPTERS_MAX}", list.len())));
    }
    let loaded = model.engine.adapters();
    let mut found: Vec<Strength> = Vec::new();
    for entry in list {
        let map = entry.as_object().ok_or_else(|| wrong("expected objects with name and strength".into()))?;
        let entry = Fields::new(map, "adapters.");
        // A strength that is written wrong must not become 1.
        if let Some(other) = entry.unknown(&["name", "strength"]).first() {
            return Err(wrong(format!("`{other}` is unknown; expected objects with name and strength")));
        }
        let name = entry.text("name")?.ok_or_else(|| wrong("name is missing".into()))?;
        let strength = entry.number("strength", -16.0..=16.0)?.unwrap_or(1.0);
        if found.iter().any(|other| other.name == name) {
            return Err(wrong(format!("`{name}` is listed twice")));
        }
        if !loaded.iter().any(|adapter| adapter.name == name) {
            return Err(Error::unknown_adapter(name, &loaded));
        }
        found.push(Strength { name: name.to_owned(), strength });
    }
    Ok(Some(found))
}

fn sampling(fields: &Fields, model: &Model) -> Result<Sampling> {
    let usual = &model.defaults.sampling;
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as usize);
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(usual.temperature),
        top_k: top_k.unwrap_or(usual.top_k),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(usual.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(usual.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=100.0)?
            .unwrap_or(usual.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        bias: bias(fields, model)?,
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map_or_else(random_seed, |seed| seed as u64),
    })
}

/// Returns a list, unless it is too long.
fn few(list: Option<Vec<u32>>, name: &str, most: usize) -> Result<Vec<u32>> {
    let list = list.unwrap_or_default();
    match list.len() > most {
        true => Err(Error::field(name, format!("{name}: found {}, limit {most}", list.len()))),
        false => Ok(list),
    }
}

/// Reads OpenAI's map from token ids, written as texts, to -100..100.
fn bias(fields: &Fields, model: &Model) -> Result<Vec<(u32, f32)>> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if map.len() > BIASES_MAX {
        let message = format!("logit_bias: found {}, limit {BIASES_MAX}", map.len());
        return Err(Error::field("logit_bias", message));
    }
    let vocabulary = model.engine.facts().vocabulary;
    let entry = |(id, value): (&String, &Value)| {
        let token = id.parse::<u32>().ok().filter(|id| (*id as usize) < vocabulary);
        let bias = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let expected =
            format!("logit_bias: expected token ids below {vocabulary} and numbers from -100 to 100");
        token.zip(bias).map(|(t, b)| (t, b as f32)).ok_or_else(|| Error::field("logit_bias", expected))
    };
    map.iter().map(entry).collect()
}

/// Returns a different seed for each request.
fn random_seed() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    (now ^ count.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Reads a request of `POST /chat`, as KAITO's transformers runtime takes it.
pub fn kaito(body: &Map<String, Value>, model: &Model) -> Result<Ask> {
    let fields = Fields::new(body, "");
    for name in ["prefix", "handle_long_generation"] {
        fields.refuse(name, &[], "it has no meaning here")?;
    }
    fields.refuse("clean_up_tokenization_spaces", &[json!(false)], "the text is as the model wrote it")?;
    let empty = Map::new();
    let given = Fields::new(fields.object("generate_kwargs")?.unwrap_or(&empty), "generate_kwargs.");
    without(&given)?;
    without(&fields)?;
    let prompt = fields.text("prompt")?;
    let raw = model.raw_chat || model.chat.is_none();
    let text = match (prompt, fields.get("messages")) {
        (Some(prompt), _) if raw => prompt.to_owned(),
        (None, Some(_)) => chat_text(&fields, model)?,
        (None, None) => return Err(Error::field("prompt", "Text generation parameter prompt required")),
        (Some(prompt), _) => {
            let asked = json!({"messages": [{"role": "user", "content": prompt}]});
            chat_text(&Fields::new(asked.as_object().expect("an object"), ""), model)?
        }
    };
    let raw = raw && prompt.is_some();
    let ids = model.encode(&text, raw)?;
    let length = ids.len();
    let shown = if raw { prompt.map(String::from) } else { None };
    let longest = given.size("max_length", 1..=i64::MAX)?;
    let longest = longest.or(raw.then_some(200));
    let mut open = Map::new();
    let max_new = match (given.size("max_new_tokens", 1..=i64::MAX)?, longest) {
        (Some(most), _) => Some(most),
        (None, Some(longest)) if longest <= length => {
            return Err(Error::field(
                "generate_kwargs.max_length",
                format!(
                    "max_length is {longest} tokens with the prompt's {length}: nothing is left for an answer"
                ),
            ));
        }
        (None, longest) => longest.map(|longest| longest - length),
    };
    let least = given.size("min_length", 0..=i64::MAX)?.map_or(0, |least| least.saturating_sub(length));
    open.insert("max_tokens".into(), json!(max_new));
    open.insert("min_tokens".into(), json!(given.size("min_new_tokens", 0..=i64::MAX)?.unwrap_or(least)));
    for name in ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"] {
        open.insert(name.into(), given.get(name).cloned().unwrap_or(Value::Null));
    }
    if raw {
        open.entry("top_k").and_modify(|k| {
            if k.is_null() {
                *k = json!(10)
            }
        });
        open.entry("temperature").and_modify(|t| {
            if t.is_null() {
                *t = json!(1.0)
            }
        });
    }
    if given.flag("do_sample")? == Some(false) {
        open.insert("temperature".into(), json!(0));
    }
    let ends = given.token_or_tokens("eos_token_id")?;
    open.insert("ignore_eos".into(), ends.is_some().into());
    open.insert("stop_token_ids".into(), json!(ends));
    open.insert("adapters".into(), fields.get("adapters").cloned().unwrap_or(Value::Null));
    open.insert("model".into(), fields.get("model").cloned().unwrap_or(Value::Null));
    let mut ask = common(&Fields::new(&open, ""), model, Form::Kaito, vec![Prompt { ids, text: shown }])?;
    let full = fields.flag("return_full_text")?;
    ask.echo = full.unwrap_or(raw) && raw;
    ask.ignored = fields.unknown(&KAITO);
    // The template's text of a conversation is not shown, and one of the two is answered.
    let unused = [("return_full_text", full == Some(true) && !raw), ("messages", prompt.is_some())];
    let unused = unused.into_iter().filter(|(name, unused)| *unused && fields.get(name).is_some());
    ask.ignored.extend(unused.map(|(name, _)| name.to_owned()));
    ask.ignored.extend(given.unknown(&GENERATE).into_iter().map(|name| format!("generate_kwargs.{name}")));
    Ok(ask)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients send back what they got with all fields that their library knows: templates must not find them.
    #[test]
    fn a_field_of_nothing_is_no_part_of_a_message() {
        let plain = json!({"role": "assistant", "content": "x"});
        let full = json!({"role": "assistant", "content": "x", "tool_calls": null, "function_call": null,
            "refusal": null, "audio": null, "name": null});
        assert_eq!(message(0, &full).unwrap(), plain);
        let empty = json!({"role": "assistant", "content": "x", "tool_calls": []});
        assert_eq!(message(0, &empty).unwrap(), plain);
        let parts = json!([{"type": "text", "text": "x"}, {"type": "refusal", "refusal": "y"}]);
        assert_eq!(message(0, &json!({"role": "assistant", "content": parts})).unwrap()["content"], "xy");
        let call = json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]});
        let read = message(0, &call).unwrap();
        assert_eq!(
            (&read["content"], &read["tool_calls"][0]["function"]["arguments"]),
            (&Value::Null, &json!({"a": 1}))
        );
    }
}
