//! The decoder's logits compared with those of other implementations: candle-transformers' models with the same
//! weights, and peft over transformers and bitsandbytes (recorded by `scripts/peft_logits.py`) with adapters that
//! hone trained.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{falcon, gemma2, gemma3, llama, mistral, olmo2, phi, phi3, qwen2, qwen3};
use hone::adapter;
use hone::facts::config::Config;
use hone::facts::{Facts, FeedForward, Function};
use hone::facts::{FourBitCode, LoraOptions, Precision, Quantization, family};
use hone::model::batch::Batch;
use hone::model::decoder::Decoder;
use hone::model::lora::Lora;
use hone::model::{Options, load, random};
use hone::report::Report;
use serde_json::{Value, json};

/// TOLERANCE: both sides compute in f32 and sum in their own order. The largest difference found is 1e-5, on logits
/// of up to 20. It is 2e-2 if rope's theta or the attention's scale is 1% off, 2.6 if a window is one token off,
/// and 2e-4 if a norm's eps is 1e-6 instead of 1e-5.
const ROUNDING: f32 = 1e-4;

const NF4: Quantization = Quantization::FourBit { code: FourBitCode::Nf4, double: true };

/// ids [1, T] -> logits of the last one.
type Other = Box<dyn FnMut(&Tensor) -> Result<Tensor>>;

#[test]
fn golden_llama_equals_candle_transformers() {
    let folder = golden("llama3");
    let config = json_of(&folder.join("config.json"));
    let decoder = decoder(&folder, facts(&config), Quantization::None);
    check("llama3", &decoder, llama(&config, &folder), &recorded_rows("llama3", &[3, 6, 7]));
}

/// candle's phi3 has no sliding window, so the rows are no longer than the model's window of 40. Its longrope is
/// not transformers' either: it multiplies the frequencies by the factors. The recorded runs of `parity.rs` test
/// hone's.
#[test]
fn golden_phi3_equals_candle_transformers() {
    let folder = golden("phi3");
    let config = json_of(&folder.join("config.json"));
    let decoder = decoder(&folder, facts(&config), Quantization::None);
    let rows = recorded_rows("phi3", &[0, 1, 4, 7]);
    assert!(rows.iter().all(|row| row.len() <= decoder.facts.heads().window.unwrap()));
    check("phi3", &decoder, phi3(&config, &folder), &rows);
}

#[test]
fn random_llama_with_grouped_heads_and_tied_head() {
    let config = config(json!({"tie_word_embeddings": true, "rope_theta": 1000.0}));
    check_random("grouped, tied", &config, |_| {}, llama);
}

#[test]
fn random_llama_with_one_key_head_and_scaled_rope() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    let config = config(json!({"num_key_value_heads": 1, "rope_scaling": scaling}));
    check_random("one key head, scaled rope", &config, |_| {}, llama);
}

/// candle's llama takes the head's width from the model's width. Its mistral, which has the same shape, reads it
/// from the config.
#[test]
fn random_llama_with_its_own_head_width() {
    let config = config(json!({"head_dim": 6}));
    check_random("own head width", &config, |_| {}, mistral);
}

/// candle's window of W covers the token itself and W before it; the window of transformers and hone covers W in
/// all.
#[test]
fn random_decoder_with_a_window() {
    let config = config(json!({"sliding_window": 8}));
    check_random(
        "window",
        &config,
        |facts| facts.layers.iter_mut().for_each(|layer| layer.attention.heads.window = Some(9)),
        mistral,
    );
}

/// candle's llama has no biases. Its qwen2 has them on queries, keys and values, but not on the output.
#[test]
fn random_decoder_with_biases() {
    let config = config(json!({"attention_bias": true}));
    check_random(
        "biases",
        &config,
        |facts| facts.layers.iter_mut().for_each(|layer| layer.attention.output.bias = false),
        qwen2,
    );
}

#[test]
fn random_phi3_with_grouped_heads_partial_rotary_and_tied_head() {
    let more = json!({"model_type": "phi3", "tie_word_embeddings": true, "partial_rotary_factor": 0.75,
        "hidden_size": 64, "sliding_window": null});
    check_random("phi3", &config(more), |_| {}, phi3);
}

#[test]
fn random_qwen3() {
    let more = json!({"model_type": "qwen3", "head_dim": 10, "attention_bias": false});
    check_random("qwen3", &config(more), |_| {}, qwen3);
}

/// candle's gemmas scale scores by the head's width. Their windows are one longer than hone's, so there is none
/// here.
#[test]
fn random_gemma2_with_soft_caps() {
    let more = json!({"model_type": "gemma2", "head_dim": 10, "query_pre_attn_scalar": 10, "attention_bias": false,
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
        "tie_word_embeddings": true});
    check_random("gemma2", &config(more), |_| {}, gemma2);
}

/// candle's cache of a window holds as many tokens as hone's window covers.
#[test]
fn random_gemma3_with_two_ropes_and_windows() {
    let more = json!({"model_type": "gemma3_text", "head_dim": 10, "query_pre_attn_scalar": 10,
        "attention_bias": false, "hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 2,
        "sliding_window": 8,        "rope_local_base_freq": 100.0, "tie_word_embeddings": true});
    check_random("gemma3", &config(more), |_| {}, gemma3);
}

/// candle's falcon has only the form of the 7B, with the other GELU.
#[test]
fn random_falcon() {
    let more = json!({"model_type": "falcon", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "use_cache": true, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "alibi": false, "new_decoder_architecture": false, "multi_query": true, "parallel_attn": true,
        "bias": true});
    check_random("falcon", &config(more), gelu_tanh, falcon);
}

fn gelu_tanh(facts: &mut Facts) {
    for layer in &mut facts.layers {
        let FeedForward::Dense(dense) = &mut layer.feed_forward;
        dense.activation.function = Function::GeluTanh;
    }
}

#[test]
fn random_phi_with_partial_rotary() {
    let more = json!({"model_type": "phi", "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4, "qk_layernorm": false});
    check_random("phi", &config(more), |_| {}, phi);
}

#[test]
fn random_olmo2_with_grouped_heads() {
    let more = json!({"model_type": "olmo2", "attention_bias": false});
    check_random("olmo2", &config(more), |_| {}, olmo2);
}

#[test]
fn random_smollm3_with_a_layer_without_rope() {
    let more = json!({"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "tie_word_embeddings": true});
    check_random("smollm3", &config(more), |_| {}, smollm3);
}

/// Each folder holds an adapter as hone wrote it, and the logits that peft gave with it: beside the base, and
/// merged into it. hone must write the same bytes today.
#[test]
fn adapters_give_the_logits_they_give_in_peft() {
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft_logits");
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(recorded).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 4, "found {folders:?}");
    for folder in folders {
        let case = folder.file_name().unwrap().to_str().unwrap();
        let (kind, quantization) = case.rsplit_once('-').unwrap();
        let quantization = if quantization == "nf4" { NF4 } else { Quantization::None };
        let trained = adapter::read(&folder).unwrap();
        let lora = trained.options(&LoraOptions::default()).unwrap();
        let model = golden(kind);
        let decoder = decoder(&model, facts(&json_of(&model.join("config.json"))), quantization);
        let ours_adapter = decoder.trainable(&lora).unwrap();
        trained.apply(&ours_adapter).unwrap();
        let (sites, layers) = (&ours_adapter.sites, decoder.facts.layers.len());
        let written =
            serde_json::to_vec_pretty(&adapter::config(sites, &ours_adapter.tokens, layers, &lora, "model"))
                .unwrap();
        assert!(written == std::fs::read(folder.join(adapter::CONFIG_FILE)).unwrap(), "{case}: config");
        let written = adapter::weights(&ours_adapter).unwrap();
        assert!(written == std::fs::read(folder.join(adapter::WEIGHTS_FILE)).unwrap(), "{case}: weights");
        let recorded = tensors(&folder.join("logits.safetensors"));
        for row in 0..2 {
            let ids: Vec<u32> = recorded[&format!("ids_{row}")].to_vec1().unwrap();
            let found = &ours(&decoder, ours_adapter.evaluated(), std::slice::from_ref(&ids))[0];
            for way in ["logits", "merged"] {
                let Some(expected) = recorded.get(&format!("{way}_{row}")) else { continue };
                let expected: Vec<Vec<f32>> = expected.to_vec2().unwrap();
                let found = [&found[ids.len() / 2], &found[ids.len() - 1]];
                same(&format!("{case}, row {row}, {way}"), &found, &expected);
            }
        }
    }
}

/// Returns a small llama whose widths are not multiples of the kernels' blocks.
fn config(more: Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_act": "silu", "vocab_size": 157, "hidden_size": 40, "intermediate_size": 72,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": false,
        // Keys that candle's qwen2 requires.
        "sliding_window": 64, "max_window_layers": 3, "use_sliding_window": false,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// Returns random weights for the config, which both sides read.
fn check_random(name: &str, config: &Value, change: fn(&mut Facts), other: fn(&Value, &Path) -> Other) {
    let folder = tempfile::tempdir().unwrap();
    let mut facts = facts(config);
    change(&mut facts);
    random::write(folder.path(), &facts, 5).unwrap();
    let rows: Vec<Vec<u32>> =
        [23, 1, 40].map(|length| (0..length).map(|i| (i * i * 7 + 3 * i + length) % 157).collect()).into();
    let decoder = decoder(folder.path(), facts, Quantization::None);
    check(name, &decoder, other(config, folder.path()), &rows);
}

/// Compares hone's logits of the rows, packed in one batch, with the other's for every prefix of every row, each alone.
fn check(name: &str, decoder: &Decoder, mut other: Other, rows: &[Vec<u32>]) {
    for (row, (ids, found)) in rows.iter().zip(ours(decoder, Lora::None, rows)).enumerate() {
        let last = |length: usize| {
            let ids = Tensor::new(&ids[..length], &Device::Cpu)?.unsqueeze(0)?;
            other(&ids)?.flatten_all()?.to_vec1::<f32>()
        };
        let expected: Result<Vec<Vec<f32>>> = (1..=ids.len()).map(last).collect();
        same(&format!("{name}, row {row}"), &found.iter().collect::<Vec<_>>(), &expected.unwrap());
    }
}

/// Returns logits by row, token and vocabulary, of all rows in one batch.
fn ours(decoder: &Decoder, lora: Lora, rows: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let mut batch = Batch::default();
    for ids in rows {
        batch.push(ids, &vec![true; ids.len()], ids.len(), 0);
    }
    let mut logits = decoder.logits(&batch, lora).unwrap().to_vec2::<f32>().unwrap().into_iter();
    rows.iter().map(|ids| logits.by_ref().take(ids.len()).collect()).collect()
}

fn same(place: &str, found: &[&Vec<f32>], expected: &[Vec<f32>]) {
    assert_eq!(found.len(), expected.len(), "{place}: positions");
    let mut worst = 0f32;
    for (position, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "{place}: vocabulary");
        for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - expected).abs();
            assert!(error <= ROUNDING, "{place}, position {position}, {token}: {found}, not {expected}");
            worst = worst.max(error);
        }
    }
    println!("{place}: {worst:.1e}");
}

fn decoder(folder: &Path, facts: Facts, quantization: Quantization) -> Decoder {
    let lora = LoraOptions::default();
    let options = Options { folder: folder.into(), quantization, lora, precision: Precision::F32 };
    load::load(facts, &options, &candle_core::Device::Cpu, &Report::silent()).unwrap()
}

fn facts(config: &Value) -> Facts {
    family::describe(&Config::from_json(config.as_object().unwrap().clone())).unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("model")
}

fn json_of(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn recorded_rows(name: &str, rows: &[usize]) -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(golden(name).with_file_name("tokens.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let ids = |row: &usize| {
        let line: Value = serde_json::from_str(lines[*row]).unwrap();
        serde_json::from_value(line["input_ids"].clone()).unwrap()
    };
    rows.iter().map(ids).collect()
}

fn tensors(file: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

fn weights(folder: &Path) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors(&folder.join("model.safetensors")), DType::F32, &Device::Cpu)
}

fn read<T: serde::de::DeserializeOwned>(config: &Value) -> T {
    serde_json::from_value(config.clone()).unwrap()
}

fn llama(config: &Value, folder: &Path) -> Other {
    let config = read::<llama::LlamaConfig>(config).into_config(false);
    let model = llama::Llama::load(weights(folder), &config).unwrap();
    let cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
    Box::new(move |ids| model.forward(ids, 0, &mut cache.clone()))
}

fn phi3(config: &Value, folder: &Path) -> Other {
    let mut model = phi3::Model::new(&read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    })
}

fn mistral(config: &Value, folder: &Path) -> Other {
    let mut model = mistral::Model::new(&read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    })
}

fn qwen2(config: &Value, folder: &Path) -> Other {
    let mut model = qwen2::ModelForCausalLM::new(&read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    })
}

fn qwen3(config: &Value, folder: &Path) -> Other {
    let mut model = qwen3::ModelForCausalLM::new(&read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    })
}

fn gemma2(config: &Value, folder: &Path) -> Other {
    let mut model = gemma2::Model::new(false, &read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    })
}

/// Returns one token after the other, because candle's windowed cache takes no more at once.
fn gemma3(config: &Value, folder: &Path) -> Other {
    let mut model = gemma3::Model::new(false, &read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        let steps = 0..ids.dim(1)?;
        let mut last =
            steps.map(|at| model.forward(&ids.narrow(1, at, 1)?, at)).collect::<Result<Vec<_>>>()?;
        Ok(last.pop().expect("a token at least"))
    })
}

fn falcon(config: &Value, folder: &Path) -> Other {
    let mut model = falcon::Falcon::load(weights(folder), read(config)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids)
    })
}

fn phi(config: &Value, folder: &Path) -> Other {
    let mut model = phi::Model::new(&read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids)
    })
}

fn olmo2(config: &Value, folder: &Path) -> Other {
    let mut model = olmo2::Model::new(&read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    })
}

fn smollm3(config: &Value, folder: &Path) -> Other {
    let mut model = smollm3::ModelForCausalLM::new(&read(config), weights(folder)).unwrap();
    Box::new(move |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    })
}
