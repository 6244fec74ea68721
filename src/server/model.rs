//! What is served: an engine with its tokenizer, its template and the names it answers to.

use std::path::PathBuf;
use std::sync::Arc;

use super::error::{Error, Result};
use crate::dataset::{Chat, Tokenizer};
use crate::fault;
use crate::generate::defaults::Defaults;
use crate::generate::{Shared, Strength};

/// An adapter's source, as a request names it -> its folder.
pub type Bring = Arc<dyn Fn(&str) -> fault::Result<PathBuf> + Send + Sync>;

/// A model that answers.
pub struct Model {
    /// The id of the base in `/v1/models`.
    pub name: String,
    pub engine: Shared,
    pub tokenizer: Tokenizer,
    /// `None`: the model has no chat template, and `/v1/chat/completions` is refused.
    pub chat: Option<Chat>,
    pub defaults: Defaults,
    /// Names for sums of adapters.
    pub mixes: Vec<(String, Vec<Strength>)>,
    /// Whether `/chat` continues the prompt as it is.
    pub raw_chat: bool,
    /// Adapters may be loaded and unloaded by requests.
    pub bring: Option<Bring>,
}

impl Model {
    /// Every id a request may name.
    pub fn names(&self) -> Vec<String> {
        let adapters = self.engine.adapters().into_iter().map(|adapter| adapter.name);
        let mixes = self.mixes.iter().map(|(name, _)| name.clone());
        [self.name.clone()].into_iter().chain(adapters).chain(mixes).collect()
    }

    /// What a name adds to the base.
    pub fn named(&self, name: &str) -> Result<Vec<Strength>> {
        if let Some((_, mix)) = self.mixes.iter().find(|(other, _)| other == name) {
            return Ok(mix.clone());
        }
        if name == self.name {
            return Ok(Vec::new());
        }
        match self.engine.adapters().iter().any(|adapter| adapter.name == name) {
            true => Ok(vec![Strength { name: name.to_owned(), strength: 1.0 }]),
            false => Err(Error::unknown_model(name, &self.names())),
        }
    }

    pub fn encode(&self, text: &str, specials: bool) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, specials).map_err(Error::bad)
    }
}
