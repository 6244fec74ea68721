//! hone under attack, with the real binary: a disk that fails at every call, malicious inputs, ends that stop the
//! process at once, and secrets in every place. `tests/faults/MATRIX.md` lists what is proven where.
//!
//! A sweep takes every n-th call; `HONE_FAULTS=all cargo test --test faults` takes each call, `HONE_FAULTS=20-39`
//! those.
//! `tests/faults/long` makes all long runs, piece by piece.

#[path = "support/fake_registry.rs"]
mod fake_registry;
#[path = "support/http.rs"]
mod http;
#[path = "support/job.rs"]
mod job;
#[path = "support/random.rs"]
mod random;
#[path = "support/shim.rs"]
mod shim;
#[path = "faults/simulator.rs"]
mod simulator;

use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, StringArray};
use arrow::record_batch::RecordBatch;
use job::{Ended, FINAL, Work, end};
use libc::{SIGABRT, SIGBUS, SIGKILL, SIGSEGV, SIGTERM};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

/// A short run over `model/`, with everything that writes: checkpoints, evaluation, export, a push to a layout.
const RUN: [&str; 7] = ["run", "--model", "model", "--data", "data.parquet", "--output", "out"];
const KEYS: [&str; 10] = [
    "LoraConfig.lora_dropout=0.1",
    "TrainingArguments.max_steps=3",
    "TrainingArguments.max_length=128",
    "TrainingArguments.logging_steps=1",
    "TrainingArguments.save_strategy=steps",
    "TrainingArguments.save_steps=1",
    "TrainingArguments.save_total_limit=1",
    "TrainingArguments.packing=false",
    "DatasetConfig.train_test_split=0.75",
    "DatasetConfig.shuffle_dataset=true",
];

/// Returns the arguments of a run that is disturbed: over a few rows.
fn arguments() -> Vec<&'static str> {
    let mut arguments = RUN.to_vec();
    arguments[4] = "data.jsonl";
    for key in KEYS {
        arguments.extend(["--set", key]);
    }
    arguments.extend(["--push", "oci:image:v1"]);
    arguments
}

// ---- a disk that fails ----

/// Returns a run under the shim, whose disk works.
fn plain(work: &Work) -> Command {
    let mut command = work.hone(&arguments());
    command.env("LD_PRELOAD", shim::shim()).env("FAULT_QUICK", "1");
    command
}

/// Returns a run whose disk fails at this call in this way.
fn faulty(work: &Work, fault: &str, at: u64) -> Ended {
    let mut command = plain(work);
    command.env("FAULT", fault).env("FAULT_AT", at.to_string());
    end(&mut command)
}

/// Returns the results of a run that must be the same after every interruption: the adapter, and the image's manifest.
fn results(work: &Work) -> (Vec<u8>, String) {
    let index = work.json("image/index.json");
    (work.read("out/adapter_model.safetensors"), index["manifests"][0]["digest"].as_str().unwrap().to_owned())
}

/// Returns the golden Llama and some rows.
fn small() -> Work {
    let work = Work::new();
    work.copy("llama3/model", "model");
    let row = |n: usize| format!("{{\"prompt\":\"{n} + {n} =\",\"completion\":\" {}\"}}\n", 2 * n);
    work.write("data.jsonl", (0..24).map(row).collect::<String>());
    work
}

/// The results of an undisturbed run, and the number of its calls.
struct Undisturbed {
    results: (Vec<u8>, String),
    /// Calls that change files.
    changes: u64,
    /// Calls that open and read files.
    reads: u64,
}

fn undisturbed() -> &'static Undisturbed {
    static RUN: OnceLock<Undisturbed> = OnceLock::new();
    RUN.get_or_init(|| {
        let work = small();
        let mut counting = plain(&work);
        counting.env("FAULT_COUNT", work.path("calls"));
        assert_eq!(end(&mut counting).code, Some(0));
        let calls: Vec<u64> = work.text("calls").split(' ').map(|count| count.parse().unwrap()).collect();
        assert!(calls[0] > 60 && calls[1] > 60, "the shim sees {calls:?} calls");
        Undisturbed { results: results(&work), changes: calls[0], reads: calls[1] }
    })
}

/// Causes a fault at every n-th call of an undisturbed run. After each fault a restart without faults must end with the
/// bytes of the undisturbed run.
fn sweep(fault: &str, codes: &[Option<i32>], share: u64) {
    let Undisturbed { results: expected, changes, reads } = undisturbed();
    let calls = if fault == "read" { *reads } else { *changes };
    for at in places(calls, share) {
        let work = small();
        let hurt = faulty(&work, fault, at);
        assert!(codes.contains(&hurt.code), "{fault} at {at} of {calls}: {:?}\n{}", hurt.code, hurt.stderr);
        if hurt.code != Some(0) {
            let message = std::fs::read(work.path("termination.json")).unwrap_or_default();
            let message = serde_json::from_slice::<serde_json::Value>(&message).ok();
            // A process that is killed before or during its first message, and a full disk, leave no message.
            let fails_for_good = ["full", "bad"].contains(&fault);
            let speechless = hurt.code.is_none() || fails_for_good;
            assert!(message.is_some() || speechless, "{fault} at {at}: no last word");
            // On such a disk, the message that was written ahead stays.
            if let Some(message) = message.filter(|_| !fails_for_good) {
                let code = hurt.code.map_or(137, i64::from);
                // It was killed behind its last word. Success is said only if everything is there.
                if code == 137 && message["code"] == 0 {
                    assert!(results(&work) == *expected, "{fault} at {at}: success is said too early");
                } else {
                    assert_eq!(message["code"].as_i64(), Some(code), "{fault} at {at}: {message}");
                    assert_eq!(message["retry_helps"], true, "{fault} at {at}: {message}");
                }
            }
        }
        let again = end(&mut plain(&work));
        assert_eq!(again.code, Some(0), "after {fault} at {at} of {calls}:\n{}", again.stderr);
        assert!(results(&work) == *expected, "after {fault} at {at} of {calls}: other bytes");
        for folder in ["out", "out/checkpoints", "image", "image/blobs/sha256"] {
            let left = work
                .list(folder)
                .into_iter()
                .find(|name| name.contains("partial") || name.starts_with(".tmp"));
            assert_eq!(left, None, "after {fault} at {at}: litter in {folder}");
        }
    }
}

/// Returns the calls that a fault comes at: each of the first, which claim a folder, and a share of the others; or what
/// HONE_FAULTS says.
fn places(calls: u64, share: u64) -> Vec<u64> {
    let first = 12.min(calls);
    let chosen = match std::env::var("HONE_FAULTS") {
        Err(_) => {
            let every = usize::try_from(calls.div_ceil(share)).unwrap();
            return (1..=first).chain((first + 1..=calls).step_by(every)).collect();
        }
        Ok(all) if all == "all" => 1..=calls,
        Ok(range) => {
            let ends = range.split_once('-').map(|(from, to)| (from.parse().ok(), to.parse().ok()));
            let Some((Some(from), Some(to))) = ends else { panic!("HONE_FAULTS={range}: all or 1-20") };
            from..=calls.min(to)
        }
    };
    println!("calls {} to {} of {calls}", chosen.start(), chosen.end());
    chosen.collect()
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
fn a_call_that_cannot_read_is_told_as_such_and_a_run_ends_in_the_same_bytes() {
    sweep("read", &[Some(21), Some(23), Some(0)], 40);
}

#[test]
fn killed_after_any_call_a_run_ends_in_the_same_bytes() {
    sweep("after", &[None, Some(0)], 10);
}

#[test]
fn a_disk_that_fails_for_good_is_told_as_such_and_a_run_ends_in_the_same_bytes() {
    sweep("bad", &[Some(21), Some(23), Some(0)], 6);
}

#[test]
fn a_short_write_changes_nothing() {
    sweep("short", &[Some(0)], 6);
}

#[test]
fn two_signals_at_any_call_leave_a_run_that_ends_in_the_same_bytes() {
    sweep("twice", &[Some(30), Some(31), Some(0), None], 6);
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
    for (signals, code) in [
        (&[SIGKILL][..], 137),
        (&[SIGABRT], 70),
        (&[SIGSEGV], 70),
        (&[SIGBUS], 21),
        (&[SIGTERM, SIGTERM], 31),
    ] {
        let mut long = arguments();
        long[4] = "data.parquet";
        long.extend([
            "--set",
            "TrainingArguments.max_steps=5000",
            "--set",
            "TrainingArguments.save_strategy=no",
        ]);
        // One micro-batch of all rows, so that the first of two signals has to wait for its end.
        let batch = match signals.len() {
            1 => "per_device_train_batch_size=4",
            _ => "per_device_train_batch_size=400",
        };
        for key in [batch, "packing=false", "logging_steps=1", "max_length=512", "eval_strategy=no"] {
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

/// A file that is mapped and cut, or lies on a disk that fails, ends the process by SIGBUS.
#[test]
fn a_token_cache_that_is_cut_while_it_is_used_ends_with_21_and_the_run_continues() {
    let mut many = arguments();
    many.extend(["--set", "TrainingArguments.max_steps=150", "--set", "TrainingArguments.save_steps=20"]);
    let calm = small();
    assert_eq!(calm.run(&many).code, Some(0));
    let work = small();
    let mut hurt = work.start(&many);
    hurt.until("a step", || {
        std::fs::metadata(work.path("out/metrics.jsonl")).is_ok_and(|file| file.len() > 0)
    });
    let tokens = work.path("home/.cache/hone/tokens");
    for entry in std::fs::read_dir(tokens).unwrap().flatten() {
        if let Ok(file) = std::fs::File::options().write(true).open(entry.path().join("tokens")) {
            file.set_len(0).unwrap();
        }
    }
    let (code, log) = hurt.end();
    assert_eq!(code, Some(21), "{log}");
    let message = work.json("termination.json");
    assert_eq!((&message["code"], &message["retry_helps"]), (&21.into(), &true.into()), "{message}");
    let again = work.run(&many);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert!(results(&work) == results(&calm), "the continued run ends in other bytes");
}

/// Limits of the machine are no defect of hone, and no mistake of the configuration.
#[test]
fn a_machine_without_open_files_or_room_for_a_file_is_told_as_such() {
    for (limit, code, said) in [("ulimit -n 12", 22, "ulimit -n"), ("ulimit -f 40", 21, "File too large")] {
        let work = small();
        let hone = work.hone(&arguments());
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{limit}; exec \"$0\" \"$@\"")]);
        command.arg(hone.get_program()).args(hone.get_args()).current_dir(work.path(""));
        command.env_clear().envs(hone.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let ended = end(&mut command);
        assert_eq!(ended.code, Some(code), "{limit}: {}", ended.stderr);
        assert!(ended.stderr.contains(said), "{limit}: {}", ended.stderr);
        assert_eq!(work.json("termination.json")["code"], code);
        let again = work.run(&arguments());
        assert_eq!(again.code, Some(0), "{}", again.stderr);
    }
}

#[test]
fn a_server_that_is_killed_leaves_a_word() {
    let work = Work::with_llama();
    for (signal, code) in [(SIGKILL, 137), (SIGABRT, 70)] {
        let mut serving = work.start(&["serve", "model", "--listen", "127.0.0.1:0"]);
        serving.until("a word", || work.path("termination.json").exists());
        serving.until("the server", || work.text("log").contains("listening"));
        serving.signal(signal);
        let (_, log) = serving.end();
        let message = work.json("termination.json");
        assert_eq!(message["code"], code, "{message}\n{log}");
        std::fs::remove_file(work.path("termination.json")).unwrap();
    }
}

#[test]
fn a_folder_in_use_is_a_reason_to_try_again() {
    let work = small();
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
    /// 1 GB beyond what a run over the small model takes.
    const KIB_MAX: u64 = (1 << 20) + 150_000;
    let began = Instant::now();
    let hone = work.hone(&[]);
    let mut command = Command::new("sh");
    // In kilobytes. A machine's threads reserve some gigabytes that they never use.
    command.args(["-c", "ulimit -v 12000000; exec \"$0\" \"$@\""]).arg(hone.get_program());
    command.args(RUN).args(["--log", "terminal", "--set", "TrainingArguments.max_steps=1"]).args(more);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("RAYON_NUM_THREADS", "2");
    command.env("HONE_TERMINATION_LOG", work.path("termination.json")).current_dir(work.path(""));
    let mut running = work.start_command(&mut command, "stderr");
    let kib = running.memory_peak();
    let (code, stderr) = running.end();
    let ended = Ended { code, stdout: String::new(), stderr };
    assert!(began.elapsed() < LIMIT, "{:?}\n{}", began.elapsed(), ended.stderr);
    assert!(kib < KIB_MAX, "{kib} KiB\n{}", ended.stderr);
    println!("{kib} KiB, {:?}: {more:?}", began.elapsed());
    let message = work.json("termination.json");
    assert_eq!(message["code"].as_i64(), ended.code.map(i64::from), "{message}\n{}", ended.stderr);
    for name in FINAL {
        assert!(!work.path("out").join(name).exists(), "{name}\n{}", ended.stderr);
    }
    ended
}

/// Returns the footer's schema, a chain of groups, as Thrift writes it.
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

/// Returns one text that a dictionary holds once, in so many rows.
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
        // 192 MB each, half as much again as so small a file may hold.
        ("a text in many rows", repeated_text(1 << 20, 192), "made to fill the memory"),
        ("a large text in many rows", repeated_text(8 << 20, 24), "made to fill the memory"),
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

/// A server reads a model's templates and tokenizer within the same bounds.
#[test]
fn a_server_over_a_hostile_template_serves_or_ends_with_12() {
    let nested = "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}";
    let chain = format!("{{{{ messages{} }}}}", ".b".repeat(100_000));
    for template in [nested, &chain] {
        let work = Work::with_llama();
        work.write("model/chat_template.jinja", template);
        let hone = work.hone(&[]);
        let mut command = Command::new("timeout");
        command.args(["-s", "TERM", "5"]).arg(hone.get_program()).args(["serve", "model"]);
        command.args(["--listen", "127.0.0.1:0", "--log", "terminal"]).env_clear();
        command.env("HONE_TERMINATION_LOG", work.path("termination.json")).current_dir(work.path(""));
        command.env("PATH", std::env::var_os("PATH").unwrap());
        let ended = end(&mut command);
        // 124: it served until it was stopped.
        assert!([Some(12), Some(124)].contains(&ended.code), "{:?}\n{}", ended.code, ended.stderr);
        assert!(ended.code == Some(124) || work.json("termination.json")["code"] == 12);
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
fn absurd_numbers_of_keys_are_refused_or_used() {
    const MOST: &str = "9223372036854775807";
    for (key, value, codes) in [
        ("LoraConfig.r", MOST, &[10][..]),
        ("LoraConfig.r", "1000000", &[14, 0]),
        ("LoraConfig.rank_pattern", "{q_proj: 1e300}", &[10]),
        ("TrainingArguments.per_device_train_batch_size", MOST, &[0]),
        ("TrainingArguments.gradient_accumulation_steps", MOST, &[0]),
        ("TrainingArguments.max_length", MOST, &[0]),
        ("TrainingArguments.learning_rate", "5e-324", &[15]),
        ("TrainingArguments.max_grad_norm", "1e-320", &[15]),
        ("TrainingArguments.adam_epsilon", "0", &[15]),
        ("LoraConfig.lora_alpha", "1e308", &[15]),
        ("TrainingArguments.num_train_epochs", "1e300", &[10]),
        ("answers", MOST, &[0]),
        ("spike_window", MOST, &[10]),
    ] {
        let work = small();
        let mut command = plain(&work);
        command.args(["--set", &format!("{key}={value}"), "--set", "spike_policy=stop"]);
        let ended = end(&mut command);
        assert!(
            codes.contains(&ended.code.unwrap_or(-1)),
            "{key}={value}: {:?}\n{}",
            ended.code,
            ended.stderr
        );
    }
}

/// Puts a pipe without a writer in place of a file.
fn pipe(work: &Work, name: &str) {
    let _ = std::fs::remove_file(work.path(name));
    assert!(Command::new("mkfifo").arg(work.path(name)).status().unwrap().success());
}

#[test]
fn pipes_and_endless_files_are_refused_at_once() {
    let texts = ["tokenizer_config", "special_tokens_map", "generation_config", "chat_template"];
    let texts = texts.map(|name| format!("model/{name}.json"));
    let weights =
        ["model/model.safetensors", "model/tokenizer.json", "model/chat_template.jinja"].map(String::from);
    for name in texts.iter().chain(&weights) {
        let work = Work::with_llama();
        pipe(&work, name);
        let ended = attacked(&work, &[]);
        assert!(
            ended.code == Some(12) && ended.stderr.contains("not a plain file"),
            "{name}: {}",
            ended.stderr
        );
    }
    let work = Work::with_llama();
    pipe(&work, "data.parquet");
    assert_eq!(attacked(&work, &[]).code, Some(11));
    for (flag, code) in [("--ca-file", 10), ("--docker-config", 13), ("--config", 10), ("--init-adapter", 10)]
    {
        let more = ["--data", "https://127.0.0.1:1/x", "--push", "127.0.0.1:1/a:1"];
        let work = Work::with_llama();
        pipe(&work, "pipe");
        for place in ["pipe", "/dev/zero"] {
            // No writer ever comes to the pipe of a configuration; a shell's own has one, so that it is waited for.
            if (flag, place) == ("--config", "pipe") {
                continue;
            }
            let ended = attacked(&work, &[&[flag, place][..], &more].concat());
            let codes = [Some(code), Some(12), Some(20), Some(10)];
            assert!(codes.contains(&ended.code), "{flag} {place}: {:?}\n{}", ended.code, ended.stderr);
        }
    }
}

#[test]
fn pipes_in_the_output_folder_hang_nothing() {
    let work = small();
    assert_eq!(end(&mut plain(&work)).code, Some(0));
    for name in ["timeline.jsonl", "metrics.jsonl", "report.json", "report.html", "README.md"] {
        std::fs::remove_file(work.path("out/fine_tuning_completed.txt")).unwrap();
        pipe(&work, &format!("out/{name}"));
        let mut running = work.start_command(&mut plain(&work), "log");
        running.until("the end", || work.path("out/fine_tuning_completed.txt").exists());
        assert_eq!(running.end().0, Some(0), "{name}");
        let _ = std::fs::remove_file(work.path(&format!("out/{name}")));
    }
    pipe(&work, "termination.json");
    let mut running = work.start_command(&mut plain(&work), "log");
    let began = Instant::now();
    running.until("the end", || {
        began.elapsed() > Duration::from_millis(200) || work.text("log").contains("image")
    });
    assert_eq!(running.end().0, Some(0), "a last word into a pipe");
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

/// The texts that no output may hold.
const CANARY: &str = "CANARYcanaryCANARY0123456789";

/// Arguments of `hone run`, by `|`; § is the secret.
const ARGUMENTS: [&str; 51] = [
    "--data|https://user:§@127.0.0.1:1/x?sig=§#§",
    "--data|https//user:§@host/x?sig=§",
    "--data|http:/user:§@host/x?sig=§",
    "--data|http:user:§@host/x",
    "--data|user:§@host/x?sig=§",
    "--data|host/x.parquet?sig=§",
    "--data|ftp://user:§@host/x",
    "--data|file://user:§@host/x?sig=§",
    "--data|oci://user:§@host/x",
    "--data|http://127.0.0.1:99999/x?sig=§",
    "--data|http://user:§@169.254.169.254/x?sig=§",
    "--data|hf://user:§@host/x",
    "--data|HTTPS://USER:§@127.0.0.1:1/x?X-Amz-Signature=§",
    "--data|//user:§@host/x?sig=§",
    "--data|https:\\\\user:§@host\\x?sig=§",
    "--data|https://127.0.0.1:1/x#sha256=§",
    "--data|https://127.0.0.1:1/x?a=1&token=§#layout=text",
    "--data|s3://key:§@bucket/x?sig=§",
    "--data|gs://user:§@bucket/x?sig=§",
    "--data|az://user:§@container/x?sig=§",
    "--model|https://user:§@host/m?sig=§",
    "--model|https//user:§@host/m?sig=§",
    "--model|user:§@host/m?sig=§",
    "--model|hf://user:§@host/m?sig=§",
    "--model|oci://user:§@host/m?sig=§",
    "--model|s3://user:§@bucket/m?sig=§",
    "--push|https://user:§@host/a:1",
    "--push|user:§@host/a:1",
    "--push|oci:https://user:§@host/a:1",
    "--output|https://user:§@host/o?sig=§",
    "--ca-file|https://user:§@host/o?sig=§",
    "--docker-config|https://user:§@host/o?sig=§",
    "--cache|https://user:§@host/o?sig=§",
    "--set|https://user:§@host/k?sig=§=1",
    "--set|TrainingArguments.https://user:§@host/k=1",
    "--set|TrainingArguments.learning_rate=https://user:§@host/k?sig=§",
    "--set|TrainingArguments.output_dir=https://user:§@host/o?sig=§",
    "--set|TrainingArguments.learning_rate=§",
    "--set|TrainingArguments.max_steps=§",
    "--set|TrainingArguments.save_strategy=§",
    "--set|TrainingArguments.packing=§",
    "--set|data=https://user:§@127.0.0.1:1/x?sig=§",
    "--set|mlflow=http://user:§@127.0.0.1:1/x?token=§|--set|TrainingArguments.report_to=[mlflow]",
    "--set|pushgateway=http://user:§@127.0.0.1:1/x?token=§",
    "--set|otlp=http://user:§@127.0.0.1:1/x?token=§",
    "--config|https://user:§@host/c.yaml?sig=§",
    "--init-adapter|https://user:§@host/a?sig=§",
    "--token|https://user:§@host/a?sig=§",
    "--metrics|https://user:§@host:1/a?sig=§",
    "https://user:§@host/job.yaml?sig=§",
    "user:§@host/job.yaml?sig=§",
];

/// A variable of the environment, its value, and the arguments that make use of it.
const VARIABLES: [(&str, &str, &str); 14] = [
    ("HTTPS_PROXY", "http://user:§@127.0.0.1:1", "--data|https://127.0.0.2:1/x"),
    ("HTTP_PROXY", "http//user:§@127.0.0.1", "--data|http://127.0.0.2:1/x"),
    ("HF_TOKEN", "§\u{e9}", "--model|hf://org/tiny"),
    ("HF_ENDPOINT", "https://user:§@127.0.0.1:1?t=§", "--model|hf://org/tiny"),
    ("HONE_REGISTRY_PASSWORD", "§", "--push|127.0.0.1:1/a:1"),
    ("AWS_SECRET_ACCESS_KEY", "§", "--data|s3://bucket/x.parquet"),
    ("AWS_ENDPOINT_URL", "http://user:§@127.0.0.1:1", "--data|s3://bucket/x.parquet"),
    ("AZURE_STORAGE_ACCOUNT_KEY", "§", "--data|az://container/x.parquet"),
    ("GOOGLE_SERVICE_ACCOUNT_KEY", "{\"private_key\": \"§", "--data|gs://bucket/x.parquet"),
    ("MLFLOW_TRACKING_URI", "http://user:§@127.0.0.1:1?t=§", "--set|TrainingArguments.report_to=[mlflow]"),
    (
        "MLFLOW_TRACKING_TOKEN",
        "§",
        "--set|mlflow=http://127.0.0.1:1|--set|TrainingArguments.report_to=[mlflow]",
    ),
    ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=§", "--set|otlp=http://127.0.0.1:1"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:§@127.0.0.1:1", ""),
    ("YAML_FILE_PATH", "https://user:§@host/c.yaml?sig=§", ""),
];

/// The content of a file, and the arguments that read it.
const FILES: [(&str, &str); 9] = [
    ("training_config:\n  TrainingArguments: {learning_rate: §}\n", "--config|file"),
    ("training_config:\n  TrainingArguments: {https://user:§@h/x: 1}\n", "--config|file"),
    ("training_config:\n  TrainingArguments: {report_to: \"https://user:§@h\n", "--config|file"),
    ("data: [{url: \"https://user:§@127.0.0.1:1/x?sig=§\", weight: many}]\n", "file"),
    ("push: https://user:§@host/a:1\n§\n", "file"),
    ("{\"auths\": {\"127.0.0.1:1\": {\"auth\": \"§\"}}}", "--docker-config|file|--push|127.0.0.1:1/a:1"),
    (
        "{\"auths\": {\"127.0.0.1:1\": {\"password\": \"§\", \"username\": 5}}}",
        "--docker-config|file|--push|127.0.0.1:1/a:1",
    ),
    ("{\"auths\": {\"127.0.0.1:1\": \"§", "--docker-config|file|--push|127.0.0.1:1/a:1"),
    ("-----BEGIN PRIVATE KEY-----\nC\n", "--ca-file|file|--data|https://127.0.0.1:1/x"),
];

/// The first 56 are the ways in of the attack that this test comes from; each has its case here.
#[test]
fn no_way_in_shows_a_secret() {
    assert!(ARGUMENTS.len() + VARIABLES.len() + FILES.len() >= 56);
    let filled = |text: &str| text.replace('§', CANARY);
    let split =
        |text: &str| -> Vec<String> { text.split('|').filter(|part| !part.is_empty()).map(filled).collect() };
    for arguments in ARGUMENTS {
        let arguments = split(arguments);
        for command in ["run", "plan"] {
            shows_nothing(&Work::with_llama(), command, &arguments, None);
        }
    }
    for (name, value, arguments) in VARIABLES {
        let work = Work::with_llama();
        shows_nothing(&work, "run", &split(arguments), Some((name, &filled(value))));
    }
    for (content, arguments) in FILES {
        let work = Work::with_llama();
        work.write("file", filled(content));
        shows_nothing(&work, "run", &split(arguments), None);
    }
}

/// Runs a command whose secret must be in none of its outputs, in a network namespace of its own, so that no request
/// leaves the machine even if hone fails to refuse it. Its waits are short: they pass on its own clock.
fn shows_nothing(work: &Work, command: &str, arguments: &[String], variable: Option<(&str, &str)>) {
    let plain = work.hone(&[]);
    let mut hone = Command::new("unshare");
    hone.args(["--map-root-user", "--net"]).arg(plain.get_program()).args([command, "--log", "terminal"]);
    hone.env_clear().envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    hone.current_dir(work.path("")).stdin(std::process::Stdio::null());
    if !arguments.iter().any(|part| part == "--model") {
        hone.args(["--model", "model"]);
    }
    if !arguments.iter().any(|part| part == "--data") {
        hone.args(["--data", "data.parquet"]);
    }
    if !arguments.iter().any(|part| part == "--output") && command == "run" {
        hone.args(["--output", "out"]);
    }
    hone.args(["--set", "TrainingArguments.max_steps=1", "--set", "TrainingArguments.max_length=32"]);
    hone.args(arguments).env("RUST_LOG", "trace").env("RUST_BACKTRACE", "0");
    hone.env("HTTPS_PROXY", "http://127.0.0.1:1").env("HTTP_PROXY", "http://127.0.0.1:1");
    hone.env("HF_ENDPOINT", "http://127.0.0.1:1").env("HF_TOKEN", CANARY);
    hone.env("HONE_REGISTRY_USERNAME", "user").env("HONE_REGISTRY_PASSWORD", CANARY);
    hone.env("AWS_ACCESS_KEY_ID", "key").env("AWS_REGION", "r").env("AZURE_STORAGE_ACCOUNT_NAME", "a");
    hone.env("LD_PRELOAD", shim::shim()).env("FAULT_CLOCK", "0").env("FAULT_QUICK", "1");
    if arguments.iter().any(|part| part == "--docker-config") {
        hone.env_remove("HONE_REGISTRY_USERNAME").env_remove("HONE_REGISTRY_PASSWORD");
    }
    if let Some((name, value)) = variable {
        hone.env(name, value);
    }
    let log = std::fs::File::create(work.path("log")).unwrap();
    let mut child = hone.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(6) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // Its messages so far are judged.
    let _ = child.kill();
    let _ = child.wait();
    let kept =
        ["out/hone.json", "out/report.json", "out/report.html", "out/README.md", "out/adapter_config.json"];
    for name in ["log", "termination.json"].iter().chain(&kept) {
        let text = std::fs::read(work.path(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        assert!(
            !text.contains(CANARY),
            "{command} {arguments:?} {variable:?} shows its secret in {name}:\n{text}"
        );
    }
}
