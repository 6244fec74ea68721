//! The words of ShareGPT and its many descendants: names of speakers, and turns that call a function.

use super::super::Names;
use serde_json::{Value, json};

/// Each role of templates with its words for a speaker, in lower case.
const SPEAKERS: [(&str, &[&str]); 7] = [
    ("system", &["system", "system_prompt"]),
    ("developer", &["developer"]),
    ("user", &["user", "human", "prompter", "customer", "client", "instruction", "question"]),
    (
        "assistant",
        &[
            "assistant",
            "gpt",
            "chatgpt",
            "bing",
            "bard",
            "claude",
            "gemini",
            "model",
            "bot",
            "chatbot",
            "ai",
            "llm",
            "agent",
            "response",
            "answer",
            "output",
            CALLER,
        ],
    ),
    ("tool", &["tool", "tool_response", "tool_result", "observation", "function_response"]),
    ("function", &["function"]),
    ("ipython", &["ipython"]),
];

/// A turn of the assistant whose text is a call: `{"name": ..., "arguments": ...}`.
const CALLER: &str = "function_call";

/// Returns the role of a speaker, as templates write it.
pub fn role(speaker: &str, names: &Names) -> Option<&'static str> {
    let word = speaker.trim().to_lowercase();
    let is_among = |list: &[String]| list.iter().any(|name| name.to_lowercase() == word);
    if is_among(&names.user) {
        return Some("user");
    }
    if is_among(&names.assistant) {
        return Some("assistant");
    }
    SPEAKERS.iter().find(|(_, words)| words.contains(&word.as_str())).map(|(role, _)| *role)
}

/// Returns all known words.
pub fn known() -> String {
    let words: Vec<&str> = SPEAKERS.iter().flat_map(|(_, words)| words.iter().copied()).collect();
    words.join(", ")
}

/// Returns whether a speaker's text is a call of a function.
pub fn is_caller(speaker: &str) -> bool {
    speaker.trim().eq_ignore_ascii_case(CALLER)
}

/// Converts `{name, arguments}`, or a list of them, to the form of `tool_calls`. The error says why it is not a
/// call.
pub fn calls(call: Value) -> Result<Value, String> {
    let call = match call {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| format!("a function call is not JSON text: {error}"))?,
        other => other,
    };
    let one = |call: Value| match call.get("name").is_some_and(Value::is_string) {
        true => Ok(json!({"type": "function", "function": call})),
        false => Err("a function call has no name".to_owned()),
    };
    match call {
        Value::Array(calls) => calls.into_iter().map(one).collect(),
        call => Ok(Value::Array(vec![one(call)?])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speakers_are_known_by_many_words_in_any_case() {
        let names = Names { user: vec!["Kunde".into()], assistant: vec!["Berater".into()], ..Names::KNOWN };
        for (speaker, expected) in [
            ("Human", Some("user")),
            ("GPT", Some("assistant")),
            ("ChatGPT", Some("assistant")),
            ("bing", Some("assistant")),
            ("model", Some("assistant")),
            ("KUNDE", Some("user")),
            ("berater", Some("assistant")),
            ("observation", Some("tool")),
            ("ipython", Some("ipython")),
            ("usr", None),
        ] {
            assert_eq!(role(speaker, &names), expected, "{speaker}");
        }
    }

    #[test]
    fn no_word_stands_for_two_roles() {
        let mut words: Vec<&str> = SPEAKERS.iter().flat_map(|(_, words)| words.iter().copied()).collect();
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), count);
    }

    #[test]
    fn a_function_call_is_text_or_an_object() {
        let expected = json!([{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]);
        assert_eq!(calls(json!({"name": "f", "arguments": {"a": 1}})).unwrap(), expected);
        assert_eq!(calls(json!(r#"{"name": "f", "arguments": {"a": 1}}"#)).unwrap(), expected);
        assert!(calls(json!("f(1)")).unwrap_err().contains("not JSON text"));
        assert!(calls(json!({"arguments": {}})).unwrap_err().contains("no name"));
    }
}
