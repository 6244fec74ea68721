//! The server over real sockets, in front of a scripted engine: every route, every bad input, and clients that
//! misbehave.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hone::dataset::{Chat, Tokenizer};
use hone::fault::{Fault, Result};
use hone::generate::defaults::Defaults;
use hone::generate::{
    Adapter, Answer, Counters, Engine, Event, Facts, Finish, Refusal, Request, Scored, Sender, Strength,
    Usage, answer,
};
use hone::server::model::{Bring, Brought, Named, Origin};
use hone::server::{Model, Options, Server};
use serde_json::{Value, json};

/// Says the same words to everybody, a token at a time.
struct Scripted {
    facts: Facts,
    words: Vec<u32>,
    /// Between two tokens.
    pause: Duration,
    queue_max: usize,
    running: Arc<AtomicUsize>,
    cancelled: Arc<AtomicUsize>,
    adapters: Mutex<Vec<Adapter>>,
    seen: Mutex<Vec<Request>>,
    broken: AtomicBool,
}

impl Engine for Scripted {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn submit(&self, request: Request) -> std::result::Result<Answer, Refusal> {
        if self.running.load(Ordering::Acquire) >= self.queue_max {
            return Err(Refusal::Full { waiting: self.queue_max });
        }
        self.seen.lock().unwrap().push(request.clone());
        let (sender, answer) = answer();
        self.running.fetch_add(1, Ordering::AcqRel);
        let (words, pause) = (self.words.clone(), self.pause);
        let (running, cancelled) = (self.running.clone(), self.cancelled.clone());
        let broken = self.broken.load(Ordering::Acquire);
        std::thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || {
                if !say(&request, &words, pause, broken, &sender) {
                    cancelled.fetch_add(1, Ordering::AcqRel);
                }
                running.fetch_sub(1, Ordering::AcqRel);
            })
            .unwrap();
        Ok(answer)
    }

    fn adapters(&self) -> Vec<Adapter> {
        self.adapters.lock().unwrap().clone()
    }

    fn load_adapter(&self, name: &str, folder: &Path) -> Result<Adapter> {
        if folder.ends_with("wrong") {
            return Err(Fault::model("the adapter is of another base"));
        }
        let adapter = Adapter { name: name.into(), folder: folder.into(), rank: 8, bytes: 64 };
        self.adapters.lock().unwrap().push(adapter.clone());
        Ok(adapter)
    }

    fn unload_adapter(&self, name: &str) -> Result<()> {
        self.adapters.lock().unwrap().retain(|adapter| adapter.name != name);
        Ok(())
    }

    fn counters(&self) -> Counters {
        Counters { running: self.running.load(Ordering::Acquire), waiting: 3, ..Counters::default() }
    }
}

/// Sends these words. Returns false if the reader went away.
fn say(request: &Request, words: &[u32], pause: Duration, broken: bool, sender: &Sender) -> bool {
    let scored = |token: u32| Scored { token, logprob: -0.5, top: vec![(token, -0.5), (1, -2.0)] };
    let mut heard = sender.send(Event::Started);
    if request.prompt_logprobs.is_some() {
        heard &= sender.send(Event::Prompt(request.prompt[1..].iter().map(|&id| scored(id)).collect()));
    }
    let mut said = 0;
    let mut finish = Finish::Length;
    for &token in words.iter().cycle().take(request.max_tokens) {
        std::thread::sleep(pause);
        if broken && said == 1 {
            return sender.send(Event::Failed(Fault::internal("the device failed")));
        }
        heard &= sender.send(Event::Token(scored(token)));
        if !heard {
            return false;
        }
        said += 1;
        if request.stop_tokens.contains(&token) {
            finish = Finish::Stop;
            break;
        }
    }
    // All but one token of the prompt were found.
    let cached = request.prompt.len() - 1;
    sender.set_cached(cached);
    let usage = Usage { prompt_tokens: request.prompt.len(), cached_tokens: cached, generated_tokens: said };
    sender.send(Event::Finished(finish, usage))
}

const CONTEXT: usize = 300;
const WORDS: &str = "Grüße 🙂, the answer is 42.";
/// The first token carries the blank before its word; it belongs to the answer, so that prompt and answer fit together.
const SAID: &str = " Grüße 🙂, the answer is 42.";

struct Setting {
    pause: Duration,
    queue_max: usize,
    raw_chat: bool,
    changes: bool,
    default: &'static str,
    words: &'static str,
    options: Options,
}

impl Default for Setting {
    fn default() -> Setting {
        let options = Options { listen: "127.0.0.1:0".parse().unwrap(), ..Options::default() };
        Setting {
            pause: Duration::ZERO,
            queue_max: 2000,
            raw_chat: false,
            changes: false,
            default: "base",
            words: WORDS,
            options,
        }
    }
}

fn model_folder() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/phi3/model"))
}

fn start(setting: Setting) -> (Server, Arc<Scripted>) {
    let tokenizer = Tokenizer::open(&model_folder()).unwrap();
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let chat = Chat::of(&tokenizer, Some(template)).unwrap();
    let mut words = tokenizer.encode(setting.words, false).unwrap();
    words.push(tokenizer.eos_id());
    let facts = Facts {
        context: CONTEXT,
        vocabulary: tokenizer.vocab_size(),
        sequences: 8,
        waiting: setting.queue_max,
        cache_tokens: 8 * CONTEXT,
        description: "a script".into(),
    };
    let adapter = |name: &str| Adapter { name: name.into(), folder: "/adapters".into(), rank: 8, bytes: 64 };
    let engine = Arc::new(Scripted {
        facts,
        words,
        pause: setting.pause,
        queue_max: setting.queue_max,
        running: Arc::default(),
        cancelled: Arc::default(),
        adapters: Mutex::new(vec![adapter("a"), adapter("b")]),
        seen: Mutex::default(),
        broken: AtomicBool::new(false),
    });
    let defaults = Defaults::read(&model_folder(), &tokenizer, None).unwrap();
    let part = |name: &str, strength| Strength { name: name.into(), strength };
    let model = Model {
        name: "base".into(),
        engine: engine.clone(),
        tokenizer,
        chat,
        defaults,
        named: Named::new(
            Some(setting.default.into()),
            vec![("both".into(), vec![part("a", 0.75), part("b", 0.25)])],
        ),
        raw_chat: setting.raw_chat,
        bring: setting.changes.then(|| -> Bring {
            let origin =
                |path: &str| Origin { source: path.into(), digest: format!("sha256:{}", path.len()) };
            Arc::new(move |path| Ok(Brought { folder: PathBuf::from(path), origin: origin(path) }))
        }),
    };
    let server = Server::start(&setting.options).unwrap();
    server.ready(Arc::new(model));
    (server, engine)
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// Returns the events of a stream, without the last.
    fn events(&self) -> Vec<Value> {
        assert!(self.head.contains("text/event-stream"), "{}", self.head);
        let events: Vec<&str> = self.body.split("\n\n").filter(|event| !event.is_empty()).collect();
        let (last, events) = events.split_last().unwrap();
        assert_eq!(*last, "data: [DONE]");
        events
            .iter()
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }
}

fn send(address: SocketAddr, bytes: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // A server that refuses early may close before everything is sent.
    let _ = stream.write_all(bytes);
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let text = String::from_utf8_lossy(&all).into_owned();
    let (head, rest) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(rest) } else { rest.to_owned() };
    Reply { status, head: head.to_owned(), body }
}

fn unchunked(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            break;
        }
        body += &after[..length];
        rest = &after[length + 2..];
    }
    body
}

fn get(server: &Server, path: &str) -> Reply {
    send(server.address(), format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").as_bytes())
}

fn post_bytes(server: &Server, path: &str, body: &[u8]) -> Reply {
    send(server.address(), &request(path, body))
}

fn request(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn post(server: &Server, path: &str, body: Value) -> Reply {
    post_bytes(server, path, body.to_string().as_bytes())
}

fn question() -> Value {
    json!({"model": "base", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 100})
}

fn with(mut body: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    body
}

fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_conversation_is_answered_whole_and_as_a_stream() {
    let (server, engine) = start(Setting::default());
    let reply = post(&server, "/v1/chat/completions", question());
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(reply.head.to_lowercase().contains("content-length: "), "{}", reply.head);
    let whole = reply.json();
    assert_eq!(whole["choices"][0]["message"]["content"], SAID);
    assert_eq!(
        (&whole["choices"][0]["finish_reason"], &whole["object"]),
        (&json!("stop"), &json!("chat.completion"))
    );
    let words = engine.words.len();
    assert_eq!(whole["usage"]["completion_tokens"], words);
    let seen = engine.seen.lock().unwrap()[0].clone();
    let tokenizer = Tokenizer::open(&model_folder()).unwrap();
    assert_eq!(tokenizer.decode(&seen.prompt, false), "<user>What?<assistant>");

    let options = json!({"stream": true, "stream_options": {"include_usage": true}, "n": 2, "seed": 5});
    let events = post(&server, "/v1/chat/completions", with(question(), options)).events();
    let mut texts = BTreeMap::<u64, String>::new();
    for event in &events[..events.len() - 1] {
        let choice = &event["choices"][0];
        let text = choice["delta"]["content"].as_str().unwrap();
        assert!(!text.contains('\u{fffd}'), "{event}");
        texts.entry(choice["index"].as_u64().unwrap()).or_default().push_str(text);
    }
    assert_eq!(texts.into_values().collect::<Vec<_>>(), [SAID, SAID]);
    let last = events.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(2 * words)));
    let seeds: Vec<u64> = engine.seen.lock().unwrap()[1..].iter().map(|r| r.sampling.seed).collect();
    assert_eq!(seeds, [5, 6]);
}

#[test]
fn stops_limits_and_extensions_do_what_they_say() {
    let (server, engine) = start(Setting::default());
    let tokenizer = Tokenizer::open(&model_folder()).unwrap();
    let ask = |more: Value| {
        post(&server, "/v1/chat/completions", with(question(), more)).json()["choices"][0].clone()
    };
    let stopped = ask(json!({"stop": ["swerve", "answer"]}));
    assert_eq!(stopped["message"]["content"], " Grüße 🙂, the ");
    assert_eq!((&stopped["finish_reason"], &stopped["stop_reason"]), (&json!("stop"), &json!("answer")));
    let shown = ask(json!({"stop": ["nsw"], "include_stop_str_in_output": true}));
    assert_eq!(shown["message"]["content"], " Grüße 🙂, the answ");
    let comma = *engine.words.iter().find(|id| tokenizer.decode(&[**id], false) == ",").unwrap();
    for (shown, text) in [(true, " Grüße 🙂,"), (false, " Grüße 🙂")] {
        let stopped = ask(json!({"stop_token_ids": [comma], "include_stop_str_in_output": shown}));
        assert_eq!((&stopped["message"]["content"], &stopped["stop_reason"]), (&json!(text), &json!(comma)));
    }
    // A stop string counts behind the tokens that are asked for anyway.
    let later = ask(json!({"stop": ["e"], "min_tokens": engine.words.len() - 1}));
    assert_eq!((&later["message"]["content"], &later["stop_reason"]), (&json!(SAID), &Value::Null));
    let short = ask(json!({"max_tokens": 3}));
    assert_eq!(short["finish_reason"], "length");
    let more = ask(json!({"ignore_eos": true, "max_tokens": 60, "min_tokens": 60, "return_token_ids": true}));
    assert_eq!((more["token_ids"].as_array().unwrap().len(), &more["finish_reason"]), (60, &json!("length")));
    assert!(
        !engine
            .seen
            .lock()
            .unwrap()
            .last()
            .unwrap()
            .stop_tokens
            .contains(&engine.words[engine.words.len() - 1])
    );
    let scores = ask(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 1}));
    let first = &scores["logprobs"]["content"][0];
    assert_eq!((&first["logprob"], first["top_logprobs"].as_array().unwrap().len()), (&json!(-0.5), 2));
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {}}}]);
    ask(json!({"tools": tools, "temperature": 0, "logit_bias": {"5": -100}, "top_k": -1}));
    let seen = engine.seen.lock().unwrap().last().unwrap().clone();
    assert!(tokenizer.decode(&seen.prompt, false).contains("[look]"));
    assert_eq!(
        (seen.sampling.temperature, seen.sampling.bias, seen.sampling.top_k),
        (0.0, vec![(5, -100.0)], 0)
    );
}

/// A call that the model writes as text is OpenAI's `tool_calls`, whole and streamed; without tools it stays text.
#[test]
fn tool_calls_are_read_from_the_answer_if_tools_are_offered() {
    let words =
        "I look.\n<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": \"Zürich\"}}\n</tool_call>";
    let (server, _) = start(Setting { words, ..Setting::default() });
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {}}}]);
    let ask = |more: Value| post(&server, "/v1/chat/completions", with(question(), more));
    let choice = ask(json!({"tools": tools})).json()["choices"][0].clone();
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"], &call["type"], &call["function"]),
        (
            &json!("tool_calls"),
            &json!(" I look."),
            &json!("function"),
            &json!({"name": "look", "arguments": "{\"at\":\"Zürich\"}"})
        )
    );
    assert_eq!(call["id"].as_str().unwrap().len(), 9);
    let events = ask(json!({"tools": tools, "stream": true, "logprobs": true})).events();
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text, " I look.");
    let calls: Vec<&Value> =
        deltas.iter().filter_map(|delta| delta["tool_calls"].as_array()).flatten().collect();
    assert_eq!(
        (calls.len(), &calls[0]["index"], &calls[0]["function"]["name"]),
        (1, &json!(0), &json!("look"))
    );
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    let scored = |event: &Value| event["choices"][0]["logprobs"]["content"].as_array().map_or(0, Vec::len);
    let tokens = ask(json!({"tools": tools})).json()["usage"]["completion_tokens"].as_u64().unwrap();
    assert_eq!(events.iter().map(scored).sum::<usize>() as u64, tokens, "every token has its score");
    for more in [json!({}), json!({"tools": tools, "tool_choice": "none"})] {
        let choice = ask(more).json()["choices"][0].clone();
        assert_eq!(choice["message"]["content"].as_str().unwrap().trim(), words);
        assert_eq!((&choice["finish_reason"], choice["message"].get("tool_calls")), (&json!("stop"), None));
    }
}

#[test]
fn adapters_are_chosen_by_name_by_mix_and_by_strength() {
    let (server, engine) = start(Setting::default());
    let asked = |more: Value| {
        let reply = post(&server, "/v1/chat/completions", with(question(), more));
        assert_eq!(reply.status, 200, "{}", reply.body);
        let adapters = engine.seen.lock().unwrap().last().unwrap().adapters.clone();
        adapters.into_iter().map(|part| (part.name, part.strength)).collect::<Vec<_>>()
    };
    assert_eq!(asked(json!({})), []);
    assert_eq!(asked(json!({"model": "a"})), [("a".into(), 1.0)]);
    assert_eq!(asked(json!({"model": "both"})), [("a".into(), 0.75), ("b".into(), 0.25)]);
    assert_eq!(
        asked(json!({"adapters": [{"name": "b", "strength": 0.5}, {"name": "a"}]})),
        [("b".into(), 0.5), ("a".into(), 1.0)]
    );
    let models = get(&server, "/v1/models").json();
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["base", "a", "b", "both"]);
    assert_eq!(get(&server, "/v1/models/a").json()["parent"], "base");
    assert_eq!(get(&server, "/v1/models/c").status, 404);
}

#[test]
fn completions_take_every_form_of_prompt_and_echo_with_log_probabilities() {
    let (server, engine) = start(Setting::default());
    let tokenizer = Tokenizer::open(&model_folder()).unwrap();
    let ids = tokenizer.encode("one two three", false).unwrap();
    let ask = |body: Value| {
        let reply = post(&server, "/v1/completions", body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()
    };
    for (prompt, choices) in
        [(json!("x"), 1), (json!(["x", "y"]), 2), (json!(ids), 1), (json!([ids, ids, ids]), 3)]
    {
        let answer = ask(json!({"prompt": prompt, "max_tokens": 100}));
        let list = answer["choices"].as_array().unwrap();
        assert_eq!(list.len(), choices);
        assert!(list.iter().enumerate().all(|(at, choice)| choice["index"] == at && choice["text"] == SAID));
    }
    // A prompt counts once, however many choices it has.
    let asked = json!({"prompt": [ids, ids], "n": 3, "max_tokens": 2});
    let streamed = with(asked.clone(), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let last = post(&server, "/v1/completions", streamed).events().pop().unwrap();
    for usage in [&ask(asked)["usage"], &last["usage"]] {
        let cached = &usage["prompt_tokens_details"]["cached_tokens"];
        assert_eq!(usage["prompt_tokens"], 2 * ids.len(), "{usage}");
        assert_eq!(
            (cached, &usage["completion_tokens"]),
            (&json!(2 * (ids.len() - 1)), &json!(12)),
            "{usage}"
        );
    }
    // Each list of log-probabilities has as many alternatives as were asked for it.
    let asked = json!({"prompt": ids, "max_tokens": 1, "echo": true, "logprobs": 1, "prompt_logprobs": 2});
    let choice = ask(asked)["choices"][0].clone();
    assert_eq!(choice["logprobs"]["top_logprobs"][1].as_object().unwrap().len(), 1, "{choice}");
    let beside = choice["prompt_logprobs"].as_array().unwrap();
    assert_eq!((beside.len(), beside[0]["top_logprobs"].as_array().unwrap().len()), (ids.len() - 1, 2));
    let alone = ask(json!({"prompt": ids, "max_tokens": 1, "echo": true, "prompt_logprobs": 0}));
    assert!(alone["choices"][0]["logprobs"].is_null() && alone["choices"][0]["prompt_logprobs"].is_array());
    // Each token's text begins at its offset in letters. The text has no tokens that the tokenizer put around the
    // prompt, and no blank before its first word.
    let ids_of = |text: &str| tokenizer.encode(text, false).unwrap();
    let given = "Zo\u{eb} \u{1f642} said <|user|> hi";
    let with_start = [vec![1], ids_of(given)].concat();
    for (prompt, offsets) in [
        (json!(given), json!([0, 3, 4, 5, 10, 11, 19, 21])),
        (json!(with_start), json!([0, 0, 3, 4, 5, 10, 11, 11, 13])),
    ] {
        let asked = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 0});
        assert_eq!(ask(asked)["choices"][0]["logprobs"]["text_offset"], offsets, "{prompt}");
        let asked = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 100});
        let choice = ask(asked)["choices"][0].clone();
        let letters: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
        let list = |name: &str| {
            choice["logprobs"][name].as_array().unwrap()[offsets.as_array().unwrap().len()..].to_vec()
        };
        for (name, at) in list("tokens").iter().zip(list("text_offset")) {
            let (name, at) = (name.as_str().unwrap(), at.as_u64().unwrap() as usize);
            let rest: String = letters[at..].iter().collect();
            let no_text = name.starts_with("bytes:") || tokenizer.is_special(ids_of(name)[0]);
            assert!(no_text || rest.starts_with(name), "{name:?} at {at}: {rest:?}");
        }
    }
    // The request of lm-evaluation-harness.
    let answer = ask(
        json!({"prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true}),
    );
    let scores = &answer["choices"][0]["logprobs"];
    let list = scores["token_logprobs"].as_array().unwrap();
    assert_eq!(list.len(), ids.len() + 1);
    assert!(list[0].is_null() && list[1..].iter().all(|score| score == -0.5), "{list:?}");
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with(&tokenizer.decode(&ids, false)), "{text}");
    for top in &scores["top_logprobs"].as_array().unwrap()[1..] {
        let best = top.as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert_eq!(best, -0.5);
    }
    assert_eq!(engine.seen.lock().unwrap().last().unwrap().prompt, ids);
    let streamed =
        post(&server, "/v1/completions", json!({"prompt": "x", "max_tokens": 50, "stream": true})).events();
    let text: String = streamed.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, SAID);
}

#[test]
fn kaitos_chat_answers_as_v0_3_did_but_through_the_template() {
    let (server, engine) = start(Setting::default());
    let asked = json!({"prompt": "YOUR QUESTION HERE", "generate_kwargs": {"max_length": 200, "do_sample": false, "top_k": 10}});
    let reply = post(&server, "/chat", asked.clone());
    assert_eq!(reply.json(), json!({"Result": SAID}));
    let seen = engine.seen.lock().unwrap().last().unwrap().clone();
    assert_eq!((seen.sampling.temperature, seen.max_tokens), (0.0, 200 - seen.prompt.len()));
    let missing = post(&server, "/chat", json!({}));
    assert_eq!(
        (missing.status, &missing.json()["detail"]),
        (400, &json!("Text generation parameter prompt required"))
    );
    let (raw, engine) = start(Setting { raw_chat: true, ..Setting::default() });
    assert_eq!(post(&raw, "/chat", asked).json(), json!({"Result": format!("YOUR QUESTION HERE{SAID}")}));
    post(&raw, "/chat", json!({"prompt": "x"}));
    let seen = engine.seen.lock().unwrap().last().unwrap().clone();
    assert_eq!((seen.sampling.top_k, seen.max_tokens), (10, 200 - seen.prompt.len()));
    assert_eq!(post(&raw, "/chat", json!({"prompt": "x", "generate_kwargs": {"num_beams": 4}})).status, 400);
    for more in [
        json!({"clean_up_tokenization_spaces": true}),
        json!({"generate_kwargs": {"num_return_sequences": 2}}),
    ] {
        assert_eq!(post(&raw, "/chat", with(json!({"prompt": "x"}), more)).status, 400);
    }
    let wrong = post(&raw, "/chat", json!({"prompt": "x", "generate_kwargs": {"eos_token_id": "x"}}));
    assert_eq!(wrong.json()["error"]["param"], "generate_kwargs.eos_token_id", "{}", wrong.body);
    for ends in [json!(7), json!([7])] {
        post(&raw, "/chat", json!({"prompt": "x", "generate_kwargs": {"eos_token_id": ends}}));
        assert_eq!(engine.seen.lock().unwrap().last().unwrap().stop_tokens, [7]);
    }
    // One of two questions is answered, and a template's text is not shown.
    let both = json!({"prompt": "x", "messages": [], "return_full_text": true});
    let reply = post(&server, "/chat", both);
    assert!(reply.head.contains("x-ignored-fields: return_full_text,messages"), "{}", reply.head);
}

/// The status, the field and a word of the message of everything that is wrong.
#[test]
fn bad_input_gets_openais_error_and_the_server_lives() {
    let (server, engine) = start(Setting::default());
    let chat = "/v1/chat/completions";
    let (long, huge) = ("word ".repeat(400), "word ".repeat(600_000));
    let many: BTreeMap<String, i32> = (0..1025).map(|token| (token.to_string(), 1)).collect();
    let calls =
        |calls: Value| json!({"messages": [{"role": "assistant", "content": null, "tool_calls": calls}]});
    let cases = [
        (json!({"model": "none"}), 404, "model", "does not exist"),
        (json!({"messages": []}), 400, "messages", "empty"),
        (json!({"messages": "hi"}), 400, "messages", "expected a list"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), 400, "messages[0]", "unknown"),
        (json!({"messages": [{"role": "user", "content": 5}]}), 400, "messages[0]", "string"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            400,
            "messages[0]",
            "text",
        ),
        (json!({"messages": [{"role": "user", "content": long}]}), 400, "", "context length is 300"),
        (json!({"max_tokens": 0}), 400, "max_tokens", "from 1"),
        (json!({"max_tokens": -1}), 400, "max_tokens", "from 1"),
        (json!({"max_completion_tokens": 0}), 400, "max_completion_tokens", "from 1"),
        (json!({"stream_options": {"include_usage": true}}), 400, "stream_options", "needs stream"),
        (json!({"stream": true, "prompt_logprobs": 1}), 400, "prompt_logprobs", "not part of a stream"),
        (json!({"adapters": [{"name": "a", "strenght": 0.5}]}), 400, "adapters", "`strenght` is unknown"),
        (json!({"reasoning_effort": 3}), 400, "reasoning_effort", "a string"),
        (json!({"max_tokens": 1_000_000_000}), 400, "", "context length"),
        (json!({"max_tokens": "10"}), 400, "max_tokens", "whole number"),
        (json!({"temperature": -1}), 400, "temperature", "from 0 to 2"),
        (json!({"temperature": "NaN"}), 400, "temperature", "a number"),
        (json!({"top_p": 1.5}), 400, "top_p", "from 0 to 1"),
        (json!({"n": 0}), 400, "n", "from 1"),
        (json!({"n": 100_000}), 400, "n", "from 1 to 128"),
        (json!({"stop": vec!["a"; 17]}), 400, "stop", "up to 16"),
        (json!({"stop": [""]}), 400, "stop", "empty"),
        (json!({"stop": 3}), 400, "stop", "a string"),
        (json!({"logit_bias": {"999999999": 1}}), 400, "logit_bias", "token ids below"),
        (json!({"logit_bias": {"1": 1e9}}), 400, "logit_bias", "-100 to 100"),
        (json!({"top_logprobs": 3}), 400, "top_logprobs", "needs logprobs"),
        (json!({"stream": "yes"}), 400, "stream", "true or false"),
        (json!({"adapters": [{"name": "zzz"}]}), 404, "adapters", "`zzz` does not exist; there are: a, b"),
        (json!({"adapters": [{"name": "both"}]}), 404, "adapters", "`both` does not exist; there are: a, b"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}]}),
            400,
            "messages[0]",
            "text",
        ),
        (json!({"adapters": [{"name": "a", "strength": "abc"}]}), 400, "adapters.strength", "a number"),
        (json!({"adapters": [{"name": "a", "strength": 1e308}]}), 400, "adapters.strength", "from -16 to 16"),
        (json!({"adapters": [{"name": "a"}, {"name": "a"}]}), 400, "adapters", "twice"),
        (json!({"model": "a", "adapters": [{"name": "b"}]}), 400, "adapters", "already"),
        (
            json!({"response_format": {"type": "json_object"}}),
            400,
            "response_format",
            "json_object is not supported",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
            400,
            "response_format",
            "grammar",
        ),
        (json!({"response_format": {}}), 400, "response_format", "without a type"),
        (json!({"tool_choice": "required"}), 400, "tool_choice", "required is not supported"),
        (
            json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}),
            400,
            "tool_choice",
            "a named function is not supported",
        ),
        (json!({"tool_choice": {"type": "allowed_tools"}}), 400, "tool_choice", "this form is not supported"),
        (json!({"tools": [{"type": "function"}]}), 400, "tools[0]", "expected"),
        (json!({"tools": "x"}), 400, "tools", "a list"),
        (json!({"min_tokens": 200}), 400, "min_tokens", "more than max_tokens"),
        (json!({"stop_token_ids": vec![1; 1025]}), 400, "stop_token_ids", "found 1025, limit 1024"),
        (json!({"logit_bias": many}), 400, "logit_bias", "found 1025, limit 1024"),
        (calls(json!("x")), 400, "messages[0]", "tool_calls must be a list"),
        (calls(json!([])), 400, "messages[0]", "content must be"),
        (calls(json!(null)), 400, "messages[0]", "content must be"),
        (calls(json!([{"function": {}}])), 400, "messages[0]", "tool_calls[0]: function.name is missing"),
        (json!({"messages": [{"role": 1, "content": "x"}]}), 400, "messages[0]", "role must be a string"),
        (
            json!({"messages": [{"role": "assistant", "content": ""}], "continue_final_message": true}),
            400,
            "continue_final_message",
            "no text to continue",
        ),
        (calls(json!([5])), 400, "messages[0]", "tool_calls[0]: expected an object"),
        (calls(json!([{"function": "f"}])), 400, "messages[0]", "tool_calls[0]: expected an object"),
        (calls(json!([{"function": {"name": "f"}}, []])), 400, "messages[0]", "tool_calls[1]"),
        (json!({"messages": [{"role": "user", "content": huge}]}), 400, "", "context length is 300"),
        (json!({"guided_json": {}}), 400, "guided_json", "not supported"),
        (json!({"no_repeat_ngram_size": 3}), 400, "no_repeat_ngram_size", "not supported"),
        (json!({"functions": [{"name": "f"}]}), 400, "functions", "not supported"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            400,
            "continue_final_message",
            "exclude",
        ),
    ];
    for (more, status, param, word) in cases {
        let reply = post(&server, chat, with(question(), more.clone()));
        let error = reply.json()["error"].clone();
        assert_eq!(reply.status, status, "{more}: {error}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{more}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(word) && message.len() < 1000, "{more}: {error}");
        assert!(error["type"].is_string() && error.get("code").is_some());
    }
    let cases = [
        (json!({}), "missing"),
        (json!({"prompt": []}), "empty"),
        (json!({"prompt": [1, "x"]}), "expected"),
        (json!({"prompt": [[1], 5]}), "expected"),
        (json!({"prompt": [4_000_000_000u32]}), "not in the vocabulary"),
        (json!({"prompt": [-1]}), "expected"),
        (json!({"prompt": "x", "suffix": "y"}), "not supported"),
        (json!({"prompt": "x", "max_tokens": 0}), "echo"),
        (json!({"prompt": "x", "logprobs": 21}), "from 0 to 20"),
        (json!({"prompt": "x", "best_of": 3}), "not supported"),
        (json!({"prompt": vec!["x"; 40], "n": 128}), "5120 choices of all prompts, limit 4096"),
    ];
    for (body, word) in cases {
        let reply = post(&server, "/v1/completions", body.clone());
        assert_eq!(reply.status, 400, "{body}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(word), "{body}: {}", reply.body);
    }
    // A compressed body is named as such.
    let compressed = "POST /v1/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n\x1f\x08";
    let reply = send(server.address(), compressed.as_bytes());
    assert!(reply.status == 415 && reply.body.contains("content-encoding \\\"gzip\\\""), "{}", reply.body);
    assert!(post_bytes(&server, chat, b"").body.contains("The body is empty"));
    // A byte order mark is no part of the JSON behind it.
    let marked = [b"\xef\xbb\xbf", question().to_string().as_bytes()].concat();
    assert_eq!(post_bytes(&server, chat, &marked).status, 200);
    let broken: [&[u8]; 6] =
        [b"", b"{", b"[1]", b"\"x\"", b"{\"a\": \"\xff\xfe\"}", b"{\"prompt\": \"\\ud800\"}"];
    for body in broken {
        assert_eq!(post_bytes(&server, "/v1/completions", body).status, 400, "{body:?}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(post_bytes(&server, chat, deep.as_bytes()).status, 400);
    for (path, status) in [("/nothing", 404), ("/v1/chat/completions", 405), ("/tokenize", 405)] {
        assert_eq!(get(&server, path).status, status, "{path}");
    }
    // Fields without effect are accepted, and unknown fields are reported.
    let usual = json!({"use_beam_search": false, "length_penalty": 1.0, "typical_p": 1, "sparkle": 3, "gl\u{fc}ck": 1, "none": null});
    let reply = post(&server, chat, with(question(), usual));
    assert_eq!(reply.status, 200, "{}", reply.body);
    let ignored = reply.head.lines().find_map(|line| line.strip_prefix("x-ignored-fields: ")).unwrap();
    assert!(
        ignored.contains("sparkle") && ignored.contains("gl?ck") && !ignored.contains("none"),
        "{ignored}"
    );
    // So are fields that the chat template has no place for, and options of a stream. This one has a place for tools.
    let tools = json!([{"type": "function", "function": {"name": "look"}}]);
    let more = json!({"tools": tools, "documents": [{"text": "x"}], "reasoning_effort": "low", "stream": true,
        "chat_template_kwargs": {"enable_thinking": false, "tools": null}, "stream_options": {"sparkle": true}});
    let reply = post(&server, chat, with(question(), more));
    let ignored = reply.head.lines().find_map(|line| line.strip_prefix("x-ignored-fields: ")).unwrap();
    let expected = "stream_options.sparkle,documents,reasoning_effort,chat_template_kwargs.enable_thinking";
    assert_eq!(ignored, expected);
    // Neither has this one a place for calls: their message is empty, and not the word for nothing.
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]});
    let messages = json!([{"role": "user", "content": "q"}, call, {"role": "tool", "content": "ok"}]);
    let reply = post(&server, chat, with(question(), json!({"messages": messages})));
    assert!(reply.head.contains("x-ignored-fields: messages.tool_calls"), "{}", reply.head);
    let seen = engine.seen.lock().unwrap().last().unwrap().clone();
    let tokenizer = Tokenizer::open(&model_folder()).unwrap();
    assert_eq!(tokenizer.decode(&seen.prompt, false), "<user>q<assistant><tool>ok<assistant>");
    let asked = json!({"prompt": "x", "generate_kwargs": {"max_new_tokens": 2, "sparkle": 1}, "glow": 1});
    let reply = post(&server, "/chat", asked);
    assert!(reply.head.contains("x-ignored-fields: glow,generate_kwargs.sparkle"), "{}", reply.head);
    let names: serde_json::Map<String, Value> = (0..5000).map(|n| (format!("name{n}"), json!(1))).collect();
    let reply = post(&server, chat, with(question(), names.into()));
    assert!(reply.status == 200 && reply.head.len() < 2000, "{} bytes of headers", reply.head.len());
    let asked = json!({"prompt": "x", "generate_kwargs": {"penalty_alpha": 0.6}});
    assert_eq!(post(&server, "/chat", asked).status, 400);
    assert_eq!(post(&server, chat, question()).status, 200);
}

/// Bytes changed at random in good requests of every route that takes one: always an answer, never a fall.
#[test]
fn the_parser_survives_what_is_random() {
    let (server, _) = start(Setting { changes: true, ..Setting::default() });
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {}}}]);
    let chat = with(
        question(),
        json!({"stop": ["x"], "logit_bias": {"3": 1}, "adapters": [{"name": "a", "strength": 1}], "stream": false,
               "tools": tools, "tool_choice": "auto", "response_format": {"type": "text"}}),
    );
    let routes = [
        ("/v1/chat/completions", chat),
        (
            "/v1/completions",
            json!({"prompt": [[1, 2], [3]], "max_tokens": 3, "echo": true, "logprobs": 1, "n": 2, "seed": 5}),
        ),
        (
            "/chat",
            json!({"prompt": "x", "generate_kwargs": {"max_length": 40, "top_k": 10, "eos_token_id": [2]}}),
        ),
        ("/tokenize", json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": true})),
        ("/detokenize", json!({"tokens": [1, 2, 3]})),
        ("/v1/mixes", json!({"name": "m", "adapters": [{"name": "a", "strength": 0.5}]})),
        ("/v1/load_lora_adapter", json!({"lora_name": "a", "lora_path": "/x", "load_inplace": true})),
        ("/v1/unload_lora_adapter", json!({"lora_name": "zz"})),
    ];
    let pieces: [&[u8]; 8] = [b"null", b"-1", b"1e999", b"\"", b"{}", b"[]", b"\\u0000", b"\xf0\x9f"];
    let mut state = 88_172_645_463_325_252u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for (path, good) in routes {
        let good = good.to_string().into_bytes();
        for _ in 0..250 {
            let mut body = good.clone();
            for _ in 0..1 + random(3) {
                let at = random(body.len());
                match random(3) {
                    0 => body[at] = random(256) as u8,
                    1 => body.truncate(at.max(1)),
                    _ => {
                        let piece = pieces[random(pieces.len())];
                        let end = (at + 1 + random(6)).min(body.len());
                        body.splice(at..end, piece.iter().copied());
                    }
                }
            }
            let reply = post_bytes(&server, path, &body);
            let shown = String::from_utf8_lossy(&body);
            assert!(matches!(reply.status, 200 | 400 | 404), "{path}: {} for {shown}", reply.status);
            assert!(reply.status == 200 || reply.json()["error"]["message"].is_string(), "{path}: {shown}");
        }
    }
    assert_eq!(get(&server, "/health").status, 200);
}

#[test]
fn large_bodies_and_headers_are_refused() {
    let options =
        Options { listen: "127.0.0.1:0".parse().unwrap(), body_bytes_max: 1 << 20, ..Options::default() };
    let (server, _) = start(Setting { options, ..Setting::default() });
    let big = vec![b' '; 2 << 20];
    let told = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        big.len()
    );
    assert_eq!(send(server.address(), told.as_bytes()).status, 413);
    // A client that reads nothing before it has sent everything sees the answer, wherever it comes from.
    for (path, status) in [("/v1/completions", 413), ("/nothing", 404), ("/health", 405)] {
        let mut client = TcpStream::connect(server.address()).unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            8 << 20
        );
        client.write_all(head.as_bytes()).and_then(|()| client.write_all(&vec![b' '; 8 << 20])).expect(path);
        let mut reply = String::new();
        client.read_to_string(&mut reply).expect(path);
        assert!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {reply}");
    }
    let chunk = [format!("{:x}\r\n", big.len()).as_bytes(), &big, b"\r\n0\r\n\r\n"].concat();
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
    assert_eq!(send(server.address(), &[head.as_slice(), &chunk].concat()).status, 413);
    let header = format!("GET /health HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(200_000));
    let status = send(server.address(), header.as_bytes()).status;
    assert!(matches!(status, 431 | 0), "{status}");
    assert_eq!(get(&server, "/health").status, 200);
}

/// Each says that the largest body follows, and sends one byte of it.
#[test]
fn bodies_that_do_not_come_keep_nobody_out() {
    let (server, _) = start(Setting::default());
    let most = Options::default().body_bytes_max;
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {most}\r\n\r\n{{");
    let waiting: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut client = TcpStream::connect(server.address()).unwrap();
            client.write_all(head.as_bytes()).unwrap();
            client
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(post(&server, "/v1/chat/completions", question()).status, 200);
    drop(waiting);
}

/// Bodies that came in part hold their memory, so the next request gets an answer to try again at once, and not after
/// their limit.
#[test]
fn bodies_that_fill_the_memory_turn_others_away() {
    let (server, _) = start(Setting::default());
    let most = Options::default().body_bytes_max;
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {most}\r\n\r\n");
    let part = vec![b' '; most - 1];
    // The server closes the connection of a body that it turns away.
    let hold = || {
        let mut client = TcpStream::connect(server.address()).unwrap();
        let _ = client.write_all(head.as_bytes()).and_then(|()| client.write_all(&part));
        client
    };
    let held = RefCell::new((0..16).map(|_| hold()).collect::<Vec<_>>());
    wait_for("there is no room", || {
        let reply = post(&server, "/v1/chat/completions", question());
        assert!(
            reply.status == 200 || reply.json()["error"]["code"] == "rate_limit_exceeded",
            "{}",
            reply.body
        );
        // A question that comes before the last bytes of a body takes their room, and the body is turned away.
        if reply.status == 200 {
            held.borrow_mut().push(hold());
        }
        reply.status == 429
    });
    drop(held);
    wait_for("there is room", || post(&server, "/v1/chat/completions", question()).status == 200);
}

#[test]
fn a_client_that_goes_away_frees_its_place() {
    let (server, engine) = start(Setting { pause: Duration::from_millis(5), ..Setting::default() });
    let forever = |stream: bool| {
        let body = with(question(), json!({"stream": stream, "ignore_eos": true, "max_tokens": 250}));
        request("/v1/chat/completions", body.to_string().as_bytes())
    };
    for stream in [true, false] {
        let before = engine.cancelled.load(Ordering::Acquire);
        let mut client = TcpStream::connect(server.address()).unwrap();
        client.write_all(&forever(stream)).unwrap();
        wait_for("it runs", || engine.running.load(Ordering::Acquire) == 1);
        drop(client);
        wait_for("its place is free", || engine.running.load(Ordering::Acquire) == 0);
        assert_eq!(engine.cancelled.load(Ordering::Acquire), before + 1, "stream: {stream}");
    }
    wait_for("nothing runs", || server.running() == 0);
    let aborted = "vllm:request_success_total{engine=\"0\",model_name=\"base\",finished_reason=\"abort\"} 2";
    wait_for("both are counted", || get(&server, "/metrics").body.contains(aborted));
}

#[test]
fn a_slow_reader_harms_nobody() {
    let (server, engine) = start(Setting::default());
    let body = with(question(), json!({"stream": true, "ignore_eos": true, "max_tokens": 250, "n": 64}));
    let mut slow = TcpStream::connect(server.address()).unwrap();
    slow.write_all(&request("/v1/chat/completions", body.to_string().as_bytes())).unwrap();
    wait_for("the engine is done with it", || {
        engine.running.load(Ordering::Acquire) == 0 && engine.seen.lock().unwrap().len() == 64
    });
    for _ in 0..20 {
        assert_eq!(post(&server, "/v1/chat/completions", question()).status, 200);
    }
    let mut all = String::new();
    slow.read_to_string(&mut all).unwrap();
    assert!(all.contains("data: [DONE]"));
}

#[test]
fn a_full_queue_answers_429_and_a_thousand_clients_are_bounded() {
    let (server, engine) =
        start(Setting { pause: Duration::from_millis(2), queue_max: 32, ..Setting::default() });
    let address = server.address();
    let body = with(question(), json!({"stream": true})).to_string().into_bytes();
    let most = Arc::new(AtomicUsize::new(0));
    let counts: Vec<(u16, bool)> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..1000)
            .map(|number| {
                let (body, engine, most) = (&body, &engine, most.clone());
                std::thread::Builder::new()
                    .stack_size(128 << 10)
                    .spawn_scoped(scope, move || {
                        most.fetch_max(engine.running.load(Ordering::Acquire), Ordering::AcqRel);
                        if number % 7 == 0 {
                            let mut client = TcpStream::connect(address).unwrap();
                            let _ = client.write_all(&request("/v1/chat/completions", body));
                            return (0, true); // goes away
                        }
                        let reply = send(address, &request("/v1/chat/completions", body));
                        let again = reply.head.to_lowercase().contains("retry-after: 1");
                        (reply.status, reply.status != 429 || again)
                    })
                    .unwrap()
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert!(counts.iter().all(|(status, right)| *right && matches!(status, 0 | 200 | 429)), "{counts:?}");
    assert!(
        counts.iter().any(|(status, _)| *status == 200) && counts.iter().any(|(status, _)| *status == 429)
    );
    assert!(most.load(Ordering::Acquire) <= 64);
    wait_for("all places are free", || engine.running.load(Ordering::Acquire) == 0 && server.running() == 0);
    let metrics = get(&server, "/metrics").body;
    let rejected = metrics.lines().find(|line| line.starts_with("hone_requests_rejected_total{")).unwrap();
    assert!(!rejected.ends_with(" 0"), "{rejected}");
    assert_eq!(post(&server, "/v1/chat/completions", question()).status, 200);
}

/// More choices than run and wait at once would be turned away each time that they come: the number is told.
#[test]
fn what_never_fits_into_the_queue_is_not_told_to_come_again() {
    let (server, _) = start(Setting { queue_max: 32, ..Setting::default() });
    let ask = |prompts: usize| {
        post(&server, "/v1/completions", json!({"prompt": vec!["x"; prompts], "n": 2, "max_tokens": 1}))
    };
    assert_eq!(ask(16).status, 200);
    // 8 run and 32 wait.
    let reply = ask(21);
    assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("n")), "{}", reply.body);
    let told = "42 choices of all prompts, but this server holds 40 at once";
    assert!(reply.body.contains(told) && !reply.head.contains("retry-after"), "{}", reply.body);
}

#[test]
fn an_engines_failure_is_told_in_the_stream() {
    let (server, engine) = start(Setting::default());
    engine.broken.store(true, Ordering::Release);
    let whole = post(&server, "/v1/chat/completions", question());
    assert_eq!((whole.status, &whole.json()["error"]["type"]), (500, &json!("server_error")));
    let stream = post(&server, "/v1/chat/completions", with(question(), json!({"stream": true})));
    assert!(
        stream.body.contains("\"error\":{\"message\":\"the device failed\"")
            && !stream.body.contains("[DONE]"),
        "{}",
        stream.body
    );
}

#[test]
fn it_listens_before_the_model_is_there_and_drains_at_the_end() {
    let options = Options { listen: "127.0.0.1:0".parse().unwrap(), ..Options::default() };
    let loading = Server::start(&options).unwrap();
    for path in ["/health", "/healthz", "/readyz", "/v1/models"] {
        let reply = get(&loading, path);
        assert_eq!(
            (reply.status, &reply.json()["error"]["message"]),
            (503, &json!("Loading model")),
            "{path}"
        );
    }
    assert_eq!((get(&loading, "/livez").status, get(&loading, "/metrics").status), (200, 200));
    assert_eq!(post(&loading, "/v1/chat/completions", question()).status, 503);
    drop(loading);

    let (server, engine) = start(Setting { pause: Duration::from_millis(10), ..Setting::default() });
    let address = server.address();
    let slow = |tokens: usize| {
        let body = with(question(), json!({"stream": true, "ignore_eos": true, "max_tokens": tokens}));
        std::thread::spawn(move || {
            send(address, &request("/v1/chat/completions", body.to_string().as_bytes()))
        })
    };
    let (short, long) = (slow(20), slow(280));
    wait_for("both run", || engine.running.load(Ordering::Acquire) == 2);
    let drain = std::thread::spawn(move || server.drain(Duration::from_millis(1000)));
    wait_for("it refuses", || {
        let reply = send(address, b"GET /readyz HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        reply.status == 503
    });
    let health = send(address, b"GET /health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
    assert_eq!(health.status, 200, "it lives while it drains");
    let refused = send(address, &request("/v1/chat/completions", question().to_string().as_bytes()));
    assert_eq!(refused.status, 503);
    drain.join().unwrap();
    assert!(short.join().unwrap().body.ends_with("data: [DONE]\n\n"), "what fits the grace is finished");
    assert!(long.join().unwrap().body.contains("The server ends"), "the rest is told");
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn whoever_waits_for_a_place_is_told_of_the_end() {
    let options = Options { connections_max: 1, ..Options::default() };
    let options = Options { listen: "127.0.0.1:0".parse().unwrap(), ..options };
    let (server, _) = start(Setting { options, ..Setting::default() });
    // The one place belongs to a connection that stays open, so the others wait in the kernel.
    let mut kept = TcpStream::connect(server.address()).unwrap();
    kept.write_all(b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n").unwrap();
    let mut start = [0; 12];
    kept.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 200");
    let question = request("/v1/chat/completions", question().to_string().as_bytes());
    let mut waiting: Vec<_> = (0..20).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
    for one in &mut waiting {
        one.write_all(&question).unwrap();
    }
    server.drain(Duration::ZERO);
    for mut one in waiting {
        let mut reply = String::new();
        one.read_to_string(&mut reply).unwrap();
        assert!(reply.starts_with("HTTP/1.1 503") && reply.contains("The server ends"), "{reply}");
        assert!(reply.to_lowercase().contains("connection: close"), "{reply}");
    }
    let mut rest = String::new();
    kept.read_to_string(&mut rest).expect("a connection without a request is closed in order");
    assert!(!rest.contains("HTTP/1.1"), "{rest}");
}

#[test]
fn a_key_is_asked_for_and_probes_need_none() {
    let options =
        Options { listen: "127.0.0.1:0".parse().unwrap(), key: Some("secret".into()), ..Options::default() };
    let (server, _) = start(Setting { options, ..Setting::default() });
    let ask = |key: &str| {
        let head = format!(
            "GET /v1/models HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n"
        );
        send(server.address(), head.as_bytes())
    };
    assert_eq!((ask("secret").status, ask("secrets").status, ask("").status), (200, 401, 401));
    assert_eq!(ask("x").json()["error"]["code"], "invalid_api_key");
    assert!(ask("x").head.contains("www-authenticate: Bearer"), "{}", ask("x").head);
    // The scheme's name has no case.
    let head =
        "GET /v1/models HTTP/1.1\r\nhost: h\r\nauthorization: bearer secret\r\nconnection: close\r\n\r\n";
    assert_eq!(send(server.address(), head.as_bytes()).status, 200);
    assert_eq!(post(&server, "/chat", json!({"prompt": "x"})).status, 401);
    for path in ["/", "/health", "/readyz", "/metrics"] {
        assert_eq!(get(&server, path).status, 200, "{path}");
    }
}

#[test]
fn adapters_change_only_where_allowed() {
    let (server, _) = start(Setting::default());
    let new = json!({"lora_name": "c", "lora_path": "/x/c"});
    assert_eq!(post(&server, "/v1/load_lora_adapter", new.clone()).status, 403);
    let (server, _) = start(Setting { changes: true, ..Setting::default() });
    let load = |body: Value| post(&server, "/v1/load_lora_adapter", body).status;
    assert_eq!(load(new.clone()), 200);
    assert_eq!(load(new), 400);
    assert_eq!(load(json!({"lora_name": "c", "lora_path": "/x/c", "load_inplace": true})), 200);
    assert_eq!(load(json!({"lora_name": "d", "lora_path": "/x/wrong"})), 400);
    assert_eq!(load(json!({"lora_name": "a/b", "lora_path": "/x"})), 400);
    assert_eq!(post(&server, "/v1/chat/completions", with(question(), json!({"model": "c"}))).status, 200);
    let unload = |name: &str| post(&server, "/v1/unload_lora_adapter", json!({"lora_name": name})).status;
    assert_eq!((unload("c"), unload("c"), unload("a")), (200, 404, 400));
    // The base and a mix are no adapters, and are told so.
    for name in ["base", "both"] {
        let load = json!({"lora_name": name, "lora_path": "/x", "load_inplace": true});
        let reply = post(&server, "/v1/load_lora_adapter", load);
        assert!(reply.status == 400 && reply.body.contains("is the base or a mix"), "{}", reply.body);
        let reply = post(&server, "/v1/unload_lora_adapter", json!({"lora_name": name}));
        assert!(reply.status == 404 && reply.body.contains("there are: a, b"), "{}", reply.body);
    }
    let load = json!({"lora_name": "d", "lora_path": "/x/wrong"});
    assert_eq!(post(&server, "/v1/load_lora_adapter", load).json()["error"]["param"], "lora_path");
}

/// A page of another origin reads answers only if it is allowed, and changes nothing otherwise.
#[test]
fn pages_of_allowed_origins_may_ask() {
    let options = |origins: &[&str], key: Option<&str>| Options {
        listen: "127.0.0.1:0".parse().unwrap(),
        origins: origins.iter().map(|origin| origin.to_string()).collect(),
        key: key.map(String::from),
        ..Options::default()
    };
    let send_with = |server: &Server, line: &str, headers: &str, body: &str| {
        let length = body.len();
        let head = format!(
            "{line} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
        );
        send(server.address(), (head + body).as_bytes())
    };
    let page = "origin: https://chat.example\r\n";
    let asks = format!(
        "{page}access-control-request-method: POST\r\naccess-control-request-headers: authorization, content-type\r\n"
    );
    let mix = json!({"name": "m", "adapters": [{"name": "a"}]}).to_string();
    let allow = |reply: &Reply| {
        reply
            .head
            .lines()
            .find_map(|line| line.strip_prefix("access-control-allow-origin: "))
            .map(String::from)
    };

    let (server, _) = start(Setting { options: options(&[], None), changes: true, ..Setting::default() });
    let reply = send_with(&server, "GET /v1/models", page, "");
    assert_eq!((reply.status, allow(&reply)), (200, None));
    assert_eq!(send_with(&server, "OPTIONS /v1/chat/completions", &asks, "").status, 405);
    let reply = send_with(&server, "POST /v1/mixes", page, &mix);
    assert!(reply.status == 403 && reply.body.contains("--allowed-origins"), "{}", reply.body);
    assert_eq!(send_with(&server, "DELETE /v1/mixes/both", page, "").status, 403);
    assert_eq!(send_with(&server, "POST /v1/mixes", "origin: http://h\r\n", &mix).status, 200);

    let allowed = options(&["https://chat.example"], Some("secret"));
    let (server, _) = start(Setting { options: allowed, changes: true, ..Setting::default() });
    // A browser sends no key with its question.
    let reply = send_with(&server, "OPTIONS /v1/chat/completions", &asks, "");
    assert_eq!(
        (reply.status, allow(&reply).as_deref()),
        (204, Some("https://chat.example")),
        "{}",
        reply.head
    );
    assert!(
        reply.head.contains("access-control-allow-headers: authorization, content-type"),
        "{}",
        reply.head
    );
    assert!(reply.head.contains("access-control-allow-methods: GET, HEAD, POST, DELETE"), "{}", reply.head);
    let reply = send_with(&server, "POST /v1/mixes", page, &mix);
    assert_eq!((reply.status, allow(&reply).as_deref()), (401, Some("https://chat.example")));
    let reply =
        send_with(&server, "POST /v1/mixes", &format!("{page}authorization: Bearer secret\r\n"), &mix);
    assert_eq!((reply.status, allow(&reply).as_deref()), (200, Some("https://chat.example")));
    assert!(reply.head.contains("vary: origin"), "{}", reply.head);
    let other = asks.replace("chat.example", "other.example");
    let reply = send_with(&server, "OPTIONS /v1/chat/completions", &other, "");
    assert_eq!((reply.status, allow(&reply)), (401, None));

    let (server, _) = start(Setting { options: options(&["*"], None), ..Setting::default() });
    let streamed = with(question(), json!({"stream": true})).to_string();
    let reply = send_with(&server, "POST /v1/chat/completions", page, &streamed);
    assert_eq!((reply.status, allow(&reply).as_deref()), (200, Some("*")));
}

/// The name that answers requests without a model stays: all of them would fail.
#[test]
fn the_default_is_not_removed() {
    let (server, _) = start(Setting { changes: true, default: "both", ..Setting::default() });
    let delete = "DELETE /v1/mixes/both HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    let reply = send(server.address(), delete.as_bytes());
    assert!(reply.status == 400 && reply.body.contains("--default"), "{}", reply.body);
    let (server, _) = start(Setting { changes: true, default: "c", ..Setting::default() });
    let load = json!({"lora_name": "c", "lora_path": "/x/c"});
    assert_eq!(post(&server, "/v1/load_lora_adapter", load).status, 200);
    let reply = post(&server, "/v1/unload_lora_adapter", json!({"lora_name": "c"}));
    assert!(reply.status == 400 && reply.body.contains("--default"), "{}", reply.body);
    assert_eq!(post(&server, "/chat", json!({"prompt": "x"})).status, 200);
}

/// A mix is made, changed and removed while the server runs, and `/v1/models` shows it.
#[test]
fn mixes_change_only_where_allowed() {
    let (server, _) = start(Setting::default());
    let mix = json!({"name": "both", "adapters": [{"name": "a", "strength": 0.5}]});
    assert_eq!(post(&server, "/v1/mixes", mix.clone()).status, 403);
    let (server, engine) = start(Setting { changes: true, ..Setting::default() });
    let asked = |model: &str| {
        let reply = post(&server, "/v1/chat/completions", with(question(), json!({"model": model})));
        assert_eq!(reply.status, 200, "{}", reply.body);
        let adapters = engine.seen.lock().unwrap().last().unwrap().adapters.clone();
        adapters.into_iter().map(|part| (part.name, part.strength)).collect::<Vec<_>>()
    };
    let reply = post(&server, "/v1/mixes", mix);
    assert_eq!(reply.json()["adapters"][0]["strength"], 0.5);
    assert!(!reply.head.contains("x-ignored-fields"), "both fields are used: {}", reply.head);
    assert_eq!(asked("both"), [("a".into(), 0.5)]);
    let load = json!({"lora_name": "c", "lora_path": "/x/c"});
    assert_eq!(post(&server, "/v1/load_lora_adapter", load).json()["digest"], "sha256:4");
    let parts = json!([{"name": "c", "strength": 0.25}, {"name": "b"}]);
    assert_eq!(post(&server, "/v1/mixes", json!({"name": "third", "adapters": parts})).status, 200);
    assert_eq!(asked("third"), [("c".into(), 0.25), ("b".into(), 1.0)]);
    let mix = json!({"name": "both", "adapters": [{"name": "a", "strength": 0.3}]});
    assert!(post(&server, "/v1/mixes", mix).body.contains("\"strength\":0.3,"), "as it was written");
    let entry = get(&server, "/v1/models/third").json();
    let part = &entry["adapters"][0];
    assert_eq!(
        (&part["name"], &part["strength"], &part["digest"], &part["source"]),
        (&json!("c"), &json!(0.25), &json!("sha256:4"), &json!("/x/c"))
    );
    assert_eq!(get(&server, "/v1/models/c").json()["adapters"][0]["strength"], 1.0);
    assert_eq!(get(&server, "/v1/models/base").json()["adapters"], json!([]));
    assert_eq!(get(&server, "/v1/mixes").json()["data"].as_array().unwrap().len(), 2);
    for (body, status, param) in [
        (json!({"adapters": []}), 400, "name"),
        (json!({"name": "x"}), 400, "adapters"),
        (json!({"name": "x", "adapters": []}), 400, "adapters"),
        (json!({"name": "x y", "adapters": [{"name": "a"}]}), 400, "name"),
        (json!({"name": "base", "adapters": [{"name": "a"}]}), 400, "name"),
        (json!({"name": "a", "adapters": [{"name": "b"}]}), 400, "name"),
        (json!({"name": "x", "adapters": [{"name": "z"}]}), 404, "adapters"),
        (json!({"name": "x", "adapters": [{"name": "a", "weight": 0.5}]}), 400, "adapters"),
        (json!({"name": "x", "adapters": [{"name": "a"}], "strength": 0.5}), 400, "strength"),
        (json!({"name": "x", "adapters": [{"name": "a", "strength": 99}]}), 400, "adapters.strength"),
    ] {
        let reply = post(&server, "/v1/mixes", body.clone());
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (status, &json!(param)), "{body}");
    }
    let delete = |name: &str| {
        let head = format!("DELETE /v1/mixes/{name} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        send(server.address(), head.as_bytes()).status
    };
    assert_eq!((delete("third"), delete("third"), delete("c")), (200, 404, 404));
    assert_eq!(post(&server, "/v1/unload_lora_adapter", json!({"lora_name": "c"})).status, 200);
}

#[test]
fn small_routes() {
    let (server, _) = start(Setting::default());
    let tokens = post(&server, "/tokenize", json!({"prompt": "one two", "add_special_tokens": false})).json();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    let text = post(&server, "/detokenize", json!({"tokens": tokens["tokens"]})).json();
    assert_eq!(text["prompt"], "one two");
    assert_eq!(post(&server, "/detokenize", json!({"tokens": [99_999_999]})).status, 400);
    assert_eq!(post(&server, "/tokenize", json!({"prompt": "x", "model": "none"})).status, 404);
    let reply = post(&server, "/tokenize", json!({"prompt": "x", "model": "both", "sparkle": 1}));
    assert!(reply.status == 200 && reply.head.contains("x-ignored-fields: sparkle"), "{}", reply.head);
    // A name in an address may be encoded.
    assert_eq!(get(&server, "/v1/models/%62oth").json()["id"], "both");
    for (name, status) in [("%62oth%", 404), ("%2", 404), ("%+62oth", 404), ("%ff", 404)] {
        assert_eq!(get(&server, &format!("/v1/models/{name}")).status, status, "{name}");
    }
    for (path, methods) in
        [("/v1/chat/completions", "POST"), ("/v1/mixes/x", "DELETE"), ("/tokenize", "POST")]
    {
        let reply = get(&server, path);
        assert_eq!(reply.status, 405, "{path}");
        assert!(reply.head.contains(&format!("allow: {methods}")), "{}", reply.head);
    }
    let info = get(&server, "/tokenizer_info").json();
    assert!(
        info["eos_token"].is_string() && info["chat_template"].as_str().unwrap().contains("messages"),
        "{info}"
    );
    assert!(get(&server, "/version").json()["version"].is_string());
    let page = get(&server, "/");
    assert!(
        page.head.contains("text/html") && !page.body.contains("http://") && !page.body.contains("https://")
    );
    post(&server, "/v1/chat/completions", question());
    let metrics = get(&server, "/metrics").body;
    for line in [
        "vllm:num_requests_waiting{engine=\"0\",model_name=\"base\"} 3",
        "vllm:request_success_total{engine=\"0\",model_name=\"base\",finished_reason=\"stop\"} 1",
        "vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"base\"} 1",
        "vllm:request_queue_time_seconds_count{engine=\"0\",model_name=\"base\"} 1",
        "vllm:request_prefill_time_seconds_count{engine=\"0\",model_name=\"base\"} 1",
        "vllm:request_decode_time_seconds_count{engine=\"0\",model_name=\"base\"} 1",
        "vllm:request_inference_time_seconds_count{engine=\"0\",model_name=\"base\"} 1",
        "vllm:request_params_max_tokens_sum{engine=\"0\",model_name=\"base\"} 100",
        "vllm:request_params_n_count{engine=\"0\",model_name=\"base\"} 1",
        "vllm:lora_requests_info{engine=\"0\",model_name=\"base\",max_lora=\"2\",waiting_lora_adapters=\"\",running_lora_adapters=\"\"} 1",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[test]
fn tls_by_files() {
    let folder = tempfile::tempdir().unwrap();
    let (chain, key) = (folder.path().join("chain.pem"), folder.path().join("key.pem"));
    let made = std::process::Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&chain)
        .output()
        .expect("openssl is there");
    assert!(made.status.success());
    let options = Options {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: Some((chain.clone(), key.clone())),
        ..Options::default()
    };
    let (server, _) = start(Setting { options: options.clone(), ..Setting::default() });
    let got = std::process::Command::new("curl")
        .args(["--silent", "--max-time", "20", "--noproxy", "*", "--cacert"])
        .arg(&chain)
        .arg(format!("https://127.0.0.1:{}/health", server.address().port()))
        .output()
        .expect("curl is there");
    assert_eq!(String::from_utf8_lossy(&got.stdout), "{\"status\":\"Healthy\"}");
    std::fs::write(&key, "nothing").unwrap();
    let fault = Server::start(&options).err().expect("refused");
    assert!(fault.message.contains("key.pem"), "{fault}");
}
