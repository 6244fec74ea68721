//! The closed list of a message's fields beside role and content: each is used, refused or not read.

use super::{json, sharegpt};
use crate::dataset::Message;
use serde_json::{Map, Value};

/// The treatment of a field of a message.
enum Use {
    /// The chat template sees it unchanged.
    Template,
    /// JSON text is parsed, then the chat template sees it. An empty list counts as absent.
    Json,
    /// OpenAI's older form of `tool_calls`.
    Call,
    /// 0: the turn is shown and not learned. 1: it is learned.
    Weight,
    /// The message cannot be used; the text says why.
    Refused(&'static str),
}

const TEXT_ONLY: &str = "hone trains on text only";

/// The known fields, in any letter case. A warning names any other field.
const FIELDS: [(&str, Use); 27] = [
    ("tool_calls", Use::Json),
    ("function_call", Use::Call),
    ("tool_call_id", Use::Template),
    ("name", Use::Template),
    ("reasoning_content", Use::Template),
    ("reasoning", Use::Template),
    ("thinking", Use::Template),
    ("tools", Use::Template),
    ("documents", Use::Template),
    ("citations", Use::Template),
    ("channel", Use::Template),
    ("recipient", Use::Template),
    ("weight", Use::Weight),
    ("loss_weight", Use::Weight),
    ("train", Use::Weight),
    ("training", Use::Weight),
    ("trainable", Use::Weight),
    ("train_on", Use::Weight),
    ("loss", Use::Weight),
    ("image", Use::Refused(TEXT_ONLY)),
    ("images", Use::Refused(TEXT_ONLY)),
    ("image_url", Use::Refused(TEXT_ONLY)),
    ("audio", Use::Refused(TEXT_ONLY)),
    ("audios", Use::Refused(TEXT_ONLY)),
    ("video", Use::Refused(TEXT_ONLY)),
    ("videos", Use::Refused(TEXT_ONLY)),
    (
        "train_detail",
        Use::Refused("parts of a turn cannot be left out; use train or weight for the whole turn"),
    ),
];

/// Adds the remaining fields to a message. `unknown` receives the names of fields that are not read. The error says
/// what is wrong with the message.
pub fn take(
    message: &mut Message,
    fields: Map<String, Value>,
    mut unknown: impl FnMut(&str),
) -> Result<(), String> {
    for (written, value) in fields {
        if is_nothing(&value) {
            continue;
        }
        let Some((name, usage)) = FIELDS.iter().find(|(name, _)| name.eq_ignore_ascii_case(&written)) else {
            unknown(&written);
            continue;
        };
        match usage {
            Use::Template => message.extra.push((name, value)),
            Use::Json => {
                let value = list(name, value)?;
                if !is_nothing(&value) {
                    message.extra.push((name, value));
                }
            }
            Use::Call => message.extra.push(("tool_calls", sharegpt::calls(value)?)),
            Use::Weight => message.learned &= is_learned(name, &value)?,
            Use::Refused(why) => return Err(format!("a message has `{name}`: {why}")),
        }
    }
    Ok(())
}

/// Returns whether a value is null, or an empty value that exporters write instead of null.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Returns a list of calls; JSON text of one is parsed.
fn list(name: &str, value: Value) -> Result<Value, String> {
    let value = match value {
        Value::String(text) => {
            json::of_text(&text).map_err(|problem| format!("{name} is a text that is {problem}"))?
        }
        other => other,
    };
    match value {
        Value::Array(_) | Value::Null => Ok(value),
        call @ Value::Object(_) => Ok(Value::Array(vec![call])),
        other => Err(format!("{name} is {other}; expected a list of calls")),
    }
}

fn is_learned(name: &str, value: &Value) -> Result<bool, String> {
    let number = match value {
        Value::Bool(learned) => return Ok(*learned),
        Value::Number(number) => number.as_f64(),
        Value::String(text) => match text.to_lowercase().as_str() {
            "true" => Some(1.0),
            "false" => Some(0.0),
            text => text.parse().ok(),
        },
        _ => None,
    };
    match number {
        Some(0.0) => Ok(false),
        Some(1.0) => Ok(true),
        _ => Err(format!("a message has {name} {value}; a turn is learned (1) or only shown (0)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn taken(fields: Value) -> Result<(Message, Vec<String>), String> {
        let Value::Object(fields) = fields else { unreachable!() };
        let mut message = Message::new("assistant", "x");
        let mut unknown = Vec::new();
        take(&mut message, fields, |name| unknown.push(name.to_owned()))?;
        Ok((message, unknown))
    }

    #[test]
    fn a_turn_is_learned_unless_its_file_says_otherwise() {
        let learned = |fields| taken(fields).unwrap().0.learned;
        for fields in [json!({}), json!({"weight": 1}), json!({"Weight": 1.0}), json!({"train": true})] {
            assert!(learned(fields.clone()), "{fields}");
        }
        for fields in [json!({"weight": 0}), json!({"train": false}), json!({"loss": "False"})] {
            assert!(!learned(fields.clone()), "{fields}");
        }
        assert!(taken(json!({"weight": 0.5})).unwrap_err().contains("weight 0.5"));
    }

    #[test]
    fn calls_are_read_from_text_and_empty_ones_are_none() {
        let call = json!([{"function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]);
        let extra = |fields| taken(fields).unwrap().0.extra;
        assert_eq!(extra(json!({"tool_calls": call})), [("tool_calls", call.clone())]);
        assert_eq!(extra(json!({"tool_calls": call.to_string()})), [("tool_calls", call)]);
        for nothing in [json!({"tool_calls": []}), json!({"tool_calls": "[]"}), json!({"tool_calls": null})] {
            assert_eq!(extra(nothing), []);
        }
        assert!(taken(json!({"tool_calls": "f()"})).unwrap_err().contains("not JSON"));
    }

    #[test]
    fn unknown_fields_are_named_and_other_senses_refused() {
        assert_eq!(taken(json!({"mood": "good", "empty": null})).unwrap().1, ["mood"]);
        assert!(taken(json!({"images": ["a.png"]})).unwrap_err().contains("text only"));
        assert_eq!(taken(json!({"images": []})).unwrap().1, Vec::<String>::new());
    }
}
