//! A model folder -> its tokenizer: text to ids with offsets, named special tokens, chat templates.

use super::harm;
use super::letters::byte_of;
use super::words::{Offsets, Words};
use crate::bounds::Bounds;
use crate::fault::{Fault, Kind, Result};
use crate::plain;
use crate::source;
use serde_json::Value;
use std::path::Path;
use std::time::SystemTime;
use tokenizers::AddedToken;

/// LIMIT: bytes of a file. The largest tokenizer.json in use have about 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// LIMIT: memory for reading tokenizer.json.
const LOAD_BYTES_MAX: usize = 512 << 20;
const LOAD_GROWTH_MAX: usize = 40;

/// The parts of transformers' AutoTokenizer that training needs.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Named tokens that chat templates see: (`bos_token`, `<s>`) and so on.
    specials: Vec<(String, String)>,
    /// (name, text) of each chat template. The usual one is called `default`.
    chat_templates: Vec<(String, String)>,
    eos: String,
    eos_id: u32,
    /// Ids at which generation stops, including `eos_id`.
    ends: Vec<u32>,
    special_ids: std::collections::HashSet<u32>,
    vocab_size: usize,
    /// Whether tokens are written in letters that stand for bytes, as in GPT-2.
    byte_level: bool,
    now: SystemTime,
    /// Digest of all files that it was made of.
    digest: String,
    /// A quicker way to the same tokens, if the tokenizer is of the common kind.
    words: Option<Words>,
    /// Tokens that are put before and behind a text; `None` if they depend on it.
    around: Option<(Vec<u32>, Vec<u32>)>,
}

impl Tokenizer {
    /// Reads tokenizer.json and tokenizer_config.json, and, if they exist, special_tokens_map.json, config.json,
    /// generation_config.json and chat_template.{jinja,json}. Errors: `Model`.
    pub fn open(folder: &Path) -> Result<Tokenizer> {
        let mut inner = load(folder)?;
        let config = required(folder, "tokenizer_config.json")?;
        let map = optional(folder, "special_tokens_map.json")?;
        add_declared_tokens(&mut inner, &config)?;
        let specials = specials(&config, &map);
        let (eos, eos_id) = end_of_sequence(&inner, folder, &specials)?;
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let chat_templates = chat_templates(folder, &config)?;
        let ends = ends(folder, eos_id)?;
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let decoder = inner.get_decoder().and_then(|decoder| serde_json::to_string(decoder).ok());
        let byte_level = decoder.is_some_and(|decoder| decoder.contains("\"ByteLevel\""));
        let now = SystemTime::now();
        let digest = digest(folder)?;
        let (words, around) = (Words::of(&inner), around(&inner));
        Ok(Tokenizer {
            inner,
            specials,
            chat_templates,
            eos,
            eos_id,
            ends,
            special_ids,
            vocab_size,
            byte_level,
            now,
            digest,
            words,
            around,
        })
    }

    /// Most bytes of a text that are tokenized at once while its tokens are within a usual context.
    pub const TEXT_BYTES_AT_ONCE: usize = WHOLE_BYTES;

    /// Sets the time that templates see, so that a resumed run renders the same texts.
    pub fn with_now(mut self, now: SystemTime) -> Tokenizer {
        self.now = now;
        self
    }

    /// Returns the id of the end-of-sequence token.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// Returns the text of the end-of-sequence token.
    pub fn eos(&self) -> &str {
        &self.eos
    }

    /// Returns the id of the beginning-of-sequence token, if there is one.
    pub fn bos_id(&self) -> Option<u32> {
        self.special("bos_token").and_then(|token| self.inner.token_to_id(token))
    }

    /// Returns the text of the beginning-of-sequence token, if there is one.
    pub fn bos(&self) -> Option<&str> {
        self.special("bos_token")
    }

    /// Returns whether generation stops at a token.
    pub fn ends(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// Returns texts of the tokens at which generation stops.
    pub fn end_tokens(&self) -> Vec<String> {
        self.ends.iter().map(|&id| self.id_to_text(id)).collect()
    }

    /// Returns whether a token is special: templates and tokenizers write it, people do not.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Returns the id of the padding token. Its absence is common and harmless, because padding is masked.
    pub fn pad_id(&self) -> Option<u32> {
        self.special("pad_token").and_then(|token| self.inner.token_to_id(token))
    }

    /// Returns one more than the largest id: the number of rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the model's own chat template, if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template_called("default")
    }

    /// Returns the model's own chat template for rows with tools, if it is a separate one.
    pub(super) fn tool_template(&self) -> Option<&str> {
        self.chat_template_called("tool_use").filter(|_| self.chat_template().is_some())
    }

    /// Returns the usual chat template. Errors: `Config` if there is none.
    pub(super) fn default_template(&self) -> Result<&str> {
        self.chat_template().ok_or_else(|| match self.template_names() {
            names if names.is_empty() => {
                Fault::config("the dataset holds conversations but the model has no chat template")
                    .help("set ModelConfig.chat_template, or use the instruction-tuned variant of the model")
            }
            names => Fault::config(format!(
                "the model has chat templates by name ({}), but none that is called default",
                names.join(", ")
            ))
            .help(format!("choose one, such as ModelConfig.chat_template: {}", names[0])),
        })
    }

    /// Returns the model's chat template of that name. Errors: `Config` if there is none.
    pub(super) fn named_template(&self, name: &str) -> Result<&str> {
        self.chat_template_called(name).ok_or_else(|| {
            let names = self.template_names();
            let has = match names.is_empty() {
                true => "no chat template".to_owned(),
                false => format!("chat templates called {}", names.join(", ")),
            };
            Fault::config(format!(
                "ModelConfig.chat_template: {name:?} is no file and no template of the model, which has {has}"
            ))
            .help("give Jinja text, a file of it, or the name of one of the model's templates")
        })
    }

    fn chat_template_called(&self, name: &str) -> Option<&str> {
        self.chat_templates.iter().find(|(other, _)| other == name).map(|(_, text)| text.as_str())
    }

    /// Returns the texts of all its chat templates.
    pub(super) fn template_texts(&self) -> impl Iterator<Item = &str> {
        self.chat_templates.iter().map(|(_, text)| text.as_str())
    }

    /// Tells tokenizers apart: equal digests make equal tokens of equal rows at equal times.
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }

    fn template_names(&self) -> Vec<&str> {
        self.chat_templates.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Returns the text of one token.
    pub fn id_to_text(&self, id: u32) -> String {
        self.text(&[id])
    }

    /// Ids -> text, with special tokens. Parts of a character become U+FFFD.
    pub fn text(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).unwrap_or_else(|_| ids.iter().map(|id| format!("<{id}>")).collect())
    }

    /// Ids -> text, without control tokens if `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }

    /// Text -> ids; `specials` adds the tokens that the tokenizer puts around a sequence. The error says why it
    /// failed.
    pub fn encode(&self, text: &str, specials: bool) -> std::result::Result<Vec<u32>, String> {
        let encoding = self.inner.encode_fast(text, specials).map_err(|error| unfit(&*error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the same of a text's beginning, with more than `tokens_max` tokens, if the text is very long.
    pub fn encode_beginning(
        &self,
        text: &str,
        specials: bool,
        tokens_max: usize,
    ) -> std::result::Result<Vec<u32>, String> {
        beginning(text, tokens_max, |text| self.encode(text, specials), |ids| ids)
    }

    /// Returns the bytes that a token stands for in any place, which may be a part of a character.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        if self.inner.get_added_tokens_decoder().contains_key(&id) {
            return token.into_bytes();
        }
        let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            return vec![byte];
        }
        match self.byte_level {
            true => token.chars().map(byte_of).collect::<Option<_>>().unwrap_or(token.into_bytes()),
            false => token.replace('\u{2581}', " ").into_bytes(),
        }
    }

    pub(super) fn special(&self, name: &str) -> Option<&str> {
        self.specials.iter().find(|(key, _)| key == name).map(|(_, token)| token.as_str())
    }

    pub(super) fn specials(&self) -> &[(String, String)] {
        &self.specials
    }

    pub(super) fn now(&self) -> SystemTime {
        self.now
    }

    /// Text -> ids with the tokens that the tokenizer puts around a sequence (`add_special_tokens=True`), unless
    /// the text has them already; the flag says whether it had. A very long text gives only its beginning, with
    /// more than `tokens_max` tokens.
    pub(super) fn ids(&self, text: &str, tokens_max: usize) -> std::result::Result<(Vec<u32>, bool), String> {
        beginning(text, tokens_max, |text| self.whole_ids(text), |(ids, _)| ids)
    }

    fn whole_ids(&self, text: &str) -> std::result::Result<(Vec<u32>, bool), String> {
        let plain = self.words.as_ref().and_then(|words| words.ids(&self.inner, text));
        if let (Some(plain), Some((front, back))) = (plain, &self.around) {
            if front.is_empty() && back.is_empty() {
                return Ok((plain, false));
            }
            return Ok(not_doubled([front.as_slice(), &plain, back].concat(), &plain));
        }
        let encoding = self.inner.encode_fast(text, true).map_err(|error| unfit(&*error))?;
        let mask = encoding.get_special_tokens_mask();
        let around = encoding.get_ids();
        let ids = around.to_vec();
        if !mask.contains(&1) {
            return Ok((ids, false));
        }
        let plain = self.inner.encode_fast(text, false).map_err(|error| unfit(&*error))?;
        Ok(not_doubled(ids, plain.get_ids()))
    }

    /// Text -> ids without added tokens (`add_special_tokens=False`), with the byte ranges of `text` they stand
    /// for. A very long text gives only its beginning, with more than `tokens_max` tokens.
    pub(super) fn spans(
        &self,
        text: &str,
        tokens_max: usize,
    ) -> std::result::Result<(Vec<u32>, Offsets), String> {
        let encode = |text: &str| {
            if let Some(found) = self.words.as_ref().and_then(|words| words.spans(&self.inner, text)) {
                return Ok(found);
            }
            let encoding = self.inner.encode(text, false).map_err(|error| unfit(&*error))?;
            Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
        };
        beginning(text, tokens_max, encode, |(ids, _)| ids)
    }
}

/// LIMIT: bytes of a text that is tokenized whole: a fraction of a second.
const WHOLE_BYTES: usize = 1 << 20;
/// LIMIT: most bytes of a text that are tokenized at once.
const PIECE_BYTES_MAX: usize = 8 << 20;
/// A border within a text changes at most the tokens of a few words before it.
const TOKENS_BEYOND: usize = 256;

/// Returns the tokens of a text or of its beginning. The beginning is long enough if `tokens_max` of its tokens, and
/// some more, are the same for twice as much text, so that later text does not change them.
fn beginning<T>(
    text: &str,
    tokens_max: usize,
    encode: impl Fn(&str) -> std::result::Result<T, String>,
    ids: impl Fn(&T) -> &Vec<u32>,
) -> std::result::Result<T, String> {
    if text.len() <= WHOLE_BYTES {
        return encode(text);
    }
    let wanted = tokens_max.saturating_add(TOKENS_BEYOND);
    let mut bytes = WHOLE_BYTES / 2;
    let mut shorter: Option<T> = None;
    loop {
        if text.len() <= bytes {
            return encode(text);
        }
        let longer = encode(&text[..text.floor_char_boundary(bytes)])?;
        let settled = shorter.as_ref().is_some_and(|shorter| {
            let (a, b) = (ids(shorter), ids(&longer));
            a.len() > wanted && b.len() > wanted && a[..wanted] == b[..wanted]
        });
        if settled {
            return Ok(longer);
        }
        if bytes >= PIECE_BYTES_MAX {
            return Err(format!(
                "its text has more than {} MB, and they make fewer than {wanted} tokens",
                PIECE_BYTES_MAX >> 20
            ));
        }
        shorter = Some(longer);
        bytes *= 2;
    }
}

/// Returns the tokens around those of two plain texts, if they are the same.
fn around(inner: &tokenizers::Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let of = |text: &str| {
        let ids = |specials| inner.encode_fast(text, specials).map(|found| found.get_ids().to_vec()).ok();
        let (plain, around) = (ids(false)?, ids(true)?);
        let added = around.len().checked_sub(plain.len())?;
        let front = (0..=added).find(|&at| around[at..].starts_with(&plain))?;
        Some((around[..front].to_vec(), around[front + plain.len()..].to_vec()))
    };
    let found = of("a plain text")?;
    (of("Another one: 2!")? == found).then_some(found)
}

/// `around` is `plain` with tokens before and after it. Tokens that `plain` begins or ends with already are
/// removed.
fn not_doubled(mut around: Vec<u32>, plain: &[u32]) -> (Vec<u32>, bool) {
    let added = around.len().saturating_sub(plain.len());
    let Some(front) = (0..=added).find(|&at| around[at..].starts_with(plain)) else { return (around, false) };
    let (before, after) = (around[..front].to_vec(), around[front + plain.len()..].to_vec());
    let begins = !before.is_empty() && plain.starts_with(&before);
    let ends = !after.is_empty() && plain.ends_with(&after);
    if ends {
        around.truncate(front + plain.len());
    }
    if begins {
        around.drain(..front);
    }
    (around, begins || ends)
}

fn unfit(error: &dyn std::error::Error) -> String {
    format!("the tokenizer fails on it: {error}")
}

fn load(folder: &Path) -> Result<tokenizers::Tokenizer> {
    let bytes = read(folder, "tokenizer.json")?.ok_or_else(|| {
        let fault = missing(folder, "tokenizer.json");
        if folder.join("tokenizer.model").exists() {
            fault.help(
                "the folder has tokenizer.model only: save the tokenizer once with a fast tokenizer class",
            )
        } else {
            fault
        }
    })?;
    let file = folder.join("tokenizer.json").display().to_string();
    let bounds = Bounds::new(Kind::Model, &file, LOAD_BYTES_MAX.max(bytes.len() * LOAD_GROWTH_MAX));
    let mut inner = bounds.hold(|| {
        harm::check(&bytes).map_err(|what| Fault::model(format!("{file}: {what}")))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| Fault::model(format!("{file}: {error}")))?;
        // Parts that do not fit together panic when they are used. They are used here, so that the panic becomes a
        // fault of the file.
        let _ = inner.encode_fast("", true);
        Ok(inner)
    })?;
    if inner.get_vocab_size(false) == 0 {
        return Err(Fault::model(format!("{file}: its vocabulary is empty: no text could become tokens"))
            .help("download the whole folder of the model, tokenizer included"));
    }
    // Some repositories ship the settings of their last use, but lengths are decided here.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|error| Fault::internal(format!("no truncation: {error}")))?;
    Ok(inner)
}

/// Adds every token of `added_tokens_decoder` that tokenizer.json lacks or has with other flags, as transformers
/// does.
fn add_declared_tokens(inner: &mut tokenizers::Tokenizer, config: &Value) -> Result<()> {
    let Some(declared) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let mut tokens: Vec<(u32, AddedToken)> = declared
        .iter()
        .filter_map(|(id, token)| {
            let flag = |name: &str, default| token.get(name).and_then(Value::as_bool).unwrap_or(default);
            let special = flag("special", false);
            let added = AddedToken::from(token.get("content")?.as_str()?, special)
                .lstrip(flag("lstrip", false))
                .rstrip(flag("rstrip", false))
                .single_word(flag("single_word", false))
                .normalized(flag("normalized", !special));
            Some((id.parse().ok()?, added))
        })
        .collect();
    tokens.sort_by_key(|(id, _)| *id);
    for (id, token) in tokens {
        let content = token.content.clone();
        let added = if token.special { inner.add_special_tokens([token]) } else { inner.add_tokens([token]) };
        added.map_err(|error| Fault::model(format!("tokenizer: cannot add {content:?}: {error}")))?;
        if inner.token_to_id(&content) != Some(id) {
            return Err(Fault::model(format!(
                "tokenizer_config.json gives {content:?} the id {id}, tokenizer.json gives it {:?}",
                inner.token_to_id(&content)
            )));
        }
    }
    Ok(())
}

/// Returns every `..._token` with a text; tokenizer_config.json comes first.
fn specials(config: &Value, map: &Value) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for (name, value) in [config, map].into_iter().filter_map(Value::as_object).flatten() {
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        if let Some(text) =
            text.filter(|_| name.ends_with("_token") && !found.iter().any(|(other, _)| other == name))
        {
            found.push((name.clone(), text.to_string()));
        }
    }
    found
}

/// Returns the named `eos_token`, else the first `eos_token_id` of generation_config.json or config.json.
fn end_of_sequence(
    inner: &tokenizers::Tokenizer,
    folder: &Path,
    specials: &[(String, String)],
) -> Result<(String, u32)> {
    if let Some((_, token)) = specials.iter().find(|(name, _)| name == "eos_token") {
        return match inner.token_to_id(token) {
            Some(id) => Ok((token.clone(), id)),
            None => {
                Err(Fault::model(format!("eos_token {token:?} is not in the vocabulary of tokenizer.json")))
            }
        };
    }
    for name in ["generation_config.json", "config.json"] {
        let config = optional(folder, name)?;
        let id = config.get("eos_token_id").and_then(|id| id.as_u64().or_else(|| id.get(0)?.as_u64()));
        let id = id.and_then(|id| u32::try_from(id).ok());
        if let Some((token, id)) = id.and_then(|id| Some((inner.id_to_token(id)?, id))) {
            return Ok((token, id));
        }
    }
    Err(Fault::model(format!("{}: no end-of-sequence token is named", folder.display()))
        .help("set eos_token in tokenizer_config.json"))
}

/// Returns the ids at which generation stops: the named token, and `eos_token_id` of generation_config.json and
/// config.json.
fn ends(folder: &Path, eos_id: u32) -> Result<Vec<u32>> {
    let mut ends = vec![eos_id];
    for name in ["generation_config.json", "config.json"] {
        let config = optional(folder, name)?;
        let found = config.get("eos_token_id").map(|ids| match ids {
            Value::Array(ids) => ids.clone(),
            id => vec![id.clone()],
        });
        for id in found.into_iter().flatten().filter_map(|id| u32::try_from(id.as_u64()?).ok()) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
    }
    Ok(ends)
}

/// Returns the chat templates in the order of transformers: the file of its own, the older JSON file,
/// tokenizer_config.json (a text, or a list of named ones). Then a folder of further named ones.
fn chat_templates(folder: &Path, config: &Value) -> Result<Vec<(String, String)>> {
    let own = optional(folder, "chat_template.json")?;
    let mut found = match read(folder, "chat_template.jinja")? {
        Some(bytes) => vec![("default".to_owned(), utf8(bytes, &folder.join("chat_template.jinja"))?)],
        None => match own.get("chat_template").or_else(|| config.get("chat_template")) {
            Some(Value::String(text)) => vec![("default".to_owned(), text.clone())],
            Some(Value::Array(named)) => {
                let text = |entry: &Value, key: &str| Some(entry.get(key)?.as_str()?.to_owned());
                named
                    .iter()
                    .filter_map(|entry| Some((text(entry, "name")?, text(entry, "template")?)))
                    .collect()
            }
            _ => Vec::new(),
        },
    };
    let further = folder.join("additional_chat_templates");
    let entries = std::fs::read_dir(&further).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "jinja")).collect();
    files.sort();
    for file in files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = read(&further, &format!("{name}.jinja"))?.unwrap_or_default();
        found.push((name, utf8(bytes, &file)?));
    }
    Ok(found)
}

/// Files that `open` reads, beside the folder of further chat templates.
const FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
];

fn digest(folder: &Path) -> Result<String> {
    let mut parts = Vec::new();
    for name in FILES {
        let bytes = read(folder, name)?;
        parts.push(format!("{name} {}", bytes.map_or("absent".into(), |bytes| source::digest(&bytes))));
    }
    for (name, text) in chat_templates(folder, &Value::Null)? {
        parts.push(format!("{name:?} {}", source::digest(text.as_bytes())));
    }
    Ok(source::digest(parts.join("\n").as_bytes()))
}

fn utf8(bytes: Vec<u8>, file: &Path) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Fault::model(format!("{}: not UTF-8", file.display())))
}

fn missing(folder: &Path, name: &str) -> Fault {
    Fault::model(format!("{}: {name} is missing", folder.display()))
        .help("download the whole folder of the model, tokenizer included")
}

fn required(folder: &Path, name: &str) -> Result<Value> {
    match optional(folder, name)? {
        Value::Null => Err(missing(folder, name)),
        value => Ok(value),
    }
}

/// Reads a JSON file; `Null` if there is none.
fn optional(folder: &Path, name: &str) -> Result<Value> {
    let Some(bytes) = read(folder, name)? else { return Ok(Value::Null) };
    serde_json::from_slice(&bytes)
        .map_err(|error| Fault::model(format!("{}: not JSON: {error}", folder.join(name).display())))
}

fn read(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = folder.join(name);
    match plain::read(&path, FILE_BYTES_MAX) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(Fault::unread(Kind::Model, format!("cannot read {}: {error}", path.display()), &error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_text_has_already_is_not_put_around_it_again() {
        let check = |around: &[u32], plain: &[u32], expected: (&[u32], bool)| {
            let (ids, doubled) = not_doubled(around.to_vec(), plain);
            assert_eq!((ids.as_slice(), doubled), expected, "{around:?} of {plain:?}");
        };
        check(&[1, 5, 6], &[5, 6], (&[1, 5, 6], false));
        check(&[1, 1, 5], &[1, 5], (&[1, 5], true));
        check(&[1, 5, 2, 2], &[5, 2], (&[1, 5, 2], true));
        check(&[1, 1, 5, 2, 2], &[1, 5, 2], (&[1, 5, 2], true));
        check(&[5, 2, 2], &[5, 2], (&[5, 2], true));
        check(&[7, 7], &[5], (&[7, 7], false));
    }
}
