//! The served model: an engine with its tokenizer, its template and its names.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::{Error, Result};
use crate::dataset::{Chat, Tokenizer};
use crate::fault;
use crate::generate::defaults::Defaults;
use crate::generate::{Adapter, Shared, Strength};

/// LIMIT: tokens of a text that is only tokenized.
const TOKENS_MAX: usize = 1 << 20;

/// An adapter's source, as a request names it -> its folder.
pub type Bring = Arc<dyn Fn(&str) -> fault::Result<Brought> + Send + Sync>;

/// An adapter's files, and their source.
#[derive(Clone, Debug, PartialEq)]
pub struct Brought {
    /// The PEFT folder.
    pub folder: PathBuf,
    /// The adapter's source and digest.
    pub origin: Origin,
}

/// The source of an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Origin {
    /// The source as the user named it.
    pub source: String,
    /// `sha256:...`: an image's manifest digest, or that of the adapter's two files.
    pub digest: String,
}

/// A model that answers.
pub struct Model {
    /// The id of the base in `/v1/models`.
    pub name: String,
    /// The engine that generates.
    pub engine: Shared,
    /// Text to token ids and back.
    pub tokenizer: Tokenizer,
    /// `None`: the model has no chat template, and `/v1/chat/completions` is refused.
    pub chat: Option<Chat>,
    /// The values for requests that name no others.
    pub defaults: Defaults,
    /// Mixes, and where adapters came from.
    pub named: Named,
    /// Whether `/chat` continues the prompt as it is.
    pub raw_chat: bool,
    /// Adapters and mixes may be changed by requests.
    pub bring: Option<Bring>,
}

/// Names besides that of the base: mixes, and the origins of adapters. Requests may change them.
#[derive(Debug, Default)]
pub struct Named {
    /// The id that answers requests that name none; `None`: the only mix, else the base.
    default: Option<String>,
    state: Mutex<State>,
}

/// The state of the file of adapters that the server follows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileState {
    /// Names the text that was looked at last.
    pub digest: String,
    /// The reason why it is not served; `None`: it is.
    pub refused: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    /// Names for sums of adapters, in the order in which they were made.
    mixes: Vec<(String, Vec<Strength>)>,
    origins: BTreeMap<String, Origin>,
    file: Option<FileState>,
}

impl Named {
    /// Returns the names with the mixes that are there from the start.
    pub fn new(default: Option<String>, mixes: Vec<(String, Vec<Strength>)>) -> Named {
        Named { default, state: Mutex::new(State { mixes, ..State::default() }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns every mix, in the order in which they were made.
    pub fn mixes(&self) -> Vec<(String, Vec<Strength>)> {
        self.lock().mixes.clone()
    }

    /// Returns the parts of a mix.
    pub fn mix(&self, name: &str) -> Option<Vec<Strength>> {
        self.lock().mixes.iter().find(|(other, _)| other == name).map(|(_, parts)| parts.clone())
    }

    /// Makes a mix, or changes one for requests to come.
    pub fn set_mix(&self, name: &str, parts: Vec<Strength>) {
        let mut state = self.lock();
        match state.mixes.iter_mut().find(|(other, _)| other == name) {
            Some((_, known)) => *known = parts,
            None => state.mixes.push((name.to_owned(), parts)),
        }
    }

    /// Removes a mix; whether there was one of this name.
    pub fn remove_mix(&self, name: &str) -> bool {
        let mut state = self.lock();
        let before = state.mixes.len();
        state.mixes.retain(|(other, _)| other != name);
        state.mixes.len() < before
    }

    /// Returns the state of the file of adapters; `None`: no file is followed.
    pub fn file(&self) -> Option<FileState> {
        self.lock().file.clone()
    }

    /// Sets the state of the followed file.
    pub fn set_file(&self, file: FileState) {
        self.lock().file = Some(file);
    }

    /// Returns the source of a loaded adapter.
    pub fn origin(&self, adapter: &str) -> Origin {
        self.lock().origins.get(adapter).cloned().unwrap_or_default()
    }

    /// Records the source of an adapter.
    pub fn set_origin(&self, adapter: &str, origin: Origin) {
        self.lock().origins.insert(adapter.to_owned(), origin);
    }
}

impl Model {
    /// Returns every id a request may name.
    pub fn names(&self) -> Vec<String> {
        let adapters = self.engine.adapters().into_iter().map(|adapter| adapter.name);
        let mixes = self.named.mixes().into_iter().map(|(name, _)| name);
        [self.name.clone()].into_iter().chain(adapters).chain(mixes).collect()
    }

    /// Returns the id that answers a request that names none.
    pub fn default_name(&self) -> String {
        if let Some(name) = &self.named.default {
            return name.clone();
        }
        match self.named.mixes().as_slice() {
            [(only, _)] => only.clone(),
            _ => self.name.clone(),
        }
    }

    /// Returns the name that `--default` gave to answer requests that name no model.
    pub fn fixed_default(&self) -> Option<&str> {
        self.named.default.as_deref()
    }

    /// Returns the adapters and strengths that a name adds to the base.
    pub fn named(&self, name: &str) -> Result<Vec<Strength>> {
        if let Some(mix) = self.named.mix(name) {
            return Ok(mix);
        }
        if name == self.name {
            return Ok(Vec::new());
        }
        match self.engine.adapters().iter().any(|adapter| adapter.name == name) {
            true => Ok(vec![Strength { name: name.to_owned(), strength: 1.0 }]),
            false => Err(Error::unknown_model(name, &self.names())),
        }
    }

    /// Loads an adapter under a name.
    ///
    /// # Errors
    /// The adapter cannot be obtained, or it does not fit the base.
    pub fn load_adapter(&self, name: &str, brought: Brought) -> fault::Result<Adapter> {
        let adapter = self.engine.load_adapter(name, &brought.folder)?;
        self.named.set_origin(name, brought.origin);
        Ok(adapter)
    }

    /// Returns the token ids of a text; `specials` adds those that the tokenizer puts around a text. A very long text
    /// gives only its beginning, with more tokens than the context holds.
    pub fn encode(&self, text: &str, specials: bool) -> Result<Vec<u32>> {
        let context = self.engine.facts().context;
        self.tokenizer.encode_beginning(text, specials, context).map_err(unusable)
    }

    /// Returns all token ids of a text.
    ///
    /// # Errors
    /// The text has more than `TOKENS_MAX` tokens.
    pub fn tokens(&self, text: &str, specials: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode_beginning(text, specials, TOKENS_MAX).map_err(unusable)?;
        match ids.len() > TOKENS_MAX {
            true => Err(Error::bad(format!("The text has more than {TOKENS_MAX} tokens; send it in parts"))),
            false => Ok(ids),
        }
    }
}

/// Returns the error for a text of which the tokenizer makes no tokens, with its reason.
fn unusable(problem: String) -> Error {
    Error::bad(format!("The text cannot be used: {problem}"))
}
