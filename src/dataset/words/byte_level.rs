//! Byte-level BPE, as GPT-2's, Llama 3's and Qwen's: one expression divides a text into pieces, and the bytes of a
//! piece become tokens.

use super::part::Part;
use crate::dataset::letters::letter_of;
use fancy_regex::Regex;
use serde_json::Value;
use tokenizers::{Model, ModelWrapper};

/// GPT-2's expression, which `ByteLevel` splits by.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// A byte-level BPE tokenizer.
pub(super) struct ByteLevel {
    pieces: Regex,
    /// Whether text that the expression does not match becomes tokens too.
    keeps_rest: bool,
    trim: Option<Trim>,
}

/// The change of places by the post-processor: it takes the spaces off.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Trim {
    /// A first token keeps one space, since the tokenizer may have put it there.
    keeps_first: bool,
}

impl ByteLevel {
    /// Returns `None` if the tokenizer is of another kind.
    pub fn of(inner: &tokenizers::Tokenizer) -> Option<ByteLevel> {
        if !plain_bpe(inner.get_model()) {
            return None;
        }
        let splits = serde_json::to_value(inner.get_pre_tokenizer()?).ok()?;
        let (expression, keeps_rest) = expression(&splits)?;
        let pieces = Regex::new(&expression).ok()?;
        let trim = match inner.get_post_processor() {
            None => None,
            Some(processor) => trim(&serde_json::to_value(processor).ok()?)?,
        };
        Some(ByteLevel { pieces, keeps_rest, trim })
    }

    /// Divides by the expression.
    pub fn pieces(&self, text: &str, each: &mut dyn FnMut(usize, usize) -> Option<()>) -> Option<()> {
        let mut at = 0;
        for found in self.pieces.find_iter(text) {
            let found = found.ok()?;
            if at < found.start() && self.keeps_rest {
                each(at, found.start())?;
            }
            if found.start() < found.end() {
                each(found.start(), found.end())?;
            }
            at = found.end();
        }
        if at < text.len() && self.keeps_rest { each(at, text.len()) } else { Some(()) }
    }

    /// Returns a token's place after the post-processor.
    pub fn trimmed(&self, part: &Part, mut from: usize, mut to: usize, is_first: bool) -> (usize, usize) {
        let Some(trim) = self.trim else { return (from, to) };
        let (mut before, after) = (usize::from(part.before), usize::from(part.after));
        if (is_first || from == 0) && trim.keeps_first && before == 1 {
            before = 0;
        }
        from = (from + before).min(to);
        if after > 0 && to >= after {
            to = (to - after).max(from);
        }
        (from, to)
    }
}

/// Returns the tokens of one piece, by the library's model.
pub(super) fn parts(model: &ModelWrapper, piece: &str) -> Option<Box<[Part]>> {
    let mut letters = String::with_capacity(2 * piece.len());
    // For each byte of the letters, the byte of the piece.
    let mut bytes = Vec::with_capacity(2 * piece.len() + 1);
    for (at, byte) in piece.bytes().enumerate() {
        let letter = letter_of(byte);
        bytes.extend(std::iter::repeat_n(at as u32, letter.len_utf8()));
        letters.push(letter);
    }
    bytes.push(piece.len() as u32);
    let tokens = model.tokenize(&letters).ok()?;
    let part = |token: tokenizers::Token| {
        let (before, after) = spaces(&token.value);
        Some(Part {
            id: token.id,
            from: *bytes.get(token.offsets.0)?,
            to: *bytes.get(token.offsets.1)?,
            before,
            after,
        })
    };
    tokens.into_iter().map(part).collect()
}

/// Counts the spaces at both ends of a token's text, in either form.
pub(super) fn spaces(token: &str) -> (u16, u16) {
    let is_space = |c: &char| *c == 'Ġ' || c.is_whitespace();
    let count = |count: usize| u16::try_from(count).unwrap_or(u16::MAX);
    (
        count(token.chars().take_while(is_space).count()),
        count(token.chars().rev().take_while(is_space).count()),
    )
}

/// Returns whether the model is BPE over bytes, without chance, marks of words or a form for bytes that it does not
/// know.
fn plain_bpe(model: &ModelWrapper) -> bool {
    let ModelWrapper::BPE(bpe) = model else { return false };
    let is_empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    bpe.dropout.is_none_or(|dropout| dropout == 0.0)
        && is_empty(&bpe.continuing_subword_prefix)
        && is_empty(&bpe.end_of_word_suffix)
        && bpe.unk_token.is_none()
        && !bpe.byte_fallback
}

/// Returns the expression that a pre-tokenizer splits by, if it splits once and then takes bytes, and whether it keeps
/// text that the expression does not match.
fn expression(splits: &Value) -> Option<(String, bool)> {
    let kind = |value: &Value| value["type"].as_str().map(str::to_owned);
    let bytes = |value: &Value, use_regex: bool| {
        kind(value).as_deref() == Some("ByteLevel")
            && value["add_prefix_space"] == false
            && value["use_regex"].as_bool().unwrap_or(true) == use_regex
    };
    if bytes(splits, true) {
        return Some((GPT2.to_owned(), true));
    }
    let [split, last] = splits["pretokenizers"].as_array()?.as_slice() else { return None };
    let is_split = kind(splits).as_deref() == Some("Sequence") && kind(split).as_deref() == Some("Split");
    let keeps_rest = match (split["behavior"].as_str()?, split["invert"].as_bool()?) {
        ("Isolated", _) => true,
        // The matches of the expression are kept.
        ("Removed", true) => false,
        _ => return None,
    };
    let expression = split["pattern"]["Regex"].as_str()?;
    (is_split && bytes(last, false)).then(|| (expression.to_owned(), keeps_rest))
}

/// Returns the change of places by a post-processor. `None`: the change is not known here.
fn trim(processor: &Value) -> Option<Option<Trim>> {
    let list = match processor["type"].as_str()? {
        "Sequence" => processor["processors"].as_array()?.clone(),
        _ => vec![processor.clone()],
    };
    let mut trim = None;
    for processor in list {
        match processor["type"].as_str()? {
            "TemplateProcessing" => {}
            "ByteLevel" if processor["trim_offsets"] == false => {}
            "ByteLevel" if trim.is_none() => {
                trim = Some(Trim { keeps_first: processor["add_prefix_space"].as_bool()? });
            }
            _ => return None,
        }
    }
    Some(trim)
}
