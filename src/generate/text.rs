//! Tokens, one after another -> text: never a part of a character, and nothing of a stop string.

use crate::dataset::Tokenizer;

/// Tokens that may wait for the rest of a character. A character has at most 4 bytes, and so 4 tokens.
const WAITING_MAX: usize = 16;

/// Decodes a sequence as it grows.
pub struct Detokenizer {
    ids: Vec<u32>,
    /// The beginning of the text that is decoded again: tokenizers treat the first token of a text in their own way.
    start: usize,
    /// Up to here everything is written.
    written: usize,
    /// The text of `start..written`.
    known: String,
    skip_special: bool,
}

impl Detokenizer {
    /// `skip_special`: control tokens leave no text.
    pub fn new(skip_special: bool) -> Detokenizer {
        Detokenizer { ids: Vec::new(), start: 0, written: 0, known: String::new(), skip_special }
    }

    /// Tokens that stand before: they decide how the next begins and are not written.
    pub fn after(mut self, tokenizer: &Tokenizer, ids: &[u32]) -> Detokenizer {
        self.ids = ids[ids.len().saturating_sub(WAITING_MAX)..].to_vec();
        self.written = self.ids.len();
        self.known = tokenizer.decode(&self.ids, self.skip_special);
        self
    }

    /// The text that is certain with this token.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids[self.start..], self.skip_special);
        let whole = text.trim_end_matches('\u{fffd}');
        if whole.len() == text.len()
            && let Some(new) = text.strip_prefix(self.known.as_str())
        {
            let new = new.to_owned();
            self.start = if new.is_empty() { self.start } else { self.written };
            self.written = self.ids.len();
            self.known = tokenizer.decode(&self.ids[self.start..], self.skip_special);
            return new;
        }
        match self.ids.len() - self.written > WAITING_MAX {
            true => self.finish(tokenizer),
            false => String::new(),
        }
    }

    /// Adds a token whose text is this, whatever the tokenizer would make of it.
    pub fn whole(&mut self, text: &str, id: u32) -> String {
        self.ids.push(id);
        (self.start, self.written) = (self.ids.len(), self.ids.len());
        self.known.clear();
        text.to_owned()
    }

    /// The text that still waits, unchanged.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let text = tokenizer.decode(&self.ids[self.start..], self.skip_special);
        let new = match text.strip_prefix(self.known.as_str()) {
            Some(new) => new.to_owned(),
            None => tokenizer.decode(&self.ids[self.written..], self.skip_special),
        };
        (self.start, self.written) = (self.ids.len(), self.ids.len());
        self.known.clear();
        new
    }
}

/// Looks for stop strings in a text that grows, and holds back what may become one.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    strings: Vec<String>,
    held: String,
}

/// The text that may be shown, and whether a stop string ended it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shown {
    /// Text that may be shown now.
    pub text: String,
    /// Whether a stop string ended the text.
    pub stopped: bool,
}

impl Stops {
    /// Looks for these strings.
    pub fn new(strings: Vec<String>) -> Stops {
        Stops { strings, held: String::new() }
    }

    /// The first stop string that the text has ends it; it is not shown itself.
    pub fn push(&mut self, text: &str) -> Shown {
        self.held.push_str(text);
        let first = self.strings.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return Shown { text: std::mem::take(&mut self.held), stopped: true };
        }
        let waits = self.strings.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - waits);
        Shown { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text that was held back until the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that begin `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let most = stop.len().saturating_sub(1).min(text.len());
    (1..=most).rev().find(|&length| text.as_bytes().ends_with(&stop.as_bytes()[..length])).unwrap_or(0)
}

/// A token's name in lists of log-probabilities: its text, or its bytes where they are no text of their own.
pub fn token_name(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id);
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let hex = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        format!("bytes:{}", hex.collect::<String>())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(stops: &[&str], parts: &[&str]) -> (Vec<String>, String, bool) {
        let mut stops = Stops::new(stops.iter().map(|stop| stop.to_string()).collect());
        let mut shown = Vec::new();
        for part in parts {
            let now = stops.push(part);
            shown.push(now.text);
            if now.stopped {
                return (shown, String::new(), true);
            }
        }
        (shown, stops.finish(), false)
    }

    #[test]
    fn a_stop_string_is_never_shown_in_part() {
        let text = |list: &[&str]| list.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        assert_eq!(all(&["END"], &["a", "E", "N", "D", "x"]), (text(&["a", "", "", ""]), "".into(), true));
        assert_eq!(all(&["END"], &["aE", "NX"]), (text(&["a", "ENX"]), "".into(), false));
        assert_eq!(all(&["END"], &["EEN"]), (text(&["E"]), "EN".into(), false));
        assert_eq!(all(&["yz", "x"], &["ayxz"]), (text(&["ay"]), "".into(), true));
        assert_eq!(all(&["é!"], &["a\u{e9}", "?"]), (text(&["a", "é?"]), "".into(), false));
        assert_eq!(all(&["aab"], &["aa", "ab"]), (text(&["", "a"]), "".into(), true));
        assert_eq!(all(&[], &["a"]), (text(&["a"]), "".into(), false));
    }

    /// Every golden model's tokenizer: the parts together are the whole, and no part ends within a character.
    #[test]
    fn text_grows_by_whole_characters_on_every_tokenizer() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        let mut tried = 0;
        for entry in std::fs::read_dir(golden).unwrap() {
            let folder = entry.unwrap().path().join("model");
            if !folder.join("tokenizer.json").exists() {
                continue;
            }
            let tokenizer = Tokenizer::open(&folder).unwrap();
            for text in ["Grüße, 世界! 🙂🙃 naïve", " two  spaces\n\nlines", "🙂", "plain words here"]
            {
                let ids = tokenizer.encode(text, false).unwrap();
                let mut detokenizer = Detokenizer::new(false);
                let mut parts: Vec<String> = ids.iter().map(|&id| detokenizer.push(&tokenizer, id)).collect();
                parts.push(detokenizer.finish(&tokenizer));
                assert_eq!(parts.concat(), tokenizer.decode(&ids, false), "{}", folder.display());
                let whole = tokenizer.decode(&ids, false).contains('\u{fffd}');
                assert!(whole || parts.iter().all(|part| !part.contains('\u{fffd}')), "{parts:?}");
            }
            tried += 1;
        }
        assert!(tried > 10, "only {tried} tokenizers");
    }
}
