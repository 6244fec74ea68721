//! Added tokens of a tokenizer -> a text divided at them, as the library divides it.

use super::byte_level;
use super::part::Part;
use std::collections::HashMap;
use tokenizers::AddedToken;

/// Added tokens as one expression, the longest first.
pub(super) struct Added {
    pattern: regex::Regex,
    tokens: HashMap<String, AddedPart>,
}

/// Takes a part of a text: from, to, and the token if the part is an added one. `None` ends the division.
pub(super) type Each<'a> = dyn FnMut(usize, usize, Option<&Part>) -> Option<()> + 'a;

/// A token, and whether it takes the spaces around it.
#[derive(Clone, Copy)]
struct AddedPart {
    part: Part,
    left: bool,
    right: bool,
}

impl Added {
    /// Returns both kinds: those that are searched for first, and those that are searched for in the remaining text,
    /// after the normalizer. `None`: a token has a rule that this file does not follow, such as `single_word`.
    pub fn of(inner: &tokenizers::Tokenizer) -> Option<[Option<Added>; 2]> {
        let mut kinds: [Vec<(u32, AddedToken)>; 2] = Default::default();
        for (id, token) in inner.get_added_tokens_decoder() {
            kinds[usize::from(token.normalized)].push((id, token));
        }
        let [first, second] = kinds;
        Some([Added::one(first)?, Added::one(second)?])
    }

    /// Returns the tokens of one kind, if it has any.
    fn one(mut tokens: Vec<(u32, AddedToken)>) -> Option<Option<Added>> {
        if tokens.is_empty() {
            return Some(None);
        }
        let blank = |token: &AddedToken| token.content.trim() != token.content;
        let takes_spaces = tokens.iter().any(|(_, token)| token.lstrip || token.rstrip);
        let is_unfit = |(_, token): &(u32, AddedToken)| {
            token.single_word || token.content.is_empty() || (takes_spaces && blank(token))
        };
        if tokens.iter().any(is_unfit) {
            return None;
        }
        // The longest of those that begin at one place is taken.
        tokens
            .sort_by(|(_, a), (_, b)| b.content.len().cmp(&a.content.len()).then(a.content.cmp(&b.content)));
        let pattern: Vec<String> = tokens.iter().map(|(_, token)| regex::escape(&token.content)).collect();
        let pattern = regex::Regex::new(&pattern.join("|")).ok()?;
        let part = |(id, token): (u32, AddedToken)| {
            let (before, after) = byte_level::spaces(&token.content);
            let part = Part { id, from: 0, to: 0, before, after };
            (token.content, AddedPart { part, left: token.lstrip, right: token.rstrip })
        };
        Some(Some(Added { pattern, tokens: tokens.into_iter().map(part).collect() }))
    }

    /// Returns the texts of the tokens.
    pub fn contents(&self) -> impl Iterator<Item = &str> {
        self.tokens.keys().map(String::as_str)
    }

    /// Hands on the parts of a text in their order: from, to, and the token if the part is an added one.
    pub fn divide(&self, text: &str, each: &mut Each) -> Option<()> {
        let mut at = 0;
        for found in self.pattern.find_iter(text) {
            let token = self.tokens.get(found.as_str())?;
            let (mut from, mut to) = (found.start(), found.end());
            if token.left {
                from = text[..from].trim_end().len().max(at);
            }
            if token.right {
                to = text.len() - text[to..].trim_start().len();
            }
            if at < from {
                each(at, from, None)?;
            }
            each(from, to, Some(&token.part))?;
            at = to;
        }
        if at < text.len() { each(at, text.len(), None) } else { Some(()) }
    }
}
