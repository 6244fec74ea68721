//! Model families: each has a file that turns `config.json` into facts. A new family is one file and one line in
//! `FAMILIES`.

mod falcon;
mod gemma;
mod granite;
mod llama;
mod mistral;
mod olmo2;
mod phi;
mod phi3;
mod qwen;
mod reading;
mod smollm3;
mod split;

use crate::fault::Result;

use super::config::Config;
use super::{Facts, quantization};

type Read = fn(&Config) -> Result<Facts>;

/// Each supported `model_type` with the function that reads its config.
pub const FAMILIES: [(&str, Read); 14] = [
    ("falcon", falcon::facts),
    ("gemma2", gemma::gemma2),
    ("gemma3_text", gemma::gemma3),
    ("granite", granite::facts),
    ("llama", llama::facts),
    ("ministral", mistral::ministral),
    ("ministral3", mistral::ministral3),
    ("mistral", mistral::mistral),
    ("olmo2", olmo2::facts),
    ("phi", phi::facts),
    ("phi3", phi3::facts),
    ("qwen2", qwen::qwen2),
    ("qwen3", qwen::qwen3),
    ("smollm3", smollm3::facts),
];

/// The path of the layers inside a multimodal wrapper. Adapters of wrappers use it, as peft and vLLM expect.
const IN_WRAPPER: &str = "model.language_model.layers";

/// LIMIT: a larger number in config.json is a mistake or an attack. Each limit is well above the largest known
/// model.
const COUNTS_MAX: [(&str, usize); 14] = [
    ("num_hidden_layers", 4096),
    ("vocab_size", 1 << 24),
    ("hidden_size", 1 << 18),
    ("intermediate_size", 1 << 20),
    ("ffn_hidden_size", 1 << 20),
    ("num_attention_heads", 1 << 14),
    ("num_key_value_heads", 1 << 14),
    ("num_kv_heads", 1 << 14),
    ("head_dim", 1 << 14),
    ("max_position_embeddings", 1 << 40),
    ("original_max_position_embeddings", 1 << 40),
    ("sliding_window", 1 << 40),
    ("sliding_window_pattern", 1 << 20),
    ("max_window_layers", 1 << 40),
];
/// Keys with the least and the largest value that can be computed with.
const RANGES: [(&str, f64, f64); 6] = [
    ("rms_norm_eps", 0.0, 0.1),
    ("layer_norm_eps", 0.0, 0.1),
    ("layer_norm_epsilon", 0.0, 0.1),
    ("rope_theta", 1.0, 1e15),
    ("rope_local_base_freq", 1.0, 1e15),
    ("factor", 1e-3, 1e6),
];

/// Refuses absurd numbers by key before anything of that size is allocated.
fn refuse_absurd(config: &Config) -> Result<()> {
    for (key, most) in COUNTS_MAX {
        config.at_most(key, most)?;
    }
    let parts = ["rope_scaling", "rope_parameters"].into_iter().filter_map(|name| config.section(name));
    for part in std::iter::once(config.clone()).chain(parts) {
        for (key, least, most) in RANGES {
            part.between(key, least, most)?;
        }
    }
    Ok(())
}

/// Reads the facts of the family that the config names. An unknown family and unsupported settings are model
/// faults.
pub fn describe(config: &Config) -> Result<Facts> {
    let config = &config.language_part()?;
    refuse_absurd(config)?;
    let names = || FAMILIES.map(|(name, _)| name).join(", ");
    let kind = config.text("model_type")?.ok_or_else(|| config.refuse("model_type", &names()))?;
    let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == kind) else {
        let fault = config.refuse("model_type", &format!("one of {}", names()));
        let is_one_of = |parts: &[&str]| parts.iter().any(|part| kind.contains(part));
        return Err(if is_one_of(&["mixtral", "moe", "gpt_oss", "deepseek", "llama4"]) {
            fault.help("hone cannot train mixture-of-experts models; use a dense model")
        } else if is_one_of(&["_vl", "vision", "omni", "gemma3n", "paligemma", "idefics", "mllama"]) {
            fault.help("hone cannot train this multimodal model; use a text model from the same makers")
        } else {
            fault.help("use a model of a supported family")
        });
    };
    quantization::read(config)?; // refuses other quantisers
    let mut facts = read(config)?;
    if config.wrapper().is_some() {
        facts.names.layers = IN_WRAPPER;
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {

    use serde_json::{Value, json};

    use super::*;

    fn describe_json(config: Value) -> Result<Facts> {
        describe(&Config::from_json(config.as_object().unwrap().clone()))
    }

    /// The counts are those that the makers publish.
    #[test]
    fn parameters_are_the_published_ones() {
        let shape = |kind: &str, [vocab, width, inner, layers, query, key]: [usize; 6], more: Value| {
            let mut config = json!({
                "model_type": kind, "vocab_size": vocab, "hidden_size": width, "intermediate_size": inner,
                "num_hidden_layers": layers, "num_attention_heads": query, "num_key_value_heads": key,
            });
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            describe_json(config).unwrap().parameters()
        };
        let none = || json!({});
        let new = json!({"new_decoder_architecture": true, "num_kv_heads": 8});
        for (name, found, published) in [
            ("falcon-7b", shape("falcon", [65024, 4544, 1, 32, 71, 1], none()), 6_921_720_704),
            ("falcon-40b", shape("falcon", [65024, 8192, 1, 60, 128, 8], new), 41_303_293_952),
            ("phi-2", shape("phi", [51200, 2560, 10240, 32, 32, 32], none()), 2_779_683_840),
            ("mistral-7b", shape("mistral", [32000, 4096, 14336, 32, 32, 8], none()), 7_241_732_096),
            ("qwen2.5-7b", shape("qwen2", [152064, 3584, 18944, 28, 28, 4], none()), 7_615_616_512),
            ("qwen3-8b", shape("qwen3", [151936, 4096, 12288, 36, 32, 8], none()), 8_190_735_360),
            ("gemma-2-2b", shape("gemma2", [256000, 2304, 9216, 26, 8, 4], none()), 2_614_341_888),
            ("gemma-3-1b", shape("gemma3_text", [262144, 1152, 6912, 26, 4, 1], none()), 999_885_952),
            ("smollm3-3b", shape("smollm3", [128256, 2048, 11008, 36, 16, 4], none()), 3_075_098_624),
            ("olmo2-7b", shape("olmo2", [100352, 4096, 11008, 32, 32, 32], none()), 7_298_617_344),
        ] {
            assert_eq!(found, published, "{name}");
        }
    }

    #[test]
    fn absurd_numbers_are_refused_by_name_before_anything_is_made_of_them() {
        let plain = || {
            json!({
                "model_type": "llama", "vocab_size": 29, "hidden_size": 32, "intermediate_size": 22,
                "num_hidden_layers": 2, "num_attention_heads": 4,
            })
        };
        describe_json(plain()).unwrap();
        for (key, value) in [
            ("num_hidden_layers", json!(4097)),
            ("num_hidden_layers", json!(1_000_000_000)),
            ("num_hidden_layers", json!(4_294_967_296u64)),
            ("num_hidden_layers", json!(9_223_372_036_854_775_807u64)),
            ("num_hidden_layers", json!(-1)),
            ("vocab_size", json!(1u64 << 62)),
            ("hidden_size", json!((1 << 18) + 1)),
            ("head_dim", json!(1u64 << 60)),
            ("rms_norm_eps", json!(-1)),
            ("rms_norm_eps", json!(1e30)),
            ("rope_theta", json!(0)),
            ("rope_theta", json!(-1)),
            ("rope_theta", json!(1e308)),
        ] {
            let mut config = plain();
            config[key] = value.clone();
            let fault = describe_json(config).expect_err(key);
            assert_eq!(fault.kind, crate::fault::Kind::Model);
            assert!(fault.message.contains(key), "{key} {value}: {fault}");
        }
        let mut config = plain();
        config["rope_scaling"] = json!({"rope_type": "yarn", "factor": 1e300});
        assert!(describe_json(config).unwrap_err().message.contains("factor"));
    }

    #[test]
    fn what_the_decoder_does_not_compute_is_refused() {
        for (kind, key, value) in [
            ("falcon", "alibi", json!(true)),
            ("falcon", "activation", json!("relu")),
            ("falcon", "num_ln_in_parallel_attn", json!(2)),
            ("falcon", "hidden_dropout", json!(0.1)),
            ("phi", "qk_layernorm", json!(true)),
            ("llama", "hidden_act", json!("relu2")),
            ("gemma2", "use_bidirectional_attention", json!(true)),
            ("gemma3_text", "layer_types", json!(["full_attention"])),
            ("qwen2", "layer_types", json!(["full_attention", "chunked_attention"])),
            ("granite", "residual_multiplier", json!(0)),
            ("smollm3", "no_rope_layers", json!([1])),
            ("ministral3", "rope_parameters", json!(null)),
            ("llama", "model_type", json!("qwen3_moe")),
        ] {
            let mut config = json!({
                "model_type": kind, "vocab_size": 29, "hidden_size": 32, "intermediate_size": 22,
                "num_hidden_layers": 2, "num_attention_heads": 4,
                "rope_parameters": {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16},
            });
            describe_json(config.clone()).unwrap_or_else(|fault| panic!("{kind}: {fault}"));
            config[key] = value;
            let fault = describe_json(config).unwrap_err();
            assert!(fault.message.contains(key), "{kind} {key}: {fault}");
        }
    }
}
