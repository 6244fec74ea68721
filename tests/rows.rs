//! Datasets and adapters as people have them, run with the real binary: the learned tokens, the warnings, and the
//! messages of refusals. Users of fine-tuning tools reported each situation.

#[path = "support/job.rs"]
mod job;

use std::path::{Path, PathBuf};

use expect_test::{Expect, expect};
use job::Work;

const CONFIG: &str = "training_config:
  QuantizationConfig: {load_in_4bit: true, bnb_4bit_quant_type: nf4}
  LoraConfig: {r: 4, lora_alpha: 8}
  TrainingArguments: {max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1, learning_rate: 0.001, save_strategy: \"no\"}
  DatasetConfig: {shuffle_dataset: false, train_test_split: 1}
";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rows").join(name)
}

/// Returns a folder with `model/`, `config.yaml` and a fixture as `data.parquet`.
fn work(data: &str) -> Work {
    let work = Work::new();
    copy(&work, "tiny", "model");
    work.write("config.yaml", CONFIG);
    work.write("data.parquet", std::fs::read(fixture(data)).unwrap());
    work
}

fn copy(work: &Work, from: &str, to: &str) {
    for entry in std::fs::read_dir(fixture(from)).unwrap().map(|entry| entry.unwrap()) {
        let name = format!("{to}/{}", entry.file_name().to_str().unwrap());
        work.write(&name, std::fs::read(entry.path()).unwrap());
    }
}

/// Returns the line about what was learned, the warnings, and the fault, of a run with these further arguments.
fn said(work: &Work, arguments: &str) -> String {
    const RUN: &str =
        "run --log terminal --model model --data data.parquet --config config.yaml --output out --device cpu";
    let ended = work.run(&RUN.split(' ').chain(arguments.split_whitespace()).collect::<Vec<_>>());
    let told = |line: &&str| line.contains(" learned;") || line.contains("warning");
    let said: Vec<&str> = ended.stderr.lines().filter(told).collect();
    let fault = ended.stderr.find("error (").map_or("", |at| &ended.stderr[at..]);
    format!("{}\n{}exit {}\n", said.join("\n"), fault, ended.code.unwrap_or(-1))
}

fn check(data: &str, arguments: &str, expected: Expect) {
    expected.assert_eq(&said(&work(data), arguments));
}

#[test]
fn names_come_in_any_pairing() {
    check(
        "plain.parquet",
        "",
        expect![[r#"
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
    check(
        "conversations-role-content.parquet",
        "",
        expect![[r#"
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
}

#[test]
fn lists_of_any_kind_are_read_together() {
    let work = work("lists.parquet");
    work.write("more.parquet", std::fs::read(fixture("large-lists.parquet")).unwrap());
    expect![[r#"
        tokenize  8 rows: 272 tokens, 136 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]]
    .assert_eq(&said(&work, "--data more.parquet"));
}

#[test]
fn preferences_are_refused_unless_one_answer_is_named() {
    let work = work("plain.parquet");
    let pair = |answer: &str| {
        format!(
            r#"[{{"role": "user", "content": "1 + 1?"}}, {{"role": "assistant", "content": "{answer}"}}]"#
        )
    };
    work.write("lists.jsonl", format!(r#"{{"chosen": {}, "rejected": {}}}"#, pair("2"), pair("3")));
    work.write("texts.jsonl", r#"{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}"#);
    let alone = "--log terminal --model model --config config.yaml --output out --device cpu --data";
    let fault = |more: &str| {
        let arguments = format!("run {alone} {more}");
        let ended = work.run(&arguments.split_whitespace().collect::<Vec<_>>());
        (ended.code, ended.stderr)
    };
    for file in ["lists.jsonl", "texts.jsonl"] {
        let (code, told) = fault(file);
        assert_eq!(code, Some(11), "{told}");
        assert!(told.contains("pairs of a better and a worse answer"), "{told}");
    }
    let (code, told) = fault("lists.jsonl --set DatasetConfig.messages_column=chosen");
    assert_eq!(code, Some(0), "{told}");
    let (code, told) = fault("texts.jsonl --set DatasetConfig.response_column=chosen --earlier-results move");
    assert_eq!(code, Some(0), "{told}");
    // Data for KTO says of each answer whether it is wanted.
    work.write("labels.jsonl", r#"{"prompt": "1 + 1?", "completion": "3", "label": false}"#);
    let (code, told) = fault("labels.jsonl --earlier-results move");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("warning: if `label` says which answers are wanted"), "{told}");
}

#[test]
fn files_and_names_without_use_and_files_that_train_and_evaluate_are_told() {
    let work = work("plain.parquet");
    work.write("head.csv", "prompt,completion\n");
    work.write("none.json", "[]");
    expect![[r#"
        read      warning: 2 files hold no rows: head.csv, none.json
        read      warning: 1 of 1 files of evaluation_data are in data too (data.parquet), so that their rows are trained on and say nothing about new ones; leave them out of data
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]]
    .assert_eq(&said(&work, "--data head.csv --data none.json --evaluation-data data.parquet"));
    expect![[r#"
        read      warning: DatasetConfig.context_column has no effect: the layout of the rows has no such column
        read      warning: question_column has no effect: the layout of the rows has no such column
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]]
    .assert_eq(&said(
        &work,
        "--layout messages --set DatasetConfig.context_column=prompt --set question_column=q --earlier-results move",
    ));
    let alone = work.run(&[
        "run",
        "--model",
        "model",
        "--data",
        "none.json",
        "--output",
        "other",
        "--log",
        "terminal",
    ]);
    assert!(alone.code == Some(11) && alone.stderr.contains("the dataset has 0 rows"), "{}", alone.stderr);
}

#[test]
fn a_bad_row_is_refused_or_dropped_as_asked() {
    check(
        "one-empty-answer.parquet",
        "",
        expect![[r#"

        error (data, exit code 11): 1 of 5 rows cannot be used:
          1 x the assistant's content is empty (data.parquet:4)
          help: correct these rows, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)
        exit 11
    "#]],
    );
    check(
        "one-empty-answer.parquet",
        "--bad-rows drop",
        expect![[r#"
            read      warning: 1 of 5 rows cannot be used and are left out:\n  1 x the assistant's content is empty (data.parquet:4)\n  (places are file:row, counted from 0)
            tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
            exit 0
        "#]],
    );
    check(
        "one-empty-answer.parquet",
        "--bad-rows drop --bad-rows-max 0.1",
        expect![[r#"

        error (data, exit code 11): 1 of 5 rows cannot be used, which is more than may be dropped (bad_rows_max: 0.1):
          1 x the assistant's content is empty (data.parquet:4)
          help: correct these rows, or raise bad_rows_max (places are file:row, counted from 0)
        exit 11
    "#]],
    );
}

#[test]
fn an_empty_system_turn_is_shown_as_the_template_writes_it() {
    check(
        "empty-system.parquet",
        "",
        expect![[r#"
        tokenize  4 rows: 84 tokens, 12 of them learned; longest 21, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
}

#[test]
fn tools_and_system_columns_reach_the_template() {
    let template = fixture("tools.jinja").display().to_string();
    let with = format!("--set ModelConfig.chat_template={template}");
    check(
        "tools.parquet",
        &with,
        expect![[r#"
        tokenize  3 rows: 735 tokens, 141 of them learned; longest 245, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
    check(
        "tools.parquet",
        "",
        expect![[r#"
            tokenize  3 rows: 201 tokens, 141 of them learned; longest 67, 0 cut to 1024, 0 dropped
            tokenize  warning: 3 rows have tools that the chat template does not write, so that the model never sees them
            exit 0
        "#]],
    );
    check(
        "system-column.parquet",
        "",
        expect![[r#"
        tokenize  3 rows: 138 tokens, 9 of them learned; longest 46, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
}

#[test]
fn parts_of_a_content_are_joined_and_numbers_refused() {
    check(
        "parts.parquet",
        "",
        expect![[r#"
        tokenize  3 rows: 57 tokens, 12 of them learned; longest 19, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
    check(
        "number-as-completion.parquet",
        "",
        expect![[r#"

            error (data, exit code 11): data.parquet: `completion` is Int64; text is needed; columns found: `prompt`: Utf8, `completion`: Int64
              help: change the column's type; if another column is meant, rename the columns, or name them with DatasetConfig.messages_column, DatasetConfig.context_column, DatasetConfig.response_column, TrainingArguments.dataset_text_field, question_column
            exit 11
        "#]],
    );
}

#[test]
fn an_end_that_is_not_learned_is_told() {
    let template = fixture("no-stop.jinja").display().to_string();
    check(
        "plain.parquet",
        &format!("--set ModelConfig.chat_template={template}"),
        expect![[r#"
            tokenize  4 rows: 136 tokens, 64 of them learned; longest 34, 0 cut to 1024, 0 dropped
            tokenize  warning: 4 of 4 rows end without a learned end token (<|end|>), so that the model may not learn to stop (0 rows were cut): the chat template must write the token inside what it marks as the answer, and max_length must leave room for it
            exit 0
        "#]],
    );
    check(
        "letters.parquet",
        "",
        expect![[r#"
        tokenize  4 rows: 36 tokens, 16 of them learned; longest 9, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
}

#[test]
fn short_answers_are_found_where_they_stand() {
    check(
        "short-answers.parquet",
        "",
        expect![[r#"
        tokenize  2 rows: 64 tokens, 14 of them learned; longest 35, 0 cut to 1024, 0 dropped
        exit 0
    "#]],
    );
    let labels = ["labels-end-first.parquet", "labels-end-last.parquet"].map(|labels| {
        let work = work(labels);
        work.copy("phi3/model", "model");
        said(&work, "")
    });
    assert_eq!(labels[0], labels[1], "the same answers in another order");
    expect![[r#"
        tokenize  2 rows: 46 tokens, 16 of them learned; longest 23, 0 cut to 1024, 0 dropped
        exit 0
    "#]]
    .assert_eq(&labels[0]);
}

#[test]
fn a_beginning_token_is_not_doubled() {
    check(
        "text-with-bos.parquet",
        "",
        expect![[r#"
            tokenize  4 rows: 36 tokens, 32 of them learned; longest 9, 0 cut to 1024, 0 dropped
            tokenize  warning: 4 rows already have the tokens that the tokenizer puts around a text (<s>); hone does not add them again, transformers would
            exit 0
        "#]],
    );
}

#[test]
fn named_templates_without_a_default_are_listed_and_can_be_chosen() {
    let work = work("plain.parquet");
    work.write("model/tokenizer_config.json", std::fs::read(fixture("no-default-template.json")).unwrap());
    expect![[r#"

        error (config, exit code 10): the model has chat templates by name (tool_use, rag), but none that is called default
          help: choose one, such as ModelConfig.chat_template: tool_use
        exit 10
    "#]].assert_eq(&said(&work, ""));
    expect![[r#"
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]]
    .assert_eq(&said(&work, "--set ModelConfig.chat_template=rag"));
}

#[test]
fn runs_that_cannot_learn_are_refused() {
    check(
        "plain.parquet",
        "--set LoraConfig.lora_alpha=0",
        expect![[r#"
            error (config, exit code 10): --set: LoraConfig.lora_alpha: 0 scales the adapter to nothing, so that nothing would be learned; usual values are r and 2 * r
            error (config, exit code 10): --set: LoraConfig.lora_alpha: 0 scales the adapter to nothing, so that nothing would be learned; usual values are r and 2 * r
              help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
            exit 10
        "#]],
    );
    check(
        "plain.parquet",
        "--set TrainingArguments.learning_rate=0",
        expect![[r#"

        error (config, exit code 10): --set: TrainingArguments.learning_rate: 0 changes nothing, so that nothing would be learned
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to
        exit 10
    "#]],
    );
    check(
        "plain.parquet",
        "--set TrainingArguments.max_steps=1 --set TrainingArguments.warmup_steps=5",
        expect![[r#"
            tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
            error (config, exit code 10): the learning rate is zero in every one of 1 steps (warm-up takes 5): nothing would be learned
              help: train more steps (num_train_epochs, max_steps), or lower warmup_steps and warmup_ratio
            exit 10
        "#]],
    );
}

#[test]
fn names_of_wrappers_are_understood() {
    let compiled = work("plain.parquet");
    compiled.write("model/model.safetensors", std::fs::read(fixture("compiled.safetensors")).unwrap());
    expect![[r#"
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]]
    .assert_eq(&said(&compiled, ""));
    let adapter = work("plain.parquet");
    copy(&adapter, "adapter-compiled", "adapter");
    expect![[r#"
        tokenize  4 rows: 136 tokens, 68 of them learned; longest 34, 0 cut to 1024, 0 dropped
        exit 0
    "#]]
    .assert_eq(&said(&adapter, "--init-adapter adapter"));
}

#[test]
fn an_adapter_of_another_model_is_told_by_its_file() {
    let work = work("plain.parquet");
    copy(&work, "adapter-compiled", "adapter");
    let bytes = work.read("adapter/adapter_model.safetensors");
    let renamed = String::from_utf8_lossy(&bytes).contains("self_attn");
    assert!(renamed, "the fixture has attention modules");
    let other: Vec<u8> = replaced(&bytes, b"self_attn", b"self_moon");
    work.write("adapter/adapter_model.safetensors", other);
    expect![[r#"

        error (model, exit code 12): adapter/adapter_model.safetensors: its modules are not in this llama model, which has self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
          help: the adapter to start from must be of the same base model
        exit 12
    "#]].assert_eq(&said(&work, "--init-adapter adapter"));
}

#[test]
fn data_is_seen_as_it_will_be_trained() {
    let work = work("short-answers.parquet");
    const INSPECT: &str =
        "inspect --model model --data data.parquet --config config.yaml --output out --device cpu";
    let inspect = |more: &str| {
        let words: Vec<&str> = INSPECT.split(' ').chain(more.split_whitespace()).collect();
        let ended = work.run(&words);
        assert_eq!((ended.code, work.path("out").exists()), (Some(0), false), "{}", ended.stderr);
        ended.stdout
    };
    expect![[r#"
        model
        rows        2: 2 to train on, 0 to evaluate on, 0 dropped
        tokens      64, longest row 35
        learned     14 tokens, 21.9 %
        cut         0 rows to 1024 tokens, 0.0 %
        steps       3
        packing     passes are filled to 6 %
        duplicates  exact copies of an earlier row: 0; nearly so: 0
        overlap     rows to evaluate on that are also trained on, exactly or nearly: 0

        tokens of a row
              1 to 3              0  
              4 to 6              0  
              7 to 9              0  
             10 to 12             0  
             13 to 15             0  
             16 to 18             0  
             19 to 21             0  
             22 to 24             0  
             25 to 27             0  
             28 to 30             1  ########################################
             31 to 33             0  
             34 to 36             1  ########################################

        as it will be trained; text in [brackets] is not learned

        --- data.parquet:0: 35 tokens, 2 learned
        [<s><|user|>Say a or user or assistant: a<|end|><|assistant|>]a<|end|>
    "#]]
    .assert_eq(&inspect("--row data.parquet:0 --html page.html"));
    let page = work.text("page.html");
    assert!(page.contains("<span class=\"l s\">&lt;|end|&gt;</span>") && !page.contains("<script"), "{page}");
    assert!(!page.contains("http://") && !page.contains("https://"), "nothing comes from elsewhere");
    let words: Vec<&str> = INSPECT.split(' ').chain(["--html", "none/page.html"]).collect();
    let ended = work.run(&words);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(10), ""), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("cannot write none/page.html: there is no folder none"),
        "{}",
        ended.stderr
    );
    let json: serde_json::Value = serde_json::from_str(&inspect("--format json")).unwrap();
    assert_eq!((&json["tokens"]["learned"], &json["rows"]["train"]), (&14.into(), &2.into()));
    assert_eq!(json["samples"].as_array().unwrap().len(), 2);
    let ended = work.run(&INSPECT.split(' ').chain(["--row", "data.parquet:9"]).collect::<Vec<_>>());
    assert!(ended.code == Some(10) && ended.stderr.contains("--row data.parquet:9"), "{}", ended.stderr);
}

#[test]
fn a_plan_tells_steps_and_what_named_gpus_take() {
    let work = work("plain.parquet");
    const PLAN: &str =
        "plan --model model --data data.parquet --config config.yaml --gpu l4,h100 --price h100=2";
    let plan =
        |more: &str| work.done(&PLAN.split(' ').chain(more.split_whitespace()).collect::<Vec<_>>()).stdout;
    let json: serde_json::Value = serde_json::from_str(&plan("--format json")).unwrap();
    let estimate = &json["estimate"];
    assert_eq!((&estimate["rows"], &estimate["steps"]), (&4.into(), &3.into()), "{estimate}");
    let gpus = estimate["gpus"].as_array().unwrap();
    assert!(gpus.len() == 2 && gpus.iter().all(|gpu| gpu["fits"] == true), "{estimate}");
    assert_eq!(gpus[1]["dollars_an_hour"], 2.0);
    assert!(plan("").contains("work: 3 optimizer steps over 4 rows"));
}

/// Returns bytes with every `from` replaced by `to`, which has the same length.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for at in 0..bytes.len() - from.len() {
        if bytes[at..].starts_with(from) {
            bytes[at..at + from.len()].copy_from_slice(to);
        }
    }
    bytes
}
