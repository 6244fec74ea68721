//! tokenizer.json -> whether its steps are safe to run: they end, and do not make a huge text of a small one.
//!
//! A normalizer is a small program that runs over every text. A dozen replacements of `a` by `aa` turn one letter
//! into four thousand, a prefix of megabytes is put before each word, and a character map that lies about its size
//! reserves that size.

use serde::Deserialize;
use serde_json::Value;

/// LIMIT: growth of a text by all replacements together. Llama's turn one space into three bytes.
const GROWTH_MAX: u64 = 64;
/// LIMIT: bytes that are put before a text.
const PREFIX_BYTES_MAX: usize = 1024;
const STEPS_MAX: usize = 256;

/// The parts of tokenizer.json that are steps over a text.
#[derive(Deserialize)]
struct Steps {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    decoder: Option<Value>,
    post_processor: Option<Value>,
}

/// Checks the steps. The error names the harmful step.
pub(super) fn check(tokenizer: &[u8]) -> Result<(), String> {
    // The tokenizer's own parser gives better messages for a file that is not JSON or has another form.
    let Ok(steps) = serde_json::from_slice::<Steps>(tokenizer) else { return Ok(()) };
    for (name, step) in
        [("normalizer", steps.normalizer), ("pre_tokenizer", steps.pre_tokenizer), ("decoder", steps.decoder)]
    {
        let mut sum = Sum { growth: 1, steps: 0 };
        step.map_or(Ok(()), |step| sum.add(&step)).map_err(|what| format!("{name}: {what}"))?;
    }
    steps
        .post_processor
        .map_or(Ok(()), |step| described(&step))
        .map_err(|what| format!("post_processor: {what}"))
}

/// Checks that a template of special tokens describes each token that it names. Otherwise the library panics at the
/// first text.
fn described(step: &Value) -> Result<(), String> {
    step["processors"].as_array().into_iter().flatten().try_for_each(described)?;
    if step["type"] != "TemplateProcessing" {
        return Ok(());
    }
    let pieces = ["single", "pair"].into_iter().filter_map(|list| step[list].as_array()).flatten();
    let mut names = pieces.filter_map(|piece| piece["SpecialToken"]["id"].as_str());
    match names.find(|name| step["special_tokens"].get(name).is_none()) {
        Some(name) => Err(format!("its template names {name:?}, which is none of its special_tokens")),
        None => Ok(()),
    }
}

/// Sums over the steps so far.
struct Sum {
    growth: u64,
    steps: usize,
}

impl Sum {
    fn add(&mut self, step: &Value) -> Result<(), String> {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(format!("more than {STEPS_MAX} steps"));
        }
        for list in ["normalizers", "pretokenizers", "decoders"] {
            for step in step.get(list).and_then(Value::as_array).into_iter().flatten() {
                self.add(step)?;
            }
        }
        match step.get("type").and_then(Value::as_str) {
            Some("Replace") => self.replace(step),
            Some("Prepend") => prefix(step, "prepend"),
            Some("Metaspace") => prefix(step, "replacement"),
            Some("Precompiled") => character_map(step),
            _ => Ok(()),
        }
    }

    fn replace(&mut self, step: &Value) -> Result<(), String> {
        let content = step.get("content").and_then(Value::as_str).unwrap_or_default().len() as u64;
        let pattern = match step.get("pattern") {
            Some(pattern) if pattern.get("String").is_some() => {
                pattern["String"].as_str().unwrap_or_default()
            }
            // An expression may match a single byte.
            _ => "x",
        };
        if pattern.is_empty() {
            return Err("Replace of an empty text, which is everywhere".into());
        }
        self.growth = self.growth.saturating_mul(content.div_ceil(pattern.len() as u64).max(1));
        match self.growth <= GROWTH_MAX {
            true => Ok(()),
            false => Err(format!("its replacements make {} bytes of one, limit {GROWTH_MAX}", self.growth)),
        }
    }
}

fn prefix(step: &Value, key: &str) -> Result<(), String> {
    let bytes = step.get(key).and_then(Value::as_str).unwrap_or_default().len();
    match bytes <= PREFIX_BYTES_MAX {
        true => Ok(()),
        false => Err(format!("{key} of {bytes} bytes, limit {PREFIX_BYTES_MAX}")),
    }
}

/// Checks a character map, which is base64 of the length of a table, the table, and texts.
fn character_map(step: &Value) -> Result<(), String> {
    let map = step.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or_default();
    if map.is_empty() {
        return Ok(());
    }
    let bytes = map.len() as u64 / 4 * 3;
    let sextet = |letter: u8| match letter {
        b'A'..=b'Z' => Some(letter - b'A'),
        b'a'..=b'z' => Some(letter - b'a' + 26),
        b'0'..=b'9' => Some(letter - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let first: Option<Vec<u64>> = map.bytes().take(6).map(|letter| sextet(letter).map(u64::from)).collect();
    let Some(first) = first.filter(|first| first.len() == 6) else {
        return Err("precompiled_charsmap is no base64 of a map".into());
    };
    // 36 bits, of which the first 32 are a little-endian number.
    let bits = first.iter().fold(0u64, |bits, sextet| bits << 6 | sextet) >> 4;
    let table = u64::from((bits as u32).swap_bytes());
    match table.checked_add(4).is_some_and(|end| end <= bytes) && table % 4 == 0 {
        true => Ok(()),
        false => Err(format!("precompiled_charsmap promises a table of {table} bytes and has {bytes}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn normalizer(step: Value) -> Result<(), String> {
        check(json!({"normalizer": step, "pre_tokenizer": null, "model": {}}).to_string().as_bytes())
    }

    fn sequence(steps: Vec<Value>) -> Value {
        json!({"type": "Sequence", "normalizers": steps})
    }

    fn replace(pattern: Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn replacements_may_grow_a_text_a_little() {
        let double = || replace(json!({"String": "a"}), "aa");
        assert_eq!(normalizer(sequence((0..6).map(|_| double()).collect())), Ok(()));
        assert!(
            normalizer(sequence((0..7).map(|_| double()).collect()))
                .unwrap_err()
                .contains("128 bytes of one")
        );
        assert_eq!(normalizer(replace(json!({"String": " "}), "▁")), Ok(()));
        assert_eq!(normalizer(replace(json!({"Regex": "\\s+"}), &"x".repeat(64))), Ok(()));
        assert!(normalizer(replace(json!({"Regex": "\\s+"}), &"x".repeat(65))).is_err());
        assert!(normalizer(replace(json!({"String": ""}), "x")).unwrap_err().contains("empty"));
        assert!(normalizer(sequence(vec![sequence(vec![replace(json!({"String": ""}), "x")])])).is_err());
        assert!(normalizer(sequence(vec![json!({"type": "NFC"}); STEPS_MAX])).is_err());
        let decoder = json!({"decoder": {"type": "Sequence", "decoders": [replace(json!({"String": "a"}), &"b".repeat(99))]}});
        assert!(check(decoder.to_string().as_bytes()).unwrap_err().starts_with("decoder"));
    }

    #[test]
    fn a_template_describes_the_tokens_that_it_names() {
        let template = |list: &str, tokens: Value| {
            let mut step =
                json!({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": tokens});
            step[list] = json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
            step
        };
        let judged = |step: &Value| check(json!({"post_processor": step}).to_string().as_bytes());
        for list in ["single", "pair"] {
            let good = template(list, json!({"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}));
            let bad = template(list, json!({"</s>": {}}));
            let nested = json!({"type": "Sequence", "processors": [good.clone(), bad.clone()]});
            assert_eq!(judged(&good), Ok(()));
            assert!(judged(&bad).unwrap_err().starts_with("post_processor: its template names \"<s>\""));
            assert!(judged(&nested).is_err() && judged(&template(list, json!(null))).is_err());
        }
    }

    #[test]
    fn prefixes_and_maps_are_what_they_say() {
        let prepend = |bytes: usize| normalizer(json!({"type": "Prepend", "prepend": "x".repeat(bytes)}));
        assert_eq!((prepend(PREFIX_BYTES_MAX), prepend(PREFIX_BYTES_MAX + 1).is_err()), (Ok(()), true));
        let map = |base64: &str| normalizer(json!({"type": "Precompiled", "precompiled_charsmap": base64}));
        assert!(map("/////w==").unwrap_err().contains("4294967295 bytes"));
        // A table of four bytes and one byte of text.
        assert_eq!(map("BAAAAAEAAAAA"), Ok(()));
        assert!(map("CAAAAAEAAAAA").unwrap_err().contains("table of 8 bytes"));
        assert_eq!(map(""), Ok(()));
        assert!(map("%%").is_err());
    }
}
