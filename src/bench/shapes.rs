//! Names of well-known shapes -> `config.json` as their makers publish it, the part that sizes and layers come from.

use serde_json::{Value, json};

use crate::fault::{Fault, Result};
use crate::model::config::Config;
use crate::model::facts::Facts;
use crate::model::family;

/// In order of size.
pub const SHAPES: [&str; 8] = [
    "tiny",
    "smollm-135m",
    "llama3.2-1b",
    "llama3.2-3b",
    "phi3-mini",
    "mistral-7b",
    "qwen2.5-7b",
    "llama3.1-8b",
];

/// The facts of a shape, read as those of a model folder are.
pub fn facts(name: &str) -> Result<Facts> {
    let Some(config) = config(name) else {
        return Err(Fault::usage(format!("--shape {name}: expected one of {}", SHAPES.join(", "))));
    };
    let config = config.as_object().expect("the table holds objects").clone();
    family::describe(&Config::from_json(config))
}

fn config(name: &str) -> Option<Value> {
    Some(match name {
        "tiny" => json!({
            "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 2048,
        }),
        "smollm-135m" => json!({
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": true,
        }),
        "llama3.2-1b" => json!({
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "tie_word_embeddings": true, "rope_scaling": llama3_scaling(32.0),
        }),
        "llama3.2-3b" => json!({
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "tie_word_embeddings": true, "rope_scaling": llama3_scaling(32.0),
        }),
        "phi3-mini" => json!({
            "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "sliding_window": 2047,
        }),
        "mistral-7b" => json!({
            "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        }),
        "qwen2.5-7b" => json!({
            "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        }),
        "llama3.1-8b" => json!({
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "rope_scaling": llama3_scaling(8.0),
        }),
        _ => return None,
    })
}

fn llama3_scaling(factor: f64) -> Value {
    json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_published_number_of_parameters() {
        let millions = SHAPES.map(|name| facts(name).unwrap().parameters() as f64 / 1e6);
        let published = [0.2, 134.5, 1235.8, 3212.7, 3821.1, 7248.0, 7615.6, 8030.3];
        for ((name, found), expected) in SHAPES.iter().zip(millions).zip(published) {
            assert!((found - expected).abs() <= 0.1, "{name}: {found} million, not {expected}");
        }
        assert!(facts("phi9").unwrap_err().message.contains("llama3.1-8b"));
    }
}
