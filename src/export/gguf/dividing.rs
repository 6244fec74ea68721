//! A tokenizer.json -> llama.cpp's name for how it divides text before merging, or why there is none.
//!
//! llama.cpp knows a fixed list of expressions by name (`tokenizer.ggml.pre`). A tokenizer is given a name only if
//! its parts are exactly those that the name stands for. Other tokenizers are refused: the model would read other
//! tokens than in training.

use serde_json::Value as Json;

/// Expression of GPT-4's tokenizer, with up to three digits in a token.
const THREE_DIGITS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with one digit in a token.
const ONE_DIGIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Expression of GPT-4o's tokenizer.
const CASES_AND_CONTRACTIONS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Expression of Mistral's Tekken tokenizer.
const CASES: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Falcon's expression for long numbers.
const TRIPLES: &str = "[0-9][0-9][0-9]";

/// A step of dividing text.
#[derive(Debug, PartialEq)]
enum Part {
    /// Pieces that an expression finds.
    Split(String),
    /// Bytes become letters; with `true`, after GPT-2's expression.
    Bytes(bool),
    /// Each digit alone, or (`false`) each number.
    Digits(bool),
    /// Runs of punctuation.
    Punctuation,
    /// Anything else.
    Other(String),
}

/// Returns llama.cpp's name for a byte-level tokenizer. Error: the part that it has no name for.
pub fn name(tokenizer: &Json) -> Result<&'static str, String> {
    let pre = &tokenizer["pre_tokenizer"];
    let parts: Vec<Part> = match pre["pretokenizers"].as_array() {
        Some(parts) => parts.iter().map(part).collect(),
        None => vec![part(pre)],
    };
    let joins_known_words = tokenizer["model"]["ignore_merges"].as_bool() == Some(true);
    let found = match parts.as_slice() {
        [Part::Split(expression), Part::Bytes(false)] => match (expression.as_str(), joins_known_words) {
            (THREE_DIGITS, true) => Some("llama-bpe"),
            (THREE_DIGITS, false) => Some("dbrx"),
            (ONE_DIGIT, false) => Some("qwen2"),
            (CASES_AND_CONTRACTIONS, false) => Some("gpt-4o"),
            // llama.cpp takes known words whole for this one; merging builds the same words.
            (CASES, _) => Some("tekken"),
            _ => None,
        },
        _ if joins_known_words => None,
        [Part::Bytes(true)] => Some("gpt-2"),
        [Part::Digits(true), Part::Bytes(true)] => Some("refact"),
        [Part::Punctuation, Part::Bytes(true), Part::Digits(false), Part::Split(triples)]
            if triples == TRIPLES =>
        {
            Some("falcon")
        }
        _ => None,
    };
    found.ok_or_else(|| {
        let merges = if joins_known_words { " with ignore_merges" } else { "" };
        format!("llama.cpp has no name for this tokenizer's pre_tokenizer{merges}: {}", short(pre))
    })
}

fn part(part: &Json) -> Part {
    let kept = match (part["behavior"].as_str(), part["invert"].as_bool()) {
        (Some("Isolated"), _) => true,
        // The matches are kept, and everything matches.
        (Some("Removed"), Some(true)) => true,
        _ => false,
    };
    match (part["type"].as_str(), part["pattern"]["Regex"].as_str()) {
        (Some("Split"), Some(expression)) if kept => Part::Split(expression.to_owned()),
        (Some("ByteLevel"), _) if part["add_prefix_space"].as_bool() != Some(true) => {
            Part::Bytes(part["use_regex"].as_bool() != Some(false))
        }
        (Some("Digits"), _) => Part::Digits(part["individual_digits"].as_bool() == Some(true)),
        (Some("Punctuation"), _) if part["behavior"] == "Contiguous" => Part::Punctuation,
        _ => Part::Other(part.to_string()),
    }
}

/// Returns the changes to a text that llama.cpp does not make before it divides it. Error: a normalizer that changes
/// more than the form of composed letters.
pub fn normalizer(tokenizer: &Json, pieces: bool) -> Result<Option<String>, String> {
    let normalizer = &tokenizer["normalizer"];
    let parts: Vec<&Json> = match normalizer["normalizers"].as_array() {
        Some(parts) => parts.iter().collect(),
        None if normalizer.is_null() => Vec::new(),
        None => vec![normalizer],
    };
    let mut warning = None;
    for part in parts {
        let blank = part["pattern"]["String"] == " " && part["content"] == "\u{2581}";
        match part["type"].as_str() {
            Some("NFC") => {
                warning = Some(
                    "the tokenizer composes letters and accents that were written apart (NFC); llama.cpp does \
                     not, so it reads such a text as other tokens"
                        .to_owned(),
                );
            }
            Some("Prepend") if pieces && part["prepend"] == "\u{2581}" => {}
            Some("Replace") if pieces && blank => {}
            _ => return Err(format!("llama.cpp does not have this tokenizer's normalizer: {}", short(part))),
        }
    }
    Ok(warning)
}

/// Checks that a tokenizer with blanks as letters divides text not at all, or before blanks. Error: it divides in
/// another way.
pub fn pieces(tokenizer: &Json) -> Result<(), String> {
    let pre = &tokenizer["pre_tokenizer"];
    let before_blanks = pre["type"] == "Split" && pre["pattern"]["String"] == " ";
    match pre.is_null() || pre["type"] == "Metaspace" || before_blanks {
        true => Ok(()),
        false => Err(format!("llama.cpp has no name for this tokenizer's pre_tokenizer: {}", short(pre))),
    }
}

/// Returns the first letters of a JSON text.
fn short(value: &Json) -> String {
    let text = value.to_string();
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bytes(regex: bool) -> Json {
        json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex})
    }

    fn of(parts: &[Json], ignore_merges: bool) -> Result<&'static str, String> {
        name(
            &json!({"model": {"ignore_merges": ignore_merges}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}),
        )
    }

    #[test]
    fn exactly_known_ways_have_a_name() {
        let split = |text: &str| json!({"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated"});
        let named = |text: &str, ignore| of(&[split(text), bytes(false)], ignore);
        assert_eq!(named(THREE_DIGITS, true), Ok("llama-bpe"));
        assert_eq!(named(THREE_DIGITS, false), Ok("dbrx"));
        assert_eq!(named(ONE_DIGIT, false), Ok("qwen2"));
        assert_eq!(named(CASES_AND_CONTRACTIONS, false), Ok("gpt-4o"));
        assert_eq!(named(CASES, true), Ok("tekken"));
        assert_eq!(name(&json!({"pre_tokenizer": bytes(true)})), Ok("gpt-2"));
        let digits = |alone: bool| json!({"type": "Digits", "individual_digits": alone});
        assert_eq!(of(&[digits(true), bytes(true)], false), Ok("refact"));
        // A little else is not the same.
        for (parts, ignore) in [
            (vec![split(r"\w+"), bytes(false)], false),
            (vec![split(&THREE_DIGITS.replace("{1,3}", "{1,2}")), bytes(false)], false),
            (vec![split(ONE_DIGIT), bytes(false)], true),
            (vec![split(ONE_DIGIT), bytes(true)], false),
            (vec![digits(false), bytes(true)], false),
            (vec![json!({"type": "Punctuation", "behavior": "Isolated"}), bytes(true)], false),
            (vec![json!({"type": "ByteLevel", "add_prefix_space": true})], false),
        ] {
            let error = of(&parts, ignore).unwrap_err();
            assert!(error.contains("llama.cpp has no name for"), "{error}");
        }
    }

    #[test]
    fn what_changes_a_text_is_told_or_refused() {
        let of = |normalizer: Json| super::normalizer(&json!({"normalizer": normalizer}), true);
        assert_eq!(of(Json::Null), Ok(None));
        assert!(of(json!({"type": "NFC"})).unwrap().unwrap().contains("NFC"));
        let blank = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
        let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
        assert_eq!(of(json!({"type": "Sequence", "normalizers": [prepend, blank]})), Ok(None));
        assert!(of(json!({"type": "Lowercase"})).unwrap_err().contains("Lowercase"));
    }
}
