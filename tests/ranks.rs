//! Several processes train one adapter. The result is the same for every number of them and every launcher, also if
//! something happens to one of them.
//!
//! `cargo test --test ranks chaos` tries 10 seeds (2 of ranks on GPUs), `HONE_CHAOS=300` so many; `HONE_SEED=N` begins
//! at that one. A seed draws which rank is killed at which call; a failing seed is named with them.
//!
//! `HONE_TEST_TORCHRUN` names a torchrun, which starts two ranks and restarts them.
//!
//! Ranks on GPUs run on the fake driver (`tests/gpu`), with a process and a GPU each. A few of NCCL's calls are tried;
//! `HONE_FAULTS=all cargo test --features cuda --test ranks nccl` kills each rank at every one of them.

#[path = "support/job.rs"]
mod job;
#[path = "support/random.rs"]
mod random;

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use job::{FINAL, Running, Work};
use libc::{SIGCONT, SIGKILL, SIGSTOP, SIGTERM};
use random::{Random, setting};

const SEEDS: u64 = 10;
/// LIMIT: a disturbed run takes a few seconds; the machine may be busy.
const RUN_MAX: Duration = Duration::from_secs(120);

const KEYS: [&str; 14] = [
    "QuantizationConfig.load_in_4bit=true",
    // Inputs rounded to bf16 would turn the rounding of sums into steps of 1/256.
    "QuantizationConfig.bnb_4bit_compute_dtype=float32",
    "LoraConfig.lora_dropout=0.1",
    "TrainingArguments.learning_rate=1e-3",
    // AdamW divides by a gradient's own size: without this floor, the rounding of the smallest gradients counts fully.
    "TrainingArguments.adam_epsilon=1e-3",
    "TrainingArguments.per_device_train_batch_size=4",
    "TrainingArguments.gradient_accumulation_steps=2",
    "TrainingArguments.logging_steps=1",
    "TrainingArguments.eval_strategy=steps",
    "TrainingArguments.eval_steps=4",
    "TrainingArguments.save_strategy=steps",
    "TrainingArguments.save_steps=2",
    "TrainingArguments.save_total_limit=2",
    "DatasetConfig.train_test_split=0.95",
];

fn arguments(output: &str, steps: u32, more: &[&str]) -> Vec<String> {
    let mut arguments =
        vec!["run", "--model", "model", "--data", "data.parquet", "--device", "cpu", "--output", output];
    for key in KEYS {
        arguments.extend(["--set", key]);
    }
    let steps = format!("TrainingArguments.max_steps={steps}");
    // Short passes, so that a step has one for each rank.
    arguments.extend(["--pass-tokens-max", "64", "--set", &steps]);
    arguments.extend(more);
    arguments.into_iter().map(str::to_owned).collect()
}

fn hone(work: &Work, arguments: &[String]) -> Command {
    work.hone(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Returns a whole run of so many ranks.
fn whole(work: &Work, output: &str, ranks: usize) -> Vec<u8> {
    let ranks = ranks.to_string();
    job::done(&mut hone(work, &arguments(output, 8, &["--ranks", &ranks])));
    work.read(&format!("{output}/adapter_model.safetensors"))
}

/// Three ranks, each of which holds a third of the base, train what three with whole bases train.
#[test]
fn a_shared_base_changes_no_byte() {
    let work = Work::with_llama();
    let whole = arguments("whole", 8, &["--ranks", "3", "--set", "answers=2"]);
    job::done(&mut hone(&work, &whole));
    let shared = arguments("shared", 8, &["--ranks", "3", "--set", "residency=shared", "--set", "answers=2"]);
    let ended = job::done(&mut hone(&work, &shared));
    assert!(ended.stderr.contains("shared over 3 ranks"), "{}", ended.stderr);
    assert!(ended.stderr.contains("rank 0 loads all of it for the answers"), "{}", ended.stderr);
    assert!(ended.stderr.contains("each rank read its share of the layers: rank 0 read"), "{}", ended.stderr);
    for file in ["adapter_model.safetensors", "answers.json"] {
        let read = |output: &str| work.read(&format!("{output}/{file}"));
        assert!(read("shared") == read("whole"), "{file} differs");
    }
}

/// Returns the values of an adapter: f32 behind the header of a safetensors file.
fn values(file: &[u8]) -> Vec<f32> {
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    file[8 + header..].chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect()
}

/// Returns the processes that `parent` started, by their rank.
fn children(parent: u32) -> HashMap<usize, i32> {
    let mut found = HashMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(process) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        if after_name.split(' ').nth(1) != Some(&parent.to_string()) || after_name.starts_with('Z') {
            continue;
        }
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        let rank = environment.split('\0').find_map(|pair| pair.strip_prefix("HONE_RANK="));
        found.extend(rank.and_then(|rank| rank.parse().ok()).map(|rank: usize| (rank, process)));
    }
    found
}

fn signal(process: i32, signal: i32) {
    // SAFETY: this is a plain system call on a process of this test.
    unsafe { libc::kill(process, signal) };
}

fn steps(work: &Work, output: &str) -> u64 {
    let text = std::fs::read_to_string(work.path(&format!("{output}/metrics.jsonl"))).unwrap_or_default();
    let last = text.lines().last().and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    last.map_or(0, |line| line["step"].as_u64().unwrap())
}

/// Starts ranks and waits until they have done so many steps; the process that started them, and the ranks.
fn started(
    work: &Work,
    ranks: usize,
    after: u64,
    variables: &[(&str, &str)],
) -> (Running, HashMap<usize, i32>) {
    let count = ranks.to_string();
    let mut command = hone(work, &arguments("out", 100_000, &["--ranks", &count]));
    command.envs(variables.iter().copied());
    let mut running = work.start_command(&mut command, "log");
    running.until("steps", || steps(work, "out") >= after);
    let children = children(running.process());
    assert_eq!(children.len(), ranks, "{children:?}");
    (running, children)
}

fn nothing_final(work: &Work) {
    assert!(work.list("out").iter().all(|name| !FINAL.contains(&name.as_str())), "{:?}", work.list("out"));
    assert!(!work.list("out/checkpoints").is_empty(), "a checkpoint is left to continue from");
}

fn all_gone(processes: impl IntoIterator<Item = i32>) {
    let began = Instant::now();
    for process in processes {
        // SAFETY: this is a plain system call; signal 0 only asks.
        while unsafe { libc::kill(process, 0) } == 0 {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            if stat.contains(") Z ") {
                break;
            }
            assert!(began.elapsed() < RUN_MAX, "process {process} is still there");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn any_number_of_ranks_trains_the_same_adapter() {
    let work = Work::with_llama();
    let one = whole(&work, "one", 1);
    let four = whole(&work, "four", 4);
    assert!(four == whole(&work, "again", 4), "the same number of ranks gives the same bytes");
    for adapter in [whole(&work, "two", 2), four] {
        let (one, many) = (values(&one), values(&adapter));
        assert_eq!(one.len(), many.len());
        let largest = one.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let apart = one.iter().zip(&many).fold(0.0f32, |apart, (one, many)| apart.max((one - many).abs()));
        assert!(apart <= 1e-5 * largest, "{apart} of {largest}");
    }
    // One of them reports: every step once, and one result.
    let ended = job::done(&mut hone(&work, &arguments("told", 8, &["--ranks", "3"])));
    assert!(ended.stderr.contains("3 ranks train together"), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("num_tokens").count(), 8, "{}", ended.stderr);
    assert_eq!(work.json("termination.json")["code"], 0);
}

/// Returns a process as torchrun starts it: by itself, with its place in the environment.
fn under_torchrun(work: &Work, rank: usize, world: usize, port: u16, arguments: &[String]) -> Command {
    let mut command = hone(work, arguments);
    place(&mut command, work, rank, world, port);
    command
}

/// Sets torchrun's variables.
fn place(command: &mut Command, work: &Work, rank: usize, world: usize, port: u16) {
    let number = |number: usize| number.to_string();
    command.env("RANK", number(rank)).env("WORLD_SIZE", number(world));
    command.env("LOCAL_RANK", number(rank)).env("LOCAL_WORLD_SIZE", number(world));
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command
        .env("TORCHELASTIC_USE_AGENT_STORE", "True")
        .env("TORCHELASTIC_RUN_ID", work.path("").display().to_string());
    command.env("HONE_TERMINATION_LOG", work.path(&format!("termination-{rank}.json")));
}

fn both(commands: [Command; 2]) -> Vec<job::Ended> {
    std::thread::scope(|scope| {
        let ends = commands.map(|mut command| scope.spawn(move || job::end(&mut command)));
        ends.into_iter().map(|end| end.join().unwrap()).collect()
    })
}

#[test]
fn ranks_of_torchrun_find_each_other_and_rank_0_speaks() {
    let work = Work::with_llama();
    let lines = arguments("out", 8, &[]);
    // torchrun's own store has the port.
    let store = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = store.local_addr().unwrap().port();
    let ended = both([0, 1].map(|rank| under_torchrun(&work, rank, 2, port, &lines)));
    assert_eq!((ended[0].code, ended[1].code), (Some(0), Some(0)), "{ended:?}");
    assert_eq!((ended[1].stdout.as_str(), ended[1].stderr.as_str()), ("", ""), "rank 0 speaks for both");
    assert_eq!(work.json("termination-0.json")["code"], 0);
    assert!(!work.path("termination-1.json").exists(), "one termination message");
    assert!(work.read("out/adapter_model.safetensors") == whole(&work, "launched", 2), "whoever starts them");
}

#[test]
fn ranks_with_other_settings_are_refused_with_both_values() {
    let work = Work::with_llama();
    let lines = [
        arguments("out", 8, &["--set", "TrainingArguments.weight_decay=0.5"]),
        arguments("out", 8, &["--set", "TrainingArguments.weight_decay=0.25"]),
    ];
    let ended = both([0, 1].map(|rank| under_torchrun(&work, rank, 2, 41_000, &lines[rank])));
    assert_eq!((ended[0].code, ended[1].code), (Some(22), Some(22)), "{ended:?}");
    let message = work.json("termination-0.json")["message"].as_str().unwrap().to_owned();
    let expected = "rank 1 was started with another run than rank 0: options: weight_decay: 0.25 there, weight_decay: 0.5 here";
    assert_eq!(message, expected);
    assert_eq!(ended[1].stderr, "", "rank 0 speaks for both");
    // Two ranks have one example each step between them.
    let small = arguments(
        "small",
        1,
        &[
            "--ranks",
            "2",
            "--set",
            "TrainingArguments.per_device_train_batch_size=1",
            "--set",
            "TrainingArguments.gradient_accumulation_steps=1",
        ],
    );
    let ended = job::done(&mut hone(&work, &small));
    assert!(ended.stderr.contains("a step has 1 examples for 2 ranks"), "{}", ended.stderr);
    // Half an environment is no rank.
    let mut half = hone(&work, &lines[0]);
    let ended = job::end(half.env("RANK", "0").env("WORLD_SIZE", "2"));
    assert!(
        ended.code == Some(10) && ended.stderr.contains("MASTER_ADDR is missing beside RANK"),
        "{ended:?}"
    );
}

/// Makes a copy of the llama with one byte changed, in the middle of a tensor of its second layer.
fn other_weights(work: &Work, folder: &str) {
    work.copy("llama3/model", folder);
    let file = format!("{folder}/model.safetensors");
    let mut bytes = work.read(&file);
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let places = &tensors["model.layers.1.mlp.up_proj.weight"]["data_offsets"];
    let middle = (places[0].as_u64().unwrap() + places[1].as_u64().unwrap()) as usize / 2;
    bytes[8 + header + middle] ^= 1;
    work.write(&file, bytes);
}

/// A volume that is not the same on every machine yet: a retry can help.
#[test]
fn ranks_with_other_weights_or_a_damaged_copy_end_with_a_code_that_is_tried_again() {
    let work = Work::with_llama();
    other_weights(&work, "other");
    work.copy("llama3/model", "damaged");
    work.write("damaged/config.json", "{");
    let port = |offset: u16| 41_100 + offset;
    for (offset, model, more, part) in [
        (0, "other", "residency=resident", "rank 1 has other weights than rank 0: layer 1 differs"),
        (1, "other", "residency=shared", "rank 1 has other weights than rank 0: layer 1 differs"),
        (2, "damaged", "residency=resident", "rank 0 found no such fault (model) in its own inputs"),
    ] {
        let output = format!("out-{offset}");
        let rank = |rank: usize| {
            let mut lines = arguments(&output, 8, &["--set", more]);
            if rank == 1 {
                lines.iter_mut().filter(|text| *text == "model").for_each(|text| *text = model.into());
            }
            let mut command = under_torchrun(&work, rank, 2, port(offset), &lines);
            command.env("HONE_RANKS_WAIT", "60");
            command
        };
        let ended = both([rank(0), rank(1)]);
        assert_eq!((ended[0].code, ended[1].code), (Some(22), Some(22)), "{model}, {more}: {ended:?}");
        let told = work.json("termination-0.json");
        assert!(told["message"].as_str().unwrap().contains(part), "{model}, {more}: {told}");
        assert_eq!(ended[1].stderr, "", "rank 0 speaks for both");
    }
}

#[test]
fn a_killed_rank_ends_all_with_one_message_and_the_run_continues() {
    let work = Work::with_llama();
    for (victim, message) in [(1, "process "), (0, "rank 0 of 3: the process was killed (signal 9)")] {
        let (running, ranks) = started(&work, 3, steps(&work, "out") + 3, &[]);
        signal(ranks[&victim], SIGKILL);
        let (code, log) = running.end();
        assert_eq!(code, Some(22), "{log}");
        let told = work.json("termination.json");
        let said = told["message"].as_str().unwrap();
        assert!(said.starts_with(&format!("rank {victim} of 3")) && said.contains("signal 9"), "{told}");
        assert!(said.contains(message), "{told}");
        assert_eq!(log.matches("signal 9").count(), 1, "{log}");
        all_gone(ranks.into_values());
        nothing_final(&work);
    }
}

#[test]
fn a_signal_to_any_process_writes_a_checkpoint_and_ends_all() {
    let work = Work::with_llama();
    for victim in [None, Some(0), Some(2)] {
        let (running, ranks) = started(&work, 3, steps(&work, "out") + 3, &[]);
        match victim {
            None => running.signal(SIGTERM),
            Some(rank) => signal(ranks[&rank], SIGTERM),
        }
        let (code, log) = running.end();
        assert_eq!(code, Some(30), "{victim:?}\n{log}");
        assert!(log.contains("checkpoint written"), "{log}");
        assert_eq!(work.json("termination.json")["code"], 30);
        all_gone(ranks.into_values());
        nothing_final(&work);
    }
}

#[test]
fn a_silent_rank_ends_all_in_the_stated_time() {
    let work = Work::with_llama();
    let (running, ranks) = started(&work, 2, 2, &[("HONE_RANKS_SILENCE", "6")]);
    signal(ranks[&1], SIGSTOP);
    let (code, log) = running.end();
    assert_eq!(code, Some(22), "{log}");
    assert!(work.json("termination.json")["message"].as_str().unwrap().ends_with("has been silent for 6 s"));
    signal(ranks[&1], SIGCONT);
    all_gone(ranks.into_values());
}

/// Returns one of two machines, as a pod of an Indexed Job.
fn pod(work: &Work, index: usize, port: u16, lines: &[String]) -> Command {
    let mut command = hone(work, lines);
    command.env("HONE_NODES", "2").env("JOB_COMPLETION_INDEX", index.to_string());
    command.env("HONE_MASTER_ADDR", "127.0.0.1").env("HONE_MASTER_PORT", port.to_string());
    command.env("HONE_TERMINATION_LOG", work.path(&format!("termination-{index}.json")));
    command
}

/// A container is restarted by its node alone, while the others still train: it waits, and meets them again.
#[test]
fn a_pod_that_is_restarted_alone_meets_the_others_again() {
    let work = Work::with_llama();
    let expected = whole(&work, "whole", 2);
    for (victim, port) in [(1, 41_200), (0, 41_201)] {
        let output = format!("out-{victim}");
        let lines = arguments(&output, 8, &[]);
        let start = |index: usize, log: &str| work.start_command(&mut pod(&work, index, port, &lines), log);
        let mut first = [start(0, "first-0"), start(1, "first-1")].map(Some);
        first[victim].as_mut().unwrap().until("steps", || steps(&work, &output) >= 3);
        let killed = first[victim].take().unwrap();
        killed.signal(SIGKILL);
        killed.end();
        let again = start(victim, &format!("again-{victim}"));
        let (code, log) = first[1 - victim].take().unwrap().end();
        assert_eq!(code, Some(22), "{log}");
        let other = start(1 - victim, &format!("again-{}", 1 - victim));
        for (code, log) in [again.end(), other.end()] {
            assert_eq!(code, Some(0), "{log}");
        }
        assert!(work.read(&format!("{output}/adapter_model.safetensors")) == expected, "pod {victim}");
    }
}

/// torchrun itself, if `HONE_TEST_TORCHRUN` names it: its agent restarts all ranks after one was killed.
#[test]
fn ranks_of_a_real_torchrun_continue_after_its_restart() {
    let Some(torchrun) = std::env::var_os("HONE_TEST_TORCHRUN") else { return };
    let work = Work::with_llama();
    let expected = whole(&work, "whole", 2);
    let lines = arguments("out", 8, &[]);
    let rank = r#"
        [ "$RANK$TORCHELASTIC_RESTART_COUNT" = 10 ] || exec "$@"
        "$@" & rank=$!
        until [ "$(cat out/metrics.jsonl 2>/dev/null | wc -l)" -ge 3 ]; do sleep 0.05; done
        kill -9 $rank; wait $rank"#;
    let mut command = Command::new(torchrun);
    command.args(["--no-python", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]);
    command.args(["sh", "-c", rank, "rank", env!("CARGO_BIN_EXE_hone")]).args(&lines);
    command.current_dir(work.path("")).env("HONE_TERMINATION_LOG", work.path("termination.json"));
    let ended = job::done(&mut command);
    assert!(ended.stderr.contains("training continues after step"), "{}", ended.stderr);
    assert!(work.read("out/adapter_model.safetensors") == expected, "whoever starts them, and restarts them");
}

#[test]
fn no_rank_outlives_the_process_that_started_it() {
    let work = Work::with_llama();
    let (running, ranks) = started(&work, 2, 1, &[]);
    running.signal(SIGKILL);
    assert_eq!(running.end().0, None);
    all_gone(ranks.into_values());
}

/// Makes one run of a seed: a rank is killed when it has sent so many bytes, and the run is started again.
fn chaos(seed: u64, expected: &[u8], work: &Work, sends: u64) -> Result<(), String> {
    let mut random = Random(seed);
    let output = format!("out-{seed}");
    let lines = arguments(&output, 8, &["--ranks", "3"]);
    for _ in 0..1 + random.below(2) {
        let (rank, at) = (random.below(3), 1 + random.next() % sends);
        let mut command = hone(work, &lines);
        command
            .env("LD_PRELOAD", shim::shim())
            .env("FAULT_SEND", at.to_string())
            .env("FAULT_RANK", rank.to_string());
        command.env("HONE_TERMINATION_LOG", work.path(&format!("termination-{seed}.json")));
        let began = Instant::now();
        let ended = job::end(&mut command);
        let what = format!("seed {seed}, rank {rank} at send {at}");
        match ended.code {
            Some(0) => break, // it had less to say
            Some(22) => {}
            code => return Err(format!("{what}: it ended with {code:?}\n{}", ended.stderr)),
        }
        let told = work.json(&format!("termination-{seed}.json"));
        let message = told["message"].as_str().unwrap_or_default();
        if !message.starts_with(&format!("rank {rank} of 3")) || began.elapsed() > RUN_MAX {
            return Err(format!("{what}: after {:?} {told}\n{}", began.elapsed(), ended.stderr));
        }
    }
    let ended = job::end(&mut hone(work, &lines));
    match ended.code == Some(0) && work.read(&format!("{output}/adapter_model.safetensors")) == expected {
        true => std::fs::remove_dir_all(work.path(&output)).map_err(|error| error.to_string()),
        false => Err(format!("seed {seed}: another adapter, or code {:?}\n{}", ended.code, ended.stderr)),
    }
}

#[path = "support/shim.rs"]
mod shim;

#[test]
fn chaos_kills_ranks_at_random_calls_and_the_bytes_stay() {
    let (first, count) = (setting("HONE_SEED").unwrap_or(1), setting("HONE_CHAOS").unwrap_or(SEEDS));
    let work = Work::with_llama();
    let expected = whole(&work, "undisturbed", 3);
    // How much rank 1 sends in a whole run bounds the draw.
    let mut counted = hone(&work, &arguments("counted", 8, &["--ranks", "3"]));
    counted.env("LD_PRELOAD", shim::shim()).env("FAULT_SENDS", work.path("sends")).env("FAULT_RANK", "1");
    job::done(counted.stdout(Stdio::null()));
    let sends: u64 = work.text("sends").trim().parse().unwrap();
    assert!(sends > 20, "the shim sees {sends} sends");
    let (next, failed) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while failed.lock().unwrap().len() < 5 {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    if let Err(what) = chaos(seed, &expected, &work, sends) {
                        failed.lock().unwrap().push(what);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

/// Ranks with a GPU each: processes on the fake driver, whose libnccl joins them.
#[cfg(feature = "cuda")]
mod gpus {
    use super::*;
    use hone::facts::config::Config;
    use hone::facts::family;
    use hone::model::random;

    const KEYS: [&str; 10] = [
        "QuantizationConfig.load_in_4bit=true",
        "QuantizationConfig.bnb_4bit_compute_dtype=float32",
        "TrainingArguments.learning_rate=1e-3",
        "TrainingArguments.adam_epsilon=1e-3",
        "TrainingArguments.per_device_train_batch_size=4",
        "TrainingArguments.logging_steps=1",
        "TrainingArguments.save_strategy=steps",
        "TrainingArguments.save_steps=1",
        "TrainingArguments.max_steps=3",
        "DatasetConfig.train_test_split=1",
    ];

    /// Returns whether the driver is the fake one; a real GPU cannot be shared by tests that kill processes.
    fn are_fake() -> bool {
        std::env::var_os("HONE_FAKE_GPU_ORDER").is_some()
    }

    /// Returns `hone run` with the variables of the fake driver. `count` is the number of GPUs that the driver shows.
    fn hone(work: &Work, output: &str, count: usize, more: &[&str]) -> Command {
        let mut arguments = vec!["run", "--model", "model", "--data", "data.parquet", "--output", output];
        KEYS.iter().for_each(|key| arguments.extend(["--set", key]));
        arguments.extend(["--pass-tokens-max", "64"]);
        arguments.extend(more);
        let mut command = work.hone(&arguments);
        for name in ["HONE_CUDA_LIBS", "LD_LIBRARY_PATH", "HONE_FAKE_GPU_ORDER", "HONE_FAKE_GPU_STATS"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        command.env("HONE_FAKE_GPU_COUNT", count.to_string()).env("HONE_FAKE_GPU_THREADS", "1");
        command
    }

    fn adapter(work: &Work, output: &str) -> Vec<u8> {
        work.read(&format!("{output}/adapter_model.safetensors"))
    }

    /// Trains on so many GPUs, and returns the adapter.
    fn whole(work: &Work, output: &str, count: usize, variables: &[(&str, &str)]) -> Vec<u8> {
        let mut command = hone(work, output, count, &["--gpus", "all"]);
        job::done(command.envs(variables.iter().copied()));
        adapter(work, output)
    }

    /// Returns the calls of NCCL that a rank made: what, and of how many values.
    fn calls(log: &str, rank: &str) -> Vec<(String, u64)> {
        let lines = log.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let own = lines.filter(|words| words[0] == rank);
        own.map(|words| (words[2].to_owned(), words[3].parse().unwrap())).collect()
    }

    #[test]
    fn two_gpus_train_what_one_does_and_repeat_their_bytes() {
        if !are_fake() {
            return;
        }
        let work = Work::with_llama();
        let one = whole(&work, "one", 1, &[]);
        let log = work.path("calls").display().to_string();
        let two = whole(&work, "two", 2, &[("HONE_FAKE_NCCL_LOG", &log)]);
        let (one, many) = (values(&one), values(&two));
        let largest = one.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let apart = one.iter().zip(&many).fold(0.0f32, |apart, (one, many)| apart.max((one - many).abs()));
        assert!(one.len() == many.len() && apart <= 1e-5 * largest, "{apart} of {largest}");
        // Both make the same calls: two when they connect, the parameters, and the same pieces in each step.
        let log = work.text("calls");
        let calls = calls(&log, "0");
        assert_eq!(calls, self::calls(&log, "1"));
        assert!(calls.iter().all(|(what, _)| what == "AllReduce"));
        let steps: Vec<&[(String, u64)]> = calls[3..].chunks((calls.len() - 3) / 3).collect();
        assert!(
            steps.len() == 3 && steps[0].len() > 1 && steps.iter().all(|step| *step == steps[0]),
            "{calls:?}"
        );
        let pieces: u64 = steps[0].iter().map(|(_, values)| values).sum();
        assert_eq!(pieces, 128 + calls[2].1, "gradients and losses");
        // Under torchrun's variables, with collectives that take their time: the same bytes.
        let store = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = store.local_addr().unwrap().port();
        let rank = |rank: usize| {
            let mut command = hone(&work, "launched", 2, &[]);
            place(&mut command, &work, rank, 2, port);
            command.env("HONE_FAKE_NCCL_DELAY", "10");
            command
        };
        let ended = both([rank(0), rank(1)]);
        assert_eq!((ended[0].code, ended[1].code), (Some(0), Some(0)), "{ended:?}");
        assert!(adapter(&work, "launched") == two, "whoever starts them");
    }

    /// Kills a rank at a call, and starts the run again.
    fn dies(work: &Work, rank: usize, call: usize, expected: &[u8], variables: &[(&str, &str)]) {
        let output = format!("dies-{rank}-{call}");
        let mut command = hone(work, &output, 2, &["--gpus", "all"]);
        command.envs(variables.iter().copied());
        let began = Instant::now();
        let ended = job::end(command.env("HONE_FAKE_NCCL_DIE", format!("{rank}:{call}")));
        let what = format!("rank {rank} at call {call}: {}", ended.stderr);
        assert_eq!(ended.code, Some(22), "{what}");
        assert!(began.elapsed() < RUN_MAX, "{what}");
        let told = work.json("termination.json")["message"].as_str().unwrap().to_owned();
        assert!(
            told.starts_with(&format!("rank {rank} of 2")) && told.contains("signal 9"),
            "{told}, {what}"
        );
        assert_eq!(ended.stderr.matches("signal 9").count(), 1, "{what}");
        let whole = whole(work, &output, 2, &[]);
        assert!(whole == expected, "{what}");
        std::fs::remove_dir_all(work.path(&output)).unwrap();
    }

    #[test]
    fn a_rank_that_dies_at_a_call_of_nccl_ends_all_and_the_run_continues() {
        if !are_fake() {
            return;
        }
        let work = Work::with_llama();
        let log = work.path("calls").display().to_string();
        let expected = whole(&work, "whole", 2, &[("HONE_FAKE_NCCL_LOG", &log)]);
        let last = calls(&work.text("calls"), "0").len();
        let all = std::env::var("HONE_FAULTS").is_ok_and(|value| value == "all");
        // While they connect; in the middle of the second step's pass; in the last sum.
        let few = vec![(1, 0), (1, 3 + (last - 3) / 3 + 1), (0, last)];
        let every = (0..=last).flat_map(|call| [(0, call), (1, call)]).collect();
        for (rank, call) in if all { every } else { few } {
            dies(&work, rank, call, &expected, &[]);
        }
    }

    /// Returns a llama of four layers, whose gradient has several pieces of one size.
    fn with_four_layers() -> Work {
        let work = Work::with_llama();
        let mut config = work.json("model/config.json");
        config["num_hidden_layers"] = 4.into();
        work.write("model/config.json", config.to_string());
        let facts = family::describe(&Config::from_json(config.as_object().unwrap().clone())).unwrap();
        random::write(&work.path("model"), &facts, 3).unwrap();
        work
    }

    /// Returns the numbers of two neighbouring sums of a later step that have the same size.
    fn alike(calls: &[(String, u64)]) -> usize {
        let pair =
            calls.windows(2).enumerate().skip(3 + (calls.len() - 3) / 3).find(|(_, pair)| pair[0] == pair[1]);
        1 + pair.unwrap_or_else(|| panic!("two pieces of one size: {calls:?}")).0
    }

    #[test]
    fn sums_in_another_order_are_noticed_before_anything_keeps_them() {
        if !are_fake() {
            return;
        }
        let work = with_four_layers();
        let log = work.path("calls").display().to_string();
        let expected = whole(&work, "whole", 2, &[("HONE_FAKE_NCCL_LOG", &log)]);
        let calls = calls(&work.text("calls"), "0");
        let (same, each) = (alike(&calls), (calls.len() - 3) / 3);
        // NCCL takes two sums of one size for each other. The last piece is never followed by the rest, since the ranks
        // wait for it before they exchange messages.
        let last_piece = 3 + 2 * each - 1;
        for (at, part) in [(same, "rank 1 does not compute what rank 0 computes"), (last_piece, " hang")] {
            let output = format!("swapped-{at}");
            let mut command = hone(&work, &output, 2, &["--gpus", "all"]);
            command.env("HONE_FAKE_NCCL_SWAP", format!("1:{at}")).env("HONE_RANKS_TIMEOUT", "20");
            let ended = job::end(&mut command);
            assert_eq!(ended.code, Some(22), "call {at}: {}", ended.stderr);
            assert!(ended.stderr.contains(part), "call {at}: {}", ended.stderr);
            assert_eq!(work.list(&format!("{output}/checkpoints")).len(), 1, "that of the first step");
            assert!(whole(&work, &output, 2, &[]) == expected, "call {at}: the checkpoint is a good one");
        }
    }

    /// A base that the GPUs share: the bytes of whole bases, however late its pieces are; and a gathering that a rank
    /// makes too late ends all.
    #[test]
    fn gpus_that_share_the_base_train_the_same_bytes_whatever_is_late() {
        if !are_fake() {
            return;
        }
        let work = with_four_layers();
        let expected = whole(&work, "whole", 2, &[]);
        let shared = |output: &str| hone(&work, output, 2, &["--gpus", "all", "--set", "residency=shared"]);
        for (seed, delay) in [("0", "0"), ("1", "3")] {
            let output = format!("shared-{seed}");
            let mut command = shared(&output);
            command.env("HONE_FAKE_NCCL_DELAY", delay).env("HONE_FAKE_NCCL_SEED", seed);
            let ended = job::done(&mut command);
            assert!(ended.stderr.contains("shared over 2 ranks"), "{}", ended.stderr);
            assert!(adapter(&work, &output) == expected, "delays of seed {seed}");
        }
        let mut command = shared("late");
        command.env("HONE_FAKE_NCCL_SWAP", "1:12").env("HONE_RANKS_TIMEOUT", "4");
        let ended = job::end(&mut command);
        assert_eq!(ended.code, Some(22), "{}", ended.stderr);
        assert!(ended.stderr.contains(" hang"), "{}", ended.stderr);
    }

    #[test]
    fn sums_that_are_late_at_random_change_no_byte() {
        if !are_fake() {
            return;
        }
        let work = with_four_layers();
        let expected = whole(&work, "whole", 2, &[]);
        let (first, count) = (setting("HONE_SEED").unwrap_or(1), setting("HONE_CHAOS").unwrap_or(2));
        for seed in first..first + count {
            let seed = seed.to_string();
            let late = [("HONE_FAKE_NCCL_DELAY", "4"), ("HONE_FAKE_NCCL_SEED", seed.as_str())];
            let output = format!("late-{seed}");
            assert!(whole(&work, &output, 2, &late) == expected, "seed {seed}");
            std::fs::remove_dir_all(work.path(&output)).unwrap();
        }
    }

    /// A rank dies at a random call while other calls are late at random, and the run is started again.
    #[test]
    fn chaos_on_gpus_kills_ranks_at_random_calls_and_the_bytes_stay() {
        if !are_fake() {
            return;
        }
        let work = Work::with_llama();
        let log = work.path("calls").display().to_string();
        let expected = whole(&work, "whole", 2, &[("HONE_FAKE_NCCL_LOG", &log)]);
        let last = calls(&work.text("calls"), "0").len() as u64;
        let (first, count) = (setting("HONE_SEED").unwrap_or(1), setting("HONE_CHAOS").unwrap_or(2));
        for seed in first..first + count {
            let mut random = Random(seed);
            let (rank, call) = (random.below(2), random.next() % (last + 1));
            let text = seed.to_string();
            let late = [("HONE_FAKE_NCCL_DELAY", "4"), ("HONE_FAKE_NCCL_SEED", text.as_str())];
            dies(&work, rank, call as usize, &expected, &late);
        }
    }

    #[test]
    fn a_gpu_that_hangs_in_nccl_or_makes_another_call_ends_all() {
        if !are_fake() {
            return;
        }
        let work = Work::with_llama();
        let ends = |output: &str, variables: &[(&str, &str)]| {
            let mut command = hone(&work, output, 2, &["--gpus", "all"]);
            let began = Instant::now();
            let ended = job::end(command.envs(variables.iter().copied()));
            assert!(ended.code == Some(22) && began.elapsed() < RUN_MAX, "{variables:?}\n{}", ended.stderr);
            work.json("termination.json")["message"].as_str().unwrap().to_owned()
        };
        // Both hosts wait for their GPUs, and beats go on.
        let told = ends("hang", &[("HONE_FAKE_NCCL_HANG", "1:6"), ("HONE_RANKS_TIMEOUT", "4")]);
        assert!(
            told.starts_with("rank 1 of 2 (")
                && told.contains("hangs: the other ranks have waited for it for 4 s"),
            "{told}"
        );
        // The first sum of the second step.
        let told = ends("other", &[("HONE_FAKE_NCCL_OTHER", "1:6")]);
        assert!(told.contains("NCCL: invalid usage: at call 6 rank "), "{told}");
        assert!(told.contains("17408 values") && told.contains("17407 values"), "{told}");
        assert!(!work.list("other/checkpoints").is_empty(), "a checkpoint is left to continue from");
    }
}
