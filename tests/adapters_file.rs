//! `hone serve --adapters-file`, the real program: adapters and strengths change while it runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama3").join(part)
}

struct Running {
    child: Child,
    address: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(more: &[&str]) -> Running {
    let cache = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hone"))
        .arg("serve")
        .arg(golden("model"))
        .args(["--name", "tiny", "--listen", "127.0.0.1:0", "--device", "cpu"])
        .args(["--log", "json", "--set", "QuantizationConfig.load_in_4bit=false", "--cache"])
        .arg(cache.path())
        .args(more)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = String::new();
    let address = loop {
        let line = lines.next().unwrap_or_else(|| panic!("it ended: {seen}")).unwrap();
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
    Running { child, address }
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

/// Returns the answer of `/v1/models` once the server has read this text of its file: ids, the default, and why the
/// file is refused.
fn looked_at(running: &Running, text: &str) -> (Vec<String>, String, Option<String>) {
    let digest = hone::serving::live::file_digest(text);
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        let (status, models) = ask(running, "/v1/models", &Value::Null);
        assert_eq!(status, 200, "{models}");
        let models: Value = serde_json::from_str(&models).unwrap();
        if models["adapters_file"]["digest"] == *digest {
            let ids = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap().to_owned());
            let refused = models["adapters_file"]["refused"].as_str().map(str::to_owned);
            return (ids.collect(), models["default"].as_str().unwrap().to_owned(), refused);
        }
        assert!(Instant::now() < end, "the file is not looked at: {models}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The status address shows the served adapters without the key that all other addresses need, and nothing more.
#[test]
fn the_status_address_asks_for_no_key() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let source = format!("tuned={}", golden("final_adapter").display());
    let mut running = launch(&[
        "--api-key",
        "secret\n",
        "--status",
        &free,
        "--adapter",
        &source,
        "--mix",
        "chat=tuned:0.5",
    ]);
    let (status, body) = ask(&running, "/v1/models", &Value::Null);
    assert_eq!(status, 401, "{body}");
    // A Secret's line break is no part of the key.
    let mut stream = TcpStream::connect(&running.address).unwrap();
    let head =
        "GET /v1/models HTTP/1.1\r\nhost: h\r\nauthorization: Bearer secret\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    running.address = free;
    let (status, body) = ask(&running, "/v1/models", &Value::Null);
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &models["default"]), (200, &json!("chat")));
    let part = &models["data"][2]["adapters"][0];
    assert_eq!((&part["name"], &part["strength"]), (&json!("tuned"), &json!(0.5)), "{models}");
    assert!(part["digest"].as_str().unwrap().starts_with("sha256:"), "{models}");
    for (path, body, code) in [("/chat", json!({"prompt": "a"}), 405), ("/metrics", Value::Null, 404)] {
        assert_eq!(ask(&running, path, &body).0, code, "{path}");
    }
}

/// Replaces a file at once, as a mounted ConfigMap is.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, file).unwrap();
}

/// Adapters and strengths change while the server runs; a change is taken whole or not at all.
#[test]
fn a_file_of_adapters_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapters.json");
    let write = |text: &str| replace(&file, text);
    let source = golden("final_adapter").display().to_string();
    let with = |strength: f64| {
        json!({
            "adapters": [{"name": "tuned", "source": source}],
            "mixes": [{"name": "chat", "adapters": [{"name": "tuned", "strength": strength}]}],
        })
        .to_string()
    };
    let empty = json!({"adapters": [], "mixes": []}).to_string();
    write(&empty);
    let running = launch(&["--adapters-file", file.to_str().unwrap()]);
    assert_eq!(looked_at(&running, &empty), (vec!["tiny".to_owned()], "tiny".into(), None));
    let base = scores(&completion(&running, json!({})));

    write(&with(1.0));
    let both = vec!["tiny".to_owned(), "tuned".into(), "chat".into()];
    assert_eq!(looked_at(&running, &with(1.0)), (both.clone(), "chat".into(), None));
    // A request that names no model gets the mix.
    let tuned = scores(&completion(&running, json!({})));
    assert_ne!(tuned, base);
    assert_eq!(tuned, scores(&completion(&running, json!({"model": "tuned"}))));
    assert_eq!(base, scores(&completion(&running, json!({"model": "tiny"}))));

    write(&with(0.5));
    looked_at(&running, &with(0.5));
    let half = scores(&completion(&running, json!({})));
    let given = json!({"model": "tiny", "adapters": [{"name": "tuned", "strength": 0.5}]});
    assert_eq!(half, scores(&completion(&running, given)));
    assert_ne!(half, tuned);

    // An adapter that cannot be had or does not fit is refused, and so is a file that contradicts itself; everything
    // stays.
    let other = golden("../qwen3/final_adapter").canonicalize().unwrap();
    let refused = [
        (json!({"adapters": [{"name": "gone", "source": "/nowhere"}]}), "/nowhere"),
        (json!({"adapters": [{"name": "tuned", "source": other}]}), "qwen3"),
        (json!({"adapters": [{"name": "tiny", "source": source}]}), "is used twice"),
        (
            json!({"mixes": [{"name": "a", "adapters": [{"name": "b", "strength": 1.0}]}]}),
            "there is no adapter",
        ),
        (json!({"adapter": []}), "unknown field"),
        (
            json!({"adapters": [{"name": "x", "source": source}], "mixes": [{"name": "m", "adapters": []}]}),
            "no adapters",
        ),
        (
            json!({"adapters": [{"name": "x", "source": source}], "mixes": [{"name": "m", "adapters": [
                {"name": "x", "strength": 1.0}, {"name": "x", "strength": 0.5}]}]}),
            "is listed twice",
        ),
    ];
    for (wanted, part) in refused {
        let text = wanted.to_string();
        write(&text);
        let (ids, default, why) = looked_at(&running, &text);
        assert!(why.as_ref().is_some_and(|why| why.contains(part)), "{part}: {why:?}");
        assert_eq!((ids, default.as_str()), (both.clone(), "chat"));
        assert_eq!(half, scores(&completion(&running, json!({}))));
    }

    write(&empty);
    assert_eq!(looked_at(&running, &empty), (vec!["tiny".to_owned()], "tiny".into(), None));
    assert_eq!(base, scores(&completion(&running, json!({}))));

    // An image or a Secret that comes later is found without another change of the file.
    let later = folder.path().join("later");
    let text = json!({"adapters": [{"name": "late", "source": later}]}).to_string();
    write(&text);
    assert!(looked_at(&running, &text).2.is_some());
    std::fs::create_dir(&later).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(golden("final_adapter").join(file), later.join(file)).unwrap();
    }
    let end = Instant::now() + Duration::from_secs(90);
    while looked_at(&running, &text).2.is_some() {
        assert!(Instant::now() < end, "it is not tried again");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(looked_at(&running, &text).0.contains(&"late".to_owned()));
}

/// The file neither takes a name that a flag gave, nor removes the one that `--default` names.
#[test]
fn a_file_of_adapters_leaves_flags_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapters.json");
    let write = |text: &str| replace(&file, text);
    let source = golden("final_adapter").display().to_string();
    let chat = json!([{"name": "chat", "adapters": [{"name": "fixed", "strength": 0.5}]}]);
    let first = json!({"mixes": chat}).to_string();
    write(&first);
    let fixed = format!("fixed={source}");
    let flags = ["--adapters-file", file.to_str().unwrap(), "--adapter", &fixed, "--mix", "whole=fixed:1"];
    let running = launch(&[&flags[..], &["--default", "chat"]].concat());
    let ids: Vec<String> = ["tiny", "fixed", "whole", "chat"].map(String::from).to_vec();
    assert_eq!(looked_at(&running, &first), (ids.clone(), "chat".into(), None));
    let half = scores(&completion(&running, json!({})));
    assert_eq!(half, scores(&completion(&running, json!({"model": "chat"}))));
    let part = json!([{"name": "fixed", "strength": 0.5}]);
    for (wanted, part) in [
        (json!({"adapters": [{"name": "fixed", "source": source}], "mixes": chat}), "is used twice"),
        (json!({"mixes": [{"name": "whole", "adapters": part}, chat[0]]}), "is used twice"),
        (json!({}), "--default"),
        (
            json!({"mixes": [{"name": "chat", "adapters": [{"name": "whole", "strength": 1.0}]}]}),
            "no adapter",
        ),
    ] {
        let text = wanted.to_string();
        write(&text);
        let (now, default, why) = looked_at(&running, &text);
        assert!(why.as_ref().is_some_and(|why| why.contains(part)), "{part}: {why:?}");
        assert_eq!((now, default.as_str()), (ids.clone(), "chat"));
        assert_eq!(half, scores(&completion(&running, json!({}))));
    }
}
