//! The inputs of a job besides its rows, mutated by a seeded generator: configurations, models, templates, tokenizers,
//! images, registries, checkpoints, adapters, and requests to a server. For every input, the answer is a result or a
//! fault of the right kind, in bounded time and memory, without a panic.
//!
//! It is a part of `tests/fuzz.rs`, with the same settings.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::mutate::{change, each_case, keep, mutated, strange};
use crate::random::Random;
use candle_core::{Device, Tensor};
use hone::dataset::{Chat, Tokenizer};
use hone::facts::config::Config;
use hone::facts::{LoraOptions, family, quantization, sites};
use hone::fault::{Fault, Kind, Result};
use hone::generate::defaults::Defaults;
use hone::generate::{self, Answer, Counters, Engine, Event, Finish, Refusal, Usage};
use hone::model::load;
use hone::model::weights::Checkpoint;
use hone::ops::adamw;
use hone::registry::{self, ImageFacts, Target};
use hone::report::Report;
use hone::server::model::Named;
use hone::server::{self, Model, Server};
use hone::spec::{self, Origin, Request, Setting, Written};
use hone::train::Checkpoints;
use hone::train::checkpoint::{self, State};
use hone::train::moments::Moments;
use hone::{adapter, plan};
use serde_json::{Value, json};

/// LIMIT: the longest case; the limits of readers are in seconds.
const CASE_MAX: Duration = Duration::from_secs(20);

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

/// Returns the result of a case; `None`: it was refused. Panics, slow cases, endless messages and faults of another
/// kind are failures.
fn judge<T>(seed: u64, content: &[u8], kinds: &[Kind], case: impl FnOnce() -> Result<T>) -> Option<T> {
    let began = Instant::now();
    let ended = catch_unwind(AssertUnwindSafe(case));
    let failed = match &ended {
        Err(_) => Some("panic".to_owned()),
        Ok(Err(fault)) if !kinds.contains(&fault.kind) => Some(format!("{:?}: {fault}", fault.kind)),
        Ok(Err(fault)) if fault.message.len() > 20_000 => Some("a message without end".into()),
        Ok(_) if began.elapsed() > CASE_MAX => Some(format!("it took {:?}", began.elapsed())),
        Ok(_) => None,
    };
    match failed {
        Some(what) => panic!("seed {seed}: {what}; kept in {}", keep(seed, "case", content).display()),
        None => ended.ok()?.ok(),
    }
}

/// Returns a value with one to four changes.
fn twisted(random: &mut Random, names: &[&str], value: &Value) -> Value {
    let mut value = value.clone();
    for _ in 0..1 + random.below(4) {
        change(random, names, &mut value);
    }
    value
}

/// Returns a JSON file, changed by its meaning or by its bytes.
fn changed_json(random: &mut Random, names: &[&str], value: &Value) -> Vec<u8> {
    match random.below(4) {
        0 => mutated(random, value.to_string().as_bytes(), &[("a".into(), b"[[[[{\"a\":".to_vec())]),
        _ => twisted(random, names, value).to_string().into_bytes(),
    }
}

// ---- configurations ----

#[test]
fn no_configuration_breaks_its_reader() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut texts: Vec<(String, Vec<u8>)> = ["training_config/lora.yaml", "training_config/qlora.yaml"]
        .map(|name| (name.to_owned(), std::fs::read(folder.join(name)).unwrap()))
        .into();
    let spec = "model: hf://org/tiny@main\ndata: [{url: 'https://h/a.parquet', weight: 2, limit: 5}, b.jsonl]\n\
                push: registry.example.com/a/b:v1\ntraining_config: &a\n  LoraConfig: {r: 8, target_modules: [q_proj]}\n\
                \x20 TrainingArguments: {max_steps: 3, learning_rate: 1e-4, lr_scheduler_kwargs: {a: 1}}\n";
    texts.push(("spec.yaml".into(), spec.into()));
    let pieces: [&[u8]; 16] = [
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!binary ",
        b"? ",
        b"|\n  ",
        b">-\n",
        b"- ",
        b": ",
        b"{",
        b"[",
        b"'",
        b"\"",
        b"\t",
        b"1e999",
        b"0x7fffffffffffffffff",
    ];
    each_case(400, |seed| {
        let mut random = Random(seed);
        let (name, text) = random.pick(&texts).clone();
        let mut text = mutated(&mut random, &text, &texts);
        for _ in 0..random.below(3) {
            let (at, piece) = (random.below(text.len()), *random.pick(&pieces));
            text.splice(at..at, piece.iter().copied());
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.yaml");
        std::fs::write(&file, &text).unwrap();
        let (spec, config) = if name == "spec.yaml" { (Some(file), None) } else { (None, Some(file)) };
        let request = Request { remembered: Vec::new(), spec, config, settings: Vec::new() };
        let gathered = judge(seed, &text, &[Kind::Config], || spec::gather(&request, &|_| None));
        if let Some(gathered) = gathered {
            judge(seed, &text, &[Kind::Config, Kind::Model, Kind::Data], || plan::make(&gathered));
        }
    });
}

#[test]
fn no_value_of_a_key_breaks_its_reader() {
    let keys = [
        "TrainingArguments.learning_rate",
        "TrainingArguments.max_steps",
        "TrainingArguments.warmup_steps",
        "TrainingArguments.lr_scheduler_kwargs",
        "TrainingArguments.optim_args",
        "LoraConfig.target_modules",
        "LoraConfig.rank_pattern",
        "LoraConfig.layers_to_transform",
        "DatasetConfig.train_test_split",
        "data",
        "push",
        "model",
        "memory_max",
        "spike_window",
        "mlflow",
    ];
    each_case(600, |seed| {
        let mut random = Random(seed);
        let written = match random.below(3) {
            0 => strange(&mut random).to_string(),
            1 => String::from_utf8_lossy(&mutated(&mut random, b"https://user:pw@host:1/a?b=c#d=e", &[]))
                .into(),
            _ => {
                String::from_utf8_lossy(&mutated(&mut random, b"[1e-4, {a: -0x1f, b: .inf}, ~]", &[])).into()
            }
        };
        let content = written.clone().into_bytes();
        let key = random.pick(&keys).to_string();
        let setting = Setting { key, written: Written::Yaml(written), origin: Origin::Default };
        let request = Request { remembered: Vec::new(), spec: None, config: None, settings: vec![setting] };
        let gathered = judge(seed, &content, &[Kind::Config], || spec::gather(&request, &|_| None));
        if let Some(gathered) = gathered {
            judge(seed, &content, &[Kind::Config, Kind::Model, Kind::Data], || plan::make(&gathered));
        }
    });
}

// ---- models ----

/// Returns names of keys of all config.json files, and their values.
fn configs() -> Vec<Value> {
    let mut configs = Vec::new();
    for entry in std::fs::read_dir(golden("")).unwrap().flatten() {
        if let Ok(text) = std::fs::read(entry.path().join("model/config.json")) {
            configs.push(serde_json::from_slice(&text).unwrap());
        }
    }
    assert!(configs.len() > 20, "{}", configs.len());
    configs
}

#[test]
fn no_config_of_a_model_breaks_its_reader() {
    let configs = configs();
    let names: Vec<String> =
        configs.iter().flat_map(|config| config.as_object().unwrap().keys().cloned()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    each_case(600, |seed| {
        let mut random = Random(seed);
        let content = changed_json(&mut random, &names, random_of(&configs, seed));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), &content).unwrap();
        judge(seed, &content, &[Kind::Model], || {
            let config = Config::read(folder.path())?;
            let facts = family::describe(&config)?;
            quantization::read(&config)?;
            assert!(facts.parameters() > 0 && !facts.tensors().is_empty());
            match sites::sites(&facts, &LoraOptions::default()) {
                Err(fault) if fault.kind == Kind::Config => Ok(()),
                other => other.map(drop),
            }
        });
    });
}

fn random_of<T>(list: &[T], seed: u64) -> &T {
    &list[(seed % list.len() as u64) as usize]
}

/// Returns a folder with the files of a golden model, of which one was changed.
fn model_with(name: &str, file: &str, content: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name).join("model")).unwrap().flatten() {
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    std::fs::write(folder.path().join(file), content).unwrap();
    folder
}

#[test]
fn no_weights_break_their_reader() {
    let model = golden("llama3/model");
    let facts = family::describe(&Config::read(&model).unwrap()).unwrap();
    let whole = std::fs::read(model.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&whole[8..8 + length]).unwrap();
    let map: Value =
        header.as_object().unwrap().keys().map(|name| (name.clone(), json!("a.safetensors"))).collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    let names = ["dtype", "shape", "data_offsets", "__metadata__", "lm_head.weight", "weight_map"];
    each_case(150, |seed| {
        let mut random = Random(seed);
        let (file, content) = match random.below(4) {
            0 => ("model.safetensors", mutated(&mut random, &whole, &[("a".into(), whole[..2000].to_vec())])),
            1 => ("model.safetensors.index.json", changed_json(&mut random, &names, &index)),
            _ => {
                let header = changed_json(&mut random, &names, &header);
                let length = (header.len() as u64).to_le_bytes();
                ("model.safetensors", [&length[..], &header, &whole[8 + length.len()..]].concat())
            }
        };
        let folder = model_with("llama3", file, &content);
        if file.ends_with("index.json") {
            let folder = folder.path();
            std::fs::rename(folder.join("model.safetensors"), folder.join("a.safetensors")).unwrap();
        }
        judge(seed, &content, &[Kind::Model], || {
            let checkpoint = Checkpoint::open(folder.path())?;
            load::fits(&facts, &checkpoint)?;
            facts.tensors().iter().try_for_each(|stored| {
                checkpoint.get(&stored.name, &stored.shape).map(|values| drop(values.to_f32()))
            })
        });
    });
}

#[test]
fn no_tokenizer_breaks_its_reader() {
    let files =
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"];
    let names = [
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
        "vocab",
        "merges",
        "added_tokens",
        "type",
        "content",
        "pattern",
        "id",
        "special",
        "eos_token",
        "chat_template",
        "normalizers",
        "behavior",
        "Regex",
        "prepend_scheme",
        "replacement",
        "unk_token",
        "byte_fallback",
    ];
    let model = |random: &mut Random| *random.pick(&["llama3", "phi3", "gemma2", "qwen2", "mistral"]);
    each_case(150, |seed| {
        let mut random = Random(seed);
        let name = model(&mut random);
        let file = if random.below(2) == 0 { files[0] } else { *random.pick(&files) };
        let Ok(text) = std::fs::read(golden(name).join("model").join(file)) else { return };
        let value: Value = serde_json::from_slice(&text).unwrap();
        let content = changed_json(&mut random, &names, &value);
        let folder = model_with(name, file, &content);
        judge(seed, &content, &[Kind::Model, Kind::Data], || {
            let tokenizer = Tokenizer::open(folder.path())?;
            let ids = tokenizer.encode("Grüße, 日本: 12 + 3 = <|eot_id|>\n\n", true);
            if let Ok(ids) = ids {
                tokenizer.text(&ids);
            }
            Defaults::read(folder.path(), &tokenizer, None).map(drop)
        });
    });
}

// ---- templates ----

#[test]
fn no_template_breaks_its_reader() {
    let tokenizer = Tokenizer::open(&golden("llama3/model")).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates.json");
    let fixture: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    let templates: Vec<(String, Vec<u8>)> = fixture["templates"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, text)| (name.clone(), text.as_str().unwrap().as_bytes().to_vec()))
        .collect();
    let pieces = [
        "{%- for m in messages -%}",
        "{% endfor %}",
        "{{ m.content | replace('a', 'b' * 99) }}",
        "{% macro f(x) %}{{ f(x) }}",
        "{% endmacro %}",
        "{{ messages | tojson(indent=9) }}",
        "{{ 'x' * 10000 }}",
        "{% set ns = namespace(a=[]) %}",
        "{{ messages[::-1] }}",
        "{{ range(99999) | list }}",
        "{{ strftime_now('%Y' * 50) }}",
        "{% include 'a' %}",
        "{{ raise_exception('no') }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{ ((((((((1))))))))",
        "| upper",
        " ~ ",
        "{{ m['content'].split('a').join('b') }}",
        "{% if not not not m %}{% endif %}",
        "{{ '%9999999d' | format(1) }}",
    ];
    each_case(300, |seed| {
        let mut random = Random(seed);
        let (_, text) = random.pick(&templates).clone();
        let mut text = mutated(&mut random, &text, &templates);
        for _ in 0..random.below(4) {
            let (at, piece) = (random.below(text.len()), *random.pick(&pieces));
            text.splice(at..at, piece.bytes());
        }
        let Ok(source) = String::from_utf8(text.clone()) else { return };
        judge(seed, &text, &[Kind::Model, Kind::Data, Kind::Config], || {
            let Some(chat) = Chat::of(&tokenizer, Some(&format!("{{#a#}}{source}")))? else { return Ok(()) };
            let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "a b"},
                {"role": "assistant", "content": null, "tool_calls": []}]);
            let context = json!({"messages": messages, "add_generation_prompt": random.below(2) == 0});
            chat.text(context.as_object().unwrap().clone()).map(drop).map_err(Fault::data)
        });
    });
}

// ---- images and registries ----

/// Returns a layout with the image of a small adapter.
fn layout(folder: &Path) -> PathBuf {
    let (adapter, image) = (folder.join("adapter"), folder.join("image"));
    std::fs::create_dir(&adapter).unwrap();
    let tensor = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
    let tensors = std::collections::HashMap::from([("base_model.model.a.lora_A.weight", tensor)]);
    candle_core::safetensors::save(&tensors, adapter.join("adapter_model.safetensors")).unwrap();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"]});
    std::fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let target = Target::parse(&format!("oci:{}:v1", image.display())).unwrap();
    registry::push(&adapter, &target, &ImageFacts::default(), &options(), &Report::silent()).unwrap();
    image
}

fn options() -> registry::Options {
    let moment = Duration::from_millis(300);
    registry::Options {
        docker_config: None,
        ca_file: None,
        plain_http: true,
        attempts_max: 1,
        connect_timeout: moment,
        read_timeout: moment,
    }
}

/// Returns an archive with strange members, packed or not.
fn archive(random: &mut Random, whole: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    // A layer that is no gzip any more is mutated as it is.
    let _ = flate2::read::GzDecoder::new(whole).read_to_end(&mut tar);
    for _ in 0..random.below(3) {
        let mut header = [0u8; 512];
        let name = *random.pick(&[
            "data/a",
            "../a",
            "/a",
            "data/../../a",
            "data/.wh.a",
            "data",
            "",
            "data/\u{fffd}",
        ]);
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        let size = *random.pick(&["00000000001", "00000000000", "77777777777", "00000000777"]);
        header[124..135].copy_from_slice(size.as_bytes());
        header[156] = *random.pick(b"0123456xgLKS");
        header[157..164].copy_from_slice(b"/etc/pa");
        header[257..262].copy_from_slice(b"ustar");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let at = 512 * random.below(tar.len() / 512 + 1);
        tar.splice(at..at, header);
    }
    if random.below(2) == 0 {
        tar = mutated(random, &tar, &[("a".into(), b"data/x".to_vec())]);
    }
    if random.below(5) == 0 {
        return tar;
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn no_image_breaks_its_reader_or_leaves_its_folder() {
    let home = tempfile::tempdir().unwrap();
    let whole = layout(home.path());
    let read = |folder: &Path, digest: &Value| {
        let hex = digest.as_str().unwrap_or_default().trim_start_matches("sha256:").to_owned();
        std::fs::read(folder.join("blobs/sha256").join(hex)).unwrap()
    };
    let index: Value = serde_json::from_slice(&std::fs::read(whole.join("index.json")).unwrap()).unwrap();
    let manifest: Value = serde_json::from_slice(&read(&whole, &index["manifests"][0]["digest"])).unwrap();
    let layer = read(&whole, &manifest["layers"][0]["digest"]);
    let names = [
        "digest",
        "size",
        "mediaType",
        "layers",
        "config",
        "manifests",
        "annotations",
        "schemaVersion",
        "platform",
        "os",
        "architecture",
        "urls",
        "data",
        "artifactType",
        "subject",
    ];
    each_case(250, |seed| {
        let mut random = Random(seed);
        let folder = tempfile::tempdir().unwrap();
        let blobs = folder.path().join("image/blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8]| {
            let hex = hone::source::digest(bytes);
            std::fs::write(blobs.join(&hex), bytes).unwrap();
            format!("sha256:{hex}")
        };
        let (mut manifest, mut index) = (manifest.clone(), index.clone());
        let layer = if random.below(2) == 0 { archive(&mut random, &layer) } else { layer.clone() };
        (manifest["layers"][0]["digest"], manifest["layers"][0]["size"]) =
            (put(&layer).into(), layer.len().into());
        let manifest = match random.below(2) {
            0 => manifest.to_string().into_bytes(),
            _ => changed_json(&mut random, &names, &manifest),
        };
        (index["manifests"][0]["digest"], index["manifests"][0]["size"]) =
            (put(&manifest).into(), manifest.len().into());
        let index = match random.below(3) {
            0 => changed_json(&mut random, &names, &index),
            _ => index.to_string().into_bytes(),
        };
        std::fs::write(folder.path().join("image/index.json"), &index).unwrap();
        std::fs::write(folder.path().join("image/oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
        let content = [&index[..], b"\n", &manifest, b"\n", &layer].concat();
        let target = Target::parse(&format!("oci:{}:v1", folder.path().join("image").display())).unwrap();
        let to = folder.path().join("to");
        judge(seed, &content, &[Kind::Config, Kind::Data, Kind::Capacity], || {
            registry::pull(&target, &to, &options(), &Report::silent())
        });
        let mut left: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.retain(|name| name != "image" && name != "to");
        assert!(left.is_empty(), "seed {seed}: {left:?}");
    });
}

#[test]
fn no_answer_of_a_registry_breaks_its_client() {
    let home = tempfile::tempdir().unwrap();
    layout(home.path());
    let adapter = home.path().join("adapter");
    let current: Arc<Mutex<Random>> = Arc::new(Mutex::new(Random(0)));
    let shared = current.clone();
    let server = crate::http::Server::start(move |_, request| {
        let mut random = shared.lock().unwrap();
        let status = *random.pick(&[200, 201, 202, 202, 206, 301, 307, 401, 404, 416, 429, 500, 99, 999]);
        let headers: [(&str, &[&str]); 7] = [
            (
                "Location",
                &["/v2/a/blobs/uploads/1", "", "http://", "//x", "/a?b=c#d", "http://[::1", "%", "ftp://a/b"],
            ),
            (
                "WWW-Authenticate",
                &[
                    "Bearer",
                    "Bearer realm=\"",
                    "Basic realm=x",
                    "Bearer realm=\"http://localhost:1/t\",scope=\"",
                    "Digest",
                ],
            ),
            ("Docker-Content-Digest", &["sha256:", "md5:x", "sha256:zz", ""]),
            ("Range", &["0-", "-1", "0-99999999999999999999", "bytes"]),
            ("OCI-Chunk-Min-Length", &["-1", "99999999999999999999", "x"]),
            ("Retry-After", &["0", "-1", "x"]),
            ("Content-Type", &["application/vnd.oci.image.index.v1+json", "text/html", ""]),
        ];
        let body = match random.below(4) {
            0 => Vec::new(),
            1 => mutated(&mut random, br#"{"errors":[{"code":"DENIED","message":"no","detail":{}}]}"#, &[]),
            2 => mutated(&mut random, br#"{"token":"t","access_token":"u","expires_in":3}"#, &[]),
            _ => br#"{"schemaVersion":2,"layers":[],"config":{"digest":"sha256:0","size":-1}}"#.to_vec(),
        };
        let body = if request.method == "HEAD" { Vec::new() } else { body };
        let mut reply = crate::http::Reply::status(status).body(body);
        for (name, values) in headers {
            if random.below(3) == 0 {
                reply = reply.header(name, *random.pick(values));
            }
        }
        match random.below(12) {
            0 => reply.cut(5),
            1 => reply.reset(),
            _ => reply,
        }
    });
    let target = Target::parse(&server.url("/a:v1").replace("http://", "")).unwrap();
    let kinds = [Kind::Config, Kind::Auth, Kind::Push, Kind::Network, Kind::Data, Kind::Model];
    each_case(60, |seed| {
        *current.lock().unwrap() = Random(seed);
        let none = home.path().join("none.json");
        std::fs::write(&none, "{}").unwrap();
        let options = registry::Options { docker_config: Some(none), ..options() };
        judge(seed, b"", &kinds, || {
            registry::push(&adapter, &target, &ImageFacts::default(), &options, &Report::silent())
        });
        let to = tempfile::tempdir().unwrap();
        judge(seed, b"", &kinds, || {
            registry::pull(&target, &to.path().join("to"), &options, &Report::silent())
        });
    });
}

// ---- checkpoints and adapters ----

#[test]
fn no_checkpoint_is_believed_that_was_not_written() {
    let filled = |value: f32| Tensor::full(value, 5, &Device::Cpu).unwrap();
    let moments = |value: f32| {
        Moments::Full(adamw::Moments { first: filled(value + 1.0), second: filled(value + 2.0) })
    };
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints { folder: folder.path().into(), fingerprint: "a".into() };
    for step in 1..=2 {
        let state = State { step, loss: 0.1 * step as f64, ..State::default() };
        checkpoint::save(&checkpoints, &state, &filled(step as f32), &moments(step as f32), None).unwrap();
    }
    let place = folder.path().join("step-2");
    let files = ["state.json", "tensors.safetensors"];
    let whole = files.map(|name| std::fs::read(place.join(name)).unwrap());
    let others: Vec<(String, Vec<u8>)> = files
        .iter()
        .map(|name| ((*name).into(), std::fs::read(folder.path().join("step-1").join(name)).unwrap()))
        .collect();
    each_case(400, |seed| {
        let mut random = Random(seed);
        let at = random.below(2);
        let content = match random.below(3) {
            0 if at == 0 => {
                let state: Value = serde_json::from_slice(&whole[0]).unwrap();
                twisted(&mut random, &["step", "tokens", "sha256", "manifest", "state", "spikes"], &state)
                    .to_string()
                    .into_bytes()
            }
            _ => mutated(&mut random, &whole[at], &others),
        };
        std::fs::write(place.join(files[at]), &content).unwrap();
        let (params, found) = (filled(0.0), moments(0.0));
        let state = judge(seed, &content, &[], || {
            checkpoint::newest(&checkpoints, &params, &found, &Report::silent())
        });
        let step = state.flatten().map(|state| state.step).expect("the one before is whole");
        assert!((1..=2).contains(&step), "seed {seed}: step {step}");
        assert_eq!(params.to_vec1::<f32>().unwrap(), [step as f32; 5], "seed {seed}");
        let (_, second) = found.tensors()[1];
        assert_eq!(second.to_vec1::<f32>().unwrap(), [step as f32 + 2.0; 5], "seed {seed}");
        std::fs::write(place.join(files[at]), &whole[at]).unwrap();
    });
}

#[test]
fn no_adapter_breaks_its_reader() {
    let home = tempfile::tempdir().unwrap();
    layout(home.path());
    let folder = home.path().join("adapter");
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    let whole = files.map(|name| std::fs::read(folder.join(name)).unwrap());
    let config: Value = serde_json::from_slice(&whole[0]).unwrap();
    let names = [
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "use_dora",
        "peft_type",
        "modules_to_save",
        "layers_to_transform",
        "init_lora_weights",
        "use_rslora",
        "fan_in_fan_out",
    ];
    each_case(300, |seed| {
        let mut random = Random(seed);
        let at = random.below(2);
        let content = match at {
            0 => changed_json(&mut random, &names, &config),
            _ => mutated(&mut random, &whole[1], &[("a".into(), whole[1][..40].to_vec())]),
        };
        std::fs::write(folder.join(files[at]), &content).unwrap();
        judge(seed, &content, &[Kind::Model, Kind::Config], || {
            adapter::read(&folder)?.options(&LoraOptions::default()).map(drop)
        });
        let target = Target::parse(&format!("oci:{}:v{seed}", home.path().join("other").display())).unwrap();
        let kinds = [Kind::Model, Kind::Config, Kind::Capacity];
        judge(seed, &content, &kinds, || {
            registry::push(&folder, &target, &ImageFacts::default(), &options(), &Report::silent())
        });
        std::fs::write(folder.join(files[at]), &whole[at]).unwrap();
    });
}

// ---- requests ----

/// An engine that answers every request with one token.
struct Short {
    facts: generate::Facts,
}

impl Engine for Short {
    fn facts(&self) -> &generate::Facts {
        &self.facts
    }

    fn submit(&self, request: generate::Request) -> std::result::Result<Answer, Refusal> {
        let (sender, answer) = generate::answer();
        sender.send(Event::Started);
        let usage = Usage { prompt_tokens: request.prompt.len(), cached_tokens: 0, generated_tokens: 0 };
        sender.send(Event::Finished(Finish::Stop, usage));
        Ok(answer)
    }

    fn adapters(&self) -> Vec<generate::Adapter> {
        Vec::new()
    }

    fn load_adapter(&self, _: &str, _: &Path) -> Result<generate::Adapter> {
        Err(Fault::model("there are none"))
    }

    fn unload_adapter(&self, _: &str) -> Result<()> {
        Err(Fault::config("there are none"))
    }

    fn counters(&self) -> Counters {
        Counters::default()
    }
}

fn serving() -> Server {
    let folder = golden("llama3/model");
    let tokenizer = Tokenizer::open(&folder).unwrap();
    let facts = generate::Facts {
        context: 300,
        vocabulary: tokenizer.vocab_size(),
        sequences: 8,
        waiting: 100_000,
        cache_tokens: 2400,
        description: "a script".into(),
    };
    let model = Model {
        name: "base".into(),
        engine: Arc::new(Short { facts }),
        chat: Chat::of(&tokenizer, Some("{% for m in messages %}{{ m.content }}{% endfor %}")).unwrap(),
        defaults: Defaults::read(&folder, &tokenizer, None).unwrap(),
        tokenizer,
        named: Named::new(None, Vec::new()),
        raw_chat: false,
        bring: None,
    };
    let options = server::Options { listen: "127.0.0.1:0".parse().unwrap(), ..server::Options::default() };
    let server = Server::start(&options).unwrap();
    server.ready(Arc::new(model));
    server
}

/// Returns the first line of the answer; empty if there is none so soon.
fn asked(server: &Server, request: &[u8], patience: Duration) -> String {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(patience)).unwrap();
    // A server that refuses early may close before everything is sent.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[test]
fn no_request_breaks_the_server() {
    let server = serving();
    let bodies = [
        (
            "/v1/chat/completions",
            json!({"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3,
            "temperature": 0.5, "stream": true, "tools": [{"type": "function", "function": {"name": "f"}}], "stop": ["a"],
            "logprobs": true, "top_logprobs": 2, "n": 2, "seed": 1, "logit_bias": {"5": 1.0}}),
        ),
        (
            "/v1/completions",
            json!({"model": "base", "prompt": ["a", "b"], "max_tokens": 2, "echo": true, "logprobs": 1}),
        ),
        ("/v1/completions", json!({"prompt": [[5, 6], [7]], "prompt_logprobs": 1, "adapters": {"a": 0.5}})),
        ("/chat", json!({"prompt": "a", "generate_kwargs": {"max_length": 20, "do_sample": true}})),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant",
                "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f",
                "arguments": "{\"a\": 1}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "x"}]}),
        ),
        ("/tokenize", json!({"prompt": "a", "messages": []})),
        ("/detokenize", json!({"tokens": [1, 2]})),
    ];
    let names = [
        "messages",
        "tool_calls",
        "function",
        "arguments",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "n",
        "top_p",
        "min_p",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "response_format",
        "logit_bias",
        "content",
        "role",
        "best_of",
        "suffix",
        "ignore_eos",
        "stop_token_ids",
        "chat_template_kwargs",
        "adapters",
        "generate_kwargs",
    ];
    let request = |path: &str, body: &[u8]| {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), body].concat()
    };
    let good = request("/v1/completions", br#"{"prompt": "a", "max_tokens": 1}"#);
    let answers = || {
        let line = asked(&server, &good, CASE_MAX);
        assert!(line.contains("200"), "it does not answer a good request: {line:?}");
    };
    answers();
    each_case(200, |seed| {
        let mut random = Random(seed);
        let (path, body) = random.pick(&bodies).clone();
        let body = changed_json(&mut random, &names, &body);
        let mut bytes = request(path, &body);
        if random.below(4) == 0 {
            bytes = mutated(&mut random, &bytes, &[("a".into(), b"Transfer-Encoding: chunked\r\n".to_vec())]);
        }
        let line = asked(&server, &bytes, Duration::from_millis(100));
        assert!(!line.contains(" 500 "), "seed {seed}: {line}; {}", keep(seed, "request", &bytes).display());
        if seed.is_multiple_of(50) {
            answers();
        }
    });
    answers();
}
