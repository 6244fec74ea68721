//! The text of an answer, as it grows -> its content and the tool calls in it.
//!
//! Models write calls as text, each family in its own way: Hermes and Qwen `<tool_call>{...}</tool_call>`, Mistral
//! `[TOOL_CALLS][{...}]` or `[TOOL_CALLS]name[ARGS]{...}`, Granite and Phi `<|tool_call|>[{...}]`, Llama 3.1 a JSON
//! object that is the whole answer, perhaps behind `<|python_tag|>`. Text that only looks like a call stays
//! content: nothing is lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::error::{Error, Result};
use super::fields::Fields;

/// LIMIT: text of one group of calls; longer text is content.
const CALL_BYTES_MAX: usize = 1 << 20;
/// LIMIT: tools of one request.
const TOOLS_MAX: usize = 512;
/// The markers that begin calls and may end them.
const MARKERS: [(&str, &str); 5] = [
    ("<tool_call>", "</tool_call>"),
    ("[TOOL_CALLS]", ""),
    ("<|tool_call|>", "<|/tool_call|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    (LLAMA, "<|eom_id|>"),
];
const LLAMA: &str = "<|python_tag|>";
/// Characters between two calls: Llama writes a semicolon there.
const BETWEEN: [char; 5] = [';', ' ', '\n', '\t', '\r'];
/// Between the name and the arguments of Mistral's newer form.
const ARGUMENTS: &str = "[ARGS]";

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// 9 letters and digits, the form that Mistral's templates accept.
    pub id: String,
    /// Name of the function.
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// The part of an answer that became certain since the last call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// Content.
    pub text: String,
    /// Calls that are complete.
    pub calls: Vec<Call>,
}

impl Said {
    /// Returns the content alone.
    pub fn text(text: String) -> Said {
        Said { text, calls: Vec::new() }
    }

    /// Returns whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.calls.is_empty()
    }

    /// Joins what follows.
    pub fn and(mut self, more: Said) -> Said {
        self.text += &more.text;
        self.calls.extend(more.calls);
        self
    }
}

/// The tools that a request offers and how calls are looked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// Names of the functions.
    pub names: Vec<String>,
    /// Whether more than one call is wanted.
    pub parallel: bool,
}

/// Returns the tools of a request; `None`: there are none, or none may be called.
///
/// # Errors
/// A tool is no function, or the choice cannot be granted.
pub fn offer(fields: &Fields) -> Result<Option<Offer>> {
    let list = fields.list("tools")?.map(Vec::as_slice).unwrap_or_default();
    if list.len() > TOOLS_MAX {
        return Err(Error::field("tools", format!("tools: found {}, limit {TOOLS_MAX}", list.len())));
    }
    let name = |(at, tool): (usize, &Value)| {
        let name = tool["function"]["name"].as_str().filter(|name| !name.is_empty());
        match (tool["type"] == "function", name) {
            (true, Some(name)) => Ok(name.to_owned()),
            _ => Err(Error::field(
                &format!("tools[{at}]"),
                format!("tools[{at}]: expected {{\"type\": \"function\", \"function\": {{\"name\": ...}}}}"),
            )),
        }
    };
    let names = list.iter().enumerate().map(name).collect::<Result<Vec<String>>>()?;
    let choice = match fields.get("tool_choice") {
        None => "auto",
        Some(Value::String(choice)) => choice.as_str(),
        Some(choice) if choice["type"] == "function" => "a named function",
        Some(_) => "this form",
    };
    if !matches!(choice, "auto" | "none") {
        let message = format!(
            "tool_choice: {choice} is not supported, since an answer cannot be forced into a form; \
             expected \"auto\" or \"none\". To get a call, say so in a message and offer one tool"
        );
        return Err(Error::field("tool_choice", message).code("unsupported_parameter"));
    }
    let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
    Ok((!names.is_empty() && choice == "auto").then_some(Offer { names, parallel }))
}

/// Returns whether a control token begins or ends calls. Such a token must leave text here, unlike other control
/// tokens.
pub fn is_marker(text: &str) -> bool {
    text == ARGUMENTS || MARKERS.iter().any(|(begin, end)| text == *begin || text == *end)
}

/// Looks for calls in a text that grows.
#[derive(Clone, Debug)]
pub struct Calls {
    offer: Offer,
    held: String,
    /// Whether the text has had a character other than a blank.
    begun: bool,
    made: usize,
}

/// The finding about the beginning of the held text.
enum Look {
    /// Nothing of a call: content up to here.
    Content(usize),
    /// The text may become a marker.
    Wait,
    Group(Vec<(String, String)>, usize),
}

impl Calls {
    /// Returns the state before any text.
    pub fn new(offer: Offer) -> Calls {
        Calls { offer, held: String::new(), begun: false, made: 0 }
    }

    /// Returns whether there was a call.
    pub fn any(&self) -> bool {
        self.made > 0
    }

    /// Adds text, and returns the parts that are certain with it.
    pub fn push(&mut self, text: &str) -> Said {
        self.held += text;
        self.read(false)
    }

    /// Returns the text that was held back until the end of the answer.
    pub fn finish(&mut self) -> Said {
        let said = self.read(true);
        let rest = std::mem::take(&mut self.held);
        said.and(Said::text(rest))
    }

    fn read(&mut self, ended: bool) -> Said {
        let mut said = Said::default();
        while !self.held.is_empty() {
            let (calls, length) = match self.look(ended) {
                Look::Wait if self.held.len() <= CALL_BYTES_MAX => break,
                Look::Wait => (Vec::new(), self.held.len()),
                Look::Content(length) => (Vec::new(), length),
                Look::Group(calls, length) => (calls, length),
            };
            let text: String = self.held.drain(..length).collect();
            if calls.is_empty() {
                // Blanks around calls are no content.
                let between = !self.begun && text.trim_matches(BETWEEN).is_empty();
                let blank = self.made > 0 && (between || text.trim().is_empty());
                self.begun |= !text.trim().is_empty();
                said.text += if blank { "" } else { &text };
            }
            for (name, arguments) in calls {
                if self.offer.parallel || self.made == 0 {
                    said.calls.push(Call { id: new_id(), name, arguments });
                }
                self.made += 1;
            }
        }
        said
    }

    fn look(&self, ended: bool) -> Look {
        let mut text = self.held.trim_start();
        if self.any() && !self.begun {
            text = text.trim_start_matches(BETWEEN);
            if text.is_empty() {
                return if ended { Look::Content(self.held.len()) } else { Look::Wait };
            }
        }
        let blank = self.held.len() - text.len();
        if !self.begun && text.starts_with('{') {
            return self.bare(blank, ended);
        }
        for (begin, end) in MARKERS {
            let Some(after) = text.strip_prefix(begin) else { continue };
            let at = self.held.len() - after.len();
            return match group(after) {
                Group::Whole(calls, length) => {
                    let rest = after[length..].trim_start();
                    let partly = !ended && end.starts_with(rest) && rest.len() < end.len();
                    if partly && !end.is_empty() {
                        return Look::Wait;
                    }
                    let rest = rest.strip_prefix(end).unwrap_or(&after[length..]);
                    Look::Group(calls, self.held.len() - rest.len())
                }
                Group::Partial if !ended => Look::Wait,
                Group::Partial | Group::No => Look::Content(at),
            };
        }
        self.content(ended)
    }

    /// Reads Llama's form without a marker: the whole answer is objects, each naming a tool that was offered.
    fn bare(&self, blank: usize, ended: bool) -> Look {
        match group(&self.held[blank..]) {
            Group::Whole(calls, length) if calls.iter().all(|(name, _)| self.offer.names.contains(name)) => {
                Look::Group(calls, blank + length)
            }
            Group::Partial if !ended => Look::Wait,
            _ => Look::Content(self.held.len()),
        }
    }

    /// Returns the content up to the first marker, or up to text that may become one.
    fn content(&self, ended: bool) -> Look {
        let text = &self.held;
        let found = MARKERS.iter().filter_map(|(begin, _)| text.find(begin)).min();
        let waits = MARKERS.iter().map(|(begin, _)| overlap(text, begin)).max().unwrap_or(0);
        let mut end = match found {
            Some(at) => at,
            None if ended => text.len(),
            None => text.len() - waits,
        };
        // Blanks may stand before a call, and then are no content.
        if !ended || found.is_some() {
            end = text[..end].trim_end().len();
        }
        match (end, found) {
            (0, Some(at)) if at > 0 => Look::Content(at),
            (0, _) => Look::Wait,
            (end, _) => Look::Content(end),
        }
    }
}

/// The text behind a marker.
enum Group {
    No,
    Partial,
    /// Names and arguments, and the bytes they take.
    Whole(Vec<(String, String)>, usize),
}

fn group(text: &str) -> Group {
    let blank = text.len() - text.trim_start().len();
    let rest = &text[blank..];
    if rest.is_empty() {
        return Group::Partial;
    }
    if !rest.starts_with(['{', '[']) {
        return named(text);
    }
    let (mut calls, mut at) = (Vec::new(), blank);
    loop {
        let mut values = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Value>();
        match values.next() {
            Some(Ok(value)) => {
                let list = if let Value::Array(list) = value { list } else { vec![value] };
                let Some(found) = list.iter().map(call).collect::<Option<Vec<_>>>() else { return Group::No };
                calls.extend(found);
                at += values.byte_offset();
            }
            Some(Err(error)) if error.is_eof() => return Group::Partial,
            _ => return Group::No,
        }
        // Llama puts a semicolon between calls.
        let next = text[at..].trim_start();
        match next.strip_prefix(';').map(str::trim_start) {
            Some(more) if more.starts_with('{') => at = text.len() - more.len(),
            _ if calls.is_empty() => return Group::No,
            _ => return Group::Whole(calls, at),
        }
    }
}

/// Reads Mistral's newer form: `name[ARGS]{...}` or `name{...}`.
fn named(text: &str) -> Group {
    let Some(at) = text.find('{') else {
        return if text.len() < 256 { Group::Partial } else { Group::No };
    };
    let name = text[..at].trim().trim_end_matches(ARGUMENTS).trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return Group::No;
    }
    let mut values = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Map<String, Value>>();
    match values.next() {
        Some(Ok(arguments)) => {
            let call = (name.to_owned(), Value::Object(arguments).to_string());
            Group::Whole(vec![call], at + values.byte_offset())
        }
        Some(Err(error)) if error.is_eof() => Group::Partial,
        _ => Group::No,
    }
}

/// Reads `{"name": ..., "arguments" or "parameters": {...}}`, perhaps below `function`.
fn call(value: &Value) -> Option<(String, String)> {
    let value = if value["function"].is_object() { &value["function"] } else { value };
    let name = value.get("name")?.as_str()?.to_owned();
    let arguments = value.get("arguments").or(value.get("parameters"));
    let arguments = match arguments {
        None => json!({}).to_string(),
        Some(Value::String(text)) => text.clone(),
        Some(value @ Value::Object(_)) => value.to_string(),
        Some(_) => return None,
    };
    Some((name, arguments))
}

/// Returns the number of bytes at the end of `text` that begin `marker`.
fn overlap(text: &str, marker: &str) -> usize {
    let most = (marker.len() - 1).min(text.len());
    (1..=most).rev().find(|&length| text.as_bytes().ends_with(&marker.as_bytes()[..length])).unwrap_or(0)
}

fn new_id() -> String {
    const DIGITS: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut number = (now ^ count.rotate_left(44)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut digit = || {
        let digit = DIGITS[(number % 62) as usize];
        number = (number / 62).wrapping_add(count);
        char::from(digit)
    };
    (0..9).map(|_| digit()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns content and calls. The result must not depend on the pieces in which the text comes.
    fn read(text: &str, parallel: bool) -> (String, Vec<(String, String)>) {
        let offer = Offer { names: vec!["look".into(), "add".into()], parallel };
        let mut all = Vec::new();
        for size in [1, 2, 3, 7, 1000] {
            let mut calls = Calls::new(offer.clone());
            let letters: Vec<char> = text.chars().collect();
            let mut said = Said::default();
            for piece in letters.chunks(size) {
                said = said.and(calls.push(&piece.iter().collect::<String>()));
            }
            said = said.and(calls.finish());
            let list = said.calls.into_iter().map(|call| (call.name, call.arguments));
            all.push((said.text, list.collect::<Vec<_>>()));
        }
        assert!(all.iter().all(|found| *found == all[0]), "{text}: {all:?}");
        all.remove(0)
    }

    fn one(name: &str, arguments: &str) -> (String, String) {
        (name.into(), arguments.into())
    }

    #[test]
    fn every_familys_form_of_a_call_is_read() {
        let look = one("look", r#"{"at":"x"}"#);
        let add = one("add", r#"{"a":1}"#);
        let cases = [
            (
                "<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": \"x\"}}\n</tool_call>",
                "",
                vec![&look],
            ),
            (
                "I look.\n<tool_call>{\"name\": \"look\", \"arguments\": {\"at\": \"x\"}}</tool_call>\n<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>",
                "I look.",
                vec![&look, &add],
            ),
            (
                r#"[TOOL_CALLS] [{"name": "look", "arguments": {"at": "x"}}, {"name": "add", "arguments": {"a": 1}}]"#,
                "",
                vec![&look, &add],
            ),
            (r#"[TOOL_CALLS]look[ARGS]{"at": "x"}"#, "", vec![&look]),
            (
                "Well. <tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call> \n",
                "Well.",
                vec![&add],
            ),
            (r#"[TOOL_CALLS]look{"at": "x"}[TOOL_CALLS]add{"a": 1}"#, "", vec![&look, &add]),
            (r#"<|tool_call|>[{"name": "look", "arguments": {"at": "x"}}]<|/tool_call|>"#, "", vec![&look]),
            (r#"<|python_tag|>{"name": "look", "parameters": {"at": "x"}}<|eom_id|>"#, "", vec![&look]),
            (r#"{"name": "look", "parameters": {"at": "x"}}"#, "", vec![&look]),
            (
                r#"{"name": "look", "parameters": {"at": "x"}}; {"name": "add", "parameters": {"a": 1}}"#,
                "",
                vec![&look, &add],
            ),
            (
                r#"{"type": "function", "function": {"name": "look", "parameters": {"at": "x"}}}"#,
                "",
                vec![&look],
            ),
        ];
        for (text, content, calls) in cases {
            let (found, list) = read(text, true);
            assert_eq!(found, content, "{text}");
            assert_eq!(list.iter().collect::<Vec<_>>(), calls, "{text}");
        }
        let two = r#"{"name": "look", "parameters": {}};{"name": "add", "parameters": {}}"#;
        assert_eq!(read(two, false).1, [one("look", "{}")]);
    }

    #[test]
    fn what_is_no_call_stays_content() {
        for text in [
            "plain words",
            " with blanks \n",
            "<tool_call>not json</tool_call>",
            r#"<tool_call>{"name": "look", "arguments": {"at""#,
            r#"{"name": "unknown", "parameters": {}}"#,
            r#"{"answer": 42}"#,
            r#"Here: {"name": "look", "parameters": {}}"#,
            "a < b, [TOOL",
            "[TOOL_CALLS] are written so",
            "{",
        ] {
            assert_eq!(read(text, true), (text.to_owned(), vec![]), "{text}");
        }
    }

    #[test]
    fn ids_are_nine_letters_and_digits_and_differ() {
        let ids: std::collections::BTreeSet<String> = (0..1000).map(|_| new_id()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric())));
    }
}
