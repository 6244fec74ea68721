//! Model families: one file each, `config.json` -> facts. Adding one is a file and a line in `FAMILIES`.

mod gemma;
mod llama;
mod mistral;
mod phi3;
mod qwen;
mod split;

use crate::fault::Result;
use crate::ops::activation::Function;

use super::config::Config;
use super::facts::Facts;

type Read = fn(&Config) -> Result<Facts>;

/// `model_type` and what reads it.
pub const FAMILIES: [(&str, Read); 8] = [
    ("gemma2", gemma::gemma2),
    ("gemma3_text", gemma::gemma3),
    ("llama", llama::facts),
    ("ministral", mistral::ministral),
    ("mistral", mistral::facts),
    ("phi3", phi3::facts),
    ("qwen2", qwen::qwen2),
    ("qwen3", qwen::qwen3),
];

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

/// The activation's function by transformers' name.
fn function(config: &Config, key: &str, absent: Function) -> Result<Function> {
    match config.text(key)?.as_deref() {
        None => Ok(absent),
        Some("silu" | "swish") => Ok(Function::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Function::GeluTanh),
        Some("gelu") => Ok(Function::GeluErf),
        Some(_) => Err(config.refuse(key, "one of silu, gelu_pytorch_tanh, gelu_new, gelu")),
    }
}

/// `sliding_window`, which null turns off.
fn window_or(config: &Config, absent: Option<usize>) -> Result<Option<usize>> {
    Ok(if config.says("sliding_window") { config.integer_or_none("sliding_window")? } else { absent })
}

/// Which layers see a window only: by `layer_types`, or by the family's rule where there are none.
fn sliding_layers(config: &Config, layers: usize, rule: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let Some(kinds) = config.texts_or_none("layer_types")? else {
        return Ok((0..layers).map(rule).collect());
    };
    let sliding = |kind: &String| match kind.as_str() {
        "sliding_attention" => Some(true),
        "full_attention" => Some(false),
        _ => None,
    };
    let sliding: Option<Vec<bool>> = kinds.iter().map(sliding).collect();
    sliding.filter(|list| list.len() == layers).ok_or_else(|| {
        config.refuse("layer_types", &format!("{layers} of full_attention and sliding_attention"))
    })
}

fn set_windows(facts: &mut Facts, window: Option<usize>, sliding: &[bool]) {
    for (attention, &sliding) in facts.attention.iter_mut().zip(sliding) {
        attention.heads.window = window.filter(|_| sliding);
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

/// Query heads, key heads and head width that agree with each other; `head` is the width where the config has none.
fn head_counts(config: &Config, width: usize, head: Option<usize>) -> Result<(usize, usize, usize)> {
    let query = config.integer("num_attention_heads")?;
    let key = config.integer_or_none("num_key_value_heads")?.unwrap_or(query);
    let head = match config.integer_or_none("head_dim")?.or(head) {
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
