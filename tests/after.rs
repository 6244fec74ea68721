//! `hone eval`, `hone try` and `hone merge`, the real program on a run's results: their output, their files, and their
//! refusals.

#[path = "support/job.rs"]
mod job;

use job::{Ended, Work};
use serde_json::Value;

/// Returns a finished run of the example, with answers of two held-out rows.
fn trained() -> Work {
    let work = Work::new();
    work.done(&["example", "try", "--write-only"]);
    work.done(&["run", "try/hone.yaml", "--answers", "2", "--log", "json"]);
    work
}

fn json_of(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.stdout))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn refused(work: &Work, code: i32, said: &str, arguments: &[&str]) {
    let ended = work.run(arguments);
    assert_eq!(ended.code, Some(code), "{arguments:?}: {}{}", ended.stdout, ended.stderr);
    assert!(ended.stderr.contains(said), "{arguments:?}: {}", ended.stderr);
}

/// Without a model, data or configuration on the command line: the folder remembers them.
#[test]
fn a_runs_folder_is_enough() {
    let work = trained();
    let record = work.json("try/adapter/hone.json");
    assert!(record["asked"]["model"].as_str().unwrap().ends_with("try/model"), "{record}");
    let answers = work.json("try/adapter/answers.json");
    assert_eq!((answers["pairs"].as_array().unwrap().len(), &answers["held_out"]), (2, &true.into()));
    assert_ne!(answers["pairs"][0]["base"]["text"], answers["pairs"][0]["tuned"]["text"]);

    let found = json_of(&work.done(&["eval", "try/adapter", "--format", "json", "--generate", "2"]));
    let (base, tuned) = (&found["without_adapter"], &found["with_adapter"]);
    // TOLERANCE: the run sums rows in other groups; f32.
    let of_run = number(&record["trained"]["eval_loss"]);
    assert!((number(&tuned["loss"]) - of_run).abs() < 1e-4, "{tuned} {of_run}");
    assert!(number(&base["loss"]) > number(&tuned["loss"]) + 1.0, "{found}");
    assert!((number(&tuned["perplexity"]) - number(&tuned["loss"]).exp()).abs() < 1e-9);
    assert!(number(&tuned["token_accuracy"]) > number(&base["token_accuracy"]), "{found}");
    assert_eq!(tuned["exact_match"]["of"], 2);
    assert_eq!((&found["rows"]["split"], &found["rows"]["trained_on"]), (&"evaluation".into(), &"no".into()));

    let table = work.done(&["eval", "try/adapter", "--generate", "0"]).stdout;
    for word in ["loss", "perplexity", "token accuracy", "held-out rows", "was not trained on them"] {
        assert!(table.contains(word), "{word}: {table}");
    }
    let train = json_of(&work.done(&[
        "eval",
        "try/adapter",
        "--split",
        "train",
        "--rows",
        "3",
        "--generate",
        "0",
        "--format",
        "json",
    ]));
    assert_eq!((&train["rows"]["used"], &train["rows"]["trained_on"]), (&3.into(), &"yes".into()));

    // No strength is the base; a strength of one half lies between.
    let at = |adapter: &str| {
        let arguments = ["eval", adapter, "--generate", "0", "--format", "json"];
        number(&json_of(&work.done(&arguments))["with_adapter"]["loss"])
    };
    assert!((at("try/adapter:0") - number(&base["loss"])).abs() < 1e-6);
    let half = at("try/adapter:0.5");
    assert!(half < number(&base["loss"]) && half > number(&tuned["loss"]), "{half}");
}

#[test]
fn other_data_is_evaluated_whole_and_its_origin_told() {
    let work = trained();
    let line =
        r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}"#;
    work.write("other.jsonl", format!("{line}\n{line}\n"));
    let found = json_of(&work.done(&[
        "eval",
        "try/adapter",
        "--data",
        "other.jsonl",
        "--generate",
        "0",
        "--format",
        "json",
    ]));
    let rows = &found["rows"];
    assert_eq!(
        (&rows["used"], &rows["split"], &rows["trained_on"]),
        (&2.into(), &"all".into(), &"no".into())
    );
    let same = json_of(&work.done(&[
        "eval",
        "try/adapter",
        "--data",
        "try/data.parquet",
        "--generate",
        "0",
        "--format",
        "json",
    ]));
    assert_eq!((&same["rows"]["split"], &same["rows"]["trained_on"]), (&"evaluation".into(), &"no".into()));
}

/// Rows that are named to evaluate on take the place of the share that the run set aside.
#[test]
fn named_rows_to_evaluate_on_are_the_held_out_ones() {
    let work = trained();
    let line =
        r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}"#;
    work.write("other.jsonl", format!("{line}\n{line}\n"));
    let rows = |file: &str, more: &[&str]| {
        let arguments =
            ["eval", "try/adapter", "--generate", "0", "--format", "json", "--evaluation-data", file];
        json_of(&work.done(&[&arguments[..], more].concat()))["rows"].clone()
    };
    let told = |rows: &Value| {
        (
            rows["used"].as_u64().unwrap(),
            rows["split"].clone(),
            rows["trained_on"].clone(),
            rows["files"].clone(),
        )
    };
    let others = (2, "evaluation".into(), "no".into(), serde_json::json!(["other.jsonl"]));
    assert_eq!(told(&rows("other.jsonl", &[])), others);
    assert_eq!(told(&rows("other.jsonl", &["--data", "try/data.parquet"])), others);
    let own = told(&rows("try/data.parquet", &["--data", "other.jsonl"]));
    assert_eq!((own.0, own.2), (200, "partly".into()));
}

/// Without held-out rows, a run's answers are to rows that it learned: that is told.
#[test]
fn answers_to_rows_that_were_trained_on_say_so() {
    let work = Work::new();
    work.done(&["example", "try", "--write-only"]);
    let arguments = ["run", "try/hone.yaml", "--answers", "2", "--log", "json", "--set"];
    let told = work.done(&[&arguments[..], &["DatasetConfig.train_test_split=1.0"]].concat()).stderr;
    let said = "no row is held out for evaluation: the answers will be to 2 rows that are trained on";
    assert_eq!(told.matches(said).count(), 1, "{told}");
    let answers = work.json("try/adapter/answers.json");
    assert_eq!((answers["pairs"].as_array().unwrap().len(), &answers["held_out"]), (2, &false.into()));
    assert!(work.text("try/adapter/report.html").contains("Prompts that were trained on"));
}

#[test]
fn base_and_tuned_model_answer_side_by_side() {
    let work = trained();
    let found =
        json_of(&work.done(&["try", "try/adapter", "--rows", "2", "--max-tokens", "8", "--format", "json"]));
    let pairs = found["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 2);
    for pair in pairs {
        assert!(
            pair["reference"].is_string() && pair["row"].as_str().unwrap().contains(".parquet:"),
            "{pair}"
        );
        assert!(pair["tuned"]["tokens"].as_u64().unwrap() <= 8);
    }
    let arguments = ["try", "try/adapter", "--prompt", "What is hone?", "--max-tokens", "8"];
    let text = work.done(&arguments).stdout;
    for word in ["prompt\n  What is hone?", "\nbase\n", "\ntuned\n"] {
        assert!(text.contains(word), "{word:?}: {text}");
    }
    assert_eq!(work.done(&arguments).stdout, text, "greedy answers repeat themselves");
}

#[test]
fn a_merged_folder_is_complete_and_measured() {
    let work = trained();
    let told = work.done(&["merge", "try/adapter", "--to", "merged"]);
    for word in ["base with adapter", "merged", "model.safetensors"] {
        assert!(told.stdout.contains(word), "{word}: {}", told.stdout);
    }
    // The example trains over NF4 weights.
    assert!(told.stderr.contains("was trained over nf4 in 4 bits"), "{}", told.stderr);
    assert!(told.stderr.contains("--onto trained"), "{}", told.stderr);
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"] {
        assert!(work.path("merged").join(name).exists(), "{name}");
    }
    assert!(!work.list(".").iter().any(|name| name.ends_with(".partial")), "{:?}", work.list("."));
    let told = work.done(&["merge", "try/adapter", "--to", "trained", "--onto", "trained"]);
    assert!(!told.stderr.contains("--onto trained merges"), "{}", told.stderr);
    refused(&work, 10, "holds", &["merge", "try/adapter", "--to", "merged"]);
    // An empty folder that is there may be a volume, or a link to one.
    std::fs::create_dir(work.path("volume")).unwrap();
    std::os::unix::fs::symlink("volume", work.path("link")).unwrap();
    work.done(&["merge", "try/adapter", "--to", "link", "--check-rows", "0"]);
    assert_eq!(work.list("volume"), work.list("merged"));
    assert_eq!(work.read("volume/model.safetensors"), work.read("merged/model.safetensors"));

    for kind in ["f16", "bf16", "q8_0", "f32"] {
        let to = format!("gguf-{kind}");
        work.done(&["merge", "try/adapter", "--to", &to, "--format", "gguf", "--type", kind]);
        assert_eq!(work.list(&to), [format!("model-{kind}.gguf")]);
    }
    work.done(&["merge", "try/adapter", "--to", "lora", "--format", "gguf", "--adapter-only"]);
    assert_eq!(work.list("lora"), ["adapter-f16.gguf"]);
}

/// The loss that `merge` prints for a merge into the weights of the training is that of base and adapter.
#[test]
fn a_merge_into_the_trainings_weights_keeps_the_loss() {
    let work = trained();
    let told = work.done(&["merge", "try/adapter", "--to", "m", "--onto", "trained", "--type", "f32"]).stdout;
    let line = told
        .lines()
        .find(|line| line.trim_start().starts_with("merged "))
        .unwrap_or_else(|| panic!("{told}"));
    let difference: f64 =
        line.split(['(', ')']).nth(1).and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{line}"));
    // TOLERANCE: products' inputs are rounded to bf16 in both; f32 weights take another path than 4-bit ones.
    assert!(difference.abs() <= 0.01, "{line}");
}

/// DoRA's magnitudes and trained tokens are evaluated, used in generation, and merged as they were trained.
#[test]
fn magnitudes_and_trained_tokens_go_all_the_way() {
    let work = Work::new();
    work.done(&["example", "try", "--write-only"]);
    let more = [
        "LoraConfig.use_dora=true",
        "LoraConfig.trainable_token_indices={embed_tokens: [257, 101], lm_head: [257]}",
    ];
    let told = work.done(&["run", "try/hone.yaml", "--log", "json", "--set", more[0], "--set", more[1]]);
    assert!(told.stderr.contains("vLLM loads no adapters with DoRA's magnitudes"), "{}", told.stderr);
    assert!(told.stderr.contains("vLLM loads no adapters with trained rows"), "{}", told.stderr);
    let config = work.json("try/adapter/adapter_config.json");
    assert_eq!(
        (&config["use_dora"], &config["trainable_token_indices"]["embed_tokens"][1]),
        (&true.into(), &101.into())
    );
    let found = json_of(&work.done(&["eval", "try/adapter", "--format", "json", "--generate", "2"]));
    let of_run = number(&work.json("try/adapter/hone.json")["trained"]["eval_loss"]);
    // TOLERANCE: the run sums rows in other groups; f32.
    let tuned = number(&found["with_adapter"]["loss"]);
    assert!((tuned - of_run).abs() < 1e-4, "{found} {of_run}");
    let base = number(&found["without_adapter"]["loss"]);
    assert!(base > tuned + 1.0, "{found}");
    let pairs = work.done(&["try", "try/adapter", "--rows", "1", "--max-tokens", "8", "--format", "json"]);
    assert_ne!(json_of(&pairs)["pairs"][0]["base"], json_of(&pairs)["pairs"][0]["tuned"]);
    let told = work.done(&["merge", "try/adapter", "--to", "m", "--onto", "trained", "--type", "f32"]).stdout;
    let line = told.lines().find(|line| line.trim_start().starts_with("merged ")).unwrap();
    let difference: f64 = line.split(['(', ')']).nth(1).and_then(|text| text.parse().ok()).unwrap();
    // TOLERANCE: products' inputs are rounded to bf16 in both; f32 weights take another path than 4-bit ones.
    assert!(difference.abs() <= 0.01, "{told}");
    let lora = ["merge", "try/adapter", "--to", "lora", "--format", "gguf", "--adapter-only"];
    refused(&work, 10, "has no place for DoRA's magnitudes", &lora);
}

#[test]
fn what_is_missing_or_wrong_is_told_with_its_code() {
    let work = Work::with_llama();
    work.copy("llama3/final_adapter", "adapter");
    work.copy("qwen2/model", "other");
    work.copy("ministral/model", "ministral");
    work.copy("ministral/final_adapter", "of-ministral");
    refused(&work, 10, "does not say where its base model is", &["eval", "adapter"]);
    refused(&work, 10, "there is no such folder", &["try", "none"]);
    refused(&work, 10, "holds no adapter_config.json", &["try", "model"]);
    refused(&work, 10, "no rows", &["eval", "adapter", "--model", "model"]);
    refused(
        &work,
        12,
        "the same base model",
        &["eval", "adapter", "--model", "other", "--data", "data.parquet"],
    );
    refused(&work, 2, "no number from -16 to 16", &["eval", "adapter:x"]);
    refused(&work, 2, "--adapter-only", &["merge", "adapter", "--to", "m", "--adapter-only"]);
    refused(&work, 2, "q8_0", &["merge", "adapter", "--to", "m", "--type", "q8_0"]);
    refused(&work, 2, "shard-size", &["merge", "adapter", "--to", "m", "--shard-size", "much"]);
    refused(&work, 2, "--to", &["merge", "adapter", "--model", "model"]);
    refused(&work, 2, "cannot be used with", &["try", "adapter", "--prompt", "Hi", "--rows", "2"]);
    refused(&work, 2, "cannot be used with", &["try", "adapter", "--prompt", "Hi", "--split", "all"]);
    refused(
        &work,
        12,
        "ministral models are not covered",
        &["merge", "of-ministral", "--model", "ministral", "--to", "m", "--format", "gguf"],
    );
    work.write("cut/adapter_config.json", work.read("adapter/adapter_config.json"));
    work.write("cut/adapter_model.safetensors", &work.read("adapter/adapter_model.safetensors")[..500]);
    refused(&work, 12, "cannot read", &["merge", "cut", "--model", "model", "--to", "m"]);
    refused(
        &work,
        10,
        "other/config.json",
        &["merge", "adapter", "--model", "model", "--to", "other/config.json"],
    );
    work.copy("llama3/model", "plain");
    let mut config = work.json("plain/tokenizer_config.json");
    config.as_object_mut().unwrap().remove("chat_template");
    work.write("plain/tokenizer_config.json", config.to_string());
    let asked = ["try", "adapter", "--model", "plain", "--prompt", "Hi", "--system", "Be brief."];
    refused(&work, 10, "--system: the model has no chat template", &asked);
    // A loss that is no number would be null in JSON, which a check for a limit may take for a good one.
    let mut loud = work.json("adapter/adapter_config.json");
    loud["lora_alpha"] = 1e38.into();
    work.write("loud/adapter_config.json", loud.to_string());
    work.write("loud/adapter_model.safetensors", work.read("adapter/adapter_model.safetensors"));
    let arguments = ["--model", "model", "--data", "data.parquet", "--rows", "2", "--generate", "0"];
    refused(&work, 12, "the loss of base and adapter is", &[&["eval", "loud"], &arguments[..]].concat());
    work.write("rows.jsonl", "{\"text\": 3}\n");
    refused(&work, 11, "rows.jsonl", &["eval", "adapter", "--model", "model", "--data", "rows.jsonl"]);
    assert!(work.list("m").is_empty() && !work.list(".").contains(&".m.partial".into()));
    // The same with the missing argument.
    let model = ["--model", "model", "--data", "data.parquet", "--rows", "2", "--generate", "0"];
    let found = work.done(&[&["eval", "adapter"], &model[..]].concat()).stdout;
    assert!(found.contains("no record says if"), "{found}");
}
