//! Messages with invisible marks -> the place of each message in the text that a template makes of them.
//!
//! A mark is a few characters of Unicode's private use area that no text contains. Marks surround everything that a
//! message says, inside its white space and outside the tags of thoughts, so that templates which trim or split
//! behave the same. If the text without its marks equals the text of the plain messages, the marks give every place
//! exactly. If not, the template inspects the content, and the marks are not used.

use super::Message;
use serde_json::Value as Json;
use std::ops::Range;

/// Begins a mark. Three more characters follow: message, piece, and which end it is.
const MARK: char = '\u{10f0f0}';
const BEGIN: char = '\u{10f0f1}';
const END: char = '\u{10f0f2}';
/// The character for number 0.
const ZERO: u32 = 0xf_2000;
/// Number of messages and pieces that have a character.
const NUMBERS: usize = 0x8000;

/// Tags around thoughts. Templates search for them.
const TAGS: [&str; 6] = ["<think>", "</think>", "<thought>", "</thought>", "[THINK]", "[/THINK]"];
/// Fields of a message that hold thoughts.
pub(super) const THOUGHTS: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];

/// The ends of a piece that are marked. Some templates inspect the beginning of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ends {
    /// Both ends.
    Both,
    /// The last end only.
    Last,
    /// The first end only.
    First,
}

/// The part of a message that a piece belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The message's content.
    Content,
    /// The message's thoughts.
    Thoughts,
    /// The message's calls of functions.
    Calls,
}

/// The place of a piece of a message in the text without marks.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Place {
    /// Index of the message.
    pub message: usize,
    /// The part of the message.
    pub part: Part,
    piece: usize,
    /// The text from the first mark to the last; empty if only one end was marked.
    pub range: Range<usize>,
}

/// Returns the messages with marks. Each mark is used once. `None`: there are too many messages, or one contains a
/// mark already.
pub(super) fn marked(messages: &[Message], ends: Ends) -> Option<Vec<Message>> {
    if messages.len() > NUMBERS || messages.iter().any(holds_marks) {
        return None;
    }
    Some(messages.iter().enumerate().map(|(index, message)| mark(message, index, ends)).collect())
}

fn holds_marks(message: &Message) -> bool {
    message.text().contains(MARK) || message.extra.iter().any(|(_, value)| value.to_string().contains(MARK))
}

/// Marks a message of the assistant; other roles are not searched for.
fn mark(message: &Message, index: usize, ends: Ends) -> Message {
    let mut message = message.clone();
    if message.role != "assistant" {
        return message;
    }
    let mut pieces = Pieces { message: index, next: [0; 3], ends };
    message.content = message.content.map(|content| pieces.text(&content, Part::Content));
    for (name, value) in &mut message.extra {
        match value {
            Json::String(text) if THOUGHTS.contains(name) => *text = pieces.text(text, Part::Thoughts),
            Json::Array(calls) if *name == "tool_calls" => {
                calls.iter_mut().for_each(|call| pieces.call(call))
            }
            _ => {}
        }
    }
    message
}

struct Pieces {
    message: usize,
    next: [usize; 3],
    ends: Ends,
}

impl Pieces {
    /// Marks the text between the tags of thoughts.
    fn text(&mut self, text: &str, part: Part) -> String {
        let before = self.next;
        let mut out = String::with_capacity(text.len() + 64);
        let mut rest = text;
        loop {
            let found = TAGS.iter().filter_map(|tag| Some((rest.find(tag)?, *tag))).min_by_key(|(at, _)| *at);
            let Some((at, tag)) = found else { break };
            out += &self.piece(&rest[..at], part);
            out += tag;
            rest = &rest[at + tag.len()..];
        }
        out += &self.piece(rest, part);
        // A text that consists of tags only is marked as a whole.
        if self.next == before { self.piece(text, part) } else { out }
    }

    fn piece(&mut self, text: &str, part: Part) -> String {
        let core = text.trim();
        if core.is_empty() || self.next[part as usize] >= NUMBERS / 4 {
            return text.to_owned();
        }
        let number = part as usize * (NUMBERS / 4) + self.next[part as usize];
        self.next[part as usize] += 1;
        let before = &text[..text.len() - text.trim_start().len()];
        let after = &text[text.trim_end().len()..];
        let one = |wanted: Ends, end| match self.ends == Ends::Both || self.ends == wanted {
            true => [MARK, character(self.message), character(number), end].iter().collect(),
            false => String::new(),
        };
        format!("{before}{}{core}{}{after}", one(Ends::First, BEGIN), one(Ends::Last, END))
    }

    /// Marks the name of a called function, which every template writes.
    fn call(&mut self, call: &mut Json) {
        let function = match call.get("function") {
            Some(Json::Object(_)) => &mut call["function"],
            _ => call,
        };
        if let Some(Json::String(name)) = function.get("name") {
            let name = self.piece(name, Part::Calls);
            function["name"] = name.into();
        }
    }
}

fn character(number: usize) -> char {
    char::from_u32(ZERO + number as u32).expect("below `NUMBERS`")
}

fn number(character: char) -> Option<usize> {
    let number = (character as u32).checked_sub(ZERO)? as usize;
    (number < NUMBERS).then_some(number)
}

/// Removes the marks. Returns the text and its places in order, or `None` if marks were damaged.
pub(super) fn cut(marked: &str) -> Option<(String, Vec<Place>)> {
    let mut text = String::with_capacity(marked.len());
    let mut places: Vec<Place> = Vec::new();
    let mut rest = marked;
    while let Some((before, after)) = rest.split_once(MARK) {
        text.push_str(before);
        let mut characters = after.chars();
        let (message, piece) = (number(characters.next()?)?, number(characters.next()?)?);
        let end = characters.next()?;
        rest = characters.as_str();
        let part = [Part::Content, Part::Thoughts, Part::Calls][(piece / (NUMBERS / 4)).min(2)];
        let known = places.iter_mut().rev().find(|place| (place.piece, place.message) == (piece, message));
        match (known, end) {
            // A piece that is written twice counts at its first place.
            (Some(place), END) if place.range.is_empty() => place.range.end = text.len(),
            (Some(_), _) => {}
            (None, BEGIN | END) => {
                places.push(Place { message, part, piece, range: text.len()..text.len() });
            }
            (None, _) => return None,
        }
    }
    text.push_str(rest);
    Some((text, places))
}

/// Joins places that were found by their first ends with those found by their last ends; `None` if they do not
/// match.
pub(super) fn joined(first: Vec<Place>, last: Vec<Place>) -> Option<Vec<Place>> {
    let whole = |place: Place| {
        let same = |other: &&Place| (other.message, other.piece) == (place.message, place.piece);
        let end = last.iter().find(same)?.range.end;
        (place.range.start <= end).then_some(Place { range: place.range.start..end, ..place })
    };
    first.into_iter().map(whole).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_stand_inside_white_space_and_outside_tags() {
        let message = Message::new("assistant", " <think>\nhm\n</think>\n\nFour \n");
        let user = Message::new("user", "2+2?");
        let marked = marked(&[user, message], Ends::Both).unwrap();
        assert_eq!(marked[0].text(), "2+2?");
        let (text, places) = cut(marked[1].text()).unwrap();
        assert_eq!(text, " <think>\nhm\n</think>\n\nFour \n");
        let said: Vec<&str> = places.iter().map(|place| &text[place.range.clone()]).collect();
        assert_eq!(said, ["hm", "Four"]);
        assert!(places.iter().all(|place| place.message == 1 && place.part == Part::Content));
        assert!(marked[1].text().contains("<think>\n") && marked[1].text().starts_with(" <think>"));
    }

    #[test]
    fn thoughts_and_calls_have_marks_of_their_own() {
        let mut message = Message::new("assistant", "x");
        message.extra.push(("reasoning_content", "why".into()));
        let calls = serde_json::json!([{"function": {"name": "f", "arguments": {}}}, {"name": "g"}]);
        message.extra.push(("tool_calls", calls));
        let marked = marked(&[message], Ends::Last).unwrap();
        let all = format!("{}{}{}", marked[0].text(), marked[0].extra[0].1, marked[0].extra[1].1);
        let (text, places) = cut(&all).unwrap();
        assert!(!text.contains(MARK));
        let parts: Vec<Part> = places.iter().map(|place| place.part).collect();
        assert_eq!(parts, [Part::Content, Part::Thoughts, Part::Calls, Part::Calls]);
    }

    #[test]
    fn a_text_that_holds_marks_is_not_marked() {
        assert!(marked(&[Message::new("user", MARK.to_string())], Ends::Both).is_none());
        assert!(cut(&format!("a{MARK}b")).is_none());
    }

    #[test]
    fn what_is_written_twice_counts_where_it_stands_first() {
        let marked = marked(&[Message::new("assistant", "a")], Ends::Both).unwrap();
        let (text, places) = cut(&format!("1{0}2{0}3", marked[0].text())).unwrap();
        assert_eq!((text.as_str(), places[0].range.clone(), places.len()), ("1a2a3", 1..2, 1));
    }
}
