//! A run that is stopped and started again ends as if nothing had happened: with the same adapter and the same
//! metrics.

#[path = "support/http.rs"]
mod http;
#[path = "support/job.rs"]
mod job;

use http::{Reply, Server};
use job::{FINAL, Work};
use libc::{SIGHUP, SIGKILL, SIGTERM};

/// A run with everything that must be restored: dropout, shuffled order, micro-batches, packing, the mean since the
/// last logged line, evaluation. It has 60 steps of some 30 ms, so that signals come long before the end.
const KEYS: [&str; 14] = [
    "QuantizationConfig.load_in_4bit=true",
    "QuantizationConfig.bnb_4bit_quant_type=nf4",
    "LoraConfig.lora_dropout=0.1",
    "TrainingArguments.learning_rate=1e-3",
    "TrainingArguments.max_steps=60",
    "TrainingArguments.per_device_train_batch_size=2",
    "TrainingArguments.gradient_accumulation_steps=2",
    "TrainingArguments.packing=true",
    "TrainingArguments.logging_steps=3",
    "TrainingArguments.eval_strategy=steps",
    "TrainingArguments.eval_steps=20",
    "TrainingArguments.save_total_limit=3",
    "DatasetConfig.shuffle_dataset=true",
    "DatasetConfig.train_test_split=0.95",
];

/// Returns the run into `output`, with checkpoints as the last arguments say.
fn arguments<'a>(output: &'a str, save: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["run", "--model", "model", "--data", "data.parquet", "--output", output];
    for key in KEYS.iter().chain(save) {
        arguments.extend(["--set", key]);
    }
    arguments
}

const NEVER: [&str; 1] = ["TrainingArguments.save_strategy=no"];
const EVERY_2: [&str; 2] = ["TrainingArguments.save_strategy=steps", "TrainingArguments.save_steps=2"];

/// Waits for the line of this step or a later one.
fn until_step(running: &mut job::Running, work: &Work, step: u64) {
    let logged = || {
        let text = std::fs::read_to_string(work.path("out/metrics.jsonl")).unwrap_or_default();
        let line = text.lines().last().and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        line.is_some_and(|line| line["step"].as_u64().unwrap() >= step)
    };
    running.until(&format!("step {step} in metrics.jsonl"), logged);
}

fn nothing_final(work: &Work) {
    let found =
        work.list("out").into_iter().filter(|name| FINAL.contains(&name.as_str())).collect::<Vec<_>>();
    assert!(found.is_empty(), "before the end there is {found:?}");
}

/// Compares `out` with an undisturbed run of the same settings.
fn assert_undisturbed(work: &Work, save: &[&str]) {
    work.done(&arguments("straight", save));
    for name in ["metrics.jsonl", "adapter_model.safetensors", "adapter_config.json", "README.md"] {
        let (out, straight) = (format!("out/{name}"), format!("straight/{name}"));
        assert!(
            work.read(&out) == work.read(&straight),
            "{name} differs: {}",
            difference(work, &out, &straight)
        );
    }
    assert!(work.path("out/fine_tuning_completed.txt").exists());
}

/// Returns the first lines that differ between two text files.
fn difference(work: &Work, one: &str, two: &str) -> String {
    let [one, two] = [one, two].map(|name| String::from_utf8_lossy(&work.read(name)).into_owned());
    let pair = one.lines().zip(two.lines()).find(|(one, two)| one != two);
    pair.map_or("lengths".into(), |(one, two)| format!("\n{one}\n{two}"))
}

#[test]
fn after_sigterm_a_run_continues_to_the_same_bytes() {
    let work = Work::with_llama();
    for step in [3, 20] {
        let mut running = work.start(&arguments("out", &NEVER));
        until_step(&mut running, &work, step);
        running.signal(SIGTERM);
        let (code, log) = running.end();
        assert_eq!(code, Some(30), "{log}");
        assert!(log.contains("checkpoint written"), "{log}");
        assert_eq!(work.json("termination.json")["code"], 30);
        assert!(!work.list("out/checkpoints").is_empty());
        nothing_final(&work);
    }
    let last = work.done(&arguments("out", &NEVER));
    assert!(last.stderr.contains("continues after step"), "{}", last.stderr);
    assert_undisturbed(&work, &NEVER);
    assert!(!work.path("out/checkpoints").exists(), "an adapter without save_strategy needs no checkpoints");
}

/// The kernel and the shell both send SIGHUP if a terminal is closed, so that the second one must not end the run at
/// once.
#[test]
fn a_closed_terminal_writes_a_checkpoint_unless_nohup_ignores_it() {
    let work = Work::with_llama();
    let hang_up = |running: &job::Running| {
        running.signal(SIGHUP);
        std::thread::sleep(std::time::Duration::from_millis(20));
        running.signal(SIGHUP);
    };
    let mut running = work.start(&arguments("out", &NEVER));
    until_step(&mut running, &work, 3);
    hang_up(&running);
    let (code, log) = running.end();
    assert_eq!(code, Some(30), "{log}");
    assert!(log.contains("checkpoint written"), "{log}");

    let usual = work.hone(&arguments("out", &NEVER));
    let mut shielded = std::process::Command::new("nohup");
    shielded.env_clear().envs(usual.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shielded.arg(usual.get_program()).args(usual.get_args()).current_dir(work.path(""));
    shielded.stdin(std::process::Stdio::null());
    let mut running = work.start_command(&mut shielded, "log");
    until_step(&mut running, &work, 20);
    hang_up(&running);
    let (code, log) = running.end();
    assert_eq!(code, Some(0), "{log}");
    assert_undisturbed(&work, &NEVER);
}

/// The weights of the layers are streamed from host memory until the signal, and lie on the device afterwards.
#[test]
fn where_the_weights_lie_changes_no_byte() {
    const STREAMED: [&str; 2] = ["TrainingArguments.save_strategy=no", "residency=streamed"];
    let work = Work::with_llama();
    let mut running = work.start(&arguments("out", &STREAMED));
    until_step(&mut running, &work, 20);
    running.signal(SIGTERM);
    let (code, log) = running.end();
    assert_eq!(code, Some(30), "{log}");
    assert!(log.contains("weights of the layers are streamed"), "{log}");
    work.done(&arguments("out", &NEVER));
    assert_undisturbed(&work, &STREAMED);
    let refused = work.run(&arguments("none", &[NEVER[0], "residency=shared"]));
    assert_eq!(refused.code, Some(10), "{}", refused.stderr);
    assert!(refused.stderr.contains("residency: shared: one process trains"), "{}", refused.stderr);
}

/// Evaluations get worse after some steps at this rate, so that training stops early and the best adapter is restored.
#[test]
fn best_adapter_and_early_end_are_the_same_after_kills() {
    const BEST: [&str; 7] = [
        "TrainingArguments.load_best_model_at_end=true",
        "TrainingArguments.early_stopping_patience=2",
        "TrainingArguments.learning_rate=3e-2",
        "TrainingArguments.lr_scheduler_type=constant",
        "TrainingArguments.eval_steps=4",
        "TrainingArguments.save_strategy=steps",
        "TrainingArguments.save_steps=3",
    ];
    let work = Work::with_llama();
    for (step, signal) in [(6, SIGKILL), (9, SIGTERM)] {
        let mut running = work.start(&arguments("out", &BEST));
        until_step(&mut running, &work, step);
        running.signal(signal);
        running.end();
        nothing_final(&work);
    }
    let last = work.done(&arguments("out", &BEST));
    assert!(last.stderr.contains("stops early"), "{}", last.stderr);
    assert_undisturbed(&work, &BEST);
    let trained = work.json("out/hone.json")["trained"].clone();
    let (best, steps) = (trained["best"]["step"].as_u64().unwrap(), trained["steps"].as_u64().unwrap());
    assert!(best < steps && steps < 60, "{trained}");
    assert_eq!((&trained["restored_step"], &trained["stopped_early"]), (&best.into(), &true.into()));
    assert!(work.text("out/README.md").contains(&format!("step {best}, the best by eval_loss")));
    // The last adapter is another one.
    let mut last_one = BEST.to_vec();
    last_one[0] = "TrainingArguments.load_best_model_at_end=false";
    work.done(&arguments("last", &last_one));
    assert!(work.read("last/adapter_model.safetensors") != work.read("out/adapter_model.safetensors"));
    assert_eq!(work.json("last/hone.json")["trained"]["best"]["step"], best);
}

#[test]
fn after_sigkill_a_run_continues_from_its_newest_whole_checkpoint() {
    let work = Work::with_llama();
    for step in [6, 24] {
        let mut running = work.start(&arguments("out", &EVERY_2));
        until_step(&mut running, &work, step);
        running.signal(SIGKILL);
        assert_eq!(running.end().0, None);
        nothing_final(&work);
    }
    let steps = |work: &Work| -> Vec<u64> {
        let names = work.list("out/checkpoints");
        let mut steps: Vec<u64> =
            names.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort();
        steps
    };
    let saved = steps(&work);
    let newest = saved[saved.len() - 1];
    let tensors = format!("out/checkpoints/step-{newest}/tensors.safetensors");
    let mut bytes = work.read(&tensors);
    *bytes.last_mut().unwrap() ^= 1;
    work.write(&tensors, bytes);
    let last = work.done(&arguments("out", &EVERY_2));
    assert!(last.stderr.contains(&format!("checkpoint of step {newest} is not whole")), "{}", last.stderr);
    assert!(last.stderr.contains(&format!("continues after step {}", newest - 2)), "{}", last.stderr);
    assert_undisturbed(&work, &EVERY_2);
    assert_eq!(steps(&work), [56, 58, 60], "save_total_limit");
}

#[test]
fn a_signal_during_a_download_ends_it_and_what_came_is_kept() {
    let work = Work::with_llama();
    let content = work.read("data.parquet");
    let half = content.len() / 2;
    let server = Server::start(move |index, request| {
        let whole = Reply::file(request, &content, "\"v1\"");
        if index == 0 { whole.cut(half).stall() } else { whole }
    });
    let url = server.url("/data.parquet");
    let arguments = [
        "run",
        "--model",
        "model",
        "--data",
        &url,
        "--output",
        "out",
        "--set",
        "TrainingArguments.max_steps=1",
    ];
    let mut running = work.start(&arguments);
    running.until("request", || !server.requests().is_empty());
    running.signal(SIGTERM);
    let (code, log) = running.end();
    assert_eq!(code, Some(31), "{log}");
    assert!(log.contains("stopped by a signal before training began"), "{log}");
    nothing_final(&work);

    work.done(&arguments);
    assert!(work.path("out/adapter_model.safetensors").exists());
}

#[test]
fn a_second_signal_ends_at_once() {
    let work = Work::with_llama();
    // One micro-batch of all rows, so that the first signal has to wait for its end.
    let mut arguments = vec!["run", "--model", "model", "--data", "data.parquet", "--output", "out"];
    for key in [
        "packing=false",
        "per_device_train_batch_size=400",
        "logging_steps=1",
        "max_steps=100",
        "eval_strategy=no",
    ] {
        arguments.extend(["--set", ["TrainingArguments.", key].concat().leak()]);
    }
    let mut running = work.start(&arguments);
    until_step(&mut running, &work, 1);
    // The time is well into the second step, which takes more than a second.
    std::thread::sleep(std::time::Duration::from_millis(100));
    running.signal(SIGTERM);
    // Pending signals of one kind are merged, so some time separates them.
    std::thread::sleep(std::time::Duration::from_millis(20));
    running.signal(SIGTERM);
    let (code, log) = running.end();
    assert_eq!(code, Some(31), "{log}");
    nothing_final(&work);
    assert!(work.list("out/checkpoints").is_empty());
}
