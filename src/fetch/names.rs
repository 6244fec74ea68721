//! File names -> the files that make a model, and whether they describe it or are its weights.

use crate::fault::{Fault, Result};

/// The use of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// The file describes the model: kilobytes to a few megabytes, read before anything else.
    Text,
    /// The file holds weights.
    Weights,
}

/// The file that makes a folder a model.
pub const CONFIG: &str = "config.json";
const WHOLE: &str = "model.safetensors";
const TEXTS: [&str; 6] = [
    CONFIG,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
];

/// Returns the role of a file directly in a model's folder. `None`: the file is not downloaded. This applies to other
/// formats of the weights (`*.bin`, `*.gguf`, `original/`, `onnx/`), code, pictures, and vocabularies that
/// tokenizer.json contains already.
pub fn role(name: &str) -> Option<Role> {
    let tokenizer = name.starts_with("tokenizer") && name.ends_with(".json");
    match name.contains(['/', '\\', '\0']) || name.starts_with('.') {
        true => None,
        false if name.ends_with(".safetensors") => Some(Role::Weights),
        false if TEXTS.contains(&name) || tokenizer || name.ends_with(".safetensors.index.json") => {
            Some(Role::Text)
        }
        false => None,
    }
}

/// Checks that the names of a listing that are downloaded hold what a model needs: config.json and safetensors. `all`
/// is the whole listing, for the message.
pub fn complete<'a>(
    taken: impl Iterator<Item = &'a str> + Clone,
    address: &str,
    all: &[String],
) -> Result<()> {
    let has = |wanted: Role| taken.clone().any(|name| role(name) == Some(wanted));
    let help = "a model is a folder with config.json, tokenizer.json and *.safetensors";
    let found = all.iter().take(8).map(|name| name.escape_debug().to_string()).collect::<Vec<_>>().join(", ");
    match (taken.clone().any(|name| name == CONFIG), has(Role::Weights)) {
        (true, true) => Ok(()),
        (true, false) => Err(Fault::model(format!("{address}: no *.safetensors among {found}")).help(help)),
        (false, _) => Err(Fault::model(format!("{address}: no {CONFIG} among {found}")).help(help)),
    }
}

/// Returns whether a file is downloaded.
pub fn is_taken(name: &str) -> bool {
    role(name).is_some()
}

/// Returns for each file whether it is kept. If a folder has its weights twice, one form is left out: all other weights
/// if there is `model.safetensors`, and for instance Mistral's `consolidated.safetensors` if there are shards
/// `model-*`.
pub fn without_doubles(names: &[String]) -> Vec<bool> {
    let whole = names.iter().any(|name| name == WHOLE);
    let shards = names.iter().any(|name| name.starts_with("model-") && name.ends_with(".safetensors"));
    let kept = |name: &String| match role(name) {
        Some(Role::Weights) if whole => name == WHOLE,
        Some(Role::Weights) if shards => name.starts_with("model-"),
        role => role.is_some(),
    };
    names.iter().map(kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_hub_repository_holds_is_told_apart() {
        let kept = |names: &str| {
            let names: Vec<String> = names.split(' ').map(str::to_owned).collect();
            let kept = without_doubles(&names);
            names
                .into_iter()
                .zip(kept)
                .filter(|(_, kept)| *kept)
                .map(|(name, _)| name)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let texts = "config.json tokenizer.json tokenizer_config.json chat_template.jinja";
        let other = "pytorch_model.bin model.gguf original/model.safetensors onnx/config.json vocab.json \
                     tokenizer.model README.md .gitattributes modeling.py ../config.json";
        assert_eq!(kept(&format!("{texts} {other}")), texts);
        let sharded =
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json";
        assert_eq!(kept(&format!("{sharded} consolidated.safetensors")), sharded);
        assert_eq!(
            kept("model.safetensors model-1-of-1.safetensors adapter_model.safetensors"),
            "model.safetensors"
        );
        assert_eq!(kept("weights.safetensors"), "weights.safetensors");
        assert_eq!(role("tokenizer.json"), Some(Role::Text));
        assert_eq!(role("model.safetensors"), Some(Role::Weights));
    }
}
