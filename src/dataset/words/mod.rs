//! A BPE tokenizer -> the same tokens and places as the library's. The tokens of words are remembered.
//!
//! The library keeps the place of every byte through each of its steps, which costs more than the tokens do. Most
//! tokenizers in use need none of that: they split a text at added tokens, the rest falls into pieces that become
//! tokens each on its own, and places are sums of lengths. Here a piece's tokens come from the library's own model,
//! once for each piece. Two kinds are known: `byte_level` and `sentence_piece`. A tokenizer with anything else in it
//! (another normalizer, other splits) has no `Words`, and the library does all of the work.

mod added;
mod byte_level;
mod part;
mod sentence_piece;

use self::added::Added;
use self::byte_level::ByteLevel;
use self::part::Part;
use self::sentence_piece::SentencePiece;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use tokenizers::NormalizerWrapper;
use unicode_normalization::{IsNormalized, is_nfc_quick};

/// LIMIT: pieces that a thread remembers, and their length; longer ones rarely come again.
const PIECES_MAX: usize = 100_000;
const PIECE_BYTES_MAX: usize = 64;

/// For each token, the bytes of the text that it stands for: (start, end).
pub(super) type Offsets = Vec<(usize, usize)>;

/// A tokenizer of a known kind.
pub(super) struct Words {
    /// Tells tokenizers apart in a thread's memory.
    number: u64,
    /// Added tokens that are searched for first, and those that are searched for in the remaining text.
    added: [Option<Added>; 2],
    kind: Kind,
    /// Whether the normalizer composes characters (NFC). A text that it would change is left to the library.
    composes: bool,
}

enum Kind {
    ByteLevel(ByteLevel),
    SentencePiece(SentencePiece),
}

/// The tokens of pieces: those with a mark before them, and the others.
#[derive(Default)]
struct Known {
    /// The tokenizer's number.
    number: u64,
    plain: HashMap<Box<str>, Box<[Part]>>,
    prefixed: HashMap<Box<str>, Box<[Part]>>,
}

thread_local! {
    /// The pieces of the tokenizer that this thread used last.
    static KNOWN: RefCell<Known> = RefCell::default();
}

impl Words {
    /// Returns `None` if the tokenizer is of another kind.
    pub fn of(inner: &tokenizers::Tokenizer) -> Option<Words> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let composes = matches!(inner.get_normalizer(), Some(NormalizerWrapper::NFC(_)));
        let added = Added::of(inner)?;
        let normalized = added[1].as_ref();
        let kind = if composes || inner.get_normalizer().is_none() {
            let is_stable = normalized.is_none_or(|added| added.contents().all(is_composed));
            let byte_level = ByteLevel::of(inner).filter(|_| is_stable).map(Kind::ByteLevel);
            byte_level.or_else(|| SentencePiece::of(inner).map(Kind::SentencePiece))
        } else {
            // The normalizer would change tokens of the second kind, too.
            SentencePiece::of(inner).filter(|_| normalized.is_none()).map(Kind::SentencePiece)
        }?;
        let words = Words { number: NUMBER.fetch_add(1, Ordering::Relaxed), added, kind, composes };
        words.agrees(inner).then_some(words)
    }

    /// Returns ids, and the bytes of `text` that they stand for. `None`: the library must encode this text.
    pub fn spans(&self, inner: &tokenizers::Tokenizer, text: &str) -> Option<(Vec<u32>, Offsets)> {
        let mut out = (Vec::with_capacity(text.len() / 3), Vec::with_capacity(text.len() / 3));
        self.walk(inner, text, &mut |part, from, to| {
            let (from, to) = match &self.kind {
                Kind::ByteLevel(kind) => kind.trimmed(part, from, to, out.0.is_empty()),
                Kind::SentencePiece(_) => (from, to),
            };
            out.0.push(part.id);
            out.1.push((from, to));
        })?;
        Some(out)
    }

    /// Returns ids alone. `None`: the library must do it.
    pub fn ids(&self, inner: &tokenizers::Tokenizer, text: &str) -> Option<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.walk(inner, text, &mut |part, _, _| ids.push(part.id))?;
        Some(ids)
    }

    /// Returns a few texts that differ in everything that matters come out the same.
    fn agrees(&self, inner: &tokenizers::Tokenizer) -> bool {
        const PROBES: [&str; 8] = [
            "",
            "Hello, world! I'll say it's 1234567 times.",
            "  two  spaces\n\n\tand   lines \r\n ",
            "Größe 日本語 العربية 👩‍👩‍👧 \u{a0}x\u{85}y\u{200b}",
            "DON'T'VE don'T 'quoted' don’t ʼn",
            "<|end|><|user|> <s></s> <|im_end|>\n<|eot_id|>",
            "a_b-c/d.e:f;g(h)[i]{j}=k+l*m&n%o$p#q@r!s?t^u~v|w\\x`y\"z▁ ▁",
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
        if self.composes && !is_composed(text) {
            return None;
        }
        KNOWN.with_borrow_mut(|known| {
            if known.number != self.number {
                *known = Known { number: self.number, ..Known::default() };
            }
            self.between(text, &mut |start, end, token| match token {
                Some(token) => {
                    each(token, start, end);
                    Some(())
                }
                None => self.tokens(inner, text, (start, end), known, each),
            })
        })
    }

    /// Returns the tokens of a part without added tokens.
    fn tokens(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        (start, end): (usize, usize),
        known: &mut Known,
        each: &mut dyn FnMut(&Part, usize, usize),
    ) -> Option<()> {
        let part = &text[start..end];
        match &self.kind {
            Kind::ByteLevel(kind) => kind.pieces(part, &mut |from, to| {
                let (from, to) = (start + from, start + to);
                piece(&mut known.plain, text, (from, to), each, |piece| {
                    byte_level::parts(inner.get_model(), piece)
                })
            }),
            Kind::SentencePiece(kind) => {
                let is_prefixed = kind.is_prefixed(part, start == 0);
                kind.pieces(part, &mut |from, to| {
                    let is_prefixed = is_prefixed && from == 0;
                    let known = if is_prefixed { &mut known.prefixed } else { &mut known.plain };
                    piece(known, text, (start + from, start + to), each, |piece| {
                        sentence_piece::parts(inner.get_model(), piece, is_prefixed)
                    })
                })
            }
        }
    }

    /// Divides at added tokens: those of the first kind, then, in the remaining text, those of the second.
    fn between(&self, text: &str, each: &mut added::Each) -> Option<()> {
        let mut rest = |from: usize, to: usize, token: Option<&Part>| match (&self.added[1], token) {
            (Some(added), None) => {
                added.divide(&text[from..to], &mut |a, b, token| each(from + a, from + b, token))
            }
            _ => each(from, to, token),
        };
        match &self.added[0] {
            Some(added) => added.divide(text, &mut rest),
            None if text.is_empty() => Some(()),
            None => rest(0, text.len(), None),
        }
    }
}

/// Hands on the tokens of a piece, remembered or made.
fn piece(
    known: &mut HashMap<Box<str>, Box<[Part]>>,
    text: &str,
    (from, to): (usize, usize),
    each: &mut dyn FnMut(&Part, usize, usize),
    make: impl FnOnce(&str) -> Option<Box<[Part]>>,
) -> Option<()> {
    let piece = &text[from..to];
    if let Some(parts) = known.get(piece) {
        parts.iter().for_each(|part| place(text, from, part, each));
        return Some(());
    }
    let parts = make(piece)?;
    parts.iter().for_each(|part| place(text, from, part, each));
    if piece.len() <= PIECE_BYTES_MAX && known.len() < PIECES_MAX {
        known.insert(piece.into(), parts);
    }
    Some(())
}

/// Passes on a token's bytes in the text, grown to whole characters as the library does.
fn place(text: &str, base: usize, part: &Part, each: &mut dyn FnMut(&Part, usize, usize)) {
    let from = text.floor_char_boundary(base + part.from as usize);
    let to = text.ceil_char_boundary(base + part.to as usize);
    each(part, from, to);
}

/// Returns whether NFC would surely leave a text as it is.
fn is_composed(text: &str) -> bool {
    text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes
}

/// Returns the library's tokens.
fn library(inner: &tokenizers::Tokenizer, text: &str) -> Option<(Vec<u32>, Offsets)> {
    let encoding = inner.encode(text, false).ok()?;
    Some((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Returns a text of random characters that tokenizers treat differently, and of the tokenizer's own tokens.
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
                    if words.composes && !is_composed(&text) {
                        assert_eq!(words.spans(&inner, &text), None, "{name}: {text:?}");
                        continue;
                    }
                    assert_eq!(words.spans(&inner, &text), expected, "{name}, {trims:?}: {text:?}");
                    assert_eq!(words.ids(&inner, &text), expected.map(|(ids, _)| ids), "{name}: {text:?}");
                }
            }
        }
        fast.dedup();
        for name in ["gemma2", "granite", "llama3", "ministral", "phi2", "phi3", "phi4mini"] {
            assert!(fast.iter().any(|fast| fast == name), "{name} is not among {fast:?}");
        }
    }

    /// SentencePiece's forms: the component that writes marks, their places, tokens that take spaces, line breaks that
    /// are joined or not.
    #[test]
    fn sentence_piece_in_each_of_its_forms() {
        let mut vocabulary: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        vocabulary.extend((0..=255).map(|byte: u8| format!("<{byte:#04X}>")));
        vocabulary.extend("▁aTheing'sLé日.,\n".chars().map(String::from));
        let merges = [
            ("▁", "▁"),
            ("▁▁", "▁▁"),
            ("T", "h"),
            ("Th", "e"),
            ("▁", "The"),
            ("i", "n"),
            ("in", "g"),
            ("▁▁", "a"),
            ("'", "s"),
        ];
        vocabulary.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
        let made = |normalizer: Value, splits: Value, joins_breaks: bool, normalized: bool| {
            let mut vocabulary = vocabulary.clone();
            let mut merges: Vec<[String; 2]> =
                merges.iter().map(|(a, b)| [a.to_string(), b.to_string()]).collect();
            if joins_breaks {
                vocabulary.push(",\n".into());
                merges.push([",".into(), "\n".into()]);
            }
            let vocab: serde_json::Map<String, Value> =
                vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
            let token = |id: usize, content: &str, left: bool, right: bool, normalized: bool| {
                serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": left, "rstrip": right,
                    "normalized": normalized, "special": true})
            };
            let added = [
                token(1, "<s>", false, false, false),
                token(2, "</s>", false, true, false),
                token(900, "<|left|>", true, false, false),
                token(901, "<|later|>", false, false, normalized),
            ];
            let json = serde_json::json!({
                "version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": splits,
                "post_processor": null, "decoder": null,
                "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                    "vocab": vocab, "merges": merges},
            });
            tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
        };
        let replace = serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let prepend = serde_json::json!({"type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace.clone()]});
        let metaspace = |scheme: &str, split: bool| serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
        let gemma = serde_json::json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
            "invert": false});
        let forms = [
            (prepend.clone(), Value::Null, false),
            (replace.clone(), gemma, false),
            (replace.clone(), Value::Null, false),
            (Value::Null, metaspace("first", false), true),
            (Value::Null, metaspace("always", false), true),
            (Value::Null, metaspace("never", false), true),
        ];
        let mut state = 11_u64;
        let mut random = |bound: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % bound
        };
        let tokens =
            ["<s>", "</s>", "<|left|>", "<|later|>", "▁", "▁The", ",\n", "  a", " "].map(str::to_owned);
        for (normalizer, splits, normalized) in forms {
            for joins_breaks in [false, true] {
                let inner = made(normalizer.clone(), splits.clone(), joins_breaks, normalized);
                let words = Words::of(&inner).unwrap_or_else(|| panic!("{normalizer} {splits}"));
                for _ in 0..1000 {
                    let text = text(&mut random, &tokens);
                    let expected = library(&inner, &text);
                    assert_eq!(words.spans(&inner, &text), expected, "{normalizer} {splits}: {text:?}");
                    assert_eq!(words.ids(&inner, &text), expected.map(|(ids, _)| ids), "{splits}: {text:?}");
                }
            }
        }
        let left = |normalizer: &Value, splits: Value, normalized| {
            assert!(
                Words::of(&made(normalizer.clone(), splits.clone(), false, normalized)).is_none(),
                "{splits}"
            );
        };
        left(&prepend, Value::Null, true);
        left(&Value::Null, metaspace("first", true), false);
        left(&replace, metaspace("first", false), false);
        left(&serde_json::json!({"type": "Lowercase"}), Value::Null, false);
    }

    /// A text that NFC changes is left to the library; any other is not.
    #[test]
    fn composed_texts_need_no_normalizer() {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite/model");
        let inner = tokenizers::Tokenizer::from_file(golden.join("tokenizer.json")).unwrap();
        assert!(matches!(inner.get_normalizer(), Some(NormalizerWrapper::NFC(_))));
        let words = Words::of(&inner).unwrap();
        for (text, is_composed) in
            [("Größe 日本語 é", true), ("e\u{301}", false), ("\u{1100}\u{1161}", false)]
        {
            let expected = library(&inner, text).filter(|_| is_composed);
            assert_eq!(words.spans(&inner, text), expected, "{text}");
        }
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
        let changes: [Change; 6] = [
            ("normalizer", &|json| json["normalizer"] = serde_json::json!({"type": "NFKC"})),
            ("prefix", &|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()),
            ("no split", &|json| json["pre_tokenizer"]["use_regex"] = false.into()),
            ("words", &|json| json["added_tokens"][0]["single_word"] = true.into()),
            ("unknown", &|json| json["model"]["unk_token"] = "a".into()),
            ("dropout", &|json| json["model"]["dropout"] = 0.1.into()),
        ];
        for (what, change) in changes {
            assert_eq!(of(change), None, "{what}");
        }
    }
}
