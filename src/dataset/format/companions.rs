//! Columns beside those of the layout -> the context that the chat template sees beside the messages. The list of
//! known columns is closed; a warning names the columns that nothing reads.

use super::super::{Context, Conversation, Message, Options};
use super::{Reading, column, find, json};
use crate::fault::Result;
use arrow::array::ArrayRef;
use arrow::datatypes::Schema;
use serde_json::{Value, json};
use std::sync::Arc;

/// The use of a column beside the layout's own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Companion {
    /// A system turn.
    System,
    /// The tools that the assistant may call.
    Tools,
    /// OpenAI's older form of tools.
    Functions,
    /// Documents to answer from.
    Documents,
    /// Further variables of the template.
    Variables,
}

/// Names of each companion, in any letter case.
const COMPANIONS: [(Companion, &[&str]); 5] = [
    (Companion::System, &["system", "system_prompt", "system_message"]),
    (Companion::Tools, &["tools"]),
    (Companion::Functions, &["functions"]),
    (Companion::Documents, &["documents"]),
    (Companion::Variables, &["chat_template_kwargs"]),
];

/// Columns that identify a row or its origin. Nothing is lost if they are not read.
const ABOUT_THE_ROW: [&str; 17] = [
    "Unnamed: 0",
    "__index_level_0__",
    "id",
    "idx",
    "index",
    "uuid",
    "row_id",
    "prompt_id",
    "conversation_id",
    "source",
    "dataset",
    "language",
    "lang",
    "license",
    "url",
    "created_at",
    "timestamp",
];

/// (use, column name) of each companion in a schema; the columns `taken` belong to the layout.
pub fn of(schema: &Schema, options: &Options, taken: &[String]) -> Result<Vec<(Companion, String)>> {
    let mut found: Vec<(Companion, String)> = Vec::new();
    for (companion, names) in COMPANIONS {
        let (named, key) = match companion {
            Companion::System => (options.names.system_column.as_deref(), "system_column"),
            Companion::Tools => (options.names.tools_column.as_deref(), "tools_column"),
            _ => (None, ""),
        };
        let name = match named {
            Some(name) => Some(super::named(schema, name, key)?),
            None => names.iter().find_map(|name| find(schema, name)),
        };
        if let Some(name) = name.filter(|name| !taken.contains(name)) {
            found.push((companion, name));
        }
    }
    Ok(found)
}

/// Records the columns that nothing reads.
pub fn note_others(schema: &Schema, read: &[String], reading: &mut Reading) {
    let others = schema.fields().iter().filter(|field| !read.contains(field.name()));
    for field in others {
        let about = ABOUT_THE_ROW.iter().any(|name| name.eq_ignore_ascii_case(field.name()));
        reading.column_not_read(field.name(), about);
    }
}

/// The companions' arrays, ready to be read row by row.
pub struct Columns<'a> {
    columns: Vec<(Companion, &'a str, json::Column)>,
}

impl<'a> Columns<'a> {
    /// Prepares the arrays of the companions.
    pub fn of(companions: &'a [(Companion, String)], arrays: &[ArrayRef]) -> Result<Columns<'a>> {
        let both = companions.iter().zip(arrays);
        let columns =
            both.map(|((companion, name), array)| Ok((*companion, name.as_str(), json::Column::of(array)?)));
        Ok(Columns { columns: columns.collect::<Result<_>>()? })
    }

    /// Adds a row's companions to its conversation and its context. The error says what is wrong with the row.
    pub fn attach(
        &self,
        row: usize,
        mut conversation: Conversation,
        reading: &mut Reading,
    ) -> std::result::Result<(Conversation, Context), String> {
        let mut context = Context::default();
        for (companion, name, column) in &self.columns {
            let value = column.value(row);
            if is_nothing(&value) {
                continue;
            }
            if let Conversation::PromptText { .. } | Conversation::Text(_) | Conversation::Tokens { .. } =
                conversation
            {
                reading.without_template(name);
                continue;
            }
            match companion {
                Companion::System => add_system(&mut conversation, text(name, value)?)?,
                Companion::Tools => context.tools = listed(name, value)?,
                Companion::Functions if context.tools.is_none() => {
                    context.tools = listed(name, value)?.map(|functions| Arc::new(as_tools(&functions)));
                }
                Companion::Functions => {}
                Companion::Documents => context.documents = listed(name, value)?,
                Companion::Variables => match parsed(name, value)? {
                    Value::Object(variables) => context.variables = Some(Arc::new(variables)),
                    other => return Err(format!("`{name}` is {other}; expected names and values")),
                },
            }
        }
        Ok((conversation, context))
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn text(name: &str, value: Value) -> std::result::Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("`{name}` is {other}; expected text")),
    }
}

/// Returns the value; JSON text is parsed.
fn parsed(name: &str, value: Value) -> std::result::Result<Value, String> {
    match value {
        Value::String(text) => {
            json::of_text(&text).map_err(|problem| format!("`{name}` is a text that is {problem}"))
        }
        other => Ok(other),
    }
}

/// Returns a list of objects; JSON text of it or of its items is parsed. An empty list gives `None`.
fn listed(name: &str, value: Value) -> std::result::Result<Option<Arc<Value>>, String> {
    let items = match parsed(name, value)? {
        Value::Array(items) => items,
        item @ Value::Object(_) => vec![item],
        Value::Null => return Ok(None),
        other => return Err(format!("`{name}` is {other}; expected a list")),
    };
    let items: Vec<Value> =
        items.into_iter().map(|item| parsed(name, item)).collect::<std::result::Result<_, _>>()?;
    match items.iter().find(|item| !item.is_object()) {
        Some(other) => Err(format!("`{name}` holds {other}; expected objects")),
        None => Ok((!items.is_empty()).then(|| Arc::new(Value::Array(items)))),
    }
}

fn as_tools(functions: &Value) -> Value {
    let functions = functions.as_array().into_iter().flatten();
    functions.map(|function| json!({"type": "function", "function": function})).collect()
}

/// Puts the system turn first. If there is one already, it must say the same.
fn add_system(conversation: &mut Conversation, text: String) -> std::result::Result<(), String> {
    let messages = match conversation {
        Conversation::Messages(messages) => messages,
        Conversation::Prompt { prompt, .. } => prompt,
        _ => unreachable!("texts have no turns"),
    };
    match messages.first() {
        Some(first) if first.role == "system" && first.text() == text => {}
        Some(first) if first.role == "system" && first.text().trim().is_empty() => {
            messages[0] = Message::new("system", text);
        }
        Some(first) if first.role == "system" => {
            return Err("the row has a system turn and a system column that says something else".into());
        }
        _ => messages.insert(0, Message::new("system", text)),
    }
    Ok(())
}

/// Returns the reason why a companion's column cannot be read at all.
pub fn refuses(schema: &Schema, companion: Companion, name: &str) -> Option<String> {
    let field = schema.field_with_name(name).ok()?;
    let kind = field.data_type();
    let fits = match companion {
        Companion::System => column::is_string(kind) || kind.is_null(),
        _ => column::is_string(kind) || kind.is_nested() || kind.is_null(),
    };
    let needs = if companion == Companion::System { "text" } else { "a list or JSON text" };
    (!fits).then(|| format!("`{name}` is {}; {needs} is needed", column::kind(kind)))
}
