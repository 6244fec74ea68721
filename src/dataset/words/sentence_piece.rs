//! SentencePiece's BPE, as Llama 2's, Phi-3's, Mistral's and Gemma's: spaces are written `▁`, and the merges see a text
//! as a whole. They never join a letter with a `▁` behind it, so each word of a text becomes tokens on its own.

use super::part::Part;
use serde_json::Value;
use tokenizers::{Model, ModelWrapper};

/// The character that a space is written as.
const MARK: char = '\u{2581}';

/// A SentencePiece tokenizer.
pub(super) struct SentencePiece {
    prefix: Prefix,
    /// Whether no token joins a line break with another character.
    breaks_alone: bool,
}

/// The rule by which a mark is put before a part of a text. Added tokens divide a text into parts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Prefix {
    Never,
    /// Each part gets a mark, also one that begins with a space.
    Each,
    /// A part gets a mark unless it begins with a space or a mark.
    EachWithout,
    /// Only the part at the beginning of the text gets one, by the same condition.
    FirstWithout,
}

impl SentencePiece {
    /// Returns `None` if the tokenizer is of another kind.
    pub fn of(inner: &tokenizers::Tokenizer) -> Option<SentencePiece> {
        let normalizer = serde_json::to_value(inner.get_normalizer()).ok()?;
        let splits = serde_json::to_value(inner.get_pre_tokenizer()).ok()?;
        let prefix = prefix(&normalizer, &splits)?;
        let processor = serde_json::to_value(inner.get_post_processor()).ok()?;
        let keeps_places = processor.is_null() || processor["type"] == "TemplateProcessing";
        if !keeps_places || !whole_bpe(inner.get_model()) {
            return None;
        }
        let vocabulary = inner.get_model().get_vocab();
        let joins = |token: &String, left: fn(char) -> bool, right: fn(char) -> bool| {
            token.chars().zip(token.chars().skip(1)).any(|(a, b)| left(a) && right(b))
        };
        // Such a token joins two words, so that they could not become tokens one by one.
        if vocabulary.keys().any(|token| joins(token, |a| a != MARK, |b| b == MARK)) {
            return None;
        }
        let breaks_alone = !vocabulary.keys().any(|token| {
            joins(token, |a| a == '\n', |b| b != '\n') || joins(token, |a| a != '\n', |b| b == '\n')
        });
        Some(SentencePiece { prefix, breaks_alone })
    }

    /// Returns whether a part of a text gets a mark before it.
    pub fn is_prefixed(&self, part: &str, is_at_start: bool) -> bool {
        match self.prefix {
            Prefix::Never => false,
            Prefix::Each => true,
            Prefix::EachWithout => !part.starts_with([' ', MARK]),
            Prefix::FirstWithout => is_at_start && !part.starts_with([' ', MARK]),
        }
    }

    /// Divides into words, each with the spaces before it, and line breaks.
    pub fn pieces(&self, text: &str, each: &mut dyn FnMut(usize, usize) -> Option<()>) -> Option<()> {
        let mut at = 0;
        let mut last = None;
        for (place, c) in text.char_indices() {
            let is_border = last.is_some_and(|last| {
                (is_blank(c) && !is_blank(last)) || (self.breaks_alone && (c == '\n') != (last == '\n'))
            });
            if is_border {
                each(at, place)?;
                at = place;
            }
            last = Some(c);
        }
        if at < text.len() { each(at, text.len()) } else { Some(()) }
    }
}

fn is_blank(c: char) -> bool {
    c == ' ' || c == MARK
}

/// Returns the tokens of one piece, by the library's model. The mark before a part has the place of its first
/// character.
pub(super) fn parts(model: &ModelWrapper, piece: &str, is_prefixed: bool) -> Option<Box<[Part]>> {
    let mut marked = String::with_capacity(piece.len() + 8);
    // For each byte of the marked text, the place of its character in the piece.
    let mut places = Vec::with_capacity(piece.len() + 8);
    let first = piece.chars().next().filter(|_| is_prefixed);
    let mark = first.map(|first| (0, MARK, first.len_utf8()));
    let characters = piece.char_indices().map(|(at, c)| (at, if c == ' ' { MARK } else { c }, c.len_utf8()));
    for (at, c, bytes) in mark.into_iter().chain(characters) {
        places.extend(std::iter::repeat_n((at as u32, (at + bytes) as u32), c.len_utf8()));
        marked.push(c);
    }
    let part = |token: tokenizers::Token| {
        let from = places.get(token.offsets.0)?.0;
        let to = places.get(token.offsets.1.checked_sub(1)?)?.1;
        Some(Part { id: token.id, from, to, before: 0, after: 0 })
    };
    model.tokenize(&marked).ok()?.into_iter().map(part).collect()
}

/// Returns whether the model is BPE that has a token for each byte, so that no character is unknown.
fn whole_bpe(model: &ModelWrapper) -> bool {
    let ModelWrapper::BPE(bpe) = model else { return false };
    let is_empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    bpe.dropout.is_none_or(|dropout| dropout == 0.0)
        && is_empty(&bpe.continuing_subword_prefix)
        && is_empty(&bpe.end_of_word_suffix)
        && bpe.byte_fallback
        && !bpe.ignore_merges
        && (0..=255).all(|byte: u8| bpe.token_to_id(&format!("<{byte:#04X}>")).is_some())
}

/// Returns the rule for marks before parts. `None`: the normalizer or the pre-tokenizer does more than write marks.
fn prefix(normalizer: &Value, splits: &Value) -> Option<Prefix> {
    let marks = |value: &Value| {
        value["type"] == "Replace"
            && value["pattern"]["String"] == " "
            && value["content"] == MARK.to_string()
    };
    let prepends = |value: &Value| value["type"] == "Prepend" && value["prepend"] == MARK.to_string();
    // Gemma splits at spaces, of which its normalizer has left none.
    let nothing = splits.is_null()
        || (splits["type"] == "Split" && splits["pattern"]["String"] == " " && splits["invert"] == false);
    if normalizer["type"] == "Sequence" {
        let [a, b] = normalizer["normalizers"].as_array()?.as_slice() else { return None };
        return (nothing && prepends(a) && marks(b)).then_some(Prefix::Each);
    }
    if normalizer.is_null() {
        let is_metaspace = splits["type"] == "Metaspace"
            && splits["replacement"] == MARK.to_string()
            && splits["split"] == false;
        return match splits["prepend_scheme"].as_str().filter(|_| is_metaspace)? {
            "never" => Some(Prefix::Never),
            "always" => Some(Prefix::EachWithout),
            "first" => Some(Prefix::FirstWithout),
            _ => None,
        };
    }
    (nothing && marks(normalizer)).then_some(Prefix::Never)
}
