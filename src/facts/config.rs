//! `config.json` as found on the hub: typed access whose errors name the key, the value found and what was expected.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::fault::{Fault, Result};

/// Multimodal models whose language part is a family of its own, and whether it ties its head where neither part
/// of the config says so (transformers' defaults; Mistral 3's says tied, its checkpoints carry a head).
const WRAPPERS: [(&str, bool); 4] =
    [("gemma3", true), ("mistral3", false), ("llava", false), ("llava_next", false)];

/// A model's `config.json`.
#[derive(Clone, Debug)]
pub struct Config {
    file: PathBuf,
    json: Map<String, Value>,
    /// `model_type` of the multimodal model that this is the language part of.
    wrapper: Option<String>,
}

impl Config {
    pub fn read(folder: &Path) -> Result<Config> {
        let file = folder.join("config.json");
        let text = read_plain(&file).map_err(|error| {
            Fault::model(format!("cannot read {}: {error}", file.display()))
                .help("a model folder holds config.json, tokenizer.json and *.safetensors")
        })?;
        match serde_json::from_slice(&text) {
            Ok(Value::Object(json)) => Ok(Config { file, json, wrapper: None }),
            Ok(_) => Err(Fault::model(format!("{}: expected a JSON object", file.display()))),
            Err(error) => Err(Fault::model(format!("{}: not JSON: {error}", file.display()))),
        }
    }

    /// A config for tests and generated models.
    pub fn from_json(json: Map<String, Value>) -> Config {
        Config { file: PathBuf::from("config.json"), json, wrapper: None }
    }

    /// The language model's part: a multimodal wrapper's `text_config`, with what the wrapper says for all of it;
    /// anything else as it is.
    pub fn language_part(&self) -> Result<Config> {
        let kind = self.text("model_type")?;
        let Some((wrapper, tied)) = WRAPPERS.iter().find(|(name, _)| Some(*name) == kind.as_deref()) else {
            return Ok(self.clone());
        };
        let Some(mut part) = self.section("text_config") else {
            return Err(self.refuse("text_config", "the configuration of the language model"));
        };
        for key in ["tie_word_embeddings", "quantization_config"] {
            if let Some(value) = self.json.get(key).filter(|value| !value.is_null()) {
                part.json.insert(key.into(), value.clone());
            }
        }
        part.json.entry("tie_word_embeddings").or_insert(Value::Bool(*tied));
        part.wrapper = Some((*wrapper).to_owned());
        Ok(part)
    }

    /// The multimodal model that this is the language part of: `gemma3`, `mistral3`, `llava`.
    pub fn wrapper(&self) -> Option<&str> {
        self.wrapper.as_deref()
    }

    /// The type that the weights are stored in, as the config has it: `torch_dtype`, or `dtype` since
    /// transformers 5. Informative: each tensor says its own.
    pub fn dtype(&self) -> Result<Option<String>> {
        Ok(self.text("dtype")?.or(self.text("torch_dtype")?))
    }

    /// A part of this config (`rope_scaling`) with the same error messages.
    pub fn section(&self, key: &str) -> Option<Config> {
        let json = self.json.get(key)?.as_object()?.clone();
        Some(Config { file: self.file.join(key), json, wrapper: None })
    }

    /// A part that says something; anything but an object, null or nothing is refused.
    pub fn nonempty_section(&self, key: &str) -> Result<Option<Config>> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(json)) if json.is_empty() => Ok(None),
            Some(Value::Object(_)) => Ok(self.section(key)),
            Some(_) => Err(self.refuse(key, "an object")),
        }
    }

    pub fn has(&self, key: &str) -> bool {
        self.json.get(key).is_some_and(|value| !value.is_null())
    }

    /// Whether the key is there, be it null.
    pub fn says(&self, key: &str) -> bool {
        self.json.contains_key(key)
    }

    pub fn integer(&self, key: &str) -> Result<usize> {
        self.integer_or_none(key)?.ok_or_else(|| self.missing(key, "a whole number"))
    }

    pub fn integer_or_none(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number above 0", |value| {
            value.as_u64().filter(|&n| n > 0).and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A whole number that may be 0.
    pub fn whole_or(&self, key: &str, absent: usize) -> Result<usize> {
        let whole = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        Ok(self.get(key, "a whole number", whole)?.unwrap_or(absent))
    }

    /// Refuses a whole number above `most`; anything else under the key is for whoever reads it.
    pub fn at_most(&self, key: &str, most: usize) -> Result<()> {
        match self.json.get(key).and_then(Value::as_f64) {
            Some(found) if found > most as f64 => Err(self.refuse(key, &format!("at most {most}"))),
            _ => Ok(()),
        }
    }

    /// Refuses a number outside `least..=most`.
    pub fn between(&self, key: &str, least: f64, most: f64) -> Result<()> {
        match self.json.get(key).and_then(Value::as_f64) {
            Some(found) if !(least..=most).contains(&found) => {
                Err(self.refuse(key, &format!("a number from {least} to {most:e}")))
            }
            _ => Ok(()),
        }
    }

    pub fn number(&self, key: &str) -> Result<f64> {
        self.number_or_none(key)?.ok_or_else(|| self.missing(key, "a number"))
    }

    pub fn number_or_none(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| value.as_f64().filter(|n| n.is_finite()))
    }

    /// `absent` where the key is not there, `None` where it is null.
    pub fn number_unless_null(&self, key: &str, absent: f64) -> Result<Option<f64>> {
        if self.says(key) { self.number_or_none(key) } else { Ok(Some(absent)) }
    }

    /// An absent flag is false.
    pub fn flag(&self, key: &str) -> Result<bool> {
        self.flag_or(key, false)
    }

    pub fn flag_or(&self, key: &str, absent: bool) -> Result<bool> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(absent))
    }

    pub fn text(&self, key: &str) -> Result<Option<String>> {
        self.get(key, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// The names of an object's entries, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.json.keys().map(String::as_str)
    }

    pub fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let list = |value: &Value| value.as_array()?.iter().map(Value::as_f64).collect();
        self.get(key, "a list of numbers", list)?.ok_or_else(|| self.missing(key, "a list of numbers"))
    }

    pub fn texts_or_none(&self, key: &str) -> Result<Option<Vec<String>>> {
        let list =
            |value: &Value| value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect();
        self.get(key, "a list of texts", list)
    }

    /// A fault about a key's value.
    pub fn refuse(&self, key: &str, expected: &str) -> Fault {
        let found = self.json.get(key).map_or("nothing".to_owned(), Value::to_string);
        Fault::model(format!("{}: {key}: found {found}, expected {expected}", self.file.display()))
    }

    fn get<T>(&self, key: &str, expected: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.refuse(key, expected)),
        }
    }

    fn missing(&self, key: &str, expected: &str) -> Fault {
        Fault::model(format!("{}: {key} is missing, expected {expected}", self.file.display()))
    }
}

/// LIMIT: the largest config.json in use has some hundred kB.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// A file that ends, and is not too large.
fn read_plain(file: &Path) -> std::io::Result<Vec<u8>> {
    let found = std::fs::metadata(file)?;
    match found.is_file() && found.len() <= FILE_BYTES_MAX {
        true => std::fs::read(file),
        false => Err(std::io::Error::other("not a plain file of at most 16 MB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: Value) -> Config {
        Config::from_json(json.as_object().expect("an object").clone())
    }

    #[test]
    fn a_wrapper_hands_over_its_language_part() {
        let text =
            serde_json::json!({"model_type": "mistral", "tie_word_embeddings": false, "vocab_size": 9});
        let wrapped = config(serde_json::json!({
            "model_type": "llava", "tie_word_embeddings": true, "text_config": text, "vision_config": {"hidden_size": 4}
        }));
        let part = wrapped.language_part().unwrap();
        assert_eq!((part.wrapper(), part.integer("vocab_size").unwrap()), (Some("llava"), 9));
        assert!(part.flag("tie_word_embeddings").unwrap(), "the wrapper's word counts");
        let sparse =
            config(serde_json::json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}));
        assert!(sparse.language_part().unwrap().flag("tie_word_embeddings").unwrap());
        let plain = config(serde_json::json!({"model_type": "llama", "text_config": {}}));
        assert_eq!(plain.language_part().unwrap().text("model_type").unwrap().as_deref(), Some("llama"));
        let fault = config(serde_json::json!({"model_type": "gemma3"})).language_part().unwrap_err();
        assert!(fault.message.contains("text_config: found nothing"), "{fault}");
    }

    #[test]
    fn both_spellings_of_the_stored_type() {
        for key in ["torch_dtype", "dtype"] {
            assert_eq!(
                config(serde_json::json!({key: "bfloat16"})).dtype().unwrap().as_deref(),
                Some("bfloat16")
            );
        }
    }
}
