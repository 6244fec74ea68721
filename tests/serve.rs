//! `hone serve`, the real program, on a tiny model with a trained adapter: asked over HTTP, ended by SIGTERM.

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

fn start(more: &[&str]) -> Running {
    let cache = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hone"))
        .arg("serve")
        .arg(golden("model"))
        .arg("--adapter")
        .arg(format!("tuned={}", golden("final_adapter").display()))
        .args(["--mix", "half=tuned:0.5", "--name", "tiny", "--listen", "127.0.0.1:0", "--device", "cpu"])
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

/// The content of a body in chunks.
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

    let base = completion(&running, json!({}));
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
    let end = Instant::now() + Duration::from_secs(20);
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
        (&["--adapter", "a=/none", "--adapter", "a=/none"][..], 2, "stands for two things"),
        (&["--adapter", "a=/none"][..], 10, "no such folder"),
        (&["--context", "100000000"][..], 10, "the model was made for"),
        (&["--tls-chain", "x"][..], 2, "tls-key"),
    ] {
        let (found, text) = refused(arguments);
        assert_eq!(found, code, "{arguments:?}: {text}");
        assert!(text.contains(words), "{arguments:?}: {text}");
    }
}
