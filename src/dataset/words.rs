//! A byte-level BPE tokenizer -> the same tokens and places as the library's, with what words become remembered.
//!
//! The library keeps the place of every byte through each of its steps, which costs more than the tokens do. Most
//! tokenizers in use need none of that: they split a text at added tokens, split the rest by one expression, and turn
//! each piece, byte by byte, into tokens. Here the pieces' tokens come from the library's own model, once for each
//! piece, and places are sums of lengths. A tokenizer with anything else in it (a normalizer, other splits, tokens that
//! take the space around them) has no `Words`, and the library does all of the work.

use super::tokenizer::Offsets;
use fancy_regex::Regex;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use tokenizers::{Model, ModelWrapper};

/// GPT-2's expression, which `ByteLevel` splits by.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// LIMIT: pieces that a thread remembers, and their length; longer ones rarely come again.
const PIECES_MAX: usize = 100_000;
const PIECE_BYTES_MAX: usize = 64;

/// A token of a piece, with the bytes of the piece that it stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    id: u32,
    from: u32,
    to: u32,
    /// Spaces that its text begins and ends with.
    before: u16,
    after: u16,
}

/// How the post-processor changes places: it takes the spaces off.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Trim {
    /// A first token keeps one space, since the tokenizer may have put it there.
    keeps_first: bool,
}

/// A tokenizer of the common kind.
pub(super) struct Words {
    /// Tells tokenizers apart in a thread's memory.
    number: u64,
    /// Added tokens that are looked for first, and those that are looked for in what is left.
    added: [Option<Added>; 2],
    pieces: Regex,
    trim: Option<Trim>,
}

/// Added tokens as one expression, the longest first, and their ids.
struct Added {
    pattern: regex::Regex,
    ids: HashMap<String, u32>,
}

/// The number of a tokenizer, and what its pieces become.
type Known = (u64, HashMap<Box<str>, Box<[Part]>>);

thread_local! {
    /// The pieces of the tokenizer that this thread used last.
    static KNOWN: RefCell<Known> = RefCell::default();
}

impl Words {
    /// `None`: the tokenizer is of another kind.
    pub fn of(inner: &tokenizers::Tokenizer) -> Option<Words> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let parts = |value: serde_json::Result<Value>| value.ok();
        if inner.get_normalizer().is_some() || !plain_bpe(inner.get_model()) {
            return None;
        }
        let splits = parts(serde_json::to_value(inner.get_pre_tokenizer()?))?;
        let pieces = Regex::new(&expression(&splits)?).ok()?;
        let trim = match inner.get_post_processor() {
            None => None,
            Some(processor) => trim(&parts(serde_json::to_value(processor))?)?,
        };
        let words =
            Words { number: NUMBER.fetch_add(1, Ordering::Relaxed), added: added(inner)?, pieces, trim };
        words.agrees(inner).then_some(words)
    }

    /// Ids, and the bytes of `text` that they stand for. `None`: the library must do it.
    pub fn spans(&self, inner: &tokenizers::Tokenizer, text: &str) -> Option<(Vec<u32>, Offsets)> {
        let mut out = (Vec::with_capacity(text.len() / 3), Vec::with_capacity(text.len() / 3));
        self.walk(inner, text, &mut |part, from, to| {
            let (from, to) = self.trimmed(part, from, to, out.0.is_empty());
            out.0.push(part.id);
            out.1.push((from, to));
        })?;
        Some(out)
    }

    /// Ids alone. `None`: the library must do it.
    pub fn ids(&self, inner: &tokenizers::Tokenizer, text: &str) -> Option<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.walk(inner, text, &mut |part, _, _| ids.push(part.id))?;
        Some(ids)
    }

    /// A few texts that differ in everything that matters come out the same.
    fn agrees(&self, inner: &tokenizers::Tokenizer) -> bool {
        const PROBES: [&str; 8] = [
            "",
            "Hello, world! I'll say it's 1234567 times.",
            "  two  spaces\n\n\tand   lines \r\n ",
            "Größe 日本語 العربية 👩‍👩‍👧 e\u{301}\u{a0}x\u{85}y\u{200b}",
            "DON'T'VE don'T 'quoted' don’t ʼn",
            "<|end|><|user|> <s></s> <|im_end|>\n<|eot_id|>",
            "a_b-c/d.e:f;g(h)[i]{j}=k+l*m&n%o$p#q@r!s?t^u~v|w\\x`y\"z",
            "½ ² Ⅷ ٣٤٥ १२३ 1.5e-10 0xff",
        ];
        PROBES.iter().all(|text| self.spans(inner, text) == library(inner, text))
    }

    /// Hands on each token with the bytes of `text` it stands for, grown to whole characters.
    fn walk(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        each: &mut dyn FnMut(&Part, usize, usize),
    ) -> Option<()> {
        KNOWN.with_borrow_mut(|(number, known)| {
            if *number != self.number {
                (*number, *known) = (self.number, HashMap::new());
            }
            self.between(0, text, 0, &mut |start, end, id| match id {
                Some(id) => {
                    let (before, after) = spaces(&text[start..end]);
                    each(&Part { id, from: 0, to: 0, before, after }, start, end);
                    Some(())
                }
                None => self.pieces(&text[start..end], &mut |from, to| {
                    let (from, to) = (start + from, start + to);
                    let piece = &text[from..to];
                    if let Some(parts) = known.get(piece) {
                        parts.iter().for_each(|part| place(text, from, part, each));
                        return Some(());
                    }
                    let parts = parts(inner.get_model(), piece)?;
                    parts.iter().for_each(|part| place(text, from, part, each));
                    if piece.len() <= PIECE_BYTES_MAX && known.len() < PIECES_MAX {
                        known.insert(piece.into(), parts);
                    }
                    Some(())
                }),
            })
        })
    }

    /// Divides at added tokens: those of the first kind, then, in what is left, those of the second.
    fn between(
        &self,
        kind: usize,
        text: &str,
        base: usize,
        each: &mut dyn FnMut(usize, usize, Option<u32>) -> Option<()>,
    ) -> Option<()> {
        let Some(added) = self.added.get(kind) else {
            return if text.is_empty() { Some(()) } else { each(base, base + text.len(), None) };
        };
        let mut at = 0;
        for found in added.iter().flat_map(|added| added.pattern.find_iter(text)) {
            self.between(kind + 1, &text[at..found.start()], base + at, each)?;
            let id = added.as_ref().and_then(|added| added.ids.get(found.as_str()))?;
            each(base + found.start(), base + found.end(), Some(*id))?;
            at = found.end();
        }
        self.between(kind + 1, &text[at..], base + at, each)
    }

    /// Divides by the expression; what it does not match is a piece too.
    fn pieces(&self, text: &str, each: &mut dyn FnMut(usize, usize) -> Option<()>) -> Option<()> {
        let mut at = 0;
        for found in self.pieces.find_iter(text) {
            let found = found.ok()?;
            if at < found.start() {
                each(at, found.start())?;
            }
            if found.start() < found.end() {
                each(found.start(), found.end())?;
            }
            at = found.end();
        }
        if at < text.len() { each(at, text.len()) } else { Some(()) }
    }

    fn trimmed(&self, part: &Part, mut from: usize, mut to: usize, is_first: bool) -> (usize, usize) {
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

/// A token's bytes in the text, grown to whole characters as the library does.
fn place(text: &str, base: usize, part: &Part, each: &mut dyn FnMut(&Part, usize, usize)) {
    let from = text.floor_char_boundary(base + part.from as usize);
    let to = text.ceil_char_boundary(base + part.to as usize);
    each(part, from, to);
}

/// What the library gives.
fn library(inner: &tokenizers::Tokenizer, text: &str) -> Option<(Vec<u32>, Offsets)> {
    let encoding = inner.encode(text, false).ok()?;
    Some((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
}

/// The tokens of one piece, by the library's model.
fn parts(model: &ModelWrapper, piece: &str) -> Option<Box<[Part]>> {
    let mut letters = String::with_capacity(2 * piece.len());
    // For each byte of the letters, the byte of the piece.
    let mut bytes = Vec::with_capacity(2 * piece.len() + 1);
    for (at, byte) in piece.bytes().enumerate() {
        let letter = super::tokenizer::letter_of(byte);
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

/// Spaces at both ends of a token's text, in either form.
fn spaces(token: &str) -> (u16, u16) {
    let is_space = |c: &char| *c == 'Ġ' || c.is_whitespace();
    let count = |count: usize| u16::try_from(count).unwrap_or(u16::MAX);
    (
        count(token.chars().take_while(is_space).count()),
        count(token.chars().rev().take_while(is_space).count()),
    )
}

/// Whether the model is BPE over bytes, without chance, marks of words or a form for bytes that it does not know.
fn plain_bpe(model: &ModelWrapper) -> bool {
    let ModelWrapper::BPE(bpe) = model else { return false };
    let is_empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    bpe.dropout.is_none_or(|dropout| dropout == 0.0)
        && is_empty(&bpe.continuing_subword_prefix)
        && is_empty(&bpe.end_of_word_suffix)
        && bpe.unk_token.is_none()
        && !bpe.byte_fallback
}

/// The expression that a pre-tokenizer splits by, if it splits once and then takes bytes.
fn expression(splits: &Value) -> Option<String> {
    let kind = |value: &Value| value["type"].as_str().map(str::to_owned);
    let bytes = |value: &Value, use_regex: bool| {
        kind(value).as_deref() == Some("ByteLevel")
            && value["add_prefix_space"] == false
            && value["use_regex"].as_bool().unwrap_or(true) == use_regex
    };
    if bytes(splits, true) {
        return Some(GPT2.to_owned());
    }
    let [split, last] = splits["pretokenizers"].as_array()?.as_slice() else { return None };
    let isolates = kind(split).as_deref() == Some("Split")
        && split["behavior"] == "Isolated"
        && split["invert"] == false;
    let expression = split["pattern"]["Regex"].as_str()?;
    (kind(splits).as_deref() == Some("Sequence") && isolates && bytes(last, false))
        .then(|| expression.to_owned())
}

/// How a post-processor changes places; `None`: in a way that is not known here.
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

/// Added tokens of both kinds; `None`: one of them takes what stands around it.
fn added(inner: &tokenizers::Tokenizer) -> Option<[Option<Added>; 2]> {
    let mut kinds: [Vec<(String, u32)>; 2] = Default::default();
    for (id, token) in inner.get_added_tokens_decoder() {
        if token.single_word || token.lstrip || token.rstrip || token.content.is_empty() {
            return None;
        }
        kinds[usize::from(token.normalized)].push((token.content, id));
    }
    let made = kinds.map(|mut tokens| {
        // The longest of those that begin at one place is taken.
        tokens.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then(a.cmp(b)));
        let pattern: Vec<String> = tokens.iter().map(|(text, _)| regex::escape(text)).collect();
        match tokens.is_empty() {
            true => Some(None),
            false => regex::Regex::new(&pattern.join("|"))
                .ok()
                .map(|pattern| Some(Added { pattern, ids: tokens.into_iter().collect() })),
        }
    });
    let [first, second] = made;
    Some([first?, second?])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts of random characters from what makes tokenizers differ, and of the tokenizer's own tokens.
    fn text(random: &mut impl FnMut(usize) -> usize, tokens: &[String]) -> String {
        const PARTS: [&str; 34] = [
            " ",
            "  ",
            "\n",
            "\n\n",
            "\r\n",
            "\t",
            "a",
            "The",
            " the",
            "ing",
            "'s",
            "'LL",
            "'",
            "1",
            "234",
            "ß",
            "é",
            "e\u{301}",
            "日本",
            "語",
            "ع",
            "👩‍👧",
            "\u{a0}",
            "\u{85}",
            "\u{200b}",
            ".",
            ",",
            "...",
            "!?",
            "_",
            "-",
            "(",
            "½",
            "\u{0}",
        ];
        (0..random(40))
            .map(|_| match random(8) {
                0 if !tokens.is_empty() => tokens[random(tokens.len())].clone(),
                _ => PARTS[random(PARTS.len())].to_owned(),
            })
            .collect()
    }

    #[test]
    fn tokens_and_places_are_the_librarys() {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let mut state = 7_u64;
        let mut random = |bound: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % bound
        };
        let mut fast = Vec::new();
        let mut folders: Vec<_> =
            std::fs::read_dir(&golden).unwrap().map(|entry| entry.unwrap().path()).collect();
        folders.sort();
        for folder in folders.iter().filter(|folder| folder.join("model/tokenizer.json").is_file()) {
            let name = folder.file_name().unwrap().to_str().unwrap();
            let file = folder.join("model/tokenizer.json");
            let Ok(mut inner) = tokenizers::Tokenizer::from_file(file) else { panic!("{name}") };
            let special: Vec<String> =
                inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
            for trims in [None, Some(true), Some(false)] {
                if let Some(prefix) = trims {
                    let bytes = tokenizers::processors::byte_level::ByteLevel::new(prefix, true, true);
                    inner.with_post_processor(Some(bytes));
                }
                let Some(words) = Words::of(&inner) else { continue };
                fast.push(name.to_owned());
                for _ in 0..400 {
                    let text = text(&mut random, &special);
                    let expected = library(&inner, &text);
                    assert_eq!(words.spans(&inner, &text), expected, "{name}, {trims:?}: {text:?}");
                    assert_eq!(words.ids(&inner, &text), expected.map(|(ids, _)| ids), "{name}: {text:?}");
                }
            }
        }
        fast.dedup();
        assert!(fast.len() >= 4, "of the common kind are {fast:?}");
    }

    #[test]
    fn other_kinds_are_left_to_the_library() {
        let of = |change: &dyn Fn(&mut Value)| {
            let mut json = serde_json::json!({
                "version": "1.0", "added_tokens": [{"id": 4, "content": "<e>", "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true}],
                "normalizer": null, "post_processor": null, "decoder": null,
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3}, "merges": [["a", "b"]]},
            });
            change(&mut json);
            let inner = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
            let words = Words::of(&inner);
            words.map(|words| {
                let text = "ab b<e> ac a";
                assert_eq!(words.spans(&inner, text), library(&inner, text));
                words.ids(&inner, text).unwrap()
            })
        };
        assert_eq!(of(&|_| {}), Some(vec![3, 2, 1, 4, 2, 0, 2, 0]), "letters without a token leave none");
        type Change<'a> = (&'a str, &'a dyn Fn(&mut Value));
        let changes: [Change; 7] = [
            ("normalizer", &|json| json["normalizer"] = serde_json::json!({"type": "NFC"})),
            ("prefix", &|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()),
            ("no split", &|json| json["pre_tokenizer"]["use_regex"] = false.into()),
            ("spaces around", &|json| json["added_tokens"][0]["rstrip"] = true.into()),
            ("words", &|json| json["added_tokens"][0]["single_word"] = true.into()),
            ("unknown", &|json| json["model"]["unk_token"] = "a".into()),
            ("dropout", &|json| json["model"]["dropout"] = 0.1.into()),
        ];
        for (what, change) in changes {
            assert_eq!(of(change), None, "{what}");
        }
    }
}
