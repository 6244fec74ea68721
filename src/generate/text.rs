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
    /// Returns a decoder of a new text. With `skip_special`, control tokens leave no text.
    pub fn new(skip_special: bool) -> Detokenizer {
        Detokenizer { ids: Vec::new(), start: 0, written: 0, known: String::new(), skip_special }
    }

    /// Sets the tokens that stand before the text. They decide how the next token begins, and are not written.
    pub fn after(mut self, tokenizer: &Tokenizer, ids: &[u32]) -> Detokenizer {
        self.ids = ids[ids.len().saturating_sub(WAITING_MAX)..].to_vec();
        self.written = self.ids.len();
        self.known = tokenizer.decode(&self.ids, self.skip_special);
        self
    }

    /// Returns the text that is certain with this token.
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

    /// Adds a token with this text instead of the tokenizer's.
    pub fn whole(&mut self, text: &str, id: u32) -> String {
        self.ids.push(id);
        (self.start, self.written) = (self.ids.len(), self.ids.len());
        self.known.clear();
        text.to_owned()
    }

    /// Returns the text that still waits, unchanged.
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
    /// Bytes of `held` in which no stop string may end.
    free: usize,
}

/// The text that may be shown, and the stop string that ended it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shown {
    /// Text that may be shown now.
    pub text: String,
    /// The stop string behind the text, which it ended.
    pub stop: Option<String>,
}

impl Stops {
    /// Looks for these strings.
    pub fn new(strings: Vec<String>) -> Stops {
        Stops { strings, held: String::new(), free: 0 }
    }

    /// Adds text, and returns the text that may be shown. The first stop string ends it and is not shown itself.
    pub fn push(&mut self, text: &str) -> Shown {
        self.held.push_str(text);
        let found = |stop: &String| Some((self.find(stop)?, stop.clone()));
        let first = self.strings.iter().filter_map(found).min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = first {
            self.held.truncate(at);
            return Shown { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let waits = self.strings.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - waits);
        self.free = self.free.saturating_sub(self.held.len());
        Shown { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// Returns the same for text in which no stop string may end: `min_tokens` asks for more. One that begins in it
    /// counts.
    pub fn push_free(&mut self, text: &str) -> Shown {
        self.free = self.held.len() + text.len();
        self.push(text)
    }

    /// Returns the place of a stop string that ends behind the free text.
    fn find(&self, stop: &str) -> Option<usize> {
        let start = self.free.saturating_sub(stop.len().saturating_sub(1));
        let start = (start..=self.held.len()).find(|&at| self.held.is_char_boundary(at))?;
        let text = &self.held[start..];
        // `find` looks at all of what it is to find first, and a stop string may be very long.
        if text.len() < stop.len() {
            return None;
        }
        text.find(stop).map(|at| start + at)
    }

    /// Returns the text that was held back until the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Returns the number of bytes at the end of `text` that begin `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let most = stop.len().saturating_sub(1).min(text.len());
    (1..=most).rev().find(|&length| text.as_bytes().ends_with(&stop.as_bytes()[..length])).unwrap_or(0)
}

/// Returns a token's name in lists of log-probabilities: its text, or its bytes if they are no text by themselves.
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
            if now.stop.is_some() {
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

    /// The earliest one ends the text, and of two at one place the first of the list.
    #[test]
    fn the_stop_string_is_named() {
        let stop = |stops: &[&str], text: &str| {
            let mut stops = Stops::new(stops.iter().map(|stop| stop.to_string()).collect());
            stops.push(text).stop
        };
        assert_eq!(stop(&["c", "b"], "abc").as_deref(), Some("b"));
        assert_eq!(stop(&["bc", "b"], "abc").as_deref(), Some("bc"));
        assert_eq!(stop(&["x"], "abc"), None);
    }

    /// Stop strings of megabytes cost a token no more than short ones.
    #[test]
    fn a_long_stop_string_delays_nobody() {
        let mut stops = Stops::new(vec!["ab".repeat(2 << 20); 16]);
        let begun = std::time::Instant::now();
        let text: String = (0..2000).map(|_| stops.push("say aba").text).collect();
        assert_eq!(text + &stops.finish(), "say aba".repeat(2000));
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    }

    #[test]
    fn no_stop_string_ends_in_the_text_that_is_asked_for_anyway() {
        let run = |stop: &str, free: &[&str], then: &str| {
            let mut stops = Stops::new(vec![stop.to_owned()]);
            let mut text: String = free.iter().map(|part| stops.push_free(part).text).collect();
            let last = stops.push(then);
            text += &last.text;
            (text, last.stop.is_some())
        };
        assert_eq!(run("b", &["ab", "b"], "cb"), ("abbc".into(), true));
        assert_eq!(run("bc", &["abc", "ab"], "cd"), ("abca".into(), true));
        assert_eq!(run("bc", &["abc"], "d"), ("abcd".into(), false));
        assert_eq!(run("aa", &["aa"], "a"), ("a".into(), true));
        assert_eq!(run("\u{e9}b", &["\u{e9}b\u{e9}"], "b"), ("\u{e9}b".into(), true));
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
