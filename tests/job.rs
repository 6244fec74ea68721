//! The whole job with the real binary: the files it leaves on disk and in a real registry, and that a run repeats
//! itself.

#[path = "support/http.rs"]
mod http;
#[path = "support/job.rs"]
mod job;
#[path = "support/registry.rs"]
mod registry;

use std::collections::BTreeMap;
use std::process::Command;

use http::Server;
use job::{Work, done, golden_path};
use registry::{PASSWORD, Registry, Setup, run};
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;

/// Returns the lines of metrics.jsonl: those of steps and those of evaluations.
fn metrics(work: &Work, folder: &str) -> (Vec<Value>, Vec<Value>) {
    let text = work.text(&format!("{folder}/metrics.jsonl"));
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let (evaluations, steps): (Vec<Value>, Vec<Value>) =
        lines.partition(|line| line.get("eval_loss").is_some());
    let keys = |line: &Value| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(", ");
    for line in &steps {
        assert_eq!(keys(line), "step, loss, grad_norm, learning_rate, epoch, num_tokens");
    }
    for line in &evaluations {
        let common = "step, epoch, eval_loss, eval_perplexity, eval_mean_token_accuracy";
        assert!(keys(line).starts_with(common), "{line}");
    }
    (steps, evaluations)
}

fn losses(steps: &[Value]) -> Vec<f64> {
    steps.iter().map(|line| line["loss"].as_f64().unwrap()).collect()
}

/// Returns the paths that a PEFT file has a pair for. Every tensor is f32 and has the rank.
fn adapted(work: &Work, folder: &str, rank: usize) -> Vec<String> {
    let file = work.read(&format!("{folder}/adapter_model.safetensors"));
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut paths = Vec::new();
    for (name, view) in tensors.tensors() {
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        let path = name.strip_prefix("base_model.model.").unwrap();
        match (path.strip_suffix(".lora_A.weight"), path.strip_suffix(".lora_B.weight")) {
            (Some(path), _) => {
                assert_eq!(view.shape()[0], rank, "{name}");
                paths.push(path.to_owned());
            }
            (_, Some(path)) => {
                assert_eq!(view.shape()[1], rank, "{name}");
                assert!(tensors.tensor(&format!("base_model.model.{path}.lora_A.weight")).is_ok(), "{name}");
            }
            _ => panic!("{name}"),
        }
    }
    assert_eq!(tensors.len(), 2 * paths.len());
    paths.sort();
    paths
}

/// Returns the digest that an image's folder claims to have, read by skopeo, and that of its layer.
fn digests(work: &Work, layout: &str) -> (String, String) {
    let image = format!("oci:{}:latest", work.path(layout).display());
    let inspected = run(Command::new("skopeo").args(["inspect", &image]));
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!((&inspected["Os"], &inspected["Architecture"]), (&"linux".into(), &"amd64".into()));
    assert_eq!(inspected["Layers"].as_array().unwrap().len(), 1);
    (inspected["Digest"].as_str().unwrap().into(), inspected["Layers"][0].as_str().unwrap().into())
}

#[test]
fn the_example_trains_ships_and_repeats_itself() {
    let work = Work::new();
    let first = work.done(&["example", "try"]);
    assert_eq!(work.list("try"), ["adapter", "data.parquet", "hone.yaml", "image", "model"]);
    let written = [
        ".hone.lock",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fine_tuning_completed.txt",
        "hone.json",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "timeline.jsonl",
    ];
    assert_eq!(work.list("try/adapter"), written);

    let (steps, evaluations) = metrics(&work, "try/adapter");
    let losses = losses(&steps);
    assert!(losses.len() >= 4 && losses.last().unwrap() < &(losses[0] / 2.0), "{losses:?}");
    assert!(!evaluations.is_empty());

    let projections = [
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ];
    let expected: Vec<String> = (0..2)
        .flat_map(|layer| projections.map(|projection| format!("model.layers.{layer}.{projection}")))
        .collect();
    assert_eq!(adapted(&work, "try/adapter", 16), expected);
    let config = work.json("try/adapter/adapter_config.json");
    assert_eq!(
        (&config["peft_type"], &config["r"], &config["lora_alpha"]),
        (&"LORA".into(), &16.into(), &32.into())
    );

    let (digest, layer) = digests(&work, "try/image");
    assert!(first.stdout.contains(&digest), "{}", first.stdout);
    assert_eq!(work.json("try/adapter/hone.json")["image"]["digest"], digest.as_str());
    let sentinel = std::fs::metadata(work.path("try/adapter/fine_tuning_completed.txt")).unwrap();
    for name in ["adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.jsonl"] {
        let file = std::fs::metadata(work.path("try/adapter").join(name)).unwrap();
        assert!(
            file.modified().unwrap() <= sentinel.modified().unwrap(),
            "{name} is newer than the sentinel"
        );
    }

    // The printed command runs again and trains nothing a second time.
    let command =
        first.stdout.lines().find_map(|line| line.strip_prefix("To run it by hand: hone ")).unwrap();
    let before = work.text("try/adapter/metrics.jsonl");
    let again = work.done(&command.split(' ').collect::<Vec<_>>());
    assert!(
        again.stderr.contains("already trained") && !again.stderr.contains("grad_norm"),
        "{}",
        again.stderr
    );
    assert!(again.stdout.contains(&digest));
    assert_eq!(work.text("try/adapter/metrics.jsonl"), before);

    // Another folder and other numbers of threads give the same bytes.
    for threads in ["1", "2"] {
        let other = Work::new();
        done(other.hone(&["-q", "example", "try"]).env("RAYON_NUM_THREADS", threads));
        for name in ["adapter_model.safetensors", "metrics.jsonl"] {
            let name = format!("try/adapter/{name}");
            assert!(work.read(&name) == other.read(&name), "{name} differs with {threads} threads");
        }
        assert_eq!(digests(&other, "try/image").1, layer);
    }
}

#[test]
fn from_an_url_to_a_registry_as_kaito_reads_it() {
    let work = Work::new();
    work.copy("llama3/model", "model");
    let content = std::fs::read(golden_path("_data/messages.parquet")).unwrap();
    let server = Server::files(BTreeMap::from([("/rows/messages.parquet".into(), content)]));
    let registry = Registry::start(Setup { tls: true, password: true, ..Default::default() });
    let image = format!("{}/team/adapter:v1", registry.host);
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/training_config/qlora.yaml");
    let (login, authority) = (registry.login(PASSWORD), registry.path("ca.crt"));
    let docker = work.path("docker");
    std::fs::create_dir(&docker).unwrap();
    std::fs::copy(login, docker.join("config.json")).unwrap();
    let ended = done(
        work.hone(&[
            "run",
            "--config",
            template,
            "--model",
            "model",
            "--name",
            "llama-tiny",
            "--output",
            "out",
        ])
        .args(["--data", &server.url("/rows/messages.parquet"), "--push", &image])
        .args(["--set", "TrainingArguments.max_steps=6", "--set", "TrainingArguments.logging_steps=2"])
        .env("DOCKER_CONFIG", docker)
        .env("HONE_CA_FILE", &authority),
    );
    assert_eq!(metrics(&work, "out").0.len(), 3);

    let mut skopeo = Command::new("skopeo");
    skopeo.env("SSL_CERT_FILE", &authority).args(["inspect", "--format", "{{.Digest}}", "--creds"]);
    let remote = format!("docker://{image}");
    let digest = run(skopeo.arg(registry::login_pair()).arg(&remote));
    let digest = digest.trim();
    assert!(ended.stdout.contains(&image) && ended.stdout.contains(digest), "{}", ended.stdout);
    assert_eq!(work.json("out/hone.json")["image"]["digest"], digest);
    let termination = work.json("termination.json");
    assert_eq!((&termination["code"], &termination["digest"]), (&0.into(), &digest.into()));
    assert_eq!(termination["image"], image.as_str());

    let pulled = registry::pull_as_kaito(&registry, &image, &work.path("pulled"));
    assert_eq!(pulled.manifest["annotations"]["sh.kaito.model.name"], "llama-tiny");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(
            std::fs::read(pulled.data.join(name)).unwrap() == work.read(&format!("out/{name}")),
            "{name}"
        );
    }
}

#[test]
fn kaitos_module_names_reach_phi3s_fused_projections() {
    let work = Work::new();
    work.copy("phi3/model", "model");
    work.copy("_data/messages.parquet", "data.parquet");
    // The setting that KAITO's controller uses for phi-3 presets.
    let modules = "k_proj,q_proj,v_proj,o_proj,gate_proj,down_proj,up_proj";
    let arguments = ["run", "--model", "model", "--data", "data.parquet", "--output", "out"];
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/training_config/qlora.yaml");
    let ended = done(
        work.hone(&arguments)
            .args(["--config", template, "--set", "TrainingArguments.max_steps=3"])
            .env("DEFAULT_TARGET_MODULES", modules),
    );
    let fused = ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"];
    let mut paths = adapted(&work, "out", 8);
    paths.retain(|path| path.starts_with("model.layers.0."));
    assert_eq!(paths, fused.map(|name| format!("model.layers.0.{name}")));
    let mut targets: Vec<String> =
        serde_json::from_value(work.json("out/adapter_config.json")["target_modules"].clone()).unwrap();
    targets.sort();
    assert_eq!(targets, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]);
    assert!(ended.stderr.contains("qkv_proj"), "says what the names became: {}", ended.stderr);
}

#[test]
fn prompts_with_completions_and_plain_text_train_too() {
    for (file, layout) in [("prompt_completion", "prompt and completion"), ("text", "text")] {
        let work = Work::new();
        work.copy("llama3/model", "model");
        work.copy(&format!("_data/{file}.parquet"), "data.parquet");
        let arguments = ["run", "--model", "model", "--data", "data.parquet", "--output", "out"];
        let steps = ["--set", "TrainingArguments.max_steps=3", "--set", "TrainingArguments.logging_steps=1"];
        let ended = work.done(&[&arguments[..], &steps].concat());
        assert!(ended.stderr.contains(&format!("rows of {layout}")), "{}", ended.stderr);
        let losses = losses(&metrics(&work, "out").0);
        assert!(losses.len() == 3 && losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{losses:?}");
    }
}

/// Rows to evaluate on from files of two kinds: none of them trains, each file has its loss, the best is that of one.
#[test]
fn given_rows_are_evaluated_and_never_trained() {
    let work = Work::with_llama();
    let talks: String = (0..6)
        .map(|row| {
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"talk {row}\"}}, \
             {{\"role\": \"assistant\", \"content\": \"held out {row}\"}}]}}\n"
            )
        })
        .collect();
    work.write("talks.jsonl", talks);
    work.write("faq.csv", "prompt,completion\nWhat is 1 + 1?,2\nWhat is 2 + 2?,4\n");
    let common = "run --model model --data data.parquet --cache cache --device cpu --set TrainingArguments.max_steps=4 \
                  --set TrainingArguments.max_length=64 --set TrainingArguments.per_device_train_batch_size=2";
    let run = |more: &str| work.done(&format!("{common} {more}").split_whitespace().collect::<Vec<_>>());
    run("--output plain --set DatasetConfig.train_test_split=1");
    let evaluation = "--evaluation-data talks.jsonl --evaluation-data faq.csv#name=questions --answers 2 \
                      --set TrainingArguments.eval_strategy=steps --set TrainingArguments.eval_steps=2 \
                      --set TrainingArguments.eval_on_start=true";
    run(&format!("--output judged {evaluation}"));
    let adapter = "adapter_model.safetensors";
    assert_eq!(work.read(&format!("judged/{adapter}")), work.read(&format!("plain/{adapter}")));

    let (_, evaluations) = metrics(&work, "judged");
    let steps: Vec<u64> = evaluations.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 2, 4]);
    for line in &evaluations {
        let [all, talks, questions] = ["eval_loss", "eval_talks_loss", "eval_questions_loss"]
            .map(|name| line[name].as_f64().unwrap_or_else(|| panic!("{name} in {line}")));
        assert!((talks.min(questions)..=talks.max(questions)).contains(&all), "{line}");
        assert!(line["eval_questions_mean_token_accuracy"].is_f64(), "{line}");
    }
    let page = work.text("judged/report.html");
    for part in ["Evaluation loss by source", "questions", "Held-out prompts", "talk 0"] {
        assert!(page.contains(part), "{part}");
    }
    // Rows that were given are what `hone eval` looks at later.
    let told = work.done(&["eval", "judged", "--format", "json", "--device", "cpu", "--generate", "0"]);
    let told: Value = serde_json::from_str(&told.stdout).unwrap();
    let rows = &told["rows"];
    assert_eq!(
        (&rows["used"], &rows["split"], &rows["trained_on"]),
        (&8.into(), &"evaluation".into(), &"no".into())
    );

    let best = "--set TrainingArguments.load_best_model_at_end=true \
                --set TrainingArguments.metric_for_best_model=eval_questions_loss";
    run(&format!("--output best {evaluation} {best}"));
    assert_eq!(work.json("best/hone.json")["trained"]["best"]["metric"], "eval_questions_loss");
}
