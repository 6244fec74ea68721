//! Names of well-known shapes -> the parts of their published `config.json` that determine sizes and layers.

use serde_json::{Value, json};

use super::Facts;
use super::config::Config;
use super::family;
use crate::fault::{Fault, Result};

/// Names of the shapes, in order of size.
pub const SHAPES: [&str; 22] = [
    "tiny",
    "smollm-135m",
    "llama3.2-1b",
    "phi2",
    "llama3.2-3b",
    "ministral3-3b",
    "phi3-mini",
    "phi4-mini",
    "gemma3-4b",
    "falcon-7b",
    "mistral-7b",
    "qwen2.5-7b",
    "llama3.1-8b",
    "ministral3-8b",
    "ministral3-14b",
    "phi3-medium",
    "phi4",
    "qwen2.5-14b",
    "gemma3-27b",
    "qwen2.5-32b",
    "falcon-40b",
    "llama3.3-70b",
];

/// Returns the facts of a shape, read as those of a model folder are. An unknown name is a usage fault.
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
        "llama3.3-70b" => json!({
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "rope_scaling": llama3_scaling(8.0),
        }),
        "phi2" => json!({
            "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.4, "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
        }),
        "phi3-medium" => json!({
            "model_type": "phi3", "vocab_size": 32064, "hidden_size": 5120, "intermediate_size": 17920,
            "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "sliding_window": 2047,
        }),
        "phi4" => json!({
            "model_type": "phi3", "vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 17920,
            "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-5,
            "rope_theta": 250000.0, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
        }),
        // Its longrope is left out because no size depends on it.
        "phi4-mini" => json!({
            "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096, "tie_word_embeddings": true,
        }),
        "qwen2.5-14b" => json!({
            "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0, "max_position_embeddings": 131072,
        }),
        "qwen2.5-32b" => json!({
            "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648,
            "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        }),
        "falcon-7b" => json!({
            "model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
            "num_attention_heads": 71, "multi_query": true, "parallel_attn": true, "new_decoder_architecture": false,
            "bias": false, "layer_norm_epsilon": 1e-5,
        }),
        "falcon-40b" => json!({
            "model_type": "falcon", "vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60,
            "num_attention_heads": 128, "num_kv_heads": 8, "parallel_attn": true, "new_decoder_architecture": true,
            "bias": false, "layer_norm_epsilon": 1e-5,
        }),
        "gemma3-4b" => json!({
            "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window": 1024,
            "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "max_position_embeddings": 131072,
            "tie_word_embeddings": true,
        }),
        "gemma3-27b" => json!({
            "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 5376, "intermediate_size": 21504,
            "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window": 1024,
            "sliding_window_pattern": 6, "query_pre_attn_scalar": 168, "max_position_embeddings": 131072,
            "tie_word_embeddings": true,
        }),
        "ministral3-3b" => ministral3(26, 3072, 9216, true),
        "ministral3-8b" => ministral3(34, 4096, 14336, false),
        "ministral3-14b" => ministral3(40, 5120, 16384, false),
        _ => return None,
    })
}

fn ministral3(layers: usize, width: usize, feed_forward: usize, tied: bool) -> Value {
    json!({
        "model_type": "ministral3", "vocab_size": 131072, "hidden_size": width, "intermediate_size": feed_forward,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
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
        let published = [
            0.2, 134.5, 1235.8, 2779.7, 3212.7, 3429.0, 3821.1, 3836.0, 3880.3, 6921.7, 7248.0, 7615.6,
            8030.3, 8489.6, 13506.1, 13960.2, 14659.5, 14770.0, 27009.3, 32763.9, 41303.3, 70553.7,
        ];
        for ((name, found), expected) in SHAPES.iter().zip(millions).zip(published) {
            assert!((found - expected).abs() <= 0.1, "{name}: {found} million, not {expected}");
        }
        assert!(facts("phi9").unwrap_err().message.contains("llama3.1-8b"));
    }
}
