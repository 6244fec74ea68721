//! `config.json` as found on the hub: typed access whose errors name the key, the value found and what was expected.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::fault::{Fault, Kind, Result};
use crate::plain;

/// Multimodal models whose language part belongs to a family. The flag says whether the model ties its output head if
/// neither part of the config states it (transformers' defaults). Mistral 3's default is tied, but its checkpoints hold
/// a head.
const WRAPPERS: [(&str, bool); 4] =
    [("gemma3", true), ("mistral3", false), ("llava", false), ("llava_next", false)];

/// A model's `config.json`.
#[derive(Clone, Debug)]
pub struct Config {
    file: PathBuf,
    json: Map<String, Value>,
    /// `model_type` of the multimodal model whose language part this is.
    wrapper: Option<String>,
}

impl Config {
    /// Reads `config.json` of a model folder. A missing, oversized or malformed file is a model fault.
    pub fn read(folder: &Path) -> Result<Config> {
        let file = folder.join("config.json");
        let text = plain::read(&file, FILE_BYTES_MAX).map_err(|error| {
            let fault =
                Fault::unread(Kind::Model, format!("cannot read {}: {error}", file.display()), &error);
            match folder.is_dir() {
                true => fault.help("a model folder holds config.json, tokenizer.json and *.safetensors"),
                false => fault.help(
                    "give the folder of a model, or its address: hf://OWNER/NAME on the Hugging Face hub, \
                     oci://IMAGE, preset:NAME",
                ),
            }
        })?;
        match serde_json::from_slice(&text) {
            Ok(Value::Object(json)) => Ok(Config { file, json, wrapper: None }),
            Ok(_) => Err(Fault::model(format!("{}: expected a JSON object", file.display()))),
            Err(error) => Err(Fault::model(format!("{}: not JSON: {error}", file.display()))),
        }
    }

    /// Makes a config from JSON, for tests and generated models.
    pub fn from_json(json: Map<String, Value>) -> Config {
        Config { file: PathBuf::from("config.json"), json, wrapper: None }
    }

    /// Returns the config of the language model. For a multimodal wrapper this is its `text_config` with the keys
    /// that the wrapper sets for all its parts; for any other model it is the config itself.
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

    /// Returns the `model_type` of the multimodal model whose language part this is: `gemma3`, `mistral3`, `llava`.
    pub fn wrapper(&self) -> Option<&str> {
        self.wrapper.as_deref()
    }

    /// Returns the type of the stored weights as the config names it: `torch_dtype`, or `dtype` since transformers 5.
    /// It informs only, since each tensor states its own type.
    pub fn dtype(&self) -> Result<Option<String>> {
        Ok(self.text("dtype")?.or(self.text("torch_dtype")?))
    }

    /// Returns a part of this config (`rope_scaling`) whose errors have the same form.
    pub fn section(&self, key: &str) -> Option<Config> {
        let json = self.json.get(key)?.as_object()?.clone();
        Some(Config { file: self.file.join(key), json, wrapper: None })
    }

    /// Returns a part that is not empty. A missing key, null and `{}` give `None`; any other value that is not an
    /// object is refused.
    pub fn nonempty_section(&self, key: &str) -> Result<Option<Config>> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(json)) if json.is_empty() => Ok(None),
            Some(Value::Object(_)) => Ok(self.section(key)),
            Some(_) => Err(self.refuse(key, "an object")),
        }
    }

    /// Returns whether the key is present and not null.
    pub fn has(&self, key: &str) -> bool {
        self.json.get(key).is_some_and(|value| !value.is_null())
    }

    /// Returns whether the key is present, even if its value is null.
    pub fn says(&self, key: &str) -> bool {
        self.json.contains_key(key)
    }

    /// Returns a whole number above 0. A missing key is a fault.
    pub fn integer(&self, key: &str) -> Result<usize> {
        self.integer_or_none(key)?.ok_or_else(|| self.missing(key, "a whole number"))
    }

    /// Returns a whole number above 0, or `None` if the key is missing or null.
    pub fn integer_or_none(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number above 0", |value| {
            value.as_u64().filter(|&n| n > 0).and_then(|n| usize::try_from(n).ok())
        })
    }

    /// Returns a whole number that may be 0; `absent` if the key is missing or null.
    pub fn whole_or(&self, key: &str, absent: usize) -> Result<usize> {
        let whole = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        Ok(self.get(key, "a whole number", whole)?.unwrap_or(absent))
    }

    /// Refuses a number above `most`. Values that are not numbers are left to the function that reads the key.
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

    /// Returns a number. A missing key is a fault.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.number_or_none(key)?.ok_or_else(|| self.missing(key, "a number"))
    }

    /// Returns a finite number, or `None` if the key is missing or null.
    pub fn number_or_none(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| value.as_f64().filter(|n| n.is_finite()))
    }

    /// Returns a finite number: `absent` if the key is missing, `None` if it is null.
    pub fn number_unless_null(&self, key: &str, absent: f64) -> Result<Option<f64>> {
        if self.says(key) { self.number_or_none(key) } else { Ok(Some(absent)) }
    }

    /// Returns a flag; a missing key is false.
    pub fn flag(&self, key: &str) -> Result<bool> {
        self.flag_or(key, false)
    }

    /// Returns a flag; `absent` if the key is missing or null.
    pub fn flag_or(&self, key: &str, absent: bool) -> Result<bool> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(absent))
    }

    /// Returns a string, or `None` if the key is missing or null.
    pub fn text(&self, key: &str) -> Result<Option<String>> {
        self.get(key, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// Returns the names of this object's entries, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.json.keys().map(String::as_str)
    }

    /// Returns a list of numbers. A missing key is a fault.
    pub fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let list = |value: &Value| value.as_array()?.iter().map(Value::as_f64).collect();
        self.get(key, "a list of numbers", list)?.ok_or_else(|| self.missing(key, "a list of numbers"))
    }

    /// Returns a list of strings, or `None` if the key is missing or null.
    pub fn texts_or_none(&self, key: &str) -> Result<Option<Vec<String>>> {
        let list =
            |value: &Value| value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect();
        self.get(key, "a list of texts", list)
    }

    /// Returns a model fault that names the file, the key, the value found and the value expected.
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
