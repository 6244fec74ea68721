//! Tests of refusals with their messages, and of the order in which values override each other.

use super::*;
use expect_test::{Expect, expect};

fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.yaml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

/// Returns the fault's message, with the path of the file cut to its name.
fn refusal(text: &str) -> String {
    let (folder, path) = file(text);
    let request = Request { config: Some(path), ..Request::default() };
    let fault = gather(&request, &|_| None).unwrap_err();
    assert_eq!(fault.kind, crate::fault::Kind::Config);
    assert!(fault.help.is_some());
    fault.message.replace(&format!("{}/", folder.path().display()), "")
}

fn check(text: &str, expected: Expect) {
    expected.assert_eq(&refusal(text));
}

#[test]
fn all_mistakes_are_told_at_once_with_place_and_suggestion() {
    check(
        "training_config:
  TrainingArguments:
    learning_rat: 1e-4
    evaluation_strategy: epoch
    max_seq_length: 512
    group_by_length: true
    num_train_epochs: many
    lora_alpha: 8
  LoraConfig:
    r: eight
    use_qalora: true
    zebra: 1
  LoraConfg:
    r: 8
modle: x
",
        expect![[r#"
            11 mistakes in the configuration
              train.yaml:3:5: TrainingArguments.learning_rat is not a key; did you mean learning_rate?
              train.yaml:4:5: TrainingArguments.evaluation_strategy is not a key; did you mean eval_strategy?
              train.yaml:5:5: TrainingArguments.max_seq_length is not a key; did you mean max_length?
              train.yaml:6:5: TrainingArguments.group_by_length is not a key; did you mean train_sampling_strategy?
              train.yaml:7:23: TrainingArguments.num_train_epochs: expected a number from 0 to 1000000, found "many"
              train.yaml:8:5: TrainingArguments.lora_alpha is not a key; did you mean LoraConfig.lora_alpha?
              train.yaml:10:8: LoraConfig.r: expected a whole number from 1, found "eight"
              train.yaml:11:17: LoraConfig.use_qalora: true is refused: hone trains plain LoRA; this key would change the kind of adapter
              train.yaml:12:5: LoraConfig.zebra is not a key
              train.yaml:13:3: "LoraConfg" is not a section; did you mean LoraConfig?
              train.yaml:15:1: modle is not a key; did you mean model?"#]],
    );
}

#[test]
fn single_refusals() {
    let arguments = |text: &str| format!("training_config:\n  TrainingArguments: {{{text}}}\n");
    check(
        &arguments("lr_scheduler_type: reduce_lr_on_plateau"),
        expect![[
            r#"train.yaml:2:42: TrainingArguments.lr_scheduler_type: expected one of linear, cosine, constant, constant_with_warmup, cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, found "reduce_lr_on_plateau""#
        ]],
    );
    check(
        &arguments("optim: lion_8bit"),
        expect![[
            r#"train.yaml:2:30: TrainingArguments.optim: expected one of adamw_torch, adamw_torch_fused, adamw_torch_xla, adamw_torch_npu_fused, adamw_anyprecision, adamw_torch_4bit, adamw_torch_8bit, adamw_bnb_8bit, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, adamw_hf, adamw_apex_fused, found "lion_8bit""#
        ]],
    );
    check(
        &arguments("save_strategy: often"),
        expect![[
            r#"train.yaml:2:38: TrainingArguments.save_strategy: expected one of no, steps, epoch, best, found "often""#
        ]],
    );
    check(
        &arguments("deepspeed: {stage: 2}"),
        expect![
            "train.yaml:2:34: TrainingArguments.deepspeed: a map is refused: one device holds the model; remove the key"
        ],
    );
    check(
        "training_config:\n  LoraConfig: {use_qalora: yes}\n",
        expect![
            "train.yaml:2:28: LoraConfig.use_qalora: true is refused: hone trains plain LoRA; this key would change the kind of adapter"
        ],
    );
    check(
        &arguments("per_device_train_batch_size: 0"),
        expect![[
            r#"train.yaml:2:52: TrainingArguments.per_device_train_batch_size: expected a whole number from 1, found "0""#
        ]],
    );
    check(
        &arguments("learning_rate: 1e-4, learning_rate: 2e-4"),
        expect!["train.yaml:2:44: learning_rate appears twice; the first is on line 2"],
    );
    check(
        "training_config:\n  LoraConfig: {bias: all}\n",
        expect![[
            r#"train.yaml:2:22: LoraConfig.bias: "all" is refused: biases are frozen; an adapter with biases is not portable to vLLM"#
        ]],
    );
    check(
        "training_config:\n  LoraConfig: {modules_to_save: [lm_head]}\n",
        expect![
            "train.yaml:2:33: LoraConfig.modules_to_save: a list is refused: whole matrices are not trained: of an 8B model embed_tokens and lm_head have 1 billion values, which with their gradients and moments take 17 GB, and vLLM loads no such adapter. Remove the key; trainable_token_indices trains the rows of new tokens, and linear layers belong in target_modules"
        ],
    );
    check(
        "training_config:\n  LoraConfig: [r, 8]\n",
        expect!["train.yaml:2:15: LoraConfig: expected a map of keys, found a list"],
    );
    check(
        "training_config:\n  DatasetConfig: {train_test_split: 1.5}\n",
        expect![[
            r#"train.yaml:2:37: DatasetConfig.train_test_split: expected a number from 0 to 1, found "1.5""#
        ]],
    );
    check(
        "training_config:\n  DatasetConfig: {dataset_extension: webdataset}\n",
        expect![[
            r#"train.yaml:2:38: DatasetConfig.dataset_extension: expected one of parquet, jsonl, json, csv, arrow, found "webdataset""#
        ]],
    );
    check("LoraConfig: {r: 8}\n", expect!["train.yaml:1:1: LoraConfig belongs under `training_config:`"]);
    check(
        "trainingconfig: {}\n",
        expect!["train.yaml:1:1: trainingconfig is not a key; did you mean training_config?"],
    );
    check("just text\n", expect![[r#"train.yaml:1:1: the file: expected a map of keys, found "just text""#]]);
    check("\"a\\e[2J\": 1\n", expect![[r#"train.yaml:1:1: a\u{1b}[2J is not a key"#]]);
    check("training_config: [\n", expect!["train.yaml:1:18: not valid YAML: unclosed bracket '['"]);
    check(
        "kind: ConfigMap\ndata: {}\n",
        expect![[r#"train.yaml:2:7: a ConfigMap without data."training_config.yaml""#]],
    );
}

#[test]
fn defaults_and_empties_of_refused_keys_pass() {
    let text = "training_config:\n  LoraConfig: {use_qalora: false, bias: none, modules_to_save: null, megatron_config: {}}\n  TrainingArguments: {fsdp: '', deepspeed: ~, label_smoothing_factor: 0}\n";
    let (_folder, path) = file(text);
    gather(&Request { config: Some(path), ..Request::default() }, &|_| None).unwrap();
}

#[test]
fn places_inside_a_config_map_are_places_of_the_file() {
    let text = "apiVersion: v1
kind: ConfigMap
metadata: {name: qlora}
data:
  training_config.yaml: |
    training_config:

      LoraConfig:
        rr: 8
";
    check(text, expect!["train.yaml:9:9: LoraConfig.rr is not a key"]);
}

#[test]
fn oversized_and_unreadable_files_are_refused() {
    check(
        &"x".repeat(yaml::FILE_BYTES_MAX + 1),
        expect!["train.yaml: more than 1048576 bytes; a configuration has a few kilobytes"],
    );
    let (folder, path) = file("");
    std::fs::write(&path, b"a: 1\nb: \xff\n").unwrap();
    let request = Request { config: Some(path), ..Request::default() };
    let fault = gather(&request, &|_| None).unwrap_err();
    expect!["/train.yaml:2: not UTF-8 text (byte 8)"]
        .assert_eq(&fault.message.replace(&folder.path().display().to_string(), ""));
    let missing = Request { config: Some("no/such.yaml".into()), ..Request::default() };
    expect!["cannot read the configuration no/such.yaml: No such file or directory (os error 2)"]
        .assert_eq(&gather(&missing, &|_| None).unwrap_err().message);
}

#[test]
fn the_later_source_wins_and_is_named() {
    let (_a, config) = file("training_config: {LoraConfig: {r: 1, lora_alpha: 1, lora_dropout: 0.1}}\n");
    let (_b, spec) = file("training_config: {LoraConfig: {r: 2, lora_alpha: 2}}\n");
    let setting = |text: &str, origin| Setting {
        key: "LoraConfig.r".into(),
        written: Written::Yaml(text.into()),
        origin,
    };
    let mut request =
        Request { spec: Some(spec.clone()), config: Some(config.clone()), ..Request::default() };
    let origin = |request: &Request, name: &str| {
        let spec =
            gather(request, &|name| (name == "DEFAULT_TARGET_MODULES").then(|| "q_proj, v_proj".into()))
                .unwrap();
        let given = spec.get(Section::LoraConfig, name).unwrap().clone();
        format!("{} {}", given.value.to_json(), given.origin)
    };
    assert_eq!(origin(&request, "lora_dropout"), format!("0.1 {}:1", config.display()));
    assert_eq!(origin(&request, "r"), format!("2 {}:1", spec.display()));
    assert_eq!(
        origin(&request, "target_modules"),
        r#"["q_proj","v_proj"] environment DEFAULT_TARGET_MODULES"#
    );
    request.settings.push(setting("3", Origin::Environment("HONE_SET".into())));
    assert_eq!(origin(&request, "r"), "3 environment HONE_SET");
    request.settings.push(setting("4", Origin::Flag("--set".into())));
    assert_eq!(origin(&request, "r"), "4 --set");
}

#[test]
fn a_setting_of_text_may_look_like_yaml() {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    for (text, value) in
        [(template, template), ("{{ messages }}", "{{ messages }}"), ("'a b'", "a b"), ("a: b", "a: b")]
    {
        let setting = Setting {
            key: "ModelConfig.chat_template".into(),
            written: Written::Yaml(text.into()),
            origin: Origin::Flag("--set".into()),
        };
        let request = Request { settings: vec![setting], ..Request::default() };
        let spec = gather(&request, &|_| None).unwrap();
        let given = &spec.get(Section::ModelConfig, "chat_template").unwrap().value;
        assert_eq!(*given, Value::Text(value.into()));
    }
}

#[test]
fn settings_are_refused_like_files() {
    let check = |key: &str, text: &str, expected: Expect| {
        let setting = Setting {
            key: key.into(),
            written: Written::Yaml(text.into()),
            origin: Origin::Flag("--set".into()),
        };
        let request = Request { settings: vec![setting], ..Request::default() };
        expected.assert_eq(&gather(&request, &|_| None).unwrap_err().message);
    };
    check("LoraConfig.rnak", "8", expect!["--set: LoraConfig.rnak is not a key; did you mean r?"]);
    check(
        "Lora.r",
        "8",
        expect![[
            r#"--set: "Lora" is not a section; expected one of ModelConfig, QuantizationConfig, LoraConfig, TrainingArguments, DataCollator, DatasetConfig"#
        ]],
    );
    check("LoraConfig.r", "[8", expect!["--set: LoraConfig.r: not valid YAML: unclosed bracket '['"]);
    check(
        "TrainingArguments.learning_rate",
        "fast",
        expect![[
            r#"--set: TrainingArguments.learning_rate: expected a number from 0 to 1000, found "fast""#
        ]],
    );
}

#[test]
fn a_path_of_a_file_or_a_flag_may_begin_with_the_home_folder() {
    let text = "model: ~/m
data: [~/a.csv#limit=2, {path: ~/b.csv, weight: 2}, ./~/c.csv, https://host/~/d.csv]
push: ['oci:~/image:v1', 'host/a:1']
name: ~/n
training_config:
  TrainingArguments:
    output_dir: ~/out
";
    let (_folder, path) = file(text);
    let setting = Setting {
        key: "cache".into(),
        written: Written::Text("~".into()),
        origin: Origin::Flag("--cache".into()),
    };
    let request = Request { spec: Some(path), settings: vec![setting], ..Request::default() };
    let spec = gather(&request, &|name| (name == "HOME").then(|| "/home/me/".into())).unwrap();
    let value = |section, name| spec.get(section, name).unwrap().value.to_json();
    assert_eq!(value(Section::Hone, "model"), "/home/me/m");
    assert_eq!(value(Section::Hone, "cache"), "/home/me");
    assert_eq!(value(Section::Hone, "name"), "~/n", "a name is no path");
    assert_eq!(value(Section::TrainingArguments, "output_dir"), "/home/me/out");
    assert_eq!(value(Section::Hone, "push")[0], "oci:/home/me/image:v1");
    let data = value(Section::Hone, "data");
    assert_eq!(data[0], "/home/me/a.csv#limit=2");
    assert!(data[1].as_str().unwrap().starts_with("/home/me/b.csv#"), "{data}");
    assert_eq!((&data[2], &data[3]), (&"./~/c.csv".into(), &"https://host/~/d.csv".into()));

    let fault = gather(&request, &|_| None).unwrap_err();
    let expected = "model: ~/m is below the home folder, but HOME is not set; write the whole path";
    assert!(fault.message.contains(expected), "{fault}");
}
