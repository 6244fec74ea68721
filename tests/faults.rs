//! hone under attack, with the real binary: a disk that fails at every call, malicious inputs, ends that stop the
//! process at once, and secrets in every place. `tests/faults/MATRIX.md` lists what is proven where.
//!
//! A sweep takes every n-th call; `HONE_FAULTS=all cargo test --test faults` takes each call.

#[path = "support/job.rs"]
mod job;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, StringArray};
use arrow::record_batch::RecordBatch;
use job::{Ended, FINAL, Work, end};
use libc::{SIGABRT, SIGKILL, SIGTERM};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

/// A short run over `model/`, with everything that writes: checkpoints, evaluation, export, a push to a layout.
const RUN: [&str; 7] = ["run", "--model", "model", "--data", "data.parquet", "--output", "out"];
const KEYS: [&str; 9] = [
    "LoraConfig.lora_dropout=0.1",
    "TrainingArguments.max_steps=3",
    "TrainingArguments.max_length=128",
    "TrainingArguments.logging_steps=1",
    "TrainingArguments.save_strategy=steps",
    "TrainingArguments.save_steps=1",
    "TrainingArguments.save_total_limit=1",
    "TrainingArguments.eval_strategy=no",
    "DatasetConfig.shuffle_dataset=true",
];

fn arguments() -> Vec<&'static str> {
    let mut arguments = RUN.to_vec();
    for key in KEYS {
        arguments.extend(["--set", key]);
    }
    arguments.extend(["--push", "oci:image:v1"]);
    arguments
}

// ---- a disk that fails ----

/// The shim, compiled once.
fn shim() -> &'static Path {
    static SHIM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = SHIM.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shim.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/shim.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&path).arg(source).arg("-ldl");
        assert!(compiler.status().unwrap().success(), "cc compiles the shim");
        (folder, path)
    });
    path
}

/// A run whose disk fails at this call in this way.
fn faulty(work: &Work, fault: &str, at: u64) -> Ended {
    let mut command = work.hone(&arguments());
    command.env("LD_PRELOAD", shim()).env("FAULT", fault).env("FAULT_AT", at.to_string());
    end(&mut command)
}

/// What a run leaves that must be the same after every interruption: the adapter, and the image's manifest.
fn results(work: &Work) -> (Vec<u8>, String) {
    let index = work.json("image/index.json");
    (work.read("out/adapter_model.safetensors"), index["manifests"][0]["digest"].as_str().unwrap().to_owned())
}

/// A fault at every n-th call of an undisturbed run, each followed by an undisturbed restart, which must end with
/// the bytes of the undisturbed run.
fn sweep(fault: &str, codes: &[Option<i32>], share: u64) {
    let straight = Work::with_llama();
    let mut counting = straight.hone(&arguments());
    counting.env("LD_PRELOAD", shim()).env("FAULT_COUNT", straight.path("calls"));
    assert_eq!(end(&mut counting).code, Some(0));
    let calls: u64 = straight.text("calls").parse().unwrap();
    assert!(calls > 60, "the shim sees {calls} calls");
    let expected = results(&straight);
    let every = if std::env::var("HONE_FAULTS").is_ok_and(|value| value == "all") {
        1
    } else {
        calls.div_ceil(share)
    };
    // Each of the first calls, which claim a folder, is tested.
    let places = (1..=12).chain((13..=calls).step_by(usize::try_from(every).unwrap()));
    for at in places {
        let work = Work::with_llama();
        let hurt = faulty(&work, fault, at);
        assert!(codes.contains(&hurt.code), "{fault} at {at} of {calls}: {:?}\n{}", hurt.code, hurt.stderr);
        if hurt.code != Some(0) {
            let message = std::fs::read(work.path("termination.json")).unwrap_or_default();
            let message = serde_json::from_slice::<serde_json::Value>(&message).ok();
            // A process that is killed before or during its first message, and a full disk, leave no message.
            let speechless = hurt.code.is_none() || fault == "full";
            assert!(message.is_some() || speechless, "{fault} at {at}: no last word");
            // On a full disk, the message that was written ahead stays.
            if let Some(message) = message.filter(|_| fault != "full") {
                let code = hurt.code.map_or(137, i64::from);
                assert_eq!(message["code"].as_i64(), Some(code), "{fault} at {at}: {message}");
                assert_eq!(message["retry_helps"], true, "{fault} at {at}: {message}");
            }
        }
        let again = work.run(&arguments());
        assert_eq!(again.code, Some(0), "after {fault} at {at} of {calls}:\n{}", again.stderr);
        assert!(results(&work) == expected, "after {fault} at {at} of {calls}: other bytes");
        for folder in ["out", "out/checkpoints", "image", "image/blobs/sha256"] {
            let left = work
                .list(folder)
                .into_iter()
                .find(|name| name.contains("partial") || name.starts_with(".tmp"));
            assert_eq!(left, None, "after {fault} at {at}: litter in {folder}");
        }
    }
}

#[test]
fn killed_at_any_call_a_run_ends_in_the_same_bytes() {
    sweep("kill", &[None], 14);
}

#[test]
fn killed_in_the_middle_of_a_write_a_run_ends_in_the_same_bytes() {
    sweep("half", &[None, Some(0)], 10);
}

#[test]
fn a_full_disk_is_told_as_such_and_a_run_ends_in_the_same_bytes() {
    sweep("full", &[Some(21), Some(23), Some(30), Some(31), Some(0)], 10);
}

#[test]
fn a_failing_call_is_told_as_such_and_a_run_ends_in_the_same_bytes() {
    sweep("eio", &[Some(21), Some(23), Some(0)], 10);
}

#[test]
fn stopped_at_any_call_a_run_ends_in_the_same_bytes() {
    // The first calls come before the program listens to signals.
    sweep("term", &[Some(30), Some(31), Some(0), None], 10);
}

// ---- ends that stop the process at once ----

#[test]
fn every_end_leaves_a_word() {
    let work = Work::with_llama();
    let ended = work.run(&["run", "--no-such-flag"]);
    assert_eq!((ended.code, work.json("termination.json")["code"].as_i64()), (Some(2), Some(2)));
    for (signals, code) in [(&[SIGKILL][..], 137), (&[SIGABRT], 70), (&[SIGTERM, SIGTERM], 31)] {
        let mut long = arguments();
        long.extend([
            "--set",
            "TrainingArguments.max_steps=5000",
            "--set",
            "TrainingArguments.save_strategy=no",
        ]);
        // One micro-batch of all rows, so that the first signal has to wait for its end.
        for key in ["per_device_train_batch_size=400", "packing=false", "logging_steps=1", "max_length=512"] {
            long.extend(["--set", ["TrainingArguments.", key].concat().leak()]);
        }
        let mut running = work.start(&long);
        running.until("a step", || work.path("out/metrics.jsonl").exists());
        // The time is well into the next step, which takes seconds.
        std::thread::sleep(Duration::from_millis(500));
        for signal in signals {
            running.signal(*signal);
            std::thread::sleep(Duration::from_millis(20));
        }
        let (ended, log) = running.end();
        let message = work.json("termination.json");
        assert_eq!(message["code"], code, "{message}\n{log}");
        assert_eq!(ended, if code == 137 { None } else { Some(code) }, "{log}");
        std::fs::remove_dir_all(work.path("out")).unwrap();
    }
}

#[test]
fn a_folder_in_use_is_a_reason_to_try_again() {
    let work = Work::with_llama();
    std::fs::create_dir(work.path("out")).unwrap();
    let lock = std::fs::File::create(work.path("out/.hone.lock")).unwrap();
    lock.lock().unwrap();
    let mut waiting = work.start(&arguments());
    std::thread::sleep(Duration::from_millis(1500));
    drop(lock);
    waiting.until("a step", || work.path("out/metrics.jsonl").exists());
    assert_eq!(waiting.end().0, Some(0), "it waited for the other one to end");
}

// ---- malicious inputs ----

/// Runs hone over the files of a test, within a time and a memory. Returns its exit code and its output.
fn attacked(work: &Work, more: &[&str]) -> Ended {
    const LIMIT: Duration = Duration::from_secs(60);
    let began = Instant::now();
    let hone = work.hone(&[]);
    let mut command = Command::new("sh");
    // In kilobytes. A machine's threads reserve some gigabytes that they never use.
    command.args(["-c", "ulimit -v 12000000; exec \"$0\" \"$@\""]).arg(hone.get_program());
    command.args(RUN).args(["--log", "terminal", "--set", "TrainingArguments.max_steps=1"]).args(more);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("RAYON_NUM_THREADS", "2");
    command.env("HONE_TERMINATION_LOG", work.path("termination.json")).current_dir(work.path(""));
    let ended = end(&mut command);
    assert!(began.elapsed() < LIMIT, "{:?}\n{}", began.elapsed(), ended.stderr);
    let message = work.json("termination.json");
    assert_eq!(message["code"].as_i64(), ended.code.map(i64::from), "{message}\n{}", ended.stderr);
    for name in FINAL {
        assert!(!work.path("out").join(name).exists(), "{name}\n{}", ended.stderr);
    }
    ended
}

/// The footer's schema, a chain of groups, as Thrift writes it.
fn deep_parquet(groups: usize) -> Vec<u8> {
    let varint = |mut rest: usize| {
        let mut bytes = Vec::new();
        while rest > 127 {
            bytes.push(rest as u8 | 128);
            rest >>= 7;
        }
        bytes.push(rest as u8);
        bytes
    };
    let mut footer = [&[0x15, 0x02, 0x19, 0xfc][..], &varint(groups + 1)].concat();
    for _ in 0..groups {
        footer.extend([0x35, 0x00, 0x18, 1, b'g', 0x15, 0x02, 0x00]);
    }
    footer.extend([0x15, 0x0c, 0x25, 0x00, 0x18, 1, b'c', 0x00]);
    footer.extend([0x16, 0x00, 0x19, 0x0c, 0x00]);
    [b"PAR1", &footer[..], &(footer.len() as u32).to_le_bytes(), b"PAR1"].concat()
}

/// One text that a dictionary holds once, in so many rows.
fn repeated_text(bytes: usize, rows: usize) -> Vec<u8> {
    let text = "word ".repeat(bytes / 5);
    // Offsets of a batch are 32 bits.
    let at_once = rows.min((1 << 30) / bytes.max(1 << 24));
    let column: ArrayRef = Arc::new(StringArray::from_iter_values((0..at_once).map(|_| &text)));
    let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(parquet::basic::Compression::ZSTD(Default::default()))
        .set_dictionary_page_size_limit(16 << 20)
        .set_statistics_enabled(parquet::file::properties::EnabledStatistics::None)
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    for _ in 0..rows.div_ceil(at_once) {
        writer.write(&batch).unwrap();
    }
    writer.into_inner().unwrap()
}

#[test]
fn hostile_parquet_ends_with_11() {
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("deep", deep_parquet(10_000), "groups deep"),
        ("very deep", deep_parquet(30_000), "groups deep"),
        (
            "children",
            {
                let footer =
                    [0x15, 0x02, 0x19, 0x1c, 0x48, 1, b'r', 0x15, 0xfe, 0xff, 0xff, 0xff, 0x0f, 0x00, 0x00];
                [b"PAR1", &footer[..], &(footer.len() as u32).to_le_bytes(), b"PAR1"].concat()
            },
            "promises 2147483647 children",
        ),
        ("a text in many rows", repeated_text(1 << 20, 2048), "made to fill the memory"),
        ("a large text in many rows", repeated_text(8 << 20, 256), "made to fill the memory"),
    ];
    for (name, bytes, expected) in cases {
        let work = Work::with_llama();
        work.write("data.parquet", bytes);
        let ended = attacked(&work, &[]);
        assert!(
            ended.code == Some(11) && ended.stderr.contains(expected),
            "{name}: {:?}\n{}",
            ended.code,
            ended.stderr
        );
    }
}

#[test]
fn one_huge_text_is_cut_and_trained_on() {
    let work = Work::with_llama();
    work.write("data.parquet", repeated_text(40 << 20, 2));
    let mut command = work.hone(&RUN);
    command.args(["--set", "TrainingArguments.max_steps=1", "--set", "TrainingArguments.max_length=64"]);
    let began = Instant::now();
    assert_eq!(end(&mut command).code, Some(0));
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn hostile_chat_templates_end_with_their_code() {
    let loops = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    let nested = "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}";
    for (template, codes) in [
        (format!("{{{{ {}1 }}}}", "-".repeat(20_000)), &[0, 11, 12][..]),
        (format!("{{{{ {}1 }}}}", "not ".repeat(60_000)), &[11, 12]),
        (format!("{{{{ messages{} }}}}", ".b".repeat(100_000)), &[11, 12]),
        (format!("{{{{ 'a'{} }}}}", "|upper".repeat(40_000)), &[11, 12]),
        (format!("{{{{ 'a'{} }}}}", "~'a'".repeat(60_000)), &[11, 12]),
        ("x".repeat(300_000), &[12]),
        ("{{ messages | tojson(indent=1000000000) }}".into(), &[11, 12]),
        ("{{ messages | tojson(indent=18446744073709551615) }}".into(), &[11, 12]),
        ("{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}".into(), &[11, 12]),
        ("{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}".into(), &[11, 12]),
        ("{{ '{:>2000000000}'.format('x') }}".into(), &[11, 12]),
        ("{{ '%2000000000d' | format(1) }}".into(), &[11, 12]),
        ("{{ 'a\nb' | indent(4000000000) }}".into(), &[11, 12]),
        ("{% set a = 'a' * 10000000 %}{{ a.split('b') | length }}".into(), &[11, 12]),
        (loops.into(), &[11, 12]),
        (nested.into(), &[11, 12]),
    ] {
        let work = Work::with_llama();
        work.write("model/chat_template.jinja", &template);
        let ended = attacked(&work, &[]);
        let shown: String = template.chars().take(60).collect();
        assert!(codes.contains(&ended.code.unwrap_or(-1)), "{shown}: {:?}\n{}", ended.code, ended.stderr);
    }
}

#[test]
fn hostile_tokenizers_end_with_12() {
    let replace = |pattern: &str, content: &str| serde_json::json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
    let doubling: Vec<_> = (0..22).map(|_| replace("a", "aa")).collect();
    for normalizer in [
        serde_json::json!({"type": "Sequence", "normalizers": doubling}),
        serde_json::json!({"type": "Prepend", "prepend": "x".repeat(5 << 20)}),
        replace("", &"x".repeat(1 << 20)),
        serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
    ] {
        let work = Work::with_llama();
        let mut tokenizer = work.json("model/tokenizer.json");
        tokenizer["normalizer"] = normalizer;
        work.write("model/tokenizer.json", tokenizer.to_string());
        let ended = attacked(&work, &[]);
        assert_eq!(ended.code, Some(12), "{}", ended.stderr);
    }
}

#[test]
fn absurd_models_end_with_12() {
    for (key, value) in [
        ("num_hidden_layers", "1000000000"),
        ("num_hidden_layers", "4294967296"),
        ("num_hidden_layers", "9223372036854775807"),
        ("vocab_size", "4611686018427387904"),
        ("rms_norm_eps", "-1"),
        ("rope_theta", "0"),
    ] {
        let work = Work::with_llama();
        let mut config = work.json("model/config.json");
        config[key] = serde_json::from_str(value).unwrap();
        work.write("model/config.json", config.to_string());
        let ended = attacked(&work, &[]);
        assert!(
            ended.code == Some(12) && ended.stderr.contains(key),
            "{key}: {:?}\n{}",
            ended.code,
            ended.stderr
        );
        for command in [&["plan", "--model", "model", "--data", "data.parquet"][..], &["model", "model"]] {
            assert_eq!(work.run(command).code, Some(12), "{command:?}");
        }
    }
    let work = Work::with_llama();
    work.write("model/model.safetensors", [&(60u64 << 20).to_le_bytes()[..], b"{}"].concat());
    assert_eq!(attacked(&work, &[]).code, Some(12));
}

#[test]
fn an_adapter_without_effect_is_never_shipped() {
    let work = Work::with_llama();
    let ended = attacked(&work, &["--set", "TrainingArguments.learning_rate=0.0"]);
    // It is refused either by the plan or at the end of the run.
    assert!([Some(10), Some(15)].contains(&ended.code), "{:?}\n{}", ended.code, ended.stderr);
    let work = Work::with_llama();
    let ended = attacked(
        &work,
        &["--set", "LoraConfig.lora_alpha=1e30", "--set", "TrainingArguments.max_grad_norm=0"],
    );
    assert!([Some(10), Some(15)].contains(&ended.code), "{:?}\n{}", ended.code, ended.stderr);
}

// ---- secrets ----

#[test]
fn no_way_in_shows_a_secret() {
    const C: &str = "CANARYcanaryCANARY0123456789";
    let ways: Vec<Vec<String>> = [
        "--data|https://user:C@127.0.0.1:1/x?sig=C#C",
        "--data|https//user:C@host/x?sig=C",
        "--data|http:/user:C@host/x?sig=C",
        "--data|http:user:C@host/x",
        "--data|user:C@host/x?sig=C",
        "--data|host/x.parquet?sig=C",
        "--data|ftp://user:C@host/x",
        "--data|file://user:C@host/x?sig=C",
        "--data|oci://user:C@host/x",
        "--data|http://127.0.0.1:99999/x?sig=C",
        "--data|http://user:C@169.254.169.254/x?sig=C",
        "--data|hf://user:C@host/x",
        "--model|https://user:C@host/m?sig=C",
        "--model|https//user:C@host/m?sig=C",
        "--model|user:C@host/m?sig=C",
        "--model|hf://user:C@host/m?sig=C",
        "--model|oci://user:C@host/m?sig=C",
        "--push|https://user:C@host/a:1",
        "--push|user:C@host/a:1",
        "--push|oci:https://user:C@host/a:1",
        "--output|https://user:C@host/o?sig=C",
        "--ca-file|https://user:C@host/o?sig=C",
        "--docker-config|https://user:C@host/o?sig=C",
        "--set|https://user:C@host/k?sig=C=1",
        "--set|TrainingArguments.https://user:C@host/k=1",
        "--set|TrainingArguments.learning_rate=https://user:C@host/k?sig=C",
        "--set|TrainingArguments.learning_rate=C",
        "--set|TrainingArguments.max_steps=C",
        "--set|TrainingArguments.save_strategy=C",
        "--set|TrainingArguments.packing=C",
        "--set|data=https://user:C@127.0.0.1:1/x?sig=C",
        "--config|https://user:C@host/c.yaml?sig=C",
        "--init-adapter|https://user:C@host/a?sig=C",
        "--token|https://user:C@host/a?sig=C",
        "https://user:C@host/job.yaml?sig=C",
        "user:C@host/job.yaml?sig=C",
    ]
    .iter()
    .map(|way| way.split('|').map(|part| part.replace('C', C)).collect())
    .collect();
    for way in ways {
        let work = Work::with_llama();
        let mut command = work.hone(&["run", "--log", "terminal"]);
        if !way.iter().any(|part| part == "--model") {
            command.args(["--model", "model"]);
        }
        if !way.iter().any(|part| part == "--data") {
            command.args(["--data", "none.parquet"]);
        }
        command.args(&way).env("RUST_LOG", "trace").env("RUST_BACKTRACE", "0");
        // No request may leave the machine, even if hone fails to refuse it.
        command.env("HTTPS_PROXY", "http://127.0.0.1:1").env("HTTP_PROXY", "http://127.0.0.1:1");
        command.env("HF_ENDPOINT", "http://127.0.0.1:1").env("HF_TOKEN", C).env("HONE_REGISTRY_PASSWORD", C);
        let began = Instant::now();
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        while child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(4) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let message = std::fs::read(work.path("termination.json")).unwrap_or_default();
        for text in [said, message] {
            let text = String::from_utf8_lossy(&text);
            assert!(!text.contains(C), "{way:?} shows its secret:\n{text}");
        }
    }
}
