//! The merged model against base and adapter side by side, as safetensors and as GGUF, read back here, by transformers,
//! by the `gguf` package and by llama.cpp (`scripts/export.py`, if these are installed).

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use hone::adapter;
use hone::export::folder::Folder;
use hone::export::gguf::architecture::Architecture;
use hone::export::gguf::file::{Gguf, Kind, Value};
use hone::export::gguf::store::GgufStore;
use hone::export::gguf::{self, vocabulary::OfModel};
use hone::export::merged::Merged;
use hone::export::{Stored, model_folder};
use hone::facts::config::Config;
use hone::facts::{Facts, FourBitCode, LoraOptions, Precision, Quantization, family};
use hone::model::batch::Batch;
use hone::model::decoder::Decoder;
use hone::model::lora::{Lora, Mixture, Pairs, Part};
use hone::model::weights::{Checkpoint, Store};
use hone::model::{self, load};
use hone::report::Report;
use serde_json::json;

/// TOLERANCE: both sides compute in f32; the largest difference found is 3e-5, on logits of up to 20. A scale of
/// rsLoRA taken for the usual one makes 0.1 and more.
const ROUNDING: f32 = 1e-4;
/// TOLERANCE: the change of logits by Q8, relative to their size. A step is 1/127 of a block's largest value, 0.5 % of
/// a usual value; the tiny random models make 2.6 % of it at most (`llama32_tied`, whose embedding is rounded on both
/// ends).
const Q8_ROUNDING: f32 = 4e-2;
/// TOLERANCE: the change of logits by rounding weights to bf16, relative to their size.
const RELATIVE_ROUNDING: f32 = 2e-2;

const FAMILIES: [&str; 14] = [
    "llama3",
    "llama32_tied",
    "llama_odd",
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "phi2",
    "phi3",
    "gemma2",
    "gemma3",
    "granite",
    "falcon40b",
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn facts(folder: &Path) -> Facts {
    family::describe(&Config::read(folder).unwrap()).unwrap()
}

fn options(folder: &Path, quantization: Quantization) -> model::Options {
    let lora = LoraOptions::default();
    model::Options { folder: folder.to_owned(), quantization, lora, precision: Precision::F32 }
}

fn decoder(folder: &Path, quantization: Quantization) -> Decoder {
    load::load(facts(folder), &options(folder, quantization), &Device::Cpu, &Report::silent()).unwrap()
}

/// Returns rows that use many tokens and are shorter than any window.
fn batch(facts: &Facts) -> Batch {
    let mut batch = Batch::default();
    for (number, length) in [20usize, 7].into_iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|at| ((at * 37 + number * 11 + 3) % 500) as u32).collect();
        assert!(ids.iter().all(|id| (*id as usize) < facts.vocab));
        batch.push(&ids, &vec![true; length], length, 0);
    }
    batch
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
}

/// Returns the root mean square of the difference, as a share of that of the second tensor.
fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let square = |x: Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    square((a - b).unwrap()) / square(b.clone())
}

/// Returns logits of base and adapters side by side.
fn beside(decoder: &Decoder, parts: &[(&Pairs, f64)]) -> Tensor {
    let batch = batch(&decoder.facts);
    let part = |(adapter, strength): &(&'static Pairs, f64)| Part {
        adapter,
        rows: 0..batch.rows(),
        strength: *strength,
    };
    // The parts live as long as this call.
    let parts: Vec<(&'static Pairs, f64)> =
        parts.iter().map(|(pairs, strength)| (&*Box::leak(Box::new((*pairs).clone())), *strength)).collect();
    let mixture = Mixture::new(parts.iter().map(part).collect());
    decoder.logits(&batch, Lora::Mixed(&mixture)).unwrap()
}

fn alone(decoder: &Decoder) -> Tensor {
    decoder.logits(&batch(&decoder.facts), Lora::None).unwrap()
}

fn pairs(adapter: &Path, facts: &Facts) -> Pairs {
    adapter::read(adapter).unwrap().pairs(facts, DType::F32, DType::F32, &candle_core::Device::Cpu).unwrap()
}

/// Returns an adapter folder with other settings.
fn changed(name: &str, change: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let from = golden(name).join("final_adapter");
    std::fs::copy(from.join(adapter::WEIGHTS_FILE), folder.path().join(adapter::WEIGHTS_FILE)).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(from.join(adapter::CONFIG_FILE)).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(folder.path().join(adapter::CONFIG_FILE), config.to_string()).unwrap();
    folder
}

struct Written {
    parent: tempfile::TempDir,
}

impl Written {
    fn folder(&self) -> PathBuf {
        self.parent.path().join("merged")
    }
}

/// Writes a model folder.
fn write(
    base: &Path,
    parts: Vec<(&Pairs, f64)>,
    stored: Stored,
    four_bit: Option<(FourBitCode, bool)>,
    shard_bytes: u64,
) -> Written {
    let parent = tempfile::tempdir().unwrap();
    let written = Written { parent };
    let (facts, checkpoint) = (facts(base), Checkpoint::open(base).unwrap());
    let merged = Merged::new(&facts, &checkpoint, four_bit, parts);
    let folder = Folder::begin(&written.folder()).unwrap();
    model_folder::write_weights(&merged, stored, shard_bytes, &folder, &Report::silent()).unwrap();
    let about = model_folder::Beside { from: base, chat_template: None, stop_tokens: &[], card: "" };
    model_folder::write_beside(&about, stored, &folder).unwrap();
    folder.finish().unwrap();
    written
}

#[test]
fn every_familys_merged_model_computes_what_base_and_adapter_do() {
    for name in FAMILIES {
        let base = golden(name).join("model");
        let decoder_of_base = decoder(&base, Quantization::None);
        let pairs = pairs(&golden(name).join("final_adapter"), &decoder_of_base.facts);
        let expected = beside(&decoder_of_base, &[(&pairs, 1.0)]);
        assert!(worst(&expected, &alone(&decoder_of_base)) > 1e-2, "{name}: the adapter changes something");
        let written = write(&base, vec![(&pairs, 1.0)], Stored::F32, None, u64::MAX);
        let merged = decoder(&written.folder(), Quantization::None);
        let difference = worst(&alone(&merged), &expected);
        assert!(difference <= ROUNDING, "{name}: {difference}");
        let written = write(&base, vec![(&pairs, 1.0)], Stored::Bf16, None, u64::MAX);
        let difference = relative(&alone(&decoder(&written.folder(), Quantization::None)), &expected);
        println!("{name} in bf16: {difference}");
        assert!(difference <= RELATIVE_ROUNDING, "{name} in bf16: {difference}");
    }
}

#[test]
fn scales_patterns_and_strengths_are_those_of_the_engine() {
    let base = golden("llama3").join("model");
    let decoder_of_base = decoder(&base, Quantization::None);
    let of = |change: &dyn Fn(&mut serde_json::Value)| {
        let folder = changed("llama3", change);
        pairs(folder.path(), &decoder_of_base.facts)
    };
    let rslora = of(&|config| config["use_rslora"] = json!(true));
    let patterned = of(&|config| {
        config["alpha_pattern"] = json!({"down_proj": 3.5, r"layers\.1\.self_attn\.q_proj": 0.5});
    });
    let plain = of(&|_| {});
    // B is not zero, so that a magnitude of 1 for each row changes every length.
    let magnitudes = {
        let folder = changed("llama3", |config| config["use_dora"] = json!(true));
        let file = folder.path().join(adapter::WEIGHTS_FILE);
        let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
        let of_b: Vec<(String, usize)> = tensors
            .iter()
            .filter(|(name, _)| name.contains("lora_B"))
            .map(|(name, b)| (name.replace("lora_B.weight", "lora_magnitude_vector"), b.dims()[0]))
            .collect();
        for (name, rows) in of_b {
            let values: Vec<f32> = (0..rows).map(|row| 0.8 + 0.01 * (row % 40) as f32).collect();
            tensors.insert(name, Tensor::new(values, &candle_core::Device::Cpu).unwrap());
        }
        candle_core::safetensors::save(&tensors, &file).unwrap();
        pairs(folder.path(), &decoder_of_base.facts)
    };
    let cases: [(&str, Vec<(&Pairs, f64)>); 8] = [
        ("magnitudes", vec![(&magnitudes, 1.0)]),
        ("half of magnitudes", vec![(&magnitudes, 0.5)]),
        ("magnitudes and a pair", vec![(&plain, -0.3), (&magnitudes, 0.7)]),
        ("rslora", vec![(&rslora, 1.0)]),
        ("alpha_pattern", vec![(&patterned, 1.0)]),
        ("half", vec![(&plain, 0.5)]),
        ("a sum", vec![(&rslora, 0.7), (&patterned, -0.3)]),
        ("nothing of it", vec![(&plain, 0.0)]),
    ];
    for (name, parts) in cases {
        let expected = beside(&decoder_of_base, &parts);
        let written = write(&base, parts, Stored::F32, None, u64::MAX);
        let difference = worst(&alone(&decoder(&written.folder(), Quantization::None)), &expected);
        assert!(difference <= ROUNDING, "{name}: {difference}");
    }
}

#[test]
fn a_merge_into_the_trainings_weights_is_what_was_trained() {
    let nf4 = Quantization::FourBit { code: FourBitCode::Nf4, double: true };
    for (name, quantization, four_bit) in [
        ("llama3", nf4, Some((FourBitCode::Nf4, true))),
        ("phi3", nf4, Some((FourBitCode::Nf4, true))),
        // Quantised in the checkpoint already.
        ("llama_stored_nf4", Quantization::Stored { code: FourBitCode::Nf4, double: true }, None),
    ] {
        let base = golden(name).join("model");
        let trained = decoder(&base, quantization);
        let pairs = pairs(&golden(name).join("final_adapter"), &trained.facts);
        let expected = beside(&trained, &[(&pairs, 1.0)]);
        let written = write(&base, vec![(&pairs, 1.0)], Stored::F32, four_bit, u64::MAX);
        let config = std::fs::read_to_string(written.folder().join("config.json")).unwrap();
        assert!(!config.contains("quantization_config"), "{name}");
        let difference = worst(&alone(&decoder(&written.folder(), Quantization::None)), &expected);
        assert!(difference <= ROUNDING, "{name}: {difference}");
    }
}

#[test]
fn shards_hold_together_what_one_file_holds() {
    let base = golden("llama3").join("model");
    let facts = facts(&base);
    let pairs = pairs(&golden("llama3").join("final_adapter"), &facts);
    let one = write(&base, vec![(&pairs, 1.0)], Stored::Bf16, None, u64::MAX);
    let many = write(&base, vec![(&pairs, 1.0)], Stored::Bf16, None, 100_000);
    assert!(one.folder().join("model.safetensors").exists());
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(many.folder().join("model.safetensors.index.json")).unwrap())
            .unwrap();
    let (a, b) = (Checkpoint::open(&one.folder()).unwrap(), Checkpoint::open(&many.folder()).unwrap());
    let names: Vec<&str> = a.names().collect();
    assert_eq!(names, b.names().collect::<Vec<_>>());
    let bytes: usize = names.iter().map(|name| a.raw(name).unwrap().bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    for name in names {
        assert_eq!(a.raw(name).unwrap().bytes, b.raw(name).unwrap().bytes, "{name}");
        assert!(index["weight_map"][name].as_str().unwrap().starts_with("model-000"), "{name}");
    }
}

/// A wrapper's parts beside its language model stay, under their own names.
#[test]
fn a_multimodal_model_stays_whole() {
    for name in ["gemma3_wrapper", "mistral3_wrapper"] {
        let base = golden(name).join("model");
        let decoder_of_base = decoder(&base, Quantization::None);
        let pairs = pairs(&golden(name).join("final_adapter"), &decoder_of_base.facts);
        let written = write(&base, vec![(&pairs, 1.0)], Stored::F32, None, u64::MAX);
        let names = |folder: &Path| {
            let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            tensors.names().into_iter().map(str::to_owned).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(names(&written.folder()), names(&base), "{name}");
        let expected = beside(&decoder_of_base, &[(&pairs, 1.0)]);
        let difference = worst(&alone(&decoder(&written.folder(), Quantization::None)), &expected);
        assert!(difference <= ROUNDING, "{name}: {difference}");
    }
}

/// Writes one GGUF file of a model with its adapter.
fn write_gguf(name: &str, pairs: &Pairs, stored: Stored) -> Written {
    write_gguf_at(name, pairs, 1.0, stored)
}

fn write_gguf_at(name: &str, pairs: &Pairs, strength: f64, stored: Stored) -> Written {
    let parent = tempfile::tempdir().unwrap();
    let written = Written { parent };
    let base = &golden(name).join("model");
    let (facts, checkpoint) = (facts(base), Checkpoint::open(base).unwrap());
    let architecture = Architecture::of(&facts).unwrap();
    let tokenizer = hone::dataset::Tokenizer::open(base).unwrap();
    let of_model = OfModel {
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_id(),
        adds_bos: tokenizer.bos_id().is_some()
            && tokenizer.encode("a", true).unwrap().first().copied() == tokenizer.bos_id(),
        chat_template: tokenizer.chat_template(),
        ..OfModel::default()
    };
    let vocabulary = gguf::tokenizer(base, facts.vocab, &of_model).unwrap();
    let merged = Merged::new(&facts, &checkpoint, None, vec![(pairs, strength)]);
    let folder = Folder::begin(&written.folder()).unwrap();
    let planned = gguf::plan(&merged, &architecture, vocabulary.keys, stored, "test").unwrap();
    gguf::write(&merged, &planned, "model.gguf", &folder, &Report::silent()).unwrap();
    folder.finish().unwrap();
    written
}

/// Families of the fixtures whose form llama.cpp computes.
const IN_GGUF: [&str; 10] = [
    "llama3",
    "llama32_tied",
    "llama_odd",
    "mistral",
    "qwen2",
    "qwen3",
    "phi2",
    "phi3",
    "granite",
    "falcon40b",
];

#[test]
fn what_a_gguf_file_holds_computes_what_base_and_adapter_do() {
    for name in IN_GGUF {
        let base = golden(name).join("model");
        let decoder_of_base = decoder(&base, Quantization::None);
        let facts = decoder_of_base.facts.clone();
        let pairs = pairs(&golden(name).join("final_adapter"), &facts);
        let expected = beside(&decoder_of_base, &[(&pairs, 1.0)]);
        let architecture = Architecture::of(&facts).unwrap();
        for (stored, bound) in
            [(Stored::F32, ROUNDING), (Stored::Bf16, RELATIVE_ROUNDING), (Stored::Q8, Q8_ROUNDING)]
        {
            let written = write_gguf(name, &pairs, stored);
            let file = written.folder().join("model.gguf");
            let store = GgufStore::open(&file, &facts, &architecture).unwrap();
            assert_eq!(store.unknown(), Vec::<&str>::new(), "{name}");
            assert!(store.names().len() >= facts.tensors().len(), "{name}");
            let checkpoint = Checkpoint::of_store(Box::new(store));
            let options = options(&base, Quantization::None);
            let read = load::load_from(&checkpoint, facts.clone(), &options, &Device::Cpu, &Report::silent())
                .unwrap();
            let logits = alone(&read);
            let difference = match stored {
                Stored::F32 => worst(&logits, &expected),
                _ => relative(&logits, &expected),
            };
            println!("{name} as {stored:?}: {difference}");
            assert!(difference <= bound, "{name} as {stored:?}: {difference}");
        }
    }
}

#[test]
fn an_adapter_alone_scales_as_the_engine_does() {
    let base = golden("llama3").join("model");
    let facts = facts(&base);
    let architecture = Architecture::of(&facts).unwrap();
    let folder = changed("llama3", |config| {
        config["use_rslora"] = json!(true);
        config["alpha_pattern"] = json!({"down_proj": 3.5});
    });
    let a = pairs(folder.path(), &facts);
    let b = pairs(&golden("llama3").join("final_adapter"), &facts);
    let parent = tempfile::tempdir().unwrap();
    let to = parent.path().join("lora");
    let out = Folder::begin(&to).unwrap();
    let parts = [(&a, 0.5), (&b, -1.0)];
    let title = ("a.gguf", "test");
    gguf::write_adapter(&facts, &architecture, &parts, 16.0, Stored::F32, title, &out).unwrap();
    out.finish().unwrap();
    let file = Gguf::open(&to.join("a.gguf")).unwrap();
    assert_eq!(file.get("general.type"), Some(&Value::Text("adapter".into())));
    assert_eq!(file.get("adapter.type"), Some(&Value::Text("lora".into())));
    assert_eq!(file.get("adapter.lora.alpha"), Some(&Value::F32(16.0)));
    for (linear, (layer, projection)) in facts.projections().enumerate() {
        let name = format!("{}.weight", facts.path(layer, projection));
        let entry = architecture.entry(&facts, &name).unwrap();
        let read = |letter: &str| file.values(&format!("{}.lora_{letter}", entry.name)).unwrap();
        let (Some((low, a_values)), Some((_, b_values))) = (read("a"), read("b")) else {
            assert!(a.get(linear).is_none() && b.get(linear).is_none(), "{name}");
            continue;
        };
        let (rank, cols) = (low.shape[0], low.shape[1]);
        assert_eq!(low.kind, Kind::F32);
        let b_values = entry.order.undo(&b_values, rank);
        // llama.cpp: alpha / rank * B A.
        let product = |row: usize, col: usize| -> f64 {
            let sum: f64 = (0..rank)
                .map(|r| f64::from(b_values[row * rank + r]) * f64::from(a_values[r * cols + col]))
                .sum();
            16.0 / rank as f64 * sum
        };
        let expected = |row: usize, col: usize| -> f64 {
            let of = |pairs: &Pairs, strength: f64| {
                let Some(pair) = pairs.get(linear) else { return 0.0 };
                let dense = |weight: &hone::ops::matmul::Weight| match weight {
                    hone::ops::matmul::Weight::Dense(tensor) => tensor.to_vec2::<f32>().unwrap(),
                    _ => panic!("dense"),
                };
                let (a, b) = (dense(&pair.a), dense(&pair.b));
                let sum: f64 = b[row].iter().zip(&a).map(|(b, a)| f64::from(*b) * f64::from(a[col])).sum();
                strength * pair.scale * sum
            };
            of(&a, 0.5) + of(&b, -1.0)
        };
        for (row, col) in [(0, 0), (1, 5), (projection.rows - 1, projection.cols - 1), (17, 3)] {
            let (found, wanted) = (product(row, col), expected(row, col));
            assert!((found - wanted).abs() <= 1e-6 + 1e-5 * wanted.abs(), "{name}: {found} {wanted}");
        }
    }
}

/// Returns the Python that has these modules: `HONE_PYTHON`, else python3.
fn python(modules: &str) -> Option<String> {
    let python = std::env::var("HONE_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    match found.is_ok_and(|output| output.status.success()) {
        true => Some(python),
        false => {
            eprintln!("not compared: {python} has no {modules}");
            None
        }
    }
}

fn script(python: &str, arguments: &[&str]) -> serde_json::Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/export.py");
    let output = Command::new(python).arg(file).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

/// transformers loads the merged folder and computes what peft computes of base and adapter.
#[test]
fn transformers_loads_the_merged_folder() {
    let Some(python) = python("torch, transformers, peft") else { return };
    for name in ["llama3", "qwen2", "phi3", "gemma2", "granite", "llama_stored_nf4"] {
        let base = golden(name).join("model");
        let adapter = golden(name).join("final_adapter");
        let pairs = pairs(&adapter, &facts(&base));
        let written = write(&base, vec![(&pairs, 1.0)], Stored::F32, None, 200_000);
        let peft = name != "llama_stored_nf4"; // bitsandbytes may be missing
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let mut arguments = vec!["transformers".to_owned(), text(&written.folder())];
        if peft {
            arguments.extend([text(&base), text(&adapter)]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let found = script(&python, &arguments);
        assert_eq!(
            (found["missing"].as_u64(), found["unexpected"].as_u64()),
            (Some(0), Some(0)),
            "{name}: {found}"
        );
        if peft {
            let difference = found["difference"].as_f64().unwrap();
            assert!(difference <= f64::from(ROUNDING), "{name}: {difference}");
        }
    }
}

/// The reference reader of the format finds the same keys, shapes and values.
#[test]
fn the_gguf_package_reads_the_file() {
    let Some(python) = python("gguf, numpy") else { return };
    for stored in [Stored::F32, Stored::F16, Stored::Bf16, Stored::Q8] {
        let base = golden("llama3").join("model");
        let pairs = pairs(&golden("llama3").join("final_adapter"), &facts(&base));
        let written = write_gguf("llama3", &pairs, stored);
        let file = written.folder().join("model.gguf");
        let found = script(&python, &["gguf", file.to_str().unwrap()]);
        let own = Gguf::open(&file).unwrap();
        assert_eq!(found["keys"]["general.architecture"], "llama");
        assert_eq!(found["keys"]["llama.attention.head_count_kv"], 2);
        assert_eq!(found["tensors"].as_object().unwrap().len(), own.tensors.len());
        for (tensor, _) in &own.tensors {
            let (_, values) = own.values(&tensor.name).unwrap().unwrap();
            let theirs = &found["tensors"][&tensor.name];
            assert_eq!(theirs["shape"], json!(tensor.shape), "{}", tensor.name);
            let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
            let difference = (theirs["sum"].as_f64().unwrap() - sum).abs();
            assert!(difference <= 1e-6 * sum.max(1.0), "{} {stored:?}: {difference}", tensor.name);
        }
    }
}

/// llama.cpp loads the file and draws the same greedy tokens; with the adapter alone, too.
#[test]
fn llama_cpp_draws_the_same_tokens() {
    let Some(python) = python("xllamacpp") else { return };
    for name in IN_GGUF {
        let base = golden(name).join("model");
        let decoder_of_base = decoder(&base, Quantization::None);
        let pairs = pairs(&golden(name).join("final_adapter"), &decoder_of_base.facts);
        let merged = decoder(
            &write(&base, vec![(&pairs, 1.0)], Stored::F32, None, u64::MAX).folder(),
            Quantization::None,
        );
        let draw = |file: &Path, prompt: &str, lora: Option<&Path>| {
            let (file, lora) = (file.to_str().unwrap(), lora.map(|path| path.to_str().unwrap()));
            let count = DRAWN.to_string();
            let arguments = ["llama.cpp", file, prompt, &count];
            let found = script(&python, &arguments.into_iter().chain(lora).collect::<Vec<_>>());
            let ids = found["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
            (ids.collect::<Vec<u32>>(), found["prompt_tokens"].as_u64().unwrap() as usize)
        };
        let prompt: Vec<u32> = (0..12u32).map(|at| (at * 37 + 3) % 500).collect();
        let ids = prompt.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let written = write_gguf(name, &pairs, Stored::F32);
        let file = written.folder().join("model.gguf");
        let tokenizer = hone::dataset::Tokenizer::open(&base).unwrap();
        same_greedy(&format!("{name}, ids"), &merged, &tokenizer, &prompt, &draw(&file, &ids, None).0);

        // The same tokens of a text; beyond a window llama.cpp computes otherwise.
        let window = merged.facts.heads().window.unwrap_or(usize::MAX);
        for text in TEXTS {
            let own = tokenizer.encode(text, true).unwrap();
            let (tokens, count) = draw(&file, text, None);
            assert_eq!(count, own.len(), "{name}: tokens of {text:?}, {own:?}");
            if own.len() + DRAWN <= window {
                same_greedy(&format!("{name}, {text:?}"), &merged, &tokenizer, &own, &tokens);
            }
        }

        // The base, with the adapter alone.
        let written = write_gguf_at(name, &pairs, 0.0, Stored::F32);
        let to = written.parent.path().join("lora");
        let out = Folder::begin(&to).unwrap();
        let architecture = Architecture::of(&merged.facts).unwrap();
        let parts = [(&pairs, 1.0)];
        let title = ("a.gguf", "test");
        gguf::write_adapter(&merged.facts, &architecture, &parts, 16.0, Stored::F32, title, &out).unwrap();
        out.finish().unwrap();
        let file = written.folder().join("model.gguf");
        let drawn = draw(&file, &ids, Some(&to.join("a.gguf"))).0;
        same_greedy(&format!("{name}, adapter apart"), &merged, &tokenizer, &prompt, &drawn);
    }
}

/// Every kind of text that tokenizers divide in their own ways. The last has an accent apart from its letter: it is
/// compared if the tokenizer does not compose letters, since llama.cpp never does.
const DIVIDED: [&str; 30] = [
    "def f(x):\n    return  x + 10",
    "a  b   c    d",
    "  lead",
    "trail   ",
    " ",
    "\n\n\n",
    "a\n\n b \n\t c",
    "tabs\t\tand\t text",
    "\r\nwin\r\n\r\nline",
    "1234567 12 3",
    "x=1;y=22;z=333;w=4444",
    "3.14e-10 A1B2C3",
    "\u{663}\u{664}\u{665} \u{bd} \u{b2} \u{2167}",
    "I'M YOU'LL we'd THEY'RE he's 'tis",
    "don't can't I've 'S 'T 'LL",
    "\u{4e2d}\u{6587}\u{5b57}\u{7b26}\u{ff0c}\u{4f60}\u{597d}",
    "\u{65e5}\u{672c}\u{8a9e}\u{306e}\u{30c6}\u{30ad}\u{30b9}\u{30c8}",
    "\u{d55c}\u{ad6d}\u{c5b4}",
    "\u{1f600} \u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467} emoji \u{1f389}\u{1f389}",
    "for (int i=0;i<10;++i) { a[i]+=i; }",
    "if __name__ == '__main__':\n\tprint(\"hi\")",
    "<html><b>x</b></html>",
    "... --- !!!???",
    "a_b-c.d/e\\f http://example.com/a?b=c&d=1",
    "\u{a0}nbsp\u{2003}em\u{2028}line",
    "CamelCaseWord HTTPServer \u{dc}n\u{ef} \u{c7}\u{d6}D\u{c9}",
    "\u{939}\u{93f}\u{928}\u{94d}\u{926}\u{940} \u{e44}\u{e17}\u{e22} \u{639}\u{631}\u{628}\u{649}",
    "don\u{2019}t \u{201c}quote\u{201d} \u{20ac}100.50",
    "end.\n\nNew   \n   x",
    "e\u{301}",
];

/// llama.cpp reads every kind of text as the tokens that hone trains on.
#[test]
fn llama_cpp_divides_text_alike() {
    let Some(python) = python("xllamacpp") else { return };
    for name in ["llama3", "qwen2", "phi2", "phi3", "falcon40b", "mistral"] {
        let base = golden(name).join("model");
        let pairs = pairs(&golden(name).join("final_adapter"), &facts(&base));
        let file = write_gguf(name, &pairs, Stored::F16);
        let file = file.folder().join("model.gguf");
        let composes = std::fs::read_to_string(base.join("tokenizer.json")).unwrap().contains("NFC");
        let texts = &DIVIDED[..DIVIDED.len() - usize::from(composes)];
        let found = script(&python, &["tokens", file.to_str().unwrap(), &json!(texts).to_string()]);
        let tokenizer = hone::dataset::Tokenizer::open(&base).unwrap();
        for (text, found) in texts.iter().zip(found.as_array().unwrap()) {
            assert_eq!(*found, json!(tokenizer.encode(text, false).unwrap()), "{name}: {text:?}");
        }
    }
}

/// Tokens that llama.cpp draws.
const DRAWN: usize = 12;
/// Words, numbers, letters beyond ASCII, blanks.
const TEXTS: [&str; 3] =
    ["What is a harbour, 12345?", "It's an état of mind: naïve!", "def f(x):\n    return  x + 10"];

/// Checks that each token is the most probable one, or within rounding of it, since llama.cpp keeps keys and values in
/// f16.
fn same_greedy(
    name: &str,
    decoder: &Decoder,
    tokenizer: &hone::dataset::Tokenizer,
    prompt: &[u32],
    tokens: &[u32],
) {
    /// TOLERANCE: of two logits, by f16's keys and values.
    const MARGIN: f32 = 0.05;
    let next = |ids: &[u32]| {
        let mut batch = Batch::default();
        batch.push(ids, &vec![true; ids.len()], ids.len(), 0);
        let logits = decoder.logits(&batch, Lora::None).unwrap();
        logits.get(ids.len() - 1).unwrap().to_vec1::<f32>().unwrap()
    };
    let largest = |logits: &[f32]| logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut ids = prompt.to_vec();
    for &token in tokens {
        let logits = next(&ids);
        let (found, largest) = (logits[token as usize], largest(&logits));
        assert!(largest - found <= MARGIN, "{name}: {token} has {found}, the largest is {largest}");
        ids.push(token);
    }
    // llama.cpp also ends at special tokens whose text it knows as an end, such as <|endoftext|>.
    let ended = |id: &u32| tokenizer.ends(*id) || tokenizer.is_special(*id);
    if tokens.len() < DRAWN && !tokens.last().is_some_and(ended) {
        // It ended early: by a token that ends a text.
        let logits = next(&ids);
        let first = logits.iter().position(|logit| *logit == largest(&logits)).unwrap() as u32;
        assert!(tokenizer.ends(first), "{name}: {} tokens, then {first}", tokens.len());
    }
}
