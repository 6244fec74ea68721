//! A list of messages per row, under the names of OpenAI, Hugging Face, ShareGPT and others, or JSON text of such a
//! list.

use super::super::{Conversation, Layout, Message};
use super::{Column, Format, Reading, Rows, column, fields, json, sharegpt};
use crate::fault::Result;
use arrow::array::{Array, ArrayRef};
use arrow::datatypes::{DataType, Field};
use serde_json::{Map, Value};

/// The format.
pub static FORMAT: Format = Format {
    layout: Layout::Messages,
    expects: "`messages` (or `conversations`, `conversation`, `dialog`): a list of {role, content} or {from, value}",
    columns: &[Column {
        key: "DatasetConfig.messages_column",
        given: |options| options.messages_column.as_deref(),
        names: &[
            "messages",
            "conversations",
            "conversation",
            "dialog",
            "dialogue",
            "dialogs",
            "chat",
            "turns",
        ],
    }],
    refuses: |fields| refuses(fields[0]),
    rows,
};

/// Names of the field that holds the role, in any letter case.
const ROLE_FIELDS: [&str; 6] = ["role", "from", "speaker", "author", "sender", "user_type"];
/// Names of the field that holds the content, in any letter case.
const CONTENT_FIELDS: [&str; 7] = ["content", "value", "text", "message", "utterance", "body", "parts"];

/// Returns the reason why a column of this type holds no messages. Names of the messages' fields are checked row by
/// row, because the configuration may add some.
pub fn refuses(field: &Field) -> Option<String> {
    let kind = field.data_type();
    if column::is_string(kind) {
        return None; // JSON text
    }
    let Some(element) = column::element(kind) else {
        return Some(format!(
            "`{}` is {}; a list of {{role, content}} is needed, or JSON text of one",
            field.name(),
            column::kind(kind)
        ));
    };
    match element.data_type() {
        DataType::Struct(_) => None,
        kind if column::is_string(kind) => None, // JSON text of each message
        other => Some(format!(
            "`{}` is a list of {}; a list of {{role, content}} is needed",
            field.name(),
            column::kind(other)
        )),
    }
}

fn rows(arrays: &[ArrayRef], reading: &mut Reading) -> Result<Rows> {
    let lists = json::Column::of(&arrays[0])?;
    let row = |row| conversation(lists.value(row), reading).map(Conversation::Messages);
    Ok((0..arrays[0].len()).map(row).collect())
}

/// Returns the messages of one row. The error says what is wrong with it.
pub fn conversation(value: Value, reading: &mut Reading) -> std::result::Result<Vec<Message>, String> {
    let value = match value {
        Value::String(text) => json::of_text(&text)
            .map_err(|problem| format!("the list of messages is a text that is {problem}"))?,
        other => other,
    };
    match value {
        Value::Null => Err("the list of messages is null".into()),
        Value::Array(turns) if turns.is_empty() => Err("the list of messages is empty".into()),
        Value::Array(turns) => turns.into_iter().map(|turn| message(turn, reading)).collect(),
        other => Err(format!("the messages are {}; expected a list of {{role, content}}", what(&other))),
    }
}

fn message(turn: Value, reading: &mut Reading) -> std::result::Result<Message, String> {
    let turn = match turn {
        Value::String(text) if text.trim_start().starts_with('{') => {
            json::of_text(&text).map_err(|problem| format!("a message is a text that is {problem}"))?
        }
        other => other,
    };
    let mut turn = match turn {
        Value::Object(turn) => turn,
        Value::Null => return Err("a message is null".into()),
        other => return Err(format!("a message is {}; expected {{role, content}}", what(&other))),
    };
    let names = reading.names;
    let Some(speaker) = remove(&mut turn, names.role_field.as_deref(), &ROLE_FIELDS) else {
        return Err(no_field("who speaks", &turn, &ROLE_FIELDS, "role_field"));
    };
    let Value::String(speaker) = speaker else {
        return Err(format!("a message's role is {}", what(&speaker)));
    };
    let role = sharegpt::role(&speaker, names).ok_or_else(|| unknown_speaker(&speaker))?;
    let said = remove(&mut turn, names.content_field.as_deref(), &CONTENT_FIELDS).unwrap_or(Value::Null);
    let mut message = Message::new(role, "");
    if sharegpt::is_caller(&speaker) {
        message.content = None;
        message.extra.push(("tool_calls", sharegpt::calls(said)?));
    } else {
        put_content(&mut message, said, reading)?;
    }
    fields::take(&mut message, turn, |name| reading.field_not_read(name))?;
    check_content(&message, reading)?;
    Ok(message)
}

/// Sets the content. Text stays unchanged and parts of text are joined. An object (the result of a tool) is left to
/// the template.
fn put_content(message: &mut Message, said: Value, reading: &mut Reading) -> std::result::Result<(), String> {
    let role = &message.role;
    message.content = match said {
        Value::Null => None,
        Value::String(text) => Some(text),
        Value::Array(parts) if parts.iter().all(is_part) => {
            if parts.len() > 1 {
                reading.parts_joined += 1;
            }
            Some(parts.iter().map(part).collect::<std::result::Result<String, String>>()?)
        }
        Value::Object(_) | Value::Array(_) if matches!(role.as_str(), "tool" | "function" | "ipython") => {
            message.extra.push(("content", said));
            None
        }
        Value::Object(ref fields) if is_part(&said) && !fields.is_empty() => Some(part(&said)?),
        other => return Err(format!("the {role}'s content is {}; expected text", what(&other))),
    };
    Ok(())
}

/// Returns whether a value is a part of a content: `{type: text, text}`, or a bare text.
fn is_part(value: &Value) -> bool {
    value.is_string() || value.get("type").is_some_and(Value::is_string) || value.get("text").is_some()
}

fn part(value: &Value) -> std::result::Result<String, String> {
    if let Value::String(text) = value {
        return Ok(text.clone());
    }
    let kind = value.get("type").and_then(Value::as_str).unwrap_or("text");
    match (kind, value.get("text").and_then(Value::as_str)) {
        ("text" | "input_text" | "output_text", Some(text)) => Ok(text.to_owned()),
        ("text" | "input_text" | "output_text", None) => {
            Err("a part of a content is of type text and has none".into())
        }
        (other, _) => Err(format!("a part of a content is of type {other:?}; hone trains on text only")),
    }
}

/// Refuses an empty answer, which cannot be learned. Other empty turns are shown as the template writes them.
fn check_content(message: &Message, reading: &mut Reading) -> std::result::Result<(), String> {
    let says_otherwise = !message.extra.is_empty();
    match (&message.content, message.role.as_str()) {
        (_, _) if says_otherwise => {}
        (None, "assistant") => return Err("the assistant's content is null".into()),
        (Some(text), "assistant") if text.trim().is_empty() && message.learned => {
            return Err("the assistant's content is empty".into());
        }
        (Some(text), "user") if text.trim().is_empty() => reading.empty_questions += 1,
        _ => {}
    }
    Ok(())
}

/// Removes and returns the field that the user named, or the first field with one of `names` in any letter case.
fn remove(turn: &mut Map<String, Value>, named: Option<&str>, names: &[&str]) -> Option<Value> {
    if let Some(name) = named {
        return turn.shift_remove(name);
    }
    let found = names.iter().find_map(|name| turn.keys().find(|key| key.eq_ignore_ascii_case(name)))?.clone();
    turn.shift_remove(&found)
}

fn no_field(what: &str, turn: &Map<String, Value>, names: &[&str], key: &str) -> String {
    let found: Vec<&str> = turn.keys().map(String::as_str).collect();
    let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
    format!(
        "a message has no field that says {what}: fields found: {found}; known are {} (name it with `{key}`)",
        names.join(", ")
    )
}

fn unknown_speaker(speaker: &str) -> String {
    let shown: String = speaker.chars().take(40).collect();
    format!(
        "unknown role {shown:?}; known are {} (name yours with `user_names` or `assistant_names`)",
        sharegpt::known()
    )
}

/// Returns the kind of a JSON value in words.
fn what(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
