//! Model families: one file each, `config.json` -> facts. Adding one is a file and a line in `FAMILIES`.

mod llama;
mod phi3;

use crate::fault::Result;

use super::config::Config;
use super::facts::Facts;

type Read = fn(&Config) -> Result<Facts>;

/// `model_type` and what reads it.
pub const FAMILIES: [(&str, Read); 2] = [("llama", llama::facts), ("phi3", phi3::facts)];

/// Reads the facts of whatever family the config names.
pub fn describe(config: &Config) -> Result<Facts> {
    let names = || FAMILIES.map(|(name, _)| name).join(", ");
    let kind = config.text("model_type")?.ok_or_else(|| config.refuse("model_type", &names()))?;
    let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == kind) else {
        let fault = config.refuse("model_type", &format!("one of {}", names()));
        let mixture = ["mixtral", "moe", "gpt_oss", "deepseek", "llama4"];
        return Err(match mixture.iter().any(|part| kind.contains(part)) {
            true => fault.help("mixture-of-experts models cannot be tuned; take a dense model"),
            false => fault.help("take a model of a supported family"),
        });
    };
    if config.has("quantization_config") {
        return Err(config
            .refuse("quantization_config", "an unquantised checkpoint (f32, f16 or bf16)")
            .help("hone quantises by itself: take the original model"));
    }
    read(config)
}

/// What the shared decoder computes; anything else must be refused.
fn gated_silu(config: &Config) -> Result<()> {
    match config.text("hidden_act")?.as_deref() {
        None | Some("silu" | "swish") => Ok(()),
        Some(_) => Err(config.refuse("hidden_act", "silu")),
    }
}

/// The pretrained model's dropouts are for its own pre-training; tuning the adapter leaves them off, as PEFT's
/// users do, but a config that sets them is not silently changed.
fn no_dropout(config: &Config, keys: &[&str]) -> Result<()> {
    for key in keys {
        if config.number_or_none(key)?.is_some_and(|p| p != 0.0) {
            return Err(config.refuse(key, "0").help("set it to 0 in config.json; use lora_dropout instead"));
        }
    }
    Ok(())
}

/// Query heads, key heads and head width that agree with each other.
fn head_counts(config: &Config, width: usize) -> Result<(usize, usize, usize)> {
    let query = config.integer("num_attention_heads")?;
    let key = config.integer_or_none("num_key_value_heads")?.unwrap_or(query);
    let head = match config.integer_or_none("head_dim")? {
        Some(head) => head,
        None if width.is_multiple_of(query) => width / query,
        None => {
            return Err(config.refuse("num_attention_heads", &format!("a divisor of hidden_size {width}")));
        }
    };
    if !query.is_multiple_of(key) {
        return Err(
            config.refuse("num_key_value_heads", &format!("a divisor of num_attention_heads {query}"))
        );
    }
    Ok((query, key, head))
}
