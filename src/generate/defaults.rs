//! generation_config.json, config.json and the chat template -> a model's defaults of generation, and the tokens that
//! end an answer.

use std::path::Path;

use serde_json::Value;

use super::request::Sampling;
use crate::dataset::{Chat, Tokenizer};
use crate::fault::{Fault, Kind, Result};
use crate::plain;

/// The settings of generation for requests that do not set them.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    /// The values of generation_config.json; without them temperature 1 and no filter.
    pub sampling: Sampling,
    /// `max_new_tokens`; without it an answer may fill the context.
    pub max_tokens: Option<usize>,
    /// Ends of the sequence and of the assistant's turn, in ascending order.
    pub stop_tokens: Vec<u32>,
}

impl Defaults {
    /// Reads a model's folder.
    ///
    /// # Errors
    /// Model: a file is not JSON, or a number in it is out of range.
    pub fn read(folder: &Path, tokenizer: &Tokenizer, chat: Option<&Chat>) -> Result<Defaults> {
        let generation = json(folder, "generation_config.json")?;
        let config = json(folder, "config.json")?;
        let mut stop_tokens = vec![tokenizer.eos_id()];
        for value in [&generation["eos_token_id"], &config["eos_token_id"]] {
            let ids = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
            stop_tokens.extend(ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
        }
        stop_tokens.extend(chat.and_then(|chat| chat.end_of_turn(tokenizer)));
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Ok(Defaults {
            sampling: sampling(&generation).map_err(|fault| fault.at(folder.display()))?,
            max_tokens: generation["max_new_tokens"].as_u64().map(|number| number as usize),
            stop_tokens,
        })
    }
}

fn sampling(generation: &Value) -> Result<Sampling> {
    let number = |name: &str, default: f32, range: std::ops::RangeInclusive<f64>| {
        let Some(number) = generation[name].as_f64() else { return Ok(default) };
        match range.contains(&number) {
            true => Ok(number as f32),
            false => Err(Fault::model(format!(
                "generation_config.json: {name} is {number}, expected {} to {}",
                range.start(),
                range.end()
            ))),
        }
    };
    let temperature = match generation["do_sample"].as_bool() {
        Some(false) => 0.0,
        _ => number("temperature", 1.0, 0.0..=100.0)?,
    };
    Ok(Sampling {
        temperature,
        top_k: number("top_k", 0.0, 0.0..=1e9)? as usize,
        top_p: number("top_p", 1.0, 0.0..=1.0)?,
        min_p: number("min_p", 0.0, 0.0..=1.0)?,
        repetition_penalty: number("repetition_penalty", 1.0, 1e-3..=1e3)?,
        ..Sampling::greedy()
    })
}

/// Reads a JSON file of the folder; `Null` if there is no such file.
fn json(folder: &Path, name: &str) -> Result<Value> {
    let file = folder.join(name);
    match plain::small(&file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| Fault::model(format!("{}: not JSON: {error}", file.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => {
            Err(Fault::unread(Kind::Model, format!("cannot read {}: {error}", file.display()), &error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_models_own_settings_are_the_defaults() {
        let read = |value: Value| sampling(&value);
        let plain = Sampling { temperature: 1.0, ..Sampling::greedy() };
        assert_eq!(read(json!({})).unwrap(), plain);
        let told = read(json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 50})).unwrap();
        assert_eq!(told, Sampling { temperature: 0.6, top_p: 0.9, top_k: 50, ..Sampling::greedy() });
        assert_eq!(read(json!({"do_sample": false, "temperature": 0.6})).unwrap().temperature, 0.0);
        let fault = read(json!({"top_p": 3})).unwrap_err();
        assert_eq!(fault.message, "generation_config.json: top_p is 3, expected 0 to 1");
    }

    #[test]
    fn the_end_of_a_turn_ends_an_answer() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/phi3/model"));
        let tokenizer = Tokenizer::open(folder).unwrap();
        let chat = Chat::of(&tokenizer, None).unwrap();
        let defaults = Defaults::read(folder, &tokenizer, chat.as_ref()).unwrap();
        let end = tokenizer.encode("<|end|>", false).unwrap();
        assert!(defaults.stop_tokens.contains(&tokenizer.eos_id()));
        assert!(end.len() != 1 || defaults.stop_tokens.contains(&end[0]), "{defaults:?}");
    }
}
