//! Tests of the plans that configurations result in.

use super::places::below_mnt;
use super::rows::TOKENS_UNLIMITED;
use super::*;
use crate::dataset::{LossOn, TokenCache};
use crate::facts::{FourBitCode, Keep, LoraInit, Precision, Quantization, Targets, Tokens};
use crate::memory::Limit;
use crate::spec::{self, Request, Setting, Written};
use crate::train::{Every, Warmup};
use expect_test::{Expect, expect};
use std::path::Path;

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Case {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("tiny")).unwrap();
        std::fs::write(folder.path().join("tiny/config.json"), "{}").unwrap();
        Case { folder }
    }

    /// Returns the plan of a model, a dataset and `config`.
    fn plan(&self, config: &str) -> Result<Plan> {
        let path = self.folder.path().join("train.yaml");
        std::fs::write(&path, config).unwrap();
        let flag = |key: &str, text: String| Setting {
            key: key.into(),
            written: Written::Text(text),
            origin: Origin::Flag(format!("--{key}")),
        };
        let settings = vec![
            flag("model", self.folder.path().join("tiny").display().to_string()),
            flag("data", "https://user:word@host/rows.parquet?sig=secret".into()),
        ];
        let request = Request { config: Some(path), settings, ..Request::default() };
        make(&spec::gather(&request, &|_| None)?)
    }

    fn strip(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.folder.path().display()), "")
    }
}

fn check_table(config: &str, expected: Expect) {
    let case = Case::new();
    let plan = case.plan(config).unwrap();
    // The columns' width depends on the length of the temporary folder's path.
    let columns = |line: &str| {
        line.split("  ").map(str::trim).filter(|text| !text.is_empty()).collect::<Vec<_>>().join("  ")
    };
    expected
        .assert_eq(&case.strip(&plan.table()).lines().map(|line| columns(line) + "\n").collect::<String>());
}

fn check_fault(config: &str, expected: Expect) {
    let case = Case::new();
    let fault = case.plan(config).unwrap_err();
    assert_eq!(fault.kind, crate::fault::Kind::Config);
    expected.assert_eq(&case.strip(&fault.message));
}

fn arguments(text: &str) -> String {
    format!("training_config:\n  TrainingArguments: {{{text}}}\n")
}

#[test]
fn kaitos_qlora_template() {
    check_table(
        include_str!("../../examples/training_config/qlora.yaml"),
        expect![[r#"
            model folder  tiny  --model
            model name  tiny  default
            data pinned  1 not pinned: the next start may read other bytes  --data
            precision  bf16  train.yaml:12
            kept for the backward pass  auto  default
            loss on  answers  default
            evaluation  never  default
            output folder  /mnt/results  train.yaml:22
            model  tiny  --model
            data  https://host/rows.parquet?...  --data
            bad_rows  refuse  default
            bad_rows_max  0.5  default
            earlier_results  refuse  default
            answers  0  default
            spike_policy  none  default
            spike_factor  10  default
            spike_window  32  default
            target_matching  fused  default
            mlflow_experiment  Default  default
            device  auto  default
            keep  auto  default
            residency  auto  default
            plain_http  false  default
            file_bytes_max  68719476736  default
            ModelConfig.torch_dtype  bfloat16  train.yaml:5
            QuantizationConfig.load_in_4bit  true  train.yaml:10
            QuantizationConfig.load_in_8bit  false  default
            QuantizationConfig.bnb_4bit_quant_type  nf4  train.yaml:11
            QuantizationConfig.bnb_4bit_use_double_quant  true  train.yaml:13
            QuantizationConfig.bnb_4bit_compute_dtype  bfloat16  train.yaml:12
            LoraConfig.r  8  train.yaml:16
            LoraConfig.lora_alpha  8  train.yaml:17
            LoraConfig.lora_dropout  0  train.yaml:18
            LoraConfig.target_modules  all-linear  default
            LoraConfig.use_rslora  false  default
            LoraConfig.use_dora  false  default
            LoraConfig.init_lora_weights  true  default
            TrainingArguments.output_dir  /mnt/results  train.yaml:22
            TrainingArguments.learning_rate  0.00002  default
            TrainingArguments.lr_scheduler_type  linear  default
            TrainingArguments.label_smoothing_factor  0  default
            TrainingArguments.warmup_steps  0  default
            TrainingArguments.num_train_epochs  3  default
            TrainingArguments.max_steps  -1  default
            TrainingArguments.per_device_train_batch_size  1  train.yaml:25
            TrainingArguments.per_device_eval_batch_size  8  default
            TrainingArguments.gradient_accumulation_steps  1  default
            TrainingArguments.optim  adamw_torch_fused  default
            TrainingArguments.weight_decay  0  default
            TrainingArguments.adam_beta1  0.9  default
            TrainingArguments.adam_beta2  0.999  default
            TrainingArguments.adam_epsilon  1e-8  default
            TrainingArguments.max_grad_norm  1  default
            TrainingArguments.fp16  false  default
            TrainingArguments.max_length  1024  default
            TrainingArguments.packing  true  default
            TrainingArguments.dataset_text_field  text  default
            TrainingArguments.logging_strategy  steps  default
            TrainingArguments.logging_steps  10  default
            TrainingArguments.report_to  none  default
            TrainingArguments.eval_delay  0  default
            TrainingArguments.eval_on_start  false  default
            TrainingArguments.load_best_model_at_end  false  default
            TrainingArguments.early_stopping_threshold  0  default
            TrainingArguments.save_strategy  no  train.yaml:24
            TrainingArguments.save_steps  500  default
            TrainingArguments.seed  42  default
            TrainingArguments.push_to_hub  false  default
            TrainingArguments.hub_revision  main  default
            TrainingArguments.hub_strategy  end  default
            TrainingArguments.use_cpu  false  default
            DatasetConfig.shuffle_dataset  true  train.yaml:31
            DatasetConfig.shuffle_seed  42  default
            DatasetConfig.train_test_split  1  train.yaml:32

            without effect here:
            ModelConfig.device_map (train.yaml:7): `device` chooses the device that holds the model
            ModelConfig.local_files_only (train.yaml:6): `model` says where the model comes from, with its revision: a folder, or hf://OWNER/NAME@REVISION
            TrainingArguments.ddp_find_unused_parameters (train.yaml:23): `gpus` and `ranks` say which processes train together, and hone divides the work itself
            DataCollator.mlm (train.yaml:28): causal language models predict the next token; no token is masked
        "#]],
    );
}

#[test]
fn kaitos_lora_template_differs_in_the_base_only() {
    let case = Case::new();
    let qlora = case.plan(include_str!("../../examples/training_config/qlora.yaml")).unwrap();
    let lora = case.plan(include_str!("../../examples/training_config/lora.yaml")).unwrap();
    assert_eq!(qlora.model.quantization, Quantization::FourBit { code: FourBitCode::Nf4, double: true });
    assert_eq!(lora.model, model::Options { quantization: Quantization::None, ..qlora.model });
    assert_eq!((lora.train, lora.tokens, lora.output), (qlora.train, qlora.tokens, qlora.output));
}

/// The configuration that KAITO's own webhook tests use: a string for target_modules, a relative output folder.
#[test]
fn kaitos_test_fixture() {
    let case = Case::new();
    let config = "apiVersion: v1
kind: ConfigMap
data:
  training_config.yaml: |
    training_config:
      ModelConfig: {torch_dtype: bfloat16, local_files_only: true, device_map: auto}
      QuantizationConfig: {load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16, bnb_4bit_use_double_quant: true}
      LoraConfig:
        r: 16
        lora_alpha: 32
        target_modules: \"query_key_value\"
        lora_dropout: 0.05
        bias: \"none\"
      TrainingArguments:
        output_dir: \"output\"
        num_train_epochs: 4
        auto_find_batch_size: true
        ddp_find_unused_parameters: false
        save_strategy: \"epoch\"
      DatasetConfig: {shuffle_dataset: true, train_test_split: 1}
      DataCollator: {mlm: true}
";
    let plan = case.plan(config).unwrap();
    assert_eq!(plan.model.lora.targets, Targets::names(["query_key_value"]));
    assert_eq!((plan.model.lora.r, plan.model.lora.alpha, plan.model.lora.dropout), (16, 32.0, 0.05));
    assert_eq!((plan.train.epochs, plan.train.checkpoint), (4.0, Every::Epoch));
    assert_eq!(plan.output, Path::new("output"));
    let ignored: Vec<&str> = plan.ignored.iter().map(|ignored| ignored.name.as_str()).collect();
    assert!(ignored.contains(&"TrainingArguments.auto_find_batch_size"), "{ignored:?}");
}

#[test]
fn every_used_key_is_read() {
    let case = Case::new();
    let used = || spec::keys::all().iter().filter(|key| key.effect == Effect::Used);
    let setting = |key: &spec::keys::Key| Setting {
        key: key.to_string(),
        written: Written::Yaml(sample(key, &case)),
        origin: Origin::Flag("--set".into()),
    };
    let request = Request { settings: used().map(setting).collect(), ..Request::default() };
    let plan = make(&spec::gather(&request, &|_| None).unwrap()).unwrap();
    for key in used() {
        let read = plan.values.iter().any(|value| value.name == key.to_string());
        assert!(read, "{key} is said to be used, but no plan reads it");
    }
}

/// Returns a value for a key that no plan refuses.
fn sample(key: &spec::keys::Key, case: &Case) -> String {
    use spec::keys::Type;
    let folder = case.folder.path().display();
    std::fs::write(case.folder.path().join("tiny/adapter_config.json"), "{}").unwrap();
    match (key.name, key.kind) {
        ("model" | "pretrained_model_name_or_path" | "init_adapter", _) => format!("{folder}/tiny"),
        ("ca_file" | "chat_template_path", _) => format!("{folder}/tiny/config.json"),
        ("chat_template", _) => "'{{ x }}'".into(),
        ("assistant_names", _) => "another".into(),
        ("device", _) => "cuda:1".into(),
        ("gpus", _) => "all".into(),
        ("memory_max", _) => "20GiB".into(),
        ("load_in_8bit" | "fp16", _) => "false".into(),
        ("lr_scheduler_kwargs", _) => "{}".into(),
        ("eval_strategy", _) => "steps".into(),
        ("eval_minutes", _) => "0".into(),
        ("train_test_split", _) => "1".into(),
        ("trainable_token_indices", _) => "[1]".into(),
        ("pushgateway" | "otlp" | "mlflow", _) => "http://127.0.0.1:1".into(),
        ("metric_for_best_model", _) => "eval_loss".into(),
        (_, _) if !key.default.is_empty() => key.default.into(),
        (_, Type::Choice(words)) => words[0].into(),
        (_, Type::Boolean) => "true".into(),
        (_, Type::Integer { .. } | Type::Number { .. } | Type::Integers) => "1".into(),
        (_, Type::Map) => "{q_proj: 4}".into(),
        _ => "word".into(),
    }
}

#[test]
fn contradictions() {
    check_fault(
        "training_config: {QuantizationConfig: {load_in_4bit: true, load_in_8bit: true}}\n",
        expect![
            "train.yaml:1:60: QuantizationConfig: load_in_4bit and load_in_8bit are both true; choose load_in_4bit"
        ],
    );
    check_fault(
        "training_config: {QuantizationConfig: {load_in_8bit: true}}\n",
        expect![
            "train.yaml:1:40: QuantizationConfig.load_in_8bit: there is no 8-bit base; use load_in_4bit: true, or neither for plain LoRA"
        ],
    );
    check_fault(
        &arguments("bf16: true, fp16: true"),
        expect!["train.yaml:2:35: TrainingArguments: bf16 and fp16 are both true; choose one"],
    );
    check_fault(
        &arguments("num_train_epochs: 0"),
        expect![
            "train.yaml:2:23: TrainingArguments: num_train_epochs 0 and no max_steps: nothing would be trained"
        ],
    );
    check_fault(
        "training_config: {DatasetConfig: {train_test_split: 0}}\n",
        expect![
            "train.yaml:1:35: DatasetConfig.train_test_split: 0 leaves no rows to train on; 1 trains on all of them"
        ],
    );
    check_fault(
        "training_config: {LoraConfig: {target_modules: 'q_proj, v_proj'}}\n",
        expect![
            "train.yaml:1:32: LoraConfig.target_modules: one string with commas; write a list: [q_proj, v_proj]"
        ],
    );
    check_fault(
        "training_config: {LoraConfig: {target_modules: []}}\n",
        expect![
            "train.yaml:1:32: LoraConfig.target_modules: an empty list; name modules, or remove the key for all linear layers"
        ],
    );
    check_fault(
        "training_config: {ModelConfig: {chat_template: /no/such.jinja}}\ndevice: gpu\n",
        expect![[r#"
        2 mistakes in the configuration
          train.yaml:1:33: chat template /no/such.jinja: No such file or directory (os error 2); expected Jinja text, a file of it, or a name of one of the model's templates
          train.yaml:2:1: device: expected auto, cpu, cuda or cuda:N, found "gpu""#]],
    );
}

#[test]
fn no_model_and_no_dataset() {
    let fault = make(&Spec::default()).unwrap_err();
    expect![[r#"
        2 mistakes in the configuration
          no model: name its folder or address with `model` (--model DIR, hf://OWNER/NAME)
          no dataset: name its files with `data` (--data URL_OR_PATH)
          help: `hone keys` lists every key; `hone plan` shows what a configuration resolves to"#]]
    .assert_eq(&fault.to_string());
    let settings = ["model", "data"].map(|key| Setting {
        key: key.into(),
        written: Written::Text(if key == "model" { "org/model-7b".into() } else { "s3://bucket/key".into() }),
        origin: Origin::Flag(format!("--{key}")),
    });
    let request = Request { settings: settings.into(), ..Request::default() };
    let fault = make(&spec::gather(&request, &|_| None).unwrap()).unwrap_err();
    expect!["--model: model: there is no folder org/model-7b; if it is on the Hugging Face hub, write hf://org/model-7b"].assert_eq(&fault.message);
}

#[test]
fn output_dir_by_kaitos_rule() {
    let shown =
        |text: &str| below_mnt(text).map(|path| path.display().to_string()).unwrap_or("refused".into());
    let cases = [
        "",
        "out",
        "/mnt/results",
        "/mnt/a//b/",
        "/data/x",
        "./x",
        "/mnt",
        "../etc",
        "/mnt/../etc",
        "x/../y",
    ];
    let table: String = cases.iter().map(|text| format!("{text:?} -> {}\n", shown(text))).collect();
    expect![[r#"
        "" -> /mnt/output
        "out" -> /mnt/out
        "/mnt/results" -> /mnt/results
        "/mnt/a//b/" -> /mnt/a/b
        "/data/x" -> /mnt/data/x
        "./x" -> /mnt/x
        "/mnt" -> refused
        "../etc" -> refused
        "/mnt/../etc" -> refused
        "x/../y" -> /mnt/y
    "#]]
    .assert_eq(&table);
}

#[test]
fn under_kaitos_mounts_its_paths_count() {
    let case = Case::new();
    let config = case.folder.path().join("training_config.yaml");
    std::fs::write(&config, arguments("output_dir: lora-output")).unwrap();
    let model = case.folder.path().join("tiny").display().to_string();
    let environment = |name: &str| match name {
        "YAML_FILE_PATH" => Some(config.display().to_string()),
        "DEFAULT_TARGET_MODULES" => Some("k_proj,q_proj".into()),
        _ => None,
    };
    let setting = Setting {
        key: "model".into(),
        written: Written::Text(model),
        origin: Origin::Environment("HONE_MODEL".into()),
    };
    let request = Request { settings: vec![setting], ..Request::default() };
    let plan = make(&spec::gather(&request, &environment).unwrap()).unwrap();
    assert_eq!(plan.output, Path::new("/mnt/lora-output"));
    let mounted = source::Source::Path { pattern: "/mnt/data".into(), sha256: None };
    assert_eq!(plan.data, [fetch::Data::Source(mounted)]);
    assert_eq!(plan.model.lora.targets, Targets::names(["k_proj", "q_proj"]));
}

#[test]
fn a_null_shows_the_default_that_it_stands_for() {
    let plan = Case::new().plan(&arguments("learning_rate: null, max_length: null, eval_steps: ~")).unwrap();
    let shown = |name: &str| {
        let value =
            plan.values.iter().find(|value| value.name == format!("TrainingArguments.{name}")).unwrap();
        (value.value.clone(), value.origin == Origin::Default)
    };
    assert_eq!(shown("learning_rate"), (plan.train.learning_rate.into(), true));
    assert_eq!(shown("max_length"), (serde_json::Value::Null, false), "null has a meaning here");
    assert_eq!(shown("eval_steps"), (serde_json::Value::Null, false), "there is no default");
}

#[test]
fn choices_that_depend_on_other_keys() {
    let case = Case::new();
    let plan = |config: &str| case.plan(config).unwrap();
    let train = |text: &str| plan(&arguments(text)).train;
    let tokens = |text: &str| plan(&arguments(text)).tokens;
    assert_eq!(tokens("").loss, LossOn::Answers);
    assert_eq!(tokens("completion_only_loss: false").loss, LossOn::Everything);
    assert_eq!(tokens("completion_only_loss: false, assistant_only_loss: true").loss, LossOn::Answers);
    assert_eq!((tokens("").tokens_max, tokens("max_length: null").tokens_max), (1024, TOKENS_UNLIMITED));
    assert_eq!(train("").evaluation, Every::Epoch, "the split is 0.8 unless a key says otherwise");
    assert_eq!(train("eval_strategy: no").evaluation, Every::Never);
    assert_eq!(train("eval_strategy: steps, logging_steps: 7").evaluation, Every::Steps(7));
    assert_eq!(train("warmup_steps: 0.1").warmup, Warmup::Ratio(0.1));
    assert_eq!(train("warmup_steps: 5").warmup, Warmup::Steps(5));
    let warned = |text: &str| plan(&arguments(text)).warnings.join("\n");
    assert!(warned("lr_scheduler_type: constant, warmup_steps: 5").contains("warmup_steps has no effect"));
    assert!(warned("lr_scheduler_type: constant, warmup_ratio: 0.1").contains("warmup_ratio has no effect"));
    assert!(warned("warmup_ratio: 0.1, warmup_steps: 5").contains("warmup_ratio overrides it"));
    assert_eq!(warned("lr_scheduler_type: constant_with_warmup, warmup_steps: 5"), "");
    assert!(warned("eval_steps: 5").contains("eval_steps has no effect: eval_strategy is epoch"));
    assert!(
        warned("save_steps: 5, save_strategy: no").contains("save_steps has no effect: save_strategy is no")
    );
    assert_eq!(warned("eval_steps: 5, eval_strategy: steps, save_steps: 5, logging_steps: 5"), "");
    assert!(case.plan("mlflow: http://host:5000\n").unwrap().warnings[0].contains("mlflow has no effect"));
    assert_eq!(plan(&arguments("dataset_text_field: null")).dataset.text_column, None);
    assert_eq!(train("warmup_steps: 5, warmup_ratio: 0.5").warmup, Warmup::Ratio(0.5));
    assert_eq!(train("max_grad_norm: 0").grad_norm_max, None);
    assert_eq!(train("max_steps: 3").steps_max, Some(3));
    assert_eq!((train("").order_seed, train("seed: 7").order_seed), (Some(42), Some(7)));
    let unshuffled = plan("training_config: {DatasetConfig: {shuffle_dataset: false}}\n");
    assert_eq!((unshuffled.dataset.shuffle, unshuffled.train.order_seed), (false, None));
    let keep = |text: &str| plan(&arguments(text)).memory.keep;
    assert_eq!((keep("gradient_checkpointing: true"), keep("")), (Some(Keep::LayerInputs), None));
    let memory = |text: &str| case.plan(text).unwrap().memory;
    assert_eq!(memory("keep: attention-output\n").keep, Some(Keep::AttentionOutput));
    assert_eq!(memory("memory_max: 0.5\n").limit, Some(Limit::Share(0.5)));
    assert_eq!(memory("memory_max: 3GiB\n").limit, Some(Limit::Bytes(3 << 30)));
    assert_eq!(memory("pass_tokens_max: 700\n").tokens_max, Some(700));
    assert!(case.plan("memory_max: much\n").unwrap_err().message.contains("memory_max: expected 20GiB"));
    let bare = plan("training_config: {QuantizationConfig: {load_in_4bit: true}}\n").model;
    assert_eq!(bare.quantization, Quantization::FourBit { code: FourBitCode::Fp4, double: false });
    let warned = plan(
        "training_config: {QuantizationConfig: {bnb_4bit_quant_type: nf4}, TrainingArguments: {optim: adamw_torch_8bit, fp16: true}}\n",
    );
    assert_eq!(warned.warnings.len(), 3, "{:?}", warned.warnings);
    assert!(!warned.train.eight_bit_moments);
    for name in ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"] {
        let narrow = plan(&format!("training_config: {{TrainingArguments: {{optim: {name}}}}}\n"));
        assert!(narrow.train.eight_bit_moments && narrow.warnings.is_empty(), "{:?}", narrow.warnings);
    }
}

#[test]
fn precision_by_the_nearest_key() {
    let case = Case::new();
    let precision =
        |config: &str| case.plan(&format!("training_config: {{{config}}}\n")).unwrap().model.precision;
    let four_bit = "QuantizationConfig: {load_in_4bit: true, bnb_4bit_compute_dtype: float32}";
    assert_eq!(precision(""), Precision::Bf16);
    assert_eq!(precision(four_bit), Precision::F32);
    assert_eq!(precision(&format!("{four_bit}, TrainingArguments: {{bf16: true}}")), Precision::F32);
    assert_eq!(precision("ModelConfig: {torch_dtype: float32}"), Precision::F32);
    assert_eq!(
        precision("ModelConfig: {torch_dtype: float32}, TrainingArguments: {bf16: true}"),
        Precision::Bf16
    );
    assert_eq!(precision("TrainingArguments: {bf16: false}"), Precision::F32);
    assert_eq!(precision("ModelConfig: {torch_dtype: float16}"), Precision::Bf16);
    let compute = |word: &str, config: &str| {
        let config = format!("compute: {word}\ntraining_config: {{{config}}}\n");
        let plan = case.plan(&config).unwrap();
        (plan.model.precision, plan.warnings.iter().filter(|text| text.contains("overrides")).count())
    };
    assert_eq!(compute("fp8", ""), (Precision::Fp8, 0));
    assert_eq!(compute("fp8", "TrainingArguments: {bf16: true}"), (Precision::Fp8, 0));
    assert_eq!(compute("fp8", four_bit), (Precision::Fp8, 1));
    assert_eq!(compute("float32", "TrainingArguments: {bf16: true}"), (Precision::F32, 1));
    assert_eq!(compute("bfloat16", four_bit), (Precision::Bf16, 1));
}

#[test]
fn secrets_of_urls_are_not_shown() {
    let plan = Case::new().plan("").unwrap();
    let shown = format!("{}{}", plan.table(), plan.json());
    assert!(shown.contains("https://host/rows.parquet?..."), "{shown}");
    assert!(!shown.contains("secret") && !shown.contains("word"), "{shown}");
}

#[test]
fn evaluations_are_compared_as_transformers_compares_them() {
    use crate::train::best::{Judging, Measure, Stopping};
    let case = Case::new();
    let judging = |text: &str| case.plan(&arguments(text)).unwrap().train.judging;
    let loss =
        Judging { source: None, measure: Measure::Loss, greater: false, restore: true, stopping: None };
    assert_eq!(judging(""), None);
    assert_eq!(judging("load_best_model_at_end: true"), Some(loss.clone()));
    let accuracy = Judging { measure: Measure::Accuracy, greater: true, ..loss.clone() };
    let named = "load_best_model_at_end: true, metric_for_best_model: eval_mean_token_accuracy";
    assert_eq!(judging(named), Some(accuracy));
    assert_eq!(
        judging(&format!("{named}, greater_is_better: false")).map(|judging| judging.greater),
        Some(false)
    );
    let stopping = Some(Stopping { patience: 3, threshold: 0.01 });
    let early = judging("early_stopping_patience: 3, early_stopping_threshold: 0.01");
    assert_eq!(early, Some(Judging { restore: false, stopping, ..loss }));
    let wrong = |text: &str, part: &str| {
        let fault = case.plan(&arguments(text)).unwrap_err();
        assert!(fault.message.contains(part), "{fault}");
    };
    wrong("load_best_model_at_end: true, eval_strategy: no", "there is no evaluation to go by");
    wrong("metric_for_best_model: rouge", "evaluations give loss, perplexity, mean_token_accuracy");
    let warned = case.plan(&arguments("metric_for_best_model: loss, eval_strategy: no")).unwrap().warnings;
    assert!(warned[0].contains("does nothing without an evaluation"), "{warned:?}");
}

#[test]
fn rows_to_evaluate_on_are_given_or_set_aside() {
    use crate::train::best::Measure;
    let case = Case::new();
    let given = case
        .plan("evaluation_data: [held.jsonl, {path: 'b/held.csv', name: faq, limit: 9}, 'c/held.parquet']\n");
    let plan = given.unwrap();
    assert_eq!((plan.dataset.evaluation_from, plan.dataset.train_share, plan.data.len()), (Some(1), 1.0, 4));
    assert_eq!(plan.sources, ["rows", "held", "faq", "held_2"]);
    assert_eq!(plan.dataset.shares[2].limit, Some(9));
    assert_eq!(plan.train.evaluation, Every::Epoch, "rows to evaluate on are there");
    let wrong = |config: &str, part: &str| {
        let fault = case.plan(config).unwrap_err();
        assert!(fault.message.contains(part), "{fault}");
    };
    let both = "evaluation_data: held.jsonl\ntraining_config: {DatasetConfig: {train_test_split: 0.9}}\n";
    wrong(both, "train_test_split: 0.9 would set rows of `data` aside, but evaluation_data names the rows");
    wrong("evaluation_data: 'a#weight=2'\n", "a weight says how often a row trains");
    wrong("evaluation_data: ['a#name=x', 'b#name=x']\n", "two entries are called \"x\"");
    wrong("evaluation_data: 'a#name=x/y'\n", "name: expected letters, digits");

    let by = |metric: &str, data: &str| {
        let arguments = format!("{{load_best_model_at_end: true, metric_for_best_model: {metric}}}");
        case.plan(&format!("evaluation_data: {data}\ntraining_config: {{TrainingArguments: {arguments}}}\n"))
    };
    let judging = by("eval_faq_loss", "[a, 'b#name=faq']").unwrap().train.judging.unwrap();
    assert_eq!((judging.source.clone(), judging.measure), (Some((2, "faq".into())), Measure::Loss));
    assert_eq!(judging.metric(), "eval_faq_loss");
    assert!(by("eval_faq_loss", "['b#name=faq']").unwrap_err().message.contains("evaluations give loss"));
    let fault = by("eval_none_loss", "[a, 'b#name=faq']").unwrap_err();
    assert!(fault.message.contains("eval_a_loss, eval_faq_loss; found \"eval_none_loss\""), "{fault}");

    let grouped = case.plan("group_column: doc\n").unwrap();
    assert_eq!(grouped.dataset.group_column.as_deref(), Some("doc"));
    let idle = case.plan("group_column: doc\nevaluation_data: a\n").unwrap();
    assert_eq!(idle.dataset.group_column, None);
    assert!(
        idle.warnings.iter().any(|text| text.contains("group_column has no effect")),
        "{:?}",
        idle.warnings
    );
}

#[test]
fn a_place_that_is_named_twice_trains_twice_and_is_reported_once() {
    let warnings = |data: &[&str]| {
        let case = Case::new();
        let texts = |key: &str, texts: Vec<String>| Setting {
            key: key.into(),
            written: Written::Texts(texts),
            origin: Origin::Flag(format!("--{key}")),
        };
        let model = case.folder.path().join("tiny").display().to_string();
        let settings = vec![
            Setting { written: Written::Text(model), ..texts("model", Vec::new()) },
            texts("data", data.iter().map(|text| (*text).to_owned()).collect()),
        ];
        make(&spec::gather(&Request { settings, ..Request::default() }, &|_| None).unwrap()).unwrap().warnings
    };
    let found = warnings(&["a.csv", "b.csv", "a.csv#weight=2", "a.csv", "b.csv#limit=3"]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("3 of 5 entries name a place that an earlier entry names (a)"), "{found:?}");
    assert_eq!(warnings(&["a.csv", "b/a.csv", "https://host/a.csv"]), Vec::<String>::new());
}

#[test]
fn evaluations_by_share_and_by_time() {
    let case = Case::new();
    let train = |text: &str| case.plan(&arguments(text)).unwrap().train;
    assert_eq!(train("eval_strategy: steps, eval_steps: 0.1").evaluation, Every::Share(0.1));
    assert_eq!(train("eval_strategy: steps, logging_steps: 0.5").evaluation, Every::Share(0.5));
    assert_eq!(train("save_strategy: steps, save_steps: 0.25").checkpoint, Every::Share(0.25));
    let fault = case.plan(&arguments("logging_steps: 1.5")).unwrap_err();
    assert!(fault.message.contains("logging_steps: expected a whole number of steps"), "{fault}");
    assert_eq!(case.plan("eval_minutes: 30\n").unwrap().train.evaluation, Every::Minutes(30.0));
    let best = format!("eval_minutes: 30\n{}", arguments("load_best_model_at_end: true"));
    let warned = case.plan(&best).unwrap().warnings;
    assert!(warned.iter().any(|text| text.contains("depend on the machine's speed")), "{warned:?}");
    let both = format!("eval_minutes: 30\n{}", arguments("eval_strategy: steps"));
    assert!(case.plan(&both).unwrap_err().message.contains("both say when to evaluate"));
}

#[test]
fn a_word_for_the_token_cache_and_for_a_speaker_has_one_meaning() {
    let case = Case::new();
    for word in ["off", "OFF", "Off", "false"] {
        assert_eq!(
            case.plan(&format!("token_cache: {word}\n")).unwrap().token_cache,
            TokenCache::Off,
            "{word}"
        );
    }
    let fault = case.plan("user_names: Kunde\nassistant_names: [Berater, kunde]\n").unwrap_err();
    assert!(fault.message.contains("assistant_names: \"kunde\" is among user_names too"), "{fault}");
}

#[test]
fn a_setting_of_an_entry_is_given_once() {
    let fault = Case::new().plan("evaluation_data: 'rows.jsonl#limit=3&limit=4'\n").unwrap_err();
    assert!(fault.message.contains("limit is given twice"), "{fault}");
}

#[test]
fn places_to_push_to_are_listed_once() {
    let case = Case::new();
    let places = |config: &str| -> Vec<String> {
        case.plan(config).unwrap().push.iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        places("push: [host/a:1, 'oci:image', host/a:1]\n"),
        ["docker.io/host/a:1", "oci:image:latest"]
    );
    let hub = |text: &str| format!("output: results/support\n{}", arguments(text));
    assert_eq!(places(&hub("push_to_hub: true")), ["hf://support"]);
    assert_eq!(places(&hub("push_to_hub: false, hub_model_id: org/a")), [""; 0]);
    let named = hub("push_to_hub: true, hub_model_id: org/a, hub_revision: v2, hub_private_repo: true");
    assert_eq!(places(&named), ["hf://org/a@v2"]);
    match &case.plan(&named).unwrap().push[0] {
        crate::publish::Destination::Hub(repository) => assert_eq!(repository.private, Some(true)),
        other => panic!("{other}"),
    }
    let wrong = |text: &str, part: &str| {
        let fault = case.plan(&hub(text)).unwrap_err();
        assert!(fault.message.contains(part), "{fault}");
    };
    wrong("push_to_hub: true, hub_strategy: every_save", "would send checkpoints");
    wrong("push_to_hub: true, hub_model_id: a/b/c", "hub_model_id");
}

#[test]
fn schedules_take_their_arguments_and_no_others() {
    use crate::train::Schedule;
    let case = Case::new();
    let schedule = |text: &str| case.plan(&arguments(text)).map(|plan| plan.train.schedule);
    let cosine = schedule("lr_scheduler_type: cosine_with_restarts, lr_scheduler_kwargs: {num_cycles: 3}");
    assert_eq!(cosine.unwrap(), Schedule::CosineWithRestarts { cycles: 3.0 });
    let min =
        "learning_rate: 1e-3, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-4}";
    assert_eq!(schedule(min).unwrap(), Schedule::CosineWithMinLr { cycles: 0.5, min: 0.1 });
    for (text, part) in [
        ("lr_scheduler_kwargs: {num_cycles: 3}", "num_cycles is no argument of linear, which takes none"),
        ("lr_scheduler_type: cosine_with_min_lr", "needs min_lr or min_lr_rate"),
        ("lr_scheduler_type: warmup_stable_decay", "needs num_decay_steps"),
        ("lr_scheduler_type: polynomial, lr_scheduler_kwargs: {power: much}", "power: expected a number"),
        ("lr_scheduler_type: polynomial, learning_rate: 1e-8", "must be smaller than learning_rate"),
        ("lr_scheduler_kwargs: 3", "expected a map"),
    ] {
        let fault = schedule(text).unwrap_err();
        assert!(fault.message.contains(part), "{text}: {fault}");
    }
}

#[test]
fn tokens_are_a_list_or_lists_by_table() {
    let case = Case::new();
    let lora = |text: &str| {
        let text = format!("training_config: {{LoraConfig: {{trainable_token_indices: {text}}}}}\n");
        case.plan(&text).map(|plan| plan.model.lora.tokens)
    };
    let tokens = |embedding: &[u32], head: &[u32]| Tokens { embedding: embedding.into(), head: head.into() };
    assert_eq!(lora("[7, 5]").unwrap(), tokens(&[7, 5], &[]));
    assert_eq!(lora("null").unwrap(), tokens(&[], &[]));
    assert_eq!(lora("{embed_tokens: [7], lm_head: [7, 9]}").unwrap(), tokens(&[7], &[7, 9]));
    assert_eq!(lora("{model.embed_tokens: 7}").unwrap(), tokens(&[7], &[]));
    for (text, part) in [
        ("[seven]", "expected numbers of tokens"),
        ("[-1]", "expected numbers of tokens"),
        ("[-1]", r#"found ["-1"]"#),
        ("{q_proj: [1]}", "q_proj: expected embed_tokens (the embedding) or lm_head"),
    ] {
        let fault = lora(text).unwrap_err();
        assert!(fault.message.contains(part), "{text}: {fault}");
    }
}

#[test]
fn trackers_are_named_or_refused_with_what_to_use() {
    let case = Case::new();
    let trackers = |text: &str| case.plan(&arguments(text)).map(|plan| plan.trackers);
    assert!(trackers("report_to: none").unwrap().is_empty());
    assert_eq!(
        trackers("report_to: [tensorboard]").unwrap().tensorboard,
        Some(Path::new("output/runs").into())
    );
    let elsewhere = trackers("report_to: all, logging_dir: logs").unwrap().tensorboard;
    assert_eq!(elsewhere, Some(Path::new("logs").into()));
    for (text, part) in [
        ("report_to: wandb", "hone does not send to wandb; use tensorboard: `wandb sync`"),
        ("report_to: mlflow", "mlflow needs the address of its server"),
        ("report_to: graphite", "expected tensorboard, mlflow, all or none, found \"graphite\""),
    ] {
        let fault = trackers(text).unwrap_err();
        assert!(fault.message.contains(part), "{text}: {fault}");
    }
    let plan = case.plan("mlflow: http://user:secret@host:5000/\ntraining_config: {TrainingArguments: {report_to: mlflow}}\n").unwrap();
    assert_eq!(plan.trackers.mlflow.as_ref().unwrap().experiment, "Default");
    assert!(
        !plan.json().to_string().contains("secret") && !format!("{:?}", plan.settings()).contains("secret")
    );
    assert!(case.plan("otlp: collector:4317\n").unwrap_err().message.contains("expected http://HOST:PORT"));
}

#[test]
fn beginnings_of_peft_that_are_not_here_say_why() {
    let case = Case::new();
    let lora =
        |word: &str| case.plan(&format!("training_config: {{LoraConfig: {{init_lora_weights: {word}}}}}\n"));
    assert!(lora("true").is_ok() && lora("True").is_ok() && lora("gaussian").is_ok());
    assert_eq!(lora("orthogonal").unwrap().model.lora.init, LoraInit::Orthogonal);
    assert!(lora("orthogonal, r: 5").unwrap_err().message.contains("needs even ranks, found 5"));
    for (word, why) in [
        ("pissa_niter_4", "it changes the base"),
        ("eva", "a pass over the data"),
        ("x", "expected true, gaussian or orthogonal"),
    ] {
        let fault = lora(word).unwrap_err();
        assert!(fault.message.contains(why), "{fault}");
    }
}
