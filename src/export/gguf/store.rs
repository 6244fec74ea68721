//! A GGUF file of a model -> its tensors by the names and in the order that the checkpoint had, so that what was
//! written can be computed with.

use std::collections::HashMap;
use std::path::Path;

use super::architecture::{Architecture, Entry, HEAD};
use super::file::Gguf;
use crate::facts::Facts;
use crate::fault::Result;
use crate::model::weights::Store;

/// The tensors of a file.
#[derive(Debug)]
pub struct GgufStore {
    file: Gguf,
    entries: HashMap<String, Entry>,
}

impl GgufStore {
    /// Opens a file that holds a model of these facts.
    ///
    /// # Errors
    /// Model: the file is damaged.
    pub fn open(path: &Path, facts: &Facts, architecture: &Architecture) -> Result<GgufStore> {
        let file = Gguf::open(path)?;
        let mut entries = HashMap::new();
        for tensor in facts.tensors() {
            let entry = architecture.entry(facts, &tensor.name)?;
            let name = tensor.name.replacen("model.language_model.", "model.", 1);
            entries.insert(name, entry);
        }
        Ok(GgufStore { file, entries })
    }

    /// Returns the file's own names of tensors that no tensor of the model is.
    pub fn unknown(&self) -> Vec<&str> {
        let known = |name: &str| {
            name == HEAD
                || name.starts_with("rope_f")
                || self.entries.values().any(|entry| entry.name == name)
        };
        self.file.tensors.iter().map(|(t, _)| t.name.as_str()).filter(|name| !known(name)).collect()
    }
}

impl Store for GgufStore {
    fn names(&self) -> Vec<String> {
        let there = |entry: &Entry| self.file.tensors.iter().any(|(tensor, _)| tensor.name == entry.name);
        self.entries.iter().filter(|(_, entry)| there(entry)).map(|(name, _)| name.clone()).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<(Vec<usize>, Vec<f32>)>> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        let Some((tensor, values)) = self.file.values(&entry.name)? else { return Ok(None) };
        let cols = values.len() / tensor.shape[0].max(1);
        let mut values = entry.order.undo(&values, cols);
        if entry.plus != 0.0 {
            values.iter_mut().for_each(|value| *value -= entry.plus);
        }
        Ok(Some((tensor.shape.clone(), values)))
    }
}
