//! `hone serve`, the real program, on a tiny model with a trained adapter: asked over HTTP, ended by SIGTERM.

#[path = "support/fake_registry.rs"]
mod fake_registry;
#[path = "support/http.rs"]
mod http;
#[path = "support/random.rs"]
mod random;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama3").join(part)
}

/// The exit code of a fault of capacity.
const CAPACITY: i32 = 14;

struct Running {
    child: Child,
    address: String,
    /// Lines up to the one that says that it is ready.
    told: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a base, an adapter and a mix.
fn start(more: &[&str]) -> Running {
    let cache = tempfile::tempdir().unwrap();
    let adapter = format!("--adapter=tuned={}", golden("final_adapter").display());
    let more = [&[adapter.as_str(), "--mix=half=tuned:0.5"], more].concat();
    launch(cache.path(), "", &more).unwrap_or_else(|(_, text)| panic!("it ended: {text}"))
}

/// Starts the golden Llama with these arguments. Error: the exit code and the output, if it ends before it is ready.
fn launch(cache: &Path, hub: &str, more: &[&str]) -> Result<Running, (i32, String)> {
    let name = if more.iter().any(|argument| argument.starts_with("--name")) { "" } else { "--name=tiny" };
    let mut child = Command::new(env!("CARGO_BIN_EXE_hone"))
        .arg("serve")
        .arg(golden("model"))
        .args(["--listen", "127.0.0.1:0", "--device", "cpu"])
        .args(["--log", "json", "--set", "QuantizationConfig.load_in_4bit=false", "--cache"])
        .arg(cache)
        .args(Some(name).filter(|name| !name.is_empty()))
        .args(more)
        .env("HF_ENDPOINT", hub)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = String::new();
    let address = loop {
        let Some(line) = lines.next() else {
            return Err((child.wait().unwrap().code().unwrap_or(-1), seen));
        };
        let line = line.unwrap();
        seen += &line;
        seen.push('\n');
        if let Some((_, rest)) = line.split_once("ready: ")
            && let Some((_, rest)) = rest.split_once("http://")
        {
            break rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
        }
    };
    // Somebody must read on, or the program waits when the pipe is full.
    std::thread::spawn(move || lines.for_each(drop));
    Ok(Running { child, address, told: seen })
}

fn ask(running: &Running, path: &str, body: &Value) -> (u16, String) {
    let mut stream = TcpStream::connect(&running.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = body.to_string();
    let method = if body == "null" { "GET" } else { "POST" };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body) } else { body.to_owned() };
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body)
}

/// Returns the content of a body in chunks.
fn unchunked(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        text += &rest[..size];
        body = rest[size..].trim_start_matches("\r\n");
    }
    text
}

fn completion(running: &Running, more: Value) -> Value {
    let mut body = json!({"prompt": [5, 9, 17, 4], "max_tokens": 12, "temperature": 0, "ignore_eos": true,
        "logprobs": 1, "echo": true, "return_token_ids": true});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let (status, text) = ask(running, "/v1/completions", &body);
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn scores(answer: &Value) -> Vec<f64> {
    let list = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    list[1..].iter().map(|score| score.as_f64().unwrap()).collect()
}

#[test]
fn base_adapter_and_mix_answer_and_sigterm_ends_it() {
    let mut running = start(&[]);
    let (status, models) = ask(&running, "/v1/models", &Value::Null);
    assert_eq!(status, 200);
    let models: Value = serde_json::from_str(&models).unwrap();
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["tiny", "tuned", "half"]);

    let base = completion(&running, json!({"model": "tiny"}));
    let ids = base["choices"][0]["token_ids"].as_array().unwrap();
    assert_eq!((ids.len(), scores(&base).len()), (12, 3 + 12));
    // Greedy: each generated token is its position's most probable.
    let logprobs = &base["choices"][0]["logprobs"];
    for at in 4..16 {
        let top = logprobs["top_logprobs"][at].as_object().unwrap();
        let best = top.values().map(|score| score.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert_eq!(logprobs["token_logprobs"][at].as_f64().unwrap(), best);
    }
    let tuned = completion(&running, json!({"model": "tuned"}));
    let half = completion(&running, json!({"model": "half"}));
    let given = completion(&running, json!({"adapters": [{"name": "tuned", "strength": 0.5}]}));
    let none = completion(&running, json!({"adapters": [{"name": "tuned", "strength": 0}]}));
    assert_ne!(scores(&base), scores(&tuned));
    assert_ne!(scores(&half), scores(&tuned));
    assert_eq!(scores(&half), scores(&given));
    assert_eq!(scores(&none), scores(&base));

    let (status, metrics) = ask(&running, "/metrics", &Value::Null);
    assert_eq!(status, 200);
    assert!(
        metrics.contains("vllm:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 60"),
        "{metrics}"
    );

    let killed = Command::new("kill").arg(running.child.id().to_string()).status().unwrap();
    assert!(killed.success());
    let end = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = running.child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < end, "SIGTERM did not end it");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(0));
}

#[test]
fn what_cannot_be_served_is_refused_before_it_loads() {
    let refused = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_hone"))
            .arg("serve")
            .arg(golden("model"))
            .args(["--listen", "127.0.0.1:0", "--device", "cpu"])
            .args(arguments)
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (arguments, code, words) in [
        (&["--adapter", "nothing"][..], 2, "NAME=SOURCE"),
        (&["--mix", "m=a"][..], 2, "NAME=A:STRENGTH"),
        (&["--mix", "m=a:0.5"][..], 2, "there is no adapter"),
        (&["--adapter", "a=/none", "--mix", "m=a:0.5,a:0.2"][..], 2, "is listed twice"),
        (&["--adapter", "a=/none", "--adapter", "a=/none"][..], 2, "is used twice"),
        (&["--adapter", "a=/none"][..], 10, "no such folder"),
        (&["--context", "100000000"][..], 10, "the model was made for"),
        (&["--tls-chain", "x"][..], 2, "tls-key"),
        (&["--default", "x"][..], 2, "there is no model of this name"),
        (&["--name", ""][..], 2, "requests cannot name the base"),
        (&["--allowed-origins", "chat.example.com"][..], 2, "expected SCHEME://HOST[:PORT]"),
        (&["--api-key", ""][..], 2, "--api-key (HONE_API_KEY) is empty"),
        (&["--api-key", "schl\u{fc}ssel"][..], 2, "expected visible ASCII characters"),
        (&["--cache-type", "q8"][..], 2, "q8 is not supported"),
        (&["--set", "memory_max=1MiB"][..], CAPACITY, "serving needs at least"),
        (&["--cache-tokens", "100000000000"][..], CAPACITY, "would fit"),
        (&["--context", "256", "--cache-tokens", "64"][..], 10, "does not fit into it"),
        (&["--set", "ModelConfig.chat_template=none_such"][..], 10, "none_such"),
    ] {
        let (found, text) = refused(arguments);
        assert_eq!(found, code, "{arguments:?}: {text}");
        assert!(text.contains(words), "{arguments:?}: {text}");
    }
}

/// The command of a Workspace's pod: its `/chat` names no model and gets the Workspace's adapters at their strengths.
#[test]
fn a_pods_chat_answers_from_the_workspaces_mix() {
    let running = start(&[]);
    let asked = |more: Value| {
        let mut body =
            json!({"prompt": "hello", "generate_kwargs": {"do_sample": false, "max_new_tokens": 24}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, text) = ask(&running, "/chat", &body);
        assert_eq!(status, 200, "{text}");
        text
    };
    let (base, half) = (asked(json!({"model": "tiny"})), asked(json!({"model": "half"})));
    assert_ne!(base, half);
    assert_eq!(asked(json!({})), half);
    let (_, models) = ask(&running, "/v1/models", &Value::Null);
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(models["default"], "half");
    // A request that lists adapters adds them to the base.
    let listed = completion(&running, json!({"adapters": [{"name": "tuned", "strength": 0.5}]}));
    assert_eq!(scores(&listed), scores(&completion(&running, json!({}))));
    let other = start(&["--default=tiny", "--mix=none=tuned:0"]);
    assert!(other.told.contains("--mix none: every strength is 0"), "{}", other.told);
    assert_eq!(scores(&completion(&other, json!({}))), scores(&completion(&other, json!({"model": "tiny"}))));
}

/// Writes the golden adapter's files, with another base's name in its configuration.
fn adapter_of(base: &str, folder: &Path) {
    let config = std::fs::read(golden("final_adapter/adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["base_model_name_or_path"] = base.into();
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    std::fs::copy(
        golden("final_adapter/adapter_model.safetensors"),
        folder.join("adapter_model.safetensors"),
    )
    .unwrap();
}

fn push(folder: &Path, image: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_hone"))
        .arg("push")
        .arg(folder)
        .args([image, "--plain-http"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn models(running: &Running) -> Value {
    serde_json::from_str(&ask(running, "/v1/models", &Value::Null).1).unwrap()
}

#[test]
fn an_images_adapter_is_kept_by_content_and_verified_at_each_start() {
    let work = tempfile::tempdir().unwrap();
    let fake = fake_registry::Fake::start(fake_registry::Manners::default());
    adapter_of("org/tiny", &work.path().join("adapter"));
    push(&work.path().join("adapter"), &format!("{}/team/a:v1", fake.host));
    let cache = work.path().join("cache");
    let source = format!("oci://{}/team/a:v1", fake.host);
    let adapter = format!("--adapter=a={source}");
    let serve = || launch(&cache, "", &[&adapter, "--plain-http", "--name=org/tiny"]).map_err(|e| e.1);
    let blobs =
        || fake.log().iter().filter(|line| line.starts_with("GET") && line.contains("/blobs/")).count();

    let first = serve().unwrap();
    let digest = models(&first)["data"][1]["adapters"][0]["digest"].as_str().unwrap().to_owned();
    assert!(digest.starts_with("sha256:") && digest.len() == 71, "{digest}");
    assert_eq!(models(&first)["data"][1]["adapters"][0]["source"], source);
    drop(first);
    let fetched = blobs();
    let homes: Vec<_> = std::fs::read_dir(cache.join("adapters")).unwrap().collect();
    assert_eq!((homes.len(), fetched), (1, 1));

    let second = serve().unwrap();
    assert_eq!(
        (models(&second)["data"][1]["adapters"][0]["digest"].as_str().unwrap(), blobs()),
        (&*digest, 1)
    );
    drop(second);
    // A file that changed is reported and fetched again.
    let weights = homes[0].as_ref().unwrap().path().join("adapter/adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let third = serve().unwrap();
    assert!(third.told.contains("it is not what was fetched"), "{}", third.told);
    assert_eq!(blobs(), 2);
    drop(third);
    // A tag that moved leads to the new image.
    adapter_of("tiny", &work.path().join("other"));
    push(&work.path().join("other"), &format!("{}/team/a:v1", fake.host));
    let fourth = serve().unwrap();
    assert_ne!(models(&fourth)["data"][1]["adapters"][0]["digest"].as_str().unwrap(), digest);
    drop(fourth);
    // Without the registry, the server uses the copy of the last start and reports that.
    let moved = std::fs::read_dir(cache.join("adapters")).unwrap();
    for home in moved {
        let record = home.unwrap().path().join(".hone-adapter.json");
        let text = std::fs::read_to_string(&record).unwrap();
        std::fs::write(&record, text.replace(&fake.host, "127.0.0.1:1")).unwrap();
    }
    let adapter = "--adapter=a=oci://127.0.0.1:1/team/a:v1";
    let fifth = launch(&cache, "", &[adapter, "--plain-http"]).map_err(|(_, text)| text).unwrap();
    assert!(fifth.told.contains("is used"), "{}", fifth.told);
}

#[test]
fn an_image_of_another_base_is_refused_with_both_names() {
    let work = tempfile::tempdir().unwrap();
    let layout = format!("oci:{}", work.path().join("layout").display());
    adapter_of("org/other-7b", &work.path().join("adapter"));
    push(&work.path().join("adapter"), &layout);
    let cache = work.path().join("cache");
    let adapter = format!("--adapter=a={layout}");
    let (code, told) = launch(&cache, "", &[&adapter, "--name=org/tiny"]).err().expect("refused");
    assert_eq!(code, 10, "{told}");
    assert!(told.contains("org/other-7b") && told.contains("org/tiny"), "{told}");
    // A folder's configuration may name a copy of the base: it is told.
    let folder = format!("--adapter=a={}", work.path().join("adapter").display());
    let running = launch(&cache, "", &[&folder, "--name=org/tiny"]).map_err(|(_, text)| text).unwrap();
    assert!(
        running.told.contains("names org/other-7b as its base, and the served base is"),
        "{}",
        running.told
    );
    // A folder's name says too little to refuse: it is told.
    let running = launch(&cache, "", &[&adapter, "--name=tiny"]).map_err(|(_, text)| text).unwrap();
    assert!(running.told.contains("cannot tell from these names"), "{}", running.told);
}

#[test]
fn adapters_come_and_go_at_run_time_from_images_and_folders() {
    let work = tempfile::tempdir().unwrap();
    let fake = fake_registry::Fake::start(fake_registry::Manners::default());
    for (name, base) in [("good", "org/tiny"), ("bad", "org/other-7b")] {
        let folder = work.path().join("root").join(name);
        adapter_of(base, &folder);
        push(&folder, &format!("{}/team/a:{name}", fake.host));
    }
    let root = work.path().join("root").display().to_string();
    let elsewhere = work.path().join("none").display().to_string();
    let (code, told) =
        launch(&work.path().join("cache"), "", &["--allow-adapter-changes", &elsewhere]).err().unwrap();
    assert!(code == 10 && told.contains(&format!("there is no folder {elsewhere}")), "{code}: {told}");
    let arguments = ["--allow-adapter-changes", &root, "--plain-http", "--name=org/tiny"];
    let running = launch(&work.path().join("cache"), "", &arguments).map_err(|e| e.1).unwrap();
    let load = |name: &str, path: String| {
        ask(&running, "/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path}))
    };
    let (status, text) = load("a", format!("oci://{}/team/a:good", fake.host));
    assert_eq!(status, 200, "{text}");
    let digest = serde_json::from_str::<Value>(&text).unwrap()["digest"].clone();
    assert_eq!(models(&running)["data"][1]["adapters"][0]["digest"], digest);
    let (status, text) = load("b", format!("oci://{}/team/a:bad", fake.host));
    assert_eq!(status, 400);
    assert!(text.contains("org/other-7b") && text.contains("org/tiny"), "{text}");
    assert_eq!(load("b", "good".into()).0, 200);
    assert_eq!(load("c", "../root/good/../../x".into()).0, 400);
    assert_eq!(load("c", format!("oci:{}", work.path().display())).0, 400);
    let mix = json!({"name": "both", "adapters": [{"name": "a", "strength": 0.25}, {"name": "b", "strength": 0.25}]});
    assert_eq!(ask(&running, "/v1/mixes", &mix).0, 200);
    let halves = scores(&completion(&running, json!({"model": "both"})));
    let half = scores(&completion(&running, json!({"adapters": [{"name": "a", "strength": 0.5}]})));
    let far = halves.iter().zip(&half).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(far < 1e-4, "twice the same adapter at a quarter is the half of it: {far}");
    assert_eq!(ask(&running, "/v1/unload_lora_adapter", &json!({"lora_name": "a"})).0, 400);
}

#[test]
fn an_adapter_of_the_hub_is_served_and_fetched_once() {
    let files: Vec<(String, Vec<u8>)> = ["adapter_config.json", "adapter_model.safetensors"]
        .map(|name| (name.to_owned(), std::fs::read(golden("final_adapter").join(name)).unwrap()))
        .into();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let hub = http::Server::start(move |_, request| {
        let path = request.target.split('?').next().unwrap();
        if path.starts_with("/api/models/org/lora/revision/") {
            let all = files.iter().map(|(name, bytes)| json!({"rfilename": name, "size": bytes.len()}));
            let mut siblings: Vec<Value> = all.collect();
            siblings.push(json!({"rfilename": "README.md", "size": 3}));
            return http::Reply::ok(
                json!({"id": "org/lora", "sha": commit, "siblings": siblings}).to_string(),
            );
        }
        let name = path.strip_prefix(&format!("/org/lora/resolve/{commit}/"));
        match name.and_then(|name| files.iter().find(|(other, _)| other == name)) {
            Some((_, bytes)) => http::Reply::ok(bytes.clone()),
            None => http::Reply::status(404),
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let endpoint = hub.url("");
    let files = || hub.requests().iter().filter(|request| request.target.contains("/resolve/")).count();
    for adapter in ["--adapter=a=hf://org/lora", "--adapter=a=org/lora"] {
        let running = launch(cache.path(), &endpoint, &[adapter]).map_err(|(_, text)| text).unwrap();
        let entry = models(&running)["data"][1]["adapters"][0].clone();
        assert_eq!(entry["source"], "hf://org/lora@main");
        assert_eq!(files(), 2, "fetched once");
    }
}

/// `hone plan --serve`: the sizes that fit on a card that is not here, as a table and as JSON; a refusal with numbers
/// if nothing fits.
#[test]
fn the_memory_of_a_server_is_planned_ahead() {
    let plan = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_hone")).arg("plan").args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let folder = golden("model").display().to_string();
    let (code, text, told) = plan(&["--serve", &folder, "--device", "cpu"]);
    assert_eq!(code, 0, "{told}");
    assert!(text.contains("keys and values of") && text.contains("usable on this CPU"), "{text}");
    let card = ["--serve", "preset:falcon-7b", "--gpu", "l4", "--format", "json"];
    let (code, text, told) = plan(&card);
    assert_eq!(code, 0, "{told}");
    let small: Value = serde_json::from_str(&text).unwrap();
    let number = |json: &Value, name: &str| json[name].as_u64().unwrap();
    assert_eq!((&small["machine"], number(&small, "context")), (&json!("l4"), 2048));
    // 32 layers, one key head of 64: two of 2 bytes each.
    assert_eq!(number(&small, "token_bytes"), 32 * 2 * 64 * 2);
    assert!(number(&small, "bytes") <= number(&small, "memory"));
    assert_eq!(number(&small, "cache_tokens"), 16 * 2048);
    let adapter = golden("final_adapter").display().to_string();
    let more =
        [&card[..], &["--cache-type", "f32", "--sequences", "4", "--serve-adapter", &adapter]].concat();
    let other: Value = serde_json::from_str(&plan(&more).1).unwrap();
    assert_eq!(number(&other, "token_bytes"), 2 * number(&small, "token_bytes"));
    assert_eq!(number(&other, "cache_tokens"), 4 * 2048);
    let eight: Value =
        serde_json::from_str(&plan(&[&card[..], &["--cache-type", "fp8"]].concat()).1).unwrap();
    assert_eq!(2 * number(&eight, "token_bytes"), number(&small, "token_bytes"));
    assert_eq!(eight["cache_type"], "fp8");
    assert!(number(&other["terms"], "adapters") > 0);
    let (code, text, _) = plan(&["--serve", "preset:falcon-7b", "--gpu", "l4,h100", "--format", "json"]);
    assert_eq!((code, serde_json::from_str::<Value>(&text).unwrap().as_array().unwrap().len()), (0, 2));
    // Cards are compared: one that is too small hides no other.
    let both = ["--serve", "preset:llama-3.3-70b-instruct", "--gpu", "l4,h100"];
    let (code, text, told) = plan(&both);
    assert_eq!(code, 0, "{told}");
    assert!(text.contains("l4 does not fit: serving needs") && text.contains("usable on h100"), "{text}");
    let list: Value = serde_json::from_str(&plan(&[&both[..], &["--format", "json"]].concat()).1).unwrap();
    assert_eq!((&list[0]["machine"], &list[1]["machine"]), (&json!("l4"), &json!("h100")));
    assert!(list[0]["does_not_fit"].as_str().unwrap().contains("serving needs"), "{list}");
    for (arguments, code, words) in [
        (&["--serve", "preset:falcon-40b", "--gpu", "t4"][..], CAPACITY, "bf16"),
        (&["--serve", "preset:falcon-40b", "--gpu", "l4"][..], CAPACITY, "would do"),
        (
            &["--serve", "preset:falcon-7b", "--gpu", "l4", "--set", "memory_max=1GiB"][..],
            CAPACITY,
            "raise memory_max",
        ),
        // A card that does not do is not the advice: it has 40 GiB, of which 38 may be used.
        (&["--serve", "preset:llama-3.3-70b-instruct", "--gpu", "a100-40"][..], CAPACITY, "l40s would do"),
        (&["--serve", "preset:llama-3.3-70b-instruct", "--gpu", "l4,a10"][..], CAPACITY, "can be used on l4"),
        (&["--serve", "hf://org/none", "--gpu", "l4"][..], 10, "a plan fetches nothing"),
        (&["--serve", "preset:falcon-7b", "--gpu", "l4", "--context", "4096"][..], 10, "made for 2048"),
    ] {
        let (found, _, told) = plan(arguments);
        assert_eq!(found, code, "{arguments:?}: {told}");
        assert!(told.contains(words), "{arguments:?}: {told}");
    }
}
